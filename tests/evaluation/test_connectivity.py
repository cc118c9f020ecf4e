"""Lines and planes between networks: against closed forms, plain evaluations one by one, and PyTorch's BatchNorm."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from permask_core.data.splits import Split
from permask_core.evaluation import connectivity
from permask_core.evaluation.connectivity import (
    angle,
    barrier,
    distance,
    evaluate_mixtures,
    interpolate_network,
    line,
    mix,
    plane_through,
    surface,
)
from permask_core.matching import permutation_groups, permute, random_permutations
from permask_core.models import build_model
from permask_core.training import evaluate

INPUTS, LABELS = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10
SPLIT = INPUTS, LABELS


def networks(name, n=3, **options):
    """Fresh networks of one architecture, with BatchNorm statistics that are not those of the start."""
    made = [build_model(name, (1, 8, 8), 10, seed=seed, **options) for seed in range(n)]
    for i, model in enumerate(made):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(generator=torch.Generator().manual_seed(i))
                module.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(i))
    return made


def states_of(models):
    return [model.state_dict() for model in models]


@pytest.fixture
def mlps():
    return networks("mlp", width=0.25)


@pytest.fixture
def residual():
    return networks("resnet8", width=0.25)


# ---- Barriers --------------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-10, 10)


@given(NUMBERS, NUMBERS, st.floats(0.1, 10))
def test_the_barrier_of_two_quadratics(level, slope, height):
    """What is above the chord of a - h (x - 1/2)^2 + b x is a parabola of height h / 4, wherever its ends lie."""
    alphas = np.linspace(0, 1, 21)
    hill = level + slope * alphas - height * (alphas - 0.5) ** 2
    assert barrier(alphas, hill) == pytest.approx(height / 4)
    assert barrier(alphas, level + slope * alphas + height * (alphas - 0.5) ** 2) == pytest.approx(0, abs=1e-9)


def test_the_barrier_is_not_the_value_in_the_middle():
    alphas, values = [0, 0.2, 0.5, 1], [[0.0, 3.0, 1.0, 0.0], [2.0, 1.6, 1.0, 0.0]]
    assert barrier(alphas, values).tolist() == pytest.approx([3.0, 0.0])


@pytest.mark.parametrize("alphas, values, said", [
    ([0, 0.5], [1, 2], "increasing numbers from 0"), ([0, 1, 0.5], [1, 2, 3], "increasing numbers from 0"),
    ([0, 0.5, 0.5, 1], [1, 2, 3, 4], "increasing numbers from 0"),
    ([0, 0.5, 1], [1, 2], r"shape \[2\]: expected \[..., 3\]"),
    ([0, 0.5, 1], [1, math.nan, 2], "all finite"), ([0, math.nan, 1], [1, 2, 3], "increasing numbers from 0")])
def test_no_barrier(alphas, values, said):
    with pytest.raises(ValueError, match=said):
        barrier(alphas, values)


# ---- Mixtures and lines ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mlp", "resnet8", "lenet5"])
@pytest.mark.parametrize("single", [(), connectivity.SINGLE])
def test_many_at_once_are_as_one_by_one(name, single, monkeypatch):
    monkeypatch.setattr(connectivity, "SINGLE", single)
    models = networks(name, width=0.25)
    states = states_of(models)
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 7)
    monkeypatch.setattr(connectivity, "BATCH", 17)
    one_by_one = [evaluate(models[0], SPLIT, state=mix(states, row)) for row in weights]
    for memory in (1, 2**21, 2**30):  # one network at once, several, and all
        monkeypatch.setattr(connectivity, "MEMORY", memory)
        found = evaluate_mixtures(models[0], states, weights, SPLIT)
        assert found.losses == pytest.approx([one.loss for one in one_by_one], rel=1e-5)
        assert found.errors == pytest.approx([1 - one.accuracy for one in one_by_one])


def test_memory_is_bounded(mlps, monkeypatch):
    sizes, whole = [], connectivity._perceptrons

    def counted(*given):
        answers = whole(*given)
        return lambda weights: sizes.append(len(weights)) or answers(weights)

    monkeypatch.setattr(connectivity, "_perceptrons", counted)
    # One network: its weights (3,466), and the layers' answers to 60 inputs (64 + 4 x 32 + 10).
    one = 4 * (3466 + 60 * (64 + 4 * 32 + 10))
    monkeypatch.setattr(connectivity, "MEMORY", 3 * one + one // 2)
    evaluate_mixtures(mlps[0], states_of(mlps), np.full((10, 3), 1 / 3), SPLIT)
    assert sum(sizes) == 10 and max(sizes) == 3


@pytest.mark.parametrize("tail", [[], [nn.Linear(6, 4)], [nn.Linear(6, 5), nn.ReLU(), nn.ReLU(), nn.Linear(5, 4)],
                                  [nn.Linear(6, 4, bias=False)], [nn.Tanh()], [nn.Dropout(), nn.Linear(6, 4)]])
def test_perceptrons_of_any_form(tail):
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(64, 6), nn.ReLU()]
    models = [copy.deepcopy(nn.Sequential(*head, *tail)) for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 5)
    split = INPUTS, LABELS % 4
    found = evaluate_mixtures(models[0], states_of(models), weights, split).losses
    expected = [evaluate(models[0], split, state=mix(states_of(models), row)).loss for row in weights]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_the_ends_of_a_line_are_its_networks(name):
    a, b = networks(name, 2, width=0.25)
    found = line(a, a.state_dict(), b.state_dict(), SPLIT, points=5)
    for i, model in ((0, a), (-1, b)):
        there = evaluate(model, SPLIT)
        assert (found.losses[i], found.errors[i]) == pytest.approx((there.loss, 1 - there.accuracy), rel=1e-5)
    middle = evaluate(interpolate_network(a, a.state_dict(), b.state_dict()), SPLIT)
    assert found.losses[2] == pytest.approx(middle.loss, rel=1e-5)


@pytest.mark.parametrize("correction", ["none", "reset", "repair"])
def test_nothing_lies_between_a_network_and_itself(correction, residual):
    state = residual[0].state_dict()
    found = line(residual[0], state, state, SPLIT, points=4, correction=correction, batches=[INPUTS])
    assert barrier(found.alphas, found.losses) == pytest.approx(0, abs=1e-5)
    assert barrier(found.alphas, found.errors) == 0
    assert np.ptp(found.losses) < 1e-5


def test_the_loss_of_a_linear_model_is_convex_on_a_line():
    """Along a line the cross-entropy of a linear model is log-sum-exp of linear functions: no barrier."""
    a, b = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    found = line(a, a.state_dict(), b.state_dict(), SPLIT, points=9)
    assert barrier(found.alphas, found.losses) == pytest.approx(0, abs=1e-6)
    for alpha, loss in zip(found.alphas, found.losses):
        logits = (1 - alpha) * a(INPUTS) + alpha * b(INPUTS)
        assert loss == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_permuting_does_not_change_the_ends(name):
    a, b = networks(name, 2, width=0.25)
    groups = permutation_groups(a, INPUTS[:2])
    moved = permute(groups, random_permutations(groups, seed=1), a.state_dict())
    plain, permuted = (line(a, source, b.state_dict(), SPLIT, points=3) for source in (a.state_dict(), moved))
    assert permuted.losses[[0, -1]] == pytest.approx(plain.losses[[0, -1]], rel=1e-5)
    assert permuted.losses[1] != pytest.approx(plain.losses[1], rel=1e-5)


def test_statistics_after_a_reset_are_those_of_a_plain_pass(residual):
    a, b = states_of(residual[:2])
    found = interpolate_network(residual[0], a, b, 0.3, correction="reset", batches=[INPUTS]).state_dict()
    plain = interpolate_network(residual[0], a, b, 0.3).train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    plain(INPUTS)
    for name, tensor in plain.state_dict().items():
        if "running" in name:
            assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-5), name


def test_a_repaired_unit_has_the_statistics_between(mlps):
    a, b = mlps[:2]
    found = interpolate_network(a, a.state_dict(), b.state_dict(), 0.25, correction="repair", batches=[INPUTS])
    first, second, middle = (model.fc1(INPUTS.flatten(1)) for model in (a, b, found))
    for statistic in (torch.mean, torch.std):
        goal = 0.75 * statistic(first, dim=0) + 0.25 * statistic(second, dim=0)
        assert torch.allclose(statistic(middle, dim=0), goal, atol=1e-4)


def test_a_corrected_line_is_one_of_corrected_networks(residual):
    a, b = states_of(residual[:2])
    for correction in ("reset", "repair"):
        found = line(residual[0], a, b, SPLIT, points=3, correction=correction, batches=[INPUTS])
        middle = interpolate_network(residual[0], a, b, correction=correction, batches=[INPUTS])
        assert found.losses[1] == pytest.approx(evaluate(middle, SPLIT).loss)
    assert line(residual[0], a, b, SPLIT, points=3).losses[1] != pytest.approx(found.losses[1], rel=1e-3)


def test_models_and_states_stay(residual):
    before = copy.deepcopy(states_of(residual))
    line(residual[0].train(), *before[1:], SPLIT, points=3, correction="repair", batches=[INPUTS])
    surface(residual[0], plane_through(*before), [0.0], [0.0, 1.0], SPLIT, batches=[INPUTS])
    assert residual[0].training
    for model, state in zip(residual, before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# ---- Planes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["mlp", "resnet8"])
def test_a_plane_contains_its_three_networks(name):
    states = states_of(networks(name, width=0.25))
    plane = plane_through(*states)
    assert (plane.weights(plane.points) == np.eye(3)).all()
    for point, state in zip(plane.points, states):
        found = plane.state(*point)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_coordinates_are_distances(mlps):
    states = states_of(mlps)
    plane = plane_through(*states)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert math.dist(plane.points[i], plane.points[j]) == pytest.approx(distance(states[i], states[j]))
    assert plane.points[0].tolist() == [0, 0] and plane.points[1, 1] == 0 < plane.points[2, 1]
    one, other = ((0.3, -1.2), (2.0, 0.7))
    assert distance(plane.state(*one), plane.state(*other)) == pytest.approx(math.dist(one, other), rel=1e-5)


def test_the_basis_is_orthonormal_and_spans_the_plane(mlps):
    states = states_of(mlps)
    plane = plane_through(*states)
    right, up = (torch.cat([tensor.flatten() for tensor in axis.values()]) for axis in plane.basis())
    gram = torch.stack([right, up]) @ torch.stack([right, up]).T
    assert torch.allclose(gram, torch.eye(2, dtype=torch.float64), atol=1e-9)
    there = plane.state(1.5, -0.5)
    for name, tensor in states[0].items():
        expected = tensor + 1.5 * plane.basis()[0][name] - 0.5 * plane.basis()[1][name]
        assert torch.allclose(there[name].double(), expected, atol=1e-5)


def test_the_surface_of_a_linear_model():
    models = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(3)]
    plane = plane_through(*states_of(models))
    xs, ys = plane.grid(5, margin=0.4)
    found = surface(models[0], plane, xs, ys, SPLIT)
    logits = [model(INPUTS).detach() for model in models]
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            there = sum(weight * part for weight, part in zip(plane.weights([[x, y]])[0], logits))
            assert found.losses[i, j] == pytest.approx(F.cross_entropy(there, LABELS).item(), rel=1e-4)
            assert found.errors[i, j] == pytest.approx((there.argmax(1) != LABELS).float().mean().item())


def test_a_grid_holds_the_three_networks(mlps):
    plane = plane_through(*states_of(mlps))
    for axis, values in enumerate(plane.grid(9, margin=0.25)):
        own = plane.points[:, axis]
        around = 0.25 * np.ptp(plane.points, axis=0).max()
        assert (len(values), values[0], values[-1]) == pytest.approx((9, own.min() - around, own.max() + around))


def test_batches_give_each_point_its_own_statistics(residual):
    plane = plane_through(*states_of(residual))
    xs, ys = plane.grid(2, margin=1.0)
    found = surface(residual[0], plane, xs, ys, SPLIT, batches=[INPUTS])
    assert found.losses.shape == (2, 2) and np.isfinite(found.losses).all()
    # Between two of the three networks the plane is a line.
    (x, y), (a, _, b) = plane.points[2] / 2, states_of(residual)
    middle = interpolate_network(residual[0], a, b, correction="reset", batches=[INPUTS])
    found = surface(residual[0], plane, [x], [y], SPLIT, batches=[INPUTS])
    assert found.losses[0, 0] == pytest.approx(evaluate(middle, SPLIT).loss, rel=1e-3)


def test_a_negative_variance_is_refused(residual):
    plane = plane_through(*states_of(residual))
    with pytest.raises(ValueError, match=r"running_var' is negative in the mixture \[.*pass batches"):
        surface(residual[0], plane, *plane.grid(3, margin=9.0), SPLIT)


# ---- Distances -------------------------------------------------------------------------------------------------------

@given(st.lists(NUMBERS, min_size=2, max_size=2), st.lists(NUMBERS, min_size=2, max_size=2))
def test_distance_and_angle_of_two_arrows(one, other):
    first, second = ({"w": torch.tensor(values, dtype=torch.float64)} for values in (one, other))
    assert distance(first, second) == pytest.approx(math.dist(one, other))
    if all(math.hypot(*arrow) > 1e-3 for arrow in (one, other)):
        expected = math.degrees(abs(math.atan2(*one) - math.atan2(*other)))
        assert angle(first, second) == pytest.approx(min(expected, 360 - expected), abs=1e-5)


def test_an_angle_from_another_origin():
    one, other, origin = ({"w": torch.tensor(values)} for values in ([2.0, 1.0], [1.0, 3.0], [1.0, 1.0]))
    assert angle(one, other, origin) == pytest.approx(90)
    assert angle(one, one, origin) == 0
    tiny = {"w": torch.tensor([2.0, 1.0 + 1e-6])}
    assert angle(one, tiny, origin) == pytest.approx(math.degrees(1e-6), rel=0.05)


def test_statistics_are_no_weights(residual):
    a = residual[0].state_dict()
    b = {name: tensor + 1 if "running" in name or "num_batches" in name else tensor for name, tensor in a.items()}
    assert distance(a, b) == 0
    assert angle(a, b) == 0


def test_the_order_of_the_names_does_not_matter(mlps):
    """A state that was stored has another than its model's."""
    one, other, third = states_of(mlps)
    turned = dict(reversed(other.items()))
    assert distance(one, turned) == distance(one, other)
    assert angle(one, turned, third) == angle(one, other, third)
    assert (plane_through(one, turned, third).points == plane_through(one, other, third).points).all()


