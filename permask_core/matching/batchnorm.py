"""Networks between two others, and the statistics of their units, which interpolation shrinks.

A unit whose weights are the mean of two units' responds with about the mean of their means, but with much less than
their variance, unless the two respond alike; layer by layer the signal dies. Recomputing BatchNorm's statistics
restores it (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, section
3.2), and so does, in any network, rescaling each unit to the mean and deviation between those of the two (Jordan et
al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023, section 4).
"""

import copy
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from permask_core.data.batches import batches_of, call
from permask_core.matching.activations import samples
from permask_core.matching.weights import check_pair
from permask_core.models import device_of, evaluation_mode


def interpolate(source, target, alpha):
    """``(1 - alpha) * source + alpha * target``.

    Parameters
    ----------
    source, target : dict of str to torch.Tensor
        Two ``state_dict`` of one architecture.
    alpha : float
        0 gives the source, 1 the target; other numbers go on along the line.

    Returns
    -------
    dict of str to torch.Tensor
        On the source's device. Whole numbers, as BatchNorm's count of batches, are the source's.

    Raises
    ------
    ValueError
        If keys or shapes differ.
    """
    check_pair(source, target)
    return {name: torch.lerp(tensor, target[name].to(tensor), alpha) if tensor.is_floating_point() else tensor
            for name, tensor in source.items()}


def reset_batchnorm(model, batches):
    """Recompute the running statistics of every BatchNorm, in place, and return the model.

    Each layer gets the mean and the unbiased variance, pooled over all samples of all batches, of what it read while
    every BatchNorm normalised by the statistics of its own batch, as it does in training. With one batch that is what
    training on it with a momentum of 1 would leave. Everything else is in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Its modes come back. A BatchNorm that it does not call keeps its statistics.
    batches : Split, torch.Tensor, tuple of torch.Tensor, or iterable of batches
        As :func:`permask_core.data.batches.batches_of` takes them; only the inputs are used. As large as in training,
        since the statistics of a few samples are noise.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If the model has no BatchNorm with running statistics, there are no batches, or an activation is not finite; the
        statistics are then as they were.
    """
    layers = resettable(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no BatchNorm: there is nothing to reset")
    recompute_statistics(model, layers, batches)
    return model


def recompute_statistics(model, layers, batches):
    """Recompute the statistics of these BatchNorms of the model, {name: layer}; the names of those that it calls."""
    moments, n = {name: _Moments() for name in layers}, 0

    def read(name, layer, given, output):
        moments[name].add(_units(layer, given[0]))

    with evaluation_mode(model), _by_batch(layers.values()), _hooked(layers, read):
        for inputs, _ in batches_of(batches, device_of(model)):
            call(model, inputs)
            n += 1
    _check_finite(moments)
    for name, layer in layers.items():
        if moments[name].n:
            layer.running_mean.copy_(moments[name].mean)
            layer.running_var.copy_(moments[name].squares / max(moments[name].n - 1, 1))
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(n)
    return [name for name in layers if moments[name].n]


def resettable(model):
    """The model's BatchNorms by name; ValueError if one keeps no running statistics."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, layer in layers.items():
        if layer.running_mean is None:
            raise ValueError(f"BatchNorm {name!r} keeps no running statistics: there is nothing to reset")
    return layers


def repair(source_model, target_model, batches, *, alpha=0.5):
    """The network between two others, each unit's preactivation rescaled to what lies between theirs.

    A unit's mean and standard deviation become ``1 - alpha`` times the source's plus ``alpha`` times the target's, both
    read in evaluation mode. As in the paper, one pass over the interpolated network corrects all layers, each by the
    statistics of the batch it reads; the correction by those of all batches is then folded into its weight and bias.
    With one batch the goal is met exactly. A BatchNorm needs only :func:`reset_batchnorm`, which is called at the end:
    the mean and deviation that it gives its units are its bias and weight, which are interpolated already.

    Corrected are linear layers and convolutions with a bias. Left as they are: those without (a BatchNorm behind them
    does it), transposed convolutions, layers that the network does not call or whose output is its own, and layers that
    share a weight. A unit that is constant, or nearly, in the interpolated network gets its mean only.

    Parameters
    ----------
    source_model, target_model : torch.nn.Module
        Of one architecture, the source moved onto the target already. They stay as they are.
    batches : Split, torch.Tensor, tuple of torch.Tensor, or iterable of batches
        As for :func:`reset_batchnorm`; held for a pass over each of the three networks.
    alpha : float
        In [0, 1]; see :func:`interpolate`.

    Returns
    -------
    torch.nn.Module
        A new model, of the same architecture, on the target's device.

    Raises
    ------
    ValueError
        If the networks differ in a key or shape, ``alpha`` is out of range, there are no batches, or an activation is
        not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}: expected a number in [0, 1]")
    state = interpolate(source_model.state_dict(), target_model.state_dict(), alpha)
    batches = list(batches_of(batches))
    source, target = (_statistics(model, batches) for model in (source_model, target_model))
    goals = {name: tuple(torch.lerp(a.to(b), b, alpha) for a, b in zip(source[name], target[name]))
             for name in target if name in source}
    model = copy.deepcopy(target_model)
    model.load_state_dict(state)
    layers = {name: layer for name, layer in _rescalable(model).items() if name in goals}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    moments = {name: _Moments() for name in layers}

    def correct(name, layer, given, output):
        units, batch = _units(layer, output), _Moments()
        moments[name].add(units)
        batch.add(units)
        shape = [1] * output.ndim
        shape[_axis(layer)] = -1
        factor, shift = (value.to(output).view(shape) for value in _correction(batch, goals[name]))
        return output * factor + shift

    with evaluation_mode(model), _by_batch(norms), _hooked(layers, correct):
        for inputs, _ in batches_of(batches, device_of(model)):
            call(model, inputs)
    _check_finite(moments)
    with torch.no_grad():
        for name, layer in layers.items():
            factor, shift = (value.to(layer.bias) for value in _correction(moments[name], goals[name]))
            layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.mul_(factor).add_(shift)
    return reset_batchnorm(model, batches) if norms else model


