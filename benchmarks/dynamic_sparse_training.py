"""Static masks compared with moving connections on digits, at four sparsities; and SparseOpt compared with plain SGD.

This takes too long for a notebook. In each network a seed gives all methods the same data in the same order, and at
each sparsity every layer has equally many connections: Erdős-Rényi-Kernel densities rounded down to constant fan-in,
but at least one connection for each neuron. Weights start from the sparse initialisation.

- random, fan_in: static masks, drawn over a whole layer or with equally many connections for each neuron
- set, rigl: starting from the random masks
- srigl, srigl+ablation: starting from the fan-in masks, as do all methods below
- srigl+ablation/erk: with the number of connections before rounding, which may be larger or smaller
- set/layers, srigl+ablation/layers: in FanInLinear layers, which store only their connections

SparseOpt runs in the wide network with BatchNorm, from the dense initialisation under one of three masks: a random
mask, one in which every other neuron of a hidden layer has about nine times as many connections, or that of RigL.

The networks were chosen with seeds 0 and 1. The methods have their published settings, except for a shorter interval
between rewirings. Results are for seeds from 100 on, in permask_core/data/measured/dynamic_sparse_training.json. Run it
with `python benchmarks/dynamic_sparse_training.py`; it takes ten to fifteen minutes on one core.
"""

import argparse
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from _machine import written
from torch import nn

import permask_core
from permask_core.data import load_dataset
from permask_core.experiments.dynamic_sparsity import UNEQUAL, starting_masks
from permask_core.masks import sparsity
from permask_core.models import build_model
from permask_core.pruning import erk_densities
from permask_core.runs.progress import progress
from permask_core.runs.store import commit, device_name, versions
from permask_core.sparse import FanInLinear
from permask_core.sparse.dynamic import Rewiring
from permask_core.sparse.initialisation import sparse_init
from permask_core.training import Recipe, evaluate, fit

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "dynamic_sparse_training.json"
FIRST = 100
SPARSITIES = [0.8, 0.9, 0.95, 0.99]
NOISY = {"noise": 1.0, "copies": 5}
NETWORKS = {"narrow": ({}, {"width": 0.5}), "wide": (NOISY, {"width": 2.0}),
            "deep": (NOISY, {"width": 1.0, "depth": 4})}
RECIPE = Recipe(epochs=40, batch_size=64)
EVERY = 20
SRIGL, ABLATION = Rewiring("srigl", EVERY, min_salient=None), Rewiring("srigl", EVERY)
METHODS = {"random": None, "fan_in": None, "set": Rewiring("set", EVERY), "rigl": Rewiring("rigl", EVERY),
           "srigl": SRIGL, "srigl+ablation": ABLATION, "srigl+ablation/erk": ABLATION,
           "set/layers": Rewiring("set", EVERY), "srigl+ablation/layers": ABLATION}
MASKS = {"random": None, "uneven": None, "rigl": METHODS["rigl"]}


