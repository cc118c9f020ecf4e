"""One training loop for every experiment: batches, weights under masks, checkpoints, on one process or several.

Everything random about a run comes from its seed: the same seed gives the same batches in the same order, whatever the
masks, so that runs that share a checkpoint and a seed differ in nothing but the mask.
"""

import copy
import json
import math
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from permask_core.data import Split
from permask_core.data.splits import in_order, mix_seed
from permask_core.masks import apply_masks, check_fit
from permask_core.models import evaluation_mode
from permask_core.runs.processes import check_agreement, default_device, launch, of_first
from permask_core.runs.progress import progress
from permask_core.sparse.dynamic import Rewiring, Topology
from permask_core.sparse.fan_in import FanInLinear
from permask_core.sparse.optim import scale_gradients
from permask_core.training.resume import (
    Run,
    describe,
    digest,
    find_run,
    load_run,
    optimizer_state,
    restore_optimizer,
    save_run,
)

SAVE_SECONDS = 60  # between two saves of a run that can be resumed


@dataclass(frozen=True)
class Recipe:
    """How to train: an optimizer, a learning rate that follows a schedule, and how a step is computed."""

    epochs: int = 20
    lr: float = 0.1  # peak learning rate
    momentum: float = 0.9  # of SGD; the first beta of AdamW
    weight_decay: float = 5e-4  # on all parameters
    batch_size: int = 128  # images in a step, over all processes
    schedule: str = "cosine"  # "cosine" to 0, "step": a tenth after every step_epochs, or "constant"
    step_epochs: int = 30
    warmup: float = 0.0  # epochs over which the learning rate first rises linearly; a cosine begins after them
    label_smoothing: float = 0.0
    optimizer: str = "sgd"  # or "adamw"
    accumulate: int = 1  # parts of a batch, one after the other; BatchNorm sees one part at a time
    precision: str = "float32"  # or "bf16": autocast, the weights stay float32
    sparse_opt: bool = False  # gradients under masks scaled to the sparsity of their neuron (SparseOpt)

    def __post_init__(self):
        for name, kind, expected, fits in (
            ("epochs", int, "an integer of at least 1", lambda v: v >= 1),
            ("lr", (int, float), "a number above 0", lambda v: 0 < v < math.inf),
            ("momentum", (int, float), "a number in [0, 1)", lambda v: 0 <= v < 1),
            ("weight_decay", (int, float), "a number of at least 0", lambda v: 0 <= v < math.inf),
            ("batch_size", int, "an integer of at least 1", lambda v: v >= 1),
            ("schedule", str, f"one of {', '.join(SCHEDULES)}", lambda v: v in SCHEDULES),
            ("step_epochs", int, "an integer of at least 1", lambda v: v >= 1),
            ("warmup", (int, float), "a number of epochs below epochs", lambda v: 0 <= v < self.epochs),
            ("label_smoothing", (int, float), "a number in [0, 1)", lambda v: 0 <= v < 1),
            ("optimizer", str, f"one of {', '.join(OPTIMIZERS)}", lambda v: v in OPTIMIZERS),
            ("accumulate", int, "an integer of at least 1", lambda v: v >= 1),
            ("precision", str, f"one of {', '.join(PRECISIONS)}", lambda v: v in PRECISIONS),
            ("sparse_opt", bool, "True or False", lambda v: True),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or not fits(value):
                raise ValueError(f"{name} is {value!r}: expected {expected}")

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
    """The learning rate of a step, counted from 0."""
    epoch = step / steps_per_epoch
    if epoch < recipe.warmup:
        return recipe.lr * min(1, (step + 1) / (recipe.warmup * steps_per_epoch))
    return recipe.lr * SCHEDULES[recipe.schedule](recipe, epoch)


class FitResult(NamedTuple):
    """A finished run: the last ``state``, the ``checkpoints`` asked for by name, the mean training ``losses`` [epochs],
    and the last ``masks``. With rewiring also ``fan_in``, of each layer int32 [1 + rewirings, out]: the connections of
    its neurons at the start and after each rewiring."""

    state: dict[str, torch.Tensor]
    checkpoints: dict[str, dict[str, torch.Tensor]]
    losses: list[float]
    masks: dict[str, torch.Tensor] | None = None
    fan_in: dict[str, torch.Tensor] | None = None


def fit(model, train, recipe, *, seed, loss=None, masks=None, rewiring=None, checkpoints=(), device=None, processes=1,
        resume=None, description="training"):
    """Train a model in place.

    Parameters
    ----------
    model : torch.nn.Module
        Starts from the weights it has; is left trained, on the device.
    train : Split or (torch.Tensor, torch.Tensor)
        What :func:`permask_core.data.load_dataset` gives, or inputs [n, ...] and labels [n].
    recipe : Recipe
    seed : int or list of int
        Of the order of the data, of augmentation, of dropout and of random growth; the global random state comes back
        afterwards. A list for a :class:`permask_core.training.batched.Batch`: one seed of each of its networks, which
        then gets its batches; losses are lists of as many.
    loss : callable, optional
        ``loss(logits, targets)``, a mean over the images of a batch, where ``targets`` are what the split's batches
        have beside their inputs; by default the cross-entropy. A run is found again by the loss's name, or by the
        ``repr`` of one that has settings.
    masks : Masks, optional
        Applied before the first step and after every one: momentum and weight decay would revive weights otherwise.
    rewiring : Rewiring, optional
        Moves the connections under the masks, and those of :class:`~permask_core.sparse.FanInLinear` layers. A step
        that does so changes no weight otherwise.
    checkpoints : sequence of str
        States to keep: ``"init"`` (before the first step, masked if there are masks), ``"epoch K"`` or ``"step K"``
        (after that many).
    device : str or torch.device, optional
        Where to train; by default a CUDA device if there is one.
    processes : int
        That share each batch, each on a device of its own where there are several. With more than one, they are
        started by this call, so that a script must call it below ``if __name__ == "__main__":``; in processes that
        ``torchrun`` has started, as many as given here, they join. Gradients are averaged over all images of the
        batch; BatchNorm sees the images of its own process, and its statistics are those of the first.
    resume : path-like, optional
        A file to which the run is saved every minute and at the end. Where it exists, the run goes on from there, and
        on the same CPU, in one or two processes, ends in the same bits as one that was never interrupted. (The sum
        of more gradients depends on how they are grouped, which their engine decides in its first step.)
    description : str or None
        Shown with the progress bar; None for no bar.

    Returns
    -------
    Fit
        States are copies, on the CPU.

    Raises
    ------
    ValueError
        If masks do not fit, a recipe smooths labels beside a loss of its own, a checkpoint has no such name or lies
        behind the end, there are fewer images than a batch or fewer in the last batch than parts of a batch, there is
        nothing to rewire, processes disagree about what to train, or the file to resume from is of a run with other
        settings; before any training.
    FloatingPointError
        If the loss of an epoch, or a weight at the end, is not finite.
    RuntimeError
        If one of several processes failed, with its message.
    """
    train = as_split(train)
    if isinstance(checkpoints, str):
        raise ValueError(f"checkpoints is {checkpoints!r}: expected a list of names")
    job = _checked(model, train, recipe, seed, loss, masks, rewiring, checkpoints, processes)
    if processes > 1 or resume:
        job = job._replace(identity=_identity(model, train, job, processes))
    if processes == 1:
        model.to(device or default_device())
        return _train(None, model, train, job, resume, description)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(resume or Path(folder, "run.safetensors")).absolute()
        find_run(path, job.identity)  # what is wrong with it is said before any process starts
        launch(_train, processes, device, model.cpu(), train, job, path, description)
        run = of_first(load_run, path, job.identity)
    model.load_state_dict(run.state)
    model.to(device or default_device()).train()
    kept = {name: run.checkpoints[name] for name in job.wanted}
    return FitResult(run.state, kept, run.losses, *((run.masks or None, run.fan_in) if rewiring else (masks, None)))


def as_split(data):
    """A split as it is, or one made of inputs and labels, as many of each; ValueError for anything else."""
    if isinstance(data, Split) and len(data.x) != len(data.y):
        raise ValueError(f"got {len(data.x)} inputs and {len(data.y)} labels: expected as many of each")
    if hasattr(data, "batches"):
        return data
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, torch.Tensor) for part in data):
        return as_split(Split(*data))
    raise ValueError(f"got {type(data).__name__} to train on or evaluate: expected a split, as data.train, or two "
                     "tensors, inputs and labels")


