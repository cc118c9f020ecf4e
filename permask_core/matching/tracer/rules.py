"""Rules: the effect of each PyTorch operation on the values of its arguments.

A rule is called with the tracer (``net``), the shape of the result (None if there are several results) and the
arguments by their names in the operation's schema, with ``self`` and ``shape`` renamed to ``self_`` and ``shape_``. It
returns the value of the result, and raises NoRule for a form that it does not cover.
"""

import math
import operator

import numpy as np
import torch

from permask_core.matching.tracer.values import Bundle, NoRule, value_of

KERNEL = "they are positions in a kernel"


def same(net, shape, **given):
    """An operation that computes nothing."""
    return net.value(given.get("self_", given.get("input")))


def pointwise(net, shape, **given):
    """An elementwise operation on all of its tensors."""
    if shape is None:
        raise NoRule
    return net.pointwise(shape, *net._tensors(given.values()))


def _view(net, shape, **given):
    return net.view(same(net, shape, **given), shape)


def _permute(net, shape, self_, dims):
    value = net.value(self_)
    places = {a % len(shape): i for i, a in enumerate(dims)}
    return value.placed([places[a] for a in range(len(shape))], shape)


def _transpose(net, shape, self_, **dims):
    one, two = dims.values() if dims else (0, 1)
    order = list(range(len(shape)))
    if len(order) > 1:
        order[one], order[two] = order[two], order[one]
    return _permute(net, shape, self_, order)


def _expand(net, shape, self_, **_):
    return net.pointwise(shape, net.value(self_))


def _broadcast(net, shape, tensors):
    return [net.pointwise(result.shape, net.value(t)) for t, result in zip(tensors, net.node.meta["val"])]


def _repeat(net, shape, self_, repeats=None, dims=None):
    repeats = repeats if dims is None else [1] * (len(shape) - len(dims)) + list(dims)
    value = net.view(v := net.value(self_), (1,) * (len(shape) - len(v.shape)) + v.shape)
    for axis, count in enumerate(repeats):
        if count > 1 and axis not in value.uniform:
            value = net.concatenate([value] * count, axis)
    return value._replace(shape=tuple(shape))


def _repeat_interleave(net, shape, self_=None, repeats=None, dim=None, **_):
    if self_ is None or dim is None or not isinstance(repeats, int):
        raise NoRule
    return _interleaved(net, net.value(self_), repeats, dim)


def _interleaved(net, value, repeats, dim):
    dim %= len(value.shape)
    before, (n, *after) = value.shape[:dim], value.shape[dim:]
    repeated = net.pointwise([*before, n, repeats, *after], net.view(value, [*before, n, 1, *after]))
    return net.view(repeated, [*before, n * repeats, *after])


def _select(net, shape, self_, dim, index):
    return net.select(net.value(self_), dim, index)


def _slice(net, shape, self_, dim=0, start=None, end=None, step=1):
    value = net.value(self_)
    return net.take(value, dim, range(value.shape[dim])[start:end:step])


def _split(net, shape, self_, split_size=None, split_sizes=None, dim=0):
    value = net.value(self_)
    n, size = value.shape[dim], split_size if split_size is not None else split_sizes
    starts = list(range(0, n, size)) if isinstance(size, int) else [sum(size[:i]) for i in range(len(size))]
    return [net.take(value, dim, range(a, b), i) for i, (a, b) in enumerate(zip(starts, [*starts[1:], n]))]


