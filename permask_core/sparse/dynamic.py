"""Dynamic sparse training: connections move while the weights are trained.

At regular intervals each layer drops connections of small magnitude and grows equally many new ones, with the value 0:
at random (SET), where the gradient is largest (RigL), or where it is largest under the constraint that every neuron has
the same number of connections or none (SRigL). The three steps are pure functions over lists of connections, so they
are the same for a weight under a mask and for a :class:`~permask_core.sparse.FanInLayer`, which has no dense weight. A
:class:`Topology` applies them to a model in any training loop, with one call instead of ``optimizer.step()``;
:func:`permask_core.training.fit` does so with ``rewiring``. Equal values are ranked by position, earlier first, on
every device.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", Nature Communications 2018 (SET); Evci et al., "Rigging the Lottery", ICML 2020 (RigL); Lasby et al., "Dynamic
Sparse Training with Structured Sparsity", ICLR 2024 (SRigL).
"""

import math
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from permask_core.data.splits import mix_seed
from permask_core.masks import check_fit
from permask_core.runs.checks import check_integer
from permask_core.runs.processes import of_first
from permask_core.sparse.fan_in import FanInLayer, sample_columns

METHODS = ("set", "rigl", "srigl")
CHUNK = 2 ** 20  # growth scores computed at a time


@dataclass(frozen=True)
class Rewiring:
    """How connections move. The defaults are those of SRigL on CIFAR."""

    method: str  # "set", "rigl" or "srigl"
    every: int = 100  # steps from one rewiring to the next (Delta T)
    until: float = 0.75  # fraction of all steps after which connections do not move
    fraction: float = 0.3  # of a layer's connections to drop, at the start (alpha); decays to 0 along a half cosine
    min_salient: float | None = 0.3  # SRigL: minimal fraction of salient weights of a neuron; None: no ablation
    unablated: tuple[str, ...] | None = None  # SRigL: layers without ablation; by default the last layer
    # SRigL: of each layer; by default those at the start, which constant fan-in has rounded down in each neuron
    densities: dict[str, float] | float | None = None
    # SET and SRigL: neighbouring neurons that have the same connections; where a layer has no multiple of it, the
    # largest common divisor of both
    shared: int = 1

    def __post_init__(self):
        for name, kind, expected, fits in (
            ("method", str, f"one of {', '.join(METHODS)}", lambda v: v in METHODS),
            ("every", Integral, "an integer of at least 1", lambda v: v >= 1),
            ("until", Real, "a number in (0, 1]", lambda v: 0 < v <= 1),
            ("fraction", Real, "a number in (0, 1]", lambda v: 0 < v <= 1),
            ("min_salient", (Real, type(None)), "a number in (0, 1] or None", lambda v: v is None or 0 < v <= 1),
            ("unablated", (tuple, list, type(None)), "names of layers", lambda v: True),
            ("shared", Integral, "an integer of at least 1", lambda v: v >= 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
                raise ValueError(f"{name} is {value!r}: expected {expected}")
            if isinstance(value, np.generic):  # converted to a Python number for JSON
                object.__setattr__(self, name, value.item())
        for name in ("unablated", "densities"):
            if self.method != "srigl" and getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)!r} with method {self.method!r}: only 'srigl' uses it")
        if self.method == "rigl" and self.shared > 1:
            raise ValueError(f"shared is {self.shared} with method 'rigl': only 'set' and 'srigl' use it")

    def due(self, step, steps):
        """Whether step ``step`` of ``steps``, counted from 1, moves connections instead of changing weights."""
        return step % self.every == 0 and step < int(self.until * steps)

    def drop_fraction(self, step, steps):
        """Return the fraction of connections to drop, in [0, ``fraction``]: a half cosine until the end of rewiring."""
        return self.fraction / 2 * (1 + math.cos(math.pi * step / int(self.until * steps)))


class Connections(NamedTuple):
    """The connections of a layer, sorted by row and column: ``rows`` and ``columns``, int64 [nnz], the absolute weights
    ``magnitudes`` [nnz], and the ``shape`` (out, in) of the dense weight."""

    rows: torch.Tensor
    columns: torch.Tensor
    magnitudes: torch.Tensor
    shape: tuple[int, int]


