"""A tournament of alignments: by which permutation, or by which other change, does a mask of A serve B best?

A block has four networks of :mod:`permask_core.experiments.permuted_masks`, all dense and all with a ticket. Each is
the target B once, and the next network of its block is its A. So each network's own ticket is both the ticket that is
moved and the best mask to compare with. A candidate makes a mask for B at a sparsity; B is then trained under it, from
its rewind point. Blocks share no network, so a block, and not a network, is one sample in an interval.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from permask_core.data.splits import in_order
from permask_core.experiments.alignment import mask_overlap
from permask_core.experiments.permuted_masks import (
    Experiment,
    build_network,
    find_ticket,
    groups,
    train_dense,
)
from permask_core.experiments.stages import content, data, run_jobs
from permask_core.experiments.trainings import Training, train
from permask_core.masks import apply_masks, layer_sparsity, prunable_weights
from permask_core.masks import sparsity as sparsity_of
from permask_core.matching import activation_correlations, match_activations, match_weights, permute
from permask_core.matching.problems import join, similarity_problem
from permask_core.matching.relaxed import match_loss, match_many
from permask_core.models import evaluation_mode
from permask_core.pruning import check_sparsity, magnitude_masks, random_masks
from permask_core.runs.checks import check_integer, check_lists, check_one_of, check_work
from permask_core.sparse.dynamic import Rewiring
from permask_core.training.loop import fit

BLOCK = 4  # networks


class Case(NamedTuple):
    """A network ``target``, 0 to 3, of a block, which needs a mask at a sparsity."""

    experiment: Experiment
    store: object
    block: int
    target: int
    sparsity: float

    @property
    def b(self):
        """The seed of B."""
        return BLOCK * self.block + self.target

    @property
    def sources(self):
        """The seeds of the other networks of the block; the first is A."""
        return [BLOCK * self.block + (self.target + i) % BLOCK for i in range(1, BLOCK)]

    @property
    def early(self):
        """The epoch of the rewind point."""
        return self.experiment.rewind

    @property
    def end(self):
        """The last epoch."""
        return self.experiment.epochs

    @property
    def groups(self):
        return groups(self.experiment)

    def state(self, seed, epoch):
        """Return the dense network of a seed at an epoch."""
        return train_dense(self.experiment, self.store, seed, "a")[0][epoch]

    def pair(self, epoch):
        """Return a matching problem: the groups, A and B."""
        return self.groups, self.state(self.sources[0], epoch), self.state(self.b, epoch)

    def ticket(self, seed):
        """Return the mask of a network, by iterative magnitude pruning."""
        return find_ticket(self.experiment, self.store, seed, self.sparsity).masks

    def model(self, state):
        return build_network(self.experiment, state)

    def batches(self, size=1000):
        """Return the training images in order, in batches."""
        train = data(self.experiment).train
        return list(train.batches(in_order(train, size)))


# ---- What may stand in the place of weights --------------------------------------------------------------------------

def gradients(case, seed, epoch):
    """Return the gradients of the mean loss over the training images, by the name of the parameter."""
    model = case.model(case.state(seed, epoch))
    train = data(case.experiment).train
    with evaluation_mode(model), torch.enable_grad():
        for x, y in case.batches():
            (cross_entropy(model(x), y, reduction="sum") / len(train)).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def saliencies(case, seed, epoch):
    """Return the absolute values of weight times gradient (Lee et al., "SNIP", ICLR 2019)."""
    state = case.state(seed, epoch)
    return {name: (state[name] * gradient).abs() for name, gradient in gradients(case, seed, epoch).items()}


def restricted(groups, tensors):
    """Return the groups with entries for these tensors only."""
    return {name: group._replace(entries=tuple(entry for entry in group.entries if entry.tensor in tensors))
            for name, group in groups.items()}


def match_tensors(case, source, target, **options):
    """Match tensors of A and B that take the place of their weights."""
    return match_weights(restricted(case.groups, source), source, {name: target[name] for name in source}, **options)


def as_numbers(masks):
    """Return masks with 1 for a connection and 0 for none."""
    return {name: mask.float() for name, mask in masks.items()}


def magnitudes(state):
    """Return the absolute values of a state."""
    return {name: tensor.abs() for name, tensor in state.items()}


# ---- Candidates: permutations of A's mask ----------------------------------------------------------------------------

def by_activations(case, epoch, source=None):
    """Return a matching by activations; ``source`` replaces the state of A."""
    found, a, b = case.pair(epoch)
    return match_activations(found, case.model(a if source is None else source), case.model(b), case.batches())


def by_both(case, groups, a, b):
    """Return a matching by weights and activations with equal shares."""
    similarities = activation_correlations(groups, case.model(a), case.model(b), case.batches())
    return match_weights(*join((groups, a, b), similarity_problem(groups, similarities)))


def pruned_pair(case, epoch):
    """Return a matching problem: the groups, A with only the weights that its mask keeps, and B."""
    found, a, b = case.pair(epoch)
    return found, apply_masks(a, case.ticket(case.sources[0])), b


def by_pruned_pair(case, epoch):
    """Return a matching of two pruned networks; B is pruned by magnitude, at once."""
    found, a, b = pruned_pair(case, epoch)
    return match_weights(found, a, apply_masks(b, keep_largest(case, b)))


def by_trained_ticket(case):
    """Return a matching of A after sparse training under its mask with the dense B."""
    return match_weights(case.groups, trained_ticket(case), case.state(case.b, case.end))


def trained_ticket(case):
    """Return A after sparse training under its own mask."""
    return train_target(case._replace(target=case.sources[0] % BLOCK), "own ticket")[0]


def by_sparse_epochs(case, epochs=2):
    """Return a matching of the trained ticket of A with B after a few epochs under A's mask, moved as usual."""
    masks = CANDIDATES["pruned weights, early"].makes(case)
    model, experiment = case.model(case.state(case.b, case.early)), case.experiment
    fit(model, data(experiment).train, experiment.recipe(epochs, experiment.sparse_lr), seed=10_000 + case.b,
        masks=masks, description=None)
    return match_weights(case.groups, trained_ticket(case), model.cpu().state_dict())


