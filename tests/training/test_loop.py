"""Training against loops written out by hand, runs killed and resumed, and evaluation against scikit-learn."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.nn import functional as F

from permask_core.data.splits import Split
from permask_core.masks import apply_masks, save_masks, sparsity
from permask_core.models import build_model
from permask_core.pruning import magnitude_masks
from permask_core.runs.files import load_tensors
from permask_core.sparse import FanInLinear
from permask_core.sparse.dynamic import METHODS, Rewiring, Topology, constant_fan_in_masks
from permask_core.sparse.optim import scale_gradients
from permask_core.training import loop
from permask_core.training.loop import evaluate, fit, predict
from permask_core.training.recipe import Recipe, checkpoint_step, learning_rate

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
    ({"checkpoints": ["epoch 3"]}, "checkpoint 'epoch 3' is after the end: the run has 2 epochs of 15 steps"),
    ({"checkpoints": ["step 31"]}, "checkpoint 'step 31' is after the end"),
    ({"checkpoints": ["init", "last"]}, "unknown checkpoint 'last': expected 'init', 'epoch K' or 'step K'"),
    ({"checkpoints": ["epoch -1"]}, "unknown checkpoint 'epoch -1'"),
    ({"checkpoints": ["epoch"]}, "unknown checkpoint 'epoch'"),
    ({"masks": {"fc9.weight": torch.ones(1).bool()}}, "'fc9.weight' of shape [1], which is not in the model"),
    ({"masks": {"fc1.weight": torch.ones(13, 63).bool()}}, "'fc1.weight' has shape [13, 63]: expected [13, 64]"),
    ({"masks": {"fc1.weight": torch.ones(13, 64)}}, "'fc1.weight' is torch.float32"),
    ({"masks": {}}, "masks are empty"),
    ({"processes": 0}, "processes is 0: expected an integer of at least 1"), ({"processes": 1.5}, "processes is 1.5"),
    ({"processes": "2"}, "processes is '2'"), ({"processes": None}, "processes is None"),
    ({"processes": 38}, "the last batch of an epoch has 37 examples: expected at least 38"),
    ({"seed": -1}, "seed is -1: expected an integer of at least 0"), ({"seed": 1.0}, "seed is 1.0"),
])
def test_bad_arguments_are_refused_before_training(digits, net, options, message):
    start = copied(net)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(net, digits.train, RECIPE, **{"seed": 0, **options})
    assert same(copied(net), start)


@pytest.mark.parametrize("images, accumulate, found", [(137, 38, 37), (1400, 101, 100), (100, 101, 100)])
def test_a_last_batch_with_fewer_images_than_parts_is_refused(digits, net, images, accumulate, found):
    data = digits.train.x[:images], digits.train.y[:images]
    with pytest.raises(ValueError, match=f"has {found} examples: expected at least {accumulate}, one for each of "
                                         f"1 processes x accumulate {accumulate}"):
        fit(net, data, replace(RECIPE, accumulate=accumulate), seed=0)
    assert len(fit(net, data, replace(RECIPE, accumulate=found), seed=0).losses) == 2


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
    ({"step_epochs": 0}, "step_epochs is 0"), ({"warmup": -1}, "warmup is -1"),
    ({"epochs": 5, "warmup": 5}, "warmup is 5: expected a number of epochs below epochs"),
    ({"label_smoothing": 1}, "label_smoothing is 1"), ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
    ({"optimizer": "adam"}, "optimizer is 'adam': expected one of sgd, adamw"),
    ({"sparse_opt": 1}, "sparse_opt is 1: expected True or False"),
    ({"accumulate": 0}, "accumulate is 0"), ({"accumulate": 1.5}, "accumulate is 1.5"),
    ({"precision": "float16"}, "precision is 'float16': expected one of float32, bf16"),
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
    with pytest.raises(ValueError, match="got a Split without batches|got a tuple without batches"):
        evaluate(trained, (digits.test.x[:0], digits.test.y[:0]))


def test_a_last_step_that_breaks_the_weights_raises(digits, net):
    """One step: its loss is taken before it, and is finite."""
    data = digits.train.x * 1e18, digits.train.y
    recipe = Recipe(epochs=1, lr=1e30, batch_size=len(digits.train.y), schedule="constant")
    with pytest.raises(FloatingPointError, match="not finite after the last step"):
        fit(net, data, recipe, seed=0)


def torchs_rates(recipe, steps_per_epoch):
    """The learning rates of torch's own schedules, one after the other."""
    optimizer = torch.optim.SGD([torch.zeros(1)], recipe.lr)
    made, rise = torch.optim.lr_scheduler, round(recipe.warmup * steps_per_epoch)
    steps = recipe.epochs * steps_per_epoch
    falls = range(recipe.step_epochs * steps_per_epoch, steps, recipe.step_epochs * steps_per_epoch)
    scheduler = {"cosine": lambda: made.CosineAnnealingLR(optimizer, steps - rise),
                 "step": lambda: made.MultiStepLR(optimizer, [step - rise for step in falls]),
                 "constant": lambda: made.ConstantLR(optimizer, 1)}[recipe.schedule]()
    if rise:
        warmup = made.LinearLR(optimizer, 1 / rise, total_iters=rise - 1)
        scheduler = made.SequentialLR(optimizer, [warmup, scheduler], [rise])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.6, 2])
