"""The permuted-mask experiment on noisy digits: every method at four sparsities and three widths, over twelve seeds.

This is the notebook `cifar` with its default preset and more seeds, widths and sparsities, which takes too long for a
notebook. All were fixed before the run, and the preset was chosen on other seeds. Results are written to
permask_core/data/measured/noisy_digits.json. An interrupted run continues from its stored stages. Run it with
`python benchmarks/noisy_digits.py`; it takes about half an hour on two cores.
"""

import argparse
from pathlib import Path

import torch
from _machine import written

import permask_core
from permask_core.experiments import permuted_masks
from permask_core.runs.store import Store, commit, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "noisy_digits.json"
FIRST = 100
WIDTHS, SPARSITIES = [0.5, 1.0, 2.0], [0.9, 0.95, 0.97, 0.985]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", default="build/noisy_digits", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    base = permuted_masks.preset("digits")
    rows = permuted_masks.run(permuted_masks.vary(base, WIDTHS, [base.rewind]), Store(given.runs),
                              seeds=range(FIRST, FIRST + given.seeds), sparsities=SPARSITIES, workers=given.workers)
    record = {"command": f"python benchmarks/noisy_digits.py --seeds {given.seeds}", "commit": commit(),
              "versions": versions(), "device": "CPU, one thread a process",
              "settings": str(base), "rows": rows}
    written(given.result, record)
    print(f"{len(rows)} runs in {given.result}")


if __name__ == "__main__":
    main()
