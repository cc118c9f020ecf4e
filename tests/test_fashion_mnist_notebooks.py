"""The notebooks on Fashion-MNIST: with the files and without, and what they leave for the tables of a grid."""

import json

import pytest

from tests.data.files import write_mnist
from tests.notebooks import run


@pytest.fixture
def no_files(tmp_path, monkeypatch):
    """A folder without data sets, on a machine without Debian's package."""
    monkeypatch.setattr("permask_core.data.mnist.DEBIAN", tmp_path / "none")
    return {"data_root": str(tmp_path / "data")}


@pytest.mark.parametrize("name, preset", [("fashion_mnist", "noisy-digits-mlp"), ("garments", "digits")])
def test_without_the_files_digits_take_their_place(name, preset, no_files, tmp_path):
    space = run(name, no_files, tmp_path, until="check").space
    assert space["name"] == preset and space["base"].dataset == "digits"


@pytest.mark.parametrize("name, parameter, preset", [("fashion_mnist", "preset", "fashion_mnist-lenet5"),
                                                     ("garments", "pair", "fashion_mnist")])
def test_files_that_were_asked_for_must_be_there(name, parameter, preset, no_files, tmp_path):
    with pytest.raises(FileNotFoundError, match="FashionMNIST is not in"):
        run(name, no_files | {parameter: preset}, tmp_path, until="check")


def test_with_the_files_a_part_of_them_is_used(no_files, tmp_path):
    write_mnist(tmp_path / "data")
    for name, images in (("fashion_mnist", 10_000), ("garments", 2000)):
        base = run(name, no_files, tmp_path, until="check").space["base"]
        assert base.dataset == "fashion_mnist" and base.options["n_train"] == images


def test_a_method_that_does_not_exist(no_files, tmp_path):
    with pytest.raises(ValueError, match=r"methods is \['lth', 'prunde'\]: unknown 'prunde', perhaps 'pruned'"):
        run("fashion_mnist", no_files | {"methods": ["lth", "prunde"]}, tmp_path, until="check")


@pytest.mark.parametrize("name, given", [
    ("fashion_mnist", {"preset": "fashion_mnist-mlp", "widths": [0.25], "sparsities": [0.5], "seeds": 1,
                       "methods": ["dense", "lth", "permuted", "pruned"], "matchings": ["weights"]}),
    ("garments", {"pair": "fashion_mnist", "seeds": 2, "temperatures": [2]}),
])
def test_a_job_leaves_the_accuracy_on_each_garment(name, given, no_files, tmp_path):
    write_mnist(tmp_path / "data", n_train=200)
    more = {"options": {"verify": False}, "workers": 1, "first_seed": 5, "output": str(tmp_path / "out"),
            "runs": str(tmp_path / "runs")}
    run(name, no_files | given | more, tmp_path, until="output")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert len(rows) == (4 if name == "fashion_mnist" else 2 * 3) and {row["seed"] for row in rows} <= {5, 6}
    for row in rows:
        assert len(row["right"]) == 10 and list(row["right"])[6] == "shirt"
        assert sum(row["right"].values()) / 10 == pytest.approx(row["accuracy"])  # five test images of each class
        assert row["right"]["shirt"] == row["shirt named"]["shirt"]
        assert sum(row["shirt named"].values()) == pytest.approx(1)
        assert row.get("agreement", 1) == 1 or row["role"] != "teacher"
        assert ("temperature" in row and row["temperature"] is None) == (row.get("role", "distilled") != "distilled")