# ---- Data of any kind ------------------------------------------------------------------------------------------------

class Named(nn.Module):
    """Two inputs, an answer with logits, and, if asked for, control flow that depends on the weights."""

    def __init__(self, branches=False):
        super().__init__()
        self.first, self.second, self.branches = nn.Linear(64, 10), nn.Linear(64, 10), branches

    def forward(self, image, other):
        a, b = self.first(image.flatten(1)), self.second(other.flatten(1))
        return SimpleNamespace(logits=a * b if self.branches and self.first.bias.sum() > 0 else a + b.tanh())


def kinds_of(x, y):
    """The same data in every form."""
    pairs = list(zip(x.split(13), y.split(13)))
    return {"tensors": (x, y), "split": Split(x, y), "batches": pairs, "iterator": iter(pairs),
            "loader": DataLoader(TensorDataset(x, y), batch_size=17),
            "dicts": [{"input": a, "labels": b} for a, b in pairs]}


@pytest.mark.parametrize("name", ["mlp", "resnet8"])
@pytest.mark.parametrize("kind", kinds_of(INPUTS, LABELS))
def test_data_of_every_kind_give_the_same(name, kind):
    a, b = networks(name, 2, width=0.25)
    expected = line(a, a.state_dict(), b.state_dict(), SPLIT, points=3)
    found = line(a, a.state_dict(), b.state_dict(), kinds_of(INPUTS, LABELS)[kind], points=3)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.errors == pytest.approx(expected.errors)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_several_inputs_and_what_vmap_cannot_run(branches, form):
    models = [Named(branches) for _ in range(2)]
    other = INPUTS.flip(0)
    batches = [({"image": x, "other": z} if form == "dict" else (x, z), y)
               for x, z, y in zip(INPUTS.split(25), other.split(25), LABELS.split(25))]
    found = line(models[0], *states_of(models), batches, points=4)
    for alpha, loss, error in zip(*found):
        logits = interpolate_network(models[0], *states_of(models), float(alpha))(INPUTS, other).logits
        assert loss == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)
        assert error == pytest.approx((logits.argmax(1) != LABELS).float().mean().item())


