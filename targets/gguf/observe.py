"""Every value that llama.cpp computes and our graph has a name for, seen while it runs (``cb_eval``).

With a cache of float32: a rounding of float16 that falls the other way for a last bit would look like a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exporter.checkpoint.gguf_file import permuted_heads
from exporter.model.graph import Graph, Node, Value, Weight
from exporter.model.ops import head_norm
from exporter.spec import FINAL_NORM, Artifact, ModelSpec
from targets.base import Observation
from targets.gguf.llamacpp import F32, FLASH_OFF, Computed, Context, Model

_PRODUCTS = {
    "self_attn.q_proj": "Qcur",
    "self_attn.k_proj": "Kcur",
    "self_attn.v_proj": "Vcur",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_out",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_out",
    "feed_forward.shared_expert.gate_proj": "ffn_gate",
    "feed_forward.shared_expert.up_proj": "ffn_up",
    "feed_forward.shared_expert.down_proj": "ffn_moe_shexp",
    "feed_forward.router": "ffn_moe_logits",
}
_OF_EXPERTS = {"gate_proj": "ffn_moe_gate", "up_proj": "ffn_moe_up", "down_proj": "ffn_moe_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_PRODUCT, _NORM, _SUM, _GATED, _LOOKED_UP, _JOINED = "MUL_MAT", "MUL", "ADD", "SWIGLU", "GET_ROWS", "CONT"
_OF_CHOSEN = "MUL_MAT_ID"
"""Ops by ``ggml_op_desc``; the last step of a norm is the product with its weight."""

Seen = Mapping[tuple[str, str], Tensor]
"""What was computed, by name and op; of an attention also what it read, under the names ``keys`` and ``values``, of a
mixture the experts that each token chose, ``[T, k]``, under ``chosen``."""


def observe(artifact: Artifact, graph: Graph, calls: Sequence[Sequence[int]], *, threads: int) -> Observation:
    found: dict[tuple[str, str], Tensor] = {}

    def keep(computed: Computed) -> None:
        key = (computed.name, computed.op)
        name, _, layer = computed.name.partition("-")
        if computed.op == _PRODUCT and name in ("kq", "kqv"):  # [1, KV, S, D] and [1, KV, D, S]
            found[("keys" if name == "kq" else "values", layer)] = torch.from_numpy(computed.read(0))
        elif computed.op in (_OF_CHOSEN, _PRODUCT, _NORM, _SUM, _GATED, _LOOKED_UP, _JOINED):
            found[key] = torch.from_numpy(computed.read())
        if (name, computed.op) == ("ffn_norm", _PRODUCT):  # in a layer with experts the norm's name is given to this
            found[(f"attn_out-{layer}", _PRODUCT)] = found.pop(key)
        if (name, computed.op) == ("ffn_moe_logits", _PRODUCT):  # and the norm, which this reads, has none
            found[(f"ffn_norm-{layer}", _NORM)] = torch.from_numpy(computed.read(1))
        if (name, computed.op) == ("ffn_moe_up", _OF_CHOSEN):
            found[("chosen", layer)] = torch.from_numpy(computed.read(2)).long().squeeze(0).squeeze(0)

    seen: list[Mapping[Value, Tensor]] = []
    model = Model(artifact.path)
    try:
        context = Context(model, positions=artifact.context, threads=threads, cache=F32, flash=FLASH_OFF, observe=keep)
        try:
            position = 0
            for ids in calls:
                found.clear()
                context.decode(ids, first=position, rows=len(ids), width=artifact.spec.vocab_size)
                position += len(ids)
                seen.append(_values(graph, found, length=len(ids), position=position))
        finally:
            context.close()
    finally:
        model.close()
    return Observation(arithmetic=replace(artifact.arithmetic, kv_dtype="fp32"), calls=seen)


def _values(graph: Graph, seen: Seen, *, length: int, position: int) -> dict[Value, Tensor]:
    """What was seen, by the names of the graph; llama.cpp numbers the layers of a whole model as it does."""
    values: dict[Value, Tensor] = {}
    sums = _sums(graph)
    for node in graph.nodes:
        if node.op == "attention":
            results = _attention(node, seen, graph.spec, position=position)
        elif node.op in _INSIDE:
            read = values.get(node.arguments[0])  # type: ignore[arg-type]
            results = [] if read is None else [_INSIDE[node.op](read, *node.arguments[1:])]
        elif node.op == "route" or node.expert is not None:
            results = _of_experts(node, seen, values, graph.spec, length=length)
        else:
            tensor = seen.get(_key(node, sums))
            results = [] if tensor is None else [tensor.reshape(1, length, -1)]
            if tensor is not None and _is_interleaved(node, graph.spec):
                results = [_apart(results[0].unflatten(-1, (-1, graph.spec.head_dim))).flatten(-2)]
        values |= {Value(node.name, index): result for index, result in enumerate(results)}
    return values


_INSIDE: Mapping[str, Callable[..., Tensor]] = {"silu": torch.nn.functional.silu, "head_norm": head_norm}
"""Ops without a counterpart, computed from what llama.cpp gave: silu is inside of SWIGLU, which is held against the
product, and heads are normed behind the rotation, where the attention reads them."""


def _of_experts(
    node: Node, seen: Seen, values: Mapping[Value, Tensor], spec: ModelSpec, *, length: int
) -> list[Tensor]:
    """llama.cpp computes the experts that a token chose, ``[1, T, k, N]``: the rows of one expert at their tokens, and
    0 at all others. The sum of those before the last is computed, as llama.cpp adds up in another order."""
    experts, chosen = spec.experts, seen.get(("chosen", str(node.layer)))
    assert experts is not None  # the graph has experts
    if node.op == "add" and node.expert != experts.num_local_experts - 1:
        total, added = (values.get(argument) for argument in node.arguments)  # type: ignore[arg-type]
        return [] if total is None or added is None else [total + added]
    tensor = seen.get(_key_of_expert(node))
    if tensor is None or chosen is None:
        return []
    if node.op == "add":
        return [tensor.reshape(1, length, -1)]
    if node.op == "route":
        scores = torch.zeros(length, experts.num_local_experts)
        return [scores.scatter(1, chosen, tensor.reshape(length, -1)).unsqueeze(0)]
    assert node.expert is not None  # a route is none of one
    rows = tensor.reshape(length, chosen.shape[1], -1)
    return [(rows * chosen.eq(node.expert).unsqueeze(-1)).sum(dim=1).unsqueeze(0)]


def _key_of_expert(node: Node) -> tuple[str, str]:
    weight = next((argument.name for argument in node.arguments if isinstance(argument, Weight)), "")
    name, op = {
        "route": ("ffn_moe_weights", _LOOKED_UP),
        "gate": ("ffn_moe_weighted", _NORM),
        "linear": (_OF_EXPERTS.get(weight.removesuffix(".weight").rpartition(".")[2], ""), _OF_CHOSEN),
        "mul": ("ffn_moe_swiglu", _GATED),
        "add": ("ffn_moe_out_merged", _SUM),
    }[node.op]
    return f"{name}-{node.layer}", op


def _key(node: Node, sums: Mapping[str, str]) -> tuple[str, str]:
    weight = next((argument.name for argument in node.arguments if isinstance(argument, Weight)), "")
    part = weight.removesuffix(".weight").split(".", 3)[-1]
    match node.op:
        case "embedding":
            return "embd", _LOOKED_UP
        case "rms_norm":
            return ("result_norm" if weight == FINAL_NORM else f"{_NORMS[part]}-{node.layer}"), _NORM
        case "linear":
            return (f"{_PRODUCTS[part]}-{node.layer}" if part in _PRODUCTS else "result_output"), _PRODUCT
        case "mul":
            return f"ffn_swiglu-{node.layer}", _GATED
        case "temper":
            return f"Qcur-{node.layer}", _NORM
    return f"{sums[node.name]}-{node.layer}", _SUM


def _sums(graph: Graph) -> dict[str, str]:
    """llama.cpp's names of both sums of a layer."""
    adds = [node for node in graph.nodes if node.op == "add" and node.expert is None]
    return {node.name: ("ffn_inp", "l_out")[index % 2] for index, node in enumerate(adds)}


def _is_interleaved(node: Node, spec: ModelSpec) -> bool:
    return node.op == "linear" and any(
        isinstance(argument, Weight) and permuted_heads(argument.name, spec) for argument in node.arguments
    )


def _attention(node: Node, seen: Seen, spec: ModelSpec, *, position: int) -> list[Tensor]:
    context = seen.get((f"kqv_out-{node.layer}", _JOINED))
    keys, values = seen.get(("keys", str(node.layer))), seen.get(("values", str(node.layer)))
    if context is None or keys is None or values is None:
        return []
    return [
        context.reshape(1, -1, spec.num_attention_heads * spec.head_dim),
        keys[:, :, :position] if node.layer in spec.attention.unrotated_layers else _apart(keys[:, :, :position]),
        values.mT[:, :, :position],
    ]


def _apart(x: Tensor) -> Tensor:
    """Of channels ``[..., D]`` in llama.cpp's order, where those that turn together are neighbours: as they were."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
