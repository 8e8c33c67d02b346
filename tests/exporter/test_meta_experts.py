"""Llama 4 in Meta's layout: what transformers has, joined, stacked and cut as Meta released it, is the same model."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporter.checkpoint import open_checkpoint, read_spec
from exporter.checkpoint.meta_tokenizer import SPECIAL_TOKENS4, write_tokenizer
from exporter.errors import InputError
from exporter.spec import RopeKind
from exporter.tokenizer import Tokenizer
from tests.conftest import Toy, write_toy
from tests.exporter.test_llama4 import IDS, logits_of
from tests.generations import toy_config

WHOLE, ROWS, COLUMNS = None, 0, 1
PLAIN = {
    "input_layernorm.weight": ("attention.wqkv.layer_norm_weight", WHOLE),
    "self_attn.o_proj.weight": ("attention.wo.weight", COLUMNS),
    "feed_forward.down_proj.weight": ("feed_forward.mlp.fc2_weight", COLUMNS),
    "feed_forward.shared_expert.gate_proj.weight": ("feed_forward.w_in_shared_FD.weight", ROWS),
    "feed_forward.shared_expert.up_proj.weight": ("feed_forward.w_swiglu_FD.weight", ROWS),
    "feed_forward.shared_expert.down_proj.weight": ("feed_forward.w_out_shared_DF.weight", COLUMNS),
}
"""transformers, models/llama4/convert_llama4_weights_to_hf.py: names, and along which axis shards are put together."""
ENDS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Of the embedding a shard has rows."""


def sharded(toy: Toy, *, shards: int) -> list[dict[str, Any]]:
    """Of each rank of model parallelism, its tensors. Rows of queries and keys stay: Hugging Face's Llama 4 turns
    the same pairs as Meta's."""
    weights = {name.removeprefix("language_model."): weight for name, weight in toy.model.state_dict().items()}
    found: list[dict[str, Any]] = [{"rope.freqs": torch.ones(16)} for _ in range(shards)]

    def put(name: str, parts: list[Tensor]) -> None:
        for shard, part in zip(found, parts, strict=True):
            shard[name] = part.clone()

    for theirs, ours in ENDS.items():
        whole = theirs == "norm.weight"
        put(theirs, [weights[ours]] * shards if whole else list(weights[ours].chunk(shards)))
    for index in range(toy.model.config.get_text_config().num_hidden_layers):
        layer, theirs = f"model.layers.{index}.", f"layers.{index}."
        for name, (told, axis) in PLAIN.items():
            weight = weights.get(layer + name)
            if weight is not None:
                put(theirs + told, [weight] * shards if axis is WHOLE else list(weight.chunk(shards, dim=axis)))
        cut = [weights[f"{layer}self_attn.{letter}_proj.weight"].chunk(shards) for letter in "qkv"]
        put(f"{theirs}attention.wqkv.weight", [torch.cat(parts) for parts in zip(*cut, strict=True)])
        norm = weights[f"{layer}post_attention_layernorm.weight"]
        if f"{layer}feed_forward.router.weight" not in weights:
            gates = [weights[f"{layer}feed_forward.{part}_proj.weight"].chunk(shards) for part in ("gate", "up")]
            put(f"{theirs}feed_forward.mlp.fc1_weight", [torch.cat(parts) for parts in zip(*gates, strict=True)])
            put(f"{theirs}feed_forward.mlp.layer_norm_weight", [norm] * shards)
            continue
        put(f"{theirs}feed_forward.norm.weight", [norm] * shards)
        put(f"{theirs}feed_forward.router_DE", [weights[f"{layer}feed_forward.router.weight"].T] * shards)
        put(f"{theirs}feed_forward.global_gate_stats_3E", [torch.zeros(3, 4)] * shards)
        gate, up = weights[f"{layer}feed_forward.experts.gate_up_proj"].chunk(2, dim=2)
        down = weights[f"{layer}feed_forward.experts.down_proj"]
        for told, stack, axis in (("in_eD_F", gate, 2), ("swiglu_eD_F", up, 2), ("out_eF_D", down, 1)):
            parts = [part.reshape(-1, part.shape[2]) for part in stack.chunk(shards, dim=axis)]
            put(f"{theirs}feed_forward.experts.moe_w_{told}", parts)
    for shard in found:
        shard["layers.0.attention.wo._extra_state"] = io.BytesIO(b"of TransformerEngine")
    return found


