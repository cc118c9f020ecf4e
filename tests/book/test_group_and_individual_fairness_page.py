"""What the page on groups and individuals says of two predictors, and of stored results."""

import pytest

from permask_core.display import select
from permask_core.evaluation.statistics import welch_comparison
from tests.notebooks import run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page, with the least training that it takes."""
    quick = {"temperatures": [1, 40], "seeds": 2, "individuals": 10, "recipe": {"epochs": 1}, "workers": 1,
             "options": {"n_train": 100, "n_test": 1000}}
    return run("group_and_individual_fairness", quick, tmp_path_factory.mktemp("page"), until="claim-trend",
               draw=False).space


def test_one_predictor_has_equal_odds_and_the_other_equal_selection(page):
    assert page["by_hand"]["without error"] == pytest.approx((0.3, 0))
    assert page["by_hand"]["equal selection"] == pytest.approx((0, 0.25))


@pytest.mark.parametrize("training, tied", [("balanced", False), ("colour tied to the shape", True)])
def test_a_longer_run_sees_the_trend_in_parts(training, tied, page):
    lines, change = page["before"][training], page["change"]
    above = list(page["intervals"](lines["colour EOD"] - lines["colour EOD by chance"], lines).values())
    moves = {column: change(lines, column, 1, 40) for column in ("accuracy", *page["COMPARED"])}
    student = select(lines, "colour EOD", role="student")
    helped = welch_comparison(select(lines, "colour EOD", temperature=1), student)
    if tied:  # a real difference, which rises
        assert min(found.low for found in above[1:]) > 3 and moves["colour EOD"].low > 0 > helped.high
    else:  # nothing that could fall
        assert max(found.mean for found in above) < 1.5 and moves["colour EOD"].high < 0.02 and helped.high > 0
    assert moves["texture EOD"].high < 0 < moves["texture DPD"].difference
    assert moves["individual"].high < 0 and moves["accuracy"].high < 0


def test_selection_differs_less_than_odds_where_base_rates_are_equal(page):
    """Selection is then a mean of the two rates."""
    for lines in page["before"].values():
        for attribute in ("colour", "texture"):
            assert (lines[f"{attribute} DPD"] <= lines[f"{attribute} EOD"]).all()