def by_saliency(case):
    """Return a matching of the saliencies that the mask keeps."""
    a, b = (saliencies(case, seed, case.early) for seed in (case.sources[0], case.b))
    return match_tensors(case, apply_masks(a, case.ticket(case.sources[0])), b)


def by_epochs(case):
    """Return one matching of the weights at all checkpoints from the rewind point on."""
    return match_weights(*join(*(case.pair(epoch) for epoch in case.experiment.checkpoints if epoch >= case.early)))


def by_loss(case, epoch, epochs=5):
    """Return a matching that lowers the loss of B under the moved mask, from weight matching on."""
    found, a, b = case.pair(epoch)
    batches = case.batches(case.experiment.batch_size)
    return match_loss(found, case.ticket(case.sources[0]), case.model(b), epochs * batches, lr=0.03,
                      start=match_weights(found, a, b))


def by_many(case, epoch, networks):
    """Return the matching of A by the algorithm of Frank and Wolfe, with up to two other networks of the block."""
    sources = [case.state(seed, epoch) for seed in case.sources[:networks]]
    return match_many(case.groups, sources, case.state(case.b, epoch))[0]


# ---- Candidates: other masks -----------------------------------------------------------------------------------------

def keep_largest(case, scores):
    """Return the mask of the largest scores over all weights, at the sparsity of the case."""
    names = prunable_weights(case.model(None))
    return magnitude_masks({name: scores[name].float() for name in names}, case.sparsity)


def vote(case, kind):
    """Return a mask for which all three other networks vote, with their masks or with the magnitudes of their
    weights; of the masks, equal votes are decided by the magnitudes."""
    found, b = case.groups, case.state(case.b, case.end)
    total = {}
    for seed in case.sources:
        state, mask = case.state(seed, case.end), case.ticket(seed)
        shares = {name: (one.abs() / (100 * one.abs().max()) + mask[name] if kind == "masks" else one.abs())
                  for name, one in state.items() if name in mask}
        for name, one in permute(found, match_weights(found, state, b), shares).items():
            total[name] = total.get(name, 0) + one
    return keep_largest(case, total)


def product_with_b(case):
    """Return the mask of the largest products of A's moved magnitudes and B's."""
    found, a, b = case.pair(case.end)
    there = permute(found, match_weights(found, a, b), magnitudes(a))
    return keep_largest(case, {name: one * b[name].abs() for name, one in there.items()})


def shuffled(case):
    """Return the mask of A, shuffled in each layer."""
    mask = case.ticket(case.sources[0])
    return random_masks(mask, {name: 1 - value for name, value in layer_sparsity(mask).items()}, seed=case.b)


