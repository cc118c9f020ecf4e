"""The schematic figures of the prose pages, drawn by code so that numbers in them are computed.

Called as ``python book/figures.py FOLDER``; writes one SVG for each entry of ``FIGURES`` into the folder. A figure that
shows a method takes its colour from ``look``; everything else is grey or stands on the house colour map.
"""

import math
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.patches import Ellipse, FancyBboxPatch, Rectangle
from scipy.optimize import linear_sum_assignment

from permask_core.display import look, new_figure
from permask_core.display.control import svg

INK, GREY, PALE = "#222222", "#777777", "#E4E4E4"
TARGETS = (0.80, 0.90, 0.95, 0.97)


def rounds_to(sparsity, rate=0.2):
    """Rounds of iterative pruning up to ``sparsity``, and the fraction of the remaining weights the last removes."""
    rounds = math.ceil(round(math.log(1 - sparsity) / math.log(1 - rate), 9))
    return rounds, 1 - (1 - sparsity) / (1 - rate) ** (rounds - 1)


def bytes_per_weight(sparsity):
    """Bytes stored per weight of a 4-byte layer, by format: what is kept, plus how its place is written down."""
    kept = 1 - np.asarray(sparsity)
    return {"dense": 4 + 0 * kept, "32-bit index": 8 * kept, "16-bit index": 6 * kept, "one bit each": 4 * kept + 1 / 8}


def _sheet(width, height):
    """A figure without axes whose coordinates are inches."""
    figure, ax = new_figure(width=width, height=height)
    figure.set_layout_engine("none")
    ax.set_position([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    return figure, ax


def _box(ax, x, y, text, color=GREY, width=1.2, height=0.5):
    ax.add_patch(FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=.07",
        facecolor=mpl.colors.to_rgba(color, 0.10), edgecolor=color, linewidth=1.3))
    ax.text(x, y, text, ha="center", va="center", fontsize=9, color=INK, linespacing=1.35)


def _arrow(ax, start, end, text="", color=GREY, bend=0.0, dashed=False, shift=(0, 0.08)):
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0,
             "connectionstyle": f"arc3,rad={bend}", "linestyle": "--" if dashed else "-"}
    ax.annotate("", end, start, arrowprops=style)
    x, y = (start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1]
    ax.text(x, y, text, ha="center", va="bottom", fontsize=8.5, color=INK, linespacing=1.25)


def _grid(ax, x, y, mask, color, size=0.85):
    """A mask as a grid of squares, its lower left corner at (x, y)."""
    step = size / len(mask)
    for row, column in np.ndindex(mask.shape):
        ax.add_patch(Rectangle((x + column * step, y + size - (row + 1) * step), step, step, edgecolor="white",
                               linewidth=0.8, facecolor=color if mask[row, column] else PALE))


def _small_mask(size=6, kept=2):
    rng = np.random.default_rng(3)
    return np.array([np.isin(np.arange(size), rng.choice(size, kept, replace=False)) for _ in range(size)])


def sparse_patterns():
    """Four 16 x 16 masks: dense, and three patterns with the same number of zeros."""
    rng, n, kept = np.random.default_rng(0), 16, 4
    scattered = rng.permuted(np.arange(n * n) < n * kept).reshape(n, n)
    fan_in = np.array([rng.permuted(np.arange(n) < kept) for _ in range(n)])
    units = np.broadcast_to(np.isin(np.arange(n), rng.choice(n, kept, replace=False))[:, None], (n, n))
    panels = {"dense": np.ones((n, n), bool), "unstructured": scattered, "constant fan-in": fan_in,
              "whole units": units}
    shades = mpl.colors.ListedColormap([PALE, "#333333"])
    figure, axes = new_figure(1, 4, width=7, height=2.25)
    for ax, (name, mask) in zip(axes, panels.items(), strict=True):
        ax.pcolormesh(mask[::-1], cmap=shades, vmin=0, vmax=1, edgecolor="white", lw=0.6)
        ax.set(aspect="equal", xticks=[], yticks=[], xlabel="input unit")
        ax.set_title(f"{name}\n", fontsize=10)
        ax.text(0, 1.03, f"{mask.sum()} of {mask.size} weights", transform=ax.transAxes, fontsize=8.5, color=GREY)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("output unit")
    return figure


