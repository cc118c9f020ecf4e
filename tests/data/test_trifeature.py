"""Trifeature: each image a function of seed and index, figures as large as geometry says, balanced attributes."""

import math
import re
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from permask_core.data.trifeature import (
    COLOURS,
    SHAPES,
    TEXTURES,
    add_noise,
    attributes,
    correlate,
    draw,
    period,
    poses,
    trifeature,
)
from permask_core.evaluation.fairness import demographic_parity_difference, equalized_odds_difference

module = import_module("permask_core.data.trifeature")  # in its package, the function has the name
SHAPE, TEXTURE = ({name: number for number, name in enumerate(names)} for names in (SHAPES, TEXTURES))
GREY, WHITE = 128, 9
RGB = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 102, 255], [0, 255, 255], [76, 0, 128],
                    [26, 102, 128], [255, 153, 0], [255, 255, 255]])  # in the order of the paper's names
# Areas in a template of side 2, and the coloured share of a plane.
AREA = {"triangle": 2, "square": 4, "plus": 20 / 9, "circle": math.pi, "tee": 20 / 9, "rhombus": 1.2,
        "pentagon": 2.5 * math.sin(math.radians(72)), "fivesquare": 20 / 9, "trapezoid": 3,
        "star": 10 * math.tan(math.pi / 10) / (3 - math.tan(math.pi / 10) ** 2)}
FILL = {"solid": 1, "stripes": 0.5, "grid": 1 - 0.7 ** 2, "hexgrid": 1 - 0.75 ** 2, "dots": math.pi * 0.3 ** 2,
        "noise": 0.5, "triangles": 0.5, "zigzags": 0.5, "rain": 1 - 0.95 ** 7, "pluses": 2 * 0.74 * 0.28 - 0.28 ** 2}


def white(shape, texture, index, **options):
    """The coloured share of each pixel of white images of one shape and texture, [n, s, s]."""
    shape, texture, colour = (torch.full_like(index, number) for number in (SHAPE[shape], TEXTURE[texture], WHITE))
    return (draw(shape, texture, colour, index, **options)[:, 0].double() - GREY) / (255 - GREY)


# ---- Random by index -------------------------------------------------------------------------------------------------

def test_the_numbers_are_those_of_splitmix64():
    """The first three of the generator's published implementation, started at 0 (here without the last bit)."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert module._draws(torch.tensor([0]), torch.arange(3)).tolist() == [[value >> 1 for value in expected]]


@pytest.mark.parametrize("image_size", [32, 45])
def test_an_image_does_not_depend_on_the_batch(image_size, monkeypatch):
    kinds, index = torch.stack(attributes(300, seed=1)), torch.arange(300) + 7
    images = draw(*kinds, index, 5, image_size)
    noisy = add_noise(images, index, [30.0, 20.0, 10.0], 5)
    chosen = torch.randperm(300)[:90]
    monkeypatch.setattr(module, "CHUNK", 5 * 9 * image_size ** 2)
    for which in (chosen, chosen[:1]):
        assert torch.equal(draw(*kinds[:, which], index[which], 5, image_size), images[which])
        assert torch.equal(add_noise(images[which], index[which], [30.0, 20.0, 10.0], 5), noisy[which])


def test_seed_and_index_each_change_the_image():
    one = torch.zeros(50, dtype=torch.int64)
    images = [draw(one + 3, one + 5, one, torch.arange(50), seed, 32) for seed in (0, 1)]
    assert len({image.numpy().tobytes() for image in torch.cat(images)}) == 100


def test_poses_are_uniform_and_independent():
    pose = poses(torch.arange(20_000), seed=3, image_size=50)
    for angle in (pose.angle, pose.texture_angle):
        assert angle.min() == -45 and angle.max() == 44
        assert stats.chisquare(torch.bincount(angle + 45)).pvalue > 1e-3
    turn = torch.deg2rad(pose.angle.double())
    reach = (50 * 64 / 224 * (turn.cos() + turn.sin().abs()))[:, None]
    place = (pose.centre - reach) / (50 - 2 * reach)
    uniform = torch.cat([place, pose.phase % 1], 1)
    for column in uniform.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    every = torch.cat([uniform, pose.angle[:, None], pose.texture_angle[:, None]], 1)
    assert (torch.corrcoef(every.T) - torch.eye(6)).abs().max() < 4 / math.sqrt(20_000)
    following = torch.corrcoef(torch.cat([every[1:], every[:-1]], 1).T)[:6, 6:]
    assert following.abs().max() < 4.5 / math.sqrt(20_000)  # 36 of them


# ---- What is drawn ---------------------------------------------------------------------------------------------------

def test_colours_are_the_papers():
    """Every combination: pixels lie between the grey of the background and the colour, and both are there."""
    shape, texture, colour = attributes(1000)
    images = draw(shape, texture, colour, torch.arange(1000), image_size=96).permute(0, 2, 3, 1).flatten(1, 2).int()
    rgb = RGB[colour].int()[:, None]
    assert (images == rgb).all(2).any(1).all()
    assert ((images == GREY).all(2).float().mean(1) > 0.5).all()
    share = ((images - GREY) * (rgb - GREY)).sum(2, keepdim=True) / (rgb - GREY).square().sum(2, keepdim=True)
    assert (images - GREY - share * (rgb - GREY)).abs().max() < 1
    assert share.min() >= 0 and share.max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_areas(shape):
    for size in (224, 32):
        areas = white(shape, "solid", torch.arange(12), image_size=size).sum((1, 2)) / (64 * size / 224) ** 2
        # A shape is as many samples as have their middle inside: at 32 pixels, an edge is 27 samples of 1 / 9 pixel.
        assert (areas - AREA[shape]).abs().max() < (0.01 if size == 224 else 0.12)
        assert abs(areas.mean() - AREA[shape]) < (0.004 if size == 224 else 0.04)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_where_their_pose_says(shape):
    """The centre of mass: on the template's upright axis, as far below its middle as geometry says."""
    index, turn = torch.arange(10), torch.deg2rad(poses(torch.arange(10)).angle.double())
    below = 64 * {"triangle": 1 / 3, "tee": -4 / 15, "trapezoid": 1 / 9}.get(shape, 0)
    expected = poses(index).centre + below * torch.stack([-turn.sin(), turn.cos()], 1)
    x, y, _, _, _ = moments(white(shape, "solid", index))
    assert (torch.stack([x, y], 1) - expected).abs().max() < 0.2