@pytest.mark.parametrize("correction", ["reset", "repair"])
@pytest.mark.parametrize("kind", ["tensors", "split", "batches", "iterator", "loader"])
def test_batches_of_every_kind_correct_the_same(correction, kind, residual):
    a, b = states_of(residual[:2])
    size = {"batches": 13, "iterator": 13, "loader": 17}.get(kind, 60)
    found, expected = (interpolate_network(residual[0], a, b, correction=correction, batches=batches).state_dict()
                       for batches in (kinds_of(INPUTS, LABELS)[kind], list(INPUTS.split(size))))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    on_line = line(residual[0], a, b, SPLIT, points=3, correction=correction, batches=kinds_of(INPUTS, LABELS)[kind])
    assert on_line.losses[1] == evaluate(interpolate_network(residual[0], a, b, correction=correction,
                                                 batches=list(INPUTS.split(size))), SPLIT).loss


@pytest.mark.parametrize("size", [30, 25, 60])
def test_batches_of_one_tensor(size, residual):
    """What split returns is a tuple of batches; a tensor is cut into batches by itself, here into one."""
    a, b = states_of(residual[:2])
    for batches in (INPUTS.split(size), INPUTS if size == 60 else iter(INPUTS.split(size))):
        found, expected = (interpolate_network(residual[0], a, b, correction="reset", batches=given).state_dict()
                           for given in (batches, list(INPUTS.split(size))))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("data, said", [
    ([], "expected at least one input"), (INPUTS, "the data have no targets"), ([INPUTS], "the data have no targets"),
    (3, "got int"), ([(INPUTS, (LABELS, LABELS))], "y has the shape"), ([(INPUTS, LABELS + 1)], "y has the label 10"),
    ([(INPUTS, LABELS), (INPUTS, LABELS - 1)], "y has the label -1"), ({"labels": LABELS}, "got dict")])
