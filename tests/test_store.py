"""The store as its user meets it: nothing computed twice, nothing stale, nothing half written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import permask_core
from permask_core import store as module
from permask_core.files import load_tensors, save_tensors
from permask_core.lottery import run
from permask_core.store import Store, check_folder, commit, device_name, source_hash

PACKAGE = Path(permask_core.__file__).parent


def compute():
    return {"x": torch.arange(3.0)}, {"value": 1}


def never():
    raise AssertionError("computed")


def test_a_stage_is_computed_once(store):
    first, record = store.stage("some", compute, seed=0, width=1.0)
    again = Store(store.folder)
    second, same_record = again.stage("some", compute, width=1.0, seed=0)  # in another order
    assert (store.computed, store.found, again.computed, again.found) == (1, 0, 0, 1)
    assert first["x"].tolist() == second["x"].tolist() == [0, 1, 2]
    assert record == same_record and record.keys() == {"value", "seconds"}


@pytest.mark.parametrize("changed", [{"seed": 1}, {"seed": "0"}, {"epochs": (1, 3)}, {"extra": None}])
def test_another_parameter_is_another_stage(store, changed):
    parameters = {"seed": 0, "epochs": (1, 2)}
    assert store.path("some", compute, **parameters) == store.path("some", compute, seed=0, epochs=[1, 2])
    assert store.path("some", compute, **parameters) != store.path("some", compute, **{**parameters, **changed})


def test_a_dataclass_is_a_parameter(store):
    @dataclass
    class Settings:
        lr: float

    assert store.path("some", compute, settings=Settings(0.1)) == store.path("some", compute, settings={"lr": 0.1})
    assert store.path("some", compute, settings=Settings(0.1)) != store.path("some", compute, settings=Settings(0.2))


@pytest.mark.parametrize("value", [torch.ones(1), {1, 2}, compute])
def test_a_parameter_that_json_cannot_hold_is_refused_before_computing(store, value):
    with pytest.raises(ValueError, match="parameter of the stage 'some' cannot be written as JSON"):
        store.stage("some", never, value=value)


def test_another_version_of_a_library_is_another_stage(store, monkeypatch):
    before = store.path("some", compute)
    monkeypatch.setattr("permask_core.store.versions", lambda: {"torch": "another"})
    assert store.path("some", compute) != before


def test_another_source_is_another_stage(store):
    assert source_hash(compute) != source_hash(never)


def test_a_stage_is_charged_without_the_stages_it_asked_for(store, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def inner():
        clock[0] += 100
        return {}, {}

    def outer():
        store.stage("inner", inner)
        clock[0] += 1
        return {}, {}

    assert store.stage("outer", outer)[1]["seconds"] == 1
    assert store.stage("inner", inner)[1]["seconds"] == 100


def test_relative_folders_lie_below_permask_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERMASK_RUNS", raising=False)
    assert Store("runs").folder == tmp_path / "runs"
    monkeypatch.setenv("PERMASK_RUNS", str(tmp_path / "base"))
    assert Store("runs").folder == tmp_path / "base" / "runs"
    assert Store(tmp_path / "else").folder == tmp_path / "else"
    assert Store("~/runs").folder == tmp_path / "home" / "runs"
    assert list(tmp_path.iterdir()) == []  # nothing is made before there is a result


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: expected a folder"):
        Store(tmp_path / "file")


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: content[8:]])
def test_a_damaged_stage_is_told_and_made_again(store, damage, capsys):
    store.stage("some", compute)
    path = store.path("some", compute)
    path.write_bytes(damage(path.read_bytes()))
    assert store.stage("some", compute)[0]["x"].tolist() == [0, 1, 2]
    assert capsys.readouterr().out == f"{path} is damaged: it is made again\n"
    assert (store.computed, store.found) == (2, 0)
    assert store.stage("some", compute) and store.found == 1


def test_a_foreign_file_in_the_place_of_a_stage_is_left_alone(store):
    path = store.path("some", compute)
    path.parent.mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "pt"})
    content = path.read_bytes()
    with pytest.raises(ValueError, match="its format is 'pt'"):
        store.stage("some", compute)
    assert path.read_bytes() == content


def test_the_file_of_another_stage_is_refused(store):
    path = store.path("some", compute)
    for record, shown in ({"stage": "other", "result": {}}, "other"), ({"kind": "masks"}, "masks"):
        save_tensors(path, {}, record)
        with pytest.raises(ValueError, match=f"holds '{shown}': expected the stage 'some'"):
            store.stage("some", compute)


def test_a_failed_stage_leaves_nothing(store):
    with pytest.raises(AssertionError, match="computed"):
        store.stage("some", never)
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


TOGETHER = """
import sys, time, torch
from permask_core.store import Store

