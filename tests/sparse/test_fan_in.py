"""FanInLinear against a dense layer with the same weights: numbers, gradients, files, and connections that move."""

import copy
import io
import math
import pickle
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from permask_core.sparse import FanInLinear, fan_in, sample_columns
from permask_core.sparse.kernels import cpu, transposing
from tests.hypotheses import LONG

LEADING = [(), (0,), (1,), (2,), (3,), (8,), (9,), (33,), (64,), (65,), (130,), (0, 3), (4, 1, 2), (2, 5, 13)]
seeds = st.integers(0, 2 ** 31)


def drawn_mask(n_out, n_in, k, ablated=0):
    mask = torch.zeros(n_out, n_in, dtype=torch.bool).scatter_(1, torch.rand(n_out, n_in).argsort(1)[:, :k], True)
    mask[torch.randperm(n_out)[:ablated]] = False
    return mask


def drawn_layer(n_out, n_in, k, ablated=0, bias=True, dtype=torch.float32):
    linear, mask = nn.Linear(n_in, n_out, bias, dtype=dtype), drawn_mask(n_out, n_in, k, ablated)
    return FanInLinear.from_dense(linear, mask)


def dense_twin(layer):
    """A float64 torch.nn.Linear, filled connection by connection."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
    linear.weight.data.zero_()
    for neuron, columns, values in zip(layer.rows.tolist(), layer.indices.long(), layer.values.data.double()):
        linear.weight.data[neuron, columns] = values
    if layer.bias is not None:
        linear.bias.data = layer.bias.data.double()
    return linear


def of_connections(layer, gradient):
    return gradient[layer.rows].gather(1, layer.indices.long())


def everything(layer):
    """Copies of all that an error must leave alone."""
    tensors = {"grad": layer.values.grad, **layer.state_dict()}
    return layer.values, {name: None if t is None else t.clone() for name, t in tensors.items()}


def assert_untouched(layer, before):
    parameter, tensors = before
    assert layer.values is parameter
    for name, tensor in {"grad": layer.values.grad, **layer.state_dict()}.items():
        assert (tensor is None) == (tensors[name] is None), name
        assert tensor is None or tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name


def laid_out(tensor, layout):
    """Equal numbers in other places of memory; "expanded" makes all examples equal to the first."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([tensor, -tensor], -1)[..., 0]
    if layout == "expanded" and tensor.ndim > 1 and len(tensor):
        return tensor[:1].expand_as(tensor)
    return tensor


sizes = st.integers(1, 40) | st.integers(1, 40) | st.sampled_from([64, 257])
layouts = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])


@given(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]), sizes, sizes, st.data(),
       st.booleans(), layouts, layouts, st.tuples(st.booleans(), st.booleans(), st.booleans()), seeds)
def test_outputs_and_gradients_are_those_of_the_dense_layer(dtype, n_out, n_in, data, bias, layout, grad_layout,
                                                            trained, seed):
    torch.manual_seed(seed)
    leading = data.draw(st.sampled_from([shape for shape in LEADING if dtype != torch.float64 or not 8 < math.prod(
        shape) < 64]))  # fewer widths to compile
    k, ablated = data.draw(st.integers(1, n_in) | st.just(n_in)), data.draw(st.just(0) | st.integers(0, n_out - 1))
    layer = drawn_layer(n_out, n_in, k, ablated, bias, dtype)
    twin, x = dense_twin(layer), laid_out(torch.randn(*leading, n_in).to(dtype), layout).detach()
    grad = laid_out(torch.randn(*leading, n_out).to(dtype), grad_layout)
    exact, x = x.double().requires_grad_(trained[0]), x.requires_grad_(trained[0])
    layer.values.requires_grad_(trained[1])
    if bias:
        layer.bias.requires_grad_(trained[2])
    twin.requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        if not LONG:  # nor, by chance, for rows that share connections: tests/sparse/test_kernels.py
            patch.setattr(cpu, "shared_rows", lambda indices: 1)
        patch.setattr(transposing, "BLOCK", data.draw(st.integers(1, 50)))
        y, right = layer(x), twin(exact)
        needed = trained[0] or trained[1] or bias and trained[2]
        assert y.requires_grad == needed and y.dtype == dtype and y.shape == (*leading, n_out)
        if needed:
            y.backward(grad)
    right.backward(grad.double())
    found = [(y, right), (x.grad, exact.grad), (layer.values.grad, of_connections(layer, twin.weight.grad))]
    found += [(layer.bias.grad, twin.bias.grad)] if bias else []
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    for (got, wanted), needed in zip(found, (True, *trained)):
        assert (got is not None) == needed
        if needed:  # relative to the whole, because terms cancel; half precision is measured closely in test_kernels
            assert got.dtype == dtype and got.shape == wanted.shape
            assert (got.double() - wanted).abs().max() <= tolerance * (1 + wanted.abs().max()) if got.numel() else True


