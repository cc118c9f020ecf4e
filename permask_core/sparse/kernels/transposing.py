"""The connections of a fan-in layer listed by input: what the gradient by the input runs over.

The list is cut into blocks of outputs, so that what a block reads of the gradient stays in a processor's cache.
"""

from typing import NamedTuple

import torch

WIDE = 2 ** 31
BLOCK = 2048  # outputs; a tile of 64 columns of their gradient takes half a megabyte in float32


class Transposed(NamedTuple):
    """Connections by block of outputs, then by input, then by output.

    ``pointers`` int64 [blocks, in + 1]: the connections of input j in a block are ``pointers[block, j]`` to
    ``pointers[block, j + 1]``; ``outputs`` int32 [n k]: the output of each; ``slots`` [n k]: its place in the
    flattened values, int32 unless there are 2^31 values or more.
    """

    pointers: torch.Tensor
    outputs: torch.Tensor
    slots: torch.Tensor


def transposed(indices, in_features):
    """The :class:`Transposed` of ``indices`` [n, k]."""
    n, k = indices.shape
    starts = range(0, n, BLOCK)
    pointers = torch.zeros(len(starts), in_features + 1, dtype=torch.int64, device=indices.device)
    wide = n * k >= WIDE
    slots = torch.empty(n * k, dtype=torch.int64 if wide else torch.int32, device=indices.device)
    outputs = torch.empty(n * k, dtype=torch.int32, device=indices.device)
    for block, start in enumerate(starts):
        part = indices[start:start + BLOCK].flatten()
        here = slice(start * k, start * k + len(part))
        order = torch.sort(part, stable=True).indices
        slots[here], outputs[here] = order + start * k, order // k + start
        torch.cumsum(torch.bincount(part, minlength=in_features), 0, out=pointers[block, 1:])
        pointers[block] += start * k
    return Transposed(pointers, outputs, slots)
