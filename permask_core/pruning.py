"""Which weights to keep: by magnitude, at random, densities of layers, and iterative magnitude pruning.

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; Renda et al., "Comparing Rewinding and Fine-tuning in
Neural Network Pruning", ICLR 2020; Mocanu et al. 2018 and Evci et al. 2020 for the Erdős-Rényi(-Kernel) densities.
"""

from numbers import Real
from typing import NamedTuple

import torch

from permask_core.masks import Masks, check_fit, sparsity

FLAVOURS = ("rewind", "finetune")
SCOPES = ("global", "layer", "fan_in")


def check_sparsity(value):
    """Raise ValueError unless ``value`` is a number in (0, 1)."""
    if not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"sparsity is {value!r}: expected a number in (0, 1), the fraction of zeros")


@torch.no_grad()
def magnitude_masks(state, sparsity, scope="global", previous=None):
    """Keep the largest weights by absolute value: of all, of each layer, or of each neuron.

    Parameters
    ----------
    state : dict of str to torch.Tensor
        A ``state_dict`` or a part of it. The tensors in ``previous`` are pruned; without it, all tensors of two or more
        axes. Use :func:`permask_core.masks.prunable_weights` to exclude shortcuts.
    sparsity : float
        Fraction of zeros in (0, 1), over all pruned tensors together (``global``) or in each of them (``layer``). The
        number of zeros is rounded to the nearest integer.
    scope : {"global", "layer", "fan_in"}
        ``fan_in`` keeps the same number of weights in every row of a tensor [out, ...], so that
        :func:`permask_core.sparse.condense` can store only these. Layers have the densities of :func:`erk_densities`; a
        row keeps that fraction of its weights, rounded to the nearest integer, but at least one. The sparsity is
        therefore exact to half a weight for each row, or lower where rows would have less than one weight:
        :func:`permask_core.masks.sparsity` returns the actual value.
    previous : Masks, optional
        The new masks are nested in these: weights that ``previous`` drops are dropped again.

    Returns
    -------
    Masks

    Raises
    ------
    ValueError
        If the sparsity is out of range or the scope unknown, ``previous`` does not fit or is already sparser, or a
        weight is NaN.
    """
    check_sparsity(sparsity)
    check_scope(scope)
    if previous is None:
        previous = {name: torch.ones_like(tensor, dtype=torch.bool) for name, tensor in state.items() if tensor.ndim >
        1}
    check_fit(previous, state)
    # Weights that are already dropped come last, whatever their value.
    scores = {name: state[name].abs().masked_fill(~mask.to(state[name].device), -1) for name, mask in previous.items()}
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"{name!r} holds NaN: expected numbers that can be ranked")
    if scope == "global":
        flat = torch.cat([score.flatten() for score in scores.values()])
        mask = _keep_largest("previous", flat[None], round(sparsity * flat.numel()))[0]
        parts = mask.split([score.numel() for score in scores.values()])
        return {name: part.view_as(scores[name]) for name, part in zip(scores, parts)}
    shares = dict.fromkeys(scores, sparsity)
    if scope == "fan_in":
        shares = {name: 1 - density for name, density in erk_densities(scores, 1 - sparsity).items()}
    masks = {}
    for name, score in scores.items():
        rows = score.flatten(1) if scope == "fan_in" else score.reshape(1, -1)
        zeros = round(shares[name] * rows.shape[1])
        masks[name] = _keep_largest(name, rows, min(zeros, rows.shape[1] - (scope == "fan_in"))).view(score.shape)
    return masks


def check_scope(scope):
    """Raise ValueError unless ``scope`` is one of those of :func:`magnitude_masks`."""
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}: expected one of {', '.join(SCOPES)}")


def _keep_largest(name, scores, zeros):
    """Return which scores of each row to keep, bool [rows, n]: all except ``zeros``. Scores below 0 are already
    dropped."""
    kept, alive = scores.shape[1] - zeros, int((scores >= 0).sum(1).min())
    if kept > alive:
        raise ValueError(f"{name} keeps {alive} of {scores.shape[1]} weights{' in a row' * (len(scores) > 1)}, but the "
                         f"sparsity keeps {kept}: expected nested masks")
    # A stable sort breaks ties in the same way on every machine.
    largest = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, largest, True)


def random_masks(shapes, densities, *, seed):
    """Draw masks at random; each tensor has exactly its density.

    Parameters
    ----------
    shapes : dict of str to torch.Tensor
        The tensors to mask, or masks: only shapes are used. To shuffle a ticket, pass ``densities={name: 1 - s for
        name, s in layer_sparsity(ticket).items()}``.
    densities : float or dict of str to float
        Fraction kept, in [0, 1], for all tensors or by name; numbers of weights are rounded to the nearest integer.
    seed : int

    Returns
    -------
    Masks

    Raises
    ------
    ValueError
        If a density is missing or out of range.
    """
    if not isinstance(densities, dict):
        densities = dict.fromkeys(shapes, densities)
    generator = torch.Generator().manual_seed(int(seed))
    masks = {}
    for name, tensor in shapes.items():
        if name not in densities or not 0 <= densities[name] <= 1:
            raise ValueError(f"density of {name!r} is {densities.get(name)!r}: expected a number in [0, 1]")
        mask = torch.zeros(tensor.numel(), dtype=torch.bool)
        mask[torch.randperm(tensor.numel(), generator=generator)[: round(densities[name] * tensor.numel())]] = True
        masks[name] = mask.view(tensor.shape)
    return masks


