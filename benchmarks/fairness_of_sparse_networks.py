"""Fairness of sparse networks by class, group and individual for every method, compared with their dense networks.

This takes too long for a notebook. There are two tasks, each with ten seeds and five sparsities (all fixed before the
run; recipes and matching were chosen on the seeds 0 and 1, only by accuracy):

- digits: ten classes of noisy digits, a small perceptron
- trifeature: ten shapes at 24 pixels, LeNet-5; in half of the training images the colour depends on the shape, the test
  set is balanced

Masks are permuted by matching weights, which was better than matching activations on the seeds 0 and 1 wherever both
differed by more than a point. Results are written to permask_core/data/measured/fairness_of_sparse_networks.json. An
interrupted run continues from its stored stages. Run it with `python benchmarks/fairness_of_sparse_networks.py`; it
takes about 20 minutes on one core.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from _machine import at_least, written

import permask_core
from permask_core.evaluation.fairness import (
    chance_level,
    demographic_parity_difference,
    equalized_odds_difference,
    individual_fairness,
)
from permask_core.evaluation.statistics import class_accuracies
from permask_core.experiments import permuted_masks
from permask_core.runs.progress import progress
from permask_core.runs.store import Store, commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "fairness_of_sparse_networks.json"
FIRST = 100
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
MEASURES = {"DPD": demographic_parity_difference, "EOD": equalized_odds_difference}
PRESETS = {"digits": "noisy-digits-mlp-long", "trifeature": "trifeature-lenet5"}  # by task


def experiment(task, quick):
    if not quick:
        return permuted_masks.preset(PRESETS[task])
    options = {"image_size": 16, "n_train": 200, "n_test": 1000} if task == "trifeature" else {"copies": 1}
    return permuted_masks.preset(PRESETS[task], options=options, epochs=3, imp_epochs=1, imp_rate=0.6)


def trained(chosen, store, row):
    """Return the final state of a row's network."""
    if row["method"] == "dense":
        return permuted_masks.train_dense(chosen, store, row["seed"], row["network"])[0][chosen.epochs]
    run = row["seed"], row["sparsity"], row["method"], row["matching"] or None
    return permuted_masks.train_sparse(chosen, store, *run)[0]


def measured(chosen, store, row):
    """Return the stored measures of a run: accuracies of classes, individual fairness and, if any, group fairness."""
    test, logits = permuted_masks.data(chosen).test, permuted_masks.logits(chosen, trained(chosen, store, row))
    p, named = logits.softmax(1), logits.argmax(1)
    found = {key: row[key] for key in ("method", "matching", "sparsity", "seed", "network", "accuracy", "loss")}
    found["class_accuracies"] = class_accuracies(test.y, named, permuted_masks.data(chosen).classes).round(5).tolist()
    found["individual"] = round(individual_fairness(p, pixels(test.x)).mean, 7)
    found["confidence"] = round(p.max(1).values.mean().item(), 5)
    if not test.attributes:
        return found
    for name in ("colour", "texture"):
        about = {"sensitive_features": test.attributes[name]}
        for short, measure in MEASURES.items():
            chance = chance_level(measure, test.y, named, **about)
            found[f"{name} {short}"] = [round(value, 5) for value in (measure(test.y, named, **about), *chance)]
    return found | {"shortcut": round(shortcut(test, named), 5)}


def pixels(x):
    """Return images in [0, 1]; standardised images are not changed."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def shortcut(test, named):
    """Return the fraction of wrong predictions that follow the colour, where it indicates another shape; chance is
    1/9."""
    colour = test.attributes["colour"].member.int().argmax(1)
    wrong = (named != test.y) & (colour != test.y)
    return (named == colour)[wrong].double().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--workers", type=at_least(1), default=2)
    parser.add_argument("--quick", action="store_true", help="tiny images, few epochs, to check that it runs")
    parser.add_argument("--runs", default="build/fairness_of_sparse_networks", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    tasks, store, seeds = {}, Store(given.runs), range(FIRST, FIRST + given.seeds)
    for task in PRESETS:
        chosen = experiment(task, given.quick)
        rows = permuted_masks.run(chosen, store, seeds=seeds, sparsities=SPARSITIES[-1:] if given.quick else SPARSITIES,
                                  methods=permuted_masks.KNOWN_METHODS, matchings=["weights"], workers=given.workers)
        rows = [row | {"network": permuted_masks.parent(row["method"])} for row in rows]
        of_a = {row["seed"]: row | {"network": "a"} for row in rows if row["method"] == "dense"}
        rows += [row | permuted_masks.train_dense(chosen, store, seed, "a")[1] for seed, row in of_a.items()]
        sizes = np.bincount(permuted_masks.data(chosen).test.y).tolist()
        tasks[task] = {"settings": json.loads(json.dumps(asdict(chosen))), "class_sizes": sizes, "rows": [
            measured(chosen, store, row) for row in progress(rows, f"measuring, {task}")]}
    command = "python benchmarks/fairness_of_sparse_networks.py" + (
        f" --seeds {given.seeds}" if given.seeds != 10 else "")
    record = {"command": command, "commit": commit(), "versions": versions(),
              "device": f"{device_name('cpu')}, one thread a process", "tasks": tasks}
    written(given.result, record, indent=None)
    print(f"{sum(len(one['rows']) for one in tasks.values())} runs in {given.result}")


if __name__ == "__main__":
    main()
