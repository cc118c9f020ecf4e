"""Masks: which weights of a network are there.

A mask set is a plain dict from the keys of a ``state_dict`` to bool tensors of the same shape, True where the weight
is kept. Sparsity is always the fraction of zeros among the *masked* weights: biases, norms and everything else that
has no mask is not in the denominator.

In reading order: which weights may be pruned, reading the masks of a network that others have pruned, counting,
applying, watching that pruned weights remain zero, and files.
"""

import inspect
import json
import re
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_post_hook

from permask_core.runs.files import digest, load_tensors, save_tensors
from permask_core.runs.store import commit, plain, versions

Masks = dict[str, torch.Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
SHORTCUT = "a projection on a shortcut"


def prunable_weights(model, *, shortcuts=False, exclude=()):
    """The weights that may be pruned: of linear layers, convolutions and attention, stem and classifier included.

    Parameters
    ----------
    model : torch.nn.Module
    shortcuts : bool
        Whether projections on shortcuts are among them, as the literature on dynamic sparse training has it. A
        convolution is one if it is alone on its branch of a sum, and the other branch leads from the same input through
        at least two convolutions. ``torch.fx`` finds the sums, without an example input; a module may name its
        projections instead, in an attribute ``shortcut_weights``.
    exclude : iterable of str
        Names of weights that remain dense, or of modules whose weights do. A module may name its own in an attribute
        ``dense_weights``.

    Returns
    -------
    dict of str to torch.Tensor
        Keyed like the ``state_dict`` of the unpruned network, detached, sharing memory with the model. A weight that
        two layers share is listed once. The axes are the layer's own: a linear layer or a convolution has its outputs
        first, a transposed convolution and transformers' ``Conv1D`` have their inputs first. :func:`unprunable` says
        what is left out, and why.

    Raises
    ------
    ValueError
        If ``exclude`` names no prunable weight, or shortcuts are to be found in a module that has convolutions and
        cannot be traced.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    >>> list(prunable_weights(model)), list(prunable_weights(model, exclude=["0"]))
    (['0.weight', '3.weight'], ['3.weight'])
    """
    return {name: weight.detach() for name, (weight, why) in _weights(model, shortcuts, exclude).items() if not why}


def unprunable(model, *, shortcuts=False, exclude=()):
    """Why the other weights remain dense, a dict of str to str.

    These are the parameters of two or more axes that :func:`prunable_weights` leaves out with the same arguments:
    embeddings, recurrent layers, experts packed into one parameter, anything that a module defines itself.

    Examples
    --------
    >>> unprunable(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))
    {'0.weight': 'a parameter of Embedding'}
    """
    return {name: why for name, (_, why) in _weights(model, shortcuts, exclude).items() if why}


def _weights(model, shortcuts, exclude):
    """{name: (weight, why it remains dense or None)} of all weights of two or more axes, the prunable ones first."""
    if isinstance(exclude, str):
        raise ValueError(f"exclude is {exclude!r}: expected a list of names")
    parameters, (_, stored) = dict(model.named_parameters(remove_duplicate=False)), _tensors_and_masks(model)
    found, listed = {}, set()
    for prefix, module in model.named_modules():
        for own in _own_weights(module):
            name, weight = _joined(prefix, own), getattr(module, own)
            is_tensor = name in parameters or name in stored  # or it is computed, as by weight norm
            if is_tensor and id(weight) not in listed:
                found[name] = (weight, None)
                listed.add(id(weight))
    for name in exclude:
        if not any(f"{key}.".startswith(f"{name}.") for key in found):
            raise ValueError(f"{name!r} has no prunable weight: expected some of {', '.join(found)}")
    left = {"its module keeps it dense": _declared(model, "dense_weights"), "it is excluded": exclude}
    if not shortcuts:
        left[SHORTCUT] = _declared(model, "shortcut_weights") or _projections(model)
    for why, names in left.items():
        found |= {key: (weight, why) for key, (weight, _) in found.items()
                  if any(f"{key}.".startswith(f"{name}.") for name in names)}
    for key, parameter in parameters.items():
        name, _ = _unpruned(key, parameters.keys() | {f"{name}_mask" for name in stored})
        if parameter.ndim > 1 and id(parameter) not in listed and name not in found:
            owner = model.get_submodule(key.rpartition(".")[0])
            found[name] = (parameter, f"a parameter of {type(owner).__name__}")
            listed.add(id(parameter))
    return found


def _own_weights(module):
    """The names of the weights in a module itself that may be pruned."""
    if isinstance(module, nn.MultiheadAttention):  # the output's projection is a linear layer in it
        return [name for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
                if getattr(module, name) is not None]
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__}
    return ["weight"] * (isinstance(module, (nn.Linear, *CONVOLUTIONS)) or "transformers.pytorch_utils.Conv1D" in names)


