"""Comparisons over seeds, of whole methods and class by class: means with intervals, and differences.

Two methods run from the same seed share the dense networks, the data order and the split. The seed is then a block, and
the methods are compared by the differences within blocks. Methods that share nothing are compared by their means.
Whether a method changes a class is tested for each class separately, and chance alone flags a few classes in a
hundred: the count is returned with the number expected by chance.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy import special  # scipy.stats takes half a second longer to import

NORMALIZATIONS = {"ratio": lambda accuracy, overall: accuracy / overall,
                  "difference": lambda accuracy, overall: accuracy - overall,
                  "none": lambda accuracy, overall: accuracy}
CORRECTIONS = ("none", "bh", "by")
ROUNDING = 1e-12  # equal values differ by about 1e-16 of their size after some arithmetic


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
    is Hedges' g of the differences (their mean divided by their standard deviation, corrected for small n); ``p``
    belongs to the paired t-test, ``p_sign`` to the exact sign-flip test, which assumes no normal distribution.
    """

    difference: float
    low: float
    high: float
    wins: int
    effect: float
    p: float
    p_sign: float
    n: int


class Unpaired(NamedTuple):
    """An unpaired comparison a - b of ``n_a`` and ``n_b`` values.

    ``difference`` is that of the means with its interval [low, high]; ``effect`` is Hedges' g (the difference divided
    by the pooled standard deviation, corrected for small n); ``p`` belongs to Welch's t-test, ``p_permutation`` to the
    exact permutation test, which assumes no normal distribution.
    """

    difference: float
    low: float
    high: float
    effect: float
    p: float
    p_permutation: float
    n_a: int
    n_b: int


class Affected(NamedTuple):
    """The classes on which two models differ, a - b, with the values of all classes in arrays [classes].

    ``count`` classes are ``affected``, by their ``adjusted`` p-value; ``p`` is the p-value of each class alone.
    ``differences`` are those of the means, in the unit of the normalised accuracies, and ``effects`` their Hedges' g.
    ``expected`` is the number of classes with p below alpha if no class differed and the test were exact.
    ``constant`` counts classes with a single value that is the same in both models (if paired: the same in both models
    of every pair). They have p = 1, and are not among the expected.
    """

    count: int
    affected: np.ndarray
    p: np.ndarray
    adjusted: np.ndarray
    differences: np.ndarray
    effects: np.ndarray
    expected: float
    constant: int


def mean_interval(values, confidence=0.95):
    """Mean of independent values with Student's t interval.

    Parameters
    ----------
    values : array-like, shape [n]
        At least two finite values; the interval has their unit.
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
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)
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
        value is 2 / 2^n, which is 0.0625 for five seeds. Above 16 blocks it uses 65,536 seeded draws.
        ``effect`` is 0 for two blocks, for which the correction for small n is 0. It is infinite (and ``p`` zero)
        if all differences are the same and not zero.

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
    mean, half, effect, p, _ = map(float, _paired(a, b, confidence))
    return Paired(mean, mean - half, mean + half, int((a > b).sum()), effect, p, _sign_flip(a - b), len(a))


def welch_comparison(a, b, confidence=0.95):
    """Compare two methods over seeds that they do not share.

    Parameters
    ----------
    a, b : array-like, shapes [n_a] and [n_b]
        At least two values each; the numbers may differ.
    confidence : float
        In (0, 1).

    Returns
    -------
    Unpaired
        ``p_permutation`` enumerates all ways to divide the values between a and b (two-sided, by the difference of the
        means): with five and five its smallest possible value is 2 / 252 = 0.0079. If there are more than 65,536
        ways it uses that many seeded draws. If neither method varies, ``effect`` is 0 and ``p`` one if they are the
        same, and infinite and zero otherwise; then read ``p_permutation``.

    Raises
    ------
    ValueError
        If there are fewer than two values, or one is not finite.

    References
    ----------
    Welch, "The generalization of 'Student's' problem when several different population variances are involved", 1947.
    """
    a, b = _checked(a, confidence), _checked(b, confidence)
    difference, half, effect, p, _ = map(float, _welch(a, b, confidence))
    return Unpaired(difference, difference - half, difference + half, effect, p, _permuted(a, b), len(a), len(b))


def proportion_interval(successes, n, confidence=0.95):
    """A proportion with Wilson's score interval, which lies inside [0, 1] and is valid for 0 and n successes too.

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
    p = successes / n
    return Interval(float(p), math.sqrt(p * (1 - p)), *wilson_interval(p, n, confidence), int(n))


