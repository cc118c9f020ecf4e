"""Tensors on disk: what was written comes back, and nothing else is ever believed or executed."""

import os
import pickle
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from permask_core.runs.files import load_tensors, locked, read_record, save_tensors, write_whole

ROOT = Path(__file__).parents[2]

dtypes = st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16])
shapes = st.lists(st.integers(0, 3), max_size=3)
some_tensor = st.builds(lambda dtype, shape: torch.ones(shape).to(dtype), dtypes, shapes)
tensors = st.dictionaries(st.text(min_size=1).filter(lambda name: name != "__metadata__"), some_tensor, max_size=3)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@given(tensors, st.dictionaries(st.text(), json_values, max_size=3))
def test_round_trip(tmp_path_factory, tensors, record):
    path = tmp_path_factory.mktemp("files") / "some.safetensors"
    save_tensors(path, tensors, record)
    loaded, loaded_record = load_tensors(path)
    assert loaded_record == record
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_views_that_share_memory_and_gradients_are_written(tmp_path):
    base = torch.arange(6.0).view(2, 3).requires_grad_()
    save_tensors(tmp_path / "a", {"base": base, "turned": base.T, "row": base[1]}, {})
    loaded = load_tensors(tmp_path / "a")[0]
    assert loaded["turned"].tolist() == [[0, 3], [1, 4], [2, 5]] and loaded["row"].tolist() == [3, 4, 5]
    assert not loaded["base"].requires_grad


def test_changing_what_was_loaded_leaves_the_file(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.ones(1000)}, {})
    load_tensors(tmp_path / "a")[0]["x"].mul_(7)
    assert load_tensors(tmp_path / "a")[0]["x"].unique().tolist() == [1]


def test_every_truncation_is_refused(tmp_path):
    save_tensors(tmp_path / "whole", {"x": torch.ones(20)}, {"some": "record"})
    content = (tmp_path / "whole").read_bytes()
    for size in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut is damaged"):
            load_tensors(tmp_path / "cut")
    load_tensors(tmp_path / "whole")


@given(st.data())
def test_every_flipped_bit_is_refused(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "flipped")
        save_tensors(path, {"x": torch.arange(20.0), "mask": torch.tensor([True, False])}, {"some": "record"})
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, 8 * len(content) - 1))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="flipped"):
            load_tensors(path)


def test_the_record_alone(tmp_path):
    save_tensors(tmp_path / "a", {"x": torch.ones(3)}, {"some": ["record", 1]})
    assert read_record(tmp_path / "a") == load_tensors(tmp_path / "a")[1] == {"some": ["record", 1]}
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        read_record(tmp_path / "a")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "permask 1"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path, metadata):
    save_file({"x": torch.ones(3)}, tmp_path / "foreign", metadata=metadata)
    with pytest.raises(ValueError, match="foreign.*expected 'permask 2'"):
        load_tensors(tmp_path / "foreign")


class Payload:
    """Unpickling one makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("dump", [lambda value, path: path.write_bytes(pickle.dumps(value)), torch.save])
def test_a_pickle_is_refused_and_never_loaded(tmp_path, dump):
    path, marker = tmp_path / "evil.safetensors", tmp_path / "executed"
    dump(Payload(marker), path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_tensors(path)
    assert not marker.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False) if dump is torch.save else pickle.load(file)
    assert marker.exists()  # the payload was a live one


@pytest.mark.parametrize("name", ["missing", "."])
def test_no_such_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tensors(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(ZeroDivisionError), write_whole(tmp_path / "kept") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_text() == "old"


def test_others_may_read_as_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        save_tensors(tmp_path / "deep" / "a", {}, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "deep" / "a").stat().st_mode) == 0o640


def test_a_record_that_is_no_dict_is_refused(tmp_path):
    save_tensors(tmp_path / "list.safetensors", {"x": torch.ones(1)}, [1])
    with pytest.raises(ValueError, match="its record is not a dict"):
        load_tensors(tmp_path / "list.safetensors")


HOLDER = """
import sys, time
from permask_core.runs.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A path, and another process that holds its lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "file"], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        assert process.stdout.readline() == "held\n"
        yield tmp_path / "file", process
        process.kill()


def test_a_lock_ends_with_its_process_and_leaves_no_file(held, monkeypatch):
    path, process = held
    told = []

    def tell(message, **_):
        told.append(message)
        process.kill()

    monkeypatch.setattr("builtins.print", tell)
    with locked(path, "somebody is at it"):
        assert told == ["somebody is at it"] and process.wait() == -signal.SIGKILL
        assert path.with_name("file.lock").exists()
    assert list(path.parent.iterdir()) == []


def test_one_at_a_time(tmp_path):
    """Counters in a file, read and written by several threads with locks of their own."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(50):
            with locked(counter):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "200" and list(tmp_path.iterdir()) == [counter]


def test_an_error_lets_the_lock_go(tmp_path):
    with pytest.raises(KeyError):
        with locked(tmp_path / "deep" / "deeper" / "file"):
            raise KeyError
    assert list(tmp_path.iterdir()) == []  # nor folders
    with locked(tmp_path / "deeper" / "file"):
        assert (tmp_path / "deeper" / "file.lock").exists()
