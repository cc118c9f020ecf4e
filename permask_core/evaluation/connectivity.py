"""The space between trained networks: losses along straight lines and on planes, barriers, distances and angles.

Two networks are in one basin if the loss does not rise on the straight line between them (Frankle et al., "Linear Mode
Connectivity and the Lottery Ticket Hypothesis", ICML 2020). Its largest rise is the barrier (Entezari et al., "The Role
of Permutation Invariance in Linear Mode Connectivity of Neural Networks", ICLR 2022). To move a network first, pass the
result of :func:`~permask_core.matching.permute`. A plane goes through three networks, as in Garipov et al., "Loss
Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018. The networks of a line or a plane are mixtures
of a few states, and many of them are evaluated at once.
"""

import math
from collections.abc import Iterator
from numbers import Real
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from permask_core.data.batches import batches_of, call, count, logits_of
from permask_core.evaluation.statistics import as_labels
from permask_core.matching import repair, reset_batchnorm
from permask_core.matching.batchnorm import interpolate_model, resettable
from permask_core.matching.checking import copied
from permask_core.matching.groups import listed
from permask_core.matching.weights import STATISTICS, as_real, check_mixable, check_pair, is_continuous
from permask_core.models import evaluation_mode
from permask_core.runs.checks import check_integer
from permask_core.training.loop import evaluate

CORRECTIONS = ("none", "reset", "repair")
MEMORY = 2**23  # bytes of weights and activations at once, about the size of a processor's caches; more is slower
ON_GPU = 2**30  # the same for a GPU
SINGLE = (_ConvNd,)  # layers that a CPU computes faster for one network after the other
BATCH = 500  # inputs evaluated at once


# ---- Mixtures --------------------------------------------------------------------------------------------------------

class Values(NamedTuple):
    """Mean cross-entropy ``losses`` in nats and 0-1 ``errors`` in [0, 1], one value for each network."""

    losses: np.ndarray
    errors: np.ndarray


def evaluate_mixtures(model, states, weights, data, *, batches=None):
    """Return loss and error of networks that are weighted sums of the same few states.

    As many networks are evaluated at once as fit into a bounded memory. Networks with convolutions on a CPU, where this
    is faster, and networks that :func:`torch.vmap` does not support are evaluated one by one. For perceptrons, the
    first layer is computed only for the states, and its outputs are mixed.

    Parameters
    ----------
    model : torch.nn.Module
        A model of the architecture, which is evaluated on its device, in evaluation mode. Its weights are not used and
        do not change.
    states : sequence of dict of str to torch.Tensor
        The ``state_dict`` of k networks.
    weights : array-like, shape [n, k]
        Row i defines network i, ``sum_j weights[i, j] * states[j]``. A row with a single 1 gives exactly that state.
    data : Split, (torch.Tensor, torch.Tensor) or iterable of batches
        Inputs with their classes, int64 [inputs], for :func:`~permask_core.data.batches.batches_of`. An iterator, which
        can be read only once, is held in memory.
    batches : Split, torch.Tensor or iterable of batches, optional
        Inputs for recomputing the BatchNorm statistics of each network, one network after the other
        (:func:`~permask_core.matching.reset_batchnorm`); held in memory. ``x.split(100)`` is accepted too. By default
        running statistics are mixed like weights.

    Returns
    -------
    Values
        Arrays [n].

    Raises
    ------
    ValueError
        If there are no states, or one does not fit the model or is not finite; if integers other than counts of batches
        differ between states, because they cannot be mixed; if weights have a wrong shape or are not finite; if a mixed
        variance is negative; if the data are empty or their labels are not classes of the model; or if there are no
        batches.

    Examples
    --------
    >>> model = nn.Linear(2, 2)
    >>> data = [{"input": torch.eye(2), "labels": torch.tensor([0, 1])}]
    >>> both = [{"weight": sign * 9 * torch.eye(2), "bias": torch.zeros(2)} for sign in (-1, 1)]
    >>> evaluate_mixtures(model, both, [[1, 0], [0.5, 0.5], [0, 1]], data).losses.round(3)
    array([9.   , 0.693, 0.   ])
    """
    check_states(states, model)
    weights = np.asarray(weights, dtype=float)
    if weights.ndim != 2 or not len(weights) or weights.shape[1] != len(states) or not np.isfinite(weights).all():
        raise ValueError(f"weights has the shape {list(weights.shape)}: expected [n, {len(states)}] with at least one "
                         "row, all finite")
    data = check_labels(data, model)
    if batches is None:
        return _evaluate_together(model, states, weights, data)
    batches = _batches(batches)
    return _evaluate_each((reset_batchnorm(_with(model, mix(states, row)), batches) for row in weights), data)


