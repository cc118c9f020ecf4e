"""FanInConv2d against torch.nn.Conv2d with the same weights: numbers, gradients, files, and connections that move."""

import copy
import io
import math
import pickle
import re

import numba
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from permask_core.sparse import FanInConv2d, FanInLinear
from permask_core.sparse.dynamic import constant_fan_in_masks
from permask_core.sparse.kernels import convolution, cpu, transposing

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2e-2}
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


def drawn_mask(conv, density=0.4, ablated=0, seed=0):
    mask = constant_fan_in_masks({"weight": conv.weight}, density, seed=seed)["weight"]
    mask[torch.randperm(len(mask))[:ablated]] = False
    return mask


def layers(*sizes, density=0.4, ablated=0, dtype=torch.float64, **settings):
    """A convolution under a mask, whose other weights are 0, and its fan-in layer."""
    conv = nn.Conv2d(*sizes, dtype=dtype, **settings)
    mask = drawn_mask(conv, density, ablated)
    layer = FanInConv2d.from_dense(conv, mask)
    conv.weight.data.masked_fill_(~mask, 0)
    return conv, layer


def of_connections(layer, gradient):
    return gradient.flatten(1)[layer.rows].gather(1, layer.indices.long())


def assert_same(conv, layer, x, trained=(True, True, True), tolerance=1e-11):
    """Outputs and gradients; the gradients only where they are needed."""
    given, exact = x.detach().requires_grad_(trained[0]), x.detach().double().clone().requires_grad_(trained[0])
    twin = copy.deepcopy(conv).double().requires_grad_(True)
    layer.zero_grad()
    twin.zero_grad()
    layer.values.requires_grad_(trained[1])
    if layer.bias is not None:
        layer.bias.requires_grad_(trained[2])
    y, right = layer(given), twin(exact)
    assert y.shape == right.shape and y.dtype == x.dtype
    assert y.is_contiguous() or y.stride() == conv.to(y.dtype)(given).stride()  # for what views it
    found = [(y, right)]
    if y.requires_grad:
        grad = torch.randn_like(y)
        y.backward(grad)
        right.backward(grad.double())
        found += [(given.grad, exact.grad), (layer.values.grad, of_connections(layer, twin.weight.grad))]
        found += [] if layer.bias is None else [(layer.bias.grad, twin.bias.grad)]
    for (got, wanted), needed in zip(found, (True, *trained)):
        assert (got is not None) == needed
        if needed and got.numel():
            assert (got.double() - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())


@given(st.data(), st.sampled_from(list(TOLERANCE)), st.integers(1, 3), pairs, pairs, pairs, st.integers(1, 4),
       st.integers(1, 4), st.tuples(st.booleans(), st.booleans(), st.booleans()), st.integers(0, 2 ** 31))
def test_outputs_and_gradients_are_those_of_the_dense_layer(data, dtype, groups, kernel, stride, dilation, n_in, n_out,
                                                            trained, seed):
    torch.manual_seed(seed)
    same = data.draw(st.booleans())
    padding = "same" if same else data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)) | st.just("valid"))
    mode = data.draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    conv, layer = layers(groups * n_in, groups * n_out, kernel, 1 if same else stride, padding, dilation, groups,
                         bias=data.draw(st.booleans()), padding_mode=mode, dtype=dtype,
                         density=data.draw(st.floats(0.01, 1)), ablated=data.draw(st.integers(0, groups * n_out - 1)))
    size = [data.draw(st.integers(spread * (length - 1) + 1, 12)) for length, spread in zip(kernel, dilation)]
    size = [max(length, 7) if mode != "zeros" else length for length in size]  # no image is narrower than its padding
    batch = data.draw(st.sampled_from([(), (1,), (2,), (5,)]))
    x = torch.randn(*batch, groups * n_in, *size, dtype=dtype)
    if batch and data.draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transposing, "BLOCK", data.draw(st.integers(1, 9)))
        patch.setattr(convolution, "CACHED", data.draw(st.sampled_from([1, 300, 2 ** 16])))
        assert_same(conv, layer, x, trained, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(0, 4, 7, 6), (3, 4, 40, 50), (1, 4, 1, 1), (70, 4, 1, 1)])