def storage():
    """Bytes per weight against sparsity, for four ways of storing a layer."""
    sparsity = np.linspace(0, 0.99, 100)
    figure, ax = new_figure(width=6.2, height=3.4)
    styles = {"dense": ("-", 0.80), "32-bit index": ("--", 0.06), "16-bit index": ("-.", 0.06),
              "one bit each": (":", 0.16)}
    for name, values in bytes_per_weight(sparsity).items():
        line, x = styles[name]
        slope = (values[-1] - values[0]) / (100 * (sparsity[-1] - sparsity[0]))
        ax.plot(100 * sparsity, values, line, color=INK)
        ax.text(100 * x, np.interp(x, sparsity, values) + 0.15, name, color=INK, rotation_mode="anchor",
                rotation=math.degrees(math.atan(slope)), transform_rotates_text=True)
        if name != "dense":
            ax.plot(100 * np.interp(-4, -values, sparsity), 4, "o", color=INK)
    ax.set(xlabel="sparsity of the layer (%)", ylabel="stored bytes per weight", xlim=(0, 100), ylim=(0, 8.2))
    return figure


def sparse_training_problem():
    """Dense training and pruning, the ticket, and the same mask from another initialisation."""
    figure, ax = _sheet(7, 3.7)
    mask = _small_mask()
    dense, lth, naive = (look(name).color for name in ("dense", "lth", "naive"))
    _box(ax, 0.85, 3.05, "network A,\nrandom start", dense)
    _box(ax, 3.0, 3.05, "A, trained", dense)
    _arrow(ax, (1.45, 3.05), (2.4, 3.05), "train")
    _grid(ax, 4.55, 2.62, mask, INK)
    _arrow(ax, (3.6, 3.05), (4.5, 3.05), "prune")
    ax.text(5.5, 3.05, "mask $m_A$:\nthe pruned A\nstill works", va="center", fontsize=9, color=INK)
    for y, color, start, outcome in ((1.75, lth, "A, early\nweights", "as good as A"),
                                     (0.6, naive, "B, early\nweights", "worse")):
        _box(ax, 0.85, y, start, color)
        ax.text(1.66, y, "+", ha="center", va="center", fontsize=13, color=INK)
        _grid(ax, 1.86, y - 0.425, mask, color)
        _arrow(ax, (2.85, y), (4.4, y), "train sparse", color)
        _box(ax, 5.0, y, outcome, color)
    ax.text(5.75, 1.75, "LTH:\nthe ticket", va="center", fontsize=9, color=lth, weight="bold")
    ax.text(5.75, 0.6, "naive:\nthe problem", va="center", fontsize=9, color=naive, weight="bold")
    return figure


def pruning_rounds():
    """Weights left after each round of 20 % and the rounds that four sparsities take."""
    figure, ax = new_figure(width=6.6, height=3.6)
    last = rounds_to(TARGETS[-1])[0]
    ax.bar(range(last + 1), 100 * 0.8 ** np.arange(last + 1), color="#C4C4C4", width=0.72)
    for sparsity in TARGETS:
        rounds, part = rounds_to(sparsity)
        left = 100 * (1 - sparsity)
        ax.plot([-0.5, rounds], [left, left], color=INK, linewidth=1, linestyle=":")
        ax.plot(rounds, left, "o", color=INK)
        note = f"{100 * sparsity:.0f} %: round {rounds}, which removes {100 * part:.1f} %"
        ax.text(rounds + 0.35, left * 1.06, note, fontsize=8.5, color=INK)
    ticks = [3, 5, 10, 20, 50, 100]
    ax.set(yscale="log", xlim=(-0.6, last + 11), ylim=(2.2, 125), xticks=range(0, last + 1, 2), yticks=ticks,
           yticklabels=ticks, xlabel="round of pruning (0: dense)", ylabel="weights left (%)")
    ax.yaxis.set_minor_locator(mpl.ticker.NullLocator())
    ax.grid(axis="x", visible=False)
    return figure


