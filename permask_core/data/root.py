"""The folder of data sets that are files, and the download of their published files."""

import os
import tempfile
from pathlib import Path


def data_root(root=None):
    """Return the absolute folder of data sets: ``root`` if given, else that in the environment variable PERMASK_DATA,
    else ``data`` below the working directory."""
    return Path(root or os.environ.get("PERMASK_DATA") or "data").expanduser().absolute()


def ensure_files(name, folder, sums, download, verify, *, source, place, fetch):
    """Check that the published files of a data set are in its folder, and download missing ones if requested.

    Parameters
    ----------
    name : str
        Name of the data set, for messages.
    folder : pathlib.Path
    sums : dict
        Names of the required files and their md5 sums; None for a folder of images, which has no sum.
    download, verify : bool
        Whether to download missing files, and whether to verify the sums.
    source, place : str
        Where the files are published, and what to do with files downloaded by hand: "unpack it in ...".
    fetch : callable
        Takes the path of a temporary folder and the list of missing files, and downloads these files into the folder.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If the download fails.
    ValueError
        If a file is not the published one.
    """
    from permask_core.models.vision import torchvision  # here, because it takes a second to import

    missing = [file for file in sums if not (folder / file).exists()]
    if missing and download:
        _download(folder, missing, source, place, fetch)
    check_there(name, folder, sums, f"Load it with download=True, or download {source} and {place}")
    for file, expected in sums.items() if verify else ():
        found = torchvision.datasets.utils.calculate_md5(folder / file) if expected else None
        if found != expected:
            raise ValueError(f"{folder / file} is not the published file (md5 {found}, expected {expected}): "
                             "delete it and load the data set with download=True, or accept it with verify=False")


def check_there(name, folder, files, how):
    """Raise FileNotFoundError, which says ``how`` to get the files, if files of a data set are missing in its
    folder."""
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise FileNotFoundError(
            f"{name} is not in {folder.parent}: expected the folder {folder.name} with {', '.join(files)}; missing: "
            f"{', '.join(missing)}. {how}; the environment variable PERMASK_DATA sets another folder")


def _download(folder, missing, source, place, fetch):
    """Download a data set into a temporary folder and move missing files from there, so that no file is incomplete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            fetch(Path(temporary, folder.name), missing)
            folder.mkdir(exist_ok=True)
            for file in missing:
                os.replace(Path(temporary, folder.name, file), folder / file)
    except Exception as error:  # networks, archives and clients of file hosts raise various exceptions
        raise OSError(f"cannot download {source} into {folder.parent} ({error}): without network access, download "
                      f"it elsewhere and {place}") from error


def some(names):
    """Return the first five of a set of names, sorted, and the number of further names, for messages."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "") or "none"
