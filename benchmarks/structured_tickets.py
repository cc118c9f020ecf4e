"""Tickets of constant fan-in that are moved to another network: their loss of accuracy, and their prediction time.

Noisy digits and a perceptron with two hidden layers of 768 units. Tickets are pruned on A in two ways: by magnitude
over all weights (``global``), and to the same number of weights in every neuron of a layer (``fan_in``). Three methods
use each mask: ``lth``, ``permuted`` (by matching weights) and ``naive``. Permuted tickets of constant fan-in are also
trained in condensed form. The recipe was chosen on seed 100.

Then the trained networks of each seed predict in turns, in one process and one thread: B dense; the unstructured
permuted ticket with its zeros in dense layers, in smaller dense layers without disconnected neurons, and in CSR
matrices of torch; and the permuted ticket of constant fan-in, condensed. Processor time is measured: on a busy machine
a long call waits for other programs and a short one does not, so wall-clock time would favour the short one. Before the
timing, outputs are compared with those of the network under its mask. Medians over the turns are stored.

Run it with `python benchmarks/structured_tickets.py`; it takes about ten minutes on one core. An interrupted run
continues from its stored stages. Results are written to permask_core/data/measured/structured_tickets.json.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _machine import at_least, written
from fan_in_cpu import timed_turns
from torch import nn

import permask_core
from permask_core.experiments import permuted_masks
from permask_core.runs.store import Store, commit, device_name, versions
from permask_core.sparse import condense

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "structured_tickets.json"
SCOPES = ("global", "fan_in")
SPARSITIES = (0.9, 0.95, 0.97, 0.985)
BATCHES = (1, 256)
KEPT = ("method", "sparsity", "achieved", "seed", "accuracy", "loss")
EXPERIMENT = permuted_masks.preset("noisy-digits-mlp", width=6, checkpoints=(0, 2))
QUICK = permuted_masks.preset("noisy-digits-mlp", width=0.5, epochs=3, checkpoints=(0, 2), imp_epochs=1)


class CSR(nn.Module):
    """A linear layer whose weight is a CSR matrix of torch."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight.detach().to_sparse_csr(), linear.bias.detach()

    def forward(self, x):
        return (self.weight @ x.t()).t() + self.bias


def with_csr(model):
    """Return a copy of a perceptron with CSR matrices as the weights of its linear layers."""
    model = copy.deepcopy(model)
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            setattr(model, name, CSR(layer))
    return model


@torch.no_grad()
def trimmed(model):
    """Return a smaller dense perceptron that computes the same, without neurons that have no inputs or no outputs."""
    model = copy.deepcopy(model)
    linear = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
    for before, after in reversed(list(zip(linear, linear[1:]))):
        fed, read = (before.weight != 0).any(1), (after.weight != 0).any(0)
        after.bias += after.weight[:, ~fed] @ before.bias[~fed].relu()  # neurons without inputs are constant
        before.weight, before.bias = nn.Parameter(before.weight[fed & read]), nn.Parameter(before.bias[fed & read])
        after.weight = nn.Parameter(after.weight[:, fed & read])
    return model


def networks(chosen, store, seed, sparsity):
    """Return the trained networks to time, by name, each with the network with which it must agree."""
    dense = permuted_masks.build_network(chosen, permuted_masks.train_dense(chosen, store, seed, "b")[0][chosen.epochs])
    masked = {scope: replace(chosen, imp_scope=scope) for scope in SCOPES}
    states = (permuted_masks.train_sparse(one, store, seed, sparsity, "permuted", "weights")[0]
              for one in masked.values())
    zeros, fan_in = map(permuted_masks.build_network, masked.values(), states)
    masks = permuted_masks.method_masks(masked["fan_in"], store, seed, sparsity, "permuted", "weights")
    return {"dense": (dense, dense), "zeros": (zeros, zeros), "trimmed": (trimmed(zeros), zeros),
            "CSR": (with_csr(zeros), zeros), "fan-in": (condense(fan_in, masks).model, fan_in)}


@torch.no_grad()
def times(chosen, store, seed, sparsity, seconds):
    """Return the median seconds of processor time for a prediction, one row for each batch."""
    compared = networks(chosen, store, seed, sparsity)
    for batch in BATCHES:
        x = permuted_masks.data(chosen).test.x[:batch]
        for name, (model, right) in compared.items():
            off = (model(x) - right(x)).abs().max().item()
            if off > 1e-3:
                raise SystemExit(f"{name} is off by {off} at batch {batch}: not timed")
        found = timed_turns({name: lambda model=model, x=x: model(x) for name, (model, _) in compared.items()},
                            seconds, clock=time.process_time)
        yield {"seed": seed, "sparsity": sparsity, "batch": batch, "turns": len(found["dense"]),
               "trimmed_to": [len(layer.weight) for layer in compared["trimmed"][0].children()
                              if isinstance(layer, nn.Linear)][:-1],
               "median_seconds": {name: statistics.median(values) for name, values in found.items()}}


def connections(masks):
    """Return, for each layer, the minimum and maximum number of connections of a neuron, and how many neurons have
    any."""
    counts = {name.removesuffix(".weight"): mask.sum(1) for name, mask in masks.items()}
    return {name: [int(count.min()), int(count.max()), int((count > 0).sum())] for name, count in counts.items()}


def accuracies(chosen, store, seeds, sparsities, workers):
    """Return the rows of all methods under both kinds of masks, and of condensed training."""
    rows = []
    for scope in SCOPES:
        one = replace(chosen, imp_scope=scope)
        methods = ("dense", "lth", "permuted", "naive")[scope != "global":]
        for row in permuted_masks.run(one, store, seeds=seeds, sparsities=sparsities, matchings=["weights"],
                                      methods=methods, workers=workers):
            row = {"scope": scope} | {key: row[key] for key in KEPT}
            if row["method"] == "permuted":
                where = store, row["seed"], row["sparsity"], "permuted", "weights"
                row["connections"] = connections(permuted_masks.method_masks(one, *where))
                if scope == "fan_in":
                    found = permuted_masks.train_sparse(one, *where, condensed=True)[1]
                    row |= {f"condensed_{key}": found[key] for key in ("accuracy", "loss")}
            rows.append(row)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--workers", type=at_least(1), default=1)
    parser.add_argument("--quick", action="store_true", help="a small network and one sparsity, to check that it runs")
    parser.add_argument("--runs", default="build/structured_tickets", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    chosen, sparsities = (QUICK, SPARSITIES[-1:]) if given.quick else (EXPERIMENT, SPARSITIES)
    store, seeds = Store(given.runs), range(given.seeds)
    record = {
        "command": "python benchmarks/structured_tickets.py" + (f" --seeds {given.seeds}" if given.seeds != 10 else ""),
        "commit": commit(), "versions": versions(), "device": f"{device_name('cpu')}, one thread",
        "settings": json.loads(json.dumps(asdict(chosen))),
        "rows": accuracies(chosen, store, seeds, sparsities, given.workers),
        "times": [row for seed in seeds for s in sparsities
                  for row in times(chosen, store, seed, s, 0 if given.quick else 0.5)]}
    written(given.result, record, indent=None)
    print(f"{len(record['rows'])} runs and {len(record['times'])} comparisons of times in {given.result}")


if __name__ == "__main__":
    main()
