"""Graph and weights -> one GGUF file, a tensor in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter, LlamaFileType

from exporter.checkpoint.gguf_file import ROPE_FACTORS, interleaved, llamacpp_name, permuted_heads
from exporter.errors import LoweringError
from exporter.files import written_whole
from exporter.model.graph import Graph, Weight
from exporter.model.rope import Rotation, rotation_of
from exporter.quantized import QuantizedTensor
from exporter.spec import EXPERTS, ModelSpec, Precision, WeightScheme
from exporter.store import StoredWeight, plain
from targets.gguf.architecture import Decoder, moe_step, read_decoder

BLOCK = 32
"""Columns that share a scale, in both types of codes."""
TYPES = {
    Precision.FP32: GGMLQuantizationType.F32,
    Precision.FP16: GGMLQuantizationType.F16,
    Precision.INT8: GGMLQuantizationType.Q8_0,
    Precision.INT4: GGMLQuantizationType.Q4_0,
}
_FILE_TYPES = {
    Precision.FP32: LlamaFileType.ALL_F32,
    Precision.FP16: LlamaFileType.MOSTLY_F16,
    Precision.INT8: LlamaFileType.MOSTLY_Q8_0,
    Precision.INT4: LlamaFileType.MOSTLY_Q4_0,
}
_QUANTIZATION_VERSION = 2
"""``GGML_QNT_VERSION``"""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Weights(Protocol):
    """A store, or what stands for one."""

    def __getitem__(self, name: str, /) -> StoredWeight: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    name: str
    """Of llama.cpp."""
    sources: tuple[str, ...]
    """Of the weight; of a stack of experts each of theirs."""
    shape: tuple[int, ...]
    type: GGMLQuantizationType


def write_model(
    graph: Graph, weights: Weights, path: Path, *, scheme: WeightScheme | None, vocabulary: Mapping[str, Any]
) -> None:
    """Write the file, whole or not at all. ``scheme`` None: every weight as the float32 that it stands for.
    ``vocabulary``: the fields of the tokenizer. Raises LoweringError for a graph that is not llama.cpp's."""
    decoder = read_decoder(graph)
    rotation = rotation_of(decoder.inv_freq, graph.spec.rope) if decoder.inv_freq is not None else None
    entries = list(_entries(graph, decoder, scheme))
    factors = rotation.factors if rotation else None
    with written_whole(path) as unfinished:
        writer = GGUFWriter(unfinished, decoder.architecture)
        for field, value in {**_fields(graph.spec, decoder, rotation, scheme), **vocabulary}.items():
            _add(writer, field, value)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, np.dtype(np.float32), 4 * len(factors))
        for entry in entries:
            _announce(writer, entry)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with unfinished.open("ab") as file:
            if factors is not None:
                _append(file, [factors.numpy()])
            for entry in entries:
                _append(file, (_rows(source, weights, entry.type, graph.spec) for source in entry.sources))


def _rows(source: str, weights: Weights, kind: GGMLQuantizationType, spec: ModelSpec) -> Bytes:
    rows = encoded(weights[source], kind)
    heads = permuted_heads(source, spec)
    return interleaved(rows, heads) if heads else rows


def _append(file: BinaryIO, parts: Iterable[np.ndarray[Any, Any]]) -> None:
    """The data of one tensor, in parts that lie one behind the other. Not by the writer, whose ``tofile`` tells of a
    full disk in an error without a number."""
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
    for rows in parts:
        file.write(np.ascontiguousarray(rows).data)
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))


def encoded(weight: StoredWeight, kind: GGMLQuantizationType) -> Bytes:
    """A weight in the bytes of its type: ``[rows, bytes of a row]``; of a vector one row."""
    weight = plain(weight)
    if kind is GGMLQuantizationType.F32 and isinstance(weight, QuantizedTensor):
        weight = weight.dequantize()
    if isinstance(weight, QuantizedTensor):
        return _blocks(weight)
    dtype = torch.float16 if kind is GGMLQuantizationType.F16 else torch.float32
    return weight.to(dtype).reshape(-1, weight.shape[-1]).contiguous().view(torch.uint8).numpy()


