"""CelebA: 202,599 aligned faces of 178x218 pixels with 40 attributes each, in torchvision's folder layout.

The label of a face is one of the attributes. A classifier should not depend on others, such as age and gender.
Annotators assigned all attributes from the pictures; the people themselves were not asked.

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
# The names of the 40 attributes in the published list.
PUBLISHED = """
    5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
    Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones
    Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline
    Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick
    Wearing_Necklace Wearing_Necktie Young
""".split()
# Our choice, as a fraction of the image's area: such a crop is at least 174 pixels high and 152 wide and therefore
# always contains the eyes (about 111 pixels from the top) and the mouth (152). ImageNet's 8 % would cut off many
# smiles.
SMALLEST = 0.8


def celeba(root=None, label="Smiling", attributes=("Young", "Male"), balanced=True, image_size=160, seed=0,
           download=False, verify=True, readers=None):
    """CelebA as a classification task of two classes: whether a face has an attribute.

    The published validation part is not used, because no hyperparameter is selected.

    Parameters
    ----------
    root : path-like, optional
        The folder that contains ``celeba`` with ``img_align_celeba``, ``list_attr_celeba.txt`` and
        ``list_eval_partition.txt``: see :func:`permask_core.data.root.data_root`.
    label : str
        One of the 40 attributes; images of class 1 have it.
    attributes : sequence of str
        Attributes of the splits, each with two groups such as "not Young" and "Young".
    balanced : bool
        Whether to exclude training images at random until both classes are equally large. All test images are always
        used.
    image_size : int
        Height and width of a network's input, in pixels. The centre crop of test images is 156 original pixels wide, so
        160 loses no resolution.
    seed : int
        Seed of the random exclusion, at least 0.
    download : bool
        Whether to download missing files (1.4 GB, with the package gdown).
    verify : bool
        Whether to require the md5 sums of the published lists.
    readers : int, optional
        Number of processes that read images; 0 reads in this process. The default is one for each core, at most 8.

    Returns
    -------
    (Folder, Folder, tuple of int, int)
        Training and test split (the training split is augmented by crops of at least 80 % of the area and by mirror
        images); the shape [3, image_size, image_size]; the number of classes, 2.

    Raises
    ------
    FileNotFoundError
        If a file or a listed image is missing.
    OSError
        If the download fails.
    ValueError
        If an attribute is unknown, an option is out of range, a list is damaged or is not the published one, or a class
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
        raise FileNotFoundError(f"{len(gone)} of the {len(names)} images in {ATTRIBUTES} are not in {folder / IMAGES}: "
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

    # torchvision also requires identities, boxes and landmarks, which are not used here.
    sums = {ATTRIBUTES: listed[ATTRIBUTES][1], PARTITION: listed[PARTITION][1], IMAGES: None}
    ensure_files("CelebA", folder, sums, download, verify, fetch=fetch, place=f"put them in {folder}, unpacked",
                    source=f"{IMAGES}.zip, {ATTRIBUTES} and {PARTITION} from "
                           "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html")


def _attributes(path, label, attributes):
    """Return the names of the images, and by attribute whether each image has it: 0 or 1, int64 [n]."""
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
    """Return the part (training, validation or test) of each image, int64 [n]."""
    listed, (part,) = _rows(path, path.read_text(errors="replace").splitlines(), 0, 2, [1],
                            {"0": TRAIN, "1": VALIDATION, "2": TEST})
    if listed != names:
        differing = set(listed) ^ set(names)
        raise ValueError(f"{path} lists {len(listed)} images, {ATTRIBUTES} {len(names)}; in only one of them: "
                         f"{some(differing)}: expected the same images in the same order")
    return part


def _rows(path, lines, first, width, columns, numbers):
    """Return the first column of the lines, which has names, and the chosen ``columns`` as numbers, int64 [n] each."""
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
    """Return equally many of both labels, in order: all of the rarer, and a random choice of the more frequent."""
    rng, fewest = np.random.default_rng(seed), np.bincount(labels).min()
    return np.sort(np.concatenate([rng.permutation(chosen[labels == value])[:fewest] for value in (0, 1)]))
