"""Dynamic sparse training as an experiment, in stages that are stored and found again, with the published settings.

Per seed: train a dense network; at each sparsity, train under masks that stay (random, or with constant fan-in), and
with connections that move (SET, RigL, SRigL without and with ablation of neurons). All methods of a seed start from the
same draw of the weights and see the same batches; the sparse ones of a sparsity start with as many connections in each
layer.

Source: Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024, arXiv 2305.02299, and their public
code. What they do otherwise is said beside ``PRESETS``.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from permask_core.data import DATASETS, check_options
from permask_core.experiments.stages import Settings, content, data, replace_settings, run_jobs, train_stage
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
    """The settings of one experiment; everything that its results depend on but the seed, the sparsity and the
    method."""

    dataset: str = "digits"
    options: dict = field(default_factory=dict)  # of the data set: see permask_core.data.load_dataset
    root: str | None = None  # where the files of the data set lie, if it has any; decides about nothing else
    model: str = "mlp"
    width: float = 1.0  # factor on the hidden widths
    recipe: Recipe = Recipe()
    distribution: str = "erk"  # of the connections over the layers, or "uniform"
    unmasked: tuple[str, ...] = ()  # weights that stay dense, as "conv1.weight"; they count in no sparsity
    every: int = 100  # steps from one rewiring to the next (Delta T)
    until: float = 0.75  # fraction of all steps from which on the connections stay
    fraction: float = 0.3  # of a layer's connections, dropped at first (alpha)
    min_salient: float = 0.3  # with ablation: salient weights that a neuron needs, of its fan-in (gamma_sal)
    processes: int = 1  # that share each batch: see permask_core.training.fit

    def __post_init__(self):
        self.check_names(dataset=DATASETS, model=MODELS, distribution=DISTRIBUTIONS)
        check_options(self.dataset, self.options)
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"recipe is {self.recipe!r}: expected a Recipe")
        check_integer("processes", self.processes, 1)
        scaled(self.width)
        if self.min_salient is None:
            raise ValueError("min_salient is None: expected a number in (0, 1]; the method 'srigl' ablates no neuron")
        rewiring(self, "srigl+ablation")


def rewiring(experiment, method, densities=None):
    """How a method moves connections; None where they stay.

    Parameters
    ----------
    experiment : Experiment
    method : str
        One of ``METHODS``.
    densities : dict of str to float, optional
        Of each layer, before its masks are rounded down to equal fan-in: what SRigL may share among its neurons.
    """
    if method in ("dense", *STATIC):
        return None
    kind, _, ablation = method.partition("+")
    return Rewiring(kind, experiment.every, experiment.until, experiment.fraction,
                    experiment.min_salient if ablation else None, densities=densities if kind == "srigl" else None)


def network(experiment, seed=0):
    """The experiment's network, freshly initialised."""
    _, _, _, input_shape, classes = data(experiment)
    return build_model(experiment.model, input_shape, classes, width=experiment.width, seed=seed)


def sparse_weights(experiment, model):
    """The weights that get masks: linear and convolution, those of shortcuts too, but not what is to stay dense.

    Raises
    ------
    ValueError
        If one that is to stay dense is not there, or none is left.
    """
    weights = prunable_weights(model, shortcuts=True)
    for name in experiment.unmasked:
        if name not in weights:
            raise ValueError(f"unmasked has {name!r}: expected some of {', '.join(weights)}")
    if len(weights) == len(set(experiment.unmasked)):
        raise ValueError("unmasked has all weights: expected at least one to be left")
    return {name: weight for name, weight in weights.items() if name not in experiment.unmasked}


def layer_densities(experiment, weights, sparsity):
    """The fraction of each weight that a sparsity leaves.

    Raises
    ------
    ValueError
        If the sparsity is out of range, or leaves a layer without a connection.
    """
    check_sparsity(sparsity)
    found = (erk_densities(weights, 1 - sparsity) if experiment.distribution == "erk" else
             dict.fromkeys(weights, 1 - sparsity))
    for name, density in found.items():
        if density * weights[name].numel() < 1:
            raise ValueError(f"sparsity is {sparsity}: it leaves {name!r}, of {weights[name].numel()} weights, no "
                             "connection")
    return found


