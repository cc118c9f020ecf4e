"""Clusters, weighted means, planted duplicates, and the identity of the error of a fixed mixture."""

import math

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage

from permask_core.experts import (
    best_mixture,
    calibrate,
    clusters_by_logits,
    clusters_by_outputs,
    clusters_by_score,
    expert_tensors,
    gates_and_outputs,
    merge_experts,
    mixture_error,
    mixture_weights,
    moe_blocks,
    saliency,
    select_experts,
)
from tests.experts.models import KINDS, ids, logits, tiny
from tests.experts.test_alignment import plant


def singletons(model):
    return {name: [[j] for j in range(block.count)] for name, block in moe_blocks(model).items()}


def ones(model):
    return {name: torch.ones(block.count) for name, block in moe_blocks(model).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("matching", [None, "weights", "activations"])
def test_clusters_of_one_change_no_bit(kind, matching):
    model = tiny(kind)
    found = calibrate(model, [ids()], keep=30) if matching == "activations" else None
    same = merge_experts(model, singletons(model), ones(model), matching=matching, statistics=found)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values()))


@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_merge_exactly_only_if_aligned(kind):
    """Experts 1 and 6 are copies with other orders of units, 3 and 4 too; with the router kept nothing may change."""
    model, x = tiny(kind), ids()
    clusters = {}
    for name, block in moe_blocks(model).items():
        plant(block, 1, 6, seed=1), plant(block, 3, 4, seed=2)
        clusters[name] = [[1, 6], [3, 4], [0], [2], [5], [7]]
    before, found = logits(model, x), calibrate(model, [ids(12, 12)], keep=100)
    weights = saliency(found, "frequency")
    for matching in ("weights", "activations"):
        merged = merge_experts(model, clusters, weights, matching=matching, statistics=found)
        assert torch.allclose(logits(merged, x), before, rtol=0, atol=1e-6)
        block = next(iter(moe_blocks(merged).values()))
        assert torch.equal(block.experts.down_proj[1], block.experts.down_proj[6])
    assert (logits(merge_experts(model, clusters, weights), x) - before).abs().max() > 1e-2


def test_duplicates_that_share_their_tokens_can_be_removed_exactly():
    """An expert twice, each with log 2 less in the router and no limit of experts, is the same function; removing one
    and adding log 2 to the other's bias restores it."""
    model, x = tiny("gpt_oss", num_experts_per_tok=8), ids()
    before = logits(model, x)
    doubled = tiny("gpt_oss", experts=9, num_experts_per_tok=9)
    state = {}
    for name, tensor in model.state_dict().items():
        packed = ".experts." in name or ".router." in name
        state[name] = torch.cat([tensor, tensor[2:3]]) if packed else tensor
    doubled.load_state_dict(state)
    with torch.no_grad():
        for block in moe_blocks(doubled).values():
            block.router.bias[[2, 8]] -= math.log(2)
    assert torch.allclose(logits(doubled, x), before, atol=1e-10)
    for block in moe_blocks(doubled).values():
        block.router.top_k = 8
    pruned = select_experts(doubled, {name: torch.arange(8) for name in moe_blocks(doubled)})
    assert (logits(pruned, x) - before).abs().max() > 1e-3
    with torch.no_grad():
        for block in moe_blocks(pruned).values():
            block.router.bias[2] += math.log(2)
    assert torch.allclose(logits(pruned, x), before, atol=1e-10)


def test_the_mean_is_weighted_and_the_leader_has_the_largest_weight():
    model = tiny("moe")
    weights = ones(model) | {"blocks.0.mixture": torch.tensor([1.0, 3, 1, 1, 1, 1, 1, 1])}
    clusters = singletons(model) | {"blocks.0.mixture": [[0, 1], [2, 3, 4], [5], [6], [7]]}
    old = [expert_tensors(moe_blocks(model)["blocks.0.mixture"], j)["up.weight"] for j in range(8)]
    merged = moe_blocks(merge_experts(model, clusters, weights))["blocks.0.mixture"]
    for j in (0, 1):
        assert torch.allclose(expert_tensors(merged, j)["up.weight"], old[0] / 4 + 3 * old[1] / 4)
    assert torch.allclose(expert_tensors(merged, 3)["up.weight"], sum(old[2:5]) / 3)
    assert torch.equal(expert_tensors(merged, 7)["up.weight"], old[7])
    zero = merge_experts(model, clusters, weights | {"blocks.0.mixture": torch.zeros(8)})
    assert torch.allclose(expert_tensors(moe_blocks(zero)["blocks.0.mixture"], 0)["up.weight"], (old[0] + old[1]) / 2)


