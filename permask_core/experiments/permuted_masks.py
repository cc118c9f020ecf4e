"""The permuted-mask experiment, in stages that are stored.

Adnan, Jain, Sharma, Krishnan and Ioannou, "Sparse Training from Random Initialization: Aligning Lottery Ticket Masks
using Weight Symmetry", ICML 2025. For each seed: train two dense networks A and B; prune A iteratively; match A to
B; train from a checkpoint of B under A's mask, permuted or not. Each function is one stage and gets the stages before
it from the store, so any order of calls, an interruption or another worker lead to the same files.
"""

from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import count
from numbers import Integral, Real

import torch

from permask_core.data import DATASETS, check_options
from permask_core.experiments.presets import PERMUTED_MASKS as PRESETS
from permask_core.experiments.stages import (
    Settings,
    change,
    change_preset,
    content,
    data,
    drop_none,
    run_jobs,
    same_results,
)
from permask_core.experiments.trainings import Training, train, train_batched
from permask_core.masks import apply_masks, layer_sparsity, prunable_weights
from permask_core.masks import sparsity as sparsity_of
from permask_core.matching import Groups, match_activations, match_weights, permutation_groups, permute
from permask_core.models import MODELS, OF_TEXTS, build_model
from permask_core.models.scaling import scaled
from permask_core.pruning import (
    FLAVOURS,
    SCOPES,
    Ticket,
    check_sparsity,
    full_rounds,
    iterative_magnitude_pruning,
    random_masks,
)
from permask_core.runs.checks import check_integer, check_lists, check_one_of, check_work
from permask_core.runs.processes import default_device
from permask_core.runs.progress import progress
from permask_core.sparse import condense
from permask_core.sparse.initialisation import scale_to_fan_in
from permask_core.training.loop import predict
from permask_core.training.recipe import Recipe

METHODS = ("dense", "lth", "permuted", "naive", "random")  # the default methods of run
KNOWN_METHODS = (*METHODS, "pruned")
MATCHINGS = ("weights", "activations")  # the default matchings of run
KNOWN_MATCHINGS = (*MATCHINGS, "ticket")
STARTS = ("dense", "sparse")


