"""Classifiers with very many labels: a fan-in output layer, trained by SET, whose logits are computed in chunks.

With a million labels nearly all memory is used by the output layer: its weights, their gradients, both moments of the
optimizer, and the logits of a batch. Rows of fixed fan-in make the first three small. The loss processes the labels in
chunks and computes gradients in the same pass, so only one chunk of logits exists at a time.

Based on Ullah et al., "Navigating Extremes: Dynamic Sparsity in Large Output Spaces", NeurIPS 2024; SET is Mocanu et
al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity", Nature Communications, 2018.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import islice
from numbers import Integral, Real

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from permask_core.runs.checks import check_integer, is_integer
from permask_core.runs.progress import progress
from permask_core.runs.store import plain
from permask_core.sparse import kernels
from permask_core.sparse.dynamic import set_rows_step
from permask_core.sparse.fan_in import FanInLinear
from permask_core.training.resume import Run, describe, digest, find_run, optimizer_state, restore_optimizer, save_run

# Logits at a time: a megabyte, which fits into a processor's cache; on a GPU, enough to keep it busy.
CHUNK = {"cpu": 2 ** 18, "cuda": 2 ** 24}


def _chunk(device, points):
    """Return the number of labels in a chunk."""
    return max(1, CHUNK.get(torch.device(device).type, CHUNK["cpu"]) // max(1, points))


# ---- Loss in chunks --------------------------------------------------------------------------------------------------

class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, head, point, labels, chunk):
        chunk = chunk or _chunk(x.device, len(x))
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = x.new_zeros((), dtype=torch.float64)
        dx = torch.zeros_like(x) if need_x else None
        dweight = torch.empty_like(weight) if need_weight else None
        dbias = torch.empty_like(bias) if need_bias else None
        starts = torch.arange(0, head.out_features + chunk, chunk, device=labels.device)
        bounds = torch.searchsorted(labels, starts).tolist()  # in one call, because it synchronises with a GPU
        for start, a, b in zip(range(0, head.out_features, chunk), bounds, bounds[1:]):
            stop = min(start + chunk, head.out_features)
            z = _logits(head, x, start, stop)
            there = point[a:b], labels[a:b] - start
            total += F.softplus(z).sum(dtype=torch.float64) - z[there].sum(dtype=torch.float64)
            grad = z.sigmoid_().div_(len(x))  # for the mean over points
            grad[there] -= 1 / len(x)
            if need_bias:
                torch.sum(grad, 0, out=dbias[start:stop])
            if isinstance(head, FanInLinear):
                part_x, part = kernels.backward(
                    grad, x, weight[start:stop], head.indices[start:stop], head.transpose(start, stop), need_x=need_x,
                    need_values=need_weight)
                if need_weight:
                    dweight[start:stop] = part
                if need_x:
                    dx += part_x
            else:
                if need_weight:
                    torch.mm(grad.t(), x, out=dweight[start:stop])
                if need_x:
                    dx.addmm_(grad, weight[start:stop])
        ctx.save_for_backward(*(grad for grad in (dx, dweight, dbias) if grad is not None))
        return (total / len(x)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        saved = iter(ctx.saved_tensors)
        return *(scale * next(saved) if need else None for need in ctx.needs_input_grad[:3]), None, None, None, None


def _logits(head, x, start, stop):
    """Return the logits of the labels from start to stop, [n, stop - start]."""
    bias = None if head.bias is None else head.bias[start:stop]
    if isinstance(head, FanInLinear):
        return kernels.forward(x, head.values[start:stop], head.indices[start:stop], bias)
    return F.linear(x, head.weight[start:stop], bias)


def chunked_loss(head, x, offsets, labels, chunk=None):
    """Return the binary cross-entropy with logits ``head(x)``, summed over labels and averaged over points.

    Value and gradients are computed in one pass over chunks of labels: at most ``chunk`` columns of the logits and
    their gradients, [points, labels], exist at a time. The same chunks give the same result bit for bit.

    Parameters
    ----------
    head : FanInLinear or torch.nn.Linear
        The output layer, without ablated neurons.
    x : torch.Tensor
        [n, in_features], n at least 1.
    offsets, labels : torch.Tensor
        int64 [n + 1] and integers [offsets[-1]]: the labels of each point, without duplicates, as in
        :class:`permask_core.data.extreme.MultiLabel`.
    chunk : int, optional
        Labels at a time; by default a chunk has 2^18 logits, on a GPU 2^24.

    Returns
    -------
    torch.Tensor
        A scalar, in nats, summed in float64. It can be differentiated once, with respect to x and the head's
        parameters.

    Raises
    ------
    ValueError
        If there are ablated neurons, the shapes do not fit, or a label is out of range.
    """
    if isinstance(head, FanInLinear) and head.n_active < head.out_features:
        raise ValueError(f"the head has {head.out_features - head.n_active} ablated neurons: expected connections for "
                         "every label")
    if x.ndim != 2 or len(x) == 0 or x.shape[1] != head.in_features or len(offsets) != len(x) + 1:
        raise ValueError(f"x is {list(x.shape)} with {len(offsets)} offsets: expected [n, {head.in_features}] with n "
                         "at least 1, and n + 1 offsets")
    if chunk is not None:
        check_integer("chunk", chunk, 1)
    outside = labels[(labels < 0) | (labels >= head.out_features)]
    if len(outside):
        raise ValueError(f"labels has {outside[0]}: expected 0 to {head.out_features - 1}")
    point = torch.arange(len(x)).repeat_interleave(offsets.diff())
    labels, order = labels.long().sort(stable=True)
    point, labels = point[order].to(x.device), labels.to(x.device)
    weight = head.values if isinstance(head, FanInLinear) else head.weight
    return _ChunkedLoss.apply(x, weight, head.bias, head, point, labels, chunk)


# ---- The classifier --------------------------------------------------------------------------------------------------

class ExtremeClassifier(nn.Module):
    """A first layer, an optional intermediate layer, and an output layer with ``fan_in`` weights for each label.

    Parameters
    ----------
    features, n_labels : int
    fan_in : int or None
        Fan-in of the output layer; None for a dense layer.
    hidden : int, optional
        Outputs of the first layer, which is followed by a ReLU. By default there is no first layer.
    intermediate : int, optional
        Outputs of a dense layer with ReLU before the output layer.
    n_clusters : int, optional
        Outputs of an auxiliary head for the clusters of labels.
    bags : bool
        Whether features are bags of words in CSR arrays. The first layer is then a sum of embeddings, weighted by
        value.
    generator : torch.Generator, optional
        Generator for the connections and all weights.

    Raises
    ------
    ValueError
        If ``bags`` is True without ``hidden``, or a size is out of range.
    """

    def __init__(self, features, n_labels, fan_in, *, hidden=None, intermediate=None, n_clusters=None, bags=False,
                 generator=None):
        super().__init__()
        for name, size in (("features", features), ("n_labels", n_labels), ("hidden", hidden),
                           ("intermediate", intermediate), ("n_clusters", n_clusters)):
            if size is not None:
                check_integer(name, size, 1)
        if bags and hidden is None:
            raise ValueError("bags is True without hidden: expected the number of outputs of the embedding")
        self.features, self.bags, width = features, bags, hidden or features
        if bags:
            self.first = nn.EmbeddingBag(features, hidden, mode="sum", include_last_offset=True)
            nn.init.normal_(self.first.weight, generator=generator)  # inputs of norm 1 give a variance of 1
        else:
            self.first = nn.Identity() if hidden is None else _dense(features, hidden, generator)
        self.intermediate = nn.Identity() if intermediate is None else _dense(width, intermediate, generator)
        width = intermediate or width
        self.head = _dense(width, n_labels, generator) if fan_in is None else FanInLinear(
            width, n_labels, fan_in, generator=generator)
        self.auxiliary = None if n_clusters is None else _dense(width, n_clusters, generator)
        # As in detectors with many background examples (Lin et al., "Focal Loss for Dense Object Detection", 2017,
        # section 3.3): most labels are absent, and with an initial probability of 1/2 the first steps would learn only
        # that.
        nn.init.constant_(self.head.bias, -math.log(max(1, n_labels - 1)))

    def encode(self, x):
        """Return the input of the output layer, [n, width]; ``x`` is float32 [n, features] or a CSR array of bags."""
        device = self.head.bias.device
        if self.bags == isinstance(x, torch.Tensor):
            raise ValueError(f"the features are a {type(x).__name__} and bags is {self.bags}: expected bags=True for "
                             "CSR arrays and bags=False for tensors")
        if x.shape[1] != self.features:
            raise ValueError(f"the points have {x.shape[1]} features: expected {self.features}")
        if self.bags:
            columns, offsets, values = (torch.from_numpy(part).to(device) for part in (
                x.indices, x.indptr.astype(x.indices.dtype), x.data))
            x = self.first(columns, offsets, per_sample_weights=values).relu()
        else:
            x = x.to(device)
            x = x if isinstance(self.first, nn.Identity) else self.first(x).relu()
        return x if isinstance(self.intermediate, nn.Identity) else self.intermediate(x).relu()

    def forward(self, x):
        """Return all logits, [n, n_labels]."""
        return self.head(self.encode(x))

    def loss(self, data, share=0.0, chunk=None):
        """Return (1 - share) times :func:`chunked_loss` plus share times the loss of the auxiliary head over clusters.

        A point has a cluster if it has one of its labels. If ``share`` is 0 the auxiliary head is not used.

        Parameters
        ----------
        data : MultiLabel
            A batch.
        share : float
            In [0, 1].
        chunk : int, optional

        Returns
        -------
        torch.Tensor
            A scalar, in nats.
        """
        x = self.encode(data.features)
        if share == 0:
            return chunked_loss(self.head, x, data.offsets, data.labels, chunk)
        if self.auxiliary is None or data.clusters is None:
            missing = "an auxiliary head" if self.auxiliary is None else "clusters"
            raise ValueError(f"share is {share} without {missing}: expected a model with n_clusters and data with "
                             "clusters of the labels")
        logits = self.auxiliary(x)
        point, labels = data.pairs()
        target = torch.zeros_like(logits)
        target[point.to(x.device), data.clusters[labels].to(x.device)] = 1
        clusters = F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(data)
        return (1 - share) * chunked_loss(self.head, x, data.offsets, data.labels, chunk) + share * clusters


def _dense(inputs, outputs, generator):
    """Make a linear layer with He's variance 2 / inputs and zero biases."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def training_bytes(in_features, n_labels, fan_in=None):
    """Return the bytes of an output layer in training: float32 parameters, gradients, both moments of Adam, and
    indices.

    Parameters
    ----------
    in_features, n_labels : int
    fan_in : int, optional
        None for a dense layer.

    Returns
    -------
    int
        Biases are included, and for a fan-in layer int32 indices and the int64 list of rows, which have no gradients.
        The transposed copy of the indices for the gradient of the input is not. The paper's numbers exclude biases and
        rows: 16 bytes for each label of a dense layer and 24 of a fan-in layer.
    """
    if fan_in is None:
        return 16 * n_labels * (in_features + 1)
    return n_labels * (fan_in * (16 + 4) + 16 + 8)


