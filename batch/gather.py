"""What the jobs of a grid found, as one tidy table, and how far they are.

`python -m batch.gather GRID FOLDER` writes ``table.csv``, with a row for each run of each job, of which the same grid
on the same machine gives the same bytes whatever happened on the way; and ``times.csv`` with what is never the same:
when, where, how long. With ``--list`` it writes nothing and tells what is finished and what is left to do.
"""

import argparse
import csv
import json
from pathlib import Path
from statistics import median

from batch.grids import grid_path, unchecked
from batch.job import finished
from permask_core.files import written_whole


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
    rows, times, missing = [], [], []
    for name, job in sorted(jobs.items()):
        found = finished(folder, job)
        if found is None:
            missing.append(name)
            continue
        about = {key: found[key] for key in ("commit", "device", "threads")} | _columns("version", found["versions"])
        for row in found["runs"]:
            row = {key: value for key, value in row.items() if key != "seconds"}
            rows.append({"job": name, "notebook": job.notebook, **_columns("grid", found["combination"]),
                         **_columns("", row), **about})
        times.append({"job": name, **found["times"]})
    text = f"{len(times)} of {len(jobs)} jobs are finished"
    if rows:
        _write(folder / "table.csv", rows)
        _write(folder / "times.csv", times)
        text += f": {len(rows)} rows in {folder / 'table.csv'}"
    failed = [_failed(folder, name) for name in missing]
    return "\n  ".join([text, *(f"failed: {path}" for path in failed if path.exists())])


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


def _columns(prefix, values):
    """Values by column: lists as JSON, what a dict holds in columns of its own."""
    columns = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        columns |= _columns(name, value) if isinstance(value, dict) else {
            name: json.dumps(value) if isinstance(value, list) else value}
    return columns


def _write(path, rows):
    heads = list(dict.fromkeys(key for row in rows for key in row))
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("grid")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    jobs = unchecked(grid_path(given.grid))
    print(outlook(jobs, given.folder, every=True) if given.list else gather(jobs, given.folder))


if __name__ == "__main__":
    main()
