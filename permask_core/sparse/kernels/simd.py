"""Compiled loops over connections, for :mod:`permask_core.sparse.kernels.cpu`.

A batch is split into tiles of ``width`` examples, and a tile is stored with its examples last, [features, width]. A
connection then multiplies one value with ``width`` neighbouring numbers, which takes one or a few vector instructions
without a gather. Numba compiles for the current processor and needs no system compiler. By itself it would keep the
sums in memory; therefore the innermost loops use LLVM vectors of any width, which it keeps in registers.
"""

import hashlib
import itertools
import os
import secrets
import warnings
from functools import cache
from types import FunctionType

import numba
import numpy as np
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import IndexDataCacheFile
from numba.core.errors import NumbaTypeError, RequireLiteralValue
from numba.extending import intrinsic

# Products may be fused with sums, but sums must not be reordered: the reordering depends on what else is compiled with
# a loop, and could differ between newly compiled code and code loaded from disk.
FAST = ("contract",)
INT32, INT64 = ir.IntType(32), ir.IntType(64)
LINES = 4  # vectors of 64 bytes for one sum, which hide the latency of an addition


def _literal(number):
    if not isinstance(number, types.IntegerLiteral):
        raise RequireLiteralValue("expected a constant")
    return number.literal_value


class _Vectors:
    """Builds LLVM instructions for the intrinsics below, on vectors of ``width`` numbers of an array's type."""

    def __init__(self, context, builder, array, width):
        if array.dtype not in (types.float32, types.float64):
            raise NumbaTypeError(f"got {array.dtype}: expected float32 or float64")
        self.context, self.builder, self.width = context, builder, width
        self.item = context.get_data_type(array.dtype)
        self.itemsize = array.dtype.bitwidth // 8
        self.type = ir.VectorType(self.item, width)
        self.zero = ir.Constant(self.type, None)

    def data(self, array, value, at=None):
        pointer = self.context.make_array(array)(self.context, self.builder, value).data
        return pointer if at is None else self.builder.gep(pointer, [at])

    def at(self, pointer, step, i):
        return self.builder.gep(pointer, [self.builder.mul(step, ir.Constant(INT64, i))])

    def number(self, pointer, i):
        return self.builder.load(self.builder.gep(pointer, [i]))

    def index(self, pointer, i):
        number = self.number(pointer, i)
        return number if number.type == INT64 else self.builder.zext(number, INT64)

    def load(self, pointer):
        loaded = self.builder.load(self.builder.bitcast(pointer, self.type.as_pointer()))
        loaded.align = self.itemsize
        return loaded

    def store(self, vector, pointer):
        self.builder.store(vector, self.builder.bitcast(pointer, self.type.as_pointer())).align = self.itemsize

    def row(self, pointer, i):
        return self.load(self.builder.gep(pointer, [self.builder.mul(i, ir.Constant(INT64, self.width))]))

    def row_at(self, pointer, i):
        return self.builder.gep(pointer, [ir.Constant(INT64, i * self.width)])

    def splat(self, number):
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, number, ir.Constant(INT32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, self.width),
                                                                         [0] * self.width))

    def fma(self, a, b, c):
        return self.builder.fadd(self.builder.fmul(a, b, flags=FAST), c, flags=FAST)

    def after(self, i, n):
        return self.builder.add(i, ir.Constant(INT64, n))

    def each(self, one):
        """A body for :meth:`loop` from ``one(i, sums)``, which adds a single term to each row."""
        return lambda i, lists: [one(self.after(i, n), sums) for n, sums in enumerate(lists)]

    def part(self, vector, start):
        return self.builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(
            ir.VectorType(INT32, self.width), list(range(start, start + self.width))))

    def sum(self, vector):
        name = f"llvm.vector.reduce.fadd.v{self.width}f{8 * self.itemsize}"
        reduce = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(self.item, [self.item, self.type]),
                                                name)
        return self.builder.call(reduce, [ir.Constant(self.item, 0.0), vector], fastmath=("reassoc",))

    def loop(self, begin, end, body, firsts, step=1, turns=None):
        """Sum vectors over begin..end for one or several rows, each with a ``first`` vector.

        ``body(i, lists)`` has several lists of sums, one sum for each row. It adds the next ``step`` terms to each list
        and returns the new lists. Returns the totals and the index where it stopped, fewer than ``step`` before the
        end."""
        b, turns = self.builder, turns or max(1, LINES * 64 // (self.width * self.itemsize * len(firsts)))
        sums = [[cgutils.alloca_once(b, self.type) for _ in firsts] for _ in range(turns)]
        for n, places in enumerate(sums):
            for first, place in zip(firsts, places):
                b.store(self.zero if n else first, place)
        rest, last = (b.sub(end, b.srem(b.sub(end, begin), ir.Constant(INT64, size))) for size in (turns * step, step))
        for start, stop, lists in ((begin, rest, sums), (rest, last, sums[:1])):
            size = ir.Constant(INT64, step * len(lists))
            with cgutils.for_range_slice(b, start, stop, size, intp=INT64) as (i, _):
                for new, places in zip(body(i, [[b.load(place) for place in places] for places in lists]), lists):
                    for one, place in zip(new, places):
                        b.store(one, place)
        totals = [b.load(place) for place in sums[0]]
        for places in sums[1:]:
            totals = [b.fadd(total, b.load(place), flags=FAST) for total, place in zip(totals, places)]
        return totals, last


def _by_words(v, numbers, indices, s, count):
    """``count`` numbers at indices[s:], as vectors. Two indices are read at once, and each number by a load of its own,
    because the gather instructions of many processors are slower."""
    b, found = v.builder, []
    for i in range(0, count, 2):
        if i % v.width == 0:
            found.append(ir.Constant(v.type, ir.Undefined))
        two = b.load(b.bitcast(b.gep(indices, [v.after(s, i)]), INT64.as_pointer()))
        two.align = 4
        for n, index in enumerate((b.and_(two, ir.Constant(INT64, 2 ** 32 - 1)), b.lshr(two, ir.Constant(INT64, 32)))):
            found[-1] = b.insert_element(found[-1], v.number(numbers, index), ir.Constant(INT32, i % v.width + n))
    return found


def _by_gathers(v, numbers, indices, s, count, lanes):
    """``count`` numbers at indices[s:], as vectors, by the instructions of x86 that gather ``lanes`` float32."""
    b, byte, found = v.builder, ir.IntType(8), []
    lanes = min(lanes, count)
    many, which = ir.VectorType(v.item, lanes), ir.VectorType(INT32, lanes)
    if lanes == 16:
        name, mask, scale = "llvm.x86.avx512.mask.gather.dps.512", ir.VectorType(ir.IntType(1), 16), INT32
    else:
        name, mask, scale = "llvm.x86.avx2.gather.d.ps.256", many, byte
    kind = ir.FunctionType(many, [many, byte.as_pointer(), which, mask, scale])
    gather = cgutils.get_or_insert_function(b.module, kind, name)
    every = ir.Constant(mask, [1] * 16) if lanes == 16 else b.bitcast(ir.Constant(which, [-1] * 8), many)
    for i in range(0, count, lanes):
        index = b.load(b.bitcast(b.gep(indices, [v.after(s, i)]), which.as_pointer()))
        index.align = 4
        given = ir.Constant(many, None), b.bitcast(numbers, byte.as_pointer()), index, every, ir.Constant(scale, 4)
        taken = b.call(gather, given)
        found += [v.part(taken, n) for n in range(0, lanes, v.width)] if lanes > v.width else [taken]
    return found


@intrinsic
def row_dot(typing, values, indices, begin, end, x, bias, row, y, place, itemsize, lanes, shared):
    """``y[place + r] = bias[row + r] + sum values[r * k + s] * x[indices[s]]`` for ``shared`` rows r with the same k
    connections, s from ``begin`` to ``end``.

    Arrays are given by their addresses; a ``bias`` at address 0 means no bias. The result is the same for any
    ``lanes``: those of a gather instruction, 8 or 16, or 0 for none."""
    sized, wide, several = _literal(itemsize), _literal(lanes), _literal(shared)

    def codegen(context, builder, signature, args):
        values, indices, begin, end, x, bias, row, y, place, *_ = args
        v = _Vectors(context, builder, types.Array(types.float32 if sized == 4 else types.float64, 1, "C"), 8)
        values, x, bias, y = (builder.inttoptr(address, v.item.as_pointer()) for address in (values, x, bias, y))
        indices = builder.inttoptr(indices, INT32.as_pointer())
        rows = [v.at(values, builder.sub(end, begin), r) for r in range(several)]

        def body(s, lists):
            given = v, x, indices, s, 8 * len(lists)
            inputs = _by_gathers(*given, wide) if wide else _by_words(*given)
            return [[v.fma(v.load(builder.gep(own, [v.after(s, 8 * n)])), one, sum) for own, sum in zip(rows, sums)]
                    for n, (one, sums) in enumerate(zip(inputs, lists))]

        totals, done = v.loop(begin, end, body, [v.zero] * several, step=8, turns=max(1, 2 // several))
        for r, (own, total) in enumerate(zip(rows, totals)):
            total = cgutils.alloca_once_value(builder, v.sum(total))
            with builder.if_then(builder.icmp_unsigned("!=", builder.ptrtoint(bias, INT64), ir.Constant(INT64, 0))):
                given = v.number(bias, v.after(row, r))
                builder.store(builder.fadd(given, builder.load(total), flags=FAST), total)
            with cgutils.for_range_slice(builder, done, end, ir.Constant(INT64, 1), intp=INT64) as (s, _):
                product = builder.fmul(v.number(own, s), v.number(x, v.index(indices, s)), flags=FAST)
                builder.store(builder.fadd(builder.load(total), product, flags=FAST), total)
            builder.store(builder.load(total), builder.gep(y, [v.after(place, r)]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, itemsize, lanes, shared), codegen


@intrinsic
def row_sum(typing, values, indices, begin, end, tile, tile_at, bias, row, out, out_at, width, shared):
    """``out[out_at + r * width:][:width] = bias[row + r] + sum values[r * k + s] * tile[tile_at:][indices[s] *
    width:][:width]`` for ``shared`` rows r with the same k connections, s from ``begin`` to ``end``."""
    sized, several = _literal(width), _literal(shared)

    def codegen(context, builder, signature, args):
        values, indices, begin, end, tile, tile_at, bias, row, out, out_at, *_ = args
        kinds = signature.args
        v = _Vectors(context, builder, kinds[4], sized)
        values, indices, bias = v.data(kinds[0], values), v.data(kinds[1], indices), v.data(kinds[6], bias)
        tile, out = v.data(kinds[4], tile, tile_at), v.data(kinds[8], out, out_at)
        rows = [v.at(values, builder.sub(end, begin), r) for r in range(several)]

        def one(s, sums):
            x = v.row(tile, v.index(indices, s))
            return [v.fma(x, v.splat(v.number(own, s)), sum) for own, sum in zip(rows, sums)]

        firsts = [v.splat(v.number(bias, v.after(row, r))) for r in range(several)]
        for r, total in enumerate(v.loop(begin, end, v.each(one), firsts)[0]):
            v.store(total, v.row_at(out, r))
        return context.get_dummy_value()

    return types.void(values, indices, types.int64, types.int64, tile, types.int64, bias, types.int64, out, types.int64,
                      width, shared), codegen


@intrinsic
def column_sum(typing, values, outputs, begin, end, tile, tile_at, x, x_at, out, out_at, products, add, width):
    """``out[out_at:][:width] += sum values[p] * g_p``, and for each p, ``products[p] (+)= g_p . x[x_at:][:width]``.

    ``g_p = tile[tile_at:][outputs[p] * width:][:width]`` is read once for both.
    """
    sized = _literal(width)

    def codegen(context, builder, signature, args):
        values, outputs, begin, end, tile, tile_at, x, x_at, out, out_at, products, add, _ = args
        kinds = signature.args
        v = _Vectors(context, builder, kinds[4], sized)
        values, outputs, products = (v.data(kinds[i], args[i]) for i in (0, 1, 10))
        tile, out = v.data(kinds[4], tile, tile_at), v.data(kinds[8], out, out_at)
        x = v.load(v.data(kinds[6], x, x_at))

        def one(p, sums):
            g, place = v.row(tile, v.index(outputs, p)), builder.gep(products, [p])
            before = builder.select(add, builder.load(place), ir.Constant(v.item, 0.0))
            builder.store(builder.fadd(before, v.sum(builder.fmul(g, x, flags=FAST)), flags=FAST), place)
            return [v.fma(g, v.splat(v.number(values, p)), sum) for sum in sums]

        v.store(v.loop(begin, end, v.each(one), [v.load(out)])[0][0], out)
        return context.get_dummy_value()

    return types.void(values, outputs, types.int64, types.int64, tile, types.int64, x, types.int64, out, types.int64,
                      products, types.boolean, width), codegen


@intrinsic
def turn(typing, source, source_at, source_step, source_rows, target, target_at, target_step, target_rows, size):
    """Transpose a block of ``size`` x ``size``, a power of two. ``source_rows`` rows are read, all others are 0, and
    ``target_rows`` rows are written. The steps are distances between rows."""
    n = _literal(size)

    def codegen(context, builder, signature, args):
        source, source_at, source_step, source_rows, target, target_at, target_step, target_rows, _ = args
        v = _Vectors(context, builder, signature.args[0], n)
        source = v.data(signature.args[0], source, source_at)
        target = v.data(signature.args[4], target, target_at)
        there = [builder.icmp_signed("<", ir.Constant(INT64, i), source_rows) for i in range(n)]
        rows = [builder.select(yes, v.load(builder.select(yes, v.at(source, source_step, i), source)), v.zero)
                for i, yes in enumerate(there)]
        # log2(n) perfect shuffles of rows i and i + n/2 are the transpose.
        low, high = (ir.Constant(ir.VectorType(INT32, n), [place for j in range(start, start + n // 2)
                                                           for place in (j, n + j)]) for start in (0, n // 2))
        for _ in range(n.bit_length() - 1):
            rows = [builder.shuffle_vector(rows[i], rows[i + n // 2], half) for i in range(n // 2)
                    for half in (low, high)]
        for i, row in enumerate(rows):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(INT64, i), target_rows)):
                v.store(row, v.at(target, target_step, i))
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, types.int64, target, types.int64, types.int64, types.int64,
                      size), codegen


def _number_apart():
    """Let numba's numbers of compiled functions start at a value unique to this process; return whether it does.

    Compiled code on disk has names made of these numbers. If two processes compiled different functions with the same
    number, a third process that loads both would call one instead of the other.
    """
    first = secrets.randbits(48)
    FunctionIdentity._unique_ids = itertools.count(first)
    return FunctionIdentity.from_function(_number_apart).unique_id == first


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_number_apart)


class CodeFile(IndexDataCacheFile):
    """Numba's cache of compiled code, with file names that are hashes of the content.

    Numba numbers its files. Two processes that write at the same time may use one number for different code, and a
    killed process may leave a number in the index whose file has different code. Numba would call the wrong code
    without an error.
    """

    def save(self, key, data):
        name = hashlib.sha256(repr((self._source_stamp, self._version, key)).encode()).hexdigest()[:24]
        name = f"{self._index_name.removesuffix('.nbi')}.{name}.nbc"
        self._save_data(name, data)  # before it is in the index
        self._save_index(self._load_index() | {key: name})


PRIVATE = ("_source_stamp", "_version", "_index_name", "_save_data", "_save_index", "_load_index")  # used here


@cache
def _keeps_code():
    """Whether compiled code is cached on disk.

    It is not if there is no folder for it or, with a warning, if numba has changed the internals that the two classes
    above rely on, because the wrong code could then be loaded.
    """
    try:
        file = njit(cache=True)(_number_apart)._cache._cache_file
        if type(file) is IndexDataCacheFile and all(hasattr(file, name) for name in PRIVATE) and _number_apart():
            return True
    except RuntimeError:  # no folder
        return False
    except AttributeError:
        pass
    warnings.warn(f"fan-in layers are compiled in every process: the code cache of numba {numba.__version__} is "
                  "not supported", stacklevel=2)
    return False


def _compile(function, parallel=True):
    compiled = njit(cache=_keeps_code(), parallel=parallel, nogil=True)(function)
    if _keeps_code():
        compiled._cache._cache_file.__class__ = CodeFile
    return compiled


def _join(function, name, **parts):
    """Return one compiled function that calls several compiled ``parts``, which are its globals.

    In a closure they would look new to numba in every process, and code would be cached for each of them. Numba does
    not compare globals, so another ``name`` is needed for other ones.
    """
    joined = FunctionType(function.__code__, {**globals(), **parts}, name)
    joined.__qualname__ = name
    return _compile(joined, parallel=False)


@intrinsic
def pointer(typing, address, kind):
    """A pointer to numbers of a type at an address."""
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(kind.dtype)(types.int64, kind), codegen


@njit(inline="always")
def array_at(address, shape, kind):
    """The array at an address. Addresses are passed from Python, because unpacking arrays would take as long as the
    sums of a small layer."""
    return numba.carray(pointer(address, kind), shape)


@cache
def gather(itemsize, lanes, shared=1):
    """The forward pass example by example, for float32 (``itemsize`` 4) or float64 (8), with the gather instructions of
    x86 for 8 or 16 float32 (``lanes``) or without (0); ``shared`` neighbouring rows have the same connections."""
    @_compile
    def rows(x, values, indices, bias, y, batch, inputs, n, k):
        for group in prange(n // shared):
            i = group * shared
            for b in range(batch):
                row_dot(values, indices, i * k, i * k + k, x + b * inputs * itemsize, bias, i, y, b * n + i, itemsize,
                        lanes, shared)

    return rows


def lanes():
    """The numbers of float32 that a gather instruction of this processor loads, 0 for none, and which of them is
    usually fastest, by processor: those of AMD and the narrow ones are slower than single loads."""
    name, has = binding.get_host_cpu_name(), binding.get_host_cpu_features()
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:  # compiled for another processor than this one
        name, has = "generic", {}
    found = 0, *(wide for wide, feature in ((8, "avx2"), (16, "avx512f")) if has.get(feature))
    return found, 16 if 16 in found and not name.startswith("znver") else 0, name


PARTS = 4  # of the rows, each with its own sums; not more threads can share the work


@cache
def scatter(itemsize, shared=1):
    """The backward pass for a few examples, one by one, for float32 (``itemsize`` 4) or float64 (8); ``shared``
    neighbouring rows have the same connections, so that inputs are gathered, and gradients scattered, once for all."""
    real = types.float32 if itemsize == 4 else types.float64

    @_compile
    def rows(grad, x, values, indices, sums, dx, dvalues, batch, inputs, n, k, need_x, need_values):
        """``sums`` [parts, batch, in] are the gradients of the input by part of the rows."""
        g, given = array_at(grad, (batch, n), real), array_at(x, (batch, inputs), real)
        v, which = array_at(values, (n, k), real), array_at(indices, (n, k), types.uint32)
        parts, total = array_at(sums, (PARTS, batch, inputs), real), array_at(dx, (batch, inputs), real)
        products, groups = array_at(dvalues, (n, k), real), n // shared
        for part in prange(PARTS):
            numbers = np.empty(k, real)
            if need_x:
                parts[part] = 0
            for i in range(part * groups // PARTS * shared, (part + 1) * groups // PARTS * shared, shared):
                for b in range(batch):
                    target = parts[part, b]
                    if need_x:
                        for r in range(i, i + shared if shared > 1 else i):
                            for s in range(k):
                                numbers[s] = g[b, r] * v[r, s] + (numbers[s] if r > i else 0)
                        for s in range(k):
                            target[which[i, s]] += numbers[s] if shared > 1 else g[b, i] * v[i, s]
                    if need_values:
                        for s in range(k if shared > 1 else 0):
                            numbers[s] = given[b, which[i, s]]
                        for r in range(i, i + shared):
                            for s in range(k):
                                product = g[b, r] * (numbers[s] if shared > 1 else given[b, which[i, s]])
                                products[r, s] = product if b == 0 else products[r, s] + product
        if need_x:
            for b in range(batch):
                for j in range(inputs):
                    sum = parts[0, b, j]
                    for part in range(1, PARTS):
                        sum += parts[part, b, j]
                    total[b, j] = sum

    return rows


pack = rows = columns = unpack = width = real = None  # for a width and a type: see kernels


@_compile
def pick(values, slots, out):
    """``out[p] = values[slots[p]]``."""
    for p in prange(len(slots)):
        out[p] = values[slots[p]]


@_compile
def put(values, slots, out):
    """``out[slots[p]] = values[p]``."""
    for p in prange(len(slots)):
        out[slots[p]] = values[p]


# Each is one call, because calls from Python take as long as the arithmetic of a small layer.

def _forward(x, values, indices, bias, tiles, out, y, batch, inputs, n, k):
    many = (batch + width - 1) // width
    tiles, out = array_at(tiles, (many, inputs, width), real), array_at(out, (many, n, width), real)
    pack(array_at(x, (batch, inputs), real), tiles)
    v, which = array_at(values, (n, k), real), array_at(indices, (n, k), types.uint32)
    rows(tiles, v, which, array_at(bias, (n,), real), out)
    unpack(out, array_at(y, (batch, n), real))


def _backward(grad, x, values, pointers, outputs, slots, tiles, given, listed, sums, products, dx, dvalues):
    pack(grad, tiles)
    pack(x, given)
    pick(values.reshape(-1), slots, listed)
    columns(tiles, given, listed, pointers, outputs, sums, products)
    if dx.size > 0:
        unpack(sums, dx)
    if dvalues.size > 0:
        put(products, slots, dvalues.reshape(-1))


@cache
def kernels(width, itemsize, shared=1):
    """Return ``forward`` and ``backward`` for tiles of ``width`` examples, for float32 (``itemsize`` 4) or float64
    (8); ``shared`` neighbouring rows have the same connections."""
    block = min(width, 16)
    parts = 256  # features that a task packs

    @_compile
    def pack(x, tiles):
        """[batch, features] to [tiles, features, width]; the batch is padded with zeros."""
        batch, features = x.shape
        source, target = x.reshape(-1), tiles.reshape(-1)
        chunks = (features + parts - 1) // parts
        for task in prange(tiles.shape[0] * chunks):
            tile, start = task // chunks, task % chunks * parts
            stop = min(features, start + parts)
            for b in range(0, width, block):
                there = max(0, min(block, batch - tile * width - b))
                base, at = (tile * width + b) * features, tile * features * width + b
                for j in range(start, stop, block):
                    j = max(0, min(j, features - block))  # the last block may overlap the one before
                    if features >= block and there > 0:
                        turn(source, base + j, features, there, target, at + j * width, width, block, block)
                    else:
                        for i in range(j, min(stop, j + block)):
                            for c in range(block):
                                target[at + i * width + c] = source[base + c * features + i] if c < there else 0

    @_compile
    def unpack(tiles, y):
        """[tiles, features, width] to [batch, features]."""
        batch, features = y.shape
        source, target = tiles.reshape(-1), y.reshape(-1)
        chunks = (features + parts - 1) // parts
        for task in prange(tiles.shape[0] * chunks):
            tile, start = task // chunks, task % chunks * parts
            stop = min(features, start + parts)
            for b in range(0, min(width, batch - tile * width), block):
                there = min(block, batch - tile * width - b)
                base, at = (tile * width + b) * features, tile * features * width + b
                for j in range(start, stop, block):
                    j = max(0, min(j, features - block))
                    if features >= block:
                        turn(source, at + j * width, width, block, target, base + j, features, there, block)
                    else:
                        for i in range(j, min(stop, j + block)):
                            for c in range(there):
                                target[base + c * features + i] = source[at + i * width + c]

    @_compile
    def rows(tiles, values, indices, bias, out):
        """The forward pass: ``tiles`` [tiles, in, width] to ``out`` [tiles, n, width]."""
        n, k = values.shape
        v, which, source, target = values.reshape(-1), indices.reshape(-1), tiles.reshape(-1), out.reshape(-1)
        groups = n // shared
        for task in prange(tiles.shape[0] * groups):
            tile, i = task // groups, task % groups * shared
            row_sum(v, which, i * k, i * k + k, source, tile * tiles.shape[1] * width, bias, i, target,
                    task * shared * width, width, shared)

    @_compile
    def columns(tiles, x, values, pointers, outputs, sums, products):
        """Compute both gradients in one pass over the connections listed by input.

        From the gradient of the output, ``tiles`` [tiles, n, width], and the input ``x`` [tiles, in, width]: the
        gradient of the input is written to ``sums`` [tiles, in, width], that of the values to ``products`` [n k], in
        the order of ``values``. An input belongs to one thread, which adds in a fixed order.
        """
        inputs = x.shape[1]
        source, given, target = tiles.reshape(-1), x.reshape(-1), sums.reshape(-1)
        for tile in range(tiles.shape[0]):
            for block in range(pointers.shape[0]):
                for j in prange(inputs):
                    at = (tile * inputs + j) * width
                    if block == 0:
                        target[at:at + width] = 0
                    column_sum(values, outputs, pointers[block, j], pointers[block, j + 1], source,
                               tile * tiles.shape[1] * width, given, at, target, at, products, tile > 0, width)

    real = types.float32 if itemsize == 4 else types.float64
    loops = {"pack": pack, "rows": rows, "unpack": unpack, "width": width, "real": real}
    return (_join(_forward, f"_forward_{width}_{itemsize}_{shared}", **loops),
            _join(_backward, f"_backward_{width}", pack=pack, pick=pick, columns=columns, unpack=unpack, put=put))
