"""The decoder with experts: shapes, causality, routing, and the arithmetic of its mixture."""

import math

import pytest
import torch
from torch.nn import functional as F

from permask_core.models import build_model
from permask_core.models.moe import balance


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("options, parameters", [({}, 1_645_568), ({"layers": 1, "experts": 4, "units": 8}, None)])
def test_logits_of_the_next_token_at_each_position(options, parameters, gated):
    model = build_model("moe", (11,), 15, gated=gated, **options)
    tokens = torch.randint(15, (3, 11))
    logits = model(tokens)
    assert logits.shape == (3, 11, 15)
    assert torch.allclose(model(tokens[:, :7]), logits[:, :7], atol=1e-5)  # shorter texts, and no look ahead
    assert abs(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) - math.log(15)) < 0.8
    if parameters and gated:  # embeddings, and in each layer attention, norms, router and 16 experts
        layer = 4 * 64**2 + 2 * 64 + 16 * 64 + 16 * 3 * 64 * 128
        assert sum(one.numel() for one in model.parameters()) == (15 + 11) * 64 + 4 * layer + 64 + 15 * 64


@pytest.mark.parametrize("gated", [True, False])
def test_the_mixture_is_the_sum_over_the_best_experts_of_their_softmax_times_their_output(gated):
    mixture = build_model("moe", (4,), 5, layers=1, experts=5, units=6, gated=gated).double().blocks[0].mixture
    h, own = torch.randn(2, 3, 64, dtype=torch.float64), mixture.experts
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    expected = torch.zeros_like(h)
    for at in ((i, t) for i in range(2) for t in range(3)):
        logits = mixture.router.weight @ h[at]
        best = logits.topk(2).indices
        for j in best:
            if gated:
                gate, up = own.gate_up_proj[j, :6] @ h[at], own.gate_up_proj[j, 6:] @ h[at]
                output = own.down_proj[j] @ (gate * gate.sigmoid() * up)
            else:
                x = own.up_proj[j] @ h[at] + own.up_proj_bias[j]
                output = own.down_proj[j] @ (x * (1 + torch.erf(x / math.sqrt(2))) / 2) + own.down_proj_bias[j]
            expected[at] += logits[j].exp() / logits[best].exp().sum() * output
    assert torch.allclose(mixture(h), expected, atol=1e-12)


def test_routes_are_those_of_each_layer_and_balance_is_1_if_shares_are_equal():
    model, routes = build_model("moe", (11,), 15), []
    model(torch.randint(15, (8, 11)), routes)
    assert [[list(part.shape) for part in route] for route in routes] == [[[88, 16], [88, 2], [88, 2]]] * 4
    assert all(torch.allclose(weights.sum(1), torch.ones(88)) for _, weights, _ in routes)
    even = torch.zeros(8, 4), None, torch.arange(8).view(4, 2) % 4
    one = torch.tensor([[50.0, 0, 0, 0]]).expand(8, 4), None, torch.zeros(8, 1, dtype=torch.int64)
    assert float(balance([even])) == pytest.approx(1) and float(balance([one])) == pytest.approx(4)
    assert float(balance([even, one])) == pytest.approx(2.5)


def test_gradients_reach_the_router_and_the_experts_that_are_used():
    model = build_model("moe", (6,), 9, layers=1, experts=3, units=4, top_k=2)
    model(torch.randint(9, (4, 6))).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("options, message", [
    ({"experts": 1}, "experts is 1: expected at least 2"), ({"top_k": 0}, "top_k is 0: expected at least 1"),
    ({"layers": 0}, "layers is 0"), ({"units": 0}, "units is 0"), ({"depth": 2}, "moe has no option 'depth'")])
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_model("moe", (4,), 5, **options)
