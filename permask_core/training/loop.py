"""One training loop for every experiment: batches, backward, step, in one process or several.

All randomness of a run comes from its seed: the same seed gives the same batches in the same order for any masks. Runs
with the same checkpoint and the same seed therefore differ only in their masks. One object takes the steps: the
optimizer by itself, the optimizer with masks, or a topology that moves connections.
"""

import copy
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from permask_core.data.batches import batches_of, call, count, logits_of
from permask_core.data.splits import Split, mix_seed
from permask_core.masks import apply_masks, check_fit
from permask_core.models import device_of, evaluation_mode
from permask_core.runs.checks import check_integer
from permask_core.runs.processes import Alone, default_device, launch, of_first
from permask_core.runs.progress import progress
from permask_core.sparse.dynamic import Rewiring, Topology
from permask_core.sparse.fan_in import FanInLayer
from permask_core.sparse.optim import scale_gradients
from permask_core.training.recipe import OPTIMIZERS, autocast, checkpoint_step, learning_rate
from permask_core.training.resume import (
    Run,
    digest,
    find_run,
    load_run,
    optimizer_state,
    restore_optimizer,
    save_run,
)
from permask_core.training.streams import stream_of

SAVE_SECONDS = 60  # between two saves of a resumable run
IGNORED = -100  # a target that does not count, as in torch's cross-entropy


class FitResult(NamedTuple):
    """A finished run: the final ``state``, the requested ``checkpoints`` by name, the mean training ``losses``
    [epochs], and the final ``masks``. With rewiring also ``fan_in``, for each layer int32 [1 + rewirings, out]: the
    number of connections of its neurons at the start and after each rewiring."""

    state: dict[str, torch.Tensor]
    checkpoints: dict[str, dict[str, torch.Tensor]]
    losses: list[float]
    masks: dict[str, torch.Tensor] | None = None
    fan_in: dict[str, torch.Tensor] | None = None


def fit(model, train, recipe, *, seed, loss=None, forward=None, masks=None, rewiring=None, checkpoints=(), device=None,
        processes=1, resume=None, description="training"):
    """Train a model in place.

    Parameters
    ----------
    model : torch.nn.Module
        Trained from its current weights; afterwards it is on the device.
    train : Split, (torch.Tensor, torch.Tensor) or iterable of batches
        A split of :func:`permask_core.data.load_dataset`, inputs [n, ...] and targets [n, ...], or batches with targets
        in a form of :mod:`permask_core.data.batches`, such as a DataLoader, which then determines batch size and order.
    recipe : Recipe
    seed : int
        Seed of the order of the data (also in a DataLoader that shuffles), augmentation, dropout and random growth. The
        global random state is restored afterwards.
    loss : callable, optional
        ``loss(logits, targets)``, a mean over the examples of a batch; by default :func:`cross_entropy`. A run to
        resume is identified by the name of the loss, or by its ``repr`` if the loss has settings.
    forward : callable, optional
        ``forward(model, inputs)`` returns the first argument of the loss. By default the model is called with the
        inputs (a tensor, a tuple of arguments or a dict of named arguments), and the loss gets the logits in its
        output.
    masks : Masks, optional
        Applied before the first step and after every step, because momentum and weight decay change pruned weights.
    rewiring : Rewiring, optional
        How to move the connections under the masks and those of :class:`~permask_core.sparse.FanInLayer` layers. A
        step that moves connections changes no other weight.
    checkpoints : sequence of str
        States to return: ``"init"`` (before the first step, masked if there are masks), ``"epoch K"`` or ``"step K"``
        (after K epochs or steps).
    device : str or torch.device, optional
        Device of the training; by default a CUDA device if there is one.
    processes : int
        Number of processes that share each batch, on separate CUDA devices if available. If it is above 1, this call
        starts the processes, so a script must call it below ``if __name__ == "__main__":``; processes that ``torchrun``
        has started, in this number, connect instead. Gradients are averaged over all examples of the batch. BatchNorm
        uses the examples of its own process, and its final statistics are those of the first process.
    resume : path-like, optional
        A file to which the run is saved every minute and at the end. If it exists, training continues from it. On the
        same CPU, with one or two processes, the result is bit for bit that of an uninterrupted run. (With more
        processes, the order of sums of gradients is chosen by the communication library in its first step.)
    description : str or None
        Text of the progress bar; None for no bar.

    Returns
    -------
    FitResult
        States are copies on the CPU.

    Raises
    ------
    ValueError
        Before training, if masks do not fit, the recipe has label smoothing and a ``loss`` is given, a checkpoint has a
        wrong name or is after the end, there are fewer examples than in a batch, the last batch has fewer examples than
        parts, a BatchNorm would get only one example, there is no layer to rewire, processes disagree about the
        training, or the file to resume from belongs to a run with other settings. In the first step, if targets are not
        classes of the logits, or with several processes a parameter has no gradient.
    FloatingPointError
        If the loss of an epoch, or a weight at the end, is not finite.
    RuntimeError
        If one of several processes failed; it has the message of that process.

    Examples
    --------
    >>> from permask_core import Recipe
    >>> model = torch.nn.Linear(4, 2)
    >>> data = torch.randn(64, 4), torch.randint(2, (64,))
    >>> result = fit(model, data, Recipe(epochs=3, batch_size=16), seed=0, device="cpu", description=None)
    >>> len(result.losses)
    3
    """
    check_integer("seed", seed, 0)
    stream = stream_of(train, recipe.batch_size, int(seed))
    return fit_stream(model, stream, recipe, loss=loss, forward=forward, masks=masks, rewiring=rewiring,
                      checkpoints=checkpoints, device=device, processes=processes, resume=resume,
                      description=description)