def erk_densities(shapes, density):
    """Erdős-Rényi-Kernel densities: the density of a layer is proportional to the sum of its axes over their product.

    Parameters
    ----------
    shapes : dict of str to torch.Tensor
        Linear weights [out, in] (then it is Erdős-Rényi) and convolution weights [out, in, height, width].
    density : float
        Fraction kept over all tensors together, in (0, 1].

    Returns
    -------
    dict of str to float
        In (0, 1]. Layers whose density would exceed 1 are dense, and the remaining weights are distributed over all
        other layers.

    Raises
    ------
    ValueError
        If there are no tensors or the density is out of range.

    References
    ----------
    Evci et al., "Rigging the Lottery", ICML 2020, section 3 (Sparsity Distribution).
    """
    if not shapes or not 0 < density <= 1:
        raise ValueError(f"density is {density!r} over {len(shapes)} tensors: expected a number in (0, 1] and at "
                         "least one tensor")
    sizes = {name: tensor.numel() for name, tensor in shapes.items()}
    raw = {name: sum(tensor.shape) / tensor.numel() for name, tensor in shapes.items()}
    dense = set()
    while len(dense) < len(shapes):
        budget = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = budget / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
        over = {name for name in shapes if name not in dense and raw[name] * scale > 1}
        if not over:
            return {name: 1.0 if name in dense else raw[name] * scale for name in shapes}
        dense |= over
    return dict.fromkeys(shapes, 1.0)


class Ticket(NamedTuple):
    """The result of iterative magnitude pruning: ``masks``, their actual ``sparsity``, and the number of ``rounds`` of
    pruning."""

    masks: Masks
    sparsity: float
    rounds: int


def full_rounds(sparsity, rate):
    """Return the number of full rounds, each with a training, before the last round, which only prunes."""
    rounds = 0
    while 1 - (1 - rate) ** (rounds + 1) < sparsity - 1e-9:  # 0.36 is two rounds of 20 %, not three
        rounds += 1
    return rounds


def iterative_magnitude_pruning(train, trained, sparsities, *, rewind=None, flavour="rewind", rate=0.2, scope="global",
                                prunable=None):
    """Prune, train, prune, ...: each round removes the fraction ``rate`` of the remaining weights.

    The masks for all sparsities come from one sequence of rounds: the last, partial round of each sparsity starts from
    the network of the last full round before it. This needs no further training, and the result is exactly that of a
    separate sequence for each sparsity.

    Parameters
    ----------
    train : callable
        ``train(state, masks)`` trains a ``state_dict`` under masks and returns the trained one.
    trained : dict of str to torch.Tensor
        The dense network, trained.
    sparsities : sequence of float
        Each in (0, 1); how exactly it is reached depends on the ``scope``.
    rewind : dict of str to torch.Tensor
        The state to which ``flavour="rewind"`` returns before each training: the true initialisation, or an early
        checkpoint of the dense run.
    flavour : {"rewind", "finetune"}
        ``finetune`` continues from the weights that were just pruned, and does not accept ``rewind``.
    rate : float
        Fraction of the remaining weights that a full round removes, in (0, 1), by magnitude.
    scope : {"global", "layer", "fan_in"}
        Weights among which the largest are kept: see :func:`magnitude_masks`.
    prunable : iterable of str, optional
        The keys to prune. The default is all tensors of two or more axes.

    Yields
    ------
    (float, Ticket)
        The requested sparsity and its ticket, in order of increasing sparsity. After n full rounds a fraction
        (1 - rate)^n of the weights remains: 80, 90, 95 and 97 % take 8, 11, 14 and 16 rounds at a rate of 20 %, the
        last one partial.

    Raises
    ------
    ValueError
        If an argument is out of range; this is checked before the first training.
    """
    sparsities = list(sparsities)
    for value in sparsities:
        check_sparsity(value)
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour is {flavour!r}: expected one of {', '.join(FLAVOURS)}")
    if (rewind is None) == (flavour == "rewind"):
        raise ValueError(f"flavour {flavour!r} {'needs a' if rewind is None else 'takes no'} rewind state")
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate!r}: expected a number in (0, 1)")
    check_scope(scope)
    keys = list(prunable) if prunable is not None else [name for name, tensor in trained.items() if tensor.ndim > 1]
    unknown = [name for name in keys if name not in trained]
    if unknown or not keys:
        raise ValueError(f"prunable names {unknown[0] if unknown else 'nothing'!r}: expected keys of trained")
    for name in trained if rewind is not None else ():
        if name not in rewind or rewind[name].shape != trained[name].shape:
            got = list(rewind[name].shape) if name in rewind else "nothing"
            raise ValueError(f"{name!r} has shape {list(trained[name].shape)} in trained and {got} in rewind: expected "
                             "the same shape")
    return _ladder(train, trained, sorted(sparsities), rewind, rate, scope, keys)


def _ladder(train, trained, sparsities, rewind, rate, scope, keys):
    state = trained
    masks = {name: torch.ones_like(trained[name], dtype=torch.bool) for name in keys}
    rounds = 0
    for target in sparsities:
        needed = full_rounds(target, rate)
        for n in range(rounds + 1, needed + 1):
            masks = magnitude_masks(state, 1 - (1 - rate) ** n, scope, masks)
            state = train(rewind if rewind is not None else state, masks)
        rounds = needed
        found = magnitude_masks(state, target, scope, masks)
        yield target, Ticket(found, sparsity(found), rounds + 1)
