"""Core ML: an ``.mlpackage`` for iOS 18 and macOS 15, emitted by coremltools' MIL builder.

Light to import: coremltools and what needs it come in only where they are used.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from exporter.errors import UsageError
from exporter.files import folder_in_progress, put_in_place
from exporter.spec import Activations, Arithmetic, Artifact, ModelSpec, Plan, Precision, Prefer, Report, WeightScheme

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import StoredWeight, WeightStore
    from targets.base import Observation, Runner, SeeingRunner, Target
    from targets.coreml.lower import Emitter

_PACKAGE, VISION = "model.mlpackage", "vision.mlpackage"
MOST_IMAGES = 4
"""That a text may have: Core ML wants a bound of every length. Of 11B each has 210 MB of keys and values, which an app
gives with every call."""

COMPUTE_UNITS = ("CPU_AND_GPU", "ALL", "CPU_ONLY", "CPU_AND_NE")
"""Names of ``coremltools.ComputeUnit``. The first is what a package is made for, and the default."""


def executes_here() -> bool:
    """Whether this host has a Core ML that knows states: macOS 15 and later. Elsewhere the evaluator stands in."""
    return sys.platform == "darwin" and int(platform.mac_ver()[0].split(".")[0]) >= 15


class CoreMLTarget:
    name: ClassVar[str] = "coreml"
    backend: str = "gpu"
    format: ClassVar[str] = ".mlpackage, an ML Program for iOS 18 and macOS 15"

    def __init__(self, compute_units: str = COMPUTE_UNITS[0]) -> None:
        self._compute_units = compute_units

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        if plan.prefer is Prefer.PREFILL:
            return "--prefer prefill changes nothing here, activations are float16 in any case"
        if plan.context < 2:
            return f"the context is {plan.context}, but Core ML's open lengths need a range: at least 2"
        return None

    def missing(self) -> str | None:
        return None

    def cannot_execute(self) -> str | None:
        return None

    def audit(self, artifact: Artifact) -> Report | None:
        return None

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        """The states, and what codes decode to, are float16 even where the rest is float32."""
        return Arithmetic(
            activations=Activations.FLOAT,
            compute_dtype="fp32" if scheme.body is Precision.FP32 else "fp16",
            kv_dtype="fp16",
            dequantized_dtype="fp16",
            group_scale_dtype="fp16",
            row_scale_dtype="fp16",
        )

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from targets.base import make_artifact
        from targets.coreml.images import FusingEmitter, SeeingEmitter
        from targets.coreml.lower import DecoderEmitter

        path, spec = self.find(out), graph.spec
        emitter = SeeingEmitter if spec.images else FusingEmitter if spec.fusion else DecoderEmitter
        self._write(graph, store, plan, path, emitter=emitter)
        return make_artifact(self, spec=graph.spec, plan=plan, path=path)

    def lower_vision(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> None:
        from targets.coreml.images import TileEmitter, VisionEmitter

        self._write(graph, store, plan, out / VISION, emitter=TileEmitter if graph.spec.fusion else VisionEmitter)

    def _write(self, graph: Graph, store: WeightStore, plan: Plan, path: Path, *, emitter: type[Emitter]) -> None:
        from targets.coreml.lower import lower

        compute_dtype = self.arithmetic(plan.scheme).compute_dtype
        with folder_in_progress(path.parent, path.stem) as folder:
            unfinished = folder / path.name
            lower(graph, store, plan, unfinished, compute_dtype=compute_dtype, emitter=emitter)
            put_in_place(unfinished, path)

    def find(self, bundle: Path) -> Path:
        return bundle / _PACKAGE

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        from targets.coreml.package import read_weights

        return read_weights(artifact)

    def runtime(self) -> str:
        version = importlib.metadata.version("coremltools")
        if executes_here():
            return f"Core ML on {self._compute_units}, MLModel.predict of coremltools {version}"
        return f"MIL evaluator (reference-evaluated, not run by Core ML), package of coremltools {version}"

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        return self.open_seeing(artifact, threads=threads, rounding=True)

    def open_seeing(self, artifact: Artifact, *, threads: int, rounding: bool) -> AbstractContextManager[SeeingRunner]:
        """Core ML chooses its own threads; the evaluator is never measured."""
        from targets.coreml.evaluate import Rounding
        from targets.coreml.runner import CoreMLRunner, run_with_core_ml, run_with_evaluator

        if rounding and executes_here():
            return CoreMLRunner(artifact, partial(run_with_core_ml, compute_units=self._compute_units))
        mode = Rounding.FP16 if rounding else Rounding.NONE
        return CoreMLRunner(artifact, partial(run_with_evaluator, rounding=mode))

    def on(self, compute_units: str) -> Target:
        if compute_units not in COMPUTE_UNITS:
            raise UsageError(
                f"--compute-units {compute_units} is unknown; known: {', '.join(COMPUTE_UNITS)}", hint="choose one"
            )
        if not executes_here():
            raise UsageError(
                f"--compute-units {compute_units}: Core ML runs these packages on macOS 15 and later only",
                hint="leave it out, the evaluator then takes its place; or validate on a Mac",
            )
        return type(self)(compute_units)

    def is_slow(self, spec: ModelSpec) -> bool:
        return spec.is_large and not executes_here()

    def structure_parts(self, graph: Graph, scheme: WeightScheme) -> Sequence[Graph]:
        return [graph]

    def open_structure(
        self,
        artifact: Artifact,
        *,
        graph: Graph,
        store: WeightStore,
        plan: Plan,
        scratch: Path,
    ) -> AbstractContextManager[Runner]:
        return self.open_seeing(artifact, threads=plan.threads, rounding=False)

    def latency_unmeasurable(self) -> str | None:
        if executes_here():
            return None
        return "Core ML runs these packages on macOS 15 and later only; the evaluator's time says nothing about it"

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        """By the evaluator on every host: Core ML shows nothing of what it computes inside."""
        from targets.coreml.observe import observe

        return observe(artifact, graph, calls)


def load(backend: str) -> Target:
    """What serves ``backend``, one of ``targets.BACKENDS``."""
    from targets.coreml.ane import AneTarget

    return {"gpu": CoreMLTarget, "ane": AneTarget}[backend]()
