"""The two splits of a data set, which yield the batches for training and evaluation.

Batches are on the training device, standardised, and augmented if requested. The augmentation of an image is a function
of the seed, the epoch and the index of the image, not of its batch: neither the number of processes nor a restart
within an epoch changes it.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from permask_core.data.attributes import Attribute


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs in memory, ``x``, and labels ``y`` [n], int64; of texts also [n, length]. Images are [n, channels, height,
    width], float32 or uint8; texts are token ids [n, length], int64, and are not standardised.

    uint8 images are divided by 255 and then standardised by ``mean`` and ``sd`` of each channel, if given. ``pad`` and
    ``flip`` are the augmentation: crops of the original size after a padding of ``pad`` black pixels, and mirror images
    with probability 1/2. ``attributes``, by name, are further properties of each input, which training does not use.
    """

    x: torch.Tensor
    y: torch.Tensor
    mean: tuple[float, ...] = ()
    sd: tuple[float, ...] = ()
    pad: int = 0
    flip: bool = False
    attributes: dict[str, Attribute] = field(default_factory=dict)

    def __len__(self):
        return len(self.y)

    @property
    def augments(self):
        """Whether an augmented image differs from the plain one."""
        return self.pad > 0 or self.flip

    def to(self, device):
        """Return the split with its images and labels on a device."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    def batches(self, indices, device="cpu", augmented=None):
        """Yield batches of some images.

        Parameters
        ----------
        indices : iterable of torch.Tensor
            Indices of the images in each batch, int64.
        device : torch.device or str
            Device of the batches; they are computed on the device of the images.
        augmented : (int, int), optional
            Seed and epoch of the augmentation; without it, images are not augmented.

        Yields
        ------
        (torch.Tensor, torch.Tensor)
            Inputs, float32 (int64 for tokens), and labels.
        """
        moving = augmented is not None and self.augments
        if moving:
            corners, mirrored = (draw.to(self.x.device) for draw in self._draws(*augmented))
        indices = list(indices)
        everything = torch.cat(indices).to(self.x.device)  # in one transfer: one for each batch would make a GPU wait
        for chosen in everything.split([len(chosen) for chosen in indices]):
            x = self.x[chosen]
            if moving:
                x = crop(x, self.pad, corners[chosen], mirrored[chosen])
            yield standardise(x.to(device), self.mean, self.sd), self.y[chosen].to(device)

    def _draws(self, seed, epoch):
        generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
        corners = torch.randint(0, 2 * self.pad + 1, (len(self), 2), generator=generator)
        mirrored = torch.rand(len(self), generator=generator) < 0.5
        return corners, mirrored if self.flip else torch.zeros_like(mirrored)


def crop(x, pad, corners, mirrored):
    """Crop all images at once, to their original size.

    Parameters
    ----------
    x : torch.Tensor
        [n, channels, height, width].
    pad : int
        Number of zeros on each side of an image.
    corners : torch.Tensor
        int64 [n, 2]: row and column of the first pixel of each crop in the padded image, 0 to 2 ``pad``.
    mirrored : torch.Tensor
        bool [n]: whether the crop is flipped left to right.
    """
    n, channels, height, width = x.shape
    rows = corners[:, :1] + torch.arange(height, device=x.device)
    across = torch.arange(width, device=x.device)
    columns = corners[:, 1:] + torch.where(mirrored[:, None], across.flip(0), across)
    padded = torch.nn.functional.pad(x, [pad] * 4)
    image, channel = torch.arange(n, device=x.device), torch.arange(channels, device=x.device)
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def standardise(x, mean, sd):
    """Convert uint8 images to float32 in [0, 1]; then, if given, subtract the mean of each channel and divide by its
    deviation."""
    if x.dtype == torch.uint8:
        x = x.float().div_(255)
    if not mean:
        return x
    mean, sd = (_per_channel(values, x.dtype, x.device) for values in (mean, sd))
    return (x - mean) / sd


@lru_cache(maxsize=16)
def _per_channel(values, dtype, device):  # cached, because a GPU would wait for every new tensor
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def channel_moments(x):
    """Return mean and deviation of each channel of uint8 images [n, channels, height, width], in units of 255: two
    tuples.

    Raises
    ------
    ValueError
        If a channel has only one value and therefore cannot be standardised.
    """
    # Computed from the counts of each value: exact, and small for any number of images.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in x.transpose(0, 1)]).double()
    values, pixels = torch.arange(256).double() / 255, counts[0].sum()
    mean = (counts * values).sum(1) / pixels
    sd = ((counts * (values - mean[:, None]) ** 2).sum(1) / pixels).sqrt()
    if not sd.all():
        raise ValueError(f"the deviations of the images' channels are {sd.tolist()}: expected numbers above 0")
    return tuple(mean.tolist()), tuple(sd.tolist())


def in_order(split, batch_size):
    """Return the indices of all images of a split in order, in batches."""
    return torch.arange(len(split)).split(batch_size)


def mix_seed(*parts):
    """Combine several integers of at least 0, such as a seed, an epoch and an index, into one seed of 63 bits."""
    # The number of parts is included, because SeedSequence gives the same for (3, 4) and (3, 4, 0).
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1, np.uint64)[0] >> np.uint64(1))
