"""Layers with constant fan-in: each neuron has ``k`` weights, and only these are stored.

Lasby et al., "Dynamic Sparse Training with Structured Sparsity", ICLR 2024, call this form condensed. A mask that
multiplies weights by zero saves nothing; here weights, gradients and optimizer state are all [neurons, k].
"""

from numbers import Integral
from types import SimpleNamespace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from permask_core.runs.checks import check_integer
from permask_core.sparse import kernels
from permask_core.sparse.kernels import operator

CHUNK = 2 ** 20  # connections drawn or moved at a time, because there may be millions of rows


class _FanIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, layer):
        ctx.save_for_backward(x, values)
        ctx.layer, ctx.indices, ctx.version = layer, layer.indices, kernels.version(layer.indices)
        ctx.bias_type = None if bias is None else bias.dtype
        return layer._forward(x, values, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, values), indices = ctx.saved_tensors, ctx.indices
        if ctx.layer.indices is not indices or ctx.version != kernels.version(indices):
            raise RuntimeError("the layer was rewired between forward and backward, so gradients have no connections: "
                               "call backward() before rewire()")
        need_x, need_values, need_bias, _ = ctx.needs_input_grad
        dx = dvalues = None
        if need_x or need_values:
            dx, dvalues = ctx.layer._backward(grad.contiguous(), x, values, need_x, need_values)
        others = [axis for axis in range(grad.ndim) if axis != 1]
        return dx, dvalues, grad.sum(others, dtype=ctx.bias_type) if need_bias else None, None


