"""Residual networks against published counts of parameters, He et al.'s definition written out, and torchvision's."""

import copy
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import permask_core
from permask_core.masks import prunable_weights
from permask_core.matching import permutation_groups
from permask_core.models import build_model, evaluation_mode
from permask_core.models.vision import torchvision

SMALL = {"resnet8": 1, "resnet20": 3, "resnet56": 9}
KINDS = ("projection", "padded")
# At width 1: the counts that torchvision publishes for 1000 classes, and the usual one on CIFAR-10.
LARGE = {"resnet18": (1000, 11_689_512), "resnet50": (1000, 25_557_032), "resnet18_cifar": (10, 11_173_962)}


def torchvisions(name, classes):
    """torchvision's own network, for CIFAR with its stem replaced by hand."""
    model = getattr(torchvision.models, name.removesuffix("_cifar"))(weights=None, num_classes=classes)
    if name.endswith("_cifar"):
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    return model


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def lively(model):
    """Every tensor drawn at random, variances above 0: nothing cancels and all layers differ."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else torch.randn_like(tensor) / 4)
    return model.eval()


@pytest.mark.parametrize("width", [0.25, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SMALL)
def test_the_parameters_of_small_networks_by_their_formula(name, kind, width):
    n, c = SMALL[name], int(16 * width)
    with torch.device("meta"):
        model = build_model(name, (3, 32, 32), 10, width=width, shortcut=kind)
    # Convolutions of a stage of m channels behind one of k: 9 k m + (2n - 1) 9 m^2; each has a norm of 2 m.
    convolutions = 27 * c + 9 * c * c + 9 * (2 * n - 1) * c * c + sum(9 * m * m // 2 + 9 * (2 * n - 1) * m * m
                                                                     for m in (2 * c, 4 * c))
    norms = 2 * c + 2 * n * 2 * (c + 2 * c + 4 * c)
    shortcuts = sum(m * m // 2 + 2 * m for m in (2 * c, 4 * c)) if kind == "projection" else 0
    assert parameters(model) == convolutions + norms + shortcuts + (4 * c + 1) * 10


@pytest.mark.parametrize("name, published", [("resnet20", 0.27e6), ("resnet56", 0.85e6)])
def test_padded_networks_have_the_published_number_of_parameters(name, published):
    """He et al., table 6, to the two digits given there."""
    assert round(parameters(build_model(name, (3, 32, 32), 10, shortcut="padded")), -4) == published


def test_names_read_as_the_network_does():
    state = build_model("resnet8", (3, 8, 8), 10).state_dict()
    assert [key for key in state if key.endswith("weight")] == [
        "conv1.weight", "norm1.weight",
        *(f"stage{i}.block1.{layer}.weight" for i in (1, 2, 3)
          for layer in ("conv1", "norm1", "conv2", "norm2", *(("shortcut.conv", "shortcut.norm") if i > 1 else ()))),
        "head.weight"]


def he_et_al(state, x, blocks, kind):
    """The network written out: what its ``state_dict`` computes in evaluation mode."""
    def conv(x, conv, norm, stride=1):
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return F.batch_norm(x, *(state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    x = conv(x, "conv1", "norm1").relu()
    for i in (1, 2, 3):
        for j in range(1, blocks + 1):
            block, stride = f"stage{i}.block{j}", 2 if i > 1 and j == 1 else 1
            y = conv(x, f"{block}.conv1", f"{block}.norm1", stride).relu()
            y = conv(y, f"{block}.conv2", f"{block}.norm2")
            if stride == 2 and kind == "projection":
                x = conv(x, f"{block}.shortcut.conv", f"{block}.shortcut.norm", stride)
            elif stride == 2:
                zeros = torch.zeros_like(y[:, :x.shape[1] // 2])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = (x + y).relu()
    return x.mean(dim=(2, 3)) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, shape", [("resnet8", (1, 7, 12)), ("resnet20", (3, 32, 32))])
def test_they_compute_what_he_et_al_say(name, shape, kind):
    model, x = lively(build_model(name, shape, 10, width=0.25, shortcut=kind)), torch.randn(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(model(x), he_et_al(model.state_dict(), x, SMALL[name], kind), rtol=1e-4, atol=1e-4)


def test_a_padded_shortcut_by_hand():
    """Two channels become five: one of zeros before them, two after, and every second pixel stays."""
    model = build_model("resnet8", (1, 8, 8), 10, width=0.15, shortcut="padded")
    shortcut = model.stage2.block1.shortcut
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    kept = torch.tensor([[1.0, 3], [7, 9]])
    zeros = torch.zeros(2, 2)
    assert torch.equal(shortcut(torch.stack([x, -x])[None]), torch.stack([zeros, kept, -kept, zeros, zeros])[None])
    assert not list(shortcut.parameters())


@pytest.mark.parametrize("name, options", [*((name, {"shortcut": kind}) for name in SMALL for kind in KINDS),
                                           *((name, {}) for name in LARGE)])
def test_pruning_leaves_shortcuts_out(name, options):
    """The rest are the layers that a network is named after."""
    with torch.device("meta"):
        model = build_model(name, (3, 32, 32), 10, **options)
    prunable = prunable_weights(model)
    assert len(prunable) == int(re.search(r"\d+", name).group())
    assert {"conv1.weight", "head.weight" if name in SMALL else "fc.weight"} < set(prunable)
    left = {key for key, tensor in model.named_parameters() if tensor.ndim > 1} - set(prunable)
    assert len(left) == {"projection": 2, "padded": 0}.get(options.get("shortcut"), 3 + (name == "resnet50"))
    assert all(re.search(r"\.(shortcut\.conv|downsample\.0)\.weight$", key) for key in left)


@pytest.mark.parametrize("name", LARGE)
def test_at_width_1_they_are_torchvisions(name):
    classes, published = LARGE[name]
    theirs = lively(torchvisions(name, classes))
    model = build_model(name, (3, 32, 32), classes)
    assert parameters(model) == published
    assert model.load_state_dict(theirs.state_dict()) and list(model.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 40, 33)
    with evaluation_mode(model):
        assert torch.equal(model(x), theirs(x))


@pytest.mark.parametrize("width", [0.25, 1, 2])
@pytest.mark.parametrize("name", LARGE)
def test_a_width_is_a_factor_on_all_channels_of_torchvisions(name, width):
    with torch.device("meta"):
        theirs = torchvisions(name, 1000).state_dict()
        model = build_model(name, (5, 32, 32), 10, width=width).state_dict()
    ends = {("conv1.weight", 1): 5, ("fc.weight", 0): 10, ("fc.bias", 0): 10}
    for key, tensor in theirs.items():
        assert tuple(model[key].shape) == tuple(
            ends.get((key, axis), size if axis > 1 else size * width) for axis, size in enumerate(tensor.shape)), key
    assert list(model) == list(theirs)


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_initialisation(name):
    """Convolutions have variance 2 / fan_out, norms are the identity, and the head is PyTorch's own."""
    model = build_model(name, (3, 32, 32), 500, seed=3)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            variance = 2 / (module.out_channels * math.prod(module.kernel_size))
            mean_square = module.weight.square().mean().item() / variance
            assert abs(mean_square - 1) < 5 * math.sqrt(2 / module.weight.numel()), key
            assert module.bias is None
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert torch.all(module.weight == 1) and torch.all(module.bias == 0)
        elif isinstance(module, torch.nn.Linear):
            assert 0.98 < module.weight.abs().max() * math.sqrt(module.in_features) <= 1


