"""How cheaply two networks can be matched before the permuted mask loses its advantage, and a planted permutation.

This takes too long for a notebook: noisy digits and a small perceptron, ten seeds, three sparsities and 28 recipes of
matching. A recipe determines the epoch at which A and B are matched, the method, the number of images, and the layers
that are permuted. All were fixed before the run with the seeds 100 and 101. Results are written to
permask_core/data/measured/price_of_alignment.json. An interrupted run continues from its stored stages. Run it with
`python benchmarks/price_of_alignment.py`; it takes about 15 minutes on one core.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _machine import at_least, written

import permask_core
from permask_core.experiments import permuted_masks
from permask_core.experiments.alignment import idle_units, mask_overlap, plant_permutation, shared_positions
from permask_core.matching import match_activations, match_weights, permute
from permask_core.runs.progress import progress
from permask_core.runs.store import Store, commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "price_of_alignment.json"
CHECKPOINTS = (0, 1, 2, 5, 10, 20)
QUICK = {"options": {"copies": 1}, "epochs": 3, "imp_epochs": 1, "checkpoints": (0, 2), "imp_rate": 0.6}
SPARSITIES = (0.97, 0.98, 0.99)
IMAGES, LAYERS = (10, 30, 100, 300), ("fc1", "fc2")
NOISES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # standard deviations of each tensor's weights
KNOBS = ("matched_at", "matched_images", "matched_layers")


def recipes(base):
    """Return (matching, experiment) of each recipe: all epochs; at the rewind point and the end, fewer images, one
    layer."""
    late = (base.rewind, base.epochs)
    found = [(by, {"matched_at": k}) for by in permuted_masks.MATCHINGS for k in base.checkpoints]
    found += [("activations", {"matched_at": k, "matched_images": n}) for k in late for n in IMAGES]
    found += [(by, {"matched_at": k, "matched_layers": (name,)}) for by in permuted_masks.MATCHINGS for k in late
              for name in LAYERS]
    return [(by, replace(base, **changes)) for by, changes in found]


def recipe_rows(by, experiment, base, store, seeds, sparsities, workers):
    """Return the runs of a recipe, with the seconds of its matching and the overlap with the mask of the latest
    matching."""
    found, groups = [], permuted_masks.groups(base)
    rows = permuted_masks.run(experiment, store, seeds=seeds, sparsities=sparsities, methods=["permuted"],
                              matchings=[by], workers=workers)
    for row in rows:
        permutations, record = permuted_masks.match_dense(experiment, store, row["seed"], by)
        latest, _ = permuted_masks.match_dense(base, store, row["seed"], by)
        masks = permuted_masks.find_ticket(base, store, row["seed"], row["sparsity"]).masks
        overlap = mask_overlap(*(permute(groups, one, masks) for one in (permutations, latest)))
        found.append(kept(row) | experiment.select(*KNOBS) | {"matching_seconds": round(record["seconds"], 5),
                                                              "overlap": round(overlap, 5)})
    return found


def kept(row):
    return {key: row[key] for key in ("method", "matching", "sparsity", "seed", "accuracy", "loss")} | {
        "seconds": round(row["seconds"], 4)}


def control_rows(base, store, seed, sparsities):
    """Return how well each matching recovers a network A that was permuted at random and perturbed."""
    groups, data = permuted_masks.groups(base), permuted_masks.data(base).train
    a = permuted_masks.train_dense(base, store, seed, "a")[0][base.epochs]
    tickets = {s: permuted_masks.find_ticket(base, store, seed, s).masks for s in sparsities}
    for noise in NOISES:
        b, truth = plant_permutation(groups, a, noise=noise, seed=seed)
        models = [permuted_masks.build_network(base, state) for state in (a, b)]
        everything = data.batches(torch.arange(len(data)).split(base.batch_size), torch.device("cpu"))
        found = {"weights": match_weights(groups, a, b, seed=seed),
                 "activations": match_activations(groups, *models, everything),
                 "": {name: torch.arange(group.size) for name, group in groups.items()}}  # nothing is moved
        for by, permutations in found.items():
            for s, masks in tickets.items():
                yield {"matching": by, "noise": noise, "seed": seed, "sparsity": s,
                       "shared_positions": round(shared_positions(permutations, truth), 5),
                       "overlap": round(mask_overlap(permute(groups, permutations, masks),
                                                     permute(groups, truth, masks)), 5),
                       "idle": round(torch.cat(list(idle_units(groups, masks, a).values())).double().mean().item(), 5)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--workers", type=at_least(1), default=1)
    parser.add_argument("--quick", action="store_true", help="few epochs, one sparsity, to check that it runs")
    parser.add_argument("--runs", default="build/price_of_alignment", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    base = permuted_masks.preset("noisy-digits-mlp-long", **(QUICK if given.quick else {"checkpoints": CHECKPOINTS}))
    sparsities, seeds, store = SPARSITIES[:1] if given.quick else SPARSITIES, range(given.seeds), Store(given.runs)
    rows = [kept(row) for row in permuted_masks.run(base, store, seeds=seeds, sparsities=sparsities,
                                                    workers=given.workers, methods=["dense", "lth", "naive", "random"])]
    for by, experiment in recipes(base):
        rows += recipe_rows(by, experiment, base, store, seeds, sparsities, given.workers)
    control = [row for seed in progress(seeds, "planted permutations")
               for row in control_rows(base, store, seed, sparsities)]
    asked = " --quick" * given.quick + (f" --seeds {given.seeds}" if given.seeds != 10 else "")
    record = {"command": f"python benchmarks/price_of_alignment.py{asked}",
              "commit": commit(), "versions": versions(), "device": f"{device_name('cpu')}, one thread a process",
              "settings": asdict(base), "training_images": len(permuted_masks.data(base).train), "rows": rows,
              "control": control}
    written(given.result, record, indent=None)
    print(f"{len(rows)} runs in {given.result}")


if __name__ == "__main__":
    main()
