"""Moving units: permutations applied to weights or masks, and the assignment that finds them."""

import torch
from scipy.optimize import linear_sum_assignment

from permask_core.matching.groups import check_groups


def permute(groups, permutations, tensors):
    """Move the units of a network, or of its masks.

    Parameters
    ----------
    groups : dict of str to Group
    permutations : dict of str to torch.Tensor
        For each group to move, an int64 tensor [size]: unit i of the result is unit ``permutation[i]`` of ``tensors``.
    tensors : dict of str to torch.Tensor
        A ``state_dict`` or masks. Each tensor is permuted along every axis that a group owns, so a weight moves with
        its outputs and its inputs; the number of zeros in it stays.

    Returns
    -------
    dict of str to torch.Tensor
        The same keys; tensors in no group are shared with the old dict.

    Raises
    ------
    ValueError
        If the groups do not fit the tensors, or a permutation is unknown or none.
    """
    check_groups(groups, tensors)
    moved = dict(tensors)
    for name, permutation in permutations.items():
        if name not in groups:
            raise ValueError(f"permutation {name!r} belongs to no group: expected one of {', '.join(groups)}")
        size, order = groups[name].size, torch.as_tensor(permutation).cpu()
        if order.is_floating_point() or not torch.equal(order.long().sort().values, torch.arange(size)):
            raise ValueError(f"permutation {name!r} is not a permutation of {size} units: got {permutation}")
        moved = _move(groups[name], order.long(), moved)
    return moved


def _move(group, permutation, tensors):
    moved = dict(tensors)
    for tensor, axis, positions in group.entries:
        if tensor in moved:
            index = torch.arange(moved[tensor].shape[axis])
            index[positions.flatten()] = positions[permutation].flatten()
            moved[tensor] = moved[tensor].index_select(axis, index.to(moved[tensor].device))
    return moved


def random_permutations(groups, *, seed):
    """A uniformly random permutation for each group, as :func:`permute` takes them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randperm(group.size, generator=generator) for name, group in groups.items()}


def assign(similarity):
    """The permutation with the largest total similarity.

    Parameters
    ----------
    similarity : torch.Tensor, shape [target units, source units]

    Returns
    -------
    torch.Tensor
        int64 [units]: the source unit that goes to each target unit.
    """
    rows, columns = linear_sum_assignment(similarity.cpu().double().numpy(), maximize=True)
    assert (rows == range(len(rows))).all()  # scipy returns rows in order
    return torch.from_numpy(columns).long()
