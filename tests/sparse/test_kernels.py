"""Fan-in kernels, the compiled and the plain ones, against dense float64 arithmetic with bounds on rounding errors.

Where there is no GPU, those for a GPU are interpreted.
"""

import importlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from permask_core.sparse import kernels
from permask_core.sparse.kernels import cpu, eager, transposing
from tests.hypotheses import LONG, examples

ROOT = Path(__file__).parents[2]
BATCHES = [0, 1, 2, 3, 8, 9, 33, 64, 65, 130]
NAN, INF = float("nan"), float("inf")


class OnGpu:
    """The kernels for a GPU, for tensors that are elsewhere."""

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def __init__(self, module):
        self.module = module

    def call(self, function, *given):
        moved = [type(one)(*(tensor.to(self.device) for tensor in one)) if isinstance(one, tuple) else
                 one.to(self.device) if isinstance(one, torch.Tensor) else one for one in given]
        results = function(*moved)
        return [None if one is None else one.cpu() for one in results] if isinstance(results, tuple) else results.cpu()

    def forward(self, *given):
        return self.call(self.module.forward, *given)

    def backward(self, *given):
        return self.call(self.module.backward, *given)


@pytest.fixture
def triton(monkeypatch):
    """Where continuous integration asks for them they may not be missing."""
    try:
        module = importlib.import_module("permask_core.sparse.kernels.triton")
    except ImportError as error:
        (pytest.fail if os.environ.get("PERMASK_REQUIRE_TRITON") == "1" else pytest.skip)(f"no Triton: {error}")
    if OnGpu.device == "cpu":  # larger programs, since each is interpreted
        rule = module.rule
        monkeypatch.setattr(module, "rule", lambda batch, listed: rule(batch, listed, size=2 ** 14, examples=32))
    return OnGpu(module)


@pytest.fixture(params=["cpu", "eager", "triton"])
def kernel(request):
    return {"cpu": cpu, "eager": eager}.get(request.param) or request.getfixturevalue("triton")


def connected(n, inputs, k):
    return torch.rand(n, inputs).argsort(1)[:, :k].sort(1).values.int()


def case(batch, n, inputs, k, dtype=torch.float32):
    """x, values, indices, bias and a gradient by the output."""
    return (torch.randn(batch, inputs, dtype=dtype), torch.randn(n, k, dtype=dtype), connected(n, inputs, k),
            torch.randn(n, dtype=dtype), torch.randn(batch, n, dtype=dtype))


def dense(values, indices, inputs):
    return torch.zeros(len(values), inputs, dtype=torch.float64).scatter_(1, indices.long(), values.double())


def exact(x, values, indices, bias, grad):
    """The output and the gradients by x and values, each with the sum of the magnitudes of its terms."""
    n, inputs = len(values), x.shape[1]

    def results(x, weight, bias, grad):
        return x @ weight.t() + bias, grad @ weight, (grad.t() @ x).gather(1, indices.long())

    given = x.double(), dense(values, indices, inputs), bias.double(), grad.double()
    terms = values.shape[1] + 1, n, len(x)
    return list(zip(results(*given), results(*(tensor.abs() for tensor in given)), terms))


def assert_rounded(results, references, dtype):
    """Within what sums in any order, rounded once to ``dtype``, may be off; half precision is summed in float32."""
    unit = torch.finfo(dtype).eps / 2 if dtype.itemsize < 4 else 0
    summed = torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps
    for result, (right, magnitude, terms) in zip(results, references):
        assert result.dtype == dtype and result.shape == right.shape
        bound = 1.01 * (summed * (terms + 2) * magnitude + unit * right.abs()) + torch.finfo(dtype).smallest_normal
        assert ((result.double() - right).abs() <= bound).all()


def run(kernel, x, values, indices, bias, grad):
    dx, dvalues = kernel.backward(grad, x, values, indices, kernels.transpose(indices, x.shape[1]), True, True)
    return kernel.forward(x, values, indices, bias), dx, dvalues


sizes = st.integers(1, 40) | st.integers(1, 40) | st.sampled_from([64, 65, 256, 257, 300])


