"""Notebooks run in this process: their code cells one after the other, with parameters of the test's.

A kernel takes seconds to start and to import what is imported here already. The book runs every notebook in a kernel;
what a notebook refuses, shows and leaves on disk can be seen without one.
"""

import ast
import contextlib
import html
import io
import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import nbformat

from permask_core.display import control, figures

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
BLANK = '<svg data-letters="10" data-cuts="0 9" width="9pt" height="9pt" xmlns="http://www.w3.org/2000/svg"></svg>'


def run(name, given, folder=".", *, until=None, after=None, display="static", draw=True):
    """Run a notebook.

    Parameters
    ----------
    name : str
    given : dict
        Values of its parameters. One that it does not have is an error.
    folder : path-like
        The working directory meanwhile.
    until : str, optional
        Id or tag of the last cell to run; by default all are run.
    after : dict of str to callable, optional
        By the id of a cell what is done after it, with the notebook's names: a change of a result.
    display : str
        Whether its controls are those of a page of the book (``static``) or widgets (``live``).
    draw : bool
        If False, figures are made but not written as SVG, which takes half of the time of many pages.

    Returns
    -------
    SimpleNamespace
        ``shown``: by the id of each cell that was run, what it printed and displayed, as text or HTML; ``complaints``:
        what went to standard error, and warnings that a kernel would show; ``space``: the notebook's names.
    """
    cells = [cell for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
             if cell.cell_type == "code"]
    tags = [{cell.id, *cell.metadata.get("tags", [])} for cell in cells]
    last = len(cells) if until is None else 1 + next(i for i, own in enumerate(tags) if until in own)
    found = SimpleNamespace(shown={}, complaints="", space={"__name__": "__main__"})
    errors = io.StringIO()
    with (contextlib.ExitStack() as stack, contextlib.chdir(folder), patch.dict(os.environ, PERMASK_DISPLAY=display),
          patch("IPython.display.display", _display), contextlib.redirect_stderr(errors),
          warnings.catch_warnings(record=True) as heard):
        for place in () if draw else (control, figures):
            stack.enter_context(patch.object(place, "svg", lambda figure: BLANK))
        warnings.simplefilter("default")
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)
        for cell, own in list(zip(cells, tags))[:last]:
            found.shown[cell.id] = _shown(cell.source, f"{name}.ipynb, {cell.id}", found.space)
            if "parameters" in own:
                assert given.keys() <= found.space.keys(), f"{name} lacks {given.keys() - found.space.keys()}"
                found.space.update(given)
            if cell.id in (after or {}):
                after[cell.id](found.space)
    found.complaints = errors.getvalue() + "".join(f"{one.category.__name__}: {one.message}\n" for one in heard)
    return found


def _display(*objects, **_):
    for one in objects:
        print(getattr(one, "_repr_html_", one.__repr__)())


def _shown(source, where, space):
    """What a cell prints and displays, its last expression included."""
    body = ast.parse(source, where).body
    value = body.pop().value if body and isinstance(body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(compile(ast.Module(body, []), where, "exec"), space)
        last = value and eval(compile(ast.Expression(value), where, "eval"), space)
        if last is not None:
            _display(last)
    return text.getvalue()


def shown_table(found, cell):
    """The rows of the table below a cell, as the reader sees them."""
    return [[html.unescape(text) for text in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", found.shown[cell])]
