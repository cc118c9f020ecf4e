"""One job of a grid: execute its notebook under a temporary name, and rename the notebook if it succeeds.

`python -m batch.job JOBS NAME FOLDER --store STORE`, with JOBS from :func:`batch.grids.freeze`, writes
``notebooks/NAME.ipynb``, ``figures/NAME.svg`` and, last, ``jobs/NAME.json`` (the results) into FOLDER. If the notebook
fails, it writes ``failed/NAME.ipynb`` and ends with status 1.
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

LOCKS = Path("/tmp")  # not the folder for temporary files, which differs between users


def run(job, folder, store):
    """Run a job, unless it is finished.

    Parameters
    ----------
    job : Job
    folder : pathlib.Path
        Folder of the grid's results.
    store : pathlib.Path
        Folder of the stages, which several grids may share.

    Returns
    -------
    bool
        Whether the job is now finished.
    """
    result = folder / "jobs" / f"{job.name}.json"
    with locked(result, f"another process runs {job.name}: waiting for it"):
        if finished(folder, job):
            return True
        # A separate folder, because the kernel of a killed job may run for another second.
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
    # The number of threads affects the last bits of sums, so it is set in the grid.
    os.environ["OMP_NUM_THREADS"] = str(job.resources["threads"])
    os.environ.setdefault("PERMASK_DISPLAY", "static")  # so that the notebook can be read without a kernel
    with gpus_of_its_own(job.resources["gpus"]):
        papermill.execute_notebook(ROOT / "notebooks" / f"{job.notebook}.ipynb", notebook, parameters, cwd=ROOT,
                                   progress_bar=False, log_output=True)


@contextmanager
def gpus_of_its_own(count):
    """Reserve ``count`` of this machine's GPUs for this process and its kernel in the block.

    Snakemake counts GPUs but does not assign them. SLURM does, so under SLURM this has no effect. With fewer GPUs, the
    job gets all of them: a grid with GPUs also runs on a CPU.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count or "SLURM_JOB_ID" in os.environ or seen == "":
        yield
        return
    if seen is None:
        import torch  # imported here because only this function needs it

        seen = ",".join(map(str, range(torch.cuda.device_count())))
    names = [name for name in seen.split(",") if name]
    held = {}
    try:
        while len(held) < min(count, len(names)):
            for name in names:
                if name not in held and len(held) < count and (lock := _gpu_lock(name)) is not None:
                    held[name] = lock
            if len(held) < min(count, len(names)):  # or two jobs with half of their GPUs would wait for ever
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
    """Return an open file that is locked while it is open, one for each GPU of this machine, or None if another job has
    it.

    The first user creates the file, and all users of the machine may read it, which is enough for a lock. It is never
    deleted. Files of other users in /tmp cannot be opened for writing, nor by a call that may create them.
    """
    import fcntl

    path = LOCKS / f"permask-gpu-{name}.lock"
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o444))
        os.chmod(path, 0o444)  # for any umask
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
