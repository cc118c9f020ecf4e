"""Tiny data sets on disk, in the formats of the published files, of images and texts that can be learned."""

import functools
import gzip
import http.server
import io
import json
import os
import pickle
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from permask_core.data.mnist import DEBIAN

CELEBA = """5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair
Blond_Hair Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones
Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline
Rosy_Cheeks Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
Wearing_Necktie Young""".split()
TARGETS = [["Women", "Men"], ["African", "Arab", "Asian", "Caucasian", "Hispanic"],
           ["Islam", "Jewish", "Homosexual", "Heterosexual", "Refugee", "Other"]]
TONES = {"hatespeech": ["ghastly", "vile", "rotten"], "offensive": ["silly", "grumpy", "daft"],
         "normal": ["kind", "sunny", "gentle"]}
FILLERS = ["today", "we", "saw", "some", "people", "and", "they", "were", "in", "town", "again", "<user>"]


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


def write_mnist(root, name="fashion_mnist", n_train=100, n_test=50, seed=0, packed=True):
    """Write the four idx files of MNIST's format below ``root``, as torchvision and the publishers name them.

    Parameters
    ----------
    root : pathlib.Path
    name : {"mnist", "fashion_mnist", "kmnist", "emnist"}
        For EMNIST the split "balanced", whose images are stored with rows and columns exchanged.
    n_train, n_test : int
        Number of images; labels go round the classes.
    seed : int
    packed : bool
        Whether the files are compressed with gzip, as published.

    Returns
    -------
    pathlib.Path
        The folder of the files, for ``load_dataset(name, root=root, verify=False)``.
    """
    place, test, prefix, classes = {
        "mnist": ("MNIST", "t10k", "", 10), "fashion_mnist": ("FashionMNIST", "t10k", "", 10),
        "kmnist": ("KMNIST", "t10k", "", 10), "emnist": ("EMNIST", "test", "emnist-balanced-", 47)}[name]
    folder = root / place / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = pictures(np.arange(n_train + n_test) % classes, classes, 28, 28, seed)
    images = images[:, 0].swapaxes(1, 2) if name == "emnist" else images[:, 0]
    for part, chosen in (("train", slice(n_train)), (test, slice(n_train, None))):
        for kind, array in (("images-idx3", images[chosen]), ("labels-idx1", labels[chosen].astype(np.uint8))):
            content = idx(array)
            file = folder / f"{prefix}{part}-{kind}-ubyte{'.gz' * packed}"
            file.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return folder


def require_fashion_mnist():
    """Skip a test without the published files of Fashion-MNIST, or fail where that is not accepted."""
    if not (DEBIAN / "fashion-mnist" / "train-images-idx3-ubyte.gz").exists():
        (pytest.fail if os.environ.get("PERMASK_REQUIRE_FASHION_MNIST") == "1" else pytest.skip)(
            "no Fashion-MNIST: install Debian's package dataset-fashion-mnist")


