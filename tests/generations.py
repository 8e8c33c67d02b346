"""Every Llama for text that Meta has released, as its ``config.json`` has it, and a small one of each generation.

Figures are those of the model cards and config.json files at https://huggingface.co/meta-llama and, of the first
generation, of Touvron et al. 2023 (arXiv:2302.13971, table 2).
"""

from __future__ import annotations

from typing import Any

_UNSCALED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "tie_word_embeddings": False}


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
    }


def _llama3(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_scaling": {**scaling, "original_max_position_embeddings": 8192}, "max_position_embeddings": 131072}


GENERATIONS: dict[str, dict[str, Any]] = {
    "LLaMA": {**_UNSCALED, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "Llama 2": {**_UNSCALED, "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "Code Llama": {
        **{**_UNSCALED, "vocab_size": 32016, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5},
        "rope_theta": 1e6,
    },
    "Llama 3": {
        **{**_UNSCALED, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
        "rope_theta": 5e5,
    },
    "Llama 3.1": {**_UNSCALED, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5, **_llama3(8.0)},
    "Llama 3.2": {
        **{**_UNSCALED, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5, **_llama3(32.0)},
        "tie_word_embeddings": True,
    },
}
GENERATIONS["Llama 3.3"] = GENERATIONS["Llama 3.1"]
GENERATIONS["Llama Guard 3"] = GENERATIONS["Llama 3.1"]
_LLAMA_4 = {
    **{"attention_bias": False, "hidden_act": "silu", "vocab_size": 202048, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
    **{"head_dim": 128, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_experts_per_tok": 1},
    **{"attention_chunk_size": 8192, "attn_scale": 0.1, "floor_scale": 8192, "no_rope_layers": []},
}
_SCOUT_SCALING = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
GENERATIONS["Llama 4 Scout"] = {
    **{**_LLAMA_4, "num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True},
    **{"attn_temperature_tuning": 4, "max_position_embeddings": 10_485_760},
    "rope_scaling": {**_SCOUT_SCALING, "original_max_position_embeddings": 8192},
}
GENERATIONS["Llama 4 Maverick"] = {
    **{**_LLAMA_4, "num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False},
    **{"attn_temperature_tuning": True, "max_position_embeddings": 1_048_576},
}
GENERATIONS["Llama 3.2 Vision"] = {
    **{"hidden_act": "silu", "tie_word_embeddings": False, "vocab_size": 128256, "rms_norm_eps": 1e-5},
    **{"rope_theta": 5e5, **_llama3(8.0)},
}
"""What all sizes of one have in common."""

SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("LLaMA", "7B"): _shape(4096, 11008, 32, 32),
    ("LLaMA", "13B"): _shape(5120, 13824, 40, 40),
    ("LLaMA", "33B"): _shape(6656, 17920, 60, 52),
    ("LLaMA", "65B"): {**_shape(8192, 22016, 80, 64), "rms_norm_eps": 1e-5},
    ("Llama 2", "7B"): _shape(4096, 11008, 32, 32),
    ("Llama 2", "13B"): _shape(5120, 13824, 40, 40),
    ("Llama 2", "70B"): _shape(8192, 28672, 80, 64, 8),
    ("Code Llama", "7B"): _shape(4096, 11008, 32, 32),
    ("Code Llama", "13B"): _shape(5120, 13824, 40, 40),
    ("Code Llama", "34B"): {**_shape(8192, 22016, 48, 64, 8), "vocab_size": 32000},
    ("Llama 3", "8B"): _shape(4096, 14336, 32, 32, 8),
    ("Llama 3", "70B"): _shape(8192, 28672, 80, 64, 8),
    ("Llama 3.1", "8B"): _shape(4096, 14336, 32, 32, 8),
    ("Llama 3.1", "70B"): _shape(8192, 28672, 80, 64, 8),
    ("Llama 3.1", "405B"): _shape(16384, 53248, 126, 128, 8),
    ("Llama 3.2", "1B"): {**_shape(2048, 8192, 16, 32, 8), "head_dim": 64},
    ("Llama 3.2", "3B"): {**_shape(3072, 8192, 28, 24, 8), "head_dim": 128},
    ("Llama 3.3", "70B"): _shape(8192, 28672, 80, 64, 8),
    ("Llama Guard 3", "1B"): {
        **{**_shape(2048, 8192, 16, 32, 8), "head_dim": 64},
        **{"tie_word_embeddings": True, **_llama3(32.0)},
    },
    ("Llama Guard 3", "8B"): _shape(4096, 14336, 32, 32, 8),
    ("Llama 4 Scout", "17B-16E"): _shape(5120, 8192, 48, 40, 8),
    ("Llama 4 Maverick", "17B-128E"): _shape(5120, 8192, 48, 40, 8),
    ("Llama 3.2 Vision", "11B"): {
        **_shape(4096, 14336, 40, 32, 8),
        "cross_attention_layers": [*range(3, 40, 5)],
    },
    ("Llama 3.2 Vision", "90B"): {
        **_shape(8192, 28672, 100, 64, 8),
        "cross_attention_layers": [*range(3, 100, 5)],
    },
}

_LLAMA_4_VISION = {
    **{"hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34, "num_attention_heads": 16},
    **{"image_size": 336, "patch_size": 14, "pixel_shuffle_ratio": 0.5, "rope_theta": 10000, "norm_eps": 1e-5},
    **{"projector_input_dim": 4096, "projector_output_dim": 4096, "vision_output_dim": 4096, "num_channels": 3},
    **{"hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default"},
}

BILLIONS = {"17B-16E": 109.0, "17B-128E": 400.0}
"""Parameters in all, images included, of sizes whose names tell of those that a token meets."""

TOY_BOUND = 32
"""Positions that a toy was "trained" at, which the tests go beyond: of a scaled one its original length."""


WIDE = {
    **{"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 64},
    **{"vocab_size": 2048, "initializer_range": 0.03},
}
"""Sizes of a toy that is exported with its activations rounded. In a narrower one a rounding falls the other way in few
positions under the noise of the floor, and stays in the cache of all later ones where the runtime has it so: mean KL
7e-4 for a floor of 2e-6, by a single flip. Here there are some in every position of both: 2.1e-4 for 8.2e-5, within 4 %
for three seeds."""


def has_experts(generation: str) -> bool:
    return "num_local_experts" in GENERATIONS[generation]


def sees_images(generation: str) -> bool:
    return generation == "Llama 3.2 Vision"


def config_of(generation: str, size: str) -> dict[str, Any]:
    """The ``config.json`` of a released model."""
    own = {"bos_token_id": 1, "eos_token_id": 2, **GENERATIONS[generation], **SIZES[generation, size]}
    if has_experts(generation):
        return {
            **{"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"},
            **{"text_config": {"model_type": "llama4_text", **own}, "image_token_index": 200092},
            "vision_config": {"model_type": "llama4_vision_model", **_LLAMA_4_VISION},
        }
    if sees_images(generation):
        return {
            **{"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"},
            **{"text_config": {"model_type": "mllama_text_model", **own}, "image_token_index": 128256},
            "vision_config": {"model_type": "mllama_vision_model", "image_size": 560},  # the rest is as usual
        }
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **own}


def toy_config(generation: str, *, heads: int = 4) -> dict[str, Any]:
    """The flags of a generation with sizes of a toy, in the fields of transformers 5; ``write_toy`` gives the rest."""
    flags = dict(GENERATIONS[generation])
    sizes = [shape for (name, _), shape in SIZES.items() if name == generation]
    grouped = any(shape["num_key_value_heads"] < shape["num_attention_heads"] for shape in sizes)
    rope = dict(flags.pop("rope_scaling", {"rope_type": "default"}))
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = TOY_BOUND
    if has_experts(generation):
        flags |= _TOY_EXPERTS
        flags["attn_temperature_tuning"] = bool(flags["attn_temperature_tuning"])  # as transformers 5 wants it
    if sees_images(generation):
        flags |= {"model_type": "mllama_text_model", "num_hidden_layers": 5, "cross_attention_layers": [1, 3]}
    return {
        **flags,
        "vocab_size": 96,
        "max_position_embeddings": 4 * TOY_BOUND,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if grouped else heads,
        "rope_parameters": {**rope, "rope_theta": flags.pop("rope_theta", 1e4)},
    }


def wide_config(generation: str) -> dict[str, Any]:
    """``toy_config`` at a width at which it is exported."""
    config = toy_config(generation, heads=WIDE["num_attention_heads"]) | WIDE
    if has_experts(generation):
        config |= {"intermediate_size": 512, "intermediate_size_mlp": 1536, "num_hidden_layers": 4}
    if sees_images(generation):
        config |= {"num_hidden_layers": 4, "cross_attention_layers": [1]}
    return config


_TOY_EXPERTS = {
    **{"model_type": "llama4_text", "num_local_experts": 4, "intermediate_size": 96, "intermediate_size_mlp": 160},
    **{"head_dim": 32, "num_hidden_layers": 5, "no_rope_layer_interval": 2, "attention_chunk_size": 16},
    **{"floor_scale": 8},
}
"""With and without experts, with and without positions: all four kinds of layer, and several chunks."""

TOY_VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "attention_heads": 2, "num_hidden_layers": 4},
    **{"num_global_layers": 2, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [1, 2]},
    **{"vision_output_dim": 96, "initializer_range": 0.2},
}
"""Of a toy that sees images: tiles of four patches."""

TOY_FUSION = {
    **{"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2},
    **{"image_size": 56, "patch_size": 14, "projector_input_dim": 48, "projector_output_dim": 48},
    **{"vision_output_dim": 48, "initializer_range": 0.2},
}
"""The same of Llama 4: four states of four patches each."""

PROCESSOR = {
    **{"do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True},
    **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    **{"max_image_tiles": 4, "resample": 2, "rescale_factor": 1 / 255, "size": {"height": 560, "width": 560}},
    "image_processor_type": "MllamaImageProcessor",
}
"""The ``preprocessor_config.json`` of Llama 3.2 Vision."""

FUSION_PROCESSOR = {
    **{"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "max_patches": 16},
    **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 1 / 255},
    **{"resize_to_max_canvas": False, "size": {"height": 336, "width": 336}},
    **{"image_processor_type": "Llama4ImageProcessorFast", "processor_class": "Llama4Processor"},
}
"""The same of Llama 4."""