@dataclass(frozen=True)
class Experiment(Settings):
    """The settings of one experiment: everything that its results depend on except the seed, the sparsity and the
    method."""

    dataset: str = "digits"
    options: dict = field(default_factory=dict)  # of the data set: see permask_core.data.load_dataset
    root: str | None = None  # folder of the data set's files, if any; does not affect results
    model: str = "mlp"
    width: float = 1.0  # factor on the hidden widths
    epochs: int = 20  # of the dense runs
    lr: float = 0.1  # peak learning rate of the dense runs
    sparse_lr: float = 0.1  # of the sparse runs, which have their own schedule over epochs - rewind
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    schedule: str = "cosine"  # of all runs, as are the next settings: see permask_core.training.Recipe
    step_epochs: int = 30
    warmup: float = 0.0
    label_smoothing: float = 0.0
    optimizer: str = "sgd"
    accumulate: int = 1
    precision: str = "float32"
    processes: int = 1  # number that share each batch: see permask_core.training.fit
    checkpoints: tuple[int, ...] = (0, 1, 2, 5, 10, 20)  # epochs whose dense states are stored; 0: untrained
    rewind: int = 2  # epoch of the dense run from which the sparse runs start
    start: str = "dense"  # of the sparse runs: unchanged weights, or "sparse": scaled to the remaining connections
    matched_at: int = 2  # epoch of the dense runs at which A is matched to B; see notebooks/price_of_alignment
    matched_images: int = 50_000  # maximum number of training images for matching by activations
    matched_layers: tuple[str, ...] | None = None  # names of the permutation groups to permute; None: all
    imp: str = "rewind"  # iterative magnitude pruning: "rewind", or "finetune" as in the paper's code
    imp_rewind: int = 2  # epoch to which a round returns, for "rewind"
    imp_epochs: int = 18  # of training in each round
    imp_lr: float = 0.1
    imp_rate: float = 0.2  # fraction of the remaining weights that a round removes
    imp_scope: str = "global"  # weights among which the largest are kept: see permask_core.pruning.magnitude_masks

    def __post_init__(self):
        super().__post_init__()
        self.check_names(dataset=DATASETS, model=MODELS, imp=FLAVOURS, imp_scope=SCOPES, start=STARTS)
        check_options(self.dataset, self.options)
        check_integer("epochs", self.epochs, 1)
        for epoch in self.checkpoints:
            if not isinstance(epoch, Integral) or not 0 <= epoch <= self.epochs:
                raise ValueError(f"checkpoints has {epoch!r}: expected epochs from 0 to {self.epochs}")
        object.__setattr__(self, "checkpoints", tuple(sorted({*map(int, self.checkpoints), self.epochs})))
        for name in ("rewind", "matched_at", "imp_rewind"):
            if getattr(self, name) not in self.checkpoints:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of the checkpoints "
                                 f"{', '.join(map(str, self.checkpoints))}")
        if self.rewind == self.epochs:
            raise ValueError(f"rewind is {self.rewind}: expected less than {self.epochs}, the number of epochs")
        for name in ("matched_images", "processes"):
            check_integer(name, getattr(self, name), 1)
        if self.matched_layers is not None:
            check_lists(matched_layers=self.matched_layers)
            object.__setattr__(self, "matched_layers", tuple(self.matched_layers))
        if not isinstance(self.imp_rate, Real) or not 0 < self.imp_rate < 1:
            raise ValueError(f"imp_rate is {self.imp_rate!r}: expected a number in (0, 1)")
        scaled(self.width)
        for name, epochs, lr in (("epochs", self.epochs, "lr"), ("imp_epochs", self.imp_epochs, "imp_lr"),
                                 ("epochs - rewind", self.epochs - self.rewind, "sparse_lr")):
            try:
                self.recipe(epochs, getattr(self, lr))
            except ValueError as error:  # the error has the names of Recipe
                wrong, _, rest = str(error).replace("below epochs", f"below {name}").partition(" is ")
                raise ValueError(f"{dict(epochs=name, lr=lr).get(wrong, wrong)} is {rest}") from None

    def recipe(self, epochs, lr):
        """Return a recipe with the training settings of this experiment."""
        return Recipe(epochs, lr, **self.select(*_TRAINING))


_TRAINING = ("momentum", "weight_decay", "batch_size", "schedule", "step_epochs", "warmup", "label_smoothing",
             "optimizer", "accumulate", "precision")
_DENSE = ("dataset", "options", "model", "width", "epochs", "lr", "processes", "checkpoints", *_TRAINING)
_MATCHING = ("matched_at", "matched_layers")
_IMP = (*_DENSE, "imp", "imp_rewind", "imp_epochs", "imp_lr", "imp_rate", "imp_scope")


# ---- Presets ---------------------------------------------------------------------------------------------------------

# Settings that, in addition to stages.FREE, may differ from the published ones in a reproduction.
_FREE = ("width", "rewind", "checkpoints", "imp_rewind", "matched_images")


