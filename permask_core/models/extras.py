"""Optional dependencies: the extras of ``pip install "permask[...]"``."""

from importlib.util import find_spec


def check_extra(part, package, extra):
    """Raise ImportError, with the command that installs it, if the package that ``part`` needs is missing."""
    if find_spec(package) is None:
        raise ImportError(f'{part} needs {package}, which is not installed: pip install "permask[{extra}]"')