store = Store(sys.argv[1])
for n in range(6):
    def compute():
        time.sleep(0.05)
        return {"x": torch.full((10,), float(n))}, {}
    assert store.stage("some", compute, n=n)[0]["x"].unique() == n
print(store.computed, store.found)
"""


def test_jobs_that_run_together_compute_each_stage_once(tmp_path):
    script, runs = tmp_path / "script.py", tmp_path / "runs"
    script.write_text(TOGETHER)
    jobs = [python(script, runs) for _ in range(3)]
    told = [job.communicate()[0] for job in jobs]
    counts = [tuple(map(int, one.splitlines()[-1].split())) for one in told]
    assert sum(computed for computed, _ in counts) == 6 and all(sum(one) == 6 for one in counts)
    assert len(list(runs.rglob("*.safetensors"))) == 6 and not list(runs.rglob("*.lock"))


KILLED = """
import sys, time, torch
import safetensors.torch as files
from permask_core.store import Store

def half(tensors, path, **options):
    whole(tensors, path, **options)
    path.write_bytes(path.read_bytes()[:2000])
    print("writing", flush=True)
    time.sleep(600)

store, whole = Store(sys.argv[1]), files.save_file
for n in range(4):
    def compute():
        print("computing", n, flush=True)
        return {"x": torch.full((1000,), float(n))}, {}
    if sys.argv[2] == "kill" and n == 2:
        files.save_file = half
    assert store.stage("some", compute, n=n)[0]["x"].unique() == n
"""


def python(script, *arguments, package=PACKAGE):
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
                            env={"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"})


def test_a_killed_writer_leaves_whole_stages_only_and_the_next_run_goes_on(tmp_path):
    script, runs = tmp_path / "script.py", tmp_path / "runs"
    script.write_text(KILLED)
    with python(script, runs, "kill") as process:
        assert [process.stdout.readline() for _ in range(4)] == [*(f"computing {n}\n" for n in range(3)), "writing\n"]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    finished = list(runs.rglob("*.safetensors"))
    assert sorted(load_tensors(path)[0]["x"][0].item() for path in finished) == [0, 1]
    with python(script, runs, "go on") as process:
        assert process.stdout.read() == "computing 2\ncomputing 3\n"
    assert process.returncode == 0


EDITED = """
from pathlib import Path
from permask_core import lottery, store

def hashes():
    store._modules_hash.cache_clear()
    return store.source_hash(lottery.run), store.source_hash(hashes)

for name in ["display/style", "landscape", "statistics",
             "lottery", "vision", "files", "matching/weights", "models/feedforward", "data/digits", "pruning",
             "training"]:
    path, before = Path(store.__file__).parent / f"{name}.py", hashes()
    path.write_text(path.read_text() + "# edited")
    print(name, *(new != old for new, old in zip(hashes(), before)))
