"""Multi-head attention whose projections are fan-in layers."""

import torch
from torch import nn
from torch.nn import functional as F

from permask_core.sparse.fan_in import FanInLinear


class FanInAttention(nn.Module):
    """torch.nn.MultiheadAttention with a :class:`FanInLinear` for each of query, key and value.

    It is called with the same arguments. :func:`~permask_core.sparse.condense` makes it.

    Attributes
    ----------
    q_proj, k_proj, v_proj : FanInLinear
        From embed_dim inputs to embed_dim outputs.
    out_proj : FanInLinear or torch.nn.Linear
    """

    # So that torch.nn.TransformerEncoderLayer does not choose its fused path, which reads weights.
    in_proj_bias, _qkv_same_embed_dim = None, False

    def __init__(self, projections, out_proj, num_heads, dropout=0.0, batch_first=False):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = projections
        self.out_proj, self.num_heads, self.dropout, self.batch_first = out_proj, num_heads, dropout, batch_first

    @classmethod
    @torch.no_grad()
    def from_dense(cls, attention, mask, out_mask=None):
        """Return the attention that computes the same function under a mask.

        Parameters
        ----------
        attention : torch.nn.MultiheadAttention
            Without ``add_bias_kv`` and ``add_zero_attn``, and with keys and values of size embed_dim.
        mask : torch.Tensor
            bool [3 embed_dim, embed_dim], of ``in_proj_weight``; query, key and value may differ in their fan-in.
        out_mask : torch.Tensor, optional
            bool [embed_dim, embed_dim], of ``out_proj.weight``. None: this layer remains dense.

        Raises
        ------
        ValueError
            If the attention has parameters that this layer does not have, or a mask does not fit.

        Examples
        --------
        >>> attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(1, 3, 4)
        >>> layer = FanInAttention.from_dense(attention, torch.ones(12, 4).bool())
        >>> torch.allclose(layer(x, x, x)[0], attention(x, x, x)[0], atol=1e-6)
        True
        """
        if attention.bias_k is not None or attention.add_zero_attn or attention.in_proj_weight is None:
            raise ValueError("its attention has add_bias_kv, add_zero_attn, kdim or vdim: expected none of them")
        size, out_proj = attention.embed_dim, attention.out_proj
        projections = []
        for place in range(0, 3 * size, size):
            dense = nn.Linear(size, size, device="meta").train(attention.training)
            dense.weight = nn.Parameter(attention.in_proj_weight[place:place + size],
                                        attention.in_proj_weight.requires_grad)
            bias = attention.in_proj_bias
            dense.bias = bias if bias is None else nn.Parameter(bias[place:place + size], bias.requires_grad)
            projections.append(FanInLinear.from_dense(dense, mask[place:place + size]))
        if out_mask is not None:
            out_proj = FanInLinear.from_dense(out_proj, out_mask)
            out_proj.bias = attention.out_proj.bias
        layer = cls(projections, out_proj, attention.num_heads, attention.dropout, attention.batch_first)
        layer.training = attention.training
        return layer

    def extra_repr(self):
        return f"num_heads={self.num_heads}, dropout={self.dropout}, batch_first={self.batch_first}"

    def forward(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                average_attn_weights=True, is_causal=False):
        """Return the outputs and, with ``need_weights``, the weights, as torch.nn.MultiheadAttention does."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is True and attn_mask None: expected the mask too, as torch does")
        batched = query.ndim == 3

        def arranged(x):
            """From the caller's axes to [batch, length, embed_dim]; also back, if there is a batch."""
            return x if batched and self.batch_first else x.transpose(0, 1) if batched else x[None]

        q, k, v = (project(arranged(x)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project, x in (
            (self.q_proj, query), (self.k_proj, key), (self.v_proj, value)))  # [batch, heads, length, size of a head]
        mask = None if attn_mask is None else _added(attn_mask, q)
        if mask is not None and mask.ndim == 3:
            mask = mask.view(*q.shape[:3], -1)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q).view(len(q), 1, 1, -1)
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = weights @ v
        else:
            weights, y = None, F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if need_weights:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        return arranged(y) if batched else y[0], weights


def _added(mask, like):
    """Return a mask, where True means no attention, as numbers to add; numbers do not change."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
