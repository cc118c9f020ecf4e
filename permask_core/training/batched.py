"""Batched training of many networks of one architecture.

A small network leaves most of a GPU idle: the time of a step then depends on the number of operations, not on their
size. The weights of k networks, stacked along a new axis, form one network of k separate branches. The gradient of the
sum of their losses contains the gradient of each network, and an elementwise optimizer updates each network as in
separate training, up to rounding.
"""

import copy

import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from permask_core.data.splits import in_order
from permask_core.models import evaluation_mode
from permask_core.runs.checks import check_integer
from permask_core.runs.processes import default_device
from permask_core.training.loop import Evaluation, FitResult, evaluate, fit, fit_stream, memory_format
from permask_core.training.streams import SeveralStreams, as_split

BACKENDS = ("grouped", "vmap", "alone")
SMALL = 250_000  # up to so many multiplications for an image, calls dominate the time on a CPU too


# ---- Several networks in one module ----------------------------------------------------------------------------------

class Batch(nn.Module):
    """Networks of one architecture in one module, which maps ``x`` [n, k, ...] to logits [n, k, classes].

    Its parameters and buffers are copies of those of the networks, stacked along a first axis, with the prefix
    ``inner``.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        k models on one device.
    backend : {"grouped", "vmap"}
        ``"grouped"`` concatenates the channels of the networks and uses grouped convolutions; it supports convolutions,
        BatchNorm and linear layers, and requires that other operations do not mix channels. ``"vmap"`` uses
        :func:`torch.func.vmap`.

    Raises
    ------
    ValueError
        If there are no models, their architectures differ, or the backend does not support them.
    """

    def __init__(self, models, backend="grouped"):
        super().__init__()
        models = list(models)
        if len({_architecture(model) for model in models}) != 1:
            raise ValueError(f"got {len(models)} models of {len({_architecture(model) for model in models})} "
                             "architectures: expected at least one model, all of one architecture")
        if backend not in (known := backends(models[0])) or backend == "alone":
            raise ValueError(f"backend is {backend!r} for a {type(models[0]).__name__}: expected "
                             f"{' or '.join(known[:-1]) or 'none, because such networks are trained one by one'}")
        self.backend, self.members = backend, len(models)
        self.inner = copy.deepcopy(models[0])
        self._one = [copy.deepcopy(models[0])]  # in a list, so that its weights are not parameters of the batch
        made = {}  # a tensor with two names is stacked once
        for own, *theirs in zip(self.inner.modules(), *(model.modules() for model in models)):
            for kind in ("_parameters", "_buffers"):
                for name, tensor in getattr(own, kind).items():
                    if tensor is not None:
                        if id(tensor) not in made:
                            made[id(tensor)] = tensor, torch.stack([getattr(one, name).detach() for one in theirs])
                        stacked = made[id(tensor)][1]
                        getattr(own, kind)[name] = stacked if kind == "_buffers" else made.setdefault(
                            id(stacked), nn.Parameter(stacked, tensor.requires_grad))
            if backend == "grouped":
                own.__class__ = GROUPED.get(type(own), type(own))

    def forward(self, x):
        if x.ndim < 2 or x.shape[1] != self.members:
            raise ValueError(f"the inputs have shape {list(x.shape)}: expected [n, {self.members}, ...], an axis for "
                             "the networks")
        if self.backend == "grouped":
            x = x.flatten(1, 2)  # [n, k * channels, ...]
            x = x.contiguous(memory_format=memory_format(self.inner, x.device)) if x.ndim == 4 else x
            return self.inner(x).unflatten(1, (self.members, -1))
        one, = self._one
        one.train(self.training)
        tensors = {**dict(self.inner.named_parameters()), **dict(self.inner.named_buffers())}
        return vmap(lambda own, x: functional_call(one, own, (x,)), (0, 1), 1)(tensors, x)

    def split(self, state):
        """Return the ``state_dict`` of each network, given that of the batch."""
        return [{name.removeprefix("inner."): tensor[i].clone() for name, tensor in state.items()}
                for i in range(self.members)]


