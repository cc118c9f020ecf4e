"""Activation matching: units that respond alike to the same inputs.

Li et al., "Convergent Learning: Do Different Neural Networks Learn the Same Representations?", 2015; Jordan et al.,
"REPAIR", ICLR 2023. A permutation keeps the function, so that what a layer's units compute does not depend on how the
layers below are ordered: one pass over the data serves all groups.
"""

from collections import defaultdict
from contextlib import ExitStack

import torch

from permask_core.matching.groups import check_groups
from permask_core.matching.permutations import assign
from permask_core.models import evaluating


def match_activations(groups, source_model, target_model, batches):
    """Permutations that move the source onto the target, by the correlation of activations.

    Parameters, errors and reading are those of :func:`activation_correlations`; the assignment maximises the sum of
    correlations in each group.

    Returns
    -------
    dict of str to torch.Tensor
        As :func:`permask_core.matching.permute` takes them.
    """
    return {name: assign(correlation) for name, correlation
            in activation_correlations(groups, source_model, target_model, batches).items()}


def activation_correlations(groups, source_model, target_model, batches):
    """Pearson correlation of every target unit with every source unit, in one pass for all groups.

    Parameters
    ----------
    groups : dict of str to Group
        With taps: where each group's activations are read.
    source_model, target_model : torch.nn.Module
        Read in evaluation mode; their modes come back.
    batches : iterable of torch.Tensor
        Inputs; both models see the same ones.

    Returns
    -------
    dict of str to torch.Tensor
        float64 [target units, source units], summed over a group's taps. Samples are images and, in a feature map,
        places. A unit that never changes has no correlation: 0 is put for it.

    Raises
    ------
    ValueError
        If the groups do not fit a model or have no taps, there are no batches, or an activation is not finite.
    """
    for name, group in groups.items():
        if not group.taps:
            raise ValueError(f"group {name!r} has no taps: its activations cannot be read")
    for model in (source_model, target_model):
        check_groups(groups, model.state_dict(), whole=True)
    moments = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(source_model, target_model))
        values = [stack.enter_context(_Reader(groups, model)) for model in (source_model, target_model)]
        for batch in batches:
            source_model(batch), target_model(batch)
            for key in values[0]:
                x, y = values[1][key], values[0][key]  # target, source
                if x.shape != y.shape:
                    raise ValueError(f"activations of group {key[0]!r} have shape {list(y.shape)} in the source and "
                                     f"{list(x.shape)} in the target")
                moments.setdefault(key, _Moments(x, y)).add(x, y)
    if not moments and groups:
        raise ValueError("there are no batches: expected at least one")
    total = defaultdict(float)
    for (name, tap), moment in moments.items():
        correlation = moment.correlation()
        if not correlation.isfinite().all():
            raise ValueError(f"activations of group {name!r} (tap {tap}) are not finite: they cannot be matched")
        total[name] = total[name] + correlation
    return dict(total)


class _Reader(dict):
    """Hooks that leave each tap's activations here, by (group, tap number), as float64 [units, samples]."""

    def __init__(self, groups, model):
        super().__init__()
        self.groups, self.model, self.handles = groups, model, []

    def __enter__(self):
        for name, group in self.groups.items():
            for i, tap in enumerate(group.taps):
                self.handles.append(self._hook((name, i), tap))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _hook(self, key, tap):
        module = self.model.get_submodule(tap.module)

        def keep(value):
            units = value.movedim(tap.axis, 0)[tap.positions.to(value.device)]
            self[key] = units.flatten(1).double()  # indexing copies: a later in-place ReLU cannot change it

        if tap.side == "input":
            return module.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
        return module.register_forward_hook(lambda _, inputs, output: keep(output))


class _Moments:
    """Streaming first and second moments of two sets of units, about the first batch's means for precision."""

    def __init__(self, x, y):
        self.n, self.shift = 0, (x.mean(1, keepdim=True), y.mean(1, keepdim=True))
        self.x = self.y = self.xx = self.yy = self.xy = 0

    def add(self, x, y):
        x, y = x - self.shift[0], y - self.shift[1]
        self.n += x.shape[1]
        self.x, self.y = self.x + x.sum(1), self.y + y.sum(1)
        self.xx, self.yy, self.xy = self.xx + (x * x).sum(1), self.yy + (y * y).sum(1), self.xy + x @ y.T

    def correlation(self):
        cov = self.xy / self.n - torch.outer(self.x, self.y) / self.n**2
        sd_x, sd_y = ((s2 / self.n - (s / self.n) ** 2).clamp(min=0).sqrt()
                      for s, s2 in ((self.x, self.xx), (self.y, self.yy)))
        # A unit that never changes leaves only the rounding of its mean. NaN and infinity pass through, to be refused.
        dead_x, dead_y = (sd <= 1e-12 * shift[:, 0].abs() for sd, shift in zip((sd_x, sd_y), self.shift))
        dead = (dead_x[:, None] | dead_y) & cov.isfinite()
        return torch.where(dead, torch.zeros_like(cov), cov / torch.outer(sd_x, sd_y))
