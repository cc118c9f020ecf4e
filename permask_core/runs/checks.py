"""Guards that name the value and what was expected."""

from numbers import Integral


def check_one_of(what, value, known):
    """Raise ValueError unless the value is known."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(known)}")


def check_lists(**lists):
    """Raise ValueError unless each is a list with at least one value, and each value stands in it once."""
    for name, values in lists.items():
        if not isinstance(values, (list, tuple)) or not values:
            least = " with at least one value" if isinstance(values, (list, tuple)) else ""
            raise ValueError(f"{name} is {values!r}: expected a list{least} (papermill takes lists with -y, as in "
                             f"-y '{{{name}: [...]}}')")
        if any(values.count(value) > 1 for value in values):  # runs counted twice would narrow intervals
            raise ValueError(f"{name} is {values!r}: expected each value once")


def is_integer(value):
    """Whether a value is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_integer(name, value, least, most=None):
    """Raise ValueError unless the value is an integer of at least ``least``, and at most ``most`` if that is given."""
    if not is_integer(value) or value < least or most is not None and value > most:
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}: expected an integer {limits}")


def check_work(seeds, workers, name="seeds"):
    """Raise ValueError unless seeds, of that name, are different integers of at least 0, at least one, and workers is
    an integer of at least 1."""
    check_lists(**{name: list(seeds)})
    for value in seeds:
        check_integer("seed", value, 0)
    check_integer("workers", workers, 1)
