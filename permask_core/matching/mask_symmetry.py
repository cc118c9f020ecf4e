"""The symmetry that a mask leaves: the permutations of units that do not change the mask.

A dense layer looks the same in any order of its units; its mask tells most of them apart. Two units are *twins* if
swapping them changes no mask, for example because they have the same connections, or none. All permutations of twins
form a subgroup of the automorphisms of the mask, which is seen as a graph: units are vertices, kept weights are edges.
There may be more automorphisms, which move units of several layers at once. The coarsest equitable partition bounds
them: no automorphism moves a unit to another cell.

McKay and Piperno, "Practical graph isomorphism, II", Journal of Symbolic Computation, 2014, section 2; Weisfeiler and
Leman, "The reduction of a graph to canonical form and the algebra which appears therein", 1968.
"""

from math import lgamma, log

import numpy as np
import torch

from permask_core.masks import check_bool, check_fit
from permask_core.matching.groups import check_groups, depth, indices
from permask_core.matching.permutations import move_
from permask_core.matching.similarity import units_at
from permask_core.matching.tracer.symmetry import colour_of, mix


def twin_classes(groups, masks):
    """Return which units can be swapped without changing the masks.

    Parameters
    ----------
    groups : dict of str to permask_core.matching.Group
    masks : Masks
        Tensors of the groups without a mask do not distinguish units.

    Returns
    -------
    dict of str to torch.Tensor
        For each group the number of the class of each unit, int64 [size]. Classes are numbered by their first unit. Any
        permutation of units within classes changes no mask.

    Raises
    ------
    ValueError
        If the groups do not fit the masks.

    Examples
    --------
    >>> from permask_core.matching import Entry, Group
    >>> groups = {"hidden": Group(4, (Entry("in", 0), Entry("out", 1)))}
    >>> inputs = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]]).bool()
    >>> twin_classes(groups, {"in": inputs, "out": torch.tensor([[1, 1, 1, 0]]).bool()})
    {'hidden': tensor([0, 1, 0, 2])}
    """
    check_bool(masks)
    check_groups(groups, masks)
    return {name: _twins(group, masks) for name, group in groups.items()}


def _twins(group, masks):
    entries = [entry for entry in group.entries if entry.tensor in masks]
    axes = {tensor: {entry.axis for entry in entries if entry.tensor == tensor} for tensor, *_ in entries}
    both = {tensor: masks[tensor] for tensor, own in axes.items() if len(own) > 1}  # such as a recurrent weight
    rows = [units_at(masks[entry.tensor].cpu(), entry) for entry in entries if entry.tensor not in both]
    rows = torch.cat([torch.zeros(group.size, 1, dtype=torch.bool), *rows], 1)
    found = np.unique(np.packbits(rows.numpy(), axis=1), axis=0, return_inverse=True)[1]
    return _numbered(found) if not both else _split(group, both, _numbered(found))


def _split(group, masks, classes):
    """Divide classes by swaps of units in masks of which the group owns two axes."""
    first, result = [], []
    for unit, candidates in enumerate(classes.tolist()):
        alike = (i for i, (other, own) in enumerate(first) if own == candidates and _swap(group, masks, unit, other))
        result.append(next(alike, len(first)))
        if result[-1] == len(first):
            first.append((unit, candidates))
    return torch.tensor(result)


def _swap(group, masks, one, other):
    """Whether a swap of two units changes no mask."""
    order, moved = torch.arange(group.size), {name: mask.clone() for name, mask in masks.items()}
    order[[one, other]] = order[[other, one]]
    move_(group, order, moved)
    return all(torch.equal(moved[name], mask) for name, mask in masks.items())


