"""Interpolated networks, and the repair of their activation statistics.

If the weights of a unit are the mean of those of two units, its activation has about the mean of their means, but much
less than their variance, unless the two respond similarly. The signal shrinks layer by layer. It is restored by
recomputing the statistics of BatchNorm (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
Generalization", UAI 2018, section 3.2) or, in any network, by rescaling each unit to interpolated means and deviations
(Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023, section 4).
"""

import contextlib
import weakref
from collections import Counter
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from permask_core.data.batches import batches_of, call
from permask_core.matching.activations import samples
from permask_core.matching.checking import copied, named_tensors
from permask_core.matching.weights import check_mixable, check_pair, is_continuous
from permask_core.models import device_of, evaluation_mode


def interpolate(source, target, alpha):
    """Return ``(1 - alpha) * source + alpha * target``.

    Parameters
    ----------
    source, target : dict of str to torch.Tensor
        Two ``state_dict`` of one architecture.
    alpha : float
        0 gives exactly the source, 1 the target; numbers outside [0, 1] extrapolate.

    Returns
    -------
    dict of str to torch.Tensor
        Tensors on the device of the source. BatchNorm's count of batches and extra states are those of the source,
        unless ``alpha`` is 1.

    Raises
    ------
    ValueError
        If keys or shapes differ; or, unless ``alpha`` is 0 or 1, if other integers differ, such as the indices of a
        :class:`~permask_core.sparse.FanInLinear`, or a weight is computed from several entries, as by
        ``weight_norm``. For these see :func:`~permask_core.evaluation.connectivity.interpolate_network`.

    Examples
    --------
    >>> interpolate({"weight": torch.tensor([0.0, 4.0])}, {"weight": torch.tensor([1.0, 2.0])}, 0.25)
    {'weight': tensor([0.2500, 3.5000])}
    """
    check_pair(source, target)
    if alpha not in (0, 1):
        check_mixable([source, target])
    return _interpolated(source, target, alpha)


def _interpolated(source, target, alpha):
    if alpha == 1:
        return {name: target[name].to(value) if isinstance(value, torch.Tensor) else target[name]
                for name, value in source.items()}
    return {name: torch.lerp(value, target[name].to(value), alpha) if is_continuous(value) else value
            for name, value in source.items()}


def interpolate_model(model, source, target, alpha):
    """Return a copy of a model with the weights that :func:`interpolate` gives.

    Weights that are computed by a parametrization, such as ``weight_norm``, are interpolated themselves, not the
    parameters from which they are computed. A tensor with two names in the model may have one of them in a state.

    Raises
    ------
    ValueError
        As in :func:`interpolate`; or if a parametrization cannot represent the interpolated weight, or a state has
        different values for two names of one tensor.
    """
    source, target = (_whole(model, state, name) for state, name in ((source, "source"), (target, "target")))
    for other in (target, model.state_dict()):
        check_pair(source, other)
    twin = copied(model)
    computed = {name: module for name, module in twin.named_modules() if parametrize.is_parametrized(module)}
    if alpha not in (0, 1):
        check_mixable([{name: value for name, value in state.items() if "parametrizations." not in name}
                       for state in (source, target)])
    if not computed or alpha in (0, 1):
        twin.load_state_dict(_interpolated(source, target, alpha))
        return twin
    with evaluation_mode(twin):
        ends = []
        for state in (source, target):
            twin.load_state_dict(state)
            ends.append({(name, tensor): getattr(module, tensor).clone() for name, module in computed.items()
                         for tensor in module.parametrizations})
        twin.load_state_dict(_interpolated(source, target, alpha))
        for (name, tensor), goal in _interpolated(*ends, alpha).items():
            set_tensor(computed[name], tensor, goal, f"{name}.{tensor}".lstrip("."))
    return twin


