"""Create .venv and install the pinned packages; `make` runs it with the system's Python, so it uses the standard
library.

The output of pip is written to .venv/pip.log; the terminal shows one line. PyTorch's own index has CPU builds that are
gigabytes smaller than the default builds. They are installed on Linux without an NVIDIA GPU if that index responds to a
quick probe; otherwise the default index is used.
"""

import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
BACK = "\r\033[K"  # go to the start of the line and clear it
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def has_nvidia_gpu() -> bool:
    """Return whether this machine has an NVIDIA driver."""
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


def answers(index: str, seconds: float = 3.0) -> bool:
    """Return whether the package index `index` serves torch within `seconds`."""
    try:
        with urlopen(f"{index}/torch/", timeout=seconds) as reply:
            return reply.status == 200
    except OSError:  # URLError, HTTPError and a timeout are all OSErrors
        return False


def torch_pins(requirements: str) -> list[str]:
    """Return the lines of `requirements` that pin torch and torchvision.

    Raises
    ------
    ValueError
        If either is not pinned with ``==``.
    """
    pins = re.findall(r"^(?:torch|torchvision)==\S+", requirements, flags=re.MULTILINE)
    if len(pins) != 2:
        raise ValueError(f"requirements.txt pins {pins}: expected torch and torchvision with ==")
    return pins


def main() -> None:
    """Install everything, and stop at the first command that fails."""
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    # --no-compile: Python compiles a module when it is first imported, and most of them never are.
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off",
           "--no-compile"]
    commands = [
        [*pip, "-r", "requirements.txt", "-c", "constraints.txt"],
        [*pip, "--no-deps", "--no-build-isolation", "--editable", "."],
    ]
    if sys.platform == "linux" and not has_nvidia_gpu() and answers(CPU_INDEX):
        pins = torch_pins((ROOT / "requirements.txt").read_text(encoding="utf8"))
        # --no-deps: the dependencies of torch are installed, pinned, with all other packages.
        commands.insert(0, [*pip, "--no-deps", "--index-url", CPU_INDEX, *pins])
    log = VENV / "pip.log"
    log.write_text("")
    start = time.monotonic()
    print("Installing the pinned packages into .venv; this takes some minutes ...", end="", flush=True)
    for command in commands:
        status = run(command, log)
        if status:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            sys.exit(f"\n{last}\npip failed with exit status {status}; all of its output is in {log}")
    print(f"{BACK if sys.stdout.isatty() else ' '}done in {time.monotonic() - start:.0f} s", flush=True)


def run(command: list[str], log: Path) -> int:
    """Run `command`, append its output to `log`, count packages at a terminal, and return the exit status."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace") as pip, log.open("a") as file:
        print("$", *command, file=file)
        found = 0
        for line in pip.stdout:
            file.write(line)
            found += line.startswith(("Collecting", "Processing"))
            if sys.stdout.isatty():
                what = "installing" if line.startswith("Installing collected") else f"{found} packages found"
                print(f"{BACK}Installing the pinned packages into .venv: {what} ...", end="", flush=True)
    return pip.returncode


if __name__ == "__main__":
    main()
