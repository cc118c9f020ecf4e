"""torchvision's ResNet with its widths times a factor; a module of its own, because torchvision is slow to import."""

from torch import nn

from permask_core.models.feedforward import scaled
from permask_core.vision import torchvision


class ScaledResNet(torchvision.models.ResNet):
    """torchvision's ResNet, which hard-codes 64, 128, 256 and 512 channels, with these times ``width``.

    ``block`` is ``"BasicBlock"`` or ``"Bottleneck"``, ``blocks`` their number in each of the four stages.
    """

    def __init__(self, block, blocks, channels, classes, width):
        self.channels, self.width = channels, width  # before the parent's constructor, which calls _make_layer
        super().__init__(getattr(torchvision.models.resnet, block), blocks, num_classes=classes)
        self.fc = nn.Linear(self.inplanes, classes)

    def _make_layer(self, block, planes, *arguments, **options):
        (planes,) = scaled(self.width, planes)
        if not hasattr(self, "layer1"):  # the stem too: now, so that the parent initialises it with all the others
            self.inplanes = planes
            self.conv1 = nn.Conv2d(self.channels, planes, 7, 2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
        return super()._make_layer(block, planes, *arguments, **options)
