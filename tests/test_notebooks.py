"""The notebooks as they are committed: no results, one parameters cell, claims that can fail, the right first cell."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from book.tools.address import read_address, with_setup
from book.tools.execute import SEED

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ADDRESS = read_address((ROOT / "_config.yml").read_text(encoding="utf8"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    """Each notebook in turn."""
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook, tag=None):
    """The code cells of `notebook`, or those with `tag`."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag is None or tag in cell.metadata.get("tags", [])]


def test_is_valid(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


def test_holds_no_outputs(notebook):
    executed = [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None]
    assert executed == [], "clear them: .venv/bin/jupyter nbconvert --clear-output --inplace notebooks/*.ipynb"


def test_has_one_parameters_cell_of_annotated_and_explained_names(notebook):
    (cell,) = code_cells(notebook, "parameters")
    statements = ast.parse(cell.source).body
    assert statements and all(isinstance(statement, ast.AnnAssign) for statement in statements)
    lines = cell.source.splitlines()  # papermill reads them line by line
    unexplained = [statement.target.id for statement in statements
                   if statement.lineno != statement.end_lineno or "  # " not in lines[statement.lineno - 1]]
    assert unexplained == []


def claims_of(notebook):
    """The calls of claim() in `notebook`."""
    return [node for cell in code_cells(notebook) for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "claim"]


def test_checks_what_must_hold_or_claims_what_was_found(notebook):
    asserts = [node for cell in code_cells(notebook) for node in ast.walk(ast.parse(cell.source))
               if isinstance(node, ast.Assert)]
    assert asserts or claims_of(notebook)


def test_claims_have_a_sentence_and_evidence_of_their_own(notebook):
    claims = claims_of(notebook)
    sentences = [ast.unparse(call.args[0]) for call in claims]
    assert len(set(sentences)) == len(sentences)
    constant = [ast.unparse(call) for call in claims if isinstance(call.args[-1], ast.Constant)]
    assert constant == [], "evidence is computed"


def test_what_makes_claims_can_be_repeated_with_other_seeds(notebook):
    (cell,) = code_cells(notebook, "parameters")
    names = {statement.target.id for statement in ast.parse(cell.source).body}
    assert not claims_of(notebook) or SEED in names
    assert "strict" not in names  # no parameter decides whether an outcome stops a notebook


def test_shows_what_it_draws(notebook):
    """Jupyter shows the last expression of a cell: a table inside an `if` would be drawn for nobody."""
    for cell in code_cells(notebook):
        body = ast.parse(cell.source).body
        unseen = [node.value.func.id for node in ast.walk(ast.Module(body, []))
                  if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node is not body[-1]
                  and getattr(node.value.func, "id", "") in ("table", "show", "explore")]
        assert unseen == [], cell.id


def test_first_cell_agrees_with_the_address(notebook):
    assert with_setup(notebook, ADDRESS) == notebook, f"make address URL={ADDRESS}"


def test_is_markdown_that_every_viewer_reads(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"\{[\w:]+\}`|^(?:::|```\{).*", text, flags=re.MULTILINE) == [], "roles and directives are MyST"


def test_every_notebook_is_a_chapter():
    contents = (ROOT / "_toc.yml").read_text(encoding="utf8").split()
    assert [path.stem for path in NOTEBOOKS if f"notebooks/{path.stem}" not in contents] == []