@pytest.mark.parametrize("steps_per_epoch", [5, 15])
def test_learning_rates_are_torchs(schedule, warmup, steps_per_epoch):
    recipe = Recipe(epochs=7, lr=0.3, schedule=schedule, step_epochs=3, warmup=warmup)
    found = [learning_rate(recipe, step, steps_per_epoch) for step in range(7 * steps_per_epoch)]
    assert found == pytest.approx(torchs_rates(recipe, steps_per_epoch), rel=1e-9)
    assert max(found) == found[max(0, round(warmup * steps_per_epoch) - 1)] == 0.3


@pytest.mark.parametrize("warmup", [0.01, 0.5, 0.9, 1.3])
def test_a_warmup_that_ends_within_a_step_does_not_rise_above_the_peak(warmup):
    recipe = Recipe(epochs=2, lr=0.3, warmup=warmup, schedule="constant")
    found = [learning_rate(recipe, step, 15) for step in range(30)]
    assert found == pytest.approx([0.3 * min(1, (step + 1) / (15 * warmup)) for step in range(30)], rel=1e-12)
    assert max(found) == 0.3


def doubled(data, model):
    """The same in float64, where the order of sums does not show."""
    return replace(data, x=data.x.double()), model.double()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("masked", [True, False])
def test_fit_is_torchs_optimizer_with_smoothed_labels_and_warmup(digits, net, masks, optimizer, masked):
    recipe = Recipe(2, 0.01, 0.8, 1e-2, 100, "step", 1, 0.4, 0.2, optimizer)
    masks = masks if masked else {}
    (data, net), reference = doubled(digits.train, net), build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3).double()
    plain = {"sgd": lambda p: torch.optim.SGD(p, 0.01, 0.8, weight_decay=1e-2),
             "adamw": lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.999), weight_decay=1e-2)}[optimizer](
                 reference.parameters())
    apply_masks(reference, masks) if masked else None
    order, rates, losses = torch.Generator().manual_seed(7), iter(torchs_rates(recipe, 15)), []
    for _ in range(2):
        total = 0
        for batch in torch.randperm(len(data), generator=order).split(100):
            log_p, y = F.log_softmax(reference(data.x[batch]), 1), data.y[batch]
            loss = (-0.8 * log_p[range(len(batch)), y] - 0.2 * log_p.mean(1)).mean()
            plain.param_groups[0]["lr"] = next(rates)
            plain.zero_grad()
            loss.backward()
            plain.step()
            apply_masks(reference, masks) if masked else None
            total += loss.item() * len(batch)
        losses.append(total / len(data))
    run = fit(net, data, recipe, seed=7, masks=masks or None)
    assert run.losses == pytest.approx(losses, rel=1e-6)  # summed in float32
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(run.state[name], tensor, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("accumulate", [2, 3, 37])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_batch_in_parts_is_the_batch(digits, masks, accumulate, optimizer):
    """37 parts of the last batch are an image each."""
    runs = []
    for parts in (1, accumulate):
        data, model = doubled(digits.train, build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3))
        recipe = replace(RECIPE, lr=0.02, optimizer=optimizer, label_smoothing=0.1, accumulate=parts)
        runs.append(fit(model, data, recipe, seed=1, masks=masks, checkpoints=["step 7"]))
    for one, other in zip(*((run.state, run.checkpoints["step 7"]) for run in runs)):
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-10, rtol=1e-10)
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)


def test_batchnorm_sees_one_part_of_a_batch_at_a_time(digits):
    whole, parts = (fit(with_dropout(), digits.train, replace(RECIPE, epochs=1, accumulate=k), seed=1).state
                    for k in (1, 4))
    assert whole["2.num_batches_tracked"] == 15 and parts["2.num_batches_tracked"] == 60
    assert not torch.allclose(whole["2.running_var"], parts["2.running_var"], rtol=1e-3)


