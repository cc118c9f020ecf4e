"""The files of MNIST's format: the images that torchvision reads, wherever they lie, and clear errors otherwise."""

import gzip
import re
from hashlib import md5

import numpy as np
import pytest
import torch

from permask_core.data import load_dataset, mnist
from permask_core.data.splits import channel_moments
from permask_core.models.vision import torchvision
from tests.data.files import DEBIAN, idx, require_fashion_mnist, serving, write_mnist

CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "emnist": "EMNIST"}
IMAGES, LABELS = np.zeros((4, 28, 28), np.uint8), np.array([0, 1, 9, 5], np.uint8)


@pytest.fixture(autouse=True)
def without_debian(monkeypatch, tmp_path):
    """The files of an installed package are no part of a test that does not ask for them."""
    monkeypatch.setattr(mnist, "DEBIAN", tmp_path / "debian")


@pytest.fixture
def publish(monkeypatch):
    """Let torchvision take the files of a folder, at an address, for the published ones."""

    def publish(name, folder, address="http://127.0.0.1:1"):
        published = getattr(torchvision.datasets, CLASSES[name])
        sums = [(file.name, md5(file.read_bytes()).hexdigest()) for file in folder.glob("*.gz")]
        monkeypatch.setattr(published, "resources", sums)
        monkeypatch.setattr(published, "mirrors", [f"{address}/"])

    return publish


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_the_same_as_torchvision(tmp_path, publish, name, packed):
    """torchvision reads unpacked files; EMNIST's lie on their side there."""
    write_mnist(tmp_path, name, 103, 21, packed=False)
    if packed:
        folder = write_mnist(tmp_path, name, 103, 21)
        if name != "emnist":
            publish(name, folder)
    _, train, test, shape, classes = load_dataset(name, root=tmp_path)  # with its check of md5 sums
    assert (shape, classes) == ((1, 28, 28), 47 if name == "emnist" else 10)
    options = {"split": "balanced"} if name == "emnist" else {}
    for split, training, size in ((train, True, 103), (test, False, 21)):
        reference = getattr(torchvision.datasets, CLASSES[name])(tmp_path, train=training, **options)
        images = reference.data.mT if name == "emnist" else reference.data
        assert split.x.dtype == torch.uint8 and split.y.dtype == torch.int64 and len(split) == size
        assert torch.equal(split.x[:, 0], images) and torch.equal(split.y, reference.targets)


def test_letters_begin_at_0(tmp_path):
    for file in write_mnist(tmp_path, "emnist").iterdir():
        letters = file.with_name(file.name.replace("balanced", "letters"))
        file.rename(letters)
        if "labels" in file.name:
            count = len(gzip.decompress(letters.read_bytes())) - 8
            letters.write_bytes(gzip.compress(idx(np.arange(count, dtype=np.uint8) % 26 + 1)))
    _, train, _, _, classes = load_dataset("emnist", root=tmp_path, split="letters")
    assert classes == 26 and train.y.tolist() == [i % 26 for i in range(100)]


def test_the_form_of_the_images(tmp_path):
    write_mnist(tmp_path)
    plain = load_dataset("fashion_mnist", root=tmp_path, verify=False).train
    data = load_dataset("fashion_mnist", root=tmp_path, verify=False, size=32, channels=3, n_train=30, n_test=7, pad=2,
                        flip=True)
    assert data.input_shape == (3, 32, 32) and (len(data.train), len(data.test)) == (30, 7)
    assert (data.train.pad, data.train.flip, data.test.pad, data.test.flip) == (2, True, 0, False)
    assert (data.train.mean, data.train.sd) == (data.test.mean, data.test.sd) == channel_moments(data.train.x)
    for channel in data.train.x.unbind(1):
        assert torch.equal(channel[:, 2:30, 2:30], plain.x[:30, 0]) and channel.sum() == plain.x[:30].sum()


@pytest.mark.parametrize("options, message", [
    ({"size": 30}, "size is 30: expected 28 or 32"), ({"channels": 2}, "channels is 2: expected 1 or 3"),
    ({"n_train": 0}, "n_train is 0: expected an integer of at least 1"),
    ({"n_test": 2.5}, "n_test is 2.5: expected an integer"),
    ({"pad": -1}, "pad is -1: expected an integer of at least 0"),
    ({"n_train": 101}, "101 images are asked for: expected at most the 100 in "),
    ({"split": "balanced"}, "fashion_mnist has no option 'split'"),
])
def test_options_out_of_range(tmp_path, options, message):
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_dataset("fashion_mnist", root=tmp_path, verify=False, **options)


def test_unknown_split_of_emnist(tmp_path):
    with pytest.raises(ValueError, match="split is 'all': expected one of balanced, byclass, bymerge, digits, letters"):
        load_dataset("emnist", root=tmp_path, split="all")


