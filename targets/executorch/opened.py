"""A program opened: the file as it was exported, with more of what it computes among its outputs.

XNNPACK computes a whole segment in one call, and the wheel's runtime is built without ExecuTorch's event tracer, so as
the file stands nothing inside can be seen. What is changed is which values are given and where in memory they lie;
nodes, weights and kernels stay the file's own.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targets.executorch import border
from targets.executorch.read import ProgramFile

with border.toolchain("be imported"):
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
        XNNHeader,
        _aligned_size,
        _get_schema_bytes,
        _pad_to,
    )
    from executorch.backends.xnnpack.utils.xnnpack_constants import (
        XNN_INVALID_VALUE_ID,
        XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
    )
    from executorch.exir._serialize._flatbuffer import _flatc_compile, _flatc_decompile
    from executorch.exir._serialize._flatbuffer_program import _program_to_flatbuffer
    from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.schema import (
        AllocationDetails,
        BackendDelegateDataReference,
        DataLocation,
        DataSegment,
        DelegateCall,
        EValue,
        KernelCall,
        Tensor,
        TensorShapeDynamism,
    )

_ALIGNMENT = 128
"""Of segments in the file, as ExecuTorch writes them, and of tensors in memory."""
_ARENA = 1
"""The memory in which ExecuTorch's planner has put every tensor."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the program: a value of the delegate of that number, or of the outer program where it is None."""

    delegate: int | None
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One node of a delegate (``XNNMultiply``), or one kernel of the outer program (``llama::custom_sdpa``)."""

    kind: str
    inputs: tuple[Place | str, ...]
    """A constant of a delegate goes by its key in the named data. A kernel's hold all of its arguments."""
    output: Place
    delegate: int | None


class OpenProgram:
    """A ``.pte`` read for its calls, to be written again with more outputs. Raises LoweringError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with ProgramFile(path) as file, border.toolchain("read the program back"):
            self._program = file.program
            self._segments_start = file.segments_start
            (self._plan,) = [plan for plan in self._program.execution_plan if plan.name == "forward"]
            instructions = [i.instr_args for chain in self._plan.chains for i in chain.instructions]
            self._arguments = {c.delegate_index: c.args for c in instructions if isinstance(c, DelegateCall)}
            self._delegates = {
                number: _Payload(file.payload(self._plan.delegates[number])) for number in self._arguments
            }
            self.calls = tuple(self._kernels(instructions)) + tuple(self._nodes())

    def outputs_of(self, delegate: int) -> set[Place]:
        """What a delegate gives to the outer program."""
        graph = self._delegates[delegate].graph
        return {self._place(delegate, identity) for identity in graph["output_ids"]}

    def write(self, places: Sequence[Place], path: Path, *, longest: int) -> list[int]:
        """Write the program with ``places`` among its outputs, for calls of at most ``longest`` tokens. Gives the
        number of the output that each of them is. To be called once."""
        context = self._plan.values[self._plan.inputs[0]].val.sizes[1]
        numbers = []
        with border.toolchain("open the program"):
            for place in places:
                index = place.index if place.delegate is None else self._give(place.delegate, place.index)
                self._allocate(self._plan.values[index].val, context=context, longest=longest)
                if index not in self._plan.outputs:
                    self._plan.outputs.append(index)
                numbers.append(self._plan.outputs.index(index))
            payloads = {number: d.to_bytes() for number, d in self._delegates.items() if d.changed}
            self._write(path, payloads)
        return numbers

    def _kernels(self, instructions: Sequence[Any]) -> Iterator[Call]:
        for call in instructions:
            if isinstance(call, KernelCall):
                places = tuple(Place(None, index) for index in call.args)
                name = self._plan.operators[call.op_index].name
                yield Call(kind=name, inputs=places[:-1], output=places[-1], delegate=None)

    def _nodes(self) -> Iterator[Call]:
        for number, payload in self._delegates.items():
            for node in payload.graph["xnodes"]:
                fields: Mapping[str, Any] = node["xnode_union"]
                read = [fields[key] for key in fields if key.endswith("_id") and key != "output_id"]
                yield Call(
                    kind=node["xnode_union_type"],
                    inputs=tuple(
                        payload.constant(identity) or self._place(number, identity)
                        for identity in read
                        if identity != XNN_INVALID_VALUE_ID
                    ),
                    output=self._place(number, fields["output_id"]),
                    delegate=number,
                )

    def _place(self, delegate: int, identity: int) -> Place:
        """Of a delegate's value: an outer one where the delegate takes or gives it."""
        external = self._delegates[delegate].value(identity)["external_id"]
        if external == XNN_INVALID_VALUE_ID:
            return Place(delegate, identity)
        return Place(None, self._arguments[delegate][external])

    def _give(self, delegate: int, identity: int) -> int:
        """Make an inner value one of the delegate's outputs; the index of the outer value that it becomes."""
        sizes = self._delegates[delegate].give(identity)
        tensor = Tensor(
            scalar_type=ScalarType.FLOAT,
            storage_offset=0,
            sizes=sizes,
            dim_order=list(range(len(sizes))),
            requires_grad=False,
            layout=0,
            data_buffer_idx=0,
            allocation_info=None,
            shape_dynamism=TensorShapeDynamism.DYNAMIC_BOUND,
        )
        self._plan.values.append(EValue(tensor))
        self._arguments[delegate].append(len(self._plan.values) - 1)
        return len(self._plan.values) - 1

    def _allocate(self, tensor: Tensor, *, context: int, longest: int) -> None:
        """Memory of its own, which nothing computed later is written over. A constant has none."""
        if tensor.data_buffer_idx:
            return
        if tensor.shape_dynamism is TensorShapeDynamism.DYNAMIC_BOUND and tensor.sizes[1] == context:
            tensor.sizes[1] = longest
        offset = self._plan.non_const_buffer_sizes[_ARENA]
        tensor.allocation_info = AllocationDetails(_ARENA, offset & 0xFFFFFFFF, offset >> 32)
        size = _aligned_size(4 * math.prod(tensor.sizes), _ALIGNMENT)
        self._plan.non_const_buffer_sizes[_ARENA] = offset + size

    def _write(self, path: Path, payloads: Mapping[int, bytes]) -> None:
        """The segments as they are, and after them those of ``payloads`` in place of the delegates' own."""
        segments = self._program.segments
        end = _aligned_size(max(segment.offset + segment.size for segment in segments), _ALIGNMENT)
        for number, payload in payloads.items():
            self._plan.delegates[number].processed = BackendDelegateDataReference(DataLocation.SEGMENT, len(segments))
            segments.append(DataSegment(offset=end, size=len(payload)))
            end += _aligned_size(len(payload), _ALIGNMENT)
        packed = _program_to_flatbuffer(self._program)
        header_size = _aligned_size(_ExtendedHeader.EXPECTED_LENGTH, packed.max_alignment)
        program_size = header_size + len(packed.data)
        start = _aligned_size(program_size, _ALIGNMENT)
        header = _ExtendedHeader(program_size=program_size, segment_base_offset=start, segment_data_size=end)
        padded = _pad_to(header.to_bytes(), header_size)
        with path.open("wb") as file:
            file.write(_insert_flatbuffer_header(packed.data, r"ET[0-9a-zA-Z]{2}", padded))
            file.seek(start)
            with self._path.open("rb") as old:
                old.seek(self._segments_start)
                shutil.copyfileobj(old, file)
            for number, payload in payloads.items():
                file.seek(start + segments[self._plan.delegates[number].processed.index].offset)
                file.write(payload)
            file.truncate(start + end)


