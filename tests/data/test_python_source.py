"""The text is that of files of the Python that runs; labels are the next characters; splits share no file."""

import sysconfig
from pathlib import Path

import pytest
import torch

from permask_core.data import check_files, load_dataset, python_source
from permask_core.data.python_source import ALPHABET, decoded


@pytest.fixture(scope="module")
def text():
    return load_dataset("python_source", length=50, n_train=300, n_test=40)


def test_windows_are_text_of_the_library_and_labels_the_next_characters(text):
    assert text.input_shape == (50,) and text.classes == 97
    assert text.train.x.shape == text.train.y.shape == (300, 50) and text.test.x.shape == (40, 50)
    assert torch.equal(text.train.x[:, 1:], text.train.y[:, :-1])
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path.read_bytes().decode("latin-1").replace("\r\n", "\n") for path in folder.rglob("*.py")
             if "site-packages" not in path.parts]
    for split in (text.train, text.test):
        windows = [decoded(torch.cat([x[:1], y])) for x, y in zip(split.x[::7], split.y[::7])]
        plain = [window for window in windows if "\N{REPLACEMENT CHARACTER}" not in window]
        found = [any(window in file for file in files) for window in plain]
        assert len(plain) > 0.9 * len(windows) and sum(found) > 0.9 * len(found)  # a few span two files


def test_windows_do_not_overlap_and_more_of_them_are_others():
    one, more = (load_dataset("python_source", length=20, n_train=n, n_test=5).train for n in (100, 1000))
    assert len({decoded(x) for x in one.x}) > 90 and len({decoded(x) for x in more.x}) > 900
    everything = load_dataset("python_source", length=100_000, n_train=20, n_test=2).train
    assert torch.equal(everything.x[0, 1:], everything.y[0, :-1]) and "import " in decoded(everything.x[0])


def test_every_byte_is_a_class():
    letters = decoded(torch.arange(97))
    assert letters == ALPHABET + "\N{REPLACEMENT CHARACTER}" and len({*letters}) == 97


def test_too_many_windows_and_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"n_test is 1000000: expected at most \d+, the number of windows of 64 char"):
        load_dataset("python_source", n_test=1_000_000)
    with pytest.raises(ValueError, match="length is 0: expected an integer of at least 1"):
        load_dataset("python_source", length=0)


def test_a_python_without_sources_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(python_source.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=f"no argparse.py in {tmp_path}: expected the source files"):
        check_files("python_source")
