"""Architectures of the library transformers, with random weights and configurations of few units."""

from functools import partial

import torch

TOKENS = torch.tensor([[1, 5, 7, 3, 9, 4, 11, 2]])
SIZES = {  # those that a configuration has are used
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 31),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim",
                     "projection_dim", "attention_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "hidden_dim", "encoder_ffn_dim",
                     "decoder_ffn_dim", "ffn_hidden_size", "dff", "ffn_embed_dim"), 20),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 4),
    **dict.fromkeys(("d_kv", "head_dim", "attention_head_size"), 4), "num_key_value_heads": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 32), "sliding_window": 4,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    "image_size": 32, "patch_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}
NO_CACHE = {"use_cache": False}


def tiny(name, inputs=None, sizes=None, call=None):
    """Return a model of transformers and the inputs for it, by default tokens."""
    import transformers

    kind = getattr(transformers, name)
    known = kind.config_class().to_dict()
    config = kind.config_class(**{key: size for key, size in SIZES.items() if key in known} | (sizes or {}))
    config._attn_implementation = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"
    return kind(config), {**(inputs or {"input_ids": TOKENS}), **(call or {})}


def image(side=32, channels=3):
    return {"pixel_values": torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))}


def sound(length=400):
    return {"input_values": torch.randn(1, length, generator=torch.Generator().manual_seed(0))}


ENCODER = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
TWO = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4,
       "projection_dim": 16}
DEEPSEEK = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
PYRAMID = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2,
           "patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2],
           "decoder_hidden_size": 16}
STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
WAV = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 5,
       "num_conv_pos_embedding_groups": 2}

encoder, decoder, both = (partial(partial, tiny, call=call, inputs=inputs) for inputs, call in (
    (ENCODER, {}), (None, NO_CACHE), (BOTH, NO_CACHE)))
CLASSIFIERS = {  # of texts
    "Albert": {}, "Bert": {}, "BigBird": {"attention_type": "original_full"}, "ConvBert": {"conv_kernel_size": 3},
    "Deberta": {}, "DebertaV2": {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]},
    "DistilBert": {}, "Electra": {}, "Esm": {"position_embedding_type": "rotary"}, "FNet": {},
    "Funnel": {"block_sizes": [1, 1], "d_head": 4}, "Longformer": {"attention_window": 4}, "MPNet": {},
    "MobileBert": {"true_hidden_size": 16, "intra_bottleneck_size": 16}, "ModernBert": {},
    "Nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8, "conv_kernel_size": 3}, "RoFormer": {},
    "Roberta": {}, "SqueezeBert": {}, "XLMRoberta": {}, "XLNet": {"d_head": 4},
}
IMAGE_CLASSIFIERS = {
    "Beit": (image(), {}), "Bit": (image(), STAGES | {
        "hidden_sizes": [32, 64, 96, 128], "embedding_size": 8, "num_groups": 4}),
    "ConvNext": (image(64), STAGES), "ConvNextV2": (image(64), STAGES),
    "DeiT": (image(), {}), "Dinov2": (image(), {}), "FocalNet": (image(), {
        "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3],
        "patch_size": 4}),
    "Hiera": (image(64), {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1],
                          "num_heads": [1, 2, 4, 8], "patch_size": [7, 7]}),
    "MobileViT": (image(64), {"image_size": 64, "hidden_sizes": [16, 24, 32], "patch_size": 2,
                              "neck_hidden_sizes": [8, 8, 12, 16, 16, 20, 24]}),
    "PoolFormer": (image(64), STAGES), "RegNet": (image(), STAGES | {"embedding_size": 8, "groups_width": 4}),
    "ResNet": (image(), STAGES | {"embedding_size": 8}), "Segformer": (image(64), PYRAMID),
    "Swin": (image(), {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4}),
    "Swinv2": (image(), {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 4}),
    "ViT": (image(), {}),
}
ARCHITECTURES = {f"{name}ForSequenceClassification": encoder(f"{name}ForSequenceClassification", sizes=sizes)
                 for name, sizes in CLASSIFIERS.items()}
