"""Statistics against scipy, formulas from the literature, enumeration and simulation."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import confusion_matrix, recall_score

from permask_core.evaluation.statistics import (
    affected_classes,
    as_labels,
    class_accuracies,
    disagreement_matrix,
    leave_one_out_counts,
    mean_interval,
    paired_comparison,
    proportion_interval,
    welch_comparison,
)

values = st.lists(st.floats(-100, 100), min_size=2, max_size=8)
confidences = st.floats(0.5, 0.999)


def test_an_interval_by_hand():
    interval = mean_interval([96.3, 96.1, 96.8], 0.95)
    sd = math.sqrt((0.1**2 + 0.3**2 + 0.4**2) / 2)
    half = 4.302653 * sd / math.sqrt(3)  # Student's t with 2 degrees of freedom, from the tables
    assert interval == pytest.approx((96.4, sd, 96.4 - half, 96.4 + half, 3))


@given(values, confidences)
def test_an_interval_is_scipys(values, confidence):
    assume(np.std(values) > 1e-6)
    interval = mean_interval(values, confidence)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert interval[2:4] == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9)
    assert interval.sd == pytest.approx(np.std(values, ddof=1)) and interval.n == len(values)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 2, size=(2000, 5))
    for confidence in (0.8, 0.95):
        hits = sum(low <= 3 <= high for _, _, low, high, _ in (mean_interval(row, confidence) for row in draws))
        assert abs(hits / 2000 - confidence) < 4 * math.sqrt(confidence * (1 - confidence) / 2000)


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=7), confidences)
def test_a_paired_comparison_is_scipys_and_an_enumeration(pairs, confidence):
    a, b = np.array(pairs).T
    assume(np.std(a - b) > 1e-6)
    found = paired_comparison(a, b, confidence)
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(confidence)), abs=1e-9)
    assert found.difference == pytest.approx(np.mean(a - b), abs=1e-12)
    assert found.wins == sum(a > b) and found.n == len(pairs)
    totals = [abs(sum(s * d for s, d in zip(signs, a - b))) for signs in itertools.product([1, -1], repeat=len(pairs))]
    assert found.p_sign == np.mean([total >= totals[0] - 1e-12 * abs(a - b).sum() for total in totals])


def test_the_sign_flip_test_is_scipys_permutation_test():
    a, b = [97.0, 96.1, 95.9, 96.6, 97.2], [96.2, 96.3, 94.9, 95.2, 96.0]
    expected = stats.permutation_test((a, b), lambda x, y: np.mean(np.subtract(x, y)), permutation_type="samples")
    assert paired_comparison(a, b).p_sign == expected.pvalue == 0.125


def test_five_seeds_cannot_show_less_than_a_sixteenth():
    assert paired_comparison([1, 2, 3, 4, 5.5], [0, 0, 0, 0, 0]).p_sign == 2 / 2**5


def test_many_blocks_are_drawn_close_to_the_enumeration():
    differences = np.random.default_rng(1).normal(0.3, 1, 18)
    signs = 1 - 2 * ((np.arange(2**18)[:, None] >> np.arange(18)) & 1)
    exact = np.mean(abs(signs @ differences) >= abs(differences.sum()) * (1 - 1e-12))
    drawn, again = (paired_comparison(differences, np.zeros(18)).p_sign for _ in range(2))
    assert drawn == again and abs(drawn - exact) < 5 * math.sqrt(exact / 2**16)


def test_the_effect_is_hedges_g():
    a, b = np.array([3.0, 5, 4, 9]), np.array([1.0, 4, 4, 5])
    correction = math.gamma(3 / 2) / (math.sqrt(3 / 2) * math.gamma(1))  # Hedges' exact one for 3 degrees of freedom
    exact = np.mean(a - b) / np.std(a - b, ddof=1) * correction
    assert paired_comparison(a, b).effect == pytest.approx(exact, rel=0.01)
    assert paired_comparison(b, a).effect == -paired_comparison(a, b).effect


@pytest.mark.parametrize("a, b, effect, p", [
    ([1, 2, 3], [1, 2, 3], 0, 1),
    ([1.1, 2.1, 3.1], [1, 2, 3], math.inf, 0), ([0, 0, 0], [0.3, 0.3, 0.3], -math.inf, 0),
])
def test_equal_differences(a, b, effect, p):
    found = paired_comparison(a, b)
    assert (found.effect, found.p) == (effect, p)
    assert found.p_sign == (1 if effect == 0 else 0.25)
    assert found.low == pytest.approx(found.high)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), confidences)
def test_wilsons_interval_by_its_formula(counts, confidence):
    """Wilson, "Probable inference, the law of succession, and statistical inference", 1927."""
    (successes, n), z = counts, stats.norm.ppf((1 + confidence) / 2)
    p = successes / n
    center, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = proportion_interval(successes, n, confidence)
    assert (found.mean, found.n, found.sd) == (p, n, pytest.approx(math.sqrt(p * (1 - p))))
    assert found.low == pytest.approx((center - half) / (1 + z**2 / n), abs=1e-9)
    assert found.high == pytest.approx((center + half) / (1 + z**2 / n), abs=1e-9)
    assert 0 <= found.low <= p <= found.high <= 1
    scipys = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx(tuple(scipys), abs=1e-12)


# ---- Unpaired --------------------------------------------------------------------------------------------------------

@given(values, values, confidences)
def test_an_unpaired_comparison_is_scipys_and_an_enumeration(a, b, confidence):
    a, b = (np.round(side, 3).tolist() for side in (a, b))  # differences are then the same or clearly not
    assume(np.std(a) > 1e-6 and np.std(b) > 1e-6)
    found = welch_comparison(a, b, confidence)
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(confidence)), rel=1e-6, abs=1e-6)
    assert found.difference == pytest.approx(np.mean(a) - np.mean(b), abs=1e-12)
    assert (found.n_a, found.n_b) == (len(a), len(b))
    if len(a) + len(b) <= 9:
        everything, apart = np.array(a + b), []
        for dealt in itertools.product([True, False], repeat=len(everything)):
            if sum(dealt) == len(a):
                apart.append(abs(everything[np.array(dealt)].mean() - everything[~np.array(dealt)].mean()))
        observed = abs(np.mean(a) - np.mean(b))
        assert found.p_permutation == np.mean(np.array(apart) >= observed - 1e-11 * abs(everything).max())


def test_the_permutation_test_is_scipys():
    a, b = [97.0, 96.1, 95.9, 96.6, 97.2], [96.2, 96.3, 94.9, 95.2, 96.0]
    expected = stats.permutation_test((a, b), lambda x, y: np.mean(x) - np.mean(y))
    found = welch_comparison(a, b).p_permutation
    assert found == pytest.approx(expected.pvalue) and welch_comparison(b, a).p_permutation == found


def test_five_and_five_seeds_can_show_one_in_126():
    assert welch_comparison([6, 7, 8, 9, 10.5], [1, 2, 3, 4, 5]).p_permutation == 2 / math.comb(10, 5)
    assert 2 / math.comb(10, 5) == pytest.approx(0.0079, abs=5e-5)


def test_many_values_are_dealt_close_to_the_enumeration():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.8, 1, 9), rng.normal(0, 1, 10)
    drawn, again = (welch_comparison(a, b).p_permutation for _ in range(2))
    everything = np.concatenate([a, b])
    first = everything[np.array(list(itertools.combinations(range(19), 9)))].sum(1)
    exact = np.mean(abs(first / 9 - (everything.sum() - first) / 10) >= abs(a.mean() - b.mean()) - 1e-12)
    assert drawn == again and abs(drawn - exact) < 5 * math.sqrt(exact / 2**16)


def test_the_unpaired_effect_is_hedges_g():
    a, b = np.array([3.0, 5, 4, 9]), np.array([1.0, 4, 4, 5, 2])
    pooled = math.sqrt((((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / 7)
    correction = math.gamma(7 / 2) / (math.sqrt(7 / 2) * math.gamma(3))  # Hedges' exact one for 7 degrees of freedom
    assert welch_comparison(a, b).effect == pytest.approx((a.mean() - b.mean()) / pooled * correction, rel=0.01)
    assert welch_comparison(b, a).effect == -welch_comparison(a, b).effect


@pytest.mark.parametrize("a, b, effect, p, p_permutation", [
    ([2, 2, 2], [2, 2], 0, 1, 1), ([0.1 + 0.2] * 3, [0.3] * 3, 0, 1, 1), ([0, 0], [0, 0], 0, 1, 1),
    ([3, 3, 3], [2, 2, 2], math.inf, 0, 0.1), ([0, 0], [1e-9, 1e-9], -math.inf, 0, 1 / 3),
])
def test_methods_that_do_not_vary(a, b, effect, p, p_permutation):
    found = welch_comparison(a, b)
    assert (found.effect, found.p, found.low) == (effect, p, found.high)
    assert found.p_permutation == pytest.approx(p_permutation)


# ---- Class by class --------------------------------------------------------------------------------------------------

def seeds(rng, accuracy, n_seeds=5, per_class=100):
    return rng.binomial(per_class, np.clip(accuracy, 0, 1), size=(n_seeds, len(accuracy))) / per_class


def test_class_accuracies_are_scikit_learns_recalls():
    rng = np.random.default_rng(3)
    y_true, y_pred = rng.integers(0, 6, 200), rng.integers(0, 7, (3, 200))
    found = class_accuracies(torch.from_numpy(y_true), y_pred.tolist(), 8)
    assert found.shape == (3, 8) and np.isnan(found[:, 6:]).all()
    for row, predicted in zip(found, y_pred):
        np.testing.assert_allclose(row[:6], recall_score(y_true, predicted, labels=range(6), average=None))
        np.testing.assert_array_equal(row, class_accuracies(y_true, predicted, 8))


@pytest.mark.parametrize("paired", [False, True])
def test_one_class_that_moves_makes_the_others_look_affected_and_leaving_it_out_shows_it(paired):
    generator = np.random.default_rng(11)
    a, b = generator.binomial(2000, np.linspace(0.6, 0.8, 10), (2, 10, 10)) / 2000
    b[:, 4] -= 0.3
    options = {"paired": paired, "correction": "bh"}
    counts = leave_one_out_counts(a, b, **options)
    assert affected_classes(a, b, **options).count == 10 and counts[4] == 0 and np.delete(counts, 4).min() >= 8
    sizes = np.arange(1, 11)
    for k in (0, 4):
        kept = np.arange(10) != k
        expected = affected_classes(a[:, kept], b[:, kept], weights=sizes[kept], **options).count
        assert leave_one_out_counts(a, b, weights=sizes, **options)[k] == expected
    with pytest.raises(ValueError, match="a has 1 class: expected at least two"):
        leave_one_out_counts(a[:, :1], b[:, :1])


@pytest.mark.parametrize("normalize", ["ratio", "difference", "none"])
@pytest.mark.parametrize("weights", [None, [50, 100, 30, 20]])
def test_affected_classes_are_welchs_tests_on_each_seeds_own_scale(normalize, weights):
    rng = np.random.default_rng(4)
    a, b = rng.uniform(0.4, 0.9, (5, 4)), rng.uniform(0.4, 0.9, (3, 4))
    related = [[], []]
    for model, into in zip((a, b), related):
        for seed in model:
            overall = np.average(seed, weights=weights)
            into.append({"ratio": seed / overall, "difference": seed - overall, "none": seed}[normalize])
    expected = stats.ttest_ind(*related, axis=0, equal_var=False)
    found = affected_classes(a, b, normalize=normalize, weights=weights, alpha=0.4)
    np.testing.assert_allclose(found.p, expected.pvalue)
    np.testing.assert_array_equal(found.affected, expected.pvalue < 0.4)
    np.testing.assert_allclose(found.differences, np.mean(related[0], axis=0) - np.mean(related[1], axis=0))
    assert (found.count, found.constant) == (sum(expected.pvalue < 0.4), 0) and found.expected == pytest.approx(1.6)
    for k in range(4):
        alone = welch_comparison([row[k] for row in related[0]], [row[k] for row in related[1]])
        assert (alone.effect, alone.p) == pytest.approx((found.effects[k], found.p[k]))


def test_paired_classes_are_paired_tests_on_each_seeds_own_scale():
    rng = np.random.default_rng(14)
    a = rng.uniform(0.4, 0.9, (6, 5))
    b = a * rng.normal(0.95, 0.05, (6, 5))
    found = affected_classes(a, b, paired=True, alpha=0.3, correction="bh")
    expected = stats.ttest_rel(*(one / one.mean(1, keepdims=True) for one in (a, b)), axis=0)
    np.testing.assert_allclose(found.p, expected.pvalue)
    np.testing.assert_allclose(found.adjusted, stats.false_discovery_control(expected.pvalue))
    alone = paired_comparison(a[:, 1] / a.mean(1), b[:, 1] / b.mean(1))
    assert (found.differences[1], found.effects[1]) == pytest.approx((alone.difference, alone.effect))


def test_pairs_with_much_in_common_are_told_apart_where_welch_cannot():
    """Twenty classes, of which five lose a tenth; the seeds' own profiles vary by more. Nothing is lost in the rest."""
    rng = np.random.default_rng(15)
    welch, paired, wrong = [], [], []
    for _ in range(200):
        parents = rng.uniform(0.6, 0.9, (8, 20))
        children = parents * rng.normal(np.where(np.arange(20) < 5, 0.9, 1), 0.03, (8, 20))
        without = parents * rng.normal(1, 0.03, (8, 20))
        welch.append(affected_classes(parents, children).affected[:5].sum())
        paired.append(affected_classes(parents, children, paired=True).affected[:5].sum())
        wrong.append([affected_classes(parents, without, paired=pairs).count for pairs in (True, False)])
    assert np.mean(welch) < 2 < 4.5 < np.mean(paired)
    by_pairs, by_welch = np.mean(wrong, axis=0)
    assert 0.8 < by_pairs < 1.2 and by_welch < 0.2  # of twenty at 0.05 one is expected


