"""Fairness of predictions: how far the rates of groups are apart, how much of that is chance, and how differently a
model treats inputs that are alike.

The difference in demographic parity and that in equalized odds have the names, the order of arguments and, for two
classes, the values of fairlearn. For several classes each class is compared with the rest, and the mean over the
classes is taken, as by Mohammadshahi and Ioannou, "What's Left After Distillation? How Knowledge Transfer Impacts
Fairness and Bias", TMLR 2025, arXiv 2410.08407. Everything follows from one table, how many inputs of which groups are
of which class and put into which: a bootstrap and a permutation are other tables of the same inputs.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from permask_core.data.attributes import Attribute
from permask_core.evaluation.statistics import as_labels, proportion_interval

UNDEFINED = ("nan", "omit", "zero")
CHUNK = 2**22  # numbers held at once, to bound memory


# ---- Groups ----------------------------------------------------------------------------------------------------------

def demographic_parity_difference(y_true, y_pred, *, sensitive_features, undefined="nan"):
    """How far apart groups are in the share of their inputs that is put into a class: largest minus smallest.

    A perfect predictor's is not 0 but how far apart the groups' shares of the class are. With two classes it is the
    same for both; with more, it is the mean over all classes that are in y_true or y_pred. A class that is never
    predicted differs by 0 and counts, so that a model that gives up a class is no less fair for that by this number.

    Parameters
    ----------
    y_true, y_pred : array-like of int, shape [n]
        Any integers: labels, not logits.
    sensitive_features : array-like, shape [n], or Attribute
        Each input's group, such as a number or a name. An attribute's inputs may be in several groups, and count in
        each, or in none: those are left out.
    undefined : {"nan", "omit", "zero"}
        What to do with a group that has no input to take a rate of. Here that is only an attribute's group without any
        input. ``nan``: the result is NaN, with a warning that says where. ``omit``: the group is left out of that
        difference, which is NaN, with a warning, if fewer than two are left. ``zero``: fairlearn's convention, the
        rate is 0.

    Returns
    -------
    float
        In [0, 1], or NaN.

    Raises
    ------
    ValueError
        If the lengths differ, there is no input, fewer than two groups have one, a label is no integer, a group is
        missing, or ``undefined`` is unknown.
    """
    return _observed(demographic_parity_difference, _sample(y_true, y_pred, sensitive_features), undefined)


def equalized_odds_difference(y_true, y_pred, *, sensitive_features, undefined="nan"):
    """How far apart groups are in their true positive rate or in their false positive rate, whichever is more: largest
    minus smallest.

    A perfect predictor's is 0. With two classes it is the same for both; with more, it is the mean over the classes
    that are in y_true.

    Parameters
    ----------
    y_true, y_pred, sensitive_features
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
    return _observed(equalized_odds_difference, _sample(y_true, y_pred, sensitive_features), undefined)


_COMPARED = {demographic_parity_difference: ("selection rate",),
             equalized_odds_difference: ("true positive rate", "false positive rate")}


