"""Tiny data sets on disk, in the formats of CIFAR's and ImageNet's published files, of images that can be learned."""

import io
import pickle

import numpy as np
import torch
from PIL import Image


def write_cifar(root, name, n_train=100, n_test=50, seed=0):
    """Write CIFAR files as Python 2 pickled them: ``cifar-10-batches-py`` or ``cifar-100-python`` below ``root``.

    Parameters
    ----------
    root : pathlib.Path
    name : {"cifar10", "cifar100"}
    n_train, n_test : int
        Number of images, at least 5 of training; labels go round the classes.
    seed : int

    Returns
    -------
    pathlib.Path
        The folder of the files, for ``load_dataset(name, root=root, verify=False)``.
    """
    classes, folder, key = {"cifar10": (10, "cifar-10-batches-py", "labels"),
                            "cifar100": (100, "cifar-100-python", "fine_labels")}[name]
    (root / folder).mkdir(parents=True, exist_ok=True)
    images, labels = pictures(np.arange(n_train + n_test) % classes, classes, 32, 32, seed)
    parts = [*np.array_split(np.arange(n_train), 5)] if name == "cifar10" else [np.arange(n_train)]
    parts.append(np.arange(n_train, n_train + n_test))
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if name == "cifar10" else ["train", "test"]
    for file, part in zip(files, parts, strict=True):
        entry = {"data": images[part].reshape(len(part), 3072), key: labels[part].tolist(), "batch_label": file,
                 "filenames": [f"{i}.png" for i in part.tolist()]}
        if name == "cifar100":
            entry["coarse_labels"] = [label // 5 for label in entry[key]]
        (root / folder / file).write_bytes(python2_pickle(entry))
    names = [f"class {i}" for i in range(classes)]
    meta, entry = (("batches.meta", {"label_names": names}) if name == "cifar10" else
                   ("meta", {"fine_label_names": names, "coarse_label_names": names[:20]}))
    (root / folder / meta).write_bytes(python2_pickle(entry))
    return root / folder


def write_imagenet(root, classes=3, train=8, val=4, size=64, seed=0):
    """Write ``train/<class>/*.JPEG``, ``val/<class>/*.JPEG`` and ``meta.bin`` in ``root``.

    Parameters
    ----------
    root : pathlib.Path
        For ``load_dataset("imagenet", root=root)``.
    classes : int
        Number of classes, ``n00000000`` and so on.
    train, val : int
        Number of images of each class.
    size : int
        Height of the images; they are a quarter wider.
    seed : int
    """
    images, labels = pictures(np.arange(classes * (train + val)) % classes, classes, size, size + size // 4, seed)
    wnids = [f"n{i:08}" for i in range(classes)]
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = root / ("train" if i < classes * train else "val") / wnids[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{wnids[label]}_{i}.JPEG", "JPEG", quality=95)
    torch.save(({wnid: (f"class {wnid}",) for wnid in wnids}, wnids * val), root / "meta.bin")


def pictures(labels, classes, height, width, seed):
    """Images of a colour and a coarse pattern that go with the label, under noise.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        uint8 [n, 3, height, width]; the labels.
    """
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(60, 195, (classes, 3, 1, 1)) + rng.uniform(-50, 50, (classes, 3, 4, 4))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    images = patterns[labels][:, :, rows][..., columns] + rng.normal(0, 20, (len(labels), 3, height, width))
    return images.clip(0, 255).astype(np.uint8), labels


def python2_pickle(value):
    """A pickle with strings and bytes as Python 2 wrote both, and numpy's modules as they were called then."""
    stream = io.BytesIO()
    _Python2(stream, 2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


class _Python2(pickle._Pickler):
    def save_string(self, value):
        raw = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + len(raw).to_bytes(4, "little") + raw)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}
