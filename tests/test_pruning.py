"""Pruning against sorting by hand, the Erdős-Rényi formula, and the published numbers of rounds."""

import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from permask_core.masks import layer_sparsity, sparsity
from permask_core.pruning import (
    SCOPES,
    erk_densities,
    iterative_magnitude_pruning,
    magnitude_masks,
    random_masks,
)

few_values = st.integers(-3, 3).map(float)  # so that ties are common
states = st.fixed_dictionaries({"a": arrays(np.float32, (4, 5), elements=few_values).map(torch.from_numpy),
                                "b": arrays(np.float32, (3, 2, 2), elements=few_values).map(torch.from_numpy),
                                "bias": st.just(torch.ones(4))})
fractions = st.floats(0.01, 0.99)


def normal_state(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"fc1.weight": torch.randn(30, 20, generator=generator), "fc1.bias": torch.randn(30, generator=generator),
            "conv.weight": torch.randn(4, 5, 3, 3, generator=generator)}


def by_sorting(state, names, fraction):
    """The weights kept: the largest, and among equals the first in the order of the state."""
    ranked = sorted(((name, i) for name in names for i in range(state[name].numel())),
                    key=lambda place: -abs(state[place[0]].flatten()[place[1]]))
    return set(ranked[: len(ranked) - round(fraction * len(ranked))])


def kept(masks):
    return {(name, i) for name, mask in masks.items() for i in mask.flatten().nonzero().flatten().tolist()}


def nested(inner, outer):
    return all((mask <= outer[name]).all() for name, mask in inner.items())


@given(states, fractions)
def test_magnitude_masks_are_those_of_sorting(state, fraction):
    everywhere = magnitude_masks(state, fraction)
    assert everywhere.keys() == {"a", "b"}  # a bias is not pruned
    assert kept(everywhere) == by_sorting(state, everywhere, fraction)
    by_layer = magnitude_masks(state, fraction, scope="layer")
    assert kept(by_layer) == by_sorting(state, ["a"], fraction) | by_sorting(state, ["b"], fraction)


@given(states, states, fractions, fractions, st.sampled_from(SCOPES))
def test_new_masks_are_nested_in_previous_ones(first, second, low, high, scope):
    low, high = sorted((low, high))
    previous = magnitude_masks(first, low, scope)
    masks = magnitude_masks(second, high, scope, previous)
    assert nested(masks, previous)
    if scope == "global":
        assert sum(mask.sum() for mask in masks.values()) == 32 - round(high * 32)
    elif scope == "layer":
        assert all(mask.sum() == mask.numel() - round(high * mask.numel()) for mask in masks.values())


@given(states, fractions)
def test_every_neuron_keeps_as_many_of_its_own_weights(state, fraction):
    masks = magnitude_masks(state, fraction, scope="fan_in")
    densities = erk_densities({"a": state["a"], "b": state["b"]}, 1 - fraction)
    for name, mask in masks.items():
        rows, n = mask.flatten(1), mask[0].numel()
        fan_in = max(1, n - round((1 - densities[name]) * n))
        for i, row in enumerate(rows):
            assert row.nonzero().flatten().tolist() == sorted(
                i for _, i in by_sorting({name: state[name][i]}, [name], 1 - fan_in / n))


def test_constant_fan_in_hits_the_sparsity_to_half_a_weight_a_row():
    state = {"fc": torch.randn(50, 40), "conv": torch.randn(30, 20, 3, 3)}
    for target in (0.5, 0.8, 0.9, 0.95):
        masks = magnitude_masks(state, target, scope="fan_in")
        assert abs(sparsity(masks) - target) <= 0.5 * (50 + 30) / (50 * 40 + 30 * 180)


def test_the_floor_of_one_weight_a_row_keeps_more_than_half_a_weight_too_many():
    state = {"fc": torch.randn(40, 10, generator=torch.Generator().manual_seed(0))}
    masks = magnitude_masks(state, 0.99, scope="fan_in")  # 0.1 weights a row were asked for
    assert (masks["fc"].sum(1) == 1).all() and sparsity(masks) == pytest.approx(0.9)


def test_a_mask_that_is_not_of_constant_fan_in_has_no_constant_fan_in_within():
    state, uneven = {"fc": torch.randn(20, 10)}, {"fc": torch.ones(20, 10, dtype=torch.bool)}
    uneven["fc"][3, 2:] = False
    with pytest.raises(ValueError, match="fc keeps 2 of 10 weights in a row, but the sparsity keeps 5"):
        magnitude_masks(state, 0.5, "fan_in", uneven)
    kept = magnitude_masks(state, 0.8, "fan_in", uneven)["fc"]
    assert (kept.sum(1) == 2).all() and nested({"fc": kept}, uneven)


def test_previous_masks_say_which_tensors_are_pruned_and_hide_what_was_dropped():
    state = normal_state(0)
    previous = {"fc1.weight": torch.ones(30, 20, dtype=torch.bool)}
    previous["fc1.weight"][:, 0] = False
    state["fc1.weight"][:, 0] = float("nan")
    masks = magnitude_masks(state, 0.5, previous=previous)
    assert masks.keys() == {"fc1.weight"} and nested(masks, previous) and sparsity(masks) == 0.5


