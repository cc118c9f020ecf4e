"""The permuted-mask experiment, in stages that are stored and found again.

Adnan, Jain, Sharma, Krishnan and Ioannou, "Sparse Training from Random Initialization: Aligning Lottery Ticket Masks
using Weight Symmetry", ICML 2025. Per seed: train two dense networks A and B; prune A iteratively; match A to B; train
from a checkpoint of B under A's mask, permuted or not. Each function is one stage and asks the store for those before
it, so that any order of calls, a kill, or another worker leads to the same files.
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
from permask_core.masks import layer_sparsity, prunable_weights
from permask_core.masks import sparsity as sparsity_of
from permask_core.matching import Groups, match_activations, match_weights, permutation_groups, permute
from permask_core.models import MODELS, build_model
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

METHODS = ("dense", "lth", "permuted", "naive", "random")  # what is compared unless more is asked for
KNOWN_METHODS = (*METHODS, "pruned")
MATCHINGS = ("weights", "activations")
STARTS = ("dense", "sparse")


@dataclass(frozen=True)
class Experiment(Settings):
    """The settings of one experiment; everything that its results depend on but the seed, the sparsity and the
    method."""

    dataset: str = "digits"
    options: dict = field(default_factory=dict)  # of the data set: see permask_core.data.load_dataset
    root: str | None = None  # where the files of the data set lie, if it has any; decides about nothing else
    model: str = "mlp"
    width: float = 1.0  # factor on the hidden widths
    epochs: int = 20  # of the dense runs
    lr: float = 0.1  # peak learning rate of the dense runs
    sparse_lr: float = 0.1  # of the sparse runs, which have a schedule of their own over epochs - rewind
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    schedule: str = "cosine"  # of all runs, and what follows as well: see permask_core.training.Recipe
    step_epochs: int = 30
    warmup: float = 0.0
    label_smoothing: float = 0.0
    optimizer: str = "sgd"
    accumulate: int = 1
    precision: str = "float32"
    processes: int = 1  # that share each batch: see permask_core.training.fit
    checkpoints: tuple[int, ...] = (0, 1, 2, 5, 10, 20)  # epochs whose dense states are kept; 0: untrained
    rewind: int = 2  # epoch of the dense run from which the sparse runs start
    start: str = "dense"  # of the sparse runs: the weights as they are, or "sparse": scaled to the connections left
    matched_at: int = 2  # epoch of the dense runs at which A is matched to B; notebooks/price_of_alignment says why
    matched_images: int = 50_000  # training images at most for matching by activations
    matched_layers: tuple[str, ...] | None = None  # names of the permutation groups that may move; None: all
    imp: str = "rewind"  # iterative magnitude pruning: "rewind", or "finetune" as in the paper's code
    imp_rewind: int = 2  # epoch to which a round returns, for "rewind"
    imp_epochs: int = 18  # of training in each round
    imp_lr: float = 0.1
    imp_rate: float = 0.2  # fraction of the remaining weights that a round removes
    imp_scope: str = "global"  # among which weights the largest are kept: see permask_core.pruning.magnitude_masks

    def __post_init__(self):
        super().__post_init__()
        self.check_names(dataset=DATASETS, model=MODELS, imp=FLAVOURS, imp_scope=SCOPES, start=STARTS)
        check_options(self.dataset, self.options)
        check_integer("epochs", self.epochs, 1)
        for epoch in self.checkpoints:
            if not isinstance(epoch, Integral) or not 0 <= epoch <= self.epochs:
                raise ValueError(f"checkpoints holds {epoch!r}: expected epochs from 0 to {self.epochs}")
        object.__setattr__(self, "checkpoints", tuple(sorted({*map(int, self.checkpoints), self.epochs})))
        for name in ("rewind", "matched_at", "imp_rewind"):
            if getattr(self, name) not in self.checkpoints:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of the checkpoints "
                                 f"{', '.join(map(str, self.checkpoints))}")
        if self.rewind == self.epochs:
            raise ValueError(f"rewind is {self.rewind}: nothing is left to train of {self.epochs} epochs")
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
            except ValueError as error:  # which has a recipe's names
                wrong, _, rest = str(error).replace("below epochs", f"below {name}").partition(" is ")
                raise ValueError(f"{dict(epochs=name, lr=lr).get(wrong, wrong)} is {rest}") from None

    def recipe(self, epochs, lr):
        """A recipe with this experiment's settings of training."""
        return Recipe(epochs, lr, **self.select(*_TRAINING))


