"""Forward and backward pass as custom operators for torch.compile: ``permask::fan_in`` and its derivative.

A call takes about ten microseconds longer than an autograd function, so a layer uses the operators only in compiled
code. They are excluded from CUDA graphs that torch.compile captures (``mode="reduce-overhead"``), because their cached
data about the indices would be in memory of the graph.
"""

import torch
from torch import Tensor

from permask_core.sparse import kernels

TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.library.custom_op("permask::fan_in", mutates_args=(), tags=TAGS)
def fan_in(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`permask_core.sparse.kernels.forward` as an operator."""
    return kernels.forward(x, values, indices, bias)


@fan_in.register_fake
def _(x, values, indices, bias):
    return x.new_empty(x.shape[0], values.shape[0])


@torch.library.custom_op("permask::fan_in_backward", mutates_args=(), tags=TAGS)
def fan_in_backward(grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, need_x: bool,
                    need_values: bool) -> tuple[Tensor, Tensor]:
    """:func:`permask_core.sparse.kernels.backward` as an operator, which transposes the indices itself; a gradient that
    is not needed is empty."""
    listed = kernels.remember(indices, (0, None), lambda: kernels.transpose(indices, x.shape[1]))
    dx, dvalues = kernels.backward(grad.contiguous(), x, values, indices, listed, need_x=need_x,
                                   need_values=need_values)
    return x.new_empty(0) if dx is None else dx.contiguous(), values.new_empty(0) if dvalues is None else dvalues


@fan_in_backward.register_fake
def _(grad, x, values, indices, need_x, need_values):
    return x.new_empty(x.shape if need_x else 0), values.new_empty(values.shape if need_values else 0)


def _save(ctx, inputs, output):
    x, values, indices, bias = inputs
    ctx.save_for_backward(x, values, indices)
    ctx.bias_type = None if bias is None else bias.dtype


def _derivative(ctx, grad):
    need_x, need_values, _, need_bias = ctx.needs_input_grad
    dx, dvalues = torch.ops.permask.fan_in_backward(grad, *ctx.saved_tensors, need_x, need_values)
    dbias = grad.sum(0, dtype=ctx.bias_type) if need_bias else None
    return dx if need_x else None, dvalues if need_values else None, None, dbias


fan_in.register_autograd(_derivative, setup_context=_save)
