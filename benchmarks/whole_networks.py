"""Whole networks on a CPU, end to end, with their layers dense or with constant fan-in.

A decoder of GPT-2's size generates token by token, a Vision Transformer (ViT-B/16), MobileNetV2 and ResNet50 classify
images, and an encoder of BERT's size reads sentences. Their weights are random, because time does not depend on them.
Masks of constant fan-in at 90 % sparsity are drawn for some kinds of layers: for those of the MLPs, for all linear
layers of the blocks, or for the output layer too; in convolutional networks for convolutions of 1x1, or of 1x1 and 3x3
except depthwise ones. Networks are compared that are dense, dense with channels last in memory (convolutions), compiled
by torch.compile if there is a C++ compiler, or in which the chosen layers are CSR matrices of torch (linear layers and
1x1 convolutions), fan-in layers, or fan-in layers in which eight neighbouring neurons read the same inputs (linear
layers). The outputs are compared with those of masked dense networks before anything is timed.

`--steps training` measures a training step: forward, backward, and a step of SGD with momentum on the sum of the
squared outputs.

All networks of a comparison take turns. Medians and quartiles of a call are written, and the time that the dense and
the fan-in network spend in each kind of layers. The share of the dense network's time that is spent in the replaced
layers bounds what can be gained (Amdahl). Multiplications and bytes of the replaced layers are counted. Run it with
`python benchmarks/whole_networks.py --threads 1`; it takes half an hour. The record, which is in the book, is
permask_core/data/measured/whole_networks/PROCESSOR.json. An interrupted run continues: rows of the same command are
kept, until the file is deleted. A different command adds its rows, and replaces those of the same network, layers,
batch, threads and step. `--only gpt2` runs one network.
"""

import argparse
import copy
import json
import shutil
import statistics
import time
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from _machine import at_least, command, written
from fan_in_cpu import timed_turns
from llvmlite import binding
from torch import nn
from torch.nn import functional as F

import permask_core
from permask_core.models.vision import torchvision
from permask_core.runs.store import commit, device_name, versions
from permask_core.sparse import condense
from permask_core.sparse.fan_in import FanInLayer, sample_columns

SPARSITY, SHARED = 0.9, 8
MEASURED = Path(permask_core.__file__).parent / "data" / "measured" / "whole_networks"


class Attention(nn.Module):
    """Causal attention of one token to the tokens before it, whose keys and values are kept."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.kept = None

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.kept is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.kept, (k, v)))
        self.kept = k, v
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1))


class Decoder(nn.Module):
    """A decoder in the layout of GPT-2: it maps a token [batch] to the logits of the next one [batch, words]."""

    def __init__(self, words=50257, context=1024, width=768, heads=12, depth=12):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(width), "attention": Attention(width, heads), "norm2": nn.LayerNorm(width),
            "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)),
        }) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, token, position):
        x = self.words(token) + self.positions.weight[position]
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x))


class Encoder(nn.Module):
    """An encoder in the layout of BERT: tokens [batch, length] to features [batch, length, width]."""

    def __init__(self, words=30522, context=512, width=768, heads=12, depth=12):
        super().__init__()
        self.heads, self.words, self.positions = heads, nn.Embedding(words, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width), "norm1": nn.LayerNorm(width),
            "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
            "norm2": nn.LayerNorm(width),
        }) for _ in range(depth))

    def forward(self, tokens):
        x = self.words(tokens) + self.positions.weight[:tokens.shape[1]]
        for block in self.blocks:
            q, k, v = block["qkv"](x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = block["norm1"](x + block["out"](mixed))
            x = block["norm2"](x + block["mlp"](x))
        return x


@torch.no_grad()
def generate(model, prompt, length):
    """Generate tokens greedily, one at a time; returns them [length] and the last logits."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.kept = None
    token, found = prompt, []
    for position in range(length):
        logits = model(token, position)
        token = logits.argmax(-1)
        found.append(token)
    return torch.cat(found), logits


