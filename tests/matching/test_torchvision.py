"""Networks of libraries: one small model of each kind in torchvision is traced, and the committed table is still true.

All networks: benchmarks/traced_networks.py, whose results the table in the book shows.
"""

import pytest
import torch

from permask_core.data.measured import measured_traced_networks
from permask_core.matching import derangements, draw_weights, function_change, permutation_groups
from permask_core.models.vision import torchvision
from tests.hypotheses import LONG

TRACED = measured_traced_networks()["rows"]
ROWS = {row["model"]: row for row in TRACED if row["library"] == "torchvision"}
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
FAMILIES = ["convnext_tiny", "googlenet", "mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5",
            "squeezenet1_1", "swin_v2_t"]
if LONG:  # of families whose kinds of layers others above have, too
    FAMILIES += ["alexnet", "densenet121", "efficientnet_b0", "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2",
                 "resnet18", "resnext50_32x4d", "swin_t", "vgg11_bn", "vit_b_32"]


def test_the_table_has_every_classification_model_and_none_changed():
    rows = [ROWS[name] for name in CLASSIFIERS]
    assert set(FAMILIES) <= set(CLASSIFIERS)
    assert all(row["change"] < 1e-9 < 1e-6 < row["left_out"] for row in rows)
    assert all(row["left_out"] > 1e5 * row["change"] for row in rows)
    assert not [why for row in rows for why in row["fixed"] if "not supported" in why]


def test_every_network_of_the_table_is_refused_with_a_reason_or_keeps_its_function():
    for row in TRACED:
        assert row.get("refused") or row.get("unchecked") or not row["groups"] or row["change"] < 1e-9, row["model"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_torchvision_model_is_followed_and_keeps_its_function(name):
    row = ROWS[name]
    model = torchvision.models.get_model(name, weights=None)
    x = torch.randn(1, 3, row["side"], row["side"], dtype=torch.float64)
    groups = permutation_groups(model, x.float())
    assert len(groups) == row["groups"] and sum(group.size for group in groups.values()) == row["units"]
    model, permutations = draw_weights(model), derangements(groups)
    assert function_change(groups, permutations, model, x) < 1e-9
    outer = [name for name, group in groups.items() if group.within is None]
    one = outer[len(outer) // 2]
    part = {**groups, one: groups[one]._replace(entries=groups[one].entries[1:])}
    assert function_change(part, {one: permutations[one]}, model, x) > 1e-2, one
