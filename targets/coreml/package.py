"""The ``.mlpackage`` as it lies on disk: a program in protobuf, a weight file, and a manifest that names them."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.errors import InputError, LoweringError
from exporter.files import sha256
from exporter.quantized import CodedTensor, PalettizedTensor, QuantizedTensor
from exporter.spec import Artifact, ModelSpec
from exporter.store import StoredWeight
from targets.coreml import VISION
from targets.coreml.blob import WeightFile
from targets.coreml.toolchain import MIL_pb2, Model_pb2

_DATA = "com.apple.CoreML"
_MODEL = f"{_DATA}/model.mlmodel"
_WEIGHTS = f"{_DATA}/weights"
_NAME_KEY = "co.huggingface.exporters.name"
_DATE_KEY = "com.github.apple.coremltools.conversion_date"
_NAMESPACE = uuid.UUID("6f1d3a54-6c0b-4a86-9d0e-0d9a3f6f5c11")
"""Of this format, for the identifiers in a manifest: any fixed one does."""

MilType = MIL_pb2.DataType
SCALED, TABLED = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"
CODED = (SCALED, TABLED)
"""The ops by which our packages store codes."""


def mil_name(name: str) -> str:
    """What a tensor of the model is called in a program, whose names hold only letters, digits and underscores."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)


def block_name(name: str, *, start: int) -> str:
    """What the rows of a tensor from ``start`` on are called, where they are stored in blocks."""
    return f"{mil_name(name)}_rows_{start}"


_BLOCK = re.compile(r"(.*)_rows_(\d+)")


class Package:
    """One function of a saved package, opened for reading. Raises InputError where it is not what it should be."""

    def __init__(self, path: Path, function: str = "main") -> None:
        model = Model_pb2.Model()
        try:
            model.ParseFromString((path / "Data" / _MODEL).read_bytes())
        except Exception as error:  # protobuf's own, or the file system's
            raise InputError(f"{path} holds no Core ML model: {error}", hint="make the artifact again") from error
        self.description = model.description
        if function not in model.mlProgram.functions:
            known = ", ".join(sorted(model.mlProgram.functions))
            raise InputError(f"{path} has no function {function!r}, only: {known}", hint="make the artifact again")
        program = model.mlProgram.functions[function]
        self.inputs = program.inputs
        block = program.block_specializations[program.opset]
        self.operations = block.operations
        self.outputs: list[str] = list(block.outputs)
        self.path = path
        self._folder = path / "Data" / _DATA

    @property
    def has_states(self) -> bool:
        return any(value.type.WhichOneof("type") == "stateType" for value in self.inputs)

    def key(self, operation: Any) -> tuple[Path, bytes]:
        """Equal for constants of any functions of one package that are the same bytes of its weight file."""
        return self.path, operation.SerializeToString(deterministic=True)

    @cached_property
    def _weights(self) -> WeightFile:
        return WeightFile(self._folder / "weights" / "weight.bin")

    def constant(self, value: Any) -> Any:
        """What a MIL ``Value`` holds: a tensor of its own dtype (int4 as int8), or a string."""
        if value.type.WhichOneof("type") != "tensorType":
            raise InputError("a constant of the program is no tensor", hint="make the artifact again")
        shape = tuple(dimension.constant.size for dimension in value.type.tensorType.dimensions)
        if value.WhichOneof("value") == "blobFileValue":
            return self._weights.read(value.blobFileValue.offset, shape)
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        match value.type.tensorType.dataType:
            case MilType.STRING:
                return tensor.strings.values[0]
            case MilType.FLOAT16:
                return torch.frombuffer(bytearray(tensor.bytes.values), dtype=torch.float16).view(shape)
            case MilType.FLOAT32:
                return torch.tensor(list(tensor.floats.values), dtype=torch.float32).view(shape)
            case MilType.INT32:
                return torch.tensor(list(tensor.ints.values), dtype=torch.int32).view(shape)
            case MilType.BOOL:
                return torch.tensor(list(tensor.bools.values), dtype=torch.bool).view(shape)
        raise InputError(
            f"a constant of the program holds {kind}, which cannot be read", hint="make the artifact again"
        )


