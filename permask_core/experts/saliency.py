"""How important each expert is: one pass over calibration data, and the criteria by which experts are pruned.

Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", ICLR 2026: section 4. With g_j(x)
the weight that multiplies the output f_j(x) of expert j in the forward pass, and X_j the tokens routed to j, REAP's
score is the mean over X_j of ``g_j(x) |f_j(x)|``. The weights and the choices are read where the block passes them to
its experts. So they are those that the block uses, whether a softmax over all logits, one over the chosen ones, or
sigmoids with a scale.
"""

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch

from permask_core.data.batches import batches_of, call
from permask_core.experts.layout import LAYOUTS, moe_blocks, run_expert
from permask_core.models import device_of, evaluation_mode
from permask_core.runs.checks import check_one_of


class Statistics(NamedTuple):
    """What calibration measured in one block with E experts; sums over the tokens routed to each, float64 [E].

    ``tokens`` is the number of tokens without padding, ``counts`` the number routed to each expert, ``gates`` the sum
    of their weights g, ``norms`` that of the norms of the outputs f, and ``contributions`` that of ``g |f|``.

    Only with ``merging``: ``outputs``, the mean output of each expert over all tokens, [E, hidden], and ``logits``, the
    inner products of the router's logits of each two experts over all tokens, [E, E]. Only with ``keep``: the first
    tokens ``x`` [n, hidden] with their ``chosen`` experts and ``weights`` [n, top_k].
    """

    tokens: int
    counts: torch.Tensor
    gates: torch.Tensor
    norms: torch.Tensor
    contributions: torch.Tensor
    outputs: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    x: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    weights: torch.Tensor | None = None


CRITERIA = {
    "frequency": lambda found: found.counts,
    "router_weight": lambda found: found.gates,
    "ean": lambda found: found.norms,
    "ean_mean": lambda found: found.norms / found.counts.clamp(min=1),
    "reap": lambda found: found.contributions / found.counts.clamp(min=1),
    "reap_sum": lambda found: found.contributions,
}


def calibrate(model, batches, *, padding=None, merging=False, keep=0, layouts=LAYOUTS):
    """Measure all experts of a model in one pass over calibration data.

    Parameters
    ----------
    model : torch.nn.Module
        Run in evaluation mode on its own device. It is not changed.
    batches : Split, torch.Tensor or iterable of batches
        In a form of :mod:`permask_core.data.batches`. In a dict, tokens where ``attention_mask`` is 0 are padding.
    padding : int, optional
        The id of the padding token, if batches are tensors of ids. Padding is routed as any token is, but not counted.
    merging : bool
        Whether to measure also what merging needs. Then every expert runs on every token.
    keep : int
        How many tokens to keep in each block, with their routes.
    layouts : dict of str to Layout
        See :func:`permask_core.experts.moe_blocks`.

    Returns
    -------
    dict of str to Statistics
        By the name of the block.

    Warns
    -----
    UserWarning
        If no token was routed to some experts. All scores of these are 0, so they are removed first.

    Raises
    ------
    ValueError
        If the model has no known experts, a batch has no token besides padding, or the weights of a router are not
        finite.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> model = build_model("moe", (11,), 15, layers=1, experts=4)
    >>> found = calibrate(model, torch.randint(15, (32, 11)))["blocks.0.mixture"]
    >>> found.tokens, found.counts.sum().item()
    (352, 704.0)
    """
    blocks, real = moe_blocks(model, layouts), {}
    sums = {name: _Sums(block, keep, merging) for name, block in blocks.items()}
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for name, block in blocks.items():
            handles = [block.experts.register_forward_pre_hook(partial(_routed, name, sums[name], real))]
            if merging:
                handles.append(block.router.register_forward_hook(partial(_logits, sums[name], real)))
            for handle in handles:
                stack.callback(handle.remove)
        for inputs, _ in batches_of(batches, device_of(model)):
            real["tokens"] = real_tokens(inputs, padding)
            call(model, inputs)
    found = {name: one.statistics() for name, one in sums.items()}
    unreached = {name: (one.counts == 0).nonzero()[:, 0].tolist() for name, one in found.items()}
    if missing := {name: experts for name, experts in unreached.items() if experts}:
        warnings.warn("no calibration token was routed to some experts, whose scores are therefore 0: "
                      + "; ".join(f"{name}: {experts}" for name, experts in missing.items()), stacklevel=2)
    return found