def _declared(model, attribute):
    return [_joined(prefix, name) for prefix, module in model.named_modules()
            for name in getattr(module, attribute, ())]


def _joined(prefix, name):
    return f"{prefix}.{name}" if prefix else name


class _Tracer(fx.Tracer):
    """Traces a module with all that it calls, or only its own ``forward``."""

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
    except Exception as error:  # tracing runs the user's own code, which may raise anything
        return None, error


def _count(module):
    return sum(isinstance(one, CONVOLUTIONS) for one in module.modules())


def _projections(module, prefix=""):
    """The names of the convolutions on shortcuts. Where a whole cannot be traced, its parts are, one by one."""
    if _count(module) < 3:
        return []
    graph, _ = _graph(module, whole=True)
    if graph:
        return [_joined(prefix, name) for name in _lone_convolutions(module, graph)]
    found = [name for own, child in module.named_children() for name in _projections(child, _joined(prefix, own))]
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return found
    graph, error = _graph(module, whole=False)
    if graph:
        return [*found, *(_joined(prefix, name) for name in _lone_convolutions(module, graph))]
    if any(isinstance(child, (nn.Sequential, *CONVOLUTIONS)) and _count(child) == 1 for child in module.children()):
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{prefix or 'the model'} ({type(module).__name__}) cannot be traced by torch.fx ("
                         f"{type(error).__name__}: {reason}), so that its shortcuts are unknown: use prunable_weights("
                         "model, shortcuts=True, exclude=[...]), whose names masks_of takes as weights") from error
    return found


def _lone_convolutions(module, graph):
    """The names of the convolutions, or of modules with one, that are alone on a branch of a sum."""
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
    """The node of the only convolution of a branch, or None, and the nodes before it where the branch may begin."""
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
    """How many convolutions there are on the longest path from some nodes to another one that avoids ``alone``."""
    depth = dict.fromkeys(inputs, 0)
    for node in graph.nodes:  # in the order of the computation
        before = [depth[one] for one in node.all_input_nodes if one in depth]
        if before and node not in depth and node is not alone:
            depth[node] = max(before) + counts.get(node, 0)
    return depth.get(end, 0)


def masks_of(model_or_state, weights=None):
    """Read the masks of a network that is pruned already.

    Masks that are stored beside the weights are taken as they are: those of ``torch.nn.utils.prune`` (``weight_orig``
    and ``weight_mask``), and buffers called ``mask`` of a parametrization, as ``torch.ao.pruning`` has them. In other
    tensors a weight is kept unless it is exactly zero. A kept weight that is zero by chance counts as pruned there,
    which is rare in float32 and less so in half precision, where small numbers underflow.

    Parameters
    ----------
    model_or_state : torch.nn.Module or dict of str to torch.Tensor
    weights : iterable of str, optional
        The tensors to read, by their names in the unpruned network. By default those that have a stored mask, and of a
        model its :func:`prunable_weights` and any projection on a shortcut that has zeros; of a ``state_dict`` all
        floating-point tensors of two or more axes, embeddings included.

    Returns
    -------
    Masks
        Keyed like the ``state_dict`` of the unpruned network. The mask of a tensor without zeros is True everywhere:
        the tensor could have been pruned, and counts in the sparsity.

    Raises
    ------
    ValueError
        If a name is unknown, or a tensor is read by default that is zero everywhere: it may be pruned or not trained
        yet, and ``weights`` decides.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    >>> _ = prune.l1_unstructured(model[0], "weight", 0.75)
    >>> {name: mask.sum().item() for name, mask in masks_of(model).items()}
    {'0.weight': 2, '1.weight': 2}
    """
    tensors, stored = _tensors_and_masks(model_or_state)
    if weights is None:
        weights = _weights_of(model_or_state, tensors, stored)
        for name in weights:
            if name not in stored and not tensors[name].any():
                raise ValueError(f"{name!r} is zero everywhere: it may be pruned, or not trained yet. Name the tensors "
                                 "to read in weights, with it or without")
    weights = list(weights)
    unknown = [name for name in weights if name not in tensors]
    if unknown:
        raise ValueError(f"weights has {unknown[0]!r}: expected some of {', '.join(tensors)}")
    return {name: stored[name] if name in stored else tensors[name] != 0 for name in weights}