def _blocks(weight: QuantizedTensor) -> Bytes:
    """Each block a float16 scale, then its codes: bytes, or nibbles of code + 8 where those of the second half of the
    block are the high ones (``block_q8_0`` and ``block_q4_0`` of ggml-common.h)."""
    rows, columns = weight.shape
    halves = weight.scales.half()
    lost = weight.scales[halves.float() != weight.scales]
    if len(lost):
        raise LoweringError(
            f"{weight.name} has a scale of {lost[0]:.3g}, which float16 does not hold",
            hint="take --precision fp32 for this model",
        )
    scales = halves.repeat_interleave(weight.group_size // BLOCK, dim=1).view(torch.uint8).view(rows, -1, 2)
    codes = weight.codes.view(rows, columns // BLOCK, BLOCK)
    if weight.bits == 8:
        packed = codes.view(torch.uint8)
    else:
        first, second = (codes + 8).view(torch.uint8).split(BLOCK // 2, dim=-1)
        packed = first | (second << 4)
    return torch.cat([scales, packed], dim=-1).view(rows, -1).numpy()


def _entries(graph: Graph, decoder: Decoder, scheme: WeightScheme | None) -> Iterator[_Entry]:
    """Of every weight that the graph reads, experts of a layer together; layers are numbered from 0 on, whichever they
    are. Raises LoweringError for experts of several types."""
    numbers = {layer: number for number, layer in enumerate(decoder.layers)}
    weights = (a for node in graph.nodes for a in node.arguments if isinstance(a, Weight))
    shapes = {weight.name: weight.shape for weight in weights}
    for names in stacks(shapes):
        shape = shapes[names[0]]
        if why := differing(names, scheme):
            raise LoweringError(why, hint="leave out --rule, --budget-mb and --max-kl, or take another --target")
        is_float = scheme is None or len(shape) == 1
        kind = GGMLQuantizationType.F32 if is_float else TYPES[scheme.precision(names[0])]  # type: ignore[union-attr]
        yield _Entry(
            name=llamacpp_name(names[0], numbers, has_experts=graph.spec.experts is not None),
            sources=names,
            shape=(len(names), *shape) if EXPERTS in names[0] else shape,
            type=kind,
        )


def stacks(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of weights that are one tensor of a file: of the experts of a layer, in their order, and each other by
    itself."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(rf"{re.escape(EXPERTS)}\d+\.", EXPERTS, name), []).append(name)
    return [tuple(together) for together in found.values()]


def differing(names: Sequence[str], scheme: WeightScheme | None) -> str | None:
    """Of the matrices of one stack, in a sentence: that they are not of one precision; None where they are."""
    found = dict.fromkeys(scheme.precision(name) for name in names) if scheme else {}
    if len(found) < 2:
        return None
    return f"the experts of a layer are of one type in a GGUF file, {names[0]} and others are {' and '.join(found)}"


def _announce(writer: GGUFWriter, entry: _Entry) -> None:
    block, size = GGML_QUANT_SIZES[entry.type]
    *_, columns = entry.shape
    row_bytes = columns // block * size
    rows = math.prod(entry.shape[:-1])
    # Bytes of rows, from which the writer finds the columns again.
    writer.add_tensor_info(
        entry.name, (*entry.shape[:-1], row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=entry.type
    )


def _fields(
    spec: ModelSpec, decoder: Decoder, rotation: Rotation | None, scheme: WeightScheme | None
) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_position_embeddings,
        "embedding_length": spec.hidden_size,
        "block_count": len(decoder.layers),
        "feed_forward_length": spec.experts.intermediate_size_mlp if spec.experts else spec.intermediate_size,
        "attention.head_count": spec.num_attention_heads,
        "attention.head_count_kv": spec.num_key_value_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(decoder.rms_norm_eps),
        "rope.dimension_count": spec.head_dim,
        "rope.freq_base": float(spec.rope.theta),
    }
    if rotation and rotation.scale != 1.0:
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rotation.scale)}
    if spec.experts:
        fields |= {
            "expert_count": spec.experts.num_local_experts,
            "expert_used_count": spec.experts.num_experts_per_tok,
            "expert_feed_forward_length": spec.intermediate_size,
            "interleave_moe_layer_step": moe_step(spec.experts),
        }
    return {
        "general.name": spec.name,
        "general.file_type": int(_FILE_TYPES[scheme.body] if scheme else LlamaFileType.ALL_F32),
        "general.quantization_version": _QUANTIZATION_VERSION,
        **{f"{decoder.architecture}.{name}": value for name, value in fields.items()},
    }


def _add(writer: GGUFWriter, field: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(field, value)
        case int():
            writer.add_uint32(field, value)
        case float():
            writer.add_float32(field, value)
        case str():
            writer.add_string(field, value)
        case _:
            writer.add_array(field, value)
