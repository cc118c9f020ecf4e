"""A fan-in layer on a GPU compared with alternatives: forward, and forward with backward, by sparsity and batch.

Peers: a dense torch.nn.Linear in float32, TF32 and bfloat16; a CSR matrix of cuSPARSE; torch's 2:4 sparsity, which
keeps half of all weights at every sparsity; fan-in arithmetic in plain torch. Each peer starts from x [batch, in];
transposing it counts for the time. "Tuned" layers run the fastest measured plans, all others the plans of a rule;
"tiled" layers read the batch in tiles of 64 or 16 examples. Before the timing, outputs and gradients of up to 4096
neurons are compared with float64. Peers that do not fit or take more than a second for a call are omitted, which is
printed and recorded.

All peers take turns, as plain calls and, in separate rows, replayed from CUDA graphs. A turn repeats a call for two
milliseconds between two events of the device, after a warm-up call, so that weights are in the cache as far as they
fit. Medians over turns and their ratios are printed, and the bandwidth of a forward pass as a fraction of that of a
large copy, which can exceed 1 in the cache. Run it with `python benchmarks/fan_in_gpu.py`; results are written to
results/fan_in_gpu.json row by row. At the end it prints the peak of memory in training with a million labels, and the
ratios next to the expected ones. It asserts nothing about time.
"""

import argparse
import copy
import json
import math
import os
import shutil
import statistics
import subprocess
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from _machine import at_least, command, written
from torch.nn import functional as F

from permask_core.data.extreme import make_multilabel
from permask_core.runs.store import commit, device_name, versions
from permask_core.sparse import FanInLinear, kernels
from permask_core.sparse.kernels import eager
from permask_core.training.extreme import ExtremeClassifier, ExtremeRecipe, fit_extreme, training_bytes

DEVICE = "cuda"
SIZES = {"3072x768": (3072, 768), "4096x4096": (4096, 4096), "768x131072": (768, 131_072),
         "768x1000000": (768, 1_000_000)}
SPARSITIES, BATCHES = [0.8, 0.9, 0.95, 0.99], [1, 16, 256, 2048]
CHECKED = 4096  # neurons
GATHERED, LONG = 2 ** 30, 1.0  # numbers that plain torch gathers, seconds of a call; above, a peer is omitted
TILED = {"fan-in, tiled by 64": 64, "fan-in, tiled by 16": 16}  # examples
PRECISION = {"fan-in": "float32", "fan-in, tuned": "float32", **dict.fromkeys(TILED, "float32"),
             "fan-in bf16": "bfloat16, sums in float32", "fan-in bf16, tuned": "bfloat16, sums in float32",
             "dense fp32": "float32", "dense TF32": "float32, multiplied in TF32", "dense bf16": "bfloat16",
             "CSR fp32": "float32", "plain torch": "float32", "2:4 bf16, 50 %": "bfloat16"}
MAY_FAIL = ["CSR fp32", "plain torch", "2:4 bf16, 50 %"]  # where a library lacks something
LABELS, MOST_GIB = {"inputs": 768, "labels": 1_000_000, "fan_in": 32, "batch": 128}, 8
# (sparsity, ours, peer, least ratio), forward at batch 256 in a CUDA graph
HOPED = [(0.9, "fan-in", "dense fp32", 2.0), (0.9, "fan-in, tuned", "dense fp32", 2.0),
         (0.9, "fan-in", "CSR fp32", 13.0), (0.9, "fan-in, tuned", "CSR fp32", 13.0),
         (0.99, "fan-in", "dense bf16", 1.0), (0.99, "fan-in, tuned", "dense bf16", 1.0),
         (0.99, "fan-in bf16", "dense bf16", 1.0), (0.99, "fan-in bf16, tuned", "dense bf16", 1.0)]


def width(name):
    """Return the bytes of a number."""
    return 2 if "bf16" in name else 4


