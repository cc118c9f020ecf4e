"""Numerical test that permutations preserve the function, for groups found by tracing or written by hand.

A newly initialised network is unsuitable for this test: its outputs are often almost zero and the parameters of its
norms are ones and zeros, so that wrong permutations are not detected. All parameters and buffers are therefore first
drawn at random, of order one.
"""

import contextlib
import copy

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from permask_core.data.batches import arguments
from permask_core.matching.groups import shortened
from permask_core.matching.permutations import permute
from permask_core.models import evaluation_mode


def named_tensors(model):
    """Return the parameters and buffers in a model's ``state_dict``, without copies and without its extra states."""
    owned = {name for named in (model.named_parameters, model.named_buffers) for name, _ in named(
        remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in owned}


def copied(model, *, share=False):
    """Return a copy of a model, which may ``share`` its parameters.

    A module may also keep tensors that it computed from them, such as a cache that it fills in evaluation mode or the
    product of a weight and its mask. They are detached, and the module is put into training mode and then into
    evaluation mode, in which it computes them again. Raises ValueError if something in the model cannot be copied.
    """
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    state = parameters.keys() | {id(buffer) for buffer in model.buffers()}
    kept = {id(t): t for module in model.modules() for t in _tensors_in(module) if id(t) not in state}
    memo = (parameters if share else {}) | {key: t.detach().clone() for key, t in kept.items() if not t.is_leaf}
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # what a model keeps is the user's
        raise ValueError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {shortened(error)}: "
                         "expected a model that copy.deepcopy accepts") from error
    for original, module in zip(model.modules(), twin.modules()):
        if any(id(t) in kept for t in _tensors_in(original)):
            module.train().eval()
    for original, module in zip(model.modules(), twin.modules()):
        module.training = original.training
    return twin


def _tensors_in(module):
    return [value for value in pytree.tree_leaves(vars(module)) if isinstance(value, torch.Tensor)]


def draw_weights(model, *, seed=0, gain=2.0):
    """Copy a network in float64 and evaluation mode, with every parameter and statistic drawn at random.

    Kernels are normal with standard deviation sqrt(gain / fan-in), which keeps signals of order one; for matrices it is
    sqrt(8 / fan-in), which makes attention sharp. For biases it is 0.1, so that what all tokens share does not dominate
    their differences. All other parameters and running means are standard normal; weights of norms and running
    variances are uniform in [0.5, 1.5].
    """
    model = copied(model).double().eval()
    generator = torch.Generator().manual_seed(int(seed))
    state = named_tensors(model)
    moving = {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for name, tensor in state.items():
            if not (id(tensor) in moving or name.endswith(("running_mean", "running_var"))):
                continue
            name = name.removesuffix("_orig")  # of a pruned tensor
            draw = torch.randn(tensor.shape, generator=generator, dtype=WIDE.get(tensor.dtype, tensor.dtype))
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim < 2):
                draw = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            elif name.endswith("weight"):
                draw *= ((8 if tensor.ndim == 2 else gain) / max(1, tensor[0].numel())) ** 0.5
            elif name.endswith("bias"):
                draw *= 0.1
            tensor.copy_(draw)
    return model


def derangements(groups, *, seed=0):
    """Return a random permutation of each group that moves every unit."""
    generator, result = torch.Generator().manual_seed(int(seed)), {}
    for name, group in groups.items():
        order = torch.randperm(group.size, generator=generator)
        result[name] = torch.empty_like(order).index_copy_(0, order, order.roll(1))
    return result


def function_change(groups, permutations, model, example_input, *, outputs=None):
    """Return how much the outputs of a network change when its units are permuted.

    Parameters
    ----------
    groups : dict of str to Group
    permutations : dict of str to torch.Tensor
    model : torch.nn.Module
    example_input : torch.Tensor, tuple or dict
    outputs : function, optional
        As in :func:`permask_core.matching.permutation_groups`.

    Returns
    -------
    float
        The largest change of an output, in standard deviations of the outputs, or relative to their size if they are
        constant.

    Raises
    ------
    ValueError
        If an output is not finite, all outputs are zero, or a tensor with two names is permuted under only one of them.
    """
    state, first = named_tensors(model), {}
    moved = permute(groups, permutations, state)
    for name, tensor in state.items():
        other = first.setdefault(id(tensor), name)
        if not torch.equal(moved[name], moved[other]):
            raise ValueError(f"{other!r} and {name!r} are one tensor, but the groups permute them differently")
    return _change(model, moved, example_input, outputs)


def _change(model, state, example_input, outputs):
    """Return the largest change of an output with the weights of ``state``, in standard deviations of the outputs."""
    first = {}  # functional_call accepts only one of two names of a tensor
    state = {name: state[first.setdefault(id(tensor), name)] for name, tensor in named_tensors(model).items()}
    with torch.random.fork_rng(devices=[]):
        random_state = torch.get_rng_state()
        before = _outputs(model, {}, example_input, outputs)
        torch.set_rng_state(random_state)
        after = _outputs(model, state, example_input, outputs)
    if not (before.isfinite().all() and before.any()):
        raise ValueError(f"of {before.numel()} outputs, {int((~before.isfinite()).sum())} are not finite and "
                         f"{int((before == 0).sum())} are 0: expected finite outputs that are not all 0")
    return float((after - before).abs().max() / (before.std(correction=0) or before.abs().max()))


