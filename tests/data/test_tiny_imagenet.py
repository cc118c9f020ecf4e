"""Tiny ImageNet's folder: the images that PIL reads, the same classes in both splits, clear errors otherwise."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestCentroid

from permask_core.data import load_dataset
from permask_core.data.splits import channel_moments
from permask_core.data.tiny_imagenet import CHUNK, tiny_imagenet
from tests.data.files import write_tiny_imagenet


@pytest.fixture
def folder(tmp_path):
    return write_tiny_imagenet(tmp_path, classes=4, train=5, val=3)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)


def test_images_and_labels_are_those_of_the_files(tmp_path):
    folder, each = write_tiny_imagenet(tmp_path, classes=4, train=60, val=3), 60
    _, train, test, shape, classes = load_dataset("tiny_imagenet", root=tmp_path)
    assert (shape, classes) == ((3, 64, 64), 4) and len(train) == 4 * each > CHUNK and len(test) == 12
    assert (folder / "wnids.txt").read_text().split() == ["n00000003", "n00000002", "n00000001", "n00000000"]
    assert train.x.dtype == torch.uint8 and torch.equal(train.y, torch.arange(4).repeat_interleave(each))
    for label in range(4):
        paths = sorted((folder / "train" / f"n{label:08}" / "images").iterdir())
        assert np.array_equal(train.x[train.y == label].numpy(), [pixels(path) for path in paths])
    rows = [line.split("\t") for line in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    assert test.y.tolist() == [int(row[1][1:]) for row in rows]
    for image, row in zip(test.x, rows, strict=True):
        assert np.array_equal(image.numpy(), pixels(folder / "val" / "images" / row[0]))


def test_grey_images_have_three_equal_channels(tmp_path, folder):
    assert Image.open(folder / "train" / "n00000001" / "images" / "n00000001_4.JPEG").mode == "L"
    train, test, _, _ = tiny_imagenet(tmp_path)
    for split in (train, test):
        grey = (split.x == split.x[:, :1]).all(1).flatten(1).all(1)
        assert torch.equal(split.y[grey].sort().values, torch.arange(4))


def test_standardised_by_the_training_images_and_augmented_in_training_only(tmp_path, folder):
    train, test, _, _ = tiny_imagenet(tmp_path)
    assert (train.mean, train.sd) == (test.mean, test.sd) == channel_moments(train.x)
    assert (train.pad, train.flip, test.pad, test.flip) == (8, True, 0, False)
    assert train.attributes == test.attributes == {}


def test_the_written_images_can_be_learned(tmp_path):
    write_tiny_imagenet(tmp_path, 5, 20, 10)
    train, test, _, _ = tiny_imagenet(tmp_path)
    assert NearestCentroid().fit(train.x.flatten(1), train.y).score(test.x.flatten(1), test.y) > 0.9


@pytest.mark.parametrize("gone", ["wnids.txt", "train", "val/images", "val/val_annotations.txt"])
def test_missing_files_are_named(tmp_path, folder, gone):
    (folder / gone).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError) as found:
        tiny_imagenet(tmp_path)
    for part in (f"Tiny ImageNet is not in {tmp_path}: expected the folder tiny-imagenet-200 with wnids.txt, train,",
                 f"missing: {gone}. Download http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                 f"unpack it in {tmp_path}",
                 "PERMASK_DATA"):
        assert part in str(found.value)


@pytest.mark.parametrize("listed, message", [
    ("", "lists 0 classes, and train has 4; only listed: none; only in train: n00000000, n00000001"),
    ("n00000000\nn00000001\nn00000002\nn7", "only listed: n7; only in train: n00000003: expected the same classes"),
    ("n00000000\nn00000001\nn00000002\nn00000003\nn00000003", "lists 5 classes, and train has 4; only listed: none"),
])
def test_classes_other_than_the_folders(tmp_path, folder, listed, message):
    (folder / "wnids.txt").write_text(listed)
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_imagenet(tmp_path)


def test_a_class_without_images_is_named(tmp_path, folder):
    for file in (folder / "train" / "n00000002" / "images").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(folder))}/train/<class>/images has no file "
                                                r"\*.JPEG of the classes n00000002: unpack the archive again"):
        tiny_imagenet(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda rows: [*rows[:2], rows[2].replace("\t", " "), *rows[3:]], "line 3 of {} is ['val_2.JPEG n00000002 0 0 62 62"
     "']: expected six columns, the second with one of the 4 classes in wnids.txt"),
    (lambda rows: [rows[0].replace("n00000000", "n5"), *rows[1:]], "line 1 of {} is ['val_0.JPEG', 'n5', '0'"),
    (lambda rows: rows[1:], "lists 11 images, and {images} has 12; only listed: none; only there: val_0.JPEG"),
    (lambda rows: [*rows, rows[0].replace("val_0", "val_12")], "lists 13 images, and {images} has 12; only listed: "
     "val_12.JPEG; only there: none: expected the same images, each once"),
    (lambda rows: [*rows, rows[0]], "lists 13 images, and {images} has 12; only listed: none; only there: none"),
    (lambda rows: [], "lists 0 images, and {images} has 12"),
])
def test_damaged_annotations_are_named(tmp_path, folder, change, message):
    path = folder / "val" / "val_annotations.txt"
    path.write_text("\n".join(change(path.read_text().splitlines())))
    message = message.replace("{images}", str(folder / "val" / "images")).replace("{}", str(path))
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_imagenet(tmp_path)


def test_images_of_another_size_or_damaged_are_named(tmp_path, folder):
    path = folder / "val" / "images" / "val_3.JPEG"
    Image.new("RGB", (32, 64)).save(path)
    with pytest.raises(ValueError, match=re.escape(f"{path} is 32x64: expected 64x64 pixels")):
        tiny_imagenet(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a readable image .*: replace or delete it"):
        tiny_imagenet(tmp_path)
