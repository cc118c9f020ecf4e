"""Groups: by hand for the book's networks, by the function they keep for others, and refused where they would not."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from permask_core.matching import Entry, Group, Tap, check_groups, permutation_groups, permute, random_permutations
from permask_core.models import build_model


def places(entries):
    return [(entry.tensor, entry.axis) for entry in entries]


def assert_kept(model, x, outputs, tolerance=1e-10):
    """The outputs stay, and leaving out any single entry changes them: nothing is missing and nothing is idle."""
    groups, state = permutation_groups(model, x), model.state_dict()
    permutations = random_permutations(groups, seed=1)
    before = outputs(model, state, x)
    moved = permute(groups, permutations, state)
    assert any(not torch.equal(moved[name], state[name]) for name in state)
    scale = before.abs().max()
    assert (outputs(model, moved, x) - before).abs().max() <= tolerance * scale
    for name, group in groups.items():
        for entry in group.entries:
            rest = {name: group._replace(entries=tuple(e for e in group.entries if e is not entry))}
            partly = permute(rest, {name: permutations[name]}, state)
            assert (outputs(model, partly, x) - before).abs().max() > 1e-6 * scale, (name, entry.tensor, entry.axis)
    return groups


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_groups_of_an_mlp(depth):
    groups = permutation_groups(build_model("mlp", (1, 8, 8), 10, width=0.25, depth=depth), torch.zeros(2, 1, 8, 8))
    layers = [f"fc{i}" for i in range(1, depth + 1)]
    assert list(groups) == layers
    for i, (layer, after) in enumerate(zip(layers, [*layers[1:], "head"]), 1):
        assert groups[layer].size == 32
        assert places(groups[layer].entries) == [(f"{layer}.weight", 0), (f"{layer}.bias", 0), (f"{after}.weight", 1)]
        (tap,) = groups[layer].taps
        assert tap[:3] == (f"relu{i}", "output", 1)
        for positions in (tap.positions, *(entry.positions for entry in groups[layer].entries)):
            assert positions.tolist() == [[unit] for unit in range(32)]


def test_a_flatten_gives_each_channel_a_block():
    groups = permutation_groups(build_model("lenet5", (1, 28, 28), 10), torch.zeros(2, 1, 28, 28))
    assert {name: group.size for name, group in groups.items()} == {"conv1": 6, "conv2": 16, "fc1": 120, "fc2": 84}
    assert places(groups["conv2"].entries) == [("conv2.weight", 0), ("conv2.bias", 0), ("fc1.weight", 1)]
    assert groups["conv2"].entries[-1].positions.tolist() == [list(range(25 * c, 25 * c + 25)) for c in range(16)]


def test_groups_of_vgg11_hold_the_statistics_of_batch_norm():
    model = build_model("vgg11", (3, 32, 32), 10, width=0.05, batch_norm=True)
    groups = permutation_groups(model, torch.zeros(1, 3, 32, 32))
    assert list(groups) == [f"conv{i}" for i in range(1, 9)]
    assert places(groups["conv3"].entries) == [
        ("conv3.weight", 0), ("conv3.bias", 0), ("norm3.weight", 0), ("norm3.bias", 0), ("norm3.running_mean", 0),
        ("norm3.running_var", 0), ("conv4.weight", 1)]
    assert places(groups["conv8"].entries)[-1] == ("head.weight", 1)


@pytest.mark.parametrize("name, shape, options", [
    ("mlp", (1, 8, 8), {"depth": 3}), ("lenet5", (1, 8, 8), {}), ("lenet5", (3, 32, 32), {}),
    ("vgg11", (3, 32, 64), {"width": 0.1}), ("vgg11", (3, 32, 32), {"width": 0.1, "batch_norm": True}),
])
def test_moving_the_units_of_our_networks_keeps_the_function(lively, outputs, name, shape, options):
    assert_kept(lively(name, shape, 10, **options), torch.randn(3, *shape, dtype=torch.float64), outputs)


class Functional(nn.Module):
    """As people write networks: functions, views, one pooling for all."""

    def __init__(self, inplace=False, reshape="view"):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 5, 3)
        self.norm, self.pool, self.act = nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU(inplace)
        self.fc1, self.drop, self.fc2, self.fc3 = nn.Linear(20, 7), nn.Dropout(), nn.Linear(7, 6), nn.Linear(6, 3)
        self.inplace, self.reshape = inplace, reshape

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.conv1(x)), inplace=self.inplace))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).contiguous()
        if self.reshape == "view":
            x = x.view(x.size(0), -1)
        elif self.reshape == "reshape":
            x = torch.reshape(x, (x.shape[0], -1))
        else:
            x = torch.flatten(x, 1)
        x = self.drop(self.act(self.fc1(x)))
        return self.fc3(self.act(self.fc2(x)).tanh())


@pytest.mark.parametrize("reshape", ["view", "reshape", "flatten"])
@pytest.mark.parametrize("inplace", [False, True])
def test_functional_networks(lively, outputs, inplace, reshape):
    model = lively(Functional(inplace, reshape))
    groups = assert_kept(model, torch.randn(40, 1, 14, 14, dtype=torch.float64), outputs)
    assert [(name, tap.module, tap.side) for name, group in groups.items() for tap in group.taps] == [
        ("conv1", "pool", "input"), ("conv2", "fc1", "input"), ("fc1", "drop", "input"), ("fc2", "fc3", "input")]
    assert groups["conv2"].taps[0].positions.tolist() == [list(range(4 * c, 4 * c + 4)) for c in range(5)]


class Branches(nn.Module):
    """One layer read by two: the group has an entry in both, and the outputs' units are fixed."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.sigmoid(self.stem(x))
        return self.left(x), self.right(x)


