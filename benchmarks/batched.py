"""Images per second x networks in batched training, compared with a plain loop that trains one network after the other.

The plain loop is that of benchmarks/training.py: CIFAR-sized images one by one through PIL and torchvision's crops and
mirror images, in a DataLoader (with pinned memory and eight persistent workers on a GPU), with the batches, precision
and optimizer of fit. It trains one network; k networks one after the other take k times as long. It is compared with
`fit_batched` for k networks with different seeds, with each backend, plain and compiled, and with `fit`. A failure is
reported and does not stop the other measurements.

A run is one epoch of each network. The sides take turns; ratios are of medians. Run it with
`python benchmarks/batched.py`: on a GPU if there is one, in float32 and bf16, after a warm-up turn, with results in
results/batched_cuda.json, in about ten minutes (three with --networks 12); otherwise on the CPU, on one thread, with
results in results/batched.json. It asserts nothing.
"""

import argparse
import os
import statistics
from pathlib import Path

import torch
from _machine import at_least, command, timed, written
from training import plain_loader, plain_loop, random_split

from permask_core.data import load_dataset
from permask_core.models import build_model
from permask_core.runs.processes import default_device
from permask_core.runs.store import commit, device_name, versions
from permask_core.training.batched import backends, fastest, fit_batched
from permask_core.training.loop import fit
from permask_core.training.recipe import PRECISIONS, Recipe
from permask_core.training.streams import as_split

# Network, width and images of an epoch: those of the experiments on each device.
NETWORKS = {"cuda": [("resnet20", 1, 25_600), ("resnet20", 4, 12_800)],
            "cpu": [("mlp", 0.25, 2560), ("mlp", 1, 2560), ("mlp", 4, 2560), ("resnet8 on digits", 0.5, 1280),
                    ("resnet8", 1, 256), ("resnet20", 1, 256)]}


def inputs(network, n):
    """Return random images of CIFAR's size, or of the size of the digits for networks that are trained on digits."""
    if network == "mlp" or network.endswith("digits"):
        data = load_dataset("digits", channels=3 if network.endswith("digits") else 1)
        chosen = torch.arange(n) % len(data.train)
        return (data.train.x[chosen], data.train.y[chosen]), data.input_shape
    return random_split(n), (3, 32, 32)


def sides(network, width, n, k, recipe, readers, device):
    """Return the ways to train k networks for an epoch: by name, a function that does it once, and its networks."""
    split, shape = inputs(network, n)

    def made(count):
        return [build_model(network.split()[0], shape, 10, width=width, seed=seed) for seed in range(count)]

    def together(backend, compiled):
        models = made(k)
        return lambda: fit_batched(models, split, recipe, seeds=range(k), backend=backend, compiled=compiled,
                                   device=device, description=None)

    on_gpu, known = device.type == "cuda", backends(made(1)[0])[:-1]
    split = split.to(device) if on_gpu else split
    single, = made(1)
    found = {"fit": (1, lambda: fit(single, split, recipe, seed=0, device=device, description=None))}
    if shape[-1] == 32:
        theirs, loader = *made(1), plain_loader(random_split(n), recipe.batch_size, readers, device)
        found = {"plain loop": (1, lambda: plain_loop(theirs, loader, recipe, device))} | found
    for backend in known:
        for compiled in ([False, True] if on_gpu else [False]):
            found[backend + " compiled" * compiled] = k, together(backend, compiled)
    return found, fastest(made(2), as_split(split), device)




def compared(every, n, rounds, device):
    """Return the seconds of every run, images per second x networks, and failures."""
    failed, seconds = {}, {side: [] for side in every}
    for turn in range(rounds + 1):  # the first turn loads and compiles kernels and starts workers
        for side, (_, run) in every.items():
            if side not in failed:
                try:
                    spent = timed(run, device)[0]
                except Exception as error:  # compilers and devices raise various exceptions
                    failed[side] = f"{type(error).__name__}: {error}"[:500]
                    continue
                if turn:
                    seconds[side].append(spent)
    speeds = {side: every[side][0] * n / statistics.median(times) for side, times in seconds.items()
              if side not in failed}
    return {"images": n, "seconds": seconds, "images_per_second": speeds, "failed": failed}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=3, help="how often each side is timed")
    parser.add_argument("--networks", type=at_least(1), nargs="+", default=[4, 12, 24], help="networks at once")
    parser.add_argument("--readers", type=at_least(0), help="the DataLoader's workers; by default 0, 8 with a GPU")
    parser.add_argument("--device", choices=list(NETWORKS), default=torch.device(default_device()).type)
    parser.add_argument("--quick", action="store_true", help="two batches of 2, to check that everything runs")
    parser.add_argument("--result", type=Path, help="path of the JSON file")
    given = parser.parse_args(argv)
    device, on_gpu = torch.device(given.device), given.device == "cuda"
    readers = (min(8, os.cpu_count()) if on_gpu else 0) if given.readers is None else given.readers
    torch.set_num_threads(1)
    record = {"command": command("batched", argv), "commit": commit(),
              "device": device_name(device), "machine": device_name("cpu"), "readers": readers, "rounds": given.rounds,
              "versions": versions(), "rows": []}
    print(", ".join(f"{name} {record[name]}" for name in list(record)[:-2]), flush=True)
    for network, width, n in NETWORKS[given.device]:
        n, batch_size = (4, 2) if given.quick else (n, 128)
        for precision in PRECISIONS if on_gpu else ["float32"]:
            # A small learning rate, because labels are random.
            recipe = Recipe(1, lr=0.01, batch_size=batch_size, precision=precision)
            for k in given.networks:
                every, chosen = sides(network, width, n, k, recipe, readers, device)
                row = {"network": network, "width": width, "precision": precision, "networks": k, "chosen": chosen,
                       "batch_size": batch_size, **compared(every, n, given.rounds, device)}
                record["rows"].append(row)
                speeds = row["images_per_second"]
                base = next(iter(speeds))
                print(f"{network} x {width:g}, {precision}, {k} networks, by default {chosen}: " + ", ".join(
                    f"{side} {speed:,.0f}" + (f" ({speed / speeds[base]:.2f} x {base})" if side != base else "")
                    for side, speed in speeds.items()), *(f"\n  {side} failed: {why}" for side, why
                                                          in row["failed"].items()), flush=True)
    name = f"batched{'_cuda' if on_gpu else ''}.json"
    written(given.result or Path(__file__).parent / "results" / name, record)


if __name__ == "__main__":
    main()
