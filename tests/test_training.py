"""Training against a loop written out by hand, and evaluation against scikit-learn."""

import math
import re

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.nn import functional as F

from permask_core.masks import apply_masks, sparsity
from permask_core.models import build_model
from permask_core.pruning import magnitude_masks
from permask_core.training import Recipe, checkpoint_step, evaluate, fit

RECIPE = Recipe(epochs=2, lr=0.2, momentum=0.8, weight_decay=1e-2, batch_size=100)


@pytest.fixture
def net():
    return build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3)


@pytest.fixture
def masks(net):
    return magnitude_masks(net.state_dict(), 0.7)


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_hand(model, train, recipe, seed, masks, cosine):
    """Sutskever's momentum with the decay added to the gradient, a cosine over all steps, the mask after each."""
    order, velocity, losses = torch.Generator().manual_seed(seed), {}, []
    steps, step = recipe.epochs * math.ceil(len(train.y) / recipe.batch_size), 0
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name] *= mask
    for _ in range(recipe.epochs):
        indices, total = torch.randperm(len(train.y), generator=order), 0
        for start in range(0, len(indices), recipe.batch_size):
            batch = indices[start : start + recipe.batch_size]
            loss = -F.log_softmax(model(train.x[batch]), 1)[range(len(batch)), train.y[batch]].mean()
            gradients = torch.autograd.grad(loss, list(weights.values()))
            lr = recipe.lr * (0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1)
            with torch.no_grad():
                for (name, weight), gradient in zip(weights.items(), gradients):
                    gradient = gradient + recipe.weight_decay * weight
                    velocity[name] = recipe.momentum * velocity[name] + gradient if name in velocity else gradient
                    weight -= lr * velocity[name]
                    if name in masks:
                        weight *= masks[name]
            total, step = total + loss.item() * len(batch), step + 1
        losses.append(total / len(indices))
    return losses


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_fit_is_the_loop_written_out(digits, net, masks, cosine, masked):
    masks = masks if masked else {}
    recipe = Recipe(2, 0.2, 0.8, 1e-2, 100, "cosine" if cosine else "constant")
    reference = build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3)
    losses = by_hand(reference, digits.train, recipe, 7, masks, cosine)
    run = fit(net, digits.train, recipe, seed=7, masks=masks or None)
    assert run.losses == pytest.approx(losses, rel=1e-4) and run.losses[1] < run.losses[0]
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(run.state[name], tensor, atol=1e-4, rtol=1e-3)
        assert torch.equal(net.state_dict()[name], run.state[name])


def test_masks_hold_after_every_step(digits, net, masks):
    steps = [f"step {i}" for i in range(31)]
    run = fit(net, digits.train, RECIPE, seed=0, masks=masks, checkpoints=steps)
    for name in steps:
        assert all((run.checkpoints[name][key][~mask] == 0).all() for key, mask in masks.items())
    assert all((run.state[key][mask] != 0).all() for key, mask in masks.items())
    assert sparsity(masks) == pytest.approx(0.7, abs=1e-3)


def test_weights_that_are_not_finite_do_not_come_through_a_mask(digits, net, masks):
    with torch.no_grad():
        net.fc1.weight[~masks["fc1.weight"]] = float("nan")
    run = fit(net, digits.train, RECIPE, seed=0, masks=masks)
    assert all(tensor.isfinite().all() for tensor in run.state.values())


def test_checkpoints_are_the_states_on_the_way(digits, net):
    start = copied(net)
    names = ["init", "step 0", "epoch 0", "step 15", "epoch 1", "epoch 2"]
    run = fit(net, digits.train, RECIPE, seed=0, checkpoints=names)
    assert list(run.checkpoints) == names
    for name in ("init", "step 0", "epoch 0"):
        assert same(run.checkpoints[name], start)
    assert math.ceil(len(digits.train.y) / 100) == 15
    assert same(run.checkpoints["step 15"], run.checkpoints["epoch 1"])
    assert same(run.checkpoints["epoch 2"], run.state) and not same(run.state, run.checkpoints["epoch 1"])
    assert not same(run.checkpoints["epoch 1"], start)


def test_init_is_masked_under_masks(digits, net, masks):
    start = copied(net)
    run = fit(net, digits.train, RECIPE, seed=0, masks=masks, checkpoints=["init"])
    assert same(run.checkpoints["init"], apply_masks(start, masks))


def test_a_schedule_follows_all_epochs_so_a_run_cannot_be_continued_by_a_shorter_one(digits, net):
    run = fit(net, digits.train, RECIPE, seed=0, checkpoints=["epoch 1"])
    other = build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3)
    assert not same(fit(other, digits.train, Recipe(1, 0.2, 0.8, 1e-2, 100), seed=0).state, run.checkpoints["epoch 1"])


