"""Units of experts: a planted order and scale is recovered, and the library's weight matching agrees."""

import pytest
import torch

from permask_core.experts import (
    align_expert,
    balance_units,
    expert_tensors,
    moe_blocks,
    run_expert,
    unit_correlations,
    unit_groups,
)
from permask_core.experts.alignment import moved_onto
from permask_core.matching import match_weights, permute, random_permutations
from tests.experts.models import KINDS, tiny


def block_of(kind, seed=0):
    return next(iter(moe_blocks(tiny(kind, seed=seed)).values()))


def write(block, j, tensors):
    for key, tensor in expert_tensors(block, j).items():
        tensor.copy_(tensors[key])


def plant(block, origin, copy, seed=0):
    """Make one expert a copy of another with units in another order and, where it may be, another scale and sign."""
    tensors = {key: tensor.clone() for key, tensor in expert_tensors(block, origin).items()}
    orders = random_permutations(unit_groups(tensors), seed=seed)
    moved = permute(unit_groups(tensors), orders, tensors)
    if block.scalable:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.randn(24, generator=generator, dtype=torch.float64) * 3
        moved |= {"up.weight": moved["up.weight"] * scale[:, None], "down.weight": moved["down.weight"] / scale}
    write(block, copy, moved)
    return orders["units"]


@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_copy_is_undone(kind, matching):
    block = block_of(kind)
    plant(block, 2, 5)
    x = torch.randn(60, block.router.weight.shape[1], dtype=torch.float64)
    assert torch.allclose(run_expert(block, 5, x), run_expert(block, 2, x), atol=1e-10)
    goal, moved = moved_onto(block, 5, 2, matching, x)
    for key in goal:
        assert torch.allclose(moved[key], goal[key], rtol=1e-9, atol=1e-12), key
    naive, same = moved_onto(block, 5, 2, None)
    assert (naive["up.weight"] - same["up.weight"]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["gelu", "gpt_oss"])
def test_without_a_scale_it_is_weight_matching(kind):
    block = block_of(kind)
    source, target = expert_tensors(block, 0), expert_tensors(block, 1)
    groups = unit_groups(source)
    own = {key: tensor for key, tensor in source.items() if key != "down.bias"}  # of no unit
    goal = {key: target[key] for key in own}
    expected = permute(groups, match_weights(groups, own, goal), own)
    moved = align_expert(source, target)
    assert all(torch.equal(moved[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_moved_experts_compute_the_same_and_are_no_further_away(kind, matching):
    block = block_of(kind)
    x = torch.randn(60, block.router.weight.shape[1], dtype=torch.float64)
    before = run_expert(block, 3, x)
    goal, moved = moved_onto(block, 3, 4, matching, x)
    start = balance_units(expert_tensors(block, 3)) if block.scalable else expert_tensors(block, 3)
    if matching == "weights":
        assert distance(moved, goal) < distance(start, goal)
    write(block, 3, moved)
    assert torch.allclose(run_expert(block, 3, x), before, atol=1e-10)


def distance(a, b):
    return sum(float((a[key] - b[key]).square().sum()) for key in a)


def test_activations_are_those_of_the_units():
    block = block_of("moe")
    x = torch.randn(200, 32, dtype=torch.float64)
    found = unit_correlations(block, 1, 2, x)
    units = []
    for j in (2, 1):
        tensors = expert_tensors(block, j)
        units.append(torch.nn.functional.silu(x @ tensors["gate.weight"].T) * (x @ tensors["up.weight"].T))
    expected = torch.corrcoef(torch.cat(units, 1).T)[:24, 24:]
    assert torch.allclose(found, expected, atol=1e-10)


def test_balanced_units_have_equal_norms_and_units_of_zeros_do_not_change():
    block = block_of("moe")
    tensors = {key: tensor.clone() for key, tensor in expert_tensors(block, 0).items()}
    tensors["down.weight"][:, 7] = 0
    balanced = balance_units(tensors)
    norms = balanced["up.weight"].norm(dim=1), balanced["down.weight"].norm(dim=0)
    assert torch.allclose(norms[0][:7], norms[1][:7]) and torch.equal(balanced["up.weight"][7], tensors["up.weight"][7])


def test_an_unknown_matching_is_refused():
    with pytest.raises(ValueError, match="unknown matching 'weight', perhaps 'weights': expected one of weights, act"):
        moved_onto(block_of("moe"), 0, 1, "weight")