def preset(name, *, rewinds=None, **changes):
    """Return the experiment of a preset, with changes.

    Parameters
    ----------
    name : str
        One of ``PRESETS``.
    rewinds : sequence of int, optional
        Epochs of the dense run at which sparse runs start: their states are stored, and ``rewind`` is the first of them
        unless it is given. The default is the grid of the preset, or only ``rewind`` if that is given.
    **changes
        Fields of :class:`Experiment`, as in :func:`permask_core.experiments.stages.change`. With other ``epochs``, A
        and B are matched at their end if they are in the preset, and checkpoints of the preset after the end are
        removed.

    Returns
    -------
    Experiment

    Raises
    ------
    ValueError
        If there is no such preset or field, or a value is out of range.

    Examples
    --------
    >>> preset("digits-mlp", epochs=4, rewind=1).checkpoints
    (0, 1, 2, 4)
    """
    base, changes = change_preset(PRESETS, name, Experiment(), {}), drop_none(changes)
    epochs = changes.get("epochs", base.epochs)
    check_integer("epochs", epochs, 1)
    if rewinds is None:
        rewinds = [changes["rewind"]] if "rewind" in changes else PRESETS[name].grid["rewinds"]
    check_lists(rewinds=list(rewinds))
    for k in rewinds:
        if not isinstance(k, Integral) or not 0 <= k < epochs:
            raise ValueError(f"rewind is {k!r}: expected an epoch from 0 to {epochs - 1}, before the end of {epochs}")
    imp_rewind = min(changes.get("imp_rewind", base.imp_rewind), epochs - 1)
    matched_at = changes.get("matched_at", epochs if base.matched_at == base.epochs else base.matched_at)
    kept = changes.get("checkpoints", [k for k in base.checkpoints if k <= epochs and k != base.epochs])
    needed = {"rewind": changes.get("rewind", rewinds[0]), "imp_rewind": imp_rewind, "matched_at": matched_at,
              "checkpoints": (*kept, *rewinds, imp_rewind, matched_at)}
    return change(base, changes | needed)


def reproduces(name, experiment):
    """Return the name of the published results that an experiment of a preset reproduces, as in
    :func:`permask_core.data.published.published_permuted_masks`, or None if a setting that affects accuracies
    differs."""
    return PRESETS[name].reproduces if same_results(experiment, preset(name), _FREE) else None


def vary(experiment, widths, rewinds):
    """Return one experiment for each width and rewind epoch."""
    return [replace(experiment, width=width, rewind=rewind) for width in widths for rewind in rewinds]


# ---- Networks --------------------------------------------------------------------------------------------------------

def build_network(experiment, state=None, *, seed=0):
    """Return the network of the experiment, newly initialised from ``seed`` or with the weights of ``state``."""
    _, _, _, input_shape, classes = data(experiment)
    model = build_model(experiment.model, input_shape, classes, width=experiment.width, seed=seed)
    if state is not None:
        model.load_state_dict(state)
    return model


def build_sparse_network(experiment, state, masks):
    """Return the network at the start of sparse training from ``state``. If ``start`` is "sparse", its weights are
    scaled to the remaining connections of each neuron."""
    model = build_network(experiment, state)
    return scale_to_fan_in(model, masks) if experiment.start == "sparse" else model


def logits(experiment, state):
    """Return the logits of the network with the weights of ``state`` for the test inputs, [n, classes]."""
    return predict(build_network(experiment, state), data(experiment).test)


def parent(method):
    """Return the dense network from which the runs of a method start and with which they are compared: "a" or "b"."""
    check_one_of("method", method, KNOWN_METHODS)
    return "a" if method in ("lth", "pruned") else "b"


def _dense_networks(methods):
    """Return the dense networks that runs of these methods need: A, whose tickets they use, and their parents."""
    methods = list(methods)
    return sorted({"a" for method in methods if method != "dense"} | {parent(method) for method in methods})


def groups(experiment):
    """Return the permutation groups of the network that are permuted: ``matched_layers``, or all."""
    _, _, _, input_shape, classes = data(experiment)
    found = _all_groups(experiment.model, input_shape, classes, experiment.width)
    if experiment.matched_layers is None:
        return found
    for name in experiment.matched_layers:
        check_one_of("group in matched_layers", name, found)
    return Groups({name: found[name] for name in experiment.matched_layers}, found.fixed)


@lru_cache(maxsize=64)
def _all_groups(model, input_shape, classes, width):
    example = torch.zeros(2, *input_shape, dtype=torch.int64 if model in OF_TEXTS else torch.float32)
    return permutation_groups(build_model(model, input_shape, classes, width=width), example)


# ---- Stages ----------------------------------------------------------------------------------------------------------

