"""The ONNX Runtime target: one ``model.onnx`` with its weights beside it, loadable by onnxruntime-genai as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from exporter.errors import UsageError
from exporter.spec import (
    EMBEDDING,
    HEAD,
    ROUTER,
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
    from targets.base import Observation, Runner, SeeingRunner, Target

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
VISION, VISION_DATA = "vision.onnx", "vision.onnx.data"


class OnnxRuntimeTarget:
    name: ClassVar[str] = "onnxruntime"
    backend: str = "cpu"
    format: ClassVar[str] = ".onnx with external data, genai_config.json"

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        scheme = plan.scheme
        for name, shape in spec.weights().items():
            if plan.prefer is Prefer.PREFILL and len(shape) == 2 and name not in (EMBEDDING, HEAD):
                if name.endswith(ROUTER):
                    continue
                if scheme.precision(name) is not Precision.INT8:
                    return f"under --prefer prefill the body is int8, but {name} is {scheme.precision(name)}"
                continue  # MatMulIntegerToFloat takes any number of columns
            one_scale_per_row = len(shape) == 2 and scheme.groups(name, columns=shape[1]) == shape[1]
            if one_scale_per_row and scheme.precision(name).bits and shape[1] % 16:
                return f"MatMulNBits takes blocks of 16 columns or more, but {name} has {shape[1]} columns"
        return None

    def missing(self) -> str | None:
        return None

    def cannot_execute(self) -> str | None:
        return None

    def audit(self, artifact: Artifact) -> Report | None:
        return None

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        ruled = [rule.precision for rule in scheme.rules]
        quantized = any(precision.bits for precision in (scheme.body, scheme.head, *ruled))
        activations = Activations.INT8_PER_BLOCK if quantized else Activations.FLOAT
        if prefer is Prefer.PREFILL:
            return Arithmetic(
                activations=Activations.INT8_SYMMETRIC_PER_TOKEN,
                head_activations=activations,
                compute_dtype="fp32",
                kv_dtype="fp32",
            )
        return Arithmetic(activations=activations, compute_dtype="fp32", kv_dtype="fp32")

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from targets.base import make_artifact
        from targets.onnxruntime.genai import genai_config
        from targets.onnxruntime.lower import lower

        path = out / MODEL
        if graph.spec.vision:
            from targets.onnxruntime.images import FusingEmitter, SeeingEmitter

            emitter = FusingEmitter if graph.spec.fusion else SeeingEmitter
            lower(graph, store, plan, path=path, data_name=DATA, emitter=emitter)
            return make_artifact(self, spec=graph.spec, plan=plan, path=path)  # onnxruntime-genai knows none such
        lower(graph, store, plan, path=path, data_name=DATA)
        config = genai_config(graph.spec, context=plan.context, filename=MODEL)
        (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return make_artifact(self, spec=graph.spec, plan=plan, path=path)

    def lower_vision(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> None:
        from targets.onnxruntime.images import TileEmitter, VisionEmitter
        from targets.onnxruntime.lower import lower

        emitter = TileEmitter if graph.spec.fusion else VisionEmitter
        lower(graph, store, plan, path=out / VISION, data_name=VISION_DATA, emitter=emitter)

    def find(self, bundle: Path) -> Path:
        return bundle / MODEL

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        from targets.onnxruntime.read import read_weights

        yield from read_weights(artifact.path, artifact.spec)
        if artifact.spec.vision:
            yield from read_weights(artifact.path.with_name(VISION), artifact.spec)

    def runtime(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__}, CPUExecutionProvider"

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        from targets.onnxruntime.runner import OnnxRuntimeRunner

        return OnnxRuntimeRunner(artifact, threads=threads)

    def open_seeing(self, artifact: Artifact, *, threads: int, rounding: bool) -> AbstractContextManager[SeeingRunner]:
        from targets.onnxruntime.runner import OnnxRuntimeRunner

        return OnnxRuntimeRunner(artifact, threads=threads, rounding=rounding)

    def on(self, compute_units: str) -> Target:
        raise UsageError(f"--compute-units {compute_units}: ONNX Runtime runs it on the CPU here", hint="leave it out")

    def is_slow(self, spec: ModelSpec) -> bool:
        return False

    def structure_parts(self, graph: Graph, scheme: WeightScheme) -> Sequence[Graph]:
        return [graph]

    def open_structure(
        self, artifact: Artifact, *, graph: Graph, store: WeightStore, plan: Plan, scratch: Path
    ) -> AbstractContextManager[Runner]:
        from targets.onnxruntime.runner import OnnxRuntimeRunner

        return OnnxRuntimeRunner(artifact, threads=plan.threads, rounding=False)

    def latency_unmeasurable(self) -> str | None:
        return None

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        from targets.onnxruntime.observe import observe

        return observe(artifact, graph, calls, threads=threads)


def load(backend: str) -> Target:
    """What serves ``backend``, one of ``targets.BACKENDS``."""
    if backend == "qnn":
        from targets.onnxruntime.qnn import QnnTarget

        return QnnTarget()
    if backend in ("webgpu", "wasm"):
        from targets.onnxruntime.web import WebTarget

        return WebTarget(backend)
    if backend in ("coreml", "nnapi", "xnnpack"):
        from targets.onnxruntime.providers import ProviderTarget

        return ProviderTarget(backend)
    return {"cpu": OnnxRuntimeTarget}[backend]()
