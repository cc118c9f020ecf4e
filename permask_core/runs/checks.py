"""Checks of parameters; their error messages name the value and what was expected."""

import difflib
from numbers import Integral


def nearest(name, known):
    """Return a hint at the name that was probably meant, or an empty string."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f", perhaps {near[0]!r}" if near else ""


def check_one_of(what, value, known):
    """Raise ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}{nearest(value, known)}: expected one of {', '.join(known)}")


def check_lists(**lists):
    """Raise ValueError unless each argument is a list of at least one value without duplicates."""
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)) or not values:
            length = " with at least one value" if isinstance(values, (list, tuple)) else ""
            raise ValueError(f"{name} is {values!r}: expected a list{length} (papermill takes lists with -y, as in "
                             f"-y '{{{name}: [...]}}')")
        if any(values.count(value) > 1 for value in values):  # a run counted twice would narrow intervals
            raise ValueError(f"{name} is {values!r}: expected each value once")


def is_integer(value):
    """Whether a value is an integer of Python or NumPy; True and False do not count as integers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_integer(name, value, minimum, maximum=None):
    """Raise ValueError unless ``value`` is an integer (of Python or NumPy) of at least ``minimum`` and, if given, at
    most ``maximum``."""
    if not is_integer(value) or value < minimum or maximum is not None and value > maximum:
        limits = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name} is {value!r}: expected an integer {limits}")


def check_work(seeds, workers, name="seeds"):
    """Raise ValueError unless ``seeds`` (called ``name`` in the message) is a list of different integers of at least 0,
    with at least one, and ``workers`` is an integer of at least 1."""
    check_lists(**{name: list(seeds)})
    for value in seeds:
        check_integer("seed", value, 0)
    check_integer("workers", workers, 1)
