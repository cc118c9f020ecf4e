"""What the benchmarks share: how long something takes and how much memory, on which machine, at which commit."""

import argparse
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch


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


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit():
    """The commit of this file's repository, with "-dirty" where it was edited since; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


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