class Estimate(NamedTuple):
    """A value in [0, 1] with its interval [low, high], from ``n`` inputs if it is a rate, from ``n`` draws if it is a
    difference between rates.

    As text, it is in per cent: a table can show it as it is.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self):
        return "–" if np.isnan(self.value) else f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def difference_interval(metric, y_true, y_pred, *, sensitive_features, undefined="nan", draws=1000, confidence=0.95,
                        seed=0):
    """A difference between groups with its bootstrap interval, from samples of the inputs drawn with replacement.

    The interval says how much another test set of this size would move the value. A largest minus smallest grows with
    noise, and each resample adds noise to what the sample has already: among many groups, all draws may lie above the
    value. Their percentiles are therefore moved until the mean of the draws is the value. What noise has added to the
    value itself, and so whether the groups differ at all, is a question for :func:`chance_level`.

    Parameters
    ----------
    metric : callable
        :func:`demographic_parity_difference` or :func:`equalized_odds_difference`.
    y_true, y_pred, sensitive_features, undefined
        As of the metric.
    draws : int
        At least 1.
    confidence : float
        In (0, 1).
    seed : int

    Returns
    -------
    Estimate
        ``n`` counts the draws in which the difference was defined; the others are left out.

    Raises
    ------
    ValueError
        As the metric, or if an option is out of range.
    """
    _check_draws(draws, confidence)
    sample = _sample(y_true, y_pred, sensitive_features)
    value = _observed(metric, sample, undefined)
    filled = sample.table > 0
    share = sample.table[filled] / sample.table.sum()

    def drawn_anew(size, generator):
        tables = np.zeros((size, *filled.shape), dtype=np.int64)
        tables[:, filled] = generator.multinomial(sample.table.sum(), share, size)
        return tables

    found = _drawn(lambda tables: _differences(metric, sample, tables, undefined), drawn_anew, filled.size, draws, seed)
    found = found[~np.isnan(found)]
    if np.isnan(value) or not len(found):
        return Estimate(value, np.nan, np.nan, len(found))
    around = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2]) - found.mean()
    low, high = np.clip(value + around, 0, 1).tolist()
    return Estimate(value, low, high, len(found))


class Chance(NamedTuple):
    """What a difference is where groups do not matter: its ``mean``, and ``high``, below which it stays as often as the
    confidence says. As text, it is in per cent, as an :class:`Estimate`."""

    mean: float
    high: float

    def __str__(self):
        return "–" if np.isnan(self.mean) else f"{100 * self.mean:.1f}, up to {100 * self.high:.1f}"


def chance_level(metric, y_true, y_pred, *, sensitive_features, undefined="nan", draws=1000, confidence=0.95, seed=0):
    """The difference that chance alone makes between groups of these sizes: that after inputs have exchanged groups.

    A largest minus smallest is never below 0; it grows with the number of groups and as they get smaller. For equalized
    odds inputs exchange groups within their true class: which are mistaken then does not depend on the group, while
    each group keeps its numbers of every class. For demographic parity all inputs do.

    Parameters
    ----------
    metric, y_true, y_pred, sensitive_features, undefined, draws, confidence, seed
        As of :func:`difference_interval`. An input of several groups hands on all of them together.

    Returns
    -------
    Chance
        NaN where the difference itself is.

    Raises
    ------
    ValueError
        As :func:`difference_interval`.
    """
    _check_draws(draws, confidence)
    sample = _sample(y_true, y_pred, sensitive_features)
    _observed(metric, sample, undefined)
    strata = sample.table
    if metric is demographic_parity_difference:
        strata = np.zeros_like(strata)
        strata[:, 0] = sample.table.sum(1)  # one stratum: the true class has no part in a selection rate

    def exchanged(size, generator):
        tables = np.zeros((size, *strata.shape), dtype=np.int64)
        for k in np.flatnonzero(strata.any((0, 2))):
            by_group, by_prediction = strata[:, k].sum(1), strata[:, k].sum(0)
            tables[:, :, k] = stats.random_table(by_group, by_prediction).rvs(size, random_state=generator)
        return tables

    found = _drawn(lambda tables: _differences(metric, sample, tables, undefined), exchanged, strata.size, draws, seed)
    return Chance(float(found.mean()), float(np.quantile(found, confidence)))


def group_table(y_true, y_pred, *, sensitive_features, positive=None, confidence=0.95):
    """The rates of each group with Wilson's intervals, for :func:`permask_core.display.table`.

    Parameters
    ----------
    y_true, y_pred, sensitive_features
        As of :func:`demographic_parity_difference`.
    positive : int, optional
        The class whose rates are shown, told from the rest; of two classes the larger one if not given, of more none.
    confidence : float
        In (0, 1).

    Returns
    -------
    list of dict
        One of each group: ``group`` and ``n``; with a positive class ``positives``, ``negatives``, and as Estimates
        ``selection rate``, ``true positive rate`` and ``false positive rate``; and ``accuracy``, an Estimate of the
        share put into the right one of all classes. A rate without an input is NaN.

    Raises
    ------
    ValueError
        As :func:`demographic_parity_difference`, or if the positive class is in neither y_true nor y_pred, or the
        confidence out of range.
    """
    sample = _sample(y_true, y_pred, sensitive_features)
    if positive is None and len(sample.classes) <= 2:
        positive = sample.classes[-1]
    if positive is not None and positive not in sample.classes:
        raise ValueError(f"positive is {positive!r}: expected a class of y_true or y_pred, one of "
                         f"{', '.join(map(str, sample.classes))}")
    rows = []
    for group, *counts in zip(sample.groups, *_counts(sample.member, sample.table)):
        n = int(counts[0].sum())
        row, of = {"group": group, "n": n}, {}
        if positive is not None:
            positives, selected, hits = (int(count[sample.classes == positive][0]) for count in counts)
            row |= {"positives": positives, "negatives": n - positives}
            of = {"selection rate": (selected, n), "true positive rate": (hits, positives),
                  "false positive rate": (selected - hits, n - positives)}
        of["accuracy"] = int(counts[2].sum()), n
        rows.append(row | {name: _proportion(*part, confidence) for name, part in of.items()})
    return rows


def _proportion(part, n, confidence):
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    value, _, low, high, n = proportion_interval(part, n, confidence)
    return Estimate(value, low, high, n)


class _Sample(NamedTuple):
    """Inputs counted: ``groups`` and ``classes`` by name; the sets of groups that inputs have, ``member`` int
    [sets, groups]; and how many have which set, true class and prediction, ``table`` int [sets, classes, classes]."""

    groups: tuple
    classes: np.ndarray
    member: np.ndarray
    table: np.ndarray


def _sample(y_true, y_pred, sensitive_features):
    y_true, y_pred = as_labels("y_true", y_true), as_labels("y_pred", y_pred)
    if len(y_true) != len(y_pred):
        raise ValueError(f"y_true has {len(y_true)} labels, y_pred has {len(y_pred)}: expected as many")
    groups, member = _members(sensitive_features, len(y_true))
    counted = member.any(1)
    if member.any(0).sum() < 2:
        raise ValueError(f"groups of sensitive_features with an input: {member.any(0).sum()}, expected at least two")
    member, sets = np.unique(member[counted].astype(np.int64), axis=0, return_inverse=True)
    classes, labels = np.unique([y_true[counted], y_pred[counted]], return_inverse=True)
    truth, predicted = labels.reshape(2, -1)
    shape = len(member), len(classes), len(classes)
    cell = np.ravel_multi_index((sets.ravel(), truth, predicted), shape)
    return _Sample(groups, classes, member, np.bincount(cell, minlength=np.prod(shape)).reshape(shape))


def _members(sensitive_features, n):
    """Names of the groups, and to which each input belongs, bool [n, groups]."""
    if isinstance(sensitive_features, Attribute):
        groups, member = sensitive_features.groups, sensitive_features.member.cpu().numpy()
        if member.shape != (n, len(groups)) or member.dtype != bool:
            raise ValueError(f"the member of sensitive_features is {member.dtype} {list(member.shape)}: expected bool "
                             f"[{n}, {len(groups)}], an input of y_true a row")
        return tuple(groups), member
    features = sensitive_features.cpu() if isinstance(sensitive_features, torch.Tensor) else sensitive_features
    values = np.asarray(features)
    if values.ndim != 1:
        raise ValueError(f"sensitive_features has the shape {list(values.shape)}: expected one group for each input "
                         "[n], or an Attribute")
    if len(values) != n:
        raise ValueError(f"sensitive_features has {len(values)} inputs, y_true has {n}: expected as many")
    objects = np.asarray(features, dtype=object)  # beside strings, numpy would make the string "nan" of a NaN
    missing = [i for i, one in enumerate(objects) if one is None or type(one).__name__ == "NAType" or one != one]
    if missing:
        raise ValueError(f"sensitive_features is {objects[missing[0]]} for input {missing[0]}: expected a group")
    groups, number = np.unique(values, return_inverse=True)
    return tuple(groups.tolist()), number[:, None] == np.arange(len(groups))


def _counts(member, table):
    """From tables [..., sets, classes, classes], how many inputs of each group are of a class, how many are put into
    it, and how many both: three arrays [..., groups, classes]."""
    return tuple(member.T @ count for count in (table.sum(-1), table.sum(-2), np.diagonal(table, axis1=-2, axis2=-1)))


def _rates(member, table):
    """The rates of each group and class, each [..., groups, classes]; NaN where there is no input to take one of."""
    positives, selected, hits = _counts(member, table)
    n = positives.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return {"selection rate": selected / n, "true positive rate": hits / positives,
                "false positive rate": (selected - hits) / (n - positives)}


def _differences(metric, sample, tables, undefined):
    """The metric of each of some tables [..., sets, classes, classes] of a sample."""
    rates = _rates(sample.member, tables)
    spreads = [_spread(rates[name][..., _classes(metric, sample)], undefined) for name in _COMPARED[metric]]
    return np.max(spreads, axis=0).mean(-1)  # the larger one in each class, and only then the mean


def _spread(rates, undefined):
    """Largest minus smallest over the groups: rates [..., groups, classes] to [..., classes]."""
    if undefined == "zero":
        rates = np.nan_to_num(rates)
    if undefined != "omit":
        return rates.max(-2) - rates.min(-2)
    defined = ~np.isnan(rates)
    largest, smallest = np.where(defined, rates, -np.inf).max(-2), np.where(defined, rates, np.inf).min(-2)
    return np.where(defined.sum(-2) >= 2, largest - smallest, np.nan)


def _classes(metric, sample):
    """Which classes a metric looks at. Of two, both give the same where their rates are defined: the larger one is
    enough, and is the one whose undefined rates are fairlearn's."""
    if len(sample.classes) <= 2:
        return [-1]
    in_truth = sample.table.any((0, 2)) if metric is equalized_odds_difference else np.ones(len(sample.classes), bool)
    return np.flatnonzero(in_truth)


