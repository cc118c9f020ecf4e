"""Which axes of which tensors move together when hidden units are permuted.

A network computes the same function after its hidden units changed places, as long as every tensor that produces,
scales or reads a unit changes with it. A *group* holds all those places for one set of units. Groups are found by
running the traced graph on an example and following the unit axis from the layer that produces it to the layers that
read it. Plain feed-forward networks are followed: linear layers, convolutions, norms, elementwise functions, pooling
and flatten. Anything else that touches a unit axis is refused, since a wrong permutation would pass in silence.
"""

import operator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from permask_core.models import evaluating


class Entry(NamedTuple):
    """A place in a tensor of the ``state_dict``: unit i owns the indices ``positions[i]`` [block] along ``axis``.

    ``positions`` is an int64 tensor [size, block]: block 1 for a plain channel, height x width after a flatten.
    """

    tensor: str
    axis: int
    positions: torch.Tensor


class Tap(NamedTuple):
    """A place in the graph where a group's activations can be read: the ``side`` ("input" or "output") of a module.

    ``axis`` and ``positions`` say where in that activation the units are, as in :class:`Entry`.
    """

    module: str
    side: str
    axis: int
    positions: torch.Tensor


class Group(NamedTuple):
    """``size`` units that move together, the tensor ``entries`` that hold them and the ``taps`` where they can be
    read."""

    size: int
    entries: tuple[Entry, ...]
    taps: tuple[Tap, ...]


class _Units(NamedTuple):
    """What is known of an activation: the group of its units, where they lie, and the tap that reads them best."""

    group: str
    axis: int
    positions: torch.Tensor
    tap: Tap | None


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAST_AXIS_NORMS = (nn.LayerNorm, nn.RMSNorm)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
                nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign)
# A softmax is not elementwise, but permuting what goes in permutes what comes out, along whichever axis it works.
_UNCHANGED = (nn.Softmax, nn.LogSoftmax, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
          nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
          nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_ELEMENTWISE = {torch.relu, torch.relu_, torch.tanh, torch.sigmoid, F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu,
                F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish, F.softplus, F.tanh, F.sigmoid, F.dropout, F.softmax,
                F.log_softmax, "relu", "relu_", "tanh", "sigmoid", "softmax", "log_softmax", "contiguous"}
_POOLING = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
            F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
            F.adaptive_max_pool3d}
_RESHAPES = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}
_SHAPE_QUERIES = {"size", "dim", getattr, operator.getitem}


def permutation_groups(model, example_input):
    """Find the groups of a network by tracing it.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it was, its modes and statistics included.
    example_input : torch.Tensor
        A batch that the model accepts; only its shape matters.

    Returns
    -------
    dict of str to Group
        By the name of the layer that produces the units, in the order of the computation. Units that reach the output
        are fixed and in no group.

    Raises
    ------
    ValueError
        If the model cannot be traced, or an operation touches hidden units in a way that cannot be followed; the
        message names the operation. Groups may then be written by hand: a dict of :class:`Group`.
    """
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the user's own code, which may raise anything
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.fx ({error}): {_BY_HAND}") from error
    follower = _Follower(graph)
    with evaluating(model):
        try:
            follower.run(example_input)
        except _Refused as error:  # without what the interpreter adds to the message
            raise ValueError(error.why) from None
    groups = {name: Group(draft["size"], tuple(draft["entries"]), tuple(draft["taps"]))
              for name, draft in follower.drafts.items() if name not in follower.fixed}
    _refuse_tied(model, groups)
    return groups


def _refuse_tied(model, groups):
    """Raise ValueError if an entry's tensor is computed from others, or is another one under a second name."""
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    own = {same[0] for same in names.values() if len(same) == 1}
    for group in groups.values():
        for entry in group.entries:
            if entry.tensor not in own:
                same = next((", ".join(same) for same in names.values() if entry.tensor in same), "")
                raise ValueError(f"{entry.tensor!r} is {f'tied: {same}' if same else 'computed from other tensors'}, "
                                 f"which is not followed: {_BY_HAND}")


_BY_HAND = "write the groups by hand, as a dict of permask_core.matching.Group"


class _Refused(ValueError):
    def __init__(self, why):
        super().__init__(why)
        self.why = why


