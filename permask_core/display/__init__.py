"""Figures, tables and the one interactive control, in one visual style for the whole book."""

from permask_core.models.extras import check_extra

for _package in ("matplotlib", "pandas", "ipywidgets"):
    check_extra("permask_core.display", _package, "display")

from permask_core.display.claims import ahead, claim, evidence, read_claims
from permask_core.display.control import explore, show
from permask_core.display.figures import (
    accuracies,
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
from permask_core.display.style import DASHED, DYNAMIC, METHODS, Look, look, new_figure
from permask_core.display.tables import table

__all__ = ["DASHED", "DYNAMIC", "METHODS", "Look", "accuracies", "accuracy_by", "accuracy_by_sparsity", "ahead",
           "claim", "evidence", "explore", "group_on_network", "look", "mask_pictures", "matched_units", "new_figure",
           "pictures", "publish", "read_claims", "results", "series", "show", "table"]
