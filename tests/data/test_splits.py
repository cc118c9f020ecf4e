"""Batches of a split: what the seed, the epoch and its index make of each image, cut as torchvision would cut it."""

import itertools
import re

import numpy as np
import pytest
import torch
from scipy import stats

from permask_core.data.splits import Split, channel_moments, crop, in_order, mix_seed, standardise
from permask_core.models.vision import torchvision

functional = torchvision.transforms.functional


def noise(n, channels=3, height=8, width=8):
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)


def together(split, indices, augmented=None):
    inputs, labels = zip(*split.batches(indices, augmented=augmented))
    return torch.cat(inputs), torch.cat(labels)


def raw(inputs):
    """uint8 images of inputs that were only divided by 255."""
    return (inputs * 255).round().to(torch.uint8)


@pytest.mark.parametrize("pad, height, width", [(4, 32, 32), (2, 5, 9), (0, 3, 4)])
def test_crops_are_torchvisions(pad, height, width):
    x = noise(64, height=height, width=width)
    corners, mirrored = torch.randint(0, 2 * pad + 1, (64, 2)), torch.rand(64) < 0.5
    assert mirrored.any() and not mirrored.all()
    for i, found in enumerate(crop(x, pad, corners, mirrored)):
        expected = functional.crop(functional.pad(x[i], [pad]), *corners[i].tolist(), height, width)
        assert torch.equal(found, functional.hflip(expected) if mirrored[i] else expected)


@pytest.mark.parametrize("pad, flip", [(1, True), (2, False), (0, True)])
def test_every_crop_is_as_likely(pad, flip):
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4)
    corners = list(itertools.product(range(2 * pad + 1), repeat=2))
    expected = [functional.crop(functional.pad(image, [pad]), *corner, 3, 4) for corner in corners]
    expected += [functional.hflip(crop) for crop in expected] if flip else []
    outcome = {tuple(crop.flatten().tolist()): i for i, crop in enumerate(expected)}
    assert len(outcome) == len(expected)
    n = 500 * len(expected)
    split = Split(image.repeat(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64), pad=pad, flip=flip)
    found = raw(together(split, in_order(split, 1000), augmented=(0, 0))[0]).flatten(1).tolist()
    counts = np.bincount([outcome[tuple(crop)] for crop in found], minlength=len(expected))
    assert stats.chisquare(counts).pvalue > 1e-3


def test_an_image_does_not_depend_on_its_batch():
    split = Split(noise(50), torch.arange(50), pad=2, flip=True)
    inputs, labels = together(split, in_order(split, 50), augmented=(3, 7))
    assert torch.equal(labels, split.y) and not torch.equal(raw(inputs), split.x)
    order = torch.randperm(50)
    for size in (1, 8, 50):
        shuffled, shuffled_labels = together(split, order.split(size), augmented=(3, 7))
        assert torch.equal(shuffled, inputs[order]) and torch.equal(shuffled_labels, order)
    part, labels = together(split, [torch.tensor([4]), torch.tensor([41, 4])], augmented=(3, 7))
    assert torch.equal(part, inputs[[4, 41, 4]]) and labels.tolist() == [4, 41, 4]


def test_epochs_and_seeds_differ():
    split = Split(noise(50), torch.arange(50), pad=4, flip=True)
    runs = [together(split, in_order(split, 50), augmented=part)[0] for part in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for one, other in itertools.combinations(runs, 2):
        assert (one != other).flatten(1).any(1).float().mean() > 0.9  # 1 in 162 is the same by chance


def test_augmentation_leaves_the_global_draws_alone():
    split = Split(noise(5), torch.arange(5), pad=4, flip=True)
    before = torch.get_rng_state()
    together(split, in_order(split, 2), augmented=(0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_standardised_as_numpy_does():
    x = noise(20) // 3 + 10
    mean, sd = channel_moments(x)
    expected = x.numpy().astype(np.float64) / 255
    assert np.allclose(mean, expected.mean((0, 2, 3)), rtol=1e-12)
    assert np.allclose(sd, expected.std((0, 2, 3)), rtol=1e-12)
    inputs, _ = together(Split(x, torch.zeros(20), mean, sd), [torch.arange(20)])
    assert inputs.dtype == torch.float32
    normal = (expected - expected.mean((0, 2, 3), keepdims=True)) / expected.std((0, 2, 3), keepdims=True)
    assert np.allclose(inputs.numpy(), normal, atol=1e-5)
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-5 and (inputs.std((0, 2, 3), False) - 1).abs().max() < 1e-5


def test_black_is_what_surrounds_an_image():
    """Padding comes before standardising, as in the published recipes: an edge is black, not grey."""
    split = Split(torch.full((400, 1, 2, 2), 255, dtype=torch.uint8), torch.zeros(400), (0.5,), (0.25,), pad=1)
    inputs, _ = together(split, [torch.arange(400)], augmented=(0, 0))
    assert inputs.unique().tolist() == [-2, 2]


def test_float_images_pass_as_they_are():
    x = torch.randn(6, 1, 4, 4)
    split = Split(x, torch.arange(6))
    for augmented in (None, (0, 0)):
        inputs, labels = together(split, in_order(split, 4), augmented)
        assert torch.equal(inputs, x) and torch.equal(labels, split.y)
    inputs.zero_()
    assert split.x.any()


def test_without_an_epoch_nothing_moves():
    split = Split(noise(6), torch.arange(6), pad=4, flip=True)
    assert torch.equal(raw(together(split, in_order(split, 4))[0]), split.x)


def test_a_split_goes_to_a_device_whole():
    split = Split(noise(6), torch.arange(6), (0.5,) * 3, (0.2,) * 3, pad=4, flip=True)
    moved = split.to("meta")
    assert moved.x.is_meta and moved.y.is_meta and len(moved) == 6
    assert (moved.mean, moved.sd, moved.pad, moved.flip) == (split.mean, split.sd, 4, True)


def test_a_channel_of_one_value_is_refused():
    x = noise(4)
    x[:, 1] = 7
    with pytest.raises(ValueError, match=r"channels are \[0\.\d+, 0\.0, 0\.\d+\]: expected numbers above 0"):
        channel_moments(x)


def test_images_of_any_number_are_standardised_alike():
    x, (mean, sd) = noise(7), ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert torch.equal(standardise(x, mean, sd)[3], standardise(x[3:4], mean, sd)[0])


def test_seeds_of_other_parts_are_others():
    parts = [part for n in (1, 2, 3) for part in itertools.product(range(12), repeat=n)]
    seeds = [mix_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [mix_seed(*part) for part in parts]
    # Every bit is set in half of the seeds, to about six standard deviations.
    bits = np.array([[seed >> bit & 1 for bit in range(63)] for seed in seeds]).mean(0)
    assert abs(bits - 0.5).max() < 3 / len(parts) ** 0.5
    with pytest.raises(ValueError, match=re.escape("expected non-negative integer")):
        mix_seed(-1, 0)


def test_in_order():
    split = Split(noise(5), torch.arange(5))
    assert [chosen.tolist() for chosen in in_order(split, 2)] == [[0, 1], [2, 3], [4]]
