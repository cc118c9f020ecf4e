"""The two-weight toy: a network so small that its whole loss landscape fits into one picture.

Two neurons with one weight each, f(x) = relu(w0 x) + relu(w1 x), learn the function with the weights (3, -1), on inputs
uniform in [-1, 1]. Swapping the neurons does not change f, so the landscape is symmetric about the diagonal w0 = w1.
For x > 0 only positive weights are active and for x < 0 only negative weights: f consists of two half lines, and loss,
gradient and the limit of training have closed forms. Every function takes a batch: weights of shape [..., 2]. After the
two-weight picture in Adnan et al., "Sparse Training from Random Initialization", ICML 2025, arXiv 2505.05143.
"""

import numpy as np

TARGET = np.array([3.0, -1.0])
RIGHT, LEFT = 3.0, 1.0  # the slopes of the target on its two half lines
LARGEST_STEP = 1.5  # one over the largest curvature, 2/3, that of two weights of one sign


def network(weights, x):
    """f(x) = relu(w0 x) + relu(w1 x).

    Parameters
    ----------
    weights : array-like, shape [..., 2]
    x : array-like, shape [n]

    Returns
    -------
    numpy.ndarray, shape [..., n]
    """
    return np.maximum(_checked(weights)[..., None] * np.asarray(x, dtype=float), 0).sum(axis=-2)


def loss(weights):
    """Mean squared error against the target, over x uniform in [-1, 1].

    Let r be the sum of the positive weights and l the absolute sum of the negative weights. Then f(x) is r x on the
    right and -l x on the left, and the integral is ((r - 3)^2 + (l - 1)^2) / 6.

    Parameters
    ----------
    weights : array-like, shape [..., 2]

    Returns
    -------
    numpy.ndarray, shape [...]

    Raises
    ------
    ValueError
        If the last axis does not have two weights, or a weight is not finite.
    """
    right, left = _slopes(_checked(weights))
    return ((right - RIGHT) ** 2 + (left - LEFT) ** 2) / 6


def gradient(weights):
    """Gradient of :func:`loss`, with relu'(0) = 0 as in PyTorch: a weight of exactly zero does not change.

    Parameters
    ----------
    weights : array-like, shape [..., 2]

    Returns
    -------
    numpy.ndarray, shape [..., 2]
    """
    weights = _checked(weights)
    right, left = (slope[..., None] for slope in _slopes(weights))
    return np.where(weights > 0, right - RIGHT, LEFT - left) / 3 * (weights != 0)


def descend(weights, mask=None, *, steps, learning_rate):
    """Run gradient descent on the expected loss, for the whole batch at once.

    Parameters
    ----------
    weights : array-like, shape [..., 2]
        The initial weights of each run.
    mask : array-like of bool, shape [..., 2], optional
        The weights to keep; all others are set to zero before the first step and remain zero.
    steps : int
        At least 0.
    learning_rate : float
        In (0, 1.5]; larger steps jump over the valley of two weights of one sign.

    Returns
    -------
    numpy.ndarray, shape [steps + 1, ..., 2]
        The trajectories, the (masked) initialisation first.

    Raises
    ------
    ValueError
        If the mask is not bool or does not fit, or a number is out of range.
    """
    weights = _checked(weights)
    if not isinstance(steps, (int, np.integer)) or steps < 0:
        raise ValueError(f"steps is {steps!r}: expected an integer of at least 0")
    if not 0 < learning_rate <= LARGEST_STEP:
        raise ValueError(f"learning_rate is {learning_rate!r}: expected a number in (0, {LARGEST_STEP}]")
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape not in ((2,), weights.shape):
            raise ValueError(f"the mask is {mask.dtype} {list(mask.shape)}: expected bool {list(weights.shape)} or [2]")
        weights = np.where(mask, weights, 0.0)
    trajectory = [weights]
    for _ in range(steps):
        # Masked weights are zero and remain zero, because the gradient of a zero weight is zero.
        trajectory.append(trajectory[-1] - learning_rate * gradient(trajectory[-1]))
    return np.stack(trajectory)


def limit(weights):
    """Return the limit of gradient descent, in closed form.

    Weights of opposite sign converge to the minimum of their quadrant. Two weights of one sign have the same gradient,
    so their difference does not change, and their sum converges to the slope of their common half line, 3 or -1. If the
    difference is larger than that slope, the smaller weight changes its sign. A zero weight remains zero.

    Parameters
    ----------
    weights : array-like, shape [..., 2]
        The initialisation; set its masked weights to zero for the limit of sparse training.

    Returns
    -------
    numpy.ndarray, shape [..., 2]
        The limit of gradient flow, and of :func:`descend` for all its learning rates.
    """
    weights = _checked(weights)
    own = np.where(weights > 0, RIGHT, -LEFT) * (weights != 0)  # the limit of a weight alone on its half line
    first, second = weights[..., :1], weights[..., 1:]
    together = own[..., :1]  # the limit of the sum of two weights of one sign
    difference = first - second
    valley = np.concatenate([together + difference, together - difference], axis=-1) / 2
    minimum = np.where(difference > 0, TARGET, TARGET[::-1])
    same_side = np.where(np.abs(difference) > np.abs(together), minimum, valley)
    return np.where(first * second > 0, same_side, own)


def largest(weights):
    """Return the mask that keeps the weight of larger magnitude in each pair (the first if they are equal).

    Parameters
    ----------
    weights : array-like, shape [..., 2]

    Returns
    -------
    numpy.ndarray of bool, shape [..., 2]
    """
    keep_first = np.abs(_checked(weights)) @ [1, -1] >= 0
    return np.stack([keep_first, ~keep_first], axis=-1)


def match(source, target):
    """Weight matching: return the permutation of the source's neurons that brings it closest to the target.

    There are two permutations, so the assignment problem is one comparison: swap if this increases the inner product
    (equivalently, decreases the distance).

    Parameters
    ----------
    source, target : array-like, shape [..., 2]

    Returns
    -------
    numpy.ndarray of int, shape [..., 2]
        Neuron i of the permuted source is neuron ``permutation[..., i]`` of the source; the identity on a tie.
    """
    source, target = _checked(source), _checked(target)
    swap = (source @ [1, -1]) * (target @ [1, -1]) < 0
    return np.where(swap[..., None], [1, 0], [0, 1])


def permute(permutation, tensor):
    """Permute the neurons of weights or masks [..., 2] by a result of :func:`match`."""
    return np.take_along_axis(np.asarray(tensor), np.asarray(permutation), axis=-1)


def _slopes(weights):
    return np.maximum(weights, 0).sum(axis=-1), np.maximum(-weights, 0).sum(axis=-1)


def _checked(weights):
    weights = np.asarray(weights, dtype=float)
    if weights.ndim == 0 or weights.shape[-1] != 2:
        raise ValueError(f"the weights have shape {list(weights.shape)}: expected two weights on the last axis")
    if not np.isfinite(weights).all():
        raise ValueError(f"a weight is {weights[~np.isfinite(weights)][0]}: expected finite numbers")
    return weights
