"""What the page on fairness of sparse networks says of its stored results."""

import numpy as np
import pytest
import torch

from permask_core.evaluation.statistics import mean_interval
from permask_core.experiments import permuted_masks
from tests.notebooks import run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page, with networks that predict one class in place of what it trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permuted_masks, "run", lambda *given, **chosen: [])
        patch.setattr(permuted_masks, "train_dense", lambda experiment, *given: ({experiment.epochs: None}, {}))
        patch.setattr(permuted_masks, "train_sparse", lambda *given: (None, {}))
        patch.setattr(permuted_masks, "logits", lambda experiment, state: torch.zeros(
            len(permuted_masks.data(experiment).test.y), 10))
        given = {"sparsities": [0.5], "seeds": 2}
        return run("fairness_of_sparse_networks", given, tmp_path_factory.mktemp("page"), draw=False).space


def test_the_digits_have_the_settings_of_the_page(page):
    assert permuted_masks.Experiment(**page["measured"]["tasks"]["digits"]["settings"]) == page["base"]


@pytest.mark.parametrize("task", ["digits", "shapes"])
def test_the_worst_class_pays_at_99_and_not_up_to_90(task, page):
    below = {m: page["below_luck"](task, m, 0.99) for m in page["SPARSE"]}
    assert all(d.difference < 0 for d in below.values())
    assert all(below[m].high < 0 for m in ("lth", "permuted", "naive", "random"))
    assert below["naive"].difference == min(d.difference for d in below.values())
    assert page["value"](task, "worst class", "random", 0.99).max() < 1
    assert all(page["below_luck"](task, m, s).high > 0 for m in ("pruned", "lth", "permuted") for s in (0.8, 0.9))


def test_naive_networks_lose_the_worst_digit_first(page):
    everything, worst = (page["value"]("digits", name, "naive", 0.98).mean() for name in ("accuracy", "worst class"))
    assert everything > 40 and worst < 5


def test_the_classes_that_pay_are_those_of_the_task(page):
    after_bh = page["after_bh"]
    assert max(page["falls"].values()) < 0.06
    assert not any(after_bh(task, "lth", 0.8) for task in page["TASKS"]) and not after_bh("shapes", "lth", 0.9)
    for m in ("pruned", "lth", "permuted"):
        digits, shapes = (after_bh(task, m, 0.99) for task in ("digits", "shapes"))
        assert digits["1"] < 0 < digits["3"] and max(shapes["circle"], shapes["trapezoid"]) < 0 < shapes["star"]


def test_colours_drift_apart_and_textures_hardly(page):
    change, sparse, levels = (page[name] for name in ("change", "SPARSE", "LEVELS"))
    assert mean_interval(page["excess"]).low > 15
    at_95 = {m: change("colour EOD", m, 0.95) for m in sparse}
    assert all(at_95[m].low > 0 for m in sparse)
    assert all(at_95[m].difference < 6 for m in ("pruned", "lth", "permuted"))
    assert all(at_95[m].low > 15 for m in ("naive", "random"))
    assert change("colour EOD", "pruned", 0.8).high < 0
    assert all(change("colour EOD", m, 0.99).difference < at_95[m].difference - 10 for m in ("naive", "random"))
    assert not any(change("texture EOD", m, s).low > 3 for m in sparse for s in levels)
    assert all(change("texture EOD", m, 0.99).high < 0 < change("texture DPD", m, 0.99).low for m in sparse)
    assert all(abs(change("colour named", m, 0.95).difference) < 1 for m in ("pruned", "lth", "naive"))
    assert change("colour named", "random", 0.98).low > 10 and change("colour named", "permuted", 0.95).high < -4


def test_little_is_left_at_the_same_accuracy(page):
    same = page["same"]
    for m, s in [(m, s) for m in ("naive", "random") for s in (0.8, 0.9)]:
        assert abs(same["shapes", m, s, "colour EOD"].difference) < page["raw"]("colour EOD", m, s).difference / 3
    assert all(abs(found.difference) < 3 for (*_, name), found in same.items() if name == "worst class")
    assert all(same["shapes", "permuted", s, "colour named"].high < 0 for s in (0.8, 0.9, 0.95, 0.98))
    assert ("shapes", "naive", 0.99, "colour EOD") not in same  # no ticket is as bad


@pytest.mark.parametrize("task", ["digits", "shapes"])
def test_individual_fairness_follows_confidence(task, page):
    pairs = [[page["of"](task, key, m, s) for key in ("confidence", "individual")]
             for m in page["SPARSE"] for s in page["LEVELS"]]
    assert np.corrcoef(*np.hstack(pairs))[0, 1] > 0.9
    dense, sparse = (page["of"](task, "individual", "naive", s) for s in (0.0, 0.99))
    assert mean_interval(sparse - dense).high < 0


def test_aligning_gives_classes_and_groups_back(page):
    for place in (("digits", 0.99), ("shapes", 0.95)):
        gaps, shares = page["by_class"](*place)
        assert gaps.min() > 10 and shares.min() > 0.6
    regained = page["regained"]
    for place in [(task, s) for task in page["TASKS"] for s in (0.95, 0.98, 0.99)]:
        accuracy, worst = (regained(place[0], name, place[1])[1] for name in ("accuracy", "worst class"))
        assert accuracy[1] > 0.6 and worst[1] > 0.5
    for gap, share in (regained("shapes", "colour EOD", s) for s in (0.8, 0.9, 0.95)):
        assert gap < -10 and share[0] > 0.8 and share[1] > 0.6
    assert regained("shapes", "colour EOD", 0.98)[1] is None and regained("shapes", "colour EOD", 0.99)[0] > 0