class _Job(NamedTuple):
    """What decides about a run."""

    recipe: Recipe
    seed: int | list  # a list for networks that are trained together
    loss: object  # a function of logits and targets, or None for the recipe's cross-entropy
    masks: dict | None
    rewiring: Rewiring | None
    wanted: dict[str, int]  # steps at which checkpoints are taken, by name
    steps_per_epoch: int
    identity: dict  # all of it in short, by what a reader calls it; empty where nobody compares it


def _checked(model, train, recipe, seed, loss, masks, rewiring, checkpoints, processes):
    if not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes is {processes!r}: expected an integer of at least 1")
    together = isinstance(seed, list)
    for one in seed if together else [seed]:
        if not isinstance(one, int) or not 0 <= one < 2 ** 63:
            raise ValueError(f"seed is {one!r}: expected an integer of at least 0 and below 2**63")
    members = getattr(model, "members", None)  # of a permask_core.training.batched.Batch
    if (len(seed) if together else None) != members:
        raise ValueError(f"seed is {seed!r} for {members or 'no'} networks of a Batch: expected a list of as many for "
                         "a Batch, and one integer for any other model")
    if together and (processes > 1 or loss or rewiring or recipe.sparse_opt):
        raise ValueError(f"seed is {seed}: expected one where there are several processes, a loss of its own, rewiring "
                         "or sparse_opt")
    if loss and recipe.label_smoothing:
        raise ValueError(f"label_smoothing is {recipe.label_smoothing} beside a loss of its own: expected 0")
    n, parts = len(train), processes * recipe.accumulate
    if n < recipe.batch_size:
        raise ValueError(f"got {n} images: expected at least a batch of {recipe.batch_size}")
    last = n % recipe.batch_size or recipe.batch_size
    if last < parts:
        raise ValueError(f"the last of the batches of {recipe.batch_size} has {last} images: expected at least "
                         f"{parts}, one for each of {processes} processes x accumulate {recipe.accumulate}")
    steps_per_epoch = math.ceil(n / recipe.batch_size)
    wanted = {name: checkpoint_step(name, steps_per_epoch) for name in checkpoints}
    for name, step in wanted.items():
        if step > recipe.epochs * steps_per_epoch:
            raise ValueError(f"checkpoint {name!r} lies behind the end: the run has {recipe.epochs} epochs of "
                             f"{steps_per_epoch} steps")
    if masks is not None:
        check_fit(masks, dict(model.named_parameters()))
    if rewiring is not None and not isinstance(rewiring, Rewiring):
        raise ValueError(f"rewiring is {rewiring!r}: expected a Rewiring, as Rewiring('set')")
    if rewiring:
        Topology(copy.deepcopy(model), masks, rewiring, steps=recipe.epochs * steps_per_epoch, seed=seed)  # masks it
        if processes > 1 and any(isinstance(module, FanInLinear) for module in model.modules()):
            raise ValueError(f"processes is {processes}, with rewiring and FanInLinear layers: expected 1, or masks "
                             "instead, because the engine that averages gradients holds their shapes fixed")
    return _Job(recipe, seed, loss, masks, rewiring, wanted, steps_per_epoch, {})


