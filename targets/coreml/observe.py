"""Every value that a package computes and our graph has a name for: the file itself, evaluated op by op in float32.

As in ``targets/onnxruntime/observe.py``, each value is found by what surely marks it: the weight it was multiplied
with, the values it was made from, or who reads it; a cache by the state and the layer in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from exporter.model.graph import Graph, Node, Value, Weight
from exporter.model.reference import FULL_PRECISION
from exporter.spec import Artifact
from targets.base import Observation
from targets.coreml.evaluate import Evaluator, Rounding
from targets.coreml.package import Package, mil_name
from targets.coreml.runner import causal_mask

_STATES = ("keyCache", "valueCache")
"""[L, 1, KV, context, D]: what ``attention`` gives second and third."""

_OPS = {"spread": "gather"}
"""What an op of the graph ends in, where that is called otherwise."""


class Taps:
    """Where the values of our graph lie in a program: ``found[value]`` is a name there. A value that has no counterpart
    is absent, and so are the caches, which are states. ``found`` may begin with what the program reads."""

    linear: ClassVar[str] = "linear"
    """The op that multiplies with a matrix."""

    def __init__(self, package: Package, graph: Graph, found: Mapping[Value, str] | None = None) -> None:
        self._graph = graph
        self._operations = [operation for operation in package.operations if operation.outputs]
        casts = [operation for operation in self._operations if operation.type in ("cast", "pad")]
        self._before_cast = {operation.outputs[0].name: _names(operation, "x")[0] for operation in casts}
        self.found = dict(found or {})
        for node in graph.nodes:
            name = self._tap(node)
            if name:
                self.found[Value(node.name)] = name

    def _tap(self, node: Node) -> str | None:
        match node.op:
            case "embedding":
                return self._by_weight("gather", node, reads="x")
            case "linear":
                return self._by_weight(self.linear, node, reads="weight")
            case "rms_norm":
                return self._by_weight("mul", node, reads="y")
            case "attention":
                (reader,) = [n for n in self._graph.nodes if n.op == "linear" and Value(node.name) in n.arguments]
                return self._by_weight(self.linear, reader, reads="weight", gives="x")
        inputs = [self.found.get(argument) for argument in node.arguments if isinstance(argument, Value)]
        for operation in self._operations:
            if operation.type == _OPS.get(node.op, node.op) and inputs == self._values(operation):
                return str(operation.outputs[0].name)
        return None

    def _by_weight(self, kind: str, node: Node, *, reads: str, gives: str | None = None) -> str | None:
        """What the op gives that reads the weight of ``node``, or what it reads as ``gives``."""
        weight = node.arguments[1]
        assert isinstance(weight, Weight)  # VOCABULARY
        for operation in self._operations:
            if operation.type == kind and _names(operation, reads) in self._names_of(weight):
                return self._plain(_names(operation, gives)[0]) if gives else str(operation.outputs[0].name)
        return None

    def _names_of(self, weight: Weight) -> list[list[str]]:
        """What an op may read for that weight."""
        return [[mil_name(weight.name)]]

    def _values(self, operation: Any) -> list[str]:
        """What an elementwise op reads, in its order."""
        return [self._plain(name) for key in ("x", "y") if key in operation.inputs for name in _names(operation, key)]

    def _plain(self, name: str) -> str:
        """The value before it was cast (unrounded, a cast changes nothing), or made wider to be spread."""
        while name in self._before_cast:
            name = self._before_cast[name]
        return name


def observe(artifact: Artifact, graph: Graph, calls: Sequence[Sequence[int]]) -> Observation:
    """Every value of ``Taps``, and the caches, with nothing rounded. Raises LoweringError."""
    evaluator = Evaluator(artifact.path, rounding=Rounding.NONE)
    taps = Taps(Package(artifact.path), graph).found
    seen = []
    position = 0
    for ids in calls:
        start, position = position, position + len(ids)
        inputs = {"inputIds": torch.tensor([list(ids)], dtype=torch.int32)}
        inputs["causalMask"] = causal_mask(start, position).float()
        given = evaluator(inputs, watched=set(taps.values()))
        values = {value: given[name] for value, name in taps.items()}
        seen.append(values | _caches(evaluator, graph, end=position))
    return Observation(arithmetic=FULL_PRECISION, calls=seen)


def _caches(evaluator: Evaluator, graph: Graph, *, end: int) -> dict[Value, Tensor]:
    """What each attention has left for the next call: [1, KV, end, D]."""
    return {
        Value(node.name, index): evaluator.states[state].value[node.layer, :, :, :end]
        for node in graph.nodes
        if node.op == "attention" and node.layer is not None
        for index, state in enumerate(_STATES, start=1)
    }


def _names(operation: Any, key: str) -> list[str]:
    """Of the values that an operation reads as its argument ``key``; constants written in place have none."""
    bindings = operation.inputs[key].arguments
    return [binding.name for binding in bindings if binding.WhichOneof("binding") == "name"]
