"""A fan-in layer on a CPU compared with alternatives: forward, and forward with backward, by sparsity and batch.

Peers: a dense torch.nn.Linear; the same with its weight multiplied by a mask at every call; CSR matrices of torch and
of SciPy (forward only); torch's embedding_bag over the transposed input; the one-line gather, compiled by
torch.compile if there is a C++ compiler; and fan-in layers of which 4, 8 or 16 neighbouring neurons have the same
connections, which compute other functions. Each peer starts from x [batch, in]; transposing it counts for the time.
Outputs and gradients of the fan-in layers are compared with a dense layer in float64 before anything is timed.

All peers take turns. A call shorter than two milliseconds is repeated for that long, after a warm-up call, so that its
weights are in the cache as far as they fit. Medians over turns and ratios of medians are printed. Run it with
`python benchmarks/fan_in_cpu.py`; it takes about ten minutes, with results in
permask_core/data/measured/fan_in_cpu/PROCESSOR.json, where PROCESSOR is the compiler's name for it. At the end it
prints the computed bytes of a training step with Adam, the peak of resident memory in new processes (Linux), and the
ratios next to the expected ones. It asserts nothing about time.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from _machine import at_least, command, resident, written
from llvmlite import binding
from scipy.sparse import csr_array
from torch.nn import functional as F

import permask_core
from permask_core.runs.store import commit, device_name, versions
from permask_core.sparse import FanInLinear
from permask_core.sparse.fan_in import sample_columns

MEASURED = Path(permask_core.__file__).parent / "data" / "measured" / "fan_in_cpu"

SIZES = [(3072, 768), (4096, 4096)]
SPARSITIES = [0.9, 0.95, 0.99]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
SHARED = (4, 8, 16)
GATHERED = 2 ** 26  # numbers; above, the gather is omitted
# (inputs, outputs), sparsity, batch, way, peer, least ratio
HOPED = [(size, 0.9, *rest) for size in SIZES for rest in (
    (1, "forward", "dense", 3.4), (1, "forward", "torch CSR", 2.5), (64, "forward", "dense", 8.0),
    (256, "forward", "dense", 4.0), (256, "forward", "torch CSR", 1.5), (256, "both", "dense", 3.0))] + [
    (size, 0.95, 256, "both", "dense", 5.0) for size in SIZES] + [
    (size, 0.9, batch, "forward", "dense", 1.0) for size in SIZES for batch in BATCHES]


def layers(inputs, outputs, sparsity, shared=1):
    """Return a fan-in layer, in which ``shared`` neighbouring neurons have the same connections, and an equal dense
    layer."""
    torch.manual_seed(0)
    fan_in = round(inputs * (1 - sparsity))
    indices = sample_columns(outputs // shared, inputs, fan_in).repeat_interleave(shared, 0)
    layer = FanInLinear(inputs, outputs, fan_in, indices=indices)
    torch.nn.init.normal_(layer.bias)
    return layer, layer.to_dense()


def check(layer, dense, x):
    """Compare outputs and gradients with float64; return the largest error, in units of the largest value."""
    exact, worst = layer.to_dense().double(), 0.0
    grad = torch.randn(len(x), layer.out_features)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = layer(ours), exact(theirs)
    y.backward(grad)
    expected.backward(grad.double())
    chosen = exact.weight.grad[layer.rows[:, None], layer.indices.long()]
    for found, right in ((y, expected), (ours.grad, theirs.grad), (layer.values.grad, chosen),
                         (layer.bias.grad, exact.bias.grad)):
        worst = max(worst, ((found.detach() - right).abs().max() / right.abs().max()).item())
    layer.zero_grad()
    if worst > 1e-4:
        raise SystemExit(f"the fan-in layer is off by {worst} of the largest value at batch {len(x)}")
    return worst


def gathered(x, values, indices, bias):
    return (values * x[:, indices]).sum(-1) + bias


def peers(layer, dense, groups, compiled):
    """Return by name: a function from x to y, and the weights whose gradients a training step needs, or None."""
    mask, indices = layer.mask(), layer.indices.long()
    values, bias, weight = layer.values, layer.bias, dense.weight
    csr, scipy_csr = weight.detach().to_sparse_csr(), csr_array(weight.detach().numpy())
    offset = bias.detach().numpy()
    ways = {
        "fan-in": (layer, [values, bias]),
        **{f"shared by {size}": (one, [one.values, one.bias]) for size, one in groups.items()},
        "dense": (dense, [weight, dense.bias]),
        "masked": (lambda x: F.linear(x, weight * mask, dense.bias), [weight, dense.bias]),
        "torch CSR": (lambda x: (csr @ x.t()).t() + bias, None),
        "SciPy CSR": (lambda x: (scipy_csr @ x.numpy().T).T + offset, None),
        "embedding_bag": (lambda x: F.embedding_bag(indices, x.t().contiguous(), mode="sum",
                                                    per_sample_weights=values).t() + bias, [values, bias]),
    }
    if compiled:
        ways["compiled gather"] = lambda x: compiled(x, values, indices, bias), [values, bias]
    return ways


def timed_turns(calls, seconds, least=5, clock=time.perf_counter):
    """Return the seconds of a call in every turn, for a total of ``seconds`` but at least ``least`` turns."""
    times, repeats = {name: [] for name in calls}, {}
    for name, call in calls.items():
        call()
        start = clock()
        call()
        repeats[name] = 1 + int(0.002 / (clock() - start))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < least:
        for name, call in calls.items():
            if repeats[name] > 1:
                call()
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].append((clock() - start) / repeats[name])
    return times


def step(way, weights, x):
    """Run forward and backward, with gradients of the input and the weights."""
    y = way(x)
    return torch.autograd.grad(y, [x, *weights], torch.ones_like(y))


def compare(layer, dense, groups, compiled, batch, seconds):
    """Return two rows: forward, and both."""
    x = torch.randn(batch, layer.in_features)
    error = max(check(one, one.to_dense(), x) for one in (layer, *groups.values()))
    ways = peers(layer, dense, groups, compiled if batch * layer.values.numel() <= GATHERED else None)
    trained = x.clone().requires_grad_()
    calls = {"forward": {name: lambda way=way: way(x) for name, (way, _) in ways.items()},
             "both": {name: lambda way=way, weights=weights: step(way, weights, trained)
                      for name, (way, weights) in ways.items() if weights and name != "compiled gather"}}
    for way, ours in calls.items():
        with torch.set_grad_enabled(way == "both"):
            times = timed_turns(ours, seconds)
        medians = {name: statistics.median(found) for name, found in times.items()}
        yield {"inputs": layer.in_features, "outputs": layer.out_features, "fan_in": layer.fan_in, "batch": batch,
               "way": way, "error": error, "turns": len(times["fan-in"]), "median_seconds": medians,
               "quartiles_seconds": {name: list(np.quantile(found, [0.25, 0.75])) for name, found in times.items()},
               "ratios": {name: median / medians["fan-in"] for name, median in medians.items() if name != "fan-in"}}


def kept_bytes(layer):
    """Return the bytes of parameters, gradients, both moments of Adam, and indices with their transposed copy."""
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, layer.in_features, requires_grad=True)).sum().backward()
    optimizer.step()
    tensors = [*layer.parameters(), *(parameter.grad for parameter in layer.parameters()), *layer.buffers(),
               *(value for state in optimizer.state.values() for value in state.values() if value.ndim),
               *(layer.transpose() if isinstance(layer, FanInLinear) else ())]
    return sum(tensor.nbytes for tensor in tensors)


def peak(kind, inputs, outputs, sparsity, batch=256):
    """Return the peak of resident memory over three steps with Adam, minus the memory before the layer, in bytes."""
    warm = FanInLinear(64, 64, 6)  # loads code and starts threads
    for size in (8, batch):
        warm(torch.randn(size, 64, requires_grad=True)).sum().backward()
    torch.nn.Linear(64, 64)(torch.randn(batch, 64)).sum().backward()
    x, before = torch.randn(batch, inputs, requires_grad=True), resident("VmRSS")
    layer = FanInLinear(inputs, outputs, round(inputs * (1 - sparsity))) if kind == "fan-in" else torch.nn.Linear(
        inputs, outputs)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    for _ in range(3):
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(resident("VmHWM") - before)


def memory(inputs, outputs, sparsity):
    fan_in, dense = layers(inputs, outputs, sparsity)
    row = {"inputs": inputs, "outputs": outputs, "sparsity": sparsity,
           "kept_bytes": {"fan-in": kept_bytes(fan_in), "dense": kept_bytes(dense)}}
    if Path("/proc/self/status").exists():
        row["peak_bytes"] = {kind: int(subprocess.run(
            [sys.executable, __file__, "--peak", kind, str(inputs), str(outputs), str(sparsity)], check=True,
            capture_output=True, text=True).stdout) for kind in ("fan-in", "dense")}
    return row


def hoped(rows):
    """Return the measured ratios and the expected ones."""
    found = []
    for (inputs, outputs), sparsity, batch, way, peer, least in HOPED:
        for row in rows:
            if (row["inputs"], row["outputs"], row["sparsity"], row["batch"], row["way"]) == (
                    inputs, outputs, sparsity, batch, way):
                found.append({"inputs": inputs, "outputs": outputs, "sparsity": sparsity, "batch": batch, "way": way,
                              "peer": peer, "ratio": row["ratios"][peer], "least": least})
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of turns for each row")
    parser.add_argument("--inputs", type=int, help="of the layer; default: layers of all sizes")
    parser.add_argument("--quick", action="store_true", help="a small layer, to check that everything runs")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help="path of the JSON file")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    if given.peak:
        kind, *numbers = given.peak
        return peak(kind, *map(int, numbers[:2]), float(numbers[2]))
    sizes, batches = ([(96, 64)], [1, 40]) if given.quick else (SIZES, BATCHES)
    sizes = [size for size in sizes if given.inputs in (None, size[0])]
    compiled = torch.compile(gathered, dynamic=True) if shutil.which("g++") and not given.quick else None
    record = {"command": command("fan_in_cpu", argv), "commit": commit(), "processor": binding.get_host_cpu_name(),
              "device": device_name("cpu"), "threads": given.threads, "precision": "float32", "versions": versions(),
              "rows": [], "memory": []}
    print(", ".join(f"{name} {record[name]}" for name in ("command", "commit", "device", "threads", "precision")))
    result = given.result or MEASURED / f"{record['processor']}.json"
    for inputs, outputs in sizes:
        for sparsity in SPARSITIES:
            layer, dense = layers(inputs, outputs, sparsity)
            groups = {size: layers(inputs, outputs, sparsity, size)[0] for size in SHARED}
            print(f"\n{inputs} -> {outputs}, {sparsity:.0%}: how many times longer than the fan-in layer")
            for batch in batches:
                for row in compare(layer, dense, groups, compiled, batch, 0 if given.quick else given.seconds):
                    record["rows"].append({"sparsity": sparsity} | row)
                    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
                    ours = 1e6 * row["median_seconds"]["fan-in"]
                    print(f"{batch:>5} {row['way']:8}{ours:>10.0f} us  {ratios}", flush=True)
            record["memory"].append(memory(inputs, outputs, sparsity))
            written(result, record)
            print(json.dumps(record["memory"][-1]))
    record["hoped"] = hoped(record["rows"])
    for row in record["hoped"]:
        print(f"{'met ' if row['ratio'] >= row['least'] else 'MISSED'}  {row['inputs']} -> {row['outputs']}, "
              f"{row['sparsity']:.0%}, batch {row['batch']}, {row['way']}: {row['ratio']:.2f} times faster than "
              f"{row['peer']}, hoped {row['least']}")
    written(result, record)


if __name__ == "__main__":
    main()
