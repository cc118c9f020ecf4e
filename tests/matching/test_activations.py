"""Activation matching against numpy.corrcoef on activations kept by hand, and planted permutations."""

import gc
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from permask_core.data.splits import Split
from permask_core.matching import (
    Entry,
    Group,
    Tap,
    activation_correlations,
    match_activations,
    permutation_groups,
    permute,
    random_permutations,
)
from permask_core.models import build_model
from permask_core.models.vision import torchvision  # noqa: F401, before transformers, which imports it


def batches_of(shape, n=60, size=25, seed=0):
    x = torch.randn(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return list(x.split(size))


def activations(model, layers, x):
    """What the first ``layers`` of a sequential model give, as an array [units, samples]."""
    with torch.no_grad():
        return model[:layers](x).transpose(0, 1).flatten(1).numpy()


def reference(target, source):
    n = len(target)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.corrcoef(target, source)[:n, n:])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_planted_permutation_is_recovered_20_of_20(lively, depth):
    for seed in range(20):
        model = lively("mlp", (1, 8, 8), 10, width=0.25, depth=depth, seed=seed)
        batches = batches_of((1, 8, 8), n=1000, size=400)
        groups = permutation_groups(model, batches[0])
        planted = random_permutations(groups, seed=seed)
        moved = lively("mlp", (1, 8, 8), 10, width=0.25, depth=depth)
        moved.load_state_dict(permute(groups, planted, model.state_dict()))
        found = match_activations(groups, model, moved, batches)
        assert all(torch.equal(found[name], planted[name]) for name in groups)


def test_correlations_are_numpys_on_all_batches_together(lively):
    source, target = (lively("lenet5", (1, 8, 8), 10, width=0.5, seed=seed) for seed in (0, 1))
    batches = batches_of((1, 8, 8))
    groups = permutation_groups(source, batches[0])
    found, x = activation_correlations(groups, source, target, batches), torch.cat(batches)
    for name, layers in {"conv1": 3, "conv2": 6, "fc1": 9, "fc2": 11}.items():  # what is read next
        expected = reference(activations(target, layers, x), activations(source, layers, x))
        assert found[name].dtype == torch.float64
        np.testing.assert_allclose(found[name], expected, atol=1e-9)


def test_a_large_common_offset_costs_no_precision(lively):
    source, target = (lively(nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 2)), seed=s) for s in (0, 1))
    with torch.no_grad():
        source[0].bias += 1e6
        target[0].bias -= 1e6
    groups = permutation_groups(source, torch.zeros(1, 3).double())
    found = activation_correlations(groups, source, target, batches_of((3,)))
    x = torch.cat(batches_of((3,)))
    np.testing.assert_allclose(found["0"], reference(activations(target, 1, x), activations(source, 1, x)), atol=1e-8)


def test_correlation_has_no_scale(lively):
    """ReLU networks may grow a unit in one layer and shrink it in the next: the match must not notice."""
    model = lively("mlp", (1, 8, 8), 10, width=0.05, depth=1)
    groups, before = permutation_groups(model, batches_of((1, 8, 8))[0]), model.state_dict()
    scaled = lively("mlp", (1, 8, 8), 10, width=0.05, depth=1)
    factor = torch.tensor([1e-8, 1, 1e4, 1, 1, 1], dtype=torch.float64)
    scaled.load_state_dict({**before, "fc1.weight": before["fc1.weight"] * factor[:, None],
                            "fc1.bias": before["fc1.bias"] * factor})
    plain, other = (activation_correlations(groups, net, net, batches_of((1, 8, 8)))["fc1"] for net in (model, scaled))
    np.testing.assert_allclose(other, plain, atol=1e-6)


