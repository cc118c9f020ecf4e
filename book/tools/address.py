"""Set the repository's address, which turns the launch buttons on: ``address.py https://github.com/owner/name``.

The address is stored once, as repository.url in _config.yml. On a notebook service the library is missing, so this
script also writes the tagged first cell that installs it there. An empty address removes both.
"""

import re
import sys
from pathlib import Path

import nbformat

ADDRESS = re.compile(r'^(  url: )"(.*)"$', flags=re.MULTILINE)
TAGS = ["setup", "remove-cell"]


def read_address(config: str) -> str:
    """Return repository.url from the text of _config.yml."""
    return ADDRESS.search(config)[2]


def write_address(config: str, url: str) -> str:
    """Return the text of _config.yml with repository.url set to `url`.

    Raises
    ------
    ValueError
        If `url` is neither empty nor ``https://github.com/owner/name`` (Colab opens notebooks only from GitHub), or
        `config` has no line for it.
    """
    if url and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"the address is {url!r}: expected https://github.com/owner/name or an empty text")
    changed, count = ADDRESS.subn(rf'\g<1>"{url}"', config)
    if count != 1:
        raise ValueError(f'_config.yml should have one line \'  url: "..."\' under repository, found {count}')
    return changed


def setup_cell(url: str) -> nbformat.NotebookNode:
    """Return the code cell that installs permask_core from the repository `url` if it is missing."""
    source = (
        "# On a notebook service: install the library. Elsewhere it is there already, and this does nothing.\n"
        "import importlib.util\n\n"
        'if importlib.util.find_spec("permask_core") is None:\n'
        f'    %pip install --quiet "permask[book] @ git+{url}"'
    )
    return nbformat.v4.new_code_cell(source, id="setup", metadata={"tags": TAGS})


def with_setup(notebook: nbformat.NotebookNode, url: str) -> nbformat.NotebookNode:
    """Return `notebook` with the set-up cell for `url` first, or with none if `url` is empty."""
    rest = [cell for cell in notebook.cells if "setup" not in cell.metadata.get("tags", [])]
    return nbformat.from_dict({**notebook, "cells": [setup_cell(url), *rest] if url else rest})


def main(url: str) -> None:
    """Write `url` into _config.yml and the set-up cell into every notebook that lacks the right one."""
    config = Path("_config.yml")
    config.write_text(write_address(config.read_text(encoding="utf8"), url.rstrip("/")), encoding="utf8")
    for path in sorted(Path("notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        if (changed := with_setup(notebook, url.rstrip("/"))) != notebook:
            nbformat.write(changed, path)
            print(f"wrote the set-up cell of {path}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(str(error))
