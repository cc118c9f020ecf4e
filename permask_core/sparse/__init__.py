"""Sparse layers without dense storage, and training that moves their connections."""

from permask_core.sparse.condense import Condensed, FanInPointwise, condense
from permask_core.sparse.fan_in import FanInLinear, sample_columns

__all__ = ["Condensed", "FanInLinear", "FanInPointwise", "condense", "sample_columns"]
