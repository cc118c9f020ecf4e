"""The overhead of a batch job compared with its notebook: starting, checking, renaming and gathering.

The notebook sleeps for a tenth of a second and writes a result. It is executed by papermill directly, as one job, and
by Snakemake as a grid of eight jobs on one core, in turns. Medians and the difference for each job are printed. Raw
times are written to benchmarks/results/batch.json. Run it with `python benchmarks/batch.py`; it takes about three
minutes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import nbformat
from _machine import at_least, timed, written

from permask_core.runs.store import commit, device_name, versions

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "batch.json"
BIN = Path(sys.executable).parent
PARAMETERS = '''seed: int = 0  # of nothing
runs: str = "runs"  # folder of the stages
output: str = ""  # folder of the results'''
WORK = '''import json, pathlib, time
time.sleep(0.1)
if output:
    pathlib.Path(output).mkdir(parents=True)
    pathlib.Path(output, "results.svg").write_text("<svg/>")
    pathlib.Path(output, "results.json").write_text(json.dumps({
        "runs": [{"seed": seed}], "settings": {}, "commit": "none", "device": "none", "versions": {}}))'''


def prepared(root, jobs):
    """Make a copy of batch/ with one notebook and a grid of ``jobs`` jobs."""
    shutil.copytree(ROOT / "batch", root / "batch")
    (root / "permask_core").symlink_to(ROOT / "permask_core")
    (root / "notebooks").mkdir()
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters", "check"]}),
             nbformat.v4.new_code_cell(WORK)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
        "display_name": "Python 3", "language": "python", "name": "python3"}})
    nbformat.write(notebook, root / "notebooks" / "idle.ipynb")
    (root / "grid.yaml").write_text(json.dumps({"notebook": "idle", "cross": {"seed": list(range(jobs))}}))
    one = {"name": "idle_seed-0", "notebook": "idle", "parameters": {"seed": 0}, "resources": {"threads": 1, "gpus": 0}}
    (root / "jobs.json").write_text(json.dumps([one]))  # in the format of batch.grids.freeze


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--jobs", type=at_least(1), default=8)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepared(root, given.jobs)

        def run(*command):
            done = subprocess.run([str(word) for word in command], cwd=root, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr

        ways = {
            "notebook": lambda: run(BIN / "papermill", "notebooks/idle.ipynb", "out.ipynb"),
            "job": lambda: run(sys.executable, "-m", "batch.job", "jobs.json", "idle_seed-0", "job", "--store", "runs"),
            "grid": lambda: run(BIN / "snakemake", "-s", "batch/Snakefile", "--cores", 1, "--config", "grid=grid.yaml",
                                f"output={root / 'grid'}"),
            "nothing to do": lambda: run(BIN / "snakemake", "-s", "batch/Snakefile", "--cores", 1, "--config",
                                         "grid=grid.yaml", f"output={root / 'grid'}")}
        seconds = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name in ("job", "grid"):
                shutil.rmtree(root / name, ignore_errors=True)
            for name, way in ways.items():
                seconds[name].append(timed(way, "cpu")[0])
    middle = {name: median(found) for name, found in seconds.items()}
    over = {"a job over its notebook": middle["job"] - middle["notebook"],
            "a job of a grid over its notebook": (middle["grid"] - middle["nothing to do"]) / given.jobs
            - middle["notebook"], "a grid, once": middle["nothing to do"]}
    for name, value in over.items():
        print(f"{name}: {value:.2f} s, {value / 60:.1%} of a minute")
    record = {"command": "python benchmarks/batch.py", "commit": commit(), "versions": versions(),
              "device": device_name("cpu"), "jobs": given.jobs, "seconds": seconds, "over": over}
    written(given.result, record)


if __name__ == "__main__":
    main()
