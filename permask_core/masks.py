"""Masks: which weights of a network are kept.

A mask set is a plain dict from the keys of a ``state_dict`` to bool tensors of the same shape, True where the weight
is kept. Sparsity is always the fraction of zeros among the *masked* weights: biases, norms and everything else that
has no mask is not in the denominator.
"""

import torch

from permask_core.runs.files import load_tensors, save_tensors

Masks = dict[str, torch.Tensor]


def sparsity(masks):
    """Fraction of zeros over all masked weights.

    Parameters
    ----------
    masks : Masks

    Returns
    -------
    float
        In [0, 1]; the denominator is the number of entries of all masks.

    Raises
    ------
    ValueError
        If there are no masks, or one is not a bool tensor.
    """
    check_bool(masks)
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total


def layer_sparsity(masks):
    """Fraction of zeros of each mask, a dict with the keys of ``masks``."""
    check_bool(masks)
    return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items()}


def check_bool(masks):
    """Raise ValueError unless ``masks`` is a non-empty dict of non-empty bool tensors."""
    if not masks:
        raise ValueError("the masks are empty: expected at least one bool tensor")
    for name, mask in masks.items():
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.numel() == 0:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"mask {name!r} is {got}: expected a bool tensor with at least one entry")


def check_fit(masks, state):
    """Raise ValueError, naming the first offending key and both shapes, unless every mask fits its tensor.

    Parameters
    ----------
    masks : Masks
    state : dict of str to torch.Tensor
    """
    check_bool(masks)
    for name, mask in masks.items():
        if name not in state:
            raise ValueError(f"mask {name!r} of shape {list(mask.shape)} has no tensor of that name: "
                             f"expected one of {', '.join(state)}")
        if mask.shape != state[name].shape:
            raise ValueError(f"mask {name!r} has shape {list(mask.shape)}, its tensor {list(state[name].shape)}")


@torch.no_grad()
def apply_masks(module_or_state, masks):
    """Set the weights that are not kept to zero.

    Parameters
    ----------
    module_or_state : torch.nn.Module or dict of str to torch.Tensor
        A module is changed in place; a state_dict is left alone.
    masks : Masks

    Returns
    -------
    torch.nn.Module or dict of str to torch.Tensor
        The module itself, or a new dict whose unmasked tensors are shared with the old one.

    Raises
    ------
    ValueError
        If a mask does not fit.
    """
    if isinstance(module_or_state, torch.nn.Module):
        tensors = module_or_state.state_dict()  # references to the parameters themselves
        check_fit(masks, tensors)
        for name, mask in masks.items():
            # Not a product: a NaN or an infinity times zero would stay.
            tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)
        return module_or_state
    check_fit(masks, module_or_state)
    return {name: tensor.masked_fill(~masks[name].to(tensor.device), 0) if name in masks else tensor
            for name, tensor in module_or_state.items()}


def save_masks(path, masks, **provenance):
    """Write masks to a safetensors file, under a temporary name first.

    Parameters
    ----------
    path : path-like
    masks : Masks
    **provenance
        What they came from (seed, dataset, command, ...): anything that JSON holds, kept in the file's header.
    """
    check_bool(masks)
    save_tensors(path, masks, {"kind": "masks", **provenance})


def load_masks(path):
    """Read masks that :func:`save_masks` wrote, on the CPU.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, foreign, or holds something else than masks.
    """
    masks, record = load_tensors(path)
    if record.get("kind") != "masks":
        raise ValueError(f"{path} holds {record.get('stage') or 'something else'}: expected masks")
    check_bool(masks)
    return masks
