"""Weight matching: planted permutations, all permutations tried by hand, and what it may not depend on."""

import functools
import itertools
import re
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from permask_core.matching import Entry, Group, match_weights, permutation_groups, permute, random_permutations, weights
from permask_core.matching.permutations import assign, permute_
from permask_core.matching.similarity import Similarities
from permask_core.matching.weights import _similarity
from permask_core.models import build_model
from tests.hypotheses import LONG, examples


def mlp_groups(model):
    return permutation_groups(model, torch.zeros(1, 1, 8, 8, dtype=next(model.parameters()).dtype))


def rises(objective):
    """Never falls, and strictly rises until it stays."""
    steps = [after - before for before, after in itertools.pairwise(objective)]
    return all(step > 0 for step in steps[:-1]) and steps[-1] >= 0


def inner_product(groups, one, other):
    names = {entry.tensor for group in groups.values() for entry in group.entries if "running" not in entry.tensor}
    return sum(float((one[name].double() * other[name].double()).sum()) for name in names)


def distance(one, other):
    return sum(float(((one[name] - other[name]) ** 2).sum()) for name in one if "running" not in name)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_planted_permutation_is_recovered_20_of_20(lively, depth):
    for seed in range(20):
        model = lively("mlp", (1, 8, 8), 10, width=0.25, depth=depth, seed=seed)
        groups, source = mlp_groups(model), model.state_dict()
        planted = random_permutations(groups, seed=seed)
        found = match_weights(groups, source, permute(groups, planted, source), seed=seed)
        assert all(torch.equal(found[name], planted[name]) for name in groups)
        back = match_weights(groups, permute(groups, planted, source), source, seed=seed)
        assert all(torch.equal(back[name], planted[name].argsort()) for name in groups)  # the other direction


@pytest.mark.parametrize("name, shape, options", [
    ("lenet5", (1, 28, 28), {}), ("vgg11", (3, 32, 32), {"width": 0.1}),
    ("vgg11", (3, 32, 32), {"width": 0.1, "batch_norm": True})])
def test_convolutions_are_recovered_too(name, shape, options, lively):
    model = lively(name, shape, 10, **options)
    groups, source = permutation_groups(model, torch.zeros(1, *shape, dtype=torch.float64)), model.state_dict()
    planted = random_permutations(groups, seed=1)
    found = match_weights(groups, source, permute(groups, planted, source))
    assert all(torch.equal(found[name], planted[name]) for name in groups)


@pytest.mark.parametrize("name, options", [
    ("mlp", {}), ("vgg11", {"width": 0.25}), ("resnet20", {"width": 1}), ("resnet20", {"width": 4}),
    ("resnet20", {"width": 1, "shortcut": "padded"})])
def test_planted_permutations_are_recovered_in_float32_10_of_10(name, options, lively):
    groups = permutation_groups(build_model(name, (3, 32, 32), 10, **options), torch.zeros(2, 3, 32, 32))
    for seed in range(10 if LONG or options.get("width") != 4 else 3):
        source = lively(name, (3, 32, 32), 10, seed=seed, **options).float().state_dict()
        planted = random_permutations(groups, seed=seed)
        found = match_weights(groups, source, permute(groups, planted, source), seed=seed)
        assert all(torch.equal(found[name], planted[name]) for name in groups)
        assert rises(found.objective)


def test_a_search_that_stalls_is_helped_by_restarts():
    """A new ResNet, whose BatchNorms are all equal, is anchored weakly: one search in forty or so stalls, this one
    where it was tried."""
    model = build_model("resnet20", (3, 32, 32), 10, seed=4, width=4)
    groups, source = permutation_groups(model, torch.zeros(2, 3, 32, 32)), model.state_dict()
    planted = random_permutations(groups, seed=4)
    found = match_weights(groups, source, permute(groups, planted, source), seed=4, restarts=3)
    assert all(torch.equal(found[name], planted[name]) for name in groups)


