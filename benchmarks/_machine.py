"""Common parts of the benchmarks: measuring time and memory, and writing results."""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch

from permask_core.runs.files import write_whole


def timed(part, device):
    """Return (seconds, result) of one call, including the work of the device."""
    def finish():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    start = time.perf_counter()
    result = part()
    finish()
    return time.perf_counter() - start, result


def resident(field):
    """Return ``VmRSS``, the resident memory of this process, or ``VmHWM``, its peak, in bytes (Linux only)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def at_least(least):
    """Return the type of an argument that is an integer of at least ``least``."""
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {least}")
        return int(text)
    return number


def command(script, argv):
    """Return the command line of a script, with the arguments of its ``main`` or else those of this process, except the
    path of the result."""
    line = " ".join([f"python benchmarks/{script}.py", *(sys.argv[1:] if argv is None else argv)])
    return re.sub(r" --result \S+", "", line)


def written(path, record, indent=1):
    """Write a record as JSON, completely or not at all; the folder is created if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=indent) + "\n")
