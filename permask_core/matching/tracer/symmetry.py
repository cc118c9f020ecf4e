"""Find the exchangeable units of a network from its coloured graph.

A tracer describes a network as a coloured graph. A vertex is an index along an axis of a parameter, or a block: a
vertex that represents several others, like an attention head its dimensions. An edge means that two vertices are the
same unit, or that one is part of the other. The colours of vertices and edges encode all other differences. Any
relabelling that preserves the coloured graph preserves the function.

Colours are refined until the colour of every vertex determines its surroundings (the Weisfeiler-Leman algorithm). Units
with the same colours in the same block can then be exchanged one by one: swapping two of them affects nothing else. In
doubtful cases (a unit with two indistinguishable parts, blocks that cross) no units are exchanged.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

UNIFORM, INERT = -1, -2  # instead of a vertex: a constant, a value that no permutation may move


class Site(NamedTuple):
    """An axis of a tensor whose indices are vertices; with ``rows``, only in these rows of axis 0."""

    tensor: str
    axis: int
    rows: tuple[int, int] | None = None


def colour_of(*names):
    """Return a colour for values with a ``repr``; unlike ``hash``, it is the same in every process."""
    value = np.uint64(14695981039346656037)  # FNV-1a
    with np.errstate(over="ignore"):
        for byte in repr(names).encode():
            value = (value ^ np.uint64(byte)) * np.uint64(1099511628211)
    return value


def mix(x):
    """Hash colours, so that equal sums by chance are very unlikely (splitmix64)."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Structure:
    """The coloured graph under construction. Arrays of vertices may also have ``UNIFORM`` and ``INERT``. ``reasons``
    has reasons for vertices that are fixed, and ``hints`` for those that may turn out to be."""

    def __init__(self):
        self.sites, self.reasons, self.hints, self._blocks = [], {}, {}, {}
        self._vertices, self._same, self._parts, self._marks = [], [], [], []
        self.count = 0

    def axis(self, site, length):
        """Return new vertices for the indices along an axis of a tensor, int64 [length]."""
        self.sites.append(site)
        return self._new(len(self.sites) - 1, np.arange(length), colour_of("axis", site.tensor, site.axis))

    def _new(self, site, positions, colour):
        n = len(positions)
        self._vertices.append((np.full(n, site), positions, np.full(n, colour)))
        self.count += n
        return np.arange(self.count - n, self.count)

    def same(self, u, v, tags_u, tags_v, name, at):
        """Note that, by the operation ``name``, u[k] in its copy tags_u[k] is the same unit as v[k] in its copy
        tags_v[k].

        Returns the vertices that represent both, and their tags.
        """
        u, v, tags_u, tags_v = (array.ravel() for array in np.broadcast_arrays(u, v, tags_u, tags_v))
        self.fix(u[v == INERT], why := f"they meet fixed values in {at}")
        self.fix(v[u == INERT], why)
        with np.errstate(over="ignore"):
            self.mark(u[v == UNIFORM], mix(tags_v[v == UNIFORM].astype(np.uint64)) + colour_of("constant", name))
            self.mark(v[u == UNIFORM], mix(tags_u[u == UNIFORM].astype(np.uint64)) + colour_of("constant", name))
            both = (u >= 0) & (v >= 0) & ((u != v) | (tags_u != tags_v))
            colours = mix(colour_of("same", name) + mix(mix(tags_u[both].astype(np.uint64))
                                                          + tags_v[both].astype(np.uint64)))
        self._same.append((u[both], v[both], colours))
        first = (u == INERT) | ((u >= 0) & (v != INERT))
        tags, constant = np.where(first, tags_u, tags_v), (u == UNIFORM) & (v == UNIFORM)
        pairs = np.stack([tags_u[constant], tags_v[constant]])  # the result of two constants depends on both
        tags[constant] = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()
        return np.where(first, u, v), tags

    def blocks(self, parts, tags, ordered, why):
        """Return a vertex for each row of ``parts`` [blocks, parts], and its tag. ``ordered`` parts have fixed
        positions in the block."""
        if (parts == UNIFORM).all():  # constants: blocks of the same are the same
            rows = tags if ordered else np.sort(tags, 1)
            return parts[:, 0], np.unique(rows, axis=0, return_inverse=True)[1].ravel()
        constant = (tags == tags[:, :1]).all()
        result, new_tags = np.empty(len(parts), np.int64), tags[:, 0] if constant else np.zeros(len(parts), np.int64)
        for i, (row, row_tags) in enumerate(zip(parts, np.zeros_like(tags) if constant else tags)):
            if (row == INERT).any():
                self.fix(row, why)
                result[i] = INERT
                continue
            key = (row.tobytes(), row_tags.tobytes(), ordered)
            if key not in self._blocks:
                others = row_tags[row == UNIFORM].tolist()
                colour = colour_of("block", ordered, others if ordered else sorted(others))
                (block,) = self._blocks[key] = self._new(-1, np.zeros(1, np.int64), colour)
                real = row >= 0
                places = np.arange(len(row))[real] if ordered else np.zeros(real.sum(), np.int64)
                with np.errstate(over="ignore"):
                    colours = mix(mix(places.astype(np.uint64)) + row_tags[real].astype(np.uint64))
                self._parts.append((row[real], np.full(real.sum(), block), colours))
            result[i] = self._blocks[key][0]
        return result, new_tags

    def mark(self, vertices, colours, why=None):
        """Distinguish vertices from those without this mark; ``why`` is the reason if nothing can then be exchanged."""
        vertices = np.asarray(vertices).ravel()
        real = vertices >= 0
        for vertex in np.unique(vertices[real]).tolist() if why else ():
            self.hints.setdefault(vertex, why)
        self._marks.append((vertices[real], np.broadcast_to(np.asarray(colours, np.uint64), real.shape)[real]))

    def fix(self, vertices, why):
        """Exclude vertices from every permutation."""
        for vertex in np.unique(vertices[vertices >= 0]).tolist():
            self.reasons.setdefault(vertex, why)

    def arrays(self):
        """Return (site, position, colour) of the vertices, then the edges (u, v, colour) and (part, block, colour)."""
        vertices = _joined(self._vertices, (np.int64, np.int64, np.uint64))
        for marked, colours in self._marks:
            with np.errstate(over="ignore"):
                np.add.at(vertices[2], marked, mix(colours))
        return vertices, *(_joined(edges, (np.int64, np.int64, np.uint64)) for edges in (self._same, self._parts))


