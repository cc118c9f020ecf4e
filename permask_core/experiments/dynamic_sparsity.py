"""Dynamic sparse training as an experiment in stages that are stored, with the published settings.

For each seed: train a dense network; at each sparsity, train under static masks (random, or with constant fan-in) and
with moving connections (SET, RigL, SRigL without and with ablation of neurons). All methods of a seed start from the
same random weights and get the same batches; at each sparsity, all sparse methods start with equally many connections
in each layer.

Source: Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024, arXiv 2305.02299, and their public
code. Deviations from it are noted with the settings in :mod:`permask_core.experiments.presets`.
"""

from dataclasses import dataclass, field

import torch

from permask_core.data import DATASETS, check_options
from permask_core.experiments.presets import DYNAMIC_SPARSITY as PRESETS
from permask_core.experiments.stages import (
    Settings,
    change_preset,
    content,
    data,
    run_jobs,
    same_results,
    train_stage,
)
from permask_core.masks import layer_sparsity, prunable_weights
from permask_core.masks import sparsity as sparsity_of
from permask_core.models import MODELS, build_model
from permask_core.models.scaling import scaled
from permask_core.pruning import check_sparsity, erk_densities, random_masks
from permask_core.runs.checks import check_integer, check_lists, check_one_of, check_work
from permask_core.sparse.dynamic import Rewiring, constant_fan_in_masks
from permask_core.sparse.initialisation import sparse_init
from permask_core.training.loop import evaluate, fit
from permask_core.training.recipe import Recipe

METHODS = ("dense", "random", "fan_in", "set", "rigl", "srigl", "srigl+ablation")
UNEQUAL = ("random", "set", "rigl")  # methods whose neurons may differ in fan-in
STATIC = ("random", "fan_in")
DISTRIBUTIONS = ("erk", "uniform")


@dataclass(frozen=True)
class Experiment(Settings):
    """The settings of one experiment: everything that its results depend on except the seed, the sparsity and the
    method."""

    dataset: str = "digits"
    options: dict = field(default_factory=dict)  # of the data set: see permask_core.data.load_dataset
    root: str | None = None  # folder of the data set's files, if any; does not affect results
    model: str = "mlp"
    width: float = 1.0  # factor on the hidden widths
    recipe: Recipe = Recipe()
    distribution: str = "erk"  # of the connections over the layers, or "uniform"
    unmasked: tuple[str, ...] = ()  # dense weights, such as "conv1.weight"; they do not count in the sparsity
    every: int = 100  # steps from one rewiring to the next (Delta T)
    until: float = 0.75  # fraction of all steps after which connections do not move
    fraction: float = 0.3  # of a layer's connections, dropped at the start (alpha)
    min_salient: float = 0.3  # with ablation: minimal fraction of salient weights of a neuron (gamma_sal)
    shared: int = 1  # fan_in and SRigL: neighbouring neurons with the same connections
    processes: int = 1  # number that share each batch: see permask_core.training.fit

    def __post_init__(self):
        super().__post_init__()
        self.check_names(dataset=DATASETS, model=MODELS, distribution=DISTRIBUTIONS)
        check_options(self.dataset, self.options)
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"recipe is {self.recipe!r}: expected a Recipe")
        check_integer("processes", self.processes, 1)
        scaled(self.width)
        if self.min_salient is None:
            raise ValueError("min_salient is None: expected a number in (0, 1]; the method 'srigl' ablates no neuron")
        rewiring(self, "srigl+ablation")  # checks its settings


# ---- Presets ---------------------------------------------------------------------------------------------------------

def preset(name, **changes):
    """Return the experiment of a preset, with changes.

    Parameters
    ----------
    name : str
        One of ``PRESETS``, each of which has ``seeds`` (a number) and ``sparsities`` as its grid.
    **changes
        Fields of :class:`Experiment`, as in :func:`permask_core.experiments.stages.change`.

    Raises
    ------
    ValueError
        If there is no such preset or field, or a value is out of range.

    Examples
    --------
    >>> preset("digits", recipe={"epochs": 2}).recipe.epochs
    2
    """
    return change_preset(PRESETS, name, Experiment(), changes)


