"""The page of results, over tables of every kind: its results next to the published ones, and what is missing."""

import json
import re
from pathlib import Path

import pytest

from permask_core.data.measured import measured_grids
from permask_core.runs.tables import read_table, write_table
from tests.notebooks import run

ABOUT = {"commit": "abc", "device": "a GPU", "threads": 1}


def write_grid(folder, notebook, rows, settings, missing=(), failed=()):
    write_table(folder / "tables" / f"{notebook}.csv", [{"job": "a", **settings, **row, **ABOUT} for row in rows])
    status = {"finished": ["a"], "failed": list(failed), "missing": list(missing)}
    (folder / "status.json").write_text(json.dumps(status))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    masks = {"width": 1, "rewind": 25, "seed": 0, "loss": 1.0, "achieved": 0.9, "accuracy": 0.9}
    write_grid(folder / "cifar10", "cifar", [
        {"method": method, "matching": by, "sparsity": s, **masks} for method, by, s in (
            ("dense", "", 0.0), ("lth", "", 0.9), ("permuted", "activations", 0.9), ("naive", "", 0.9))
    ], {"preset": "cifar10-resnet20", "dataset": "cifar10", "model": "resnet20",
       "reproduces": "ResNet20/CIFAR-10"}, missing=[f"job {i}" for i in range(9)], failed=["bad"])
    write_grid(folder / "dst_cifar10", "sparse_training_on_images", [
        {"method": method, "sparsity": s, "seed": seed, "accuracy": 0.9} for seed in (0, 1)
        for method, s in (("dense", 0.0), ("rigl", 0.9))], {"preset": "cifar10-resnet18", "recipe.epochs": 250,
                                                              "reproduces": "ResNet18/CIFAR-10"})
    write_grid(folder / "extreme", "extreme_labels", [
        {"method": "set", "seed": 0, "output_layer_bytes": 2**20, "precision": {
            group: {"1": 0.5, "3": 0.4, "5": 0.3} for group in ("all", "head", "tail")}}], {"preset": "wiki31k"})
    write_grid(folder / "distillation", "class_bias", [
        {"role": role, "temperature": t, "seed": seed, "accuracy": 0.5 + 0.01 * seed, "class": k, "class size": 100,
         "class accuracy": 0.5 + 0.02 * seed * k}
        for role, t in (("teacher", None), ("student", None), ("distilled", 2), ("distilled", 10)) for seed in (0, 1, 2)
        for k in (0, 1)], {"pair": "cifar100"})
    write_grid(folder / "celeba", "group_and_individual_fairness", [
        {"role": "distilled", "temperature": 1, "seed": seed, "accuracy": 0.9, "Young EOD": 0.1, "Young DPD": 0.2,
         "individual": 0.05} for seed in (0, 1)], {"pair": "celeba"})
    return folder


def test_everything_there_is_stands_beside_what_was_published(folder, tmp_path):
    shown = run("results", {"folder": str(folder)}, tmp_path).shown
    assert "1 of 11, 1 failed" in shown["there"] and ">here<" in shown["there"] and "none yet" in shown["there"]
    assert "cifar10 lacks bad, job 0, " in shown["there"] and "and more" in shown["there"]
    assert "resnet20 x 1 on cifar10, rewind 25" in shown["masks"] and "Published rows: Adnan et al." in shown["masks"]
    assert "95.06" in shown["dst"] and "90.0 ± 0.0" in shown["dst"]  # RigL at 90 %, published and measured
    assert "wiki31k" in shown["extreme"] and "50.0" in shown["extreme"]
    cells = re.findall("<td[^>]*>([^<]*)</td>", shown["classes"])
    lines = [cells[i:i + 8] for i in range(0, len(cells), 8)]
    (line,) = [line for line in lines if line[:2] == ["cifar100", "10"]]
    assert line[2] == "3" and line[-2:] == ["22", "11"]  # published
    assert "Young EOD" in shown["groups"] and "10.0 ± 0.0" in shown["groups"]


def test_two_accuracies_of_one_run_are_seen(folder, tmp_path):
    table = Path("celeba", "tables", "group_and_individual_fairness.csv")
    rows = read_table(folder / table)
    write_table(tmp_path / table, [*rows, rows[0] | {"accuracy": 0.8}])
    (tmp_path / "celeba" / "status.json").write_bytes((folder / "celeba" / "status.json").read_bytes())
    with pytest.raises(AssertionError, match="celeba: one run, two accuracies"):
        run("results", {"folder": str(tmp_path)}, tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder is .*nowhere.*: there is no such folder"):
        run("results", {"folder": str(tmp_path / "nowhere")}, tmp_path)


def test_what_came_with_the_book_is_whole():
    digits = measured_grids()["digits"]
    tables = {path.stem: read_table(path) for path in digits.glob("tables/*.csv")}
    status, jobs = json.loads((digits / "status.json").read_text()), read_table(digits / "jobs.csv")
    assert {row["job"] for row in jobs} == set(status["finished"]) and not status["missing"] + status["failed"]
    assert {row["seed"] for row in tables["cifar"]} == {0, 1, 2, 3, 4}
    assert all(not str(row["commit"]).endswith("dirty") for rows in tables.values() for row in rows)
    dense = [row["seed"] for row in tables["cifar"] if row["method"] == "dense"]
    assert sorted(dense) == [0, 1, 2, 3, 4]  # once, though two jobs of each seed have it
