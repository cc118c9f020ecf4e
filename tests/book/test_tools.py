"""The scripts that install, execute, address and pack the book."""

import os
import sys
from pathlib import Path
from zipfile import ZipFile

import nbformat
import pytest
import yaml

from book.tools import address, execute, install, pack
from book.tools.book_extension import unbroken

ROOT = Path(__file__).parents[2]
URL = "https://github.com/owner/name"
CONFIG = 'title: x\nrepository:\n  url: ""\n  branch: main\n'


def notebook(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


# address.py


def test_address_is_the_one_that_jupyter_book_reads():
    text = (ROOT / "_config.yml").read_text(encoding="utf8")
    assert yaml.safe_load(address.write_address(text, URL))["repository"]["url"] == URL
    assert address.read_address(text) == yaml.safe_load(text)["repository"]["url"]


def test_address_is_written_and_removed_again():
    assert address.read_address(address.write_address(CONFIG, URL)) == URL
    assert address.write_address(address.write_address(CONFIG, URL), "") == CONFIG


@pytest.mark.parametrize("url", ["github.com/owner/name", "https://gitlab.com/owner/name", "https://github.com/owner"])
def test_address_elsewhere_is_refused_by_name(url):
    with pytest.raises(ValueError, match=url):
        address.write_address(CONFIG, url)


def test_config_without_the_address_is_refused():
    with pytest.raises(ValueError, match="repository"):
        address.write_address("title: x\n", URL)


def test_setup_cell_is_first_and_only_one():
    once = address.with_setup(notebook("1 + 1"), URL)
    assert [cell.metadata.get("tags") for cell in once.cells] == [["setup", "remove-cell"], None]
    assert f"git+{URL}" in once.cells[0].source
    moved = address.with_setup(once, "https://github.com/other/name")
    assert len(moved.cells) == 2 and "other" in moved.cells[0].source
    nbformat.validate(moved)


def test_empty_address_gives_the_notebook_back():
    plain = notebook("1 + 1")
    assert address.with_setup(address.with_setup(plain, URL), "") == plain


def test_main_writes_config_and_notebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notebooks").mkdir()
    Path("_config.yml").write_text(CONFIG)
    nbformat.write(notebook("1 + 1"), "notebooks/x.ipynb")
    address.main(URL + "/")
    assert address.read_address(Path("_config.yml").read_text()) == URL
    assert len(nbformat.read("notebooks/x.ipynb", as_version=4).cells) == 2


# install.py


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder in place of .venv."""
    monkeypatch.setattr(install, "VENV", tmp_path)
    return tmp_path


def commands_of_main(monkeypatch, *, gpu, answers):
    """The pip commands that install.main would run on a Linux machine."""
    commands = []

    def run(command, log):
        commands.append(command[4:])
        return 0

    monkeypatch.setattr(install, "run", run)
    monkeypatch.setattr(install.venv, "create", lambda *args, **kwargs: None)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(install, "answers", lambda index: answers)
    monkeypatch.setattr(sys, "platform", "linux")
    install.main()
    return commands


def test_cpu_builds_are_taken_without_a_gpu(room, monkeypatch):
    first, *_ = commands_of_main(monkeypatch, gpu=False, answers=True)
    assert install.CPU_INDEX in first and any(pin.startswith("torchvision==") for pin in first)


@pytest.mark.parametrize(("gpu", "answers"), [(True, True), (False, False)])
def test_ordinary_index_serves_otherwise(room, monkeypatch, gpu, answers):
    commands = commands_of_main(monkeypatch, gpu=gpu, answers=answers)
    assert not any("--index-url" in command for command in commands)
    assert ["-r", "requirements.txt", "-c", "constraints.txt"] == commands[0][-4:]


def test_pip_gets_one_line_of_the_terminal_and_a_log(room, capfd):
    chatty = [sys.executable, "-c", "import sys; print('Collecting numpy'); print('a warning', file=sys.stderr)"]
    assert install.run(chatty, room / "pip.log") == 0
    assert "Collecting numpy" in (room / "pip.log").read_text() and "a warning" in (room / "pip.log").read_text()
    assert capfd.readouterr() == ("", "")


def test_failing_pip_stops_the_installation_with_its_last_words(room, monkeypatch):
    words = "No matching distribution found"
    monkeypatch.setattr(install.venv, "create", lambda *args, **kwargs: None)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: True)
    run = install.run
    monkeypatch.setattr(install, "run", lambda command, log: run(
        [sys.executable, "-c", f"import sys; print({words!r}); sys.exit(3)"], log))
    with pytest.raises(SystemExit, match=f"{words}\npip failed with exit status 3"):
        install.main()


def test_silent_index_does_not_answer():
    assert not install.answers("http://127.0.0.1:9", seconds=0.5)


def test_torch_must_be_pinned():
    pins = install.torch_pins("numpy==1\ntorch==2.0\ntorchvision==0.3  # pictures\n")
    assert pins == ["torch==2.0", "torchvision==0.3"]
    with pytest.raises(ValueError, match="torchvision"):
        install.torch_pins("torch==2.0\ntorchvision\n")


def test_every_requirement_is_pinned_once():
    lines = [
        line.split("#")[0].strip()
        for name in ("requirements.txt", "constraints.txt")
        for line in (ROOT / name).read_text().splitlines()
    ]
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines if line]
    assert all("==" in line and "+" not in line for line in lines if line)
    assert len(names) == len(set(names))


def test_binder_takes_the_same_torch():
    binder = (ROOT / ".binder/requirements.txt").read_text()
    assert install.torch_pins(binder) == install.torch_pins((ROOT / "requirements.txt").read_text())


# execute.py


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty project folder with room for figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERMASK_FIGURES", str(tmp_path / "build/figures"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return tmp_path


def executed(*sources, added=0, parameters=""):
    """What failed, and the executed cells, of a notebook of these cells."""
    first = notebook(parameters) if parameters else notebook()
    for cell in first.cells:
        cell.metadata["tags"] = ["parameters"]
    title = nbformat.v4.new_markdown_cell("# Title")
    nbformat.write(nbformat.from_dict({**first, "cells": [title, *first.cells, *notebook(*sources).cells]}), "x.ipynb")
    failure = execute.execute(Path("x.ipynb"), Path("build/source/x.ipynb"), added)
    return failure, nbformat.read("build/source/x.ipynb", as_version=4).cells


def test_executed_notebook_has_outputs_and_leaves_its_files_in_build(workshop, capsys):
    leave = "import os, pathlib\npathlib.Path('left.txt').touch()\nos.path.isdir(os.environ['PERMASK_FIGURES'])"
    failure, cells = executed("1 + 1", leave)
    assert "PERMASK_PAGE" not in os.environ
    assert failure == "" and [cell.outputs[0].data["text/plain"] for cell in cells[1:]] == ["2", "True"]
    assert {path.name for path in workshop.iterdir()} <= {"x.ipynb", "build", "ipython"}
    assert "cell  2 of 2" in capsys.readouterr().out


def test_folded_cells_are_labelled_by_what_they_show():
    def cell(source, *outputs, tags=("hide-input",), **metadata):
        made = nbformat.v4.new_code_cell(source, metadata={"tags": [*tags], **metadata})
        made.outputs = [nbformat.v4.new_output(*one) if isinstance(one, tuple) else
                        nbformat.v4.new_output("display_data", {"text/html": one}) for one in outputs]
        return made

    table, claim = '<figure class="permask-results">', '<div class="permask-claim">'
    found = execute.with_labels(nbformat.v4.new_notebook(cells=[
        cell("import os\n\nfrom a import (\n    b,\n)"), cell("import os\nx = 1", tags=["check", "hide-input"]),
        cell("x = 1"),
        cell("claim()", claim), cell("table()", table, claim), cell("show()", '<figure class="permask-figure">'),
        cell("print(1)", ("stream",)), cell("1", mystnb={"code_prompt_show": "Solution 1"}),
        cell("1", tags=["figure"])]))
    assert [one.metadata.get("mystnb", {}).get("code_prompt_show") for one in found.cells] == [
        "Imports", "Settings", "Code", "Code for these claims", "Code for this table", "Code for this figure",
        "Code for these numbers", "Solution 1", None]


def test_failed_notebook_is_a_page_with_a_notice_that_is_out_of_date(workshop):
    failure, cells = executed("1 + 1", "raise ValueError('no such mask')", "'not reached'")
    assert failure == "code cell 2 failed: ValueError: no such mask"
    assert cells[0].source == "# Title" and "not complete" in cells[1].source and failure in cells[1].source
    assert [bool(cell.outputs) for cell in cells[2:]] == [True, True, False]
    target = workshop / "build/source/x.ipynb"
    assert target.stat().st_mtime < (workshop / "x.ipynb").stat().st_mtime  # the next make runs it again
    assert (workshop / execute.FAILED / "x.ipynb").read_text() == target.read_text()
    assert executed("1 + 1")[0] == "" and not (workshop / execute.FAILED / "x.ipynb").exists()


def test_kernel_that_dies_is_a_failure_with_a_page(workshop):
    failure, cells = executed("1 + 1", "import os; os._exit(1)")
    assert "kernel died" in failure and "not complete" in cells[1].source


@pytest.mark.parametrize("parameter, seed", [("first_seed: int = 3  # of all", 1003),
                                             ("width: float = 3  # of all", 3)])
def test_other_seeds_are_those_of_the_notebook_and_more(workshop, parameter, seed):
    name = parameter.split(":")[0]
    failure, cells = executed(name, parameters=parameter, added=1000)
    assert not failure and cells[-1].outputs[0].data["text/plain"] == str(seed)


def test_sentence_that_is_claimed_twice_is_a_failure(workshop):
    one, two = (f"from permask_core.display import claim\nclaim('{name} is ahead.', True, 'n = 3')" for name in "AB")
    failure, _ = executed(one, two, two)
    assert "claims 'B is ahead.' 2 times" in failure and "A is ahead" not in failure


# pack.py


def test_archive_is_the_same_for_the_same_files(tmp_path):
    (tmp_path / "book/sub").mkdir(parents=True)
    (tmp_path / "book/sub/b.html").write_text("b")
    (tmp_path / "book/a.html").write_text("a")
    pack.pack(tmp_path / "book", tmp_path / "x.zip")
    first = (tmp_path / "x.zip").read_bytes()
    os.utime(tmp_path / "book/a.html", (0, 0))
    pack.pack(tmp_path / "book", tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == first
    assert ZipFile(tmp_path / "x.zip").namelist() == ["x/a.html", "x/sub/b.html"]


def test_numbers_do_not_leave_their_units():
    page = ('<p alt="<b>95 %">At 95 % and <b>95%</b>, n = 3: <code>7 % 2</code>, a%20b, 5%.</p><pre>\nn = 5 %</pre> '
            '<output>90 %</output> n = m')
    changed = {"At 95 %": "At 95_%", "95%": "95_%", "n = 3": "n_=_3", "5%.": "5_%."}
    expected = page
    for old, new in changed.items():
        expected = expected.replace(old, new.replace("_", "\u00a0"))
    assert unbroken(page) == expected
