"""Weights read back out of a program's file, by name, for the codes verdict.

A ``.pte`` is a flatbuffer followed by segments. The linears' weights are *named data*, a segment each. The embedding's
are constants of the outer module, which have no names: they are found as the arguments of the one embedding kernel that
the program calls. What is found decides the precision and the group size, not the scheme that was asked for. The file
is mapped, and one tensor at a time is copied out of it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from exporter.errors import LoweringError
from exporter.quantized import QuantizedTensor, unpack_int4
from exporter.spec import EMBEDDING, Artifact
from exporter.store import StoredWeight
from targets.executorch import border

with border.toolchain("be imported"):
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
    from executorch.exir._serialize._program import _get_extended_header
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.schema import BackendDelegate, DelegateCall, Double, ExecutionPlan, KernelCall, Program
    from executorch.exir.schema import Tensor as ProgramTensor

    from targets.executorch.xnnpack import CODES, NIBBLE_OFFSET, ROW_SCALES, SCALES

EMBEDDING_KERNELS = {
    "aten::embedding": None,
    "quantized_decomposed::embedding_byte": 8,
    "quantized_decomposed::embedding_4bit": 4,
}
"""The kernels that an embedding is lowered to. The first argument is the table, of a quantized one the second its
scales."""

_DTYPES = {
    ScalarType.BYTE: torch.uint8,
    ScalarType.CHAR: torch.int8,
    ScalarType.HALF: torch.float16,
    ScalarType.FLOAT: torch.float32,
    ScalarType.INT: torch.int32,
    ScalarType.LONG: torch.int64,
    ScalarType.BOOL: torch.bool,
}

_CALLS = (KernelCall, DelegateCall)
_HEADER_BYTES = 64
_AGAIN = "lower the model again"


def read_weights(artifact: Artifact, *, elsewhere: Collection[str] = ()) -> Iterator[tuple[str, StoredWeight]]:
    """Every weight in the file under its stored name: the embedding's table first, then what the delegates hold; of
    those of the model that are not ``elsewhere``.

    Raises LoweringError for a file that is no whole program, or in which a weight is missing or has a wrong size.
    """
    with ProgramFile(artifact.path) as file:
        yield EMBEDDING, _read_embedding(file)
        for name, shape in artifact.spec.weights().items():
            if name not in elsewhere and (name != EMBEDDING or artifact.spec.tie_word_embeddings):
                yield name, read_named(file, name, shape)


class ProgramFile:
    """A ``.pte``, mapped: its flatbuffer parsed, its segments as they lie in the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with border.toolchain("read the program back"):
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = _get_extended_header(self._map[:_HEADER_BYTES])
            if header is None:
                raise LoweringError(f"{path} is no ExecuTorch program: it has no header", hint=_AGAIN)
            self.program: Program = _flatbuffer_to_program(self._map[: header.program_size])
        self.segments_start: int = header.segment_base_offset
        self._named = {entry.key: entry.segment_index for entry in self.program.named_data or []}

    def __enter__(self) -> ProgramFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._map.close()

    def __contains__(self, key: str) -> bool:
        return key in self._named

    def size(self, key: str) -> int:
        """Bytes that lie under ``key`` in the named data. Raises LoweringError where there is no such key."""
        if key not in self:
            raise LoweringError(f"{self._path} holds no {key}", hint=_AGAIN)
        size: int = self.program.segments[self._named[key]].size
        return size

    def named(self, key: str, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What lies under ``key`` in the named data. Raises LoweringError where it is not of that size."""
        wanted = math.prod(shape) * dtype.itemsize
        if self.size(key) != wanted:
            raise LoweringError(
                f"{self._path}: {key} has {self.size(key)} bytes, {list(shape)} of {dtype} has {wanted}", hint=_AGAIN
            )
        return self._tensor(self.program.segments[self._named[key]].offset, shape=shape, dtype=dtype)

    @property
    def forward(self) -> ExecutionPlan:
        (plan,) = [plan for plan in self.program.execution_plan if plan.name == "forward"]
        return plan

    def is_constant(self, value: object) -> bool:
        """Whether it is a tensor that lies in the file."""
        return isinstance(value, ProgramTensor) and value.data_buffer_idx > 0 and value.allocation_info is None

    def is_finite(self) -> bool:
        """Whether no constant and no number of the outer program is infinite or not a number."""
        values = [value.val for value in self.forward.values]
        floats = [value for value in values if self.is_constant(value) and _DTYPES[value.scalar_type].is_floating_point]
        numbers = [float(value.double_val) for value in values if isinstance(value, Double)]
        return all(map(math.isfinite, numbers)) and all(bool(self.constant(one).isfinite().all()) for one in floats)

    def call(self, kernel: str) -> list[ProgramTensor] | None:
        """The arguments of the only call of ``kernel``; None if there is no such call, or more than one."""
        plan = self.forward
        indices = {index for index, operator in enumerate(plan.operators) if operator.name == kernel}
        instructions = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
        calls = [call for call in instructions if isinstance(call, KernelCall) and call.op_index in indices]
        return [plan.values[argument].val for argument in calls[0].args] if len(calls) == 1 else None

    def constant(self, tensor: ProgramTensor) -> Tensor:
        """The contents of a constant of the outer module, in the shape and dtype that the program gives it."""
        constants = self.program.constant_segment
        offset = self.program.segments[constants.segment_index].offset + constants.offsets[tensor.data_buffer_idx]
        return self._tensor(offset, shape=tuple(tensor.sizes), dtype=_DTYPES[tensor.scalar_type])

    def payload(self, delegate: BackendDelegate) -> bytes:
        """What a delegate's backend is given: a segment, as our lowering writes it."""
        segment = self.program.segments[delegate.processed.index]
        start = self.segments_start + segment.offset
        return self._map[start : start + segment.size]

    def _tensor(self, offset: int, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start, length = self.segments_start + offset, math.prod(shape) * dtype.itemsize
        data = bytearray(self._map[start : start + length])
        if len(data) != length:
            raise LoweringError(f"{self._path} is cut off: it ends at byte {len(self._map)}", hint=_AGAIN)
        return torch.frombuffer(data, dtype=dtype).view(shape)


def _read_embedding(file: ProgramFile) -> StoredWeight:
    for kernel, bits in EMBEDDING_KERNELS.items():
        arguments = file.call(kernel)
        if arguments is None:
            continue
        return read_table(file, arguments, bits=bits)
    raise LoweringError(
        f"the program calls no embedding kernel that is known: {', '.join(EMBEDDING_KERNELS)}", hint=_AGAIN
    )


def read_table(file: ProgramFile, arguments: Sequence[ProgramTensor], *, bits: int | None) -> StoredWeight:
    """An embedding as the ``arguments`` of its kernel say, one of ``EMBEDDING_KERNELS``."""
    table = file.constant(arguments[0])
    if bits is None:
        return table
    codes = table if bits == 8 else unpack_int4(((table << 4) | (table >> 4)) ^ NIBBLE_OFFSET)
    return quantized(EMBEDDING, codes, file.constant(arguments[1]), bits=bits)


def constants_in_order(file: ProgramFile) -> list[ProgramTensor]:
    """The float constants of the outer program that are no scalars, each where it is first used."""
    plan = file.forward
    used = [i.instr_args.args for c in plan.chains for i in c.instructions if isinstance(i.instr_args, _CALLS)]
    values = [plan.values[index].val for index in dict.fromkeys(index for args in used for index in args)]
    held = [value for value in values if file.is_constant(value) and value.sizes]
    return [value for value in held if _DTYPES[value.scalar_type].is_floating_point]


def read_named(file: ProgramFile, name: str, shape: tuple[int, ...]) -> StoredWeight:
    """What delegates hold of the weight ``name``. Raises LoweringError where there is none, or one of another size."""
    elements = math.prod(shape)
    if name + CODES not in file:
        half = file.size(name) == elements * torch.float16.itemsize
        return file.named(name, shape=shape, dtype=torch.float16 if half else torch.float32)
    rows, columns = shape
    if file.size(name + CODES) == elements:
        codes = file.named(name + CODES, shape=shape, dtype=torch.int8)
        return quantized(name, codes, file.named(name + SCALES, shape=(rows, 1), dtype=torch.float32), bits=8)
    packed = file.named(name + CODES, shape=(rows, columns // 2), dtype=torch.uint8)
    if name + ROW_SCALES in file:
        scales = file.named(name + ROW_SCALES, shape=(rows, 1), dtype=torch.float32)
    else:
        groups = file.size(name + SCALES) // (rows * torch.bfloat16.itemsize)
        scales = file.named(name + SCALES, shape=(rows, groups), dtype=torch.bfloat16).float()
    return quantized(name, unpack_int4(packed ^ NIBBLE_OFFSET), scales, bits=4)


def quantized(name: str, codes: Tensor, scales: Tensor, *, bits: int) -> QuantizedTensor:
    """Scales ``[N]`` are those of rows; the group size follows from how many there are."""
    scales = scales.view(len(codes), -1)
    group_size = codes.shape[1] // max(1, scales.shape[1])
    return QuantizedTensor(name=name, bits=bits, group_size=group_size, codes=codes, scales=scales)
