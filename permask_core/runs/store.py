"""The store of a run: finished stages are loaded, all other stages are computed.

A stage has a name, plain parameters, and a function that computes tensors and a record from them. A stored stage is
loaded if its name and parameters are the same, if the versions of the libraries that affect numbers are the same, and
if no module of permask_core that its function can reach has changed, apart from docstrings and comments. Files are
written completely or not at all and verified when they are read. Jobs that share a store do not compute a stage twice.
"""

import ast
import hashlib
import inspect
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from permask_core.runs.files import load_tensors, locked, read_record, save_tensors, write_whole

# Only the installed ones count: no result depends on a library that is not installed.
LIBRARIES = ("torch", "torchvision", "numba", "numpy", "scipy", "scikit-learn", "timm", "transformers")
POLICIES = ("recompute", "keep")
HERE = Path(__file__).parents[1]  # permask_core


class Store:
    """Finished stages of a run, one file each, under a folder.

    Parameters
    ----------
    folder : path-like
        Created when the first stage is written. A relative folder is below the folder in the environment variable
        ``PERMASK_RUNS`` if that is set, and below the working directory otherwise.
    on_change : {"recompute", "keep"}, optional
        What to do with a stage whose code or libraries have changed since it was stored. ``"recompute"`` computes it
        again and does not delete the old file. ``"keep"`` loads the newest old one, prints which sources changed, and
        adds ``kept`` to its record and to that of each stage computed from it: each changed source with its old and
        new hash. The default is the environment variable ``PERMASK_ON_CHANGE``, or ``"recompute"``.

    Attributes
    ----------
    computed, found : int
        How many stages this object computed, and how many it loaded.

    Examples
    --------
    >>> import tempfile, torch
    >>> store = Store(tempfile.mkdtemp())
    >>> store.stage("ones", lambda: ({"x": torch.ones(2)}, {"sum": 2.0}), n=2)[0]["x"].tolist()
    [1.0, 1.0]
    >>> store.computed, store.found
    (1, 0)
    """

    def __init__(self, folder, on_change=None):
        self.folder = Path(os.environ.get("PERMASK_RUNS", ""), Path(folder).expanduser()).expanduser().absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: expected a folder for the run")
        self.on_change = on_change or os.environ.get("PERMASK_ON_CHANGE") or "recompute"
        if self.on_change not in POLICIES:
            raise ValueError(f"on_change is {self.on_change!r}: expected one of {', '.join(POLICIES)}")
        self.computed = self.found = 0
        self._seconds = 0.0  # spent in stages computed here: the time of a stage excludes that of its inner stages
        self._kept, self._said = {}, set()  # changed sources of stages that were kept; messages already printed

    def stage(self, name, compute, *, modules=(), **parameters):
        """Return the stored result of ``compute()``, or compute and store it.

        Parameters
        ----------
        name : str
            Names the stage and its folder.
        compute : callable
            Takes no arguments and returns ``(tensors, record)``: a dict of str to torch.Tensor, and a dict that JSON
            holds. The result must depend only on ``parameters``.
        modules : iterable of str
            Modules of permask_core that ``compute`` loads by name, without an import statement.
        **parameters
            Anything that JSON holds, and dataclasses of such values.

        Returns
        -------
        (dict of str to torch.Tensor, dict)
            The tensors, on the CPU, and the record with one more key, ``seconds``: how long the computation took,
            without its inner stages.

        Raises
        ------
        ValueError
            If the parameters or the record cannot be written as JSON. A damaged or wrong file is not an error: it is
            renamed to end in ".damaged", and the stage is computed again.
        """
        identity = self._identity(name, compute, modules, parameters)
        path = self._path(identity)
        result = self._finished(identity)
        if result is None:  # one of the jobs that need a stage computes it, the others wait
            with locked(path, f"waiting for another process that computes {name} {path.stem}"):
                result = self._finished(identity, repair=True) or self._computed(identity, compute)
        return result

    def stages(self, name, function, wanted, compute, at_once):
        """Finish many stages of one name, of which ``compute`` computes several at once.

        Stages that another process is computing are skipped. When all others are finished, this process waits for them,
        without holding a lock.

        Parameters
        ----------
        name : str
        function : callable
            The ``compute`` of :meth:`stage` for one of the stages; only its code is used, to identify the stages.
        wanted : list of dict
            The keyword arguments of :meth:`stage` for each stage, ``modules`` included.
        compute : callable
            Takes a list of indices into ``wanted`` and returns one result for each, in the form that ``compute`` of
            :meth:`stage` returns, with ``seconds`` in the record.
        at_once : int
            Largest number of stages in one call of ``compute``.
        """
        identities = [self._identity(name, function, own.get("modules", ()), {
            key: value for key, value in own.items() if key != "modules"}) for own in wanted]
        left = [i for i, identity in enumerate(identities) if self._finished(identity) is None]
        while left:
            elsewhere = []
            for part in (left[first:first + at_once] for first in range(0, len(left), at_once)):
                with ExitStack() as locks:
                    busy = [i for i in part if not _lock_now(locks, self._path(identities[i]))]
                    mine = [i for i in part if i not in busy and self._finished(identities[i], repair=True) is None]
                    self._kept, outer = {}, self._kept
                    for i, (tensors, result) in zip(mine, compute(mine) if mine else (), strict=True):
                        self._written(identities[i], tensors, result)
                    self._kept = outer | self._kept
                elsewhere += busy
            if elsewhere == left:
                path = self._path(identities[left[0]])
                with locked(path, f"waiting for another process that computes {name} {path.stem}"):
                    pass
            left = elsewhere

    def path(self, name, compute, *, modules=(), **parameters):
        """Return the file to which ``stage(name, compute, modules=modules, **parameters)`` is written."""
        return self._path(self._identity(name, compute, modules, parameters))

    def unfinished(self, name, compute, *, modules=(), **parameters):
        """Return the file in which a stage saves its progress. A file begun by a different version of the code is taken
        over only if ``on_change`` is ``"keep"``."""
        identity = self._identity(name, compute, modules, parameters)
        path = self._path(identity).with_suffix(".unfinished")
        begun = sorted(path.parent.glob(f"{_key(identity)}-*.unfinished"), key=lambda one: one.stat().st_mtime)
        if self.on_change == "keep" and begun and not path.exists():
            print(f"{name}: continues from {begun[-1].name}, although its code has changed since", flush=True)
            begun[-1].replace(path)
        return path

    def _finished(self, identity, repair=False):
        """Return the stored result, or None; ``repair`` renames files that have the right name but wrong content."""
        known, candidates = ("stage", "parameters"), []
        for path in self._path(identity).parent.glob(f"{_key(identity)}-*.safetensors"):
            with self._put_aside(path, repair):
                stored = read_record(path)
                if not isinstance(stored.get("result"), dict) or not {"sources", "versions"} <= stored.keys():
                    raise ValueError(f"{path} is not a stage with a result")
                if any(stored.get(part) != identity[part] for part in known):
                    raise ValueError(f"{path} holds the stage {stored.get('stage')!r} with other parameters than its "
                                     "name says")
                changed = _changed(stored, identity)
                candidates.append((bool(changed), -path.stat().st_mtime, path, changed))
        for other, _, path, changed in sorted(candidates):  # those of the current code first, then the newest
            if other and self.on_change != "keep":
                break
            with self._put_aside(path, repair):
                tensors, record = load_tensors(path)
                result = record["result"]
                if changed:
                    self._say(f"{identity['stage']}: kept from {record.get('commit', 'an unknown commit')}, although "
                              f"{', '.join(changed)} changed since")
                    result["kept"] = result.get("kept", {}) | changed
                self._kept |= result.get("kept", {})
                self.found += 1
                return tensors, result
        return None

    @contextmanager
    def _put_aside(self, path, repair):
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            if repair and path.exists():
                print(f"{error}. It is computed again; the old file was renamed to {path.name}.damaged", flush=True)
                path.replace(path.with_name(path.name + ".damaged"))

    def _say(self, text):
        if text not in self._said:
            print(text, flush=True)
            self._said.add(text)

    def _computed(self, identity, compute):
        start, inner, outer, self._kept = time.perf_counter(), self._seconds, self._kept, {}
        tensors, result = compute()
        own = time.perf_counter() - start - (self._seconds - inner)
        self._seconds += own
        found = self._written(identity, tensors, {**result, "seconds": own})
        self._kept = outer | self._kept  # a new dict: the record keeps its own
        return found

    def _written(self, identity, tensors, result):
        result = {**result, **({"kept": self._kept} if self._kept else {})}
        try:
            json.dumps(result)
        except TypeError as error:
            raise ValueError(f"the record of the stage {identity['stage']!r} cannot be written as JSON: "
                             f"{error}") from error
        path = self._path(identity)
        save_tensors(path, tensors, {**identity, "commit": commit(), "result": result})
        self.computed += 1
        # Read back from the file, so that the first run returns what a rerun loads.
        tensors, record = load_tensors(path)
        return tensors, record["result"]

    def _path(self, identity):
        sources = _hash({part: identity[part] for part in ("sources", "versions")})
        return self.folder / identity["stage"] / f"{_key(identity)}-{sources[:8]}.safetensors"

    @staticmethod
    def _identity(name, compute, modules, parameters):
        try:
            parameters = json.loads(json.dumps(parameters, default=plain))
        except TypeError as error:
            raise ValueError(f"a parameter of the stage {name!r} cannot be written as JSON: {error}") from error
        return {"stage": name, "parameters": parameters, "versions": versions(), "sources": sources(compute, modules)}