def _joined(triples, dtypes):
    return [np.concatenate([np.empty(0, dtype), *(t[i] for t in triples)]).astype(dtype)
            for i, dtype in enumerate(dtypes)]


class Orbit(NamedTuple):
    """Exchangeable units: their positions [size, block] at each site, the numbers of the units (and those of their
    parts), and the (orbit, unit) in which they are nested."""

    places: dict[Site, np.ndarray]
    numbers: dict[int, int]
    within: tuple[int, int] | None


def orbits(structure):
    """Return the sets of exchangeable units, in the order of the trace.

    Returns
    -------
    (list of Orbit, ndarray, dict of int to str)
        The orbits, the unit of every vertex, and for each parameter vertex in no orbit the reason why it is fixed.
    """
    (site, position, colour), same, parts = structure.arrays()
    unit, tree, crossing = _tree(structure.count, same, _movable(_refine(colour, same, parts), parts))
    why = {unit[vertex]: reason for vertex, reason in reversed(structure.reasons.items())}
    why |= dict.fromkeys(crossing - why.keys(), "blocks of units cross each other")
    colour = _settle(colour, unit, site, same, parts, why)
    units = _Units(unit, tree, site, colour)
    found = []
    for alike in units.alike(why.keys()):
        places = _places(structure.sites, [units.vertices(u) for u in alike], site, position)
        found += [(alike, places)] if places and len(places) > 1 else []  # nothing reads a unit with one entry
    found.sort(key=lambda orbit: units.first(orbit[0][0]))
    number = {u: (i, j) for i, (alike, _) in enumerate(found) for j, u in enumerate(alike)}
    result = [Orbit(places, {part: j for j, u in enumerate(alike) for part in units.whole(u)},
                    _within(alike[0], tree, number)) for alike, places in found]
    moving = np.isin(unit, [u for orbit in result for u in orbit.numbers])
    why = {unit[vertex]: hint for vertex, hint in structure.hints.items()} | why
    fixed = {int(v): why.get(unit[v], "no other unit has the same surroundings")
             for v in np.flatnonzero((site >= 0) & ~moving)}
    return result, unit, fixed


