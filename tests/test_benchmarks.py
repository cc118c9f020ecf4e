"""Benchmarks: what is compared does the same work, what is wrong is not timed, and every script runs in small."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

from batch import grids, job
from permask_core.data.attributes import attribute
from permask_core.data.measured import measured_dynamic_sparse_training
from permask_core.data.splits import crop, standardise
from permask_core.runs.files import save_tensors
from tests.data.files import require_fashion_mnist
from tests.notebooks import run as run_notebook

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The scripts import one another by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def training():
    return importlib.import_module("training")


def record(script, folder, *options):
    """What a script leaves when it is called with options."""
    (importlib.import_module(script) if isinstance(script, str) else script).main(
        [*map(str, options), "--result", str(folder / "result.json")])
    return json.loads((folder / "result.json").read_text())


def test_the_plain_loop_reads_what_fit_reads(training):
    """Each image is one of the 9 x 9 crops, or its mirror image, that a split would make of it."""
    split = training.random_split(3)
    places = torch.arange(9)
    corners = torch.cartesian_prod(places, places).repeat(2, 1)
    mirrored = torch.arange(162) >= 81
    for x, label, (image, target) in zip(split.x, split.y, training.PlainImages(split)):
        variants = standardise(crop(x.expand(162, -1, -1, -1), 4, corners, mirrored), split.mean, split.sd)
        distance = (variants - image).abs().amax((1, 2, 3))
        assert distance.min() < 1e-6 < distance.sort().values[1]
        assert target == label


def test_training_speeds(training, tmp_path, monkeypatch):
    monkeypatch.setitem(training.IMAGES, "cpu", {training.LOADERS: 2560, 1: 512})
    found = record(training, tmp_path, "--quick", "--rounds", 2, "--device", "cpu")
    assert [row["part"] for row in found["rows"]] == ["loaders alone", "resnet20 x 1"]
    for row in found["rows"]:
        assert {side: len(times) for side, times in row["seconds"].items()} == {"permask": 2, "plain": 2}
        assert row["ratio"] > 0 and row["processor_ratio"] > 0


@pytest.mark.parametrize("option, least", [("--rounds", 1), ("--threads", 1), ("--readers", 0)])
def test_a_number_out_of_range_is_named(option, least, training, capsys):
    with pytest.raises(SystemExit):
        training.main([option, "-1"])
    assert f"'-1': expected an integer of at least {least}" in capsys.readouterr().err


def test_dynamic_sparse_training(tmp_path):
    found = record("dynamic_sparse_training", tmp_path, "--quick", "--seeds", 1)
    measured = measured_dynamic_sparse_training()
    assert found["settings"]["networks"] == measured["settings"]["networks"]
    for rows in ("rows", "sparse_opt"):
        for row in found[rows]:
            # Whatever the settings, it starts from the masks of the results that are kept.
            same = [old for old in measured[rows] if all(old[key] == row[key] for key in row if key not in (
                "accuracy", "connections", "active", "achieved"))]
            assert len(same) == 1
            assert row.get("achieved") == same[0].get("achieved")


def test_fairness_of_sparse_networks(tmp_path):
    written = record("fairness_of_sparse_networks", tmp_path, "--quick", "--seeds", 1, "--workers", 1, "--runs",
                     tmp_path / "runs")
    expected = {("dense", "a"), ("dense", "b"), ("lth", "a"), ("pruned", "a"), ("permuted", "b"), ("naive", "b"),
                ("random", "b")}
    for task, found in written["tasks"].items():
        assert {(row["method"], row["network"]) for row in found["rows"]} == expected and len(found["rows"]) == 7
        for row in found["rows"]:
            overall = sum(a * n for a, n in zip(row["class_accuracies"], found["class_sizes"]))
            assert overall / sum(found["class_sizes"]) == pytest.approx(row["accuracy"], abs=1e-5)
            assert 0.1 <= row["confidence"] <= 1 and row["individual"] >= 0
            assert ("shortcut" in row) == ("colour EOD" in row) == (task == "trifeature")
        a, b = (row for row in found["rows"] if row["method"] == "dense")
        assert a["class_accuracies"] != b["class_accuracies"]


def test_what_follows_the_colour():
    benchmark = importlib.import_module("fairness_of_sparse_networks")
    labels, colours = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 1, 0, 1])
    test = SimpleNamespace(y=labels, attributes={"colour": attribute("rgb", colours)})
    # Right; follows; wrong but does not; the colour is its own; right; follows.
    assert benchmark.shortcut(test, torch.tensor([0, 1, 0, 2, 2, 1])) == pytest.approx(2 / 3)


def test_compressed_experts(tmp_path):
    found = record("compressed_experts", tmp_path, "--quick", "--seeds", 1, "--runs", tmp_path / "runs")
    whole = [row for row in found["rows"] if row["left_out"] is None]
    variants = {(row["method"], row["matching"]) for row in whole}
    assert len(variants) == 1 + 1 + 6 + 3 * 3 and len(whole) == 1 + 3 * 16 and len(found["rows"]) == len(whole) + 2 * 5
    assert {row["kept"] for row in whole} == {8, 6, 4, 2} and found["experts"] == 8
    assert len(found["correlations"]) == 6 and all(-1 <= row["spearman"] <= 1 for row in found["correlations"])
    assert (tmp_path / "runs" / "mixture of experts").is_dir()


def test_price_of_alignment(tmp_path):
    found = record("price_of_alignment", tmp_path, "--quick", "--seeds", 1, "--runs", tmp_path / "runs")
    recipe = ("matching", "matched_at", "matched_images", "matched_layers")
    rows = {tuple(str(row[key]) for key in recipe): row for row in found["rows"] if row["method"] == "permuted"}
    assert {row["method"] for row in found["rows"]} == {"dense", "lth", "naive", "random", "permuted"}
    # Two matchings at three epochs; four numbers of images and twice two layers at two of them.
    assert len(rows) == 2 * 3 + 4 * 2 + 2 * 2 * 2 == len(found["rows"]) - 4
    for by in ("weights", "activations"):
        late = rows[by, "3", "50000", "None"]
        assert late["overlap"] == 1 and all(0 < row["overlap"] <= 1 for row in rows.values())
    for row in found["control"]:
        assert 0 <= row["shared_positions"] <= 1 and 0 < row["overlap"] <= 1 and 0 < row["idle"] < 1
        if row["noise"] == 0 and row["matching"]:
            assert row["shared_positions"] == row["overlap"] == 1
        if not row["matching"]:
            assert row["shared_positions"] < 0.1 and row["overlap"] < 0.2


def test_ensembles_from_one_mask(tmp_path):
    rows = record("ensembles_from_one_mask", tmp_path, "--quick", "--seeds", 1, "--members", 2, "--runs",
                  tmp_path / "runs")["rows"]
    found = {(row["method"], row["members"]): row for row in rows}
    methods = ("dense", "pruned", "lth", "permuted", "permuted early", "naive")
    assert set(found) == {(method, k) for method in methods for k in (1, 2)} and len(rows) == 12
    # A takes 5 epochs and 3 rounds of 1; a sparse run 3; of a B it takes 5, 4 or 2.
    assert [found[method, 2]["epochs"] for method in methods] == [10, 2 * 11, 8 + 6, 8 + 16, 8 + 14, 8 + 10]
    assert [found[method, 2]["weights"] for method in methods] == pytest.approx([2, *[0.2] * 5])


def test_an_ensembles_accuracy_is_a_mean_over_its_subsets():
    benchmark = importlib.import_module("ensembles_from_one_mask")
    sure, unsure, wrong = [[1.0, 0.0]], [[0.6, 0.4]], [[0.2, 0.8]]
    # Alone two of three are right. Of the pairs, sure and unsure, and sure and wrong. All three together are.
    assert benchmark.ensembles(torch.tensor([sure, unsure, wrong]).numpy(), [0]) == pytest.approx([2 / 3, 2 / 3, 1])


def test_how_little_rewinding(tmp_path):
    rows = record("how_little_rewinding", tmp_path, "--quick", "--seeds", 1, "--runs", tmp_path / "runs")["rows"]
    assert rows[0]["method"] == "dense" and rows[0]["start"] == ""
    assert {(row["method"], row["rewind"], row["start"]) for row in rows[1:]} == {
        (method, k, start) for method in ("lth", "permuted", "naive", "random") for k in (0, 1, 2)
        for start in ("dense", "sparse")}
    assert len(rows) == 1 + 4 * 3 * 2 and all(row["sparsity"] == 0.99 for row in rows[1:])


def test_fashion_mnist_settings(tmp_path, monkeypatch):
    require_fashion_mnist()
    script = importlib.import_module("fashion_mnist_settings")
    monkeypatch.setitem(script.QUICK, "options", {"n_train": 500, "n_test": 200})
    for name, search in script.SEARCHES.items():
        small = {"widths": [width / 2 for width in search["widths"]], "sparsities": search["sparsities"][-2:]}
        monkeypatch.setitem(script.SEARCHES, name, search | small)
    found = record(script, tmp_path, "--quick", "--runs", tmp_path / "runs")
    for name, chosen in found["chosen"].items():
        frame = pd.DataFrame(row for row in found["rows"] if row["preset"] == name)
        rates = frame[frame["rewind"] == 1].groupby("lr")["accuracy"].mean()  # at all widths
        assert len(rates) == 3 and rates[chosen["lr"]] == pytest.approx(rates.max())
        rewinds = frame[(frame["lr"] == chosen["lr"]) & (frame["width"] == frame["width"].iloc[0])]
        mean = rewinds.groupby("rewind")["accuracy"].mean()  # at the first width
        assert [*mean.index] == [0, 1] and chosen["rewind"] == (0 if mean[0] >= mean.max() - 0.005 else 1)


def test_shared_inputs(tmp_path):
    require_fashion_mnist()
    found = record("shared_inputs", tmp_path, "--quick", "--seeds", 1, "--runs", tmp_path / "runs")
    frame = pd.DataFrame(found["rows"])
    assert len(frame) == 4 * 3 * 2 and frame["seed"].unique() == [5]
    at_start = frame[frame["method"] == "fan_in"].groupby("sparsity")["connections"]
    assert (at_start.nunique() == 1).all()  # whatever is shared


def test_weights_or_activations(tmp_path):
    options = "--quick", "--seeds", 2, "--workers", 1, "--runs", tmp_path / "runs"
    found = record("weights_or_activations", tmp_path, *options)
    ways = [("naive", ""), ("permuted", "weights"), ("permuted", "activations")]
    assert sorted((row["method"], row["matching"]) for row in found["lines"]) == sorted(2 * ways)
    assert all(row["barrier"] >= 0 and "losses" not in row for row in found["lines"])
    assert {(row["method"], row["matching"]) for row in found["rows"]} == {("dense", ""), ("lth", ""), *ways}


def test_tournament(tmp_path, monkeypatch):
    script = importlib.import_module("tournament")
    few = {name: one for name, one in script.tournament.CANDIDATES.items()
           if one.kind == "oracle" or name in ("naive", "weights", "activations", "pruned weights", "product")}
    monkeypatch.setattr(script.tournament, "CANDIDATES", few)
    monkeypatch.setattr(script, "FINALISTS", 1)
    for part in ("choice", "perceptron"):
        script.main([part, "--quick", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path)])
    choice, final = (json.loads((tmp_path / f"{part}.json").read_text()) for part in ("choice", "perceptron"))
    assert choice["command"] == "python benchmarks/tournament.py choice"
    rows = pd.DataFrame(choice["rows"])
    assert set(rows["method"]) == {*few} and rows["block"].unique() == [0]
    best, = choice["finalists"]
    means = rows.groupby("method")["accuracy"].mean()
    assert means[best] == max(means[name] for name, one in few.items() if one.kind in ("permutation", "mask"))
    others = pd.DataFrame(final["rows"])
    assert set(others["method"]) == {best, "naive", "weights", "activations", "mask to mask", "own ticket"}
    assert not {*others["block"]} & {*rows["block"]}


def test_distillation(tmp_path):
    written = record("distillation", tmp_path, "--quick", "--seeds", 1, "--workers", 1, "--runs", tmp_path / "runs")
    assert written["command"] == "python benchmarks/distillation.py --seeds 1"
    for found in written["tasks"].values():
        assert [row["role"] for row in found["rows"]] == ["teacher", "student", "distilled", "distilled"]
        for row in found["rows"]:
            assert sum(row["class_accuracies"]) / 10 == pytest.approx(row["accuracy"], abs=1e-5)
            assert row["individual"] >= 0
            for key in ("colour DPD", "colour EOD", "texture DPD", "texture EOD"):
                value, mean, high = row[key]
                assert 0 <= value <= 1 and 0 <= mean <= high <= 1


def test_structured_tickets(tmp_path):
    found = record("structured_tickets", tmp_path, "--quick", "--seeds", 1, "--runs", tmp_path / "runs")
    assert found["command"] == "python benchmarks/structured_tickets.py --seeds 1"
    assert [(row["scope"], row["method"]) for row in found["rows"]] == [
        ("global", "dense"), *((scope, method) for scope in ("global", "fan_in")
                               for method in ("lth", "permuted", "naive"))]
    for row in found["rows"][1:]:
        # 64 units in each hidden layer; fan-in is a whole number for each of 64, 64 and 10 neurons.
        weights = 64 * 64 + 64 * 64 + 64 * 10
        away = abs(row["achieved"] - row["sparsity"]) * weights
        assert away <= (0.5 if row["scope"] == "global" else (64 + 64 + 10) / 2)
        if (row["scope"], row["method"]) == ("fan_in", "permuted"):
            assert all(least == most for least, most, _ in row["connections"].values())
            kept = sum(fan_in * neurons for fan_in, _, neurons in row["connections"].values())
            assert row["achieved"] == pytest.approx(1 - kept / weights)
            assert row["condensed_accuracy"] == pytest.approx(row["accuracy"], abs=0.005)
    assert [row["batch"] for row in found["times"]] == [1, 256]
    for row in found["times"]:
        assert row["turns"] >= 5 and list(row["median_seconds"]) == ["dense", "zeros", "trimmed", "CSR", "fan-in"]
        assert all(0 < units <= 64 for units in row["trimmed_to"]) and len(row["trimmed_to"]) == 2


def test_neurons_that_a_mask_cuts_off_are_trimmed():
    trimmed = importlib.import_module("structured_tickets").trimmed
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in ((6, 9), (9, 8), (8, 3))))
    model.insert(1, torch.nn.ReLU()).insert(3, torch.nn.ReLU())
    with torch.no_grad():
        model[0].weight[:2] = 0  # two that read nothing
        model[2].weight[:, 4] = 0  # one that none reads
        model[2].weight[1] = 0
        model[4].weight[:, 5:] = 0
    x, small = torch.randn(20, 6), trimmed(model)
    assert [tuple(layer.weight.shape) for layer in small if hasattr(layer, "weight")] == [(6, 6), (4, 6), (3, 4)]
    torch.testing.assert_close(small(x), model(x))


def test_images_of_trifeature_a_second(tmp_path):
    (row,) = record("trifeature", tmp_path, "--threads", 1, "--rounds", 2, "--sizes", 150)["rows"]
    assert row["image_size"] == 150 and row["images"] == 100 and row["images_per_second"].keys() == {"drawn", "decoded"}
    assert {name: len(times) for name, times in row["seconds"].items()} == {"drawn": 2, "decoded": 2}


@pytest.fixture
def fan_in_cpu(monkeypatch):
    """The script, which measures memory in this process instead of a fresh one."""
    script = importlib.import_module("fan_in_cpu")

    def run(command, **_):
        with contextlib.redirect_stdout(io.StringIO()) as told:
            script.main([*command[2:], "--threads", "1"])
        return SimpleNamespace(stdout=told.getvalue())

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    return script


def test_fan_in_speeds(fan_in_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(fan_in_cpu, "SPARSITIES", [0.9, 0.99])
    found = record(fan_in_cpu, tmp_path, "--quick", "--threads", 1)
    assert len(found["rows"]) == 2 * 2 * 2  # sparsities, batches, ways
    assert all(row["error"] < 1e-5 and row["turns"] >= 5 for row in found["rows"])
    for row in found["memory"]:
        assert row["kept_bytes"]["dense"] == 16 * (row["inputs"] + 1) * row["outputs"]
        assert row["kept_bytes"]["fan-in"] < row["kept_bytes"]["dense"] / 2
        assert row["peak_bytes"].keys() == {"fan-in", "dense"}


def test_traced_networks(tmp_path, monkeypatch):
    """A network is traced and checked, one that cannot be traced has a reason, and finished rows are kept."""
    script, names = importlib.import_module("traced_networks"), ("BertForSequenceClassification", "detector")
    known = script.networks()["transformers"]

    class Detector(torch.nn.Module):
        def forward(self, x):
            return x[x > 0].sum() if x.sum() > 0 else x

    monkeypatch.setattr(script, "networks", lambda: {"transformers": {
        names[0]: known[names[0]], names[1]: lambda: (Detector(), (torch.ones(3),), None)}})
    options = "--libraries", "transformers", "--names", *names, "--seconds", 0
    bert, detector = record(script, tmp_path, *options)["rows"]
    assert bert["units"] == 16 + 2 * (20 + 4 + 4 * (4 + 4)) + 16 and bert["change"] < 1e-9 < 1e-2 < bert["left_out"]
    assert bert["fixed"] == {"their order matters to embedding": 31 + 32 + 2, "they reach the network's output": 4}
    assert detector["refused"].startswith("Detector cannot be traced by torch.export") and "groups" not in detector
    monkeypatch.setattr(script, "measured", None)
    assert record(script, tmp_path, *options)["rows"] == [bert, detector]


@pytest.fixture
def whole_networks(monkeypatch):
    """The script with small networks, and without a compiler."""
    script = importlib.import_module("whole_networks")
    networks, resnet = script.torchvision.models, script.torchvision.models.resnet
    small = {"gpt2": (partial(script.Decoder, 50, 16, 64, 4, 2), None),
             "bert": (partial(script.Encoder, 50, 16, 64, 4, 2), lambda batch: torch.randint(50, (batch, 16))),
             "mobilenet_v2": (partial(networks.mobilenet_v2, width_mult=0.25), lambda b: torch.randn(b, 3, 32, 32)),
             "resnet50": (partial(networks.ResNet, resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16),
                          lambda batch: torch.randn(batch, 3, 32, 32))}
    for name, given in small.items():
        monkeypatch.setitem(script.NETWORKS, name, (*given, script.NETWORKS[name][2]))
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    script.compiled.cache_clear()
    return script


def test_whole_networks(whole_networks, tmp_path, monkeypatch):
    script = whole_networks
    for name in ("gpt2", "bert"):
        (tmp_path / name).mkdir()
        found = record(script, tmp_path / name, "--only", name, "--seconds", 0, "--tokens", 5, "--steps", "forward")
        layers = {"MLPs": 4, "blocks": 8, "blocks and output": 9}
        assert [(row["replaced"], row["batch"]) for row in found["rows"]] == [
            (part, batch) for part in script.NETWORKS[name][2] for batch in (1, 8)]
        for row in found["rows"]:
            assert row["layers"] == layers[row["replaced"]] and row["bound"] == 1 / (1 - row["share_of_dense"]) > 1
            assert row["ratios"].keys() == {"fan-in", "shared by 8", "torch CSR"}
            assert row["step"] == "forward" and row["threads"] == torch.get_num_threads()
    # An interrupted run continues, and rows of another command are replaced or kept.
    path = tmp_path / "interrupted.json"
    path.write_text(json.dumps(found | {"rows": found["rows"][1:]}))
    before = found["rows"][0]["command"]
    assert before != found["command"] == "python benchmarks/whole_networks.py"
    monkeypatch.setattr(script, "command", lambda *_: before)
    script.main(["--only", name, "--seconds", "0", "--steps", "forward", "--result", str(path)])
    first, *rest = json.loads(path.read_text())["rows"]
    assert rest == found["rows"][1:] and first["replaced"] == found["rows"][0]["replaced"]
    monkeypatch.setattr(script, "command", lambda *_: "another")
    script.main(["--only", name, "--seconds", "0", "--steps", "forward", "--batches", "1", "--result", str(path)])
    again = json.loads(path.read_text())
    assert {(row["batch"], row["command"]) for row in again["rows"]} == {(1, "another"), (8, before)}
    assert len(again["rows"]) == 4


def test_whole_convolutional_networks(whole_networks, tmp_path):
    options = "--only", "mobilenet_v2", "resnet50", "--seconds", 0, "--batches", 2
    found = record(whole_networks, tmp_path, *options)
    rows = {(row["network"], row["replaced"], row["step"]): row for row in found["rows"]}
    assert {key: row["layers"] for key, row in rows.items()} == {
        ("mobilenet_v2", "1x1", "forward"): 34, ("resnet50", "1x1", "forward"): 12,
        ("resnet50", "1x1 and 3x3", "forward"): 16, ("resnet50", "1x1 and 3x3", "training"): 16}
    for (_, replaced, _), row in rows.items():
        pointwise = {"torch CSR"} if replaced == "1x1" else set()
        assert row["ratios"].keys() == {"fan-in", "dense, channels last"} | pointwise
        for spent in row["seconds_by_kind"].values():
            assert ("replaced convolutions 1x1" in spent) and ("replaced convolutions 3x3" in spent) == (not pointwise)
            assert min(seconds for kind, seconds in spent.items() if kind != "rest") > 0
        replaced = sum(seconds for kind, seconds in row["seconds_by_kind"]["dense"].items() if "replaced" in kind)
        assert row["share_of_dense"] == pytest.approx(replaced / sum(row["seconds_by_kind"]["dense"].values()))
        kept = row["counted"]["fan-in"]["products"] / row["counted"]["dense"]["products"]
        assert 0.09 < kept < 0.14  # of small layers, fan-in is rounded
    spent = rows["mobilenet_v2", "1x1", "forward"]["seconds_by_kind"]["dense"]
    assert {"depthwise convolutions 3x3", "convolutions 3x3", "BatchNorm2d", "ReLU6"} <= spent.keys()


@pytest.mark.parametrize("name, batch, step", [("gpt2", 1, "forward"), ("bert", 2, "training")])
def test_a_compiled_network_is_compared_if_there_is_a_compiler(whole_networks, monkeypatch, name, batch, step):
    """Here its graph is run by torch, which needs none. It is made once for all rows, whose weights it takes."""
    made, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **given: made.append(name) or real(model, backend="eager"))
    for replaced in ("MLPs", "blocks"):
        row = whole_networks.compare(name, batch, replaced, step, 0, 3, True)
        assert row["median_seconds"]["dense, compiled"] > 0 and row["layers"] == {"MLPs": 4, "blocks": 8}[replaced]
    assert made == [name]


def test_a_network_that_is_wrong_or_whose_outputs_are_0_is_not_timed(whole_networks, monkeypatch):
    model = whole_networks.NETWORKS["bert"][0]()

    def compare():
        whole_networks.compare("bert", 1, "MLPs", "forward", 0, 3, False)

    real = whole_networks.with_csr
    monkeypatch.setattr(whole_networks, "with_csr", lambda *given: nn.Sequential(real(*given), nn.Linear(64, 64)))
    with pytest.raises(SystemExit, match="bert: the torch CSR network is off by [0-9]"):
        compare()
    for block in model.blocks:
        nn.init.zeros_(block["norm2"].weight)
    monkeypatch.setitem(whole_networks.NETWORKS, "bert", (lambda: model, *whole_networks.NETWORKS["bert"][1:]))
    with pytest.raises(SystemExit, match="off by nan"):
        compare()


def test_products_and_bytes_of_replaced_layers_are_counted(whole_networks):
    def networks(dense, mask):
        return nn.Sequential(dense), nn.Sequential(whole_networks.condense(dense, {"weight": mask}).model)

    linear, conv = nn.Linear(6, 4), nn.Conv2d(6, 4, 3)
    for dense, x, out, copies in ((linear, torch.randn(5, 6), 5 * 4, 1), (conv, torch.randn(5, 6, 4, 4), 5 * 4 * 4, 3)):
        mask = torch.zeros_like(dense.weight, dtype=torch.bool)
        mask.flatten(1)[:, :2] = True
        found = whole_networks.count(*networks(dense, mask), ["0"], lambda model, x=x: model(x))
        inputs, weights = dense.weight[0].numel(), dense.weight.numel()
        assert found["dense"] == {"products": out * inputs, "bytes": 4 * (weights + x.numel() + out)}
        assert found["fan-in"] == {"products": out * 2, "bytes": 8 * 4 * 2 + 4 * copies * (x.numel() + out)}


def test_times_of_layers_in_training_include_their_backward_pass(whole_networks):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.05)
            return grad

    class Sleeping(nn.Module):
        def forward(self, x):
            return Slow.apply(x)

    model, x = nn.Sequential(nn.Linear(3, 3), Sleeping(), nn.ReLU()), torch.randn(2, 3)
    listed = {"0": "replaced Linear", "1": "Sleeping", "2": "ReLU"}
    assert whole_networks.kinds(model, ["0"]) == listed
    whole, spent = whole_networks.time_by_kind(model, listed, lambda model: model(x).sum().backward(), True)
    assert spent.keys() == {*listed.values()} and whole > spent["Sleeping"] > 0.05 > spent["replaced Linear"] > 0
    with torch.no_grad():
        _, forward = whole_networks.time_by_kind(model, listed, lambda model: model(x), False)
    assert forward["Sleeping"] < 0.05


def test_keys_and_values_that_are_kept_are_those_of_the_whole_sequence():
    """A decoder that generates token by token computes what attention to a whole sequence does."""
    script = importlib.import_module("whole_networks")
    torch.manual_seed(0)
    layer, x = script.Attention(12, 3), torch.randn(7, 12)
    one_by_one = torch.cat([layer(row[None]) for row in x])
    q, k, v = layer.qkv(x).view(7, 3, 3, 4).permute(1, 2, 0, 3)
    scores = (q @ k.transpose(1, 2) / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(one_by_one, layer.out((scores.softmax(-1) @ v).transpose(0, 1).reshape(7, 12)))


def test_a_fan_in_layer_that_is_wrong_is_not_timed(fan_in_cpu, monkeypatch):
    layer, dense = fan_in_cpu.layers(30, 20, 0.9)
    assert fan_in_cpu.check(layer, dense, torch.randn(7, 30)) < 1e-5
    exact = layer.to_dense()
    monkeypatch.setattr(layer, "to_dense", lambda: exact)
    exact.weight.data[3, layer.indices[3, 0]] += 0.01
    with pytest.raises(SystemExit, match="the fan-in layer is off by"):
        fan_in_cpu.check(layer, dense, torch.randn(7, 30))


@pytest.fixture
def fan_in_gpu(monkeypatch):
    monkeypatch.setenv("PERMASK_TUNE", "0")
    return importlib.import_module("fan_in_gpu")


@pytest.fixture
def without_gpu(fan_in_gpu, monkeypatch):
    """The script with a CPU in place of the device, and calls in place of graphs."""
    def elapsed(call, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    triton = SimpleNamespace(rule=lambda batch, listed, **options: options)
    for name, stand_in in {
        "DEVICE": "cpu", "elapsed": elapsed, "captured": lambda name, call, graphs: call, "free_bytes": lambda: 2 ** 34,
        "machine": lambda: {"device": "none", "versions": {}},
    }.items():
        monkeypatch.setattr(fan_in_gpu, name, stand_in)
    monkeypatch.setattr(fan_in_gpu.kernels, "_triton", lambda: triton)
    for name, result in (("memory_allocated", 1000), ("max_memory_allocated", 1500), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    before = torch.backends.cuda.matmul.allow_tf32
    yield fan_in_gpu
    torch.backends.cuda.matmul.allow_tf32 = before


def test_what_is_compared_on_a_gpu(fan_in_gpu):
    everything = set(fan_in_gpu.PRECISION)
    tiled = {"fan-in, tiled by 64", "fan-in, tiled by 16"}
    forward_alone = {"CSR fp32", "2:4 bf16, 50 %"}
    assert set(fan_in_gpu.names(0.9, 256, "forward")) == everything
    assert set(fan_in_gpu.names(0.9, 64, "both")) == everything - forward_alone - {"fan-in, tiled by 64"}
    assert set(fan_in_gpu.names(0.95, 2048, "forward")) == everything - tiled


def test_what_a_way_runs_under(without_gpu):
    def state(name):
        without_gpu.settle(name)
        return (torch.backends.cuda.matmul.allow_tf32, os.environ["PERMASK_TUNE"],
                without_gpu.kernels._triton().rule(256, 307))

    assert state("dense TF32") == (True, "0", {})
    assert state("fan-in, tiled by 16") == (False, "0", {"examples": 16, "tiled": True})
    assert state("fan-in, tiled by 64") == (False, "0", {"examples": 64, "tiled": True})
    assert state("fan-in bf16, tuned") == (False, "1", {})


def test_gpu_speeds_except_for_the_gpu(without_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(without_gpu, "SPARSITIES", [0.9, 0.99])
    found, printed = record(without_gpu, tmp_path, "--quick"), capsys.readouterr().out
    assert len(found["rows"]) == 2 * 2 * 2 * 2  # sparsities, batches, ways, in a graph or not
    for row in found["rows"]:
        ways = set(without_gpu.names(row["sparsity"], row["batch"], row["way"])) - {"2:4 bf16, 50 %"}
        assert row["median_seconds"].keys() == row["errors"].keys() == row["quartiles_seconds"].keys() == ways
        assert row["turns"] >= 5
        assert row["counted_bytes"].keys() == (ways if row["way"] == "forward" else set())
    # torch has 2:4 sparsity for a GPU alone
    assert len(found["skipped"]) == 2 * 2 * 2
    assert {row["left_out"] for row in found["skipped"]} == {"2:4 bf16, 50 %"}
    assert "omitted: 2:4 bf16, 50 %: Error original_tensor.device= cpu is not supported" in printed
    assert found["memory"]["peak_bytes"].keys() == {"fan-in", "dense"} and found["hoped"] == []


def gpu_row(without_gpu, skip, **changed):
    layer = without_gpu.FanInLinear(96, 64, 10)
    torch.nn.init.normal_(layer.bias)
    at = {"inputs": 96, "outputs": 64, "sparsity": 0.9, "fan_in": 10, "batch": 3, "way": "forward", "graph": False}
    return without_gpu.compare(layer, at | changed, 1e9, 0, skip)


def test_what_does_not_fit_on_a_gpu_is_left_out(without_gpu, monkeypatch):
    left_out = {}
    data = 4 * 3 * (96 + 64)
    monkeypatch.setattr(without_gpu, "free_bytes", lambda: 2 * 4 * 96 * 64 + 3 * data - 1)
    row = gpu_row(without_gpu, left_out.__setitem__, way="both")
    assert row["median_seconds"].keys() == {"fan-in", "fan-in, tuned", "fan-in bf16", "fan-in bf16, tuned",
                                            "dense bf16"}
    assert left_out.keys() == {"dense fp32", "dense TF32", "plain torch"}
    assert left_out["dense fp32"] == "it needs 0.00 GiB, of 0.00 GiB that are free"

    monkeypatch.setattr(without_gpu, "free_bytes", lambda: 2 ** 34)
    monkeypatch.setattr(without_gpu, "GATHERED", 64 * 10 * 3 - 1)
    gpu_row(without_gpu, left_out.__setitem__)
    assert left_out["plain torch"] == "it would gather 1.9e+03 numbers"

    monkeypatch.setattr(without_gpu, "LONG", -1.0)
    row = gpu_row(without_gpu, left_out.__setitem__)
    assert left_out["fan-in"] == "a call takes 0.0 s"
    assert row["ratios"] == row["median_seconds"] == {} and row["turns"] == 0
    assert without_gpu.line(row) == "    3 forward calls"

    def full(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nOf what was there")

    monkeypatch.setattr(without_gpu, "made", full)
    gpu_row(without_gpu, left_out.__setitem__)
    assert left_out["fan-in"] == "CUDA out of memory."


def test_what_fails_on_a_gpu_stops_the_script_unless_a_library_lacks_it(without_gpu, monkeypatch):
    made, left_out = without_gpu.made, {}

    def failing(failed):
        def make(name, layer):
            if name == failed:
                raise RuntimeError("no such kernel")
            return made(name, layer)
        monkeypatch.setattr(without_gpu, "made", make)

    failing("CSR fp32")
    gpu_row(without_gpu, left_out.__setitem__)
    assert left_out["CSR fp32"] == "no such kernel"
    failing("dense fp32")
    with pytest.raises(RuntimeError, match="no such kernel"):
        gpu_row(without_gpu, left_out.__setitem__)


@pytest.mark.parametrize("way, wrong", [("forward", 0), ("both", 0), ("both", 1), ("both", 2)])
@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_a_layer_that_is_wrong_on_a_gpu_is_not_timed(way, wrong, value, without_gpu, monkeypatch):
    made = without_gpu.made

    def changed(name, layer):
        forward, both, weight = made(name, layer)

        def other(*given):
            results = (forward(*given),) if way == "forward" else both(*given)
            results[wrong].detach().view(-1)[-1] += value
            return results[0] if way == "forward" else results
        return (other, both, weight) if way == "forward" else (forward, other, weight)

    monkeypatch.setattr(without_gpu, "made", changed)
    with pytest.raises(SystemExit, match="fan-in is off by"):
        gpu_row(without_gpu, None, way=way)


def test_what_was_hoped_for_on_a_gpu(fan_in_gpu):
    row = {"inputs": 3072, "outputs": 768, "sparsity": 0.9, "batch": 256, "way": "forward", "graph": True,
           "median_seconds": {"fan-in": 2.0, "dense fp32": 4.0, "CSR fp32": 25.0, "fan-in, tuned": 1.0}}
    others = [row | change for change in ({"graph": False}, {"way": "both"}, {"batch": 16}, {"sparsity": 0.8},
                                          {"inputs": 768, "outputs": 131_072})]
    fast = row | {"sparsity": 0.99, "median_seconds": {"fan-in bf16": 2.0, "dense bf16": 1.9}}
    peaks = {"labels": 1_000_000, "peak_bytes": {"fan-in": 9 * 2 ** 30}}
    found = fan_in_gpu.hoped([row, *others, fast], peaks)
    assert [(one["found"], one["hoped"], one["met"]) for one in found] == [
        (2.0, "at least 2", True), (4.0, "at least 2", True), (12.5, "at least 13", False), (25.0, "at least 13", True),
        (0.95, "at least 1", False), (9.0, "below 8", False)]
    assert found[2]["what"] == "3072 -> 768, 90%, batch 256, forward in a graph: fan-in faster than CSR fp32, times"
    assert fan_in_gpu.hoped(others, {"labels": 5000, "peak_bytes": {"fan-in": 1}}) == []


@pytest.mark.parametrize("given, said", [
    (["--seconds", "-1"], "'-1': expected an integer of at least 0"),
    (["--only", "3x4"], "invalid choice: '3x4'"),
    (["--result", str(BENCHMARKS)], "is a folder: expected a file")])
def test_gpu_options_out_of_range_are_named(given, said, fan_in_gpu, capsys):
    with pytest.raises(SystemExit):
        fan_in_gpu.main(given)
    assert said in capsys.readouterr().err


def test_without_a_gpu_the_script_says_so(fan_in_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^fan_in_gpu.py measures a GPU, and torch finds no CUDA device here$"):
        record(fan_in_gpu, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_triton_the_script_says_so(fan_in_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fan_in_gpu.kernels, "_triton", lambda: None)
    with pytest.raises(SystemExit, match="needs Triton and a C compiler"):
        fan_in_gpu.machine()


def test_a_row_that_does_not_fit_on_a_gpu_does_not_end_the_script(without_gpu, tmp_path, monkeypatch):
    def full(*given):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(without_gpu, "compare", full)
    monkeypatch.setattr(without_gpu, "free_bytes", lambda: 16 * 5000 * 769 - 1)
    found = record(without_gpu, tmp_path, "--quick")
    assert found["rows"] == [] and found["memory"]["peak_bytes"].keys() == {"fan-in"}
    assert [row["left_out"] for row in found["skipped"]] == ["all"] * 32 + ["dense"]
    assert found["skipped"][0] == {"inputs": 96, "outputs": 64, "sparsity": 0.8, "fan_in": 19, "batch": 1,
                                    "way": "forward", "graph": False, "left_out": "all",
                                    "reason": "CUDA out of memory."}


def test_planes(tmp_path):
    found = record("planes", tmp_path, "--quick", "--threads", 1)
    assert found["command"] == "python benchmarks/planes.py --quick --threads 1"
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        assert row["error"] < 1e-4 and row["points"] == 25
        assert {way: len(times) for way, times in row["seconds"].items()} == {"at once": 2, "loop": 2}


def test_a_plane_that_is_wrong_is_not_timed(monkeypatch, digits):
    planes = importlib.import_module("planes")
    true = planes.one_by_one
    monkeypatch.setattr(planes, "one_by_one", lambda *given: true(*given) + 0.001)
    with pytest.raises(SystemExit, match="losses at once are off by"):
        planes.compare(0.25, 2, 1, digits)


def test_the_job_whose_costs_are_measured_can_be_run(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("benchmark_of_the_batch", BENCHMARKS / "batch.py")
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
    benchmark.prepared(tmp_path, 3)
    monkeypatch.setattr(grids, "ROOT", tmp_path)
    monkeypatch.setattr(job, "ROOT", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PERMASK_DISPLAY", "static")
    jobs = grids.read_grid(tmp_path / "grid.yaml")
    assert list(jobs) == ["idle_seed-0", "idle_seed-1", "idle_seed-2"]
    assert job.run(jobs["idle_seed-0"], tmp_path / "job", tmp_path / "runs")


def test_speeds_of_networks_trained_together(tmp_path, monkeypatch):
    together = importlib.import_module("batched")
    networks = [("mlp", 0.25, 2560), ("resnet8 on digits", 0.5, 1280), ("resnet8", 0.5, 256)]
    monkeypatch.setitem(together.NETWORKS, "cpu", networks)
    found = record(together, tmp_path, "--quick", "--rounds", 2, "--networks", 2, "--device", "cpu")
    assert [row["network"] for row in found["rows"]] == ["mlp", "resnet8 on digits", "resnet8"]
    for row in found["rows"]:
        plain = {"plain loop"} if row["network"] == "resnet8" else set()
        assert row["failed"] == {} and row["seconds"].keys() == plain | {"fit", "grouped", "vmap"}
        assert all(len(times) == 2 for times in row["seconds"].values())
        assert row["images_per_second"].keys() == row["seconds"].keys()


def test_a_way_that_fails_is_told_and_does_not_stop_the_others():
    together = importlib.import_module("batched")

    def fails():
        raise RuntimeError("no such kernel")

    found = together.compared({"good": (1, lambda: None), "bad": (2, fails)}, 10, 2, torch.device("cpu"))
    assert found["failed"] == {"bad": "RuntimeError: no such kernel"}
    assert found["images_per_second"].keys() == {"good"} and len(found["seconds"]["good"]) == 2


def test_the_experiment_at_cifars_size_in_small_and_its_page(tmp_path, monkeypatch):
    """Two images of each class, in two pieces; and the page of the book reads what comes out."""
    script = importlib.import_module("cifar_sized")
    monkeypatch.setitem(script.QUICK, "options", {"n_train": 200, "n_test": 100})
    options = [script, tmp_path, "--quick", "--widths", 0.25, "--rewinds", 1, "--runs", tmp_path / "runs"]
    saved = []

    def alarm_after_the_third(path, *stage):
        save_tensors(path, *stage)
        saved.append(path)
        if len(saved) == 3:
            assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60 * 7  # what --minutes says
            signal.raise_signal(signal.SIGALRM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="the same command continues from here"):
        patch.setattr("permask_core.runs.store.save_tensors", alarm_after_the_third)
        record(*options, "--minutes", 7)
    assert len(saved) == 3 and not (tmp_path / "result.json").exists()
    written = {path: path.stat().st_mtime_ns for path in saved}
    found = record(*options)
    assert {path: path.stat().st_mtime_ns for path in saved} == written
    assert len(found["pieces"]) == 2 and found["seconds"] == sum(one["seconds"] for one in found["pieces"])
    assert "'n_train': 200" in found["settings"] and found["images"] == 200
    # Two dense networks; an epoch after each round of pruning but the last; four methods from the rewind point.
    assert found["epochs"] == 2 * 2 + 5 + 4 * 1
    assert {(row["method"], row["matching"], row["rewind"]) for row in found["rows"]} == {
        (method, "activations" if method == "permuted" else "", 1)
        for method in ("dense", "lth", "permuted", "naive", "random")}
    assert all(0 <= row["accuracy"] <= 1 for row in found["rows"])

    small = {"networks": 2, "epochs": 1, "counts": [1, 2], "width": 0.1}
    page = run_notebook("cifar_sized", {"result": str(tmp_path / "result.json"), **small}, tmp_path)
    shown = " ".join(" ".join(page.shown.values()).split())
    assert f"{found['epochs']} epochs of 200 images in" in shown
    assert "measured, x 0.25, 90 %, rewind 1: " in shown
    lth, = (row["accuracy"] for row in found["rows"] if row["method"] == "lth")
    assert "Trifeature, x 0.25" in page.shown["table"] and f"{100 * lth:.1f}" in page.shown["table"]


def test_matching_peers(tmp_path):
    found = record("matching_peers", tmp_path, "--quick", "--repeats", 1)["rows"]
    assert {row["program"] for row in found} >= {"permask"} and len(found) % 4 == 0
    for row in found:
        if row["program"] == "permask":
            assert row["change"] < 1e-4 and (row["gain"] > 0)
            assert row["pair"] == "two new networks" or row["in_place"] == 1