def _identity(model, train, job, processes):
    data = {f"data.{name}": value for name, value in describe(train).items()}
    loss = {"loss": getattr(job.loss, "__qualname__", repr(job.loss))} if job.loss else {}
    identity = {**asdict(job.recipe), "seed": job.seed, "checkpoints": job.wanted, "processes": processes,
                "images": len(train), **data, **loss, "masks": digest(job.masks or {}),
                "rewiring": asdict(job.rewiring) if job.rewiring else None,
                "initial weights": digest(model.state_dict())}
    return json.loads(json.dumps(identity))


def _train(fabric, model, train, job, resume, description):
    """Train where the model is, alone or as one of the processes that ``fabric`` (Lightning's) has joined."""
    recipe, rank, ranks = job.recipe, *((fabric.global_rank, fabric.world_size) if fabric else (0, 1))
    if fabric:
        check_agreement(job.identity)
    run = of_first(find_run, resume, job.identity) if fabric else find_run(resume, job.identity)
    device = fabric.device if fabric else next(model.parameters()).device
    on_gpu = device.type == "cuda"
    order = memory_format(model.to(device).train(), device)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)
    train = train.to(device)
    if job.masks:
        apply_masks(model, job.masks)
    parameters = dict(model.named_parameters())
    steps = recipe.epochs * job.steps_per_epoch
    topology = Topology(model, job.masks, job.rewiring, steps=steps, seed=job.seed) if job.rewiring else None
    masks = topology.masks if topology else {name: mask.to(device) for name, mask in (job.masks or {}).items()}
    weights = [parameters[name] for name in masks]
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), recipe)
    if recipe.sparse_opt:
        scale_gradients(optimizer, model, masks)

    # Each process adds to a place of its own, so that a run that is resumed adds in the same order.
    networks = [len(job.seed)] if isinstance(job.seed, list) else []
    kept, losses, done, totals = {}, [], 0, torch.zeros(ranks, *networks, device=device)
    if run:
        model.load_state_dict(run.state)
        restore_optimizer(optimizer, parameters, run.optimizer)
        kept = {name: run.checkpoints[name] for name in job.wanted if name in run.checkpoints}
        losses, done = run.losses, run.done
        totals[rank] = run.totals[rank]
        if topology:
            topology.restore(run.masks, run.fan_in)
    keep = [mask.to(weight.dtype) for weight, mask in zip(weights, masks.values())]
    network = fabric.setup_module(model, move_to_device=False) if fabric else model
    saved = time.monotonic()

    def summed(value):
        return fabric.all_reduce(value, reduce_op="sum") if fabric else value

    def first_says(yes):  # alone, without a word to the device, which would have to finish its work first
        return summed(torch.tensor(float(yes and rank == 0), device=device)).item() > 0 if fabric else yes

    def keep_checkpoints():
        for name in [name for name, step in job.wanted.items() if step == done]:
            kept[name] = _copied(model)

    def save():
        whole = summed(totals.clone())
        if rank == 0:
            moved = (_on_cpu(topology.masks), topology.fan_in) if topology else ({}, {})
            run = Run(_copied(model), kept, losses, optimizer_state(optimizer, parameters), whole, done, *moved)
            save_run(resume, run, job.identity)

    if done == 0:
        keep_checkpoints()
    dropout_seed = mix_seed(job.seed[0] if networks else job.seed, rank)
    batches = _batches(train, job, done, device, rank, ranks)
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        for size, parts in progress(batches, description if rank == 0 else None,
                                    total=steps - done):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, done, job.steps_per_epoch)
            # Of the step alone, so that a run that was interrupted needs no memory of the steps before.
            # Not by torch.manual_seed, which spends a millisecond on devices that are not there.
            torch.default_generator.manual_seed(dropout_seed + done)
            if on_gpu:
                torch.cuda.manual_seed(dropout_seed + done)
            optimizer.zero_grad()
            with topology.watching(done + 1) if topology else nullcontext():
                for i, (x, targets) in enumerate(parts, 1):
                    share = ranks * len(x) / size  # a mean over processes follows
                    silent = fabric.no_backward_sync(network, enabled=i < len(parts)) if fabric else nullcontext()
                    with silent:
                        totals[rank] += _backward(fabric, network, x, targets, job, share, order) * len(x)
            if topology and topology.due(done + 1):
                topology.rewire(done + 1, optimizer)
                keep = [mask.to(weight.dtype) for weight, mask in zip(weights, masks.values())]
            else:
                optimizer.step()
                if weights:
                    with torch.no_grad():
                        torch._foreach_mul_(weights, keep)
            done += 1
            keep_checkpoints()
            if done % job.steps_per_epoch == 0:
                losses.append((summed(totals).sum(0).double() / len(train)).tolist())
                totals = torch.zeros_like(totals)
                if not np.isfinite(losses[-1]).all():
                    raise FloatingPointError(f"the training loss is {losses[-1]} in epoch {len(losses)}: try a smaller "
                                             f"learning rate than {recipe.lr}")
            if resume and first_says(time.monotonic() - saved >= SAVE_SECONDS):
                save()
                saved = time.monotonic()
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():  # the last step may do what no loss has seen
            raise FloatingPointError(f"{name!r} is not finite after the last step: try a smaller learning rate than "
                                     f"{recipe.lr}")
    if resume:
        save()
    if not fabric:
        moved = (_on_cpu(topology.masks) or None, topology.fan_in) if topology else (job.masks, None)
        return FitResult(_copied(model), kept, losses, *moved)


