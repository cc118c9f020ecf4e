"""Images per second of training ResNet20 at three widths: permask's fit compared with a conventional loop.

The plain loop reads CIFAR-sized images one by one, like torchvision's CIFAR10: PIL, RandomCrop, RandomHorizontalFlip,
ToTensor and Normalize, in a shuffling DataLoader (with pinned memory and persistent workers on a GPU). Network,
batches, precision, memory format and optimizer (fused SGD) are those of fit, and it synchronises with the device only
at the end, so the difference is due to the loading of images. Loading is also measured without a network. The images
are random, which does not affect the speed.

A run is one epoch with a new optimizer, until the end of the device's work. One-time work is done before: fit's images
are on the device, and the workers of the plain loop have started. The checks and copies of weights at the end of fit
are counted. Both take turns; ratios are of medians. Run it with `python benchmarks/training.py`: on a GPU if there is
one, in float32 and bf16, after a warm-up turn, with results in results/training_cuda.json; otherwise on the CPU, on one
thread and without workers, so that each side has one core, with results in results/training.json, in five to eight
minutes. There the ratio of processor times is printed too, which barely depends on other programs. It asserts nothing.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import PIL
import torch
from _machine import at_least, command, timed, written
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from permask_core.data import Split
from permask_core.models import build_model
from permask_core.models.vision import torchvision
from permask_core.runs.processes import default_device
from permask_core.runs.store import commit, device_name, versions
from permask_core.training.loop import fit
from permask_core.training.recipe import OPTIMIZERS, PRECISIONS, Recipe

CLASSES, SIDE = 10, 32
LOADERS = "loaders alone"
# Images of a run by width of the network; a step of the widest takes many seconds on one CPU core.
IMAGES = {"cpu": {LOADERS: 2560, 1: 512, 4: 128, 8: 128}, "cuda": {LOADERS: 50_000, 1: 50_000, 4: 25_000, 8: 12_500}}


def random_split(n):
    """Return random images like CIFAR-10's training split: uint8, standardised, cropped with a padding of 4,
    mirrored."""
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(256, (n, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
                 torch.randint(CLASSES, (n,), generator=generator), (0.5,) * 3, (0.25,) * 3, pad=4, flip=True)


class PlainImages(Dataset):
    """The images of a split, one by one through PIL."""

    def __init__(self, split):
        self.x, self.y = split.x.permute(0, 2, 3, 1).contiguous().numpy(), split.y.tolist()
        do = torchvision.transforms
        self.transform = do.Compose([do.RandomCrop(split.x.shape[-1], padding=split.pad), do.RandomHorizontalFlip(),
                                     do.ToTensor(), do.Normalize(split.mean, split.sd)])

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.x[index])), self.y[index]


def plain_loader(split, batch_size, readers, device):
    return DataLoader(PlainImages(split), batch_size, shuffle=True, num_workers=readers,
                      persistent_workers=readers > 0, pin_memory=device.type == "cuda")


def on_device(loader, device):
    """Yield the batches of a DataLoader, copied while the device works."""
    for x, y in loader:
        yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def plain_loop(model, loader, recipe, device):
    """Train for one epoch."""
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), recipe)
    for x, y in on_device(loader, device):
        with torch.autocast(device.type, PRECISIONS[recipe.precision], enabled=recipe.precision != "float32"):
            loss = F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def loaders(n, recipe, readers, device):
    """Return both loaders of an epoch's batches, each as a function that runs once."""
    split = random_split(n)
    there, loader = split.to(device), plain_loader(split, recipe.batch_size, readers, device)

    def batches():
        order = torch.randperm(n).split(recipe.batch_size)
        for _ in there.batches(order, device, augmented=(0, 0)):
            pass

    def plain():
        for _ in on_device(loader, device):
            pass

    return {"permask": batches, "plain": plain}


def trainings(width, n, recipe, readers, device):
    """Return both training loops of an epoch, each as a function that runs once."""
    split = random_split(n)
    there, loader = split.to(device), plain_loader(split, recipe.batch_size, readers, device)
    ours, theirs = (build_model("resnet20", (3, SIDE, SIDE), CLASSES, width=width, seed=0) for _ in range(2))
    return {"permask": lambda: fit(ours, there, recipe, seed=0, device=device, description=None),
            "plain": lambda: plain_loop(theirs, loader, recipe, device)}


