"""CelebA's folder: the faces and attributes that torchvision reads, classes of one size, clear errors otherwise."""

import re
import shutil
import sys
from hashlib import md5

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestCentroid

from permask_core.data import load_dataset
from permask_core.data.celeba import celeba
from permask_core.data.imagenet import MEAN, SD
from permask_core.data.splits import in_order, mix_seed
from permask_core.models.vision import torchvision
from tests.data.files import CELEBA, write_celeba

published = torchvision.datasets.CelebA
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with ``celeba`` in it; not to be changed."""
    root = tmp_path_factory.mktemp("sets")
    write_celeba(root)
    return root


@pytest.fixture
def root(tmp_path, made):
    """The same, to be changed."""
    shutil.copytree(made / "celeba", tmp_path / "celeba")
    return tmp_path


def load(root, **options):
    return celeba(root, **{"verify": False, "readers": 0, "image_size": 32, **options})


class Unchecked(published):
    """torchvision's own reader, without the sums of the published files."""

    file_list = [(number, None, file) for number, _, file in published.file_list]


@pytest.mark.parametrize("label, attributes", [
    ("Smiling", ("Young", "Male")), ("Male", ["Eyeglasses"]), ("Wavy_Hair", ("5_o_Clock_Shadow", "Young", "Bald")),
    ("Young", ()),
])
def test_the_same_as_torchvision(made, label, attributes):
    *splits, shape, classes = load(made, label=label, attributes=attributes, balanced=False)
    assert (shape, classes) == ((3, 32, 32), 2)
    for split, part, size in zip(splits, ("train", "test"), (80, 40)):
        reference = Unchecked(made, part)
        assert split.names.tolist() == reference.filename and len(split) == size
        assert split.root == made / "celeba" / "img_align_celeba" and split.y.dtype == torch.int64
        has = dict(zip(reference.attr_names, reference.attr.T))
        assert torch.equal(split.y, has[label]) and list(split.attributes) == list(attributes)
        for name, (groups, member) in split.attributes.items():
            assert groups == (f"not {name}", name)
            assert torch.equal(member, torch.stack([has[name] == 0, has[name] == 1], 1))


def test_every_attribute_can_be_the_label(made):
    reference = Unchecked(made, "test").attr
    for number, name in enumerate(CELEBA):
        assert torch.equal(load(made, label=name)[1].y, reference[:, number])


@pytest.mark.parametrize("label", ["Smiling", "Young", "Bald"])
def test_the_balanced_training_set(made, label):
    whole, whole_test, _, _ = load(made, label=label, attributes=("Male", label), balanced=False)
    train, test, _, _ = load(made, label=label, attributes=("Male", label))
    fewest = whole.y.bincount().min()
    assert train.y.bincount().tolist() == [fewest, fewest] and len(whole) > len(train) == 2 * fewest
    # All of the rarer class, the order of the whole, and each image's own label and attributes.
    rarer = whole.y == whole.y.bincount().argmin()
    place = np.searchsorted(whole.names, train.names)
    assert (whole.names[place] == train.names).all() and (np.diff(place) > 0).all()
    assert set(whole.names[rarer.numpy()]) <= set(train.names) and torch.equal(whole.y[place], train.y)
    for name in ("Male", label):
        assert torch.equal(whole.attributes[name].member[place], train.attributes[name].member)
    assert (test.names == whole_test.names).all() and torch.equal(test.y, whole_test.y)


def test_what_is_left_out_is_drawn_from_the_seed(made):
    draws = [load(made, label="Young", seed=seed)[0].names.tolist() for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3


def test_training_images_are_crops_of_80_percent_and_test_images_the_centre(made):
    transforms = torchvision.transforms
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, SD)]
    moved = transforms.Compose([transforms.RandomResizedCrop(160, scale=(0.8, 1)), transforms.RandomHorizontalFlip(),
                                *last])
    plain = transforms.Compose([transforms.Resize(183), transforms.CenterCrop(160), *last])
    train, test, shape, _ = celeba(made, verify=False, readers=0)
    assert shape == (3, 160, 160)
    for split, augmented, transform in ((train, (3, 1), moved), (test, None, plain)):
        (inputs, _), = split.batches([torch.arange(3)], augmented=augmented)
        for i, found in enumerate(inputs):
            torch.manual_seed(mix_seed(3, 1, i))
            assert torch.equal(found, transform(Image.open(split.root / split.names[i])))


