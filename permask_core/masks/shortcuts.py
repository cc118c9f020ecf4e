"""Find the convolutions on shortcuts in the graph of a network: the only one on its branch of a sum, the other branch
being longer."""

import inspect

from torch import fx, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def join(prefix, name):
    """Return the name of a submodule below a prefix, which may be empty."""
    return f"{prefix}.{name}" if prefix else name


class _Tracer(fx.Tracer):
    """Traces a module with all its submodules, or only its own ``forward``."""

    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, module, name):
        return not self.whole or isinstance(module, CONVOLUTIONS) or super().is_leaf_module(module, name)


def _graph(module, whole):
    try:
        _, *options = inspect.signature(module.forward).parameters.values()
        defaults = {one.name: one.default for one in options if one.default is not one.empty}
        return _Tracer(whole).trace(module, defaults), None
    except Exception as error:  # tracing runs user code, which may raise anything
        return None, error


def _count(module):
    return sum(isinstance(one, CONVOLUTIONS) for one in module.modules())


def find_projections(module, prefix=""):
    """Return the names of the convolutions on shortcuts; a module that cannot be traced is traced part by part."""
    if _count(module) < 3:
        return []
    graph, _ = _graph(module, whole=True)
    if graph:
        return [join(prefix, name) for name in _lone_convolutions(module, graph)]
    found = [name for own, child in module.named_children() for name in find_projections(child, join(prefix, own))]
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return found
    graph, error = _graph(module, whole=False)
    if graph:
        return [*found, *(join(prefix, name) for name in _lone_convolutions(module, graph))]
    if any(isinstance(child, (nn.Sequential, *CONVOLUTIONS)) and _count(child) == 1 for child in module.children()):
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{prefix or 'the model'} ({type(module).__name__}) cannot be traced by torch.fx ("
                         f"{type(error).__name__}: {reason}), so its shortcuts are unknown: use prunable_weights("
                         "model, shortcuts=True, exclude=[...]), and pass its names to masks_of as weights") from error
    return found


def _lone_convolutions(module, graph):
    """Return the names of the convolutions, or of modules with one, that are the only one on a branch of a sum."""
    counts = {node: _count(module.get_submodule(node.target)) for node in graph.nodes if node.op == "call_module"}
    found = {}
    for node in graph.nodes:
        branches = node.all_input_nodes
        if getattr(node.target, "__name__", node.target) in ("add", "add_", "iadd") and len(branches) == 2:
            for branch, other in (branches, branches[::-1]):
                alone, inputs = _before_the_sum(branch, counts)
                if alone and _depth(graph, inputs, other, alone, counts) > 1:
                    found[alone.target] = None
    return list(found)


def _before_the_sum(branch, counts):
    """Return the node of the only convolution on a branch, or None, and the nodes before it where the branch may
    begin."""
    alone, inputs = None, set()
    while True:
        if alone:
            inputs.add(branch)
        if counts.get(branch):
            if alone or counts[branch] > 1:
                return alone, inputs
            alone = branch
        before = [node for node in branch.all_input_nodes if node.op != "get_attr"]
        if len(before) != 1:
            return alone, inputs
        branch = before[0]


def _depth(graph, inputs, end, alone, counts):
    """Return the number of convolutions on the longest path from ``inputs`` to ``end`` that avoids ``alone``."""
    depth = dict.fromkeys(inputs, 0)
    for node in graph.nodes:  # in topological order
        before = [depth[one] for one in node.all_input_nodes if one in depth]
        if before and node not in depth and node is not alone:
            depth[node] = max(before) + counts.get(node, 0)
    return depth.get(end, 0)