def reproduces(name, experiment):
    """Return the name of the published results that an experiment of a preset reproduces, as in
    :func:`permask_core.data.published.published_dynamic_sparse_training`, or None if a setting that affects accuracies
    differs."""
    return PRESETS[name].reproduces if same_results(experiment, preset(name)) else None


# ---- Networks and masks ----------------------------------------------------------------------------------------------

def rewiring(experiment, method, densities=None):
    """Return how a method moves connections, or None if they are static.

    Parameters
    ----------
    experiment : Experiment
    method : str
        One of ``METHODS``.
    densities : dict of str to float, optional
        Density of each layer before rounding down to constant fan-in: the budget that SRigL distributes over neurons.
    """
    if method in ("dense", *STATIC):
        return None
    kind, _, ablation = method.partition("+")
    return Rewiring(kind, experiment.every, experiment.until, experiment.fraction,
                    experiment.min_salient if ablation else None, densities=densities if kind == "srigl" else None,
                    shared=experiment.shared if kind == "srigl" else 1)


def build_network(experiment, seed=0):
    """Return the network of the experiment, newly initialised."""
    _, _, _, input_shape, classes = data(experiment)
    return build_model(experiment.model, input_shape, classes, width=experiment.width, seed=seed)


def sparse_weights(experiment, model):
    """Return the weights with masks: those of linear layers and convolutions, including shortcuts, except ``unmasked``.

    Raises
    ------
    ValueError
        If ``unmasked`` has an unknown name or all weights.
    """
    weights = prunable_weights(model, shortcuts=True)
    for name in experiment.unmasked:
        if name not in weights:
            raise ValueError(f"unmasked has {name!r}: expected some of {', '.join(weights)}")
    if len(weights) == len(set(experiment.unmasked)):
        raise ValueError("unmasked has all weights: expected at least one weight with a mask")
    return {name: weight for name, weight in weights.items() if name not in experiment.unmasked}


def layer_densities(experiment, weights, sparsity):
    """Return the density of each weight at a sparsity.

    Raises
    ------
    ValueError
        If the sparsity is out of range, or a layer would have no connection.
    """
    check_sparsity(sparsity)
    found = (erk_densities(weights, 1 - sparsity) if experiment.distribution == "erk" else
             dict.fromkeys(weights, 1 - sparsity))
    for name, density in found.items():
        if density * weights[name].numel() < 1:
            raise ValueError(f"sparsity is {sparsity}: it leaves {name!r}, of {weights[name].numel()} weights, no "
                             "connection")
    return found


def starting_masks(weights, densities, *, unequal, seed, shared=1):
    """Draw masks with constant fan-in, or ``unequal`` masks: random, with equally many connections in each layer.

    Parameters
    ----------
    weights : dict of str to torch.Tensor
        Only their shapes are used.
    densities : dict of str to float
        In (0, 1]. The fan-in of each neuron is rounded down, but not to 0.
    unequal : bool
    seed : int
    shared : int
        Number of neighbouring neurons with the same connections, if the masks have constant fan-in.

    Returns
    -------
    Masks
    """
    masks = constant_fan_in_masks(weights, densities, seed=seed, shared=1 if unequal else shared)
    if not unequal:
        return masks
    return random_masks(weights, {name: 1 - value for name, value in layer_sparsity(masks).items()}, seed=seed)


# ---- Trainings -------------------------------------------------------------------------------------------------------

_DENSE = ("dataset", "options", "model", "width", "recipe", "processes")
_STATIC = (*_DENSE, "distribution", "unmasked")
_MOVING = (*_STATIC, "every", "until", "fraction")


def _decides(method):
    """Return the names of the settings that affect the results of a method."""
    if method == "dense":
        return _DENSE
    names = _STATIC if method in STATIC else _MOVING
    names += ("min_salient",) if method == "srigl+ablation" else ()
    return names if method in UNEQUAL else (*names, "shared")


