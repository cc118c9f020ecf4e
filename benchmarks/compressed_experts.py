"""Pruned and merged experts of a small language model: exact answers of four skills, and the true errors of removals.

Seeds 0 to 4 of a mixture with 4 layers of 16 experts, two for each token, on the language `permask_core.data.skills`;
12, 8 and 4 experts are kept, by every criterion and by merging with and without alignment. The recipe was chosen on
seed 0 by the accuracy of the whole model. A second calibration has no sequence of the rarest skill. Results are written
to permask_core/data/measured/compressed_experts.json. An interrupted run continues from its stored stages. Run it with
`python benchmarks/compressed_experts.py`; it takes about twenty minutes on one core.
"""

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from _machine import at_least, written
from scipy.stats import spearmanr

import permask_core
from permask_core.experiments import compressed_experts
from permask_core.experts import CRITERIA, moe_blocks, saliency
from permask_core.runs.store import Store, commit, device_name, versions

RESULT = Path(permask_core.__file__).parent / "data" / "measured" / "compressed_experts.json"
QUICK = {"options": {"n_train": 1280, "n_test": 80}, "calibration": 64,
         "model_options": {"layers": 1, "experts": 8, "units": 16}}
WITHOUT = ("frequency", "ean", "reap", "reap_sum", "hc_smoe")  # methods that are calibrated without a skill as well


def correlations(chosen, store, seeds):
    """Return a row for each seed, block and criterion: the rank correlation with the errors of removing experts."""
    for seed in seeds:
        model, statistics, _ = compressed_experts.measure_network(chosen, store, seed)
        errors = compressed_experts.removal_errors(model, statistics)
        for criterion in CRITERIA:
            for block, name in enumerate(moe_blocks(model)):
                scores = saliency(statistics, criterion)[name]
                yield {"seed": seed, "block": block, "criterion": criterion,
                       "spearman": round(float(spearmanr(scores, errors[name]).statistic), 4),
                       "unreached": int((statistics[name].counts == 0).sum())}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to check that it runs")
    parser.add_argument("--runs", default="build/compressed_experts", help="folder of finished stages")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = compressed_experts.preset(**(QUICK if given.quick else {}))
    experts, store, seeds = compressed_experts.number_of_experts(chosen), Store(given.runs), range(given.seeds)
    keeps = [experts * part // 4 for part in (3, 2, 1)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no calibration token")  # their number is in the rows
        rows = compressed_experts.run(chosen, store, seeds=seeds, keeps=keeps)
        ranks = [*correlations(chosen, store, seeds)]
        without = compressed_experts.preset(**(QUICK if given.quick else {}), left_out="replace")
        rows += [row for row in compressed_experts.run(without, store, seeds=seeds, keeps=keeps[:2], methods=WITHOUT,
                                                       matchings=[None]) if row["method"] != "dense"]
    seeds_changed = f" --seeds {given.seeds}" * (given.seeds != 5)
    record = {"command": f"python benchmarks/compressed_experts.py{' --quick' * given.quick}{seeds_changed}",
              "commit": commit(), "versions": versions(), "device": f"{device_name('cpu')}, one thread a process",
              "settings": json.loads(json.dumps(asdict(chosen))), "experts": experts,
              "rows": [{key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}
                       for row in rows], "correlations": ranks}
    written(given.result, record, indent=None)
    print(f"{len(rows)} rows in {given.result}")


if __name__ == "__main__":
    main()
