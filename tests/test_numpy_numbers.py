"""NumPy's numbers are as good as Python's: seeds, counts, sizes and factors, and what is written of them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from permask_core.data import load_dataset
from permask_core.data.extreme import make_multilabel
from permask_core.masks import prunable_weights
from permask_core.matching import (
    derangements,
    draw_stable_weights,
    draw_weights,
    match_weights,
    permutation_groups,
    random_permutations,
)
from permask_core.models import build_model
from permask_core.pruning import magnitude_masks, random_masks
from permask_core.runs.checks import check_integer, check_work, is_integer
from permask_core.runs.store import Store, check_folder
from permask_core.runs.tables import read_table, write_table
from permask_core.training.extreme import ExtremeRecipe


def as_numpy(value):
    """Numbers in options, of NumPy's types; the floats are powers of two, which float32 holds exactly."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(as_numpy, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return np.int64(value) if isinstance(value, int) else np.float32(value)


def tensors_of(value):
    """All tensors in a result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, torch.nn.Module):
        return tensors_of(value.state_dict())
    if dataclasses.is_dataclass(value):
        return tensors_of([getattr(value, one.name) for one in dataclasses.fields(value)])
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for one in values for tensor in tensors_of(one)]


NET = build_model("mlp", (1, 4, 4), 3, width=0.125)
GROUPS = permutation_groups(NET, torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("function, positional, named", [
    (load_dataset, ("digits",), {"seed": 3, "test_size": 100, "copies": 2, "channels": 3, "noise": 0.5}),
    (load_dataset, ("trifeature",), {"seed": 3, "n_train": 200, "n_test": 100, "image_size": 16, "noise": 0.5,
                                     "correlated": "colour", "match": 0.5}),
    (make_multilabel, (50,), {"n_train": 60, "n_test": 20, "n_features": 8, "n_clusters": 5, "per_set": 4, "most": 3,
                                "noise": 0.5, "zipf": 1.0, "seed": 2}),
    (build_model, ("mlp", (3, 8, 8), 10), {"seed": 4, "width": 0.25, "depth": 3}),
    (build_model, ("resnet8", (3, 8, 8), 10), {"seed": 4, "width": 2}),
    (build_model, ("vgg11", (3, 32, 32), 10), {"seed": 4, "width": 0.125}),
    (match_weights, (GROUPS, NET.state_dict(), draw_weights(NET).float().state_dict()), {"seed": 5, "restarts": 2}),
    (random_permutations, (GROUPS,), {"seed": 5}), (derangements, (GROUPS,), {"seed": 5}),
    (draw_weights, (NET,), {"seed": 5}), (draw_stable_weights, (NET, torch.ones(2, 1, 4, 4).double()), {"seed": 5}),
    (magnitude_masks, (prunable_weights(NET), 0.5), {}),
    (random_masks, (prunable_weights(NET), dict.fromkeys(prunable_weights(NET), 0.5)), {"seed": 6}),
], ids=lambda value: getattr(value, "__name__", None))
def test_results_are_those_of_pythons_numbers(function, positional, named):
    expected = function(*positional, **named)
    found = function(*map(as_numpy, positional), **{name: as_numpy(value) for name, value in named.items()})
    assert len(tensors_of(found)) == len(tensors_of(expected)) > 0
    for one, other in zip(tensors_of(found), tensors_of(expected)):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.int16(3)])
def test_integers(value):
    assert is_integer(value)
    check_integer("n", value, 3)
    check_integer("n", value, np.int64(0), 3)
    check_work(np.arange(3), value)


@pytest.mark.parametrize("value, limits, said", [
    (True, (0,), "n is True: expected an integer of at least 0"), (2.0, (0,), "n is 2.0: expected an integer of"),
    (np.float64(2), (0,), "expected an integer"), (np.bool_(True), (0,), "expected an integer"),
    ("2", (0,), "n is '2'"), (None, (0,), "n is None"), (np.int64(2), (3,), "expected an integer of at least 3"),
    (np.int64(5), (1, 4), "expected an integer from 1 to 4")])
def test_what_is_no_integer_in_range_is_named(value, limits, said):
    with pytest.raises(ValueError, match=said):
        check_integer("n", value, *limits)


def test_a_store_does_not_tell_them_apart(tmp_path):
    store = Store(tmp_path)

    for n in (2, np.int64(2)):
        assert store.stage("one", lambda: ({"x": torch.ones(2)}, {}), n=n)[0]["x"].sum() == 2
    assert (store.computed, store.found) == (1, 1)
    folder = check_folder(tmp_path / "results", {"seeds": [np.int64(0), 1]})
    assert json.loads((folder / "settings.json").read_text()) == {"seeds": [0, 1]}


def test_tables_hold_them(tmp_path):
    write_table(tmp_path / "table.csv", [{"n": np.int64(3), "share": np.float64(0.5), "inner": {"k": np.uint8(1)}}])
    assert read_table(tmp_path / "table.csv") == [{"n": 3, "share": 0.5, "inner.k": 1}]


def test_a_recipe_takes_them():
    recipe = ExtremeRecipe(epochs=np.int64(3), lr=np.float32(0.5), batch_size=np.int64(8))
    assert recipe == ExtremeRecipe(epochs=3, lr=0.5, batch_size=8)
    for wrong in (True, 2.5):
        with pytest.raises(ValueError, match=f"epochs is {wrong}: expected an integer of at least 1"):
            ExtremeRecipe(epochs=wrong)
