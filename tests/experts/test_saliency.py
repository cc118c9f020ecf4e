"""Scores against a loop over tokens, against the published code, and against the true error of removing experts."""

import itertools
import math
import warnings

import pytest
import torch
from scipy.stats import spearmanr

from permask_core.experts import CRITERIA, calibrate, moe_blocks, run_expert, saliency, select_experts
from tests.experts.models import KINDS, ids, logits, tiny

# Measured with github.com/CerebrasResearch/reap at commit 1970473, reap.pruning_metrics.update_pruning_state with
# renormalize_router_weights=True, on tiny("qwen3_moe") and the two batches of `two_batches`, the second with a mask.
PUBLISHED = {
    "model.layers.0.mlp": {
        "frequency": [44, 29, 17, 27, 34, 11, 2, 16],
        "router_weight": [23.212386, 13.681365, 7.822226, 14.348324, 16.897868, 4.745296, 0.651283, 8.64125],
        "ean": [160.293446, 101.074746, 60.905391, 101.365708, 105.284494, 37.598845, 8.340518, 59.81413],
        "ean_mean": [3.643033, 3.485336, 3.58267, 3.754286, 3.096603, 3.418077, 4.170259, 3.738383],
        "reap": [1.871448, 1.611732, 1.605679, 2.008402, 1.550777, 1.396145, 1.437701, 2.112471],
        "reap_sum": [82.343716, 46.740229, 27.296548, 54.226861, 52.726413, 15.357589, 2.875401, 33.799535]},
    "model.layers.1.mlp": {
        "frequency": [21, 11, 10, 29, 2, 9, 27, 71],
        "router_weight": [9.287967, 3.488663, 4.595883, 14.427305, 0.797711, 4.876025, 10.423949, 42.102495],
        "ean": [55.574065, 29.51456, 24.018569, 76.746487, 2.868788, 38.031826, 64.155683, 211.067313],
        "ean_mean": [2.646384, 2.683142, 2.401857, 2.64643, 1.434394, 4.225759, 2.376137, 2.972779],
        "reap": [1.199926, 0.887103, 1.093632, 1.311497, 0.590714, 2.406468, 1.022011, 1.796221],
        "reap_sum": [25.198439, 9.758136, 10.936323, 38.033423, 1.181428, 21.658211, 27.594305, 127.531664]}}


def two_batches():
    lengths = torch.tensor([9, 6, 3])
    return [ids(6, 12, 1), {"input_ids": ids(3, 9, 2), "attention_mask": (torch.arange(9) < lengths[:, None]).long()}]


def test_scores_are_those_of_the_published_code():
    found = calibrate(tiny("qwen3_moe"), [{"input_ids": two_batches()[0]}, two_batches()[1]])
    for criterion in CRITERIA:
        for name, scores in saliency(found, criterion).items():
            expected = torch.tensor(PUBLISHED[name][criterion], dtype=torch.float64)
            assert torch.allclose(scores, expected, rtol=2e-6, atol=2e-6), (criterion, name)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_loop_over_tokens(kind):
    model, x, calls = tiny(kind), ids(4, 10), {}
    for name, block in moe_blocks(model).items():
        block.experts.register_forward_pre_hook(lambda _, given, name=name: calls.update({name: given}))
    found = calibrate(model, [x], merging=True, keep=25)
    for name, block in moe_blocks(model).items():
        tokens, chosen, weights = calls[name]
        uses = {j: [] for j in range(block.count)}
        outputs = [run_expert(block, j, tokens) for j in range(block.count)]
        for t in range(len(tokens)):
            for j, g in zip(chosen[t].tolist(), weights[t].tolist()):
                uses[j].append((g, math.sqrt(sum(value**2 for value in outputs[j][t].tolist()))))
        for j, own in uses.items():
            sums = len(own), sum(g for g, _ in own), sum(f for _, f in own), sum(g * f for g, f in own)
            assert [float(part[j]) for part in found[name][1:5]] == pytest.approx(sums, rel=1e-12)
            assert saliency(found, "reap")[name][j] == pytest.approx(sums[3] / max(1, sums[0]), rel=1e-12)
        assert torch.allclose(found[name].outputs, torch.stack([one.mean(0) for one in outputs]))
        router = block.router(tokens)[0].double()
        assert torch.allclose(found[name].logits, router.T @ router)
        assert torch.equal(found[name].x, tokens[:25]) and torch.equal(found[name].chosen, chosen[:25])
        assert found[name].tokens == 40 and found[name].counts.sum() == 40 * block.top_k


