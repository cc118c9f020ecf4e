"""Sparse layers without dense storage, and training that moves their connections."""

from permask_core.sparse.attention import FanInAttention
from permask_core.sparse.condense import Condensed, condense
from permask_core.sparse.convolution import FanInConv2d
from permask_core.sparse.fan_in import FanInLayer, FanInLinear, sample_columns

__all__ = ["Condensed", "FanInAttention", "FanInConv2d", "FanInLayer", "FanInLinear", "condense", "sample_columns"]
