"""Tiny models with experts, float64, with every tensor drawn so that each matters."""

import pytest
import torch

from permask_core.models import build_model

KINDS = ("moe", "gelu", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
HIDDEN, TOKENS = 32, 40  # of a token; number of token ids
COMMON = {"vocab_size": TOKENS, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "num_experts_per_tok": 2}


def config(kind, experts=8, **changes):
    """A tiny configuration of transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("permask_core.models.vision")  # before the models of transformers, which import torchvision
    kinds = {
        "mixtral": ("MixtralConfig", {"num_local_experts": experts, "intermediate_size": 24}),
        "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": experts, "moe_intermediate_size": 24, "intermediate_size": 48,
                                         "norm_topk_prob": True, "head_dim": 16}),
        "olmoe": ("OlmoeConfig", {"num_experts": experts, "intermediate_size": 24, "norm_topk_prob": False}),
        "deepseek_v3": ("DeepseekV3Config", {
            "n_routed_experts": experts, "moe_intermediate_size": 24, "intermediate_size": 48, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3, "q_lora_rank": 8, "kv_lora_rank": 8,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "n_shared_experts": 1,
            "routed_scaling_factor": 2.5}),
        "gpt_oss": ("GptOssConfig", {"num_local_experts": experts, "intermediate_size": 24, "head_dim": 16,
                                     "layer_types": ["full_attention", "full_attention"]}),
    }
    name, own = kinds[kind]
    return getattr(transformers, name)(**COMMON | own | changes)


def tiny(kind, experts=8, seed=0, **changes):
    """A tiny model of a kind, in evaluation mode."""
    if kind in ("moe", "gelu"):
        model = build_model("moe", (12,), TOKENS, width=0.5, layers=2, experts=experts, units=24, gated=kind == "moe",
                            **changes)
    else:
        from transformers import AutoModelForCausalLM

        # The faster implementations of experts know no float64.
        model = AutoModelForCausalLM.from_config(config(kind, experts, **changes), experts_implementation="eager")
    generator, model = torch.Generator().manual_seed(seed), model.double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in name:
                scale = 0.3 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale
                tensor.copy_(drawn + ("norm" in name and tensor.ndim == 1))
                if "correction" in name:
                    tensor.copy_(drawn / 10)
    return model


def ids(n=6, length=12, seed=1):
    return torch.randint(TOKENS, (n, length), generator=torch.Generator().manual_seed(seed))


def logits(model, x):
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits
