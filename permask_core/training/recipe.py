"""Training settings: the optimizer, the learning rate with its schedule, and the computation of a step."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch


@dataclass(frozen=True)
class Recipe:
    """Training settings: the optimizer, the learning rate with its schedule, and the computation of a step.

    Raises
    ------
    ValueError
        If a value is out of range; the message has the value and the expected range.

    Examples
    --------
    >>> Recipe(epochs=2, lr=0.05).schedule
    'cosine'
    """

    epochs: int = 20
    lr: float = 0.1  # peak learning rate
    momentum: float = 0.9  # of SGD; the first beta of AdamW
    weight_decay: float = 5e-4  # on all parameters
    batch_size: int = 128  # examples in a step, over all processes; a DataLoader has its own
    schedule: str = "cosine"  # "cosine" to 0, "step": a tenth after every step_epochs, or "constant"
    step_epochs: int = 30
    warmup: float = 0.0  # epochs over which the learning rate first rises linearly; a cosine begins after them
    label_smoothing: float = 0.0
    optimizer: str = "sgd"  # or "adamw"
    accumulate: int = 1  # parts of a batch, one after the other; BatchNorm normalises each part separately
    precision: str = "float32"  # or "bf16": autocast with float32 weights
    sparse_opt: bool = False  # gradients under masks scaled to the sparsity of their neuron (SparseOpt)

    def __post_init__(self):
        for name, kind, expected, fits in (
            ("epochs", Integral, "an integer of at least 1", lambda v: v >= 1),
            ("lr", Real, "a number above 0", lambda v: 0 < v < math.inf),
            ("momentum", Real, "a number in [0, 1)", lambda v: 0 <= v < 1),
            ("weight_decay", Real, "a number of at least 0", lambda v: 0 <= v < math.inf),
            ("batch_size", Integral, "an integer of at least 1", lambda v: v >= 1),
            ("schedule", str, f"one of {', '.join(SCHEDULES)}", lambda v: v in SCHEDULES),
            ("step_epochs", Integral, "an integer of at least 1", lambda v: v >= 1),
            ("warmup", Real, "a number of epochs below epochs", lambda v: 0 <= v < self.epochs),
            ("label_smoothing", Real, "a number in [0, 1)", lambda v: 0 <= v < 1),
            ("optimizer", str, f"one of {', '.join(OPTIMIZERS)}", lambda v: v in OPTIMIZERS),
            ("accumulate", Integral, "an integer of at least 1", lambda v: v >= 1),
            ("precision", str, f"one of {', '.join(PRECISIONS)}", lambda v: v in PRECISIONS),
            ("sparse_opt", bool, "True or False", lambda v: True),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or kind is not bool and isinstance(value, bool) or not fits(value):
                raise ValueError(f"{name} is {value!r}: expected {expected}")
            if isinstance(value, Real):  # NumPy numbers are converted to Python numbers
                object.__setattr__(self, name, getattr(value, "item", lambda value=value: value)())

    def __str__(self):
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


SCHEDULES = {
    "cosine": lambda recipe, epoch: (1 + math.cos(math.pi * (epoch - recipe.warmup)
                                                  / (recipe.epochs - recipe.warmup))) / 2,
    "step": lambda recipe, epoch: 0.1 ** (epoch // recipe.step_epochs),
    "constant": lambda recipe, epoch: 1.0,
}
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS = {
    "sgd": lambda weights, recipe: torch.optim.SGD(
        weights, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=True),
    "adamw": lambda weights, recipe: torch.optim.AdamW(
        weights, recipe.lr, (recipe.momentum, 0.999), weight_decay=recipe.weight_decay, fused=True),
}


def learning_rate(recipe, step, steps_per_epoch):
    """Return the learning rate of a step, counted from 0."""
    epoch = step / steps_per_epoch
    if epoch < recipe.warmup:
        return recipe.lr * min(1, (step + 1) / (recipe.warmup * steps_per_epoch))
    return recipe.lr * SCHEDULES[recipe.schedule](recipe, epoch)


def autocast(device, precision):
    """Return a context in which a network computes in the precision of a recipe."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "float32")


def checkpoint_step(name, steps_per_epoch):
    """Return the number of steps before a checkpoint with the name ``init``, ``epoch K`` or ``step K``.

    Raises
    ------
    ValueError
        If the name has a different form.
    """
    kind, _, count = name.partition(" ")
    if name == "init":
        return 0
    if kind in ("epoch", "step") and count.isdecimal():
        return int(count) * (steps_per_epoch if kind == "epoch" else 1)
    raise ValueError(f"unknown checkpoint {name!r}: expected 'init', 'epoch K' or 'step K'")
