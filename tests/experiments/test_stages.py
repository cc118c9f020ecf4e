"""Settings with changes, and NumPy's integers among them."""

import re
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permask_core.experiments import permuted_masks
from permask_core.experiments.stages import FREE, Settings, change, same_results
from permask_core.runs.store import Store
from permask_core.training import Recipe


@dataclass(frozen=True)
class Experiment(Settings):
    """One with everything that experiments have."""

    dataset: str = "digits"
    options: dict = field(default_factory=lambda: {"noise": 1.0, "copies": 5})
    root: str | None = None
    recipe: Recipe = Recipe(epochs=3)
    width: float = 1.0
    points: int = 5


numbers = st.none() | st.integers(1, 9)


@given(noise=numbers, copies=numbers, epochs=numbers, batch_size=numbers, points=numbers)
def test_what_is_changed_is_what_was_given_and_the_rest_does_not_change(noise, copies, epochs, batch_size, points):
    options = {name: value for name, value in (("noise", noise), ("copies", copies)) if value is not None}
    changed = change(Experiment(), {"options": options, "recipe": {"epochs": epochs, "batch_size": batch_size},
                                    "points": points, "width": None})
    expected = asdict(Experiment())
    expected["options"] |= options
    expected["recipe"] |= {} if epochs is None else {"epochs": epochs}
    expected["recipe"] |= {} if batch_size is None else {"batch_size": batch_size}
    expected["points"] = points or 5
    assert asdict(changed) == expected and Experiment() == change(Experiment(), {})


def test_options_of_another_data_set_replace_all_that_were_there():
    assert change(Experiment(), {"dataset": "cifar10"}).options == {}
    assert change(Experiment(), {"dataset": "cifar10", "options": {"verify": False}}).options == {"verify": False}
    assert change(Experiment(), {"dataset": "digits"}).options == {"noise": 1.0, "copies": 5}


@pytest.mark.parametrize("changes, message", [
    ({"wdith": 2}, "unknown setting 'wdith', perhaps 'width': expected one of dataset, options, root, recipe, width"),
    ({"recipe": {"epoch": 2}}, "recipe is {'epoch': 2}: unknown setting 'epoch', perhaps 'epochs': expected one of"),
    ({"recipe": {"epochs": 0}}, "recipe is {'epochs': 0}: epochs is 0: expected an integer of at least 1"),
])
def test_a_wrong_change_is_named(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        change(Experiment(), changes)


@pytest.mark.parametrize("changes, same", [
    ({}, True), ({"root": "elsewhere"}, True), ({"recipe": {"precision": "bf16", "accumulate": 3}}, True),
    ({"options": {"readers": 3}}, True), ({"options": {"noise": 2}}, False), ({"recipe": {"epochs": 4}}, False),
    ({"width": 2}, False), ({"points": 6}, True)])
def test_results_are_the_same_where_nothing_differs_that_decides(changes, same):
    assert same_results(change(Experiment(), changes), Experiment(), free=["points"]) == same


def test_what_is_free_is_the_name_of_some_setting():
    """One that was renamed would never be free."""
    names = {*asdict(permuted_masks.Experiment()), *asdict(Recipe()), "readers"}
    assert {*FREE, *permuted_masks._FREE} <= names


def test_integers_of_numpy_are_integers(tmp_path):
    plain = permuted_masks.Experiment(width=0.1, epochs=2, checkpoints=(0, 1), rewind=1, matched_at=2, imp_rewind=1,
                                      imp_epochs=1, imp_rate=0.5)
    own = {name: np.int64(getattr(plain, name)) for name in ("epochs", "rewind", "matched_at", "imp_rewind")}
    experiment = replace(plain, checkpoints=tuple(np.arange(2)), **own)
    assert experiment == plain and {type(getattr(experiment, name)) for name in own} == {int}
    assert {type(epoch) for epoch in experiment.checkpoints} == {int}
    shared = {"sparsities": [0.5], "methods": ["permuted"], "matchings": ["weights"]}
    rows = permuted_masks.run(plain, Store(tmp_path), seeds=[1, 2], **shared)
    again = Store(tmp_path)
    assert permuted_masks.run(experiment, again, seeds=np.arange(1, 3), **shared) == rows and again.computed == 0
    assert {type(row["seed"]) for row in rows} == {int}
    permuted_masks.train_sparse(plain, again, np.int64(2), 0.5, "permuted", "weights")
    assert again.computed == 0
    chosen = permuted_masks.preset("digits-mlp", epochs=np.int64(4), rewinds=np.arange(1, 3))
    assert chosen == permuted_masks.preset("digits-mlp", epochs=4, rewinds=[1, 2])
