"""Images on disk: a split whose batches are read, decoded with PIL and cropped by worker processes.

Each call of ``batches`` starts new workers. Persistent workers would have to be sent each new seed and epoch, and a
split could not be sent to other processes. Starting workers takes a fraction of a second; an epoch of a data set too
large for memory takes minutes.
"""

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from permask_core.data.attributes import Attribute
from permask_core.data.splits import mix_seed, standardise
from permask_core.runs.checks import check_integer


@dataclass(frozen=True, eq=False)
class Folder:
    """Image files below ``root``: their relative ``names`` [n] and their labels ``y`` [n], int64.

    Batches are like those of :class:`~permask_core.data.splits.Split`, with images of ``image_size`` x ``image_size``
    pixels, standardised by ``mean`` and ``sd`` of each channel. Augmented, an image is a crop with at least the
    fraction ``smallest`` of the area and an aspect ratio of 3:4 to 4:3, resized, and mirrored with probability 1/2;
    otherwise it is the centre crop, 224/256 of the shorter side. ``readers`` processes read ahead; with 0 this process
    reads. ``attributes`` are as in Split.
    """

    root: Path
    names: np.ndarray  # of str: workers share the memory of an array, but reference counts make them copy a list
    y: torch.Tensor
    image_size: int
    readers: int
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    smallest: float = 0.08  # the fraction in the usual recipes for ImageNet
    attributes: dict[str, Attribute] = field(default_factory=dict)
    augments = True  # whether an augmented image differs from the plain one

    def __len__(self):
        return len(self.y)

    @functools.cached_property
    def sizes(self):
        """Return the size of each file in bytes, int64 [n]."""
        return np.array([os.path.getsize(self.root / name) for name in self.names])

    def to(self, device):
        """Return the split itself, because its images are on disk."""
        return self

    def batches(self, indices, device="cpu", augmented=None):
        """Yield batches of some images: see :meth:`permask_core.data.splits.Split.batches`.

        Raises
        ------
        ValueError
            If a file is not a readable image.
        """
        device = torch.device(device)
        indices = [chosen.cpu() for chosen in indices]
        loader = torch.utils.data.DataLoader(
            _Pictures(self, augmented), batch_sampler=[chosen.tolist() for chosen in indices],
            num_workers=self.readers, pin_memory=device.type == "cuda",
            generator=torch.Generator())  # so that the global generator does not change
        for chosen, x in zip(indices, loader):
            yield standardise(x.to(device, non_blocking=True), self.mean, self.sd), self.y[chosen].to(device)


@dataclass(frozen=True)
class _Pictures(torch.utils.data.Dataset):
    """The images of a split in one epoch, by index: uint8 [3, image_size, image_size]."""

    split: Folder
    augmented: tuple[int, int] | None

    def __getitem__(self, index):
        image = open_image(self.split.root / self.split.names[index])
        moved, plain = _transforms(self.split.image_size, self.split.smallest)
        if self.augmented is None:
            return plain(image)
        # torchvision's transforms draw from torch's global generator. Only that of the CPU is seeded and restored:
        # torch.manual_seed would also seed those of the GPUs, on which dropout may depend.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(*self.augmented, index))
            return moved(image)


def open_image(path):
    """Open an image file of any format as a PIL image in RGB.

    Raises
    ------
    ValueError
        If the file is not a readable image.
    """
    from permask_core.models.vision import torchvision

    try:
        return torchvision.datasets.folder.pil_loader(path)
    except Exception as error:  # the decoders of PIL raise various exceptions
        raise ValueError(f"{path} is not a readable image ({error}): replace or delete it") from error


def check_image_size(image_size):
    """Raise ValueError unless ``image_size`` is an integer of at least 1."""
    check_integer("image_size", image_size, 1)


def count_readers(readers=None):
    """Return the number of processes or threads that read images: ``readers``, or by default one for each core, at most
    8.

    Raises
    ------
    ValueError
        If ``readers`` is not an integer of at least 0.
    """
    if readers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        readers = min(8, cores)
    check_integer("readers", readers, 0)
    return readers


@functools.cache
def _transforms(image_size, smallest):
    """Return the transforms of a PIL image to uint8, with and without augmentation.

    They are made where they are used, because unpickling them in a new process would import torchvision directly.
    """
    from permask_core.models.vision import torchvision

    made = torchvision.transforms
    moved = [made.RandomResizedCrop(image_size, scale=(smallest, 1)), made.RandomHorizontalFlip()]
    plain = [made.Resize(round(image_size * 256 / 224)), made.CenterCrop(image_size)]
    return tuple(made.Compose([*steps, made.PILToTensor()]) for steps in (moved, plain))