def wilson_interval(p, n, confidence=0.95):
    """Wilson's score interval (low, high) for a proportion.

    Parameters
    ----------
    p : float
        The observed proportion, in [0, 1].
    n : float
        The number of trials, above 0; for weighted trials, the effective number ``sum(w)**2 / sum(w**2)`` (Kish).
    confidence : float
        In (0, 1).

    Raises
    ------
    ValueError
        If the confidence is out of range.

    References
    ----------
    Wilson, "Probable inference, the law of succession, and statistical inference", 1927; Kish, "Survey sampling", 1965.

    Examples
    --------
    >>> [round(bound, 3) for bound in wilson_interval(0.5, 10)]
    [0.237, 0.763]
    """
    _check_confidence(confidence)
    z = special.ndtri((1 + confidence) / 2)
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    # At the ends the two are equal, apart from rounding.
    low, high = 0.0 if p == 0 else centre - half, 1 + z**2 / n if p == 1 else centre + half
    return float(low / (1 + z**2 / n)), float(high / (1 + z**2 / n))


# ---- Class by class --------------------------------------------------------------------------------------------------

def class_accuracies(y_true, y_pred, classes):
    """The accuracy on each class.

    Parameters
    ----------
    y_true : array-like of int, shape [n]
        0 to ``classes`` - 1.
    y_pred : array-like of int, shape [n] or [seeds, n]
        Predictions of one model, or of several.
    classes : int

    Returns
    -------
    numpy.ndarray, shape [classes] or [seeds, classes]
        In [0, 1]; NaN for a class without an input.

    Raises
    ------
    ValueError
        If a label is out of range or not an integer, or the shapes do not fit.
    """
    y_true, y_pred = as_labels("y_true", y_true, classes), as_labels("y_pred", y_pred, classes, stacked=True)
    if y_true.shape != y_pred.shape[-1:]:
        raise ValueError(f"y_true has {len(y_true)} labels, y_pred has {y_pred.shape[-1]}: expected the same number")
    hits = [np.bincount(y_true[row == y_true], minlength=classes) for row in np.atleast_2d(y_pred)]
    with np.errstate(invalid="ignore"):
        return np.reshape(hits / np.bincount(y_true, minlength=classes), (*y_pred.shape[:-1], classes))


def affected_classes(a, b, *, normalize="ratio", alpha=0.05, correction="none", weights=None, paired=False):
    """The classes on which two models differ by more than their seeds explain, by a t-test on each, Welch's or paired.

    The accuracy on a class is first related to the overall accuracy of the same seed, so that a model that is better
    by the same factor on all classes differs on none. If some classes lose, the relative accuracy of the others rises:
    if the former are many, or the seeds agree closely, the latter may be affected too.

    Parameters
    ----------
    a, b : array-like, shapes [seeds of a, classes] and [seeds of b, classes]
        Accuracy on each class, as from :func:`class_accuracies`; at least two seeds each.
    normalize : {"ratio", "difference", "none"}
        The accuracy on the class divided by the seed's overall accuracy, minus it, or unchanged.
    alpha : float
        In (0, 1): a class is affected if its adjusted p-value is below.
    correction : {"none", "bh", "by"}
        For the number of classes: none, as in the source; Benjamini and Hochberg's, or Benjamini and Yekutieli's, which
        holds for classes that depend on each other in any way. Both bound the expected share of false ones among the
        affected classes.
    weights : array-like, shape [classes], optional
        The sizes of the classes in the test set, by which the overall accuracy is weighted; by default all are equal.
    paired : bool
        Whether row i of a and row i of b belong to one block, such as a network and its pruned version. What the two
        have in common then cancels; Welch's test would count it as noise, and flag too few classes.

    Returns
    -------
    Affected
        A class on which neither model varies (paired: whose difference does not vary) has p = 1 if the models agree,
        and p = 0 and an infinite effect otherwise. Few seeds make Welch's test conservative: if nothing differs, five
        against five flag about 4 of 100 classes, not 5.

    Raises
    ------
    ValueError
        If the shapes do not fit, there are fewer than two seeds, a value is not finite, an option is unknown, an
        overall accuracy is 0 and would be a divisor, or paired models have different numbers of seeds.

    References
    ----------
    Mohammadshahi and Ioannou, "What's Left After Distillation? How Knowledge Transfer Impacts Fairness and Bias", TMLR
    2025, arXiv 2410.08407.
    """
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize is {normalize!r}: expected one of {', '.join(NORMALIZATIONS)}")
    if correction not in CORRECTIONS:
        raise ValueError(f"correction is {correction!r}: expected one of {', '.join(CORRECTIONS)}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: expected a number in (0, 1)")
    a, b = _accuracies("a", a), _accuracies("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} classes, b has {b.shape[1]}: expected the same")
    if paired and len(a) != len(b):
        raise ValueError(f"a has {len(a)} seeds, b has {len(b)}: expected the same, to pair them")
    weights = np.ones(a.shape[1]) if weights is None else np.asarray(weights, dtype=float)
    if weights.shape != a.shape[1:] or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise ValueError(f"weights is {weights}: expected {a.shape[1]} numbers of at least 0, not all of them 0")
    from scipy import stats  # imported here because only this function needs it

    a, b = (_normalized(name, values, normalize, weights) for name, values in (("a", a), ("b", b)))
    differences, _, effects, p, still = (_paired if paired else _welch)(a, b)
    adjusted = p if correction == "none" else stats.false_discovery_control(p, method=correction)
    constant = int((still & (p == 1)).sum())
    return Affected(int((adjusted < alpha).sum()), adjusted < alpha, p, adjusted, differences, effects,
                    alpha * (len(p) - constant), constant)


