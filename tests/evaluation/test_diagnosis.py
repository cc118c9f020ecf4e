"""The merge doctor: faults that are planted in networks, most of them exact copies of each other, must be named first.

No network is trained: layers are random, and the last one is fitted by ridge regression.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from permask_core.evaluation.diagnosis import diagnose
from permask_core.matching import (
    Entry,
    Group,
    Groups,
    permutation_groups,
    permute,
    random_permutations,
    reset_batchnorm,
)
from permask_core.training import evaluate


@pytest.fixture(scope="module")
def data(digits):
    return digits.train.x[:500], digits.train.y[:500]


def with_head(net, data, sharpness=12.0):
    """Fit the last layer to one-hot targets, so that the network is right without any training."""
    (x, y), (*body, head) = data, net
    with torch.no_grad():
        units = nn.Sequential(*body).eval()(x).double()
        units = torch.cat([units, torch.ones(len(units), 1)], 1)
        goals = sharpness * (nn.functional.one_hot(y, head.out_features) - 1 / head.out_features).double()
        fit = torch.linalg.solve(units.T @ units + len(x) * 1e-2 * torch.eye(units.shape[1]), units.T @ goals)
        head.weight.copy_(fit[:-1].T), head.bias.copy_(fit[-1])
    return net


def perceptron(data, seed=0, width=48, norm=False, activation=nn.ReLU):
    torch.manual_seed(seed)

    def layer(inputs):
        return [nn.Linear(inputs, width), *[nn.BatchNorm1d(width)] * norm, activation()]

    net = nn.Sequential(nn.Flatten(), *layer(64), *layer(width), nn.Linear(width, 10))
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(2 / module.in_features) ** 0.5)
            nn.init.normal_(module.bias, std=0.3)
    return with_head(reset_batchnorm(net, [data[0]]) if norm else net, data)


def shuffled(net, data, seed=1):
    groups = permutation_groups(net, data[0][:2])
    return loaded(net, permute(groups, random_permutations(groups, seed=seed), net.state_dict()))


def loaded(net, state):
    net = copy.deepcopy(net)
    net.load_state_dict(state)
    return net


def changed(net, **layers):
    """A copy whose tensors are changed by functions, with _ for dots in their names."""
    state = {name: layers.get(name.replace(".", "_"), lambda tensor: tensor)(tensor)
             for name, tensor in net.state_dict().items()}
    return loaded(net, state)


class Parallel(nn.Module):
    """A stream of two halves: blocks read the first, which does not change, and write into the second."""

    def __init__(self, half=24, hidden=24, blocks=4):
        super().__init__()
        self.half, self.embed = half, nn.Linear(64, half)
        self.read = nn.ModuleList(nn.Linear(2 * half, hidden) for _ in range(blocks))
        self.write = nn.ModuleList(nn.Linear(hidden, 2 * half) for _ in range(blocks))

    def forward(self, x):
        x = nn.functional.pad(self.embed(x.flatten(1)), (0, self.half))
        for read, write in zip(self.read, self.write):
            x = x + write(read(x).relu())
        return x


class Sorted(nn.Module):
    """The order of units before a sort does not matter, which tracing does not see."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 48), nn.Linear(48, 48)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).sort(1).values).relu()


# ---- Faults: each returns A, B and options ---------------------------------------------------------------------------

def healthy(data):
    a = perceptron(data)
    return a, shuffled(a, data), {}


def healthy_with_norms(data):
    a = perceptron(data, norm=True)
    return a, shuffled(a, data), {}


def destroyed_statistics(data):
    a, b, _ = healthy_with_norms(data)
    wrong = {"2_running_var": lambda t: 100 * t, "5_running_mean": lambda t: t - 3}
    return a, changed(b, **wrong), {}


def scaled_inputs(data):
    a, b, _ = healthy(data)
    return a, changed(b, **{"1_weight": lambda t: t / 16}), {}


def exchanged_outputs(data):
    a, b, _ = healthy(data)
    return a, changed(b, **{f"5_{name}": lambda t: t.roll(3, 0) for name in ("weight", "bias")}), {}