def test_the_angle_is_the_poses():
    """The long axis of a rhombus, which is longer from left to right."""
    index = torch.arange(25)
    _, _, xx, yy, xy = moments(white("rhombus", "solid", index))
    assert (torch.rad2deg(torch.atan2(2 * xy, xx - yy) / 2) - poses(index).angle).abs().max() < 0.5


def moments(images):
    """Centre of mass x, y and second moments xx, yy, xy of images [n, s, s], in pixels."""
    at = torch.arange(images.shape[1]).double() + 0.5
    mass = images.sum((1, 2))
    x, y = (torch.einsum("nij,j->n", image, at) / mass for image in (images, images.transpose(1, 2)))
    dx, dy = at - x[:, None], at - y[:, None]
    seconds = (torch.einsum("nij,ni,nj->n", images, down, right) / mass
               for down, right in ((torch.ones_like(dy), dx ** 2), (dy ** 2, torch.ones_like(dx)), (dy, dx)))
    return x, y, *seconds


@given(seed=st.integers(0, 2 ** 63 - 1), index=st.integers(0, 2 ** 62), size=st.integers(16, 120),
       shape=st.sampled_from(list(SHAPES)), texture=st.sampled_from(list(TEXTURES)))
def test_shapes_stay_inside(seed, index, size, shape, texture):
    """The template's corners are in the image, and what is coloured is in the template."""
    index = torch.tensor([index])
    pose, side = poses(index, seed, size), 64 * size / 224
    turn = math.radians(int(pose.angle))
    reach = side * (math.cos(turn) + abs(math.sin(turn)))
    assert pose.centre.min() >= reach - 1e-4 and pose.centre.max() <= size - reach + 1e-4
    (image,) = white(shape, texture, index, seed=seed, image_size=size)
    at = torch.arange(size) + 0.5 - pose.centre[0, :, None]
    across = at[0] * math.cos(turn) + at[1][:, None] * math.sin(turn)
    down = at[1][:, None] * math.cos(turn) - at[0] * math.sin(turn)
    beyond = torch.maximum(across.abs(), down.abs()) > side + math.sqrt(0.5)  # no sample of these pixels is inside
    assert not image[beyond].any() and image.any()


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_fill(texture):
    fill = white("square", texture, torch.arange(24)).sum((1, 2)) / 128 ** 2
    assert abs(fill.mean() - FILL[texture]) < 0.006
    shares = white("square", texture, torch.arange(200), image_size=32).sum((1, 2)) / (128 / 7) ** 2
    assert abs(shares.mean() - FILL[texture]) < 0.02


