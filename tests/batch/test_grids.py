"""Grids: what they expand to, and that all that is wrong with them is reported before anything runs."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch import grids
from batch.grids import ROOT, GridError, freeze, frozen, grid_path, read_grid
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
    monkeypatch.setattr("permask_core.experiments.stages.check_files", lambda name, root: None)
    monkeypatch.setattr("permask_core.experiments.extreme_labels.check_there", lambda *_: None)
    jobs = read_grid(path)
    assert list(tmp_path.iterdir()) == []  # no data were fetched, no folder made
    assert jobs and jobs == frozen(freeze(jobs, tmp_path))
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


def test_all_faults_of_a_real_notebook_are_reported_at_once():
    lines = faults(ROOT / "tests" / "batch" / "faults.yaml")
    for expected in ("unknown parameter 'sparsites', perhaps 'sparsities'", "seeds is 'three', a str: expected int",
                     "workers is 0: expected an integer of at least 1", "batched is 0: expected an integer",
                     "matchings is ['wieghts']: expected", "imp_epochs is -1: expected", "'cifar11'"):
        assert [line for line in lines if expected in line], expected
    assert len(lines) == 7, lines


@pytest.mark.parametrize("notebook, parameters, expected", [
    ("cifar", {"matchings": ["wieghts"], "sparsities": [0.9, 1.2]}, ["sparsities", "matchings"]),
    ("cifar", {"model": "resnet21"}, ["model"]),
    ("group_and_individual_fairness", {"attributes": ["color"]}, ["attributes"]),
    ("class_bias", {"pairs": ["digit"], "temperatures": [0]}, ["pairs", "temperatures"]),
    ("sparse_training_on_images", {"methods": ["rgl"], "precision": "float16"}, ["methods", "precision"]),
    ("extreme_labels", {"preset": "planned", "seeds": 0}, ["preset", "seeds"]),
])
def test_faults_are_reported_under_the_names_that_the_user_wrote(tmp_path, notebook, parameters, expected):
    lines = faults(write_grid(tmp_path / "grid.yaml", {"notebook": notebook, "fixed": parameters}))
    assert {line.split(": ")[1].split()[0] for line in lines} == set(expected) and len(lines) == len(expected), lines


def test_the_smallest_grid_of_every_notebook_has_every_notebook():
    jobs = read_grid(ROOT / "tests" / "batch" / "every.yaml")
    assert set(jobs) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} - {"results"}


def test_seeds_that_two_jobs_have_in_common_are_refused(tmp_path):
    content = {"notebook": "cifar", "fixed": {"preset": "digits", "seeds": 3}, "cross": {"first_seed": [0, 1]}}
    assert [line.strip() for line in faults(write_grid(tmp_path / "grid.yaml", content))] == [
        f"cifar: first_seed 0 and 1 both give the seed {seed}: expected seeds: 1, or values of first_seed that are 3 "
        "apart" for seed in (1, 2)]
    for fixed, cross in (({"seeds": 1}, [0, 1]), ({"seeds": 3}, [0, 3])):
        content["fixed"] = {"preset": "digits"} | fixed
        content["cross"] = {"first_seed": cross, "sparsities": [[0.9], [0.95]]}
        assert len(read_grid(write_grid(tmp_path / "grid.yaml", content))) == 4


def test_missing_files_are_reported_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PERMASK_DATA", str(tmp_path / "nothing"))
    lines = faults(ROOT / "batch" / "grids" / "distillation.yaml")
    assert len(lines) == 5  # SVHN, CIFAR-10, CIFAR-100, Tiny ImageNet and ImageNet, of 63 jobs
    assert all("is not in" in line and "ownload" in line for line in lines)


@pytest.mark.parametrize("content, expected", [
    ({"notebook": "tiny", "fixed": {"rat": 1}}, ["tiny: unknown parameter 'rat', perhaps 'rate': expected some of "]),
    ({"notebook": "tiny", "fixed": {"rate": "high"}}, ["tiny: rate is 'high', a str: expected float (in (0, 1))"]),
    ({"notebook": "tiny", "fixed": {"value": True}}, ["tiny: value is True, a bool: expected int"]),
    ({"notebook": "tiny", "fixed": {"value": None}}, ["tiny: value is None, a NoneType: expected int"]),
    ({"notebook": "tiny", "fixed": {"output": "x"}}, ["tiny: output is set by the batch"]),
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
    ("notebook: tiny\nfixed: {value: 1, value: 2}\ncross:\n  rate: [0.5]\n  rate: [0.6]\n",
     ["line 2 has 'value' a second time", "line 5 has 'rate' a second time"]),
    ({"notebook": "tiny", "presets": {"a": {"rate": 0.5}}, "fixed": {"value": 1},
      "cross": {"rate": [0.1], "value": [2]}},
     ["value is in fixed and in cross: expected it in one", "rate is in cross and in the preset a: expected"]),
    ({"notebook": "../tiny"}, ["unknown notebook '../tiny', perhaps 'tiny': expected one of tiny"]),
    ({"notebook": 3}, ["unknown notebook 3: expected one of tiny"]),
    ("notebook: 2026-01-01", ["unknown notebook datetime.date(2026, 1, 1): expected one of tiny"]),
    ({"notebook": "tiny", "presets": {"../../../evil": {}, 3: {}, "": {}}},
     ["a preset has the name '../../../evil': expected letters", "a preset has the name 3: expected",
      "a preset has the name ''"]),
    ("notebook: tiny\nfixed: {value: 2026-01-01, 7: 1}",
     ["fixed has value: datetime.date(2026, 1, 1), which holds a date: expected texts", "fixed has the name 7, a int"]),
    ("notebook: tiny\nfixed: {rate: .nan}", ["fixed has rate: nan, which holds a number that is not finite"]),
    ({"notebook": "tiny", "cross": {"names": [["a" * 200]]}}, ["a job has the name tiny_names-aaa"]),
    ("[]", ["the grid is empty: expected a mapping"]),
    ({"notebook": "tiny", "resources": {"threads": True}}, ["resources has threads: True, expected integers"]),
    ({"notebook": "tiny", "resources": {"gpu": 1, "mem_mb": "4G", "runtime": 0, "gpus": -1}},
     ["resources has gpu: 1, expected", "resources has mem_mb: '4G', expected", "resources has runtime: 0, expected",
      "resources has gpus: -1, expected"]),
    ({"notebook": "tiny", "cross": {"value": [1, 1]}}, ["two jobs have the name tiny_value-1"]),
    ([{"notebook": "tiny"}, 3], ["got 3: expected a mapping"]),
    ("", ["the grid is empty: expected a mapping"]),
    ({"notebook": "tiny", "cross": {"fail": [True, "yes"]}}, ["tiny: fail is 'yes', a str: expected bool"]),
])
def test_all_faults_are_told(grid, content, expected):
    lines = faults(grid(content))
    assert len(lines) == len(expected)
    for fault, line in zip(sorted(expected), sorted(text.strip() for text in lines)):
        assert line.startswith(fault)


def test_a_file_that_is_no_yaml(grid):
    with pytest.raises(GridError, match="grid.yaml is not YAML"):
        read_grid(grid("notebook: [tiny"))


def test_a_notebook_without_results_or_a_check(tmp_path, grid):
    write_notebook(tmp_path, "silent", parameters="value: int = 1  # some", check="")
    assert faults(grid({"notebook": "silent"})) == [
        "  silent writes no results: expected a notebook with the parameters runs and output"]


def test_grids_are_found_by_name():
    assert grid_path("smoke") == grid_path(ROOT / "batch" / "grids" / "smoke.yaml")
    with pytest.raises(FileNotFoundError, match="no grid 'smok', perhaps 'smoke': expected a file, or one of "):
        grid_path("smok")
    with pytest.raises(FileNotFoundError, match="no grid '': expected a file, or one of .*smoke"):
        grid_path("")


def test_an_edit_of_the_grid_changes_nothing_that_was_checked(grid, tmp_path):
    path = grid({"notebook": "tiny", "cross": {"value": [1, 2]}})
    checked = freeze(read_grid(path), tmp_path / "out")
    grid({"notebook": "tiny", "cross": {"value": [3]}})
    other = freeze(read_grid(path), tmp_path / "out")
    assert list(frozen(checked)) == ["tiny_value-1", "tiny_value-2"] and list(frozen(other)) == ["tiny_value-3"]
    grid({"notebook": "tiny", "cross": {"value": [1, 2]}})
    assert freeze(read_grid(path), tmp_path / "out") == checked


def test_what_is_finished_is_not_checked_again(grid):
    path = grid({"notebook": "tiny", "cross": {"value": [1, -1]}})
    assert len(read_grid(path, lambda job: job.parameters["value"] < 0)) == 2
    assert len(faults(path)) == 1