class Csr(nn.Module):
    """A linear layer whose weight is a CSR matrix of torch."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight.detach().to_sparse_csr(), linear.bias

    def forward(self, x):
        return (self.weight @ x.reshape(-1, x.shape[-1]).t()).t().reshape(*x.shape[:-1], -1) + self.bias


class CsrConvolution(Csr):
    """A convolution of 1x1 whose weight is a CSR matrix of torch."""

    def __init__(self, conv):
        nn.Module.__init__(self)
        self.weight, self.stride = conv.weight.detach().flatten(1).to_sparse_csr(), conv.stride

    def forward(self, x):
        x = x[:, :, ::self.stride[0], ::self.stride[1]]
        y = self.weight @ x.transpose(0, 1).flatten(1)
        return y.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1).contiguous()


def images(batch):
    return torch.randn(batch, 3, 224, 224)


def vit():
    model = torchvision.models.vit_b_16()
    nn.init.normal_(model.heads.head.weight)  # torchvision's is 0, behind which no error could be seen
    return model


MLPS, BLOCKS = {"mlp"}, {"mlp", "qkv", "out"}
NETWORKS = {  # a network, its inputs for a batch, and its replaced layers: parts of names, or sizes of the kernel
    "gpt2": (Decoder, None, {"MLPs": MLPS, "blocks": BLOCKS, "blocks and output": BLOCKS | {"head"}}),
    "bert": (Encoder, lambda batch: torch.randint(30522, (batch, 128)), {"MLPs": MLPS, "blocks": BLOCKS}),
    "vit_b_16": (vit, images, {"MLPs": MLPS, "blocks": MLPS | {"self_attention"}}),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), images, {"1x1": {1}}),
    "resnet50": (lambda: torchvision.models.resnet50(), images, {"1x1": {1}, "1x1 and 3x3": {1, 3}}),
}
TRAINED = {"bert": ["blocks"], "resnet50": ["1x1 and 3x3"]}
SINGLE = {"ConvolutionBackward0", "AddmmBackward0", "MmBackward0", "_FanInBackward"}  # that do all work of a layer


def masks(model, parts, shared):
    """Return masks of constant fan-in for the weights of linear layers and of attention with one of these parts in
    their names, and of convolutions with one of these sizes, except depthwise ones."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, weight in model.named_parameters():
        *owner, kind = name.split(".")
        linear = weight.ndim == 2 and kind in ("weight", "in_proj_weight") and parts & {*owner}
        if linear or weight.ndim == 4 and weight.shape[2] in parts and weight.shape[1] > 1:
            n, inputs = len(weight), weight[0].numel()
            columns = sample_columns(n // shared, inputs, round(inputs * (1 - SPARSITY)), generator=generator)
            mask = torch.zeros(n, inputs, dtype=torch.bool)
            found[name] = mask.scatter_(1, columns.long().repeat_interleave(shared, 0), True).view_as(weight)
    return found


def with_csr(model, names):
    model = copy.deepcopy(model)
    for name in names:
        layer = model.get_submodule(name)
        model.set_submodule(name, (CsrConvolution if isinstance(layer, nn.Conv2d) else Csr)(layer))
    return model


@cache
def compiled(name, training):
    """A dense network, compiled once for all rows."""
    model = NETWORKS[name][0]().train(training)
    return model, torch.compile(model, dynamic=None if NETWORKS[name][1] is None else False)


def kinds(model, names):
    """Return by name the kind of each replaced layer, and of all others that have parameters or are activations."""
    found = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{one}.") for one in names)
        if name in names or not inside and not any(module.children()):
            kind = type(module).__name__
            if isinstance(module, nn.Conv2d):
                kind = f"{'depthwise ' * (1 < module.groups == module.in_channels)}convolutions " \
                       f"{module.kernel_size[0]}x{module.kernel_size[1]}"
            found[name] = f"replaced {kind}" if name in names else kind
    return found


def time_by_kind(model, kinds, call, training):
    """Return the seconds of a call, and by kind those spent in its layers, in their backward pass too if trained."""
    spent, started, handles = defaultdict(float), {}, []

    def start(key, *_):
        started[key] = time.perf_counter()

    def stop(key, kind, *_):
        spent[kind] += time.perf_counter() - started[key]

    def stop_forward(key, kind, module, given, y):
        stop(key, kind)
        if training:
            node = y.grad_fn
            while node.name() not in SINGLE and node.next_functions and isinstance(module, nn.Linear | FanInLayer):
                node = node.next_functions[0][0]
            node.register_prehook(partial(start, node))
            node.register_hook(partial(stop, node, kind))

    for name, kind in kinds.items():
        layer = model.get_submodule(name)
        handles += [layer.register_forward_pre_hook(partial(start, name)),
                    layer.register_forward_hook(partial(stop_forward, name, kind))]
    call(model)
    spent.clear()
    begin = time.perf_counter()
    for _ in range(3):
        call(model)
    whole = time.perf_counter() - begin
    for handle in handles:
        handle.remove()
    return whole / 3, {kind: seconds / 3 for kind, seconds in spent.items()}


def count(dense, condensed, names, call):
    """Count the multiplications of the replaced layers, and their bytes if each number were moved once.

    Convolutions of constant fan-in write and read their input and output once more, because they store them by channel.
    """
    if any(isinstance(dense.get_submodule(name), nn.MultiheadAttention) for name in names):
        return None
    found = {way: {"products": 0, "bytes": 0} for way in ("dense", "fan-in")}

    def add(way, module, given, y):
        fan_in = isinstance(module, FanInLayer)
        weights = module.values if fan_in else module.weight
        moved = given[0].numel() + y.numel()
        found[way]["products"] += y.numel() // y.shape[1 if y.ndim == 4 else -1] * weights.numel()
        found[way]["bytes"] += (8 if fan_in else 4) * weights.numel() + 4 * moved * (3 if fan_in and y.ndim == 4 else 1)

    for way, model in (("dense", dense), ("fan-in", condensed)):
        handles = [model.get_submodule(name).register_forward_hook(partial(add, way)) for name in names]
        call(model)
        for handle in handles:
            handle.remove()
    return found


def train(model, x, optimizers):
    """Take a step of SGD on the mean of the squared outputs."""
    optimizer = optimizers.setdefault(model, torch.optim.SGD(model.parameters(), 1e-6, momentum=0.9))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def compare(name, batch, replaced, step, seconds, length, compiler):
    """Return a row: the times of all networks for one call, which for the decoder generates ``length`` tokens."""
    torch.manual_seed(0)
    make, inputs, parts = NETWORKS[name]
    training = step == "training"
    model = make().train(training)
    if inputs is None:
        call = partial(generate, prompt=torch.zeros(batch, dtype=torch.int64), length=length)
    else:
        x = inputs(batch)
        call = lambda network: network(x)  # noqa: E731
    ways, names = {}, []
    with torch.set_grad_enabled(training):
        for way, shared in (("fan-in", 1), ("shared by 8", SHARED)):
            found = masks(model, parts[replaced], shared)
            if shared > 1 and any(mask.ndim == 4 for mask in found.values()):
                continue  # convolutions make no use of it
            condensed, _, left = condense(model, found)
            if left:
                raise SystemExit(f"{name}: not replaced: {left}")
            dense = copy.deepcopy(model)
            dense.load_state_dict({key: tensor * found.get(key, True) for key, tensor in model.state_dict().items()})
            names = sorted({key.rpartition(".")[0].removesuffix(".out_proj") for key in found})
            compared = {way: condensed} | (peers(name, dense, names, training, compiler) if shared == 1 else {})
            right = logits(call(dense))
            for one, network in compared.items():
                error = ((logits(call(network)) - right).abs().max() / right.abs().max()).item()
                if not error < 1e-3:
                    raise SystemExit(f"{name}: the {one} network is off by {error} of the largest output")
            ways |= compared
        if training:
            call = partial(train, x=x, optimizers={})
        counted = count(ways["dense"], ways["fan-in"], names, call)
        listed, whole, by_kind = kinds(ways["dense"], names), {}, {}
        for way in ("dense", "fan-in"):
            whole[way], by_kind[way] = time_by_kind(ways[way], listed, call, training)
        times = timed_turns({way: partial(call, network) for way, network in ways.items()}, seconds, least=3)
    share = sum(spent for kind, spent in by_kind["dense"].items() if kind.startswith("replaced")) / whole["dense"]
    for way, spent in by_kind.items():
        spent["rest"] = whole[way] - sum(spent.values())
    medians = {way: statistics.median(found) for way, found in times.items()}
    return {"network": name, "replaced": replaced, "batch": batch, "step": step, "threads": torch.get_num_threads(),
            "layers": len(names), "share_of_dense": share, "bound": 1 / (1 - share),
            "tokens": length if inputs is None else None, "turns": len(times["dense"]), "median_seconds": medians,
            "quartiles_seconds": {way: list(np.quantile(found, [0.25, 0.75])) for way, found in times.items()},
            "ratios": {way: medians["dense"] / median for way, median in medians.items() if way != "dense"},
            "seconds_by_kind": by_kind, "counted": counted}


def logits(y):
    return y[1] if isinstance(y, tuple) else y


def peers(name, dense, names, training, compiler):
    """Return by name: the dense network and others that compute the same without fan-in layers."""
    found, layers = {"dense": dense}, [dense.get_submodule(one) for one in names]
    convolutions = any(isinstance(layer, nn.Conv2d) for layer in layers)
    if convolutions:
        found["dense, channels last"] = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    if compiler:
        model, found["dense, compiled"] = compiled(name, training)
        model.load_state_dict(dense.state_dict())
    if not training and all(getattr(layer, "kernel_size", (1, 1)) == (1, 1) for layer in layers) and not any(
            isinstance(layer, nn.MultiheadAttention) for layer in layers):
        found["torch CSR"] = with_csr(dense, names)
    return found


def key(row):
    return tuple(row[name] for name in ("network", "replaced", "batch", "step", "threads"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of turns for each row")
    parser.add_argument("--tokens", type=at_least(1), default=32, help="that the decoder generates in a call")
    parser.add_argument("--only", choices=NETWORKS, nargs="+", default=[*NETWORKS], help="networks")
    parser.add_argument("--batches", type=at_least(1), nargs="+", default=[1, 8])
    parser.add_argument("--steps", choices=("forward", "training"), nargs="+", default=["forward", "training"])
    parser.add_argument("--uncompiled", action="store_true", help="omit torch.compile, which takes minutes")
    parser.add_argument("--result", type=Path, help="path of the JSON file")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    order = [(name, part) for name, (*_, parts) in NETWORKS.items() for part in parts]
    compiler = not given.uncompiled and shutil.which("g++") is not None
    now, line = commit(), command("whole_networks", argv)
    record = {"command": command("whole_networks", []), "commit": "", "processor": binding.get_host_cpu_name(),
              "device": device_name("cpu"), "precision": "float32", "sparsity": SPARSITY, "versions": versions(),
              "rows": []}
    result = given.result or MEASURED / f"{record['processor']}.json"
    earlier = json.loads(result.read_text()) if result.exists() else record
    if all(earlier[name] == record[name] for name in ("device", "versions")):
        record["rows"] = earlier["rows"]
    done = {key(row) for row in record["rows"] if row["command"] == line}
    rows = [(name, part, batch, step) for step in given.steps for name in given.only
            for part in (NETWORKS[name][2] if step == "forward" else TRAINED.get(name, ())) for batch in given.batches]
    for name, replaced, batch, step in (row for row in rows if (*row, given.threads) not in done):
        row = compare(name, batch, replaced, step, given.seconds, given.tokens, compiler)
        row |= {"command": line, "commit": now}
        rest = [one for one in record["rows"] if key(one) != key(row)]
        record["rows"] = sorted([*rest, row], key=lambda row: (row["step"], row["threads"], order.index(
            (row["network"], row["replaced"])), row["batch"]))
        record["commit"] = ", ".join(dict.fromkeys(row["commit"] for row in record["rows"]))
        print(f"{name}, {replaced}, batch {batch}, {step}: dense {1e3 * row['median_seconds']['dense']:.1f} ms, "
              f"{row['share_of_dense']:.0%} of it in the {row['layers']} layers, at most {row['bound']:.1f} x; "
              + ", ".join(f"{way} {ratio:.2f} x" for way, ratio in row["ratios"].items()), flush=True)
        written(result, record)


if __name__ == "__main__":
    main()
