"""Tracing: what is found keeps the function, every entry of it counts, and what is not followed stays where it is."""

import copy
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune, rnn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.utils import _pytree as pytree

from permask_core.matching import (
    Entry,
    check_function,
    derangements,
    draw_weights,
    function_change,
    permutation_groups,
)
from permask_core.matching.tracer import trace
from permask_core.models import build_model
from tests.hypotheses import examples

Linear, Conv, Seq, ReLU, BN = nn.Linear, nn.Conv2d, nn.Sequential, nn.ReLU, nn.BatchNorm2d


class Net(nn.Module):
    """A network as a function of its layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            if isinstance(layer, torch.Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


def vectors(n=8, batch=24):
    return torch.randn(batch, n)


def images(*shape):
    return torch.randn(4, *(shape or (3, 6, 6)))


def tokens(n=5, batch=3):
    return torch.randn(batch, n, 8)


def between(operation, size=6, read=None, **layers):
    """An operation between two linear layers."""
    return Net(lambda s, x: s.b(operation(s, s.a(x))), a=Linear(8, size), b=Linear(read or size, 3),
               **layers), vectors()


def sizes(groups):
    return " ".join(f"{name}:{group.size}" for name, group in groups.items())


def assert_kept(model, x, idle=()):
    """Permuting all groups keeps the function, and leaving out any entry but the ``idle`` ones does not."""
    groups = permutation_groups(model, x)
    assert check_function(groups, model, x) < 1e-9
    x = pytree.tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, x)
    state, left = model.state_dict(keep_vars=True), {}
    for seed in range(6):
        net, permutations = draw_weights(model, seed=seed), derangements(groups, seed=seed)
        with torch.no_grad():
            for name, tensor in net.named_parameters():
                tensor.mul_(10 if name.endswith("bias") else 1)  # otherwise a small group of them does little
        for name, group in groups.items():
            for entry in group.entries:
                key = name, entry.tensor, entry.axis, entry.rows
                if entry.tensor in idle or left.get(key, 0) > 1e-2:
                    continue
                rest = tuple(e for e in group.entries if (e.axis, e.rows) != (entry.axis, entry.rows)
                             or state[e.tensor] is not state[entry.tensor])  # of a tied tensor both names
                left[key] = function_change({**groups, name: group._replace(entries=rest)},
                                            {name: permutations[name]}, net, x)
    assert not {key: change for key, change in left.items() if not change > 1e-2}
    assert all(fixed.why and fixed.count > 0 for fixed in groups.fixed)
    return groups


def tied(one, two, *layers, share=False):
    model = Seq(*layers)
    model[two].weight = nn.Parameter(model[one].weight.data) if share else model[one].weight
    return model


class Shuffle(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        batch, channels, *space = x.shape
        return x.view(batch, self.groups, channels // self.groups, *space).transpose(1, 2).reshape(x.shape)


class Excitation(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = Conv(channels, squeezed, 1), Conv(squeezed, channels, 1)

    def forward(self, x):
        return x * self.up(self.down(self.pool(x)).relu()).sigmoid()


class Standardised(Conv):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


def shuffle_unit(s, x):
    one, two = s.stem(x).chunk(2, 1)
    y = torch.cat([one, s.n2(s.up(s.n1(s.depth(two)).relu())).relu()], 1)
    return s.head(s.shuffle(y))


def residual(s, x):
    h = s.stem(x)
    return s.head(h + s.scale * s.b(s.a(h).relu()))


def added_in_place(s, h):
    first = h
    h += s.c(h).relu()
    first.mul_(first.sigmoid())
    return h


def halved_in_place(s, h):
    halves = h.view(-1, 2, 3)
    halves[:, 0].mul_(2)
    halves += halves.flip(1)
    return h


def overwritten(s, x):
    h = s.a(x)
    before = s.d(h.relu())
    h.copy_(s.c(x))
    return s.b(before.relu() + h.tanh())


def recurrent(s, x):
    h = x.new_zeros(len(x), 6)
    for step in x.unbind(1):
        h = (s.w(h) + s.u(step)).tanh()
    return s.v(h)


def hourglass(s, x):
    h = s.a(x)
    return s.o(h + s.up(F.gelu(s.down(s.norm(h.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2))


def experts(s, x):
    hidden = torch.einsum("bi,eih->beh", x, s.w).relu()
    return torch.einsum("be,beo->bo", s.r(x).softmax(1), torch.einsum("beh,eho->beo", hidden, s.v))


def packed_experts(s, x):
    hidden = torch.bmm(s.e(x)[None].expand(4, -1, -1), s.w).relu()
    return s.o((s.g(x).softmax(1).T[:, :, None] * torch.bmm(hidden, s.v)).sum(0))


def grouped_experts(s, x):
    """One expert for each row, whose rows are sorted by experts, as in large language models."""
    h = s.e(x)
    expert, order = s.g(h).argmax(1).sort()
    ends = torch.histc(expert.float(), bins=3, min=0, max=2).cumsum(0, dtype=torch.int32)
    h = F.grouped_mm(F.grouped_mm(h[order], s.w, offs=ends).relu(), s.v, offs=ends)
    return s.o(torch.zeros_like(h).index_copy(0, order, h))


def seen_by_both(s, x):
    h = s.a(x).relu()
    return {"sum": s.b(h), "parts": [s.c(h)]}


def dense_block(s, x):
    h = s.a(x)
    return s.c(s.m(torch.cat([h, s.b(s.n(h).relu())], 1)).relu())


def mixer(s, x):
    h = s.a(x)
    h = h + s.u(F.gelu(s.t(h.mT))).mT
    return s.o(h.tanh())


def with_spare(s, x):
    s.c(x)
    return s.b(s.a(x).relu())


def written(part, value=None):
    """Writing into a slice of the hidden units."""
    def operation(s, h):
        if value is None:
            h[:, part] += 1
        else:
            h[:, part] = value(h)
        return h.tanh()

    return lambda: between(operation)


# For each network its groups and their sizes; ``a/0`` is within a unit of another group.
FOLLOWED = {
    # Joining and parting
    "concatenation with the input": ("a:6", lambda: (Net(lambda s, x: s.b(torch.cat([x, s.a(x).relu()], 1)), a=Linear(8,
        6), b=Linear(14, 3)), vectors())),
    "one thing twice": ("a:6", lambda: between(lambda s, h: torch.cat([h.relu(), (-h).relu()], 1), 6, 12)),
    "the same twice": ("a:6", lambda: between(lambda s, h: h.relu().repeat(1, 2), 6, 12)),
    "concatenation of parts": ("a:4 a#2:2", lambda: between(lambda s, h: torch.cat([h[:, 4:], h[:, :4].relu()], 1))),
    "split": ("a:2 a#2:4", lambda: between(lambda s, h: torch.cat(h.split([2, 4], 1)[::-1], 1).relu())),
    "every second": ("a:3 a#2:3", lambda: between(lambda s, h: torch.cat([h[:, ::2].relu(), h[:, 1::2]], 1))),
    "chunk and gate": ("a:6", lambda: between(lambda s, h: h.chunk(2, 1)[0] * h.chunk(2, 1)[1].sigmoid(), 12, 6)),
    "GLU": ("a:6", lambda: between(lambda s, h: F.glu(h, 1), 12, 6)),
    "SwiGLU": ("a:6", lambda: (Net(lambda s, x: s.c(F.silu(s.a(x)) * s.b(x)), a=Linear(8, 6), b=Linear(8, 6),
        c=Linear(6, 3)), vectors())),
    "maxout": ("a/0:2 a:6 a/1:2 a/2:2 a/3:2 a/4:2 a/5:2", lambda: between(lambda s, h: h.view(-1, 6, 2).amax(2), 12,
        6)),
    "maxout, transposed": ("a/0:2 a:6 a/1:2 a/2:2 a/3:2 a/4:2 a/5:2", lambda: between(lambda s, h: h.view(-1, 2,
        6).max(1)[0], 12, 6)),
    "constants appended": ("a:6", lambda: between(lambda s, h: torch.cat([h, h.new_zeros(len(h), 2)], 1).cos(), 6, 8)),
    "constants that differ": ("a:6 n:2 n#2:2", lambda: (Net(lambda s, x: s.b(s.n(torch.cat([s.a(x),
        torch.zeros_like(x[:, :2]) + 1, torch.zeros_like(x[:, :2]) + 2], 1)).cos()), a=Linear(8, 6),
        n=nn.BatchNorm1d(10), b=Linear(10, 3)), vectors())),
    "a mean and a maximum appended": ("a:6", lambda: (Net(lambda s, x: s.b(s.n(torch.cat([h := s.a(x), h.mean(1,
        keepdim=True), h.amax(1, keepdim=True)], 1)).cos()), a=Linear(8, 6), n=nn.BatchNorm1d(8), b=Linear(8, 3)),
        vectors())),
    "constants that meet": ("a:6", lambda: (Net(lambda s, x: s.b(s.n(torch.cat([s.a(x), torch.ones_like(x[:, :2])],
        1) * torch.cat([h := s.c(x), h.mean(1, keepdim=True), h.amax(1, keepdim=True)], 1)).cos()), a=Linear(8, 6),
        c=Linear(8, 6), n=nn.BatchNorm1d(8), b=Linear(8, 3)), vectors())),
    "padded by a number": ("a:6 n:3", lambda: (Net(lambda s, x: s.b(s.n(F.pad(s.a(x), (1, 2), value=.7)).tanh()),
        a=Linear(8, 6), n=nn.BatchNorm1d(9), b=Linear(9, 3)), vectors())),
    "parts next to units": ("a:5", lambda: (Net(
        lambda s, x: s.b(torch.cat([s.a(x).view(-1, 2, 5), s.g(x)[:, None]], 1).relu()).mean(1), a=Linear(8, 10),
        g=Linear(8, 5), b=Linear(5, 3)), vectors())),
    "a part written": ("a:2 a#2:4", written(slice(0, 2))),
    "a part written, in the middle": ("a:2 a#2:2 a#3:2", written(slice(2, 4))),
    "a part overwritten": ("a:4 a#2:2", written(slice(4, 6), lambda h: h[:, 4:].relu())),
    # Convolutions
    "groups": ("0/0:4 0:2 0/1:4 0/0#2:4 0/1#2:4", lambda: (Seq(Conv(3, 8, 3), ReLU(), Conv(8, 8, 1, groups=2), ReLU(),
        Conv(8, 3, 1)), images())),
    "groups twice": ("0/0:2 0:2 0/1:2 0/0#2:4 0/1#2:4 0/0#3:3 0/1#3:3", lambda: (Seq(Conv(3, 4, 3), ReLU(), Conv(4, 8,
        1, groups=2), ReLU(), Conv(8, 6, 1, groups=2), ReLU(), Conv(6, 3, 1)), images())),
    "groups in groups": ("0:4 0#2:4 2/0:2 2:2 2/1:2 2#2/0:2 2#2:2 2#2/1:2 2/0#2:2 2/1#2:2 2#2/0#2:2 2#2/1#2:2",
        lambda: (Seq(Conv(3, 8, 3), ReLU(), Conv(8, 8, 1, groups=2), ReLU(), Conv(8, 8, 1, groups=4), ReLU(), Conv(8, 3,
        1)), images())),
    "depthwise": ("0:6", lambda: (Seq(Conv(3, 6, 3), ReLU(), Conv(6, 6, 3, groups=6), ReLU(), Conv(6, 3, 1)),
        images())),
    "depthwise, twice as wide": ("0:4 0/0:2 0/1:2 0/2:2 0/3:2", lambda: (Seq(Conv(3, 4, 3), ReLU(), Conv(4, 8, 3,
        groups=4, bias=False), BN(8), ReLU(), Conv(8, 3, 1)), images())),
    "channel shuffle": ("0/0:4 0:2 0/1:4 0/0#2:2 0/0#3:2 0/1#2:2 0/1#3:2 5:4 5#2:4",
        lambda: (Seq(Conv(3, 8, 3), ReLU(), Conv(8, 8, 1, groups=2), Shuffle(2), ReLU(), Conv(8, 8, 1, groups=2),
        ReLU(), Conv(8, 3, 1)), images())),
    "ChannelShuffle": ("0/0:4 0:2 0/1:4 0/0#2:4 0/1#2:4", lambda: (Seq(Conv(3, 8, 3), ReLU(), Conv(8, 8, 1, groups=2),
        nn.ChannelShuffle(2), ReLU(), Conv(8, 3, 1)), images())),
    "a ShuffleNet unit": ("stem:4 stem#2:4 up:4", lambda: (Net(shuffle_unit, stem=Conv(3, 8, 3), depth=Conv(4, 4, 3, 1,
        1, groups=4), n1=BN(4), up=Conv(4, 4, 1), n2=BN(4), shuffle=Shuffle(2), head=Conv(8, 3, 1)), images())),
    "transposed": ("0:6 2:5", lambda: (Seq(Conv(3, 6, 3), ReLU(), nn.ConvTranspose2d(6, 5, 3), ReLU(), Conv(5, 3, 1)),
        images())),
    "transposed, groups": ("0/0:3 0:2 0/1:3 0/0#2:4 0/1#2:4", lambda: (Seq(Conv(3, 6, 3), ReLU(), nn.ConvTranspose2d(6,
        8, 3, groups=2), ReLU(), Conv(8, 3, 1)), images())),
    "one axis": ("0/0:2 0:3 0/1:2 0/2:2 0/0#2:2 0/1#2:2 0/2#2:2 5:4", lambda: (Seq(nn.Conv1d(3, 6, 3),
        nn.BatchNorm1d(6), ReLU(), nn.Conv1d(6, 6, 3, groups=3), ReLU(), nn.ConvTranspose1d(6, 4, 3), nn.Conv1d(4, 3,
        1)), images(3, 9))),
    "three axes": ("0:4 2:6", lambda: (Seq(nn.Conv3d(2, 4, 3), ReLU(), nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6),
        nn.MaxPool3d(2), nn.Flatten(), Linear(48, 3)), images(2, 5, 5, 5))),
    "padding": ("0:6 2:5", lambda: (Seq(Conv(3, 6, 3, padding=1, padding_mode="circular"), ReLU(), Conv(6, 5, 3,
        padding="same"), ReLU(), nn.ReflectionPad2d(1), Conv(5, 3, 3)), images())),
    "squeeze and excitation": ("0:6 2.down:4", lambda: (Seq(Conv(3, 6, 3), ReLU(), Excitation(6, 4), Conv(6, 3, 1)),
        images())),
    "layer scale": ("stem:6 a:5", lambda: (Net(residual, stem=Conv(3, 6, 3), a=Conv(6, 5, 1), b=Conv(5, 6, 1),
        scale=parameter(6, 1, 1), head=Conv(6, 3, 1)), images())),
    "channels last": ("a:6 down:9", lambda: (Net(hourglass, a=Conv(3, 6, 3), norm=nn.LayerNorm(6), down=Linear(6, 9),
        up=Linear(9, 6), o=Conv(6, 3, 1)), images())),
    "a dense block": ("a:4 b:3", lambda: (Net(dense_block, a=Conv(3, 4, 1), n=BN(4), b=Conv(4, 3, 3, 1, 1), m=BN(7),
        c=Conv(7, 2, 1)), images())),
    "option A by hand": ("a:4 b:2", lambda: (Net(lambda s, x: s.c(F.pad(s.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 1,
        1)) + s.b(s.a(x))), a=Conv(3, 4, 1), b=Conv(4, 6, 3, 2, 1), c=Conv(6, 3, 1)), images())),
    "flatten and back": ("0:6 3:4", lambda: (Seq(Linear(8, 24), nn.Unflatten(1, (6, 2, 2)), ReLU(),
        nn.ConvTranspose2d(6, 4, 2), ReLU(), nn.Flatten(), Linear(36, 3)), vectors())),
    "one pixel padded": ("a:5 t:3", lambda: (Net(lambda s, x: s.b((s.t(s.a(x)[:, :, None,
        None]).flatten(2) + s.pos).tanh()).mean(1), a=Linear(8, 5), t=Conv(5, 3, 2, padding=1), pos=parameter(1, 1, 4),
        b=Linear(4, 3)), vectors())),
    "pixel shuffle": ("0:2", lambda: (Seq(Conv(3, 8, 3), ReLU(), nn.PixelShuffle(2), Conv(2, 3, 1)), images())),
    "upsampling": ("0:6 3:5", lambda: (Seq(Conv(3, 6, 3), nn.Upsample(scale_factor=2), ReLU(), Conv(6, 5, 3),
        nn.Upsample(scale_factor=2, mode="bilinear"), Conv(5, 3, 1)), images())),
    # Norms and activations
    "GroupNorm of 1": ("0:6", lambda: (Seq(Conv(3, 6, 3, bias=False), nn.GroupNorm(1, 6), ReLU(), Conv(6, 3, 1)),
        images())),
    "GroupNorm of 2": ("0/0:3 0:2 0/1:3", lambda: (Seq(Conv(3, 6, 3, bias=False), nn.GroupNorm(2, 6), ReLU(True),
        Conv(6, 3, 1)), images())),
    "GroupNorm of all": ("0:6", lambda: (Seq(Conv(3, 6, 3, bias=False), nn.GroupNorm(6, 6), ReLU(), Conv(6, 3, 1)),
        images())),
    "GroupNorm before groups": ("0/0/0:2 0/0:2 0:2 0/0/1:2 0/1/0:2 0/1:2 0/1/1:2 0/0#2:4 0/1#2:4",
        lambda: (Seq(Conv(3, 8, 3, bias=False), nn.GroupNorm(4, 8), ReLU(), Conv(8, 8, 1, groups=2), ReLU(), Conv(8, 3,
        1)), images())),
    "InstanceNorm": ("0:6", lambda: (Seq(Conv(3, 6, 3, bias=False), nn.InstanceNorm2d(6, affine=True), ReLU(), Conv(6,
        3, 1)), images())),
    "InstanceNorm with statistics": ("0:6", lambda: (Seq(Conv(3, 6, 3), nn.InstanceNorm2d(6, track_running_stats=True),
        ReLU(True), Conv(6, 3, 1)), images())),
    "LayerNorm of one axis": ("0:6", lambda: (Seq(Linear(8, 6), nn.LayerNorm(6), ReLU(), Linear(6, 3)), tokens())),
    "LayerNorm of space": ("0:6", lambda: (Seq(Conv(3, 6, 3, bias=False), nn.LayerNorm((4, 4)), ReLU(), Conv(6, 3, 1)),
        images())),
    "LayerNorm of everything": ("0:6", lambda: (Seq(Conv(3, 6, 3), nn.LayerNorm((6, 4, 4)), ReLU(), Conv(6, 3, 1)),
        images())),
    "RMSNorm": ("0:6", lambda: (Seq(Linear(8, 6), nn.RMSNorm(6), ReLU(True), Linear(6, 3)), vectors())),
    "BatchNorm without statistics": ("0:6", lambda: (Seq(Conv(3, 6, 3, bias=False), BN(6, track_running_stats=False),
        ReLU(), Conv(6, 3, 1)), images())),
    "BatchNorm without weights": ("0:6", lambda: (Seq(Conv(3, 6, 3), BN(6, affine=False), ReLU(), Conv(6, 3, 1)),
        images())),
    "BatchNorm over parts": ("a/0:4 a:3 a/1:4 a/2:4", lambda: between(lambda s, h: s.n(h.view(-1, 3).tanh()).view(-1,
        12), 12, n=nn.BatchNorm1d(3, affine=False, track_running_stats=False))),
    "InstanceNorm over parts": ("a/0:3 a:4 a/1:3 a/2:3 a/3:3", lambda: between(
        lambda s, h: F.instance_norm(h.view(-1, 4, 3)).flatten(1), 12)),
    "LayerNorm over parts": ("a/0:3 a:4 a/1:3 a/2:3 a/3:3", lambda: between(
        lambda s, h: F.layer_norm(h.view(-1, 4, 3), (3,)).flatten(1), 12)),
    "softmax over parts": ("a/0:4 a:3 a/1:4 a/2:4", lambda: between(
        lambda s, h: h.view(-1, 4, 3).softmax(1).flatten(1), 12)),
    "attention over parts": ("a:4", lambda: between(
        lambda s, h: F.scaled_dot_product_attention(*[h.view(-1, 2, 4, 3)] * 3).flatten(1), 24)),
    "causal attention over parts": ("", lambda: between(
        lambda s, h: F.scaled_dot_product_attention(*[h.view(-1, 2, 4, 3)] * 3, is_causal=True).flatten(1), 24)),
    "PReLU of one": ("0:6", lambda: (Seq(Linear(8, 6), nn.PReLU(), Linear(6, 3)), vectors())),
    "PReLU of each": ("0:6", lambda: (Seq(Conv(3, 6, 3), nn.PReLU(6), Conv(6, 3, 1)), images())),
    "softmax": ("a:6", lambda: between(lambda s, h: h.softmax(1).log_softmax(-1))),
    "activations": ("a:6", lambda: between(lambda s,
        h: F.hardswish(h) + F.mish(h) + F.logsigmoid(h) + F.rrelu(h) + F.threshold(h, .1, .2) + h.clamp(-1, 1))),
    "where and fill": ("a:6", lambda: between(lambda s, h: torch.where(h > 0, h, h * h).masked_fill(h < -1, .3))),
    "in place": ("a:6", lambda: between(lambda s, h: h.relu_().add_(1).mul_(h.sigmoid()))),
    "in place under two names": ("a:6", lambda: between(added_in_place, c=Linear(6, 6))),
    "in place on a view": ("a:3", lambda: between(halved_in_place)),
    "in place on a part": ("a:3 a#2:3", lambda: between(lambda s, h: (h.chunk(2, 1)[0].mul_(3), h)[1])),
    "in place after a reader": ("a:6 d:6", lambda: (Net(overwritten, a=Linear(8, 6), b=Linear(6, 3), c=Linear(8, 6),
        d=Linear(6, 6)), vectors())),
    "in place, a constant": ("a:6", lambda: between(lambda s, h: torch.zeros(24, 6).add_(h).relu_())),
    "in place, an input": ("a:6", lambda: (Net(lambda s, x: s.b(s.a(x).relu() + x.add_(1).sum()), a=Linear(8, 6),
        b=Linear(6, 3)), vectors())),
    "statistics over units": ("a:6", lambda: between(lambda s, h: h / h.std(1, keepdim=True) + h.mean() - h.logsumexp(1,
        keepdim=True) + F.normalize(h, dim=1) - h.max(1, keepdim=True)[0])),
    "dropout": ("a:6", lambda: between(lambda s, h: F.dropout(h.relu(), .5, s.training))),
    # Weights that are not just parameters
    "weight norm": ("0.parametrizations.weight.original1:6 2.parametrizations.weight.original1:5",
        lambda: (Seq(weight_norm(Linear(8, 6)), ReLU(), weight_norm(Linear(6, 5), dim=1), ReLU(), Linear(5, 3)),
        vectors())),
    "weight norm, groups": ("0:2 2.parametrizations.weight.original1:2 2.parametrizations.weight.original1#2:2",
        lambda: (Seq(Conv(3, 4, 3), ReLU(), weight_norm(Conv(4, 4, 1, groups=2)), ReLU(True), Conv(4, 3, 1)),
        images())),
    "spectral norm": ("0.parametrizations.weight.original:6 2.parametrizations.weight.original:5",
        lambda: (Seq(spectral_norm(Linear(8, 6)), ReLU(), spectral_norm(Linear(6, 5)), ReLU(), Linear(5, 3)),
        vectors())),
    "weight standardisation": ("0:6 2:4 4:4 4#2:4", lambda: (Seq(Standardised(3, 6, 3), ReLU(), Standardised(6, 8, 1),
        ReLU(), Standardised(8, 8, 1, groups=2), ReLU(), Conv(8, 3, 1)), images())),
    "low rank": ("u:6 v:4", lambda: (Net(lambda s, x: F.linear(F.linear(x, s.u @ s.v).relu(), s.w), u=parameter(6, 4),
        v=parameter(4, 8), w=parameter(3, 6)), vectors())),
    "tied": ("0:6", lambda: (tied(2, 4, Linear(8, 6), ReLU(), Linear(6, 6), ReLU(), Linear(6, 6), ReLU(), Linear(6, 3)),
        vectors())),
    "tied by memory": ("0:6", lambda: (tied(2, 4, Linear(8, 6), ReLU(), Linear(6, 6), ReLU(), Linear(6, 6), ReLU(),
        Linear(6, 3), share=True), vectors())),
    "tied embedding": ("3:6 1:7", lambda: (tied(0, 4, nn.Embedding(11, 6), Linear(6, 7), ReLU(), Linear(7, 6), Linear(6,
        11, False)), torch.randint(0, 11, (4, 5)))),
    "a layer twice": ("a:6", lambda: between(lambda s, h: s.m(s.m(h).relu()).relu(), m=Linear(6, 6))),
    "a network that repeats": ("w:6", lambda: (Net(recurrent, w=Linear(6, 6), u=Linear(8, 6), v=Linear(6, 3)),
        tokens())),
    "a constant": ("a:6", lambda: between(lambda s, h: (h * s.k).relu(), k=torch.randn(6))),
    # Contractions
    "Gram matrix": ("a:6", lambda: (Net(lambda s, x: s.a(x) @ s.a(x).mT, a=Linear(8, 6)), tokens())),
    "bilinear pooling": ("b:5", lambda: (Net(lambda s, x: s.c((s.a(x)[:, :, None] * s.b(x)[:, None]).flatten(1)),
        a=Linear(8, 4), b=Linear(8, 5), c=Linear(20, 3)), vectors())),
    "experts": ("w:3 w#2:4", lambda: (Net(experts, r=Linear(8, 3), w=parameter(3, 8, 4), v=parameter(3, 4, 2)),
        vectors())),
    "mixer": ("a:6 t:7", lambda: (Net(mixer, a=Linear(8, 6), t=Linear(5, 7), u=Linear(7, 5), o=Linear(6, 3)),
        tokens())),
    # Inputs, outputs and shapes
    "two of each": ("a:6", lambda: (Net(lambda s, x, y: (s.b((s.a(x) + s.c(y)).relu()), [s.a(x).sum(1)]), a=Linear(8,
        6), b=Linear(6, 3), c=Linear(8, 6)), (vectors(), vectors()))),
    "by name": ("a:6", lambda: (Net(lambda s, x, k: s.b(s.a(x).relu() * k), a=Linear(8, 6), b=Linear(6, 3)),
        {"x": vectors(), "k": torch.randn(24, 1)})),
    "results by name": ("a:6", lambda: (Net(seen_by_both, a=Linear(8, 6), b=Linear(6, 3), c=Linear(6, 2)), vectors())),
    "integers": ("0:6", lambda: (Seq(nn.Embedding(9, 6), nn.Flatten(), Linear(18, 3)), torch.randint(0, 9, (6, 3)))),
    "no batch": ("0:6", lambda: (Seq(Linear(8, 6), ReLU(), Linear(6, 3)), torch.randn(8))),
    "an image alone": ("0:6", lambda: (Seq(Conv(3, 6, 3), ReLU(), Conv(6, 3, 1)), torch.randn(3, 6, 6))),
    "one number": ("0:6", lambda: (Seq(Linear(8, 6), ReLU(), Linear(6, 1)), torch.randn(1, 8))),
    "batch last": ("p:6", lambda: (Net(lambda s, x: torch.einsum("oi,ihwb->ohwb", s.q, torch.einsum("oi,i...->o...",
        s.p, x).relu()), p=parameter(6, 3), q=parameter(2, 6)), torch.randn(3, 4, 4, 2))),
    "one hidden unit": ("2:6", lambda: (Seq(Linear(8, 1), ReLU(), Linear(1, 6), nn.Tanh(), Linear(6, 1)), vectors())),
    "no hidden layer": ("", lambda: (Linear(8, 3), vectors())),
    "layers for nothing": ("a:6", lambda: (Net(with_spare, a=Linear(8, 6), b=Linear(6, 3), c=Linear(8, 3), d=Linear(8,
        3)), vectors())),
    "random": ("a:6", lambda: between(lambda s, h: (h + torch.rand(len(h), 1)).relu())),
}


def test_readers_of_changed_memory_read_the_change():
    model = Net(lambda s, x: (h := s.a(x), h.relu_(), h + 1)[2], a=Linear(8, 6))
    graph = torch.export.export(model, (vectors(),), strict=False).graph
    layer, changed, reader = (node for node in graph.nodes if node.op == "call_function")
    reader.args = (layer, *reader.args[1:])
    trace._replace(graph, trace._out_of_place(graph))
    assert changed.target == torch.ops.aten.relu.default and changed.args == (layer,)
    assert reader.args == (changed, 1)


def two_layers(operation):
    """An operation on the units of a layer, which those of the layer before it give a type or a shape only."""
    return Net(lambda s, x: s.c(operation(s.b(h := s.a(x).relu()), h).relu()), a=Linear(8, 8), b=Linear(8, 8),
               c=Linear(8, 3)), vectors()


def in_autocast(s, x):
    with torch.autocast("cpu", torch.bfloat16):
        h = s.a(x)
    return s.b(h.float().relu())


def asserted(assertion):
    return lambda: between(lambda s, h: (assertion(h), h.relu())[1])


# Operations that compute nothing
FOLLOWED |= {name: ("a:6", make) for name, make in {
    "float": lambda: between(lambda s, h: h.float().relu()), "cpu": lambda: between(lambda s, h: h.cpu().relu()),
    "to": lambda: between(lambda s, h: h.to("cpu", torch.float32).relu()),
    "to and back": lambda: between(lambda s, h: h.bfloat16().double().relu().to(s.b.weight.dtype)),
    "type": lambda: between(lambda s, h: h.type(torch.float32).contiguous().relu()),
    "copies": lambda: between(lambda s, h: torch.ops.aten.alias(h).clone().detach().relu()),
    "a fresh copy": lambda: between(lambda s, h: torch.ops.aten.lift_fresh_copy(h).relu()),
    "a layout": lambda: between(lambda s, h: h[:, :, None, None].contiguous(memory_format=torch.channels_last)[
        :, :, 0, 0].relu()),
    "an empty tensor": lambda: between(lambda s, h: torch.empty_like(h).copy_(h).relu()),
    "tile and broadcast": lambda: between(lambda s, h: torch.broadcast_tensors(h.tile(1, 1), h[:1])[0].relu()),
    "no gradients": lambda: between(torch.no_grad()(lambda s, h: h.relu())),
    "autocast": lambda: (Net(in_autocast, a=Linear(8, 6), b=Linear(6, 3)), vectors()),
    "an assertion on shapes": asserted(lambda h: torch._assert(h.shape[1] == 6, "six")),
    "a check": asserted(lambda h: torch._check(h.shape[1] == 6)),
    "an assertion on values": asserted(lambda h: torch._assert_async((h < h.flip(1) + 1e9).all())),
    "an unused comparison": asserted(lambda h: h > h.flip(1)),
    "the shape of a part": lambda: between(lambda s, h: h.relu() + torch.zeros_like(h[:, :1]) + h.flip(1).new_ones(())),
    "the type of a part": lambda: between(lambda s, h: h.relu().type_as(h[:, :2]).to(h.flip(1))),
}.items()}
FOLLOWED |= {f"{name} of another layer": ("a:8 b:8", lambda operation=operation: two_layers(operation))
             for name, operation in {
    "type_as": lambda b, h: b.type_as(h), "to": lambda b, h: b.to(h), "expand_as": lambda b, h: b.expand_as(h),
    "view_as": lambda b, h: b.view_as(h), "zeros_like": lambda b, h: b + torch.zeros_like(h),
    "new_ones": lambda b, h: b * h.new_ones(h.shape), "empty_like": lambda b, h: b * torch.empty_like(h).fill_(2),
    "copy_": lambda b, h: h.clone().copy_(b), "where": lambda b, h: torch.where(torch.ones_like(h).bool(), b, b * b),
    "unused comparison": lambda b, h: (torch._assert_async((b > h).any() | True), b)[1],
}.items()}


def constant(*numbers):
    return lambda s, h: (h * torch.tensor(numbers)).relu()


class Masked(nn.Module):
    """A parametrization with a mask of any type."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight.masked_fill(~self.mask, 0) if self.mask.dtype == torch.bool else weight * self.mask