def test_the_overall_accuracy_is_that_of_the_test_set():
    rng = np.random.default_rng(5)
    y_true = rng.choice(3, 500, p=[0.6, 0.3, 0.1])
    y_pred = np.where(rng.random((4, 500)) < [[0.9], [0.8], [0.7], [0.6]], y_true, 0)
    models = class_accuracies(y_true, y_pred, 3)
    found = affected_classes(models[:2], models[2:], weights=np.bincount(y_true))
    ratio = models[:, 1] / (y_pred == y_true).mean(1)
    assert found.differences[1] == pytest.approx(ratio[:2].mean() - ratio[2:].mean())


def test_a_model_that_is_better_on_all_classes_alike_differs_on_none():
    rng = np.random.default_rng(6)
    a = rng.uniform(0.4, 0.6, (5, 50)) * rng.uniform(0.8, 1.1, (5, 1))
    scaled = affected_classes(a, a * [[1.5], [1.4], [1.6], [1.3], [1.2]])
    np.testing.assert_allclose(scaled.p, 1)
    moved = affected_classes(a, a + [[0.2], [0.3], [0.1], [0.2], [0.4]], normalize="difference")
    np.testing.assert_allclose(moved.p, 1)
    assert affected_classes(a, 1.5 * a, normalize="none").count > 40


