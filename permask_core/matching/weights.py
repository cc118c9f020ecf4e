"""Weight matching: the permutation that brings the weights of one network closest to another's.

Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023, section 3.2 and algorithm 1.
Minimising the distance is maximising the sum of inner products; that is a hard problem over all groups at once, and a
linear assignment over one group while the others are held: so one group after another, in random order, until nothing
is gained. Similarities are matrix products in the precision of the weights, on their device. What a step gains is
measured on the weights it moved, in float64, and a step that gains nothing is taken back, so that the objective never
falls, even where it is not linear in a step (a matrix with both of its axes in one group).
"""

from itertools import product
from math import fsum, sqrt
from typing import NamedTuple

import torch

from permask_core.matching.groups import Entry, check_groups, depth, indices
from permask_core.matching.permutations import (
    Permutations,
    best_total,
    move_,
    part_pairs,
    parts_of,
    permute_,
    random_permutations,
    steps_between,
)

STATISTICS = ("running_mean", "running_var")  # they describe data, not the function's weights: moved, but not matched
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative gain of a sweep below which the search ends
ROUNDING = 1e-12  # relative to the norms of the weights that moved: a gain in float64 below it may be rounding


def match_weights(groups, source, target, *, seed=0, restarts=1, device=None):
    """Permutations that move ``source`` onto ``target``, by weight matching.

    Parameters
    ----------
    groups : dict of str to Group
    source, target : dict of str to torch.Tensor
        Two ``state_dict`` of one architecture. BatchNorm's running statistics and whole numbers stay out of the cost.
    seed : int
        Of the order in which groups are visited and of the restarts. The result is a local optimum and may depend on
        it; the same seed gives the same result, also where units are tied (dead ones, whose weights are all zero).
    restarts : int
        How many searches to make, of which the best is kept: the first begins with the source as it is, the others
        with permutations drawn at random.
    device : str or torch.device, optional
        Where to multiply; by default where the source is.

    Returns
    -------
    Permutations
        As :func:`permute` takes them, on the CPU: ``permute(groups, permutations, source)`` lies close to ``target``.
        Their ``objective`` is the sum of the inner products of matched weights, before the first sweep over the groups
        and after each; it never falls.

    Raises
    ------
    ValueError
        If keys or shapes differ, the groups do not fit, or a weight is not finite.
    """
    check_pair(source, target)
    check_groups(groups, source, whole=True)
    parts = parts_of(groups)
    if not isinstance(restarts, int) or restarts < 1:
        raise ValueError(f"restarts is {restarts!r}: expected an integer of at least 1")
    matched = sorted({entry.tensor for group in groups.values() for entry in group.entries
                      if source[entry.tensor].is_floating_point()
                      and entry.tensor.rsplit(".", 1)[-1] not in STATISTICS})
    if groups and not matched:
        raise ValueError("the groups name no weights but statistics and whole numbers: there is nothing to match")
    for name in matched:
        if not (source[name].isfinite().all() and target[name].isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or infinite weights: they cannot be matched")
    double = any(state[name].dtype == torch.float64 for state in (source, target) for name in matched)
    dtype = torch.float64 if double else torch.float32
    device = device or next((source[name].device for name in matched), None)
    goal = {name: target[name].detach().to(device, dtype) for name in matched}
    generator, best = torch.Generator().manual_seed(seed), None
    for restart in range(restarts):
        start = {name: torch.arange(group.size) for name, group in groups.items()}
        if restart:
            start = random_permutations(groups, seed=int(torch.randint(2**62, (), generator=generator)))
        moved = {name: source[name].detach().to(device, dtype, copy=True) for name in matched}
        permute_(groups, start, moved)
        found = _search(_State(groups, parts, start, moved, goal), TOLERANCE[dtype], generator)
        if parts:
            _check_reached(groups, found, source, moved)
        if best is None or found.objective[-1] > best.objective[-1]:
            best = found
    return best


def _search(state, tolerance, generator):
    """Visit the groups until a sweep gains nothing to speak of."""
    names, objective = list(state.groups), [state.objective()]
    waiting = set(names)  # the groups whose similarity has changed since they were assigned
    while waiting:
        for i in torch.randperm(len(names), generator=generator).tolist():
            if names[i] in waiting:
                changed = state.improve(names[i])
                waiting -= {names[i], *changed}
                waiting.update(share.other for name in changed for share in state.shares[name])
        objective.append(state.objective())
        if objective[-1] - objective[-2] <= tolerance * abs(objective[-1]):
            break
    return Permutations(state.permutations, objective)


class _State:
    """A network on its way to the goal: its weights ``moved`` so far, and the ``permutations`` that did it."""

    def __init__(self, groups, parts, permutations, moved, goal):
        self.groups, self.parts, self.permutations, self.moved, self.goal = groups, parts, permutations, moved, goal
        self.shares, self.similar = _shares(groups, moved), {}
        self.norms = {name: sqrt(_inner(moved[name], moved[name]) * _inner(goal[name], goal[name])) for name in moved}
        self.inner = {name: _inner(moved[name], goal[name]) for name in moved}

    def objective(self):
        return fsum(self.inner.values())

    def improve(self, name):
        """Assign a group, and what is within its units, if that gains. Returns the groups that moved."""
        steps = [(at, order) for at, order in steps_between(self.parts, self._similarity, name, name)
                 if not torch.equal(order, torch.arange(len(order)))]
        for at, order in steps:
            move_(self.groups[at], order, self.moved)
        touched = {entry.tensor for at, _ in steps for entry in self.groups[at].entries} & self.moved.keys()
        products = {tensor: _inner(self.moved[tensor], self.goal[tensor]) for tensor in touched}
        gain = fsum(products.values()) - fsum(self.inner[tensor] for tensor in touched)
        if gain <= ROUNDING * sum(self.norms[tensor] for tensor in touched):
            for at, order in reversed(steps):
                move_(self.groups[at], order.argsort(), self.moved)
            return []
        self.inner |= products
        for at, order in steps:
            origin = self._origin(at)
            self.permutations[origin] = self.permutations[origin][order]
            self._follow(at, order)
        return [at for at, _ in steps]

    def _similarity(self, to, origin):
        """How alike the units of ``to`` in the goal and those of ``origin`` are, with their parts at their best."""
        return self._aligned(to, origin, self._products(to, origin))

    def _aligned(self, to, origin, products):
        if to not in self.parts:
            return products
        total = products.cpu().double()
        for i, j, a, b in part_pairs(self.parts, to, origin):
            part = self._products(a, b)
            total[i, j] += best_total(self._aligned(a, b, part)) - float(part.trace())
        return total

    def _products(self, to, origin):
        """Inner products of the units of ``to`` in the goal with those of ``origin``, as these are."""
        if to == origin and to in self.similar:
            return self.similar[to]
        group, other = self.groups[to], self.groups[origin]
        total = next(iter(self.moved.values())).new_zeros(group.size, group.size)
        for entry, at in zip(group.entries, other.entries):
            if entry.tensor in self.moved:
                total += _units(self.goal[entry.tensor], entry) @ _units(self.moved[at.tensor], at).T
        if group.within is None and to not in self.parts:
            self.similar[to] = total
        return total

    def _follow(self, name, order):
        """Bring the similarities that are kept up to date with a step: its own is reordered, and the others changed by
        the units that moved, of which late in a search there are few."""
        if name in self.similar:
            similar = self.similar[name]
            self.similar[name] = similar.index_select(1, order.to(similar.device))
        units = (order != torch.arange(len(order))).nonzero()[:, 0]
        back = order.argsort()[units]
        for entry, other, at, simple in self.shares[name]:
            if other in self.similar and simple:
                now, before = (self._slice(self.moved, entry, chosen) for chosen in (units, back))
                goal = self._slice(self.goal, entry, units)
                self.similar[other] += _units(goal, at) @ _units(now - before, at).T
            else:
                self.similar.pop(other, None)

    def _slice(self, tensors, entry, units):
        tensor = tensors[entry.tensor]
        positions = indices(entry, tensor.shape[entry.axis])[units].flatten()
        return tensor.index_select(entry.axis, positions.to(tensor.device))

    def _origin(self, name):
        """The group that held in the source what the group ``name`` holds by now: units took their parts along."""
        if self.groups[name].within is None:
            return name
        outer, unit = self.groups[name].within
        before = self._origin(outer)
        parts = self.parts[before][int(self.permutations[before][unit])]
        return parts[self.parts[outer][unit].index(name)]


def _inner(one, other):
    """Inner product in float64, of parts that fit into a cache: a copy of the whole would take ten times as long."""
    pairs = zip(one.flatten().split(2**18), other.flatten().split(2**18))
    return float(sum(torch.dot(a.double(), b.double()) for a, b in pairs))


def _units(tensor, entry):
    """The weights at an entry as a matrix [units, everything else]."""
    part = (tensor if entry.rows is None else tensor[slice(*entry.rows)]).movedim(entry.axis, 0)
    return (part if entry.positions is None else part[entry.positions.to(part.device)]).unsqueeze(-1).flatten(1)


class _Share(NamedTuple):
    """When the units at ``entry`` move, the similarity of the group ``other`` changes, through its entry ``at``.

    That change is ``simple`` where it is the product of what moved: neither entry is confined to rows or to a unit of
    another group, and the group that moves owns no third axis of the tensor.
    """

    entry: Entry
    other: str
    at: Entry
    simple: bool


def _shares(groups, tensors):
    """For each group its :class:`_Share`: places in one tensor along two axes, or of groups one in the other."""
    places = {tensor: [] for tensor in tensors}
    for name, group in groups.items():
        for entry in group.entries:
            if entry.tensor in places:
                places[entry.tensor].append((name, entry, depth(groups, name)))
    shares = {name: [] for name in groups}
    for sharing in places.values():
        for (name, entry, level), (other, at, at_level) in product(sharing, repeat=2):
            if entry.axis != at.axis or level != at_level:
                axes = {e.axis for n, e, _ in sharing if n == name} - {at.axis}
                simple = axes == {entry.axis} and level == at_level == 0 and entry.rows is None and at.rows is None
                shares[name].append(_Share(entry, other, at, simple))
    return shares


def _check_reached(groups, permutations, source, moved):
    """Raise ValueError unless the permutations give what the search moved: they do where parts lie alike in units."""
    again = {name: source[name].detach().to(moved[name], copy=True) for name in moved}
    permute_(groups, permutations, again)
    for name in moved:
        if not torch.equal(again[name], moved[name]):
            raise ValueError(f"the groups within units of others do not lie at the same places of each in {name!r}: "
                             "such units cannot change places")


def check_pair(source, target):
    """Raise ValueError, naming the first key that is in one ``state_dict`` only or has two shapes."""
    for name in [*source, *(name for name in target if name not in source)]:
        if name not in source or name not in target:
            raise ValueError(f"{name!r} is in the {'target' if name in target else 'source'} only: expected two "
                             "state_dicts of one architecture")
        if source[name].shape != target[name].shape:
            raise ValueError(f"{name!r} has shape {list(source[name].shape)} in the source and "
                             f"{list(target[name].shape)} in the target")
