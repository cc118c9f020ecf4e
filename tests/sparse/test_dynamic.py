"""SET, RigL and SRigL against rankings written out in plain Python, and what they leave of weights and momenta."""

import copy
import gc
import math
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from permask_core.masks import apply_masks
from permask_core.models import build_model
from permask_core.pruning import random_masks
from permask_core.sparse import FanInConv2d, FanInLinear, condense, dynamic
from permask_core.sparse.dynamic import (
    Connections,
    Rewiring,
    Topology,
    constant_fan_in_masks,
    rigl_step,
    set_rows_step,
    set_step,
    srigl_step,
)
from permask_core.sparse.optim import scale_gradients
from permask_core.training import Recipe, fit

ALWAYS = {"every": 1, "until": 1.0}


def active_of(weight, mask):
    rows, columns = mask.nonzero(as_tuple=True)
    return Connections(rows, columns, weight[rows, columns].abs(), tuple(mask.shape))


def moved(active, keep, grow):
    """The connections before and after, as sets of (row, column)."""
    pairs = list(zip(active.rows.tolist(), active.columns.tolist()))
    kept = {pair for pair, stays in zip(pairs, keep.tolist()) if stays}
    grown = [tuple(pair) for pair in grow.tolist()]
    assert grown == sorted(set(grown)) and not kept & set(grown)
    return set(pairs), kept, set(grown)


def slice_of(gradient):
    return lambda start, stop: gradient[start:stop].abs()


def first(scores, n):
    """The n keys of the largest scores, of equal ones those that come first."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:n]


def rigl_by_hand(weight, connected, gradient, fraction):
    n_drop = math.floor(fraction * len(connected))
    kept = first({key: abs(weight[key]) for key in connected}, len(connected) - n_drop)
    return set(kept), set(first({key: abs(gradient[key]) for key in gradient if key not in kept}, n_drop))


def srigl_by_hand(weight, connected, gradient, fraction, budget, gamma):
    rows, columns = (1 + max(key[axis] for key in weight) for axis in (0, 1))
    n_drop = math.floor(fraction * len(connected))
    n_keep = len(connected) - n_drop
    neurons = set(range(rows))
    if gamma is not None:
        salient = {*first({key: abs(weight[key]) for key in connected}, n_keep),
                   *first({key: abs(value) for key, value in gradient.items()}, n_drop)}
        counts = {row: sum(key[0] == row for key in salient) for row in range(rows)}
        threshold = max(1, math.floor(gamma * (budget // rows)))
        neurons = {row for row in counts if counts[row] >= threshold}
        neurons |= set(first(counts, math.ceil(budget / columns)))
    k = max(1, budget // len(neurons))
    kept = first({key: abs(weight[key]) for key in connected if key[0] in neurons}, n_keep)
    kept = {key for row in neurons for key in first({key: abs(weight[key]) for key in kept if key[0] == row}, k)}
    grown = set()
    for row in neurons:
        taken = sum(key[0] == row for key in kept)
        free = {key: abs(value) for key, value in gradient.items() if key[0] == row and key not in kept}
        grown |= set(first(free, k - taken))
    return kept, grown


def entries(matrix):
    return {(i, j): value for i, row in enumerate(matrix.tolist()) for j, value in enumerate(row)}


@st.composite
def layers(draw):
    """Weights, connections and gradients with many ties, and settings."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2 ** 32)))
    weight, gradient = (torch.randint(-4, 5, shape, generator=generator).float() for _ in range(2))
    mask = torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
    mask[0, 0] |= not mask.any()
    fraction = draw(st.floats(0, 1))
    return weight, mask, gradient, fraction, draw(st.integers(1, mask.numel())), draw(
        st.none() | st.floats(0.01, 1)), draw(st.integers(1, 50))


@given(layers())
def test_rigl_is_its_ranking_written_out_in_any_chunks(layer):
    weight, mask, gradient, fraction, _, _, chunk = layer
    active = active_of(weight, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "CHUNK", chunk)
        before, kept, grown = moved(active, *rigl_step(active, slice_of(gradient), fraction))
    assert (kept, grown) == rigl_by_hand(entries(weight), before, entries(gradient), fraction)
    assert len(kept) + len(grown) == len(before)


