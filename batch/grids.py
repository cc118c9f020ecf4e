"""Grids of runs: a YAML file lists a notebook, its fixed parameters and lists to cross; every combination is a job.

Before the first job, all parameters of all jobs are checked: the notebook must have the parameter, the type must be
that in the notebook, and the notebook must accept the value. For this, the notebook is run until its cell with the tag
"check", which also checks the files of data sets. All errors are reported at once. The checked jobs are then saved next
to the results and read from there, so editing the grid does not affect jobs that have started.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from permask_core.runs.checks import nearest
from permask_core.runs.files import write_whole

ROOT = Path(__file__).parents[1]
TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool, "list": list, "dict": dict}
KEYS = ("notebook", "presets", "fixed", "cross", "resources")
RESOURCES = {"threads": 1, "gpus": 0, "mem_mb": 4000, "runtime": 60}  # runtime in minutes
NAME, LONGEST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"), 180  # characters of a job's name, to which files add more


class GridError(ValueError):
    """All errors in a grid, one in each line."""


@dataclass(frozen=True)
class Job:
    """One run of a notebook: its ``name``, the name of the ``notebook``, its ``parameters``, its ``resources``, and the
    ``combination`` of values that identifies it in its grid."""

    name: str
    notebook: str
    parameters: dict
    resources: dict
    combination: dict = field(default_factory=dict)


def grid_path(name):
    """Return the file of a grid, given as a path or as a name in batch/grids.

    Raises
    ------
    FileNotFoundError
        If there is no such file and no such name.
    """
    for path in (Path(name), ROOT / "batch" / "grids" / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    known = sorted(one.stem for one in (ROOT / "batch" / "grids").glob("*.yaml"))
    raise FileNotFoundError(f"no grid {str(name)!r}{nearest(name, known)}: expected a file, or one of "
                            f"{', '.join(known)}")


def read_grid(path, is_finished=lambda job: False):
    """Return the checked jobs of a grid by name.

    Parameters
    ----------
    path : path-like
        YAML: one mapping or a list of mappings, with ``notebook`` (a name in notebooks/), ``presets`` (a mapping of
        names to parameters, each of which is run), ``fixed`` (parameters of all jobs), ``cross`` (a mapping of
        parameters to lists of values, all combinations of which are run), and ``resources`` (threads, gpus, mem_mb,
        runtime in minutes). Only ``notebook`` is required. A parameter may be in only one of presets, fixed and cross.
    is_finished : callable, optional
        Returns whether a job is finished; the parameters of finished jobs are not checked again.

    Returns
    -------
    dict of str to Job

    Raises
    ------
    GridError
        With all errors, one in each line; no job has been run.
    """
    jobs, faults = _parsed(Path(path))
    faults += _faults([job for job in jobs.values() if not is_finished(job)])
    if faults:
        raise GridError(f"{path}:\n  " + "\n  ".join(dict.fromkeys(faults)))
    return jobs


# ---- Checked jobs ----------------------------------------------------------------------------------------------------

def freeze(jobs, folder):
    """Write checked jobs to a file below ``folder`` whose name is a hash of them, and return its path."""
    text = json.dumps([dataclasses.asdict(job) for job in jobs.values()], indent=1) + "\n"
    path = Path(folder) / "grids" / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    with write_whole(path) as temporary:
        temporary.write_text(text)
    return path


def frozen(path):
    """Read the jobs that :func:`freeze` wrote, by name."""
    return {job["name"]: Job(**job) for job in json.loads(Path(path).read_text())}


# ---- The file --------------------------------------------------------------------------------------------------------

class _Loader(yaml.SafeLoader):
    """Records duplicate keys of a mapping, of which YAML readers take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        self.faults += [f"line {key.start_mark.line + 1} has {name!r} a second time: expected each key once"
                        for i, ((key, _), name) in enumerate(zip(node.value, keys))
                        if name in keys[:i] and key.tag != "tag:yaml.org,2002:merge"]
        return super().construct_mapping(node, deep)


