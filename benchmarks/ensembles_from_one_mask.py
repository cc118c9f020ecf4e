"""Ensembles from one mask: their accuracy, the cost of training, and the number of weights.

Noisy digits and a small perceptron; seeds 0 to 9 with eight members for each method, and the mean over all subsets of
each size. The recipe, the sparsity and the epoch of the early matching were chosen on two other seeds. Results are
written to permask_core/data/measured/ensembles_from_one_mask.json. An interrupted run continues from its stored stages.
Run it with `python benchmarks/ensembles_from_one_mask.py`; it takes about six minutes on one core.
"""

import argparse
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from _machine import at_least, written

import permask_core
from permask_core.evaluation.diversity import ensemble_accuracy, probabilities
from permask_core.experiments import permuted_masks, retrained_tickets
from permask_core.runs.store import Store, commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "ensembles_from_one_mask.json"
SPARSITY = 0.9
QUICK = {"options": {"copies": 1}, "epochs": 5, "imp_epochs": 1, "checkpoints": (0, 2, 4)}
EARLY = 4  # epoch of the dense runs at which the masks of `permuted early` are matched
METHODS = ("dense", "pruned", "lth", "permuted", "permuted early", "naive")


def arrange(chosen, method):
    """Return the experiment and the method of :mod:`permask_core.experiments.retrained_tickets` for a method name."""
    return (replace(chosen, matched_at=EARLY), "permuted") if method == "permuted early" else (chosen, method)


def ensembles(p, y):
    """Return the accuracy of ensembles of each size, averaged over all subsets of the members."""
    sizes = range(1, len(p) + 1)
    return [np.mean([ensemble_accuracy(p[list(subset)], y) for subset in itertools.combinations(range(len(p)), size)])
            for size in sizes]


def measure(chosen, store, seeds, members, method, workers):
    """Return a row for each seed and each size of an ensemble."""
    used, base = arrange(chosen, method)
    rows = retrained_tickets.run(used, store, seeds=seeds, members=members, sparsity=SPARSITY, methods=[base],
                                 workers=workers)
    y, sparsity = permuted_masks.data(chosen).test.y, 0.0 if base == "dense" else SPARSITY
    for seed in seeds:
        p = probabilities([row["logits"] for row in rows if row["seed"] == seed])
        for size, accuracy in enumerate(ensembles(p, y), 1):
            yield {"method": method, "sparsity": sparsity, "seed": seed, "members": size,
                   "accuracy": round(float(accuracy), 6), "weights": round(size * (1 - sparsity), 6),
                   "epochs": retrained_tickets.training_epochs(used, size, SPARSITY, base)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--members", type=at_least(2), default=8)
    parser.add_argument("--workers", type=at_least(1), default=1)
    parser.add_argument("--quick", action="store_true", help="few epochs, to check that it runs")
    parser.add_argument("--runs", default="build/ensembles_from_one_mask", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = permuted_masks.preset("noisy-digits-mlp", **(QUICK if given.quick else {}))
    store, seeds = Store(given.runs), range(given.seeds)
    rows = [row for method in METHODS
            for row in measure(chosen, store, seeds, given.members, method, given.workers)]
    changes = "".join(f" --{name} {value}" for name, value, usual in (
        ("seeds", given.seeds, 10), ("members", given.members, 8)) if value != usual)
    record = {"command": f"python benchmarks/ensembles_from_one_mask.py{' --quick' * given.quick}{changes}",
              "commit": commit(), "versions": versions(), "device": f"{device_name('cpu')}, one thread a process",
              "settings": json.loads(json.dumps(asdict(chosen))), "early": EARLY, "rows": rows}
    written(given.result, record, indent=None)
    print(f"{len(rows)} rows in {given.result}")


if __name__ == "__main__":
    main()