def weight_bytes(name, inputs, outputs, fan_in):
    """Return the bytes of values and indices; for 2:4, of half the weights and two bits for each."""
    if name.startswith("dense"):
        return inputs * outputs * width(name)
    if name.startswith("2:4"):
        return inputs * outputs * 9 // 8
    index = 2 if name.startswith("fan-in") and inputs <= 2 ** 15 else 4
    return outputs * fan_in * (width(name) + index) + 4 * (outputs + 1) * name.startswith("CSR")


def moved_bytes(name, inputs, outputs, fan_in, batch):
    """Return the bytes that a forward pass must move: values, indices, x and y, each once. Biases, transposed copies
    and repeated reads are not counted."""
    return weight_bytes(name, inputs, outputs, fan_in) + batch * (inputs + outputs) * width(name)


def needed_bytes(name, inputs, outputs, fan_in, batch, way):
    """Return approximately the bytes that a peer needs besides x and the gradient of y: weights, two copies of x and y;
    in training also the gradient of the weights, a third copy, and the connections listed by input."""
    both = way == "both"
    extra = {"2:4 bf16, 50 %": 2 * inputs * outputs, "plain torch": 16 * eager.CHUNK}.get(name, 0)
    return (1 + both) * weight_bytes(name, inputs, outputs, fan_in) + extra + 8 * outputs * fan_in * (
        both and name.startswith("fan-in")) + (2 + both) * batch * (inputs + outputs) * width(name)


def free_bytes():
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def demand(size):
    free = free_bytes()
    if size > free:
        raise MemoryError(f"it needs {size / 2**30:.2f} GiB, of {free / 2**30:.2f} GiB that are free")


def names(sparsity, batch, way):
    """Return the peers of a row. Tiles as large as the batch are excluded, because the rule already has that layout."""
    return [name for name in PRECISION if not (way == "both" and name.startswith(("CSR", "2:4")))
            and (name not in TILED or (sparsity == 0.9 and batch > TILED[name]))]


def settle(name):
    """Configure a peer: whether float32 may be multiplied in TF32, and which plans the kernels use."""
    module = kernels._triton()
    rule = getattr(module.rule, "func", module.rule)
    module.rule = partial(rule, examples=TILED[name], tiled=True) if name in TILED else rule
    os.environ["PERMASK_TUNE"] = "1" if name.endswith("tuned") else "0"
    torch.backends.cuda.matmul.allow_tf32 = name == "dense TF32"


def made(name, layer):
    """Return functions for y and for the gradients of x, weights and bias, and the weights if not those of the
    layer."""
    indices, values, bias, (n, k) = layer.indices, layer.values.detach(), layer.bias.detach(), layer.values.shape
    if name.startswith(("fan-in", "dense")):
        if width(name) == 2:
            layer = copy.deepcopy(layer).bfloat16()
            layer.indices = indices  # so that data derived from them are cached
        layer = layer.to_dense() if name.startswith("dense") else layer
        return layer, lambda x, grad: torch.autograd.grad(layer(x), [x, *layer.parameters()], grad), None
    if name.startswith("CSR"):
        starts = torch.arange(0, n * k + 1, k, dtype=torch.int32, device=DEVICE)
        csr = torch.sparse_csr_tensor(starts, indices.flatten(), values.flatten(), (n, layer.in_features))
        return lambda x: (csr @ x.t()).t() + bias, None, None
    if name.startswith("2:4"):
        weight = torch.randn(n, layer.in_features, device=DEVICE, dtype=torch.bfloat16) / layer.in_features ** 0.5
        weight.view(-1, 4)[:, 2:] = 0
        sparse, bias = torch.sparse.to_sparse_semi_structured(weight), bias.bfloat16()
        return lambda x: F.linear(x, sparse, bias), None, weight

    def both(x, grad):
        eager.forward(x.detach(), values, indices, bias)
        return *eager.backward(grad, x.detach(), values, indices, None, True, True), grad.sum(0)
    return lambda x: eager.forward(x, values, indices, bias), both, None


