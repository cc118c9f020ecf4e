"""The time of matching: all parts of the digits experiment compared with one training run, then residual networks.

First, on one thread: medians over repeats and their ratio to one dense training run. The parts take turns, so that a
slow-down of the machine affects all of them. Then ResNet20 of four widths and ResNet50: tracing, weight matching of two
new networks and of a network with its permuted copy, permuting, and activation matching. The time of weight matching is
split into stages, and also measured without the cache of similarities. All times are written to results/matching.json.
Run it with `python benchmarks/matching.py`, or with `--device cuda` for the residual networks on a GPU, with results in
results/matching_cuda.json. It asserts nothing.
"""

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from _machine import timed, written

from permask_core.data import load_dataset
from permask_core.experiments import permuted_masks
from permask_core.matching import (
    match_activations,
    match_weights,
    nested,
    permutation_groups,
    permutations,
    permute,
    random_permutations,
    similarity,
    weights,
)
from permask_core.models import build_model
from permask_core.pruning import iterative_magnitude_pruning
from permask_core.runs.store import device_name, versions
from permask_core.training import fit

EXPERIMENT = permuted_masks.Experiment()  # the book's settings
TRAINING = "one dense training run"
NETWORKS = {**{f"resnet20 x {width}": ("resnet20", width, 32) for width in (1, 4, 8, 16)},
            "resnet50": ("resnet50", 1, 64)}  # name, width, side of the images
BATCHES, IMAGES = 2, 16  # of activation matching: number of batches, and images in each
STAGES = {"similarities": [(weights, "_similarity"), (similarity.Similarities, "update")],
          "assignments": [(permutations, "linear_sum_assignment"), (nested, "linear_sum_assignment")],
          "moving": [(weights, "permute_"), (weights, "unpermute_")], "objective": [(weights, "_inner")]}


class Forgetful(similarity.Similarities):
    """Similarities without a cache."""

    def __call__(self, names):
        self.kept.clear()
        return super().__call__(names)


def match_without_keeping(*arguments, **options):
    """:func:`match_weights` without the cache of similarities."""
    with patch.object(weights, "Similarities", Forgetful):
        return match_weights(*arguments, **options)


def digits_parts():
    """Return the parts of the digits experiment by name, each a function that runs once."""
    data = load_dataset(EXPERIMENT.dataset)
    dense = EXPERIMENT.recipe(EXPERIMENT.epochs, EXPERIMENT.lr)
    again = EXPERIMENT.recipe(EXPERIMENT.imp_epochs, EXPERIMENT.imp_lr)

    def train(state=None, masks=None, recipe=dense, seed=0):
        model = permuted_masks.build_network(EXPERIMENT, state, seed=seed)
        fit(model, data.train, recipe, seed=seed, masks=masks, device="cpu")
        return model

    start, a, b = permuted_masks.build_network(EXPERIMENT).state_dict(), train(), train(seed=1)
    groups = permutation_groups(a, data.train.x[:2])
    found = match_weights(groups, a.state_dict(), b.state_dict())
    batches = data.train.x  # in batches of 1000

    def imp_round():
        """Prune a fifth, train, and prune to 30 %, with exactly one training."""
        return list(iterative_magnitude_pruning(lambda state, masks: train(state, masks, again).state_dict(),
                                                a.state_dict(), [0.3], rewind=start))

    return {
        "tracing the groups": lambda: permutation_groups(a, data.train.x[:2]),
        "weight matching, all layers": lambda: match_weights(groups, a.state_dict(), b.state_dict()),
        "the same, nothing kept": lambda: match_without_keeping(groups, a.state_dict(), b.state_dict()),
        "activation matching, all layers": lambda: match_activations(groups, a, b, batches),
        "permuting a network": lambda: permute(groups, found, a.state_dict()),
        TRAINING: train,
        "one round of iterative pruning": imp_round,
    }


def measured(parts, repeats, device="cpu"):
    """Return the seconds of each part, [repeats] by name; the parts take turns in each repeat."""
    seconds = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            seconds[name].append(timed(part, device)[0])
    return seconds


def staged(part, device):
    """Return the seconds in each of :data:`STAGES` during one call of ``part``, and in total."""
    spent = dict.fromkeys(STAGES, 0.0)

    def clocked(stage, function):
        def call(*arguments, **options):
            seconds, result = timed(lambda: function(*arguments, **options), device)
            spent[stage] += seconds
            return result
        return call

    with ExitStack() as stack:
        for stage, places in STAGES.items():
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, clocked(stage, getattr(owner, name))))
        total, _ = timed(part, device)
    return {**spent, "all": total}


