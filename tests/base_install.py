"""A base install without any extra, imitated: a fresh process finds only the standard library, this library, and what
the base dependencies of pyproject.toml bring along."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.notebooks import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]


def required(names):
    """The distributions that these bring along, themselves included."""
    found, waiting = set(), [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


BASE = required(Requirement(line).name for line in PROJECT["dependencies"])
TOP = {name for name, distributions in metadata.packages_distributions().items()
       if any(canonicalize_name(one) in BASE for one in distributions)}
FINDER = f"""
import re, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.metadata import DistributionFinder
from pathlib import Path

OWN = {{path.stem for path in Path().glob("*.py")}}  # files of the user next to the script
TOP = set({sorted(TOP)}) | sys.stdlib_module_names | {{"permask_core"}} | OWN
BASE = set({sorted(BASE)})

class OnlyBase:
    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.split(".")[0]
        return PathFinder.find_spec(name, path, target) if top in TOP or top.startswith("_sysconfigdata") else None

    @staticmethod
    def find_distributions(context=DistributionFinder.Context()):
        return (one for one in PathFinder.find_distributions(context)
                if re.sub("[-_.]+", "-", one.name).lower() in BASE)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, OnlyBase]
"""


def run(code, folder):
    """Run code in a folder, as a script of a user who has a base install; what it printed."""
    (folder / "script.py").write_text(FINDER + code)
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=folder, env={
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout
