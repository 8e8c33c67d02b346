"""Llama 4 in Meta's layout: what ``params.json`` says of attention and experts, and the tensors of a shard, which lie
joined and stacked, apart and under the names of Hugging Face.

meta-llama/llama-models, models/llama4: args.py, model.py, moe.py and ffn.py, whose hooks tell how what was released is
loaded; transformers, models/llama4/convert_llama4_weights_to_hf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from exporter.checkpoint import meta_fusion
from exporter.checkpoint.config import count_of, integer_of, number_of
from exporter.checkpoint.tensors import LazyTensor, ViewedTensor
from exporter.errors import InputError
from exporter.spec import AttentionSpec, ExpertSpec, ModelSpec, RopeKind, RopeSpec

FIELDS = {
    *("moe_args", "ffn_exp", "nope_layer_interval", "attention_chunk_size", "use_qk_norm", meta_fusion.ARGS),
    *("attn_temperature_tuning", "floor_scale", "attn_scale", "rope_scaling_factor", "rope_high_freq_factor"),
}
"""Of params.json, beside those of all generations."""
_OF_EXPERTS = {"num_experts", "capacity_factor", "auto_scale_F", "top_k", "interleave_moe_layer_step"}

POSITIONS = 262_144
"""Where params.json tells none: what all of them were trained for. The 1M and 10M of the instruct models are in
config.json of the other layout alone (``max_context_length`` of its conversion)."""
_CHECK = "check params.json against the original model's"

_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wqkv.layer_norm_weight": "input_layernorm.weight",
    **{f"attention.w{letter}.weight": f"self_attn.{letter}_proj.weight" for letter in "qkvo"},
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.norm.weight": "post_attention_layernorm.weight",
    "feed_forward.mlp.layer_norm_weight": "post_attention_layernorm.weight",
    "feed_forward.mlp.fc2_weight": "feed_forward.down_proj.weight",
    "feed_forward.w1.weight": "feed_forward.gate_proj.weight",
    "feed_forward.w2.weight": "feed_forward.down_proj.weight",
    "feed_forward.w3.weight": "feed_forward.up_proj.weight",
    "feed_forward.w_in_shared_FD.weight": "feed_forward.shared_expert.gate_proj.weight",
    "feed_forward.w_out_shared_DF.weight": "feed_forward.shared_expert.down_proj.weight",
    "feed_forward.w_swiglu_FD.weight": "feed_forward.shared_expert.up_proj.weight",
}
_STACKED = {"moe_w_in_eD_F": "gate_proj", "moe_w_out_eF_D": "down_proj", "moe_w_swiglu_eD_F": "up_proj"}
_EXPERTS, _ROUTER = "feed_forward.experts.", "feed_forward.router_DE"
_PASSED_OVER = re.compile(
    r"rope\.freqs|freq_cis|.*\.(_extra_state|global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)"
)
"""Of training, or following from params.json."""
_OF_IMAGES = ("vision_embeddings.", "vision_projection.")


def read_attention(path: Path, params: Mapping[str, Any]) -> AttentionSpec:
    """Raises InputError."""
    layers = range(count_of(path, params, "n_layers"))
    interval = integer_of(path, {"nope_layer_interval": len(layers) + 1, **params}, "nope_layer_interval")
    rotated = tuple(layer for layer in layers if (layer + 1) % interval)
    chunk = integer_of(path, params, "attention_chunk_size") if "attention_chunk_size" in params else 0
    tuned = _truth_of(path, params, "attn_temperature_tuning", usual=False)
    scales = {"floor_scale": 8192.0, "attn_scale": 0.1, **params}
    return AttentionSpec(
        attention_chunk_size=chunk,
        chunked_layers=rotated if chunk else (),
        unrotated_layers=tuple(layer for layer in layers if layer not in rotated),
        use_qk_norm=_truth_of(path, params, "use_qk_norm", usual=False),
        floor_scale=int(number_of(path, scales, "floor_scale")) if tuned else 0,
        attn_scale=number_of(path, scales, "attn_scale") if tuned else 0.0,
    )


def read_experts(path: Path, params: Mapping[str, Any], *, dense: int) -> ExpertSpec:
    """``dense``: the size inside of MLPs that are no experts. Raises InputError."""
    found = _expert_args(path, params)
    step, layers = integer_of(path, found, "interleave_moe_layer_step"), count_of(path, params, "n_layers")
    return ExpertSpec(
        num_local_experts=integer_of(path, found, "num_experts"),
        num_experts_per_tok=integer_of(path, found, "top_k"),
        moe_layers=tuple(range(step - 1, layers, step)),
        intermediate_size_mlp=dense,
    )


def intermediate_size(path: Path, params: Mapping[str, Any]) -> int:
    """Of an expert (moe.py, ``MoE``, whose ``hidden_dim`` comes in as ``ffn_exp`` times ``dim``). Raises InputError."""
    found = _expert_args(path, params)
    hidden = int(2 * int(number_of(path, params, "ffn_exp") * integer_of(path, params, "dim")) / 3)
    hidden = int(number_of(path, params, "ffn_dim_multiplier") * hidden)
    if _truth_of(path, found, "auto_scale_F", usual=True):
        hidden = int(hidden / (number_of(path, found, "capacity_factor") + 1))
    return hidden + -hidden % integer_of(path, params, "multiple_of")


def read_rope(path: Path, params: Mapping[str, Any], *, theta: float) -> RopeSpec:
    """A scaled one: args.py, ``validate``, and model.py, ``apply_scaling``. Raises InputError."""
    found = {"rope_scaling_factor": 16.0, "rope_high_freq_factor": 1.0, **params}
    return RopeSpec(
        theta=theta,
        kind=RopeKind.LLAMA3,
        factor=number_of(path, found, "rope_scaling_factor"),
        low_freq_factor=1.0,
        high_freq_factor=number_of(path, found, "rope_high_freq_factor"),
        original_max_position_embeddings=8192.0,
    )


def apart(shard: Mapping[str, LazyTensor], spec: ModelSpec) -> dict[str, LazyTensor]:
    """The tensors of one shard, each matrix by itself and as a linear has it; what is not known as it is called.

    Queries, keys and values lie joined in ``wqkv``, both halves of a gated MLP in ``fc1``. Experts are stacks of
    transposed matrices, ``[E D, F]`` on the way in and ``[E F, D]`` on the way out, F being cut among the shards.
    Raises InputError for a tensor that does not divide so.
    """
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    joined = {
        "attention.wqkv.weight": {
            "self_attn.q_proj": heads,
            "self_attn.k_proj": kv_heads,
            "self_attn.v_proj": kv_heads,
        },
        "feed_forward.mlp.fc1_weight": {"feed_forward.gate_proj": 1, "feed_forward.up_proj": 1},
    }
    found: dict[str, LazyTensor] = {}
    for stored, tensor in shard.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", stored)
        if _PASSED_OVER.fullmatch(stored):
            continue
        if stored.startswith(_OF_IMAGES):
            if spec.fusion:
                found[meta_fusion.renamed(stored)] = tensor
            continue
        if layer is None:
            found[stored] = tensor
            continue
        place, part = f"model.layers.{layer[1]}.", layer[2]
        if part in joined:
            found |= _split(stored, tensor, joined[part], place=place)
        elif part.removeprefix(_EXPERTS) in _STACKED:
            found |= _unstacked(stored, tensor, spec, place=f"{place}{_EXPERTS}")
        elif part == _ROUTER and len(tensor.shape) == 2:
            found[f"{place}feed_forward.router.weight"] = ViewedTensor(tensor, tensor.shape[::-1], _transposed)
        else:
            found[place + _NAMES[part] if part in _NAMES else stored] = tensor
    return found


def _split(
    stored: str, tensor: LazyTensor, parts: Mapping[str, int], *, place: str
) -> Iterator[tuple[str, LazyTensor]]:
    """Rows, as many as each part has shares."""
    share, first = _divided(stored, tensor, tensor.shape[0], sum(parts.values())), 0
    for part, shares in parts.items():
        rows = shares * share
        view = partial(_rows, first=first, rows=rows)
        yield f"{place}{part}.weight", ViewedTensor(tensor, (rows, *tensor.shape[1:]), view)
        first += rows


def _unstacked(stored: str, tensor: LazyTensor, spec: ModelSpec, *, place: str) -> Iterator[tuple[str, LazyTensor]]:
    assert spec.experts is not None
    count, kind = spec.experts.num_local_experts, _STACKED[stored.rpartition(".")[2]]
    columns = _divided(stored, tensor, math.prod(tensor.shape[:-1]), count)
    for expert in range(count):
        view = partial(_expert, expert=expert, rows=columns)
        yield f"{place}{expert}.{kind}.weight", ViewedTensor(tensor, (tensor.shape[-1], columns), view)


def _divided(stored: str, tensor: LazyTensor, rows: int, parts: int) -> int:
    size, rest = divmod(rows, parts)
    if rest:
        raise InputError(
            f"{tensor.files[0]}: {stored} has shape {list(tensor.shape)}, whose {rows} rows are no {parts} equal parts",
            hint="check that params.json is of the same model",
        )
    return size


def _rows(joined: Tensor, *, first: int, rows: int) -> Tensor:
    return joined[first : first + rows]


def _expert(stack: Tensor, *, expert: int, rows: int) -> Tensor:
    """A view, so that a mapped file is not copied."""
    return stack.reshape(-1, stack.shape[-1])[expert * rows : (expert + 1) * rows].mT


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.mT


def _expert_args(path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    found = params["moe_args"]
    if not isinstance(found, dict) or found.keys() - _OF_EXPERTS:
        known = f"an object with {', '.join(sorted(_OF_EXPERTS))}"
        raise InputError(f"{path}: moe_args is {found!r}; known: {known}", hint=_CHECK)
    return {"capacity_factor": 1.0, "top_k": 1, "interleave_moe_layer_step": 1, **found}


def _truth_of(path: Path, params: Mapping[str, Any], field: str, *, usual: bool) -> bool:
    found = params.get(field, usual)
    if not isinstance(found, bool):
        raise InputError(f"{path}: {field} is {found!r}, true or false was expected", hint=_CHECK)
    return found