def test_eyes_and_mouth_are_inside_of_every_crop(made):
    """Where the published landmarks put them on average, with six pixels more."""
    train, _, _, _ = load(made)
    image = Image.new("RGB", (178, 218))
    crop = torchvision.transforms.RandomResizedCrop
    for _ in range(2000):
        top, left, height, width = crop.get_params(image, (train.smallest, 1), crop(8).ratio)
        assert top <= 105 and left <= 63 and top + height >= 158 and left + width >= 114


def test_the_written_images_can_be_learned(made):
    whole, test, _, _ = load(made, balanced=False)
    x_train, x_test = (torch.cat([x for x, _ in split.batches(in_order(split, 40))]).flatten(1)
                       for split in (whole, test))
    groups = [split.y + 2 * split.attributes["Male"].member[:, 1] + 4 * split.attributes["Young"].member[:, 1]
              for split in (whole, test)]
    found = NearestCentroid().fit(x_train, groups[0]).predict(x_test)
    assert (found % 2 == test.y.numpy()).mean() > 0.95


def listed(folder):
    return [(number, md5((folder / file).read_bytes()).hexdigest() if (folder / file).is_file() else None, file)
            for number, _, file in published.file_list]


def test_only_the_published_lists_unless_told_otherwise(root, monkeypatch):
    folder = root / "celeba"
    with pytest.raises(ValueError, match=f"{re.escape(str(folder / ATTRIBUTES))} is not the published file .*expected "
                                         "75e246fa4810816ffd6ee81facbd244c.*accept it with verify=False"):
        load(root, verify=True)
    monkeypatch.setattr(published, "file_list", listed(folder))
    for file in ("identity_CelebA.txt", "list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        (folder / file).unlink()  # nothing here reads them
    assert len(load(root, verify=True)[1]) == 40
    (folder / PARTITION).write_text((folder / PARTITION).read_text().replace(" 2", " 0", 1))
    with pytest.raises(ValueError, match=f"{PARTITION} is not the published file"):
        load(root, verify=True)
    assert len(load(root)[1]) == 39


@pytest.mark.parametrize("gone", [ATTRIBUTES, PARTITION, "img_align_celeba"])
def test_missing_files_are_named(root, gone):
    (root / "celeba" / gone).rename(root / "away")
    with pytest.raises(FileNotFoundError) as found:
        load(root)
    for part in (f"CelebA is not in {root}: expected the folder celeba with {ATTRIBUTES}", f"missing: {gone}. Load it",
                 "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html", f"put them in {root}/celeba, unpacked"):
        assert part in str(found.value)


def test_images_that_are_listed_and_missing_are_named(root):
    for number in (3, 100):
        (root / "celeba" / "img_align_celeba" / f"{number:06}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(
            f"2 of the 130 images in {ATTRIBUTES} are not in {root}/celeba/img_align_celeba: 000003.jpg, 000100.jpg; "
            "unpack img_align_celeba.zip again")):
        load(root)


