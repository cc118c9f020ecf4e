"""Diversity against scipy, closed forms, geometry and properties that hold for any networks."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon, pdist, squareform
from scipy.special import softmax
from scipy.stats import entropy

from permask_core.evaluation.diversity import (
    disagreement,
    diversity,
    ensemble_accuracy,
    function_map,
    js_divergence,
    kl_divergence,
    pair_mean,
    probabilities,
)

MEASURES = (disagreement, kl_divergence, js_divergence)


@st.composite
def models(draw, least=2, most=5):
    """Probabilities of several models, some of them certain of many answers."""
    shape = draw(st.tuples(st.integers(least, most), st.integers(1, 6), st.integers(2, 5)))
    return probabilities(draw(arrays(float, shape, elements=st.floats(-30, 30))))


def random_models(*shape, seed=0):
    return probabilities(np.random.default_rng(seed).normal(0, 2, shape))


def test_probabilities_are_the_softmax_of_a_list_of_tensors():
    logits = [torch.randn(7, 4, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    found = probabilities(logits)
    assert found.shape == (3, 7, 4) and found.dtype == np.float64
    assert np.allclose(found, softmax(np.stack([one.numpy() for one in logits]).astype(float), axis=-1))
    assert np.isfinite(kl_divergence(probabilities(torch.tensor([[[0.0, 200.0]], [[200.0, 0.0]]])))).all()


def test_logits_of_any_type_that_require_a_gradient():
    logits = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(0))
    expected = softmax(logits.numpy().astype(float), axis=-1)
    for given_ in (logits.clone().requires_grad_(), [one.clone().requires_grad_() for one in logits],
                   [list(one) for one in logits]):
        assert np.allclose(probabilities(given_), expected)
    low = logits.bfloat16().requires_grad_()
    assert np.allclose(probabilities(low), softmax(low.detach().double().numpy(), axis=-1))


# ---- Comparisons of each with each -----------------------------------------------------------------------------------

@pytest.mark.parametrize("measure", MEASURES)
def test_identical_models_do_not_differ(measure):
    p = random_models(1, 50, 10)
    assert (measure(np.repeat(p, 4, axis=0)) == 0).all()


def test_certain_models_that_never_agree():
    p = np.eye(3)[:, None, :].repeat(5, axis=1)
    apart = 1 - np.eye(3)
    assert (disagreement(p) == apart).all()
    assert np.allclose(js_divergence(p), math.log(2) * apart)
    assert (kl_divergence(p) == np.where(apart, np.inf, 0)).all()


def test_disagreement_by_hand():
    p = [[[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]], [[0.6, 0.4], [0.7, 0.3], [0.1, 0.9]]]
    assert disagreement(p) == pytest.approx(np.array([[0, 2 / 3], [2 / 3, 0]]))


def test_divergences_are_scipys():
    p = random_models(3, 20, 6)
    for i, j in itertools.product(range(3), repeat=2):
        assert kl_divergence(p)[i, j] == pytest.approx(entropy(p[i], p[j], axis=-1).mean(), abs=1e-12)
        assert js_divergence(p)[i, j] == pytest.approx((jensenshannon(p[i], p[j], axis=-1) ** 2).mean(), abs=1e-12)


def test_the_kullback_leibler_divergence_has_a_direction():
    found = kl_divergence([[[0.5, 0.5]], [[0.9, 0.1]]])
    assert found[0, 1] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert found[1, 0] == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert abs(found[0, 1] - found[1, 0]) > 0.1
    assert pair_mean(found) == pytest.approx((found[0, 1] + found[1, 0]) / 2)


@given(models())
def test_bounds_of_the_divergences(p):
    js, kl = js_divergence(p), kl_divergence(p)
    assert (js == js.T).all() and (js >= 0).all() and (js <= math.log(2) + 1e-12).all()
    assert (kl >= -1e-12).all()
    assert (js <= (kl + kl.T) / 4 + 1e-12).all()  # half the mean of the two directions


@given(models(least=3))
def test_disagreement_is_a_metric(p):
    found = disagreement(p)
    assert (found == found.T).all() and (np.diag(found) == 0).all()
    assert (found[:, None, :] <= found[:, :, None] + found[None] + 1e-12).all()  # the triangle inequality


@given(models())
def test_of_two_different_answers_at_least_one_is_wrong(p):
    found = diversity(p, np.arange(p.shape[1]) % p.shape[2])
    assert found.disagreement <= 2 * (1 - found.accuracy) + 1e-12


@given(models(), st.randoms(use_true_random=False))
def test_the_order_of_models_and_inputs_does_not_matter(p, chance):
    y = np.arange(p.shape[1]) % p.shape[2]
    order, inputs = (chance.sample(range(size), size) for size in p.shape[:2])
    moved = p[order][:, inputs]
    for measure in MEASURES:
        assert measure(moved) == pytest.approx(measure(p)[np.ix_(order, order)], rel=1e-9, abs=1e-12)
    sure = np.sort(p.mean(0), axis=-1)
    assume((sure[:, -1] - sure[:, -2] > 1e-9).all())  # ties are broken by rounding
    assert diversity(moved, y[inputs]) == pytest.approx(diversity(p, y), rel=1e-9, abs=1e-12)


# ---- Ensembles -------------------------------------------------------------------------------------------------------

def test_an_ensemble_of_two_by_hand():
    p = [[[0.9, 0.1], [0.4, 0.6], [0.45, 0.55]], [[0.4, 0.6], [0.7, 0.3], [0.3, 0.7]]]
    # The means for class 0 are 0.65, 0.55 and 0.375; each model alone is right twice.
    found = diversity(p, [0, 0, 1])
    assert ensemble_accuracy(p, [0, 0, 1]) == found.ensemble == 1
    assert ensemble_accuracy(p, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    assert found.accuracy == pytest.approx(2 / 3) and found.disagreement == pytest.approx(2 / 3)


def test_probabilities_are_averaged_and_not_logits():
    # One model is certain; as logits it would outvote the two others, as probabilities it does not.
    p = probabilities([[[30.0, 0.0]], [[0.0, 3.0]], [[0.0, 3.0]]])
    assert ensemble_accuracy(p, [1]) == 1


def test_one_row_is_made_of_the_measures():
    p, y = random_models(4, 30, 5), np.arange(30) % 5
    found = diversity(p, y)
    assert found.accuracy == pytest.approx(np.mean([(one.argmax(1) == y).mean() for one in p]))
    pairs = list(itertools.permutations(range(4), 2))
    for value, measure in zip(found[2:], MEASURES):
        assert value == pytest.approx(np.mean([measure(p)[pair] for pair in pairs]))


# ---- The map ---------------------------------------------------------------------------------------------------------

def test_a_map_is_of_planar_points_up_to_rotation_and_reflection():
    points = np.random.default_rng(0).normal(size=(12, 2)) * [3, 1] + [5, -7]
    found = function_map(squareform(pdist(points)))
    u, _, v = np.linalg.svd(found.points.T @ (points - points.mean(0)))
    assert np.allclose(found.points @ (u @ v), points - points.mean(0))
    assert found.explained == pytest.approx(1) and found.stress == pytest.approx(0, abs=1e-6)
    assert found.points[:, 0].var() > found.points[:, 1].var()


def test_a_map_is_of_principal_components():
    points = np.random.default_rng(1).normal(size=(20, 6)) * [5, 3, 1, 1, 1, 1]
    variances = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    found = function_map(squareform(pdist(points)))
    assert np.var(found.points, axis=0, ddof=1) == pytest.approx(variances[:2])
    assert found.explained == pytest.approx(variances[:2].sum() / variances.sum())
    assert function_map(squareform(pdist(points)), 6).stress == pytest.approx(0, abs=1e-6)


def test_stress_by_hand():
    """Three points at distance 1 of each other, on a line: of the eigenvalues 1/2, 1/2 and 0 one is kept."""
    found = function_map(1 - np.eye(3), 1)
    placed = abs(found.points - found.points.T)
    assert found.explained == pytest.approx(0.5)
    assert found.stress == pytest.approx(math.sqrt(((1 - np.eye(3) - placed) ** 2).sum() / 6))
    assert (placed ** 2).sum() / 2 == pytest.approx(1.5)  # half of the sum of squares, 3 x 1/2 x 1


@given(models(least=3))
def test_square_roots_of_disagreement_and_js_divergence_fit_into_a_space(p):
    for measure in (disagreement, js_divergence):
        distances = np.sqrt(measure(p))
        assume(distances.max() > 1e-3)
        found = function_map(distances, len(p))
        assert squareform(pdist(found.points)) == pytest.approx(distances, abs=1e-6)
        assert found.explained == pytest.approx(1)


def test_distances_of_no_space_are_not_wholly_explained():
    star = np.full((4, 4), 2.0) - 2 * np.eye(4)
    star[0, 1:] = star[1:, 0] = 0.5  # less than half of the way between the others
    assert function_map(star, 4).explained < 0.99 and function_map(star, 4).stress > 0.01


def test_one_function_is_one_point():
    assert function_map(np.zeros((3, 3)))[1:] == (1, 0)
    assert function_map(np.zeros((3, 3)), np.int64(1)).points.shape == (3, 1)


# ---- Errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, message", [
    (lambda: probabilities([[[0.0, math.nan]]]), "1 of the logits are not finite"),
    (lambda: probabilities([]), r"the logits have the shape \[0\]: expected at least one number"),
    (lambda: probabilities([[[0.0, 1.0]], [[0.0]]]), r"the shapes are \[1, 2\], \[1, 1\]\): expected \[..., classes\]"),
    (lambda: probabilities([torch.zeros(3, 2), torch.zeros(2, 2)]), r"the shapes are \[3, 2\], \[2, 2\]"),
    (lambda: probabilities([[[0.0, 1.0], [0.0]]]), "the logits are not an array of numbers"),
    (lambda: probabilities(3.0), "the logits are not an array of numbers"),
    (lambda: probabilities(["a"]), "the logits are not an array of numbers"),
    (lambda: disagreement(np.ones((3, 2))), r"shape \[3, 2\]: expected \[models, n, classes\]"),
    (lambda: js_divergence(np.ones((2, 0, 3))), r"shape \[2, 0, 3\]"),
    (lambda: kl_divergence([[[2.0, -1.0]]]), "not a distribution.*probabilities\\(logits\\)"),
    (lambda: diversity([[[0.2, 0.7]]], [0]), "not a distribution"),
    (lambda: diversity(random_models(1, 4, 3), [0, 1, 2, 0]), r"shape \[1, 1\].*at least two models"),
    (lambda: ensemble_accuracy(random_models(2, 4, 3), [0, 1]), "y has 2 labels: expected 4"),
    (lambda: ensemble_accuracy(random_models(2, 2, 3), [0, 3]), "label 3: expected 0 to 2"),
    (lambda: pair_mean(np.zeros((2, 3))), r"shape \[2, 3\]"),
    (lambda: function_map([[0, 1], [2, 0]]), "not symmetric"),
    (lambda: function_map([[0, -1], [-1, 0]]), "at least 0"),
    (lambda: function_map([[0, math.inf], [math.inf, 0]]), "finite"),
    (lambda: function_map([[1, 1], [1, 1]]), "zeros on the diagonal"),
    (lambda: function_map([[0, 1], [1, 0]], True), "dimensions is True: expected an integer from 1 to 2"),
    (lambda: function_map([[0, 1], [1, 0]], 3), "dimensions is 3: expected an integer from 1 to 2"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