@pytest.mark.parametrize("size, expected", [(224, 10), (448, 20), (64, 4.5)])
def test_the_period_and_the_angle_of_stripes(size, expected):
    """The strongest frequency of the square's middle, which a window keeps from leaking."""
    assert period("stripes", size) == expected
    half, index = 44 * size // 224, torch.arange(6)
    pose = poses(index, image_size=size)
    images = white("square", "stripes", index, image_size=size)
    for image, centre, angle in zip(images, pose.centre, pose.texture_angle):
        column, row = centre.round().int().tolist()
        middle = image[row - half:row + half, column - half:column + half].numpy()
        window = np.hanning(2 * half)
        power = np.abs(np.fft.fft2((middle - middle.mean()) * window * window[:, None], (1024, 1024)))
        down, across = (np.fft.fftfreq(1024)[k] for k in np.unravel_index(power.argmax(), power.shape))
        assert abs(math.hypot(down, across) * expected - 1) < 0.03
        assert abs((math.degrees(math.atan2(down, across)) - angle + 90) % 180 - 90) < 2


def test_periods_of_small_images_are_what_the_pixels_can_show():
    assert [period(name, 32) for name in ("dots", "pluses", "noise")] == [4.5, 6.5, 8]
    assert {period(name) for name in TEXTURES} == {10}


@pytest.mark.parametrize("texture, steps", [
    ("stripes", [(1, 0), (0, 0.3)]), ("grid", [(1, 0), (0, 1)]), ("hexgrid", [(1, 0), (0.5, math.sqrt(0.75))]),
    ("dots", [(1, 0), (0, 1)]), ("triangles", [(1, 0), (0, 1)]), ("zigzags", [(2, 0), (0, 1)]),
    ("pluses", [(1, 0), (0, 1)]),
])
def test_textures_repeat_themselves_and_survive_a_mirror(texture, steps):
    x, y = torch.rand(2, 5000, dtype=torch.float64) * 8
    there = TEXTURES[texture](x, y)
    for right, down in steps:
        assert torch.equal(TEXTURES[texture](x + right, y + down), there)
    assert torch.equal(TEXTURES[texture]((0.5 if texture == "stripes" else 0) - x, y), there)
    assert 0.2 < there.float().mean() < 0.6


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_survive_a_mirror(shape):
    x, y = torch.rand(2, 5000) * 2.4 - 1.2
    assert torch.equal(SHAPES[shape](-x, y), SHAPES[shape](x, y))


# ---- The data set ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 1])
def test_every_beginning_is_balanced(seed):
    kinds = attributes(1230, seed)
    shape, texture, colour = (kind.numpy() for kind in kinds)
    for codes, number in ((shape, 10), (texture, 10), (colour, 10), (10 * shape + texture, 100),
                          (10 * texture + colour, 100), (100 * shape + 10 * texture + colour, 1000)):
        counts = np.cumsum(codes[:, None] == np.arange(number), axis=0)
        assert np.ptp(counts, axis=1).max() == 1 and (counts[-1] > 0).all()


def test_the_seed_decides_which_come_first():
    assert not torch.equal(torch.stack(attributes(10, 0)), torch.stack(attributes(10, 1)))


@pytest.mark.parametrize("label, classes", [("shape x texture", 100), ("shape", 10), ("texture", 10), ("colour", 10)])
def test_splits_hold_what_their_attributes_say(label, classes):
    train, test, input_shape, found = trifeature(250, 130, image_size=24, label=label, seed=4)
    assert input_shape == (3, 24, 24) and found == classes
    for split, first in ((train, 0), (test, 250)):
        n = len(split)
        shape, texture, colour = attributes(n, seed=4)
        expected = {"shape x texture": 10 * shape + texture, "shape": shape, "texture": texture, "colour": colour}
        assert torch.equal(split.y, expected[label])
        assert torch.equal(split.x, draw(shape, texture, colour, first + torch.arange(n), 4, 24))
        counts = torch.bincount(split.y, minlength=classes)
        assert counts.max() - counts.min() <= 1 and counts.min() >= 1
    assert (train.pad, train.flip, test.pad, test.flip) == (3, True, 0, False)
    pixels = train.x.double().transpose(0, 1).flatten(1) / 255
    for split in (train, test):
        assert split.mean == pytest.approx(pixels.mean(1).tolist())
        assert split.sd == pytest.approx(pixels.std(1, correction=0).tolist())


