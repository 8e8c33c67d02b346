"""What lies inside the delegates of each backend: the ops in their order, and the constants that they read.

Every backend has a format of its own. Of each only so much is read as shows that the ops are those of the model, that
the weights are there, and that no number is one that the backend cannot take.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from exporter.errors import LoweringError
from exporter.quantized import QuantizedTensor, unpack_int4
from exporter.spec import Artifact, ModelSpec
from exporter.store import StoredWeight
from targets.executorch import border
from targets.executorch.read import ProgramFile, quantized
from targets.executorch.uses import Use

if TYPE_CHECKING:
    from targets.coreml.package import Package

with border.toolchain("be imported"):
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    from targets.executorch.xnnpack import NIBBLE_OFFSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A constant of a delegate."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    transposed: bool = False
    """Whether whoever reads it does so through a transposition of its last two dimensions."""

    def matrix_shape(self) -> tuple[int, ...]:
        """``[N, K]`` of a linear that multiplies with it: without dimensions of 1. What is read as it lies is the
        transpose of that."""
        shape = tuple(size for size in self.shape if size > 1)
        return shape if self.transposed else shape[::-1]

    def matrix(self) -> Tensor:
        """Of the shape of ``matrix_shape``, two dimensions."""
        shape = self.matrix_shape()
        return self.read().view(shape) if self.transposed else self.read().view(shape[::-1]).mT.contiguous()


@dataclass(slots=True)
class Payload:
    """One delegate, read."""

    ops: list[str] = field(default_factory=list)
    """Under the backend's own names, in order."""
    uses: list[Use] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    """Every constant."""
    numbers: list[float] = field(default_factory=list)
    """Every floating-point number that is an argument."""
    arguments: int = 0
    """Inputs and outputs: what a call has to bring."""
    folder: tempfile.TemporaryDirectory[str] | None = None
    """What its constants are read from, where they had to be unpacked; whoever reads them cleans up."""

    def is_finite(self) -> bool:
        """Whether no constant and no number is infinite or not a number."""
        floats = (one for one in (held.read() for held in self.held) if one.is_floating_point())
        return all(map(math.isfinite, self.numbers)) and all(bool(one.isfinite().all()) for one in floats)


def _add_linear(payload: Payload, held: Held | None, spec: ModelSpec) -> None:
    """A product with a constant, where that has the shape of a weight: one with a rotary table has not."""
    if held is not None and held.matrix_shape() in spec.weights().values():
        payload.uses.append(Use("linear", lambda _name: held.matrix()))


def _read_norm(held: Held) -> Callable[[str], StoredWeight]:
    return lambda _name: held.read().flatten()


def _read_table(held: Held) -> Callable[[str], StoredWeight]:
    return lambda _name: held.read()


def _is_norm(held: Held | None, spec: ModelSpec) -> bool:
    return held is not None and math.prod(held.shape) == spec.hidden_size == max(held.shape)


def _is_table(held: Held | None, spec: ModelSpec) -> bool:
    return held is not None and tuple(held.shape) == (spec.num_embeddings, spec.hidden_size)


def read_payload(data: bytes, *, backend: str, file: ProgramFile, artifact: Artifact) -> Payload:
    """Raises LoweringError where the payload is none of that backend, or holds what cannot be read."""
    with border.toolchain(f"read a delegate of {backend}"):
        return _READERS[backend](data, file, artifact)


# --- Vulkan ------------------------------------------------------------------------------------------------------

_VULKAN_DTYPES = {1: torch.uint8, 2: torch.int8, 3: torch.int32, 4: torch.float16, 5: torch.float32, 7: torch.int64}


