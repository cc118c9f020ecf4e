"""Presets: the published settings, what a change of them changes, and what they cost."""

import re
from collections import Counter
from dataclasses import fields, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from permask_core.data.published import published_permuted_masks
from permask_core.experiments import queue
from permask_core.experiments.permuted_masks import MATCHINGS, Experiment, run
from permask_core.experiments.presets import PRESETS, Preset, experiments, preset, training_cost
from permask_core.models import build_model
from permask_core.runs.store import Store

# Adnan et al., ICML 2025, and the code that they published.
ADNAN = {"optimizer": "sgd", "momentum": 0.9, "imp": "finetune", "imp_rate": 0.2, "label_smoothing": 0.0, "warmup": 0.0}
ADNAN_CIFAR = {**ADNAN, "epochs": 200, "lr": 0.08, "sparse_lr": 0.02, "weight_decay": 5e-4, "batch_size": 128,
               "schedule": "cosine", "imp_epochs": 50, "imp_lr": 0.01, "matched_at": 200}
ADNAN_GRID = {"rewinds": (0, 5, 10, 15, 20, 25, 50, 75, 100), "seeds": 3, "matchings": ("activations",)}
RESNET20 = {"model": "resnet20", **ADNAN_CIFAR, **ADNAN_GRID, "widths": (1, 4, 8, 16),
            "sparsities": (0.8, 0.9, 0.95, 0.97)}
PUBLISHED = {
    "cifar10-resnet20": {"dataset": "cifar10", **RESNET20},
    "cifar100-resnet20": {"dataset": "cifar100", **RESNET20},
    "cifar10-vgg11": {"dataset": "cifar10", "model": "vgg11", **ADNAN_CIFAR, **ADNAN_GRID, "widths": (1,),
                      "sparsities": (0.8, 0.9)},
    "imagenet-resnet50": {"dataset": "imagenet", "model": "resnet50", **ADNAN, "epochs": 90, "lr": 0.04,
                          "weight_decay": 1e-4, "batch_size": 256, "schedule": "step", "step_epochs": 31,
                          "imp_epochs": 20, "imp_lr": 0.002, "rewinds": (0, 10, 25, 50), "widths": (1,),
                          "matched_at": 90},
    # Lasby et al., ICLR 2024: dense training and sparsities.
    "cifar10-resnet18": {"dataset": "cifar10", "model": "resnet18_cifar", "optimizer": "sgd", "epochs": 250, "lr": 0.1,
                         "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128, "widths": (1,),
                         "sparsities": (0.8, 0.9, 0.95, 0.99)},
    # Lasby et al. for the optimizer, its rate and the sparsities; torchvision's reference recipe for the rest.
    "imagenet-vit_b_16": {"dataset": "imagenet", "model": "vit_b_16", "optimizer": "adamw", "lr": 0.003, "epochs": 300,
                          "batch_size": 4096, "weight_decay": 0.3, "schedule": "cosine", "warmup": 30,
                          "label_smoothing": 0.11, "widths": (1,), "sparsities": (0.8, 0.9)},
}
TINY = {"model": "mlp", "options": {}, "epochs": 3, "imp_epochs": 2, "imp_rate": 0.5, "sparsities": [0.5, 0.8],
        "widths": [0.1, 0.2], "rewinds": [0, 2], "seeds": 2, "matchings": ["weights", "activations"]}
SEED_EPOCHS = {"dense": 2 * 3, "pruning": 2 * 2, "sparse": 2 * (3 + 1) * 5}  # worked out by hand: 0.5, 0.75, then 0.8


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name):
    chosen = preset(name)
    values = {**vars(chosen.experiment), **chosen._asdict()}
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_whole_experiment(name):
    chosen = preset(name)
    assert chosen._replace(experiment=None) == PRESETS[name]._replace(experiment=None)
    assert chosen.experiment == replace(PRESETS[name].experiment, width=chosen.widths[0], rewind=chosen.rewinds[0])
    assert chosen.experiment.matched_at == chosen.experiment.epochs
    size = {"digits": 8, "imagenet": 224}.get(chosen.experiment.dataset, 32)
    assert build_model(chosen.experiment.model, (3, size, size), 10, width=0.125).training


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].reproduces])
def test_a_preset_runs_what_was_published(name):
    chosen = preset(name)
    rows = [row for row in published_permuted_masks() if row["setting"] == chosen.reproduces]
    assert {row["width"] for row in rows} == set(chosen.widths)
    assert {row["sparsity"] for row in rows} == set(chosen.sparsities)
    assert {25} < {row["rewind"] for row in rows} - {None} <= set(chosen.rewinds)


