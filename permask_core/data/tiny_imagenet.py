"""Tiny ImageNet: 100,000 training and 10,000 validation images of 64x64 pixels, 200 of ImageNet's classes.

The published test images have no labels, so the validation images are the test set. All images are in memory, 1.35 GB.

Source: Le and Yang, "Tiny ImageNet Visual Recognition Challenge", Stanford CS 231N, 2015.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from permask_core.data.folders import count_readers, open_image
from permask_core.data.root import check_there, data_root, some
from permask_core.data.splits import Split, channel_moments
from permask_core.runs.progress import progress

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
SIDE, CHUNK = 64, 200  # in pixels; images that a thread reads at a time


def tiny_imagenet(root=None):
    """Tiny ImageNet. In both splits, labels are indices of the sorted WordNet identifiers.

    Parameters
    ----------
    root : path-like, optional
        The folder that contains ``tiny-imagenet-200``: see :func:`permask_core.data.root.data_root`.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and validation split of uint8 images, standardised by the channels of the training images, grey images
        included (the training split is augmented by crops with a padding of 8 black pixels and by mirror images); the
        shape [3, 64, 64]; the number of classes.

    Raises
    ------
    FileNotFoundError
        If a file or a folder is missing.
    ValueError
        If a list or an image is damaged, or the lists and the folders have different classes or images.
    """
    folder = check_files(root)
    classes = _classes(folder)
    listed = _training(folder / "train", classes), _validation(folder / "val", classes)
    train, test = (_split(names, labels, f"Tiny ImageNet, {kind}")
                   for kind, (names, labels) in zip(("training", "validation"), listed))
    mean, sd = channel_moments(train[0])
    return Split(*train, mean, sd, pad=8, flip=True), Split(*test, mean, sd), (3, SIDE, SIDE), len(classes)


def check_files(root=None, name="tiny_imagenet"):
    """See :func:`permask_core.data.check_files`; returns the folder."""
    folder = data_root(root) / "tiny-imagenet-200"
    check_there("Tiny ImageNet", folder, ["wnids.txt", "train", "val/images", "val/val_annotations.txt"],
                f"Download {URL} and unpack it in {folder.parent} (its md5 sum is not published, so it is not "
                "downloaded automatically)")
    return folder


def _classes(folder):
    """Return the index of each class by its name."""
    listed = (folder / "wnids.txt").read_text(errors="replace").split()
    there = set(os.listdir(folder / "train"))
    if set(listed) != there or len(listed) != len(there) or not listed:
        raise ValueError(f"{folder / 'wnids.txt'} lists {len(listed)} classes, and train has {len(there)}; only "
                         f"listed: {some(set(listed) - there)}; only in train: {some(there - set(listed))}: expected "
                         "the same classes, each once")
    return {name: number for number, name in enumerate(sorted(listed))}


def _training(folder, classes):
    """Return the paths of the training images, class by class, and their labels."""
    files = {name: sorted((folder / name / "images").glob("*.JPEG")) for name in classes}
    empty = [name for name, found in files.items() if not found]
    if empty:
        raise FileNotFoundError(f"{folder}/<class>/images has no file *.JPEG of the classes {some(empty)}: unpack the "
                                "archive again")
    return ([path for found in files.values() for path in found],
            [classes[name] for name, found in files.items() for _ in found])


def _validation(folder, classes):
    """Return the paths of the validation images in the order of their list, and their labels."""
    path = folder / "val_annotations.txt"
    rows = [line.split("\t") for line in path.read_text(errors="replace").splitlines()]
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[1] not in classes:  # image, class, and the corners of a box, which are not used
            raise ValueError(f"line {number} of {path} is {row}: expected six columns, the second with one of "
                             f"the {len(classes)} classes in wnids.txt")
    listed, there = {row[0] for row in rows}, set(os.listdir(folder / "images"))
    if listed != there or len(listed) != len(rows) or not rows:
        raise ValueError(f"{path} lists {len(rows)} images, and {folder / 'images'} has {len(there)}; only listed: "
                         f"{some(listed - there)}; only there: {some(there - listed)}: expected the same "
                         "images, each once")
    return [folder / "images" / row[0] for row in rows], [classes[row[1]] for row in rows]


def _split(paths, labels, description):
    """Read images with several threads; return them as uint8 [n, 3, 64, 64], and their labels as int64 [n]."""
    images = np.empty((len(paths), 3, SIDE, SIDE), np.uint8)

    def read(first):
        for i, path in enumerate(paths[first:first + CHUNK], first):
            image = open_image(path)
            if image.size != (SIDE, SIDE):
                raise ValueError(f"{path} is {image.width}x{image.height}: expected {SIDE}x{SIDE} pixels")
            images[i] = np.asarray(image).transpose(2, 0, 1)

    parts = range(0, len(paths), CHUNK)
    with ThreadPoolExecutor(count_readers()) as pool:  # PIL releases Python's lock while it decodes
        for _ in progress(pool.map(read, parts), description, total=len(parts)):
            pass
    return torch.from_numpy(images), torch.tensor(labels)
