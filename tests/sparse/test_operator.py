"""The fan-in layer in compiled code: the operator and its derivative against the layer as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from permask_core.sparse import FanInLinear, kernels
from permask_core.sparse.kernels.operator import fan_in


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def network(bias=True):
    torch.manual_seed(0)
    layers = FanInLinear(12, 20, 4, bias), nn.ReLU(), FanInLinear(20, 6, 5, bias)
    layers[0].rewire(torch.arange(20)[:, None].expand(-1, 4) % 3 != 0, torch.empty(0, 2, dtype=torch.int64))  # ablates
    return nn.Sequential(*layers)


def gradients(call, model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("bias", [True, False])
def test_compiled_as_a_whole_it_computes_the_same_also_after_rewiring(bias):
    model = network(bias)
    # Without a graph break, and without a compiler of C++, which not every machine has.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (1, 5, 9):
        x = torch.randn(batch, 12)
        for found, expected in zip(gradients(compiled, model, x), gradients(model, model, x)):
            assert torch.allclose(found, expected, atol=1e-5)
    layer = model[2]
    layer.rewire(torch.zeros(6, 5, dtype=torch.bool), torch.tensor([[i, j] for i in range(6) for j in (2, 3, 17)]))
    x = torch.randn(5, 12)
    for found, expected in zip(gradients(compiled, model, x), gradients(model, model, x)):
        assert torch.allclose(found, expected, atol=1e-5)


def test_the_list_by_input_is_made_once_in_compiled_code_too(monkeypatch):
    model, made, real = network(), [], kernels.transpose
    monkeypatch.setattr(kernels, "transpose", lambda *given: made.append(given) or real(*given))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        gradients(compiled, model, torch.randn(4, 12))
    assert len(made) == 2


def test_compiled_under_autocast_it_computes_in_half_precision():
    model, x = network(), torch.randn(4, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=2e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant):
    model, x = network(), torch.randn(4, 12)
    plain = gradients(model, model, x)
    again = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant), model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_keeps_the_rules_of_torch(bias, dtype):
    layer = copy.deepcopy(network(bias)[2]).to(dtype)
    x = torch.randn(3, 20, dtype=dtype, requires_grad=True)
    report = torch.library.opcheck(fan_in, (x, layer.values, layer.indices, layer.bias))
    assert set(report.values()) == {"SUCCESS"}


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_needed_are_there(needed):
    layer = network()[2]
    given = torch.randn(3, 20), layer.values.detach(), layer.bias.detach()
    x, values, bias = (tensor.clone().requires_grad_(need) for tensor, need in zip(given, needed))
    fan_in(x, values, layer.indices, bias).sum().backward()
    assert [tensor.grad is not None for tensor in (x, values, bias)] == list(needed)


def test_other_sizes_of_a_batch_compile_nothing_anew():
    model, graphs = network(), []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counted)
    with torch.no_grad():
        for batch in (3, 4, 7, 20):
            assert compiled(torch.randn(batch, 12)).shape == (batch, 6)
    assert len(graphs) == 1


def test_hooks_that_save_tensors_elsewhere_change_no_gradient():
    model, x = network(), torch.randn(4, 12)
    plain = gradients(model, model, x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        moved = gradients(model, model, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved))