class _Conv2d(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.flatten(0, 1), None if self.bias is None else self.bias.flatten(), self.stride,
                        self.padding, self.dilation, len(self.weight) * self.groups)


class _BatchNorm2d(nn.BatchNorm2d):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean.flatten(), self.running_var.flatten(), self.weight.flatten(),
                            self.bias.flatten(), self.training, self.momentum, self.eps)


class _Linear(nn.Linear):
    def forward(self, x):
        x = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        x = torch.bmm(x, self.weight.transpose(1, 2)) if self.bias is None else torch.baddbmm(
            self.bias[:, None], x, self.weight.transpose(1, 2))
        return x.transpose(0, 1).flatten(1)


GROUPED = {nn.Conv2d: _Conv2d, nn.BatchNorm2d: _BatchNorm2d, nn.Linear: _Linear}


def backends(model):
    """Return the backends that can train several copies of a model, the one expected to be fastest on a GPU first."""
    modules = list(model.modules())
    random = any(isinstance(one, nn.modules.dropout._DropoutNd) and one.p > 0 for one in modules)
    if random or not all(tensor.is_floating_point() for tensor in model.parameters()) or any(
            type(one).__module__.startswith("permask_core.sparse") for one in modules):
        return ["alone"]  # random numbers would differ, and compiled kernels do not support batches of networks
    plain = all(
        type(one) in GROUPED and getattr(one, "padding_mode", "zeros") == "zeros"
        and not (isinstance(one, nn.BatchNorm2d) and (one.momentum is None or one.weight is None
                                                      or one.running_mean is None))
        for one in modules if one._parameters or one._buffers)
    return ["grouped"] * plain + ["vmap", "alone"]


def _architecture(model):
    return str(model), tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items())


