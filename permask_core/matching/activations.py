"""Activation matching: find units that respond similarly to the same inputs.

Li et al., "Convergent Learning: Do Different Neural Networks Learn the Same Representations?", 2015; Jordan et al.,
"REPAIR", ICLR 2023. A permutation preserves the function, so the activations of a layer do not depend on the order of
units in the layers below: one pass over the data is enough for all groups. Only moments are accumulated, in float64 on
the device of the target.
"""

from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from permask_core.data.batches import batches_of, call, to_device
from permask_core.matching.groups import check_groups, indices
from permask_core.matching.nested import families, inside, match_units, parts_of
from permask_core.models import device_of, evaluation_mode


def match_activations(groups, source_model, target_model, batches):
    """Return permutations that move the source onto the target, by the correlation of activations.

    Parameters and errors are those of :func:`activation_correlations`. The assignment maximises the sum of correlations
    in each group. Units with parts in groups of their own, such as attention heads, need no taps: the similarity of two
    such units is that of their parts under the best assignment.

    Returns
    -------
    dict of str to torch.Tensor
        Permutations for :func:`permask_core.matching.permute`.
    """
    parts = parts_of(groups)
    whole = [[name] for name, group in groups.items() if group.within is None]
    pairs = [pair for names in whole for family in families(parts, names) if family[0] not in parts
             for pair in product(family, repeat=2)]
    correlations = _correlations(groups, source_model, target_model, batches, pairs)

    def similarities(names):
        if inner := inside(parts, names):
            u, n = len(names), groups[names[0]].size
            return sum(similarities(part).diagonal(dim1=2, dim2=3).sum(2).view(u, n, u, n).transpose(1, 2)
                       for part in inner)
        return torch.stack([torch.stack([correlations[to, origin] for origin in names]) for to in names])

    steps = {at: order for names in whole for at, order in match_units(parts, similarities, names).steps()}
    return {name: steps.get(name, torch.arange(group.size)) for name, group in groups.items()}


def activation_correlations(groups, source_model, target_model, batches):
    """Return the Pearson correlation of every target unit with every source unit, in one pass for all groups.

    Parameters
    ----------
    groups : dict of str to Group
        Groups with taps, which say where the activations of a group are read.
    source_model, target_model : torch.nn.Module
        Run in evaluation mode on their own devices; their modes are restored.
    batches : Split, torch.Tensor, tuple of torch.Tensor, or iterable of batches
        Data for :func:`permask_core.data.batches.batches_of`; both models get the same inputs, in one pass. The
        activations of the source for one batch are held in memory while the target processes it.

    Returns
    -------
    dict of str to torch.Tensor
        float64 [target units, source units], summed over the taps of a group. Samples are inputs and, in a feature map,
        positions. The correlation of a constant unit is set to 0; that of complex numbers is its real part.

    Raises
    ------
    ValueError
        If there are no groups or one has no taps, the groups do not fit a model, there are no batches, or an activation
        is not finite.
    """
    correlations = _correlations(groups, source_model, target_model, batches, [(name, name) for name in groups])
    return {name: correlation for (name, _), correlation in correlations.items()}


def _correlations(groups, source_model, target_model, batches, pairs):
    """Return correlations by (group in the target, group in the source), for pairs of groups with the same layout."""
    if not groups:
        raise ValueError("there are no groups: expected at least one whose activations can be read")
    for model in (source_model, target_model):
        check_groups(groups, model.state_dict(), whole=True)
    origins, moments, kept, seen = {}, {}, {}, Counter()
    for to, origin in pairs:
        if not groups[to].taps:
            raise ValueError(f"group {to!r} has no taps, so its activations cannot be read. Exclude such groups: "
                             "{name: group for name, group in groups.items() if group.taps}")
        origins.setdefault(to, []).append(origin)

    def keep(key, units):
        kept.setdefault(key, []).append(units.clone())  # a copy, because a later ReLU may be in place

    def compare(key, units):
        (name, tap), call = key, seen[key]
        seen[key] += 1  # a module may be called more than once
        x = samples(units)
        for origin in origins[name]:
            moments.setdefault((name, origin, tap), _Moments()).add(x, samples(kept[origin, tap][call]).to(x), name)

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(source_model, target_model))
        for model, names, read in ((source_model, {origin for _, origin in pairs}, keep),
                                   (target_model, origins, compare)):
            stack.enter_context(_tapped(model, {name: groups[name] for name in names}, read))
        devices = device_of(source_model), device_of(target_model)
        for inputs, _ in batches_of(batches):
            kept.clear(), seen.clear()
            for model, device in zip((source_model, target_model), devices):
                call(model, to_device(inputs, device))
    correlations = {}
    for to, origin in pairs:
        for i, tap in enumerate(groups[to].taps):
            if (to, origin, i) not in moments:
                raise ValueError(f"group {to!r} is read at the {tap.side} of {tap.module!r}, which the model does not "
                                 "call: remove the tap or the group")
            correlation = moments[to, origin, i].correlation()
            if not correlation.isfinite().all():
                raise ValueError(f"activations of group {to!r} (tap {i}) are not finite: expected finite numbers")
            correlations[to, origin] = correlations.get((to, origin), 0) + correlation
    return correlations


