"""The vocabulary of parameters: what each may be, and that every notebook keeps to it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml

from permask_core.experiments.parameters import VOCABULARY, check_parameters

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
JOBS = [path for path in NOTEBOOKS if path.stem != "results"]  # which shows what grids have left


def faults(_injected=(), _known=None, **values):
    """What is said against some parameters."""
    space = {"__annotations__": dict.fromkeys(values), **values, "In": ["", "seeds = 3", *_injected], "__name__": "x"}
    try:
        check_parameters(space, **(_known or {}))
    except ValueError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("name, values", [
    ("seeds", [0, -1, 2.5, "3", True, [3]]), ("first_seed", [-1, 0.0, "0"]), ("epochs", [0, 1.5]),
    ("sparsity", [0, 1, 1.5, float("nan"), "0.9", True, [0.9]]),
    ("sparsities", [0.9, [], [0.9, 1.0], ["0.9"], [0.9, 0.9], (0.9,), "0.9", {"a": 0.9}]),
    ("widths", [[0], [-1], [True], 1.0]), ("matchings", [["wieghts"], "weights", ["weights", "weights"]]),
    ("precision", ["float16", 32]), ("imp", ["prune"]), ("points", [1, 2.5, "7"]), ("download", ["yes", 1]),
    ("recipe", [[1], "epochs", {1: 2}]), ("alpha", [-0.1, 1.1]), ("temperatures", [[0], [1, 1]]), ("workers", [0, 1.0]),
    ("batched", [0]), ("warmup", [-1, float("inf")]), ("runs", ["", 3]), ("output", [False]),
])
def test_what_a_parameter_cannot_be_is_refused_with_the_right_form(name, values):
    for value in values:
        (line,) = faults(**{name: value})
        assert line.startswith(f"{name} is {value!r}: expected {VOCABULARY[name].expected}, as in -y '{name}: ")


def test_each_example_fits():
    for name, parameter in VOCABULARY.items():
        assert parameter.fits(yaml.safe_load(parameter.example)), name
        assert faults(**{name: yaml.safe_load(parameter.example), "seeds": None}) == []


def test_all_faults_are_reported_at_once():
    assert [line.split()[0] for line in faults(seeds=0, sparsities=0.9, workers=0, epochs=3)] == [
        "seeds", "sparsities", "workers"]


def test_what_a_notebook_itself_allows():
    known = {"minimum": {"seeds": 2}, "methods": ["dense", "rigl"], "preset": ["digits"]}
    assert faults(seeds=1, methods=["dense", "rgl"], preset="digit", _known=known) == [
        "seeds is 1: expected at least 2",
        "methods is ['dense', 'rgl']: unknown 'rgl', perhaps 'rigl'; expected some of dense, rigl",
        "preset is 'digit': unknown 'digit', perhaps 'digits'; expected one of digits"]
    assert faults(seeds=2, methods=["rigl"], preset="digits", _known=known) == []
    assert faults(seeds=None, methods=None, preset=None, _known=known) == []


def test_a_name_that_the_notebook_does_not_have_is_refused_where_papermill_gave_it():
    cell = "# Parameters\nseeds = 3\nstrict = False\nsparsites = [0.9]\n"
    assert faults([cell], seeds=3, sparsities=[0.9]) == [
        "unknown parameter 'strict': expected some of seeds, sparsities",
        "unknown parameter 'sparsites', perhaps 'sparsities': expected some of seeds, sparsities"]
    assert faults(["strict = False"], seeds=3) == []  # what a reader assigned in a cell of theirs


def test_none_is_refused_where_the_notebook_needs_a_value():
    cell = "%matplotlib inline", "seeds: int = 3  # how many\nepochs: int = None  # of each"
    assert [line.split(":")[0] for line in faults(cell, seeds=None, epochs=None)] == ["seeds is None"]
    assert faults(seeds=None, epochs=None) == []  # nothing is known of the cells


def test_a_check_does_not_wait_for_heavy_libraries():
    code = ("import sys, permask_core.experiments.parameters\n"
            "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_share_names_types_and_order(path):
    own = papermill.inspect_notebook(str(path))
    assert list(own) == [name for name in VOCABULARY if name in own], "names and order are those of the vocabulary"
    for name, one in own.items():
        assert one["inferred_type_name"] == VOCABULARY[name].type, name
        value = ast.literal_eval(one["default"])
        assert value is None or VOCABULARY[name].fits(value), f"{name} = {one['default']}"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_notebook_can_be_a_job_and_checks_its_parameters_first(path):
    assert {"first_seed", "runs", "output"} <= papermill.inspect_notebook(str(path)).keys()
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    check = cells[at + 1]
    assert "check" in check.metadata["tags"]
    calls = [node for node in ast.parse(check.source).body if not isinstance(node, ast.Import)]
    assert ast.unparse(calls[0]) == "from permask_core.experiments.parameters import check_parameters"
    first = next(node for node in calls if isinstance(node, ast.Expr))
    assert ast.unparse(first).startswith("check_parameters(globals()")
    light = {f"permask_core.experiments.{name}" for name in ("parameters", "presets")}
    assert {node.module for node in calls[:calls.index(first)]} <= light, "a wrong parameter is refused at once"
    named = papermill.inspect_notebook(str(path)).keys() & {"preset", "pair", "pairs"}
    assert named <= {keyword.arg for keyword in first.value.keywords}, "and so is an unknown preset"
    assert re.search(r"^seed_list\b", check.source, re.MULTILINE) and "check_folder(output" in check.source
    assert any(re.search(r"publish\(\s*\"results\"", cell.source) for cell in cells)
