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
