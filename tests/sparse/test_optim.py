"""SparseOpt against its formula, where it does nothing, and what Adam makes of it."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permask_core.masks import apply_masks
from permask_core.sparse.dynamic import constant_fan_in_masks
from permask_core.sparse.optim import SparseOpt, row_factors


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
    optimizer = SparseOpt(optimizer, model, own if masks is None else masks) if masks != {} else optimizer
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
    optimizer = SparseOpt(torch.optim.SGD(linear.parameters(), 1.0), linear, masks)

    def step():
        before, linear.weight.grad = linear.weight.detach().clone(), torch.ones(2, 4)
        optimizer.step()
        return (before - linear.weight).detach()

    torch.testing.assert_close(step(), torch.ones(2, 4))
    masks["weight"][1, 1:] = False
    expected = torch.tensor([[1.6 ** 0.5], [0.4 ** 0.5]]).expand(2, 4)  # 4 and 1 of 5 connections
    torch.testing.assert_close(step(), expected)


def test_everything_else_is_the_optimizers():
    model, masks, x, y = uneven()
    inner = sgd(model.parameters())
    optimizer = SparseOpt(inner, model, masks)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state and len(inner.state) == 4
    other = SparseOpt(sgd(model.parameters()), model, masks)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[model[0].weight]["momentum_buffer"], inner.state[model[0].weight]["momentum_buffer"])
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    optimizer.step()  # without gradients, nothing to scale
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_masks_that_do_not_fit_are_refused():
    model, masks, *_ = uneven()
    with pytest.raises(ValueError, match=re.escape("mask '3.weight' has shape [1], its tensor [5, 24]")):
        SparseOpt(sgd(model.parameters()), model, masks | {"3.weight": torch.ones(1, dtype=torch.bool)})


def test_masks_that_are_none_are_refused_when_it_is_made():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="masks are NoneType"):
        SparseOpt(torch.optim.SGD(model.parameters(), 0.1), model, None)


def test_a_scheduler_of_the_optimizer_inside_changes_its_learning_rate():
    model = nn.Linear(3, 2)
    wrapped = SparseOpt(torch.optim.SGD(model.parameters(), 0.1), model, {})
    scheduler = torch.optim.lr_scheduler.StepLR(wrapped.optimizer, 1, 0.5)
    model(torch.ones(1, 3)).sum().backward()
    wrapped.step()
    scheduler.step()
    assert wrapped.param_groups[0]["lr"] == 0.05
