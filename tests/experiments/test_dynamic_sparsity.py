"""Dynamic sparse training as an experiment, as small as it can be: what is shared, kept, found again, refused."""

import re
from dataclasses import replace

import pytest
import torch

from permask_core.data.published import published_dynamic_sparse_training
from permask_core.experiments import dynamic_sparsity
from permask_core.experiments.dynamic_sparsity import (
    METHODS,
    PRESETS,
    Experiment,
    preset,
    reproduces,
    run,
    train_network,
)
from permask_core.masks import layer_sparsity, prunable_weights
from permask_core.models import build_model
from permask_core.pruning import erk_densities
from permask_core.runs.store import Store
from permask_core.sparse.dynamic import Rewiring
from permask_core.sparse.initialisation import sparse_init
from permask_core.training import Recipe, evaluate, fit, loop
from tests.data.files import write_cifar, write_imagenet

TINY = Experiment(width=0.25, recipe=Recipe(epochs=2, batch_size=64), every=5)
GRID = {"seeds": [0, 1], "sparsities": [0.8, 0.95]}
SPARSE = METHODS[1:]

# Lasby et al., ICLR 2024, and their public code for what the paper leaves open.
PUBLISHED = {
    "cifar10-resnet18": ({"dataset": "cifar10", "model": "resnet18_cifar", "distribution": "erk", "every": 100,
                          "min_salient": 0.3, "unmasked": ()},
                         {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 250,
                          "batch_size": 128, "label_smoothing": 0.0, "warmup": 0.0}, (0.8, 0.9, 0.95, 0.99)),
    "imagenet-resnet50": ({"dataset": "imagenet", "model": "resnet50", "distribution": "erk", "every": 800,
                           "min_salient": 0.3, "unmasked": ("conv1.weight",)},
                          {"optimizer": "sgd", "lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4, "epochs": 103,
                           "batch_size": 512, "label_smoothing": 0.1, "warmup": 5}, (0.8, 0.9, 0.95, 0.99)),
    "imagenet-vit_b_16": ({"dataset": "imagenet", "model": "vit_b_16", "distribution": "uniform", "every": 100,
                           "min_salient": 0.95, "unmasked": ()},
                          {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.3, "epochs": 150, "batch_size": 4096,
                           "label_smoothing": 0.11, "warmup": 16}, (0.8, 0.9)),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of everything: its store and its rows."""
    store = Store(tmp_path_factory.mktemp("dst"))
    return store, run(TINY, store, **GRID)


def plain(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def spied(monkeypatch):
    """What each call of fit is given from now on: a copy of the weights, and the arguments."""
    calls, real = [], dynamic_sparsity.fit

    def spy(model, train, recipe, **given):
        calls.append(({name: tensor.clone() for name, tensor in model.state_dict().items()}, recipe, given))
        return real(model, train, recipe, **given)

    monkeypatch.setattr(dynamic_sparsity, "fit", spy)
    return calls


def test_one_row_per_run(finished):
    _, rows = finished
    expected = [(seed, method, s) for seed in (0, 1) for method in METHODS
                for s in ([0.0] if method == "dense" else [0.8, 0.95])]
    assert [(row["seed"], row["method"], row["sparsity"]) for row in rows] == expected
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and row["loss"] > 0 and row["seconds"] > 0 and row["width"] == 0.25
        assert row["neurons"] == 32 + 32 + 10


def test_methods_share_what_they_start_from(tmp_path, monkeypatch):
    calls = spied(monkeypatch)
    run(TINY, Store(tmp_path), seeds=[3], sparsities=[0.9])
    by = dict(zip(METHODS, calls))
    initial = build_model("mlp", (1, 8, 8), 10, width=0.25, seed=3).state_dict()
    assert all(torch.equal(by["dense"][0][name], tensor) for name, tensor in initial.items())
    assert by["dense"][2]["masks"] is None and by["dense"][2]["rewiring"] is None
    for methods in (("random", "set", "rigl"), ("fan_in", "srigl", "srigl+ablation")):
        first, masks = by[methods[0]][0], by[methods[0]][2]["masks"]
        for method in methods[1:]:
            assert all(torch.equal(first[name], tensor) for name, tensor in by[method][0].items())
            assert all(torch.equal(masks[name], mask) for name, mask in by[method][2]["masks"].items())
    assert {(recipe, given["seed"]) for _, recipe, given in calls} == {(TINY.recipe, 3)}
    # One draw: where both kinds of masks keep a weight, it has the same sign, and its size follows the fan-in alone.
    a, b = by["random"], by["fan_in"]
    for name, mask in a[2]["masks"].items():
        both = mask & b[2]["masks"][name]
        fan_in = [call[2]["masks"][name].sum(1, keepdim=True).expand_as(mask)[both] for call in (a, b)]
        drawn = [call[0][name][both] * k.sqrt() for call, k in zip((a, b), fan_in)]
        assert both.any() and torch.allclose(*drawn, atol=1e-6)


def test_methods_start_with_as_many_connections_in_each_layer(tmp_path, monkeypatch):
    calls = spied(monkeypatch)
    run(TINY, Store(tmp_path), seeds=[0], sparsities=[0.9], methods=list(SPARSE))
    kept = {tuple(int(mask.sum()) for mask in given["masks"].values()) for _, _, given in calls}
    assert len(kept) == 1
    shapes = prunable_weights(build_model("mlp", (1, 8, 8), 10, width=0.25))
    wanted = {name: shapes[name].numel() * density for name, density in erk_densities(shapes, 0.1).items()}
    for (name, tensor), count in zip(shapes.items(), *kept):
        assert count % len(tensor) == 0 and wanted[name] - len(tensor) < count <= wanted[name] + 1e-6


def test_what_rows_say_of_masks(finished):
    store, rows = finished
    for row in rows:
        state, masks, record = train_network(TINY, store, row["seed"], row["sparsity"], row["method"])
        counts = {name: mask.flatten(1).sum(1) for name, mask in masks.items()}
        assert row["connections"] == record["connections"] == sum(int(count.sum()) for count in counts.values())
        assert row["active"] == sum(int((count > 0).sum()) for count in counts.values())
        assert all((state[name][~mask] == 0).all() for name, mask in masks.items())
        if row["method"] in ("fan_in", "srigl"):
            assert all(len(count.unique()) == 1 for count in counts.values()) and row["active"] == row["neurons"]
        if row["method"] == "srigl+ablation":
            assert all(len(count[count > 0].unique()) == 1 for count in counts.values())
        if row["method"] == "dense":
            assert row["achieved"] == 0 and row["connections"] == sum(mask.numel() for mask in masks.values())
        elif row["method"] != "srigl+ablation":
            assert row["connections"] == round((1 - row["achieved"]) * sum(mask.numel() for mask in masks.values()))


def test_networks_are_what_fit_makes(finished, digits):
    """SRigL with ablation shares what the densities allow, before rounding."""
    store, rows = finished
    model = build_model("mlp", (1, 8, 8), 10, width=0.25, seed=1)
    weights = prunable_weights(model)
    densities = erk_densities(weights, 0.05)
    masks = dynamic_sparsity.starting_masks(weights, densities, unequal=False, seed=1)
    sparse_init(model, masks, seed=1)
    moved = fit(model, digits.train, TINY.recipe, seed=1, masks=masks, description=None,
                rewiring=Rewiring("srigl", 5, densities=densities))
    state, found, record = train_network(TINY, store, 1, 0.95, "srigl+ablation")
    assert all(torch.equal(state[name], tensor) for name, tensor in moved.state.items())
    assert all(torch.equal(found[name], mask) for name, mask in moved.masks.items())
    assert record["accuracy"] == evaluate(model, digits.test).accuracy


def test_what_is_finished_is_found(finished, monkeypatch):
    store, rows = finished
    monkeypatch.setattr(loop, "_train", lambda *_: pytest.fail("trains again"))
    again = Store(store.folder)
    assert run(TINY, again, **GRID) == rows and again.computed == 0
    alone = run(TINY, again, seeds=[1], sparsities=[0.95], methods=["rigl"])  # as a job of a grid
    assert alone == [row for row in rows if (row["seed"], row["sparsity"], row["method"]) == (1, 0.95, "rigl")]


@pytest.mark.parametrize("method", ["random", "set", "rigl", "srigl+ablation"])
def test_a_run_killed_in_the_middle_ends_in_the_same_bits(finished, tmp_path, method, monkeypatch):
    store, _ = finished
    real, saved = loop.save_run, []

    def save(*given):
        real(*given)
        saved.append(given)
        if len(saved) == 20:  # between two rewirings
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    monkeypatch.setattr(loop, "save_run", save)
    with pytest.raises(KeyboardInterrupt):
        train_network(TINY, Store(tmp_path), 0, 0.95, method)
    assert len(list(tmp_path.rglob("*.unfinished"))) == 1 and not list(tmp_path.rglob("*.safetensors"))
    state, masks, record = train_network(TINY, Store(tmp_path), 0, 0.95, method)
    assert 20 < len(saved) < 2 * 23 + 5  # it continued, and did not start again
    whole = train_network(TINY, store, 0, 0.95, method)
    for found, expected in ((state, whole[0]), (masks, whole[1])):
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert plain([record]) == plain([whole[2]]) and not list(tmp_path.rglob("*.unfinished"))


def test_what_decides_trains_anew_and_nothing_else_does(finished):
    store, _ = finished

    def trained(**changes):
        own, computed = replace(TINY, **changes), set()
        for method in METHODS:
            one = Store(store.folder)
            train_network(own, one, 0, 0.0 if method == "dense" else 0.8, method)
            computed |= {method} if one.computed else set()
        return computed

    assert trained(root="elsewhere") == set()
    assert trained(min_salient=0.5) == {"srigl+ablation"}
    assert trained(every=6) == {"set", "rigl", "srigl", "srigl+ablation"}
    assert trained(distribution="uniform") == set(SPARSE)
    assert trained(recipe=replace(TINY.recipe, lr=0.05)) == set(METHODS)


def test_workers_get_the_same_rows(finished, tmp_path):
    _, rows = finished
    assert plain(run(TINY, Store(tmp_path), **GRID, workers=2)) == plain(rows)


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name):
    chosen, (settings, recipe, sparsities) = preset(name), PUBLISHED[name]
    assert {key: getattr(chosen, key) for key in settings} == settings
    assert {key: getattr(chosen.recipe, key) for key in recipe} == recipe
    assert (chosen.until, chosen.fraction, PRESETS[name].grid["sparsities"]) == (0.75, 0.3, sparsities)
    rows = [row for row in published_dynamic_sparse_training() if row["setting"] == reproduces(name, chosen)]
    assert {row["sparsity"] for row in rows} - {0.0} == set(sparsities)


def test_cifar100_has_the_settings_of_cifar10_and_nothing_published():
    ours, theirs = preset("cifar100-resnet18"), preset("cifar10-resnet18")
    assert replace(ours, dataset="cifar10") == theirs and reproduces("cifar100-resnet18", ours) is None


@pytest.mark.parametrize("changes, kept", [
    ({}, True), ({"recipe": {"precision": "bf16", "accumulate": 2}, "root": "there", "processes": 2}, True),
    ({"recipe": {"epochs": None}, "width": None}, True), ({"options": {"verify": False}}, False),
    ({"width": 0.5}, False), ({"recipe": {"epochs": 249}}, False), ({"every": 50}, False)])
def test_what_was_published_is_not_of_other_settings(changes, kept):
    found = reproduces("cifar10-resnet18", preset("cifar10-resnet18", **changes))
    assert found == ("ResNet18/CIFAR-10" if kept else None)


def test_shortcuts_have_masks_and_what_is_to_stay_dense_has_none():
    model = build_model("resnet50", (3, 32, 32), 10, width=0.125)
    weights = dynamic_sparsity.sparse_weights(preset("imagenet-resnet50"), model)
    expected = {name for name, tensor in model.named_parameters() if tensor.ndim > 1} - {"conv1.weight"}
    assert set(weights) == expected and "layer1.0.downsample.0.weight" in expected


def test_uniform_masks_have_one_sparsity_in_every_layer():
    weights = {"a": torch.empty(20, 50), "b": torch.empty(40, 30)}
    densities = dynamic_sparsity.layer_densities(replace(TINY, distribution="uniform"), weights, 0.9)
    for unequal in (True, False):
        masks = dynamic_sparsity.starting_masks(weights, densities, unequal=unequal, seed=0)
        assert layer_sparsity(masks) == pytest.approx({"a": 0.9, "b": 0.9})


@pytest.mark.parametrize("change, message", [
    ({"dataset": "shoes"}, "dataset is 'shoes': expected one of digits"), ({"model": "cnn"}, "model is 'cnn'"),
    ({"options": {"fold": 1}}, "digits has no option 'fold'"), ({"width": 0}, "width is 0"),
    ({"distribution": "erdos"}, "distribution is 'erdos': expected one of erk, uniform"),
    ({"recipe": {"lr": 1}}, "recipe is {'lr': 1}: expected a Recipe"), ({"processes": 0}, "processes is 0"),
    ({"every": 0}, "every is 0"), ({"until": 2}, "until is 2"), ({"fraction": 0}, "fraction is 0"),
    ({"min_salient": 1.5}, "min_salient is 1.5"), ({"min_salient": None}, "min_salient is None: expected a number"),
])
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TINY, **change)


@pytest.mark.parametrize("change, message", [
    ({"name": "cifar"}, "unknown preset 'cifar': expected one of digits, cifar10-resnet18"),
    ({"name": "digits", "epochs": 3}, "unknown setting 'epochs': expected one of dataset, options"),
    ({"name": "digits", "recipe": {"epoch": 3}}, "unknown setting 'epoch', perhaps 'epochs': expected one of epochs"),
    ({"name": "digits", "options": {"noize": 1}}, "digits has no option 'noize'"),
    ({"name": "imagenet-resnet50", "recipe": {"epochs": 4}}, "warmup is 5: expected a number of epochs below epochs"),
])
def test_bad_presets_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        preset(**change)


@pytest.mark.parametrize("change, message", [
    ({"seeds": [-1]}, "seed is -1"), ({"seeds": []}, "seeds is []: expected a list"), ({"workers": 0}, "workers is 0"),
    ({"seeds": [0, 0]}, "seeds is [0, 0]: expected each value once"), ({"sparsities": [1]}, "sparsity is 1"),
    ({"sparsities": 0.9}, "sparsities is 0.9: expected a list (papermill takes lists with -y, as in"),
    ({"sparsities": [0.9, 0.9]}, "expected each value once"), ({"methods": "rigl"}, "methods is 'rigl': expected a li"),
    ({"methods": ["riglet"]}, "unknown method 'riglet', perhaps 'rigl': expected one of dense, random, fan_in, set"),
    ({"sparsities": [0.8, 0.9999]}, "sparsity is 0.9999: it leaves 'fc1.weight', of 2048 weights, no connection"),
    ({"experiment": replace(TINY, unmasked=("conv1.weight",))}, "unmasked has 'conv1.weight': expected some of fc1"),
    ({"experiment": replace(TINY, unmasked=("fc1.weight", "fc2.weight", "head.weight"))}, "unmasked has all weights"),
    ({"experiment": replace(TINY, model="vgg11")}, "vgg11 halves the image five times"),
    ({"experiment": replace(TINY, recipe=Recipe(batch_size=9999))}, "images: expected at least a batch of 9999"),
])
def test_bad_runs_are_refused_before_training(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**{"experiment": TINY, "store": Store(tmp_path), **GRID, **change})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_dense_has_no_sparsity_and_the_others_have_one(tmp_path):
    for target, method, message in ((0.9, "dense", "sparsity is 0.9 for the method 'dense': expected 0"),
                                    (0.0, "rigl", "sparsity is 0.0: expected a number in (0, 1)")):
        with pytest.raises(ValueError, match=re.escape(message)):
            train_network(TINY, Store(tmp_path), 0, target, method)


@pytest.mark.parametrize("name, options", [
    ("cifar10-resnet18", {"verify": False}), ("cifar100-resnet18", {"verify": False}),
    ("imagenet-resnet50", {"image_size": 32, "readers": 0}), ("imagenet-vit_b_16", {"image_size": 32, "readers": 0})])
def test_published_networks_train_on_files_in_the_published_formats(name, options, tmp_path):
    dataset = name.split("-")[0]
    if dataset == "imagenet":
        write_imagenet(tmp_path / "data")
    else:
        write_cifar(tmp_path / "data", dataset, n_train=24, n_test=20)
    short = {"epochs": 1, "batch_size": 8, "accumulate": 1, "warmup": 0, "precision": "float32"}
    own = preset(name, options=options, root=str(tmp_path / "data"), width=0.0625, every=1, recipe=short)
    rows = run(own, Store(tmp_path / "runs"), seeds=[0], sparsities=[0.8], methods=["rigl", "srigl+ablation"])
    assert [row["method"] for row in rows] == ["rigl", "srigl+ablation"]
    assert rows[0]["achieved"] == rows[1]["achieved"] and 0.5 < rows[0]["achieved"] < 0.95
    before = train_network(replace(own, every=100), Store(tmp_path / "runs"), 0, 0.8, "fan_in")[1]
    moved = train_network(own, Store(tmp_path / "runs"), 0, 0.8, "srigl+ablation")[1]
    assert any(not torch.equal(before[key], moved[key]) for key in moved)
