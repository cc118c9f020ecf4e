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
    """When the units at ``entry`` move, the similarity of the group ``other`` changes through its entry ``at``, by a
    product over the moved units."""

    entry: Entry
    other: str
    at: Entry


class Similarities:
    """``similarities([name])[0, 0]`` is [units of a group in the target, units of the group in the moved source], and
    ``similarities(names)[i, j]`` that between two of several groups of one kind.

    Parameters
    ----------
    groups : dict of str to Group
    target, moved : dict of str to torch.Tensor
        The search permutes ``moved``, initially the source, in place and then calls :meth:`update`.
    compute : function of a list of groups, ``target`` and ``moved``
        The similarity of all their units: the sum over their entries of ``target`` times ``moved``.
    """

    def __init__(self, groups, target, moved, compute):
        self.groups, self.target, self.moved, self.compute = groups, target, moved, compute
        self.shares, self.others, self.kept = *_shares(groups, moved), {}
        nested = {name for group in groups.values() if group.within for name in group.within[:1]}
        self.flat = {name for name, group in groups.items() if group.within is None} - nested

    def __call__(self, names):
        name, groups = names[0], [self.groups[name] for name in names]
        if name in self.kept:
            return self.kept[name][None, None]
        similarity = self.compute(groups, self.target, self.moved)
        if name in self.flat:
            self.kept[name] = similarity
        u, n = len(names), groups[0].size
        return similarity.view(u, n, u, n).transpose(1, 2)

    def update(self, steps):
        """Update for the given steps, {group: permutation}; return the names of the groups whose similarity has
        changed."""
        for name, order in steps.items():
            units = (order != torch.arange(len(order))).nonzero()[:, 0]
            if name in self.kept:
                kept = self.kept[name]
                columns = kept.index_select(1, order[units].to(kept.device))
                kept.index_copy_(1, units.to(kept.device), columns)
            origins = order.argsort()[units]  # the new positions of what was at these units
            for entry, other, at in self.shares[name]:
                if other in self.kept:
                    now, before = (_slice(self.moved, entry, chosen) for chosen in (units, origins))
                    target = _slice(self.target, entry, units)
                    self.kept[other].addmm_(units_at(target, at), units_at(now - before, at).T)
            for other in self.others[name]:
                self.kept.pop(other, None)
        return {share.other for name in steps for share in self.shares[name]}.union(*map(self.others.get, steps))


def units_at(tensor, entry):
    """Return the weights at an entry as a matrix [units, all other axes]."""
    part = (tensor if entry.rows is None else tensor[slice(*entry.rows)]).movedim(entry.axis, 0)
    return (part if entry.positions is None else part[entry.positions.to(part.device)]).unsqueeze(-1).flatten(1)


def all_units_at(tensor, entries):
    """Return the weights at the entries of several groups of one kind, [groups * units, all other axes]."""
    if len(entries) == 1:
        return units_at(tensor, entries[0])
    if any(entry.rows or entry.positions is None for entry in entries):
        return torch.cat([units_at(tensor, entry) for entry in entries])
    return units_at(tensor, entries[0]._replace(positions=torch.cat([entry.positions for entry in entries])))


def _slice(tensors, entry, units):
    """Return the indices of some units along the axis of an entry."""
    tensor = tensors[entry.tensor]
    positions = indices(entry, tensor.shape[entry.axis])[units].flatten()
    return tensor.index_select(entry.axis, positions.to(tensor.device))


def _shares(groups, tensors):
    """Return the shares of each group, and the other groups whose similarity changes when it moves, but not by a
    product over the moved units: an entry is restricted to rows or to a unit of another group, or the group that moves
    owns a third axis of the tensor."""
    places = {tensor: [] for tensor in tensors}
    for name, group in groups.items():
        for entry in group.entries:
            if entry.tensor in places:
                places[entry.tensor].append((name, entry, depth(groups, name)))
    shares, others = {name: [] for name in groups}, {name: set() for name in groups}
    for sharing in places.values():
        axes = {name: set() for name, _, _ in sharing}
        for name, entry, _ in sharing:
            axes[name].add(entry.axis)
        for (name, entry, level), (other, at, at_level) in product(sharing, repeat=2):
            if entry.axis != at.axis or level != at_level:
                whole = level == at_level == 0 and entry.rows is None and at.rows is None
                if whole and axes[name] - {at.axis} == {entry.axis}:
                    shares[name].append(Share(entry, other, at))
                else:
                    others[name].add(other)
    return shares, others
