"""SparseOpt against its formula, where it does nothing, and what Adam makes of it."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permask_core.masks import apply_masks
from permask_core.sparse import FanInLinear
from permask_core.sparse.dynamic import Rewiring, Topology, constant_fan_in_masks
from permask_core.sparse.optim import row_factors, scale_gradients


def by_hand(mask):
    """sqrt(1 - s_i) / sqrt(1 - s), row by row."""
    sparsities = [sum(not kept for kept in row) / len(row) for row in mask.flatten(1).tolist()]
    average = sum(sparsities) / len(sparsities)
    return [math.sqrt(1 - s) / math.sqrt(1 - average) for s in sparsities]


@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 3, 3)])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_factors_are_the_formula(shape, density):
    mask = torch.rand(shape) < density
    mask[0] = True
    assert row_factors(mask).tolist() == pytest.approx(by_hand(mask), rel=1e-12)


@pytest.mark.parametrize("k, n_in, n_out", [(1, 3, 7), (3, 3, 5), (7, 49, 11), (29, 1000, 13)])
def test_equal_rows_have_the_factor_1_to_the_bit(k, n_in, n_out):
    mask = constant_fan_in_masks({"a": torch.empty(n_out, n_in)}, k / n_in, seed=0)["a"]
    assert mask.sum() == k * n_out and (row_factors(mask) == 1).all()


def test_a_layer_without_connections_divides_by_nothing():
    assert row_factors(torch.zeros(3, 4, dtype=torch.bool)).tolist() == [0, 0, 0]
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0] = True
    assert row_factors(mask).tolist() == pytest.approx([math.sqrt(2), 0])


def uneven():
    """A network, masks whose rows differ (and one that is full), and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).double()
    mask = torch.rand(6, 1, 3, 3) < torch.linspace(0.2, 1, 6).view(6, 1, 1, 1)
    mask[:, :, 0, 0] = True
    masks = {"0.weight": mask, "3.weight": torch.ones(5, 24, dtype=torch.bool)}
    return apply_masks(model, masks), masks, torch.randn(30, 1, 4, 4).double(), torch.arange(30) % 5


def trained(make, masks=None, steps=8):
    model, own, x, y = uneven()
    optimizer = make(model.parameters())
    if masks != {}:
        scale_gradients(optimizer, model, own if masks is None else masks)
    start = copy.deepcopy(model)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        apply_masks(model, own)
    return start, model


def sgd(weights):
    return torch.optim.SGD(weights, 0.1, 0.9)


def adam(weights):
    return torch.optim.Adam(weights, 0.01)


def test_a_step_of_sgd_moves_each_row_by_its_factor():
    (start, plain), (_, scaled) = trained(sgd, {}, 1), trained(sgd, None, 1)
    mask = uneven()[1]["0.weight"]
    moved, own = ((model[0].weight - start[0].weight)[mask] for model in (plain, scaled))
    factors = torch.tensor(by_hand(mask), dtype=torch.float64).view(6, 1, 1, 1).expand_as(mask)[mask]
    torch.testing.assert_close(own, moved * factors, atol=1e-14, rtol=1e-12)
    assert factors.min() < 0.8 and factors.max() > 1.1
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, scaled.state_dict()[name]) == (name != "0.weight")  # biases, and the full mask


def test_dense_layers_and_constant_fan_in_train_as_without():
    masks = {name: torch.ones_like(mask) for name, mask in uneven()[1].items()}
    for given in (masks, constant_fan_in_masks(masks, 0.5, seed=0)):
        (_, plain), (_, scaled) = trained(sgd, {}), trained(sgd, given)
        assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), scaled.parameters()))


def test_adam_nearly_cancels_a_factor_that_stays():
    """Its step is a gradient over the gradient's own size: only the small number that it adds there is not scaled."""
    changes = {}
    for make in (sgd, adam):
        (start, plain), (_, scaled) = trained(make, {}), trained(make)
        path = (plain[0].weight - start[0].weight).norm()
        changes[make] = ((scaled[0].weight - plain[0].weight).norm() / path).item()
    assert changes[sgd] > 0.1 and changes[adam] < 1e-4


def test_masks_changed_in_place_count_at_the_next_step():
    linear = nn.Linear(4, 2, bias=False)
    masks = {"weight": torch.ones(2, 4, dtype=torch.bool)}
    optimizer = torch.optim.SGD(linear.parameters(), 1.0)
    scale_gradients(optimizer, linear, masks)

    def step():
        before, linear.weight.grad = linear.weight.detach().clone(), torch.ones(2, 4)
        optimizer.step()
        return (before - linear.weight).detach()

    torch.testing.assert_close(step(), torch.ones(2, 4))
    masks["weight"][1, 1:] = False
    expected = torch.tensor([[1.6 ** 0.5], [0.4 ** 0.5]]).expand(2, 4)  # 4 and 1 of 5 connections
    torch.testing.assert_close(step(), expected)


def test_the_optimizer_is_itself_and_forgets_the_scaling_when_it_is_removed():
    (_, plain), (model, masks, x, y) = trained(sgd, {}), uneven()
    optimizer = sgd(model.parameters())
    handle = scale_gradients(optimizer, model, masks)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()  # without gradients, nothing to scale
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    handle.remove()
    optimizer.param_groups[0]["lr"] = 0.1
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        apply_masks(model, masks)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), model.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_unscales_first_or_in_the_step_changes_no_bit(fused):
    ends = []
    for way in ("none", "step", "before"):
        model, masks, x, y = uneven()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=fused)
        scale_gradients(optimizer, model, masks)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=way != "none")
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if way == "before":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            apply_masks(model, masks)
        ends.append(model)
    for other in ends[1:]:
        assert all(torch.equal(one, two) for one, two in zip(ends[0].parameters(), other.parameters()))


def test_fan_in_layers_are_scaled_as_under_their_mask_also_where_connections_move():
    """In float64; SRigL ablates neurons, and so its rows differ."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 12)).double()
    masks = constant_fan_in_masks({name: p for name, p in dense.named_parameters() if p.ndim > 1}, 0.2, seed=0)
    layers = nn.Sequential(FanInLinear.from_dense(dense[0], masks["0.weight"]), nn.ReLU(),
                           FanInLinear.from_dense(dense[2], masks["2.weight"]))
    x, y = torch.randn(40, 20).double(), torch.arange(40) % 12
    for model, given in ((dense, masks), (layers, None)):
        optimizer = sgd(model.parameters())
        topology = Topology(model, given, Rewiring("srigl", every=3, until=1.0, min_salient=0.9), steps=20)
        scale_gradients(optimizer, model, topology.masks)
        for _ in range(20):
            F.cross_entropy(model(x), y).backward()
            topology.step(optimizer)
            optimizer.zero_grad()
    assert layers[0].n_active < 30
    for i in (0, 2):
        torch.testing.assert_close(layers[i].to_dense().weight, dense[i].weight, rtol=1e-9, atol=1e-9)


def test_masks_that_do_not_fit_are_refused():
    model, masks, *_ = uneven()
    with pytest.raises(ValueError, match=re.escape("mask '3.weight' has shape [1]: expected [5, 24]")):
        scale_gradients(sgd(model.parameters()), model, masks | {"3.weight": torch.ones(1, dtype=torch.bool)})
