"""Figures, tables and the one interactive control, in one visual style for the whole book."""

from permask_core.models.extras import check_extra

for _package in ("matplotlib", "pandas", "ipywidgets"):
    check_extra("permask_core.display", _package, "display")

from permask_core.display.charts import draw_level, draw_lines, draw_means, heatmap, label_ends, line_chart
from permask_core.display.claims import ahead, claim, evidence
from permask_core.display.control import explore, show
from permask_core.display.figures import (
    accuracy_by,
    accuracy_by_sparsity,
    mask_pictures,
    matched_units,
    pictures,
    publish,
    results,
    series,
)
from permask_core.display.networks import group_on_network
from permask_core.display.rows import accuracies, plus_minus, provenance, select, spread
from permask_core.display.style import DASHED, DOTTED, DYNAMIC, METHODS, Look, look, new_figure
from permask_core.display.tables import table

__all__ = ["DASHED", "DOTTED", "DYNAMIC", "METHODS", "Look", "accuracies", "accuracy_by", "accuracy_by_sparsity",
           "ahead", "claim", "draw_level", "draw_lines", "draw_means", "evidence", "explore", "group_on_network",
           "heatmap", "label_ends", "line_chart", "look", "mask_pictures", "matched_units", "new_figure", "pictures",
           "plus_minus", "provenance", "publish", "results", "select", "series", "show", "spread",
           "table"]
