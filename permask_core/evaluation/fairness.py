"""Fairness of predictions: differences between the rates of groups, their chance level, and individual fairness.

The demographic parity difference and the equalized odds difference have the names, the order of arguments and, for two
classes, the values of fairlearn. For several classes each class is compared with the rest, and the mean over the
classes is taken, as by Mohammadshahi and Ioannou, "What's Left After Distillation? How Knowledge Transfer Impacts
Fairness and Bias", TMLR 2025, arXiv 2410.08407. All values are computed from one table, which counts inputs by their
groups, their class and the predicted class. A bootstrap and a permutation draw other tables of the same inputs. Inputs
are drawn one by one only if they have weights, or if the caller passes a metric.
"""

import itertools
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch

from permask_core.data.attributes import Attribute
from permask_core.evaluation.statistics import as_labels, proportion_interval, wilson_interval
from permask_core.runs.checks import check_integer

UNDEFINED = ("nan", "omit", "zero")
CHUNK = 2**22  # numbers held at once, to bound memory


# ---- Groups ----------------------------------------------------------------------------------------------------------

def demographic_parity_difference(y_true, y_pred, *, sensitive_features, sample_weight=None, undefined="nan"):
    """The largest minus the smallest share of a group's inputs for which a class is predicted.

    For a perfect predictor it is not 0, but the difference of the base rates of the groups. With two classes it is the
    same for both; with more, it is the mean over all classes that are in y_true or y_pred. A class that is never
    predicted counts with a difference of 0, so a model that never predicts a class is no less fair by this number.

    Parameters
    ----------
    y_true, y_pred : array-like of int, shape [n]
        Any integers: labels, not logits.
    sensitive_features : array-like, shape [n] or [n, features], dict of array-like or Attribute, or Attribute
        The group of each input, such as a number or a name. For several features, as columns or by name, the groups are
        all intersections, ``("F", "old")``, including those without an input. Inputs of an Attribute may belong to
        several groups, and count in each, or to none: those are left out.
    sample_weight : array-like of float, shape [n], optional
        Weight of each input, at least 0. An input of weight 0 is left out.
    undefined : {"nan", "omit", "zero"}
        What to do with a group without an input from which to compute a rate. Here that is only an intersection, or a
        group of an attribute, without any input. ``nan``: the result is NaN, with a warning that names the group.
        ``omit``: the group is left out of that difference, which is NaN, with a warning, if fewer than two groups
        remain. ``zero``: fairlearn's convention, the rate is 0; a group without any input is left out.

    Returns
    -------
    float
        In [0, 1], or NaN.

    Raises
    ------
    ValueError
        If the lengths differ, there is no input, fewer than two groups have one, a label is not an integer, a group is
        missing, a weight is negative or not finite, or ``undefined`` is unknown.

    Examples
    --------
    >>> about = {"sex": ["F", "F", "M", "M"], "age": ["old", "young", "old", "young"]}
    >>> demographic_parity_difference([1, 0, 1, 0], [1, 1, 1, 0], sensitive_features=about["sex"])
    0.5
    >>> demographic_parity_difference([1, 0, 1, 0], [1, 1, 1, 0], sensitive_features=about)
    1.0
    """
    metric = demographic_parity_difference
    return _observed(metric, _sample(metric, y_true, y_pred, sensitive_features, sample_weight), undefined)


def equalized_odds_difference(y_true, y_pred, *, sensitive_features, sample_weight=None, undefined="nan"):
    """The largest minus the smallest true positive rate of the groups, or false positive rate, whichever is larger.

    For a perfect predictor it is 0. With two classes it is the same for both; with more, it is the mean over the
    classes that are in y_true.

    Parameters
    ----------
    y_true, y_pred, sensitive_features, sample_weight
        As of :func:`demographic_parity_difference`.
    undefined : {"nan", "omit", "zero"}
        As there. A group has no true positive rate without an input of the class, and no false positive rate if it has
        inputs of that class only.

    Returns
    -------
    float
        In [0, 1], or NaN.

    Raises
    ------
    ValueError
        As :func:`demographic_parity_difference`.
    """
    metric = equalized_odds_difference
    return _observed(metric, _sample(metric, y_true, y_pred, sensitive_features, sample_weight), undefined)