def _weights_of(model_or_state, tensors, stored):
    """The names of the tensors in which masks are looked for by default."""
    if isinstance(model_or_state, nn.Module):
        names = [name for name, (_, why) in _weights(model_or_state, shortcuts=False, exclude=()).items()
                 if not why or why == SHORTCUT and not tensors[name].all()]
    else:
        names = [name for name, tensor in tensors.items() if tensor.ndim > 1 and tensor.is_floating_point()]
    return list(dict.fromkeys([*names, *stored]))


@torch.no_grad()
def _tensors_and_masks(model_or_state):
    """The tensors by their names in the unpruned network, as they are used, and the masks stored beside them."""
    if isinstance(model_or_state, nn.Module):  # torch.ao.pruning keeps its masks out of the state_dict
        model_or_state = {**dict(model_or_state.named_parameters(remove_duplicate=False)),
                          **dict(model_or_state.named_buffers(remove_duplicate=False))}
    raw = {key: tensor.detach() for key, tensor in model_or_state.items() if isinstance(tensor, torch.Tensor)}
    tensors, masks = {}, {}
    for key, tensor in raw.items():
        name, is_mask = _unpruned(key, raw)
        if is_mask:
            masks[name] = masks.get(name, True) & (tensor != 0)
        else:
            tensors[name] = tensor
    masks = {name: mask.reshape(mask.shape + (1,) * (tensors[name].ndim - mask.ndim)).expand_as(tensors[name])
             for name, mask in masks.items() if name in tensors}
    return {**tensors, **{name: tensors[name].masked_fill(~mask, 0) for name, mask in masks.items()}}, masks


def _unpruned(key, keys):
    """What a key is called in the unpruned network, and whether it holds the mask of that tensor."""
    if match := re.fullmatch(r"(.*\.)?parametrizations\.([^.]+)\.(original|\d+\.mask)", key):
        return (match[1] or "") + match[2], match[3] != "original"
    for ending in ("_orig", "_mask"):
        name = key.removesuffix(ending)
        if name != key and f"{name}_orig" in keys and f"{name}_mask" in keys:
            return name, ending == "_mask"
    return key, False


def sparsity(network, masks=None):
    """Fraction of zeros over all masked weights.

    Parameters
    ----------
    network : Masks, torch.nn.Module or dict of str to torch.Tensor
        Masks are counted themselves. Of a model or a ``state_dict`` the weights are counted: those with a mask, or
        without ``masks`` those that :func:`masks_of` reads.
    masks : Masks, optional
        What the network is said to be pruned to.

    Returns
    -------
    float
        In [0, 1]; the denominator is the number of entries of all masks.

    Raises
    ------
    ValueError
        If there are no masks, one is not a bool tensor or does not fit, or a weight that one drops is not zero.

    Examples
    --------
    >>> sparsity({"fc.weight": torch.tensor([[True, False], [False, False]])})
    0.75
    >>> sparsity({"fc.weight": torch.tensor([[0.5, 0.0], [0.0, 0.0]]), "fc.bias": torch.zeros(2)})
    0.75
    """
    kept = _kept(network, masks)
    total = sum(mask.numel() for mask in kept.values())
    return 1 - sum(int(mask.sum()) for mask in kept.values()) / total


def layer_sparsity(network, masks=None):
    """Fraction of zeros of each mask or masked weight, a dict; the arguments are those of :func:`sparsity`."""
    return {name: 1 - int(mask.sum()) / mask.numel() for name, mask in _kept(network, masks).items()}


def _kept(network, masks):
    """Which weights are there, as masks."""
    is_module = isinstance(network, nn.Module)
    if is_module or any(isinstance(one, torch.Tensor) and one.is_floating_point() for one in network.values()):
        tensors, stored = _tensors_and_masks(network)
        if masks is not None:
            check_fit(masks, tensors)
        names = masks if masks is not None else _weights_of(network, tensors, stored)
        network = {name: tensors[name] != 0 for name in names}
    elif masks is not None:
        raise ValueError("masks are compared with a model or a state_dict: got two sets of masks")
    check_bool(network)
    for name, mask in (masks or {}).items():
        if wrong := int((network[name] & ~mask.to(network[name].device)).sum()):
            raise ValueError(f"{wrong} of the {int((~mask).sum())} weights of {name!r} that its mask drops are not "
                             "zero: the network is not pruned to these masks")
    return network


def check_bool(masks):
    """Raise ValueError unless ``masks`` is a non-empty dict of non-empty bool tensors."""
    if not masks:
        raise ValueError("the masks are empty: expected at least one bool tensor")
    for name, mask in masks.items():
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.numel() == 0:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"mask {name!r} is {got}: expected a bool tensor with at least one entry")


def check_fit(masks, state):
    """Raise ValueError, naming the first offending key and both shapes, unless every mask fits its tensor.

    Parameters
    ----------
    masks : Masks
    state : dict of str to torch.Tensor
    """
    check_bool(masks)
    for name, mask in masks.items():
        if name not in state:
            raise ValueError(f"mask {name!r} of shape {list(mask.shape)} has no tensor of that name: "
                             f"expected one of {', '.join(state)}")
        if mask.shape != state[name].shape:
            raise ValueError(f"mask {name!r} has shape {list(mask.shape)}, its tensor {list(state[name].shape)}")


@torch.no_grad()
def apply_masks(module_or_state, masks):
    """Set the weights that are not kept to zero.

    Parameters
    ----------
    module_or_state : torch.nn.Module or dict of str to torch.Tensor
        A module is changed in place; a state_dict is left alone.
    masks : Masks

    Returns
    -------
    torch.nn.Module or dict of str to torch.Tensor
        The module itself, or a new dict whose unmasked tensors are shared with the old one.

    Raises
    ------
    ValueError
        If a mask does not fit.
    """
    if isinstance(module_or_state, torch.nn.Module):
        tensors = module_or_state.state_dict()  # references to the parameters themselves
        check_fit(masks, tensors)
        for name, mask in masks.items():
            # Not a product: a NaN or an infinity times zero would stay.
            tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)
        return module_or_state
    check_fit(masks, module_or_state)
    return {name: tensor.masked_fill(~masks[name].to(tensor.device), 0) if name in masks else tensor
            for name, tensor in module_or_state.items()}


def attach_masks(model, masks):
    """Prune a model in place as ``torch.nn.utils.prune`` does: each weight becomes a parameter ``weight_orig`` and a
    buffer ``weight_mask``, whose product is computed before each forward pass. :func:`apply_masks` gives plain zeros.

    Raises
    ------
    ValueError
        If a mask does not fit a parameter.
    """
    check_fit(masks, dict(model.named_parameters(remove_duplicate=False)))
    for name, mask in masks.items():
        prefix, _, own = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(prefix), own, mask.to(model.get_parameter(name).device))


