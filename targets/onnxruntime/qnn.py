"""Qualcomm's Hexagon by ONNX Runtime's QNN provider: two graphs of fixed length, compiled to binaries for one chip.

``model.prefill.onnx`` takes 64 tokens at a time and ``model.decode.onnx`` one; each is a single EPContext node that
names the binary beside it. ``source/`` holds what they were compiled from: the codes verdict reads it, and an app
compiles it for another chip. Qualcomm's emulator executes the binaries on Linux x86-64.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from exporter.checkpoint.config import read_json
from exporter.errors import LoweringError, UsageError
from exporter.spec import (
    EMBEDDING,
    HEAD,
    Activations,
    Arithmetic,
    Artifact,
    ModelSpec,
    Plan,
    Precision,
    Prefer,
    Report,
    WeightScheme,
)

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import StoredWeight, WeightStore
    from targets.base import Observation, Runner, Target

PREFILL, DECODE = "model.prefill.onnx", "model.decode.onnx"
SOURCE, WEIGHTS, CHIP = "source", "weights.data", "qnn.json"
PREFILL_LENGTH = 64
"""Tokens of a prompt that are read at a time."""

SLOW_PARAMETERS = 20_000_000
"""Beyond so many the emulator takes too long for proofs that decode many tokens: of a model of 3.5 million it computes
one in about a tenth of a second."""

_PACKAGE = "onnxruntime_qnn"
_DEVICES = Path(__file__).parents[1] / "devices.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class QnnChip:
    """What a binary is compiled for."""

    htp_arch: int
    """Version of the Hexagon Tensor Processor."""
    soc_model: int
    """Qualcomm's number of the system on a chip."""

    def options(self) -> dict[str, str]:
        """As the provider wants them."""
        return {"htp_arch": str(self.htp_arch), "soc_model": str(self.soc_model)}

    @classmethod
    def of_device(cls, slug: str | None) -> QnnChip:
        """Of a device of ``targets/devices.toml``; a Snapdragon 8 Gen 3 where none is named. Raises UsageError for one
        that has no Hexagon."""
        if slug is None:
            return SNAPDRAGON_8_GEN_3
        device = tomllib.loads(_DEVICES.read_text(encoding="utf-8"))[slug]
        if "htp_arch" not in device or "soc_model" not in device:
            raise UsageError(
                f"{device['name']} has no Hexagon that QNN knows: its chip is {device['chip']}",
                hint="leave the backend out: --device chooses one that the device has",
            )
        return cls(htp_arch=device["htp_arch"], soc_model=device["soc_model"])

    @classmethod
    def of_bundle(cls, folder: Path) -> QnnChip:
        """What the binaries in ``folder`` were compiled for. Raises InputError."""
        described = read_json(folder / CHIP)
        return cls(htp_arch=described["htp_arch"], soc_model=described["soc_model"])


SNAPDRAGON_8_GEN_3 = QnnChip(htp_arch=75, soc_model=57)
"""SM8650: both numbers as in ExecuTorch's table of Qualcomm's chips (backends/qualcomm/serialization/qc_schema.py)."""