def group_difference(metric, y_true, y_pred, *, sensitive_features, sample_weight=None, undefined="nan"):
    """The largest minus the smallest value of any metric over the groups, as ``difference`` of fairlearn's MetricFrame.

    Parameters
    ----------
    metric : callable
        ``metric(y_true, y_pred)`` returns a number for the inputs of one group; it also gets ``sample_weight=`` if
        there are weights. Metrics of scikit-learn can be used.
    y_true, y_pred : array-like, shape [n, ...]
        Arguments of the metric: labels, scores or probabilities.
    sensitive_features, sample_weight
        As of :func:`demographic_parity_difference`.
    undefined : {"nan", "omit", "zero"}
        As there, for a group without any input, for which the metric is not called, and for a group where it is NaN.

    Returns
    -------
    float
        At least 0, or NaN.

    Raises
    ------
    ValueError
        As :func:`demographic_parity_difference`, or if the metric does not return a number.

    Examples
    --------
    >>> def mean_error(y_true, y_pred):
    ...     return abs(y_true - y_pred).mean()
    >>> group_difference(mean_error, [1.0, 2.0, 3.0], [1.5, 2.5, 3.0], sensitive_features=["a", "a", "b"])
    0.5
    """
    return _observed(metric, _sample(metric, y_true, y_pred, sensitive_features, sample_weight), undefined)


_COMPARED = {demographic_parity_difference: ("selection rate",),
             equalized_odds_difference: ("true positive rate", "false positive rate")}


