"""Where data sets that are not part of a package lie on disk."""

import os
from pathlib import Path


def data_root(root=None):
    """The folder of data sets, absolute: ``root``, else what the environment variable PERMASK_DATA names, else ``data``
    below the working directory."""
    return Path(root or os.environ.get("PERMASK_DATA") or "data").expanduser().absolute()