_TRAINING = ("momentum", "weight_decay", "batch_size", "schedule", "step_epochs", "warmup", "label_smoothing",
             "optimizer", "accumulate", "precision")
_DENSE = ("dataset", "options", "model", "width", "epochs", "lr", "processes", "checkpoints", *_TRAINING)
_MATCHING = ("matched_at", "matched_layers")
_IMP = (*_DENSE, "imp", "imp_rewind", "imp_epochs", "imp_lr", "imp_rate", "imp_scope")


# ---- Presets ---------------------------------------------------------------------------------------------------------

# What may differ from the published settings, beside stages.FREE, without making a run another experiment.
_FREE = ("width", "rewind", "checkpoints", "imp_rewind", "matched_images")


def preset(name, *, rewinds=None, **changes):
    """The experiment of a name, with changes.

    Parameters
    ----------
    name : str
        One of ``PRESETS``.
    rewinds : sequence of int, optional
        Epochs of the dense run at which sparse runs are to start: their states are kept, and ``rewind`` is the first
        unless it is given. By default those of the preset's grid, or ``rewind`` alone where that is given.
    **changes
        Fields of :class:`Experiment`, as :func:`permask_core.experiments.stages.change` takes them. With other
        ``epochs``, A and B are matched at their end if the preset does so, and of the preset's checkpoints those are
        kept that lie before the end.

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
            raise ValueError(f"rewind is {k!r}: expected an epoch from 0 to {epochs - 1}, before the last of {epochs}")
    imp_rewind = min(changes.get("imp_rewind", base.imp_rewind), epochs - 1)
    matched_at = changes.get("matched_at", epochs if base.matched_at == base.epochs else base.matched_at)
    kept = changes.get("checkpoints", [k for k in base.checkpoints if k <= epochs and k != base.epochs])
    needed = {"rewind": changes.get("rewind", rewinds[0]), "imp_rewind": imp_rewind, "matched_at": matched_at,
              "checkpoints": (*kept, *rewinds, imp_rewind, matched_at)}
    return change(base, changes | needed)


def reproduces(name, experiment):
    """The published results that an experiment of a preset repeats, as
    :func:`permask_core.data.published.published_permuted_masks` names them; None if something differs that decides
    about accuracies."""
    return PRESETS[name].reproduces if same_results(experiment, preset(name), _FREE) else None


def vary(experiment, widths, rewinds):
    """One experiment for each width and rewind epoch."""
    return [replace(experiment, width=width, rewind=rewind) for width in widths for rewind in rewinds]


# ---- Networks --------------------------------------------------------------------------------------------------------

def build_network(experiment, state=None, *, seed=0):
    """The experiment's network, freshly initialised from ``seed`` or with the weights of ``state``."""
    _, _, _, input_shape, classes = data(experiment)
    model = build_model(experiment.model, input_shape, classes, width=experiment.width, seed=seed)
    if state is not None:
        model.load_state_dict(state)
    return model


def build_sparse_network(experiment, state, masks):
    """The network with which sparse training from ``state`` starts: its weights are scaled to the connections that the
    masks leave each neuron if ``start`` says so."""
    model = build_network(experiment, state)
    return scale_to_fan_in(model, masks) if experiment.start == "sparse" else model


def logits(experiment, state):
    """What the experiment's network says of the test inputs with the weights of ``state``: [n, classes]."""
    return predict(build_network(experiment, state), data(experiment).test)


