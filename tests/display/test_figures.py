"""Figures of the experiment: what is drawn is what the rows say."""

import json

import numpy as np
import pytest
import torch

from permask_core.display import (
    accuracies,
    accuracy_by,
    accuracy_by_sparsity,
    look,
    mask_pictures,
    matched_units,
    publish,
    show,
)

SPARSITIES = (0.5, 0.9, 0.97)


def rows():
    """Three seeds, in no order; every accuracy of its own."""
    random = np.random.default_rng(0)
    runs = [("dense", "", 0.0), *((method, by, s) for s in SPARSITIES for method, by in
                                  [("lth", ""), ("permuted", "weights"), ("permuted", "activations"), ("naive", "")])]
    return [{"method": method, "matching": by, "sparsity": s, "seed": seed, "accuracy": random.uniform(0.8, 1)}
            for seed in (2, 0, 1) for method, by, s in runs]


def drawn(axes, method):
    """The heights of a method's lines with markers."""
    return [line.get_ydata() for line in axes.lines
            if line.get_color() == look(method).color and line.get_marker() != "None"]


def test_accuracies_are_in_percent_by_seed():
    found = accuracies(rows(), method="naive", sparsity=0.9)
    expected = {row["seed"]: row["accuracy"] for row in rows() if (row["method"], row["sparsity"]) == ("naive", 0.9)}
    assert found.tolist() == pytest.approx([100 * expected[seed] for seed in (0, 1, 2)])
    with pytest.raises(ValueError, match="no result with method 'naive', sparsity 0.8"):
        accuracies(rows(), method="naive", sparsity=0.8)


def test_a_line_per_method_shows_its_means():
    figure = accuracy_by_sparsity(rows())
    for axes in figure.axes:
        assert [len(drawn(axes, method)) for method in ("lth", "permuted", "naive")] == [1, 2, 1]
        for method, by, line in (("naive", "", 0), ("permuted", "weights", 0), ("permuted", "activations", 1)):
            means = [accuracies(rows(), method=method, matching=by, sparsity=s).mean() for s in SPARSITIES]
            assert drawn(axes, method)[line] == pytest.approx(means)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["50", "90", "97"]
    assert show(figure, alt="x").data.count("<img") == 1


def test_a_line_over_a_setting_shows_its_means():
    some = [row for row in rows() if row["matching"] in ("", "weights")]
    figure = accuracy_by(some, "sparsity", label="sparsity", ticks={0.0: "none", 0.5: "a", 0.9: "b", 0.97: "c"})
    (axes,) = figure.axes
    expected = [accuracies(some, method="lth", sparsity=s).mean() for s in SPARSITIES]
    assert drawn(axes, "lth")[0] == pytest.approx(expected) and axes.get_xlabel() == "sparsity"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["none", "a", "b", "c"]


def test_pictures_of_masks_and_units_show_the_tensors():
    masks = {title: torch.rand(5, 7) > 0.5 for title in ("A", "moved")}
    for axes, (title, mask) in zip(mask_pictures(masks).axes, masks.items()):
        assert axes.get_title() == title or axes.get_title(loc="left") == title
        assert np.array_equal(axes.images[0].get_array(), mask.numpy())

    source, target, mask, perm = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 4) > 0.3, torch.randperm(6)
    figure = matched_units(source, target, mask, perm, shape=(2, 2), count=3)
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    units = target.norm(dim=1).argsort(descending=True)[:3].tolist()
    for i, unit in enumerate(units):
        assert np.allclose(pictures[i], target[unit].view(2, 2).numpy())
        for row, other in ((1, unit), (2, perm[unit])):
            shown = np.ma.filled(pictures[3 * row + i], np.nan)
            expected = torch.where(mask[other], source[other], torch.nan).view(2, 2).numpy()
            assert np.allclose(shown, expected, equal_nan=True)


def test_results_are_published_where_the_book_asks_for_them(monkeypatch, tmp_path):
    table = [{"method": "lth", "accuracy (%)": "97.0"}, {"method": "naive", "accuracy (%)": "92.7"}]
    figure = accuracy_by_sparsity(rows())
    monkeypatch.delenv("PERMASK_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert publish("digits", figure, table, "what") is None and not list(tmp_path.iterdir())
    monkeypatch.setenv("PERMASK_FIGURES", str(tmp_path / "results"))
    assert publish("digits", figure, table, "what", seeds=[0, 1, 2]) == tmp_path / "results"
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["digits.json", "digits.md", "digits.svg"]
    record = json.loads((tmp_path / "results" / "digits.json").read_text())
    assert record["table"] == table and record["seeds"] == [0, 1, 2] and "torch" in record["versions"]
    assert "| naive | 92.7 |" in (tmp_path / "results" / "digits.md").read_text().splitlines()
    assert (tmp_path / "results" / "digits.svg").read_text().startswith("<svg")
