"""The connections of a fan-in layer listed by input, for the gradient with respect to the input.

The list is split into blocks of outputs, so that the part of the gradient for one block fits into a processor's cache.
Data derived from the indices are cached while the indices exist and do not change.
"""

import weakref
from typing import NamedTuple

import torch

WIDE = 2 ** 31
BLOCK = 2048  # outputs; a tile of 64 columns of their gradient takes half a megabyte in float32


class Transpose(NamedTuple):
    """Connections by block of outputs, then by input, then by output.

    ``pointers`` int64 [blocks, in + 1]: the connections of input j in a block are ``pointers[block, j]`` to
    ``pointers[block, j + 1]``; ``outputs`` int32 [n k]: the output of each; ``slots`` [n k]: its position in
    the flattened values, int32 unless there are 2^31 values or more.
    """

    pointers: torch.Tensor
    outputs: torch.Tensor
    slots: torch.Tensor


def transpose(indices, in_features):
    """Return the :class:`Transpose` of ``indices`` [n, k]."""
    n, k = indices.shape
    starts = range(0, n, BLOCK)
    pointers = torch.zeros(len(starts), in_features + 1, dtype=torch.int64, device=indices.device)
    inputs = torch.arange(in_features, dtype=indices.dtype, device=indices.device)
    wide = n * k >= WIDE
    slots = torch.empty(n * k, dtype=torch.int64 if wide else torch.int32, device=indices.device)
    outputs = torch.empty(n * k, dtype=torch.int32, device=indices.device)
    for block, start in enumerate(starts):
        part = indices[start:start + BLOCK].flatten()
        here = slice(start * k, start * k + len(part))
        part, order = torch.sort(part, stable=True)
        slots[here], outputs[here] = order + start * k, order // k + start
        pointers[block, 1:] = torch.searchsorted(part, inputs, right=True)  # bincount would synchronise with a GPU
        pointers[block] += start * k
    return Transpose(pointers, outputs, slots)


_remembered = {}  # id of the indices -> a weak reference to them, their version, and the cached data by name


def version(indices):
    """Return a number that changes with each in-place change, or None if torch does not count them."""
    return None if indices.is_inference() else indices._version


def remember(indices, name, make):
    """Return the cached ``make()`` for these indices and this name; call it again if the indices have changed.

    Results during the capture of a CUDA graph have no values yet and are not cached: call the layer once before.
    """
    key = id(indices)  # a torch.utils.weak.WeakTensorKeyDictionary takes microseconds for every look
    entry = _remembered.get(key)
    if entry is None or entry[1] != version(indices):
        gone = weakref.ref(indices, lambda reference: _remembered.pop(key, None))
        entry = _remembered[key] = gone, version(indices), {}
    made = entry[2]
    if name not in made:
        if indices.is_cuda and torch.cuda.is_current_stream_capturing():
            return make()
        new = make()
        if indices.is_cuda:  # the next caller may use another stream
            torch.cuda.current_stream(indices.device).synchronize()
        made[name] = new
    return made[name]


def forget(indices):
    """Free the cached data before the indices are deleted."""
    _remembered.pop(id(indices), None)


def shared_rows(indices):
    """Return how many neighbouring rows of ``indices`` [n, k] have the same connections everywhere: 8, 4, 2 or 1.

    On a GPU the answer for a slice, and during the capture of a CUDA graph without an earlier call, is 1, because the
    comparison would wait for the GPU in each call.
    """
    if indices.is_cuda and indices._is_view():
        return 1

    def count():
        if indices.is_cuda and torch.cuda.is_current_stream_capturing():
            return 1
        n, k = indices.shape
        return next((g for g in (8, 4, 2) if n and n % g == 0 and indices[0].equal(indices[g - 1])
                     and bool((indices.view(-1, g, k)[:, 1:] == indices.view(-1, g, k)[:, :1]).all())), 1)

    return remember(indices, "shared", count)
