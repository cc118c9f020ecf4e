"""Comparison of output layers for very many labels, in stages that are stored.

All methods of a seed have the same data, width of the first layer and recipe:

- static: rows of fixed fan-in, drawn once
- set: the same, rewired by SET
- set+auxiliary: SET, with an auxiliary objective over clusters of labels at the start; its head is not counted
- set+intermediate: SET, with a dense layer before the rows
- bottleneck: a dense output layer after a layer so narrow that both have at most as many parameters as the static rows
- dense: a dense output layer of any size

Source: Ullah et al., "Navigating Extremes: Dynamic Sparsity in Large Output Spaces", NeurIPS 2024.
"""

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral

import torch

from permask_core.data.extreme import make_multilabel, read_sparse_text
from permask_core.data.root import check_there, data_root
from permask_core.experiments.presets import EXTREME_LABELS as PRESETS
from permask_core.experiments.stages import Settings, change, change_preset, drop_none, run_jobs, train_stage
from permask_core.runs.checks import check_integer, check_lists, check_one_of, check_work
from permask_core.runs.processes import default_device
from permask_core.training.extreme import (
    ExtremeClassifier,
    ExtremeRecipe,
    fit_extreme,
    head_tail,
    precisions,
    training_bytes,
    within,
)
from permask_core.training.resume import fingerprint

METHODS = ("static", "set", "set+auxiliary", "set+intermediate", "bottleneck", "dense")
FILES = ("train.txt", "test.txt")


@dataclass(frozen=True)
class Experiment(Settings):
    """The settings of one experiment: everything that its results depend on except the seed and the method."""

    dataset: str = "planted"  # or a folder with bags of words from the Extreme Classification Repository
    root: str | None = None  # parent of that folder; does not affect results
    labels: int = 1000
    points: int = 5000  # training points of the planted problem
    test_points: int = 2000
    clusters: int = 20  # of labels
    features: int = 64
    hidden: int = 48  # outputs of the first layer
    fan_in: int = 10  # of the output layer
    intermediate: int | None = None  # outputs of the intermediate layer; None: hidden, with shorter rows for equal size
    recipe: ExtremeRecipe = ExtremeRecipe(epochs=6, rewire_every=25, auxiliary=0.4, auxiliary_epochs=3)

    def __post_init__(self):
        super().__post_init__()
        for name in ("labels", "points", "test_points", "clusters", "features", "hidden", "fan_in", "intermediate"):
            # The head is a fifth of the labels, and precision at 5 needs 5 of them.
            if name != "intermediate" or self.intermediate is not None:
                check_integer(name, getattr(self, name), 25 if name == "labels" else 1)
        if not isinstance(self.dataset, str) or not self.dataset:
            raise ValueError(f"dataset is {self.dataset!r}: expected 'planted', or the name of a folder")
        if not isinstance(self.recipe, ExtremeRecipe):
            raise ValueError(f"recipe is {self.recipe!r}: expected an ExtremeRecipe")
        if self.planted and self.points < self.recipe.batch_size:
            raise ValueError(f"points is {self.points}: expected at least a batch of {self.recipe.batch_size}")

    @property
    def planted(self):
        return self.dataset == "planted"

    @property
    def methods(self):
        """Return the methods that the data support; files have no clusters."""
        return tuple(method for method in METHODS if self.planted or method != "set+auxiliary")

    def recipe_of(self, method):
        """Return the recipe of a method, with SET and the auxiliary objective only if the method uses them."""
        return replace(self.recipe, rewire_until=self.recipe.rewire_until * method.startswith("set"),
                       auxiliary=self.recipe.auxiliary * (method == "set+auxiliary"))

    def layers(self, method):
        """Return ``fan_in`` (None for a dense output layer) and ``intermediate`` (None without) of a method, as a dict.

        Raises
        ------
        ValueError
            If the method is unknown, the data do not support it, or its layers would have an impossible size.
        """
        check_one_of("method", method, METHODS)
        if method not in self.methods:
            raise ValueError(f"method {method!r} needs clusters of labels, which the files of {self.dataset} do not "
                             f"have: expected one of {', '.join(self.methods)}")
        fan_in, intermediate, budget = self.fan_in, None, self.labels * self.fan_in
        if method == "set+intermediate":
            intermediate = self.intermediate or self.hidden
            if self.intermediate is None:
                fan_in = (budget - self.hidden * (self.hidden + 1)) // self.labels
        elif method == "bottleneck":
            intermediate = budget // (self.hidden + 1 + self.labels)
        if method in ("bottleneck", "dense"):
            if intermediate == 0:
                raise ValueError(f"fan_in is {self.fan_in}: a bottleneck would have no unit; expected a larger fan_in")
            return {"fan_in": None, "intermediate": intermediate}
        if not 1 <= fan_in <= (intermediate or self.hidden):
            raise ValueError(f"fan_in is {self.fan_in}, which gives {method!r} rows of {fan_in}: expected 1 to "
                             f"{intermediate or self.hidden}, the inputs of the output layer")
        recipe = self.recipe_of(method)
        if recipe.rewire_until and int(recipe.drop * fan_in) == 0:
            raise ValueError(f"fan_in is {self.fan_in}: of the {fan_in} connections in a row of {method!r}, a fraction "
                             f"of {recipe.drop} is dropped; expected at least one")
        return {"fan_in": fan_in, "intermediate": intermediate}


