"""What the page on the symmetry of masks counts, against the masks themselves."""

import math

import pytest
import torch

from permask_core.experiments.alignment import mask_overlap
from tests.notebooks import run, shown_table

LEVEL = 0.9


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The page after its last cell, with networks that are hardly trained."""
    given = {"sparsities": [LEVEL], "studied": LEVEL, "seeds": 1, "epochs": 2}
    return run("mask_symmetry", given, tmp_path_factory.mktemp("page"), draw=False)


def test_units_without_connections_are_counted_from_the_masks(found):
    for (method, _, _), (masks, _) in found.space["found"].items():
        first, second, last = (masks[f"{name}.weight"].numpy() for name in ("fc1", "fc2", "head"))
        dead = [(~first.any(1) & ~second.any(0)).sum(), (~second.any(1) & ~last.any(0)).sum()]
        row = found.space["rows"].set_index("method").loc[method]
        assert row["neither"] == sum(dead)
        assert row["log10"] >= sum(math.lgamma(n + 1) for n in dead) / math.log(10) - 1e-9  # dead units are twins
        assert row["no inputs"] == (~first.any(1)).sum() + (~second.any(1)).sum()


def test_the_table_has_a_line_for_each_kind_of_mask(found):
    assert [line[0] for line in shown_table(found, "size-table")[1:]] == ["ticket", "SRigL", "random"]


def test_the_copy_has_its_units_elsewhere_and_other_weights_where_nothing_reads_them(found):
    (masks, state), (planted, copy), truth = found.space["plant"]("srigl", 0)
    assert any(not torch.equal(masks[name], planted[name]) for name in masks)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        name: int(mask.sum()) for name, mask in planted.items()}
    for name, order in truth.items():  # what is read has moved, what is not read was drawn again
        values = state[f"{name}.bias"][order], copy[f"{name}.bias"]
        assert 0 < int((values[0] == values[1]).sum()) < len(order)


def test_without_a_permutation_the_overlap_is_that_of_the_masks(found):
    (_, a), (_, b) = found.space["pairs"][0]
    drop, groups = found.space["drop_unread_units"], found.space["groups"]
    masks_a, masks_b = (drop(groups, *tickets[LEVEL])[0] for tickets in (a, b))
    overlaps = found.space["overlap_rows"].set_index("method")["overlap"]
    assert overlaps["naive"] == pytest.approx(100 * mask_overlap(masks_a, masks_b))
    assert overlaps["sparse"] > overlaps["naive"]