def test_one_experiment_for_each_width_and_rewind():
    chosen = preset("cifar10-resnet20", widths=[1, 4], rewinds=[25, 0])
    assert [(one.width, one.rewind) for one in experiments(chosen)] == [(1, 25), (1, 0), (4, 25), (4, 0)]
    assert all(replace(one, width=1, rewind=25) == chosen.experiment for one in experiments(chosen))
    assert len(experiments(preset("cifar100-resnet20"))) == 4 * 9


@pytest.mark.parametrize("name", PRESETS)
def test_none_keeps_what_the_preset_says(name):
    names = {field.name for field in fields(Experiment)} - {"width", "rewind"} | set(Preset._fields[1:-1])
    assert preset(name, **dict.fromkeys(names)) == preset(name)


def test_with_fewer_epochs_what_lies_behind_the_end_goes():
    short = preset("cifar10-resnet20", epochs=30, rewinds=[10, 3])
    assert short.experiment.checkpoints == (0, 3, 5, 10, 15, 20, 25, 30)
    assert (short.experiment.matched_at, short.experiment.rewind, short.experiment.imp_rewind) == (30, 10, 0)
    assert preset("digits", epochs=2, rewinds=[0]).experiment.imp_rewind == 1
    assert preset("digits", epochs=40).experiment.checkpoints == (0, 2, 12, 40)


def test_options_are_those_of_the_data_set():
    assert preset("digits", dataset="cifar10").experiment.options == {}
    assert preset("digits", dataset="digits").experiment.options == PRESETS["digits"].experiment.options
    assert preset("digits", dataset="trifeature", options={"n_train": 9}).experiment.options == {"n_train": 9}


@pytest.mark.parametrize("changes, kept", [
    ({}, True), ({"widths": [0.25], "seeds": 1, "sparsities": [0.5]}, True), ({"precision": "bf16"}, True),
    ({"dataset": "cifar10"}, True), ({"dataset": "cifar100"}, False), ({"model": "vgg11"}, False),
    ({"epochs": 201}, False), ({"imp_epochs": 1}, False), ({"batch_size": 64}, False),
    ({"options": {"verify": False}}, False), ({"root": "elsewhere", "rewinds": [7]}, True)])
def test_what_was_published_is_not_of_other_settings(changes, kept):
    assert preset("cifar10-resnet20", **changes).reproduces == ("ResNet20/CIFAR-10" if kept else None)


def values(one):
    return st.lists(one, min_size=1, max_size=4, unique=True)


@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_any_valid_change_gives_experiments_that_can_run(name, data):
    base = PRESETS[name].experiment
    epochs = data.draw(st.none() | st.integers(1, 400), "epochs")
    length = epochs or base.epochs
    assume(length > base.warmup)
    rewinds = st.integers(0, int(length - base.warmup - 1))  # the epochs left are more than those of the warmup
    changes = {
        "epochs": epochs,
        "rewinds": data.draw(values(rewinds), "rewinds"),
        "widths": data.draw(st.none() | values(st.floats(0.01, 20)), "widths"),
        "sparsities": data.draw(st.none() | values(st.floats(0.01, 0.99)), "sparsities"),
        "matchings": data.draw(st.none() | values(st.sampled_from(MATCHINGS)), "matchings"),
        "seeds": data.draw(st.none() | st.integers(1, 9), "seeds"),
        "imp": data.draw(st.none() | st.sampled_from(["rewind", "finetune"]), "imp"),
        "batch_size": data.draw(st.none() | st.integers(1, 4096), "batch_size"),
        "precision": data.draw(st.none() | st.sampled_from(["float32", "bf16"]), "precision"),
    }
    chosen = preset(name, **changes)
    for one in experiments(chosen):
        assert {0, one.epochs, one.imp_rewind, *chosen.rewinds} <= set(one.checkpoints)
        assert one.rewind < one.epochs == one.matched_at == length == max(one.checkpoints)
    given_ones = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()
                  if value is not None}
    found = {**vars(chosen.experiment), **chosen._asdict()}
    assert {key: found[key] for key in given_ones} == given_ones
    untouched = {"lr", "momentum", "weight_decay", "schedule", "optimizer", "imp_epochs", "imp_lr", "options"}
    assert chosen.experiment.select(*untouched) == base.select(*untouched)
    assert preset(name, **changes) == chosen