class Estimate(NamedTuple):
    """A rate with its interval [low, high], from ``n`` inputs. As text, it is in percent."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self):
        return "–" if np.isnan(self.value) else f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class Chance(NamedTuple):
    """The difference if groups do not matter: its ``mean``, and ``high``, its quantile at the confidence.

    As text, it is in percent.
    """

    mean: float
    high: float

    def __str__(self):
        return "–" if np.isnan(self.mean) else f"{100 * self.mean:.1f}, up to {100 * self.high:.1f}"


class Difference(NamedTuple):
    """A difference between groups, with its interval and its chance level.

    ``value`` is the observed difference, ``corrected`` is the value without the bias that a bootstrap of ``n`` draws
    estimates, [low, high] is the interval of the true difference, and ``chance`` is the chance level. As text, it is in
    percent, with the interval and the chance level.
    """

    value: float
    corrected: float
    low: float
    high: float
    chance: Chance
    n: int

    def __str__(self):
        found = str(Estimate(self.value, self.low, self.high, self.n))
        return found if np.isnan(self.value) else f"{found}; by chance {self.chance}"


def difference_interval(metric, y_true, y_pred, *, sensitive_features, sample_weight=None, undefined="nan", draws=1000,
                        confidence=0.95, seed=0):
    """A difference between groups, with a correction of its bias, an interval, and the chance level.

    The largest minus the smallest rate is too large on average, because noise increases it, and more so for small or
    numerous groups. A bootstrap estimates a part of this bias. Subtracting it leaves more than half of the bias if the
    groups do not differ at all, and less if they do: only :func:`chance_level` shows whether they differ.

    The interval is that of the difference in the population. The difference changes by no more than the range, over the
    groups, of the errors of the rates. The interval is therefore the value plus and minus a quantile of this range in
    the bootstrap. For two groups its coverage is that of the ordinary interval of a difference. For more groups it is
    at least that, whichever groups are the extreme ones: exact if all groups are equal, cautious if one differs.

    Parameters
    ----------
    metric : callable
        :func:`demographic_parity_difference`, :func:`equalized_odds_difference`, or a function of a single group, as
        :func:`group_difference` takes it; the latter is called for each group in each draw.
    y_true, y_pred, sensitive_features, sample_weight, undefined
        As for the metric, or for :func:`group_difference`. An input keeps its weight.
    draws : int
        At least 1.
    confidence : float
        In (0, 1).
    seed : int

    Returns
    -------
    Difference
        ``n`` counts the draws in which the difference was defined; the others are left out.

    Raises
    ------
    ValueError
        As the metric, or if an option is out of range.

    References
    ----------
    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 10 (the estimate of bias); Tukey, "The
    problem of multiple comparisons", 1953 (the range of errors bounds all differences at once).

    Examples
    --------
    >>> y_pred = [1] * 60 + [0] * 40 + [1] * 30 + [0] * 70
    >>> about = {"sensitive_features": ["a"] * 100 + ["b"] * 100}
    >>> print(difference_interval(demographic_parity_difference, [0] * 200, y_pred, **about))
    30.0 [17.1, 42.9]; by chance 5.8, up to 14.0
    """
    _check_draws(draws, confidence)
    sample = _sample(metric, y_true, y_pred, sensitive_features, sample_weight)
    value, rates = _observed(metric, sample, undefined), _rates_of_sample(metric, sample, undefined)
    chance = _chance(metric, sample, value, undefined, draws, confidence, seed)

    def resample_table(table):
        filled, n = table > 0, table.sum()

        def draw(size, generator):
            tables = np.zeros((size, *table.shape), dtype=np.int64)
            tables[:, filled] = generator.multinomial(n, table[filled] / n, size)
            return tables

        return draw

    def resample_inputs(generator):
        return sample.take(generator.integers(len(sample.kind), size=len(sample.kind)))

    found = [(_spread(drawn, undefined), _spread(drawn - rates, undefined))
             for drawn in _draw(metric, sample, undefined, draws, seed, resample_table, resample_inputs)]
    values, errors = (np.concatenate(column) for column in zip(*found))
    defined = ~np.isnan(errors)
    if np.isnan(value) or not defined.any():
        return Difference(value, np.nan, np.nan, np.nan, chance, int(defined.sum()))
    half, most = np.quantile(errors[defined], confidence), 1 if metric in _COMPARED else np.inf
    corrected = max(0.0, float(2 * value - values[defined].mean()))
    return Difference(value, corrected, float(max(0, value - half)), float(min(most, value + half)), chance,
                      int(defined.sum()))


def chance_level(metric, y_true, y_pred, *, sensitive_features, sample_weight=None, undefined="nan", draws=1000,
                 confidence=0.95, seed=0):
    """The difference between groups of these sizes by chance alone, with the groups permuted among the inputs.

    A largest minus a smallest value is never below 0. It grows with the number of groups, and as they become smaller.
    For equalized odds the groups are permuted within each true class: then errors do not depend on the group, while
    each group keeps its number of inputs of every class. For other metrics they are permuted among all inputs.

    Parameters
    ----------
    metric, y_true, y_pred, sensitive_features, sample_weight, undefined, draws, confidence, seed
        As for :func:`difference_interval`. An input of several groups passes on all of them together with its weight,
        so that no group gains or loses weight.

    Returns
    -------
    Chance
        NaN if the difference itself is NaN.

    Raises
    ------
    ValueError
        As :func:`difference_interval`.
    """
    _check_draws(draws, confidence)
    sample = _sample(metric, y_true, y_pred, sensitive_features, sample_weight)
    return _chance(metric, sample, _observed(metric, sample, undefined), undefined, draws, confidence, seed)


def _chance(metric, sample, value, undefined, draws, confidence, seed):
    from scipy import stats  # imported here because only this function needs it

    by_class = metric is equalized_odds_difference
    strata = ([np.flatnonzero(sample.y_true == k) for k in np.unique(sample.y_true)] if by_class
              else [np.arange(len(sample.kind))])

    def exchange_in_table(table):
        if not by_class:  # one stratum: the true class has no part in a selection rate
            table = np.concatenate([table.sum(1, keepdims=True), np.zeros_like(table[:, 1:])], 1)

        def draw(size, generator):
            tables = np.zeros((size, *table.shape), dtype=np.int64)
            for k in np.flatnonzero(table.any((0, 2))):
                by_group, by_prediction = table[:, k].sum(1), table[:, k].sum(0)
                tables[:, :, k] = stats.random_table(by_group, by_prediction).rvs(size, random_state=generator)
            return tables

        return draw

    def exchange_inputs(generator):
        order = np.arange(len(sample.kind))
        for inputs in strata:
            order[inputs] = generator.permutation(inputs)
        return sample._replace(y_true=sample.y_true[order], y_pred=sample.y_pred[order])

    drawn = _draw(metric, sample, undefined, draws, seed, exchange_in_table, exchange_inputs)
    found = np.concatenate([_spread(rates, undefined) for rates in drawn])
    found = found[~np.isnan(found)]
    if np.isnan(value) or not len(found):
        return Chance(np.nan, np.nan)
    return Chance(float(found.mean()), float(np.quantile(found, confidence)))


def group_table(y_true, y_pred, *, sensitive_features, sample_weight=None, positive=None, confidence=0.95):
    """The rates of each group with Wilson's intervals, for :func:`permask_core.display.table`.

    Parameters
    ----------
    y_true, y_pred, sensitive_features, sample_weight
        As for :func:`demographic_parity_difference`. The interval of a weighted rate is that of the effective number of
        inputs, which is smaller the more the weights differ.
    positive : int, optional
        The class whose rates are returned, against the rest; by default the larger one of two classes, none of more.
    confidence : float
        In (0, 1).

    Returns
    -------
    list of dict
        One for each group, including groups without an input: ``group`` and ``n``; with a positive class ``positives``,
        ``negatives``, and as Estimates ``selection rate``, ``true positive rate`` and ``false positive rate``; and
        ``accuracy``, an Estimate of the share of right predictions. ``n``, ``positives`` and ``negatives`` count
        inputs, whatever their weights. A rate without an input is NaN.

    Raises
    ------
    ValueError
        As :func:`demographic_parity_difference`, or if the positive class is in neither y_true nor y_pred, or the
        confidence out of range.
    """
    sample = _sample(demographic_parity_difference, y_true, y_pred, sensitive_features, sample_weight)
    if positive is None and len(sample.classes) <= 2:
        positive = sample.classes[-1]
    if positive is not None and positive not in sample.classes:
        raise ValueError(f"positive is {positive!r}: expected a class of y_true or y_pred, one of "
                         f"{', '.join(map(str, sample.classes))}")
    rows = []
    for group, here in zip(sample.groups, sample.each_group()):
        row, rates = {"group": group, "n": int(here.sum())}, {}
        if positive is not None:
            true, selected = (here & (sample.classes[labels] == positive) for labels in (sample.y_true, sample.y_pred))
            row |= {"positives": int(true.sum()), "negatives": int((here & ~true).sum())}
            rates = {"selection rate": (selected, here), "true positive rate": (selected & true, true),
                     "false positive rate": (selected & ~true, here & ~true)}
        rates["accuracy"] = here & (sample.y_true == sample.y_pred), here
        rows.append(row | {name: _rate(*part, sample.weight, confidence) for name, part in rates.items()})
    return rows


def _rate(part, whole, weight, confidence):
    """The share of inputs, by weight, that is in ``part``, among those in ``whole``: two bool [n]."""
    n = int(whole.sum())
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    if weight is None:
        value, _, low, high, _ = proportion_interval(int(part.sum()), n, confidence)
        return Estimate(value, low, high, n)
    total = weight[whole].sum()
    value = min(1.0, float(weight[part].sum() / total))
    return Estimate(value, *wilson_interval(value, total**2 / (weight[whole] ** 2).sum(), confidence), n)


class _Sample(NamedTuple):
    """Inputs with their groups.

    ``groups`` are the names of the groups; ``member``, int [sets, groups], are the sets of groups that inputs have. For
    each input, ``kind`` is the number of its set, followed by its true and predicted values and its weight; ``weight``
    is None without weights. If a metric counts classes, true and predicted values are indices of ``classes``, and the
    metric uses those of ``compared``.
    """

    groups: tuple
    member: np.ndarray
    kind: np.ndarray
    y_true: np.ndarray
    y_pred: np.ndarray
    weight: np.ndarray | None
    classes: np.ndarray | None = None
    compared: list | np.ndarray | None = None

    def take(self, rows):
        weight = None if self.weight is None else self.weight[rows]
        return self._replace(kind=self.kind[rows], y_true=self.y_true[rows], y_pred=self.y_pred[rows], weight=weight)

    def each_group(self):
        """Yield for each group which inputs are in it, bool [n]."""
        return (column[self.kind] > 0 for column in self.member.T)

    def table(self):
        """The number of inputs, or their weight, by set of groups, true class and predicted class:
        [sets, classes, classes]."""
        shape = len(self.member), len(self.classes), len(self.classes)
        cell = np.ravel_multi_index((self.kind, self.y_true, self.y_pred), shape)
        return np.bincount(cell, self.weight, minlength=np.prod(shape)).reshape(shape)


def _sample(metric, y_true, y_pred, sensitive_features, sample_weight):
    if not callable(metric):
        raise ValueError(f"metric is {metric!r}: expected a function, of y_true and y_pred")
    counts = metric in _COMPARED
    y_true, y_pred = ((as_labels if counts else _as_values)(*named) for named in (("y_true", y_true),
                                                                                  ("y_pred", y_pred)))
    if len(y_true) != len(y_pred):
        raise ValueError(f"y_true has {len(y_true)} labels, y_pred has {len(y_pred)}: expected the same number")
    groups, member, kind = _sets_of_groups(sensitive_features, len(y_true))
    weight = _as_weights(sample_weight, len(y_true))
    kept = np.flatnonzero(member.any(1)[kind] & (True if weight is None else weight > 0))
    present, kind = np.unique(kind[kept], return_inverse=True)
    member = member[present]
    if member.any(0).sum() < 2:
        raise ValueError(f"groups of sensitive_features with an input: {member.any(0).sum()}, expected at least two")
    sample = _Sample(groups, member, kind, y_true[kept], y_pred[kept], None if weight is None else weight[kept])
    if not counts:
        return sample
    classes, labels = np.unique([sample.y_true, sample.y_pred], return_inverse=True)
    truth, predicted = labels.reshape(2, -1)
    # Two classes have the same difference if their rates are defined. The larger class is enough, and its undefined
    # rates are those of fairlearn.
    compared = ([-1] if len(classes) <= 2 else np.unique(truth) if metric is equalized_odds_difference
                else np.arange(len(classes)))
    return sample._replace(y_true=truth, y_pred=predicted, classes=classes, compared=compared)


def _as_values(name, values):
    values = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    if not values.ndim or not len(values):
        raise ValueError(f"{name} has the shape {list(values.shape)}: expected [n, ...], n at least 1")
    return values


def _as_weights(weight, n):
    if weight is None:
        return None
    weight = _as_values("sample_weight", weight)
    if weight.shape != (n,) or weight.dtype.kind not in "biuf":
        raise ValueError(f"sample_weight is {weight.dtype} {list(weight.shape)}: expected a number for each input, "
                         f"[{n}]")
    weight = weight.astype(float)
    wrong = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
    if len(wrong):
        raise ValueError(f"sample_weight is {weight[wrong[0]]} for input {wrong[0]}: expected a finite number of at "
                         "least 0")
    return weight


def _sets_of_groups(features, n):
    """Return the names of the groups, the sets of groups that inputs have, int [sets, groups], and the set of each
    input, [n]."""
    if isinstance(features, Mapping):
        found = [_sets_of_feature(f"sensitive_features[{name!r}]", values, n) for name, values in features.items()]
    elif isinstance(features, Attribute):
        found = [_sets_of_feature("sensitive_features", features, n)]
    else:
        features = features.cpu() if isinstance(features, torch.Tensor) else features
        table = np.asarray(features, dtype=object)  # of columns with types of their own
        columns = [column.tolist() for column in table.T] if table.ndim == 2 and len(table) == n else [features]
        found = [_sets_of_feature("sensitive_features", column, n) for column in columns]
    if not found:
        raise ValueError("sensitive_features has no features: expected at least one")
    groups, member, kind = found[0]
    groups = [(group,) for group in groups]
    for more, other, number in found[1:]:  # all intersections, but only the sets that inputs have
        groups = [(*one, another) for one, another in itertools.product(groups, more)]
        present, kind = np.unique(kind * len(other) + number, return_inverse=True)
        first, second = np.divmod(present, len(other))
        member = (member[first][:, :, None] * other[second][:, None]).reshape(len(present), -1)
    return tuple(groups if found[1:] else found[0][0]), member, kind


def _sets_of_feature(name, feature, n):
    """As :func:`_sets_of_groups`, for one feature."""
    if isinstance(feature, Attribute):
        groups, member = feature.groups, feature.member.cpu().numpy()
        if member.shape != (n, len(groups)) or member.dtype != bool:
            raise ValueError(f"the member of {name} is {member.dtype} {list(member.shape)}: expected bool "
                             f"[{n}, {len(groups)}], an input of y_true a row")
    else:
        values = np.asarray(feature.cpu() if isinstance(feature, torch.Tensor) else feature)
        if values.ndim != 1:
            raise ValueError(f"{name} has the shape {list(values.shape)}: expected one group for each input [n], "
                             "several [n, features], a dict of them, or an Attribute")
        if len(values) != n:
            raise ValueError(f"{name} has {len(values)} inputs, y_true has {n}: expected the same number")
        objects = np.asarray(feature, dtype=object)  # with strings, numpy would convert a NaN to the string "nan"
        missing = [i for i, one in enumerate(objects) if one is None or type(one).__name__ == "NAType" or one != one]
        if missing:
            raise ValueError(f"{name} is {objects[missing[0]]} for input {missing[0]}: expected a group")
        groups, number = np.unique(values, return_inverse=True)
        groups, member = groups.tolist(), number[:, None] == np.arange(len(groups))
    member, kind = np.unique(member.astype(np.int64), axis=0, return_inverse=True)
    return tuple(groups), member, kind.ravel()


def _counts(member, table):
    """Count from tables [..., sets, classes, classes] the inputs of each group that belong to a class, those for which
    it is predicted, and those with both: three arrays [..., groups, classes]."""
    return tuple(member.T @ count for count in (table.sum(-1), table.sum(-2), np.diagonal(table, axis1=-2, axis2=-1)))


def _rates(member, table):
    """Return the rates of each group and class, each [..., groups, classes], NaN without an input, and the number of
    inputs of each group, [..., groups, 1]."""
    positives, selected, hits = _counts(member, table)
    n = positives.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return {"selection rate": selected / n, "true positive rate": hits / positives,
                "false positive rate": (selected - hits) / (n - positives)}, n


def _rates_of_tables(metric, sample, tables, undefined):
    """Return the rates that a metric that counts classes compares, from tables [..., sets, classes, classes] of a
    sample: [..., kinds of rate, groups, classes]."""
    rates, n = _rates(sample.member, tables)
    rates = np.stack([rates[name][..., sample.compared] for name in _COMPARED[metric]], -3)
    return _filled(rates, n[..., None, :, :], undefined)


def _rates_of_sample(metric, sample, undefined):
    """As :func:`_rates_of_tables`, for the sample itself; a metric of the caller is one rate of one class."""
    if metric in _COMPARED:
        return _rates_of_tables(metric, sample, sample.table(), undefined)
    n, values = (np.array(column)[None, :, None] for column in zip(*_by_group(metric, sample)))
    return _filled(values, n, undefined)


def _filled(rates, n, undefined):
    """Rates [..., groups, classes], by fairlearn's convention if asked for: an undefined rate of n > 0 inputs is 0."""
    return np.where(np.isnan(rates) & (n > 0), 0, rates) if undefined == "zero" else rates


