"""Output layers with many labels: the loss in chunks against the whole one in float64, SET, and precision by hand."""

import copy
import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import nn
from torch.nn import functional as F

from permask_core.data.extreme import MultiLabel, make_multilabel, read_sparse_text
from permask_core.experiments.extreme_labels import METHODS
from permask_core.sparse import FanInLinear
from permask_core.training.extreme import (
    ExtremeClassifier,
    ExtremeRecipe,
    auxiliary_share,
    best_precision,
    chunked_loss,
    fit_extreme,
    head_tail,
    precision_at,
    precisions,
    top_labels,
    training_bytes,
    within,
)


def listed(target):
    """Offsets and labels of a bool array [n, labels]."""
    counts = target.sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), target.nonzero()[:, 1].int()


def lists_of(data):
    return [part.tolist() for part in data.labels.split(data.offsets.diff().tolist())]


def a_head(kind, inputs, n_labels, fan_in, dtype=torch.float64, bias=True):
    if kind == "dense":
        return nn.Linear(inputs, n_labels, bias, dtype=dtype)
    head = FanInLinear(inputs, n_labels, fan_in, bias, dtype=dtype)
    if bias:
        nn.init.normal_(head.bias)
    return head


@pytest.fixture(scope="module")
def problem():
    return make_multilabel(300, n_train=1000, n_test=200, n_features=32, n_clusters=10)


# ---- Loss ------------------------------------------------------------------------------------------------------------

@given(st.sampled_from(["dense", "fan-in"]), st.integers(1, 6), st.integers(1, 9), st.integers(1, 40),
       st.integers(1, 50), st.booleans(), st.data())
def test_the_loss_in_chunks_is_the_whole_one(kind, n, inputs, n_labels, chunk, bias, data):
    torch.manual_seed(data.draw(st.integers(0, 10_000)))
    head = a_head(kind, inputs, n_labels, data.draw(st.integers(1, inputs)), bias=bias)
    x = (3 * torch.randn(n, inputs, dtype=torch.float64)).requires_grad_()
    target = torch.rand(n, n_labels) < data.draw(st.sampled_from([0, 0.1, 0.5, 1]))
    leaves = [x, *head.parameters()]
    dense = head if kind == "dense" else head.to_dense()
    whole = F.binary_cross_entropy_with_logits(F.linear(x, dense.weight, dense.bias), target.double(), reduction="sum")
    expected = torch.autograd.grad(2.5 * whole / n, [x, *dense.parameters()])
    if kind != "dense":
        expected = [expected[0], expected[1].gather(1, head.indices.long()), *expected[2:]]
    loss = chunked_loss(head, x, *listed(target), chunk)
    assert torch.allclose(loss, whole / n, rtol=1e-12)
    for found, wanted in zip(torch.autograd.grad(2.5 * loss, leaves), expected):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "fan-in"])
def test_single_precision_and_extreme_logits(kind):
    head = a_head(kind, 8, 5000, 4, torch.float32)
    x = torch.cat([torch.randn(20, 8), torch.full((2, 8), 200.0), torch.full((2, 8), -200.0)])
    offsets, labels = listed(torch.rand(24, 5000) < 0.01)
    loss = chunked_loss(head, x, offsets, labels)
    loss.backward()
    exact = copy.deepcopy(head).double()
    wanted = chunked_loss(exact, x.double(), offsets, labels)
    wanted.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for found, true in zip(head.parameters(), exact.parameters()):
        assert found.grad.dtype == torch.float32
        assert (found.grad - true.grad).norm() < 1e-5 * true.grad.norm()


@pytest.mark.parametrize("kind", ["dense", "fan-in"])
def test_only_a_chunk_of_logits_exists(kind, monkeypatch):
    """In no operation does an array appear with as many numbers as all logits."""
    head, largest = a_head(kind, 4, 20_000, 2, torch.float32), 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            made = result if isinstance(result, tuple | list) else [result]
            largest = max([largest, *(part.numel() for part in made if isinstance(part, torch.Tensor))])
            return result

    x = torch.randn(64, 4, requires_grad=True)
    offsets, labels = listed(torch.rand(64, 20_000) < 0.001)
    with Watched():
        chunked_loss(head, x, offsets, labels, 1000).backward()
    assert 64 * 1000 <= largest < 64 * 20_000 / 4


