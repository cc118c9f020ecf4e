"""A small decoder of text with a mixture of experts in each layer, as Mixtral is built.

Jiang et al., "Mixtral of Experts", 2024: section 2.1. Shazeer, "GLU Variants Improve Transformer", 2020. The experts of
a layer are packed as in transformers 5: one tensor for all of them, and one call with the tokens, the indices of their
experts and the weights of these. So whatever reads experts there reads them here.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from permask_core.models.scaling import scaled

UNITS = 16  # of a head


def moe(input_shape, classes, *, width=1.0, layers=4, experts=16, top_k=2, units=128, gated=True):
    """A small decoder with 4 x ``width`` heads, at least one, in each of its ``layers``: maps tokens, int64 [n,
    length],
    to logits [n, length, classes] of the next token at each position.

    A head has 16 units, and a token 16 for each head. In each layer a linear router chooses ``top_k`` of the
    ``experts`` for each token, by its largest logits. Their weights are the softmax over these logits alone, so they
    sum to 1. An expert is a SwiGLU of ``units`` hidden units without biases; without ``gated`` it is a GELU with
    biases.

    Raises
    ------
    ValueError
        If ``layers``, ``experts``, ``top_k`` or ``units`` is below 1, or there are fewer experts than ``top_k``.

    References
    ----------
    Jiang et al., "Mixtral of Experts", 2024; Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    for name, value, least in (("layers", layers, 1), ("top_k", top_k, 1), ("experts", experts, top_k),
                               ("units", units, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}: expected at least {least}")
    (heads,) = scaled(width, 4)
    return Decoder(input_shape[0], classes, heads, layers, Sizes(experts, top_k, units, gated))


class Sizes(NamedTuple):
    """The number of ``experts``, ``top_k``, the ``units`` of an expert, and whether experts are ``gated``."""

    experts: int
    top_k: int
    units: int
    gated: bool


class Decoder(nn.Module):
    """See :func:`moe`."""

    def __init__(self, length, classes, heads, layers, sizes):
        super().__init__()
        token = UNITS * heads
        self.token, self.position = nn.Embedding(classes, token), nn.Embedding(length, token)
        self.blocks = nn.ModuleList(Block(token, heads, sizes) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(token), nn.Linear(token, classes, bias=False)
        self.dense_weights = ["head.weight"]
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                last = name.endswith((".out.weight", ".down_proj"))
                scale = 1 / math.sqrt(weight.shape[-1] * (2 * layers if last else 1))
                nn.init.normal_(weight, std=0.02 if name in ("token.weight", "position.weight") else scale)

    def forward(self, x, routes=None):
        """Return the logits. What each router returns is appended to the list ``routes``."""
        h = self.token(x) + self.position.weight[:x.shape[1]]
        for block in self.blocks:
            h = block(h, routes)
        return self.head(self.norm(h))


class Block(nn.Module):
    """Causal attention, then a mixture of experts, each added to the residual stream."""

    def __init__(self, token, heads, sizes):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(token), nn.RMSNorm(token)
        self.qkv, self.out = nn.Linear(token, 3 * token, bias=False), nn.Linear(token, token, bias=False)
        self.mixture = Mixture(token, sizes)

    def forward(self, h, routes=None):
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                             for part in self.qkv(self.norm1(h)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        h = h + self.out(seen.transpose(1, 2).flatten(2))
        return h + self.mixture(self.norm2(h), routes)


class Mixture(nn.Module):
    """The sum over the chosen experts of weight times output: h(x) = sum of g_j(x) f_j(x)."""

    def __init__(self, token, sizes):
        super().__init__()
        self.router = Router(token, sizes)
        self.experts = (SwiGLU if sizes.gated else Gelu)(token, sizes)

    def forward(self, h, routes=None):
        x = h.flatten(0, -2)
        route = self.router(x)
        if routes is not None:
            routes.append(route)
        _, weights, chosen = route
        return self.experts(x, chosen, weights).view_as(h)


class Router(nn.Module):
    """Returns the logits [n, experts], and the weights and the indices of the chosen experts [n, top_k]."""

    def __init__(self, token, sizes):
        super().__init__()
        self.top_k, self.num_experts = sizes.top_k, sizes.experts
        self.weight = nn.Parameter(torch.empty(sizes.experts, token))

    def forward(self, x):
        logits = F.linear(x, self.weight)
        best, chosen = logits.topk(self.top_k, dim=-1)
        return logits, best.softmax(-1), chosen


class Experts(nn.Module):
    """All experts of a layer; a subclass has their weights and computes one of them."""

    def forward(self, x, chosen, weights):
        """Return the weighted sum of the chosen experts, [n, token], for tokens x [n, token]; the others are [n, k]."""
        order = chosen.flatten().argsort(stable=True)  # by expert, so that each sees its tokens at once
        of_token = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=self.num_experts).tolist()
        outputs = torch.cat([self.expert(j, part) for j, part in enumerate(x[of_token].split(counts)) if len(part)])
        return torch.zeros_like(x).index_add(0, of_token, outputs * weights.flatten()[order, None])


class SwiGLU(Experts):
    """f(x) = down (silu(gate x) * up x); gate and up are the halves of one tensor."""

    def __init__(self, token, sizes):
        super().__init__()
        self.num_experts = sizes.experts
        self.gate_up_proj = nn.Parameter(torch.empty(sizes.experts, 2 * sizes.units, token))
        self.down_proj = nn.Parameter(torch.empty(sizes.experts, token, sizes.units))

    @staticmethod
    def act_fn(x):
        return F.silu(x)

    def expert(self, j, x):
        gate, up = F.linear(x, self.gate_up_proj[j]).chunk(2, -1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[j])


class Gelu(Experts):
    """f(x) = down gelu(up x + b) + c."""

    def __init__(self, token, sizes):
        super().__init__()
        self.num_experts = sizes.experts
        self.up_proj = nn.Parameter(torch.empty(sizes.experts, sizes.units, token))
        self.up_proj_bias = nn.Parameter(torch.zeros(sizes.experts, sizes.units))
        self.down_proj = nn.Parameter(torch.empty(sizes.experts, token, sizes.units))
        self.down_proj_bias = nn.Parameter(torch.zeros(sizes.experts, token))

    @staticmethod
    def act_fn(x):
        return F.gelu(x)

    def expert(self, j, x):
        return F.linear(self.act_fn(F.linear(x, self.up_proj[j], self.up_proj_bias[j])), self.down_proj[j],
                        self.down_proj_bias[j])


def balance(routes):
    """Return the mean over layers of the load-balancing loss: experts x sum over experts of the fraction of the choices
    that are this expert's, times the mean of its softmax. It is 1 if all experts get the same share.

    Parameters
    ----------
    routes : list of (torch.Tensor, torch.Tensor, torch.Tensor)
        What the routers returned.

    References
    ----------
    Fedus, Zoph and Shazeer, "Switch Transformers", JMLR 2022: equations 4 to 6.
    """
    losses = []
    for logits, _, chosen in routes:
        share = chosen.flatten().bincount(minlength=logits.shape[1]) / chosen.numel()
        losses.append(logits.shape[1] * (share * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()
