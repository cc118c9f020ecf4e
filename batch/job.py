"""One job of a grid: its notebook is executed under a temporary name, and kept when it has succeeded.

`python -m batch.job JOBS NAME FOLDER --store STORE`, with JOBS as :func:`batch.grids.freeze` wrote it, leaves there:
``notebooks/NAME.ipynb``, ``figures/NAME.svg`` and, last of all, ``jobs/NAME.json`` (what it found); or
``failed/NAME.ipynb``, and ends with status 1.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from batch.gather import finished
from batch.grids import ROOT, frozen
from permask_core.runs.files import locked, write_whole

LOCKS = Path("/tmp")  # not the folder for temporary files, which differs from user to user


def run(job, folder, store):
    """Run a job, unless it is finished.

    Parameters
    ----------
    job : Job
    folder : pathlib.Path
        Of the grid's results.
    store : pathlib.Path
        Of the stages, which several grids may share.

    Returns
    -------
    bool
        Whether it is finished now.
    """
    result = folder / "jobs" / f"{job.name}.json"
    with locked(result, f"another process runs {job.name}: waiting for it"):
        if finished(folder, job):
            return True
        # A folder of its own, as the kernel of a job that was killed may live a second longer.
        for left in folder.glob(f".running/{job.name}/*"):
            shutil.rmtree(left, ignore_errors=True)
        (folder / ".running" / job.name).mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(dir=folder / ".running" / job.name))
        start, date, notebook = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%S%z"), place / "notebook.ipynb"
        try:
            _execute(job, notebook, {**job.parameters, "output": str(place / "output"), "runs": str(store)})
            found = json.loads((place / "output" / "results.json").read_text())
        except (PapermillExecutionError, DeadKernelError, FileNotFoundError) as error:
            _moved(notebook, folder / "failed" / f"{job.name}.ipynb")
            reason = f"{error.ename}: {error.evalue}" if isinstance(error, PapermillExecutionError) else error
            shutil.rmtree(place.parent)
            print(f"{job.name} failed: {reason}\nits notebook: {folder / 'failed' / job.name}.ipynb", file=sys.stderr)
            return False
        (folder / "failed" / f"{job.name}.ipynb").unlink(missing_ok=True)
        _moved(notebook, folder / "notebooks" / f"{job.name}.ipynb")
        _moved(place / "output" / "results.svg", folder / "figures" / f"{job.name}.svg")
        record = {
            "job": job.name, "notebook": job.notebook, "parameters": job.parameters, "combination": job.combination,
            **{key: found[key] for key in ("commit", "device", "versions", "settings", "runs")},
            "threads": job.resources["threads"],
            "sha256": hashlib.sha256((folder / "notebooks" / f"{job.name}.ipynb").read_bytes()).hexdigest(),
            "times": {"seconds": round(time.perf_counter() - start, 2), "started": date, "host": platform.node()}}
        with write_whole(result) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(place.parent)
        return True


def _execute(job, notebook, parameters):
    # How a sum is divided among threads decides about its last bits, so the grid says how many there are.
    os.environ["OMP_NUM_THREADS"] = str(job.resources["threads"])
    os.environ.setdefault("PERMASK_DISPLAY", "static")  # notebooks that can be read without a kernel
    with gpus_of_its_own(job.resources["gpus"]):
        papermill.execute_notebook(ROOT / "notebooks" / f"{job.notebook}.ipynb", notebook, parameters, cwd=ROOT,
                                   progress_bar=False, log_output=True)


@contextmanager
def gpus_of_its_own(count):
    """In the block this process and its kernel see ``count`` of this machine's GPUs, which no other job has.

    Snakemake counts GPUs but does not say which is whose. SLURM does, and is left alone. A machine with fewer gives
    what it has: a grid with GPUs runs on a processor, too.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count or "SLURM_JOB_ID" in os.environ or seen == "":
        yield
        return
    if seen is None:
        import torch  # of which a job needs nothing else

        seen = ",".join(map(str, range(torch.cuda.device_count())))
    names = [name for name in seen.split(",") if name]
    held = {}
    try:
        while len(held) < min(count, len(names)):
            for name in names:
                if name not in held and len(held) < count and (lock := _gpu_lock(name)) is not None:
                    held[name] = lock
            if len(held) < min(count, len(names)):  # or two jobs, each with half of what it needs, would wait for ever
                while held:
                    os.close(held.popitem()[1])
                time.sleep(random.uniform(1, 2))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
        yield
    finally:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen
        for lock in held.values():
            os.close(lock)


def _gpu_lock(name):
    """An open file that is locked as long as it is open, one for each GPU of this machine; None if another job has it.

    Whoever comes first makes the file, and all users of the machine may read it, which suffices for a lock. It is never
    deleted. Files in /tmp that are somebody else's cannot be opened for writing, nor by a call that might make them.
    """
    import fcntl

    path = LOCKS / f"permask-gpu-{name}.lock"
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o444))
        os.chmod(path, 0o444)  # whatever the umask is
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        os.close(lock)
        return None


def _moved(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("jobs", type=Path)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    given = parser.parse_args()
    sys.exit(not run(frozen(given.jobs)[given.name], given.folder.absolute(), given.store.absolute()))


if __name__ == "__main__":
    main()
