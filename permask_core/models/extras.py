"""Libraries that only some parts need: the extras of ``pip install "permask[...]"``."""

from importlib.util import find_spec


def check_extra(part, package, extra):
    """Raise ImportError, with how to install it, unless the package that some part needs is there."""
    if find_spec(package) is None:
        raise ImportError(f'{part} needs {package}, which is not installed: pip install "permask[{extra}]"')
