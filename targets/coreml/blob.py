"""The weight file of an ``.mlpackage``: a header, then records of 64 bytes, each followed by its data.

Layout from coremltools' ``mlmodel/src/MILBlob/Blob/StorageFormat.hpp``: a record is ``uint32 sentinel, uint32 dtype,
uint64 size_bytes, uint64 offset``; types are those of ``BlobDataType.hpp``; elements of less than a byte are packed
from the low bits up.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.quantized import unpack_int4

_SENTINEL = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQ")
_INT4, _UINT4 = 8, 11
_NIBBLES = (_INT4, _UINT4)
_DTYPES = {1: torch.float16, 2: torch.float32, 4: torch.int8, 14: torch.int32}


class WeightFile:
    """The tensors of one weight file, mapped into memory and read where they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # A private mapping: pages come in when they are touched, and nothing can be written back.
        self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def read(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        """The tensor whose record lies at ``offset``, of four bits as int8. Raises InputError where there is none."""
        if offset + _RECORD.size > len(self._bytes):
            raise self._damaged(f"its size is {len(self._bytes)} bytes, but a record is expected at {offset}")
        sentinel, dtype, size, start = _RECORD.unpack(self._bytes[offset : offset + _RECORD.size].numpy().tobytes())
        if sentinel != _SENTINEL:
            raise self._damaged(f"there is no record at byte {offset}")
        if dtype not in (*_NIBBLES, *_DTYPES):
            raise self._damaged(f"the record at byte {offset} has data type {dtype}, which no exported package holds")
        elements = math.prod(shape)
        wanted = (elements + 1) // 2 if dtype in _NIBBLES else elements * _DTYPES[dtype].itemsize
        if size != wanted or start + size > len(self._bytes):
            raise self._damaged(f"the record at byte {offset} has {size} bytes of data, shape {shape} wants {wanted}")
        data = self._bytes[start : start + size]
        if dtype in _NIBBLES:
            codes = unpack_int4(data)[:elements].view(shape)
            return codes & 0xF if dtype == _UINT4 else codes
        return data.view(_DTYPES[dtype]).view(shape)

    def _damaged(self, found: str) -> InputError:
        return InputError(f"{self._path} is damaged: {found}", hint="make the artifact again")
