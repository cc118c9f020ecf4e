"""The self-check: it passes what is right, names what is wrong, and is not fooled by networks that say nothing."""

import re
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from permask_core.data.batches import arguments
from permask_core.matching import (
    Entry,
    Group,
    Groups,
    check_function,
    derangements,
    draw_weights,
    function_change,
    permutation_groups,
)
from permask_core.models import build_model

X = torch.zeros(4, 8)


def net():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


RIGHT = {"0": Group(6, (Entry("0.weight", 0), Entry("0.bias", 0), Entry("1.weight", 0), Entry("1.bias", 0),
                        Entry("1.running_mean", 0), Entry("1.running_var", 0), Entry("3.weight", 1))),
         "3": Group(5, (Entry("3.weight", 0), Entry("3.bias", 0), Entry("5.weight", 1)))}


def without(group, tensor, axis):
    entries = tuple(entry for entry in RIGHT[group].entries if (entry.tensor, entry.axis) != (tensor, axis))
    assert len(entries) == len(RIGHT[group].entries) - 1
    return {**RIGHT, group: RIGHT[group]._replace(entries=entries)}


def test_groups_by_hand_that_are_right_pass():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    change = check_function(RIGHT, model, X)
    assert isinstance(change, float) and 0 < change < 1e-12
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("group, entry", [(name, entry) for name, group in RIGHT.items() for entry in group.entries])
def test_a_missing_entry_is_found_and_its_group_named(group, entry):
    """Also of a new network, whose biases and norms are equal or zero."""
    wrong = without(group, entry.tensor, entry.axis)
    with pytest.raises(ValueError, match=f"permuting group '{group}' changes the outputs by .* less than 1e-09"):
        check_function(wrong, net(), X)


@pytest.mark.parametrize("wrong", [
    {"out": Group(3, (Entry("5.weight", 0), Entry("5.bias", 0)))},
    {"in": Group(8, (Entry("0.weight", 1),))},
    {"two": Group(5, (*RIGHT["3"].entries, Entry("0.weight", 0, torch.arange(5)[:, None])))},
    {"part": Group(2, tuple(entry._replace(positions=torch.tensor([[0], [i]])) for i, entry in
                            enumerate(RIGHT["3"].entries, 1)))},
], ids=["outputs", "inputs", "two kinds of units", "wrong positions"])
def test_units_that_may_not_move_are_found(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"permuting group '{name}'"):
        check_function(wrong, net(), X)


def test_groups_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="group '0' has 7 units, its entry for '0.weight' along axis 0"):
        check_function({"0": Group(7, (Entry("0.weight", 0),))}, net(), X)


def test_the_worst_group_is_named_of_several():
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())), nn.Linear(6, 2))
    groups = permutation_groups(model, torch.zeros(2, 6))
    groups["2"] = groups["2"]._replace(entries=groups["2"].entries[:-1])
    with pytest.raises(ValueError, match="permuting group '2'"):
        check_function(groups, model, torch.zeros(2, 6))


def test_tracing_checks_itself_on_request(monkeypatch):
    checked = []
    monkeypatch.setattr("permask_core.matching.tracer.trace.check_function",
                        lambda *given, outputs: checked.append(given))
    model = net()
    assert permutation_groups(model, X) and not checked
    groups = permutation_groups(model, X, check=True)
    assert checked[0][0] is groups and checked[0][1] is model and checked[0][2] is X


def test_no_groups_change_nothing():
    assert check_function(Groups(), net(), X) == 0
    assert check_function({}, nn.Sequential(nn.Linear(8, 3), nn.Dropout()), X) == 0


