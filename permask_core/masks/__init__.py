"""Masks: which weights of a network are kept.

A mask set is a plain dict from the keys of a ``state_dict`` to bool tensors of the same shape, True where the weight
is kept. Sparsity is always the fraction of zeros among the *masked* weights: biases, norms and all other tensors
without a mask do not count.
"""

from permask_core.masks.applying import (
    Masks,
    apply_masks,
    attach_masks,
    check_bool,
    check_fit,
    layer_sparsity,
    sparsity,
)
from permask_core.masks.files import load_masks, read_provenance, save_masks
from permask_core.masks.reading import masks_of, prunable_weights, unprunable
from permask_core.masks.watching import watch

__all__ = ["Masks", "apply_masks", "attach_masks", "check_bool", "check_fit", "layer_sparsity", "load_masks",
           "masks_of", "prunable_weights", "read_provenance", "save_masks", "sparsity", "unprunable", "watch"]