@given(st.sampled_from([torch.float32, torch.float64]), sizes, sizes, st.data(), st.integers(1, 70),
       st.integers(0, 2 ** 31))
def test_both_kernels_are_the_dense_products(dtype, n, inputs, data, block, seed):
    torch.manual_seed(seed)
    # Each width of tile is compiled for each type: of float64 only the narrowest and the widest.
    batch = data.draw(st.sampled_from(BATCHES if dtype == torch.float32 else [0, 1, 2, 3, 8, 65, 130]))
    k = data.draw(st.integers(1, inputs) | st.just(inputs))
    given = case(batch, n, inputs, k, dtype)
    references = exact(*given)
    with pytest.MonkeyPatch.context() as patch:
        if not LONG:  # each number of rows that share connections is compiled for each width, too: see the next test
            patch.setattr(cpu, "shared_rows", lambda indices: 1)
        patch.setattr(transposing, "BLOCK", block)
        patch.setattr(eager, "CHUNK", data.draw(st.integers(1, 50_000)))
        for kernel in (cpu, eager):
            assert_rounded(run(kernel, *given), references, dtype)


# What is compiled for float64, for 8 rows and for 32 examples is compiled for fewer in the same way.
numbers = st.sampled_from([2, 3, 4, 6, 8, 16])
shared_types = (st.tuples(numbers, st.sampled_from([torch.float32, torch.float64])) if LONG else
                st.tuples(numbers, st.just(torch.float32)) | st.just((8, torch.float64)))


@given(shared_types, st.integers(1, 9), sizes, st.sampled_from([0, 1, 2, 3, 33, *([9] if LONG else [])]), st.data(),
       st.integers(0, 2 ** 31))
def test_rows_with_the_same_connections_are_the_dense_products(shared_type, groups, inputs, batch, data, seed):
    torch.manual_seed(seed)
    shared, dtype = shared_type
    x, values, indices, bias, grad = case(batch, shared * groups, inputs, data.draw(st.integers(1, inputs)), dtype)
    indices = indices[::shared].repeat_interleave(shared, 0)
    given = x, values, indices, bias, grad
    assert transposing.shared_rows(indices) >= {2: 2, 3: 1, 4: 4, 6: 2, 8: 8, 16: 8}[shared]  # or more by chance
    assert_rounded(run(cpu, *given), exact(*given), dtype)


def test_how_many_rows_share_connections_is_counted_again_after_a_change():
    indices = connected(4, 50, 7).repeat_interleave(8, 0)
    assert transposing.shared_rows(indices) == 8
    indices[20:24] = connected(1, 50, 7)
    assert transposing.shared_rows(indices) == 4
    indices[31] = (indices[30] + 1) % 50
    assert transposing.shared_rows(indices) == 1


@given(sizes, sizes, st.integers(1, 3), st.booleans(), st.data(), st.integers(0, 2 ** 31))
def test_every_gather_instruction_gives_the_same_bits(n, inputs, batch, biased, data, seed):
    simd = pytest.importorskip("permask_core.sparse.kernels.simd")
    torch.manual_seed(seed)
    x, values, indices, bias, grad = given = case(batch, n, inputs, data.draw(st.integers(1, inputs) | st.just(inputs)))
    found = []
    for lanes in simd.lanes()[0]:
        y = torch.full((batch, n), NAN)
        arrays = cpu._addresses(x, values, indices) + [bias.data_ptr() if biased else 0, y.data_ptr()]
        simd.gather(4, lanes)(*arrays, batch, inputs, n, indices.shape[1])
        found.append(y)
    references = exact(*given[:3], bias if biased else torch.zeros(n), grad)
    assert_rounded(found[:1], references[:1], torch.float32)
    assert all(torch.equal(one, found[0]) for one in found)


@settings(examples(1 / 2), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.sampled_from([0, 1, 2, 3, 9, 33]),
       st.integers(1, 25), st.integers(1, 25), st.data(), st.integers(0, 2 ** 31))