def test_dead_and_constant_units_have_correlation_zero(lively):
    source, target = (lively("mlp", (1, 8, 8), 10, width=0.05, depth=1, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        source.fc1.weight[2], source.fc1.bias[2] = 0, 0.1  # constant, and no binary fraction
        target.fc1.bias[4] = -1e3  # dead
    groups = permutation_groups(source, batches_of((1, 8, 8))[0])
    correlation = activation_correlations(groups, source, target, batches_of((1, 8, 8)))["fc1"]
    assert correlation[:, 2].abs().max() == 0 and correlation[4].abs().max() == 0
    assert (correlation != 0).sum() == 5 * 5
    found = match_activations(groups, source, target, batches_of((1, 8, 8)))["fc1"]
    assert found.sort().values.tolist() == list(range(6))
    with torch.no_grad():
        source.fc1.bias -= 1e3
    assert activation_correlations(groups, source, target, batches_of((1, 8, 8)))["fc1"].abs().max() == 0


def test_an_in_place_relu_does_not_change_what_was_read_before_it(lively):
    source, target = (lively(nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), seed=seed)
                      for seed in (0, 1))
    x = torch.cat(batches_of((3,)))
    groups = permutation_groups(source, x)
    before_it = {"0": groups["0"]._replace(taps=(Tap("0", "output", 1, groups["0"].taps[0].positions),))}
    for chosen, layers in ((groups, 2), (before_it, 1)):
        found = activation_correlations(chosen, source, target, batches_of((3,)))["0"]
        np.testing.assert_allclose(found, reference(*(activations(m, layers, x) for m in (target, source))), atol=1e-9)


def test_correlations_are_summed_over_taps(lively):
    nets = [lively(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), seed=s) for s in (0, 1)]
    group = permutation_groups(nets[0], torch.zeros(1, 3).double())["0"]
    taps = [Tap("0", "output", 1, group.taps[0].positions), Tap("2", "input", 1, group.taps[0].positions)]
    one, two, both = (activation_correlations({"0": group._replace(taps=chosen)}, *nets, batches_of((3,)))["0"]
                      for chosen in ((taps[0],), (taps[1],), tuple(taps)))
    torch.testing.assert_close(both, one + two)
    assert not torch.allclose(one, two)


def test_models_are_read_in_evaluation_mode_and_come_back_as_they_were():
    nets = [build_model("vgg11", (3, 32, 32), 10, width=0.05, batch_norm=True, seed=seed) for seed in (0, 1)]
    nets[0].norm2.eval()
    nets[1].eval()
    modes = [[module.training for module in net.modules()] for net in nets]
    states = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets]
    groups, batches = permutation_groups(nets[0], torch.zeros(1, 3, 32, 32)), list(torch.randn(2, 4, 3, 32, 32))
    correlations = activation_correlations(groups, *nets, batches)
    assert [[module.training for module in net.modules()] for net in nets] == modes
    assert all(torch.equal(tensor, states[i][name]) for i in (0, 1) for name, tensor in nets[i].state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for net in nets for module in net.modules())
    for net in nets:
        net.eval()
    again = activation_correlations(groups, *nets, batches)
    assert all(torch.equal(again[name], correlations[name]) for name in groups)


def test_a_model_matches_itself(trained, digits):
    groups = permutation_groups(trained, digits.train.x[:2])
    correlations = activation_correlations(groups, trained, trained, [digits.train.x])
    assert all(torch.allclose(c, c.T) and c.abs().max() < 1 + 1e-9 for c in correlations.values())
    found = match_activations(groups, trained, trained, [digits.train.x])
    for name, correlation in correlations.items():
        alive = correlation.diagonal() > 0
        assert alive.any() and torch.equal(found[name][alive], torch.arange(len(alive))[alive])


def test_bad_input_is_named(lively):
    one, two = (build_model("mlp", (1, 8, 8), 10, width=0.05, seed=seed) for seed in (0, 1))
    x = torch.zeros(3, 1, 8, 8)
    groups = permutation_groups(one, x)
    with pytest.raises(ValueError, match="a list without batches: expected at least one input"):
        match_activations(groups, one, two, [])
    with pytest.raises(ValueError, match="got int: expected a split"):
        match_activations(groups, one, two, 3)
    with pytest.raises(ValueError, match="group 'fc2' has no taps"):
        match_activations({**groups, "fc2": groups["fc2"]._replace(taps=())}, one, two, [x])
    with torch.no_grad():
        two.fc1.bias[0] = float("nan")
    with pytest.raises(ValueError, match="group 'fc1' .* not finite"):
        match_activations(groups, one, two, [x])


