"""Permuting against fancy indexing, inverses, and what must not change."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from permask_core.masks import apply_masks, layer_sparsity
from permask_core.matching import Entry, Group, permutation_groups, permute, random_permutations
from permask_core.matching.permutations import LARGE, Permutations, assign, assign_again
from permask_core.models import build_model
from permask_core.pruning import magnitude_masks
from permask_core.sparse import FanInLinear, condense
from tests.hypotheses import examples

X = torch.zeros(2, 1, 8, 8)


@pytest.fixture
def net(lively):
    return lively("mlp", (1, 8, 8), 10, width=0.1)


def test_unit_i_of_the_result_is_unit_perm_i(net):
    groups = permutation_groups(net, X.double())
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    one, two = np.random.default_rng(0).permutation(13), np.random.default_rng(1).permutation(13)
    moved = permute(groups, {"fc1": torch.from_numpy(one), "fc2": torch.from_numpy(two)}, net.state_dict())
    expected = {"fc1.weight": state["fc1.weight"][one], "fc1.bias": state["fc1.bias"][one],
                "fc2.weight": state["fc2.weight"][two][:, one], "fc2.bias": state["fc2.bias"][two],
                "head.weight": state["head.weight"][:, two], "head.bias": state["head.bias"]}
    assert moved.keys() == state.keys()
    assert all(np.array_equal(moved[name], expected[name]) for name in expected)


def test_the_inverse_moves_back_and_groups_not_named_stay(lively):
    model = lively("lenet5", (1, 28, 28), 10)
    groups, state = permutation_groups(model, torch.zeros(2, 1, 28, 28).double()), model.state_dict()
    there = random_permutations(groups, seed=0)
    moved = permute(groups, there, state)
    back = permute(groups, {name: perm.argsort() for name, perm in there.items()}, moved)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    partly = permute(groups, {"fc2": there["fc2"]}, state)
    changed = {name for name in state if not torch.equal(partly[name], state[name])}
    assert changed == {"fc2.weight", "fc2.bias", "head.weight"}
    assert partly["conv1.weight"] is state["conv1.weight"]


def test_masks_move_with_their_weights_and_keep_their_zeros(net):
    groups, state = permutation_groups(net, X.double()), net.state_dict()
    masks = magnitude_masks(state, 0.8)
    there = random_permutations(groups, seed=3)
    moved, moved_state = permute(groups, there, masks), permute(groups, there, state)
    assert layer_sparsity(moved) == layer_sparsity(masks)
    masked = permute(groups, there, {name: mask * state[name] for name, mask in masks.items()})
    for name, mask in masks.items():
        assert moved[name].dtype == torch.bool and not torch.equal(moved[name], mask)
        assert torch.equal(moved[name] * moved_state[name], masked[name])


@examples(1 / 3)
@given(st.sampled_from([("mlp", 8), ("lenet5", 28), ("resnet8", 8)]), st.floats(0.1, 0.97), st.integers(0, 1000))
def test_constant_fan_in_stays_constant_fan_in(network, sparsity, seed):
    """Rows move, and within each row columns: no row gains or loses a connection."""
    name, side = network
    model = build_model(name, (1, side, side), 10, width=0.5, seed=seed)
    masks = magnitude_masks(model.state_dict(), sparsity, scope="fan_in")
    groups = permutation_groups(model, torch.zeros(2, 1, side, side))
    moved = permute(groups, random_permutations(groups, seed=seed), masks)
    for key, mask in masks.items():
        fan_in = mask[0].sum()
        assert (mask.flatten(1).sum(1) == fan_in).all() and (moved[key].flatten(1).sum(1) == fan_in).all()


@examples(1 / 3)
@given(st.floats(0.5, 0.97), st.integers(0, 1000))
def test_a_condensed_network_that_was_moved_computes_the_same(sparsity, seed):
    model, moved = (build_model("mlp", (1, 8, 8), 10, width=0.2, seed=seed).double() for _ in range(2))
    masks = magnitude_masks(model.state_dict(), sparsity, scope="fan_in")
    groups = permutation_groups(model, X.double())
    there = random_permutations(groups, seed=seed)
    moved.load_state_dict(permute(groups, there, model.state_dict()))
    before = condense(model, masks).model
    after = condense(moved, permute(groups, there, masks)).model
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(after(x), apply_masks(model, masks)(x))
    assert isinstance(before.fc2, FanInLinear)
    torch.testing.assert_close(after.fc2.values.sort(1).values, before.fc2.values[there["fc2"]].sort(1).values)


def test_a_trained_network_keeps_its_outputs_and_moving_one_side_does_not(trained, digits, outputs):
    groups, state, x = permutation_groups(trained, X), trained.state_dict(), digits.test.x
    there = random_permutations(groups, seed=0)
    before = outputs(trained, state, x)
    assert (outputs(trained, permute(groups, there, state), x) - before).abs().max() < 1e-5
    for axis in (0, 1):
        one_side = {name: group._replace(entries=tuple(e for e in group.entries if e.axis == axis))
                    for name, group in groups.items()}
        assert (outputs(trained, permute(one_side, there, state), x) - before).abs().max() > 1


def test_random_permutations_are_seeded_and_fair(net):
    groups, random_state = permutation_groups(net, X.double()), torch.get_rng_state()
    one, same, other = (random_permutations(groups, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, group in groups.items():
        assert one[name].sort().values.tolist() == list(range(group.size))
        assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    first = torch.stack([random_permutations(groups, seed=seed)["fc1"] for seed in range(500)]).double()
    assert (first.mean(0) - 6).abs().max() < 5 * (14 / 500) ** 0.5  # 13 units: mean 6, variance (13^2 - 1) / 12


def test_batchnorms_statistics_move_with_their_units_and_its_counter_stays():
    model = build_model("resnet8", (3, 8, 8), 10)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(1, 2)
    groups, state = permutation_groups(model, torch.zeros(2, 3, 8, 8)), model.state_dict()
    there = random_permutations(groups, seed=0)
    moved = permute(groups, there, state)
    assert torch.equal(moved["norm1.running_var"], state["norm1.running_var"][there["conv1"]])
    assert moved["norm1.num_batches_tracked"] is state["norm1.num_batches_tracked"]


def test_rows_confine_a_move_and_blocks_move_whole():
    tensor, order = torch.arange(24).view(4, 6), torch.tensor([2, 0, 1])
    blocks = Group(3, (Entry("w", 1, torch.tensor([[0, 1], [2, 3], [4, 5]]), (1, 3)),))
    moved = permute({"g": blocks}, {"g": order}, {"w": tensor})["w"]
    assert torch.equal(moved[[0, 3]], tensor[[0, 3]])
    assert torch.equal(moved[1:3], tensor[1:3, [4, 5, 0, 1, 2, 3]])
    scattered = Group(2, (Entry("w", 1, torch.tensor([[5], [1]])),))
    assert torch.equal(permute({"g": scattered}, {"g": [1, 0]}, {"w": tensor})["w"], tensor[:, [0, 5, 2, 3, 4, 1]])


def test_what_is_within_a_unit_moves_before_the_unit():
    groups = {"head": Group(2, (Entry("w", 0, torch.tensor([[0, 1, 2], [3, 4, 5]])),)),
              "inside": Group(3, (Entry("w", 0, torch.tensor([[0], [1], [2]])),), within=("head", 0))}
    both = {"head": [1, 0], "inside": [2, 0, 1]}
    assert permute(groups, both, {"w": torch.arange(6)})["w"].tolist() == [3, 4, 5, 2, 0, 1]
    assert permute(groups, dict(reversed(both.items())), {"w": torch.arange(6)})["w"].tolist() == [3, 4, 5, 2, 0, 1]


@examples(1 / 2)
@given(n=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_an_assignment_is_as_good_as_trying_all(n, seed):
    similarity = np.random.default_rng(seed).normal(size=(n, n))
    order = assign(torch.from_numpy(similarity))
    trials = np.array(list(itertools.permutations(range(n))))
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(n))
    assert similarity[range(n), order].sum() == pytest.approx(similarity[range(n), trials].sum(1).max())


@pytest.mark.parametrize("kind", ["normal", "ranks", "whole numbers", "equal"])
@pytest.mark.parametrize("n", [2, LARGE, LARGE + 30])
def test_prices_change_the_time_of_an_assignment_only(kind, n):
    random = np.random.default_rng(n)
    similarity = {"normal": random.normal(size=(n, n)), "equal": np.zeros((n, n)),
                  "ranks": random.normal(size=(n, 1)) * random.normal(size=n) * 9 + random.normal(size=(n, n)),
                  "whole numbers": random.integers(0, 9, (n, n))}[kind].astype(float)
    best = similarity[linear_sum_assignment(similarity, maximize=True)].sum()
    given = torch.from_numpy(similarity)
    order, prices = assign_again(given)
    assert (prices is None) == (n < LARGE)
    for before in (None, prices, torch.from_numpy(100 * random.normal(size=n))):
        order, _ = assign_again(given, before)
        assert order.sort().values.tolist() == list(range(n))
        assert similarity[range(n), order].sum() == pytest.approx(best, abs=1e-8)
    assert np.array_equal(given.numpy(), similarity)


def test_prices_are_those_of_the_units_in_their_new_order():
    """With them, each source unit is the best for some target unit, and for more and more its own."""
    similarity = torch.from_numpy(np.random.default_rng(0).normal(size=(LARGE, LARGE)))
    order, prices = assign_again(similarity)
    values = similarity[:, order] + prices
    behind = values.amax(1, keepdim=True) - values
    torch.testing.assert_close(behind.amin(0), torch.zeros(LARGE).double())
    assert (behind.diagonal() < 1e-9).sum() > LARGE / 2
    again, same = assign_again(similarity[:, order], prices)
    assert torch.equal(again, torch.arange(LARGE))
    torch.testing.assert_close(same, prices)


def test_permutations_carry_their_objective(net):
    groups = permutation_groups(net, X.double())
    there = random_permutations(groups, seed=0)
    found = Permutations(there, (1.0, 2.5))
    assert found == there and found.objective == [1.0, 2.5]
    one, other = (permute(groups, permutations, net.state_dict()) for permutations in (found, there))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.int, lambda perm: perm])
def test_a_permutation_may_come_as_a_list_or_array(net, convert):
    groups, there = permutation_groups(net, X.double()), torch.arange(13).flip(0)
    moved = permute(groups, {"fc1": convert(there)}, net.state_dict())
    assert torch.equal(moved["fc1.bias"], net.state_dict()["fc1.bias"].flip(0))


@pytest.mark.parametrize("bad, message", [
    ({"fc7": torch.arange(13)}, "permutations has 'fc7', which is not a group: expected one of fc1, fc2"),
    ({"fc1": torch.arange(12)}, "'fc1' is not a permutation of 13 units"),
    ({"fc1": torch.zeros(13, dtype=torch.int64)}, "'fc1' is not a permutation of 13 units"),
    ({"fc1": torch.full((9999,), 7)}, "'fc1' is not a permutation of 13 units: got [7, 7, 7"),
    ({"fc1": torch.arange(13)[None]}, "'fc1' is not a permutation of 13 units"),
    ({"fc1": torch.arange(13.0)}, "'fc1' is not a permutation of 13 units"),
])
def test_what_is_no_permutation_is_named(net, bad, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        permute(permutation_groups(net, X.double()), bad, net.state_dict())


def test_tensors_of_another_network_are_refused(net, lively):
    other = lively("mlp", (1, 8, 8), 10, width=0.2)
    with pytest.raises(ValueError, match=re.escape("takes the whole axis, which has 26 indices (shape [26, 64])")):
        permute(permutation_groups(net, X.double()), {}, other.state_dict())
