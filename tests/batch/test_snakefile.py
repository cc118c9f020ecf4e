"""The whole of a batch: refused grids, dry runs, runs that are killed, and the smallest grid of the book."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from permask_core.runs.tables import read_table
from tests.batch.kill import ROOT, compare, cut, kill, started
from tests.batch.tiny import WORK, write_grid, write_notebook
from tests.data.files import require_fashion_mnist
from tests.hypotheses import LONG

STUCK = '''import pathlib, time
begun = pathlib.Path(runs, "begun")
if value == 2 and not begun.exists():
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.touch()
    time.sleep(600)
'''


def snakemake(folder, *arguments, root=ROOT, env=None):
    return subprocess.run([Path(sys.executable).parent / "snakemake", "-s", root / "batch" / "Snakefile", *arguments],
                          cwd=folder, capture_output=True, text=True, env=env)


@pytest.fixture
def place(tmp_path):
    """A repository with the batch, a notebook of a moment, of which value 2 gets stuck the first time, and a grid."""
    shutil.copytree(ROOT / "batch", tmp_path / "batch", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "permask_core").symlink_to(ROOT / "permask_core")
    write_notebook(tmp_path, work=STUCK + WORK)
    return tmp_path, write_grid(tmp_path / "grid.yaml", {"notebook": "tiny", "cross": {"value": [1, 2]}})


def test_a_grid_with_faults_is_refused_with_all_of_them(place):
    root, grid = place
    write_grid(grid, {"notebook": "tiny", "fixed": {"rat": 1, "fail": "no"}, "cross": {"value": [1, -1]}})
    done = snakemake(root, "--config", f"grid={grid}", f"output={root / 'out'}", root=root)
    assert done.returncode == 1 and not (root / "out").exists()
    for fault in ("'rat', perhaps 'rate'", "fail is 'no', a str", "value is -1: expected at least 0"):
        assert fault in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("given, said", [
    (["grid=smoke", "seeds=3", "ouput=x"], [
        "--config has 'seeds': expected grid, output, store; parameters of notebooks are in",
        "--config has 'ouput', perhaps 'output': expected"]),
    (["grid=3"], ["--config has grid=3, a int: expected the name of a file or folder"]),
])
def test_entries_of_the_command_line_that_mean_nothing_are_refused(tmp_path, given, said):
    done = snakemake(tmp_path, "--config", *given)
    assert done.returncode == 1 and all(one in done.stderr for one in said) and "Traceback" not in done.stderr


DISTURBING = WORK + """
(pathlib.Path(runs).parent / "grid.yaml").write_text("notebook: tiny\\ncross: {value: [7]}\\n")
other = pathlib.Path(output).parents[2] / ".." / "jobs" / f"tiny_value-{3 - value}.json"
if other.exists():  # the second job does what another batch would, with other parameters of the same names
    other.write_text("{}")