def test_attributes_stand_beside_the_labels():
    for split in trifeature(230, 120, label="texture", image_size=16, seed=5)[:2]:
        kinds = attributes(len(split), seed=5)
        assert [one.groups for one in split.attributes.values()] == [tuple(SHAPES), tuple(TEXTURES), tuple(COLOURS)]
        for name, one in split.attributes.items():
            assert (one.member.sum(1) == 1).all() and torch.equal(one.member.int().argmax(1), getattr(kinds, name))


@pytest.mark.parametrize("label, leading, following", [
    ("shape", "shape", "colour"), ("shape", "shape", "texture"), ("texture", "texture", "shape"),
    ("colour", "colour", "texture"), ("shape x texture", "shape", "colour")])
def test_a_feature_goes_with_the_label_in_training_alone(label, leading, following):
    train, test, _, _ = trifeature(3000, 1000, 16, label=label, correlated=following, match=0.7, seed=2)
    plain = trifeature(3000, 1000, 16, label=label, seed=2)
    numbers = {name: one.member.int().argmax(1) for name, one in train.attributes.items()}
    assert torch.equal(train.y, plain[0].y) and torch.equal(test.x, plain[1].x)
    third, = {"shape", "texture", "colour"} - {leading, following}
    assert torch.equal(numbers[third], plain[0].attributes[third].member.int().argmax(1))
    same = numbers[leading] == numbers[following]
    assert abs(same.double().mean() - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 3000)
    # Where they do not go together, the nine others are equally likely.
    offset = (numbers[following] - numbers[leading])[~same] % 10
    assert stats.chisquare(torch.bincount(offset, minlength=10)[1:].numpy()).pvalue > 0.001
    expected = draw(numbers["shape"], numbers["texture"], numbers["colour"], torch.arange(3000), 2, 16)
    assert torch.equal(train.x, expected)


def test_who_makes_no_error_is_fair_on_a_balanced_split_and_not_on_a_matched_one():
    train, test, _, _ = trifeature(1000, 1000, 16, label="shape", correlated="colour", match=0.6, seed=3)
    for name in ("texture", "colour"):
        for split, gap in ((test, 0), (train, 0 if name == "texture" else 0.5)):
            given = {"sensitive_features": split.attributes[name]}
            found = [measure(split.y, split.y, **given)
                     for measure in (demographic_parity_difference, equalized_odds_difference)]
            assert found == pytest.approx([gap, 0], abs=0.12 if gap else 0)


def test_chance_changes_nothing_and_certainty_everything():
    kinds, index = attributes(500, seed=1), torch.arange(500)
    assert all(map(torch.equal, correlate(kinds, index, "shape", "colour", 0.1, 1), kinds))
    assert torch.equal(correlate(kinds, index, "shape", "colour", 1, 1).colour, kinds.shape)
    # A function of the index: any part of the images is matched as in the whole.
    part = type(kinds)(*(values[200:300] for values in kinds))
    whole = correlate(kinds, index, "shape", "colour", 0.5, 1).colour
    assert torch.equal(correlate(part, index[200:300], "shape", "colour", 0.5, 1).colour, whole[200:300])


def test_training_images_may_stay_as_they_are():
    plain, augmented = (trifeature(100, 100, 16, augment=augment)[0] for augment in (False, True))
    assert not plain.augments and augmented.augments and torch.equal(plain.x, augmented.x)


def test_no_test_image_is_a_training_image():
    train, test, _, _ = trifeature(1000, 1000, noise=0)
    seen = {image.tobytes() for image in train.x.numpy()}
    assert len(seen) == 1000 and not seen & {image.tobytes() for image in test.x.numpy()}