def mix(states, weights):
    """Return ``sum_j weights[j] * states[j]`` as a ``state_dict``; integers are those of the first state."""
    stacked = _stack(states, states[0])
    return {**states[0], **{name: tensor[0] for name, tensor in _mix(stacked, np.array([weights])).items()}}


def check_states(states, model=None):
    """Raise ValueError unless there are states, all finite, with the same keys and shapes (those of ``model`` if
    given), and with the same integers, except for BatchNorm's counts of batches."""
    if not len(states):
        raise ValueError("there are no states: expected at least one state_dict")
    first = states[0]
    for other in [*states[1:], *([model.state_dict()] if model else [])]:
        check_pair(first, other)
    check_mixable(states)
    for state in states:
        _check_finite(state)


def check_labels(data, model):
    """Return the data in a form that can be read repeatedly; raise ValueError if there are none or labels are not
    classes of the model. Data in memory are all checked, of other data the first batch."""
    data = list(data) if isinstance(data, Iterator) else data
    inputs, y = next(batches_of(data, next(model.parameters()).device, batch_size=BATCH))
    if y is None:
        raise ValueError("the data have no targets: expected inputs with their classes")
    if not count(inputs):
        raise ValueError("the data are empty: expected at least one input")
    with evaluation_mode(model):
        logits = logits_of(call(model, _first(inputs)))
    if logits.ndim != 2:
        raise ValueError(f"the logits of one input have the shape {list(logits.shape)}: expected [1, classes]")
    as_labels("y", data.y if hasattr(data, "y") else data[1] if isinstance(data, tuple) else y, logits.shape[1])
    return data


