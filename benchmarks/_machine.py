"""What the benchmarks share: how long something takes and how much memory, and how results are written."""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch

from permask_core.runs.files import write_whole


def timed(part, device):
    """(seconds, result) of one call, of the device's work too."""
    def finish():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    start = time.perf_counter()
    result = part()
    finish()
    return time.perf_counter() - start, result


def resident(field):
    """``VmRSS``, the resident memory of this process, or ``VmHWM``, its peak, in bytes; Linux alone has them."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def at_least(least):
    """The type of an argument that is a whole number of at least ``least``."""
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {least}")
        return int(text)
    return number


def command(script, argv):
    """How a script is called, with the arguments that its ``main`` was given or else with those of this process."""
    return " ".join([f"python benchmarks/{script}.py", *(sys.argv[1:] if argv is None else argv)])


def written(path, record, indent=1):
    """Write a record as JSON, whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(record, indent=indent) + "\n")
