"""CIFAR's files: the images that torchvision reads, without running what a file asks for; clear errors otherwise."""

import pickle
import re
import subprocess
import sys
import tarfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch

from permask_core.data.cifar import cifar10, cifar100
from permask_core.data.root import data_root
from permask_core.data.splits import channel_moments, in_order
from permask_core.models.vision import torchvision
from tests.data.files import serving, write_cifar

NAMES = {"cifar10": (cifar10, torchvision.datasets.CIFAR10), "cifar100": (cifar100, torchvision.datasets.CIFAR100)}

IMAGES = np.zeros((4, 3072), np.uint8)


def files(published):
    return [*(file for file, _ in (*published.train_list, *published.test_list)), published.meta["filename"]]


@pytest.fixture
def publish(monkeypatch):
    """Let torchvision take the files of a folder for the published ones."""

    def publish(published, folder):
        def sums(listed):
            return [[file, md5((folder / file).read_bytes()).hexdigest()] for file, _ in listed]

        monkeypatch.setattr(published, "train_list", sums(published.train_list))
        monkeypatch.setattr(published, "test_list", sums(published.test_list))
        meta = md5((folder / published.meta["filename"]).read_bytes()).hexdigest()
        monkeypatch.setattr(published, "meta", {**published.meta, "md5": meta})

    return publish


@pytest.mark.parametrize("name, sizes", [("cifar10", (103, 21)), ("cifar10", (5, 1)), ("cifar100", (150, 1))])
def test_the_same_as_torchvision(tmp_path, publish, name, sizes):
    load, published = NAMES[name]
    publish(published, write_cifar(tmp_path, name, *sizes))
    *splits, shape, classes = load(tmp_path)  # with its check of md5 sums
    assert shape == (3, 32, 32) and classes == {"cifar10": 10, "cifar100": 100}[name]
    for split, training, size in zip(splits, (True, False), sizes):
        reference = published(tmp_path, train=training)
        assert split.x.dtype == torch.uint8 and split.y.dtype == torch.int64 and len(split) == size
        assert np.array_equal(split.x.numpy().transpose(0, 2, 3, 1), reference.data)
        assert split.y.tolist() == reference.targets and len(reference.classes) == classes


def test_standardised_by_the_training_images_and_augmented_in_training_only(tmp_path):
    write_cifar(tmp_path, "cifar10")
    train, test, _, _ = cifar10(tmp_path, verify=False)
    assert (train.mean, train.sd) == (test.mean, test.sd) == channel_moments(train.x)
    assert (train.pad, train.flip, test.pad, test.flip) == (4, True, 0, False)
    (inputs, labels), = train.batches(in_order(train, len(train)))
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-5 and torch.equal(labels, train.y)


@pytest.mark.parametrize("order, kind", [(np.ascontiguousarray, "<i8"), (np.asfortranarray, ">i2")])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_files_of_any_pickle_protocol(tmp_path, protocol, order, kind):
    """The helper writes what Python 2 wrote; a set that is changed today is written by today's numpy."""
    folder = write_cifar(tmp_path, "cifar100", 10, 10)
    expected = cifar100(tmp_path, verify=False)
    for file in files(torchvision.datasets.CIFAR100):
        entry = pickle.loads((folder / file).read_bytes(), encoding="latin1")
        if "data" in entry:
            entry["data"] = order(entry["data"])
            entry["fine_labels"] = np.array(entry["fine_labels"], kind)
        (folder / file).write_bytes(pickle.dumps(entry, protocol))
    found = cifar100(tmp_path, verify=False)
    for one, other in zip(expected[:2], found[:2]):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)


class Trap:
    def __reduce__(self):
        return Path.touch, (self.path,)


def trap(path):
    made = Trap()
    made.path = path
    return made


