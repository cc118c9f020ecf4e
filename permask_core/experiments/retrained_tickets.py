"""One ticket trained several times: how differently its members predict, by the weights from which they start.

A seed has one network A and its ticket. Its members share the mask and differ in their random choices: for ``lth``
in the order of the data, for most other methods also in the network B from which they start. Evci, Ioannou, Keskin and
Dauphin, "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", AAAI 2022; Adnan, Jain, Sharma, Krishnan
and Ioannou, ICML 2025. Experiments and stages are those of :mod:`permask_core.experiments.permuted_masks`, with
``SPAN * seed + member`` as the seed of a member.
"""

from functools import cache

import torch

from permask_core.experiments.permuted_masks import (
    build_network,
    build_sparse_network,
    by_epoch,
    find_ticket,
    flatten_epochs,
    groups,
    logits,
    train_dense,
)
from permask_core.experiments.stages import content, run_jobs
from permask_core.experiments.trainings import Training, train
from permask_core.masks import layer_sparsity
from permask_core.masks import sparsity as sparsity_of
from permask_core.matching import match_weights, permute
from permask_core.pruning import check_sparsity, full_rounds, random_masks
from permask_core.runs.checks import check_integer, check_lists, check_one_of, check_work
from permask_core.sparse.initialisation import scale_to_fan_in, sparse_init

METHODS = ("dense", "pruned", "lth", "permuted", "naive", "random", "scratch", "rescaled", "he", "sparse_init")
FROM_SCRATCH = ("scratch", "rescaled", "he", "sparse_init")  # these start from B before any training
SPAN = 100  # maximal number of members of a seed


def member_epochs(experiment):
    """The epochs of sparse training after which a member's state is kept: 0 (masked, untrained), 1, 2, 4, ..., the
    last."""
    last = experiment.epochs - experiment.rewind
    return [0, *(2**k for k in range(last.bit_length()) if 2**k < last), last]


def member_seed(seed, member):
    """The seed that a member's dense networks and ticket have in :mod:`permask_core.experiments.permuted_masks`."""
    return SPAN * seed + member


def member_masks(experiment, store, seed, member, sparsity, method):
    """Return the mask of a member: that of the seed's A, moved onto its own B for ``permuted`` and shuffled for
    ``random``. Each member of ``pruned`` has its own mask."""
    own = member_seed(seed, member)
    masks = find_ticket(experiment, store, own if method == "pruned" else member_seed(seed, 0), sparsity).masks
    if method == "permuted":
        a, b = (train_dense(experiment, store, one, which)[0][experiment.matched_at]
                for one, which in ((member_seed(seed, 0), "a"), (own, "b")))
        return permute(groups(experiment), match_weights(groups(experiment), a, b, seed=own), masks)
    if method == "random":
        shares = {name: 1 - value for name, value in layer_sparsity(masks).items()}
        return random_masks(masks, shares, seed=own)
    return masks


def train_member(experiment, store, seed, member, sparsity, method):
    """Train a member.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
        Its ``rewind`` is the epoch from which ``lth``, ``permuted``, ``naive`` and ``random`` start.
    store : permask_core.runs.store.Store
    seed, member : int
        Which seed, and which of its members, 0 to ``SPAN`` - 1.
    sparsity : float
        In (0, 1); irrelevant to ``dense``.
    method : str
        The network to train, with the same recipe for all masked networks. ``dense`` is the member's network B.
        ``pruned`` continues from the end of the member's own network A, under the mask of that network. ``lth`` starts
        from the seed's A; ``permuted``, ``naive`` and ``random`` start from the member's B. Four methods start before
        any training, under the seed's mask, and differ in the variance of the weights of a neuron with n_in inputs, of
        which the mask keeps k: ``scratch`` 1 / (3 n_in), which is PyTorch's default; ``rescaled`` 1 / (3k); ``he``
        2 / n_in, which is He's; and ``sparse_init`` 2 / k. The first two use the same random numbers, and so do the
        last two.

    Returns
    -------
    (dict of int to state, dict)
        States by epoch, of :func:`member_epochs` (``dense``: the experiment's checkpoints), and the record: test
        ``accuracy`` and ``loss``, and ``achieved``, the sparsity that was reached.

    Raises
    ------
    ValueError
        If a value is unknown or out of range.
    """
    check_one_of("method", method, METHODS)
    check_member(seed, member)
    own = member_seed(seed, member)
    if method == "dense":
        states, record = train_dense(experiment, store, own, "b")
        return states, {"achieved": 0.0, **record}
    check_sparsity(sparsity)
    names = {epoch: f"epoch {epoch}" if epoch else "init" for epoch in member_epochs(experiment)}

    @cache
    def masks():
        return member_masks(experiment, store, seed, member, sparsity, method)

    def build():
        start = _start(experiment, store, seed, member, method)
        if method == "pruned":
            return build_network(experiment, start), masks()
        model = build_sparse_network(experiment, start, masks())
        if method == "rescaled":
            scale_to_fan_in(model, masks())
        elif method == "he":
            sparse_init(model, {name: torch.ones_like(mask) for name, mask in masks().items()}, seed=own)
        elif method == "sparse_init":
            sparse_init(model, masks(), seed=own)
        return model, masks()

    tensors, record = train(store, Training(
        experiment, "member", {"seed": seed, "member": member, "sparsity": sparsity, "method": method,
                               **experiment.stage_parameters(*experiment.as_dict())}, build,
        experiment.recipe(experiment.epochs - experiment.rewind, experiment.sparse_lr), 10_000 + own,
        lambda model, run, record: (flatten_epochs(run.checkpoints, names), {
            "achieved": sparsity_of(masks()), **record}), tuple(names.values()),
        f"{method} at {100 * sparsity:g} %, seed {seed}, member {member}"))
    return by_epoch(tensors), record


