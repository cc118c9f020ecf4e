"""The stages of lines: their ends are the stored networks, their barriers those of plain evaluations."""

import re
from dataclasses import replace

import pytest
import torch

from permask_core.evaluation.connectivity import angle, barrier, distance, line
from permask_core.experiments import basins, permuted_masks
from permask_core.experiments.stages import data
from permask_core.masks import prunable_weights, sparsity
from permask_core.matching import permute
from permask_core.runs.store import Store
from permask_core.training import evaluate
from tests import notebooks

TINY = permuted_masks.Experiment(width=0.25, epochs=3, checkpoints=(0, 1, 3), rewind=1, matched_at=3, imp_rewind=1,
                                 imp_epochs=1, imp_rate=0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def rows(store):
    return basins.run(TINY, store, seeds=[0, 1], sparsities=[0, 0.75], points=5)


def test_a_row_for_each_line(rows):
    assert [(row["seed"], row["sparsity"], row["method"], row["matching"]) for row in rows] == [
        (seed, *one) for seed in (0, 1) for one in (
            (0, "permuted", "weights"), (0, "naive", ""), (0.75, "lth", ""), (0.75, "permuted", "weights"),
            (0.75, "naive", ""))]
    assert all(row["width"] == 0.25 and row["matched_at"] == 3 for row in rows)


def test_a_row_is_what_a_line_says(rows, store):
    for row in rows[:5]:
        source, goal = basins.ends(TINY, store, 0, row["sparsity"], row["method"])
        test = line(permuted_masks.build_network(TINY), source, goal, data(TINY).test, points=5)
        train = line(permuted_masks.build_network(TINY), source, goal, data(TINY).train, points=5)
        assert row["losses"] == pytest.approx(test.losses.tolist())
        assert row["errors"] == pytest.approx(test.errors.tolist())
        assert row["barrier"] == pytest.approx(barrier(test.alphas, test.losses))
        assert row["error_barrier"] == pytest.approx(barrier(test.alphas, test.errors))
        assert row["train_barrier"] == pytest.approx(barrier(train.alphas, train.losses))
        assert row["train_error_barrier"] == pytest.approx(barrier(train.alphas, train.errors))
        assert (row["distance"], row["angle"]) == pytest.approx((distance(source, goal), angle(source, goal)))


def test_the_ends_of_dense_lines_are_a_and_b(store):
    a, b = (permuted_masks.train_dense(TINY, store, 0, which) for which in "ab")
    for method in basins.DENSE:
        source, goal = basins.ends(TINY, store, 0, 0, method)
        assert all(torch.equal(goal[name], tensor) for name, tensor in b[0][3].items())
        loss = evaluate(permuted_masks.build_network(TINY, source), data(TINY).test).loss
        assert loss == pytest.approx(a[1]["loss"], rel=1e-5)
    assert distance(basins.ends(TINY, store, 0, 0, "permuted")[0], b[0][3]) < distance(a[0][3], b[0][3])


@pytest.mark.parametrize("method", basins.SPARSE)
def test_both_ends_of_a_sparse_line_have_one_mask(method, store):
    source, goal = basins.ends(TINY, store, 0, 0.75, method)
    weights = prunable_weights(permuted_masks.build_network(TINY))
    masks = [{name: state[name] != 0 for name in weights} for state in (source, goal)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in weights)
    assert sparsity(masks[0]) == pytest.approx(0.75, abs=1e-3)
    pruned = permuted_masks.train_sparse(TINY, store, 0, 0.75, "pruned")[0]
    if method == "permuted":
        pruned = permute(permuted_masks.groups(TINY), permuted_masks.match_dense(TINY, store, 0, "weights")[0], pruned)
    assert all(torch.equal(source[name], tensor) for name, tensor in pruned.items())


def test_lines_are_found_again(rows, store):
    again = Store(store.folder)
    assert basins.run(TINY, again, seeds=[0, 1], sparsities=[0, 0.75], points=5) == rows
    assert again.computed == 0


def test_a_reset_asks_for_batchnorm_before_any_training(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="has no BatchNorm"):
        basins.losses_between(TINY, store, 0, 0, "naive", points=3, correction="reset")
    with pytest.raises(ValueError, match="has no BatchNorm"):
        basins.run([replace(TINY, model="resnet8"), TINY], store, seeds=[0], sparsities=[0], points=3,
                   correction="reset")
    assert store.computed == 0


def test_a_repair_asks_for_no_batchnorm(store):
    found, _ = basins.losses_between(TINY, store, 0, 0, "naive", points=3, correction="repair")
    assert found["test_losses"].isfinite().all()


@pytest.mark.parametrize("correction", ["reset", "repair"])
def test_a_batchnorm_without_statistics_is_refused_before_any_training(correction, tmp_path, monkeypatch):
    def without(experiment, *_):
        return torch.nn.Sequential(torch.nn.BatchNorm1d(2, track_running_stats=False))

    monkeypatch.setattr(basins, "build_network", without)
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="BatchNorm '0' has no running statistics"):
        basins.run(TINY, store, seeds=[0], sparsities=[0], correction=correction)
    assert store.computed == 0


@pytest.mark.parametrize("changes, said", [
    ({"sparsities": [1.0]}, "sparsity is 1.0"), ({"by": "eye"}, "unknown matching 'eye'"),
    ({"points": 2}, "points is 2"), ({"seeds": [-1]}, "seed is -1"), ({"workers": 0}, "workers is 0"),
    ({"correction": "rest"}, "unknown correction 'rest'"),
    ({"experiment": replace(TINY, matched_layers=("head",))}, "unknown group in matched_layers 'head'")])
def test_what_is_out_of_range_is_refused_before_any_training(changes, said, tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=said):
        basins.run(**{"experiment": TINY, "store": store, "seeds": [0], "sparsities": [0], **changes})
    assert store.computed == 0


def test_a_method_that_has_no_line_is_named(store):
    with pytest.raises(ValueError, match="unknown method 'lth': expected one of permuted, naive"):
        basins.ends(TINY, store, 0, 0, "lth")


# ---- The chapter -----------------------------------------------------------------------------------------------------

def checked(**changes):
    """Run the chapter's parameters, with changes, and its check."""
    return notebooks.run("basins_and_connectivity", changes, until="check").space["base"]


def test_the_chapter_runs_what_it_says():
    base = checked(epochs=8, rewind=3, sparse_lr=0.02)
    assert (base.epochs, base.rewind, base.imp_epochs, base.matched_at, base.sparse_lr) == (8, 3, 5, 8, 0.02)
    assert base.checkpoints == (0, 1, 2, 3, 5, 8)


@pytest.mark.parametrize("name, value, said", [
    ("seeds", 0, "seeds is 0"), ("first_seed", -1, "first_seed is -1"),
    ("points", 2, "points is 2"), ("points", 8, "points is 8: expected an odd"),
    ("grid", 1, "grid is 1"), ("workers", 0, "workers is 0"), ("widths", 1.0, "widths is 1.0: expected a list"),
    ("widths", [0], "widths is [0]"), ("sparsities", [0.5, 1.0], "sparsities is [0.5, 1.0]"),
    ("sparsities", [], "sparsities is"), ("epochs", 0, "epochs is 0"), ("epochs", "20", "epochs is '20'"),
    ("rewind", 20, "rewind is 20: expected an epoch from 0 to 19"), ("rewind", 25, "rewind is 25"),
    ("lr", 0, "lr is 0"), ("sparse_lr", "x", "sparse_lr is 'x'")])
def test_the_chapter_refuses_what_is_out_of_range(name, value, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        checked(**{name: value})
