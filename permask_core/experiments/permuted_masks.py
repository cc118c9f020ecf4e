"""The permuted-mask experiment, in stages that are stored and found again.

Adnan, Jain, Sharma, Krishnan and Ioannou, "Sparse Training from Random Initialization: Aligning Lottery Ticket Masks
using Weight Symmetry", ICML 2025. Per seed: train two dense networks A and B; prune A iteratively; match A to B; train
from a checkpoint of B under A's mask, permuted or not. Each function is one stage and asks the store for those before
it, so that any order of calls, a kill, or another worker leads to the same files.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from permask_core.data import DATASETS, check_options
from permask_core.experiments.queue import fitted, run_batched
from permask_core.experiments.stages import Settings, content, data, run_jobs, train_stage
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
        self.check_names(dataset=DATASETS, model=MODELS, imp=FLAVOURS, imp_scope=SCOPES, start=STARTS)
        check_options(self.dataset, self.options)
        check_integer("epochs", self.epochs, 1)
        for epoch in self.checkpoints:
            if not isinstance(epoch, int) or not 0 <= epoch <= self.epochs:
                raise ValueError(f"checkpoints holds {epoch!r}: expected epochs from 0 to {self.epochs}")
        object.__setattr__(self, "checkpoints", tuple(sorted({*self.checkpoints, self.epochs})))
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
        if not isinstance(self.imp_rate, (int, float)) or not 0 < self.imp_rate < 1:
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


def train_dense(experiment, store, seed, which):
    """Train dense network ``"a"`` or ``"b"`` of a seed.

    Returns
    -------
    (dict of int to state, dict)
        States by epoch, the true initialisation (0) among them, and the record with the test ``accuracy`` and ``loss``.
    """
    if which not in ("a", "b"):
        raise ValueError(f"which is {which!r}: expected 'a' or 'b'")
    own = 2 * seed + (which == "b")

    def train(unfinished):
        model = build_network(experiment, seed=own)
        names = {epoch: f"epoch {epoch}" for epoch in experiment.checkpoints}
        run, evaluation = fitted(
            store, model, data(experiment).train, experiment.recipe(experiment.epochs, experiment.lr), seed=own,
            test=data(experiment).test, checkpoints=tuple(names.values()), processes=experiment.processes,
            resume=unfinished, description=f"dense {which}, seed {seed}")
        states = {f"{epoch}/{key}": tensor for epoch, name in names.items()
                  for key, tensor in run.checkpoints[name].items()}
        return states, evaluation._asdict()

    tensors, record = train_stage(store, "dense", train, seed=own, **experiment.stage_parameters(*_DENSE))
    states = {epoch: {} for epoch in experiment.checkpoints}
    for name, tensor in tensors.items():
        epoch, key = name.split("/", 1)
        states[int(epoch)][key] = tensor
    return states, record


def find_ticket(experiment, store, seed, sparsity):
    """The mask of network A at a sparsity, by iterative magnitude pruning; each round's training is a stage of its own.

    Returns
    -------
    Ticket
    """
    check_sparsity(sparsity)

    def compute():
        states, _ = train_dense(experiment, store, seed, "a")
        recipe, rounds = experiment.recipe(experiment.imp_epochs, experiment.imp_lr), 0

        def train(state, masks):
            nonlocal rounds
            rounds += 1

            def train_round(unfinished):
                run, _ = fitted(store, build_network(experiment, state), data(experiment).train, recipe, seed=2 * seed,
                                masks=masks or None, processes=experiment.processes, resume=unfinished,
                                description=f"pruning round {rounds}, seed {seed}")
                return run.state, {"sparsity": sparsity_of(masks)}

            return train_stage(store, "imp_round", train_round, seed=seed, round=rounds,
                               **experiment.stage_parameters(*_IMP))[0]

        (_, found), = iterative_magnitude_pruning(
            train, states[experiment.epochs], [sparsity], flavour=experiment.imp, rate=experiment.imp_rate,
            scope=experiment.imp_scope, rewind=states[experiment.imp_rewind] if experiment.imp == "rewind" else None,
            prunable=prunable_weights(build_network(experiment)))
        return found.masks, {"achieved": found.sparsity, "rounds": found.rounds}

    masks, record = store.stage("ticket", compute, seed=seed, sparsity=sparsity, **experiment.stage_parameters(*_IMP))
    return Ticket(masks, record["achieved"], record["rounds"])


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
            chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:images]
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

    def train(unfinished):
        masks = method_masks(experiment, store, seed, sparsity, method, by)
        states, _ = train_dense(experiment, store, seed, parent(method))
        if method == "pruned":  # its weights are adapted
            model = build_network(experiment, states[experiment.epochs])
        else:
            model = build_sparse_network(experiment, states[experiment.rewind], masks)
        achieved = sparsity_of(masks)
        if condensed:
            model, masks, _ = condense(model, masks)
        _, evaluation = fitted(
            store, model, data(experiment).train,
            experiment.recipe(experiment.epochs - experiment.rewind, experiment.sparse_lr), seed=10_000 + seed,
            test=data(experiment).test, masks=masks or None, processes=experiment.processes, resume=unfinished,
            description=f"{method} {by or ''} at {100 * sparsity:g} %, seed {seed}")
        return model.state_dict(), {**evaluation._asdict(), "achieved": achieved}

    settings = experiment.stage_parameters(*_IMP, "sparse_lr", "rewind", "start",
                                           *(_MATCHING if method == "permuted" else []),
                                           *(["matched_images"] if by == "activations" else []))
    return train_stage(store, "sparse", train, seed=seed, sparsity=sparsity, method=method, by=by, condensed=condensed,
                       **settings)


def run(experiments, store, *, seeds, sparsities, methods=METHODS, matchings=MATCHINGS, workers=1, batched=1):
    """Run experiments over seeds, sparsities and methods, and tell their results as rows.

    Parameters
    ----------
    experiments : Experiment or list of Experiment
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
    experiments = [experiments] if isinstance(experiments, Experiment) else list(experiments)
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
    for experiment in experiments:
        groups(experiment)  # a network that cannot be permuted is refused here, not after hours
    runs = [(method, by) for method in methods for by in (matchings if method == "permuted" else ("",))]
    runs = [(method, by, sparsity) for method, by in runs for sparsity in (sparsities if method != "dense" else [0.0])]
    jobs = [(experiment, seed, runs) for experiment in experiments for seed in map(int, seeds)]
    if batched > 1:
        return run_batched(_rows, [(one, seed, [run]) for one, seed, runs in jobs for run in runs], store, batched)
    return run_jobs(_rows, jobs, store, workers, len(jobs) * len(runs))


def _rows(store, experiment, seed, runs):
    shared = {"seed": seed, **experiment.select("width", "sparse_lr", "rewind", "matched_at"),
              "data": content(experiment)}
    for method, by, sparsity in runs:
        if method == "dense":
            record = {"achieved": 0.0, **train_dense(experiment, store, seed, "b")[1]}
        else:
            record = train_sparse(experiment, store, seed, sparsity, method, by or None)[1]
        yield {"method": method, "matching": by, **shared, "sparsity": sparsity, "achieved": record["achieved"],
               **record}


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


def settings_text(experiment):
    """The settings as one line of ``name value`` pairs, for captions and records."""
    return str(experiment)
