"""Choices of loops: measured once, kept on disk, and never a reason to fail."""

import json
import time

import pytest

from permask_core.sparse.kernels import choice, cpu
from permask_core.sparse.kernels.choice import TUNE, choose


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(TUNE, raising=False)
    return choice.path()


def calls(slow="a"):
    counts = {"a": 0, "b": 0}

    def call(name):
        counts[name] += 1
        time.sleep(2e-3 * (name == slow))

    return {name: lambda name=name: call(name) for name in counts}, counts


def test_the_fastest_is_kept_and_not_measured_again(cache):
    given, _ = calls()
    assert choose("loop", given, rule="a", repeats=1) == "b"
    assert json.loads(cache.read_text()) == {"loop": "b"}
    given, counts = calls(slow="b")
    assert choose("loop", given, rule="a") == "b" and counts == {"a": 0, "b": 0}
    assert choose("another", given, rule="a", repeats=1) == "a"  # of another processor or version
    assert json.loads(cache.read_text()) == {"loop": "b", "another": "a"}


@pytest.mark.parametrize("content", ["{", "[1]", '{"loop": "c"}', '{"loop": ["b"]}', "\x00"])
def test_a_damaged_or_foreign_file_is_measured_again(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    assert choose("loop", calls()[0], rule="a", repeats=1) == "b"
    assert json.loads(cache.read_text())["loop"] == "b"


def test_false_is_not_the_name_0(cache):
    cache.parent.mkdir()
    cache.write_text('{"loop": false}')
    assert type(choose("loop", {0: lambda: time.sleep(2e-3), 1: lambda: None}, rule=0, repeats=1)) is int
    assert json.loads(cache.read_text()) == {"loop": 1}


def test_no_folder_to_write_to(cache):
    cache.parent.write_text("a file in the place of the folder")
    assert choose("loop", calls()[0], rule="a", repeats=1) == "b"


def test_without_measuring_the_rule_decides(monkeypatch):
    monkeypatch.setenv(TUNE, "0")
    given, counts = calls()
    assert choose("loop", given, rule="a") == "a" and counts == {"a": 0, "b": 0}
    monkeypatch.delenv(TUNE)
    assert choose("loop", {"a": given["a"]}, rule="a") == "a" and counts == {"a": 0, "b": 0}  # there is no choice


def test_layers_choose_among_the_loops_of_this_processor(cache):
    simd = pytest.importorskip("permask_core.sparse.kernels.simd")
    widths, rule, _ = simd.lanes()
    assert cpu._lanes.__wrapped__(4) in widths and rule in widths
    assert (len(widths) == 1) == (not cache.exists())
    assert cpu._lanes.__wrapped__(8) == 0
