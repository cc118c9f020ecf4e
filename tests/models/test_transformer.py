"""The Vision Transformer against torchvision's own, its published count of parameters, and its symmetry."""

import math
import re

import pytest
import torch

from permask_core.masks import prunable_weights
from permask_core.matching import permutation_groups
from permask_core.models import build_model, evaluation_mode
from permask_core.models.vision import torchvision

ONE_HEAD = 1 / 12
LAYERS = [f"encoder.layers.encoder_layer_{i}" for i in range(12)]


def test_at_width_1_it_is_torchvisions():
    with torch.device("meta"):
        theirs = torchvision.models.vit_b_16(weights=None)
        model = build_model("vit_b_16", (3, 224, 224), 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 86_567_656  # as torchvision publishes
    shapes = [[(key, tensor.shape) for key, tensor in state.state_dict().items()] for state in (model, theirs)]
    assert shapes[0] == shapes[1]


def test_with_the_same_seed_it_starts_as_torchvisions_and_computes_the_same():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        theirs = torchvision.models.vit_b_16(weights=None, image_size=32, num_classes=10)
    model, x = build_model("vit_b_16", (3, 32, 32), 10, seed=4), torch.randn(1, 3, 32, 32)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in theirs.state_dict().items())
    torch.nn.init.normal_(theirs.heads.head.weight)  # it starts at zero, and so would the outputs
    model.load_state_dict(theirs.state_dict())
    with evaluation_mode(model, theirs):
        assert model(x).std() > 0 and torch.equal(model(x), theirs(x))


