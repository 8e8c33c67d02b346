"""``genai_config.json``: what onnxruntime-genai wants to know of a model folder before it loads it."""

from __future__ import annotations

from typing import Any

from exporter.spec import ModelSpec


def genai_config(spec: ModelSpec, *, context: int, filename: str) -> dict[str, Any]:
    """The configuration of one decoder whose past and present share a cache; greedy unless the app says otherwise."""
    stops = list(spec.eos_token_ids)
    return {
        "model": {
            "bos_token_id": spec.bos_token_id,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": spec.head_dim,
                "hidden_size": spec.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": spec.num_attention_heads,
                "num_hidden_layers": spec.num_hidden_layers,
                "num_key_value_heads": spec.num_key_value_heads,
            },
            "eos_token_id": stops,
            "pad_token_id": stops[0] if stops else 0,
            "type": "llama",
            "vocab_size": spec.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
