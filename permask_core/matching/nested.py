"""Units with parts: groups that are nested in a unit of another group, like the dimensions of an attention head.

The similarity of two such units depends on the assignment of the parts of one to those of the other, so each pair of
units is a separate matching. A unit moves with its parts. For groups without parts :func:`match_units` is one linear
assignment.
"""

from collections import defaultdict
from itertools import product
from typing import NamedTuple

import torch

from permask_core.matching.permutations import assign, permute_


class Match(NamedTuple):
    """The new ``order`` of the units of a group and the ``steps`` that produce it: permutations of groups in the
    source, parts before the units that contain them, without identities. ``were`` and ``best`` are the similarities of
    units with their parts in the old order and in the best order."""

    order: torch.Tensor
    steps: dict[str, torch.Tensor]
    were: torch.Tensor
    best: torch.Tensor

    def gain(self):
        """Return the gain in similarity."""
        return float(self.best[torch.arange(len(self.order)), self.order].sum()) - float(self.were.trace())


def parts_of(groups):
    """Return the groups within each unit of other groups, {outer: {unit: [names]}}.

    Raises ValueError unless all units of a group have the same kind of parts, because units move with their parts.
    """
    parts = {}
    for name, group in groups.items():
        if group.within is not None:
            outer, unit = group.within
            parts.setdefault(outer, {}).setdefault(unit, []).append(name)
    for outer, units in parts.items():
        kinds = [[(groups[name].size, [entry[:2] for entry in groups[name].entries]) for name in units.get(unit, ())]
                 for unit in range(groups[outer].size)]
        for unit, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ValueError(f"the groups within units 0 and {unit} of {outer!r} differ: expected the same sizes, "
                                 "tensors and axes within every unit")
    return parts


def part_pairs(parts, to, origin):
    """Yield (i, j, a, b): unit i of ``to`` has the part ``a`` where unit j of ``origin`` has the part ``b``."""
    for (i, inside), (j, others) in product(parts.get(to, {}).items(), parts.get(origin, {}).items()):
        for a, b in zip(inside, others):
            yield i, j, a, b


def innermost_pairs(parts, to, origin):
    """Yield the pairs of groups without parts at the same position in units of the two groups, or the groups
    themselves."""
    if to not in parts:
        yield to, origin
    for _, _, a, b in part_pairs(parts, to, origin):
        yield from innermost_pairs(parts, a, b)


def match_units(parts, similarity, to, origin):
    """Match the units of one group with those of another or the same group, and the parts within each unit.

    Parameters
    ----------
    parts : dict
        See :func:`parts_of`.
    similarity : function of two names
        Returns similarities [units of the first group in the target, units of the second in the source], with parts in
        their current order.
    to, origin : str

    Returns
    -------
    Match
    """
    were, inside = similarity(to, origin), defaultdict(dict)
    best = were.to("cpu", torch.float64, copy=True)
    for i, j, a, b in part_pairs(parts, to, origin):
        part = match_units(parts, similarity, a, b)
        inside[i, j] |= part.steps
        best[i, j] += part.gain()
    order = assign(best)
    steps = {name: step for pair in enumerate(order.tolist()) for name, step in inside[pair].items()} if inside else {}
    if not torch.equal(order, torch.arange(len(order))):
        steps[origin] = order
    return Match(order, steps, were, best)


def compose_(groups, parts, permutations, steps):
    """Apply steps after permutations, in place.

    Units move with their parts, so the current content of a group may come from another group of the source.
    """
    def held_by(name):
        if groups[name].within is None:
            return name
        outer, unit = groups[name].within
        before = held_by(outer)
        there = parts[before][int(permutations[before][unit])]
        return there[parts[outer][unit].index(name)]

    for name, order in steps.items():
        origin = held_by(name)
        permutations[origin] = permutations[origin][order]


def check_reached(groups, permutations, source, moved):
    """Raise ValueError unless the permutations of the source give what a search has moved.

    They do not if the units of a group have their parts in different orders.
    """
    if any(group.within for group in groups.values()):
        again = {name: tensor.clone() for name, tensor in source.items()}
        permute_(groups, permutations, again)
        for name in moved:
            if not torch.equal(again[name], moved[name]):
                raise ValueError(f"the parts of units are not at the same positions of each unit in {name!r}: expected "
                                 "the same positions, so that units can be permuted")
