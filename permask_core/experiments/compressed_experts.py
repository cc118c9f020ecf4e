"""Pruned and merged experts of a small language model whose every answer can be checked, in stages that are stored.

For each seed: train a mixture of experts on the language of :mod:`permask_core.data.skills`, calibrate it on training
sequences, remove or merge its experts by each method, and count for each skill the answers that are right as a whole.

Lasby et al., "REAP the Experts", ICLR 2026, compare pruning and merging on models of billions of parameters; the models
and data here are our choice.
"""

import functools
from dataclasses import dataclass, field

import torch

from permask_core.data import check_options
from permask_core.data.skills import IGNORED, SKILLS
from permask_core.experiments.stages import Settings, change, data, run_jobs, train_stage
from permask_core.experts import (
    CRITERIA,
    calibrate,
    clusters_by_logits,
    clusters_by_outputs,
    clusters_by_score,
    merge_experts,
    moe_blocks,
    prune_experts,
    saliency,
    select_experts,
)
from permask_core.models import build_model, check_model_options, evaluation_mode
from permask_core.models.moe import balance
from permask_core.runs.checks import check_integer, check_lists, check_one_of, check_work
from permask_core.training.loop import cross_entropy, fit
from permask_core.training.recipe import Recipe

MERGES = ("hc_smoe", "m_smoe", "ream")
METHODS = ("random", *CRITERIA, *MERGES)
RECIPE = Recipe(epochs=1, lr=0.004, weight_decay=0.01, optimizer="adamw", warmup=0.1)


@dataclass(frozen=True)
class Experiment(Settings):
    """The settings of one experiment: everything that its results depend on except the seed and the method."""

    dataset: str = "skills"
    options: dict = field(default_factory=dict)  # of the data set: see permask_core.data.load_dataset
    root: str | None = None
    model: str = "moe"
    model_options: dict = field(default_factory=dict)  # of the network: see permask_core.models.build_model
    recipe: Recipe = RECIPE
    balance: float = 0.01  # weight of the load-balancing loss
    calibration: int = 768  # training sequences, in their order
    left_out: str | None = None  # a skill that is removed from the calibration sequences

    def __post_init__(self):
        super().__post_init__()
        self.check_names(dataset=["skills"], model=["moe"])
        if self.left_out is not None:
            self.check_names(left_out=SKILLS)
        check_options(self.dataset, self.options)
        check_model_options(self.model, self.model_options)
        check_integer("calibration", self.calibration, 1)


def preset(**changes):
    """Return the experiment with changes: see :func:`permask_core.experiments.stages.change`.

    Examples
    --------
    >>> preset(recipe={"epochs": 2}).recipe.epochs
    2
    """
    return change(Experiment(), changes)


@dataclass(frozen=True)
class BalancedLoss:
    """The cross-entropy of answers plus the ``weight`` times the load-balancing loss."""

    weight: float

    def __call__(self, output, targets):
        logits, imbalance = output
        return cross_entropy(logits, targets) + self.weight * imbalance


def logits_and_balance(model, x):
    """Return the logits of the network ``moe`` and its load-balancing loss."""
    routes = []
    return model(x, routes), balance(routes)


def build_network(experiment, state=None, *, seed=0):
    """Return the network, newly initialised from ``seed`` or with the weights of ``state``."""
    _, _, _, input_shape, classes = data(experiment)
    model = build_model(experiment.model, input_shape, classes, seed=seed, **experiment.model_options)
    if state is not None:
        model.load_state_dict(state)
    return model


def number_of_experts(experiment):
    """Return the number of experts of each block."""
    return next(iter(moe_blocks(build_network(experiment)).values())).count


def train_network(experiment, store, seed):
    """Train the network of a seed, or load it from the store.

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seed : int

    Returns
    -------
    torch.nn.Module
    """
    def train(unfinished):
        model = build_network(experiment, seed=seed)
        run = fit(model, data(experiment).train, experiment.recipe, seed=seed, loss=BalancedLoss(experiment.balance),
                  forward=logits_and_balance, device="cpu", resume=unfinished, description=f"mixture, seed {seed}")
        return model.state_dict(), {"loss": run.losses[-1]}

    names = ("dataset", "options", "model", "model_options", "recipe", "balance")
    state, _ = train_stage(store, "mixture of experts", train, seed=seed, **experiment.stage_parameters(*names))
    return build_network(experiment, state)


def exact_matches(model, split, batch_size=400):
    """Return for each skill the fraction of sequences whose whole answer is predicted, each token from those before it.

    A right answer that is predicted in this way is also the answer of greedy decoding, and the reverse.

    Returns
    -------
    dict of str to float
    """
    with evaluation_mode(model):
        right = torch.cat([((model(x).argmax(-1) == y) | (y == IGNORED)).all(1)
                           for x, y in zip(split.x.split(batch_size), split.y.split(batch_size))])
    groups = split.attributes["skill"]
    return {skill: right[member].double().mean().item() for skill, member in zip(groups.groups, groups.member.T)}


def calibration_sequences(experiment):
    """Return the training sequences for calibration, int64 [n, length]."""
    train = data(experiment).train
    if experiment.left_out is None:
        return train.x[:experiment.calibration]
    left = train.attributes["skill"].member[:, SKILLS.index(experiment.left_out)]
    return train.x[~left][:experiment.calibration]


