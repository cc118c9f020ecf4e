"""Fairness against fairlearn, closed forms, enumeration, simulation and double loops."""

import itertools
import math
import re
import warnings

import numpy as np
import pandas
import pytest
import torch
from fairlearn import metrics as fairlearn
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as skmetrics

from permask_core.data.attributes import Attribute
from permask_core.display import table
from permask_core.evaluation import fairness
from permask_core.evaluation.fairness import (
    Chance,
    chance_level,
    demographic_parity_difference,
    difference_interval,
    equalized_odds_difference,
    group_difference,
    group_table,
    individual_fairness,
)
from permask_core.evaluation.statistics import proportion_interval
from tests.hypotheses import examples

METRICS = {demographic_parity_difference: fairlearn.demographic_parity_difference,
           equalized_odds_difference: fairlearn.equalized_odds_difference}
both = pytest.mark.parametrize("metric", METRICS)


@st.composite
def samples(draw, classes=4, groups=4):
    """Labels, predictions and groups of a few inputs, of at least two groups."""
    inputs = st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1), st.integers(0, groups - 1))
    y_true, y_pred, group = np.array(draw(st.lists(inputs, min_size=2, max_size=40))).T
    assume(len(set(group)) > 1)
    return y_true, y_pred, group


def quiet(metric, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric(*args, **options)


def random_sample(rng, n, classes, groups, accuracy=0.8):
    y_true = rng.integers(0, classes, n)
    y_pred = np.where(rng.random(n) < accuracy, y_true, rng.integers(0, classes, n))
    return y_true, y_pred, rng.integers(0, groups, n)


# ---- Differences -----------------------------------------------------------------------------------------------------

@both
def test_two_classes_are_fairlearns(metric):
    rng, seen = np.random.default_rng(0), 0
    for _ in range(40):
        y_true, y_pred, group = random_sample(rng, int(rng.integers(8, 60)), 2, int(rng.integers(2, 5)), 0.6)
        names = np.array(["a", "b", "c", "d"])[group]
        expected = METRICS[metric](y_true, y_pred, sensitive_features=names)
        assert metric(y_true, y_pred, sensitive_features=names, undefined="zero") == pytest.approx(expected, abs=1e-12)
        here = quiet(metric, y_true, y_pred, sensitive_features=names)
        seen += math.isnan(here)
        assert math.isnan(here) or here == pytest.approx(expected, abs=1e-12)
    assert seen == 0 if metric is demographic_parity_difference else 0 < seen < 36


@both
def test_several_classes_are_the_mean_of_fairlearns_of_each_against_the_rest(metric):
    rng = np.random.default_rng(1)
    for _ in range(15):
        y_true, y_pred, group = random_sample(rng, int(rng.integers(20, 80)), 4, 3)
        y_pred[y_pred == 3] = 5  # one class is never predicted, another never true
        counted = set(y_true) | (set(y_pred) if metric is demographic_parity_difference else set())
        expected = np.mean([METRICS[metric](y_true == k, y_pred == k, sensitive_features=group) for k in counted])
        found = metric(y_true, y_pred, sensitive_features=group, undefined="zero")
        assert found == pytest.approx(expected, abs=1e-12)


@both
@given(sample=samples(classes=2))
def test_with_two_classes_both_give_the_same(metric, sample):
    y_true, y_pred, group = sample
    first, second = (quiet(metric, labels, predicted, sensitive_features=group)
                     for labels, predicted in ((y_true, y_pred), (1 - y_true, 1 - y_pred)))
    assume(len(set(y_true)) == 2)
    assert first == pytest.approx(second, nan_ok=True)


@both
@given(sample=samples(), undefined=st.sampled_from(fairness.UNDEFINED), data=st.data())
def test_neither_order_nor_names_matter(metric, sample, undefined, data):
    y_true, y_pred, group = sample
    found = quiet(metric, *sample[:2], sensitive_features=group, undefined=undefined)
    assert math.isnan(found) or 0 <= found <= 1
    order = np.array(data.draw(st.permutations(range(len(group)))))
    labels = np.array([-7, 2, 30, 31])
    names = np.array(data.draw(st.permutations(["a", "b", "c", "d"])))
    again = quiet(metric, torch.from_numpy(labels[y_true[order]]), labels[y_pred[order]].tolist(),
                  sensitive_features=names[group[order]].tolist(), undefined=undefined)
    assert again == pytest.approx(found, nan_ok=True)


@both
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 4))
def test_groups_that_are_merged_are_not_further_apart(metric, seed, classes):
    y_true, y_pred, group = random_sample(np.random.default_rng(seed), 60, classes, 4)
    apart, together = (quiet(metric, y_true, y_pred, sensitive_features=names, undefined="omit")
                       for names in (group, np.minimum(group, 2)))
    assume(not math.isnan(apart + together))
    assert together <= apart + 1e-12


def test_a_perfect_predictor_has_equal_odds_and_the_imbalance_of_the_classes():
    y = np.array([1] * 30 + [0] * 10 + [1] * 5 + [0] * 15)
    group = ["young"] * 40 + ["old"] * 20
    assert equalized_odds_difference(y, y, sensitive_features=group) == 0
    assert demographic_parity_difference(y, y, sensitive_features=group) == pytest.approx(30 / 40 - 5 / 20)


