"""Repeat every notebook with other seeds and other arithmetic, and record how often its claims held.

`make replicate N=10`: each of 10 repetitions adds a multiple of 1000 to the seed of every notebook. Three more
repetitions do not change the seeds but the arithmetic: narrower vector units twice, and two threads. The work can be
interrupted and restarted: finished repetitions are in build/replicate, and finished stages are loaded from the store of
their repetition. The rates are written to permask_core/data/measured/claims.json. A notebook whose code has changed has
no rates until it is repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import papermill

from book.tools.execute import SEED, run, seeded
from permask_core.runs.files import write_whole
from permask_core.runs.notebooks import notebook_version, read_claims
from permask_core.runs.store import commit, device_name, versions

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "replicate"
RATES = ROOT / "permask_core" / "data" / "measured" / "claims.json"
ARITHMETIC = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}


def repetitions(n: int) -> dict:
    """Return the settings of the `n` repetitions with other seeds and of those with other arithmetic, dicts by name."""
    return {f"seeds + {1000 * k}": {"seeds": 1000 * k, "environment": {}} for k in range(1, n + 1)} | {
        name: {"seeds": 0, "environment": environment} for name, environment in ARITHMETIC.items()}


def replicated(notebooks: list[Path]) -> list[Path]:
    """Return those of `notebooks` that draw random numbers: those with a seed among their parameters."""
    return [path for path in notebooks if SEED in papermill.inspect_notebook(path)]


def result_path(name: str, page: str) -> Path:
    """Return the path of the result of repeating a page."""
    return WORK / name.replace(" ", "") / f"{page}.json"


def result(name: str, source: Path) -> dict | None:
    """Return the result of repeating the notebook `source`, or None if this version was not repeated."""
    path = result_path(name, source.stem)
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf8"))
    return found if found["version"] == notebook_version(source) else None


def repeat(name: str, source: Path) -> None:
    """Execute the notebook `source` in this process as one repetition, and store its claims."""
    settings = json.loads(os.environ["PERMASK_REPETITION"])
    target = result_path(name, source.stem).with_suffix(".ipynb")
    version = notebook_version(source)
    if failure := run(source, target, seeded(source, settings["seeds"])):
        sys.exit(f"{source}, {name}: {failure}\nThe notebook until the error is {target}.")
    record = {"version": version, "machine": {"processor": device_name("cpu"), "commit": commit(),
                                              "versions": versions()}, "claims": read_claims(target)}
    with write_whole(target.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf8")


def started(name: str, settings: dict, source: Path) -> bool:
    """Run :func:`repeat` in the environment of a repetition and return whether it succeeded."""
    folder = result_path(name, source.stem).parent
    figures = folder / "figures"  # separate from those of the book
    figures.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings["environment"], "PERMASK_DISPLAY": "static",
                   "PERMASK_RUNS": str(folder), "PERMASK_FIGURES": str(figures), "PYTHONPATH": str(ROOT),
                   "PERMASK_REPETITION": json.dumps(settings)}
    command = [sys.executable, "-m", "book.tools.replicate", "--repeat", name, str(source)]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode == 0


def gather(named: dict, notebooks: list[Path]) -> dict:
    """Return the record of all results for the current version of their notebook: those of an earlier record, and those
    in this folder, which replace them."""
    kept = json.loads(RATES.read_text(encoding="utf8")) if RATES.exists() else {"repetitions": {}, "pages": {}}
    named = kept["repetitions"] | {name: {"machines": [], **kept["repetitions"].get(name, {}), **settings}
                                   for name, settings in named.items()}
    record = {"command": f"make replicate N={len(named) - len(ARITHMETIC)}", "repetitions": named, "pages": {}}
    for source in notebooks:
        page = kept["pages"].get(source.stem, {})
        claims = page["claims"] if page.get("version") == notebook_version(source) else {}
        for name in named:
            if found := result(name, source):
                machines = record["repetitions"][name]["machines"]
                machines += [found["machine"]] if found["machine"] not in machines else []
                for one in found["claims"]:
                    claims.setdefault(one["sentence"], {})[name] = {key: one[key] for key in ("holds", "evidence")}
        if claims:
            record["pages"][source.stem] = {"version": notebook_version(source), "claims": claims}
    return record


def main(n: int, only: list[str], jobs: int) -> int:
    """Run missing repetitions, write the rates, and return how many notebooks failed."""
    everything = sorted((ROOT / "notebooks").glob("*.ipynb"))
    unknown = set(only) - {path.stem for path in everything}
    if unknown:
        sys.exit(f"unknown notebooks {', '.join(sorted(unknown))}: expected some of "
                 f"{', '.join(path.stem for path in everything)}")
    notebooks = replicated([path for path in everything if path.stem in only or not only])
    named = repetitions(n)
    waiting = [(name, settings, source) for name, settings in named.items() for source in notebooks
               if not result(name, source)]
    print(f"{len(named) * len(notebooks) - len(waiting)} of {len(named) * len(notebooks)} repetitions of notebooks are "
          "finished", flush=True)
    failed = []

    def work(job):
        failed.extend([] if started(*job) else [job])
        left = sum(result(name, source) is None for name, _, source in waiting)
        print(f"{job[2].stem}, {job[0]}: {'failed' if job in failed else 'done'}; {left} left", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, waiting))
    record = json.dumps(gather(named, replicated(everything)), indent=1, ensure_ascii=False)
    with write_whole(RATES) as temporary:
        temporary.write_text(record + "\n", encoding="utf8")
    print(f"The rates are in {RATES.relative_to(ROOT)}.")
    return len(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--repeat"]:
        repeat(sys.argv[2], Path(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
        parser.add_argument("n", type=int, help="repetitions with other seeds")
        parser.add_argument("--only", nargs="*", default=[], help="names of notebooks (default: all)")
        parser.add_argument("--jobs", type=int, default=2, help="notebooks at once")
        given = parser.parse_args()
        sys.exit(main(given.n, given.only, given.jobs))
