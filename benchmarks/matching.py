"""How long the parts of the digits experiment take: tracing, matching, permuting, beside one training run.

Prints medians over repeats and their ratio to one dense training run, and leaves all times in results/matching.json.
The parts take turns, so that a machine that slows down slows them all. Run it with `python benchmarks/matching.py`;
it asserts nothing.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from permask_core import lottery
from permask_core.data import load_dataset
from permask_core.files import written_whole
from permask_core.matching import match_activations, match_weights, permutation_groups, permute
from permask_core.pruning import iterative_magnitude_pruning
from permask_core.store import versions
from permask_core.training import fit

EXPERIMENT = lottery.Experiment()  # the book's settings
TRAINING = "one dense training run"


def parts():
    """The parts by name, each a function that does it once."""
    data = load_dataset(EXPERIMENT.dataset)
    dense = EXPERIMENT.recipe(EXPERIMENT.epochs, EXPERIMENT.lr)
    again = EXPERIMENT.recipe(EXPERIMENT.imp_epochs, EXPERIMENT.imp_lr)

    def train(state=None, masks=None, recipe=dense, seed=0):
        model = lottery.network(EXPERIMENT, state, seed=seed)
        fit(model, data.train, recipe, seed=seed, masks=masks, device="cpu")
        return model

    start, a, b = lottery.network(EXPERIMENT).state_dict(), train(), train(seed=1)
    groups = permutation_groups(a, data.train.x[:2])
    permutations = match_weights(groups, a.state_dict(), b.state_dict())
    batches = data.train.x.split(1000)

    def imp_round():
        """Prune a fifth, train, and prune to 30 %: exactly one training."""
        return list(iterative_magnitude_pruning(lambda state, masks: train(state, masks, again).state_dict(),
                                                a.state_dict(), [0.3], rewind=start))

    return {
        "tracing the groups": lambda: permutation_groups(a, data.train.x[:2]),
        "weight matching, all layers": lambda: match_weights(groups, a.state_dict(), b.state_dict()),
        "activation matching, all layers": lambda: match_activations(groups, a, b, batches),
        "permuting a network": lambda: permute(groups, permutations, a.state_dict()),
        TRAINING: train,
        "one round of iterative pruning": imp_round,
    }


def measured(parts, repeats):
    """Seconds of each part, [repeats] by name; one part after the other, repeat by repeat."""
    seconds = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="how often each part runs")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    seconds = measured(parts(), repeats)
    unit = statistics.median(seconds[TRAINING])
    print(f"n = {repeats} repeats, one CPU thread ({platform.machine()})")
    print(lottery.settings_text(EXPERIMENT))
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"\n{'part':34}{'median':>12}{'fastest':>12}{'slowest':>12}{'share of training':>20}")
    for name, times in seconds.items():
        median, low, high = (f"{1000 * value:.1f} ms" for value in (statistics.median(times), min(times), max(times)))
        print(f"{name:34}{median:>12}{low:>12}{high:>12}{statistics.median(times) / unit:>20.3f}")
    slowest = max(max(times) for name, times in seconds.items() if "matching" in name)
    print(f"\nMatching all layers took {slowest:.3f} s at the slowest.")
    record = {"command": f"python benchmarks/matching.py --repeats {repeats}", "machine": platform.machine(),
              "threads": 1, "versions": versions(), "settings": lottery.settings_text(EXPERIMENT), "seconds": seconds}
    with written_whole(Path(__file__).parent / "results" / "matching.json") as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