def params_of(toy: Toy) -> dict[str, Any]:
    """int(0.9 * int(8 * 64 / 3)) is 153: of 32 the next multiple is 160, and of half of it 96."""
    config = toy.model.config.get_text_config()
    rope = config.rope_parameters
    assert (config.hidden_size, config.intermediate_size, config.intermediate_size_mlp) == (64, 96, 160)
    return {
        **{"dim": 64, "ffn_exp": 4.0, "ffn_dim_multiplier": 0.9, "multiple_of": 32, "norm_eps": config.rms_norm_eps},
        **{
            "n_layers": config.num_hidden_layers,
            "n_heads": config.num_attention_heads,
            "vocab_size": config.vocab_size,
        },
        **{"n_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "rope_theta": rope["rope_theta"]},
        **{"use_scaled_rope": rope["rope_type"] == "llama3", "use_qk_norm": config.use_qk_norm},
        **{"attention_chunk_size": config.attention_chunk_size, "nope_layer_interval": 2},
        **{"attn_temperature_tuning": bool(config.attn_temperature_tuning), "attn_scale": config.attn_scale},
        **{"floor_scale": float(config.floor_scale), "max_seq_len": config.max_position_embeddings},
        "moe_args": {
            **{"num_experts": config.num_local_experts, "top_k": config.num_experts_per_tok, "auto_scale_F": True},
            **{"capacity_factor": 1.0, "interleave_moe_layer_step": config.interleave_moe_layer_step},
        },
    }


def write_meta_experts(toy: Toy, folder: Path, *, shards: int = 2, **params: Any) -> Path:
    """``params``: fields of params.json over those of the toy, None removes one."""
    folder.mkdir()
    described = {field: value for field, value in {**params_of(toy), **params}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(described))
    for index, shard in enumerate(sharded(toy, shards=shards)):
        torch.save(shard, folder / f"consolidated.{index:02}.pth")
    return folder


def toy_of(generation: str, folder: Path, **changes: Any) -> Toy:
    """Meta's layout knows one original length of a scaled RoPE."""
    config = toy_config(generation)
    rope = dict(config["rope_parameters"])
    if rope["rope_type"] == "llama3":
        rope["original_max_position_embeddings"] = 8192
    return write_toy(folder, **config | {"rope_parameters": rope} | changes)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("generation", ["Llama 4 Scout", "Llama 4 Maverick"])
def test_the_model_answers_as_transformers(generation: str, shards: int, tmp_path: Path) -> None:
    toy = toy_of(generation, tmp_path / "toy", tie_word_embeddings=False)
    folder = write_meta_experts(toy, tmp_path / "meta", shards=shards)
    with torch.no_grad():
        expected = toy.model(torch.tensor([IDS])).logits[0]
    assert (logits_of(folder) - expected).abs().max() < 1e-4
    meta, huggingface = open_checkpoint(folder), open_checkpoint(toy.folder)
    for name in meta.spec.weights():
        assert torch.equal(meta.read(name), huggingface.read(name)), name


def test_params_of_the_releases_are_their_models(tmp_path: Path) -> None:
    """Sizes of config.json of Scout and Maverick in Hugging Face layout."""
    sizes = {"dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202_048, "multiple_of": 2048}
    sizes |= {"ffn_dim_multiplier": 1.2, "ffn_exp": 4.0, "norm_eps": 1e-5, "rope_theta": 5e5}  # type: ignore[dict-item]
    both = {**sizes, "attention_chunk_size": 8192, "nope_layer_interval": 4}
    scout = {**both, "use_scaled_rope": True, "use_qk_norm": True, "moe_args": {"num_experts": 16}}
    maverick = {**both, "moe_args": {"num_experts": 128, "interleave_moe_layer_step": 2}}
    for params, count, step in ((scout, 16, 1), (maverick, 128, 2)):
        (tmp_path / "params.json").write_text(json.dumps(params))
        spec = read_spec(tmp_path)
        assert spec.experts is not None
        assert (spec.intermediate_size, spec.experts.intermediate_size_mlp, spec.head_dim) == (8192, 16384, 128)
        assert (spec.experts.num_local_experts, spec.experts.num_experts_per_tok) == (count, 1)
        assert spec.experts.moe_layers == tuple(range(step - 1, 48, step))
        assert spec.attention.unrotated_layers == tuple(range(3, 48, 4))
        assert spec.attention.chunk(0) == 8192
        assert (spec.bos_token_id, spec.eos_token_ids) == (200_000, (200_001, 200_007, 200_008))
    (tmp_path / "params.json").write_text(json.dumps(scout))
    rope = read_spec(tmp_path).rope
    assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == (RopeKind.LLAMA3, 16, 1, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moe_args": {"num_experts": 4, "shared": 2}}, "moe_args is .*; known: an object with auto_scale_F, "),
        ({"moe_args": {"top_k": 1}}, "num_experts is missing, a positive integer was expected"),
        ({"moe_args": {"num_experts": 3}}, r"moe_w_in_eD_F has shape \[256, 48\], whose 256 rows are no 3 equal"),
        ({"moe_args": None}, "attention_chunk_size is 16; known: dim, "),
        ({"ffn_exp": None}, "ffn_exp is missing, a positive number was expected"),
        ({"use_qk_norm": 1}, "use_qk_norm is 1, true or false was expected"),
        ({"n_kv_heads": 4}, r"attention.wqkv.weight has shape \[128, 64\], whose 128 rows are no 12 equal parts"),
        ({"quantization_args": {"scheme": "fp8"}}, "quantization_args is "),
        ({"n_layers": 6}, "missing .*model.layers.5.feed_forward"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = write_meta_experts(toy_of("Llama 4 Scout", tmp_path / "toy"), tmp_path / "meta", **change)
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(folder)


def test_a_shard_without_an_experts_stack_is_told(tmp_path: Path) -> None:
    folder = write_meta_experts(toy_of("Llama 4 Scout", tmp_path / "toy"), tmp_path / "meta")
    with torch.serialization.safe_globals([io.BytesIO]):
        shard = torch.load(folder / "consolidated.01.pth")
    del shard["layers.2.feed_forward.experts.moe_w_out_eF_D"]
    torch.save(shard, folder / "consolidated.01.pth")
    with pytest.raises(InputError, match=r"layers.2.*experts.*is missing in consolidated.01.pth"):
        open_checkpoint(folder)


def test_special_tokens_of_llama4_have_their_places() -> None:
    """As the comments of models/llama4/tokenizer.py of meta-llama/llama-models count them."""
    places = {
        **{"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|fim_suffix|>": 4, "<|header_start|>": 5},
        **{"<|eom|>": 7, "<|eot|>": 8, "<|python_start|>": 16, "<|finetune_right_pad|>": 18},
        **{
            "<|text_post_train_reserved_special_token_68|>": 79,
            "<|image_start|>": 80,
            "<|image|>": 90,
            "<|patch|>": 92,
        },
        **{"<|vision_reserved_special_token_1047|>": 1133, "<|reasoning_reserved_special_token_0|>": 1134},
        **{"<|reasoning_thinking_end|>": 1143, "<|reserved_special_token_0|>": 1144},
    }
    assert {token: SPECIAL_TOKENS4.index(token) for token in places} == places
    assert len(SPECIAL_TOKENS4) == len(set(SPECIAL_TOKENS4)) == 2048


def test_ids_are_those_of_tiktoken(tmp_path: Path) -> None:
    import tiktoken

    pattern = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    words = [bytes(word) for count in (2, 3) for word in itertools.product(b" etaoinsrTON'", repeat=count)]
    tokens = [*(bytes([byte]) for byte in range(256)), *words]
    tokens += [b"\xff" + index.to_bytes(4, "big") for index in range(200_000 - len(tokens))]  # that come of no merge
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / "tokenizer.model").write_bytes(lines)
    write_tokenizer(tmp_path, tmp_path / "made")
    tokenizer = Tokenizer(tmp_path / "made")
    special = {token: 200_000 + index for index, token in enumerate(SPECIAL_TOKENS4)}
    original = tiktoken.Encoding("llama4", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    for text in ("The nATion's 1984  naïve 👍\n\n/usr", " DON'T\t\tsay  it", "<|header_start|>user<|eot|>été ÉTÉ ßx"):
        ids = original.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == [200_000, *ids], text
