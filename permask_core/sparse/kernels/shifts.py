"""Compiled loops over connections for :mod:`permask_core.sparse.kernels.convolution`.

They are those of :mod:`~permask_core.sparse.kernels.simd`, but a connection reads numbers at any distance from each
other, because a position of the kernel is a shift of the input.
"""

from numba import prange, types
from numba.extending import intrinsic

from permask_core.sparse.kernels import simd
from permask_core.sparse.kernels.simd import column_sum

WIDTH = 64  # positions in a tile


@intrinsic
def shifted_sum(typing, values, offsets, begin, end, source, source_at, first, out, out_at):
    """``out[out_at:][:WIDTH] = first + sum values[s] * source[source_at + offsets[s]:][:WIDTH]``."""

    def codegen(context, builder, signature, args):
        values, offsets, begin, end, source, source_at, first, out, out_at = args
        kinds = signature.args
        v = simd._Vectors(context, builder, kinds[4], WIDTH)
        values, offsets = v.data(kinds[0], values), v.data(kinds[1], offsets)
        source, out = v.data(kinds[4], source, source_at), v.data(kinds[7], out, out_at)

        def one(s, sums):
            shifted = v.load(builder.gep(source, [v.number(offsets, s)]))
            return [v.fma(shifted, v.splat(v.number(values, s)), sum) for sum in sums]

        v.store(v.loop(begin, end, v.each(one), [v.splat(first)])[0][0], out)
        return context.get_dummy_value()

    return types.void(values, offsets, types.int64, types.int64, source, types.int64, source.dtype, out,
                      types.int64), codegen


@simd._compile
def forward(source, values, offsets, bias, y):
    """From ``source``, flat, to ``y`` [n, tiles WIDTH]; ``values`` and ``offsets`` are [n, k]."""
    (n, k), positions = values.shape, y.shape[1]
    v, which, target = values.reshape(-1), offsets.reshape(-1), y.reshape(-1)
    for task in prange(positions // WIDTH * n):
        at, i = task // n * WIDTH, task % n
        shifted_sum(v, which, i * k, i * k + k, source, at, bias[i], target, i * positions + at)


@simd._compile
def backward(tiles, source, values, pointers, outputs, offsets, sums, products, taps, chunk):
    """Compute both gradients in one pass over the connections listed by input, as ``simd.kernels`` does.

    ``tiles`` [tiles, n, WIDTH] is the gradient of the output; ``offsets`` [channels taps] is the place of each input in
    ``source`` and in its gradient ``sums``. A channel belongs to one thread, which adds in a fixed order. ``chunk``
    tiles at a time are read for all channels, so that they can remain in a cache.
    """
    count, n = tiles.shape[:2]
    given = tiles.reshape(-1)
    for start in range(0, count, chunk):
        for channel in prange(len(offsets) // taps):
            for tile in range(start, min(count, start + chunk)):
                for block in range(pointers.shape[0]):
                    for j in range(channel * taps, channel * taps + taps):
                        at = offsets[j] + tile * WIDTH
                        column_sum(values, outputs, pointers[block, j], pointers[block, j + 1], given,
                                   tile * n * WIDTH, source, at, sums, at, products, tile > 0, WIDTH)