def test_debians_files_are_used_where_there_are_no_others(tmp_path, publish, monkeypatch):
    made = write_mnist(tmp_path / "made", seed=1)
    debian = tmp_path / "debian" / "fashion-mnist"
    debian.parent.mkdir()
    made.rename(debian)
    publish("fashion_mnist", debian)
    packaged = load_dataset("fashion_mnist", root=tmp_path / "sets", download=True).train.x  # nothing to download
    assert not (tmp_path / "sets").exists()
    publish("fashion_mnist", write_mnist(tmp_path / "sets", seed=2))
    assert not torch.equal(load_dataset("fashion_mnist", root=tmp_path / "sets").train.x, packaged)
    with pytest.raises(FileNotFoundError, match="MNIST is not in"):
        load_dataset("mnist", root=tmp_path / "other")


def test_another_set_than_the_published_one(tmp_path):
    folder = write_mnist(tmp_path)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}/train-images-idx3-ubyte.gz is not the published "
                                         "file.*expected 8d4fb7e6c68d591d4c3dfef9ec88bf0d.*verify=False"):
        load_dataset("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize("damage, message", [
    (lambda content: b"", "is damaged or not a gzip file|begins with the bytes of nothing"),
    (lambda content: b"<html>404 Not Found</html>", "is damaged or not a gzip file .*: delete it"),
    (lambda content: content[:500], "is damaged or not a gzip file .*: delete it"),
    (lambda content: content[:300] + b"?" + content[301:], "is damaged or not a gzip file .*: delete it"),
    (lambda content: gzip.compress(gzip.decompress(content)[:-1]),
     r"has 39,199 bytes after its head: expected 39,200 for the shape \[50, 28, 28\]"),
    (lambda content: gzip.compress(b"PNG"), "begins with the bytes 50 4e 47: expected 00 00 08 03, an idx file"),
    (lambda content: gzip.compress(idx(LABELS)), "begins with the bytes 00 00 08 01: expected 00 00 08 03"),
    (lambda content: gzip.compress(idx(IMAGES[:, 1:])), r"has the shape \[4, 27, 28\]: expected \[n, 28, 28\]"),
    (lambda content: gzip.compress(idx(IMAGES[:0])), r"has the shape \[0, 28, 28\]: expected .* n at least 1"),
])
def test_damaged_and_foreign_files_are_named(tmp_path, damage, message):
    path = write_mnist(tmp_path) / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} ({message})"):
        load_dataset("fashion_mnist", root=tmp_path, verify=False)


@pytest.mark.parametrize("labels, message", [
    (LABELS, "has 4 labels: expected one for each of the 50 images in t10k-images-idx3-ubyte.gz"),
    (np.arange(50, dtype=np.uint8), "has the label 10: expected 0 to 9"),
])
def test_labels_that_do_not_fit(tmp_path, labels, message):
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {message}"):
        load_dataset("fashion_mnist", root=tmp_path, verify=False)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as found:
        load_dataset("fashion_mnist", root=tmp_path)
    for part in (f"FashionMNIST is not in {tmp_path}/FashionMNIST: expected the folder raw", "missing: train-images",
                 "put its files in", "Debian's package dataset-fashion-mnist", "download=True", "PERMASK_DATA"):
        assert part in str(found.value)
    (write_mnist(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="missing: t10k-labels-idx1-ubyte.gz. Load it"):
        load_dataset("fashion_mnist", root=tmp_path)


def test_download(tmp_path, publish):
    """What is missing comes, checked by its sum; a failure leaves nothing."""
    made, root = write_mnist(tmp_path / "made"), tmp_path / "new"
    with serving(made) as address:
        publish("fashion_mnist", made, address)
        assert torch.equal(load_dataset("fashion_mnist", root=root, download=True).train.x,
                           load_dataset("fashion_mnist", root=tmp_path / "made").train.x)
        (made / "train-labels-idx1-ubyte.gz").write_bytes(b"cut")
        with pytest.raises(OSError, match="cannot download .*put its files in"):
            load_dataset("fashion_mnist", root=tmp_path / "other", download=True)
        assert list((tmp_path / "other" / "FashionMNIST").iterdir()) == []


def test_the_real_files():
    """Fashion-MNIST as published, with its md5 sums: balanced classes, and garments that differ in their mean image."""
    require_fashion_mnist()
    mnist.DEBIAN = DEBIAN  # taken back by without_debian
    data = load_dataset("fashion_mnist", root="/nowhere")
    published = {
        "train-images-idx3": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3": "8181f5470baa50b63fa0f6fddb340f0a", "t10k-labels-idx1": "15d484375f8d13e6eb1aabb0c3f46965"}
    for file, expected in published.items():  # of the content, which Debian compresses again
        path = mnist.DEBIAN / "fashion-mnist" / f"{file}-ubyte.gz"
        assert md5(gzip.decompress(path.read_bytes())).hexdigest() == expected
    assert [torch.bincount(split.y).tolist() for split in (data.train, data.test)] == [[6000] * 10, [1000] * 10]
    assert (*data.train.mean, *data.train.sd) == pytest.approx((0.2860, 0.3530), abs=1e-4)
    means = torch.stack([data.train.x[data.train.y == k].float().mean(0).flatten() for k in range(10)])
    nearest = torch.cdist(data.test.x.flatten(1).float(), means).argmin(1)
    assert 0.6 < (nearest == data.test.y).float().mean() < 0.75  # nearest centroids
