"""Whole networks on a CPU, end to end, with their linear layers dense or with constant fan-in.

A decoder of GPT-2's size generates token by token, a Vision Transformer (ViT-B/16) classifies images, and an encoder of
BERT's size reads sentences. Their weights are random, because time does not depend on them. Masks of constant fan-in at
90 % sparsity are drawn for the layers of the MLPs, for all linear layers of the blocks, or for the output layer too.
Four networks are compared: dense, CSR matrices of torch, fan-in layers, and fan-in layers in which eight neighbouring
neurons read the same inputs. The outputs are compared with those of masked dense networks before anything is timed.

All networks of a comparison take turns. Medians and quartiles of a call are written, and the share of the dense
network's time that is spent in the replaced layers, which bounds what can be gained (Amdahl). Run it with
`python benchmarks/whole_networks.py --threads 1`; it takes a quarter of an hour. The record, which is in the book, is
permask_core/data/measured/whole_networks/PROCESSOR.json. An interrupted run continues: rows of the same command are
kept, until the file is deleted. `--only gpt2` runs one network.
"""

import argparse
import copy
import json
import statistics
import time
from functools import partial
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
from permask_core.sparse.fan_in import sample_columns

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


MLPS, BLOCKS = {"mlp"}, {"mlp", "qkv", "out"}
NETWORKS = {  # a network, its inputs for a batch, and which parts of names its replaced layers have
    "gpt2": (Decoder, None, {"MLPs": MLPS, "blocks": BLOCKS, "blocks and output": BLOCKS | {"head"}}),
    "bert": (Encoder, lambda batch: torch.randint(30522, (batch, 128)), {"MLPs": MLPS, "blocks": BLOCKS}),
    "vit_b_16": (lambda: torchvision.models.vit_b_16(), lambda batch: torch.randn(batch, 3, 224, 224),
                 {"MLPs": MLPS, "blocks": MLPS | {"self_attention"}}),
}


def masks(model, parts, shared):
    """Return masks of constant fan-in for the weights of linear layers and of attention with one of these parts in
    their names."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, weight in model.named_parameters():
        *owner, kind = name.split(".")
        if weight.ndim == 2 and kind in ("weight", "in_proj_weight") and parts & {*owner}:
            n, inputs = weight.shape
            columns = sample_columns(n // shared, inputs, round(inputs * (1 - SPARSITY)), generator=generator)
            mask = torch.zeros(n, inputs, dtype=torch.bool)
            found[name] = mask.scatter_(1, columns.long().repeat_interleave(shared, 0), True)
    return found


def with_csr(model, names):
    model = copy.deepcopy(model)
    for name in names:
        model.set_submodule(name, Csr(model.get_submodule(name)))
    return model


def share_of(model, names, call):
    """The share of a call's time that is spent in some layers."""
    spent, started = [0.0], {}
    handles = []
    for name in names:
        layer = model.get_submodule(name)
        handles += [layer.register_forward_pre_hook(lambda module, *_: started.update({module: time.perf_counter()})),
                    layer.register_forward_hook(lambda module, *_: spent.append(time.perf_counter() - started[module]))]
    call(model)
    spent.clear()
    start = time.perf_counter()
    for _ in range(3):
        call(model)
    whole = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    return sum(spent) / whole


@torch.no_grad()
def compare(name, batch, replaced, seconds, length):
    """Return a row: the times of all networks for one call, which for the decoder generates ``length`` tokens."""
    torch.manual_seed(0)
    make, inputs, parts = NETWORKS[name]
    model = make().eval()
    if inputs is None:
        call = partial(generate, prompt=torch.zeros(batch, dtype=torch.int64), length=length)
    else:
        x = inputs(batch)
        call = lambda network: network(x)  # noqa: E731
    ways, names = {}, []
    for way, shared in (("fan-in", 1), ("shared by 8", SHARED)):
        found = masks(model, parts[replaced], shared)
        condensed = condense(model, found)
        if condensed.left:
            raise SystemExit(f"{name}: not replaced: {condensed.left}")
        dense = copy.deepcopy(model)
        dense.load_state_dict(model.state_dict() | {key: model.state_dict()[key] * mask for key, mask in found.items()})
        names = sorted({key.rpartition(".")[0].removesuffix(".out_proj") for key in found})
        others = {"dense": dense} if shared == 1 else {}
        if others and all(isinstance(model.get_submodule(one), nn.Linear) for one in names):
            others["torch CSR"] = with_csr(dense, names)
        ways |= {way: condensed.model} | others
        for network in (condensed.model, *others.values()):
            ours, theirs = call(network), call(dense)
            ours, theirs = (one[1] if isinstance(one, tuple) else one for one in (ours, theirs))
            error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
            if error > 1e-3:
                raise SystemExit(f"{name}: the {way} network is off by {error} of the largest output")
    share = share_of(ways["dense"], names, call)
    times = timed_turns({way: partial(call, network) for way, network in ways.items()}, seconds, least=3)
    medians = {way: statistics.median(found) for way, found in times.items()}
    return {"network": name, "replaced": replaced, "batch": batch, "layers": len(names), "share_of_dense": share,
            "bound": 1 / (1 - share), "tokens": length if inputs is None else None, "turns": len(times["dense"]),
            "median_seconds": medians,
            "quartiles_seconds": {way: list(np.quantile(found, [0.25, 0.75])) for way, found in times.items()},
            "ratios": {way: medians["dense"] / median for way, median in medians.items() if way != "dense"}}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of turns for each row")
    parser.add_argument("--tokens", type=at_least(1), default=32, help="that the decoder generates in a call")
    parser.add_argument("--only", choices=NETWORKS, help="one network")
    parser.add_argument("--result", type=Path, help="path of the JSON file")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    now, record = commit(), {"command": command("whole_networks", argv), "commit": "",
                             "processor": binding.get_host_cpu_name(), "device": device_name("cpu"),
                             "threads": given.threads, "precision": "float32", "sparsity": SPARSITY,
                             "versions": versions(), "rows": []}
    result = given.result or MEASURED / f"{record['processor']}.json"
    earlier = json.loads(result.read_text()) if result.exists() else record
    if all(earlier[key] == record[key] for key in ("command", "device", "versions")):
        record["rows"] = earlier["rows"]
    done = {(row["network"], row["replaced"], row["batch"]) for row in record["rows"]}
    networks = [given.only] if given.only else NETWORKS
    rows = [(name, part, batch) for name in networks for part in NETWORKS[name][2] for batch in (1, 8)]
    for name, replaced, batch in (row for row in rows if row not in done):
        row = compare(name, batch, replaced, given.seconds, given.tokens) | {"commit": now}
        record["rows"].append(row)
        record["commit"] = ", ".join(dict.fromkeys(row["commit"] for row in record["rows"]))
        print(f"{name}, {replaced}, batch {batch}: dense {1e3 * row['median_seconds']['dense']:.1f} ms, "
              f"{row['share_of_dense']:.0%} of it in the {row['layers']} layers, at most {row['bound']:.1f} x; "
              + ", ".join(f"{way} {ratio:.2f} x" for way, ratio in row["ratios"].items()), flush=True)
        written(result, record)


if __name__ == "__main__":
    main()