class FanInLayer(nn.Module):
    """The common part of :class:`FanInLinear` and :class:`~permask_core.sparse.FanInConv2d`.

    Each active row of the dense weight, seen as a matrix, has the same number of entries, ``fan_in``, and only these
    are stored.

    The layer is called like the dense one but has no ``weight``: modules that read the weight of a layer instead of
    calling it cannot use it. (torch.nn.TransformerEncoderLayer does so in evaluation mode;
    :func:`~permask_core.sparse.condense` switches that off.)

    A state with a different number of active neurons or a different fan-in can be loaded. The layer then changes its
    shape, and the optimizer must be created again. The other sizes are not part of the state.

    Under ``torch.func`` (``vmap``, ``grad``, ...) and in programs from ``torch.export``, ``torch.onnx.export`` and
    ``torch.jit.trace``, the layer makes the dense weight in each call, which takes the memory and the time of a dense
    layer. Such a program needs only operations of torch, or of ONNX, and its file stores the connections and not the
    dense weight. Elsewhere only first-order gradients are supported. On a CPU, float16 and bfloat16 are stored as they
    are, and each call computes in float32. Not supported are gradients of ``torch.func`` within ``torch.compile``. On
    the meta device nothing is drawn, and a layer needs a state after ``to_empty``.

    Attributes
    ----------
    values : torch.nn.Parameter
        [n_active, fan_in]; drawn with variance 2 / fan_in (Evci et al., AAAI 2022).
    indices : torch.Tensor
        int32 [n_active, fan_in]: the input of each value, ascending in each row.
    rows : torch.Tensor
        int64 [n_active], ascending: the neurons with weights. All other neurons are ablated: their output is the bias,
        or 0 without a bias.
    bias : torch.nn.Parameter or None
        [out_features], initially 0.
    out_features, in_features : int
        Rows and columns of the dense weight: neurons, and inputs of each.
    weight_shape : torch.Size
        [out_features, ...], the shape of the dense weight.
    """

    DENSE: type  # the class of dense layers that compute the same
    SIZES: tuple[str, ...]  # arguments of that class, which are attributes of both
    groups = 1  # of neurons, each group with its own inputs

    def __init__(self, sizes, shape, fan_in, bias, *, indices=None, generator=None, device=None, dtype=None):
        self._describe(sizes, shape)
        if not isinstance(fan_in, Integral) or isinstance(fan_in, bool) or not 1 <= fan_in <= self.in_features:
            raise ValueError(f"fan_in is {fan_in!r}: expected an integer from 1 to in_features, {self.in_features}")
        empty, shape = torch.empty(0, device=device), (self.out_features, int(fan_in))
        device = empty.device
        if indices is not None:
            check_indices(indices, shape, self.in_features)
        elif empty.is_meta or type(empty) is FakeTensor:
            indices = torch.empty(shape, dtype=torch.int32, device=device)
        else:
            indices = sample_columns(shape[0], self.in_features, shape[1], generator=generator, device=device)
        drawn_on = device if generator is None else generator.device
        self.values = nn.Parameter(torch.empty(shape, device=drawn_on, dtype=dtype)
                                   .normal_(0, (2 / fan_in) ** 0.5, generator=generator).to(device))
        self.bias = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype)) if bias else None
        self.register_buffer("indices", indices.to(device, torch.int32).contiguous().sort(1).values)
        self.register_buffer("rows", torch.arange(shape[0], device=device))

    def _describe(self, sizes, shape):
        """Take the attributes ``SIZES`` of an object, such as a dense layer, and the shape of the dense weight."""
        super().__init__()
        for name in self.SIZES:
            setattr(self, name, getattr(sizes, name))
        self.weight_shape = torch.Size(shape)
        self.out_features, self.in_features = self.weight_shape[0], self.weight_shape[1:].numel()

    @property
    def fan_in(self):
        return self.indices.shape[1]

    @property
    def n_active(self):
        return self.indices.shape[0]

    def extra_repr(self):
        ablated = self.out_features - self.n_active
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.SIZES) + (
            f", fan_in={self.fan_in}, bias={self.bias is not None}" + f", ablated={ablated}" * bool(ablated))

    def _admitted(self, x, values):
        """Return an input in the type to compute with."""
        if x.device != values.device:
            if not isinstance(x, torch.Tensor):
                raise ValueError(f"the input is a {type(x).__name__}: expected a torch.Tensor")
            raise ValueError(f"the input is on {x.device}, the layer on {values.device}: expected one device")
        if torch._C._is_any_autocast_enabled() and not x.is_meta:  # it takes less time than to ask for a type of device
            kind = x.device.type
            if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
                return x.to(torch.get_autocast_dtype(kind))
        if x.dtype != values.dtype:
            raise ValueError(f"the input is {x.dtype}, the layer {values.dtype}: expected one type")
        return x

    def _outputs(self, sums, x, values, bias):
        """Return the outputs for a batch, given the function for active neurons."""
        if values.shape[0] == self.out_features:
            return sums(x, values, bias)
        bias = values.new_zeros(self.out_features) if bias is None else bias
        y = sums(x, values, bias[self.rows])
        sizes = y.shape[2:]
        return bias.to(y.dtype).view(-1, *[1] * len(sizes)).expand(len(y), -1, *sizes).index_copy(1, self.rows, y)

    def _sums(self, x, values, bias):
        trained = torch.is_grad_enabled() and (
            x.requires_grad or values.requires_grad or bias is not None and bias.requires_grad)
        return _FanIn.apply(x, values, bias, self) if trained else self._forward(x, values, bias)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, dense, mask):
        """Return the layer that computes the same function as a dense layer under a mask.

        Parameters
        ----------
        dense : torch.nn.Linear or torch.nn.Conv2d
            Not changed; the new layer has the same device and type.
        mask : torch.Tensor
            bool, in the shape of the weight, with the same number of True in each row (output channel) that has any.
            Rows without True are ablated.

        Raises
        ------
        ValueError
            If ``dense`` has another type, or the mask does not fit or has no constant fan-in; the message has the first
            row that differs.

        Examples
        --------
        >>> linear, x = nn.Linear(4, 2, bias=False), torch.ones(1, 4)
        >>> layer = FanInLinear.from_dense(linear, torch.tensor([[True, True, False, False], [False] * 4]))
        >>> torch.allclose(layer(x)[0, 0], linear.weight[0, :2].sum()), layer(x)[0, 1].item()  # the second is ablated
        (True, 0.0)
        """
        if not isinstance(dense, cls.DENSE):
            raise ValueError(f"got a {type(dense).__name__}: expected a torch.nn.{cls.DENSE.__name__}")
        rows, indices = find_connections(mask, dense.weight.shape)
        layer, weight = cls.__new__(cls), dense.weight.detach().flatten(1)
        layer._describe(dense, dense.weight.shape)
        rows, indices = rows.to(weight.device), indices.to(weight.device)
        layer.values = nn.Parameter(weight[rows].gather(1, indices), dense.weight.requires_grad)
        layer.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().clone(), dense.bias.requires_grad)
        layer.register_buffer("indices", indices.int())
        layer.register_buffer("rows", rows)
        return layer.train(dense.training)

    @torch.no_grad()
    def to_dense(self):
        """Return the dense layer that computes the same function, with zeros where there is no connection."""
        sizes = {name: getattr(self, name) for name in self.SIZES}
        dense = nn.utils.skip_init(self.DENSE, **sizes, bias=self.bias is not None, device=self.values.device,
                                   dtype=self.values.dtype)
        dense.weight.copy_(self._spread(self.values))
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def mask(self):
        """Return the positions of the connections, bool in the shape of the dense weight, whatever their values."""
        return self._spread(torch.ones_like(self.indices, dtype=torch.bool))

    def _spread(self, values):
        whole = values.new_zeros(self.out_features, self.in_features)
        return whole.index_put((self.rows[:, None], self.indices.long()), values).view(self.weight_shape)

    def columns(self):
        """Return ``indices`` counted over the inputs of all groups, int32 [n_active, fan_in]."""
        if self.groups == 1:
            return self.indices
        first = self.rows // (self.out_features // self.groups) * self.in_features
        return kernels.remember(self.indices, "columns", lambda: self.indices + first[:, None].int())

    def transpose(self, start=0, stop=None):
        """Return the :class:`~permask_core.sparse.kernels.Transpose` of the active rows from ``start`` to ``stop``,
        cached until the indices change."""
        return kernels.remember(self.indices, (start, stop), lambda: kernels.transpose(
            self.columns()[start:stop], self.in_features * self.groups))

    def _apply(self, fn, recurse=True):
        empty = self.indices.is_meta
        super()._apply(fn, recurse)
        if empty and not self.indices.is_meta:  # after to_empty they would be any numbers, but are used as addresses
            self.indices.zero_(), self.rows.zero_()
        return self

    @torch.no_grad()
    def rewire(self, keep, grow, optimizer=None):
        """Move connections: drop those that are not kept, and add new connections with the value 0.

        Afterwards every neuron must have no connection, which ablates it, or the same number as all active neurons. The
        number of active neurons and the fan-in may change.

        Parameters
        ----------
        keep : torch.Tensor
            bool [n_active, fan_in]: which connections are kept.
        grow : torch.Tensor
            Integers [m, 2]: neuron and input of each new connection, in the form of ``torch.nonzero``.
        optimizer : torch.optim.Optimizer, optional
            Its state for ``values``, which must have the same shape as in SGD and Adam, is moved too: it does not
            change for kept connections and is 0 for new ones.

        Raises
        ------
        ValueError
            If a shape or index does not fit, a connection would be duplicated, neurons would differ in fan-in, or the
            optimizer's state has a different shape; the layer and the optimizer are then unchanged.

        Examples
        --------
        >>> layer = FanInLinear(4, 2, fan_in=1, indices=torch.tensor([[0], [3]]))
        >>> layer.rewire(torch.tensor([[True], [False]]), torch.tensor([[1, 2]]))
        >>> layer.indices.tolist(), layer.values[1].item()
        ([[0], [2]], 0.0)
        """
        for name, given in (("keep", keep), ("grow", grow)):
            if not isinstance(given, torch.Tensor):
                raise ValueError(f"{name} is a {type(given).__name__}: expected a torch.Tensor")
        state = {} if optimizer is None else optimizer.state.get(self.values, {})
        for name, given in state.items():
            if isinstance(given, torch.Tensor) and given.ndim and given.shape != self.values.shape:
                raise ValueError(f"the optimizer has {name!r} of shape {list(given.shape)} for values "
                                 f"{list(self.values.shape)}: expected the same shape, as in SGD and Adam")
        if grow.is_floating_point() or grow.dtype == torch.bool:
            raise ValueError(f"grow is {grow.dtype}: expected integers")
        grow = grow.to(self.indices.device, torch.int64)
        if keep.dtype != torch.bool or keep.shape != self.indices.shape:
            raise ValueError(f"keep is {keep.dtype} {list(keep.shape)}: expected bool {list(self.indices.shape)}")
        if grow.ndim != 2 or grow.shape[1] != 2:
            raise ValueError(f"grow has shape {list(grow.shape)}: expected [connections, 2]")
        sizes = grow.new_tensor([self.out_features, self.in_features])
        outside = ((grow < 0) | (grow >= sizes)).any(1)
        if outside.any():
            raise ValueError(f"grow has the connection {grow[outside][0].tolist()}: expected a neuron below "
                             f"{self.out_features} and an input below {self.in_features}")
        keep, grow = keep.to(grow.device), grow[torch.sort(grow[:, 0], stable=True).indices]
        counts = torch.bincount(grow[:, 0], minlength=self.out_features)
        counts[self.rows] += keep.sum(1)
        rows = counts.nonzero()[:, 0]
        if not len(rows):
            raise ValueError("no connection is left: expected at least one neuron with connections")
        fan_in = int(counts[rows[0]])
        odd = rows[counts[rows] != fan_in]
        if len(odd):
            raise ValueError(f"neuron {odd[0]} would have {counts[odd[0]]} connections and neuron {rows[0]} {fan_in}: "
                             "expected the same number, or none")
        kernels.forget(self.indices)
        indices, source = self._rewired(keep, grow, rows, fan_in)

        self.values.grad = None

        def moved(tensor):
            new = tensor.new_empty(source.shape)
            for old, part in zip(source.split(max(1, CHUNK // fan_in)), new.split(max(1, CHUNK // fan_in))):
                part.copy_(tensor.flatten()[old.clamp(min=0)]).masked_fill_(old < 0, 0)
            return new

        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor) and tensor.ndim:
                state[name] = moved(tensor)
        self._resized(moved(self.values.data))
        self.indices, self.rows = indices, rows

    def _resized(self, values):
        # If the graph of an earlier step still exists, autograd checks gradients against the shape in that graph,
        # unless the type changes in between.
        self.values.data = values.new_empty(0, dtype=torch.float16 if values.dtype != torch.float16 else torch.float32)
        self.values.data, self.values.grad = values, None

    def _rewired(self, keep, grow, rows, fan_in):
        """Return the new indices, and for each new slot its old slot or -1; both [rows, fan_in]."""
        indices = torch.empty(len(rows), fan_in, dtype=torch.int32, device=rows.device)
        source = torch.empty(len(rows), fan_in, dtype=torch.int64, device=rows.device)
        done, step = 0, max(1, CHUNK // fan_in)
        for start in range(0, self.out_features, step):
            a, b = torch.searchsorted(self.rows, self.rows.new_tensor([start, start + step])).tolist()
            slots = keep[a:b].flatten().nonzero()[:, 0] + a * self.fan_in
            c, d = torch.searchsorted(grow[:, 0].contiguous(), grow.new_tensor([start, start + step])).tolist()
            neurons = torch.cat([self.rows[slots // self.fan_in], grow[c:d, 0]])
            keys = neurons * self.in_features + torch.cat([self.indices.flatten()[slots], grow[c:d, 1]])
            keys, order = keys.sort()
            twice = keys[1:][keys[1:] == keys[:-1]]
            if len(twice):
                neuron, column = divmod(int(twice[0]), self.in_features)
                raise ValueError(f"neuron {neuron} would have input {column} twice: expected grow to have only "
                                 "connections that are not kept")
            here = slice(done, done + len(keys) // fan_in)
            indices[here] = (keys % self.in_features).view(-1, fan_in)
            source[here] = torch.cat([slots, slots.new_full((d - c,), -1)])[order].view(-1, fan_in)
            done = here.stop
        return indices, source

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        names = ["values", "indices", "rows"] + ["bias"] * (self.bias is not None)
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        if absent:  # an incomplete state does not change the layer
            missing += absent
            return
        values, indices, rows = (state_dict[prefix + name] for name in names[:3])
        try:
            check_indices(indices, values.shape, self.in_features)
            if (indices[:, 1:] <= indices[:, :-1]).any():
                raise ValueError("indices do not ascend in every row")
            if rows.is_floating_point() or rows.shape != values.shape[:1] or rows.min() < 0 or (
                    rows.max() >= self.out_features) or (rows[1:] <= rows[:-1]).any():
                raise ValueError(f"rows is {rows.dtype} {list(rows.shape)}: expected {len(values)} ascending integers "
                                 f"below {self.out_features}")
            if self.bias is not None and state_dict[prefix + "bias"].shape != self.bias.shape:
                raise ValueError(f"bias has shape {list(state_dict[prefix + 'bias'].shape)}: expected "
                                 f"{list(self.bias.shape)}")
        except ValueError as error:
            errors.append(f"{prefix or 'the layer'}: {error}")
            return
        if values.shape != self.values.shape:
            self._resized(self.values.data.new_empty(values.shape))
            self.indices, self.rows = self.indices.new_empty(indices.shape), self.rows.new_empty(rows.shape)
        kernels.forget(self.indices)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        # With assign=True they are the tensors of the state, which may have any layout.
        self.values.data = self.values.data.contiguous()
        self.indices, self.rows = self.indices.int().contiguous(), self.rows.long().contiguous()


class FanInLinear(FanInLayer):
    """``y = x W^T + bias``, where each active row of W has the same number of weights, ``fan_in``.

    It is called like torch.nn.Linear; :class:`FanInLayer` has its attributes, methods and limits.

    Parameters
    ----------
    in_features, out_features : int
    fan_in : int
        Number of weights of each neuron, from 1 to ``in_features``.
    bias : bool
    indices : torch.Tensor, optional
        Connections, integers [out_features, fan_in]. By default they are drawn at random.
    generator : torch.Generator, optional
        Generator for the values and the connections, which are uniform without replacement in each row.
    device, dtype
        Device and type of the values and the bias.

    Raises
    ------
    ValueError
        If ``fan_in``, a size or an index is out of range, or an index is repeated in its row; when called, if the last
        axis of the input is not ``in_features``, or its device or type is not that of the values.

    References
    ----------
    Lasby et al., ICLR 2024.

    Examples
    --------
    >>> layer = FanInLinear(100, 20, fan_in=5)
    >>> layer(torch.randn(8, 100)).shape, sum(parameter.numel() for parameter in layer.parameters())
    (torch.Size([8, 20]), 120)
    >>> int(layer.mask().sum()), int(layer.to_dense().weight.count_nonzero())
    (100, 100)
    """

    DENSE, SIZES = nn.Linear, ("in_features", "out_features")

    def __init__(self, in_features, out_features, fan_in, bias=True, **given):
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            check_integer(name, size, 1)
        sizes = SimpleNamespace(in_features=int(in_features), out_features=int(out_features))
        super().__init__(sizes, (sizes.out_features, sizes.in_features), fan_in, bias, **given)

    def forward(self, x):
        """Map [..., in_features] to [..., out_features]."""
        values, bias, sums = self.values, self.bias, self._sums  # once: each read takes time in nn.Module
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"the input has shape {list(x.shape)}: expected a last axis of {self.in_features}")
        x = self._admitted(x, values)
        if is_traced(x):
            if is_transformed():
                return F.linear(x, self._spread(values), bias)
            sums = self._operator
        flat = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        y = self._outputs(sums, flat, values, bias)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features)

    def _operator(self, x, values, bias):
        return operator.fan_in(x, values, self.indices, bias)

    def _forward(self, x, values, bias):
        return kernels.forward(x, values, self.indices, bias)

    def _backward(self, grad, x, values, need_x, need_values):
        return kernels.backward(grad, x, values, self.indices, self.transpose(), need_x=need_x, need_values=need_values)

    def dense_gradient(self, grad, x, start, stop):
        """Return the gradient of rows ``start`` to ``stop`` of the dense weight, [stop - start, in_features], for an
        input and the gradient of its output."""
        return grad.reshape(-1, self.out_features)[:, start:stop].T @ x.reshape(-1, self.in_features)


def is_transformed():
    """Whether the code runs under ``torch.func`` or is exported, so that it needs plain torch operations."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None


def is_traced(x):
    """Whether a call with ``x`` is compiled, transformed or exported, or ``x`` has a shape but no numbers."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.is_meta or \
        type(x) is FakeTensor or torch._C._get_tracing_state() is not None


def check_indices(indices, shape, in_features):
    """Raise ValueError unless ``indices`` are integers of this shape [n, k], at least one, in range, and without
    duplicates in a row."""
    if indices.is_floating_point() or indices.dtype == torch.bool or len(shape) != 2 or indices.shape != shape or \
            indices.numel() == 0:
        raise ValueError(f"indices are {indices.dtype} {list(indices.shape)}: expected integers {list(shape)}")
    indices = indices.long()  # a narrower type may not hold in_features
    outside = indices[(indices < 0) | (indices >= in_features)]
    if len(outside):
        raise ValueError(f"indices hold {outside[0]}: expected 0 to {in_features - 1}")
    ordered = indices.sort(1).values
    row, place = (ordered[:, 1:] == ordered[:, :-1]).nonzero(as_tuple=True)
    if len(row):
        raise ValueError(f"indices have {ordered[row[0], place[0]]} twice in row {row[0]}: expected each input once")


def find_connections(mask, shape):
    """Return the rows of a mask [out, ...] that have connections, int64 [n], and their columns, int64 [n, k].

    Raises
    ------
    ValueError
        If the mask is not bool of this shape, is empty, or has no constant fan-in.
    """
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"the mask is {got}: expected bool {list(shape)}")
    mask = mask.flatten(1)
    counts = mask.sum(1)
    rows = counts.nonzero()[:, 0]
    if not len(rows):
        raise ValueError("the mask keeps nothing: expected at least one row with connections")
    odd = rows[counts[rows] != counts[rows[0]]]
    if len(odd):
        raise ValueError(
            f"row {odd[0]} of the mask has {counts[odd[0]]} connections, row {rows[0]} {counts[rows[0]]}: expected a "
            "constant fan-in. Train with such masks (permask_core.sparse.dynamic, method 'srigl'), or apply the mask "
            "to a dense layer (permask_core.masks.apply_masks)")
    return rows, mask.nonzero()[:, 1].view(len(rows), -1)


def sample_columns(n, in_features, count, *, taken=None, generator=None, device=None):
    """Draw columns for each of n rows, uniformly and without replacement.

    Parameters
    ----------
    n, in_features, count : int
        Rows, columns to choose from, columns of each row.
    taken : torch.Tensor, optional
        Columns that are not drawn, integers [n, k] without duplicates in a row.
    generator : torch.Generator, optional
    device : torch.device, optional
        Device of the result.

    Returns
    -------
    torch.Tensor
        int32 [n, count], ascending in each row.

    Raises
    ------
    ValueError
        If a row has fewer than ``count`` columns to choose from, or ``taken`` has a different number of rows.

    Examples
    --------
    >>> sample_columns(2, 4, 3, taken=torch.tensor([[1], [3]]))  # there is only one choice
    tensor([[0, 2, 3],
            [0, 1, 2]], dtype=torch.int32)
    """
    if taken is None:
        taken = torch.empty(n, 0, dtype=torch.int64)
    if taken.ndim != 2 or len(taken) != n:
        raise ValueError(f"taken has shape {list(taken.shape)}: expected [{n}, k]")
    free = in_features - taken.shape[1]
    if not isinstance(count, Integral) or isinstance(count, bool) or not 0 <= count <= free:
        raise ValueError(f"count is {count!r}: expected 0 to {free}, the columns that are not taken")
    drawn_on = (device or "cpu") if generator is None else generator.device
    # With many columns duplicates are rare, and redrawing them needs no array of [n, in_features].
    few = 4 * (taken.shape[1] + count) <= in_features
    sample, width = (_redrawn, taken.shape[1] + count) if few else (_largest, in_features)
    chosen = torch.empty(n, count, dtype=torch.int32, device=drawn_on)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, n, step):
        part = taken[start:start + step].to(drawn_on, torch.int64)
        chosen[start:start + step] = sample(part, in_features, count, generator)
    return chosen.to(device) if device is not None else chosen


def _redrawn(taken, in_features, count, generator):
    # Column and, in the last bit, whether it was drawn: of equal columns the drawn one is last, and is drawn again.
    def draw(*shape):
        return 2 * torch.randint(in_features, shape, generator=generator, device=taken.device) + 1

    keys = torch.cat([2 * taken, draw(len(taken), count)], 1).sort(1).values
    again = torch.arange(len(keys), device=taken.device)
    while len(again):
        part = keys[again]
        twice = torch.zeros_like(part, dtype=torch.bool)
        twice[:, 1:] = part[:, 1:] // 2 == part[:, :-1] // 2
        part[twice] = draw(int(twice.sum()))
        keys[again] = part.sort(1).values
        again = again[twice.any(1)]
    return (keys[keys % 2 == 1] // 2).view(len(taken), count)


def _largest(taken, in_features, count, generator):
    scores = torch.rand(len(taken), in_features, generator=generator, device=taken.device).scatter_(1, taken, -1)
    return scores.topk(count, 1).indices.sort(1).values