class Noisy(nn.Module):
    """Random in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b((self.a(x) + torch.randn(len(x), 1, dtype=x.dtype)).relu())


def test_randomness_of_a_network_is_no_change():
    groups = {"a": Group(6, (Entry("a.weight", 0), Entry("a.bias", 0), Entry("b.weight", 1)))}
    model, random_state = Noisy(), torch.get_rng_state()
    assert check_function(groups, model, X) < 1e-12
    assert torch.equal(torch.get_rng_state(), random_state)


class Said(nn.Module):
    """What a network answers, made of the hidden units of a right one."""

    def __init__(self, answer):
        super().__init__()
        self.a, self.b, self.answer = nn.Linear(8, 6), nn.Linear(6, 3), answer

    def forward(self, x):
        return self.answer(self.b(self.a(x).relu()))


GROUP = {"a": Group(6, (Entry("a.weight", 0), Entry("a.bias", 0), Entry("b.weight", 1)))}


@pytest.mark.parametrize("answer", [
    lambda y: y[:1, :1], lambda y: y.sum(), lambda y: (y, {"more": [y[:, 0]]}), lambda y: y.argmax(1),
    lambda y: (y, None, 3), lambda y: y.float(), lambda y: y.sum() + torch.zeros(3, 3),
], ids=["one number", "a scalar", "nested", "integers", "not only tensors", "of float32", "all the same"])
def test_outputs_of_any_kind(answer):
    change = check_function(GROUP, Said(answer), X)
    assert change < (1e-6 if "float" in str(answer) else 1e-9)
    with pytest.raises(ValueError, match="permuting group 'a'"):
        check_function({"a": GROUP["a"]._replace(entries=GROUP["a"].entries[:1])}, Said(answer), torch.zeros(60, 8))


@pytest.mark.parametrize("answer, message", [
    (lambda y: y * 0, "of 12 outputs, 0 are not finite and 12 are 0: expected finite outputs"),
    (lambda y: (y - y) / (y - y), "of 12 outputs, 12 are not finite and 0 are 0"),
    (lambda y: torch.where(y == y.max(), float("inf"), y), "of 12 outputs, 1 are not finite"),
], ids=["zero", "nan", "inf"])
def test_outputs_that_say_nothing_are_refused(answer, message):
    for groups in (GROUP, {}):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_function(groups, Said(answer), X)


def test_a_tensor_with_two_names_moves_under_both():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    names = "0.weight", "2.weight"
    groups = {"h": Group(6, (*(Entry(name, 0) for name in names), Entry("0.bias", 0)))}
    for left in names:
        wrong = {"h": groups["h"]._replace(entries=tuple(e for e in groups["h"].entries if e.tensor != left))}
        with pytest.raises(ValueError, match="'0.weight' and '2.weight' are one tensor, but the groups permute them"):
            function_change(wrong, derangements(wrong), model, torch.randn(4, 6))
    assert function_change(groups, derangements(groups), model, torch.randn(4, 6)) > 1e-2
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    assert function_change({"h": Group(6, (Entry("0.weight", 0), Entry("0.bias", 0), Entry("2.weight", 1)))},
                           {"h": torch.arange(6).roll(1)}, model, torch.randn(4, 6)) < 1e-5


def test_change_is_measured_in_standard_deviations():
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3., 0.], [0., 7.]]))
    x = torch.eye(2, dtype=torch.float64)
    change = function_change({"g": Group(2, (Entry("weight", 0),))}, {"g": torch.tensor([1, 0])}, model, x)
    assert change == pytest.approx(7 / torch.tensor([3., 0., 0., 7.]).std(correction=0).item())


@pytest.mark.parametrize("example, expected", [
    (X, ((X,), {})), ((X, 3), ((X, 3), {})), ([X], ((X,), {})), ({"x": X}, ((), {"x": X})),
], ids=["tensor", "tuple", "list", "dict"])
def test_inputs_become_arguments(example, expected):
    assert arguments(example) == expected


# What a network keeps or casts


class Keeping(Said):
    """Keeps what it computes from its biases in evaluation mode, until it is trained."""

    def __init__(self, kept):
        super().__init__(lambda y: y)
        self.kept, self.forgets = kept, True

    def train(self, mode=True):
        if mode and self.forgets:
            self.kept = type(self.kept)()
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.b((x @ self.a.weight.T).relu() * self.a.bias.exp())
        if not self.kept:
            self.kept = {"scale": self.a.bias.exp()} if isinstance(self.kept, dict) else [self.a.bias.exp()]
        return self.b((x @ self.a.weight.T).relu() * pytree.tree_leaves(self.kept)[0])


@pytest.mark.parametrize("kept", [{}, []], ids=["dict", "list"])
@pytest.mark.parametrize("evaluated", [None, torch.no_grad, torch.enable_grad], ids=["new", "evaluated", "gradients"])
def test_what_a_network_keeps_in_evaluation_mode_is_computed_again(kept, evaluated):
    model = Keeping(kept)
    if evaluated:
        with evaluated():
            model.eval()(X)
    before = pytree.tree_leaves(model.kept)
    groups = permutation_groups(model, X)
    assert [group.size for group in groups.values()] == [6]
    assert check_function(groups, model, X) < 1e-12
    assert check_function(GROUP, model, X) < 1e-12
    after = pytree.tree_leaves(model.kept)
    assert len(before) == len(after) and all(one is other for one, other in zip(before, after))
    for missing in range(3):
        wrong = {"a": GROUP["a"]._replace(entries=tuple(e for i, e in enumerate(GROUP["a"].entries) if i != missing))}
        with pytest.raises(ValueError, match="permuting group 'a'"):
            check_function(wrong, model, X)


def test_what_a_network_does_not_forget_is_a_constant_of_it():
    model = Keeping({})
    model.forgets = False
    model.eval()(X)
    groups = permutation_groups(model, X)
    assert not groups and "they meet a constant" in groups.describe() and check_function(groups, model, X) == 0


CASTS = {
    "float32": lambda s, x: s.b(s.a(x.float()).relu().float()),
    "float16": lambda s, x: s.b(s.a(x).half().relu().to(s.b.weight.dtype)),
    "bfloat16": lambda s, x: s.b(s.a(x).to(torch.bfloat16).relu().type_as(x)),
    "softmax": lambda s, x: s.b(s.a(x).softmax(-1, dtype=torch.float32).to(x.dtype)),
    "constants": lambda s, x: s.b((s.a(x) + torch.ones(6, dtype=torch.float32)) @ torch.eye(6).relu()),
    "an attribute": lambda s, x: s.b((s.a(x) @ s.kept).relu()),
    "a mask": lambda s, x: s.b(nn.functional.scaled_dot_product_attention(
        *[s.a(x)[None]] * 3, attn_mask=torch.zeros(len(x), len(x)))[0]),
    "autocast": lambda s, x: in_autocast(s, x),
}


def in_autocast(s, x):
    with torch.autocast("cpu", torch.bfloat16):
        return s.b(s.a(x).relu())


class Casting(Said):
    def __init__(self, function):
        super().__init__(None)
        self.function, self.kept = function, torch.ones(6, 6) + torch.eye(6)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_networks_that_compute_in_lower_precision_are_tested_in_float64(cast, dtype):
    model = Casting(CASTS[cast]).to(dtype)
    assert check_function(GROUP, model, X) < 1e-12 and torch.get_default_dtype() == torch.float32
    for missing in range(3):
        wrong = {"a": GROUP["a"]._replace(entries=tuple(e for i, e in enumerate(GROUP["a"].entries) if i != missing))}
        with pytest.raises(ValueError, match="permuting group 'a'"):
            check_function(wrong, model, torch.zeros(60, 8))


def test_a_change_is_measured_in_the_precision_of_the_network():
    model, x = Casting(CASTS["float32"]), torch.randn(60, 8)
    assert 1e-9 < function_change(GROUP, derangements(GROUP), model, x) < 1e-5
    assert function_change(GROUP, derangements(GROUP), model.double(), x.double()) < 1e-12


def only_in_float32(s, x):
    if x.dtype != torch.float32:
        raise TypeError("got Double, which is too much " + "and too long a reason " * 90)
    return s.b(s.a(x))


def test_a_network_that_does_not_run_in_float64_is_named():
    with pytest.raises(ValueError, match="Casting cannot be tested: TypeError: got Double, .*: expected a network that "
                                         "runs in float64") as error:
        check_function(GROUP, Casting(only_in_float32), X)
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="expected a network that runs on this input"):
        function_change(GROUP, derangements(GROUP), Casting(CASTS["float32"]), torch.zeros(4, 7))


def test_a_network_that_cannot_be_copied_is_named_and_can_be_traced():
    model = net()
    model.lock = threading.Lock()
    groups = permutation_groups(model, X)
    assert {name: group.size for name, group in groups.items()} == {"0": 6, "3": 5}
    with pytest.raises(ValueError, match="Sequential cannot be copied: TypeError: .*lock.*: expected a model"):
        check_function(groups, model, X)


@pytest.mark.parametrize("extra", [{"version": 2}, torch.zeros(6), None], ids=["dict", "tensor", "nothing"])
def test_extra_states_are_no_weights(extra):
    class Extra(Said):
        def get_extra_state(self):
            return extra

        def set_extra_state(self, state):
            pass

    model = Extra(lambda y: y)
    groups = permutation_groups(model, X)
    assert "_extra_state" in model.state_dict() and "_extra_state" not in groups.describe()
    assert check_function(groups, model, X) < 1e-12 and list(groups) == ["a"]


def test_a_pruned_network_that_was_evaluated():
    """PyTorch's pruning keeps the product of weight and mask as an attribute, which ``deepcopy`` refuses."""
    model = net()
    for layer in (model[0], model[3]):
        prune.random_unstructured(layer, "weight", .4)
        prune.random_unstructured(layer, "bias", 2)
    model(torch.randn(4, 8))
    groups = permutation_groups(model, torch.zeros(4, 8))
    assert {name: group.size for name, group in groups.items()} == {"0": 6, "3": 5}
    assert check_function(groups, model, torch.zeros(4, 8)) < 1e-12
    copy = draw_weights(model)
    assert torch.equal(copy[0].weight_mask, model[0].weight_mask.double())
    assert not torch.equal(copy[0].weight_orig, model[0].weight_orig.double())
    for tensor in ("0.weight_orig", "0.weight_mask", "0.bias_orig", "0.bias_mask", "3.weight_mask"):
        entries = tuple(entry for entry in groups["0"].entries if entry.tensor != tensor)
        with pytest.raises(ValueError, match="permuting group '0'"):
            check_function({**groups, "0": groups["0"]._replace(entries=entries)}, model, torch.zeros(60, 8))


