"""Which weights of a network may be pruned, and which are kept: masks read from zeros or from torch's own pruning."""

import re

import torch
from torch import nn

from permask_core.masks.shortcuts import CONVOLUTIONS, find_projections, join

SHORTCUT = "a projection on a shortcut"


def prunable_weights(model, *, shortcuts=False, exclude=()):
    """Return the weights that may be pruned: those of linear layers, convolutions and attention, stem and head
    included.

    Parameters
    ----------
    model : torch.nn.Module
    shortcuts : bool
        Whether to include projections on shortcuts, as the literature on dynamic sparse training does. A convolution is
        such a projection if it is the only one on its branch of a sum, and the other branch leads from the same input
        through at least two convolutions. ``torch.fx`` finds the sums without an example input. A module may instead
        list its projections in an attribute ``shortcut_weights``.
    exclude : iterable of str
        Names of weights that remain dense, or of modules whose weights remain dense. A module may list its own in an
        attribute ``dense_weights``.

    Returns
    -------
    dict of str to torch.Tensor
        Detached tensors that share memory with the model, with the keys of the ``state_dict`` of the unpruned network.
        A weight that two layers share is listed once. The order of the axes is that of the layer: outputs first in
        linear layers and convolutions, inputs first in transposed convolutions and in the ``Conv1D`` of transformers.
        :func:`unprunable` returns which weights are excluded, and why.

    Raises
    ------
    ValueError
        If ``exclude`` has a name without prunable weights, or shortcuts must be found in a module with convolutions
        that cannot be traced.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> list(prunable_weights(model)), list(prunable_weights(model, exclude=["0"]))
    (['0.weight', '3.weight'], ['3.weight'])
    """
    return {name: weight.detach() for name, (weight, why) in _weights(model, shortcuts, exclude).items() if not why}


def unprunable(model, *, shortcuts=False, exclude=()):
    """Return which weights remain dense, and why, as a dict of str to str.

    These are the parameters of two or more axes that :func:`prunable_weights` excludes with the same arguments:
    embeddings, recurrent layers, experts packed into one parameter, and parameters that a module defines itself.

    Examples
    --------
    >>> unprunable(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))
    {'0.weight': 'a parameter of Embedding'}
    """
    return {name: why for name, (_, why) in _weights(model, shortcuts, exclude).items() if why}


def _weights(model, shortcuts, exclude):
    """Return {name: (weight, None or why it remains dense)} of all weights of two or more axes, prunable ones first."""
    if isinstance(exclude, str):
        raise ValueError(f"exclude is {exclude!r}: expected a list of names")
    parameters, (_, stored) = dict(model.named_parameters(remove_duplicate=False)), tensors_and_masks(model)
    found, listed = {}, set()
    for prefix, module in model.named_modules():
        for own in _own_weights(module):
            name, weight = join(prefix, own), getattr(module, own)
            is_tensor = name in parameters or name in stored  # if not, it is computed, for example by weight norm
            if is_tensor and id(weight) not in listed:
                found[name] = (weight, None)
                listed.add(id(weight))
    for name in exclude:
        if not any(f"{key}.".startswith(f"{name}.") for key in found):
            raise ValueError(f"{name!r} has no prunable weight: expected some of {', '.join(found)}")
    left = {"its module keeps it dense": _declared(model, "dense_weights"), "it is excluded": exclude}
    if not shortcuts:
        left[SHORTCUT] = _declared(model, "shortcut_weights") or find_projections(model)
    for why, names in left.items():
        found |= {key: (weight, why) for key, (weight, _) in found.items()
                  if any(f"{key}.".startswith(f"{name}.") for name in names)}
    for key, parameter in parameters.items():
        name, _ = _unpruned(key, parameters.keys() | {f"{name}_mask" for name in stored})
        if parameter.ndim > 1 and id(parameter) not in listed and name not in found:
            owner = model.get_submodule(key.rpartition(".")[0])
            found[name] = (parameter, f"a parameter of {type(owner).__name__}")
            listed.add(id(parameter))
    return found


def _own_weights(module):
    """Return the names of the prunable weights in a module itself, without its submodules."""
    if isinstance(module, nn.MultiheadAttention):  # its output projection is a separate linear layer
        return [name for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
                if getattr(module, name) is not None]
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    return ["weight"] * (isinstance(module, (nn.Linear, *CONVOLUTIONS)) or "transformers.pytorch_utils.Conv1D" in names)


