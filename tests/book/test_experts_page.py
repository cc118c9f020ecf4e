"""What the page on experts says of its stored study, and what it checks itself."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from permask_core.experiments.compressed_experts import preset
from permask_core.experts import CRITERIA
from tests.notebooks import run, shown_table

QUICK = {"options": {"digits": 2, "n_train": 1280, "n_test": 40}}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run("experts", QUICK, tmp_path_factory.mktemp("page"), draw=False)


@pytest.fixture(scope="module")
def page(found):
    return found.space


def half(page, method, matching=None, what="mean"):
    return page["match"](method, page["HALF"], matching, what)


def test_the_study_has_the_settings_of_the_experiment_and_learnt_every_skill(page):
    assert page["study"]["settings"] == json.loads(json.dumps(asdict(preset())))
    assert page["n_seeds"] == 5 and page["KEPT"] == [12, 8, 4] and page["study"]["experts"] == 16
    assert "dirty" not in page["study"]["commit"] and "--quick" not in page["study"]["command"]
    for skill in page["SKILLS"]:
        assert page["match"]("dense", 16, None, skill).min() > 97


SUMS = ("router_weight", "ean", "reap_sum")


def test_sums_that_know_the_outputs_see_the_true_error_best(page):
    mean = page["by_seed"].mean(axis=1)
    assert min(mean["reap_sum"], mean["ean"]) > mean["reap"] > max(mean["frequency"], mean["router_weight"])


def test_every_criterion_is_above_random_and_the_sums_are_the_best(page):
    for kept in page["KEPT"]:
        for criterion in CRITERIA:
            assert page["match"](criterion, kept).mean() > page["match"]("random", kept).mean(), (criterion, kept)
    sums = min(half(page, one).mean() for one in SUMS)
    assert sums > 95 and sums > half(page, "reap").mean() > half(page, "random").mean()
    few = {one: page["match"](one, 4).mean() for one in CRITERIA}
    assert min(few[one] for one in SUMS) > few["reap"] > few["frequency"]


def test_aligned_merges_are_above_naive_ones_and_below_the_sum_form(page):
    for method in ("hc_smoe", "m_smoe", "ream"):
        for kept in page["KEPT"]:
            naive, weights, activations = (page["match"](method, kept, by).mean() for by in (None, "weights",
                                                                                             "activations"))
            assert activations > naive and weights > naive - 0.1, (method, kept)
        assert half(page, method, "activations").mean() > half(page, method, "weights").mean()
        for kept in (8, 4):
            assert page["match"]("reap_sum", kept).mean() > page["match"](method, kept, "activations").mean()
        lead = {by: half(page, "reap").mean() - half(page, method, by).mean() for by in (None, "activations")}
        assert lead[None] > 5 and 3 < lead["activations"] < 12 and lead["activations"] < lead[None]


def test_frequency_loses_the_rarest_skill_in_some_seed_and_the_mean_hides_it(page):
    rarest = half(page, "frequency", None, "replace")
    others = [half(page, "frequency", None, skill)[rarest.argmin()] for skill in page["SKILLS"][:3]]
    assert rarest.min() < 20 and min(others) > 90 and half(page, "reap_sum", None, "replace").min() > 80


def test_without_the_skill_in_the_calibration_data_it_is_lost_and_the_others_are_not(page):
    for method in ("reap", "reap_sum", "ean"):
        lost = page["match"](method, 8, None, "replace") - page["match"](method, 8, None, "replace", page["without"])
        assert lost.mean() > 20 and (method == "reap" or lost.min() > 50), method
        for skill in page["SKILLS"][:3]:
            kept = page["match"](method, 8, None, skill, page["without"]) - page["match"](method, 8, None, skill)
            assert kept.mean() > -3, (method, skill)
    with_it, without = (page["match"]("hc_smoe", 8, None, "replace", rows) for rows in (None, page["without"]))
    assert (with_it - without).mean() < 10


def test_the_tables_have_a_line_for_each_method(found):
    assert len(shown_table(found, "study-table")) == len(shown_table(found, "here")) == 1 + 17
    assert len(shown_table(found, "errors-study")) == 1 + len(CRITERIA)
    assert [line[0] for line in shown_table(found, "planted")[1:]] == [
        "not aligned", "aligned by weights", "aligned by activations"]
    assert "commit" in found.shown["study-table"] and found.complaints == ""


def test_the_worst_skill_is_the_minimum_in_each_seed(page):
    by_skill = [half(page, "reap", None, skill) for skill in page["SKILLS"]]
    assert np.array_equal(page["worst"]("reap", None), np.minimum.reduce(by_skill))


def test_too_few_experts_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="kept is 0.05: expected at least 0.125, because each token uses 2 of 16"):
        run("experts", {"kept": 0.05}, tmp_path, until="check")
