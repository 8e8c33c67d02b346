"""Every dense Llama that Meta has released, as its ``config.json`` has it, and a small one of each generation.

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
}

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


def config_of(generation: str, size: str) -> dict[str, Any]:
    """The ``config.json`` of a released model."""
    common = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
    return {**common, **GENERATIONS[generation], **SIZES[generation, size]}


def toy_config(generation: str, *, heads: int = 4) -> dict[str, Any]:
    """The flags of a generation with sizes of a toy, in the fields of transformers 5; ``write_toy`` gives the rest."""
    flags = dict(GENERATIONS[generation])
    sizes = [shape for (name, _), shape in SIZES.items() if name == generation]
    grouped = any(shape["num_key_value_heads"] < shape["num_attention_heads"] for shape in sizes)
    rope = dict(flags.pop("rope_scaling", {"rope_type": "default"}))
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = TOY_BOUND
    return {
        **flags,
        "vocab_size": 96,
        "max_position_embeddings": 4 * TOY_BOUND,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if grouped else heads,
        "rope_parameters": {**rope, "rope_theta": flags.pop("rope_theta", 1e4)},
    }
