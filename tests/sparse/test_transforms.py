"""Networks of fan-in layers under torch.func, torch.export and tracing, and without numbers, against dense networks."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn import functional as F

from permask_core.masks import apply_masks
from permask_core.sparse import FanInAttention, FanInConv2d, FanInLinear, condense
from permask_core.sparse.dynamic import constant_fan_in_masks

X = torch.randn(3, 4, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 2, 0])


def network(seed=0, **given):
    """Three fan-in layers, of which one has two ablated channels unless it is on the meta device."""
    generator = torch.Generator().manual_seed(seed)
    given = {"dtype": torch.float64, **({} if given else {"generator": generator}), **given}
    layers = (FanInConv2d(4, 6, 3, 5, padding=1, groups=2, **given), nn.Tanh(),
              FanInConv2d(6, 8, 1, 2, stride=2, **given), nn.Flatten(), FanInLinear(160, 10, 7, **given))
    return nn.Sequential(*layers)


def ablated():
    model = network()
    model[2].rewire((torch.arange(8) % 4 != 0)[:, None].expand(8, 2), torch.empty(0, 2, dtype=torch.int64))
    return model


def dense(model):
    """The same network of dense layers."""
    return nn.Sequential(*(one.to_dense() if hasattr(one, "to_dense") else one for one in model))


def of_connections(model, gradients):
    """Gradients of dense parameters [..., *shape] as those of the fan-in layers."""
    found = {}
    for name, tensor in gradients.items():
        owner, kind = name.split(".")
        layer = model[int(owner)]
        if kind == "weight":
            tensor = tensor.reshape(*tensor.shape[:-len(layer.weight_shape)], *layer.mask().flatten(1).shape)
            found[f"{owner}.values"] = tensor[..., layer.rows[:, None], layer.indices.long()]
        else:
            found[name] = tensor
    return found


def loss(model, parameters, x, label):
    return F.cross_entropy(functional_call(model, parameters, (x[None],)), label[None])


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_vmap_over_inputs():
    model = ablated()
    torch.testing.assert_close(vmap(model)(X[:, None])[:, 0], dense(model)(X))
    torch.testing.assert_close(vmap(model[4])(torch.ones(2, 5, 160).double()), model[4](torch.ones(2, 5, 160).double()))


def test_gradients_of_single_examples():
    model = ablated()
    found = vmap(grad(lambda *given: loss(model, *given)), (None, 0, 0))(parameters_of(model), X, LABELS)
    twin = dense(model)
    wanted = vmap(grad(lambda *given: loss(twin, *given)), (None, 0, 0))(parameters_of(twin), X, LABELS)
    torch.testing.assert_close(found, of_connections(model, wanted))
    one = torch.autograd.grad(F.cross_entropy(model(X[1:2]), LABELS[1:2]), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), one):  # also those of the compiled loops
        torch.testing.assert_close(found[name][1], gradient)


def test_second_derivatives():
    model = ablated()
    twin, given, exact = dense(model), parameters_of(model), parameters_of(dense(model))
    found = hessian(lambda values: loss(model, {**given, "2.values": values}, X[0], LABELS[0]))(given["2.values"])
    wanted = hessian(lambda weight: loss(twin, {**exact, "2.weight": weight}, X[0], LABELS[0]))(exact["2.weight"])
    rows, columns = model[2].rows[:, None], model[2].indices.long()
    wanted = wanted.reshape(8, 6, 8, 6)[rows, columns][..., rows, columns]
    assert found.any()
    torch.testing.assert_close(found, wanted)


def test_derivatives_along_a_direction():
    model = ablated()
    torch.testing.assert_close(jvp(model, (X,), (X.flip(0),)), jvp(dense(model), (X,), (X.flip(0),)))


def test_an_ensemble_with_different_connections():
    models = [network(seed) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    found = vmap(lambda *state: functional_call(base, state, (X,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(X) for model in models]))
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_only_torch_and_takes_batches_of_any_size(strict):
    model = ablated().eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operations and all(name.startswith("aten.") or "sym" in name for name in operations), operations
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in (X, X[:2], X.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(loaded(x), dense(model)(x))
    stored = {name: tensor.numel() for name, tensor in program.state_dict.items()}
    assert stored == {name: tensor.numel() for name, tensor in model.state_dict().items()}  # no dense weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trained", [False, True])
def test_a_traced_network_computes_the_same_for_other_inputs(trained):
    model = ablated()
    with torch.set_grad_enabled(trained):
        traced = torch.jit.trace(model, X)
    torch.testing.assert_close(traced(X.flip(0)), dense(model)(X.flip(0)))


def test_convolutions_compiled_as_a_whole():
    torch.compiler.reset()
    model = ablated()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in (X, X[:1]):
        results = []
        for call in (compiled, model):
            y = call(x)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("context", [False, True])
def test_the_meta_device_gives_shapes_and_takes_a_state(context):
    if context:
        with torch.device("meta"):
            empty = network(device=None)
    else:
        empty = network(device="meta")
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    y = empty(X.to("meta"))
    assert y.is_meta and y.shape == (3, 10)
    y.sum().backward()
    assert empty[0].values.grad.shape == (6, 5) and empty[0].values.grad.is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert empty[4](torch.empty(2, 160, device="meta", dtype=torch.float64)).shape == (2, 10)
    source = ablated()
    for assign in (True, False):
        model = copy.deepcopy(empty)
        if not assign:
            model = model.to_empty(device="cpu")
            assert model(X).shape == (3, 10)  # any numbers, but none from outside the input
        model.load_state_dict(source.state_dict(), assign=assign)
        torch.testing.assert_close(model(X), source(X))


def test_a_network_moves_to_the_meta_device_with_its_ablated_channels():
    model = ablated().to("meta")
    assert model(X.to("meta")).shape == (3, 10) and model[2].n_active == 6


def test_fake_tensors_have_shapes_and_gradients():
    with FakeTensorMode():
        model = network(device="cpu")
        y = model(torch.empty(3, 4, 9, 8, dtype=torch.float64))
        y.sum().backward()
    assert y.shape == (3, 10) and model[4].values.grad.shape == (10, 7)
    assert not any(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in model.state_dict().values())


# torch.onnx.export writes these as Constant, Cast, Unsqueeze, ScatterND, Reshape, Pad, Conv, Transpose, Gemm, Tanh and
# Shape, and leaves out the assertion.
IN_ONNX = {"full", "_to_copy", "unsqueeze", "index_put", "view", "constant_pad_nd", "convolution", "permute", "addmm",
           "tanh", "sym_size", "_assert_tensor_metadata"}


def test_an_exported_program_spreads_the_connections_by_operations_that_onnx_has():
    """One operation for each layer puts the values into a weight of zeros."""
    model = ablated().float().eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (X.float(),), dynamic_shapes=(batch,)).run_decompositions()
    names = [str(node.target).split(".")[1] for node in program.graph.nodes if "aten." in str(node.target)]
    assert names.count("index_put") == 3 and set(names) <= IN_ONNX, set(names) - IN_ONNX
    torch.testing.assert_close(program.module()(X[:2].float()), dense(model)(X[:2].float()))


TOKENS = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def encoders():
    """Torch's transformer encoder under masks, and the same network with fan-in layers and attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    masks = constant_fan_in_masks({name: w for name, w in model.named_parameters() if w.ndim == 2}, 0.3, seed=0)
    found = condense(model, masks).model
    assert sum(isinstance(module, FanInAttention) for module in found.modules()) == 2
    return apply_masks(model, masks), found


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_encoder_takes_sentences_of_any_length(strict):
    exact, model = encoders()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(model, (TOKENS,), dynamic_shapes=(sizes,), strict=strict)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") or "sym" in name for name in names), names
    for x in (TOKENS, TOKENS.repeat(2, 2, 1), TOKENS[:2, :3]):
        torch.testing.assert_close(program.module()(x), exact(x))


def test_an_encoder_compiled_as_a_whole():
    torch.compiler.reset()
    exact, model = encoders()
    compiled, steps = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for call in (compiled, model):
        y = call(TOKENS)
        steps.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(*steps)
    torch.testing.assert_close(steps[0][0], exact(TOKENS).detach())


def test_vmap_over_sentences_and_their_gradients():
    exact, model = encoders()
    torch.testing.assert_close(vmap(model)(TOKENS[:, None])[:, 0], exact(TOKENS))

    def squared(parameters, x):
        return functional_call(model, parameters, (x[None],)).square().sum()

    found = vmap(grad(squared), (None, 0))(parameters_of(model), TOKENS)
    whole = torch.autograd.grad(model(TOKENS).square().sum(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), whole):
        torch.testing.assert_close(found[name].sum(0), gradient)


def test_copies_of_an_encoder_and_its_shapes_on_the_meta_device():
    exact, model = encoders()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(TOKENS), exact(TOKENS))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    empty = copy.deepcopy(model).to("meta")
    y = empty(TOKENS.to("meta"))
    assert y.is_meta and y.shape == TOKENS.shape
    empty.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(empty(TOKENS), exact(TOKENS))
