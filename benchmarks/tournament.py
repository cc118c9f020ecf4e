"""The tournament of alignments: a choice among all candidates, then the finalists on other networks.

Candidates were added, and their settings chosen, on the block of the choice. The rules of the final were fixed before
it ran; some widths and sparsities were then left out for time, before any of its results was read. All candidates are
tried on block 0 (seeds 0 to 3) of three networks at 97 %. The five candidates that close the largest mean share of the
gap between the naive mask and B's own ticket are the finalists; controls and oracles are not candidates for this. The
finalists, the two plain matchings, the controls and the oracles are then run on other blocks, at other sparsities and
widths, and on real images. Results are written to permask_core/data/measured/tournament, one file for each part. An
interrupted run continues from its stored stages. Run it with `python benchmarks/tournament.py choice`, and then with
the other parts; an AMD Zen 3 needs about half an hour of one core for the choice, the same for the perceptrons, and two
hours for each of the other parts.
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from _machine import written

import permask_core
from permask_core.experiments import permuted_masks, tournament
from permask_core.runs.store import Store, commit, versions

RESULTS = Path(permask_core.__file__).parent / "data" / "measured" / "tournament"
FINALISTS = 5
ALWAYS = ("weights", "activations")
# For each part: networks as (preset, changes, widths), blocks and sparsities.
PARTS = {
    "choice": ([("noisy-digits-mlp", {}, (0.5, 1.0)), ("digits", {}, (0.5,))], [0], [0.97]),
    "perceptron": ([("noisy-digits-mlp", {}, (0.25, 0.5, 1.0))], range(1, 6), [0.9, 0.97, 0.985]),
    "resnet8": ([("digits", {}, (0.5, 1.0))], range(1, 6), [0.97, 0.985]),
    "lenet5": ([("fashion_mnist-lenet5", {"options": {"size": 32, "n_train": 10_000}}, (1.0,))], range(1, 6),
               [0.9, 0.97]),
}
QUICK = {"epochs": 2, "checkpoints": (0, 1, 2), "rewind": 1, "matched_at": 2, "imp_rewind": 1, "imp_epochs": 1}


def shares(rows):
    """Return the share of the gap that each candidate closes on average over networks: a ratio of mean accuracies for
    each network, width and sparsity, then the mean of these."""
    means = pd.DataFrame(rows).groupby(["network", "width", "sparsity", "method"])["accuracy"].mean().unstack()
    gap = means["own ticket"] - means["naive"]
    return means.sub(means["naive"], axis=0).div(gap, axis=0).mean()


def finalists(rows):
    """Return the names of the best candidates, the best first."""
    kinds = {row["method"]: row["kind"] for row in rows}
    ranked = shares(rows).sort_values(ascending=False, kind="stable")
    return [name for name in ranked.index if kinds[name] not in ("control", "oracle")][:FINALISTS]


def chosen(part, results):
    """Return the candidates of a part: all for the choice."""
    if part == "choice":
        return list(tournament.CANDIDATES)
    best = json.loads((results / "choice.json").read_text())["finalists"]
    return [name for name, one in tournament.CANDIDATES.items()
            if name in (*best, *ALWAYS) or one.kind in ("control", "oracle")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--runs", default="build/tournament", help="folder of finished stages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="two epochs and one network, to try the script")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    networks, blocks, sparsities = PARTS[given.part]
    candidates, rows = chosen(given.part, given.results), []
    for name, changes, widths in networks[:1] if given.quick else networks:
        base = permuted_masks.preset(name, **changes, **QUICK if given.quick else {})
        variants = permuted_masks.vary(base, widths[:1] if given.quick else widths, [base.rewind])
        found = tournament.run(variants, Store(given.runs), candidates=candidates, workers=given.workers,
                               blocks=blocks[:2] if given.quick else blocks, sparsities=sparsities[-1:] if given.quick
                               else sparsities)
        rows += [{"network": name, "epochs_of_training": base.epochs, **row} for row in found]
    record = {"command": f"python benchmarks/tournament.py {given.part}", "commit": commit(), "versions": versions(),
              "device": "CPU, one thread a process", "rows": rows}
    if given.part == "choice":
        record["finalists"] = finalists(rows)
        print("finalists:", ", ".join(record["finalists"]))
    written(given.results / f"{given.part}.json", record)
    print(f"{len(rows)} runs in {given.results / given.part}.json")


if __name__ == "__main__":
    main()
