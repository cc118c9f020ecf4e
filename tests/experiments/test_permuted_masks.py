"""The experiment, as small as it can be: what its rows hold, what is shared, what is found again, what is refused."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from permask_core.experiments import permuted_masks, stages, trainings
from permask_core.experiments.permuted_masks import (
    Experiment,
    build_network,
    find_ticket,
    match_dense,
    method_masks,
    run,
    train_dense,
    train_sparse,
)
from permask_core.masks import apply_masks, layer_sparsity, sparsity
from permask_core.matching import match_activations, match_weights, permute
from permask_core.models import build_model
from permask_core.runs.files import save_tensors
from permask_core.runs.store import Store
from permask_core.training import loop
from tests.data.files import (
    write_celeba,
    write_cifar,
    write_hatexplain,
    write_imagenet,
    write_mnist,
    write_svhn,
    write_tiny_imagenet,
    write_tokenizer,
)

TINY = Experiment(width=0.1, epochs=2, checkpoints=(0, 1), rewind=1, matched_at=2, imp_rewind=1, imp_epochs=1,
                  imp_rate=0.5)
FAN_IN = dataclasses.replace(TINY, imp_scope="fan_in")
GRID = {"seeds": [0, 1], "sparsities": [0.5, 0.8]}
WEIGHTS = 64 * 13 + 13 * 13 + 13 * 10
COLUMNS = {"method", "matching", "sparsity", "achieved", "seed", "accuracy", "loss", "seconds", "width", "sparse_lr",
           "rewind", "matched_at", "data"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of everything: its store and its rows."""
    store = Store(tmp_path_factory.mktemp("lottery"))
    return store, run(TINY, store, **GRID)


