"""One training loop for every experiment: stochastic gradient descent on tensors, under masks.

Everything random about a run comes from its seed: the same seed gives the same batches in the same order, whatever the
masks, so that runs that share a checkpoint and a seed differ in nothing but the mask.
"""

import copy
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch.nn import functional as F

from permask_core.masks import apply_masks, check_fit
from permask_core.models import evaluating
from permask_core.progress import progress


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum and weight decay, a learning rate that falls by a schedule over all steps."""

    epochs: int = 20
    lr: float = 0.1  # peak learning rate
    momentum: float = 0.9
    weight_decay: float = 5e-4  # on all parameters
    batch_size: int = 128
    schedule: str = "cosine"  # "cosine" to 0 over all steps, or "constant"

    def __post_init__(self):
        for name, kind, expected, fits in (
            ("epochs", int, "an integer of at least 1", lambda v: v >= 1),
            ("lr", (int, float), "a number above 0", lambda v: 0 < v < math.inf),
            ("momentum", (int, float), "a number in [0, 1)", lambda v: 0 <= v < 1),
            ("weight_decay", (int, float), "a number of at least 0", lambda v: 0 <= v < math.inf),
            ("batch_size", int, "an integer of at least 1", lambda v: v >= 1),
            ("schedule", str, f"one of {', '.join(SCHEDULES)}", lambda v: v in SCHEDULES),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or not fits(value):
                raise ValueError(f"{name} is {value!r}: expected {expected}")

    def __str__(self):
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))


SCHEDULES = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}


class Fit(NamedTuple):
    """A finished run: the last ``state``, the ``checkpoints`` asked for by name, and the mean training ``losses``
    [epochs]."""

    state: dict[str, torch.Tensor]
    checkpoints: dict[str, dict[str, torch.Tensor]]
    losses: list[float]


def fit(model, train, recipe, *, seed, masks=None, checkpoints=(), device=None, description="training"):
    """Train a model in place.

    Parameters
    ----------
    model : torch.nn.Module
        Starts from the weights it has; is left trained, on the device.
    train : (torch.Tensor, torch.Tensor)
        Inputs [n, ...] and labels [n].
    recipe : Recipe
    seed : int
        Of the order of the data, and of dropout; the global random state comes back afterwards.
    masks : Masks, optional
        Applied before the first step and after every one: momentum and weight decay would revive weights otherwise.
    checkpoints : sequence of str
        States to keep: ``"init"`` (before the first step, masked if there are masks), ``"epoch K"`` or ``"step K"``
        (after that many).
    device : str or torch.device, optional
        Where to train; by default a CUDA device if there is one.
    description : str or None
        Shown with the progress bar; None for no bar.

    Returns
    -------
    Fit
        States are copies, on the CPU.

    Raises
    ------
    ValueError
        If masks do not fit, a checkpoint has no such name or lies behind the end, or the data are empty; before any
        training.
    FloatingPointError
        If the loss of an epoch, or a weight at the end, is not finite.
    """
    x, y = train
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"got {len(x)} inputs and {len(y)} labels: expected as many of each, and at least one")
    steps_per_epoch = math.ceil(len(x) / recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    wanted = {name: checkpoint_step(name, steps_per_epoch) for name in checkpoints}
    for name, step in wanted.items():
        if step > steps:
            raise ValueError(f"checkpoint {name!r} lies behind the end: the run has {recipe.epochs} epochs of "
                             f"{steps_per_epoch} steps")
    if masks is not None:
        check_fit(masks, dict(model.named_parameters()))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device).train()
    x, y = x.to(device), y.to(device)
    kept = {}
    masked = []
    if masks is not None:
        apply_masks(model, masks)
        parameters = dict(model.named_parameters())
        masked = [(parameters[name], mask.to(device)) for name, mask in masks.items()]
    weights, keep = [weight for weight, _ in masked], [mask.to(weight.dtype) for weight, mask in masked]
    optimizer = torch.optim.SGD(model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay,
                                fused=True)
    order, losses, done = torch.Generator().manual_seed(seed), [], 0

    def keep_checkpoints():
        for name in [name for name, step in wanted.items() if step == done]:
            kept[name] = _copied(model)

    keep_checkpoints()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in progress(range(recipe.epochs), description):
            total = torch.zeros((), device=device)
            for batch in torch.randperm(len(x), generator=order).to(device).split(recipe.batch_size):
                optimizer.param_groups[0]["lr"] = recipe.lr * SCHEDULES[recipe.schedule](done / steps)
                loss = F.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if weights:
                    with torch.no_grad():
                        torch._foreach_mul_(weights, keep)
                total += loss.detach() * len(batch)
                done += 1
                keep_checkpoints()
            losses.append(total.item() / len(x))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the training loss is {losses[-1]} in epoch {epoch + 1}: try a smaller "
                                         f"learning rate than {recipe.lr}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():  # the last step may do what no loss has seen
            raise FloatingPointError(f"{name!r} is not finite after the last step: try a smaller learning rate than "
                                     f"{recipe.lr}")
    return Fit(_copied(model), kept, losses)


def checkpoint_step(name, steps_per_epoch):
    """The number of steps after which a checkpoint called ``init``, ``epoch K`` or ``step K`` is taken.

    Raises
    ------
    ValueError
        If the name is none of these.
    """
    kind, _, count = name.partition(" ")
    if name == "init":
        return 0
    if kind in ("epoch", "step") and count.isdecimal():
        return int(count) * (steps_per_epoch if kind == "epoch" else 1)
    raise ValueError(f"unknown checkpoint {name!r}: expected 'init', 'epoch K' or 'step K'")


def _copied(model):
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


class Evaluation(NamedTuple):
    """``accuracy`` in [0, 1] and mean cross-entropy ``loss`` in nats."""

    accuracy: float
    loss: float


def evaluate(model, split, *, state=None, batch_size=1000):
    """Accuracy and loss on a split.

    Parameters
    ----------
    model : torch.nn.Module
        Evaluated where it is, in evaluation mode.
    split : (torch.Tensor, torch.Tensor)
        Inputs [n, ...] and labels [n].
    state : dict of str to torch.Tensor, optional
        Weights to evaluate instead of the model's own, which stay.
    batch_size : int

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        If the split is empty.
    """
    if len(split[1]) == 0:
        raise ValueError("the split is empty: expected at least one input")
    if state is not None:
        model = copy.deepcopy(model)
        model.load_state_dict(state)
    device = next(model.parameters()).device
    hits = loss = 0
    with evaluating(model):
        for x, y in zip(split[0].split(batch_size), split[1].split(batch_size)):
            logits, y = model(x.to(device)), y.to(device)
            hits += (logits.argmax(1) == y).sum().item()
            loss += F.cross_entropy(logits, y, reduction="sum").item()
    return Evaluation(hits / len(split[1]), loss / len(split[1]))
