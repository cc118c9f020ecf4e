"""Settings by name: the published experiments, and stand-ins for them that run in minutes without a download.

What the sources do not say is ours, and said so beside the setting. Adnan et al., ICML 2025 (arXiv 2505.05143), and
their public code, for the permuted masks; Lasby et al., ICLR 2024 (arXiv 2305.02299), for ResNet18 and ViT-B/16.
"""

from contextlib import contextmanager
from dataclasses import fields, replace
from typing import NamedTuple

from permask_core.experiments.permuted_masks import MATCHINGS, Experiment, training_epochs
from permask_core.models.scaling import scaled
from permask_core.pruning import check_sparsity
from permask_core.runs.checks import check_integer, check_lists, check_one_of


class Preset(NamedTuple):
    """An ``experiment`` and what it is run over: ``widths``, ``rewinds`` (epochs), ``seeds``, ``sparsities`` and
    ``matchings``; and what it ``reproduces``, if that was published."""

    experiment: Experiment
    widths: tuple[float, ...]
    rewinds: tuple[int, ...]
    seeds: int
    sparsities: tuple[float, ...]
    matchings: tuple[str, ...]
    reproduces: str | None = None


_SPARSITIES = (0.8, 0.9, 0.95, 0.97)
_REWINDS = (0, 5, 10, 15, 20, 25, 50, 75, 100)

_CIFAR = Experiment(
    dataset="cifar10", model="resnet20", epochs=200, lr=0.08, sparse_lr=0.02, momentum=0.9, weight_decay=5e-4,
    batch_size=128, checkpoints=(*_REWINDS, 200), rewind=25, matched_at=200,
    # The authors' code prunes and fine-tunes; that a round has a cosine of its own is ours.
    imp="finetune", imp_rewind=0, imp_epochs=50, imp_lr=0.01, imp_rate=0.2)

_IMAGENET = Experiment(
    dataset="imagenet", model="resnet50", epochs=90, lr=0.04, sparse_lr=0.04, momentum=0.9, weight_decay=1e-4,
    batch_size=256, schedule="step", step_epochs=31, precision="bf16", checkpoints=(0, 10, 25, 50, 90), rewind=25,
    matched_at=90,  # the learning rate of the sparse runs and bf16 are ours
    imp="finetune", imp_rewind=0, imp_epochs=20, imp_lr=0.002, imp_rate=0.2)

# Digits are too easy: without noise all methods tie on a convolutional network. Channels as CIFAR has them.
_DIGITS = Experiment(
    dataset="digits", options={"noise": 1.0, "copies": 5, "channels": 3}, model="resnet8", epochs=12, lr=0.1,
    sparse_lr=0.05, momentum=0.9, weight_decay=5e-4, batch_size=128, checkpoints=(0, 2, 12), rewind=2, matched_at=12,
    imp="rewind", imp_rewind=2, imp_epochs=10, imp_lr=0.1, imp_rate=0.35)

# The chain of ImageNet's experiment in seconds; on so little data nothing can be said about the methods.
_TRIFEATURE = Experiment(
    dataset="trifeature", options={"n_train": 500, "n_test": 500, "label": "colour"}, model="resnet18", epochs=6,
    lr=0.04, sparse_lr=0.04, momentum=0.9, weight_decay=1e-4, batch_size=32, schedule="step", step_epochs=3,
    checkpoints=(0, 2, 6), rewind=2, matched_at=6, imp="finetune", imp_rewind=0, imp_epochs=1, imp_lr=0.004,
    imp_rate=0.35)

# CIFAR's size and shape without its files: ten epochs in place of 200, so that the whole may fit into minutes on a GPU.
# The noise was chosen by three dense networks (float32, seed 0): test accuracy 94.9 % after ten epochs with noise 1.5;
# after three, 61.1 % with 2.5 and 35.8 % with 3.5.
_CIFAR_SIZED = Experiment(
    dataset="trifeature", options={"n_train": 50_000, "n_test": 10_000, "noise": 2.5}, model="resnet20", epochs=10,
    lr=0.1, sparse_lr=0.05, momentum=0.9, weight_decay=5e-4, batch_size=128, precision="bf16", checkpoints=(0, 1, 10),
    rewind=1, matched_at=10, imp="rewind", imp_rewind=1, imp_epochs=9, imp_lr=0.1, imp_rate=0.35)

PRESETS = {
    "digits": Preset(_DIGITS, (0.5,), (2,), 3, (0.9, 0.985), ("activations",)),
    "trifeature": Preset(_TRIFEATURE, (0.125,), (2,), 1, (0.9,), ("weights", "activations")),
    "trifeature-resnet20": Preset(_CIFAR_SIZED, (1,), (0, 1), 3, (0.9, 0.97), ("activations",)),
    "cifar10-resnet20": Preset(_CIFAR, (1, 4, 8, 16), _REWINDS, 3, _SPARSITIES, ("activations",), "ResNet20/CIFAR-10"),
    "cifar100-resnet20": Preset(replace(_CIFAR, dataset="cifar100"), (1, 4, 8, 16), _REWINDS, 3, _SPARSITIES,
                                ("activations",), "ResNet20/CIFAR-100"),
    # Of VGG11 the sources at hand give no settings of its own: those of ResNet20 are taken.
    "cifar10-vgg11": Preset(replace(_CIFAR, model="vgg11"), (1,), _REWINDS, 3, (0.8, 0.9), ("activations",),
                            "VGG11/CIFAR-10"),
    "imagenet-resnet50": Preset(_IMAGENET, (1,), (0, 10, 25, 50), 1, _SPARSITIES, ("activations",)),
    # Lasby et al. train without a mask found before; the dense settings are theirs, the rest as for ResNet20.
    "cifar10-resnet18": Preset(
        replace(_CIFAR, model="resnet18_cifar", epochs=250, lr=0.1, sparse_lr=0.025, checkpoints=(0, 25, 250),
                matched_at=250), (1,), (25,), 3, (0.8, 0.9, 0.95, 0.99), ("activations",)),
    # torchvision's reference recipe without its image augmentations, which comes near theirs.
    "imagenet-vit_b_16": Preset(
        replace(_IMAGENET, model="vit_b_16", epochs=300, optimizer="adamw", lr=0.003, sparse_lr=0.003,
                weight_decay=0.3, batch_size=4096, accumulate=16, schedule="cosine", warmup=30, label_smoothing=0.11,
                checkpoints=(0, 30, 300), rewind=30, matched_at=300, imp_epochs=60), (1,), (30,), 1, (0.8, 0.9),
        ("weights",)),
}