def _observed(metric, sample, undefined):
    if metric not in _COMPARED:
        raise ValueError(f"metric is {metric!r}: expected {' or '.join(known.__name__ for known in _COMPARED)}")
    if undefined not in UNDEFINED:
        raise ValueError(f"undefined is {undefined!r}: expected one of {', '.join(UNDEFINED)}")
    value = float(_differences(metric, sample, sample.table, undefined))
    if np.isnan(value):
        warnings.warn(f"{metric.__name__} is NaN: {_undefined(metric, sample)}", stacklevel=3)
    return value


def _undefined(metric, sample):
    """In words, which rates of which groups there are none of; the first three of them."""
    rates = _rates(sample.member, sample.table)
    positives, *_ = _counts(sample.member, sample.table)
    found = []
    for name in _COMPARED[metric]:
        for k in np.arange(len(sample.classes))[_classes(metric, sample)]:
            for group in np.flatnonzero(np.isnan(rates[name][:, k])):
                found.append(f"group {sample.groups[group]!r} has no {name} for class {sample.classes[k]} "
                             f"({positives[group, k]} of its {positives[group].sum()} inputs are of it)")
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _check_draws(draws, confidence):
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws is {draws!r}: expected an integer of at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected a number in (0, 1)")


def _drawn(statistic, draw, size, draws, seed):
    """A statistic of random tables, as many at once as memory allows."""
    generator = np.random.default_rng(seed)
    block = max(1, CHUNK // size)
    sizes = [min(block, draws - done) for done in range(0, draws, block)]
    return np.concatenate([statistic(draw(count, generator)) for count in sizes])


# ---- Individuals -----------------------------------------------------------------------------------------------------

def euclidean(a, b):
    """The Euclidean distance of each row of a from that of b, over all entries: [m, ...] twice to [m]."""
    return torch.linalg.vector_norm(_difference(a, b), dim=1)


def total_variation(a, b):
    """Half the sum of absolute differences: of probabilities, the largest difference that any event can have."""
    return _difference(a, b).abs().sum(1) / 2


def _difference(a, b):
    a, b = (x if x.is_floating_point() else x.float() for x in (a, b))  # uint8 would wrap around
    return (a - b).flatten(1)


DISTANCES = {"euclidean": euclidean, "total_variation": total_variation}


class IndividualFairness(NamedTuple):
    """How far outputs are apart for each unit that inputs are: the smaller, the more alike inputs are treated alike.

    ``mean``, ``sd`` (n - 1) and the ``largest`` of the ratios of ``pairs`` pairs. Left out are ``self_pairs`` of an
    input with itself, and pairs of ``identical`` inputs, at distance 0; of the latter, ``violations`` have different
    outputs, which would be an infinite ratio. Pairs share inputs: sd over the root of ``pairs`` is no standard error.
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
    """The mean over pairs of inputs of the distance between their outputs over that between the inputs themselves: a
    mean of ratios, not the Lipschitz constant, which is their supremum.

    The ratio has a unit, that of the outputs' distance over that of the inputs'. For images, give pixels in [0, 1]:
    standardised or not, in 255ths or not, changes the value by that factor.

    Parameters
    ----------
    outputs : array-like, shape [n, ...]
        What the model makes of each input: probabilities for the default distance.
    inputs : array-like, shape [n, ...]
    output_distance, input_distance : {"euclidean", "total_variation"} or callable
        ``distance(a, b)`` of two batches of tensors [m, ...] gives [m]. The Euclidean is over all entries; total
        variation is of probabilities, in [0, 1], as by Dwork et al.
    pairs : int, "all", or array-like of int, shape [m, 2]
        How many distinct pairs to draw at random, all of them where there are no more; or every pair; or these.
    seed : int

    Returns
    -------
    IndividualFairness

    Raises
    ------
    ValueError
        If the lengths differ, there are fewer than two inputs, a number or distance is not finite, total variation is
        asked of what is no probability, a distance or the pairs are unknown or out of range, or no pair is at a
        distance above 0.

    References
    ----------
    Dwork et al., "Fairness through awareness", 2012; as a mean, Mohammadshahi and Ioannou, TMLR 2025.
    """
    outputs, inputs = _batch("outputs", outputs), _batch("inputs", inputs)
    n = len(inputs)
    if len(outputs) != n or n < 2:
        raise ValueError(f"outputs has {len(outputs)} rows, inputs has {n}: expected as many, at least two")
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
    """The distance between the rows of ``values`` that two arrays of indices name: float64, on the CPU."""
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
    if isinstance(pairs, (str, int)):
        if pairs != "all" and not (isinstance(pairs, int) and pairs >= 1):
            raise ValueError(f"pairs is {pairs!r}: expected a number of at least 1, 'all', or indices [m, 2]")
        wanted = every if pairs == "all" else min(pairs, every)
        chosen = None if wanted == every else np.random.default_rng(seed).choice(every, wanted, replace=False)
        for start in range(0, wanted, size):
            number = np.arange(start, min(start + size, wanted)) if chosen is None else chosen[start:start + size]
            # Each input with the one that many places on, in a circle: every unordered pair has one number.
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
