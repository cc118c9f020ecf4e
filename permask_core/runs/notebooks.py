"""Notebooks as files: the claims in the outputs of an executed one, and the version of its code.

This module imports nothing slow, so that a program which executes notebooks starts at once.
"""

import ast
import hashlib
import json
from pathlib import Path

KEY = "permask_claim"  # a claim, in the metadata of an output
PAGE = "PERMASK_PAGE"  # environment variable: "name@version" of a notebook that runs with its committed parameters


def read_claims(notebook):
    """Read the claims of an executed notebook.

    Parameters
    ----------
    notebook : path-like
        An .ipynb file with its outputs.

    Returns
    -------
    list of dict
        In reading order: ``sentence``, ``holds`` (bool) and ``evidence``.

    Raises
    ------
    ValueError
        If a sentence is claimed twice on the page, because both would have the same rate.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf8"))["cells"]
    found = [output["metadata"][KEY] for cell in cells for output in cell.get("outputs", [])
             if KEY in output.get("metadata", {})]
    sentences = [one["sentence"] for one in found]
    for sentence in sentences:
        if sentences.count(sentence) > 1:
            raise ValueError(f"{notebook} claims {sentence!r} {sentences.count(sentence)} times: expected each "
                             "sentence once on a page")
    return found


def notebook_version(notebook):
    """Return a hash of a notebook's code without comments and layout. The rates of its claims belong to this
    version."""
    cells = json.loads(Path(notebook).read_text(encoding="utf8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells
            if cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", [])]
    return hashlib.sha256("\n".join(map(_without_layout, code)).encode()).hexdigest()[:16]


def _without_layout(code):
    try:
        return ast.dump(ast.parse(code))
    except SyntaxError:  # a magic of IPython's, or a cell that fails anyway
        return code
