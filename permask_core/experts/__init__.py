"""Experts of mixture-of-experts models: how important each is, and how to prune, align and merge them.

Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", ICLR 2026. The functions work on
the network ``moe`` of this library and on Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3, GLM-4-MoE and gpt-oss of
transformers 5; :class:`Layout` describes others.
"""

from permask_core.experts.alignment import align_expert, balance_units, unit_correlations
from permask_core.experts.layout import (
    LAYOUTS,
    Block,
    Expert,
    Layout,
    expert_tensors,
    moe_blocks,
    run_expert,
    unit_groups,
)
from permask_core.experts.merging import (
    best_mixture,
    clusters_by_logits,
    clusters_by_outputs,
    clusters_by_score,
    gates_and_outputs,
    merge_experts,
    mixture_error,
    mixture_weights,
)
from permask_core.experts.pruning import prune_experts, select_experts
from permask_core.experts.saliency import CRITERIA, Statistics, calibrate, saliency

__all__ = ["CRITERIA", "LAYOUTS", "Block", "Expert", "Layout", "Statistics", "align_expert", "balance_units",
           "best_mixture", "calibrate", "clusters_by_logits", "clusters_by_outputs", "clusters_by_score",
           "expert_tensors", "gates_and_outputs", "merge_experts", "mixture_error", "mixture_weights", "moe_blocks",
           "prune_experts", "run_expert", "saliency", "select_experts", "unit_correlations", "unit_groups"]