"""


def test_an_edit_of_reachable_source_is_another_stage(tmp_path):
    """A stage of the library depends on what its module reaches; a stage of a script on the whole library."""
    shutil.copytree(PACKAGE, tmp_path / "copy" / "permask_core", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "script.py").write_text(EDITED)
    with python(tmp_path / "script.py", package=tmp_path / "copy" / "permask_core") as process:
        lines = process.stdout.read().splitlines()
    assert lines == [f"{name} False True" for name in ("display/style", "landscape", "statistics")] + [
        f"{name} True True" for name in ("lottery", "vision", "files", "matching/weights", "models/feedforward",
                                         "data/digits", "pruning", "training")]
    assert source_hash(run) == source_hash(run)


def test_a_record_that_json_cannot_hold_names_its_stage(store):
    with pytest.raises(ValueError, match="the record of the stage 'odd' cannot be written as JSON"):
        store.stage("odd", lambda: ({}, {"value": object()}))


@dataclass
class Rates:
    """Settings that JSON does not know."""

    lr: float
    steps: tuple = (1, 2)


SETTINGS = {"model": "mlp", "widths": (0.5, 1), "rates": Rates(0.1), "dataset": None}


def test_a_folder_takes_the_results_of_one_set_of_settings(tmp_path):
    folder = tmp_path / "new" / "results"
    assert check_folder(folder, SETTINGS) == folder
    expected = {"model": "mlp", "widths": [0.5, 1], "rates": {"lr": 0.1, "steps": [1, 2]}, "dataset": None}
    assert json.loads((folder / "settings.json").read_text()) == expected
    before = (folder / "settings.json").stat().st_mtime_ns
    for same in (SETTINGS, expected, dict(reversed(SETTINGS.items()))):
        assert check_folder(str(folder), same) == folder
    assert (folder / "settings.json").stat().st_mtime_ns == before
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("change, message", [
    ({"model": "vgg11"}, "model 'mlp' (here 'vgg11')"),
    ({"widths": [1, 0.5]}, "widths [0.5, 1] (here [1, 0.5])"),
    ({"rates": Rates(0.2)}, "rates {'lr': 0.1, 'steps': [1, 2]} (here {'lr': 0.2, 'steps': [1, 2]})"),
    ({"dataset": "digits", "model": "cnn"}, "dataset None (here 'digits'), model 'mlp' (here 'cnn')"),
    ({"seeds": 3}, "seeds None (here 3)"),
])
def test_a_folder_of_other_settings_is_refused_with_those_that_differ(tmp_path, change, message):
    check_folder(tmp_path, SETTINGS)
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} was begun with {message}: give another folder")):
        check_folder(tmp_path, {**SETTINGS, **change})
    assert (tmp_path / "settings.json").read_bytes() == before


def test_a_setting_that_is_gone_differs(tmp_path):
    check_folder(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=re.escape("was begun with model 'mlp' (here None): give")):
        check_folder(tmp_path, {name: value for name, value in SETTINGS.items() if name != "model"})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff"])
def test_damaged_settings_are_refused(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'settings.json'} is damaged (") + ".*delete it"):
        check_folder(tmp_path, SETTINGS)
    assert (tmp_path / "settings.json").read_bytes() == content


def test_settings_that_json_cannot_hold_leave_no_folder(tmp_path):
    with pytest.raises(TypeError, match="is a set"):
        check_folder(tmp_path / "results", {"widths": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_folders_for_results_lie_where_stores_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PERMASK_RUNS", str(tmp_path / "base"))
    assert check_folder("results", SETTINGS) == tmp_path / "base" / "results"
    assert check_folder(tmp_path / "else", SETTINGS) == tmp_path / "else"


def test_the_commit_is_gits_and_unknown_without(tmp_path, monkeypatch):
    root = Path(permask_core.__file__).parents[1]
    if (root / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout
        assert head.startswith(commit().removesuffix("-dirty"))
    monkeypatch.setattr(module, "HERE", tmp_path)
    assert commit() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == "unknown"


def test_the_name_of_the_processor():
    assert device_name("cpu").endswith(f", {os.cpu_count()} cores") and len(device_name("cpu")) > 10
