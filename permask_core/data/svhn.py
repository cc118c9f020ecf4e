"""SVHN: 73,257 training and 26,032 test images of 32x32 pixels, the digits of house numbers, from torchvision's files.

The third published part, 531,131 easier images, is not used.

Source: Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", NIPS Workshop on Deep
Learning and Unsupervised Feature Learning, 2011.
"""

import numpy as np
import torch
from scipy.io import loadmat

from permask_core.data.root import data_root, ensure_files
from permask_core.data.splits import Split, channel_moments


def svhn(root=None, download=False, verify=True):
    """SVHN: the digits 0 to 9, often with parts of the neighbouring digits. A label is the digit itself.

    Parameters
    ----------
    root : path-like, optional
        The folder that contains ``svhn`` with ``train_32x32.mat`` and ``test_32x32.mat``: see
        :func:`permask_core.data.root.data_root`.
    download : bool
        Whether to download missing files (246 MB).
    verify : bool
        Whether to require the md5 sums of the published files.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split of uint8 images, standardised by the channels of the training images (the training split
        is augmented by crops with a padding of 4 black pixels, but not by mirror images, which would change digits);
        the shape [3, 32, 32]; the number of classes.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    OSError
        If the download fails.
    ValueError
        If a file is damaged, is not the published one, or does not hold images and labels.
    """
    files = _published(data_root(root) / "svhn", download, verify)
    train, test = (_images(file) for file in files)
    mean, sd = channel_moments(train[0])
    return Split(*train, mean, sd, pad=4), Split(*test, mean, sd), (3, 32, 32), 10


def check_files(root=None, name="svhn"):
    """See :func:`permask_core.data.check_files`."""
    _published(data_root(root) / name, download=False, verify=False)


def _published(folder, download, verify):
    """Return the paths of the two files."""
    from permask_core.models.vision import torchvision  # here, because it takes a second to import

    parts = torchvision.datasets.SVHN.split_list
    published = {file: (url, md5) for url, file, md5 in (parts["train"], parts["test"])}

    def fetch(to, missing):
        for file in missing:
            url, md5 = published[file]
            torchvision.datasets.utils.download_url(url, to, file, md5)

    ensure_files("SVHN", folder, {file: md5 for file, (_, md5) in published.items()}, download, verify,
                    source=" and ".join(url for url, _ in published.values()), place=f"put it in {folder}", fetch=fetch)
    return [folder / file for file in published]


def _images(path):
    """Return the images of a file as uint8 [n, 3, 32, 32], and their labels as int64 [n]."""
    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is damaged or not a MATLAB file ({error}): delete it and load the data set with "
                         "download=True") from error
    images, labels = (np.asarray(content.get(name)) for name in ("X", "y"))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3) or not images.size:
        raise ValueError(f"'X' in {path} is {images.dtype} {list(images.shape)}: expected uint8 [32, 32, 3, n] with "
                         "n at least 1")
    if labels.dtype.kind not in "iuf" or labels.size != images.shape[3]:
        raise ValueError(f"'y' in {path} is {labels.dtype} {list(labels.shape)}: expected one number for each of the "
                         f"{images.shape[3]} images")
    labels = labels.flatten()
    wrong = labels[~np.isin(labels, np.arange(1, 11))]
    if wrong.size:
        raise ValueError(f"'y' in {path} has the label {wrong[0]}: expected 1 to 10, where 10 is the digit 0")
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return images, torch.from_numpy(labels.astype(np.int64) % 10)