def parent(method):
    """The dense network that a method's runs start from and are compared with: ``"a"`` or ``"b"``."""
    check_one_of("method", method, KNOWN_METHODS)
    return "a" if method in ("lth", "pruned") else "b"


def groups(experiment):
    """The permutation groups of the experiment's network that may move: ``matched_layers``, or all."""
    _, _, _, input_shape, classes = data(experiment)
    found = _all_groups(experiment.model, input_shape, classes, experiment.width)
    if experiment.matched_layers is None:
        return found
    for name in experiment.matched_layers:
        check_one_of("group in matched_layers", name, found)
    return Groups({name: found[name] for name in experiment.matched_layers}, found.fixed)


@lru_cache(maxsize=64)
def _all_groups(model, input_shape, classes, width):
    return permutation_groups(build_model(model, input_shape, classes, width=width), torch.zeros(2, *input_shape))


# ---- Stages ----------------------------------------------------------------------------------------------------------

def train_dense(experiment, store, seed, which):
    """Train dense network ``"a"`` or ``"b"`` of a seed.

    Returns
    -------
    (dict of int to state, dict)
        States by epoch, the true initialisation (0) among them, and the record with the test ``accuracy`` and ``loss``.
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
    """The checkpoints of a run as one dict of tensors, from the ``names`` that they have by epoch."""
    return {f"{epoch}/{key}": tensor for epoch, name in names.items() for key, tensor in checkpoints[name].items()}


def by_epoch(tensors):
    """States by epoch, from what :func:`flatten_epochs` gave."""
    states = {}
    for name, tensor in tensors.items():
        epoch, key = name.split("/", 1)
        states.setdefault(int(epoch), {})[key] = tensor
    return dict(sorted(states.items()))


def find_ticket(experiment, store, seed, sparsity):
    """The mask of network A at a sparsity, by iterative magnitude pruning; each round's training is a stage of its own.

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
    """The training of a round of pruning; ``start()`` gives the state and the masks with which it starts."""
    def build():
        state, masks = start()
        return build_network(experiment, state), masks

    return Training(
        experiment, "imp_round", {"seed": seed, "round": number, **experiment.stage_parameters(*_IMP)}, build,
        experiment.recipe(experiment.imp_epochs, experiment.imp_lr), 2 * seed,
        lambda model, run, record: (run.state, {"sparsity": sparsity_of(run.masks), **record}),
        description=f"pruning round {number}, seed {seed}")


def _next_round(experiment, store, seed, number):
    """The training of a round of pruning, from the rounds before it, which are finished."""
    def start():
        masks = _prune(experiment, store, seed, 1 - (1 - experiment.imp_rate) ** number).masks
        dense = train_dense(experiment, store, seed, "a")[0]
        if experiment.imp == "rewind":
            return dense[experiment.imp_rewind], masks
        if number == 1:
            return dense[experiment.epochs], masks
        return train(store, _next_round(experiment, store, seed, number - 1))[0], masks

    return _round_training(experiment, seed, number, start)


def match_dense(experiment, store, seed, by):
    """Permutations that move A onto B, matched by ``"weights"`` or ``"activations"`` at the epoch ``matched_at``.

    Returns
    -------
    (dict of str to torch.Tensor, dict)
        As :func:`permask_core.matching.permute` takes them, and the record.
    """
    check_one_of("matching", by, MATCHINGS)
    a, b = (train_dense(experiment, store, seed, which)[0][experiment.matched_at] for which in "ab")

    device, also = default_device(), ["matched_images"] if by == "activations" else []
    found = groups(experiment)  # here, so that the stage's seconds are those of the matching alone

    def compute():
        if by == "weights":
            return match_weights(found, a, b, seed=seed, device=device), {}
        train, images = data(experiment).train, experiment.matched_images
        chosen = torch.arange(len(train))
        if images < len(train):
            chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(int(seed)))[:images]
        models = [build_network(experiment, state).to(device) for state in (a, b)]
        # Whatever the model sees in one step of training, it can see here.
        batches = progress(train.batches(chosen.split(experiment.batch_size), device),
                           f"matching by activations, seed {seed}")
        return match_activations(found, *models, batches), {}

    return store.stage("matching", compute, seed=seed, by=by, **experiment.stage_parameters(*_DENSE, *_MATCHING, *also))


