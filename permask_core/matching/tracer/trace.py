"""Find the permutation groups of any network by tracing it operation by operation.

The network is exported to a graph of tensor operations (torch.export). Every index along an axis of a parameter is a
vertex (see the module symmetry). An activation has, for some of its axes, the vertices that its indices represent: the
output of a linear layer has those of the rows of its weight. Each operation determines which indices are the same unit
(a sum of two activations, a product with a weight), which are parts of a whole (an attention head, a group of
channels), and which are fixed because their order matters (the pixels of a convolution). An operation without a rule
fixes everything that it touches, and one without a result, such as an assertion, nothing. Operations on constants are
computed: equal numbers are interchangeable. A network may thus have fewer permutations than possible, but never a wrong
one.
"""

import contextlib
import io
import itertools
import logging
import operator
import re
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from permask_core.data.batches import arguments
from permask_core.matching.checking import check_function, copied, named_tensors
from permask_core.matching.groups import Entry, Fixed, Group, Groups, Tap, shortened
from permask_core.matching.tracer.rules import KERNEL, RULES, pointwise, same, without_unread
from permask_core.matching.tracer.symmetry import Site, orbits
from permask_core.matching.tracer.values import Algebra, Bundle, NoRule, Value, constant_of, value_of
from permask_core.models import evaluation_mode

CONSTANT = "they meet a constant"
BY_HAND = ("groups can be written by hand, as a dict of permask_core.matching.Group, and tested with "
           "permask_core.matching.check_function")


def permutation_groups(model, example_input, *, check=False, outputs=None):
    """Find the permutation groups of a network.

    Parameters
    ----------
    model : torch.nn.Module
        Traced in evaluation mode; its modes and statistics do not change.
    example_input : torch.Tensor, tuple or dict
        A batch for the model (a tuple of its arguments, or a dict of its keyword arguments). Only the shapes matter,
        unless the model's control flow depends on values.
    check : bool
        Whether to test the result with :func:`permask_core.matching.check_function`, which runs a copy of the model in
        float64 twice.
    outputs : function, optional
        A function of the model's result, which returns the part that permutations must preserve, such as
        ``lambda result: result["logits"]``; by default all of it. All other results may then have permuted units.

    Returns
    -------
    Groups
        Groups by name of the layer that produces the units, in the order of the computation. Units that reach the
        output and units in an operation without a rule are in no group; ``fixed`` lists them with the reason.

    Raises
    ------
    ValueError
        If the model cannot be exported; the message has the reason. With ``check``, if a permutation changes the
        function.

    Examples
    --------
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(permutation_groups(model, torch.zeros(1, 4)).describe())
    0: 8 units
        0.weight[0], 0.bias[0], 2.weight[1]
    fixed, they meet the network's input:
        0.weight[1] (4)
    fixed, they reach the network's output:
        2.weight[0] (2), 2.bias[0] (2)
    """
    with evaluation_mode(model):
        twin = model
        with contextlib.suppress(ValueError):  # the export may leave tensors without values in the caches of a network
            twin = copied(model, share=True)
        tracer = _Tracer(model, _exported(twin, *arguments(example_input)), outputs)
    tracer.run()
    groups = tracer.groups()
    if check:
        check_function(groups, model, example_input, outputs=outputs)
    return groups