def matched_masks(model, wanted, seed, *, unequal):
    """Return the initial masks of a method; all methods have equally many connections in each layer."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim > 1}
    return starting_masks(weights, erk_densities(weights, 1 - wanted), unequal=unequal, seed=seed)


def as_layers(model, masks):
    """Return the model with each masked layer replaced by a FanInLinear."""
    return nn.Sequential(OrderedDict(
        (name, FanInLinear.from_dense(module, masks[f"{name}.weight"]) if f"{name}.weight" in masks else module)
        for name, module in model.named_children()))


def trained(network, method, wanted, seed, recipe):
    data, options = NETWORKS[network]
    digits = load_dataset("digits", seed=seed, **data)
    model, masks = build_model("mlp", digits.input_shape, digits.classes, seed=seed, **options), None
    row = {"network": network, "method": method, "sparsity": wanted, "seed": seed}
    if method != "dense":
        masks = matched_masks(model, wanted, seed, unequal=method in UNEQUAL)
        sparse_init(model, masks, seed=seed)
        row["achieved"] = sparsity(masks)
    if method.endswith("/layers"):
        model, masks = as_layers(model, masks), None
    rewiring = METHODS.get(method)
    if method.endswith("/erk"):
        rewiring = replace(rewiring, densities=erk_densities(masks, 1 - wanted))
    run = fit(model, digits.train, recipe, seed=seed, masks=masks, rewiring=rewiring, description=None)
    if run.fan_in:
        last = {name: counts[-1] for name, counts in run.fan_in.items()}
        row |= {"connections": sum(int(counts.sum()) for counts in last.values()),
                "active": {name: int((counts > 0).sum()) for name, counts in last.items()}}
    return row | {"accuracy": evaluate(model, digits.test).accuracy}


def with_batchnorm(model):
    """Return the perceptron with a BatchNorm after each hidden linear layer."""
    layers = OrderedDict()
    for name, module in model.named_children():
        layers[name] = module
        if name.startswith("fc"):
            layers[name.replace("fc", "norm")] = nn.BatchNorm1d(module.out_features)
    return nn.Sequential(layers)


def uneven_masks(masks, seed):
    """Return random masks of the same size, in which the even neurons have up to 90 % of a hidden layer's
    connections."""
    generator, uneven = torch.Generator().manual_seed(seed), {}
    for name, mask in masks.items():
        shares = torch.tensor([1.8, 0.2] if name != "head.weight" else [1.0, 1.0])
        wanted = (mask.sum() / len(mask) * shares).round().clamp(1, mask.shape[1]).repeat(len(mask) // 2)
        rank = torch.rand(mask.shape, generator=generator).argsort(1).argsort(1)
        uneven[name] = rank < wanted[:, None]
    return uneven


def sparse_opt_trained(kind, wanted, seed, sparse_opt, recipe):
    data, options = NETWORKS["wide"]
    digits = load_dataset("digits", seed=seed, **data)
    model = with_batchnorm(build_model("mlp", digits.input_shape, digits.classes, seed=seed, **options))
    masks = matched_masks(model, wanted, seed, unequal=True)
    if kind == "uneven":
        masks = uneven_masks(masks, seed)
    run = fit(model, digits.train, replace(recipe, sparse_opt=sparse_opt), seed=seed, masks=masks,
              rewiring=MASKS[kind], description=None)
    return {"masks": kind, "sparsity": wanted, "seed": seed, "sparse_opt": sparse_opt, "achieved": sparsity(run.masks),
            "accuracy": evaluate(model, digits.test).accuracy}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one epoch at one sparsity: whether it runs")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    recipe = replace(RECIPE, epochs=1) if given.quick else RECIPE
    sparsities = SPARSITIES[-1:] if given.quick else SPARSITIES
    seeds = range(FIRST, FIRST + given.seeds)
    runs = [(network, "dense", 0.0, seed) for network in NETWORKS for seed in seeds]
    runs += [(network, method, s, seed) for network in NETWORKS for s in sparsities for method in METHODS
             if network == "narrow" or not method.endswith("/layers") for seed in seeds]
    rows = [trained(*run, recipe) for run in progress(runs, "methods")]
    pairs = [(kind, s, seed, sparse_opt) for kind in MASKS for s in sparsities[-3:] for seed in seeds
             for sparse_opt in (False, True)]
    sparse_opt = [sparse_opt_trained(*pair, recipe) for pair in progress(pairs, "SparseOpt")]
    settings = {"networks": {name: {"data": data, "model": model} for name, (data, model) in NETWORKS.items()},
                "recipe": str(recipe), "rewire_every": EVERY}
    command = "python benchmarks/dynamic_sparse_training.py" + f" --seeds {given.seeds}" * (given.seeds != 5)
    record = {"command": command, "commit": commit(), "versions": versions(),
              "device": f"{device_name('cpu')}, one thread", "settings": settings, "rows": rows,
              "sparse_opt": sparse_opt}
    written(given.result, record)
    print(f"{len(rows) + len(sparse_opt)} runs in {given.result}")


if __name__ == "__main__":
    main()
