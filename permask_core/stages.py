"""What experiments in stages share: their data set, trainings that go on after a kill, and workers for their runs.

An experiment is a dataclass with the fields ``dataset`` (a name), ``options`` (of the data set) and ``root`` (where its
files lie).
"""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache

import torch

from permask_core.data import load_dataset, options_of
from permask_core.files import is_whole
from permask_core.progress import progress
from permask_core.resume import described
from permask_core.store import Store


def data(experiment):
    """The experiment's data set; the last one loaded stays in memory."""
    rooted = {"root": experiment.root} if "root" in options_of(experiment.dataset) else {}
    options = {name: tuple(value) if isinstance(value, list) else value
               for name, value in {**rooted, **experiment.options}.items()}
    return _loaded(experiment.dataset, tuple(sorted(options.items())))


@lru_cache(maxsize=1)
def _loaded(name, options):
    return load_dataset(name, **dict(options))


def options_that_decide(experiment):
    """The options of the experiment's data set that its results depend on."""
    # How many processes read images decides about nothing.
    options = {name: value for name, value in experiment.options.items() if name != "workers"}
    if options.get("verify") is False:  # the files may be any: their content decides
        options["content"] = _content(data(experiment))
    return options


@lru_cache(maxsize=1)
def _content(loaded):
    return {"train": described(loaded.train), "test": described(loaded.test)}


def trained(store, name, train, **parameters):
    """A stage that trains: ``train`` is given a file from which a run goes on that was interrupted."""
    unfinished = store.path(name, train, **parameters).with_suffix(".unfinished")

    def compute():
        if unfinished.exists() and not is_whole(unfinished):
            print(f"{unfinished} is damaged: the training begins anew", flush=True)
            unfinished.unlink()
        return train(unfinished)

    result = store.stage(name, compute, **parameters)
    unfinished.unlink(missing_ok=True)
    return result


def in_parallel(rows, jobs, store, workers):
    """The rows of all jobs, ``rows(store, *job)`` each, in their order, computed by several processes.

    Raises
    ------
    RuntimeError
        If one of them died.
    """
    # A server that has imported the library once forks each worker; a fork of this process could inherit held locks.
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([rows.__module__])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        # Each worker counts in a copy of the store that starts from zero.
        futures = [pool.submit(_counted, rows, Store(store.folder), *job) for job in jobs]
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


def _counted(rows, store, *job):
    return list(rows(store, *job)), store.computed, store.found
