"""Groups drawn on a network: what is coloured and what is heavy is what the group holds, and no label is cut."""

import re
from functools import cache

import pytest
import torch
from matplotlib.colors import to_hex

from permask_core.display import group_on_network
from permask_core.display.networks import BAR, COLUMNS, HEIGHT, ROWS, WIDTH
from permask_core.matching import permutation_groups
from permask_core.models import build_model
from permask_core.models.residual import SHORTCUTS

NETWORKS = {shortcut: build_model("resnet8", (1, 8, 8), 10, shortcut=shortcut) for shortcut in SHORTCUTS}


@cache  # traced in a test: every process of pytest imports this file
def groups_of(shortcut):
    return permutation_groups(NETWORKS[shortcut], torch.zeros(2, 1, 8, 8))


def drawn(shortcut, name):
    """The axes of the drawing of a group."""
    (axes,) = group_on_network(NETWORKS[shortcut], groups_of(shortcut), name).axes
    return axes


def heavy(axes):
    """How many lines carry units."""
    return sum(line.get_linewidth() > 3 for line in axes.lines)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_coloured_parts_are_those_of_the_group(shortcut):
    state = NETWORKS[shortcut].state_dict()
    for name, group in groups_of(shortcut).items():
        expected = {ROWS: 0, COLUMNS: 0}
        for tensor, axis, *_ in group.entries:
            if tensor.endswith("weight"):
                width = WIDTH if state[tensor].ndim > 1 else BAR
                expected[COLUMNS if axis else ROWS] += width * HEIGHT * group.size / state[tensor].shape[axis]
        patches = [patch for patch in drawn(shortcut, name).patches if patch.get_fill() and patch.get_width() != 0.16]
        for color, area in expected.items():
            found = (p.get_width() * p.get_height() for p in patches if to_hex(p.get_facecolor()).upper() == color)
            assert sum(found) == pytest.approx(area), name


@pytest.mark.parametrize("name, stripes", [
    ("conv1", [(0.25, 0.75)]), ("stage2.block1.conv2", [(0, 0.25), (0.75, 1)])])
def test_old_and_new_units_stand_where_they_are(name, stripes):
    # Behind a padded shortcut the old units are the middle of the next stage: columns of its first layer.
    axes = drawn("padded", name)
    (label,) = (text for text in axes.texts if text.get_text() == "64 × 32")
    x, y = label.get_position()
    found = [(p.get_x() - x + WIDTH / 2, p.get_x() + p.get_width() - x + WIDTH / 2) for p in axes.patches
             if to_hex(p.get_facecolor()).upper() == COLUMNS and p.get_y() == pytest.approx(y - HEIGHT / 2)]
    assert sorted(found) == [pytest.approx((low * WIDTH, high * WIDTH)) for low, high in stripes]


@pytest.mark.parametrize("shortcut, name, count", [
    ("projection", "stage1.block1.conv1", 1),  # from the first layer of a block to its second
    ("projection", "conv1", 6),  # into two blocks, out of one, around one, and into a shortcut
    ("projection", "stage3.block1.conv2", 3),  # out of a block and its shortcut, and into the head
    ("padded", "conv1", 13)])  # into, out of and around every block, and into the head
def test_heavy_lines_are_the_paths_of_the_units(shortcut, name, count):
    assert heavy(drawn(shortcut, name)) == count


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_every_layer_is_named_and_no_name_is_cut(shortcut):
    figure = group_on_network(NETWORKS[shortcut], groups_of(shortcut), "conv1")
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    layers = [name.removesuffix(".weight") for name, tensor in NETWORKS[shortcut].state_dict().items()
              if tensor.ndim > 1]
    named = [text.get_text() for text in texts]
    assert [name for name in layers if "shortcut" not in name] == [name for name in named if name in layers]
    assert named.count("shortcut") == sum("shortcut" in name for name in layers)
    for text in texts:
        extent = text.get_window_extent()
        assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, text.get_text()
        assert figure.bbox.y0 <= extent.y0 and extent.y1 <= figure.bbox.y1, text.get_text()


def test_bad_input_is_named():
    model, groups = NETWORKS["padded"], groups_of("padded")
    with pytest.raises(ValueError, match=re.escape("unknown group 'conv9': expected one of conv1, stage1.block1")):
        group_on_network(model, groups, "conv9")
    with pytest.raises(ValueError, match="Sequential has no BasicBlock: expected a ResNet8, 20 or 56"):
        group_on_network(build_model("mlp", (1, 8, 8), 10), groups, "conv1")