"""


def test_an_edit_of_the_grid_while_it_runs_changes_nothing_and_missing_jobs_at_the_end_are_an_error(place):
    root, grid = place
    write_notebook(root, work=DISTURBING)
    settings = "--config", f"grid={grid}", f"output={root / 'out'}", f"store={root / 'store'}"
    done = snakemake(root, "--cores", "1", *settings, root=root)
    assert done.returncode != 0 and "1 of 2 jobs are missing: tiny_value-" in done.stderr, done.stderr[-2000:]
    assert "1 of 2 jobs are finished" in done.stdout and "value: [7]" in grid.read_text()
    found = [row["value"] for row in read_table(root / "out" / "tables" / "tiny.csv")]
    assert found in ([1, 1], [2, 2]) and f"missing: tiny_value-{3 - found[0]}" in done.stderr


def test_a_dry_run_lists_the_jobs_and_touches_nothing_and_a_result_of_other_parameters_is_put_aside(place):
    root, grid = place
    result = root / "out" / "jobs" / "tiny_value-1.json"
    result.parent.mkdir(parents=True)
    result.write_text('{"parameters": {"of": "another grid"}}')
    settings = "--config", f"grid={grid}", f"output={root / 'out'}"
    done = snakemake(root, "-pn", *settings, root=root)
    assert done.returncode == 0 and "to run    tiny_value-1, at most 60 minutes" in done.stderr
    assert "2 jobs, 0 of them finished; the rest take at most 2 hours" in done.stderr
    assert list((root / "out").rglob("*.*")) == [result]
    snakemake(root, "--until", "nothing", *settings, root=root)
    assert not result.exists() and "another grid" in result.with_suffix(".old").read_text()


CHECKED_ONCE = "import os\nif os.environ.get('CHECKED'):\n    raise ValueError('checked again')"


def test_a_killed_grid_goes_on_and_what_is_cut_off_is_made_again(place):
    """And only what is not finished is checked again, which takes most of the time of a dry run."""
    root, grid = place
    write_notebook(root, check=CHECKED_ONCE, work=STUCK + WORK)
    first, second = (root / "grid" / "jobs" / f"tiny_value-{value}.json" for value in (1, 2))

    def stuck():
        return first.exists() and (root / "store" / "begun").exists()

    process = started(grid, root, root, ["--cores", "2"])
    end = time.monotonic() + 300
    while not stuck() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    kill(process)
    assert stuck() and not second.exists() and not (root / "grid" / "tables" / "tiny.csv").exists()

    before = first.stat().st_mtime_ns
    process = started(grid, root, root)
    assert process.wait() == 0, (root / "log.txt").read_text()
    assert first.stat().st_mtime_ns == before and (root / "store" / "log").read_text().split() == ["1", "2"]
    rows = read_table(root / "grid" / "tables" / "tiny.csv")
    assert [(row["job"], row["value"], row["seed"]) for row in rows] == [
        (f"tiny_value-{value}", value, seed) for value in (1, 2) for seed in (0, 1)]

    def dry():
        return snakemake(root, "--dry-run", "--config", f"grid={grid}", f"output={root / 'grid'}",
                         f"store={root / 'store'}", root=root, env=os.environ | {"CHECKED": "1"})

    files, done = sorted((root / "grid").rglob("*")), dry()
    assert done.returncode == 0 and "2 jobs, 2 of them finished" in done.stderr
    assert sorted((root / "grid").rglob("*")) == files
    table, other = (root / "grid" / "tables" / "tiny.csv").read_bytes(), second.stat().st_mtime_ns
    cut(first)
    done = dry()
    assert done.returncode == 1 and "checked again" in done.stdout + done.stderr
    process = started(grid, root, root)
    assert process.wait() == 0, (root / "log.txt").read_text()
    assert second.stat().st_mtime_ns == other and (root / "grid" / "tables" / "tiny.csv").read_bytes() == table
    assert (root / "store" / "log").read_text().split() == ["1", "2", "1"]


def test_a_tiny_grid_on_real_images(tmp_path):
    """A pair of small perceptrons on a sixtieth of the images of Fashion-MNIST; test_every.py has all notebooks."""
    require_fashion_mnist()
    grid = write_grid(tmp_path / "grid.yaml", {"notebook": "fashion_mnist", "fixed": {
        "preset": "fashion_mnist-mlp", "options": {"n_train": 1000, "n_test": 1000}, "widths": [0.25],
        "sparsities": [0.5], "matchings": ["weights"], "seeds": 1, "workers": 1}, "cross": {"first_seed": [5]}})
    done = snakemake(tmp_path, "--cores", "2", "--config", f"grid={grid}", f"output={tmp_path / 'out'}",
                     f"store={tmp_path / 'store'}")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_table(tmp_path / "out" / "tables" / "fashion_mnist.csv")
    assert {(row["method"], row["seed"]) for row in rows} == {
        (method, 5) for method in ("dense", "lth", "permuted", "naive", "random")}
    assert len({row["data"] for row in rows}) == 1
    assert all(row["accuracy"] > 0.4 for row in rows if row["method"] == "dense")  # of ten classes


@pytest.mark.skipif(not LONG, reason="fashion_mnist is such a job, too: make test-long")
def test_a_job_of_a_notebook_of_the_book(tmp_path):
    """Of the grid `smoke`; that jobs at once share what they have in common is in tests/runs/test_store.py."""
    name = "cifar_first_seed-0_sparsities-0.5"
    done = snakemake(tmp_path, tmp_path / "grid" / "jobs" / f"{name}.json", "--config", "grid=smoke",
                     f"output={tmp_path / 'grid'}", f"store={tmp_path / 'store'}")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_table(tmp_path / "grid" / "tables" / "cifar.csv")
    assert [row["method"] for row in rows] == ["dense", "lth", "permuted", "naive", "random"]
    assert all(row["job"] == name and row["epochs"] == 3 and len(row["data"]) == 16 for row in rows)
    assert len(list((tmp_path / "store" / "dense").glob("*.safetensors"))) == 2  # A and B


@pytest.mark.skipif(not LONG, reason="takes minutes: make test-long")
def test_a_grid_killed_three_times_gives_the_same_table(tmp_path):
    compare("smoke", tmp_path, 3)
    assert "Nothing to be done" in snakemake(
        tmp_path, "--config", "grid=smoke", f"output={tmp_path / 'disturbed' / 'grid'}").stderr
