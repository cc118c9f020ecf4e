"""Siblings of a ticket, as small as they can be: which runs of the lottery they are, what they share."""

from dataclasses import replace

import pytest
import torch

from permask_core.experiments import permuted_masks, retrained_tickets, trainings
from permask_core.experiments.permuted_masks import Experiment, build_network, find_ticket, train_dense
from permask_core.experiments.retrained_tickets import (
    FROM_SCRATCH,
    METHODS,
    SPAN,
    member_epochs,
    member_masks,
    run,
    train_member,
    training_epochs,
)
from permask_core.masks import apply_masks, layer_sparsity
from permask_core.runs.store import Store

TINY = Experiment(width=0.3, epochs=4, checkpoints=(0, 1), rewind=1, matched_at=4, imp_rewind=1, imp_epochs=1,
                  imp_rate=0.5)
GRID = {"seeds": [0, 1], "members": 2, "sparsity": 0.8, "methods": METHODS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of everything: its store and its rows."""
    store = Store(tmp_path_factory.mktemp("members"))
    return store, run(TINY, store, **GRID)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plain(rows):
    return [{name: value for name, value in row.items() if name not in ("seconds", "logits")} for row in rows]


def test_one_row_per_run(finished):
    _, rows = finished
    places = [(row["method"], row["seed"], row["member"]) for row in rows]
    assert sorted(places) == sorted((method, seed, number) for method in METHODS for seed in (0, 1)
                                    for number in (0, 1))
    y = permuted_masks.data(TINY).test.y
    for row in rows:
        assert row["achieved"] == pytest.approx(row["sparsity"], abs=1e-3)
        assert row["sparsity"] == (0 if row["method"] == "dense" else 0.8)
        assert (row["logits"].argmax(1) == y).float().mean().item() == pytest.approx(row["accuracy"])
    assert len({row["logits"].sum().item() for row in rows}) == len(rows)  # no two are the same network


@pytest.mark.parametrize("method", permuted_masks.KNOWN_METHODS[1:])
def test_the_first_member_is_the_run_of_permuted_masks(finished, method):
    store, _ = finished
    for seed in (0, 1):
        states, record = train_member(TINY, store, seed, 0, 0.8, method)
        state, expected = permuted_masks.train_sparse(TINY, store, SPAN * seed, 0.8, method,
                                                      "weights" if method == "permuted" else None)
        assert same(states[3], state) and record["accuracy"] == expected["accuracy"]


def test_a_sparse_start_is_the_lotterys(tmp_path):
    store, scaled = Store(tmp_path), replace(TINY, start="sparse")
    for method in ("pruned", "permuted"):
        by = "weights" if method == "permuted" else None
        state, _ = permuted_masks.train_sparse(scaled, store, 0, 0.8, method, by)
        assert same(train_member(scaled, store, 0, 0, 0.8, method)[0][3], state)


def test_states_are_kept_on_the_way(finished):
    store, _ = finished
    assert member_epochs(TINY) == [0, 1, 2, 3]
    assert member_epochs(Experiment()) == [0, 1, 2, 4, 8, 16, 18]
    states, _ = train_member(TINY, store, 0, 1, 0.8, "lth")
    assert list(states) == [0, 1, 2, 3] and list(train_member(TINY, store, 0, 1, 0.8, "dense")[0]) == [0, 1, 4]


def test_what_members_start_from(finished):
    store, _ = finished
    for number in (0, 1):
        b = train_dense(TINY, store, number, "b")[0]
        a = train_dense(TINY, store, 0, "a")[0]
        own = train_dense(TINY, store, number, "a")[0]
        for method, start in (("lth", a[1]), ("pruned", own[4]), ("naive", b[1]), ("permuted", b[1]),
                              ("random", b[1]), ("scratch", b[0])):
            masks = member_masks(TINY, store, 0, number, 0.8, method)
            assert same(train_member(TINY, store, 0, number, 0.8, method)[0][0], apply_masks(start, masks)), method


def test_what_masks_members_have(finished):
    store, _ = finished
    masks = {method: [member_masks(TINY, store, 0, number, 0.8, method) for number in (0, 1)]
             for method in METHODS[1:]}
    first = find_ticket(TINY, store, 0, 0.8).masks
    for method in ("lth", "naive", *FROM_SCRATCH):
        assert same(masks[method][0], first) and same(masks[method][1], first)
    assert same(masks["pruned"][0], first) and not same(masks["pruned"][1], first)
    for method in ("permuted", "random"):
        assert not same(*masks[method]) and not same(masks[method][0], first)
        assert all(layer_sparsity(one) == layer_sparsity(first) for one in masks[method])


def test_four_starts_from_scratch_are_two_draws_each_with_two_variances(finished):
    store, _ = finished
    start = {method: train_member(TINY, store, 0, 0, 0.8, method)[0][0] for method in FROM_SCRATCH}
    mask = member_masks(TINY, store, 0, 0, 0.8, "he")["fc1.weight"]
    left, full = mask.sum(1, keepdim=True), mask.shape[1]
    weights = {method: state["fc1.weight"] for method, state in start.items()}
    assert all((found[~mask] == 0).all() for found in weights.values())
    for dense, sparse in (("scratch", "rescaled"), ("he", "sparse_init")):
        torch.testing.assert_close(weights[dense] * (full / left.clamp(min=1)).sqrt(), weights[sparse])
    for method, variance in (("scratch", 1 / (3 * full)), ("he", 2 / full)):
        assert weights[method][mask].var().item() == pytest.approx(variance, rel=0.25)
    bias = build_network(TINY, seed=1).state_dict()["fc1.bias"]
    assert all(torch.equal(state["fc1.bias"], bias) for state in start.values())


def test_finished_runs_are_found_again_and_by_several_workers(finished, tmp_path):
    store, rows = finished
    again = Store(store.folder)
    assert plain(run(TINY, again, **GRID)) == plain(rows) and again.computed == 0
    few = {**GRID, "methods": ("dense", "permuted")}
    several = run(TINY, Store(tmp_path), **few, workers=2)
    assert plain(several) == [row for row in plain(rows) if row["method"] in few["methods"]]


@pytest.mark.parametrize("method", ["dense", "pruned", "lth", "permuted", "scratch"])
def test_the_cost_is_what_is_trained(tmp_path, monkeypatch, method):
    epochs, fit = [], trainings.fit

    def spy(model, train, recipe, **options):
        epochs.append(recipe.epochs)
        return fit(model, train, recipe, **options)

    monkeypatch.setattr(trainings, "fit", spy)
    retrained_tickets.run(TINY, Store(tmp_path), seeds=[0], members=2, sparsity=0.8, methods=[method])
    assert training_epochs(TINY, 2, 0.8, method) == sum(epochs)


def test_the_cost_leaves_out_epochs_that_nobody_looks_at():
    """A and its two rounds of one epoch are shared: 4 + 2. Three members: 3 sparse epochs, and what they need of B."""
    early = replace(TINY, matched_at=1)
    found = {method: training_epochs(early, 3, 0.8, method) for method in METHODS}
    assert found == {"dense": 12, "pruned": 3 * 9, "lth": 6 + 9, "permuted": 6 + 3 * 4, "naive": 6 + 3 * 4,
                     "random": 6 + 3 * 4, **dict.fromkeys(FROM_SCRATCH, 6 + 9)}
    assert training_epochs(TINY, 3, 0.8, "permuted") == 6 + 3 * 7
    with pytest.raises(ValueError, match="members is 0"):
        training_epochs(TINY, 0, 0.8, "lth")


@pytest.mark.parametrize("changes, message", [
    ({"methods": ["lth", "best"]}, "unknown method 'best': expected one of dense, pruned"),
    ({"seeds": [-1]}, "seed is -1"), ({"members": 0}, "members is 0: expected an integer of at least 1"),
    ({"members": SPAN + 1}, f"members is {SPAN + 1}: expected at most {SPAN}"),
    ({"members": True}, "members is True"),
    ({"methods": "lth"}, "methods is 'lth': expected a list"), ({"seeds": [0, 0]}, r"seeds is \[0, 0\].* once"),
    ({"seeds": []}, r"seeds is \[\]: expected a list with at least one value"),
    ({"sparsity": 1.0}, "sparsity is 1.0|1.0"), ({"workers": 0}, "workers is 0"),
])
def test_nothing_is_trained_before_what_is_wrong_is_said(tmp_path, changes, message):
    store = Store(tmp_path / "runs")
    with pytest.raises(ValueError, match=message):
        run(TINY, store, **{**GRID, **changes})
    assert not store.folder.exists()
    with pytest.raises(ValueError, match="member is 100"):
        train_member(TINY, store, 0, SPAN, 0.8, "lth")
