"""CIFAR-10 and CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels, from torchvision's files on disk.

The files are Python pickles, which may run code when they are read. torchvision guards them by their published md5
sums alone; here they are read by an unpickler that knows arrays and plain values only, so that a subset or a changed
set in the same format is as safe.

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
        The folder with ``cifar-10-batches-py`` in it: see :func:`permask_core.data.root.data_root`.
    download : bool
        Whether to fetch files that are missing (170 MB).
    verify : bool
        Whether to accept the published files only, by their md5 sums.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split, uint8 images of [3, 32, 32] standardised by the training images' channels, the training
        split augmented by crops from 4 black pixels around and by mirror images; that shape; the number of classes.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If it cannot be downloaded.
    ValueError
        If a file is damaged, is not the published one, or holds something else than images and their labels.
    """
    return _load("CIFAR10", "labels", root, download, verify)


def cifar100(root=None, download=False, verify=True):
    """CIFAR-100: the fine labels, 100 classes; the folder is ``cifar-100-python``. Otherwise like :func:`cifar10`."""
    return _load("CIFAR100", "fine_labels", root, download, verify)


def check_files(root=None, name="cifar10"):
    """See :func:`permask_core.data.check_files`."""
    _published(name.upper(), root, download=False, verify=False)


def _published(name, root, download, verify):
    """torchvision's class of the set, which lists its files, and the folder where they are."""
    from permask_core.models.vision import torchvision  # takes a second, which whoever needs no images should not wait

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
    """The images of several files as uint8 [n, 3, 32, 32], and their labels as int64 [n]."""
    parts = [_batch(path, key, classes) for path in paths]
    images, labels = (np.concatenate(part) for part in zip(*parts))
    return torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels)


def _batch(path, key, classes):
    entry = _entry(path, ["data", key])
    images, labels = entry["data"], entry[key]
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 2
            and images.shape[1] == 3072 and len(images) > 0):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"'data' in {path} is {found}: expected uint8 [n, 3072], n at least 1")
    if not isinstance(labels, (list, np.ndarray)) or len(labels) != len(images):
        found = f"{len(labels)} of them" if isinstance(labels, (list, np.ndarray)) else type(labels).__name__
        raise ValueError(f"{key!r} in {path} is {found}: expected a list of one for each of the {len(images)} images")
    for label in labels:
        if not is_integer(label) or not 0 <= label < classes:
            raise ValueError(f"{key!r} in {path} has the label {label!r}: expected integers from 0 to {classes - 1}")
    return images, np.array(labels, np.int64)


def _entry(path, keys):
    content = path.read_bytes()
    try:
        entry = _Arrays(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is damaged or no file of CIFAR ({error}): delete it and load the set with "
                         "download=True") from error
    if not isinstance(entry, dict) or not set(keys) <= set(entry):
        found = f"has the keys {list(entry)}" if isinstance(entry, dict) else f"holds {type(entry).__name__}"
        raise ValueError(f"{path} {found}: expected a dict with {' and '.join(map(repr, keys))}")
    return {key: getattr(value, "array", value) for key, value in entry.items()}


class _Type:
    """What a file says of an array's type: its name, such as ``u1``, and in its state the order of its bytes."""

    def __init__(self, name, *_):
        self.name = name

    def __setstate__(self, state):
        self.name = state[1] + self.name


class _Array:
    """What a file says of an array. numpy would trust it, and could be told to take any bytes for Python's objects."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, kind, by_columns, raw = state
        # Python 2's strings are read as latin1.
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        self.array = _array(raw, kind, shape, "F" if by_columns else "C")


def _array(raw, kind, shape, order):
    return np.frombuffer(raw, kind.name).reshape(shape, order=order)


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain values; nothing that a file names is ever looked up or imported."""

    KNOWN = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _array for core in ("core", "_core")},  # from protocol 5 on
        ("numpy", "ndarray"): None,  # only handed to _reconstruct
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): str.encode,  # how protocols 0 to 2 write Python 3's bytes
    }

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        return self.KNOWN[module, name]