def _numbered(labels):
    """Return labels as numbers from 0, in the order in which they first occur."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return torch.from_numpy(first.argsort().argsort()[inverse.ravel()])


def equitable_partition(groups, masks):
    """Return the cells of the coarsest equitable partition of the units: which units refinement cannot distinguish.

    Units start with the colour of their group. A unit then gets a new colour from its old one and from the colours of
    the units with which its kept weights connect it, until no more units can be distinguished. Inputs, outputs,
    positions in a kernel and all other indices in no group are distinguished from the beginning. Colours are hashes of
    64 bits; an equal hash by chance would only join two cells.

    Parameters
    ----------
    groups : dict of str to permask_core.matching.Group
    masks : Masks

    Returns
    -------
    dict of str to torch.Tensor
        For each group the number of the cell of each unit, int64 [size], numbered by their first unit. A permutation
        that changes no mask moves every unit within its cell, or, for parts of attention heads, to the same cell of
        another head. Twins are in one cell.

    Raises
    ------
    ValueError
        If the groups do not fit the masks.

    Examples
    --------
    The first layer pairs two hidden units with two others. No two are twins, but both pairs can be swapped at once:

    >>> from permask_core.matching import Entry, Group
    >>> groups = {"one": Group(2, (Entry("a", 0), Entry("b", 1))), "two": Group(2, (Entry("b", 0), Entry("c", 1)))}
    >>> masks = {"a": torch.ones(2, 1).bool(), "b": torch.eye(2).bool(), "c": torch.ones(1, 2).bool()}
    >>> twin_classes(groups, masks)["one"], equitable_partition(groups, masks)["one"]
    (tensor([0, 1]), tensor([0, 0]))
    """
    check_bool(masks)
    check_groups(groups, masks)
    kinds, seen = {}, {}
    for name, group in groups.items():  # parts of one head and the same parts of another begin with one colour
        rank = seen[group.within] = seen.get(group.within, -1) + 1
        kinds[name] = colour_of(name) if group.within is None else colour_of(group.within[0], rank)
    colours = {name: np.full(group.size, kinds[name], np.uint64) for name, group in groups.items()}
    edges = [_edges(groups, tensor, mask.cpu()) for tensor, mask in masks.items()]
    cells = 0
    with np.errstate(over="ignore"):
        while True:
            now = sum(len(np.unique(colour)) for colour in colours.values())
            if now == cells:
                return {name: _numbered(colour) for name, colour in colours.items()}
            cells, colours = now, _refined(groups, edges, colours)


def _edges(groups, tensor, mask):
    """Return (fixed, owners) of a mask's kept weights: uint64 [weights], the part of their colour that never changes,
    and for each group and axis that owns some of them (group, these weights, their units, the colours of the ends)."""
    at = mask.nonzero().numpy().T
    fixed, owners = np.full(at.shape[1], colour_of(tensor)), []
    with np.errstate(over="ignore"):
        for axis, position in enumerate(at):
            free = np.ones(len(position), bool)  # a part has its position in its own group, not in the one around it
            for name in sorted(groups, key=lambda name: -depth(groups, name)):
                for entry in (one for one in groups[name].entries if (one.tensor, one.axis) == (tensor, axis)):
                    places = indices(entry, groups[name].size).numpy()
                    unit, block = np.full(mask.shape[axis], -1), np.zeros(mask.shape[axis], np.uint64)
                    unit[places], block[places] = np.arange(len(places))[:, None], np.arange(places.shape[1])
                    mine = unit[position] >= 0
                    if entry.rows:
                        mine &= (entry.rows[0] <= at[0]) & (at[0] < entry.rows[1])
                    chosen = np.flatnonzero(mine)
                    place = np.where(free[chosen], block[position[chosen]] + np.uint64(1), np.uint64(0))
                    end = mix(place + colour_of(axis))
                    free[chosen] = False
                    owners.append((name, chosen, unit[position[chosen]], end))
            fixed += np.where(free, mix(mix(position.astype(np.uint64)) + colour_of(axis, "fixed")), np.uint64(0))
    return fixed, owners


def _refined(groups, edges, colours):
    """Return new colours of units, from their old ones and from those of the units around them."""
    around = {name: np.zeros_like(colour) for name, colour in colours.items()}
    for fixed, owners in edges:
        edge = fixed.copy()
        for name, chosen, unit, end in owners:
            edge[chosen] += mix(colours[name][unit] + end)
        for name, chosen, unit, end in owners:
            np.add.at(around[name], unit, mix(mix(edge[chosen]) + end))
    for name, group in groups.items():
        if group.within is not None:
            outer, unit = group.within
            around[name] += mix(colours[outer][unit] + colour_of("within"))
            around[outer][unit] += mix(mix(colours[name]) + colour_of("part")).sum(dtype=np.uint64)
    return {name: mix(colour + mix(around[name])) for name, colour in colours.items()}


def log10_permutations(classes):
    """Return the logarithm, to base 10, of the number of permutations within classes.

    Parameters
    ----------
    classes : dict of str to torch.Tensor
        From :func:`twin_classes`, for the size of the subgroup that swaps twins; from :func:`equitable_partition`, for
        an upper bound on the number of automorphisms of the masks, if no group is part of another.

    Returns
    -------
    float
        The sum of log10(n!) over all classes of n units; 0 if every unit is alone.

    Examples
    --------
    >>> f"{10 ** log10_permutations({'hidden': torch.tensor([0, 1, 0, 0, 1])}):.0f}"  # 3! 2!
    '12'
    """
    return sum(lgamma(n + 1) / log(10) for labels in classes.values() for n in labels.bincount().tolist())


def drop_unread_units(groups, masks, state):
    """Remove all weights that cannot affect the output of a sparse network, because no kept weight reads their unit.

    A unit is unread if the groups list weights that read it (with the unit on an axis above 0), all of these have
    masks, and the masks keep none of them. The weights that lead to it (axis 0) are removed, which may leave further
    units unread. Weights from a unit without inputs do affect the output, because the unit still passes on its bias.

    Parameters
    ----------
    groups : dict of str to permask_core.matching.Group
        Without groups whose units are normalised with each other, as by LayerNorm: these affect each other unread.
    masks : Masks
        Of linear layers and convolutions, whose axis 0 are the outputs.
    state : dict of str to torch.Tensor
        The ``state_dict`` of the network.

    Returns
    -------
    (Masks, dict of str to torch.Tensor)
        The masks of the remaining weights, and the state with zeros for all others, also in the biases and norms of
        unread units. The network computes the same function.

    Raises
    ------
    ValueError
        If the masks do not fit the state, or the groups do not fit the state.
    """
    check_bool(masks)
    check_fit(masks, state)
    check_groups(groups, state, whole=True)
    masks, left = {name: mask.clone() for name, mask in masks.items()}, None
    state = {name: tensor.clone() if isinstance(tensor, torch.Tensor) else tensor for name, tensor in state.items()}
    while left != (left := sum(int(mask.sum()) for mask in masks.values())):
        for group in groups.values():
            unread = _unread(group, masks)
            for entry in group.entries if unread.any() else ():
                if entry.axis == 0:
                    positions = indices(entry, group.size)[unread].flatten()
                    for tensors in (masks, state):
                        if entry.tensor in tensors:
                            tensors[entry.tensor][positions] = 0
    return masks, {name: tensor * masks[name] if name in masks else tensor for name, tensor in state.items()}


def _unread(group, masks):
    readers = [entry for entry in group.entries if entry.axis > 0]
    if not readers or any(entry.tensor not in masks for entry in readers):
        return torch.zeros(group.size, dtype=torch.bool)
    return ~torch.cat([units_at(masks[entry.tensor], entry) for entry in readers], 1).any(1)