def _whole(model, state, name):
    """Return a state with all names of a tensor that the model has under several, and that the state has under one."""
    names, whole = {}, dict(state)
    for key, tensor in named_tensors(model).items():
        names.setdefault(id(tensor), []).append(key)
    for same in names.values():
        there = [key for key in same if key in state]
        if len(same) > 1 and there:
            whole |= {key: state[there[0]] for key in same if key not in state}
            for key in there[1:]:
                if not torch.equal(state[there[0]], state[key]):
                    raise ValueError(f"{there[0]!r} and {key!r} are one tensor in the model, but differ in the {name}: "
                                     "expected equal values")
    return whole


def set_tensor(layer, tensor, value, name):
    """Set a weight or bias of a layer in place, also one that is pruned or computed by a parametrization; raise
    ValueError if it then has another value."""
    with contextlib.suppress(NotImplementedError):  # a parametrization that cannot be inverted
        if parametrize.is_parametrized(layer, tensor):
            if not torch.allclose(getattr(layer, tensor), value):  # it may be linear
                setattr(layer, tensor, value)
        elif f"{tensor}_orig" in layer._parameters:
            layer._parameters[f"{tensor}_orig"].copy_(value)
            setattr(layer, tensor, value * layer._buffers[f"{tensor}_mask"])
        else:
            layer._parameters[tensor].copy_(value)
    if not torch.allclose(getattr(layer, tensor), value, rtol=1e-4, atol=1e-6 * float(value.abs().max())):
        raise ValueError(f"{name!r} is computed by a parametrization or a mask that cannot give the new value: "
                         "expected weights without it, as after torch.nn.utils.parametrize.remove_parametrizations")


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
    that of the network, and layers that share a weight. A weight may be pruned or have a parametrization that can be
    set, such as ``weight_norm``. For a unit that is almost constant in the interpolated network,
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
        If the networks differ in a key or shape, or in integers or masks of pruning; if ``alpha`` is out of range,
        there are no batches, or an activation is not finite; or if a weight cannot be set, as with
        ``spectral_norm``.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}: expected a number in [0, 1]")
    model = interpolate_model(target_model, source_model.state_dict(), target_model.state_dict(), alpha)
    batches = list(batches_of(batches))
    source, target = (_statistics(model, batches) for model in (source_model, target_model))
    goals = {name: tuple(torch.lerp(a.to(b), b, alpha) for a, b in zip(source[name], target[name]))
             for name in target if name in source}
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
            rows = factor.view(-1, *[1] * (layer.weight.ndim - 1))
            set_tensor(layer, "weight", layer.weight * rows, f"{name}.weight")
            set_tensor(layer, "bias", layer.bias * factor + shift, f"{name}.bias")
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
    count = Counter(map(id, (p for _, p in model.named_parameters(remove_duplicate=False))))
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.bias is not None}
    own = {name: [p for tensor in ("weight", "bias") for p in _parameters(layer, tensor, name)]
           for name, layer in layers.items()}
    return {name: layer for name, layer in layers.items() if all(count[id(p)] == 1 for p in own[name])}


def _parameters(layer, tensor, name):
    """Return the parameters from which a weight or bias is computed."""
    if parametrize.is_parametrized(layer, tensor):
        return list(layer.parametrizations[tensor].parameters())
    key = f"{tensor}_orig" if f"{tensor}_mask" in layer._buffers else tensor
    if key in layer._parameters:
        return [layer._parameters[key]]
    raise ValueError(f"'{name}.{tensor}' is not a parameter, but computed by a hook: expected a parameter, or one with "
                     "a parametrization of torch.nn.utils.parametrizations")


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


@contextlib.contextmanager
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


@contextlib.contextmanager
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
        within, between = (units - mean[:, None]).abs().square().sum(1), torch.as_tensor(change).abs() ** 2
        self.squares = self.squares + within + between * (self.n * n / total)
        self.mean, self.n = self.mean + change * (n / total), total

    def std(self):
        return (self.squares / self.n).sqrt()
