"""The notebooks of class bias and fairness on tiny files in the published formats, and what they refuse."""

import json
import warnings

import numpy as np
import pytest
from transformers import BertConfig, DistilBertConfig

from permask_core.evaluation.fairness import demographic_parity_difference, equalized_odds_difference
from permask_core.evaluation.statistics import class_accuracies
from permask_core.experiments import distilled_students
from permask_core.runs.store import Store
from tests.data.files import (
    write_celeba,
    write_cifar,
    write_hatexplain,
    write_imagenet,
    write_svhn,
    write_tiny_imagenet,
    write_tokenizer,
)
from tests.notebooks import run, shown_table

QUICK = {"seeds": 2, "temperatures": [2, 40], "workers": 1,
         "recipe": {"epochs": 1, "lr": 0.001, "batch_size": 20, "precision": "float32", "warmup": 0}}
NARROW = {"teacher_options": {"width": 0.125}, "student_options": {"width": 0.125}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with tiny sets in the published formats."""
    root = tmp_path_factory.mktemp("data")
    write_cifar(root, "cifar10", n_train=40, n_test=40)
    write_cifar(root, "cifar100", n_train=100, n_test=200)
    write_svhn(root, n_train=40, n_test=40)
    write_tiny_imagenet(root)
    write_imagenet(root / "imagenet")
    write_celeba(root)
    write_hatexplain(root, n_test=150)
    return root


def texts(root):
    """Options of tiny networks for texts and of their tokenizer, whose files lie on disk as the hub has them."""
    words = write_tokenizer(root / "tokenizer")
    size = len((root / "tokenizer" / "vocab.txt").read_text().split())
    small = {"vocab_size": size, "max_position_embeddings": 24}
    BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **small
               ).save_pretrained(root / "bert")
    DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, **small).save_pretrained(root / "distilbert")
    return {"options": {"tokenizer": words, "length": 24}} | {
        f"{role}_options": {"source": str(root / name), "pretrained": False}
        for role, name in (("teacher", "bert"), ("student", "distilbert"))}


def record(folder):
    return json.loads((folder / "output" / "results.json").read_text())


def given(data, folder, **changes):
    return {"data_root": str(data), "runs": str(folder / "runs"), "output": str(folder / "output"), **QUICK, **changes}


@pytest.mark.parametrize("names", [["cifar10", "cifar100", "svhn"], ["tiny_imagenet", "imagenet"]])
def test_class_bias_on_every_image_set(names, data, tmp_path):
    options = {"verify": False} if "svhn" in names else {"image_size": 32, "readers": 0}
    own = given(data, tmp_path, pairs=names, options=options, **NARROW)
    if "imagenet" in names:
        own = {**own, "data_root": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERMASK_DATA", str(data))
        executed = run("class_bias", own, tmp_path, until="publish", draw=False)
        for name in names:
            own_options = {key: value for key, value in options.items() if key != "image_size" or name == "imagenet"}
            chosen = distilled_students.preset(name, options=own_options if name != "tiny_imagenet" else None,
                                             recipe=QUICK["recipe"], root=own["data_root"], **NARROW)
            store = Store(tmp_path / "runs")
            rows = distilled_students.run(chosen, store, seeds=range(2), temperatures=[2, 40])
            assert store.computed == 0  # the notebook's are the library's
            found = [one for one in record(tmp_path)["runs"] if one["pair"] == name]
            task = distilled_students.data(chosen)
            assert len(found) == 2 * 4 * task.classes
            for row in rows:
                seen = [one for one in found if (one["role"], one["temperature"], one["seed"]) == (
                    row["role"], row["temperature"], row["seed"])]
                assert [one["class"] for one in seen] == list(range(task.classes))
                assert {one["accuracy"] for one in seen} == {row["accuracy"]}
                expected = class_accuracies(task.test.y, row["predictions"], task.classes)
                assert np.allclose([one["class accuracy"] for one in seen], expected)
                assert [one["class size"] for one in seen] == np.bincount(task.test.y, minlength=task.classes).tolist()
    lines = shown_table(executed, "count")
    assert lines[0][:5] == ["pair", "", "T", "paper's count", "paired"] and len(lines) == 1 + 4 * len(names)
    assert [line[:3] for line in lines[1:]] == [
        [name, short, t] for name in names for short in ("#SC", "#TC") for t in ("2", "40")]


def test_class_bias_goes_on_where_a_network_is_right_on_no_image(tmp_path):
    def wrong_everywhere(names):
        student = next(row for row in names["rows"]["digits"] if row["role"] == "student")
        student["predictions"] = (names["truth"]["digits"] + 1) % names["classes"]["digits"]

    own = {"runs": str(tmp_path / "runs"), "output": str(tmp_path / "output"), **QUICK, "pairs": ["digits"]}
    executed = run("class_bias", own, tmp_path, until="publish", after={"run": wrong_everywhere}, draw=False)
    head, *lines = shown_table(executed, "count")
    assert [line[:3] for line in lines] == [["digits", short, t] for short in ("#SC", "#TC") for t in ("2", "40")]
    assert all(value == "undefined" for line in lines[:2] for value in line[3:])
    for line in lines[2:]:
        found = dict(zip(head, line))
        assert 0 <= int(found["paired"]) <= 10 and found["expected"] != "undefined"
    assert "Undefined: one of the networks compared is right on no test image" in record(tmp_path)["caption"]
    assert len(record(tmp_path)["runs"]) == 2 * 4 * 10 and (tmp_path / "output" / "results.svg").exists()
    assert record(tmp_path)["settings"]["dataset"] == "digits"  # those of one pair are columns


@pytest.mark.parametrize("pair, attributes", [
    ("celeba", ["Young", "Male"]), ("hatexplain", ["gender", "race", "religion", "sexual_orientation"])])
def test_groups_and_individuals_on_people_and_texts(pair, attributes, data, tmp_path):
    settings = ({"options": {"image_size": 32, "readers": 0, "verify": False}, **NARROW} if pair == "celeba" else
                texts(data))
    own = given(data, tmp_path, pair=pair, attributes=attributes, **settings)
    executed = run("group_and_individual_fairness", own, tmp_path, until="publish", draw=False)
    chosen = distilled_students.preset(pair, recipe=QUICK["recipe"], root=str(data), **{
        **settings, "options": {**settings["options"], "attributes": attributes}})
    store = Store(tmp_path / "runs")
    rows = distilled_students.run(chosen, store, seeds=range(2), temperatures=[2, 40])
    assert store.computed == 0
    test = distilled_students.data(chosen).test
    found = record(tmp_path)["runs"]
    assert len(found) == len(rows) == 2 * 4
    for one, row in zip(found, rows):
        assert one["accuracy"] == row["accuracy"] and one["individual"] >= 0
        for name in attributes:
            about = {"sensitive_features": test.attributes[name], "undefined": "omit"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                both = {"DPD": demographic_parity_difference(test.y, row["predictions"], **about),
                        "EOD": equalized_odds_difference(test.y, row["predictions"], **about)}
            for short, value in both.items():
                assert one[f"{name} {short}"] == pytest.approx(value, nan_ok=True)
    lines = shown_table(executed, "group-results")
    assert [line[0] for line in lines[1:]] == ["teacher", "student without teacher", "distilled, T = 2",
                                               "distilled, T = 40"]


@pytest.mark.parametrize("notebook, changes, error, message", [
    ("class_bias", {"pairs": ["cifar"]}, ValueError, "pairs is ['cifar']: unknown 'cifar', perhaps 'cifar10'"),
    ("class_bias", {"recipe": {"epoch": 1}}, ValueError, "recipe is {'epoch': 1}: unknown setting 'epoch', p"),
    ("class_bias", {"options": {"noize": 1}}, ValueError, "options has 'noize': no data set of digits, trifeature"),
    ("class_bias", {"seeds": 1}, ValueError, "seeds is 1: expected at least 2"),
    ("class_bias", {"temperatures": [0]}, ValueError, "temperatures is [0]: expected a list of different values"),
    ("group_and_individual_fairness", {"attributes": ["size"]}, ValueError,
     "attributes is ['size']: trifeature has no attribute 'size'; expected some of shape, texture, colour"),
    ("group_and_individual_fairness", {"pair": "hatexplain", "attributes": ["race", "age"]}, ValueError,
     "attributes is ['race', 'age']: hatexplain has no attribute 'age'; expected some of gender, race, religion"),
    ("group_and_individual_fairness", {"pair": "celeba", "attributes": ["young"]}, ValueError,
     "attributes is ['young']: celeba has no attribute 'young'; expected some of 5_o_Clock_Shadow, Arched_Eyebrows"),
    ("group_and_individual_fairness", {"pair": "svhn"}, ValueError,
     "attributes is ['colour', 'texture']: svhn has no attribute 'colour'; expected a pair on trifeature, hatexplain"),
    ("group_and_individual_fairness", {"pair": "celeba", "attributes": ["Young"]}, FileNotFoundError, "CelebA"),
    ("published_fairness", {"draws": 50}, ValueError, "draws is 50: expected at least 100"),
    ("temperature", {"unseen": 10}, ValueError, "unseen is 10: expected a digit from 0 to 9"),
])
def test_notebooks_refuse_what_they_cannot_do(notebook, changes, error, message, tmp_path):
    with pytest.raises(error) as caught:
        run(notebook, changes, tmp_path)
    assert message in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))
