"""Guards that name the value and what was expected."""

import difflib
from numbers import Integral


def nearest(name, known):
    """A hint at the name that was probably meant, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f", perhaps {near[0]!r}" if near else ""


def check_one_of(what, value, known):
    """Raise ValueError unless the value is known."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}{nearest(value, known)}: expected one of {', '.join(known)}")


def check_lists(**lists):
    """Raise ValueError unless each is a list with at least one value, and each value stands in it once."""
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)) or not values:
            length = " with at least one value" if isinstance(values, (list, tuple)) else ""
            raise ValueError(f"{name} is {values!r}: expected a list{length} (papermill takes lists with -y, as in "
                             f"-y '{{{name}: [...]}}')")
        if any(values.count(value) > 1 for value in values):  # runs counted twice would narrow intervals
            raise ValueError(f"{name} is {values!r}: expected each value once")


def check_integer(name, value, minimum):
    """Raise ValueError unless the value is an integer of at least the minimum; NumPy's integers are integers."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}: expected an integer of at least {minimum}")


def check_work(seeds, workers, name="seeds"):
    """Raise ValueError unless seeds, of that name, are different integers of at least 0, at least one, and workers is
    an integer of at least 1."""
    check_lists(**{name: list(seeds)})
    for value in seeds:
        check_integer("seed", value, 0)
    check_integer("workers", workers, 1)
