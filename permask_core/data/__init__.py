"""Data sets by name, each as tensors in one form."""

import inspect
from typing import NamedTuple

import torch

from permask_core.data.digits import digits


class Split(NamedTuple):
    """Inputs ``x`` [n, channels, height, width], float32, and labels ``y`` [n], int64."""

    x: torch.Tensor
    y: torch.Tensor


class Dataset(NamedTuple):
    """A data set: its ``name``, ``train`` and ``test`` splits, the shape of one input, and the number of classes."""

    name: str
    train: Split
    test: Split
    input_shape: tuple[int, int, int]
    classes: int


DATASETS = {"digits": digits}


def load_dataset(name, **options):
    """A data set as tensors, standardised.

    Parameters
    ----------
    name : {"digits"}
    **options
        What the data set itself takes: ``seed`` of the split and ``test_size`` (digits).

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        If the name or an option is unknown, or an option is out of range.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}: expected one of {', '.join(DATASETS)}")
    known = list(inspect.signature(DATASETS[name]).parameters)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}: expected one of {', '.join(known)}")
    x_train, y_train, x_test, y_test, classes = DATASETS[name](**options)
    return Dataset(name, Split(x_train, y_train), Split(x_test, y_test), tuple(x_train.shape[1:]), classes)