def cross_entropy(logits, targets, *, label_smoothing=0.0, reduction="mean"):
    """Return the cross-entropy in nats of logits [n, classes, ...] or [n, ..., classes] and classes [n, ...]; targets
    of -100 do not count.

    Raises
    ------
    ValueError
        If the targets are not integers, or their shape is not that of the logits without the classes.
    """
    return F.cross_entropy(by_class(logits, targets), targets, label_smoothing=label_smoothing, reduction=reduction)


def by_class(logits, targets):
    """Return the logits as [n, classes, ...] for targets [n, ...]; raise ValueError if the targets do not fit."""
    if targets is None:
        raise ValueError("the batches have no targets: expected (inputs, targets), or dicts with labels")
    if not isinstance(targets, torch.Tensor) or targets.is_floating_point() or targets.is_complex():
        kind = targets.dtype if isinstance(targets, torch.Tensor) else type(targets).__name__
        raise ValueError(f"the targets are {kind}: expected classes as integers; for other targets pass loss= to fit "
                         "and metric= to evaluate")
    if logits.ndim > 1 and logits.shape[:1] + logits.shape[2:] == targets.shape:
        return logits
    if logits.ndim > 1 and logits.shape[:-1] == targets.shape:
        return logits.movedim(-1, 1)
    raise ValueError(f"the targets have shape {list(targets.shape)} and the logits {list(logits.shape)}: expected "
                     "the shape of the logits without the axis of classes, which is the second or the last")


# ---- Steps -----------------------------------------------------------------------------------------------------------

class Dense:
    """Steps of an optimizer without masks. Classes that take steps have this one method, like
    :class:`~permask_core.sparse.dynamic.Topology`, which moves connections."""

    def step(self, optimizer):
        """Take a step, given the gradients of the whole batch."""
        optimizer.step()


class Masked(Dense):
    """Steps of an optimizer, after which pruned weights are set to zero again."""

    def __init__(self, model, masks):
        parameters = dict(model.named_parameters())
        self.weights = [parameters[name] for name in masks]
        self.keep = [mask.to(weight.device, weight.dtype) for weight, mask in zip(self.weights, masks.values())]

    def step(self, optimizer):
        optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.keep)


# ---- The loop --------------------------------------------------------------------------------------------------------

class _Plan(NamedTuple):
    """The settings that determine a run."""

    recipe: object
    stream: object
    loss: object
    forward: object
    masks: dict | None
    rewiring: Rewiring | None
    wanted: dict[str, int]  # number of steps by name of the checkpoint
    networks: int | None = None  # number of networks in batched training, each with its own loss
    identity: dict = {}  # summary of all settings by name; empty if it is never compared


