"""Progress of long work, as a bar or as printed lines."""

import os
import sys
import time

from tqdm.auto import tqdm

SECONDS = 60  # between two printed lines


def is_live():
    """Whether the code runs in a notebook that a reader has open.

    The environment variable ``PERMASK_DISPLAY`` (``live`` or ``static``) decides. Without it, the answer is yes where
    Jupyter's server, VS Code or Colab has set its own environment variables.
    """
    forced = os.environ.get("PERMASK_DISPLAY", "")
    if forced not in ("", "live", "static"):
        raise ValueError(f"PERMASK_DISPLAY={forced!r}: expected live or static")
    marks = ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG")
    return forced == "live" or (not forced and any(mark in os.environ for mark in marks))


def progress(iterable, description, total=None):
    """Show a tqdm bar over ``iterable``; ``total`` is its number of steps if it has no length.

    Outside live notebooks (:func:`is_live`) and terminals, a line is printed every minute instead, which a notebook run
    by papermill keeps. With ``PERMASK_DISPLAY=static``, or if ``description`` is None, nothing is shown.
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