@pytest.mark.parametrize("name, shape, options", [
    *((name, (1, 8, 8), {"shortcut": kind, "width": width})
      for name in SMALL for kind in KINDS for width in (0.03, 0.15, 0.25, 2)),
    ("resnet20", (3, 4, 5), {}), ("resnet18", (1, 32, 47), {"width": 0.1}), ("resnet50", (4, 33, 32), {"width": 0.1}),
    ("resnet18_cifar", (1, 8, 9), {"width": 0.1})])
def test_shapes_while_training(name, shape, options):
    model = build_model(name, shape, 7, **options)
    out = model(torch.randn(2, *shape))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name, options", [("resnet8", {"shortcut": "projection"}), ("resnet8", {"shortcut": "padded"}),
                                           *((name, {}) for name in LARGE)])
def test_they_can_be_traced_and_copied(name, options):
    model = lively(build_model(name, (3, 32, 32), 10, width=0.1, **options))
    x = torch.randn(2, 3, 32, 32)
    others = (torch.export.export(model, (x,)).module(), torch.fx.symbolic_trace(model), copy.deepcopy(model),
              pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        for other in others:
            torch.testing.assert_close(other(x), model(x))


def test_the_stem_for_cifar_keeps_the_size_of_the_image():
    """Three stages halve 32x32 to 4x4."""
    model, seen = build_model("resnet18_cifar", (3, 32, 32), 10, width=0.1), {}
    for name in ("layer1", "layer4"):
        getattr(model, name).register_forward_hook(lambda module, x, out, name=name: seen.update({name: out.shape[2:]}))
    model(torch.zeros(2, 3, 32, 32))
    assert seen == {"layer1": (32, 32), "layer4": (4, 4)}


def test_the_permutation_groups_of_resnet18_for_cifar():
    """One for each stage's residual stream, and one inside each block."""
    groups = permutation_groups(build_model("resnet18_cifar", (3, 32, 32), 10, width=0.1), torch.zeros(2, 3, 32, 32),
                                check=True)
    assert {name: group.size for name, group in groups.items()} == {
        "conv1": 6, **{f"layer{i}.{j}.conv1": size for i, size in enumerate((6, 13, 26, 51), 1) for j in (0, 1)},
        "layer2.0.conv2": 13, "layer3.0.conv2": 26, "layer4.0.conv2": 51}


def test_importing_the_models_leaves_the_slow_libraries_alone():
    """They take about as long to import as torch itself, and two of them are extras."""
    code = "import sys, permask_core.models; print({'timm', 'torchvision', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(permask_core.__file__).parent.parent, text=True,
                          capture_output=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("name, shape, options, message", [
    ("resnet20", (3, 32, 32), {"shortcut": "identity"}, "shortcut is 'identity': expected one of projection, padded"),
    ("resnet8", (3, 32, 32), {"shortcut": None}, "shortcut is None"),
    ("resnet18", (3, 32, 32), {"shortcut": "padded"}, "resnet18 has no option 'shortcut': expected one of width"),
    ("resnet56", (3, 3, 32), {}, "input_shape is (3, 3, 32): resnet56 halves the image twice and needs at least 4x4"),
    ("resnet50", (3, 32, 28), {}, "input_shape is (3, 32, 28): resnet50 halves the image five times and needs at "
                                  "least 32x32"),
    ("resnet18_cifar", (3, 7, 32), {}, "input_shape is (3, 7, 32): resnet18_cifar halves the image three times and "
                                       "needs at least 8x8"),
    ("resnet18_cifar", (3, 8, 8), {"width": -1}, "width is -1"),
    ("resnet20", (3, 32, 32), {"width": 0}, "width is 0"), ("resnet18", (3, 32, 32), {"width": "4"}, "width is '4'"),
])
def test_bad_input_is_named(name, shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(name, shape, 10, **options)