@contextmanager
def watch(model, masks, repair=False):
    """Watch that pruned weights remain zero while a model is trained, in any loop.

    Momentum, weight decay and a loaded ``state_dict`` revive them. They are looked at after each step of an optimizer
    that has a masked weight, before each forward pass of the model, and at the end of the block.

    Parameters
    ----------
    model : torch.nn.Module
    masks : Masks
        Of parameters of the model.
    repair : bool
        Whether to set them to zero again, as :func:`apply_masks` does, instead of raising.

    Raises
    ------
    ValueError
        If a mask does not fit a parameter.
    RuntimeError
        If a weight that a mask drops is not zero: in which tensor, how many, and after how many steps.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> masks = {"weight": torch.tensor([[True, False]])}
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with watch(model, masks, repair=True):
    ...     model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    >>> sparsity(model, masks)
    0.5
    """
    check_fit(masks, dict(model.named_parameters(remove_duplicate=False)))
    dropped = {name: ~mask for name, mask in masks.items()}
    steps, seen = 0, None

    def masked_weights():  # each time: the model may have been moved, or its parameters replaced
        return {name: model.get_parameter(name) for name in dropped}

    def versions_of(weights):
        return [(id(weight), weight._version) for weight in weights.values()]

    @torch.no_grad()
    def look():
        weights = masked_weights()
        for name, weight in weights.items():
            dropped[name] = dropped[name].to(weight.device)
        counts = [((weight != 0) & dropped[name]).count_nonzero() for name, weight in weights.items()]
        # The device is waited for once, not for each weight.
        counts = torch.stack([count.to(counts[0].device) for count in counts]).tolist()
        revived = {name: count for name, count in zip(weights, counts) if count}
        if repair:
            for name in revived:
                weights[name].masked_fill_(dropped[name], 0)
        elif revived:
            name = next(iter(revived))
            others = f", and weights of {len(revived) - 1} other tensors" * (len(revived) > 1)
            raise RuntimeError(f"after step {steps}, {revived[name]} of {int(dropped[name].sum())} pruned weights of "
                               f"{name!r} are not zero{others}: apply the masks after each step, or give repair=True")

    def after_step(optimizer, *_):
        nonlocal steps, seen
        weights = masked_weights()
        watched = {id(weight) for weight in weights.values()}
        if any(id(weight) in watched for group in optimizer.param_groups for weight in group["params"]):
            steps += 1
            look()
            seen = versions_of(weights)

    def before_forward(*_):
        nonlocal seen
        if seen != versions_of(masked_weights()):  # the first pass after a step need not look again
            look()
        seen = None  # the next one must: what is done to weight.data changes no version

    look()
    hooks = [register_optimizer_step_post_hook(after_step), model.register_forward_pre_hook(before_forward)]
    try:
        yield
        look()
    finally:
        for hook in hooks:
            hook.remove()


def save_masks(path, masks, *, model=None, data=None, recipe=None, initial=None, **provenance):
    """Write masks and what they came from to a safetensors file, under a temporary name first.

    The file's header has, in JSON, the sparsity of all weights and of each layer, the versions of the libraries and the
    commit of this one, and what is given here.

    Parameters
    ----------
    path : path-like
    masks : Masks
    model : torch.nn.Module, optional
        The network that they are for; the header has the name of its class.
    data : str or object with a name, optional
        The data on which they were found, such as a :class:`permask_core.data.Dataset`.
    recipe : dataclass or anything that JSON holds, optional
        How the network was trained.
    initial : dict of str to torch.Tensor, optional
        The ``state_dict`` from which the training began, of which the header has a hash.
    **provenance
        Anything else that JSON holds (seed, command, ...).

    Raises
    ------
    ValueError
        If the masks do not fit the model, or something given cannot be written as JSON.
    """
    check_bool(masks)
    known = {"model": model, "data": data, "recipe": recipe, "initial": initial}
    if model is not None:
        check_fit(masks, _tensors_and_masks(model)[0])
        known["model"] = f"{type(model).__module__}.{type(model).__qualname__}"
    if initial is not None:
        known["initial"] = digest(initial)
    known["data"] = getattr(data, "name", data)
    record = {"kind": "masks", "sparsity": sparsity(masks), "layer_sparsity": layer_sparsity(masks),
              "versions": versions(), "commit": commit(),
              **{name: value for name, value in known.items() if value is not None}, **provenance}
    try:
        record = json.loads(json.dumps(record, default=plain))
    except TypeError as error:
        raise ValueError(f"the provenance of masks cannot be written as JSON: {error}") from error
    save_tensors(path, masks, record)


def load_masks(path, model=None):
    """Read masks that :func:`save_masks` wrote, on the CPU.

    Parameters
    ----------
    path : path-like
    model : torch.nn.Module or dict of str to torch.Tensor, optional
        The network that they are for, of any class, or its ``state_dict``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, foreign, or holds something other than masks, or a mask does not fit the model.
    """
    masks, _ = _load(path)
    check_bool(masks)
    if model is not None:
        check_fit(masks, _tensors_and_masks(model)[0])
    return masks


def read_provenance(path):
    """What the header of a file of :func:`save_masks` says about its masks, a dict; the errors are those of
    :func:`load_masks`."""
    return _load(path)[1]


def _load(path):
    masks, record = load_tensors(path)
    if record.get("kind") != "masks":
        raise ValueError(f"{path} holds {record.get('stage') or 'something else'}: expected masks")
    return masks, record
