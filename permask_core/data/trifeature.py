"""Trifeature: coloured shapes filled with a texture on grey, ten of each, drawn by formulas without a download.

Everything random in an image is a function of the seed and the index of the image. Any subset in any order, split over
any number of processes, therefore has the same images bit for bit on one kind of device. The random numbers are those
of splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), which gives the
n-th number of a stream without computing the ones before it.

Source: Hermann and Lampinen, "What shapes feature representations? Exploring datasets, architectures, and training",
NeurIPS 2020, arXiv 2006.12433. It fixes the names, the colours and the lengths; the formulas of the figures are ours.
"""

import math
from numbers import Real
from typing import NamedTuple

import torch

from permask_core.data.attributes import attribute
from permask_core.data.splits import Split, channel_moments
from permask_core.runs.checks import check_integer, is_integer

# Lengths of the source in pixels of its images: the image, the square of a shape, the period of a texture.
IMAGE, TEMPLATE, PERIOD = 224, 128, 10
SMALLEST_IMAGE = 16
# In pixels of the drawn image, because at 32 pixels finer textures could not be distinguished.
SMALLEST_PERIOD = {"hexgrid": 6.5, "triangles": 6.5, "pluses": 6.5}  # textures of figures with corners
SMALLEST_PERIOD_OF_OTHERS = 4.5
SMALLEST_CELL = 0.8
ANGLES = torch.arange(-45, 45)  # degrees
SAMPLES = 3  # per pixel and axis
LEVELS = SAMPLES ** 2
CHUNK = 2 ** 21  # samples drawn at once, to bound memory


# ---- Shapes, textures and colours ------------------------------------------------------------------------------------

BACKGROUND = (0.5, 0.5, 0.5)
COLOURS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "pink": (1, 0.4, 1),
    "cyan": (0, 1, 1), "purple": (0.3, 0, 0.5), "ocean": (0.1, 0.4, 0.5), "orange": (1, 0.6, 0), "white": (1, 1, 1),
}


def _framed(x, y):
    return torch.maximum(x.abs(), y.abs()) <= 1


def _pentagon_lines(x, y, distance):
    """Return for how many of five lines a point is on the side of the centre. The first line is ``distance`` below the
    centre, each next one is turned by 72 degrees."""
    turns = [math.radians(72 * k) for k in range(5)]
    return sum((math.sin(turn) * x + math.cos(turn) * y <= distance).to(torch.uint8) for turn in turns)


# True inside a shape, with x to the right and y down; the template is the square from -1 to 1.
SHAPES = {
    "triangle": lambda x, y: (2 * x.abs() - 1 <= y) & (y <= 1),
    "square": _framed,
    "plus": lambda x, y: (torch.minimum(x.abs(), y.abs()) <= 1 / 3) & _framed(x, y),
    "circle": lambda x, y: x * x + y * y <= 1,
    "tee": lambda x, y: ((x.abs() <= 1 / 3) | (y <= -1 / 3)) & _framed(x, y),
    "rhombus": lambda x, y: 0.6 * x.abs() + y.abs() <= 0.6,
    "pentagon": lambda x, y: _pentagon_lines(x, y, math.cos(math.radians(36))) == 5,
    "star": lambda x, y: _pentagon_lines(x, -y, math.cos(math.radians(72))) >= 4,
    "fivesquare": lambda x, y: ((x.abs() <= 1 / 3) == (y.abs() <= 1 / 3)) & _framed(x, y),
    "trapezoid": lambda x, y: (4 * x.abs() - 3 <= y) & (y.abs() <= 1),
}


class Cells(NamedTuple):
    """A texture of square cells: in each cell, a streak of ``length`` cells begins with probability ``share``."""

    share: float
    length: int


def _centred(x):
    """Return a coordinate relative to the middle of its period: -1/2 to 1/2."""
    return x - x.floor() - 0.5


def _hexagon(x, y):
    """Return how far a point is from the middle of its honeycomb cell: 0 in the middle, 1 at the edge."""
    def on_lattice(x, y):
        x, y = _centred(x).abs(), _centred(y / math.sqrt(3)).abs() * math.sqrt(3)
        return torch.maximum(2 * x, x + math.sqrt(3) * y)

    # The middles of a honeycomb form two rectangular lattices, shifted by half a period.
    return torch.minimum(on_lattice(x, y), on_lattice(x + 0.5, y + math.sqrt(3) / 2))


def _plus(x, y):
    return (torch.minimum(x, y) <= 0.14) & (torch.maximum(x, y) <= 0.37)


