"""From what was seen of a network's tensors to the units that may change places.

A tracer describes a network as a coloured graph. A vertex is an index along an axis of a parameter, or a block: a
vertex that stands for several others, as an attention head does for its dimensions. An edge says that two vertices are
the same unit, or that one is part of the other. Its colour, and that of a vertex, says everything else that tells them
apart. Any relabelling that keeps the coloured graph keeps the function.

Colours are refined until every vertex's colour tells what surrounds it (the Weisfeiler-Leman algorithm). Units that
then have the same colours, and are parts of the same block, are exchangeable one by one: swapping two of them touches
nothing else. Where that is in doubt (a unit with two parts that cannot be told apart, blocks that cross) nothing is
exchanged.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

UNIFORM, INERT = -1, -2  # instead of a vertex: a constant that any permutation keeps, a value that none may touch


class Site(NamedTuple):
    """An axis of a tensor whose indices are vertices, in these rows of axis 0 only if there are any."""

    tensor: str
    axis: int
    rows: tuple[int, int] | None = None


def colour_of(*names):
    """A colour for anything with a ``repr``: the same in every process, unlike ``hash``."""
    value = np.uint64(14695981039346656037)  # FNV-1a
    with np.errstate(over="ignore"):
        for byte in repr(names).encode():
            value = (value ^ np.uint64(byte)) * np.uint64(1099511628211)
    return value


def mix(x):
    """Scatter colours, so that sums of them hardly ever agree by chance (splitmix64)."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Structure:
    """The coloured graph while it grows. Arrays of vertices may hold ``UNIFORM`` and ``INERT`` too."""

    def __init__(self):
        self.sites, self.reasons, self._blocks = [], {}, {}
        self._vertices, self._same, self._parts, self._marks = [], [], [], []
        self.count = 0

    def axis(self, site, length):
        """New vertices for the indices along an axis of a tensor, int64 [length]."""
        self.sites.append(site)
        return self._new(len(self.sites) - 1, np.arange(length), colour_of("axis", site.tensor, site.axis))

    def _new(self, site, positions, colour):
        n = len(positions)
        self._vertices.append((np.full(n, site), positions, np.full(n, colour)))
        self.count += n
        return np.arange(self.count - n, self.count)

    def same(self, u, v, tags_u, tags_v, name, at):
        """u[k], as its copy tags_u[k], is the unit of v[k], as its copy tags_v[k], says the operation of this name.

        Returns what stands for both, and its tags.
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
        pairs = np.stack([tags_u[constant], tags_v[constant]])  # of two constants, what is made depends on both
        tags[constant] = np.unique(pairs, axis=1, return_inverse=True)[1].ravel()
        return np.where(first, u, v), tags

    def blocks(self, parts, tags, ordered, why):
        """A vertex for each row of ``parts`` [blocks, parts], and its tag; parts that are ``ordered`` keep their
        places in the block."""
        constant = (tags == tags[:, :1]).all()
        result, new_tags = np.empty(len(parts), np.int64), tags[:, 0] if constant else np.zeros(len(parts), np.int64)
        for i, (row, row_tags) in enumerate(zip(parts, np.zeros_like(tags) if constant else tags)):
            if (row == INERT).any():
                self.fix(row, why)
                result[i] = INERT
                continue
            key = (row.tobytes(), row_tags.tobytes(), ordered)
            if key not in self._blocks:
                colour = colour_of("block", ordered, int((row == UNIFORM).sum()))
                (block,) = self._blocks[key] = self._new(-1, np.zeros(1, np.int64), colour)
                real = row >= 0
                places = np.arange(len(row))[real] if ordered else np.zeros(real.sum(), np.int64)
                with np.errstate(over="ignore"):
                    colours = mix(mix(places.astype(np.uint64)) + row_tags[real].astype(np.uint64))
                self._parts.append((row[real], np.full(real.sum(), block), colours))
            result[i] = self._blocks[key][0]
        return result, new_tags

    def mark(self, vertices, colours):
        """Set vertices apart from those without this mark."""
        vertices = np.asarray(vertices).ravel()
        real = vertices >= 0
        self._marks.append((vertices[real], np.broadcast_to(np.asarray(colours, np.uint64), real.shape)[real]))

    def fix(self, vertices, why):
        """Vertices that nothing may permute."""
        for vertex in np.unique(vertices[vertices >= 0]).tolist():
            self.reasons.setdefault(vertex, why)

    def arrays(self):
        """(site, position, colour) of the vertices, then the edges (u, v, colour) and (part, block, colour)."""
        vertices = _joined(self._vertices, (np.int64, np.int64, np.uint64))
        for marked, colours in self._marks:
            with np.errstate(over="ignore"):
                np.add.at(vertices[2], marked, mix(colours))
        return vertices, *(_joined(edges, (np.int64, np.int64, np.uint64)) for edges in (self._same, self._parts))


def _joined(triples, dtypes):
    return [np.concatenate([np.empty(0, dtype), *(t[i] for t in triples)]).astype(dtype)
            for i, dtype in enumerate(dtypes)]


class Orbit(NamedTuple):
    """Units that may be exchanged: their positions [size, block] at each site, the number of each (with those of their
    parts), and the (orbit, unit) that they are within."""

    places: dict[Site, np.ndarray]
    numbers: dict[int, int]
    within: tuple[int, int] | None


def orbits(structure):
    """The sets of exchangeable units, in the order in which the network was followed.

    Returns
    -------
    (list of Orbit, ndarray, dict of int to str)
        The second gives the unit of every vertex, the third says of each parameter vertex in no orbit why it is fixed.
    """
    (site, position, colour), same, parts = structure.arrays()
    unit, tree, crossing = _tree(structure.count, same, parts)
    why = {unit[vertex]: reason for vertex, reason in reversed(structure.reasons.items())}
    why |= dict.fromkeys(crossing - why.keys(), "blocks of units cross each other")
    colour = _settle(colour, unit, site, same, parts, why)
    units = _Units(unit, tree, site, colour)
    found = []
    for alike in units.alike(why.keys()):
        places = _places(structure.sites, [units.vertices(u) for u in alike], site, position)
        found += [(alike, places)] if places and len(places) > 1 else []  # one place is read by nothing
    found.sort(key=lambda orbit: units.first(orbit[0][0]))
    number = {u: (i, j) for i, (alike, _) in enumerate(found) for j, u in enumerate(alike)}
    result = [Orbit(places, {part: j for j, u in enumerate(alike) for part in units.whole(u)},
                    _within(alike[0], tree, number)) for alike, places in found]
    moving = np.isin(unit, [u for orbit in result for u in orbit.numbers])
    fixed = {int(v): why.get(unit[v], "no other unit has the same surroundings")
             for v in np.flatnonzero((site >= 0) & ~moving)}
    return result, unit, fixed


def _settle(colour, unit, site, same, parts, why):
    """Colours refined until two vertices of one unit never have the same; ``why`` gets the units that must be fixed for
    it."""
    while True:
        refined = _refine(_unique(colour, unit, why), same, parts)
        ambiguous = _ambiguous(refined, unit, site, parts) - why.keys()
        if not ambiguous:
            return refined
        why |= dict.fromkeys(ambiguous, "two places of one unit cannot be told apart")


class _Units:
    """Units with their parts, in an order that is the same in exchangeable units."""

    def __init__(self, unit, tree, site, colour):
        self.tree, self.children, self.wholes = tree, defaultdict(list), {}
        for child, above in tree.items():
            for block in above:
                self.children[block].append(child)
        self.members, self.end = _members(unit, site, colour), len(unit)
        self.colours = np.zeros(unit.max(initial=-1) + 1, np.uint64)  # of a unit: those of its vertices, in any order
        with np.errstate(over="ignore"):
            np.add.at(self.colours, unit, mix(colour))

    def whole(self, u):
        """A unit and its parts, and theirs."""
        if u not in self.wholes:
            inside = sorted(self.children.get(u, ()), key=lambda child: (self.colours[child], self.first(child)))
            self.wholes[u] = [u, *(part for child in inside for part in self.whole(child))]
        return self.wholes[u]

    def vertices(self, u):
        """The parameter vertices of a unit and its parts."""
        return [vertex for part in self.whole(u) for vertex in self.members[part]]

    def first(self, u):
        """The first of them in the order of the network, of each part the first by site and colour."""
        return min((self.members[part][0] for part in self.whole(u) if self.members[part]), default=self.end)

    def alike(self, fixed):
        """Lists of two or more units that have the same colours and are part of the same blocks."""
        candidates = defaultdict(list)
        for u, colour in enumerate(self.colours):
            if u not in fixed:
                candidates[colour, tuple(sorted(self.tree.get(u, ())))].append(u)
        return [sorted(units, key=self.first) for units in candidates.values() if len(units) > 1]


def _within(u, tree, number):
    """The nearest block above a unit that may move, as (orbit, unit)."""
    while len(tree.get(u, ())) == 1:
        (u,) = tree[u]
        if u in number:
            return number[u]
    return None


def _tree(n, same, parts):
    """Units (connected by sameness), the blocks that each is directly part of, and the blocks that cross others.

    Two blocks with the same parts are one. Of two blocks of a unit, one may hold the other: then the unit is directly
    part of the smaller only.
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
    """Of each unit the smallest block above it, in a set, and of each two blocks that cross the one with more parts."""
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
    """Units that are part of themselves, which no network should make."""
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
    """Colours of their own for the vertices of fixed units."""
    colour = colour.copy()
    chosen = np.isin(unit, list(fixed))
    with np.errstate(over="ignore"):
        colour[chosen] += mix(mix(np.flatnonzero(chosen).astype(np.uint64)) + colour_of("fixed"))
    return colour


def _refine(colour, same, parts):
    """Colours of vertices by their surroundings, refined until no more can be told apart."""
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
    """Units of which two parameter vertices have one colour, or two blocks that hold different parts."""
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
    """Of each unit the parameter vertices, in the order of sites and colours."""
    members = defaultdict(list)
    real = np.flatnonzero(site >= 0)
    for vertex in real[np.lexsort((colour[real], site[real]))].tolist():
        members[unit[vertex]].append(vertex)
    return members


def _places(sites, units, site, position):
    """Positions [size, block] by site, or None if the units are not alike.

    An entry confined to rows that the unit owns as a whole travels with them.
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