@pytest.mark.parametrize("width", [3 / 128, 5 / 128, 6 / 128])
@pytest.mark.parametrize("seed", range(3))
def test_one_hidden_layer_is_as_good_as_trying_all_permutations(lively, width, seed):
    """With one group the problem is one linear assignment, so that the optimum is certain."""
    nets = [lively("mlp", (1, 8, 8), 10, width=width, depth=1, seed=s) for s in (seed, 100 + seed)]
    (source, target), groups = (net.state_dict() for net in nets), mlp_groups(nets[0])
    a, b = ({name: tensor.numpy() for name, tensor in state.items()} for state in (source, target))

    def cost(order):
        order = np.array(order)
        return (np.square(a["fc1.weight"][order] - b["fc1.weight"]).sum()
                + np.square(a["fc1.bias"][order] - b["fc1.bias"]).sum()
                + np.square(a["head.weight"][:, order] - b["head.weight"]).sum())

    best = min(itertools.permutations(range(groups["fc1"].size)), key=cost)
    assert match_weights(groups, source, target)["fc1"].tolist() == list(best)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_networks_come_closer_and_no_single_group_can_gain_more(lively, seed, dtype):
    nets = [lively("mlp", (1, 8, 8), 10, width=0.1, depth=3, seed=s).to(dtype) for s in (seed, 50 + seed)]
    (source, target), groups = (net.state_dict() for net in nets), mlp_groups(nets[0])
    moved = permute(groups, match_weights(groups, source, target, seed=seed), source)
    assert distance(moved, target) < distance(source, target)
    for name, group in groups.items():  # a local optimum: no two units of a group should change places
        for i, j in itertools.combinations(range(group.size), 2):
            swap = torch.arange(group.size)
            swap[[i, j]] = swap[[j, i]]
            assert distance(permute(groups, {name: swap}, moved), target) >= distance(moved, target) * (1 - 1e-6)


def test_only_the_seed_decides(lively):
    nets = [lively("mlp", (1, 8, 8), 10, width=0.25, depth=4, seed=seed) for seed in (0, 1)]
    (source, target), groups = (net.state_dict() for net in nets), mlp_groups(nets[0])
    before = {name: tensor.clone() for name, tensor in source.items()}
    torch.manual_seed(1)
    one = match_weights(groups, source, target, seed=3)
    torch.manual_seed(2)
    random_state = torch.get_rng_state()
    same = match_weights(groups, source, target, seed=3)
    others = [match_weights(groups, source, target, seed=seed) for seed in range(5)]
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(one[name], same[name]) for name in groups)
    assert any(not torch.equal(one[name], other[name]) for other in others for name in groups)
    assert all(torch.equal(source[name], before[name]) for name in source)


