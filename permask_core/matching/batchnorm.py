"""Interpolated networks, and the repair of their activation statistics.

If the weights of a unit are the mean of those of two units, its activation has about the mean of their means, but much
less than their variance, unless the two respond similarly. The signal shrinks layer by layer. It is restored by
recomputing the statistics of BatchNorm (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
Generalization", UAI 2018, section 3.2) or, in any network, by rescaling each unit to interpolated means and deviations
(Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023, section 4).
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
    """Return ``(1 - alpha) * source + alpha * target``.

    Parameters
    ----------
    source, target : dict of str to torch.Tensor
        Two ``state_dict`` of one architecture.
    alpha : float
        0 gives the source, 1 the target; numbers outside [0, 1] extrapolate.

    Returns
    -------
    dict of str to torch.Tensor
        Tensors on the device of the source. Integers, such as BatchNorm's count of batches, are those of the source.

    Raises
    ------
    ValueError
        If keys or shapes differ.
    """
    check_pair(source, target)
    return {name: torch.lerp(tensor, target[name].to(tensor), alpha) if tensor.is_floating_point() else tensor
            for name, tensor in source.items()}


def reset_batchnorm(model, batches):
    """Recompute the running statistics of every BatchNorm in place, and return the model.

    Each layer gets the mean and the unbiased variance of its inputs, pooled over all samples of all batches, while
    every BatchNorm normalises by the statistics of the batch, as in training. With one batch, the result is that of
    training with a momentum of 1. All other modules are in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Its modes are restored. The statistics of a BatchNorm that the model does not call do not change.
    batches : Split, torch.Tensor, tuple of torch.Tensor, or iterable of batches
        Data for :func:`permask_core.data.batches.batches_of`; only the inputs are used. Batches should be as large as
        in training, because the statistics of a few samples are noisy.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    ValueError
        If the model has no BatchNorm with running statistics, there are no batches, or an activation is not finite; in
        these cases the statistics do not change.
    """
    layers = resettable(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no BatchNorm: expected at least one layer to reset")
    recompute_statistics(model, layers, batches)
    return model


def recompute_statistics(model, layers, batches):
    """Recompute the statistics of some BatchNorms of the model, {name: layer}; return the names of those that it
    calls."""
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
    """Return the BatchNorms of a model by name; raise ValueError if one has no running statistics."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, layer in layers.items():
        if layer.running_mean is None:
            raise ValueError(f"BatchNorm {name!r} has no running statistics: expected track_running_stats=True")
    return layers


def repair(source_model, target_model, batches, *, alpha=0.5):
    """Interpolate two networks, and rescale the preactivations of each unit to interpolated means and deviations.

    The mean and the standard deviation of a unit become ``1 - alpha`` times those in the source plus ``alpha`` times
    those in the target, both in evaluation mode. As in the paper, one pass over the interpolated network corrects all
    layers, each by the statistics of the current batch; the correction by the statistics of all batches is then folded
    into weight and bias. With one batch the result is exact. For BatchNorm :func:`reset_batchnorm` is enough, which is
    called at the end: the mean and deviation of its outputs are its bias and weight, which are already interpolated.

    Linear layers and convolutions with a bias are corrected. The following are not: layers without a bias (a BatchNorm
    after them has the same effect), transposed convolutions, layers that the network does not call or whose output is
    that of the network, and layers that share a weight. For a unit that is almost constant in the interpolated network,
    only the mean is corrected.

    Parameters
    ----------
    source_model, target_model : torch.nn.Module
        Two models of one architecture; the source must already be moved onto the target. Neither is changed.
    batches : Split, torch.Tensor, tuple of torch.Tensor, or iterable of batches
        As in :func:`reset_batchnorm`; held in memory for a pass over each of the three networks.
    alpha : float
        In [0, 1]; see :func:`interpolate`.

    Returns
    -------
    torch.nn.Module
        A new model of the same architecture, on the device of the target.

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
    """Return (mean, standard deviation) of the units of each layer that :func:`repair` corrects, in evaluation mode."""
    layers = _rescalable(model)
    moments, outputs = {name: _Moments() for name in layers}, {}

    def read(name, layer, given, output):
        moments[name].add(_units(layer, output))
        outputs[name] = weakref.ref(output)  # to recognise the output without keeping it in memory

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
    """Return the factor and the offset that give units the mean and standard deviation of ``goal``."""
    mean, std = goal
    factor = torch.where(moments.std() > 1e-6 * std, std / moments.std(), 1)
    return factor, mean - factor * moments.mean


def _axis(layer):
    """Return the axis of the units in a layer's output: the last in a linear layer, that before the positions in a
    convolution."""
    return 1 if isinstance(layer, _BatchNorm) else -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.ndim


def _units(layer, value):
    return samples(value.movedim(_axis(layer), 0))


@contextmanager
def _by_batch(norms):
    """Inside the block, BatchNorms normalise by the statistics of the batch and do not update running statistics."""
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
    """Inside the block, call ``hook(name, layer, inputs, output)`` whenever one of the layers is called."""
    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(moments):
    for name, moment in moments.items():
        if moment.n and not moment.squares.isfinite().all():
            raise ValueError(f"an activation at {name!r} is not finite: expected finite numbers")


class _Moments:
    """Count, mean and sum of squared deviations of the samples of units, updated by batch (Chan et al., 1983)."""

    n, mean, squares = 0, 0.0, 0.0

    def add(self, units):
        n, mean = units.shape[1], units.mean(1)
        change, total = mean - self.mean, self.n + n
        self.squares = self.squares + (units - mean[:, None]).square().sum(1) + change**2 * (self.n * n / total)
        self.mean, self.n = self.mean + change * (n / total), total

    def std(self):
        return (self.squares / self.n).sqrt()