@given(layers())
def test_srigl_is_its_rules_written_out_in_any_chunks(layer):
    weight, mask, gradient, fraction, budget, gamma, chunk = layer
    active = active_of(weight, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "CHUNK", chunk)
        before, kept, grown = moved(active, *srigl_step(active, slice_of(gradient), fraction, budget, gamma))
    assert (kept, grown) == srigl_by_hand(entries(weight), before, entries(gradient), fraction, budget, gamma)
    counts = torch.bincount(torch.tensor([row for row, _ in kept | grown]), minlength=len(weight))
    neurons = int((counts > 0).sum())
    assert neurons >= 1 and set(counts.tolist()) <= {0, max(1, budget // neurons)}
    assert neurons == len(weight) or gamma is not None
    assert len(kept | grown) <= max(budget, len(weight))


@given(layers(), st.integers(0, 2 ** 32))
def test_set_drops_the_smallest_and_grows_as_many_where_nothing_is_kept(layer, seed):
    weight, mask, _, fraction, *_ = layer
    active = active_of(weight, mask)
    before, kept, grown = moved(active, *set_step(active, fraction, torch.Generator().manual_seed(seed)))
    assert kept == rigl_by_hand(entries(weight), before, {}, fraction)[0]
    assert len(grown) == math.floor(fraction * len(before))
    again = moved(active, *set_step(active, fraction, torch.Generator().manual_seed(seed)))
    assert (before, kept, grown) == again


def linear_of(weight):
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


@given(st.integers(1, 5), st.integers(1, 8), st.floats(0, 1), st.integers(0, 2 ** 32), st.data())
def test_set_within_rows_keeps_their_fan_in(n_out, n_in, fraction, seed, data):
    k, n_active = data.draw(st.integers(1, n_in)), data.draw(st.integers(1, n_out))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (n_out, n_in), generator=generator).float()
    mask = torch.zeros(n_out, n_in, dtype=torch.bool)
    for row in torch.randperm(n_out, generator=generator)[:n_active]:
        mask[row, torch.randperm(n_in, generator=generator)[:k]] = True
    active = active_of(weight, mask)
    layer = FanInLinear.from_dense(linear_of(weight), mask)
    keep, grow = set_rows_step(layer, fraction, generator)
    before, kept, grown = moved(active, keep.flatten(), grow)
    for row in range(n_out):
        mine = {key: abs(weight[key].item()) for key in before if key[0] == row}
        assert {key for key in kept if key[0] == row} == set(first(mine, len(mine) - math.floor(fraction * len(mine))))
        assert len(mine) == sum(key[0] == row for key in kept | grown)


def test_random_growth_reaches_every_place_equally_often():
    weight, mask = torch.arange(12.0).view(3, 4), torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 2:] = True
    hits = torch.zeros(3, 4)
    for seed in range(2000):
        keep, grow = set_step(active_of(weight, mask), 0.5, torch.Generator().manual_seed(seed))
        hits[grow[:, 0], grow[:, 1]] += 1
    kept = [(1, 3), (2, 2), (2, 3)]  # the three largest of six
    assert all(hits[place] == 0 for place in kept)
    places = torch.tensor([[place not in kept for place in [(i, j) for j in range(4)]] for i in range(3)])
    assert torch.allclose(hits[places] / 2000, torch.full((9,), 1 / 3), atol=0.05)


def example(weight, gradient, **options):
    """An SRigL step on connections where the weight is given; what is kept and grown."""
    weight = torch.tensor([[float("nan") if value is None else value for value in row] for row in weight])
    active = active_of(weight, ~weight.isnan())
    return moved(active, *srigl_step(active, slice_of(torch.tensor(gradient)), **options))[1:]


O = None  # noqa: E741  no connection


def test_srigl_ablates_a_neuron_without_salient_weights_and_the_others_share_what_it_had():
    """Six connections, two dropped: the salient ones are the four large weights and the two large gradients."""
    kept, grown = example([[0.9, 0.8, O, O], [0.7, -0.6, O, O], [0.1, 0.05, O, O]],
                          [[0.0, 0, -5, 0], [0, 0, 0, 4], [1, 1, 3, 1]], fraction=1 / 3, budget=6, min_salient=0.5)
    assert kept == {(0, 0), (0, 1), (1, 0), (1, 1)} and grown == {(0, 2), (1, 3)}


def test_srigl_revives_a_neuron_by_its_gradients():
    kept, grown = example([[0.9, 0.8, 0.1, O], [0.7, 0.6, O, 0.05], [O, O, O, O]],
                          [[0.0, 0, 0, 1], [0, 0, 1, 0], [9, 0, 0, 8]], fraction=1 / 3, budget=6, min_salient=0.5)
    assert kept == {(0, 0), (0, 1), (1, 0), (1, 1)} and grown == {(2, 0), (2, 3)}


def test_srigl_without_ablation_keeps_every_neuron_at_its_fan_in():
    kept, grown = example([[0.9, 0.8, O, O], [0.7, -0.6, O, O], [0.1, 0.05, O, O]],
                          [[0.0, 0, -5, 0], [0, 0, 0, 4], [1, 1, 3, 2]], fraction=1 / 3, budget=6)
    assert kept == {(0, 0), (0, 1), (1, 0), (1, 1)} and grown == {(2, 2), (2, 3)}


def test_srigl_cuts_a_row_above_the_new_fan_in_by_magnitude():
    """The second neuron comes back, so that three connections are one for each; in the first the largest stays."""
    kept, grown = example([[0.8, 0.9, 0.7], [O, O, O]], [[1.0, 1, 1], [1, 2, 3]],
                          fraction=1 / 3, budget=3, min_salient=0.5)
    assert kept == {(0, 1)} and grown == {(1, 2)}


def test_srigl_keeps_as_many_neurons_as_its_budget_fills():
    """All salient weights are in the first row, which has three places for four connections: of the others, which are
    equal, the first one stays."""
    kept, grown = example([[0.9, O, O], [0.1, O, O], [0.1, O, O], [0.1, O, O]],
                          [[9.0, 8, 7], [1, 3, 2], [1, 1, 1], [6, 6, 6]], fraction=0.75, budget=4, min_salient=1.0)
    assert kept == {(0, 0)} and grown == {(0, 1), (1, 1), (1, 2)}


def test_srigl_cannot_ablate_all_neurons():
    """Nothing is salient enough in any row: one row holds the budget, the one with the most."""
    mask = torch.eye(4, dtype=torch.bool).repeat_interleave(2, 1)
    weight = torch.arange(1.0, 33).view(4, 8) * mask
    keep, grow = srigl_step(active_of(weight, mask), slice_of(torch.zeros(4, 8)), 0.0, 8, 1.0)
    assert keep.all() and len(grow) == 0  # all have two salient weights, which is their fan-in
    weight[:3] *= 0.01
    keep, grow = srigl_step(active_of(weight, mask), slice_of(torch.ones(4, 8)), 0.9, 8, 1.0)
    before, kept, grown = moved(active_of(weight, mask), keep, grow)
    assert kept | grown == {(0, j) for j in range(8)}  # gradients that are equal go to the first places


