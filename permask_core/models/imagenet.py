"""torchvision's ResNet with its widths times a factor; a module of its own, because torchvision is slow to import."""

from torch import nn

from permask_core.models.feedforward import scaled
from permask_core.vision import torchvision


class ScaledResNet(torchvision.models.ResNet):
    """torchvision's ResNet, which hard-codes 64, 128, 256 and 512 channels, with these times ``width``.

    ``block`` is ``"BasicBlock"`` or ``"Bottleneck"``, ``blocks`` their number in each of the four stages. With
    ``small_images`` the stem keeps the size of the image: a 3x3 convolution, and no pooling.
    """

    def __init__(self, block, blocks, channels, classes, width, *, small_images=False):
        # Before the parent's constructor, which calls _make_layer.
        self.channels, self.width, self.small_images = channels, width, small_images
        super().__init__(getattr(torchvision.models.resnet, block), blocks, num_classes=classes)
        self.fc = nn.Linear(self.inplanes, classes)

    def _make_layer(self, block, planes, *arguments, **options):
        (planes,) = scaled(self.width, planes)
        if not hasattr(self, "layer1"):  # the stem too: now, so that the parent initialises it with all the others
            self.inplanes = planes
            kernel, stride = (3, 1) if self.small_images else (7, 2)
            self.conv1 = nn.Conv2d(self.channels, planes, kernel, stride, padding=kernel // 2, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
            if self.small_images:
                self.maxpool = nn.Identity()
        return super()._make_layer(block, planes, *arguments, **options)
