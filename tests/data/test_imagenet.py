"""Images in folders: the ones that torchvision's own loader and transforms make, whatever process reads them."""

import itertools
import pickle
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from permask_core.data.folders import Folder
from permask_core.data.imagenet import MEAN, SD, imagenet
from permask_core.data.splits import in_order, mix_seed
from permask_core.models.vision import torchvision
from tests.data.files import write_imagenet

transforms = torchvision.transforms


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny ImageNet of 4 classes; not to be changed."""
    root = tmp_path_factory.mktemp("imagenet")
    write_imagenet(root, classes=4, train=5, val=3)
    return root


def together(split, indices, augmented=None):
    inputs, labels = zip(*split.batches(indices, augmented=augmented))
    return torch.cat(inputs), torch.cat(labels)


@pytest.mark.parametrize("size", [24, 224])
def test_the_same_as_torchvision(root, size):
    train, val, shape, classes = imagenet(root, image_size=size, readers=0)
    assert shape == (3, size, size) and classes == 4 and (len(train), len(val)) == (20, 12)
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, SD)]
    augmenting = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *last])
    plain = transforms.Compose([transforms.Resize({24: 27, 224: 256}[size]), transforms.CenterCrop(size), *last])
    for split, name in ((train, "train"), (val, "val")):
        reference = torchvision.datasets.ImageNet(root, name)
        assert [str(split.root / file) for file in split.names] == [path for path, _ in reference.samples]
        for augmented, transform in (((5, 2), augmenting), (None, plain)):
            inputs, labels = together(split, in_order(split, 7), augmented)
            assert inputs.dtype == torch.float32 and labels.tolist() == split.y.tolist() == reference.targets
            for i, found in enumerate(inputs):
                torch.manual_seed(mix_seed(5, 2, i))
                assert torch.equal(found, transform(reference[i][0]))


def test_an_image_depends_on_neither_its_batch_nor_the_processes(root):
    alone, _, _, _ = imagenet(root, image_size=16, readers=0)
    helped, _, _, _ = imagenet(root, image_size=16, readers=2)
    inputs, labels = together(alone, in_order(alone, 20), (1, 1))
    order = torch.randperm(20)
    for split, size in ((alone, 6), (helped, 6), (helped, 1)):
        shuffled, shuffled_labels = together(split, order.split(size), (1, 1))
        assert torch.equal(shuffled, inputs[order]) and torch.equal(shuffled_labels, labels[order])
    twice, _ = together(helped, [torch.tensor([3, 3]), torch.tensor([3])], (1, 1))
    assert torch.equal(twice, inputs[[3, 3, 3]])


def test_epochs_seeds_and_images_differ(root):
    split, _, _, _ = imagenet(root, image_size=16, readers=0)
    runs = [together(split, in_order(split, 20), part)[0] for part in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for one, other in itertools.combinations(runs, 2):
        assert (one != other).flatten(1).any(1).all()
    moved, _ = together(split, [torch.arange(20)], (0, 0))
    names = np.array([split.names[0]] * 20)  # one image twenty times: each index has draws of its own
    same = Folder(split.root, names, split.y, 16, 0, MEAN, SD)
    copies, _ = together(same, [torch.arange(20)], (0, 0))
    assert len(copies.flatten(1).unique(dim=0)) == 20 and torch.equal(copies[0], moved[0])


@pytest.mark.parametrize("readers", [0, 1])
def test_the_global_draws_are_left_alone(root, readers):
    split, _, _, _ = imagenet(root, image_size=16, readers=readers)
    before = torch.get_rng_state()
    for augmented in (None, (0, 0)):
        together(split, in_order(split, 10), augmented)
    assert torch.equal(torch.get_rng_state(), before)


IN_NEW_PROCESSES = """
import multiprocessing, pickle, sys, torch
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    with open(sys.argv[1], "rb") as file:
        split = pickle.load(file)
    torch.save([x for x, _ in split.batches([torch.tensor([2, 0]), torch.tensor([1])], augmented=(0, 3))], sys.argv[2])