def _first(inputs):
    """Return a batch with the first example of a batch."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor[:1], inputs)


def _check_finite(state):
    for name, tensor in state.items():
        if is_continuous(tensor) and not tensor.isfinite().all():
            raise ValueError(f"{name!r} holds NaN or infinite values: expected finite values")


def _stack(states, like):
    """Return the floating-point tensors of the states by name, [k, *shape], with the types and devices in ``like``."""
    return {name: torch.stack([state[name].detach().to(tensor) for state in states])
            for name, tensor in like.items() if is_continuous(tensor)}


def _mix(stacked, weights):
    """Return the mixtures of each tensor, [n, *shape]."""
    return {name: (torch.as_tensor(weights).to(tensor) @ tensor.reshape(len(tensor), -1))
            .view(len(weights), *tensor.shape[1:]) for name, tensor in stacked.items()}


def _check_variances(stacked, weights):
    variances = {name: tensor for name, tensor in stacked.items() if name.endswith("running_var")}
    for name, tensor in _mix(variances, weights).items():
        if (tensor < 0).any():
            at = weights[int((tensor < 0).any(1).int().argmax())]
            raise ValueError(f"{name!r} is negative in the mixture {np.round(at, 3).tolist()}: expected variances of "
                             "at least 0; pass batches to recompute them")


def _evaluate_each(networks, data):
    found = [evaluate(network, data) for network in networks]
    return Values(np.array([one.loss for one in found]), np.array([1 - one.accuracy for one in found]))


def _evaluate_together(model, states, weights, data):
    # named_parameters has only the first name of a shared parameter.
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stacked = {name: tensor for name, tensor in _stack(states, model.state_dict()).items() if name in own}
    _check_variances(stacked, weights)
    losses, hits = torch.zeros(2, len(weights), dtype=torch.float64)
    n = 0
    with evaluation_mode(model):
        for inputs, y in batches_of(data, next(model.parameters()).device, batch_size=BATCH):
            if n == 0:
                method, at_once = _choose(model, stacked, inputs)
                parts = np.array_split(np.arange(len(weights)), math.ceil(len(weights) / at_once))
            answers = method(model, stacked, inputs)
            for rows in parts:
                logits = answers(weights[rows]).transpose(1, 2)  # [networks, classes, inputs]
                as_labels("y", y, logits.shape[1])
                labels = y.expand(len(rows), -1)
                losses[rows] += F.cross_entropy(logits, labels, reduction="none").sum(1).cpu()
                hits[rows] += (logits.argmax(1) == labels).sum(1).cpu()
            n += len(y)
    return Values((losses / n).numpy(), (1 - hits / n).numpy())


def _choose(model, stacked, inputs):
    """Choose one of the three methods below for the logits of mixtures, and how many mixtures are computed at once."""
    if _is_perceptron(model) and isinstance(inputs, torch.Tensor):
        return _perceptrons, _how_many(model, stacked, inputs)
    slower = next(model.parameters()).is_cpu and any(isinstance(module, SINGLE) for module in model.modules())
    at_once = 1 if slower else _how_many(model, stacked, inputs)
    return (_by_vmap, at_once) if at_once > 1 and _runs_in_vmap(model, stacked, inputs) else (_one_by_one, 1)


# Each of the three methods returns a function from weights of mixtures [n, k] to their logits [n, inputs, classes].

def _by_vmap(model, stacked, inputs):
    several = vmap(lambda parameters: _logits(model, parameters, inputs))
    return lambda weights: several(_mix(stacked, weights))


def _one_by_one(model, stacked, inputs):
    return lambda weights: torch.stack([
        _logits(model, {name: tensor[0] for name, tensor in _mix(stacked, row[None]).items()}, inputs)
        for row in weights])


def _logits(model, parameters, inputs):
    return logits_of(call(lambda *given, **named: functional_call(model, parameters, given, named), inputs))


def _runs_in_vmap(model, stacked, inputs):
    try:
        _by_vmap(model, stacked, _first(inputs))(np.eye(len(next(iter(stacked.values())))))
    except RuntimeError:  # for example, because of control flow that depends on values
        return False
    return True


def _is_perceptron(model):
    """Whether the model flattens its inputs and then has only linear layers and ReLUs, starting with a linear layer."""
    kinds = [type(layer) for layer in model] if type(model) is nn.Sequential else []
    return (kinds[:2] == [nn.Flatten, nn.Linear] and {*kinds[1:]} <= {nn.Linear, nn.ReLU}
            and all(layer.bias is not None for layer in model if type(layer) is nn.Linear))


def _perceptrons(model, stacked, x):
    # The first layer is linear in its weights, so its outputs are mixed: it is computed for k states, not n mixtures.
    (_, flatten), (name, _), *rest = model.named_children()
    x = flatten(x)
    first = {"": torch.stack([F.linear(x, *both) for both in zip(stacked[f"{name}.weight"], stacked[f"{name}.bias"])])}
    stacked = {key: tensor for key, tensor in stacked.items() if not key.startswith(f"{name}.")}

    def answers(weights):
        parameters, x = _mix(stacked, weights), _mix(first, weights)[""]
        for name, layer in rest:
            if isinstance(layer, nn.ReLU):
                x.relu_()
            else:
                x = torch.baddbmm(parameters[f"{name}.bias"][:, None], x, parameters[f"{name}.weight"].transpose(1, 2))
        return x

    return answers


def _how_many(model, stacked, inputs):
    """Return the number of mixtures that fit into memory, each with its weights and the outputs of all layers."""
    sizes = []

    def read(layer, given, output):
        sizes.append(output.nbytes if isinstance(output, torch.Tensor) else 0)

    handles = [module.register_forward_hook(read) for module in model.modules() if not any(module.children())]
    try:
        call(model, _first(inputs))
    finally:
        for handle in handles:
            handle.remove()
    one = sum(tensor[0].nbytes for tensor in stacked.values()) + count(inputs) * sum(sizes)
    return max(1, (MEMORY if next(model.parameters()).is_cpu else ON_GPU) // one)


def _with(model, state):
    model = copied(model)
    model.load_state_dict(state)
    return model


# ---- Lines -----------------------------------------------------------------------------------------------------------

class Line(NamedTuple):
    """``losses`` (nats) and ``errors`` (in [0, 1]) at ``alphas`` from 0, the source, to 1, the target; arrays [n]."""

    alphas: np.ndarray
    losses: np.ndarray
    errors: np.ndarray


def interpolate_network(model, source, target, alpha=0.5, *, correction="none", batches=None):
    """Return a network on the straight line between two networks.

    Parameters
    ----------
    model : torch.nn.Module
        A model of the architecture; it is not changed.
    source, target : dict of str to torch.Tensor
    alpha : float
        In [0, 1]: 0 gives the source, 1 the target. A weight with a parametrization, such as ``weight_norm``, is
        interpolated itself, not the parameters from which it is computed.
    correction : {"none", "reset", "repair"}
        How to correct the statistics of the units, which shrink between networks that differ: not at all (running
        statistics are interpolated like weights), by :func:`~permask_core.matching.reset_batchnorm`, or by
        :func:`~permask_core.matching.repair`.
    batches : Split, torch.Tensor or iterable of batches, optional
        Inputs for the correction, in a form for :func:`~permask_core.data.batches.batches_of` or a tuple of batches
        such as ``x.split(100)``; held in memory.

    Returns
    -------
    torch.nn.Module
        A new network.

    Raises
    ------
    ValueError
        If a state does not fit or is not finite, ``alpha`` is out of range, the correction is unknown or needs batches
        and there are none, or the model has no BatchNorm to reset; if integers such as the indices of a sparse layer
        differ, unless ``alpha`` is 0 or 1; if a parametrization cannot represent the interpolated weight; or if the
        model has one tensor where a state has two that differ.
    """
    for state in (source, target):
        _check_finite(state)
    if not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}: expected a number in [0, 1]")
    _check_correction(correction, model, batches)
    if correction == "none":
        return interpolate_model(model, source, target, alpha)
    batches = _batches(batches)
    if correction == "repair":
        return repair(*(interpolate_model(model, source, target, end) for end in (0, 1)), batches, alpha=alpha)
    return reset_batchnorm(interpolate_model(model, source, target, alpha), batches)


def line(model, source, target, data, *, points=25, correction="none", batches=None):
    """Return loss and error on the straight line between two networks.

    Parameters
    ----------
    model, source, target, correction, batches
        As in :func:`interpolate_network`. The ends are corrected too: a reset computes their statistics on other inputs
        than training did.
    data : Split, (torch.Tensor, torch.Tensor) or iterable of batches
        As in :func:`evaluate_mixtures`.
    points : int
        Number of evenly spaced networks, including both ends; at least 3.

    Returns
    -------
    Line

    Raises
    ------
    ValueError
        As in :func:`interpolate_network`; or if there are too few points, the data are empty, or their labels are not
        classes of the model.
    """
    check_integer("points", points, 3)
    check_states([source, target], model)
    _check_correction(correction, model, batches)
    alphas = np.linspace(0, 1, points)
    if correction == "none":
        return Line(alphas, *evaluate_mixtures(model, [source, target], np.stack([1 - alphas, alphas], 1), data))
    data, batches = check_labels(data, model), _batches(batches)
    networks = (interpolate_network(model, source, target, float(alpha), correction=correction, batches=batches)
                for alpha in alphas)
    return Line(alphas, *_evaluate_each(networks, data))


def barrier(alphas, values):
    """Return the largest rise of values on a line above the linear interpolation of the values at its ends.

    Parameters
    ----------
    alphas : array-like, shape [n]
        From 0 to 1, both included.
    values : array-like, shape [..., n]
        Losses or errors.

    Returns
    -------
    float, or numpy.ndarray of shape [...]
        ``max over alpha of L(alpha) - ((1 - alpha) L(0) + alpha L(1))`` in the unit of the values. It is at least 0,
        because the ends are on the line.

    Raises
    ------
    ValueError
        If alphas do not increase from 0 to 1, the numbers of values and alphas differ, or a value is not finite.

    Examples
    --------
    >>> barrier([0, 0.25, 0.5, 1], [1.0, 3.0, 2.5, 0.0])
    2.25
    """
    alphas, values = np.asarray(alphas, dtype=float), np.asarray(values, dtype=float)
    if alphas.ndim != 1 or len(alphas) < 2 or alphas[0] != 0 or alphas[-1] != 1 or not (np.diff(alphas) > 0).all():
        raise ValueError(f"alphas is {alphas.tolist()}: expected increasing numbers from 0 to 1, both included")
    if values.shape[-1:] != alphas.shape or not np.isfinite(values).all():
        raise ValueError(f"values has the shape {list(values.shape)}: expected [..., {len(alphas)}], one value for "
                         "each alpha, all finite")
    rise = (values - ((1 - alphas) * values[..., :1] + alphas * values[..., -1:])).max(-1)
    return float(rise) if rise.ndim == 0 else rise


def check_correction(correction, model):
    """Raise ValueError if the correction is unknown or needs BatchNorm and the model has none."""
    if correction not in CORRECTIONS:
        raise ValueError(f"unknown correction {correction!r}: expected one of {', '.join(CORRECTIONS)}")
    if correction != "none" and not resettable(model) and correction == "reset":
        raise ValueError(f"{type(model).__name__} has no BatchNorm: expected at least one layer to reset")


def _batches(batches):
    """Return the inputs of a correction, in memory. A tuple from :meth:`torch.Tensor.split` consists of batches, not of
    inputs and targets."""
    if isinstance(batches, tuple) and len({(one.dtype, one.shape[1:]) for one in batches}) == 1:
        batches = list(batches)
    return list(batches_of(batches))


def _check_correction(correction, model, batches):
    if correction in CORRECTIONS[1:] and batches is None:
        raise ValueError(f"correction is {correction!r} without batches: expected inputs for the correction")
    check_correction(correction, model)


# ---- Planes ----------------------------------------------------------------------------------------------------------

class Plane(NamedTuple):
    """The plane through three ``states``, with their coordinates ``points`` [3, 2]: the first state is the origin, the
    second is on the positive first axis, the third above that axis. Distances are those between weights."""

    states: tuple
    points: np.ndarray

    def weights(self, at):
        """Return the weights [n, 3] that mix the three states at the points ``at`` [n, 2]: barycentric coordinates.

        At the three points they are exactly 0 and 1, so the plane contains its networks bit for bit.
        """
        at = np.asarray(at, dtype=float)
        if at.ndim != 2 or at.shape[1] != 2 or not np.isfinite(at).all():
            raise ValueError(f"at has the shape {list(at.shape)}: expected points [n, 2], all finite")
        third = at[:, 1] / self.points[2, 1]
        second = (at[:, 0] - third * self.points[2, 0]) / self.points[1, 0]
        return np.stack([1 - second - third, second, third], 1)

    def state(self, x, y):
        """Return the ``state_dict`` of the network at a point."""
        return mix(self.states, self.weights([[x, y]])[0])

    def basis(self):
        """Return the two orthonormal directions of the axes, each a dict of float64 tensors, by the Gram-Schmidt
        method."""
        origin, first, second = ({name: as_real(state[name].detach()).cpu().double() for name in _weights(state)}
                                 for state in self.states)
        (_, _), (width, _), (x, y) = self.points
        right = {name: (first[name] - origin[name]) / width for name in origin}
        return right, {name: (second[name] - origin[name] - x * right[name]) / y for name in origin}

    def grid(self, points=41, margin=0.25):
        """Return coordinates ``xs`` and ``ys`` [points] of a grid around the three networks, with a margin on each
        side, as a fraction of the longer side.

        Raises
        ------
        ValueError
            If there are fewer than two points, or the margin is below 0.
        """
        check_integer("points", points, 2)
        if not isinstance(margin, Real) or not 0 <= margin < math.inf:
            raise ValueError(f"margin is {margin!r}: expected a number of at least 0")
        low, high = self.points.min(0), self.points.max(0)
        around = margin * (high - low).max()
        return tuple(np.linspace(a - around, b + around, points) for a, b in zip(low, high))


def plane_through(origin, first, second):
    """Return the plane through three networks.

    Parameters
    ----------
    origin, first, second : dict of str to torch.Tensor
        Three ``state_dict`` of one architecture. Running statistics of BatchNorm are mixed like weights, but do not
        count for distances and coordinates.

    Returns
    -------
    Plane

    Raises
    ------
    ValueError
        If keys or shapes differ, a weight is not finite, or the three networks are on one line.
    """
    states = (origin, first, second)
    check_states(states)
    start, right, up = (_vector(state) for state in states)
    right, up = right - start, up - start
    width, reach = float(right.norm()), float(up.norm())
    if width > 0:
        x = float(right @ up) / width
        height = float((up - x / width * right).norm())
    if width == 0 or height <= 1e-6 * max(reach, width):
        raise ValueError(f"the three networks are on one line (the second is {width:.3g} from the first, the third "
                         f"{reach:.3g}): expected three networks that span a plane")
    return Plane(states, np.array([[0.0, 0.0], [width, 0.0], [x, height]]))


def surface(model, plane, xs, ys, data, *, batches=None):
    """Return loss and error on a grid of a plane.

    Parameters
    ----------
    model, data, batches
        As in :func:`evaluate_mixtures`. Without batches, the running statistics of BatchNorm are mixtures of those of
        the three networks, which are unreliable far from the networks, where variances may even be negative.
    plane : Plane
    xs, ys : array-like, shapes [columns] and [rows]

    Returns
    -------
    Values
        Arrays [rows, columns].

    Raises
    ------
    ValueError
        As in :func:`evaluate_mixtures`, or if the grid has no columns or no rows.
    """
    columns, rows = np.meshgrid(xs, ys)
    if not rows.size:
        raise ValueError(f"the grid has {rows.shape[1]} columns and {rows.shape[0]} rows: expected at least one each")
    weights = plane.weights(np.stack([columns.ravel(), rows.ravel()], 1))
    found = evaluate_mixtures(model, plane.states, weights, data, batches=batches)
    return Values(*(values.reshape(rows.shape) for values in found))


# ---- Distances -------------------------------------------------------------------------------------------------------

def distance(one, other):
    """Return the Euclidean distance between the weights of two networks.

    Parameters
    ----------
    one, other : dict of str to torch.Tensor
        Two ``state_dict`` of one architecture. Running statistics of BatchNorm and integers do not count.

    Raises
    ------
    ValueError
        If keys or shapes differ, a weight is not finite, or there are none.
    """
    check_pair(one, other)
    return float((_vector(one) - _vector(other)).norm())


def angle(one, other, origin=None):
    """Return the angle in degrees between the weights of two networks, seen from zero or from a third network.

    Parameters
    ----------
    one, other, origin : dict of str to torch.Tensor
        As in :func:`distance`.

    Raises
    ------
    ValueError
        If keys or shapes differ, a weight is not finite, there are no weights, or a network equals the origin.
    """
    check_states([one, other, *([origin] if origin is not None else [])])
    base = _vector(origin) if origin is not None else 0
    one, other = (_vector(state) - base for state in (one, other))
    if not (one.any() and other.any()):
        why = "is zero" if origin is None else "does not differ from the origin"
        raise ValueError(f"a network {why}: expected a network with a direction")
    one, other = one / one.norm(), other / other.norm()
    # For small angles the arc cosine would lose half of the digits (Kahan).
    return math.degrees(2 * math.atan2(float((one - other).norm()), float((one + other).norm())))


def _weights(state):
    # Sorted, because a loaded state may have a different order.
    return [name for name, tensor in sorted(state.items())
            if is_continuous(tensor) and name.rsplit(".", 1)[-1] not in STATISTICS]


def _vector(state):
    names = _weights(state)
    if not names:
        raise ValueError(f"none of the tensors {listed(state) or '(an empty dict)'} is a weight: expected a "
                         "state_dict with weights")
    _check_finite({name: state[name] for name in names})
    return torch.cat([as_real(state[name].detach()).cpu().double().flatten() for name in names])
