"""The rooms of the library: arrows point down, and the page and the docstring that describe them are right."""

import ast
import re
from collections import defaultdict
from graphlib import TopologicalSorter

import pytest

import permask_core
from tests.notebooks import ROOT

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for path in sorted((ROOT / "permask_core").rglob("*.py"))}


def imports_of(name, source=None):
    """The modules of the library that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(source if source is not None else MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "permask_core":
            found |= {one if (one := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "permask_core"}
    return found - {name, "permask_core"}


def room(module):
    return module.split(".")[1]


def floors(lines):
    """The floor of each room, from lines such as "1. ``masks``, ``data``" or the rows of a table."""
    return {name: int(floor) for floor, names in lines for name in re.findall(r"``(\w+)``|`permask_core\.(\w+)`", names)
            for name in name if name}


DOCSTRING = floors(re.findall(r"^(\d)\. (.*)$", permask_core.__doc__, re.M))


def upward(module, imported):
    """The imports that point to a room which is not below the module's own."""
    return sorted(one for one in imported if room(one) != room(module)
                  and not DOCSTRING[room(one)] < DOCSTRING[room(module)])


def test_the_docstring_names_every_room():
    assert set(DOCSTRING) == {room(name) for name in MODULES if name != "permask_core"}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "permask_core"])
def test_no_import_points_upwards(module):
    assert upward(module, imports_of(module)) == []


def test_an_import_that_points_upwards_is_found():
    source = "from permask_core.runs.files import digest\ndef late():\n    from permask_core.training.loop import fit\n"
    assert upward("permask_core.masks", imports_of("permask_core.masks", source)) == ["permask_core.training.loop"]


def test_no_module_imports_itself_through_others():
    """Packages apart, which import what they show."""
    graph = {name: {one for one in imports_of(name) if MODULES[one].name != "__init__.py"} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)  # raises CycleError


def test_every_floor_is_the_lowest_possible():
    below = defaultdict(set)
    for name in MODULES:
        if name != "permask_core":
            below[room(name)] |= {room(one) for one in imports_of(name)} - {room(name)}
    for name, floor in DOCSTRING.items():
        assert floor == max((DOCSTRING[one] + 1 for one in below[name]), default=0), name


def test_the_page_has_the_floors_of_the_docstring():
    page = (ROOT / "book/architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| \{py:mod\}(`permask_core\.\w+`)", page, re.M)
    assert floors(rows) == DOCSTRING


def test_names_are_there_without_a_wait():
    assert len(permask_core.__all__) <= 24
    for name in permask_core.__all__:
        assert getattr(permask_core, name).__module__.startswith("permask_core."), name
        assert name in dir(permask_core)
    with pytest.raises(AttributeError, match="has no attribute 'mach_weights'"):
        permask_core.mach_weights  # noqa: B018 - looked up, and refused
