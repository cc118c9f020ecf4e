"""Tables and the look of the methods."""

import re

import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot
from matplotlib.colors import to_rgb

from permask_core.display import DASHED, DYNAMIC, METHODS, look, new_figure, table
from permask_core.experiments.dynamic_sparsity import METHODS as DST
from permask_core.experiments.permuted_masks import KNOWN_METHODS


def test_a_table_holds_its_records():
    rows = [{"method": "lth", "accuracy": "96.4", "n": 5}, {"method": "naive", "accuracy": "−0.3", "n": 3}]
    soup = BeautifulSoup(table(rows, caption="what").data, "html.parser")
    assert [head.text for head in soup.select("thead th[scope=col]")] == ["method", "accuracy", "n"]
    assert [[cell.text for cell in row.select("td")] for row in soup.select("tbody tr")] == [
        ["lth", "96.4", "5"], ["naive", "−0.3", "3"]]
    assert [cell.text for cell in soup.select("tbody .number")] == ["96.4", "5", "−0.3", "3"]
    assert soup.figcaption.text == "what"


def test_text_stays_text():
    nasty = '<script>alert("&amp;")</script>'
    soup = BeautifulSoup(table([{nasty: nasty}], caption=nasty).data, "html.parser")
    assert not soup.select("script")
    assert soup.th.text == soup.td.text == soup.figcaption.text == nasty


def test_words_that_only_begin_like_numbers_stand_left():
    for word in ("-dash", "<nothing>", "+plus", "−"):
        soup = BeautifulSoup(table([{"a": word}]).data, "html.parser")
        assert not soup.select(".number"), word


@pytest.mark.parametrize("number", ["12", "-0.5", "−0.5", "+3", "< 0.001", "<0.01", "97.1 ± 0.2", "95–97", "", 3, 0.5])
def test_numbers_stand_right(number):
    assert BeautifulSoup(table([{"a": number}]).data, "html.parser").select("td.number")


@pytest.mark.parametrize("rows, message", [
    ([], "expected at least one"),
    ([{"a": 1}, {"a": 1, "b": 2}], "row 1 has the columns ['a', 'b']: expected ['a']"),
    ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], "row 1 has the columns ['b', 'a']"),
])
def test_ragged_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        table(rows)


def test_every_method_has_a_look_of_its_own():
    assert tuple(METHODS) == KNOWN_METHODS
    for field in ("color", "marker", "label"):
        assert len({getattr(look(method), field) for method in METHODS}) == len(METHODS)
    with pytest.raises(ValueError, match="unknown method 'permutated': expected one of dense, lth"):
        look("permutated")


def test_every_method_of_dynamic_sparse_training_has_a_look_of_its_own():
    assert {*DST} == {"dense", "random", *DYNAMIC}
    known = METHODS | DYNAMIC
    assert len({look(method).label for method in known}) == len(known)
    assert len({(look(method).color, method in DASHED) for method in known}) == len(known)
    assert len({look(method).marker for method in DST}) == len(DST)


@pytest.mark.parametrize("method", METHODS | DYNAMIC)
def test_colours_are_readable_on_white(method):
    """A contrast of 3 to 1, which the Web Content Accessibility Guidelines 2.2 ask of graphics (1.4.11)."""
    rgb = to_rgb(look(method).color)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) >= 3


def test_figures_are_outside_pyplot():
    figure, axes = new_figure(1, 2, width=6, height=2, sharey=True)
    assert figure.get_size_inches().tolist() == [6, 2] and axes.shape == (2,)
    assert axes[0].get_shared_y_axes().joined(*axes)
    assert pyplot.get_fignums() == []
