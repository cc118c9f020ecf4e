"""A cache of similarities that is updated with each step of a search.

When a group moves, the columns of its own similarity are permuted, and the similarities of groups that own another axis
of one of its tensors change. Late in a search few units of a group move, so the update of a similarity is a much
smaller product than a full computation: it more than halves the time of weight matching of two ResNet50
(benchmarks/matching.py). Nested groups and those that contain them are few and small, and are not cached.
"""

from itertools import product
from typing import NamedTuple

import torch

from permask_core.matching.groups import Entry, depth, indices


class Share(NamedTuple):
    """When the units at ``entry`` move, the similarity of the group ``other`` changes through its entry ``at``.

    The update is ``simple``, a product over the moved units, if neither entry is restricted to rows or to a unit of
    another group, and the group that moves owns no third axis of the tensor.
    """

    entry: Entry
    other: str
    at: Entry
    simple: bool


class Similarities:
    """``similarities(to, origin)`` is [units of the group ``to`` in the target, units of ``origin`` in the source].

    Parameters
    ----------
    groups : dict of str to Group
    target, moved : dict of str to torch.Tensor
        The search permutes ``moved``, initially the source, in place and then calls :meth:`update`.
    compute : function of two groups, ``target`` and ``moved``
        The similarity of their units: the sum over their entries of ``target`` times ``moved``.
    """

    def __init__(self, groups, target, moved, compute):
        self.groups, self.target, self.moved, self.compute = groups, target, moved, compute
        self.shares, self.kept = _shares(groups, moved), {}
        nested = {name for group in groups.values() if group.within for name in group.within[:1]}
        self.flat = {name for name, group in groups.items() if group.within is None} - nested

    def __call__(self, to, origin):
        if to == origin and to in self.kept:
            return self.kept[to]
        similarity = self.compute(self.groups[to], self.groups[origin], self.target, self.moved)
        if to in self.flat:
            self.kept[to] = similarity
        return similarity

    def update(self, steps):
        """Update for the given steps, {group: permutation}; return the names of the groups whose similarity has
        changed."""
        for name, order in steps.items():
            if name in self.kept:
                self.kept[name] = self.kept[name].index_select(1, order.to(self.kept[name].device))
            units = (order != torch.arange(len(order))).nonzero()[:, 0]
            origins = order.argsort()[units]  # the new positions of what was at these units
            for entry, other, at, simple in self.shares[name]:
                if simple and other in self.kept:
                    now, before = (_slice(self.moved, entry, chosen) for chosen in (units, origins))
                    target = _slice(self.target, entry, units)
                    self.kept[other] += units_at(target, at) @ units_at(now - before, at).T
                else:
                    self.kept.pop(other, None)
        return {share.other for name in steps for share in self.shares[name]}


def units_at(tensor, entry):
    """Return the weights at an entry as a matrix [units, all other axes]."""
    part = (tensor if entry.rows is None else tensor[slice(*entry.rows)]).movedim(entry.axis, 0)
    return (part if entry.positions is None else part[entry.positions.to(part.device)]).unsqueeze(-1).flatten(1)


def _slice(tensors, entry, units):
    """Return the indices of some units along the axis of an entry."""
    tensor = tensors[entry.tensor]
    positions = indices(entry, tensor.shape[entry.axis])[units].flatten()
    return tensor.index_select(entry.axis, positions.to(tensor.device))


def _shares(groups, tensors):
    """Return each :class:`Share` of each group: along another axis of its tensors, or with groups inside or around
    it."""
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
                shares[name].append(Share(entry, other, at, simple))
    return shares
