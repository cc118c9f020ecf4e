"""Basins of the solutions of the permuted-mask experiment: lines between them, in stages that are stored.

For each seed, the experiment measures the barrier between the dense networks A and B, with A unchanged and moved onto
B. It also measures which sparse solutions share a basin with the pruned solution, which is A trained, pruned, and
fine-tuned under its mask. The solution of the ticket does, which explains its accuracy (Evci, Ioannou, Keskin and
Dauphin, "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win", AAAI 2022). A permuted solution is
compared with the pruned solution after the same permutation, so that all networks on a line have one mask.
"""

import torch

from permask_core.evaluation.connectivity import angle, barrier, check_correction, distance, line
from permask_core.experiments.permuted_masks import (
    MATCHINGS,
    build_network,
    groups,
    match_dense,
    train_dense,
    train_sparse,
)
from permask_core.experiments.stages import content, data, run_jobs
from permask_core.matching import permute
from permask_core.pruning import check_sparsity
from permask_core.runs.checks import check_integer, check_one_of, check_work
from permask_core.runs.processes import default_device

DENSE, SPARSE = ("permuted", "naive"), ("lth", "permuted", "naive")  # the methods with lines
IMAGES = 2000  # of the training set, for recomputing the statistics of BatchNorm


def ends(experiment, store, seed, sparsity, method, by="weights"):
    """Return the two networks of a line.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment
    store : permask_core.runs.store.Store
    seed : int
    sparsity : float
        0 for the dense networks.
    method : {"lth", "permuted", "naive"}
        For dense networks ``permuted`` or ``naive``: the source is A, moved or not, and the target is B. For sparse
        networks the source is the pruned solution, moved for ``permuted``, and the target is the solution of the
        method.
    by : {"weights", "activations"}
        The matching of A to B.

    Returns
    -------
    (dict of str to torch.Tensor, dict of str to torch.Tensor)
    """
    check_one_of("method", method, SPARSE if sparsity else DENSE)
    if sparsity:
        source = train_sparse(experiment, store, seed, sparsity, "pruned")[0]
        goal = train_sparse(experiment, store, seed, sparsity, method, by if method == "permuted" else None)[0]
    else:
        source, goal = (train_dense(experiment, store, seed, which)[0][experiment.epochs] for which in "ab")
    if method == "permuted":
        source = permute(groups(experiment), match_dense(experiment, store, seed, by)[0], source)
    return source, goal


def losses_between(experiment, store, seed, sparsity, method, by="weights", *, points=25, correction="none"):
    """Compute losses and errors on the line between two networks, on the test and the training set.

    Parameters
    ----------
    experiment, store, seed, sparsity, method, by
        As in :func:`ends`.
    points, correction
        As in :func:`permask_core.evaluation.connectivity.line`; the correction uses the first 2,000 training images.

    Returns
    -------
    (dict of str to torch.Tensor, dict)
        ``alphas``, ``test_losses``, ``test_errors``, ``train_losses`` and ``train_errors``, float64 [points]; and the
        record with ``distance`` and ``angle`` (degrees) between the ends.
    """
    check_correction(correction, build_network(experiment))
    source, goal = ends(experiment, store, seed, sparsity, method, by)

    def compute():
        device, (train, test) = default_device(), (data(experiment).train, data(experiment).test)
        model, batches = build_network(experiment).to(device), None
        if correction != "none":
            chosen = torch.arange(min(IMAGES, len(train)))
            batches = [x for x, _ in train.batches(chosen.split(experiment.batch_size), device)]
        found = {}
        for name, split in (("test", test), ("train", train)):
            between = line(model, source, goal, split, points=points, correction=correction, batches=batches)
            found |= {"alphas": between.alphas, f"{name}_losses": between.losses, f"{name}_errors": between.errors}
        return {name: torch.from_numpy(values) for name, values in found.items()}, {
            "distance": distance(source, goal), "angle": angle(source, goal)}

    settings = experiment.stage_parameters(*experiment.as_dict())
    return store.stage("line", compute, seed=seed, sparsity=sparsity, method=method, by=by, points=points,
                       correction=correction, **settings)


def run(experiment, store, *, seeds, sparsities, by="weights", points=25, correction="none", workers=1):
    """Compute the lines of one or several experiments over seeds and sparsities.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment or list of them
    store : permask_core.runs.store.Store
    seeds : sequence of int
    sparsities : sequence of float
        0 for the line between the dense networks, otherwise in (0, 1).
    by, points, correction
        As in :func:`losses_between`.
    workers : int
        As in :func:`permask_core.experiments.permuted_masks.run`.

    Returns
    -------
    list of dict
        One row for each line: ``method``, ``matching`` ("" without a move), ``sparsity``, ``seed``, the experiment's
        ``width`` and ``matched_at``; the barriers of the test loss and error, ``barrier`` (nats) and ``error_barrier``,
        and of the training set, ``train_barrier`` and ``train_error_barrier``; ``distance`` and ``angle`` between the
        ends; and the test ``losses`` and ``errors`` along the line, as lists.

    Raises
    ------
    ValueError
        Before any training, if an argument is unknown or out of range.
    RuntimeError
        If a worker process died.
    """
    experiments = list(experiment) if isinstance(experiment, (list, tuple)) else [experiment]
    seeds, sparsities = list(seeds), list(sparsities)
    check_work(seeds, workers)
    check_one_of("matching", by, MATCHINGS)
    check_integer("points", points, 3)
    for value in sparsities:
        if value != 0:
            check_sparsity(value)
    for one in experiments:
        groups(one)  # raises an error now, not after hours, if the network cannot be permuted or corrected
        check_correction(correction, build_network(one))
    runs = [(sparsity, method) for sparsity in sparsities for method in (SPARSE if sparsity else DENSE)]
    jobs = [(one, seed, runs, by, int(points), correction) for one in experiments for seed in map(int, seeds)]
    return run_jobs(_run_seed, jobs, store, workers, len(jobs) * len(runs))


def _run_seed(store, experiment, seed, runs, by, points, correction):
    for sparsity, method in runs:
        tensors, record = losses_between(experiment, store, seed, sparsity, method, by, points=points,
                                         correction=correction)
        values = {name: tensor.numpy() for name, tensor in tensors.items()}
        alphas = values["alphas"]
        yield {"method": method, "matching": by if method == "permuted" else "", "seed": seed, "sparsity": sparsity,
               **experiment.select("width", "matched_at"), "data": content(experiment),
               "barrier": barrier(alphas, values["test_losses"]),
               "error_barrier": barrier(alphas, values["test_errors"]),
               "train_barrier": barrier(alphas, values["train_losses"]),
               "train_error_barrier": barrier(alphas, values["train_errors"]), "distance": record["distance"],
               "angle": record["angle"], "losses": values["test_losses"].tolist(),
               "errors": values["test_errors"].tolist()}