def test_units_read_twice_and_units_that_reach_the_output():
    model = Branches()
    groups = permutation_groups(model, torch.zeros(2, 4))
    assert list(groups) == ["stem"] and [tap.module for tap in groups["stem"].taps] == ["left", "right"]
    assert places(groups["stem"].entries)[2:] == [("left.weight", 1), ("right.weight", 1)]
    x = torch.randn(5, 4)
    moved = permute(groups, random_permutations(groups, seed=1), model.state_dict())
    for old, new in zip(model(x), torch.func.functional_call(model, moved, (x,))):
        torch.testing.assert_close(old, new)


def test_tokens_have_their_units_on_the_last_axis(lively, outputs):
    layers = nn.Linear(3, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    assert_kept(lively(nn.Sequential(*layers)), torch.randn(4, 7, 3, dtype=torch.float64), outputs)


@st.composite
def feedforward(draw):
    """A random chain of layers of every kind that is followed."""
    channels, side, layers = 2, 8, []
    sizes = st.integers(2, 5)
    acts = st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.Identity, lambda: nn.ReLU(inplace=True)])
    for _ in range(draw(st.integers(0, 3))):
        size = draw(sizes)
        layers.append(nn.Conv2d(channels, size, 3, padding=1, bias=draw(st.booleans())))
        layers += [nn.BatchNorm2d(size)] if draw(st.booleans()) else []
        layers.append(draw(acts)())
        pool = draw(st.sampled_from([None, nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)]))
        if pool is not None and side >= 2:
            layers.append(pool)
            side = 2 if isinstance(pool, nn.AdaptiveAvgPool2d) else side // 2
        channels = size
    layers.append(nn.Flatten())
    features = channels * side * side
    for _ in range(draw(st.integers(0, 2))):
        size = draw(sizes)
        layers.append(nn.Linear(features, size, bias=draw(st.booleans())))
        layers += [draw(st.sampled_from([nn.BatchNorm1d, nn.LayerNorm]))(size)] if draw(st.booleans()) else []
        layers += [draw(acts)(), nn.Dropout()]
        features = size
    return nn.Sequential(*layers, nn.Linear(features, 3))


@settings(deadline=None, max_examples=40)
@given(model=feedforward(), seed=st.integers(0, 100))
def test_any_chain_keeps_its_function(model, seed):
    model.double().eval()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    groups = permutation_groups(model, x)
    moved = permute(groups, random_permutations(groups, seed=seed), model.state_dict())
    with torch.no_grad():
        before, after = model(x), torch.func.functional_call(model, moved, (x,))
    assert (before - after).abs().max() <= 1e-10 * max(1, before.abs().max())
    assert len(groups) == sum(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in model) - 1


def test_tracing_leaves_the_model_and_the_random_state_alone():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(108, 2))
    model[2].eval()
    before, random_state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    permutation_groups(model, torch.ones(2, 1, 8, 8))
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


class Block(nn.Module):
    """Two layers around an operation that is not followed."""

    def __init__(self, operation, first=None, last=None):
        super().__init__()
        self.first, self.last = first or nn.Linear(4, 4), last or nn.Linear(4, 4)
        self.operation = operation

    def forward(self, x):
        return self.last(self.operation(self, self.first(x)))


def residual(self, x):
    return x + F.relu(x)


def control_flow(self, x):
    return F.relu(x) if x.sum() > 0 else x