@pytest.mark.parametrize("settings", [{"padding": 1}, {"padding": 2, "stride": 3, "dilation": 2, "groups": 2}])
def test_batches_of_any_size(shape, settings):
    conv, layer = layers(4, 6, 3, ablated=1, **settings)
    if settings["padding"] == 2 and shape[-1] == 1:  # smaller than the dilated kernel would be refused
        shape = (*shape[:2], 2, 3)
    assert_same(conv, layer, torch.randn(shape, dtype=torch.float64))


def test_more_channels_and_tiles_than_are_read_at_a_time():
    conv, layer = layers(40, 70, 3, padding=1, density=0.1, dtype=torch.float32)
    assert_same(conv, layer, torch.randn(4, 40, 30, 30), tolerance=1e-4)


def test_expanded_inputs_and_gradients():
    conv, layer = layers(3, 5, 3)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64).expand(6, -1, -1, -1)
    assert_same(conv, layer, x)
    given, other = (x.clone().requires_grad_() for _ in range(2))
    layer(given).sum().backward()  # the gradient of the output is one expanded number
    conv(other).sum().backward()
    torch.testing.assert_close(given.grad, other.grad)


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "padding": 2}])
def test_gradcheck(settings):
    _, layer = layers(4, 4, 3, ablated=1, **settings)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x, *given):
        return torch.func.functional_call(layer, dict(zip(parameters, given)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


def test_without_compiled_loops_the_dense_weight_gives_the_same(monkeypatch):
    monkeypatch.setattr(cpu, "is_usable", lambda: False)
    monkeypatch.setattr(convolution, "forward", None)
    conv, layer = layers(4, 6, 3, stride=2, padding=1, groups=2, ablated=1)
    assert_same(conv, layer, torch.randn(3, 4, 9, 8, dtype=torch.float64))


def test_a_sum_has_a_fixed_order_for_any_number_of_threads(monkeypatch):
    conv, layer = layers(8, 60, 3, padding=1, dtype=torch.float32)
    x, results = torch.randn(8, 8, 30, 30), []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        given = x.clone().requires_grad_()
        y = layer(given)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [given, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_ablated_channels_and_unconnected_inputs_see_no_nan():
    conv, layer = layers(3, 6, 3, padding=1, ablated=2, density=0.1)
    gone = [i for i in range(6) if i not in layer.rows.tolist()]
    y = layer(torch.full((2, 3, 5, 5), float("nan"), dtype=torch.float64))
    assert torch.equal(y[:, gone], layer.bias[gone][:, None, None].expand(2, 2, 5, 5))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    bad = x.clone()
    bad[1, 2, 4, 4] = float("inf")
    reached = F.conv2d(torch.zeros_like(x).index_put((torch.tensor(1), torch.tensor(2), torch.tensor(4), torch.tensor(
        4)), torch.tensor(1.0).double()), layer.mask().double(), padding=1) > 0
    y = layer(bad)
    assert reached.any() and not y[reached].isfinite().any() and torch.equal(y[~reached], layer(x)[~reached])


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        self.entries = max([self.entries] + [t.numel() for t in tree_leaves(made) if isinstance(t, torch.Tensor)])
        return made


def test_a_step_unfolds_no_input_and_spreads_no_weight():
    layer, x = FanInConv2d(128, 128, 3, 6), torch.randn(1, 128, 12, 12, requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert x.numel() <= largest.entries < 2 * x.numel() < layer.mask().numel() / 3


@pytest.mark.parametrize("ablated", [0, 2])
def test_autocast_computes_as_a_dense_layer_does(ablated):
    conv, layer = layers(4, 6, 3, ablated=ablated, dtype=torch.float32)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, right = layer(x), conv(x)
    assert y.dtype == right.dtype == torch.bfloat16
    torch.testing.assert_close(y, right, rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    assert layer.values.grad.dtype == torch.float32 and layer.values.grad.any()


# Construction


def test_sizes_are_those_of_a_dense_layer():
    layer = FanInConv2d(8, 12, (3, 2), 5, stride=2, padding=(1, 0), dilation=(1, 3), groups=4, bias=False)
    dense = nn.Conv2d(8, 12, (3, 2), stride=2, padding=(1, 0), dilation=(1, 3), groups=4, bias=False)
    for name in FanInConv2d.SIZES:
        assert getattr(layer, name) == getattr(dense, name), name
    assert layer.weight_shape == dense.weight.shape and layer.bias is None
    assert (layer.in_features, layer.out_features, layer.fan_in) == (2 * 3 * 2, 12, 5)
    x = torch.randn(2, 8, 9, 9)
    assert layer(x).shape == dense(x).shape
    assert "stride=(2, 2)" in repr(layer) and "fan_in=5, bias=False" in repr(layer)


def test_drawn_as_a_linear_layer_of_the_same_sizes():
    """So its variance and its uniform connections are tested there."""
    conv = FanInConv2d(8, 20, 3, 7, groups=2, generator=torch.Generator().manual_seed(3))
    linear = FanInLinear(36, 20, 7, generator=torch.Generator().manual_seed(3))
    for name, tensor in linear.state_dict().items():
        assert torch.equal(conv.state_dict()[name], tensor), name


@pytest.mark.parametrize("given, message", [
    ((0, 4, 3, 1), "in_channels is 0"), ((4, 4.0, 3, 1), "out_channels is 4.0"), ((4, 4, 3, 37), "fan_in is 37: .*36"),
    ((4, 4, 0, 1), "kernel_size is 0"), ((4, 4, (3, 3, 3), 1), r"kernel_size is \(3, 3, 3\)"),
    ((4, 4, 3, 1, 0), "stride is 0"), ((4, 4, 3, 1, (1, True)), r"stride is \(1, True\)"),
    ((4, 4, 3, 1, 1, -1), "padding is -1: expected an integer of at least 0"), ((4, 4, 3, 1, 1, "no"), "no"),
    ((4, 4, 3, 1, 1, 0, 1.0), "dilation is 1.0"), ((4, 4, 3, 1, 1, 0, 1, 3), "divisible by groups"),
    ((4, 4, 3, 1, 1, 0, 1, 0), "groups is 0"), ((4, 4, 3, 19, 1, 0, 1, 2), "fan_in is 19: .*18"),
    ((4, 4, 3, 1, 2, "same"), "same"), ((4, 4, 3, 1, 1, 0, 1, 1, True, "mirror"), "mirror"),
])
def test_sizes_that_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FanInConv2d(*given)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (1, 2, 4, 3, 3), (2, 3, 5, 5), (4, 2, 5, 5)])
def test_inputs_of_another_shape_are_refused(shape):
    message = f"the input has shape {list(shape)}: expected [batch, channels, height, width] with 4 channels"
    with pytest.raises(ValueError, match=re.escape(message)):
        FanInConv2d(4, 3, 3, 5)(torch.ones(shape))


def test_an_image_smaller_than_the_kernel_is_refused():
    layer = FanInConv2d(4, 3, 3, 5, dilation=2)
    assert layer(torch.ones(1, 4, 5, 5)).shape == (1, 3, 1, 1)
    with pytest.raises(ValueError, match=r"\[1, 4, 5, 4\]: expected images of at least the size of the kernel"):
        layer(torch.ones(1, 4, 5, 4))


def test_another_type_or_device_is_refused():
    layer = FanInConv2d(4, 3, 3, 5)
    with pytest.raises(ValueError, match="torch.float64, the layer torch.float32"):
        layer(torch.ones(2, 4, 5, 5).double())
    with pytest.raises(ValueError, match="on meta, the layer on cpu"):
        layer(torch.ones(2, 4, 5, 5, device="meta"))
    with pytest.raises(ValueError, match="the input is a ndarray: expected a torch.Tensor"):
        layer(torch.ones(2, 4, 5, 5).numpy())


# Dense layers and back


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3, (2, 3)]), st.booleans(), st.integers(0, 7),
       st.integers(0, 2 ** 31))
