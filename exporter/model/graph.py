"""The traced decoder as a list of nodes over a closed vocabulary: what every target walks, and all it ever sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from exporter.errors import LoweringError
from exporter.spec import ModelSpec

VOCABULARY = {
    "embedding": "ids int64 [1, T], weight [V, H] -> [1, T, H]",
    "linear": "x [1, T, K], weight [N, K] -> [1, T, N]",
    "rms_norm": "x [1, T, H], weight [H], eps -> [1, T, H]",
    "silu": "x -> x",
    "mul": "a, b of one shape -> a * b",
    "add": "a, b of one shape -> a + b",
    "attention": "see exporter.model.ops.attention -> context, present_k, present_v",
}
"""Every op a graph may hold, with its arguments in the order in which a table's functions receive them."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model, by the name under which it is stored; what precision it has is for the store to say."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor that belongs to the graph itself, such as the RoPE frequencies."""

    name: str
    value: Tensor


@dataclass(frozen=True, slots=True)
class Value:
    """The ``index``-th result of the node called ``node``, or a graph input when it names one."""

    node: str
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    op: str
    name: str
    arguments: tuple[Value | Weight | Constant | int | float | None, ...]
    layer: int | None
    """Index of the decoder layer; None for embedding, last norm and head."""


Table = Mapping[str, Callable[..., Any]]
"""What a target does for each op: a function of the target's own values, giving one or a tuple of them."""

Observer = Callable[[Node, Sequence[Any], tuple[Any, ...]], None]
"""Called after a node has run, with the node, its arguments and its results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """``ids, past_k.0, past_v.0, ... -> logits, present_k.0, present_v.0, ...`` for one model of any precision."""

    spec: ModelSpec
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: Mapping[str, Value]

    def __post_init__(self) -> None:
        for node in self.nodes:
            if node.op not in VOCABULARY:
                raise ValueError(f"node {node.name} is a {node.op!r}; a graph holds only {', '.join(VOCABULARY)}")

    def run(self, table: Table, inputs: Mapping[str, Any], observe: Observer | None = None) -> dict[str, Any]:
        """Walk every node in order from the named ``inputs``; give the named outputs. Raises as ``walk`` does."""
        values: dict[Value, Any] = {Value(name): inputs[name] for name in self.inputs}
        walk(self.nodes, table, values, observe, wanted=set(self.outputs.values()))
        return {name: values[value] for name, value in self.outputs.items()}

    @property
    def head(self) -> Node:
        """The linear that gives the logits."""
        (head,) = (node for node in self.nodes if Value(node.name) == self.outputs["logits"] and node.op == "linear")
        return head

    def shortened(self, layers: range, *, head: bool) -> Graph:
        """The model that has only these decoder layers (none: an empty range) between embedding and last norm. All
        names, of weights and caches too, stay those of the whole model, and so does ``spec``.

        Without ``head`` it gives as logits what the head would read, [1, T, H].
        """
        enters, leaves = self.read_by(0), self.read_by(layers.stop) if layers else self.read_by(0)
        renamed = {self.read_by(self.spec.num_hidden_layers): leaves}
        if layers:
            renamed[self.read_by(layers.start)] = enters
        nodes = tuple(
            replace(node, arguments=tuple(renamed.get(a, a) if isinstance(a, Value) else a for a in node.arguments))
            for node in self.nodes
            if (node.layer is None or node.layer in layers) and (head or node is not self.head)
        )
        caches = {name for index in layers for name in cache_names(index + 1)[index]}
        logits = self.outputs["logits"] if head else self.head.arguments[0]
        assert isinstance(logits, Value)  # VOCABULARY: linear is x, weight
        return Graph(
            spec=self.spec,
            inputs=tuple(name for name in self.inputs if name == "ids" or name.removeprefix("past_") in caches),
            nodes=nodes,
            outputs={
                name: logits if name == "logits" else value
                for name, value in self.outputs.items()
                if name == "logits" or name.removeprefix("present_") in caches
            },
        )

    def read_by(self, layer: int) -> Value:
        """The hidden states that come into a decoder layer; for the number of layers, those that leave the last."""
        made_in = {node.name: node.layer for node in self.nodes}
        own = layer if layer < self.spec.num_hidden_layers else None
        read = {a for node in self.nodes if node.layer == own for a in node.arguments if isinstance(a, Value)}
        (hidden,) = (value for value in read if value.node in made_in and made_in[value.node] != own)
        return hidden


def in_slices(graph: Graph, *, limit_bytes: int) -> list[Graph]:
    """Shorter models that have every layer of ``graph`` between them, as many each as have ``limit_bytes`` in float32
    (one at least), and the head in one of its own; ``graph`` itself where all of it has no more than that."""
    sizes = [0] * graph.spec.num_hidden_layers
    for node in graph.nodes:
        if node.layer is not None:
            sizes[node.layer] += sum(4 * math.prod(a.shape) for a in node.arguments if isinstance(a, Weight))
    if 4 * graph.spec.parameters <= limit_bytes:
        return [graph]
    starts = [0]
    for layer in range(len(sizes)):
        if layer > starts[-1] and sum(sizes[starts[-1] : layer + 1]) > limit_bytes:
            starts.append(layer)
    ranges = [range(start, stop) for start, stop in pairwise([*starts, len(sizes)])]
    return [*(graph.shortened(layers, head=False) for layers in ranges), graph.shortened(range(0), head=True)]


def walk(
    nodes: Sequence[Node],
    table: Table,
    values: dict[Value, Any],
    observe: Observer | None = None,
    *,
    wanted: Collection[Value] | None = None,
) -> None:
    """Call ``table[node.op]`` for each of ``nodes`` on the target's own values, and add the results to ``values``.

    ``observe`` sees each node with its arguments and results. Where ``wanted`` is given, any other value is dropped as
    soon as no node is left that reads it. Raises LoweringError for an op that the table does not know.
    """
    last_read = {a: node.name for node in nodes for a in node.arguments if isinstance(a, Value)}
    for node in nodes:
        if node.op not in table:
            raise LoweringError(
                f"this target has no lowering for op {node.op!r} (node {node.name}); it knows {', '.join(table)}",
                hint="choose another target for this model",
            )
        arguments = [values[a] if isinstance(a, Value) else a for a in node.arguments]
        result = table[node.op](*arguments)
        results = result if isinstance(result, tuple) else (result,)
        for index, value in enumerate(results):
            values[Value(node.name, index)] = value
        if observe:
            observe(node, arguments, results)
        if wanted is not None:
            unread = {Value(node.name, index) for index in range(len(results))} - last_read.keys()
            read = {a for a in node.arguments if isinstance(a, Value) and last_read[a] == node.name}
            for value in (unread | read).difference(wanted):
                del values[value]


def cache_names(layers: int) -> list[tuple[str, str]]:
    """Names of the key and value cache of each layer, after the ``past_`` or ``present_`` that precedes them."""
    return [(f"k.{index}", f"v.{index}") for index in range(layers)]
