"""Fan-in arithmetic on a GPU, in Triton.

Both directions sum rows of a table with the examples last: an output sums rows of the transposed input, one for each
connection; an input sums rows of the transposed gradient. A program computes a few sums for a tile of examples,
[sums, connections, examples], and processes that many connections at a time; neighbouring numbers of a row are read
together. The gradient of the values multiplies two such rows and sums over the examples. If neighbouring outputs have
the same connections, a program reads a row once for all of them.

A table has one of two layouts. In the first, a row has the whole batch and is read through the second-level cache. In
the second, the batch is split into separate tiles, so small that the tile of all inputs fits into the first-level cache
of a processor, whose program computes many outputs.

No sum depends on the order of programs: on one device and with one plan, results are the same bit for bit. A rule gives
the plan, unless the environment variable requests measurements. Triton's ``autotune`` cannot be used instead. It
chooses only the constants of a kernel, but a plan also chooses the layout, whose table is made before the kernel and
counts for the time. It also measures for every size of a batch, in the interpreter, and during the capture of a CUDA
graph, where it fails.
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
from permask_core.sparse.kernels.transposing import remember, shared_rows

TUNE = "PERMASK_TUNE"  # environment variable: 1 measures plans
SIDE = 32  # of the squares in which a table is transposed
# Triton's interpreter, which runs the kernels on a CPU, loses the carry in rounding to half precision (3.7.1).
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
             BIAS: tl.constexpr, OUTPUTS: tl.constexpr, LISTS: tl.constexpr, CHUNK: tl.constexpr,
             EXAMPLES: tl.constexpr):
    """y [n, batch] = values x table; a program computes every ``stride``-th block of outputs for a tile of examples.
    ``LISTS`` is the number of lists of connections in a block: one for each output, or one that all outputs share.

    The distance between rows of the table is ``width``, that between tiles ``step``. The table has ``room`` examples,
    more than the batch, so that reads are aligned.
    """
    tile, lane = (tl.program_id(0) // stride).to(tl.int64), tl.arange(0, EXAMPLES)
    example = tile * EXAMPLES + lane
    table += tile * step
    here = (example < room)[None, None, :]
    for block in range(tl.program_id(0) % stride, tl.cdiv(n, OUTPUTS), stride):
        output = (block * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
        list = (block * OUTPUTS + tl.arange(0, LISTS)).to(tl.int64)
        sums = tl.zeros((OUTPUTS, CHUNK, EXAMPLES), tl.float32)
        for first in range(0, k, CHUNK):
            slot = first + tl.arange(0, CHUNK)
            value = tl.load(values + output[:, None] * k + slot[None, :],
                            mask=(output < n)[:, None] & (slot < k)[None, :], other=0).to(tl.float32)
            there = (list < n)[:, None] & (slot < k)[None, :]
            index = tl.load(indices + list[:, None] * k + slot[None, :], mask=there, other=0).to(tl.int64)
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
    """dx [inputs, batch] from table, the gradient; a program computes every ``stride``-th input."""
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
              OUTPUTS: tl.constexpr, LISTS: tl.constexpr, CHUNK: tl.constexpr, EXAMPLES: tl.constexpr):
    """dvalues [n, k] from the tables of x and of the gradient, whose rows have the whole batch, padded with zeros.
    ``LISTS`` as in :func:`_forward`."""
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    list = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, LISTS)
    slot = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    there = (list < n)[:, None] & (slot < k)[None, :]
    index = tl.load(indices + list[:, None] * k + slot[None, :], mask=there, other=0).to(tl.int64)
    sums = tl.zeros((OUTPUTS, CHUNK, EXAMPLES), tl.float32)
    for first in range(0, room, EXAMPLES):
        example = first + tl.arange(0, EXAMPLES)
        here = (example < room)[None, None, :]
        row = tl.load(x + index[:, :, None] * room + example[None, None, :], mask=there[:, :, None] & here, other=0)
        given = tl.load(grad + output[:, None] * room + example[None, :],
                        mask=(output < n)[:, None] & (example < room)[None, :], other=0)
        sums += given.to(tl.float32)[:, None, :] * row.to(tl.float32)
    tl.store(dvalues + output[:, None] * k + slot[None, :], tl.sum(sums, 2).to(dvalues.dtype.element_ty),
             mask=(output < n)[:, None] & (slot < k)[None, :])


class Plan(NamedTuple):
    """The block sizes of a program and its number of warps; ``tiled`` selects the layout of the table."""

    outputs: int
    chunk: int
    examples: int
    warps: int = 4
    tiled: bool = False


def rule(batch, listed, size=2048, examples=64, warps=4, tiled=False):
    """Return the plan, without measuring, for lists of ``listed`` connections and blocks of ``size`` products.

    For one example a warp computes a few outputs by itself: summing over several warps would be slower.
    """
    if batch == 1:
        size, warps = 512, 1
    examples = min(triton.next_power_of_2(batch), examples)
    chunk = min(triton.next_power_of_2(listed), max(1, size // examples), 64 if batch == 1 else size)
    return Plan(max(1, size // (chunk * examples)), chunk, examples, warps, tiled and examples < batch)


def _candidates(batch, listed):
    """Return the plans to measure: few connections of many examples or the reverse, and tiles of several sizes."""
    options = [*product((1024, 2048), (16, 32, 64, 128), (4,), (False,)), (4096, 64, 8, False), (4096, 128, 8, False),
               *product((2048, 8192), (8, 16, 32), (4, 16), (True,))]
    one = [Plan(max(1, 2048 // chunk), chunk, 1) for chunk in (128, 512) if chunk < 2 * listed] if batch == 1 else []
    return list(dict.fromkeys([rule(batch, listed, *option) for option in options] + one))


_measured = {}


def _plans_file():
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / "permask_plans.json"


def _plan(kind, run, x, batch, listed, n, inputs):
    """Return the plan for a shape: by rule or, if the environment variable is set, the fastest, measured once and
    saved."""
    if os.environ.get(TUNE) != "1" or not x.is_cuda:
        return rule(batch, listed)
    key = " ".join(map(str, (kind, torch.cuda.get_device_name(x.device), triton.__version__, x.dtype,
                             triton.next_power_of_2(batch), listed, n, inputs)))
    if not _measured and _plans_file().exists():
        _measured.update(json.loads(_plans_file().read_text()))
    if key not in _measured:
        if torch.cuda.is_current_stream_capturing():
            return rule(batch, listed)
        plans = [plan for plan in _candidates(batch, listed) if not kind.startswith("by value") or not plan.tiled]
        _measured[key] = min(plans, key=lambda plan: triton.testing.do_bench(lambda: run(plan), 5, 20))
        _plans_file().parent.mkdir(parents=True, exist_ok=True)
        with write_whole(_plans_file()) as path:
            path.write_text(json.dumps(_measured, indent=1))
    return Plan(*_measured[key])


def _grouped(plan, shared):
    """Return the plan in which a block has one group of ``shared`` outputs, and the number of its lists of connections.

    In a group, a row of the table is read once for all outputs."""
    if shared == 1:
        return plan, plan.outputs
    return plan._replace(outputs=shared, chunk=max(1, min(plan.chunk, plan.outputs * plan.chunk // shared))), 1


def _stored(dtype):
    return torch.float32 if INTERPRETED else dtype


def _turned(source, width):
    """Return the tiles [tiles, columns, width] of ``source`` [rows, columns]."""
    rows, columns = source.shape
    if 1 in (rows, columns) and width == rows:
        return source
    target = (source.new_zeros if rows % width else source.new_empty)(triton.cdiv(rows, width), columns, width)
    _transpose[triton.cdiv(rows, SIDE) * triton.cdiv(columns, SIDE),](source, target, rows, columns, width, SIDE)
    return target


def _layout(batch, rows, plan):
    """Return the distance between rows of a table, that between tiles, and the padded number of examples."""
    if plan.tiled:
        return plan.examples, rows * plan.examples, triton.cdiv(batch, plan.examples) * plan.examples
    return _room(batch), plan.examples, _room(batch)


def _room(batch):
    """Return the padded number of examples: rows begin at multiples of 16 numbers, which allows wide reads in
    Triton."""
    return batch if batch == 1 else triton.cdiv(batch, 16) * 16


def _narrow(indices, inputs):
    """Return indices as int16 if possible; for one example they are a third of the memory traffic. The result is
    cached, so it is not made for slices."""
    if inputs > 2 ** 15 or indices.dtype == torch.int16 or indices._is_view():
        return indices
    return remember(indices, "int16", indices.short)


def _programs(x, batch, plan, outputs):
    """Return the number of programs for one tile of examples, and the grid of all programs."""
    tiles, stride = triton.cdiv(batch, plan.examples), triton.cdiv(outputs, plan.outputs)
    if plan.tiled:  # one on each processor, so that each cache holds one tile
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        stride = min(stride, max(1, processors // tiles))
    return stride, (stride * tiles,)


def forward(x, values, indices, bias=None):
    """:func:`permask_core.sparse.kernels.forward` on a GPU, in Triton."""
    (batch, inputs), (n, k) = x.shape, values.shape
    if not batch or not n:
        return x.new_empty(batch, n)
    x, values, indices = x.contiguous(), values.contiguous(), indices.contiguous()
    shared, indices = shared_rows(indices), _narrow(indices, inputs)
    bias = bias if bias is None else bias.contiguous()

    def run(plan):
        plan, lists = _grouped(plan, shared)
        y, layout = x.new_empty(n, batch, dtype=_stored(x.dtype)), _layout(batch, inputs, plan)
        stride, grid = _programs(x, batch, plan, n)
        _forward[grid](_turned(x, layout[0]), values, indices, values if bias is None else bias, y, batch, n, k,
                       *layout, stride, bias is not None, plan.outputs, lists, plan.chunk, plan.examples,
                       num_warps=plan.warps)
        return _turned(y, n).view(batch, n).to(x.dtype)

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return run(_plan(f"forward, {shared} rows", run, x, batch, k, n, inputs))


def backward(grad, x, values, indices, transposed, need_x, need_values):
    """:func:`permask_core.sparse.kernels.backward` on a GPU, in Triton."""
    (batch, inputs), (n, k) = x.shape, values.shape
    if not batch or not n:
        return torch.zeros_like(x) if need_x else None, torch.zeros_like(values) if need_values else None
    grad, x, values, indices = grad.contiguous(), x.contiguous(), values.contiguous(), indices.contiguous()
    shared, indices = shared_rows(indices), _narrow(indices, inputs)

    def by_input(plan):
        dx, layout = x.new_empty(inputs, batch, dtype=_stored(x.dtype)), _layout(batch, n, plan)
        stride, grid = _programs(x, batch, plan._replace(outputs=1), inputs)
        _by_input[grid](_turned(grad, layout[0]) if plan.tiled else plain, values, *transposed, dx, batch, inputs,
                        *layout, len(transposed.pointers), stride, plan.chunk, plan.examples, num_warps=plan.warps)
        return _turned(dx, inputs).view(batch, inputs).to(x.dtype)

    def by_value(plan):
        plan, lists = _grouped(plan, shared)
        dvalues = torch.empty_like(values, dtype=_stored(values.dtype))
        _by_value[triton.cdiv(n, plan.outputs), triton.cdiv(k, plan.chunk)](
            _turned(x, _room(batch)), plain, indices, dvalues, n, k, _room(batch), plan.outputs, lists, plan.chunk,
            plan.examples, num_warps=plan.warps)
        return dvalues.to(values.dtype)

    listed = triton.cdiv(n * k, inputs * len(transposed.pointers))
    with torch.cuda.device_of(x):
        plain = _turned(grad, _room(batch))
        return (by_input(_plan("by input", by_input, x, batch, listed, n, inputs)) if need_x else None,
                by_value(_plan(f"by value, {shared} rows", by_value, x, batch, k, n, inputs)) if need_values else None)
