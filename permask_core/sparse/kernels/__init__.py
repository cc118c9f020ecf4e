"""The arithmetic of fan-in layers on whole batches: each output sums ``k`` products of values and the inputs at its
indices.

``forward`` and ``backward`` choose a kernel by device, type and shape: on a CPU compiled loops for float32 and
float64 (half precision is widened to float32), on a GPU Triton for float32 and half precision, and otherwise
:mod:`~permask_core.sparse.kernels.eager`, which needs only torch. They are not differentiable;
:class:`~permask_core.sparse.FanInLinear` is, also under ``torch.compile``. Both accept any slice of rows of a layer, so
that millions of outputs can be computed a few thousand at a time.
"""

import importlib
import os
import shutil
import warnings
from functools import cache

import torch

from permask_core.sparse.kernels import cpu, eager
from permask_core.sparse.kernels.transposing import Transpose, forget, remember, transpose, version

LOADED = {"cuda": ["permask_core.sparse.kernels.triton"]}  # by name and type of device: see runs.store.sources

__all__ = ["Transpose", "backward", "forget", "forward", "remember", "transpose", "version"]


@cache
def _triton():
    """Return the Triton module, or warn once and return None if it cannot run."""
    try:
        if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
            raise ImportError("Triton needs a C compiler, gcc or clang")
        module = importlib.import_module(*LOADED["cuda"])
        if torch.cuda.is_available():
            module.triton.runtime.driver.active.get_current_device()  # compiles, and fails here if it cannot
        return module
    except Exception as error:  # compilers raise various exceptions
        warnings.warn(f"fan-in layers on a GPU take the slower path in plain torch: {error}", stacklevel=2)
        return None


def _kernels(x, values, indices, bias=None):
    if x.is_cuda and torch.float64 not in (x.dtype, values.dtype):
        return _triton() or eager
    fast = (x.is_cpu and (x.dtype in (torch.float32, torch.float64) or is_half(x)) and x.dtype == values.dtype
            and indices.dtype == torch.int32 and (bias is None or bias.dtype == x.dtype) and cpu.is_usable())
    return cpu if fast else eager


def is_half(x):
    """Whether the numbers are widened to float32, in which the loops for a CPU compute."""
    return x.is_cpu and x.dtype in (torch.bfloat16, torch.float16)


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
        [batch, n], with the type of ``x``; bfloat16 and float16 are summed in float32.
    """
    if is_half(x):
        return forward(x.float(), values.float(), indices, bias if bias is None else bias.float()).to(x.dtype)
    return _kernels(x, values, indices, bias).forward(x, values, indices, bias)


def backward(grad, x, values, indices, transposed, *, need_x=True, need_values=True):
    """Return the gradients with respect to ``x`` and ``values``, given that with respect to the output of
    :func:`forward`.

    Parameters
    ----------
    grad : torch.Tensor
        [batch, n].
    x, values, indices : torch.Tensor
        The arguments of :func:`forward`.
    transposed : Transpose
        The transpose of ``indices``.
    need_x, need_values : bool

    Returns
    -------
    (torch.Tensor or None, torch.Tensor or None)
        [batch, in] and [n, k]. Every sum has a fixed order, so the result is the same bit for bit for any number of
        threads.
    """
    if is_half(x):
        dx, dvalues = backward(grad.float(), x.float(), values.float(), indices, transposed, need_x=need_x,
                               need_values=need_values)
        return dx.to(x.dtype) if need_x else None, dvalues.to(values.dtype) if need_values else None
    return _kernels(x, values, indices).backward(grad, x, values, indices, transposed, need_x, need_values)
