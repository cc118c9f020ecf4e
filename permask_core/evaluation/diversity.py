"""How differently several networks answer: disagreement, divergences, what an ensemble gains, and a map of functions.

Everything is computed from the probabilities that networks give to the classes of the same inputs, [models, n,
classes]. A comparison of each with each is a matrix [models, models], a mean over inputs, whose off-diagonal entries
:func:`pair_mean` reduces to one number. Adnan et al., "Sparse Training from Random Initialization: Aligning Lottery
Ticket Masks using Weight Symmetry", ICML 2025, measure so that a ticket trained again finds almost the same function.
"""

from numbers import Integral
from typing import NamedTuple

import numpy as np
from scipy.special import entr, rel_entr, softmax

from permask_core.evaluation.statistics import as_labels

TOLERANCE = 1e-4  # of sums that should be 1: many classes in half precision


class Diversity(NamedTuple):
    """Of several models: the mean ``accuracy`` of each alone, that of the ``ensemble``, in [0, 1], and the means over
    pairs of ``disagreement`` (a share of the inputs), ``kl`` and ``js`` (nats)."""

    accuracy: float
    ensemble: float
    disagreement: float
    kl: float
    js: float


class FunctionMap(NamedTuple):
    """``points`` [models, dimensions] whose distances approximate those between functions, the widest direction first;
    the share of the squared distances that they have ``explained``, and Kruskal's ``stress``, both 0 to 1."""

    points: np.ndarray
    explained: float
    stress: float


def probabilities(logits):
    """The softmax over the last axis, computed in float64.

    Parameters
    ----------
    logits : array-like, shape [..., classes]
        Such as a list of what :func:`permask_core.training.predict` returns; tensors of any type and device, also with
        a gradient.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    ValueError
        If there are none, their shapes differ, or one is not finite.
    """
    try:
        logits = [np.asarray(one.detach().cpu().double() if hasattr(one, "detach") else one, dtype=float)
                  for one in logits]
        if len({one.shape for one in logits}) > 1:
            raise ValueError(f"the shapes are {', '.join(str(list(one.shape)) for one in logits)}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"the logits are no array of numbers ({error}): expected [..., classes], of the same shape "
                         "for each model") from error
    logits = np.asarray(logits)
    if not logits.size:
        raise ValueError(f"the logits have the shape {list(logits.shape)}: expected at least one number")
    if not np.isfinite(logits).all():
        raise ValueError(f"{(~np.isfinite(logits)).sum()} of the logits are not finite: expected numbers")
    return softmax(logits, axis=-1)


def disagreement(p):
    """The share of inputs to which two models give different answers: a metric between models.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]
        Probabilities; the answer is the class with the largest, the first of equal ones.

    Returns
    -------
    numpy.ndarray, shape [models, models]
        In [0, 1]; its square root is a Euclidean distance.

    Raises
    ------
    ValueError
        If these are not probabilities of several classes.
    """
    named = _checked(p).argmax(-1)
    return np.stack([(one != named).mean(-1) for one in named])


def kl_divergence(p):
    """The Kullback-Leibler divergence of each model's answers from each other's, a mean over inputs.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]

    Returns
    -------
    numpy.ndarray, shape [models, models]
        Entry (i, j) is KL(p_i || p_j) = sum p_i log(p_i / p_j) in nats; infinite where j excludes what i does not.

    Raises
    ------
    ValueError
        As for :func:`disagreement`.
    """
    p = _checked(p)
    return np.stack([rel_entr(one, p).sum(-1).mean(-1) for one in p])


def js_divergence(p):
    """The Jensen-Shannon divergence between models, a mean over inputs: what both lose to their common mean.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]

    Returns
    -------
    numpy.ndarray, shape [models, models]
        In nats, 0 to ln 2; without the square root, which would be a Euclidean distance.

    Raises
    ------
    ValueError
        As for :func:`disagreement`.

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
    """The mean over all ordered pairs of different models.

    Parameters
    ----------
    matrix : array-like, shape [models, models]
        Of at least two models.

    Returns
    -------
    float
    """
    matrix = _square(matrix)
    return float(matrix[~np.eye(len(matrix), dtype=bool)].mean())


def ensemble_accuracy(p, y):
    """How often the mean of the models' probabilities is largest for the right class.

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
        As for :func:`disagreement`, or if the labels do not fit.
    """
    p = _checked(p)
    return float((p.mean(0).argmax(-1) == _labels(p, y)).mean())


def diversity(p, y):
    """All of it in one row, as the paper's tables have it.

    Parameters
    ----------
    p : array-like, shape [models, n, classes]
        Probabilities of at least two models, as from :func:`probabilities`.
    y : array-like of int, shape [n]

    Returns
    -------
    Diversity
        With means over ordered pairs of models, which matters to the Kullback-Leibler divergence alone.

    Raises
    ------
    ValueError
        As for :func:`ensemble_accuracy`, or if there is one model only.
    """
    p = _checked(p)
    return Diversity(float((p.argmax(-1) == _labels(p, y)).mean()), ensemble_accuracy(p, y),
                     *(pair_mean(measure(p)) for measure in (disagreement, kl_divergence, js_divergence)))


def function_map(distances, dimensions=2):
    """Place models so that the distances between them are as they should be: classical multidimensional scaling.

    Parameters
    ----------
    distances : array-like, shape [models, models]
        Symmetric, with zeros on the diagonal: the square root of :func:`disagreement` or :func:`js_divergence`, which
        are distances in a space of many dimensions.
    dimensions : int

    Returns
    -------
    FunctionMap
        Turned to the principal axes; which side of an axis is positive means nothing. Distances that fit into no space
        have negative eigenvalues, which are counted as not explained.

    Raises
    ------
    ValueError
        If these are no distances, or there are more dimensions than models.

    References
    ----------
    Torgerson, "Multidimensional scaling: I. Theory and method", 1952; Fuglede and Topsøe, "Jensen-Shannon divergence
    and Hilbert space embedding", 2004.
    """
    distances = _square(distances)
    if not np.isfinite(distances).all() or (distances < 0).any() or np.diag(distances).any():
        raise ValueError("distances are not all finite and at least 0, with zeros on the diagonal")
    if not np.allclose(distances, distances.T):
        raise ValueError("distances are not symmetric: expected the same both ways (of Kullback-Leibler divergences, "
                         "the mean of the two)")
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
        raise ValueError(f"p has the shape {list(p.shape)}: expected [models, n, classes], at least one model, one "
                         "input and two classes")
    if not (p >= 0).all() or not np.allclose(p.sum(-1), 1, atol=TOLERANCE):
        raise ValueError("p are not probabilities that add up to 1: expected those, as from probabilities(logits)")
    return p


def _labels(p, y):
    y = as_labels("y", y, p.shape[-1])
    if len(y) != p.shape[1]:
        raise ValueError(f"y has {len(y)} labels, p {p.shape[1]} inputs: expected as many")
    return y


def _square(matrix):
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"got a matrix of shape {list(matrix.shape)}: expected [models, models], at least two models")
    return matrix


def _entropy(p):
    return entr(p).sum(-1).mean(-1)
