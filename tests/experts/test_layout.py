"""Where experts are: their packed tensors, one of them as a network, and models that nobody described."""

import pytest
import torch
from torch import nn

from permask_core.experts import LAYOUTS, Expert, Layout, expert_tensors, moe_blocks, run_expert, unit_groups
from permask_core.matching import check_function, permutation_groups, permute, random_permutations
from permask_core.models import build_model
from tests.experts.models import KINDS, ids, logits, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_of_weight_times_output_is_what_the_block_computes(kind):
    """Each expert alone, and as linear layers, summed by hand: the packed tensors are read as the block reads them."""
    model, seen = tiny(kind), {}
    for name, block in moe_blocks(model).items():
        block.experts.register_forward_hook(lambda _, given, output, name=name: seen.update({name: (*given, output)}))
    logits(model, ids())
    for name, block in moe_blocks(model).items():
        x, chosen, weights, output = seen[name]
        alone, linear = ([f(j) for j in range(block.count)] for f in (
            lambda j, block=block, x=x: run_expert(block, j, x), lambda j, block=block, x=x: Expert(block, j)(x)))
        for outputs in (alone, linear):
            total = torch.stack([sum(weights[t, i] * outputs[int(chosen[t, i])][t] for i in range(chosen.shape[1]))
                                 for t in range(len(x))])
            assert torch.allclose(total, output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_units_compute_the_same_and_a_forgotten_part_does_not(kind):
    model, x = tiny(kind), ids()
    before = logits(model, x)
    for block in moe_blocks(model).values():
        for j in range(block.count):
            tensors = expert_tensors(block, j)
            groups = unit_groups(tensors)
            moved = permute(groups, random_permutations(groups, seed=j), tensors)
            for key, tensor in tensors.items():
                tensor.copy_(moved[key])
    assert torch.allclose(logits(model, x), before, rtol=0, atol=1e-6)
    parts = [entry.tensor for entry in groups["units"].entries]
    assert len(parts) == {"gelu": 3, "gpt_oss": 5}.get(kind, 3)
    for left_out in parts:
        tensors = expert_tensors(block, 0)
        saved = tensors[left_out].clone()
        tensors[left_out].copy_(saved.flip(0 if left_out != "down.weight" else 1))
        x_of = torch.randn(5, block.router.weight.shape[1], dtype=torch.float64)
        changed = run_expert(block, 0, x_of)
        tensors[left_out].copy_(saved)
        assert (changed - run_expert(block, 0, x_of)).abs().max() > 1e-3, left_out


@pytest.mark.parametrize("kind", KINDS)
def test_the_group_is_the_one_that_tracing_an_expert_finds(kind):
    block = next(iter(moe_blocks(tiny(kind)).values()))
    expert, x = Expert(block, 1), torch.randn(6, block.router.weight.shape[1], dtype=torch.float64)
    groups = unit_groups(expert.state_dict())
    assert check_function(groups, expert, x) < 1e-9
    if kind == "gpt_oss":
        return  # the tracer has no rule for its strided views, and finds no group
    (traced,) = permutation_groups(expert, x).values()
    assert {(one.tensor, one.axis) for one in traced.entries} == {
        (one.tensor, one.axis) for one in groups["units"].entries} and traced.size == 24


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gelu"])
def test_units_may_be_rescaled_where_the_layout_says_so(kind):
    block = next(iter(moe_blocks(tiny(kind)).values()))
    x, tensors = torch.randn(6, block.router.weight.shape[1], dtype=torch.float64), expert_tensors(block, 2)
    before, scale = run_expert(block, 2, x), torch.tensor([-2.0, 0.5, 3.0] * 8, dtype=torch.float64)
    tensors["up.weight"].mul_(scale[:, None])
    tensors["down.weight"].div_(scale)
    assert torch.allclose(run_expert(block, 2, x), before, atol=1e-12) == block.scalable == (kind != "gpt_oss")


def test_tokens_for_no_expert_and_no_tokens():
    block = next(iter(moe_blocks(tiny("moe")).values()))
    assert run_expert(block, 0, torch.zeros(0, 32)).shape == (0, 32)


class Renamed(nn.Module):
    """A block of another architecture, which keeps the same things under other names."""

    def __init__(self, mixture):
        super().__init__()
        self.pool, self.switch = mixture.experts, mixture.router


def test_an_unknown_architecture_is_named_with_its_tensors_and_can_be_described():
    model = nn.Sequential(Renamed(build_model("moe", (4,), 5, layers=1, experts=4).blocks[0].mixture))
    with pytest.raises(ValueError, match=r"Sequential has no block of a known class \(Mixture, .*\). Tensors that may "
                                         r"hold experts: 0.pool.gate_up_proj \[4, 256, 64\] of SwiGLU, .*Layout"):
        moe_blocks(model)
    found = moe_blocks(model, LAYOUTS | {"Renamed": Layout(experts="pool", router="switch")})
    assert found["0"].count == 4 and found["0"].top_k == 2
    with pytest.raises(ValueError, match="block '0' has no 'gate': expected the names .* it has pool, switch"):
        moe_blocks(model, {"Renamed": Layout(experts="pool")})
    with pytest.raises(ValueError, match="Decoder has no experts"):
        moe_blocks(build_model("gpt", (4,), 5))
