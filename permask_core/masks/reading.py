"""Which weights of a network may be pruned, and which are there: masks read from zeros or from torch's own pruning."""

import re

import torch
from torch import nn

from permask_core.masks.shortcuts import CONVOLUTIONS, find_projections, join

SHORTCUT = "a projection on a shortcut"


def prunable_weights(model, *, shortcuts=False, exclude=()):
    """The weights that may be pruned: of linear layers, convolutions and attention, stem and classifier included.

    Parameters
    ----------
    model : torch.nn.Module
    shortcuts : bool
        Whether projections on shortcuts are among them, as the literature on dynamic sparse training has it. A
        convolution is one if it is alone on its branch of a sum, and the other branch leads from the same input through
        at least two convolutions. ``torch.fx`` finds the sums, without an example input; a module may name its
        projections instead, in an attribute ``shortcut_weights``.
    exclude : iterable of str
        Names of weights that remain dense, or of modules whose weights do. A module may name its own in an attribute
        ``dense_weights``.

    Returns
    -------
    dict of str to torch.Tensor
        Keyed like the ``state_dict`` of the unpruned network, detached, sharing memory with the model. A weight that
        two layers share is listed once. The axes are the layer's own: a linear layer or a convolution has its outputs
        first, a transposed convolution and transformers' ``Conv1D`` have their inputs first. :func:`unprunable` says
        what is left out, and why.

    Raises
    ------
    ValueError
        If ``exclude`` names no prunable weight, or shortcuts are to be found in a module that has convolutions and
        cannot be traced.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> list(prunable_weights(model)), list(prunable_weights(model, exclude=["0"]))
    (['0.weight', '3.weight'], ['3.weight'])
    """
    return {name: weight.detach() for name, (weight, why) in _weights(model, shortcuts, exclude).items() if not why}


def unprunable(model, *, shortcuts=False, exclude=()):
    """Why the other weights remain dense, a dict of str to str.

    These are the parameters of two or more axes that :func:`prunable_weights` leaves out with the same arguments:
    embeddings, recurrent layers, experts packed into one parameter, anything that a module defines itself.

    Examples
    --------
    >>> unprunable(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))
    {'0.weight': 'a parameter of Embedding'}
    """
    return {name: why for name, (_, why) in _weights(model, shortcuts, exclude).items() if why}


def _weights(model, shortcuts, exclude):
    """{name: (weight, why it remains dense or None)} of all weights of two or more axes, the prunable ones first."""
    if isinstance(exclude, str):
        raise ValueError(f"exclude is {exclude!r}: expected a list of names")
    parameters, (_, stored) = dict(model.named_parameters(remove_duplicate=False)), tensors_and_masks(model)
    found, listed = {}, set()
    for prefix, module in model.named_modules():
        for own in _own_weights(module):
            name, weight = join(prefix, own), getattr(module, own)
            is_tensor = name in parameters or name in stored  # or it is computed, as by weight norm
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
    """The names of the weights in a module itself that may be pruned."""
    if isinstance(module, nn.MultiheadAttention):  # the output's projection is a linear layer in it
        return [name for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
                if getattr(module, name) is not None]
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    return ["weight"] * (isinstance(module, (nn.Linear, *CONVOLUTIONS)) or "transformers.pytorch_utils.Conv1D" in names)


def _declared(model, attribute):
    return [join(prefix, name) for prefix, module in model.named_modules()
            for name in getattr(module, attribute, ())]


def masks_of(model_or_state, weights=None):
    """Read the masks of a network that is pruned already.

    Masks that are stored beside the weights are taken as they are: those of ``torch.nn.utils.prune`` (``weight_orig``
    and ``weight_mask``), and buffers called ``mask`` of a parametrization, as ``torch.ao.pruning`` has them. In other
    tensors a weight is kept unless it is exactly zero. A kept weight that is zero by chance counts as pruned there,
    which is rare in float32 and less so in half precision, where small numbers underflow.

    Parameters
    ----------
    model_or_state : torch.nn.Module or dict of str to torch.Tensor
    weights : iterable of str, optional
        The tensors to read, by their names in the unpruned network. By default those that have a stored mask, and of a
        model its :func:`prunable_weights` and any projection on a shortcut that has zeros; of a ``state_dict`` all
        floating-point tensors of two or more axes, embeddings included.

    Returns
    -------
    Masks
        Keyed like the ``state_dict`` of the unpruned network. The mask of a tensor without zeros is True everywhere:
        the tensor could have been pruned, and counts in the sparsity.

    Raises
    ------
    ValueError
        If a name is unknown, or a tensor is read by default that is zero everywhere: it may be pruned or not trained
        yet, and ``weights`` decides.

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
                raise ValueError(f"{name!r} is zero everywhere: it may be pruned, or not trained yet. Name the tensors "
                                 "to read in weights, with it or without")
    weights = list(weights)
    unknown = [name for name in weights if name not in tensors]
    if unknown:
        raise ValueError(f"weights has {unknown[0]!r}: expected some of {', '.join(tensors)}")
    return {name: stored[name] if name in stored else tensors[name] != 0 for name in weights}


def weights_of(model_or_state, tensors, stored):
    """The names of the tensors in which masks are looked for by default."""
    if isinstance(model_or_state, nn.Module):
        names = [name for name, (_, why) in _weights(model_or_state, shortcuts=False, exclude=()).items()
                 if not why or why == SHORTCUT and not tensors[name].all()]
    else:
        names = [name for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.is_floating_point()]
    return list(dict.fromkeys([*names, *stored]))


@torch.no_grad()
def tensors_and_masks(model_or_state):
    """The tensors by their names in the unpruned network, as they are used, and the masks stored beside them."""
    if isinstance(model_or_state, nn.Module):  # torch.ao.pruning keeps its masks out of the state_dict
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
    """What a key is called in the unpruned network, and whether it holds the mask of that tensor."""
    if match := re.fullmatch(r"(.*\.)?parametrizations\.([^.]+)\.(original|\d+\.mask)", key):
        return (match[1] or "") + match[2], match[3] != "original"
    for ending in ("_orig", "_mask"):
        name = key.removesuffix(ending)
        if name != key and f"{name}_orig" in keys and f"{name}_mask" in keys:
            return name, ending == "_mask"
    return key, False