"""


def test_processes_that_inherit_nothing(root, tmp_path):
    """The split itself is sent to a new process, and there its readers are started as on macOS and Windows."""
    split, _, _, _ = imagenet(root, image_size=16, readers=1)
    assert split.to("cuda") is split
    (tmp_path / "script.py").write_text(IN_NEW_PROCESSES)
    (tmp_path / "split").write_bytes(pickle.dumps(split))
    subprocess.run([sys.executable, tmp_path / "script.py", tmp_path / "split", tmp_path / "found"], check=True)
    found = torch.cat(torch.load(tmp_path / "found"))
    assert torch.equal(found, together(split, [torch.tensor([2, 0, 1])], (0, 3))[0])


def one_class(root, image, file="image.JPEG", format="JPEG"):
    for name in ("train", "val"):
        (root / name / "n0").mkdir(parents=True)
        image.save(root / name / "n0" / file, format)


RAMP = Image.fromarray(np.linspace(0, 255, 40 * 30).reshape(30, 40).astype(np.uint8))
COLOURS = Image.merge("RGB", [RAMP, RAMP.rotate(180), RAMP])


@pytest.mark.parametrize("image, format", [
    (RAMP, "JPEG"), (COLOURS.convert("CMYK"), "JPEG"), (COLOURS, "PNG"),  # one of ImageNet's JPEG files is a PNG
    (COLOURS.convert("RGBA"), "PNG"), (COLOURS.quantize(200), "PNG"), (RAMP.convert("LA"), "PNG"),
], ids=lambda value: getattr(value, "mode", value))
def test_images_of_every_mode_become_colours(tmp_path, image, format):
    one_class(tmp_path, image, format=format)
    _, val, _, _ = imagenet(tmp_path, image_size=28, readers=0)
    (inputs, _), = val.batches([torch.tensor([0])])
    found = inputs[0] * torch.tensor(SD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    cut = transforms.CenterCrop(28)(transforms.Resize(32)(image.convert("RGB")))
    expected = transforms.functional.to_tensor(cut)
    assert (found - expected).abs().mean() < 0.02  # JPEG loses a little
    assert (found[0] - found[1]).abs().mean() < 0.02 if "L" in image.mode else found[0, 0, 0] < found[1, 0, 0]


def test_a_single_pixel_is_an_image(tmp_path):
    one_class(tmp_path, Image.new("RGB", (1, 1), (255, 0, 0)), format="PNG")
    train, val, _, classes = imagenet(tmp_path, image_size=8, readers=0)
    expected = (torch.tensor([1.0, 0, 0]) - torch.tensor(MEAN)) / torch.tensor(SD)
    for split, augmented in ((train, (0, 0)), (val, None)):
        inputs, labels = together(split, [torch.tensor([0])], augmented)
        assert torch.allclose(inputs, expected[:, None, None].expand(1, 3, 8, 8)) and labels.tolist() == [0]
    assert classes == 1


@pytest.mark.parametrize("damage, readers", [
    (lambda path: path.write_bytes(b""), 0), (lambda path: path.write_text("404 Not Found"), 0),
    (lambda path: path.unlink(), 0), (lambda path: path.write_bytes(path.read_bytes()[:400]), 0),
    (lambda path: path.write_bytes(path.read_bytes()[:400]), 1),
], ids=["empty", "text", "deleted", "truncated", "truncated, read by a worker"])
def test_damaged_images_are_named(tmp_path, damage, readers):
    write_imagenet(tmp_path, 2, 2, 1)
    train, _, _, _ = imagenet(tmp_path, image_size=16, readers=readers)
    path = tmp_path / "train" / train.names[2]
    damage(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is not a readable image .*: replace or delete it"):
        together(train, in_order(train, 1))


def test_classes_must_be_the_same_in_both_folders(tmp_path):
    write_imagenet(tmp_path, 9, 1, 1, size=8)
    (tmp_path / "val" / "n00000003").rename(tmp_path / "val" / "n7")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} has 9 classes in train and 9 in val; only in "
                                         "train: n00000003; only in val: n7: expected the same"):
        imagenet(tmp_path)
    (tmp_path / "val").rename(tmp_path / "away")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="0 in val; only in train: n00000000, .*04 and 4 more; only in val: none"):
        imagenet(tmp_path)
    (tmp_path / "train").rename(tmp_path / "too")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="0 classes in train and 0 in val; .*expected the same classes, at least one"):
        imagenet(tmp_path)


def test_a_class_without_images_is_named(tmp_path):
    write_imagenet(tmp_path, 3, 1, 1, size=8)
    for file in (tmp_path / "val" / "n00000001").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(tmp_path / 'val'))}: .*no valid file.* n00000001"):
        imagenet(tmp_path)


def test_names_that_imagenet_does_not_know(tmp_path):
    write_imagenet(tmp_path, 3, 1, 1, size=8)
    for name in ("train", "val"):
        (tmp_path / name / "n00000002").rename(tmp_path / name / "cats")
    with pytest.raises(ValueError, match="meta.bin does not have cats: expected names of ImageNet's classes"):
        imagenet(tmp_path)
    (tmp_path / "meta.bin").unlink()  # another set in the same folders
    train, val, _, classes = imagenet(tmp_path)
    assert classes == 3 and train.names[0].startswith("cats/") and train.y.tolist() == val.y.tolist() == [0, 1, 2]


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


@pytest.mark.parametrize("content", [b"", b"no archive", "trap"])
def test_a_damaged_meta_file_is_named_and_not_run(tmp_path, content):
    write_imagenet(tmp_path, 1, 1, 1, size=8)
    meta, sign = tmp_path / "meta.bin", tmp_path / "sign"
    if content == "trap":
        torch.save(({"n00000000": ("class",)}, Trap(sign)), meta)
    else:
        meta.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(meta))} is damaged .*: delete it"):
        imagenet(tmp_path)
    assert not sign.exists()


@pytest.mark.parametrize("gone", [["train"], ["val"], ["train", "val"]])
def test_missing_folders_are_named(tmp_path, monkeypatch, gone):
    monkeypatch.chdir(tmp_path)
    write_imagenet(tmp_path / "sets" / "imagenet", 2, 1, 1, size=8)
    for name in gone:
        (tmp_path / "sets" / "imagenet" / name).rename(tmp_path / name)
    message = (f"ImageNet is not in {tmp_path}/sets/imagenet: expected train/<class>/*.JPEG and val/<class>/*.JPEG; "
               f"missing: {', '.join(gone)}. Download ILSVRC2012_img_train.tar")
    monkeypatch.setenv("PERMASK_DATA", "sets")
    for root in ("sets/imagenet", None):
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            imagenet(root)


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PERMASK_DATA", str(tmp_path))
    write_imagenet(tmp_path / "imagenet", 2, 2, 1, size=8)
    for root in (None, "", tmp_path / "imagenet"):
        train, val, shape, _ = imagenet(root)
        assert (len(train), len(val), shape) == (4, 2, (3, 224, 224)) and 1 <= train.readers <= 8


@pytest.mark.parametrize("options, message", [
    ({"image_size": 0}, "image_size is 0: expected an integer of at least 1"),
    ({"image_size": 22.5}, "image_size is 22.5: expected"),
    ({"readers": -1}, "readers is -1: expected an integer of at least 0"),
    ({"readers": "all"}, "readers is 'all': expected"),
])
def test_options_out_of_range(root, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        imagenet(root, **options)


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A tiny ImageNet as it is published: an archive of archives of classes, a flat one, and what names the classes."""
    made, root = tmp_path / "made", tmp_path / "root"
    write_imagenet(made, 3, 4, 2, size=8)
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as train:
        for folder in (made / "train").iterdir():
            with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as one:
                for file in folder.iterdir():
                    one.add(file, file.name)
            train.add(tmp_path / f"{folder.name}.tar", f"{folder.name}.tar")
    images = sorted((made / "val").glob("*/*"), key=lambda file: int(file.stem.split("_")[1]))
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as val:
        for i, file in enumerate(images, 1):
            val.add(file, f"ILSVRC2012_val_{i:08}.JPEG")
    (made / "meta.bin").rename(root / "meta.bin")
    for name, (file, _) in torchvision.datasets.imagenet.ARCHIVE_META.items():
        monkeypatch.setitem(torchvision.datasets.imagenet.ARCHIVE_META, name, (file, None))
    return root


