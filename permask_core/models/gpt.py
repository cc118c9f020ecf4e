"""A small decoder of text, as GPT-2 is built.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: section 2.3.
"""

import math

from torch import nn
from torch.nn import functional as F

from permask_core.models.scaling import scaled

LAYERS, UNITS = 2, 12  # of the decoder; of a head


def gpt(input_shape, classes, *, width=1.0):
    """A small decoder with 4 x ``width`` heads, at least one, in each of its two layers: maps tokens, int64 [n,
    length], to logits [n, length, classes] of the next token at each position.

    A head has 12 units, a token 12 for each head, and the MLP four times as many as a token. Positions are embedded,
    norms come first, and the last projection of each branch is drawn with a deviation that is smaller by the root of
    the number of branches, as in GPT-2. The head is not tied to the embedding.

    :func:`permask_core.masks.prunable_weights` returns the linear weights of the layers. It excludes the embeddings and
    the head.

    References
    ----------
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2).
    """
    (heads,) = scaled(width, 4)
    return Decoder(input_shape[0], classes, heads)


class Decoder(nn.Module):
    """See :func:`gpt`."""

    def __init__(self, length, classes, heads):
        super().__init__()
        token = UNITS * heads
        self.token, self.position = nn.Embedding(classes, token), nn.Embedding(length, token)
        self.blocks = nn.ModuleList(Block(token, heads) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(token), nn.Linear(token, classes, bias=False)
        self.dense_weights = ["head.weight"]
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith((".out.weight", ".down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, x):
        h = self.token(x) + self.position.weight[:x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Block(nn.Module):
    """Causal attention, then an MLP, each added to the residual stream."""

    def __init__(self, token, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(token), nn.LayerNorm(token)
        self.qkv, self.out = nn.Linear(token, 3 * token), nn.Linear(token, token)
        self.up, self.down = nn.Linear(token, 4 * token), nn.Linear(4 * token, token)
        for layer in (self.qkv, self.out, self.up, self.down):
            nn.init.zeros_(layer.bias)

    def forward(self, h):
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for part in self.qkv(self.norm1(h)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        h = h + self.out(seen.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))