def _parsed(path):
    loader = _Loader(path.read_text())
    loader.faults = faults = []
    try:
        parts = loader.get_single_data()
    except yaml.YAMLError as error:
        raise GridError(f"{path} is not YAML: {error}") from error
    finally:
        loader.dispose()
    jobs, parts = {}, parts if isinstance(parts, list) else [parts]
    if parts in ([], [None]):
        faults.append("the grid is empty: expected a mapping with the name of a notebook under 'notebook'")
        parts = []
    for part in parts:
        found = _shape_faults(part)
        faults += found
        for job in [] if found else _jobs(part):
            if job.name in jobs:
                faults.append(f"two jobs have the name {job.name}: expected different combinations")
            if len(job.name) > LONGEST:
                faults.append(f"a job has the name {job.name[:60]}... of {len(job.name)} characters: expected at most "
                              f"{LONGEST}; give long values in cross a short name as presets")
            jobs[job.name] = job
    return jobs, faults


def _shape_faults(part):
    if not isinstance(part, dict) or "notebook" not in part:
        return [f"got {part!r}: expected a mapping with the name of a notebook under 'notebook'"]
    faults = [f"unknown entry {key!r}{nearest(key, KEYS)}: expected {', '.join(KEYS)}"
              for key in part if key not in KEYS]
    notebook, known = part["notebook"], sorted(one.stem for one in (ROOT / "notebooks").glob("*.ipynb"))
    if notebook not in known:
        faults.append(f"unknown notebook {notebook!r}{nearest(notebook, known)}: expected one of {', '.join(known)}")
    misshapen = [f"{key} is {part[key]!r}: expected a mapping" for key in ("presets", "fixed", "cross", "resources")
                 if not isinstance(part.get(key, {}), dict)]
    if misshapen:
        return faults + misshapen
    presets, fixed, cross = (part.get(key, {}) for key in ("presets", "fixed", "cross"))
    faults += [f"a preset has the name {name!r}: expected letters, digits and _ . + -" for name in presets
               if not isinstance(name, str) or not NAME.fullmatch(name)]
    faults += [f"the preset {name} is {values!r}: expected a mapping of parameters" for name, values in presets.items()
               if not isinstance(values, dict)]
    faults += [f"cross has {name}: {values!r}, expected a list of at least one value"
               for name, values in cross.items() if not isinstance(values, list) or not values]
    faults += [f"resources has {name}: {value!r}, expected integers for {', '.join(RESOURCES)}, of at least 1 "
               "except for gpus" for name, value in part.get("resources", {}).items() if name not in RESOURCES
               or not isinstance(value, int) or isinstance(value, bool) or value < (name != "gpus")]
    given = {"fixed": fixed, "cross": cross, **{f"the preset {name}": values for name, values in presets.items()
                                                if isinstance(values, dict)}}
    faults += [f"{name} is in {where} and in {other}: expected it in one of them"
               for (where, one), (other, two) in itertools.combinations(given.items(), 2)
               if "preset" not in where for name in one if name in two]
    for where, values in given.items():
        faults += [f"{where} has the name {name!r}, a {type(name).__name__}: expected a text" for name in values
                   if not isinstance(name, str)]
        faults += [f"{where} has {name}: {value!r}, which holds a {wrong}: expected texts, numbers, true, false, lists "
                   "and mappings" for name, value in values.items() if (wrong := _foreign(value))]
    return faults