def compress(model, statistics, method, keep, *, matching=None, seed=0):
    """Return a copy of the model with its experts pruned or merged.

    Parameters
    ----------
    model : torch.nn.Module
    statistics : dict of str to permask_core.experts.Statistics
        With what merging needs.
    method : str
        "random"; a criterion of ``permask_core.experts.CRITERIA``, to prune by; or a merge: "hc_smoe" and "m_smoe",
        weighted by frequency with the router kept, or "ream", weighted by REAP's score with the leader's rows.
    keep : int
        Experts of each block, or clusters (for m_smoe the mean number).
    matching : {None, "weights", "activations"}
        How units are aligned before merging.
    seed : int
        Of the random choice.

    Returns
    -------
    torch.nn.Module
    """
    check_one_of("method", method, METHODS)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return prune_experts(model, {name: torch.rand(block.count, generator=generator)
                                     for name, block in moe_blocks(model).items()}, keep)
    if method in CRITERIA:
        return prune_experts(model, saliency(statistics, method), keep)
    how = {"matching": matching, "statistics": statistics}
    if method == "ream":
        scores = saliency(statistics, "reap")
        return merge_experts(model, clusters_by_score(model, statistics, scores, keep), scores, router="leader", **how)
    clusters = (clusters_by_outputs if method == "hc_smoe" else clusters_by_logits)(statistics, keep)
    return merge_experts(model, clusters, saliency(statistics, "frequency"), **how)


def removal_errors(model, statistics):
    """Return the true error of removing each expert alone: the mean squared change of its block's output over the kept
    tokens, which are routed again, relative to the mean squared output.

    Parameters
    ----------
    model : torch.nn.Module
        The network ``moe``.
    statistics : dict of str to permask_core.experts.Statistics
        With kept tokens.

    Returns
    -------
    dict of str to torch.Tensor
        float64 [experts], by the name of the block.
    """
    errors = {}
    with evaluation_mode(model):
        for name, found in statistics.items():
            mixture, every = model.get_submodule(name), torch.arange(len(found.counts))
            whole = mixture(found.x).double()
            parts = [select_experts(mixture, {"": every[every != j]})(found.x).double() for j in every]
            change = torch.stack([(part - whole).square().sum(1).mean() for part in parts])
            errors[name] = change / whole.square().sum(1).mean()
    return errors


def measure_network(experiment, store, seed):
    """Return the model of a seed, its calibration, and a record with the exact matches of the whole model.

    Returns
    -------
    (torch.nn.Module, dict of str to permask_core.experts.Statistics, dict of str to float)
    """
    model = train_network(experiment, store, seed)
    statistics = calibrate(model, calibration_sequences(experiment), merging=True, keep=2048)
    return model, statistics, exact_matches(model, data(experiment).test)


def run(experiment, store, *, seeds, keeps, methods=METHODS, matchings=(None, "weights", "activations"), workers=1):
    """Train, compress and measure networks.

    Parameters
    ----------
    experiment : Experiment
    store : permask_core.runs.store.Store
    seeds : sequence of int
    keeps : sequence of int
        Numbers of experts of each block that remain, or of clusters.
    methods : sequence of str
    matchings : sequence of (str or None)
        For merges.
    workers : int
        Processes that share the seeds.

    Returns
    -------
    list of dict
        ``seed``, ``method`` ("dense" for the whole model), ``matching`` (None unless aligned), ``kept``, ``left_out``,
        the exact match of each skill, and ``mean`` over skills.

    Raises
    ------
    ValueError
        If a method is unknown, or a number is out of range.
    """
    check_work(seeds, workers)
    check_lists(keeps=list(keeps), methods=list(methods))
    for method in methods:
        check_one_of("method", method, METHODS)
    jobs = [(experiment, seed, tuple(keeps), tuple(methods), tuple(matchings)) for seed in seeds]
    return run_jobs(_run_seed, jobs, store, workers, len(jobs) * (1 + len(keeps) * len(_variants(methods, matchings))))


def _variants(methods, matchings):
    return [(method, matching) for method in methods for matching in (matchings if method in MERGES else (None,))]


def _run_seed(store, experiment, seed, keeps, methods, matchings):
    settings = experiment.stage_parameters("dataset", "options", "model", "model_options", "recipe", "balance",
                                           "calibration", "left_out")
    parts = functools.cache(lambda: measure_network(experiment, store, seed))  # only if a stage is missing

    def row(stage, compute, kept, method, matching=None):
        _, record = store.stage(stage, compute, seed=seed, method=method, matching=matching, kept=kept, **settings)
        skills = {skill: record[skill] for skill in SKILLS}
        return {"seed": seed, "method": method, "matching": matching, "kept": kept, "left_out": experiment.left_out,
                **skills, "mean": sum(skills.values()) / len(skills)}

    def whole():
        return {}, parts()[2]

    def smaller():
        model, statistics, _ = parts()
        compressed = compress(model, statistics, method, kept, matching=matching, seed=seed)
        return {}, exact_matches(compressed, data(experiment).test)

    yield row("mixture of experts, exact matches", whole, number_of_experts(experiment), "dense")
    for kept in keeps:
        for method, matching in _variants(methods, matchings):
            yield row("compressed experts", smaller, kept, method, matching)