def test_data_without_classes_are_refused(data, said, mlps):
    with pytest.raises(ValueError, match=said):
        line(mlps[0], *states_of(mlps[:2]), data)


def test_logits_of_several_axes_are_refused():
    model = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"of one input have the shape \[1, 8, 4\]: expected \[1, classes\]"):
        line(model, model.state_dict(), model.state_dict(), (INPUTS[:, 0], LABELS % 4))


# ---- What does not fit -----------------------------------------------------------------------------------------------

def test_states_that_do_not_fit_are_named(mlps):
    a, b, c = states_of(mlps)
    wide = build_model("mlp", (1, 8, 8), 10, width=0.5).state_dict()
    lacking = {name: tensor for name, tensor in b.items() if name != "fc2.bias"}
    for call in (lambda other: line(mlps[0], a, other, SPLIT), lambda other: plane_through(a, b, other),
                 lambda other: distance(a, other), lambda other: interpolate_network(mlps[0], a, other)):
        with pytest.raises(ValueError, match=r"'fc1.weight' has shape \[32, 64\] .* \[64, 64\]"):
            call(wide)
        with pytest.raises(ValueError, match="'fc2.bias' is in the source only"):
            call(lacking)
    with pytest.raises(ValueError, match="'fc1.weight' has shape"):
        line(mlps[0], wide, wide, SPLIT)


