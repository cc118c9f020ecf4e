"""One ticket trained several times: siblings, of which is asked how differently they answer, and what they start from.

A family has one network A and its ticket. Its siblings share the mask and differ in what is left to chance: for
``lth`` the order of the data, for the others also the network B that they start from. Evci, Ioannou, Keskin and
Dauphin, "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", AAAI 2022; Adnan, Jain, Sharma, Krishnan
and Ioannou, ICML 2025. The stages of :mod:`permask_core.experiments.permuted_masks` lie below: its seed of a sibling is
``SPAN * family + number``.
"""

from dataclasses import fields

from permask_core.experiments.permuted_masks import dense, groups, logits, network, sparse_network, ticket
from permask_core.experiments.stages import computed, content, data, trained
from permask_core.masks import layer_sparsity, sparsity
from permask_core.matching import match_weights, permute
from permask_core.pruning import check_sparsity, full_rounds, random_masks
from permask_core.runs.checks import check_integer, check_lists, check_one_of, check_work
from permask_core.sparse.initialisation import sparse_init
from permask_core.training.loop import evaluate, fit

METHODS = ("dense", "pruned", "lth", "permuted", "naive", "random", "scratch", "sparse_init")
SPAN = 100  # siblings of a family at most


def kept_epochs(experiment):
    """The epochs of sparse training after which a sibling's state is kept: 0 (masked, untrained), 1, 2, 4, ..., the
    last."""
    last = experiment.epochs - experiment.rewind
    return [0, *(2**k for k in range(last.bit_length()) if 2**k < last), last]


def seed_of(family, number):
    """The seed that a sibling's dense networks and ticket have in :mod:`permask_core.experiments.permuted_masks`."""
    return SPAN * family + number


def sibling_masks(experiment, store, family, number, target, method):
    """The mask of a sibling: that of the family's A, moved onto its own B for ``permuted`` and shuffled for ``random``;
    of ``pruned`` each has its own."""
    own = seed_of(family, number)
    masks = ticket(experiment, store, own if method == "pruned" else seed_of(family, 0), target).masks
    if method == "permuted":
        a, b = (dense(experiment, store, seed, which)[0][experiment.matched_at]
                for seed, which in ((seed_of(family, 0), "a"), (own, "b")))
        return permute(groups(experiment), match_weights(groups(experiment), a, b, seed=own), masks)
    if method == "random":
        shares = {name: 1 - value for name, value in layer_sparsity(masks).items()}
        return random_masks(masks, shares, seed=own)
    return masks


def sibling(experiment, store, family, number, target, method):
    """Train a sibling.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
        Its ``rewind`` is the epoch from which ``lth``, ``permuted``, ``naive`` and ``random`` start.
    store : permask_core.runs.store.Store
    family, number : int
        Which family, and which of its siblings, 0 to ``SPAN`` - 1.
    target : float
        Sparsity in (0, 1); of no account to ``dense``.
    method : {"dense", "pruned", "lth", "permuted", "naive", "random", "scratch", "sparse_init"}
        What is trained: ``dense`` is the sibling's network B; ``pruned`` goes on from the end of a network A of its own
        under that one's mask; ``lth`` starts from the family's A; ``permuted``, ``naive`` and ``random`` start from the
        sibling's B; ``scratch`` from B before any training, under the family's mask; ``sparse_init`` likewise, with the
        weights drawn for the connections that are left. All under a mask have the same recipe.

    Returns
    -------
    (dict of int to state, dict)
        States by epoch, of :func:`kept_epochs` (``dense``: the experiment's checkpoints), and the record: test
        ``accuracy`` and ``loss``, and ``achieved``, the real sparsity.

    Raises
    ------
    ValueError
        If a value is unknown or out of range.
    """
    check_one_of("method", method, METHODS)
    check_number(family, number)
    own = seed_of(family, number)
    if method == "dense":
        states, record = dense(experiment, store, own, "b")
        return states, {"achieved": 0.0, **record}
    check_sparsity(target)
    kept = kept_epochs(experiment)

    def train(unfinished):
        masks = sibling_masks(experiment, store, family, number, target, method)
        start = _start(experiment, store, family, number, method)
        model = network(experiment, start) if method == "pruned" else sparse_network(experiment, start, masks)
        if method == "sparse_init":
            sparse_init(model, masks, seed=own)
        names = {epoch: f"epoch {epoch}" if epoch else "init" for epoch in kept}
        run = fit(model, data(experiment).train, experiment.recipe(kept[-1], experiment.sparse_lr), seed=10_000 + own,
                  masks=masks, checkpoints=tuple(names.values()), processes=experiment.processes, resume=unfinished,
                  description=f"{method} at {100 * target:g} %, family {family}, sibling {number}")
        states = {f"{epoch}/{key}": tensor for epoch, name in names.items()
                  for key, tensor in run.checkpoints[name].items()}
        return states, {"achieved": sparsity(masks), **evaluate(model, data(experiment).test)._asdict()}

    left_out = ("root", "start") if experiment.start == "dense" else ("root",)  # see permuted_masks.sparse
    settings = experiment.decides(*(one.name for one in fields(experiment) if one.name not in left_out))
    tensors, record = trained(store, "sibling", train, family=family, number=number, target=target, method=method,
                              **settings)
    states = {epoch: {} for epoch in kept}
    for name, tensor in tensors.items():
        epoch, key = name.split("/", 1)
        states[int(epoch)][key] = tensor
    return states, record


