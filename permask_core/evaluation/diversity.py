"""Diversity of the predictions of several networks: disagreement, divergences, ensembles, and a map of functions.

All measures are computed from the predicted probabilities for the same inputs, [models, n, classes]. A pairwise
comparison is a matrix [models, models] of means over inputs; :func:`pair_mean` reduces its off-diagonal entries to one
number. With these measures Adnan et al., "Sparse Training from Random Initialization: Aligning Lottery Ticket Masks
using Weight Symmetry", ICML 2025, show that a ticket that is trained again finds almost the same function.
"""

from numbers import Integral
from typing import NamedTuple

import numpy as np
from scipy.special import entr, rel_entr, softmax

from permask_core.evaluation.statistics import as_labels

TOLERANCE = 1e-4  # for sums that should be 1, with many classes in half precision


class Diversity(NamedTuple):
    """Measures of several models: their mean ``accuracy``, that of the ``ensemble``, both in [0, 1], and means over
    pairs of ``disagreement`` (a fraction of the inputs), ``kl`` and ``js`` (in nats)."""

    accuracy: float
    ensemble: float
    disagreement: float
    kl: float
    js: float


class FunctionMap(NamedTuple):
    """``points`` [models, dimensions] whose distances approximate those between functions, widest direction first; the
    fraction ``explained`` of the squared distances, and Kruskal's ``stress``, both from 0 to 1."""

    points: np.ndarray
    explained: float
    stress: float


def probabilities(logits):
    """Return the softmax over the last axis, computed in float64.

    Parameters
    ----------
    logits : array-like, shape [..., classes]
        For example a list of results of :func:`permask_core.training.predict`. Tensors may have any type and device,
        and may require gradients.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    ValueError
        If there are no logits, their shapes differ, or a logit is not finite.
    """
    try:
        logits = [np.asarray(one.detach().cpu().double() if hasattr(one, "detach") else one, dtype=float)
                  for one in logits]
        if len({one.shape for one in logits}) > 1:
            raise ValueError(f"the shapes are {', '.join(str(list(one.shape)) for one in logits)}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the logits are not an array of numbers ({error}): expected [..., classes], of the same "
                         "shape for each model") from error
    logits = np.asarray(logits)
    if not logits.size:
        raise ValueError(f"the logits have the shape {list(logits.shape)}: expected at least one number")
    if not np.isfinite(logits).all():
        raise ValueError(f"{(~np.isfinite(logits)).sum()} of the logits are not finite: expected numbers")
    return softmax(logits, axis=-1)


def disagreement(p):
    """Return the fraction of inputs for which two models predict different classes, a metric between models.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]
        Probabilities; the prediction is the class with the largest probability, the first of equal ones.

    Returns
    -------
    numpy.ndarray, shape [models, models]
        In [0, 1]; the square root is a Euclidean distance.

    Raises
    ------
    ValueError
        If ``p`` are not probabilities of several classes.
    """
    named = _checked(p).argmax(-1)
    return np.stack([(one != named).mean(-1) for one in named])


def kl_divergence(p):
    """Return the Kullback-Leibler divergence between the predictions of all pairs of models, averaged over inputs.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]

    Returns
    -------
    numpy.ndarray, shape [models, models]
        Entry (i, j) is KL(p_i || p_j) = sum p_i log(p_i / p_j) in nats. It is infinite if j gives probability 0 to a
        class and i does not.

    Raises
    ------
    ValueError
        As in :func:`disagreement`.
    """
    p = _checked(p)
    return np.stack([rel_entr(one, p).sum(-1).mean(-1) for one in p])


def js_divergence(p):
    """Return the Jensen-Shannon divergence between models, averaged over inputs.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]

    Returns
    -------
    numpy.ndarray, shape [models, models]
        In nats, from 0 to ln 2; the square root, which is not taken, would be a Euclidean distance.

    Raises
    ------
    ValueError
        As in :func:`disagreement`.

    References
    ----------
    Lin, "Divergence measures based on the Shannon entropy", 1991.
    """
    p = _checked(p)
    own, found = _entropy(p), np.zeros((len(p), len(p)))
    for i in range(len(p) - 1):
        found[i, i + 1:] = _entropy((p[i] + p[i + 1:]) / 2) - (own[i] + own[i + 1:]) / 2
    return np.maximum(found + found.T, 0)  # rounding