ARCHITECTURES |= {name: make(name, sizes=sizes) for make, names in {
    decoder: {"BambaForCausalLM": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
                                   "attn_layer_indices": [1]},
              "BioGptForCausalLM": {}, "BloomForCausalLM": {}, "CTRLLMHeadModel": {}, "CodeGenForCausalLM": {
                  "rotary_dim": 4}, "CohereForCausalLM": {}, "DeepseekV2ForCausalLM": DEEPSEEK,
              "DeepseekV3ForCausalLM": DEEPSEEK, "FalconForCausalLM": {"num_kv_heads": 4}, "GPT2LMHeadModel": {},
              "GPTBigCodeForCausalLM": {}, "GPTJForCausalLM": {"rotary_dim": 4},
              "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
              "GPTNeoXForCausalLM": {}, "Gemma2ForCausalLM": {}, "Gemma3ForCausalLM": {}, "GemmaForCausalLM": {},
              "GptOssForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
              "GraniteForCausalLM": {}, "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1,
                                                             "mamba_d_state": 4, "mamba_dt_rank": 3},
              "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"]}, "LlamaForCausalLM": {},
              "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 4, "state_size": 4, "n_groups": 1, "chunk_size": 4},
              "MambaForCausalLM": {"state_size": 4, "time_step_rank": 3}, "MistralForCausalLM": {},
              "MixtralForCausalLM": {}, "MptForCausalLM": {}, "NemotronForCausalLM": {}, "OPTForCausalLM": {},
              "Olmo2ForCausalLM": {}, "OlmoForCausalLM": {}, "OlmoeForCausalLM": {}, "Phi3ForCausalLM": {},
              "PhiForCausalLM": {}, "Qwen2ForCausalLM": {}, "Qwen2MoeForCausalLM": {}, "Qwen3ForCausalLM": {},
              "Qwen3MoeForCausalLM": {}, "Qwen3NextForCausalLM": {
                  "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 4,
                  "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
              "RecurrentGemmaForCausalLM": {"lru_width": 16, "block_types": ["recurrent", "attention"]},
              "RwkvForCausalLM": {"rescale_every": 0},
              "SmolLM3ForCausalLM": {}, "StableLmForCausalLM": {}, "Starcoder2ForCausalLM": {}},
    # An encoder and a decoder
    both: {"BartForConditionalGeneration": {}, "LEDForConditionalGeneration": {"attention_window": [4],
           "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32},
           "LongT5ForConditionalGeneration": {}, "MarianMTModel": {"decoder_start_token_id": 1},
           "PegasusForConditionalGeneration": {}, "SwitchTransformersForConditionalGeneration": {},
           "T5ForConditionalGeneration": {}},
}.items() for name, sizes in names.items()}
ARCHITECTURES |= {f"{name}ForImageClassification": partial(tiny, f"{name}ForImageClassification", inputs, sizes)
                  for name, (inputs, sizes) in IMAGE_CLASSIFIERS.items()}
ARCHITECTURES |= {name: partial(tiny, name, inputs, sizes) for name, (inputs, sizes) in {
    "YolosForObjectDetection": (image(), {"image_size": [32, 32], "num_detection_tokens": 4}),
    "ASTForAudioClassification": ({
        "input_values": torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(0))}, {
        "max_length": 40, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4}),
    "HubertForCTC": (sound(), WAV), "Wav2Vec2ForCTC": (sound(), WAV), "WavLMForCTC": (sound(), WAV),
    "WhisperForConditionalGeneration": ({
        "input_features": torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0)),
        "decoder_input_ids": TOKENS}, {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12,
                                       "decoder_start_token_id": 1}),
    "PatchTSTModel": ({"past_values": torch.randn(1, 16, 2, generator=torch.Generator().manual_seed(0))},
                      {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4}),
    "CLIPModel": (image() | {"input_ids": TOKENS}, {
        "text_config": TWO | {"vocab_size": 31, "max_position_embeddings": 32, "eos_token_id": 2},
        "vision_config": TWO | {"image_size": 32, "patch_size": 8}, "projection_dim": 16}),
    "SiglipModel": (image() | {"input_ids": TOKENS}, {
        "text_config": TWO | {"vocab_size": 31, "max_position_embeddings": 32, "projection_size": 16},
        "vision_config": TWO | {"image_size": 32, "patch_size": 8}}),
    "ViltModel": (image() | {"input_ids": TOKENS}, {"modality_type_vocab_size": 2, "max_image_length": -1}),
}.items()}