def _movable(colour, parts):
    """Return the parts of blocks without those of a block that no other resembles: such a block does not move, and the
    colours of its parts show where they belong."""
    counts = dict(zip(*np.unique(colour, return_counts=True)))
    kept = np.array([counts[c] > 1 for c in colour[parts[1]]], bool)
    return [array[kept] for array in parts]


def _settle(colour, unit, site, same, parts, why):
    """Refine colours until no two vertices of one unit have the same; units that must be fixed for this are added to
    ``why``."""
    while True:
        refined = _refine(_unique(colour, unit, why), same, parts)
        ambiguous = _ambiguous(refined, unit, site, parts) - why.keys()
        if not ambiguous:
            return refined
        why |= dict.fromkeys(ambiguous, "two entries of one unit cannot be distinguished")


class _Units:
    """Units with their parts, in an order that is the same for exchangeable units."""

    def __init__(self, unit, tree, site, colour):
        self.tree, self.children, self.wholes = tree, defaultdict(list), {}
        for child, above in tree.items():
            for block in above:
                self.children[block].append(child)
        self.members, self.end = _members(unit, site, colour), len(unit)
        self.colours = np.zeros(unit.max(initial=-1) + 1, np.uint64)  # of units, from their vertices in any order
        with np.errstate(over="ignore"):
            np.add.at(self.colours, unit, mix(colour))

    def whole(self, u):
        """Return a unit, its parts, and their parts."""
        if u not in self.wholes:
            inside = sorted(self.children.get(u, ()), key=lambda child: (self.colours[child], self.first(child)))
            self.wholes[u] = [u, *(part for child in inside for part in self.whole(child))]
        return self.wholes[u]

    def vertices(self, u):
        """Return the parameter vertices of a unit and its parts."""
        return [vertex for part in self.whole(u) for vertex in self.members[part]]

    def first(self, u):
        """Return the first of these vertices in the order of the network, where each part counts by its first site and
        colour."""
        return min((self.members[part][0] for part in self.whole(u) if self.members[part]), default=self.end)

    def alike(self, fixed):
        """Return lists of two or more units that have the same colours and are part of the same blocks."""
        candidates = defaultdict(list)
        for u, colour in enumerate(self.colours):
            if u not in fixed:
                candidates[colour, tuple(sorted(self.tree.get(u, ())))].append(u)
        return [sorted(units, key=self.first) for units in candidates.values() if len(units) > 1]


def _within(u, tree, number):
    """Return the nearest movable block that contains a unit, as (orbit, unit)."""
    while len(tree.get(u, ())) == 1:
        (u,) = tree[u]
        if u in number:
            return number[u]
    return None


def _tree(n, same, parts):
    """Return units (connected by sameness), the blocks that directly contain each unit, and the blocks that cross
    others.

    Two blocks with the same parts are one block. If one of two blocks of a unit contains the other, the unit is
    directly part of the smaller block only.
    """
    u, v = same[0], same[1]
    while True:
        _, unit = connected_components(coo_array((np.ones(len(u)), (u, v)), shape=(n, n)), directed=False)
        held = defaultdict(set)
        for child, block in {(c, b) for c, b in zip(unit[parts[0]].tolist(), unit[parts[1]].tolist())}:
            held[block].add(child)
        alike, representative = {}, dict(zip(unit[parts[1]].tolist(), parts[1].tolist()))
        merged = [(representative[alike.setdefault(frozenset(inside), block)], representative[block])
                  for block, inside in held.items() if len(inside) > 1]
        merged = np.array([pair for pair in merged if pair[0] != pair[1]], np.int64).reshape(-1, 2)
        if not len(merged):
            break
        u, v = np.concatenate([u, merged[:, 0]]), np.concatenate([v, merged[:, 1]])
    crossing, found = set(), {None}
    while found:
        tree, found = _nested({block: inside for block, inside in held.items() if block not in crossing})
        crossing |= found
    circles = _in_circles(tree)
    return unit, {child: above for child, above in tree.items() if child not in circles}, crossing | circles