def test_bf16_trains_float32_weights(digits, masks):
    runs = {}
    for precision in ("float32", "bf16"):
        model = build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3)
        seen = set()
        model.fc1.register_forward_hook(lambda _, inputs, output, seen=seen: seen.add(output.dtype))
        runs[precision] = fit(model, digits.train, replace(RECIPE, precision=precision), seed=0, masks=masks)
        assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
    plain, rounded = runs["float32"], runs["bf16"]
    assert {tensor.dtype for tensor in rounded.state.values()} == {torch.float32}
    assert rounded.losses[1] < rounded.losses[0] and rounded.losses != plain.losses
    assert rounded.losses == pytest.approx(plain.losses, rel=0.02)
    assert all((rounded.state[name][~mask] == 0).all() for name, mask in masks.items())


@pytest.fixture
def pictures(digits):
    """Digits as a data set of photographs comes: bytes, standardised and augmented in batches."""
    x = digits.train.x - digits.train.x.min()
    return Split((255 * x / x.max()).byte(), digits.train.y, (0.3,), (0.4,), pad=1, flip=True)


def test_batches_are_the_splits_of_the_seed_and_the_epoch(pictures, net, masks):
    def seen(seed, masks, parts=1):
        batches = []
        hook = net.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].clone()))
        fit(net, pictures, replace(RECIPE, accumulate=parts), seed=seed, masks=masks)
        hook.remove()
        return batches

    dense, order = seen(5, None), torch.Generator().manual_seed(5)
    for epoch in range(2):
        indices = torch.randperm(len(pictures), generator=order).split(100)
        own = [x for x, _ in pictures.batches(indices, augmented=(5, epoch))]
        plain = [x for x, _ in pictures.batches(indices)]
        assert all(torch.equal(one, two) for one, two in zip(dense[15 * epoch :], own))
        assert not any(torch.equal(one, two) for one, two in zip(own, plain))
    sparse, parts = seen(5, masks), seen(5, None, 2)
    assert len(sparse) == 30 and all(torch.equal(one, two) for one, two in zip(dense, sparse))
    assert torch.equal(torch.cat(parts), torch.cat(dense)) and not torch.equal(seen(6, None)[0], dense[0])


def killed(model, at):
    """Interrupt a model in its forward pass number ``at``, counted from 1; returns what undoes it."""
    passes = iter(range(1, at))

    def interrupt(*_):
        if next(passes, None) is None:
            raise KeyboardInterrupt

    return model.register_forward_hook(interrupt)


HARD = {  # everything that a run must remember, or draw again
    "sgd": Recipe(3, 0.1, 0.9, 1e-3, 100, "cosine", warmup=0.5, label_smoothing=0.1, accumulate=2),
    "adamw": Recipe(3, 0.01, 0.9, 1e-2, 100, "step", 1, optimizer="adamw", precision="bf16"),
    "no momentum": Recipe(3, 0.1, 0, 0, 100, "constant"),
}
NAMES = ("init", "step 1", "epoch 1", "step 22", "epoch 3")


@pytest.mark.parametrize("case, seed", [("sgd", 1), ("sgd", 2), ("sgd", 3), ("adamw", 1), ("adamw", 2),
                                        ("no momentum", 1)])