def read_weights(artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
    """Every weight under its own name, in the order of the program, as the bytes of the package say.

    Raises LoweringError for a compressed constant that is no weight of the model, such as a RoPE table.
    """
    paths = [artifact.path, artifact.path.with_name(VISION)] if artifact.spec.vision else [artifact.path]
    return weights_in(map(Package, paths), artifact.spec)


def weights_in(packages: Iterable[Package], spec: ModelSpec) -> Iterator[tuple[str, StoredWeight]]:
    """``read_weights`` of some functions; what two functions of a package read from the same bytes comes once."""
    seen: set[tuple[Any, ...]] = set()
    for package in packages:
        for name, operations in _weight_operations(package, spec).items():
            key = tuple(package.key(operation) for operation in operations)
            if key not in seen:
                seen.add(key)
                yield name, _joined([_weight(name, operation, package, spec) for operation in operations])


def _weight_operations(package: Package, spec: ModelSpec) -> dict[str, list[Any]]:
    """The constants that hold each weight: one, or blocks of rows from the first on."""
    names = {mil_name(name): name for name in spec.weights()}
    found: dict[str, dict[int, Any]] = {}
    for operation in package.operations:
        if operation.type not in (*CODED, "const"):
            continue
        called = operation.outputs[0].name
        block = _BLOCK.fullmatch(called)
        name = names.get(block[1] if block else called)
        if name:
            found.setdefault(name, {})[int(block[2]) if block else 0] = operation
        elif operation.type in CODED:
            raise LoweringError(
                f"{package.path} stores {called} as codes, which is no weight of the model",
                hint="make the artifact again",
            )
    return {name: [blocks[start] for start in sorted(blocks)] for name, blocks in found.items()}


def _weight(name: str, operation: Any, package: Package, spec: ModelSpec) -> StoredWeight:
    if operation.type in CODED:
        return _coded(name, operation, package)
    return _in_shape(package.constant(operation.attributes["val"]), spec.weights()[name])


def _joined(blocks: list[StoredWeight]) -> StoredWeight:
    """Of blocks of rows the whole; the first kind decides, another is found to differ."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    if isinstance(first, QuantizedTensor):
        scaled = [block for block in blocks if isinstance(block, QuantizedTensor)]
        points = [block.zeros for block in scaled if block.zeros is not None]
        return replace(
            first,
            codes=torch.cat([block.codes for block in scaled]),
            scales=torch.cat([block.scales for block in scaled]),
            zeros=torch.cat(points) if points else None,
        )
    if isinstance(first, PalettizedTensor):
        tabled = [block for block in blocks if isinstance(block, PalettizedTensor)]
        codes, tables = ([getattr(block, part) for block in tabled] for part in ("codes", "tables"))
        return replace(first, codes=torch.cat(codes), tables=torch.cat(tables))
    return torch.cat([block for block in blocks if isinstance(block, Tensor)])


def _coded(name: str, operation: Any, package: Package) -> CodedTensor:
    """Raises LoweringError for tables that are not as ours."""
    arguments = {key: argument.arguments[0].value for key, argument in operation.inputs.items()}
    parts = {key: package.constant(value) for key, value in arguments.items()}
    if operation.type == TABLED:
        try:
            return PalettizedTensor(
                name=name, codes=parts["indices"].flatten(1), tables=parts["lut"].float().flatten(1)
            )
        except ValueError as error:
            raise LoweringError(f"{package.path}: {error}", hint="make the artifact again") from error
    codes, scales = (parts[key].flatten(1) for key in ("data", "scale"))  # of a convolution: [N, K, 1, 1]
    data = arguments["data"]
    return QuantizedTensor(
        name=name,
        bits=4 if data.type.tensorType.dataType == MilType.INT4 else 8,
        group_size=codes.shape[1] // scales.shape[1],
        codes=codes,
        scales=scales.float(),
        zeros=parts["offset"].flatten(1) if "offset" in parts else None,
    )


def _in_shape(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A float weight, or some rows of it, without the kernel of a convolution, [N, K, 1, 1], and one time where it is
    there twice, as the gains of a layer_norm over [x, -x]; as it is where it is neither."""
    if len(shape) == 2:
        return value.flatten(1)
    first, second = value.chunk(2) if len(value) == 2 * shape[0] else (value, value)
    return first.contiguous() if torch.equal(first, second) else value


def finish(path: Path, *, model_name: str) -> None:
    """Say in the package which model it is, and take out what differs from one run to the next."""
    file = path / "Data" / _MODEL
    model = Model_pb2.Model()
    model.ParseFromString(file.read_bytes())
    metadata = model.description.metadata.userDefined
    metadata[_NAME_KEY] = model_name
    metadata.pop(_DATE_KEY, None)
    file.write_bytes(model.SerializeToString(deterministic=True))
    _write_manifest(path)


def _write_manifest(path: Path) -> None:
    """Its identifiers, random as coremltools makes them, become digests of what they stand for."""
    weights = path / "Data" / _WEIGHTS / "weight.bin"
    contents = sha256(path / "Data" / _MODEL) + (sha256(weights) if weights.exists() else "")
    items = {
        str(uuid.uuid5(_NAMESPACE, f"{item} {contents}")).upper(): {
            "author": _DATA,
            "description": description,
            "name": Path(item).name,
            "path": item,
        }
        for item, description in ((_MODEL, "CoreML Model Specification"), (_WEIGHTS, "CoreML Model Weights"))
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": next(iter(items)),
    }
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n")