def train_network(experiment, store, seed, sparsity, method):
    """Train by a method, or load the network from the store.

    Random weights and the order of the data depend on the seed. Weights under masks are scaled to the fan-in of their
    neuron (:func:`permask_core.sparse.initialisation.sparse_init`).

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seed : int
    sparsity : float
        In (0, 1), or 0 for ``dense`` only.
    method : str
        One of ``METHODS``.

    Returns
    -------
    (dict of str to torch.Tensor, Masks, dict)
        The state; the final masks, which are full for dense; and the record: test ``accuracy`` and ``loss``, the
        sparsity ``achieved`` at the start, and at the end the number of ``connections`` and of ``active`` neurons, out
        of all ``neurons`` under masks.

    Raises
    ------
    ValueError
        If the method is unknown or the sparsity out of range.
    """
    check_one_of("method", method, METHODS)
    if method != "dense":
        check_sparsity(sparsity)
    elif sparsity:
        raise ValueError(f"sparsity is {sparsity!r} for the method 'dense': expected 0")

    def train(unfinished):
        model, task, masks, how = build_network(experiment, seed), data(experiment), None, None
        weights = sparse_weights(experiment, model)
        if method != "dense":
            densities = layer_densities(experiment, weights, sparsity)
            masks, how = (starting_masks(weights, densities, unequal=method in UNEQUAL, seed=seed,
                                         shared=experiment.shared),
                          rewiring(experiment, method, densities))
            sparse_init(model, masks, seed=seed)
        run = fit(model, task.train, experiment.recipe, seed=seed, masks=masks, rewiring=how,
                  processes=experiment.processes, resume=unfinished,
                  description=f"{method} at {100 * sparsity:g} %, seed {seed}")
        last = run.masks or {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()}
        neurons = torch.cat([mask.flatten(1).any(1) for mask in last.values()])
        record = {"achieved": sparsity_of(masks) if masks else 0.0, "neurons": len(neurons),
                  "active": int(neurons.sum()), "connections": sum(int(mask.sum()) for mask in last.values())}
        tensors = {f"state/{name}": tensor for name, tensor in run.state.items()}
        return tensors | {f"mask/{name}": mask for name, mask in last.items()}, record | evaluate(
            model, task.test)._asdict()

    tensors, record = train_stage(store, "dst", train, seed=seed, sparsity=float(sparsity), method=method,
                                  **experiment.stage_parameters(*_decides(method)))
    state, masks = ({name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
                    for kind in ("state/", "mask/"))
    return state, masks, record


def check_run(seeds, sparsities, methods, workers=1):
    """Raise ValueError unless :func:`run` accepts these arguments; no data set is loaded."""
    check_lists(sparsities=sparsities, methods=methods)
    check_work(seeds, workers)
    for value in sparsities:
        check_sparsity(value)
    for value in methods:
        check_one_of("method", value, METHODS)


def run(experiment, store, *, seeds, sparsities, methods=METHODS, workers=1):
    """Train over seeds, sparsities and methods.

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seeds : sequence of int
    sparsities : list of float
        Each in (0, 1).
    methods : list of {"dense", "random", "fan_in", "set", "rigl", "srigl", "srigl+ablation"}
        ``dense`` is trained once for all sparsities.
    workers : int
        Number of processes, which share the seeds; with more than one, each uses one thread, and a script must call
        this below ``if __name__ == "__main__":``.

    Returns
    -------
    list of dict
        One row for each run: ``method``, ``sparsity`` and ``achieved`` at the start (both 0 for dense), ``seed``,
        ``width``, a hash of the ``data``, test ``accuracy`` in [0, 1] and ``loss`` in nats, ``connections`` and
        ``active`` neurons at the end, of ``neurons``, and ``seconds``.

    Raises
    ------
    ValueError
        Before any training, if an argument is unknown or out of range.
    RuntimeError
        If a worker process died.
    """
    check_run(seeds, sparsities, methods, workers)
    weights = sparse_weights(experiment, build_network(experiment))  # raises an error if the network does not fit
    for value in sparsities:
        layer_densities(experiment, weights, value)
    runs = [(method, sparsity) for method in methods for sparsity in (sparsities if method != "dense" else [0.0])]
    jobs = [(experiment, seed, runs) for seed in map(int, seeds)]
    return run_jobs(_run_seed, jobs, store, workers, len(jobs) * len(runs))


def _run_seed(store, experiment, seed, runs):
    for method, sparsity in runs:
        record = train_network(experiment, store, seed, sparsity, method)[2]
        yield {"method": method, "sparsity": sparsity, "seed": seed, "width": experiment.width,
               "data": content(experiment), **record}