def _read_vulkan(data: bytes, file: ProgramFile, artifact: Artifact) -> Payload:
    from executorch.backends.vulkan.serialization import vulkan_graph_schema as vk
    from executorch.backends.vulkan.serialization.vulkan_graph_serialize import (
        extract_vk_flatbuffer,
        flatbuffer_to_vk_graph,
    )

    graph, payload = flatbuffer_to_vk_graph(extract_vk_flatbuffer(data)), Payload()
    payload.arguments = len(graph.input_ids) + len(graph.output_ids)
    held: dict[int, Held] = {}
    for index, entry in enumerate(graph.values):
        value = entry.value
        if isinstance(value, vk.Double):
            payload.numbers.append(value.double_val)
        elif isinstance(value, vk.DoubleList):
            payload.numbers.extend(value.items)
        elif isinstance(value, vk.VkTensor) and value.constant_id >= 0:
            shape, dtype = tuple(value.dims), _VULKAN_DTYPES[int(value.datatype)]
            key = graph.constants[value.constant_id].named_key
            held[index] = Held(shape=shape, read=partial(file.named, key, shape=shape, dtype=dtype))
    payload.held = list(held.values())
    for call in graph.chain:
        constants = [held.get(argument) for argument in call.args]
        if call.name == "et_vk.prepack.default":
            if constants[0]:
                held[call.args[-1]] = constants[0]
        else:
            payload.ops.append(call.name)
            _add_vulkan_use(call.name, constants, payload=payload, spec=artifact.spec)
    return payload


def _add_vulkan_use(kind: str, constants: Sequence[Held | None], *, payload: Payload, spec: ModelSpec) -> None:
    first, second, third = [*constants, None, None][:3]
    match kind:
        case "aten.linear.default" if second:
            _add_linear(payload, replace(second, transposed=True), spec)
        case "aten.mm.default":
            _add_linear(payload, second, spec)
        case "et_vk.linear_q4gsw.default" if second and third:
            payload.uses.append(Use("linear", _read_vulkan_int4(second, third)))
        case "aten._weight_int8pack_mm.default" | "et_vk.linear_qcs4w.default" if second and third:
            payload.uses.append(Use("linear", _read_rows(second, third)))
        case "aten.embedding.default" if first and _is_table(first, spec):
            payload.uses.append(Use("embedding", _read_table(first)))
        case "aten.mul.Tensor" if second and _is_norm(second, spec):
            payload.uses.append(Use("rms_norm", _read_norm(second)))


def _read_rows(codes: Held, scales: Held) -> Callable[[str], StoredWeight]:
    """One scale a row; codes of int4 from 0, the high nibble first."""

    def read(name: str) -> QuantizedTensor:
        matrix = codes.read()
        bits = 8 if matrix.dtype == torch.int8 else 4
        if bits == 4:
            matrix = unpack_int4(((matrix << 4) | (matrix >> 4)) ^ NIBBLE_OFFSET)
        return quantized(name, matrix, scales.read()[: len(matrix)], bits=bits)

    return read


def _read_vulkan_int4(codes: Held, scales: Held) -> Callable[[str], StoredWeight]:
    """Codes from 0, the low nibble first; scales [K / group, N]."""

    def read(name: str) -> QuantizedTensor:
        matrix = unpack_int4(codes.read() ^ NIBBLE_OFFSET)
        return quantized(name, matrix, scales.read().mT[: len(matrix)].contiguous(), bits=4)

    return read


# --- Core ML -----------------------------------------------------------------------------------------------------


def _read_coreml(data: bytes, _file: ProgramFile, artifact: Artifact) -> Payload:
    from executorch.backends.apple.coreml import executorchcoreml

    from targets.coreml.package import Package

    folder = tempfile.TemporaryDirectory(prefix="llama-export-")
    payload = Payload(folder=folder)
    if not executorchcoreml.unflatten_directory_contents(data, folder.name):
        raise LoweringError("a delegate holds no Core ML package", hint="lower the model again")
    lowered = Path(folder.name) / "lowered_module"
    names = json.loads((lowered / "metadata.json").read_text(encoding="utf-8"))
    payload.arguments = len(names["inputNames"]) + len(names["outputNames"])
    package = Package(lowered / "model.mlpackage")
    stored: dict[str, Callable[[str], StoredWeight]] = {}
    held: dict[str, Held] = {}
    for operation in package.operations:
        name = operation.outputs[0].name if operation.outputs else ""
        given = {key: [one.name for one in value.arguments] for key, value in operation.inputs.items()}
        if operation.type == "const":
            _add_const(name, operation.attributes["val"], package, held)
        elif operation.type == "constexpr_blockwise_shift_scale":
            stored[name] = _read_constexpr(operation, package)
            payload.ops.append(operation.type)
        else:
            payload.ops.append(operation.type)
            _add_coreml_use(operation.type, given, held=held, stored=stored, payload=payload, spec=artifact.spec)
    payload.held = list(held.values())
    return payload


