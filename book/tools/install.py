"""Create .venv and install the pinned packages; run by `make` with the system's Python, so standard library only.

PyTorch's own index has builds for the CPU that are gigabytes smaller than the ordinary ones. They are taken on a Linux
machine without an NVIDIA GPU where that index answers a quick probe; everywhere else the ordinary index serves.
"""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
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
        raise ValueError(f"requirements.txt should pin torch and torchvision with ==, found {pins}")
    return pins


def main() -> None:
    """Install everything, and stop at the first command that fails."""
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    commands = [
        [*pip, "-r", "requirements.txt", "-c", "constraints.txt"],
        [*pip, "--quiet", "--no-deps", "--no-build-isolation", "--editable", "."],
    ]
    if sys.platform == "linux" and not has_nvidia_gpu() and answers(CPU_INDEX):
        pins = torch_pins((ROOT / "requirements.txt").read_text(encoding="utf8"))
        # --no-deps: what torch needs comes, pinned, with everything else.
        commands.insert(0, [*pip, "--no-deps", "--index-url", CPU_INDEX, *pins])
    for command in commands:
        print("$", " ".join(command), flush=True)
        finished = subprocess.run(command, cwd=ROOT)
        if finished.returncode:
            sys.exit(f"pip failed with exit status {finished.returncode}")


if __name__ == "__main__":
    main()