def _spread(rates, undefined):
    """Return the difference between groups from rates [..., kinds, groups, classes]: in each class the largest minus
    the smallest rate of the groups, of the kind of rate with the larger difference; then the mean over the classes."""
    if undefined == "nan":
        spread = rates.max(-2) - rates.min(-2)
    else:
        defined = ~np.isnan(rates)
        largest, smallest = np.where(defined, rates, -np.inf).max(-2), np.where(defined, rates, np.inf).min(-2)
        spread = np.where(defined.sum(-2) >= 2, largest - smallest, np.nan)
    return spread.max(-2).mean(-1)


def _by_group(metric, sample):
    """Yield the number of inputs of each group and their metric, which is NaN without inputs."""
    for group, here in zip(sample.groups, sample.each_group()):
        n, value = int(here.sum()), np.nan
        if n:
            weights = {} if sample.weight is None else {"sample_weight": sample.weight[here]}
            value = metric(sample.y_true[here], sample.y_pred[here], **weights)
            if not isinstance(value, Real) and getattr(value, "ndim", None) != 0:
                raise ValueError(f"the metric gave {value!r} for group {group!r}: expected a number")
        yield n, float(value)


def _observed(metric, sample, undefined):
    if undefined not in UNDEFINED:
        raise ValueError(f"undefined is {undefined!r}: expected one of {', '.join(UNDEFINED)}")
    value = float(_spread(_rates_of_sample(metric, sample, undefined), undefined))
    if np.isnan(value):
        name = getattr(metric, "__name__", repr(metric))
        warnings.warn(f"{name} is NaN: {_undefined(metric, sample)}", stacklevel=3)
    return value


