"""What the jobs of a grid found, as one tidy table: a row for each run of each job, with what set it apart.

`python -m batch.gather GRID FOLDER` writes ``table.csv``, of which the same grid on the same machine gives the same
bytes whatever happened on the way, and ``times.csv`` with what differs: when, where, how long.
"""

import argparse
import csv
import json
from pathlib import Path

from batch.grids import unchecked
from batch.job import finished
from permask_core.files import written_whole

CHANGING = ("seconds",)  # of a row: not the same twice


def gather(jobs, folder):
    """Write the tables of what is finished; the names of the jobs that are not.

    Parameters
    ----------
    jobs : dict of str to Job
    folder : pathlib.Path
    """
    rows, times, missing = [], [], []
    for name, job in sorted(jobs.items()):
        found = finished(folder, job)
        if found is None:
            missing.append(name)
            continue
        shared = {"job": name, "notebook": job.notebook, **_flat("grid", found["combination"])}
        about = {"commit": found["commit"], "device": found["device"], **_flat("version", found["versions"])}
        for row in found["runs"]:
            rows.append(shared | _flat("", {key: value for key, value in row.items() if key not in CHANGING}) | about)
        times.append({"job": name, **json.loads((folder / "times" / f"{name}.json").read_text())})
    _write(folder / "table.csv", rows)
    _write(folder / "times.csv", times)
    return missing


def _flat(prefix, values):
    """Values by column: lists as JSON, a dict's values as columns of their own."""
    columns = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            columns |= _flat(name, value)
        else:
            columns[name] = json.dumps(value) if isinstance(value, list) else value
    return columns


def _write(path, rows):
    heads = list(dict.fromkeys(key for row in rows for key in row))
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, heads, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    jobs = unchecked(given.grid)
    missing = gather(jobs, given.folder)
    print(f"{len(jobs) - len(missing)} of {len(jobs)} jobs in {given.folder / 'table.csv'}")
    if missing:
        print("not finished: " + ", ".join(missing))


if __name__ == "__main__":
    main()