def test_differences_in_opposite_directions_do_not_cancel():
    """Group 0 always finds class 0, half of class 1; group 1 the other way round; the rest goes to class 2."""
    y_true = np.tile(np.repeat([0, 1, 2], 4), 2)
    y_pred = np.array([0] * 4 + [1, 1, 2, 2] + [2] * 4 + [0, 0, 2, 2] + [1] * 4 + [2] * 4)
    # True positive rates are 1/2 apart for classes 0 and 1; for class 2 both groups have 2 false positives of 8.
    assert equalized_odds_difference(y_true, y_pred, sensitive_features=np.repeat([0, 1], 12)) == pytest.approx(1 / 3)


@both
def test_an_input_of_several_groups_counts_in_each_and_one_of_none_in_no(metric):
    rng = np.random.default_rng(2)
    y_true, y_pred, _ = random_sample(rng, 200, 3, 2)
    member = torch.from_numpy(rng.random((200, 4)) < 0.3)
    member[:20] = False
    rows, group = member.numpy().nonzero()
    expected = metric(y_true[rows], y_pred[rows], sensitive_features=group)
    y_pred[:20] = 77  # a class of its own, were they not left out
    assert metric(y_true, y_pred, sensitive_features=Attribute(("a", "b", "c", "d"), member)) == pytest.approx(expected)


def test_what_is_undefined_is_said_left_out_or_zero():
    y_true, y_pred = [1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0, 1, 0]
    group = ["a", "a", "a", "a", "b", "b", "c", "c"]
    message = r"equalized_odds_difference is NaN: group 'c' has no true positive rate for class 1 \(0 of its 2 inputs"
    with pytest.warns(UserWarning, match=message) as caught:
        assert math.isnan(equalized_odds_difference(y_true, y_pred, sensitive_features=group))
    assert len(caught) == 1 and caught[0].filename == __file__
    options = {"sensitive_features": group}
    assert equalized_odds_difference(y_true, y_pred, **options, undefined="omit") == 0.5  # 1/2, 1; and 0, 0, 1/2
    assert equalized_odds_difference(y_true, y_pred, **options, undefined="zero") == 1
    with pytest.warns(UserWarning, match="group 'b' has no true positive rate"):  # only one is left
        left = equalized_odds_difference(y_true[:4] + [0], y_pred[:5], sensitive_features=group[:5], undefined="omit")
    assert math.isnan(left)


def test_a_group_without_inputs_has_no_selection_rate():
    here = Attribute(("a", "b", "c"), torch.eye(3, dtype=torch.bool)[[0, 0, 1, 1]])
    y = [0, 1, 1, 1]
    with pytest.warns(UserWarning, match="demographic_parity_difference is NaN: no input is in group 'c'"):
        assert math.isnan(demographic_parity_difference(y, y, sensitive_features=here))
    assert demographic_parity_difference(y, y, sensitive_features=here, undefined="omit") == 0.5
    assert demographic_parity_difference(y, y, sensitive_features=here, undefined="zero") == 0.5  # fairlearn sees two


# ---- Weights, intersections and metrics of one's own -----------------------------------------------------------------

def by_definition(metric, y_true, y_pred, groups, weight, omit=False):
    """The differences of one class against the rest by loops: groups is a list of bool [n]."""
    def rate(selected, among):
        return weight[selected & among].sum() / weight[among].sum() if weight[among].sum() else math.nan

    def spread(rates):
        rates = [one for one in rates if not (omit and math.isnan(one))]
        return math.nan if any(map(math.isnan, rates)) or len(rates) < 2 else max(rates) - min(rates)

    seen = weight > 0
    labels = set(y_true[seen]) if metric is equalized_odds_difference else {*y_true[seen], *y_pred[seen]}
    found = []
    for k in labels:
        if metric is demographic_parity_difference:
            found.append(spread([rate(y_pred == k, here) for here in groups]))
        else:
            found.append(max(spread([rate(y_pred == k, here & (y_true == k)) for here in groups]),
                             spread([rate(y_pred == k, here & (y_true != k)) for here in groups])))
    return np.mean(found)


@both
def test_weights_are_fairlearns(metric):
    rng = np.random.default_rng(20)
    for _ in range(20):
        y_true, y_pred, group = random_sample(rng, 60, 2, 3, 0.6)
        weight = rng.exponential(size=60) * (rng.random(60) < 0.8)
        seen = weight > 0
        expected = METRICS[metric](y_true[seen], y_pred[seen], sensitive_features=group[seen],
                                   sample_weight=weight[seen])
        found = metric(y_true, y_pred, sensitive_features=group, sample_weight=weight, undefined="zero")
        assert found == pytest.approx(expected, abs=1e-12)


@both
@given(seed=st.integers(0, 10_000), classes=st.integers(3, 5))
def test_weights_of_several_classes_are_those_of_the_definition(metric, seed, classes):
    rng = np.random.default_rng(seed)
    y_true, y_pred, group = random_sample(rng, 80, classes, 3)
    weight = rng.random(80) * rng.integers(0, 2, 80)
    found = quiet(metric, y_true, y_pred, sensitive_features=group, sample_weight=weight)
    expected = by_definition(metric, y_true, y_pred, [group == g for g in range(3)], weight)
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@both
@given(sample=samples(), data=st.data())
def test_a_whole_weight_is_as_many_inputs(metric, sample, data):
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(sample[0]), max_size=len(sample[0]))))
    assume(len(set(sample[2][times > 0])) > 1)
    weighted = quiet(metric, *sample[:2], sensitive_features=sample[2], sample_weight=times / 7, undefined="omit")
    y_true, y_pred, group = (np.repeat(one, times) for one in sample)
    repeated = quiet(metric, y_true, y_pred, sensitive_features=group, undefined="omit")
    assert weighted == pytest.approx(repeated, nan_ok=True)


