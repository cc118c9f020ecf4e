"""A bar where somebody watches, and every item either way."""

import pytest

from permask_core.progress import progress

MARKS = ("PERMASK_DISPLAY", "JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG")


@pytest.mark.parametrize("display, terminal, description, shown", [
    ("", True, "work", True), ("", False, "work", False), ("live", False, "work", True),
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
