"""Align the hidden units of one expert with those of another, before their weights are averaged.

The units of an expert may be permuted, as those of any two-layer network. In a SwiGLU, down (silu(gate x) * up x), a
unit also has a scale: its row of up times c and its column of down divided by c leave the function as it is, for any c
but 0. Its sign is decided for each pair of units, its size by giving both parts the same norm.
"""

import torch

from permask_core.experts.layout import Expert, expert_tensors, unit_groups
from permask_core.matching import activation_correlations, permute
from permask_core.matching.permutations import assign
from permask_core.runs.checks import check_one_of

MATCHINGS = ("weights", "activations")


def align_expert(tensors, target, *, scalable=False, correlations=None):
    """Move the units of one expert onto those of another.

    Parameters
    ----------
    tensors, target : dict of str to torch.Tensor
        Two experts, as :func:`permask_core.experts.expert_tensors` returns them.
    scalable : bool
        Whether the units have a scale. Then both experts should come from :func:`balance_units`.
    correlations : torch.Tensor, optional
        [target units, units]: correlations of the units' activations, from :func:`unit_correlations`. By default units
        are matched by their weights: the sum of inner products of their rows and columns, as in weight matching.

    Returns
    -------
    dict of str to torch.Tensor
        The same function: units in another order, some of them with another sign.

    Examples
    --------
    >>> one = {"up.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "down.weight": torch.eye(2)}
    >>> other = {"up.weight": one["up.weight"].flip(0), "down.weight": one["down.weight"].flip(1)}
    >>> torch.equal(align_expert(one, other)["up.weight"], other["up.weight"])
    True
    """
    groups = unit_groups(tensors)
    signed, plain = _similarities(groups, tensors, target) if correlations is None else (correlations, 0)
    order = assign(plain + signed.abs() if scalable else plain + signed)
    moved = permute(groups, {"units": order}, tensors)
    if scalable:
        signs = signed[torch.arange(len(order)), order].sign()
        signs = torch.where(signs == 0, torch.ones_like(signs), signs).to(moved["up.weight"])
        moved["up.weight"] = moved["up.weight"] * signs[:, None]
        moved["down.weight"] = moved["down.weight"] * signs
    return moved


def _similarities(groups, source, target):
    """Return the inner products [target units, source units] of what changes its sign, and of what does not."""
    sums = {True: 0, False: 0}
    for entry in groups["units"].entries:
        a, b = (tensors[entry.tensor].movedim(entry.axis, 0).double() for tensors in (target, source))
        part = entry.tensor.partition(".")[0]
        sums[part != "gate"] = sums[part != "gate"] + (a[:, None] * b if a.ndim == 1 else a @ b.T)
    return sums[True], sums[False]


def balance_units(tensors):
    """Return the same SwiGLU with the norm of each unit's row of up equal to that of its column of down.

    Units with a part that is zero do not change.
    """
    up, down = tensors["up.weight"].norm(dim=1), tensors["down.weight"].norm(dim=0)
    scale = torch.where((up > 0) & (down > 0), (down / up).sqrt(), torch.ones_like(up))
    return tensors | {"up.weight": tensors["up.weight"] * scale[:, None], "down.weight": tensors["down.weight"] / scale}


def unit_correlations(block, source, target, x):
    """Return the correlations of the units of two experts of a block over the same tokens x [n, hidden].

    Returns
    -------
    torch.Tensor
        float64 [units of target, units of source].
    """
    experts = [Expert(block, j) for j in (source, target)]
    groups = unit_groups(experts[0].state_dict())
    return activation_correlations(groups, *experts, x)["units"]


def moved_onto(block, source, target, matching, x=None):
    """Return the tensors of expert ``target`` of a block, and those of expert ``source`` aligned with it.

    Parameters
    ----------
    block : Block
    source, target : int
    matching : str or None
        "weights", "activations" (over tokens ``x``), or None: nothing is moved.
    x : torch.Tensor, optional
        [n, hidden].

    Returns
    -------
    (dict of str to torch.Tensor, dict of str to torch.Tensor)
    """
    goal, tensors = (expert_tensors(block, j) for j in (target, source))
    if matching is None:
        return goal, tensors
    check_one_of("matching", matching, MATCHINGS)
    if block.scalable:
        goal, tensors = balance_units(goal), balance_units(tensors)
    correlations = unit_correlations(block, source, target, x) if matching == "activations" else None
    return goal, align_expert(tensors, goal, scalable=block.scalable, correlations=correlations)
