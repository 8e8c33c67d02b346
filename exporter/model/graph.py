"""The traced decoder as a list of nodes over a closed vocabulary: what every target walks, and all it ever sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
        walk(self.nodes, table, values, observe)
        return {name: values[value] for name, value in self.outputs.items()}


def walk(nodes: Iterable[Node], table: Table, values: dict[Value, Any], observe: Observer | None = None) -> None:
    """Call ``table[node.op]`` for each of ``nodes`` on the target's own values, and add the results to ``values``.

    ``observe`` sees each node with its arguments and results. Raises LoweringError for an op that the table does not
    know.
    """
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


def cache_names(layers: int) -> list[tuple[str, str]]:
    """Names of the key and value cache of each layer, after the ``past_`` or ``present_`` that precedes them."""
    return [(f"k.{index}", f"v.{index}") for index in range(layers)]
