"""Gather the results of a grid's jobs as one tidy table for each notebook, and report progress.

`python -m batch.gather JOBS FOLDER`, with JOBS from :func:`batch.grids.freeze`, writes ``tables/NOTEBOOK.csv`` with a
row for each run, which is the same bit for bit for the same grid on the same machine, even after interruptions;
``jobs.csv`` with the parameters of each job, and when, where and how long it ran; and ``status.json`` with the missing
jobs. With ``--list`` it writes nothing and prints the finished and the remaining jobs. With ``--into TABLES``, it adds
the finished jobs to the tables in another folder, for grids that run on several machines or over many days.
"""

import argparse
import csv
import hashlib
import json
import sys
from pathlib import Path
from statistics import median

from batch.grids import frozen
from permask_core.runs.files import write_whole
from permask_core.runs.tables import columns, read_table, write_table


def finished(folder, job):
    """Return the result of a finished job as a dict, or None if it is not finished. A damaged file, or one with other
    parameters, is reported and does not count as finished."""
    result, notebook = folder / "jobs" / f"{job.name}.json", folder / "notebooks" / f"{job.name}.ipynb"
    if not result.exists():
        return None
    try:
        found = json.loads(result.read_text())
        same = found["parameters"] == json.loads(json.dumps(job.parameters))
        whole = notebook.exists() and found["sha256"] == hashlib.sha256(notebook.read_bytes()).hexdigest()
        fault = "other parameters" if not same else "a damaged notebook" if not whole else None
    except (ValueError, KeyError, TypeError):
        fault = "a damaged result"
    if fault:
        print(f"{job.name} has {fault}: it will be run again", file=sys.stderr)
        return None
    return found


def gather(jobs, folder, into=None):
    """Write the tables of finished jobs.

    Parameters
    ----------
    jobs : dict of str to Job
    folder : pathlib.Path
    into : pathlib.Path, optional
        Another folder with tables of the same grid, which get the new rows. They keep those of jobs that are not
        finished in ``folder``.

    Returns
    -------
    str
        A summary for readers.

    Raises
    ------
    ValueError
        If the tables in ``into`` have jobs that are not in the grid, or that had other parameters.
    """
    tables, times, status = {}, [], {"finished": [], "failed": [], "missing": []}
    earlier = _earlier(jobs, into) if into and (into / "jobs.csv").exists() else {}
    into = into or folder
    for name, job in sorted(jobs.items()):
        if found := finished(folder, job):
            about = {"commit": found["commit"], "device": found["device"], "threads": found["threads"]}
            rows = [{"job": name, **_cells(found["settings"]), **_cells(row), **about} for row in found["runs"]]
            times.append({"job": name, **found["times"], "given": found["parameters"], "versions": found["versions"]})
        elif name in earlier:
            rows, its_times = earlier[name]
            times.append(its_times)
        else:
            status["failed" if _failed(folder, name).exists() else "missing"].append(name)
            continue
        status["finished"].append(name)
        for row in rows:  # jobs that share a network, such as the dense one, have equal rows
            line = {key: value for key, value in columns(row).items()
                    if key not in ("job", "commit", "device", "threads") and value not in (None, "")}
            tables.setdefault(job.notebook, {}).setdefault(json.dumps(line, sort_keys=True), row)
    text = f"{len(times)} of {len(jobs)} jobs are finished"
    if times or (into / "status.json").exists():  # which may be outdated
        for left in (into / "tables").glob("*.csv"):
            if left.stem not in tables:
                left.unlink()
        for notebook, rows in tables.items():
            write_table(into / "tables" / f"{notebook}.csv", list(rows.values()))
        write_table(into / "jobs.csv", times)
        with write_whole(into / "status.json") as temporary:
            temporary.write_text(json.dumps(status, indent=1) + "\n")
        text += "".join(f"; {len(rows)} rows in {into / 'tables' / notebook}.csv"
                        for notebook, rows in tables.items())
    return "\n  ".join([text, *(f"failed: {_failed(folder, name)}" for name in status["failed"])])


def _earlier(jobs, folder):
    """Return the rows and the times of the jobs in a folder of tables, by the name of the job."""
    rows, earlier = [], {}
    for path in sorted(folder.glob("tables/*.csv")):
        with path.open(newline="") as file:
            heads = next(csv.reader(file))  # which keep their order, where the first rows lack some
        rows += [dict.fromkeys(heads) | row for row in read_table(path)]
    for line in read_table(folder / "jobs.csv"):
        name, given = line["job"], {key[6:]: value for key, value in line.items() if key.startswith("given.")}
        asked = columns(json.loads(json.dumps(jobs[name].parameters))) if name in jobs else {}
        if given != {key: value for key, value in asked.items() if value is not None}:
            raise ValueError(f"{folder} has the job {name} with {given}: expected a job of this grid, with {asked}")
        earlier[name] = [row for row in rows if row["job"] == name], line
    return earlier


def _cells(values):
    """Return the values that fit into cells; lists, and seconds, which always differ, are only in the file of the
    job."""
    return {key: _cells(value) if isinstance(value, dict) else value for key, value in values.items()
            if not isinstance(value, list) and key != "seconds"}


def outlook(jobs, folder, every=False):
    """Return a text with the number of finished jobs and the time of the remaining ones; with ``every``, a line for
    each.

    The expected time of a job is the median of finished jobs of the same notebook and preset, or of the same notebook;
    if there are none, at most the time limit in its grid.
    """
    found = {name: finished(folder, job) for name, job in jobs.items()}
    took = [(jobs[name].notebook, jobs[name].combination.get("preset"), record["times"]["seconds"])
            for name, record in found.items() if record]
    lines, left, measured = [], 0.0, []
    for name, job in jobs.items():
        if found[name]:
            lines.append(f"finished  {name}, {_duration(found[name]['times']['seconds'])}")
            continue
        preset = job.combination.get("preset")
        alike = ([s for notebook, its, s in took if (notebook, its) == (job.notebook, preset)]
                 or [s for notebook, _, s in took if notebook == job.notebook])
        seconds = median(alike) if alike else 60 * job.resources["runtime"]
        left += seconds
        measured.append(bool(alike))
        state = "failed  " if _failed(folder, name).exists() else "to run  "
        lines.append(f"{state}  {name}, {'about' if alike else 'at most'} {_duration(seconds)}")
    text = f"{len(jobs)} jobs, {len(took)} of them finished"
    if measured:
        text += f"; the rest take {'about' if all(measured) else 'at most'} {_duration(left)}, one after the other"
    return "\n".join([*(lines if every else []), text])


def _failed(folder, name):
    return folder / "failed" / f"{name}.ipynb"


def _duration(seconds):
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} seconds"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("jobs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--into", type=Path, metavar="TABLES")
    given = parser.parse_args()
    jobs = frozen(given.jobs)
    print(outlook(jobs, given.folder, every=True) if given.list else gather(jobs, given.folder, given.into))


if __name__ == "__main__":
    main()