def check_member(seed, member):
    """Raise ValueError unless both are integers of at least 0, and the member below ``SPAN``."""
    check_integer("seed", seed, 0)
    check_integer("member", member, 0)
    if member >= SPAN:
        raise ValueError(f"member is {member}: expected at most {SPAN - 1}")


def check_run(seeds, members, sparsity, methods, workers):
    """Raise ValueError for arguments that :func:`run` does not accept."""
    check_work(seeds, workers, "seeds")
    check_integer("members", members, 1)
    if members > SPAN:
        raise ValueError(f"members is {members}: expected at most {SPAN}")
    check_sparsity(sparsity)
    check_lists(methods=methods)
    for method in methods:
        check_one_of("method", method, METHODS)


def _start(experiment, store, seed, member, method):
    if method == "pruned":
        return train_dense(experiment, store, member_seed(seed, member), "a")[0][experiment.epochs]
    if method == "lth":
        return train_dense(experiment, store, member_seed(seed, 0), "a")[0][experiment.rewind]
    if method in FROM_SCRATCH:
        return build_network(experiment, seed=2 * member_seed(seed, member) + 1).state_dict()  # B before any training
    return train_dense(experiment, store, member_seed(seed, member), "b")[0][experiment.rewind]


def run(experiment, store, *, seeds, members, sparsity, methods, workers=1):
    """Train the members of several seeds by several methods.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
    store : permask_core.runs.store.Store
    seeds : sequence of int
        Two seeds share nothing random except the split of the data.
    members : int
        In each seed and method, at least 1.
    sparsity : float
        In (0, 1).
    methods : sequence of str
        As for :func:`train_member`.
    workers : int
        Processes that share the work, seed by seed; see :func:`permask_core.experiments.permuted_masks.run`.

    Returns
    -------
    list of dict
        One row per run: ``method``, ``seed``, ``member``, ``sparsity`` and ``achieved`` (0 for dense),
        test ``accuracy`` in [0, 1], ``loss`` in nats, ``seconds``, and ``logits`` [n, classes] of the test inputs.

    Raises
    ------
    ValueError
        If anything is unknown or out of range, before any training.
    RuntimeError
        If a worker process died.
    """
    seeds, methods = list(seeds), methods if isinstance(methods, str) else list(methods)
    check_run(seeds, members, sparsity, methods, workers)
    groups(experiment)  # raises for a network that cannot be permuted
    jobs = [(experiment, seed, members, sparsity, methods) for seed in map(int, seeds)]
    return run_jobs(_run_seed, jobs, store, workers, len(jobs) * members * len(methods))


def training_epochs(experiment, members, sparsity, method):
    """Count the epochs of training that some members of a seed need, with shared epochs counted once.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
    members : int
        At least 1.
    sparsity : float
        In (0, 1).
    method : str
        As for :func:`train_member`.

    Returns
    -------
    int
        Only the epochs that they need: for a network B those to its rewind point, and for ``permuted`` those to the
        epoch of matching if that is later. (:func:`run` trains each B to its end, for the methods that need it.)

    Raises
    ------
    ValueError
        If a value is unknown or out of range.
    """
    check_integer("members", members, 1)
    check_sparsity(sparsity)
    check_one_of("method", method, METHODS)
    if method == "dense":
        return members * experiment.epochs
    ticket_epochs = experiment.epochs + full_rounds(sparsity, experiment.imp_rate) * experiment.imp_epochs
    tickets = members if method == "pruned" else 1
    of_b = {"permuted": max(experiment.rewind, experiment.matched_at), "naive": experiment.rewind,
            "random": experiment.rewind}.get(method, 0)
    return tickets * ticket_epochs + members * (of_b + experiment.epochs - experiment.rewind)


def _run_seed(store, experiment, seed, members, sparsity, methods):
    for method in methods:
        for member in range(members):
            states, record = train_member(experiment, store, seed, member, sparsity, method)
            yield {"method": method, "seed": seed, "member": member, "sparsity": sparsity * (method != "dense"),
                   "data": content(experiment), **record, "logits": logits(experiment, states[max(states)])}
