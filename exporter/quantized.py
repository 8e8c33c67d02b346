"""A weight as it is stored: integer codes, and the scales or the table that turn them back into numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.spec import TABLE_ROWS, TABLE_VALUES

SMALLEST_SCALE = 2.0**-17
"""Scales lie on the bf16 grid and are at least this large, so that bf16 (XNNPACK), fp16 (Core ML) and
fp32 (ONNX Runtime) hold the same value: a bf16 significand (8 bits) fits fp16's 11 bits wherever the
exponent is in fp16's range, and 2**-17 leaves room for eight significant bits among fp16's subnormals (2**-24)."""

CODE_RANGE = {4: (-8, 7), 8: (-127, 127)}
"""Smallest and largest code for each bit width. int8 leaves -128 out so that negation stays in range."""

ALL_ROWS = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """Symmetric codes of one weight matrix; ``dequantize`` is its definition.

    ``codes``: int8 ``[N, K]``, within ``CODE_RANGE[bits]`` (int4 is unpacked in memory, packed on disk).
    ``scales``: float32 ``[N, K / group_size]`` on the bf16 grid; one per row when ``group_size == K``.
    """

    name: str
    bits: int
    group_size: int
    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        expected = (rows, columns // self.group_size)
        if columns % self.group_size or tuple(self.scales.shape) != expected:
            raise ValueError(
                f"{self.name}: scales are {tuple(self.scales.shape)}, but codes {(rows, columns)} "
                f"in groups of {self.group_size} want {expected}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self, rows: slice | Tensor = ALL_ROWS) -> Tensor:
        """float32 ``[n, K]`` of ``rows`` (int64 ``[n]``): code times the scale of its group, exact in float32."""
        codes, scales = self.codes[rows], self.scales[rows]
        return codes.view(len(codes), -1, self.group_size).float().mul_(scales.unsqueeze(-1)).view(codes.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class PalettizedTensor:
    """One weight matrix as indices into tables of 16 values; ``dequantize`` is its definition.

    ``codes``: int8 ``[N, K]``, 0 to 15. ``tables``: float32 ``[N / TABLE_ROWS, 16]`` on the float16 grid, ascending,
    one for each ``TABLE_ROWS`` rows.
    """

    name: str
    codes: Tensor
    tables: Tensor

    def __post_init__(self) -> None:
        expected = (len(self.codes) // TABLE_ROWS, TABLE_VALUES)
        if len(self.codes) % TABLE_ROWS or tuple(self.tables.shape) != expected:
            raise ValueError(
                f"{self.name}: tables are {tuple(self.tables.shape)}, but {len(self.codes)} rows, {TABLE_ROWS} to a "
                f"table, want {expected}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def group_size(self) -> int:
        """Columns that share a table: all."""
        return self.shape[1]

    def dequantize(self, rows: slice | Tensor = ALL_ROWS) -> Tensor:
        """float32 ``[n, K]`` of ``rows`` (int64 ``[n]``): what the table has at each code."""
        return self.tables.repeat_interleave(TABLE_ROWS, dim=0)[rows].gather(1, self.codes[rows].long())


CodedTensor = QuantizedTensor | PalettizedTensor


def pack_int4(codes: Tensor) -> Tensor:
    """Two's-complement nibbles, low nibble first: int8 ``[..., K]`` -> uint8 ``[..., K / 2]``."""
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_int4`: uint8 ``[..., K / 2]`` -> int8 ``[..., K]``."""
    pairs = packed.view(torch.int8)
    return torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(-2)  # shifts of int8 keep the sign
