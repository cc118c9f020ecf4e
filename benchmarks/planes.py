"""The time of evaluating a plane of losses, many networks at once, compared with a loop over the points of its grid.

The planes go through three new perceptrons for the digits, with the 360 test images. (Networks with convolutions are
evaluated one by one on a CPU.) The loop mixes the weights of a point, loads them and calls `evaluate`. Both methods run
in one process, in turns; before the timing, their losses must agree. Medians and raw times are written to
benchmarks/results/planes.json. Run it with `python benchmarks/planes.py`; it takes a few minutes, with --quick seconds.
"""

import argparse
from pathlib import Path
from statistics import median

import numpy as np
import torch
from _machine import at_least, timed, written

from permask_core.data import load_dataset
from permask_core.evaluation import connectivity
from permask_core.models import build_model
from permask_core.runs.store import commit, device_name, versions
from permask_core.training import evaluate

RESULT = Path(__file__).parent / "results" / "planes.json"
WIDTHS = (0.25, 0.5, 1, 2)
WANTED = 5  # times as fast


def one_by_one(model, plane, xs, ys, split):
    """Compute the losses of :func:`permask_core.evaluation.connectivity.surface` in a loop."""
    losses = np.empty((len(ys), len(xs)))
    for (row, column), _ in np.ndenumerate(losses):
        model.load_state_dict(plane.state(xs[column], ys[row]))
        losses[row, column] = evaluate(model, split).loss
    return losses


def compare(width, points, rounds, data):
    """Return a row of the result: both methods on one plane, timed in turns."""
    model, *three = (build_model("mlp", data.input_shape, data.classes, width=width, seed=seed) for seed in range(4))
    plane = connectivity.plane_through(*(one.state_dict() for one in three))
    xs, ys = (np.linspace(0, length, points) for length in plane.points.max(0))
    ways = {"at once": lambda: connectivity.surface(model, plane, xs, ys, data.test).losses,
            "loop": lambda: one_by_one(model, plane, xs, ys, data.test)}
    at_once, loop = (way() for way in ways.values())
    error = float(np.abs(at_once / loop - 1).max())
    if not error < 1e-4:
        raise SystemExit(f"mlp x {width}: losses at once are off by {error:.2g} of those one by one")
    seconds = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            seconds[way].append(timed(call, "cpu")[0])
    medians = {way: median(times) for way, times in seconds.items()}
    return {"network": "mlp", "width": width, "parameters": sum(p.numel() for p in model.parameters()),
            "points": len(xs) * len(ys), "images": len(data.test), "error": error, "seconds": seconds,
            "median_seconds": medians, "ratio": medians["loop"] / medians["at once"]}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=at_least(1), nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--points", type=at_least(2), default=41, help="along each side of the grid")
    parser.add_argument("--quick", action="store_true", help="a grid of 5 x 5, two rounds")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    points, rounds = (5, 2) if given.quick else (given.points, given.rounds)
    data, rows = load_dataset("digits"), []
    for threads in given.threads:
        torch.set_num_threads(threads)
        for width in WIDTHS:
            row = {"threads": threads, **compare(width, points, rounds, data)}
            rows.append(row)
            fast, slow = (row["median_seconds"][way] for way in ("at once", "loop"))
            print(f"{threads} threads, mlp x {width:<5g} {row['points']:5d} networks: {fast:6.2f} s at once, "
                  f"{slow:6.2f} s one by one, ratio {row['ratio']:.2f} (wanted: {WANTED})", flush=True)
    record = {"command": "python benchmarks/planes.py " + (
        "--quick " if given.quick else f"--rounds {rounds} --points {points} ")
        + f"--threads {' '.join(map(str, given.threads))}", "commit": commit(), "versions": versions(),
              "device": device_name("cpu"), "wanted": WANTED, "rows": rows}
    written(given.result, record)


if __name__ == "__main__":
    main()