@pytest.mark.parametrize("change, message", [
    ({"sparsity": 0}, "sparsity is 0"), ({"sparsity": 1.0}, "sparsity is 1.0"), ({"sparsity": float("nan")}, "nan"),
    ({"sparsity": "0.9"}, "sparsity is '0.9'"), ({"scope": "channel"}, "scope is 'channel'"),
    ({"previous": {"x": torch.ones(1, dtype=torch.bool)}}, "'x' of shape [1]"),
    ({"previous": {"fc1.weight": torch.ones(30, dtype=torch.bool)}}, "has shape [30]: expected [30, 20]"),
    ({"previous": {"fc1.weight": torch.zeros(30, 20, dtype=torch.bool)}}, "previous keeps 0 of 600"),
    ({"state": {"fc1.bias": torch.ones(3)}}, "masks are empty"),
    ({"state": {"w": torch.tensor([[1.0, float("nan")]])}}, "'w' holds NaN"),
])
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        magnitude_masks(**{"state": normal_state(0), "sparsity": 0.5, **change})


@given(st.floats(0, 1), st.integers(0, 1000))
def test_random_masks_have_exact_counts_and_a_seed(density, seed):
    state = normal_state(0)
    masks = random_masks(state, density, seed=seed)
    for name, mask in masks.items():
        assert mask.shape == state[name].shape and mask.sum() == round(density * mask.numel())
    again, other = random_masks(state, density, seed=seed), random_masks(state, density, seed=seed + 1)
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assume(0.1 < density < 0.9)
    assert not torch.equal(masks["fc1.weight"], other["fc1.weight"])


def test_the_shuffle_of_a_ticket_keeps_each_layers_count():
    ticket = magnitude_masks(normal_state(0), 0.9)
    shuffled = random_masks(ticket, {name: 1 - s for name, s in layer_sparsity(ticket).items()}, seed=0)
    assert layer_sparsity(shuffled) == layer_sparsity(ticket)
    assert not torch.equal(shuffled["fc1.weight"], ticket["fc1.weight"])


def test_every_weight_is_as_likely_to_be_kept():
    counts = sum(random_masks({"a": torch.empty(3, 4)}, 0.25, seed=seed)["a"].double() for seed in range(2000))
    assert (counts / 2000 - 0.25).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize("densities", [1.1, -0.1, float("nan"), {"a": 0.5}])
def test_a_density_that_is_missing_or_out_of_range_is_refused(densities):
    with pytest.raises(ValueError, match="density of 'b' is .*expected a number in"):
        random_masks({"b": torch.ones(2)}, densities, seed=0)


def test_erdos_renyi_kernel_by_hand():
    shapes = {"conv": torch.empty(16, 8, 3, 3), "fc": torch.empty(100, 50)}
    ratio = {"conv": (16 + 8 + 3 + 3) / 1152, "fc": 150 / 5000}
    scale = 0.2 * (1152 + 5000) / (30 + 150)  # the sum of ratio times size is the sum of all axes
    assert erk_densities(shapes, 0.2) == pytest.approx({name: scale * value for name, value in ratio.items()})


def test_a_saturated_layer_is_dense_and_the_others_share_the_rest():
    shapes = {"small": torch.empty(10, 2), "big": torch.empty(100, 100), "large": torch.empty(200, 100)}
    budget = 0.1 * 30020 - 20
    expected = {"small": 1.0, "big": budget / (200 + 300) * 200 / 10_000, "large": budget / (200 + 300) * 300 / 20_000}
    assert erk_densities(shapes, 0.1) == pytest.approx(expected)


@given(st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6), st.floats(0.001, 1))
def test_erdos_renyi_kernel_densities_add_up(sizes, density):
    shapes = {str(i): torch.empty(shape) for i, shape in enumerate(sizes)}
    densities = erk_densities(shapes, density)
    assert all(0 < value <= 1 for value in densities.values())
    total = sum(tensor.numel() for tensor in shapes.values())
    assert sum(densities[n] * tensor.numel() for n, tensor in shapes.items()) == pytest.approx(density * total)
    below = [densities[n] * t.numel() / sum(t.shape) for n, t in shapes.items() if densities[n] < 1 - 1e-9]
    assert not below or max(below) == pytest.approx(min(below))  # one scale for all that are not saturated


@pytest.mark.parametrize("shapes, density", [({}, 0.5), ({"a": torch.empty(2, 2)}, 0), ({"a": torch.empty(2, 2)}, 1.5)])
def test_bad_densities_are_refused(shapes, density):
    with pytest.raises(ValueError, match="density is"):
        erk_densities(shapes, density)


