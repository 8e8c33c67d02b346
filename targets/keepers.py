"""Which codes, as a checkpoint has them, each target can take: one sentence of each that it cannot."""

from __future__ import annotations

from exporter.spec import CodeKind, Precision

_MAT_MUL_N_BITS = (
    *("onnxruntime", "onnxruntime-webgpu", "onnxruntime-wasm"),
    *("onnxruntime-coreml", "onnxruntime-nnapi", "onnxruntime-xnnpack"),
)
_LEAST_BLOCK = 16
_XNNPACK_GROUP = 32
_GGUF_BLOCK = 32


def cannot_keep(label: str, kind: CodeKind) -> str | None:
    """Why the target and backend of ``label`` cannot hold codes of ``kind``; None if it can."""
    if label == "coreml":
        return None
    if label == "coreml-ane":
        return f"the Neural Engine decodes one scale per row only, not {kind}" if kind.group_size else None
    if label in _MAT_MUL_N_BITS:
        size = kind.group_size
        is_block = size >= _LEAST_BLOCK and size & (size - 1) == 0
        return None if not size or is_block else f"MatMulNBits takes blocks of 16, 32, 64 and so on, not of {size}"
    if label == "executorch":
        return _xnnpack(kind)
    if label == "gguf":
        return _gguf(kind)
    return "it takes no codes made elsewhere"


def _gguf(kind: CodeKind) -> str | None:
    """Q4_0 and Q8_0."""
    if kind.zero_points:
        return "Q4_0 and Q8_0 have no zero points"
    if kind.group_size % _GGUF_BLOCK:
        return f"Q4_0 and Q8_0 are blocks of {_GGUF_BLOCK} columns, groups of {kind.group_size} are no multiple of that"
    return None


def _xnnpack(kind: CodeKind) -> str | None:
    """Its src/tensor.c, ``xnn_define_blockwise_quantized_tensor_value`` and what is beside it."""
    if kind.zero_points:
        return "XNNPACK has no zero points"
    if kind.precision is Precision.INT8 and kind.group_size:
        return f"XNNPACK takes int8 with a scale for each row alone, not {kind}"
    if kind.signed_scales:
        return "XNNPACK takes no scale below 0"
    if kind.group_size % _XNNPACK_GROUP:
        return f"XNNPACK takes groups of a multiple of {_XNNPACK_GROUP}, not of {kind.group_size}"
    return None
