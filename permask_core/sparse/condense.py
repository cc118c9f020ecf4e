"""A trained network with masks of constant fan-in, rebuilt from layers that store nothing else."""

import copy
from collections import Counter

import torch
from torch import nn

from permask_core.masks import apply_masks, check_fit
from permask_core.sparse.fan_in import FanInLinear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
READERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # of the weights of their linear layers


class FanInPointwise(nn.Module):
    """A 1x1 convolution as a :class:`FanInLinear` over channels: [batch, in, height, width] to [batch, out, height /
    stride, width / stride]."""

    def __init__(self, linear, stride=(1, 1)):
        super().__init__()
        self.linear, self.stride = linear, tuple(stride)

    def extra_repr(self):
        return f"stride={self.stride}"

    def forward(self, x):
        if x.ndim not in (3, 4):
            raise ValueError(f"the input has shape {list(x.shape)}: expected [batch, channels, height, width]")
        return self.linear(x[..., ::self.stride[0], ::self.stride[1]].movedim(-3, -1)).movedim(-1, -3).contiguous()


@torch.no_grad()
def condense(model, masks):
    """Replace masked layers by fan-in layers wherever that computes the same.

    Parameters
    ----------
    model : torch.nn.Module
        Is left alone.
    masks : Masks
        Keyed like the ``state_dict``; [out, in] for linear layers, [out, in, 1, 1] for 1x1 convolutions.

    Returns
    -------
    model : torch.nn.Module
        A copy that computes what the model computes under the masks. Layers that were not replaced are masked.
    left : dict of str to str
        The masks whose layers were not replaced, and why.

    Raises
    ------
    ValueError
        If a mask does not fit, or no layer could be replaced; the message has the reasons.
    """
    check_fit(masks, model.state_dict())
    model = apply_masks(copy.deepcopy(model), masks)
    uses = Counter(id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False))
    left = {}
    for name, mask in masks.items():
        owner, _, kind = name.rpartition(".")
        module, (parent, _, child) = model.get_submodule(owner), owner.rpartition(".")
        try:
            if owner and isinstance(model.get_submodule(parent), READERS):
                raise ValueError(f"a {type(model.get_submodule(parent)).__name__} reads it without calling the layer")
            layer = _replaced(module, kind, mask.to(module.weight.device) if kind == "weight" else mask, uses)
        except ValueError as error:
            left[name] = str(error)
            continue
        if not owner:
            model = layer
            continue
        setattr(model.get_submodule(parent), child, layer)
    if len(left) == len(masks):
        raise ValueError("no layer can be replaced: " + "; ".join(f"{name}: {why}" for name, why in left.items()))
    return model, left


def _replaced(module, kind, mask, uses):
    if kind != "weight" or type(module) not in (nn.Linear, nn.Conv2d):
        raise ValueError(f"it is the {kind} of a {type(module).__name__}: expected that of a Linear or a 1x1 Conv2d")
    if uses[id(module.weight)] > 1:
        raise ValueError("its weight is shared with another layer")
    if mask.all():
        raise ValueError("its mask keeps every weight")
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise ValueError("it has hooks, which would be lost")
    if type(module) is nn.Linear:
        return _fan_in(module, mask)
    if module.kernel_size != (1, 1) or module.groups > 1 or any(module.padding):
        raise ValueError(f"a convolution with kernel {module.kernel_size}, groups {module.groups} and padding "
                         f"{module.padding}: expected (1, 1), 1 and none")
    mask = mask[:, :, 0, 0]
    linear = nn.utils.skip_init(nn.Linear, *mask.shape[::-1], bias=False, device=module.weight.device)
    linear.weight = nn.Parameter(module.weight[:, :, 0, 0], module.weight.requires_grad)
    linear.bias = module.bias
    return FanInPointwise(_fan_in(linear.train(module.training), mask), module.stride).train(module.training)


def _fan_in(linear, mask):
    layer = FanInLinear.from_dense(linear, mask)
    layer.bias = linear.bias  # the parameter itself, which may be another layer's too
    return layer