class Candidate(NamedTuple):
    """A function that ``makes`` a mask for a case; the ``epochs`` of dense training of B that it needs ("rewind",
    "end", or "ticket" for B's own pruning); its ``kind``; and, if connections move in sparse training, ``rewiring``."""

    makes: Callable
    epochs: str
    kind: str
    rewiring: str | None = None


def _permutation(match, epochs="end"):
    return Candidate(lambda case: permute(case.groups, match(case), case.ticket(case.sources[0])), epochs,
                     "permutation")


CANDIDATES = {
    "naive": Candidate(lambda case: case.ticket(case.sources[0]), "rewind", "control"),
    "random": Candidate(shuffled, "rewind", "control"),
    "one-shot": Candidate(lambda case: keep_largest(case, case.state(case.b, case.end)), "end", "control"),
    "rigl": Candidate(lambda case: case.ticket(case.sources[0]), "rewind", "control", "rigl"),
    "weights, early": _permutation(lambda case: match_weights(*case.pair(case.early)), "rewind"),
    "weights": _permutation(lambda case: match_weights(*case.pair(case.end))),
    "restarts": _permutation(lambda case: match_weights(*case.pair(case.end), restarts=20)),
    "Frank-Wolfe, early": _permutation(lambda case: by_many(case, case.early, 1), "rewind"),
    "Frank-Wolfe": _permutation(lambda case: by_many(case, case.end, 1)),
    "cycle": _permutation(lambda case: by_many(case, case.end, 3)),
    "activations, early": _permutation(lambda case: by_activations(case, case.early), "rewind"),
    "activations": _permutation(lambda case: by_activations(case, case.end)),
    "both, early": _permutation(lambda case: by_both(case, *case.pair(case.early)), "rewind"),
    "both": _permutation(lambda case: by_both(case, *case.pair(case.end))),
    "checkpoints": _permutation(by_epochs),
    "gradients": _permutation(lambda case: match_tensors(case, *(
        gradients(case, seed, case.early) for seed in (case.sources[0], case.b))), "rewind"),
    "pruned weights, early": _permutation(lambda case: match_weights(*pruned_pair(case, case.early)), "rewind"),
    "pruned weights": _permutation(lambda case: match_weights(*pruned_pair(case, case.end))),
    "pruned Frank-Wolfe": _permutation(lambda case: match_many(
        case.groups, [pruned_pair(case, case.end)[1]], case.pair(case.end)[2])[0]),
    "pruned pair, early": _permutation(lambda case: by_pruned_pair(case, case.early), "rewind"),
    "pruned pair": _permutation(lambda case: by_pruned_pair(case, case.end)),
    "pruned activations": _permutation(lambda case: by_activations(case, case.end, pruned_pair(case, case.end)[1])),
    "pruned both": _permutation(lambda case: by_both(case, *pruned_pair(case, case.end))),
    "trained ticket": _permutation(by_trained_ticket),
    "sparse epochs": _permutation(by_sparse_epochs, "rewind"),
    "saliency": _permutation(by_saliency, "rewind"),
    "mask to magnitudes": _permutation(lambda case: match_tensors(
        case, as_numbers(case.ticket(case.sources[0])), magnitudes(case.state(case.b, case.end)))),
    "loss, early": _permutation(lambda case: by_loss(case, case.early), "rewind"),
    "loss": _permutation(lambda case: by_loss(case, case.end)),
    "vote of masks": Candidate(lambda case: vote(case, "masks"), "end", "mask"),
    "vote of magnitudes": Candidate(lambda case: vote(case, "magnitudes"), "end", "mask"),
    "product": Candidate(product_with_b, "end", "mask"),
    "pruned weights, early, rigl": Candidate(lambda case: CANDIDATES["pruned weights, early"].makes(case), "rewind",
                                             "mask", "rigl"),
    "mask to mask": _permutation(lambda case: match_tensors(
        case, *(as_numbers(case.ticket(seed)) for seed in (case.sources[0], case.b)), restarts=10))._replace(
            epochs="ticket", kind="oracle"),
    "own ticket": Candidate(lambda case: case.ticket(case.b), "ticket", "oracle"),
}


# ---- Stages ----------------------------------------------------------------------------------------------------------