def files(store):
    return {path.relative_to(store.folder): path.stat().st_mtime_ns for path in store.folder.rglob("*")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_one_row_per_run(finished):
    _, rows = finished
    assert all(row.keys() == COLUMNS for row in rows)
    expected = {(seed, "dense", "", 0.0) for seed in (0, 1)} | {
        (seed, method, by, target) for seed in (0, 1) for target in (0.5, 0.8) for method, by in
        (("lth", ""), ("permuted", "weights"), ("permuted", "activations"), ("naive", ""), ("random", ""))}
    assert {(row["seed"], row["method"], row["matching"], row["sparsity"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["achieved"] == pytest.approx(round(row["sparsity"] * WEIGHTS) / WEIGHTS)
        assert 0.05 < row["accuracy"] <= 1 and row["loss"] > 0 and row["seconds"] > 0
        assert (row["width"], row["rewind"], row["matched_at"]) == (0.1, 1, 2)
    assert all(row["accuracy"] > 0.2 for row in rows if row["method"] in ("dense", "lth"))


def test_columns_come_in_one_order(finished):
    assert len({tuple(row) for row in finished[1]}) == 1


def test_dense_networks_are_trained_once_per_seed_and_a_rerun_trains_nothing(finished):
    store, rows = finished
    before = files(store)
    counts = {folder.name: len(list(folder.iterdir())) for folder in store.folder.iterdir()}
    # At a rate of a half, 50 % is the first prune of the dense network and 80 % the third: two trainings a seed.
    assert counts == {"dense": 2 * 2, "imp_round": 2 * 2, "matching": 2 * 2, "sparse": 2 * 2 * 5, "ticket": 2 * 2}
    assert run(TINY, store, **GRID) == rows  # to the second
    assert files(store) == before


def test_the_counts_of_the_store_tell_what_a_run_did(tmp_path):
    store = Store(tmp_path)
    run(TINY, store, seeds=[0], sparsities=[0.5], methods=["dense", "naive"])
    assert store.computed == len(list(tmp_path.rglob("*.safetensors"))) > 0
    again = Store(tmp_path)
    run(TINY, again, seeds=[0], sparsities=[0.5], methods=["dense", "naive"])
    assert again.computed == 0 and again.found > 0


def test_a_run_that_lost_a_stage_makes_only_that_one_again(finished, tmp_path):
    store, rows = finished
    lost = sorted((store.folder / "sparse").iterdir())[3]
    before = files(store)
    lost.unlink()
    assert without_seconds(run(TINY, store, **GRID)) == without_seconds(rows)
    after = files(store)
    assert {path for path in after if after[path] != before[path]} - {lost.parent.relative_to(store.folder)} == {
        lost.relative_to(store.folder)}


def test_two_workers_give_the_rows_of_one(tmp_path):
    """Of one thread, as each worker has: how a sum is divided among threads decides about its last bits."""
    threads, stores = torch.get_num_threads(), [Store(tmp_path / "one"), Store(tmp_path / "two")]
    torch.set_num_threads(1)
    try:
        one, two = (without_seconds(run(TINY, store, workers=n, **GRID)) for n, store in enumerate(stores, 1))
    finally:
        torch.set_num_threads(threads)
    assert one == two and files(stores[0]).keys() == files(stores[1]).keys()


def test_where_other_notebooks_run_the_environment_limits_the_workers(tmp_path, monkeypatch):
    def start(*_):
        raise AssertionError("processes were started")

    monkeypatch.setattr(stages, "run_in_parallel", start)
    monkeypatch.setenv("PERMASK_WORKERS", "1")
    rows = run(TINY, Store(tmp_path), seeds=[0], sparsities=[0.5], methods=["dense"], workers=2)
    assert [row["method"] for row in rows] == ["dense"]
    monkeypatch.setenv("PERMASK_WORKERS", "2")
    with pytest.raises(AssertionError, match="processes were started"):
        run(TINY, Store(tmp_path), seeds=[0], sparsities=[0.5], methods=["dense"], workers=2)


def test_epoch_0_is_the_true_initialisation_and_a_and_b_differ(finished):
    store, _ = finished
    for seed in (0, 1):
        (a, _), (b, _) = (train_dense(TINY, store, seed, which) for which in "ab")
        assert list(a) == list(b) == [0, 1, 2]
        assert same(a[0], build_model("mlp", (1, 8, 8), 10, width=0.1, seed=2 * seed).state_dict())
        assert same(b[0], build_model("mlp", (1, 8, 8), 10, width=0.1, seed=2 * seed + 1).state_dict())
        assert not same(a[1], a[0]) and not same(a[2], a[1])


def test_matching_is_that_of_the_epoch_asked_for(finished):
    store, _ = finished
    a, b = (train_dense(TINY, store, 0, which)[0] for which in "ab")
    x = permuted_masks.data(TINY).train.x
    early = dataclasses.replace(TINY, matched_at=1)
    for experiment, epoch in ((TINY, 2), (early, 1)):
        groups = permuted_masks.groups(experiment)
        assert same(match_dense(experiment, store, 0, "weights")[0], match_weights(groups, a[epoch], b[epoch], seed=0))
        kept = apply_masks(a[epoch], find_ticket(experiment, store, 0, 0.75).masks)
        of_ticket = match_dense(experiment, store, 0, "ticket", 0.75)[0]
        assert same(of_ticket, match_weights(groups, kept, b[epoch], seed=0))
        nets = build_network(experiment, a[epoch]), build_network(experiment, b[epoch])
        assert same(match_dense(experiment, store, 0, "activations")[0], match_activations(groups, *nets, [x]))


def test_only_the_layers_asked_for_move(finished):
    store, _ = finished
    a, b = (train_dense(TINY, store, 0, which)[0][2] for which in "ab")
    one, both = (dataclasses.replace(TINY, matched_layers=names) for names in (["fc2"], ("fc1", "fc2")))
    found = match_dense(one, store, 0, "weights")[0]
    assert same(found, match_weights({"fc2": permuted_masks.groups(TINY)["fc2"]}, a, b, seed=0))
    # The responses of a layer's units do not depend on the order of units in other layers.
    apart, together = (match_dense(experiment, store, 0, "activations")[0] for experiment in (one, TINY))
    assert same(apart, {"fc2": together["fc2"]}) and same(match_dense(both, store, 0, "activations")[0], together)
    pruned, moved = find_ticket(TINY, store, 0, 0.8).masks, method_masks(one, store, 0, 0.8, "permuted", "weights")
    assert torch.equal(moved["fc1.weight"], pruned["fc1.weight"])
    assert torch.equal(moved["head.weight"], pruned["head.weight"][:, found["fc2"]])
    records = [train_sparse(own, store, 0, 0.8, "permuted", "weights")[1] for own in (one, TINY)]
    assert records[0] != records[1]


def test_a_layer_that_cannot_move_is_named_before_any_training(store):
    with pytest.raises(ValueError, match="unknown group in matched_layers 'head': expected one of fc1, fc2"):
        run(dataclasses.replace(TINY, matched_layers=("fc1", "head")), store, **GRID)
    assert not store.folder.exists()


def test_masks_of_the_methods_have_the_zeros_of_the_ticket(finished):
    store, _ = finished
    pruned = find_ticket(TINY, store, 0, 0.8)
    masks = {method: method_masks(TINY, store, 0, 0.8, method, "weights")
             for method in permuted_masks.KNOWN_METHODS[1:]}
    assert all(layer_sparsity(mask) == layer_sparsity(pruned.masks) for mask in masks.values())
    assert all(same(masks[method], pruned.masks) for method in ("lth", "pruned", "naive"))
    permutations, _ = match_dense(TINY, store, 0, "weights")
    assert same(masks["permuted"], permute(permuted_masks.groups(TINY), permutations, pruned.masks))
    assert not same(masks["permuted"], pruned.masks) and not same(masks["random"], pruned.masks)


def test_methods_share_checkpoint_seed_and_recipe_and_differ_in_the_mask(finished, monkeypatch):
    store, _ = finished
    calls = {}

    def spy(model, train, recipe, *, seed, masks, **options):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        calls[method] = state, recipe, seed, masks

    monkeypatch.setattr(trainings, "fit", spy)
    other = dataclasses.replace(TINY, sparse_lr=0.3)  # nothing of it is finished, but all that it needs
    for method in permuted_masks.KNOWN_METHODS[1:]:
        train_sparse(other, store, 1, 0.8, method, "weights" if method == "permuted" else None)
    (a, _), (b, _) = (train_dense(TINY, store, 1, which) for which in "ab")
    assert same(calls["lth"][0], a[1]) and same(calls["pruned"][0], a[2]) and same(calls["lth"][3], calls["pruned"][3])
    for method in ("naive", "permuted", "random"):
        assert same(calls[method][0], b[1])
    assert len({(recipe, seed) for _, recipe, seed, _ in calls.values()}) == 1
    assert calls["lth"][1].epochs == 1 and calls["lth"][1].lr == 0.3
    assert all(sparsity(masks) == pytest.approx(0.8, abs=1e-3) for *_, masks in calls.values())
    assert len(list((store.folder / "dense").iterdir())) == 4


def test_a_sparse_start_is_scaled_to_the_connections_that_are_left(finished, monkeypatch):
    store, _ = finished
    starts = {}
    monkeypatch.setattr(trainings, "fit", lambda model, *_, **__: starts.update({(method, start): model.state_dict()}))
    for method, start in ((method, start) for method in ("lth", "naive", "pruned") for start in permuted_masks.STARTS):
        train_sparse(dataclasses.replace(TINY, sparse_lr=0.2, start=start), store, 0, 0.8, method)
    name, mask = "fc1.weight", find_ticket(TINY, store, 0, 0.8).masks["fc1.weight"]
    for method in ("lth", "naive"):
        one, other = (starts[method, start][name] for start in permuted_masks.STARTS)
        for row, (weights, scaled) in enumerate(zip(one, other)):
            torch.testing.assert_close(scaled, weights * (64 / max(1, int(mask[row].sum()))) ** 0.5
                                       if mask[row].any() else weights)
        assert torch.equal(starts[method, "dense"]["fc1.bias"], starts[method, "sparse"]["fc1.bias"])
    assert same(starts["pruned", "dense"], starts["pruned", "sparse"])


def test_a_sparse_start_is_a_stage_of_its_own(finished):
    store, rows = finished
    again = Store(store.folder)
    (found,) = run(dataclasses.replace(TINY, start="sparse"), again, seeds=[0], sparsities=[0.8], methods=["naive"])
    (before,) = (row for row in rows if (row["seed"], row["sparsity"], row["method"]) == (0, 0.8, "naive"))
    assert again.computed == 1 and found["loss"] != before["loss"]


def test_logits_are_those_of_which_a_run_keeps_the_accuracy(finished):
    store, rows = finished
    labels = permuted_masks.data(TINY).test.y
    states = {"dense": train_dense(TINY, store, 1, "b")[0][2], "naive": train_sparse(TINY, store, 1, 0.8, "naive")[0]}
    for method, state in states.items():
        (row,) = (row for row in rows if (row["seed"], row["method"]) == (1, method) and row["sparsity"] in (0, 0.8))
        logits = permuted_masks.logits(TINY, state)
        assert logits.shape == (360, 10) and (logits.argmax(1) == labels).double().mean() == row["accuracy"]
        assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(row["loss"], rel=1e-5)


def test_pruned_is_run_where_it_is_asked_for(finished):
    store, rows = finished
    assert "pruned" not in {row["method"] for row in rows}
    computed = store.computed
    found = run(TINY, store, **GRID, methods=["pruned"])
    assert [(row["seed"], row["sparsity"]) for row in found] == [(0, 0.5), (0, 0.8), (1, 0.5), (1, 0.8)]
    assert store.computed == computed + 4  # nothing but its own trainings
    assert tuple(found[0]) == tuple(rows[0]) and all(row["accuracy"] > 0.2 for row in found)


def test_parents():
    assert {method: permuted_masks.parent(method) for method in permuted_masks.KNOWN_METHODS} == {
        "dense": "b", "lth": "a", "pruned": "a", "permuted": "b", "naive": "b", "random": "b"}
    with pytest.raises(ValueError, match="unknown method 'a': expected one of dense, lth"):
        permuted_masks.parent("a")


@pytest.mark.parametrize("imp", ["rewind", "finetune"])
def test_rounds_rewind_or_train_on(finished, monkeypatch, imp):
    store, _ = finished
    a, _ = train_dense(TINY, store, 0, "a")
    starts, fit = [], trainings.fit

    def spy(model, *arguments, **options):
        starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return fit(model, *arguments, **options)

    monkeypatch.setattr(trainings, "fit", spy)
    found = find_ticket(dataclasses.replace(TINY, imp=imp, imp_lr=0.05), store, 0, 0.8)
    assert found.rounds == 3 and len(starts) == 2 and same(starts[0], a[1 if imp == "rewind" else 2])
    assert same(starts[1], a[1]) == (imp == "rewind")


@pytest.mark.parametrize("change, message", [
    ({"methods": ["lth", "permutated"]}, "unknown method 'permutated', perhaps 'permuted': expected one of dense"),
    ({"matchings": ["weight"]}, "unknown matching 'weight'"), ({"sparsities": [0.5, 1.5]}, "sparsity is 1.5"),
    ({"sparsities": [0]}, "sparsity is 0"), ({"seeds": [0, -1]}, "seed is -1"), ({"seeds": [0.5]}, "seed is 0.5"),
    ({"workers": 0}, "workers is 0"), ({"workers": 1.5}, "workers is 1.5"), ({"workers": True}, "workers is True"),
    ({"seeds": [0, 0]}, "seeds is [0, 0]: expected each value once"), ({"seeds": [True]}, "seed is True"),
    ({"seeds": []}, "seeds is []: expected a list with at least one value"),
    ({"methods": "lth"}, "methods is 'lth': expected a list"), ({"methods": []}, "methods is []: expected a list with"),
    ({"matchings": "weights"}, "matchings is 'weights': expected a list"),
    ({"experiment": [TINY, dataclasses.replace(TINY, model="vgg11")]}, "vgg11 halves the image five times"),
])
def test_errors_come_before_any_training(store, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**{"experiment": TINY, "store": store, **GRID, **change})
    assert not store.folder.exists()


@pytest.mark.parametrize("stage, message", [
    (lambda store: train_sparse(TINY, store, 0, 0.5, "permutated"), "unknown method 'permutated'"),
    (lambda store: train_sparse(TINY, store, 0, 0.5, "permuted", "weight"), "unknown matching 'weight'"),
    (lambda store: train_sparse(TINY, store, 0, 0.5, "permuted"), "unknown matching None"),
    (lambda store: train_sparse(TINY, store, 0, 50, "naive"), "sparsity is 50"),
    (lambda store: train_sparse(TINY, store, 0, 0.5, "lth", condensed=True), "imp_scope is 'global'"),
    (lambda store: train_sparse(FAN_IN, store, 0, 0.5, "random", condensed=True), "the method 'random': expected"),
    (lambda store: find_ticket(TINY, store, 0, 1.0), "sparsity is 1.0"),
    (lambda store: match_dense(TINY, store, 0, "names"), "unknown matching 'names'"),
    (lambda store: match_dense(TINY, store, 0, "ticket"), "sparsity is None"),
    (lambda store: train_dense(TINY, store, 0, "c"), "which is 'c'"),
])
def test_errors_of_a_single_stage_come_before_any_training(store, stage, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stage(store)
    assert not store.folder.exists()


def test_an_error_in_one_worker_ends_the_run_without_the_seeds_that_wait(tmp_path):
    store, longer = Store(tmp_path), Experiment()
    run(longer, store, seeds=[0], sparsities=[], methods=["dense"])
    (finished,) = (tmp_path / "dense").iterdir()
    finished.unlink()
    save_tensors(finished.with_suffix(".unfinished"), {}, {"kind": "another"})
    with pytest.raises(ValueError, match="holds 'another': expected a run to resume"):
        run(longer, store, seeds=range(16), sparsities=[], methods=["dense"], workers=2)
    assert len(list((tmp_path / "dense").iterdir())) < 12


@pytest.mark.parametrize("cut", [False, True])
def test_a_run_killed_in_the_middle_of_a_training_goes_on_there(finished, tmp_path, monkeypatch, cut):
    reference, rows = finished
    store, steps = Store(tmp_path), []
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)

    def forward(module, inputs):
        steps.append(len(inputs[0]))
        if len(steps) == 17:  # epoch 2 of dense B
            raise KeyboardInterrupt

    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: forward(module, inputs) if module.training and isinstance(module, torch.nn.Flatten)
        else None)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(TINY, store, seeds=[0], sparsities=[0.5], methods=["dense"])
        (unfinished,) = (tmp_path / "dense").glob("*.unfinished")
        assert len(steps) == 17
        if cut:
            unfinished.write_bytes(unfinished.read_bytes()[:-1])
        assert without_seconds(run(TINY, store, seeds=[0], sparsities=[0.5], methods=["dense"])) == [
            row for row in without_seconds(rows) if (row["seed"], row["method"]) == (0, "dense")]
    finally:
        hook.remove()
    assert len(steps) == 17 + 24 - (0 if cut else 16)  # sixteen of its steps were saved; a file cut off is of no use
    (left,) = (tmp_path / "dense").iterdir()
    assert left.suffix == ".safetensors"
    assert left.name in {path.name for path in (reference.folder / "dense").iterdir()}


def test_tickets_of_constant_fan_in_are_trained_condensed_as_under_their_mask(store):
    for method, by in (("lth", None), ("permuted", "weights")):
        masks = method_masks(FAN_IN, store, 0, 0.8, method, by)
        assert all(len(set(mask.sum(1).tolist())) == 1 for mask in masks.values())
        state, record = train_sparse(FAN_IN, store, 0, 0.8, method, by)
        condensed, of_condensed = train_sparse(FAN_IN, store, 0, 0.8, method, by, condensed=True)
        for name in ("fc1", "fc2"):
            whole = torch.zeros_like(state[f"{name}.weight"])
            whole[condensed[f"{name}.rows"][:, None], condensed[f"{name}.indices"].long()] = condensed[f"{name}.values"]
            torch.testing.assert_close(whole, state[f"{name}.weight"], rtol=1e-3, atol=1e-4)
        assert of_condensed["accuracy"] == pytest.approx(record["accuracy"], abs=2 / 360)
        assert of_condensed["achieved"] == record["achieved"] == sparsity(masks)
    assert find_ticket(FAN_IN, store, 0, 0.8).sparsity != find_ticket(TINY, store, 0, 0.8).sparsity


def test_two_processes_find_the_mask_that_one_finds(finished, tmp_path):
    store, _ = finished
    shared = dataclasses.replace(TINY, processes=2)
    found = find_ticket(shared, Store(tmp_path), 1, 0.5)
    assert same(found.masks, find_ticket(TINY, store, 1, 0.5).masks)
    one, two = (train_dense(experiment, where, 1, "a")[0][2] for experiment, where in
                ((TINY, store), (shared, Store(tmp_path))))
    assert not same(one, two)  # another order of sums: they were trained apart
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize("methods", [["dense"], ["lth"], ["lth", "permuted"], permuted_masks.KNOWN_METHODS])
def test_the_cost_is_what_a_run_trains(tmp_path, monkeypatch, methods):
    epochs = {"dense": 0, "pruning": 0, "sparse": 0}
    fit = trainings.fit

    def spy(model, train, recipe, *, resume, **options):
        epochs[{"imp_round": "pruning"}.get(resume.parent.name, resume.parent.name)] += recipe.epochs
        return fit(model, train, recipe, resume=resume, **options)

    monkeypatch.setattr(trainings, "fit", spy)
    run(TINY, Store(tmp_path), **GRID, methods=methods)
    if methods == ["dense"]:  # which is network B
        assert epochs == {"dense": 2 * 2, "pruning": 0, "sparse": 0}
    assert permuted_masks.training_epochs(TINY, **GRID, methods=methods) == epochs


FILES = {
    "cifar10": lambda root, seed: write_cifar(root, "cifar10", n_train=20, n_test=10, seed=seed),
    "fashion_mnist": lambda root, seed: write_mnist(root, "fashion_mnist", 20, 10, seed=seed),
    "svhn": lambda root, seed: write_svhn(root, 20, 10, seed=seed),
    "imagenet": lambda root, seed: write_imagenet(root, train=4, val=2, seed=seed),
    "tiny_imagenet": lambda root, seed: write_tiny_imagenet(root, train=4, val=2, seed=seed),
    "celeba": lambda root, seed: write_celeba(root, 20, 2, 10, seed=seed),
    "hatexplain": lambda root, seed: write_hatexplain(root, 20, 4, 10, seed=seed),
}


@pytest.mark.parametrize("name", FILES)
def test_what_the_data_are_decides_and_where_they_lie_never(tmp_path, name):
    """Also of folders whose images stay on disk: their names, sizes and classes."""
    options = {"verify": False} if name in ("cifar10", "fashion_mnist", "svhn", "celeba") else {}
    if name == "hatexplain":
        pytest.importorskip("transformers")
        options["tokenizer"] = str(write_tokenizer(tmp_path / "tokenizer"))

    def key(place, seed, **more):
        root = tmp_path / place
        if not root.exists():
            FILES[name](root, seed)
        experiment = Experiment(dataset=name, options=options | more, root=str(root))
        return experiment.stage_parameters("dataset", "options", "lr")

    one = key("one", 0)
    assert one == key("other", 0) and one["data"] != key("third", 1)["data"]
    assert one.keys() == {"dataset", "lr", "data", "modules"}
    if name in ("imagenet", "celeba"):  # how many processes read decides about nothing, how large images are does
        assert one == key("one", 0, readers=0) and one != key("one", 0, image_size=32)


def test_results_of_one_folder_are_not_served_for_another(tmp_path):
    """As where a subset of one's own lies in place of the whole, and the store stays."""
    store, found = Store(tmp_path / "store"), []
    for seed in (0, 1):
        write_imagenet(tmp_path / str(seed), train=4, val=2, size=40, seed=seed)
        experiment = dataclasses.replace(TINY, dataset="imagenet", root=str(tmp_path / str(seed)), batch_size=4,
                                         options={"image_size": 8, "readers": 0})
        found += run(experiment, store, seeds=[0], sparsities=[0.5], methods=["dense"])
    assert store.computed == 2 and found[0]["data"] != found[1]["data"]
    assert found[0]["loss"] != found[1]["loss"]


def test_where_files_lie_is_no_setting_to_show():
    assert "root" not in Experiment(root="a").as_dict()
    assert "nowhere" not in str(Experiment(root="/nowhere"))


@pytest.mark.parametrize("change, message", [
    ({"dataset": "shoes"}, "dataset is 'shoes': expected one of digits"),
    ({"model": "cnn"}, "model is 'cnn': expected one of mlp, lenet5, vgg11"),
    ({"options": {"fold": 1}}, "digits has no option 'fold'"), ({"processes": 0}, "processes is 0"),
    ({"matched_images": 0}, "matched_images is 0"), ({"matched_layers": "fc1"}, "matched_layers is 'fc1': expected a"),
    ({"matched_layers": []}, "matched_layers is []: expected a list with at least one value"),
    ({"matched_layers": ["fc1", "fc1"]}, "expected each value once"),
    ({"warmup": 2}, "warmup is 2"), ({"precision": "fp16"}, "precision"),
    ({"start": "warm"}, "start is 'warm': expected one of dense, sparse"),
    ({"imp": "restart"}, "imp is 'restart'"), ({"rewind": 7}, "rewind is 7: expected one of the checkpoints 0, 1, 2"),
    ({"rewind": 2}, "rewind is 2: expected less than 2"), ({"matched_at": 9}, "matched_at is 9"),
    ({"imp_rewind": 9}, "imp_rewind is 9"), ({"checkpoints": (-1, 0, 1)}, "checkpoints has -1"),
    ({"checkpoints": (0, 1, 3)}, "checkpoints has 3: expected epochs from 0"), ({"imp_rate": 1}, "imp_rate is 1"),
    ({"width": 0}, "width is 0"), ({"width": "2"}, "width is '2'"), ({"lr": -1}, "lr is -1"),
    ({"sparse_lr": 0}, "lr is 0"), ({"imp_epochs": 0}, "epochs is 0"), ({"momentum": 1.0}, "momentum is 1.0"),
    ({"batch_size": 0.5}, "batch_size is 0.5"), ({"weight_decay": -1}, "weight_decay is -1"),
    ({"epochs": "2"}, "epochs is '2': expected an integer"), ({"imp_rate": "0.5"}, "imp_rate is '0.5': expected a"),
    ({"checkpoints": ("0", "1")}, "checkpoints has '0'"), ({"rewind": "1"}, "rewind is '1'"),
    ({"lr": "0.1"}, "lr is '0.1'"), ({"imp_epochs": "1"}, "epochs is '1'"),
])
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **change)


def test_an_experiment_can_start_from_the_initialisation(store):
    rows = run(dataclasses.replace(TINY, rewind=0, imp_rewind=0), store, seeds=[3], sparsities=[0.5], methods=["naive"])
    assert [row["rewind"] for row in rows] == [0] and math.isfinite(rows[0]["loss"])


def test_settings_are_told_by_name():
    assert "width 0.1, epochs 2" in str(TINY)
    assert len(str(TINY).split(", ")) >= len(dataclasses.fields(TINY))


def test_seeds_and_sparsities_from_generators_are_not_lost(finished):
    store, rows = finished
    found = run(TINY, store, seeds=(s for s in [0]), sparsities=(s for s in [0.5]), methods=["lth"])
    assert [(row["seed"], row["sparsity"]) for row in found] == [(0, 0.5)]


PARENT = """
from permask_core.experiments.permuted_masks import Experiment, run
from permask_core.runs.store import Store
if __name__ == "__main__":
    run(Experiment(epochs=400), Store("runs"), seeds=range(4), sparsities=[0.9], workers=2)
"""


def processes():
    """Parent and command line of every process, by its number."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            yield int(folder.name), parent, (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            pass  # it ended meanwhile


def children(pid):
    rows, found = list(processes()), {pid}
    while more := {child for child, parent, _ in rows if parent in found} - found:
        found |= more
    return {child for child, _, command in rows if child in found - {pid} and "forkserver" in command}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process table below /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PERMASK_RUNS": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment)
    end = time.monotonic() + 240
    while len(workers := children(parent.pid)) < 3 and time.monotonic() < end:  # the server and its two workers
        time.sleep(0.1)
    assert len(workers) == 3 and parent.poll() is None
    time.sleep(1)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 60
    while (left := [pid for pid in workers if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def alive(pid):
    """Whether a process still runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_script_without_the_guard_is_told_what_to_do(tmp_path):
    (tmp_path / "script.py").write_text(PARENT.replace('if __name__ == "__main__":', "if True:"))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PERMASK_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode and "A script must call this below `if __name__ ==" in done.stderr


def test_a_list_that_came_as_text_is_refused_with_the_remedy(store):
    with pytest.raises(ValueError, match="sparsities is .*papermill takes lists with -y"):
        run(TINY, store, seeds=[0], sparsities="[0.9]")


def test_masks_of_a_language_model_move(tmp_path):
    small = {"options": {"length": 16, "n_train": 256, "n_test": 64}, "epochs": 2, "imp_epochs": 1, "rewind": 1}
    experiment = permuted_masks.preset("python_source-gpt", **small)
    rows = [row for row in permuted_masks.run(experiment, Store(tmp_path), seeds=[0], sparsities=[0.5])
            if row["method"] != "dense"]
    assert len(rows) == 5 and all(abs(row["achieved"] - 0.5) < 1e-3 for row in rows)
    assert len({row["loss"] for row in rows}) == 5 and all(1 < row["loss"] < 6 for row in rows)  # log(97) is 4.6
