"""A U-Net as in the library diffusers (its UNet2DModel and UNet2DConditionModel), with the same parts and names.

Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020; Rombach et al., "High-Resolution Image Synthesis
with Latent Diffusion Models", CVPR 2022 (attention to a text). The library itself is not installed with the book.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class ResnetBlock(nn.Module):
    """Two convolutions with group normalisation, and the embedding of the time between them."""

    def __init__(self, inputs, outputs, time, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs), nn.GroupNorm(groups, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Attention of ``x`` [batch, tokens, channels] to itself, or to a text."""

    def __init__(self, channels, heads, context=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=context is None)
        self.to_k, self.to_v = (nn.Linear(context or channels, channels, bias=context is None) for _ in range(2))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x, text=None):
        text = x if text is None else text
        q, k, v = (layer(t).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for layer, t in ((self.to_q, x), (self.to_k, text), (self.to_v, text)))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """The attention of an unconditional network: a residual block with group normalisation."""

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.group_norm, self.attention = nn.GroupNorm(groups, channels), Attention(channels, heads)

    def forward(self, x, text=None):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Transformer(nn.Module):
    """The attention of a conditional network: to all places, then to a text, then a gated perceptron."""

    def __init__(self, channels, heads, groups, context):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1, self.attn2 = Attention(channels, heads, channels), Attention(channels, heads, context)
        self.ff1, self.ff2 = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x, text):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        h = h + self.attn1(self.norm1(h))
        h = h + self.attn2(self.norm2(h), text)
        value, gate = self.ff1(self.norm3(h)).chunk(2, dim=-1)
        h = h + self.ff2(value * F.gelu(gate))
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Block(nn.Module):
    """Residual blocks, each with attention or without, and then a change of the resolution."""

    def __init__(self, sizes, time, groups, attention=None, resize=None):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(inputs, outputs, time, groups) for inputs, outputs in sizes)
        self.attentions = nn.ModuleList(attention(outputs) for _, outputs in sizes) if attention else None
        outputs = sizes[-1][1]
        self.downsampler = nn.Conv2d(outputs, outputs, 3, stride=2, padding=1) if resize == "down" else None
        self.upsampler = nn.Conv2d(outputs, outputs, 3, padding=1) if resize == "up" else None

    def forward(self, x, time, text, skips, up=False):
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1) if up else x, time)
            x = self.attentions[i](x, text) if self.attentions else x
            if not up:
                skips.append(x)
        if self.downsampler:
            x = self.downsampler(x)
            skips.append(x)
        return self.upsampler(F.interpolate(x, scale_factor=2.0, mode="nearest")) if self.upsampler else x


class UNet(nn.Module):
    """A U-Net that predicts the noise in an image.

    Parameters
    ----------
    widths : list of int
        Channels at each resolution.
    attention : list of bool
        Whether a resolution has attention.
    context : int or None
        The width of the text for attention to it; by default there is no text.
    """

    def __init__(self, widths, attention, *, channels=3, layers=2, heads=4, groups=8, context=None):
        super().__init__()
        time, last = 4 * widths[0], len(widths) - 1

        def attend(width):
            return Transformer(width, heads, groups, context) if context else SelfAttention(width, heads, groups)

        self.time1, self.time2 = nn.Linear(widths[0], time), nn.Linear(time, time)
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        skips, inputs, self.down_blocks = [widths[0]], widths[0], nn.ModuleList()
        for level, width in enumerate(widths):
            sizes = [(inputs if i == 0 else width, width) for i in range(layers)]
            self.down_blocks.append(Block(sizes, time, groups, attend if attention[level] else None,
                                          "down" if level < last else None))
            skips += [width] * (layers + (level < last))
            inputs = width
        self.mid1, self.mid2 = (ResnetBlock(inputs, inputs, time, groups) for _ in range(2))
        self.mid_attention = attend(inputs)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            sizes = [((inputs if i == 0 else widths[level]) + skips.pop(), widths[level]) for i in range(layers + 1)]
            self.up_blocks.append(Block(sizes, time, groups, attend if attention[level] else None,
                                        "up" if level > 0 else None))
            inputs = widths[level]
        self.norm_out, self.conv_out = nn.GroupNorm(groups, inputs), nn.Conv2d(inputs, channels, 3, padding=1)

    def forward(self, x, time, text=None):
        half = self.time1.in_features // 2
        angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(half, device=x.device) / half)
        time = self.time2(F.silu(self.time1(torch.cat([angles.cos(), angles.sin()], dim=1))))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time, text, skips)
        x = self.mid2(self.mid_attention(self.mid1(x, time), text), time)
        for block in self.up_blocks:
            x = block(x, time, text, skips, up=True)
        return self.conv_out(F.silu(self.norm_out(x)))
