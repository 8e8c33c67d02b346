"""ModelSpec -> Graph: torch.export on the meta device, so that no weight is read and any size takes seconds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Node as FxNode

from exporter.errors import LoweringError
from exporter.model.graph import Constant, Graph, Node, Value, Weight, cache_names
from exporter.model.llama import Llama
from exporter.model.ops import attention  # noqa: F401  (registers the op that the graph holds)
from exporter.spec import ModelSpec

_MAX_LENGTH = 1 << 20
"""Bound of both dynamic lengths (tokens in a call, positions in the cache); each lowering sets its own context."""

_aten = torch.ops.aten
_OPS: dict[Any, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    _aten.embedding.default: ("embedding", lambda weight, ids, *_: (ids, weight)),
    _aten.linear.default: ("linear", lambda x, weight: (x, weight)),
    _aten.rms_norm.default: ("rms_norm", lambda x, _shape, weight, eps: (x, weight, eps)),
    _aten.silu.default: ("silu", lambda x: (x,)),
    _aten.mul.Tensor: ("mul", lambda a, b: (a, b)),
    _aten.add.Tensor: ("add", lambda a, b: (a, b)),
    torch.ops.llama_export.attention.default: (
        "attention",
        lambda q, k, v, past_k, past_v, inv_freq, heads, kv_heads, scale, window=0, chunk=0: (
            *(q, k, v, past_k, past_v, inv_freq),
            *(heads, kv_heads, scale, window, chunk),
        ),
    ),
}
"""The op of ours that an exported op is, and its arguments in the order of ``graph.VOCABULARY``."""


def trace(spec: ModelSpec) -> Graph:
    """The decoder of ``spec`` as a Graph, for any number of tokens on any length of cache."""
    program = _export(spec)
    caches = cache_names(spec.num_hidden_layers)
    keys, values = [k for k, _ in caches], [v for _, v in caches]
    input_names = ["ids", *(f"past_{name}" for name in keys + values)]
    output_names = ["logits", *(f"present_{name}" for name in keys + values)]

    known: dict[str, Value | Weight | Constant] = {}  # placeholders and getitems, by fx name
    nodes: list[Node] = []
    outputs: dict[str, Value] = {}
    signature = program.graph_signature
    inputs = dict(zip(signature.user_inputs, input_names, strict=True))
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            known[fx.name] = _placeholder(fx, program=program, spec=spec, inputs=inputs)
        elif fx.op == "output":
            results = [known[argument.name] for argument in fx.args[0]]
            outputs = {name: v for name, v in zip(output_names, results, strict=True) if isinstance(v, Value)}
        elif fx.name.startswith("getitem"):
            source, index = fx.args
            known[fx.name] = Value(source.name, index)
        else:
            nodes.append(_node(fx, known=known))
            known[fx.name] = Value(fx.name)
    return Graph(spec=spec, inputs=tuple(input_names), nodes=tuple(nodes), outputs=outputs)


def _export(spec: ModelSpec) -> ExportedProgram:
    with torch.device("meta"):
        model = Llama(spec).eval()
        ids = torch.zeros(1, 3, dtype=torch.int64)
        past = [torch.zeros(1, spec.num_key_value_heads, 5, spec.head_dim) for _ in range(spec.num_hidden_layers)]
    length, past_length = Dim("length", max=_MAX_LENGTH), Dim("past_length", max=_MAX_LENGTH)
    cache_shapes = [{2: past_length}] * spec.num_hidden_layers
    return torch.export.export(
        model,
        (ids, past, [cache.clone() for cache in past]),
        dynamic_shapes=({1: length}, cache_shapes, cache_shapes),
        strict=False,
    )


def _placeholder(
    fx: FxNode, *, program: ExportedProgram, spec: ModelSpec, inputs: dict[str, str]
) -> Value | Weight | Constant:
    signature = program.graph_signature
    if fx.name in signature.inputs_to_parameters:
        name = spec.stored_name(signature.inputs_to_parameters[fx.name])
        return Weight(name, tuple(fx.meta["val"].shape))
    if fx.name in signature.inputs_to_buffers:
        name = signature.inputs_to_buffers[fx.name]
        return Constant(name, program.constants[name])
    return Value(inputs[fx.name])


def _node(fx: FxNode, *, known: dict[str, Value | Weight | Constant]) -> Node:
    if fx.target not in _OPS:
        raise LoweringError(
            f"tracing gave an op outside the vocabulary: {fx.target} (node {fx.name})",
            hint="this is a fault of llama-export: please report it with the model's config.json",
        )
    op, arrange = _OPS[fx.target]
    arguments = arrange(*fx.args, **fx.kwargs)
    modules = " ".join(path for path, _ in fx.meta.get("nn_module_stack", {}).values())
    layer = re.search(r"layers\.(\d+)", modules)
    return Node(
        op=op,
        name=fx.name,
        arguments=tuple(known[a.name] if isinstance(a, FxNode) else a for a in arguments),
        layer=int(layer.group(1)) if layer else None,
    )
