"""The experiment of teacher and students, as small as it can be: what is kept, shared, found again, refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from permask_core.experiments import distilled_students
from permask_core.experiments.distilled_students import Experiment, run, select_predictions, train_network
from permask_core.models import build_model
from permask_core.runs.store import Store
from permask_core.training import Recipe, evaluate, fit, loop, predict
from permask_core.training.distillation import distil

RECIPE = Recipe(epochs=1)
TINY = Experiment(teacher_options={"width": 0.2}, teacher_recipe=replace(RECIPE, epochs=2),
                  student_options={"width": 0.1}, student_recipe=RECIPE)
GRID = {"seeds": [0, 1], "temperatures": [1, 4.0]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of everything: its store and its rows."""
    store = Store(tmp_path_factory.mktemp("transfer"))
    return store, run(TINY, store, **GRID)


def plain(rows):
    return [{name: value.tolist() if name == "predictions" else value for name, value in row.items()
             if name != "seconds"} for row in rows]


def test_one_row_per_run(finished, digits):
    _, rows = finished
    roles = [("teacher", None), ("student", None), ("distilled", 1), ("distilled", 4.0)]
    assert [(row["role"], row["temperature"], row["seed"]) for row in rows] == [
        (*one, seed) for seed in (0, 1) for one in roles]
    for row in rows:
        assert row["accuracy"] == pytest.approx((row["predictions"] == digits.test.y).double().mean().item())
        assert row["loss"] > 0 and row["seconds"] > 0


def test_networks_are_what_fit_and_distil_make(finished, digits):
    """From seeds of their own, each student with the teacher of its seed."""
    store, rows = finished
    teacher = build_model("mlp", (1, 8, 8), 10, width=0.2, seed=3)
    fit(teacher, digits.train, TINY.teacher_recipe, seed=3, description=None)
    students = [build_model("mlp", (1, 8, 8), 10, width=0.1, seed=seed) for seed in (4, 5)]
    fit(students[0], digits.train, RECIPE, seed=4, description=None)
    distil(students[1], teacher, digits.train, RECIPE, seed=5, temperature=4, description=None)
    for model, one in zip((teacher, *students), (("teacher",), ("student",), ("distilled", 4))):
        state, logits, record = train_network(TINY, store, 1, *one)
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert torch.equal(logits, predict(model, digits.test))
        assert record["accuracy"] == evaluate(model, digits.test).accuracy


def test_what_is_finished_is_found(finished, monkeypatch):
    store, rows = finished
    monkeypatch.setattr(loop, "_train", lambda *_: pytest.fail("trains again"))
    again = Store(store.folder)
    assert plain(run(TINY, again, **GRID)) == plain(rows) and again.computed == 0


def test_the_teachers_logits_are_computed_once(finished):
    store, _ = finished
    assert len(list((store.folder / "teacher_logits").iterdir())) == 2  # one for each seed


def test_what_decides_trains_anew_and_nothing_else_does(finished):
    store, rows = finished

    def trained(**changes):
        own = Store(store.folder)
        found = run(replace(TINY, **changes), own, seeds=[0], temperatures=[4])
        return own.computed, {row["role"] for row, old in zip(plain(found), [*plain(rows)[:2], plain(rows)[3]])
                              if row != old}

    assert trained(root="elsewhere") == (0, set())
    assert trained(alpha=0.5) == (1, {"distilled"})
    assert trained(scale_by_t2=False) == (1, {"distilled"})
    assert trained(student_recipe=replace(RECIPE, lr=0.05)) == (2, {"student", "distilled"})
    assert trained(teacher_options={"width": 0.3}) == (3, {"teacher", "distilled"})  # and its logits


def test_a_teacher_of_augmented_images_sees_what_the_student_sees(tmp_path):
    own = Experiment("trifeature", {"n_train": 100, "n_test": 50, "image_size": 16, "label": "shape"},
                     teacher="lenet5", teacher_recipe=replace(RECIPE, batch_size=50), student="mlp",
                     student_recipe=replace(RECIPE, batch_size=50))
    rows = run(own, Store(tmp_path), seeds=[0], temperatures=[2])
    assert not (tmp_path / "teacher_logits").exists() and len(rows) == 3
    fixed = run(replace(own, options=own.options | {"augment": False}), Store(tmp_path), seeds=[0], temperatures=[2])
    assert (tmp_path / "teacher_logits").exists() and fixed[2]["loss"] != rows[2]["loss"]


