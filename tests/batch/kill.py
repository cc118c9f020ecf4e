"""Kill a grid's scheduler and jobs with SIGKILL at random moments, start it again each time, and compare.

    python tests/batch/kill.py --grid digits --kills 20

It is asserted that the last start completes the grid; that its table is that of a run that nobody disturbed, byte for
byte; that no finished stage was written again, but the one that is cut off on the way; and that a job whose file is cut
off is run again.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def started(grid, folder, root=ROOT, options=()):
    """The scheduler of a grid, whose results and stages lie below `folder`, with the batch of a repository."""
    command = [Path(sys.executable).parent / "snakemake", "-s", root / "batch" / "Snakefile", *options, "--config",
               f"grid={grid}", f"output={folder / 'grid'}", f"store={folder / 'store'}"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def finish(grid, folder):
    """Run a grid to its end; seconds until something of it was stored, and in all."""
    start, begun = time.perf_counter(), 0.0
    process = started(grid, folder)
    while process.poll() is None:
        begun = begun or (time.perf_counter() - start if stages(folder) else 0.0)
        time.sleep(0.2)
    assert process.returncode == 0, (folder / "log.txt").read_text()[-3000:]
    return begun, time.perf_counter() - start


def kill(process):
    """Kill a process and all that it started, at once."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            pass
    process.wait()
    psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=10)


def stages(folder):
    """Finished stages with the moment at which each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("store/*/*.safetensors")}


def read_tables(folder):
    """The bytes of all tables by name."""
    return {path.name: path.read_bytes() for path in folder.glob("grid/tables/*.csv")}


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def disturbed(grid, folder, kills, *, startup, seconds, seed=0, tell=print):
    """Run a grid in spite of kills at random moments of a run that takes `seconds`, of which `startup` until something
    is stored; how often it was killed."""
    chance, written, done, damaged = random.Random(seed), {}, 0, None
    while done < kills:
        # Even if each comes as late as it can there are so many in a run, on a machine that is a third less busy now.
        process, wait = started(grid, folder), chance.uniform(0, startup + 0.7 * (seconds - startup) / kills)
        try:
            process.wait(wait)
            break  # it was quicker than the kill
        except subprocess.TimeoutExpired:
            kill(process)
            done += 1
        now = stages(folder)
        again = [str(path) for path, moment in written.items() if now.get(path) != moment and path != damaged]
        assert not again, f"written again: {again}"
        written = now
        tell(f"kill {done} after {wait:.1f} s: {len(now)} stages, {len(list(folder.glob('grid/jobs/*.json')))} jobs")
        if damaged is None and written and done >= kills // 2:
            damaged = chance.choice(sorted(written))
            cut(damaged)
    finish(grid, folder)
    return done


def compare(grid, folder, kills, seed=0, tell=print):
    """Run a grid undisturbed and disturbed, both below `folder`."""
    reference, other = folder / "reference", folder / "disturbed"
    startup, seconds = finish(grid, reference)
    tell(f"undisturbed: {seconds:.0f} s, {len(stages(reference))} stages, the first after {startup:.0f} s")
    done = disturbed(grid, other, kills, startup=startup, seconds=seconds, seed=seed, tell=tell)
    assert done == kills, f"it ended after {done} kills: give fewer"
    tables = read_tables(reference)
    assert tables and read_tables(other) == tables
    assert {path.name for path in stages(other)} == {path.name for path in stages(reference)}

    # Cut off two jobs' files: these jobs are run again, no other is, and no stage.
    before, jobs = stages(other), sorted(other.glob("grid/jobs/*.json"))
    moments = {path: path.stat().st_mtime_ns for path in jobs}
    cut(jobs[0])
    cut(other / "grid" / "notebooks" / f"{jobs[-1].stem}.ipynb")
    next((other / "grid" / "tables").iterdir()).unlink()
    finish(grid, other)
    changed = [path for path in jobs if path.stat().st_mtime_ns != moments[path]]
    assert changed == [jobs[0], jobs[-1]], changed
    assert stages(other) == before and read_tables(other) == tables
    rows = sum(len(table.splitlines()) - 1 for table in tables.values())
    tell(f"killed {done} times: the same tables of {rows} rows, no finished stage written again")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--grid", default="digits")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(given.grid, Path(folder), given.kills, given.seed)


if __name__ == "__main__":
    main()