def method_masks(experiment, store, seed, sparsity, method, by=None):
    """The masks of a method: A's own (``lth``, ``pruned``, ``naive``), moved (``permuted``), or shuffled
    (``random``)."""
    check_one_of("method", method, KNOWN_METHODS[1:])
    masks = find_ticket(experiment, store, seed, sparsity).masks
    if method == "permuted":
        return permute(groups(experiment), match_dense(experiment, store, seed, by)[0], masks)
    if method == "random":
        return random_masks(masks, {name: 1 - value for name, value in layer_sparsity(masks).items()}, seed=seed)
    return masks


def train_sparse(experiment, store, seed, sparsity, method, by=None, *, condensed=False):
    """Train under a method's masks, from the rewind point of A (``lth``), the end of A (``pruned``, which is then
    fine-tuned), or the rewind point of B (the others).

    Methods of one seed share data order, recipe and number of epochs. ``lth`` and ``pruned`` differ in nothing but the
    checkpoint; ``naive``, ``permuted`` and ``random`` in nothing but the mask. With ``condensed`` layers of constant
    fan-in are trained as :func:`permask_core.sparse.condense` makes them, without a mask.

    Returns
    -------
    (dict of str to torch.Tensor, dict)
        The trained state, of the condensed network if it is one, and the record: ``accuracy``, ``loss`` (test) and
        ``achieved``, the real sparsity.
    """
    check_sparsity(sparsity)
    check_one_of("method", method, KNOWN_METHODS[1:])
    if method == "permuted":
        check_one_of("matching", by, MATCHINGS)
    if condensed and (experiment.imp_scope != "fan_in" or method == "random"):
        raise ValueError(f"imp_scope is {experiment.imp_scope!r} and the method {method!r}: expected 'fan_in' and not "
                         "'random', since only masks of constant fan-in can be condensed")
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
    """Run an experiment, or several, over seeds, sparsities and methods.

    Parameters
    ----------
    experiment : Experiment or list of Experiment
        Those of a list share what they have in common: the dense networks of several rewind epochs are trained once.
    store : Store
    seeds : sequence of int
    sparsities : sequence of float
        In (0, 1); hit exactly, or with ``imp_scope="fan_in"`` as :func:`permask_core.pruning.magnitude_masks` says.
    methods : sequence of {"dense", "lth", "permuted", "naive", "random", "pruned"}
        All but the last if not given. ``permuted`` is run once per matching.
    matchings : sequence of {"weights", "activations"}
    workers : int
        Processes that share the work, seed by seed; with more than one, each computes with one thread, and a script
        must call this below ``if __name__ == "__main__":``.
    batched : int
        Networks that are trained at once, whatever their seeds, methods and sparsities, where that is faster: see
        :func:`permask_core.training.batched.fit_batched`. What is stored and found is the same, up to rounding.

    Returns
    -------
    list of dict
        One row per run: ``method``, ``matching`` ("" where there is none), ``sparsity`` asked for and ``achieved``
        (both 0 for dense, which is network B without a mask), ``seed``, test ``accuracy`` in [0, 1], ``loss`` in
        nats, ``seconds``, the experiment's ``width``, ``sparse_lr``, ``rewind`` and ``matched_at``, and a hash of its
        ``data``.

    Raises
    ------
    ValueError
        If anything is unknown or out of range, before any training.
    RuntimeError
        If a worker process died.
    """
    check_lists(methods=methods if isinstance(methods, str) else list(methods))
    if isinstance(matchings, str):
        check_lists(matchings=matchings)
    if isinstance(sparsities, str):
        raise ValueError(f"sparsities is {sparsities!r}: expected a list of numbers (papermill takes lists with -y, as "
                         "in -y '{sparsities: [0.9, 0.97]}')")
    experiments = [experiment] if isinstance(experiment, Experiment) else list(experiment)
    seeds, sparsities = list(seeds), list(sparsities)
    for value in methods:
        check_one_of("method", value, KNOWN_METHODS)
    for value in matchings:
        check_one_of("matching", value, MATCHINGS)
    for value in sparsities:
        check_sparsity(value)
    check_work(seeds, workers)
    check_integer("batched", batched, 1)
    if batched > 1 and (workers > 1 or any(one.processes > 1 for one in experiments)):
        raise ValueError(f"batched is {batched}, beside several processes: expected one process")
    for one in experiments:
        groups(one)  # a network that cannot be permuted is refused here, not after hours
    runs = [(method, by) for method in methods for by in (matchings if method == "permuted" else ("",))]
    runs = [(method, by, sparsity) for method, by in runs for sparsity in (sparsities if method != "dense" else [0.0])]
    seeds = [int(seed) for seed in seeds]
    if batched > 1:
        for one in experiments:
            _train_at_once(one, store, seeds, runs, batched)
    jobs = [(one, seed, runs) for one in experiments for seed in seeds]
    return run_jobs(_run_seed, jobs, store, workers, len(jobs) * len(runs))


