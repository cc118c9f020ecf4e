"""Grids: what they expand to, and that all that is wrong with them is told before anything runs."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch import grids
from batch.grids import ROOT, GridError, grid_path, read_grid, unchecked
from tests.batch.tiny import write_grid, write_notebook

SHIPPED = sorted((ROOT / "batch" / "grids").glob("*.yaml"))


@pytest.fixture
def grid(tmp_path, monkeypatch):
    write_notebook(tmp_path)
    monkeypatch.setattr(grids, "ROOT", tmp_path)
    return lambda content: write_grid(tmp_path / "grid.yaml", content)


def faults(path):
    with pytest.raises(GridError) as error:
        read_grid(path)
    return str(error.value).splitlines()[1:]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_grids_that_come_with_the_book_are_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERMASK_DATA", str(tmp_path / "nothing"))
    jobs = read_grid(path)
    assert jobs and jobs == unchecked(path)
    assert list(tmp_path.iterdir()) == []  # no data were fetched, no folder made
    for job in jobs.values():
        assert re.fullmatch(r"[A-Za-z0-9._,+-]{1,200}", job.name)
        assert 0 < job.resources["threads"] <= 64 and job.resources["runtime"] > 0


def test_every_combination_is_a_job(grid):
    jobs = read_grid(grid([
        {"notebook": "tiny", "presets": {"one": {"value": 1}, "two": {"value": 2}}, "fixed": {"names": ["a"]},
         "cross": {"rate": [0.1, 0.2], "fail": [False, True]}, "resources": {"gpus": 1}},
        {"notebook": "tiny"}]))
    assert len(jobs) == 2 * 2 * 2 + 1
    job = jobs["tiny_two_rate-0.2_fail-true"]
    assert job.parameters == {"names": ["a"], "value": 2, "rate": 0.2, "fail": True}
    assert job.combination == {"preset": "two", "rate": 0.2, "fail": True}
    assert job.resources == {"threads": 1, "gpus": 1, "mem_mb": 4000, "runtime": 60}
    assert jobs["tiny"].parameters == {} and jobs["tiny"].resources["gpus"] == 0


VALUES = st.one_of(st.integers(0, 10), st.text("ab c/.'é-", max_size=4), st.booleans(), st.none(),
                   st.lists(st.sampled_from(["x/y", 0.5]), min_size=1, max_size=2))


@given(st.lists(st.lists(VALUES, min_size=1, max_size=3), min_size=1, max_size=3))
def test_names_of_jobs_are_files_and_tell_combinations_apart(lists):
    cross = {name: values for name, values in zip(("value", "names", "rate"), lists)}
    jobs = list(grids._jobs({"notebook": "tiny", "cross": cross}))
    assert [job.combination for job in jobs] == [dict(zip(cross, row)) for row in itertools.product(*lists)]
    assert all(re.fullmatch(r"[A-Za-z0-9._,+-]+", job.name) for job in jobs)


def test_three_faults_of_a_real_notebook_are_told_at_once():
    misspelt, kind, data = faults(ROOT / "tests" / "batch" / "faults.yaml")
    assert "unknown parameter 'sparsites', perhaps 'sparsities'" in misspelt
    assert "seeds is 'three', a str: expected int" in kind
    assert re.search("'cifar11': expected one of .*; perhaps cifar10$", data)


@pytest.mark.parametrize("content, expected", [
    ({"notebook": "tiny", "fixed": {"rat": 1}}, ["tiny: unknown parameter 'rat', perhaps 'rate': expected some of "]),
    ({"notebook": "tiny", "fixed": {"rate": "high"}}, ["tiny: rate is 'high', a str: expected float (in (0, 1))"]),
    ({"notebook": "tiny", "fixed": {"value": True}}, ["tiny: value is True, a bool: expected int"]),
    ({"notebook": "tiny", "fixed": {"value": None}}, ["tiny: value is None, a NoneType: expected int"]),
    ({"notebook": "tiny", "fixed": {"output": "x"}}, ["tiny: output is set by the batch itself"]),
    ({"notebook": "tiny", "cross": {"rate": [0.5, 2], "value": [1, -1]}},
     ["tiny: value is -1: expected at least 0", "tiny: rate is 2: expected a number in (0, 1)"]),
    ({"notebook": "tiny", "fixed": {"rate": 3, "value": -7}},
     ["tiny: rate is 3: expected a number in (0, 1)", "tiny: value is -7: expected at least 0"]),
    ({"notebook": "tny"}, ["unknown notebook 'tny', perhaps 'tiny': expected one of tiny"]),
    ({"notebook": "tiny", "fixd": {}}, ["unknown entry 'fixd', perhaps 'fixed'"]),
    ({"notebook": "tiny", "cross": {"value": 3, "rate": []}},
     ["cross has value: 3, expected a list", "cross has rate: []"]),
    ({"notebook": "tiny", "presets": {"a": 3}}, ["the preset a is 3: expected a mapping of parameters"]),
    ({"notebook": "tiny", "fixed": [1]}, ["fixed is [1]: expected a mapping"]),
    ({"notebook": "tiny", "resources": {"gpu": 1, "mem_mb": "4G", "runtime": 0, "gpus": -1}},
     ["resources has gpu: 1, expected", "resources has mem_mb: '4G', expected", "resources has runtime: 0, expected",
      "resources has gpus: -1, expected"]),
    ({"notebook": "tiny", "cross": {"value": [1, 1]}}, ["two jobs are called tiny_value-1"]),
    ([{"notebook": "tiny"}, 3], ["got 3: expected a mapping"]),
    ("", ["got None: expected a mapping"]),
    ({"notebook": "tiny", "cross": {"fail": [True, "yes"]}}, ["tiny: fail is 'yes', a str: expected bool"]),
])
def test_all_faults_are_told(grid, content, expected):
    lines = faults(grid(content))
    assert len(lines) == len(expected)
    for fault, line in zip(sorted(expected), sorted(text.strip() for text in lines)):
        assert line.startswith(fault)


def test_a_file_that_is_no_yaml(grid):
    with pytest.raises(GridError, match="grid.yaml is no YAML"):
        read_grid(grid("notebook: [tiny"))


def test_a_notebook_without_results_or_a_check(tmp_path, grid):
    write_notebook(tmp_path, "silent", parameters="value: int = 1  # some", check="")
    assert faults(grid({"notebook": "silent"})) == [
        "  silent leaves no results: expected a notebook with the parameters runs and output"]


def test_grids_are_found_by_name():
    assert grid_path("smoke") == grid_path(ROOT / "batch" / "grids" / "smoke.yaml")
    with pytest.raises(FileNotFoundError, match="no grid 'smok', perhaps 'smoke': expected a file, or one of "):
        grid_path("smok")
