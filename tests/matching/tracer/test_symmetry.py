"""Orbits: exact on planted structures, and never more than the symmetries of the coloured graph on others."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from permask_core.matching.tracer.symmetry import INERT, UNIFORM, Site, Structure, colour_of, mix, orbits

ZERO = np.zeros(1, np.int64)


def same(structure, u, v, tags=ZERO, name="op"):
    return structure.same(u, v, tags, ZERO, name, f"{name} in here")


def blocks(structure, parts, ordered=False):
    return structure.blocks(np.ascontiguousarray(parts), np.zeros_like(parts), ordered, "their order matters")[0]


def planted(*lengths):
    structure = Structure()
    return structure, *(structure.axis(Site(f"t{i}", 0), n) for i, n in enumerate(lengths))


def found(structure):
    """Positions [size, block] by tensor, and what each orbit is within."""
    return [({site.tensor: places.tolist() for site, places in orbit.places.items()}, orbit.within)
            for orbit in orbits(structure)[0]]


def each(n):
    return [[i] for i in range(n)]


def test_units_of_two_axes_are_exchanged_together():
    structure, a, b = planted(4, 4)
    same(structure, a, b[::-1])
    assert found(structure) == [({"t0": each(4), "t1": each(4)[::-1]}, None)]


def test_an_axis_that_nothing_else_reads_is_no_orbit():
    structure, a, b, c = planted(4, 3, 3)
    same(structure, b, c)
    assert found(structure) == [({"t1": each(3), "t2": each(3)}, None)]
    assert orbits(structure)[2] == dict.fromkeys(range(4), "no other unit has the same surroundings")


def test_marks_and_constants_tell_units_apart():
    structure, a, b, c = planted(6, 6, 6)
    same(structure, a, b)
    structure.mark(a[:2], colour_of("first"))
    same(structure, np.where(np.arange(6) < 4, UNIFORM, c), a)
    assert [places["t0"] for places, _ in found(structure)] == [[[0], [1]], [[2], [3]], [[4], [5]]]


@pytest.mark.parametrize("tags, size", [([0, 0, 0, 0], 4), ([0, 0, 1, 1], 2)])
def test_constants_of_other_tags_are_others(tags, size):
    structure, a, b = planted(4, 4)
    same(structure, a, b)
    same(structure, a, np.full(4, UNIFORM), name="cat")
    structure.same(np.full(4, UNIFORM), a, np.array(tags), ZERO, "cat", "cat")
    assert {len(places["t0"]) for places, _ in found(structure)} == {size}


def test_what_two_constants_make_depends_on_both():
    """(1, 2, 1, 2) and (1, 1, 2, 2) make four."""
    structure = Structure()
    constant = np.full(4, UNIFORM)
    vertices, tags = structure.same(constant, constant, np.array([1, 2, 1, 2]), np.array([1, 1, 2, 2]), "mul", "mul")
    assert (vertices == UNIFORM).all() and len(set(tags.tolist())) == 4


@pytest.mark.parametrize("turned", [False, True])
def test_what_meets_a_fixed_value_is_fixed_and_says_where(turned):
    structure, a, b = planted(4, 4)
    pair = np.where(np.arange(4) < 2, INERT, a), b
    vertices, _ = same(structure, *(pair[::-1] if turned else pair))
    same(structure, a, b)
    if turned:
        vertices = np.where(vertices == b, a, vertices)
    assert vertices.tolist() == [INERT, INERT, *a[2:]]
    assert found(structure) == [({"t0": [[2], [3]], "t1": [[2], [3]]}, None)]
    assert orbits(structure)[2] == dict.fromkeys([0, 1, 4, 5], "they meet fixed values in op in here")


def test_copies_of_one_unit_are_a_block_of_their_positions():
    structure, a, b = planted(3, 6)
    same(structure, np.concatenate([a, a]), b, np.array([0, 0, 0, 1, 1, 1]))
    assert found(structure) == [({"t0": each(3), "t1": [[0, 3], [1, 4], [2, 5]]}, None)]


def test_copies_that_cannot_be_told_apart_are_fixed():
    structure, a, b = planted(3, 6)
    same(structure, np.concatenate([a, a]), b)
    assert found(structure) == []
    assert set(orbits(structure)[2].values()) == {"two entries of one unit cannot be distinguished"}


def test_parts_of_blocks_are_exchanged_within_them():
    structure, a, b, c = planted(6, 6, 2)
    same(structure, a, b)
    same(structure, blocks(structure, a.reshape(2, 3)), c)
    assert found(structure) == [
        ({"t0": [[0], [1], [2]], "t1": [[0], [1], [2]]}, (1, 0)),
        ({"t0": [[0, 1, 2], [3, 4, 5]], "t1": [[0, 1, 2], [3, 4, 5]], "t2": each(2)}, None),
        ({"t0": [[3], [4], [5]], "t1": [[3], [4], [5]]}, (1, 1))]


def test_ordered_parts_move_with_their_block_only():
    structure, a, c = planted(6, 2)
    same(structure, blocks(structure, a.reshape(2, 3), True), c)
    assert found(structure) == [({"t0": [[0, 1, 2], [3, 4, 5]], "t1": each(2)}, None)]


def test_blocks_in_blocks():
    structure, a, b = planted(8, 8)
    same(structure, a, b)
    blocks(structure, a.reshape(4, 2))
    blocks(structure, a.reshape(2, 4))
    shape = sorted((len(places["t0"]), len(places["t0"][0])) for places, _ in found(structure))
    assert shape == [(2, 1)] * 4 + [(2, 2)] * 2 + [(2, 4)]


def test_of_blocks_that_cross_one_kind_is_kept():
    """Rows and columns of a grid: rows are exchanged, columns stay, and so does each unit in its row."""
    structure, a, b = planted(6, 6)
    same(structure, a, b)
    blocks(structure, a.reshape(3, 2))
    blocks(structure, a.reshape(3, 2).T)
    assert found(structure) == [({"t0": [[0, 1], [2, 3], [4, 5]], "t1": [[0, 1], [2, 3], [4, 5]]}, None)]


def test_blocks_that_cannot_move_cross_no_others():
    """Rows and columns of a grid whose columns are numbered: rows are exchanged."""
    structure, a, c, b = planted(6, 6, 2)
    same(structure, a, c)
    blocks(structure, a.reshape(3, 2))
    columns = blocks(structure, a.reshape(3, 2).T)
    same(structure, columns, b)
    structure.mark(b, [colour_of(0), colour_of(1)])
    rows = [[0, 1], [2, 3], [4, 5]]
    assert found(structure) == [({"t0": rows, "t1": rows}, None)]
    assert set(orbits(structure)[2].values()) == {"no other unit has the same surroundings"}


def test_blocks_of_constants_are_constants():
    structure, parts = Structure(), np.full((3, 2), UNIFORM)
    tags = np.array([[0, 1], [1, 0], [1, 1]])
    for ordered, expected in ((False, [0, 0, 1]), (True, [0, 1, 2])):
        vertices, found = structure.blocks(parts, tags, ordered, "why")
        assert vertices.tolist() == [UNIFORM] * 3 and found.tolist() == expected and structure.count == 0


def test_blocks_with_other_constants_are_not_exchanged():
    structure, a, b = planted(4, 4)
    same(structure, a, b)
    parts, tags = np.stack([a, np.full(4, UNIFORM)], 1), np.array([[0, 0], [0, 1], [0, 1], [0, 2]])
    structure.blocks(parts, tags, False, "why")
    assert found(structure) == [({"t0": [[1], [2]], "t1": [[1], [2]]}, None)]


def test_the_reason_of_a_mark_is_given_if_nothing_can_be_exchanged():
    structure, a, b = planted(3, 3)
    same(structure, a, b)
    structure.mark(a, [1, 2, 2], "they are numbered")
    structure.mark(a, [1, 2, 2], "a later reason")
    assert found(structure) == [({"t0": [[1], [2]], "t1": [[1], [2]]}, None)]
    assert orbits(structure)[2] == {0: "they are numbered", 3: "they are numbered"}


def test_a_block_that_is_its_own_part_is_fixed():
    structure, a, b = planted(4, 4)
    same(structure, a, b)
    halves = blocks(structure, a.reshape(2, 2))
    same(structure, a, np.concatenate([halves, halves]))
    assert found(structure) == []


def test_colours_are_scattered():
    assert mix(0) == 0xE220A8397B1DCDAF  # splitmix64's first number from the seed 0, as published
    assert len({int(colour_of("axis", name, axis)) for name in "abc" for axis in range(3)}) == 9
    colours = mix(np.arange(1000))
    assert len(np.unique(colours)) == 1000 and len(np.unique(colours[:, None] + colours)) == 1000 * 1001 // 2


# Random structures, against the definition


@st.composite
def structures(draw):
    """Arrays of vertices that are related whole, as operations relate them: otherwise hardly anything is symmetric."""
    structure, *arrays = planted(*draw(st.lists(st.sampled_from([2, 4, 4, 6]), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(1, 5))):
        a = draw(st.sampled_from(arrays))
        kind = draw(st.sampled_from(["same", "same", "block", "block", "mark", "fix", "twice"]))
        if kind == "same":
            b = draw(st.sampled_from([b for b in arrays if len(b) == len(a)]))
            how = draw(st.sampled_from(["in order", "rolled", "shuffled"]))
            b = {"in order": b, "rolled": np.roll(b, 1), "shuffled": b.reshape(2, -1).T.ravel() if len(b) % 2 == 0
                 else b}[how]
            tags = np.arange(len(a)) >= draw(st.sampled_from([0, len(a) // 2]))
            same(structure, a, b, tags.astype(np.int64), draw(st.sampled_from("pq")))
        elif kind == "block":
            width = draw(st.sampled_from([n for n in (1, 2, 3) if len(a) % n == 0]))
            parts = a.reshape(-1, width) if draw(st.booleans()) else a.reshape(width, -1).T
            arrays.append(blocks(structure, parts, draw(st.booleans())))
        elif kind == "mark":
            structure.mark(a[:draw(st.integers(1, len(a)))], colour_of("mark"))
        elif kind == "fix":
            structure.fix(a[:1], "fixed")
        else:
            arrays.append(np.concatenate([a, a]))
    return structure


def extends(image, colour, edges, todo):
    """Whether a map of vertices that are in no block extends to the others as a symmetry of the coloured graph."""
    if not todo:
        return (colour[image] == colour).all() and all(
            sorted(zip(u, v, tone)) == sorted(zip(image[u], image[v], tone)) for u, v, tone in edges)
    part, block, tone = edges[1]
    first, *rest = todo
    wanted = sorted(zip(image[part[block == first]], tone[block == first]))  # its parts are older than a block
    return any(sorted(zip(part[block == other], tone[block == other])) == wanted
               and extends(np.where(np.arange(len(image)) == first, other, image), colour, edges, rest)
               for other in np.unique(block) if colour[other] == colour[first])


def swaps(structure, orbit):
    """What the exchange of each unit with the next does to the vertices of parameters."""
    site, position, _ = structure.arrays()[0]
    vertex = {(structure.sites[s], p): v for v, (s, p) in enumerate(zip(site, position)) if s >= 0}
    size = len(next(iter(orbit.places.values())))
    for i, j in itertools.pairwise(range(size)):
        image = np.arange(structure.count)
        for where, places in orbit.places.items():
            for p, q in zip(places[i], places[j]):
                image[vertex[where, p]], image[vertex[where, q]] = vertex[where, q], vertex[where, p]
        yield image


@given(structure=structures())
def test_every_exchange_is_a_symmetry(structure):
    result, _, fixed = orbits(structure)
    (site, _, colour), *edges = structure.arrays()
    moved = set()
    for orbit in result:
        for image in swaps(structure, orbit):
            assert all(image[vertex] == vertex for vertex in structure.reasons)
            assert extends(image, colour, edges, np.flatnonzero(site < 0).tolist())
            moved |= set(np.flatnonzero(image != np.arange(len(image))).tolist())
    assert moved.isdisjoint(fixed) and all(fixed.values())