def agreed(name, pairs):
    """Return the largest error, in units of the largest value; end the script if it is larger than rounding."""
    errors = [((found.detach().double() - right).abs().max() / right.abs().max()).item() for found, right in pairs]
    if not all(error <= (1e-4 if PRECISION[name] == "float32" else 3e-2) for error in errors):
        raise SystemExit(f"{name} is off by {errors} of the largest value")
    return max(errors)


def check(name, layer, forward, both, weight, x, grad):
    """Return the error of outputs or, given a gradient of y, of the other gradients, compared with float64."""
    n, exact = layer.out_features, x.detach().double()
    rows = torch.linspace(0, n - 1, min(n, CHECKED), dtype=torch.float64, device=DEVICE).round().long()
    chosen, values, bias = layer.indices[rows].long(), layer.values.detach()[rows], layer.bias.detach()[rows]
    weight = exact.new_zeros(len(rows), layer.in_features).scatter_(1, chosen, values.double()) if weight is None \
        else weight[rows].double()
    if grad is None:
        return agreed(name, [(forward(x)[:, rows], exact @ weight.t() + bias.double())])
    some = torch.zeros_like(grad)  # only of these neurons, so that the gradient of x is known
    some[:, rows] = grad[:, rows]
    (dx, dweight, dbias), some = both(x, some), some[:, rows].double()
    dweight = dweight[rows] if dweight.shape == layer.values.shape else dweight[rows].gather(1, chosen)
    return agreed(name, [(dx, some @ weight), (dweight, (some.t() @ exact).gather(1, chosen)),
                         (dbias[rows], some.sum(0))])


def elapsed(call, repeats):
    """Return the seconds of a call on the device, including the gaps between its kernels."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def captured(name, call, graphs):
    """Return a replay of the call, after checking its results. All graphs share memory: they run one after the
    other."""
    stream, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(stream)
    with torch.cuda.stream(side):  # a graph must not compute what a first call caches
        for _ in range(3):
            right = call()
    stream.wait_stream(side)
    with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
        found = call()
    for part in found:
        part.fill_(math.nan)  # an earlier graph may have written the right numbers
    graph.replay()
    agreed(name, [(mine[:64], theirs[:64].double()) for mine, theirs in zip(found, right)])
    graphs.append(graph)
    return graph.replay


def prepared(name, layer, at, x, grad, graphs):
    """Return (call, error) of a peer that fits and was checked."""
    shape = layer.in_features, layer.out_features, layer.fan_in, at["batch"]
    demand(needed_bytes(name, *shape, at["way"]))
    if name == "plain torch" and math.prod(shape[1:]) > GATHERED:
        raise MemoryError(f"it would gather {math.prod(shape[1:]):.1e} numbers")
    forward, both, weight = made(name, layer)
    error = check(name, layer, forward, both, weight, x, grad)
    call = (lambda: (forward(x),)) if grad is None else (lambda: both(x, grad))
    call = captured(name, call, graphs) if at["graph"] else call
    elapsed(call, 1)
    if (seconds := elapsed(call, 1)) > LONG:
        raise TimeoutError(f"a call takes {seconds:.1f} s")
    return call, error


def timed_turns(calls, seconds, least=5):
    """Return the seconds of a call in every turn, for a total of ``seconds`` but at least ``least`` turns."""
    times, repeats, spent, turns = {name: [] for name in calls}, {}, 0.0, 0
    while spent < seconds or turns < least:
        for name, call in calls.items():
            settle(name)
            once = elapsed(call, 1)
            if turns == 0:
                once = elapsed(call, 1)
            repeats.setdefault(name, 1 + int(0.002 / once))
            times[name].append(elapsed(call, repeats[name]))
            spent += times[name][-1] * repeats[name]
        turns += 1
    return times


def copy_bandwidth(size):
    """Return the bytes per second, read and written, of a copy of ``size`` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(timed_turns({"copy": lambda: target.copy_(source)}, 0.2)["copy"])


