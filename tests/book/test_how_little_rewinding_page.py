"""What the page on rewinding says of its stored study."""

import pytest

from permask_core.evaluation.statistics import mean_interval
from tests.notebooks import run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names of the page after all that it says of the study, before anything is trained."""
    return run("how_little_rewinding", {}, tmp_path_factory.mktemp("page"), until="claims", draw=False).space


def test_scaled_weights_need_less_rewinding(page):
    assert page["best"] == {"lth": 2, "permuted": 4, "naive": 2, "random": 2}
    assert page["chosen"]["lth", "sparse"] == 0 and page["chosen"]["permuted", "sparse"] == 1
    for method in ("lth", "permuted"):
        found, early = page["held_out"][method], page["chosen"][method, "sparse"]
        assert early < page["chosen"][method, "dense"]
        assert mean_interval(found["sparse", early] - found["dense", page["best"][method]]).low > -0.7


def test_scaling_repairs_most_of_what_the_permuted_mask_loses(page):
    _, low, high = page["repaired"]("permuted")
    assert 0.85 < low < high < 1
    assert page["repaired"]("naive")[1] > 1  # it gets back more than it lost


def test_scaling_replaces_neither_aligning_nor_all_rewinding(page):
    permuted, naive = (page["held_out"][method] for method in ("permuted", "naive"))
    for start in ("dense", "sparse"):
        assert mean_interval(permuted[start, 0] - naive[start, 0]).low > 8
    assert mean_interval(permuted["sparse", 2] - permuted["sparse", 0]).low > 0


def test_scaling_harms_a_ticket_that_was_rewound_late(page):
    for rows, sure in ((page["accuracy"], True), (page["held_out"], False)):
        late = mean_interval(rows["lth", "sparse", 4] - rows["lth", "dense", 4])
        assert late.mean < 0 and (late.high < 0) == sure
