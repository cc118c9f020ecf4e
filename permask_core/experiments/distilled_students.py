"""Distillation as an experiment in stages that are stored.

For each seed: train a teacher, train a student on the labels only, and train a distilled student at each temperature.
Their predictions on the test images are stored, for accuracy by class and fairness.

Source: Mohammadshahi and Ioannou, "What's Left After Distillation? How Knowledge Transfer Impacts Fairness and Bias",
TMLR 2025, arXiv 2410.08407, which has "non-distilled" for the student and "distilled" for the distilled student.
"""

from dataclasses import dataclass, field

import numpy as np

from permask_core.data import DATASETS, check_options
from permask_core.experiments.presets import DISTILLED_STUDENTS as PRESETS
from permask_core.experiments.stages import (
    Settings,
    change_preset,
    content,
    data,
    drop_none,
    run_jobs,
    train_stage,
)
from permask_core.models import MODELS, build_model, check_model_options
from permask_core.runs.checks import check_work
from permask_core.runs.processes import default_device
from permask_core.training.distillation import Distillation, distil
from permask_core.training.loop import evaluate, fit, predict
from permask_core.training.recipe import Recipe

ROLES = ("teacher", "student", "distilled")


@dataclass(frozen=True)
class Experiment(Settings):
    """The settings of one experiment: everything that its results depend on except the seed, the role and the
    temperature."""

    dataset: str = "digits"
    options: dict = field(default_factory=dict)  # of the data set: see permask_core.data.load_dataset
    root: str | None = None  # folder of the data set's files, if any; does not affect results
    teacher: str = "mlp"
    teacher_options: dict = field(default_factory=dict)  # of the network: see permask_core.models.build_model
    teacher_recipe: Recipe = Recipe()
    student: str = "mlp"
    student_options: dict = field(default_factory=dict)
    student_recipe: Recipe = Recipe()  # with and without a teacher
    alpha: float = 0.8  # weight of the teacher's term in the loss
    scale_by_t2: bool = True
    processes: int = 1  # number that share each batch: see permask_core.training.fit

    def __post_init__(self):
        super().__post_init__()
        self.check_names(dataset=DATASETS, teacher=MODELS, student=MODELS)
        check_options(self.dataset, self.options)
        for role in ("teacher", "student"):
            name, options = getattr(self, role), getattr(self, f"{role}_options")
            try:
                check_model_options(name, options)
            except ValueError as error:
                raise ValueError(f"{role}_options is {options!r}: {error}") from None
        Distillation(1.0, self.alpha, self.scale_by_t2)


_DATA = ("dataset", "options", "processes")
_TEACHER = (*_DATA, "teacher", "teacher_options", "teacher_recipe")
_STUDENT = (*_DATA, "student", "student_options", "student_recipe")


def preset(name, *, recipe=None, **changes):
    """Return the experiment of a preset, with changes.

    Parameters
    ----------
    name : str
        One of ``PRESETS``.
    recipe : dict, optional
        Changes of both recipes, such as ``{"epochs": 2}``.
    **changes
        Fields of :class:`Experiment`, as in :func:`permask_core.experiments.stages.change`.

    Raises
    ------
    ValueError
        If there is no such preset or field, or a value is out of range.

    Examples
    --------
    >>> preset("digits", recipe={"epochs": 2}).student_recipe.epochs
    2
    """
    return change_preset(PRESETS, name, Experiment(),
                         dict.fromkeys(("teacher_recipe", "student_recipe"), recipe) | drop_none(changes))


def build_network(experiment, role, state=None, *, seed=0):
    """Return the network of a role, newly initialised from ``seed`` or with the weights of ``state``."""
    kind = "teacher" if role == "teacher" else "student"
    _, _, _, input_shape, classes = data(experiment)
    model = build_model(getattr(experiment, kind), input_shape, classes, seed=seed,
                        **getattr(experiment, f"{kind}_options"))
    if state is not None:
        model.load_state_dict(state)
    return model


