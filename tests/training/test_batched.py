"""Networks trained together, against each of them trained alone."""

import copy
import functools

import pytest
import torch
from torch import nn

from permask_core.data import Split
from permask_core.models import build_model
from permask_core.sparse import condense
from permask_core.training import Recipe, batched, evaluate, fit, loop
from permask_core.training.batched import Batch, backends, evaluate_batched, fastest, fit_batched

CLOSE = {"rtol": 0, "atol": 1e-6}  # after twenty steps in float64
SEEDS = [3, 3, 5]  # two of them share their batches


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randn(160, 3, 8, 8, dtype=torch.float64, generator=generator),
                 torch.randint(10, (160,), generator=generator), pad=1, flip=True)


def networks(name, n=3, shape=(3, 8, 8), width=0.5):
    return [build_model(name, shape, 10, width=width, seed=seed).double() for seed in range(n)]


def some_masks(models):
    """Another mask for each network, and none for the second."""
    generator = torch.Generator().manual_seed(1)
    return [None if i == 1 else {name: torch.rand(one.shape, generator=generator) < 0.3
                                 for name, one in model.named_parameters() if one.ndim > 1}
            for i, model in enumerate(models)]


def assert_same(one, other):
    torch.testing.assert_close(one.state, other.state, **CLOSE)
    assert one.checkpoints.keys() == other.checkpoints.keys()
    for name in one.checkpoints:
        torch.testing.assert_close(one.checkpoints[name], other.checkpoints[name], **CLOSE)
    assert one.losses == pytest.approx(other.losses, abs=1e-6)


RECIPES = {"sgd": Recipe(4, 0.1, batch_size=32),
           "adamw": Recipe(4, 0.01, batch_size=32, optimizer="adamw", label_smoothing=0.1, accumulate=2, warmup=1.0)}


# ---- Together as alone -----------------------------------------------------------------------------------------------

WANTED = ("init", "epoch 2", "step 20")


@pytest.fixture(scope="module")
def alone(images):
    """A function of a network's name and a recipe's: the networks that were trained one after the other."""
    @functools.cache
    def train(name, case):
        models = networks(name)
        return [fit(model, images, RECIPES[case], seed=seed, masks=own, checkpoints=WANTED)
                for model, seed, own in zip(models, SEEDS, some_masks(models))]

    return train


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("backend", ["grouped", "vmap", "alone"])
@pytest.mark.parametrize("name", ["resnet8", "lenet5", "mlp"])
def test_each_network_trains_as_it_does_alone(images, name, backend, case, alone):
    models, recipe = networks(name), RECIPES[case]
    masks = some_masks(models)
    found = fit_batched(models, images, recipe, seeds=SEEDS, masks=masks, checkpoints=WANTED, backend=backend)
    assert len(found) == 3
    for model, own, one, other in zip(models, masks, found, alone(name, case)):
        assert_same(one, other)
        assert one.masks is own
        torch.testing.assert_close(model.state_dict(), one.state, rtol=0, atol=0)
        assert all((one.state[key][~mask] == 0).all() for key, mask in (own or {}).items())
    assert not torch.equal(found[0].state["conv1.weight" if name != "mlp" else "fc1.weight"],
                           found[1].state["conv1.weight" if name != "mlp" else "fc1.weight"])


@pytest.mark.parametrize("backend", ["grouped", "vmap"])
def test_in_bf16_the_weights_stay_float32(backend):
    images = Split(torch.randn(64, 3, 8, 8), torch.arange(64) % 10)
    models = [model.float() for model in networks("resnet8")]
    recipe = Recipe(2, 0.05, batch_size=32, precision="bf16")
    alone = [fit(model, images, recipe, seed=0) for model in copy.deepcopy(models)]
    found = fit_batched(models, images, recipe, seeds=[0] * 3, backend=backend)
    for one, other in zip(found, alone):
        assert all(tensor.dtype != torch.bfloat16 for tensor in one.state.values())
        assert one.losses == pytest.approx(other.losses, rel=0.05)


def test_only_what_fits_together_is_in_a_batch_of_its_own(images):
    assert backends(networks("resnet8")[0]) == ["grouped", "vmap", "alone"]
    assert backends(build_model("vit_b_16", (3, 32, 32), 10, width=0.05, seed=0)) in (["vmap", "alone"], ["alone"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5), nn.Linear(8, 10))
    assert backends(model) == ["alone"]
    around = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(128, 10))
    assert backends(around) == ["vmap", "alone"]
    condensed = condense(*_constant_fan_in()).model
    assert backends(condensed) == ["alone"]


def _constant_fan_in():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, :2] = True
    return model, {"0.weight": mask}


def test_networks_with_dropout_are_trained_alone(images):
    models = [nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5), nn.Linear(8, 10)).double()
              for _ in range(2)]
    alone = [fit(model, images, RECIPES["sgd"], seed=seed) for model, seed in zip(copy.deepcopy(models), (0, 1))]
    for one, other in zip(fit_batched(models, images, RECIPES["sgd"], seeds=[0, 1]), alone):
        assert_same(one, other)