def _foreign(value):
    """Return the name of a YAML type in a value that a parameter cannot have, such as date, or an empty text."""
    try:
        json.dumps(value, allow_nan=False)
        return ""
    except TypeError as error:
        return re.search(r"type (\w+)", str(error))[1] if "type " in str(error) else "name that is not a text"
    except ValueError:
        return "number that is not finite"


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
    """Return a value as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", ",", json.dumps(value)).strip(",")


# ---- The parameters --------------------------------------------------------------------------------------------------

def _faults(jobs):
    """Yield the errors in the parameters of jobs; common errors of several jobs are reported once."""
    if not jobs:
        return
    import papermill  # slow to import, and not needed by processes that only run jobs

    cells, known, seeds = {}, {}, {}
    for job in jobs:
        if job.notebook not in known:
            path = ROOT / "notebooks" / f"{job.notebook}.ipynb"
            known[job.notebook] = papermill.inspect_notebook(str(path))
            cells[job.notebook] = _checked_cells(path)
            if not {"runs", "output"} <= set(known[job.notebook]):
                yield f"{job.notebook} writes no results: expected a notebook with the parameters runs and output"
        right, preset = {}, job.combination.get("preset")
        where = f"{job.notebook}, {preset}" if preset else job.notebook
        for name, value in job.parameters.items():
            fault = (f"{name} is set by the batch: expected no such parameter" if name in ("runs", "output") else
                     _fault(name, value, known[job.notebook]))
            if fault:
                yield f"{where}: {fault}"
            else:
                right[name] = value
        refused, space = _refused(cells[job.notebook], right)
        yield from (fault if isinstance(fault, _Missing) else f"{where}: {fault}" for fault in refused)
        alike = json.dumps([job.notebook, {key: job.parameters[key] for key in sorted(job.parameters)
                                           if key != "first_seed"}])
        for seed in space.get("seed_list", ()):
            other = seeds.setdefault((alike, seed), job)
            if other is not job:
                yield (f"{where}: first_seed {other.parameters['first_seed']} and {job.parameters['first_seed']} both "
                       f"give the seed {seed}: expected seeds: 1, or values of first_seed that are "
                       f"{len(space['seed_list'])} apart")


def _fault(name, value, known):
    if name not in known:
        return f"unknown parameter {name!r}{nearest(name, known)}: expected some of {', '.join(known)}"
    wanted, default = known[name]["inferred_type_name"], known[name]["default"]
    if value is None and default == "None" or wanted not in TYPES:
        return None
    if not isinstance(value, TYPES[wanted]) or isinstance(value, bool) and wanted != "bool":
        return f"{name} is {value!r}, a {type(value).__name__}: expected {wanted} ({known[name]['help']})"
    return None


def _checked_cells(path):
    """Return the code of a notebook from its parameters to its check."""
    import nbformat

    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    tags = [cell.metadata.get("tags", []) for cell in cells]
    (last,) = [i for i, own in enumerate(tags) if "check" in own] or [None]
    if last is None:
        return None
    return [(cell.source, "parameters" in own) for cell, own in zip(cells[:last + 1], tags)]


def _refused(cells, parameters):
    """Return the errors that a notebook raises for parameters of the right names and types, and its names after the
    check. After each error, the parameter in its message is reset, to find further errors."""
    faults, space = [], {}
    while cells:
        space = {"__name__": "check"}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                for source, is_parameters in cells:
                    exec(compile(source, "check", "exec"), space)
                    if is_parameters:
                        space.update(parameters)
            break
        except FileNotFoundError as error:
            faults.append(_Missing(str(error)))
            break
        except Exception as error:
            lines = str(error).splitlines() or [repr(error)]
            faults += lines
            named = {_named(line, parameters) for line in lines} - {None}
            if not named:
                break
            parameters = {name: value for name, value in parameters.items() if name not in named}
    return faults, space


def _named(line, parameters):
    """Return the parameter to which an error message refers, or None."""
    about = [name for name in parameters if line.startswith(f"{name} ")]
    about += [name for name in parameters if re.search(rf"\b{name}\b", line)]
    about += [name for name, value in parameters.items() if repr(value) in line]
    return about[0] if about else None


class _Missing(str):
    """An error common to all jobs on a machine: a missing file."""
