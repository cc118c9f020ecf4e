"""Combine matching problems: one permutation for weights and activations, or for several checkpoints.

A problem is (``groups``, ``source``, ``target``), the arguments of :func:`~permask_core.matching.match_weights`, which
finds the permutation of the source with the largest inner product with the target. The tensors need not be weights.
With masks, magnitudes or gradients in the place of weights, and with several problems at once, the same search has
other objectives.
"""

from math import sqrt

import torch

from permask_core.matching.groups import Entry, Group, check_groups
from permask_core.matching.permutations import check_flat
from permask_core.matching.weights import check_pair, matched


def similarity_problem(groups, similarities):
    """Return a problem whose objective is a sum of given similarities.

    Parameters
    ----------
    groups : dict of str to Group
        Groups that are not nested.
    similarities : dict of str to torch.Tensor
        For each group [target units, source units], such as those of
        :func:`~permask_core.matching.activation_correlations`.

    Returns
    -------
    (dict of str to Group, dict of str to torch.Tensor, dict of str to torch.Tensor)
        The source is the identity: permuted, it selects one similarity in each row of the target.

    Raises
    ------
    ValueError
        If a group is nested, has no similarity, or one of another shape.

    Examples
    --------
    >>> from permask_core.matching import match_weights
    >>> groups = {"hidden": Group(2, ())}
    >>> match_weights(*similarity_problem(groups, {"hidden": torch.tensor([[0.1, 0.9], [0.8, 0.2]])}))
    {'hidden': tensor([1, 0])}
    """
    check_flat(groups)
    for name, group in groups.items():
        shape = list(similarities[name].shape) if name in similarities else "nothing"
        if shape != [group.size, group.size]:
            raise ValueError(f"the similarity of group {name!r} has shape {shape}: expected {[group.size] * 2}")
    target = {name: similarities[name] for name in groups}
    return ({name: Group(group.size, (Entry(name, 0),)) for name, group in groups.items()},
            {name: torch.eye(len(one)).to(one) for name, one in target.items()}, target)


def join(*problems, shares=None):
    """Combine problems over the same units into one.

    Parameters
    ----------
    *problems : (dict of str to Group, dict of str to torch.Tensor, dict of str to torch.Tensor)
        Groups of the same names and sizes. Their tensors may differ.
    shares : sequence of float, optional
        A positive factor for each problem; by default they are equal.

    Returns
    -------
    (dict of str to Group, dict of str to torch.Tensor, dict of str to torch.Tensor)
        The objective is the sum of the shares times the cosine similarities of the problems, so that no problem counts
        more because its numbers are larger. Tensors have the prefix "0/", "1/", ...

    Raises
    ------
    ValueError
        If the groups differ, a share is not positive, or a problem does not fit.

    Examples
    --------
    Two checkpoints disagree, and the second has three times the share:

    >>> from permask_core.matching import match_weights
    >>> groups, one = {"hidden": Group(2, (Entry("w", 0),))}, {"w": torch.eye(2)}
    >>> first, second = (groups, one, {"w": torch.eye(2)}), (groups, one, {"w": torch.eye(2).flip(0)})
    >>> match_weights(*join(first, second, shares=[1, 3]))
    {'hidden': tensor([1, 0])}
    """
    shares = [1.0] * len(problems) if shares is None else list(shares)
    sizes = [{name: group.size for name, group in groups.items()} for groups, _, _ in problems]
    if not sizes or any(one != sizes[0] for one in sizes):
        raise ValueError(f"the problems have the units {sizes}: expected at least one problem, all over the same units")
    if len(shares) != len(problems) or not all(share > 0 for share in shares):
        raise ValueError(f"shares is {shares} for {len(problems)} problems: expected a positive number for each")
    joined, first, second = {name: [] for name in sizes[0]}, {}, {}
    for i, ((groups, source, target), share) in enumerate(zip(problems, shares)):
        check_flat(groups)
        check_pair(source, target)
        check_groups(groups, source, whole=True)
        ours, goal = matched(groups, source, target)
        scale = share / max(sqrt(_squared(ours) * _squared(goal)), torch.finfo(torch.float64).tiny)
        first |= {f"{i}/{name}": tensor for name, tensor in ours.items()}
        second |= {f"{i}/{name}": scale * tensor for name, tensor in goal.items()}
        for name, group in groups.items():
            joined[name] += [entry._replace(tensor=f"{i}/{entry.tensor}") for entry in group.entries
                             if entry.tensor in ours]
    return {name: Group(sizes[0][name], tuple(entries)) for name, entries in joined.items()}, first, second


def _squared(tensors):
    return sum(float(tensor.double().square().sum()) for tensor in tensors.values())
