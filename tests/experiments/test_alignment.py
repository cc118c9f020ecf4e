"""What alignment costs against what a run trains, Fieller's interval against t-tests, planted permutations."""

import dataclasses
import math
import re
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from permask_core.experiments import permuted_masks, trainings
from permask_core.experiments.alignment import (
    cost,
    gap_share,
    idle_units,
    mask_overlap,
    plant_permutation,
    shared_positions,
)
from permask_core.experiments.permuted_masks import Experiment
from permask_core.masks import prunable_weights
from permask_core.matching import Entry, Group, match_weights, permutation_groups, permute, random_permutations
from permask_core.matching.mask_symmetry import twin_classes
from permask_core.models import build_model
from permask_core.pruning import magnitude_masks
from permask_core.runs.store import Store

TINY = Experiment(width=0.1, epochs=3, checkpoints=(0, 1, 2), rewind=1, matched_at=2, imp_rewind=1, imp_epochs=2,
                  imp_rate=0.5)


@pytest.fixture(scope="module")
def network():
    """Groups and state of a perceptron, and a ticket so sparse that units are idle."""
    model = build_model("mlp", (1, 8, 8), 10, width=0.25, seed=0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return permutation_groups(model, torch.zeros(2, 1, 8, 8)), state, magnitude_masks(state, 0.995)


# ---- Costs -----------------------------------------------------------------------------------------------------------

def test_costs_by_hand():
    """The published setting: 200 epochs, 11 rounds to 90 % of which the last one only prunes, fine-tuned for 50."""
    paper = Experiment(epochs=200, checkpoints=(0, 5, 25), rewind=25, matched_at=200, imp="finetune", imp_rewind=0,
                       imp_epochs=50)
    assert cost(paper, "lth", 0.9) == (200 + 10 * 50, 0, 175)
    assert cost(paper, "naive", 0.9) == cost(paper, "random", 0.9) == (700, 25, 175)
    assert cost(paper, "permuted", 0.9) == (700, 200, 175) and cost(paper, "permuted", 0.9).own == 375
    assert cost(dataclasses.replace(paper, matched_at=5), "permuted", 0.9).own == 200  # B has to reach the rewind point
    assert cost(paper, "imp", 0.9) == (0, 700, 175)


def test_by_default_alignment_trains_nothing_that_the_naive_mask_does_not_need():
    default = Experiment()
    assert default.matched_at > 0 and cost(default, "permuted", 0.9) == cost(default, "naive", 0.9)


def test_costs_are_what_is_trained(tmp_path, monkeypatch):
    epochs, fit = {}, trainings.fit

    def spy(model, train, recipe, *, resume, **options):
        epochs[resume.parent.name] = epochs.get(resume.parent.name, 0) + recipe.epochs
        return fit(model, train, recipe, resume=resume, **options)

    monkeypatch.setattr(trainings, "fit", spy)
    late = dataclasses.replace(TINY, matched_at=3)  # only then is all that is trained of B needed
    permuted_masks.train_sparse(late, Store(tmp_path), 0, 0.8, "permuted", "weights")
    found = cost(late, "permuted", 0.8)
    assert found.shared + found.dense == epochs["dense"] + epochs["imp_round"] and found.sparse == epochs["sparse"]


@pytest.mark.parametrize("method, target, message", [
    ("dense", 0.9, "unknown method 'dense': expected one of lth, permuted, naive, random, imp"),
    ("lth", 1, "sparsity is 1")])
def test_costs_of_what_there_is_not(method, target, message):
    with pytest.raises(ValueError, match=message):
        cost(TINY, method, target)


# ---- Gaps ------------------------------------------------------------------------------------------------------------

def drawn(seed, n=6, share=0.8, gap=0.3, sd=0.02):
    noise = np.random.default_rng(seed).normal(0, sd, (3, n))
    return 0.5 + share * gap + noise[0], 0.5 + noise[1], 0.5 + gap + noise[2]


@given(st.integers(0, 10**6), st.integers(3, 12), st.floats(-0.5, 1.2), st.floats(0.6, 0.99))
def test_at_the_ends_of_the_interval_a_t_test_is_just_significant(seed, n, share, confidence):
    permuted, naive, lth = drawn(seed, n, share)
    found = gap_share(permuted, naive, lth, confidence)
    assert found.n == n and found.gap == pytest.approx(lth.mean() - naive.mean()) and not found.undefined
    assert found.low < found.share < found.high
    assert found.share == pytest.approx((permuted.mean() - naive.mean()) / (lth.mean() - naive.mean()))
    for end in (found.low, found.high):
        p = stats.ttest_1samp((permuted - naive) - end * (lth - naive), 0).pvalue
        assert p == pytest.approx(1 - confidence, rel=1e-6)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    hits = [found.low <= 0.8 <= found.high for found in (gap_share(*drawn(seed, 5)) for seed in range(2000))]
    assert abs(np.mean(hits) - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_naive_closes_nothing_and_the_ticket_all():
    _, naive, lth = drawn(0)
    assert gap_share(naive, naive, lth)[:3] == (0, 0, 0)
    assert gap_share(lth, naive, lth)[:3] == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("lth, why", [
    ([0.52, 0.515, 0.52], "LTH is +1.8 points from naive: expected more than 2"),
    ([0.4, 0.4, 0.4], "LTH is -10.0 points"),
    ([0.5, 0.5, 0.8], "at 95 % LTH minus naive, 10.0 points in the mean, may be 0")])
def test_without_a_gap_nothing_is_closed(lth, why):
    found = gap_share([0.5, 0.51, 0.5], [0.5, 0.5, 0.5], lth)
    assert found.undefined.startswith(why) and all(math.isnan(value) for value in found[:3]) and found.n == 3
    assert found.gap == pytest.approx(np.mean(lth) - 0.5)


@pytest.mark.parametrize("changes, message", [
    ({"permuted": [0.5]}, "permuted has the shape [1], lth [2]: expected one value"),
    ({"permuted": [0.5], "naive": [0.5], "lth": [0.5]}, "permuted has the shape [1]"),
    ({"naive": [50, 60]}, "naive is [50.0, 60.0]: expected accuracies in [0, 1]"),
    ({"lth": [0.9, math.nan]}, "lth is [0.9, nan]"), ({"confidence": 95}, "confidence is 95")])
def test_bad_accuracies_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gap_share(**{"permuted": [0.6, 0.6], "naive": [0.5, 0.5], "lth": [0.7, 0.7], **changes})


# ---- A planted permutation -------------------------------------------------------------------------------------------

def test_without_noise_it_is_the_permuted_network_and_is_found_back(network):
    groups, state, masks = network
    moved, truth = plant_permutation(groups, state, seed=3)
    expected = permute(groups, random_permutations(groups, seed=3), state)
    assert all(torch.equal(moved[name], expected[name]) for name in state)
    found = match_weights(groups, state, moved, seed=0)
    assert shared_positions(found, truth) == 1
    assert mask_overlap(permute(groups, found, masks), permute(groups, truth, masks)) == 1


def test_noise_is_in_standard_deviations_of_each_tensor():
    model = build_model("resnet8", (3, 8, 8), 10, seed=0)
    state = model.state_dict()
    groups = permutation_groups(model, torch.zeros(2, 3, 8, 8))
    before = {name: tensor.clone() for name, tensor in state.items()}
    (clean, truth), (moved, again) = (plant_permutation(groups, state, noise=noise, seed=1) for noise in (0.0, 0.5))
    assert all(torch.equal(truth[name], again[name]) for name in groups)
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name])
        if name.endswith("conv1.weight") and tensor.numel() > 2000:
            assert float((moved[name] - clean[name]).std() / tensor.std()) == pytest.approx(0.5, rel=0.05)
        if "running" in name or "tracked" in name:
            assert torch.equal(moved[name], clean[name])