def _backward(fabric, network, x, targets, job, share, order):
    """The loss of a part of a batch, whose gradients, times ``share``, are added to those of the weights."""
    recipe = job.recipe
    with autocast(x.device, recipe.precision):
        logits = network(x.contiguous(memory_format=order) if x.ndim == 4 else x)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    if isinstance(job.seed, list):  # [n, networks, classes]; the gradient of a sum is each one's own
        loss = F.cross_entropy(logits.transpose(1, 2), targets, label_smoothing=recipe.label_smoothing,
                               reduction="none").mean(0)
        (loss.sum() * share).backward()
        return loss.detach()
    loss = (job.loss(logits, targets) if job.loss else
            F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing))
    fabric.backward(loss * share) if fabric else (loss * share).backward()
    return loss.detach()


def autocast(device, precision):
    """The context in which a network computes in a recipe's precision."""
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != "float32")


def _batches(train, job, done, device, rank, ranks):
    """From step ``done`` on: the size of each batch, and the parts of it that are this process's, as (x, y); of
    networks that are trained together with one more axis, [n, networks, ...]."""
    if isinstance(job.seed, list):
        seeds = sorted({*job.seed})
        at = torch.tensor([seeds.index(seed) for seed in job.seed], device=device)
        streams = [_batches(train, job._replace(seed=seed), done, device, rank, ranks) for seed in seeds]
        for several in zip(*streams):
            yield several[0][0], [tuple(torch.stack(parts, 1)[:, at] for parts in zip(*those))
                                  for those in zip(*(parts for _, parts in several))]
        return
    recipe, order = job.recipe, torch.Generator().manual_seed(job.seed)
    for epoch in range(recipe.epochs):
        batches = torch.randperm(len(train), generator=order).split(recipe.batch_size)
        batches = batches[max(0, done - epoch * job.steps_per_epoch):]
        own = [part for batch in batches for part in batch.tensor_split(ranks * recipe.accumulate)[rank::ranks]]
        stream = train.batches(own, device, augmented=(job.seed, epoch)) if own else None
        for batch in batches:
            yield len(batch), [next(stream) for _ in range(recipe.accumulate)]


