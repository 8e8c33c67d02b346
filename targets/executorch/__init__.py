"""ExecuTorch: a ``.pte`` whose layers are XNNPACK delegates. Importing this folder imports no toolchain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

from exporter.errors import UsageError
from exporter.memory import host_memory_bytes
from exporter.spec import Activations, Arithmetic, Artifact, ModelSpec, Plan, Prefer, Report, WeightScheme

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import StoredWeight, WeightStore
    from targets.base import Observation, Runner, SeeingRunner, Target

FILE_NAME = "model.pte"
VISION = "vision.pte"
"""Beside it, of a model that sees images."""

MOST_IMAGES = 4
"""That a decoder can be shown: the mask of its longest call, ``context`` times the states of so many images in float32,
is planned for. At a context of 2,048 an image of Llama 3.2 Vision is 52 MB of it."""

STRUCTURE_BYTES = 2 << 30
"""Of float32 weights in one program for the structure step. Lowering holds some of them twice, and so does the runtime,
which lays them out anew."""

_LEAST_CONTEXT = 4
"""torch.export takes a length of 0 or 1 for a constant, so that a dynamic one needs room above."""


class ExecuTorchTarget:
    name: ClassVar[str] = "executorch"
    backend: str = "xnnpack"
    format: ClassVar[str] = ".pte, an ExecuTorch program"

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        scheme = plan.scheme
        if plan.prefer is Prefer.PREFILL:
            return "--prefer prefill changes nothing here, XNNPACK rounds activations to int8 in any case"
        if plan.context < _LEAST_CONTEXT:
            return f"the context is {plan.context}, a program of dynamic length needs at least {_LEAST_CONTEXT}"
        for name, shape in spec.weights().items():
            if len(shape) == 2 and shape[1] % scheme.groups(name, columns=shape[1]):
                return f"{name} has {shape[1]} columns, which int4 groups of {scheme.group_size} do not divide"
        needed, there = 4 * spec.parameters, host_memory_bytes()
        if plan.images and self._rounds_activations(scheme) and needed > there:
            return (
                "its proof with an image takes all weights in float32 at once, "
                f"{needed / 1e9:,.1f} GB, and this host has {there / 1e9:,.1f} GB of memory"
            )
        return None

    def missing(self) -> str | None:
        return None

    def cannot_execute(self) -> str | None:
        return None

    def audit(self, artifact: Artifact) -> Report | None:
        return None

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        ruled = [rule.precision for rule in scheme.rules]
        quantized = any(precision.bits for precision in (scheme.body, scheme.embedding, scheme.head, *ruled))
        return Arithmetic(
            activations=Activations.INT8_PER_TOKEN if quantized else Activations.FLOAT,
            compute_dtype="fp32",
            kv_dtype="fp32",
            group_scale_dtype="bf16",
        )

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from targets.base import make_artifact
        from targets.executorch.lower import write_program

        path = out / FILE_NAME
        if graph.spec.vision:
            from targets.executorch.images import walk_of

            write_program(graph, store, path, context=plan.context, logits=plan.logits, walk=walk_of(graph.spec))
        else:
            write_program(graph, store, path, context=plan.context, logits=plan.logits, kv_cache=plan.kv_cache)
        return make_artifact(self, spec=graph.spec, plan=plan, path=path)

    def lower_vision(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> None:
        from targets.executorch.images import write_vision

        write_vision(graph, store, out / VISION)

    def find(self, bundle: Path) -> Path:
        return bundle / FILE_NAME

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        if artifact.spec.vision:
            from targets.executorch.images import read_weights as read_both

            return read_both(artifact)
        from targets.executorch.read import read_weights

        return read_weights(artifact)

    def runtime(self) -> str:
        from targets.executorch.border import installed_version

        return f"executorch {installed_version()}, xnnpack"

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        from targets.executorch.runner import ProgramRunner

        return ProgramRunner(artifact, threads=threads)

    @contextmanager
    def open_seeing(self, artifact: Artifact, *, threads: int, rounding: bool) -> Iterator[SeeingRunner]:
        """Without ``rounding`` lowered again, from what the files hold."""
        from targets.executorch.images import write_unrounded
        from targets.executorch.runner import SeeingProgramRunner

        with TemporaryDirectory(prefix="llama-export-") as folder:
            if not rounding and self._rounds_activations(artifact.scheme):
                artifact = write_unrounded(artifact, Path(folder))
            with SeeingProgramRunner(artifact, threads=threads) as runner:
                yield runner

    def on(self, compute_units: str) -> Target:
        raise UsageError(f"--compute-units {compute_units}: XNNPACK runs it on the CPU here", hint="leave it out")

    def is_slow(self, spec: ModelSpec) -> bool:
        return False

    def structure_parts(self, graph: Graph, scheme: WeightScheme) -> Sequence[Graph]:
        from exporter.model.graph import in_slices

        return in_slices(graph, limit_bytes=STRUCTURE_BYTES) if self._rounds_activations(scheme) else [graph]

    def _rounds_activations(self, scheme: WeightScheme) -> bool:
        return self.arithmetic(scheme).activations is not Activations.FLOAT

    @contextmanager
    def open_structure(
        self, artifact: Artifact, *, graph: Graph, store: WeightStore, plan: Plan, scratch: Path
    ) -> Iterator[Runner]:
        """With the codes of every linear as the float32 weight they stand for, and a cache of floats; an artifact of
        floats is its own structure."""
        from targets.executorch.lower import Dequantized, write_program

        if self._rounds_activations(plan.scheme) or plan.kv_cache:
            path, matrices = scratch / FILE_NAME, Dequantized(store)
            write_program(graph, store, path, context=plan.context, logits=plan.logits, matrices=matrices)
            artifact = replace(artifact, path=path)
        with self.open(artifact, threads=plan.threads) as runner:
            yield runner

    def latency_unmeasurable(self) -> str | None:
        return None

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        from targets.executorch.observe import observe

        return observe(artifact, graph, calls, threads=threads)


class PortableTarget(ExecuTorchTarget):
    """The same file format with no delegate in it: ExecuTorch's own kernels compute everything, in float32."""

    backend: str = "portable"
    format: ClassVar[str] = ".pte, an ExecuTorch program of its own kernels"

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        if plan.prefer is Prefer.PREFILL:
            return "--prefer prefill changes nothing here, no kernel multiplies int8 with int8"
        return super().refuse(spec, plan)

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        return Arithmetic(activations=Activations.FLOAT, compute_dtype="fp32", kv_dtype="fp32")

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from targets.base import make_artifact
        from targets.executorch.portable import write_program

        path = out / FILE_NAME
        write_program(graph, store, path, context=plan.context, logits=plan.logits)
        return make_artifact(self, spec=graph.spec, plan=plan, path=path)

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        from targets.executorch.portable import read_weights

        return read_weights(artifact)

    def runtime(self) -> str:
        from targets.executorch.border import installed_version

        return f"executorch {installed_version()}, its own kernels"

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        from targets.executorch.portable import longest
        from targets.executorch.runner import ProgramRunner

        return ProgramRunner(artifact, threads=threads, longest=longest(artifact.context))

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        from targets.executorch.observe import observe_portable

        return observe_portable(artifact, graph, calls, threads=threads)

    def on(self, compute_units: str) -> Target:
        raise UsageError(f"--compute-units {compute_units}: these kernels run on the CPU only", hint="leave it out")


def load(backend: str) -> Target:
    """What serves ``backend``, one of ``targets.BACKENDS``."""
    from targets.executorch.delegations import DELEGATIONS, PROBES
    from targets.executorch.elsewhere import DelegatedTarget, ProbedTarget

    if backend in DELEGATIONS:
        return DelegatedTarget(DELEGATIONS[backend])
    if backend in PROBES:
        return ProbedTarget(PROBES[backend])
    return {"xnnpack": ExecuTorchTarget, "portable": PortableTarget}[backend]()