class Training:
    """Stands for training: adds noise that depends on the masks alone, and remembers what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, state, masks):
        self.calls.append((state, masks))
        noise = normal_state(sum(int(mask.sum()) for mask in masks.values()))
        return {name: tensor + noise[name] for name, tensor in state.items()}


def never(state, masks):
    raise AssertionError("trained")


PUBLISHED_ROUNDS = {0.8: 8, 0.9: 11, 0.95: 14, 0.97: 16}  # at 20 % a round, the last one partial


def test_the_published_numbers_of_rounds_and_the_exact_sparsity():
    training, trained = Training(), normal_state(1)
    tickets = dict(iterative_magnitude_pruning(training, trained, PUBLISHED_ROUNDS, rewind=normal_state(0)))
    assert {value: ticket.rounds for value, ticket in tickets.items()} == PUBLISHED_ROUNDS
    for value, ticket in tickets.items():
        assert ticket.masks.keys() == {"fc1.weight", "conv.weight"}
        assert sum(int(mask.sum()) for mask in ticket.masks.values()) == 780 - round(value * 780)
        assert ticket.sparsity == sparsity(ticket.masks)
    assert len(training.calls) == 15  # the last round of each prunes without training again
    for n, (_, masks) in enumerate(training.calls, 1):
        assert sparsity(masks) == pytest.approx(1 - 0.8**n, abs=0.5 / 780)


def test_a_whole_number_of_rounds_needs_no_partial_one():
    tickets = dict(iterative_magnitude_pruning(Training(), normal_state(1), [0.2, 0.36, 0.488], rewind=normal_state(0)))
    assert [ticket.rounds for ticket in tickets.values()] == [1, 2, 3]


@pytest.mark.parametrize("flavour", ["rewind", "finetune"])
def test_a_shared_ladder_gives_what_each_alone_gives(flavour):
    rewind = normal_state(0) if flavour == "rewind" else None
    arguments = {"rewind": rewind, "flavour": flavour}
    shared = list(iterative_magnitude_pruning(Training(), normal_state(1), [0.9, 0.5, 0.8], **arguments))
    assert [value for value, _ in shared] == [0.5, 0.8, 0.9]
    for (value, ticket), (_, denser) in zip(shared[1:], shared):
        assert nested(ticket.masks, denser.masks)
        ((_, alone),) = iterative_magnitude_pruning(Training(), normal_state(1), [value], **arguments)
        assert all(torch.equal(ticket.masks[name], alone.masks[name]) for name in alone.masks)


def test_rewinding_returns_and_finetuning_trains_on():
    training, rewind = Training(), normal_state(0)
    list(iterative_magnitude_pruning(training, normal_state(1), [0.7], rewind=rewind))
    assert len(training.calls) > 2 and all(state is rewind for state, _ in training.calls)
    assert all(torch.equal(rewind[name], tensor) for name, tensor in normal_state(0).items())

    training, trained = Training(), normal_state(1)
    list(iterative_magnitude_pruning(training, trained, [0.7], flavour="finetune"))
    noise = [normal_state(sum(int(mask.sum()) for mask in masks.values())) for _, masks in training.calls]
    total = trained["fc1.weight"]
    for (state, _), added in zip(training.calls, noise):
        torch.testing.assert_close(state["fc1.weight"], total)
        total = total + added["fc1.weight"]


def test_only_what_is_prunable_is_pruned():
    names = iter(["conv.weight"])
    ((_, ticket),) = iterative_magnitude_pruning(never, normal_state(1), [0.1], rewind=normal_state(0), prunable=names)
    assert ticket.masks.keys() == {"conv.weight"} and ticket.sparsity == pytest.approx(0.1)


def test_sparsities_from_a_generator_are_not_lost():
    tickets = iterative_magnitude_pruning(Training(), normal_state(1), (s for s in [0.5]), rewind=normal_state(0))
    assert [value for value, _ in tickets] == [0.5]


@pytest.mark.parametrize("change, message", [
    ({"sparsities": [0.5, 1.0]}, "sparsity is 1.0"), ({"flavour": "restart"}, "flavour is 'restart'"),
    ({"rewind": None}, "flavour 'rewind' needs a rewind"), ({"flavour": "finetune"}, "'finetune' takes no rewind"),
    ({"rate": 1}, "rate is 1"), ({"rate": 0.0}, "rate is 0.0"),
    ({"prunable": ["fc1.weight", "fc9"]}, "prunable names 'fc9'"), ({"prunable": []}, "prunable names 'nothing'"),
    ({"rewind": {"other": torch.ones(1)}}, "in trained and nothing in rewind"),
])
def test_errors_come_at_the_call_before_any_training(change, message):
    arguments = {"train": never, "trained": normal_state(1), "sparsities": [0.5], "rewind": normal_state(0)}
    with pytest.raises(ValueError, match=re.escape(message)):
        iterative_magnitude_pruning(**{**arguments, **change})


def test_a_network_that_diverged_is_refused():
    trained = {"w": torch.tensor([[1.0, float("nan")]])}
    with pytest.raises(ValueError, match="'w' holds NaN"):
        list(iterative_magnitude_pruning(never, trained, [0.5], flavour="finetune"))
