"""ImageNet (ILSVRC 2012): 1.28 million training and 50,000 validation images of 1,000 classes in torchvision's layout.

The images cannot be downloaded without an account. If the folder has the published archives but not the images,
torchvision verifies and unpacks the archives.

Source: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 115, 2015.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from permask_core.data.folders import Folder, check_image_size, count_readers
from permask_core.data.root import data_root, some

# Of the channels of the training images, in units of 255; torchvision's published models use these values.
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet(root=None, image_size=224, readers=None):
    """ImageNet, or any data set in folders ``train/<class>`` and ``val/<class>``; labels are indices of the sorted
    classes.

    Parameters
    ----------
    root : path-like, optional
        The folder that contains ``train`` and ``val``; by default ``imagenet`` in
        :func:`permask_core.data.root.data_root`.
    image_size : int
        Height and width of a network's input, in pixels.
    readers : int, optional
        Number of processes that read images; 0 reads in this process. The default is one for each core, at most 8.

    Returns
    -------
    (Folder, Folder, tuple of int, int)
        Training and validation split; the shape [3, image_size, image_size]; the number of classes.

    Raises
    ------
    FileNotFoundError
        If a folder and its archive are missing, or a class has no images.
    RuntimeError
        If an archive is not the published one.
    ValueError
        If the two folders have different classes, a class is not in ``meta.bin`` (if that file exists), or an argument
        is out of range.
    """
    check_image_size(image_size)
    readers = count_readers(readers)
    root = _root(root)
    _unpack(root)
    classes = _classes(root)
    splits = (Folder(root / name, *_files(root / name, classes), image_size, readers, MEAN, SD)
              for name in ("train", "val"))
    return *splits, (3, image_size, image_size), len(classes)


def _root(root):
    return Path(root).expanduser().absolute() if root else data_root() / "imagenet"


def check_files(root=None, name="imagenet"):
    """See :func:`permask_core.data.check_files`."""
    _missing(_root(root))


def _missing(root):
    """Return the names of the missing folders, and the archives by name of the folder."""
    from permask_core.models.vision import torchvision

    known = torchvision.datasets.imagenet
    archives = {name: root / file for name, (file, _) in known.ARCHIVE_META.items()}
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if any(not archives[name].is_file() for name in missing):
        raise FileNotFoundError(
            f"ImageNet is not in {root}: expected train/<class>/*.JPEG and val/<class>/*.JPEG; missing: "
            f"{', '.join(missing)}. Download {', '.join(path.name for path in archives.values())} from "
            f"https://image-net.org (with an account) into {root}, where they are unpacked; or pass another folder as "
            "root, or set the environment variable PERMASK_DATA to the folder that contains imagenet")
    return missing


def _unpack(root):
    """Let torchvision unpack the archives of the missing folders."""
    from permask_core.models.vision import torchvision

    known, missing = torchvision.datasets.imagenet, _missing(root)
    if "val" in missing and not (root / known.META_FILE).is_file():
        known.parse_devkit_archive(root)  # has the class of each validation image
    for name, parse in (("train", known.parse_train_archive), ("val", known.parse_val_archive)):
        if name in missing:
            # Unpacked under a temporary name: after an interruption, a rerun would take a part of the images for all.
            unfinished = root / f".{name}.unpacking"
            shutil.rmtree(unfinished, ignore_errors=True)
            parse(root, folder=unfinished.name)
            unfinished.rename(root / name)


def _classes(root):
    """Return the sorted names of the classes, which must be the same in both folders."""
    from permask_core.models.vision import torchvision

    train, val = ({entry.name for entry in os.scandir(root / name) if entry.is_dir()} for name in ("train", "val"))
    if train != val or not train:
        raise ValueError(f"{root} has {len(train)} classes in train and {len(val)} in val; only in train: "
                         f"{some(train - val)}; only in val: {some(val - train)}: expected the same classes, at "
                         "least one")
    meta = root / torchvision.datasets.imagenet.META_FILE
    if meta.is_file():
        try:
            known = set(torchvision.datasets.imagenet.load_meta_file(root)[0])
        except Exception as error:  # torch.load raises various exceptions
            raise ValueError(f"{meta} is damaged ({error}): delete it") from error
        if not train <= known:
            raise ValueError(f"{meta} does not have {some(train - known)}: expected names of ImageNet's classes, such "
                             "as n01440764")
    return sorted(train)


def _files(folder, classes):
    """Return the names of the image files relative to the folder, class by class, and their labels."""
    from permask_core.models.vision import torchvision

    known = torchvision.datasets.folder
    numbers = {name: number for number, name in enumerate(classes)}
    try:
        files = known.make_dataset(folder, numbers, known.IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}") from error
    names = np.array([path[len(str(folder)) + 1:] for path, _ in files])
    return names, torch.tensor([label for _, label in files])