CALLS = [
    (b"cos\nsystem\n(S'touch %b'\ntR.", "os.system"),
    (b"cbuiltins\neval\n(S'open(\"%b\", \"w\")'\ntR.", "builtins.eval"),
    (b"c__builtin__\nexec\n(S'open(\"%b\", \"w\")'\ntR.", "__builtin__.exec"),  # as Python 2 called it
    (b"cnumpy.core.multiarray\nfromfile\n(S'%b'\ntR.", "numpy.core.multiarray.fromfile"),
    (b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93.", "numpy.ndarray.__reduce__"),
]


@pytest.mark.parametrize("call, named", CALLS, ids=[named for _, named in CALLS])
def test_what_a_file_asks_for_is_not_run(tmp_path, call, named):
    folder, sign = write_cifar(tmp_path, "cifar10"), tmp_path / "sign"
    for file in ("data_batch_3", "batches.meta"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(call.replace(b"%b", str(sign).encode()))
        with pytest.raises(ValueError, match=f"{re.escape(str(folder / file))} is damaged.*uses {re.escape(named)},"):
            cifar10(tmp_path, verify=False)
        (folder / file).write_bytes(content)
    assert not sign.exists()


def test_a_trap_beside_the_images_is_found(tmp_path):
    folder, sign = write_cifar(tmp_path, "cifar10"), tmp_path / "sign"
    entry = pickle.loads((folder / "test_batch").read_bytes(), encoding="latin1")
    (folder / "test_batch").write_bytes(pickle.dumps({**entry, "more": [trap(sign)]}))
    with pytest.raises(ValueError, match="test_batch is damaged.*it uses"):
        cifar10(tmp_path, verify=False)
    assert not sign.exists()
    pickle.loads((folder / "test_batch").read_bytes())  # the trap works where it is trusted
    assert sign.exists()


class Bytes(np.ndarray):
    """Pickles as an array of objects at the addresses that its bytes name, as numpy would believe."""

    def __reduce__(self):
        rebuild, arguments, (version, shape, _, order, raw) = np.asarray(self).__reduce__()
        return rebuild, arguments, (version, (len(self) // 8,), Objects(), order, raw)


class Objects:
    def __reduce__(self):
        kind, arguments, (*state, _) = np.dtype(object).__reduce__()
        return kind, arguments, (*state, 0)  # without the flags that say what they are


def test_forged_objects_are_refused(tmp_path):
    path = write_cifar(tmp_path, "cifar10") / "test_batch"
    forged = pickle.dumps({"data": IMAGES, "labels": IMAGES[0, :32].view(Bytes)}, 4)
    assert pickle.loads(forged)["labels"].dtype.kind == "O"  # whose elements lie where bytes of the file say
    path.write_bytes(forged)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged .*OBJECT array"):
        cifar10(tmp_path, verify=False)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:1], lambda content: content[:len(content) // 2],
    lambda content: content[:-1], lambda content: b"<html>404 Not Found</html>",
    lambda content: content.replace(b"numpy\ndtype", b"numpy\ndtypo"),
])
def test_damaged_files_are_named(tmp_path, damage):
    folder = write_cifar(tmp_path, "cifar10")
    for file in ("data_batch_5", "test_batch"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(damage(content))
        with pytest.raises(ValueError, match=f"{re.escape(str(folder / file))} is damaged .*: delete it and load"):
            cifar10(tmp_path, verify=False)
        (folder / file).write_bytes(content)



@pytest.mark.parametrize("entry, message", [
    ([], "{} holds list: expected a dict with 'data' and 'labels'"),
    ({"data": IMAGES, "fine_labels": [0] * 4}, "{} has the keys ['data', 'fine_labels']: expected a dict with"),
    ({"data": IMAGES.tolist(), "labels": [0] * 4}, "'data' in {} is list: expected uint8 [n, 3072] with n at least 1"),
    ({"data": IMAGES.astype(float), "labels": [0] * 4}, "'data' in {} is float64 [4, 3072]: expected uint8"),
    ({"data": IMAGES[:, :-1], "labels": [0] * 4}, "'data' in {} is uint8 [4, 3071]: expected"),
    ({"data": IMAGES.reshape(4, 3, 32, 32), "labels": [0] * 4}, "'data' in {} is uint8 [4, 3, 32, 32]: expected"),
    ({"data": IMAGES[:0], "labels": []}, "'data' in {} is uint8 [0, 3072]: expected"),
    ({"data": IMAGES, "labels": [0] * 3}, "'labels' in {} is 3 of them: expected a list with one for each of the 4"),
    ({"data": IMAGES, "labels": "0123"}, "'labels' in {} is str: expected a list"),
    ({"data": IMAGES, "labels": [0, 1, 2, 10]}, "'labels' in {} has the label 10: expected integers from 0 to 9"),
    ({"data": IMAGES, "labels": [0, 1, -1, 9]}, "'labels' in {} has the label -1: expected integers from 0 to 9"),
    ({"data": IMAGES, "labels": [0, 1, 2.5, 9]}, "'labels' in {} has the label 2.5: expected integers"),
    ({"data": IMAGES, "labels": [0, [1], 2, 3]}, "'labels' in {} has the label [1]: expected integers"),
    ({"data": IMAGES, "labels": np.zeros((4, 2), int)}, "'labels' in {} has the label array([0, 0]): expected"),
])
def test_something_else_than_images_and_labels(tmp_path, entry, message):
    path = write_cifar(tmp_path, "cifar10") / "data_batch_2"
    path.write_bytes(pickle.dumps(entry))
    with pytest.raises(ValueError, match=re.escape(message.replace("{}", str(path)))):
        cifar10(tmp_path, verify=False)


@pytest.mark.parametrize("names", [[], 10])
def test_classes_without_names(tmp_path, names):
    path = write_cifar(tmp_path, "cifar10") / "batches.meta"
    path.write_bytes(pickle.dumps({"label_names": names}))
    with pytest.raises(ValueError, match=re.escape(f"'label_names' in {path} is {names!r}: expected a list of names")):
        cifar10(tmp_path, verify=False)


def test_another_set_than_the_published_one(tmp_path, publish):
    folder = write_cifar(tmp_path, "cifar10")
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}/data_batch_1 is not the published file .*expected "
                                         "c99cafc152244af753f735de768cd75f.*accept it with verify=False"):
        cifar10(tmp_path)
    publish(torchvision.datasets.CIFAR10, folder)
    with open(folder / "batches.meta", "ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="batches.meta is not the published file"):
        cifar10(tmp_path)
    assert len(cifar10(tmp_path, verify=False)[0]) == 100


@pytest.mark.parametrize("name", NAMES)
def test_missing_files_are_named(tmp_path, monkeypatch, name):
    load, published = NAMES[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as found:
        load("sets")
    for part in (str(tmp_path / "sets"), published.base_folder, *files(published), published.url, "download=True"):
        assert part in str(found.value)
    assert not (tmp_path / "sets").exists()
    folder = write_cifar(tmp_path, name)
    (folder / files(published)[-1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"missing: {files(published)[-1]}. Load it"):
        load(tmp_path)


def test_where_sets_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERMASK_DATA", raising=False)
    assert data_root() == data_root("") == tmp_path / "data"
    monkeypatch.setenv("PERMASK_DATA", "elsewhere")
    assert data_root() == tmp_path / "elsewhere" and data_root("here") == tmp_path / "here"
    assert data_root("~/sets") == Path.home() / "sets"
    write_cifar(tmp_path / "elsewhere", "cifar10")
    assert len(cifar10(verify=False)[1]) == 50


@pytest.fixture
def served(tmp_path, monkeypatch, publish):
    """A tiny CIFAR-10 that torchvision downloads from this machine: its archive."""
    folder = write_cifar(tmp_path / "made", "cifar10")
    archive = tmp_path / "made" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    with serving(archive.parent) as address:
        published = torchvision.datasets.CIFAR10
        monkeypatch.setattr(published, "url", f"{address}/{archive.name}")
        monkeypatch.setattr(published, "tgz_md5", md5(archive.read_bytes()).hexdigest())
        publish(published, folder)
        yield archive


def test_download(tmp_path, served):
    root = tmp_path / "new" / "root"
    train, _, _, _ = cifar10(root, download=True)
    assert torch.equal(train.x, cifar10(tmp_path / "made")[0].x)
    assert [entry.name for entry in root.iterdir()] == ["cifar-10-batches-py"]
    # Once it is there, nothing is fetched; and what is there stays, when a part is missing.
    (root / "cifar-10-batches-py" / "data_batch_4").unlink()
    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"mine")
    with pytest.raises(ValueError, match="data_batch_1 is not the published file"):
        cifar10(root, download=True)
    assert (root / "cifar-10-batches-py" / "data_batch_4").is_file()
    served.unlink()
    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(
        (tmp_path / "made" / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    assert len(cifar10(root, download=True)[0]) == 100


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:1000])])
def test_a_failed_download_leaves_nothing(tmp_path, served, damage):
    damage(served)
    root = tmp_path / "root"
    url = re.escape(torchvision.datasets.CIFAR10.url)
    with pytest.raises(OSError, match=f"cannot download {url} into {re.escape(str(root))} .*unpack it in"):
        cifar10(root, download=True)
    assert list(root.iterdir()) == []


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", "http://127.0.0.1:1/cifar-100-python.tar.gz")
    with pytest.raises(OSError, match="cannot download http://127.0.0.1:1/.*refused.*without network access"):
        cifar100(tmp_path, download=True)


def test_what_is_slow_to_import_is_not_imported_before_it_is_needed():
    code = "import sys; from permask_core.data import load_dataset; load_dataset('digits'); print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'permask_core.data.digits'" in modules and "'permask_core.data.hatexplain'" not in modules
    assert "'torchvision'" not in modules and "'transformers'" not in modules