def _statistics(model, batches):
    """(mean, standard deviation) of the units of each layer that :func:`repair` corrects, in evaluation mode."""
    layers = _rescalable(model)
    moments, outputs = {name: _Moments() for name in layers}, {}

    def read(name, layer, given, output):
        moments[name].add(_units(layer, output))
        outputs[name] = weakref.ref(output)  # to be known again, but not held

    with evaluation_mode(model), _hooked(layers, read):
        for inputs, _ in batches_of(batches, device_of(model)):
            answer = call(model, inputs)
            last = [name for name, output in outputs.items() if any(output() is one for one in tree_leaves(answer))]
    _check_finite(moments)
    return {name: (m.mean, m.std()) for name, m in moments.items() if m.n and name not in last}


def _rescalable(model):
    parameters = Counter(map(id, (p for _, p in model.named_parameters(remove_duplicate=False))))
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.bias is not None
            and parameters[id(module.weight)] == parameters[id(module.bias)] == 1}


def _correction(moments, goal):
    """What to multiply units by and to add, so that they have the goal's mean and standard deviation."""
    mean, std = goal
    factor = torch.where(moments.std() > 1e-6 * std, std / moments.std(), 1)
    return factor, mean - factor * moments.mean


def _axis(layer):
    """Where the units of a layer's output lie: last in a linear layer, before the places in a convolution."""
    return 1 if isinstance(layer, _BatchNorm) else -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim


def _units(layer, value):
    return samples(value.movedim(_axis(layer), 0))


@contextmanager
def _by_batch(norms):
    """While it lasts, BatchNorms normalise by the statistics of the batch, and keep none."""
    kept = [(norm, norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm, _, _ in kept:
            norm.train()
            norm.track_running_stats = False
        yield
    finally:
        for norm, mode, tracking in kept:
            norm.training, norm.track_running_stats = mode, tracking


@contextmanager
def _hooked(layers, hook):
    """While it lasts, ``hook(name, layer, inputs, output)`` is called whenever a layer is."""
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(moments):
    for name, moment in moments.items():
        if moment.n and not moment.squares.isfinite().all():
            raise ValueError(f"an activation at {name!r} is not finite: there are no statistics")


class _Moments:
    """Number, mean and summed squared deviations of the samples of some units, batch by batch (Chan et al., 1983)."""

    n, mean, squares = 0, 0.0, 0.0

    def add(self, units):
        n, mean = units.shape[1], units.mean(1)
        change, total = mean - self.mean, self.n + n
        self.squares = self.squares + (units - mean[:, None]).square().sum(1) + change**2 * (self.n * n / total)
        self.mean, self.n = self.mean + change * (n / total), total

    def std(self):
        return (self.squares / self.n).sqrt()
