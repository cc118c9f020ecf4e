"""The store as its user meets it: nothing computed twice, nothing stale, nothing half written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import permask_core
from permask_core.experiments import permuted_masks
from permask_core.runs import store as module
from permask_core.runs.files import load_tensors, locked, save_tensors
from permask_core.runs.store import Store, check_folder, commit, device_name, sources

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
    monkeypatch.setattr("permask_core.runs.store.versions", lambda: {"torch": "another"})
    assert store.path("some", compute) != before


def test_another_source_is_another_stage(store):
    assert sources(compute) != sources(never)


def test_an_unknown_policy_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="on_change is 'keeep': expected one of recompute, keep"):
        Store(tmp_path, on_change="keeep")
    monkeypatch.setenv("PERMASK_ON_CHANGE", "keep")
    assert Store(tmp_path).on_change == "keep" and Store(tmp_path, on_change="recompute").on_change == "recompute"


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


def flipped(content):
    """With one bit of the last number changed: still a whole file of the right length."""
    return content[:-1] + bytes([content[-1] ^ 1])


def foreign(path):
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "pt"})


def other_stage(path):
    save_tensors(path, {}, {"stage": "other", "parameters": {}, "sources": {}, "versions": {}, "result": {}})


@pytest.mark.parametrize("damage, said", [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged or not a safetensors file"),
    (lambda path: path.write_bytes(b""), "is damaged or not a safetensors file"),
    (lambda path: path.write_bytes(path.read_bytes()[8:]), "is damaged or not a safetensors file"),
    (lambda path: path.write_bytes(flipped(path.read_bytes())), "do not have the checksum that was stored with them"),
    (lambda path: path.write_bytes(path.read_bytes().replace(b'\\"value\\": 1', b'\\"value\\": 2')),
     "do not have the checksum"),
    (foreign, "its format is 'pt': expected 'permask 2'"),
    (other_stage, "holds the stage 'other' with other parameters than its name says"),
    (lambda path: save_tensors(path, {}, {"kind": "masks"}), "is not a stage with a result"),
    (lambda path: save_tensors(path, {}, {"stage": "some"}), "is not a stage with a result"),
], ids=["cut", "empty", "no head", "a bit", "a record", "foreign", "another stage", "masks", "no result"])
def test_a_file_that_is_not_the_stage_is_reported_put_aside_and_made_again(store, damage, said, capsys):
    store.stage("some", compute)
    path = store.path("some", compute)
    whole = path.read_bytes()
    damage(path)
    damaged = path.read_bytes()
    assert damaged != whole
    tensors, record = store.stage("some", compute)
    assert tensors["x"].tolist() == [0, 1, 2] and record["value"] == 1
    told = capsys.readouterr().out
    assert said in told and f"the old file was renamed to {path.name}.damaged" in told and told.count("\n") == 1
    assert path.with_name(path.name + ".damaged").read_bytes() == damaged
    assert (store.computed, store.found) == (2, 0)
    assert store.stage("some", compute) and store.found == 1


def test_a_stage_under_the_name_of_another_is_not_served(store, capsys):
    for n in (1, 2):
        store.stage("some", lambda: ({"x": torch.full((1,), float(n))}, {}), n=n)  # noqa: B023
    one, two = (next(path for path in store.folder.rglob("*.safetensors")
                     if load_tensors(path)[1]["parameters"] == {"n": n}) for n in (1, 2))
    shutil.copy(one, two)
    assert store.stage("some", lambda: ({"x": torch.full((1,), 2.0)}, {}), n=2)[0]["x"] == 2
    assert "holds the stage 'some' with other parameters than its name says" in capsys.readouterr().out


def test_a_failed_stage_leaves_nothing(store):
    with pytest.raises(AssertionError, match="computed"):
        store.stage("some", never)
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


def several(calls=None, before=lambda positions: None):
    """A function that computes several stages, and remembers which."""
    def compute_several(positions):
        if calls is not None:
            calls.append(positions)
        before(positions)
        return [({"x": torch.tensor([i])}, {"value": i, "seconds": 0.5}) for i in positions]

    return compute_several


@pytest.mark.parametrize("at_once, expected", [(2, [[0, 2], [3, 4]]), (9, [[0, 2, 3, 4]]), (1, [[0], [2], [3], [4]])])
def test_several_stages_are_computed_at_once_and_found_one_by_one(store, at_once, expected):
    wanted, calls = [{"seed": i, "modules": ["permask_core.masks"]} for i in range(5)], []
    store.stage("some", compute, **wanted[1])
    store.stages("some", compute, wanted, several(calls), at_once)
    assert calls == expected and (store.computed, store.found) == (5, 1)
    store.stages("some", compute, wanted, never, at_once)
    for i in (0, 2, 3, 4):
        tensors, record = store.stage("some", compute, **wanted[i])
        assert tensors["x"] == i and record == {"value": i, "seconds": 0.5}


def test_a_stage_that_is_wanted_twice_is_computed_once(store):
    calls = []
    store.stages("some", compute, [{"n": 1}, {"n": 2}, {"n": 1}], several(calls), 3)
    assert calls == [[0, 1]] and store.computed == 2


def test_stages_that_another_process_computes_are_left_to_it(store):
    wanted, calls, other = [{"n": n} for n in range(4)], [], ExitStack()
    other.enter_context(locked(store.path("some", compute, n=0)))
    store.stages("some", compute, wanted, several(calls, lambda positions: 3 in positions and other.close()), 2)
    assert calls == [[1], [2, 3], [0]]  # the other one ended without a result
    with locked(store.path("some", compute, n=4)):
        waiting = threading.Thread(target=Store(store.folder).stages,
                                   args=("some", compute, [{"n": 4}], lambda positions: never(), 1))
        waiting.start()
        time.sleep(0.1)
        save_tensors(store.path("some", compute, n=4), *other_result(store, n=4))
    waiting.join(60)
    assert not waiting.is_alive() and store.stage("some", compute, n=4)[1]["value"] == 1


def other_result(store, **parameters):
    """What another process writes for a stage: its tensors and its record."""
    elsewhere = Store(store.folder / "elsewhere")
    elsewhere.stage("some", compute, **parameters)
    return load_tensors(elsewhere.path("some", compute, **parameters))


def test_several_stages_that_fail_leave_nothing(store):
    def failing(positions):
        raise OSError("no memory")

    with pytest.raises(OSError, match="no memory"):
        store.stages("some", compute, [{"n": 1}, {"n": 2}], failing, 2)
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


TOGETHER = """
import sys, time, torch
from permask_core.runs.store import Store

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
    jobs = [python(script, runs) for _ in range(2)]
    told = [job.communicate()[0] for job in jobs]
    counts = [tuple(map(int, one.splitlines()[-1].split())) for one in told]
    assert sum(computed for computed, _ in counts) == 6 and all(sum(one) == 6 for one in counts)
    assert len(list(runs.rglob("*.safetensors"))) == 6 and not list(runs.rglob("*.lock"))