def _chunk(net, shape, self_, chunks, dim=0):
    return _split(net, shape, self_, -(-net.value(self_).shape[dim] // chunks), dim=dim)


def _unbind(net, shape, self_, dim=0):
    return _parts(net, net.value(self_), dim)


def _parts(net, value, dim):
    return [net.select(value, dim, i) for i in range(value.shape[dim])]


def _cat(net, shape, tensors, dim=0):
    return net.concatenate([net.value(t) for t in tensors], dim, tensors)


def _stack(net, shape, tensors, dim=0):
    return _stacked(net, [net.value(t) for t in tensors], dim % len(shape))


def _stacked(net, values, dim=0):
    one = [*values[0].shape[:dim], 1, *values[0].shape[dim:]]
    return net.concatenate([net.view(value, one) for value in values], dim)


def _slice_scatter(net, shape, self_, src, dim=0, start=None, end=None, step=1):
    if step != 1:
        raise NoRule
    return _replaced(net, net.value(self_), net.value(src), dim, *slice(start, end).indices(shape[dim])[:2])


def _select_scatter(net, shape, self_, src, dim, index):
    dim, index = dim % len(shape), index % shape[dim]
    one = net.view(net.value(src), [1 if a == dim else n for a, n in enumerate(shape)])
    return _replaced(net, net.value(self_), one, dim, index, index + 1)


def _replaced(net, value, part, dim, start, stop):
    """Return a value with another one at the indices from ``start`` to ``stop`` along an axis."""
    before, after = (net.take(value, dim, range(*rest), i) if len(range(*rest)) else None
                     for i, rest in enumerate(((0, start), (stop, value.shape[dim]))))
    return net.concatenate([value for value in (before, part, after) if value is not None], dim)


def _pad(net, shape, self_, pad, mode="constant", value=None, **_):
    result = net.value(self_)
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2])):
        axis = len(shape) - 1 - i
        if before == after == 0:
            continue
        if mode != "constant" or before < 0 or after < 0:
            result = net.ordered(result, [axis])
            result = result._replace(shape=tuple(shape[a] if a == axis else n for a, n in enumerate(result.shape)))
            continue
        sides = [value_of([n if a == axis else m for a, m in enumerate(result.shape)], (), range(len(shape)), net.at)
                 for n in (before, after)]
        parts = [(part, name) for part, name in zip((sides[0], result, sides[1]), ("pad", "net", "pad"))
                 if part.shape[axis]]
        result = net.concatenate([part for part, _ in parts], axis, [name for _, name in parts])
    return result


def _order_matters(net, shape, self_, dims=None, dim=None, **_):
    value, axes = net.value(self_), dims if dims is not None else dim
    axes = [axes] if isinstance(axes, int) else axes
    return net.ordered(value, axes or range(len(value.shape)))


def _sort(net, shape, self_, dim=-1, **_):
    """An operation that puts the indices along an axis into another order, or selects some of them."""
    value, results = net.value(self_), net.node.meta["val"]
    one = tuple(shape or results[0].shape)
    value = net.ordered(value, [dim])._replace(shape=one).fixed([dim % len(one)], net.why_ordered())
    return value if shape is not None else (value,) * len(results)


def _position(net, shape, self_, dim=None, keepdim=False, **_):
    """The position of an element along an axis."""
    value = net.value(self_)
    axes = range(len(value.shape)) if dim is None else [dim]
    return net.reduce(net.ordered(value, axes), axes, keepdim)


def _index(net, shape, self_, indices):
    chosen = [axis for axis, index in enumerate(indices) if index is not None]
    net.fix(found := [net.value(indices[axis]) for axis in chosen], net.why_ordered())
    value, rank = net.ordered(net.value(self_), chosen), max(len(index.shape) for index in found)
    start = chosen[0] if chosen[-1] - chosen[0] < len(chosen) else 0  # the axes of the index come first if it has gaps
    new = range(start, start + rank)
    kept = iter(axis for axis in range(len(shape)) if axis not in new)
    places = {axis: next(kept) for axis in range(len(value.shape)) if axis not in chosen}
    bundles = [bundle.placed(places) for bundle in value.bundles]
    return value_of(shape, bundles, {places[a] for a in value.uniform if a in places},
                    dict.fromkeys(new, value.why[chosen[0]])
                    | {places[a]: why for a, why in value.why.items() if a in places})