def rewinding():
    """Iterative pruning with rewinding and with fine-tuning, as trainings on a common time axis."""
    figure, axes = new_figure(1, 2, width=7, height=3.0, sharey=True)
    ends, rewind, tune = 1.0, 0.15, 0.35
    panels = (("rewinding", rewind, ends), ("fine-tuning", ends, ends + tune))
    for ax, (title, start, end) in zip(axes, panels, strict=True):
        for row in range(4):
            left, right = (0, ends) if row == 0 else (start, end)
            ax.annotate("", (right, -row), (left, -row), arrowprops={
                "arrowstyle": "-|>", "color": look("lth" if row else "dense").color, "shrinkA": 0, "shrinkB": 0,
                "linewidth": 4 * 0.8 ** (3 * row), "mutation_scale": 13})
            if row < 3:
                ax.annotate("", (start, -row - 0.93), (right, -row - 0.08), arrowprops={
                    "arrowstyle": "->", "color": GREY, "linewidth": 1, "linestyle": "--", "shrinkA": 0, "shrinkB": 0})
        ax.axvline(rewind, color=GREY, linewidth=0.8, linestyle=":", ymin=0.04, ymax=0.9, visible=start == rewind)
        ax.set_title(title)
        ax.set(xlim=(-0.04, 1.45), ylim=(-3.5, 0.5), xticks=[0, rewind, ends] if start == rewind else [0, ends],
               xticklabels=["0", "r", "E"] if start == rewind else ["0", "E"], xlabel="training epoch")
        ax.grid(False)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    rounds = [f"round {r}\n{100 * 0.8 ** r:.1f} % left" for r in (1, 2, 3)]
    axes[0].set(yticks=[0, -1, -2, -3], yticklabels=["dense\n100 % left", *rounds])
    axes[0].text(1.05, -0.5, "prune 20 %,\nback to epoch r", fontsize=8.5, va="center", color=INK)
    axes[1].text(0.93, -0.55, "prune 20 %,\nkeep the weights", fontsize=8.5, va="center", ha="right", color=INK)
    return figure


def method():
    """The whole method: two dense networks, one mask, one permutation, one sparse training."""
    figure, ax = _sheet(7, 3.9)
    mask, order, inputs = _small_mask(), [3, 0, 4, 1, 5, 2], [2, 4, 0, 5, 1, 3]
    dense, permuted = look("dense").color, look("permuted").color
    _box(ax, 0.75, 3.2, "A, start", dense, 1.0)
    _box(ax, 2.55, 3.2, "A, trained", dense, 1.0)
    _box(ax, 0.75, 1.9, "B, start", dense, 1.0)
    _box(ax, 2.55, 1.9, "B, trained", dense, 1.0)
    _arrow(ax, (1.25, 3.2), (2.05, 3.2), "train")
    _arrow(ax, (1.25, 1.9), (2.05, 1.9), "train")
    _arrow(ax, (2.55, 2.55), (2.55, 2.95))
    _arrow(ax, (2.55, 2.55), (2.55, 2.15))
    ax.text(2.63, 2.55, "match", va="center", fontsize=8.5, color=INK)
    _grid(ax, 4.0, 2.78, mask, INK)
    ax.text(4.425, 3.68, "$m_A$", ha="center", fontsize=10, color=INK)
    _arrow(ax, (3.05, 3.2), (3.94, 3.2), "prune")
    _grid(ax, 5.85, 2.78, mask[order][:, inputs], permuted)
    ax.text(6.275, 3.68, r"$\pi(m_A)$", ha="center", fontsize=10, color=permuted)
    _arrow(ax, (4.91, 3.2), (5.79, 3.2), "permute", permuted)
    _arrow(ax, (3.05, 2.55), (5.35, 3.1), "", GREY, bend=0.22)
    ax.text(4.55, 2.38, r"$\pi$", ha="center", fontsize=11, color=INK)
    _box(ax, 2.55, 0.65, "B, epoch r", permuted, 1.0)
    _arrow(ax, (0.75, 1.65), (2.05, 0.65), "", GREY, bend=0.3)
    ax.text(0.98, 0.72, "r epochs", ha="right", fontsize=8.5, color=INK)
    _arrow(ax, (3.05, 0.65), (5.3, 0.65), "train sparse", permuted)
    _arrow(ax, (6.275, 2.72), (4.2, 0.98), "", permuted, bend=-0.25)
    _box(ax, 5.98, 0.65, "sparse B", permuted, 1.3)
    return figure


