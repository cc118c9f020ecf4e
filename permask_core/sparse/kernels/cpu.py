"""Fan-in arithmetic on a CPU: which loop of :mod:`permask_core.sparse.kernels.simd` for which shape.

A few examples are gathered, each on its own. More are laid out with the examples last, in tiles.
"""

import os
import sys
import threading
import warnings
from functools import cache

import numpy as np
import torch

from permask_core.models.extras import check_extra

# Examples in a tile. The forward pass does best with what a second-level cache holds of some thousand inputs; the
# backward pass sums over a tile's examples for every connection, which weighs less the more they are.
WIDTHS = {"forward": (8, 16, 32), "backward": (8, 16, 32, 64)}
ALONE = 30_000  # products that one thread has done before others would have started
_LOCK = threading.Lock()  # not every threading layer of numba lets two threads in


@cache
def _simd():
    try:
        check_extra("the fast one", "numba", "cpu")
        from permask_core.sparse.kernels import simd  # compiles: only where it is needed
    except ImportError as error:
        warnings.warn(f"fan-in layers take the slower path in plain torch: {error}", stacklevel=2)
        return None
    return simd


@cache
def _started():
    """Start numba's threads; the process that did."""
    threads = torch.get_num_threads()
    sys.modules["numba"].get_num_threads()  # starts them, which sets OpenMP's number for torch too
    torch.set_num_threads(threads)
    return os.getpid()


def is_usable():
    """Whether the compiled loops can run: numba is there, and this is no fork of the process that started their
    threads, which would have none."""
    return _simd() is not None and _started() == os.getpid()


def _arrays(*tensors):
    # Unsigned, because numba would ask of a signed index whether it counts from the end.
    arrays = [tensor.detach().numpy() for tensor in tensors]
    return [array.view(np.uint32) if array.dtype == np.int32 else array for array in arrays]


def _call(products, loop, *arguments):
    """Run a loop over so many products on as many threads as torch has."""
    _started()
    numba = sys.modules["numba"]
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS) if products > ALONE else 1
    with _LOCK:
        if numba.get_num_threads() != threads:
            numba.set_num_threads(threads)
        loop(*arguments)


def _tiles(x, width):
    return x.new_empty(-(-x.shape[0] // width), x.shape[1], width)


def _width(batch, way):
    return next((width for width in WIDTHS[way] if batch <= width), WIDTHS[way][-1])


def forward(x, values, indices, bias=None):
    """As :func:`permask_core.sparse.kernels.forward`, for float32 and float64 on the CPU, in compiled loops."""
    (batch, inputs), (n, k) = x.shape, values.shape
    x, values, indices, y = x.contiguous(), values.contiguous(), indices.contiguous(), x.new_empty(batch, n)
    bias = bias if bias is None else bias.contiguous()
    # In cycles of a processor, roughly: a product of a gather takes one, a tile of eight two and a half; to lay it out
    # half a cycle for each number, and to start the threads twice more some thousand.
    if batch * n * k < 2.5 * n * k + 4 * (inputs + n) + 20_000:
        _call(batch * n * k, _simd().gather(x.itemsize), x.data_ptr(), values.data_ptr(), indices.data_ptr(),
              0 if bias is None else bias.data_ptr(), y.data_ptr(), batch, inputs, n, k)
        return y
    width, bias = _width(batch, "forward"), x.new_zeros(n) if bias is None else bias
    tiles, out = _tiles(x, width), _tiles(y, width)
    _call(batch * n * k, _simd().kernels(width)[0], *_arrays(x, values, indices, bias, tiles, out, y))
    return y


def backward(grad, x, values, indices, transposed, need_x, need_values):
    """As :func:`permask_core.sparse.kernels.backward`, for float32 and float64 on the CPU, in compiled loops."""
    width = _width(len(x), "backward")
    dx, dvalues = x.new_empty(x.shape if need_x else (0, 0)), values.new_empty(values.shape if need_values else (0, 0))
    tiles, given, sums = _tiles(grad, width), _tiles(x, width), _tiles(x, width)
    if not len(values):
        sums.zero_()
    listed, products = values.new_empty(values.numel()), values.new_zeros(values.numel())  # 0 where there is no tile
    grad, x, values = grad.contiguous(), x.contiguous(), values.contiguous()
    _call(len(x) * values.numel(), _simd().kernels(width)[1], *_arrays(
        grad, x, values, *transposed, tiles, given, listed, sums, products, dx, dvalues))
    return dx if need_x else None, dvalues if need_values else None