def _drop_count(fraction, n):
    """Return how many of n connections a step drops."""
    if not isinstance(fraction, Real) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction!r}: expected a number in [0, 1]")
    return int(fraction * n)


def set_step(active, fraction, generator=None):
    """SET step of a layer: drop the smallest magnitudes, and grow equally many connections at random.

    Parameters
    ----------
    active : Connections
    fraction : float
        Fraction of the connections to drop, in [0, 1]; their number is rounded down.
    generator : torch.Generator, optional
        A generator on the CPU.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        ``keep``, bool [nnz], and ``grow``, int64 [m, 2], the rows and columns of new connections in ascending order. A
        connection that was just dropped may be grown again.

    Raises
    ------
    ValueError
        If the fraction is out of range.

    References
    ----------
    Mocanu et al., Nature Communications 2018.

    Examples
    --------
    >>> active = Connections(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.9, 0.1]), (1, 2))
    >>> set_step(active, 0.5)  # the only free position is that of the dropped connection
    (tensor([ True, False]), tensor([[0, 1]]))
    """
    n_drop = _drop_count(fraction, len(active.rows))
    keep = _largest(active.magnitudes, len(active.rows) - n_drop)
    free = torch.ones(active.shape, dtype=torch.bool, device=keep.device)
    free[active.rows[keep], active.columns[keep]] = False
    free = free.flatten().nonzero()[:, 0]
    return keep, _pairs(free[torch.randperm(len(free), generator=generator)[:n_drop].to(free.device)], active.shape)


