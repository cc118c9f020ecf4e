"""Matching by weights against matching by activations: perceptrons and ResNet8 of several widths on noisy digits.

Two measures. The barrier on the line from B to A moved onto B, on the test and the training set; with BatchNorm its
statistics are recomputed along the line. And the accuracy of B under A's mask, moved by either matching, at 97 %
sparsity; the widest ResNet8 has the barrier only. Widths, sparsity and number of seeds were fixed before the run.
Results are written to permask_core/data/measured/weights_or_activations.json. An interrupted run continues from its
stored stages. Run it with `python benchmarks/weights_or_activations.py`; it takes a quarter of an hour on two cores.
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
WIDTHS = {"noisy-digits-mlp": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), "digits": (0.25, 0.5, 1.0, 2.0)}
TRAINED = {"noisy-digits-mlp": WIDTHS["noisy-digits-mlp"], "digits": WIDTHS["digits"][:-1]}  # under the mask


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", default="build/weights_or_activations", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    store, seeds = Store(given.runs), range(FIRST, FIRST + given.seeds)
    shared, networks = {"seeds": seeds, "workers": given.workers}, {}
    for preset, widths in WIDTHS.items():
        base = permuted_masks.preset(preset)
        correction = "reset" if base.model.startswith("resnet") else "none"
        lines = [row for by in permuted_masks.MATCHINGS for row in basins.run(
            permuted_masks.vary(base, widths, [base.rewind]), store, sparsities=[0.0], by=by, points=POINTS,
            correction=correction, **shared) if row["method"] == "permuted" or by == "weights"]
        rows = permuted_masks.run(permuted_masks.vary(base, TRAINED[preset], [base.rewind]), store,
                                  sparsities=[SPARSITY], methods=("dense", "lth", "permuted", "naive"), **shared)
        networks[base.model] = {"settings": base.as_dict(), "correction": correction, "rows": rows, "lines": [
            {key: value for key, value in row.items() if key not in ("losses", "errors")} for row in lines]}
    record = {"command": "python benchmarks/weights_or_activations.py", "commit": commit(), "versions": versions(),
              "device": "CPU, one thread a process", "points": POINTS, "networks": networks}
    written(given.result, record)
    print(f"{sum(len(one['rows']) + len(one['lines']) for one in networks.values())} results in {given.result}")


if __name__ == "__main__":
    main()
