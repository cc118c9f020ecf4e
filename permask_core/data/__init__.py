"""Data sets by name, in one form: two splits that yield batches, the shape of an input, the number of classes."""

import inspect
from importlib import import_module
from typing import NamedTuple

from permask_core.data.folders import Folder
from permask_core.data.splits import Split

__all__ = ["DATASETS", "Dataset", "check_files", "check_options", "load_dataset", "options_of"]


class Dataset(NamedTuple):
    """A data set: its ``name``, ``train`` and ``test`` splits, the shape of one input (channels, height and width
    of an image, or the length of a text), and the number of ``classes``."""

    name: str
    train: Split | Folder
    test: Split | Folder
    input_shape: tuple[int, ...]
    classes: int


# Name -> the module that has a function of that name, which is loaded by name: stored results depend on the content of
# the data, not on the code that reads them.
DATASETS = {"digits": "digits", "trifeature": "trifeature", "mnist": "mnist", "fashion_mnist": "mnist",
            "kmnist": "mnist", "emnist": "mnist", "cifar10": "cifar", "cifar100": "cifar", "imagenet": "imagenet",
            "svhn": "svhn", "tiny_imagenet": "tiny_imagenet", "celeba": "celeba", "hatexplain": "hatexplain",
            "python_source": "python_source", "skills": "skills"}


def load_dataset(name, **options):
    """Load a data set.

    Parameters
    ----------
    name : str
        "digits", "trifeature", "mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "cifar100", "imagenet", "svhn",
        "tiny_imagenet", "celeba", "hatexplain", "python_source" or "skills".
    **options
        Options of the data set: see the function of that name below.

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        If the name or an option is unknown, an option is out of range, or a file is damaged.
    FileNotFoundError
        If files of the data set are missing; the message says where they are expected and how to get them.
    ImportError
        If a data set needs a package that is not installed.
    """
    check_options(name, options)
    train, test, input_shape, classes = _reader(name)(**options)
    return Dataset(name, train, test, input_shape, classes)


def check_options(name, options):
    """Raise ValueError unless there is a data set of that name with these options."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}")
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: expected one of {', '.join(known)}")


def options_of(name):
    """Return the names of the options of a data set."""
    return list(inspect.signature(_reader(name)).parameters)


def check_files(name, root=None):
    """Raise FileNotFoundError, which says how to get them, if files of a data set are missing below ``root`` (by
    default the folder where :func:`load_dataset` expects them). The files are not read."""
    check_options(name, {})
    module = import_module(f"{__name__}.{DATASETS[name]}")
    if hasattr(module, "check_files"):
        module.check_files(root, name)


def _reader(name):
    return getattr(import_module(f"{__name__}.{DATASETS[name]}"), name)
