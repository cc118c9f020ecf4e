"""Published architectures of transformers and timm, small and with random weights: all of their units are found."""

import pytest
import torch
from torch import nn

from permask_core.matching import check_function, derangements, draw_weights, function_change, permutation_groups
from permask_core.models.vision import torchvision  # noqa: F401, before timm and transformers, which import it

TOKENS = torch.tensor([[1, 5, 7, 3, 2, 9]])
SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 32}


class Logits(nn.Module):
    """A network of transformers, with its logits as the only result."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(use_cache=False, **inputs).logits


def of_transformers(name, inputs=None, **sizes):
    import transformers

    kind = getattr(transformers, name)
    return Logits(kind(kind.config_class(**sizes))), inputs or {"input_ids": TOKENS}


def of_timm(name, side, evaluated=False, **sizes):
    import timm

    model, x = timm.create_model(name, **sizes), torch.randn(1, 3, side, side)
    if evaluated:
        model.eval()(x)
    return model, x


# A layer has a multilayer perceptron, heads, and in each head the dimensions of queries and keys, and those of values.
# Rotary embeddings fix the order of the former; queries that share keys and values are not exchanged.
ROTARY, PLAIN = 20 + 2 + 2 * 4, 20 + 4 + 4 * (4 + 4)
# Latent attention has the dimensions of two latent vectors and, in each head, those of queries and keys without
# rotation and those of values. All heads share the rotated part of the keys, whose order is fixed.
LATENT = {**GROUPED, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 6, "v_head_dim": 5, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
          "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7, "n_shared_experts": 1}
DEEPSEEK = 16 + 2 * (12 + 8 + 4 + 4 * (6 + 5)) + 20 + 7 + 7
NETWORKS = {
    "llama": (16 + 2 * ROTARY, lambda: of_transformers("LlamaForCausalLM", **GROUPED)),
    "mistral": (16 + 2 * ROTARY, lambda: of_transformers("MistralForCausalLM", **GROUPED, sliding_window=4)),
    "qwen3": (16 + 2 * ROTARY, lambda: of_transformers("Qwen3ForCausalLM", **GROUPED, head_dim=4)),
    "gemma2": (16 + 2 * ROTARY, lambda: of_transformers("Gemma2ForCausalLM", **GROUPED, head_dim=4)),
    "mixtral": (16 + 2 * ROTARY, lambda: of_transformers("MixtralForCausalLM", **GROUPED, num_local_experts=4)),
    "deepseek v2": (DEEPSEEK, lambda: of_transformers("DeepseekV2ForCausalLM", **LATENT)),
    "deepseek v3": (DEEPSEEK, lambda: of_transformers("DeepseekV3ForCausalLM", **LATENT)),
    "gpt2": (16 + 2 * PLAIN, lambda: of_transformers(
        "GPT2LMHeadModel", vocab_size=31, n_embd=16, n_layer=2, n_head=4, n_inner=20, n_positions=32, bos_token_id=1,
        eos_token_id=2)),
    "opt": (16 + 2 * PLAIN, lambda: of_transformers("OPTForCausalLM", **SIZES, ffn_dim=20, word_embed_proj_dim=16,
                                         max_position_embeddings=32)),
    "mamba": (16 + 2 * (20 + 4 + 3), lambda: of_transformers("MambaForCausalLM", **SIZES, state_size=4,
                                                               time_step_rank=3)),
    "whisper": (3 * 16 + PLAIN + PLAIN + 4 + 4 * (4 + 4), lambda: of_transformers(
        "WhisperForConditionalGeneration", {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": TOKENS},
        vocab_size=31, num_mel_bins=8, encoder_layers=1, encoder_attention_heads=4, decoder_layers=1,
        decoder_attention_heads=4, encoder_ffn_dim=20, decoder_ffn_dim=20, d_model=16, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)),
    "beit": (24 + 2 * (96 + 4 + 4 * (6 + 6)), lambda: of_timm(
        "beit_base_patch16_224", 32, img_size=32, embed_dim=24, depth=2, num_heads=4)),
    "eva02": (2 * (85 + 4 + 4 * 8), lambda: of_timm(
        "eva02_tiny_patch14_224", 28, img_size=28, embed_dim=32, depth=2, num_heads=4)),
    "levit": (6522, lambda: of_timm("levit_128s", 224, evaluated=True, depth=(1, 1, 1))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_units_of_an_architecture_are_found(name):
    units, make = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = make()
    groups = permutation_groups(model, x)
    assert sum(group.size for group in groups.values()) == units
    assert not [fixed for fixed in groups.fixed if "not supported" in fixed.why]
    assert check_function(groups, model, x) < 1e-9
    copy, permutations = draw_weights(model), derangements(groups)
    outer = [name for name, group in groups.items() if group.within is None]
    one = outer[len(outer) // 2]
    state = model.state_dict(keep_vars=True)
    rest = tuple(e for e in groups[one].entries if state[e.tensor] is not state[groups[one].entries[0].tensor])
    part = {**groups, one: groups[one]._replace(entries=rest)}
    assert function_change(part, {one: permutations[one]}, copy, x) > 1e-2, one
