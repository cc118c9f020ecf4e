"""Output layers with fixed fan-in on a long-tailed problem with planted structure: precision and memory.

The methods are those of permask_core.experiments.extreme_labels. All have the same first layer, data of a seed and
recipe, and all except the dense one have equally many parameters.

Precision at k is computed over all labels, among the most frequent 20 % (head) and among the rest (tail). Settings were
chosen before the run, only with the dense layer. Run it with `python benchmarks/extreme.py`; it takes about ten minutes
on one core, with results in permask_core/data/measured/extreme.json. `--labels 100000` and `--labels 1000000` are for
long runs, without the dense layer.

`python benchmarks/extreme.py --memory` instead measures the memory of two training steps with a million labels, 768
inputs, fan-in 32 and Adam, then two with SET, with results in extreme_memory.json in the same folder. A peak is the
highest resident memory of the process minus the resident memory before the model is created, after loading the data and
compiling the kernels. It needs Linux.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from _machine import at_least, command, resident, written

import permask_core
from permask_core.data.extreme import make_multilabel
from permask_core.evaluation.statistics import paired_comparison
from permask_core.experiments import extreme_labels
from permask_core.runs.processes import default_device
from permask_core.runs.store import commit, device_name, versions
from permask_core.training.extreme import ExtremeClassifier, ExtremeRecipe, best_precision, fit_extreme, training_bytes

MEASURED = Path(permask_core.__file__).parent / "data" / "measured"
EXPERIMENTS = {chosen.labels: chosen for chosen in (
    extreme_labels.preset(name) for name in ("planted-10k", "planted-100k", "planted-1m"))}
COMPARED = [("set", "static"), ("set+auxiliary", "set"), ("set+intermediate", "set"), ("set", "bottleneck")]


def print_summary(rows):
    print(f"\n{'precision at 1 / 3 / 5':18}{'parameters':>12}{'s':>6}"
          + "".join(f"{group:>24}" for group in rows[0]["precision"]))
    by_method = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    for method, runs in by_method.items():
        line = f"{method:18}{runs[0]['parameters']:>12,}{statistics.mean(run['seconds'] for run in runs):>6.0f}"
        for group in runs[0]["precision"]:
            values = [[run["precision"][group][k] for run in runs] for k in "135"]
            line += f"{' / '.join(f'{statistics.mean(value):.3f}' for value in values):>24}"
        print(line)
        if len(runs) > 1:
            line = f"{'  deviation':36}"
            for group in runs[0]["precision"]:
                values = [[run["precision"][group][k] for run in runs] for k in "135"]
                line += f"{' / '.join(f'{statistics.stdev(value):.3f}' for value in values):>24}"
            print(line)


def compared(rows):
    """Return paired differences of precision at 1 over the seeds."""
    found = []
    for a, b in COMPARED:
        for group in rows[0]["precision"]:
            values = [[row["precision"][group]["1"] for row in rows if row["method"] == method] for method in (a, b)]
            pair = paired_comparison(*values)
            found.append({"a": a, "b": b, "labels": group, "difference": pair.difference, "low": pair.low,
                          "high": pair.high, "wins": pair.wins, "n": pair.n})
            print(f"{a} - {b}, P@1, {group}: {pair.difference:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}], "
                  f"{pair.wins} of {pair.n} seeds")
    return found


def precision(given, record):
    experiment, rows = EXPERIMENTS[given.labels], []
    recipe = replace(experiment.recipe, epochs=given.epochs)
    experiment = replace(experiment, recipe=recipe)
    methods = [method for method in experiment.methods if method != "dense" or given.labels == min(EXPERIMENTS)]
    record |= {"labels": given.labels, "data": {"n_train": experiment.points, "n_clusters": experiment.clusters,
                                                "n_features": experiment.features},
               "hidden": experiment.hidden, "recipe": str(replace(recipe, auxiliary=0.0))}
    for seed in range(given.seeds):
        test = extreme_labels.data(experiment, seed)[1]
        print(f"seed {seed}: best possible P@k {best_precision(test)}")
        for method in methods:
            rows.append({"method": method, "seed": seed, **extreme_labels.train(experiment, method, seed)})
            print(f"{method:18}" + json.dumps(rows[-1]["precision"]), flush=True)
        print(f"{rows[-1]['unseen']:.1%} of test labels never seen")
    record["rows"] = rows
    print_summary(rows)
    if given.seeds > 1:
        record["compared"] = compared(rows)


# ---- Memory ----------------------------------------------------------------------------------------------------------

def memory(given, record):
    inputs, labels, fan_in = 768, 1_000_000, 32
    train = make_multilabel(labels, n_train=2 * given.batch, n_test=1, n_features=inputs, n_clusters=1000).train
    small = make_multilabel(5000, n_train=2 * given.batch, n_test=1, n_features=inputs).train
    still, moving = (ExtremeRecipe(epochs=1, batch_size=given.batch, rewire_every=1, rewire_until=until)
                     for until in (0, 1))

    def peak(recipe):
        start = time.perf_counter()
        loss, = fit_extreme(model, train, recipe, seed=0, description=None)
        seconds = time.perf_counter() - start
        return {"bytes": resident("VmHWM") - before, "seconds_per_step": seconds / 2, "loss": loss}

    fit_extreme(ExtremeClassifier(inputs, 5000, fan_in, hidden=inputs), small, moving, seed=0, description=None)
    before = resident("VmRSS")
    model = ExtremeClassifier(inputs, labels, fan_in, hidden=inputs)
    record |= {"inputs": inputs, "labels": labels, "fan_in": fan_in, "batch": given.batch, "resident_before": before,
               "training": peak(still), "training_with_set": peak(moving),
               "computed": {"fan_in": training_bytes(inputs, labels, fan_in), "dense": training_bytes(inputs, labels)}}
    for name in ("training", "training_with_set"):
        found = record[name]
        print(f"{name}: {found['bytes'] / 2**30:.2f} GiB above the data, {found['seconds_per_step']:.1f} s a step")
    computed = {name: f"{size / 2**30:.2f} GiB" for name, size in record["computed"].items()}
    print(f"output layer, its gradient and Adam's moments, computed: {computed}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, choices=list(EXPERIMENTS), default=min(EXPERIMENTS))
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--epochs", type=at_least(1), default=EXPERIMENTS[10_000].recipe.epochs)
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--memory", action="store_true", help="measure memory with a million labels instead")
    parser.add_argument("--batch", type=at_least(1), default=64, help="points in a step, with --memory")
    parser.add_argument("--result", type=Path, help="path of the JSON file")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    record = {"command": command("extreme", argv), "commit": commit(),
              "machine": device_name("cpu" if given.memory else default_device()), "threads": given.threads,
              "versions": versions()}
    (memory if given.memory else precision)(given, record)
    size = "_memory" if given.memory else f"_{given.labels}" * (given.labels != min(EXPERIMENTS))
    written(given.result or MEASURED / f"extreme{size}.json", record)


if __name__ == "__main__":
    main()