def test_a_frozen_part_takes_no_gradient():
    head = a_head("fan-in", 6, 30, 3)
    head.values.requires_grad_(False)
    offsets, labels = listed(torch.eye(4, 30, dtype=torch.bool))
    chunked_loss(head, torch.randn(4, 6, dtype=torch.float64), offsets, labels).backward()
    assert head.values.grad is None and head.bias.grad.abs().sum() > 0


def test_bad_input_to_the_loss_is_named():
    head, x = a_head("fan-in", 6, 30, 3), torch.randn(2, 6, dtype=torch.float64)
    offsets, labels = torch.tensor([0, 1, 2]), torch.tensor([3, 4])
    for wrong, message in (((x[:, :5], offsets, labels), "x is [2, 5] with 3 offsets: expected [n, 6]"),
                           ((x[:0], offsets[:1], labels[:0]), "x is [0, 6]"),
                           ((x, offsets[:2], labels[:1]), "x is [2, 6] with 2 offsets"),
                           ((x, offsets, labels + 26), "labels has 30: expected 0 to 29"),
                           ((x, offsets, labels - 4), "labels has -1"), ((x, offsets, labels, 0), "chunk is 0")):
        with pytest.raises(ValueError, match=re.escape(message)):
            chunked_loss(head, *wrong)
    keep = torch.ones(30, 3, dtype=torch.bool)
    keep[5] = False
    head.rewire(keep, torch.empty(0, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="the head has 1 ablated neurons"):
        chunked_loss(head, x, offsets, labels)


# ---- The classifier --------------------------------------------------------------------------------------------------

def test_layers_are_those_asked_for(problem):
    x = problem.test.features
    plain = ExtremeClassifier(32, 300, 4)
    assert torch.equal(plain.encode(x), x) and isinstance(plain.head, FanInLinear) and plain.head.fan_in == 4
    deep = ExtremeClassifier(32, 300, None, hidden=16, intermediate=24, n_clusters=10)
    assert isinstance(deep.head, nn.Linear) and deep.head.weight.shape == (300, 24)
    hidden = F.relu(deep.first(x))
    assert torch.equal(deep.encode(x), F.relu(deep.intermediate(hidden)))
    assert torch.equal(deep(x), deep.head(deep.encode(x))) and deep.auxiliary.weight.shape == (10, 24)
    again = [ExtremeClassifier(32, 300, 4, hidden=16, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    for one, other in zip(*(model.state_dict().values() for model in again)):
        assert torch.equal(one, other)


def test_bags_of_words_are_summed_by_value(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("4 6 5\n0,4 1:2 5:0.5\n1\n 0:1\n3 2:1 3:-1\n")
    data = read_sparse_text(path)
    model = ExtremeClassifier(6, 5, 3, hidden=7, bags=True)
    dense = torch.from_numpy(data.features.toarray())
    assert torch.allclose(model.encode(data.features), F.relu(dense @ model.first.weight), atol=1e-6)
    model.loss(data.subset(torch.tensor([3, 0]))).backward()
    assert model.first.weight.grad[[1, 2, 3, 5]].abs().sum(1).gt(0).any()
    assert (model.first.weight.grad[[0, 4]] == 0).all()
    recipe = ExtremeRecipe(30, lr=0.05, batch_size=2, rewire_until=0)
    first, *_, last = fit_extreme(model, data, recipe, seed=0, description=None)
    assert last < first and top_labels(model, data, 3).shape == (4, 3)


@pytest.mark.parametrize("options, message", [
    ({"hidden": 0}, "hidden is 0"), ({"intermediate": 2.5}, "intermediate is 2.5"), ({"fan_in": 33}, "fan_in is 33"),
    ({"bags": True}, "bags is True without hidden"), ({"n_labels": 0}, "n_labels is 0"),
])
def test_a_size_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ExtremeClassifier(**{"features": 32, "n_labels": 300, "fan_in": 4, **options})


def test_the_auxiliary_loss_is_its_formula(problem):
    batch = problem.train.subset(torch.arange(50))
    model = ExtremeClassifier(32, 300, 4, hidden=16, n_clusters=10)
    target = torch.zeros(50, 10)
    for point, labels in enumerate(lists_of(batch)):
        for label in labels:
            target[point, problem.train.clusters[label]] = 1
    base = model.loss(batch)
    meta = F.binary_cross_entropy_with_logits(model.auxiliary(model.encode(batch.features)), target, reduction="sum")
    assert model.loss(batch, 0.3).item() == pytest.approx(0.7 * base.item() + 0.3 * meta.item() / 50, rel=1e-6)
    with pytest.raises(ValueError, match="without an auxiliary head"):
        ExtremeClassifier(32, 300, 4).loss(batch, 0.3)


def test_the_share_falls_as_a_cosine_and_is_cut_off():
    recipe = ExtremeRecipe(epochs=10, auxiliary=0.4, auxiliary_epochs=8)
    assert auxiliary_share(recipe, 0) == 0.4 and auxiliary_share(recipe, 5) == pytest.approx(0.2)
    assert auxiliary_share(recipe, 7.99) > 0 == auxiliary_share(recipe, 8) == auxiliary_share(recipe, 9.5)
    shares = [auxiliary_share(recipe, epoch / 10) for epoch in range(100)]
    assert shares == sorted(shares, reverse=True)


# ---- Memory ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels, dense, fan_in", [(131_073, 1.50, 0.31), (670_091, 7.67, 1.60),
                                                   (2_812_281, 32.2, 6.7)])
def test_published_memory(labels, dense, fan_in):
    """Navigating Extremes, 768 -> labels, fan-in 128, in GiB as published: without biases and the list of rows."""
    digits = 1 if labels > 1e6 else 2
    assert round((training_bytes(768, labels) - 16 * labels) / 2 ** 30, digits) == dense
    assert round((training_bytes(768, labels, 128) - 24 * labels) / 2 ** 30, digits) == fan_in


@pytest.mark.parametrize("fan_in", [None, 5])
def test_the_bytes_are_those_of_the_tensors(fan_in):
    head = nn.Linear(20, 70) if fan_in is None else FanInLinear(20, 70, fan_in)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    head(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    tensors = [*head.parameters(), *(parameter.grad for parameter in head.parameters()), *head.buffers(),
               *(tensor for state in optimizer.state.values() for tensor in state.values() if tensor.ndim)]
    assert sum(tensor.nbytes for tensor in tensors) == training_bytes(20, 70, fan_in)


# ---- Training --------------------------------------------------------------------------------------------------------

def test_a_drop_of_less_than_a_connection_is_refused(problem):
    model = ExtremeClassifier(32, 300, 4, hidden=32)
    with pytest.raises(ValueError, match="drop is 0.2 of a fan-in of 4"):
        fit_extreme(model, problem.train, ExtremeRecipe(epochs=1), seed=0, description=None)


def test_training_moves_connections_and_keeps_the_fan_in(problem, monkeypatch):
    model = ExtremeClassifier(32, 300, 6, hidden=32)
    before, steps = model.head.mask(), []
    rewire = FanInLinear.rewire

    def watched(head, keep, grow, optimizer):
        state = optimizer.state[head.values]
        weak = head.values.detach().masked_fill(~keep, 0)
        kept = FanInLinear(32, 300, 6, indices=head.indices)
        kept.values.data, kept.bias.data = weak, head.bias.detach().clone()
        x = torch.rand(5, 32)
        expected = kept(x)
        rewire(head, keep, grow, optimizer)
        assert head.indices.shape == (300, 6) and (head.indices.diff(dim=1) > 0).all()
        assert torch.allclose(head(x), expected, atol=1e-5)  # what has grown is 0
        fresh = torch.zeros(300, 32, dtype=torch.bool)
        fresh[grow[:, 0], grow[:, 1]] = True
        fresh = fresh.gather(1, head.indices.long())
        assert fresh.sum() == 300 and (head.values[fresh] == 0).all()
        assert (state["exp_avg"][fresh] == 0).all() and (state["exp_avg_sq"][fresh] == 0).all()
        steps.append(1)

    monkeypatch.setattr(FanInLinear, "rewire", watched)
    recipe = ExtremeRecipe(epochs=5, batch_size=100, rewire_every=7)
    losses = fit_extreme(model, problem.train, recipe, seed=0, description=None)
    assert len(steps) == 4  # steps 7, 14, 21 and 28 of 33, which are 66 % of 50
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert (model.head.mask() != before).any()


def trained(problem, recipe, seed=0, resume=None, fan_in=6, **options):
    model = ExtremeClassifier(32, 300, fan_in, hidden=32, generator=torch.Generator().manual_seed(1), **options)
    losses = fit_extreme(model, problem.train, recipe, seed=seed, resume=resume, description=None)
    return model, losses


def test_the_seed_decides_and_no_share_is_the_base_run(problem):
    recipe = ExtremeRecipe(epochs=2, rewire_every=3)
    base, losses = trained(problem, recipe)
    for options, other in (({}, recipe), ({"n_clusters": 10}, recipe),
                           ({"n_clusters": 10}, ExtremeRecipe(epochs=2, rewire_every=3, auxiliary=0.4,
                                                              auxiliary_epochs=0))):
        model, same = trained(problem, other, **options)
        assert same == losses
        for name, tensor in base.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
    assert trained(problem, recipe, seed=1)[1] != losses
    helped = ExtremeRecipe(epochs=2, rewire_every=3, auxiliary=0.4)
    assert trained(problem, helped, n_clusters=10)[1] != losses


class Killed(Exception):
    pass


def killed_in_epoch(problem, recipe, path, epoch, monkeypatch, **options):
    """Train as :func:`trained` does, but stop within an epoch."""
    loss, calls = ExtremeClassifier.loss, 0

    def counted(*arguments):
        nonlocal calls
        calls += 1
        if calls > (epoch + 0.5) * math.ceil(len(problem.train) / recipe.batch_size):
            raise Killed
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ExtremeClassifier, "loss", counted)
        trained(problem, recipe, resume=path, **options)


@pytest.mark.parametrize("epoch", [0, 1, 3])
@pytest.mark.parametrize("options", [{}, {"n_clusters": 10}, {"fan_in": None}])
def test_a_killed_run_goes_on_to_the_same_bits(problem, epoch, options, tmp_path, monkeypatch):
    """SET, Adam, the order of points and the share of the auxiliary objective go on as if nothing had been."""
    recipe = ExtremeRecipe(epochs=4, batch_size=100, rewire_every=3, rewire_until=1.0,
                           auxiliary=0.4 * ("n_clusters" in options), auxiliary_epochs=3)
    path = tmp_path / "run.safetensors"
    whole, losses = trained(problem, recipe, **options)
    killed_in_epoch(problem, recipe, path, epoch, monkeypatch, **options)
    assert path.exists() == (epoch > 0)
    steps, loss = [], ExtremeClassifier.loss
    monkeypatch.setattr(ExtremeClassifier, "loss", lambda *given: steps.append(1) or loss(*given))
    again, same = trained(problem, recipe, resume=path, **options)
    assert same == losses and len(steps) == 10 * (4 - epoch)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert trained(problem, recipe, resume=path, **options)[1] == losses and len(steps) == 10 * (4 - epoch)
    assert [one.name for one in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_run_on_bags_of_words_goes_on(tmp_path):
    torch.manual_seed(0)
    words = csr_array((torch.rand(40, 12).numpy() > 0.7).astype("float32"))
    data = MultiLabel(words, *listed(torch.rand(40, 9) < 0.3), 9)
    recipe = ExtremeRecipe(epochs=2, batch_size=10, rewire_until=0)
    models = [ExtremeClassifier(12, 9, 3, hidden=6, bags=True, generator=torch.Generator().manual_seed(0))
              for _ in range(3)]
    path = tmp_path / "run"
    losses = [fit_extreme(model, data, recipe, seed=0, resume=path, description=None) for model in models[:2]]
    assert losses[0] == losses[1] and torch.equal(models[0].first.weight, models[1].first.weight)
    data.features.data[0] = 3.0
    with pytest.raises(ValueError, match=r"belongs to a run with data.features '\w+' \(here '\w+'\): give another"):
        fit_extreme(models[2], data, recipe, seed=0, resume=path, description=None)


def test_a_file_of_another_run_is_refused(problem, tmp_path):
    path, recipe = tmp_path / "run", ExtremeRecipe(epochs=1, batch_size=100)
    trained(problem, recipe, resume=path)
    for message, changed in ((r"seed 0 \(here 1\)", {"seed": 1}), (r"initial weights '\w+'", {"n_clusters": 10}),
                             (r"lr 0.003 \(here 0.1\)", {"recipe": dataclasses.replace(recipe, lr=0.1)}),
                             ("data.labels", {"problem": make_multilabel(300, n_train=1000, n_test=1, n_features=32,
                                                                         seed=1)})):
        with pytest.raises(ValueError, match=f"belongs to a run with .*{message}"):
            trained(**{"problem": problem, "recipe": recipe, "resume": path} | changed)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="run is damaged or not a safetensors file"):
        trained(problem, recipe, resume=path)


def test_connections_stay_where_asked(problem):
    model, _ = trained(problem, ExtremeRecipe(epochs=1, rewire_every=1, rewire_until=0))
    untrained = ExtremeClassifier(32, 300, 6, hidden=32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.head.indices, untrained.head.indices)
    assert not torch.equal(model.head.values, untrained.head.values)


def test_it_learns(problem):
    """Far above always guessing the most frequent label."""
    model, _ = trained(problem, ExtremeRecipe(epochs=15, lr=0.02, batch_size=50, rewire_every=20))
    frequent = problem.train.frequencies.argmax().expand(200, 1)
    guess = precision_at(frequent, problem.test, [1])[1]
    assert precisions(model, problem.test, {}, [1])["all"][1] > 2 * guess


def test_training_that_cannot_go_well_is_told(problem):
    with pytest.raises(ValueError, match="the points have 300 labels: expected 299"):
        fit_extreme(ExtremeClassifier(32, 299, 4), problem.train, ExtremeRecipe(), seed=0)
    with pytest.raises(ValueError, match="got 50 points: expected at least a batch of 128"):
        fit_extreme(ExtremeClassifier(32, 300, 4), problem.train.subset(torch.arange(50)), ExtremeRecipe(), seed=0)
    with pytest.raises(FloatingPointError, match="the training loss is (inf|nan) in epoch 1|not finite after"):
        fit_extreme(ExtremeClassifier(32, 300, 4), problem.train, ExtremeRecipe(epochs=1, lr=1e38, drop=0.5), seed=0,
                    description=None)


@pytest.mark.parametrize("setting, value", [("epochs", 0), ("lr", 0), ("drop", 0), ("drop", 1), ("rewire_every", 0),
                                            ("rewire_until", 1.1), ("auxiliary", -0.1), ("auxiliary_epochs", 1.5)])
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(ValueError, match=re.escape(f"{setting} is {value!r}: expected")):
        ExtremeRecipe(**{setting: value})


# ---- Prediction ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk", [1, 7, 300, 1000])
@pytest.mark.parametrize("fan_in", [4, None])
def test_the_best_labels_are_those_of_all_logits(problem, fan_in, chunk):
    model = ExtremeClassifier(32, 300, fan_in, hidden=16)
    logits = model(problem.test.features).detach()
    found = top_labels(model, problem.test, 6, batch_size=64, chunk=chunk)
    assert torch.allclose(logits.gather(1, found), logits.topk(6).values, atol=1e-6)
    assert all(len(set(row)) == 6 for row in found.tolist())
    few = torch.arange(300) % 30 == 0
    found = top_labels(model, problem.test, 10, among=few, chunk=chunk)
    assert (found.sort().values == few.nonzero()[:, 0]).all()
    logits[:, ~few] = -math.inf
    assert torch.allclose(logits.gather(1, found), logits.topk(10).values, atol=1e-6)
    with pytest.raises(ValueError, match="k is 11: expected an integer from 1 to 10"):
        top_labels(model, problem.test, 11, among=few)


def test_precision_is_counted_by_hand(problem):
    data = problem.test
    ranked = torch.stack([torch.randperm(300)[:5] for _ in range(200)])
    ranked[::2, 2] = data.labels[data.offsets[:-1]][::2].long()
    for k, found in precision_at(ranked, data).items():
        hits = [label in labels for row, labels in zip(ranked.tolist(), lists_of(data)) for label in row[:k]]
        assert found == pytest.approx(sum(hits) / (200 * k)) and (found > 0.05) == (k > 1)
    perfect = torch.stack([torch.tensor((labels + [i for i in range(300) if i not in labels])[:5])
                           for labels in lists_of(data)])
    assert precision_at(perfect, data) == pytest.approx(best_precision(data))
    assert best_precision(data)[1] == 1 > best_precision(data)[3]
    with pytest.raises(ValueError, match=re.escape("ranked is [200, 5]: expected [200, at least 6]")):
        precision_at(ranked, data, [6])


def test_head_and_tail_apart(problem):
    groups = head_tail(problem.train)
    assert groups["head"].sum() == 60 and (groups["head"] ^ groups["tail"]).all()
    frequencies = problem.train.frequencies
    assert frequencies[groups["head"]].min() >= frequencies[groups["tail"]].max()
    model = ExtremeClassifier(32, 300, 4, hidden=16)
    logits = model(problem.test.features).detach()
    found = precisions(model, problem.test, groups)
    assert list(found) == ["all", "head", "tail"]
    for name, group in groups.items():
        hits = points = 0
        for i, labels in enumerate(lists_of(problem.test)):
            true = [label for label in labels if group[label]]
            first = logits[i].masked_fill(~group, -math.inf).topk(3).indices.tolist()
            hits, points = hits + len(set(first) & set(true)), points + bool(true)
        assert 0 < points < 200 and found[name][3] == pytest.approx(hits / (3 * points))


def test_within_a_group(problem):
    group = torch.arange(300) % 2 == 0
    part = within(problem.test, group)
    kept = [i for i, labels in enumerate(lists_of(problem.test)) if any(label % 2 == 0 for label in labels)]
    assert torch.equal(part.features, problem.test.features[kept])
    assert lists_of(part) == [[label for label in lists_of(problem.test)[i] if label % 2 == 0] for i in kept]
    assert isinstance(part, MultiLabel) and part.n_labels == 300


# ---- The benchmark ---------------------------------------------------------------------------------------------------

@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("extreme")


def test_the_benchmark_writes_what_it_found(benchmark, monkeypatch, tmp_path, capsys):
    small = dataclasses.replace(benchmark.EXPERIMENTS[10_000], points=300, test_points=100, clusters=5, hidden=20)
    monkeypatch.setitem(benchmark.EXPERIMENTS, 10_000, small)
    result = tmp_path / "extreme.json"
    monkeypatch.setattr(sys, "argv", ["extreme.py", "--seeds", "2", "--epochs", "1", "--result", str(result)])
    benchmark.main()
    record = json.loads(result.read_text())
    assert [row["method"] for row in record["rows"]] == list(METHODS) * 2
    assert [row["seed"] for row in record["rows"]] == [0] * 6 + [1] * 6
    for row in record["rows"]:
        assert row["precision"].keys() == {"all", "head", "tail"}
        assert all(0 <= value <= 1 for values in row["precision"].values() for value in values.values())
    first = {row["seed"]: row["precision"]["all"]["1"] for row in record["rows"] if row["method"] == "set"}
    other = {row["seed"]: row["precision"]["all"]["1"] for row in record["rows"] if row["method"] == "static"}
    found = next(pair for pair in record["compared"] if (pair["a"], pair["b"]) == ("set", "static"))
    assert found["difference"] == pytest.approx(sum(first[seed] - other[seed] for seed in first) / 2)
    assert "precision at 1 / 3 / 5" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    ({"chunk": -1}, "chunk is -1"), ({"batch_size": 0}, "batch_size is 0"),
    ({"k": 301}, "k is 301: expected .* to 300"),
    ({"among": torch.tensor([1, 2, 5])}, r"among is torch.int64 \[3\]: expected bool \[300\]"),
    ({"among": torch.ones(300, dtype=torch.int64)}, "among is torch.int64"),
])
def test_a_ranking_that_cannot_be_is_refused(problem, options, message):
    with pytest.raises(ValueError, match=message):
        top_labels(ExtremeClassifier(32, 300, 4), problem.test, **options)
    with pytest.raises(ValueError, match=re.escape("ks are [0]")):
        precision_at(torch.zeros(len(problem.test), 5), problem.test, [0])


def test_features_that_do_not_fit_the_classifier_are_refused(problem):
    with pytest.raises(ValueError, match="the points have 32 features: expected 40"):
        ExtremeClassifier(40, 300, 4)(problem.test.features)
    with pytest.raises(ValueError, match="the features are a Tensor and bags is True"):
        ExtremeClassifier(32, 300, 4, hidden=8, bags=True)(problem.test.features)
    with pytest.raises(ValueError, match="the features are a csr_array and bags is False"):
        ExtremeClassifier(32, 300, 4)(csr_array(problem.test.features.numpy()))