# True where a texture has the colour of the shape, with x and y in periods; elsewhere it has that of the background.
TEXTURES = {
    "solid": lambda x, y: torch.ones_like(x, dtype=torch.bool),
    "stripes": lambda x, y: _centred(x) <= 0,
    "grid": lambda x, y: torch.maximum(_centred(x).abs(), _centred(y).abs()) >= 0.35,
    "hexgrid": lambda x, y: _hexagon(x, y) >= 0.75,
    "dots": lambda x, y: _centred(x) ** 2 + _centred(y) ** 2 <= 0.3 ** 2,
    "noise": Cells(share=0.5, length=1),
    "triangles": lambda x, y: 2 * _centred(x).abs() <= _centred(y) + 0.5,
    "zigzags": lambda x, y: _centred(y + 2 * _centred(x / 2).abs()) <= 0,
    "rain": Cells(share=0.05, length=7),
    "pluses": lambda x, y: _plus(_centred(x).abs(), _centred(y).abs()),
}
CLASSES = {"shape x texture": len(SHAPES) * len(TEXTURES), "shape": len(SHAPES), "texture": len(TEXTURES),
           "colour": len(COLOURS)}


def period(texture, image_size=IMAGE):
    """Return the period of a texture in pixels (for noise and rain, the size of ten cells)."""
    scale = image_size / IMAGE
    if isinstance(TEXTURES[texture], Cells):
        return 10 * max(PERIOD / 10 * scale, SMALLEST_CELL)
    return max(PERIOD * scale, SMALLEST_PERIOD.get(texture, SMALLEST_PERIOD_OF_OTHERS))


# ---- The data set ----------------------------------------------------------------------------------------------------

def trifeature(n_train=5000, n_test=2000, image_size=32, noise=0.0, label="shape x texture", correlated=None, match=0.5,
               augment=True, seed=0):
    """Trifeature as a balanced classification task.

    Both splits contain all classes equally often, and all combinations of shape, texture and colour as equally often as
    the numbers allow, unless ``correlated`` changes the training images. The splits have the attributes ``shape``,
    ``texture`` and ``colour``.

    Parameters
    ----------
    n_train, n_test : int
        Number of images, at least one of each class. No test image is a training image.
    image_size : int
        Height and width in pixels, at least 16; 224 in the source.
    noise : float
        Standard deviation of normal noise, drawn once for every pixel and channel, in units of the standardised images.
        The images are still uint8: values are rounded and clipped to 0 to 255. Colours at the end of the range lose
        half of their noise; in the background almost nothing is clipped at a noise of 1, about a sixth of the pixels
        at 3.
    label : {"shape x texture", "shape", "texture", "colour"}
        The class: 100 classes, 10 shape + texture, or the 10 of one feature.
    correlated : {"shape", "texture", "colour"}, optional
        A feature that is correlated with the label in the training images: see :func:`correlate`. With 100 classes it
        must be the colour, which is then correlated with the shape. The test images are always balanced.
    match : float
        Probability that this feature has the number of the label, 0.1 to 1; 0.1 is chance.
    augment : bool
        Whether to augment training images by crops with a padding of image_size / 8 black pixels and by mirror images,
        which do not change the class.
    seed : int
        Seed of everything random, 0 to 2^63 - 1.

    Returns
    -------
    (Split, Split, tuple of int, int)
        Training and test split of uint8 images, standardised by the channels of the training images without noise; the
        shape [3, image_size, image_size]; the number of classes.

    Raises
    ------
    ValueError
        If an option is unknown or out of range.
    """
    if label not in CLASSES:
        raise ValueError(f"label is {label!r}: expected one of {', '.join(CLASSES)}")
    for name, n in (("n_train", n_train), ("n_test", n_test)):
        if not is_integer(n) or n < CLASSES[label]:
            raise ValueError(f"{name} is {n!r}: expected an integer of at least {CLASSES[label]}, one for each class")
    if not isinstance(noise, Real) or not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise!r}: expected a standard deviation of at least 0")
    if not isinstance(augment, bool):
        raise ValueError(f"augment is {augment!r}: expected True or False")
    leading = label.split(" x ")[0]
    free = [name for name in Attributes._fields if name not in label]
    if correlated is not None and correlated not in free:
        raise ValueError(f"correlated is {correlated!r}: expected {' or '.join(free)}, which is not in the "
                         "label")
    index = torch.arange(n_train + n_test).split([int(n_train), int(n_test)])
    kinds = [attributes(n, seed) for n in (n_train, n_test)]
    if correlated:
        kinds[0] = correlate(kinds[0], index[0], leading, correlated, match, seed)
    images = [draw(*kind, chosen, seed, image_size) for kind, chosen in zip(kinds, index)]
    mean, sd = channel_moments(images[0])
    if noise:
        deviation = [255 * noise * value for value in sd]
        images = [add_noise(x, chosen, deviation, seed) for x, chosen in zip(images, index)]
    labels = [10 * kind.shape + kind.texture if label == "shape x texture" else getattr(kind, label) for kind in kinds]
    names = [list(values) for values in (SHAPES, TEXTURES, COLOURS)]
    known = [{name: attribute(groups, values) for name, groups, values in zip(kind._fields, names, kind)}
             for kind in kinds]
    train = Split(images[0], labels[0], mean, sd, pad=image_size // 8 if augment else 0, flip=augment,
                  attributes=known[0])
    test = Split(images[1], labels[1], mean, sd, attributes=known[1])
    return train, test, (3, image_size, image_size), CLASSES[label]


