"""torchvision's networks with their widths multiplied by a factor.

They are in a separate module because torchvision is slow to import. They are subclasses, so that a process that
unpickles such a network imports this module, and thus torchvision through ``permask_core.models.vision``.
"""

import math

from torch import nn

from permask_core.models.scaling import scaled
from permask_core.models.vision import torchvision


class ScaledResNet(torchvision.models.ResNet):
    """torchvision's ResNet with its 64, 128, 256 and 512 channels, which torchvision hard-codes, multiplied by
    ``width``.

    ``block`` is ``"BasicBlock"`` or ``"Bottleneck"``; ``blocks`` is the number of blocks in each of the four stages.
    With ``small_images`` the stem is a 3x3 convolution without pooling, which keeps the size of the image.
    """

    def __init__(self, block, blocks, channels, classes, width, *, small_images=False):
        # Set before the parent's constructor, which calls _make_layer.
        self.channels, self.width, self.small_images = channels, width, small_images
        super().__init__(getattr(torchvision.models.resnet, block), blocks, num_classes=classes)
        self.fc = nn.Linear(self.inplanes, classes)

    def _make_layer(self, block, planes, *arguments, **options):
        (planes,) = scaled(self.width, planes)
        if not hasattr(self, "layer1"):  # now, so that the parent initialises the new stem too
            self.inplanes = planes
            kernel, stride = (3, 1) if self.small_images else (7, 2)
            self.conv1 = nn.Conv2d(self.channels, planes, kernel, stride, padding=kernel // 2, bias=False)
            self.bn1 = nn.BatchNorm2d(planes)
            if self.small_images:
                self.maxpool = nn.Identity()
        return super()._make_layer(block, planes, *arguments, **options)


class ScaledDenseNet(torchvision.models.DenseNet):
    """torchvision's DenseNet with its growth rate of 32 and the 64 channels of its stem multiplied by ``width``.

    ``blocks`` is the number of layers in each of the four dense blocks. With ``small_images`` the stem is a 3x3
    convolution without pooling, which keeps the size of the image.
    """

    def __init__(self, blocks, channels, classes, width, *, small_images=False):
        growth, first = scaled(width, 32, 64)
        super().__init__(growth, blocks, first, num_classes=classes)
        if small_images:
            self.features.pool0 = nn.Identity()
        if small_images or channels != 3:  # initialised like all other convolutions
            kernel, stride = (3, 1) if small_images else (7, 2)
            self.features.conv0 = nn.Conv2d(channels, first, kernel, stride, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(self.features.conv0.weight)


class ScaledVisionTransformer(torchvision.models.VisionTransformer):
    """torchvision's Vision Transformer for ``side`` x ``side`` images with any number of channels.

    The defaults are those of ViT-B/16, with ``heads`` heads instead of 12. A head has ``units`` units, and the MLP
    ``ratio`` times as many as a token. The weights whose names end in one of ``dense`` are not pruned.
    """

    def __init__(self, channels, side, classes, heads, *, patch=16, layers=12, units=64, ratio=4,
                 dense=("in_proj_weight",)):
        token = units * heads
        super().__init__(image_size=side, patch_size=patch, num_layers=layers, num_heads=heads, hidden_dim=token,
                         mlp_dim=ratio * token, num_classes=classes)
        if channels != 3:  # torchvision supports colour images only; initialised as there
            self.conv_proj = nn.Conv2d(channels, token, patch, patch)
            nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (channels * patch * patch)))
            nn.init.zeros_(self.conv_proj.bias)
        self.dense_weights = [name for name, _ in self.named_parameters() if name.endswith(dense)]
