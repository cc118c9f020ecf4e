"""Weight matching: planted permutations, all permutations tried by hand, and what it may not depend on."""

import itertools
import re

import numpy as np
import pytest
import torch

from permask_core.matching import match_weights, permutation_groups, permute, random_permutations


def mlp_groups(model):
    return permutation_groups(model, torch.zeros(1, 1, 8, 8, dtype=next(model.parameters()).dtype))


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
    with pytest.raises(ValueError, match="along axis 0 of 'fc1.weight'"):
        match_weights(wider, source, target)
    with pytest.raises(ValueError, match="fc3"):
        match_weights(deeper, source, target)
    weights = {name: tensor for name, tensor in source.items() if tensor.ndim > 1}
    with pytest.raises(ValueError, match="fc1.bias"):
        match_weights(groups, weights, weights)