def leave_one_out_counts(a, b, *, weights=None, **options):
    """Count the other affected classes without each class in turn, which is also left out of the overall accuracy.

    A class that loses much lowers the overall accuracy, and so raises the ratio of every other class. If the count
    falls without one class, this class made the others look affected.

    Parameters
    ----------
    a, b, weights, **options
        As of :func:`affected_classes`, with at least two classes.

    Returns
    -------
    numpy.ndarray of int, shape [classes]
        Entry k is the count among the other classes without class k.

    Raises
    ------
    ValueError
        As :func:`affected_classes`.

    Examples
    --------
    >>> a = np.random.default_rng(0).normal(0.7, 0.01, (5, 10))
    >>> b = np.random.default_rng(1).normal(0.7, 0.01, (5, 10))
    >>> b[:, 3] -= 0.3  # this class alone loses
    >>> affected_classes(a, b).count, leave_one_out_counts(a, b)[3].item()
    (10, 0)
    """
    a, b = _accuracies("a", a), _accuracies("b", b)
    weights = np.ones(a.shape[1]) if weights is None else np.asarray(weights)
    if a.shape[1] < 2:
        raise ValueError(f"a has {a.shape[1]} class: expected at least two, to leave one out")
    return np.array([affected_classes(np.delete(a, k, 1), np.delete(b, k, 1), weights=np.delete(weights, k), **options)
                     .count for k in range(a.shape[1])])


def disagreement_matrix(a, b, classes):
    """The classes that two models predict for the inputs on which they differ.

    Parameters
    ----------
    a, b : array-like of int, shape [n] or [seeds, n]
        Predictions for the same inputs, 0 to ``classes`` - 1; with several seeds, row i of a is compared with row i of
        b.
    classes : int

    Returns
    -------
    numpy.ndarray, shape [classes, classes]
        Entry (i, j) is the share of all inputs for which a predicts class i and b predicts class j, a mean over the
        seeds. The diagonal, where they agree, is NaN; the sum of the others is the share on which they differ.

    Raises
    ------
    ValueError
        If a label is out of range or not an integer, or the shapes differ.
    """
    a, b = (as_labels(name, values, classes, stacked=True) for name, values in (("a", a), ("b", b)))
    if a.shape != b.shape:
        raise ValueError(f"a has the shape {list(a.shape)}, b has {list(b.shape)}: expected the same")
    rates = np.bincount((a * classes + b).ravel(), minlength=classes**2).reshape(classes, classes) / a.size
    np.fill_diagonal(rates, np.nan)
    return rates