# What may differ from the published settings without making a run another experiment.
FREE = ("root", "width", "rewind", "checkpoints", "imp_rewind", "precision", "processes", "accumulate",
        "matched_images")


def preset(name, **changes):
    """The preset of a name, with changes.

    Parameters
    ----------
    name : str
        One of ``PRESETS``.
    **changes
        Fields of :class:`Preset` or of its :class:`~permask_core.experiments.permuted_masks.Experiment`; what is None
        stays. Its ``width`` and ``rewind`` are the first of ``widths`` and ``rewinds``. Another data set drops the
        options of the preset's own. Where anything differs that decides about accuracies, it reproduces nothing that
        was published. With other ``epochs``, A and B are matched at their end, and of the epochs that are kept those
        stay that there still are.

    Raises
    ------
    ValueError
        If there is no such preset or field, or a value is out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    changes = {key: value for key, value in changes.items() if value is not None}
    grid = Preset._fields[1:-1]
    known = [*grid, *(one.name for one in fields(Experiment) if one.name not in ("width", "rewind"))]
    for key in changes:
        if key not in known:
            raise ValueError(f"unknown setting {key!r}: expected one of {', '.join(known)}")
    chosen = PRESETS[name]
    grid = {key: changes.pop(key) for key in grid if key in changes}
    check_lists(**{key: value for key, value in grid.items() if key != "seeds"})
    grid = {key: tuple(value) if isinstance(value, list) else value for key, value in grid.items()}
    experiment = chosen.experiment
    if changes.get("dataset", experiment.dataset) != experiment.dataset:
        changes.setdefault("options", {})
    epochs = changes.get("epochs", experiment.epochs)
    check_integer("epochs", epochs, 1)
    rewinds = grid.get("rewinds", chosen.rewinds)
    if any(not isinstance(k, int) or not 0 <= k < epochs for k in rewinds):
        if "rewinds" in grid:
            raise ValueError(f"rewinds is {list(rewinds)!r}: expected epochs from 0 to {epochs - 1}, one before the "
                             f"last of {epochs}")
        raise ValueError(f"epochs is {epochs}: expected more than {max(rewinds)}, the last of the rewind epochs of the "
                         f"preset {name!r}, or other rewinds")
    for value in grid.get("widths", ()):
        with _naming("widths", grid["widths"]):
            scaled(value)
    imp_rewind = min(changes.get("imp_rewind", experiment.imp_rewind), epochs - 1)
    kept = {k for k in experiment.checkpoints if k <= epochs} | {*rewinds, imp_rewind, epochs}
    changes = {"width": grid.get("widths", chosen.widths)[0], "checkpoints": tuple(kept), "rewind": rewinds[0],
               "imp_rewind": imp_rewind,
               "matched_at": epochs if experiment.matched_at == experiment.epochs else experiment.matched_at, **changes}
    experiment = replace(experiment, **changes)
    same = all(getattr(experiment, field.name) == getattr(chosen.experiment, field.name) for field in fields(Experiment)
               if field.name not in FREE)
    chosen = chosen._replace(experiment=experiment, **grid, reproduces=chosen.reproduces if same else None)
    check_integer("seeds", chosen.seeds, 1)
    for value in chosen.matchings:
        with _naming("matchings", chosen.matchings):
            check_one_of("matching", value, MATCHINGS)
    for value in chosen.sparsities:
        with _naming("sparsities", chosen.sparsities):
            check_sparsity(value)
    experiments(chosen)  # refuses what no experiment can have
    return chosen


@contextmanager
def _naming(name, values):
    """In the block, what is wrong with one of several values is said of all of them, under the name that they have."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name} is {list(values)!r}: {error}") from None


def experiments(chosen):
    """One experiment for each width and rewind epoch of a preset."""
    return [replace(chosen.experiment, width=width, rewind=rewind)
            for width in chosen.widths for rewind in chosen.rewinds]


def training_cost(chosen, images, speeds):
    """What a preset costs, from how fast its network trains.

    Parameters
    ----------
    chosen : Preset
    images : int
        In the training set.
    speeds : dict of float to float
        Images per second of training, by width.

    Returns
    -------
    list of dict
        For each width in ``speeds``: ``width``, ``dense``, ``pruning`` and ``sparse`` (epochs of training over all
        seeds, sparsities, methods and rewind points), ``speed`` and ``hours``. Matching and evaluation are not in it.
    """
    epochs = {}
    for k in chosen.rewinds:  # which share the dense networks and the tickets
        run = training_epochs(replace(chosen.experiment, rewind=k), seeds=range(chosen.seeds),
                              sparsities=chosen.sparsities, matchings=chosen.matchings)
        epochs = run | {"sparse": run["sparse"] + epochs.get("sparse", 0)}
    return [{"width": width, **epochs, "speed": speed, "hours": sum(epochs.values()) * images / speed / 3600}
            for width, speed in speeds.items()]