class _Follower(fx.Interpreter):
    """Runs the graph on the example and keeps, for each activation, where its units are."""

    def __init__(self, graph):
        super().__init__(graph)
        self.drafts, self.fixed, self.units = {}, set(), {}
        calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
        self.shared = {name for name in calls if calls.count(name) > 1}

    def run_node(self, node):
        value = super().run_node(node)
        followed = [self.units[n] for n in node.all_input_nodes if n in self.units]
        if node.op == "output":
            self.fixed |= {units.group for units in followed}
        elif node.op == "call_module":
            units = self._module(node, self.module.get_submodule(node.target), followed, value)
        elif followed:
            units = self._function(node, followed, value)
        else:
            units = None
        if node.op != "output" and units is not None:
            self.units[node] = units
        return value

    def _module(self, node, module, followed, value):
        name = node.target
        units = followed[0] if followed else None
        last = value.ndim - 1 if isinstance(value, torch.Tensor) else None
        if units is not None and units.tap is None and name not in self.shared:
            units = units._replace(tap=Tap(name, "input", units.axis, units.positions))
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            axis = last if isinstance(module, nn.Linear) else 1
            if value.ndim < (2 if isinstance(module, nn.Linear) else module.weight.ndim):
                self._refuse(node, f"gives {list(value.shape)}, without a batch axis")
            if name in self.shared or getattr(module, "groups", 1) != 1:
                self._refuse(node, "is called twice" if name in self.shared else "has grouped channels")
            if units is not None:
                self._expect(node, units, axis)
                self.drafts[units.group]["entries"].append(Entry(f"{name}.weight", 1, units.positions))
                if units.tap is not None and units.tap not in self.drafts[units.group]["taps"]:
                    self.drafts[units.group]["taps"].append(units.tap)
            positions = torch.arange(value.shape[axis])[:, None]
            tensors = ["weight"] + ["bias"] * (module.bias is not None)
            self.drafts[name] = {"size": len(positions), "taps": [],
                                 "entries": [Entry(f"{name}.{tensor}", 0, positions) for tensor in tensors]}
            return _Units(name, axis, positions, Tap(name, "output", axis, positions))
        if units is None:
            return None
        if isinstance(module, (*_BATCH_NORMS, *_LAST_AXIS_NORMS)) and name not in self.shared:
            self._expect(node, units, 1 if isinstance(module, _BATCH_NORMS) else last)
            if isinstance(module, _LAST_AXIS_NORMS) and len(module.normalized_shape) > 1:
                self._refuse(node, f"normalises over the last {len(module.normalized_shape)} axes")
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                if getattr(module, tensor, None) is not None:
                    self.drafts[units.group]["entries"].append(Entry(f"{name}.{tensor}", 0, units.positions))
            return units._replace(tap=Tap(name, "output", units.axis, units.positions))
        if isinstance(module, _ACTIVATIONS):
            tap = None if name in self.shared else Tap(name, "output", units.axis, units.positions)
            return units._replace(tap=tap)
        if isinstance(module, _UNCHANGED):
            return units
        if isinstance(module, _POOLS):
            return self._pool(node, units)
        if isinstance(module, nn.Flatten):
            return self._flatten(node, units, value)
        return self._refuse(node, "cannot be followed")

    def _function(self, node, followed, value):
        if not isinstance(value, torch.Tensor) and node.target in _SHAPE_QUERIES:
            return None
        if len(followed) == 1:
            if node.target in _ELEMENTWISE:
                return followed[0]._replace(tap=None)  # read at the input of the next module
            if node.target in _POOLING:
                return self._pool(node, followed[0])
            if node.target in _RESHAPES:
                return self._flatten(node, followed[0], value)
        return self._refuse(node, "cannot be followed")

    def _pool(self, node, units):
        self._expect(node, units, 1)
        return units

    def _flatten(self, node, units, value):
        before = self.env[node.all_input_nodes[0]].shape
        if value.shape == before:
            return units
        if units.axis != 1 or len(before) < 2 or tuple(value.shape) != (before[0], before[1:].numel()):
            self._refuse(node, f"turns {list(before)} into {list(value.shape)}")
        block = before[2:].numel()
        positions = (units.positions[:, :, None] * block + torch.arange(block)).flatten(1)
        return units._replace(positions=positions)

    def _expect(self, node, units, axis):
        if units.axis != axis:
            self._refuse(node, f"works along axis {axis}, the units of {units.group!r} lie along axis {units.axis}")

    def _refuse(self, node, why):
        module = f" ({type(self.module.get_submodule(node.target)).__name__})" if node.op == "call_module" else ""
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        raise _Refused(f"operation {target!r}{module} {why}: {_BY_HAND}")


def check_groups(groups, tensors, *, whole=False):
    """Raise ValueError, naming the first offending key and axis with both sizes, unless the groups fit.

    Parameters
    ----------
    groups : dict of str to Group
    tensors : dict of str to torch.Tensor
        A ``state_dict``, or masks: what the groups name and it does not hold is passed over, but it must hold
        something of them.
    whole : bool
        It must hold all of them.
    """
    covered = {}
    for name, group in groups.items():
        for tensor, axis, positions in group.entries:
            if positions.ndim != 2 or len(positions) != group.size:
                raise ValueError(f"group {name!r} has {group.size} units, its entry for {tensor!r} along axis {axis} "
                                 f"has positions of shape {list(positions.shape)}: expected [{group.size}, block]")
            if whole and tensor not in tensors:
                raise ValueError(f"group {name!r} names {tensor!r}, which is none of {', '.join(tensors)}")
            if tensor in tensors:
                covered.setdefault((tensor, axis), []).append(positions.flatten())
    if groups and not covered:
        named = dict.fromkeys(entry.tensor for group in groups.values() for entry in group.entries)
        raise ValueError(f"the groups name none of the tensors {', '.join(tensors) or '(there are none)'}: expected "
                         f"some of {', '.join(named)}")
    for (tensor, axis), positions in covered.items():
        shape = list(tensors[tensor].shape)
        if axis >= len(shape):
            raise ValueError(f"the groups use axis {axis} of {tensor!r}, whose shape is {shape}")
        positions = torch.cat(positions)
        if not torch.equal(positions.sort().values, torch.arange(shape[axis])):
            raise ValueError(f"the groups place {len(positions)} indices (up to {int(positions.max())}) along axis "
                             f"{axis} of {tensor!r}, whose shape is {shape}: expected each of {shape[axis]} once")
