"""Figures of the experiment: what is drawn is what the rows say."""

import json

import numpy as np
import pytest
import torch

from permask_core.data import Split, load_dataset
from permask_core.data.published import published_permuted_masks
from permask_core.display import (
    accuracies,
    accuracy_by,
    accuracy_by_sparsity,
    look,
    mask_pictures,
    matched_units,
    pictures,
    publish,
    results,
    show,
)
from permask_core.evaluation.statistics import mean_interval
from permask_core.runs.processes import default_device
from permask_core.runs.store import commit, device_name

SPARSITIES = (0.5, 0.9, 0.97)


def rows():
    """Three seeds, in no order; every accuracy of its own."""
    random = np.random.default_rng(0)
    runs = [("dense", "", 0.0), *((method, by, s) for s in SPARSITIES for method, by in
                                  [("lth", ""), ("permuted", "weights"), ("permuted", "activations"), ("naive", "")])]
    return [{"method": method, "matching": by, "sparsity": s, "seed": seed, "accuracy": random.uniform(0.8, 1)}
            for seed in (2, 0, 1) for method, by, s in runs]


def runs(widths=(1, 4), rewinds=(0, 25), seeds=3, sparsities=(0.8, 0.97)):
    """Rows as of several experiments; every accuracy of its own."""
    random = np.random.default_rng(1)
    methods = [("lth", ""), ("permuted", "weights"), ("permuted", "activations"), ("naive", ""), ("random", "")]
    some = [("dense", "", 0.0), *((*method, s) for method in methods for s in sparsities)]
    return [{"method": method, "matching": by, "sparsity": s, "seed": seed, "width": width, "rewind": rewind,
             "accuracy": random.uniform(0.5, 1)}
            for width in widths for rewind in rewinds for seed in range(seeds) for method, by, s in some]


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
    assert record["commit"] == commit() and record["device"] == device_name(default_device())
    assert "| naive | 92.7 |" in (tmp_path / "results" / "digits.md").read_text().splitlines()
    assert (tmp_path / "results" / "digits.svg").read_text().startswith("<svg")


def cell(rows, method, by, **where):
    """Mean and half the interval of accuracies taken from the rows by hand."""
    where |= {"sparsity": 0.0} if method == "dense" else {}
    values = [100 * row["accuracy"] for row in rows if (row["method"], row["matching"]) == (method, by)
              and all(row[key] == value for key, value in where.items())]
    assert len(values) == 3
    interval = mean_interval(values)
    return f"{interval.mean:.1f} ± {interval.high - interval.mean:.1f}"


COLUMNS = {"dense": ("dense", ""), "LTH": ("lth", ""), "permuted (weights)": ("permuted", "weights"),
           "permuted (activations)": ("permuted", "activations"), "naive": ("naive", ""), "random": ("random", "")}


def test_results_have_a_line_for_each_width_rewind_and_sparsity():
    rows, expected = runs(), []
    for width in (1, 4):
        for rewind in (0, 25):
            for s, shown in ((0.8, "80"), (0.97, "97")):
                where = {"width": width, "rewind": rewind, "sparsity": s}
                expected.append({"width": f"{width}", "rewind": f"{rewind}", "sparsity (%)": shown}
                                | {head: cell(rows, *one, **where) for head, one in COLUMNS.items()})
    lines = results(rows)
    assert lines == expected
    assert len({line["dense"] for line in lines}) == 4  # one for each width and rewind, with every sparsity


def test_results_name_only_what_differs():
    heads = list(COLUMNS)
    assert list(results(runs(widths=(0.5,), rewinds=(2,)))[0]) == ["sparsity (%)", *heads]
    assert list(results(runs(rewinds=(2,)))[0]) == ["width", "sparsity (%)", *heads]
    assert list(results(runs(widths=(1,)))[0]) == ["rewind", "sparsity (%)", *heads]


def test_a_single_seed_has_no_interval():
    rows = runs(widths=(1,), rewinds=(25,), seeds=1)
    for line, s in zip(results(rows), (0.8, 0.97)):
        for head, (method, by) in COLUMNS.items():
            (row,) = [row for row in rows if (row["method"], row["matching"]) == (method, by)
                      and row["sparsity"] in (0, s)]
            assert line[head] == f"{100 * row['accuracy']:.1f}"