KILLED = """
import sys, time, torch
import safetensors.torch as files
from permask_core.runs.store import Store

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


EDITED = '''
import sys
from pathlib import Path
from permask_core.experiments import dynamic_sparsity, extreme_labels, permuted_masks
from permask_core.runs import store

PACKAGE = Path(store.__file__).parents[1]


def found():
    """What a stage of each depends on."""
    store._reached.cache_clear()
    store._module.cache_clear()
    networks = {"mlp": "feedforward", "resnet20": "residual"}
    hashes = {name: store.sources(permuted_masks.run, [f"permask_core.models.{module}"])
              for name, module in networks.items()}
    return hashes | {"dst": store.sources(dynamic_sparsity.run), "script": store.sources(found)}


for edit in sys.argv[1:]:
    if edit in ("cpu", "cuda"):
        store._device = lambda edit=edit: edit
        before = found()
        continue
    name, _, change = edit.partition(":")
    path = PACKAGE / f"{name}.py"
    text = path.read_text()
    path.write_text({
        "code": text + "\\nEDITED = 1\\n", "comment": "# edited\\n" + text + "\\n\\n# edited\\n",
        "docstring": text.replace('"""', '"""Edited. ', 1).replace('    """', '    """Edited. ', 1)}[change])
    assert path.read_text() != text
    now = found()
    print(edit, *(kind for kind in now if now[kind] != before[kind]))
    before = now
'''


ALL = ["mlp", "resnet20", "dst", "script"]
CHANGES = {"training/loop:docstring": [], "training/loop:comment": [], "training/loop:code": ALL,
           "experiments/permuted_masks:code": ["mlp", "resnet20", "script"],
           "experiments/dynamic_sparsity:code": ["dst", "script"]}
PARTS = {"data/folders:code": ALL, "models/feedforward:code": ["mlp", "script"],
         "models/residual:code": ["resnet20", "script"], "matching/weights:code": ["mlp", "resnet20", "script"],
         "data/celeba:code": ["script"], "display/style:code": ["script"]}
KERNELS = "sparse/kernels/triton:code"


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """Which stages are stale after each of some edits of a copy of the library, one after the other, on two devices."""
    folder = tmp_path_factory.mktemp("edited")
    shutil.copytree(PACKAGE, folder / "permask_core", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "script.py").write_text(EDITED)
    edits = "cpu", *CHANGES, *PARTS, KERNELS, "cuda", KERNELS
    with python(folder / "script.py", *edits, package=folder / "permask_core") as process:
        lines = [line.split() for line in process.stdout.read().splitlines()]
    assert process.returncode == 0 and len(lines) == len(edits) - 2
    return lines


def test_docstrings_and_comments_may_change_and_code_may_not(stale):
    assert {name: found for name, *found in stale if name in CHANGES} == CHANGES


def test_a_stage_depends_on_what_it_uses(stale):
    """Not on readers of data, whose content is a parameter, on other networks, or on what shows results."""
    assert {name: found for name, *found in stale if name in PARTS} == PARTS


def test_the_kernels_for_a_gpu_count_there_alone(stale):
    assert [found for name, *found in stale if name == KERNELS] == [["script"], ALL]


def test_a_registered_network_is_a_source(monkeypatch):
    """A stage names the modules of its networks; nothing else would show them."""
    taken = {}
    monkeypatch.setattr(Store, "stage", lambda self, name, compute, *, modules, **parameters: taken.setdefault(
        name, (modules, parameters)) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        permuted_masks.train_dense(permuted_masks.Experiment(model="lenet5"), Store("nowhere"), 0, "a")
    modules, parameters = taken["dense"]
    assert modules == ["permask_core.models.feedforward"] and "options" not in parameters


OLD, NEW = ({"permask_core.training": value, "permask_core.masks": "m"} for value in ("old", "new"))


@pytest.fixture
def changing(monkeypatch):
    """A function that sets the sources of all stages, as if the library had been edited."""
    def change(now):
        monkeypatch.setattr(module, "sources", lambda compute, modules=(): now)
        monkeypatch.setattr(module, "_module_hash", now.get)

    return change


def test_a_stage_of_other_code_is_recomputed_beside_the_old_one(store, changing):
    changing(OLD)
    store.stage("some", compute)
    changing(NEW)
    assert store.stage("some", lambda: ({}, {"value": 2}))[1]["value"] == 2
    changing(OLD)
    assert store.stage("some", never)[1]["value"] == 1  # as after a checkout of the old commit


def test_a_stage_of_other_code_can_be_kept_with_a_message(store, changing, capsys):
    changing(OLD)
    for n in (1, 2):
        store.stage("inner", compute, n=n)
    changing(NEW)
    keeping = Store(store.folder, on_change="keep")
    kept = {"permask_core.training": "old -> new"}
    for n in (1, 2):
        tensors, record = keeping.stage("inner", never, n=n)
        assert tensors["x"].tolist() == [0, 1, 2] and record["kept"] == kept
    told = capsys.readouterr().out
    assert told.count("\n") == 1  # once, not for each of hundreds
    assert "inner: kept from" in told and "although permask_core.training changed since" in told
    assert (keeping.computed, keeping.found) == (0, 2)

    # What is computed from it says so, when it is found again, too; what is not does not.
    def outer():
        return {}, {"sum": keeping.stage("inner", never, n=1)[0]["x"].sum().item()}

    assert keeping.stage("outer", outer)[1]["kept"] == kept
    assert Store(store.folder).stage("outer", never)[1]["kept"] == kept
    assert "kept" not in keeping.stage("alone", compute)[1]


def test_a_record_says_what_was_kept_for_it_alone(store, changing):
    changing(OLD)
    store.stage("one", compute)
    changing(NEW | {"permask_core.masks": "before"})
    store.stage("other", compute)
    changing(NEW)
    keeping = Store(store.folder, on_change="keep")
    keeping.stage("one", never)
    found = keeping.stage("outer", lambda: ({}, {"x": keeping.stage("other", never)[1]["value"]}))[1]["kept"]
    assert found == {"permask_core.masks": "before -> m"}


def test_a_record_says_what_was_kept_for_several_stages_at_once(store, changing):
    changing(OLD)
    store.stage("one", compute)
    changing(NEW)
    keeping = Store(store.folder, on_change="keep")
    keeping.stages("outer", compute, [{"n": 1}, {"n": 2}], several(before=lambda _: keeping.stage("one", never)), 2)
    assert keeping.stage("outer", never, n=2)[1]["kept"].keys() == keeping.stage("one", never)[1]["kept"].keys()
    keeping.stages("other", compute, [{"n": 1}], several(), 2)
    assert "kept" not in keeping.stage("other", never, n=1)[1]


def test_a_damaged_stage_of_other_code_is_not_kept(store, changing, capsys):
    changing(OLD)
    store.stage("some", compute)
    path = store.path("some", compute)
    path.write_bytes(flipped(path.read_bytes()))
    changing(NEW)
    keeping = Store(store.folder, on_change="keep")
    assert "kept" not in keeping.stage("some", compute)[1] and keeping.computed == 1
    assert f"{path} is damaged" in capsys.readouterr().out


def test_a_library_of_another_version_can_be_kept(store, monkeypatch, changing, capsys):
    changing(OLD)
    monkeypatch.setattr(module, "versions", lambda: {"torch": "1"})
    store.stage("some", compute)
    monkeypatch.setattr(module, "versions", lambda: {"torch": "2"})
    assert Store(store.folder, on_change="keep").stage("some", never)[1]["kept"] == {"torch": "1 -> 2"}
    assert "although torch changed since" in capsys.readouterr().out
    assert store.stage("some", compute) and store.computed == 2


def test_a_training_that_other_code_began_goes_on_where_results_are_kept(store, changing, capsys):
    changing(OLD)
    begun = store.unfinished("some", compute, n=1)
    begun.parent.mkdir(parents=True)
    begun.touch()
    changing(NEW)
    assert store.unfinished("some", compute, n=1) != begun and begun.exists()
    taken = Store(store.folder, on_change="keep").unfinished("some", compute, n=1)
    assert taken == store.unfinished("some", compute, n=1) and taken.exists() and not begun.exists()
    assert f"some: continues from {begun.name}, although its code has changed since" in capsys.readouterr().out


def test_a_stage_that_a_gpu_computed_is_found_without_one(store, monkeypatch):
    kernels = {"permask_core.sparse.kernels.triton": "k"}
    monkeypatch.setattr(module, "_module_hash", {**OLD, **kernels}.get)
    monkeypatch.setattr(module, "sources", lambda compute, modules=(): OLD | kernels)
    store.stage("some", compute)
    monkeypatch.setattr(module, "sources", lambda compute, modules=(): OLD)
    assert store.stage("some", never) and store.found == 1


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
    (folder / "results.json").touch()
    before = (folder / "settings.json").stat().st_mtime_ns
    for same in (SETTINGS, expected, dict(reversed(SETTINGS.items()))):
        assert check_folder(str(folder), same) == folder
    assert (folder / "settings.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "settings.json"]


@pytest.mark.parametrize("change, message", [
    ({"model": "vgg11"}, "model 'mlp' (here 'vgg11')"),
    ({"widths": [1, 0.5]}, "widths [0.5, 1] (here [1, 0.5])"),
    ({"rates": Rates(0.2)}, "rates {'lr': 0.1, 'steps': [1, 2]} (here {'lr': 0.2, 'steps': [1, 2]})"),
    ({"dataset": "digits", "model": "cnn"}, "dataset None (here 'digits'), model 'mlp' (here 'cnn')"),
    ({"seeds": 3}, "seeds None (here 3)"),
])
def test_a_folder_of_other_settings_is_refused_with_those_that_differ(tmp_path, change, message):
    check_folder(tmp_path, SETTINGS)
    (tmp_path / "results.json").touch()
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} was begun with {message}: give another folder")):
        check_folder(tmp_path, {**SETTINGS, **change})
    assert (tmp_path / "settings.json").read_bytes() == before


def test_a_setting_that_is_gone_differs(tmp_path):
    check_folder(tmp_path, SETTINGS)
    (tmp_path / "results.json").touch()
    with pytest.raises(ValueError, match=re.escape("was begun with model 'mlp' (here None): give")):
        check_folder(tmp_path, {name: value for name, value in SETTINGS.items() if name != "model"})


def test_a_run_that_did_not_finish_is_no_reason_to_refuse_another(tmp_path):
    check_folder(tmp_path, SETTINGS)
    assert check_folder(tmp_path, {"model": "other"}) == tmp_path
    assert json.loads((tmp_path / "settings.json").read_text()) == {"model": "other"}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff"])
def test_damaged_settings_are_refused(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    (tmp_path / "results.json").touch()
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