def test_kernels_for_a_gpu_are_the_dense_products_for_every_plan(triton, dtype, batch, n, inputs, data, seed):
    torch.manual_seed(seed)
    shared = data.draw(st.sampled_from([1, 2, 3, 8]))  # neighbouring rows with the same connections
    n = shared * -(-n // shared)
    x, values, indices, bias, grad = case(batch, n, inputs, data.draw(st.integers(1, inputs) | st.just(inputs)), dtype)
    given = x, values, indices[::shared].repeat_interleave(shared, 0), bias, grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transposing, "BLOCK", data.draw(st.integers(1, 70)))
        patch.setattr(transposing, "WIDE", data.draw(st.sampled_from([100, 2 ** 31])))
        sizes = [data.draw(st.sampled_from(drawn)) for drawn in ([1, 4, 32], [2, 8, 32], [4, 16, 64])]
        plan = triton.module.Plan(*sizes, 4, data.draw(st.booleans()))
        patch.setattr(triton.module, "rule", lambda batch, listed: plan)
        assert_rounded(run(triton, *given), exact(*given), dtype)


@pytest.mark.parametrize("batch", BATCHES)
def test_tiles_of_every_width_are_right_where_gathering_is_not_worth_it(batch):
    given = case(batch, 700, 531, 100)
    assert_rounded(run(cpu, *given), exact(*given), torch.float32)


def test_half_precision_is_summed_in_float32_and_rounded_once():
    for dtype in (torch.bfloat16, torch.float16):
        for batch in (1, 3, 65):
            given = case(batch, 30, 50, 20, dtype)
            y, dx, dvalues = kernels.forward(*given[:4]), *kernels.backward(
                given[4], *given[:3], kernels.transpose(given[2], 50))
            assert_rounded((y, dx, dvalues), exact(*given), dtype)


def test_half_precision_takes_the_compiled_loops(monkeypatch):
    pytest.importorskip("permask_core.sparse.kernels.simd")
    for name in ("forward", "backward"):
        monkeypatch.setattr(eager, name, None)  # many times slower
    x, values, indices, bias, grad = case(3, 30, 50, 20, torch.bfloat16)
    transposed = kernels.transpose(indices, 50)
    for own in (values, values.float()):  # the latter under autocast
        y, (dx, dvalues) = kernels.forward(x, own, indices, bias), kernels.backward(grad, x, own, indices, transposed)
        assert (y.dtype, dx.dtype, dvalues.dtype) == (torch.bfloat16, torch.bfloat16, own.dtype)
        assert_rounded((y, dx, dvalues.bfloat16()), exact(x, values, indices, bias, grad), torch.bfloat16)
        assert kernels.backward(grad, x, own, indices, transposed, need_x=False, need_values=False) == (None, None)


def test_a_sum_of_many_numbers_in_bfloat16_would_be_far_off():
    n = 4096
    x, values, indices = (torch.ones(1, n).bfloat16(), torch.full((1, n), 0.1).bfloat16(),
                          torch.arange(n, dtype=torch.int32)[None])
    references = exact(x, values, indices, torch.zeros(1), torch.zeros(1, 1))[:1]
    running = torch.zeros(1, 1).bfloat16()
    for value in values[0]:
        running += value
    with pytest.raises(AssertionError):
        assert_rounded([running], references, torch.bfloat16)
    assert_rounded([kernels.forward(x, values, indices)], references, torch.bfloat16)
    # The same for the gradients: by an input of all outputs, and by a value over the batch.
    given = torch.ones(n, 1).bfloat16(), torch.full((n, 1), 0.1).bfloat16(), torch.zeros(n, 1, dtype=torch.int32)
    for x, grad in ((given[0][:1], torch.ones(1, n)), (given[0], torch.full((n, n), 0.1))):
        grad = grad.bfloat16()
        found = kernels.backward(grad, x, *given[1:], kernels.transpose(given[2], 1))
        assert_rounded(found, exact(x, *given[1:], torch.zeros(n), grad)[1:], torch.bfloat16)


@pytest.mark.parametrize("need", [(True, False), (False, True), (False, False)])
def test_what_is_not_needed_is_none_and_the_rest_as_ever(kernel, need):
    x, values, indices, _, grad = case(33, 20, 30, 7)
    transposed = kernels.transpose(indices, 30)
    whole = kernel.backward(grad, x, values, indices, transposed, True, True)
    part = kernel.backward(grad, x, values, indices, transposed, *need)
    for wanted, one, other in zip(need, whole, part):
        assert torch.equal(one, other) if wanted else other is None


