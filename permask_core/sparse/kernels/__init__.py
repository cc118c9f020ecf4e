"""The arithmetic of fan-in layers, on whole batches: each output sums ``k`` products, of values and the inputs that its
indices name.

``forward`` and ``backward`` pick a kernel by device, type and shape: on a CPU those of :mod:`.cpu` for float32 and
float64, elsewhere :mod:`.eager`, which needs nothing but torch. Neither is differentiable by itself;
:class:`~permask_core.sparse.FanInLinear` makes them so. Both take any slice of rows of a layer, so that a caller can go
through millions of outputs a few thousand at a time.
"""

import torch

from permask_core.sparse.kernels import cpu, eager
from permask_core.sparse.kernels.transposing import Transposed, transposed

__all__ = ["Transposed", "backward", "forward", "transposed"]


def _kernels(x, values, indices, bias=None):
    fast = (x.is_cpu and x.dtype in (torch.float32, torch.float64) and x.dtype == values.dtype
            and indices.dtype == torch.int32 and (bias is None or bias.dtype == x.dtype) and cpu.usable())
    return cpu if fast else eager


def forward(x, values, indices, bias=None):
    """``y[b, i] = bias[i] + sum_s values[i, s] * x[b, indices[i, s]]``.

    Parameters
    ----------
    x : torch.Tensor
        [batch, in].
    values : torch.Tensor
        [n, k].
    indices : torch.Tensor
        int32 [n, k], sorted and without duplicates in each row.
    bias : torch.Tensor, optional
        [n].

    Returns
    -------
    torch.Tensor
        [batch, n], of the type of ``x``; bfloat16 and float16 are summed in float32.
    """
    return _kernels(x, values, indices, bias).forward(x, values, indices, bias)


def backward(grad, x, values, indices, transposed, *, need_x=True, need_values=True):
    """The gradients of a loss by ``x`` and ``values``, from that by the output of :func:`forward`.

    Parameters
    ----------
    grad : torch.Tensor
        [batch, n].
    x, values, indices : torch.Tensor
        As :func:`forward` had them.
    transposed : Transposed
        Of these indices.
    need_x, need_values : bool

    Returns
    -------
    (torch.Tensor or None, torch.Tensor or None)
        [batch, in] and [n, k]. Every sum has a fixed order: the same bits again, whatever the number of threads.
    """
    return _kernels(x, values, indices).backward(grad, x, values, indices, transposed, need_x, need_values)
