"""Experiments with very many labels: budgets by hand, stages that are found again, kills, files in the repository's
format, and the notebook and the grid that run them."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from batch.grids import GridError, _parsed, read_grid
from permask_core.data.extreme import make_multilabel
from permask_core.experiments import extreme_labels
from permask_core.experiments.extreme_labels import (
    METHODS,
    PRESETS,
    Experiment,
    build_classifier,
    check_run,
    data,
    parameters,
    preset,
    run,
)
from permask_core.runs.store import Store
from permask_core.training.extreme import (
    ExtremeClassifier,
    ExtremeRecipe,
    fit_extreme,
    head_tail,
    precisions,
    training_bytes,
)
from tests.notebooks import run as run_notebook

ROOT = Path(__file__).parents[2]
SMALL = Experiment(labels=100, points=200, test_points=100, clusters=5, features=16, hidden=20, fan_in=10,
                   recipe=ExtremeRecipe(epochs=3, batch_size=20, rewire_every=4, auxiliary=0.4, auxiliary_epochs=2))


def numbers(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ---- Settings --------------------------------------------------------------------------------------------------------

@given(st.integers(25, 5000), st.integers(1, 200), st.data())
def test_budgets_are_used_up_and_not_exceeded(labels, hidden, drawn):
    """Trained numbers after the first layer, by hand, against those of the static rows."""
    fan_in = drawn.draw(st.integers(1, hidden))
    experiment = Experiment(labels=labels, hidden=hidden, fan_in=fan_in, recipe=ExtremeRecipe(rewire_until=0))
    static = labels * (fan_in + 1)

    def intermediate(fan_in):
        return hidden * (hidden + 1) + labels * (fan_in + 1)

    def bottleneck(units):
        return units * (hidden + 1) + labels * (units + 1)

    for method in ("static", "set", "set+auxiliary"):
        assert experiment.layers(method) == {"fan_in": fan_in, "intermediate": None}
    assert experiment.layers("dense") == {"fan_in": None, "intermediate": None}
    assume(intermediate(1) <= static and bottleneck(1) <= static)
    rows, narrow = experiment.layers("set+intermediate"), experiment.layers("bottleneck")
    assert rows["intermediate"] == hidden and narrow["fan_in"] is None
    assert intermediate(rows["fan_in"]) <= static < intermediate(rows["fan_in"] + 1)
    assert bottleneck(narrow["intermediate"]) <= static < bottleneck(narrow["intermediate"] + 1)


def test_networks_have_the_size_that_was_promised():
    experiment = preset("planted-10k")
    sizes = {method: parameters(build_classifier(experiment, method, 128, 0)) for method in METHODS}
    assert sizes["static"] == 128 * 129 + 10_000 * 17 == sizes["set"] == sizes["set+auxiliary"]
    for method in ("set+intermediate", "bottleneck"):
        assert 0.95 * sizes["static"] < sizes[method] <= sizes["static"]
    assert sizes["dense"] == 128 * 129 + 10_000 * 129 > 5 * sizes["static"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_run(name):
    chosen = preset(name)
    check_run(chosen, seeds=[0], methods=chosen.methods)
    assert chosen.methods == METHODS if name.startswith("planted") else "set+auxiliary" not in chosen.methods


def test_published_settings_are_the_published_ones():
    """Ullah et al., NeurIPS 2024; GiB of the output layer as published, without biases and the list of rows."""
    assert preset("wiki31k").layers("set+intermediate") == {"fan_in": 64, "intermediate": 4096}
    for name, dense, fan_in, digits in (("amazon-670k", 7.67, 1.60, 2), ("amazon-3m", 32.2, 6.7, 1)):
        labels, hidden = preset(name).labels, preset(name).hidden
        assert preset(name).layers("set") == {"fan_in": 128, "intermediate": None}
        assert round((training_bytes(hidden, labels) - 16 * labels) / 2 ** 30, digits) == dense
        assert round((training_bytes(hidden, labels, 128) - 24 * labels) / 2 ** 30, digits) == fan_in
    for name in ("wiki31k", "amazon-670k", "amazon-3m"):
        recipe = preset(name).recipe
        assert 300 <= recipe.rewire_every <= 1500 and recipe.rewire_until == 0.66 and 0.15 <= recipe.drop <= 0.25


def test_a_preset_is_changed_where_asked():
    chosen = preset("planted", labels=3000, recipe={"epochs": 2, "lr": None}, fan_in=12, root=None)
    standard = preset("planted")
    assert chosen == dataclasses.replace(standard, labels=3000, points=3 * standard.points, fan_in=12,
                                         recipe=dataclasses.replace(standard.recipe, epochs=2))
    assert preset("planted", labels=3000, points=500).points == 500
    assert preset("wiki31k", labels=40).points == preset("wiki31k").points


@pytest.mark.parametrize("call, message", [
    (lambda: preset("planned"), "unknown preset 'planned', perhaps 'planted': expected one of planted, planted-10k,"),
    (lambda: preset("planted", depth=3), "unknown setting 'depth': expected one of dataset,"),
    (lambda: preset("planted", recipe={"rate": 1}), "unknown setting 'rate': expected one of epochs, lr,"),
    (lambda: preset("planted", recipe={"epochs": 0}), "epochs is 0: expected an integer of at least 1"),
    (lambda: preset("planted", labels=24), "labels is 24: expected an integer of at least 25"),
    (lambda: preset("planted", labels=2.5), "labels is 2.5: expected an integer"),
    (lambda: preset("planted", fan_in=True), "fan_in is True: expected an integer of at least 1"),
    (lambda: Experiment(intermediate=0), "intermediate is 0: expected an integer of at least 1"),
    (lambda: Experiment(points=100), "points is 100: expected at least a batch of 128"),
    (lambda: Experiment(dataset=""), "dataset is '': expected 'planted', or the name of a folder"),
    (lambda: Experiment(recipe={"epochs": 2}), "recipe is {'epochs': 2}: expected an ExtremeRecipe"),
])
def test_a_setting_that_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("changes, given, message", [
    ({}, {"methods": ["set", "rigl"]}, "unknown method 'rigl': expected one of static, set,"),
    ({}, {"methods": "set"}, "methods is 'set': expected a list"),
    ({}, {"methods": []}, "methods is []: expected a list"),
    ({}, {"methods": ["set", "set"]}, "methods is ['set', 'set']: expected each value once"),
    ({}, {"seeds": [0, 0]}, "seeds is [0, 0]: expected each value once"), ({}, {"seeds": [-1]}, "seed is -1: expected"),
    ({}, {"seeds": []}, "seeds is []: expected"), ({}, {"workers": 0}, "workers is 0: expected an integer"),
    ({"fan_in": 21}, {}, "fan_in is 21, which gives 'static' rows of 21: expected 1 to 20, the inputs of the output"),
    ({"fan_in": 4}, {}, "fan_in is 4: of the 4 connections in a row of 'set', a fraction of 0.2 is dropped; expected"),
    ({"fan_in": 4, "hidden": 40}, {"methods": ["set+intermediate"]}, "fan_in is 4, which gives 'set+interm"),
    ({"fan_in": 1, "labels": 30, "hidden": 40}, {"methods": ["bottleneck"]}, "fan_in is 1: a bottleneck would have no"),
    ({"dataset": "words"}, {"methods": ["set+auxiliary"]}, "method 'set+auxiliary' needs clusters of labels, which"),
])
def test_what_cannot_be_run_is_refused_before_any_training(changes, given, message, tmp_path):
    experiment = dataclasses.replace(SMALL, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(experiment, Store(tmp_path / "runs"), **{"seeds": [0], **given})
    assert not (tmp_path / "runs").exists()


# ---- Runs ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The small experiment for two seeds: where its stages are, and its rows."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, run(SMALL, Store(folder), seeds=[0, 3])


def test_a_row_tells_of_every_run(finished):
    _, rows = finished
    assert [(row["seed"], row["method"]) for row in rows] == [(seed, method) for seed in (0, 3) for method in METHODS]
    for row in rows:
        fan_in, between = row["fan_in"], row["intermediate"]
        width = between or 20
        output = 100 * ((fan_in or width) + 1)
        assert row["parameters"] == 20 * 17 + (between or 0) * 21 + output and row["labels"] == 100
        assert row["output_layer_bytes"] == training_bytes(width, 100, fan_in)
        assert list(row["precision"]) == ["all", "head", "tail"] and len(row["losses"]) == 3 and row["seconds"] > 0
        assert all(list(of) == ["1", "3", "5"] and 0 <= min(of.values()) for of in row["precision"].values())


@pytest.mark.parametrize("method", ["static", "set+auxiliary"])
def test_a_row_is_what_its_parts_give(finished, method):
    """The same run put together by hand."""
    problem = make_multilabel(100, n_train=200, n_test=100, n_clusters=5, n_features=16, seed=3)
    static = method == "static"
    model = ExtremeClassifier(16, 100, 10, hidden=20, n_clusters=None if static else 5,
                              generator=torch.Generator().manual_seed(3))
    recipe = ExtremeRecipe(epochs=3, batch_size=20, rewire_every=4, rewire_until=0 if static else 0.66,
                           auxiliary=0.0 if static else 0.4, auxiliary_epochs=2)
    losses = fit_extreme(model, problem.train, recipe, seed=3, description=None)
    row = next(row for row in finished[1] if (row["seed"], row["method"]) == (3, method))
    found = precisions(model, problem.test, head_tail(problem.train))
    assert row["losses"] == losses
    assert row["precision"] == {group: {str(k): value for k, value in of.items()} for group, of in found.items()}
    seen = set(problem.train.labels.tolist())
    assert row["unseen"] == pytest.approx(np.mean([label not in seen for label in problem.test.labels.tolist()]))


def test_a_second_run_computes_nothing(finished):
    folder, rows = finished
    store = Store(folder)
    assert run(SMALL, store, seeds=[0, 3]) == rows and (store.computed, store.found) == (0, 12)
    # What a method does not use is not a reason to train it again.
    other = dataclasses.replace(SMALL, intermediate=12, recipe=dataclasses.replace(SMALL.recipe, auxiliary=0.2))
    same = ["static", "set", "bottleneck", "dense"]
    again = run(other, store, seeds=[0], methods=same)
    assert again == [row for row in rows if row["seed"] == 0 and row["method"] in same] and store.computed == 0
    assert run(other, store, seeds=[0], methods=["set+intermediate"])[0]["intermediate"] == 12 and store.computed == 1


def test_workers_change_nothing(finished, tmp_path):
    store = Store(tmp_path)
    rows = run(SMALL, store, seeds=[0, 3], methods=["set", "bottleneck"], workers=2)
    assert numbers(rows) == [row for row in numbers(finished[1]) if row["method"] in ("set", "bottleneck")]
    assert store.computed == 4


@pytest.mark.parametrize("method", ["set+auxiliary", "set+intermediate"])
def test_a_killed_training_goes_on_to_the_same_row(finished, method, tmp_path, monkeypatch):
    loss, steps = ExtremeClassifier.loss, []

    def until(stop):
        steps.clear()

        def counted(*given):
            steps.append(1)
            if len(steps) > stop:
                raise KeyboardInterrupt
            return loss(*given)

        monkeypatch.setattr(ExtremeClassifier, "loss", counted)

    until(17)  # of 30: in the second epoch
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, Store(tmp_path), seeds=[3], methods=[method])
    unfinished, = tmp_path.rglob("*.unfinished")
    until(1000)
    rows = run(SMALL, Store(tmp_path), seeds=[3], methods=[method])
    assert len(steps) == 20 and not unfinished.exists()
    expected = [row for row in finished[1] if (row["seed"], row["method"]) == (3, method)]
    assert numbers(rows) == numbers(expected)


# ---- Files -----------------------------------------------------------------------------------------------------------

def write_files(folder, *, labels=40, features=30, train=60, test=40, seed=0):
    """Two files in the repository's format: a label is spoken of by a word of its own."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, n in (("train", train), ("test", test)):
        lines = [f"{n} {features} {labels}"]
        for _ in range(n):
            own = sorted({int(labels * rng.random() ** 2) for _ in range(3)})
            words = {label % features: round(1 + rng.random(), 3) for label in own} | {int(rng.integers(features)): 0.5}
            lines.append(",".join(map(str, own)) + "".join(f" {word}:{value}" for word, value in sorted(words.items())))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