def train_dense(experiment, store, seed, which):
    """Train dense network ``"a"`` or ``"b"`` of a seed.

    Returns
    -------
    (dict of int to state, dict)
        States by epoch, including the initialisation (0), and the record with the test ``accuracy`` and ``loss``.
    """
    if which not in ("a", "b"):
        raise ValueError(f"which is {which!r}: expected 'a' or 'b'")
    tensors, record = train(store, _dense_training(experiment, seed, which))
    return by_epoch(tensors), record


def _dense_training(experiment, seed, which):
    own = 2 * seed + (which == "b")
    names = {epoch: f"epoch {epoch}" for epoch in experiment.checkpoints}

    def build():
        return build_network(experiment, seed=own), None

    return Training(
        experiment, "dense", {"seed": own, **experiment.stage_parameters(*_DENSE)}, build,
        experiment.recipe(experiment.epochs, experiment.lr), own,
        lambda model, run, record: (flatten_epochs(run.checkpoints, names), record), tuple(names.values()),
        f"dense {which}, seed {seed}")


def flatten_epochs(checkpoints, names):
    """Return the checkpoints of a run as one dict of tensors; ``names`` are their names by epoch."""
    return {f"{epoch}/{key}": tensor for epoch, name in names.items() for key, tensor in checkpoints[name].items()}


def by_epoch(tensors):
    """Return the states by epoch from a result of :func:`flatten_epochs`."""
    states = {}
    for name, tensor in tensors.items():
        epoch, key = name.split("/", 1)
        states.setdefault(int(epoch), {})[key] = tensor
    return dict(sorted(states.items()))


def find_ticket(experiment, store, seed, sparsity):
    """Return the mask of network A at a sparsity, by iterative magnitude pruning; each round of training is a stage.

    Returns
    -------
    Ticket
    """
    check_sparsity(sparsity)

    def compute():
        found = _prune(experiment, store, seed, sparsity)
        return found.masks, {"achieved": found.sparsity, "rounds": found.rounds}

    masks, record = store.stage("ticket", compute, seed=seed, sparsity=sparsity, **experiment.stage_parameters(*_IMP))
    return Ticket(masks, record["achieved"], record["rounds"])


def _prune(experiment, store, seed, sparsity):
    dense, numbers = train_dense(experiment, store, seed, "a")[0], count(1)

    def train_round(state, masks):
        return train(store, _round_training(experiment, seed, next(numbers), lambda: (state, masks)))[0]

    (_, ticket), = iterative_magnitude_pruning(
        train_round, dense[experiment.epochs], [sparsity], flavour=experiment.imp, rate=experiment.imp_rate,
        scope=experiment.imp_scope, rewind=dense[experiment.imp_rewind] if experiment.imp == "rewind" else None,
        prunable=prunable_weights(build_network(experiment)))
    return ticket


def _round_training(experiment, seed, number, start):
    """Return the training of a pruning round; ``start()`` returns its initial state and its masks."""
    def build():
        state, masks = start()
        return build_network(experiment, state), masks

    return Training(
        experiment, "imp_round", {"seed": seed, "round": number, **experiment.stage_parameters(*_IMP)}, build,
        experiment.recipe(experiment.imp_epochs, experiment.imp_lr), 2 * seed,
        lambda model, run, record: (run.state, {"sparsity": sparsity_of(run.masks), **record}),
        description=f"pruning round {number}, seed {seed}")


def _next_round(experiment, store, seed, number):
    """Return the training of a pruning round, given that the previous rounds are finished."""
    def start():
        masks = _prune(experiment, store, seed, 1 - (1 - experiment.imp_rate) ** number).masks
        dense = train_dense(experiment, store, seed, "a")[0]
        if experiment.imp == "rewind":
            return dense[experiment.imp_rewind], masks
        if number == 1:
            return dense[experiment.epochs], masks
        return train(store, _next_round(experiment, store, seed, number - 1))[0], masks

    return _round_training(experiment, seed, number, start)


