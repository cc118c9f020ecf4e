"""Measure once which loop is fastest on this processor, and keep the answer on disk.

All choices compute the same numbers bit for bit, so a choice changes the time of a call and nothing else.
"""

import json
import os
import time
from pathlib import Path
from statistics import median

from permask_core.runs.files import write_whole

TUNE = "PERMASK_TUNE"  # 0 in this variable of the environment: no measurement, the rule decides


def choose(key, calls, rule, *, rounds=15, repeats=20):
    """Return the name of the fastest call: from the disk, by measuring, or by the rule if measuring is switched off.

    Parameters
    ----------
    key : str
        What the choice is for: the loop, the processor and the versions of what compiled it.
    calls : dict of callable
        By name, in JSON's types; each is called once before it is timed.
    rule
        The name to return without a measurement.
    rounds, repeats : int
        The calls take turns in ``rounds``, each repeated.

    Returns
    -------
    The name with the smallest median time.

    Examples
    --------
    >>> choose("a loop without alternatives", {0: lambda: None}, rule=0)
    0
    """
    if len(calls) == 1 or os.environ.get(TUNE) == "0":
        return rule
    kept = _read().get(key)
    for name in calls:
        if type(kept) is type(name) and kept == name:  # in JSON false is not 0
            return name
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append(time.perf_counter() - start)
    best = min(times, key=lambda name: median(times[name]))
    _keep(key, best)
    return best


def path():
    """The file of choices, in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "permask" / "choices.json"


def _read():
    try:
        kept = json.loads(path().read_text())
        return kept if isinstance(kept, dict) else {}
    except (OSError, ValueError, RuntimeError):  # none, damaged, or no home
        return {}


def _keep(key, best):
    """Keep a choice, if there is a folder to write to."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with write_whole(path()) as temporary:
            temporary.write_text(json.dumps(_read() | {key: best}, indent=1) + "\n")
    except (OSError, RuntimeError):
        pass
