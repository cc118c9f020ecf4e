"""Presets: the published settings, what a change of them changes, and what they cost."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from permask_core.data.published import published_permuted_masks
from permask_core.experiments import distilled_students, dynamic_sparsity, extreme_labels, permuted_masks, trainings
from permask_core.experiments.permuted_masks import PRESETS, Experiment, preset, reproduces, run, training_cost, vary
from permask_core.experiments.presets import DISTILLED_STUDENTS, DYNAMIC_SPARSITY, EXTREME_LABELS
from permask_core.experiments.stages import Settings
from permask_core.models import OF_TEXTS, build_model
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
TINY = {"dataset": "digits", "model": "mlp", "options": {"channels": 1, "noise": 0.0, "copies": 1}, "epochs": 3,
        "imp_epochs": 2, "imp_rate": 0.5}
TINY_GRID = {"widths": [0.1, 0.2], "rewinds": [0, 2], "seeds": 2, "sparsities": [0.5, 0.8],
             "matchings": ["weights", "activations"]}
SEED_EPOCHS = {"dense": 2 * 3, "pruning": 2 * 2, "sparse": 2 * (3 + 1) * 5}  # worked out by hand: 0.5, 0.75, then 0.8


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name):
    values = vars(preset(name)) | PRESETS[name].grid
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_whole_experiment(name):
    experiment, (settings, grid, _) = preset(name), PRESETS[name]
    assert experiment.select(*settings) == settings | {"checkpoints": experiment.checkpoints}
    assert set(experiment.checkpoints) == {*settings["checkpoints"], experiment.epochs}
    assert (experiment.width, experiment.rewind) == (grid["widths"][0], grid["rewinds"][0])
    assert experiment.matched_at == experiment.epochs
    assert set(grid) == {"widths", "rewinds", "seeds", "sparsities", "matchings"}
    channels = 1 if experiment.options.get("channels", 1) == 1 and experiment.dataset == "digits" else 3
    size = {"digits": 8, "imagenet": 224}.get(experiment.dataset, 32)
    shape = (32,) if experiment.model in OF_TEXTS else (channels, size, size)
    assert build_model(experiment.model, shape, 10, width=0.125).training


@pytest.mark.parametrize("module", [permuted_masks, distilled_students, dynamic_sparsity, extreme_labels])
def test_all_experiments_have_one_form(module):
    for name, chosen in module.PRESETS.items():
        experiment = module.preset(name)
        assert isinstance(experiment, module.Experiment) and isinstance(experiment, Settings)
        assert module.preset(name, **dict.fromkeys(chosen.settings)) == experiment
        with pytest.raises(ValueError, match="unknown setting 'datasets', perhaps 'dataset': expected one of dataset"):
            module.preset(name, datasets="digits")
        with pytest.raises(dataclasses.FrozenInstanceError):
            experiment.dataset = "other"
    with pytest.raises(ValueError, match="unknown preset 'nothing': expected one of "):
        module.preset("nothing")
    assert list(inspect.signature(module.run).parameters)[:3] == ["experiment", "store", "seeds"]


def test_presets_are_plain_data_that_do_not_wait_for_heavy_libraries():
    code = ("import sys, permask_core.experiments.presets\n"
            "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    for presets in (PRESETS, DISTILLED_STUDENTS, DYNAMIC_SPARSITY, EXTREME_LABELS):
        settings = {name: chosen.settings for name, chosen in presets.items()}
        assert ast.literal_eval(repr(settings)) == settings


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].reproduces])
def test_a_preset_runs_what_was_published(name):
    grid = PRESETS[name].grid
    rows = [row for row in published_permuted_masks() if row["setting"] == reproduces(name, preset(name))]
    assert {row["width"] for row in rows} == set(grid["widths"])
    assert {row["sparsity"] for row in rows} == set(grid["sparsities"])
    assert {25} < {row["rewind"] for row in rows} - {None} <= set(grid["rewinds"])


def test_one_experiment_for_each_width_and_rewind():
    base = preset("cifar10-resnet20", rewinds=[25, 0])
    experiments = vary(base, [1, 4], [25, 0])
    assert [(one.width, one.rewind) for one in experiments] == [(1, 25), (1, 0), (4, 25), (4, 0)]
    assert all(replace(one, width=1, rewind=25) == base for one in experiments)


@pytest.mark.parametrize("name", PRESETS)
def test_none_keeps_what_the_preset_says(name):
    names = ["rewinds", *(field.name for field in fields(Experiment))]
    assert preset(name, **dict.fromkeys(names)) == preset(name)
    assert PRESETS[name].change_grid(**dict.fromkeys(PRESETS[name].grid)) == PRESETS[name].grid


def test_a_grid_is_changed_where_asked():
    grid = PRESETS["digits"].grid
    assert PRESETS["digits"].change_grid(seeds=7, widths=None) == grid | {"seeds": 7}
    with pytest.raises(ValueError, match="unknown value of the grid 'seed', perhaps 'seeds': expected one of widths"):
        PRESETS["digits"].change_grid(seed=7)


def test_with_fewer_epochs_what_lies_behind_the_end_goes():
    short = preset("cifar10-resnet20", epochs=30, rewinds=[10, 3])
    assert short.checkpoints == (0, 3, 5, 10, 15, 20, 25, 30)
    assert (short.matched_at, short.rewind, short.imp_rewind) == (30, 10, 0)
    assert preset("digits", epochs=2, rewind=0).imp_rewind == 1
    assert preset("digits", epochs=40).checkpoints == (0, 2, 40)
    assert preset("digits", checkpoints=(0, 5), matched_at=7).checkpoints == (0, 2, 5, 7, 12)


def test_options_are_those_of_the_data_set():
    own = PRESETS["digits"].settings["options"]
    assert preset("digits", dataset="cifar10").options == {}
    assert preset("digits", dataset="digits").options == own
    assert preset("digits", options={"noise": 0.5}).options == own | {"noise": 0.5}
    assert preset("digits", dataset="trifeature", options={"n_train": 9}).options == {"n_train": 9}
    changed = distilled_students.preset("digits", student="lenet5", teacher_options={"depth": 3})
    assert changed.student_options == {} and changed.teacher_options == {"depth": 3}


@pytest.mark.parametrize("changes, kept", [
    ({}, True), ({"width": 0.25}, True), ({"precision": "bf16"}, True),
    ({"dataset": "cifar10"}, True), ({"dataset": "cifar100"}, False), ({"model": "vgg11"}, False),
    ({"epochs": 201}, False), ({"imp_epochs": 1}, False), ({"batch_size": 64}, False),
    ({"options": {"verify": False}}, False), ({"root": "elsewhere", "rewinds": [7]}, True)])
def test_what_was_published_is_not_of_other_settings(changes, kept):
    found = reproduces("cifar10-resnet20", preset("cifar10-resnet20", **changes))
    assert found == ("ResNet20/CIFAR-10" if kept else None)


@pytest.mark.parametrize("changes, kept", [
    ({}, True), ({"root": "elsewhere", "processes": 2}, True), ({"recipe": {"precision": "float32"}}, True),
    ({"recipe": {"accumulate": 8}}, True), ({"options": {"readers": 4}}, True),
    ({"options": {"image_size": 64}}, False), ({"width": 0.5}, False), ({"every": 100}, False),
    ({"recipe": {"epochs": 90}}, False)])
def test_what_was_published_of_dynamic_sparsity_is_not_of_other_settings(changes, kept):
    found = dynamic_sparsity.reproduces("imagenet-resnet50", dynamic_sparsity.preset("imagenet-resnet50", **changes))
    assert found == ("ResNet50/ImageNet" if kept else None)


def values(one):
    return st.lists(one, min_size=1, max_size=4, unique=True)


@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_any_valid_change_gives_experiments_that_can_run(name, data):
    base = preset(name)
    epochs = data.draw(st.none() | st.integers(1, 400), "epochs")
    length = epochs or base.epochs
    assume(length > base.warmup)
    rewinds = data.draw(values(st.integers(0, int(length - base.warmup - 1))), "rewinds")  # warmup fits
    changes = {
        "epochs": epochs,
        "width": data.draw(st.none() | st.floats(0.01, 20), "width"),
        "imp": data.draw(st.none() | st.sampled_from(["rewind", "finetune"]), "imp"),
        "batch_size": data.draw(st.none() | st.integers(1, 4096), "batch_size"),
        "precision": data.draw(st.none() | st.sampled_from(["float32", "bf16"]), "precision"),
    }
    chosen = preset(name, rewinds=rewinds, **changes)
    for one in vary(chosen, [0.5, 1], rewinds):
        assert {0, one.epochs, one.imp_rewind, *rewinds} <= set(one.checkpoints)
        assert one.rewind < one.epochs == one.matched_at == length == max(one.checkpoints)
    given_ones = {key: value for key, value in changes.items() if value is not None}
    assert chosen.select(*given_ones) == given_ones
    untouched = {"lr", "momentum", "weight_decay", "schedule", "optimizer", "imp_epochs", "imp_lr", "options"}
    assert chosen.select(*untouched) == base.select(*untouched)
    assert preset(name, rewinds=rewinds, **changes) == chosen


@pytest.mark.parametrize("changes, message", [
    ({"nothing": 1}, "unknown setting 'nothing': expected one of dataset, options, root, model"),
    ({"widths": [2]}, "unknown setting 'widths', perhaps 'width': expected one of dataset"),
    ({"dataset": "shoes"}, "dataset is 'shoes': expected one of"),
    ({"model": "cnn"}, "model is 'cnn'"), ({"imp": "restart"}, "imp is 'restart'"),
    ({"width": 0}, "width is 0: expected a factor above 0"),
    ({"rewinds": [2, 12]}, "rewind is 12: expected an epoch from 0 to 11, before the end of 12"),
    ({"rewinds": [-1]}, "rewind is -1"), ({"rewinds": [0.5]}, "rewind is 0.5"), ({"rewinds": []}, "rewinds is []"),
    ({"rewinds": [2, 2]}, "rewinds is [2, 2]: expected each value once"),
    ({"rewind": 12}, "rewind is 12: expected an epoch from 0 to 11, before the end of 12"),
    ({"epochs": 2}, "rewind is 2: expected an epoch from 0 to 1, before the end of 2"),
    ({"epochs": "9"}, "epochs is '9'"), ({"epochs": 0}, "epochs is 0: expected an integer of at least 1"),
    ({"imp_epochs": -1}, "imp_epochs is -1: expected an integer of at least 1"), ({"imp_lr": 0}, "imp_lr is 0"),
    ({"sparse_lr": 0}, "sparse_lr is 0: expected a number above 0"), ({"lr": 0}, "lr is 0"),
    ({"warmup": 11, "imp_epochs": 12}, "warmup is 11: expected a number of epochs below epochs - rewind"),
    ({"warmup": 10}, "warmup is 10: expected a number of epochs below imp_epochs"),
    ({"checkpoints": (0, 99)}, "checkpoints has 99: expected epochs from 0 to 12"),
    ({"batch_size": 0}, "batch_size is 0"), ({"precision": "fp16"}, "precision is 'fp16'"),
    ({"dataset": "cifar10", "options": {"noise": 1}}, "cifar10 has no option 'noise'"),
])
def test_bad_changes_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        preset("digits", **changes)


def test_an_unknown_preset_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="unknown preset 'cifar10-resnet2', perhaps 'cifar10-resnet20': expected one"):
        preset("cifar10-resnet2")


def test_a_run_shorter_than_its_warmup_is_refused():
    with pytest.raises(ValueError, match="warmup is 30: expected a number of epochs below epochs"):
        preset("imagenet-vit_b_16", epochs=20, rewinds=[2])
    assert preset("imagenet-vit_b_16", epochs=20, rewinds=[2], warmup=3).epochs == 20


def test_the_cost_counts_the_epochs_that_are_trained(tmp_path, monkeypatch):
    """Dense networks and tickets once for all rewind points."""
    grid = PRESETS["digits"].change_grid(**TINY_GRID)
    base, trained, fit = preset("digits", rewinds=grid["rewinds"], **TINY), Counter(), trainings.fit

    def spy(model, train, recipe, *, resume, **options):
        trained[len(next(model.parameters())), resume.parent.name] += recipe.epochs
        return fit(model, train, recipe, resume=resume, **options)

    monkeypatch.setattr(trainings, "fit", spy)
    run(vary(base, grid["widths"], grid["rewinds"]), Store(tmp_path), seeds=range(grid["seeds"]),
        sparsities=grid["sparsities"], matchings=grid["matchings"])
    costs = training_cost(base, grid, 1000, {0.1: 10.0, 0.2: 4.0})
    for cost, width, units in zip(costs, (0.1, 0.2), (13, 26)):
        kinds = {"dense": "dense", "pruning": "imp_round", "sparse": "sparse"}
        assert {kind: trained[units, stage] for kind, stage in kinds.items()} == {
            kind: cost[kind] for kind in kinds} == {kind: 2 * n for kind, n in SEED_EPOCHS.items()}
        assert cost["width"] == width
    total = 2 * sum(SEED_EPOCHS.values())
    assert [cost["speed"] for cost in costs] == [10.0, 4.0]
    assert [cost["hours"] for cost in costs] == pytest.approx([total * 1000 / 10 / 3600, total * 1000 / 4 / 3600])


def test_the_paper_s_cost_is_what_its_settings_say():
    (cost,) = training_cost(preset("cifar10-resnet20"), PRESETS["cifar10-resnet20"].grid, 50_000, {1: 1000.0})
    left = 9 * 200 - sum(ADNAN_GRID["rewinds"])
    assert (cost["dense"], cost["pruning"], cost["sparse"]) == (3 * 2 * 200, 3 * 15 * 50, 3 * 4 * 4 * left)
    assert cost["hours"] == pytest.approx(sum(cost[k] for k in ("dense", "pruning", "sparse")) * 50 / 3600)
