"""Execution providers of phones as backends: the CPU's artifact, and the session configuration an app gives with it.

ONNX Runtime hands a provider the nodes that it takes, and computes the others on the CPU. How many those are is what
ONNX Runtime's own usability checker counts: the audit of these backends, since no provider of a phone runs here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from exporter.errors import HostError
from exporter.spec import Artifact, Plan, Report
from targets.onnxruntime import OnnxRuntimeTarget

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import WeightStore
    from targets.base import Runner

SESSION = "session.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """What an app has to say to have an execution provider, and where it can have it."""

    name: str
    """As ``SessionOptions`` knows it."""
    options: Mapping[str, str] = field(default_factory=dict)
    session: Mapping[str, str] = field(default_factory=dict)
    """Session configuration that goes with it."""
    runs_on: str
    instead: str
    """What to take where the checker says no."""


PROVIDERS = {
    # https://onnxruntime.ai/docs/execution-providers/CoreML-ExecutionProvider.html
    "coreml": Provider(
        name="CoreMLExecutionProvider",
        options={"ModelFormat": "MLProgram", "MLComputeUnits": "ALL", "RequireStaticInputShapes": "0"},
        runs_on="an iPhone, an iPad or a Mac",
        instead="--target coreml, whose package Core ML runs as a whole",
    ),
    # https://onnxruntime.ai/docs/execution-providers/NNAPI-ExecutionProvider.html; flags are bits of an integer there
    "nnapi": Provider(
        name="NnapiExecutionProvider",
        options={"flags": "NNAPI_FLAG_CPU_DISABLED"},
        runs_on="an Android phone, where NNAPI itself is deprecated since Android 15",
        instead="--target onnxruntime, whose kernels for ARM take every node",
    ),
    # https://onnxruntime.ai/docs/execution-providers/Xnnpack-ExecutionProvider.html: it has threads of its own, so
    # ONNX Runtime's are not to wait in a loop beside them
    "xnnpack": Provider(
        name="XnnpackExecutionProvider",
        options={"intra_op_num_threads": "4"},
        session={"intra_op_num_threads": "1", "session.intra_op.allow_spinning": "0"},
        runs_on="a build of ONNX Runtime that has it: those for Android and iOS",
        instead="--target onnxruntime, whose own kernels take every node, or --target executorch, which is XNNPACK",
    ),
}


class ProviderTarget(OnnxRuntimeTarget):
    """``backend``: one of ``PROVIDERS``."""

    format: ClassVar[str] = f".onnx with external data, {SESSION} for the app's session"

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._provider = PROVIDERS[backend]

    def cannot_execute(self) -> str | None:
        return f"{self._provider.name} needs {self._provider.runs_on}"

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        artifact = super().lower(graph, store, plan, out)
        (out / SESSION).write_text(json.dumps(self.configuration(), indent=2) + "\n", encoding="utf-8")
        return artifact

    def configuration(self) -> dict[str, Any]:
        """What an app gives to the session, in the words of ONNX Runtime's C interface."""
        provider = self._provider
        return {
            "providers": [{"name": provider.name, "options": dict(provider.options)}, {"name": "CPUExecutionProvider"}],
            "session": dict(provider.session),
        }

    def audit(self, artifact: Artifact) -> Report:
        from targets.onnxruntime.usability import check

        return check(artifact.path, self.backend, self._provider)

    def runtime(self) -> str:
        return f"{self._provider.name} (not run here)"

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        raise HostError(
            f"{artifact.path.name} cannot be run here: {self.cannot_execute()}",
            hint="run it in an app on such a device, or take --target onnxruntime",
        )

    def open_structure(
        self, artifact: Artifact, *, graph: Graph, store: WeightStore, plan: Plan, scratch: Path
    ) -> AbstractContextManager[Runner]:
        return self.open(artifact, threads=plan.threads)