def set_rows_step(layer, fraction, generator=None):
    """SET step within each row of a :class:`~permask_core.sparse.FanInLayer`, which preserves its fan-in k: like
    :func:`set_step`, but with floor(fraction k) connections of every active neuron.

    Parameters
    ----------
    layer : FanInLayer
    fraction : float
    generator : torch.Generator, optional

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        Arguments of :meth:`~permask_core.sparse.FanInLayer.rewire`: ``keep``, bool [n_active, k], and ``grow``,
        int64 [m, 2].

    References
    ----------
    Ullah et al., "Navigating Extremes", NeurIPS 2024.

    Examples
    --------
    >>> from permask_core.sparse import FanInLinear
    >>> keep, grow = set_rows_step(FanInLinear(9, 4, fan_in=4), 0.5)
    >>> keep.sum(1).tolist(), grow[:, 0].tolist()
    ([2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3])
    """
    (n, k), indices = layer.values.shape, layer.indices
    n_drop = _drop_count(fraction, k)
    keep = torch.zeros_like(indices, dtype=torch.bool)
    grow = indices.new_empty(n * n_drop, 2, dtype=torch.int64)
    step = max(1, CHUNK // k)  # for a million rows, the temporary arrays would be larger than the layer
    for start in range(0, n, step):
        here = slice(start, start + step)
        order = layer.values[here].detach().abs().sort(dim=1, descending=True, stable=True).indices
        kept = keep[here].scatter_(1, order[:, :k - n_drop], True)
        taken = indices[here][kept].view(len(kept), k - n_drop)
        columns = sample_columns(len(kept), layer.in_features, n_drop, taken=taken, generator=generator,
                                 device=indices.device)
        part = grow[start * n_drop:(start + len(kept)) * n_drop]
        part[:, 0] = layer.rows[here].repeat_interleave(n_drop)
        part[:, 1] = columns.flatten()
    return keep, grow


def rigl_step(active, scores, fraction):
    """RigL step of a layer: drop the smallest magnitudes, and grow equally many connections where the gradient is
    largest.

    Parameters
    ----------
    active : Connections
    scores : callable
        ``scores(start, stop)`` returns the absolute gradients of these rows of the dense weight, [stop - start, in].
    fraction : float
        As in :func:`set_step`.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        As in :func:`set_step`.

    References
    ----------
    Evci et al., ICML 2020, algorithm 1; as in their code, connections that were just dropped can be grown again.

    Examples
    --------
    >>> active = Connections(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.9, 0.1]), (2, 2))
    >>> gradient = torch.tensor([[0.0, 1.0], [3.0, -4.0]])
    >>> rigl_step(active, lambda start, stop: gradient[start:stop].abs(), 0.5)
    (tensor([ True, False]), tensor([[1, 1]]))
    """
    n_drop = _drop_count(fraction, len(active.rows))
    keep = _largest(active.magnitudes, len(active.rows) - n_drop)
    best = _best(scores, active.shape, n_drop, active.rows[keep], active.columns[keep])
    return keep, _pairs(best, active.shape)


def srigl_step(active, scores, fraction, budget, min_salient=None):
    """SRigL step of a layer: afterwards every neuron has the same fan-in or is ablated.

    A neuron without enough salient weights loses all its connections, and the other neurons share them. Ablated neurons
    are not remembered: a neuron whose weights have large gradients becomes active again.

    Parameters
    ----------
    active : Connections
        Connections with any fan-in.
    scores, fraction
        As in :func:`rigl_step`.
    budget : int
        Maximal number of connections of the layer, floor(numel density). Each active neuron gets floor(budget / active
        neurons), but at least one.
    min_salient : float, optional
        A neuron is ablated if it has fewer salient weights than this fraction of the fan-in without ablation
        (gamma_sal), or none. By default no neuron is ablated.

    Returns
    -------
    (torch.Tensor, torch.Tensor)
        As in :func:`set_step`.

    Raises
    ------
    ValueError
        If ``fraction``, ``budget`` or ``min_salient`` is out of range.

    References
    ----------
    Lasby et al., ICLR 2024, section 3, and their code.

    Examples
    --------
    >>> active = Connections(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.9, 0.1]), (2, 2))
    >>> gradient = torch.tensor([[0.0, 1.0], [3.0, -4.0]])
    >>> srigl_step(active, lambda start, stop: gradient[start:stop].abs(), 0.5, budget=2)  # one for each neuron
    (tensor([ True, False]), tensor([[1, 1]]))
    """
    (rows, columns, magnitudes, shape), (n_out, n_in) = active, active.shape
    n_drop = _drop_count(fraction, len(rows))
    if not isinstance(budget, Integral) or not 1 <= budget <= n_out * n_in:
        raise ValueError(f"budget is {budget!r}: expected an integer from 1 to {n_out * n_in}")
    if min_salient is not None and not 0 < min_salient <= 1:
        raise ValueError(f"min_salient is {min_salient!r}: expected a number in (0, 1] or None")
    n_keep = len(rows) - n_drop
    neurons = torch.ones(n_out, dtype=torch.bool, device=rows.device)
    if min_salient is not None:
        strong = _largest(magnitudes, n_keep)
        none = rows[:0]
        salient = torch.cat([(rows * n_in + columns)[strong], _best(scores, shape, n_drop, none, none)]).unique()
        counts = torch.bincount(salient // n_in, minlength=n_out)
        # At least as many neurons as the budget needs are not ablated: those with the most salient weights.
        neurons = (counts >= max(1, int(min_salient * (budget // n_out)))) | _largest(counts, -(-budget // n_in))
    fan_in = max(1, budget // int(neurons.sum()))
    candidates = neurons[rows].nonzero()[:, 0]  # weights of ablated neurons do not compete
    keep = torch.zeros_like(rows, dtype=torch.bool)
    kept = candidates[_largest(magnitudes[candidates], n_keep)]
    keep[kept] = _rank_in_row(rows[kept], magnitudes[kept]) < fan_in
    missing = neurons * fan_in - torch.bincount(rows[keep], minlength=n_out)
    grow = [rows[:0]]
    for start, chunk in _chunks(scores, shape, rows[keep], columns[keep]):
        wanted = missing[start:start + len(chunk), None]
        order = chunk.sort(dim=1, descending=True, stable=True).indices[:, :int(wanted.max())]
        chosen = torch.arange(order.shape[1], device=rows.device) < wanted
        neuron = torch.arange(start, start + len(chunk), device=rows.device)[:, None]
        grow.append((neuron * n_in + order)[chosen])
    return keep, _pairs(torch.cat(grow), shape)


def _largest(values, n):
    """Return a bool tensor that marks the n largest values; of equal values, the first."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.sort(descending=True, stable=True).indices[:n]] = True
    return mask


def _rank_in_row(rows, magnitudes):
    """Return the rank of each connection in its row, 0 for the largest; rows are ascending."""
    order = magnitudes.sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    first = torch.searchsorted(rows, rows)  # the first connection of each row
    return torch.empty_like(rows).scatter_(0, order, torch.arange(len(rows), device=rows.device) - first)


def _pairs(positions, shape):
    """Return the rows and columns [m, 2] of positions in a flattened layer, in ascending order."""
    positions = positions.sort().values
    return torch.stack([positions // shape[1], positions % shape[1]], 1)


def _chunks(scores, shape, rows, columns):
    """Yield growth scores for a few rows at a time, as (first row, [rows, in]), with -1 for existing connections."""
    step = max(1, CHUNK // shape[1])
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        a, b = torch.searchsorted(rows, torch.tensor([start, stop], device=rows.device)).tolist()
        chunk = scores(start, stop)
        yield start, chunk.index_put((rows[a:b] - start, columns[a:b]), chunk.new_tensor(-1))


def _best(scores, shape, n, rows, columns):
    """Return the flat positions of the n largest growth scores of a layer, without the given connections, chunk by
    chunk."""
    best = positions = None
    for start, chunk in _chunks(scores, shape, rows, columns):
        chunk = chunk.flatten()
        place = torch.arange(len(chunk), device=chunk.device) + start * shape[1]
        if best is not None:
            better = chunk > best[-1] if 0 < len(best) == n else slice(None)
            chunk, place = torch.cat([best, chunk[better]]), torch.cat([positions, place[better]])
        order = chunk.sort(descending=True, stable=True).indices[:n]
        best, positions = chunk[order], place[order]
    return positions


class _MaskedLayer:
    """A weight under a mask, viewed as [out, in]."""

    def __init__(self, weight, mask):
        self.weight, self.mask = weight, mask

    @property
    def shape(self):
        return len(self.weight), self.weight[0].numel()

    def active(self):
        rows, columns = self.mask.flatten(1).nonzero(as_tuple=True)
        return Connections(rows, columns, self.weight.detach().flatten(1)[rows, columns].abs(), self.shape)

    def set_step(self, active, fraction, generator):
        return set_step(active, fraction, generator)

    def fan_in(self):
        return self.mask.flatten(1).sum(1)

    def has_gradients(self):
        return self.weight.grad is not None

    def scores(self, start, stop):
        return self.weight.grad[start:stop].flatten(1).abs()

    def rewire(self, active, keep, grow, optimizer):
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.mask.device)
        mask[active.rows[keep], active.columns[keep]] = True
        dropped = ~mask.view_as(self.mask)
        state = {} if optimizer is None else optimizer.state.get(self.weight, {})
        for tensor in (self.weight, *state.values()):
            if isinstance(tensor, torch.Tensor) and tensor.shape == self.weight.shape:
                # Optimizers also update the state of masked weights, which would be wrong for new connections.
                tensor.masked_fill_(dropped, 0)
        mask[grow[:, 0], grow[:, 1]] = True
        self.mask.copy_(mask.view_as(self.mask))


class _SharedLayer:
    """A layer in which ``size`` neighbouring neurons have the same connections, and move them as one neuron does, by
    the sums of their magnitudes and of their gradients' magnitudes."""

    def __init__(self, name, layer, size):
        self.name, self.layer, self.size = name, layer, size
        self.active()  # rejects other connections

    def __getattr__(self, name):
        return getattr(self.layer, name)

    @property
    def shape(self):
        return self.layer.shape[0] // self.size, self.layer.shape[1]

    def active(self):
        rows, columns, magnitudes, _ = self.layer.active()
        groups, first = rows // self.size, rows % self.size == 0
        places = groups * self.shape[1] + columns
        at = torch.searchsorted(places[first], places).clamp(max=max(0, int(first.sum()) - 1))
        if len(rows) != self.size * int(first.sum()) or (places[first][at] != places).any():
            raise ValueError(f"{self.name!r} has neighbouring neurons with different connections: expected the same in "
                             f"every {self.size}, as constant_fan_in_masks(..., shared={self.size}) draws them")
        self.at = at  # the connection of its group, for each connection
        sums = magnitudes.new_zeros(int(first.sum())).index_add_(0, at, magnitudes)
        return Connections(groups[first], columns[first], sums, self.shape)

    def set_step(self, active, fraction, generator):
        if isinstance(self.layer, _MaskedLayer):
            return set_step(active, fraction, generator)
        one = self.layer.module
        indices = one.indices[::self.size]
        return set_rows_step(SimpleNamespace(values=active.magnitudes.view(indices.shape), indices=indices,
                                             rows=one.rows[::self.size] // self.size, in_features=one.in_features),
                             fraction, generator)

    def fan_in(self):
        return self.layer.fan_in()[::self.size]

    def scores(self, start, stop):
        return self.layer.scores(start * self.size, stop * self.size).unflatten(0, (-1, self.size)).sum(1)

    def rewire(self, active, keep, grow, optimizer):
        rows = grow[:, :1] * self.size + torch.arange(self.size, device=grow.device)
        grow = torch.stack([rows.flatten(), grow[:, 1].repeat_interleave(self.size)], 1)
        self.layer.rewire(self.layer.active(), keep.flatten()[self.at], grow, optimizer)


class _CondensedLayer:
    """A FanInLayer; its dense gradient is computed from inputs and output gradients."""

    def __init__(self, module):
        self.module, self.caught = module, []

    @property
    def shape(self):
        return self.module.out_features, self.module.in_features

    def active(self):
        rows = self.module.rows.repeat_interleave(self.module.fan_in)
        magnitudes = self.module.values.detach().flatten().abs()
        return Connections(rows, self.module.indices.flatten().long(), magnitudes, self.shape)

    def set_step(self, active, fraction, generator):
        return set_rows_step(self.module, fraction, generator)

    def fan_in(self):
        return self.module.rows.new_zeros(self.shape[0]).index_fill_(0, self.module.rows, self.module.fan_in)

    def watch(self):
        """Record inputs and gradients of outputs while gradients of the values accumulate.

        Returns the handle of the hook.
        """
        watched, caught = self.module, self.caught
        caught.clear()

        def catch(module, inputs, output):
            if module is not watched:  # a copy of the module, which has the same hooks
                return
            if module.values.grad is None:  # accumulation starts
                caught.clear()
            if output.requires_grad:
                x = inputs[0].detach()
                output.register_hook(lambda gradient: caught.append((x, gradient.detach())))

        return self.module.register_forward_hook(catch)

    def has_gradients(self):
        return bool(self.caught)

    def scores(self, start, stop):
        kind = self.module.values.dtype
        return sum(self.module.dense_gradient(gradient.to(kind), x.to(kind), start, stop)
                   for x, gradient in self.caught).abs()

    def rewire(self, active, keep, grow, optimizer):
        self.module.rewire(keep.view(self.module.indices.shape), grow, optimizer)
        self.caught.clear()  # gradients of outputs can be large


class Topology:
    """The connections of a model in training: those of weights under masks and of layers like FanInLinear.

    In a training loop, :meth:`step` replaces the optimizer's step and applies the masks. For SRigL, hooks record inputs
    and output gradients of fan-in layers, only in the steps that rewire. A model compiled by ``torch.compile``
    therefore needs ``torch._dynamo.config.skip_nnmodule_hook_guards = False``.

    Parameters
    ----------
    model : torch.nn.Module
        The model, on the device of the training. The masks are applied immediately.
    masks : Masks or None
        Initial masks; they are copied to the device of the weights. None if all sparse layers are fan-in layers.
    rewiring : Rewiring
        The name of a layer is that of its dense weight, such as ``fc1.weight``, in both forms of storage. Layers whose
        mask keeps every weight are not rewired.
    steps : int
        Number of steps of the whole training.
    seed : int
        Seed of random growth, combined with the step and the layer.

    Attributes
    ----------
    masks : dict
        The current masks, which change in place.
    done : int
        Steps taken so far.
    fan_in : dict
        By layer, int32 [1 + rewirings, out], on the CPU: number of connections of each neuron at the start and after
        each rewiring.

    Raises
    ------
    ValueError
        If a mask does not fit, there is no layer to rewire, a layer is unknown, its density is missing or out of range,
        or the method is RigL, which gives rows different fan-ins, and a layer is a fan-in layer.

    Warns
    -----
    UserWarning
        If no connection can move, because training is too short or SET would drop less than one connection of a row.

    Examples
    --------
    >>> from permask_core.sparse import FanInLinear
    >>> model = torch.nn.Sequential(FanInLinear(8, 32, fan_in=2), torch.nn.ReLU(), FanInLinear(32, 4, fan_in=8))
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    >>> topology = Topology(model, None, Rewiring("srigl", every=10), steps=100)
    >>> for x, y in [(torch.randn(16, 8), torch.arange(16) % 4)] * 100:
    ...     torch.nn.functional.cross_entropy(model(x), y).backward()
    ...     topology.step(optimizer)
    ...     optimizer.zero_grad()
    >>> topology.done, topology.fan_in["0.weight"].shape  # at the start and after each of 7 rewirings
    (100, torch.Size([8, 32]))
    """

    def __init__(self, model, masks, rewiring, *, steps, seed=0):
        check_integer("steps", steps, 1)
        check_integer("seed", seed, 0)
        weights = dict(model.named_parameters())
        if masks is not None:
            check_fit(masks, weights)
        self.masks = {name: mask.to(weights[name].device, copy=True) for name, mask in (masks or {}).items()}
        modules = {f"{name}.weight".lstrip("."): module for name, module in model.named_modules()}
        self.layers = {name: _MaskedLayer(weights[name], mask) for name, mask in self.masks.items()}
        condensed = {name: module for name, module in modules.items() if isinstance(module, FanInLayer)}
        self.layers |= {name: _CondensedLayer(module) for name, module in condensed.items()}
        sizes = {name: math.gcd(rewiring.shared, layer.shape[0]) for name, layer in self.layers.items()}
        self.layers |= {name: _SharedLayer(name, self.layers[name], size) for name, size in sizes.items() if size > 1}
        self.rewiring, self.steps, self.seed = rewiring, int(steps), seed
        if not self.layers:
            raise ValueError("there is no layer to rewire: expected masks, or a model with fan-in layers")
        if rewiring.method == "rigl" and condensed:
            name, module = next(iter(condensed.items()))
            raise ValueError(f"{name!r} is a {type(module).__name__}: RigL gives neurons different numbers of "
                             "connections; expected method 'set' or 'srigl', or a dense layer under a mask")
        matrices = [name for name in modules if name in condensed or (name in weights and weights[name].ndim > 1)]
        self.unablated = matrices[-1:] if rewiring.unablated is None else rewiring.unablated
        unknown = set(rewiring.unablated or ()) - set(self.layers)
        if unknown:
            raise ValueError(f"unablated names {min(unknown)!r}: expected some of {', '.join(self.layers)}")
        sizes = {name: math.prod(layer.shape) for name, layer in self.layers.items()}
        self.budgets = {name: int(layer.fan_in().sum()) for name, layer in self.layers.items()}
        if rewiring.densities is not None:
            self.budgets = _budgets(sizes, rewiring.densities)
        self.moving = [name for name, layer in self.layers.items() if int(layer.fan_in().sum()) < sizes[name]]
        if not any(map(self.due, range(1, steps + 1))):
            warnings.warn(f"no connection will move: rewiring every {rewiring.every} steps ends before step "
                          f"{int(rewiring.until * steps)} of {steps}", stacklevel=2)
        still = [name for name, module in condensed.items()
                 if rewiring.method == "set" and not _drop_count(rewiring.fraction, module.fan_in)]
        if still:
            warnings.warn(f"the connections of {', '.join(map(repr, still))} will not move: a fraction of "
                          f"{rewiring.fraction} of each row rounds down to 0", stacklevel=2)
        with torch.no_grad():
            for name in self.masks:  # not a product, because NaN times zero is NaN
                self.layers[name].weight.masked_fill_(~self.masks[name], 0)
        self.done, self.fan_in, self._hooks = 0, {}, []
        self._record()
        weakref.finalize(self, _remove, self._hooks)  # the model may survive an interrupted training
        self._watch(1)

    def restore(self, masks, fan_in, done=0):
        """Continue from ``masks``, the history ``fan_in`` and the number ``done`` of finished steps.

        Load the state of the model, which includes fan-in layers, after creating the topology and before this
        call.
        """
        for name, mask in masks.items():
            self.masks[name].copy_(mask)
        self._remember()
        self.fan_in, self.done = dict(fan_in), done
        self._watch(done + 1)

    def step(self, optimizer, scaler=None):
        """Take the next step of the training: move connections if this is due, else step the optimizer and apply the
        masks.

        Call it when the gradients are computed; they may be the sum of several backward passes. A step that moves
        connections changes no other weight.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
        scaler : torch.amp.GradScaler, optional
            Steps the optimizer; call its ``update()`` afterwards as usual. It may already have unscaled the gradients
            for clipping. If they are not finite, connections that are due to move wait for the next step.

        Raises
        ------
        RuntimeError
            If growth needs gradients and there are none.

        Examples
        --------
        >>> from permask_core.pruning import random_masks
        >>> model = torch.nn.Linear(8, 4)
        >>> masks = random_masks({"weight": model.weight}, 0.25, seed=0)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> topology = Topology(model, masks, Rewiring("rigl", every=2), steps=8)
        >>> for _ in range(8):
        ...     for part in torch.randn(3, 16, 8):  # gradients accumulate
        ...         model(part).square().mean().backward()
        ...     topology.step(optimizer)
        ...     optimizer.zero_grad()
        >>> int(topology.masks["weight"].sum()), int(model.weight.count_nonzero())
        (8, 8)
        """
        if not self.due(self.done + 1):
            optimizer.step() if scaler is None else scaler.step(optimizer)
            self._apply_masks()
            self.done += 1
        elif scaler is None or _unscale(optimizer, scaler):
            self.rewire(self.done + 1, optimizer)
            self.done += 1
        self._watch(self.done + 1)

    def due(self, step):
        """:meth:`Rewiring.due`."""
        return self.rewiring.due(step, self.steps)

    @contextmanager
    def watching(self, step):
        """Return a context for the forward and backward passes of a step, if :meth:`rewire` is called instead of
        :meth:`step`. In a step that rewires, it records what fan-in layers need for their growth scores."""
        self._watch(step)
        try:
            yield
        finally:
            _remove(self._hooks)

    def _watch(self, step):
        _remove(self._hooks)
        if self.due(step) and self.rewiring.method == "srigl":
            layers = [self.layers[name] for name in self.moving]
            self._hooks += [layer.watch() for layer in layers if hasattr(layer, "watch")]

    def _remember(self):
        self._keep = [mask.to(self.layers[name].weight.dtype) for name, mask in self.masks.items()]

    @torch.no_grad()
    def _apply_masks(self):
        if self.masks:
            torch._foreach_mul_([self.layers[name].weight for name in self.masks], self._keep)

    @torch.no_grad()
    def rewire(self, step, optimizer=None):
        """Move the connections, by the gradients of this step if the method needs them.

        Dropped and grown weights and their optimizer state are set to 0; kept weights do not change. With several
        processes, the first one decides.

        Raises
        ------
        RuntimeError
            If growth needs gradients and a layer has none.
        """
        for i, name in enumerate(self.moving):
            layer = self.layers[name]
            active = layer.active()
            keep, grow = (part.to(active.rows.device) for part in of_first(self._step, i, name, active, step))
            layer.rewire(active, keep, grow, optimizer)
        self._record()

    def _step(self, i, name, active, step):
        layer, fraction = self.layers[name], self.rewiring.drop_fraction(step, self.steps)
        if self.rewiring.method == "set":
            generator = torch.Generator().manual_seed(mix_seed(self.seed, step, i))
            keep, grow = layer.set_step(active, fraction, generator)
        elif not layer.has_gradients():
            raise RuntimeError(f"{name!r} has no gradients for growth: expected the forward and backward passes of "
                               f"step {step} after the last call of step(), or inside watching({step}), "
                               "optimizer.zero_grad() after these passes, and a compiled model that calls hooks")
        elif self.rewiring.method == "rigl":
            keep, grow = rigl_step(active, layer.scores, fraction)
        else:
            min_salient = None if name in self.unablated else self.rewiring.min_salient
            keep, grow = srigl_step(active, layer.scores, fraction, self.budgets[name], min_salient)
        return keep.cpu(), grow.cpu()

    def _record(self):
        """Record the connections after they moved, for :meth:`_apply_masks`, and their numbers in :attr:`fan_in`."""
        self._remember()
        for name, layer in self.layers.items():
            now = layer.fan_in().repeat_interleave(getattr(layer, "size", 1)).to("cpu", torch.int32)[None]
            self.fan_in[name] = torch.cat([self.fan_in[name], now]) if name in self.fan_in else now


def _remove(hooks):
    while hooks:
        hooks.pop().remove()


def _unscale(optimizer, scaler):
    """Unscale the gradients unless the caller already has; return whether all are finite."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise
    gradients = (weight.grad for group in optimizer.param_groups for weight in group["params"])
    return all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


def constant_fan_in_masks(shapes, densities, *, seed, shared=1):
    """Draw random masks with the same number of kept weights in every row.

    Parameters
    ----------
    shapes : dict of str to torch.Tensor
        The tensors to mask [out, ...]; only their shapes are used.
    densities : float or dict of str to float
        Fraction kept, in (0, 1], for all tensors or by name. A row keeps floor(numel density) / out weights, rounded
        down, but at least one.
    seed : int
    shared : int
        Number of neighbouring rows with the same mask, as in :class:`Rewiring`.

    Returns
    -------
    Masks

    Raises
    ------
    ValueError
        If a density is missing or out of range, the seed is not an integer of at least 0, or ``shared`` not one of at
        least 1.

    Examples
    --------
    >>> constant_fan_in_masks({"weight": torch.empty(4, 6)}, 0.5, seed=0)["weight"].sum(1)
    tensor([3, 3, 3, 3])
    """
    check_integer("seed", seed, 0)
    check_integer("shared", shared, 1)
    generator, masks = torch.Generator().manual_seed(int(seed)), {}
    for name, budget in _budgets({name: tensor.numel() for name, tensor in shapes.items()}, densities).items():
        n_out, n_in = len(shapes[name]), shapes[name][0].numel()
        size = math.gcd(shared, n_out)
        columns = sample_columns(n_out // size, n_in, max(1, budget // n_out), generator=generator).long()
        columns = columns.repeat_interleave(size, 0)
        mask = torch.zeros(n_out, n_in, dtype=torch.bool).scatter_(1, columns, True)
        masks[name] = mask.view(shapes[name].shape)
    return masks


def _budgets(sizes, densities):
    """Return the number of connections of each layer, floor(size density)."""
    if not isinstance(densities, dict):
        densities = dict.fromkeys(sizes, densities)
    for name in sizes:
        density = densities.get(name)
        if not isinstance(density, Real) or isinstance(density, bool) or not 0 < density <= 1:
            raise ValueError(f"density of {name!r} is {density!r}: expected a number in (0, 1]")
    # In floating point 1 - 0.9 is less than 0.1, which must not remove a connection.
    return {name: int(size * densities[name] + 1e-6) for name, size in sizes.items()}