def idx(array):
    """The bytes of an idx file of a uint8 array."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_svhn(root, n_train=100, n_test=50, seed=0):
    """Write ``svhn/train_32x32.mat`` and ``svhn/test_32x32.mat`` below ``root``; the labels are 1 to 10, in turn.

    Parameters
    ----------
    root : pathlib.Path
    n_train, n_test : int
        Number of images.
    seed : int

    Returns
    -------
    pathlib.Path
        The folder of the files, for ``load_dataset("svhn", root=root, verify=False)``.
    """
    (root / "svhn").mkdir(parents=True, exist_ok=True)
    images, digits = pictures(np.arange(n_train + n_test) % 10, 10, 32, 32, seed)
    labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
    for name, part in (("train", slice(n_train)), ("test", slice(n_train, None))):
        savemat(root / "svhn" / f"{name}_32x32.mat", {"X": images[part].transpose(2, 3, 1, 0), "y": labels[part]})
    return root / "svhn"


def write_tiny_imagenet(root, classes=3, train=8, val=4, seed=0):
    """Write ``tiny-imagenet-200`` below ``root``, with the last training and validation image of each class grey.

    Parameters
    ----------
    root : pathlib.Path
    classes : int
        Number of classes, ``n00000000`` and so on; as published, ``wnids.txt`` is not sorted.
    train, val : int
        Number of images of each class.
    seed : int

    Returns
    -------
    pathlib.Path
        The folder, for ``load_dataset("tiny_imagenet", root=root)``.
    """
    folder = root / "tiny-imagenet-200"
    wnids = [f"n{i:08}" for i in range(classes)]
    images, labels = pictures(np.arange(classes * (train + val)) % classes, classes, 64, 64, seed)
    images = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    rows = []
    for i, (image, label) in enumerate(zip(images, labels)):
        turn = i // classes
        file = (folder / "train" / wnids[label] / "images" / f"{wnids[label]}_{turn}.JPEG" if turn < train else
                folder / "val" / "images" / f"val_{i - classes * train}.JPEG")
        file.parent.mkdir(parents=True, exist_ok=True)
        (image.convert("L") if turn in (train - 1, train + val - 1) else image).save(file, "JPEG", quality=95)
        rows += [f"{file.name}\t{wnids[label]}\t0\t0\t62\t62\n"] if turn >= train else []
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(wnids)))
    (folder / "words.txt").write_text("".join(f"{wnid}\tclass {wnid}\n" for wnid in wnids))
    return folder


def write_celeba(root, n_train=80, n_val=10, n_test=40, seed=0):
    """Write ``celeba`` below ``root``, with all five lists. A picture shows whether it is Smiling, Young and Male.

    Parameters
    ----------
    root : pathlib.Path
    n_train, n_val, n_test : int
        Number of images of 178x218 pixels. About three in four are Young and two in five Male; women smile more often.
    seed : int

    Returns
    -------
    pathlib.Path
        The folder, for ``load_dataset("celeba", root=root, verify=False)``.
    """
    folder, n = root / "celeba", n_train + n_val + n_test
    (folder / "img_align_celeba").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    has = rng.random((n, len(CELEBA))) < 0.3
    smiling, young, male = (CELEBA.index(name) for name in ("Smiling", "Young", "Male"))
    has[:, young], has[:, male] = rng.random(n) < 0.77, rng.random(n) < 0.42
    has[:, smiling] = rng.random(n) < np.where(has[:, male], 0.4, 0.55)
    images, _ = pictures(has[:, [smiling, young, male]] @ [4, 2, 1], 8, 218, 178, seed)
    names = [f"{i:06}.jpg" for i in range(1, n + 1)]
    for name, image in zip(names, images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / "img_align_celeba" / name, quality=90)
    parts = [0] * n_train + [1] * n_val + [2] * n_test
    points = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"
    lists = {
        "list_attr_celeba.txt": [n, " ".join(CELEBA) + " ",
                                 *(f"{name} {' '.join(f'{2 * one - 1:2}' for one in row.astype(int))}"
                                   for name, row in zip(names, has))],
        "list_eval_partition.txt": [f"{name} {part}" for name, part in zip(names, parts)],
        "identity_CelebA.txt": [f"{name} {i // 2 + 1}" for i, name in enumerate(names)],
        "list_bbox_celeba.txt": [n, "image_id x_1 y_1 width height", *(f"{name}    95  71 226 313" for name in names)],
        "list_landmarks_align_celeba.txt": [n, points, *(f"{name} 69 111 108 111 88 135 71 152 105 152"
                                                         for name in names)],
    }
    for file, lines in lists.items():
        (folder / file).write_text("".join(f"{line}\n" for line in lines))
    return folder


def write_hatexplain(root, n_train=120, n_val=10, n_test=60, seed=0, posts=None):
    """Write ``hatexplain/dataset.json`` and ``hatexplain/post_id_divisions.json`` below ``root``.

    A post's words tell its label and its targets, of which one annotator in three says something else. More posts
    about women are toxic than others. As published, the posts on which all three labels differ (a tenth) are in no
    division.

    Parameters
    ----------
    root : pathlib.Path
    n_train, n_val, n_test : int
        Number of posts in the divisions.
    seed : int
    posts : dict, optional
        The posts to write instead, by name, the first ``n_train`` for training and so on.

    Returns
    -------
    pathlib.Path
        The folder, for ``load_dataset("hatexplain", root=root, tokenizer=write_tokenizer(...))``.
    """
    (root / "hatexplain").mkdir(parents=True, exist_ok=True)
    rng, n = np.random.default_rng(seed), n_train + n_val + n_test
    posts = posts or {f"{1000 + i}_{'gab' if i < n else 'twitter'}": _post(rng, torn=i >= n) for i in range(n + n // 9)}
    names = list(posts)
    divisions = {"train": names[:n_train], "val": names[n_train:n_train + n_val], "test": names[n_train + n_val:n]}
    posts = {name: {"post_id": name, **one} for name, one in posts.items()}
    for file, content in (("dataset", posts), ("post_id_divisions", divisions)):
        (root / "hatexplain" / f"{file}.json").write_text(json.dumps(content))
    return root / "hatexplain"


def _post(rng, torn):
    targets = [str(rng.choice(kind)) for kind in TARGETS if rng.random() < 0.4]
    toxic = rng.random() < (0.7 if "Women" in targets else 0.4)
    label = str(rng.choice(["hatespeech", "offensive"])) if toxic else "normal"
    words = [*targets, *rng.choice(TONES[label], 2), *rng.choice(FILLERS, rng.integers(4, 10))]
    labels = list(TONES) if torn else [label, label, str(rng.choice(list(TONES)))]
    named = [targets or ["None"], targets or ["None"], [str(rng.choice(TARGETS[0]))]]
    return post(rng.permutation(labels).tolist(), named, [word.lower() for word in rng.permutation(words).tolist()])


def post(labels, targets, words):
    """A post of HateXplain as it stands in the file, from its annotators' labels and targets and its words."""
    annotators = [{"label": label, "annotator_id": i + 1, "target": target}
                  for i, (label, target) in enumerate(zip(labels, targets, strict=True))]
    return {"annotators": annotators, "rationales": [], "post_tokens": words}


def write_tokenizer(folder):
    """Write a WordPiece tokenizer for the words of :func:`write_hatexplain`, and for all others letter by letter.

    Parameters
    ----------
    folder : pathlib.Path

    Returns
    -------
    str
        The folder, as transformers wants it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz<>"
    words = [word.lower().strip("<>") for part in (*TONES.values(), FILLERS, *TARGETS) for word in part]
    vocabulary = [*("[PAD] [UNK] [CLS] [SEP] [MASK]".split()), *letters, *(f"##{letter}" for letter in letters), *words]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}))
    return str(folder)


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


@contextmanager
def serving(folder):
    """The address under which this machine serves the files of a folder."""
    handler = functools.partial(_Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


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