def several_features(rng, n):
    return {"sex": rng.choice(["F", "M"], n), "age": rng.integers(0, 3, n), "town": rng.random(n) < 0.5}


@both
@pytest.mark.parametrize("weighted", [False, True])
def test_intersections_are_fairlearns(metric, weighted):
    rng = np.random.default_rng(21)
    for n in (15, 60, 400):  # the smaller ones have empty intersections, which fairlearn leaves out
        y_true, y_pred, _ = random_sample(rng, n, 2, 2, 0.6)
        features, more = several_features(rng, n), {"sample_weight": rng.random(n)} if weighted else {}
        expected = METRICS[metric](y_true, y_pred, sensitive_features=pandas.DataFrame(features), **more)
        rows = [list(row) for row in zip(*(values.tolist() for values in features.values()))]
        for given_as in (features, pandas.DataFrame(features), rows):
            found = metric(y_true, y_pred, sensitive_features=given_as, undefined="zero", **more)
            assert found == pytest.approx(expected, abs=1e-12)
        if n == 400:
            assert found == metric(y_true, y_pred, sensitive_features=features, **more)


def test_empty_intersections_are_named():
    features = {"sex": ["F", "F", "M", "M"], "age": ["old", "young", "old", "old"]}
    with pytest.warns(UserWarning, match=r"is NaN: no input is in group \('M', 'young'\)"):
        assert math.isnan(demographic_parity_difference(*GOOD, sensitive_features=features))
    rows = group_table(*GOOD, sensitive_features=features)
    assert {row["group"]: row["n"] for row in rows} == {("F", "old"): 1, ("F", "young"): 1, ("M", "old"): 2,
                                                      ("M", "young"): 0}
    assert str(rows[-1]["accuracy"]) == "–"
    assert demographic_parity_difference(*GOOD, sensitive_features=features, undefined="omit") == 1


def test_one_feature_by_name_is_that_feature():
    y_true, y_pred, group = random_sample(np.random.default_rng(22), 90, 3, 3)
    for given_as in ({"g": group}, group[:, None], torch.from_numpy(group)[:, None]):
        assert group_table(y_true, y_pred, sensitive_features=given_as) == group_table(y_true, y_pred,
                                                                                      sensitive_features=group)


@both
def test_intersections_with_an_attribute_of_several_groups(metric):
    rng = np.random.default_rng(23)
    y_true, y_pred, group = random_sample(rng, 300, 3, 2)
    member = rng.random((300, 3)) < 0.4
    features = {"group": group, "named": Attribute(("a", "b", "c"), torch.from_numpy(member))}
    groups = [(group == g) & column for g in (0, 1) for column in member.T]
    found = metric(y_true, y_pred, sensitive_features=features)
    assert found == pytest.approx(by_definition(metric, y_true, y_pred, groups, np.where(member.any(1), 1.0, 0.0)))
    rows = group_table(y_true, y_pred, sensitive_features=features)
    assert [row["group"] for row in rows] == list(itertools.product((0, 1), "abc"))
    assert [row["n"] for row in rows] == [here.sum() for here in groups]


OWN = {"accuracy": (skmetrics.accuracy_score, False), "recall": (skmetrics.recall_score, False),
       "error": (skmetrics.mean_absolute_error, True), "area": (skmetrics.roc_auc_score, True)}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("weighted", [False, True])
def test_any_metric_is_that_of_a_metric_frame(name, weighted):
    metric, scores = OWN[name]
    rng = np.random.default_rng(24)
    y_true, y_pred, _ = random_sample(rng, 300, 2, 2)
    y_pred = rng.random(300) if scores else y_pred
    features, weight = several_features(rng, 300), rng.random(300)
    del features["town"]  # six groups: scikit-learn takes milliseconds for each
    more = {"sample_weight": weight} if weighted else {}
    frame = fairlearn.MetricFrame(metrics=metric, y_true=y_true, y_pred=y_pred,
                                  sensitive_features=pandas.DataFrame(features), sample_params=more)
    found = group_difference(metric, torch.from_numpy(y_true), y_pred, sensitive_features=features, **more)
    assert found == pytest.approx(frame.difference())
    estimate = difference_interval(metric, y_true, y_pred, sensitive_features=features, draws=20, **more)
    assert estimate.value == found and estimate.low <= found <= estimate.high


def selection_rate(y_true, y_pred, sample_weight=None):
    return np.average(y_pred == 1, weights=sample_weight)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_metric_of_ones_own_has_the_interval_and_chance_of_the_one_that_counts(weighted):
    rng = np.random.default_rng(25)
    y_true, y_pred, group = random_sample(rng, 400, 2, 3)
    about = {"sensitive_features": group, "sample_weight": rng.random(400) if weighted else None}
    assert group_difference(selection_rate, y_true, y_pred, **about) == pytest.approx(
        demographic_parity_difference(y_true, y_pred, **about))
    own, counted = (difference_interval(metric, y_true, y_pred, **about, draws=1500)
                    for metric in (selection_rate, demographic_parity_difference))
    assert own[:3] == pytest.approx(counted[:3], abs=0.02)
    own, counted = (chance_level(metric, y_true, y_pred, **about, draws=1500)
                    for metric in (selection_rate, demographic_parity_difference))
    assert own == pytest.approx(counted, abs=0.01)


