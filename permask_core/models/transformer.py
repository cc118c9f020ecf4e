"""The Vision Transformer: torchvision's ViT-B/16 with a width.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021: section 3.1, and table 1 for the base model.
"""

import math

from torch import nn

from permask_core.models.feedforward import scaled


def vit_b_16(input_shape, classes, *, width=1.0):
    """torchvision's ViT-B/16 with 12 x ``width`` heads, at least one, in each of its 12 layers.

    A head has 64 units at any width, the tokens 64 for each head, and the MLP four times those of a token. Layer names,
    initialisation and ``forward`` are torchvision's own, so that its published weights load at width 1 and 224x224. The
    classifier starts at zero, as it does there. The patch projection takes the channels of ``input_shape``.

    :func:`permask_core.pruning.prunable_weights` takes the patch projection, each layer's output projection and MLP,
    and the classifier. It leaves out the class token, the position embedding and ``in_proj_weight``, which holds the
    three input projections of an attention in one parameter and stays dense in SRigL too.

    Raises
    ------
    ValueError
        If the images are not square or their side is no multiple of 16.

    References
    ----------
    Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Lasby et al., "Dynamic Sparse Training with
    Structured Sparsity", ICLR 2024 (SRigL).
    """
    channels, height, side = input_shape
    if height != side or side % 16:
        raise ValueError(f"input_shape is {input_shape}: vit_b_16 cuts the image into patches of 16x16 and needs a "
                         "square one whose side is a multiple of 16")
    (heads,) = scaled(width, 12)
    from permask_core.vision import torchvision  # here, because it takes a second to import

    model = torchvision.models.VisionTransformer(
        image_size=side, patch_size=16, num_layers=12, num_heads=heads, hidden_dim=64 * heads, mlp_dim=256 * heads,
        num_classes=classes)
    if channels != 3:  # torchvision has colour images only; drawn as there
        model.conv_proj = nn.Conv2d(channels, 64 * heads, 16, 16)
        nn.init.trunc_normal_(model.conv_proj.weight, std=math.sqrt(1 / (channels * 16 * 16)))
        nn.init.zeros_(model.conv_proj.bias)
    return model
