"""The permutation groups of every torchvision classification model: number of units, and a test of the function.

Each model is built without trained weights and traced. Then a copy in float64 with random parameters and buffers
(permask_core.matching.checking.draw_stable_weights) is run before and after a random permutation of all groups. For as
many groups as the time allows, one entry is omitted, which must change the outputs. Results are written to
permask_core/data/measured/torchvision_groups.json model by model, each with its commit. An interrupted run continues
with the next model; delete a row to measure it again. Run it with `python benchmarks/torchvision_groups.py`; it takes
about an hour on two cores, and 16 GB of memory for the largest model.
"""

import argparse
import gc
import json
import platform
import time
from collections import Counter
from pathlib import Path

import torch
from _machine import written

import permask_core
from permask_core.matching import derangements, draw_stable_weights, function_change, permutation_groups
from permask_core.models.vision import torchvision
from permask_core.runs.progress import progress
from permask_core.runs.store import commit, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "torchvision_groups.json"
SIDES = {"inception_v3": 96} | {name: 224 for name in ("maxvit_t", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16",
                                                       "vit_l_32")}


def measured(name, seconds):
    """Return a row of the table; ``seconds`` is the time for omitting entries."""
    model, side = torchvision.models.get_model(name, weights=None), SIDES.get(name, 64)
    example = torch.randn(1, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    groups = permutation_groups(model, example.float())
    traced = time.perf_counter() - start
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = draw_stable_weights(model, example)
    gc.collect()
    permutations = derangements(groups)
    change = function_change(groups, permutations, model, example)
    left_out, start = {}, time.perf_counter()
    for group in spread(list(groups)):
        if left_out and time.perf_counter() - start > seconds:
            break
        part = {**groups, group: groups[group]._replace(entries=groups[group].entries[1:])}
        left_out[group] = function_change(part, {group: permutations[group]}, model, example)
    fixed = Counter()
    for _, _, count, why in groups.fixed:
        fixed[why] += count
    return {"model": name, "parameters": parameters, "side": side, "groups": len(groups),
            "top": sum(group.within is None for group in groups.values()),
            "units": sum(group.size for group in groups.values()), "fixed": fixed, "seconds": traced,
            "change": change, "left_out": min(left_out.values()), "left_out_at": min(left_out, key=left_out.get),
            "left_out_groups": len(left_out), "commit": commit()}


def spread(names):
    """Return the names in an order of which every beginning is spread over the network (a van der Corput sequence)."""
    bits = max(1, (len(names) - 1).bit_length())
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [names[i] for i in order if i < len(names)]


def main(argv=None):
    models = torchvision.models.list_models(module=torchvision.models)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=models, choices=models, metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, default=15, help="for omitting entries in each model")
    options = parser.parse_args(argv)
    record = {"command": f"python benchmarks/torchvision_groups.py --seconds {options.seconds:g}",
              "versions": versions() | {"torchvision": torchvision.__version__}, "device": platform.machine(),
              "precision": "float64", "rows": []}
    if RESULT.exists():
        old = json.loads(RESULT.read_text())
        if all(old[key] == record[key] for key in ("command", "versions")):
            record["rows"] = old["rows"]
    done = {row["model"] for row in record["rows"]}
    for name in progress([name for name in options.models if name not in done], "models"):
        row = measured(name, options.seconds)
        print(f"{name:22}{row['groups']:6} groups{row['units']:8} units  traced in {row['seconds']:5.1f} s  changed by "
              f"{row['change']:.1e}, with an entry omitted by at least {row['left_out']:.1e} "
              f"({row['left_out_groups']} tried)", flush=True)
        record["rows"] = sorted([*record["rows"], row], key=lambda row: row["model"])
        written(RESULT, record)
        gc.collect()


if __name__ == "__main__":
    main()