def train_network(experiment, store, seed, role, temperature=None):
    """Train the network of a role, or load it from the store.

    Networks of different roles share no random numbers, so they can be compared as independent samples. A distilled
    student has the teacher of its seed; students of one seed at different temperatures differ only in the temperature.

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seed : int
    role : {"teacher", "student", "distilled"}
    temperature : float, optional
        For the distilled student only.

    Returns
    -------
    (dict of str to torch.Tensor, torch.Tensor, dict)
        The state; logits [n, classes] on the test inputs; the record with the test ``accuracy`` and ``loss``.

    Raises
    ------
    ValueError
        If the role is unknown, if it needs a temperature and has none, or the reverse.
    """
    check_role(role, temperature)
    own = len(ROLES) * seed + ROLES.index(role)
    recipe = experiment.teacher_recipe if role == "teacher" else experiment.student_recipe
    name = f"{role}, seed {seed}" if temperature is None else f"{role} at T = {temperature:g}, seed {seed}"

    def train(unfinished):
        model, task = build_network(experiment, role, seed=own), data(experiment)
        how = {"seed": own, "processes": experiment.processes, "resume": unfinished, "description": name}
        if role == "distilled":
            distil(model, _teaching(experiment, store, seed), task.train, recipe, temperature=temperature,
                   alpha=experiment.alpha, scale_by_t2=experiment.scale_by_t2, **how)
        else:
            fit(model, task.train, recipe, **how)
        tensors = {f"state/{key}": tensor for key, tensor in model.state_dict().items()}
        return tensors | {"logits": predict(model, task.test)}, evaluate(model, task.test)._asdict()

    names = {"teacher": _TEACHER, "student": _STUDENT}.get(role, (*_TEACHER, *_STUDENT, "alpha", "scale_by_t2"))
    also = {"temperature": float(temperature)} if role == "distilled" else {}
    tensors, record = train_stage(store, role, train, seed=seed, **also, **experiment.stage_parameters(*names))
    logits = tensors.pop("logits")
    return {key.removeprefix("state/"): tensor for key, tensor in tensors.items()}, logits, record


def check_role(role, temperature):
    """Raise ValueError unless the role exists and there is a temperature for, and only for, the distilled student."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}: expected one of {', '.join(ROLES)}")
    if role == "distilled":
        Distillation(temperature)
    elif temperature is not None:
        raise ValueError(f"temperature is {temperature!r} for the role {role!r}: expected none")


def _teaching(experiment, store, seed):
    """Return the teacher of a seed, or its logits for the training inputs if these are the same in every epoch."""
    def teacher():
        return build_network(experiment, "teacher", train_network(experiment, store, seed, "teacher")[0])

    def compute():
        return {"logits": predict(teacher().to(default_device()), data(experiment).train)}, {}

    if data(experiment).train.augments:
        return teacher()
    return store.stage("teacher_logits", compute, seed=seed, **experiment.stage_parameters(*_TEACHER))[0]["logits"]


def run(experiment, store, *, seeds, temperatures, workers=1):
    """Train teachers, students and distilled students over seeds and temperatures.

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seeds : sequence of int
    temperatures : sequence of float
        Temperatures of the distilled students.
    workers : int
        Number of processes, which share the seeds; with more than one, each uses one thread, and a script must call
        this below ``if __name__ == "__main__":``.

    Returns
    -------
    list of dict
        One row for each run: ``role``, ``temperature`` (None if not distilled), ``seed``, a hash of the ``data``, test
        ``accuracy`` in [0, 1], ``loss`` in nats, ``seconds`` of training, and ``predictions``, int64 [n], the predicted
        classes of the test inputs.

    Raises
    ------
    ValueError
        Before any training, if an argument is unknown or out of range.
    RuntimeError
        If a worker process died.
    """
    seeds, temperatures = list(seeds), list(temperatures)
    check_work(seeds, workers)
    if len(set(temperatures)) < len(temperatures):  # a run counted twice would narrow intervals
        raise ValueError(f"temperatures is {temperatures}: expected each value once")
    runs = [("teacher", None), ("student", None), *(("distilled", value) for value in temperatures)]
    for one in runs:
        check_role(*one)
    for role in ROLES[:2]:
        build_network(experiment, role)  # raises an error if it does not fit the data
    jobs = [(experiment, seed, runs) for seed in map(int, seeds)]
    return run_jobs(_run_seed, jobs, store, workers, len(jobs) * len(runs))


def _run_seed(store, experiment, seed, runs):
    for role, temperature in runs:
        _, logits, record = train_network(experiment, store, seed, role, temperature)
        yield {"role": role, "temperature": temperature, "seed": seed, "data": content(experiment), **record,
               "predictions": logits.argmax(1)}


def select_predictions(rows, role, temperature=None):
    """Return the predictions of a role, an int64 array [seeds, n] in the order of the seeds.

    Raises
    ------
    ValueError
        If there are none.
    """
    found = sorted((row["seed"], i) for i, row in enumerate(rows)
                   if (row["role"], row["temperature"]) == (role, temperature))
    if not found:
        raise ValueError(f"rows has no run of the role {role!r} at temperature {temperature!r}")
    return np.stack([rows[i]["predictions"].numpy() for _, i in found])