def match_dense(experiment, store, seed, by, sparsity=None):
    """Return permutations that move A onto B, matched at the epoch ``matched_at``: by "weights", by "activations", or
    by "ticket", the weights that A's mask at a ``sparsity`` keeps.

    Returns
    -------
    (dict of str to torch.Tensor, dict)
        Permutations for :func:`permask_core.matching.permute`, and the record.
    """
    check_one_of("matching", by, KNOWN_MATCHINGS)
    if by == "ticket":
        check_sparsity(sparsity)
    a, b = (train_dense(experiment, store, seed, which)[0][experiment.matched_at] for which in "ab")
    if by == "ticket":
        a = apply_masks(a, find_ticket(experiment, store, seed, sparsity).masks)

    device, own = default_device(), {"sparsity": sparsity} if by == "ticket" else {}
    also = {"activations": ["matched_images"], "ticket": _IMP}.get(by, [])
    found = groups(experiment)  # here, so that the stage's seconds are those of the matching only

    def compute():
        if by != "activations":
            return match_weights(found, a, b, seed=seed, device=device), {}
        train, images = data(experiment).train, experiment.matched_images
        chosen = torch.arange(len(train))
        if images < len(train):
            chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(int(seed)))[:images]
        models = [build_network(experiment, state).to(device) for state in (a, b)]
        # A batch as large as in one step of training fits into memory here too.
        batches = progress(train.batches(chosen.split(experiment.batch_size), device),
                           f"matching by activations, seed {seed}")
        return match_activations(found, *models, batches), {}

    settings = experiment.stage_parameters(*_DENSE, *_MATCHING, *also)
    return store.stage("matching", compute, seed=seed, by=by, **own, **settings)


def method_masks(experiment, store, seed, sparsity, method, by=None):
    """Return the masks of a method: those of A, unchanged (``lth``, ``pruned``, ``naive``), moved (``permuted``) or
    shuffled (``random``)."""
    check_one_of("method", method, KNOWN_METHODS[1:])
    masks = find_ticket(experiment, store, seed, sparsity).masks
    if method == "permuted":
        return permute(groups(experiment), match_dense(experiment, store, seed, by, sparsity)[0], masks)
    if method == "random":
        return random_masks(masks, {name: 1 - value for name, value in layer_sparsity(masks).items()}, seed=seed)
    return masks


def train_sparse(experiment, store, seed, sparsity, method, by=None, *, condensed=False):
    """Train under the masks of a method.

    Training starts from the rewind point of A (``lth``), the end of A (``pruned``, which is fine-tuned), or the rewind
    point of B (all other methods). Methods of one seed have the same data order, recipe and number of epochs. ``lth``
    and ``pruned`` differ only in the checkpoint; ``naive``, ``permuted`` and ``random`` only in the mask. With
    ``condensed``, layers of constant fan-in are trained in the form of :func:`permask_core.sparse.condense`, without
    masks.

    Returns
    -------
    (dict of str to torch.Tensor, dict)
        The trained state, which is that of the condensed network with ``condensed``, and the record: test ``accuracy``
        and ``loss``, and ``achieved``, the actual sparsity.
    """
    check_sparsity(sparsity)
    check_one_of("method", method, KNOWN_METHODS[1:])
    if method == "permuted":
        check_one_of("matching", by, KNOWN_MATCHINGS)
    if condensed and (experiment.imp_scope != "fan_in" or method == "random"):
        raise ValueError(f"imp_scope is {experiment.imp_scope!r} and the method {method!r}: expected 'fan_in' and not "
                         "'random', because only masks of constant fan-in can be condensed")
    return train(store, _sparse_training(experiment, store, seed, sparsity, method, by, condensed))