def starting_masks(weights, densities, *, unequal, seed):
    """Masks with constant fan-in, or ``unequal`` ones: random, with as many connections in each layer.

    Parameters
    ----------
    weights : dict of str to torch.Tensor
        Only their shapes are used.
    densities : dict of str to float
        In (0, 1]. Each neuron's share is rounded down, but not to 0.
    unequal : bool
    seed : int

    Returns
    -------
    Masks
    """
    masks = constant_fan_in_masks(weights, densities, seed=seed)
    if not unequal:
        return masks
    return random_masks(weights, {name: 1 - value for name, value in layer_sparsity(masks).items()}, seed=seed)


_DENSE = ("dataset", "options", "model", "width", "recipe", "processes")
_STATIC = (*_DENSE, "distribution", "unmasked")
_MOVING = (*_STATIC, "every", "until", "fraction")


def _decides(method):
    """The names of the settings that a method's results depend on."""
    if method == "dense":
        return _DENSE
    if method in STATIC:
        return _STATIC
    return (*_MOVING, "min_salient") if method == "srigl+ablation" else _MOVING


def train_network(experiment, store, seed, sparsity, method):
    """Train by a method, or find it trained.

    The draw of the weights and the order of the data are those of the seed. Weights under masks are scaled to their
    neuron's fan-in (:func:`permask_core.sparse.initialisation.sparse_init`).

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seed : int
    sparsity : float
        In (0, 1); 0 for dense, and only there.
    method : str
        One of ``METHODS``.

    Returns
    -------
    (dict of str to torch.Tensor, Masks, dict)
        The state; the last masks, full ones for dense; the record: test ``accuracy`` and ``loss``, the sparsity
        ``achieved`` at the start, and at the end the number of ``connections`` and of ``active`` neurons, of all
        ``neurons`` under masks.

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
        model, task, masks, how = network(experiment, seed), data(experiment), None, None
        weights = sparse_weights(experiment, model)
        if method != "dense":
            densities = layer_densities(experiment, weights, sparsity)
            masks, how = (starting_masks(weights, densities, unequal=method in UNEQUAL, seed=seed),
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
    """Raise ValueError unless :func:`run` takes these; no data set is loaded."""
    check_lists(sparsities=sparsities, methods=methods)
    check_work(seeds, workers)
    for value in sparsities:
        check_sparsity(value)
    for value in methods:
        check_one_of("method", value, METHODS)


def run(experiment, store, *, seeds, sparsities, methods=METHODS, workers=1):
    """Train over seeds, sparsities and methods, and tell the results as rows.

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
        Processes that share the work, seed by seed; with more than one, each computes with one thread, and a script
        must call this below ``if __name__ == "__main__":``.

    Returns
    -------
    list of dict
        One row per run: ``method``, ``sparsity`` asked for and ``achieved`` at the start (both 0 for dense), ``seed``,
        ``width``, a hash of the ``data``, test ``accuracy`` in [0, 1] and ``loss`` in nats, ``connections`` and
        ``active`` neurons at the end, of ``neurons``, and ``seconds``.

    Raises
    ------
    ValueError
        If anything is unknown or out of range, before any training.
    RuntimeError
        If a worker process died.
    """
    check_run(seeds, sparsities, methods, workers)
    weights = sparse_weights(experiment, network(experiment))  # a network that does not fit is refused here
    for value in sparsities:
        layer_densities(experiment, weights, value)
    runs = [(method, sparsity) for method in methods for sparsity in (sparsities if method != "dense" else [0.0])]
    jobs = [(experiment, seed, runs) for seed in map(int, seeds)]
    return run_jobs(_rows, jobs, store, workers, len(jobs) * len(runs))


def _rows(store, experiment, seed, runs):
    for method, sparsity in runs:
        record = train_network(experiment, store, seed, sparsity, method)[2]
        yield {"method": method, "sparsity": sparsity, "seed": seed, "width": experiment.width,
               "data": content(experiment), **record}


class Preset(NamedTuple):
    """An ``experiment``, the ``seeds`` and ``sparsities`` it is run over, and what it ``reproduces``, if that was
    published."""

    experiment: Experiment
    seeds: int
    sparsities: tuple[float, ...]
    reproduces: str | None = None


# Their code divides the learning rate by five every 77 epochs, for which the cosine stands here.
_CIFAR = Experiment("cifar10", model="resnet18_cifar", recipe=Recipe(epochs=250, lr=0.1))

PRESETS = {
    # A stand-in that runs in seconds. Noise, since clean digits forgive any mask.
    "digits": Preset(Experiment("digits", {"noise": 1.0, "copies": 5}, recipe=Recipe(epochs=14, batch_size=64),
                                every=20), 3, (0.95, 0.98)),
    "cifar10-resnet18": Preset(_CIFAR, 5, (0.8, 0.9, 0.95, 0.99), "ResNet18/CIFAR-10"),
    # Nothing is published for CIFAR-100, neither settings nor results: these are the settings of CIFAR-10.
    "cifar100-resnet18": Preset(replace(_CIFAR, dataset="cifar100"), 5, (0.8, 0.9, 0.95, 0.99)),
    # Four parts of a batch, since theirs lie on four GPUs with BatchNorms of their own. Their rate falls to a tenth at
    # epochs 30, 70 and 90; their growth looks at the gradients of eight batches, and here at those of one.
    "imagenet-resnet50": Preset(Experiment(
        "imagenet", model="resnet50", every=800, unmasked=("conv1.weight",), recipe=Recipe(
            epochs=103, lr=0.2, weight_decay=1e-4, batch_size=512, accumulate=4, schedule="step", step_epochs=30,
            warmup=5, label_smoothing=0.1, precision="bf16")), 1, (0.8, 0.9, 0.95, 0.99), "ResNet50/ImageNet"),
    # Epochs, decay, warm-up and smoothing as in their code, but neither its clipping of gradients nor torchvision's
    # augmentations. What projects the inputs of attention stays dense: see permask_core.models.transformer.vit_b_16.
    "imagenet-vit_b_16": Preset(Experiment(
        "imagenet", model="vit_b_16", distribution="uniform", min_salient=0.95, recipe=Recipe(
            epochs=150, lr=0.003, weight_decay=0.3, batch_size=4096, accumulate=16, warmup=16, label_smoothing=0.11,
            optimizer="adamw", precision="bf16")), 1, (0.8, 0.9), "ViT-B/16/ImageNet"),
}


def preset(name, *, options=None, recipe=None, **changes):
    """The preset of a name, with changes.

    Parameters
    ----------
    name : str
        One of ``PRESETS``.
    options : dict, optional
        Of the data set, beside or instead of the preset's own.
    recipe : dict, optional
        Changes of the recipe, such as ``{"epochs": 2}``; what is None stays.
    **changes
        Fields of :class:`Experiment`; what is None stays. Where anything differs that decides about accuracies, the
        preset reproduces nothing that was published.

    Raises
    ------
    ValueError
        If there is no such preset or field, or a value is out of range.
    """
    check_one_of("preset", name, PRESETS)
    chosen = PRESETS[name]
    recipe = {key: value for key, value in (recipe or {}).items() if value is not None}
    try:
        trained_by = replace_settings(chosen.experiment.recipe, recipe)
    except ValueError as error:
        raise ValueError(f"recipe is {recipe!r}: {error}") from None
    options = {**chosen.experiment.options, **(options or {})}
    experiment = replace_settings(chosen.experiment, {**changes, "options": options, "recipe": trained_by})
    same = _published(experiment) == _published(chosen.experiment)
    return chosen._replace(experiment=experiment, reproduces=chosen.reproduces if same else None)


def _published(experiment):
    """The experiment without what may differ from the published settings."""
    options = {name: value for name, value in experiment.options.items() if name != "workers"}
    recipe = replace(experiment.recipe, precision="float32", accumulate=1)
    return replace(experiment, options=options, recipe=recipe, root=None, processes=1)
