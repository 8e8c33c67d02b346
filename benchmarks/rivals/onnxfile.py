"""An ONNX file as onnxruntime-genai's builder lays it out -> weights by Hugging Face name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from benchmarks.rivals import RivalError
from exporter.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec

_LINEAR = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul(?:_Q\d)?")
_HEAD = re.compile(r"/lm_head/MatMul(?:_Q\d)?")
_BLOCK = {"attn": "self_attn", "mlp": "mlp"}


def read(file: Path, spec: ModelSpec) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Dequantized weights and the bytes that hold each. Raises RivalError for a layout it does not know."""
    graph = onnx.load(file).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    norms = {name: name for name in spec.weights() if name.endswith("layernorm.weight")}
    norms[FINAL_NORM] = f"model.layers.{spec.num_hidden_layers}.final_norm_layernorm.weight"
    weights = {name: torch.from_numpy(arrays[stored].copy()) for name, stored in norms.items()}
    stored_bytes = {name: weight.nbytes for name, weight in weights.items()}
    # The builder puts q, k and v into one MatMul, row after row.
    qkv_rows = [heads * spec.head_dim for heads in (spec.num_attention_heads, *2 * [spec.num_key_value_heads])]
    for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
        weight, size = _dequantize(node, arrays)
        if _HEAD.fullmatch(node.name):
            weights[HEAD], stored_bytes[HEAD] = weight, size
        elif match := _LINEAR.fullmatch(node.name):
            layer, block, linear = match.groups()
            names = ("q_proj", "k_proj", "v_proj") if linear == "qkv_proj" else (linear,)
            pieces = weight.split(qkv_rows) if linear == "qkv_proj" else (weight,)
            for name, rows in zip(names, pieces, strict=True):
                full_name = f"model.layers.{layer}.{_BLOCK[block]}.{name}.weight"
                weights[full_name], stored_bytes[full_name] = rows, size * len(rows) // len(weight)
        else:
            raise RivalError(f"{node.name} is a quantized MatMul of unknown use")
    table = _embedding_table(graph, arrays)
    if table is None:  # the head's
        weights[EMBEDDING], stored_bytes[EMBEDDING] = weights.pop(HEAD), stored_bytes.pop(HEAD)
    else:
        weights[EMBEDDING], stored_bytes[EMBEDDING] = table, table.nbytes
    return weights, stored_bytes


def _embedding_table(graph: Any, arrays: Mapping[str, np.ndarray]) -> Tensor | None:
    """The float embedding; None where it is a view of the quantized head."""
    producers = {output: node for node in graph.node for output in node.output}
    gather = next(node for node in graph.node if node.name.startswith("/model/embed_tokens/Gather"))
    source, turned = gather.input[0], False
    while source not in arrays:  # behind a Reshape or, where the head is in float32 beside it, a Transpose
        turned ^= producers[source].op_type == "Transpose"
        source = producers[source].input[0]
    if gather.op_type == "GatherBlockQuantized":
        if not source.startswith("lm_head."):
            raise RivalError(f"the embedding is quantized in {source}, which is not the head's")
        return None
    table = torch.from_numpy(arrays[source].copy())
    return table.T if turned else table


def _dequantize(node: Any, arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, int]:
    """float32 ``[N, K]`` of a MatMulNBits node, by the operator's definition, and the bytes of its constants:
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits"""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, bits, block = (sizes[name] for name in ("N", "K", "bits", "block_size"))
    blocks = -(-columns // block)
    constants = [arrays[name] for name in node.input[1:] if name]
    codes = _unpack(constants[0].reshape(rows, -1), bits).reshape(rows, blocks, block).astype(np.float32)
    scales = constants[1].reshape(rows, blocks, 1)
    zeros = np.full((rows, blocks), 1 << (bits - 1))
    if len(constants) == 3:  # packed like codes, each row padded to whole bytes; HQQ's are floats
        zeros = constants[2].reshape(rows, -1)
        zeros = _unpack(zeros, bits)[:, :blocks] if zeros.dtype == np.uint8 else zeros
    weight = ((codes - zeros[:, :, None].astype(np.float32)) * scales).reshape(rows, -1)[:, :columns]
    return torch.from_numpy(weight), sum(constant.nbytes for constant in constants)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``[N, B]`` -> uint8 ``[N, B * 8 / bits]``, low bits first."""
    return packed if bits == 8 else np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(len(packed), -1)