def _lock_now(locks, path):
    """Whether a file could be locked without waiting for another process; ``locks`` then holds the lock."""
    try:
        locks.enter_context(locked(path, wait=False))
    except Timeout:
        return False
    return True


def _hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _key(identity):
    return _hash([identity["stage"], identity["parameters"]])[:20]


def _changed(stored, identity):
    """Return the sources and libraries of a stored stage that have changed: "old -> new" hash or version by name.

    Only what the stored stage used counts: a stage computed on a CPU does not depend on the GPU kernels.
    """
    now = {**identity["versions"], **{name: _module_hash(name) for name in stored["sources"]}, **identity["sources"]}
    return {name: f"{was} -> {now.get(name)}" for name, was in {**stored["versions"], **stored["sources"]}.items()
            if now.get(name) != was}


def check_folder(folder, settings):
    """Create a folder for results with one set of settings, or check that it was created with these settings.

    Parameters
    ----------
    folder : path-like
        ``settings.json`` is written into it. A relative folder is resolved as in :class:`Store`.
    settings : dict
        Anything that JSON holds.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ValueError
        If the folder holds results with other settings; the message lists the differences.
    """
    path = Path(os.environ.get("PERMASK_RUNS", ""), Path(folder).expanduser()).absolute() / "settings.json"
    settings = json.loads(json.dumps(settings, default=plain))
    if path.exists() and path.with_name("results.json").exists():  # a run that did not finish is no reason to refuse
        try:
            there = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, or give another folder") from error
        differ = [f"{name} {there.get(name)!r} (here {settings.get(name)!r})" for name in sorted({*there, *settings})
                  if there.get(name) != settings.get(name)]
        if differ:
            raise ValueError(f"{path.parent} was begun with {', '.join(differ)}: give another folder, or delete it")
        return path.parent
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
    return path.parent


