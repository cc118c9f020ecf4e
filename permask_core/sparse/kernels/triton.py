"""Fan-in arithmetic on a GPU, in Triton.

Both directions are sums of rows of a table that has the examples last: an output sums rows of the transposed input, one
for each connection, and so does an input, over rows of the transposed gradient. A program holds a few sums for a tile
of examples, [sums, connections, examples], and goes through the connections that many at a time; neighbouring numbers
of a row are read together. The gradient by the values multiplies two such rows and sums over the examples.

There are two layouts of a table. In one a row has the whole batch, and is read through the second-level cache. In the
other the batch is cut into tiles that lie apart, so small that the tile of all inputs stays in the first-level cache of
a processor, whose program goes through many outputs.

No sum depends on which program is done first: the same bits again on one device, for one plan. A rule gives the plan
unless the environment asks to measure. Triton's own ``autotune`` cannot take that over. It chooses the constants of a
kernel, whereas a plan also chooses the layout, whose table is made before the kernel and is part of the time. It
measures again for every size of a batch, and also in the interpreter and while a CUDA graph is captured, where it
fails.
"""

import json
import os
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from permask_core.runs.files import write_whole
from permask_core.sparse.kernels.transposing import remember

TUNE = "PERMASK_TUNE"  # an environment variable: 1 has plans measured
SIDE = 32  # of the squares that a table is made in
# Triton's interpreter, with which the kernels run on a CPU, loses the carry when it rounds to half precision (3.7.1).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _transpose(source, target, rows, columns, width, SIDE: tl.constexpr):
    """[rows, columns] to tiles of ``width`` rows each, [tiles, columns, width]."""
    across = tl.cdiv(columns, SIDE)
    row = (tl.program_id(0) // across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = (tl.program_id(0) % across).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    part = tl.load(source + row[:, None] * columns + column[None, :],
                   mask=(row < rows)[:, None] & (column < columns)[None, :])
    place = (row // width) * width * columns + row % width
    tl.store(target + column[:, None] * width + place[None, :], tl.trans(part),
             mask=(column < columns)[:, None] & (row < rows)[None, :])


@triton.jit
def _forward(table, values, indices, bias, y, batch, n, k, width, step, room, stride,
             BIAS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNK: tl.constexpr, EXAMPLES: tl.constexpr):
    """y [n, batch] = values x table; a program does every ``stride``-th block of outputs for a tile of examples.

    Rows of the table lie ``width`` apart, tiles ``step``; it has ``room`` for more examples than there are, so that
    reads are aligned whatever the batch.
    """
    tile, lane = (tl.program_id(0) // stride).to(tl.int64), tl.arange(0, EXAMPLES)
    example = tile * EXAMPLES + lane
    table += tile * step
    here = (example < room)[None, None, :]
    for block in range(tl.program_id(0) % stride, tl.cdiv(n, OUTPUTS), stride):
        output = (block * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
        sums = tl.zeros((OUTPUTS, CHUNK, EXAMPLES), tl.float32)
        for first in range(0, k, CHUNK):
            slot = first + tl.arange(0, CHUNK)
            there = (output < n)[:, None] & (slot < k)[None, :]
            at = output[:, None] * k + slot[None, :]
            index = tl.load(indices + at, mask=there, other=0).to(tl.int64)
            value = tl.load(values + at, mask=there, other=0).to(tl.float32)
            row = tl.load(table + index[:, :, None] * width + lane[None, None, :],
                          mask=there[:, :, None] & here, other=0)
            sums += value[:, :, None] * row.to(tl.float32)
        total = tl.sum(sums, 1)
        if BIAS:
            total += tl.load(bias + output, mask=output < n, other=0).to(tl.float32)[:, None]
        tl.store(y + output[:, None] * batch + example[None, :], total.to(y.dtype.element_ty),
                 mask=(output < n)[:, None] & (example < batch)[None, :])


@triton.jit
def _by_input(table, values, pointers, outputs, slots, dx, batch, inputs, width, step, room, blocks, stride,
              CHUNK: tl.constexpr, EXAMPLES: tl.constexpr):
    """dx [inputs, batch] from table, the gradient; a program does every ``stride``-th input."""
    tile, lane = (tl.program_id(0) // stride).to(tl.int64), tl.arange(0, EXAMPLES)
    example = tile * EXAMPLES + lane
    table += tile * step
    here = (example < room)[None, :]
    for input in range(tl.program_id(0) % stride, inputs, stride):
        sums = tl.zeros((CHUNK, EXAMPLES), tl.float32)
        for block in range(0, blocks):
            pointer = pointers + tl.cast(block, tl.int64) * (inputs + 1) + input
            end = tl.load(pointer + 1)
            for first in range(tl.load(pointer), end, CHUNK):
                at = first + tl.arange(0, CHUNK)
                output = tl.load(outputs + at, mask=at < end, other=0).to(tl.int64)
                slot = tl.load(slots + at, mask=at < end, other=0)
                value = tl.load(values + slot, mask=at < end, other=0).to(tl.float32)
                row = tl.load(table + output[:, None] * width + lane[None, :], mask=(at < end)[:, None] & here, other=0)
                sums += value[:, None] * row.to(tl.float32)
        tl.store(dx + tl.cast(input, tl.int64) * batch + example, tl.sum(sums, 0).to(dx.dtype.element_ty),
                 mask=example < batch)


@triton.jit
def _by_value(x, grad, indices, dvalues, n, k, room,
              OUTPUTS: tl.constexpr, CHUNK: tl.constexpr, EXAMPLES: tl.constexpr):
    """dvalues [n, k] from the tables of x and of the gradient, which have the whole batch in a row, and then zeros."""
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    slot = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = (output < n)[:, None] & (slot < k)[None, :]
    at = output[:, None] * k + slot[None, :]
    index = tl.load(indices + at, mask=there, other=0).to(tl.int64)
    sums = tl.zeros((OUTPUTS, CHUNK, EXAMPLES), tl.float32)
    for first in range(0, room, EXAMPLES):
        example = first + tl.arange(0, EXAMPLES)
        here = (example < room)[None, None, :]
        row = tl.load(x + index[:, :, None] * room + example[None, None, :], mask=there[:, :, None] & here, other=0)
        given = tl.load(grad + output[:, None] * room + example[None, :],
                        mask=(output < n)[:, None] & (example < room)[None, :], other=0)
        sums += given.to(tl.float32)[:, None, :] * row.to(tl.float32)
    tl.store(dvalues + at, tl.sum(sums, 2).to(dvalues.dtype.element_ty), mask=there)


class Plan(NamedTuple):
    """What a program holds at a time, and on how many warps; ``tiled`` says which layout the table has."""

    outputs: int
    chunk: int
    examples: int
    warps: int = 4
    tiled: bool = False


def rule(batch, listed, size=2048, examples=64, warps=4, tiled=False):
    """The plan for lists of so many connections that holds ``size`` products, and is not measured.

    For one example a warp does a few outputs on its own: summing over several would cost more than it brings.
    """
    if batch == 1:
        size, warps = 512, 1
    examples = min(triton.next_power_of_2(batch), examples)
    chunk = min(triton.next_power_of_2(listed), max(1, size // examples), 64 if batch == 1 else size)
    return Plan(max(1, size // (chunk * examples)), chunk, examples, warps, tiled and examples < batch)


def _candidates(batch, listed):
    """Plans to measure: few connections of many examples or the reverse, and tiles of several sizes."""
    options = [*product((1024, 2048), (16, 32, 64, 128), (4,), (False,)), (4096, 64, 8, False), (4096, 128, 8, False),
               *product((2048, 8192), (8, 16, 32), (4, 16), (True,))]
    one = [Plan(max(1, 2048 // chunk), chunk, 1) for chunk in (128, 512) if chunk < 2 * listed] if batch == 1 else []
    return list(dict.fromkeys([rule(batch, listed, *option) for option in options] + one))


_measured = {}


def _plans_file():
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / "permask_plans.json"


def _plan(kind, run, x, batch, listed, n, inputs):
    """The plan for a shape: by rule, or where the environment asks for it the fastest, measured once and kept."""
    if os.environ.get(TUNE) != "1" or not x.is_cuda:
        return rule(batch, listed)
    key = " ".join(map(str, (kind, torch.cuda.get_device_name(x.device), triton.__version__, x.dtype,
                             triton.next_power_of_2(batch), listed, n, inputs)))
    if not _measured and _plans_file().exists():
        _measured.update(json.loads(_plans_file().read_text()))
    if key not in _measured:
        if torch.cuda.is_current_stream_capturing():
            return rule(batch, listed)
        plans = [plan for plan in _candidates(batch, listed) if kind != "by value" or not plan.tiled]
        _measured[key] = min(plans, key=lambda plan: triton.testing.do_bench(lambda: run(plan), 5, 20))
        _plans_file().parent.mkdir(parents=True, exist_ok=True)
        with write_whole(_plans_file()) as path:
            path.write_text(json.dumps(_measured, indent=1))
    return Plan(*_measured[key])


def _stored(dtype):
    return torch.float32 if INTERPRETED else dtype


def _turned(source, width):
    """The tiles [tiles, columns, width] of ``source`` [rows, columns]."""
    rows, columns = source.shape
    if 1 in (rows, columns) and width == rows:
        return source
    target = (source.new_zeros if rows % width else source.new_empty)(triton.cdiv(rows, width), columns, width)
    _transpose[triton.cdiv(rows, SIDE) * triton.cdiv(columns, SIDE),](source, target, rows, columns, width, SIDE)
    return target


def _layout(batch, rows, plan):
    """How far apart rows of a table lie, and tiles of examples, and for how many examples there is room."""
    if plan.tiled:
        return plan.examples, rows * plan.examples, triton.cdiv(batch, plan.examples) * plan.examples
    return _room(batch), plan.examples, _room(batch)


def _room(batch):
    """Rows of a table begin at multiples of 16 numbers, which Triton knows to read many at a time."""
    return batch if batch == 1 else triton.cdiv(batch, 16) * 16


def _narrow(indices, inputs):
    """As int16 where that suffices; for one example they are a third of what is read. Made once, so not of a slice."""
    if inputs > 2 ** 15 or indices.dtype == torch.int16 or indices._is_view():
        return indices
    return remember(indices, "int16", indices.short)


def _programs(x, batch, plan, outputs):
    """Programs for one tile of examples, and the grid of them all."""
    tiles, stride = triton.cdiv(batch, plan.examples), triton.cdiv(outputs, plan.outputs)
    if plan.tiled:  # one on each processor, so that a cache has one tile
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        stride = min(stride, max(1, processors // tiles))
    return stride, (stride * tiles,)


def forward(x, values, indices, bias=None):
    """As :func:`permask_core.sparse.kernels.forward`, on a GPU, by Triton."""
    (batch, inputs), (n, k) = x.shape, values.shape
    if not batch or not n:
        return x.new_empty(batch, n)
    x, values, indices = x.contiguous(), values.contiguous(), _narrow(indices.contiguous(), inputs)
    bias = bias if bias is None else bias.contiguous()

    def run(plan):
        y, layout = x.new_empty(n, batch, dtype=_stored(x.dtype)), _layout(batch, inputs, plan)
        stride, grid = _programs(x, batch, plan, n)
        _forward[grid](_turned(x, layout[0]), values, indices, values if bias is None else bias, y, batch, n, k,
                       *layout, stride, bias is not None, plan.outputs, plan.chunk, plan.examples,
                       num_warps=plan.warps)
        return _turned(y, n).view(batch, n).to(x.dtype)

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return run(_plan("forward", run, x, batch, k, n, inputs))


def backward(grad, x, values, indices, transposed, need_x, need_values):
    """As :func:`permask_core.sparse.kernels.backward`, on a GPU, by Triton."""
    (batch, inputs), (n, k) = x.shape, values.shape
    if not batch or not n:
        return torch.zeros_like(x) if need_x else None, torch.zeros_like(values) if need_values else None
    grad, x, values = grad.contiguous(), x.contiguous(), values.contiguous()
    indices = _narrow(indices.contiguous(), inputs)

    def by_input(plan):
        dx, layout = x.new_empty(inputs, batch, dtype=_stored(x.dtype)), _layout(batch, n, plan)
        stride, grid = _programs(x, batch, plan._replace(outputs=1), inputs)
        _by_input[grid](_turned(grad, layout[0]) if plan.tiled else plain, values, *transposed, dx, batch, inputs,
                        *layout, len(transposed.pointers), stride, plan.chunk, plan.examples, num_warps=plan.warps)
        return _turned(dx, inputs).view(batch, inputs).to(x.dtype)

    def by_value(plan):
        dvalues = torch.empty_like(values, dtype=_stored(values.dtype))
        _by_value[triton.cdiv(n, plan.outputs), triton.cdiv(k, plan.chunk)](
            _turned(x, _room(batch)), plain, indices, dvalues, n, k, _room(batch), plan.outputs, plan.chunk,
            plan.examples, num_warps=plan.warps)
        return dvalues.to(values.dtype)

    listed = triton.cdiv(n * k, inputs * len(transposed.pointers))
    with torch.cuda.device_of(x):
        plain = _turned(grad, _room(batch))
        return (by_input(_plan("by input", by_input, x, batch, listed, n, inputs)) if need_x else None,
                by_value(_plan("by value", by_value, x, batch, k, n, inputs)) if need_values else None)