def test_channels_that_a_network_mixes_are_seen_and_taken_another_way():
    """Channels of two branches side by side are no longer network by network: grouped, the result would be wrong."""
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(6, 10, 3)

        def forward(self, x):
            return self.head(torch.cat([self.left(x), self.right(x)], 1)).mean((2, 3))

    images = Split(torch.randn(64, 3, 8, 8), torch.arange(64) % 10)
    models = [Joined() for _ in range(2)]
    assert fastest(models, images, "cpu") == "vmap"
    with torch.no_grad():
        x = images.x[:2, None].expand(-1, 2, -1, -1, -1)
        assert not torch.allclose(Batch(models, "grouped")(x)[:, 1], models[1](images.x[:2]), rtol=1e-2)
        assert torch.allclose(Batch(models, "vmap")(x)[:, 1], models[1](images.x[:2]), atol=1e-6)


def test_large_networks_are_trained_alone_on_a_cpu(monkeypatch):
    images = Split(torch.randn(4, 3, 32, 32), torch.arange(4))
    models = [model.float() for model in networks("resnet8", shape=(3, 32, 32), width=1)]
    assert fastest(models, images, "cpu") == "alone"
    monkeypatch.setattr(batched, "SMALL", 10**9)
    assert fastest(models, images, "cpu") == "grouped"
    assert fastest(models[:1], images, "cpu") == "alone"


def test_a_compiled_batch_trains_to_the_same_numbers(images, monkeypatch):
    asked = {}

    def compiled(call, **options):  # by tracing alone: not everybody has a compiler
        asked.update(options)
        return torch._dynamo.optimize("eager")(call)

    monkeypatch.setattr(torch, "compile", compiled)
    models = networks("resnet8", 2)
    plain = fit_batched(copy.deepcopy(models), images, RECIPES["sgd"], seeds=[0, 1], backend="grouped")
    for one, other in zip(fit_batched(models, images, RECIPES["sgd"], seeds=[0, 1], backend="grouped", compiled=True),
                          plain):
        assert_same(one, other)
    assert asked == {"mode": "default"}


@pytest.mark.parametrize("backend", ["grouped", "vmap", "alone"])
def test_evaluations_are_those_of_each_network(images, backend):
    models = networks("resnet8")
    found = evaluate_batched(models, images, backend=backend, batch_size=50)
    for one, model in zip(found, models):
        expected = evaluate(model, images)
        assert one.accuracy == pytest.approx(expected.accuracy) and one.loss == pytest.approx(expected.loss)
    assert len({one.loss for one in found}) == 3


def test_a_run_that_was_interrupted_goes_on(images, tmp_path, monkeypatch):
    models, recipe = networks("resnet8"), RECIPES["sgd"]
    whole = fit_batched(copy.deepcopy(models), images, recipe, seeds=SEEDS, backend="grouped")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    passes, forward = iter(range(7)), Batch.forward

    def interrupted(self, x):
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(Batch, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_batched(copy.deepcopy(models), images, recipe, seeds=SEEDS, backend="grouped", resume=tmp_path / "run")
    steps = []
    monkeypatch.setattr(Batch, "forward", lambda self, x: steps.append(1) or forward(self, x))
    found = fit_batched(copy.deepcopy(models), images, recipe, seeds=SEEDS, backend="grouped", resume=tmp_path / "run")
    assert len(steps) == 20 - 7
    for one, other in zip(found, whole):
        assert one.losses == other.losses
        torch.testing.assert_close(one.state, other.state, rtol=0, atol=0)
    with pytest.raises(ValueError, match="belongs to a run with seed"):
        fit_batched(copy.deepcopy(models), images, recipe, seeds=[3, 3, 4], backend="grouped", resume=tmp_path / "run")


@pytest.mark.parametrize(("change", "said"), [
    ({"seeds": [0]}, "got 3 models, 1 seeds and 3 masks: expected equal"),
    ({"masks": [None]}, "got 3 models, 3 seeds and 1 masks"),
    ({"backend": "fast"}, "unknown backend 'fast': expected one of grouped, vmap, alone"),
    ({"seeds": [0, 1, -1], "backend": "vmap"}, "seed is -1: expected an integer of at least 0"),
    ({"recipe": Recipe(4, sparse_opt=True, batch_size=32), "backend": "grouped"}, "'grouped' with sparse_opt"),
    ({"models": []}, "got 0 models"),
    ({"models": [*networks("resnet8", 2), *networks("mlp", 1)], "backend": "vmap"}, "3 models of 2 architectures"),
    ({"models": [*map(nn.Linear, (2, 2, 2), (2, 2, 3))], "backend": "grouped"}, "3 models of 2 architectures"),
    ({"models": [nn.Dropout(0.5)] * 3, "backend": "vmap"}, "backend is 'vmap' for a Dropout: expected none"),
])
def test_what_does_not_fit_is_refused(images, change, said):
    given = {"models": networks("resnet8"), "recipe": RECIPES["sgd"], "seeds": SEEDS, **change}
    models, recipe = given.pop("models"), given.pop("recipe")
    with pytest.raises(ValueError, match=said):
        fit_batched(models, images, recipe, **given)


def test_a_batch_is_not_trained_as_one_network(images):
    with pytest.raises(ValueError, match=r"expected \[n, 2, ...\], an axis for the networks"):
        fit(Batch(networks("mlp", 2)), images, RECIPES["sgd"], seed=0)
    with pytest.raises(ValueError, match=r"seed is \[0\]: expected an integer of at least 0"):
        fit(networks("mlp", 1)[0], images, RECIPES["sgd"], seed=[0])
