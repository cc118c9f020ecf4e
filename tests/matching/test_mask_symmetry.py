"""Twins and equitable cells against all permutations of tiny networks; unread units against what a network computes."""

import functools
import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permask_core.masks import prunable_weights
from permask_core.matching import Entry, Group, permutation_groups, permute, random_permutations
from permask_core.matching.mask_symmetry import (
    drop_unread_units,
    equitable_partition,
    log10_permutations,
    twin_classes,
)
from permask_core.models import build_model
from permask_core.pruning import random_masks
from tests.hypotheses import examples

# Two hidden layers, the second with a recurrent weight, so that one group owns two axes of a tensor.
GROUPS = {"one": Group(3, (Entry("a", 0), Entry("b", 1))),
          "two": Group(4, (Entry("b", 0), Entry("loop", 0), Entry("loop", 1), Entry("c", 1)))}
SHAPES = {"a": (3, 2), "b": (4, 3), "loop": (4, 4), "c": (2, 4)}


def drawn(shapes, density, seed):
    return random_masks({name: torch.empty(shape) for name, shape in shapes.items()}, density, seed=seed)


@functools.cache
def traced(name, side, width):
    model = build_model(name, (1, side, side), 3, width=width).double()
    return model, permutation_groups(model, torch.zeros(2, 1, side, side).double())


def automorphisms(groups, masks):
    """All permutations of all units that change no mask."""
    orders = [[torch.tensor(order) for order in itertools.permutations(range(group.size))] for group in groups.values()]
    for chosen in itertools.product(*orders):
        moves = dict(zip(groups, chosen))
        if all(torch.equal(moved, masks[name]) for name, moved in permute(groups, moves, masks).items()):
            yield {name: order.tolist() for name, order in moves.items()}


def within(classes, moves):
    """Whether all units are moved within their class."""
    return all(classes[name][i] == classes[name][j] for name, order in moves.items() for i, j in enumerate(order))


def swaps(order):
    return sum(i != j for i, j in enumerate(order))


@examples(0.3)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.3, 0.5, 0.8]))
def test_twins_are_below_and_cells_above_all_automorphisms(seed, density):
    masks = drawn(SHAPES, density, seed)
    twins, cells = twin_classes(GROUPS, masks), equitable_partition(GROUPS, masks)
    found = [*automorphisms(GROUPS, masks)]
    of_twins = [moves for moves in found if within(twins, moves)]
    assert math.log10(len(of_twins)) == pytest.approx(log10_permutations(twins))  # so all of these are automorphisms
    assert all(within(cells, moves) for moves in found) and len(found) <= 10 ** log10_permutations(cells) + 1e-6
    # The classes are as large as they can be: a swap of two units that changes no mask is a swap of twins.
    assert all(within(twins, moves) for moves in found if sum(map(swaps, moves.values())) == 2)


def test_automorphisms_that_move_several_layers_at_once_are_in_the_cells_only():
    masks = {"a": torch.ones(3, 2), "b": torch.eye(4, 3), "loop": torch.zeros(4, 4), "c": torch.ones(2, 4)}
    masks = {name: mask.bool() for name, mask in masks.items()}
    assert {name: labels.tolist() for name, labels in twin_classes(GROUPS, masks).items()} == {
        "one": [0, 1, 2], "two": [0, 1, 2, 3]}
    assert {name: labels.tolist() for name, labels in equitable_partition(GROUPS, masks).items()} == {
        "one": [0, 0, 0], "two": [0, 0, 0, 1]}
    assert len([*automorphisms(GROUPS, masks)]) == 6


def test_inputs_outputs_and_positions_in_a_kernel_distinguish_units():
    groups = {"units": Group(3, (Entry("in", 0), Entry("out", 1)))}
    same = torch.ones(2, 3, 1).bool()
    one = torch.eye(3).bool()
    for tensor, mask in {"in": one[:, :, None], "out": one[:, :, None], "kernel": one[:, None]}.items():
        masks = {"in": same.transpose(0, 1), "out": same, tensor.replace("kernel", "in"): mask}
        assert equitable_partition(groups, masks)["units"].tolist() == [0, 1, 2], tensor


def test_refinement_does_not_tell_a_ring_of_six_from_two_of_three():
    """The known limit of the algorithm: both are regular, so there is one cell, but more than one orbit."""
    ring = torch.zeros(9, 9, dtype=torch.bool)
    for cycle in ([0, 1, 2], [3, 4, 5, 6, 7, 8]):
        for i, j in zip(cycle, [*cycle[1:], cycle[0]]):
            ring[i, j] = ring[j, i] = True
    groups = {"units": Group(9, (Entry("w", 0), Entry("w", 1)))}
    assert equitable_partition(groups, {"w": ring})["units"].tolist() == [0] * 9
    assert twin_classes(groups, {"w": ring})["units"].tolist() == [*[0] * 3, *range(1, 7)]  # a triangle has twins