@pytest.fixture
def unfilled_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unfilled_memory_is_nan")
@pytest.mark.parametrize("batch", [1, 3, 40, 70])
@pytest.mark.parametrize("rows", [slice(0, 0), slice(3, 3), slice(0, 1), slice(5, 17), slice(11, 20)])
def test_a_slice_of_rows_is_a_smaller_layer(kernel, batch, rows):
    x, values, indices, bias, grad = case(batch, 20, 30, 7)
    part = x, values[rows], indices[rows], bias[rows], grad[:, rows].contiguous()
    assert_rounded(run(kernel, *part), exact(*part), torch.float32)


@pytest.mark.parametrize("batch", [1, 2, 65])
@pytest.mark.parametrize("argument", [0, 1, 2, 3, 4])
def test_tensors_that_are_not_contiguous_are_read_right_or_refused(batch, argument):
    given = list(case(batch, 80, 90, 70))
    references = exact(*given)
    strided = torch.stack([given[argument], torch.zeros_like(given[argument])], -1)[..., 0]
    assert not strided.is_contiguous()
    given[argument] = strided
    try:
        results = run(cpu, *given)
    except Exception:  # numba refuses in its own words
        return
    assert_rounded(results, references, torch.float32)


@pytest.mark.parametrize("batch", [1, 65])
@pytest.mark.parametrize("change", [{2: torch.int64}, {3: torch.float64}], ids=["int64 indices", "float64 bias"])
def test_other_types_are_read_right_or_refused(batch, change):
    given = list(case(batch, 80, 90, 70))
    references = exact(*given)[:1]
    for argument, dtype in change.items():
        given[argument] = given[argument].to(dtype)
    try:
        results = [kernels.forward(*given[:4])]
    except Exception:
        return
    assert_rounded(results, references, torch.float32)


@pytest.mark.parametrize("poison, batch, k", [(NAN, 1, 5), (INF, 2, 30), (NAN, 3, 9), (INF, 9, 60), (NAN, 65, 5),
                                              (INF, 65, 60)])
def test_what_is_not_finite_reaches_only_what_it_is_connected_to(kernel, poison, batch, k):
    x, values, indices, bias, grad = case(batch, 100, 80, k)
    clean = run(kernel, x, values, indices, bias, grad)
    example, column, neuron = batch - 1, int(indices[0, -1]), 99
    to_column = indices == column
    bad = x.clone()
    bad[example, column] = poison
    y, dx, dvalues = run(kernel, bad, values, indices, bias, grad)
    hit = torch.zeros_like(y, dtype=torch.bool)
    hit[example] = to_column.any(1)
    assert hit.any() and not y[hit].isfinite().any() and torch.equal(y[~hit], clean[0][~hit])
    assert torch.equal(dx, clean[1])
    assert not dvalues[to_column].isfinite().any() and torch.equal(dvalues[~to_column], clean[2][~to_column])
    bad = grad.clone()
    bad[example, neuron] = poison
    _, dx, dvalues = run(kernel, x, values, indices, bias, bad)
    hit = torch.zeros_like(dx, dtype=torch.bool)
    hit[example, indices[neuron].long()] = True
    assert not dx[hit].isfinite().any() and torch.equal(dx[~hit], clean[1][~hit])
    assert not dvalues[neuron].isfinite().any() and torch.equal(dvalues[:neuron], clean[2][:neuron])


@pytest.mark.parametrize("batch, k", [(1, 8), (65, 60)])
def test_a_value_of_exactly_0_stays_a_connection(kernel, batch, k):
    x, values, indices, bias, grad = case(batch, 100, 80, k)
    values[:] = 0
    y, dx, dvalues = run(kernel, x, values, indices, bias, grad)
    assert torch.equal(y, bias.expand(batch, -1)) and (dx == 0).all() and (dvalues != 0).all()
    x[0, indices[7, 3]] = INF
    assert kernel.forward(x, values, indices, bias)[0, 7].isnan()


