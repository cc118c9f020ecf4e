"""Experiments whose networks are trained at once, against the same experiments with one network after the other."""

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from permask_core.experiments import permuted_masks, trainings
from permask_core.runs.store import Store
from permask_core.training.batched import Batch, evaluate_batched
from tests.experiments.test_permuted_masks import TINY, files, without_seconds
from tests.hypotheses import LONG
from tests.notebooks import ROOT

GRID = {"seeds": [0, 1], "sparsities": [0.5, 0.8]}


@pytest.fixture
def batches(monkeypatch):
    """How many networks each call trains."""
    calls, whole = [], trainings.fit_batched

    def spy(models, *given, **options):
        calls.append(len(models))
        return whole(models, *given, **options)

    monkeypatch.setattr(trainings, "fit_batched", spy)
    return calls


@pytest.mark.parametrize("model", ["mlp", "resnet8"])
def test_a_batched_experiment_is_that_one_by_one(tmp_path, batches, model):
    experiment = dataclasses.replace(TINY, model=model, width=0.1 if model == "mlp" else 0.125)
    one_by_one, at_once = Store(tmp_path / "alone"), Store(tmp_path / "batched")
    alone = permuted_masks.run(experiment, one_by_one, **GRID)
    assert batches == []
    found = permuted_masks.run(experiment, at_once, **GRID, batched=100)
    # Two networks of each seed; two rounds of pruning; five methods at two sparsities.
    assert batches == [4, 2, 2, 20]
    numbers = ("accuracy", "loss", "seconds")
    assert [{key: value for key, value in row.items() if key not in numbers} for row in found] == [
        {key: value for key, value in row.items() if key not in numbers} for row in alone]
    for one, other in zip(found, alone):
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.02)
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02) and one["seconds"] > 0
    assert {path for path in files(at_once) if path.suffix} == {path for path in files(one_by_one) if path.suffix}
    assert at_once.computed == one_by_one.computed
    again = Store(tmp_path / "alone")  # what was made one by one is found, and the other way around
    assert permuted_masks.run(experiment, again, **GRID, batched=100) == alone and again.computed == 0
    assert len(batches) == 4


def test_no_more_are_trained_at_once_than_asked_for(tmp_path, batches):
    permuted_masks.run(TINY, Store(tmp_path), **GRID, methods=["naive", "random"], batched=3)
    assert sum(batches) == 4 + 2 * 2 + 8 and batches[-3:] == [3, 3, 2] and max(batches) == 3


def test_the_seconds_of_a_batch_are_shared_among_its_networks(tmp_path, monkeypatch):
    whole, clock = trainings.fit_batched, [0.0]

    def slow(*given, **options):
        clock[0] += 2
        return whole(*given, **options)

    monkeypatch.setattr(trainings, "fit_batched", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    rows = permuted_masks.run(TINY, Store(tmp_path), seeds=[0, 1], sparsities=[0.5], methods=["dense"], batched=4)
    assert [row["seconds"] for row in rows] == [1, 1]


def test_an_experiment_killed_between_its_stages_goes_on(tmp_path, batches, monkeypatch):
    whole = permuted_masks.run(TINY, Store(tmp_path / "whole"), **GRID, batched=100)
    del batches[:]
    store, train = Store(tmp_path / "killed"), permuted_masks.train_batched

    def interrupted(*given):
        if len(batches) == 3:
            raise KeyboardInterrupt
        return train(*given)

    monkeypatch.setattr(permuted_masks, "train_batched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        permuted_masks.run(TINY, store, **GRID, batched=100)
    monkeypatch.setattr(permuted_masks, "train_batched", train)
    assert without_seconds(permuted_masks.run(TINY, store, **GRID, batched=100)) == without_seconds(whole)
    assert batches == [4, 2, 2, 20]  # nothing twice
    assert not list((tmp_path / "killed" / "batched").iterdir())


def test_a_training_killed_before_it_is_stored_is_not_done_again(tmp_path, monkeypatch):
    whole = permuted_masks.run(TINY, Store(tmp_path / "whole"), **GRID, methods=["dense"], batched=100)
    store, steps, forward = Store(tmp_path / "killed"), [], Batch.forward
    monkeypatch.setattr(Batch, "forward", lambda self, x: steps.append(self.training) or forward(self, x))
    monkeypatch.setattr(trainings, "evaluate_batched", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        permuted_masks.run(TINY, store, **GRID, methods=["dense"], batched=100)
    trained = sum(steps)
    assert trained and len(list((tmp_path / "killed" / "batched").iterdir())) == 1
    monkeypatch.setattr(trainings, "evaluate_batched", evaluate_batched)
    again = permuted_masks.run(TINY, store, **GRID, methods=["dense"], batched=100)
    assert without_seconds(again) == without_seconds(whole)
    assert sum(steps) == trained


@pytest.mark.parametrize(("change", "said"), [
    ({"batched": 0}, "batched is 0: expected an integer of at least 1"),
    ({"batched": 2.0}, "batched is 2.0: expected an integer"),
    ({"batched": 2, "workers": 2}, "batched is 2 with several processes"),
    ({"batched": 2, "experiment": [TINY, dataclasses.replace(TINY, processes=2)]}, "batched is 2 with several"),
])
def test_what_cannot_be_is_refused_before_any_training(store, change, said):
    with pytest.raises(ValueError, match=said):
        permuted_masks.run(**{"experiment": TINY, "store": store, **GRID, **change})
    assert not store.folder.exists()


def test_an_error_of_a_training_is_that_of_the_batch(store):
    def build():
        raise ValueError("no such network")

    training = trainings.Training(TINY, "dense", {}, build, TINY.recipe(1, 0.1), 0, lambda *given: given)
    with pytest.raises(ValueError, match="no such network"):
        trainings.train_batched(store, [training], 2)


AT_ONCE = """
import sys, torch
from permask_core.experiments import permuted_masks
from permask_core.experiments import trainings
from permask_core.runs.store import Store
from tests.experiments.test_trainings import GRID, TINY

torch.set_num_threads(1)
whole, alone, trained = trainings.fit_batched, trainings.fit, []
trainings.fit_batched = lambda models, *given, **more: trained.extend([len(models)]) or whole(models, *given, **more)
if sys.argv[2] == "1":
    trainings.fit = lambda *given, **more: trained.append(1) or alone(*given, **more)
print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1])
rows = permuted_masks.run(TINY, store, **GRID, batched=int(sys.argv[2]))
print(sum(trained), store.computed, [row["accuracy"] for row in rows])
"""


@pytest.mark.parametrize("numbers", [(100, 1), *([(100, 100)] if LONG else [])])
def test_processes_at_once_never_train_a_network_twice(tmp_path, numbers):
    """Two that train batched, and one that does next to one that trains one network after the other."""
    (tmp_path / "script.py").write_text(AT_ONCE)
    processes = [subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path / "runs", str(number)], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  env=os.environ | {"PYTHONPATH": str(ROOT), "PERMASK_DISPLAY": "static"})
                 for number in numbers]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    said = [process.communicate("go\n", timeout=300)[0].splitlines()[-1].split(maxsplit=2) for process in processes]
    assert sum(int(trained) for trained, _, _ in said) == 4 + 2 + 2 + 20
    assert said[0][2] == said[1][2]  # the same files
    assert not list((tmp_path / "runs").rglob("*.lock")) and not list((tmp_path / "runs").rglob("*.unfinished"))
    # Each stage that trains was computed once; tickets and matchings are cheap, and may have been twice.
    assert len(list((tmp_path / "runs").rglob("*.safetensors"))) == 4 + 4 + 20 + 4 + 4
