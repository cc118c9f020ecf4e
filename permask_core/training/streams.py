"""The batches of a training in an order given by a seed, from any step, for one process or several.

The content of a batch depends only on the seed, the epoch and the index of the batch, so a resumed run does not depend
on previous batches.
"""

import math

import torch

from permask_core.data.batches import EXPECTED, check_data, count, parts_of, take_apart, to_device
from permask_core.data.splits import Split, mix_seed
from permask_core.training.resume import describe


def stream_of(data, batch_size, seed):
    """Return the stream of a split, of tensors (inputs, targets), or of an iterable of batches such as a DataLoader.

    Raises
    ------
    ValueError
        If the data have a different form, no length, or fewer examples than a batch.
    """
    if isinstance(data, tuple) or hasattr(data, "batches"):
        return SplitStream(as_split(data), batch_size, seed)
    if isinstance(data, torch.Tensor):
        raise ValueError(f"got inputs {list(data.shape)} without targets: {EXPECTED}")
    check_data(data)
    return LoaderStream(data, seed)


def as_split(data):
    """Return a split, which may be made from a tuple of inputs and labels; raise ValueError for other data."""
    check_data((data.x, data.y) if isinstance(data, Split) else data)
    if isinstance(data, tuple):
        return Split(*data)
    if not hasattr(data, "batches"):
        raise ValueError(f"got {type(data).__name__}: expected a split such as data.train, or a tuple of tensors "
                         "(inputs, targets), because examples are selected by index")
    return data


class SplitStream:
    """A split, shuffled in each epoch. ``steps`` is the number of batches in an epoch, ``last`` the number of examples
    in its last batch."""

    def __init__(self, split, batch_size, seed):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.steps, self.last = math.ceil(len(split) / batch_size), len(split) % batch_size or batch_size
        if len(split) < batch_size:
            raise ValueError(f"got {len(split)} images: expected at least a batch of {batch_size}")

    def to(self, device):
        return SplitStream(self.split.to(device), self.batch_size, self.seed)

    def identity(self):
        """Return the settings that determine the batches, in a form for JSON."""
        return {"seed": self.seed, "images": len(self.split),
                **{f"data.{name}": value for name, value in describe(self.split).items()}}

    def batches(self, epochs, done, device, parts, own):
        """Yield, from step ``done``, the size of each batch and those of its equal ``parts`` in the slice ``own``."""
        order = torch.Generator().manual_seed(self.seed)
        for epoch in range(epochs):
            batches = torch.randperm(len(self.split), generator=order).split(self.batch_size)
            batches = batches[max(0, done - epoch * self.steps):]
            mine = [part for batch in batches for part in batch.tensor_split(parts)[own]]
            stream = self.split.batches(mine, device, augmented=(self.seed, epoch)) if mine else None
            for batch in batches:
                yield len(batch), [next(stream) for _ in range(len(mine) // len(batches))]


class LoaderStream:
    """An iterable of batches in its own order. The global random state, the loader's generator and the epoch of its
    sampler are set from the seed, so a DataLoader with ``shuffle=True`` is reproducible."""

    def __init__(self, loader, seed):
        if not hasattr(loader, "__len__") or not len(loader):
            found = len(loader) if hasattr(loader, "__len__") else "an unknown number of"
            raise ValueError(f"got a {type(loader).__name__} of {found} batches: expected a length of at least 1, "
                             "because the learning rate depends on the number of steps")
        self.loader, self.seed, self.steps = loader, seed, len(loader)
        examples, size = getattr(loader, "dataset", ()), getattr(loader, "batch_size", None)
        whole = getattr(loader, "drop_last", True) or not size or not hasattr(examples, "__len__")
        self.last = size if whole else len(examples) % size or size  # None if unknown

    def to(self, device):
        return self

    def identity(self):
        """Return the known settings of the batches, in a form for JSON, without their content."""
        return {"seed": self.seed, "data": type(self.loader).__name__, "batches": self.steps, "last batch": self.last}

    def batches(self, epochs, done, device, parts, own):
        """Yield, from step ``done``, the size of each batch and those of its equal ``parts`` in the slice ``own``."""
        for epoch in range(done // self.steps, epochs):
            torch.manual_seed(mix_seed(self.seed, epoch))
            if isinstance(generator := getattr(self.loader, "generator", None), torch.Generator):
                generator.manual_seed(mix_seed(self.seed, epoch))
            if hasattr(sampler := getattr(self.loader, "sampler", None), "set_epoch"):
                sampler.set_epoch(epoch)
            batches = iter(self.loader)
            for i in range(self.steps):
                torch.manual_seed(mix_seed(self.seed, epoch, i))  # random numbers depend on the batch only
                batch = take_apart(next(batches))
                if batch[1] is None:
                    raise ValueError("a batch has no targets: expected inputs and targets, or a dict with labels")
                if epoch * self.steps + i >= done:
                    yield count(batch[0]), [to_device(part, device) for part in parts_of(batch, parts)[own]]


class SeveralStreams:
    """The batches of a split for several seeds; inputs and labels have an axis for the networks,
    [n, networks, ...]."""

    def __init__(self, split, batch_size, seeds):
        self.split, self.batch_size, self.seeds = split, batch_size, seeds
        self.streams = {seed: SplitStream(split, batch_size, seed) for seed in sorted({*seeds})}
        self.seed, first = seeds[0], self.streams[seeds[0]]
        self.steps, self.last = first.steps, first.last

    def to(self, device):
        return SeveralStreams(self.split.to(device), self.batch_size, self.seeds)

    def identity(self):
        return {**self.streams[self.seed].identity(), "seed": self.seeds}

    def batches(self, epochs, done, device, parts, own):
        at = torch.tensor([list(self.streams).index(seed) for seed in self.seeds], device=device)
        for several in zip(*(stream.batches(epochs, done, device, parts, own) for stream in self.streams.values())):
            yield several[0][0], [tuple(torch.stack(tensors, 1)[:, at] for tensors in zip(*part))
                                  for part in zip(*(found for _, found in several))]
