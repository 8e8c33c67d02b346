"""GGUF: one file with weights and tokenizer, for llama.cpp and all that is built on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from exporter.errors import UsageError
from exporter.spec import Activations, Arithmetic, Artifact, ModelSpec, Plan, Prefer, Report, WeightScheme

if TYPE_CHECKING:
    from exporter.model.graph import Graph
    from exporter.store import StoredWeight, WeightStore
    from targets.base import Observation, Runner, Target

FILE_NAME = "model.gguf"
STRUCTURE_BYTES = 2 << 30
"""Of weights in float32, written to a file for the structure step at a time."""
_BLOCK = 32


class GGUFTarget:
    """Run with a cache of float16 and without flash attention: llama.cpp's own attention, whose every rounding the
    reference can emulate."""

    name: ClassVar[str] = "gguf"
    backend: str = "llamacpp"
    format: ClassVar[str] = ".gguf of Q4_0, Q8_0, F16 or F32, with tokenizer and chat template"

    def refuse(self, spec: ModelSpec, plan: Plan) -> str | None:
        if plan.prefer is Prefer.PREFILL:
            return "--prefer prefill changes nothing here, llama.cpp rounds activations to int8 in any case"
        if spec.adapter_rank:
            return "it has no adapters beside the linears of a model: pass --requantize, which merges them"
        from targets.gguf.architecture import built_in_otherwise
        from targets.gguf.lower import differing, stacks

        if why := built_in_otherwise(spec):
            return why
        for names in stacks(spec.weights()):
            if why := differing(names, plan.scheme):
                return why
        for name, shape in spec.weights().items():
            if len(shape) == 2 and plan.scheme.precision(name).bits and shape[1] % _BLOCK:
                return f"Q4_0 and Q8_0 are blocks of {_BLOCK} columns, but {name} has {shape[1]} columns"
        return None

    def missing(self) -> str | None:
        return None

    def cannot_execute(self) -> str | None:
        from targets.gguf.llamacpp import missing

        return missing()

    def audit(self, artifact: Artifact) -> Report | None:
        """Where llama.cpp is not installed: whether the file's fields say what the model is."""
        if not self.cannot_execute():
            return None
        from targets.gguf.read import audit

        return audit(artifact)

    def arithmetic(self, scheme: WeightScheme, prefer: Prefer = Prefer.QUALITY) -> Arithmetic:
        ruled = [rule.precision for rule in scheme.rules]
        quantized = any(precision.bits for precision in (scheme.body, scheme.head, *ruled))
        return Arithmetic(
            activations=Activations.INT8_PER_32 if quantized else Activations.FLOAT,
            compute_dtype="fp32",
            kv_dtype="fp16",
            product_dtype="fp16",
            angles="recurrence",
            group_scale_dtype="fp16",
            row_scale_dtype="fp16",
        )

    def lower(self, graph: Graph, store: WeightStore, plan: Plan, out: Path) -> Artifact:
        from targets.base import make_artifact
        from targets.gguf.lower import write_model
        from targets.gguf.vocabulary import vocabulary_of

        path, vocabulary = self.find(out), vocabulary_of(plan.checkpoint, graph.spec, cache=plan.store)
        write_model(graph, store, path, scheme=plan.scheme, vocabulary=vocabulary)
        return make_artifact(self, spec=graph.spec, plan=plan, path=path)

    def remarks(self, artifact: Artifact) -> list[str]:
        from exporter.checkpoint.gguf_file import read_header
        from targets.gguf.vocabulary import remarks

        return remarks(read_header(artifact.path).fields)

    def find(self, bundle: Path) -> Path:
        return bundle / FILE_NAME

    def read_weights(self, artifact: Artifact) -> Iterator[tuple[str, StoredWeight]]:
        from targets.gguf.read import read_weights

        return read_weights(artifact)

    def runtime(self) -> str:
        from targets.gguf.llamacpp import PACKAGE, installed_version, missing

        if missing():
            return "llama.cpp"
        return f"llama.cpp of {PACKAGE} {installed_version()}, CPU, cache of F16, no flash attention"

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Runner]:
        from targets.gguf.runner import LlamaCppRunner

        return LlamaCppRunner(artifact, threads=threads)

    def on(self, compute_units: str) -> Target:
        raise UsageError(f"--compute-units {compute_units}: llama.cpp runs it on the CPU here", hint="leave it out")

    def is_slow(self, spec: ModelSpec) -> bool:
        return False

    def structure_parts(self, graph: Graph, scheme: WeightScheme) -> Sequence[Graph]:
        """llama.cpp knows no model without a layer, so that the head comes with one. Kinds of layers of a Llama 4 it
        tells by their numbers, and runs none without each kind: a part has whole rounds of them, the last the head."""
        from exporter.model.graph import in_slices
        from targets.gguf.architecture import period

        parts = in_slices(graph, limit_bytes=STRUCTURE_BYTES, multiple=period(graph.spec))
        if len(parts) == 1:
            return parts
        *slices, _ = parts
        if graph.spec.experts is None:
            return [*slices, graph.shortened(range(1), head=True)]
        first = min(node.layer for node in slices[-1].nodes if node.layer is not None)
        return [*slices[:-1], graph.shortened(range(first, graph.spec.num_hidden_layers), head=True)]

    @contextmanager
    def open_structure(
        self, artifact: Artifact, *, graph: Graph, store: WeightStore, plan: Plan, scratch: Path
    ) -> Iterator[Runner]:
        """With every weight as the float32 that it stands for, and a cache of float32: llama.cpp rounds the input of
        whatever is stored otherwise."""
        from targets.gguf.architecture import read_decoder
        from targets.gguf.llamacpp import F32
        from targets.gguf.lower import write_model
        from targets.gguf.runner import LlamaCppRunner
        from targets.gguf.vocabulary import NONE

        path = scratch / FILE_NAME
        write_model(graph, store, path, scheme=None, vocabulary=NONE)
        hidden = not read_decoder(graph).gives_logits
        with LlamaCppRunner(replace(artifact, path=path), threads=plan.threads, cache=F32, hidden=hidden) as runner:
            yield runner

    def latency_unmeasurable(self) -> str | None:
        return None

    def observe(self, artifact: Artifact, *, graph: Graph, calls: Sequence[Sequence[int]], threads: int) -> Observation:
        from targets.gguf.observe import observe

        return observe(artifact, graph, calls, threads=threads)


def load(backend: str) -> Target:
    """What serves ``backend``, one of ``targets.BACKENDS``."""
    return {"llamacpp": GGUFTarget}[backend]()
