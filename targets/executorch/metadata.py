"""What a program says of itself, to whoever runs it."""

from __future__ import annotations

from typing import Any

from exporter.spec import ModelSpec


def describe(spec: ModelSpec, *, context: int, longest: int, custom_attention: bool = False) -> dict[str, Any]:
    """The constant methods by which a runner knows the model, under the names that ExecuTorch's own runners read.

    ``longest``: the tokens that one call takes at most; ``get_max_seq_len`` is this true bound. Where that is 1 there
    is no dynamic length. ``custom_attention``: whether attention is ExecuTorch's own ops.
    """
    described: dict[str, Any] = {
        "get_max_seq_len": longest,
        "get_max_context_len": context,
        "get_vocab_size": spec.vocab_size,
        "get_n_layers": spec.num_hidden_layers,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": custom_attention,
        "enable_dynamic_shape": longest > 1,
    }
    if spec.eos_token_ids:
        described["get_eos_ids"] = list(spec.eos_token_ids)
    if spec.bos_token_id is not None:
        described["get_bos_id"] = spec.bos_token_id
    return described