def _add_const(name: str, value: Any, package: Package, held: dict[str, Held]) -> None:
    """A constant of floats; others, such as shapes, are none of the model's."""
    from targets.coreml.package import MilType

    tensor = value.type.tensorType
    if tensor.dataType in (MilType.FLOAT16, MilType.FLOAT32):
        shape = tuple(dimension.constant.size for dimension in tensor.dimensions)
        held[name] = Held(shape=shape, read=lambda: package.constant(value))


def _read_constexpr(operation: Any, package: Package) -> Callable[[str], StoredWeight]:
    data, scale = (operation.inputs[key].arguments[0].value for key in ("data", "scale"))

    def read(name: str) -> QuantizedTensor:
        from targets.coreml.package import MilType

        bits = 4 if data.type.tensorType.dataType == MilType.INT4 else 8
        return quantized(name, package.constant(data), package.constant(scale).float(), bits=bits)

    return read


def _add_coreml_use(
    kind: str,
    given: Mapping[str, Sequence[str]],
    *,
    held: Mapping[str, Held],
    stored: Mapping[str, Callable[[str], StoredWeight]],
    payload: Payload,
    spec: ModelSpec,
) -> None:
    match kind:
        case "linear" | "matmul":
            name = given["weight" if kind == "linear" else "y"][0]
            if name in stored:
                payload.uses.append(Use("linear", stored[name]))
            elif name in held:
                _add_linear(payload, replace(held[name], transposed=kind == "linear"), spec)
        case "gather":
            name = given["x"][0]
            if name in stored:
                payload.uses.append(Use("embedding", stored[name]))
            elif name in held and _is_table(held[name], spec):
                payload.uses.append(Use("embedding", _read_table(held[name])))
        case "mul":
            constants = [held[name] for names in given.values() for name in names if name in held]
            payload.uses.extend(Use("rms_norm", _read_norm(one)) for one in constants if _is_norm(one, spec))


# --- Metal Performance Shaders -----------------------------------------------------------------------------------

_MPS_HEADER = 24
_MPS_DTYPE_NAMES = {
    "mps_data_type_float16": torch.float16,
    "mps_data_type_float32": torch.float32,
    "mps_data_type_int8": torch.int8,
    "mps_data_type_int32": torch.int32,
    "mps_data_type_int64": torch.int64,
    "mps_data_type_bool": torch.bool,
}
_THROUGH = {"MPSPermute", "MPSView", "MPSCast"}


def _read_mps(data: bytes, _file: ProgramFile, artifact: Artifact) -> Payload:
    payload, spec = Payload(), artifact.spec
    segment = int.from_bytes(data[8:16], "little")
    graph = _decompiled(data[_MPS_HEADER:segment], package="executorch.backends.apple.mps.serialization")
    payload.arguments = len(graph["input_ids"]) + len(graph["output_ids"])
    held: dict[int, Held] = {}
    for index, value in enumerate(graph["mps_values"]):
        size, offset = int(value["constant_buffer_size"]), segment + int(value.get("segment_offset", 0))
        if size:
            shape, dtype = tuple(value["dims"]), _MPS_DTYPE_NAMES[value["datatype"]]
            contents = data[offset : offset + size]
            held[index] = Held(shape=shape, read=partial(_tensor, contents, dtype=dtype, shape=shape))
    payload.held = list(held.values())
    for node in graph["mps_nodes"]:
        kind, fields = node["mpsnode_union_type"], node["mpsnode_union"]
        payload.ops.append(kind)
        payload.numbers.extend(value for value in fields.values() if isinstance(value, float))
        first, second = (held.get(fields.get(key, -1)) for key in ("input1_id", "input2_id"))
        if kind in _THROUGH and first:
            turned = kind == "MPSPermute"
            held[fields["output_id"]] = replace(first, transposed=first.transposed ^ turned)
        elif kind == "MPSMatMul":
            _add_linear(payload, second, spec)
        elif kind == "MPSMul" and second and _is_norm(second, spec):
            payload.uses.append(Use("rms_norm", _read_norm(second)))
        elif kind == "MPSEmbedding" and _is_table(first, spec) and first:
            payload.uses.append(Use("embedding", _read_table(first)))
    return payload


