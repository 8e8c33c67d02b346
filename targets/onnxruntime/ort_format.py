"""``model.ort``: the artifact in one file that a minimal build of ONNX Runtime loads, and the operators it has to have.

Such a build has no parser for ``.onnx`` and no optimizer: what the optimizer does is done here. It is built from ONNX
Runtime's sources with ``--minimal_build extended --include_ops_by_config required_operators.config``.

The same artifact gives the same operators and the same model, but not the same bytes of it: ONNX Runtime 1.31 writes a
table of kernel types in the order of a hash map that is another in each run.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import onnxruntime as ort

from exporter.errors import CapacityError, LoweringError
from exporter.spec import Artifact, Precision

MODEL, OPERATORS = "model.ort", "required_operators.config"

LARGEST_BYTES = (1 << 31) - 1
"""Offsets within a flatbuffer are signed 32-bit integers (https://flatbuffers.dev/internals)."""

_DEVICE_SPECIFIC = ["NchwcTransformer"]
"""Arranges values for x86 alone: onnxruntime.tools.convert_onnx_models_to_ort leaves it out as well."""


def write_ort(artifact: Artifact, folder: Path) -> tuple[Path, Path]:
    """Write both files into ``folder``, or neither; their paths. Raises CapacityError for an artifact that no .ort can
    hold, LoweringError for one that ONNX Runtime cannot convert, OSError."""
    _refuse_large(artifact)
    folder.mkdir(parents=True, exist_ok=True)
    model, operators = folder / MODEL, folder / OPERATORS
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ort.") as name:
        converted, listed = Path(name, MODEL), Path(name, OPERATORS)
        try:
            _convert(artifact.path, converted)
            listed.write_text(_required_operators(converted), encoding="utf-8")
        except OSError:
            raise
        except Exception as error:  # onnxruntime raises a class of its own for each status code, without a common base
            raise LoweringError(
                f"ONNX Runtime cannot convert {artifact.path.name} to .ort: {error}", hint="take the .onnx as it is"
            ) from error
        converted.replace(model)
        try:
            listed.replace(operators)
        except OSError:
            model.unlink()
            raise
    return model, operators


def _refuse_large(artifact: Artifact) -> None:
    """What a .ort holds is all in one flatbuffer, and fp16 as the floats that it is multiplied as."""
    path = artifact.path
    stored = sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())
    size = stored * (2 if artifact.scheme.body is Precision.FP16 else 1)
    if size > LARGEST_BYTES:
        raise CapacityError(
            f"{path.name} would be {size:,} bytes as .ort, which holds no more than {LARGEST_BYTES:,}",
            hint="take the .onnx with its weights beside it, a smaller precision or a smaller model",
        )


def _convert(source: Path, destination: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(destination)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "0")  # as for any processor but ARM
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=_DEVICE_SPECIFIC)


def _required_operators(model: Path) -> str:
    """The lines of the configuration, ``domain;opset;operator,...``, by ONNX Runtime's own reader of the file."""
    from onnxruntime.tools.ort_format_model import OrtFormatModelProcessor

    required: dict[str, dict[int, set[str]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file to be closed by whoever collects it
        OrtFormatModelProcessor(str(model), required, None).process()
    lines = [
        f"{domain};{opset};{','.join(sorted(operators))}"
        for domain, by_opset in sorted(required.items())
        for opset, operators in sorted(by_opset.items())
        if operators
    ]
    return "\n".join([f"# Operators of {MODEL}", *lines, ""])
