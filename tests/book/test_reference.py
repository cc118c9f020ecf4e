"""The API reference: every public module is on one page, and the tables of tasks lead to documented names."""

import importlib
import re
from collections import Counter

import pytest
import yaml

from tests.notebooks import NOTEBOOKS, ROOT
from tests.test_architecture import MODULES

# Modules that only other modules of their package use.
INTERNAL = {f"permask_core.{name}" for name in (
    "masks.shortcuts", "matching.nested", "matching.similarity", "matching.tracer", "matching.tracer.rules",
    "matching.tracer.symmetry", "matching.tracer.values", "models.bert", "models.extras", "models.imagenet",
    "models.tiny_vit", "sparse.kernels.choice", "sparse.kernels.convolution", "sparse.kernels.cpu",
    "sparse.kernels.operator", "sparse.kernels.shifts", "sparse.kernels.simd", "sparse.kernels.triton")}
OVERVIEW = (ROOT / "book/api.md").read_text(encoding="utf8")
PAGES = {path.stem: path.read_text(encoding="utf8") for path in sorted((ROOT / "book/api").glob("*.md"))}
DOCUMENTED = {name: re.findall(r"automodule:: (\S+)", text) for name, text in PAGES.items()}
TASKS = re.findall(r"^\* - (?!task\n)(.+)\n((?:  .+\n)+)", OVERVIEW, re.M)
REFERENCE = re.compile(r"\{py:(func|class|mod)\}`(?:~|[^`<]+<)?(permask_core\.[\w.]+)>?`")


def is_documented_above(name):
    """Whether a package above a module exports names of the module, so that the package documents them."""
    parts = name.split(".")
    above = [importlib.import_module(".".join(parts[:n])) for n in range(2, len(parts))]
    return any(getattr(getattr(package, one), "__module__", None) == name
               for package in above for one in getattr(package, "__all__", ()))


def test_every_public_module_is_on_the_page_of_its_package():
    public = [name for name in MODULES if name != "permask_core" and name not in INTERNAL
              and not is_documented_above(name)]
    assert Counter((page, name) for page, names in DOCUMENTED.items() for name in names) == Counter(
        (name.split(".")[1], name) for name in public)


def test_readers_import_no_internal_module():
    assert INTERNAL < set(MODULES)
    book = [path for path in (ROOT / "book").rglob("*.*") if path.suffix in (".md", ".py")]
    for path in (*NOTEBOOKS.glob("*.ipynb"), *book, ROOT / "README.md"):
        for name, names in re.findall(r"from (permask_core[\w.]*) import ([\w, ]+)", path.read_text(encoding="utf8")):
            assert not {name, *(f"{name}.{one.strip()}" for one in names.split(","))} & INTERNAL, path


def test_every_package_is_in_the_contents_and_the_overview():
    chapters = [one for part in yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"] for one in part["chapters"]]
    sections = next(one["sections"] for one in chapters if one["file"] == "book/api")
    names = re.findall(r"^- \{doc\}`api/(\w+)`", OVERVIEW, re.M)
    assert [one["file"] for one in sections] == [f"book/api/{name}" for name in names] and set(names) == set(PAGES)


def test_there_are_enough_tasks():
    assert len(TASKS) >= 20 and len({task for task, _ in TASKS}) == len(TASKS)


@pytest.mark.parametrize(("task", "cell"), TASKS, ids=[task for task, _ in TASKS])
def test_a_task_leads_to_documented_names_and_a_page(task, cell):
    references, pages = REFERENCE.findall(cell), re.findall(r"\{doc\}`/(\S+)`", cell)
    documented = {name for names in DOCUMENTED.values() for name in names}
    assert references and len(references) == cell.count("{py:")
    for kind, name in references:
        module, _, attribute = name.rpartition(".")
        assert name in documented if kind == "mod" else module in documented
        assert kind == "mod" or hasattr(importlib.import_module(module), attribute), name
    assert pages and all((ROOT / page).with_suffix(suffix).is_file() for page in pages
                         for suffix in ((".ipynb",) if page.startswith("notebooks/") else (".md",)))
