"""The experiment on compressed experts: it learns, counts right answers, compresses, and resumes from its store."""

import pytest
import torch

from permask_core.experiments import compressed_experts
from permask_core.experiments.compressed_experts import (
    METHODS,
    calibration_sequences,
    compress,
    data,
    exact_matches,
    measure_network,
    number_of_experts,
    preset,
    removal_errors,
    run,
)
from permask_core.experts import moe_blocks
from permask_core.runs.store import Store

TINY = preset(options={"digits": 2, "n_train": 2560, "n_test": 80}, calibration=100,
              model_options={"layers": 1, "experts": 6, "units": 16, "width": 0.5},
              recipe={"lr": 0.01, "batch_size": 64})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def measured(store):
    return measure_network(TINY, store, 0)


def test_the_loss_falls_and_the_store_has_the_network(store, measured):
    model, statistics, whole = measured
    x, y = data(TINY).test.x, data(TINY).test.y
    start = compressed_experts.build_network(TINY, seed=0)
    losses = [float(compressed_experts.BalancedLoss(0.0)(compressed_experts.logits_and_balance(one, x), y))
              for one in (start, model)]
    assert losses[1] < 0.7 * losses[0] and set(whole) == {"reverse", "sort", "larger", "replace"}
    computed = store.computed
    assert all(torch.equal(a, b) for a, b in zip(
        model.parameters(), compressed_experts.train_network(TINY, store, 0).parameters()))
    assert store.computed == computed and statistics["blocks.0.mixture"].tokens == 500


class Oracle(torch.nn.Module):
    """Predicts the labels, with a wrong last digit in given sequences."""

    def __init__(self, split, wrong):
        super().__init__()
        self.split, self.wrong = split, wrong

    def forward(self, x):
        at = [int((self.split.x == one).all(1).nonzero()[0]) for one in x]
        y = self.split.y[at].clamp(min=0)
        y[:, -1] = torch.where(torch.tensor([i in self.wrong for i in at]), (y[:, -1] + 1) % 10, y[:, -1])
        return torch.nn.functional.one_hot(y, 15).double()


def test_an_answer_is_right_only_as_a_whole():
    split = data(preset(options={"digits": 5, "n_train": 10, "n_test": 80})).test
    assert exact_matches(Oracle(split, set()), split) == dict.fromkeys(("reverse", "sort", "larger", "replace"), 1.0)
    found = exact_matches(Oracle(split, {0, 4, 8, 2}), split)  # skills take turns: three of the first, one of the third
    assert found == {"reverse": 0.85, "sort": 1.0, "larger": 0.95, "replace": 1.0}


def test_a_right_answer_is_the_answer_of_greedy_decoding(measured):
    model, split = measured[0], data(TINY).test
    right = ((model(split.x).argmax(-1) == split.y) | (split.y < 0)).all(1)
    decoded = split.x[:, :4].clone()  # skill, two digits, "="
    for _ in range(2):
        decoded = torch.cat([decoded, model(decoded)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal((decoded[:, 4:] == split.y[:, 3:]).all(1), right) and 0 < right.sum() < len(right)


def test_calibration_without_a_skill():
    every, without = (calibration_sequences(preset(options={"n_train": 2000, "n_test": 4}, left_out=skill))
                      for skill in (None, "sort"))
    assert len(every) == len(without) == 768
    assert (every[:, 0] == 12).any() and not (without[:, 0] == 12).any() and len(without[:, 0].unique()) == 3


def test_the_error_of_a_removal_is_that_of_the_block_without_the_expert(measured):
    model, statistics, _ = measured
    name = "blocks.0.mixture"
    found, mixture = statistics[name], model.blocks[0].mixture
    errors = removal_errors(model, statistics)[name]
    with torch.no_grad():
        whole = mixture(found.x)
        for j in range(6):
            logits = mixture.router(found.x)[0].clone()
            logits[:, j] = -torch.inf
            best, chosen = logits.topk(2)
            change = mixture.experts(found.x, chosen, best.softmax(-1)) - whole
            assert float(errors[j]) == pytest.approx(float(change.square().sum() / whole.square().sum()), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_returns_a_smaller_model_or_merged_slots(method, measured):
    model, statistics, _ = measured
    block = moe_blocks(compress(model, statistics, method, 3, matching=None, seed=1))["blocks.0.mixture"]
    distinct = len({tuple(one.flatten()[:50].tolist()) for one in block.experts.down_proj})
    assert distinct == 3 and block.count == (6 if method in ("hc_smoe", "m_smoe") else 3)


def test_rows_and_a_second_run_that_computes_nothing(store, measured):
    given = {"seeds": [0], "keeps": [4, 2], "methods": ["random", "reap", "ream"], "matchings": [None, "weights"]}
    rows = run(TINY, store, **given)
    assert [(row["method"], row["matching"], row["kept"]) for row in rows] == [("dense", None, 6)] + [
        (method, matching, kept) for kept in (4, 2)
        for method, matching in (("random", None), ("reap", None), ("ream", None), ("ream", "weights"))]
    for row in rows:
        assert row["mean"] == pytest.approx(sum(row[one] for one in ("reverse", "sort", "larger", "replace")) / 4)
    computed = store.computed
    assert run(TINY, store, **given) == rows and store.computed == computed
    assert number_of_experts(TINY) == 6


@pytest.mark.parametrize("changes, message", [
    ({"left_out": "add"}, "left_out is 'add': expected one of reverse, sort, larger, replace"),
    ({"calibration": 0}, "calibration is 0"), ({"model": "gpt"}, "model is 'gpt'"),
    ({"dataset": "digits"}, "dataset is 'digits'"), ({"model_options": {"depth": 1}}, "moe has no option 'depth'"),
    ({"options": {"size": 1}}, "skills has no option 'size'")])
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        preset(**changes)


def test_wrong_methods_and_numbers_are_refused_before_work(store):
    with pytest.raises(ValueError, match="unknown method 'reep', perhaps 'reap'"):
        run(TINY, store, seeds=[0], keeps=[2], methods=["reep"])
    with pytest.raises(ValueError, match="keeps is"):
        run(TINY, store, seeds=[0], keeps=[])