WORDS = dataclasses.replace(SMALL, dataset="words", labels=40, intermediate=15)


def test_files_are_read_and_their_content_decides(tmp_path):
    write_files(tmp_path / "here" / "words")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    store = Store(tmp_path / "runs")
    here, there = (dataclasses.replace(WORDS, root=str(tmp_path / name)) for name in ("here", "there"))
    rows = run(here, store, seeds=[0])
    assert [row["method"] for row in rows] == [method for method in METHODS if method != "set+auxiliary"]
    assert rows[0]["parameters"] == 30 * 20 + 40 * 11 and store.computed == 5  # an embedding has no biases
    assert run(there, store, seeds=[0]) == rows and store.computed == 5
    write_files(tmp_path / "there" / "words", seed=1)
    extreme_labels._read.cache_clear(), extreme_labels._content.cache_clear()  # as in another process
    assert run(there, store, seeds=[0], methods=["set"])[0]["losses"] != rows[1]["losses"] and store.computed == 6


def test_features_are_scaled_to_norm_one(tmp_path):
    write_files(tmp_path / "norms")
    first, *others = (tmp_path / "norms" / "train.txt").read_text().splitlines()
    others[1] = others[1].split(" ")[0]  # a point without features
    (tmp_path / "norms" / "train.txt").write_text("\n".join([first, *others]))
    train, _ = data(dataclasses.replace(WORDS, dataset="norms", root=str(tmp_path)), 0)
    norms = np.linalg.norm(train.features.toarray(), axis=1)
    assert norms[1] == 0 and np.allclose(np.delete(norms, 1), 1)