class Attributes(NamedTuple):
    """The ``shape``, ``texture`` and ``colour`` of n images as indices into SHAPES, TEXTURES and COLOURS, int64 [n]
    each."""

    shape: torch.Tensor
    texture: torch.Tensor
    colour: torch.Tensor


def attributes(n, seed=0):
    """Return shape, texture and colour of n images, in an order of which every beginning is balanced.

    Among the first m images, for any m, the counts of any two shapes differ by at most one. The same is true for
    textures, colours, pairs of shape and texture or texture and colour, and the 1,000 combinations.

    Parameters
    ----------
    n : int
    seed : int
        Seed of the order.

    Returns
    -------
    Attributes

    Raises
    ------
    ValueError
        If ``n`` is below 1 or the seed out of range.
    """
    check_integer("n", n, 1)
    order = _draws(_keys(torch.arange(-3, 0), seed), torch.arange(10)).argsort(1)  # indices that no image has
    place = torch.arange(n)
    ones, tens, hundreds = place % 10, place // 10 % 10, place // 100 % 10
    # Every ten images, each feature takes all its values. Within a hundred images, each ten shifts the texture relative
    # to the shape; each hundred shifts the colour relative to both.
    turns = ones, (ones + tens) % 10, (ones + 2 * tens + hundreds) % 10
    return Attributes(*(values[turn] for values, turn in zip(order, turns)))


def correlate(kinds, index, leading, following, match, seed=0):
    """Correlate two features: both have the same number in a fraction ``match`` of the images.

    In some images, chosen at random by index, the following feature is set to the number of the leading one. In all
    other images it does not change, and has the same number in one of ten. The correlated data sets of the source pair
    two features in this way; the fraction of each pair is random.

    Parameters
    ----------
    kinds : Attributes
        Balanced attributes from :func:`attributes`.
    index : torch.Tensor
        Indices of the images, int64 [n].
    leading, following : {"shape", "texture", "colour"}
    match : float
        Probability that both have the same number, 0.1 to 1.
    seed : int

    Returns
    -------
    Attributes

    Raises
    ------
    ValueError
        If ``match`` is out of range.
    """
    if not isinstance(match, Real) or not 0.1 <= match <= 1:
        raise ValueError(f"match is {match!r}: expected a probability from 0.1, which is chance, to 1")
    # Matches by chance count: m = q + (1 - q) / 10.
    share = (match - 0.1) / 0.9
    drawn = _draws(_keys(index, seed), torch.tensor([_MATCH], device=index.device))[:, 0] >> 39 < share * 2 ** 24
    values = torch.where(drawn, getattr(kinds, leading), getattr(kinds, following))
    return kinds._replace(**{following: values})


# ---- Drawing ---------------------------------------------------------------------------------------------------------

