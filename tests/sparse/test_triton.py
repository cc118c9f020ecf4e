"""Fan-in kernels for a GPU: what is theirs alone. That they compute the right numbers is in test_kernels.py.

Without a GPU they are interpreted; one test compiles them for a GPU that is not there.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

from permask_core.sparse import FanInLinear, kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton():
    try:
        return importlib.import_module("permask_core.sparse.kernels.triton")
    except ImportError as error:
        (pytest.fail if os.environ.get("PERMASK_REQUIRE_TRITON") == "1" else pytest.skip)(f"no Triton: {error}")


@pytest.fixture
def chosen(triton, monkeypatch):
    """Layers take the kernels for a GPU wherever they are."""
    monkeypatch.setattr(kernels, "_kernels", lambda *given: triton)


def connected(n, inputs, k):
    return torch.rand(n, inputs).argsort(1)[:, :k].sort(1).values.int().to(DEVICE)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("leading", [(), (0,), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("ablated, bias", [(0, True), (3, True), (3, False)])
def test_a_layer_is_the_dense_layer_it_stands_for(leading, ablated, bias):
    torch.manual_seed(0)
    linear, mask = torch.nn.Linear(15, 9, bias), torch.zeros(9, 15, dtype=torch.bool)
    mask.scatter_(1, connected(9, 15, 4).long().cpu(), True)[:ablated] = False
    layer = FanInLinear.from_dense(linear, mask).to(DEVICE)
    twin, x = layer.to_dense(), torch.randn(*leading, 15, device=DEVICE, requires_grad=True)
    grad = torch.randn(*leading, 9, device=DEVICE)
    y = layer(x)
    y.backward(grad)
    found, x.grad = [y, x.grad], None
    right = twin(x)
    right.backward(grad)
    found += [layer.values.grad] + ([layer.bias.grad] if bias else [])
    wanted = [right, x.grad, twin.weight.grad[layer.rows].gather(1, layer.indices.long())]
    wanted += [twin.bias.grad] if bias else []
    for a, b in zip(found, wanted):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("chosen")
def test_a_layer_learns_with_autocast_and_its_values_stay_float32():
    torch.manual_seed(0)
    layer = FanInLinear(16, 4, 3, device=DEVICE)
    x, target = torch.randn(8, 16, device=DEVICE), torch.randn(8, 4, device=DEVICE)
    optimizer, losses = torch.optim.SGD(layer.parameters(), 0.1), []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer(x)
        loss = torch.nn.functional.mse_loss(y.float(), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert y.dtype == torch.bfloat16 and layer.values.dtype == layer.values.grad.dtype == torch.float32
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("inputs, narrow", [(2 ** 15, True), (2 ** 15 + 1, False)])
def test_indices_are_read_as_int16_where_the_last_input_fits(triton, inputs, narrow):
    indices = torch.tensor([[0, inputs - 1]], dtype=torch.int32, device=DEVICE)
    assert triton._narrow(indices, inputs).dtype == (torch.int16 if narrow else torch.int32)
    x = torch.randn(1, inputs, device=DEVICE)
    y = triton.forward(x, torch.ones(1, 2, device=DEVICE), indices)
    assert torch.allclose(y[0, 0], x[0, 0] + x[0, -1])


def test_narrow_indices_are_made_once_and_again_when_the_indices_change(triton):
    indices = connected(4, 9, 3)
    first = triton._narrow(indices, 9)
    assert triton._narrow(indices, 9) is first
    indices.copy_(indices.flip(0))
    assert torch.equal(triton._narrow(indices, 9).int(), indices)
    assert triton._narrow(indices[1:], 9).dtype == torch.int32  # of a slice they would be made in each call


@pytest.mark.parametrize("batch, listed", [(1, 1), (1, 307), (3, 5), (16, 77), (256, 307), (2048, 32), (10 ** 6, 4000)])
def test_the_rule_gives_plans_that_a_processor_can_hold(triton, batch, listed):
    for plan in (triton.rule(batch, listed), *triton._candidates(batch, listed)):
        assert all(size >= 1 and size & (size - 1) == 0 for size in plan[:4])
        assert plan.examples < 2 * batch and plan.chunk < 2 * listed
        assert plan.outputs * plan.chunk * plan.examples <= 8192
        assert not plan.tiled or plan.examples < batch


def test_a_measured_plan_is_the_fastest_and_kept(triton, monkeypatch, tmp_path):
    """With a clock of its own: the times of a GPU are not needed to see which plan is taken and where it is kept."""
    monkeypatch.setenv("PERMASK_TUNE", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton, "_measured", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    wanted, tried = triton._candidates(256, 300)[5], []

    def timed(call, *given):
        call()
        return 1.0 if tried[-1] == wanted else 2.0

    monkeypatch.setattr(triton.triton.testing, "do_bench", timed)

    class OnGpu:
        is_cuda, device, dtype = True, "cuda:0", torch.float32

    plan = triton._plan("forward", tried.append, OnGpu, 256, 300, 10, 300)
    assert plan == wanted and set(tried) == set(triton._candidates(256, 300))
    (kept,) = json.loads((tmp_path / "cache" / "permask_plans.json").read_text()).values()
    assert triton.Plan(*kept) == wanted
    tried.clear()
    monkeypatch.setattr(triton, "_measured", {})  # as in the next process
    assert triton._plan("forward", tried.append, OnGpu, 200, 300, 10, 300) == wanted and not tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert triton._plan("forward", tried.append, OnGpu, 2000, 300, 10, 300) == triton.rule(2000, 300) and not tried
    monkeypatch.setenv("PERMASK_TUNE", "0")
    assert triton._plan("forward", tried.append, OnGpu, 200, 300, 10, 300) == triton.rule(200, 300) and not tried


@pytest.mark.parametrize("reason", ["triton", "compiler"])
def test_without_triton_or_a_compiler_the_layer_says_so_once_and_goes_on(monkeypatch, reason):
    kernels._triton.cache_clear()
    if reason == "triton":
        monkeypatch.delitem(sys.modules, "permask_core.sparse.kernels.triton", raising=False)
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.setenv("CC", "cc")
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(kernels.shutil, "which", lambda name: None)

    class OnGpu:
        is_cuda, is_cpu, dtype = True, False, torch.float32

    try:
        with pytest.warns(UserWarning, match=f"slower path in plain torch: .*{reason}") as caught:
            found = [kernels._kernels(OnGpu, OnGpu, OnGpu) for _ in range(3)]
    finally:
        kernels._triton.cache_clear()
    assert found == [kernels.eager] * 3 and len(caught) == 1


def test_double_precision_takes_the_plain_path():
    class OnGpu:
        is_cuda, is_cpu, dtype = True, False, torch.float64

    assert kernels._kernels(OnGpu, OnGpu, OnGpu) is kernels.eager


COMPILE = """
    import json
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from permask_core.sparse.kernels import triton as own

    def compiled(kernel, types, fixed, odd=()):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
        even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in (*fixed, *odd)}
        kernel = compile(ASTSource(kernel, signature, fixed, even), target=GPUTarget("cuda", 90, 32))
        return kernel.asm["ptx"], len(kernel.asm["cubin"])

    for kind in ("fp32", "fp16", "bf16"):
        forward = dict.fromkeys(("table", "values", "bias", "y"), "*" + kind) | {"indices": "*i16"}
        by_input = dict.fromkeys(("table", "values", "dx"), "*" + kind)
        by_input |= {"pointers": "*i64", "outputs": "*i32", "slots": "*i32"}
        by_value = dict.fromkeys(("x", "grad", "dvalues"), "*" + kind) | {"indices": "*i32"}
        plan = {"CHUNK": 32, "EXAMPLES": 64}
        # Triton makes constants of arguments that are 1, and 64 bits of large ones.
        one = {"CHUNK": 32, "EXAMPLES": 1, "batch": 1, "width": 1, "room": 1, "stride": 1}
        large = {"step": "i64", "slots": "*i64", "indices": "*i32"}
        compiled(own._forward, forward | large, one | {"BIAS": False, "OUTPUTS": 4, "LISTS": 4, "k": 1, "n": 1})
        compiled(own._by_input, by_input | large, one | {"blocks": 1, "inputs": 1})
        odd = {"CHUNK": 32, "EXAMPLES": 1, "OUTPUTS": 4, "LISTS": 4}
        compiled(own._by_value, by_value, odd | {"room": 1, "k": 1, "n": 1})
        print(json.dumps([kind, *map(list, (
            *(compiled(own._forward, forward, plan | {"BIAS": True, "OUTPUTS": n, "LISTS": 1}, ["k"]) for n in (1, 8)),
            compiled(own._by_input, by_input, plan),
            *(compiled(own._by_value, by_value, plan | {"OUTPUTS": n, "LISTS": 1}, ["k"]) for n in (1, 8)),
            compiled(own._transpose, {"source": "*" + kind, "target": "*" + kind}, {"SIDE": 32})))]))