def assignment():
    """A matrix of similarities: the best assignment, and what taking the largest first would give."""
    rng, n = np.random.default_rng(22), 6
    similarity = rng.uniform(0.05, 0.75, (n, n))
    similarity[np.arange(n), rng.permutation(n)] += 0.2
    best = dict(zip(*linear_sum_assignment(similarity, maximize=True), strict=True))
    greedy = {}
    for flat in np.argsort(-similarity, axis=None):
        row, column = divmod(int(flat), n)
        if row not in greedy and column not in greedy.values():
            greedy[row] = column
    figure, axes = new_figure(1, 2, width=6.6, height=3.3, sharey=True)
    for ax, (title, pairs) in zip(axes, (("largest entry first", greedy), ("best assignment", best)), strict=True):
        ax.imshow(similarity, vmin=0, vmax=1.5, cmap="Greys")
        total = sum(similarity[pair] for pair in pairs.items())
        for (row, column), value in np.ndenumerate(similarity):
            ax.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=8.5, color=INK)
        for row, column in pairs.items():
            ax.add_patch(Ellipse((column, row), 0.92, 0.92, fill=False, linewidth=2, color=INK))
        ax.set_title(f"{title}: {total:.2f}", fontsize=10)
        names = range(1, n + 1)
        ax.set(xlabel="unit of A", xticks=range(n), yticks=range(n), xticklabels=names, yticklabels=names)
        ax.grid(False)
    axes[0].set_ylabel("unit of B")
    return figure


def mask_moves():
    """One mask in three states: as found, with its rows moved, with rows and columns moved."""
    mask = _small_mask(7, 3)
    mask[2, :] = False
    mask[2, 5] = True
    rows, columns = [4, 2, 6, 0, 5, 1, 3], [3, 5, 0, 6, 2, 4, 1]
    color = np.where(mask, np.arange(1, 8)[:, None], 0)
    figure, axes = new_figure(1, 3, width=7, height=2.9)
    same, both = list(range(7)), r"$P\,m\,Q^{\mathsf{T}}$: both"
    states = (("$m$", same, same), (r"$P\,m$: rows only", rows, same), (both, rows, columns))
    shades = mpl.colors.ListedColormap([PALE, *mpl.colormaps["cividis"](np.linspace(0, 0.92, 7))])
    for ax, (title, outputs, inputs) in zip(axes, states, strict=True):
        ax.pcolormesh(color[outputs][:, inputs], cmap=shades, vmin=0, vmax=7, edgecolor="white", lw=1)
        ax.invert_yaxis()
        ax.set_title(title)
        middles = np.arange(7) + 0.5
        ax.set(aspect="equal", xticks=middles, yticks=middles, xticklabels=[i + 1 for i in inputs],
               yticklabels=[i + 1 for i in outputs], xlabel=f"input unit\n{mask.sum()} kept")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.grid(False)
    axes[0].set_ylabel("output unit")
    return figure


FIGURES = {figure.__name__: figure for figure in (
    sparse_patterns, storage, sparse_training_problem, pruning_rounds, rewinding, method, assignment, mask_moves)}


def draw(folder):
    """Write every figure as ``NAME.svg`` into ``folder``, which is made if need be; returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.svg" for name in FIGURES}
    for name, path in paths.items():
        path.write_text(svg(FIGURES[name]()), encoding="utf8")
    return list(paths.values())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python book/figures.py FOLDER")
    draw(sys.argv[1])
