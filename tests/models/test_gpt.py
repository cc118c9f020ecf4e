"""The decoder: shapes, causality, the first loss, and what may be permuted."""

import math

import pytest
import torch
from torch.nn import functional as F

from permask_core.masks import prunable_weights
from permask_core.matching import check_function, permutation_groups
from permask_core.models import build_model


@pytest.mark.parametrize("width, heads", [(1.0, 4), (0.25, 1), (2.0, 8)])
def test_logits_of_the_next_token_at_each_position(width, heads):
    model = build_model("gpt", (16,), 97, width=width)
    tokens = torch.randint(97, (3, 16))
    logits = model(tokens)
    assert logits.shape == (3, 16, 97) and model.token.embedding_dim == 12 * heads
    assert torch.allclose(model(tokens[:, :7]), logits[:, :7], atol=1e-6)  # shorter texts, and no look ahead
    assert abs(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) - math.log(97)) < 0.1


def test_a_later_token_changes_no_earlier_output():
    model, tokens = build_model("gpt", (12,), 10), torch.randint(10, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % 10
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same[:8].all() and not same[8:].any()


def test_the_groups_are_the_residual_stream_heads_their_dimensions_and_units_of_the_mlp():
    model, tokens = build_model("gpt", (12,), 10), torch.randint(10, (2, 12))
    groups = permutation_groups(model, tokens)
    sizes = sorted((group.size, group.within is not None) for group in groups.values())
    assert sizes == sorted([(48, False)] + 2 * [(4, False), (192, False)] + 16 * [(12, True)])
    assert check_function(groups, model, tokens) < 1e-9
    assert [*prunable_weights(model)] == [f"blocks.{i}.{layer}.weight" for i in (0, 1)
                                          for layer in ("qkv", "out", "up", "down")]
