"""Every value that llama.cpp computes and our graph has a name for, seen while it runs (``cb_eval``).

With a cache of float32: a rounding of float16 that falls the other way for a last bit would look like a fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exporter.model.graph import Graph, Node, Value, Weight
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
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_PRODUCT, _NORM, _SUM, _GATED, _LOOKED_UP, _JOINED = "MUL_MAT", "MUL", "ADD", "SWIGLU", "GET_ROWS", "CONT"
"""Ops by ``ggml_op_desc``; the last step of a norm is the product with its weight."""

Seen = Mapping[tuple[str, str], Tensor]
"""What was computed, by name and op; of an attention also what it read, under the names ``keys`` and ``values``."""


def observe(artifact: Artifact, graph: Graph, calls: Sequence[Sequence[int]], *, threads: int) -> Observation:
    found: dict[tuple[str, str], Tensor] = {}

    def keep(computed: Computed) -> None:
        key = (computed.name, computed.op)
        name, _, layer = computed.name.partition("-")
        if computed.op == _PRODUCT and name in ("kq", "kqv"):  # [1, KV, S, D] and [1, KV, D, S]
            found[("keys" if name == "kq" else "values", layer)] = torch.from_numpy(computed.read(0))
        elif computed.op in (_PRODUCT, _NORM, _SUM, _GATED, _LOOKED_UP, _JOINED):
            found[key] = torch.from_numpy(computed.read())

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
        elif node.op == "silu":  # inside of SWIGLU, which is held against the product
            gate = values.get(node.arguments[0])  # type: ignore[arg-type]
            results = [] if gate is None else [torch.nn.functional.silu(gate)]
        else:
            tensor = seen.get(_key(node, sums))
            results = [] if tensor is None else [tensor.reshape(1, length, -1)]
            if tensor is not None and _is_interleaved(node):
                results = [_apart(results[0].unflatten(-1, (-1, graph.spec.head_dim))).flatten(-2)]
        values |= {Value(node.name, index): result for index, result in enumerate(results)}
    return values


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
    return f"{sums[node.name]}-{node.layer}", _SUM


def _sums(graph: Graph) -> dict[str, str]:
    """llama.cpp's names of both sums of a layer."""
    adds = [node for node in graph.nodes if node.op == "add"]
    return {node.name: ("ffn_inp", "l_out")[index % 2] for index, node in enumerate(adds)}


def _is_interleaved(node: Node) -> bool:
    return node.op == "linear" and any(
        isinstance(argument, Weight) and argument.name.endswith(("q_proj.weight", "k_proj.weight"))
        for argument in node.arguments
    )


def _attention(node: Node, seen: Seen, spec: ModelSpec, *, position: int) -> list[Tensor]:
    context = seen.get((f"kqv_out-{node.layer}", _JOINED))
    keys, values = seen.get(("keys", str(node.layer))), seen.get(("values", str(node.layer)))
    if context is None or keys is None or values is None:
        return []
    return [
        context.reshape(1, -1, spec.num_attention_heads * spec.head_dim),
        _apart(keys[:, :, :position]),
        values.mT[:, :, :position],
    ]


def _apart(x: Tensor) -> Tensor:
    """Of channels ``[..., D]`` in llama.cpp's order, where those that turn together are neighbours: as they were."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
