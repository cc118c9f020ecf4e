"""Charts of rows: means with intervals against a setting, in one or several panels, with labels at the ends of lines.

A chart takes rows (a DataFrame or a list of dict) and names of columns, and returns its figure. Functions that draw
into given axes (``draw_...``, :func:`label_ends`) are for figures that a page composes itself.
"""

import numpy as np
import pandas as pd

from permask_core.display.rows import spread
from permask_core.display.style import DASHED, DOTTED, look, new_figure
from permask_core.evaluation.statistics import Interval


def line_chart(rows, x, y, *, by="method", looks=None, dashes=None, levels=None, place=None, ticks=None, xlabel=None,
               bars=False, width=7.0, height=3.6, **axes):
    """Draw means with 95 % intervals against a setting: a line for each group of rows, a panel for each measure.

    Parameters
    ----------
    rows : pandas.DataFrame or list of dict
    x : str
        The column on the horizontal axis; its values are equally spaced.
    y : str or dict
        The column on the vertical axis, or a dict of several columns and the labels of their axes, with a panel for
        each.
    by : str or list of str
        The column or columns whose values define the lines.
    looks : dict of Look, optional
        Looks by group; by default those of the methods.
    dashes : dict of line styles, optional
        Line styles by group; by default constant fan-in is dashed.
    levels : pandas.DataFrame or list of dict, optional
        Rows without a value on the horizontal axis; their mean is a dotted horizontal line.
    place : callable, optional
        Maps a value of ``x`` to its coordinate, if values are not equally spaced.
    ticks : dict, optional
        Tick labels by value.
    xlabel : str, optional
        Name and unit of ``x``; by default the column's name.
    bars : bool
        Whether to draw intervals as bars side by side, for bands that would overlap.
    width, height : float
        In inches.
    **axes
        Arguments of :meth:`matplotlib.axes.Axes.set` for each panel: ``ylim=(0, None)``, ``yscale="log"``.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> rows = [{"method": m, "width": w, "seed": s, "loss": w + s} for m in ("lth", "naive") for w in (1, 2)
    ...         for s in (0, 1, 2)]
    >>> figure = line_chart(rows, "width", {"loss": "test loss (nats)"})
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['LTH', 'naive']
    """
    columns = y if isinstance(y, dict) else {y: y}
    figure, panels = new_figure(1, len(columns), width=width, height=height, squeeze=False)
    for panel, (column, label) in zip(panels[0], columns.items()):
        names = draw_lines(panel, rows, x, column, by=by, looks=looks, dashes=dashes, levels=levels, place=place,
                           ticks=ticks, bars=bars)
        panel.set(xlabel=xlabel or x, ylabel=label, **axes)
    label_ends(panel, names, panel.get_xlim()[1] if levels is not None else None)  # a level extends to the edge
    return figure


def draw_lines(axes, rows, x, y, *, by="method", looks=None, dashes=None, levels=None, place=None, ticks=None,
               bars=False):
    """Draw the lines of :func:`line_chart` in given axes.

    Returns
    -------
    list of (float, str, str)
        The end of each line, its name and colour, for :func:`label_ends`.
    """
    rows = pd.DataFrame(rows)
    values = sorted(rows[x].unique())
    at = {value: place(value) if place else i for i, value in enumerate(values)}
    step = min(np.diff([*at.values()]), default=1)
    groups, names = list(rows.groupby(by, sort=False)), []
    for i, (group, run) in enumerate(groups):
        shift = 0.05 * step * (i - (len(groups) - 1) / 2) if bars else 0
        points = {at[value] + shift: own for value, own in run.groupby(x)[y]}
        own = _look(looks, group)
        dash = (dashes or {}).get(group, "--" if group in DASHED else "-")
        found = draw_means(axes, list(points), list(points.values()), own, bars=bars, linestyle=dash)
        names.append((found[-1].mean, own.label, own.color))
    for group, run in pd.DataFrame(levels).groupby(by, sort=False) if levels is not None else ():
        names.append(draw_level(axes, run[y], _look(looks, group)))
    axes.set_xticks(list(at.values()), [ticks[value] if ticks else f"{value:g}" for value in values])
    axes.minorticks_off()
    return names