def fit_stream(model, stream, recipe, *, loss=None, forward=None, masks=None, rewiring=None, checkpoints=(),
               device=None, processes=1, resume=None, description="training", networks=None):
    """:func:`fit` on the batches of a stream; with ``networks`` the loss is a tensor [networks], and losses are lists.

    See :mod:`permask_core.training.streams`. Parameters, results and errors are those of :func:`fit`.
    """
    check_integer("processes", processes, 1)
    if isinstance(checkpoints, str):
        raise ValueError(f"checkpoints is {checkpoints!r}: expected a list of names")
    wanted = {name: checkpoint_step(name, stream.steps) for name in checkpoints}
    plan = _Plan(recipe, stream, loss, forward, masks, rewiring, wanted, networks)
    _check(model, plan, processes)
    if processes > 1 or resume:
        plan = plan._replace(identity=_identity(model, plan, processes))
    if processes == 1:
        model.to(device or default_device())
        return _train(Alone(), model, plan, resume, description)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(resume or Path(folder, "run.safetensors")).absolute()
        find_run(path, plan.identity)  # raises errors before any process starts
        launch(_train, processes, device, model.cpu(), plan, path, description)
        run = of_first(load_run, path, plan.identity)
    model.load_state_dict(run.state)
    model.to(device or default_device()).train()
    kept = {name: run.checkpoints[name] for name in wanted}
    return FitResult(run.state, kept, run.losses, *((run.masks or None, run.fan_in) if rewiring else (masks, None)))


def _check(model, plan, processes):
    recipe, stream, total = plan.recipe, plan.stream, plan.recipe.epochs * plan.stream.steps
    if plan.loss and plan.networks is None and recipe.label_smoothing:
        raise ValueError(f"label_smoothing is {recipe.label_smoothing} and loss is given: expected label_smoothing 0")
    parts = processes * recipe.accumulate
    if stream.last is not None and stream.last < parts:
        raise ValueError(f"the last batch of an epoch has {stream.last} examples: expected at least "
                         f"{parts}, one for each of {processes} processes x accumulate {recipe.accumulate}")
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if norms and stream.last is not None and stream.last // parts == 1:
        raise ValueError(f"the last batch of an epoch has {stream.last} examples in {parts} parts: {norms[0]!r} "
                         "cannot normalise one example; expected another batch_size, or a loader with drop_last=True")
    for name, step in plan.wanted.items():
        if step > total:
            raise ValueError(f"checkpoint {name!r} is after the end: the run has {recipe.epochs} epochs of "
                             f"{stream.steps} steps")
    if plan.masks is not None:
        check_fit(plan.masks, dict(model.named_parameters()))
    if plan.rewiring is not None and not isinstance(plan.rewiring, Rewiring):
        raise ValueError(f"rewiring is {plan.rewiring!r}: expected a Rewiring such as Rewiring('set')")
    if plan.rewiring:
        Topology(copy.deepcopy(model), plan.masks, plan.rewiring, steps=total, seed=stream.seed)  # applies masks
        if processes > 1 and any(isinstance(module, FanInLayer) for module in model.modules()):
            raise ValueError(f"processes is {processes} with rewiring and fan-in layers: expected 1, or masks "
                             "instead, because DistributedDataParallel requires fixed shapes of gradients")


def _identity(model, plan, processes):
    named = {name: getattr(one, "__qualname__", repr(one)) for name, one in (("loss", plan.loss),
                                                                             ("forward", plan.forward)) if one}
    identity = {**asdict(plan.recipe), **plan.stream.identity(), "checkpoints": plan.wanted, "processes": processes,
                **named, "masks": digest(plan.masks or {}),
                "rewiring": asdict(plan.rewiring) if plan.rewiring else None,
                "initial weights": digest(model.state_dict())}
    return json.loads(json.dumps(identity))


def _train(team, model, plan, path, description):
    """Train on the device of the model, in one process or as one of the processes of a ``team``."""
    team.check_agreement(plan.identity)
    recipe, device = plan.recipe, team.device or device_of(model)
    order = memory_format(model.to(device).train(), device)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=order)
    state = _State(team, model, plan, path)
    optimizer, stream = state.optimizer, plan.stream.to(device)
    network, steps = team.wrap(model), recipe.epochs * stream.steps
    batches = stream.batches(recipe.epochs, state.done, device, team.ranks * recipe.accumulate,
                             slice(team.rank, None, team.ranks))
    dropout_seed = mix_seed(stream.seed, team.rank)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for size, parts in progress(batches, description if team.rank == 0 else None, total=steps - state.done):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, state.done, stream.steps)
            _seed_dropout(dropout_seed + state.done, device)
            optimizer.zero_grad()
            for i, (inputs, targets) in enumerate(parts, 1):
                loss = _loss(network, inputs, targets, plan, order, device)
                n = count(inputs)
                with team.accumulating(network, more=i < len(parts)):
                    total = loss if plan.networks is None else loss.sum()
                    (total * (team.ranks * n / size)).backward()  # gradients are then averaged over processes
                state.totals[team.rank] += loss.detach() * n
            if state.done == 0 and team.ranks > 1:
                _check_gradients(model)
            state.weights.step(optimizer)
            state.advance(size)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():  # the last step is not covered by a loss
            raise FloatingPointError(f"{name!r} is not finite after the last step: try a smaller learning rate than "
                                     f"{recipe.lr}")
    return state.finish()