@pytest.mark.parametrize("noise", [-1, math.inf, math.nan])
def test_bad_noise_is_refused(network, noise):
    with pytest.raises(ValueError, match=f"noise is {noise}: expected a number of at least 0"):
        plant_permutation(network[0], network[1], noise=noise)


def test_overlap_by_hand():
    one = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor([[True]])}
    other = {"a": torch.tensor([[True, True], [False, True]]), "b": torch.tensor([[False]])}
    assert mask_overlap(one, other) == 2 / 4 and mask_overlap(one, one) == 1
    with pytest.raises(ValueError, match="expected the same"):
        mask_overlap(one, {"a": other["a"]})
    with pytest.raises(ValueError, match="the first mask keeps no weight"):
        mask_overlap({"b": other["b"]}, {"b": one["b"]})


def test_a_wrong_permutation_of_idle_units_costs_the_mask_nothing(network):
    groups, state, masks = network
    idle = idle_units(groups, masks, state)
    truth = random_permutations(groups, seed=0)
    found = {name: order.clone() for name, order in truth.items()}
    for name, order in found.items():
        places = idle[name][order].nonzero()[:, 0]
        assert len(places) > 1
        order[places] = order[places.roll(1)]
    assert shared_positions(found, truth) == 1 - sum(int(one.sum()) for one in idle.values()) / 64
    assert mask_overlap(permute(groups, found, masks), permute(groups, truth, masks)) == 1


def test_a_unit_is_idle_if_nothing_leads_to_it_or_from_it():
    groups = {"fc": Group(3, (Entry("in", 0), Entry("out", 1, torch.tensor([[0, 1], [2, 3], [4, 5]]))))}
    masks = {"in": torch.zeros(3, 2, dtype=torch.bool), "out": torch.zeros(2, 6, dtype=torch.bool)}
    state = {name: mask.float() for name, mask in masks.items()}
    assert idle_units(groups, masks, state)["fc"].tolist() == [True, True, True]
    masks["in"][0, 1] = masks["out"][1, 5] = True
    assert idle_units(groups, masks, state)["fc"].tolist() == [False, True, False]