class QnnTarget:
    name: ClassVar[str] = "onnxruntime"
    backend: str = "qnn"
    format: ClassVar[str] = ".onnx with an EPContext binary for Hexagon, and its source"

    def missing(self) -> str | None:
        if importlib.util.find_spec(_PACKAGE):
            return None
        if not _has_wheel():
            return (
                f"Qualcomm has no onnxruntime-qnn for {platform.system()} on {platform.machine()}; "
                "on Linux x86-64 it is pip install 'llama-export[qnn]'"
            )
        return "onnxruntime-qnn is not installed; install it with: pip install 'llama-export[qnn]'"

    def cannot_execute(self) -> str | None:
        if _has_wheel():
            return None
        return f"Qualcomm's emulator of Hexagon runs on Linux x86-64, not on {platform.system()} {platform.machine()}"

    def audit(self, artifact: Artifact) -> Report | None:
        return None

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        scheme = plan.scheme
        if plan.prefer is not Prefer.QUALITY:
            return f"--prefer {plan.prefer} is for the cpu backend"
        known = (Precision.FP16, Precision.INT8)
        matrices = [name for name, shape in spec.weights().items() if len(shape) == 2]
        for name in dict.fromkeys([EMBEDDING, HEAD, *matrices]):
            if scheme.precision(name) not in known:
                return f"Hexagon has fp16 and int8 here, but {name} is {scheme.precision(name)}"
        if any(scheme.precision(name).bits for name in matrices) and not plan.recipe.method.needs_text:
            return "int8 has static activations, whose ranges come from a calibration text: --calibration none has none"
        return None

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        ruled = [rule.precision for rule in scheme.rules]
        quantized = any(precision.bits for precision in (scheme.body, scheme.head, *ruled))
        return Arithmetic(
            activations=Activations.STATIC_UINT16 if quantized else Activations.FLOAT,
            compute_dtype="fp16",
            kv_dtype="fp16",
        )

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from exporter.model.static import linear_steps
        from targets.base import make_artifact
        from targets.onnxruntime.fixed import write_fixed

        source = out / SOURCE
        source.mkdir(exist_ok=True)
        static = self.arithmetic(store.scheme).activations is Activations.STATIC_UINT16
        write_fixed(
            graph,
            store,
            context=plan.context,
            logits=plan.logits,
            steps=linear_steps(graph, store.read_ranges()) if static else {},
            paths={length: source / name for length, name in _names(plan.context).items()},
            data_name=WEIGHTS,
        )
        compile_for(QnnChip.of_device(plan.device), out, context=plan.context)
        return make_artifact(self, spec=graph.spec, plan=plan, path=out / DECODE)

    def find(self, bundle: Path) -> Path:
        return bundle / DECODE

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        """Of the source: how the binary keeps them Qualcomm does not tell."""
        from targets.onnxruntime.read import read_fixed_weights

        return read_fixed_weights([artifact.path.parent / SOURCE / name for name in _names(artifact.context).values()])

    def runtime(self) -> str:
        from importlib.metadata import version

        return f"Hexagon emulated by onnxruntime-qnn {version('onnxruntime-qnn')}, onnxruntime {version('onnxruntime')}"

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        from targets.onnxruntime.fixed_runner import FixedRunner
        from targets.onnxruntime.qnn_process import QnnCalls

        folder = artifact.path.parent
        graphs = {length: folder / name for length, name in _names(artifact.context).items()}
        return FixedRunner(artifact, QnnCalls(graphs, QnnChip.of_bundle(folder).options()))

    def on(self, compute_units: str) -> Target:
        raise UsageError(f"--compute-units {compute_units}: Hexagon is emulated here", hint="leave it out")

    def is_slow(self, spec: ModelSpec) -> bool:
        return spec.parameters > SLOW_PARAMETERS

    def structure_parts(self, graph: Graph, scheme: WeightScheme) -> Sequence[Graph]:
        return [graph]

    def open_structure(
        self, artifact: Artifact, *, graph: Graph, store: WeightStore, plan: Plan, scratch: Path
    ) -> AbstractContextManager[Runner]:
        """The source itself in float32, by ONNX Runtime on the CPU."""
        from targets.onnxruntime.fixed_runner import CpuCalls, FixedRunner, in_float32

        source = artifact.path.parent / SOURCE
        models = {length: in_float32(source / name) for length, name in _names(artifact.context).items()}
        return FixedRunner(artifact, CpuCalls(models, folder=source, threads=plan.threads))

    def latency_unmeasurable(self) -> str | None:
        return "Hexagon is emulated here; the emulator's time says nothing about it"

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        from targets.onnxruntime.observe import observe_fixed

        source = artifact.path.parent / SOURCE
        paths = {length: source / name for length, name in _names(artifact.context).items()}
        return observe_fixed(paths, graph, calls, threads=threads)


def compile_for(chip: QnnChip, out: Path, *, context: int) -> None:
    """Compile what lies in ``out``'s source folder. Raises LoweringError where the provider does not take every node,
    and CapacityError where memory is too small."""
    from targets.onnxruntime.qnn_process import compile_graphs

    names = _names(context)
    for left_over in out.glob("model.*"):  # the provider writes over nothing
        left_over.unlink()
    compile_graphs(out, {f"{SOURCE}/{name}": name for name in names.values()}, chip.options())
    for name in names.values():
        check_compiled(out / name)
    described = {"htp_arch": chip.htp_arch, "soc_model": chip.soc_model, "prefill_length": max(names)}
    (out / CHIP).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def check_compiled(path: Path) -> None:
    """Raises LoweringError unless the compiled graph in ``path`` is one EPContext node of the provider, and nothing is
    left to the CPU."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    if kinds != ["EPContext"]:
        raise LoweringError(
            f"{path.name} holds {len(kinds)} nodes ({', '.join(sorted(set(kinds)))}), one EPContext was expected",
            hint="this is a fault of llama-export: please report it with the model's config.json",
        )


def _names(context: int) -> dict[int, str]:
    """File names by the length of call."""
    return {min(PREFILL_LENGTH, context): PREFILL, 1: DECODE}


def _has_wheel() -> bool:
    return (platform.system(), platform.machine()) == ("Linux", "x86_64")