def _loss(network, inputs, targets, plan, order, device):
    if isinstance(inputs, torch.Tensor) and inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=order)
    with autocast(device, plan.recipe.precision):
        output = _answer(network, inputs, plan.forward)
    if isinstance(output, torch.Tensor) and output.dtype.itemsize < 4:
        output = output.float()
    if plan.loss:
        return plan.loss(output, targets)
    return cross_entropy(output, targets, label_smoothing=plan.recipe.label_smoothing)


def _seed_dropout(seed, device):
    """Seed dropout by the step, so that a resumed run does not depend on previous steps. torch.manual_seed is not used
    because it takes a millisecond for absent devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _check_gradients(model):
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if without:
        raise ValueError(f"{', '.join(map(repr, without))} got no gradient: with several processes, expected a "
                         "loss that uses every parameter; requires_grad_(False) excludes a parameter")


class _State:
    """The progress of a run: the content of its file, and the state of the loop."""

    def __init__(self, team, model, plan, path):
        self.team, self.model, self.plan, self.path = team, model, plan, path
        steps, device = plan.recipe.epochs * plan.stream.steps, device_of(model)
        run = team.of_first(find_run, path, plan.identity)
        if plan.masks:
            apply_masks(model, plan.masks)
        self.topology = plan.rewiring and Topology(model, plan.masks, plan.rewiring, steps=steps, seed=plan.stream.seed)
        masks = self.topology.masks if self.topology else plan.masks or {}
        self.weights = self.topology or (Masked(model, masks) if masks else Dense())
        self.parameters = dict(model.named_parameters())
        self.optimizer = OPTIMIZERS[plan.recipe.optimizer](model.parameters(), plan.recipe)
        if plan.recipe.sparse_opt:
            scale_gradients(self.optimizer, model, masks)
        self.losses, self.checkpoints, self.done, self.seen, self.saved = [], {}, 0, 0, time.monotonic()
        # Each process has its own entry, so that a resumed run adds in the same order.
        self.totals = torch.zeros(team.ranks, *[plan.networks] * (plan.networks is not None), device=device)
        if run:
            model.load_state_dict(run.state)
            restore_optimizer(self.optimizer, self.parameters, run.optimizer)
            self.checkpoints = {name: run.checkpoints[name] for name in plan.wanted if name in run.checkpoints}
            self.losses, self.done, self.seen = run.losses, run.done, run.seen
            self.totals[team.rank] = run.totals[team.rank]
            if self.topology:
                self.topology.restore(run.masks, run.fan_in, run.done)
        else:
            self.keep()

    def keep(self):
        """Copy the state if it is one of the checkpoints."""
        self.checkpoints |= {name: _on_cpu(self.model.state_dict())
                             for name, step in self.plan.wanted.items() if step == self.done}

    def advance(self, size):
        """Count a step; record checkpoints and the loss of an epoch, and save the file once a minute."""
        self.done += 1
        self.seen += size
        self.keep()
        if self.done % self.plan.stream.steps == 0:
            loss = self.team.sum(self.totals).sum(0).double() / self.seen
            if not loss.isfinite().all():
                raise FloatingPointError(f"the training loss is {loss.tolist()} in epoch {len(self.losses) + 1}: try a "
                                         f"smaller learning rate than {self.plan.recipe.lr}")
            self.losses.append(loss.tolist())
            self.totals, self.seen = torch.zeros_like(self.totals), 0
        if self.path and self.team.agree(time.monotonic() - self.saved >= SAVE_SECONDS):
            self.save()
            self.saved = time.monotonic()

    def save(self):
        totals = self.team.sum(self.totals)
        if self.team.rank == 0:
            moved = (_on_cpu(self.topology.masks), self.topology.fan_in) if self.topology else ({}, {})
            save_run(self.path, Run(_on_cpu(self.model.state_dict()), self.checkpoints, self.losses,
                                    optimizer_state(self.optimizer, self.parameters), totals, self.done, *moved,
                                    seen=self.seen), self.plan.identity)

    def finish(self):
        if self.path:
            self.save()
        moved = self.plan.masks, None
        if self.topology:
            moved = _on_cpu(self.topology.masks) or None, self.topology.fan_in
        return FitResult(_on_cpu(self.model.state_dict()), self.checkpoints, self.losses, *moved)


def memory_format(model, device):
    """Return the memory format in which a model's convolutions are fastest: channels last.

    The exception, on a CPU, is a 1x1 convolution with a stride and fewer than 8 input channels. Its gradient with AVX2
    writes past the end of its memory in oneDNN 3.12, which is part of PyTorch 2.13:
    https://github.com/uxlfoundation/oneDNN/issues/6035
    """
    broken = torch.device(device).type == "cpu" and any(
        isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1) and max(layer.stride) > 1
        and layer.in_channels // layer.groups < 8 for layer in model.modules())
    return torch.contiguous_format if broken else torch.channels_last


def throughput(model, input_shape, recipe, *, classes=10, steps=2, device=None):
    """Measure the training speed in images per second, on random images in memory.

    Parameters
    ----------
    model : torch.nn.Module
        The model, which is trained.
    input_shape : tuple of int
        Shape of one image.
    recipe : Recipe
        One epoch of ``steps`` batches is timed, after one without timing.
    classes, steps : int
    device
        As in :func:`fit`.
    """
    def seconds(steps):
        n = steps * recipe.batch_size
        images = Split(torch.randn(n, *input_shape), torch.arange(n) % classes)
        start = time.perf_counter()
        fit(model, images, replace(recipe, epochs=1, warmup=0.0), seed=0, device=device, description=None)
        return time.perf_counter() - start

    seconds(1)
    return steps * recipe.batch_size / seconds(steps)


def _on_cpu(tensors):
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


# ---- Evaluation ------------------------------------------------------------------------------------------------------

class Evaluation(NamedTuple):
    """``accuracy`` in [0, 1] and mean cross-entropy ``loss`` in nats, over the targets that are not -100."""

    accuracy: float
    loss: float


def evaluate(model, data, *, state=None, batch_size=1000, metric=None, forward=None):
    """Return accuracy and loss on some data, or a custom metric.

    Parameters
    ----------
    model : torch.nn.Module
        Evaluated on its device, in evaluation mode.
    data : Split, (torch.Tensor, torch.Tensor) or iterable of batches
        As in :func:`fit`.
    state : dict of str to torch.Tensor, optional
        Weights to evaluate instead of those of the model, which do not change.
    batch_size : int
        Batch size for a split or tensors.
    metric : callable, optional
        ``metric(outputs, targets)`` is called with all examples, on the CPU, and its result is returned.
    forward : callable, optional
        As in :func:`fit`.

    Returns
    -------
    Evaluation
        Or the result of ``metric``.

    Raises
    ------
    ValueError
        If there are no data or no targets, or these are not the classes of the logits and no metric is given.

    Examples
    --------
    >>> model = torch.nn.Linear(1, 1)
    >>> x = torch.arange(4.0)[:, None]
    >>> round(evaluate(model, (x, model(x).detach()), metric=F.mse_loss).item(), 6)
    0.0
    """
    model, found, hits, loss, n = _with(model, state), [], 0, 0, 0
    with evaluation_mode(model):
        for inputs, targets in batches_of(data, device_of(model), batch_size=batch_size):
            output = _answer(model, inputs, forward)
            if metric is not None:
                found.append((output.cpu(), targets.cpu()))
                continue
            logits = by_class(output, targets)
            hits += (logits.argmax(1) == targets).sum().item()
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            n += targets.numel() - (targets == IGNORED).sum().item()
    if metric is not None:
        return metric(*map(torch.cat, zip(*found)))
    if not n:
        raise ValueError(f"every target is {IGNORED}, which is ignored: expected at least one class")
    return Evaluation(hits / n, loss / n)


def predict(model, data, *, state=None, batch_size=1000, forward=None):
    """Return the logits of all inputs in order, without augmentation.

    Parameters
    ----------
    model, data, state, batch_size, forward
        As in :func:`evaluate`; targets are not needed.

    Returns
    -------
    torch.Tensor
        [n, classes], or [n, ...] if the network has other outputs, on the CPU.

    Raises
    ------
    ValueError
        If there are no data.
    """
    model = _with(model, state)
    with evaluation_mode(model):
        return torch.cat([_answer(model, inputs, forward).cpu() for inputs, _ in
                          batches_of(data, device_of(model), batch_size=batch_size)])


def _with(model, state):
    if state is not None:
        model = copy.deepcopy(model)
        model.load_state_dict(state)
    return model


def _answer(model, inputs, forward):
    return forward(model, inputs) if forward else logits_of(call(model, inputs))