def test_a_run_killed_at_random_steps_ends_in_the_same_bits(pictures, tmp_path, monkeypatch, case, seed):
    recipe, draw, path = HARD[case], random.Random(seed), tmp_path / "run.safetensors"
    masks = magnitude_masks(with_dropout().state_dict(), 0.6)
    options = {"seed": seed, "masks": masks, "checkpoints": NAMES}
    undisturbed = fit(with_dropout(), pictures, recipe, **options)
    # Saved after every step or, as in the first minute, not at all: then all is done again.
    saves = [0, *draw.choices([0, 0, 1e9], k=3)]
    for seconds in saves:
        monkeypatch.setattr(loop, "SAVE_SECONDS", seconds)
        left = 45 - (load_tensors(path)[1]["done"] if path.exists() else 0)
        model = with_dropout()
        killed(model, draw.randint(2, left * recipe.accumulate // 2))
        with pytest.raises(KeyboardInterrupt):
            fit(model, pictures, recipe, resume=path, **options)
    assert 0 < load_tensors(path)[1]["done"] < 45 and os.listdir(tmp_path) == ["run.safetensors"]
    torch.manual_seed(draw.randint(0, 1000))
    model = with_dropout()
    run = fit(model, pictures, recipe, resume=path, **options)
    assert same(run.state, undisturbed.state) and same(copied(model), undisturbed.state)
    assert run.losses == undisturbed.losses and run.checkpoints.keys() == set(NAMES)
    assert all(same(run.checkpoints[name], undisturbed.checkpoints[name]) for name in NAMES)


REWIRED = {  # the method; the sizes of batches are odd, so that no step is like another
    "set": Rewiring("set", every=3, until=0.9), "rigl": Rewiring("rigl", every=4, fraction=0.5),
    "srigl": Rewiring("srigl", every=2, min_salient=0.6, densities=0.31),
}


def sparse_start(kind="masks", seed=0):
    """A network with BatchNorm, and its masks of constant fan-in; as FanInLinear layers, without masks."""
    model = with_dropout(seed)
    weights = {name: p for name, p in model.named_parameters() if name in ("1.weight", "5.weight")}
    masks = constant_fan_in_masks(weights, 0.3, seed=seed)
    if kind == "masks":
        return model, masks
    for i in (1, 5):
        model[i] = FanInLinear.from_dense(model[i], masks[f"{i}.weight"])
    return model, None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparse_opt", [False, True])
def test_rewiring_is_the_loop_written_out(digits, method, sparse_opt):
    """A step that rewires takes the gradients of its batch, and changes no weight otherwise."""
    recipe = replace(RECIPE, sparse_opt=sparse_opt)
    (model, masks), (reference, _) = sparse_start(), sparse_start()
    for network in (model, reference):
        network[4].p = 0.0
    checkpoints = [f"step {i}" for i in range(31)]
    run = fit(model, digits.train, recipe, seed=7, masks=masks, rewiring=REWIRED[method], checkpoints=checkpoints)

    topology = Topology(apply_masks(reference, masks), masks, REWIRED[method], steps=30, seed=7)
    optimizer = torch.optim.SGD(reference.parameters(), 0.2, 0.8, weight_decay=1e-2, fused=True)
    if sparse_opt:
        scale_gradients(optimizer, reference, topology.masks)
    order, step = torch.Generator().manual_seed(7), 0
    for _ in range(2):
        for batch in torch.randperm(len(digits.train), generator=order).split(100):
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, 15)
            step += 1
            optimizer.zero_grad()
            with topology.watching(step):
                F.cross_entropy(reference(digits.train.x[batch]), digits.train.y[batch]).backward()
            if topology.due(step):
                topology.rewire(step, optimizer)
            else:
                optimizer.step()
                apply_masks(reference, topology.masks)
            assert same(run.checkpoints[f"step {step}"], copied(reference))
            assert all((reference.get_parameter(name)[~mask] == 0).all() for name, mask in topology.masks.items())
    assert same(run.masks, topology.masks) and same(run.fan_in, topology.fan_in)
    assert any(not torch.equal(run.masks[name], masks[name]) for name in masks)
    assert len(run.fan_in["1.weight"]) == 1 + {"set": 8, "rigl": 5, "srigl": 10}[method]
    for name, mask in masks.items():
        connections = run.fan_in[name].sum(1)
        assert (connections == mask.sum()).all() if method != "srigl" else (connections[1:] > 0.25 * mask.numel()).all()


def test_neurons_are_ablated_while_training_but_never_in_the_last_layer(digits):
    model, masks = sparse_start()
    rewiring = replace(REWIRED["srigl"], min_salient=0.95)
    run = fit(model, digits.train, RECIPE, seed=1, masks=masks, rewiring=rewiring)
    active = (run.fan_in["1.weight"] > 0).sum(1)
    assert active[0] == 20 > active[-1] and (run.fan_in["5.weight"] > 0).all()
    assert torch.equal((run.state["1.weight"] != 0).any(1), run.fan_in["1.weight"][-1] > 0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_fan_in_network_is_trained_and_rewired_like_a_masked_one(digits, accumulate):
    """In float64, where the order of sums does not show, and in parts whose growth scores are those of the batch."""
    runs = []
    for kind, parts in (("masks", 1), ("fan-in", accumulate)):
        model, masks = sparse_start(kind)
        model[2], model[4].p = nn.Identity(), 0.0  # BatchNorm sees parts
        data, model = doubled(digits.train, model)
        recipe = replace(RECIPE, accumulate=parts)
        runs.append((model, fit(model, data, recipe, seed=2, masks=masks, rewiring=REWIRED["srigl"])))
    (masked, one), (condensed, two) = runs
    assert same(one.fan_in, two.fan_in) and (one.fan_in["1.weight"][-1] == 0).any() and two.masks is None
    assert one.losses == pytest.approx(two.losses, rel=1e-6)
    for i in (1, 5):
        assert torch.equal(condensed[i].mask(), one.masks[f"{i}.weight"])
        torch.testing.assert_close(condensed[i].to_dense().weight, masked[i].weight, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind, method", [("masks", "set"), ("masks", "rigl"), ("masks", "srigl"), ("fan-in", "set"),
                                          ("fan-in", "srigl")])
@pytest.mark.parametrize("case", ["sgd", "adamw"])
def test_a_rewired_run_that_was_killed_ends_in_the_same_bits(pictures, tmp_path, monkeypatch, kind, method, case):
    recipe, draw, path = replace(HARD[case], sparse_opt=True), random.Random(5), tmp_path / "run.safetensors"
    model, masks = sparse_start(kind)
    options = {"seed": 3, "masks": masks, "checkpoints": NAMES, "rewiring": REWIRED[method]}
    undisturbed = fit(model, pictures, recipe, **options)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    for _ in range(3):
        left = 45 - (load_tensors(path)[1]["done"] if path.exists() else 0)
        model, _ = sparse_start(kind)
        killed(model, draw.randint(2, left * recipe.accumulate // 2))
        with pytest.raises(KeyboardInterrupt):
            fit(model, pictures, recipe, resume=path, **options)
    assert 0 < load_tensors(path)[1]["done"] < 45
    for _ in range(2):  # the rest of it, and a run that is found finished
        run = fit(sparse_start(kind)[0], pictures, recipe, resume=path, **options)
        assert same(run.state, undisturbed.state) and run.losses == undisturbed.losses
        assert all(same(run.checkpoints[name], undisturbed.checkpoints[name]) for name in NAMES)
        assert same(run.fan_in, undisturbed.fan_in) and len(run.fan_in["1.weight"]) > 5
        assert run.masks is undisturbed.masks is None if kind == "fan-in" else same(run.masks, undisturbed.masks)


def test_a_file_of_other_rewiring_is_refused(digits, tmp_path):
    path, (model, masks) = tmp_path / "run.safetensors", sparse_start()
    options = {"seed": 1, "masks": masks, "resume": path}
    fit(model, digits.train, RECIPE, rewiring=REWIRED["rigl"], **options)
    for rewiring in (None, REWIRED["set"], replace(REWIRED["rigl"], fraction=0.4)):
        with pytest.raises(ValueError, match="belongs to a run with rewiring {'method': 'rigl'.*: give another file"):
            fit(sparse_start()[0], digits.train, RECIPE, rewiring=rewiring, **options)


def test_masks_that_stay_are_those_of_the_run(digits, net, masks):
    run = fit(net, digits.train, RECIPE, seed=0, masks=masks)
    assert same(run.masks, masks) and run.fan_in is None
    assert fit(net, digits.train, RECIPE, seed=0).masks is None


def test_what_cannot_be_rewired_is_refused_before_training(digits, net, masks):
    start = copied(net)
    for options, message in (
            ({"masks": None}, "there is no layer to rewire"),
            ({"masks": masks, "rewiring": "set"}, "rewiring is 'set': expected a Rewiring"),
            ({"masks": masks, "rewiring": Rewiring("srigl", 1, unablated=("fc9",))}, "unablated names 'fc9'")):
        with pytest.raises(ValueError, match=message):
            fit(net, digits.train, RECIPE, seed=0, **{"rewiring": Rewiring("set", 1), **options})
    assert same(copied(net), start)
    model, _ = sparse_start("fan-in")
    with pytest.raises(ValueError, match="'1.weight' is a FanInLinear: RigL"):
        fit(model, digits.train, RECIPE, seed=0, rewiring=Rewiring("rigl"))
    with pytest.raises(ValueError, match="processes is 2 with rewiring and fan-in layers: expected 1, or masks"):
        fit(model, digits.train, RECIPE, seed=0, rewiring=Rewiring("set", 1), processes=2)


@pytest.fixture
def finished(digits, net, masks, tmp_path):
    """A run that ended, saved: its file and what it gave."""
    path = tmp_path / "run.safetensors"
    return path, fit(net, digits.train, RECIPE, seed=1, masks=masks, checkpoints=["epoch 1"], resume=path)


def fresh():
    return build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3)


def test_a_finished_run_is_found_finished(digits, masks, finished):
    path, before = finished
    model = fresh()
    killed(model, 1)
    run = fit(model, digits.train, RECIPE, seed=1, masks=masks, checkpoints=["epoch 1"], resume=path)
    assert same(run.state, before.state) and same(copied(model), before.state) and run.losses == before.losses
    assert run.checkpoints.keys() == {"epoch 1"} and same(run.checkpoints["epoch 1"], before.checkpoints["epoch 1"])
    other = fit(fresh(), digits.train, RECIPE, seed=1, masks=masks, checkpoints=["epoch 1"])
    assert same(run.state, other.state) and run.losses == other.losses  # saved or not


@pytest.mark.parametrize("name, change", [
    ("lr", {"recipe": replace(RECIPE, lr=0.1)}), ("epochs", {"recipe": replace(RECIPE, epochs=3)}),
    ("optimizer", {"recipe": replace(RECIPE, optimizer="adamw")}), ("seed", {"seed": 2}), ("masks", {"masks": None}),
    ("masks", {"masks": {"fc1.weight": torch.ones(13, 64).bool()}}), ("checkpoints", {"checkpoints": []}),
    ("rewiring", {"rewiring": Rewiring("set", 1)}),
])
def test_a_file_of_other_settings_is_refused_by_what_differs(digits, masks, finished, name, change):
    refused(finished[0], name, fresh(), digits.train, {"masks": masks, **change})


@pytest.mark.parametrize("name, change", [
    ("data.x", lambda data: {"x": data.x + 1}), ("data.y", lambda data: {"y": data.y.flip(0)}),
    ("data.pad", lambda data: {"pad": 1}), ("data.sd", lambda data: {"sd": (2.0,)}),
])
def test_a_file_of_other_data_is_refused(digits, masks, finished, name, change):
    refused(finished[0], name, fresh(), replace(digits.train, **change(digits.train)), {"masks": masks})


def test_a_file_of_another_start_is_refused(digits, masks, finished):
    model = fresh()
    model.fc1.bias.data.add_(1)
    refused(finished[0], "initial weights", model, digits.train, {"masks": masks})


def refused(path, name, model, train, options):
    start, content = copied(model), path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"{path} belongs to a run with {name} ")) as error:
        fit(model, train, **{"recipe": RECIPE, "seed": 1, "checkpoints": ["epoch 1"], **options}, resume=path)
    assert str(error.value).count("(here ") == 1 and "give another file, or delete it" in str(error.value)
    assert same(copied(model), start) and path.read_bytes() == content