@pytest.mark.parametrize("options", [{"width": 0.1}, {"width": 0.02}, {"width": 0.05, "depth": 3}])
def test_groups_of_another_network_are_refused(options):
    nets, x = [build_model("mlp", (1, 8, 8), 10, width=0.05, seed=seed) for seed in (0, 1)], torch.randn(3, 1, 8, 8)
    with pytest.raises(ValueError, match="fc"):
        match_activations(permutation_groups(build_model("mlp", (1, 8, 8), 10, **options), x), *nets, [x])


def plain_pair(lively):
    nets = [lively(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), seed=seed) for seed in (0, 1)]
    return permutation_groups(nets[0], torch.zeros(1, 3).double()), nets


def test_batches_come_as_a_loader_or_a_generator_gives_them(lively):
    groups, nets = plain_pair(lively)
    x = torch.cat(batches_of((3,)))
    plain = activation_correlations(groups, *nets, [x])["0"]
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=17)
    for batches in (loader, (part for part in x.split(11)), iter([(x[:20],), (x[20:],)]), list(x.split(1)),
                    x, (x, torch.zeros(len(x))), Split(x, torch.zeros(len(x)))):
        torch.testing.assert_close(activation_correlations(groups, *nets, batches)["0"], plain)
    for bad, kind in ((x.numpy(), "ndarray"), ((), "tuple")):
        with pytest.raises(ValueError, match=f"a batch is {kind}: expected a tensor"):
            match_activations(groups, *nets, [bad])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, left, right):
        return self.head((self.one(left) + self.two(right)).relu())


def test_models_may_have_several_inputs(lively):
    nets = [lively(TwoInputs(), seed=seed) for seed in (0, 1)]
    left, right = torch.randn(20, 3).double(), torch.randn(20, 4).double()
    groups = permutation_groups(nets[0], (left, right))
    named, positional = (activation_correlations(groups, *nets, [batch])["one"] for batch in (
        {"left": left, "right": right, "labels": torch.zeros(20)}, ((left, right), torch.zeros(20))))
    source, target = ((net.one(left) + net.two(right)).relu().detach().T.numpy() for net in nets)
    np.testing.assert_allclose(named, reference(target, source), atol=1e-9)
    assert torch.equal(named, positional)
    assert permutation_groups(nets[0], {"left": left, "right": right}).describe() == groups.describe()


def test_taps_count_axes_from_the_end_and_choose_positions(lively):
    groups, nets = plain_pair(lively)
    group = groups["0"]._replace(taps=(Tap("1", "output", 1),))
    one, same = (activation_correlations({"0": group._replace(taps=(Tap("1", "output", axis),))}, *nets,
                                         batches_of((3,)))["0"] for axis in (1, -1))
    assert torch.equal(one, same)
    order = torch.tensor([3, 1, 4, 0, 2])
    chosen = group._replace(taps=(Tap("1", "output", -1, order[:, None]),))
    reordered = activation_correlations({"0": chosen}, *nets, batches_of((3,)))["0"]
    torch.testing.assert_close(reordered, one[order][:, order])


def test_a_block_of_positions_is_as_many_samples(lively):
    source, target = (lively("lenet5", (1, 8, 8), 10, seed=seed) for seed in (0, 1))
    groups, x = permutation_groups(source, batches_of((1, 8, 8))[0]), torch.cat(batches_of((1, 8, 8)))
    (tap,) = groups["conv2"].taps
    assert (tap.module, tap.side) == ("fc1", "input") and tap.positions.shape[1] > 1
    before = groups["conv2"]._replace(taps=(Tap("pool2", "output", 1),))  # the same numbers before the flatten
    one, other = (activation_correlations({"conv2": group}, source, target, [x])["conv2"]
                  for group in (groups["conv2"], before))
    torch.testing.assert_close(one, other)


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.again(self.again(self.first(x)).tanh()))