def test_workers_get_the_same_rows(finished, tmp_path):
    _, rows = finished
    assert plain(run(TINY, Store(tmp_path), **GRID, workers=2)) == plain(rows)


def test_answers_stand_in_the_order_of_the_seeds(finished):
    _, rows = finished
    found = select_predictions(rows[::-1], "distilled", 4)
    assert found.dtype == np.int64 and found.shape == (2, 360)
    assert (found[1] == rows[7]["predictions"].numpy()).all()
    with pytest.raises(ValueError, match="no run of the role 'distilled' at temperature 5"):
        select_predictions(rows, "distilled", 5)


@pytest.mark.parametrize("name", distilled_students.PRESETS)
def test_presets_change_where_they_are_asked_to(name):
    plain = distilled_students.preset(name)
    stated = distilled_students.PRESETS[name].settings
    assert plain.dataset == stated["dataset"] and plain.teacher_recipe == Recipe(**stated["teacher_recipe"])
    seeded = {"seed": 3} if name in ("digits", "trifeature", "celeba") else {}
    changed = distilled_students.preset(name, options=seeded, alpha=0.5, recipe={"batch_size": 512}, root="there",
                                      student_options=None)
    assert changed.teacher_recipe == replace(plain.teacher_recipe, batch_size=512)
    assert changed.student_recipe == replace(plain.student_recipe, batch_size=512)
    assert (changed.alpha, changed.root, changed.student_options) == (0.5, "there", plain.student_options)
    assert changed.options == plain.options | seeded


@pytest.mark.parametrize("change, message", [
    ({"name": "cifar"}, "unknown preset 'cifar', perhaps 'cifar10': expected one of digits, trifeature"),
    ({"name": "svhn", "epochs": 3}, "unknown setting 'epochs': expected one of dataset, options"),
    ({"name": "svhn", "recipe": {"epoch": 3}}, "unknown setting 'epoch', perhaps 'epochs': expected one of epochs, lr"),
    ({"name": "svhn", "recipe": {"lr": 0}}, "lr is 0"),
    ({"name": "svhn", "options": {"noise": 1}}, "svhn has no option 'noise'"),
])
def test_bad_presets_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        distilled_students.preset(**change)


@pytest.mark.parametrize("change, message", [
    ({"dataset": "shoes"}, "dataset is 'shoes': expected one of digits"),
    ({"options": {"fold": 1}}, "digits has no option 'fold'"), ({"teacher": "cnn"}, "teacher is 'cnn'"),
    ({"student": "cnn"}, "student is 'cnn'"),
    ({"teacher_options": {"depths": 2}}, "teacher_options is {'depths': 2}: mlp has no option 'depths'"),
    ({"student_options": {"depths": 2}}, "student_options is {'depths': 2}: mlp has no option 'depths'"),
 ({"alpha": 2}, "alpha is 2"), ({"scale_by_t2": 0}, "scale_by_t2 is 0"),
])
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TINY, **change)


@pytest.mark.parametrize("change, message", [
    ({"seeds": [-1]}, "seed is -1"), ({"seeds": [0.5]}, "seed is 0.5"), ({"temperatures": [2, 0]}, "temperature is 0"),
    ({"temperatures": "12"}, "temperature is '1'"), ({"workers": 0}, "workers is 0"),
    ({"seeds": [1, 0, 1]}, "seeds is [1, 0, 1]: expected each value once"),
    ({"temperatures": [4, 2, 4.0]}, "temperatures is [4, 2, 4.0]: expected each value once"),
    ({"experiment": replace(TINY, teacher="vgg11", teacher_options={})}, "vgg11 halves the image five times"),
])
def test_bad_runs_are_refused_before_training(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(**{"experiment": TINY, "store": Store(tmp_path), **GRID, **change})
    assert not list(tmp_path.iterdir())


def test_roles_and_temperatures_go_together(tmp_path):
    for role, temperature, message in (("nds", None, "unknown role 'nds': expected one of teacher, student"),
                                       ("teacher", 4, "temperature is 4 for the role 'teacher': expected none"),
                                       ("distilled", None, "temperature is None: expected a number above 0")):
        with pytest.raises(ValueError, match=re.escape(message)):
            train_network(TINY, Store(tmp_path), 0, role, temperature)
    assert distilled_students.ROLES == ("teacher", "student", "distilled")
