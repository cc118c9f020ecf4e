"""Alignment in one call: trace a network, match it with another, permute it and reset its BatchNorm.

Each step is also a function of :mod:`permask_core.matching`.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from permask_core.data.batches import batches_of, check_data, to_device
from permask_core.masks import apply_masks, check_fit
from permask_core.matching.activations import match_activations
from permask_core.matching.batchnorm import recompute_statistics
from permask_core.matching.checking import copied
from permask_core.matching.groups import Groups
from permask_core.matching.permutations import permute
from permask_core.matching.tracer.trace import permutation_groups
from permask_core.matching.weights import check_pair, match_weights
from permask_core.models import device_of
from permask_core.runs.checks import check_one_of


class Alignment(NamedTuple):
    """The result of :func:`align`: the moved copy of A, the ``groups`` and ``permutations`` that moved it, which also
    move masks, and the names of the BatchNorm layers whose statistics were ``reset``."""

    model: nn.Module
    groups: Groups
    permutations: dict[str, torch.Tensor]
    reset: tuple[str, ...]


def align(model_a, model_b, batches_or_example, by="weights", *, masks=None, groups=None, seed=0, restarts=1):
    """Move network A onto network B.

    Parameters
    ----------
    model_a, model_b : torch.nn.Module
        Two networks of one architecture. Neither is changed.
    batches_or_example : torch.Tensor, dict, Split, tuple of torch.Tensor, or iterable of batches
        A tensor or a dict of named inputs is an example, of which only the shapes matter. All other values are data for
        :func:`permask_core.data.batches.batches_of`: activations are computed on all of them, and the statistics of
        BatchNorm are recomputed. An iterator is read into memory, because several passes are needed.
    by : {"weights", "activations"}
        Whether to use :func:`match_weights` or :func:`match_activations`.
    masks : Masks, optional
        Masks of A, if A is moved for their sake. Then only the weights that they keep are compared, because the
        permutation has to be right only where the mask has connections; by activations, those of A under the masks.
        ``notebooks/better_alignment`` measures the gain of perceptrons.
    groups : dict of str to Group, optional
        The permutation groups; by default those that :func:`permutation_groups` finds.
    seed, restarts : int
        Arguments of :func:`match_weights`.

    Returns
    -------
    Alignment
        ``permute(result.groups, result.permutations, masks)`` moves the masks of A. With an example no statistics are
        reset: those of A move with its units, and the moved network computes the same function as A.

    Raises
    ------
    ValueError
        If the networks differ in architecture, ``by`` is unknown, activations should be matched on an example, A cannot
        be traced, or it has no units that can be permuted; also the errors of both matching functions.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> a, b = (build_model("mlp", (1, 8, 8), 10, seed=seed) for seed in (0, 1))
    >>> result = align(a, b, torch.zeros(2, 1, 8, 8))
    >>> list(result.permutations), result.reset
    (['fc1', 'fc2'], ())
    """
    check_one_of("matching", by, ("weights", "activations"))
    state_a, state_b = model_a.state_dict(), model_b.state_dict()
    check_pair(state_a, state_b)
    if masks is not None:
        check_fit(masks, state_a)
    example, batches = _example_and_batches(batches_or_example)
    if by == "activations" and batches is None:
        raise ValueError(f"activations cannot be matched on a {type(example).__name__}, which is only an example: "
                         "expected batches, such as a list of them, a split, or (inputs, targets)")
    if groups is None:
        groups = permutation_groups(model_a, to_device(example, device_of(model_a)))
    if not groups:
        why = "; ".join(dict.fromkeys(fixed.why for fixed in getattr(groups, "fixed", ())))
        raise ValueError(f"{type(model_a).__name__} has no units that can be permuted" + (why and f": {why}"))
    model = copied(model_a)
    if masks is not None:
        apply_masks(model, masks)
    if by == "weights":
        permutations = match_weights(groups, model.state_dict(), state_b, seed=seed, restarts=restarts)
    else:
        permutations = match_activations(groups, model, model_b, batches)
    model.load_state_dict(permute(groups, permutations, state_a))
    norms = {name: layer for name, layer in model.named_modules()
             if isinstance(layer, _BatchNorm) and layer.running_mean is not None}
    reset = recompute_statistics(model, norms, batches) if norms and batches is not None else ()
    return Alignment(model, groups, permutations, tuple(reset))


def _example_and_batches(given):
    """Return inputs for tracing, and batches that can be read more than once, or None if only an example is given."""
    if isinstance(given, (torch.Tensor, Mapping)):
        return given, None
    check_data(given)
    batches = list(given) if isinstance(given, Iterator) else given
    inputs, _ = next(batches_of(batches))
    return inputs, batches