def parametrized(mask):
    model = Seq(Linear(8, 6), ReLU(), Linear(6, 3))
    register_parametrization(model[0], "weight", Masked(mask))
    return model, vectors()


def pruned(*layers):
    for layer in layers:
        if hasattr(layer, "weight"):
            prune.random_unstructured(layer, "weight", .4)
    return Seq(*layers)


def old_weight_norm(run):
    """Layers whose hook computes a weight and keeps it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = Seq(nn.utils.weight_norm(Linear(8, 6)), ReLU(), nn.utils.weight_norm(Linear(6, 3)))
    if run:
        model(vectors())
    return model, vectors()


def mixed_biases(s, x):
    """The bias of the keys is zero and no parameter, as in BEiT."""
    q, k, v = F.linear(s.i(x), s.w, torch.cat([s.q, s.k, s.v])).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
    return s.o((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2).tanh())


def beit():
    model = Net(mixed_biases, i=Linear(8, 10), w=parameter(36, 10), q=parameter(12), v=parameter(12), o=Linear(12, 3))
    model.register_buffer("k", torch.zeros(12), persistent=False)
    return model, tokens()


HEADS = "i:10 q/0:4 q:3 q/1:4 q/2:4 q/0#2:4 q/1#2:4 q/2#2:4"

FOLLOWED |= {
    # Constants
    "equal numbers": ("a:6", lambda: between(constant(2., 2., 2., 2., 2., 2.))),
    "two kinds of numbers": ("a:3 a#2:3", lambda: between(constant(1., 2., 2., 1., 1., 2.))),
    "one number that differs": ("a:5", lambda: between(constant(1., 1., 1., 2., 1., 1.))),
    "a matrix of ones": ("a:6", lambda: between(lambda s, h: h @ torch.ones(6, 6) + h.relu())),
    "means of two halves": ("a:3 a#2:3", lambda: between(
        lambda s, h: (h.relu() @ (torch.arange(6)[:, None] // 3 == torch.arange(2)).to(h.dtype)), 6, 2)),
    "numbers of blocks": ("a/0:3 a:2 a#2/0:3 a#2:2 a/1:3 a#2/1:3", lambda: between(
        lambda s, h: (h.view(-1, 4, 3) * torch.tensor([1., 2., 1., 2.])[:, None]).softmax(2).flatten(1), 12)),
    "a softmax over blocks with padding": ("a/0:3 a:2 a/1:3", lambda: between(
        lambda s, h: torch.cat([h.view(-1, 2, 3), torch.ones_like(h[:, :2, None])], 2).softmax(2).flatten(1), 6, 8)),
    "numbers and padding": ("a:3 a#2:3 n:2 n#2:2", lambda: (Net(lambda s, x: s.b(s.n((torch.cat([s.a(x).view(-1, 2, 3),
        x.new_zeros(len(x), 2, 2)], 2) + x[:, :2, None]).cos().flatten(1))), a=Linear(8, 6), n=nn.BatchNorm1d(10),
        b=Linear(10, 3)), vectors())),
    "a bias of zeros": (HEADS, beit),
    "weight_norm of old": ("0.weight_v:6", lambda: old_weight_norm(False)),
    "weight_norm of old, after a forward pass": ("0.weight_v:6", lambda: old_weight_norm(True)),
    "a mask of numbers": ("0.parametrizations.weight.original:6", lambda: parametrized(
        (torch.rand(6, 8) < .5).float())),
    "a mask of booleans": ("0.parametrizations.weight.original:6", lambda: parametrized(torch.rand(6, 8) < .5)),
    "pruned": ("0:6 2:5", lambda: (pruned(Linear(8, 6), ReLU(), Linear(6, 5), ReLU(), Linear(5, 3)), vectors())),
    "pruned convolutions": ("0:3 3:3 3#2:3", lambda: (pruned(Conv(3, 6, 3), BN(6), ReLU(), Conv(6, 6, 3, groups=2),
        ReLU(), Conv(6, 3, 1)), images())),
    # Blocks in a fixed order, whose units are exchanged in each block
    "groups of the input": ("0:4 0#2:4 0#3:4", lambda: (Seq(Conv(3, 12, 3, groups=3), ReLU(), Conv(12, 5, 1)),
        images())),
    "groups of the input, twice": ("0:2 0#2:2 0#3:2 3:2 3#2:2 3#3:2", lambda: (Seq(Conv(3, 6, 3, groups=3), BN(6),
        ReLU(), Conv(6, 6, 1, groups=3), ReLU(), Conv(6, 3, 1)), images())),
    "blocks times inputs": ("a:3 a#2:3", lambda: (Net(lambda s, x: s.b((s.a(x).view(-1, 2, 3) * x[:, :2, None]).cos(
        ).flatten(1)), a=Linear(8, 6), b=Linear(6, 3)), vectors())),
    "blocks times numbers": ("a:3 a#2:3", lambda: between(
        lambda s, h: (h.view(-1, 2, 3) * h.new_tensor([1., 2.])[:, None]).cos().flatten(1))),
    "blocks in a sum": ("a:3", lambda: (Net(lambda s, x: s.b((s.a(x).view(-1, 2, 3) * x[:, :2, None]).sum(1).tanh()),
        a=Linear(8, 6), b=Linear(3, 3)), vectors())),
    "blocks in a running sum": ("a:3", lambda: (Net(lambda s, x: s.b((s.a(x).view(-1, 2, 3) * x[:, :2, None]).cumsum(
        1).flatten(1)), a=Linear(8, 6), b=Linear(6, 3)), vectors())),
    "pairs as complex numbers": ("a:3", lambda: between(lambda s, h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 3, 2)) ** 2).flatten(1))),
    # Indices along another axis than that of the units
    "gather tokens": ("a:6", lambda: over_tokens(lambda h: h.gather(1, ORDER[:, :, None].expand(-1, -1, 6)))),
    "take along tokens": ("a:6", lambda: over_tokens(lambda h: torch.take_along_dim(h, ORDER[:, :, None], 1))),
    "the last token": ("a:6", lambda: over_tokens(lambda h: h[torch.arange(3), ORDER[0]])),
    "indices with a gap": ("a:6", lambda: over_tokens(lambda h: h[:, None, :, None][ORDER, :, ORDER].flatten(0, 1))),
    "index_add": ("a:6", lambda: over_tokens(lambda h: torch.zeros_like(h).index_add(1, torch.tensor([0, 0, 1, 1, 2]),
        h))),
    "scatter_add": ("a:6", lambda: over_tokens(lambda h: torch.zeros(3, 5, 6, dtype=h.dtype).scatter_add(
        1, torch.tensor([0, 0, 1, 1, 2])[None, :, None].expand(3, 5, 6), h))),
    "scatter a number": ("a:6", lambda: over_tokens(
        lambda h: h.scatter(1, torch.zeros(3, 1, 6, dtype=torch.long), 2.))),
    "tokens written": ("a:6", lambda: over_tokens(token_sums)),
    "other names of operations": ("a:6", lambda: between(lambda s, h: other_names(h))),
    "an empty part": ("a:6", lambda: between(lambda s, h: torch.cat([h[:, :6].tanh(), h[:, 6:]], 1))),
    "space to channels": ("0:2", lambda: (Seq(Conv(3, 2, 3), ReLU(), nn.PixelUnshuffle(2), Conv(8, 3, 1)), images())),
    "sorted tokens": ("a:6", lambda: over_tokens(lambda h: h.sort(1)[0] + h.topk(3, 1)[0].mean(1, keepdim=True))),
    "the position of the largest token": ("a:6", lambda: over_tokens(
        lambda h: h * (h.argmax(1, keepdim=True) + h.argsort(1)))),
    "running largest": ("a:6", lambda: over_tokens(lambda h: h.cummax(1)[0] + h.logcumsumexp(1))),
    "steps written one by one": ("a:6", lambda: over_tokens(steps)),
    "numbers written where a mask is": ("a:6", lambda: over_tokens(
        lambda h: h.index_put((h < -.5,), torch.tensor(.3).to(h)))),
}
ORDER = torch.tensor([[0, 2, 1], [1, 1, 0], [2, 0, 2]])


def token_sums(h):
    h = h.clone()
    h[:, [0, 2]] = h[:, :2] * h[:, 1:3]
    return h


def other_names(h):
    return torch.multiply(h, h.absolute()).clip(-1, 2).subtract(h.true_divide(2)).square() * (h.greater(0) & h.less(1))


def steps(h):
    """A recurrence over tokens, written into a tensor of zeros."""
    result, state = torch.zeros_like(h), torch.zeros_like(h[:, 0])
    for i in range(h.shape[1]):
        state = (state + h[:, i]).tanh()
        result[:, i] = state
    return result


def over_tokens(operation):
    """An operation on the units of tokens."""
    return Net(lambda s, x: s.b(operation(s.a(x)).tanh()), a=Linear(8, 6), b=Linear(6, 3)), tokens()


def recurrences():
    """Recurrent layers of all kinds: (name, expected groups, network)."""
    for kind in ("LSTM", "GRU", "RNN"):
        for name, units, options in (
                ("", "l0:5", {}), (" without biases", "l0:5", {"bias": False}),
                (" of two layers", "l0:5 l1:5", {"num_layers": 2}),
                (" in both directions", "l0:5 l0_reverse:5", {"bidirectional": True, "batch_first": True}),
                (" of two layers in both directions", "l0:5 l0_reverse:5 l1:5 l1_reverse:5",
                 {"num_layers": 2, "bidirectional": True})):
            layer = getattr(nn, kind)(6, 5, **options)
            model = Net(lambda s, x: s.o(s.r(s.i(x).tanh())[0]), i=Linear(8, 6), r=layer,
                        o=Linear(5 * (1 + layer.bidirectional), 3))
            yield f"{kind}{name}", " ".join(["i:6", *(f"r.weight_ih_{unit}" for unit in units.split())]), model
        last = Net(lambda s, x: s.o(pytree.tree_leaves(s.r(x)[1])[0][-1]), r=getattr(nn, kind)(8, 5, 2), o=Linear(5, 3))
        yield f"the last state of {kind}", "r.weight_ih_l0:5 r.weight_ih_l1:5", last
        cell = getattr(nn, f"{kind}Cell")(8, 6)
        yield f"{kind}Cell", "r.weight_ih:6", Net(lambda s, x: s.o(cells(s.r, x)), r=cell, o=Linear(6, 3))
    yield "an LSTM with projections", "r.weight_ih_l0:5 r.weight_hr_l0:4", Net(
        lambda s, x: s.o(s.r(x)[0]), r=nn.LSTM(8, 5, proj_size=4), o=Linear(4, 3))
    yield "states from another LSTM", "e.weight_ih_l0:5", Net(
        lambda s, x: s.o(s.d(x, s.e(x)[1])[0]), e=nn.LSTM(8, 5), d=nn.LSTM(8, 5), o=Linear(5, 3))
    yield "states that are learned", "r.weight_ih_l0:5", Net(
        lambda s, x: s.o(s.r(x, s.h)[0]), r=nn.GRU(8, 5), h=parameter(1, 5, 5), o=Linear(5, 3))


def cells(cell, x):
    """The state of a recurrent cell after all tokens."""
    state = None
    for step in x.unbind(1):
        state = cell(step, state)
    return pytree.tree_leaves(state)[0]


FOLLOWED |= {name: (expected, lambda model=model: (model, tokens())) for name, expected, model in recurrences()}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_is_followed(name):
    expected, make = FOLLOWED[name]
    assert sizes(assert_kept(*make())) == expected


class Attention(nn.Module):
    """Attention by hand, in the ways that people write it."""

    def __init__(self, kind="", heads=3, kv=3):
        super().__init__()
        self.kind, self.heads, self.kv = kind, heads, kv
        self.i, self.o, self.p = Linear(8, 10), Linear(10, 3), Linear(12, 10)
        self.q, self.k, self.v = (Linear(10, 4 * n, bias=b) for n, b in ((heads, True), (kv, False), (kv, True)))
        if kind == "position":
            self.bias = nn.Parameter(torch.randn(9, heads))
            self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5) + 4)
        if kind == "cosine":
            self.temperature = nn.Parameter(torch.randn(heads, 1, 1))
        if kind == "norm":
            self.nq, self.nk = nn.LayerNorm(4), nn.RMSNorm(4)

    def forward(self, x):
        h = self.i(x)
        q, k, v = (layer(h).view(*h.shape[:2], -1, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "repeated":
            k, v = (t.repeat_interleave(self.heads // self.kv, 1) for t in (k, v))
        if self.kind == "expanded":
            k, v = (t[:, :, None].expand(-1, -1, self.heads // self.kv, -1, -1).flatten(1, 2) for t in (k, v))
        if self.kind == "norm":
            q, k = self.nq(q), self.nk(k)
        if self.kind == "rotary":
            angle = torch.arange(5.)[:, None] * torch.tensor([1., .3, 1., .3])
            q, k = (t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin() for t in (q, k))
        if self.kind == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1) * self.temperature.exp()
        scores = torch.einsum("...id,...jd->...ij", q, k) if self.kind == "einsum" else q @ k.mT / 2
        if self.kind == "position":
            scores = scores + self.bias[self.index].permute(2, 0, 1)
        if self.kind == "causal":
            scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
        y = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v) if self.kind == "einsum" else \
            (scores.softmax(-1) @ v).transpose(1, 2)
        return self.o(h + self.p(y.reshape(*h.shape[:2], 12)))



@pytest.mark.parametrize("options, expected", [
    ({}, HEADS), ({"kind": "einsum"}, HEADS), ({"kind": "cosine"}, HEADS), ({"kind": "position"}, HEADS),
    ({"kind": "causal"}, HEADS), ({"kind": "rotary"}, "i:10 q:3 q/0:4 q/1:4 q/2:4"),  # those of the values
    ({"kind": "repeated", "kv": 1}, "i:10 q:4 v:4"), ({"kind": "expanded", "kv": 1}, "i:10 q:4 v:4"),
    ({"kind": "norm"}, "i:10 q:4 v:4 v#2:4 v#3:4"),
], ids=lambda value: value.get("kind", "plain") if isinstance(value, dict) else "")
def test_attention_by_hand(options, expected):
    groups = assert_kept(Attention(**options), tokens())
    assert sizes(groups) == expected


def self_attention(s, x):
    h = s.i(x) if s.a.batch_first else s.i(x).transpose(0, 1)
    y = s.a(h, h, h, need_weights=False)[0]
    return s.o((y if s.a.batch_first else y.transpose(0, 1)).tanh())


def cross_attention(s, x, y):
    return s.o(s.a(s.q(x), s.k(y).tanh(), s.v(y).tanh())[0].tanh())


def masked_attention(s, x):
    mask, h = torch.ones(5, 5, dtype=torch.bool).triu(1), s.i(x)
    return s.o(s.a(h, h, h, need_weights=False, attn_mask=mask, is_causal=True)[0].tanh())


def mha(forward=self_attention, **options):
    return Net(forward, i=Linear(8, 12), a=nn.MultiheadAttention(12, 3, **{"batch_first": True} | options),
               o=Linear(12, 3))


QKV = "i:12 a.in_proj/0:4 a.in_proj:3 a.in_proj/1:4 a.in_proj/2:4 a.in_proj/0#2:4 a.in_proj/1#2:4 a.in_proj/2#2:4 " \
    "a.out_proj:12"


@pytest.mark.parametrize("make, expected", [
    (lambda: (mha(), tokens()), QKV), (lambda: (mha(batch_first=False), tokens()), QKV),
    (lambda: (mha(masked_attention), tokens()), QKV),
    (lambda: (mha(add_bias_kv=True, add_zero_attn=True), tokens()), QKV),
    (lambda: (Net(cross_attention, q=Linear(8, 12), k=Linear(8, 10), v=Linear(8, 6), a=nn.MultiheadAttention(
        12, 3, kdim=10, vdim=6, batch_first=True), o=Linear(12, 3)), (tokens(), tokens(4))),
     QKV.replace("i:12", "q:12 k:10 v:6")),
    (lambda: (Net(lambda s, x: s.o(s.t(s.i(x))), i=Linear(8, 12), o=Linear(12, 3), t=nn.TransformerEncoder(
        nn.TransformerEncoderLayer(12, 3, 10, batch_first=True, norm_first=True), 1, enable_nested_tensor=False)),
        tokens()),
     QKV.replace("a.in", "t.layers.0.self_attn.in").replace("a.out_proj:12", "t.layers.0.linear1:10")),
    (lambda: (Net(lambda s, x, y: s.o(s.t(s.i(x), s.j(y))), i=Linear(8, 8), j=Linear(8, 8), o=Linear(8, 3),
                  t=nn.TransformerDecoderLayer(8, 2, 10, batch_first=True)), (tokens(), tokens(4))),
     "i:8 t.self_attn.in_proj/0:4 t.self_attn.in_proj:2 t.self_attn.in_proj/1:4 t.self_attn.in_proj/0#2:4 "
     "t.self_attn.in_proj/1#2:4 t.multihead_attn.in_proj/0:4 t.multihead_attn.in_proj:2 t.multihead_attn.in_proj/1:4 "
     "t.multihead_attn.in_proj/0#2:4 t.multihead_attn.in_proj/1#2:4 t.linear1:10"),
], ids=["self", "sequence first", "causal", "bias_kv", "cross", "encoder", "decoder"])
def test_attention_of_torch(make, expected):
    model, x = make()
    # What a key's bias adds to all scores of a query, softmax takes away; the rest of this tensor is seen to matter.
    assert sizes(assert_kept(model, x, idle={name for name in model.state_dict() if name.endswith("in_proj_bias")})) \
        == expected


# What must stay, because the order of the units matters or because nobody knows: for each network what is found all the
# same, and the reason that is given.
FOLLOWED |= {
    "patches": ("a:5", lambda: (Net(lambda s, x: s.b(F.unfold(s.a(x), 3, 1, 1, 2).mT).mean(1), a=Conv(3, 5, 1),
        b=Linear(45, 3)), images())),
    "a convolution by patches": ("a:5 w:4", lambda: (Net(lambda s, x: s.b((s.w @ F.unfold(s.a(x), 3)).relu().mT).mean(
        1), a=Conv(3, 5, 1), w=parameter(4, 45), b=Linear(4, 3)), images())),
    "patches of one image": ("a:5", lambda: (Net(lambda s, x: s.b(F.unfold(s.a(x), 2, stride=2).mT), a=Conv(3, 5, 1),
        b=Linear(20, 3)), images()[0])),
    "images of patches": ("a:5", lambda: (Net(lambda s, x: s.b(F.fold(s.a(x).view(-1, 20, 4), (4, 4), 2,
        stride=2).relu()), a=Linear(8, 80), b=Conv(5, 3, 1)), vectors())),
    "windows": ("a:5", lambda: (Net(lambda s, x: s.b(s.a(x).unfold(2, 3, 2).amax(3).mT), a=nn.Conv1d(3, 5, 1),
        b=Linear(5, 3)), images(3, 9))),
    "Fourier transform of tokens": ("a:6", lambda: (Net(lambda s, x: s.b(torch.fft.fft(s.a(x), dim=1).real),
        a=Linear(8, 6), b=Linear(6, 3)), tokens())),
    "Fourier transform of images": ("a:5", lambda: (Net(lambda s, x: s.b(torch.fft.irfft2(torch.fft.rfft2(s.a(
        x)) * s.k).relu()), a=Conv(3, 5, 1), k=nn.Parameter(torch.randn(5, 1, 1, dtype=torch.cfloat)), b=Conv(5, 3, 1)),
        images())),
    "shifted spectrum": ("a:5", lambda: (Net(lambda s, x: s.b(torch.fft.fftshift(torch.fft.fftn(s.a(x), dim=(2, 3)),
        dim=(2, 3)).abs()), a=Conv(3, 5, 1), b=Conv(5, 3, 1)), images())),
    "distances to centres": ("a:6 c:4", lambda: between(lambda s, h: (-torch.cdist(h, s.c)).exp(), 6, 4,
        c=parameter(4, 6))),
    "distances of tokens": ("a:6", lambda: (Net(lambda s, x: torch.cdist(s.a(x), s.c(x).cos(), p=1), a=Linear(8, 6),
        c=Linear(8, 6)), tokens())),
    "distances in pairs": ("a:6", lambda: (Net(lambda s, x: F.pairwise_distance(s.a(x), s.c(x).cos()), a=Linear(8, 6),
        c=Linear(8, 6)), vectors())),
    "cosines": ("a:6", lambda: (Net(lambda s, x: F.cosine_similarity(s.a(x)[:, None], s.c(x).cos()[None], dim=2),
        a=Linear(8, 6), c=Linear(8, 6)), vectors())),
    "places in an image": ("a:5 h:7", lambda: (Net(lambda s, x: s.b(F.grid_sample(
        s.a(x).relu(), s.g(s.h(x).relu()).movedim(1, -1).tanh(), align_corners=False)), a=Conv(3, 5, 1),
        h=Conv(3, 7, 1), g=Conv(7, 2, 1), b=Conv(5, 3, 1)), images())),
    "places in a volume": ("a:5", lambda: (Net(lambda s, x: s.b(F.grid_sample(
        s.a(x).relu(), x[:, :3].movedim(1, -1).sin(), align_corners=True)), a=nn.Conv3d(3, 5, 1),
        b=nn.Conv3d(5, 3, 1)), images(3, 4, 4, 4))),
    **{f"bags of words, {mode}": ("e:6", lambda mode=mode: (Net(
        lambda s, x: s.b(s.e(x).relu()), e=nn.EmbeddingBag(10, 6, mode=mode), b=Linear(6, 3)),
        torch.randint(0, 10, (4, 5)))) for mode in ("mean", "sum", "max")},
    "weights of a bag": ("e:6", lambda: (Net(lambda s, x: s.b(F.embedding_bag(x, s.e.weight, mode="sum",
        per_sample_weights=s.w(x)[..., 0].sigmoid())), e=nn.Embedding(10, 6), w=nn.Embedding(10, 1), b=Linear(6, 3)),
        torch.randint(0, 10, (4, 5)))),
    "units as weights of a bag": ("e:5", lambda: (Net(lambda s, x: s.b(F.embedding_bag(
        torch.arange(6).repeat(len(x), 1), s.e.weight, mode="sum", per_sample_weights=s.a(x).relu())), a=Linear(8, 6),
        e=nn.Embedding(6, 5), b=Linear(5, 3)), vectors())),
    "keys for several queries": ("q/0:3 q:2 q/1:3 q/0#2:3 q/1#2:3", lambda: (Net(lambda s, x: s.o(
        F.scaled_dot_product_attention(*(layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (s.q, s.k, s.v)),
                                       enable_gqa=True).transpose(1, 2).flatten(2)),
        q=Linear(8, 12), k=Linear(8, 6, bias=False), v=Linear(8, 6), o=Linear(12, 3)), tokens())),
    "summed to a size": ("a:6", lambda: between(lambda s, h: h.relu().view(-1, 3, 6).sum_to_size(1, 3, 6))),
    "summed to fewer axes": ("a:6", lambda: between(lambda s, h: h.cos().view(-1, 3, 6).sum_to_size(3, 6))),
    "grouped experts": ("e:8 w:8 v:8", lambda: (Net(grouped_experts, e=Linear(8, 8), g=Linear(8, 3),
        w=parameter(3, 8, 8), v=parameter(3, 8, 8), o=Linear(8, 3)).bfloat16(), vectors().bfloat16())),
    "packed experts by bmm": ("e:6 w:4 w#2:5 v:7", lambda: (Net(packed_experts, e=Linear(8, 6), g=Linear(8, 4),
        w=parameter(4, 6, 5), v=parameter(4, 5, 7), o=Linear(7, 3)), vectors())),
}
LEFT_FIXED = {
    "Fourier transform of units": ("", "their order matters to fft_fft", lambda: between(
        lambda s, h: torch.fft.fft(h).abs())),
    "real Fourier transform of units": ("", "their order matters to fft_rfft", lambda: between(
        lambda s, h: torch.fft.rfft(h).abs(), 6, 4)),
    "roll": ("", "their order matters to roll", lambda: between(lambda s, h: h.roll(1, 1))),
    "flip": ("", "their order matters to flip", lambda: between(lambda s, h: h.flip(1))),
    "cumsum": ("", "their order matters to cumsum", lambda: between(lambda s, h: h.cumsum(1))),
    "an index": ("", "their order matters to index", lambda: between(lambda s, h: h[:, [1, 0, 3, 2, 5, 4]])),
    "a table as index": ("", "their order matters to index", lambda: between(lambda s, h: h[:, s.k], k=torch.tensor([5,
        0, 1, 2, 3, 4]))),
    "sort": ("", "their order matters to sort", lambda: between(lambda s, h: h.sort(1)[0])),
    "topk": ("", "their order matters to topk", lambda: between(lambda s, h: h.topk(6, 1)[0])),
    "argmax": ("", "their order matters to argmax", lambda: between(lambda s, h: h * h.argmax(1, keepdim=True))),
    "where the largest is": ("", "max is not supported", lambda: between(lambda s, h: h * h.max(1, keepdim=True)[1])),
    "gather": ("", "their order matters to gather", lambda: between(lambda s, h: h.gather(1, torch.arange(6).expand(
        len(h), 6)))),
    "scatter": ("", "their order matters to scatter", lambda: between(lambda s, h: torch.zeros_like(h).scatter(
        1, torch.arange(6).expand(len(h), 6), h))),
    "sorted embeddings": ("", "their order matters to sort", lambda: (Net(lambda s, x: s.b(s.e(x).sort(-1)[0] * s.w),
        e=nn.Embedding(9, 6), w=parameter(6), b=Linear(6, 3)), torch.randint(0, 9, (4, 5)))),
    "unfold": ("", "their order matters to unfold", lambda: between(lambda s, h: h.unfold(1, 2, 2).flatten(1))),
    "pooling over units": ("", "their order matters to avg_pool", lambda: between(lambda s, h: F.avg_pool1d(h[:, None],
        2)[:, 0], 6, 3)),
    "convolution over units": ("", "their order matters to conv1d", lambda: between(lambda s, h: s.c(h[:, None])[:, 0],
        6, 4, c=nn.Conv1d(1, 1, 3))),
    "a constant matrix": ("", "they meet", lambda: between(lambda s, h: h @ s.k, k=torch.randn(6, 6))),
    "a constant of integers": ("", "they meet", lambda: between(lambda s, h: h * s.k, k=torch.arange(6))),
    "the input itself": ("", "they meet", lambda: (Net(lambda s, x: s.b(x + s.a(x).relu()), a=Linear(8, 8), b=Linear(8,
        3)), vectors())),
    "the output itself": ("", "they reach the network's output", lambda: (Net(lambda s, x: (s.a(x), s.b(s.a(x))),
        a=Linear(8, 6), b=Linear(6, 3)), vectors())),
    "Gram matrix of channels": ("", "their order matters to", lambda: (Net(lambda s,
        x: s.b((s.a(x).mT @ s.a(x)).flatten(1)), a=Linear(8, 4), b=Linear(16, 3)), tokens())),
    "units that are their own means": ("", "no other unit has the same surroundings",
        lambda: between(lambda s, h: h + torch.cat([h.view(-1, 3, 2).mean(2)] * 2, 1))),
    "a part added to all": ("a:5", "no other unit", lambda: between(lambda s, h: h + h[:, :1])),
    "rows and columns": ("a:3", "blocks of units cross each other", lambda: between(
        lambda s, h: ((h.view(-1, 3, 2) + s.r) * s.c).tanh().flatten(1), r=parameter(3, 1), c=parameter(2))),
    "a branch": ("", "cond is not supported", lambda: between(lambda s, h: torch.cond(h.sum() > 0, lambda h: h.relu(),
        lambda h: h.cos(), (h,)))),
    "orthogonal weights": ("", "their order matters to tril", lambda: (Seq(Linear(8, 6), ReLU(), orthogonal(Linear(6,
        6)), ReLU(), Linear(6, 3)), vectors())),
    "tokens": ("a:6", "they meet the network's input", lambda: (Net(lambda s, x: s.b((s.a(x) + s.p).relu()), a=Linear(8,
        6), b=Linear(6, 3), p=parameter(5, 6)), tokens())),
}


def beside_parts(s, x):
    parts = torch.cat([s.g(x).view(-1, 2, 3), x.new_zeros(len(x), 2, 3)], 1)
    return s.b(((s.a(x)[:, :, None] + parts).flatten(1) * s.p).relu())


LEFT_FIXED |= {
    "constants next to parts": ("", "add is not supported", lambda: (Net(
        beside_parts, a=Linear(8, 4), g=Linear(8, 6), p=parameter(12), b=Linear(12, 3)), vectors())),
}


@pytest.mark.parametrize("name", LEFT_FIXED)
def test_what_is_left_fixed_and_why(name):
    expected, why, make = LEFT_FIXED[name]
    groups = assert_kept(*make())
    assert sizes(groups) == expected
    assert any(why in fixed.why for fixed in groups.fixed), groups.describe()
    assert why in groups.describe()


@pytest.mark.parametrize("register", [lambda net, k: net.register_buffer("k", k, persistent=False),
                                      lambda net, k: setattr(net, "k", k)], ids=["a passing buffer", "an attribute"])
def test_constants_that_no_state_dict_holds_fix_what_they_meet(register):
    net, x = between(lambda s, h: (h * s.k).relu())
    register(net, torch.randn(6))
    assert sizes(assert_kept(net, x)) == ""


def test_a_constant_written_into_another_is_known():
    """torch.export then gives ``copy`` no tensor to overwrite, with which torch 2.13 would crash."""
    def forward(s, h):
        scales = torch.zeros(2, 3)
        scales[:, 1] = torch.arange(1, 3)  # 1 and 2
        return h.relu() * scales[1, 1]

    assert sizes(assert_kept(*between(forward))) == "a:6"


def test_tensors_that_share_memory_in_part_are_fixed():
    memory = torch.randn(9)
    net, x = between(lambda s, h: (h * s.k).relu() + s.m, k=nn.Parameter(memory[:6]), m=nn.Parameter(memory[3:]))
    groups = permutation_groups(net, x)
    assert sizes(groups) == "" and "their memory belongs to another tensor too" in groups.describe()


def test_a_tensor_used_with_and_without_groups_is_fixed():
    net = Net(lambda s, x: s.b(s.a(x) + F.conv2d(s.a(x)[:, :2], s.a.weight.repeat(1, 1, 1, 1)[:4, :2]).repeat(
        1, 2, 1, 1)[:, :4]), a=Conv(4, 4, 1, groups=2), b=Conv(4, 3, 1))
    groups = assert_kept(net, images(4, 3, 3))
    assert sizes(groups) == "a:2" and "their tensor is used in two forms" in groups.describe()


def test_every_index_of_every_parameter_is_in_a_group_or_fixed_but_for_kernels():
    model, x = Seq(Conv(3, 4, 3), ReLU(), Conv(4, 6, 3, groups=2), nn.Flatten(), Linear(24, 3)), images()
    groups = permutation_groups(model, x)
    counted = {}
    for group in groups.values():
        for entry in group.entries:
            if group.within is None:
                n = group.size * (1 if entry.positions is None else entry.positions.shape[1])
                counted[entry.tensor, entry.axis] = counted.get((entry.tensor, entry.axis), 0) + n
    for fixed in groups.fixed:
        counted[fixed.tensor, fixed.axis] = counted.get((fixed.tensor, fixed.axis), 0) + fixed.count
    expected = {(name, axis): n for name, tensor in model.state_dict().items() for axis, n in
                enumerate(tensor.shape[:2])}
    assert counted.pop(("2.weight", 1), 0) == 0  # it travels with the rows of its group
    assert counted == {key: n for key, n in expected.items() if key != ("2.weight", 1)}


# Known architectures, to the last entry


def places(group):
    return " ".join(f"{entry.tensor}[{entry.axis}]" for entry in group.entries)


def norm(name):
    return " ".join(f"{name}.{part}[0]" for part in ("weight", "bias", "running_mean", "running_var"))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_groups_of_an_mlp(layers):
    groups = permutation_groups(build_model("mlp", (1, 8, 8), 10, width=0.25, depth=layers), torch.zeros(2, 1, 8, 8))
    names = [f"fc{i}" for i in range(1, layers + 1)]
    assert {name: places(group) for name, group in groups.items()} == {
        name: f"{name}.weight[0] {name}.bias[0] {after}.weight[1]" for name, after in zip(names, [*names[1:], "head"])}
    for group, after in zip(groups.values(), [*names[1:], "head"]):
        assert group.size == 32 and group.within is None
        assert all(entry.positions is None and entry.rows is None for entry in group.entries)
        assert [tuple(tap) for tap in group.taps] == [(after, "input", 1, None)]


def test_a_flatten_gives_each_channel_a_block():
    groups = permutation_groups(build_model("lenet5", (1, 28, 28), 10), torch.zeros(2, 1, 28, 28))
    assert sizes(groups) == "conv1:6 conv2:16 fc1:120 fc2:84"
    assert places(groups["conv2"]) == "conv2.weight[0] conv2.bias[0] fc1.weight[1]"
    blocks = [list(range(25 * c, 25 * c + 25)) for c in range(16)]
    (tap,) = groups["conv2"].taps
    assert groups["conv2"].entries[-1].positions.tolist() == blocks == tap.positions.tolist()
    assert tap[:3] == ("fc1", "input", 1)


def test_groups_of_vgg11_hold_the_statistics_of_batch_norm():
    groups = permutation_groups(build_model("vgg11", (3, 32, 32), 10, width=0.05, batch_norm=True),
                                torch.zeros(1, 3, 32, 32))
    assert list(groups) == [f"conv{i}" for i in range(1, 9)]
    for i, after in zip(range(1, 9), [*(f"conv{i}" for i in range(2, 9)), "head"]):
        assert places(groups[f"conv{i}"]) == f"conv{i}.weight[0] conv{i}.bias[0] {norm(f'norm{i}')} {after}.weight[1]"
        assert [tap[:3] for tap in groups[f"conv{i}"].taps] == [(after, "input", 1)]


def test_groups_of_a_residual_network_with_projections():
    groups = assert_kept(build_model("resnet8", (3, 8, 8), 4, width=.25), images(3, 8, 8))
    assert sizes(groups) == ("conv1:4 stage1.block1.conv1:4 stage2.block1.conv1:8 stage2.block1.conv2:8 "
                             "stage3.block1.conv1:16 stage3.block1.conv2:16")
    b1, b2, b3 = (f"stage{i}.block1" for i in (1, 2, 3))
    assert set(places(groups["conv1"]).split()) == set(
        f"conv1.weight[0] {norm('norm1')} {b1}.conv1.weight[1] {b1}.conv2.weight[0] {norm(f'{b1}.norm2')} "
        f"{b2}.conv1.weight[1] {b2}.shortcut.conv.weight[1]".split())
    assert set(places(groups[f"{b2}.conv2"]).split()) == set(
        f"{b2}.conv2.weight[0] {norm(f'{b2}.norm2')} {b2}.shortcut.conv.weight[0] {norm(f'{b2}.shortcut.norm')} "
        f"{b3}.conv1.weight[1] {b3}.shortcut.conv.weight[1]".split())
    assert places(groups[f"{b1}.conv1"]) == f"{b1}.conv1.weight[0] {norm(f'{b1}.norm1')} {b1}.conv2.weight[1]"
    assert places(groups[f"{b3}.conv2"]).endswith("head.weight[1]")
    assert [tap.module for tap in groups["conv1"].taps] == [f"{b1}.conv1", f"{b2}.conv1"]  # each activation once


def test_groups_of_a_residual_network_with_padded_shortcuts():
    groups = assert_kept(build_model("resnet8", (3, 8, 8), 4, width=.25, shortcut="padded"), images(3, 8, 8))
    assert sizes(groups) == ("conv1:4 stage1.block1.conv1:4 stage2.block1.conv1:8 stage2.block1.conv2:4 "
                             "stage3.block1.conv1:16 stage3.block1.conv2:8")
    # Channels 2..5 of the second stage are those of the first, and channels 4..11 of the third those of the second.
    found = {(name, entry.tensor): sorted(entry.positions.flatten().tolist()) for name, group in groups.items()
             for entry in group.entries if entry.positions is not None}
    assert found["conv1", "stage2.block1.conv2.weight"] == [2, 3, 4, 5]
    assert found["conv1", "head.weight"] == [6, 7, 8, 9]
    assert found["stage2.block1.conv2", "head.weight"] == [4, 5, 10, 11]
    assert found["stage3.block1.conv2", "head.weight"] == [0, 1, 2, 3, 12, 13, 14, 15]


def test_groups_of_a_convolution_with_groups():
    model = Seq(Conv(3, 8, 3), ReLU(), Conv(8, 8, 1, groups=2), ReLU(), Conv(8, 3, 1))
    groups = permutation_groups(model, images())
    assert {name: group.within for name, group in groups.items()} == {
        "0": None, "0/0": ("0", 0), "0/1": ("0", 1), "0/0#2": ("0", 0), "0/1#2": ("0", 1)}
    assert places(groups["0"]) == "0.weight[0] 0.bias[0] 2.weight[0] 2.bias[0] 4.weight[1]"  # columns: with rows
    assert groups["0"].entries[0].positions.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for name, start in (("0/0", 0), ("0/1", 4)):
        assert places(groups[name]) == "0.weight[0] 0.bias[0] 2.weight[1]"
        assert groups[name].entries[0].positions.tolist() == [[start + i] for i in range(4)]
        assert groups[name].entries[-1] == Entry("2.weight", 1, None, (start, start + 4))
        assert places(groups[f"{name}#2"]) == "2.weight[0] 2.bias[0] 4.weight[1]"
        assert [tap[:3] for tap in groups[name].taps] == [("2", "input", 1)]


def test_groups_of_a_transformer():
    layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True)
    groups = permutation_groups(Net(lambda s, x: s.o(s.t(s.i(x))), i=Linear(8, 12), t=layer, o=Linear(12, 3)), tokens())
    heads = groups["t.self_attn.in_proj"]
    assert groups["i"].size == 12 and set(places(groups["i"]).split()) == set(
        "i.weight[0] i.bias[0] t.self_attn.in_proj_weight[1] t.self_attn.out_proj.weight[0] "
        "t.self_attn.out_proj.bias[0] t.norm1.weight[0] t.norm1.bias[0] t.linear1.weight[1] t.linear2.weight[0] "
        "t.linear2.bias[0] t.norm2.weight[0] "
        "t.norm2.bias[0] o.weight[1]".split())
    assert heads.size == 3 and places(heads) == (
        "t.self_attn.in_proj_weight[0] t.self_attn.in_proj_bias[0] t.self_attn.out_proj.weight[1]")
    for i in range(3):
        query, value = (groups[f"t.self_attn.in_proj/{i}{n}"] for n in ("", "#2"))
        assert query.within == value.within == ("t.self_attn.in_proj", i)
        dims = [4 * i + d for d in range(4)]
        assert query.entries[0].positions.tolist() == [[d, 12 + d] for d in dims]  # of the query, and of the key
        assert value.entries[0].positions.tolist() == [[24 + d] for d in dims]
        assert value.entries[-1].positions.tolist() == [[d] for d in dims]
        assert sorted(heads.entries[0].positions[i].tolist()) == sorted([*dims, *(12 + d for d in dims),
                                                                         *(24 + d for d in dims)])
    assert places(groups["t.linear1"]) == "t.linear1.weight[0] t.linear1.bias[0] t.linear2.weight[1]"


def test_taps_of_a_layer_that_is_called_twice_are_left_out():
    groups = permutation_groups(*between(lambda s, h: s.m(s.m(h).relu()).relu(), m=Linear(6, 6)))
    assert [tap.module for tap in groups["a"].taps] == ["b"]


# The model, and what surrounds it


def small():
    return Seq(Conv(1, 3, 3), BN(3), nn.Dropout(), nn.Flatten(), Linear(108, 2)), torch.ones(2, 1, 8, 8)


def test_tracing_leaves_the_model_and_the_random_state_alone():
    model, x = small()
    model[2].eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    permutation_groups(model, x, check=True)
    assert [module.training for module in model] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled() == fast and torch.is_grad_enabled()


@pytest.mark.parametrize("change", [
    lambda m: m.eval(), lambda m: m.train(), lambda m: m.requires_grad_(False), lambda m: m.bfloat16(),
    lambda m: m.double(),
    lambda m: m.to("meta"),
], ids=["eval", "train", "frozen", "bfloat16", "float64", "meta"])
def test_the_state_of_a_model_does_not_matter(change):
    model, x = Seq(Linear(6, 6), ReLU(), nn.Dropout(), Linear(6, 6), nn.BatchNorm1d(6), Linear(6, 6)), vectors(6)
    expected = permutation_groups(model, x)
    model = change(model)
    weight = model[0].weight
    groups = permutation_groups(model, x.to(weight.device, weight.dtype))
    assert sizes(groups) == "0:6 3:6" and groups == expected and groups.fixed == expected.fixed


def test_wrappers_keep_their_names():
    model = Seq(Linear(8, 6), ReLU(), Linear(6, 3))
    assert places(permutation_groups(torch.compile(model),
                                     vectors())["_orig_mod.0"]).startswith("_orig_mod.0.weight[0]")
    assert places(permutation_groups(nn.DataParallel(model), vectors())["module.0"]).startswith("module.0.weight[0]")


def test_tracing_twice_gives_the_same():
    model, x = Attention(), tokens()
    one, two = (permutation_groups(model, x) for _ in range(2))
    assert one.describe() == two.describe() and str(dict(one)) == str(dict(two)) and one.fixed == two.fixed


SCRIPT = """
import torch
from torch import nn
from permask_core.matching import permutation_groups
model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), nn.Linear(8, 4))
groups = permutation_groups(model, torch.zeros(2, 3, 8))
print(dict(groups), groups.fixed)
"""


def test_groups_are_the_same_in_every_process():
    found = {subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, text=True,
                            capture_output=True, check=True).stdout for seed in ("1", "77")}
    assert len(found) == 1 and "self_attn" in found.pop()


def test_only_shapes_matter():
    model, x = Seq(Conv(3, 4, 3), ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(4, 2)), images()
    one, two = (permutation_groups(model, batch) for batch in (x, torch.full((1, 3, 9, 7), float("nan"))))
    assert one == two and sizes(one) == "0:4"


def test_outputs_can_be_chosen():
    model, x = Net(lambda s, x: {"hidden": (h := s.a(x).relu()), "y": [s.b(h), s.c(h)]}, a=Linear(8, 6), b=Linear(6, 3),
                   c=Linear(6, 4)), vectors()
    assert sizes(permutation_groups(model, x)) == ""
    for outputs, expected in ((lambda result: result["y"], "a:6"), (lambda result: result["y"][0], "a:6 c:4"),
                              (lambda result: result["hidden"], "b:3 c:4")):
        groups = permutation_groups(model, x, check=True, outputs=outputs)
        assert sizes(groups) == expected
    groups = permutation_groups(model, x, outputs=lambda result: result["y"][0])
    with pytest.raises(ValueError, match="permuting group 'c'"):
        check_function(groups, model, x)
    assert check_function(groups, model, x, outputs=lambda result: result["y"][0]) < 1e-12


# What cannot be traced


def packed(s, x, lengths):
    tokens = rnn.pack_padded_sequence(x, lengths, batch_first=True)
    return s.o(rnn.pad_packed_sequence(s.r(tokens)[0], batch_first=True)[0])


@pytest.mark.parametrize("make, message", [
    (lambda: between(lambda s, h: h.relu() if h.sum() > 0 else h), "h.relu() if h.sum() > 0 else h"),
    (lambda: between(lambda s, h: h * float(h.sum())), "Net cannot be traced by torch.export"),
    (lambda: between(lambda s, h: h * h[h > 0].sum()), "index gives a shape that depends on values"),
    (lambda: between(lambda s, h: h * len(h.unique())), "cannot be traced"),
    (lambda: between(lambda s, h: h * torch.from_numpy(h.detach().numpy())), ".numpy() is not supported"),
    (lambda: (Seq(Linear(8, 3)), torch.ones(2, 7)), "Sequential cannot be traced by torch.export"),
    (lambda: (Seq(Linear(8, 3)), "text"), "must be Tensor, not str"),
    (lambda: (Seq(Linear(8, 3)), (torch.ones(2, 8),) * 2), "Sequential cannot be traced"),
    (lambda: (Seq(Linear(8, 3)), {"y": torch.ones(2, 8)}), "Sequential cannot be traced"),
    (lambda: (Net(lambda s, x: s.missing(x)), vectors()), "'Net' object has no attribute 'missing'"),
    (lambda: between(lambda s, h: int("too long a number " * 300)), "invalid literal for int() with base 10"),
    (lambda: (Net(packed, r=nn.LSTM(8, 5, batch_first=True), o=Linear(5, 3)), (tokens(), torch.tensor([5, 3, 2]))),
     "a PackedSequence depend on values: expected recurrent layers that read the padded tensor"),
    (lambda: (Net(lambda s, x: s.o(s.r(x)[1][0]), r=nn.LSTM(8, 5), o=Linear(5, 3)),
              (rnn.pack_sequence([torch.randn(4, 8), torch.randn(2, 8)]),)), "a PackedSequence depend on values"),
], ids=["control flow", "a number", "a mask as index", "unique", "numpy", "a wrong shape", "no tensor",
        "too many arguments",
        "a wrong name", "a fault of its own", "a long reason", "packed tokens", "a packed input"])
def test_what_cannot_be_traced_is_named_and_groups_by_hand_are_advised(make, message):
    model, x = make()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        permutation_groups(model, x)
    assert "groups can be written by hand" in str(error.value) and "check_function" in str(error.value)
    assert len(str(error.value)) < 800
    assert [module.training for module in model.modules()] == modes


# Networks at random


@st.composite
def chains(draw):
    """A random chain of layers, convolutions first, with branches that are joined in one of many ways."""
    channels, side, layers = 2, 8, []
    even = st.sampled_from([2, 4, 6])
    for _ in range(draw(st.integers(0, 2))):
        size, groups = draw(even), draw(st.sampled_from([1, 1, 2]))
        layers.append(Conv(channels, size, 3, padding=1, bias=draw(st.booleans()), groups=groups))
        layers.append(draw(st.sampled_from([BN(size), nn.GroupNorm(2, size), nn.GroupNorm(1, size), nn.Identity(),
                                            Shuffle(2), Excitation(size, 2), Joined(draw, Conv, size, kernel_size=1)])))
        layers.append(draw(st.sampled_from([ReLU(), nn.Tanh(), ReLU(inplace=True)])))
        pool = draw(st.sampled_from([None, nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)]))
        if pool is not None and side >= 2:
            layers.append(pool)
            side = 2 if isinstance(pool, nn.AdaptiveAvgPool2d) else side // 2
        channels = size
    layers.append(nn.Flatten())
    features = channels * side * side
    for _ in range(draw(st.integers(1, 3))):
        size = draw(even)
        layers += [Linear(features, size, bias=draw(st.booleans())), draw(st.sampled_from(
            [nn.BatchNorm1d(size), nn.LayerNorm(size), nn.Identity(), Joined(draw, Linear, size), Parts(draw)])),
            nn.GELU()]
        features = size
    return Seq(*layers, Linear(features, 3))


class Joined(nn.Module):
    """Two layers of as many units as there are, joined."""

    def __init__(self, draw, layer, size, **options):
        super().__init__()
        self.one, self.two = layer(size, size, **options), layer(size, size, **options)
        self.how = draw(st.sampled_from(["sum", "product", "shortcut", "concatenation", "halves", "same", "softmax"]))

    def forward(self, x):
        a, b = self.one(x), self.two(x)
        half = x.shape[1] // 2
        return {"sum": lambda: a + b, "product": lambda: a.sigmoid() * b, "shortcut": lambda: x + self.two(a.relu()),
                "concatenation": lambda: torch.cat([a[:, :half], b[:, half:]], 1),
                "same": lambda: a + self.one(b.relu()),
                "halves": lambda: torch.cat([(a + b)[:, half:], (a * b)[:, :half]], 1),
                "softmax": lambda: torch.stack([a, b], 1).softmax(1).sum(1) * b}[self.how]()


class Parts(nn.Module):
    """Something done to the parts of a vector."""

    def __init__(self, draw):
        super().__init__()
        self.how = draw(st.sampled_from(["shuffled", "softmax", "scaled", "flipped", "crossed", "outer", "numbered"]))

    def forward(self, x):
        parts = x.view(len(x), 2, -1)
        return {"shuffled": lambda: parts.mT.flatten(1), "softmax": lambda: parts.softmax(2).flatten(1),
                "scaled": lambda: (parts * parts.mean(2, keepdim=True)).flatten(1),
                "flipped": lambda: parts.flip(1).flatten(1),
                "crossed": lambda: (parts.softmax(2) + parts.cumsum(1)).flatten(1),
                "numbered": lambda: (parts * torch.arange(2.)[:, None].to(x)).flatten(1),
                "outer": lambda: (parts @ (parts.mT @ parts)).flatten(1)}[self.how]()


@examples(1 / 2)
@given(model=chains(), seed=st.integers(0, 100))
def test_any_chain_keeps_its_function(model, seed):
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    groups = permutation_groups(model, x)
    assert check_function(groups, model, x, seed=seed) < 1e-9


def assert_each_weight_counts(groups, model, x):
    """Without the first entry of any group, which gives its name, a permutation changes the function."""
    copy, permutations = draw_weights(model), derangements(groups)
    for name, group in groups.items():
        part = {**groups, name: group._replace(entries=group.entries[1:])}
        assert function_change(part, {name: permutations[name]}, copy, x.double()) > 1e-9, name


# Operations on three blocks of four units, h [batch, 3, 4], and the network's input x.
BLOCKS = {
    "times inputs": lambda s, h, x: h * x[:, :3, None],
    "plus inputs": lambda s, h, x: h + x[:, None, :4],
    "numbered": lambda s, h, x: h * torch.tensor([1., 2., 1.])[:, None],
    "numbered units": lambda s, h, x: h * torch.tensor([1., 1., 2., 2.]),
    "a matrix": lambda s, h, x: h + torch.eye(3, 4),
    "a product": lambda s, h, x: torch.tensor([[1., 1, 0], [0, 0, 1], [0, 0, 1]]) @ h,
    "softmax": lambda s, h, x: h.softmax(2),
    "softmax of blocks": lambda s, h, x: h.softmax(1),
    "minus mean": lambda s, h, x: h - h.mean(2, keepdim=True),
    "times mean": lambda s, h, x: h * h.mean(1, keepdim=True),
    "running sum": lambda s, h, x: h.cumsum(1),
    "flipped": lambda s, h, x: h.flip(1) + h,
    "scaled": lambda s, h, x: h * s.scale,
    "shifted": lambda s, h, x: h + s.shift,
    "padded": lambda s, h, x: torch.cat([h[:, :, :3], torch.zeros_like(h[:, :, :1])], 2).cos(),
    "padded blocks": lambda s, h, x: torch.cat([torch.ones_like(h[:, :1]), h[:, 1:]], 1),
    "another layer": lambda s, h, x: h + s.other(x)[:, None],
    "a layer of units": lambda s, h, x: s.inner(h),
    "a cell": lambda s, h, x: s.cell(h[:, 0], h[:, 1])[:, None] + h,
    "transposed": lambda s, h, x: h.mT.reshape(-1, 12).tanh(),
    "halves": lambda s, h, x: torch.cat([h[:, :, 2:], h[:, :, :2]], 2) * h,
    "an index": lambda s, h, x: h[:, [0, 2, 1]],
    "gather": lambda s, h, x: h.gather(1, torch.tensor([2, 2, 0])[None, :, None].expand(len(h), 3, 4)),
    "added": lambda s, h, x: h.index_add(1, torch.tensor([0, 1]), h[:, 1:]),
    "a shared part": lambda s, h, x: torch.cat([h[:, :, :2], s.pair(x)[:, None].expand(-1, 3, -1)], 2),
    "numbers in all": lambda s, h, x: torch.cat([torch.tensor([1., 2.]).expand(len(h), 3, 2).to(h), h[:, :, 2:]], 2),
    "changed in place": lambda s, h, x: h.mul_(h.sigmoid()).add_(s.other(x)[:, None]),
    "a view in place": lambda s, h, x: (h[:, 1].mul_(2), h)[1],
    "a transposed layer": lambda s, h, x: F.conv_transpose1d(h.mT, s.wide[:, :, None], groups=2).mT,
    "attention": lambda s, h, x: F.scaled_dot_product_attention(h, s.inner(h), h),
    "embedded": lambda s, h, x: h * F.embedding((x[:, :3] > 0).long(), s.table),
    "interpolated": lambda s, h, x: F.interpolate(h.mT, size=3, mode="nearest").mT.contiguous(),
    "a filter": lambda s, h, x: F.conv1d(F.pad(h, (1, 1)), s.kernel),
    "the best": lambda s, h, x: h.topk(2, 1)[0].sum(1, keepdim=True) + h,
    "distances": lambda s, h, x: torch.cdist(h, s.points) @ s.points,
    "cast": lambda s, h, x: h.float().type_as(h),
    "where": lambda s, h, x: torch.where(torch.arange(4) < 2, h, h.cos()),
    "pairs": lambda s, h, x: torch.view_as_real(torch.view_as_complex(h.reshape(-1, 6, 2)) ** 2),
}


IDLE = {"a product", "a shared part", "numbers in all", "padded", "padded blocks"}  # discard units, or add some up


@examples(1 / 2)
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_any_operations_on_blocks_keep_the_function(names, seed):
    def forward(s, x):
        h = s.a(x)
        for name in names:
            h = BLOCKS[name](s, h.view(-1, 3, 4), x).reshape(-1, 12)
        return s.b(h / (1 + h.abs()))  # large numbers still count

    model = Net(forward, a=Linear(8, 12), b=Linear(12, 3), other=Linear(8, 4), inner=Linear(4, 4), pair=Linear(8, 2),
                cell=nn.GRUCell(4, 4), scale=parameter(3, 1), shift=parameter(4), wide=parameter(4, 2),
                table=parameter(2, 4), kernel=parameter(3, 3, 3), points=parameter(5, 4))
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(seed))
    groups = permutation_groups(model, x)
    assert check_function(groups, model, x, seed=seed) < 1e-9
    if not IDLE.intersection(names):
        assert_each_weight_counts(groups, model, x)