@pytest.mark.usefixtures("unfilled_memory_is_nan")
def test_inputs_without_a_connection_have_a_gradient_of_0(kernel):
    x, values, indices, bias, grad = case(40, 10, 5, 2)
    wide = torch.randn(40, 1000)
    _, dx, _ = run(kernel, wide, values, indices + 500, bias, grad)
    assert (dx[:, :500] == 0).all() and (dx[:, 505:] == 0).all() and dx[:, 500:505].any()


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(out)
                                         if isinstance(leaf, torch.Tensor)])
        return out


def test_the_plain_kernel_never_gathers_a_whole_layer(monkeypatch):
    given = case(32, 600, 500, 40)
    references = exact(*given)
    monkeypatch.setattr(eager, "CHUNK", 2 ** 14)
    with Largest() as largest:
        results = run(eager, *given)
    assert_rounded(results, references, torch.float32)
    assert largest.numel == 600 * 40  # the values themselves; 32 times as many would be the gather


@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 30), st.data(), st.integers(0, 2 ** 31))
def test_transposed_lists_each_connection_once_in_its_block_by_input_then_output(n, inputs, block, data, seed):
    torch.manual_seed(seed)
    k = data.draw(st.integers(1, inputs))
    indices = connected(n, inputs, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transposing, "BLOCK", block)
        patch.setattr(transposing, "WIDE", 100)  # instead of 2^31
        pointers, outputs, slots = kernels.transpose(indices, inputs)
    assert (pointers.dtype, outputs.dtype) == (torch.int64, torch.int32)
    assert slots.dtype == (torch.int32 if n * k < 100 else torch.int64)
    given = torch.randn(9, inputs), torch.randn(n, k), indices, kernels.Transpose(pointers, outputs, slots)
    grad = torch.randn(9, n)
    for found, expected in zip(cpu.backward(grad, *given, True, True), eager.backward(grad, *given, True, True)):
        assert torch.allclose(found, expected, atol=1e-4)
    listed = [(b, j, int(outputs[p]), int(slots[p])) for b in range(len(pointers)) for j in range(inputs)
              for p in range(pointers[b, j], pointers[b, j + 1])]
    assert listed == sorted((i // block, int(indices[i, s]), i, i * k + s) for i in range(n) for s in range(k))


SETUP = """
import hashlib, os, sys, warnings
import torch

def digest(tensors):
    return hashlib.sha256(b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)).hexdigest()

def case(batch, n, inputs, k, dtype=torch.float32):
    torch.manual_seed(0)
    indices = torch.rand(n, inputs).argsort(1)[:, :k].sort(1).values.int()
    x, values, bias, grad = torch.randn(batch, inputs), torch.randn(n, k), torch.randn(n), torch.randn(batch, n)
    return x.to(dtype), values.to(dtype), indices, bias.to(dtype), grad.to(dtype)

def run(kernel, x, values, indices, bias, grad):
    copy = kernels.transpose(indices, x.shape[1])
    y = kernel.forward(x, values, indices, bias)
    return y, *kernel.backward(grad, x, values, indices, copy, need_x=True, need_values=True)

def error(given):
    x, values, indices, bias, grad = given
    weight = torch.zeros(len(values), x.shape[1]).scatter_(1, indices.long(), values)
    right = x @ weight.t() + bias, grad @ weight, (grad.t() @ x).gather(1, indices.long())
    return max((a - b).abs().max().item() for a, b in zip(run(kernels, *given), right))
"""


FORKED = """
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # as in the workers of a DataLoader
            os._exit(0 if error(case(65, 200, 100, 50)) < 1e-4 and error(case(1, 20, 10, 5)) < 1e-4 else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert error(case(65, 200, 100, 50)) < 1e-4
"""


def script(body, **environment):
    """Run it in a fresh process, with two threads unless its environment says otherwise."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"} | environment
    done = subprocess.run([sys.executable, "-c", SETUP + textwrap.dedent(body)], text=True, timeout=120,
                          capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_threads_follow_torch_whose_number_changes_no_bit_and_a_forked_child_computes_the_same():
    """One process after the other would import everything again."""
    script("""
        torch.set_num_threads(1)
        from permask_core.sparse import kernels
        import numba
        kernels.forward(*case(1, 5, 6, 2)[:4])
        assert torch.get_num_threads() == 1, torch.get_num_threads()
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            run(kernels, *case(200, 600, 400, 100))
            assert (numba.get_num_threads(), torch.get_num_threads()) == (threads, threads), numba.get_num_threads()

        from permask_core.sparse.kernels import eager
        seen = {}
        for batch, n, inputs, k in ((1, 500, 400, 40), (70, 512, 256, 32)):
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                given = case(batch, n, inputs, k, dtype)
                for threads in (1, 2, 2, 2):
                    torch.set_num_threads(threads)
                    for kernel in (kernels, eager):
                        for name, tensor in zip(("y", "dx", "dvalues"), run(kernel, *given)):
                            seen.setdefault((kernel.__name__, batch, dtype, name), set()).add(digest([tensor]))
        varied = [key for key, digests in seen.items() if len(digests) > 1]
        assert not varied, varied
    """ + FORKED)


def test_children_that_are_forked_before_use_compute_the_same_and_number_what_they_compile_differently():
    """The names by which compiled code is called have these numbers."""
    script("""
        from numba.core.bytecode import FunctionIdentity
        from permask_core.sparse import kernels
        from permask_core.sparse.kernels import simd

        def number():
            read, write = os.pipe()
            if not os.fork():
                os.write(write, str(FunctionIdentity.from_function(digest).unique_id).encode())
                os._exit(0)
            os.wait()
            return os.read(read, 99)

        assert len({number() for _ in range(3)}) == 3
        torch.randn(600, 600) @ torch.randn(600, 600)
    """ + FORKED)


def test_more_threads_in_torch_than_numba_has_are_no_error():
    script("""
        from permask_core.sparse import kernels
        torch.set_num_threads(4)
        assert error(case(65, 200, 100, 50)) < 1e-4 and torch.get_num_threads() == 4
    """, NUMBA_NUM_THREADS="1")


def test_without_numba_one_warning_and_the_plain_kernels():
    script("""
        sys.modules["numba"] = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            from permask_core.sparse import FanInLinear, kernels
            assert not caught
            for given in (case(1, 20, 10, 5), case(65, 200, 100, 50)):
                assert error(given) < 1e-4
            layer = FanInLinear(10, 4, 2)
            layer(torch.randn(3, 10)).sum().backward()
        messages = [str(warning.message) for warning in caught]
        assert len(messages) == 1 and "numba" in messages[0], messages
    """)


def test_python_threads_at_once_do_not_disturb_each_other():
    givens = [case(batch, 90 + batch, 70, 30) for batch in (1, 8, 33, 65)]
    alone = [run(cpu, *given) for given in givens]
    wrong, start = [], threading.Barrier(len(givens))

    def work(given, right):
        start.wait()
        for _ in range(30):
            wrong.extend(not torch.equal(a, b) for a, b in zip(run(cpu, *given), right))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(givens, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 30 * 3 * len(givens) and not any(wrong)


def test_autocast_does_not_reach_into_the_plain_kernel():
    given = case(33, 20, 30, 7)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(eager, *given)
    assert_rounded(results, exact(*given), torch.float32)


CACHED = """
import hashlib, os, sys, torch
from permask_core.sparse.kernels import cpu, eager, transpose
cpu._simd()

def bits_and_error(batch):
    generator = torch.Generator().manual_seed(0)
    x, values, grad = (torch.randn(*shape, generator=generator) for shape in ((batch, 400), (500, 120), (batch, 500)))
    indices = torch.rand(500, 400, generator=generator).argsort(1)[:, :120].int()
    lists = transpose(indices, 400)
    ours = cpu.forward(x, values, indices), *cpu.backward(grad, x, values, indices, lists, True, True)
    plain = eager.forward(x, values, indices), *eager.backward(grad, x, values, indices, lists, True, True)
    bits = hashlib.sha256(b"".join(one.numpy().tobytes() for one in ours)).hexdigest()
    return bits, max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, plain))