def _decompiled(flatbuffer: bytes, *, package: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schema, binary = folder / "schema.fbs", folder / "delegate.bin"
        schema.write_bytes((resources.files(package) / "schema.fbs").read_bytes())
        binary.write_bytes(flatbuffer)
        _flatc_decompile(str(folder), str(schema), str(binary), ["--raw-binary"])
        text = _NOT_FINITE.sub(_as_python_writes_it, binary.with_suffix(".json").read_text(encoding="utf-8"))
        graph: dict[str, Any] = json.loads(text)
        return graph


_NOT_FINITE = re.compile(r"(?<=: )-?(inf|nan)\b")
"""What flatc writes for a number that JSON has no word for."""


def _as_python_writes_it(found: re.Match[str]) -> str:
    return found[0].replace("inf", "Infinity").replace("nan", "NaN")


def _tensor(contents: bytes, *, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    wanted = math.prod(shape) * dtype.itemsize
    if len(contents) != wanted:
        raise LoweringError(
            f"a constant has {len(contents)} bytes, {list(shape)} of {dtype} has {wanted}", hint="lower the model again"
        )
    return torch.frombuffer(bytearray(contents), dtype=dtype).view(shape)


# --- TOSA --------------------------------------------------------------------------------------------------------

_TOSA_DTYPES = {1: torch.bool, 3: torch.int8, 5: torch.int32, 7: torch.float32, 8: torch.float16}
_TOSA_THROUGH = {"RESHAPE", "TRANSPOSE", "CAST", "IDENTITY"}


def _read_tosa(data: bytes, _file: ProgramFile, artifact: Artifact) -> Payload:
    from tosa.Op import Op
    from tosa.TosaGraph import TosaGraph

    names = {number: name for name, number in vars(Op).items() if isinstance(number, int)}
    payload, spec = Payload(), artifact.spec
    block = TosaGraph.GetRootAs(data, 0).Regions(0).Blocks(0)
    payload.arguments = block.InputsLength() + block.OutputsLength()
    held: dict[str, Held] = {}
    for index in range(block.TensorsLength()):
        tensor = block.Tensors(index)
        if tensor.DataLength() and tensor.Type() in _TOSA_DTYPES:
            shape, dtype = tuple(tensor.ShapeAsNumpy().tolist()), _TOSA_DTYPES[tensor.Type()]
            size = math.prod(shape) * dtype.itemsize
            contents = tensor.DataAsNumpy().tobytes()[:size]  # padded to eight bytes
            read = partial(_tensor, contents, dtype=dtype, shape=shape)
            held[tensor.Name().decode()] = Held(shape=shape, read=read)
    payload.held = list(held.values())
    for index in range(block.OperatorsLength()):
        operator = block.Operators(index)
        kind = names[operator.Op()]
        inputs = [operator.Inputs(number).decode() for number in range(operator.InputsLength())]
        constants = [held.get(name) for name in inputs]
        if kind.startswith("CONST"):
            continue
        payload.ops.append(kind)
        first, second = [*constants, None, None][:2]
        if kind in _TOSA_THROUGH and first:
            turned = kind == "TRANSPOSE"
            held[operator.Outputs(0).decode()] = replace(first, transposed=first.transposed ^ turned)
        elif kind == "MATMUL":
            _add_linear(payload, second, spec)
        elif kind == "CONV2D" and second:
            _add_linear(payload, replace(second, transposed=True), spec)
        elif kind == "MUL":
            norms = [one for one in (first, second) if one and _is_norm(one, spec)]
            payload.uses.extend(Use("rms_norm", _read_norm(one)) for one in norms)
    return payload


_READERS: dict[str, Callable[[bytes, ProgramFile, Artifact], Payload]] = {
    "vulkan": _read_vulkan,
    "coreml": _read_coreml,
    "mps": _read_mps,
    "arm": _read_tosa,
}
