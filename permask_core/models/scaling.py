"""The one factor by which networks are made wider or narrower."""

import math
from numbers import Real


def scaled(width, *sizes):
    """Hidden sizes times a width factor, rounded, at least 1 each; ValueError unless the factor is above 0."""
    if not isinstance(width, Real) or not 0 < width < math.inf:
        raise ValueError(f"width is {width!r}: expected a factor above 0")
    return [max(1, round(size * width)) for size in sizes]
