"""The notebook of dynamic sparse training on tiny files in the published formats, as one run and as jobs of a grid;
what it refuses before any training; and its grids."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from batch.grids import GridError, _parsed, read_grid
from permask_core.data.published import published_dynamic_sparse_training
from permask_core.experiments import dynamic_sparsity
from permask_core.runs.store import Store
from tests.data.files import write_cifar, write_imagenet
from tests.notebooks import run, shown_table
from tests.test_image_notebooks import stages

ROOT = Path(__file__).parents[1]
NOTEBOOK = "sparse_training_on_images"
GRIDS = sorted(path.stem for path in (ROOT / "batch" / "grids").glob("dst_*.yaml"))
TINY = {"width": 0.0625, "epochs": 1, "batch_size": 8, "precision": "float32",
        "recipe": {"accumulate": 1, "warmup": 0}, "rewiring": {"every": 1}}
LABELS = {"dense": "dense", "random": "random", "fan_in": "fan-in", "set": "SET", "rigl": "RigL", "srigl": "SRigL",
          "srigl+ablation": "SRigL, ablation"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with tiny sets: 24 and 20 images for CIFAR's, three classes of ImageNet's."""
    root = tmp_path_factory.mktemp("data")
    write_cifar(root, "cifar10", n_train=24, n_test=20)
    write_imagenet(root / "imagenet")
    return root


def given(data, folder, **changes):
    return {"preset": "cifar10-resnet18", "data_root": str(data), "options": {"verify": False}, **TINY,
            "runs": str(folder / "runs"), "output": str(folder / "output"), **changes}


