"""Permuting experts, removing them, saving the rest: on the book's own model and on those of transformers."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

from permask_core.experts import calibrate, moe_blocks, prune_experts, saliency, select_experts
from tests.experts.models import KINDS, ids, logits, tiny

NORMALISED = ("moe", "gelu", "mixtral", "qwen3_moe", "gpt_oss")  # softmax over the chosen, or divided by their sum


def orders(model, seed=0):
    """A random order of the experts of each block, within the groups of its router."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, block in moe_blocks(model).items():
        size = block.count // (getattr(block.router, "num_group", None) or 1)
        found[name] = torch.cat([start + torch.randperm(size, generator=generator)
                                 for start in range(0, block.count, size)])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_experts_with_their_rows_compute_the_same(kind):
    model, x = tiny(kind), ids()
    permuted = select_experts(model, orders(model))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), permuted.parameters()))
    assert torch.allclose(logits(permuted, x), logits(model, x), rtol=0, atol=1e-6)
    block = next(iter(moe_blocks(permuted).values()))
    with torch.no_grad():
        block.router.weight.copy_(block.router.weight.flip(0))  # experts without their rows
    assert (logits(permuted, x) - logits(model, x)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_nothing_changes_no_bit(kind):
    model = tiny(kind)
    scores = {name: torch.rand(block.count) for name, block in moe_blocks(model).items()}
    same = prune_experts(model, scores, 8)
    assert same.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(same, ids()), logits(model, ids()))


def outputs_of_blocks(model, x):
    """The inputs of the first block, its output, and the experts chosen for each token."""
    name, block = next(iter(moe_blocks(model).items()))
    found = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, given, output: found.update(y=output[0] if isinstance(output, tuple) else output)),
        block.experts.register_forward_pre_hook(lambda _, given: found.update(chosen=given[1], weights=given[2]))]
    logits(model, x)
    for hook in hooks:
        hook.remove()
    return found["y"].flatten(0, 1), found["chosen"], found["weights"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_whose_experts_survive_are_unchanged_where_weights_are_normalised(kind):
    model, x = tiny(kind, **({"n_group": 1, "topk_group": 1} if kind == "deepseek_v3" else {})), ids()
    kept = torch.tensor([0, 2, 3, 5, 6])
    pruned = select_experts(model, {name: kept for name in moe_blocks(model)})
    (before, chosen, _), (after, _, _) = outputs_of_blocks(model, x), outputs_of_blocks(pruned, x)
    survive = torch.isin(chosen, kept).all(1)
    change = (after - before).norm(dim=1) / before.norm(dim=1)
    assert 5 < survive.sum() < len(survive) - 5 and change[~survive].min() > 1e-3
    if kind == "olmoe":  # a softmax over all experts: the others get more
        assert change[survive].min() > 1e-3
    else:  # sigmoids do not see each other; some routers compute in float32
        assert change[survive].max() < (1e-12 if kind in ("moe", "gelu", "gpt_oss") else 1e-6)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_a_pruned_model_is_saved_with_its_counts_and_loaded_from_its_config_alone(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model, x = tiny(kind), ids()
    before = model.config.to_dict()
    pruned = prune_experts(model, saliency(calibrate(model, [x]), "reap"), 4)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager").eval()
    assert torch.equal(logits(loaded, x), logits(pruned, x)) and model.config.to_dict() == before
    written = json.loads((tmp_path / "config.json").read_text())
    counts = {key: written[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in written}
    assert {*counts.values()} == {4}
    size = sum(tensor.numel() for tensor in pruned.parameters())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum(file.get_tensor(key).numel() for key in file.keys()) <= size + 64  # and buffers of routers
    assert size < 0.75 * sum(tensor.numel() for tensor in model.parameters())


def test_the_best_of_each_group_remain_and_of_equal_scores_the_first():
    model = tiny("deepseek_v3")  # two groups of four, one is chosen
    scores = dict.fromkeys(moe_blocks(model), torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0]))
    pruned = prune_experts(model, scores, 4)
    for name, block in moe_blocks(pruned).items():
        old = moe_blocks(model)[name]
        kept = torch.tensor([0, 1, 4, 5])
        assert torch.equal(block.router.weight, old.router.weight[kept])
        assert torch.equal(block.router.e_score_correction_bias, old.router.e_score_correction_bias[kept])
        assert torch.equal(block.experts.gate_up_proj, old.experts.gate_up_proj[kept])
    shared = [name for name in model.state_dict() if "shared" in name or "layers.0.mlp" in name]
    assert len(shared) == 9 and all(torch.equal(model.state_dict()[k], pruned.state_dict()[k]) for k in shared)


def test_removed_experts_are_not_copied_and_the_model_does_not_change():
    model = tiny("mixtral")
    before = copy.deepcopy(model.state_dict())
    pruned = prune_experts(model, {name: torch.arange(8.0) for name in moe_blocks(model)}, 3)
    assert {name: len(block.experts.down_proj) for name, block in moe_blocks(pruned).items()} == {
        "model.layers.0.mlp": 3, "model.layers.1.mlp": 3}
    assert pruned.config.num_local_experts == pruned.num_experts == 3
    assert pruned.model.layers[1].mlp.experts.num_experts == 3 == pruned.model.layers[1].mlp.gate.num_experts
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert pruned.model.embed_tokens.weight is not model.model.embed_tokens.weight


def test_unlike_counts_are_possible_only_without_a_configuration():
    model = tiny("moe")
    some = {"blocks.0.mixture": torch.arange(8), "blocks.1.mixture": torch.tensor([5, 1])}
    assert logits(select_experts(model, some), ids()).shape == (6, 12, 40)
    with pytest.raises(ValueError, match=r"would keep \{'model.layers.0.mlp': 8, 'model.layers.1.mlp': 2\} experts"):
        select_experts(tiny("mixtral"), {"model.layers.1.mlp": torch.tensor([5, 1])})


def test_refusals():
    model, grouped = tiny("moe"), tiny("deepseek_v3")
    scores, of_groups = ({name: torch.rand(8) for name in moe_blocks(one)} for one in (model, grouped))
    with pytest.raises(ValueError, match="keep is 1: expected at least 2, the number of experts for a token"):
        prune_experts(model, scores, 1)
    for keep in (0, 9, 2.0):
        with pytest.raises(ValueError, match=f"keep is {keep}: expected an integer from 1 to 8"):
            prune_experts(model, scores, keep)
    for keep in (5, 2):  # unequal groups; one expert in each, whose score is the sum of the best two
        with pytest.raises(ValueError, match=f"keep is {keep}: expected a multiple of 2 of at least 4"):
            prune_experts(grouped, of_groups, keep)
    with pytest.raises(ValueError, match=r"scores of 'blocks.1.mixture' are None: expected 8 finite numbers"):
        prune_experts(model, {"blocks.0.mixture": torch.rand(8)}, 4)
    with pytest.raises(ValueError, match=r"nan.*expected 8 finite numbers"):
        prune_experts(model, scores | {"blocks.0.mixture": torch.full((8,), torch.nan)}, 4)
    with pytest.raises(ValueError, match=r"would keep \[1, 1\]: expected different indices below 8"):
        select_experts(model, {"blocks.0.mixture": torch.tensor([1, 1])})
    with pytest.raises(ValueError, match="unknown block 'blocks.7': expected some of blocks.0.mixture"):
        select_experts(model, {"blocks.7": torch.tensor([1])})
