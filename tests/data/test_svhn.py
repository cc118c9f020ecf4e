"""SVHN's files: the images that torchvision reads, and clear errors where there is something else."""

import re
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.neighbors import NearestCentroid

from permask_core.data import load_dataset
from permask_core.data.splits import channel_moments
from permask_core.data.svhn import svhn
from permask_core.models.vision import torchvision
from tests.data.files import serving, write_svhn

published = torchvision.datasets.SVHN
IMAGES, LABELS = np.zeros((32, 32, 3, 4), np.uint8), np.array([[1], [10], [9], [5]], np.uint8)


@pytest.fixture
def publish(monkeypatch):
    """Let torchvision take the files of a folder, at an address, for the published ones."""

    def publish(folder, address="http://127.0.0.1:1"):
        for part in ("train", "test"):
            file = f"{part}_32x32.mat"
            sums = [f"{address}/{file}", file, md5((folder / file).read_bytes()).hexdigest()]
            monkeypatch.setitem(published.split_list, part, sums)

    return publish


def test_the_same_as_torchvision(tmp_path, publish):
    folder = write_svhn(tmp_path, 103, 21)
    publish(folder)
    _, train, test, shape, classes = load_dataset("svhn", root=tmp_path)  # with its check of md5 sums
    assert (shape, classes) == ((3, 32, 32), 10)
    for split, part, size in ((train, "train", 103), (test, "test", 21)):
        reference = published(folder, part)
        assert split.x.dtype == torch.uint8 and split.y.dtype == torch.int64 and len(split) == size
        assert np.array_equal(split.x.numpy(), reference.data) and split.y.tolist() == reference.labels.tolist()


def test_ten_stands_for_the_digit_0(tmp_path):
    folder = write_svhn(tmp_path)
    savemat(folder / "test_32x32.mat", {"X": IMAGES, "y": LABELS})
    assert svhn(tmp_path, verify=False)[1].y.tolist() == [1, 0, 9, 5]


def test_standardised_by_the_training_images_and_never_mirrored(tmp_path):
    write_svhn(tmp_path)
    train, test, _, _ = svhn(tmp_path, verify=False)
    assert (train.mean, train.sd) == (test.mean, test.sd) == channel_moments(train.x)
    assert (train.pad, train.flip, test.pad, test.flip) == (4, False, 0, False)
    assert train.attributes == test.attributes == {}


def test_the_written_images_can_be_learned(tmp_path):
    write_svhn(tmp_path)
    train, test, _, _ = svhn(tmp_path, verify=False)
    model = NearestCentroid().fit(train.x.flatten(1), train.y)
    assert model.score(test.x.flatten(1), test.y) > 0.95


def test_another_set_than_the_published_one(tmp_path):
    folder = write_svhn(tmp_path)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}/train_32x32.mat is not the published file .*"
                                         "expected e26dedcc434d2e4c54c9b2d4a06d8373.*accept it with verify=False"):
        svhn(tmp_path)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"<html>404 Not Found</html>", lambda content: content[:5000],
    lambda content: b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + content[128:],
])
def test_damaged_files_are_named(tmp_path, damage):
    path = write_svhn(tmp_path) / "test_32x32.mat"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged or not a MATLAB file .*: delete it"):
        svhn(tmp_path, verify=False)


@pytest.mark.parametrize("content, message", [
    ({"y": LABELS}, "'X' in {} is object []: expected uint8 [32, 32, 3, n] with n at least 1"),
    ({"X": IMAGES.astype(float), "y": LABELS}, "'X' in {} is float64 [32, 32, 3, 4]: expected uint8"),
    ({"X": IMAGES.transpose(3, 0, 1, 2), "y": LABELS}, "'X' in {} is uint8 [4, 32, 32, 3]: expected"),
    ({"X": IMAGES[..., :0], "y": LABELS[:0]}, "'X' in {} is uint8 [32, 32, 3, 0]: expected"),
    ({"X": IMAGES}, "'y' in {} is object []: expected one number for each of the 4 images"),
    ({"X": IMAGES, "y": LABELS[:3]}, "'y' in {} is uint8 [3, 1]: expected one number for each of the 4 images"),
    ({"X": IMAGES, "y": "1234"}, "'y' in {} is <U4 [1]: expected one number"),
    ({"X": IMAGES, "y": LABELS % 10}, "'y' in {} has the label 0: expected 1 to 10, where 10 is the digit 0"),
    ({"X": IMAGES, "y": LABELS + 1}, "'y' in {} has the label 11: expected 1 to 10"),
    ({"X": IMAGES, "y": LABELS / 2}, "'y' in {} has the label 0.5: expected 1 to 10"),
])
def test_something_else_than_images_and_labels(tmp_path, content, message):
    path = write_svhn(tmp_path) / "train_32x32.mat"
    savemat(path, content)
    with pytest.raises(ValueError, match=re.escape(message.replace("{}", str(path)))):
        svhn(tmp_path, verify=False)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as found:
        svhn(tmp_path / "sets")
    for part in (f"SVHN is not in {tmp_path}/sets: expected the folder svhn", "missing: train_32x32.mat, test_32x32",
                 published.split_list["test"][0], f"put it in {tmp_path}/sets/svhn", "download=True", "PERMASK_DATA"):
        assert part in str(found.value)
    (write_svhn(tmp_path) / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match="missing: test_32x32.mat. Load it"):
        svhn(tmp_path)


def test_download(tmp_path, publish):
    """What is missing comes, checked by its sum; what is there stays; a failure leaves nothing."""
    made, root = write_svhn(tmp_path / "made"), tmp_path / "new" / "root"
    with serving(made) as address:
        publish(made, address)
        assert torch.equal(svhn(root, download=True)[0].x, svhn(tmp_path / "made")[0].x)
        (root / "svhn" / "test_32x32.mat").unlink()
        (root / "svhn" / "train_32x32.mat").write_bytes(b"mine")
        with pytest.raises(ValueError, match="train_32x32.mat is not the published file"):
            svhn(root, download=True)
        assert (root / "svhn" / "test_32x32.mat").is_file() and [file.name for file in root.iterdir()] == ["svhn"]
        (made / "test_32x32.mat").write_bytes(b"cut")
        with pytest.raises(OSError, match="cannot download .*train_32x32.mat and .*put it in"):
            svhn(tmp_path / "other", download=True)
        assert list(Path(tmp_path, "other").iterdir()) == []