def preset(name, **changes):
    """Return the experiment of a preset, with changes.

    Parameters
    ----------
    name : str
        One of ``PRESETS``.
    **changes
        Fields of :class:`Experiment`, as in :func:`permask_core.experiments.stages.change`. With other ``labels``, the
        ``points`` of a planted problem change in proportion.

    Raises
    ------
    ValueError
        If there is no such preset or field, or a value is out of range.
    """
    labels = changes.get("labels")
    base = change_preset(PRESETS, name, Experiment(), {})
    if base.planted and isinstance(labels, Integral) and labels > 0:
        changes = {"points": max(base.recipe.batch_size, base.points * labels // base.labels)} | drop_none(changes)
    return change(base, changes)


# ---- Data ------------------------------------------------------------------------------------------------------------

def data(experiment, seed):
    """Return the training and the test set, drawn from the seed or read from files; the last data are cached.

    Returns
    -------
    (MultiLabel, MultiLabel)

    Raises
    ------
    FileNotFoundError
        If there are no files.
    ValueError
        If a file is damaged, the number of labels is not that of the experiment, there are fewer points than in a
        batch, or no test point has a label of the head or of the tail.
    """
    if experiment.planted:
        train, test = _drawn(experiment.labels, experiment.points, experiment.test_points, experiment.clusters,
                             experiment.features, seed)
    else:
        check_data(experiment)
        train, test = _read(data_root(experiment.root) / experiment.dataset)
    for file, split in zip(FILES, (train, test)):
        if split.n_labels != experiment.labels:
            raise ValueError(f"{file} of {experiment.dataset} announces {split.n_labels} labels: expected "
                             f"{experiment.labels}, or another value of labels")
        if split.features.shape[1] != train.features.shape[1]:
            raise ValueError(f"{file} of {experiment.dataset} announces {split.features.shape[1]} features: expected "
                             f"{train.features.shape[1]}, as in {FILES[0]}")
    if len(train) < experiment.recipe.batch_size:
        raise ValueError(f"there are {len(train)} points in {experiment.dataset}: expected at least a batch of "
                         f"{experiment.recipe.batch_size}")
    for name, group in head_tail(train).items():
        if not len(within(test, group)):
            raise ValueError(f"no test point of {experiment.dataset} has a label of the {name}: expected at least one")
    return train, test


def check_data(experiment):
    """Raise FileNotFoundError, which says how to get them, if files of the experiment are missing; nothing is read."""
    if not experiment.planted:
        folder = data_root(experiment.root) / experiment.dataset
        check_there(folder.name, folder, FILES, "Download the bags of words from http://manikvarma.org/downloads/XC/"
                    "XMLRepository.html and unpack them there")


@lru_cache(maxsize=1)
def _drawn(labels, points, test_points, clusters, features, seed):
    return make_multilabel(labels, n_train=points, n_test=test_points, n_clusters=clusters, n_features=features,
                           seed=seed)[:2]


@lru_cache(maxsize=1)
def _read(folder):
    return tuple(_scaled(read_sparse_text(folder / file, f"reading {folder.name}/{file}")) for file in FILES)


def _scaled(split):
    """Normalise features to norm 1, which the initialisation of the first layer assumes."""
    features = split.features
    norms = features.multiply(features).sum(1) ** 0.5
    features.data /= (norms + (norms == 0)).repeat(features.indptr[1:] - features.indptr[:-1])
    return split


@lru_cache(maxsize=1)
def _content(folder):
    return fingerprint(*_read(folder))


# ---- Runs ------------------------------------------------------------------------------------------------------------

def build_classifier(experiment, method, features, seed):
    """Return the network of a method for points with ``features`` features, newly initialised from a seed."""
    return ExtremeClassifier(features, experiment.labels, hidden=experiment.hidden, bags=not experiment.planted,
                             n_clusters=experiment.clusters if method == "set+auxiliary" else None,
                             generator=torch.Generator().manual_seed(seed), **experiment.layers(method))


def parameters(model):
    """Return the number of trained parameters without the auxiliary head."""
    return sum(weight.numel() for name, weight in model.named_parameters() if not name.startswith("auxiliary"))


def train(experiment, method, seed, resume=None):
    """Train and test one network.

    Parameters
    ----------
    experiment : Experiment
    method : str
    seed : int
    resume : path-like, optional
        As in :func:`~permask_core.training.extreme.fit_extreme`.

    Returns
    -------
    dict
        A row of :func:`run` without method and seed; ``seconds`` is the time of training only.
    """
    points, test = data(experiment, seed)
    model = build_classifier(experiment, method, points.features.shape[1], seed).to(default_device())
    start = time.perf_counter()
    losses = fit_extreme(model, points, experiment.recipe_of(method), seed=seed, resume=resume,
                         description=f"{method}, seed {seed}")
    seconds, layers = time.perf_counter() - start, experiment.layers(method)
    found = precisions(model, test, head_tail(points))
    return {"parameters": parameters(model), **layers,
            "output_layer_bytes": training_bytes(model.head.in_features, experiment.labels, layers["fan_in"]),
            "seconds": seconds, "losses": losses,
            "precision": {group: {str(k): value for k, value in of.items()} for group, of in found.items()},
            "unseen": (points.frequencies[test.labels.long()] == 0).double().mean().item()}


def check_run(experiment, *, seeds, methods, workers=1):
    """Raise ValueError, which has the wrong value, unless :func:`run` accepts these arguments; needs no data."""
    check_lists(methods=methods)
    check_work(seeds, workers)
    for method in methods:
        experiment.layers(method)


def run(experiment, store, *, seeds, methods=None, workers=1):
    """Train and test networks over seeds and methods.

    Each training is a stage of the store; an interrupted training continues after its last epoch.

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seeds : sequence of int
        Seeds of the planted problem, the weights, the order of points and the connections.
    methods : sequence of str, optional
        Some of ``METHODS``; by default all that the data support.
    workers : int
        Number of processes, which share the seeds; with more than one, each uses one thread, and a script must call
        this below ``if __name__ == "__main__":``.

    Returns
    -------
    list of dict
        One row for each run: ``method``, ``seed``, ``labels``, ``parameters`` (without an auxiliary head), ``fan_in``,
        ``intermediate``, ``output_layer_bytes`` (computed, in training), ``losses`` (in nats, by epoch), ``precision``
        (on the test points, by "all", "head" and "tail", then by k as text), ``unseen`` (fraction of test labels that
        no training point has), and ``seconds`` of training and testing.

    Raises
    ------
    ValueError, FileNotFoundError
        Before any training, if an argument is out of range, or files are missing or do not fit.
    RuntimeError
        If a worker process died.
    """
    seeds, methods = list(seeds), experiment.methods if methods is None else methods
    check_run(experiment, seeds=seeds, methods=methods, workers=workers)
    data(experiment, seeds[0])
    jobs = [(experiment, seed, list(methods)) for seed in map(int, seeds)]
    return run_jobs(_run_seed, jobs, store, workers, len(jobs) * len(methods))


def _run_seed(store, experiment, seed, methods):
    decides = ("labels", "points", "test_points", "clusters", "features") if experiment.planted else ("labels",)
    settings = experiment.select("hidden", *decides)
    if not experiment.planted:
        settings["content"] = _content(data_root(experiment.root) / experiment.dataset)
    for method in methods:
        def compute(unfinished, method=method):
            return {}, train(experiment, method, seed, unfinished)

        own = {"method": method, "recipe": experiment.recipe_of(method), **experiment.layers(method)}
        _, record = train_stage(store, "label_space", compute, seed=seed, **own, **settings)
        yield {"method": method, "seed": seed, "labels": experiment.labels, "data": settings.get("content"), **record}
