"""One job: what it leaves when it succeeds, fails or is killed, and what is no longer a result."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from batch import job
from batch.gather import finished, gather, outlook
from batch.grids import ROOT, Job, freeze
from permask_core.runs.tables import read_table
from tests.batch.tiny import WORK, write_notebook

RESOURCES = {"threads": 2, "gpus": 0, "mem_mb": 100, "runtime": 3}


def tiny(name="tiny", notebook="tiny", **parameters):
    return Job(name, notebook, parameters, RESOURCES, parameters)


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_notebook(tmp_path)
    monkeypatch.setattr(job, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    return tmp_path / "grid"


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def runs_of(place):
    return (place.parent / "store" / "log").read_text().split()


def run(one, place):
    return job.run(one, place, place.parent / "store")


def test_a_job_leaves_its_notebook_and_what_it_found_and_is_run_once(place):
    one = tiny(value=3)
    assert run(one, place) and run(one, place)
    assert files(place) == {"notebooks/tiny.ipynb", "figures/tiny.svg", "jobs/tiny.json"}
    found = finished(place, one)
    assert found["device"] == "2 threads"  # as the grid has it, not as the surroundings do
    assert [(row["value"], row["seed"]) for row in found["runs"]] == [(3, 0), (3, 1)]
    assert found["times"]["seconds"] > 0 and runs_of(place) == ["3"]


def test_a_job_that_fails_leaves_a_readable_notebook_and_nothing_else(place, capsys):
    one = tiny(value=3, fail=True)
    assert not run(one, place)
    assert files(place) == {"failed/tiny.ipynb"} and not list(place.glob(".running/*"))
    assert all(word in (place / "failed" / "tiny.ipynb").read_text() for word in ("RuntimeError", "as asked"))
    assert "tiny failed: RuntimeError: as asked" in capsys.readouterr().err
    assert run(tiny(value=3), place)
    assert "failed/tiny.ipynb" not in files(place)  # it succeeded


def test_a_notebook_without_results_fails(place, capsys):
    write_notebook(place.parent, work="pass")
    assert not run(tiny(), place)
    assert files(place) == {"failed/tiny.ipynb"} and "results.json" in capsys.readouterr().err


def test_a_kernel_that_dies_fails(place):
    write_notebook(place.parent, work="import os; os._exit(3)")
    assert not run(tiny(), place)
    assert files(place) == {"failed/tiny.ipynb"}


def test_a_truncated_file_is_told_and_made_again(place, capsys):
    one = tiny(value=3)
    run(one, place)
    whole = (place / "jobs" / "tiny.json").read_bytes()
    for count, (file, content, said) in enumerate([
        ("jobs/tiny.json", b"", "a damaged result"), ("jobs/tiny.json", b"[]", "a damaged result"),
        ("jobs/tiny.json", whole[:-20], "a damaged result"),
        ("notebooks/tiny.ipynb", None, "a damaged notebook"),
    ], 1):
        (place / file).write_bytes((place / file).read_bytes()[:-1] if content is None else content)
        assert finished(place, one) is None
        assert f"tiny has {said}: it will be run again" in capsys.readouterr().err
        if count > 2:  # the same is done about each of them
            assert run(one, place) and finished(place, one)["runs"] and runs_of(place) == ["3"] * (count - 1)


def test_other_parameters_are_another_job(place, capsys):
    run(tiny(value=3), place)
    assert finished(place, tiny(value=4)) is None
    assert "tiny has other parameters" in capsys.readouterr().err


def test_what_a_killed_job_left_is_cleared_away(place):
    write_notebook(place.parent, work="import time; time.sleep(60)")
    script = ("import sys; from pathlib import Path; from batch import job; from tests.batch.test_job import tiny; "
              "job.ROOT = Path(sys.argv[1]); job.run(tiny(value=3), job.ROOT / 'grid', job.ROOT / 'store')")
    process = subprocess.Popen([sys.executable, "-c", script, place.parent], cwd=ROOT)
    try:
        for _ in range(600):
            if list(place.glob(".running/tiny/*/notebook.ipynb")):
                break
            time.sleep(0.1)
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()
    (left,) = place.glob(".running/tiny/*")
    assert not finished(place, tiny(value=3))
    write_notebook(place.parent, work=WORK)
    assert run(tiny(value=3), place)
    assert not left.exists() and files(place) == {"notebooks/tiny.ipynb", "figures/tiny.svg", "jobs/tiny.json"}


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """What a block for so many GPUs sees, on a machine with four."""
    monkeypatch.setattr(job, "LOCKS", tmp_path)
    monkeypatch.setattr(job.random, "uniform", lambda low, high: 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return lambda: os.environ["CUDA_VISIBLE_DEVICES"].split(",")


def test_jobs_have_gpus_of_their_own_and_give_them_back(seen):
    with job.gpus_of_its_own(1):
        first = seen()
        os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,2,3"
        with job.gpus_of_its_own(2):
            second = seen()
    assert len(first) == 1 and len(second) == 2 and not set(first) & set(second)
    with job.gpus_of_its_own(9):
        assert seen() == ["0", "1", "2", "3"]  # all that there are
    assert seen() == ["0", "1", "2", "3"]


def test_a_job_waits_for_a_gpu_that_another_has(seen, monkeypatch):
    waited = []
    with job.gpus_of_its_own(3):
        os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,2,3"
        monkeypatch.setattr(job.time, "sleep", lambda seconds: waited.append(seconds) or 1 / 0)
        with pytest.raises(ZeroDivisionError), job.gpus_of_its_own(2):
            pass
        with job.gpus_of_its_own(1):  # what the one that gave up held is free
            assert seen() == ["3"]
    assert waited


def test_a_gpu_of_another_user_is_waited_for_and_free_after_a_crash(seen, tmp_path):
    """As two users of one machine: the one may not write the other's files, and the other's job is killed."""
    tmp_path.chmod(0o1777)
    for folder in tmp_path.parents:
        if folder.owner() == tmp_path.owner() and folder != Path("/tmp"):
            folder.chmod(0o755)
    other = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
    code = (f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
            "from pathlib import Path\nfrom batch import job\n"
            f"os.umask(0o077)\njob.LOCKS = Path({str(tmp_path)!r})\n"
            "held = [job._gpu_lock(name) for name in '0123']\nprint(held.count(None), flush=True)\ntime.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **other) as process:
        assert process.stdout.readline() == "0\n"
        assert [job._gpu_lock(name) for name in "0123"] == [None] * 4
        process.kill()
    with job.gpus_of_its_own(4):
        assert seen() == ["0", "1", "2", "3"]
    if other:
        assert {path.owner() for path in tmp_path.glob("*.lock")} == {"nobody"}


@pytest.mark.parametrize("count, name, value", [(0, "OTHER", "x"), (1, "SLURM_JOB_ID", "7")])
def test_who_needs_no_gpu_or_is_given_one_by_slurm_is_left_alone(seen, monkeypatch, count, name, value):
    monkeypatch.setenv(name, value)
    with job.gpus_of_its_own(count):
        assert seen() == ["0", "1", "2", "3"]


def test_a_grid_with_gpus_runs_where_there_are_none(seen, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with job.gpus_of_its_own(1):
        assert seen() == [""]


def test_the_table_and_the_outlook(place):
    jobs = {name: tiny(name, value=value, rate=rate, **more) for name, value, rate, more in (
        ("b", 2, 0.5, {}), ("a", 1, 0.25, {}), ("c", 3, 0.5, {"fail": True}))}
    assert outlook(jobs, place, every=True).splitlines() == [
        "to run    b, at most 3 minutes", "to run    a, at most 3 minutes", "to run    c, at most 3 minutes",
        "3 jobs, 0 of them finished; the rest take at most 9 minutes, one after the other"]
    assert gather(jobs, place) == "0 of 3 jobs are finished" and not place.exists()
    for one in jobs.values():
        run(one, place)
    assert gather(jobs, place).splitlines() == [
        f"2 of 3 jobs are finished; 4 rows in {place / 'tables' / 'tiny.csv'}",
        f"  failed: {place / 'failed' / 'c.ipynb'}"]
    table = (place / "tables" / "tiny.csv").read_bytes()
    head, *rows = table.decode().splitlines()
    assert head == "job,rate,value,seed,commit,device,threads"  # no lists, no seconds
    assert rows[0] == "a,0.25,1,0,abc,2 threads,2"
    assert [row[0] for row in rows] == list("aabb")
    assert json.loads((place / "status.json").read_text()) == {"finished": ["a", "b"], "failed": ["c"], "missing": []}
    assert [(row["job"], row["given.value"], row["versions.python"]) for row in read_table(place / "jobs.csv")] == [
        ("a", 1, "3"), ("b", 2, "3")]
    listed = outlook(jobs, place, every=True).splitlines()
    assert [line.split()[0] for line in listed] == ["finished", "finished", "failed", "3"]
    assert "about" in listed[2] and "3 jobs, 2 of them finished; the rest take about" in listed[3]

    found = json.loads((place / "jobs" / "a.json").read_text())
    (place / "jobs" / "a.json").unlink()
    assert run(jobs["a"], place)
    again = json.loads((place / "jobs" / "a.json").read_text())
    assert again["times"] != found["times"] and again["runs"] != found["runs"]  # other seconds
    gather(jobs, place)
    assert (place / "tables" / "tiny.csv").read_bytes() == table

    jobs["d"] = tiny("d", value=1, rate=0.25)  # what two jobs have in common stands in the table once
    assert run(jobs["d"], place)
    gather(jobs, place)
    assert (place / "tables" / "tiny.csv").read_bytes() == table
    del jobs["d"]

    others = {name: tiny(name, value=9) for name in jobs}  # of other parameters: nothing of theirs is finished
    assert gather(others, place).startswith("0 of 3 jobs are finished")
    assert not list(place.glob("tables/*"))
    assert json.loads((place / "status.json").read_text()) == {"finished": [], "failed": ["c"], "missing": ["a", "b"]}


def leave_result(place, one):
    """Write the files of a finished job with two runs, one of them equal to a run of each other job."""
    runs = [{"method": "dense", "accuracy": 0.5},
            {"method": "lth", "matching": None, "accuracy": one.parameters["value"]}]
    record = {"parameters": one.parameters, "commit": "abc", "device": "a processor", "versions": {"torch": "2"},
              "settings": {"options": {"size": 3}}, "runs": runs, "threads": 1, "times": {"seconds": 1.5},
              "sha256": hashlib.sha256(b"").hexdigest()}
    for path, text in (("jobs", json.dumps(record)), ("notebooks", "")):
        (place / path).mkdir(parents=True, exist_ok=True)
        (place / path / f"{one.name}.{'json' if text else 'ipynb'}").write_text(text)


def test_jobs_of_two_machines_make_the_same_table_as_those_of_one(tmp_path):
    jobs = {name: tiny(name, value=value, rate=rate)
            for name, value, rate in (("a", 1, 2), ("b", 2, None), ("c", 3, 2))}
    place, first, second, into = (tmp_path / name for name in ("all", "first", "second", "tables"))
    for one in jobs.values():
        leave_result(place, one)
        leave_result(second if one.name == "b" else first, one)
    gather(jobs, place)
    assert gather(jobs, first, into).startswith("2 of 3 jobs are finished; 3 rows")
    assert gather(jobs, second, into).startswith("3 of 3 jobs are finished; 4 rows")
    for name in ("tables/tiny.csv", "jobs.csv", "status.json"):
        assert (into / name).read_bytes() == (place / name).read_bytes()

    table = (into / "tables" / "tiny.csv").read_bytes()
    for others in ({**jobs, "a": tiny("a", value=9)}, {"b": jobs["b"]}):
        with pytest.raises(ValueError, match="has the job a with {'value': 1, 'rate': 2}: expected a job of this grid"):
            gather(others, second, into)
    assert (into / "tables" / "tiny.csv").read_bytes() == table


def test_the_command_line(place, monkeypatch, capsys):
    for fail, status in ((False, 0), (True, 1)):
        grid = freeze({str(value): tiny(f"tiny_value-{value}", value=value, fail=fail) for value in (1, 2)}, place)
        monkeypatch.setattr(sys, "argv", ["job", str(grid), f"tiny_value-{status + 1}", str(place), "--store",
                                          str(place.parent / "store")])
        with pytest.raises(SystemExit) as ended:
            job.main()
        assert ended.value.code == status