def with_dropout(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def test_the_seed_decides_to_the_bit_and_the_global_random_state_stays(digits):
    runs = []
    for seed, disturb in ((1, 5), (1, 6), (2, 5)):
        model = with_dropout()
        torch.manual_seed(disturb)
        random_state = torch.get_rng_state()
        runs.append(fit(model, digits.train, RECIPE, seed=seed))
        assert torch.equal(torch.get_rng_state(), random_state)
    assert same(runs[0].state, runs[1].state) and runs[0].losses == runs[1].losses
    assert not same(runs[0].state, runs[2].state)


def test_the_order_of_the_data_does_not_depend_on_masks(digits, net, masks):
    def batches(seed, masks):
        seen = []
        hook = net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        fit(net, digits.train, RECIPE, seed=seed, masks=masks)
        hook.remove()
        return seen

    dense, sparse, other = batches(0, None), batches(0, masks), batches(1, None)
    assert [len(batch) for batch in dense] == ([100] * 14 + [37]) * 2
    assert all(torch.equal(one, two) for one, two in zip(dense, sparse))
    assert not torch.equal(dense[0], other[0]) and not torch.equal(dense[0], dense[15])
    for epoch in (dense[:15], dense[15:]):  # each image once
        assert sorted(torch.cat(epoch).flatten(1).tolist()) == sorted(digits.train.x.flatten(1).tolist())


def test_a_run_that_diverges_raises(digits, net):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) in epoch \d: try .* than 1000000.0"):
        fit(net, digits.train, Recipe(3, lr=1e6), seed=0)


@pytest.mark.parametrize("options, message", [
    ({"checkpoints": ["epoch 3"]}, "checkpoint 'epoch 3' lies behind the end: the run has 2 epochs of 15 steps"),
    ({"checkpoints": ["step 31"]}, "checkpoint 'step 31' lies behind the end"),
    ({"checkpoints": ["init", "last"]}, "unknown checkpoint 'last': expected 'init', 'epoch K' or 'step K'"),
    ({"checkpoints": ["epoch -1"]}, "unknown checkpoint 'epoch -1'"),
    ({"checkpoints": ["epoch"]}, "unknown checkpoint 'epoch'"),
    ({"masks": {"fc9.weight": torch.ones(1).bool()}}, "'fc9.weight' of shape [1] has no tensor"),
    ({"masks": {"fc1.weight": torch.ones(13, 63).bool()}}, "'fc1.weight' has shape [13, 63], its tensor [13, 64]"),
    ({"masks": {"fc1.weight": torch.ones(13, 64)}}, "'fc1.weight' is torch.float32"),
    ({"masks": {}}, "masks are empty"),
])
def test_bad_arguments_are_refused_before_training(digits, net, options, message):
    start = copied(net)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(net, digits.train, RECIPE, seed=0, **options)
    assert same(copied(net), start)


def test_a_mask_on_a_statistic_is_refused_before_training(digits):
    model = with_dropout()
    start = copied(model)
    with pytest.raises(ValueError, match="2.running_mean"):
        fit(model, digits.train, RECIPE, seed=0, masks={"2.running_mean": torch.zeros(20).bool()})
    assert same(copied(model), start)


@pytest.mark.parametrize("inputs, labels, message", [
    (0, 0, "got 0 images: expected at least a batch of 100"), (105, 104, "got 105 inputs and 104 labels"),
    (99, 99, "got 99 images: expected at least a batch of 100")])
def test_data_that_do_not_fit_are_refused(digits, net, inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        fit(net, (digits.train.x[:inputs], digits.train.y[:labels]), RECIPE, seed=0)


@pytest.mark.parametrize("options, message", [
    ({"epochs": 0}, "epochs is 0"), ({"epochs": 2.0}, "epochs is 2.0"), ({"batch_size": 0}, "batch_size is 0"),
    ({"lr": 0}, "lr is 0: expected a number above 0"), ({"lr": float("nan")}, "lr is nan"),
    ({"momentum": 1}, "momentum is 1"), ({"schedule": ["cosine"]}, "schedule is ['cosine']"),
    ({"momentum": -0.1}, "momentum is -0.1"),
    ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
    ({"schedule": "linear"}, "schedule is 'linear': expected one of cosine, step, constant"),
    ({"lr": "0.1"}, "lr is '0.1'"), ({"momentum": None}, "momentum is None"), ({"lr": float("inf")}, "lr is inf"),
])
def test_bad_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**options)


def test_checkpoint_names():
    assert [checkpoint_step(name, 15) for name in ("init", "epoch 2", "step 7")] == [0, 30, 7]


def test_evaluation_is_scikit_learns(digits, trained):
    probabilities = trained(digits.test.x).detach().double().softmax(1).numpy()
    for batch_size in (360, 7):
        accuracy, loss = evaluate(trained, digits.test, batch_size=batch_size)
        assert accuracy == pytest.approx(accuracy_score(digits.test.y, probabilities.argmax(1)))
        assert loss == pytest.approx(log_loss(digits.test.y, probabilities), rel=1e-5)
    assert accuracy > 0.8


def test_evaluating_another_state_leaves_the_model(digits):
    model, other = with_dropout(0), with_dropout(1).state_dict()
    before = copied(model)
    own = evaluate(model, digits.test)
    assert evaluate(model, digits.test, state=other) == evaluate(with_dropout(1), digits.test) != own
    assert same(copied(model), before) and model.training


def test_an_empty_split_is_refused(trained, digits):
    with pytest.raises(ValueError, match="the split is empty"):
        evaluate(trained, (digits.test.x[:0], digits.test.y[:0]))


def test_a_last_step_that_breaks_the_weights_raises(digits, net):
    """One step: its loss is taken before it, and is finite."""
    data = digits.train.x * 1e18, digits.train.y
    recipe = Recipe(epochs=1, lr=1e30, batch_size=len(digits.train.y), schedule="constant")
    with pytest.raises(FloatingPointError, match="not finite after the last step"):
        fit(net, data, recipe, seed=0)