def test_running_statistics_are_moved_but_not_matched(lively):
    options = {"width": 0.1, "batch_norm": True}
    model, other = (lively("vgg11", (3, 32, 32), 10, seed=seed, **options) for seed in (0, 1))
    groups = permutation_groups(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    source, target = model.state_dict(), other.state_dict()
    found = match_weights(groups, source, target)
    shifted = {name: tensor * 1000 if "running" in name else tensor for name, tensor in source.items()}
    assert all(torch.equal(found[name], perm) for name, perm in match_weights(groups, shifted, target).items())
    moved = permute(groups, found, source)
    assert torch.equal(moved["norm1.running_var"], source["norm1.running_var"][found["conv1"]])


def states(lively, **options):
    source, target = lively("mlp", (1, 8, 8), 10, width=0.1), lively("mlp", (1, 8, 8), 10, width=0.1, **options)
    return mlp_groups(source), dict(source.state_dict()), dict(target.state_dict())


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_named(lively, side, value):
    groups, source, target = states(lively)
    for state, name in ((source, "source"), (target, "target")):
        if name == side:
            state["fc2.weight"] = state["fc2.weight"].clone()
            state["fc2.weight"][1, 2] = float(value)
    with pytest.raises(ValueError, match="'fc2.weight' holds NaN or infinite"):
        match_weights(groups, source, target)


def test_two_different_networks_are_refused(lively):
    groups, source, target = states(lively, depth=3)
    with pytest.raises(ValueError, match="'fc3.weight' is in the target only"):
        match_weights(groups, source, target)
    with pytest.raises(ValueError, match="'fc3.weight' is in the source only"):
        match_weights(groups, target, source)
    target = {**source, "fc1.bias": torch.ones(26)}
    with pytest.raises(ValueError, match=re.escape("'fc1.bias' has shape [13] in the source and [26] in the target")):
        match_weights(groups, source, target)


def test_groups_of_another_network_are_refused(lively):
    groups, source, target = states(lively)
    wider = mlp_groups(lively("mlp", (1, 8, 8), 10, width=0.2))
    deeper = mlp_groups(lively("mlp", (1, 8, 8), 10, width=0.1, depth=3))
    with pytest.raises(ValueError, match="'fc1' has 26 units, its entry for 'fc1.weight' along axis 0 .* 13 indices"):
        match_weights(wider, source, target)
    with pytest.raises(ValueError, match="fc3"):
        match_weights(deeper, source, target)
    weights = {name: tensor for name, tensor in source.items() if tensor.ndim > 1}
    with pytest.raises(ValueError, match="fc1.bias"):
        match_weights(groups, weights, weights)


def test_groups_of_statistics_alone_are_refused():
    state = {"norm.running_mean": torch.zeros(3)}
    with pytest.raises(ValueError, match="at least one weight to match"):
        match_weights({"norm": Group(3, (Entry("norm.running_mean", 0),))}, state, state)


@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=5), seed=st.integers(0, 2**32),
       restarts=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_objective_is_that_of_the_result_and_never_falls(sizes, seed, restarts, dtype):
    generator = torch.Generator().manual_seed(seed)
    sizes = [3, *sizes, 2]
    source, target = ({f"{i}.weight": torch.randn(n, m, generator=generator).to(dtype)
                       for i, (m, n) in enumerate(itertools.pairwise(sizes))} for _ in range(2))
    groups = {str(i): Group(n, (Entry(f"{i}.weight", 0), Entry(f"{i + 1}.weight", 1)))
              for i, n in enumerate(sizes[1:-1])}
    found = match_weights(groups, source, target, seed=seed, restarts=restarts)
    assert rises(found.objective)
    assert found.objective[-1] == pytest.approx(inner_product(groups, permute(groups, found, source), target), abs=1e-9)
    alone = match_weights(groups, source, target, seed=seed)
    assert alone.objective[0] == pytest.approx(inner_product(groups, source, target), abs=1e-9)
    assert found.objective[-1] >= alone.objective[-1]


def test_restarts_can_find_more_and_the_seed_decides_which():
    source, target = (build_model("mlp", (1, 8, 8), 10, width=0.1, depth=4, seed=seed).state_dict() for seed in (0, 1))
    groups = mlp_groups(build_model("mlp", (1, 8, 8), 10, width=0.1, depth=4))
    one, many, same = (match_weights(groups, source, target, restarts=n) for n in (1, 10, 10))
    assert many.objective[-1] > one.objective[-1]
    assert all(torch.equal(many[name], same[name]) for name in groups)
    for bad in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match=re.escape(f"restarts is {bad!r}")):
            match_weights(groups, source, target, restarts=bad)


