"""ModelSpec -> Graph: torch.export on the meta device, so that no weight is read and any size takes seconds."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Node as FxNode

from exporter.errors import LoweringError
from exporter.model.fusion import FusedVision
from exporter.model.graph import FUSED, Constant, Graph, Node, Program, Value, Weight, cache_names, image_names
from exporter.model.llama import Llama
from exporter.model.vision import Vision, stored_name
from exporter.spec import FusionSpec, ModelSpec

_MAX_LENGTH = 1 << 20
"""Bound of both dynamic lengths (tokens in a call, positions in the cache); each lowering sets its own context."""

_aten = torch.ops.aten
_OPS: dict[Any, tuple[str, Callable[..., tuple[Any, ...]]]] = {
    _aten.embedding.default: ("embedding", lambda weight, ids, *_: (ids, weight)),
    _aten.linear.default: ("linear", lambda x, weight, *bias: (x, weight, *bias)),
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
    torch.ops.llama_export.head_norm.default: ("head_norm", lambda *arguments: arguments),
    torch.ops.llama_export.temper.default: ("temper", lambda q, past_k, floor, scale: (q, past_k, floor, scale)),
    torch.ops.llama_export.route.default: ("route", lambda logits, count: (logits, count)),
    _aten.layer_norm.default: ("layer_norm", lambda x, _shape, weight, bias, eps=1e-5, *_: (x, weight, bias, eps)),
    _aten.gelu.default: ("gelu", lambda x: (x,)),
    _aten.cat.default: ("concat", lambda parts, _dim: tuple(parts)),
    **{
        getattr(torch.ops.llama_export, name).default: (name, lambda *arguments: arguments)
        for name in (
            *("cross_attention", "where_seen", "tanh_gate", "patches", "prepend", "add_position"),
            *("add_tile_position", "pad_states", "tile_attention", "as_heads"),
            *("append", "patch_attention", "pixel_shuffle", "fuse"),
        )
    },
    torch.ops.llama_export.spread.default: ("spread", lambda logits, tokens, count: (logits, tokens, count)),
}
_EXPERTS = torch.ops.llama_export.experts.default
"""The op of ours that an exported op is, and its arguments in the order of ``graph.VOCABULARY``."""


def trace_program(spec: ModelSpec) -> Program:
    """Every graph of ``spec``."""
    text = trace(spec.text_alone())
    if spec.vision is None:
        return Program(text=text, decoder=text)
    return Program(text=text, decoder=trace(spec), vision=trace_vision(spec))


def trace(spec: ModelSpec) -> Graph:
    """The decoder of ``spec`` as a Graph, for any number of tokens on any length of cache, and for any number of images
    where it sees them."""
    caches = cache_names(spec.num_hidden_layers)
    keys, values = [k for k, _ in caches], [v for _, v in caches]
    inputs = ["ids", *(f"past_{name}" for name in keys + values)]
    if spec.images:
        cross_k, cross_v = image_names(len(spec.images.cross_attention_layers))
        inputs += ["tiles", *cross_k, *cross_v]
    if spec.fusion:
        inputs += FUSED
    outputs = ["logits", *(f"present_{name}" for name in keys + values)]
    return _graph(_export(spec), spec, inputs, outputs, stored_name=lambda name: name)


def trace_vision(spec: ModelSpec) -> Graph:
    """What turns one image into the keys and values that the decoder of ``spec`` takes from it, as a Graph; or a tile
    of one into the states that stand in the place of tokens."""
    if spec.fusion:
        return _trace_tile(spec, spec.fusion)
    images = spec.images
    if images is None:
        raise ValueError(f"{spec.name} sees no images")
    side = images.image_size
    with torch.device("meta"):
        model = Vision(spec, images).eval()
        pixels = torch.zeros(1, images.max_num_tiles, images.num_channels, side, side)
        ratio = torch.zeros(1, 1, dtype=torch.int64)
        tiles = torch.zeros(1, 1, images.max_num_tiles, dtype=torch.int64)
    program = torch.export.export(model, (pixels, ratio, tiles), strict=False)
    cross_k, cross_v = image_names(len(images.cross_attention_layers))
    inputs = ["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"]
    return _graph(program, spec, inputs, [*cross_k, *cross_v], stored_name=stored_name)


def _trace_tile(spec: ModelSpec, fusion: FusionSpec) -> Graph:
    with torch.device("meta"):
        model = FusedVision(spec, fusion).eval()
        pixels = torch.zeros(1, 1, fusion.num_channels, fusion.image_size, fusion.image_size)
    program = torch.export.export(model, (pixels,), strict=False)
    return _graph(program, spec, ["pixel_values"], [FUSED[0]], stored_name=lambda name: name)


def _graph(
    program: ExportedProgram,
    spec: ModelSpec,
    input_names: list[str],
    output_names: list[str],
    *,
    stored_name: Callable[[str], str],
) -> Graph:
    """``stored_name`` gives the weight that a parameter is."""
    known: dict[str, Value | Weight | Constant] = {}  # placeholders and getitems, by fx name
    nodes: list[Node] = []
    outputs: dict[str, Value] = {}
    signature = program.graph_signature
    inputs = dict(zip(signature.user_inputs, input_names, strict=True))
    for fx in program.graph.nodes:
        if fx.op == "placeholder":
            known[fx.name] = _placeholder(fx, program=program, spec=spec, inputs=inputs, stored_name=stored_name)
        elif fx.op == "output":
            results = [known[argument.name] for argument in fx.args[0]]
            outputs = {name: v for name, v in zip(output_names, results, strict=True) if isinstance(v, Value)}
        elif fx.name.startswith("getitem"):
            source, index = fx.args
            known[fx.name] = Value(source.name, index)
        elif fx.target is _EXPERTS:
            nodes += _experts(*(known[a.name] for a in fx.args), name=fx.name, layer=_layer(fx, spec), spec=spec)
            known[fx.name] = Value(nodes[-1].name)
        else:
            nodes += _nodes(fx, known=known, spec=spec)
            known[fx.name] = Value(fx.name)
    return Graph(spec=spec, inputs=tuple(input_names), nodes=tuple(nodes), outputs=outputs)


def _export(spec: ModelSpec) -> ExportedProgram:
    with torch.device("meta"):
        model = Llama(spec).eval()
        ids = torch.zeros(1, 3, dtype=torch.int64)
        past = [torch.zeros(1, spec.num_key_value_heads, 5, spec.head_dim) for _ in range(spec.num_hidden_layers)]
        states = [torch.zeros(1, spec.num_key_value_heads, 6, spec.head_dim) for _ in _crossing(spec)]
        tiles = torch.zeros(1, 3, 2, dtype=torch.bool)
        fused = torch.zeros(1, 3, spec.hidden_size), torch.zeros(1, 3, dtype=torch.bool)
    length, past_length = Dim("length", max=_MAX_LENGTH), Dim("past_length", max=_MAX_LENGTH)
    cache_shapes = [{2: past_length}] * spec.num_hidden_layers
    arguments: dict[str, Any] = {"ids": ids, "past_k": past, "past_v": [cache.clone() for cache in past]}
    shapes: dict[str, Any] = {"ids": {1: length}, "past_k": cache_shapes, "past_v": cache_shapes}
    if states:
        state_shapes = [{2: Dim("states", max=_MAX_LENGTH)}] * len(states)
        arguments["images"] = tiles, states, [state.clone() for state in states]
        shapes["images"] = {1: length, 2: Dim("tiles", max=_MAX_LENGTH)}, state_shapes, state_shapes
    if spec.fusion:
        arguments["fused"], shapes["fused"] = fused, ({1: length}, {1: length})
    return torch.export.export(model, (), arguments, dynamic_shapes=shapes, strict=False)


def _crossing(spec: ModelSpec) -> tuple[int, ...]:
    return spec.images.cross_attention_layers if spec.images else ()


def _placeholder(
    fx: FxNode,
    *,
    program: ExportedProgram,
    spec: ModelSpec,
    inputs: dict[str, str],
    stored_name: Callable[[str], str],
) -> Value | Weight | Constant:
    signature = program.graph_signature
    if fx.name in signature.inputs_to_parameters:
        name = spec.stored_name(stored_name(signature.inputs_to_parameters[fx.name]))
        return Weight(name, tuple(fx.meta["val"].shape))
    if fx.name in signature.inputs_to_buffers:
        name = signature.inputs_to_buffers[fx.name]
        return Constant(name, program.constants[name])
    return Value(inputs[fx.name])


def _nodes(fx: FxNode, *, known: dict[str, Value | Weight | Constant], spec: ModelSpec) -> list[Node]:
    """One, but for a linear with a bias."""
    if fx.target not in _OPS:
        raise LoweringError(
            f"tracing gave an op outside the vocabulary: {fx.target} (node {fx.name})",
            hint="this is a fault of llama-export: please report it with the model's config.json",
        )
    op, arrange = _OPS[fx.target]
    found = arrange(*fx.args, **fx.kwargs)
    arguments = tuple(known[a.name] if isinstance(a, FxNode) else a for a in found)
    layer = _layer(fx, spec)
    if op == "linear" and len(arguments) == 3:
        *product, bias = arguments
        name = f"{fx.name}_product"
        return [
            Node(op="linear", name=name, arguments=tuple(product), layer=layer),
            Node(op="bias", name=fx.name, arguments=(Value(name), bias), layer=layer),
        ]
    return [Node(op=op, name=fx.name, arguments=arguments, layer=layer)]


def _layer(fx: FxNode, spec: ModelSpec) -> int | None:
    """One that looks at images is part of the decoder layer behind it, or of the last."""
    modules = " ".join(path for path, _ in fx.meta.get("nn_module_stack", {}).values())
    found = re.search(r"(?<![\w.])model\.layers\.(\d+)", modules)  # not those of a vision_model
    if not found or not spec.layer_numbers:
        return int(found.group(1)) if found else None
    behind = sum(number < int(found.group(1)) for number in spec.layer_numbers)
    return min(behind, spec.num_hidden_layers - 1)


def _experts(x: Any, scores: Any, shared: Any, *, name: str, layer: int | None, spec: ModelSpec) -> list[Node]:
    """The nodes of every expert of a layer: each adds what it makes of its part of ``x`` to the sum before it. Written
    here, since torch.export would take minutes over thousands of them."""
    assert spec.experts is not None
    shapes, nodes, total = spec.weights(), list[Node](), shared
    for expert in range(spec.experts.num_local_experts):
        nodes += _expert(x, scores, total, name=f"{name}_{expert}", layer=layer, expert=expert, shapes=shapes)
        total = Value(nodes[-1].name)
    return nodes


def _expert(
    x: Any,
    scores: Any,
    total: Any,
    *,
    name: str,
    layer: int | None,
    expert: int,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Node]:
    def node(part: str, op: str, *arguments: Any) -> Node:
        return Node(op=op, name=f"{name}_{part}", arguments=arguments, layer=layer, expert=expert)

    def value(part: str) -> Value:
        return Value(f"{name}_{part}")

    def weight(part: str) -> Weight:
        weight = f"model.layers.{layer}.feed_forward.experts.{expert}.{part}.weight"
        return Weight(weight, shapes[weight])

    return [
        node("in", "gate", x, scores, expert),
        node("gate", "linear", value("in"), weight("gate_proj")),
        node("up", "linear", value("in"), weight("up_proj")),
        node("silu", "silu", value("gate")),
        node("mul", "mul", value("silu"), value("up")),
        node("down", "linear", value("mul"), weight("down_proj")),
        node("add", "add", total, value("down")),
    ]