def test_planted_classes_are_found_where_seeds_differ_as_a_whole():
    """Dividing by the mean accuracy of the seeds would leave their levels, which vary by a quarter, in every class."""
    rng = np.random.default_rng(7)
    profile = rng.uniform(0.5, 0.9, 100)
    planted = np.arange(100) < 4
    a, b = (rng.uniform(0.75, 1, (5, 1)) * profile * rng.normal(1, 0.01, (5, 100)) for _ in range(2))
    b[:, planted] *= 0.9
    corrected = affected_classes(a, b, correction="bh")
    assert corrected.affected[planted].all() and corrected.count <= 5
    assert (corrected.differences[planted] > 0).all() and (corrected.effects[planted] > 2).all()
    by_the_mean = stats.ttest_ind(a / a.mean(), b / b.mean(), axis=0, equal_var=False)
    assert stats.false_discovery_control(by_the_mean.pvalue).min() > 0.05


def test_without_an_effect_about_four_of_a_hundred_classes_are_flagged():
    """Nothing differs here but the seeds: 400 comparisons of five with five, 100 classes of 100 test images."""
    rng = np.random.default_rng(8)
    plain, corrected = [], []
    for _ in range(400):
        truth = rng.beta(8, 3, 100)
        a, b = seeds(rng, truth), seeds(rng, truth)
        plain.append(affected_classes(a, b))
        corrected.append(affected_classes(a, b, correction="bh").count)
    counts = [found.count for found in plain]
    assert 3.9 < np.mean(counts) < 4.8 and 1 <= np.quantile(counts, 0.05) <= np.quantile(counts, 0.95) <= 9
    assert np.mean([found.expected for found in plain]) == pytest.approx(5, abs=0.05)
    assert np.mean(np.array(corrected) > 0) < 0.05


