"""Several processes against one: the same network, in processes that ``fit`` starts and in those of torchrun.

Processes take seconds to start, so torchrun starts two of them once: they run this file, which trains all cases and
leaves what each process got.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from permask_core.data import load_dataset
from permask_core.data.splits import Split
from permask_core.models import build_model
from permask_core.pruning import magnitude_masks
from permask_core.runs.files import load_tensors
from permask_core.sparse.dynamic import METHODS, Rewiring
from permask_core.training import Recipe, fit, loop

RECIPE = Recipe(2, 0.05, 0.8, 1e-2, 100)
CASES = {
    "plain": RECIPE,
    "smoothed": replace(RECIPE, label_smoothing=0.2, warmup=0.5),
    "accumulated": replace(RECIPE, accumulate=2, schedule="step", step_epochs=1),
    "adamw": replace(RECIPE, lr=0.01, optimizer="adamw", accumulate=2),
}
LONG = replace(RECIPE, epochs=60)
STEPS = [f"step {i}" for i in range(11)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def pictures():
    """Some digits in float64, where the order of sums does not show, cropped and mirrored."""
    train = load_dataset("digits").train
    return Split(train.x[:537].double(), train.y[:537], pad=1, flip=True)


def net():
    return build_model("mlp", (1, 8, 8), 10, width=0.1, seed=3).double()


def masks():
    return magnitude_masks(net().state_dict(), 0.7)


def with_batchnorm():
    torch.manual_seed(0)
    layers = nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)
    return nn.Sequential(nn.Flatten(), *layers).double()


class WithUnused(nn.Module):
    """A network with a layer that nothing goes through."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = net(), nn.Linear(2, 2).double()

    def forward(self, x):
        return self.used(x)


def with_dropout():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)).double()


def trained(recipe=RECIPE, model=None, data=None, **options):
    options = {"seed": 4, "masks": masks() if model is None else None, "processes": 2, "device": "cpu", **options}
    return fit(net() if model is None else model, pictures() if data is None else data, recipe, **options)._asdict()


def disagreements(rank):
    """What one of two processes has otherwise, by the name of what is to be reported."""
    other, data = net(), pictures()
    other.fc1.bias.data[0] += 1e-9
    kept = masks()
    kept["fc1.weight"][0, 0] ^= True
    return {
        "masks": {"masks": kept}, "seed": {"seed": 5}, "lr": {"recipe": replace(RECIPE, lr=0.04)},
        "checkpoints": {"checkpoints": ["init"]}, "initial weights": {"model": other, "masks": masks()},
        "data.x": {"data": replace(data, x=data.x + 1)}, "images": {"data": Split(data.x[1:], data.y[1:], pad=1)},
        "accumulate": {"recipe": replace(RECIPE, accumulate=2)}, "rewiring": {"rewiring": Rewiring("set")},
    } if rank else {}


def refused(**options):
    """The error of a fit that must not train a step."""
    model = options.setdefault("model", net())
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"masks": masks(), **options}
    try:
        trained(**options)
    except ValueError as error:
        assert same(start, model.state_dict())
        return str(error)