# ---- Training --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ExtremeRecipe:
    """Settings of training: Adam with a cosine learning rate that decays to 0, SET, and the share of the auxiliary
    objective."""

    epochs: int = 10
    lr: float = 0.003
    batch_size: int = 128
    rewire_every: int = 100  # steps between two steps of SET
    rewire_until: float = 0.66  # fraction of training; 0 for static connections
    drop: float = 0.2  # fraction of each row's connections in a step of SET
    auxiliary: float = 0.0  # initial share of the auxiliary objective; 0.4 in the paper
    auxiliary_epochs: int = 5  # after them the share is 0; it decays like a cosine that ends at the last epoch

    def __post_init__(self):
        for name, kind, expected, fits in (
            ("epochs", Integral, "an integer of at least 1", lambda v: v >= 1),
            ("lr", Real, "a number above 0", lambda v: 0 < v < math.inf),
            ("batch_size", Integral, "an integer of at least 1", lambda v: v >= 1),
            ("rewire_every", Integral, "an integer of at least 1", lambda v: v >= 1),
            ("rewire_until", Real, "a number in [0, 1]", lambda v: 0 <= v <= 1),
            ("drop", Real, "a number in (0, 1)", lambda v: 0 < v < 1),
            ("auxiliary", Real, "a number in [0, 1]", lambda v: 0 <= v <= 1),
            ("auxiliary_epochs", Integral, "an integer of at least 0", lambda v: v >= 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
                raise ValueError(f"{name} is {value!r}: expected {expected}")


def auxiliary_share(recipe, epoch):
    """Return the share of the auxiliary objective at an epoch, counted from 0, which may be a fraction."""
    if epoch >= recipe.auxiliary_epochs:
        return 0.0
    return recipe.auxiliary * (1 + math.cos(math.pi * epoch / recipe.epochs)) / 2


def fit_extreme(model, train, recipe, *, seed, resume=None, description="training"):
    """Train a classifier in place.

    Parameters
    ----------
    model : ExtremeClassifier
    train : MultiLabel
        On the CPU; batches are moved to the device of the model.
    recipe : ExtremeRecipe
        SET applies only to a fan-in output layer; a dense one is trained without.
    seed : int
        Seed of the order of points and of the connections that grow.
    resume : path-like, optional
        A file in which the run is saved after every epoch. If it exists, training continues from it, on a CPU with the
        same number of threads to the same result bit for bit.
    description : str or None
        Text of the progress bar; None for no bar.

    Returns
    -------
    list of float
        The mean loss of each epoch, in nats.

    Raises
    ------
    ValueError
        If the number of labels differs, there are fewer points than in a batch, SET would drop less than one
        connection, or the file to resume from is damaged or belongs to a run with other data, weights, recipe or seed.
    FloatingPointError
        If the loss of an epoch, or a weight at the end, is not finite.
    """
    if train.n_labels != model.head.out_features:
        raise ValueError(f"the points have {train.n_labels} labels: expected {model.head.out_features}, the number of "
                         "labels of the model")
    if len(train) < recipe.batch_size:
        raise ValueError(f"got {len(train)} points: expected at least a batch of {recipe.batch_size}")
    moves = isinstance(model.head, FanInLinear) and recipe.rewire_until > 0
    if moves and int(recipe.drop * model.head.fan_in) == 0:
        raise ValueError(f"drop is {recipe.drop} of a fan-in of {model.head.fan_in}: expected at least one "
                         "connection, or rewire_until 0")
    identity = _identity(model, train, recipe, seed) if resume else {}
    run, parameters = find_run(resume, identity), dict(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters(), recipe.lr, fused=True)  # without temporaries
    order, growth = (torch.Generator().manual_seed(int(seed)) for _ in range(2))
    steps_per_epoch = math.ceil(len(train) / recipe.batch_size)
    steps, done, losses = recipe.epochs * steps_per_epoch, 0, []
    shuffled = (batch for _ in range(recipe.epochs)
                for batch in torch.randperm(len(train), generator=order).split(recipe.batch_size))
    if run:
        model.load_state_dict(run.state)
        restore_optimizer(optimizer, parameters, run.optimizer)
        growth.set_state(run.generators["growth"])
        losses, done = run.losses, run.done
    total = 0.0
    # The same for a shorter last batch, because the layer caches a transposed copy of the indices of each chunk.
    chunk = _chunk(model.head.bias.device, recipe.batch_size)
    model.train()
    for chosen in progress(islice(shuffled, done, None), description, total=steps - done):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (1 + math.cos(math.pi * done / steps)) / 2
        loss = model.loss(train.subset(chosen), auxiliary_share(recipe, done / steps_per_epoch), chunk)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item() * len(chosen)
        done += 1
        if moves and done % recipe.rewire_every == 0 and done <= recipe.rewire_until * steps:
            model.head.rewire(*set_rows_step(model.head, recipe.drop, growth), optimizer)
        if done % steps_per_epoch == 0:
            losses.append(total / len(train))
            total = 0.0
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the training loss is {losses[-1]} in epoch {len(losses)}: try a smaller "
                                         f"learning rate than {recipe.lr}")
            if resume:
                save_run(resume, Run(model.state_dict(), {}, losses, optimizer_state(optimizer, parameters),
                                     torch.zeros(1), done, generators={"growth": growth.get_state()}), identity)
    for name, weight in parameters.items():
        if not weight.isfinite().all():
            raise FloatingPointError(f"{name!r} is not finite after the last step: try a smaller learning rate than "
                                     f"{recipe.lr}")
    return losses


def _identity(model, train, recipe, seed):
    """Return the settings that identify a run, in a form for JSON."""
    data = {f"data.{name}": value for name, value in describe(train).items()}
    return json.loads(json.dumps({**asdict(recipe), "seed": seed, **data,
                                  "initial weights": digest(model.state_dict())}, default=plain))


# ---- Prediction ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def top_labels(model, data, k=5, *, among=None, batch_size=1000, chunk=None):
    """Return the k labels with the highest logits for each point, computed in chunks of labels.

    Parameters
    ----------
    model : ExtremeClassifier
    data : MultiLabel
    k : int
    among : torch.Tensor, optional
        bool [n_labels]: labels to choose from; by default all.
    batch_size : int
        Points at a time.
    chunk : int, optional
        Labels at a time; by default a chunk has 2^18 logits, on a GPU 2^24.

    Returns
    -------
    torch.Tensor
        int64 [n, k], highest first.

    Raises
    ------
    ValueError
        If there are fewer than k labels to choose from, or a size is out of range.
    """
    head, n_labels = model.head, model.head.out_features
    for name, size in (("batch_size", batch_size), ("chunk", chunk)):
        if size is not None:
            check_integer(name, size, 1)
    if among is not None and (among.dtype != torch.bool or among.shape != (n_labels,)):
        raise ValueError(f"among is {among.dtype} {list(among.shape)}: expected bool [{n_labels}]")
    available = n_labels if among is None else int(among.sum())
    if not is_integer(k) or not 1 <= k <= available:
        raise ValueError(f"k is {k!r}: expected an integer from 1 to {available}, the labels to choose from")
    chunk = chunk or _chunk(head.bias.device, batch_size)
    ranked = torch.empty(len(data), k, dtype=torch.int64)
    for chosen in torch.arange(len(data)).split(batch_size):
        x = model.encode(data.subset(chosen).features)
        best = x.new_full((len(x), k), -math.inf)
        ids = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
        for start in range(0, n_labels, chunk):
            stop = min(start + chunk, n_labels)
            z = _logits(head, x, start, stop)
            if among is not None:
                z[:, ~among[start:stop].to(z.device)] = -math.inf
            best, place = torch.cat([best, z], 1).topk(k, 1)
            # Positions below k are those of the best labels so far.
            ids = torch.where(place < k, ids.gather(1, place.clamp(max=k - 1)), place - k + start)
        ranked[chosen] = ids.cpu()
    return ranked


def precision_at(ranked, data, ks=(1, 3, 5)):
    """Return the precision at k: the fraction of the first k labels that are correct, averaged over points.

    Parameters
    ----------
    ranked : torch.Tensor
        int64 [n, at least max(ks)], from :func:`top_labels`.
    data : MultiLabel
    ks : sequence of int

    Returns
    -------
    dict of int to float
        The sum is divided by k even if a point has fewer than k labels, as in the literature: see
        :func:`best_precision`.
    """
    if min(ks) < 1:
        raise ValueError(f"ks are {list(ks)}: expected integers of at least 1")
    if len(ranked) != len(data) or len(data) == 0 or ranked.shape[1] < max(ks):
        raise ValueError(f"ranked is {list(ranked.shape)}: expected [{len(data)}, at least {max(ks)}] and at least "
                         "one point")
    point, labels = data.pairs()
    rows = torch.arange(len(data))[:, None]
    hits = torch.isin(rows * data.n_labels + ranked, point * data.n_labels + labels)
    return {k: hits[:, :k].double().mean().item() for k in ks}


def best_precision(data, ks=(1, 3, 5)):
    """Return :func:`precision_at` of a perfect ranking, which is below 1 if points have fewer than k labels."""
    counts = data.offsets.diff()
    return {k: (counts.clamp(max=k).double().mean() / k).item() for k in ks}


def head_tail(train, share=0.2):
    """Return two groups of labels by their frequency in training, bool [n_labels] each: ``head``, the fraction
    ``share`` of the most frequent labels, and ``tail``, the rest. Of equally frequent labels, the lowest ids come
    first."""
    order = torch.argsort(train.frequencies, descending=True, stable=True)
    head = torch.zeros(train.n_labels, dtype=torch.bool)
    head[order[:math.ceil(share * train.n_labels)]] = True
    return {"head": head, "tail": ~head}


def precisions(model, data, groups, ks=(1, 3, 5)):
    """Return the precision at k over all labels, and within groups of labels.

    Within a group, a model ranks only the labels of the group, and only points with one of these labels count. This
    measures how well rare labels are distinguished from each other, independently of frequent labels. (The literature
    also uses the contribution of a group to the precision over all labels, which cannot exceed the group's fraction of
    positives.)

    Parameters
    ----------
    model : ExtremeClassifier
    data : MultiLabel
    groups : dict of str to torch.Tensor
        bool [n_labels] each; no name may be "all".
    ks : sequence of int

    Returns
    -------
    dict of str to dict of int to float
        By group and k; the first is "all".
    """
    found = {"all": precision_at(top_labels(model, data, max(ks)), data, ks)}
    for name, group in groups.items():
        part = within(data, group)
        found[name] = precision_at(top_labels(model, part, max(ks), among=group), part, ks)
    return found


def within(data, group):
    """Return the points that have labels of a group, bool [n_labels], with only these labels."""
    point, labels = data.pairs()
    kept = group[labels]
    counts = torch.bincount(point[kept], minlength=len(data))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return replace(data, offsets=offsets, labels=data.labels[kept]).subset(counts.nonzero()[:, 0])
