"""What experiments in stages share: settings and presets, the data set, trainings that go on after a kill, and workers.

An experiment is a frozen dataclass of :class:`Settings`, ``Experiment``, with the fields ``dataset`` (a name),
``options`` (of the data set) and ``root`` (where its files lie). Its module has ``PRESETS``, a function
``preset(name, **changes)`` that makes an ``Experiment`` of one, and a function
``run(experiment, store, *, seeds, ...)`` that gives results as rows.
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
    """What the dataclasses of experiments share; as text, a line of ``name value`` pairs."""

    def __post_init__(self):
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Integral) and not isinstance(value, (int, bool)):  # NumPy's
                object.__setattr__(self, one.name, int(value))

    def __str__(self):
        return ", ".join(f"{one.name} {getattr(self, one.name)}" for one in fields(self) if one.name != "root")

    def check_names(self, **known):
        """Raise ValueError unless each of these settings is one of the names that are known."""
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(names)}")

    def select(self, *names):
        """Some of the settings as a dict."""
        return {name: getattr(self, name) for name in names}

    def as_dict(self):
        """All settings as a dict, except where files lie."""
        return self.select(*(one.name for one in fields(self) if one.name != "root"))

    def stage_parameters(self, *names):
        """Some of the settings as a dict for :meth:`permask_core.runs.store.Store.stage`: what the data are stands
        there for the options of the data set, and with it go the modules of the networks."""
        settings = self.select(*(name for name in names if name != "options"))
        networks = [getattr(self, name) for name in ("model", "teacher", "student") if name in names]
        return settings | {"data": content(self), "modules": sorted({module_of(name) for name in networks})}


# ---- Settings with changes -------------------------------------------------------------------------------------------

# Whose options they are: those of another data set or network are others.
OWNERS = {"options": "dataset", "teacher_options": "teacher", "student_options": "student"}

# What may differ from published settings without making a run another experiment, wherever it stands.
FREE = ("root", "readers", "processes", "precision", "accumulate")


def change(settings, changes):
    """A dataclass of settings with changes.

    Parameters
    ----------
    settings : dataclass
    changes : dict
        By the names of its fields. None changes nothing. A mapping changes the entries that it names, of a recipe or of
        options; but options of another data set or network replace all that were there.

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
    """The changes that are not None."""
    return {name: value for name, value in changes.items() if value is not None}


def change_preset(presets, name, experiment, changes):
    """An experiment with the settings of a preset, and then with changes: see :func:`change`."""
    check_one_of("preset", name, presets)
    return change(change(experiment, presets[name].settings), changes)


def same_results(experiment, other, free=()):
    """Whether two experiments differ in nothing but what is ``free``, or in :data:`FREE`: neither decides about
    accuracies."""
    def decisive(settings):
        return {name: decisive(value) if isinstance(value, dict) else value for name, value in settings.items()
                if name not in (*FREE, *free)}

    return decisive(asdict(experiment)) == decisive(asdict(other))


# ---- Data ------------------------------------------------------------------------------------------------------------

def data(experiment):
    """The experiment's data set; the last one loaded stays in memory."""
    return _loaded(experiment.dataset, _options(experiment))


def check_data(experiment):
    """Raise FileNotFoundError, with the way to get them, unless the files of the experiment's data set are there or are
    to be fetched; nothing is read."""
    options = dict(_options(experiment))
    if not options.get("download"):
        check_files(experiment.dataset, options.get("root"))


def content(experiment):
    """A short hash of what is trained and tested on: of numbers in memory, or of the names, sizes and labels of files.
    Where the files lie decides about nothing, and neither does how they are read."""
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
    """Delete the file of an unfinished training if it is damaged, and say so."""
    try:
        load_tensors(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        print(f"{error}: the training starts from the beginning", flush=True)
        path.unlink()


def train_stage(store, name, train, *, modules=(), **parameters):
    """A stage that trains: ``train`` is given a file from which a run goes on that was interrupted."""
    unfinished = store.unfinished(name, train, modules=modules, **parameters)

    @functools.wraps(train)  # its code is what the stage depends on
    def compute():
        discard_damaged(unfinished)
        return train(unfinished)

    result = store.stage(name, compute, modules=modules, **parameters)
    unfinished.unlink(missing_ok=True)
    return result


# ---- Workers ---------------------------------------------------------------------------------------------------------

def run_jobs(run_job, jobs, store, workers, total):
    """The rows of all jobs, ``run_job(store, *job)`` each, ``total`` of them, by this process or by several workers."""
    if workers > 1:
        return run_in_parallel(run_job, jobs, store, workers)
    # Processes with other settings that share a store begin at other jobs, and wait less for what they have in common.
    first = zlib.crc32(repr(jobs).encode()) % max(1, len(jobs))
    order = [*range(first, len(jobs)), *range(first)]
    found = progress(((i, row) for i in order for row in run_job(store, *jobs[i])), "runs", total=total)
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


def run_in_parallel(run_job, jobs, store, workers):
    """The rows of all jobs, ``run_job(store, *job)`` each, in their order, computed by several processes.

    Raises
    ------
    RuntimeError
        If one of them died.
    """
    # A server that has imported the library once, and what else takes long (for torch.export, for the digits), forks
    # each worker; a fork of this process could inherit held locks. Workers of joblib's loky would import all of it
    # themselves, about 9 s of a core for each in every call, and train on after the parent was killed.
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([run_job.__module__, "torch._dynamo", "sklearn.datasets"])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        # Each worker counts in a copy of the store that starts from zero.
        futures = [pool.submit(_run_and_count, run_job, Store(store.folder, store.on_change), *job) for job in jobs]
        try:
            for future in progress(as_completed(futures), "seeds", total=len(futures)):
                _, computed, found = future.result()
                store.computed, store.found = store.computed + computed, store.found + found
        except BrokenProcessPool as error:
            raise RuntimeError("a worker process died. A script must call this below `if __name__ == \"__main__\":`, "
                               "because every worker imports it again; workers=1 needs no other process") from error
        except BaseException:
            pool.shutdown(cancel_futures=True)  # seeds that wait are not begun
            raise
        return [row for future in futures for row in future.result()[0]]


def _begin_worker():
    torch.set_num_threads(1)
    os.environ["PERMASK_DISPLAY"] = "static"  # bars of several workers would overwrite one another

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)  # the parent was killed; what is written is whole, and nobody waits for the rest

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run_and_count(run_job, store, *job):
    return list(run_job(store, *job)), store.computed, store.found