def real_tokens(inputs, padding=None):
    """Return which tokens of a batch are no padding, bool [n x length], or None if none is known to be.

    Raises
    ------
    ValueError
        If all are padding.
    """
    mask = None
    if isinstance(inputs, Mapping) and inputs.get("attention_mask") is not None:
        mask = inputs["attention_mask"].flatten() != 0
    elif padding is not None:
        ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
        mask = ids.flatten() != padding
    if mask is not None and not mask.any():
        raise ValueError(f"all {len(mask)} tokens of a batch are padding: expected some that are not")
    return mask


def _routed(name, sums, real, _, arguments):
    x, chosen, weights = (tensor.detach() for tensor in arguments)
    if not weights.isfinite().all():
        raise ValueError(f"the weights that {name!r} gives to its experts are not finite: expected finite numbers")
    if (mask := real["tokens"]) is not None:
        if len(mask) != len(x):
            raise ValueError(f"the batch has {len(mask)} tokens and {name!r} routes {len(x)}: expected equally many")
        x, chosen, weights = x[mask], chosen[mask], weights[mask]
    sums.add(x, chosen, weights)


def _logits(sums, real, _, arguments, output):
    logits = output[0].detach().double()
    sums.logits += torch.einsum("ni,nj->ij", *2 * [logits if real["tokens"] is None else logits[real["tokens"]]])


class _Sums:
    """Sums over tokens in float64, so that batches of any size give the same."""

    def __init__(self, block, keep, merging):
        self.block, self.keep, self.merging, self.tokens, self.kept = block, keep, merging, 0, []
        zeros = partial(torch.zeros, dtype=torch.float64, device=block.router.weight.device)
        self.counts, self.gates, self.norms, self.contributions = (zeros(block.count) for _ in range(4))
        self.logits = zeros(block.count, block.count)
        self.outputs = zeros(block.count, block.router.weight.shape[1]) if merging else None

    def add(self, x, chosen, weights):
        if (room := self.keep - sum(len(part[0]) for part in self.kept)) > 0:
            self.kept.append([part[:room].clone() for part in (x, chosen, weights)])
        self.tokens += len(x)
        for j in range(self.block.count):
            rows, slots = (chosen == j).nonzero(as_tuple=True)
            outputs = run_expert(self.block, j, x if self.merging else x[rows]).double()
            if self.merging:
                self.outputs[j] += outputs.sum(0)
            norm, gate = (outputs[rows] if self.merging else outputs).norm(dim=1), weights[rows, slots].double()
            for total, values in ((self.gates, gate), (self.norms, norm), (self.contributions, gate * norm)):
                total[j] += values.sum()
            self.counts[j] += len(rows)

    def statistics(self):
        kept = [torch.cat(parts) for parts in zip(*self.kept)] or [None] * 3
        merging = (self.outputs / self.tokens, self.logits) if self.merging else (None, None)
        return Statistics(self.tokens, self.counts, self.gates, self.norms, self.contributions, *merging, *kept)


def saliency(statistics, criterion):
    """Return the score of each expert; the lowest are pruned first.

    Parameters
    ----------
    statistics : dict of str to Statistics
        From :func:`calibrate`.
    criterion : str
        "frequency" (number of tokens), "router_weight" (sum of g), "ean" (sum of the norms of outputs) and "ean_mean"
        (their mean), "reap" (mean of ``g |f|``), or "reap_sum" (its sum). An expert without tokens has the score 0.

    Returns
    -------
    dict of str to torch.Tensor
        float64 [experts], by the name of the block.

    Raises
    ------
    ValueError
        If the criterion is unknown.

    References
    ----------
    Lasby et al., "REAP the Experts", ICLR 2026.

    Examples
    --------
    >>> from permask_core.models import build_model
    >>> model = build_model("moe", (11,), 15, layers=1, experts=4)
    >>> scores = saliency(calibrate(model, torch.randint(15, (32, 11))), "frequency")
    >>> int(scores["blocks.0.mixture"].sum()) == 32 * 11 * 2
    True
    """
    check_one_of("criterion", criterion, CRITERIA)
    return {name: CRITERIA[criterion](found) for name, found in statistics.items()}
