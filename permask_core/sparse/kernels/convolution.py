"""Fan-in convolutions on a CPU in compiled loops, without an unfolded copy of the input.

The input is stored by channel, with all images of a batch one after the other. A position of the kernel is then a
shift, and an output channel is a sum of shifted rows times values. Sums that mix two lines of an image, or two images,
are computed too, and dropped. With a stride, each channel is first split into phases, such as even and odd columns.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch

from permask_core.sparse import kernels
from permask_core.sparse.kernels import cpu

CACHED = 2 ** 16  # numbers of the gradient of the output that are read for all channels at a time


class Window(NamedTuple):
    """The ``kernel_size``, ``stride`` and ``dilation`` of a convolution, each (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]

    def output_size(self, size):
        """Return the height and width of the output for those of the padded input."""
        return tuple((length - dilation * (kernel - 1) - 1) // stride + 1
                     for length, kernel, stride, dilation in zip(size, *self))


class _Layout(NamedTuple):
    """Storage [channels, phases, ``row``] of a batch, where a row begins with [``batch``, *``grid``]."""

    batch: int
    grid: tuple[int, int]  # height and width of a phase
    phases: list[tuple[int, int]]
    tiles: int
    row: int
    offsets: torch.Tensor  # int64 [channels kernel height kernel width]: the inputs of the first output

    def view(self, rows, size):
        """Rows [channels, row] as [channels, batch, *size]."""
        images = rows[:, :self.batch * math.prod(self.grid)].unflatten(1, (self.batch, *self.grid))
        return images[:, :, :size[0], :size[1]]


@lru_cache(128)
def _layout(shape, window, width):
    batch, channels, *size = shape
    grid = tuple(-(-length // step) for length, step in zip(size, window.stride))
    taps = [[divmod(tap * spread, step) for tap in range(count)] for count, step, spread in zip(*window)]
    taps = [(down * grid[1] + right, (y, x)) for down, y in taps[0] for right, x in taps[1]]
    phases = sorted({phase for _, phase in taps})
    tiles = -(-batch * math.prod(grid) // width)
    # Rows at a distance of a power of two would evict each other from a cache. An odd number of lines prevents that.
    row = ((tiles * width + max(shift for shift, _ in taps)) // 16 | 1) * 16 + 32
    offsets = torch.tensor([phases.index(phase) * row + shift for shift, phase in taps], device="cpu")
    offsets = torch.arange(channels, device="cpu")[:, None] * len(phases) * row + offsets
    return _Layout(batch, grid, phases, tiles, row, offsets.flatten())


def _phases(images, rows, layout, stride):
    """Return pairs of views [channels, batch, height, width] of each phase: in images [batch, channels, ...] and in
    rows [channels, phases, row]."""
    parts = [images[:, :, y::stride[0], x::stride[1]].transpose(0, 1) for y, x in layout.phases]
    return [(part, layout.view(rows[:, i], part.shape[2:])) for i, part in enumerate(parts)]


def _stored(x, window):
    from permask_core.sparse.kernels import shifts  # compiles, so it is imported only when needed

    layout = _layout(tuple(x.shape), window, shifts.WIDTH)
    rows = x.new_zeros(x.shape[1], len(layout.phases), layout.row)
    for part, place in _phases(x, rows, layout, window.stride):
        place.copy_(part)
    return shifts, layout, rows


def is_usable(x, values, columns, bias):
    """Whether the loops can run: on a CPU, with numba; half precision is widened to float32."""
    return kernels._kernels(x, values, columns, bias) is cpu


def forward(x, values, columns, bias, window):
    """:func:`permask_core.sparse.kernels.forward` for every position of a kernel.

    Parameters
    ----------
    x : torch.Tensor
        [batch, channels, height, width], already padded.
    values, columns : torch.Tensor
        [n, k]; a column is a place in [channels, kernel height, kernel width].
    bias : torch.Tensor or None
        [n].
    window : Window

    Returns
    -------
    torch.Tensor
        [batch, n, output height, output width].
    """
    if kernels.is_half(x):
        bias = bias if bias is None else bias.float()
        return forward(x.float(), values.float(), columns, bias, window).to(x.dtype)
    shifts, layout, rows = _stored(x, window)
    y, bias = x.new_empty(len(values), layout.tiles * shifts.WIDTH), x.new_zeros(len(values)) if bias is None else bias
    cpu._call(y.shape[1] * values.numel(), shifts.forward, *cpu._arrays(
        rows.flatten(), values.contiguous(), layout.offsets[columns], bias.contiguous(), y))
    return layout.view(y, window.output_size(x.shape[2:])).transpose(0, 1).contiguous()


def backward(grad, x, values, transposed, window, need_x, need_values):
    """Return the gradients with respect to ``x`` and ``values``, or None where they are not needed.

    ``grad`` is that of the output of :func:`forward`, and ``transposed`` the
    :class:`~permask_core.sparse.kernels.Transpose` of its columns.
    """
    if kernels.is_half(x):
        found = backward(grad.float(), x.float(), values.float(), transposed, window, need_x, need_values)
        return tuple(one if one is None else one.to(x.dtype) for one in found)
    shifts, layout, rows = _stored(x, window)
    tiles = grad.new_zeros(len(values), layout.tiles * shifts.WIDTH)
    layout.view(tiles, grad.shape[2:]).copy_(grad.transpose(0, 1))
    tiles = tiles.unflatten(1, (-1, shifts.WIDTH)).transpose(0, 1).contiguous()
    pointers, outputs, slots = transposed
    sums, products = torch.zeros_like(rows), values.new_zeros(values.numel())
    chunk = max(1, CACHED // (len(values) * shifts.WIDTH))
    cpu._call(tiles.shape[0] * shifts.WIDTH * values.numel(), shifts.backward, *cpu._arrays(
        tiles, rows.flatten(), values.flatten()[slots], pointers, outputs, layout.offsets, sums.flatten(), products),
        math.prod(window.kernel_size), chunk)
    dx = dvalues = None
    if need_x:
        dx = torch.zeros_like(x)
        for part, place in _phases(dx, sums, layout, window.stride):
            part.copy_(place)
    if need_values:
        dvalues = torch.empty_like(products).index_copy_(0, slots.long(), products).view_as(values)
    return dx, dvalues
