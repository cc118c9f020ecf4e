"""Relaxed matching: soft permutations that are hard are permutations, planted ones are found, and brute force."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from permask_core.matching import Entry, Group, match_weights, permutation_groups, permute, random_permutations
from permask_core.matching.relaxed import match_loss, match_many, mix, sinkhorn
from permask_core.models import build_model
from tests.hypotheses import examples

NETWORKS = [("mlp", (1, 8, 8), {}), ("lenet5", (1, 28, 28), {}), ("vgg11", (3, 32, 32), {"width": 0.1}),
            ("resnet20", (3, 32, 32), {"width": 0.5})]


def groups_of(name, shape, options):
    return permutation_groups(build_model(name, shape, 10, **options), torch.zeros(2, *shape))


def inner_product(groups, one, other):
    names = {entry.tensor for group in groups.values() for entry in group.entries if "running" not in entry.tensor}
    return sum(float((one[name].double() * other[name].double()).sum()) for name in names)


# ---- Soft permutations -----------------------------------------------------------------------------------------------

class Grouped(nn.Module):
    """Its second convolution has groups, whose inputs are other units in other rows."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=2), nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu().flatten(1))


@pytest.mark.parametrize("make, shape", [
    *((lambda name=name, shape=shape, options=options: build_model(name, shape, 10, **options), shape)
      for name, shape, options in NETWORKS), (Grouped, (3, 8, 8))])
def test_with_matrices_of_permutations_mixing_is_permuting(make, shape):
    model = make().double()
    groups, state = permutation_groups(model, torch.zeros(2, *shape, dtype=torch.float64)), model.state_dict()
    planted = random_permutations(groups, seed=0)
    matrices = {name: torch.eye(len(order), dtype=torch.float64)[order] for name, order in planted.items()}
    expected, found = permute(groups, planted, state), mix(groups, matrices, state)
    assert groups and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_gradients_of_mixing_are_those_of_finite_differences():
    groups = {"units": Group(3, (Entry("in", 0), Entry("out", 1, torch.tensor([[0, 3], [1, 4], [2, 5]]))))}
    drawn = torch.Generator().manual_seed(0)
    matrix, one, two = (torch.randn(shape, dtype=torch.float64, generator=drawn, requires_grad=True)
                        for shape in ((3, 3), (3, 2), (2, 6)))
    assert torch.autograd.gradcheck(
        lambda m, x, y: tuple(mix(groups, {"units": m}, {"in": x, "out": y}).values()), (matrix, one, two))


@given(*[st.floats(-1, 1)] * 4)
def test_two_by_two_matrices_have_the_closed_form_of_sinkhorn(a, b, c, d):
    found = sinkhorn(torch.tensor([[a, b], [c, d]], dtype=torch.float64), iterations=100)
    diagonal = 1 / (1 + torch.tensor((b + c - a - d) / 2, dtype=torch.float64).exp())
    assert torch.allclose(found, torch.stack([torch.stack([diagonal, 1 - diagonal]),
                                              torch.stack([1 - diagonal, diagonal])]), atol=1e-6)


# ---- One network or several ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, shape, options", NETWORKS)
def test_planted_permutations_of_three_copies_are_recovered(name, shape, options, lively):
    target = lively(name, shape, 10, **options).float().state_dict()
    groups = groups_of(name, shape, options)
    planted = [random_permutations(groups, seed=seed) for seed in range(3)]
    copies = [permute(groups, {name: order.argsort() for name, order in one.items()}, target) for one in planted]
    for own, found in zip(planted, match_many(groups, copies, target), strict=True):
        assert all(torch.equal(own[name], found[name]) for name in groups)


@given(st.integers(0, 10_000))
@examples(0.2)
def test_the_objective_is_that_of_all_pairs_never_falls_and_is_at_most_the_best(seed):
    groups = {"first": Group(3, (Entry("a", 0), Entry("b", 1))), "second": Group(2, (Entry("b", 0),))}
    drawn = torch.Generator().manual_seed(seed)
    states = [{"a": torch.randn(3, 4, generator=drawn), "b": torch.randn(2, 3, generator=drawn)} for _ in range(3)]

    def value(one, two):
        moved = [permute(groups, one, states[0]), permute(groups, two, states[1]), states[2]]
        return sum(inner_product(groups, x, y) for x, y in itertools.combinations(moved, 2))

    every = [{"first": torch.tensor(one), "second": torch.tensor(two)}
             for one in itertools.permutations(range(3)) for two in itertools.permutations(range(2))]
    found = match_many(groups, states[:2], states[2])
    best = max(value(one, two) for one in every for two in every)
    steps = found[0].objective
    assert steps[-1] == pytest.approx(value(*found), abs=1e-4) and steps[-1] <= best + 1e-4
    assert all(after >= before - 1e-4 for before, after in itertools.pairwise(steps))
    single, = match_many(groups, states[:1], states[2])
    assert single.objective[-1] == pytest.approx(inner_product(groups, permute(groups, single, states[0]), states[2]),
                                                 abs=1e-4)


