"""A weight as it is stored: integer codes, and the scales or the table that turn them back into numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exporter.spec import TABLE_ROWS, TABLE_VALUES

SMALLEST_SCALE = 2.0**-17
"""Scales lie on the bf16 grid and are at least this large, so that bf16 (XNNPACK), fp16 (Core ML) and
fp32 (ONNX Runtime) hold the same value: a bf16 significand (8 bits) fits fp16's 11 bits wherever the
exponent is in fp16's range, and 2**-17 leaves room for eight significant bits among fp16's subnormals (2**-24)."""

CODE_RANGE = {4: (-8, 7), 8: (-127, 127)}
"""Smallest and largest code for each bit width. int8 leaves -128 out so that negation stays in range; codes made
elsewhere may have it."""

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ALL_ROWS = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """Codes of one weight matrix; ``dequantize`` is its definition.

    ``codes``: int8 ``[N, K]``, within ``CODE_RANGE[bits]`` (int4 is unpacked in memory, packed on disk).
    ``scales``: float32 ``[N, K / group_size]``, one per row when ``group_size == K``; those that we choose lie on the
    bf16 grid.
    ``zeros``: int8 ``[N, K / group_size]``, the code of each group that stands for 0; None where that is 0, as in all
    codes that we choose.
    """

    name: str
    bits: int
    group_size: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        expected = (rows, columns // self.group_size)
        for kind, found in (("scales", self.scales), ("zero points", self.zeros)):
            if found is not None and (columns % self.group_size or tuple(found.shape) != expected):
                raise ValueError(
                    f"{self.name}: {kind} are {tuple(found.shape)}, but codes {(rows, columns)} "
                    f"in groups of {self.group_size} want {expected}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self, rows: slice | Tensor = ALL_ROWS) -> Tensor:
        """float32 ``[n, K]`` of ``rows`` (int64 ``[n]``): code less zero point, times the scale of its group; exact in
        float32 where the scale has 15 significant bits or fewer."""
        codes, scales = self.codes[rows], self.scales[rows]
        values = codes.view(len(codes), -1, self.group_size).float()
        if self.zeros is not None:
            values.sub_(self.zeros[rows].unsqueeze(-1))
        return values.mul_(scales.unsqueeze(-1)).view(codes.shape)

    def with_scales_in(self, dtype: str) -> QuantizedTensor:
        """The same with each scale rounded to ``dtype``, of ``SCALE_DTYPES``."""
        return replace(self, scales=self.scales.to(SCALE_DTYPES[dtype]).float())


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
