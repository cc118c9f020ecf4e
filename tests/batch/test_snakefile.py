"""The whole of a batch: refused grids, a dry run, and a run that is killed again and again."""

import subprocess
import sys
from pathlib import Path

from tests.batch.kill import ROOT, compare


def snakemake(tmp_path, *arguments):
    return subprocess.run([Path(sys.executable).parent / "snakemake", "-s", ROOT / "batch" / "Snakefile", *arguments],
                          cwd=tmp_path, capture_output=True, text=True)


def test_a_grid_with_faults_is_refused_with_all_of_them(tmp_path):
    grid = ROOT / "tests" / "batch" / "faults.yaml"
    done = snakemake(tmp_path, "--config", f"grid={grid}", f"output={tmp_path / 'out'}")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    for fault in ("'sparsites', perhaps 'sparsities'", "seeds is 'three', a str", "'cifar11': expected one of"):
        assert fault in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_lists_the_jobs_and_runs_nothing(tmp_path):
    done = snakemake(tmp_path, "-n", "--config", "grid=smoke", f"output={tmp_path / 'out'}")
    assert done.returncode == 0 and not (tmp_path / "out").exists()
    assert "to run    cifar_first_seed-1_sparsities-0.8, at most 10 minutes" in done.stderr
    assert "4 jobs, 0 of them finished; the others take at most 40 minutes" in done.stderr


def test_a_dry_run_deletes_nothing_and_a_result_of_other_parameters_is_put_aside(tmp_path):
    result = tmp_path / "out" / "jobs" / "cifar_first_seed-0_sparsities-0.5.json"
    result.parent.mkdir(parents=True)
    result.write_text('{"parameters": {"of": "another grid"}}')
    for dry in ("-n", "-pn", "--dry-run"):
        done = snakemake(tmp_path, dry, "--config", "grid=smoke", f"output={tmp_path / 'out'}")
        assert done.returncode == 0 and "to run    cifar_first_seed-0_sparsities-0.5, at most" in done.stderr
        assert list((tmp_path / "out").rglob("*.*")) == [result]
    snakemake(tmp_path, "--until", "nothing", "--config", "grid=smoke", f"output={tmp_path / 'out'}")
    assert not result.exists() and "another grid" in result.with_suffix(".old").read_text()


def test_without_a_grid_the_grids_are_named(tmp_path):
    done = snakemake(tmp_path, "--config", "grid=''")
    assert done.returncode == 1 and "no grid ''" in done.stderr and "smoke" in done.stderr


def test_a_grid_killed_three_times_gives_the_same_table(tmp_path):
    compare("smoke", tmp_path, 3)
    assert "Nothing to be done" in snakemake(
        tmp_path, "--config", "grid=smoke", f"output={tmp_path / 'disturbed' / 'grid'}").stderr
