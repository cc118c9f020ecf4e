"""Residual networks: those of He et al. for small images, torchvision's ResNet18 and ResNet50 with a width factor, and
the ResNet18 for CIFAR of the pruning literature.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", CVPR 2016: section 4.2 for the small
networks, table 1 for ResNet18 and ResNet50.
"""

from collections import OrderedDict

from torch import nn
from torch.nn import functional as F

from permask_core.models.scaling import scaled

SHORTCUTS = ("projection", "padded")


class PaddedShortcut(nn.Module):
    """Option A of He et al.: every ``stride``-th row and column, and ``added`` channels of zeros, half of them before
    the input's channels and half after (an odd one after). It has no parameters."""

    def __init__(self, added, stride):
        super().__init__()
        self.stride, self.pad = stride, (0, 0, 0, 0, added // 2, added - added // 2)

    def forward(self, x):
        return F.pad(x[:, :, ::self.stride, ::self.stride], self.pad)


def _projection(channels, size, stride):
    """Option B of He et al.: a 1x1 convolution and its BatchNorm."""
    return nn.Sequential(OrderedDict([
        ("conv", nn.Conv2d(channels, size, 1, stride, bias=False)), ("norm", nn.BatchNorm2d(size))]))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut; ReLU follows the first convolution and the sum."""

    def __init__(self, channels, size, stride, shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, size, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(size)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(size, size, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(size)
        self.relu2 = nn.ReLU()
        if stride == 1:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = (_projection(channels, size, stride) if shortcut == "projection"
                             else PaddedShortcut(size - channels, stride))

    def forward(self, x):
        residual = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))


def resnet8(input_shape, classes, *, width=1.0, shortcut="projection"):
    """:func:`resnet20` with one block in each stage."""
    return _small_resnet(1, input_shape, classes, width, shortcut)


def resnet20(input_shape, classes, *, width=1.0, shortcut="projection"):
    """ResNet20 for small images: a 3x3 convolution, three stages of three blocks, global average pooling, one linear
    head.

    The stages have 16, 32 and 64 channels, all multiplied by ``width``; the second and the third halve the image. There
    the ``shortcut`` is either ``"projection"``, a 1x1 convolution and its BatchNorm (option B of He et al., used in the
    permuted-mask paper), or ``"padded"``, every second pixel with channels of zeros before and after and no parameters
    (option A, which He et al. use on CIFAR-10). Convolutions are initialised by Kaiming normal with ``fan_out`` (He et
    al. 2015, equation 14), BatchNorm as the identity, and the head by PyTorch's default.

    References
    ----------
    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, sections 3.3 and 4.2; He et al., "Delving Deep
    into Rectifiers", ICCV 2015.
    """
    return _small_resnet(3, input_shape, classes, width, shortcut)


def resnet56(input_shape, classes, *, width=1.0, shortcut="projection"):
    """:func:`resnet20` with nine blocks in each stage."""
    return _small_resnet(9, input_shape, classes, width, shortcut)


def _small_resnet(blocks, input_shape, classes, width, shortcut):
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut is {shortcut!r}: expected one of {', '.join(SHORTCUTS)}")
    if min(input_shape[1:]) < 4:
        raise ValueError(f"input_shape is {input_shape}: resnet{6 * blocks + 2} halves the image twice and needs at "
                         "least 4x4")
    sizes = scaled(width, 16, 32, 64)
    layers = [("conv1", nn.Conv2d(input_shape[0], sizes[0], 3, padding=1, bias=False)),
              ("norm1", nn.BatchNorm2d(sizes[0])), ("relu1", nn.ReLU())]
    channels = sizes[0]
    for i, size in enumerate(sizes, 1):
        stage = OrderedDict()
        for j in range(1, blocks + 1):
            stage[f"block{j}"] = BasicBlock(channels, size, 2 if i > 1 and j == 1 else 1, shortcut)
            channels = size
        layers.append((f"stage{i}", nn.Sequential(stage)))
    model = nn.Sequential(OrderedDict([
        *layers, ("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", nn.Linear(channels, classes))]))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet18(input_shape, classes, *, width=1.0):
    """torchvision's ResNet18 with the channels of each stage multiplied by ``width``.

    Layer names, initialisation and ``forward`` are torchvision's, so its published weights load at width 1. The first
    convolution has the number of input channels in ``input_shape``.
    """
    return _large_resnet("resnet18", "BasicBlock", (2, 2, 2, 2), input_shape, classes, width)


def resnet50(input_shape, classes, *, width=1.0):
    """torchvision's ResNet50, with ``width`` as in :func:`resnet18`; the output of a block has four times the channels
    of its 3x3 convolution."""
    return _large_resnet("resnet50", "Bottleneck", (3, 4, 6, 3), input_shape, classes, width)


def resnet18_cifar(input_shape, classes, *, width=1.0):
    """:func:`resnet18` for small images, as in the pruning literature on CIFAR: the stem is a 3x3 convolution of stride
    1 without pooling."""
    return _large_resnet("resnet18_cifar", "BasicBlock", (2, 2, 2, 2), input_shape, classes, width, small_images=True)


def _large_resnet(name, block, blocks, input_shape, classes, width, *, small_images=False):
    times, least = ("three", 8) if small_images else ("five", 32)
    if min(input_shape[1:]) < least:
        raise ValueError(f"input_shape is {input_shape}: {name} halves the image {times} times and needs at least "
                         f"{least}x{least}")
    from permask_core.models.imagenet import ScaledResNet  # here, because torchvision takes a second to import

    return ScaledResNet(block, blocks, input_shape[0], classes, width, small_images=small_images)