@pytest.mark.parametrize("changes, message", [
    ({"nothing": 1}, "unknown setting 'nothing': expected one of widths, rewinds, seeds, sparsities, matchings, data"),
    ({"width": 2}, "unknown setting 'width': expected one of widths"),  # or it would be given and not be used
    ({"rewind": 2}, "unknown setting 'rewind'"), ({"reproduces": "x"}, "unknown setting 'reproduces'"),
    ({"experiment": 1}, "unknown setting 'experiment'"), ({"dataset": "mnist"}, "dataset is 'mnist': expected one of"),
    ({"model": "cnn"}, "model is 'cnn'"), ({"imp": "restart"}, "imp is 'restart'"),
    ({"widths": [0.5, 0]}, "widths is [0.5, 0]: width is 0: expected a factor above 0"),
    ({"widths": 1}, "widths is 1: expected a list"),
    ({"widths": []}, "widths is []: expected a list"), ({"widths": [1, 1.0]}, "widths is [1, 1.0]: expected each"),
    ({"rewinds": [2, 2]}, "rewinds is [2, 2]: expected each value once"),
    ({"rewinds": [2, 12]}, "rewinds is [2, 12]: expected epochs from 0 to 11, one before the last of 12"),
    ({"rewinds": [-1]}, "rewinds is [-1]"), ({"rewinds": [0.5]}, "rewinds is [0.5]"),
    ({"epochs": 2}, "epochs is 2: expected more than 2, the last of the rewind epochs of the preset 'digits'"),
    ({"epochs": "9"}, "epochs is '9'"), ({"epochs": 0}, "epochs is 0: expected an integer of at least 1"),
    ({"imp_epochs": -1}, "imp_epochs is -1: expected an integer of at least 1"), ({"imp_lr": 0}, "imp_lr is 0"),
    ({"sparse_lr": 0}, "sparse_lr is 0: expected a number above 0"), ({"lr": 0}, "lr is 0"),
    ({"warmup": 11, "imp_epochs": 12}, "warmup is 11: expected a number of epochs below epochs - rewind"),
    ({"warmup": 10}, "warmup is 10: expected a number of epochs below imp_epochs"),
    ({"sparsities": [0.5, 1.5]}, "sparsities is [0.5, 1.5]: sparsity is 1.5: expected a number in (0, 1)"),
    ({"sparsities": "[0.9]"}, "sparsities is '[0.9]': expected a list (papermill takes lists with -y, as in"),
    ({"sparsities": [0.9, 0.9]}, "sparsities is [0.9, 0.9]: expected each value once"),
    ({"matchings": "weights"}, "matchings is 'weights': expected a list"),
    ({"matchings": ["names"]}, "matchings is ['names']: unknown matching 'names': expected one of weights, act"),
    ({"seeds": 0}, "seeds is 0: expected an integer of at least 1"), ({"seeds": "3"}, "seeds is '3'"),
    ({"batch_size": 0}, "batch_size is 0"), ({"precision": "fp16"}, "precision is 'fp16'"),
    ({"dataset": "cifar10", "options": {"noise": 1}}, "cifar10 has no option 'noise'"),
])
def test_bad_changes_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        preset("digits", **changes)


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="unknown preset 'cifar10': expected one of digits, trifeature, trif"):
        preset("cifar10")


def test_a_run_shorter_than_its_warmup_is_refused():
    with pytest.raises(ValueError, match="warmup is 30: expected a number of epochs below epochs"):
        preset("imagenet-vit_b_16", epochs=20, rewinds=[2])
    assert preset("imagenet-vit_b_16", epochs=20, rewinds=[2], warmup=3).experiment.epochs == 20


def test_the_cost_counts_the_epochs_that_are_trained(tmp_path, monkeypatch):
    """Dense networks and tickets once for all rewind points."""
    chosen, trained, fit = preset("digits", **TINY), Counter(), queue.fit

    def spy(model, train, recipe, *, resume, **options):
        trained[len(next(model.parameters())), resume.parent.name] += recipe.epochs
        return fit(model, train, recipe, resume=resume, **options)

    monkeypatch.setattr(queue, "fit", spy)
    run(experiments(chosen), Store(tmp_path), seeds=range(chosen.seeds), sparsities=chosen.sparsities,
        matchings=chosen.matchings)
    costs = training_cost(chosen, 1000, {0.1: 10.0, 0.2: 4.0})
    for cost, width, units in zip(costs, (0.1, 0.2), (13, 26)):
        kinds = {"dense": "dense", "pruning": "imp_round", "sparse": "sparse"}
        assert {kind: trained[units, stage] for kind, stage in kinds.items()} == {
            kind: cost[kind] for kind in kinds} == {kind: 2 * n for kind, n in SEED_EPOCHS.items()}
        assert cost["width"] == width
    total = 2 * sum(SEED_EPOCHS.values())
    assert [cost["speed"] for cost in costs] == [10.0, 4.0]
    assert [cost["hours"] for cost in costs] == pytest.approx([total * 1000 / 10 / 3600, total * 1000 / 4 / 3600])


def test_the_paper_s_cost_is_what_its_settings_say():
    (cost,) = training_cost(preset("cifar10-resnet20"), 50_000, {1: 1000.0})
    left = 9 * 200 - sum(ADNAN_GRID["rewinds"])
    assert (cost["dense"], cost["pruning"], cost["sparse"]) == (3 * 2 * 200, 3 * 15 * 50, 3 * 4 * 4 * left)
    assert cost["hours"] == pytest.approx(sum(cost[k] for k in ("dense", "pruning", "sparse")) * 50 / 3600)
