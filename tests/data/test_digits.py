"""The digits: all 1,797 of them, each once, in the proportions of the classes."""

import re

import pytest
import torch
from sklearn.datasets import load_digits

from permask_core.data import load_dataset


def images(split):
    return {tuple(image) for image in split.x.flatten(1).mul(1e4).round().long().tolist()}


def test_every_image_is_there_once(digits):
    assert len(digits.train.x) + len(digits.test.x) == 1797 and len(digits.test.x) == 360
    assert digits.train.x.shape[1:] == digits.input_shape == (1, 8, 8) and digits.classes == 10
    assert digits.name == "digits"
    for split in (digits.train, digits.test):
        assert split.x.dtype == torch.float32 and split.y.dtype == torch.int64 and len(split.x) == len(split.y)
    assert not images(digits.train) & images(digits.test)
    assert len(images(digits.train) | images(digits.test)) == 1797  # all images of the set differ


def test_pixels_and_labels_belong_together(digits):
    """Standardising is one scale for all pixels: each image is still the one that scikit-learn gives its label to."""
    x, y = load_digits(return_X_y=True)
    label = {tuple(image): target for image, target in zip(x.astype(int).tolist(), y)}
    low, high = (digits.train.x.min().item(), digits.train.x.max().item())
    for split in (digits.train, digits.test):
        raw = ((split.x.flatten(1) - low) / (high - low) * 16).round().long().tolist()
        assert [label[tuple(image)] for image in raw] == split.y.tolist()


def test_standardised_by_the_training_part(digits):
    assert digits.train.x.mean().abs() < 1e-6 and (digits.train.x.std() - 1).abs() < 1e-4
    assert 1e-6 < digits.test.x.mean().abs() < 0.1


def test_stratified(digits):
    everything = torch.bincount(torch.cat([digits.train.y, digits.test.y]))
    for split in (digits.train, digits.test):
        share = len(split.y) / 1797
        assert (torch.bincount(split.y) - everything * share).abs().max() <= 1


def test_the_seed_decides_about_the_split():
    one, same, other = (load_dataset("digits", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.train.x, same.train.x) and torch.equal(one.test.y, same.test.y)
    assert images(one.test) != images(other.test)


@pytest.mark.parametrize("size", [10, 500, 1787])
def test_both_parts_keep_every_class(size):
    data = load_dataset("digits", test_size=size)
    assert len(data.test.y) == size
    assert set(data.train.y.tolist()) == set(data.test.y.tolist()) == set(range(10))


@pytest.mark.parametrize("name, options, message", [
    ("shoes", {}, "unknown dataset 'shoes': expected one of digits"),
    ("digits", {"fold": 1}, "digits has no option 'fold': expected one of seed, test_size"),
    ("digits", {"test_size": 9}, "test_size is 9"), ("digits", {"test_size": 1788}, "test_size is 1788"),
    ("digits", {"test_size": 0.2}, "test_size is 0.2"),
])
def test_bad_input_is_named(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_dataset(name, **options)
