"""The figures of the prose pages, and the numbers and code next to them in the text."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from book import figures
from permask_core.data.published import published_permuted_masks

BOOK = Path(figures.__file__).parent
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in BOOK.glob("*.md")}


@pytest.mark.parametrize("name", figures.FIGURES)
def test_texts_lie_on_the_canvas(name):
    figure = figures.FIGURES[name]()
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text().strip()]
    assert texts
    canvas = figure.bbox
    for text in texts:
        if text.get_visible() and _is_drawn(text):
            box = text.get_window_extent()
            assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1, f"{text.get_text()!r} leaves the canvas sideways"
            assert canvas.y0 <= box.y0 and box.y1 <= canvas.y1, f"{text.get_text()!r} leaves the canvas"


def _is_drawn(text):
    """Not a label of an axis that is switched off, nor a tick beyond the limits."""
    axes = text.axes
    if axes is None or axes.axison is False:
        return text in getattr(axes, "texts", [])
    low, high = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    for axis, (first, last) in ((axes.xaxis, low), (axes.yaxis, high)):
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if text in (tick.label1, tick.label2):
                return first <= tick.get_loc() <= last
    return True


def test_drawing_twice_gives_the_same_files(tmp_path):
    first, second = figures.draw(tmp_path / "a"), figures.draw(tmp_path / "b")
    assert [path.stem for path in first] == list(figures.FIGURES)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        shapes = [node for node in ElementTree.parse(one).iter() if node.tag.endswith("}path")]
        assert len(shapes) > 20


def test_pages_show_every_figure_with_alternative_text():
    shown = {}
    for name, text in PAGES.items():
        for figure, options in re.findall(r":::\{figure\} figures/(\w+)\.svg\n((?::.*\n)+)", text):
            shown[figure] = dict(re.findall(r":(\w+): (.+)", options))
            assert len(shown[figure].get("alt", "")) > 40, f"{figure} in {name} has no alternative text"
    assert set(shown) == set(figures.FIGURES)


@pytest.mark.parametrize("sparsity", [0.2, 0.36, *figures.TARGETS, 0.99])
def test_rounds_agree_with_pruning_one_round_after_another(sparsity):
    left, rounds = 1.0, 0
    while left > 1 - sparsity + 1e-9:
        before, left, rounds = left, max(0.8 * left, 1 - sparsity), rounds + 1
    assert figures.rounds_to(sparsity) == (rounds, pytest.approx(1 - left / before))


def test_table_of_rounds_is_what_the_formula_gives():
    rows = re.findall(r"\| (\d+) % \| ([\d.]+) \| (\d+) \| ([\d.]+) % \| ([\d.]+) % \|", PAGES["lottery_tickets"])
    assert [int(row[0]) / 100 for row in rows] == list(figures.TARGETS)
    for target, exact, rounds, left, removed in rows:
        sparsity = int(target) / 100
        count, part = figures.rounds_to(sparsity)
        assert float(exact) == pytest.approx(np.log(1 - sparsity) / np.log(0.8), abs=0.005)
        assert int(rounds) == count
        assert float(left) == pytest.approx(100 * 0.8 ** (count - 1), abs=0.005)
        assert float(removed) == pytest.approx(100 * part, abs=0.05)


def test_table_of_published_accuracies_is_the_data():
    data = {(row["width"], round(100 * row["sparsity"]), row["method"]): f"{100 * row['accuracy']:.2f}"
            for row in published_permuted_masks()
            if row["setting"] == "ResNet20/CIFAR-10" and row["rewind"] in (None, 25)}
    row = r"\| (?:(\d) \(dense ([\d.]+)\))? ?\| (\d+) % \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"
    rows = re.findall(row, PAGES["method"])
    assert [row[0] for row in rows] == ["1", "", "", "", "4", "", "", ""]
    for i, (_, _, sparsity, *accuracies) in enumerate(rows):
        width, dense = rows[4 * (i // 4)][:2]
        expected = [data[int(width), int(sparsity), method] for method in ("lth", "permuted", "naive", "dense")]
        assert [*accuracies, dense] == expected


def test_storage_breaks_even_where_the_text_says():
    for name, density in (("32-bit index", 1 / 2), ("16-bit index", 2 / 3), ("one bit each", 31 / 32)):
        assert figures.bytes_per_weight(1 - density)[name] == pytest.approx(4)


def test_the_method_in_the_library_runs_as_printed():
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["method"], flags=re.S)
    # A smaller sparsity takes fewer rounds of training; the calls are the same.
    assert "[0.97]" in code
    names = {}
    exec(code.replace("[0.97]", "[0.5]"), names)
    assert names["ticket"].sparsity == pytest.approx(0.5, abs=1e-4)
    assert set(names["accuracy"]) == {"permuted", "naive"}
    assert min(names["accuracy"].values()) > 0.9
    moved, found = names["moved"], names["ticket"].masks
    assert all(moved[name].sum() == found[name].sum() for name in found)
    assert any(not moved[name].equal(found[name]) for name in found)


def test_every_reference_is_cited():
    keys = re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text(encoding="utf-8"), flags=re.M)
    notebooks = "".join(path.read_text(encoding="utf-8") for path in (BOOK.parent / "notebooks").glob("*.ipynb"))
    citations = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", "".join(PAGES.values()) + notebooks)
    cited = {key for citation in citations for key in citation.split(",")}
    assert len(keys) == len(set(keys))
    assert set(keys) - cited == set()
    assert cited - set(keys) == set()