def compare(layer, at, bandwidth, seconds, skip):
    """Return a row; ``skip(way, reason)`` is called for omitted peers."""
    shape = layer.in_features, layer.out_features, layer.fan_in, at["batch"]
    x, grad = (torch.randn(at["batch"], features, device=DEVICE) for features in shape[:2])
    trains, calls, errors, graphs = at["way"] == "both", {}, {}, []
    given = {size: (x.detach().to(dtype).requires_grad_(trains), grad.to(dtype) if trains else None)
             for size, dtype in ((4, torch.float32), (2, torch.bfloat16))}
    del grad
    with torch.set_grad_enabled(trains):
        for name in names(at["sparsity"], at["batch"], at["way"]):
            settle(name)
            try:
                calls[name], errors[name] = prepared(name, layer, at, *given[width(name)], graphs)
            except (MemoryError, TimeoutError, RuntimeError) as error:
                broken = isinstance(error, RuntimeError) and not isinstance(error, torch.cuda.OutOfMemoryError)
                if broken and name not in MAY_FAIL:
                    raise
                skip(name, str(error).split("\n")[0])
        times = timed_turns(calls, seconds) if calls else {}
    medians = {name: statistics.median(found) for name, found in times.items()}
    ours, counted = medians.get("fan-in"), {name: moved_bytes(name, *shape) for name in medians if not trains}
    return at | {"errors": errors, "turns": len(next(iter(times.values()), [])), "median_seconds": medians,
                 "quartiles_seconds": {name: list(np.quantile(found, [0.25, 0.75])) for name, found in times.items()},
                 "ratios": {name: median / ours for name, median in medians.items() if ours and name != "fan-in"},
                 "counted_bytes": counted,
                 "bandwidth_fraction": {name: size / medians[name] / bandwidth for name, size in counted.items()}}


def memory(inputs, labels, fan_in, batch, skip):
    """Return the peak of memory over two training steps with Adam, minus the memory before the model, and the computed
    bytes of the output layer in training."""
    train = make_multilabel(labels, n_train=2 * batch, n_test=1, n_features=inputs, n_clusters=100).train
    recipe, peaks, computed = ExtremeRecipe(epochs=1, batch_size=batch, rewire_until=0), {}, {}
    settle("fan-in")
    for name, connections in (("fan-in", fan_in), ("dense", None)):
        model = None  # frees the previous model
        computed[name], before = training_bytes(inputs, labels, connections), torch.cuda.memory_allocated()
        try:
            demand(computed[name])
            torch.cuda.reset_peak_memory_stats()
            model = ExtremeClassifier(inputs, labels, connections, hidden=inputs).to(DEVICE)
            fit_extreme(model, train, recipe, seed=0, description=None)
            peaks[name] = torch.cuda.max_memory_allocated() - before
        except (MemoryError, torch.cuda.OutOfMemoryError) as error:
            skip(name, str(error).split("\n")[0])
    return {"inputs": inputs, "labels": labels, "fan_in": fan_in, "batch": batch, "peak_bytes": peaks,
            "computed_bytes": computed}


def line(row):
    """Return a row as text."""
    ours, fraction = (row[key].get("fan-in") for key in ("median_seconds", "bandwidth_fraction"))
    return (f"{row['batch']:>5} {row['way']:8}{'graph' if row['graph'] else 'calls'}"
            + (f"{1e6 * ours:>12.1f} us" if ours else "") + (f", {fraction:.0%} of the bandwidth" if fraction else "")
            + "".join(f"  {name} {ratio:.2f}" for name, ratio in row["ratios"].items()))