def draw(shape, texture, colour, index, seed=0, image_size=IMAGE):
    """Draw images, each with a shape at a random position and angle, filled with a texture at another random angle.

    All lengths are proportional to the source: of 224 pixels, the template of a shape has 128, the period of a texture
    10, a cell of noise and rain 1. In small images this would be finer than the pixels. There, unlike the source, a
    period is at least 4.5 pixels (6.5 in hexgrid, triangles and pluses) and a cell at least 0.8; see :func:`period`. A
    pixel is the mean of 3x3 samples.

    Parameters
    ----------
    shape, texture, colour : torch.Tensor
        int64 [n], 0 to 9: indices into SHAPES, TEXTURES and COLOURS.
    index : torch.Tensor
        int64 [n], at least 0: indices of the images. Images with the same index have the same pose.
    seed : int
        0 to 2^63 - 1.
    image_size : int
        Height and width s in pixels, at least 16.

    Returns
    -------
    torch.Tensor
        uint8 [n, 3, s, s], on the device of ``index``.

    Raises
    ------
    ValueError
        If a number is out of range, or the tensors are not all int64 [n].
    """
    for name, values in (("shape", shape), ("texture", texture), ("colour", colour), ("index", index)):
        if values.dtype != torch.int64 or values.dim() != 1 or len(values) != len(index):
            raise ValueError(f"{name} is {values.dtype} {list(values.shape)}: expected int64 [{len(index)}]")
        top = 9 if name != "index" else 2 ** 63 - 1
        wrong = values[(values < 0) | (values > top)]
        if len(wrong):
            raise ValueError(f"{name} has the value {int(wrong[0])}: expected 0 to {top}")
    check_integer("image_size", image_size, SMALLEST_IMAGE)
    colours = _mixtures().to(index.device)
    images = torch.empty(len(index), 3, image_size, image_size, dtype=torch.uint8, device=index.device)
    for chosen in torch.arange(len(index), device=index.device).split(_per_chunk(LEVELS * image_size ** 2)):
        covered = _covered(shape[chosen], texture[chosen], poses(index[chosen], seed, image_size), image_size)
        images[chosen] = colours[colour[chosen, None, None], covered.long()].permute(0, 3, 1, 2)
    return images


class Pose(NamedTuple):
    """The random properties of n images: ``angle`` and ``texture_angle`` [n], int64, degrees clockwise; ``centre`` [n,
    2], x and y of the template's middle in pixels; ``phase`` [n, 2], the offset of the texture in periods; ``key`` [n],
    int64, the key of the random numbers for cells and noise."""

    angle: torch.Tensor
    texture_angle: torch.Tensor
    centre: torch.Tensor
    phase: torch.Tensor
    key: torch.Tensor


def poses(index, seed=0, image_size=IMAGE):
    """Draw the poses of images: angles from -45 to 44 degrees, and uniform positions with the template inside the
    image.

    Parameters
    ----------
    index : torch.Tensor
        int64 [n].
    seed, image_size : int

    Returns
    -------
    Pose
    """
    key = _keys(index, seed)
    draws = _draws(key, torch.arange(6, device=index.device))
    angle, texture_angle = ANGLES.to(index.device)[draws[:, :2] % len(ANGLES)].unbind(1)
    uniform = (draws[:, 2:] >> 39).float() / 2 ** 24
    reach = _side(image_size) * sum(value.abs() for value in _cos_sin(angle))[:, None]
    centre = reach + uniform[:, :2] * (image_size - 2 * reach)
    # A honeycomb has a vertical period of sqrt(3), zigzags have a horizontal period of 2: many periods cover both.
    return Pose(angle, texture_angle, centre, 100 * uniform[:, 2:], key)


def add_noise(images, index, deviation, seed=0):
    """Add normal noise to images; values are rounded and clipped to 0 to 255.

    Parameters
    ----------
    images : torch.Tensor
        uint8 [n, channels, height, width].
    index : torch.Tensor
        Indices of the images, int64 [n]; the noise is a function of the index and the seed.
    deviation : list of float
        Standard deviation in each channel, in units of pixel values.
    seed : int

    Returns
    -------
    torch.Tensor
        uint8, of the same shape.

    Raises
    ------
    ValueError
        Unless there are one index for each image and one deviation of at least 0 for each channel.
    """
    if index.shape != images.shape[:1]:
        raise ValueError(f"index is {list(index.shape)}: expected [{len(images)}], one for each image")
    if len(deviation) != images.shape[1] or not all(0 <= value < math.inf for value in deviation):
        raise ValueError(f"deviation is {deviation}: expected {images.shape[1]} numbers of at least 0")
    # Drawn from 2^16 equally likely values: unlike a logarithm, a gather does not depend on the position in the batch.
    normal = torch.special.ndtri((torch.arange(2 ** 16).double() + 0.5) / 2 ** 16).float().to(images.device)
    deviation = torch.tensor(deviation, device=images.device)[:, None, None]
    counter = _NOISE + torch.arange(images[0].numel(), device=images.device)
    noisy = torch.empty_like(images)
    for chosen in torch.arange(len(index), device=images.device).split(_per_chunk(len(counter))):
        x = images[chosen]
        noise = normal[_draws(_keys(index[chosen], seed), counter) >> 47].view_as(x)
        noisy[chosen] = (x + deviation * noise).round().clamp(0, 255).byte()
    return noisy


