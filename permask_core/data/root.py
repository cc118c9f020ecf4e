"""Where data sets that are not part of a package lie on disk, and how their published files get there."""

import os
import tempfile
from pathlib import Path


def data_root(root=None):
    """The folder of data sets, absolute: ``root``, else what the environment variable PERMASK_DATA names, else ``data``
    below the working directory."""
    return Path(root or os.environ.get("PERMASK_DATA") or "data").expanduser().absolute()


def ensure_files(name, folder, sums, download, verify, *, source, place, fetch):
    """See to it that a data set's published files are in its folder.

    Parameters
    ----------
    name : str
        Of the data set, for messages.
    folder : pathlib.Path
    sums : dict
        What has to be in the folder, and its md5 sum; None for a folder of images, which has no sum.
    download, verify : bool
        Whether to fetch what is missing, and whether to check the sums.
    source, place : str
        Where the files are published, and what to do with what is fetched by hand: "unpack it in ...".
    fetch : callable
        Takes the path of a temporary folder and the list of what is missing, and puts that into the folder.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If it cannot be downloaded.
    ValueError
        If a file is not the published one.
    """
    from permask_core.models.vision import torchvision  # takes a second, which whoever needs no images should not wait

    missing = [file for file in sums if not (folder / file).exists()]
    if missing and download:
        _download(folder, missing, source, place, fetch)
    check_there(name, folder, sums, f"Load it with download=True, or fetch {source} and {place}")
    for file, expected in sums.items() if verify else ():
        found = torchvision.datasets.utils.calculate_md5(folder / file) if expected else None
        if found != expected:
            raise ValueError(f"{folder / file} is not the published file (md5 {found}, expected {expected}): "
                             "delete it and load the set with download=True, or accept it with verify=False")


def check_there(name, folder, files, how):
    """Raise FileNotFoundError, which says ``how`` to get them, unless a data set's files are in its folder."""
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise FileNotFoundError(
            f"{name} is not in {folder.parent}: expected the folder {folder.name} with {', '.join(files)}; missing: "
            f"{', '.join(missing)}. {how}; the environment variable PERMASK_DATA names another place")


def _download(folder, missing, source, place, fetch):
    """Fetch a set into a temporary folder and move what is missing: a file is there whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            fetch(Path(temporary, folder.name), missing)
            folder.mkdir(exist_ok=True)
            for file in missing:
                os.replace(Path(temporary, folder.name, file), folder / file)
    except Exception as error:  # networks, archives and the clients of file hosts raise what they like
        raise OSError(f"cannot download {source} into {folder.parent} ({error}): where there is no network, fetch it "
                      f"elsewhere and {place}") from error


def some(names):
    """The first five of a set of names, sorted, and how many more there are, for messages."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "") or "none"