def check_number(family, number):
    """Raise ValueError unless both are integers of at least 0, and the number below ``SPAN``."""
    check_integer("family", family, 0)
    check_integer("number", number, 0)
    if number >= SPAN:
        raise ValueError(f"number is {number}: expected at most {SPAN - 1}")


def check_run(families, siblings, target, methods, workers):
    """Raise ValueError for what :func:`run` would not take."""
    check_work(families, workers, "families")
    check_integer("siblings", siblings, 1)
    if siblings > SPAN:
        raise ValueError(f"siblings is {siblings}: expected at most {SPAN}")
    check_sparsity(target)
    check_lists(methods=methods)
    for method in methods:
        check_one_of("method", method, METHODS)


def _start(experiment, store, family, number, method):
    if method == "pruned":
        return dense(experiment, store, seed_of(family, number), "a")[0][experiment.epochs]
    if method == "lth":
        return dense(experiment, store, seed_of(family, 0), "a")[0][experiment.rewind]
    if method in ("scratch", "sparse_init"):
        return network(experiment, seed=2 * seed_of(family, number) + 1).state_dict()  # of B, before any training
    return dense(experiment, store, seed_of(family, number), "b")[0][experiment.rewind]


def run(experiment, store, *, families, siblings, target, methods, workers=1):
    """Train several siblings of several families by several methods, and tell what they answer as rows.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
    store : permask_core.runs.store.Store
    families : sequence of int
        The blocks: nothing random is shared between two of them but the split of the data.
    siblings : int
        In each family and method, at least 1.
    target : float
        Sparsity in (0, 1).
    methods : sequence of str
        As for :func:`sibling`.
    workers : int
        Processes that share the work, family by family; see :func:`permask_core.experiments.permuted_masks.run`.

    Returns
    -------
    list of dict
        One row per run: ``method``, ``seed`` (the family), ``sibling``, ``sparsity`` and ``achieved`` (0 for dense),
        test ``accuracy`` in [0, 1], ``loss`` in nats, ``seconds``, and ``logits`` [n, classes] of the test inputs.

    Raises
    ------
    ValueError
        If anything is unknown or out of range, before any training.
    RuntimeError
        If a worker process died.
    """
    families, methods = list(families), methods if isinstance(methods, str) else list(methods)
    check_run(families, siblings, target, methods, workers)
    groups(experiment)  # a network that cannot be permuted is refused here
    jobs = [(experiment, family, siblings, target, methods) for family in map(int, families)]
    return computed(_rows, jobs, store, workers, len(jobs) * siblings * len(methods))


def training_epochs(experiment, siblings, target, method):
    """How many epochs of training it takes to have some siblings of a family, what they share counted once.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
    siblings : int
        At least 1.
    target : float
        Sparsity in (0, 1).
    method : str
        As for :func:`sibling`.

    Returns
    -------
    int
        No more than what they need: of a network B the epochs to its rewind point, for ``permuted`` those to where it
        is matched if that is later. (:func:`run` trains each B to its end, for the methods that need it.)

    Raises
    ------
    ValueError
        If a value is unknown or out of range.
    """
    check_integer("siblings", siblings, 1)
    check_sparsity(target)
    check_one_of("method", method, METHODS)
    if method == "dense":
        return siblings * experiment.epochs
    ticket_epochs = experiment.epochs + full_rounds(target, experiment.imp_rate) * experiment.imp_epochs
    tickets = siblings if method == "pruned" else 1
    of_b = {"permuted": max(experiment.rewind, experiment.matched_at), "naive": experiment.rewind,
            "random": experiment.rewind}.get(method, 0)
    return tickets * ticket_epochs + siblings * (of_b + experiment.epochs - experiment.rewind)


def _rows(store, experiment, family, siblings, target, methods):
    for method in methods:
        for number in range(siblings):
            states, record = sibling(experiment, store, family, number, target, method)
            yield {"method": method, "seed": family, "sibling": number, "sparsity": target * (method != "dense"),
                   "data": content(experiment), **record, "logits": logits(experiment, states[max(states)])}
