"""Densely connected networks: torchvision's DenseNet121 and DenseNet169 with a width factor, and both for small images.

Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks", CVPR 2017: section 3, and table 1
for the blocks.
"""


def densenet121(input_shape, classes, *, width=1.0):
    """torchvision's DenseNet121, with its growth rate of 32 and the 64 channels of its stem multiplied by ``width``.

    Bottlenecks have four times the growth rate, and transitions halve the channels. Layer names, initialisation and
    ``forward`` are torchvision's, so its published weights load at width 1. The first convolution has the number of
    input channels in ``input_shape``.

    References
    ----------
    Huang et al., "Densely Connected Convolutional Networks", CVPR 2017.
    """
    return _densenet("densenet121", (6, 12, 24, 16), input_shape, classes, width)


def densenet169(input_shape, classes, *, width=1.0):
    """torchvision's DenseNet169: :func:`densenet121` with more layers in the last two of its four dense blocks."""
    return _densenet("densenet169", (6, 12, 32, 32), input_shape, classes, width)


def densenet121_cifar(input_shape, classes, *, width=1.0):
    """:func:`densenet121` for small images: the stem is a 3x3 convolution of stride 1 without pooling."""
    return _densenet("densenet121_cifar", (6, 12, 24, 16), input_shape, classes, width, small_images=True)


def densenet169_cifar(input_shape, classes, *, width=1.0):
    """:func:`densenet169` for small images, with the stem of :func:`densenet121_cifar`."""
    return _densenet("densenet169_cifar", (6, 12, 32, 32), input_shape, classes, width, small_images=True)


def _densenet(name, blocks, input_shape, classes, width, *, small_images=False):
    times, least = ("three", 8) if small_images else ("five", 29)  # the stem rounds sizes up, the transitions down
    if min(input_shape[1:]) < least:
        raise ValueError(f"input_shape is {input_shape}: {name} halves the image {times} times and needs at least "
                         f"{least}x{least}")
    from permask_core.models.imagenet import ScaledDenseNet  # here, because torchvision takes a second to import

    return ScaledDenseNet(blocks, input_shape[0], classes, width, small_images=small_images)