def _sparse_training(experiment, store, seed, sparsity, method, by, condensed=False):
    @cache
    def masks():
        return method_masks(experiment, store, seed, sparsity, method, by)

    def build():
        states, _ = train_dense(experiment, store, seed, parent(method))
        if method == "pruned":  # its weights are adapted
            model = build_network(experiment, states[experiment.epochs])
        else:
            model = build_sparse_network(experiment, states[experiment.rewind], masks())
        if not condensed:
            return model, masks()
        model, remaining, _ = condense(model, masks())
        return model, remaining or None

    settings = experiment.stage_parameters(*_IMP, "sparse_lr", "rewind", "start",
                                           *(_MATCHING if method == "permuted" else []),
                                           *(["matched_images"] if by == "activations" else []))
    own = {"seed": seed, "sparsity": sparsity, "method": method, "by": by, "condensed": condensed}
    return Training(
        experiment, "sparse", own | settings, build,
        experiment.recipe(experiment.epochs - experiment.rewind, experiment.sparse_lr), 10_000 + seed,
        lambda model, run, record: (model.state_dict(), {**record, "achieved": sparsity_of(masks())}),
        description=f"{method} {by or ''} at {100 * sparsity:g} %, seed {seed}")


# ---- Runs ------------------------------------------------------------------------------------------------------------

def run(experiment, store, *, seeds, sparsities, methods=METHODS, matchings=MATCHINGS, workers=1, batched=1):
    """Run one or several experiments over seeds, sparsities and methods.

    Parameters
    ----------
    experiment : Experiment or list of Experiment
        Experiments in a list share common stages: the dense networks of several rewind epochs are trained once.
    store : Store
    seeds : sequence of int
    sparsities : sequence of float
        In (0, 1). They are reached exactly, or with ``imp_scope="fan_in"`` as in
        :func:`permask_core.pruning.magnitude_masks`.
    methods : sequence of {"dense", "lth", "permuted", "naive", "random", "pruned"}
        The default is all except ``pruned``. ``permuted`` is run once for each matching.
    matchings : sequence of {"weights", "activations", "ticket"}
        The default is all except ``ticket``, which compares only the weights that A's mask keeps.
    workers : int
        Number of processes, which share the seeds; with more than one, each uses one thread, and a script must call
        this below ``if __name__ == "__main__":``.
    batched : int
        Maximum number of networks, of any seed, method and sparsity, in batched training, where this is faster: see
        :func:`permask_core.training.batched.fit_batched`. The results are the same up to rounding.

    Returns
    -------
    list of dict
        One row for each run: ``method``, ``matching`` ("" if none), requested ``sparsity`` and ``achieved``
        (both 0 for dense, which is network B without a mask), ``seed``, test ``accuracy`` in [0, 1], ``loss`` in
        nats, ``seconds``, the experiment's ``width``, ``sparse_lr``, ``rewind`` and ``matched_at``, and a hash of its
        ``data``.

    Raises
    ------
    ValueError
        Before any training, if an argument is unknown or out of range.
    RuntimeError
        If a worker process died.
    """
    check_lists(methods=methods if isinstance(methods, str) else list(methods))
    for name, values in {"matchings": matchings, "sparsities": sparsities}.items():
        if isinstance(values, str):
            check_lists(**{name: values})
    experiments = [experiment] if isinstance(experiment, Experiment) else list(experiment)
    seeds, sparsities = list(seeds), list(sparsities)
    for value in methods:
        check_one_of("method", value, KNOWN_METHODS)
    for value in matchings:
        check_one_of("matching", value, KNOWN_MATCHINGS)
    for value in sparsities:
        check_sparsity(value)
    check_work(seeds, workers)
    check_integer("batched", batched, 1)
    if batched > 1 and (workers > 1 or any(one.processes > 1 for one in experiments)):
        raise ValueError(f"batched is {batched} with several processes: expected workers=1 and processes=1")
    for one in experiments:
        groups(one)  # raises an error now, not after hours, if the network cannot be permuted
    runs = [(method, by) for method in methods for by in (matchings if method == "permuted" else ("",))]
    runs = [(method, by, sparsity) for method, by in runs for sparsity in (sparsities if method != "dense" else [0.0])]
    seeds = [int(seed) for seed in seeds]
    if batched > 1:
        for one in experiments:
            _train_at_once(one, store, seeds, runs, batched)
    jobs = [(one, seed, runs) for one in experiments for seed in seeds]
    return run_jobs(_run_seed, jobs, store, workers, len(jobs) * len(runs))


