"""Whether somebody is watching, and progress of long work for those who do."""

import os
import sys
import time

from tqdm.auto import tqdm

SECONDS = 60  # between two lines of text


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

    Where nobody watches, neither in a live notebook (:func:`is_live`) nor at a terminal, long work prints a line a
    minute, which a notebook run by papermill keeps. With ``PERMASK_DISPLAY=static``, and if ``description`` is None, it
    is silent.
    """
    at_terminal = os.environ.get("PERMASK_DISPLAY") != "static" and sys.stderr.isatty()
    watched = description is not None and (is_live() or at_terminal)
    if description is not None and not watched and os.environ.get("PERMASK_DISPLAY") != "static":
        return _print_lines(iterable, description, total)
    return tqdm(iterable, desc=description, total=total, disable=not watched, leave=False)


def _print_lines(iterable, description, total):
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    start = printed = time.monotonic()
    for done, item in enumerate(iterable, 1):
        yield item
        if time.monotonic() - printed >= SECONDS:
            printed = time.monotonic()
            of = f" of {total}" if total else ""
            print(f"{description}: {done}{of} in {(printed - start) / 60:.0f} min", flush=True)