def record(folder):
    return json.loads((folder / "output" / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """CIFAR-10 with all methods, two sparsities and two seeds: where it left its files, and what it showed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(NOTEBOOK, given(data, folder, seeds=2, first_seed=3, sparsities=[0.8, 0.9]), folder)


def test_its_results_are_those_of_the_library(whole, data):
    folder, executed = whole
    store = Store(folder / "runs")
    chosen = dynamic_sparsity.preset("cifar10-resnet18", root=str(data), options={"verify": False}, width=0.0625,
                                     every=1, recipe={"epochs": 1, "batch_size": 8, **TINY["recipe"]})
    rows = dynamic_sparsity.run(chosen, store, seeds=[3, 4], sparsities=[0.8, 0.9])
    assert store.computed == 0 and rows == record(folder)["runs"] and len(rows) == 2 * (1 + 2 * 6)
    expected = [["source", "sparsity (%)", *LABELS.values()]]
    for level in (0.8, 0.9):
        line = ["measured", f"{100 * level:g}"]
        for method in LABELS:
            values = [100 * row["accuracy"] for row in rows
                      if (row["method"], row["sparsity"]) == (method, level * (method != "dense"))]
            line.append(f"{np.mean(values):.1f} ± {stats.t.ppf(0.975, 1) * stats.sem(values):.1f}")
        expected.append(line)
    assert shown_table(executed, "table") == expected
    assert sorted(path.name for path in (folder / "output").iterdir()) == [
        "results.json", "results.md", "results.svg", "settings.json"]


def test_the_published_table_is_the_data(whole):
    head, *lines = shown_table(whole[1], "published")
    assert head == ["network/data", "sparsity (%)", "dense", "RigL", "SRigL", "SRigL, ablation"]
    found = {(line[0], int(line[1]) / 100, label): float(value) for line in lines
             for label, value in zip(head[2:], line[2:]) if value}
    rows = published_dynamic_sparse_training()
    for row in rows:
        levels = [row["sparsity"]] if row["sparsity"] else [key[1] for key in found if key[0] == row["setting"]]
        assert all(found[row["setting"], level, LABELS[row["method"]]] == pytest.approx(100 * row["accuracy"])
                   for level in levels)
    assert len(found) == 4 * 4 + 4 + 2 * 4 and len(rows) == len(found) - 3 - 1  # dense is listed with each sparsity


@pytest.mark.parametrize("methods, sparsities", [(["dense"], None), (["srigl+ablation"], [0.9])])
def test_a_job_of_a_grid_is_a_part_of_the_whole(whole, data, tmp_path, methods, sparsities):
    folder, _ = whole
    own = given(data, tmp_path, seeds=1, first_seed=4, methods=methods, runs=str(folder / "runs"),
                sparsities=sparsities)
    before = stages(folder / "runs")
    executed = run(NOTEBOOK, own, tmp_path)
    assert stages(folder / "runs") == before
    expected = [row for row in record(folder)["runs"]
                if row["seed"] == 4 and row["method"] in methods and row["sparsity"] in (sparsities or [0.0])]
    assert record(tmp_path)["runs"] == expected and len(expected) == 1
    head, line = shown_table(executed, "table")
    assert head[2:] == [LABELS[methods[0]]] and line[2:] == [f"{100 * expected[0]['accuracy']:.1f}"]


def test_imagenet_in_its_own_format(data, tmp_path):
    own = given(data / "imagenet", tmp_path, preset="imagenet-resnet50", options={"image_size": 32, "readers": 0},
                sparsities=[0.8], methods=["rigl", "srigl"])
    run(NOTEBOOK, own, tmp_path)
    assert [row["method"] for row in record(tmp_path)["runs"]] == ["rigl", "srigl"]


def test_a_folder_with_results_of_other_settings_is_refused(whole, data, tmp_path):
    folder, _ = whole
    with pytest.raises(ValueError, match="was begun with methods"):
        run(NOTEBOOK, given(data, tmp_path, seeds=2, first_seed=3, sparsities=[0.8, 0.9], methods=["rigl"],
                            output=str(folder / "output")), tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", GRIDS)
def test_grids_have_a_job_for_each_run(name):
    jobs = _parsed(ROOT / "batch" / "grids" / f"{name}.yaml")[0].values()  # checked in tests/batch/test_grids.py
    counts = {}
    for job in jobs:
        own = job.parameters
        assert own["seeds"] == own["workers"] == len(own["methods"]) == 1
        assert len(own.get("sparsities", [0])) == 1
        counts[own["preset"]] = counts.get(own["preset"], 0) + 1
    assert counts == {preset: one.grid["seeds"] * (1 + 6 * len(one.grid["sparsities"]))
                      for preset, one in dynamic_sparsity.PRESETS.items()
                      if preset.startswith(f"{name.removeprefix('dst_')}-")}


def test_there_is_a_grid_for_each_published_data_set():
    assert GRIDS == ["dst_cifar10", "dst_cifar100", "dst_imagenet"]


BAD = [
    ({"preset": "cifar"}, "preset is 'cifar': unknown 'cifar'"), ({"model": "cnn"}, "model is 'cnn'"),
    ({"width": 0.0}, "width is 0.0"),
    ({"sparsities": [1.5]}, "sparsities is [1.5]: expected a list of different values"),
    ({"sparsities": []}, "sparsities is []"), ({"methods": ["riglet"]}, "methods is ['riglet']: unknown 'riglet'"),
    ({"seeds": 0}, "seeds is 0: expected an integer of at least 1"), ({"first_seed": -1}, "first_seed is -1"),
    ({"epochs": 0}, "epochs is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"precision": "fp16"}, "precision is 'fp"),
    ({"recipe": {"epoch": 1}}, "recipe is {'epoch': 1}: unknown setting 'epoch'"),
    ({"rewiring": {"every": 0}}, "rewiring is {'every': 0}: every is 0"),
    ({"rewiring": {"model": "mlp"}}, "rewiring is {'model': 'mlp'}: unknown 'model'; expected some of every, until"),
    ({"options": {"noize": 1}}, "options is {'noize': 1}: digits has no option 'noize'"),
    ({"processes": 0}, "processes is 0"),
    ({"workers": 0}, "workers is 0"), ({"metods": ["rigl"]}, "unknown parameter 'metods', perhaps 'methods'"),
    ({"seeds": "3"}, "seeds is '3', a str: expected int"),
]


def test_a_grid_with_bad_values_is_refused_with_all_of_them(tmp_path):
    grid = tmp_path / "bad.yaml"
    presets = {f"p{i}": changes for i, (changes, _) in enumerate(BAD)}
    grid.write_text(json.dumps({"notebook": NOTEBOOK, "presets": presets}))
    with warnings.catch_warnings(), pytest.raises(GridError) as caught:
        warnings.simplefilter("ignore")
        read_grid(grid)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(BAD)
    for (_, message), line in zip(BAD, lines):
        assert message in line