def test_every_call_of_a_module_counts(lively):
    nets = [lively(Twice(), seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        for seed, net in enumerate(nets):
            torch.manual_seed(seed)
            for parameter in net.parameters():
                parameter.normal_()
    group, (x,) = Group(4, (), (Tap("again", "output", 1),)), batches_of((3,), size=60)
    group = group._replace(entries=(Entry("again.weight", 0), Entry("again.bias", 0)))
    found = activation_correlations({"again": group}, *nets, list(x.split(20)))["again"]
    with torch.no_grad():
        calls = [(net.again(net.first(x)), net.again(net.again(net.first(x)).tanh())) for net in nets]
    source, target = (torch.cat(both).T.numpy() for both in calls)
    np.testing.assert_allclose(found, reference(target, source), atol=1e-9)


@pytest.mark.parametrize("tap, message", [
    (Tap("7", "output", 1), "group '0' is read at the output of '7', which is not a module of the model"),
    (Tap("1", "outside", 1), "group '0' is read at the outside of '1': expected its input or output"),
    (Tap("2", "output", 1), "whose shape is [25, 2]: expected 5 indices along axis 1"),
    (Tap("1", "output", 3), "whose shape is [25, 5]: expected 5 indices along axis 3"),
    (Tap("1", "output", 1, torch.arange(1, 6)[:, None]), "[25, 5]: expected more than 5 indices along axis 1"),
    (Tap("", "output", 1), "whose shape is [25, 2]"),
])
def test_taps_that_do_not_fit_are_named(tap, message, lively):
    groups, nets = plain_pair(lively)
    with pytest.raises(ValueError, match=re.escape(message)):
        match_activations({"0": groups["0"]._replace(taps=(tap,))}, *nets, batches_of((3,)))


def test_modules_that_give_no_tensor_or_are_not_called_are_named():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "idle": nn.Linear(3, 4)})
    model.forward = lambda x: model["lstm"](x)[0]
    for module, message in (("lstm", "the output of 'lstm', which is of type tuple: expected a tensor"),
                            ("idle", "the output of 'idle', which the model does not call")):
        group = Group(4, (Entry("idle.weight", 0),), (Tap(module, "output", 1),))
        with pytest.raises(ValueError, match=message):
            match_activations({"g": group}, model, model, [torch.randn(5, 2, 3)])


def test_heads_and_their_dimensions_are_matched_by_what_the_dimensions_do(attention):
    for seed in range(5):
        source, target = attention(seed), attention(seed)
        x = torch.randn(50, 7, 5)
        groups = permutation_groups(source, x)
        planted = random_permutations(groups, seed=seed)
        target.load_state_dict(permute(groups, planted, source.state_dict()))
        found = match_activations(groups, source, target, list(x.split(25)))
        assert list(found) == list(groups) and all(torch.equal(found[name], planted[name]) for name in groups)


class Encoder(nn.Module):
    """PyTorch's own attention, which computes its products by functions, and in evaluation mode by a fast path."""

    def __init__(self, seed, context=False):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.context = nn.Linear(4, 8) if context else None
        self.block = nn.MultiheadAttention(8, 2, batch_first=True) if context else nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x, context=None):
        x = self.embed(x)
        return self.head(self.block(x) if context is None else self.block(x, *[self.context(context)] * 2)[0])


class GPT2(nn.Module):
    """The blocks multiply by addmm, with weights [inputs, outputs]."""

    def __init__(self, seed):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        torch.manual_seed(seed)
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=8, n_layer=1, n_head=2, n_inner=6, n_positions=16,
                                                bos_token_id=1, eos_token_id=2))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


