"""Fan-in arithmetic on a CPU: choose a loop of :mod:`permask_core.sparse.kernels.simd` by shape.

A few examples are gathered one by one. Larger batches are stored in tiles with the examples last.
"""

import os
import sys
import threading
import warnings
from functools import cache, partial

import numpy as np
import torch

from permask_core.models.extras import check_extra
from permask_core.sparse.kernels.choice import choose
from permask_core.sparse.kernels.transposing import shared_rows

# Examples in a tile. The forward pass is fastest with tiles that fit into a second-level cache for a few thousand
# inputs. The backward pass sums over the examples of a tile for every connection, whose cost decreases with their
# number.
WIDTHS = {"forward": (8, 16, 32), "backward": (8, 16, 32, 64)}
FEW = 2  # examples for which the backward pass needs no tiles
ALONE = 30_000  # one thread computes these products in the time in which others start
_LOCK = threading.Lock()  # some threading layers of numba do not allow two threads to enter


@cache
def _simd():
    try:
        check_extra("the fast one", "numba", "cpu")
        from permask_core.sparse.kernels import simd  # compiles, so it is imported only when needed
    except ImportError as error:
        warnings.warn(f"fan-in layers take the slower path in plain torch: {error}", stacklevel=2)
        return None
    return simd


@cache
def _started():
    """Start numba's threads, and return the id of this process."""
    threads = torch.get_num_threads()
    sys.modules["numba"].get_num_threads()  # starts them, which also sets the number of OpenMP threads of torch
    torch.set_num_threads(threads)
    return os.getpid()


@cache
def _lanes(itemsize):
    """Those of the gather instruction with which a few examples are fastest on this processor, or 0."""
    widths, rule, name = _simd().lanes()
    loops = {lanes: _simd().gather(itemsize, lanes) for lanes in (widths if itemsize == 4 else (0,))}
    x, values, y = (torch.ones(*shape, device="cpu") for shape in ((2048,), (64, 256), (64,)))
    indices = (torch.arange(64 * 256, device="cpu") * 977 % 2048).view(64, 256).sort(1).values.int()
    given = *_addresses(x, values, indices), 0, y.data_ptr(), 1, 2048, 64, 256
    calls = {lanes: partial(_call, 0, loop, *given) for lanes, loop in loops.items()}
    key = f"fan-in layers, a few examples; {name}; numba {sys.modules['numba'].__version__}"
    return choose(key, calls, rule if itemsize == 4 else 0)


def is_usable():
    """Whether the compiled loops can run: numba is installed, and this process is not a fork of the one that started
    numba's threads, because a fork has none."""
    return _simd() is not None and _started() == os.getpid()


def _arrays(*tensors):
    # Unsigned, because numba checks whether a signed index is negative.
    arrays = [tensor.detach().numpy() for tensor in tensors]
    return [array.view(np.uint32) if array.dtype == np.int32 else array for array in arrays]


def _addresses(*tensors):
    return [tensor.data_ptr() for tensor in tensors]


def _call(products, loop, *arguments):
    """Run a loop over ``products`` products with the number of threads of torch."""
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
    """:func:`permask_core.sparse.kernels.forward` for float32 and float64 on the CPU, in compiled loops."""
    (batch, inputs), (n, k) = x.shape, values.shape
    x, values, indices, y = x.contiguous(), values.contiguous(), indices.contiguous(), x.new_empty(batch, n)
    bias, shared = bias if bias is None else bias.contiguous(), shared_rows(indices)
    # Approximate cost in processor cycles: 1 for a product of a gather, 2.5 for a tile of eight, 0.5 for storing a
    # number in a tile, and some thousand for starting the threads twice more.
    if batch * n * k < 2.5 * n * k + 4 * (inputs + n) + 20_000:
        loop = _simd().gather(x.itemsize, _lanes(x.itemsize), shared)
        _call(batch * n * k, loop, x.data_ptr(), values.data_ptr(), indices.data_ptr(),
              0 if bias is None else bias.data_ptr(), y.data_ptr(), batch, inputs, n, k)
        return y
    width, bias = _width(batch, "forward"), x.new_zeros(n) if bias is None else bias
    tiles, out = _tiles(x, width), _tiles(y, width)
    loop, arrays = _simd().kernels(width, x.itemsize, shared)[0], (x, values, indices, bias, tiles, out, y)
    _call(batch * n * k, loop, *_addresses(*arrays), batch, inputs, n, k)
    return y


def backward(grad, x, values, indices, transposed, need_x, need_values):
    """:func:`permask_core.sparse.kernels.backward` for float32 and float64 on the CPU, in compiled loops."""
    (batch, inputs), (n, k) = x.shape, values.shape
    dx, dvalues = x.new_empty(x.shape if need_x else (0, 0)), values.new_empty(values.shape if need_values else (0, 0))
    grad, x, values = grad.contiguous(), x.contiguous(), values.contiguous()
    if 0 < batch <= FEW:
        sums, indices = x.new_empty(_simd().PARTS if need_x else 0, batch, inputs), indices.contiguous()
        arrays = _addresses(grad, x, values, indices, sums, dx, dvalues)
        loop = _simd().scatter(x.itemsize, shared_rows(indices))
        _call(batch * n * k, loop, *arrays, batch, inputs, n, k, need_x, need_values)
        return dx if need_x else None, dvalues if need_values else None
    width = _width(batch, "backward")
    tiles, given, sums = _tiles(grad, width), _tiles(x, width), _tiles(x, width)
    if not n:
        sums.zero_()
    listed, products = values.new_empty(values.numel()), values.new_zeros(values.numel())  # 0 without tiles
    _call(batch * n * k, _simd().kernels(width, x.itemsize)[1], *_arrays(
        grad, x, values, *transposed, tiles, given, listed, sums, products, dx, dvalues))
    return dx if need_x else None, dvalues if need_values else None
