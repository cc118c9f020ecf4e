"""What the page on tickets in transformers says of the stored grid."""

import pandas as pd
import pytest

from permask_core.data.measured import measured_grid
from permask_core.display import select
from permask_core.evaluation.statistics import paired_comparison

STUDY = pd.DataFrame(measured_grid("transformers", "transformer_tickets")["rows"]).fillna({"matching": "", "moved": ""})
ROWS, CHARACTERS = (STUDY[STUDY["model"] == model] for model in ("vit", "gpt"))
WHOLE = ROWS[ROWS["moved"].isin(["", "everything"])]
OTHERS = [("permuted", "activations"), ("permuted", "weights"), ("naive", ""), ("random", "")]


def at(method, by="", s=0.95, rows=WHOLE):
    return 100 * select(rows, "accuracy", method=method, matching=by, sparsity=s)


def test_the_pairs_are_whole_and_did_not_choose_the_settings():
    assert ROWS["seed"].min() >= 5 and at("lth").size >= 5
    assert WHOLE.groupby(["method", "matching", "sparsity"])["seed"].nunique().unique().tolist() == [at("lth").size]
    assert at("dense", s=0.0).mean() > 83


@pytest.mark.parametrize("method, by", OTHERS)
def test_the_ticket_is_ahead_of_every_other_mask(method, by):
    assert paired_comparison(at("lth"), at(method, by)).low > 0


@pytest.mark.parametrize("by", ["activations", "weights"])
@pytest.mark.parametrize("other", ["naive", "random"])
def test_a_permuted_mask_is_not_clearly_ahead_of_others_for_b(by, other):
    assert paired_comparison(at("permuted", by), at(other)).low < 0


def test_moved_masks_agree_with_b_hardly_better_than_random_ones():
    compared = WHOLE[WHOLE["overlap"].notna() & (WHOLE["sparsity"] == 0.95)]
    large = compared.groupby(["method", "matching"])["overlap"].mean()
    assert large.max() < 1.3 * large["random", ""]


def test_parts_of_the_permutation_do_not_help_either():
    for part in ("MLP units", "heads and their dimensions", "residual stream"):
        own = ROWS[(ROWS["moved"] == part) & (ROWS["sparsity"] == 0.95)].sort_values("seed")
        naive = WHOLE[(WHOLE["method"] == "naive") & (WHOLE["sparsity"] == 0.95)].set_index("seed")["accuracy"]
        found = paired_comparison(100 * own["accuracy"].to_numpy(), 100 * naive[own["seed"]].to_numpy())
        assert found.low < 0 and abs(found.difference) < 1.5, part


@pytest.mark.parametrize("by", ["activations", "weights"])
def test_permuted_masks_of_the_character_model_are_between_the_naive_mask_and_the_ticket(by):
    assert CHARACTERS["seed"].nunique() >= 5 <= CHARACTERS["seed"].min() and {*CHARACTERS["sparsity"]} == {0, 0.95}
    lth, permuted, naive, random = (at(*one, rows=CHARACTERS) for one in (("lth",), ("permuted", by), ("naive",),
                                                                          ("random",)))
    for other in (permuted, naive, random):
        found = paired_comparison(lth, other)
        assert found.low > 0 and found.wins == found.n and 1.4 < found.difference < 2.6
    found = paired_comparison(permuted, random)
    assert found.wins == found.n and found.low > 0 and found.difference > 0.5
    assert paired_comparison(permuted, naive).low < 0


def test_the_first_three_pairs_of_the_character_model_would_have_misled():
    gain = at("permuted", "weights", rows=CHARACTERS) - at("naive", rows=CHARACTERS)
    assert (gain[:3] > 0).all() and (gain[3:5] < 0).all()