@pytest.mark.parametrize("width, heads", [(0.01, 1), (0.25, 3), (0.3, 4), (2, 24)])
def test_a_width_is_a_factor_on_the_heads_and_all_that_follows_from_them(width, heads):
    with torch.device("meta"):
        theirs = torchvision.models.vit_b_16(weights=None).state_dict()
        model = build_model("vit_b_16", (5, 224, 224), 10, width=width)
    state = model.state_dict()
    ends = {("conv_proj.weight", 1): 5, ("heads.head.weight", 0): 10, ("heads.head.bias", 0): 10}
    assert {layer.self_attention.num_heads for layer in model.encoder.layers} == {heads}
    assert list(state) == list(theirs)
    for key, tensor in theirs.items():
        assert tuple(state[key].shape) == tuple(
            ends.get((key, axis), size if size % 768 else size * heads // 12)
            for axis, size in enumerate(tensor.shape)), key


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_the_patch_projection_starts_alike_for_any_channels(channels):
    """A normal of variance 1 / fan_in, and no bias."""
    projection = build_model("vit_b_16", (channels, 16, 16), 10, width=0.25).conv_proj
    weight = projection.weight
    mean_square = weight.square().mean().item() * channels * 256
    assert abs(mean_square - 1) < 5 * math.sqrt(2 / weight.numel()) and not projection.bias.any()


def test_what_may_be_pruned():
    """The input projections of attention are one parameter, not a layer; they stay dense."""
    with torch.device("meta"):
        model = build_model("vit_b_16", (3, 224, 224), 1000)
    prunable = prunable_weights(model)
    assert list(prunable) == [
        "conv_proj.weight",
        *(f"{layer}.{part}.weight" for layer in LAYERS for part in ("self_attention.out_proj", "mlp.0", "mlp.3")),
        "heads.head.weight"]
    left = [key for key, tensor in model.named_parameters() if tensor.ndim > 1 and key not in prunable]
    assert left == ["class_token", "encoder.pos_embedding",
                    *(f"{layer}.self_attention.in_proj_weight" for layer in LAYERS)]
    assert sum(tensor.numel() for tensor in prunable.values()) == 768 * (768 + 12 * (768 + 2 * 3072) + 1000)


def test_its_permutation_groups():
    """The tokens' units, each layer's heads and MLP, and inside each head its queries with its keys, and its values."""
    model = build_model("vit_b_16", (3, 32, 32), 10, width=2 * ONE_HEAD)
    groups = permutation_groups(model, torch.zeros(2, 3, 32, 32), check=True)
    outer = {name: group.size for name, group in groups.items() if group.within is None}
    heads = [f"{layer}.self_attention.in_proj" for layer in LAYERS]
    assert outer == {"conv_proj": 128, **dict.fromkeys(heads, 2), **{f"{layer}.mlp.0": 512 for layer in LAYERS}}
    inner = [(group.within, group.size) for group in groups.values() if group.within is not None]
    assert sorted(inner) == sorted(((name, unit), 64) for name in heads for unit in (0, 0, 1, 1))


@pytest.mark.parametrize("shape", [(1, 16, 16), (4, 48, 48)])
def test_shapes_while_training(shape):
    model = build_model("vit_b_16", shape, 7, width=ONE_HEAD)
    out = model(torch.randn(2, *shape))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("shape, options, message", [
    ((3, 32, 48), {}, "input_shape is (3, 32, 48): vit_b_16 cuts the image into patches of 16x16 and needs a square"),
    ((3, 28, 28), {}, "input_shape is (3, 28, 28)"), ((3, 8, 8), {}, "side is a multiple of 16"),
    ((3, 32, 32), {"width": 0}, "width is 0"), ((3, 32, 32), {"heads": 3}, "vit_b_16 has no option 'heads'"),
])
def test_bad_input_is_named(shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model("vit_b_16", shape, 10, **options)


# ---- A small one -----------------------------------------------------------------------------------------------------

SMALL = [f"encoder.layers.encoder_layer_{i}" for i in range(2)]


@pytest.mark.parametrize("channels, side, width, heads", [(3, 28, 1, 4), (1, 8, 0.5, 2), (3, 32, 0.01, 1)])
def test_the_small_one_is_torchvisions_with_sixteen_patches(channels, side, width, heads):
    theirs = torchvision.models.VisionTransformer(side, side // 4, 2, heads, 12 * heads, 24 * heads, num_classes=5)
    state = build_model("vit", (channels, side, side), 5, width=width).state_dict()
    for key, tensor in theirs.state_dict().items():
        assert state[key].shape[1:] == tensor.shape[1:] or key == "conv_proj.weight", key
    assert list(state) == list(theirs.state_dict()) and state["encoder.pos_embedding"].shape == (1, 17, 12 * heads)
    model = build_model("vit", (3, side, side), 5, width=width)
    theirs.load_state_dict(model.state_dict())
    torch.nn.init.normal_(theirs.heads.head.weight)  # it starts at zero, and so would the outputs
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, side, side)
    with evaluation_mode(model, theirs):
        assert model(x).std() > 0 and torch.equal(model(x), theirs(x))


def test_all_linear_weights_of_its_layers_may_be_pruned():
    prunable = prunable_weights(build_model("vit", (1, 28, 28), 10))
    parts = ("self_attention.in_proj_weight", "self_attention.out_proj.weight", "mlp.0.weight", "mlp.3.weight")
    assert sorted(prunable) == sorted(f"{layer}.{part}" for layer in SMALL for part in parts)
    assert sum(tensor.numel() for tensor in prunable.values()) == 2 * 8 * 48 * 48


def test_its_heads_their_dimensions_its_mlp_and_its_tokens_are_groups():
    groups = permutation_groups(build_model("vit", (1, 8, 8), 10), torch.zeros(2, 1, 8, 8), check=True)
    outer = {name: group.size for name, group in groups.items() if group.within is None}
    heads = [f"{layer}.self_attention.in_proj" for layer in SMALL]
    assert outer == {"conv_proj": 48, **dict.fromkeys(heads, 4), **{f"{layer}.mlp.0": 96 for layer in SMALL}}
    inner = sorted((group.within, group.size) for group in groups.values() if group.within is not None)
    assert inner == sorted(((name, unit), 12) for name in heads for unit in [*range(4)] * 2)


@pytest.mark.parametrize("shape", [(1, 8, 12), (3, 30, 30)])
def test_images_that_do_not_divide_into_sixteen_patches_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"input_shape is {shape}: vit cuts the image into 4x4 patches")):
        build_model("vit", shape, 10)
