"""Figures of the permuted-mask experiment, drawn from the rows that ``permask_core.experiments.permuted_masks.run``
returns."""

import json
import math
import os
import re
from pathlib import Path

import pandas as pd
import torch

from permask_core.display.charts import draw_level, draw_means, label_ends, line_chart
from permask_core.display.control import svg
from permask_core.display.rows import accuracies, plus_minus, spread
from permask_core.display.style import DASHED, look, new_figure
from permask_core.display.tables import records
from permask_core.runs.files import write_whole
from permask_core.runs.processes import default_device
from permask_core.runs.store import commit, device_name, plain, versions

LINES = {"weights": "-", "activations": (0, (2, 1.5)), "ticket": (0, (5, 1.5)), "": "-"}


def series(rows):
    """Return the (method, matching) pairs in rows, in the order of first occurrence, without dense."""
    return list(dict.fromkeys((row["method"], row.get("matching", "")) for row in records(rows)
                              if row["method"] != "dense"))


def results(rows, published=()):
    """Return the rows of a results table: mean test accuracy in percent and half the width of its 95 % interval.

    Parameters
    ----------
    rows : pandas.DataFrame or list of dict
        Rows of :func:`permask_core.experiments.permuted_masks.run`, for any number of experiments.
    published : list of dict, optional
        Rows of one setting of :func:`permask_core.data.published.published_permuted_masks`; each published row is put
        below the measured row to which it belongs.

    Returns
    -------
    list of dict
        One row for each width, rewind epoch and sparsity, for :func:`permask_core.display.table`.
    """
    rows = records(rows)
    methods = [("dense", "")] * any(row["method"] == "dense" for row in rows) + series(rows)
    varied = [name for name in ("width", "rewind") if len({row[name] for row in rows}) > 1]
    lines = []
    for place in dict.fromkeys((row["width"], row["rewind"], row["sparsity"]) for row in rows if row["sparsity"]):
        where = dict(zip(("width", "rewind", "sparsity"), place))
        head = {name: f"{where[name]:g}" for name in varied} | {"sparsity (%)": f"{100 * where['sparsity']:g}"}
        own = {title(*one): _cell(rows, *one, **where) for one in methods}
        lines.append(({"source": "measured"} if published else {}) | head | own)
        # A published result for the dense network is listed with every sparsity, and has no rewind epoch.
        found = {row["method"]: f"{100 * row['accuracy']:.1f}" for row in published if row["width"] == where["width"]
                 and math.isclose(row["sparsity"], where["sparsity"]) and row["rewind"] in (None, where["rewind"])}
        if found:
            lines.append({"source": "published"} | head | {  # the paper matches by activations
                title(method, by): found.get(method, "") * (by in ("", "activations")) for method, by in methods})
    return lines


def title(method, matching):
    """Return the name of a method at the head of a column."""
    return look(method).label + (f" ({matching})" if matching else "")


def _cell(rows, method, matching, **where):
    where |= {"sparsity": 0.0} if method == "dense" else {}
    return plus_minus(accuracies(rows, method=method, matching=matching, **where))