def test_noise_is_normal_and_of_the_deviation_asked_for():
    """On the background, whose grey is four deviations of this noise away from clipping."""
    clean, noisy = (trifeature(1000, 100, noise=noise) for noise in (0, 1))
    assert noisy[0].mean == clean[0].mean and noisy[0].sd == clean[0].sd
    grey = (clean[0].x == GREY).all(1)
    differences = torch.stack([(noisy[0].x[:, c].double() - GREY)[grey] for c in range(3)])
    n = differences.shape[1]
    assert n > 500_000
    expected = (torch.tensor(clean[0].sd, dtype=torch.float64) * 255).square() + 1 / 12  # rounding is uniform noise
    assert (differences.var(1) / expected - 1).abs().max() < 0.01
    assert differences.mean(1).abs().max() < 0.2
    assert (torch.corrcoef(differences) - torch.eye(3)).abs().max() < 5 / math.sqrt(n)
    for channel in differences.numpy():
        assert abs(stats.kurtosis(channel)) < 0.03 and abs(stats.skew(channel)) < 0.02
    neighbours = torch.corrcoef(torch.stack([differences[0][1:], differences[0][:-1]]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(n)


def test_strong_noise_is_clipped():
    white_pixels = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    noisy = add_noise(white_pixels, torch.tensor([3]), [400.0, 400.0, 0.0])
    shares = [(noisy[0, 0] == value).float().mean() for value in (0, 255)]
    assert shares == pytest.approx([stats.norm.cdf(-254.5 / 400), 0.5], abs=0.03)
    assert (noisy[0, 2] == 255).all()


def test_what_can_be_told_without_training_and_what_cannot():
    """Colour from the mean difference to the background, always. Shape and texture together are beyond the nearest
    mean image, which is right in a tenth of the images."""
    train, test, _, _ = trifeature(2000, 1000)
    difference = test.x.double().mean((2, 3)) - GREY
    closeness = torch.nn.functional.normalize(difference) @ torch.nn.functional.normalize(RGB.double() - GREY).T
    assert torch.equal(closeness.argmax(1), attributes(1000).colour)
    x_train, x_test = ((split.x.double() - GREY).abs().mean(1).flatten(1) for split in (train, test))
    means = torch.stack([x_train[train.y == k].mean(0) for k in range(100)])
    accuracy = (torch.cdist(x_test, means).argmin(1) == test.y).double().mean()
    assert accuracy < 0.2


def zeros(*shape, dtype=torch.int64):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize("options, message", [
    ({"label": "size"}, "label is 'size': expected one of shape x texture, shape, texture, colour"),
    ({"n_train": 99}, "n_train is 99: expected an integer of at least 100"),
    ({"n_test": 9, "label": "shape"}, "n_test is 9: expected an integer of at least 10"),
    ({"n_test": 2e3}, "n_test is 2000.0"),
    ({"noise": -0.1}, "noise is -0.1"), ({"noise": math.inf}, "noise is inf"), ({"noise": math.nan}, "noise is nan"),
    ({"noise": "1"}, "noise is '1'"),
    ({"correlated": "size"}, "correlated is 'size': expected colour, which is not in the label"),
    ({"correlated": "shape", "label": "shape"}, "correlated is 'shape': expected texture or colour, which is not"),
    ({"correlated": "colour", "match": 0.05}, "match is 0.05: expected a probability from 0.1"),
    ({"correlated": "colour", "match": 1.2}, "match is 1.2"), ({"correlated": "colour", "match": "1"}, "match is '1'"),
    ({"augment": 1}, "augment is 1: expected True or False"),
    ({"image_size": 15}, "image_size is 15: expected an integer of at least 16"), ({"image_size": 32.0}, "is 32.0"),
    ({"seed": -1}, "seed is -1"), ({"seed": 2 ** 63}, "seed is 9223372036854775808"), ({"seed": 0.5}, "seed is 0.5"),
])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trifeature(**options)


@pytest.mark.parametrize("arguments, message", [
    ((zeros(2) + 10, zeros(2), zeros(2), zeros(2)), "shape has the value 10: expected 0 to 9"),
    ((zeros(2), zeros(2) - 1, zeros(2), zeros(2)), "texture has the value -1: expected 0 to 9"),
    ((zeros(2), zeros(2), zeros(2), zeros(2) - 3), "index has the value -3"),
    ((zeros(2), zeros(2), zeros(3), zeros(2)), "colour is torch.int64 [3]: expected int64 [2]"),
    ((zeros(2, dtype=torch.float32), zeros(2), zeros(2), zeros(2)), "shape is torch.float32 [2]: expected int64 [2]"),
    ((zeros(2), zeros(2), zeros(2), zeros(2, 1)), "index is torch.int64 [2, 1]: expected int64 [2]"),
])
def test_bad_tensors_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(*arguments)


@pytest.mark.parametrize("index, deviation, message", [
    (zeros(1), [1, 1, 1], "index is [1]: expected [2]"), (zeros(2), [1, 1], "deviation is [1, 1]: expected 3 numbers"),
    (zeros(2), [1, 1, -1], "deviation is [1, 1, -1]"),
])
def test_bad_noise_is_named(index, deviation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        add_noise(zeros(2, 3, 8, 8, dtype=torch.uint8), index, deviation)


def test_there_is_no_empty_set_of_attributes():
    with pytest.raises(ValueError, match="n is 0: expected an integer of at least 1"):
        attributes(0)


def test_no_images_are_no_images():
    assert draw(*[zeros(0)] * 4, image_size=20).shape == (0, 3, 20, 20)
