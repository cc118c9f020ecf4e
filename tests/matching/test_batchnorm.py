"""Statistics of interpolated networks: against all samples together, training's own, and the goal of REPAIR."""

import copy
import re

import pytest
import torch
from torch import nn

from permask_core.matching import match_activations, permutation_groups, permute
from permask_core.matching.batchnorm import interpolate, repair, reset_batchnorm
from permask_core.models import build_model
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