def test_archives_are_unpacked_where_folders_are_missing(tmp_path, archives):
    splits = imagenet(archives, image_size=8, readers=0)[:2]
    for split, expected in zip(splits, imagenet(tmp_path / "made", image_size=8, readers=0)[:2]):
        one, other = (together(part, in_order(part, 50)) for part in (split, expected))
        assert all(torch.equal(*pair) for pair in zip(one, other))
    assert sorted(path.name for path in archives.iterdir() if path.is_dir()) == ["train", "val"]
    for archive in archives.glob("*.tar"):
        archive.unlink()
    assert len(imagenet(archives)[0]) == 12


def test_an_interrupted_unpacking_is_no_set(archives, monkeypatch):
    known = torchvision.datasets.imagenet
    unpack, calls = known.extract_archive, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return unpack(*arguments, **options)

    monkeypatch.setattr(known, "extract_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imagenet(archives)
    assert not (archives / "train").exists() and not (archives / "val").exists()
    train, val, _, _ = imagenet(archives)
    assert (len(train), len(val)) == (12, 6)
    assert sorted(path.name for path in archives.iterdir() if path.is_dir()) == ["train", "val"]


def test_archives_other_than_the_published_ones(archives, monkeypatch):
    file = torchvision.datasets.imagenet.ARCHIVE_META["val"][0]
    monkeypatch.setitem(torchvision.datasets.imagenet.ARCHIVE_META, "val", (file, "0" * 32))
    with pytest.raises(RuntimeError, match=f"archive {file} is not present .* or is corrupted"):
        imagenet(archives)
    (archives / "meta.bin").unlink()
    with pytest.raises(RuntimeError, match="archive ILSVRC2012_devkit_t12.tar.gz is not present"):
        imagenet(archives)