def test_a_weight_without_a_mask_connects_its_units(network):
    groups, state, masks = network
    before = idle_units(groups, masks, state)
    first, *_, last = masks
    assert all(one.any() for one in before.values())
    assert not idle_units(groups, {first: masks[first]}, state)["fc2"].any()  # neither of its weights has a mask
    without = idle_units(groups, {name: mask for name, mask in masks.items() if name != last}, state)
    assert not without["fc2"].any() and torch.equal(without["fc1"], before["fc1"])


def test_a_shortcut_without_a_mask_connects_and_a_norm_does_not():
    model = build_model("resnet8", (3, 8, 8), 10, seed=0)
    groups, state = permutation_groups(model, torch.zeros(2, 3, 8, 8)), model.state_dict()

    def cut(names, place, unit=3):
        group = next(group for group in groups.values() if Entry(place, 0) in group.entries)
        masks = {name: torch.ones_like(state[name], dtype=torch.bool) for name in names}
        for entry in group.entries:
            if entry.tensor in masks:
                masks[entry.tensor].movedim(entry.axis, 0)[unit] = False
        return {name: one.nonzero()[:, 0].tolist() for name, one in idle_units(groups, masks, state).items()
                if one.any()}, next(name for name, other in groups.items() if other is group)

    pruned, everything = (prunable_weights(model, shortcuts=one) for one in (False, True))
    assert len(everything) > len(pruned)
    for place in ("stage2.block1.conv2.weight", "stage3.block1.conv2.weight"):  # read and written; written alone
        assert cut(pruned, place)[0] == {}
        idle, name = cut(everything, place)
        assert idle == {name: [3]}
    idle, name = cut(pruned, "stage2.block1.conv1.weight")
    assert idle == {name: [3]}  # of a unit inside of a block only BatchNorm has no mask


def test_idle_units_of_what_does_not_fit(network):
    groups, state, masks = network
    name = next(iter(masks))
    with pytest.raises(ValueError, match="has .*: expected one of"):
        idle_units(groups, masks, {key: state[key] for key in masks})
    with pytest.raises(ValueError, match=f"mask '{name}' has shape"):
        idle_units(groups, masks, {**state, name: state[name][:1]})


@given(st.integers(0, 10**6))
def test_shared_positions_up_to_interchangeable_units_are_the_most_of_all_orders_of_these(seed):
    generator = torch.Generator().manual_seed(seed)
    classes = {"a": torch.randint(3, (4,), generator=generator), "b": torch.randint(2, (3,), generator=generator)}
    found, truth = ({name: torch.randperm(len(own), generator=generator) for name, own in classes.items()}
                    for _ in range(2))
    most = 0
    for name, own in classes.items():  # the groups are independent of each other
        orders = [torch.tensor(order) for order in permutations(range(len(own)))]
        inside = [order for order in orders if torch.equal(own[order], own)]
        most += max(int((order[found[name]] == truth[name]).sum()) for order in inside)
    assert shared_positions(found, truth, classes) == most / 7
    alone = {name: torch.arange(len(own)) for name, own in classes.items()}
    assert shared_positions(found, truth, alone) == shared_positions(found, truth)


def test_orders_of_twins_give_one_mask_and_so_one_overlap(network):
    """So an overlap needs no correction, and the share of the positions does."""
    groups, state, masks = network
    twins, truth = twin_classes(groups, masks), random_permutations(groups, seed=1)
    before = random_permutations(groups, seed=2)
    swap = {name: torch.arange(len(labels)) for name, labels in twins.items()}
    for name, labels in twins.items():
        units = (labels == labels.mode().values).nonzero()[:, 0]
        assert len(units) > 1
        swap[name][units] = units.roll(1)
    after = {name: swap[name][order] for name, order in before.items()}
    overlaps = [mask_overlap(permute(groups, found, masks), permute(groups, truth, masks)) for found in (before, after)]
    assert overlaps[0] == overlaps[1] < 1
    assert shared_positions(before, after) < 1 and shared_positions(before, after, twins) == 1


def test_shared_positions_by_hand():
    truth = {"a": torch.tensor([2, 0, 1]), "b": torch.tensor([0])}
    assert shared_positions({"a": torch.tensor([2, 1, 0]), "b": torch.tensor([0])}, truth) == 2 / 4
    with pytest.raises(ValueError, match="expected the same groups"):
        shared_positions({"a": truth["a"]}, truth)
    with pytest.raises(ValueError, match="expected the same groups"):
        shared_positions({}, {})
    with pytest.raises(ValueError, match="the classes of {'a': 3}: expected the same groups"):
        shared_positions(truth, truth, {"a": torch.tensor([0, 0, 1])})
