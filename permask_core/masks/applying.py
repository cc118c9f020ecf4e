"""Masks as a dict of bool tensors: compute their sparsity, check their shapes, and apply them to weights."""

import torch
from torch import nn
from torch.nn.utils import prune

from permask_core.masks.reading import tensors_and_masks, weights_of

Masks = dict[str, torch.Tensor]


def sparsity(network, masks=None):
    """Fraction of zeros over all masked weights.

    Parameters
    ----------
    network : Masks, torch.nn.Module or dict of str to torch.Tensor
        For masks, their zeros are counted. For a model or a ``state_dict``, the zeros of the weights are counted: those
        that have a mask or, without ``masks``, those that :func:`masks_of` reads.
    masks : Masks, optional
        The masks to which the network should be pruned.

    Returns
    -------
    float
        In [0, 1]; the denominator is the number of entries of all masks.

    Raises
    ------
    ValueError
        If there are no masks, a mask is not a bool tensor or does not fit, or a weight that a mask drops is not zero.

    Examples
    --------
    >>> sparsity({"fc.weight": torch.tensor([[True, False], [False, False]])})
    0.75
    >>> sparsity({"fc.weight": torch.tensor([[0.5, 0.0], [0.0, 0.0]]), "fc.bias": torch.zeros(2)})
    0.75
    """
    kept = _kept(network, masks)
    total = sum(mask.numel() for mask in kept.values())
    return 1 - sum(int(mask.sum()) for mask in kept.values()) / total


def layer_sparsity(network, masks=None):
    """Return the fraction of zeros of each mask or masked weight as a dict, with the arguments of :func:`sparsity`."""
    return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in _kept(network, masks).items()}


def _kept(network, masks):
    """Return which weights are kept, as masks."""
    is_module = isinstance(network, nn.Module)
    if is_module or any(isinstance(one, torch.Tensor) and one.is_floating_point() for one in network.values()):
        tensors, stored = tensors_and_masks(network)
        if masks is not None:
            check_fit(masks, tensors)
        names = masks if masks is not None else weights_of(network, tensors, stored)
        network = {name: tensors[name] != 0 for name in names}
    elif masks is not None:
        raise ValueError("got two sets of masks: expected a model or a state_dict to compare masks with")
    check_bool(network)
    for name, mask in (masks or {}).items():
        if wrong := int((network[name] & ~mask.to(network[name].device)).sum()):
            raise ValueError(f"{wrong} of the {int((~mask).sum())} weights of {name!r} that its mask drops are not "
                             "zero: expected a network pruned to these masks")
    return network


def check_bool(masks):
    """Raise ValueError unless ``masks`` is a non-empty dict of non-empty bool tensors."""
    if not masks:
        raise ValueError("the masks are empty: expected at least one bool tensor")
    for name, mask in masks.items():
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.numel() == 0:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"mask {name!r} is {got}: expected a bool tensor with at least one entry")


def check_fit(masks, state):
    """Raise ValueError unless every mask has a tensor of its name and shape; the message names the first that has not.

    Parameters
    ----------
    masks : Masks
    state : dict of str to torch.Tensor
    """
    check_bool(masks)
    for name, mask in masks.items():
        if name not in state:
            raise ValueError(f"masks has {name!r} of shape {list(mask.shape)}, which is not in the model: "
                             f"expected one of {', '.join(state)}")
        if mask.shape != state[name].shape:
            raise ValueError(f"mask {name!r} has shape {list(mask.shape)}: expected {list(state[name].shape)}, the "
                             "shape of its tensor")


@torch.no_grad()
def apply_masks(module_or_state, masks):
    """Set the weights that the masks drop to zero.

    Parameters
    ----------
    module_or_state : torch.nn.Module or dict of str to torch.Tensor
        A module is changed in place, a state_dict is not.
    masks : Masks

    Returns
    -------
    torch.nn.Module or dict of str to torch.Tensor
        The module itself, or a new dict that shares the tensors without a mask with the old one.

    Raises
    ------
    ValueError
        If a mask does not fit.
    """
    if isinstance(module_or_state, torch.nn.Module):
        tensors = module_or_state.state_dict()  # references to the parameters
        check_fit(masks, tensors)
        for name, mask in masks.items():
            # Not a product: NaN or infinity times zero is NaN.
            tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)
        return module_or_state
    check_fit(masks, module_or_state)
    return {name: tensor.masked_fill(~masks[name].to(tensor.device), 0) if name in masks else tensor
            for name, tensor in module_or_state.items()}


def attach_masks(model, masks):
    """Prune a model in place as ``torch.nn.utils.prune`` does.

    Each weight becomes a parameter ``weight_orig`` and a buffer ``weight_mask``, whose product is computed before each
    forward pass. To set weights to zero instead, use :func:`apply_masks`.

    Raises
    ------
    ValueError
        If a mask does not fit a parameter.
    """
    check_fit(masks, dict(model.named_parameters(remove_duplicate=False)))
    for name, mask in masks.items():
        prefix, _, own = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(prefix), own, mask.to(model.get_parameter(name).device))