@pytest.mark.parametrize("ablated, bias, batch", [(0, True, 3), (2, True, 4), (2, False, 40), (0, False, 1)])
def test_gradcheck(ablated, bias, batch):
    layer = drawn_layer(5, 6, 3, ablated, bias, torch.float64)
    x = torch.randn(batch, 2, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def call(x, *given):
        return torch.func.functional_call(layer, dict(zip(parameters, given)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


def test_a_neuron_without_connections_gives_its_bias_whatever_the_input():
    layer = drawn_layer(6, 5, 2, ablated=2)
    gone = [i for i in range(6) if i not in layer.rows.tolist()]
    y = layer(torch.full((3, 4, 5), float("nan")))
    assert y.shape == (3, 4, 6) and torch.equal(y[..., gone], layer.bias[gone].expand(3, 4, 2))
    y[..., gone].sum().backward()
    assert (layer.bias.grad[gone] == 12).all() and layer.bias.grad.sum() == 24
    assert (drawn_layer(6, 5, 2, ablated=5, bias=False)(torch.ones(2, 5)) != 0).sum(1).tolist() == [1, 1]


def test_nan_and_infinity_stay_where_they_are_connected():
    layer = drawn_layer(50, 20, 3, ablated=10)
    x = torch.randn(40, 20)
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[7, 4] = value
        y, hit = layer(bad), torch.zeros(40, 50, dtype=torch.bool)
        hit[7] = layer.mask()[:, 4]
        assert hit.any() and not y[hit].isfinite().any() and torch.equal(y[~hit], layer(x)[~hit])


def test_a_layer_used_twice_sums_its_gradients():
    layer = drawn_layer(7, 7, 3, ablated=1, dtype=torch.float64)
    twin, x = dense_twin(layer), torch.randn(4, 7, dtype=torch.float64)
    (layer(layer(x).tanh()) ** 2).sum().backward()
    (twin(twin(x).tanh()) ** 2).sum().backward()
    torch.testing.assert_close(layer.values.grad, of_connections(layer, twin.weight.grad))
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)


@pytest.mark.parametrize("ablated", [0, 3])
def test_autocast_computes_as_a_dense_layer_does(ablated):
    layer = drawn_layer(30, 40, 9, ablated)
    dense, x = layer.to_dense(), torch.randn(6, 40)
    given, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, right = layer(given), dense(other)
    assert y.dtype == right.dtype == torch.bfloat16
    torch.testing.assert_close(y, right, rtol=1e-2, atol=1e-2)
    y.float().pow(2).sum().backward()
    right.float().pow(2).sum().backward()
    for got, wanted in ((given.grad, other.grad), (layer.values.grad, of_connections(layer, dense.weight.grad)),
                        (layer.bias.grad, dense.bias.grad)):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def test_autocast_leaves_float64_alone_and_refuses_whole_numbers_as_a_dense_layer_does():
    layer = drawn_layer(3, 4, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.ones(2, 4, dtype=torch.float64)
        assert layer(x).dtype == layer.to_dense()(x).dtype == torch.float64
        with pytest.raises((ValueError, RuntimeError)):
            drawn_layer(3, 4, 2)(torch.ones(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (4, 2, 3), (2, 0)])
def test_a_wrong_last_axis_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"shape {list(shape)}: expected a last axis of 4")):
        drawn_layer(3, 4, 2)(torch.ones(shape))


def test_another_type_or_device_is_refused():
    layer = drawn_layer(3, 4, 2)
    with pytest.raises(ValueError, match="torch.float64, the layer torch.float32"):
        layer(torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="on meta, the layer on cpu"):
        layer(torch.ones(2, 4, device="meta"))
    with pytest.raises(ValueError, match="on cpu, the layer on meta"):
        drawn_layer(3, 4, 2).to("meta")(torch.ones(2, 4))


# Construction


@pytest.mark.parametrize("given, message", [
    ((4, 3, 0), "fan_in is 0"), ((4, 3, 5), "fan_in is 5: expected an integer from 1 to in_features, 4"),
    ((4, 3, -1), "fan_in is -1"), ((4, 3, True), "fan_in is True"), ((4, 3, 2.0), "fan_in is 2.0"),
    ((4, 3, None), "fan_in is None"), ((0, 3, 1), "in_features is 0"), ((4, 0, 1), "out_features is 0"),
    ((True, 3, 1), "in_features is True"), ((4, 3.0, 1), "out_features is 3.0"),
])
def test_sizes_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FanInLinear(*given)


@pytest.mark.parametrize("indices, message", [
    ([[0, 1], [2, 4]], "indices hold 4: expected 0 to 3"), ([[0, 1], [-1, 2]], "indices hold -1: expected 0 to 3"),
    ([[0, 1], [3, 3]], "indices have 3 twice in row 1"), ([[0, 1, 2], [1, 2, 3]], r"int64 \[2, 3\]: .* \[2, 2\]"),
    ([[0, 1]], r"\[1, 2\]: .* \[2, 2\]"), ([0, 1], r"\[2\]: .* \[2, 2\]"), ([[0.0, 1], [2, 3]], "float32"),
    ([[True, False], [True, False]], "bool"), ([[2 ** 32, 1], [0, 1]], f"indices hold {2 ** 32}"),
])
def test_connections_that_do_not_fit_are_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        FanInLinear(4, 2, 2, indices=torch.tensor(indices))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_indices_of_every_whole_type_are_taken_and_sorted(dtype):
    layer = FanInLinear(40_000, 2, 3, indices=torch.tensor([[7, 3, 127], [0, 2, 1]], dtype=dtype))
    assert layer.indices.tolist() == [[3, 7, 127], [0, 1, 2]] and layer.indices.dtype == torch.int32


@pytest.mark.parametrize("batch", [1, 500])
def test_indices_in_any_order_of_memory(batch):
    indices = drawn_layer(60, 50, 40).indices
    layer = FanInLinear(50, 60, 40, indices=indices.t().contiguous().t())
    x = torch.randn(batch, 50)
    torch.testing.assert_close(layer(x).double(), dense_twin(layer)(x.double()), rtol=1e-4, atol=1e-4)
    assert layer.indices.is_contiguous()  # which safetensors asks for


def test_given_indices_are_not_shared():
    indices = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    layer = FanInLinear(3, 2, 2, indices=indices)
    indices[:] = 100
    assert layer.indices.tolist() == [[0, 1], [1, 2]]


def test_values_have_variance_two_over_fan_in_and_biases_are_0():
    for fan in (2, 50):
        layer = FanInLinear(400, 4000, fan, generator=torch.Generator().manual_seed(1))
        n = layer.values.numel()
        scaled = (layer.values.double() ** 2).sum() / (2 / fan)  # chi-square with n degrees of freedom
        assert abs(scaled - n) < 5 * (2 * n) ** 0.5
        assert abs(layer.values.mean()) < 5 * (2 / fan / n) ** 0.5 and not layer.bias.any()


def test_connections_are_uniform_over_the_inputs():
    for fan in (3, 30):
        layer = FanInLinear(40, 20_000, fan, generator=torch.Generator().manual_seed(2))
        assert (layer.indices[:, 1:] > layer.indices[:, :-1]).all()
        counts, p = torch.bincount(layer.indices.flatten(), minlength=40).double(), fan / 40
        chi = ((counts - 20_000 * p) ** 2).sum() / (20_000 * p * (1 - p))  # about chi-square with 39 degrees of freedom
        assert chi < 39 + 6 * (2 * 39) ** 0.5


def test_the_generator_alone_decides():
    state = torch.get_rng_state()
    one, two = (FanInLinear(30, 20, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.indices, two.indices) and torch.equal(one.values, two.values)
    other = FanInLinear(30, 20, 5, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(one.indices, other.indices) and not torch.equal(one.values, other.values)


def test_device_and_type_are_taken():
    for dtype in (torch.float64, torch.bfloat16):
        layer = FanInLinear(4, 3, 2, dtype=dtype, device="cpu")
        assert {t.dtype for t in layer.parameters()} == {dtype} and layer.indices.dtype == torch.int32
    assert FanInLinear(4, 3, 2, bias=False).bias is None


# Dense layers and back


@given(st.integers(1, 9), st.integers(1, 9), st.data(), st.booleans(), seeds)
def test_from_dense_and_back(n_out, n_in, data, bias, seed):
    torch.manual_seed(seed)
    mask = drawn_mask(n_out, n_in, data.draw(st.integers(1, n_in)), data.draw(st.integers(0, n_out - 1)))
    linear = nn.Linear(n_in, n_out, bias).eval()
    linear.weight.data[~mask] = float("nan")
    linear.weight.data[mask & (torch.rand(n_out, n_in) < 0.3)] = 0
    before = copy.deepcopy(linear.state_dict())
    layer = FanInLinear.from_dense(linear, mask)
    back = layer.to_dense()
    assert torch.equal(layer.mask(), mask) and layer.mask().dtype == torch.bool
    assert torch.equal(layer.rows, mask.any(1).nonzero()[:, 0]) and layer.rows.dtype == torch.int64
    assert layer.indices.dtype == torch.int32 and (layer.indices[:, 1:] > layer.indices[:, :-1]).all()
    assert all(t.is_contiguous() for t in layer.state_dict().values()) and layer.values.is_leaf
    assert type(back) is nn.Linear and torch.equal(back.weight, linear.weight.masked_fill(~mask, 0))
    assert (back.bias is None) == (not bias) and (not bias or torch.equal(back.bias, linear.bias))
    assert not layer.training and not back.training
    with torch.no_grad():
        layer.values += 1
        back.weight += 1
        if bias:
            layer.bias += 1
            back.bias -= 1
    assert all(torch.equal(t.nan_to_num(), before[name].nan_to_num()) for name, t in linear.state_dict().items())


def test_a_mask_without_a_constant_fan_in_is_refused_with_two_ways_out():
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1, :3] = mask[2, 3:] = mask[3, :2] = mask[4, :5] = True
    with pytest.raises(ValueError, match=r"row 3 of the mask has 2 connections, row 1 3.*srigl.*apply_masks"):
        FanInLinear.from_dense(nn.Linear(6, 5), mask)


@pytest.mark.parametrize("mask, message", [
    (torch.ones(5, 6), r"float32 \[5, 6\]: expected bool \[5, 6\]"), (torch.ones(6, 5).bool(), r"bool \[6, 5\]"),
    (torch.zeros(5, 6).bool(), "keeps nothing"), ([[True]], "the mask is list"), (torch.ones(30).bool(), r"\[30\]"),
])
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        FanInLinear.from_dense(nn.Linear(6, 5), mask)


# Files and copies


def saved(layer, way):
    """The state_dict of a layer, after a way through a file."""
    file = io.BytesIO()
    if way == "torch":
        torch.save(layer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)
    if way == "safetensors":
        return safetensors.torch.load(safetensors.torch.save(layer.state_dict()))
    return pickle.loads(pickle.dumps(layer)).state_dict()


def assert_same_layer(one, other):
    """The same outputs and gradients, which need the connections listed by input."""
    x, grads = torch.randn(5, one.in_features, dtype=one.values.dtype), []
    for layer in (one, other):
        given = x.clone().requires_grad_()
        y = layer(given)
        grads.append((y, *torch.autograd.grad(y.square().sum(), [given, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert torch.equal(one.mask(), other.mask())


@pytest.mark.parametrize("way", ["torch", "safetensors", "pickle"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_goes_into_a_layer_of_other_sizes(way, assign):
    source = drawn_layer(8, 10, 3, ablated=2)
    for target in (drawn_layer(8, 10, 5), drawn_layer(8, 10, 3, ablated=2), drawn_layer(8, 10, 10, ablated=7)):
        target(torch.randn(4, 10, requires_grad=True)).sum().backward()  # which lists connections by input
        parameter = target.values
        assert not target.load_state_dict(saved(source, way), assign=assign).missing_keys
        assert assign or target.values is parameter
        assert (target.fan_in, target.n_active, target.values.shape) == (3, 6, (6, 3))
        assert_same_layer(source, target)
        before = source.values.detach().clone()
        torch.optim.SGD(target.parameters(), 0.1).step()
        target.zero_grad()
        target(torch.randn(4, 10)).sum().backward()
        torch.optim.SGD(target.parameters(), 0.1).step()
        assert torch.equal(source.values, before) and not torch.equal(target.values, before)


def test_a_state_goes_into_a_larger_module_and_another_type():
    def network(k, ablated):
        return nn.Sequential(nn.Linear(6, 7), nn.ModuleDict({"a": drawn_layer(5, 7, k, ablated)})["a"], nn.Tanh())

    source, target = network(2, 1), network(4, 0)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(source(x), target(x))
    double = network(3, 2).double()
    double.load_state_dict(source.state_dict())
    assert double[1].values.dtype == torch.float64 and double[1].indices.dtype == torch.int32
    torch.testing.assert_close(double(x.double()), source(x).double())


def test_assigned_tensors_of_other_types_are_read_right_or_refused():
    source, x = drawn_layer(40, 50, 7), torch.randn(2, 50)
    for change in ({"indices": source.indices.long()}, {"values": source.values.detach().t().contiguous().t()},
                   {"indices": source.indices.t().contiguous().t()}, {"rows": source.rows.int()}):
        target = drawn_layer(40, 50, 7)
        try:
            target.load_state_dict({**source.state_dict(), **change}, assign=True)
            y = target(x)
        except (ValueError, RuntimeError):
            continue
        torch.testing.assert_close(y, source(x), msg=f"wrong with {list(change)}")


BAD_STATES = {
    "index too large": (lambda s: s["indices"].__setitem__((0, -1), 10), "indices hold 10: expected 0 to 9"),
    "index below 0": (lambda s: s["indices"].__setitem__((0, 0), -1), "indices hold -1"),
    "index repeated": (lambda s: s["indices"].__setitem__((2, 0), s["indices"][2, 1]), "twice in row 2"),
    "indices of a wrong shape": (lambda s: s.update(indices=s["indices"][:, :2]), r"indices are torch.int32 \[6, 2\]"),
    "float indices": (lambda s: s.update(indices=s["indices"].float()), "indices are torch.float32"),
    "rows unsorted": (lambda s: s.update(rows=s["rows"].flip(0)), "ascending"),
    "rows repeated": (lambda s: s["rows"].__setitem__(1, s["rows"][0]), "ascending"),
    "row too large": (lambda s: s["rows"].__setitem__(-1, 8), "below 8"),
    "row below 0": (lambda s: s["rows"].__setitem__(0, -1), "ascending"),
    "too few rows": (lambda s: s.update(rows=s["rows"][:3]), "rows"),
    "float rows": (lambda s: s.update(rows=s["rows"] + 0.5), "rows"),
    "no connection": (lambda s: s.update({n: s[n][:0] for n in ("rows", "values", "indices")}), "indices"),
    "flat values": (lambda s: s.update(values=s["values"].flatten()), "indices"),
    "no values": (lambda s: s.pop("values"), "values"),
    "no indices": (lambda s: s.pop("indices"), "indices"),
    "no rows": (lambda s: s.pop("rows"), "rows"),
    "no bias": (lambda s: s.pop("bias"), "bias"),
    "bias of a wrong shape": (lambda s: s.update(bias=torch.zeros(9)), "bias"),
}


@pytest.mark.parametrize("same_shape", [True, False])
@pytest.mark.parametrize("bad", BAD_STATES)
def test_a_bad_file_is_refused_and_leaves_the_layer_as_it_was(bad, same_shape):
    change, message = BAD_STATES[bad]
    state = copy.deepcopy(drawn_layer(8, 10, 3, ablated=2).state_dict())
    change(state)
    target = drawn_layer(8, 10, 3, ablated=2) if same_shape else drawn_layer(8, 10, 5)
    before = everything(target)
    with pytest.raises(RuntimeError, match=message):
        target.load_state_dict(state)
    assert_untouched(target, before)
    outer = nn.ModuleDict({"deep": nn.Sequential(target)})
    with pytest.raises(RuntimeError, match=message):
        outer.load_state_dict({f"deep.0.{name}": tensor for name, tensor in state.items()})
    assert_untouched(target, before)


def test_a_state_for_a_narrower_input_is_refused():
    wide, narrow = FanInLinear(20, 4, 2, indices=torch.tensor([[0, 19]] * 4)), FanInLinear(19, 4, 2)
    before = everything(narrow)
    with pytest.raises(RuntimeError, match="indices hold 19: expected 0 to 18"):
        narrow.load_state_dict(wide.state_dict())
    assert_untouched(narrow, before)


def test_indices_out_of_range_are_not_loaded_from_an_incomplete_file_either():
    layer = drawn_layer(8, 10, 3)
    for left_out in ("rows", "values"):
        state = copy.deepcopy(layer.state_dict())
        state.pop(left_out)
        state["indices"] += 1000
        try:
            layer.load_state_dict(state, strict=False)
        except RuntimeError:
            pass
        assert layer.indices.max() < 10, f"without {left_out}"


def test_loaded_indices_ascend():
    source, target = drawn_layer(8, 10, 3), drawn_layer(8, 10, 3)
    state = {**source.state_dict(), "indices": source.indices.flip(1), "values": source.values.detach().flip(1)}
    try:
        target.load_state_dict(state)
    except RuntimeError:
        return
    assert (target.indices[:, 1:] > target.indices[:, :-1]).all()
    assert torch.equal(target.to_dense().weight, source.to_dense().weight)


def test_copies_share_nothing():
    layer = drawn_layer(8, 10, 3, ablated=2)
    layer(torch.randn(4, 10, requires_grad=True)).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_layer(layer, twin)
        before = everything(layer)
        with torch.no_grad():
            twin.values += 1
            twin.bias += 1
            twin.rewire(torch.zeros(6, 3, dtype=torch.bool), torch.tensor([[0, 0], [1, 9]]))
        assert_untouched(layer, before)
        assert_same_layer(layer, layer)
        fresh = drawn_layer(8, 10, 3)
        fresh.load_state_dict(twin.state_dict())
        assert_same_layer(fresh, twin)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert_same_layer(layer, torch.load(file, weights_only=False))


def test_conversions_keep_the_connections():
    layer = drawn_layer(8, 10, 3, ablated=2)
    layer(torch.randn(4, 10, requires_grad=True)).sum().backward()
    mask = layer.mask()
    for convert in (nn.Module.double, nn.Module.half, nn.Module.bfloat16, nn.Module.float,
                    lambda layer: layer.to("cpu", torch.float64), lambda layer: layer.to(torch.float32)):
        layer = convert(layer)
        assert (layer.indices.dtype, layer.rows.dtype) == (torch.int32, torch.int64)
        assert torch.equal(layer.mask(), mask) and layer.values.dtype == layer.bias.dtype
        assert_same_layer(layer, copy.deepcopy(layer))


def test_the_list_by_input_is_kept_until_the_indices_change_and_never_stale():
    layer = drawn_layer(8, 10, 3)

    def check():
        for start, stop in ((0, None), (0, 3), (3, None), (2, 5)):
            kept, fresh = layer.transpose(start, stop), transposing.transpose(layer.indices[start:stop], 10)
            assert all(torch.equal(a, b) for a, b in zip(kept, fresh))
            assert layer.transpose(start, stop) is kept
        assert_same_layer(layer, copy.deepcopy(layer))

    check()
    first = layer.transpose()
    layer.double()
    check()
    assert layer.transpose() is first or all(torch.equal(a, b) for a, b in zip(layer.transpose(), first))
    for change in (lambda: layer.rewire(torch.zeros(8, 3, dtype=torch.bool), drawn_mask(8, 10, 3).nonzero()),
                   lambda: layer.load_state_dict(drawn_layer(8, 10, 3).state_dict()),
                   lambda: layer.load_state_dict(drawn_layer(8, 10, 4, ablated=1).state_dict()),
                   lambda: layer.indices.copy_(layer.indices.flip(0)),
                   lambda: layer.indices.__setitem__(0, torch.tensor([1, 3, 5, 7])),
                   lambda: setattr(layer, "indices", drawn_layer(8, 10, 4, ablated=1).indices),
                   lambda: layer.to("cpu", torch.float32)):
        change()
        check()


# Moving connections


def as_dict(layer, *tensors):
    """{(neuron, input): (value, ...)} of values and of what else has their shape."""
    pairs = [(neuron, column) for neuron, columns in zip(layer.rows.tolist(), layer.indices.tolist())
             for column in columns]
    return dict(zip(pairs, zip(*(tensor.flatten().tolist() for tensor in (layer.values.detach(), *tensors)))))


def moments(layer, optimizer):
    state = optimizer.state.get(layer.values, {})
    return {name: t for name, t in state.items() if isinstance(t, torch.Tensor) and t.ndim}


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
}


def step(layer, optimizer):
    optimizer.zero_grad()
    (layer(torch.randn(6, layer.in_features)) - 1).square().sum().backward()
    optimizer.step()


@st.composite
def moves(draw):
    """A layer, which slots stay, and connections that give every neuron of a new set the same number."""
    n_out, n_in, seed = draw(st.integers(1, 7)), draw(st.integers(1, 8)), draw(seeds)
    torch.manual_seed(seed)
    layer = drawn_layer(n_out, n_in, draw(st.integers(1, n_in)), draw(st.integers(0, n_out - 1)),
                        bias=draw(st.booleans()))
    active, fan = draw(st.sets(st.integers(0, n_out - 1), min_size=1)), draw(st.integers(1, n_in))
    keep, grow = torch.zeros(layer.indices.shape, dtype=torch.bool), []
    for neuron in active:
        kept = []
        if neuron in layer.rows.tolist():
            row = layer.rows.tolist().index(neuron)
            slots = torch.randperm(layer.fan_in)[:min(fan, draw(st.integers(0, layer.fan_in)))]
            keep[row, slots] = True
            kept = layer.indices[row, slots].tolist()
        free = [column for column in torch.randperm(n_in).tolist() if column not in kept]
        grow += [(neuron, column) for column in free[:fan - len(kept)]]
    order = torch.randperm(len(grow))
    return layer, keep, torch.tensor(grow, dtype=torch.int64).view(-1, 2)[order], active, fan


@given(moves(), st.sampled_from(sorted(OPTIMIZERS)), st.integers(0, 2), st.integers(1, 40))
def test_rewire_is_moving_the_entries_of_a_dict(move, name, steps, chunk):
    layer, keep, grow, active, fan = move
    optimizer, parameter = OPTIMIZERS[name](layer.parameters()), layer.values
    for _ in range(steps):
        step(layer, optimizer)
    bias = None if layer.bias is None else layer.bias.detach().clone()
    kinds = list(moments(layer, optimizer))
    count = len(kinds) + 1
    before = as_dict(layer, *moments(layer, optimizer).values())
    kept = {pair: entry for (pair, entry), stays in zip(before.items(), keep.flatten().tolist()) if stays}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fan_in, "CHUNK", chunk)
        assert layer.rewire(keep, grow, optimizer) is None
    assert layer.values is parameter and isinstance(parameter, nn.Parameter) and parameter.requires_grad
    assert (layer.rows.tolist(), layer.fan_in) == (sorted(active), fan)
    assert layer.values.shape == layer.indices.shape == (len(active), fan) and layer.indices.dtype == torch.int32
    assert (layer.indices[:, 1:] > layer.indices[:, :-1]).all() and layer.rows.dtype == torch.int64
    assert list(moments(layer, optimizer)) == kinds
    assert as_dict(layer, *moments(layer, optimizer).values()) == kept | {
        tuple(pair): (0.0,) * count for pair in grow.tolist()}
    assert bias is None or torch.equal(layer.bias, bias)
    assert all(t.is_contiguous() for t in layer.state_dict().values())
    before = layer.values.detach().clone()
    step(layer, optimizer)
    assert layer.values.grad.shape == layer.values.shape and not torch.equal(before, layer.values)
    assert_same_layer(layer, copy.deepcopy(layer))


def test_growth_at_zero_leaves_the_outputs_as_they_were():
    layer, x = drawn_layer(8, 10, 3, ablated=2), torch.randn(70, 10)
    before = layer(x)
    keep = torch.ones(6, 3, dtype=torch.bool)
    grow = torch.tensor([[neuron, column] for neuron, connected in enumerate(layer.mask().tolist())
                         for column in [i for i in range(10) if not connected[i]][:5 if not any(connected) else 2]])
    layer.rewire(keep, grow)
    assert (layer.n_active, layer.fan_in) == (8, 5)
    torch.testing.assert_close(layer(x), before)
    assert ((layer.values == 0).sum(), layer.mask().sum()) == (40 - 18, 40)  # a value of 0 is a connection


def test_rewire_in_place_with_nothing_to_grow():
    layer = drawn_layer(4, 10, 4)
    keep = torch.tensor([[True, True, False, False]] * 3 + [[False] * 4])
    before = as_dict(layer)
    for grow in (torch.empty(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int32)):
        twin = copy.deepcopy(layer)
        twin.rewire(keep, grow)
        assert (twin.n_active, twin.fan_in) == (3, 2) and set(as_dict(twin).items()) < set(before.items())


def test_neurons_times_inputs_may_be_above_32_bits():
    n = 70_000
    columns = torch.arange(n).flip(0)[:, None]
    layer = FanInLinear(n, n, 1, indices=columns)
    keep = torch.arange(n)[:, None] % 2 == 0
    values, grow = layer.values.detach().clone(), torch.stack([torch.arange(1, n, 2)] * 2, 1)
    layer.rewire(keep, grow)
    assert torch.equal(layer.indices.long(), torch.where(keep, columns, torch.arange(n)[:, None]))
    assert torch.equal(layer.values, values * keep)


BAD_MOVES = {
    "keep is no mask": (lambda k, g: (k.float(), g), r"keep is torch.float32 \[6, 3\]: expected bool \[6, 3\]"),
    "keep of all neurons": (lambda k, g: (torch.ones(8, 3).bool(), g), r"\[8, 3\]: expected bool \[6, 3\]"),
    "triples": (lambda k, g: (k, torch.zeros(1, 3).long()), r"grow has shape \[1, 3\]"),
    "one pair, flat": (lambda k, g: (k, torch.tensor([0, 1])), r"grow has shape \[2\]"),
    "neuron too large": (lambda k, g: (k, torch.tensor([[8, 0]])), r"\[8, 0\]: expected a neuron below 8"),
    "input too large": (lambda k, g: (k, torch.tensor([[0, 10]])), r"\[0, 10\].*an input below 10"),
    "input below 0": (lambda k, g: (k, torch.tensor([[0, -1]])), r"\[0, -1\]"),
    "neuron below 0": (lambda k, g: (k, torch.tensor([[-1, 0]])), r"\[-1, 0\]"),
    "unequal rows": (lambda k, g: (k, g[:1]), "the same number, or none"),
    "nothing left": (lambda k, g: (~k, g[:0]), "no connection is left"),
    "what is kept": (lambda k, g: (k, g), "twice"),
    "twice the same": (lambda k, g: (~k, torch.cat([g, g])), "twice"),
    "between two inputs": (lambda k, g: (~k, g + 0.5), "grow"),
}


@pytest.mark.parametrize("bad", BAD_MOVES)
def test_a_bad_move_is_refused_and_leaves_layer_and_optimizer_as_they_were(bad):
    layer = drawn_layer(8, 10, 3, ablated=2)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    step(layer, optimizer)
    step(layer, optimizer)
    before, state = everything(layer), {name: t.clone() for name, t in optimizer.state[layer.values].items()}
    listed = layer.transpose()
    change, message = BAD_MOVES[bad]
    connected = torch.stack([layer.rows, layer.indices[:, 1].long()], 1)
    with pytest.raises(ValueError, match=message):
        layer.rewire(*change(torch.ones(6, 3, dtype=torch.bool), connected), optimizer)
    assert_untouched(layer, before)
    assert all(torch.equal(t, state[name]) for name, t in optimizer.state[layer.values].items())
    assert all(torch.equal(a, b) for a, b in zip(layer.transpose(), listed))


def test_the_graph_of_an_earlier_step_does_not_disturb_a_later_one():
    layer, x, alive = drawn_layer(8, 10, 3), torch.randn(4, 10), []
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    for k in (3, 5, 2, 2):
        alive.append(layer(x).square().sum())
        alive[-1].backward(retain_graph=True)
        optimizer.step()
        layer.rewire(torch.zeros_like(layer.indices, dtype=torch.bool), drawn_mask(8, 10, k).nonzero(), optimizer)
        twin = dense_twin(layer)
        alive.append((layer(x) - 1).square().sum())
        alive[-1].backward()
        (twin(x.double()) - 1).square().sum().backward()
        torch.testing.assert_close(layer.values.grad.double(), of_connections(layer, twin.weight.grad), rtol=1e-4,
                                   atol=1e-4)
        optimizer.step()
        optimizer.zero_grad()


def test_a_gradient_by_connections_that_are_gone_is_refused():
    for k in (3, 4):
        layer = drawn_layer(8, 10, 3)
        loss = layer(torch.randn(4, 10)).sum()
        layer.rewire(torch.zeros(8, 3, dtype=torch.bool), drawn_mask(8, 10, k).nonzero())
        with pytest.raises(RuntimeError, match="rewired between forward and backward"):
            loss.backward()
        assert layer.values.grad is None


def test_indices_changed_between_forward_and_backward_are_noticed():
    layer = drawn_layer(8, 10, 3)
    x = torch.randn(4, 10, requires_grad=True)
    y, right = layer(x).sum(), layer.to_dense().weight.sum(0).expand(4, 10)
    layer.indices.copy_(drawn_layer(8, 10, 3).indices)
    try:
        y.backward()
    except RuntimeError:
        return
    torch.testing.assert_close(x.grad, right)


class Shapes(TorchDispatchMode):
    """Records the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.largest, self.calls = 0, 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls += 1
        self.largest = max([self.largest] + [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(out)
                                             if isinstance(t, torch.Tensor)])
        return out


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("batch", [1, 16])
def test_no_step_holds_anything_dense(name, batch):
    n_out, n_in, k = 900, 1100, 4
    with Shapes() as shapes:
        layer = FanInLinear(n_in, n_out, k)
        optimizer = OPTIMIZERS[name](layer.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(batch, n_in, requires_grad=True)).square().sum().backward()
            optimizer.step()
            keep = torch.ones(n_out, k, dtype=torch.bool)
            keep[:, :2] = False
            columns = sample_columns(n_out, n_in, 2, taken=layer.indices)
            grow = torch.stack([torch.arange(n_out).repeat_interleave(2), columns.flatten().long()], 1)
            layer.rewire(keep, grow, optimizer)
        pickle.dumps(layer.state_dict())
    assert shapes.calls > 50 and shapes.largest <= 16 * (n_in + n_out) < n_in * n_out / 20


# Drawing columns


@given(st.integers(0, 12), st.integers(1, 60), st.data(), st.integers(1, 100), seeds)
def test_drawn_columns_are_distinct_ascending_and_free(n, n_in, data, chunk, seed):
    torch.manual_seed(seed)
    k = data.draw(st.integers(0, n_in))
    count = data.draw(st.integers(0, n_in - k) | st.just(n_in - k))
    taken = torch.rand(n, n_in).argsort(1)[:, :k] if k or data.draw(st.booleans()) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fan_in, "CHUNK", chunk)
        columns = sample_columns(n, n_in, count, taken=taken)
    assert columns.shape == (n, count) and columns.dtype == torch.int32
    for row, other in zip(columns.tolist(), taken.tolist() if taken is not None else [[]] * n):
        assert row == sorted(set(row)) and not set(row) & set(other) and set(row) <= set(range(n_in))


@pytest.mark.parametrize("n_in, k, count", [(40, 0, 3), (40, 4, 6), (40, 0, 11), (40, 20, 10), (40, 25, 14)])
def test_every_free_column_is_drawn_equally_often(n_in, k, count):
    n, generator = 30_000, torch.Generator().manual_seed(5)
    taken = torch.arange(k).expand(n, k)
    columns = sample_columns(n, n_in, count, taken=taken, generator=generator)
    counts, p = torch.bincount(columns.flatten(), minlength=n_in)[k:].double(), count / (n_in - k)
    free = n_in - k - 1
    assert ((counts - n * p) ** 2).sum() / (n * p * (1 - p)) * free / (free + 1) < free + 6 * (2 * free) ** 0.5


@pytest.mark.parametrize("n_in", [6, 8, 9])
def test_every_set_of_columns_is_drawn_equally_often(n_in):
    n, sets = 30_000, n_in * (n_in - 1) // 2  # pairs; 8 and 9 inputs are many enough to draw again
    columns = sample_columns(n, n_in, 2, generator=torch.Generator().manual_seed(7)).long()
    seen = torch.bincount(columns[:, 0] * n_in + columns[:, 1])
    seen = seen[seen > 0].double()
    assert len(seen) == sets and ((seen - n / sets) ** 2).sum() / (n / sets) < sets - 1 + 6 * (2 * sets - 2) ** 0.5


def test_rows_are_drawn_apart_and_the_generator_alone_decides():
    state = torch.get_rng_state()
    one, two = (sample_columns(200, 1000, 20, generator=torch.Generator().manual_seed(6)) for _ in range(2))
    assert torch.equal(one, two) and len({tuple(row) for row in one.tolist()}) == 200
    dense = sample_columns(200, 30, 20, generator=torch.Generator().manual_seed(6))
    assert len({tuple(row) for row in dense.tolist()}) == 200
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n_in", [32_768, 40_000, 65_536, 70_000, 3_000_000])
def test_wide_inputs_need_more_than_16_bits(n_in):
    columns = sample_columns(400, n_in, 64)
    assert columns.min() >= 0 and n_in * 0.99 < columns.max() < n_in
    layer = FanInLinear(n_in, 2, 1, indices=torch.tensor([[n_in - 1], [n_in // 2]]))
    x = torch.zeros(1, n_in)
    x[0, -1] = 1
    assert torch.equal(layer(x), torch.tensor([[layer.values[0].item(), 0.0]]))
    layer(x).sum().backward()
    assert layer.values.grad.tolist() == [[1], [0]]


def test_many_rows_are_drawn_in_few_steps_and_never_as_a_whole():
    n, n_in = 300_000, 1000
    taken = sample_columns(n, n_in, 8)
    with Shapes() as shapes:
        columns = sample_columns(n, n_in, 8, taken=taken)
    assert shapes.largest <= 2 * max(fan_in.CHUNK, n * 8) < n * n_in / 50 and shapes.calls < n / 100
    assert (torch.cat([columns, taken], 1).sort(1).values.diff(dim=1) > 0).all()


def test_many_of_few_columns_are_drawn_in_chunks_too():
    n, n_in = 30_000, 500
    with Shapes() as shapes:
        columns = sample_columns(n, n_in, 200)
    assert shapes.largest <= max(fan_in.CHUNK, n * 200) < n * n_in and (columns.diff(dim=1) > 0).all()


@pytest.mark.parametrize("count, taken, message", [
    (5, None, "count is 5: expected 0 to 4"), (-1, None, "count is -1"), (3, 2, "count is 3: expected 0 to 2"),
    (1.0, None, "count is 1.0"),
])
def test_counts_that_do_not_fit_are_refused(count, taken, message):
    with pytest.raises(ValueError, match=message):
        sample_columns(3, 4, count, taken=taken if taken is None else torch.tensor([[0, 1]] * 3))


@pytest.mark.parametrize("taken", [torch.tensor([[1]]), torch.tensor([[1], [2]]), torch.tensor([1, 2, 3])])
def test_taken_columns_of_other_rows_are_refused(taken):
    with pytest.raises(ValueError, match="taken"):
        sample_columns(3, 20, 2, taken=taken)


def test_what_is_no_tensor_or_no_linear_layer_is_named():
    layer = drawn_layer(8, 10, 3)
    with pytest.raises(ValueError, match="the input is a ndarray: expected a torch.Tensor"):
        layer(torch.ones(2, 10).numpy())
    with pytest.raises(ValueError, match="got a FanInLinear: expected a torch.nn.Linear"):
        FanInLinear.from_dense(layer, layer.mask())
    with pytest.raises(ValueError, match="grow is a list: expected a torch.Tensor"):
        layer.rewire(torch.ones(8, 3, dtype=torch.bool), [[0, 1]])


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_whose_state_cannot_move_along_is_refused_and_nothing_changes(kind):
    layer = drawn_layer(8, 10, 3)
    optimizer = kind(layer.parameters())

    def loss():
        optimizer.zero_grad()
        total = layer(torch.ones(2, 10)).square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    before = everything(layer)
    keep = torch.ones(8, 3, dtype=torch.bool)
    keep[0] = False
    with pytest.raises(ValueError, match="the optimizer has .* of shape .* for values .*: expected the same shape"):
        layer.rewire(keep, torch.empty(0, 2, dtype=torch.int64), optimizer)
    assert_untouched(layer, before)
