"""Common parts of experiments in stages: settings and presets, the data set, resumable trainings, and workers.

An experiment is a frozen dataclass of :class:`Settings`, ``Experiment``, with the fields ``dataset`` (a name),
``options`` (of the data set) and ``root`` (the folder of its files). Its module has ``PRESETS``, a function
``preset(name, **changes)`` that returns an ``Experiment``, and a function ``run(experiment, store, *, seeds, ...)``
that returns results as rows.
"""

import functools
import multiprocessing
import os
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, fields, is_dataclass, replace
from numbers import Integral

import torch

from permask_core.data import check_files, load_dataset, options_of
from permask_core.models import module_of
from permask_core.runs.checks import check_one_of, nearest
from permask_core.runs.files import load_tensors
from permask_core.runs.progress import progress
from permask_core.runs.store import Store
from permask_core.training.resume import fingerprint


class Settings:
    """Base class of the dataclasses of experiments; as text, a line of ``name value`` pairs."""

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Integral) and not isinstance(value, (int, bool)):  # NumPy's
                object.__setattr__(self, one.name, int(value))

    def __str__(self):
        return ", ".join(f"{one.name} {getattr(self, one.name)}" for one in fields(self) if one.name != "root")

    def check_names(self, **known):
        """Raise ValueError unless each of these settings is one of its known names."""
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(names)}")

    def select(self, *names):
        """Return some of the settings as a dict."""
        return {name: getattr(self, name) for name in names}

    def as_dict(self):
        """Return all settings as a dict, except the folder of files."""
        return self.select(*(one.name for one in fields(self) if one.name != "root"))

    def stage_parameters(self, *names):
        """Return some of the settings as a dict for :meth:`permask_core.runs.store.Store.stage`. A hash of the data
        replaces the options of the data set, and the modules of the networks are added."""
        settings = self.select(*(name for name in names if name != "options"))
        networks = [getattr(self, name) for name in ("model", "teacher", "student") if name in names]
        return settings | {"data": content(self), "modules": sorted({module_of(name) for name in networks})}


# ---- Settings with changes -------------------------------------------------------------------------------------------

# The setting to which options belong: they are not valid for a different data set or network.
OWNERS = {"options": "dataset", "teacher_options": "teacher", "student_options": "student"}

# Settings that may differ from the published ones in a reproduction.
FREE = ("root", "readers", "processes", "precision", "accumulate")


def change(settings, changes):
    """Return a dataclass of settings with changes.

    Parameters
    ----------
    settings : dataclass
    changes : dict
        New values by name of the field; None is ignored. A mapping changes only its own entries in a recipe or options,
        but options of a different data set or network replace all old options.

    Raises
    ------
    ValueError
        If there is no such field, or a value is out of range.

    Examples
    --------
    >>> from permask_core.training import Recipe
    >>> change(Recipe(), {"epochs": 2, "lr": None}) == Recipe(epochs=2)
    True
    """
    changes, known = drop_none(changes), [one.name for one in fields(settings)]
    for name in changes:
        if name not in known:
            raise ValueError(f"unknown setting {name!r}{nearest(name, known)}: expected one of {', '.join(known)}")
    others = {options for options, owner in OWNERS.items() if options in known
              and changes.get(owner, getattr(settings, owner)) != getattr(settings, owner)}
    changed = dict.fromkeys(others, {}) | changes
    for name, value in changes.items():
        old = getattr(settings, name)
        if isinstance(value, Mapping) and is_dataclass(old):
            try:
                changed[name] = change(old, value)
            except ValueError as error:
                raise ValueError(f"{name} is {drop_none(value)!r}: {error}") from None
        elif isinstance(value, Mapping) and isinstance(old, dict) and name not in others:
            changed[name] = {**old, **value}
    return replace(settings, **changed)


def drop_none(changes):
    """Return the changes that are not None."""
    return {name: value for name, value in changes.items() if value is not None}


def change_preset(presets, name, experiment, changes):
    """Return an experiment with the settings of a preset and changes: see :func:`change`."""
    check_one_of("preset", name, presets)
    return change(change(experiment, presets[name].settings), changes)


def same_results(experiment, other, free=()):
    """Whether two experiments differ only in settings that are in ``free`` or do not affect accuracies: ``root``,
    ``readers``, ``processes``, ``precision`` and ``accumulate``."""
    def decisive(settings):
        return {name: decisive(value) if isinstance(value, dict) else value for name, value in settings.items()
                if name not in (*FREE, *free)}

    return decisive(asdict(experiment)) == decisive(asdict(other))