def memory_format(model, device):
    """The order in memory that makes a model's convolutions fastest: channels last.

    On a CPU not if a 1x1 convolution with a stride has fewer than 8 input channels. Its gradient with AVX2 writes past
    the end of its memory in oneDNN 3.12, which comes with PyTorch 2.13: https://github.com/uxlfoundation/oneDNN/issues/6035
    """
    broken = torch.device(device).type == "cpu" and any(
        isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
        and layer.in_channels // layer.groups < 8 for layer in model.modules())
    return torch.contiguous_format if broken else torch.channels_last


def throughput(model, input_shape, recipe, *, classes=10, steps=2, device=None):
    """Images per second of training on random images in memory: what the network costs, without reading any.

    Parameters
    ----------
    model : torch.nn.Module
        Is trained.
    input_shape : tuple of int
        Of one image.
    recipe : Recipe
        Of which one epoch of ``steps`` batches is timed, after one that is not.
    classes, steps : int
    device
        As for :func:`fit`.
    """
    def seconds(steps):
        n = steps * recipe.batch_size
        images = Split(torch.randn(n, *input_shape), torch.arange(n) % classes)
        start = time.perf_counter()
        fit(model, images, replace(recipe, epochs=1, warmup=0.0), seed=0, device=device, description=None)
        return time.perf_counter() - start

    seconds(1)
    return steps * recipe.batch_size / seconds(steps)


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
    return _on_cpu(model.state_dict())


def _on_cpu(tensors):
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


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
    split : Split or (torch.Tensor, torch.Tensor)
        As for :func:`fit`.
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
    model, batches = _to_evaluate(model, split, state, batch_size)
    hits = loss = n = 0
    with evaluation_mode(model):
        for x, y in batches:
            logits = model(x)
            hits += (logits.argmax(1) == y).sum().item()
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            n += len(y)
    return Evaluation(hits / n, loss / n)


def predict(model, split, *, state=None, batch_size=1000):
    """The logits of a split's inputs from first to last, none of them augmented.

    Parameters
    ----------
    model, split, state, batch_size
        As for :func:`evaluate`.

    Returns
    -------
    torch.Tensor
        [n, classes], on the CPU.

    Raises
    ------
    ValueError
        If the split is empty.
    """
    model, batches = _to_evaluate(model, split, state, batch_size)
    with evaluation_mode(model):
        return torch.cat([model(x).cpu() for x, _ in batches])


def _to_evaluate(model, split, state, batch_size):
    """The model with the weights of ``state``, if there are any, and the split's batches where the model is."""
    split = as_split(split)
    if len(split) == 0:
        raise ValueError("the split is empty: expected at least one input")
    if state is not None:
        model = copy.deepcopy(model)
        model.load_state_dict(state)
    return model, split.batches(in_order(split, batch_size), next(model.parameters()).device)
