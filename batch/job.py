"""One job of a grid: its notebook is executed under a temporary name, and kept when it has succeeded.

`python -m batch.job GRID NAME FOLDER` leaves in FOLDER: ``notebooks/NAME.ipynb``, ``jobs/NAME.json`` (what it found, last
of all), ``times/NAME.json`` (when, where, how long); or ``failed/NAME.ipynb``, and ends with status 1.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import papermill
import torch
from papermill.exceptions import PapermillExecutionError

from batch.grids import ROOT, unchecked
from permask_core.files import locked, written_whole
from permask_core.store import versions


def run(job, folder, store):
    """Run a job, unless it is finished; True if its notebook succeeded."""
    result = folder / "jobs" / f"{job.name}.json"
    with locked(result, f"another process runs {job.name}: waiting for it"):
        if finished(folder, job):
            return True
        place = folder / ".running" / job.name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        start, date = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
        given = {**job.parameters, "output": str(place / "output"), "runs": str(store)}
        notebook = place / "notebook.ipynb"
        try:
            papermill.execute_notebook(ROOT / "notebooks" / f"{job.notebook}.ipynb", notebook, given, cwd=ROOT,
                                       progress_bar=False, log_output=True)
        except PapermillExecutionError as error:
            _moved(notebook, folder / "failed" / f"{job.name}.ipynb")
            print(f"{job.name} failed: {error.ename}: {error.evalue}\nIts notebook is "
                  f"{folder / 'failed' / job.name}.ipynb", file=sys.stderr)
            return False
        found = json.loads((place / "output" / "results.json").read_text())
        _moved(notebook, folder / "notebooks" / f"{job.name}.ipynb")
        (folder / "failed" / f"{job.name}.ipynb").unlink(missing_ok=True)
        _write(folder / "times" / f"{job.name}.json", {
            "seconds": time.perf_counter() - start, "started": date, "host": platform.node(),
            "threads": torch.get_num_threads()})
        _write(result, {
            "job": job.name, "notebook": job.notebook, "sha256": _digest(folder / "notebooks" / f"{job.name}.ipynb"),
            "parameters": job.parameters, "combination": job.combination, "versions": versions(), "commit": commit(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", "runs": found["runs"]})
        shutil.rmtree(place)
        return True


def finished(folder, job):
    """What a finished job found; None if it is not finished, or a file of it is damaged or of other parameters, which is
    said."""
    result, notebook = folder / "jobs" / f"{job.name}.json", folder / "notebooks" / f"{job.name}.ipynb"
    if not result.exists():
        return None
    try:
        found = json.loads(result.read_text())
        fault = ("other parameters" if found["parameters"] != json.loads(json.dumps(job.parameters)) else
                 "a damaged notebook" if not notebook.exists() or found["sha256"] != _digest(notebook) else None)
    except (ValueError, KeyError, TypeError):
        fault = "a damaged result"
    if fault:
        print(f"{job.name} has {fault}: it is run again", file=sys.stderr)
        return None
    return found


def _write(path, record):
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def _moved(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit():
    """The commit of this folder, with "-dirty" where it was edited since; "unknown" without git."""
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True,
                          cwd=ROOT)
    return done.stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    given = parser.parse_args()
    sys.exit(not run(unchecked(given.grid)[given.name], given.folder.absolute(), given.store.absolute()))


if __name__ == "__main__":
    main()
