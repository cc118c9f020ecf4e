"""Comparisons over seeds: means with intervals, and differences between methods that share their seeds.

Two methods run from the same seed share the dense networks, the data order and the split. The seed is therefore a
block, and what is compared is the difference within it.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean over ``n`` values with its standard deviation (n - 1) and a confidence interval [low, high]."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


class Paired(NamedTuple):
    """A paired comparison a - b over ``n`` blocks.

    ``difference`` is the mean of a - b with its interval [low, high]; ``wins`` counts the blocks with a > b; ``effect``
    is Hedges' g of the differences (their mean over their standard deviation, corrected for small n); ``p`` belongs to
    the paired t-test, ``p_sign`` to the exact sign-flip test, which assumes no normal distribution.
    """

    difference: float
    low: float
    high: float
    wins: int
    effect: float
    p: float
    p_sign: float
    n: int


def mean_interval(values, confidence=0.95):
    """Mean of independent values with Student's t interval.

    Parameters
    ----------
    values : array-like, shape [n]
        At least two finite values; the interval's unit is theirs.
    confidence : float
        In (0, 1).

    Returns
    -------
    Interval

    Raises
    ------
    ValueError
        If there are fewer than two values, or one is not finite.
    """
    values = _checked(values, confidence)
    n, mean, sd = len(values), float(values.mean()), float(values.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(mean, sd, mean - half, mean + half, n)


def paired_comparison(a, b, confidence=0.95):
    """Compare two methods over blocks (seeds) that they share.

    Parameters
    ----------
    a, b : array-like, shape [n]
        One value per block, in the same order; at least two blocks.
    confidence : float
        In (0, 1).

    Returns
    -------
    Paired
        ``p_sign`` enumerates all 2^n signs (Fisher's randomisation test, two-sided), so that its smallest possible
        value is 2 / 2^n: five seeds cannot show less than 0.0625. Above 16 blocks it uses 65,536 seeded draws.
        ``effect`` is 0 for two blocks, where the correction for small n vanishes. It is infinite (and ``p`` zero)
        where all differences are the same and not zero.

    Raises
    ------
    ValueError
        If the lengths differ, there are fewer than two blocks, or a value is not finite.

    References
    ----------
    Hedges, "Distribution theory for Glass's estimator of effect size", 1981 (the small-sample correction).
    """
    a, b = _checked(a, confidence), _checked(b, confidence)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values, b has {len(b)}: a paired comparison needs one of each per block")
    differences = a - b
    mean, sd, low, high, n = mean_interval(differences, confidence)
    # Rounding leaves equal differences a spread of about 1e-16 of their size.
    if sd <= 1e-12 * max(np.abs(a).max(), np.abs(b).max()):
        same = bool(np.allclose(mean, 0, atol=1e-12 * max(np.abs(a).max(), np.abs(b).max(), 1e-300)))
        effect, p = (0.0, 1.0) if same else (math.copysign(math.inf, mean), 0.0)
    else:
        effect = mean / sd * (1 - 3 / (4 * (n - 1) - 1))
        p = float(stats.ttest_rel(a, b).pvalue)
    return Paired(mean, low, high, int((differences > 0).sum()), effect, p, _sign_flip(differences), n)


def proportion_interval(successes, n, confidence=0.95):
    """A proportion with Wilson's score interval, which stays inside [0, 1] and holds for 0 and n successes too.

    Parameters
    ----------
    successes, n : int
        0 <= successes <= n, and n at least 1.
    confidence : float
        In (0, 1).

    Returns
    -------
    Interval
        ``sd`` is that of one trial, sqrt(p (1 - p)).

    Raises
    ------
    ValueError
        If the counts or the confidence are out of range.
    """
    if successes != int(successes) or n != int(n) or not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: expected integers with 0 <= successes <= n and n >= 1")
    _check_confidence(confidence)
    ci = stats.binomtest(int(successes), int(n)).proportion_ci(confidence, method="wilson")
    p = successes / n
    return Interval(p, math.sqrt(p * (1 - p)), float(ci.low), float(ci.high), int(n))


def _checked(values, confidence):
    _check_confidence(confidence)
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"got values of shape {list(values.shape)}: expected at least two in one row")
    if not np.isfinite(values).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    return values


def _check_confidence(confidence):
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected a number in (0, 1)")


def _sign_flip(differences):
    n = len(differences)
    if n <= 16:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], size=(2**16, n))
        signs[0] = 1  # the observed one always counts
    means = np.abs(signs @ differences)
    return float((means >= means[0] * (1 - 1e-12)).mean())
