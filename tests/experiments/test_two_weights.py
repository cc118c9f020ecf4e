"""The toy against outside truth: numerical integration, PyTorch's autograd, scipy's assignment, its own symmetry."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.optimize import linear_sum_assignment, minimize

from permask_core.experiments import two_weights
from tests.hypotheses import examples

weight = st.floats(-4, 4).filter(lambda w: w == 0 or abs(w) > 1e-3)
pair = arrays(float, 2, elements=weight)
batch = arrays(float, (7, 2), elements=weight)


def autograd(weights, points=20_001):
    """Loss and gradient of the network written in PyTorch, the mean over x by the trapezoidal rule."""
    w = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-1, 1, points, dtype=torch.float64)
    target = torch.relu(3 * x) + torch.relu(-x)
    error = (torch.relu(w[0] * x) + torch.relu(w[1] * x) - target) ** 2
    value = torch.trapezoid(error, x) / 2
    value.backward()
    return value.item(), w.grad.numpy()


@examples(1 / 2)
@given(pair)
def test_loss_is_the_integral(weights):
    def squared_error(x):
        return (two_weights.network(weights, [x])[0] - max(3 * x, -x)) ** 2 / 2

    assert two_weights.loss(weights) == pytest.approx(quad(squared_error, -1, 1, points=[0])[0], abs=1e-9)


@examples(1 / 2)
@given(pair)
def test_loss_and_gradient_agree_with_autograd(weights):
    value, slope = autograd(weights)
    assert two_weights.loss(weights) == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(two_weights.gradient(weights), slope, atol=1e-6)


@given(batch)
def test_swapping_the_neurons_changes_nothing(weights):
    x = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(two_weights.network(weights, x), two_weights.network(weights[:, ::-1], x), atol=1e-15)
    np.testing.assert_array_equal(two_weights.loss(weights), two_weights.loss(weights[:, ::-1]))
    np.testing.assert_array_equal(two_weights.gradient(weights)[:, ::-1], two_weights.gradient(weights[:, ::-1]))


def test_minima_and_best_single_weights():
    assert two_weights.loss([[3, -1], [-1, 3]]).tolist() == [0, 0]
    for sign, best, value in ((1, 3, 1 / 6), (-1, -1, 3 / 2)):
        for axis in (0, 1):
            found = minimize(lambda w, a=axis: two_weights.loss(np.eye(2)[a] * w), x0=[sign * 2.0],
                             method="Nelder-Mead")
            assert found.x[0] == pytest.approx(best, abs=1e-3)
            assert found.fun == pytest.approx(value, abs=1e-6)


@given(pair, st.floats(0.1, 1.5))
def test_descent_ends_at_its_closed_form(weights, learning_rate):
    for slope in (3, 1):  # the edge between two fates is crossed ever more slowly
        assume(abs(abs(weights[0] - weights[1]) - slope) > 1e-3)
    end = two_weights.descend(weights, steps=1000, learning_rate=learning_rate)[-1]
    np.testing.assert_allclose(end, two_weights.limit(weights), atol=1e-4)


@pytest.mark.parametrize("start, end", [
    ((1, -2), (3, -1)), ((-1, 2), (-1, 3)),           # opposite signs: the minimum of that quadrant
    ((1, 2), (1, 2)), ((0.5, 1), (1.25, 1.75)),       # both right: the valley w0 + w1 = 3
    ((-0.5, -1), (-0.25, -0.75)),                     # both left: the valley w0 + w1 = -1
    ((4, 0.5), (3, -1)), ((-0.5, -2), (3, -1)),       # differences above 3 and above 1 leave the quadrant
    ((2, 0), (3, 0)), ((0, -2), (0, -1)), ((0, 0), (0, 0)),
])
def test_limits_worked_by_hand(start, end):
    np.testing.assert_allclose(two_weights.limit(start), end)
    np.testing.assert_allclose(two_weights.descend(start, steps=400, learning_rate=0.3)[-1], end, atol=1e-9)


@given(batch, arrays(bool, (7, 2)))
def test_masked_weights_stay_zero(weights, mask):
    run = two_weights.descend(weights, mask, steps=20, learning_rate=0.3)
    assert run.shape == (21, 7, 2)
    assert (run[:, ~mask] == 0).all()
    np.testing.assert_array_equal(run[0][mask], weights[mask])


def test_a_batch_is_its_members():
    starts = np.random.default_rng(0).normal(size=(3, 5, 2))
    run = two_weights.descend(starts, [True, False], steps=10, learning_rate=0.2)
    alone = two_weights.descend(starts[1, 2], [True, False], steps=10, learning_rate=0.2)
    np.testing.assert_array_equal(run[:, 1, 2], alone)
    np.testing.assert_array_equal(two_weights.limit(starts)[1, 2], two_weights.limit(starts[1, 2]))


@given(batch)
def test_largest_keeps_the_larger_magnitude(weights):
    mask = two_weights.largest(weights)
    assert mask.dtype == bool and (mask.sum(-1) == 1).all()
    assert (np.abs(weights[mask]) == np.abs(weights).max(-1)).all()


@given(pair, pair)
def test_match_solves_the_assignment(source, target):
    gains = np.outer(target, source)
    rows, columns = linear_sum_assignment(gains, maximize=True)
    permutation = two_weights.match(source, target)
    moved = two_weights.permute(permutation, source)
    assert moved @ target == pytest.approx(gains[rows, columns].sum(), abs=1e-12)
    assert np.sum((moved - target) ** 2) <= np.sum((moved[::-1] - target) ** 2) + 1e-12


@given(pair)
def test_a_planted_swap_is_recovered(weights):
    assume(weights[0] != weights[1])
    permutation = two_weights.match(weights, weights[::-1])
    assert permutation.tolist() == [1, 0]
    np.testing.assert_array_equal(two_weights.permute(permutation, weights), weights[::-1])
    mask = two_weights.largest(weights)
    assert (np.abs(weights[::-1][two_weights.permute(permutation, mask)]) == np.abs(weights).max()).all()


@pytest.mark.parametrize("call, message", [
    (lambda: two_weights.loss(3.0), r"shape \[\]: expected two"),
    (lambda: two_weights.loss(np.zeros((2, 3))), r"shape \[2, 3\]"),
    (lambda: two_weights.gradient([np.nan, 1]), "a weight is nan"),
    (lambda: two_weights.descend([1, 2], steps=-1, learning_rate=0.1), "steps is -1"),
    (lambda: two_weights.descend([1, 2], steps=2.5, learning_rate=0.1), "steps is 2.5"),
    (lambda: two_weights.descend([1, 2], steps=2, learning_rate=2.0), "learning_rate is 2.0"),
    (lambda: two_weights.descend([1, 2], steps=2, learning_rate=0), "learning_rate is 0"),
    (lambda: two_weights.descend([1, 2], [1, 0], steps=2, learning_rate=0.1), "the mask is int64"),
    (lambda: two_weights.descend([1, 2], [True], steps=2, learning_rate=0.1), r"the mask is bool \[1\]"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
