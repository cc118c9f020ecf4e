"""Notebooks as files: how a program reads the claims of an executed one, and what changes a version."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from permask_core.runs.notebooks import KEY, notebook_version, read_claims


def notebook(*sources, tags=()):
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)}) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def test_program_reads_the_claims_of_an_executed_notebook(tmp_path):
    source = "from permask_core.display import claim\nfor k in (1, 2): claim(f'{k} is odd.', k % 2 == 1, f'k = {k}')"
    book = notebook(source)
    NotebookClient(book).execute()
    nbformat.write(book, tmp_path / "x.ipynb")
    assert read_claims(tmp_path / "x.ipynb") == [{"sentence": "1 is odd.", "holds": True, "evidence": "k = 1"},
                                                 {"sentence": "2 is odd.", "holds": False, "evidence": "k = 2"}]


def test_same_sentence_twice_on_a_page_is_refused(tmp_path):
    one = {"metadata": {KEY: {"sentence": "A is ahead.", "holds": True, "evidence": "n = 3"}}}
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": [{"outputs": [one]}, {}, {"outputs": [one]}]}))
    with pytest.raises(ValueError, match="x.ipynb claims 'A is ahead.' 2 times: expected each sentence once"):
        read_claims(tmp_path / "x.ipynb")


def version(tmp_path, *sources, **options):
    nbformat.write(notebook(*sources, **options), tmp_path / "x.ipynb")
    return notebook_version(tmp_path / "x.ipynb")


def test_version_is_of_the_code_not_of_its_layout(tmp_path):
    one = version(tmp_path, "x = 1  # a comment", "f(x, 2)")
    assert version(tmp_path, "x = 1", "f(\n    x,\n    2,\n)") == one
    others = [version(tmp_path, *code) for code in (["x = 2", "f(x, 2)"], ["x = 1"], ["%pip x"])]
    assert len({one, *others}) == 4


def test_version_leaves_out_the_installation_on_a_notebook_service(tmp_path):
    assert version(tmp_path, "%pip install x", tags=["setup"]) == version(tmp_path)