def as_labels(name, values, classes=None, *, stacked=False):
    """Labels as an array of int64, from a list, an array or a tensor on any device.

    Parameters
    ----------
    name : str
        Name of the labels in error messages.
    values : array-like of int, shape [n], or with ``stacked`` also [seeds, n]
    classes : int, optional
        The number of classes, if labels are 0 to ``classes`` - 1; by default all integers are labels.
    stacked : bool

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    ValueError
        If there are no labels, a value is not an integer or out of range, or the shape is wrong.
    """
    labels = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if labels.ndim not in ((1, 2) if stacked else (1,)):
        raise ValueError(f"{name} has the shape {list(labels.shape)}: expected [n]{' or [seeds, n]' * stacked}")
    if not labels.size:
        raise ValueError(f"{name} is empty: expected at least one label")
    if labels.dtype.kind not in "biu":
        raise ValueError(f"{name} is {labels.dtype}: expected integer labels")
    labels = labels.astype(np.int64)
    if classes is not None and not 0 <= labels.min() <= labels.max() < classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"{name} has the label {wrong}: expected 0 to {classes - 1}")
    return labels


def _accuracies(name, values):
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or len(values) < 2 or not values.shape[1]:
        raise ValueError(f"{name} has the shape {list(values.shape)}: expected [seeds, classes], at least two seeds")
    if not np.isfinite(values).all():
        seed, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"{name} is {values[seed, column]} for seed {seed} and class {column}: expected an accuracy "
                         "(leave out classes without an input)")
    return values


def _normalized(name, values, normalize, weights):
    overall = (values @ weights / weights.sum())[:, None]  # of each seed, not the mean over the seeds
    if normalize == "ratio" and not overall.all():
        raise ValueError(f"the overall accuracy of seed {int(np.argmin(overall != 0))} of {name} is 0: expected more, "
                         "to divide by it")
    return NORMALIZATIONS[normalize](values, overall)


# ---- Shared ----------------------------------------------------------------------------------------------------------

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


def _welch(a, b, confidence=0.95):
    """Return for each column of a and b [seeds, ...] the difference of the means, half the width of its interval,
    Hedges' g, Welch's p-value, and whether neither varies."""
    spread_a, spread_b = a.var(0, ddof=1), b.var(0, ddof=1)
    error_a, error_b = spread_a / len(a), spread_b / len(b)
    more_a, more_b = len(a) - 1, len(b) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        pooled = np.sqrt((more_a * spread_a + more_b * spread_b) / (more_a + more_b))
        df = (error_a + error_b) ** 2 / (error_a**2 / more_a + error_b**2 / more_b)
    constant = np.maximum(np.ptp(a, axis=0), np.ptp(b, axis=0)) <= ROUNDING * _largest(a, b)
    return _t_test(a, b, np.sqrt(error_a + error_b), df, pooled, more_a + more_b, constant, confidence)


def _paired(a, b, confidence=0.95):
    """As :func:`_welch`, for a paired t-test; the last value is whether the differences do not vary."""
    n, sd = len(a), (a - b).std(0, ddof=1)
    constant = np.ptp(a - b, axis=0) <= ROUNDING * _largest(a, b)
    return _t_test(a, b, sd / math.sqrt(n), n - 1, sd, n - 1, constant, confidence)


def _t_test(a, b, error, df, sd, more, constant, confidence):
    difference = a.mean(0) - b.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = difference / sd * _small_sample(more)
        half = special.stdtrit(df, (1 + confidence) / 2) * error
        p = 2 * special.stdtr(df, -np.abs(difference) / error)
    same = np.abs(difference) <= ROUNDING * _largest(a, b)
    sure = np.where(same, 0.0, np.copysign(np.inf, difference))
    return (difference, np.where(constant, 0.0, half), np.where(constant, sure, effect),
            np.where(constant, same.astype(float), p), constant)


def _largest(a, b):
    return np.maximum(np.abs(a).max(0), np.abs(b).max(0))


def _small_sample(df):
    """Hedges' correction of an effect for small samples, by the degrees of freedom."""
    return 1 - 3 / (4 * df - 1)


def _permuted(a, b):
    values = np.concatenate([a, b]) - np.mean([*a, *b])
    if math.comb(len(values), len(a)) <= 2**16:
        dealt = np.array(list(itertools.combinations(range(len(values)), len(a))))  # the observed one first
    else:
        dealt = np.random.default_rng(0).permuted(np.tile(np.arange(len(values)), (2**16, 1)), axis=1)[:, : len(a)]
        dealt[0] = range(len(a))  # the observed one always counts
    distances = np.abs(values[dealt].sum(1))  # the values add up to 0, so a's sum measures the distance of the means
    return float((distances >= distances[0] - ROUNDING * _largest(a, b)).mean())