def _undefined(metric, sample):
    """As text, which groups have no input, and which rates of the others are undefined; the first few of each."""
    empty = [repr(group) for group, here in zip(sample.groups, sample.each_group()) if not here.any()]
    found = [f"no input is in group {_few(empty, 10)}"] if empty else []
    if metric in _COMPARED:
        inputs = sample._replace(weight=None).table()
        rates, n = _rates(sample.member, inputs)
        positives, *_ = _counts(sample.member, inputs)
        lacking = [f"group {sample.groups[group]!r} has no {name} for class {sample.classes[k]} ({positives[group, k]} "
                   f"of its {n[group, 0]} inputs are of it)" for name in _COMPARED[metric]
                   for k in np.arange(len(sample.classes))[sample.compared]
                   for group in np.flatnonzero(np.isnan(rates[name][:, k]) & (n[:, 0] > 0))]
    else:
        lacking = [f"of group {group!r} ({n} inputs) it is NaN"
                   for group, (n, value) in zip(sample.groups, _by_group(metric, sample)) if n and np.isnan(value)]
    return "; ".join([*found, *([_few(lacking, 3, "; ")] if lacking else [])])


def _few(names, most, between=", "):
    return between.join(names[:most]) + (f"{between}and {len(names) - most} more" if len(names) > most else "")