@examples(0.3)
@given(st.integers(0, 10**6))
def test_dead_units_are_twins_and_a_dense_layer_has_only_twins(seed):
    model, groups = traced("mlp", 3, 0.06)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(model).items()}
    assert all(not labels.any() for labels in twin_classes(groups, masks).values())
    assert log10_permutations(twin_classes(groups, masks)) == pytest.approx(2 * math.log10(math.factorial(8)))
    masks = random_masks(masks, 0.4, seed=seed)
    masks["fc1.weight"][:3] = masks["fc2.weight"][:, :3] = False
    assert len(twin_classes(groups, masks)["fc1"][:3].unique()) == 1


@examples(0.1)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.2, 0.6]))
def test_classes_and_cells_move_with_the_units(seed, density):
    """On attention, whose heads have parts: also there, a permutation within the classes changes no mask."""
    model, groups = traced("vit", 8, 0.5)
    masks = random_masks(prunable_weights(model), density, seed=seed)
    generator, moves = torch.Generator().manual_seed(seed), random_permutations(groups, seed=seed)
    flat = {name: order for name, order in moves.items() if "/" not in name and "in_proj" not in name}
    for function in (twin_classes, equitable_partition):
        before, after = function(groups, masks), function(groups, permute(groups, flat, masks))
        for name, order in flat.items():
            expected = before[name][order]
            assert torch.equal(expected[:, None] == expected, after[name][:, None] == after[name])
    heads = equitable_partition(groups, permute(groups, moves, masks))
    for name, labels in equitable_partition(groups, masks).items():  # of a head and its parts, the number of cells
        if "/" not in name:
            assert labels.unique().numel() == heads[name].unique().numel()
    twins, within = twin_classes(groups, masks), {}
    for name, labels in twins.items():
        within[name] = torch.arange(len(labels))
        for units in (torch.nonzero(labels == one)[:, 0] for one in labels.unique()):
            within[name][units] = units[torch.randperm(len(units), generator=generator)]
    assert all(torch.equal(moved, masks[name]) for name, moved in permute(groups, within, masks).items())


def test_heads_that_differ_in_the_order_of_their_dimensions_are_in_one_cell():
    model, groups = traced("vit", 8, 0.5)
    masks = random_masks(prunable_weights(model), 0.3, seed=0)
    name = next(name for name in groups if name.endswith("in_proj"))
    query, out = masks[f"{name}_weight"], masks[name.replace("in_proj", "out_proj.weight")]
    for part in query.view(3, 2, 12, -1):
        part[1] = part[0]
    out.view(-1, 2, 12)[:, 1] = out.view(-1, 2, 12)[:, 0]
    assert twin_classes(groups, masks)[name].tolist() == [0, 0]
    moved = permute(groups, {f"{name}/1": torch.arange(12).flip(0)}, masks)
    assert twin_classes(groups, moved)[name].tolist() == [0, 1]
    assert equitable_partition(groups, moved)[name].tolist() == [0, 0]
    query[0] ^= True
    assert equitable_partition(groups, masks)[name].tolist() == [0, 1]


# ---- Unread units ----------------------------------------------------------------------------------------------------

@examples(0.3)
@given(st.integers(0, 10**6), st.sampled_from([0.03, 0.1, 0.3]))
def test_without_unread_units_a_network_computes_the_same(seed, density):
    (model, groups), x = traced("mlp", 4, 0.15), torch.randn(5, 1, 4, 4).double()
    masks = random_masks(prunable_weights(model), density, seed=seed)
    state = {name: tensor * masks.get(name, True) for name, tensor in model.state_dict().items()}
    kept, left = drop_unread_units(groups, masks, model.state_dict())
    with torch.no_grad():
        whole, fewer = (torch.func.functional_call(model, one, (x,)) for one in (state, left))
    assert torch.allclose(whole, fewer)
    # What remains has an effect: a path of kept weights leads from each to an output.
    read = kept["head.weight"].any(0)
    assert not kept["fc2.weight"][~read].any() and not left["fc2.bias"][~read].any()
    assert not kept["fc1.weight"][~kept["fc2.weight"].any(0)].any()
    assert torch.equal(kept["fc2.weight"][read], masks["fc2.weight"][read])


def test_units_that_a_dense_weight_reads_are_read():
    groups = {"units": Group(2, (Entry("in", 0), Entry("out", 1), Entry("shortcut", 1)))}
    state = {name: torch.ones(2, 2) for name in ("in", "out", "shortcut")}
    masks = {"in": torch.ones(2, 2).bool(), "out": torch.zeros(2, 2).bool()}
    assert drop_unread_units(groups, masks, state)[0]["in"].all()
    masks["shortcut"] = masks["out"]
    assert not drop_unread_units(groups, masks, state)[0]["in"].any()


@pytest.mark.parametrize("function", [twin_classes, equitable_partition])
@pytest.mark.parametrize("masks, message", [
    ({"in": torch.ones(2, 2)}, "mask 'in' is torch.float32 [2, 2]: expected a bool"),
    ({"in": torch.ones(3, 2).bool()}, "group 'units' has 2 units"),
    ({"other": torch.ones(2, 2).bool()}, "the groups have none of the tensors other")])
def test_masks_that_do_not_fit_are_refused(function, masks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function({"units": Group(2, (Entry("in", 0),))}, masks)