def make_mask(case, candidate):
    """Return the mask that a candidate makes, and the record of the stage with its ``seconds``."""
    chosen = CANDIDATES[candidate]

    def compute():
        return chosen.makes(case), {}

    case.ticket(case.sources[0]), case.state(case.b, case.end)  # shared stages are not part of the seconds
    return case.store.stage("candidate", compute, **_parameters(case, candidate))


def train_target(case, candidate):
    """Train B under the mask of a candidate.

    Returns
    -------
    (dict of str to torch.Tensor, dict)
        The trained state, and the record: test ``accuracy`` and ``loss``, the sparsity ``achieved``, the ``seconds`` of
        making the mask, and ``overlap``, the share of the mask at its start that B's own ticket has too.
    """
    masks, made = make_mask(case, candidate)
    experiment, way = case.experiment, CANDIDATES[candidate].rewiring
    recipe = experiment.recipe(experiment.epochs - experiment.rewind, experiment.sparse_lr)
    steps = max(1, len(data(experiment).train) // experiment.batch_size)
    rewiring = Rewiring(way, every=steps) if way else None  # once in an epoch

    state, record = train(case.store, Training(
        experiment, "tournament", _parameters(case, candidate),
        lambda: (case.model(case.state(case.b, case.early)), masks), recipe, 10_000 + case.b,
        lambda model, run, record: (run.state, {**record, "achieved": sparsity_of(run.masks)}),
        description=f"{candidate} at {100 * case.sparsity:g} %, network {case.b}", rewiring=rewiring))
    return state, {**record, "seconds": made["seconds"], "overlap": mask_overlap(masks, case.ticket(case.b))}


def _parameters(case, candidate):
    settings = case.experiment.as_dict()
    own = {"candidate": candidate, "block": case.block, "target": case.target, "sparsity": case.sparsity}
    return own | case.experiment.stage_parameters(*settings)


# ---- Runs ------------------------------------------------------------------------------------------------------------

def run(experiment, store, *, blocks, sparsities, candidates=tuple(CANDIDATES), workers=1):
    """Run candidates on all networks of several blocks.

    Parameters
    ----------
    experiment : permask_core.experiments.permuted_masks.Experiment or list of them
    store : permask_core.runs.store.Store
    blocks : sequence of int
    sparsities : sequence of float
        In (0, 1).
    candidates : sequence of str
        Some of ``CANDIDATES``.
    workers : int
        Processes that share the blocks, as in :func:`permask_core.experiments.permuted_masks.run`.

    Returns
    -------
    list of dict
        One row for each run: ``method`` (the candidate), its ``kind``, ``block``, ``seed`` (of B), ``sparsity`` and
        ``achieved``, test ``accuracy`` in [0, 1], ``loss`` in nats, ``seconds`` of making the mask, ``epochs`` of dense
        training of B (None: B's own pruning), ``overlap`` in [0, 1] with B's own ticket, a hash of the ``data``, and
        the experiment's ``width``.

    Raises
    ------
    ValueError
        If a value is unknown or out of range, before any training.
    """
    experiments = [experiment] if isinstance(experiment, Experiment) else list(experiment)
    check_lists(candidates=list(candidates), sparsities=list(sparsities))
    for name in candidates:
        check_one_of("candidate", name, CANDIDATES)
    for value in sparsities:
        check_sparsity(value)
    check_work(blocks, workers, "blocks")
    for one in experiments:
        groups(one)  # raises now, not after hours, if the network cannot be permuted
        check_integer("rewind", one.rewind, 1)  # gradients and similarities of untrained networks say little
    experiments = [replace(one, checkpoints=(*one.checkpoints, one.rewind, one.epochs)) for one in experiments]
    jobs = [(one, int(block), list(sparsities), list(candidates)) for one in experiments for block in blocks]
    return run_jobs(_run_block, jobs, store, workers, len(jobs) * BLOCK * len(candidates) * len(list(sparsities)))


def _run_block(store, experiment, block, sparsities, candidates):
    for sparsity in sparsities:
        for target in range(BLOCK):
            case = Case(experiment, store, block, target, sparsity)
            for name in candidates:
                chosen = CANDIDATES[name]
                yield {"method": name, "kind": chosen.kind, "block": block, "seed": case.b, "sparsity": sparsity,
                       "width": experiment.width, "data": content(experiment),
                       "epochs": {"rewind": case.early, "end": case.end}.get(chosen.epochs),
                       **train_target(case, name)[1]}
