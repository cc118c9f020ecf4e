"""Sparse initialisation by its moments, and gradient flow against finite differences and a loop."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from permask_core.masks import apply_masks
from permask_core.models import build_model
from permask_core.pruning import random_masks
from permask_core.sparse.initialisation import gradient_flow, scale_to_fan_in, sparse_init


@pytest.mark.parametrize("make", [lambda: nn.Linear(400, 300), lambda: nn.Conv2d(50, 300, (2, 4))])
def test_each_row_has_the_variance_of_its_own_fan_in(make):
    layer = make()
    mask = torch.rand(layer.weight.shape) < torch.linspace(0.05, 1, 300).view(300, *[1] * (layer.weight.ndim - 1))
    mask[0] = False
    bias = layer.bias.detach().clone()
    assert sparse_init(layer, {"weight": mask}, seed=0) is layer
    weight, fan_in = layer.weight.detach().flatten(1), mask.flatten(1).sum(1)
    assert (weight[~mask.flatten(1)] == 0).all() and (weight[mask.flatten(1)] != 0).all()
    assert (weight[0] == 0).all() and torch.equal(layer.bias, bias)
    standard = (weight * (fan_in / 2).sqrt()[:, None])[mask.flatten(1)]  # of all rows standard normal
    assert len(standard) > 50_000
    assert abs(standard.mean()) < 0.02 and standard.var() == pytest.approx(1, abs=0.02)
    few, many = ((weight[rows].square().sum(1)).mean() for rows in (slice(1, 100), slice(200, 300)))
    assert few == pytest.approx(2, rel=0.1) and many == pytest.approx(2, rel=0.1)


def test_a_full_mask_gives_he_initialisation():
    layer, he = nn.Conv2d(20, 200, 3), nn.Conv2d(20, 200, 3)
    sparse_init(layer, {"weight": torch.ones_like(layer.weight, dtype=torch.bool)}, seed=0)
    nn.init.kaiming_normal_(he.weight, nonlinearity="relu")
    assert layer.weight.std().item() == pytest.approx(he.weight.std().item(), rel=0.02)
    assert layer.weight.std().item() == pytest.approx((2 / 180) ** 0.5, rel=0.01)


def test_the_seed_decides_and_tensors_without_a_mask_stay():
    model = build_model("mlp", (1, 8, 8), 10, width=0.2, seed=0)
    masks = random_masks({"fc1.weight": model.fc1.weight}, 0.2, seed=0)
    runs = [copy.deepcopy(sparse_init(copy.deepcopy(model), masks, seed=seed).state_dict()) for seed in (1, 1, 2)]
    assert torch.equal(runs[0]["fc1.weight"], runs[1]["fc1.weight"])
    assert not torch.equal(runs[0]["fc1.weight"], runs[2]["fc1.weight"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(runs[0][name], tensor) == (name != "fc1.weight")


@pytest.mark.parametrize("make", [lambda: nn.Linear(400, 300), lambda: nn.Conv2d(50, 300, (2, 4))])
def test_scaled_weights_are_those_that_would_have_been_drawn(make):
    """He's initialisation, scaled to the connections of a mask, is what sparse_init draws from the same seed."""
    dense, sparse = make(), make()
    sparse.load_state_dict(dense.state_dict())
    mask = torch.rand(dense.weight.shape) < torch.linspace(0.05, 1, 300).view(300, *[1] * (dense.weight.ndim - 1))
    mask[0] = False
    sparse_init(dense, {"weight": torch.ones_like(mask)}, seed=0)
    assert scale_to_fan_in(dense, {"weight": mask}) is dense
    assert torch.equal(dense.bias, sparse.bias)
    apply_masks(dense, {"weight": mask})
    sparse_init(sparse, {"weight": mask}, seed=0)
    torch.testing.assert_close(dense.weight, sparse.weight)


def test_a_full_mask_scales_nothing():
    model = build_model("mlp", (1, 8, 8), 10, width=0.2, seed=0)
    before = copy.deepcopy(model.state_dict())
    scale_to_fan_in(model, {"fc1.weight": torch.ones_like(model.fc1.weight, dtype=torch.bool)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def loss(model, x, y):
    return F.cross_entropy(model(x), y)


def sparse_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double()
    masks = random_masks({name: model.state_dict()[name] for name in ("0.weight", "4.weight")}, 0.5, seed=0)
    return model, masks, torch.randn(20, 1, 4, 4).double(), torch.arange(20) % 4


def test_gradient_flow_is_what_a_step_gains_over_its_learning_rate():
    model, masks, x, y = sparse_network()
    flow = gradient_flow(model, masks, x, y)
    stepped = apply_masks(copy.deepcopy(model), masks)
    before, lr = loss(stepped, x, y), 1e-6
    before.backward()
    with torch.no_grad():
        for name, p in stepped.named_parameters():
            p -= lr * (p.grad * masks[name] if name in masks else p.grad)
    assert ((before - loss(stepped, x, y)) / lr).item() == pytest.approx(flow, rel=1e-4)


def test_masked_weights_are_left_out_and_the_model_alone():
    model, masks, x, y = sparse_network()
    before = copy.deepcopy(model.state_dict())
    flow = gradient_flow(model, masks, x, y)
    full = {name: torch.ones_like(mask) for name, mask in masks.items()}
    assert 0 < flow < gradient_flow(apply_masks(copy.deepcopy(model), masks), full, x, y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # statistics, too
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert gradient_flow(model.eval(), masks, x, y) != flow


def test_sparse_initialisation_lets_more_gradient_through_than_a_dense_one():
    """At 95 % in a network of eight layers; the dense one leaves next to nothing."""
    x, y = torch.randn(100, 1, 8, 8), torch.arange(100) % 10
    flows = {"dense": [], "sparse": []}
    for seed in range(3):
        model = build_model("mlp", (1, 8, 8), 10, depth=8, seed=seed)
        weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
        masks = random_masks(weights, 0.05, seed=seed)
        full = {name: torch.ones_like(mask) for name, mask in masks.items()}
        flows["dense"].append(gradient_flow(sparse_init(copy.deepcopy(model), full, seed=seed), masks, x, y))
        flows["sparse"].append(gradient_flow(sparse_init(model, masks, seed=seed), masks, x, y))
    assert min(flows["sparse"]) > 2 * max(flows["dense"])


def test_masks_that_do_not_fit_are_refused():
    model, masks, x, y = sparse_network()
    for use in (lambda masks: sparse_init(model, masks, seed=0), lambda masks: scale_to_fan_in(model, masks),
                lambda masks: gradient_flow(model, masks, x, y)):
        with pytest.raises(ValueError, match=re.escape("masks has '9.weight' of shape [2], which is not in the model")):
            use(masks | {"9.weight": torch.ones(2, dtype=torch.bool)})