# What is drawn


@pytest.mark.parametrize("seed", range(3))
def test_shuffles_leave_no_unit_in_its_place(seed):
    groups = {f"g{n}": Group(n, ()) for n in (2, 3, 5, 64)}
    permutations = derangements(groups, seed=seed)
    for name, group in groups.items():
        assert permutations[name].sort().values.tolist() == list(range(group.size))
        assert (permutations[name] != torch.arange(group.size)).all()
    again = derangements(groups, seed=seed)
    assert all(torch.equal(one, two) for one, two in zip(permutations.values(), again.values()))
    assert derangements(groups, seed=seed + 1)["g64"].tolist() != permutations["g64"].tolist()


def test_everything_is_drawn_of_order_one_and_the_model_stays():
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 300, 3), "norm": nn.BatchNorm1d(4000), "scale": nn.ParameterList(
        [torch.full((4000, 1, 1), 1e-6)]), "embedding": nn.Embedding(900, 8)}).bfloat16()
    model.register_buffer("table", torch.arange(6.))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = draw_weights(model)
    state = copy.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(t.dtype == torch.float64 for t in state.values() if t.is_floating_point()) and not copy.training
    assert model.training and model["norm"].weight.dtype == torch.bfloat16
    deviation = {name: tensor.double().std().item() for name, tensor in state.items()}
    assert deviation["conv.weight"] == pytest.approx((2 / 72)**0.5, rel=0.05)
    assert deviation["embedding.weight"] == pytest.approx(1, rel=0.05)
    assert deviation["conv.bias"] == pytest.approx(0.1, rel=0.2)
    assert deviation["norm.running_mean"] == pytest.approx(1, rel=0.1) == deviation["scale.0"]
    for name in ("norm.weight", "norm.running_var"):
        assert 0.5 <= state[name].min() < 0.6 and 1.4 < state[name].max() <= 1.5
    assert torch.equal(state["table"], before["table"].double())  # a constant of the network
    assert torch.equal(draw_weights(model).state_dict()["conv.weight"], state["conv.weight"])
    assert not torch.equal(draw_weights(model, seed=1).state_dict()["conv.weight"], state["conv.weight"])


def test_tied_tensors_stay_tied_when_drawn():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    copy = draw_weights(model)
    assert copy[0].weight is copy[1].weight and copy[0].weight is not model[0].weight


def test_a_fresh_network_is_no_witness_and_a_redrawn_one_is():
    """With norms that are all equal, a group without them preserves the function of a new network."""
    model, x = build_model("vgg11", (3, 32, 32), 4, width=0.05, batch_norm=True).eval(), torch.randn(2, 3, 32, 32)
    groups = permutation_groups(model, x)
    forgotten = {"conv1": groups["conv1"]._replace(entries=tuple(
        entry for entry in groups["conv1"].entries if not entry.tensor.startswith("norm1")))}
    assert function_change(forgotten, derangements(forgotten), model, x) < 1e-4
    with pytest.raises(ValueError, match="permuting group 'conv1'"):
        check_function(forgotten, model, x)
