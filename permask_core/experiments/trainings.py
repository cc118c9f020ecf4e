"""Trainings as stages of a store: one by one, or batched.

A :class:`Training` describes a stage that trains. :func:`train` computes it or loads it from the store.
:func:`train_batched` does this for a list of trainings of one architecture: an experiment lists the networks that can
be trained next, trains them, and continues with those that depend on them. The stored results are the same up to
rounding, as if the networks had been trained one by one.
"""

import functools
import hashlib
import time
from collections.abc import Callable
from typing import NamedTuple

from permask_core.experiments.stages import Settings, data, discard_damaged, train_stage
from permask_core.sparse.dynamic import Rewiring
from permask_core.training.batched import evaluate_batched, fit_batched
from permask_core.training.loop import evaluate, fit
from permask_core.training.recipe import Recipe


class Training(NamedTuple):
    """A training of an ``experiment`` on its data, as a ``stage`` with ``parameters``.

    ``build()`` returns the network and its masks (None for a dense network). ``result(model, run, record)`` returns the
    tensors and the record that the stage stores, given the :class:`~permask_core.training.loop.FitResult` and a record
    with the test ``accuracy`` and ``loss``.
    """

    experiment: Settings
    stage: str
    parameters: dict
    build: Callable
    recipe: Recipe
    seed: int
    result: Callable
    checkpoints: tuple[str, ...] = ()
    description: str = "training"
    rewiring: Rewiring | None = None  # not in batched training


def train(store, training):
    """Return the tensors and the record of a training, computed now or loaded from the store."""
    task, processes = data(training.experiment), training.experiment.processes

    @functools.wraps(training.build)  # the stage depends on its code
    def compute(unfinished):
        model, masks = training.build()
        run = fit(model, task.train, training.recipe, seed=training.seed, masks=masks, processes=processes,
                  checkpoints=training.checkpoints, resume=unfinished, description=training.description,
                  rewiring=training.rewiring)
        return training.result(model, run, evaluate(model, task.test)._asdict())

    return train_stage(store, training.stage, compute, **training.parameters)


def train_batched(store, trainings, networks):
    """Finish trainings of one experiment and one stage, up to ``networks`` of them at once.

    See :func:`permask_core.training.batched.fit_batched`. The seconds of a batch are divided by its number of networks.
    """
    if not trainings:
        return
    first = trainings[0]

    def compute(positions):
        chosen = [trainings[i] for i in positions]
        unfinished = _unfinished(store, chosen)
        models, masks = zip(*(training.build() for training in chosen))
        start, task = time.perf_counter(), data(first.experiment)
        runs = fit_batched(models, task.train, first.recipe, seeds=[training.seed for training in chosen], masks=masks,
                           checkpoints=first.checkpoints, resume=unfinished, description=first.stage)
        evaluations = evaluate_batched(models, task.test)
        seconds = (time.perf_counter() - start) / len(chosen)
        for training, model, run, evaluation in zip(chosen, models, runs, evaluations):
            tensors, record = training.result(model.cpu(), run, evaluation._asdict())
            yield tensors, record | {"seconds": seconds}
        for path in unfinished.parent.glob(f"{unfinished.name}*"):
            path.unlink()

    store.stages(first.stage, first.build, [training.parameters for training in trainings], compute, networks)


def _unfinished(store, trainings):
    """Return the file from which these batched trainings continue after an interruption."""
    stems = [store.path(one.stage, one.build, **one.parameters).stem for one in trainings]
    path = store.folder / "batched" / f"{hashlib.sha256(' '.join(stems).encode()).hexdigest()[:20]}.unfinished"
    path.parent.mkdir(parents=True, exist_ok=True)
    for begun in path.parent.glob(f"{path.name}*"):  # networks that are trained one by one have separate files
        discard_damaged(begun)
    return path
