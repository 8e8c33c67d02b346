"""As ``observe.py``, of packages of fixed lengths: every value of our graph, call by call and part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.model.graph import Graph, Node, Value, Weight
from exporter.model.reference import FULL_PRECISION
from exporter.spec import FINAL_NORM, Artifact, Logits
from targets.base import Observation
from targets.coreml.ane_lower import DECODE, HIDDEN, NEXT_HIDDEN, PREFILL, embedded_name, product_name
from targets.coreml.ane_parts import Part
from targets.coreml.ane_runner import Functions, calls_for, load_with_evaluator, prefill_length
from targets.coreml.evaluate import Evaluator, Rounding
from targets.coreml.observe import Taps
from targets.coreml.package import Package, block_name


class _Taps(Taps):
    """An embedding is what is left when its rows have been laid out as channels; a norm is both halves of [x, -x]."""

    linear = "conv"

    def _tap(self, node: Node) -> str | None:
        weight = node.arguments[1] if len(node.arguments) > 1 else None
        if node.op == "embedding":
            assert isinstance(weight, Weight)  # VOCABULARY
            return self._named(embedded_name(weight.name))
        if node.op == "linear":
            assert isinstance(weight, Weight)
            return self._named(product_name(weight.name)) or super()._tap(node)
        if node.op == "rms_norm":
            return self._by_weight("layer_norm", node, reads="gamma")
        return super()._tap(node)

    def _names_of(self, weight: Weight) -> list[list[str]]:
        return [*super()._names_of(weight), [block_name(weight.name, start=0)]]

    def _named(self, name: str) -> str | None:
        return name if any(operation.outputs[0].name == name for operation in self._operations) else None


class _Tapped:
    """The parts of an artifact, with the names of our values in each."""

    def __init__(self, packages: Sequence[Path], graph: Graph) -> None:
        self._graph = graph
        parts = [Part.called(path.stem, layers=graph.spec.num_hidden_layers) for path in packages]
        self._taps = {
            function: [self._found(path, function, part) for path, part in zip(packages, parts, strict=True)]
            for function in (PREFILL, DECODE)
        }
        self._functions: Functions = load_with_evaluator(packages, Rounding.NONE)
        self._parts = parts

    def _found(self, path: Path, function: str, part: Part) -> dict[Value, str]:
        begins: dict[Value, str] = {}
        if not part.embedding:
            first = part.layers.start if part.layers else self._graph.spec.num_hidden_layers
            begins = {self._graph.read_by(first): HIDDEN}
        found = _Taps(Package(path, function), self._graph, begins).found
        return {value: name for value, name in found.items() if value not in begins}

    def call(self, function: str, features: Mapping[str, Tensor]) -> dict[Value, Tensor]:
        """Every value of one call, in MIL's own layout."""
        given = dict(features)
        values: dict[Value, Tensor] = {}
        for evaluator, taps in zip(self._functions[function], self._taps[function], strict=True):
            assert isinstance(evaluator, Evaluator)
            outputs = evaluator(given, watched=set(taps.values()))
            values |= {value: outputs[name] for value, name in taps.items()}
            given[HIDDEN] = outputs.get(NEXT_HIDDEN, torch.empty(0))
        return values

    def caches(self, end: int) -> dict[Value, Tensor]:
        """What each attention has left for the next call: [1, KV, end, D]."""
        evaluators: Sequence[Any] = self._functions[PREFILL]
        places = {
            layer: (evaluator.states, index)
            for evaluator, part in zip(evaluators, self._parts, strict=True)
            for index, layer in enumerate(part.layers)
        }
        return {
            Value(node.name, position): places[node.layer][0][state].value[places[node.layer][1], None, :, :end]
            for node in self._graph.nodes
            if node.op == "attention" and node.layer is not None
            for position, state in enumerate(("keyCache", "valueCache"), start=1)
        }


def observe(artifact: Artifact, packages: Sequence[Path], graph: Graph, calls: Sequence[Sequence[int]]) -> Observation:
    """Every value of ``_Taps``, and the caches, with nothing rounded; padding left out. Raises LoweringError."""
    tapped = _Tapped(packages, graph)
    nodes = {Value(node.name): node for node in graph.nodes}
    length = prefill_length(packages[0])
    seen, position = [], 0
    for ids in calls:
        parts: dict[Value, list[Tensor]] = {}
        for call in calls_for(ids, position, length=length, context=artifact.context):
            for value, found in tapped.call(call.function, call.features).items():
                parts.setdefault(value, []).append(_as_in_graph(found, nodes[value])[:, : call.count])
        position += len(ids)
        values = {
            value: found[-1]
            if artifact.logits is Logits.LAST and _is_of_last(nodes[value], graph)
            else torch.cat(found, 1)
            for value, found in parts.items()
        }
        seen.append(values | tapped.caches(position))
    return Observation(arithmetic=FULL_PRECISION, calls=seen)


def _as_in_graph(value: Tensor, node: Node) -> Tensor:
    """[1, C, 1, T] as [1, T, C], without the second half of a norm."""
    if node.op == "rms_norm":
        value = value.chunk(2, dim=1)[0]
    return value.squeeze(2).mT


def _is_of_last(node: Node, graph: Graph) -> bool:
    """Whether it is computed of one token alone."""
    last_norm = any(isinstance(argument, Weight) and argument.name == FINAL_NORM for argument in node.arguments)
    return last_norm or node is graph.head