def numbers(found):
    """The numbers of a Difference or of a Chance in one list."""
    return [number for part in found for number in (part if isinstance(part, tuple) else [part])]


@both
def test_weights_of_one_have_the_interval_and_chance_of_none(metric):
    """Inputs drawn one by one, and tables of them, have one distribution."""
    y_true, y_pred, group = random_sample(np.random.default_rng(26), 300, 3, 3)
    about = {"sensitive_features": group, "draws": 2000}
    for of, near in ((difference_interval, 0.015), (chance_level, 0.008)):
        found, expected = (numbers(of(metric, y_true, y_pred, **about, sample_weight=weight))
                           for weight in (np.ones(300), None))
        assert found == pytest.approx(expected, abs=near)


def test_the_weighted_interval_is_that_of_two_weighted_proportions():
    y_true, y_pred, group = two_groups((300, 150), (500, 600))
    weight = np.tile([0.5, 1.5], 550)
    found = difference_interval(demographic_parity_difference, y_true, y_pred, sensitive_features=group, draws=3000,
                                sample_weight=weight)
    # The ratio estimator's variance: sum w^2 (x - p)^2 / (sum w)^2, with 1.25 the mean of the squared weights.
    half = stats.norm.ppf(0.975) * math.sqrt(1.25 * (0.6 * 0.4 / 500 + 0.25 * 0.75 / 600))
    assert (found.value, found.low, found.high) == pytest.approx((0.35, 0.35 - half, 0.35 + half), abs=0.005)


def test_weighted_chance_moves_predictions_within_their_class():
    """Of six inputs, by enumeration: predictions change places within the true class, weights do not."""
    y_true, y_pred, group = np.array([1, 1, 1, 0, 0, 0]), np.array([1, 0, 1, 1, 0, 0]), np.array([0, 0, 1, 0, 1, 1])
    weight, values = np.array([1.0, 2.0, 3.0, 0.5, 2.0, 4.0]), []
    for order in itertools.product(itertools.permutations(range(3)), itertools.permutations(range(3, 6))):
        values.append(equalized_odds_difference(y_true, y_pred[np.concatenate(order)], sensitive_features=group,
                                                sample_weight=weight))
    found = chance_level(equalized_odds_difference, y_true, y_pred, sensitive_features=group, sample_weight=weight,
                         draws=4000)
    assert found.mean == pytest.approx(np.mean(values), abs=4 * np.std(values) / math.sqrt(4000))


def test_a_metric_that_is_undefined_is_named_or_left_out():
    def recall(y_true, y_pred):
        return y_pred[y_true == 1].mean() if (y_true == 1).any() else math.nan

    y_true, y_pred, group = np.array([1, 1, 0, 0, 1, 1]), np.array([1, 0, 1, 0, 1, 1]), ["a", "a", "b", "b", "c", "c"]
    with pytest.warns(UserWarning, match=r"^recall is NaN: of group 'b' \(2 inputs\) it is NaN$"):
        assert math.isnan(group_difference(recall, y_true, y_pred, sensitive_features=group))
    assert group_difference(recall, y_true, y_pred, sensitive_features=group, undefined="omit") == 0.5
    assert group_difference(recall, y_true, y_pred, sensitive_features=group, undefined="zero") == 1
    with pytest.warns(UserWarning, match="recall is NaN"):
        assert np.isnan(chance_level(recall, y_true, y_pred, sensitive_features=group, draws=5)).all()
    found = difference_interval(recall, y_true, y_pred, sensitive_features=group, undefined="omit", draws=200)
    assert 0 < found.n < 200 and 0 <= found.low <= found.high


def test_differences_of_ones_own_may_be_above_one():
    y_true, y_pred, group = np.zeros(200), np.repeat([1.0, 11.0], 100), np.repeat([0, 1], 100)
    y_pred += np.random.default_rng(27).normal(size=200)
    found = difference_interval(skmetrics.mean_absolute_error, y_true, y_pred, sensitive_features=group, draws=300)
    assert found.low < found.value < found.high and found.value == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize("of", [difference_interval, chance_level])
def test_draws_of_inputs_come_from_the_seed(of):
    y_true, y_pred, group = random_sample(np.random.default_rng(28), 100, 2, 3)
    first, again, other = (of(selection_rate, y_true, y_pred, sensitive_features=group, draws=np.int64(30), seed=seed)
                           for seed in (np.int64(3), 3, 4))
    assert first == again != other


def test_the_table_of_weighted_inputs():
    y_true, y_pred, group = random_sample(np.random.default_rng(29), 200, 2, 2)
    weight = np.random.default_rng(30).exponential(size=200)
    for row, g in zip(group_table(y_true, y_pred, sensitive_features=group, sample_weight=weight), (0, 1)):
        here = group == g
        assert (row["n"], row["positives"]) == (here.sum(), (here & (y_true == 1)).sum())
        for name, part, whole in (("selection rate", y_pred == 1, here), ("accuracy", y_true == y_pred, here),
                                  ("true positive rate", y_pred == 1, here & (y_true == 1)),
                                  ("false positive rate", y_pred == 1, here & (y_true == 0))):
            p = np.average(part[whole], weights=weight[whole])
            effective = weight[whole].sum()**2 / sum(weight[whole]**2)
            assert row[name].value == pytest.approx(p)
            # Wilson's bounds are where the score test just rejects.
            for bound in (row[name].low, row[name].high):
                assert (p - bound)**2 == pytest.approx(stats.norm.ppf(0.975)**2 * bound * (1 - bound) / effective)
    plain, equal = (group_table(y_true, y_pred, sensitive_features=group, sample_weight=weights)
                    for weights in (None, np.full(200, 0.3)))
    for one, other in zip(plain, equal):
        for name, value in one.items():
            assert other[name] == pytest.approx(value)