def pair_mean(matrix):
    """Return the mean over all ordered pairs of different models.

    Parameters
    ----------
    matrix : array-like, shape [models, models]
        A comparison of at least two models.

    Returns
    -------
    float
    """
    matrix = _square(matrix)
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


def ensemble_accuracy(p, y):
    """Return the accuracy of the ensemble, which predicts by the mean of the models' probabilities.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]
    y : array-like of int, shape [n]

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        As in :func:`disagreement`, or if the labels do not fit.
    """
    p = _checked(p)
    return float((p.mean(0).argmax(-1) == _labels(p, y)).mean())


def diversity(p, y):
    """Return all measures, as in a row of the paper's tables.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]
        Probabilities of at least two models, for example from :func:`probabilities`.
    y : array-like of int, shape [n]

    Returns
    -------
    Diversity
        Means are over ordered pairs of models, which matters only for the Kullback-Leibler divergence.

    Raises
    ------
    ValueError
        As in :func:`ensemble_accuracy`, or if there is only one model.
    """
    p = _checked(p)
    return Diversity(float((p.argmax(-1) == _labels(p, y)).mean()), ensemble_accuracy(p, y),
                     *(pair_mean(measure(p)) for measure in (disagreement, kl_divergence, js_divergence)))


def function_map(distances, dimensions=2):
    """Map models to points with approximately the given distances, by classical multidimensional scaling.

    Parameters
    ----------
    distances : array-like, shape [models, models]
        Symmetric, with zeros on the diagonal: for example the square root of :func:`disagreement` or
        :func:`js_divergence`, which are distances in a space of many dimensions.
    dimensions : int

    Returns
    -------
    FunctionMap
        Points in their principal axes; the sign of an axis is arbitrary. Distances that are not Euclidean have negative
        eigenvalues, which count as not explained.

    Raises
    ------
    ValueError
        If ``distances`` are not distances, or there are more dimensions than models.

    References
    ----------
    Torgerson, "Multidimensional scaling: I. Theory and method", 1952; Fuglede and Topsøe, "Jensen-Shannon divergence
    and Hilbert space embedding", 2004.
    """
    distances = _square(distances)
    if not np.isfinite(distances).all() or (distances < 0).any() or np.diag(distances).any():
        raise ValueError("distances are wrong: expected finite numbers of at least 0, with zeros on the diagonal")
    if not np.allclose(distances, distances.T):
        raise ValueError("distances are not symmetric: expected a symmetric matrix (for Kullback-Leibler divergences, "
                         "the mean of both directions)")
    if not isinstance(dimensions, Integral) or isinstance(dimensions, bool) or not 1 <= dimensions <= len(distances):
        raise ValueError(f"dimensions is {dimensions!r}: expected an integer from 1 to {len(distances)}")
    squares = distances**2
    centred = squares - squares.mean(0)
    values, vectors = np.linalg.eigh(-(centred - centred.mean(1, keepdims=True)) / 2)
    kept = np.maximum(values[::-1][:dimensions], 0)
    points = vectors[:, ::-1][:, :dimensions] * np.sqrt(kept)
    placed = np.linalg.norm(points[:, None] - points, axis=-1)
    if not distances.any():
        return FunctionMap(points, 1.0, 0.0)
    return FunctionMap(points, float(kept.sum() / np.abs(values).sum()),
                       float(np.sqrt(((distances - placed)**2).sum() / squares.sum())))


def _checked(p):
    p = np.asarray(p, dtype=float)
    if p.ndim != 3 or not p.shape[0] or not p.shape[1] or p.shape[2] < 2:
        raise ValueError(f"p has the shape {list(p.shape)}: expected [models, n, classes] with at least one model, "
                         "one input and two classes")
    if not (p >= 0).all() or not np.allclose(p.sum(-1), 1, atol=TOLERANCE):
        raise ValueError("p is not a distribution over classes: expected probabilities(logits), for example")
    return p


def _labels(p, y):
    y = as_labels("y", y, p.shape[-1])
    if len(y) != p.shape[1]:
        raise ValueError(f"y has {len(y)} labels: expected {p.shape[1]}, the number of inputs in p")
    return y


def _square(matrix):
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"got a matrix of shape {list(matrix.shape)}: expected [models, models], at least two models")
    return matrix


def _entropy(p):
    return entr(p).sum(-1).mean(-1)