def accuracy_by_sparsity(rows):
    """Draw test accuracy against sparsity, one line for each method, with 95 % intervals over seeds.

    If some method is far below LTH and permuted, a second panel enlarges the top.

    Parameters
    ----------
    rows : pandas.DataFrame or list of dict
        Rows of one experiment from :func:`permask_core.experiments.permuted_masks.run` or
        :func:`permask_core.experiments.dynamic_sparsity.run`; a single seed has no interval.

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = records(rows)
    sparsities = sorted({row["sparsity"] for row in rows} - {0.0})
    place = {value: -math.log(1 - value) for value in sparsities} or {0.0: 0.0}  # if there are only dense networks
    lines = {(method, by): [spread(accuracies(rows, method=method, sparsity=s, **({"matching": by} if by else {})))
                            for s in sparsities] for method, by in series(rows)}
    labels = [(points[-1].mean, f"{look(method).label}, by {by}" if by else look(method).label, look(method).color)
              for (method, by), points in lines.items()]
    dense = [row for row in rows if row["method"] == "dense"]
    if dense:
        labels.append((accuracies(dense).mean(), look("dense").label, look("dense").color))
    ceiling = max(point for point, _, _ in labels)
    floor = min((point.low for (method, _), points in lines.items() if method in ("lth", "permuted")
                 for point in points), default=-math.inf)
    lowest = min((point.mean for points in lines.values() for point in points), default=ceiling)
    enlarged = math.isfinite(floor) and floor - lowest > (ceiling - floor) / 2
    figure, panels = new_figure(1, 1 + enlarged, width=7.6 if enlarged else 6.4, height=4.0, squeeze=False)
    whole, top = panels[0, 0], panels[0, -1]
    for axes in panels[0]:
        for (method, by), points in lines.items():
            draw_means(axes, [place[s] for s in sparsities], points, look(method),
                       linestyle="--" if method in DASHED else LINES[by], clip_on=enlarged and axes is top)
        if dense:
            draw_level(axes, [accuracies(dense).mean()], look("dense"))
        axes.set_xticks(list(place.values()), [f"{100 * s:g}" for s in sparsities], fontsize=8)
        axes.minorticks_off()
    whole.set_ylabel("test accuracy (%)")
    if enlarged:
        top.set_ylim(floor - 0.4, ceiling + 0.15 * (ceiling - floor))
        whole.set_title("whole range", fontweight="normal")
        top.set_title("top, enlarged", fontweight="normal")
        label_ends(whole, [label for label in labels if label[0] < top.get_ylim()[0]], max(place.values()))
        labels = [label for label in labels if label[0] >= top.get_ylim()[0]]
    figure.supxlabel("sparsity (% of the prunable weights; log scale of the density)", fontsize=10)
    label_ends(top, labels, max(place.values()))
    return figure


def accuracy_by(rows, field, *, label, ticks=None):
    """Draw test accuracy against a setting, one line for each method, with 95 % intervals over seeds.

    Parameters
    ----------
    rows : pandas.DataFrame or list of dict
        Rows of one sparsity; dense rows are a separate line if they differ in ``field``.
    field : str
        The column on the horizontal axis.
    label : str
        Its name and unit.
    ticks : dict, optional
        Tick labels by value.

    Returns
    -------
    matplotlib.figure.Figure
    """
    rows = pd.DataFrame(rows)
    lines = dict.fromkeys(zip(rows["method"], rows["matching"]))
    return line_chart(rows.assign(accuracy=100 * rows["accuracy"]), field, {"accuracy": "test accuracy (%)"},
                      by=["method", "matching"], dashes={line: LINES[line[1]] for line in lines}, ticks=ticks,
                      xlabel=label)


def matched_units(source, target, mask, permutation, *, shape, count=8):
    """Draw incoming weights of units as images: of target units, and of source units at the same position and matched.

    Parameters
    ----------
    source, target : torch.Tensor, shape [units, inputs]
        The layer's weights in the dense source and target.
    mask : torch.Tensor, shape [units, inputs]
        The mask of the source; dropped weights are blank.
    permutation : torch.Tensor, shape [units]
        The source unit that moves to each position.
    shape : (int, int)
        Height and width of the input image.
    count : int
        Number of units; those of the target with the largest norm are drawn.

    Returns
    -------
    matplotlib.figure.Figure
    """
    units = target.norm(dim=1).argsort(descending=True)[:count]
    rows = [("B's unit", target, None, units), ("A's, same position\n(naive)", source, mask, units),
            ("A's, matched\n(permuted)", source, mask, permutation[units])]
    figure, axes = new_figure(3, count, width=7.2, height=2.9)
    figure.get_layout_engine().set(h_pad=0.02, hspace=0)
    for line, (title, weights, kept, indices) in zip(axes, rows):
        for axis, unit in zip(line, indices.tolist()):
            image = weights[unit].clone()
            if kept is not None:
                image[~kept[unit]] = float("nan")
            limit = weights[unit].abs().max().item()
            axis.imshow(image.view(shape).numpy(), cmap="PuOr", vmin=-limit, vmax=limit, interpolation="none")
            axis.set_title(str(unit), fontsize=8, loc="center", fontweight="normal", pad=2)
            axis.set(xticks=[], yticks=[], facecolor="white")
            axis.grid(False)
            axis.spines[:].set(visible=True, color="#BBBBBB")
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", labelpad=8, fontsize=9)
    return figure


def pictures(splits, *, count=10):
    """Draw the first images of each split in a row, preprocessed for a network.

    Parameters
    ----------
    splits : dict of str to Split
        Splits by name of the row.
    count : int
        Number of images in a row.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = new_figure(len(splits), count, width=7.2, height=0.25 + 0.8 * len(splits), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0, hspace=0)
    for line, (name, split) in zip(axes, splits.items()):
        chosen = torch.arange(min(count, len(split)))
        (x, labels), = split.batches([chosen])
        low, high = x.min(), x.max()
        for axis, image, label in zip(line, ((x - low) / (high - low)).permute(0, 2, 3, 1), labels.tolist()):
            axis.imshow(image.numpy(), cmap="gray", interpolation="none")
            axis.set_xlabel(label, fontsize=8, labelpad=1)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6, fontsize=9)
    return figure


