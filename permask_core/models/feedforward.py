"""Plain feed-forward networks: a multi-layer perceptron, LeNet-5 and VGG11."""

import math
from collections import OrderedDict
from numbers import Integral

from torch import nn

from permask_core.models.scaling import scaled


def mlp(input_shape, classes, *, width=1.0, depth=2):
    """A multi-layer perceptron: ``depth`` hidden layers of 128 x ``width`` units with ReLU."""
    if not isinstance(depth, Integral) or depth < 1:
        raise ValueError(f"depth is {depth!r}: expected an integer of at least 1")
    (hidden,) = scaled(width, 128)
    layers, size = [("flatten", nn.Flatten())], math.prod(input_shape)
    for i in range(1, depth + 1):
        layers += [(f"fc{i}", nn.Linear(size, hidden)), (f"relu{i}", nn.ReLU())]
        size = hidden
    return nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(size, classes))]))


def lenet5(input_shape, classes, *, width=1.0):
    """LeNet-5 with ReLU and max pooling.

    It has two 5x5 convolutions (6 and 16 channels) and hidden layers of 120 and 84 units, all multiplied by ``width``.
    Images smaller than 32x32 are padded by 2 before the first convolution, as is usual for 28x28; images smaller than
    28x28 are padded before the second convolution too.

    References
    ----------
    LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE, 1998.
    """
    channels, height, side = input_shape
    pads = [2 if min(height, side) < 32 else 0, 2 if min(height, side) < 28 else 0]
    c1, c2, f1, f2 = scaled(width, 6, 16, 120, 84)
    for pad in pads:
        height, side = (height + 2 * pad - 4) // 2, (side + 2 * pad - 4) // 2
    if min(height, side) < 1:
        raise ValueError(f"input_shape is {input_shape}: lenet5 needs images of at least 4x4")
    return nn.Sequential(OrderedDict([
        ("conv1", nn.Conv2d(channels, c1, 5, padding=pads[0])), ("relu1", nn.ReLU()), ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(c1, c2, 5, padding=pads[1])), ("relu2", nn.ReLU()), ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()), ("fc1", nn.Linear(c2 * height * side, f1)), ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(f1, f2)), ("relu4", nn.ReLU()), ("head", nn.Linear(f2, classes))]))


def vgg11(input_shape, classes, *, width=1.0, batch_norm=False):
    """VGG11 for small images: eight 3x3 convolutions, five poolings and one linear head.

    Convolutions have biases. ``batch_norm`` adds a BatchNorm after each; the VGG11 of the permuted-mask paper has none.

    References
    ----------
    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, table 1
    (A).
    """
    channels, height, side = input_shape
    if min(height, side) < 32:
        raise ValueError(f"input_shape is {input_shape}: vgg11 halves the image five times and needs at least 32x32")
    sizes = scaled(width, 64, 128, 256, 256, 512, 512, 512, 512)
    layers = []
    for i, size in enumerate(sizes, 1):
        layers.append((f"conv{i}", nn.Conv2d(channels, size, 3, padding=1)))
        layers += [(f"norm{i}", nn.BatchNorm2d(size))] if batch_norm else []
        layers.append((f"relu{i}", nn.ReLU()))
        layers += [(f"pool{i}", nn.MaxPool2d(2))] if i in (1, 2, 4, 6, 8) else []
        channels = size
    features = channels * (height // 32) * (side // 32)
    return nn.Sequential(OrderedDict([*layers, ("flatten", nn.Flatten()), ("head", nn.Linear(features, classes))]))
