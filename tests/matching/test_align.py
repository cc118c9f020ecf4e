"""Alignment in one call: planted permutations, and the four steps taken one by one."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from permask_core.masks import apply_masks, prunable_weights
from permask_core.matching import (
    Entry,
    Group,
    align,
    match_activations,
    match_weights,
    permutation_groups,
    permute,
    random_permutations,
    reset_batchnorm,
)
from permask_core.models import build_model
from permask_core.pruning import magnitude_masks

SHAPE = (3, 8, 8)


def images(n=40, seed=0):
    return torch.randn(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labelled(x):
    return x, torch.zeros(len(x), dtype=torch.int64)


@pytest.fixture
def planted(lively):
    """A network, what it becomes under a random permutation, its groups and the permutation."""
    a, b = (lively("resnet8", SHAPE, 10) for _ in range(2))
    groups = permutation_groups(a, images(2))
    there = random_permutations(groups, seed=0)
    b.load_state_dict(permute(groups, there, a.state_dict()))
    return a, b, groups, there


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("by, data", [("weights", images(2)), ("weights", [images()]), ("activations", [images()])])
def test_a_planted_permutation_is_found_and_both_models_stay(planted, by, data):
    a, b, groups, there = planted
    before = copy_of(a), copy_of(b)
    result = align(a, b, data, by)
    assert same(result.permutations, there) and result.groups.keys() == groups.keys()
    parameters = dict(result.model.named_parameters())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in b.named_parameters())
    assert same(a.state_dict(), before[0]) and same(b.state_dict(), before[1]) and result.model is not a
    assert a.training is result.model.training


def test_its_masks_move_as_the_network_does(planted):
    a, b, _, _ = planted
    masks_a, masks_b = (magnitude_masks(prunable_weights(net), 0.8) for net in (a, b))
    result = align(a, b, images(2))
    assert same(permute(result.groups, result.permutations, masks_a), masks_b)
    x = images()
    outputs = apply_masks(a, masks_a)(x), apply_masks(result.model, masks_b)(x)
    torch.testing.assert_close(*outputs)


def test_an_example_leaves_the_statistics_and_batches_reset_them(planted):
    a, b, groups, there = planted
    only_moved = align(a, b, images(2))
    assert same(only_moved.model.state_dict(), b.state_dict()) and only_moved.reset == ()
    result = align(a, b, [images()])
    expected = build_model("resnet8", SHAPE, 10).double()
    expected.load_state_dict(b.state_dict())
    assert same(result.model.state_dict(), reset_batchnorm(expected, [images()]).state_dict())
    assert result.reset == tuple(name for name, module in a.named_modules() if isinstance(module, nn.BatchNorm2d))


def test_it_is_the_steps_one_by_one(lively):
    a, b = (lively("mlp", SHAPE, 10, width=0.1, depth=3, seed=seed) for seed in (0, 1))
    groups, x = permutation_groups(a, images(2)), images()
    assert same(align(a, b, x, seed=3, restarts=2).permutations,
                match_weights(groups, a.state_dict(), b.state_dict(), seed=3, restarts=2))
    assert same(align(a, b, [x], "activations").permutations, match_activations(groups, a, b, [x]))
    chosen = {"fc2": groups["fc2"]}
    result = align(a, b, x, groups=chosen)
    assert result.groups is chosen and result.permutations.keys() == {"fc2"}


@pytest.mark.parametrize("form", [
    lambda x: labelled(x), lambda x: [labelled(part) for part in x.split(16)], lambda x: (part for part in x.split(16)),
    lambda x: DataLoader(TensorDataset(*labelled(x)), batch_size=16)], ids=["tensors", "list", "generator", "loader"])
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_batches_of_any_kind(planted, form, by):
    a, b, _, there = planted
    result = align(a, b, form(images()), by)
    assert same(result.permutations, there) and result.reset


class Named(nn.Module):
    """A network of two named inputs, and a BatchNorm without statistics next to one that is not called."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.norm, self.idle = nn.BatchNorm1d(6, track_running_stats=False), nn.BatchNorm1d(6)

    def forward(self, *, left, right):
        return self.head(self.norm(self.one(left) + self.two(right)).relu())


def test_named_inputs_and_norms_without_statistics():
    a, b = Named(0), Named(0)
    example = {"left": torch.randn(30, 3), "right": torch.randn(30, 4)}
    groups = permutation_groups(a, example)
    there = random_permutations(groups, seed=0)
    b.load_state_dict(permute(groups, there, a.state_dict()))
    assert same(align(a, b, example).permutations, there)
    result = align(a, b, [example | {"labels": torch.zeros(30)}], "activations")
    assert same(result.permutations, there) and result.reset == ()


def test_what_cannot_be_aligned_is_named(lively):
    a, wide = (lively("mlp", SHAPE, 10, width=width) for width in (0.1, 0.2))
    x = images(2)
    for call, message in (
            (lambda: align(a, wide, x), "'fc1.weight' has shape [13, 192] in the source and [26, 192] in the target"),
            (lambda: align(a, a, x, "names"), "unknown matching 'names': expected one of weights, activations"),
            (lambda: align(a, a, x, "activations"), "activations cannot be matched on a Tensor"),
            (lambda: align(a, a, {"x": x}, "activations"), "activations cannot be matched on a dict"),
            (lambda: align(a, a, []), "a list without batches"), (lambda: align(a, a, 3), "got int: expected a split"),
            (lambda: align(a, a, x, restarts=0), "restarts is 0: expected an integer of at least 1"),
            (lambda: align(nn.Linear(8, 3).double(), nn.Linear(8, 3).double(), x),
             "Linear has no units that can be permuted: they reach the network's output; they meet the network's "),
            (lambda: align(a, a, x, groups={"g": Group(5, (Entry("fc1.weight", 0),))}), "group 'g' has 5 units")):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_with_masks_only_kept_weights_are_compared(lively, by):
    a, b = (lively("resnet8", SHAPE, 10, seed=seed) for seed in (0, 1))
    masks, pruned = magnitude_masks(prunable_weights(a), 0.9), lively("resnet8", SHAPE, 10, seed=0)
    apply_masks(pruned, masks)
    result, groups = align(a, b, [images()], by, masks=masks), permutation_groups(a, images(2))
    expected = (match_weights(groups, pruned.state_dict(), b.state_dict()) if by == "weights"
                else match_activations(groups, pruned, b, [images()]))
    assert same(result.permutations, expected)
    assert not same(result.permutations, align(a, b, [images()], by).permutations)
    moved = permute(groups, result.permutations, a.state_dict())  # of the whole A
    assert all(torch.equal(parameter, moved[name]) for name, parameter in result.model.named_parameters())


def test_masks_that_do_not_fit_are_refused_before_tracing(planted):
    a, b, _, _ = planted
    with pytest.raises(ValueError, match="^masks has 'conv9.weight'"):
        align(a, b, images(2), masks={"conv9.weight": torch.ones(1, dtype=torch.bool)}, groups={})
