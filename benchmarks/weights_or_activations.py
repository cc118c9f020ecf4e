"""Matching by weights against matching by activations: perceptrons of six widths on noisy digits.

Two measures. The barrier on the line from B to A, moved onto B by either matching, on the test and the training set.
And the accuracy of B under A's mask, moved by either matching, at 97 % sparsity. Widths, sparsity and number of seeds
were fixed before the run. Results are written to permask_core/data/measured/weights_or_activations.json. An interrupted
run continues from its stored stages. Run it with `python benchmarks/weights_or_activations.py`; it takes ten minutes on
two cores.
"""

import argparse
from pathlib import Path

import torch
from _machine import written

import permask_core
from permask_core.experiments import basins, permuted_masks
from permask_core.runs.store import Store, commit, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "weights_or_activations.json"
FIRST, SPARSITY, POINTS = 100, 0.97, 11
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
QUICK = {"epochs": 2, "checkpoints": (0, 1, 2), "rewind": 1, "matched_at": 2, "imp_rewind": 1, "imp_epochs": 1}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", default="build/weights_or_activations", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true", help="two epochs and one width, to try the script")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    base, store = permuted_masks.preset("noisy-digits-mlp", **QUICK if given.quick else {}), Store(given.runs)
    variants = permuted_masks.vary(base, WIDTHS[:1] if given.quick else WIDTHS, [base.rewind])
    shared = {"seeds": range(FIRST, FIRST + given.seeds), "workers": given.workers}
    lines = [row for by in permuted_masks.MATCHINGS
             for row in basins.run(variants, store, sparsities=[0.0], by=by, points=POINTS, **shared)
             if row["method"] == "permuted" or by == "weights"]  # unmoved lines once
    rows = permuted_masks.run(variants, store, sparsities=[SPARSITY], methods=("dense", "lth", "permuted", "naive"),
                              **shared)
    record = {"command": "python benchmarks/weights_or_activations.py", "commit": commit(), "versions": versions(),
              "device": "CPU, one thread a process", "settings": base.as_dict(), "points": POINTS, "rows": rows,
              "lines": [{key: value for key, value in row.items() if key not in ("losses", "errors")} for row in lines]}
    written(given.result, record)
    print(f"{len(rows)} runs and {len(lines)} lines in {given.result}")


if __name__ == "__main__":
    main()