# ---- Intervals and chance --------------------------------------------------------------------------------------------

def two_groups(selected, sizes):
    y_pred = np.concatenate([np.arange(n) < k for k, n in zip(selected, sizes)]).astype(int)
    return np.zeros_like(y_pred), y_pred, np.repeat([0, 1], sizes)


def test_the_interval_of_a_clear_difference_is_that_of_two_proportions():
    y_true, y_pred, group = two_groups((300, 150), (500, 600))
    found = difference_interval(demographic_parity_difference, y_true, y_pred, sensitive_features=group, draws=4000)
    half = stats.norm.ppf(0.975) * math.sqrt(0.6 * 0.4 / 500 + 0.25 * 0.75 / 600)
    assert found.value == pytest.approx(0.35) and found.n == 4000
    assert (found.low, found.high) == pytest.approx((0.35 - half, 0.35 + half), abs=0.003)


@pytest.mark.parametrize("rates", [[0.3] * 2, [0.3] * 5, [0.3] * 10, [0.1] + [0.3] * 4, [0.2, 0.6]])
@both
def test_the_interval_covers_the_difference_of_the_population_and_the_correction_takes_bias_off(metric, rates):
    """Percentiles of the bootstrap, moved onto the value, covered a difference of 0 of 2, 5 and 10 groups in 82, 29 and
    2 % of samples: a largest minus smallest rate is biased, and a bootstrap adds its own noise to the bias."""
    rng, truth = np.random.default_rng(3), max(rates) - min(rates)
    group = np.repeat(np.arange(len(rates)), 100)
    y_true = np.tile([0, 1], len(group) // 2)  # so that the rates of mistakes are the same in both classes
    found = []
    for _ in range(200):
        selected = rng.random(len(group)) < np.array(rates)[group]
        found.append(difference_interval(metric, y_true, selected.astype(int), sensitive_features=group, draws=200))
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert covered >= 0.9 and all(0 <= one.low <= one.value <= one.high <= 1 for one in found)
    raw, corrected = (np.mean([getattr(one, name) for one in found]) - truth for name in ("value", "corrected"))
    # The wider of two differences is biased even where two groups differ.
    assert abs(corrected) < 0.01 or corrected < 0.85 * raw


def test_draws_in_which_a_rate_is_undefined_are_left_out_and_counted():
    y_true, y_pred, group = [1, 0, 0, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1, 0, 0], [0] * 5 + [1] * 3
    found = difference_interval(equalized_odds_difference, y_true, y_pred, sensitive_features=group)
    defined = 1 - (7 / 8) ** 8  # of the first group's one positive
    assert 0.3 < found.n / 1000 < defined and 0 <= found.low <= found.high <= 1
    with pytest.warns(UserWarning, match="no true positive rate"):
        never = difference_interval(equalized_odds_difference, [0] * 5 + y_true[5:], y_pred, sensitive_features=group)
    assert np.isnan([*never[:4], *never.chance]).all() and str(never) == "–"


def test_chance_between_two_groups_is_hypergeometric():
    y_true, y_pred, group = two_groups((9, 4), (20, 30))
    k = np.arange(14)
    weight = stats.hypergeom(50, 13, 20).pmf(k)
    differences = np.abs(k / 20 - (13 - k) / 30)
    found = chance_level(demographic_parity_difference, y_true, y_pred, sensitive_features=group, draws=20_000)
    assert found.mean == pytest.approx(weight @ differences, abs=4 * differences.std() / math.sqrt(20_000))
    below = [weight[differences <= found.high + shift].sum() for shift in (1e-9, -1e-9)]
    assert below[0] >= 0.945 and below[1] <= 0.955


@both
def test_chance_is_that_of_a_loop_that_moves_groups(metric):
    """Of a three-class attribute with inputs of several groups and of none."""
    rng = np.random.default_rng(4)
    y_true, y_pred, _ = random_sample(rng, 300, 3, 2)
    member = torch.from_numpy(rng.random((300, 3)) < 0.5)
    kept = member.any(1).numpy()
    strata = y_true if metric is equalized_odds_difference else np.zeros_like(y_true)
    moved = []
    for _ in range(1500):
        order = np.arange(300)
        for k in set(strata):
            chosen = np.flatnonzero(kept & (strata == k))
            order[chosen] = rng.permutation(chosen)
        moved.append(metric(y_true, y_pred, sensitive_features=Attribute(("a", "b", "c"), member[order])))
    found = chance_level(metric, y_true, y_pred, sensitive_features=Attribute(("a", "b", "c"), member), draws=4000)
    assert found.mean == pytest.approx(np.mean(moved), abs=4 * np.std(moved) * math.sqrt(1 / 1500 + 1 / 4000))
    assert found.high == pytest.approx(np.quantile(moved, 0.95), rel=0.06)


@both
def test_chance_grows_with_the_groups_and_as_the_sample_shrinks(metric):
    rng = np.random.default_rng(5)
    y_true, y_pred, group = random_sample(rng, 4000, 2, 10)
    full, fewer, smaller = (chance_level(metric, y_true[:n], y_pred[:n], sensitive_features=names[:n]).mean
                            for n, names in ((4000, group), (4000, group % 2), (1000, group)))
    assert fewer < full < smaller
    assert smaller / full == pytest.approx(2, rel=0.15)  # one over the root of n


def test_chance_reads_as_per_cent():
    assert str(Chance(0.0123, 0.0456)) == "1.2, up to 4.6"
    assert str(Chance(math.nan, math.nan)) == "–"


def test_a_perfect_predictor_has_equal_odds_by_chance_too():
    y_true, _, group = random_sample(np.random.default_rng(6), 200, 3, 4)
    assert chance_level(equalized_odds_difference, y_true, y_true, sensitive_features=group) == (0, 0)


@both
@pytest.mark.parametrize("of", [difference_interval, chance_level])
def test_draws_come_from_the_seed_and_not_from_the_memory(metric, of, monkeypatch):
    y_true, y_pred, group = random_sample(np.random.default_rng(7), 300, 2, 3)
    arguments = metric, y_true, y_pred
    first, other = (of(*arguments, sensitive_features=group, draws=100, seed=seed) for seed in (0, 1))
    assert first == of(*arguments, sensitive_features=group, draws=100) != other
    monkeypatch.setattr(fairness, "CHUNK", 1)
    one_by_one = of(*arguments, sensitive_features=group, draws=100)
    one_by_one, first = numbers(one_by_one), numbers(first)
    assert one_by_one == pytest.approx(first, rel=0.2)  # where inputs are exchanged, strata take turns
    if of is difference_interval:
        assert one_by_one[:4] == pytest.approx(first[:4], rel=1e-12)


# ---- The table -------------------------------------------------------------------------------------------------------

def test_the_table_is_fairlearns_with_wilsons_intervals():
    y_true, y_pred, group = random_sample(np.random.default_rng(8), 300, 2, 3)
    names = np.array(["red", "green", "blue"])[group]
    rates = {"selection rate": fairlearn.selection_rate, "true positive rate": fairlearn.true_positive_rate,
             "false positive rate": fairlearn.false_positive_rate, "n": fairlearn.count,
             "accuracy": lambda a, b: np.mean(a == b)}
    expected = fairlearn.MetricFrame(metrics=rates, y_true=y_true, y_pred=y_pred, sensitive_features=names).by_group
    rows = group_table(y_true, y_pred, sensitive_features=names, confidence=0.9)
    assert [row["group"] for row in rows] == sorted(set(names))
    for row in rows:
        here = names == row["group"]
        assert row["positives"] == y_true[here].sum() and row["positives"] + row["negatives"] == row["n"]
        for name in rates:
            value = row[name] if name == "n" else row[name].value
            assert value == pytest.approx(expected.loc[row["group"], name])
        found = int(y_pred[here & (y_true == 1)].sum()), int(row["positives"])
        wilson = proportion_interval(*found, 0.9)
        assert row["true positive rate"] == (wilson.mean, wilson.low, wilson.high, wilson.n)


def test_of_several_classes_the_table_shows_the_accuracy_or_one_against_the_rest():
    y_true, y_pred, group = random_sample(np.random.default_rng(9), 400, 4, 2)
    plain = group_table(y_true, y_pred, sensitive_features=group)
    chosen = group_table(y_true, y_pred, sensitive_features=group, positive=2)
    against = group_table(y_true == 2, y_pred == 2, sensitive_features=group)
    for row, with_rates, binary, number in zip(plain, chosen, against, (0, 1)):
        assert list(row) == ["group", "n", "accuracy"]
        assert row["accuracy"].value == pytest.approx(np.mean((y_true == y_pred)[group == number]))
        assert {**binary, "accuracy": row["accuracy"]} == with_rates


def test_the_table_is_shown_in_per_cent():
    attribute = Attribute(("women", "men", "nobody"), torch.tensor([[True, True, False]] * 4 + [[False, True, False]]))
    rows = group_table([1, 1, 0, 0, 0], [1, 0, 0, 0, 1], sensitive_features=attribute)
    assert str(rows[0]["selection rate"]) == "25.0 [4.6, 69.9]" and rows[0]["accuracy"].n == 4
    html = table(rows).data
    assert "25.0 [4.6, 69.9]" in html and html.count("<td>–</td>") == 4


# ---- Individuals -----------------------------------------------------------------------------------------------------

def batch(rng, n):
    return torch.from_numpy(rng.dirichlet(np.ones(3), n)), torch.from_numpy(rng.random((n, 2, 4, 4)))


def test_all_pairs_are_a_double_loop():
    outputs, inputs = batch(np.random.default_rng(10), 12)
    for name, apart in (("total_variation", lambda a, b: float((a - b).clamp(min=0).sum())), ("euclidean", math.dist)):
        ratios = [apart(outputs[i], outputs[j]) / math.dist(inputs[i].flatten(), inputs[j].flatten())
                  for i in range(12) for j in range(i)]
        found = individual_fairness(outputs, inputs, output_distance=name, pairs="all")
        assert found == pytest.approx((np.mean(ratios), np.std(ratios, ddof=1), max(ratios), 66, 0, 0, 0))


@pytest.mark.parametrize("n", range(2, 10))
def test_pairs_are_distinct_and_any_number_of_all(n):
    seen = []

    def record(a, b):
        seen.extend(map(frozenset, zip(a[:, 0].tolist(), b[:, 0].tolist())))
        return a[:, 0] * 0 + 1.0

    every = set(map(frozenset, itertools.combinations(range(n), 2)))
    for pairs in ("all", 10_000, max(1, len(every) // 2)):
        seen.clear()
        found = individual_fairness(torch.arange(n), torch.arange(n), output_distance=record, pairs=pairs)
        assert found.pairs == len(seen) == len(set(seen)) == min(len(every), pairs if pairs != "all" else len(every))
        assert set(seen) <= every and (pairs != "all" or set(seen) == every)


def test_random_pairs_are_a_fair_sample_of_all():
    outputs, inputs = batch(np.random.default_rng(11), 300)
    every = individual_fairness(outputs, inputs, pairs="all")
    drawn, again, other = (individual_fairness(outputs, inputs, pairs=4000, seed=seed) for seed in (0, 0, 1))
    assert drawn == again != other and drawn.largest <= every.largest
    # Pairs share inputs, so that the mean of the pairs varies by more than the root of their number says.
    assert drawn.mean == pytest.approx(every.mean, abs=5 * every.sd / math.sqrt(4000))


@pytest.mark.parametrize("pairs", ["all", 500, np.random.default_rng(0).integers(0, 50, (300, 2))])
def test_memory_does_not_matter(pairs, monkeypatch):
    outputs, inputs = batch(np.random.default_rng(12), 50)
    at_once = individual_fairness(outputs, inputs, pairs=pairs)
    for chunk in (1, 35 * 7, 35 * 100):
        monkeypatch.setattr(fairness, "CHUNK", chunk)
        assert individual_fairness(outputs, inputs, pairs=pairs) == pytest.approx(at_once)


@given(st.floats(0.01, 100), st.integers(0, 100))
@examples(1 / 3)
def test_a_scaled_rotation_has_its_scale_everywhere(scale, seed):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(20, 5))
    outputs = scale * inputs @ stats.ortho_group(5).rvs(random_state=rng) + 3
    found = individual_fairness(outputs, inputs, output_distance="euclidean")
    assert (found.mean, found.largest, found.sd) == pytest.approx((scale, scale, 0), rel=1e-9, abs=1e-9 * scale)
    # The unit is one over that of the inputs.
    pixels = individual_fairness(outputs, 255 * inputs, output_distance="euclidean")
    assert pixels.mean == pytest.approx(scale / 255)


def test_pairs_at_distance_zero_are_left_out_and_counted():
    inputs = torch.tensor([[0], [0], [200], [10], [0]], dtype=torch.uint8)
    outputs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 1.0]])
    found = individual_fairness(outputs, inputs, pairs=[[0, 1], [0, 4], [2, 2], [3, 2], [0, 2], [2, 3]])
    assert found[3:] == (3, 1, 2, 1) and found.largest == pytest.approx(1 / 200)
    assert found.mean == pytest.approx((2 * 0.5 / 190 + 1 / 200) / 3)  # in unsigned bytes, 10 - 200 is 66