def _declared(model, attribute):
    return [join(prefix, name) for prefix, module in model.named_modules()
            for name in getattr(module, attribute, ())]


def masks_of(model_or_state, weights=None):
    """Read the masks of a pruned network.

    If the network stores masks, these are returned: those of ``torch.nn.utils.prune`` (``weight_orig`` and
    ``weight_mask``), and the buffer ``mask`` of a parametrization, as in ``torch.ao.pruning``. In all other tensors a
    weight counts as kept unless it is exactly zero. A kept weight that is zero by chance then counts as pruned, which
    is rare in float32 and more frequent in half precision, where small numbers underflow.

    Parameters
    ----------
    model_or_state : torch.nn.Module or dict of str to torch.Tensor
    weights : iterable of str, optional
        Names, in the unpruned network, of the tensors to read. The default is every tensor with a stored mask and, of a
        model, its :func:`prunable_weights` and the projections on shortcuts that have zeros; of a ``state_dict``, all
        floating-point tensors of two or more axes, embeddings included.

    Returns
    -------
    Masks
        With the keys of the ``state_dict`` of the unpruned network. The mask of a tensor without zeros is True
        everywhere: the tensor could have been pruned, so it counts in the sparsity.

    Raises
    ------
    ValueError
        If a name is unknown, or a tensor that is read by default is zero everywhere: it may be pruned, or not trained
        yet. Pass ``weights`` to decide.

    Examples
    --------
    >>> from torch.nn.utils import prune
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    >>> _ = prune.l1_unstructured(model[0], "weight", 0.75)
    >>> {name: mask.sum().item() for name, mask in masks_of(model).items()}
    {'0.weight': 2, '1.weight': 2}
    """
    tensors, stored = tensors_and_masks(model_or_state)
    if weights is None:
        weights = weights_of(model_or_state, tensors, stored)
        for name in weights:
            if name not in stored and not tensors[name].any():
                raise ValueError(f"{name!r} is zero everywhere: it may be pruned, or not trained yet. Pass weights, "
                                 "the names of the tensors to read, with or without it")
    weights = list(weights)
    unknown = [name for name in weights if name not in tensors]
    if unknown:
        raise ValueError(f"weights has {unknown[0]!r}: expected some of {', '.join(tensors)}")
    return {name: stored[name] if name in stored else tensors[name] != 0 for name in weights}


def weights_of(model_or_state, tensors, stored):
    """Return the names of the tensors whose masks are read by default."""
    if isinstance(model_or_state, nn.Module):
        names = [name for name, (_, why) in _weights(model_or_state, shortcuts=False, exclude=()).items()
                 if not why or why == SHORTCUT and not tensors[name].all()]
    else:
        names = [name for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.is_floating_point()]
    return list(dict.fromkeys([*names, *stored]))


@torch.no_grad()
def tensors_and_masks(model_or_state):
    """Return the effective tensors, by their names in the unpruned network, and the stored masks."""
    if isinstance(model_or_state, nn.Module):  # torch.ao.pruning does not put its masks into the state_dict
        model_or_state = {**dict(model_or_state.named_parameters(remove_duplicate=False)),
                          **dict(model_or_state.named_buffers(remove_duplicate=False))}
    raw = {key: tensor.detach() for key, tensor in model_or_state.items() if isinstance(tensor, torch.Tensor)}
    tensors, masks = {}, {}
    for key, tensor in raw.items():
        name, is_mask = _unpruned(key, raw)
        if is_mask:
            masks[name] = masks.get(name, True) & (tensor != 0)
        else:
            tensors[name] = tensor
    masks = {name: mask.reshape(mask.shape + (1,) * (tensors[name].ndim - mask.ndim)).expand_as(tensors[name])
             for name, mask in masks.items() if name in tensors}
    return {**tensors, **{name: tensors[name].masked_fill(~mask, 0) for name, mask in masks.items()}}, masks


def _unpruned(key, keys):
    """Return the name of a key in the unpruned network, and whether the key holds the mask of that tensor."""
    if match := re.fullmatch(r"(.*\.)?parametrizations\.([^.]+)\.(original|\d+\.mask)", key):
        return (match[1] or "") + match[2], match[3] != "original"
    for ending in ("_orig", "_mask"):
        name = key.removesuffix(ending)
        if name != key and f"{name}_orig" in keys and f"{name}_mask" in keys:
            return name, ending == "_mask"
    return key, False
