"""The notebooks `cifar` and `imagenet` on tiny files in the published formats: what they leave, the same after an
interruption, and what they refuse before any training."""

import json
import os
import re

import numpy as np
import pytest
from scipy import stats

from permask_core.experiments import permuted_masks
from permask_core.experiments.permuted_masks import run
from permask_core.masks import prunable_weights
from permask_core.models import build_model
from permask_core.runs.files import save_tensors
from permask_core.runs.processes import default_device
from permask_core.runs.store import Store, device_name, versions
from tests.data.files import write_cifar, write_imagenet
from tests.hypotheses import LONG
from tests.notebooks import run as run_notebook
from tests.notebooks import shown_table

SMALL = {"epochs": 2, "imp_epochs": 1, "rewinds": [1], "seeds": 1, "sparsities": [0.3, 0.5], "workers": 1}
CIFAR = {**SMALL, "widths": [0.25], "batch_size": 16, "verify": False}
PRESETS = {
    "cifar10-resnet20": {"notebook": "cifar", **CIFAR, "seeds": 2},
    "cifar100-resnet20": {"notebook": "cifar", **CIFAR, "widths": [0.125], "batch_size": 50},
    "imagenet-resnet50": {"notebook": "imagenet", **SMALL, "widths": [0.125], "batch_size": 8, "image_size": 32,
                          "readers": 0},
}
METHODS = [("dense", ""), ("lth", ""), ("permuted", "activations"), ("naive", ""), ("random", "")]
HEADS = ["dense", "LTH", "permuted (activations)", "naive", "random"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with tiny sets: 34 and 100 images for training for CIFAR's, three classes of ImageNet's."""
    root = tmp_path_factory.mktemp("data")
    write_cifar(root, "cifar10", n_train=34, n_test=20)
    write_cifar(root, "cifar100", n_train=100, n_test=50)
    write_imagenet(root / "imagenet")
    return root


def parameters(preset, data, folder):
    """The notebook's name, and what it is given: results go below `folder`."""
    given = dict(PRESETS[preset])
    name = given.pop("notebook")
    root = data / "imagenet" if name == "imagenet" else data
    places = {"data_root": str(root), "runs": str(folder / "runs"), "output": str(folder / "output")}
    return name, {"preset": preset, **places, **given}


def library(preset, data, store):
    """The rows of the same run for one pair, by the library alone."""
    imagenet = "imagenet" in preset
    options = {"image_size": 32, "readers": 0} if imagenet else {"verify": False}
    grid = {key: PRESETS[preset][key] for key in ("widths", "rewinds", "sparsities")}
    changes = {key: PRESETS[preset][key] for key in ("epochs", "imp_epochs", "batch_size")}
    base = permuted_masks.preset(preset, options=options, root=str(data / "imagenet" if imagenet else data),
                                 rewinds=grid["rewinds"], width=grid["widths"][0], **changes)
    return run(permuted_masks.vary(base, grid["widths"], grid["rewinds"]), store, seeds=[0],
               sparsities=grid["sparsities"], matchings=permuted_masks.PRESETS[preset].grid["matchings"])


def stages(folder):
    """The finished stages below a folder, and when each was written."""
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def numbers(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def record(folder):
    return json.loads((folder / "output" / "results.json").read_text())


def check_results(preset, folder, executed):
    """Results and table are those of the rows, and these are of every method, sparsity and seed."""
    given, found = PRESETS[preset], record(folder)
    assert sorted(path.name for path in (folder / "output").iterdir()) == [
        "results.json", "results.md", "results.svg", "settings.json"]
    assert found.keys() == {"caption", "table", "versions", "commit", "device", "settings", "runs"}
    assert found["versions"] == versions() and found["device"] == device_name(default_device())
    (width,), rows = given["widths"], found["runs"]
    expected = {"dataset": preset.split("-")[0], "model": preset.split("-")[1], "width": width, "epochs": 2,
                "preset": preset, "reproduces": None}
    assert found["settings"] | expected == found["settings"] and "root" not in found["settings"]

    expected = {(method, by, s, seed) for seed in range(given["seeds"]) for method, by in METHODS
                for s in ([0.0] if method == "dense" else given["sparsities"])}
    assert {(row["method"], row["matching"], row["sparsity"], row["seed"]) for row in rows} == expected
    assert len(rows) == len(expected)
    shape, classes = {"cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100), "imagenet": ((3, 32, 32), 3)}[
        preset.split("-")[0]]
    model = build_model(preset.split("-")[1], shape, classes, width=width)
    weights = sum(weight.numel() for weight in prunable_weights(model).values())
    for row in rows:
        assert (row["width"], row["rewind"], row["matched_at"]) == (width, 1, 2)
        assert row["achieved"] == pytest.approx(round(row["sparsity"] * weights) / weights, abs=1e-9)
        assert 0 <= row["accuracy"] <= 1 and 0 < row["loss"] < np.inf

    lines = []
    for s in given["sparsities"]:
        line = [f"{100 * s:g}"]
        for method, by in METHODS:
            values = [100 * row["accuracy"] for row in rows
                      if (row["method"], row["matching"], row["sparsity"]) == (method, by, s * (method != "dense"))]
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else None
            line.append(f"{np.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else ""))
        lines.append(line)
    assert shown_table(executed, "table") == [["sparsity (%)", *HEADS], *lines]
    assert [list(line.values()) for line in found["table"]] == lines
    assert (f"| {' | '.join(lines[0])} |") in (folder / "output" / "results.md").read_text().splitlines()
    assert executed.complaints == ""


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """CIFAR-10 for two pairs, in one go: where it left its files, and what the notebook showed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    name, given = parameters("cifar10-resnet20", data, folder)
    return folder, run_notebook(name, given, folder)


def test_cifar_ends_in_results_of_every_run(undisturbed):
    folder, executed = undisturbed
    check_results("cifar10-resnet20", folder, executed)
    # Per seed: A and B; 3 full rounds to 50 %; 2 masks; one matching; 2 sparsities by 4 methods.
    counts = {stage.name: len(list(stage.iterdir())) for stage in (folder / "runs").iterdir()}
    assert counts == {"dense": 2 * 2, "imp_round": 2 * 3, "ticket": 2 * 2, "matching": 2, "sparse": 2 * 2 * 4}


@pytest.fixture(scope="module", params=["imagenet-resnet50", *(["cifar100-resnet20"] if LONG else [])])
def interrupted(request, data, tmp_path_factory):
    """A run of a notebook that was interrupted in the middle and started again: the preset, its folder, the stages
    before and after, and what the notebook showed."""
    preset, folder = request.param, tmp_path_factory.mktemp("interrupted")
    name, given = parameters(preset, data, folder)
    saved = []

    def sixth_is_the_last(path, *stage):
        if len(saved) == 6:
            raise KeyboardInterrupt
        saved.append(path)
        save_tensors(path, *stage)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("permask_core.runs.store.save_tensors", sixth_is_the_last)
        run_notebook(name, given, folder)
    assert not (folder / "output" / "results.json").exists()
    before = stages(folder / "runs")
    executed = run_notebook(name, given, folder, until="claim")
    return preset, folder, before, stages(folder / "runs"), executed


def test_interrupted_and_run_again_it_ends_in_the_same_numbers(interrupted, data):
    preset, folder, _, after, executed = interrupted
    store = Store(folder / "undisturbed")
    assert numbers(record(folder)["runs"]) == numbers(library(preset, data, store))
    assert after.keys() == stages(store.folder).keys()
    check_results(preset, folder, executed)


def test_finished_stages_are_not_computed_again(interrupted):
    _, _, before, after, _ = interrupted
    assert 6 == len(before) < len(after)
    assert {stage: after[stage] for stage in before} == before


def test_the_library_finds_what_a_notebook_computed(undisturbed, data):
    folder, _ = undisturbed
    store = Store(folder / "runs")
    rows = library("cifar10-resnet20", data, store)
    assert rows == [row for row in record(folder)["runs"] if row["seed"] == 0] and store.computed == 0


def test_two_processes_are_one_parameter(data, tmp_path):
    name, given = parameters("cifar10-resnet20", data, tmp_path)
    found = run_notebook(name, {**given, "processes": 2}, tmp_path, until="data-loaded")
    assert found.space["base"].processes == 2 and "processes 2," in " ".join(found.shown["data-loaded"].split())


@pytest.mark.parametrize("preset, looked, remedy", [
    ("cifar10-resnet20", "cifar-10-batches-py", "Load it with download=True, or download https://www.cs.toronto.edu"),
    ("imagenet-resnet50", "train/<class>/*.JPEG", "Download ILSVRC2012_img_train.tar"),
])
def test_a_notebook_without_its_data_says_where_it_looked_and_how_to_get_it(preset, looked, remedy, data, tmp_path):
    name, given = parameters(preset, data, tmp_path)
    given["data_root"] = str(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError) as caught:
        run_notebook(name, given, tmp_path)
    said = str(caught.value)
    assert f"is not in {tmp_path / 'nothing'}: " in said
    assert looked in said and remedy in said and "PERMASK_DATA" in said
    assert not (tmp_path / "runs").exists()


def test_a_notebook_refuses_a_folder_with_results_of_other_settings(undisturbed, data, tmp_path):
    folder, _ = undisturbed
    name, given = parameters("cifar10-resnet20", data, tmp_path)
    before = (folder / "output" / "results.json").read_bytes()
    with pytest.raises(ValueError) as caught:
        run_notebook(name, {**given, "output": str(folder / "output"), "batch_size": 32, "seeds": 1}, tmp_path)
    assert str(caught.value) == (f"{folder / 'output'} was begun with batch_size 16 (here 32), seeds [0, 1] (here [0]"
                                 "): give another folder, or delete it")
    assert (folder / "output" / "results.json").read_bytes() == before and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("preset", ["cifar10-resnet20", "cifar100-resnet20", "imagenet-resnet50"])
@pytest.mark.parametrize("changes, error, message", [
    ({"dataset": "shoes"}, ValueError, "dataset is 'shoes': expected one of digits, trifeature, mnist, fashion"),
    ({"width": 0}, ValueError, "width is 0: expected a factor above 0"),
    ({"sparsities": [0.5, 1.5]}, ValueError, "sparsity is 1.5: expected a number in (0, 1)"),
    ({"sparsities": "[0.5, 0.8]"}, ValueError, "expected a list (papermill takes lists with -y, as in"),
    ({"root": "nothing"}, FileNotFoundError, f"{os.sep}nothing: expected "),
    ({"batch_size": 128}, ValueError, "images: expected at least a batch of 128"),
])
def test_errors_come_before_any_training(preset, changes, error, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = data / "imagenet" if "imagenet" in preset else data
    options = {"image_size": 32, "readers": 0} if "imagenet" in preset else {"verify": False}
    own = {"rewinds": [1], "epochs": 2, "width": 0.125, "root": str(root), "options": options, **changes}
    with pytest.raises(error, match=re.escape(message)):
        sparsities = own.pop("sparsities", [0.9])
        run(permuted_masks.preset(preset, **own), Store("runs"), seeds=range(2), sparsities=sparsities)
    assert list(tmp_path.iterdir()) == []


def test_a_last_batch_too_small_for_the_processes_is_refused_before_any_starts(data, tmp_path):
    chosen = permuted_masks.preset("cifar10-resnet20", rewind=1, epochs=2, width=0.25, root=str(data), batch_size=33,
                                   processes=2, options={"verify": False})
    with pytest.raises(ValueError, match="the last batch of an epoch has 1 examples: expected at least 2, one for"):
        run(chosen, Store(tmp_path / "runs"), seeds=[0], sparsities=[0.5])
    assert list(tmp_path.iterdir()) == []