def compared(sides, n, rounds, device, alone):
    """Return the seconds of every run of n images, medians of images per second, and their ratio; if this process does
    all of the work (``alone``), also the ratio of processor times."""
    if not alone:
        for run in sides.values():  # loads kernels, starts workers
            run()
    seconds, busy = ({side: [] for side in sides} for _ in range(2))
    for _ in range(rounds):
        for side, run in sides.items():
            start = time.process_time()
            seconds[side].append(timed(run, device)[0])
            busy[side].append(time.process_time() - start)
    median, processor = ({side: statistics.median(times) for side, times in clock.items()} for clock in (seconds, busy))
    row = {"images": n, "seconds": seconds, "images_per_second": {side: n / median[side] for side in sides},
           "ratio": median["plain"] / median["permask"]}
    if alone:
        row |= {"processor_seconds": busy, "processor_ratio": processor["plain"] / processor["permask"]}
    return row


def print_row(row):
    by_round = [plain / ours for ours, plain in zip(row["seconds"]["permask"], row["seconds"]["plain"])]
    permask, plain = (f"{speed:,.1f}" for speed in row["images_per_second"].values())
    print(f"{row['part']:16}{row['precision']:10}{row['images']:>8,}{permask:>12}{plain:>12}{row['ratio']:>8.2f}"
          f"  ({min(by_round):.2f} to {max(by_round):.2f})"
          + (f"{row['processor_ratio']:>12.2f}" if "processor_ratio" in row else ""), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=5, help="how often each side runs")
    parser.add_argument("--threads", type=at_least(1), default=1, help="of the main process on the CPU")
    parser.add_argument("--readers", type=at_least(0), help="the DataLoader's workers; by default 0, 8 with a GPU")
    parser.add_argument("--device", choices=list(IMAGES), default=torch.device(default_device()).type)
    parser.add_argument("--quick", action="store_true", help="batches of 2, to check that everything runs")
    parser.add_argument("--result", type=Path, help="path of the JSON file")
    given = parser.parse_args(argv)
    device, on_gpu = torch.device(given.device), given.device == "cuda"
    readers = (min(8, os.cpu_count()) if on_gpu else 0) if given.readers is None else given.readers
    alone = not on_gpu and readers == 0
    batch_size = 2 if given.quick else 128
    images = {part: batch_size if given.quick else n for part, n in IMAGES[given.device].items()}
    torch.set_num_threads(given.threads)
    record = {"command": command("training", argv), "commit": commit(),
              "device": device_name(device), "machine": device_name("cpu"), "threads": given.threads,
              "readers": readers, "batch_size": batch_size, "rounds": given.rounds,
              "tf32_convolutions": on_gpu and torch.backends.cudnn.allow_tf32,
              "versions": versions() | {"pillow": PIL.__version__}, "rows": []}
    print(", ".join(f"{name} {record[name]}" for name in list(record)[:-2]))
    print(", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    print(f"\n{'images per second':26}{'images':>8}{'permask':>12}{'plain loop':>12}{'ratio':>8}  (by round)"
          + (f"{'processor':>16}" if alone else ""))

    def add(part, precision, sides, n):
        row = {"part": part, "precision": precision, **compared(sides, n, given.rounds, device, alone)}
        record["rows"].append(row)
        print_row(row)

    n = images.pop(LOADERS)
    add(LOADERS, "float32", loaders(n, Recipe(batch_size=batch_size), readers, device), n)
    for width, n in images.items():
        for precision in PRECISIONS if on_gpu else ["float32"]:
            # A small learning rate, because labels are random.
            recipe = Recipe(1, lr=0.01, batch_size=batch_size, precision=precision)
            add(f"resnet20 x {width}", precision, trainings(width, n, recipe, readers, device), n)
    name = f"training{'_cuda' if on_gpu else ''}.json"
    written(given.result or Path(__file__).parent / "results" / name, record)


if __name__ == "__main__":
    main()
