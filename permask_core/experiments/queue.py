"""A store whose stages train together: it collects the trainings that the stages of an experiment ask for, until no
stage gets further without one, and then trains those that are alike together."""

import hashlib
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

from filelock import Timeout
from torch import nn

from permask_core.experiments.stages import discard_damaged
from permask_core.runs.checks import check_integer
from permask_core.runs.files import locked
from permask_core.runs.store import Store
from permask_core.training.batched import architecture, evaluate_batched, fit_batched
from permask_core.training.loop import evaluate, fit


class Training(NamedTuple):
    """What a stage asks a :class:`Queue` for."""

    model: nn.Module
    train: object
    recipe: object
    test: object
    seed: int
    masks: dict | None
    checkpoints: tuple

    def kind(self):
        """What trainings have in common that can be one."""
        return architecture(self.model), self.recipe, id(self.train), id(self.test), self.checkpoints


class Waits(Exception):
    """A stage cannot go on before the training ``path`` is done here, or before another process has computed the stage
    ``path``."""

    def __init__(self, path):
        super().__init__(path)
        self.path = path


class Queue(Store):
    """A store whose stages train together: see :func:`run_batched`.

    A stage that waits for its training keeps its lock, so that no other process trains the same network, and is
    finished as soon as the training is done. A stage whose lock another process has is put off: a process that holds
    locks never waits for one.
    """

    def __init__(self, store, most):
        super().__init__(store.folder, store.on_change)
        self.most, self.wanted, self.done = most, {}, {}
        self.locks, self.again = {}, {}  # of stages that wait for their training: what holds them, and how they go on

    def stage(self, name, compute, **parameters):
        try:
            return super().stage(name, compute, **parameters)
        except Waits as one:  # raised here first by the innermost stage, which is the one that trains
            if one.path in self.wanted:
                self.again.setdefault(one.path, partial(super().stage, name, compute, **parameters))
            raise

    @contextmanager
    def _lock(self, path, message):
        unfinished = path.with_suffix(".unfinished")
        with ExitStack() as lock:
            try:
                lock.enter_context(self.locks.pop(unfinished, None) or locked(path, wait=False))
            except Timeout:
                raise Waits(path) from None
            try:
                yield
            except Waits as one:
                if one.path == unfinished:
                    self.locks[unfinished] = lock.pop_all()
                raise

    def close(self):
        """Give back the locks of stages that still wait."""
        for lock in self.locks.values():
            lock.close()

    def fitted(self, path, training):
        if path in self.done:
            *result, seconds = self.done.pop(path)
            self._seconds -= seconds  # for the stage, whose own seconds are those that no other stage has spent
            return result
        self.wanted.setdefault(path, training)
        raise Waits(path)

    def train(self, waiting):
        """Train what is wanted for one kind of stage, and finish these stages.

        Of the kinds, that of the training for which most of the jobs are ``waiting``: when it is done, more trainings
        of the others will be wanted, which can then be done together.
        """
        jobs = Counter(waiting)
        stage = max(self.wanted, key=jobs.__getitem__).parent.name
        alike = {}
        for path, training in sorted(self.wanted.items()):  # an order that a restart does not change
            if path.parent.name == stage:
                alike.setdefault(training.kind(), []).append(path)
        for paths in alike.values():
            for part in (paths[i:i + self.most] for i in range(0, len(paths), self.most)):
                self._train(stage, part)

    def _train(self, stage, paths):
        wanted = [self.wanted.pop(path) for path in paths]
        first, models = wanted[0], [one.model for one in wanted]
        name = hashlib.sha256(" ".join(path.stem for path in paths).encode()).hexdigest()[:20]
        file = self.folder / "batched" / f"{name}.unfinished"
        file.parent.mkdir(parents=True, exist_ok=True)
        for begun in file.parent.glob(f"{file.name}*"):
            discard_damaged(begun)
        start = time.perf_counter()
        runs = fit_batched(models, first.train, first.recipe, seeds=[one.seed for one in wanted],
                           masks=[one.masks for one in wanted], checkpoints=first.checkpoints, resume=file,
                           description=stage)
        found = evaluate_batched(models, first.test) if first.test is not None else [None] * len(models)
        for path, model, run, evaluation in zip(paths, models, runs, found):
            model.cpu()
            self.done[path] = run, evaluation, (time.perf_counter() - start) / len(paths)
        for path in paths:
            self.again.pop(path)()
        for left in file.parent.glob(f"{file.name}*"):
            left.unlink()


def fitted(store, model, train, recipe, *, test=None, seed, masks=None, checkpoints=(), processes=1, resume=None,
           description="training"):
    """Train a model for a stage, now or, in a :class:`Queue`, together with others.

    Returns
    -------
    (Fit, Evaluation or None)
        As :func:`~permask_core.training.fit` gives it, and the evaluation on ``test`` if there is one.
    """
    if isinstance(store, Queue):
        run, evaluation = store.fitted(resume, Training(model, train, recipe, test, seed, masks, tuple(checkpoints)))
        model.load_state_dict(run.state)
        return run, evaluation
    run = fit(model, train, recipe, seed=seed, masks=masks, checkpoints=checkpoints, processes=processes,
              resume=resume, description=description)
    return run, evaluate(model, test) if test is not None else None


def run_batched(rows, jobs, store, most):
    """The rows of all jobs, ``rows(store, *job)`` each, whose trainings are done together.

    Parameters
    ----------
    rows : callable
        A generator whose stages train by :func:`fitted`.
    jobs : list of tuple
        The smaller each, the more is trained together.
    store : Store
    most : int
        Networks that are trained at once.
    """
    check_integer("batched", most, 1)
    queue, found, waiting = Queue(store, most), {}, {}
    try:
        while len(found) < len(jobs):
            for i, job in enumerate(jobs):
                if i in found or waiting.get(i) in queue.wanted:
                    continue
                try:
                    found[i] = list(rows(queue, *job))
                    waiting.pop(i, None)
                except Waits as one:
                    waiting[i] = one.path
            if queue.wanted:
                queue.train(waiting.values())
            elif waiting:
                path = next(iter(waiting.values()))
                with locked(path, f"waiting for another process that computes {path.parent.name} {path.stem}"):
                    pass
    finally:
        queue.close()
    store.computed, store.found = store.computed + queue.computed, store.found + queue.found
    return [row for i in range(len(jobs)) for row in found[i]]