@pytest.mark.parametrize("name, changes, files, error, message", [
    ("missing", {}, None, FileNotFoundError, "expected the folder missing with train.txt, test.txt; missing: train"),
    ("other", {"labels": 41}, {}, ValueError, "train.txt of other announces 40 labels: expected 41, or another value"),
    ("few", {}, {"train": 19}, ValueError, "there are 19 points in few: expected at least a batch of 20"),
    ("headless", {}, {"test": 0}, ValueError, "three numbers above 0"),
])
def test_files_that_do_not_fit_are_refused_before_any_training(name, changes, files, error, message, tmp_path):
    if files is not None:
        write_files(tmp_path / name, **files)
    experiment = dataclasses.replace(WORDS, dataset=name, root=str(tmp_path), **changes)
    with pytest.raises(error, match=re.escape(message)):
        run(experiment, Store(tmp_path / "runs"), seeds=[0])
    assert not (tmp_path / "runs").exists()


def test_files_of_different_width_or_without_tail_are_refused(tmp_path):
    write_files(tmp_path / "wide")
    write_files(tmp_path / "more", features=31)
    shutil.copy(tmp_path / "more" / "test.txt", tmp_path / "wide" / "test.txt")
    with pytest.raises(ValueError, match="test.txt of wide announces 31 features: expected 30, as in train.txt"):
        data(dataclasses.replace(WORDS, dataset="wide", root=str(tmp_path)), 0)
    (tmp_path / "more" / "test.txt").write_text("1 31 40\n0 1:1\n")
    with pytest.raises(ValueError, match="no test point of more has a label of the tail"):
        data(dataclasses.replace(WORDS, dataset="more", root=str(tmp_path)), 0)