def mask_pictures(masks, *, xlabel="input unit", ylabel="output unit"):
    """Draw masks of one layer side by side: kept weights are dark, dropped weights light.

    Parameters
    ----------
    masks : dict of str to torch.Tensor
        Masks by title, each [outputs, inputs].

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = new_figure(1, len(masks), width=7.2, height=3.1, sharey=True, squeeze=False)
    for axis, (title, mask) in zip(axes[0], masks.items()):
        axis.imshow(mask.numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="none", aspect="auto")
        axis.set(title=title, xlabel=xlabel)
        axis.grid(False)
        axis.spines[:].set_visible(True)
    axes[0, 0].set_ylabel(ylabel)
    return figure


def publish(name, figure, rows, caption, *, folder=None, **record):
    """Write a result for other pages: ``name.svg``, ``name.md`` (the table) and ``name.json`` (figure data and record).

    Parameters
    ----------
    name : str
    figure : matplotlib.figure.Figure
    rows : list of dict or pandas.DataFrame
        The table, in a form for :func:`permask_core.display.table`.
    caption : str
        What the table shows.
    folder : path-like, optional
        By default the folder in the environment variable ``PERMASK_FIGURES``.
    **record
        Further parts of the result: anything that JSON holds, dataclasses and DataFrames. A notebook that can be a job
        of a grid passes ``settings``, a dict, and ``runs``, a list of dict or a DataFrame with one row for each run.

    Returns
    -------
    pathlib.Path or None
        The folder, or None if there is none; then nothing is written.
    """
    folder = folder or os.environ.get("PERMASK_FIGURES")
    if not folder:
        return None
    folder, rows = Path(folder), records(rows)
    body = [[str(value).replace("|", "\\|") for value in row.values()] for row in rows]
    # Columns of numbers, which may carry an interval, are aligned to the right.
    rule = ["---" if any(re.match(r"[^\W\d]", cell) for cell in column) else "---:" for column in zip(*body)]
    lines = ["| " + " | ".join(cells) + " |" for cells in [list(rows[0]), rule, *body]]
    record = {"caption": caption, "table": rows, "versions": versions(), "commit": commit(),
              "device": device_name(default_device()), **record}

    def as_json(value):
        return records(value) if isinstance(value, pd.DataFrame) else plain(value)

    for ending, text in (("md", "\n".join([*lines, "", caption, ""])), ("svg", svg(figure)),
                         ("json", json.dumps(record, indent=1, default=as_json) + "\n")):
        with write_whole(folder / f"{name}.{ending}") as path:
            path.write_text(text)
    return folder