def test_with_the_leaders_rows_the_model_is_smaller_and_saved(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny("qwen3_moe")
    clusters = dict.fromkeys(moe_blocks(model), [[0, 4, 5], [1], [2, 6], [3, 7]])
    weights = dict.fromkeys(moe_blocks(model), torch.tensor([1.0, 1, 1, 1, 2, 1, 1, 1]))
    merged = merge_experts(model, clusters, weights, router="leader")
    for name, block in moe_blocks(merged).items():  # the leaders are 4, 1, 2 and 3
        assert torch.equal(block.router.weight, moe_blocks(model)[name].router.weight[[1, 2, 3, 4]])
        assert torch.equal(block.experts.down_proj[0], moe_blocks(model)[name].experts.down_proj[1])
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    assert torch.equal(logits(loaded.eval(), ids()), logits(merged, ids()))


def trained_pairs(kind):
    """The gates and outputs of some pairs of experts in a tiny model, over the tokens routed to either."""
    model = tiny(kind)
    for name, found in calibrate(model, [ids(20, 12)], keep=240).items():
        for i, j in ((0, 1), (2, 5), (6, 3)):
            yield gates_and_outputs(moe_blocks(model)[name], found, [i, j])


@pytest.mark.parametrize("kind", ["moe", "mixtral", "gpt_oss"])
def test_the_error_of_a_mixture_of_two_is_the_weighted_variance_of_the_ratio(kind):
    for gates, outputs in trained_pairs(kind):
        total = gates.sum(1)
        r = gates[:, 0] / total
        w = total**2 * (outputs[:, 0] - outputs[:, 1]).square().sum(1)
        best = float((w * r).mean() / w.mean())
        assert best_mixture(gates, outputs)[0] == pytest.approx(best, abs=1e-10)
        errors = []
        for a in (0.0, 0.3, best, 1.0):
            found = mixture_error(gates, outputs, torch.tensor([a, 1 - a], dtype=torch.float64))
            assert found == pytest.approx(float((w * (r - a) ** 2).mean()), rel=1e-12)
            errors.append(found)
        assert errors[2] == pytest.approx(float(w.mean() * ((w * r**2).mean() / w.mean() - best**2)), rel=1e-9)
        pruned = (gates[:, 1] ** 2 * (outputs[:, 0] - outputs[:, 1]).square().sum(1)).mean()
        assert errors[3] == pytest.approx(float(pruned), rel=1e-12)  # without the variance of r
        grid = torch.linspace(-1, 2, 301, dtype=torch.float64)
        on_grid = [mixture_error(gates, outputs, torch.stack([a, 1 - a])) for a in grid]
        assert abs(grid[on_grid.index(min(on_grid))] - min(2, max(-1, best))) <= 0.005 + 1e-9
        assert min(on_grid) >= errors[2] - 1e-15


def test_the_best_mixture_of_three_is_a_minimum():
    gates, outputs = torch.rand(50, 3).double(), torch.randn(50, 3, 4).double()
    best = best_mixture(gates, outputs)
    assert float(best.sum()) == pytest.approx(1)
    for _ in range(20):
        step = torch.randn(3, dtype=torch.float64) * 0.1
        assert mixture_error(gates, outputs, best + step - step.mean()) > mixture_error(gates, outputs, best)
    same = torch.randn(50, 1, 4).double().expand(-1, 3, -1)
    assert torch.allclose(best_mixture(gates, same), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_mixture_weights_lower_the_error_of_outputs():
    model = tiny("moe")
    found = calibrate(model, ids(20, 12), keep=240)
    clusters = dict.fromkeys(found, [[0, 1, 2], [3, 4], [5], [6], [7]])
    weights = mixture_weights(model, found, clusters)
    for name, block in moe_blocks(model).items():
        for cluster in ([0, 1, 2], [3, 4]):
            data = gates_and_outputs(block, found[name], cluster)
            counts = found[name].counts[cluster]
            assert float(weights[name][cluster].sum()) == pytest.approx(1)
            assert mixture_error(*data, weights[name][cluster]) < mixture_error(*data, counts / counts.sum())
        assert weights[name][5:].tolist() == [1, 1, 1]
    assert merge_experts(model, clusters, weights) is not model


def test_clusters_by_outputs_are_average_linkage():
    found = calibrate(tiny("mixtral"), [ids(20, 12)], merging=True)
    for keep in (1, 3, 8):
        for name, clusters in clusters_by_outputs(found, keep).items():
            labels = fcluster(linkage(found[name].outputs.numpy(), "average"), keep, "maxclust")
            expected = {frozenset((labels == label).nonzero()[0].tolist()) for label in {*labels}}
            assert {frozenset(cluster) for cluster in clusters} == expected and len(clusters) == keep


def test_clusters_by_logits_have_the_most_frequent_experts_of_all_blocks_as_leaders():
    found = calibrate(tiny("mixtral"), [ids(20, 12)], merging=True)
    clusters = clusters_by_logits(found, 3)
    assert sum(len(own) for own in clusters.values()) == 6
    leading = [float(found[name].counts[cluster[0]]) for name, own in clusters.items() for cluster in own]
    others = [float(found[name].counts[j]) for name, own in clusters.items() for cluster in own for j in cluster[1:]]
    assert min(leading) >= max(others)
    for name, own in clusters.items():
        assert sorted(sum(own, [])) == list(range(8))
        scale = found[name].logits.diagonal().sqrt()
        similar = found[name].logits / scale / scale[:, None]
        for cluster in own:
            for j in cluster[1:]:
                assert similar[j, cluster[0]] == max(similar[j, one[0]] for one in own)


def test_clusters_by_score_are_led_by_the_best():
    model = tiny("moe")
    found = calibrate(model, ids(20, 12), merging=True)
    scores = saliency(found, "reap")
    for name, clusters in clusters_by_score(model, found, scores, 3).items():
        assert sorted(cluster[0] for cluster in clusters) == sorted(scores[name].argsort(descending=True)[:3].tolist())
        assert sorted(sum(clusters, [])) == list(range(8))


def test_refusals():
    model = tiny("moe")
    whole = singletons(model)
    with pytest.raises(ValueError, match=r"clusters of 'blocks.1.mixture' are \[\[0, 0\]\]: expected each of its 8"):
        merge_experts(model, whole | {"blocks.1.mixture": [[0, 0]]}, ones(model))
    with pytest.raises(ValueError, match="weights of 'blocks.0.mixture' are None: expected 8 finite numbers"):
        merge_experts(model, whole, {})
    with pytest.raises(ValueError, match="unknown router 'row': expected one of kept, leader"):
        merge_experts(model, whole, ones(model), router="row")
    with pytest.raises(ValueError, match="unknown matching 'names'"):
        merge_experts(model, whole, ones(model), matching="names")
    with pytest.raises(ValueError, match=r"no kept tokens of 'blocks.0.mixture': expected statistics of calibr"):
        merge_experts(model, whole, ones(model), matching="activations", statistics=calibrate(model, ids(20, 12)))
    with pytest.raises(ValueError, match="has 1 clusters: expected at least 2, the number of experts for a token"):
        merge_experts(model, dict.fromkeys(whole, [list(range(8))]), ones(model), router="leader")
    for clusters in (clusters_by_outputs, clusters_by_logits):
        with pytest.raises(ValueError, match=r"have no outputs: expected those of calibrate\(..., merging=True\)"):
            clusters(calibrate(model, ids(20, 12)), 3)
        with pytest.raises(ValueError, match="keep is 9: expected an integer from 1 to 8"):
            clusters(calibrate(model, ids(20, 12), merging=True), 9)