def test_distances_may_be_functions():
    outputs, inputs = batch(np.random.default_rng(13), 10)
    named = individual_fairness(outputs, inputs, output_distance="euclidean")
    found = individual_fairness(outputs, inputs, output_distance=lambda a, b: (a - b).norm(dim=1),
                                input_distance=lambda a, b: 2 * (a - b).flatten(1).norm(dim=1))
    assert found.mean == pytest.approx(named.mean / 2)


# ---- Bad input -------------------------------------------------------------------------------------------------------

GOOD = [0, 1, 1, 0], [0, 1, 0, 0]
FOUR = torch.full((4, 2), 0.5)
NAN = torch.tensor([[0.5, 0.5], [math.nan, 0.5], [0.5, 0.5], [0.5, 0.5]])
AB = ["a", "a", "b", "b"]


@both
@pytest.mark.parametrize("labels, group, options, message", [
    (([0, 1], [0, 1, 1]), AB, {}, "y_true has 2 labels, y_pred has 3: expected the same number"),
    (GOOD, ["a", "b"], {}, "sensitive_features has 2 inputs, y_true has 4"),
    (GOOD, Attribute(("a", "b"), torch.ones(3, 2).bool()), {}, "is bool [3, 2]: expected bool [4, 2]"),
    (GOOD, Attribute(("a", "b"), torch.ones(4, 2)), {}, "float32 [4, 2]: expected bool [4, 2]"),
    (GOOD, ["a"] * 4, {}, "groups of sensitive_features with an input: 1, expected at least two"),
    (GOOD, Attribute(("a", "b"), torch.eye(2).bool()[[0, 0, 0, 0]]), {}, "with an input: 1"),
    (GOOD, Attribute(("a", "b"), torch.zeros(4, 2).bool()), {}, "with an input: 0"),
    (GOOD, [AB], {}, "sensitive_features has the shape [1, 4]"),
    (GOOD, {}, {}, "sensitive_features has no features"), (GOOD, [[]] * 4, {}, "sensitive_features has no features"),
    (GOOD, {"sex": AB, "age": AB[1:]}, {}, "sensitive_features['age'] has 3 inputs, y_true has 4"),
    (GOOD, {"sex": AB, "age": [1, 2, math.nan, 2]}, {}, "sensitive_features['age'] is nan for input 2"),
    (GOOD, {"sex": ["a"] * 4, "age": [1] * 4}, {}, "groups of sensitive_features with an input: 1"),
    (GOOD, [["a", 1], ["b", 2], ["a", None], ["b", 1]], {}, "sensitive_features is None for input 2"),
    (GOOD, AB, {"sample_weight": [1, 1, 1]}, "sample_weight is int64 [3]: expected a number for each input, [4]"),
    (GOOD, AB, {"sample_weight": [1, -0.5, 1, 1]}, "sample_weight is -0.5 for input 1: expected a finite number"),
    (GOOD, AB, {"sample_weight": [1, 1, math.inf, 1]}, "sample_weight is inf for input 2"),
    (GOOD, AB, {"sample_weight": ["1"] * 4}, "sample_weight is <U1 [4]"),
    (GOOD, AB, {"sample_weight": [1, 1, 0, 0]}, "groups of sensitive_features with an input: 1"),
    (GOOD, ["a", None, "b", "b"], {}, "sensitive_features is None for input 1"),
    (GOOD, [0, 1, math.nan, 1], {}, "sensitive_features is nan for input 2"),
    (GOOD, ["a", "b", math.nan, "a"], {}, "sensitive_features is nan for input 2"),
    (GOOD, ["a", "b", "b", pandas.NA], {}, "sensitive_features is <NA> for input 3"),
    (([], []), [], {}, "y_true is empty"),
    ((GOOD[0], [0.1, 0.9, 0.4, 0.2]), AB, {}, "y_pred is float64: expected integer labels"),
    ((GOOD[0], NAN), AB, {}, "y_pred has the shape [4, 2]: expected [n]"),
    ((["x", "y", "x", "y"], GOOD[1]), AB, {}, "y_true is <U1: expected integer labels"),
    (GOOD, AB, {"undefined": "skip"}, "undefined is 'skip': expected one of nan, omit, zero"),
])
def test_bad_labels_and_groups_are_named(metric, labels, group, options, message):
    for use in (metric, lambda *args, **rest: chance_level(metric, *args, **rest)):
        with pytest.raises(ValueError, match=re.escape(message)):
            use(*labels, sensitive_features=group, **options)


