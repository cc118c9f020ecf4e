"""Statistics of interpolated networks: against all samples together, training's own, and the goal of REPAIR."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from permask_core.evaluation.connectivity import evaluate_mixtures, interpolate_network
from permask_core.matching import match_activations, permutation_groups, permute
from permask_core.matching.batchnorm import interpolate, repair, reset_batchnorm
from permask_core.models import build_model
from permask_core.sparse import FanInLinear
from permask_core.training import Recipe, evaluate, fit


def statistics(model, names, x):
    """(means, standard deviations) of what layers give in evaluation mode, by name."""
    found, handles = {}, []
    for name in names:
        layer = model.get_submodule(name)
        axis = -1 if isinstance(layer, nn.Linear) else 1

        def keep(_, inputs, output, name=name, axis=axis):
            units = output.detach().movedim(axis, 0).flatten(1).clone()
            found[name] = units.mean(1), units.std(1, correction=0)

        handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def small(seed=0, **options):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                         nn.Linear(6 * 16, 5), nn.BatchNorm1d(5, **options)).double()


def images(n=40, seed=0):
    return torch.randn(n, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def test_interpolation_is_linear_and_ends_at_both_networks():
    a, b = (build_model("resnet8", (3, 8, 8), 10, seed=seed).state_dict() for seed in (0, 1))
    a["norm1.num_batches_tracked"] += 7
    for alpha, state in ((0, a), (1, b)):
        assert all(torch.equal(tensor, state[name]) for name, tensor in interpolate(a, b, alpha).items()
                   if tensor.is_floating_point())
    middle = interpolate(a, b, 0.25)
    assert middle.keys() == a.keys() and middle["norm1.num_batches_tracked"] == 7
    torch.testing.assert_close(middle["conv1.weight"], 0.75 * a["conv1.weight"] + 0.25 * b["conv1.weight"])
    torch.testing.assert_close(interpolate(a, b, 2)["conv1.weight"], 2 * b["conv1.weight"] - a["conv1.weight"])
    wide = build_model("resnet8", (3, 8, 8), 10, width=2).state_dict()
    with pytest.raises(ValueError, match=re.escape("'conv1.weight' has shape [16, 3, 3, 3] in the source and [32, 3")):
        interpolate(a, wide, 0.5)
    with pytest.raises(ValueError, match="'head.weight' is in the source only"):
        interpolate(a, {name: tensor for name, tensor in b.items() if name != "head.weight"}, 0.5)


def test_one_batch_gives_what_training_on_it_leaves():
    model, x = small().eval(), images()
    trained = copy.deepcopy(model)
    for module in trained:
        module.train(isinstance(module, nn.modules.batchnorm._BatchNorm))
        module.momentum = 1.0
    with torch.no_grad():
        trained(x)
    assert reset_batchnorm(model, [x]) is model
    assert not torch.equal(model[1].running_mean, torch.zeros(6))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name])


def test_statistics_are_pooled_over_batches_of_any_size():
    model, x = small(), images(60)
    reset_batchnorm(model, iter([(x[:13], None), (x[13:20],), x[20:]]))
    units = model[0](x).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, units.mean(1))
    torch.testing.assert_close(model[1].running_var, units.var(1))
    assert model[1].num_batches_tracked == 3
    later = []
    for part in (x[:13], x[13:20], x[20:]):  # each normalised by itself
        normal = nn.functional.batch_norm(model[0](part), None, None, model[1].weight, model[1].bias, training=True)
        later.append(model[5](model[4](model[2](normal))).detach())
    torch.testing.assert_close(model[6].running_mean, torch.cat(later).mean(0))
    torch.testing.assert_close(model[6].running_var, torch.cat(later).var(0))


def test_everything_else_stays_also_after_an_error():
    model = small()
    model[3].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    def unchanged():
        return ([module.training for module in model.modules()] == modes
                and all(norm.track_running_stats and norm.momentum == 0.1 for norm in (model[1], model[6]))
                and not any(module._forward_hooks for module in model.modules()))

    for batches, message in (([], "a list without batches"), ([images(), "x"], "a batch is str"),
                             ([images() * float("nan")], "an activation at '1' is not finite")):
        with pytest.raises(ValueError, match=message):
            reset_batchnorm(model, batches)
        assert unchanged() and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    random_state = torch.get_rng_state()
    reset_batchnorm(model, [images()])
    assert unchanged() and torch.equal(random_state, torch.get_rng_state())  # no dropout
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{norm}.{name}" for norm in (1, 6)
                       for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_what_cannot_be_reset_is_named():
    with pytest.raises(ValueError, match="Sequential has no BatchNorm: expected at least one layer"):
        reset_batchnorm(build_model("mlp", (1, 8, 8), 10), [torch.zeros(3, 1, 8, 8)])
    with pytest.raises(ValueError, match="BatchNorm '6' has no running statistics"):
        reset_batchnorm(small(track_running_stats=False), [images()])


NETWORKS = {"mlp": ("mlp", {"depth": 3, "width": 0.2}), "vgg11": ("vgg11", {"width": 0.1}),
            "vgg11 with BatchNorm": ("vgg11", {"width": 0.1, "batch_norm": True}), "resnet8": ("resnet8", {})}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def pair(request, lively):
    """Two networks, some inputs, and the names of their layers but the last."""
    name, options = request.param
    nets = [lively(name, (3, 32, 32), 10, seed=seed, **options) for seed in (0, 1)]
    x = torch.randn(64, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for net in nets:
        if name == "resnet8" or "batch_norm" in options:
            reset_batchnorm(net, [x])
    return nets, x


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_units_have_the_interpolated_mean_and_deviation(pair, alpha):
    (source, target), x = pair
    states = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in (source, target)]
    repaired = repair(source, target, [x], alpha=alpha)
    norms = {name for name, module in source.named_modules() if isinstance(module, nn.BatchNorm2d)}
    layers = norms or {name for name, module in source.named_modules()
                       if isinstance(module, (nn.Linear, nn.Conv2d)) and name != "head"}
    plain = copy.deepcopy(target)
    plain.load_state_dict(interpolate(source.state_dict(), target.state_dict(), alpha))
    a, b, found, before = (statistics(net, layers, x) for net in (source, target, repaired, plain))
    assert layers
    for name in layers:
        for i in (0, 1):  # BatchNorm's epsilon, and n - 1 for n
            goal = (1 - alpha) * a[name][i] + alpha * b[name][i]
            torch.testing.assert_close(found[name][i], goal, rtol=0.02 if norms else 1e-8, atol=0.01 if norms else 1e-8)
    assert any(not torch.allclose(before[name][1], found[name][1], rtol=0.1) for name in layers)
    for net, state in zip((source, target), states):
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert repaired.state_dict().keys() == target.state_dict().keys()


def test_two_equal_networks_are_repaired_to_themselves(pair):
    (net, _), x = pair
    same = repair(net, copy.deepcopy(net), [x])
    with torch.no_grad():
        before, after = net.eval()(x), same.eval()(x)
    assert (after - before).abs().max() < 1e-3 * before.std()
    assert not isinstance(net[0], nn.Flatten) or (after - before).abs().max() < 1e-9  # a plain network: exactly


def test_what_is_not_corrected_stays_interpolated():
    """The output layer, layers without a bias, and tied ones."""
    def make(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6),
                            nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        net[4].weight = net[2].weight
        return net

    source, target = make(0), make(1)
    repaired = repair(source, target, [torch.randn(50, 4)]).state_dict()
    middle = interpolate(source.state_dict(), target.state_dict(), 0.5)
    changed = {name for name in middle if not torch.equal(middle[name], repaired[name])}
    assert changed == {"6.weight", "6.bias"}


def test_a_unit_that_is_constant_between_gets_its_mean():
    def make(sign):
        net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).double()
        for parameter in net.parameters():
            nn.init.constant_(parameter, 1.0)
        nn.init.constant_(net[0].weight, sign)
        return net

    x = torch.tensor([[1.0], [3.0]]).double()
    repaired = repair(make(-1.0), make(1.0), [x])  # the weight between is 0
    assert repaired[0](x).flatten().tolist() == [1.0, 1.0] and repaired[0].weight.item() == 0


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_repair_stays_between_the_networks(alpha, trained, digits):
    with pytest.raises(ValueError, match=f"alpha is {alpha!r}: expected a number in"):
        repair(trained, trained, [digits.train.x], alpha=alpha)
    with pytest.raises(ValueError, match="a list without batches"):
        repair(trained, trained, [])


def test_networks_that_differ_or_explode_are_named(trained, digits):
    other = build_model("mlp", digits.input_shape, digits.classes, width=0.5)
    with pytest.raises(ValueError, match="'fc1.weight' has shape"):
        repair(trained, other, [digits.train.x])
    with pytest.raises(ValueError, match="an activation at 'fc1' is not finite"):
        repair(trained, trained, [digits.train.x * float("inf")])


@pytest.mark.parametrize("name, options, rises", [("mlp", {"depth": 4}, False), ("resnet8", {}, True)])
def test_between_two_trained_networks(name, options, rises, digits):
    """Accuracy halfway. Unmatched networks gain much from REPAIR; matched ones do where they have BatchNorm."""
    nets = [build_model(name, digits.input_shape, digits.classes, seed=seed, **options) for seed in (0, 1)]
    for seed, net in enumerate(nets):
        fit(net, digits.train, Recipe(8), seed=seed, description=None)
    groups, batches = permutation_groups(nets[0], digits.train.x[:2]), list(digits.train.x.split(500))
    moved, between = copy.deepcopy(nets[0]), copy.deepcopy(nets[0])
    moved.load_state_dict(permute(groups, match_activations(groups, *nets, batches), nets[0].state_dict()))
    accuracy = {}
    for kind, source in (("unmatched", nets[0]), ("matched", moved)):
        between.load_state_dict(interpolate(source.state_dict(), nets[1].state_dict(), 0.5))
        accuracy[kind] = evaluate(between, digits.test).accuracy
        accuracy[kind, "repaired"] = evaluate(repair(source, nets[1], batches), digits.test).accuracy
    assert accuracy["unmatched", "repaired"] > accuracy["unmatched"] + 0.1
    assert accuracy["matched", "repaired"] > accuracy["unmatched"] + 0.1
    assert accuracy["matched", "repaired"] > accuracy["matched"] + (0.2 if rises else -0.05)
    if rises:
        assert evaluate(reset_batchnorm(between, batches), digits.test).accuracy > accuracy["matched"] + 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_a_cpu_gives():
    nets, x = [small(seed) for seed in (0, 1)], images()
    here = repair(*nets, [x]).state_dict()
    there = repair(*(net.cuda() for net in nets), [x]).state_dict()
    for name, tensor in here.items():
        torch.testing.assert_close(there[name].cpu(), tensor)


# What a line between two states is, and where there is none

def flat(seed, *layers):
    torch.manual_seed(seed)
    return nn.Sequential(*(layer() for layer in layers)).double()


NORMED = [lambda: weight_norm(nn.Linear(4, 6)), nn.ReLU, lambda: weight_norm(nn.Linear(6, 5)), nn.ReLU,
          lambda: nn.Linear(5, 3)]


def test_complex_weights_are_interpolated():
    a, b = ({"w": torch.randn(3, 2, dtype=torch.complex64)} for _ in range(2))
    torch.testing.assert_close(interpolate(a, b, 0.25)["w"], 0.75 * a["w"] + 0.25 * b["w"])
    assert torch.equal(interpolate(a, b, 0)["w"], a["w"]) and torch.equal(interpolate(a, b, 1)["w"], b["w"])


def test_complex_units_are_repaired():
    nets = [nn.Sequential(nn.Linear(3, 4, dtype=torch.complex128), nn.Linear(4, 2, dtype=torch.complex128))
            for _ in range(2)]
    x = torch.randn(50, 3, dtype=torch.complex128)
    repaired = repair(*nets, [x], alpha=0.25)
    source, target, found = (net[0](x).detach() for net in (*nets, repaired))
    torch.testing.assert_close(found.mean(0), 0.75 * source.mean(0) + 0.25 * target.mean(0))
    torch.testing.assert_close(found.std(0), 0.75 * source.std(0) + 0.25 * target.std(0))


def test_sparse_layers_with_other_indices_are_only_interpolated_at_the_ends():
    a, b = (FanInLinear(8, 4, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for alpha, end in ((0, a), (1, b)):
        state = interpolate(a.state_dict(), b.state_dict(), alpha)
        assert all(torch.equal(state[name], tensor) for name, tensor in end.state_dict().items())
        layer = interpolate_network(a, a.state_dict(), b.state_dict(), alpha)
        assert torch.equal(layer(x := torch.randn(5, 8)), end(x))
    for attempt in (interpolate, lambda *states: interpolate_network(a, *states)):
        with pytest.raises(ValueError, match=re.escape("'indices' holds integers (torch.int32) that differ")):
            attempt(a.state_dict(), b.state_dict(), 0.5)
    with torch.no_grad():
        same = FanInLinear(8, 4, 3, indices=a.indices)
    middle = interpolate_network(a, a.state_dict(), same.state_dict(), 0.25)
    torch.testing.assert_close(middle.to_dense().weight, 0.75 * a.to_dense().weight + 0.25 * same.to_dense().weight)


def test_counts_of_batches_and_extra_states_are_those_of_the_end():
    a, b = ({"n.num_batches_tracked": torch.tensor(i), "_extra_state": {"version": i}} for i in (3, 5))
    assert [interpolate(a, b, alpha) for alpha in (0, 0.5, 1)] == [a, a, b]


def test_weights_with_weight_norm_are_interpolated_themselves():
    """And not their lengths and directions, whose scale is arbitrary."""
    nets = [flat(seed, *NORMED) for seed in (0, 1)]
    with torch.no_grad():
        nets[0][0].parametrizations.weight.original1 *= 100  # does not change the weight
    states = [net.state_dict() for net in nets]
    found = interpolate_network(nets[0], *states, 0.25)
    assert found.state_dict().keys() == states[0].keys()
    for i in (0, 2, 4):
        torch.testing.assert_close(found[i].weight, 0.75 * nets[0][i].weight + 0.25 * nets[1][i].weight)
        torch.testing.assert_close(found[i].bias, 0.75 * nets[0][i].bias + 0.25 * nets[1][i].bias)
    for alpha, net in zip((0, 1), nets):
        assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in interpolate_network(
            nets[0], *states, alpha).state_dict().items())
    for attempt in (lambda: interpolate(*states, 0.5), lambda: evaluate_mixtures(nets[0], states, [[.5, .5]], [])):
        with pytest.raises(ValueError, match="'0.parametrizations.weight.original0' is not a weight, but an argument"):
            attempt()


def test_the_older_weight_norm_is_refused_and_the_newer_one_loads_its_state():
    def older():
        return nn.utils.weight_norm(nn.Linear(4, 6).double())

    nets = [flat(seed, older, nn.ReLU, lambda: nn.Linear(6, 3)) for seed in (0, 1)]
    states = [net.state_dict() for net in nets]
    for attempt in (lambda: interpolate(*states, 0.5), lambda: interpolate_network(nets[0], *states, 0.5)):
        with pytest.raises(ValueError, match="'0.weight_g' is the length .* expected networks with "
                                             "torch.nn.utils.parametrizations.weight_norm, which loads such a state"):
            attempt()
    newer = [flat(0, lambda: weight_norm(nn.Linear(4, 6)), nn.ReLU, lambda: nn.Linear(6, 3)) for _ in states]
    for net, state in zip(newer, states):
        net.load_state_dict(state)
    found = interpolate_network(newer[0], *(net.state_dict() for net in newer), 0.25)
    torch.testing.assert_close(found[0].weight, 0.75 * nets[0][0].weight + 0.25 * nets[1][0].weight)


def test_layers_with_weight_norm_are_repaired_like_plain_ones():
    nets, x = [flat(seed, *NORMED) for seed in (0, 1)], torch.randn(50, 4).double()
    plain = [flat(0, lambda: nn.Linear(4, 6), nn.ReLU, lambda: nn.Linear(6, 5), nn.ReLU, lambda: nn.Linear(5, 3))
             for _ in nets]
    for net, own in zip(nets, plain):
        own.load_state_dict({f"{i}.{name}": getattr(net[i], name) for i in (0, 2, 4) for name in ("weight", "bias")})
    one, other = repair(*nets, [x], alpha=0.3), repair(*plain, [x], alpha=0.3)
    assert parametrize.is_parametrized(one[0])
    torch.testing.assert_close(one(x), other(x))


def test_pruned_layers_are_repaired_and_stay_pruned():
    nets, x = [flat(seed, lambda: nn.Linear(4, 6), nn.ReLU, lambda: nn.Linear(6, 3)) for seed in (0, 1)], torch.randn(
        50, 4).double()
    mask = torch.rand(6, 4) < 0.6
    plain = [copy.deepcopy(net) for net in nets]
    with torch.no_grad():
        for net, masked in zip(nets, plain):
            masked[0].weight *= mask
            prune.custom_from_mask(net[0], "weight", mask)
            net(x)
    one, other = repair(*nets, [x]), repair(*plain, [x])
    torch.testing.assert_close(one(x), other(x))
    assert torch.equal(one[0].weight_mask, mask) and not one[0].weight[~mask].any() and one[0].training
    prune.l1_unstructured(nets[1][0], "weight", 3)
    with pytest.raises(ValueError, match="'0.weight_mask' holds values of a mask that differ between the states"):
        repair(*nets, [x])


@pytest.mark.parametrize("norm, message", [
    (nn.utils.parametrizations.spectral_norm, "'0.weight' is computed by a parametrization or a mask that cannot give"),
    (nn.utils.parametrizations.orthogonal, "'0.weight' is computed by a parametrization or a mask that cannot give"),
    (nn.utils.spectral_norm, "'0.weight' is not a parameter, but computed by a hook"),
])
def test_weights_that_cannot_be_set_are_named(norm, message):
    nets = [flat(seed, lambda: norm(nn.Linear(4, 4)), nn.ReLU, lambda: nn.Linear(4, 3)) for seed in (0, 1)]
    with pytest.raises(ValueError, match=message):
        repair(*nets, [torch.randn(20, 4).double()])


class Tied(nn.Module):
    def __init__(self, tied=True, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x).relu())


@pytest.mark.parametrize("missing", [("head.weight", None), (None, "embed.weight"), ("embed.weight", "head.weight"),
                                     ("head.weight",) * 2])
def test_a_tied_tensor_may_have_one_of_its_names(missing):
    nets = [Tied(seed=seed) for seed in (0, 1)]
    states = [{name: tensor for name, tensor in net.state_dict().items() if name != left}
              for net, left in zip(nets, missing)]
    found = interpolate_network(nets[0], *states, 0.25)
    torch.testing.assert_close(found.head.weight, 0.75 * nets[0].head.weight + 0.25 * nets[1].head.weight)
    assert found.head.weight is found.embed.weight


def test_a_tied_tensor_may_not_have_two_values():
    tied, loose = Tied(), Tied(tied=False, seed=1)
    message = "'embed.weight' and 'head.weight' are one tensor in the model, but differ in the source"
    with pytest.raises(ValueError, match=message):
        interpolate_network(tied, loose.state_dict(), tied.state_dict(), 0.5)
    with pytest.raises(ValueError, match=message):
        repair(loose, tied, [torch.randn(5, 4)])
    found = interpolate_network(loose, loose.state_dict(), tied.state_dict(), 1)
    assert torch.equal(found.head.weight, tied.head.weight)