"""


@pytest.mark.usefixtures("triton")
def test_the_kernels_compile_for_a_gpu_and_read_rows_in_runs():
    """For the H100 and H200 (compute capability 9.0), by the compiler that Triton brings along."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(COMPILE)], env=environment, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kind for kind, *_ in kinds] == ["fp32", "fp16", "bf16"]
    for _, *built in kinds:
        assert all(size > 1000 for _, size in built)
        for ptx, _ in built[:5]:  # 16 bytes in one load; and sums in float32 whatever the inputs
            assert "ld.global.v4.b32" in ptx and "fma.rn.f32" in ptx
            assert not re.search(r"\b(atom|red)\.", ptx)  # nothing is added in the order in which programs finish


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("warm", [True, False])
def test_a_cuda_graph_of_a_training_step_replays_what_it_was_captured_with(warm):
    torch.manual_seed(0)
    layer, x = FanInLinear(300, 200, 30, device="cuda"), torch.randn(64, 300, device="cuda", requires_grad=True)

    def gradients():
        return torch.autograd.grad(layer(x).square().sum(), [x, layer.values, layer.bias])

    twin = FanInLinear.from_dense(layer.to_dense(), layer.mask())  # nothing is kept of its indices
    right = torch.autograd.grad(twin(x).square().sum(), [x, twin.values, twin.bias])
    torch.nn.Linear(2, 2, device="cuda")(torch.randn(2, 2, device="cuda")).sum().backward()  # cuBLAS starts
    if warm:
        gradients()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        captured = gradients()
    graph.replay()
    for found in (captured, gradients()):  # also plain calls afterwards
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, right))