@contextmanager
def _tapped(model, groups, read):
    """Inside the block, call ``read((group name, tap number), activation with the units on axis 0)`` at each tap."""
    handles, products, fast = [], defaultdict(list), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path computes all products in one operation
        for name, group in groups.items():
            for i, tap in enumerate(group.taps):
                handles += _hook(model, name, group.size, tap, partial(read, (name, i)), products)
        with _Products(products) if products else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


class _Products(TorchDispatchMode):
    """Calls functions of (input, output, first row, number of rows) at each product with some parameters, {memory of a
    parameter: [(parameter, function)]}."""

    def __init__(self, products):
        super().__init__()
        self.products = products

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in PRODUCTS:
            x, weight = args[PRODUCTS[function]:][:2]
            for parameter, read in self.products.get(_memory(weight), ()):
                offset = weight.storage_offset() - parameter.storage_offset()
                if 0 <= offset < parameter.numel() and offset + weight.numel() <= parameter.numel():
                    row = max(1, parameter[0].numel())
                    read(x, output, offset // row, weight.numel() // row)
        return output


PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.convolution.default: 0}


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


def _hook(model, name, size, tap, read, products):
    """Return handles of hooks, or add a function to ``products``."""
    place = f"group {name!r} is read at the {tap.side} of {tap.module!r}"
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    if tap.module not in modules and tap.module not in parameters:
        raise ValueError(f"{place}, which is not a module of the model")
    if tap.side not in ("input", "output"):
        raise ValueError(f"{place}: expected its input or output")
    positions = indices(tap, size)
    expected = f"{size} indices" if tap.positions is None else f"more than {int(positions.max())} indices"

    def keep(value):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{place}, which is of type {type(value).__name__}: expected a tensor")
        length = value.shape[tap.axis] if -value.ndim <= tap.axis < value.ndim else 0
        if length <= int(positions.max()) or tap.positions is None and length != size:
            raise ValueError(f"{place}, whose shape is {list(value.shape)}: expected {expected} along axis {tap.axis}")
        units = value.movedim(tap.axis, 0)
        read(units if tap.positions is None else units[positions.to(value.device)])

    def keep_product(x, output, start, rows):
        if tap.side == "input":
            return keep(x)
        missing = output.shape[tap.axis] != rows  # of a parameter whose outputs are columns, all are there
        if missing or start == 0 and int(positions.max()) < rows:
            return keep(output)
        if start <= int(positions.min()) and int(positions.max()) < start + rows:
            read(output.movedim(tap.axis, 0)[(positions - start).to(output.device)])

    if tap.module in parameters:
        parameter = parameters[tap.module]
        products[_memory(parameter)].append((parameter, keep_product))
        return []
    if tap.side == "input":
        return [modules[tap.module].register_forward_pre_hook(lambda _, given: keep(given[0] if given else None))]
    return [modules[tap.module].register_forward_hook(lambda _, given, output: keep(output))]


def samples(units):
    """Return [units, samples] in float64 or complex128."""
    return units.unsqueeze(-1).flatten(1).to(torch.complex128 if units.is_complex() else torch.float64)


class _Moments:
    """Streaming first and second moments of two sets of units, relative to the means of the first batch for
    precision."""

    def __init__(self):
        self.n, self.shift = 0, None
        self.x = self.y = self.xx = self.yy = self.xy = 0

    def add(self, x, y, name):
        if x.shape != y.shape:
            raise ValueError(f"activations of group {name!r} have shape {list(y.shape)} in the source and "
                             f"{list(x.shape)} in the target")
        if self.shift is None:
            self.shift = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self.shift[0], y - self.shift[1]
        self.n += x.shape[1]
        self.x, self.y = self.x + x.sum(1), self.y + y.sum(1)
        self.xx, self.yy = self.xx + x.abs().square().sum(1), self.yy + y.abs().square().sum(1)
        self.xy = self.xy + x @ y.mH

    def correlation(self):
        cov = (self.xy / self.n - torch.outer(self.x, self.y.conj()) / self.n**2).real
        sd_x, sd_y = ((s2 / self.n - (s / self.n).abs() ** 2).clamp(min=0).sqrt()
                      for s, s2 in ((self.x, self.xx), (self.y, self.yy)))
        # The variance of a constant unit is only rounding. NaN and infinity are kept, so that the caller can raise.
        dead_x, dead_y = (sd <= 1e-12 * shift[:, 0].abs() for sd, shift in zip((sd_x, sd_y), self.shift))
        dead = (dead_x[:, None] | dead_y) & cov.isfinite()
        return torch.where(dead, torch.zeros_like(cov), cov / torch.outer(sd_x, sd_y)).cpu()