def _gather(net, shape, self_, dim, index, **_):
    return _along_others(net, shape, dim, None, net.value(self_), net.value(index))


def _take_along(net, shape, self_, indices, dim):
    index = net.value(indices)
    return _along_others(net, shape, dim, None, net.value(self_), net.pointwise(
        [n if a == dim % len(shape) else m for a, (n, m) in enumerate(zip(index.shape, shape))], index))


def _scatter(net, shape, self_, dim, index, src=None, source=None, value=None, **_):
    values = [v for node in (src, source) if (v := net.value(node))]
    index = net.value(index)
    if len(index.shape) < len(shape):  # one index for all
        net.fix([index], net.why_ordered())
    return _along_others(net, shape, dim, net.value(self_), *values, *([index] * (len(index.shape) == len(shape))))


def _along_others(net, shape, dim, whole, *values):
    """An operation for which the order along one axis matters, and which is elementwise along all others."""
    dim %= len(shape)
    if any(n != m and a != dim for value in values for a, (n, m) in enumerate(zip(value.shape, shape))):
        raise NoRule
    *values, index = values if whole is None else (*values, None)
    reduced = [net.reduce(net.ordered(value, [dim]), [dim], True) for value in values]
    other = index if whole is None else net.ordered(whole, [dim])
    return net.pointwise(shape, *reduced, other)


def _index_put(net, shape, self_, indices, values, accumulate=False):
    chosen = [axis for axis, index in enumerate(indices) if index is not None]
    (axis,), value = chosen, net.value(self_)
    index, rank = net.value(indices[axis]), len(net.value(indices[axis]).shape)
    if indices[axis].meta["val"].dtype == torch.bool and not axis and not net.value(values).shape:
        return net.pointwise(shape, value, net.view(index, [*index.shape, *[1] * (len(shape) - rank)]))
    if rank != 1:
        raise NoRule
    net.fix([index], net.why_ordered())
    part = [*shape[:axis], *index.shape, *shape[axis + 1:]]
    return _along_others(net, shape, axis, value, net.pointwise(part, net.value(values)))


def _index_select(net, shape, self_, dim, index):
    return _index(net, shape, self_, [None] * (dim % len(shape)) + [index])


def _embedding(net, shape, weight, indices, **_):
    return _index(net, shape, weight, [indices])


def _embedding_bag(net, shape, weight, indices, per_sample_weights=None, **_):
    """Sums of rows of the weight are as rows."""
    if per_sample_weights is not None:
        net.fix([net.value(per_sample_weights)], net.why_ordered())
    return [_index(net, net.node.meta["val"][0].shape, weight, [indices]), None, None, None]