# ---- Data ------------------------------------------------------------------------------------------------------------

def data(experiment):
    """Return the data set of the experiment; the last one is cached."""
    return _loaded(experiment.dataset, _options(experiment))


def check_data(experiment):
    """Raise FileNotFoundError, which says how to get them, if files of the experiment's data set are missing and will
    not be downloaded; nothing is read."""
    options = dict(_options(experiment))
    if not options.get("download"):
        check_files(experiment.dataset, options.get("root"))


def content(experiment):
    """Return a short hash of the data: of numbers in memory, or of the names, sizes and labels of files. It does not
    depend on the folder of the files and on how they are read."""
    return _content(experiment.dataset, _options(experiment))


def _options(experiment):
    rooted = {"root": experiment.root} if "root" in options_of(experiment.dataset) else {}
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value)
                        for name, value in {**rooted, **experiment.options}.items()))


@functools.lru_cache(maxsize=1)
def _loaded(name, options):
    return load_dataset(name, **dict(options))


@functools.lru_cache(maxsize=256)
def _content(name, options):
    loaded = _loaded(name, options)
    return fingerprint(loaded.train, loaded.test)


# ---- Trainings -------------------------------------------------------------------------------------------------------

def discard_damaged(path):
    """Delete the file of an unfinished training if it is damaged, and print a message."""
    try:
        load_tensors(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        print(f"{error}: the training starts from the beginning", flush=True)
        path.unlink()


def train_stage(store, name, train, *, modules=(), **parameters):
    """Return a stage that trains: ``train`` gets a file from which an interrupted run continues."""
    unfinished = store.unfinished(name, train, modules=modules, **parameters)

    @functools.wraps(train)  # the stage depends on its code
    def compute():
        discard_damaged(unfinished)
        return train(unfinished)

    result = store.stage(name, compute, modules=modules, **parameters)
    unfinished.unlink(missing_ok=True)
    return result


# ---- Workers ---------------------------------------------------------------------------------------------------------

def run_jobs(run_job, jobs, store, workers, total):
    """Return the rows of all jobs, ``run_job(store, *job)`` each, computed by this process or by workers; ``total`` is
    their number. The environment variable PERMASK_WORKERS limits the workers, where other notebooks run at once."""
    if (workers := min(workers, int(os.environ.get("PERMASK_WORKERS", workers)))) > 1:
        return run_in_parallel(run_job, jobs, store, workers)
    # Processes with different settings that share a store start with different jobs, and wait less for common stages.
    first = zlib.crc32(repr(jobs).encode()) % max(1, len(jobs))
    order = [*range(first, len(jobs)), *range(first)]
    found = progress(((i, row) for i in order for row in run_job(store, *jobs[i])), "runs", total=total)
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def run_in_parallel(run_job, jobs, store, workers):
    """Return the rows of all jobs, ``run_job(store, *job)`` each, in order, computed by several processes.

    Raises
    ------
    RuntimeError
        If a worker process died.
    """
    # A server that has imported the library and other slow modules (for torch.export, for the digits) forks the
    # workers; a fork of this process could inherit held locks. Workers of joblib's loky would import everything
    # themselves, which takes 9 s for each in every call, and would continue after the parent was killed.
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([run_job.__module__, "torch._dynamo", "sklearn.datasets"])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        # Each worker has a copy of the store whose counts start from zero.
        futures = [pool.submit(_run_and_count, run_job, Store(store.folder, store.on_change), *job) for job in jobs]
        try:
            for future in progress(as_completed(futures), "seeds", total=len(futures)):
                _, computed, found = future.result()
                store.computed, store.found = store.computed + computed, store.found + found
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process died. A script must call this below `if __name__ == \"__main__\":`, "
                               "because every worker imports it again; workers=1 starts no process") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waiting seeds are not started
            raise
        return [row for future in futures for row in future.result()[0]]


def _begin_worker():
    torch.set_num_threads(1)
    os.environ["PERMASK_DISPLAY"] = "static"  # bars of several workers would overwrite one another

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)  # the parent was killed; files are complete, and no one waits for the rest

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_and_count(run_job, store, *job):
    return list(run_job(store, *job)), store.computed, store.found
