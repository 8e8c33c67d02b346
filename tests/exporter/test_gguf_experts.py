"""GGUF files of architecture ``llama4``: stacked experts read one by one, and what no field tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from exporter.checkpoint import LazyCodes, open_checkpoint
from exporter.errors import InputError
from tests.coded import stacked, unstacked
from tests.conftest import Toy, write_toy
from tests.exporter.test_gguf import factors_of
from tests.generations import toy_config

UNTOLD = {"no_rope_layer_interval": 4, "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}
"""Of every file that llama.cpp runs as ``llama4`` (src/models/llama4.cpp)."""
WORDS = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"},
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    **{f"feed_forward.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    **{f"feed_forward.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "feed_forward.router": "ffn_gate_inp",
}
"""llama.cpp, gguf-py/gguf/tensor_mapping.py."""
Quantizer = Callable[[np.ndarray, Kind], np.ndarray]


def write_gguf_experts(
    file: Path, toy: Toy, *, kind: Kind, quantize: Quantizer = gguf.quantize, **fields: Any
) -> dict[str, torch.Tensor]:
    """As conversion/llama.py of llama.cpp writes a Llama 4: rows of queries and keys as in Hugging Face layout, experts
    ``[E, N, K]``, router and norms F32. ``fields`` replace metadata, None removes one. Gives what each weight is."""
    config, rope = toy.model.config, toy.model.config.rope_parameters
    writer = gguf.GGUFWriter(file, "llama4")
    integers = {
        **{"block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings},
        **{"embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size_mlp},
        **{"expert_feed_forward_length": config.intermediate_size, "vocab_size": config.vocab_size},
        **{"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok},
        **{"interleave_moe_layer_step": config.interleave_moe_layer_step, "rope.dimension_count": config.head_dim},
        **{"attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads},
        **{"attention.key_length": config.head_dim, "attention.value_length": config.head_dim},
        **fields,
    }
    for name, value in integers.items():
        if value is not None:
            writer.add_uint32(f"llama4.{name}", value)
    writer.add_float32("llama4.attention.layer_norm_rms_epsilon", float(config.rms_norm_eps))
    writer.add_float32("llama4.rope.freq_base", float(rope["rope_theta"]))
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", factors_of(rope, head_dim=config.head_dim))
    meant, experts = {}, dict[str, list[np.ndarray]]()
    for name, weight in unstacked(dict(toy.model.named_parameters())).items():
        matrix = weight.detach().numpy()
        plain = matrix.ndim == 1 or ".router." in name
        blocks = matrix if plain else quantize(matrix, kind)
        meant[name] = torch.from_numpy(matrix if plain else np.array(gguf.dequantize(blocks, kind), dtype=np.float32))
        place, _, rest = name.partition(".feed_forward.experts.")
        if rest:
            part = rest.split(".")[1].removesuffix("_proj")
            experts.setdefault(f"{place.replace('model.layers', 'blk')}.ffn_{part}_exps.weight", []).append(blocks)
            continue
        renamed = name
        for ours, theirs in WORDS.items():
            renamed = renamed.replace(ours, theirs)
        writer.add_tensor(renamed, blocks, raw_dtype=Kind.F32 if plain else kind)
    for name, every in experts.items():
        writer.add_tensor(name, np.stack(every), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stacked(meant)


@pytest.fixture
def scout(tmp_path: Path) -> Toy:
    return write_toy(tmp_path / "toy", **toy_config("Llama 4 Scout") | UNTOLD)


def test_each_expert_is_a_slice_of_its_stack(scout: Toy, tmp_path: Path) -> None:
    meant = write_gguf_experts(tmp_path / "a.gguf", scout, kind=Kind.Q4_0)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    place = "model.layers.1.feed_forward.experts"
    for expert in range(4):
        up, down = (checkpoint.tensors[f"{place}.{expert}.{part}_proj.weight"] for part in ("up", "down"))
        assert isinstance(up, LazyCodes)
        assert torch.equal(up.coded().dequantize(), meant[f"{place}.gate_up_proj"][expert, :, 96:].T)
        assert torch.equal(down.read(), meant[f"{place}.down_proj"][expert].T)


def test_what_no_field_tells_is_as_llamacpp_has_it(scout: Toy, tmp_path: Path) -> None:
    write_gguf_experts(tmp_path / "a.gguf", scout, kind=Kind.F16)
    attention = open_checkpoint(tmp_path / "a.gguf").spec.attention
    assert (attention.attention_chunk_size, attention.chunked_layers, attention.unrotated_layers) == (
        8192,
        (0, 1, 2, 4),
        (3,),
    )
    assert (attention.floor_scale, attention.attn_scale, attention.use_qk_norm) == (8192, 0.1, True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"expert_count": None}, "llama4.expert_count is missing"),
        ({"expert_count": 5}, "5 missing|experts.4"),
        ({"interleave_moe_layer_step": 2}, "unknown"),
        ({"attention.sliding_window": 0}, "llama4.attention.sliding_window is 0; known: no such field"),
        ({"attention.sliding_window": 4096}, "llama4.attention.sliding_window is 4096; known: "),
        ({"expert_group_count": 2}, "llama4.expert_group_count is 2; known: no such field"),
    ],
)
def test_what_does_not_fit_is_refused(change: Mapping[str, Any], sentence: str, scout: Toy, tmp_path: Path) -> None:
    write_gguf_experts(tmp_path / "a.gguf", scout, kind=Kind.F16, **change)
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(tmp_path / "a.gguf")