def main(folder, rank):
    found = {case: trained(recipe, checkpoints=STEPS) for case, recipe in CASES.items()}
    found["again"] = trained(checkpoints=STEPS)
    for method in METHODS:
        found[method] = trained(CASES["accumulated"], checkpoints=STEPS, rewiring=Rewiring(method, every=3))
    found["batchnorm"] = trained(model=with_batchnorm(), checkpoints=["epoch 1"])

    for name in ("dropout", "dropout again"):
        seen, model = [], with_dropout()
        model[1].register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output == 0))
        found[name] = {**trained(model=model), "zeros": seen}

    path, loop.SAVE_SECONDS = folder / "run.safetensors", 0
    passes, model = iter(range(8)), with_batchnorm()

    def interrupt(*_):
        if next(passes, None) is None:
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    try:
        trained(model=model, resume=path, checkpoints=["epoch 1"])
    except KeyboardInterrupt:
        found["done"] = load_tensors(path)[1]["done"]
    # A disk of the first process alone: the second sees no file.
    elsewhere = path if rank == 0 else folder / "elsewhere" / "run.safetensors"
    found["resumed"] = trained(model=with_batchnorm(), resume=elsewhere, checkpoints=["epoch 1"])
    found["left"] = sorted(os.listdir(folder))
    found["other settings"] = refused(resume=path)

    mine = disagreements(rank)
    found |= {f"other {name}": refused(**mine.get(name, {})) for name in disagreements(1)}
    found["3 processes"] = refused(processes=3)
    found["unused"] = refused(model=WithUnused(), masks=None)
    found["long"] = trained(LONG)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes of torchrun got."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    ended = subprocess.run([*command, folder], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_run(one, other):
    return (same(one["state"], other["state"]) and one["losses"] == other["losses"]
            and one["checkpoints"].keys() == other["checkpoints"].keys()
            and all(same(one["checkpoints"][name], other["checkpoints"][name]) for name in one["checkpoints"]))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_the_same_batch(ranks, case):
    alone = trained(CASES[case], checkpoints=STEPS, processes=1)
    for run in (rank[case] for rank in ranks):
        assert run["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert run["losses"][1] < run["losses"][0]
        for step in STEPS:
            for name, tensor in alone["checkpoints"][step].items():
                torch.testing.assert_close(run["checkpoints"][step][name], tensor, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_rewire_like_one(ranks, method):
    alone = trained(CASES["accumulated"], checkpoints=STEPS, rewiring=Rewiring(method, every=3), processes=1)
    assert any(not torch.equal(alone["masks"][name], mask) for name, mask in masks().items())
    for run in (rank[method] for rank in ranks):
        assert same(run["masks"], alone["masks"]) and same(run["fan_in"], alone["fan_in"])
        assert run["losses"] == pytest.approx(alone["losses"], rel=1e-6) and same_run(run, ranks[0][method])
        for step in STEPS:
            for name, tensor in alone["checkpoints"][step].items():
                torch.testing.assert_close(run["checkpoints"][step][name], tensor, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_masks_hold_in_every_process_after_every_step(ranks, case):
    for run in (rank[case] for rank in ranks):
        for step in STEPS:
            assert all((run["checkpoints"][step][name][~mask] == 0).all() for name, mask in masks().items())
            assert all((run["checkpoints"][step][name][mask] != 0).all() for name, mask in masks().items())
    assert same_run(*(rank[case] for rank in ranks))


def test_the_same_seed_gives_the_same_bits_in_several_processes(ranks):
    assert same_run(ranks[0]["plain"], ranks[0]["again"])


def test_batchnorm_sees_the_images_of_a_process_and_keeps_the_firsts_statistics(ranks):
    """As with a batch in two parts; but there all of them go into the statistics."""
    model = with_batchnorm()
    parts = trained(replace(RECIPE, accumulate=2), model, checkpoints=["epoch 1"], processes=1)
    assert same_run(*(rank["batchnorm"] for rank in ranks))
    for name, tensor in parts["state"].items():
        if "running" not in name and "num" not in name:
            torch.testing.assert_close(ranks[0]["batchnorm"]["state"][name], tensor, atol=1e-9, rtol=1e-9)
    assert ranks[0]["batchnorm"]["state"]["2.num_batches_tracked"] == 12


def test_processes_draw_dropout_of_their_own_that_a_seed_repeats(ranks):
    first, second = (rank["dropout"]["zeros"] for rank in ranks)
    assert len(first) == 12
    for one, other in zip(first, second):
        n = min(len(one), len(other))  # the last batch is odd
        assert not torch.equal(one[:n], other[:n])
    for rank in ranks:
        first, again = (rank[name]["zeros"] for name in ("dropout", "dropout again"))
        assert all(torch.equal(one, other) for one, other in zip(first, again))
    assert same(ranks[0]["dropout"]["state"], ranks[1]["dropout again"]["state"])


def test_processes_that_were_killed_resume_in_the_same_bits(ranks):
    for rank in ranks:
        assert rank["done"] == 8
        assert same_run(rank["resumed"], rank["batchnorm"])


def test_the_first_process_alone_writes(ranks):
    assert ranks[0]["left"] == ["run.safetensors"]


@pytest.mark.parametrize("name", list(disagreements(1)))
def test_a_rank_that_disagrees_stops_all_before_training(ranks, name):
    for rank in ranks:
        assert f"rank 1 disagrees about {name}: it has " in rank[f"other {name}"]
        assert "expected the same in every process" in rank[f"other {name}"]


def test_another_number_of_processes_than_torchruns_is_refused(ranks):
    assert all(rank["3 processes"] == "processes is 3: expected 2, the number that torchrun started" for rank in ranks)


def test_a_parameter_without_a_gradient_is_named(ranks):
    assert all(rank["unused"].startswith("'unused.weight', 'unused.bias' got no gradient") for rank in ranks)


def test_a_file_of_other_settings_is_refused_in_every_process(ranks):
    assert all("belongs to a run with checkpoints" in rank["other settings"] for rank in ranks)


def test_a_file_of_another_number_of_processes_is_refused_before_any_starts(tmp_path, monkeypatch):
    path, model = tmp_path / "run.safetensors", net()
    trained(processes=1, resume=path)
    monkeypatch.setattr(loop, "launch", None)
    with pytest.raises(ValueError, match=r"belongs to a run with processes 1 \(here 2\): give another file"):
        trained(model=model, masks=masks(), resume=path)
    assert same(model.state_dict(), net().state_dict())


def test_processes_that_fit_starts_are_torchruns_killed_and_resumed_in_a_notebook_on_a_cluster(
        ranks, tmp_path, monkeypatch):
    path, model = tmp_path / "run.safetensors", net()
    # Its processes hear of its end by an interrupt, which a shell has its background jobs ignore.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, __file__, tmp_path], env=ENVIRONMENT, stdout=subprocess.PIPE,
                          preexec_fn=heard) as running:
        done = 0
        while done < 3:
            assert running.poll() is None
            time.sleep(0.005)
            with contextlib.suppress(FileNotFoundError, ValueError):  # it may be replaced while it is read
                done = load_tensors(path)[1]["done"]
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)  # until the processes that it started are gone, too
    assert 3 <= load_tensors(path)[1]["done"] < 360
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)  # as in a notebook
    for name, value in (("NTASKS", "1"), ("PROCID", "0"), ("LOCALID", "0"), ("NODEID", "0"), ("JOB_NAME", "job")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = dict(os.environ)
    run = trained(LONG, model.eval(), masks=masks(), resume=path)
    assert same_run(run, ranks[0]["long"])
    assert same(model.state_dict(), run["state"]) and model.training
    assert os.environ == before and not torch.distributed.is_initialized()


def test_an_error_in_a_process_arrives():
    model, data = net().float(), pictures()
    with pytest.raises(RuntimeError, match="a training process failed: FloatingPointError: the training loss is nan in "
                                           "epoch [12]: try a smaller learning rate than 1000000000.0"):
        trained(Recipe(2, 1e9), model, replace(data, x=data.x.float()))
    assert same(model.state_dict(), net().float().state_dict())


if __name__ in ("__main__", "__mp_main__"):
    torch.set_num_threads(1)
if __name__ == "__mp_main__":  # a process that fit has started from this file
    loop.SAVE_SECONDS = 0
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:
        main(folder, int(os.environ["RANK"]))
    else:
        trained(LONG, resume=folder / "run.safetensors")