def _train_at_once(experiment, store, seeds, runs, networks):
    """Train all that some runs need, up to so many networks at once: dense, then round by round of pruning, then
    sparse."""
    sparse = [run for run in runs if run[0] != "dense"]
    dense = sorted({"a" for _ in sparse} | {parent(method) for method, _, _ in runs})
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
    """How many epochs of training :func:`run` needs from an empty store.

    Parameters
    ----------
    experiment, seeds, sparsities, methods, matchings
        As for :func:`run`.

    Returns
    -------
    dict of str to int
        ``dense`` (A and B), ``pruning`` (the rounds on the way to the largest sparsity) and ``sparse``.
    """
    sparse_runs = sum(len(list(matchings)) if method == "permuted" else method != "dense" for method in methods)
    pruned = any(method != "dense" for method in methods)
    rounds = full_rounds(max(sparsities), experiment.imp_rate) if pruned and sparsities else 0
    return {"dense": len(seeds) * (1 + pruned) * experiment.epochs,
            "pruning": len(seeds) * rounds * experiment.imp_epochs,
            "sparse": len(seeds) * len(sparsities) * sparse_runs * (experiment.epochs - experiment.rewind)}


def training_cost(experiment, grid, images, speeds):
    """What it costs to run an experiment over the grid of a preset, from how fast its network trains.

    Parameters
    ----------
    experiment : Experiment
    grid : dict
        ``rewinds``, ``seeds`` (how many), ``sparsities`` and ``matchings``.
    images : int
        In the training set.
    speeds : dict of float to float
        Images per second of training, by width.

    Returns
    -------
    list of dict
        For each width in ``speeds``: ``width``, ``dense``, ``pruning`` and ``sparse`` (epochs of training over all
        seeds, sparsities, methods and rewind points), ``speed`` and ``hours``. Matching and evaluation are not in it.
    """
    epochs = {}
    for one in vary(experiment, [experiment.width], grid["rewinds"]):  # which share the dense networks and the tickets
        own = training_epochs(one, seeds=range(grid["seeds"]), sparsities=grid["sparsities"],
                              matchings=grid["matchings"])
        epochs = own | {"sparse": own["sparse"] + epochs.get("sparse", 0)}
    return [{"width": width, **epochs, "speed": speed, "hours": sum(epochs.values()) * images / speed / 3600}
            for width, speed in speeds.items()]