def names(batch):
    parts = [cpu._simd().kernels(batch, 4, 1)[0].py_func.__globals__[name] for name in ("pack", "rows", "unpack")]
    return [code.fndesc.mangled_name for part in parts for code in part.overloads.values()]

if sys.argv[1] == "two":  # each compiles what the other does not
    for batch in (16, 32):
        if not os.fork():
            cpu._started = os.getpid  # numba's threads are started here
            bits, error = bits_and_error(batch)
            os.write(1, " ".join([str(batch), bits, str(error), *names(batch), "\\n"]).encode())
            os._exit(0)
    os.wait(), os.wait()
else:
    for batch in (16, 32):
        print(batch, *bits_and_error(batch))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
@pytest.mark.skipif(not LONG, reason="compiles all loops twice: make test-long")
def test_code_that_two_processes_compiled_and_kept_is_told_apart_by_a_third(tmp_path):
    def said(what):
        done = subprocess.run([sys.executable, "-c", CACHED, what], capture_output=True, text=True, cwd=ROOT, env={
            **os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"})
        lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
        assert lines.keys() == {"16", "32"} and all(float(error) < 1e-4 for _, error, *_ in lines.values()), done.stderr
        return lines, sorted(tmp_path.rglob("*.nbc"))

    fresh, _ = said("two")
    names = [name for _, _, *own in fresh.values() for name in own]
    assert len(names) == len(set(names)) == 6  # by which compiled code goes
    found, kept = said("one")
    assert found == {batch: line[:2] for batch, line in fresh.items()}  # bit for bit
    assert said("one") == (found, kept)  # and nothing is kept twice


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_that_keep_code_at_once_never_load_each_others(tmp_path, monkeypatch, order):
    """Both have read the list before either has written, and one is killed before it is listed."""
    kept = pytest.importorskip("permask_core.sparse.kernels.simd").CodeFile
    files = [kept(str(tmp_path), "loop", "stamp") for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(kept, "_load_index", lambda self: {})
        for i in order:
            files[i].save(("key", i), f"code {i}")
    found = [files[0].load(("key", i)) for i in range(2)]
    assert found[order[1]] == f"code {order[1]}" and found[order[0]] in (None, f"code {order[0]}")
    files[0].save(("key", order[0]), f"code {order[0]}")
    assert [files[1].load(("key", i)) for i in range(2)] == ["code 0", "code 1"]

    newer = kept(str(tmp_path), "loop", "another stamp")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kept, "_save_data", lambda self, name, data: (_ for _ in ()).throw(KeyboardInterrupt))
        newer.save(("key", 0), "newer code")
    assert newer.load(("key", 0)) is None  # not the code of the older source
    newer.save(("key", 0), "newer code")
    assert newer.load(("key", 0)) == "newer code"


@pytest.mark.parametrize("change", ["numbers", "files", "dispatcher"])
def test_a_numba_that_keeps_code_in_another_way_keeps_none_and_says_so_once(monkeypatch, change):
    simd = pytest.importorskip("permask_core.sparse.kernels.simd")
    if change == "numbers":
        class Numbered(simd.FunctionIdentity):
            """Which counts by another name."""

            @classmethod
            def from_function(cls, function):
                made = super().from_function(function)
                made.unique_id = 1
                return made

        monkeypatch.setattr(simd, "FunctionIdentity", Numbered)
    elif change == "files":
        monkeypatch.setattr(simd, "PRIVATE", (*simd.PRIVATE, "_is_gone"))
    else:
        njit = simd.njit
        monkeypatch.setattr(simd, "njit", lambda cache=False, **options: (lambda _: object()) if cache else njit(
            cache=False, **options))

    def add(a, b):
        return a + b

    simd._keeps_code.cache_clear()
    try:
        with pytest.warns(UserWarning, match="compiled in every process: the code cache of numba") as caught:
            functions = [simd._compile(add, parallel=False) for _ in range(2)]
    finally:
        simd._keeps_code.cache_clear()
    assert len(caught) == 1
    assert all(function(2, 3) == 5 and function.stats.cache_path is None for function in functions)
    monkeypatch.undo()
    assert simd._keeps_code() and simd._compile(simd.put.py_func).stats.cache_path