def _train_at_once(experiment, store, seeds, runs, networks):
    """Train all networks that the runs need, up to ``networks`` at once: dense, then each pruning round, then
    sparse."""
    sparse = [run for run in runs if run[0] != "dense"]
    dense = _dense_networks(method for method, _, _ in runs)
    train_batched(store, [_dense_training(experiment, seed, which) for seed in seeds for which in dense], networks)
    rounds = full_rounds(max(sparsity for _, _, sparsity in sparse), experiment.imp_rate) if sparse else 0
    for number in range(1, rounds + 1):
        train_batched(store, [_next_round(experiment, store, seed, number) for seed in seeds], networks)
    train_batched(store, [_sparse_training(experiment, store, seed, sparsity, method, by or None)
                          for seed in seeds for method, by, sparsity in sparse], networks)


def _run_seed(store, experiment, seed, runs):
    shared = {"seed": seed, **experiment.select("width", "sparse_lr", "rewind", "matched_at"),
              "data": content(experiment)}
    for method, by, sparsity in runs:
        if method == "dense":
            record = {"achieved": 0.0, **train_dense(experiment, store, seed, "b")[1]}
        else:
            record = train_sparse(experiment, store, seed, sparsity, method, by or None)[1]
        yield {"method": method, "matching": by, **shared, "sparsity": sparsity, "achieved": record["achieved"],
               **record}


# ---- Costs -----------------------------------------------------------------------------------------------------------

def training_epochs(experiment, *, seeds, sparsities, methods=METHODS, matchings=MATCHINGS):
    """Return the number of training epochs that :func:`run` needs with an empty store.

    Parameters
    ----------
    experiment, seeds, sparsities, methods, matchings
        As in :func:`run`.

    Returns
    -------
    dict of str to int
        ``dense`` (A, B or both), ``pruning`` (the rounds until the largest sparsity) and ``sparse``.
    """
    sparse_runs = sum(len(list(matchings)) if method == "permuted" else method != "dense" for method in methods)
    pruned = any(method != "dense" for method in methods)
    rounds = full_rounds(max(sparsities), experiment.imp_rate) if pruned and sparsities else 0
    return {"dense": len(seeds) * len(_dense_networks(methods)) * experiment.epochs,
            "pruning": len(seeds) * rounds * experiment.imp_epochs,
            "sparse": len(seeds) * len(sparsities) * sparse_runs * (experiment.epochs - experiment.rewind)}


def training_cost(experiment, grid, images, speeds):
    """Return the cost of running an experiment over the grid of a preset, given the speed of training.

    Parameters
    ----------
    experiment : Experiment
    grid : dict
        ``rewinds``, ``seeds`` (a number), ``sparsities`` and ``matchings``.
    images : int
        Number of images in the training set.
    speeds : dict of float to float
        Images per second of training, by width.

    Returns
    -------
    list of dict
        For each width in ``speeds``: ``width``, ``dense``, ``pruning`` and ``sparse`` (epochs of training over all
        seeds, sparsities, methods and rewind points), ``speed`` and ``hours``. Matching and evaluation are not
        included.
    """
    epochs = {}
    for one in vary(experiment, [experiment.width], grid["rewinds"]):  # they share the dense networks and the tickets
        own = training_epochs(one, seeds=range(grid["seeds"]), sparsities=grid["sparsities"],
                              matchings=grid["matchings"])
        epochs = own | {"sparse": own["sparse"] + epochs.get("sparse", 0)}
    return [{"width": width, **epochs, "speed": speed, "hours": sum(epochs.values()) * images / speed / 3600}
            for width, speed in speeds.items()]
