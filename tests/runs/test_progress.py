"""A bar where somebody watches, and every item either way."""

import pytest

from permask_core.runs import progress as module
from permask_core.runs.progress import progress

MARKS = ("PERMASK_DISPLAY", "JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG")


@pytest.mark.parametrize("display, terminal, description, shown", [
    ("", True, "work", True), ("live", False, "work", True),
    ("static", True, "work", False), ("live", True, None, False),
])
def test_a_bar_is_shown_to_those_who_watch(monkeypatch, display, terminal, description, shown):
    for mark in MARKS:
        monkeypatch.delenv(mark, raising=False)
    monkeypatch.setenv("PERMASK_DISPLAY", display)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    bar = progress(iter(range(3)), description, total=3)
    assert bar.disable != shown
    assert list(bar) == [0, 1, 2]


@pytest.mark.parametrize("display, description, shown", [
    ("", "work", ["work: 1 of 3 in 0 min", "work: 2 of 3 in 0 min", "work: 3 of 3 in 0 min"]), ("static", "work", []),
    ("", None, [])])
def test_long_work_that_nobody_watches_prints_lines(monkeypatch, capsys, display, description, shown):
    for mark in MARKS:
        monkeypatch.delenv(mark, raising=False)
    monkeypatch.setenv("PERMASK_DISPLAY", display)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert list(progress(range(3), description)) == [0, 1, 2]
    assert capsys.readouterr().out == ""  # it took no minute
    monkeypatch.setattr(module, "SECONDS", 0)
    assert list(progress(range(3), description)) == [0, 1, 2]
    assert capsys.readouterr().out.splitlines() == shown