def test_whole_numbers_have_no_mixture(residual):
    a, b = states_of(residual[:2])
    counted = {name: tensor + 3 if name.endswith("num_batches_tracked") else tensor for name, tensor in b.items()}
    assert line(residual[0], a, counted, SPLIT, points=3).losses == pytest.approx(
        line(residual[0], a, b, SPLIT, points=3).losses)
    first, second = ({"w": torch.ones(2), "places": torch.tensor([0, i])} for i in (1, 2))
    with pytest.raises(ValueError, match="'places' holds integers .* expected the same"):
        plane_through(first, second, first)


def test_three_networks_on_one_line_span_no_plane(mlps):
    a, b = states_of(mlps[:2])
    for third in (a, b, mix([a, b], [0.7, 0.3]), mix([a, b], [-1.5, 2.5])):
        with pytest.raises(ValueError, match="are on one line"):
            plane_through(a, b, third)
    with pytest.raises(ValueError, match=r"are on one line \(the second is 0 from"):
        plane_through(a, a, b)


def test_values_out_of_range_are_named(mlps, residual):
    model, (a, b, c) = mlps[0], states_of(mlps)
    plane = plane_through(a, b, c)
    for call, said in (
        (lambda: interpolate_network(model, a, b, 1.5), "alpha is 1.5"),
        (lambda: interpolate_network(model, a, b, -0.1), "alpha is -0.1"),
        (lambda: line(model, a, b, SPLIT, points=2), "points is 2: expected an integer of at least 3"),
        (lambda: line(model, a, b, SPLIT, points=5.0), "points is 5.0"),
        (lambda: line(model, a, b, SPLIT, correction="rest"), "unknown correction 'rest'"),
        (lambda: line(model, a, b, SPLIT, correction="reset"), "'reset' without batches"),
        (lambda: line(model, a, b, SPLIT, correction="reset", batches=[INPUTS]), "has no BatchNorm"),
        (lambda: line(model, a, b, (INPUTS[:0], LABELS[:0])), "expected at least one input"),
        (lambda: evaluate_mixtures(model, [a, b], [[1.0, 0.0, 0.0]], SPLIT), r"shape \[1, 3\]: expected \[n, 2\]"),
        (lambda: evaluate_mixtures(model, [a, b], [[math.inf, 0.0]], SPLIT), "all finite"),
        (lambda: plane.weights([1.0, 2.0]), r"at has the shape \[2\]"),
        (lambda: plane.weights([[1.0, math.nan]]), "all finite"),
        (lambda: plane.grid(1), "points is 1"), (lambda: plane.grid(margin=-1), "margin is -1"),
        (lambda: angle(a, a, a), "does not differ from the origin"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_named(mlps, value):
    a, b, c = states_of(mlps)
    bad = {name: tensor.clone() for name, tensor in c.items()}
    bad["fc2.weight"][0, 0] = value
    for call in (lambda: line(mlps[0], a, bad, SPLIT), lambda: interpolate_network(mlps[0], bad, a),
                 lambda: evaluate_mixtures(mlps[0], [bad, a], [[0.5, 0.5]], SPLIT), lambda: plane_through(a, b, bad),
                 lambda: plane_through(bad, a, b), lambda: distance(a, bad), lambda: angle(bad, a),
                 lambda: angle(a, b, bad)):
        with pytest.raises(ValueError, match="'fc2.weight' holds NaN or infinite values"):
            call()


@pytest.mark.parametrize("labels, said", [
    (LABELS + 1, "y has the label 10: expected 0 to 9"), (LABELS - 1, "y has the label -1"),
    (LABELS.float(), "expected integer labels"), (F.one_hot(LABELS), r"y has the shape \[60, 10\]: expected \[n\]")])
def test_labels_that_are_no_classes_are_refused(residual, labels, said):
    model, (a, b) = residual[0], states_of(residual[:2])
    for more in ({}, {"correction": "reset", "batches": [INPUTS]}):
        with pytest.raises(ValueError, match=said):
            line(model, a, b, (INPUTS, labels), points=3, **more)
    for more in ({}, {"batches": [INPUTS]}):
        with pytest.raises(ValueError, match=said):
            evaluate_mixtures(model, [a, b], [[0.5, 0.5]], (INPUTS, labels), **more)


def test_batches_may_be_one_tensor(residual):
    a, b = states_of(residual[:2])
    for correction in ("reset", "repair"):
        one, other = (line(residual[0], a, b, SPLIT, points=3, correction=correction, batches=batches)
                      for batches in (INPUTS, [INPUTS]))
        assert np.array_equal(one.losses, other.losses)


def test_empty_values_and_text_are_refused(mlps):
    model, (a, b, c) = mlps[0], states_of(mlps)
    plane = plane_through(a, b, c)
    for call, said in (
        (lambda: evaluate_mixtures(model, [], [[]], SPLIT), "there are no states"),
        (lambda: evaluate_mixtures(model, [a, b], np.zeros((0, 2)), SPLIT), "at least one row"),
        (lambda: surface(model, plane, [], [], SPLIT), "0 columns and 0 rows"),
        (lambda: surface(model, plane, [0.0], [], SPLIT), "1 columns and 0 rows"),
        (lambda: distance({}, {}), "expected a state_dict with weights"),
        (lambda: angle({}, {}), "expected a state_dict with weights"),
        (lambda: plane_through({}, {}, {}), "expected a state_dict with weights"),
        (lambda: angle(a, b, {}), "is in the source only"),
        (lambda: interpolate_network(model, a, b, "0.5"), "alpha is '0.5'"),
        (lambda: plane.grid(5, "a"), "margin is 'a'"),
        (lambda: plane.grid("5"), "points is '5'"), (lambda: plane.grid(True), "points is True"),
        (lambda: line(model, a, b, SPLIT, points=True), "points is True: expected an integer of at least 3"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_integers_and_numbers_of_numpy_will_do(mlps):
    model, (a, b, c) = mlps[0], states_of(mlps)
    assert len(line(model, a, b, SPLIT, points=np.int64(3)).losses) == 3
    assert len(plane_through(a, b, c).grid(np.int64(5), np.float32(0.5))[0]) == 5
    assert distance(interpolate_network(model, a, b, np.float32(0.5)).state_dict(), mix([a, b], [0.5, 0.5])) < 1e-5
