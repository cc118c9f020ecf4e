"""Units with parts: groups within a unit of another group, as the dimensions of an attention head are in the head.

How similar two such units are depends on the assignment of the parts of one to those of the other, so that each pair of
units is a matching of its own. A unit that moves takes its parts along. Groups without parts need none of this: for
them :func:`match_units` is one linear assignment.
"""

from collections import defaultdict
from itertools import product
from typing import NamedTuple

import torch

from permask_core.matching.permutations import assign, permute_


class Match(NamedTuple):
    """The ``order`` of a group's units, and the ``steps`` that lead there: permutations of groups in the source, parts
    before what they are parts of, without those that move nothing. Then two matrices of similarity, of units as they
    ``were`` and with their parts at their ``best``."""

    order: torch.Tensor
    steps: dict[str, torch.Tensor]
    were: torch.Tensor
    best: torch.Tensor

    def gain(self):
        """How much similarity the steps gain."""
        return float(self.best[torch.arange(len(self.order)), self.order].sum()) - float(self.were.trace())


def parts_of(groups):
    """The groups within each unit of other groups, {outer: {unit: [names]}}.

    Raises ValueError unless all units of a group are made alike: a unit that moves takes its parts to the next one's.
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
    """(i, j, a, b): unit i of ``to`` has the part ``a`` where unit j of ``origin`` has the part ``b``."""
    for (i, inside), (j, others) in product(parts.get(to, {}).items(), parts.get(origin, {}).items()):
        for a, b in zip(inside, others):
            yield i, j, a, b


def innermost_pairs(parts, to, origin):
    """The pairs of groups without parts that have one place in units of two groups, or in the groups themselves."""
    if to not in parts:
        yield to, origin
    for _, _, a, b in part_pairs(parts, to, origin):
        yield from innermost_pairs(parts, a, b)


def match_units(parts, similarity, to, origin):
    """Move the units of one group to those of another, or of itself, and the parts of each unit within it.

    Parameters
    ----------
    parts : dict
        See :func:`parts_of`.
    similarity : function of two names
        [units of the first group in the target, units of the second in the source]: how similar they are as they are,
        parts included.
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
    """Take steps after permutations, in place.

    Units take their parts along, so that what a group holds by now may have been in another group of the source.
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
    """Raise ValueError unless the permutations lead from the source to where a search has moved it.

    They do not if the units of a group hold their parts in different orders.
    """
    if any(group.within for group in groups.values()):
        again = {name: tensor.clone() for name, tensor in source.items()}
        permute_(groups, permutations, again)
        for name in moved:
            if not torch.equal(again[name], moved[name]):
                raise ValueError("the groups within units of others do not lie at the same places of each in "
                                 f"{name!r}: such units cannot change places")