def test_srigl_has_at_least_one_connection_where_the_budget_has_none():
    kept, grown = example([[0.9, O], [0.5, O], [0.1, O]], [[0.0, 1], [0, 1], [0, 1]], fraction=0.34, budget=1)
    assert kept == {(0, 0), (1, 0)} and grown == {(2, 1)}


def model_and_masks(kind, method, density=0.3):
    if kind == "linear":
        model = build_model("mlp", (1, 4, 4), 5, width=0.1, seed=1)
    else:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(4, 5))
        for module in (model[0], model[2]):  # as training lays them out
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    masks = (constant_fan_in_masks if method == "srigl" else random_masks)(weights, density, seed=3)
    return apply_masks(model, masks), masks


OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, 0.1, 0.9, weight_decay=0.01),
    "adam": lambda weights: torch.optim.Adam(weights, 0.01, amsgrad=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, 0.01, fused=True),
}


@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", dynamic.METHODS)
def test_grown_weights_and_their_momenta_are_0_and_kept_ones_untouched(kind, optimizer, method):
    model, masks = model_and_masks(kind, method)
    optimizer, rewiring = OPTIMIZERS[optimizer](model.parameters()), Rewiring(method, every=3, until=1.0)
    topology = Topology(model, masks, rewiring, steps=13, seed=5)
    weights, grown, dropped = dict(model.named_parameters()), 0, 0
    x, y = torch.randn(40, 1, 4, 4), torch.arange(40) % 5
    for step in range(1, 14):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if not topology.due(step):
            optimizer.step()
            apply_masks(model, topology.masks)
            continue
        old = {name: mask.clone() for name, mask in topology.masks.items()}
        before = {name: [p.detach().clone(), *(t.clone() for t in optimizer.state[p].values())]
                  for name, p in weights.items()}
        topology.rewire(step, optimizer)
        for name, p in weights.items():
            after = [p.detach(), *optimizer.state[p].values()]
            for was, now in zip(before[name], after):
                if name not in masks or now.shape != p.shape:
                    assert torch.equal(was, now)
                    continue
                stayed = topology.masks[name] & old[name] & (p != 0)
                assert torch.equal(was[stayed], now[stayed]) and (now[~stayed] == 0).all()
                assert was[stayed].any()
            grown += int((topology.masks[name] & ~old[name]).sum()) if name in masks else 0
            dropped += int((~topology.masks[name] & old[name]).sum()) if name in masks else 0
            assert all((p[~topology.masks[n]] == 0).all() for n, p in weights.items() if n in masks)
    assert grown > 0 and dropped > 0
    assert [step for step in range(1, 14) if topology.due(step)] == [3, 6, 9, 12]
    for name, mask in masks.items():
        assert topology.fan_in[name].shape == (5, len(mask))
        assert torch.equal(topology.fan_in[name][0], mask.flatten(1).sum(1))
        assert torch.equal(topology.fan_in[name][-1], topology.masks[name].flatten(1).sum(1))
        if method != "srigl":
            assert (topology.fan_in[name].sum(1) == mask.sum()).all()
        else:
            assert all(len(row[row > 0].unique()) == 1 for row in topology.fan_in[name])


def test_a_kept_weight_of_value_0_stays_a_connection():
    linear = nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[0.5, 0, 0, 0], [0, 0, 0.7, 0.6]])
    mask = torch.tensor([[True, True, False, False], [False, False, True, True]])
    topology = Topology(linear, {"weight": mask}, Rewiring("rigl", fraction=0.01, **ALWAYS), steps=10, seed=0)
    linear.weight.grad = torch.ones(2, 4)
    topology.rewire(1)
    assert torch.equal(topology.masks["weight"], mask)


def test_a_weight_that_was_kept_dense_is_left_alone():
    model, masks = model_and_masks("linear", "rigl")
    masks["head.weight"][:] = True
    before = model.head.weight.detach().clone()
    topology = Topology(model, masks, Rewiring("set", fraction=1.0, **ALWAYS), steps=10, seed=0)
    topology.rewire(1)
    assert topology.masks["head.weight"].all() and torch.equal(model.head.weight, before)
    assert not torch.equal(topology.masks["fc1.weight"], masks["fc1.weight"])


def test_masks_that_are_given_stay_as_they_are():
    model, masks = model_and_masks("linear", "set")
    before = {name: mask.clone() for name, mask in masks.items()}
    Topology(model, masks, Rewiring("set", **ALWAYS), steps=10, seed=0).rewire(1)
    assert all(torch.equal(masks[name], before[name]) for name in masks)


def test_random_growth_depends_on_seed_step_and_layer_alone():
    def grown(seed, step, disturb=0):
        torch.manual_seed(disturb)
        model = nn.Sequential(nn.Linear(30, 8), nn.Linear(8, 30))
        for layer in model:
            layer.weight.data = torch.arange(240.0).view_as(layer.weight)
        masks = {f"{i}.weight": torch.zeros(240, dtype=torch.bool).view_as(model[i].weight) for i in (0, 1)}
        for mask in masks.values():
            mask.flatten()[::2] = True
        topology = Topology(model, masks, Rewiring("set", fraction=1.0, **ALWAYS), steps=10, seed=seed)
        topology.rewire(step)
        return [mask.flatten() for mask in topology.masks.values()]

    one, again, other_step, other_seed = grown(3, 2), grown(3, 2, 9), grown(3, 4), grown(4, 2)
    assert all(map(torch.equal, one, again)) and not torch.equal(*one)
    assert not any(torch.equal(a, b) for other in (other_step, other_seed) for a, b in zip(one, other))


