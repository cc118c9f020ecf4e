"""timm's TinyViT with a given number of heads; in a separate module because timm is optional and imports
torchvision."""

from permask_core.models.vision import torchvision  # noqa: F401, I001 - before timm, which imports it too

from timm.models import tiny_vit


class Attention(tiny_vit.Attention):
    """timm's attention, which gathers its biases in every call.

    In evaluation mode, timm caches the gathered biases until the mode changes. Weights that are loaded or substituted
    (``torch.func.functional_call``) in between would have no effect.
    """

    def get_attention_biases(self, device):
        return self.attention_biases[:, self.attention_bias_idxs]


class ScaledTinyVit(tiny_vit.TinyVit):
    """timm's ``tiny_vit_5m_224`` with the given numbers of ``heads`` in its four stages, of 32 channels each.

    No window is larger than the feature map of its stage for an image whose longer side is ``side``.
    """

    def __init__(self, channels, side, classes, heads):
        maps = [-(-side // stride) for stride in (4, 8, 16, 32)]
        super().__init__(channels, classes, embed_dims=[32 * n for n in heads], depths=(2, 2, 6, 2), num_heads=heads,
                         window_sizes=[min(pair) for pair in zip((7, 7, 14, 7), maps)], drop_path_rate=0.0)
        for module in self.modules():
            if isinstance(module, tiny_vit.Attention):
                module.__class__ = Attention
        # Between stages; pruned only where the literature prunes shortcuts too.
        self.shortcut_weights = [name for name, module in self.named_modules() if name.endswith("downsample")]
