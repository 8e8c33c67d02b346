"""Core ML for Apple's Neural Engine: fixed lengths, 1x1 convolutions, float16 throughout, scales per row.

Light to import, as the package is: coremltools comes in only where it is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from exporter.files import folder_in_progress, put_in_place
from exporter.spec import Artifact, ModelSpec, Plan, Precision, Prefer, WeightScheme
from targets.coreml import CoreMLTarget, executes_here
from targets.coreml.ane_parts import EMBEDDING_PART, HEAD_PART, WHOLE, parts_of

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import StoredWeight, WeightStore
    from targets.base import Observation, Runner

PREFILL_TOKENS = 64
"""What a prefill takes at a time, or the context where that is shorter. ANEMLL's default batch; ExecuTorch's static
Llama takes 32. Longer ones gain little where a call is bound by arithmetic, and pad more."""

STATE_MULTIPLE = 32
"""The Neural Engine refuses states of other widths (https://github.com/apple/coremltools/issues/2631: 256 runs, 270
does not), and what is laid out by rows of 64 bytes gains from it anyway."""

_SUFFIX = ".mlpackage"
_WHOLE = f"{WHOLE}{_SUFFIX}"
_PARTS = WHOLE
"""A package by itself, or the folder of several."""


class AneTarget(CoreMLTarget):
    backend: str = "ane"
    format: ClassVar[str] = ".mlpackage of fixed lengths for the Neural Engine, iOS 18 and macOS 15"

    def __init__(self, compute_units: str = "CPU_AND_NE") -> None:
        super().__init__(compute_units)

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        if plan.prefer is Prefer.PREFILL:
            return "--prefer prefill changes nothing here, activations are float16 in any case"
        return _refuse_precision(spec, plan.scheme) or _refuse_states(spec, plan.context)

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from targets.base import make_artifact
        from targets.coreml.ane_lower import lower

        parts = parts_of(graph.spec, plan.scheme)
        whole, split = out / _WHOLE, out / _PARTS
        with folder_in_progress(out, _PARTS) as folder:
            for part in parts:
                file = folder / f"{part.name}{_SUFFIX}"
                lower(graph, store, plan, part, file, prefill_length=min(PREFILL_TOKENS, plan.context))
            if len(parts) == 1:
                put_in_place(folder / _WHOLE, whole)
                shutil.rmtree(split, ignore_errors=True)  # of an earlier plan
            else:
                put_in_place(folder, split)
                shutil.rmtree(whole, ignore_errors=True)
        return make_artifact(self, spec=graph.spec, plan=plan, path=self.find(out))

    def find(self, bundle: Path) -> Path:
        """One package, or a folder of those that a model is split into."""
        return bundle / _PARTS if (bundle / _PARTS).is_dir() else bundle / _WHOLE

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        from targets.coreml.ane_lower import DECODE, PREFILL
        from targets.coreml.package import Package, weights_in

        packages = (Package(path, name) for path in packages_of(artifact) for name in (PREFILL, DECODE))
        return weights_in(packages, artifact.spec)

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        """Core ML chooses its own threads; the evaluator is never measured."""
        from targets.coreml.ane_runner import AneRunner, load_with_core_ml, load_with_evaluator
        from targets.coreml.evaluate import Rounding

        packages, units = packages_of(artifact), self._compute_units
        if executes_here():
            return AneRunner(artifact, packages, lambda: load_with_core_ml(packages, compute_units=units))
        return AneRunner(artifact, packages, lambda: load_with_evaluator(packages, Rounding.FP16))

    def open_structure(
        self,
        artifact: Artifact,
        *,
        graph: Graph,
        store: WeightStore,
        plan: Plan,
        scratch: Path,
    ) -> AbstractContextManager[Runner]:
        from targets.coreml.ane_runner import AneRunner, load_with_evaluator
        from targets.coreml.evaluate import Rounding

        packages = packages_of(artifact)
        return AneRunner(artifact, packages, lambda: load_with_evaluator(packages, Rounding.NONE))

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        """By the evaluator on every host: Core ML shows nothing of what it computes inside."""
        from targets.coreml.ane_observe import observe

        return observe(artifact, packages_of(artifact), graph, calls)


def packages_of(artifact: Artifact) -> list[Path]:
    """In the order in which they run."""
    if artifact.path.suffix == _SUFFIX:
        return [artifact.path]
    layers = sorted(artifact.path.glob(f"layers-*{_SUFFIX}"))
    embedding, head = (artifact.path / f"{name}{_SUFFIX}" for name in (EMBEDDING_PART, HEAD_PART))
    return [embedding, *layers, head]


def _refuse_precision(spec: ModelSpec, scheme: WeightScheme) -> str | None:
    matrices = {name: shape for name, shape in spec.weights().items() if len(shape) == 2}
    for name, (_, columns) in matrices.items():
        precision, group_size = scheme.precision(name), scheme.groups(name, columns=columns)
        if precision is Precision.FP32:
            return (
                f"{name} is to be fp32, but the Neural Engine computes in float16: pass --precision fp16, int8 or int4"
            )
        if precision is Precision.INT4 and group_size != columns:
            return (
                f"int4 has a scale for each {group_size} columns here, but the Neural Engine decodes one scale per row "
                "only: pass --group-size row"
            )
    return None


def _refuse_states(spec: ModelSpec, context: int) -> str | None:
    found = {"head_dim": spec.head_dim, "the context": context}
    odd = [f"{what} is {size}" for what, size in found.items() if size % STATE_MULTIPLE]
    if not odd:
        return None
    sizes = f"the Neural Engine wants the last sizes of a state to be multiples of {STATE_MULTIPLE}"
    if spec.head_dim % STATE_MULTIPLE:
        return f"{sizes}, but {' and '.join(odd)}: take --backend gpu for this model"
    return f"{sizes}, but {odd[0]}: pass --context {max(STATE_MULTIPLE, context // STATE_MULTIPLE * STATE_MULTIPLE)}"