def test_the_drop_fraction_is_a_half_cosine_that_ends_with_rewiring():
    rewiring = Rewiring("rigl", every=10, until=0.75, fraction=0.4)
    assert [step for step in range(1, 101) if rewiring.due(step, 100)] == [10, 20, 30, 40, 50, 60, 70]
    assert not rewiring.due(30, 40)  # the end itself is no step that rewires
    found = [rewiring.drop_fraction(step, 100) for step in (0, 25, 37.5, 50, 75)]
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])


def twins(density=0.1, sizes=(20, 30, 12), seed=0, shared=1):
    """A masked and a FanInLinear network that compute the same, in float64."""
    torch.manual_seed(seed)
    masked = nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], sizes[2])).double()
    weights = {name: p for name, p in masked.named_parameters() if p.ndim > 1}
    masks = constant_fan_in_masks(weights, density, seed=seed, shared=shared)
    apply_masks(masked, masks)
    return masked, masks, condense(masked, masks).model


def convolutions():
    """The same for convolutions with strides, padding and groups; each needs the input of each image."""
    torch.manual_seed(1)
    masked = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, (1, 2), groups=4), nn.ReLU(),
                           nn.Flatten(), nn.Linear(12 * 4 * 3, 5)).double()
    masks = constant_fan_in_masks({name: p for name, p in masked.named_parameters() if p.ndim > 1}, 0.3, seed=0)
    apply_masks(masked, masks)
    return masked, masks, condense(masked, masks).model


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("min_salient, shared", [(None, 1), (0.4, 1), (1.0, 1), (None, 3), (1.0, 4)])
def test_a_fan_in_layer_and_a_masked_one_are_rewired_alike(optimizer, min_salient, shared, monkeypatch):
    masked, masks, condensed = twins(shared=shared)
    monkeypatch.setattr(dynamic, "CHUNK", 70)
    rewiring = Rewiring("srigl", every=2, until=1.0, min_salient=min_salient, densities=0.1, shared=shared)
    x, y, ends = torch.randn(50, 20).double(), torch.arange(50) % 12, []
    for model, kept in ((masked, masks), (condensed, None)):
        optimize = OPTIMIZERS[optimizer](model.parameters())
        topology = Topology(model, kept, rewiring, steps=41, seed=0)
        for step in range(1, 42):
            optimize.zero_grad()
            with topology.watching(step):
                for part in (slice(20), slice(20, 50)):  # gradients, and what is caught, add up
                    F.cross_entropy(model(x[part]), y[part], reduction="sum").div(50).backward()
            if topology.due(step):
                topology.rewire(step, optimize)
            else:
                optimize.step()
                apply_masks(model, topology.masks) if kept else None
        ends.append(topology)
    assert ends[0].fan_in.keys() == ends[1].fan_in.keys() == masks.keys()
    for i, name in ((0, "0.weight"), (2, "2.weight")):
        assert torch.equal(ends[0].fan_in[name], ends[1].fan_in[name]) and len(ends[0].fan_in[name]) == 21
        assert torch.equal(condensed[i].mask(), ends[0].masks[name])
        assert not torch.equal(condensed[i].mask(), masks[name])
        torch.testing.assert_close(condensed[i].to_dense().weight, masked[i].weight, atol=1e-9, rtol=1e-9)
        for rows in condensed[i].mask().split(math.gcd(shared, condensed[i].out_features)):
            assert (rows == rows[0]).all()
    ablated = (ends[0].fan_in["0.weight"] == 0).any()
    assert bool(ablated) == (min_salient is not None) and (ends[0].fan_in["2.weight"] > 0).all()
    assert not condensed[0]._forward_hooks


@pytest.mark.parametrize("ablates", [True, False])
def test_fan_in_convolutions_and_masked_ones_are_rewired_in_the_same_way(ablates, monkeypatch):
    masked, masks, condensed = convolutions()
    assert [type(condensed[i]) for i in (0, 2, 5)] == [FanInConv2d, FanInConv2d, FanInLinear]
    monkeypatch.setattr(dynamic, "CHUNK", 60)  # some rows of a convolution at a time
    rewiring = Rewiring("srigl", every=2, until=1.0, min_salient=1.0 if ablates else None)
    x, y, ends = torch.randn(30, 3, 7, 8).double(), torch.arange(30) % 5, []
    for model, kept in ((masked, masks), (condensed, None)):
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        topology = Topology(model, kept, rewiring, steps=21)
        for _ in range(21):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            topology.step(optimizer)
        ends.append(topology)
    for i, name in ((0, "0.weight"), (2, "2.weight"), (5, "5.weight")):
        assert torch.equal(ends[0].fan_in[name], ends[1].fan_in[name]) and len(ends[0].fan_in[name]) == 11
        assert torch.equal(condensed[i].mask(), ends[0].masks[name])
        assert not torch.equal(ends[0].masks[name], masks[name])
        torch.testing.assert_close(condensed[i].to_dense().weight, masked[i].weight, atol=1e-9, rtol=1e-9)
    assert any((ends[0].fan_in[name] == 0).any() for name in masks) == ablates


