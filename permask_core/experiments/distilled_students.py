"""What a student gets from its teacher, in stages that are stored and found again.

Per seed: train a teacher; train a student on the labels alone; train a distilled student at each temperature. Their
answers on the test images are kept, for everything that can be asked about them: which classes they get wrong, and
whose inputs.

Source: Mohammadshahi and Ioannou, "What's Left After Distillation? How Knowledge Transfer Impacts Fairness and Bias",
TMLR 2025, arXiv 2410.08407, which has "non-distilled" for the student and "distilled" for the distilled student.
"""

from dataclasses import dataclass, field

import numpy as np

from permask_core.data import DATASETS, check_options
from permask_core.experiments.stages import Settings, content, data, replace_settings, run_jobs, train_stage
from permask_core.models import MODELS, build_model
from permask_core.runs.checks import check_work
from permask_core.runs.processes import default_device
from permask_core.training.distillation import Distillation, distil
from permask_core.training.loop import evaluate, fit, predict
from permask_core.training.recipe import Recipe

ROLES = ("teacher", "student", "distilled")


@dataclass(frozen=True)
class Experiment(Settings):
    """The settings of one experiment; everything that its results depend on but the seed, the role and the
    temperature."""

    dataset: str = "digits"
    options: dict = field(default_factory=dict)  # of the data set: see permask_core.data.load_dataset
    root: str | None = None  # where the files of the data set lie, if it has any; decides about nothing else
    teacher: str = "mlp"
    teacher_options: dict = field(default_factory=dict)  # of the network: see permask_core.models.build_model
    teacher_recipe: Recipe = Recipe()
    student: str = "mlp"
    student_options: dict = field(default_factory=dict)
    student_recipe: Recipe = Recipe()  # with and without a teacher
    alpha: float = 0.8  # weight of the teacher's part of the loss
    scale_by_t2: bool = True
    processes: int = 1  # that share each batch: see permask_core.training.fit

    def __post_init__(self):
        self.check_names(dataset=DATASETS, teacher=MODELS, student=MODELS)
        check_options(self.dataset, self.options)
        Distillation(1.0, self.alpha, self.scale_by_t2)


_DATA = ("dataset", "options", "processes")
_TEACHER = (*_DATA, "teacher", "teacher_options", "teacher_recipe")
_STUDENT = (*_DATA, "student", "student_options", "student_recipe")


_QUICK = Recipe(epochs=12, lr=0.05)
_SHAPES = Recipe(epochs=8, lr=0.003, batch_size=64, weight_decay=0.01, optimizer="adamw")
_SMALL_IMAGES = Recipe(epochs=200)
_IMAGENET = Recipe(epochs=90, weight_decay=1e-4, batch_size=256, schedule="step", precision="bf16")
_VIT = Recipe(epochs=300, lr=0.003, weight_decay=0.3, batch_size=4096, accumulate=16, warmup=30, optimizer="adamw",
              precision="bf16")
_TEXT = Recipe(epochs=5, lr=3e-5, weight_decay=0.01, batch_size=32, warmup=0.5, optimizer="adamw", precision="bf16")


def _with(recipe, dataset, teacher, student, options=None):
    return Experiment(dataset, options or {}, teacher=teacher, teacher_recipe=recipe, student=student,
                      student_recipe=recipe)


# The source's pairs, and stand-ins for them that run in seconds. The source names networks, data sets, temperatures and
# alpha; how long and with which learning rates is ours.
PAIRS = {
    "digits": Experiment(
        "digits", {"noise": 1.0, "copies": 5}, teacher="mlp", teacher_recipe=_QUICK, student="mlp",
        student_options={"width": 0.125}, student_recipe=_QUICK),
    # In half of the training images the colour goes with the shape that is to be named.
    "trifeature": Experiment(
        "trifeature", {"n_train": 2000, "n_test": 5000, "image_size": 16, "label": "shape", "correlated": "colour",
                       "match": 0.5, "augment": False},
        teacher="lenet5", teacher_options={"width": 2.0}, teacher_recipe=_SHAPES, student="lenet5",
        student_options={"width": 0.5}, student_recipe=_SHAPES),
    "svhn": _with(_SMALL_IMAGES, "svhn", "resnet56", "resnet20"),
    "cifar10": _with(_SMALL_IMAGES, "cifar10", "resnet56", "resnet20"),
    "cifar100": _with(_SMALL_IMAGES, "cifar100", "resnet56", "resnet20"),
    "cifar100-densenet": _with(_SMALL_IMAGES, "cifar100", "densenet169_cifar", "densenet121_cifar"),
    "tiny_imagenet": _with(_SMALL_IMAGES, "tiny_imagenet", "resnet50", "resnet18"),
    "imagenet": _with(_IMAGENET, "imagenet", "resnet50", "resnet18"),
    "imagenet-vit": _with(_VIT, "imagenet", "vit_b_16", "tiny_vit_5m"),
    "celeba": _with(Recipe(epochs=10, lr=0.05, precision="bf16"), "celeba", "resnet50", "resnet18"),
    "hatexplain": _with(_TEXT, "hatexplain", "bert", "distilbert"),
}


