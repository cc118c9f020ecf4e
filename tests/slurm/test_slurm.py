"""A grid on a real SLURM: ``cluster.sh`` starts one of a single node, and Snakemake's plugin gives it the jobs.

The grid runs a notebook of a few lines, in a copy of ``batch`` in a folder whose name has a space. SLURM itself is
asked what it ran. Without SLURM these tests are skipped with the reason; PERMASK_REQUIRE_SLURM=1, which continuous
integration sets, makes that an error.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from permask_core.runs.tables import read_table

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
MISSING = 77  # the status of cluster.sh where there is no SLURM

PARAMETERS = """\
case: str = "short"  # what happens: "short", "failing" or "preempted"
runs: str = "runs"  # folder that the jobs share
output: str = ""  # folder of the results
"""
CODE = """\
import json
import os
import subprocess
import time
from pathlib import Path

begun = Path(runs, case)
if case == "failing":
    raise ValueError("planted")
if case == "preempted" and not begun.exists():
    begun.mkdir(parents=True)
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    time.sleep(600)
row = {"case": case, "id": os.environ["SLURM_JOB_ID"], "cpus": os.environ["OMP_NUM_THREADS"], "again": begun.exists()}
Path(output).mkdir()
Path(output, "results.svg").write_text("<svg/>")
Path(output, "results.json").write_text(json.dumps({
    "runs": [row], "settings": {}, "commit": "", "device": "", "versions": {}}))
"""
GRID = [
    {"notebook": "tiny", "cross": {"case": ["failing", "preempted"]}, "resources": {"mem_mb": 1500, "runtime": 7}},
    {"notebook": "tiny", "cross": {"case": ["short"]}, "resources": {"threads": 2, "gpus": 1, "runtime": 90}},
]
FINISHED = ["tiny_case-preempted", "tiny_case-short"]


@pytest.fixture(scope="module")
def cluster():
    """The environment in which SLURM's commands mean the cluster. It ends with its standard input: no later than
    this process."""
    command = [CLUSTER, "sh", "-c", 'printf "%s\\n" "$SLURM_CONF" "$PATH"; exec cat']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as running:
        settings, path = running.stdout.readline().strip(), running.stdout.readline().strip()
        if not path:
            reason = running.stderr.read()
            missing = running.wait() == MISSING and os.environ.get("PERMASK_REQUIRE_SLURM") != "1"
            (pytest.skip if missing else pytest.fail)(reason)
        yield {**os.environ, "SLURM_CONF": settings, "PATH": path}
        _, told = running.communicate()
    assert running.returncode == 0, told
    assert not Path(settings).parent.exists()


@pytest.fixture(scope="module")
def batch(cluster, tmp_path_factory):
    """The grid, run to its end: what Snakemake said, its ``folder`` of results, and a function that calls it again."""
    root = tmp_path_factory.mktemp("batch") / "a book"
    shutil.copytree(ROOT / "batch", root / "batch", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "permask_core").symlink_to(ROOT / "permask_core")
    (root / "notebooks").mkdir()
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(CODE)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), root / "notebooks" / "tiny.ipynb")
    (root / "small grid.yaml").write_text(yaml.safe_dump(GRID))

    folder, snakefile = root / "all results", root / "batch" / "Snakefile"
    settings = [f"grid={root / 'small grid.yaml'}", f"output={folder}", f"store={root / 'runs'}"]

    def call(*targets):
        command = [sys.executable, "-m", "snakemake", *targets, "-s", snakefile, "--workflow-profile", "slurm",
                   "--slurm-init-seconds-before-status-checks", "3", "--config", *settings]
        return subprocess.run(command, cwd=root, env=cluster, capture_output=True, text=True, timeout=600)

    return SimpleNamespace(ended=call(), call=call, folder=folder)


def known_jobs(cluster):
    """What SLURM knows about its jobs, by the name that a job has in the grid."""
    told = subprocess.check_output(["scontrol", "show", "job", "--oneliner"], env=cluster, text=True)
    jobs = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in told.splitlines()]
    return {job["Comment"].removeprefix("rule_job_wildcards_"): job for job in jobs}


def table(batch):
    return {row["job"]: row for row in read_table(batch.folder / "tables" / "tiny.csv")}


def test_jobs_run_in_slurm_and_end_up_in_the_table(cluster, batch):
    rows, jobs = table(batch), known_jobs(cluster)
    assert sorted(rows) == FINISHED, batch.ended.stderr
    assert {name: row["id"] for name, row in rows.items()} == {name: jobs[name]["JobId"] for name in FINISHED}
    assert [rows[name]["case"] for name in FINISHED] == ["preempted", "short"]


def test_slurm_is_asked_for_what_the_grid_says(cluster, batch):
    rows, jobs = table(batch), known_jobs(cluster)
    asked = {name: (job["NumCPUs"], job["MinMemoryNode"], job["TimeLimit"], job.get("TresPerJob"))
             for name, job in jobs.items()}
    assert asked == {"tiny_case-failing": ("1", "1500M", "00:07:00", None),
                     "tiny_case-preempted": ("1", "1500M", "00:07:00", None),
                     "tiny_case-short": ("2", "4000M", "01:30:00", "gres:gpu:1")}
    assert [rows[name]["cpus"] for name in FINISHED] == ["1", "2"]


def test_a_job_that_fails_leaves_its_notebook_and_stops_no_other(cluster, batch):
    jobs = known_jobs(cluster)
    assert batch.ended.returncode == 1
    assert {name: job["JobState"] for name, job in jobs.items()} == {
        "tiny_case-failing": "FAILED", "tiny_case-preempted": "COMPLETED", "tiny_case-short": "COMPLETED"}
    assert '"evalue": "planted"' in (batch.folder / "failed" / "tiny_case-failing.ipynb").read_text()
    for kind, ending in (("jobs", "json"), ("notebooks", "ipynb")):
        assert sorted(path.stem for path in (batch.folder / kind).glob(f"*.{ending}")) == FINISHED


def test_a_job_that_is_preempted_is_queued_again_and_finishes(cluster, batch):
    rows, jobs = table(batch), known_jobs(cluster)
    assert {name: job["Restarts"] for name, job in jobs.items()} == {
        "tiny_case-failing": "0", "tiny_case-preempted": "1", "tiny_case-short": "0"}
    assert [rows[name]["again"] for name in FINISHED] == [True, False]


def test_a_second_call_does_nothing(cluster, batch):
    before, text = known_jobs(cluster), (batch.folder / "tables" / "tiny.csv").read_bytes()
    again = batch.call(*(batch.folder / "jobs" / f"{name}.json" for name in FINISHED))
    assert again.returncode == 0 and "Nothing to be done" in again.stderr, again.stderr
    assert known_jobs(cluster) == before and (batch.folder / "tables" / "tiny.csv").read_bytes() == text