def reference(names, source, target, seed):
    """Algorithm 1 of Git Re-Basin for a chain of matrices, in numpy: every group in every sweep, nothing kept."""
    orders = [np.arange(len(source[name])) for name in names[:-1]]
    generator, before = torch.Generator().manual_seed(seed), -np.inf

    def moved(i):
        rows = orders[i] if i < len(orders) else slice(None)
        return source[names[i]][rows][:, orders[i - 1] if i else slice(None)]

    def objective():
        return sum((moved(i) * target[name]).sum() for i, name in enumerate(names))

    while (now := objective()) > before + 1e-12 * abs(now):
        before = now
        for i in torch.randperm(len(orders), generator=generator).tolist():
            similarity = target[names[i]] @ moved(i).T + target[names[i + 1]].T @ moved(i + 1)
            orders[i] = orders[i][linear_sum_assignment(similarity, maximize=True)[1]]
    return orders


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), seed=st.integers(0, 2**32))
def test_it_is_algorithm_1_of_git_re_basin(sizes, seed):
    random, sizes = np.random.default_rng(seed), [3, *sizes, 2]
    source, target = ({f"{i}": random.normal(size=(n, m)) for i, (m, n) in enumerate(itertools.pairwise(sizes))}
                      for _ in range(2))
    groups = {f"{i}": Group(n, (Entry(f"{i}", 0), Entry(f"{i + 1}", 1))) for i, n in enumerate(sizes[1:-1])}
    found = match_weights(groups, *({name: torch.from_numpy(w) for name, w in state.items()}
                                    for state in (source, target)), seed=seed)
    expected = reference(list(source), source, target, seed)
    assert [found[name].tolist() for name in groups] == [order.tolist() for order in expected]


class Forgetful(Similarities):
    """Similarities that are all computed when they are asked for."""

    def __call__(self, names):
        self.kept.clear()
        return super().__call__(names)


