"""Units with parts: groups that are nested in a unit of another group, like the dimensions of an attention head.

The similarity of two such units depends on the assignment of the parts of one to those of the other, so each pair of
units is a separate matching. A unit moves with its parts. For groups without parts :func:`match_units` is one linear
assignment.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from permask_core.matching.permutations import assign_again, permute_


class Match(NamedTuple):
    """The best assignments between u groups ``names`` of n units in the target and the same groups in the source.

    ``orders`` are [u, u, n], ``gains`` in similarity [u, u], with the gains of parts; ``inside`` has the matches of the
    parts."""

    names: list[str]
    orders: np.ndarray
    gains: np.ndarray
    inside: list["Match"]

    def steps(self, to=0, origin=0):
        """Yield (group, permutation) for the assignment between two groups, without identities: permutations in the
        source, parts before the units that contain them."""
        order = self.orders[to, origin]
        n = len(order)
        for part in self.inside:
            for i, j in enumerate(order.tolist()):
                yield from part.steps(to * n + i, origin * n + j)
        if (order != np.arange(n)).any():
            yield self.names[origin], torch.from_numpy(order)


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


def families(parts, names):
    """Yield lists of groups between which units can be exchanged: ``names``, and the parts at the same position in
    their units."""
    yield names
    for part in inside(parts, names):
        yield from families(parts, part)


def inside(parts, names):
    """Return, for each position in the units of some groups, the list of the groups there."""
    units = [parts[name][unit] for name in names if name in parts for unit in sorted(parts[name])]
    return [list(part) for part in zip(*units)]


def match_units(parts, similarities, names, prices=None):
    """Match the units of groups with those of each other, and the parts within each unit.

    Parameters
    ----------
    parts : dict
        See :func:`parts_of`.
    similarities : function of a list of names
        Returns the similarities of the units of u groups, a tensor [u, u, n, n]: pairs of a group in the target and one
        in the source, then pairs of their units. Parts are in their current order.
    names : list of str
    prices : dict, optional
        Prices by name, which :func:`~permask_core.matching.permutations.assign_again` uses and updates.

    Returns
    -------
    Match
    """
    best, found = similarities(names), []
    if len(names) == 1 and names[0] not in parts:
        order, price = assign_again(best[0, 0], (prices or {}).get(names[0]))
        if prices is not None:
            prices[names[0]] = price
        return Match(names, order.numpy()[None, None], None, [])
    best = best.cpu().double().numpy()
    u, _, n, _ = best.shape
    gains = -best.trace(axis1=2, axis2=3)
    for part in inside(parts, names):
        found.append(match_units(parts, similarities, part))
        best = best + found[-1].gains.reshape(u, n, u, n).transpose(0, 2, 1, 3)
    orders = np.array([[linear_sum_assignment(pair, maximize=True)[1] for pair in row] for row in best])
    gains += np.take_along_axis(best, orders[..., None], 3).sum((2, 3))
    return Match(names, orders, gains, found)


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