def missing_entry(data):
    a, b, _ = healthy(data)
    groups = permutation_groups(a, data[0][:2])
    groups = {name: group._replace(entries=tuple(e for e in group.entries if e.tensor != "3.weight" or e.axis == 0))
              for name, group in groups.items()}
    return a, b, {"groups": Groups(groups)}


def missing_group(data):
    a, b, _ = healthy(data)
    return a, b, {"groups": dict([*permutation_groups(a, data[0][:2]).items()][1:])}


def local_optimum(data):
    """Between two layers of units, the weight of each unit to its own successor is so large that no layer can move
    alone, and from no start is the right order found; the activations show it."""
    a = perceptron(data)
    a = changed(a, **{"3_weight": lambda t: 0.1 * t + 30 * torch.eye(len(t)), "3_bias": lambda t: 0 * t})
    a = with_head(a, data)
    groups = permutation_groups(a, data[0][:2])
    order = torch.arange(48).roll(1)
    return a, loaded(a, permute(groups, dict.fromkeys(groups, order), a.state_dict())), {}


def torn_stream(data):
    """In B, the outputs of each block are in an order of their own. Its head is fitted to them, so B is right."""
    torch.manual_seed(0)
    half = 24
    a = nn.Sequential(Parallel(half), nn.Linear(2 * half, 10))
    with torch.no_grad():
        for read, write in zip(a[0].read, a[0].write):
            nn.init.normal_(read.weight, std=0.5), nn.init.normal_(write.weight, std=0.3)
            read.weight[:, half:] = write.weight[:half] = write.bias[:half] = 0
    b = copy.deepcopy(a)
    with torch.no_grad():
        for i, write in enumerate(b[0].write):
            for tensor in (write.weight, write.bias):
                tensor[half:] = tensor[half:].roll(5 * i + 1, 0)
    return with_head(a, data), with_head(b, data), {}


def unseen_symmetry(data):
    torch.manual_seed(0)
    a = with_head(nn.Sequential(Sorted(), nn.Linear(48, 10)), data)
    return a, changed(a, **{f"0_first_{name}": lambda t: t.roll(7, 0) for name in ("weight", "bias")}), {}


def other_activation(data):
    a, b, _ = healthy(data)
    other = perceptron(data, activation=nn.Tanh)
    other.load_state_dict(b.state_dict())
    return a, with_head(other, data), {}


def other_shape(data):
    return perceptron(data), perceptron(data, width=40), {}


def untrained(data):
    a, b, _ = healthy(data)
    return a, changed(b, **{f"5_{name}": lambda t: torch.randn_like(t) for name in ("weight", "bias")}), {}


def half_of_the_classes(data):
    a, b, _ = healthy(data)
    seen = data[1] < 5
    return a, with_head(b, (data[0][seen], data[1][seen])), {}


def different_units(data):
    """The inputs of the units of A and of B have no correlation: they read different principal components."""
    components = torch.linalg.svd(data[0].flatten(1) - data[0].flatten(1).mean(0), full_matrices=False).Vh
    read = (own.T @ own for own in (components[::2], components[1::2]))
    nets = [changed(perceptron(data), **{"1_weight": lambda t, own=own: 2 * t @ own}) for own in read]
    return *(with_head(net, data) for net in nets), {}


def scaled_units(data):
    """Another symmetry of ReLU: a unit times c, and its outgoing weights divided by c."""
    a = perceptron(data)
    c = 10 ** torch.linspace(-1, 1, 48)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    b = changed(a, **{"3_weight": lambda t: c[:, None] * t, "3_bias": lambda t: c * t, "5_weight": lambda t: t / c})
    return a, shuffled(b, data), {}


FAULTS = [(destroyed_statistics, "statistics"), (scaled_inputs, "inputs"), (exchanged_outputs, "outputs"),
          (missing_entry, "groups"), (missing_group, "groups"), (local_optimum, "search"),
          (torn_stream, "residual stream"), (unseen_symmetry, "fixed units"), (other_activation, "architecture"),
          (other_shape, "architecture"), (untrained, "data"), (half_of_the_classes, "data"),
          (different_units, "different units"), (scaled_units, "unexplained")]