@pytest.mark.parametrize("model, x, message", [
    (Block(residual), torch.ones(2, 4), "operation 'add' cannot be followed"),
    (Block(control_flow), torch.ones(2, 4), "Block cannot be traced by torch.fx (symbolically traced variables"),
    (Block(lambda self, x: torch.cat([x, x], 0)), torch.ones(2, 4), "operation 'cat' cannot be followed"),
    (Block(lambda self, x: x[:, :4]), torch.ones(2, 4), "operation 'getitem' cannot be followed"),
    (Block(lambda self, x: x.mT), torch.ones(2, 4, 4), "operation 'getattr' cannot be followed"),
    (Block(lambda self, x: x * self.last.bias), torch.ones(2, 4), "operation 'mul' cannot be followed"),
    (Block(lambda self, x: self.last(x)), torch.ones(2, 4), "operation 'last' (Linear) is called twice"),
    (Block(lambda self, x: x.view(2, 2, 2).flatten(1)), torch.ones(2, 4), "'view' turns [2, 4] into [2, 2, 2]"),
    (Block(lambda self, x: x.flatten(1), last=nn.Linear(12, 4)), torch.ones(2, 3, 4), "'flatten' turns [2, 3, 4]"),
    (nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=2)), torch.ones(1, 2, 5, 5), "(Conv2d) has grouped"),
    (nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), torch.ones(1, 2, 5, 5), "'1' (GroupNorm) cannot"),
    (nn.Sequential(nn.Linear(4, 4), nn.PReLU(4)), torch.ones(2, 4), "operation '1' (PReLU) cannot be followed"),
    (nn.Sequential(nn.Conv2d(2, 4, 1), nn.Linear(5, 4)), torch.ones(1, 2, 5, 5), "'1' (Linear) works along"),
    (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)), torch.ones(2, 3, 4), "'1' (BatchNorm1d) works along axis 1"),
    (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4))), torch.ones(2, 3, 4), "normalises over the last 2 axes"),
])
def test_what_cannot_be_followed_is_refused_by_name(model, x, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        permutation_groups(model.eval(), x)
    assert "write the groups by hand" in str(error.value)


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("model, x, message", [
    (tied(), torch.ones(2, 4), "0.weight"),
    (nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)), torch.ones(2, 4), "0.weight"),
    (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.ones(4), "'0' (Linear)"),
    (nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)), torch.ones(1, 8, 8), "'0' (Conv2d)"),
], ids=["tied weights", "weight norm", "linear without a batch", "convolution without a batch"])
def test_what_would_be_permuted_wrongly_is_refused(model, x, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        permutation_groups(model, x)


def group(size, *entries):
    return {"g": Group(size, tuple(Entry(tensor, axis, torch.arange(size)[:, None]) for tensor, axis in entries), ())}


@pytest.mark.parametrize("groups, message", [
    (group(3, ("x", 0)), "name none of the tensors w: expected some of x"),
    (group(3, ("w", 2)), "use axis 2 of 'w', whose shape is [3, 4]"),
    (group(3, ("w", 1)), "place 3 indices (up to 2) along axis 1 of 'w', whose shape is [3, 4]"),
    (group(5, ("w", 1)), "place 5 indices (up to 4) along axis 1 of 'w'"),
    ({"a": group(3, ("w", 0))["g"], "b": group(3, ("w", 0))["g"]}, "place 6 indices (up to 2) along axis 0 of 'w'"),
    ({"g": Group(4, (Entry("w", 1, torch.arange(4)),), ())}, "positions of shape [4]: expected [4, block]"),
    ({"g": Group(2, (Entry("w", 1, torch.arange(4)[:, None]),), ())}, "group 'g' has 2 units"),
])
def test_groups_that_do_not_fit_are_named(groups, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_groups(groups, {"w": torch.ones(3, 4)})


def test_groups_that_fit_pass():
    assert check_groups(group(3, ("w", 0), ("elsewhere", 0)), {"w": torch.ones(3, 4)}) is None
    halves = {"a": Group(2, (Entry("w", 1, torch.tensor([[0], [2]])),), ()),
              "b": Group(1, (Entry("w", 1, torch.tensor([[1, 3]])),), (Tap("m", "output", 1, torch.tensor([[1, 3]])),))}
    assert check_groups(halves, {"w": torch.ones(3, 4)}) is None


@pytest.mark.parametrize("last", [nn.LogSoftmax(dim=1), nn.Softmax(dim=-1)])
def test_a_softmax_is_followed(lively, outputs, last):
    net = nn.Sequential(nn.Linear(4, 6), nn.Softmax(dim=1), nn.Linear(6, 3), last)
    groups = assert_kept(lively(net), torch.randn(20, 4, dtype=torch.float64), outputs)
    assert list(groups) == ["0"]