@pytest.mark.parametrize("use, message", [
    (lambda: difference_interval("recall", *GOOD, sensitive_features=AB), "metric is 'recall': expected a function"),
    (lambda: group_difference(lambda a, b: a == b, *GOOD, sensitive_features=AB),
     "the metric gave array([ True,  True]) for group 'a': expected a number"),
    (lambda: group_difference(max, *GOOD, sensitive_features=["a"]), "sensitive_features has 1 inputs, y_true has 4"),
    (lambda: group_difference(max, [0.5], [0.5, 1], sensitive_features=AB), "y_true has 1 labels, y_pred has 2"),
    (lambda: group_difference(max, 0.5, 0.5, sensitive_features=AB), "y_true has the shape []: expected [n, ...]"),
    (lambda: chance_level(demographic_parity_difference, *GOOD, sensitive_features=AB, draws=0), "draws is 0"),
    (lambda: chance_level(demographic_parity_difference, *GOOD, sensitive_features=AB, confidence=95),
     "confidence is 95"),
    (lambda: group_table(*GOOD, sensitive_features=AB, positive=3), "positive is 3: expected a class of y_true or "),
    (lambda: group_table(*GOOD, sensitive_features=AB, confidence=0), "confidence is 0"),
    (lambda: individual_fairness(FOUR, torch.rand(3, 5)), "outputs has 4 rows, inputs has 3"),
    (lambda: individual_fairness(FOUR[:1], torch.rand(1, 5)), "at least two"),
    (lambda: individual_fairness([], []), "outputs has the shape [0]"),
    (lambda: individual_fairness(NAN, torch.rand(4, 5)), "row 1 of outputs is not finite"),
    (lambda: individual_fairness(FOUR, NAN), "row 1 of inputs is not finite"),
    (lambda: individual_fairness(4 * FOUR, torch.rand(4, 5)), "rows of probabilities that add up to 1"),
    (lambda: individual_fairness(FOUR, FOUR, output_distance="cosine"), "output_distance is 'cosine': expected eucl"),
    (lambda: individual_fairness(FOUR, FOUR, input_distance="l2"), "input_distance is 'l2'"),
    (lambda: individual_fairness(FOUR, torch.rand(4, 5), output_distance=lambda a, b: a - b),
     "output_distance gave torch.float32 [6, 2] for 6 pairs"),
    (lambda: individual_fairness(FOUR, torch.rand(4, 5), input_distance=lambda a, b: -a[:, 0]), "of at least 0"),
    (lambda: individual_fairness(FOUR, torch.rand(4, 5), pairs=0), "pairs is 0"),
    (lambda: individual_fairness(FOUR, torch.rand(4, 5), pairs="some"), "pairs is 'some'"),
    (lambda: individual_fairness(FOUR, torch.rand(4, 5), pairs=[[0, 1, 2]]), "pairs is int64 [1, 3]"),
    (lambda: individual_fairness(FOUR, torch.rand(4, 5), pairs=[[0.0, 1.0]]), "pairs is float64"),
    (lambda: individual_fairness(FOUR, torch.rand(4, 5), pairs=[[0, 4]]), "pairs names input 4: expected 0 to 3"),
    (lambda: individual_fairness(FOUR, torch.rand(4, 5), pairs=[[-1, 2]]), "pairs names input -1"),
    (lambda: individual_fairness(FOUR, torch.ones(4, 5)), "0 are of an input with itself and 6 of identical inputs"),
])
def test_bad_input_is_named(use, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        use()