@examples(1 / 4)
@given(seed=st.integers(0, 2**32), rounded=st.booleans())
def test_keeping_similarities_changes_no_result(attention, attention_groups, seed, rounded):
    """Also where units are tied, as they are among small whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    source, target = ({name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
                      for state in [attention(0).state_dict()] * 2)
    if rounded:
        source, target = ({name: tensor.round() for name, tensor in state.items()} for state in (source, target))
    kept = match_weights(attention_groups, source, target, seed=seed)
    with patch.object(weights, "Similarities", Forgetful):
        computed = match_weights(attention_groups, source, target, seed=seed)
    assert all(torch.equal(kept[name], computed[name]) for name in attention_groups)


def recurrent(seed, n=5):
    """Two networks x -> x + relu(W x), whose W has both axes in the one group; and that group."""
    generator = torch.Generator().manual_seed(seed)
    states = [{"embed": torch.randn(n, 2, generator=generator).double() / 4,
               "W": torch.randn(n, n, generator=generator).double()} for _ in range(2)]
    return {"x": Group(n, (Entry("embed", 0), Entry("W", 0), Entry("W", 1)))}, *states


def test_a_step_that_would_lose_is_refused_where_one_group_owns_both_axes():
    losing = 0
    for seed in range(40):
        groups, source, target = recurrent(seed)
        found = match_weights(groups, source, target)
        assert rises(found.objective)
        assert found.objective[-1] == pytest.approx(inner_product(groups, permute(groups, found, source), target))
        (a, w), (b, v) = (state.values() for state in (source, target))
        linear = (b @ a.T + v @ w.T + v.T @ w).numpy()
        step = max(itertools.permutations(range(5)), key=lambda order: linear[range(5), order].sum())
        stepped = permute(groups, {"x": step}, source)
        losing += inner_product(groups, stepped, target) < inner_product(groups, source, target) - 1e-9
    assert losing > 0  # or the test would show nothing


def test_tied_units_are_permuted_the_same_way_every_time(lively):
    source, target = (lively("mlp", (1, 8, 8), 10, width=0.1, seed=seed).state_dict() for seed in (0, 1))
    dead = torch.tensor([1, 4, 5, 9])
    source, target = ({name: tensor.clone() for name, tensor in state.items()} for state in (source, target))
    for state in (source, target):
        state["fc1.weight"][dead], state["fc1.bias"][dead], state["fc2.weight"][:, dead] = 0, 0, 0
    groups = mlp_groups(lively("mlp", (1, 8, 8), 10, width=0.1))
    one, same = (match_weights(groups, source, target) for _ in range(2))
    assert torch.equal(one["fc1"], same["fc1"]) and one["fc1"].sort().values.tolist() == list(range(13))
    assert set(one["fc1"][dead].tolist()) == set(dead.tolist())  # living units only gain by meeting living ones here


@pytest.fixture(scope="module")
def attention_groups(attention):
    groups = permutation_groups(attention(0), torch.randn(2, 7, 5))
    assert sum(group.within is not None for group in groups.values()) == 8
    return groups


def test_heads_and_their_dimensions_are_recovered_10_of_10(attention, attention_groups):
    for seed in range(10):
        source = attention(seed).state_dict()
        planted = random_permutations(attention_groups, seed=seed)
        target = permute(attention_groups, planted, source)
        found = match_weights(attention_groups, source, target, seed=seed)
        assert all(torch.equal(found[name], planted[name]) for name in attention_groups) and rises(found.objective)


@examples(1 / 4)
@given(seed=st.integers(0, 2**32), restarts=st.integers(1, 2))
def test_permuting_leads_where_the_search_through_heads_ended(attention, attention_groups, seed, restarts):
    generator = torch.Generator().manual_seed(seed)
    source, target = ({name: torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}
                      for state in [attention(0).state_dict()] * 2)
    found = match_weights(attention_groups, source, target, seed=seed, restarts=restarts)
    moved = permute(attention_groups, found, source)
    assert rises(found.objective)
    assert found.objective[-1] == pytest.approx(inner_product(attention_groups, moved, target))


@examples(1 / 2)
@given(seed=st.integers(0, 2**32), visits=st.lists(st.integers(0, 4), max_size=12))
def test_similarities_that_are_kept_are_those_of_the_moment(seed, visits):
    """A matrix with both axes in one group, a tensor with two axes in one and the third in another, blocks behind a
    flatten, and the rows of a grouped convolution."""
    generator, blocks = torch.Generator().manual_seed(seed), torch.arange(12).view(6, 2)
    first, second = torch.arange(8).view(2, 4, 1)
    one, two = torch.arange(4).view(2, 2, 1)
    shapes = {"in": (6, 99), "W": (6, 6), "cube": (6, 6, 4), "flat": (8, 12), "grouped": (4, 4, 3), "out": (2, 4)}
    moved, goal = ({name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}
                   for _ in range(2))
    groups = {"x": Group(6, (Entry("in", 0), Entry("W", 0), Entry("W", 1), Entry("cube", 0), Entry("cube", 1),
                             Entry("flat", 1, blocks))),
              "y1": Group(4, (Entry("flat", 0, first), Entry("grouped", 1, None, (0, 2)), Entry("cube", 2))),
              "y2": Group(4, (Entry("flat", 0, second), Entry("grouped", 1, None, (2, 4)))),
              "z1": Group(2, (Entry("grouped", 0, one), Entry("out", 1, one))),
              "z2": Group(2, (Entry("grouped", 0, two), Entry("out", 1, two)))}
    similarities = Similarities(groups, goal, moved, _similarity)
    for visit in visits:
        name = list(groups)[visit]
        step = {name: assign(similarities([name])[0, 0])}
        permute_(groups, step, moved)
        similarities.update(step)
    assert similarities.kept.keys() <= groups.keys() and (similarities.kept or not visits)
    for name, similarity in similarities.kept.items():
        torch.testing.assert_close(similarity, _similarity([groups[name]], goal, moved))


def three_levels():
    """12 rows: 2 units of 2 units of 3."""
    whole = torch.arange(12)
    groups = {"outer": Group(2, (Entry("w", 0, whole.view(2, 6)),))}
    for i in range(2):
        groups[f"middle{i}"] = Group(2, (Entry("w", 0, whole.view(2, 2, 3)[i]),), within=("outer", i))
        for j in range(2):
            groups[f"inner{i}{j}"] = Group(3, (Entry("w", 0, whole.view(2, 2, 3, 1)[i, j]),), within=(f"middle{i}", j))
    return groups


@examples(1 / 2)
@given(seed=st.integers(0, 2**32))
def test_three_levels_deep(seed):
    groups, generator = three_levels(), torch.Generator().manual_seed(seed)
    source, target = ({"w": torch.randn(12, 5, generator=generator)} for _ in range(2))
    planted = random_permutations(groups, seed=seed)
    moved = permute(groups, planted, source)
    found = match_weights(groups, source, moved, seed=seed)
    assert all(torch.equal(found[name], planted[name]) for name in groups)
    found = match_weights(groups, source, target, seed=seed, restarts=3)
    assert rises(found.objective)
    assert found.objective[-1] == pytest.approx(inner_product(groups, permute(groups, found, source), target), rel=1e-6)
    products = (target["w"] @ source["w"].T).numpy()
    assert found.objective[-1] == pytest.approx(products[range(12), nested_orders()].sum(1).max(), rel=1e-5)


@functools.cache
def nested_orders():
    """All orders of 12 rows that keep two levels of blocks together, an array [orders, 12]."""
    triples = list(itertools.permutations(range(3)))
    halves = [[3 * a + i for a, inner in zip(order, inners) for i in inner]
              for order in itertools.permutations(range(2)) for inners in itertools.product(triples, repeat=2)]
    return np.array([[6 * a + i for a, half in zip(order, pair) for i in half]
                     for order in itertools.permutations(range(2)) for pair in itertools.product(halves, repeat=2)])


def test_parts_that_differ_from_unit_to_unit_are_refused():
    groups, state = three_levels(), {"w": torch.randn(12, 5)}
    shuffled = groups["inner11"]._replace(entries=(Entry("w", 0, torch.tensor([[11], [9], [10]])),))
    other = {"w": permute(groups, random_permutations(groups, seed=0), state)["w"]}
    with pytest.raises(ValueError, match="are not at the same positions of each unit in 'w'"):
        for seed in range(20):
            match_weights({**groups, "inner11": shuffled},
                          {"w": torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))}, other)
    del groups["inner11"]
    with pytest.raises(ValueError, match="within units 0 and 1 of 'middle1' differ"):
        match_weights(groups, state, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_a_cpu_gives():
    source = build_model("resnet20", (3, 32, 32), 10).state_dict()
    groups = permutation_groups(build_model("resnet20", (3, 32, 32), 10), torch.zeros(2, 3, 32, 32))
    planted = random_permutations(groups, seed=0)
    target = permute(groups, planted, source)
    there = [{name: tensor.cuda() for name, tensor in state.items()} for state in (source, target)]
    for found in (match_weights(groups, source, target, device="cuda"), match_weights(groups, *there)):
        assert all(torch.equal(found[name], planted[name]) for name in groups)


def test_complex_weights_are_matched():
    """Also by their imaginary parts alone."""
    groups = {"hidden": Group(7, (Entry("in", 0), Entry("out", 1)))}
    source = {"in": torch.complex(torch.zeros(7, 3), torch.randn(7, 3)), "out": torch.randn(4, 7, dtype=torch.cfloat)}
    planted = random_permutations(groups, seed=0)
    target = permute(groups, planted, source)
    found = match_weights(groups, source, target)
    assert torch.equal(found["hidden"], planted["hidden"])
    assert found.objective[-1] == pytest.approx(float(sum(tensor.abs().square().sum() for tensor in source.values())))
    alone = {"hidden": groups["hidden"]._replace(entries=groups["hidden"].entries[:1])}
    assert torch.equal(match_weights(alone, source, target)["hidden"], planted["hidden"])
