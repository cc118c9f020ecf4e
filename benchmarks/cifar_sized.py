"""The permuted-mask experiment at CIFAR's size: ResNet20 on 50,000 + 10,000 Trifeature images in 100 classes.

It is the preset `trifeature-resnet20`: pairs of networks, tickets by rewinding, masks permuted by matched activations,
four methods at two sparsities and two rewind points. Up to --batched networks of all seeds and methods are trained at
once (permask_core.training.batched). Every stage is stored, and a training is saved every minute; after --minutes the
script ends with status 1, and the same command continues. The results, with the time of all pieces, are written to
permask_core/data/measured/cifar_sized.json.

Run it with `python benchmarks/cifar_sized.py` on a GPU. `--widths 4 --seeds 1`, `--sparsities`, `--rewinds` and
`--matchings` add runs; stored stages are not trained again. `--quick` uses a hundredth of the images, two epochs and
one pair, and takes a minute on a CPU; its accuracies are meaningless.
"""

import argparse
import json
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from _machine import at_least, command, written

import permask_core
from permask_core.experiments import permuted_masks
from permask_core.runs.processes import default_device
from permask_core.runs.store import Store, commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "cifar_sized.json"
QUICK = {"epochs": 2, "imp_epochs": 1, "options": {"n_train": 500, "n_test": 100}}


@contextmanager
def piece(store, minutes):
    """Measure a piece of the work, store its time next to the stages, and stop it after ``minutes``."""
    path, start = store.folder / "pieces.json", time.perf_counter()
    pieces = json.loads(path.read_text()) if path.exists() else []

    def end(*_):
        raise SystemExit(f"stopped after {minutes:g} minutes: the same command continues from here")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield pieces
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        pieces.append({"seconds": round(time.perf_counter() - start, 1), "commit": commit(),
                       "device": device_name(default_device())})
        written(path, pieces)


def choose(given):
    """Return the preset with the requested changes, and its grid."""
    grid = permuted_masks.PRESETS["trifeature-resnet20"].change_grid(
        widths=given.widths, rewinds=given.rewinds, matchings=given.matchings, seeds=1 if given.quick else given.seeds,
        sparsities=[0.9] if given.quick else given.sparsities)
    changes = {"epochs": given.epochs, "precision": given.precision} | (QUICK if given.quick else {})
    return permuted_masks.preset("trifeature-resnet20", rewinds=grid["rewinds"], width=grid["widths"][0],
                                 **changes), grid


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--widths", type=float, nargs="+", help="by default 1")
    parser.add_argument("--seeds", type=at_least(1), help="pairs of networks, by default 3")
    parser.add_argument("--sparsities", type=float, nargs="+", help="by default 0.9 and 0.97")
    parser.add_argument("--rewinds", type=int, nargs="+", help="epochs, by default 0 and 1")
    parser.add_argument("--matchings", nargs="+", help="by default activations")
    parser.add_argument("--epochs", type=at_least(2), help="of dense training, by default 10")
    parser.add_argument("--precision", default="bf16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--batched", type=at_least(1), default=48, help="maximum number of networks trained at once")
    parser.add_argument("--minutes", type=float, default=9, help="time limit, after which it can be run again")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the images, to check that it runs")
    parser.add_argument("--runs", default="build/cifar_sized", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    (base, grid), store = choose(given), Store(given.runs)
    with piece(store, given.minutes) as pieces:
        rows = permuted_masks.run(permuted_masks.vary(base, grid["widths"], grid["rewinds"]), store,
                                  seeds=range(grid["seeds"]), sparsities=grid["sparsities"],
                                  matchings=grid["matchings"], batched=given.batched)
    seconds = sum(one["seconds"] for one in pieces)
    images = base.options["n_train"]
    epochs = sum(sum(cost[kind] for kind in ("dense", "pruning", "sparse"))
                 for cost in permuted_masks.training_cost(base, grid, images, dict.fromkeys(grid["widths"], 1.0)))
    written(given.result, {
        "command": command("cifar_sized", argv), "commit": commit(),
        "versions": versions(), "device": device_name(default_device()), "machine": device_name("cpu"),
        "settings": str(base), "batched": given.batched, "pieces": pieces,
        "seconds": seconds, "epochs": epochs, "images": images, "rows": rows})
    print(f"{len(rows)} runs in {given.result}: {epochs} epochs of {images:,} images in {seconds / 60:.1f} minutes, "
          f"{epochs * images / seconds:,.0f} images a second")


if __name__ == "__main__":
    main()
