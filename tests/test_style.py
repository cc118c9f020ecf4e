"""Words that the prose of this project avoids, each with its cure: see CONTRIBUTING.md.

Prose is Markdown without code, the Markdown cells of notebooks, and comments, docstrings and other texts in code, such
as captions and claims.
"""

import io
import json
import re
import tokenize

import pytest

from tests.notebooks import ROOT

CURES = {
    "anew": "again", "shall": "must, will, should", "alike": "similar, equal, both", "told": "reported, distinguished",
    "beside": "next to, compared with, besides", "but for": "except for", "hand(?:s|ed|ing)? out": "return, yield",
    "of no account": "irrelevant", "in silence": "unnoticed, without an error", "as ever": "as usual, always",
    "thrift(?:y)?": "saving compute", "forgiv(?:e|es|en|ing)": "tolerate", "what is left": "the rest, the remaining",
    "unknown or none": "an unknown key, or not a ...", "for want of": "for lack of", "means? nothing": "is meaningless",
    "whoever": "the name of who does it",
}
WORD = re.compile("|".join(rf"(?<![\w-])({word})(?![\w-])".replace(" ", r"\s+") for word in CURES), re.I)
ALLOWED = {"CONTRIBUTING.md", "test_style.py"}  # they list the words
PLACES = ("*.md", "book/**/*.md", "notebooks/*.ipynb", "permask_core/**/*.py", "benchmarks/*.py", "batch/*.py",
          "book/**/*.py", "tests/**/*.py")
FILES = sorted(path for place in PLACES for path in ROOT.glob(place) if path.name not in ALLOWED)


def blank(pattern, text):
    """Replace matches by spaces, so that positions do not change."""
    return re.sub(pattern, lambda found: re.sub(r"\S", " ", found[0]), text, flags=re.S | re.M)


def in_markdown(text):
    """(line, text) of the prose in Markdown: without code and addresses."""
    return [(1, blank(r"^```.*?^```|`[^`\n]*`|\]\([^)\s]*\)|<[^>\n]*>", text))]


def in_code(source):
    """(line, text) of the comments and texts in Python code, without names that are marked as code."""
    source = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)  # commands of IPython
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT":
            yield token.start[0], token.string
        elif kind in ("STRING", "FSTRING_MIDDLE") and " " in token.string:
            code = r"``.*?``|`[^`\n]*`|>>> [^\n]*" + r"|\{[^{}\n]*\}" * ("f" in token.string.split('"')[0].lower())
            yield token.start[0], blank(code, token.string)


def prose(path, text):
    """(place, line, text) of all prose in a file; the place is the id of a notebook's cell."""
    if path.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            source, read = "".join(cell["source"]), in_markdown if cell["cell_type"] == "markdown" else in_code
            yield from ((f", cell {cell['id']}", *part) for part in read(source))
    else:
        yield from (("", *part) for part in (in_markdown if path.suffix == ".md" else in_code)(text))


def faults(path, text):
    """A line for each word that should not be there: the place, the word and its cure."""
    return [f"{path.relative_to(ROOT)}{place}:{line + part.count(chr(10), 0, found.start())}: "
            f"{found[0]!r}, better: {list(CURES.values())[found.lastindex - 1]}"
            for place, line, part in prose(path, text) for found in WORD.finditer(part)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_avoids_these_words(path):
    assert not (found := faults(path, path.read_text(encoding="utf8"))), "\n" + "\n".join(found)


def test_words_are_found_where_they_are_prose():
    python = 'told = f"{alike} once"  # computed anew\ndef f():\n    """Units\n    are alike, ``anew``."""\n'
    assert [one.split(", better")[0] for one in faults(ROOT / "x.py", python)] == ["x.py:1: 'anew'", "x.py:4: 'alike'"]
    assert faults(ROOT / "x.md", "It is of no\naccount.\n`anew`\n\n```\nshall\n```\n") == [
        "x.md:1: 'of no\\naccount', better: irrelevant"]
    cells = [{"cell_type": "markdown", "id": "a", "source": ["Masks\n", "shall be."]},
             {"cell_type": "code", "id": "b", "source": ["%pip x\n", "show(caption='drawn anew')"]}]
    assert [one.split(":")[0] for one in faults(ROOT / "x.ipynb", json.dumps({"cells": cells}))] == [
        "x.ipynb, cell a", "x.ipynb, cell b"]
