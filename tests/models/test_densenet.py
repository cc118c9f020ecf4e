"""DenseNets against torchvision's own, the published counts of parameters and the paper's count of layers."""

import copy
import math
import re

import pytest
import torch

from permask_core.masks import prunable_weights
from permask_core.matching import permutation_groups
from permask_core.models import build_model, evaluation_mode
from permask_core.models.imagenet import ScaledDenseNet
from permask_core.models.vision import torchvision

# At 1000 classes, as torchvision publishes. The stem for small images has 64 x 3 x (49 - 9) weights fewer.
PUBLISHED = {"densenet121": 7_978_856, "densenet169": 14_149_480}
NAMES = {**PUBLISHED, **{f"{name}_cifar": count - 7680 for name, count in PUBLISHED.items()}}


def torchvisions(name, classes):
    """torchvision's own network, for CIFAR with its stem replaced by hand."""
    model = getattr(torchvision.models, name.removesuffix("_cifar"))(weights=None, num_classes=classes)
    if name.endswith("_cifar"):
        model.features.conv0 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.features.pool0 = torch.nn.Identity()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_at_width_1_they_are_torchvisions(name):
    theirs = torchvisions(name, 1000)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.ndim == 1:  # norms and biases, which start constant
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    model = build_model(name, (3, 32, 32), 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == NAMES[name]
    assert list(model.state_dict()) == list(theirs.state_dict()) and model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 40, 33)
    with evaluation_mode(model, theirs):
        assert model(x).std() > 0 and torch.equal(model(x), theirs(x))


@pytest.mark.parametrize("name", PUBLISHED)
def test_with_the_same_seed_they_start_as_torchvisions(name):
    torch.manual_seed(4)
    theirs, state = torchvisions(name, 10).state_dict(), build_model(name, (3, 32, 32), 10, seed=4).state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("width", [0.25, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_width_is_a_factor_on_all_channels_of_torchvisions(name, width):
    with torch.device("meta"):
        theirs = torchvisions(name, 1000).state_dict()
        model = build_model(name, (5, 32, 32), 10, width=width).state_dict()
    ends = {("features.conv0.weight", 1): 5, ("classifier.weight", 0): 10, ("classifier.bias", 0): 10}
    assert list(model) == list(theirs)
    for key, tensor in theirs.items():
        assert tuple(model[key].shape) == tuple(
            ends.get((key, axis), size if axis > 1 else size * width) for axis, size in enumerate(tensor.shape)), key


@pytest.mark.parametrize("name, channels", [("densenet121", 1), ("densenet121_cifar", 3), ("densenet169_cifar", 6)])
def test_a_stem_of_another_shape_starts_as_torchvisions_would(name, channels):
    """Kaiming normal: variance 2 / fan_in."""
    weight = build_model(name, (channels, 32, 32), 10).features.conv0.weight
    mean_square = weight.square().mean().item() * weight[0].numel() / 2
    assert abs(mean_square - 1) < 5 * math.sqrt(2 / weight.numel())


@pytest.mark.parametrize("name", NAMES)
def test_all_the_layers_that_they_are_named_after_may_be_pruned(name):
    with torch.device("meta"):
        model = build_model(name, (3, 32, 32), 10)
    prunable = prunable_weights(model)
    assert len(prunable) == int(re.search(r"\d+", name).group())
    assert set(prunable) == {key for key, tensor in model.named_parameters() if tensor.ndim > 1}


@pytest.mark.parametrize("name, shape", [("densenet121", (1, 29, 64)), ("densenet169", (3, 64, 64)),
                                         ("densenet121_cifar", (4, 8, 9)), ("densenet169_cifar", (3, 32, 32))])
def test_shapes_while_training(name, shape):
    model = build_model(name, shape, 7, width=0.1)
    out = copy.deepcopy(model)(torch.randn(2, *shape))
    assert out.shape == (2, 7)
    model(torch.randn(2, *shape)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_stem_for_cifar_keeps_the_size_of_the_image():
    model, seen = build_model("densenet121_cifar", (3, 32, 32), 10, width=0.1), {}
    for name in ("pool0", "norm5"):
        getattr(model.features, name).register_forward_hook(
            lambda module, x, out, name=name: seen.update({name: out.shape[2:]}))
    model(torch.zeros(2, 3, 32, 32))
    assert seen == {"pool0": (32, 32), "norm5": (4, 4)}


def test_the_permutation_groups_of_a_short_one():
    """One for what each layer adds to the concatenation, one for each bottleneck, the stem and each transition."""
    model = ScaledDenseNet((1, 2, 1, 1), 3, 5, 0.25, small_images=True)
    groups = permutation_groups(model, torch.randn(2, 3, 16, 16), check=True)
    layers = [f"features.denseblock{i}.denselayer{j}" for i, j in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 1))]
    assert {name: group.size for name, group in groups.items()} == {
        "features.conv0": 16, **{f"{layer}.conv1": 32 for layer in layers}, **{f"{layer}.conv2": 8 for layer in layers},
        "features.transition1.conv": 12, "features.transition2.conv": 14, "features.transition3.conv": 11}


@pytest.mark.parametrize("name, shape, options, message", [
    ("densenet121", (3, 28, 32), {}, "input_shape is (3, 28, 32): densenet121 halves the image five times and needs at "
                                     "least 29x29"),
    ("densenet169_cifar", (3, 8, 7), {}, "densenet169_cifar halves the image three times and needs at least 8x8"),
    ("densenet169", (3, 32, 32), {"width": 0}, "width is 0"),
    ("densenet121", (3, 32, 32), {"growth": 12}, "densenet121 has no option 'growth': expected one of width"),
])
def test_bad_input_is_named(name, shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(name, shape, 10, **options)
