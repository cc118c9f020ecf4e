"""Libraries that only some networks need."""

from importlib.util import find_spec


def check_extra(model, package, extra):
    """Raise ImportError, with how to install it, unless a package that a network comes from is there."""
    if find_spec(package) is None:
        raise ImportError(f"{model} needs {package}, which is not installed: pip install 'permask[{extra}]'")