def test_set_on_a_fan_in_convolution_keeps_its_fan_in():
    *_, condensed = convolutions()
    topology = Topology(condensed, None, Rewiring("set", fraction=0.8, **ALWAYS), steps=20, seed=1)
    before, k = condensed[0].mask(), condensed[0].fan_in
    for step in range(1, 6):
        topology.rewire(step)
    after = condensed[0].mask()
    assert not torch.equal(before, after) and (after.flatten(1).sum(1) == k).all()
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 9), st.integers(0, 2 ** 31), st.floats(0.1, 1), st.data())
def test_neurons_that_share_connections_move_as_one_neuron_with_their_sums(size, groups, inputs, seed, fraction, data):
    """Its magnitudes and gradients are the sums over the neurons, and srigl_step is the reference."""
    torch.manual_seed(seed)
    fan_in = data.draw(st.integers(1, inputs))
    weight = nn.Parameter(torch.randn(size * groups, inputs, dtype=torch.float64))
    mask = torch.rand(groups, inputs).argsort(1).argsort(1).lt(fan_in).repeat_interleave(size, 0)
    model = nn.Module()
    model.weight = weight
    rewiring = Rewiring("srigl", every=1, until=1.0, fraction=fraction, min_salient=None, shared=size)
    topology = Topology(model, {"weight": mask}, rewiring, steps=3)
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    sums, scores = (one.abs().view(groups, size, inputs).sum(1) for one in (before, weight.grad))
    rows, columns = mask[::size].nonzero(as_tuple=True)
    active = Connections(rows, columns, sums[rows, columns], (groups, inputs))
    dropped = rewiring.drop_fraction(1, 3)
    keep, grow = srigl_step(active, lambda start, stop: scores[start:stop], dropped, groups * fan_in)
    topology.rewire(1)
    expected = torch.zeros(groups, inputs, dtype=torch.bool)
    expected[rows[keep], columns[keep]] = True
    expected[grow[:, 0], grow[:, 1]] = True
    if fan_in < inputs:
        assert torch.equal(topology.masks["weight"], expected.repeat_interleave(size, 0))
        assert (topology.fan_in["weight"] == fan_in).all() and topology.fan_in["weight"].shape == (2, size * groups)
    kept = topology.masks["weight"] & (weight != 0)
    assert torch.equal(weight[kept], before[kept])


@pytest.mark.parametrize("stored", [False, True])
def test_set_moves_the_connections_of_neurons_that_share_them(stored):
    masked, masks, condensed = twins(density=0.4, shared=4)
    topology = Topology(condensed if stored else masked, None if stored else masks,
                        Rewiring("set", fraction=0.8, shared=4, **ALWAYS), steps=20, seed=1)
    for step in range(1, 11):
        topology.rewire(step)
        for i, name in ((0, "0.weight"), (2, "2.weight")):
            now = condensed[i].mask() if stored else topology.masks[name]
            for rows in now.split(2 if i == 0 else 4):  # 30 neurons and 12
                assert (rows == rows[0]).all()
            assert now.sum() == masks[name].sum()
    assert not torch.equal(now, masks[name])


def test_neurons_that_do_not_share_connections_are_refused():
    masked, masks, condensed = twins()
    for model, at_start in ((masked, masks), (condensed, None)):
        with pytest.raises(ValueError, match="'0.weight' has neighbouring neurons with different connections"):
            Topology(model, at_start, Rewiring("srigl", shared=2), steps=300)
    with pytest.raises(ValueError, match="shared is 0: expected an integer of at least 1"):
        constant_fan_in_masks({"a": torch.empty(4, 6)}, 0.5, seed=0, shared=0)


def test_set_on_a_fan_in_layer_keeps_its_rows_and_zeroes_what_is_new():
    *_, condensed = twins(density=0.4)
    topology = Topology(condensed, None, Rewiring("set", fraction=0.8, **ALWAYS), steps=20, seed=1)
    optimizer = torch.optim.SGD(condensed.parameters(), 0.1, 0.9)
    for step in range(1, 11):
        condensed(torch.randn(8, 20).double()).square().mean().backward()  # 9 would compile loops for 16 in float64
        optimizer.step()
        before = condensed[0].mask(), condensed[0].to_dense().weight
        topology.rewire(step, optimizer)
        after, momentum = condensed[0].to_dense().weight, optimizer.state[condensed[0].values]["momentum_buffer"]
        new = condensed[0].values == 0
        assert (after[~before[0] & condensed[0].mask()] == 0).all() and (momentum[new] == 0).all() and new.any()
        assert torch.equal(after[after != 0], before[1][after != 0])
        assert not torch.equal(before[0], condensed[0].mask())
    assert (topology.fan_in["0.weight"] == 8).all() and len(topology.fan_in["0.weight"]) == 11


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