def _nested(held):
    """Return the smallest block that contains each unit, in a set, and of each two crossing blocks that with more
    parts."""
    above, tree, crossing = defaultdict(set), {}, set()
    for block, inside in held.items():
        for child in inside:
            above[child].add(block)
    todo = list(above)
    while todo:
        child = todo.pop()
        blocks = sorted(above[child], key=lambda block: (len(held[block]), block))
        tree[child] = {blocks[0]}
        for small, large in zip(blocks, blocks[1:]):
            if not held[small] < held[large]:
                crossing.add(large)
            elif large not in above[small]:
                above[small].add(large)
                todo.append(small)
    return tree, crossing


def _in_circles(tree):
    """Return units that are part of themselves, which should not occur."""
    circles = set()
    for start in tree:
        seen, todo = set(), list(tree[start])
        while todo:
            u = todo.pop()
            if u == start:
                circles.add(start)
            if u not in seen:
                seen.add(u)
                todo += tree.get(u, ())
    return circles


def _unique(colour, unit, fixed):
    """Give the vertices of fixed units unique colours."""
    colour = colour.copy()
    chosen = np.isin(unit, list(fixed))
    with np.errstate(over="ignore"):
        colour[chosen] += mix(mix(np.flatnonzero(chosen).astype(np.uint64)) + colour_of("fixed"))
    return colour


def _refine(colour, same, parts):
    """Refine the colours of vertices by their surroundings until no more vertices can be distinguished."""
    ways = []
    for (u, v, tone), name in ((same, "same"), (parts, "part")):
        ways += [(u, v, mix(tone ^ colour_of(name, "out"))), (v, u, mix(tone ^ colour_of(name, "in")))]
    distinct = len(np.unique(colour))
    with np.errstate(over="ignore"):
        while True:
            around = np.zeros_like(colour)
            for u, v, tone in ways:
                np.add.at(around, v, mix(mix(colour[u]) + tone))
            colour = mix(colour + mix(around))
            now = len(np.unique(colour))
            if now == distinct:
                return colour
            distinct = now


def _ambiguous(colour, unit, site, parts):
    """Return units with two parameter vertices of one colour, or with two blocks of one colour and different parts."""
    real = np.flatnonzero(site >= 0)
    pairs = np.stack([unit[real].astype(np.uint64), colour[real]], 1)
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    found, held, first = set(pairs[counts > 1, 0].astype(np.int64).tolist()), defaultdict(list), {}
    for part, block, tone in zip(*(array.tolist() for array in parts)):
        held[block].append((part, tone))
    for block, inside in held.items():
        if first.setdefault((unit[block], colour[block]), sorted(inside)) != sorted(inside):
            found.add(int(unit[block]))
    return found


def _members(unit, site, colour):
    """Return the parameter vertices of each unit, ordered by site and colour."""
    members = defaultdict(list)
    real = np.flatnonzero(site >= 0)
    for vertex in real[np.lexsort((colour[real], site[real]))].tolist():
        members[unit[vertex]].append(vertex)
    return members


def _places(sites, units, site, position):
    """Return positions [size, block] by site, or None if the units differ in layout.

    An entry restricted to rows that the unit owns completely moves with these rows.
    """
    places = []
    for unit in units:
        mine = defaultdict(list)
        for vertex in unit:
            mine[site[vertex]].append(position[vertex])
        rows = {sites[s].tensor: set(positions) for s, positions in mine.items() if sites[s].axis == 0}
        places.append({s: positions for s, positions in mine.items() if sites[s].rows is None
                       or not rows.get(sites[s].tensor, set()).issuperset(range(*sites[s].rows))})
    shape = [(s, len(positions)) for s, positions in sorted(places[0].items())]
    if not shape or any([(s, len(p)) for s, p in sorted(unit.items())] != shape for unit in places):
        return None
    arrays = {sites[s]: np.array([unit[s] for unit in places]) for s, _ in shape}
    return {s: array[:, np.argsort(array[0])] for s, array in arrays.items()}
