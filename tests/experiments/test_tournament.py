"""The tournament of alignments: masks of the right size from the right networks, and rows that say what was trained."""

import re

import pytest
import torch

from permask_core.experiments import permuted_masks, tournament
from permask_core.experiments.alignment import mask_overlap
from permask_core.experiments.stages import data
from permask_core.experiments.tournament import CANDIDATES, Case
from permask_core.masks import layer_sparsity, sparsity
from permask_core.matching import permute, random_permutations
from permask_core.runs.store import Store
from permask_core.training import evaluate, fit

TINY = permuted_masks.Experiment(width=0.25, epochs=3, checkpoints=(0, 1, 3), rewind=1, matched_at=3, imp_rewind=1,
                                 imp_epochs=1, imp_rate=0.5)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def rows(store):
    return tournament.run(TINY, store, blocks=[1], sparsities=[0.8])


@pytest.fixture(scope="module")
def case(store):
    return Case(TINY, store, 1, 2, 0.8)


def test_a_row_for_each_candidate_and_network(rows):
    assert [(row["seed"], row["method"]) for row in rows] == [(i, name) for i in range(4, 8) for name in CANDIDATES]
    assert all((row["block"], row["sparsity"], row["width"]) == (1, 0.8, 0.25) for row in rows)
    assert {row["epochs"] for row in rows if row["kind"] == "oracle"} == {None}
    assert {row["epochs"] for row in rows if row["kind"] != "oracle"} == {1, 3}


def test_a_target_has_the_other_networks_of_its_block_as_sources():
    assert [(case.b, case.sources) for case in (Case(TINY, None, 1, i, 0.8) for i in range(4))] == [
        (4, [5, 6, 7]), (5, [6, 7, 4]), (6, [7, 4, 5]), (7, [4, 5, 6])]


def test_every_mask_has_the_sparsity_and_a_moved_one_that_of_each_layer(rows, case):
    ticket = case.ticket(7)  # of A
    for name, candidate in CANDIDATES.items():
        mask = tournament.make_mask(case, name)[0]
        assert sparsity(mask) == pytest.approx(sparsity(ticket)), name
        if candidate.kind == "permutation":
            assert layer_sparsity(mask) == layer_sparsity(ticket), name
    assert all(row["achieved"] == pytest.approx(sparsity(ticket)) for row in rows)


def test_the_names_say_whose_mask_it_is(case):
    made = {name: tournament.make_mask(case, name)[0] for name in ("naive", "own ticket", "weights")}
    of_weights = permuted_masks.match_weights(case.groups, case.state(7, 3), case.state(6, 3))
    expected = {"naive": case.ticket(7), "own ticket": case.ticket(6),
                "weights": permute(case.groups, of_weights, case.ticket(7))}
    for name, mask in made.items():
        assert all(torch.equal(mask[key], expected[name][key]) for key in mask), name


def test_no_permutation_overlaps_more_with_the_own_ticket_than_the_one_that_is_made_for_it(rows):
    for row in rows:
        best, = (one["overlap"] for one in rows if (one["seed"], one["method"]) == (row["seed"], "mask to mask"))
        assert row["kind"] != "permutation" or row["overlap"] <= best
        assert row["method"] != "own ticket" or row["overlap"] == 1


def test_a_row_is_what_training_under_the_mask_gives(rows, case):
    row, = (row for row in rows if (row["seed"], row["method"]) == (6, "pruned weights"))
    model = permuted_masks.build_network(TINY, case.state(6, 1))
    fit(model, data(TINY).train, TINY.recipe(2, TINY.sparse_lr), seed=10_006,
        masks=tournament.make_mask(case, "pruned weights")[0])
    found = evaluate(model, data(TINY).test)
    assert (row["accuracy"], row["loss"]) == pytest.approx(tuple(found))


def test_gradients_are_those_of_the_mean_loss(case):
    found = tournament.gradients(case, 6, 1)
    model = permuted_masks.build_network(TINY, case.state(6, 1)).eval()
    x, y = next(data(TINY).train.batches([torch.arange(len(data(TINY).train))]))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.allclose(found[name], weight.grad, atol=1e-6) for name, weight in model.named_parameters())


def test_a_network_whose_copies_are_permuted_gets_its_own_ticket(case, monkeypatch):
    """Three sources that are B with other units: every candidate that moves their masks finds B's own ticket."""
    own, orders = {}, {}
    for seed in (7, 4, 5):
        orders[seed] = random_permutations(case.groups, seed=seed)
        own[seed] = {epoch: permute(case.groups, orders[seed], case.state(6, epoch)) for epoch in (0, 1, 3)}
    ticket, dense = case.ticket(6), {epoch: case.state(6, epoch) for epoch in (0, 1, 3)}
    monkeypatch.setattr(Case, "state", lambda self, seed, epoch: own.get(seed, dense)[epoch])
    monkeypatch.setattr(Case, "ticket", lambda self, seed: permute(
        self.groups, orders[seed], ticket) if seed in orders else ticket)
    kinds = {name for name, one in CANDIDATES.items() if one.kind == "permutation" or name == "vote of masks"}
    # These compare other networks than the copies: a mask, a pruned network with a dense one, or a trained one.
    for name in sorted(kinds - {"mask to magnitudes", "pruned activations", "pruned both", "trained ticket",
                                "sparse epochs"}):
        overlap = mask_overlap(CANDIDATES[name].makes(case), ticket)
        alike = any(word in name for word in ("activations", "gradients", "saliency"))  # units that never respond
        assert overlap == 1 or alike and overlap > 0.9, name


@pytest.mark.parametrize("changes, message", [
    ({"candidates": ["weight"]}, "unknown candidate 'weight', perhaps 'weights': expected one of naive, random"),
    ({"candidates": []}, "candidates is []: expected a list with at least one value"),
    ({"sparsities": [1.0]}, "sparsity is 1.0: expected a number in (0, 1)"),
    ({"blocks": []}, "blocks is []: expected a list with at least one value"),
    ({"blocks": [-1]}, "seed is -1: expected an integer of at least 0"),
])
def test_what_is_wrong_is_named_before_any_training(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        tournament.run(TINY, Store(tmp_path), **{"blocks": [0], "sparsities": [0.8], "candidates": ["naive"]} | changes)
    assert not any(tmp_path.iterdir())