def test_from_dense_and_back(groups, kernel, bias, ablated, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(8, 8, kernel, 2, 1, groups=groups, bias=bias, padding_mode="circular").eval()
    mask = drawn_mask(conv, 0.5, ablated)
    conv.weight.data[~mask] = float("nan")
    before = copy.deepcopy(conv.state_dict())
    layer = FanInConv2d.from_dense(conv, mask)
    back = layer.to_dense()
    assert torch.equal(layer.mask(), mask) and type(back) is nn.Conv2d and repr(back) == repr(conv)
    assert torch.equal(back.weight, conv.weight.masked_fill(~mask, 0)) and not back.training and not layer.training
    assert (back.bias is None) == (not bias) and (not bias or torch.equal(back.bias, conv.bias))
    with torch.no_grad():
        layer.values += 1
    assert all(torch.equal(t.nan_to_num(), before[name].nan_to_num()) for name, t in conv.state_dict().items())


def test_what_is_no_convolution_or_no_mask_of_it_is_refused():
    conv = nn.Conv2d(4, 3, 3)
    with pytest.raises(ValueError, match="got a Linear: expected a torch.nn.Conv2d"):
        FanInConv2d.from_dense(nn.Linear(4, 3), torch.ones(3, 4).bool())
    with pytest.raises(ValueError, match=r"bool \[3, 36\]: expected bool \[3, 4, 3, 3\]"):
        FanInConv2d.from_dense(conv, torch.ones(3, 36).bool())
    mask = drawn_mask(conv)
    mask[1, 0] = ~mask[1, 0]
    mask[1, 0, 0, 0] = mask[1].sum() % 2 == mask[0].sum() % 2
    counts = mask.flatten(1).sum(1)
    if counts[1] == counts[0]:
        pytest.fail("the mask has a constant fan-in")
    with pytest.raises(ValueError, match=f"row 1 of the mask has {counts[1]} connections, row 0 {counts[0]}"):
        FanInConv2d.from_dense(conv, mask)


# Files, copies, and connections that move


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_goes_into_a_layer_of_another_fan_in(assign):
    _, source = layers(4, 6, 3, padding=1, groups=2, ablated=2)
    _, target = layers(4, 6, 3, padding=1, groups=2, density=0.8)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    target(x).sum().backward()  # which lists connections by input
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert (target.fan_in, target.n_active) == (source.fan_in, 4)
    assert_same(source.to_dense(), target, x)


@pytest.mark.parametrize("change, message", [
    (lambda s: s["indices"].__setitem__((0, -1), 18), "indices hold 18: expected 0 to 17"),
    (lambda s: s["rows"].__setitem__(-1, 6), "below 6"), (lambda s: s.pop("values"), "values"),
    (lambda s: s.update(bias=torch.zeros(5)), "bias")])
def test_a_bad_file_is_refused_and_leaves_the_layer_as_it_was(change, message):
    _, layer = layers(4, 6, 3, groups=2)
    before, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(layer.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_copies_share_nothing():
    conv, layer = layers(4, 6, 3, padding=1, groups=2, ablated=1)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer(x).sum().backward()
    layer.zero_grad()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(conv, twin, x)
        twin.rewire(torch.zeros_like(twin.indices, dtype=torch.bool), torch.tensor([[0, 0], [1, 9]]))
        with torch.no_grad():
            twin.values += 1
        assert_same(twin.to_dense(), twin, x)
        assert_same(conv, layer, x)


def test_connections_move_between_groups_fan_ins_and_numbers_of_channels():
    _, layer = layers(4, 6, 3, padding=1, groups=2, ablated=2)
    optimizer, x = torch.optim.Adam(layer.parameters(), 0.01), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for active, k in (([0, 1, 5], 4), ([3], 18), (range(6), 1), ([2, 3], 7)):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        grow = torch.cat([torch.stack([torch.full((k,), i), torch.randperm(18)[:k]], 1) for i in active])
        layer.rewire(torch.zeros_like(layer.indices, dtype=torch.bool), grow, optimizer)
        mask = torch.zeros(6, 18, dtype=torch.bool).index_put(tuple(grow.T), torch.tensor(True))
        assert torch.equal(layer.mask().flatten(1), mask) and not layer.values.any()
        assert optimizer.state[layer.values]["exp_avg"].shape == (len(active), k)
        torch.nn.init.normal_(layer.values)
        assert_same(layer.to_dense(), layer, x)


def test_a_gradient_by_connections_that_are_gone_is_refused():
    _, layer = layers(4, 6, 3)
    loss = layer(torch.randn(1, 4, 6, 6, dtype=torch.float64)).sum()
    layer.rewire(torch.zeros_like(layer.indices, dtype=torch.bool), torch.tensor([[i, 0] for i in range(6)]))
    with pytest.raises(RuntimeError, match="rewired between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("settings", [{}, {"groups": 2, "stride": 2, "padding": 1}])
def test_the_dense_gradient_of_some_rows(settings):
    conv, layer = layers(4, 6, 3, **settings)
    for shape in ((2, 4, 9, 8), (4, 9, 8)):
        conv.zero_grad()
        x = torch.randn(shape, dtype=torch.float64)
        y = conv(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        for start, stop in ((0, 6), (2, 5)):
            torch.testing.assert_close(layer.dense_gradient(grad, x, start, stop),
                                       conv.weight.grad[start:stop].flatten(1))


def test_a_default_device_and_inference_mode_change_nothing():
    conv, layer = layers(3, 4, 3, padding=1)
    for context in (torch.device("meta"), torch.inference_mode()):
        convolution._layout.cache_clear()  # what is cached serves later calls too
        x = torch.randn(2, 3, 6, 5, dtype=torch.float64, device="cpu")
        with context:
            y = layer(x)
        torch.testing.assert_close(y.clone(), conv(x).detach())
        assert_same(conv, layer, x)


def test_layouts_of_the_input_separate_rows_by_an_odd_number_of_lines():
    """Else the rows of all channels would compete for the same lines of a cache."""
    for shape in ((32, 8, 32, 32), (1, 8, 64, 64), (3, 8, 7, 5)):
        window = convolution.Window((3, 3), (2, 1), (1, 1))
        layout = convolution._layout(shape, window, 64)
        assert layout.row % 32 == 16 and layout.row >= layout.tiles * 64 + 2
        assert len(layout.offsets) == 8 * 9 and int(layout.offsets.max()) < 8 * 2 * layout.row
        assert layout.tiles * 64 >= shape[0] * math.prod(layout.grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
def test_where_there_are_no_loops_a_1x1_convolution_is_a_linear_layer_over_channels(dtype, stride, monkeypatch):
    torch.manual_seed(0)
    layer = FanInConv2d(12, 20, 1, fan_in=5, stride=stride, padding=1, dtype=dtype)
    x = torch.randn(3, 12, 7, 8, dtype=dtype, requires_grad=True)
    weight = layer.to_dense().weight.detach().double().requires_grad_()
    exact = x.detach().double().requires_grad_()
    right = torch.nn.functional.conv2d(exact, weight, layer.bias.detach().double(), stride, 1)
    grad = torch.randn_like(right)
    right.backward(grad)
    monkeypatch.setattr(cpu, "is_usable", lambda: False)
    monkeypatch.setattr(FanInConv2d, "_spread", lambda *_: pytest.fail("the dense weight was made"))
    y = layer(x)
    y.backward(grad.to(dtype))
    chosen = weight.grad[:, :, 0, 0].gather(1, layer.indices.long())
    for found, expected in ((y, right), (x.grad, exact.grad), (layer.values.grad, chosen)):
        atol = TOLERANCE[dtype] * expected.detach().abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_compiled_loops_and_is_rounded_once(dtype, monkeypatch):
    torch.manual_seed(0)
    conv, layer = layers(6, 8, 3, padding=1, dtype=torch.float32)
    layer, x = layer.to(dtype), torch.randn(2, 6, 9, 9).to(dtype).requires_grad_()
    wide, exact = copy.deepcopy(layer).float(), x.detach().float().requires_grad_()
    monkeypatch.setattr(F, "conv2d", None)  # the path that makes the dense weight
    (layer(x).sum() + wide(exact).sum()).backward()
    assert torch.equal(layer(x), wide(exact).to(dtype))
    for found, right in ((x.grad, exact.grad), (layer.values.grad, wide.values.grad)):
        assert found.dtype == dtype and torch.equal(found, right.to(dtype))