@pytest.mark.parametrize("method", ["set", "srigl"])
def test_a_fan_in_layer_is_rewired_without_anything_dense(method, monkeypatch):
    monkeypatch.setattr(dynamic, "CHUNK", 6000)
    layer = FanInLinear(300, 1000, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    topology = Topology(layer, None, Rewiring(method, min_salient=0.5, unablated=() if method == "srigl" else None,
                                              **ALWAYS), steps=10, seed=0)
    before = layer.mask()
    layer(torch.randn(8, 300)).square().mean().backward()
    optimizer.step()
    with Largest() as largest:
        with topology.watching(1):
            layer(torch.randn(8, 300)).square().mean().backward()
        topology.rewire(1, optimizer)
    assert 6000 <= largest.entries <= 8 * 1000 * 4  # what an eager forward pass gathers; the dense weight has 300,000
    assert not torch.equal(layer.mask(), before)


@pytest.mark.parametrize("shape", [(6, 10), (6, 5, 3, 3), (4, 7, 2)])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_masks_of_constant_fan_in_keep_what_the_budget_gives_each_row(shape, density):
    weights = {"a": torch.empty(shape)}
    mask = constant_fan_in_masks(weights, density, seed=1)["a"]
    k = max(1, math.floor(math.prod(shape) * density) // shape[0])
    assert mask.shape == shape and (mask.flatten(1).sum(1) == k).all()
    again, other = (constant_fan_in_masks(weights, {"a": density, "b": 0.5}, seed=seed)["a"] for seed in (1, 2))
    assert torch.equal(mask, again) and (density == 1 or not torch.equal(mask, other))


@pytest.mark.parametrize("s", [0.1, 0.3, 0.8, 0.9, 0.95, 0.99])
def test_rounding_in_a_sparsity_costs_no_connection(s):
    mask = constant_fan_in_masks({"a": torch.empty(7, 1000)}, 1 - s, seed=0)["a"]
    assert (mask.sum(1) == round(1000 * (1 - s))).all()


def test_columns_are_drawn_equally_often():
    mask = constant_fan_in_masks({"a": torch.empty(20000, 10)}, 0.3, seed=0)["a"]
    assert torch.allclose(mask.float().mean(0), torch.tensor(0.3), atol=0.015)


def test_the_budget_is_that_of_the_density_or_of_the_start():
    """Of 5 x 7 weights a density of 0.5 gives 17: three to a row, and as many as 17 to those that stay."""
    linear = nn.Linear(7, 5)
    masks = constant_fan_in_masks({"weight": linear.weight}, 0.5, seed=0)
    for densities, budget in ((None, 15), (0.5, 17), ({"weight": 0.6, "other": 1}, 21)):
        topology = Topology(linear, masks, Rewiring("srigl", 1, densities=densities), steps=10, seed=0)
        assert topology.budgets == {"weight": budget}


def test_the_last_layer_is_not_ablated_unless_asked():
    model, masks = model_and_masks("linear", "srigl")
    assert Topology(model, masks, Rewiring("srigl", 1), steps=9, seed=0).unablated == ["head.weight"]
    del masks["head.weight"]
    assert Topology(model, masks, Rewiring("srigl", 1), steps=9, seed=0).unablated == ["head.weight"]
    chosen = ("fc1.weight",)
    assert Topology(model, masks, Rewiring("srigl", 1, unablated=chosen), steps=9, seed=0).unablated == chosen


def ablated(unablated):
    """Which layers lose neurons when the gradients of half of each are 0."""
    model, masks = model_and_masks("linear", "srigl")
    topology = Topology(model, masks, Rewiring("srigl", fraction=1.0, unablated=unablated, **ALWAYS), steps=99, seed=0)
    for name in masks:
        p = model.get_parameter(name)
        p.grad = torch.zeros_like(p)
        p.grad[: len(p) // 2] = 1 + torch.rand(len(p) // 2, *p.shape[1:])
    topology.rewire(1)
    return {name for name, mask in topology.masks.items() if not mask.any(1).all()}


def test_layers_that_keep_their_neurons():
    assert ablated(None) == {"fc1.weight", "fc2.weight"} and ablated(("fc2.weight",)) == {"fc1.weight", "head.weight"}
    assert ablated(()) == {"fc1.weight", "fc2.weight", "head.weight"}


CASES = [("masks", "set"), ("masks", "rigl"), ("masks", "srigl"), ("fan-in", "set"), ("fan-in", "srigl")]
X, Y = torch.randn(90, 20, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 12


def network(kind, density=0.2):
    """A network and its masks, or one with FanInLinear layers and none."""
    masked, masks, condensed = twins(density=density)
    return (masked.float(), masks) if kind == "masks" else (condensed.float(), None)


def train(model, topology, optimizer, batches, scaler=None, parts=1, clip=False, network=None):
    """A loop such as anybody's; what comes out."""
    for batch in batches:
        for part in batch.tensor_split(parts):
            loss = F.cross_entropy((network or model)(X[part]), Y[part]) * (len(part) / len(batch))
            (scaler.scale(loss) if scaler else loss).backward()
        if clip:
            scaler.unscale_(optimizer) if scaler else None
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        topology.step(optimizer, *[scaler] * bool(scaler))
        scaler.update() if scaler else None
        optimizer.zero_grad()
    return model.state_dict() | {f"mask of {name}": mask for name, mask in topology.masks.items()} | topology.fan_in


def shuffled(epochs, seed=3):
    order = torch.Generator().manual_seed(seed)
    return [batch for _ in range(epochs) for batch in torch.randperm(90, generator=order).split(20)]


def assert_same(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("sparse_opt", [False, True])
@pytest.mark.parametrize("kind, method", CASES)
def test_steps_in_a_loop_of_ones_own_are_those_of_fit_to_the_bit(kind, method, optimizer, sparse_opt, parts):
    recipe = Recipe(6, lr=0.02, batch_size=20, schedule="constant", optimizer=optimizer, accumulate=parts,
                    sparse_opt=sparse_opt)
    rewiring = Rewiring(method, every=3, until=0.9, fraction=0.5, min_salient=0.6 if method == "srigl" else None)
    trained, masks = network(kind)
    run = fit(trained, (X, Y), recipe, seed=3, masks=masks, rewiring=rewiring, description=None)
    model, masks = network(kind)
    optimize = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](
        model.parameters(), 0.02, weight_decay=5e-4, fused=True,
        **{"momentum": 0.9} if optimizer == "sgd" else {"betas": (0.9, 0.999)})
    topology = Topology(model, masks, rewiring, steps=30, seed=3)
    if sparse_opt:
        scale_gradients(optimize, model, topology.masks)
    train(model, topology, optimize, shuffled(6), parts=parts)
    assert_same(model.state_dict(), run.state)
    assert_same(topology.fan_in, run.fan_in)
    assert_same(topology.masks, run.masks or {})
    assert topology.done == 30 and len(topology.fan_in["0.weight"]) == 9
    start = network("masks")[1]["0.weight"]
    assert not torch.equal(topology.masks["0.weight"] if kind == "masks" else model[0].mask(), start)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind, method", CASES)
def test_a_scaler_changes_no_bit(kind, method, clip):
    """It multiplies by a power of 2, also what FanInLinear layers keep for their growth scores."""
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0 ** 10, growth_interval=7)):
        model, masks = network(kind)
        topology = Topology(model, masks, Rewiring(method, every=4, until=1.0), steps=25)
        ends.append(train(model, topology, sgd(model), shuffled(5), scaler, parts=2, clip=clip))
    assert_same(*ends)
    assert scaler.get_scale() == 2.0 ** 13


@pytest.mark.parametrize("kind, method", CASES)
def test_connections_wait_for_gradients_that_are_finite(kind, method):
    """The second batch, which is due to rewire, overflows, and so does the fourth, which is not."""
    model, masks = network(kind)
    topology, optimizer = Topology(model, masks, Rewiring(method, every=2, until=1.0), steps=20), sgd(model)
    scaler, history = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for poison in (1.0, float("inf"), 1.0, float("inf"), 1.0):
        before = copy.deepcopy(model.state_dict())
        scaler.scale(F.cross_entropy(model(X), Y) * poison).backward()
        topology.step(optimizer, scaler)
        scaler.update()
        optimizer.zero_grad()
        skipped = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        history.append((topology.done, len(topology.fan_in["0.weight"]) - 1, skipped))
    # Steps and rewirings so far; the fourth batch is skipped as the scaler does, and the fifth is step 4.
    assert history[:4] == [(1, 0, False), (1, 0, True), (2, 1, False), (3, 1, True)] and history[4][:2] == (4, 2)
    assert scaler.get_scale() == 1.0 and all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("kind", ["masks", "fan-in"])
def test_a_batch_that_was_given_up_does_not_count(kind):
    ends = []
    for disturb in (False, True):
        model, masks = network(kind)
        topology, optimizer = Topology(model, masks, Rewiring("srigl", every=1, until=1.0), steps=9), sgd(model)
        if disturb:
            F.cross_entropy(model(X * 9), Y).backward()
            optimizer.zero_grad()
            with torch.no_grad():
                model(X)
            copied = copy.deepcopy(model)
            F.cross_entropy(copied(X * 9), Y).backward()
            model(X * 9)  # without a backward pass
        ends.append(train(model, topology, optimizer, shuffled(1)))
    assert_same(*ends)


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)  # pytest's monkeypatch would delete the setting
def test_a_compiled_network_that_sees_hooks_is_rewired_as_the_network_itself():
    ends = []
    for compiled in (False, True):
        model, _ = network("fan-in")
        network_of = torch.compile(model, backend="eager") if compiled else model
        topology = Topology(model, None, Rewiring("srigl", every=3, until=1.0), steps=10)
        ends.append(train(model, topology, sgd(model), shuffled(2), network=network_of))
    assert_same(*ends)


def test_layers_are_watched_in_the_steps_that_rewire_alone_and_as_long_as_there_is_a_topology():
    model, _ = network("fan-in")
    topology, optimizer, watched = Topology(model, None, Rewiring("srigl", every=3), steps=12), sgd(model), []
    for batch in shuffled(2):
        watched.append(bool(model[0]._forward_hooks))
        train(model, topology, optimizer, [batch])
    assert watched == [i in (3, 6) for i in range(1, 11)] and not topology.layers["0.weight"].caught
    topology = Topology(model, None, Rewiring("srigl", every=1), steps=12)
    assert model[0]._forward_hooks
    del topology
    gc.collect()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize("kind", ["masks", "fan-in"])
def test_a_topology_that_is_restored_goes_on_to_the_same_bits(kind):
    rewiring, batches = Rewiring("srigl", every=2, until=1.0), shuffled(2)
    model, masks = network(kind)
    whole = train(model, Topology(model, masks, rewiring, steps=10), torch.optim.SGD(model.parameters(), 0.1), batches)
    model, masks = network(kind)
    first = Topology(model, masks, rewiring, steps=10)
    train(model, first, torch.optim.SGD(model.parameters(), 0.1), batches[:5])
    again, masks = network(kind)
    second = Topology(again, masks, rewiring, steps=10)
    again.load_state_dict(model.state_dict())
    second.restore(first.masks, first.fan_in, first.done)
    assert_same(train(again, second, torch.optim.SGD(again.parameters(), 0.1), batches[5:]), whole)


def test_integers_and_numbers_of_numpy_are_taken_as_plain_ones():
    rewiring = Rewiring("srigl", np.int64(2), np.float64(0.5), np.float64(0.25), np.float64(0.5))
    assert rewiring == Rewiring("srigl", 2, 0.5, 0.25, 0.5)
    assert all(type(value) in (int, float) for value in (rewiring.every, rewiring.until, rewiring.min_salient))
    model, masks = model_and_masks("linear", "srigl")
    topology = Topology(model, masks, rewiring, steps=np.int64(10), seed=np.int64(3))
    assert topology.due(2) and type(topology.steps) is int
    one, two = (constant_fan_in_masks({"a": torch.empty(5, 9)}, density, seed=seed)["a"]
                for density, seed in ((0.5, 1), (np.float32(0.5), np.int64(1))))
    assert torch.equal(one, two)
    for name, value in (("every", True), ("fraction", True)):
        with pytest.raises(ValueError, match=f"{name} is True"):
            Rewiring("set", **{name: value})


@pytest.mark.parametrize("options, message", [
    ({"method": "deepr"}, "method is 'deepr': expected one of set, rigl, srigl"), ({"method": None}, "method is None"),
    ({"every": 0}, "every is 0: expected an integer of at least 1"), ({"every": 2.5}, "every is 2.5"),
    ({"until": 0}, "until is 0: expected a number in (0, 1]"), ({"until": 1.1}, "until is 1.1"),
    ({"fraction": 0}, "fraction is 0"), ({"fraction": 1.5}, "fraction is 1.5"),
    ({"fraction": "0.3"}, "fraction is '0.3'"), ({"min_salient": 2}, "min_salient is 2"),
    ({"min_salient": 0}, "min_salient is 0: expected a number in (0, 1] or None"),
    ({"unablated": "head.weight"}, "unablated is 'head.weight': expected names of layers"),
    ({"method": "rigl", "unablated": ()}, "unablated is () with method 'rigl': only 'srigl' uses it"),
    ({"method": "set", "densities": 0.1}, "densities is 0.1 with method 'set'"),
    ({"shared": 0}, "shared is 0: expected an integer of at least 1"),
    ({"method": "rigl", "shared": 2}, "shared is 2 with method 'rigl': only 'set' and 'srigl' use it"),
])
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Rewiring(**{"method": "srigl", **options})


@pytest.mark.parametrize("options, message", [
    ({"densities": {"fc1.weight": 0.1}}, "density of 'fc2.weight' is None: expected a number in (0, 1]"),
    ({"densities": 0}, "density of 'fc1.weight' is 0"), ({"densities": 1.2}, "density of 'fc1.weight' is 1.2"),
    ({"unablated": ["fc1"]}, "unablated names 'fc1': expected some of fc1.weight, fc2.weight, head.weight"),
])
def test_layers_that_are_not_there_are_refused(options, message):
    model, masks = model_and_masks("linear", "srigl")
    with pytest.raises(ValueError, match=re.escape(message)):
        Topology(model, masks, Rewiring("srigl", **options), steps=10, seed=0)


def test_what_cannot_be_rewired_is_refused():
    model, masks = model_and_masks("linear", "rigl")
    *_, condensed = twins()
    with pytest.raises(ValueError, match="no layer to rewire: expected masks, or a model with fan-in layers"):
        Topology(model, None, Rewiring("rigl"), steps=10, seed=0)
    with pytest.raises(ValueError, match="'0.weight' is a FanInLinear: RigL gives neurons different numbers"):
        Topology(condensed, None, Rewiring("rigl"), steps=10, seed=0)
    with pytest.raises(ValueError, match=r"mask 'fc1.weight' has shape \[1\]"):
        Topology(model, masks | {"fc1.weight": torch.ones(1).bool()}, Rewiring("rigl"), steps=10, seed=0)
    for density in (0, 1.5, "0.5", None):
        with pytest.raises(ValueError, match=f"density of 'a' is {density!r}"):
            constant_fan_in_masks({"a": torch.empty(2, 3)}, density, seed=0)


def test_what_a_fan_in_layer_catches_is_of_one_step_and_is_let_go():
    layer = FanInLinear(3, 2, 1, bias=False)
    topology = Topology(layer, None, replace(Rewiring("srigl"), **ALWAYS), steps=10, seed=0)
    for step, x in ((1, [9.0, 0, 0]), (2, [0.0, 0, 2])):  # the first is given up before it rewires
        with topology.watching(step):
            layer(torch.tensor([x])).sum().backward()
    scores = topology.layers["weight"].scores
    assert torch.equal(scores(0, 2), torch.tensor([[0.0, 0, 2]] * 2)) and torch.equal(scores(1, 2), scores(0, 1))
    topology.rewire(2)
    assert not topology.layers["weight"].caught


@pytest.mark.parametrize("fan_in", [True, False])
def test_growth_without_gradients_is_refused(fan_in):
    masked, masks, condensed = twins()
    model, masks = (condensed, None) if fan_in else (masked, masks)
    topology = Topology(model, masks, replace(Rewiring("srigl"), **ALWAYS), steps=10, seed=0)
    with pytest.raises(RuntimeError, match=r"'0.weight' has no gradients for growth: .* step 4 after the last call"):
        topology.rewire(4)
    with pytest.raises(RuntimeError, match="zero_grad.. after these"):
        topology.step(torch.optim.SGD(model.parameters(), 0.1))


@pytest.mark.parametrize("fraction", [-0.3, 1.5, float("nan"), "0.3"])
def test_a_fraction_that_is_none_is_refused_by_every_step(fraction):
    layer, message = FanInLinear(9, 4, 3), "fraction is .*: expected a number in"
    linear = layer.to_dense()
    rows, columns = layer.mask().nonzero(as_tuple=True)
    active = Connections(rows, columns, linear.weight.detach()[rows, columns].abs(), (4, 9))
    calls = (lambda: set_step(active, fraction), lambda: set_rows_step(layer, fraction),
             lambda: rigl_step(active, None, fraction), lambda: srigl_step(active, None, fraction, 12))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    for budget, share, named in ((0, 0.3, "budget is 0"), (37, 0.3, "expected an integer from 1 to 36"),
                                 (12.0, 0.3, "budget is 12.0"), (12, 5, "min_salient is 5")):
        with pytest.raises(ValueError, match=named):
            srigl_step(active, None, 0.3, budget, share)


def test_connections_that_will_never_move_are_said():
    model = nn.Sequential(FanInLinear(9, 4, 3))
    with pytest.warns(UserWarning, match="every 100 steps ends before step 60 of 80"):
        Topology(model, None, Rewiring("srigl"), steps=80, seed=0)
    with pytest.warns(UserWarning, match="connections of '0.weight' will not move: a fraction of 0.3"):
        Topology(model, None, Rewiring("set", 1), steps=80, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Topology(model, None, Rewiring("set", 1, fraction=0.4), steps=80, seed=0)
    with pytest.raises(ValueError, match="steps is 0"):
        Topology(model, None, Rewiring("set", 1), steps=0, seed=0)
