"""Reads the weights of a ``model.onnx`` back, as they lie in the file, for the codes verdict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from exporter.errors import LoweringError
from exporter.quantized import QuantizedTensor, unpack_int4
from exporter.spec import ModelSpec
from exporter.store import StoredWeight

CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"
ROWS, ROW_SCALES = ".rows", ".row_scales"
"""Of an embedding in a graph of fixed length."""
JOINT = "+"
"""Between the names of weights that lie one below the other."""
TILES = "cross_attention_mask"
"""The tiles that each token sees: an input of a decoder that sees images."""


def image_name(name: str) -> str:
    """``cross_k.3`` -> ``image_key_values.3.key``: an output of ``vision.onnx``, and an input of the decoder."""
    kind, index = name.split(".")
    return f"image_key_values.{index}.{'key' if kind == 'cross_k' else 'value'}"


def read_weights(path: Path, spec: ModelSpec) -> Iterator[tuple[str, StoredWeight]]:
    """Every initializer that belongs to the model, each weight once; codes in MatMulNBits' blocks or, where they are
    multiplied as integers, by rows."""
    tensors, shapes = _initializers(path), spec.weights()
    for name in tensors:
        base = name.removesuffix(CODES)
        if base != name:
            codes, scales = _torch(tensors[name]), _torch(tensors[base + SCALES])
            if codes.dtype == torch.int8:  # [K, N] and [N]
                scales = scales.unsqueeze(1)
                yield base, QuantizedTensor(name=base, bits=8, group_size=len(codes), codes=codes.T, scales=scales)
            else:
                names = base.split(JOINT)
                rows = [shapes[name][0] for name in names]
                if sum(rows) != len(codes) or sum(rows) != len(scales):
                    raise ValueError(f"{base} has {len(codes)} rows of codes and {len(scales)} of scales, not {rows}")
                zeros = _torch(tensors[base + ZEROS]).split(rows) if base + ZEROS in tensors else [None] * len(rows)
                for one, some, their_scales, points in zip(
                    names, codes.split(rows), scales.split(rows), zeros, strict=True
                ):
                    yield one, _quantized(one, codes=some, scales=their_scales, zeros=points, columns=shapes[one][1])
        elif not name.endswith((SCALES, ZEROS)) and not name.startswith(("constant.", "inv_freq.")):
            yield name, _torch(tensors[name])


def read_fixed_weights(paths: Iterable[Path]) -> Iterator[tuple[str, StoredWeight]]:
    """Of graphs of fixed length (``fixed.FixedEmitter``); what lies in one place of one file comes once."""
    seen: set[tuple[Any, ...]] = set()
    for path in paths:
        tensors = _initializers(path)
        for name, tensor in tensors.items():
            place = (tensor.location, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else (path, name)
            if place in seen or name.startswith(("constant.", "inv_freq.")) or name.endswith((SCALES, ROW_SCALES)):
                continue
            seen.add(place)
            if name.endswith(ROWS):  # uint8 [V, H] and [V, 1]
                base = name.removesuffix(ROWS)
                yield base, _by_row(base, (_torch(tensor) ^ 0x80).view(torch.int8), _torch(tensors[base + ROW_SCALES]))
            elif name.endswith(CODES):  # int8 [K, N] and [N]
                base = name.removesuffix(CODES)
                yield base, _by_row(base, _torch(tensor).T, _torch(tensors[base + SCALES]).unsqueeze(1))
            else:
                yield name, _torch(tensor)


def _by_row(name: str, codes: Tensor, scales: Tensor) -> QuantizedTensor:
    return QuantizedTensor(name=name, bits=8, group_size=codes.shape[1], codes=codes, scales=scales.float())


def _initializers(path: Path) -> dict[str, ir.TensorProtocol]:
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf, onnx and onnx_ir each raise their own
        raise LoweringError(f"{path.name} is not an ONNX model: {error}", hint="export the model again") from error
    return {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }


def _quantized(name: str, *, codes: Tensor, scales: Tensor, zeros: Tensor | None, columns: int) -> QuantizedTensor:
    """uint8 ``[N, K/b, b*bits/8]``, float32 ``[N, K/b]`` and uint8 ``[N, K/b*bits/8]`` -> the codes they stand for, in
    groups of b."""
    rows, blocks, block_bytes = codes.shape
    bits = 8 * blocks * block_bytes // columns
    packed = codes.view(rows, blocks * block_bytes)
    return QuantizedTensor(
        name=name,
        bits=bits,
        group_size=columns // blocks,
        codes=_signed(packed, bits=bits),
        scales=scales,
        zeros=None if zeros is None else _signed(zeros, bits=bits)[:, :blocks].contiguous(),
    )


def _signed(packed: Tensor, *, bits: int) -> Tensor:
    return unpack_int4(packed) ^ -8 if bits == 4 else (packed ^ 0x80).view(torch.int8)


def _torch(tensor: ir.TensorProtocol) -> Tensor:
    return torch.from_numpy(tensor.numpy().copy())