def hoped(rows, peaks):
    """Return the measured ratios and the peak next to the expected ones, as far as they were measured."""
    found = []
    for row, (sparsity, ours, peer, least) in product(rows, HOPED):
        median = row["median_seconds"]
        if (row["inputs"], row["outputs"]) in ((3072, 768), (4096, 4096)) and {ours, peer} <= median.keys() and (
                row["sparsity"], row["batch"], row["way"], row["graph"]) == (sparsity, 256, "forward", True):
            ratio = median[peer] / median[ours]
            found.append({"what": f"{row['inputs']} -> {row['outputs']}, {sparsity:.0%}, batch 256, forward in a "
                          f"graph: {ours} faster than {peer}, times", "found": ratio, "hoped": f"at least {least:g}",
                          "met": ratio >= least})
    if peaks["labels"] == LABELS["labels"] and "fan-in" in peaks["peak_bytes"]:
        gib = peaks["peak_bytes"]["fan-in"] / 2 ** 30
        found.append({"what": "a training step with a million labels, GiB", "found": gib,
                      "hoped": f"below {MOST_GIB}", "met": gib < MOST_GIB})
    return found


def machine():
    """Return device and versions; end the script if the kernels cannot run."""
    if not torch.cuda.is_available():
        raise SystemExit("fan_in_gpu.py measures a GPU, and torch finds no CUDA device here")
    if kernels._triton() is None:
        raise SystemExit("fan_in_gpu.py needs Triton and a C compiler: without them a layer uses plain torch")
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                            text=True).stdout.split("\n")[0] if shutil.which("nvidia-smi") else None
    return {"device": device_name(DEVICE), "versions": versions() | {
        "cuda": torch.version.cuda, "triton": kernels._triton().triton.__version__, "driver": driver}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=at_least(0), default=1, help="of turns for each row")
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), help="shapes, inputs x outputs")
    parser.add_argument("--quick", action="store_true", help="a small layer, to check that everything runs")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "fan_in_gpu.json",
                        help="path of the JSON file")
    given = parser.parse_args(argv)
    if given.result.is_dir():
        parser.error(f"--result {given.result} is a folder: expected a file")
    record = {"command": command("fan_in_gpu", argv), "commit": commit(), **machine(),
              "precision": PRECISION, "copied_bytes": min(2 ** (20 if given.quick else 32), free_bytes() // 4),
              "rows": [], "skipped": []}
    bandwidth = record["copy_bytes_per_second"] = copy_bandwidth(record["copied_bytes"])
    print(", ".join(f"{name} {record[name]}" for name in ("command", "commit", "device", "versions")))
    print(f"a copy reads and writes {bandwidth / 1e9:.0f} GB/s", flush=True)

    def save():
        written(given.result, record)

    def skip(at, way, reason):
        record["skipped"].append(at | {"left_out": way, "reason": reason})
        print(f"      omitted: {way}: {reason}", flush=True)

    sizes, batches = ([(96, 64)], [1, 80]) if given.quick else ([SIZES[name] for name in given.only], BATCHES)
    for (inputs, outputs), sparsity in product(sizes, SPARSITIES):
        torch.manual_seed(0)
        layer = FanInLinear(inputs, outputs, round(inputs * (1 - sparsity)), device=DEVICE)
        torch.nn.init.normal_(layer.bias)
        print(f"\n{inputs} -> {outputs}, {sparsity:.0%}: how many times longer than the fan-in layer")
        for batch, way, graph in product(batches, ("forward", "both"), (False, True)):
            at = {"inputs": inputs, "outputs": outputs, "sparsity": sparsity, "fan_in": layer.fan_in, "batch": batch,
                  "way": way, "graph": graph}
            try:
                record["rows"].append(compare(layer, at, bandwidth, 0 if given.quick else given.seconds,
                                              partial(skip, at)))
                print(line(record["rows"][-1]), flush=True)
            except torch.cuda.OutOfMemoryError as error:
                skip(at, "all", str(error).split("\n")[0])
            save()
    labels = LABELS | {"labels": 5000} if given.quick else LABELS
    record["memory"] = memory(**labels, skip=partial(skip, labels))
    record["hoped"] = hoped(record["rows"], record["memory"])
    print("\n" + json.dumps(record["memory"]))
    for row in record["hoped"]:
        print(f"{'met ' if row['met'] else 'MISSED'}  {row['what']}: {row['found']:.2f}, hoped {row['hoped']}")
    save()


if __name__ == "__main__":
    main()