ATTENTION = {
    "an encoder": (Encoder, lambda n: torch.randn(n, 4, 5)),
    "other keys": (lambda seed: Encoder(seed, True), lambda n: (torch.randn(n, 4, 5), torch.randn(n, 3, 4))),
    "named inputs": (lambda seed: Encoder(seed, True),
                     lambda n: {"x": torch.randn(n, 4, 5), "context": torch.randn(n, 3, 4)}),
    "GPT-2": (GPT2, lambda n: torch.randint(31, (n, 9))),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_units_of_attention_by_functions_are_matched(name):
    make, draw = ATTENTION[name]
    source, target = make(0), make(0)
    groups, fast = permutation_groups(source, draw(2)), torch.backends.mha.get_fastpath_enabled()
    assert any(group.within for group in groups.values()) and all(group.taps for group in groups.values())
    planted = random_permutations(groups, seed=0)
    target.load_state_dict(permute(groups, planted, source.state_dict()))
    batches = [draw(30), draw(20)]
    found = match_activations(groups, source, target, [(x, None) if isinstance(x, tuple) else x for x in batches])
    assert all(torch.equal(found[name], planted[name]) for name in groups)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_products_with_a_parameter_are_read_also_in_parts():
    """Queries are computed from one input with the first rows of a weight, keys and values from another."""
    nets, batch = [Encoder(seed, True).double() for seed in (0, 1)], (torch.randn(30, 4, 5).double(),
                                                                      torch.randn(30, 4, 4).double())
    group = Group(2, (Entry("head.weight", 1, torch.tensor([[0], [1]])),))
    taps = [Tap("block.in_proj_weight", "output", -1, torch.tensor([[3], [5]]) + start) for start in (0, 8, 16)]
    taps += [Tap("block.out_proj.weight", "input", -1, torch.tensor([[3], [5]]))]
    for tap, part in zip(taps, (0, 1, 2, None)):
        found = activation_correlations({"g": group._replace(taps=(tap,))}, *nets, [(batch, None)])["g"]
        units = []
        for net in nets:
            x, context = net.embed(batch[0]), net.context(batch[1])
            with torch.no_grad():
                q, k, v = (F.linear(given, w, b) for given, w, b in zip(
                    (x, context, context), net.block.in_proj_weight.chunk(3), net.block.in_proj_bias.chunk(3)))
                y = F.scaled_dot_product_attention(*(t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)))
                values = (q, k, v)[part] if part is not None else y.transpose(1, 2).flatten(2)
            units.append(values[..., [3, 5]].flatten(0, 1).T.numpy())
        np.testing.assert_allclose(found, reference(units[1], units[0]), atol=1e-9)


def test_groups_that_cannot_be_read_are_named_and_can_be_left_out(lively):
    groups, nets = plain_pair(lively)
    groups["more"] = groups["0"]._replace(taps=())
    del groups["0"]
    with pytest.raises(ValueError, match=re.escape("group 'more' has no taps") + ".*Exclude such groups"):
        match_activations(groups, *nets, batches_of((3,)))
    left = {name: group for name, group in groups.items() if group.taps}
    with pytest.raises(ValueError, match="there are no groups: expected at least one"):
        match_activations(left, *nets, batches_of((3,)))


def test_only_moments_outlive_a_batch(lively):
    """What is held while a batch is read does not grow with the number of batches."""
    groups, nets = plain_pair(lively)
    alive = []
    gc.freeze()  # what all tests have imported need not be searched again for each batch

    def batches():
        for _ in range(5):
            yield torch.randn(1000, 3, dtype=torch.float64)
            gc.collect()
            alive.append(sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() == 5000))

    activation_correlations(groups, *nets, batches())
    assert len(alive) == 5 and max(alive[1:]) <= alive[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_a_cpu_gives(lively):
    groups, nets = plain_pair(lively)
    here = activation_correlations(groups, *nets, batches_of((3,)))["0"]
    there = activation_correlations(groups, *(net.cuda() for net in nets), batches_of((3,)))["0"]
    torch.testing.assert_close(there, here)


def test_complex_activations_are_matched():
    def make():
        return nn.Sequential(nn.Linear(3, 5, dtype=torch.cdouble), nn.Tanh(), nn.Linear(5, 2, dtype=torch.cdouble))

    group = Group(5, (Entry("0.weight", 0), Entry("0.bias", 0), Entry("2.weight", 1)), (Tap("2", "input", 1),))
    source, target, x = make(), make(), torch.randn(60, 3, dtype=torch.cdouble)
    found = activation_correlations({"0": group}, source, target, list(x.split(20)))["0"]
    one, other = (net[:2](x).detach().T.numpy() for net in (target, source))
    np.testing.assert_allclose(found, reference(one, other).real, atol=1e-9)
    planted = random_permutations({"0": group}, seed=0)
    target.load_state_dict(permute({"0": group}, planted, source.state_dict()))
    assert torch.equal(match_activations({"0": group}, source, target, [x])["0"], planted["0"])
