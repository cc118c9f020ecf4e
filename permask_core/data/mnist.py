"""MNIST, Fashion-MNIST, KMNIST and EMNIST: grey images of 28x28 pixels, from torchvision's files on disk.

The four sets have the same format: an idx file of images and one of labels for each split, compressed with gzip.

Sources: LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings of
the IEEE, 1998; Xiao, Rasul and Vollgraf, "Fashion-MNIST", arXiv 1708.07747, 2017; Clanuwat et al., "Deep Learning for
Classical Japanese Literature", arXiv 1812.01718, 2018; Cohen et al., "EMNIST", IJCNN 2017.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from permask_core.data.root import data_root, ensure_files
from permask_core.data.splits import Split, channel_moments
from permask_core.runs.checks import is_integer

GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DEBIAN = Path("/usr/share/datasets")  # where Debian's package dataset-fashion-mnist puts the files
SPLITS = {"balanced": 47, "byclass": 62, "bymerge": 47, "digits": 10, "letters": 26, "mnist": 10}  # classes of EMNIST
PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def mnist(root=None, download=False, verify=True, n_train=None, n_test=None, size=28, channels=1, pad=0, flip=False):
    """MNIST: 60,000 training and 10,000 test images of the digits 0 to 9.

    Parameters
    ----------
    root : path-like, optional
        The folder that contains ``MNIST/raw``, with the four published files, compressed or unpacked: see
        :func:`permask_core.data.root.data_root`.
    download : bool
        Whether to download missing files (10 to 30 MB; EMNIST 560 MB).
    verify : bool
        Whether to require the md5 sums of the published files. There are none for EMNIST's files, for unpacked ones,
        and for those of Debian's package, which are compressed again and which apt has verified.
    n_train, n_test : int, optional
        The number of images to keep of each split: the first ones. By default all.
    size : {28, 32}
        Height and width; 32 adds two black pixels on each side.
    channels : {1, 3}
        3 repeats the grey channel.
    pad : int
        Augmentation in training: shifts by up to ``pad`` pixels, with black pixels at the edge.
    flip : bool
        Augmentation in training: mirror images with probability 1/2.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split of uint8 images, standardised by the training images; the shape of an image; the number
        of classes.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If the download fails.
    ValueError
        If a file is damaged, is not the published one, or does not hold images or labels, or if an option is out of
        range.
    """
    return _load("MNIST", PARTS, 10, root, download, verify, n_train, n_test, size, channels, pad, flip)


def fashion_mnist(root=None, download=False, verify=True, n_train=None, n_test=None, size=28, channels=1, pad=0,
                  flip=False):
    """Fashion-MNIST: ten kinds of garments, in the order of ``GARMENTS``, in the folder ``FashionMNIST/raw``.

    Without files there, those of Debian's package ``dataset-fashion-mnist`` are used. Otherwise like :func:`mnist`.
    """
    return _load("FashionMNIST", PARTS, 10, root, download, verify, n_train, n_test, size, channels, pad, flip)


def kmnist(root=None, download=False, verify=True, n_train=None, n_test=None, size=28, channels=1, pad=0, flip=False):
    """KMNIST: ten characters of cursive Japanese, in the folder ``KMNIST/raw``. Otherwise like :func:`mnist`."""
    return _load("KMNIST", PARTS, 10, root, download, verify, n_train, n_test, size, channels, pad, flip)


def emnist(root=None, download=False, verify=True, n_train=None, n_test=None, size=28, channels=1, pad=0, flip=False,
           split="balanced"):
    """EMNIST: handwritten digits and letters, in the folder ``EMNIST/raw``.

    ``split`` is "balanced", "byclass", "bymerge", "digits", "letters" or "mnist". The images are upright, unlike those
    in the files, and labels begin at 0, also those of letters. Otherwise like :func:`mnist`.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    return _load("EMNIST", _emnist(split), SPLITS[split], root, download, verify, n_train, n_test, size, channels, pad,
                 flip)


def check_files(root=None, name="mnist"):
    """See :func:`permask_core.data.check_files`."""
    published = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "emnist": "EMNIST"}[name]
    _find(published, _emnist("balanced") if name == "emnist" else PARTS, root, download=False, verify=False)


def _emnist(split):
    return [f"emnist-{split}-{part.replace('t10k', 'test')}" for part in PARTS]


