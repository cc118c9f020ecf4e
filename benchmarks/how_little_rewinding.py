"""How much rewinding sparse training needs, with dense weights and with weights scaled to the remaining connections.

Noisy digits and a small perceptron at 99 % sparsity, seeds 0 to 9. The recipe, the sparsity and the rewind points were
chosen on two other seeds. A's mask is the same at all rewind points: only the start of sparse training changes. Results
are written to permask_core/data/measured/how_little_rewinding.json. An interrupted run continues from its stored
stages. Run it with `python benchmarks/how_little_rewinding.py`; it takes about six minutes on one core.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _machine import at_least, written

import permask_core
from permask_core.experiments import permuted_masks
from permask_core.runs.store import Store, commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "how_little_rewinding.json"
SPARSITY = 0.99
METHODS = ("lth", "permuted", "naive", "random")
REWINDS = (0, 1, 2, 4)
CHANGES = {"checkpoints": (*REWINDS, 8)}
QUICK = {"checkpoints": (0, 1, 2), "options": {"copies": 1}, "epochs": 3, "imp_epochs": 1, "imp_rate": 0.6}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--workers", type=at_least(1), default=1)
    parser.add_argument("--quick", action="store_true", help="few epochs and rewind points, to check that it runs")
    parser.add_argument("--runs", default="build/how_little_rewinding", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = permuted_masks.preset("noisy-digits-mlp-long", **(QUICK if given.quick else CHANGES))
    store = Store(given.runs)
    shared = {"seeds": range(given.seeds), "sparsities": [SPARSITY], "matchings": ["weights"], "workers": given.workers}
    rows = [row | {"start": ""} for row in permuted_masks.run(chosen, store, methods=["dense"], **shared)]
    for rewind in (k for k in REWINDS if k < chosen.epochs):
        for start in permuted_masks.STARTS:
            found = permuted_masks.run(replace(chosen, rewind=rewind, start=start), store, methods=METHODS, **shared)
            rows += [row | {"start": start} for row in found]
    names = ("method", "start", "rewind", "seed", "sparsity", "achieved", "accuracy", "loss")
    seeds = f" --seeds {given.seeds}" if given.seeds != 10 else ""
    record = {"command": f"python benchmarks/how_little_rewinding.py{' --quick' * given.quick}{seeds}",
              "commit": commit(), "versions": versions(), "device": f"{device_name('cpu')}, one thread a process",
              "settings": json.loads(json.dumps(asdict(chosen))),
              "rows": [{name: row[name] for name in names} for row in rows]}
    written(given.result, record, indent=None)
    print(f"{len(rows)} runs in {given.result}")


if __name__ == "__main__":
    main()