@pytest.mark.parametrize("options, message", [
    ({"label": "smiling"}, f"label is 'smiling': expected one of {', '.join(CELEBA)}"),
    ({"attributes": ["Young", "Age"]}, f"unknown attribute 'Age': expected some of {', '.join(CELEBA)}"),
    ({"attributes": "Young"}, "attributes is 'Young': expected a list of names"),
    ({"image_size": 0}, "image_size is 0: expected an integer of at least 1"),
    ({"readers": -1}, "readers is -1: expected an integer of at least 0"),
    ({"seed": -1}, "seed is -1: expected an integer of at least 0"), ({"seed": 0.5}, "seed is 0.5: expected"),
])
def test_bad_options_are_named(made, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(made, **options)


@pytest.mark.parametrize("file, change, message", [
    (ATTRIBUTES, lambda lines: [], "{} begins with [] and has 0 lines of images: expected their number"),
    (ATTRIBUTES, lambda lines: lines[:-1], "{} begins with ['130'] and has 129 lines of images: expected their number"),
    (ATTRIBUTES, lambda lines: lines[1:], "{} begins with ['5_o_Clock_Shadow Arched_Eyebrows"),
    (ATTRIBUTES, lambda lines: [*lines[:4], lines[4][:-3], *lines[5:]], "line 5 of {} has 40 columns: expected 41"),
    (ATTRIBUTES, lambda lines: [*lines[:-1], lines[-1][:-1] + "0"], "line 132 of {} has the value '0': expected one of "
     "-1, 1"),
    (ATTRIBUTES, lambda lines: [*lines[:2], lines[2].replace("000001", "1"), *lines[3:]], "lists 130 images, "
     f"{ATTRIBUTES} 130; in only one of them: 000001.jpg, 1.jpg: expected the same images in the same order"),
    (PARTITION, lambda lines: [], f"lists 0 images, {ATTRIBUTES} 130; in only one of them: 000001.jpg, 000002.jpg"),
    (PARTITION, lambda lines: lines[:-1], "in only one of them: 000130.jpg: expected the same"),
    (PARTITION, lambda lines: [*reversed(lines)], "in only one of them: none: expected the same images in the same"),
    (PARTITION, lambda lines: ["000001.jpg", *lines[1:]], "line 1 of {} has 1 columns: expected 2"),
    (PARTITION, lambda lines: [*lines[:7], "000008.jpg x", *lines[8:]], "line 8 of {} has the value 'x': expected one "
     "of 0, 1, 2"),
    (PARTITION, lambda lines: [line[:-1] + "0" for line in lines], "and 0 test images: expected at least 1 of each"),
    (PARTITION, lambda lines: [line[:-1] + "2" for line in lines], "{} has 0 training images that are not Smiling, 0 "
     "that are, and 130 test images"),
])
def test_damaged_lists_are_named(root, file, change, message):
    path = root / "celeba" / file
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=re.escape(message.replace("{}", str(path)))):
        load(root)


@pytest.fixture
def drive(tmp_path, made, monkeypatch):
    """Have torchvision find the set's files on a drive, a folder of this machine; the names of what is fetched."""
    shutil.copytree(made / "celeba", tmp_path / "drive")
    shutil.make_archive(tmp_path / "drive" / "img_align_celeba", "zip", tmp_path / "drive", "img_align_celeba")
    monkeypatch.setattr(published, "file_list", listed(tmp_path / "drive"))
    fetched, numbers = [], {number: file for number, _, file in published.file_list}

    def fetch(number, root, filename, md5):
        root.mkdir(parents=True, exist_ok=True)
        fetched.append(filename)
        shutil.copy(tmp_path / "drive" / numbers[number], root / filename)

    monkeypatch.setattr(torchvision.datasets.utils, "download_file_from_google_drive", fetch)
    return fetched


def test_download(tmp_path, made, drive):
    root = tmp_path / "new"
    train, _, _, _ = load(root, download=True, verify=True)
    (found, _), = train.batches([torch.arange(4)])
    (expected, _), = load(made)[0].batches([torch.arange(4)])
    assert torch.equal(found, expected) and sorted(drive) == ["img_align_celeba.zip", ATTRIBUTES, PARTITION]
    assert sorted(path.name for path in (root / "celeba").iterdir()) == ["img_align_celeba", ATTRIBUTES, PARTITION]
    (root / "celeba" / PARTITION).unlink()
    load(root, download=True, verify=True)
    assert drive[3:] == [PARTITION] and [path.name for path in root.iterdir()] == ["celeba"]


def test_a_failed_download_leaves_nothing(tmp_path, drive):
    (tmp_path / "drive" / "img_align_celeba.zip").write_bytes(b"too many have asked for this file")
    with pytest.raises(OSError, match="cannot download img_align_celeba.zip, .* into .*/new .*not a zip.*unpacked"):
        load(tmp_path / "new", download=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_download_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(OSError, match="cannot download .*pip install gdown.*put them in"):
        load(tmp_path, download=True)


def test_by_name(made):
    found = load_dataset("celeba", root=made, verify=False, label="Male", attributes=["Young"], readers=0)
    assert (found.name, found.input_shape, found.classes, len(found.test)) == ("celeba", (3, 160, 160), 2, 40)
