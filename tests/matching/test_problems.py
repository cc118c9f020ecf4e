"""Combined problems: their objective by brute force, and what they have in common with each matching alone."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from permask_core.matching import (
    Entry,
    Group,
    activation_correlations,
    match_activations,
    match_weights,
    permutation_groups,
    permute,
    random_permutations,
)
from permask_core.matching.problems import join, similarity_problem
from permask_core.models import build_model
from tests.hypotheses import examples

TWO = {"first": Group(3, (Entry("a", 0), Entry("b", 1))), "second": Group(4, (Entry("b", 0), Entry("c", 1)))}


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in
            (("a", (3, 5)), ("b", (4, 3)), ("c", (2, 4)))}


def cosine(one, other):
    one, other = (torch.cat([state[name].flatten() for name in sorted(state)]).double() for state in (one, other))
    return float(one @ other / (one.norm() * other.norm()))


@given(st.integers(0, 10_000), st.floats(0.1, 10))
@examples(0.2)
def test_the_joined_objective_is_the_weighted_sum_of_cosines_and_its_maximum_is_found(seed, share):
    problems = [(TWO, drawn(4 * seed + i), drawn(4 * seed + i + 1)) for i in (0, 2)]

    def value(found):
        return sum(weight * cosine(permute(TWO, found, source), target)
                   for weight, (_, source, target) in zip((1, share), problems))

    best = max(value({"first": torch.tensor(one), "second": torch.tensor(two)})
               for one in itertools.permutations(range(3)) for two in itertools.permutations(range(4)))
    found = match_weights(*join(*problems, shares=[1, share]), restarts=20)
    assert value(found) == pytest.approx(best, abs=1e-5)
    assert found.objective[-1] == pytest.approx(best, abs=1e-5)


def test_a_problem_alone_is_matched_as_before(lively):
    a, b = (lively("lenet5", (1, 28, 28), 10, seed=seed).state_dict() for seed in (0, 1))
    groups = permutation_groups(build_model("lenet5", (1, 28, 28), 10), torch.zeros(2, 1, 28, 28))
    alone, joined = match_weights(groups, a, b), match_weights(*join((groups, a, b)))
    assert all(torch.equal(alone[name], joined[name]) for name in groups)


@given(st.integers(1, 6), st.integers(0, 10_000))
@examples(0.5)
def test_similarities_alone_are_a_linear_assignment(n, seed):
    similarity = torch.from_numpy(np.random.default_rng(seed).normal(size=(n, n)))
    found = match_weights(*similarity_problem({"units": Group(n, ())}, {"units": similarity}))
    assert found["units"].tolist() == linear_sum_assignment(similarity.numpy(), maximize=True)[1].tolist()
    assert found.objective[-1] == pytest.approx(float(similarity[range(n), found["units"]].sum()))


def test_correlations_alone_are_matching_by_activations(digits):
    a, b = (build_model("mlp", digits.input_shape, digits.classes, width=0.25, seed=seed) for seed in (0, 1))
    groups, images = permutation_groups(a, digits.train.x[:2]), digits.train.x[:100]
    similarities = activation_correlations(groups, a, b, [images])
    found, expected = (match_weights(*similarity_problem(groups, similarities)),
                       match_activations(groups, a, b, [images]))
    assert all(torch.equal(found[name], expected[name]) for name in groups)


@pytest.mark.parametrize("name, shape, options", [
    ("mlp", (1, 8, 8), {}), ("vgg11", (3, 32, 32), {"width": 0.1}), ("resnet20", (3, 32, 32), {"width": 0.5})])
def test_both_matchings_together_recover_a_planted_permutation(name, shape, options, lively):
    model = lively(name, shape, 10, **options).float()
    moved, x = lively(name, shape, 10, **options).float(), torch.randn(20, *shape)
    groups, state = permutation_groups(model, x), model.state_dict()
    planted = random_permutations(groups, seed=1)
    moved.load_state_dict(permute(groups, planted, state))
    similarities = activation_correlations(groups, model, moved, [x])
    found = match_weights(*join((groups, state, moved.state_dict()), similarity_problem(groups, similarities)))
    assert all(torch.equal(found[one], planted[one]) for one in groups)


NESTED = {"heads": Group(2, ()), "inside": Group(3, (), (), ("heads", 0))}


@pytest.mark.parametrize("make, message", [
    (lambda: join(), "the problems have the units []: expected at least one problem, all over the same units"),
    (lambda: join((TWO, drawn(0), drawn(1)), ({"first": TWO["first"]}, drawn(0), drawn(1))),
     "the problems have the units [{'first': 3, 'second': 4}, {'first': 3}]: expected at least one problem, all over "
     "the same units"),
    (lambda: join((TWO, drawn(0), drawn(1)), shares=[0]),
     "shares is [0] for 1 problems: expected a positive number for each"),
    (lambda: join((TWO, drawn(0), drawn(1)), shares=[1, 1]),
     "shares is [1, 1] for 1 problems: expected a positive number for each"),
    (lambda: similarity_problem(TWO, {"first": torch.eye(3)}),
     "the similarity of group 'second' has shape nothing: expected [4, 4]"),
    (lambda: similarity_problem(TWO, {"first": torch.eye(3), "second": torch.eye(3)}),
     "the similarity of group 'second' has shape [3, 3]: expected [4, 4]"),
    (lambda: similarity_problem(NESTED, {}), "group 'inside' is within a unit of 'heads': expected groups without "
     "parts, as match_weights and match_activations support them"),
])
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()
