"""Weight matching: the permutation that brings the weights of one network closest to those of another.

Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023, section 3.2 and algorithm 1.
Minimising the distance is equivalent to maximising the sum of inner products. This is hard for all groups at once, but
a linear assignment for one group with all others fixed. So the groups are matched one by one, in random order, until
the objective gains nothing. Similarities are matrix products in the precision of the weights, on their device. The gain
of a step is measured in float64 on the weights that it moved. A step without gain is undone, so the objective never
falls, even if it is not linear in a step (a matrix with both axes in one group).
"""

from math import fsum, sqrt

import torch

from permask_core.matching.groups import check_groups
from permask_core.matching.nested import check_reached, compose_, match_units, parts_of
from permask_core.matching.permutations import Permutations, permute_, random_permutations, unpermute_
from permask_core.matching.similarity import Similarities, all_units_at
from permask_core.runs.checks import check_integer

STATISTICS = ("running_mean", "running_var")  # they describe data, not weights: they are moved, but not matched
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # the search ends when the relative gain of a sweep is smaller
ROUNDING = 1e-12  # a smaller float64 gain, relative to the norms of the moved weights, may be rounding


def match_weights(groups, source, target, *, seed=0, restarts=1, device=None):
    """Return permutations that move ``source`` onto ``target``, by weight matching.

    Parameters
    ----------
    groups : dict of str to Group
    source, target : dict of str to torch.Tensor
        Two ``state_dict`` of one architecture. Running statistics of BatchNorm and integers do not enter the objective.
    seed : int
        Seed of the order of groups and of the restarts. The result is a local optimum and may depend on the seed. The
        same seed gives the same result, also for tied units (dead units, whose weights are all zero).
    restarts : int
        Number of searches, of which the best is returned. The first starts from the identity, all others from random
        permutations.
    device : str or torch.device, optional
        Device of the matrix products; by default that of the source.

    Returns
    -------
    Permutations
        On the CPU; ``permute(groups, permutations, source)`` is close to ``target``. ``objective`` is the sum of the
        inner products of matched weights before the first sweep over the groups and after each sweep; it never falls.

    Raises
    ------
    ValueError
        If keys or shapes differ, the groups do not fit, a weight is not finite, or ``restarts`` is not an integer of at
        least 1.

    Examples
    --------
    >>> from permask_core.matching import Entry, Group
    >>> groups = {"hidden": Group(3, (Entry("in", 0), Entry("out", 1)))}
    >>> source = {"in": torch.eye(3), "out": torch.tensor([[1.0, 2.0, 3.0]])}
    >>> target = {"in": torch.eye(3)[[2, 0, 1]], "out": torch.tensor([[3.0, 1.0, 2.0]])}
    >>> match_weights(groups, source, target)
    {'hidden': tensor([2, 0, 1])}
    """
    check_integer("restarts", restarts, 1)
    check_pair(source, target)
    check_groups(groups, source, whole=True)
    weights, goal = matched(groups, source, target, device)
    generator = torch.Generator().manual_seed(int(seed))

    def starts():
        yield {name: torch.arange(group.size) for name, group in groups.items()}
        for _ in range(restarts - 1):
            yield random_permutations(groups, seed=int(torch.randint(2**62, (), generator=generator)))

    searches = (climb(groups, start, weights, goal, generator) for start in starts())
    return max(searches, key=lambda found: found.objective[-1])


def climb(groups, permutations, source, target, generator):
    """Algorithm 1: improve the ``permutations``, one group after another, until the gain of a sweep is negligible."""
    moved, parts = {name: tensor.clone() for name, tensor in source.items()}, parts_of(groups)
    permute_(groups, permutations, moved)
    similarities = Similarities(groups, target, moved, _similarity)
    products = {name: _inner(moved[name], target[name]) for name in moved}
    rounding = {name: ROUNDING * _norm(moved[name]) * _norm(target[name]) for name in moved}
    objective, waiting, prices = [fsum(products.values())], set(groups), {}
    while waiting:  # for groups whose similarity has changed since they were assigned
        for name in _shuffle(groups, generator):
            if name not in waiting:
                continue
            waiting.remove(name)
            steps = dict(match_units(parts, similarities, [name], prices).steps())  # without parts: one assignment
            permute_(groups, steps, moved)
            now = {tensor: _inner(moved[tensor], target[tensor]) for tensor in _tensors(groups, steps) & moved.keys()}
            gain = fsum(now.values()) - fsum(products[tensor] for tensor in now)
            if gain > fsum(rounding[tensor] for tensor in now):
                compose_(groups, parts, permutations, steps)
                products |= now
                waiting = waiting.difference(steps) | similarities.update(steps)
            else:
                unpermute_(groups, steps, moved)
        objective.append(fsum(products.values()))
        if objective[-1] - objective[-2] <= TOLERANCE[next(iter(moved.values())).dtype] * abs(objective[-1]):
            break
    check_reached(groups, permutations, source, moved)
    return Permutations(permutations, objective)


