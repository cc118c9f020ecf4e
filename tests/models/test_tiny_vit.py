"""TinyViT against timm's own, its published size, and what its windows see."""

import re

import pytest
import torch

from permask_core.matching import permutation_groups
from permask_core.models import build_model, evaluation_mode, extras
from permask_core.models.tiny_vit import tiny_vit

timms = tiny_vit.tiny_vit_5m_224


def test_at_width_1_it_is_timms():
    with torch.device("meta"):
        theirs, model = timms(num_classes=1000), build_model("tiny_vit_5m", (3, 224, 224), 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_392_764  # 5.4 million in Wu et al.
    shapes = [[(key, tensor.shape) for key, tensor in state.state_dict().items()] for state in (model, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("height, side, windows", [
    (32, 32, (4, 2, 1)), (64, 64, (7, 4, 2)), (96, 33, (7, 6, 3)), (224, 224, (7, 14, 7)), (225, 250, (7, 14, 7))])
def test_it_starts_and_computes_as_timms_with_windows_that_fit_the_image(height, side, windows):
    torch.manual_seed(4)
    theirs = timms(num_classes=10, window_sizes=(7, *windows))
    model, x = build_model("tiny_vit_5m", (3, height, side), 10, seed=4), torch.randn(1, 3, height, side)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in theirs.state_dict().items())
    with torch.no_grad():
        for tensor in state.values():
            if tensor.is_floating_point() and len(tensor.unique()) == 1:  # norms, biases and those of attention
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    theirs.load_state_dict(state)
    with evaluation_mode(model, theirs):
        assert model(x).std() > 0 and torch.equal(model(x), theirs(x))


@pytest.mark.parametrize("width, heads", [(0.01, (1, 1, 1, 1)), (0.5, (1, 2, 2, 5)), (2, (4, 8, 10, 20))])
def test_a_width_is_a_factor_on_the_heads_and_all_that_follows_from_them(width, heads):
    with torch.device("meta"):
        model = build_model("tiny_vit_5m", (5, 64, 64), 10, width=width)
    state = model.state_dict()
    assert state["patch_embed.conv1.conv.weight"].shape[:2] == (16 * heads[0], 5)
    assert state["stages.0.blocks.1.conv1.conv.weight"].shape[:2] == (128 * heads[0], 32 * heads[0])
    for i, count in enumerate(heads[1:], 1):
        for block in model.stages[i].blocks:
            assert (block.attn.num_heads, block.attn.key_dim, block.attn.val_dim) == (count, 32, 32)
            assert block.mlp.fc1.weight.shape == (128 * count, 32 * count)
    assert state["head.fc.weight"].shape == (10, 32 * heads[-1])


def test_weights_that_are_replaced_in_evaluation_mode_have_an_effect():
    """timm keeps the attention biases that it looked up before."""
    model = build_model("tiny_vit_5m", (3, 32, 32), 10, width=0.01).eval()
    theirs = timms(num_classes=10, embed_dims=[32] * 4, num_heads=[1] * 4, window_sizes=[7, 4, 2, 1]).eval()
    theirs.load_state_dict(model.state_dict())
    other = {key: torch.randn_like(tensor) if "attention_biases" in key else tensor
             for key, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(theirs(x), before)
        after = torch.func.functional_call(model, other, x)
        model.load_state_dict(other)
        theirs.load_state_dict(other)
        assert not torch.equal(after, before) and torch.equal(model(x), after)
        assert torch.equal(theirs(x), before)  # as long as this holds, there is something to set right
        theirs.train().eval()
        assert torch.equal(theirs(x), after)


def test_its_permutation_groups():
    """Streams, inner convolutions, and of each attention's only head the queries with their keys, and the values."""
    model = build_model("tiny_vit_5m", (3, 32, 32), 10, width=0.01)
    groups = permutation_groups(model, torch.randn(2, 3, 32, 32), check=True)
    blocks = [f"stages.{i}.blocks.{j}" for i, depth in ((1, 2), (2, 6), (3, 2)) for j in range(depth)]
    assert {name: group.size for name, group in groups.items()} == {
        "patch_embed.conv1.conv": 16, "patch_embed.conv2.conv": 32,
        **{f"stages.0.blocks.{j}.conv1.conv": 128 for j in (0, 1)},
        **{f"stages.{i}.downsample.{conv}.conv": 32 for i in (1, 2, 3) for conv in ("conv1", "conv3")},
        **{f"{block}.{part}": 32 for block in blocks for part in ("attn.qkv", "attn.qkv#2")},
        **{f"{block}.mlp.fc1": 128 for block in blocks}}


@pytest.mark.parametrize("shape", [(1, 32, 32), (4, 64, 50)])
def test_shapes_while_training(shape):
    model = build_model("tiny_vit_5m", shape, 7, width=0.01)
    out = model(torch.randn(2, *shape))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_timm_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", {"transformers": True}.get)
    with pytest.raises(ImportError, match=re.escape("tiny_vit_5m needs timm, which is not installed: pip install "
                                                    '"permask[vision]"')):
        build_model("tiny_vit_5m", (3, 32, 32), 10)


@pytest.mark.parametrize("shape, options, message", [
    ((3, 32, 31), {}, "input_shape is (3, 32, 31): tiny_vit_5m halves the image five times and needs at least 32x32"),
    ((3, 32, 32), {"width": 0}, "width is 0"), ((3, 32, 32), {"heads": 3}, "tiny_vit_5m has no option 'heads'"),
])
def test_bad_input_is_named(shape, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model("tiny_vit_5m", shape, 10, **options)