def pair(name, *, options=None, recipe=None, **changes):
    """The experiment of a name, with changes.

    Parameters
    ----------
    name : str
        One of ``PAIRS``.
    options : dict, optional
        Of the data set, beside or instead of the pair's own.
    recipe : dict, optional
        Changes of both recipes, such as ``{"epochs": 2}``.
    **changes
        Fields of :class:`Experiment`; what is None stays.

    Raises
    ------
    ValueError
        If there is no such pair or field, or a value is out of range.
    """
    if name not in PAIRS:
        raise ValueError(f"unknown pair {name!r}: expected one of {', '.join(PAIRS)}")
    chosen = PAIRS[name]
    try:
        recipes = {key: replace_settings(getattr(chosen, key), recipe or {})
                   for key in ("teacher_recipe", "student_recipe")}
    except ValueError as error:
        raise ValueError(f"recipe is {recipe!r}: {error}") from None
    return replace_settings(chosen, {**changes, **recipes, "options": {**chosen.options, **(options or {})}})


def network(experiment, role, state=None, *, seed=0):
    """The network of a role, freshly initialised from ``seed`` or with the weights of ``state``."""
    kind = "teacher" if role == "teacher" else "student"
    _, _, _, input_shape, classes = data(experiment)
    model = build_model(getattr(experiment, kind), input_shape, classes, seed=seed,
                        **getattr(experiment, f"{kind}_options"))
    if state is not None:
        model.load_state_dict(state)
    return model


def train_network(experiment, store, seed, role, temperature=None):
    """Train the network of a role, or find it trained.

    Networks of different roles share nothing that is random, so that they can be compared as independent samples; a
    distilled student has the teacher of its seed, and students of one seed at different temperatures differ in the
    temperature alone.

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seed : int
    role : {"teacher", "student", "distilled"}
    temperature : float, optional
        For the distilled student, and no other.

    Returns
    -------
    (dict of str to torch.Tensor, torch.Tensor, dict)
        The state; logits [n, classes] on the test inputs; the record with the test ``accuracy`` and ``loss``.

    Raises
    ------
    ValueError
        If the role is unknown, or has no temperature that it should have, or the other way round.
    """
    check_role(role, temperature)
    own = len(ROLES) * seed + ROLES.index(role)
    recipe = experiment.teacher_recipe if role == "teacher" else experiment.student_recipe
    name = f"{role}, seed {seed}" if temperature is None else f"{role} at T = {temperature:g}, seed {seed}"

    def train(unfinished):
        model, task = network(experiment, role, seed=own), data(experiment)
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
    """Raise ValueError unless there is such a role, and a temperature if it is the distilled student's and not else."""
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}: expected one of {', '.join(ROLES)}")
    if role == "distilled":
        Distillation(temperature)
    elif temperature is not None:
        raise ValueError(f"temperature is {temperature!r} for the role {role!r}: expected none")


def _teaching(experiment, store, seed):
    """The teacher of a seed, or its logits for the training inputs where these do not change from epoch to epoch."""
    def teacher():
        return network(experiment, "teacher", train_network(experiment, store, seed, "teacher")[0])

    def compute():
        return {"logits": predict(teacher().to(default_device()), data(experiment).train)}, {}

    if data(experiment).train.augments:
        return teacher()
    return store.stage("teacher_logits", compute, seed=seed, **experiment.stage_parameters(*_TEACHER))[0]["logits"]


def run(experiment, store, *, seeds, temperatures, workers=1):
    """Train teachers, students and distilled students over seeds and temperatures, and tell their answers as rows.

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seeds : sequence of int
    temperatures : sequence of float
        Of the distilled students.
    workers : int
        Processes that share the work, seed by seed; with more than one, each computes with one thread, and a script
        must call this below ``if __name__ == "__main__":``.

    Returns
    -------
    list of dict
        One row per run: ``role``, ``temperature`` (None for the others), ``seed``, a hash of the ``data``, test
        ``accuracy`` in [0, 1], ``loss`` in nats, ``seconds`` of training, and ``predictions``, int64 [n], the classes
        named for the test inputs.

    Raises
    ------
    ValueError
        If anything is unknown or out of range, before any training.
    RuntimeError
        If a worker process died.
    """
    seeds, temperatures = list(seeds), list(temperatures)
    check_work(seeds, workers)
    if len(set(temperatures)) < len(temperatures):  # runs counted twice would narrow intervals
        raise ValueError(f"temperatures is {temperatures}: expected each value once")
    runs = [("teacher", None), ("student", None), *(("distilled", value) for value in temperatures)]
    for one in runs:
        check_role(*one)
    for role in ROLES[:2]:
        network(experiment, role)  # one that does not fit the data is refused here
    jobs = [(experiment, seed, runs) for seed in map(int, seeds)]
    return run_jobs(_rows, jobs, store, workers, len(jobs) * len(runs))


def _rows(store, experiment, seed, runs):
    for role, temperature in runs:
        _, logits, record = train_network(experiment, store, seed, role, temperature)
        yield {"role": role, "temperature": temperature, "seed": seed, "data": content(experiment), **record,
               "predictions": logits.argmax(1)}


def answers(rows, role, temperature=None):
    """The predictions of a role, int64 numpy [seeds, n], in the order of the seeds.

    Raises
    ------
    ValueError
        If there are none.
    """
    found = sorted((row["seed"], i) for i, row in enumerate(rows)
                   if (row["role"], row["temperature"]) == (role, temperature))
    if not found:
        raise ValueError(f"no run of the role {role!r} at temperature {temperature!r}")
    return np.stack([rows[i]["predictions"].numpy() for _, i in found])