def test_published_lines_stand_below_what_they_fit():
    published = [row for row in published_permuted_masks() if row["setting"] == "ResNet20/CIFAR-10"]
    lines = results(runs(widths=(1, 0.25), rewinds=(25,), sparsities=(0.8, 0.85)), published)
    assert [(line["source"], line["width"], line["sparsity (%)"]) for line in lines] == [
        ("measured", "1", "80"), ("published", "1", "80"), ("measured", "1", "85"),
        ("measured", "0.25", "80"), ("measured", "0.25", "85")]
    assert len({tuple(line) for line in lines}) == 1
    # Of their figure for width 1, rewind epoch 25 and 80 %: 92.88 dense, 92.32 / 90.40 / 90.72.
    assert lines[1] == {"source": "published", "width": "1", "sparsity (%)": "80", "dense": "92.9", "LTH": "92.3",
                        "permuted (weights)": "", "permuted (activations)": "90.7", "naive": "90.4", "random": ""}
    assert {"±" in line["LTH"] for line in lines if line["source"] == "measured"} == {True}


def test_published_lines_are_those_of_the_rewind_epoch():
    published = [row for row in published_permuted_masks() if row["setting"] == "ResNet20/CIFAR-10"]
    lines = results(runs(widths=(1,), rewinds=(0, 25, 26), sparsities=(0.9,)), published)
    found = {line["rewind"]: line for line in lines if line["source"] == "published"}
    heads = ("dense", "LTH", "naive", "permuted (activations)")
    # At 90 %: 88.47 naive, 88.59 permuted from epoch 0; 91.43, 88.78, 89.97 from epoch 25; dense has no such epoch.
    assert [found["0"][head] for head in heads[2:]] == ["88.5", "88.6"]
    assert [found["25"][head] for head in heads] == ["92.9", "91.4", "88.8", "90.0"]
    assert [found["26"][head] for head in heads] == ["92.9", "", "", ""]


def test_pictures_show_the_images_as_the_network_gets_them():
    noisy = load_dataset("digits", noise=1.0, channels=3).train
    coloured = Split(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([3, 1, 0, 2]))
    figure = pictures({"noisy": noisy, "coloured": coloured}, count=6)
    axes = np.reshape(figure.axes, (2, 6))
    assert [line[0].get_ylabel() for line in axes] == ["noisy", "coloured"]
    for line, split, n in zip(axes, (noisy, coloured), (6, 4)):
        (x, labels), = split.batches([torch.arange(n)])
        assert [len(axis.images) for axis in line] == [1] * n + [0] * (6 - n)
        assert [axis.get_xlabel() for axis in line[:n]] == [str(label) for label in labels.tolist()]
        shown = np.stack([axis.images[0].get_array() for axis in line[:n]])
        expected = ((x - x.min()) / (x.max() - x.min())).permute(0, 2, 3, 1).numpy()
        assert np.allclose(shown, expected, atol=1e-6) and shown.min() == 0 and shown.max() == 1


def test_pictures_of_one_split_of_one_channel():
    x = torch.rand(3, 1, 8, 8)
    axes = pictures({"grey": Split(x, torch.arange(3))}, count=2).axes
    shown = [np.squeeze(axis.images[0].get_array()) for axis in axes]
    low, high = x[:2].min(), x[:2].max()
    assert len(axes) == 2 and np.allclose(shown, (x[:2, 0] - low) / (high - low), atol=1e-6)


def test_a_single_seed_is_drawn_without_an_interval():
    rows = runs(widths=(1,), rewinds=(25,), seeds=1)
    figure = accuracy_by_sparsity(rows)
    for axes in figure.axes:
        for method, by, line in (("lth", "", 0), ("permuted", "activations", 1)):
            means = [accuracies(rows, method=method, matching=by, sparsity=s)[0] for s in (0.8, 0.97)]
            assert drawn(axes, method)[line] == pytest.approx(means)
        assert len(axes.collections) == len(COLUMNS) - 1  # a band for each line, with nothing between low and high
        for band in axes.collections:
            x, y = band.get_paths()[0].vertices.T
            assert len(set(x)) == 2 and all(np.ptp(y[x == place]) == 0 for place in set(x))
    assert show(figure, alt="x").data.count("<img") == 1
