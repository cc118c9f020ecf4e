"""What the page on better alignments says of its stored study."""

import pytest

from permask_core.evaluation.statistics import paired_comparison
from tests.notebooks import run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page after all that it says of the study, before anything is trained."""
    return run("better_alignment", {}, tmp_path_factory.mktemp("page"), until="price", draw=False).space


def test_every_finalist_compares_only_what_the_mask_keeps(page):
    assert {*page["FINALISTS"]} == {"trained ticket", "sparse epochs", "pruned weights, early", "pruned Frank-Wolfe",
                                    "pruned both"}


def test_seeds_of_the_choice_are_not_those_of_the_final(page):
    assert not {*page["choice"]["block"]} & {*page["final"]["block"]}


def test_matching_the_pruned_network_is_ahead_everywhere_and_most_where_perceptrons_are_narrow(page):
    gains = {}
    for (net, sparsity), rows in page["final"].groupby(["net", "sparsity"]):
        accuracy = rows.pivot_table(index="block", columns="method", values="accuracy")
        gains[net, sparsity] = paired_comparison(100 * accuracy["pruned weights, early"], 100 * accuracy["weights"])
    assert len(gains) == 9 and all(gain.low > 0 for gain in gains.values())
    assert gains["perceptron × 0.25", 0.985].low > gains["perceptron × 1", 0.985].high
    assert page["closed"]("perceptron × 0.25", 0.985, "pruned weights, early").low > 0.75


def test_more_connections_of_the_own_ticket_do_not_make_a_better_mask(page):
    for _, rows in page["choice"].query("network == 'noisy-digits-mlp'").groupby("width"):
        of = rows.groupby("method")[["overlap", "accuracy"]].mean()
        for other in ("one-shot", "mask to mask"):
            assert of.loc[other, "overlap"] > of.loc["pruned weights", "overlap"]
            assert of.loc[other, "accuracy"] < of.loc["pruned weights", "accuracy"]
