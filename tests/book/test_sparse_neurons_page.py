"""What the page on the neurons of sparse layers says of stored and of published results."""

import pytest

from permask_core.data.published import published_dynamic_sparse_training
from tests.notebooks import run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page after the stored comparison of methods, before anything is trained."""
    return run("sparse_neurons", {}, tmp_path_factory.mktemp("page"), until="forms-claims", draw=False).space


def test_ablation_does_not_clearly_help_and_can_lose_connections(page):
    against, places, left, rows = (page[name] for name in ("against", "PLACES", "left", "rows"))
    for network in page["NETWORKS"]:
        # At 80 % every neuron has salient weights enough, and ablation changes nothing.
        assert against(network, 0.8, "srigl+ablation", "srigl").difference == 0
    for variant in ("srigl+ablation", "srigl+ablation/erk"):
        assert not any(against(*place, variant, "srigl").low > 0 for place in places)
    assert [place for place in places if against(*place, "srigl+ablation", "srigl").high < 0] == [("wide", 0.99)]
    assert all(against(*place, "srigl+ablation/erk", "srigl").high > 0 for place in places)
    ablated = rows.query("network == 'wide' and sparsity == 0.99 and method == 'srigl+ablation'")["active"]
    assert max(active["fc2.weight"] for active in ablated) < 256 / 2
    wide, narrow = left["wide", 0.99], left["narrow", 0.99]
    assert wide["srigl+ablation"] < 0.9 * wide["srigl"] < wide["srigl"] < wide["srigl+ablation/erk"]
    assert narrow["srigl+ablation/erk"] < narrow["srigl"]


def test_the_form_of_the_layers_changes_set_alone(page):
    accuracy, levels = page["accuracy"]["narrow"], page["levels"]
    for level in levels:
        assert (accuracy["srigl+ablation", level] == accuracy["srigl+ablation/layers", level]).all()
    assert all(page["against"]("narrow", level, "set/layers", "set").high < 0 for level in levels[-2:])
    assert [int(0.3 * k) for k in (1, 2, 3, 4)] == [0, 0, 0, 1]


def test_published_ablation_helps():
    found = {}
    for row in published_dynamic_sparse_training():
        found.setdefault((row["setting"], row["sparsity"]), {})[row["method"]] = 100 * row["accuracy"]
    complete = [one for one in found.values() if {"rigl", "srigl", "srigl+ablation"} <= one.keys()]
    assert len(complete) == 6 and all(one["srigl+ablation"] > one["srigl"] for one in complete)
    assert max(abs(one["srigl+ablation"] - one["rigl"]) for one in complete) < 0.5