@pytest.mark.parametrize("correction", ["bh", "by"])
def test_corrections_by_their_formula(correction):
    rng = np.random.default_rng(9)
    truth = rng.beta(8, 3, 40)
    found = affected_classes(seeds(rng, truth), seeds(rng, truth - 0.2 * (np.arange(40) < 10)), correction=correction)
    order, factor = np.argsort(found.p), sum(1 / k for k in range(1, 41)) if correction == "by" else 1
    adjusted = [min(1, *(factor * 40 / (j + 1) * found.p[order[j]] for j in range(i, 40)), 2) for i in range(40)]
    np.testing.assert_allclose(found.adjusted[order], adjusted)
    np.testing.assert_array_equal(found.affected, found.adjusted < 0.05)
    assert 0 < found.count == found.affected.sum() < (found.p < 0.05).sum() + 1


def test_classes_that_do_not_vary():
    a = np.array([[1, 1, 0.5, 0.8], [1, 1, 0.6, 0.8], [1, 1, 0.7, 0.8]])
    b = np.array([[1, 0.9, 0.9, 0.1 + 0.2 + 0.5], [1, 0.9, 0.9, 0.8]])
    found = affected_classes(a, b, normalize="none", correction="bh")
    expected = stats.ttest_1samp(a[:, 2], 0.9)  # where only a varies, Welch's test is that of a against b's value
    assert found.p.tolist() == pytest.approx([1, 0, expected.pvalue, 1])
    assert found.effects[[0, 1, 3]].tolist() == [0, math.inf, 0] and found.constant == 2
    assert found.expected == pytest.approx(0.05 * 2)


def test_paired_classes_whose_difference_does_not_vary():
    a = np.array([[0.1, 0.5, 0.3], [0.2, 0.6, 0.9], [0.4, 0.9, 0.1]])
    b = np.array([[0.1, 0.4, 0.2], [0.2, 0.5, 0.9], [0.4, 0.8, 0.3]])
    found = affected_classes(a, b, normalize="none", paired=True)
    assert found.p.tolist() == pytest.approx([1, 0, stats.ttest_rel(a[:, 2], b[:, 2]).pvalue])
    assert found.effects[:2].tolist() == [0, math.inf] and found.constant == 1
    assert found.expected == pytest.approx(0.05 * 2)


def test_the_disagreement_matrix_counts_what_scikit_learn_does():
    rng = np.random.default_rng(10)
    a, b = rng.integers(0, 4, (3, 90)), rng.integers(0, 5, (3, 90))
    found = disagreement_matrix(a, torch.from_numpy(b), 6)
    expected = np.mean([confusion_matrix(x, y, labels=range(6)) / 90 for x, y in zip(a, b)], axis=0)
    np.testing.assert_allclose(found[~np.eye(6, dtype=bool)], expected[~np.eye(6, dtype=bool)])
    assert np.isnan(np.diag(found)).all() and np.nansum(found) == pytest.approx(np.mean(a != b))
    by_hand = disagreement_matrix([0, 0, 1, 1], [0, 1, 1, 0], 2)
    np.testing.assert_array_equal(by_hand, [[math.nan, 0.25], [0.25, math.nan]])


