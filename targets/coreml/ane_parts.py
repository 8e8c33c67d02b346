"""Which package holds what: the whole model in one, or embedding, runs of decoder layers and head in one each.

Free of coremltools: a plan can be refused for its sizes before anything is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from exporter.errors import InputError
from exporter.model.graph import Graph, Node
from exporter.spec import EMBEDDING, FINAL_NORM, HEAD, TABLE_ROWS, TABLE_VALUES, ModelSpec, Precision, WeightScheme

PACKAGE_BYTES = 1_000_000_000
"""What the weights of one package may take. Packages above a gigabyte are reported not to load on a phone, and to fall
back to the GPU in silence where they do (ANEMLL splits its models so; CoreML-LLM's v1.1.0 notes)."""

WHOLE, EMBEDDING_PART, HEAD_PART = "model", "embedding", "head"
_LAYERS_PART = re.compile(r"layers-(\d+)-(\d+)")
"""Names of packages: of a whole model, and of its parts; ``layers-004-007`` holds layers 4 to 7."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one package computes of a model."""

    name: str
    """Of its file, without the suffix."""
    layers: range
    """Decoder layers; an empty range has none."""
    embedding: bool
    head: bool
    """The last norm and the head."""

    @classmethod
    def called(cls, name: str, *, layers: int) -> Part:
        """The part of a model with so many layers whose package has that name. Raises InputError for another name."""
        if name == WHOLE:
            return cls(name=name, layers=range(layers), embedding=True, head=True)
        if name in (EMBEDDING_PART, HEAD_PART):
            return cls(name=name, layers=range(0), embedding=name == EMBEDDING_PART, head=name == HEAD_PART)
        found = _LAYERS_PART.fullmatch(name)
        if not found:
            raise InputError(f"{name} is no package of this backend", hint="make the artifact again")
        first, last = map(int, found.groups())
        return cls(name=name, layers=range(first, last + 1), embedding=False, head=False)

    def nodes(self, graph: Graph) -> list[Node]:
        return [node for node in graph.nodes if self._holds(node)]

    def _holds(self, node: Node) -> bool:
        if node.layer is not None:
            return node.layer in self.layers
        return self.embedding if node.op == "embedding" else self.head


def parts_of(spec: ModelSpec, scheme: WeightScheme, *, limit_bytes: int | None = None) -> list[Part]:
    """The packages of a model, in the order in which they run, none with more than ``limit_bytes`` of weights (None:
    ``PACKAGE_BYTES``) if that can be: an end or a single layer is never cut."""
    limit_bytes = PACKAGE_BYTES if limit_bytes is None else limit_bytes
    layers = range(spec.num_hidden_layers)
    whole = Part.called(WHOLE, layers=len(layers))
    sizes = [sum(stored_bytes(spec, scheme, name) for name in _weights_of(spec, range(i, i + 1))) for i in layers]
    if part_bytes(spec, scheme, whole) <= limit_bytes:
        return [whole]
    starts = [0]
    for layer in layers:
        if layer > starts[-1] and sum(sizes[starts[-1] : layer + 1]) > limit_bytes:
            starts.append(layer)
    ends = [*starts[1:], len(layers)]
    runs = [f"layers-{start:03d}-{end - 1:03d}" for start, end in zip(starts, ends, strict=True)]
    return [Part.called(name, layers=len(layers)) for name in (EMBEDDING_PART, *runs, HEAD_PART)]


def part_bytes(spec: ModelSpec, scheme: WeightScheme, part: Part) -> int:
    """What the weights of one package take, each once."""
    names = set(_weights_of(spec, part.layers))
    names |= {EMBEDDING} if part.embedding else set()
    names |= {FINAL_NORM, spec.stored_name(HEAD)} if part.head else set()
    return sum(stored_bytes(spec, scheme, name) for name in names)


def stored_bytes(spec: ModelSpec, scheme: WeightScheme, name: str) -> int:
    """Of one weight in a package: codes with float16 scales or tables, float16, or the float32 gains of a norm over
    [x, -x]."""
    shape = spec.weights()[name]
    if len(shape) == 1:
        return 2 * 4 * shape[0]
    precision = scheme.precision(name)
    if not precision.bits:
        return 2 * math.prod(shape)
    codes = math.prod(shape) * precision.bits // 8
    if precision is Precision.LUT4:
        return codes + 2 * TABLE_VALUES * shape[0] // TABLE_ROWS
    return codes + 2 * shape[0] * (shape[1] // scheme.groups(name, columns=shape[1]))


def _weights_of(spec: ModelSpec, layers: range) -> Iterator[str]:
    return (name for name in spec.weights() if spec.layer_of(name) in layers)
