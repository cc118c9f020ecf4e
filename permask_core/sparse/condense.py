"""Rebuild a trained network with masks of constant fan-in from layers that store only its connections."""

import copy
import dis
import inspect
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # the class of out_proj in torch's attention

from permask_core.data.batches import call
from permask_core.masks import apply_masks, check_fit
from permask_core.models import evaluation_mode
from permask_core.sparse.attention import FanInAttention
from permask_core.sparse.convolution import FanInConv2d
from permask_core.sparse.fan_in import FanInLinear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Condensed(NamedTuple):
    """A condensed ``model``, the ``masks`` of the layers that are still dense, by their names in that model, and
    ``left``: by the original name of the mask, the reason why each of these layers could not be replaced."""

    model: nn.Module
    masks: dict[str, torch.Tensor]
    left: dict[str, str]


@torch.no_grad()
def condense(model, masks, example_input=None):
    """Replace masked layers by fan-in layers wherever the function does not change.

    A layer is not replaced if the model reads an attribute that a fan-in layer does not have, usually its weight, as in
    ``F.linear(x, self.qkv.weight)``. Such reads are detected in the ``forward`` of the parent module and, with an
    example, while the model runs.

    A depthwise convolution, with as many groups as input channels, is not replaced either. Its time is that of reading
    and writing images rather than of products, and the forward pass of a fan-in layer takes longer. Other grouped
    convolutions are replaced.

    Parameters
    ----------
    model : torch.nn.Module
        Not changed.
    masks : Masks
        With the keys of the ``state_dict``. Constant fan-in means the same number of True in each ``mask[i]`` that has
        any: in each row of a linear layer, and for each output channel of a 2-d convolution. In the ``in_proj_weight``
        of torch.nn.MultiheadAttention, query, key and value may differ in this number.
    example_input : torch.Tensor, tuple or dict, optional
        A batch (a tuple of arguments, or a dict of keyword arguments) with which the model is run once in evaluation
        mode.

    Returns
    -------
    Condensed
        Its model is a copy that computes the same function as the model under the masks. Layers that were not replaced
        are masked; further training needs the returned masks. (torch.nn.TransformerEncoder sets outputs at padded
        positions to 0 in evaluation mode, and the copy does not.)

    Raises
    ------
    ValueError
        If a mask does not fit, or no layer could be replaced; the message has the reasons.

    References
    ----------
    Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> condensed = condense(model, {"0.weight": torch.eye(6).bool()[:4], "2.weight": torch.ones(2, 4).bool()})
    >>> condensed.model[0]
    FanInLinear(in_features=6, out_features=4, fan_in=1, bias=True)
    >>> list(condensed.masks), condensed.left
    (['2.weight'], {'2.weight': 'its mask keeps every weight'})
    """
    check_fit(masks, model.state_dict())
    model = _without_fused_paths(apply_masks(copy.deepcopy(model), masks))
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    layers, reasons = {}, {}
    for name, mask in masks.items():
        owner, _, kind = name.rpartition(".")
        try:
            if kind == "in_proj_weight" and f"{owner}.in_proj_bias".lstrip(".") in masks:
                raise ValueError("in_proj_bias has a mask, and is three biases in a fan-in layer")
            layers[owner] = _fan_in_layer(model.get_submodule(owner), kind, mask, uses)
        except ValueError as error:
            reasons[name] = str(error)
    for owner, attributes in _find_reads(model, layers, example_input).items():
        lacking = sorted(attribute for attribute in attributes if not hasattr(layers[owner], attribute))
        if lacking:
            name = next(name for name in masks if name.rpartition(".")[0] == owner and name not in reasons)
            reasons[name] = (f"the model does not only call it but reads its {', '.join(lacking)}, which a fan-in "
                             "layer does not have")
            del layers[owner]
    for owner, layer in layers.items():
        name = f"{owner}.out_proj.weight".lstrip(".")
        if isinstance(layer, FanInAttention) and name in masks:
            try:
                layer.out_proj = _fan_in_layer(layer.out_proj, "weight", masks[name], uses)
                del reasons[name]
            except ValueError as error:
                reasons[name] = str(error)
    left = {name: reasons[name] for name in masks if name in reasons}
    if not layers:
        raise ValueError("no layer can be replaced: " + "; ".join(f"{name}: {why}" for name, why in left.items()))
    for owner, layer in layers.items():
        if owner:
            model.set_submodule(owner, layer)
        else:
            model = layer
    return Condensed(model, {name: masks[name] for name in left}, left)


WEIGHTS = {nn.Linear: "weight", nn.Conv2d: "weight", NonDynamicallyQuantizableLinear: "weight",
           nn.MultiheadAttention: "in_proj_weight"}


def _fan_in_layer(module, kind, mask, uses):
    """Return the fan-in layer equivalent to a module; raise ValueError, with the reason, if there is none."""
    if WEIGHTS.get(type(module)) != kind:
        raise ValueError(f"it is the {kind} of a {type(module).__name__}: expected the weight of a Linear or a Conv2d, "
                         "or the in_proj_weight of a MultiheadAttention")
    attention = isinstance(module, nn.MultiheadAttention)
    if uses[id(getattr(module, kind))] > 1 or attention and uses[id(module.in_proj_bias)] > 1:
        raise ValueError("its weight is shared with another layer")
    if mask.all():
        raise ValueError("its mask keeps every weight")
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        raise ValueError("it is a depthwise convolution, for which a fan-in layer is slower")
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise ValueError("it has hooks, which would be lost")
    mask = mask.to(getattr(module, kind).device)
    if attention:
        return FanInAttention.from_dense(module, mask)
    layer = (FanInConv2d if isinstance(module, nn.Conv2d) else FanInLinear).from_dense(module, mask)
    layer.bias = module.bias  # the same parameter, which may also be that of another layer
    return layer


def _without_fused_paths(model):
    """Let torch's encoders call their layers one by one in evaluation mode too, and not read their weights."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
    return model


def _find_reads(model, layers, example_input):
    """Return the attributes of each of these layers, by name, that the model reads, except for calls of the layer."""
    reads = {}
    for owner in layers:
        parent, _, child = owner.rpartition(".")
        reads[owner] = _find_reads_in_code(model.get_submodule(parent), child)
    if example_input is not None:
        probes = {owner: _Probe(model.get_submodule(owner)) for owner in layers if owner}
        for owner, probe in probes.items():
            model.set_submodule(owner, probe)
        with evaluation_mode(model):
            call(model, example_input)
        for owner, probe in probes.items():
            model.set_submodule(owner, probe.layer)
            reads[owner] |= probe.reads
    return reads


def _find_reads_in_code(parent, child):
    """Return the attributes of ``child`` that the ``forward`` of a module reads, like ``weight`` in
    ``self.child.weight``."""
    forward = inspect.unwrap(type(parent).forward)
    if forward is nn.TransformerEncoderLayer.forward:  # which reads weights only in its fused path
        return set()
    code = getattr(forward, "__code__", None)  # compiled extensions have none
    loads = [step.argval if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
             for step in (dis.get_instructions(code) if code else ())]
    return {attribute for name, attribute in zip(loads, loads[1:]) if name == child and attribute}


class _Probe(nn.Module):
    """Replaces a layer, and records which of its attributes are read."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.reads = layer, set()

    def __getattr__(self, name):
        layer = super().__getattr__("layer")
        if name == "layer":
            return layer
        value = getattr(layer, name)
        self.reads.add(name)
        return value

    def forward(self, *inputs, **named):
        return self.layer(*inputs, **named)