def _per_chunk(samples):
    return max(1, int(CHUNK // samples))


def _side(image_size):
    """Return half the side of the template in pixels."""
    return TEMPLATE / IMAGE * image_size / 2


def _mixtures():
    """Return the colour of a pixel of which k samples of 9 are coloured, uint8 [10, k from 0 to 9, 3]."""
    table = torch.tensor([BACKGROUND, *COLOURS.values()], dtype=torch.float64).mul(255).round().long()
    k = torch.arange(LEVELS + 1)[:, None]
    return ((k * table[1:, None] + (LEVELS - k) * table[0] + LEVELS // 2) // LEVELS).byte()


def _covered(shape, texture, pose, image_size):
    """Return how many samples of each pixel have the colour of the shape, uint8 [n, s, s]."""
    side = _side(image_size)
    none = torch.zeros_like(pose.phase)
    coloured = torch.empty(len(shape), SAMPLES, SAMPLES, image_size, image_size, dtype=torch.bool, device=shape.device)
    for number, contains in enumerate(SHAPES.values()):
        which = (shape == number).nonzero()[:, 0]
        coloured[which] = contains(*_frame(pose.centre, pose.angle, side, none, which, image_size))
    for number, (name, contains) in enumerate(TEXTURES.items()):
        which = (texture == number).nonzero()[:, 0]
        length = period(name, image_size)
        if isinstance(contains, Cells):
            half = math.ceil(math.sqrt(2) * side / (length / 10)) + 1
            cells = _cells(pose.key[which], 2 * half, contains)
            begin = pose.phase % 1 + half
            x, y = _frame(pose.centre, pose.texture_angle, length / 10, begin, which, image_size)
            # Samples outside the cells are outside the template.
            place = x.long().clamp_(0, 2 * half - 1) * (2 * half) + y.long().clamp_(0, 2 * half - 1)
            coloured[which] &= cells.gather(1, place.flatten(1)).view_as(place)
        else:
            coloured[which] &= contains(*_frame(pose.centre, pose.texture_angle, length, pose.phase, which, image_size))
    return coloured.view(torch.uint8).sum((1, 2), dtype=torch.uint8)


def _frame(centre, angle, unit, begin, which, image_size):
    """Return coordinates of the samples of chosen images, turned by ``angle``, in units of ``unit``, with the middle of
    the template at ``begin``: x and y, each [m, 3, 3, s, s], with the samples of a pixel before the pixels."""
    offset = (torch.arange(SAMPLES, device=which.device)[:, None] + 0.5) / SAMPLES
    at = (torch.arange(image_size, device=which.device) + offset).flatten()
    right, down = ((at - middle[:, None]) / unit for middle in centre[which].unbind(1))
    right, down = right.view(-1, 1, SAMPLES, 1, image_size), down.view(-1, SAMPLES, 1, image_size, 1)
    cos, sin = (value.view(-1, 1, 1, 1, 1) for value in _cos_sin(angle[which]))
    x, y = (value.view(-1, 1, 1, 1, 1) for value in begin[which].unbind(1))
    return (x + cos * right) + sin * down, (y - sin * right) + cos * down


def _cells(key, size, texture):
    """Return which of size x size cells are coloured, bool [n, size^2], row by row; streaks run along the rows."""
    longer = size + texture.length - 1
    begins = _draws(key, _CELLS + torch.arange(size * longer, device=key.device)) >> 39 < texture.share * 2 ** 24
    return begins.view(-1, size, longer).unfold(2, texture.length, 1).any(3).flatten(1)


def _cos_sin(angle):
    """Return cosine and sine of integer degrees, float32."""
    # From a table: the last bit of a vectorised cosine may depend on the position in the batch.
    turns = torch.deg2rad(ANGLES.double())
    return [table.float().to(angle.device)[angle - ANGLES[0].item()] for table in (turns.cos(), turns.sin())]


# ---- Random numbers by position (torch's int64 wraps around like C's uint64) -----------------------------------------

_GOLDEN, _FIRST, _SECOND = (factor - 2 ** 64 for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_MATCH, _CELLS, _NOISE = 2 ** 7, 2 ** 8, 2 ** 48  # first positions in the stream of an image; the pose comes before


def _keys(index, seed):
    """Return the key of each image's stream, int64 [n]."""
    if not is_integer(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}: expected an integer from 0 to 2^63 - 1")
    return _mixed(_mixed(torch.tensor(seed, device=index.device)) + index * _GOLDEN)


def _draws(key, counter):
    """Return the numbers of each stream at each counter, 63 random bits each, int64 [n, m]."""
    return _shifted(_mixed(key[:, None] + (counter + 1) * _GOLDEN), 1)


def _mixed(state):
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state, bits):
    """Shift to the right and fill with zeros, whereas >> repeats the sign."""
    return state >> bits & (1 << 64 - bits) - 1
