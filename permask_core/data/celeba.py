"""CelebA: 202,599 aligned faces of 178x218 pixels with 40 attributes each, in torchvision's folder.

A face's label is one of the attributes; others, such as age and gender, are what a classifier should not depend on.
They are what annotators saw in the pictures, not what the people say of themselves.

Source: Liu et al., "Deep Learning Face Attributes in the Wild", ICCV 2015. Label, protected attributes and the balanced
training set are those of Mohammadshahi and Ioannou, "What's Left After Distillation? How Knowledge Transfer Impacts
Fairness and Bias", TMLR 2025.
"""

import os

import numpy as np
import torch

from permask_core.data.attributes import attribute, check_attributes
from permask_core.data.folders import Folder, check_image_size, count_readers
from permask_core.data.imagenet import MEAN, SD
from permask_core.data.root import data_root, ensure_files, some
from permask_core.runs.checks import check_integer

ATTRIBUTES, PARTITION, IMAGES = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"
TRAIN, VALIDATION, TEST = 0, 1, 2
# The names of the 40 attributes, as the published list has them.
PUBLISHED = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
    Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones
    Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline
    Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick
    Wearing_Necklace Wearing_Necktie Young
""".split()
# Ours, of an image's area: such a crop is at least 174 pixels high and 152 wide, so that wherever it lies, the eyes
# (about 111 pixels from the top) and the mouth (152) are inside. ImageNet's 8 % would cut off many a smile.
SMALLEST = 0.8


def celeba(root=None, label="Smiling", attributes=("Young", "Male"), balanced=True, image_size=160, seed=0,
           download=False, verify=True, readers=None):
    """CelebA as a classification task of two classes: whether a face has an attribute.

    The published validation part is not used: nothing is selected on it.

    Parameters
    ----------
    root : path-like, optional
        The folder with ``celeba`` in it, and there ``img_align_celeba``, ``list_attr_celeba.txt`` and
        ``list_eval_partition.txt``: see :func:`permask_core.data.root.data_root`.
    label : str
        One of the 40 attributes: class 1 has it, class 0 has not.
    attributes : sequence of str
        Which attributes the splits carry beside the labels, with the groups "not Young" and "Young".
    balanced : bool
        Whether to leave out training images, drawn at random, until both classes have equally many. The test images
        are always all there.
    image_size : int
        Height and width of a network's input, in pixels. The centre that is tested on is 156 of an image's own pixels
        wide, of which 160 lose nothing.
    seed : int
        Of what is left out, at least 0.
    download : bool
        Whether to fetch what is missing (1.4 GB, with the package gdown).
    verify : bool
        Whether to accept the published lists only, by their md5 sums.
    readers : int, optional
        Number of processes that read images, 0 for none; by default one for each core, at most 8.

    Returns
    -------
    (Folder, Folder, tuple of int, int)
        Training and test split, the training split augmented by crops of at least 80 % of the area and by mirror
        images; the shape [3, image_size, image_size]; the number of classes, 2.

    Raises
    ------
    FileNotFoundError
        If a file or a listed image is missing.
    OSError
        If it cannot be downloaded.
    ValueError
        If an attribute is unknown or an option out of range, a list is damaged or not the published one, or a class
        has no training image.
    """
    check_image_size(image_size)
    readers = count_readers(readers)
    check_integer("seed", seed, 0)
    folder = data_root(root) / "celeba"
    _published(folder, download, verify)
    names, has = _attributes(folder / ATTRIBUTES, label, attributes)
    part = _partition(folder / PARTITION, names)
    gone = set(names) - set(os.listdir(folder / IMAGES))
    if gone:
        raise FileNotFoundError(f"{folder / IMAGES} lacks {len(gone)} of the {len(names)} images in {ATTRIBUTES}: "
                                f"{some(gone)}; unpack {IMAGES}.zip again")
    train, test = (np.flatnonzero(part == number) for number in (TRAIN, TEST))
    counts = np.bincount(has[label][train], minlength=2)
    if not counts.all() or not len(test):
        raise ValueError(f"{folder / PARTITION} has {counts[0]} training images that are not {label}, {counts[1]} that "
                         f"are, and {len(test)} test images: expected at least 1 of each")
    if balanced:
        train = _balanced(train, has[label][train], seed)
    splits = (Folder(folder / IMAGES, np.array(names)[chosen], torch.from_numpy(has[label][chosen]), image_size,
                     readers, MEAN, SD, SMALLEST,
                     {name: attribute((f"not {name}", name), torch.from_numpy(has[name][chosen]))
                      for name in attributes})
              for chosen in (train, test))
    return *splits, (3, image_size, image_size), 2


def check_files(root=None, name="celeba"):
    """See :func:`permask_core.data.check_files`."""
    _published(data_root(root) / name, download=False, verify=False)


def _published(folder, download, verify):
    from permask_core.models.vision import torchvision

    utils = torchvision.datasets.utils
    listed = {file: (number, md5) for number, md5, file in torchvision.datasets.CelebA.file_list}

    def fetch(to, missing):
        for file in (f"{IMAGES}.zip" if name == IMAGES else name for name in missing):
            number, md5 = listed[file]
            utils.download_file_from_google_drive(number, to, file, md5)
            if file == f"{IMAGES}.zip":
                utils.extract_archive(to / file)

    # torchvision asks for identities, boxes and landmarks too, which nothing here reads.
    sums = {ATTRIBUTES: listed[ATTRIBUTES][1], PARTITION: listed[PARTITION][1], IMAGES: None}
    ensure_files("CelebA", folder, sums, download, verify, fetch=fetch, place=f"put them in {folder}, unpacked",
                    source=f"{IMAGES}.zip, {ATTRIBUTES} and {PARTITION} from "
                           "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html")


def _attributes(path, label, attributes):
    """The names of the images, and whether each has the label and the attributes, 0 or 1, int64 [n] by name."""
    lines = path.read_text(errors="replace").splitlines()
    known = lines[1].split() if lines[1:] else []
    if not known or lines[0].strip() != str(len(lines) - 2):
        raise ValueError(f"{path} begins with {lines[:1]} and has {max(len(lines) - 2, 0)} lines of images: expected "
                         "their number, the names of the attributes, and as many lines")
    if label not in known:
        raise ValueError(f"label is {label!r}: expected one of {', '.join(known)}")
    check_attributes(attributes, known)
    wanted = [label, *attributes]
    names, values = _rows(path, lines, 2, 1 + len(known), [1 + known.index(name) for name in wanted],
                          {"-1": 0, "1": 1})
    return names, dict(zip(wanted, values))


def _partition(path, names):
    """The part of each image, int64 [n]."""
    listed, (part,) = _rows(path, path.read_text(errors="replace").splitlines(), 0, 2, [1],
                            {"0": TRAIN, "1": VALIDATION, "2": TEST})
    if listed != names:
        differing = set(listed) ^ set(names)
        raise ValueError(f"{path} lists {len(listed)} images, {ATTRIBUTES} {len(names)}; only in one of them: "
                         f"{some(differing)}: expected the same, in the same order")
    return part


def _rows(path, lines, first, width, columns, numbers):
    """The first column of the lines, names, and of some columns the numbers their values stand for, int64 [n] each."""
    names, values = [], []
    for number, line in enumerate(lines[first:], first + 1):
        fields = line.split()
        if len(fields) != width:
            raise ValueError(f"line {number} of {path} has {len(fields)} columns: expected {width}")
        found = [fields[column] for column in columns]
        wrong = [value for value in found if value not in numbers]
        if wrong:
            raise ValueError(f"line {number} of {path} has the value {wrong[0]!r}: expected one of "
                             f"{', '.join(numbers)}")
        names.append(fields[0])
        values.append([numbers[value] for value in found])
    return names, np.array(values, np.int64).reshape(len(names), len(columns)).T.copy()


def _balanced(chosen, labels, seed):
    """Equally many of both labels, in order: all of the rarer, and a draw of the others."""
    rng, fewest = np.random.default_rng(seed), np.bincount(labels).min()
    return np.sort(np.concatenate([rng.permutation(chosen[labels == value])[:fewest] for value in (0, 1)]))
