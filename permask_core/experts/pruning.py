"""Remove experts together with their rows of the router; nothing is trained again.

Lasby et al., "REAP the Experts", ICLR 2026. A token whose chosen experts all survive gets the same output if the
weights are a softmax over the chosen experts, or are divided by their sum. If they are a softmax over all experts, all
weights grow.
"""

import copy

import torch
from torch import nn

from permask_core.experts.layout import LAYOUTS, moe_blocks
from permask_core.runs.checks import check_integer


def prune_experts(model, scores, keep, *, layouts=LAYOUTS):
    """Return a copy of a model with the ``keep`` highest scored experts of each block.

    Parameters
    ----------
    model : torch.nn.Module
    scores : dict of str to torch.Tensor
        [experts] by the name of the block, as from :func:`permask_core.experts.saliency`. Of equal scores, the first
        wins.
    keep : int
        Number of experts of each block that remain. Shared experts and blocks without experts do not change. With
        grouped routing, the best ``keep`` / groups of each group remain.
    layouts : dict of str to Layout
        See :func:`permask_core.experts.moe_blocks`.

    Returns
    -------
    torch.nn.Module
        Experts keep their order. The counts in its configuration and modules are ``keep``, so ``save_pretrained``
        writes a model that ``from_pretrained`` reads. The removed experts are never copied.

    Raises
    ------
    ValueError
        If ``keep`` is below the number of experts for a token, does not fit the groups of the router, or is more than
        there are; or if scores are missing, have the wrong length or are not finite.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> model = build_model("moe", (11,), 15, layers=1, experts=4)
    >>> pruned = prune_experts(model, {"blocks.0.mixture": torch.tensor([0.3, 0.1, 0.2, 0.4])}, 3)
    >>> torch.equal(pruned.blocks[0].mixture.router.weight, model.blocks[0].mixture.router.weight[[0, 2, 3]])
    True
    """
    blocks = moe_blocks(model, layouts)
    return select_experts(model, {name: best_experts(name, block, scores.get(name), keep)
                                  for name, block in blocks.items()}, layouts=layouts)


def best_experts(name, block, scores, keep):
    """Return the indices of the experts that remain, int64 [keep], in their order: see :func:`prune_experts`."""
    if scores is None or tuple(scores.shape) != (block.count,) or not scores.isfinite().all():
        raise ValueError(f"the scores of {name!r} are {scores}: expected {block.count} finite numbers")
    groups = check_count(name, block, keep)
    best = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True)[:, :keep // groups]
    return (best + torch.arange(groups, device=best.device)[:, None] * (block.count // groups)).flatten().sort().values


def check_count(name, block, keep):
    """Return the number of groups of a router; raise ValueError if it cannot route with ``keep`` experts."""
    check_integer("keep", keep, 1, block.count)
    if keep < block.top_k:
        raise ValueError(f"keep is {keep}: expected at least {block.top_k}, the number of experts for a token in "
                         f"{name!r}")
    groups, chosen = (getattr(block.router, part, None) or 1 for part in ("num_group", "topk_group"))
    if groups == 1:
        return 1
    least = max(2, -(-block.top_k // chosen))  # the score of a group is the sum of its best two
    if keep % groups or keep // groups < least:
        raise ValueError(f"keep is {keep}: expected a multiple of {groups} of at least {groups * least}, because "
                         f"{name!r} has {groups} groups, of which {chosen} are chosen, and {block.top_k} experts for "
                         "a token")
    return groups


def select_experts(model, kept, *, layouts=LAYOUTS):
    """Return a copy of a model with some experts, in a given order, and the same rows of the routers.

    With all experts in another order this is a symmetry: the function does not change, unless the router has groups.

    Parameters
    ----------
    model : torch.nn.Module
    kept : dict of str to torch.Tensor
        Indices by the name of the block, int64; blocks that are not named keep all. All blocks of a model with a
        configuration must keep the same number, because the configuration has one for all.
    layouts : dict of str to Layout

    Raises
    ------
    ValueError
        If a block is unknown, an index occurs twice or does not exist, or the numbers differ.
    """
    blocks, pruned, counts = moe_blocks(model, layouts), {}, {}
    if unknown := [name for name in kept if name not in blocks]:
        raise ValueError(f"unknown block {unknown[0]!r}: expected some of {', '.join(blocks)}")
    for name, block in blocks.items():
        order = torch.as_tensor(kept.get(name, range(block.count))).long().cpu()
        wrong = not len(order) or int(order.min()) < 0 or int(order.max()) >= block.count
        if wrong or len(order.unique()) < len(order):
            raise ValueError(f"{name!r} would keep {order.tolist()}: expected different indices below {block.count}")
        counts[name] = len(order)
        for module in (block.experts, block.router):
            for tensor in (*module.parameters(), *module.buffers()):
                part = tensor.detach()[order.to(tensor.device)]
                pruned[id(tensor)] = (nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter)
                                      else part)
    if hasattr(model, "config") and len({*counts.values()}) > 1:
        raise ValueError(f"blocks would keep {counts} experts: expected one number, the configuration has one for all")
    smaller = copy.deepcopy(model, pruned)  # a tensor that is in the second argument is replaced instead of copied
    for name, block in moe_blocks(smaller, layouts).items():
        for module in (smaller, smaller.get_submodule(name), block.experts, block.router):
            if hasattr(module, "num_experts"):
                module.num_experts = counts[name]
        if hasattr(smaller, "config"):
            setattr(smaller.config, block.layout.count, counts[name])
    return smaller
