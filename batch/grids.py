"""Grids of runs: a YAML file names a notebook, its fixed parameters and lists to cross, and every combination is a job.

Before anything starts each parameter of each job is checked: that the notebook has it, that its value is of the type
that stands there, and that the notebook accepts it, by running the notebook as far as its cell with the tag "check".
All faults are told at once.
"""

import contextlib
import difflib
import io
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}
KEYS = ("notebook", "presets", "fixed", "cross", "resources")
RESOURCES = {"threads": 1, "gpus": 0, "mem_mb": 4000, "runtime": 60}  # runtime in minutes


class GridError(ValueError):
    """All that is wrong with a grid, a line each."""


@dataclass(frozen=True)
class Job:
    """One run of a notebook: its ``name``, the ``notebook`` (a name), the ``parameters`` that it is given, what it
    needs: ``resources``, and the ``combination`` that sets it apart in its grid."""

    name: str
    notebook: str
    parameters: dict
    resources: dict
    combination: dict = field(default_factory=dict)


def grid_path(name):
    """The file of a grid: a path as it is, or the name of one in batch/grids.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    """
    for path in (Path(name), ROOT / "batch" / "grids" / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    known = sorted(one.stem for one in (ROOT / "batch" / "grids").glob("*.yaml"))
    raise FileNotFoundError(f"no grid {str(name)!r}{_nearest(name, known)}: expected a file, or one of "
                            f"{', '.join(known)}")


def read_grid(path):
    """The jobs of a grid by name, checked.

    Parameters
    ----------
    path : path-like
        YAML: one mapping, or a list of them, with ``notebook`` (a name in notebooks/), ``presets`` (a mapping of names
        to parameters, each of which is run), ``fixed`` (parameters of all jobs), ``cross`` (a mapping of parameters to
        lists of values, all combinations of which are run), and ``resources`` (threads, gpus, mem_mb, runtime in
        minutes). Only ``notebook`` has to be there.

    Returns
    -------
    dict of str to Job

    Raises
    ------
    GridError
        With everything that is wrong, a line each; nothing has been run then.
    """
    jobs, faults = _parsed(Path(path))
    faults += _faults(jobs.values())
    if faults:
        raise GridError(f"{path}:\n  " + "\n  ".join(dict.fromkeys(faults)))
    return jobs


def unchecked(path):
    """As :func:`read_grid`, for a grid that was checked before: its parameters are taken as they are."""
    jobs, faults = _parsed(Path(path))
    if faults:
        raise GridError(f"{path}:\n  " + "\n  ".join(faults))
    return jobs


def _parsed(path):
    try:
        parts = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise GridError(f"{path} is no YAML: {error}") from error
    jobs, faults = {}, []
    for part in parts if isinstance(parts, list) else [parts]:
        found = _shape_faults(part)
        faults += found
        for job in [] if found else _jobs(part):
            if job.name in jobs:
                faults.append(f"two jobs are called {job.name}: expected combinations that differ")
            jobs[job.name] = job
    return jobs, faults


def _shape_faults(part):
    if not isinstance(part, dict) or not isinstance(part.get("notebook"), str):
        return [f"got {part!r}: expected a mapping with the name of a notebook under 'notebook'"]
    faults = [f"unknown entry {key!r}{_nearest(key, KEYS)}: expected {', '.join(KEYS)}"
              for key in part if key not in KEYS]
    if not (ROOT / "notebooks" / f"{part['notebook']}.ipynb").is_file():
        known = sorted(one.stem for one in (ROOT / "notebooks").glob("*.ipynb"))
        faults.append(f"unknown notebook {part['notebook']!r}{_nearest(part['notebook'], known)}: expected one of "
                      f"{', '.join(known)}")
    for key in ("presets", "fixed", "cross", "resources"):
        if not isinstance(part.get(key, {}), dict):
            faults.append(f"{key} is {part[key]!r}: expected a mapping")
        elif key == "cross":
            faults += [f"cross has {name}: {values!r}, expected a list of values, at least one"
                       for name, values in part.get(key, {}).items() if not isinstance(values, list) or not values]
        elif key == "presets":
            faults += [f"the preset {name} is {values!r}: expected a mapping of parameters"
                       for name, values in part.get(key, {}).items() if not isinstance(values, dict)]
        elif key == "resources":
            faults += [f"resources has {name}: {value!r}, expected whole numbers for {', '.join(RESOURCES)}, of at "
                       "least 1 except for gpus" for name, value in part.get(key, {}).items() if name not in RESOURCES
                       or not isinstance(value, int) or value < (name != "gpus")]
    return faults


def _jobs(part):
    cross = part.get("cross", {})
    for name, preset in (part.get("presets") or {"": {}}).items():
        for values in itertools.product(*cross.values()):
            combination = dict(zip(cross, values))
            words = [part["notebook"], *([name] if name else []),
                     *(f"{key}-{_plain(value)}" for key, value in combination.items())]
            yield Job("_".join(words), part["notebook"], {**part.get("fixed", {}), **preset, **combination},
                      RESOURCES | part.get("resources", {}), {"preset": name} | combination if name else combination)


def _plain(value):
    """A value as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", ",", json.dumps(value)).strip(",")


def _faults(jobs):
    """What is wrong with the parameters of jobs; what several jobs have in common is said once."""
    import papermill  # which takes its time: processes that only run jobs need not wait for it

    cells, known = {}, {}
    for job in jobs:
        if job.notebook not in known:
            path = ROOT / "notebooks" / f"{job.notebook}.ipynb"
            known[job.notebook] = papermill.inspect_notebook(str(path))
            cells[job.notebook] = _checked_cells(path)
            if not {"runs", "output"} <= set(known[job.notebook]):
                yield f"{job.notebook} leaves no results: expected a notebook with the parameters runs and output"
        right, preset = {}, job.combination.get("preset")
        where = f"{job.notebook}, {preset}" if preset else job.notebook
        for name, value in job.parameters.items():
            fault = (f"{name} is set by the batch itself: expected no such parameter" if name in ("runs", "output") else
                     _fault(name, value, known[job.notebook]))
            if fault:
                yield f"{where}: {fault}"
            else:
                right[name] = value
        yield from (f"{where}: {fault}" for fault in _refused(cells[job.notebook], right))


def _fault(name, value, known):
    if name not in known:
        return f"unknown parameter {name!r}{_nearest(name, known)}: expected some of {', '.join(known)}"
    wanted, default = known[name]["inferred_type_name"], known[name]["default"]
    if value is None and default == "None" or wanted not in TYPES:
        return None
    if not isinstance(value, TYPES[wanted]) or isinstance(value, bool) and wanted != "bool":
        return f"{name} is {value!r}, a {type(value).__name__}: expected {wanted} ({known[name]['help']})"
    return None


def _nearest(name, known):
    near = difflib.get_close_matches(str(name), list(known), 1)
    return f", perhaps {near[0]!r}" if near else ""


def _checked_cells(path):
    """The code of a notebook from its parameters to its check, and nothing of what comes after."""
    import nbformat

    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags", []) for cell in cells]
    (last,) = [i for i, own in enumerate(tags) if "check" in own] or [None]
    if last is None:
        return None
    return [(cell.source, "parameters" in own) for cell, own in zip(cells[:last + 1], tags)]


def _refused(cells, parameters):
    """What a notebook says against parameters of the right names and types: error after error, each with the parameter
    that it names taken back."""
    while cells:
        space = {"__name__": "check"}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                for source, is_parameters in cells:
                    exec(compile(source, "check", "exec"), space)
                    if is_parameters:
                        space.update(parameters)
            return
        except Exception as error:
            listed = re.search(r"'([^']*)'[^']*: expected one of (.+)$", str(error))
            near = difflib.get_close_matches(listed[1], listed[2].split(", "), 1) if listed else []
            yield f"{error}" + (f"; perhaps {near[0]}" if near else "")
            named = [name for name, value in parameters.items() if re.search(rf"\b{name}\b", str(error))]
            named = named or [name for name, value in parameters.items() if repr(value) in str(error)]
            if not named:
                return
            parameters = {name: value for name, value in parameters.items() if name != named[0]}