TWO = [[0.5, 0.6], [0.6, 0.7]]


@pytest.mark.parametrize("use, message", [
    (lambda: mean_interval([1.0]), "shape [1]: expected at least two"),
    (lambda: mean_interval([[1.0, 2.0]]), "shape [1, 2]"),
    (lambda: mean_interval([1, 2, math.nan]), "value 2 is not finite"),
    (lambda: mean_interval([1, 2], 95), "confidence is 95"),
    (lambda: mean_interval([1, 2], math.nan), "confidence is nan"),
    (lambda: paired_comparison([1, 2], [1, 2, 3]), "a has 2 values, b has 3"),
    (lambda: paired_comparison([1, 2], [1, math.inf]), "value 1 is not finite"),
    (lambda: proportion_interval(3, 2), "3 successes of 2"), (lambda: proportion_interval(-1, 2), "-1 successes of 2"),
    (lambda: proportion_interval(0, 0), "0 successes of 0"), (lambda: proportion_interval(1, 2, 1), "confidence is 1"),
    (lambda: proportion_interval(2.5, 10), "2.5 successes of 10"),
    (lambda: welch_comparison([1, 2], [1]), "shape [1]: expected at least two"),
    (lambda: welch_comparison([1, math.nan], [1, 2]), "value 1 is not finite"),
    (lambda: welch_comparison([1, 2], [1, 2], 0), "confidence is 0"),
    (lambda: class_accuracies([0, 1, 1], [0, 1], 2), "y_true has 3 labels, y_pred has 2"),
    (lambda: class_accuracies([0, 2], [0, 1], 2), "y_true has the label 2: expected 0 to 1"),
    (lambda: class_accuracies([0, 1], [[0, -1]], 2), "y_pred has the label -1: expected 0 to 1"),
    (lambda: class_accuracies([[0, 1]], [0, 1], 2), "y_true has the shape [1, 2]: expected [n]"),
    (lambda: class_accuracies([0, 1], [[[0, 1]]], 2), "y_pred has the shape [1, 1, 2]: expected [n] or [seeds, n]"),
    (lambda: as_labels("y", []), "y is empty"), (lambda: as_labels("y", [0.0]), "y is float64: expected integer"),
    (lambda: disagreement_matrix([0, 1], [[0, 1]], 2), "a has the shape [2], b has [1, 2]"),
    (lambda: disagreement_matrix([0, 1], [0, 2], 2), "b has the label 2"),
    (lambda: affected_classes([0.5, 0.6], TWO), "a has the shape [2]: expected [seeds, classes]"),
    (lambda: affected_classes(TWO, [[0.5, 0.6]]), "b has the shape [1, 2]: expected [seeds, classes], at least two"),
    (lambda: affected_classes(TWO, [[0.5], [0.6]]), "a has 2 classes, b has 1"),
    (lambda: affected_classes(TWO, [[0.5, 0.6], [math.nan, 0.6]]), "b is nan for seed 1 and class 0"),
    (lambda: affected_classes(TWO, [[0.5, 0.6], [0, 0]]), "the overall accuracy of seed 1 of b is 0"),
    (lambda: affected_classes(TWO, [*TWO, TWO[0]], paired=True), "a has 2 seeds, b has 3: expected the same, to pair"),
    (lambda: affected_classes(TWO, TWO, weights=[1, 2, 3]), "expected 2 numbers of at least 0"),
    (lambda: affected_classes(TWO, TWO, weights=[1, -1]), "expected 2 numbers of at least 0"),
    (lambda: affected_classes(TWO, TWO, weights=[0, 0]), "not all of them 0"),
    (lambda: affected_classes(TWO, TWO, normalize="log"), "normalize is 'log': expected one of ratio, difference, no"),
    (lambda: affected_classes(TWO, TWO, correction="holm"), "correction is 'holm': expected one of none, bh, by"),
    (lambda: affected_classes(TWO, TWO, alpha=5), "alpha is 5"),
])
def test_bad_input_is_named(use, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        use()
