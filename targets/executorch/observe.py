"""Every value that a ``model.pte`` computes and our graph has a name for: the file itself, opened and run.

As in ``targets/onnxruntime/observe.py``, each value is found by what surely marks it: the weight it was multiplied
with, the values it was made from, or the segment that fed it. XNNPACK cannot leave out the rounding of activations, so
they are rounded as in the shipped file; since each op is computed anew from the very numbers that it was given, the
reference rounds them to the same codes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from exporter.errors import LoweringError
from exporter.model.graph import Graph, Node, Value, Weight
from exporter.spec import Artifact
from targets.base import Observation
from targets.executorch.opened import Call, OpenProgram, Place
from targets.executorch.read import EMBEDDING_KERNELS
from targets.executorch.runner import ProgramRunner
from targets.executorch.xnnpack import CODES

_ELEMENTWISE = {"add": "XNNAdd", "mul": "XNNMultiply"}
_SPREADS = "aten::index_select"


class Taps:
    """Where the values of our graph lie in a program. A value that has no counterpart is absent."""

    def __init__(self, program: OpenProgram, graph: Graph) -> None:
        self._program = program
        self._graph = graph
        self._made_by = {call.output: call for call in program.calls}
        self.found: dict[Value, Place] = {}
        for node in graph.nodes:
            for index, place in enumerate(self._tap(node)):
                if place is not None:
                    self.found[Value(node.name, index)] = place

    def _tap(self, node: Node) -> Sequence[Place | None]:
        match node.op:
            case "embedding":
                return [self._embedding(node)]
            case "linear":
                call = self._by_weight("XNNFullyConnected", node)
                return [call.output if call else None]
            case "rms_norm":
                call = self._by_weight("XNNMultiply", node)
                return [call.output if call else None]
            case "attention":
                return self._attention(node)
            case "spread":
                return [next((call.output for call in self._program.calls if call.kind == _SPREADS), None)]
        inputs = [self.found.get(argument) for argument in node.arguments if isinstance(argument, Value)]
        if node.op == "silu":
            sigmoids = [c.output for c in self._program.calls if c.kind == "XNNSigmoid" and [*c.inputs] == inputs]
            inputs += sigmoids
        kind = _ELEMENTWISE.get(node.op, "XNNMultiply")
        return [next((c.output for c in self._program.calls if c.kind == kind and [*c.inputs] == inputs), None)]

    def _by_weight(self, kind: str, node: Node) -> Call | None:
        weight = node.arguments[1]
        assert isinstance(weight, Weight)  # VOCABULARY
        keys = {weight.name, weight.name + CODES}
        return next((call for call in self._program.calls if call.kind == kind and keys & set(call.inputs)), None)

    def _embedding(self, node: Node) -> Place | None:
        """What the first norm reads: it is divided by its root mean square, and then multiplied with the weight."""
        (norm,) = [n for n in self._graph.nodes if n.op == "rms_norm" and Value(node.name) in n.arguments]
        call = self._by_weight("XNNMultiply", norm)
        normal = self._made_by.get(call.inputs[0]) if call and isinstance(call.inputs[0], Place) else None
        read = normal.inputs[0] if normal else None
        return read if isinstance(read, Place) else None

    def _attention(self, node: Node) -> Sequence[Place | None]:
        """Of the kernel that reads what the segment of its queries gives; caches [1, context, KV, D]."""
        queries = node.arguments[0]
        assert isinstance(queries, Value)  # VOCABULARY
        place = self.found.get(queries)
        if place is None or place.delegate is None:
            return [None, None, None]
        given = self._program.outputs_of(place.delegate)
        for call in self._program.calls:
            if call.kind == "llama::custom_sdpa" and call.inputs[0] in given:
                return [call.output, *(cache if isinstance(cache, Place) else None for cache in call.inputs[1:3])]
        return [None, None, None]


AsInGraph = Callable[[Value, Tensor, int], Tensor]
"""A value as the program has it -> as the graph does, with so many positions filled in the cache."""


def observe(artifact: Artifact, graph: Graph, calls: Sequence[Sequence[int]], *, threads: int) -> Observation:
    """Every value of ``Taps``. Raises LoweringError, and as ``ProgramRunner``."""
    program = OpenProgram(artifact.path)
    return run_open(artifact, program, Taps(program, graph).found, calls, as_in_graph=_as_in_graph, threads=threads)


def run_open(
    artifact: Artifact,
    program: OpenProgram,
    taps: Mapping[Value, Place],
    calls: Sequence[Sequence[int]],
    *,
    as_in_graph: AsInGraph,
    threads: int,
) -> Observation:
    """Write a program that gives the values of ``taps`` too, and feed it ``calls``."""
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / artifact.path.name
        places = list(dict.fromkeys(taps.values()))
        numbers = dict(zip(places, program.write(places, path, longest=max(map(len, calls))), strict=True))
        with ProgramRunner(replace(artifact, path=path), threads=threads) as runner:
            for ids in calls:
                outputs = runner.feed_for_all(ids)
                end = runner.position
                seen.append({value: as_in_graph(value, outputs[numbers[place]], end) for value, place in taps.items()})
    return Observation(arithmetic=artifact.arithmetic, calls=seen)


def _as_in_graph(value: Value, tensor: Tensor, end: int) -> Tensor:
    """Heads side by side, as the graph has them, and only what is filled of a cache."""
    if value.index:  # of attention, the only op with more than one result
        return tensor[:, :end].transpose(1, 2)  # [1, KV, end, D]
    return tensor.flatten(2)


class PortableTaps:
    """As ``Taps``, for a program of plain kernels: they come in the order of the graph, so that the next one of the
    kind that a node ends in is its own."""

    def __init__(self, program: OpenProgram, graph: Graph) -> None:
        self._calls = program.calls
        self._next = 0
        self.found: dict[Value, Place] = {}
        for node in graph.nodes:
            for index, place in enumerate(self._tap(node)):
                self.found[Value(node.name, index)] = place

    def _tap(self, node: Node) -> Sequence[Place]:
        match node.op:
            case "embedding":
                rows = self._after(*EMBEDDING_KERNELS)
                widened = self._calls[self._next]  # where the table is float16
                return [widened.output if widened.kind == "dim_order_ops::_to_dim_order_copy" else rows.output]
            case "linear":
                call = self._after("aten::linear", "quantized_decomposed::mixed_linear")
                return [call.output if call.kind == "aten::linear" else self._after("aten::unsqueeze_copy").output]
            case "rms_norm":
                self._after("aten::rsqrt")
                self._after("aten::mul")
                return [self._after("aten::mul").output]
            case "silu":
                self._after("aten::sigmoid")
                return [self._after("aten::mul").output]
            case "attention":
                keys, values = (self._after("aten::index_put_").output for _ in range(2))
                self._after("aten::bmm")
                self._after("aten::bmm")
                return [self._after("dim_order_ops::_clone_dim_order").output, keys, values]
        return [self._after(_SPREADS if node.op == "spread" else f"aten::{node.op}").output]

    def _after(self, *kinds: str) -> Call:
        """The next call of one of those kinds. Raises LoweringError where there is none."""
        for number in range(self._next, len(self._calls)):
            if self._calls[number].kind in kinds:
                self._next = number + 1
                return self._calls[number]
        raise LoweringError(f"the program calls {' or '.join(kinds)} less often than the graph", hint="lower it again")


def observe_portable(artifact: Artifact, graph: Graph, calls: Sequence[Sequence[int]], *, threads: int) -> Observation:
    """Every value of ``PortableTaps``. Raises LoweringError, and as ``ProgramRunner``."""
    program = OpenProgram(artifact.path)
    taps = PortableTaps(program, graph).found
    return run_open(artifact, program, taps, calls, as_in_graph=_as_in_portable, threads=threads)


def _as_in_portable(value: Value, tensor: Tensor, end: int) -> Tensor:
    if value.index == 1:
        return tensor[:, :, :end].mT.unsqueeze(0)  # keys [KV, D, S] -> [1, KV, end, D]
    if value.index == 2:
        return tensor[:, :end].unsqueeze(0)  # values [KV, S, D]
    return tensor if tensor.ndim == 3 else tensor.flatten(1).unsqueeze(0)  # context [T, KV, r, D] -> [1, T, H*D]