def test_all_settings_that_differ_are_named(digits, masks, finished):
    data = digits.train.x[:1000], digits.train.y[:1000]
    with pytest.raises(ValueError) as error:
        fit(fresh(), data, replace(RECIPE, momentum=0.5), seed=3, masks=masks, checkpoints=["epoch 1"],
            resume=finished[0])
    found = re.findall(r"([\w. ]+) \S+ \(here", str(error.value).split("a run with")[1])
    assert [name.strip() for name in found] == ["momentum", "seed", "images", "data.x", "data.y"]
    assert "momentum 0.8 (here 0.5)" in str(error.value)


def damage(path, kind, masks):
    content = path.read_bytes()
    if kind == "foreign":
        save_file({"x": torch.zeros(1)}, path)
    elif kind == "masks":
        save_masks(path, masks)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"a file of mine\n"}[kind])


@pytest.mark.parametrize("kind, message", [("cut", "is damaged"), ("empty", "is damaged"), ("text", "is damaged"),
                                           ("foreign", "its format is None"), ("masks", "expected a run to resume")])
def test_a_file_that_is_no_run_is_refused_and_kept(digits, masks, finished, kind, message):
    path, model, start = finished[0], fresh(), copied(fresh())
    damage(path, kind, masks)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        fit(model, digits.train, RECIPE, seed=1, masks=masks, checkpoints=["epoch 1"], resume=path)
    assert path.read_bytes() == content and same(copied(model), start)