def draw_means(axes, x, y, look, *, bars=False, **how):
    """Draw means with their 95 % intervals, connected by a line.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    x : sequence of float or Interval
        Intervals are drawn as horizontal bars, in addition to the vertical ones.
    y : sequence of Interval or array-like
        Intervals, or values from which they are computed.
    look : Look
    bars : bool
        Whether to draw intervals as bars instead of a band.
    **how
        Arguments of the line: ``linestyle=""``, ``alpha=0.5``.

    Returns
    -------
    list of Interval
    """
    points = [value if isinstance(value, Interval) else spread(value) for value in y]
    mean, low, high = np.transpose([(p.mean, p.low, p.high) for p in points])
    how = {"color": look.color, "marker": look.marker, "markeredgecolor": "white", "markeredgewidth": 0.6,
           "zorder": 3} | how
    x = list(x)
    if isinstance(x[0], Interval):
        width, x = [[p.mean - p.low for p in x], [p.high - p.mean for p in x]], [p.mean for p in x]
        axes.errorbar(x, mean, [mean - low, high - mean], width, elinewidth=1.2, **how)
    elif bars:
        axes.errorbar(x, mean, [mean - low, high - mean], elinewidth=1.2, capsize=2, **how)
    else:
        axes.plot(x, mean, **how)
        axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
    return points


def draw_level(axes, values, look):
    """Draw a dotted horizontal line at the mean of values, with its interval; return its entry for
    :func:`label_ends`."""
    found = spread(np.asarray(values))
    axes.axhline(found.mean, color=look.color, linewidth=1.2, linestyle=DOTTED)
    if found.n > 1:
        axes.axhspan(found.low, found.high, color=look.color, alpha=0.1, linewidth=0)
    return found.mean, look.label, look.color


def label_ends(axes, names, x=None):
    """Write names at the right ends of lines, as close to the ends as possible without overlap.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Axes with their final limits and scale.
    names : list of (float, str, str)
        The height of the end of each line, its name and its colour.
    x : float, optional
        Where the lines end; by default the largest end.
    """
    from scipy.optimize import isotonic_regression  # imported here because only this function needs it

    if not names:
        return
    if x is None:
        x = max((np.max(line.get_xdata()) for line in axes.lines if line.get_transform() == axes.transData), default=1)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # final from here on
    height = 72 * axes.figure.get_figheight() * axes.get_position().height  # in points, before the layout is final
    step, names = 12 / height, sorted(names, key=lambda name: name[0])
    ends = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for y, _, _ in names]))[:, 1]
    # The nearest heights in the least-squares sense with a gap of at least a step are an isotonic regression. They are
    # limited to the axes, so that they do not cover the tick labels below.
    ladder = step * np.arange(len(names))
    heights = isotonic_regression(ends - ladder).x.clip(0.03, max(0.03, 1 - ladder[-1])) + ladder
    for end, (_, text, color) in zip(heights, names):
        axes.annotate(text, (x, end), xycoords=("data", "axes fraction"), xytext=(10, 0), textcoords="offset points",
                      color=color, va="center", fontweight="bold", fontsize=9, annotation_clip=False)


def heatmap(values, *, label, xlabel, ylabel, title="", limits=(None, None), ticks=None, cmap=None):
    """Draw a matrix as an image with a colour bar.

    Parameters
    ----------
    values : array-like, shape [rows, columns]
        NaN is blank.
    label : str
        The quantity of the colours, with its unit.
    xlabel, ylabel, title : str
    limits : (float, float)
        The values of the first and the last colour.
    ticks : sequence of str, optional
        Names of the rows and the columns.
    cmap : str, optional
        Matplotlib's name of a colour map.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure, axes = new_figure(width=5.4, height=4.4)
    image = axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap=cmap, interpolation="none")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontweight="normal", fontsize=10)
    if ticks is not None:
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_yticks(range(len(ticks)), ticks)
    axes.grid(False)
    figure.colorbar(image, label=label, shrink=0.85)
    return figure


def _look(looks, group):
    return looks[group] if looks else look(group if isinstance(group, str) else group[0])
