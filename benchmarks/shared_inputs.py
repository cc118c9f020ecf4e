"""What it costs in accuracy if neighbouring neurons share their inputs, on Fashion-MNIST.

Layers are faster if several neurons have the same connections, because an input is then fetched once for all of them;
benchmarks/whole_networks.py and benchmarks/fan_in_cpu.py measure the time. Here a perceptron with two layers of 256
units is trained with constant fan-in, static or moved by SRigL, and with groups of 1, 4, 8 and 16 neurons that share
their inputs. All start with equally many connections; the output layer has 10 neurons, of which only pairs share.
Results are written to permask_core/data/measured/shared_inputs.json. An interrupted run continues from its stored
stages. Run it with `python benchmarks/shared_inputs.py`; it takes one to two hours on one core.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from _machine import at_least, written

import permask_core
from permask_core.experiments import dynamic_sparsity
from permask_core.runs.store import Store, commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "shared_inputs.json"
SHARED, SPARSITIES, METHODS, FIRST = (1, 4, 8, 16), (0.9, 0.95, 0.98), ("fan_in", "srigl"), 5
QUICK = {"options": {"n_train": 500, "n_test": 200}, "recipe": {"epochs": 1}, "every": 2}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images, to check that it runs")
    parser.add_argument("--seeds", type=at_least(1), default=5)
    parser.add_argument("--workers", type=at_least(1), default=1)
    parser.add_argument("--runs", default="build/shared_inputs", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    base = dynamic_sparsity.preset("fashion_mnist-mlp", **(QUICK if given.quick else {}))
    store, rows = Store(given.runs), []
    for shared in SHARED:
        found = dynamic_sparsity.run(
            replace(base, shared=shared), store, seeds=range(FIRST, FIRST + given.seeds), sparsities=SPARSITIES,
            methods=METHODS, workers=given.workers)
        rows += [{"shared": shared} | {key: row[key] for key in (
            "method", "sparsity", "achieved", "seed", "accuracy", "active", "neurons", "connections")} for row in found]
        record = {"command": f"python benchmarks/shared_inputs.py{' --quick' * given.quick}", "commit": commit(),
                  "versions": versions(), "device": f"{device_name('cpu')}, one thread a process",
                  "preset": "fashion_mnist-mlp", "rows": rows}
        written(given.result, record, indent=None)
        print(f"groups of {shared}: {len(found)} runs", flush=True)


if __name__ == "__main__":
    main()