def _check_draws(draws, confidence):
    check_integer("draws", draws, 1)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected a number in (0, 1)")


def _draw(metric, sample, undefined, draws, seed, of_table, of_inputs):
    """Yield the rates of random samples, [some draws, kinds, groups, classes].

    They are tables of counts drawn by ``of_table(table)(size, generator)``, as many at once as memory allows, or
    samples drawn by ``of_inputs(generator)``.
    """
    generator = np.random.default_rng(seed)
    if metric in _COMPARED and sample.weight is None:
        table = sample.table()
        draw, block = of_table(table), max(1, CHUNK // table.size)
        for done in range(0, draws, block):
            yield _rates_of_tables(metric, sample, draw(min(block, draws - done), generator), undefined)
    else:
        for _ in range(draws):
            yield _rates_of_sample(metric, of_inputs(generator), undefined)[None]


# ---- Individuals -----------------------------------------------------------------------------------------------------

def euclidean(a, b):
    """The Euclidean distance of each row of a from that of b, over all entries: [m, ...] twice to [m]."""
    return torch.linalg.vector_norm(_difference(a, b), dim=1)


def total_variation(a, b):
    """Half the sum of absolute differences; for probabilities, the largest difference over all events."""
    return _difference(a, b).abs().sum(1) / 2


def _difference(a, b):
    a, b = (x if x.is_floating_point() else x.float() for x in (a, b))  # uint8 would wrap around
    return (a - b).flatten(1)


DISTANCES = {"euclidean": euclidean, "total_variation": total_variation}


class IndividualFairness(NamedTuple):
    """The distance of outputs divided by the distance of inputs: small if similar inputs are treated similarly.

    ``mean``, ``sd`` (n - 1) and ``largest`` are those of the ratios of ``pairs`` pairs. The ``self_pairs`` of an
    input with itself, and the pairs of ``identical`` inputs, at distance 0, are left out; ``violations`` of the latter
    have different outputs, which would be an infinite ratio. Pairs share inputs, so sd / sqrt(pairs) is not a standard
    error.
    """

    mean: float
    sd: float
    largest: float
    pairs: int
    self_pairs: int
    identical: int
    violations: int


def individual_fairness(outputs, inputs, *, output_distance="total_variation", input_distance="euclidean",
                        pairs=10_000, seed=0):
    """The mean over pairs of inputs of the distance between their outputs divided by the distance between the inputs.

    This is a mean of ratios, not the Lipschitz constant, which is their supremum. The ratio has a unit: that of the
    distance of outputs divided by that of inputs. For images, pass pixels in [0, 1]: standardised pixels, or pixels
    from 0 to 255, change the value.

    Parameters
    ----------
    outputs : array-like, shape [n, ...]
        Output of the model for each input: probabilities for the default distance.
    inputs : array-like, shape [n, ...]
    output_distance, input_distance : {"euclidean", "total_variation"} or callable
        ``distance(a, b)`` of two batches of tensors [m, ...] returns [m]. The Euclidean distance is over all entries;
        the total variation is that of probabilities, in [0, 1], as by Dwork et al.
    pairs : int, "all", or array-like of int, shape [m, 2]
        The number of distinct pairs to draw at random, at most all; or ``"all"`` pairs; or the pairs themselves.
    seed : int

    Returns
    -------
    IndividualFairness

    Raises
    ------
    ValueError
        If the lengths differ, there are fewer than two inputs, a number or distance is not finite, the total variation
        is wanted of values that are not probabilities, a distance or the pairs are unknown or out of range, or no pair
        is at a distance above 0.

    References
    ----------
    Dwork et al., "Fairness through awareness", 2012; as a mean, Mohammadshahi and Ioannou, TMLR 2025.
    """
    outputs, inputs = _batch("outputs", outputs), _batch("inputs", inputs)
    n = len(inputs)
    if len(outputs) != n or n < 2:
        raise ValueError(f"outputs has {len(outputs)} rows, inputs has {n}: expected the same number, at least two")
    apart = [_distance(*named) for named in (("output_distance", output_distance, outputs),
                                             ("input_distance", input_distance, inputs))]
    size = max(1, CHUNK // (outputs[0].numel() + inputs[0].numel()))
    ratios, self_pairs, identical, violations = [], 0, 0, 0
    for first, second in _pairs(pairs, n, size, seed):
        other = first != second
        self_pairs += int((~other).sum())
        numerator, denominator = (distance(first[other], second[other]) for distance in apart)
        near = denominator == 0
        identical += int(near.sum())
        violations += int((numerator[near] > 0).sum())
        ratios.append(numerator[~near] / denominator[~near])
    ratios = torch.cat(ratios)
    if not len(ratios):
        raise ValueError(f"of the pairs {self_pairs} are of an input with itself and {identical} of identical inputs: "
                         "expected a pair at a distance above 0")
    sd = float(ratios.std()) if len(ratios) > 1 else float("nan")
    return IndividualFairness(float(ratios.mean()), sd, float(ratios.max()), len(ratios), self_pairs, identical,
                              violations)


def _batch(name, values):
    values = torch.as_tensor(values).detach()
    if values.dim() == 0 or not values.numel():
        raise ValueError(f"{name} has the shape {list(values.shape)}: expected [n, ...]")
    values = values if values.dim() > 1 else values[:, None]
    finite = values.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"row {int((~finite).nonzero()[0])} of {name} is not finite")
    return values


def _distance(name, distance, values):
    """Return a function from two arrays of row indices to the distances between the rows of ``values``: float64, on the
    CPU."""
    if not callable(distance) and distance not in DISTANCES:
        raise ValueError(f"{name} is {distance!r}: expected {', '.join(DISTANCES)}, or a callable")
    if distance == "total_variation":
        total = values.double().flatten(1).sum(1)
        if (values < 0).any() or ((total - 1).abs() > 1e-3).any():
            raise ValueError(f"{name} is 'total_variation': expected rows of probabilities that add up to 1, such as a "
                             "softmax gives")
    of_batches = distance if callable(distance) else DISTANCES[distance]

    def between(first, second):
        found = of_batches(*(values[torch.from_numpy(rows).to(values.device)] for rows in (first, second)))
        if found.shape != first.shape or not found.isfinite().all() or (found < 0).any():
            raise ValueError(f"{name} gave {found.dtype} {list(found.shape)} for {len(first)} pairs: expected as many "
                             "finite distances of at least 0")
        return found.double().cpu()

    return between


def _pairs(pairs, n, size, seed):
    """Yield indices of the first and second inputs of pairs, int64 [at most ``size``] each."""
    every = n * (n - 1) // 2
    if isinstance(pairs, (str, Integral)):
        if pairs != "all" and (isinstance(pairs, (str, bool)) or pairs < 1):
            raise ValueError(f"pairs is {pairs!r}: expected a number of at least 1, 'all', or indices [m, 2]")
        wanted = every if pairs == "all" else min(pairs, every)
        chosen = None if wanted == every else np.random.default_rng(seed).choice(every, wanted, replace=False)
        for start in range(0, wanted, size):
            number = np.arange(start, min(start + size, wanted)) if chosen is None else chosen[start:start + size]
            # Pairs each input with the one at that offset, in a circle: every unordered pair has one number.
            yield number % n, (number % n + number // n + 1) % n
        return
    indices = np.asarray(pairs)
    if indices.ndim != 2 or indices.shape[1] != 2 or not len(indices) or indices.dtype.kind not in "iu":
        raise ValueError(f"pairs is {indices.dtype} {list(indices.shape)}: expected integers [m, 2], m at least 1")
    if indices.min() < 0 or indices.max() >= n:
        raise ValueError(f"pairs names input {indices.min() if indices.min() < 0 else indices.max()}: expected 0 to "
                         f"{n - 1}")
    for block in np.array_split(indices.astype(np.int64), range(size, len(indices), size)):
        yield block[:, 0], block[:, 1]
