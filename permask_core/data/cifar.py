"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels, from torchvision's files on disk.

The files are Python pickles, which can run code when they are read. torchvision relies only on the published md5 sums.
Here the files are read by an unpickler that accepts only arrays and plain values, so that subsets and modified sets in
the same format are safe too.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import io
import pickle

import numpy as np
import torch

from permask_core.data.root import data_root, ensure_files
from permask_core.data.splits import Split, channel_moments
from permask_core.runs.checks import is_integer


def cifar10(root=None, download=False, verify=True):
    """CIFAR-10: aeroplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck.

    Parameters
    ----------
    root : path-like, optional
        The folder that contains ``cifar-10-batches-py``: see :func:`permask_core.data.root.data_root`.
    download : bool
        Whether to download missing files (170 MB).
    verify : bool
        Whether to require the md5 sums of the published files.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split of uint8 images, standardised by the channels of the training images (the training split
        is augmented by crops with a padding of 4 black pixels and by mirror images); the shape [3, 32, 32]; the number
        of classes.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If the download fails.
    ValueError
        If a file is damaged, is not the published one, or does not hold images and labels.
    """
    return _load("CIFAR10", "labels", root, download, verify)


def cifar100(root=None, download=False, verify=True):
    """CIFAR-100 with its 100 fine labels, in the folder ``cifar-100-python``. Otherwise like :func:`cifar10`."""
    return _load("CIFAR100", "fine_labels", root, download, verify)


def check_files(root=None, name="cifar10"):
    """See :func:`permask_core.data.check_files`."""
    _published(name.upper(), root, download=False, verify=False)


def _published(name, root, download, verify):
    """Return torchvision's class of the data set, which lists its files, and the folder of the files."""
    from permask_core.models.vision import torchvision  # here, because it takes a second to import

    published = getattr(torchvision.datasets, name)
    root = data_root(root)
    folder = root / published.base_folder
    meta = published.meta
    sums = dict([*published.train_list, *published.test_list, (meta["filename"], meta["md5"])])

    def fetch(to, missing):
        torchvision.datasets.utils.download_and_extract_archive(published.url, to.parent, md5=published.tgz_md5)

    ensure_files(name, folder, sums, download, verify, source=published.url, place=f"unpack it in {root}",
                    fetch=fetch)
    return published, folder


def _load(name, key, root, download, verify):
    published, folder = _published(name, root, download, verify)
    meta = published.meta
    names = _entry(folder / meta["filename"], [meta["key"]])[meta["key"]]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{meta['key']!r} in {folder / meta['filename']} is {names!r}: expected a list of names")
    train, test = (_images([folder / file for file, _ in files], key, len(names))
                   for files in (published.train_list, published.test_list))
    mean, sd = channel_moments(train[0])
    return Split(*train, mean, sd, pad=4, flip=True), Split(*test, mean, sd), (3, 32, 32), len(names)


def _images(paths, key, classes):
    """Return the images of several files as uint8 [n, 3, 32, 32], and their labels as int64 [n]."""
    parts = [_batch(path, key, classes) for path in paths]
    images, labels = (np.concatenate(part) for part in zip(*parts))
    return torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels)


def _batch(path, key, classes):
    entry = _entry(path, ["data", key])
    images, labels = entry["data"], entry[key]
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 2
            and images.shape[1] == 3072 and len(images) > 0):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"'data' in {path} is {found}: expected uint8 [n, 3072] with n at least 1")
    if not isinstance(labels, (list, np.ndarray)) or len(labels) != len(images):
        found = f"{len(labels)} of them" if isinstance(labels, (list, np.ndarray)) else type(labels).__name__
        raise ValueError(f"{key!r} in {path} is {found}: expected a list with one for each of the {len(images)} images")
    for label in labels:
        if not is_integer(label) or not 0 <= label < classes:
            raise ValueError(f"{key!r} in {path} has the label {label!r}: expected integers from 0 to {classes - 1}")
    return images, np.array(labels, np.int64)


def _entry(path, keys):
    content = path.read_bytes()
    try:
        entry = _Arrays(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is damaged or not a CIFAR file ({error}): delete it and load the data set with "
                         "download=True") from error
    if not isinstance(entry, dict) or not set(keys) <= set(entry):
        found = f"has the keys {list(entry)}" if isinstance(entry, dict) else f"holds {type(entry).__name__}"
        raise ValueError(f"{path} {found}: expected a dict with {' and '.join(map(repr, keys))}")
    return {key: getattr(value, "array", value) for key, value in entry.items()}


class _Type:
    """The type of an array in a file: its name, such as ``u1``, and its byte order, which is in the pickled state."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        self.name = state[1] + self.name


class _Array:
    """An array in a file. It replaces NumPy's own unpickling, which can be made to read any bytes as Python objects."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, kind, by_columns, raw = state
        # Strings of Python 2 are decoded as latin1.
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.array = _array(raw, kind, shape, "F" if by_columns else "C")


def _array(raw, kind, shape, order):
    return np.frombuffer(raw, kind.name).reshape(shape, order=order)


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain values; nothing named in a file is imported."""

    KNOWN = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},  # since protocol 5
        ("numpy", "ndarray"): None,  # only an argument of _reconstruct
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): str.encode,  # used by protocols 0 to 2 for the bytes of Python 3
    }

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it uses {module}.{name}, which no array needs")
        return self.KNOWN[module, name]