@given(st.integers(2, 5), st.integers(0, 10_000))
@examples(0.5)
def test_with_one_layer_the_best_permutation_is_found(n, seed):
    groups = {"units": Group(n, (Entry("in", 0), Entry("out", 1)))}
    drawn = torch.Generator().manual_seed(seed)
    a, b = ({"in": torch.randn(n, 3, generator=drawn), "out": torch.randn(2, n, generator=drawn)} for _ in range(2))
    best = max(inner_product(groups, permute(groups, {"units": torch.tensor(order)}, a), b)
               for order in itertools.permutations(range(n)))
    found, = match_many(groups, [a], b)
    assert found.objective[-1] == pytest.approx(best, abs=1e-4)


def test_it_finds_what_a_search_by_one_group_after_another_misses():
    """Perceptrons before training, whose units of layers far from both ends differ little."""
    found = []
    for seed in range(10):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes = (17, 73, 66, 21, 86, 7)
            model = nn.Sequential(*(module for pair in itertools.pairwise(sizes)
                                    for module in (nn.Linear(*pair), nn.ReLU())))[:-1]
        groups, state = permutation_groups(model, torch.zeros(2, 17)), model.state_dict()
        planted = random_permutations(groups, seed=seed)
        target = permute(groups, planted, state)
        found.append([all(torch.equal(one[name], planted[name]) for name in groups)
                      for one in (match_weights(groups, state, target), *match_many(groups, [state], target))])
    by_groups, relaxed = map(sum, zip(*found))
    assert relaxed == 10 and by_groups <= relaxed


# ---- A mask that moves -----------------------------------------------------------------------------------------------

def pairing(n):
    """A network that copies its inputs through one unit each, and the mask of exactly these connections."""
    model = nn.Sequential(nn.Linear(n, n, bias=False), nn.ReLU(), nn.Linear(n, n, bias=False))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    with torch.no_grad():
        model[0].weight.copy_(5 * torch.eye(n)[order])
        model[2].weight.copy_(5 * torch.eye(n)[order].T)
    groups = {"units": Group(n, (Entry("0.weight", 0), Entry("2.weight", 1)))}
    return model, groups, dict.fromkeys(("0.weight", "2.weight"), torch.eye(n, dtype=torch.bool)), order


@pytest.mark.parametrize("n", [3, 6])
def test_the_mask_is_moved_to_where_the_network_works(n):
    model, groups, masks, order = pairing(n)
    x, y = torch.eye(n), torch.arange(n)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = match_loss(groups, masks, model, [(x, y)] * 200)
    assert torch.equal(found["units"], order)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert len(found.objective) == 200 and found.objective[-1] > found.objective[0]


@pytest.mark.parametrize("seed", range(20))
def test_it_never_returns_anything_worse_than_its_start(seed):
    """Random networks and masks, and one step that is too large, from the best of all permutations."""
    torch.manual_seed(seed)
    model, groups, _, _ = pairing(4)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    masks = {name: torch.rand(4, 4) < 0.4 for name in ("0.weight", "2.weight")}
    x, y = torch.randn(20, 4), torch.randint(4, (20,))

    def loss(order):
        moved = permute(groups, {"units": torch.as_tensor(order)}, masks)
        hidden = (x @ (model[0].weight * moved["0.weight"]).T).relu()
        return nn.functional.cross_entropy(hidden @ (model[2].weight * moved["2.weight"]).T, y).item()

    best = torch.tensor(min(itertools.permutations(range(4)), key=loss))
    found = match_loss(groups, masks, model, [(x, y)] * 3, start={"units": best}, lr=1.0)
    assert loss(found["units"]) <= loss(best) + 1e-6


def test_the_same_call_gives_the_same_result():
    model, groups, masks, _ = pairing(6)
    one, two = (match_loss(groups, masks, model, [(torch.eye(6), torch.arange(6))] * 5) for _ in range(2))
    assert one.objective == two.objective and torch.equal(one["units"], two["units"])


# ---- What is wrong ---------------------------------------------------------------------------------------------------

NESTED = {"heads": Group(2, (Entry("w", 0),)), "inside": Group(1, (Entry("v", 0),), (), ("heads", 0))}
ONE = {"units": Group(2, (Entry("w", 0),))}
W = {"w": torch.eye(2)}
PARTS = ("group 'inside' is within a unit of 'heads': expected groups without parts, as match_weights and "
         "match_activations support them")


@pytest.mark.parametrize("make, message", [
    (lambda: match_many(ONE, [], W), "there are no sources: expected at least one network to move"),
    (lambda: match_many(ONE, [W], W, steps=0), "steps is 0: expected an integer of at least 1"),
    (lambda: match_many(NESTED, [W], W), PARTS),
    (lambda: match_many(ONE, [{"w": torch.full((2, 2), torch.nan)}], W),
     "'w' holds NaN or infinite weights: expected finite weights"),
    (lambda: match_loss(ONE, {"w": torch.ones(2, 2).bool()}, nn.Linear(2, 2), []),
     "masks has 'w' of shape [2, 2], which is not in the model"),
    (lambda: match_loss({"units": Group(2, (Entry("weight", 0),))}, {"weight": torch.ones(2, 2).bool()},
                        nn.Linear(2, 2), [], lr=0), "lr is 0 and temperature 0.3: expected positive numbers"),
    (lambda: match_loss({"units": Group(2, (Entry("weight", 0),))}, {"weight": torch.ones(2, 2).bool()},
                        nn.Linear(2, 2), [], iterations=0), "iterations is 0: expected an integer of at least 1"),
])
def test_what_is_wrong_is_named(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()