# ---- The notebook and the grid ---------------------------------------------------------------------------------------

def execute(folder, given):
    """The notebook with parameters, and what it left."""
    given = {"runs": str(folder / "runs"), "output": str(folder / "output"), "workers": 1, **given}
    run_notebook("extreme_labels", given, folder)
    return json.loads((folder / "output" / "results.json").read_text())


def test_the_notebook_leaves_a_row_for_every_run(tmp_path):
    found = execute(tmp_path, {"labels": 300, "seeds": 2, "first_seed": 5, "epochs": 1, "fan_in": 16})
    experiment = preset("planted", labels=300, fan_in=16, recipe={"epochs": 1})
    store = Store(tmp_path / "runs")
    rows = [{name: value for name, value in row.items() if name != "losses"}
            for row in run(experiment, store, seeds=[5, 6])]
    assert found["runs"] == rows and store.computed == 0
    assert found["settings"] | {"preset": "planted", "labels": 300, "fan_in": 16} == found["settings"]
    assert [line["output layer"] for line in found["table"]] == list(METHODS)
    own = [100 * row["precision"]["head"]["1"] for row in found["runs"] if row["method"] == "dense"]
    assert found["table"][-1]["P@1, head"].startswith(f"{np.mean(own):.1f} ± ")
    assert (tmp_path / "output" / "results.svg").stat().st_size > 1000


def test_the_notebook_reads_files_and_runs_one_method_of_one_seed(tmp_path):
    write_files(tmp_path / "wiki31k", labels=50, train=200)
    found = execute(tmp_path, {"preset": "wiki31k", "labels": 50, "seeds": 1, "methods": ["set"], "epochs": 1,
                               "data_root": str(tmp_path)})
    row, = found["runs"]
    assert (row["method"], row["labels"], row["fan_in"]) == ("set", 50, 64)
    assert row["parameters"] == 30 * 768 + 50 * 65
    line, = found["table"]
    assert line["P@1, all"] == f"{100 * row['precision']['all']['1']:.1f}"


def test_the_grid_runs_every_preset_of_files():  # it is checked in tests/batch/test_grids.py
    jobs = _parsed(ROOT / "batch" / "grids" / "extreme.yaml")[0]
    assert all(job.notebook == "extreme_labels" and job.parameters["seeds"] == 1 for job in jobs.values())
    assert {job.parameters["preset"] for job in jobs.values()} == set(PRESETS) - {"planted", "planted-10k"}
    for job in jobs.values():
        assert job.parameters["methods"][0] in preset(job.parameters["preset"]).methods


def test_a_grid_with_bad_values_is_refused_with_all_of_them(tmp_path):
    grid = tmp_path / "bad.yaml"
    grid.write_text("notebook: extreme_labels\nfixed: {preset: wiki31k, first_seed: -1, fan_in: 5000, workers: 0}\n"
                    "cross: {methods: [[set], [set+auxiliary], [sett]]}\n")
    with pytest.raises(GridError) as caught:
        read_grid(grid)
    for message in ("first_seed is -1", "fan_in is 5000", "workers is 0", "method 'set+auxiliary' needs clusters",
                    "methods is ['sett']: unknown 'sett', perhaps 'set'"):
        assert message in str(caught.value)