def _cell(net, x, states, weights):
    """The states of a recurrent layer after a step with input ``x`` [batch, inputs]: an elementwise function of the
    gates, of which each unit has its own, and of the states."""
    w_ih, w_hh, *rest = weights
    biases, projection = (rest[:2], rest[2:]) if len(rest) > 1 else ((None, None), rest)

    def gates(value, weight, bias):
        value = net.contract([["batch", "in"], ["out", "in"]], ["batch", "out"], [value, net.value(weight)])
        return _parts(net, net.view(net.along(value, 1, bias), [value.shape[0], value.shape[1] // width, width]), 1)

    width, (h, *cell) = states[-1].shape[1], states
    units = net.pointwise([x.shape[0], width], *gates(x, w_ih, biases[0]), *cell)
    for _ in range(2):  # the second time with the state that the first has found
        output = net.contract([["batch", "in"], ["out", "in"]], ["batch", "out"],
                              [units, net.value(projection[0])]) if projection else units
        h = net.pointwise(h.shape, h, output)
        units = net.pointwise(units.shape, units, *gates(h, w_hh, biases[1]))
    return [h, units]


def _one_step(net, shape, input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    states = [net.value(state) for state in (hx if isinstance(hx, (list, tuple)) else [hx])]
    biases = [b_ih, b_hh] if b_ih is not None else []
    h, cell = _cell(net, net.value(input), states, [w_ih, w_hh, *biases])
    return h if shape is not None else (h, cell)


def _recurrent(net, shape, input, hx, params, num_layers, bidirectional, batch_first, **_):
    states = [net.value(state) for state in (hx if isinstance(hx, (list, tuple)) else [hx])]
    time, sides = int(batch_first), 1 + bidirectional
    x, per, found = net.value(input), len(params) // (num_layers * sides), []
    steps = x.shape[time]
    for layer in range(num_layers):
        step = net.reduce(net.ordered(x, [time]), [time])
        for i in range(layer * sides, (layer + 1) * sides):
            found.append(_cell(net, step, [net.select(s, 0, i) for s in states], params[i * per:(i + 1) * per]))
        h = net.concatenate([h for h, _ in found[-sides:]], 1)
        x = h.placed([1 - time, 2], [*h.shape[:time], steps, *h.shape[time:]]).fixed([time], net.why_ordered())
    return (x, *(_layers(net, [cells[i] for cells in found]) for i in range(len(states))))


def _layers(net, values):
    """Stack the states [batch, units] of several layers, each with units of its own."""
    if len(values) > 1 and all([b.axes for b in value.bundles] == [(1,)] for value in values):
        bundles = [Bundle((0, 2), *(np.stack([value.bundles[0][i] for value in values]) for i in (1, 2)))]
        return value_of([len(values), *values[0].shape], bundles, set(), values[0].why.get(0, net.why_ordered()))
    return _stacked(net, values)


def _uniform(net, shape, **_):
    return value_of(shape, (), range(len(shape)), f"constant {net.name}")


def _copy(net, shape, src, **_):
    return net.pointwise(shape, net.value(src))


def _reduced(net, shape, dim=None, keepdim=False, **given):
    value = net.value(given["self_"])
    axes = [dim] if isinstance(dim, int) else dim
    if axes is not None and isinstance(axes, torch.fx.Node):  # max of two tensors
        raise NoRule
    result = net.reduce(value, range(len(value.shape)) if axes is None or axes == [] else axes, keepdim)
    return result if shape is not None else (result, result)


def _best(net, shape, self_, dim=None, keepdim=False, **given):
    if given.get("other") is not None:
        return net.pointwise(shape, net.value(self_), net.value(given["other"]))
    value = net.value(self_)
    asked = any(user.args[1] == 1 for user in net.node.users if user.target is operator.getitem)
    if dim is not None and asked and any(dim % len(value.shape) in bundle.axes for bundle in value.bundles):
        raise NoRule  # the position of the best depends on the order
    return _reduced(net, shape, dim, keepdim, self_=self_)


def _softmax(net, shape, self_, dim, **_):
    return net.symmetric(net.value(self_), [dim])


def _einsum(net, shape, equation, tensors, **_):
    values, equation = [net.value(t) for t in tensors], equation.replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    if not arrow:
        raise NoRule
    terms = inputs.split(",")
    rank = max(len(v.shape) - len(t.replace("...", "")) for t, v in zip(terms, values) if "..." in t) \
        if "..." in equation else 0
    dots = [("dot", i) for i in range(rank)]

    def letters(term, n):
        head, dotted, tail = term.partition("...")
        return [*head, *(dots[rank - (n - len(head) - len(tail)):] if dotted else []), *tail]

    terms = [letters(term, len(value.shape)) for term, value in zip(terms, values)]
    return net.contract(terms, letters(out, len(shape)), values)


def _product(net, a, b):
    """A matrix product of values, like torch.matmul."""
    ranks = len(a.shape), len(b.shape)
    batch = [("batch", i) for i in range(max(*ranks, 2) - 2)]
    left = [*batch[len(batch) - max(ranks[0] - 2, 0):], *(["row"] if ranks[0] > 1 else []), "inner"]
    right = [*batch[len(batch) - max(ranks[1] - 2, 0):], "inner", *(["column"] if ranks[1] > 1 else [])]
    out = [*batch, *(["row"] if ranks[0] > 1 else []), *(["column"] if ranks[1] > 1 else [])]
    return net.contract([left, right], out, [a, b])


def _matmul(net, shape, self_, **given):
    weight = next(iter(given.values()))
    net.tap(weight, "input", x := net.value(self_), len(x.shape) - 1)
    result = _product(net, x, net.value(weight))
    net.tap(weight, "output", result, len(shape) - 1)
    return result


def _grouped_matmul(net, shape, offs, **given):
    """The product of rows, which are sorted by experts, with the matrix [experts, inputs, outputs] of their expert."""
    x, weight = (net.value(node) for node in list(given.values())[:2])
    if offs is None or len(x.shape) != 2 or len(weight.shape) != 3:
        raise NoRule
    net.fix([net.value(offs)], net.why_ordered())
    return _product(net, net.ordered(x, [0]), net.reduce(net.ordered(weight, [0]), [0]))


def _addmm(net, shape, self_, **given):
    x, weight = list(given.values())[:2]
    net.tap(weight, "input", a := net.value(x), len(a.shape) - 1)
    result = net.pointwise(shape, net.value(self_), _product(net, a, net.value(weight)))
    net.tap(weight, "output", result, len(shape) - 1)
    return result


def _linear(net, shape, input, weight, bias=None):
    x = net.value(input)
    batch = list(range(len(shape) - 1))
    net.tap(weight, "input", x, len(shape) - 1)
    result = net.contract([[*batch, "in"], ["out", "in"]], [*batch, "out"], [x, net.value(weight)])
    result = net.along(result, len(shape) - 1, bias)
    net.tap(weight, "output", result, len(shape) - 1)
    return result


def _attention(net, shape, query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, **_):
    q, k, v = (net.value(node) for node in (query, key, value))
    if not len(q.shape) == len(k.shape) == len(v.shape):
        raise NoRule
    if enable_gqa:  # heads of keys and values that several heads of queries use
        k, v = (_interleaved(net, x, q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    batch = list(range(len(shape) - 2))
    scores = net.contract([[*batch, "l", "e"], [*batch, "s", "e"]], [*batch, "l", "s"], [q, k])
    if attn_mask is not None:
        scores = net.pointwise(scores.shape, scores, net.value(attn_mask))
    scores = net.symmetric(net.ordered(scores, [-1, -2]) if is_causal else scores, [-1])
    return net.contract([[*batch, "l", "s"], [*batch, "s", "v"]], [*batch, "l", "v"], [scores, v])


def _convolution(net, shape, input, weight, bias=None, groups=1, transposed=False, **_):
    x, w = net.value(input), net.shapes.get(net.parameters.get(weight)) or net.value(weight).shape
    dims = len(w) - 2
    channel = len(shape) - dims - 1
    net.tap(weight, "input", x, channel)
    x = net.spatial(x, dims, [*x.shape[:channel + 1], *shape[channel + 1:]])
    places, batch = [("place", i) for i in range(dims)], list(range(channel))
    axes = ["in", "out"] if transposed else ["out", "in"]
    if groups == 1:
        kernel = net.ordered(net.value(weight), range(2, 2 + dims), KERNEL)
        kernel = net.reduce(kernel, range(2, 2 + dims))
        result = net.contract([[*batch, "in", *places], axes], [*batch, "out", *places], [x, kernel])
    else:
        x = net.view(x, [*x.shape[:channel], groups, x.shape[channel] // groups, *x.shape[channel + 1:]])
        kernel = _grouped_kernel(net, weight, w, groups)
        result = net.contract([[*batch, "group", "in", *places], ["group", *axes]],
                               [*batch, "group", "out", *places], [x, kernel])
        result = net.view(result, shape)
    result = net.along(result, channel, bias)
    net.tap(weight, "output", result, channel)
    return result


def _grouped_kernel(net, weight, shape, groups):
    """The weight of a grouped convolution as [groups, rows, columns], with separate columns for each group."""
    height, columns = shape[0] // groups, shape[1]
    if weight not in net.parameters:
        value = net.ordered(net.value(weight), range(2, len(shape)), KERNEL)
        return net.view(net.reduce(value, range(2, len(shape))), [groups, height, columns])
    name = net.parameters[weight]
    rows = net.vertices(name, 0).reshape(groups, height)
    bundles = [Bundle((0, 1), rows, np.zeros_like(rows))]
    if columns > 1:
        inner = np.stack([net.vertices(name, 1, (g * height, (g + 1) * height)) for g in range(groups)])
        bundles.append(Bundle((0, 2), inner, np.zeros_like(inner)))
    return value_of((groups, height, columns), bundles)


def _conv(transposed):
    return lambda net, shape, **given: _convolution(net, shape, **{"transposed": transposed} | given)


def _pool(dims, several=False):
    def rule(net, shape, **given):
        value = net.value(given.get("self_", given.get("input")))
        shape = tuple(shape or net.node.meta["val"][0].shape)
        value = net.spatial(value, dims, shape)
        return (value, value) if several else value

    return rule


def _grid_sample(net, shape, input, grid, **_):
    dims = len(shape) - 2
    places = net.reduce(net.ordered(net.value(grid), [-1]), [-1])  # the numbers of a place are its coordinates
    places = places.placed([0, *range(2, dims + 2)], [shape[0], 1, *shape[2:]])
    return net.pointwise(shape, net.spatial(net.value(input), dims, shape), places)


def _batch_norm(net, shape, input, weight=None, bias=None, running_mean=None, running_var=None, **_):
    value = net.value(input)
    value = net.symmetric(value, set(range(len(value.shape))) - {1})  # because statistics are computed over the batch
    value = net.along(value, 1, weight, bias, running_mean, running_var)
    return value if shape is not None else [value, None, None, None]


def _instance_norm(net, shape, input, weight=None, bias=None, running_mean=None, running_var=None, **_):
    value = net.symmetric(net.value(input), range(2, len(shape)))
    return net.along(value, 1, weight, bias, running_mean, running_var)


def _layer_norm(net, shape, input, normalized_shape, weight=None, bias=None, **_):
    value, n = net.value(input), len(normalized_shape)
    value = net.symmetric(value, range(-n, 0))
    value = net.pointwise(value.shape, *(v for p in (value, net.value(weight), net.value(bias)) if (v := p)))
    return value if shape is not None else (value, None, None)


def _group_norm(net, shape, input, weight=None, bias=None, **given):
    x, groups = net.value(input), given.get("num_groups", given.get("group"))
    split = net.view(x, [x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]])
    value = net.along(net.view(net.symmetric(split, range(2, len(split.shape))), x.shape), 1, weight, bias)
    return value if shape is not None else (value, None, None)


def _weight_norm(net, shape, v, g, dim=0):
    direction = net.value(v)
    length = net.reduce(direction, set(range(len(direction.shape))) - {dim}, True)
    value = net.pointwise(direction.shape, direction, length, net.value(g))
    return value if shape is not None else (value, length)


def _prelu(net, shape, self_, weight):
    value, slope = net.value(self_), net.value(weight)
    return net.along(value, 1, weight) if slope.shape != (1,) and len(shape) > 1 else \
        net.pointwise(shape, value, slope)


def _glu(net, shape, self_, dim=-1):
    return net.pointwise(shape, *_chunk(net, None, self_, 2, dim))


def _pixel_shuffle(net, shape, self_, upscale_factor):
    x, r = net.value(self_), upscale_factor
    *batch, channels, height, width = x.shape
    split = net.view(x, [*batch, channels // r**2, r, r, height, width])
    whole = net.ordered(split, range(-4, 0))
    channel = len(batch)
    kept = net.reduce(whole, range(channel + 1, len(whole.shape)))
    return net.ordered(kept.placed(range(channel + 1), shape), [-1, -2])


def _as_complex(net, shape, self_):
    return net.reduce(net.ordered(net.value(self_), [-1]), [-1])


def _as_real(net, shape, self_):
    return net.value(self_).placed(range(len(shape) - 1), shape).fixed([len(shape) - 1], net.why_ordered())


def _im2col(net, shape, self_, kernel_size, **_):
    """The patches of an image: each channel has one index for each position in the kernel."""
    x, batch = net.value(self_), len(shape) - 2
    channels = net.reduce(net.ordered(x, [-1, -2]), [-1, -2])
    split = [*channels.shape, math.prod(kernel_size), shape[-1]]
    patches = channels.placed(range(batch + 1), split).fixed([batch + 1, batch + 2], net.why_ordered())
    return net.view(patches, shape)


def _col2im(net, shape, self_, output_size, kernel_size, **_):
    x, batch = net.value(self_), len(shape) - 3
    split = net.view(x, [*x.shape[:batch], shape[batch], math.prod(kernel_size), x.shape[-1]])
    channels = net.reduce(net.ordered(split, [-1, -2]), [-1, -2])
    return net.ordered(channels.placed(range(batch + 1), shape), [-1, -2])


def _windows(net, shape, self_, dimension, **_):
    value = net.value(self_)
    dimension %= len(value.shape)
    return net.ordered(value, [dimension]).placed(range(len(value.shape)), shape).fixed(
        [dimension, len(shape) - 1], net.why_ordered())


def _fourier(several):
    def rule(net, shape, self_, dim=None, n=None, s=None, **_):
        value = net.value(self_)
        axes = dim if dim is not None else range(-len(s), 0) if s is not None else range(len(shape))
        axes = [a % len(shape) for a in (axes if several else [dim])]
        return net.ordered(value, axes)._replace(shape=tuple(shape)).fixed(axes, net.why_ordered())

    return rule


def _distance(net, shape, x1, x2, **_):
    """A sum over the last axis for all pairs of rows, like a matrix product."""
    a, b = net.value(x1), net.value(x2)
    order = [*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2]
    return _product(net, a, b.placed(order, [*b.shape[:-2], b.shape[-1], b.shape[-2]]))


def _pairs(net, shape, x1, x2, dim=None, keepdim=False, **_):
    a, b = net.value(x1), net.value(x2)
    both = net.pointwise(np.broadcast_shapes(a.shape, b.shape), a, b)
    return net.reduce(both, [-1 if dim is None else dim], keepdim)


def _sum_to_size(net, shape, self_, size):
    value = net.value(self_)
    new = len(value.shape) - len(shape)
    axes = [new + a for a, n in enumerate(shape) if n == 1 < value.shape[new + a]]
    value = net.reduce(value, axes, True) if axes else value
    return net.reduce(value, range(new)) if new else value


def _channel_shuffle(net, shape, self_, groups):
    x = net.value(self_)
    split = net.view(x, [x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]])
    order = [0, 2, 1, *range(3, len(split.shape))]
    return net.view(split.placed(order, [split.shape[a] for a in order]), shape)


def without_unread(node, rule):
    """Remove the arguments of a node that only give a type or a shape to its result."""
    first, *others = node.args
    if rule in (same, _expand):
        node.args = (first, *torch.fx.map_arg(others, lambda unread: None))
    elif rule in (_uniform, _copy):
        node.args = (torch.fx.map_arg(first, lambda unread: None), *others)


RULES = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "dropout", "lift_fresh_copy", "_to_copy", "to",
                     "type_as", "lift_fresh", "lift", "positive",
                     "native_dropout", "feature_dropout", "alpha_dropout"), same),
    # Elementwise, but not marked so by PyTorch.
    **dict.fromkeys(("hardswish", "log_sigmoid", "where", "masked_fill", "rsub"), pointwise),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"), _view),
    **dict.fromkeys(("transpose", "t", "swapaxes"), _transpose), "permute": _permute,
    "expand": _expand, "expand_as": _expand, "broadcast_to": _expand, "repeat": _repeat, "tile": _repeat,
    "broadcast_tensors": _broadcast,
    "repeat_interleave": _repeat_interleave, "select": _select,
    "slice": _slice, "split": _split, "split_with_sizes": _split, "chunk": _chunk, "unbind": _unbind, "cat": _cat,
    "stack": _stack, "slice_scatter": _slice_scatter, "select_scatter": _select_scatter,
    "pad": _pad, "constant_pad_nd": _pad,
    **dict.fromkeys(("roll", "flip", "cumsum", "cumprod", "logcumsumexp", "tril", "triu"), _order_matters),
    **dict.fromkeys(("sort", "argsort", "topk", "cummax", "cummin"), _sort),
    **dict.fromkeys(("argmax", "argmin"), _position),
    "index": _index, "index_select": _index_select, "embedding": _embedding,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), _embedding_bag),
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like",
                     "full_like", "empty_like", "new_empty", "scalar_tensor", "zero", "fill"), _uniform), "copy": _copy,
    **dict.fromkeys(("sum", "mean", "amax", "amin", "var", "std", "var_mean", "prod", "logsumexp", "norm", "any", "all",
                     "linalg_vector_norm"), _reduced), "max": _best, "min": _best,
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    "einsum": _einsum, **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot", "vdot"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _addmm),
    **dict.fromkeys(("_grouped_mm", "transformers::grouped_mm_fallback"), _grouped_matmul),
    "linear": _linear, "scaled_dot_product_attention": _attention, "convolution": _convolution,
    **{f"conv{d}d": _conv(False) for d in (1, 2, 3)}, **{f"conv_transpose{d}d": _conv(True) for d in (1, 2)},
    "conv_transpose2d": _conv(True), "conv_transpose3d": _conv(True),
    **{f"{kind}_pool{d}d": _pool(d) for d in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg")},
    **{f"adaptive_max_pool{d}d": _pool(d, True) for d in (1, 2, 3)},
    **{f"max_pool{d}d_with_indices": _pool(d, True) for d in (1, 2, 3)},
    **{f"upsample_{kind}": _pool(d) for d, kinds in {1: ("nearest1d", "linear1d"), 2: (
        "nearest2d", "bilinear2d", "bicubic2d"), 3: ("nearest3d", "trilinear3d")}.items() for kind in kinds},
    "grid_sampler_2d": _grid_sample, "grid_sampler_3d": _grid_sample,
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit",
                     "native_batch_norm"), _batch_norm),
    "instance_norm": _instance_norm, "layer_norm": _layer_norm, "native_layer_norm": _layer_norm,
    "rms_norm": _layer_norm, "group_norm": _group_norm, "prelu": _prelu, "glu": _glu,
    "_weight_norm": _weight_norm, "_weight_norm_interface": _weight_norm,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _one_step),
    "gather": _gather, "take_along_dim": _take_along, "index_put": _index_put,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill"), _scatter),
    "view_as_complex": _as_complex, "view_as_real": _as_real,
    "pixel_shuffle": _pixel_shuffle, "channel_shuffle": _channel_shuffle,
    "im2col": _im2col, "col2im": _col2im, "unfold": _windows, "sum_to_size": _sum_to_size,
    **dict.fromkeys(("cdist", "_cdist_forward", "_euclidean_dist"), _distance),
    **dict.fromkeys(("pairwise_distance", "cosine_similarity"), _pairs),
    **{f"fft_{kind}": _fourier(False) for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{f"fft_{kind}{n}": _fourier(True) for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft") for n in "2n"},
    **dict.fromkeys(("fft_fftshift", "fft_ifftshift", "_fft_r2c", "_fft_c2c", "_fft_c2r"), _fourier(True)),
}