def fastest(models, train, device):
    """Return the default backend of :func:`fit_batched`: on a CPU ``"alone"`` except for the smallest networks, on a
    GPU ``"grouped"`` if it gives the same outputs as the separate networks."""
    known = backends(models[0])
    x, _ = next(iter(train.batches([torch.arange(min(2, len(train)))], device)))
    if torch.device(device).type == "cpu" and _multiplications(models[0], x) > SMALL or len(models) == 1:
        return "alone"
    for backend in known[:-1]:
        batch = Batch(models, backend).to(device)
        with evaluation_mode(batch):
            found = batch(x[:, None].expand(-1, len(models), *x.shape[1:]))
        for model, logits in zip(models, found.unbind(1)):
            with evaluation_mode(model.to(device)):
                expected = model(x)
            if not torch.allclose(logits, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
                break
        else:
            return backend
    return "alone"


def _multiplications(model, x):
    """Return the multiplications of layers with weights for one input: positions times weights."""
    counted = []

    def count(layer, given, output):
        own = getattr(layer, "weight", None)
        if own is not None and own.ndim > 1:
            counted.append(own.numel() * (output[0].numel() // own.shape[0]))

    handles = [module.register_forward_hook(count) for module in model.modules()]
    try:
        with evaluation_mode(model):
            model.to(x.device)(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return sum(counted)


# ---- Training --------------------------------------------------------------------------------------------------------

def fit_batched(models, train, recipe, *, seeds, masks=None, checkpoints=(), backend=None, compiled=False, device=None,
                resume=None, description="training"):
    """Train networks of one architecture at once, each as in a separate :func:`~permask_core.training.fit`.

    Parameters
    ----------
    models : sequence of torch.nn.Module
        Trained in place from their current weights; afterwards they are on the device.
    train, recipe, checkpoints, device, description
        As in :func:`~permask_core.training.fit`.
    seeds : sequence of int
        One seed for each network. Networks with the same seed get the same batches.
    masks : sequence of Masks or None, optional
        Masks of each network, or None for a dense network.
    backend : {"grouped", "vmap", "alone"}, optional
        See :class:`Batch`; ``"alone"`` trains one network after the other. The default is the backend that is expected
        to be the fastest. The recipe's ``sparse_opt`` needs ``"alone"``.
    compiled : bool
        Whether to use :func:`torch.compile`, with CUDA graphs on a GPU.
    resume : path-like, optional
        As in :func:`~permask_core.training.fit`; networks that are trained one by one have separate files next to it.

    Returns
    -------
    list of FitResult
        One result for each network.

    Raises
    ------
    ValueError
        As in :func:`~permask_core.training.fit`; or if the numbers of models, seeds and masks differ, the models differ
        in architecture, or the backend does not support them.
    FloatingPointError
        If the loss of an epoch, or a weight at the end, is not finite in one of the networks.
    """
    models, seeds = list(models), [*seeds]
    masks = list(masks) if masks is not None else [None] * len(models)
    if not models or not len(models) == len(seeds) == len(masks):
        raise ValueError(f"got {len(models)} models, {len(seeds)} seeds and {len(masks)} masks: expected equal "
                         "numbers, at least one")
    for seed in seeds:
        check_integer("seed", seed, 0)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    train, device = as_split(train), torch.device(device or default_device())
    if recipe.sparse_opt and backend not in (None, "alone"):
        raise ValueError(f"backend is {backend!r} with sparse_opt: expected 'alone'")
    backend = backend or ("alone" if recipe.sparse_opt else fastest(models, train, device))
    if backend == "alone":
        places = [f"{resume}.{i}" if resume else None for i in range(len(models))]
        return [fit(model, train, recipe, seed=seed, masks=own, checkpoints=checkpoints, device=device, resume=place,
                    description=description and f"{description} {i} of {len(models)}")
                for i, (model, seed, own, place) in enumerate(zip(models, seeds, masks, places), 1)]
    batch = Batch(models, backend)
    if compiled:
        batch.compile(mode="reduce-overhead" if device.type == "cuda" else "default")

    def loss(logits, targets):  # [n, networks, classes] and [n, networks]: the mean of each network
        return F.cross_entropy(logits.transpose(1, 2), targets, label_smoothing=recipe.label_smoothing,
                               reduction="none").mean(0)

    run = fit_stream(batch, SeveralStreams(train, recipe.batch_size, seeds), recipe, loss=loss, networks=len(models),
                     masks=_stacked_masks(models[0], masks), checkpoints=checkpoints, device=device, resume=resume,
                     description=description and f"{description}, {len(models)} networks")
    states, kept = batch.split(run.state), {name: batch.split(state) for name, state in run.checkpoints.items()}
    for model, state in zip(models, states):
        model.to(device).load_state_dict(state)
    return [FitResult(states[i], {name: split[i] for name, split in kept.items()}, [losses[i] for losses in run.losses],
                      masks[i]) for i in range(len(models))]


def _stacked_masks(model, masks):
    shapes = {name: one for own in masks if own for name, one in own.items()}
    return {f"inner.{name}": torch.stack([(own or {}).get(name, torch.ones_like(one)) for own in masks])
            for name, one in shapes.items()} or None


def evaluate_batched(models, split, *, backend=None, device=None, batch_size=1000):
    """:func:`~permask_core.training.evaluate` for networks of one architecture; returns a list of Evaluation."""
    split, device = as_split(split), torch.device(device or default_device())
    backend = backend or fastest(models, split, device)
    if backend == "alone":
        return [evaluate(model.to(device), split, batch_size=batch_size) for model in models]
    batch = Batch(models, backend).to(device)
    hits, losses = torch.zeros(2, len(models), dtype=torch.float64, device=device)
    with evaluation_mode(batch):
        for x, y in split.batches(in_order(split, max(1, batch_size // len(models))), device):
            logits = batch(x[:, None].expand(-1, len(models), *x.shape[1:])).transpose(1, 2)  # [n, classes, k]
            y = y[:, None].expand(-1, len(models))
            hits += (logits.argmax(1) == y).sum(0)
            losses += F.cross_entropy(logits, y, reduction="none").sum(0)
    return [Evaluation(*values) for values in zip((hits / len(split)).tolist(), (losses / len(split)).tolist())]
