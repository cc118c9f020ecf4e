"""Draw a permutation group on a network: the layers with its units, on which side, and the paths between them."""

import numpy as np
from matplotlib.patches import Rectangle

from permask_core.display.style import new_figure
from permask_core.matching.groups import indices
from permask_core.models.residual import BasicBlock

ROWS, COLUMNS, EMPTY, INK, PALE = "#56B4E9", "#E69F00", "#EDF0F4", "#222222", "#B4BCC6"
SPINE, ARC = 2.45, 4.1  # inches from the left: the layers, and the outermost paths around them
WIDTH, HEIGHT, BAR = 1.0, 0.52, 0.13  # size of a weight, and width of a norm


def group_on_network(model, groups, name):
    """Draw a small residual network from top to bottom, with all parts of one group in colour.

    A box is the weight of a layer, shape [rows, columns, ...], and the bar next to it is its norm. The stripes are the
    rows, columns and norms of the units of the group. Heavy lines carry the units.

    Parameters
    ----------
    model : torch.nn.Module
        A :func:`~permask_core.models.residual.resnet8` or a deeper network with the same blocks.
    groups : dict of str to Group
        Groups of this model.
    name : str
        The group to draw.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is no such group, or the model has no such residual blocks.
    """
    blocks = [path for path, module in model.named_modules() if isinstance(module, BasicBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no BasicBlock: expected a ResNet8, 20 or 56")
    if name not in groups:
        raise ValueError(f"unknown group {name!r}: expected one of {', '.join(groups)}")
    tensors = model.state_dict()
    owned = {(entry.tensor, entry.axis): np.sort(indices(entry, groups[name].size).flatten())
             for entry in groups[name].entries}
    height = 2.6 * len(blocks) + 1.9
    figure, axes = new_figure(width=4.9, height=0.5 * height)
    axes.set(xlim=(0, 4.9), ylim=(0.75 - height, 0.75))
    axes.set_axis_off()

    def box(x, y, width, tensor, *sides):
        axes.add_patch(Rectangle((x, y - HEIGHT / 2), width, HEIGHT, color=EMPTY, zorder=3))
        for axis in sides:
            places, size = owned.get((tensor, axis), []), tensors[tensor].shape[axis]
            for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []:
                low, high = run[0] / size, (run[-1] + 1) / size
                corner = (x + width * low, y - HEIGHT / 2) if axis else (x, y + HEIGHT * (0.5 - high))
                extent = (width * (high - low), HEIGHT) if axis else (width, HEIGHT * (high - low))
                axes.add_patch(Rectangle(corner, *extent, facecolor=COLUMNS if axis else ROWS, zorder=4))
        axes.add_patch(Rectangle((x, y - HEIGHT / 2), width, HEIGHT, fill=False, edgecolor=INK, zorder=5))

    def layer(x, y, conv, norm=None):
        box(x - WIDTH / 2, y, WIDTH, f"{conv}.weight", 0, 1)
        if norm:
            box(x + WIDTH / 2 + 0.07, y, BAR, f"{norm}.weight", 0)
        shape = " × ".join(map(str, tensors[f"{conv}.weight"].shape[:2]))
        axes.text(x, y, shape, ha="center", va="center", fontsize=9.5, color=INK, zorder=6)
        beside = (0, y, conv) if x == SPINE else (x + 0.08, y - 0.44, "shortcut")
        axes.text(*beside, va="center", fontsize=10.5, color=INK)

    def line(x, y, carries):
        axes.plot(x, y, color=INK if carries else PALE, linewidth=3.2 if carries else 1.4, zorder=2 if carries else 1,
                  solid_capstyle="round")

    def holds(conv, axis):
        return (f"{conv}.weight", axis) in owned

    for i, (color, text) in enumerate(((ROWS, "rows write units"), (COLUMNS, "columns read units"))):
        axes.add_patch(Rectangle((3.25, 0.49 - 0.3 * i), 0.16, 0.16, facecolor=color))
        axes.text(3.48, 0.57 - 0.3 * i, text, va="center", fontsize=9, color=INK)
    line([SPINE] * 2, [0.65, 0], holds("conv1", 1))
    layer(SPINE, 0, "conv1", "norm1")
    bottom = 0
    for path in blocks:
        first, second, around = (f"{path}.{part}" for part in ("conv1", "conv2", "shortcut.conv"))
        top, total = bottom, bottom - 2.4
        line([SPINE] * 2, [top, top - 1], holds(first, 1))
        line([SPINE] * 2, [top - 1, top - 1.8], holds(second, 1))
        line([SPINE] * 2, [top - 1.8, total], holds(second, 0))
        # A cubic curve from above the block to its sum; without a layer it carries the input of the block.
        t = np.linspace(0, 1, 31)
        x = SPINE + 4 * t * (1 - t) * (ARC - SPINE)
        y = top - 0.45 + (3 * t**2 - 2 * t**3) * (total - top + 0.45)
        has_layer = f"{around}.weight" in tensors
        line(x[:16], y[:16], holds(around if has_layer else first, 1))
        line(x[15:], y[15:], holds(around, 0) if has_layer else holds(first, 1))
        layer(SPINE, top - 1, first, f"{path}.norm1")
        layer(SPINE, top - 1.8, second, f"{path}.norm2")
        if has_layer:
            layer(ARC, y[15], around, f"{path}.shortcut.norm")
        axes.plot(SPINE, total, "o", color="white", markeredgecolor=INK, markersize=11, zorder=5)
        axes.plot(SPINE, total, "+", color=INK, markersize=7, zorder=6)
        bottom = total - 0.2
    line([SPINE] * 2, [bottom + 0.2, bottom - 0.45], holds("head", 1))
    line([SPINE] * 2, [bottom - 0.45, bottom - 1.1], holds("head", 0))
    layer(SPINE, bottom - 0.45, "head")
    return figure