class _Payload:
    """What a delegate is made of: XNNPACK's graph behind a header, as JSON of the wheel's own schema."""

    def __init__(self, data: bytes) -> None:
        header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
        self._offset: int = header.flatbuffer_offset
        self.graph: dict[str, Any] = _decompiled(data[self._offset :][: header.flatbuffer_size])
        self._constants = data[header.constant_data_offset :]
        self.changed = False

    def value(self, identity: int) -> dict[str, Any]:
        union: dict[str, Any] = self.graph["xvalues"][identity]["xvalue_union"]
        tensor: dict[str, Any] = union.get("tensor_value", union)
        return tensor

    def constant(self, identity: int) -> str | None:
        """The key of a constant in the named data; None for what is computed."""
        buffer = self.value(identity)["constant_buffer_idx"]
        key: str | None = self.graph["constant_data"][buffer]["named_key"] if buffer else None
        return key

    def give(self, identity: int) -> list[int]:
        """Make a value the last output; its largest sizes."""
        value = self.value(identity)
        value["external_id"], value["flags"] = self.graph["num_externs"], XNN_VALUE_FLAG_EXTERNAL_OUTPUT
        self.graph["num_externs"] += 1
        self.graph["output_ids"].append(identity)
        self.changed = True
        return list(value["dims"])

    def to_bytes(self) -> bytes:
        flatbuffer = _compiled(self.graph)
        end = self._offset + _aligned_size(len(flatbuffer), self._offset)
        header = XNNHeader(
            flatbuffer_offset=self._offset,
            flatbuffer_size=len(flatbuffer),
            constant_data_offset=end,
            constant_data_size=len(self._constants),
        )
        return _pad_to(_pad_to(header.to_bytes(), self._offset) + flatbuffer, end) + self._constants


def _decompiled(flatbuffer: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schema, binary = folder / "schema.fbs", folder / "delegate.bin"
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(flatbuffer)
        _flatc_decompile(str(folder), str(schema), str(binary))
        graph: dict[str, Any] = json.loads(binary.with_suffix(".json").read_text(encoding="utf-8"))
        return graph


def _compiled(graph: Mapping[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schema, text = folder / "schema.fbs", folder / "delegate.json"
        schema.write_bytes(_get_schema_bytes())
        text.write_text(json.dumps(graph), encoding="utf-8")
        _flatc_compile(str(folder), str(schema), str(text))
        return text.with_suffix(".bin").read_bytes()
