"""Vision Transformers with a width factor: torchvision's ViT-B/16, a small one, and timm's TinyViT-5M.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021: section 3.1, and table 1 for the base model. Wu et al.,
"TinyViT: Fast Pretraining Distillation for Small Vision Transformers", ECCV 2022: section 3.3.
"""

from permask_core.models.extras import check_extra
from permask_core.models.scaling import scaled


def vit_b_16(input_shape, classes, *, width=1.0):
    """torchvision's ViT-B/16 with 12 x ``width`` heads, at least one, in each of its 12 layers.

    A head has 64 units at any width, a token 64 for each head, and the MLP four times as many as a token. Layer names,
    initialisation and ``forward`` are torchvision's, so its published weights load at width 1 and 224x224. As there,
    the classifier is initialised to zero. The patch projection has the number of input channels in ``input_shape``.

    :func:`permask_core.masks.prunable_weights` returns the patch projection, the output projection and the MLP of each
    layer, and the classifier. It excludes the class token, the position embedding and ``in_proj_weight``, which holds
    the three input projections of an attention in one parameter and is dense in SRigL too.

    Raises
    ------
    ValueError
        If the images are not square or their side is not a multiple of 16.

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
    from permask_core.models.imagenet import ScaledVisionTransformer  # here: torchvision takes a second to import

    return ScaledVisionTransformer(channels, side, classes, heads)


def vit(input_shape, classes, *, width=1.0):
    """A small Vision Transformer with 4 x ``width`` heads, at least one, in each of its two layers.

    The image is cut into 4x4 patches, whatever its size, so there are 17 tokens with the class token. A head has 12
    units, a token 12 for each head, and the MLP twice as many as a token. Layer names, initialisation and ``forward``
    are those of :func:`vit_b_16`.

    :func:`permask_core.masks.prunable_weights` returns the linear weights of the layers: ``in_proj_weight``, which
    holds the projections of an attention to queries, keys and values, the output projection, and the MLP. It excludes
    the patch projection, the class token, the position embedding and the classifier.

    Raises
    ------
    ValueError
        If the images are not square or their side is not a multiple of 4.

    References
    ----------
    Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """
    channels, height, side = input_shape
    if height != side or side % 4:
        raise ValueError(f"input_shape is {input_shape}: vit cuts the image into 4x4 patches and needs a square one "
                         "whose side is a multiple of 4")
    (heads,) = scaled(width, 4)
    from permask_core.models.imagenet import ScaledVisionTransformer  # here: torchvision takes a second to import

    return ScaledVisionTransformer(channels, side, classes, heads, patch=side // 4, layers=2, units=12, ratio=2,
                                   dense=("conv_proj.weight", "heads.head.weight"))


def tiny_vit_5m(input_shape, classes, *, width=1.0):
    """timm's TinyViT with 5 million parameters, and 2, 4, 5 and 10 x ``width`` heads, at least one, in its four stages.

    A stage has 32 channels for each head; the first stage consists of convolutions with as many channels. Layer names,
    initialisation and ``forward`` are timm's, so its published weights load at width 1 and 224x224. There the windows
    of attention have 7x7, 14x14 and 7x7 positions. For smaller images a window is at most as large as the feature map,
    because most of it would be padding otherwise. The first convolution has the number of input channels in
    ``input_shape``.

    Raises
    ------
    ImportError
        If timm, which the extra ``permask[vision]`` installs, is missing.
    ValueError
        If the images are smaller than 32x32.

    References
    ----------
    Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers", ECCV 2022.
    """
    channels, height, side = input_shape
    if min(height, side) < 32:
        raise ValueError(f"input_shape is {input_shape}: tiny_vit_5m halves the image five times and needs at least "
                         "32x32")
    heads = scaled(width, 2, 4, 5, 10)
    check_extra("tiny_vit_5m", "timm", "vision")
    from permask_core.models.tiny_vit import ScaledTinyVit

    return ScaledTinyVit(channels, max(height, side), classes, heads)