def _outputs(model, state, example_input, outputs):
    """Return all numbers of the chosen outputs, which a network computes with the tensors of ``state``, in float64.

    Each call is one of a new copy, because the network may keep what it computes from these tensors.
    """
    precise = any(tensor.dtype == torch.float64 for tensor in named_tensors(model).values())
    with evaluation_mode(model):
        twin = copied(model, share=True)
        try:
            with float64() if precise else contextlib.nullcontext():
                given = pytree.tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value,
                                        example_input)  # the network may change it
                given = pytree.tree_map(_widened, given) if precise else given
                result = torch.func.functional_call(twin, state, *arguments(given))
        except Exception as error:  # the network is the user's code, which may raise anything
            raise ValueError(f"{type(model).__name__} cannot be tested: {type(error).__name__}: {shortened(error)}: "
                             f"expected a network that runs {'in float64' if precise else 'on this input'}") from error
    return torch.cat([t.detach().flatten().double() for t in pytree.tree_leaves(outputs(result) if outputs else result)
                      if isinstance(t, torch.Tensor)])


WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
        torch.complex64: torch.complex128}


def _widened(value):
    """Return a tensor or a type in the precision of float64."""
    if isinstance(value, torch.Tensor):
        return value.to(WIDE.get(value.dtype, value.dtype))
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value


class _Float64(TorchDispatchMode):
    """Replaces types and tensors of lower precision in the arguments of every operation that returns a new tensor."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if isinstance(function, torch._ops.HigherOrderOperator):
            return function(*args, **(kwargs or {}))
        new = not any(argument.alias_info for argument in function._schema.arguments)  # no view or change in place
        args, kwargs = pytree.tree_map(
            lambda value: _widened(value) if new or isinstance(value, torch.dtype) else value, (args, kwargs or {}))
        if function is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float64:
            return _grouped_matmul(*args, **kwargs)
        return function(*args, **kwargs)


def _grouped_matmul(x, weight, offs=None, bias=None, out_dtype=None):
    """The product of groups of rows with the matrix of their group, which PyTorch does not have in float64; ``offs``
    [groups] is where they end."""
    if offs is None or weight.ndim != 3 or x.ndim != 2:
        return x @ weight
    ends = offs.tolist()
    product = torch.cat([x[start:end] @ matrix for start, end, matrix in zip([0, *ends], ends, weight)])
    return torch.nn.functional.pad(product, (0, 0, 0, len(x) - len(product)))


@contextlib.contextmanager
def float64():
    """Compute in float64 inside the block, even where a network casts to less."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


def draw_stable_weights(model, example_input, *, seed=0, outputs=None):
    """Return a :func:`draw_weights` copy of a network that does not amplify rounding errors.

    Some deep networks with random weights are chaotic: rounding errors grow from layer to layer until the order of a
    sum changes the outputs. Such weights are drawn again, up to four times, with other seeds and gains, and the most
    stable draw is returned.
    """
    def drawn(attempt):
        return draw_weights(model, seed=seed + attempt // 2, gain=(2.0, 8.0)[attempt % 2])

    noise = {}
    for attempt in range(4):
        drawing, generator = drawn(attempt), torch.Generator().manual_seed(int(seed))
        state = dict(named_tensors(drawing))
        for name, tensor in state.items():
            if tensor.is_floating_point() and tensor.numel() < 1e6:  # all tensors would double the memory
                draw = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
                state[name] = tensor * (1 + 1e-15 * draw)
        noise[attempt] = _change(drawing, state, example_input, outputs)
        if noise[attempt] < TOLERANCE / 100:
            return drawing
        del drawing, state
    return drawn(min(noise, key=noise.get))


def check_function(groups, model, example_input, *, seed=0, outputs=None):
    """Raise ValueError, which has the name of a group, unless random permutations of all groups preserve the function.

    Parameters
    ----------
    groups : dict of str to Group
    model : torch.nn.Module
        A copy in float64 with random parameters and buffers is tested (:func:`draw_stable_weights`).
    example_input : torch.Tensor, tuple or dict
        Floating-point inputs are replaced by random ones of the same shape.
    seed : int
    outputs : function, optional
        As in :func:`permask_core.matching.permutation_groups`.

    Returns
    -------
    float
        The largest change of an output, in standard deviations of the outputs; it is due to rounding.
    """
    generator = torch.Generator().manual_seed(int(seed))
    inputs = pytree.tree_map(
        lambda t: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)
        if isinstance(t, torch.Tensor) and t.is_floating_point() else t, example_input)
    model = draw_stable_weights(model, inputs, seed=seed, outputs=outputs)
    permutations = derangements(groups, seed=seed)
    change = function_change(groups, permutations, model, inputs, outputs=outputs)
    if not change < TOLERANCE:
        changes = {name: function_change(groups, {name: permutations[name]}, model, inputs, outputs=outputs)
                   for name in groups}
        worst = max(changes, key=changes.get)
        raise ValueError(f"permuting group {worst!r} changes the outputs by {changes[worst]:.2g} of their standard "
                         f"deviation, all groups together by {change:.2g}: expected less than {TOLERANCE:.0e}. "
                         "An entry is missing or wrong")
    return change


TOLERANCE = 1e-9
