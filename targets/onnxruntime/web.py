"""The browser as a backend of ONNX Runtime: one file for WebGPU and WebAssembly, run by onnxruntime-web in Chromium.

Both backends write the same bytes, so that a page which finds no GPU goes on by WebAssembly with what it has loaded.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from exporter.errors import UsageError
from exporter.model.reference import FULL_PRECISION
from exporter.spec import Arithmetic, Artifact, ModelSpec, Plan, Prefer, WeightScheme
from targets.onnxruntime import DATA, MODEL, OnnxRuntimeTarget

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import WeightStore
    from targets.base import Runner, Target


class WebTarget(OnnxRuntimeTarget):
    """``backend``: ``webgpu`` or ``wasm``."""

    format: ClassVar[str] = ".onnx with external data, for onnxruntime-web"

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def missing(self) -> str | None:
        from targets.onnxruntime import chromium

        return chromium.missing()

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        if plan.prefer is Prefer.PREFILL:
            return "a browser multiplies floats: --prefer prefill, int8 by int8, gains nothing there"
        return super().refuse(spec, plan)

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        """Floats, whatever the weights are: ``BrowserEmitter.accuracy_level``."""
        return FULL_PRECISION

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from targets.base import make_artifact
        from targets.onnxruntime.browser_lower import BrowserEmitter
        from targets.onnxruntime.lower import lower

        path = out / MODEL
        lower(graph, store, plan, path=path, data_name=DATA, emitter=BrowserEmitter)
        return make_artifact(self, spec=graph.spec, plan=plan, path=path)

    def runtime(self) -> str:
        from targets.onnxruntime import chromium

        gpu = ", SwiftShader" if self.backend == "webgpu" else ""
        return f"onnxruntime-web {chromium.WEB_VERSION}, {self.backend}{gpu}, {chromium.version()}"

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        from targets.onnxruntime.browser import BrowserRunner

        return BrowserRunner(artifact, provider=self.backend, threads=threads)

    def open_structure(
        self, artifact: Artifact, *, graph: Graph, store: WeightStore, plan: Plan, scratch: Path
    ) -> AbstractContextManager[Runner]:
        """The artifact itself: nothing in it rounds an activation."""
        return self.open(artifact, threads=plan.threads)

    def on(self, compute_units: str) -> Target:
        runs = "SwiftShader" if self.backend == "webgpu" else "the CPU"
        raise UsageError(f"--compute-units {compute_units}: a browser runs it on {runs} here", hint="leave it out")

    def is_slow(self, spec: ModelSpec) -> bool:
        """SwiftShader takes a good part of a second for a token of any model."""
        return self.backend == "webgpu"

    def latency_unmeasurable(self) -> str | None:
        if self.backend == "webgpu":
            return "WebGPU runs on SwiftShader here, a GPU in software: its time says nothing about a phone's"
        return None
