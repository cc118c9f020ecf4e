"""Batches of anybody's: every form gives the inputs and targets that torch's own indexing gives."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from permask_core.data import load_dataset
from permask_core.data.batches import TARGETS, batches_of, call, count, logits_of, parts_of, take_apart, to_device
from permask_core.data.splits import Split

X, Y = torch.arange(30.0).view(10, 3), torch.arange(10)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)


@pytest.mark.parametrize("data", [(X, Y), Split(X, Y), LOADER, list(LOADER), iter(list(LOADER)),
                                  [{"x": x, "labels": y} for x, y in LOADER]],
                         ids=["tensors", "split", "loader", "list", "iterator", "dicts"])
def test_every_form_has_the_same_examples(data):
    found = list(batches_of(data, batch_size=4))
    inputs = [x["x"] if isinstance(x, dict) else x for x, _ in found]
    assert [len(x) for x in inputs] == [4, 4, 2]
    assert torch.equal(torch.cat(inputs), X) and torch.equal(torch.cat([y for _, y in found]), Y)


def test_inputs_alone_have_no_targets():
    assert [(len(x), y) for x, y in batches_of(X, batch_size=4)] == [(4, None), (4, None), (2, None)]
    assert [y for _, y in batches_of([X, X])] == [None, None]


@pytest.mark.parametrize("name", TARGETS)
def test_a_dict_names_its_targets(name):
    inputs, targets = take_apart(OrderedDict(ids=X, mask=X > 3, **{name: Y}))
    assert set(inputs) == {"ids", "mask"} and targets is Y


def test_what_follows_the_first_of_three_are_targets():
    assert take_apart([X, Y, -Y])[1][1].equal(-Y) and take_apart((X,)) == (X, None)


@pytest.mark.parametrize("data, expected", [
    (load_dataset("digits"), "got a Dataset of str, Split, Split, tuple, int: expected a split such as data.train"),
    ((X.numpy(), Y.numpy()), "got a tuple of ndarray, ndarray"), ((X, Y[:4]), "got 10 inputs and 4 labels"),
    ((X,), "got a tuple of Tensor"), (X.split(2), r"got a tuple of 5 tensors, \[2, 3\] and \[2, 3\]: expected"),
    (X.view(10, 1, 3).split(5), "pass batches, such as those of tensor.split, as a list"),
    (7, "got int"), ("digits", "got str"), ({"x": X}, "got dict"),
    ([], "got a list without batches"), (iter([]), "got a list_iterator without batches"),
    ((X[:0], Y[:0]), "got a tuple without batches"), ([{"x": X, "y": Y, "labels": Y}], "a batch has labels and y"),
    ([object()], "a batch is object"),
])
def test_what_is_no_data_is_refused(data, expected):
    with pytest.raises(ValueError, match=expected):
        list(batches_of(data))


def test_a_model_is_called_with_a_tensor_a_tuple_or_a_dict():
    def model(a, b=2.0):
        return a * b

    assert call(model, X).equal(X * 2) and call(model, (X, 3)).equal(X * 3)
    assert call(model, {"a": X, "b": 4}).equal(X * 4)


@pytest.mark.parametrize("output", [X, (X, Y), [None, X], {"logits": X, "loss": Y}, {"hidden": X},
                                    SimpleNamespace(logits=X, loss=Y)])
def test_the_logits_are_found_in_an_output(output):
    assert logits_of(output) is X


@pytest.mark.parametrize("output", [None, (), {"logits": 3}, SimpleNamespace(hidden=X)])
def test_an_output_without_a_tensor_is_refused(output):
    with pytest.raises(ValueError, match="expected a tensor, an object with .logits"):
        logits_of(output)


def test_parts_are_those_of_torch_and_move_to_a_device():
    batch = {"x": X, "more": (Y, None)}
    assert count(batch) == count((X, Y)) == 10
    parts = parts_of(batch, 3)
    assert [len(part["x"]) for part in parts] == [4, 3, 3]
    assert torch.cat([part["more"][0] for part in parts]).equal(Y) and parts[0]["more"][1] is None
    assert to_device(batch, "meta")["more"][0].device.type == "meta" and to_device(batch, None) is batch


def test_an_iterable_may_say_that_it_has_no_length():
    assert [len(x) for x, _ in batches_of(tqdm((part for part in [X, X]), disable=True))] == [10, 10]