def test_batches_of_unlike_size_and_padding_change_nothing():
    model, x = tiny("moe"), ids(7, 12)
    whole = calibrate(model, x, merging=True)
    padded = torch.cat([x, torch.full((7, 0), 39)], 1).clone()
    padded[:, 8:] = 39  # padding follows, and attention looks back only
    parts = {"unlike batches": ([x[:1], x[1:6], x[6:]], None, whole),
             "padding": (padded, 39, calibrate(model, x[:, :8][(x[:, :8] != 39).all(1)], merging=True))}
    clean = padded[(padded[:, :8] != 39).all(1)]
    parts["padding"] = (clean, 39, parts["padding"][2])
    for batches, padding, expected in parts.values():
        found = calibrate(model, batches, padding=padding, merging=True)
        for name in found:
            assert found[name].tokens == expected[name].tokens
            for a, b in zip(found[name][1:7], expected[name][1:7]):
                assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)
    counted = calibrate(model, clean)
    assert not torch.allclose(counted["blocks.0.mixture"].counts, found["blocks.0.mixture"].counts)


def test_the_model_and_its_hooks_are_left_as_they_were():
    model = tiny("mixtral").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, [{"input_ids": ids()}], merging=True)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_expert_without_tokens_is_named_and_has_the_score_0():
    model = tiny("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[5] = -1e6
    with pytest.warns(UserWarning, match=r"no calibration token .* scores are therefore 0: model.layers.1.mlp: \[5\]$"):
        found = calibrate(model, [ids(20, 12)])
    for criterion in CRITERIA:
        scores = saliency(found, criterion)["model.layers.1.mlp"]
        assert scores[5] == 0 and scores.isfinite().all() and (scores > 0).sum() == 7


def test_refusals():
    model = tiny("moe")
    with pytest.raises(ValueError, match="all 24 tokens of a batch are padding"):
        calibrate(model, torch.full((2, 12), 3), padding=3)
    with pytest.raises(ValueError, match="unknown criterion 'raep', perhaps 'reap': expected one of frequency, "):
        saliency({}, "raep")
    with torch.no_grad():
        model.blocks[1].mixture.router.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weights that 'blocks.1.mixture' gives to its experts are not finite"):
        calibrate(model, ids())
    with pytest.raises(ValueError, match="has no experts"):
        calibrate(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def test_all_70_pairs_of_halves_the_sum_form_is_among_the_best():
    """Of 8 experts, every choice of 4 is tried: the error of a criterion's choice lies where its rank says."""
    model, x = tiny("moe", top_k=2), ids(16, 12, 3)
    name, seen = "blocks.0.mixture", {}
    hook = model.blocks[0].mixture.register_forward_pre_hook(lambda _, given: seen.update(h=given[0]))
    logits(model, x)
    hook.remove()
    with torch.no_grad():
        whole = model.blocks[0].mixture(seen["h"])
        errors = {}
        for kept in itertools.combinations(range(8), 4):
            pruned = select_experts(model, {name: torch.tensor(kept)}).blocks[0].mixture
            errors[kept] = float((pruned(seen["h"]) - whole).square().sum(-1).mean())
        alone = [float((select_experts(model, {name: torch.tensor([i for i in range(8) if i != j])}).blocks[0].mixture(
            seen["h"]) - whole).square().sum(-1).mean()) for j in range(8)]
    assert len(errors) == 70 and len({*errors.values()}) == 70
    scores = {criterion: saliency(calibrate(model, x), criterion)[name] for criterion in CRITERIA}
    ranks = {}
    for criterion, own in scores.items():
        kept = tuple(sorted(own.argsort(descending=True)[:4].tolist()))
        ranks[criterion] = sorted(errors.values()).index(errors[kept])
    assert ranks["reap_sum"] < 10, ranks
    assert spearmanr(scores["reap_sum"], alone).statistic > 0.8
    assert spearmanr(scores["reap_sum"], alone).statistic > spearmanr(scores["ean_mean"], alone).statistic


def test_no_warning_if_every_expert_is_reached():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibrate(tiny("moe"), ids(40, 12))
    assert all((one.counts > 0).all() for one in found.values())
