"""What is known of the backends that this host does not run, as data. Imports no toolchain."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from exporter.spec import Precision

_FLOATS = (Precision.FP32, Precision.FP16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Something that must be on this host, and what provides it."""

    what: str
    is_there: Callable[[], bool]
    provided_by: str
    """A command, or a download."""


def module(name: str, provided_by: str) -> Need:
    """A Python module; its package is looked for, not imported."""
    return Need(
        what=f"the Python module {name}",
        is_there=lambda: importlib.util.find_spec(name) is not None,
        provided_by=provided_by,
    )


def program(name: str, provided_by: str) -> Need:
    return Need(what=f"the program {name}", is_there=lambda: shutil.which(name) is not None, provided_by=provided_by)


def variable(name: str, provided_by: str) -> Need:
    return Need(what=f"the folder {name} names", is_there=partial(_names_folder, name), provided_by=provided_by)


def _names_folder(name: str) -> bool:
    return os.path.isdir(os.environ.get(name, ""))  # noqa: PTH112  (an empty path is none)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """One backend that ExecuTorch's wheel lowers to, and that runs on its own devices only."""

    backend: str
    title: str
    runs_on: str
    delegate: str
    """What a program calls it."""
    delegates: tuple[int, int]
    """Into how many a model is cut: so many, and so many more for each layer. More are a fault of the lowering."""
    left_over: frozenset[str]
    """Kernels that may run outside of them."""
    precisions: tuple[Precision, ...]
    """Of matrices of body and head."""
    int4_per_row: bool = False
    """Whether int4 may have one scale for a row."""
    half: bool = False
    """Whether linears and attention compute in float16, but where all weights are float32."""
    half_states: bool = False
    """Whether keys and values are kept as float16 even then."""
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One backend that is only looked for: lowering to it is not written."""

    backend: str
    title: str
    runs_on: str
    needs: tuple[Need, ...]


_EMBEDDINGS = frozenset(
    {"aten::embedding", "quantized_decomposed::embedding_byte", "quantized_decomposed::embedding_4bit"}
)

DELEGATIONS = {
    delegation.backend: delegation
    for delegation in (
        Delegation(
            backend="coreml",
            title="Core ML",
            runs_on="iOS 18, macOS 15 and later",
            delegate="CoreMLBackend",
            delegates=(1, 0),
            left_over=frozenset(),
            precisions=tuple(Precision),
            int4_per_row=True,
            half=True,
            half_states=True,  # coremltools casts every other state: "Core ML only supports fp16 states"
        ),
        Delegation(
            backend="vulkan",
            title="Vulkan",
            runs_on="GPUs of Android devices",
            delegate="VulkanBackend",
            delegates=(1, 0),
            left_over=_EMBEDDINGS,
            precisions=tuple(Precision),
            int4_per_row=True,
        ),
        Delegation(
            backend="mps",
            title="Metal Performance Shaders",
            runs_on="iOS 17, macOS 14 and later",
            delegate="MPSBackend",
            delegates=(1, 0),
            left_over=_EMBEDDINGS,
            precisions=_FLOATS,
        ),
        Delegation(
            backend="arm",
            title="Arm TOSA",
            runs_on="what compiles TOSA: Arm's Ethos-U and ML extensions for Vulkan",
            delegate="TOSABackend",
            delegates=(1, 0),
            # The cast of the position: TOSA has no int64.
            left_over=_EMBEDDINGS | {"dim_order_ops::_to_dim_order_copy"},
            precisions=_FLOATS,
            needs=(module("tosa_serializer", "pip install --no-deps tosa-tools==2026.5.0"),),
        ),
    )
}

_VELA = 'pip install "executorch[ethos-u]==1.4.1"'
_VGF = 'pip install "executorch[vgf]==1.4.1"'
_OPENVINO = 'pip install "executorch[openvino]==1.4.1" nncf'
_QNN = "the Qualcomm AI Engine Direct SDK, a download for registered developers: export QNN_SDK_ROOT=<its folder>"
_NEUROPILOT = "MediaTek's NeuroPilot Express SDK, a download for registered developers: pip install"

PROBES = {
    probe.backend: probe
    for probe in (
        Probe(
            backend="openvino",
            title="OpenVINO",
            runs_on="Intel CPUs, GPUs and NPUs",
            needs=(module("openvino", _OPENVINO), module("nncf", _OPENVINO)),
        ),
        Probe(
            backend="ethos-u",
            title="Arm Ethos-U",
            runs_on="microcontrollers with an Ethos-U NPU",
            needs=(module("tosa_serializer", _VELA), module("ethosu", _VELA)),
        ),
        Probe(
            backend="vgf",
            title="Arm VGF",
            runs_on="GPUs with Arm's ML extensions for Vulkan",
            needs=(module("tosa_serializer", _VGF), program("model-converter", _VGF)),
        ),
        Probe(
            backend="qnn",
            title="Qualcomm QNN",
            runs_on="Snapdragon NPUs",
            # Never found out by importing: the wheel's backend downloads the SDK where the variable is not set.
            needs=(variable("QNN_SDK_ROOT", _QNN), module("cpuinfo", "pip install py-cpuinfo")),
        ),
        Probe(
            backend="mediatek",
            title="MediaTek NeuroPilot",
            runs_on="MediaTek NPUs",
            needs=(
                module("mtk_converter", f"{_NEUROPILOT} mtk_converter-*.whl"),
                module("mtk_neuron", f"{_NEUROPILOT} mtk_neuron-*.whl"),
            ),
        ),
    )
}


def lacking(needs: tuple[Need, ...], *, title: str) -> str | None:
    """The first of ``needs`` that is not on this host and what provides it, in a sentence; None if all are there."""
    for need in needs:
        if not need.is_there():
            return f"{title} needs {need.what}, which is not on this host; it is provided by {need.provided_by}"
    return None
