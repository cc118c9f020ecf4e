"""What the page on ensembles from one mask says of its stored study."""

import json
from dataclasses import asdict

import pytest

from tests.notebooks import run

ALL = range(10)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page after the study, before anything is trained."""
    return run("ensembles_from_one_mask", {}, tmp_path_factory.mktemp("page"), until="claims", draw=False).space


def test_the_study_has_the_recipe_of_the_page(page):
    assert page["study"]["settings"].items() <= json.loads(json.dumps(asdict(page["base"]))).items()


def test_one_mask_does_not_pass_one_dense_network_and_masks_of_their_own_do(page):
    gap, held_out, thrift, passing = (page[name] for name in ("gap", "HELD_OUT", "thrift", "passing"))
    eight, dense = (thrift, 8), ("dense", 1)
    assert passing[thrift] is None and gap(eight, dense, held_out).low < 0 < gap(eight, dense, held_out).high
    assert gap((thrift, page["near"][thrift]), dense, held_out).low > -0.5
    assert gap(("pruned", passing["pruned"]), dense, held_out).low > 0
    for better in (("dense", 2), ("pruned", 8)):
        assert gap(better, eight, held_out).low > 0
    for one_mask in ("lth", "permuted", "permuted early", "naive"):
        assert all(gap(("pruned", k), (one_mask, k), ALL).low > 0 for k in range(2, 9)), one_mask


def test_members_help_permuted_networks_and_hardly_help_tickets(page):
    gap, held_out, thrift = (page[name] for name in ("gap", "HELD_OUT", "thrift"))
    for worse in (("naive", 8), (thrift, 1)):
        assert gap((thrift, 8), worse, held_out).low > 0
    assert gap(("lth", 8), ("lth", 1), ALL).high < 0.3


def test_matching_early_loses_nothing_and_saves_a_third_of_the_training(page):
    epochs = page["prices"]["epochs"]
    assert page["thrift"] == "permuted early"
    assert page["gap"](("permuted early", 8), ("permuted", 8), page["HELD_OUT"]).low > -0.1
    assert epochs["permuted early", 8] < 0.7 * epochs["permuted", 8]
