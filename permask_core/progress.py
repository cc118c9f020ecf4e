"""Progress of long work: a bar where somebody watches, silence in a page that is being rendered."""

import os
import sys

from tqdm.auto import tqdm


def progress(iterable=None, description="", total=None):
    """A tqdm bar over ``iterable`` (or to be moved by hand, up to ``total``).

    It is silent where ``PERMASK_DISPLAY`` is ``static`` (a page of the book) and where the error stream is neither a
    terminal nor a notebook's.
    """
    watched = os.environ.get("PERMASK_DISPLAY") != "static" and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(iterable, desc=description, total=total, disable=not watched, leave=False)