def residual(name, width, side, repeats, device):
    """Return the times of one residual network, and the result of its matching."""
    nets = [build_model(name, (3, side, side), 10, width=width, seed=seed) for seed in (0, 1)]
    example = torch.zeros(1, 3, side, side)
    groups = permutation_groups(nets[0], example)
    source, target = (net.state_dict() for net in nets)
    planted = random_permutations(groups, seed=0)
    copy = permute(groups, planted, source)
    batches = list(torch.randn(BATCHES, IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device))
    there = [build_model(name, (3, side, side), 10, width=width, seed=seed).to(device) for seed in (0, 1)]
    pairs = {"two fresh networks": target, "a permuted copy": copy}
    found = {pair: match_weights(groups, source, goal, device=device) for pair, goal in pairs.items()}
    seconds = measured({
        "tracing": lambda: permutation_groups(nets[0], example),
        **{f"weight matching, {pair}": lambda goal=goal: match_weights(groups, source, goal, device=device)
           for pair, goal in pairs.items()},
        **{f"the same, nothing kept, {pair}": lambda goal=goal: match_without_keeping(groups, source, goal,
                                                                                     device=device)
           for pair, goal in pairs.items()},
        "permuting": lambda: permute(groups, planted, source),
        "activation matching": lambda: match_activations(groups, *there, batches)}, repeats, device)
    return {"network": name, "width": width, "side": side, "groups": len(groups),
            "parameters": sum(parameter.numel() for parameter in nets[0].parameters()), "seconds": seconds,
            "sweeps": {pair: len(result.objective) - 1 for pair, result in found.items()},
            "objective": {pair: result.objective for pair, result in found.items()},
            "recovered": all(torch.equal(found["a permuted copy"][group], planted[group]) for group in groups),
            "stages": {pair: staged(lambda goal=goal: match_weights(groups, source, goal, device=device), device)
                       for pair, goal in pairs.items()}}


def print_digits(seconds):
    unit = statistics.median(seconds[TRAINING])
    print(str(EXPERIMENT))
    print(f"\n{'part':34}{'median':>12}{'fastest':>12}{'slowest':>12}{'share of training':>20}")
    for name, times in seconds.items():
        median, low, high = (f"{1000 * value:.1f} ms" for value in (statistics.median(times), min(times), max(times)))
        print(f"{name:34}{median:>12}{low:>12}{high:>12}{statistics.median(times) / unit:>20.3f}")


def print_residual(label, record):
    print(f"\n{label}: {record['parameters']:,} parameters, {record['groups']} groups", flush=True)
    for part, times in record["seconds"].items():
        print(f"    {part:42}{statistics.median(times):8.2f} s  ({min(times):.2f} to {max(times):.2f})")
    for pair, stages in record["stages"].items():
        print(f"    {pair}, {record['sweeps'][pair]} sweeps: "
              + ", ".join(f"{stage} {spent:.2f} s" for stage, spent in stages.items()))
    print(f"    the permuted copy was {'' if record['recovered'] else 'not '}recovered", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="how often each part of the digits runs")
    parser.add_argument("--residual-repeats", type=int, default=5, help="the same for residual networks")
    parser.add_argument("--threads", type=int, default=2, help="for the residual networks")
    parser.add_argument("--device", default="cpu", help="for the residual networks; on a GPU only these are run")
    options = parser.parse_args(argv)
    record = {"command": "python benchmarks/matching.py " + " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in vars(options).items()),
        "device": device_name(options.device), "machine": device_name("cpu"), "threads": options.threads,
        "precision": "float32 products, float64 objective and moments",
        "matmul_precision": torch.get_float32_matmul_precision(), "versions": versions()}
    print(f"{record['device']}, {options.threads} CPU threads, {record['precision']}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    if options.device == "cpu":
        torch.set_num_threads(1)
        print(f"\nThe digits, n = {options.repeats} repeats, one CPU thread")
        record |= {"settings": str(EXPERIMENT),
                   "seconds": measured(digits_parts(), options.repeats)}
        print_digits(record["seconds"])
    torch.set_num_threads(options.threads)
    print(f"\nResidual networks, n = {options.residual_repeats} repeats, medians; activation matching of {BATCHES} x "
          f"{IMAGES} images")
    record |= {"images": [BATCHES, IMAGES], "residual": {}}
    for label, network in NETWORKS.items():
        record["residual"][label] = residual(*network, options.residual_repeats, options.device)
        print_residual(label, record["residual"][label])
    name = "matching.json" if options.device == "cpu" else f"matching_{torch.device(options.device).type}.json"
    written(Path(__file__).parent / "results" / name, record)


if __name__ == "__main__":
    main()
