"""Charts: what is drawn is what the rows say, and names cover neither one another nor stand far from their lines."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from permask_core.display import (
    Look,
    draw_level,
    draw_means,
    heatmap,
    label_ends,
    line_chart,
    look,
    new_figure,
)
from permask_core.evaluation.statistics import Interval, mean_interval

RANDOM = np.random.default_rng(0)
ROWS = pd.DataFrame([{"method": m, "width": w, "seed": s, "loss": RANDOM.uniform(), "error": RANDOM.uniform(5, 6)}
                     for s in (2, 0, 1) for m in ("lth", "naive", "srigl") for w in (4, 0.5, 1)])
WIDTHS = [0.5, 1, 4]


def values(method, width, column="loss"):
    return ROWS[(ROWS["method"] == method) & (ROWS["width"] == width)][column]


def texts(axes):
    """Where the names are, in pixels."""
    FigureCanvasAgg(axes.figure).draw()
    return {text.get_text(): text.get_window_extent() for text in axes.texts}


def test_lines_are_means_with_their_intervals():
    figure = line_chart(ROWS, "width", {"loss": "test loss (nats)"}, xlabel="factor")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("factor", "test loss (nats)")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.5", "1", "4"]
    for line, band, method in zip(axes.lines, axes.collections, ("lth", "naive", "srigl")):
        found = [mean_interval(values(method, width)) for width in WIDTHS]
        assert line.get_xdata().tolist() == [0, 1, 2] and line.get_color() == look(method).color
        assert line.get_ydata() == pytest.approx([one.mean for one in found])
        assert line.get_linestyle() == ("--" if method == "srigl" else "-")
        x, y = band.get_paths()[0].vertices.T
        for place, one in enumerate(found):
            assert (y[x == place].min(), y[x == place].max()) == pytest.approx((one.low, one.high))
    assert {text.get_text() for text in axes.texts} == {"LTH", "naive", "SRigL"}


def test_a_list_of_rows_is_drawn_like_a_frame():
    one, other = (line_chart(rows, "width", "loss").axes[0] for rows in (ROWS, ROWS.to_dict("records")))
    assert one.get_ylabel() == "loss"
    for a, b in zip(one.lines, other.lines, strict=True):
        assert np.array_equal(a.get_xydata(), b.get_xydata())


def test_several_measures_have_a_panel_each_and_names_in_the_last():
    left, right = line_chart(ROWS, "width", {"loss": "nats", "error": "%"}, ylim=(0, 9)).axes
    assert (left.get_ylabel(), right.get_ylabel(), left.get_ylim()) == ("nats", "%", (0, 9))
    assert right.lines[1].get_ydata() == pytest.approx([values("naive", width, "error").mean() for width in WIDTHS])
    assert not left.texts and {text.get_text() for text in right.texts} == {"LTH", "naive", "SRigL"}


def test_lines_of_other_things_than_methods_have_looks_of_their_own():
    looks = {("lth", 0): Look("#123456", "o", "first"), ("naive", 0): Look("#654321", "s", "second")}
    rows = ROWS[ROWS["method"] != "srigl"].assign(part=0)
    (axes,) = line_chart(rows, "width", "loss", by=["method", "part"], looks=looks, dashes={("naive", 0): ":"}).axes
    assert [(line.get_color(), line.get_linestyle()) for line in axes.lines] == [("#123456", "-"), ("#654321", ":")]
    assert {text.get_text() for text in axes.texts} == {"first", "second"}


def test_values_stand_where_they_are_placed_and_bars_side_by_side():
    (axes,) = line_chart(ROWS, "width", "loss", place=np.log2, bars=True, ticks={w: f"x{w:g}" for w in WIDTHS}).axes
    assert axes.get_xticks().tolist() == [-1, 0, 2]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["x0.5", "x1", "x4"]
    at = np.array([bars.lines[0].get_xdata() for bars in axes.containers], dtype=float)
    assert at.mean(0) == pytest.approx([-1, 0, 2])  # around their place, none upon another
    assert len(np.unique(at[:, 0].round(9))) == 3
    for bars, method in zip(axes.containers, ("lth", "naive", "srigl")):
        ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
        assert ends == [pytest.approx(mean_interval(values(method, width))[2:4]) for width in WIDTHS]


def test_levels_cross_the_whole_figure():
    levels = [{"method": "dense", "seed": seed, "loss": loss} for seed, loss in enumerate((0.1, 0.2, 0.3))]
    (axes,) = line_chart(ROWS, "width", "loss", levels=levels).axes
    assert axes.lines[-1].get_ydata() == pytest.approx([0.2, 0.2]) and axes.lines[-1].get_xdata() == [0, 1]
    assert "dense" in {text.get_text() for text in axes.texts}


def test_a_single_value_has_no_interval():
    _, axes = new_figure()
    assert draw_level(axes, [3.0], look("dense")) == (3.0, "dense", look("dense").color)
    assert len(axes.lines) == 1 and not axes.patches
    (found,) = draw_means(axes, [0], [[2.0]], look("lth"))
    assert (found.mean, found.low, found.high) == (2, 2, 2)


def test_intervals_can_be_drawn_both_ways():
    _, axes = new_figure()
    x, y = Interval(1, 0, 0.5, 2, 3), Interval(10, 0, 7, 11, 3)
    draw_means(axes, [x], [y], look("lth"), linestyle="")
    across, up = (bars.get_segments()[0] for bars in axes.containers[0].lines[2])
    assert across.tolist() == [[0.5, 10], [2, 10]] and up.tolist() == [[1, 7], [1, 11]]


@pytest.mark.parametrize("scale", ["linear", "log", "symlog"])
def test_names_at_the_ends_do_not_cover_one_another(scale):
    random = np.random.default_rng(1)
    for _ in range(5):
        _, axes = new_figure(height=3.6)
        ends = np.exp(random.normal(0, 0.4, 6))
        axes.plot([0, 1], np.stack([np.ones(6), ends]))
        axes.set_yscale(scale)
        limits = axes.get_ylim()
        label_ends(axes, [(end, f"line {i}", "#000000") for i, end in enumerate(ends)])
        assert axes.get_ylim() == limits
        found = texts(axes)
        boxes = [found[f"line {i}"] for i in np.argsort(ends)]
        assert all(above.y0 >= below.y1 - 1 for below, above in zip(boxes, boxes[1:]))  # in the order of the lines
        right = axes.transData.transform((1, ends[0]))[0]
        assert all(right < box.x0 < right + 20 for box in boxes)


def test_names_of_lines_far_apart_stand_beside_their_ends():
    _, axes = new_figure()
    axes.plot([0, 5], [[0, 1, 2], [0, 10, 20]])
    label_ends(axes, [(end, str(end), "#000000") for end in (20, 0, 10)])
    for text, box in texts(axes).items():
        x, y = axes.transData.transform((5, int(text)))
        assert (box.y0 + box.y1) / 2 == pytest.approx(y, abs=2) and box.x0 > x


def test_a_heatmap_shows_its_matrix():
    matrix = np.array([[np.nan, 1.0], [0.25, np.nan]])
    figure = heatmap(matrix, label="share (%)", xlabel="B says", ylabel="A says", limits=(0, 2), ticks=["cat", "dog"])
    axes, bar = figure.axes
    image = axes.images[0]
    assert np.array_equal(np.ma.filled(image.get_array(), np.nan), matrix, equal_nan=True)
    assert image.get_clim() == (0, 2) and bar.get_ylabel() == "share (%)"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog"]
    assert image.get_cmap() == mpl.colormaps["cividis"]


def test_names_of_lines_at_the_bottom_stay_above_the_tick_labels():
    figure = line_chart(ROWS.assign(loss=0.001 * ROWS["loss"]), "width", "loss", ylim=(0, 9))
    boxes = texts(figure.axes[0]).values()
    assert min((box.y0 + box.y1) / 2 for box in boxes) > figure.axes[0].get_window_extent().y0