def _load(name, files, classes, root, download, verify, n_train, n_test, size, channels, pad, flip):
    for option, value, expected in (("size", size, (28, 32)), ("channels", channels, (1, 3))):
        if value not in expected:
            raise ValueError(f"{option} is {value!r}: expected {expected[0]} or {expected[1]}")
    for option, value, least in (("n_train", n_train, 1), ("n_test", n_test, 1), ("pad", pad, 0)):
        if value is not None and not (is_integer(value) and value >= least):
            raise ValueError(f"{option} is {value!r}: expected an integer of at least {least}")
    first = 1 if files[0].startswith("emnist-letters") else 0
    paths = _find(name, files, root, download, verify)
    splits = []
    for images, labels, count in ((*paths[:2], n_train), (*paths[2:], n_test)):
        x, y = read_idx(images, 3), read_idx(labels, 1).astype(np.int64) - first
        if x.shape[1:] != (28, 28) or not len(x):
            raise ValueError(f"{images} has the shape {list(x.shape)}: expected [n, 28, 28] with n at least 1")
        if len(y) != len(x):
            raise ValueError(f"{labels} has {len(y)} labels: expected one for each of the {len(x)} images in "
                             f"{images.name}")
        for label in y[(y < 0) | (y >= classes)]:
            raise ValueError(f"{labels} has the label {label + first}: expected {first} to {first + classes - 1}")
        if count and count > len(x):
            raise ValueError(f"{count} images are asked for: expected at most the {len(x)} in {images}")
        x = torch.from_numpy(x[:count, None])
        x = torch.nn.functional.pad(x.mT if name == "EMNIST" else x, [(size - 28) // 2] * 4)
        splits.append((x.repeat(1, channels, 1, 1), torch.from_numpy(y[:count])))
    train, test = splits
    moments = channel_moments(train[0])
    return Split(*train, *moments, pad=pad, flip=flip), Split(*test, *moments), (channels, size, size), classes


def _find(name, files, root, download, verify):
    """Return the paths of the four files."""
    from permask_core.models.vision import torchvision  # here, because it takes a second to import

    published = getattr(torchvision.datasets, name)
    folder = data_root(root) / name / "raw"
    debian = DEBIAN / "fashion-mnist"
    if name == "FashionMNIST" and not _there(folder, files) and _there(debian, files):
        folder = debian
    known = {} if name == "EMNIST" or folder == debian else dict(published.resources)
    sums = {f"{file}.gz": known.get(f"{file}.gz") for file in files}
    for file in files:  # torchvision reads unpacked files, and keeps the published ones next to them
        if (folder / file).is_file() and not (folder / f"{file}.gz").exists():
            del sums[f"{file}.gz"]
            sums[file] = None
    source = published.url if name == "EMNIST" else published.mirrors[0]

    def fetch(to, missing):
        if name == "EMNIST":
            torchvision.datasets.utils.download_and_extract_archive(source, to, md5=published.md5)
            for file in missing:
                (to / "gzip" / file).rename(to / file)
            return
        for file in missing:
            torchvision.datasets.utils.download_url(source + file, to, file, known[file])

    package = ", or install Debian's package dataset-fashion-mnist" * (name == "FashionMNIST")
    ensure_files(name, folder, sums, download, verify, source=source, place=f"put its files in {folder}{package}",
                 fetch=fetch)
    return [next(folder / one for one in (f"{file}.gz", file) if one in sums) for file in files]


def _there(folder, files):
    return all((folder / f"{file}.gz").is_file() or (folder / file).is_file() for file in files)


def read_idx(path, dimensions):
    """Read an idx file of bytes, which may be compressed with gzip.

    Parameters
    ----------
    path : pathlib.Path
    dimensions : int
        The number of dimensions that is expected.

    Returns
    -------
    numpy.ndarray, uint8

    Raises
    ------
    ValueError
        If the file is damaged, truncated, or not such a file.
    """
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not a gzip file ({error}): delete it and load the data set with "
                         "download=True") from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < start:
        raise ValueError(f"{path} begins with the bytes {content[:4].hex(' ') or 'of nothing'}: expected 00 00 08 "
                         f"{dimensions:02}, an idx file of bytes with {dimensions} dimension{'s' * (dimensions > 1)}")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} has {len(content) - start:,} bytes after its head: expected {math.prod(shape):,} for "
                         f"the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