def plain(value):
    """Convert a dataclass to a dict and a NumPy integer to an int, for :func:`json.dumps`."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Integral):
        return int(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


@cache
def versions():
    """Return the versions of Python and of the installed libraries that affect numbers, as a dict."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit():
    """Return the commit of this library's repository, with "-dirty" if files were edited since; "unknown" without a
    repository or without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def device_name(device):
    """Return the name of a GPU, or that of the processor with its number of cores."""
    import torch  # here: loading finished stages does not need it

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def sources(function, modules=()):
    """Return the sources on which the result of a function depends: hashes of the code of its module and of all modules
    of permask_core that this module reaches by imports.

    Parameters
    ----------
    function : callable
        For a function of a notebook or script, the hashes are those of its own code and of all of permask_core.
    modules : iterable of str
        Further modules, which are loaded by name. Modules that a module of the library lists in a constant ``LOADED``,
        by the type of device on which it loads them, need not be given.

    Returns
    -------
    dict of str to str
        Hashes by name of the module.
    """
    module = sys.modules[function.__module__].__name__
    if module.split(".")[0] == "permask_core":
        roots, own = (module, *modules), {}
    else:
        roots = ("permask_core",)
        own = {f"{module}.{function.__qualname__}": _code_hash(textwrap.dedent(inspect.getsource(function)))}
    return own | {name: _module_hash(name) for name in _reached(roots, _device())}


def _device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def _reached(roots, device):
    """Return the names of the permask_core modules that ``roots`` reach by import statements, including ``roots``."""
    if roots == ("permask_core",):
        return sorted(".".join(path.relative_to(HERE.parent).with_suffix("").parts).removesuffix(".__init__")
                      for path in HERE.rglob("*.py"))
    found, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in found and (module := _module(name)):  # None if it is a function, not a module
            found.add(name)
            waiting += [*module.imported, *module.loaded.get(device, [])]
    return sorted(found)


class _Module(NamedTuple):
    """The hash of a module's code, the names in its import statements that may be modules of permask_core, and the
    modules that it loads by name, by type of device."""

    hash: str
    imported: list[str]
    loaded: dict[str, list[str]]


@cache
def _module(name):
    """Return a module of permask_core, or None if there is none of that name."""
    # By its path, because asking the import system would import all parent packages.
    place = HERE.joinpath(*name.split(".")[1:])
    path = next(filter(Path.is_file, (place / "__init__.py", place.with_suffix(".py"))), None)
    if path is None or not name.startswith("permask_core"):
        return None
    tree, imported, loaded = ast.parse(path.read_text()), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("permask_core"):
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names if alias.name.startswith("permask_core.")]
        elif isinstance(node, ast.Assign) and [getattr(one, "id", None) for one in node.targets] == ["LOADED"]:
            loaded = ast.literal_eval(node.value)
    return _Module(_code_hash(tree), imported, loaded)


def _module_hash(name):
    return (_module(name) or (None,))[0]


def _code_hash(code):
    """Return a hash of a syntax tree or source text, without docstrings; comments and layout do not count either."""
    try:
        tree = code if isinstance(code, ast.AST) else ast.parse(code)
    except SyntaxError:  # a lambda in the middle of a call: its lines are not complete code
        return hashlib.sha256(code.encode()).hexdigest()[:16]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
                node, clean=False) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
