"""Check in any training loop that pruned weights remain zero."""

from contextlib import contextmanager

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from permask_core.masks.applying import check_fit


@contextmanager
def watch(model, masks, repair=False):
    """Check that pruned weights remain zero while a model is trained.

    Momentum, weight decay or a loaded ``state_dict`` can change them. They are checked after each step of an optimizer
    that has a masked weight, before each forward pass of the model, and at the end of the block.

    Parameters
    ----------
    model : torch.nn.Module
    masks : Masks
        Masks of parameters of the model.
    repair : bool
        If True, set the weights to zero again with :func:`apply_masks` instead of raising an error.

    Raises
    ------
    ValueError
        If a mask does not fit a parameter.
    RuntimeError
        If weights that a mask drops are not zero; the message has the tensor, their number and the number of steps.

    Examples
    --------
    >>> from permask_core.masks import sparsity
    >>> model = torch.nn.Linear(2, 1)
    >>> masks = {"weight": torch.tensor([[True, False]])}
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with watch(model, masks, repair=True):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> sparsity(model, masks)
    0.5
    """
    check_fit(masks, dict(model.named_parameters(remove_duplicate=False)))
    dropped = {name: ~mask for name, mask in masks.items()}
    steps, seen = 0, None

    def masked_weights():  # not cached: the model may have been moved, or its parameters replaced
        return {name: model.get_parameter(name) for name in dropped}

    def versions_of(weights):
        return [(id(weight), weight._version) for weight in weights.values()]

    @torch.no_grad()
    def look():
        weights = masked_weights()
        for name, weight in weights.items():
            dropped[name] = dropped[name].to(weight.device)
        counts = [((weight != 0) & dropped[name]).count_nonzero() for name, weight in weights.items()]
        # Synchronise with the device once, not for each weight.
        counts = torch.stack([count.to(counts[0].device) for count in counts]).tolist()
        revived = {name: count for name, count in zip(weights, counts) if count}
        if repair:
            for name in revived:
                weights[name].masked_fill_(dropped[name], 0)
        elif revived:
            name = next(iter(revived))
            others = f", and weights of {len(revived) - 1} other tensors" * (len(revived) > 1)
            raise RuntimeError(f"after step {steps}, {revived[name]} of {int(dropped[name].sum())} pruned weights of "
                               f"{name!r} are not zero{others}: apply the masks after each step, or pass repair=True")

    def after_step(optimizer, *_):
        nonlocal steps, seen
        weights = masked_weights()
        watched = {id(weight) for weight in weights.values()}
        if any(id(weight) in watched for group in optimizer.param_groups for weight in group["params"]):
            steps += 1
            look()
            seen = versions_of(weights)

    def before_forward(*_):
        nonlocal seen
        if seen != versions_of(masked_weights()):  # the first pass after a step need not check again
            look()
        seen = None  # the next pass must: changes to weight.data do not change the version

    look()
    hooks = [register_optimizer_step_post_hook(after_step), model.register_forward_pre_hook(before_forward)]
    try:
        yield
        look()
    finally:
        for hook in hooks:
            hook.remove()
