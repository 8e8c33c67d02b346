"""Backends of ExecuTorch that this host does not run: some it lowers for, of the others it says what is lacking."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

from exporter.errors import HostError, MissingToolError
from exporter.spec import Activations, Arithmetic, Artifact, ModelSpec, Plan, Precision, Prefer, Report, WeightScheme
from targets.executorch import FILE_NAME, ExecuTorchTarget
from targets.executorch.delegations import Delegation, Probe, lacking

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import StoredWeight, WeightStore
    from targets.base import Observation, Runner


class _ElsewhereTarget(ExecuTorchTarget):
    """What all of them have in common: nothing is opened here."""

    def __init__(self, known: Delegation | Probe) -> None:
        self.backend = known.backend
        self.title, self.runs_on = known.title, known.runs_on

    def cannot_execute(self) -> str | None:
        return f"ExecuTorch's wheel has no runtime for {self.title}, which runs on {self.runs_on}"

    def runtime(self) -> str:
        return self.title

    def latency_unmeasurable(self) -> str | None:
        return self.cannot_execute()

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        self._refuse_to_run()

    def structure_parts(self, graph: Graph, scheme: WeightScheme) -> Sequence[Graph]:
        return [graph]

    @contextmanager
    def open_structure(
        self, artifact: Artifact, *, graph: Graph, store: WeightStore, plan: Plan, scratch: Path
    ) -> Iterator[Runner]:
        self._refuse_to_run()
        yield  # never reached: it makes this a generator, as the supertype's is

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        self._refuse_to_run()

    def _refuse_to_run(self) -> NoReturn:
        raise HostError(str(self.cannot_execute()), hint="run the bundle on such a device and bring its report back")


class DelegatedTarget(_ElsewhereTarget):
    """A program whose delegates a device's own backend runs: lowered and audited here."""

    format: ClassVar[str] = ".pte, an ExecuTorch program of one token at a time"

    def __init__(self, delegation: Delegation) -> None:
        super().__init__(delegation)
        self.delegation = delegation

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        if plan.prefer is Prefer.PREFILL:
            return "--prefer prefill changes nothing here, a program takes one token at a time"
        taken, scheme = self.delegation.precisions, plan.scheme
        for name, shape in spec.weights().items():
            if len(shape) != 2:
                continue
            precision, group = scheme.precision(name), scheme.groups(name, columns=shape[1])
            if precision not in taken:
                return f"{self.title} takes {', '.join(taken)} matrices, and {name} is to be {precision}"
            if shape[1] % group:
                return f"{name} has {shape[1]} columns, which int4 groups of {scheme.group_size} do not divide"
            if precision is Precision.INT4 and group == shape[1] and not self.delegation.int4_per_row:
                return f"{self.title} takes int4 in groups, and {name} is to have one scale for each row"
        return None

    def missing(self) -> str | None:
        return lacking(self.delegation.needs, title=self.title)

    def audit(self, artifact: Artifact) -> Report | None:
        from targets.executorch.audit import audit

        return audit(artifact, self.delegation)

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        dtype = "fp16" if self._in_half(scheme) else "fp32"
        attention = dtype if self.delegation.half else "fp32"
        return Arithmetic(
            activations=Activations.FLOAT,
            compute_dtype=dtype,
            kv_dtype="fp16" if self.delegation.half_states else attention,
            dequantized_dtype=attention,
        )

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from targets.base import make_artifact
        from targets.executorch.delegated import write_program

        path = out / FILE_NAME
        half = self.delegation.half and self._in_half(plan.scheme)
        write_program(graph, store, path, delegation=self.delegation, context=plan.context, half=half)
        return make_artifact(self, spec=graph.spec, plan=plan, path=path)

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        from targets.executorch.audit import read_weights

        return read_weights(artifact, self.delegation)

    def _in_half(self, scheme: WeightScheme) -> bool:
        """Whether linears compute in float16: where a matrix is stored so, or codes are to become it."""
        rest = (scheme.body, scheme.embedding, scheme.head, *(rule.precision for rule in scheme.rules))
        return any(precision is Precision.FP16 or (self.delegation.half and precision.bits) for precision in rest)


class ProbedTarget(_ElsewhereTarget):
    """A backend for which lowering is not written: it says what it would take on this host, or that it is not."""

    format: ClassVar[str] = "nothing yet"

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self.probe = probe

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        return None  # ``missing`` does

    def missing(self) -> str | None:
        reason = lacking(self.probe.needs, title=self.title)
        return reason or f"lowering to {self.title} is not written; all that it takes is on this host"

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        raise MissingToolError(str(self.missing()), hint="choose another --backend")