def _exported(model, args, kwargs):
    fast, silent = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path is one opaque operation, which cannot be traced
    logging.disable()  # the exception has the reason; PyTorch would also print the partial graph
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, kwargs, strict=False)
            replaced = _out_of_place(program.graph)
            unknown = {node.target for node in program.graph.nodes if _computes(node)
                       and not _has_rule(replaced.get(node, node.target))}
            if not unknown:
                _replace(program.graph, replaced)
                return program
            # Replaces in-place operations on views, and those that PyTorch composes of others, such as the alias
            # multiply; takes half of the time of tracing.
            known = torch.export.default_decompositions()
            return program.run_decompositions({target: known[target] for target in unknown if target in known})
    except Exception as error:  # tracing runs user code, which may raise anything
        reason = shortened(error) or type(error).__name__
        if place := re.search(r'raised this error:\s*File "(.+)", line (\d+).*\n\s*(.+)', str(error)):
            reason += f" in {Path(place[1]).name}, line {place[2]}: {place[3]}"
        if _packs(error):
            reason = ("the shapes in a PackedSequence depend on values: expected recurrent layers that read the padded "
                      f"tensor, which have the same groups ({reason})")
        raise ValueError(f"{type(model).__name__} cannot be traced by torch.export: {type(error).__name__}: {reason}. "
                         f"Its {BY_HAND}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        logging.disable(silent)


def _out_of_place(graph):
    """Return, for the in-place operations on memory that has no views and is no input, the same operations that return
    a new tensor, {node: operation}."""
    owners = defaultdict(list)  # nodes by the memory of their results
    for node in graph.nodes:
        for memory in set(map(_storage, pytree.tree_leaves(node.meta.get("val")))) - {None}:
            owners[memory].append(node)
    found = {}
    for first, *others in owners.values():
        targets = {node: _functional(node, first) for node in others}
        if others and first.op == "call_function" and isinstance(first.meta["val"], torch.Tensor) and all(
                targets.values()):
            found |= targets
    return found


def _functional(node, first):
    """Return the operation without its change of ``self``, a tensor of the shape of the node ``first``; or None."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not re.fullmatch(r"aten::[a-z]\w*_", schema.name) or node.kwargs.get("out") is not None or [
            argument.name for argument in schema.arguments if argument.is_write] != ["self"] or not isinstance(
            node.args[0], torch.fx.Node) or _shape(node.args[0]) != _shape(first):
        return None
    return getattr(getattr(torch.ops.aten, _name(node.target)[:-1], None), node.target._overloadname, None)


def _replace(graph, targets):
    """Replace in-place operations by ``targets``, {node: operation}, and what reads the memory after one by a reader of
    its result."""
    latest = {}
    for node in graph.nodes:
        node.args, node.kwargs = (torch.fx.map_arg(given, lambda n: latest.get(_storage(n.meta.get("val")), n))
                                  for given in (node.args, node.kwargs))
        if node in targets:
            node.target = targets[node]
            latest[_storage(node.meta["val"])] = node


def _shape(node):
    return getattr(node.meta.get("val"), "shape", None)


def _storage(value):
    """Return a key for the memory of a tensor, which is the same for its views; None for all other values."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if dense else None


def _packs(error):
    """Whether an error was raised in a function that has a packed sequence."""
    while error is not None:
        if any(isinstance(value, PackedSequence) for frame, _ in traceback.walk_tb(error.__traceback__)
               for value in frame.f_locals.values()):
            return True
        error = error.__cause__ or error.__context__
    return False


def _computes(node):
    """Whether a node is an operation with a result; assertions have none."""
    return node.op == "call_function" and node.meta.get("val") is not None


def _name(target):
    schema = getattr(target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema else str(target)


def _rule(target):
    """Return the rule of an operation, or None."""
    return RULES.get(_name(target), pointwise if torch.Tag.pointwise in getattr(target, "tags", ()) else None)


def _has_rule(target):
    if target is operator.getitem:
        return True
    schema = getattr(target, "_schema", None)
    known = schema is not None and (schema.name.startswith("aten::") or schema.name in RULES)
    return known and not schema.is_mutable and bool(_rule(target))


class _Tracer(Algebra):
    """Walks the graph in order; ``values`` has the value of the result of every node, ``known`` the results that do not
    depend on inputs and parameters."""

    def __init__(self, model, program, outputs=None):
        self.results = _results(program, outputs)
        self.graph, self.signature = program.graph, program.graph_signature
        for node in reversed(self.graph.nodes):
            if node.op == "call_function" and not _computes(node) and not node.users:
                self.graph.erase_node(node)
            elif node.op == "call_function" and node.args:
                without_unread(node, _rule(node.target))
        self.graph.eliminate_dead_code()
        super().__init__()
        self.values, self.parameters, self.known, self.taps, self.products = {}, {}, {}, [], []
        self.axes, self.calls = {}, Counter()  # vertices of (tensor, axis, rows); number of operations by module
        self.tensors = {**self.signature.inputs_to_parameters, **self.signature.inputs_to_buffers,
                        **self.signature.inputs_to_lifted_tensor_constants}
        state, firsts = named_tensors(model), {}
        self.constants = {name: tensor for name, tensor in program.constants.items()
                          if name not in state and isinstance(tensor, torch.Tensor) and not tensor.is_meta}
        self.masks, parameters = self._masks(), {id(parameter) for parameter in model.parameters()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()
                       if id(tensor) in parameters or name in self.masks or _moves(tensor)}
        self.first = {name: firsts.setdefault(_memory(state[name]), name) for name in self.shapes}
        self.overlapping = _overlapping({name: state[name] for name in firsts.values()})

    def _masks(self):
        """Return the names of buffers that an elementwise operation combines with weights of their shape."""
        names, weights, masks, found = self.signature.inputs_to_buffers, set(), {}, set()
        for node in self.graph.nodes:
            inputs, result = node.all_input_nodes, node.meta.get("val")
            if node.name in self.signature.inputs_to_parameters:
                weights.add(node)
            elif node.name in names:
                masks[node] = {names[node.name]}
            elif inputs and isinstance(result, torch.Tensor) and all(n in masks or n in weights for n in inputs):
                met = set().union(*(masks.get(n, ()) for n in inputs if n.meta["val"].shape == result.shape))
                if not weights.intersection(inputs):
                    masks[node] = met
                else:
                    weights.add(node)
                    found |= met if _rule(node.target) is pointwise else set()
        return found

    def run(self):
        for node in self.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            self.module, self.node, self.name = list(stack.values())[-1][0] if stack else "", node, node.name
            if node.op == "placeholder":
                tensor = self.tensors.get(node.name)
                if tensor in self.first:
                    self.parameters[node] = self.first[tensor]
                elif tensor in self.constants:
                    self._record(node, self.constants[tensor])
                elif isinstance(node.meta.get("val"), torch.Tensor):
                    known = node.name in self.signature.user_inputs
                    self.values[node] = self._inert(node.meta["val"], "they meet the network's input" if known
                                                    else CONSTANT)
            elif node.op == "call_function":
                self.calls[self.module] += node.target is not operator.getitem
                if (result := self._known(node)) is not None:
                    self._record(node, result)
                else:
                    self.values[node] = self._call(node)
            elif node.op == "output":
                self.fix(self._tensors(self.results), "they reach the network's output")

    def _record(self, node, result):
        """Note that the result of a node is known."""
        self.known[node] = result
        self.values[node] = pytree.tree_map(
            lambda t: constant_of(t, CONSTANT) if isinstance(t, torch.Tensor) else None, result)

    def _known(self, node):
        """Return the result of an operation on constants, or None if it is not one."""
        own = node.target is operator.getitem or str(node.target).startswith("aten.")
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or "empty" in str(node.target)
        if not own or random or not self.known.keys() >= set(node.all_input_nodes):
            return None
        given = torch.fx.map_arg(node.args, self.known.get)
        if given[:1] == (None,):  # torch.export omits a tensor that copy overwrites; torch crashes on it
            if _name(node.target) != "copy":
                return None
            given = torch.empty(node.meta["val"].shape, dtype=node.meta["val"].dtype), *given[1:]
        try:
            with torch.no_grad():
                result = node.target(*given, **torch.fx.map_arg(node.kwargs, self.known.get))
            return None if any(t.is_meta for t in pytree.tree_leaves(result)) else result
        except (RuntimeError, TypeError, NotImplementedError, AttributeError):
            return None

    def _call(self, node):
        if node.target is operator.getitem:
            value = self.values[node.args[0]]
            return value[node.args[1]] if isinstance(value, (list, tuple)) and not isinstance(value, Value) else value
        name = _name(node.target)
        self.at = f"{name} in {self.module}" if self.module else name
        results = node.meta.get("val")
        for result in pytree.tree_leaves(results):
            if isinstance(result, torch.Tensor) and any(not isinstance(n, int) for n in result.shape):
                raise ValueError(f"{self.at} gives a shape that depends on values: it cannot be traced. Its {BY_HAND}")
        shape = tuple(results.shape) if isinstance(results, torch.Tensor) else None
        try:
            if not _has_rule(node.target) or not isinstance(results, (torch.Tensor, list, tuple)):
                raise NoRule
            schema = node.target._schema
            given = {a.name + "_" * (a.name in ("self", "shape")): a.default_value for a in schema.arguments}
            given |= dict(zip(given, node.args)) | node.kwargs
            if _rule(node.target) is same and node.args[0] in self.parameters:  # a cast of a parameter
                self.parameters[node] = self.parameters[node.args[0]]
            value = _rule(node.target)(self, shape=shape, **given)
            for one, result in zip(pytree.tree_leaves([value], is_leaf=lambda v: isinstance(v, Value)),
                                   pytree.tree_leaves(results)):
                if isinstance(one, Value) and one.shape != tuple(result.shape):
                    raise NoRule
            return value
        except (NoRule, TypeError, ValueError, LookupError, AttributeError):  # a form that no rule covers
            self.fix(self._tensors([*node.args, *node.kwargs.values()]), why := f"{name} is not supported")
            return pytree.tree_map(lambda result: self._inert(result, why), results)

    @staticmethod
    def _inert(result, why):
        return value_of(result.shape, why=why) if isinstance(result, torch.Tensor) else None

    def value(self, node):
        """Return the value of an argument: that of a node, the vertices of a parameter, or None if it is not a
        tensor."""
        if node in self.parameters:
            name = self.parameters[node]
            shape = self.shapes[name]
            return value_of(shape, [Bundle((a,), self.vertices(name, a), np.zeros(n, np.int64))
                                    for a, n in enumerate(shape) if n > 1])
        return self.values.get(node)

    def _tensors(self, arguments):
        nodes = [a for a in pytree.tree_leaves(list(arguments)) if isinstance(a, torch.fx.Node)]
        return [value for node in nodes if isinstance(value := self.value(node), Value)]

    def vertices(self, name, axis, rows=None):
        key = Site(name, axis, rows)
        if key not in self.axes:
            self.axes[key] = self.structure.axis(key, self.shapes[name][axis])
            if name in self.overlapping:
                self.structure.fix(self.axes[key], "their memory belongs to another tensor too")
        return self.axes[key]

    def along(self, value, axis, *parameters):
        """Apply an elementwise operation with ``parameters``, tensors [n] along one axis or None."""
        vectors = [v.placed([axis], value.shape) for p in parameters if (v := self.value(p)) is not None]
        return self.join(value.shape, [value, *vectors])

    def tap(self, weight, side, value, axis):
        """Record that the product with this weight, and the module that owns it, have the value at the input or
        output."""
        bundles = [bundle for bundle in value.bundles if bundle.axes == (axis,)]
        if self.parameters.get(weight) in (f"{self.module}.weight", "weight"):
            self.taps += [(self.module, side, axis, bundle, self.node.args[0] if side == "input" else self.node, 0)
                          for bundle in bundles if self.module]
        whole, start = _rows(weight)
        if whole.op == "placeholder" and len(weight.users) == 1 and (side == "output" or whole is weight):
            self.products += [(self.parameters.get(whole), side, axis - len(value.shape), bundle, self.node, start)
                              for bundle in bundles]

    def groups(self):
        """Return the orbits as groups with names and taps."""
        for (name, axis, rows), vertices in self.axes.items():
            if rows is not None and (name, axis, None) in self.axes:  # restricted to rows here, whole elsewhere
                for clash in (vertices, self.axes[name, axis, None]):
                    self.structure.fix(clash, "their tensor is used in two forms")
        found, unit, fixed = orbits(self.structure)
        owners = defaultdict(list)
        for i, orbit in enumerate(found):
            for part, number in orbit.numbers.items():
                owners[part].append((i, number))
        taps = self._taps(found, owners, unit)
        aliases = defaultdict(list)
        for name, first in self.first.items():
            aliases[first].append(name)
        names, result = _names(found, self.masks), {}
        for i, orbit in enumerate(found):
            entries = [Entry(name, site.axis, _positions(places, self.shapes[name][site.axis]), site.rows)
                       for site, places in orbit.places.items() for name in aliases[site.tensor]]
            result[names[i]] = (len(next(iter(orbit.places.values()))), tuple(entries), taps[i], orbit.within)
        counts = Counter((site.tensor, site.axis, fixed[vertex]) for site, vertices in self.axes.items()
                         for vertex in vertices.tolist() if vertex in fixed and fixed[vertex] != KERNEL)
        used = {name for node, name in self.parameters.items() if node.users}
        idle = [Fixed(name, 0, self.shapes[name][0], "they are not used in evaluation mode")
                for name, first in self.first.items() if name == first and name not in used and self.shapes[name]]
        return Groups({name: Group(size, entries, taps, within and (names[within[0]], within[1]))
                       for name, (size, entries, taps, within) in result.items()},
                      [*(Fixed(tensor, axis, count, why) for (tensor, axis, why), count in counts.items()), *idle])

    def _taps(self, found, owners, unit):
        """Return, for each orbit, the inputs of the modules that read its units, or outputs if there are none, or those
        of products with a parameter."""
        users = Counter()
        for node, name in self.parameters.items():
            users[name] += len(node.users)
        modules = self._taps_at([tap for tap in self.taps if self.calls[tap[0]] == 1], found, owners, unit)
        if all(modules):
            return modules
        products = self._taps_at([tap for tap in self.products if users[tap[0]] == 1], found, owners, unit)
        return [tap or product for tap, product in zip(modules, products)]

    @staticmethod
    def _taps_at(places, found, owners, unit):
        taps = [{"input": {}, "output": {}} for _ in found]
        for name, side, axis, bundle, node, start in places:
            where = defaultdict(lambda: defaultdict(list))
            order = np.argsort(bundle.tags, kind="stable")
            for index in order.tolist():
                if (vertex := bundle.vertices[index]) >= 0:
                    for orbit, number in owners[unit[vertex]]:
                        where[orbit][number].append(index)
            for orbit, positions in where.items():
                rows = [positions[number] for number in range(max(found[orbit].numbers.values()) + 1)]
                if len(set(map(len, rows))) == 1:
                    rows = _positions(np.array(rows) + start, bundle.vertices.size)
                    taps[orbit][side].setdefault(node, Tap(name, side, axis, rows))
        return [tuple((tap["input"] or tap["output"]).values()) for tap in taps]


def _results(program, outputs):
    """Return the nodes of a graph that give the chosen results, and those that give new values of buffers."""
    (nodes,) = program.graph.output_node().args
    own = program.graph_signature.user_outputs
    first = len(nodes) - len(own)  # new values of buffers come before the results of the model
    result = pytree.tree_unflatten(nodes[first:], program.call_spec.out_spec)
    return [*nodes[:first], *pytree.tree_leaves(outputs(result) if outputs else result)]


def _rows(node):
    """Return the tensor of which a node gives some rows, and the first of them; or the node itself, and 0."""
    if node.target is operator.getitem and (split := node.args[0]).op == "call_function":
        parts, index = split.meta["val"], node.args[1]
        if _name(split.target) in ("split", "split_with_sizes", "chunk") and (*split.args, 0, 0)[2] == 0:
            return split.args[0], sum(part.shape[0] for part in parts[:index])
    return node, 0


def _moves(buffer):
    """Whether a buffer has units, like BatchNorm's statistics; a table of indices or coordinates is a constant."""
    return buffer.is_floating_point() and sum(n > 1 for n in buffer.shape) <= 1


def _memory(tensor):
    """Return a key that is equal for two names of one tensor."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _overlapping(tensors):
    """Return the names of tensors that partly share memory with another tensor."""
    spans, shared = defaultdict(list), set()
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta:
            start = tensor.data_ptr()
            length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
            spans[tensor.device].append((start, start + length * tensor.element_size(), name))
    for on_device in spans.values():
        end, last = 0, ""
        for start, stop, name in sorted(on_device):
            shared |= {name, last} if start < end else set()
            end, last = max((end, last), (stop, name))
    return shared


def _positions(places, length):
    """Return positions for :class:`Entry`: None if the units cover the axis with one index each."""
    if places.shape == (length, 1) and (places[:, 0] == np.arange(length)).all():
        return None
    return torch.from_numpy(places.astype(np.int64))


def _names(found, masks):
    """Return names: the layer that produces the units or, for parts of a unit, the group and the number of the unit."""
    names, taken = {}, set()

    def name(i):
        if i not in names:
            places, _, within = found[i]
            if within is not None:
                base = f"{name(within[0])}/{within[1]}"
            else:
                site = min(places, key=lambda site: (site.tensor in masks, site.axis != 0))
                base = site.tensor.removesuffix("_orig").removesuffix("weight").removesuffix("bias")
                base = base.rstrip("._") or site.tensor
            same = (base if number == 1 else f"{base}#{number}" for number in itertools.count(1))
            names[i] = next(candidate for candidate in same if candidate not in taken)
            taken.add(names[i])
        return names[i]

    return [name(i) for i in range(len(found))]
