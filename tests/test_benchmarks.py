"""Benchmarks: what is compared does the same work, and a script's results are what its rounds say."""

import importlib
import json
import statistics
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import torch

from permask_core.data.measured import measured_dynamic_sparse_training
from permask_core.data.splits import cropped, standardised

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("training")


def test_the_plain_loop_reads_what_fit_reads(training):
    """Each image is one of the 9 x 9 crops, or its mirror image, that a split would make of it."""
    split = training.random_split(3)
    places = torch.arange(9)
    corners = torch.cartesian_prod(places, places).repeat(2, 1)
    mirrored = torch.arange(162) >= 81
    for x, label, (image, target) in zip(split.x, split.y, training.PlainImages(split)):
        variants = standardised(cropped(x.expand(162, -1, -1, -1), 4, corners, mirrored), split.mean, split.sd)
        distance = (variants - image).abs().amax((1, 2, 3))
        assert distance.min() < 1e-6 < distance.sort().values[1]
        assert target == label


def test_training_speeds(tmp_path):
    result = tmp_path / "training.json"
    run = subprocess.run([sys.executable, BENCHMARKS / "training.py", "--quick", "--rounds", "2", "--device", "cpu",
                          "--result", result], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record = json.loads(result.read_text())
    assert [row["part"] for row in record["rows"]] == ["loaders alone", *(f"resnet20 x {width}" for width in (1, 4, 8))]
    for row in record["rows"]:
        for clock, ratio in (("seconds", "ratio"), ("processor_seconds", "processor_ratio")):
            assert all(len(times) == record["rounds"] == 2 for times in row[clock].values())
            medians = {side: statistics.median(times) for side, times in row[clock].items()}
            assert 0 < row[ratio] < inf
            assert row[ratio] == pytest.approx(medians["plain"] / medians["permask"])
        medians = {side: statistics.median(times) for side, times in row["seconds"].items()}
        assert row["images_per_second"] == pytest.approx({side: row["images"] / medians[side] for side in medians})


@pytest.mark.parametrize("option, least", [("--rounds", 1), ("--threads", 1), ("--readers", 0)])
def test_a_number_out_of_range_is_named(option, least, training, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", option, "-1"])
    with pytest.raises(SystemExit):
        training.main()
    assert f"'-1': expected an integer of at least {least}" in capsys.readouterr().err


def test_dynamic_sparse_training(tmp_path):
    result = tmp_path / "dynamic_sparse_training.json"
    run = subprocess.run([sys.executable, BENCHMARKS / "dynamic_sparse_training.py", "--quick", "--seeds", "1",
                          "--result", result], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, measured = json.loads(result.read_text()), measured_dynamic_sparse_training()
    assert found["settings"]["networks"] == measured["settings"]["networks"]
    for rows in ("rows", "sparse_opt"):
        for row in found[rows]:
            # Whatever the settings, it starts from the masks of the results that are kept.
            same = [old for old in measured[rows] if all(old[key] == row[key] for key in row if key not in (
                "accuracy", "connections", "active", "achieved"))]
            assert len(same) == 1
            assert row.get("achieved") == same[0].get("achieved")


def test_fan_in_speeds(tmp_path):
    result = tmp_path / "fan_in_cpu.json"
    run = subprocess.run([sys.executable, BENCHMARKS / "fan_in_cpu.py", "--quick", "--threads", "1",
                          "--result", result], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record = json.loads(result.read_text())
    assert len(record["rows"]) == 3 * 2 * 2  # sparsities, batches, ways
    for row in record["rows"]:
        assert row["error"] < 1e-5 and row["turns"] >= 5
        ours = row["median_seconds"]["fan-in"]
        assert row["ratios"] == pytest.approx({name: median / ours for name, median in row["median_seconds"].items()
                                               if name != "fan-in"})
    for row in record["memory"]:
        assert row["kept_bytes"]["dense"] == 16 * (row["inputs"] + 1) * row["outputs"]
        assert row["kept_bytes"]["fan-in"] < row["kept_bytes"]["dense"] / 2


def test_a_fan_in_layer_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("fan_in_cpu")
    layer, dense = benchmark.layers(30, 20, 0.9)
    assert benchmark.check(layer, dense, torch.randn(7, 30)) < 1e-5
    exact = layer.to_dense()
    monkeypatch.setattr(layer, "to_dense", lambda: exact)
    exact.weight.data[3, layer.indices[3, 0]] += 0.01
    with pytest.raises(SystemExit, match="the fan-in layer is off by"):
        benchmark.check(layer, dense, torch.randn(7, 30))
