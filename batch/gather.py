"""What the jobs of a grid found, as one tidy table for each notebook, and how far they are.

`python -m batch.gather JOBS FOLDER`, with JOBS as :func:`batch.grids.freeze` wrote it, writes ``tables/NOTEBOOK.csv``,
with a row for each run, of which the same grid on the same machine gives the same bytes whatever happened on the way;
``jobs.csv`` with the parameters of each job and what is never the same: when, where, how long; and ``status.json`` with
what is missing. With ``--list`` it writes nothing and says what is finished and what is left to do.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from statistics import median

from batch.grids import frozen
from permask_core.runs.files import write_whole
from permask_core.runs.tables import write_table


def finished(folder, job):
    """What a finished job found, as a dict; None if it is not finished. A file of it that is damaged, or of other
    parameters, is reported, and the job is not finished."""
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
        print(f"{job.name} has {fault}: it is run again", file=sys.stderr)
        return None
    return found


def gather(jobs, folder):
    """Write the tables of what is finished.

    Parameters
    ----------
    jobs : dict of str to Job
    folder : pathlib.Path

    Returns
    -------
    str
        How much that is, for people.
    """
    tables, times, status = {}, [], {"finished": [], "failed": [], "missing": []}
    for name, job in sorted(jobs.items()):
        found = finished(folder, job)
        status["finished" if found else "failed" if _failed(folder, name).exists() else "missing"].append(name)
        if not found:
            continue
        about = {"commit": found["commit"], "device": found["device"], "threads": found["threads"]}
        for row in found["runs"]:  # of which jobs that share a network, such as the dense one, have the same
            line = _cells(found["settings"]) | _cells(row)
            tables.setdefault(job.notebook, {}).setdefault(json.dumps(line, sort_keys=True),
                                                           {"job": name, **line, **about})
        times.append({"job": name, **found["times"], "given": found["parameters"], "versions": found["versions"]})
    text = f"{len(times)} of {len(jobs)} jobs are finished"
    if times or (folder / "status.json").exists():  # of which nothing may be left
        for left in (folder / "tables").glob("*.csv"):
            if left.stem not in tables:
                left.unlink()
        for notebook, rows in tables.items():
            write_table(folder / "tables" / f"{notebook}.csv", list(rows.values()))
        write_table(folder / "jobs.csv", times)
        with write_whole(folder / "status.json") as temporary:
            temporary.write_text(json.dumps(status, indent=1) + "\n")
        text += "".join(f"; {len(rows)} rows in {folder / 'tables' / notebook}.csv"
                        for notebook, rows in tables.items())
    return "\n  ".join([text, *(f"failed: {_failed(folder, name)}" for name in status["failed"])])


def _cells(values):
    """What fits into cells: lists stay in the job's own file, and seconds, which are never the same, too."""
    return {key: _cells(value) if isinstance(value, dict) else value for key, value in values.items()
            if not isinstance(value, list) and key != "seconds"}


def outlook(jobs, folder, every=False):
    """How many jobs are finished, and how long the others take: as text, with a line for each if ``every``.

    A job is expected to take as long as the finished ones of the same notebook and preset did in the median, or of the
    same notebook; where there are none, at most the time that its grid allows.
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
        text += f"; the others take {'about' if all(measured) else 'at most'} {_duration(left)}, one after the other"
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
    given = parser.parse_args()
    jobs = frozen(given.jobs)
    print(outlook(jobs, given.folder, every=True) if given.list else gather(jobs, given.folder))


if __name__ == "__main__":
    main()