def _similarity(groups, target, moved):
    """Return the inner products of the units of some groups of one kind in the target and in the moved source.

    The result [groups * units, groups * units] is the sum over the entries of a group of target weights times
    transposed source weights.
    """
    n = len(groups) * groups[0].size
    total = next(iter(moved.values())).new_zeros(n, n)
    for entries in zip(*(group.entries for group in groups)):
        if (name := entries[0].tensor) in moved:
            total.addmm_(all_units_at(target[name], entries), all_units_at(moved[name], entries).T)
    return total


def _inner(one, other):
    """Return the inner product in float64, in parts that fit into a cache: one large copy would take ten times as
    long."""
    pairs = zip(one.flatten().split(2**18), other.flatten().split(2**18))
    return float(sum(torch.dot(a.double(), b.double()) for a, b in pairs))


def _norm(tensor):
    return sqrt(_inner(tensor, tensor))


def _tensors(groups, names):
    """Return the names of the tensors in some groups."""
    return {entry.tensor for name in names for entry in groups[name].entries}


def _shuffle(groups, generator):
    names = list(groups)
    return [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]


def matched(groups, source, target, device=None):
    """Return the weights to match, in one precision and on one device: those in groups, except statistics and integers.
    Raise ValueError if there are none or one is not finite."""
    names = [name for name in sorted(_tensors(groups, groups)) if is_continuous(source[name])
             and name.rsplit(".", 1)[-1] not in STATISTICS]
    if groups and not names:
        raise ValueError("the groups have only statistics and integers: expected at least one weight to match")
    for name in names:
        if not (source[name].isfinite().all() and target[name].isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or infinite weights: expected finite weights")
    double = any(as_real(state[name]).dtype == torch.float64 for state in (source, target) for name in names)
    device = device or next((source[name].device for name in names), None)
    dtype = torch.float64 if double else torch.float32
    return tuple({name: as_real(state[name].detach()).to(device, dtype) for name in names}
                 for state in (source, target))


def as_real(tensor):
    """Return a tensor, with the real and the imaginary part along a last axis if it is complex."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_continuous(tensor):
    """Whether a value of a ``state_dict`` is a tensor of real or complex numbers, and not of integers."""
    return isinstance(tensor, torch.Tensor) and (tensor.is_floating_point() or tensor.is_complex())


def check_pair(source, target):
    """Raise ValueError, which has the first wrong key, unless two ``state_dict`` have the same keys and shapes; extra
    states that are no tensors may differ."""
    for name in [*source, *(name for name in target if name not in source)]:
        if name not in source or name not in target:
            raise ValueError(f"{name!r} is in the {'target' if name in target else 'source'} only: expected two "
                             "state_dicts of one architecture")
        if not isinstance(source[name], torch.Tensor):
            continue
        if source[name].shape != target[name].shape:
            raise ValueError(f"{name!r} has shape {list(source[name].shape)} in the source and "
                             f"{list(target[name].shape)} in the target")


def check_mixable(states):
    """Raise ValueError, which has the first wrong key, if some ``state_dict`` cannot be mixed: if integers other than
    counts of batches, or masks of pruning, differ, or a weight is not an entry but computed from several."""
    for name, tensor in states[0].items():
        if not isinstance(tensor, torch.Tensor):
            continue
        integers = not is_continuous(tensor) and not name.endswith("num_batches_tracked")
        if integers or name.endswith("_mask") and f"{name.removesuffix('mask')}orig" in states[0]:
            if any(not torch.equal(tensor.cpu(), other[name].cpu()) for other in states[1:]):
                kind = f"integers ({tensor.dtype})" if integers else "values of a mask"
                raise ValueError(f"{name!r} holds {kind} that differ between the states: expected the same, because "
                                 "they cannot be mixed. Make sparse layers dense first")
        if name.endswith("weight_g") and f"{name[:-1]}v" in states[0]:
            raise ValueError(f"{name!r} is the length of a weight with torch.nn.utils.weight_norm: expected networks "
                             "with torch.nn.utils.parametrizations.weight_norm, which loads such a state, or without")
        if "parametrizations." in name:
            raise ValueError(f"{name!r} is not a weight, but an argument of the function that computes one: expected "
                             "weights, as after torch.nn.utils.parametrize.remove_parametrizations; "
                             "permask_core.evaluation.connectivity.interpolate_network interpolates such weights")
