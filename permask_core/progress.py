"""Whether somebody is watching, and progress of long work for those who do."""

import os
import sys

from tqdm.auto import tqdm


def is_live():
    """Whether a reader with a kernel is looking: the environment variable ``PERMASK_DISPLAY`` (``live`` or ``static``)
    decides, and without it the marks that Jupyter's server, VS Code and Colab leave on their kernels."""
    forced = os.environ.get("PERMASK_DISPLAY", "")
    if forced not in ("", "live", "static"):
        raise ValueError(f"PERMASK_DISPLAY={forced!r}: expected live or static")
    marks = ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG")
    return forced == "live" or (not forced and any(mark in os.environ for mark in marks))


def progress(iterable, description, total=None):
    """A tqdm bar over ``iterable``, of ``total`` steps if it cannot tell itself.

    It is silent where nobody watches: neither in a live notebook (:func:`is_live`) nor at a terminal; and if
    ``description`` is None.
    """
    at_terminal = os.environ.get("PERMASK_DISPLAY") != "static" and sys.stderr.isatty()
    watched = description is not None and (is_live() or at_terminal)
    return tqdm(iterable, desc=description, total=total, disable=not watched, leave=False)