@pytest.mark.parametrize("plant, cause", FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_planted_fault_is_named_first(plant, cause, data):
    a, b, options = plant(data)
    before = [copy.deepcopy(net.state_dict()) for net in (a, b)]
    found = diagnose(a, b, data, **options)
    assert [one.cause for one in found.findings][:1] == [cause], found
    assert found.findings[0].text in str(found)
    for net, state in zip((a, b), before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("plant", [healthy, healthy_with_norms])
def test_a_shuffled_copy_is_healthy(plant, data):
    a, b, _ = plant(data)
    found = diagnose(a, b, data)
    assert found.findings == () and found.rise == pytest.approx(0, abs=1e-4) and found.control == 1
    assert all(one["correlation"] == pytest.approx(1) and one["without"] == 0 for one in found.units.values())
    assert "A and B merge" in str(found)


def test_two_networks_at_chance_do_not_count_as_merged(data):
    torch.manual_seed(0)
    a, b = (changed(perceptron(data, seed), **{"5_weight": torch.randn_like, "5_bias": torch.randn_like})
            for seed in (0, 1))
    found = [one for one in diagnose(a, b, data).findings if one.certain]
    assert [one.cause for one in found] == ["data", "data"] and {one.text[0] for one in found} == {"A", "B"}


def test_the_remedies_of_a_planted_fault_restore_the_loss_exactly(data):
    a, b, options = missing_entry(data)
    found = diagnose(a, b, data, **options)
    own = evaluate(a, data).loss
    assert found.halfway["traced groups"]["none"] == pytest.approx(own, abs=1e-4)
    assert found.rise == pytest.approx(found.halfway["matched"]["none"] - own) and found.findings[0].share == 1
    assert "3.weight[1]" in found.findings[0].text


def test_the_shares_of_two_faults_add_up_to_one(data):
    a, b, _ = destroyed_statistics(data)
    groups = permutation_groups(a, data[0][:2])
    groups["1"] = groups["1"]._replace(entries=groups["1"].entries[:-1])
    found = diagnose(a, b, data, groups=groups)
    assert {one.cause for one in found.findings} == {"groups", "statistics"}
    assert sum(one.share for one in found.findings) == pytest.approx(1, abs=1e-3)
    assert min(one.share for one in found.findings) > 0.05


def test_the_control_and_streams_of_a_torn_stream(data):
    a, b, _ = torn_stream(data)
    found = diagnose(a, b, data)
    (layers,) = found.streams.values()
    written = [values for name, values in layers.items() if "write" in name]
    assert len(written) == 4 and all(alone == pytest.approx(1) for _, alone, _ in written)
    assert sum(tied > 0.8 for tied, _, _ in written) <= 1  # the common order may be that of one block
    assert all(chance < 0.8 for _, _, chance in written) and found.control == 1


@pytest.mark.parametrize("made", [
    lambda x, y: [(x[:250], y[:250]), (x[250:], y[250:])], lambda x, y: iter([(x[:250], y[:250]), (x[250:], y[250:])]),
    lambda x, y: DataLoader(TensorDataset(x, y), batch_size=250), lambda x, y: [{"input": x, "labels": y}]])
def test_data_in_any_form(made, data):
    a, b, _ = exchanged_outputs(data)
    same = diagnose(a, b, data)
    found = diagnose(a, b, made(*data))
    assert found.findings[0].cause == "outputs" and found.rise == pytest.approx(same.rise, rel=1e-3)


@pytest.mark.parametrize("change, said", [
    ({"restarts": 0}, "restarts is 0: expected an integer of at least 1"),
    ({"groups": {"1": Group(3, (Entry("1.weight", 0),))}}, "group '1' has 3 units"),
    ({"batches": torch.zeros(4, 1, 8, 8)}, "the data have no targets"),
    ({"model_b": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "model_a": nn.Sequential(nn.Flatten(), nn.Linear(
        64, 10))}, "Sequential has no units that can be permuted: they .* the network's input")])
def test_what_cannot_be_diagnosed(change, said, data):
    a = perceptron(data)
    with pytest.raises(ValueError, match=said):
        diagnose(**({"model_a": a, "model_b": a, "batches": data} | change))
