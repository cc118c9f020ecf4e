"""Values: what is known about activations during a trace, and the operations on them.

An axis of an activation is *in a bundle* if its indices represent vertices (see the module symmetry), *uniform* if the
activation is constant along it, and otherwise *inert*: its indices are fixed. The operations here are few and general:
elementwise combinations, sums over axes, views, selections and concatenations. The module rules composes PyTorch's
operations from them.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from permask_core.matching.tracer.symmetry import INERT, UNIFORM, Structure, colour_of, mix

ORDER = "their order matters"


class Bundle(NamedTuple):
    """Axes of an activation whose indices jointly represent vertices: ``vertices`` has the shape of these axes.

    If a vertex is at several indices, ``tags`` number its copies.
    """

    axes: tuple[int, ...]
    vertices: np.ndarray
    tags: np.ndarray

    def without(self, axis):
        """Remove an axis along which the vertices are the same; if it ran through copies, the pattern of their tags
        becomes the tag."""
        i = self.axes.index(axis)
        tags = np.moveaxis(self.tags, i, 0)
        if not (tags == tags[:1]).all():
            _, pattern = np.unique(tags.reshape(len(tags), -1), axis=1, return_inverse=True)
            tags = pattern.reshape(1, *tags.shape[1:])
        return Bundle(self.axes[:i] + self.axes[i + 1:], self.vertices.take(0, i), tags[0])

    def constant(self, axis):
        """Whether the vertices, and the tags of constants, do not differ along an axis."""
        first = [array.take([0], self.axes.index(axis)) for array in (self.vertices, self.tags)]
        return bool(((self.vertices == first[0]) & ((first[0] != UNIFORM) | (self.tags == first[1]))).all())

    @property
    def known(self):
        """Whether it has constants only; different values have different tags."""
        return bool((self.vertices < 0).all())

    def numbers(self):
        """Return the tags of constants, where fixed values have tags of their own."""
        return np.where(self.vertices == INERT, self.tags.max() + 1 + np.arange(self.tags.size).reshape(
            self.tags.shape), self.tags)

    def placed(self, positions):
        """Return the bundle with axis a at positions[a]."""
        axes = [positions[a] for a in self.axes]
        order = np.argsort(axes)
        return Bundle(tuple(axes[i] for i in order), self.vertices.transpose(order), self.tags.transpose(order))


class Value(NamedTuple):
    """What is known about a tensor. It is constant along ``uniform`` axes. Axes that are neither uniform nor in a
    bundle are inert: their indices are fixed, and ``why`` has the reason for each."""

    shape: tuple[int, ...]
    bundles: tuple[Bundle, ...]
    uniform: frozenset[int]
    why: dict[int, str]

    @property
    def inert(self):
        return set(range(len(self.shape))) - self.uniform - {a for bundle in self.bundles for a in bundle.axes}

    def fixed(self, axes, why):
        """Return the value with ``axes``, which are in no bundle, as inert ones."""
        return self._replace(uniform=self.uniform - {a for a in axes if self.shape[a] > 1},
                             why=dict.fromkeys(axes, why) | self.why)

    def placed(self, positions, shape):
        """Return the value as a tensor of another shape, with axis a at positions[a], constant along new axes."""
        new = set(range(len(shape))) - set(positions)
        return value_of(shape, [bundle.placed(positions) for bundle in self.bundles],
                        {positions[a] for a in self.uniform} | new, {positions[a]: self.why[a] for a in self.inert})


def value_of(shape, bundles=(), uniform=(), why=""):
    """Return a value in its simplest form: without bundle axes along which vertices do not differ, and without bundles
    that other bundles imply. ``why`` is the reason for all inert axes, or a dict of reasons by axis."""
    simple = []
    for bundle in bundles:
        for axis in bundle.axes:
            if bundle.constant(axis):
                bundle = bundle.without(axis)
        simple += [bundle] if bundle.axes else []
    kept = [b for i, b in enumerate(simple) if not any(
        set(b.axes) < set(c.axes) or (b.axes == c.axes and j < i) for j, c in enumerate(simple))]
    flat = {a for a, n in enumerate(shape) if n == 1} | set(uniform)
    value = Value(tuple(shape), tuple(kept), frozenset(flat - {a for b in kept for a in b.axes}), {})
    return value._replace(why={a: why if isinstance(why, str) else why.get(a, ORDER) for a in value.inert})


def constant_of(tensor, why):
    """Return the value of a tensor whose numbers are known and do not change: along each axis, indices with equal
    slices are the same constant."""
    bundles, uniform = [], set()
    for axis, n in enumerate(tensor.shape):
        slices, numbers = tensor.detach().cpu().movedim(axis, 0).reshape(n, -1), {}
        rows = torch.empty_like(slices, memory_format=torch.contiguous_format).copy_(slices).view(torch.uint8).numpy()
        tags = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows], np.int64)
        if len(numbers) == 1:
            uniform.add(axis)
        elif len(numbers) < n:
            bundles.append(Bundle((axis,), np.where(np.bincount(tags)[tags] > 1, UNIFORM, INERT), tags))
    return value_of(tensor.shape, bundles, uniform, why)


class NoRule(Exception):
    """An operation in a form that has no rule."""


class Algebra:
    """Operations on values, which record their constraints on vertices in a ``structure``."""

    def __init__(self):
        self.structure = Structure()
        self.at = self.name = ""  # the current operation, for reasons and colours

    def fix(self, values, why):
        for value in values:
            for bundle in value.bundles:
                self.structure.fix(bundle.vertices.ravel(), why)

    def project(self, bundle, axes, ordered):
        """Return a bundle on fewer axes: its vertices if they do not differ along the other axes, else blocks of
        them."""
        for axis in bundle.axes:
            if axis not in axes and bundle.constant(axis):
                bundle = bundle.without(axis)
        kept = [i for i, axis in enumerate(bundle.axes) if axis in axes]
        if len(kept) == len(bundle.axes):
            return bundle
        rest = [i for i in range(len(bundle.axes)) if i not in kept]
        shape = [bundle.vertices.shape[i] for i in kept]
        rows, tags = (array.transpose(kept + rest).reshape(math.prod(shape), -1)
                      for array in (bundle.vertices, bundle.tags))
        vertices, tags = self.structure.blocks(rows, tags, ordered, self.why_ordered())
        return Bundle(tuple(bundle.axes[i] for i in kept), vertices.reshape(shape), tags.reshape(shape))

    def why_ordered(self):
        return f"{ORDER} to {self.at.split()[0]}"

    def ordered(self, value, axes, why=None):
        """Return the value with inert ``axes``, because their order matters."""
        axes, why, bundles = {a % len(value.shape) for a in axes}, why or self.why_ordered(), []
        for bundle in value.bundles:
            if rest := set(bundle.axes) - axes:
                bundles.append(self.project(bundle, rest, True))
            else:
                self.structure.fix(bundle.vertices.ravel(), why)
        return value._replace(bundles=tuple(bundles)).fixed(axes, why)

    def symmetric(self, value, axes):
        """Record an operation that treats all indices along some axes equally, such as a softmax."""
        axes = {a % len(value.shape) for a in axes}
        return value._replace(bundles=tuple(self._in_blocks(b, axes & set(b.axes)) for b in value.bundles))

    def _in_blocks(self, bundle, axes):
        """Return a bundle after an operation on blocks, in which the results for constants depend on the block."""
        rest = set(bundle.axes) - axes
        if not axes or not rest:
            return bundle
        whole, n, constant = self.project(bundle, rest, False), _along(bundle, axes), bundle.vertices == UNIFORM
        vertices, tags = (array.reshape(_along(bundle, rest)) for array in (whole.vertices, whole.tags))
        copies = bundle.tags * math.prod(n) + np.arange(math.prod(n)).reshape(n)
        return bundle._replace(vertices=np.where(constant, vertices, bundle.vertices),
                               tags=np.where(constant, tags * (copies.max() + 1) + copies, bundle.tags))

    def join(self, shape, values):
        """Combine values of the same rank elementwise, like a sum or a product."""
        why = {axis: value.why[axis] for value in reversed(values) for axis in value.inert}
        joined = []
        for bundle in (bundle for value in values for bundle in value.bundles):
            if why.keys() >= set(bundle.axes):
                self.structure.fix(bundle.vertices.ravel(), why[bundle.axes[0]])
                continue
            if met := why.keys() & set(bundle.axes):  # units in a fixed order of blocks: each block is another one
                n = _along(bundle, met)
                bundle = self.distinguished(bundle, "block", np.arange(math.prod(n)).reshape(n), why[min(met)])
            for i, other in enumerate(joined):
                small, large = sorted((bundle, other), key=lambda b: len(b.axes))
                common, inside = set(bundle.axes) & set(other.axes), set(small.axes) < set(large.axes)
                if inside and small.known:
                    large = self.distinguished(large, "constant", small.numbers().reshape(_along(large, small.axes)))
                    bundle, joined[i] = (large, other) if small is other else (bundle, large)
                elif inside and (large.vertices == UNIFORM).any():
                    raise NoRule  # where the larger is constant, the smaller would be lost
                elif common:
                    one, two = self.project(other, common, False), self.project(bundle, common, False)
                    both = self.structure.same(one.vertices, two.vertices, one.tags, two.tags, self.name, self.at)
                    if bundle.axes == other.axes:
                        joined[i] = Bundle(bundle.axes, *(array.reshape(one.vertices.shape) for array in both))
                        break
            else:
                joined.append(bundle)
        return value_of(shape, joined, frozenset.intersection(*(value.uniform for value in values)), why)

    def pointwise(self, shape, *values):
        """An elementwise operation, with broadcasting."""
        lifted = [value.placed(range(len(shape) - len(value.shape), len(shape)), shape) for value in values]
        return self.join(shape, lifted)

    def reduce(self, value, axes, keep=False):
        """A sum over axes, or another operation that does not depend on their order."""
        axes = {a % len(value.shape) for a in axes}
        bundles = [self.project(b, set(b.axes) - axes, False) for b in value.bundles if set(b.axes) - axes]
        rest = [a for a in range(len(value.shape)) if a not in axes]
        shape = [1 if a in axes else n for a, n in enumerate(value.shape)]
        kept = value_of(shape, bundles, value.uniform | axes, value.why)
        if keep:
            return kept
        places = {a: i for i, a in enumerate(rest)}
        return value_of([value.shape[a] for a in rest], [b.placed(places) for b in kept.bundles],
                        {places[a] for a in value.uniform - axes}, {places[a]: kept.why[a] for a in kept.inert})

    def contract(self, terms, out, values):
        """Einstein summation, with a letter for every axis of every value and of the result."""
        letters = list(dict.fromkeys([*out, *(letter for term in terms for letter in term)]))
        size = {}
        for term, value in zip(terms, values):
            if len(set(term)) < len(term) or len(term) != len(value.shape):
                raise NoRule
            for letter, n in zip(term, value.shape):
                size[letter] = max(n, size.get(letter, 1))
        shape = [size[letter] for letter in letters]
        placed = [value.placed([letters.index(letter) for letter in term], shape) for term, value in zip(terms, values)]
        return self.reduce(self.join(shape, placed), range(len(out), len(letters)))

    def view(self, value, shape):
        """Return the value in another shape, with indices in the same order."""
        if 0 in value.shape or math.prod(value.shape) != math.prod(shape):
            raise NoRule
        segments = _segments(value.shape, shape)
        uniform = {a for old, new in segments if value.uniform.issuperset(old) for a in new}
        kept = {old[0]: new[0] for old, new in segments if len(old) == len(new) == 1}
        bundles, done = [], []
        for bundle in value.bundles:
            if kept.keys() >= set(bundle.axes):
                bundles.append(bundle.placed(kept))
                continue
            touched = [(old, new) for old, new in segments if set(old) & set(bundle.axes)]
            old, new = (tuple(sorted(a for segment in touched for a in segment[i])) for i in (0, 1))
            clash = next((other for touching, other in done if set(old) & set(touching)), None)
            if clash is not None:  # of two independent bundles, keep the larger
                least = min(bundle, clash, key=lambda b: (not b.known, b.vertices.size))
                return self.view(self.ordered(value, least.axes), shape)
            done.append((old, bundle))
            full = [value.shape[a] for a in old]
            bundle = _filled(bundle, old, value.shape)._replace(tags=_copies(bundle, old, value.shape))
            bundles.append(Bundle(new, *(array.reshape(full).reshape([shape[a] for a in new])
                                          for array in (bundle.vertices, bundle.tags))))
        why = {a: value.why[b] for old, new in segments for b in reversed(old) if b in value.inert for a in new}
        return value_of(shape, bundles, uniform, why)

    def take(self, value, axis, indices, part=0):
        """Select some of the indices along an axis."""
        axis %= len(value.shape)
        if len(indices) == value.shape[axis]:
            return value
        if not len(indices):
            return value_of([0 if a == axis else n for a, n in enumerate(value.shape)], (), range(len(value.shape)))
        bundles = []
        for bundle in value.bundles:
            if axis in bundle.axes:
                i = bundle.axes.index(axis)
                bundle = bundle._replace(vertices=bundle.vertices.take(indices, i), tags=bundle.tags.take(indices, i))
                self.mark(bundle, part)
            bundles.append(bundle)
        shape = [len(indices) if a == axis else n for a, n in enumerate(value.shape)]
        return value_of(shape, bundles, value.uniform, value.why)

    def mark(self, bundle, part):
        with np.errstate(over="ignore"):
            self.structure.mark(bundle.vertices, (bundle.tags.astype(np.uint64)
                                                  + colour_of("part", self.name, part)).ravel())

    def distinguished(self, bundle, name, numbers, why=None):
        """Return the bundle after an operation with constants, which are equal where their ``numbers`` are."""
        with np.errstate(over="ignore"):
            colours = mix(bundle.tags.astype(np.uint64)) + mix(numbers) + colour_of(name, self.name)
        self.structure.mark(bundle.vertices, colours.ravel(), why)
        tags = bundle.tags * (numbers.max() + 1) + numbers
        return bundle._replace(tags=np.where(bundle.vertices == UNIFORM, tags, bundle.tags))

    def select(self, value, axis, index):
        axis %= len(value.shape)
        value = self.take(value, axis, [index % value.shape[axis]], index)
        return self.view(value, [n for a, n in enumerate(value.shape) if a != axis])

    def concatenate(self, values, axis, names=None):
        """Concatenate values; constant values with the same name are the same."""
        names = [name for name, value in zip(names or range(len(values)), values) if 0 not in value.shape]
        values = [value for value in values if 0 not in value.shape]
        axis %= len(values[0].shape)
        shape = [sum(value.shape[axis] for value in values) if a == axis else n for a, n in enumerate(values[0].shape)]
        spans = [set().union(*(b.axes for b in value.bundles if axis in b.axes)) for value in values]
        whole = set().union(*spans)
        values = [self.ordered(value, [axis]) if span and span < whole and value.uniform >= whole - span else value
                  for value, span in zip(values, spans)]  # units that all blocks share
        axes = _axes_along(values, axis)
        if axes is None:  # they cannot be concatenated
            values = [self.ordered(value, [axis]) for value in values]
        joined = self.join(shape, [value._replace(
            bundles=tuple(b for b in value.bundles if axis not in b.axes), shape=tuple(shape),
            uniform=value.uniform | {axis, *(axes or ())}) for value in values])
        if not axes:
            return joined.fixed({axis}, next((value.why[axis] for value in values if axis in value.inert),
                                             self.why_ordered()))
        whole = self._end_to_end([_bundle_along(value, axes) for value in values], names, axis)
        return value_of(shape, [*joined.bundles, whole], joined.uniform - set(axes), joined.why)

    def _end_to_end(self, parts, names, axis):
        """Concatenate several bundles with the same axes along one axis; along all other axes their units are the
        same."""
        n, axes = len(parts), parts[0].axes
        parts = [part._replace(tags=np.where(part.vertices == UNIFORM, part.tags * n + names.index(name), part.tags))
                 for part, name in zip(parts, names)]
        seen = [set(part.vertices[part.vertices >= 0].tolist()) for part in parts]
        if sum(map(len, seen)) > len(set().union(*seen)):  # a unit occurs twice: number its copies
            parts = [part._replace(tags=part.tags * n + k) for k, part in enumerate(parts)]
        if len(axes) > 1:
            first, *others = [self.project(part, set(axes) - {axis}, False) for part in parts]
            for other in others:
                if other.axes != first.axes:
                    raise NoRule
                self.structure.same(first.vertices, other.vertices, first.tags, other.tags, self.name, self.at)
        return Bundle(axes, *(np.concatenate([part[j] for part in parts], axes.index(axis)) for j in (1, 2)))

    def spatial(self, value, dims, shape):
        """Return the value after an operation that slides over its last ``dims`` axes."""
        value = self.ordered(value, range(-dims, 0))._replace(shape=tuple(shape))
        return value.fixed(range(len(shape) - dims, len(shape)), self.why_ordered())  # padding breaks uniformity


def _axes_along(values, axis):
    """Return the axes of the bundles along an axis: () if there are none, None if they differ between values, or if a
    value has two such bundles, or has none but another bundle along the same axes."""
    along = [[bundle for bundle in value.bundles if axis in bundle.axes] for value in values]
    spans = {bundle.axes for bundles in along for bundle in bundles}
    if not spans:
        return ()
    axes, *others = spans
    lacking = [value for value, bundles in zip(values, along) if not bundles]
    if others or any(len(bundles) > 1 for bundles in along) or any(
            set(bundle.axes) & set(axes) for value in lacking for bundle in value.bundles):
        return None
    return axes


def _bundle_along(value, axes):
    """Return a value's bundle along these axes; if it has none, a bundle of ``UNIFORM``, with a tag for each index
    along inert axes, or of ``INERT`` if all are inert."""
    shape = [value.shape[a] for a in axes]
    inert = [n if a in value.inert else 1 for a, n in zip(axes, shape)]
    numbers = np.broadcast_to(np.arange(math.prod(inert)).reshape(inert), shape)
    blank = Bundle(axes, np.full(shape, INERT if value.inert >= set(axes) else UNIFORM), numbers)
    return next((bundle for bundle in value.bundles if bundle.axes == axes), blank)


def _along(bundle, axes):
    """Return a shape that broadcasts an array along some of the bundle's axes."""
    return [n if axis in axes else 1 for axis, n in zip(bundle.axes, bundle.vertices.shape)]


def _filled(bundle, axes, shape):
    axes = tuple(sorted(axes))
    index = tuple(slice(None) if a in bundle.axes else None for a in axes)
    full = [shape[a] for a in axes]
    return Bundle(axes, np.broadcast_to(bundle.vertices[index], full), np.broadcast_to(bundle.tags[index], full))


def _segments(old, new):
    """Return the shortest runs of axes longer than 1, of two shapes, that have the same number of elements."""
    olds, news = ([a for a, n in enumerate(shape) if n > 1] for shape in (old, new))
    segments = []
    while olds:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (a := math.prod(old[i] for i in left)) != (b := math.prod(new[i] for i in right)):
            (left if a < b else right).append((olds if a < b else news).pop(0))
        segments.append((tuple(left), tuple(right)))
    return segments


def _copies(bundle, axes, shape):
    """Return the tags of a bundle expanded to more axes: each index along the new axes is another copy."""
    others = [a for a in axes if a not in bundle.axes]
    number = np.arange(math.prod(shape[a] for a in others)).reshape([shape[a] for a in others])
    index = tuple(slice(None) if a in others else None for a in axes)
    spread = _filled(bundle, axes, shape).tags
    return spread * number.size + number[index]
