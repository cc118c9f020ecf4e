"""A run's directory: stages that are finished are found again, the others are computed.

A stage has a name and plain parameters, and a function that computes tensors and a record from them. Its key is made of
the name, the parameters, the versions of the libraries that decide about numbers, and the source of every permask_core
module that the function can reach, so that an edited library never serves an old result. Files are written whole or not
at all, and jobs that share a store do not compute a stage twice.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

from permask_core.files import is_whole, load_tensors, locked, save_tensors, written_whole

LIBRARIES = ("torch", "torchvision", "numba", "numpy", "scipy", "scikit-learn")
OPTIONAL = ("timm", "transformers")
HERE = Path(__file__).parent


class Store:
    """Finished stages of a run, one file each, under a folder.

    Parameters
    ----------
    folder : path-like
        Made when the first stage is written. A relative folder lies below the environment variable ``PERMASK_RUNS``
        where that is set, and below the working directory otherwise.

    Attributes
    ----------
    computed, found : int
        How many stages this object computed, and how many it found finished.
    """

    def __init__(self, folder):
        self.folder = Path(os.environ.get("PERMASK_RUNS", ""), Path(folder).expanduser()).expanduser().absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: expected a folder for the run")
        self.computed = self.found = 0
        self._seconds = 0.0  # spent by stages computed here, so that a stage is not charged for those it asked for

    def stage(self, name, compute, **parameters):
        """The result of ``compute()``, computed now or found finished.

        Parameters
        ----------
        name : str
            Names the stage and its folder.
        compute : callable
            Takes nothing and returns ``(tensors, record)``: a dict of str to torch.Tensor, and a dict that JSON holds.
            Its result must depend on nothing but ``parameters``.
        **parameters
            Anything that JSON holds, dataclasses of such values included.

        Returns
        -------
        (dict of str to torch.Tensor, dict)
            The tensors on the CPU; the record has gained ``seconds``: how long the computation took when
            it was made, without the stages that it asked for in turn.

        Raises
        ------
        ValueError
            If the stage's file holds another stage, or the parameters or the record cannot be written as JSON. A
            damaged file is reported and made again.
        """
        identity = self._identity(name, compute, parameters)
        path = self._path(identity)
        result = self._finished(path, name)
        if result is None:  # of several jobs that need a stage one computes it, and the others wait
            with locked(path, f"waiting for another process that computes {name} {path.stem}"):
                result = self._finished(path, name) or self._computed(path, name, identity, compute)
        return result

    def _finished(self, path, name):
        if not path.exists() or not is_whole(path):
            return None
        tensors, record = load_tensors(path)
        if record.get("stage") != name:
            raise ValueError(f"{path} holds {record.get('stage') or record.get('kind')!r}: expected the stage {name!r}")
        self.found += 1
        return tensors, record["result"]

    def _computed(self, path, name, identity, compute):
        if path.exists():  # a disk that was full, or a copy that was cut off
            print(f"{path} is damaged: it is made again", flush=True)
        start, inner = time.perf_counter(), self._seconds
        tensors, result = compute()
        own = time.perf_counter() - start - (self._seconds - inner)
        self._seconds += own
        result = {**result, "seconds": own}
        try:
            json.dumps(result)
        except TypeError as error:
            raise ValueError(f"the record of the stage {name!r} cannot be written as JSON: {error}") from error
        save_tensors(path, tensors, {**identity, "result": result})
        self.computed += 1
        # What a rerun would find is what the first run returns: through the file.
        tensors, record = load_tensors(path)
        return tensors, record["result"]

    def path(self, name, compute, **parameters):
        """The file in which ``stage(name, compute, **parameters)`` is kept."""
        return self._path(self._identity(name, compute, parameters))

    def _path(self, identity):
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        return self.folder / identity["stage"] / f"{digest}.safetensors"

    @staticmethod
    def _identity(name, compute, parameters):
        try:
            parameters = json.loads(json.dumps(parameters, default=_plain))
        except TypeError as error:
            raise ValueError(f"a parameter of the stage {name!r} cannot be written as JSON: {error}") from error
        return {"stage": name, "parameters": parameters, "versions": versions(), "source": source_hash(compute)}


def check_folder(folder, settings):
    """Make a folder for the results of one set of settings, or make sure that it is theirs.

    Parameters
    ----------
    folder : path-like
        Gets ``settings.json``. Relative folders lie where :class:`Store`'s do.
    settings : dict
        Anything that JSON holds.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ValueError
        If the folder holds results of other settings; it says which differ.
    """
    path = Path(os.environ.get("PERMASK_RUNS", ""), Path(folder).expanduser()).absolute() / "settings.json"
    settings = json.loads(json.dumps(settings, default=_plain))
    if path.exists():
        try:
            there = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, or give another folder") from error
        differ = [f"{name} {there.get(name)!r} (here {settings.get(name)!r})" for name in sorted({*there, *settings})
                  if there.get(name) != settings.get(name)]
        if differ:
            raise ValueError(f"{path.parent} was begun with {', '.join(differ)}: give another folder, or delete it")
        return path.parent
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
    return path.parent


def _plain(value):
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    raise TypeError(f"{value!r} is a {type(value).__name__}")


@cache
def versions():
    """Versions of Python and of the libraries that decide about numbers, as a dict."""
    installed = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    return {"python": platform.python_version(), **{name: version(name) for name in (*LIBRARIES, *installed)}}


def commit():
    """The commit of the repository in which this library lies, with "-dirty" where it was edited since; "unknown" where
    it lies in none, or there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def device_name(device):
    """What a device is called: a GPU's name, or the processor's with its number of cores."""
    import torch  # who looks for finished stages only need not wait for it

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def source_hash(function):
    """A hash of the source that computes ``function``: its module and, through imports, all of permask_core that it
    reaches.

    A function of a notebook or script is taken by its own source, with all of permask_core.
    """
    module = sys.modules[function.__module__]
    if module.__name__.split(".")[0] == "permask_core":
        return _modules_hash(module.__name__, "")
    return _modules_hash("permask_core", inspect.getsource(function))


@cache
def _modules_hash(root, extra):
    digest = hashlib.sha256(extra.encode())
    for name, path in sorted(_reached(root).items()):
        digest.update(f"{name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _reached(root):
    """Files of the permask_core modules that ``root`` reaches through its import statements, itself included."""
    if root == "permask_core":
        return {str(path.relative_to(HERE)): path for path in HERE.rglob("*.py")}
    found, waiting = {}, [root]
    while waiting:
        name = waiting.pop()
        # By its path, because to ask the import system means to import all packages above.
        place = HERE.joinpath(*name.split(".")[1:])
        path = next(filter(Path.is_file, (place / "__init__.py", place.with_suffix(".py"))), None)
        if name in found or path is None:  # or the name of a function, not of a module
            continue
        found[name] = path
        waiting += _imported(path)
    return found


@cache
def _imported(path):
    """What the import statements of a file name that may be a module of permask_core."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("permask_core"):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("permask_core.")]
    return names
