"""The style of all figures: each method has the same colour and marker in the whole book.

The colours are Okabe and Ito's palette for colour-blind readers ("Color Universal Design", 2008), with a darker purple
for contrast; the brown was chosen for its distance from each of them, also for colour-blind readers. Figures have a
white background, so that they look the same on light and dark pages.
Importing this module sets Matplotlib's defaults, because Matplotlib reads most of them when something is drawn, not
when the figure is created.
"""

from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure


class Look(NamedTuple):
    """How a method is drawn: ``color`` (hex), ``marker`` (Matplotlib's code) and ``label`` (for the reader)."""

    color: str
    marker: str
    label: str


METHODS = {
    "dense": Look("#000000", "s", "dense"),
    "lth": Look("#0072B2", "o", "LTH"),
    "permuted": Look("#009E73", "D", "permuted"),
    "naive": Look("#D55E00", "v", "naive"),
    "random": Look("#8F5D90", "X", "random"),
    "pruned": Look("#5E4B00", "^", "pruned"),
}

# Methods of dynamic sparse training. Static masks are purple; of two methods with one colour, the one with constant
# fan-in is dashed.
DYNAMIC = {
    "fan_in": Look("#8F5D90", "P", "fan-in"),
    "set": Look("#A87900", "^", "SET"),
    "rigl": Look("#2F8FC4", "o", "RigL"),
    "srigl": Look("#A3336B", "v", "SRigL"),
    "srigl+ablation": Look("#A3336B", "D", "SRigL, ablation"),
}
DASHED = ("fan_in", "srigl")
DOTTED = (0, (1, 1.5))  # the line of a reference level
STACKED = 4  # more panels in a row are not stacked on a narrow screen

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
    "image.cmap": "cividis",
    "svg.hashsalt": "permask",
}
mpl.rcParams.update(RC)


def look(method):
    """Return colour, marker and label of a method.

    Parameters
    ----------
    method : str
        One of ``METHODS`` or ``DYNAMIC``.

    Raises
    ------
    ValueError
        If the method is unknown.
    """
    known = METHODS | DYNAMIC
    if method not in known:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(known)}")
    return known[method]


def new_figure(rows=1, columns=1, *, width=7.0, height=4.0, **subplots):
    """Create a figure in the style of the book, outside pyplot's global state, and its axes.

    Parameters
    ----------
    rows, columns : int
        The grid of axes.
    width, height : float
        Size in inches; the book shows 7 inches as the full width of the text.
    **subplots
        Arguments of :meth:`matplotlib.figure.Figure.subplots` (for example ``sharey=True``).

    Returns
    -------
    (matplotlib.figure.Figure, Axes or array of Axes)
    """
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, **subplots)
    if columns <= STACKED:
        for one in figure.axes:
            one.tick_params(labelleft=True)  # also where the axis is shared: a panel may stand alone
    return figure, axes
