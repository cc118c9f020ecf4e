"""The factor that makes networks wider or narrower."""

import math
from numbers import Real


def scaled(width, *sizes):
    """Multiply hidden sizes by a width factor and round to at least 1; raise ValueError unless the factor is above
    0."""
    if not isinstance(width, Real) or not 0 < width < math.inf:
        raise ValueError(f"width is {width!r}: expected a factor above 0")
    return [max(1, round(size * width)) for size in sizes]
