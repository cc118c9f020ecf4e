"""Statistics against scipy, formulas from the literature, enumeration and simulation."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from permask_core.statistics import mean_interval, paired_comparison, proportion_interval

values = st.lists(st.floats(-100, 100), min_size=2, max_size=8)
confidences = st.floats(0.5, 0.999)


def test_an_interval_by_hand():
    interval = mean_interval([96.3, 96.1, 96.8], 0.95)
    sd = math.sqrt((0.1**2 + 0.3**2 + 0.4**2) / 2)
    half = 4.302653 * sd / math.sqrt(3)  # Student's t with 2 degrees of freedom, from the tables
    assert interval == pytest.approx((96.4, sd, 96.4 - half, 96.4 + half, 3))


@settings(deadline=None)
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


@settings(deadline=None)
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


@settings(deadline=None)
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
])
def test_bad_input_is_named(use, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        use()