SCRIPT = """
import sys
import time

import torch

from permask_core.training import Recipe, loop
from permask_core.data import load_dataset
from permask_core.models import build_model

torch.set_num_threads(1)
loop.SAVE_SECONDS = 0
model = build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3)
model.register_forward_hook(lambda *_: time.sleep(0.01))
loop.fit(model, load_dataset("digits").train, Recipe(20, batch_size=100), seed=1, resume=sys.argv[1])
"""


def test_a_process_killed_for_good_is_resumed(digits, tmp_path):
    path, environment = tmp_path / "run.safetensors", {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", SCRIPT, path], env=environment) as running:
        while not path.exists() or load_tensors(path)[1]["done"] < 3:
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert 3 <= load_tensors(path)[1]["done"] < 300
    run, undisturbed = (fit(fresh(), digits.train, Recipe(20, batch_size=100), seed=1, resume=resume)
                        for resume in (path, None))
    assert same(run.state, undisturbed.state) and run.losses == undisturbed.losses


def test_evaluation_standardises_bytes_and_does_not_augment(pictures, trained):
    plain = (pictures.x.float() / 255 - 0.3) / 0.4
    assert evaluate(trained, pictures, batch_size=100) == evaluate(trained, (plain, pictures.y), batch_size=100)
    with torch.no_grad():
        logits = trained(plain)
    accuracy, loss = evaluate(trained, pictures)
    assert accuracy == (logits.argmax(1) == pictures.y).double().mean().item()
    assert loss == pytest.approx(F.cross_entropy(logits, pictures.y).item(), rel=1e-5)


@pytest.mark.parametrize("what", ["dataset", "numpy", "inputs"])
def test_what_is_no_split_is_refused(digits, net, what):
    x, y = digits.train.x, digits.train.y
    data = {"dataset": digits, "numpy": (x.numpy(), y.numpy()), "inputs": x}[what]
    for use in (lambda: fit(net, data, RECIPE, seed=0), lambda: evaluate(net, data)):
        with pytest.raises(ValueError, match="expected a split such as data.train|the batches have no targets"):
            use()


def test_one_name_is_no_list_of_checkpoints(digits, net):
    with pytest.raises(ValueError, match="checkpoints is 'init': expected a list"):
        fit(net, digits.train, RECIPE, seed=0, checkpoints="init")


NARROW = """
import sys, torch
from permask_core.models import build_model
from permask_core.training import Recipe, fit

torch.set_num_threads(1)
x, y = torch.randn(157, 1, 8, 8), torch.randint(10, (157,))
states = []
for dtype in (torch.float32, torch.float64):
    model = build_model("resnet8", (1, 8, 8), 10, width=0.125).to(dtype)
    fit(model, (x.to(dtype), y), Recipe(40, 0.01), seed=0)
    states.append(torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()]))
print((states[0] - states[1]).abs().max().item())
"""


def test_narrow_networks_are_trained_without_the_broken_kernel_of_avx2():
    """With channels last, a gradient that oneDNN computes with AVX2 overwrites memory: a crash, or wrong results."""
    done = subprocess.run([sys.executable, "-c", NARROW], capture_output=True, text=True,
                          env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1e-2


@pytest.mark.parametrize("layer, broken", [
    (nn.Conv2d(2, 4, 1, stride=2), True), (nn.Conv2d(8, 4, 1, stride=2), False), (nn.Conv2d(2, 4, 1), False),
    (nn.Conv2d(2, 4, 3, stride=2), False), (nn.Conv2d(16, 16, 1, stride=2, groups=4), True), (nn.Linear(2, 2), False)])
def test_the_order_in_memory(layer, broken):
    model = nn.Sequential(layer)
    expected = torch.contiguous_format if broken else torch.channels_last
    assert loop.memory_format(model, "cpu") == expected
    assert loop.memory_format(model, "cuda") == torch.channels_last


# ---- Anybody's data --------------------------------------------------------------------------------------------------

def examples(n=44):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def small():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def test_a_list_of_batches_is_trained_on_in_its_order():
    """Against the loop that everybody writes."""
    x, y = examples()
    batches, recipe = list(zip(x.split(11), y.split(11))), Recipe(3, 0.1, schedule="constant")
    ours, theirs = small().eval(), small().eval()  # fit itself turns dropout on
    for model in (ours, theirs):
        model[2].p = 0.0
    run = fit(ours, batches, recipe, seed=0, device="cpu", description=None)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=5e-4)
    losses = []
    for _ in range(3):
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(theirs(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(run.state, theirs.state_dict())
    assert run.losses == pytest.approx([sum(losses[i:i + 4]) / 4 for i in (0, 4, 8)], rel=1e-5)


class Noisy(torch.utils.data.Dataset):
    """Examples to which the global generator adds noise, as augmentation does."""

    def __len__(self):
        return 44

    def __getitem__(self, index):
        return examples()[0][index] + torch.randn(6), examples()[1][index]


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_a_loader_that_shuffles_repeats_itself_and_goes_on(tmp_path, monkeypatch, generator):
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=10, shuffle=True, generator=generator)
    recipe, options = Recipe(3, 0.05), {"device": "cpu", "description": None}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    whole, again, other = (fit(small(), loader, recipe, seed=seed, **options) for seed in (1, 1, 2))
    assert same(whole.state, again.state) and not same(whole.state, other.state)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    for steps in (3, 6):
        model, left = small(), iter(range(steps))

        def interrupt(*_, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        model.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(model, loader, recipe, seed=1, resume=tmp_path / "run", **options)
    resumed = fit(small(), loader, recipe, seed=1, resume=tmp_path / "run", **options)
    assert same(resumed.state, whole.state) and resumed.losses == whole.losses
    if generator is None:
        torch.manual_seed(7)
        assert torch.equal(torch.get_rng_state(), before)


class Named(nn.Module):
    """As a model of transformers: inputs by name, an output with logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(6, 3)

    def forward(self, values, weights):
        return SimpleNamespace(logits=self.layer(values * weights), loss=None)


def test_batches_may_be_dicts_and_inputs_several():
    x, y = examples()
    named = [{"values": a, "weights": a.abs(), "labels": b} for a, b in zip(x.split(11), y.split(11))]
    several = [((batch["values"], batch["weights"]), batch["labels"]) for batch in named]
    runs = [fit(Named(), data, Recipe(2, 0.1), seed=0, device="cpu", description=None) for data in (named, several)]
    assert same(runs[0].state, runs[1].state) and runs[0].losses[1] < runs[0].losses[0]
    model = Named()
    expected = model.layer(x * x.abs())
    assert torch.allclose(predict(model, named), expected) and torch.allclose(predict(model, several), expected)
    assert evaluate(model, named).loss == pytest.approx(F.cross_entropy(expected, y).item(), rel=1e-5)
    chosen = evaluate(model, several, forward=lambda model, inputs: -model(*inputs).logits)
    assert chosen.loss == pytest.approx(F.cross_entropy(-expected, y).item(), rel=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_dense_labels_are_counted_one_by_one_and_ignored_ones_not(last):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(7, 4, 5, 6, generator=generator)
    labels = torch.randint(4, (7, 5, 6), generator=generator)
    labels[:, 0] = -100
    model = nn.Identity() if not last else nn.Sequential(nn.Flatten(0, 0), Last())
    found = evaluate(model, (images, labels), batch_size=3)
    kept = labels != -100
    assert found.accuracy == pytest.approx((images.argmax(1) == labels)[kept].double().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(images, labels).item(), rel=1e-5)


class Last(nn.Module):
    def forward(self, x):
        return x.movedim(1, -1)


@pytest.mark.parametrize("targets, expected", [
    (torch.zeros(7, 5), r"targets have shape \[7, 5\] and the logits \[7, 3\]"), (torch.zeros(7), "are torch.float32"),
    (None, "no targets"),
])
def test_targets_that_are_no_classes_are_refused(targets, expected):
    targets = targets if targets is None or targets.ndim == 1 else targets.long()
    data = torch.zeros(7, 3) if targets is None else (torch.zeros(7, 3), targets)
    with pytest.raises(ValueError, match=expected):
        evaluate(nn.Identity(), data)


def test_regression_has_a_loss_and_a_metric_of_its_own():
    x, _ = examples(200)
    slope = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1.0])
    y = (x @ slope)[:, None] + 1
    torch.manual_seed(0)
    model = nn.Linear(6, 1)
    fit(model, (x, y), Recipe(40, 0.1, weight_decay=0.0, batch_size=50), seed=0, loss=F.mse_loss, device="cpu",
        description=None)
    assert torch.allclose(model.weight, slope[None], atol=1e-3)  # planted
    assert evaluate(model, (x, y), metric=F.mse_loss, batch_size=30) < 1e-5
    with pytest.raises(ValueError, match="expected classes as integers; for other targets pass loss="):
        fit(model, (x, y), Recipe(1, batch_size=50), seed=0, description=None)


@pytest.mark.parametrize("data", ["tensors", "loader"])
def test_an_example_alone_meets_no_batchnorm(data):
    x, y = examples(41)
    given = (x, y) if data == "tensors" else torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=10)
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="the last batch of an epoch has 1 examples in 1 parts: '1' cannot normalise"):
        fit(model, given, Recipe(1, batch_size=10), seed=0, description=None)
    assert same(start, model.state_dict())


@pytest.mark.parametrize("data, expected", [
    (torch.zeros(4, 6), r"got inputs \[4, 6\] without targets"), (iter([]), "an unknown number of batches"),
    ([torch.zeros(4, 6)], "a batch has no targets"),
])
def test_data_that_cannot_be_trained_on_are_refused(data, expected):
    with pytest.raises(ValueError, match=expected):
        fit(small(), data, Recipe(1), seed=0, description=None)


def test_numpys_numbers_are_numbers():
    x, y = examples()
    recipe = Recipe(np.int64(2), np.float32(0.1), batch_size=np.int32(11))
    assert type(recipe.epochs) is int and type(recipe.lr) is float
    run = fit(small(), (x, y), recipe, seed=np.int64(3), device="cpu", description=None)
    again = fit(small(), (x, y), Recipe(2, float(np.float32(0.1)), batch_size=11), seed=3, device="cpu",
                description=None)
    assert same(run.state, again.state)
