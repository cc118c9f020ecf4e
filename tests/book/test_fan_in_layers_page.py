"""What the page on fan-in layers says of its own loops and layers, of published times and of bounds."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from permask_core.data.measured import measured_shared_inputs, measured_whole_networks
from permask_core.sparse import FanInLinear
from tests.notebooks import run

SMALL = {"inputs": 96, "outputs": 40, "sparsities": [0.9]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page on the layer after its last cell."""
    return run("fan_in_layers", SMALL | {"seeds": 1, "epochs": 1}, tmp_path_factory.mktemp("page"), draw=False).space


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    """The names of the page on its speed, for a layer that is quick to measure."""
    quick = SMALL | {"batches": [1, 8], "seconds": 0.001}
    return run("fan_in_speed", quick, tmp_path_factory.mktemp("speed"), draw=False).space


@pytest.mark.parametrize("loop", ["batch_first", "with_transposes"])
def test_both_loops_compute_the_masked_layer(speed, loop):
    mask, x = speed["drawn_mask"](0.9), torch.randn(7, 96)
    layer = FanInLinear.from_dense(speed["dense"], mask)
    y = speed[loop](x.numpy(), layer.values.detach().numpy(), layer.indices.numpy())
    wanted = x @ (speed["dense"].weight.detach() * mask).t()
    assert np.allclose(y, wanted, atol=1e-5)


def test_outputs_and_gradients_are_those_of_double_precision(speed):
    assert speed["worst"](0.9, 1) < 1e-5 and speed["worst"](0.9, 70) < 1e-5


def test_bytes_are_four_for_each_number(page, speed):
    connections = 40 * round(0.1 * 96)
    dense, sparse = page["bytes_held"](nn.Linear(96, 40)), page["bytes_held"](FanInLinear(96, 40, round(0.1 * 96)))
    for held, weights in ((dense, 96 * 40), (sparse, connections)):
        assert held["weights"] == held["gradients"] == 4 * (weights + 40)  # and the biases
        assert held["Adam's state"] == 2 * held["weights"]
    assert dense["mask, indices"] == 0 < sparse["mask, indices"]
    masked = page["bytes_held"](speed["Masked"](nn.Linear(96, 40), speed["drawn_mask"](0.9)))
    assert masked == dense | {"mask, indices": 96 * 40}


def test_the_published_layer_wins_for_one_example_and_loses_for_many_at_80_and_90(speed):
    condensed = speed["published_faster"]["FanInLinear"]
    assert (condensed[1] > 1).all()
    assert condensed[256][condensed[256] < 1].index.tolist() == [0.8, 0.9]


def test_published_times_stand_beside_a_layer_of_their_size_alone(speed, monkeypatch):
    assert speed["published_at"](256).empty
    monkeypatch.setitem(speed, "inputs", 3072)
    monkeypatch.setitem(speed, "outputs", 768)
    assert speed["published_at"](256)["CSR"].to_dict() == {0.9: 2025 / 4673}
    assert speed["published_at"](256, "forward + backward").empty and speed["published_at"](8).empty


def test_bounds_on_a_gpu(speed):
    gain = speed["bound_gain"]
    assert 6 < gain("dense, float32", 0.9, 1) < 10 * 4 / 6  # bytes: six for a connection, four for a weight
    assert 8 < gain("dense, float32", 0.9, 4096) < 10.1  # operations
    assert gain("dense, bfloat16", 0.9, 4096) < 1 < gain("dense, bfloat16", 0.99, 4096)


def test_twins_are_the_same_function_before_training(page):
    model, x = page["sparse_network"](0), page["data"].test.x
    twin, masks = page["twin_of"](model)
    assert torch.allclose(model(x), twin(x), atol=1e-4)
    assert all(torch.equal(twin.state_dict()[name] != 0, mask) for name, mask in masks.items())


def test_layers_with_even_rows_are_condensed_and_others_left(page):
    even = {name for name, mask in page["mixed"].items() if mask.sum(1)[mask.any(1)].unique().numel() == 1}
    assert "fc2.weight" in even and {*page["left"]} == {*page["mixed"]} - even
    replaced = {name for name, layer in page["condensed"].named_children() if isinstance(layer, FanInLinear)}
    assert replaced == {name.removesuffix(".weight") for name in even}


def test_what_the_page_on_whole_networks_says_holds_on_every_processor_measured():
    for record in measured_whole_networks().values():
        for row in record["rows"]:
            where, ratios = (row["network"], row["replaced"]), row["ratios"]
            ratio, training = ratios["fan-in"], row["step"] == "training"
            if row["network"] == "mobilenet_v2":
                assert ratio < 1 or row["batch"] > 1 and ratio < 1.1, where
                assert ratios.get("dense, compiled", 2) > 1.7, where
                continue
            if row["network"] == "resnet50":
                most = row["replaced"] == "1x1 and 3x3"
                assert 1.4 < ratio < 1.6 and row["bound"] > 4.5 if most else 1 < ratio < 1.3, where
                continue
            assert "torch CSR" not in ratios or ratio > ratios["torch CSR"], where
            assert row["network"] != "bert" or ratios.get("dense, compiled", 1) < 1.1
            if training:
                assert 1.5 < ratio < 2
            elif row["replaced"] == "MLPs":
                assert 1 < ratio < 2 and row["bound"] < 3, where
            elif where == ("gpt2", "blocks"):
                assert 1.5 < ratio < 2.5
            else:  # all linear layers
                assert 1.9 < ratio < 6.1, where
        found = {(row["network"], row["step"]) for row in record["rows"]}
        assert found == {*((name, "forward") for name in ("gpt2", "bert", "vit_b_16", "mobilenet_v2", "resnet50")),
                         ("bert", "training"), ("resnet50", "training")}
        assert "dirty" not in record["commit"]


def test_why_mobilenet_gains_nothing():
    """Its 1x1 convolutions take less than half of its time, and move more bytes with fan-in."""
    for record in measured_whole_networks().values():
        for row in record["rows"]:
            if row["network"] == "mobilenet_v2":
                dense, fan_in = row["counted"]["dense"], row["counted"]["fan-in"]
                assert fan_in["products"] < 0.11 * dense["products"] and fan_in["bytes"] > 2 * dense["bytes"]
                assert row["share_of_dense"] < 0.5
                spent = row["seconds_by_kind"]
                assert spent["fan-in"]["replaced convolutions 1x1"] > 0.8 * spent["dense"]["replaced convolutions 1x1"]


def test_sharing_costs_more_in_sparser_networks_and_larger_groups():
    rows = pd.DataFrame(measured_shared_inputs()["rows"])
    points = 100 * rows.pivot(index=["method", "sparsity", "seed"], columns="shared", values="accuracy")
    cost = points.rsub(points[1], axis=0)[[4, 8, 16]].groupby(level=["method", "sparsity"])
    assert cost.count().min(axis=None) >= 5
    mean = cost.mean()
    assert mean.xs(0.9, level="sparsity").max(axis=None) < 0.5 and mean.xs(0.98, level="sparsity")[16].min() > 1.9
    for _, own in mean.groupby(level="method"):
        assert (own.diff().dropna() > 0).all(axis=None)  # with the sparsity
    assert (mean.xs(0.98, level="sparsity").diff(axis=1)[[8, 16]] > 0).all(axis=None)  # with the group
