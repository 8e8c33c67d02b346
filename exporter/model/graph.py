"""The traced decoder as a list of nodes over a closed vocabulary: what every target walks, and all it ever sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
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
    "head_norm": "x [1, T, heads*D], D, eps, weight [D]? -> each head over its root mean square",
    "temper": "q [1, T, heads*D], past_k, floor_scale, attn_scale -> q times a factor of its position",
    "route": "logits [1, T, E], k -> sigmoid of the k largest of each token, 0 for the others",
    "gate": "x [1, T, H], scores [1, T, E], expert -> x times the scores of that expert",
    "cross_attention": "q [1, T, heads*D], k, v [1, KV, M*N, D], tiles [1, T, M], heads, kv_heads, scale -> context",
    "where_seen": "x [1, T, H], tiles [1, T, M] -> x, 0 where a token sees no tile",
    "tanh_gate": "x, gate [1] -> x times its hyperbolic tangent",
    "patches": "pixels [1, M, C, S, S], size -> [M, patches, C*size*size]",
    "prepend": "x [M, N, H], weight [H] -> [M, N + 1, H]",
    "append": "x [M, N, H], weight [H] -> [M, N + 1, H]",
    "add_position": "x [M, N, H], weight [N, H], gate [1]? -> x",
    "add_tile_position": "x [M, N, H], ratio int64 [1, 1], weight [ids, M*H or M*N*H], gate [1] -> x",
    "pad_states": "x [M, N, H], count -> [M, count, H]",
    "tile_attention": "q, k, v [M, N, H], tiles int64 [1, 1, M], states, heads -> context",
    "layer_norm": "x [M, N, H], weight [H], bias [H], eps -> x",
    "bias": "x [M, N, H], weight [H] -> x + weight",
    "gelu": "x -> x, by the error function",
    "concat": "a, b, ... [M, N, H] -> [M, N, H + H + ...]",
    "as_heads": "x [M, N, heads*D], heads -> [1, heads, M*N, D]",
    "patch_attention": "q, k, v [M, N, heads*D], angles [N, D/2], heads -> context",
    "pixel_shuffle": "x [M, N, H], step -> [M, N / step^2, step^2*H]",
    "fuse": "x [1, T, H], states [1, T, H], shown bool [1, T] -> states where shown, else x",
    "spread": "logits [1, T, n], tokens [n], V -> [1, T, V], each at its token, the floor at all others",
}
"""Every op a graph may hold, with its arguments in the order in which a table's functions receive them; those behind
``attention`` in ``exporter.model.ops``, and behind ``gate`` in ``exporter.model.image_ops``."""

EXPERT = "expert"
"""Under this name a table may have a function for one expert as a whole: of x ``[1, T, H]``, scores ``[1, T, E]``, the
sum so far ``[1, T, H]``, the number of the expert, and ``inside``, which walks the expert's nodes on such three values
and gives the sum with what the expert adds. A token that does not choose the expert has a score of 0 and so gets
exactly 0 added, through every node: the function may leave it out, or all nodes where no token is left. Without one,
every expert is computed for every token."""


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
    expert: int | None = None
    """Index of the expert of that layer of which it is a part: a gate, the nodes of an MLP, and the addition to the sum
    of all. They stand one after another."""


Table = Mapping[str, Callable[..., Any]]
"""What a target does for each op: a function of the target's own values, giving one or a tuple of them."""

Observer = Callable[[Node, Sequence[Any], tuple[Any, ...]], None]
"""Called after a node has run, with the node, its arguments and its results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """``ids, past_k.0, past_v.0, ... -> logits, present_k.0, present_v.0, ...`` for one model of any precision.

    A decoder that sees images has the inputs ``tiles, cross_k.0, cross_v.0, ...`` too, and a graph beside it gives
    these: ``pixel_values, aspect_ratio_ids, aspect_ratio_mask -> cross_k.0, cross_v.0, ...``. One in which states of
    images stand in place of tokens has the inputs ``image_states, shown``, and the graph beside it is
    ``pixel_values -> image_states``.
    """

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
        """The linear that gives the logits, be it of some tokens only."""
        return self.ending[0]

    @property
    def ending(self) -> tuple[Node, ...]:
        """The head, and behind one of some tokens what spreads its logits."""
        spread = tuple(node for node in self.nodes if node.op == "spread")
        logits = spread[0].arguments[0] if spread else self.outputs["logits"]
        (head,) = (node for node in self.nodes if Value(node.name) == logits and node.op == "linear")
        return head, *spread

    def shortened(self, layers: range, *, head: bool) -> Graph:
        """The model that has only these decoder layers (none: an empty range) between embedding and last norm. All
        names, of weights and caches too, stay those of the whole model, and so does ``spec``.

        Without ``head`` it gives as logits what the head would read, [1, T, H].
        """
        enters, leaves = self.read_by(0), self.read_by(layers.stop) if layers else self.read_by(0)
        renamed = {self.read_by(self.spec.num_hidden_layers): leaves}
        if layers:
            renamed[self.read_by(layers.start)] = enters
        left_out = () if head else self.ending
        nodes = tuple(
            replace(node, arguments=tuple(renamed.get(a, a) if isinstance(a, Value) else a for a in node.arguments))
            for node in self.nodes
            if (node.layer is None or node.layer in layers) and node not in left_out
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """The named graphs of one model, over the same weights."""

    text: Graph
    """What the decoder is to one who shows it no image."""
    decoder: Graph
    """``text`` itself, where the model sees none."""
    vision: Graph | None = None
    """What gives ``decoder`` what it takes from one image, or from one tile of it."""


def in_slices(graph: Graph, *, limit_bytes: int, multiple: int = 1) -> list[Graph]:
    """Shorter models that have every layer of ``graph`` between them, as many each as have ``limit_bytes`` in float32
    (one at least), and the head in one of its own; ``graph`` itself where all of it has no more than that. Each begins
    at a layer that ``multiple`` divides, and has so many at least."""
    sizes = [0] * graph.spec.num_hidden_layers
    for node in graph.nodes:
        if node.layer is not None:
            sizes[node.layer] += sum(4 * math.prod(a.shape) for a in node.arguments if isinstance(a, Weight))
    if 4 * graph.spec.parameters <= limit_bytes:
        return [graph]
    starts = [0]
    for layer in range(len(sizes)):
        begins = layer > starts[-1] and layer % multiple == 0 and layer + multiple <= len(sizes)
        if begins and sum(sizes[starts[-1] : layer + multiple]) > limit_bytes:
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
    """Call ``table[node.op]`` for each of ``nodes`` on the target's own values, and add the results to ``values``;
    where the table has an ``EXPERT``, that for all nodes of one.

    ``observe`` sees each node with its arguments and results. Where ``wanted`` is given, any other value is dropped as
    soon as no node is left that reads it. Raises LoweringError for an op that the table does not know.
    """
    steps = _experts_whole(nodes) if EXPERT in table else [(node,) for node in nodes]
    last_read = {a: number for number, step in enumerate(steps) for a in _read_by(step)}
    for number, step in enumerate(steps):
        made = _compute(step[0], table, values, observe) if len(step) == 1 else _expert(step, table, values, observe)
        values.update(made)
        if wanted is not None:
            read = {a for a in _read_by(step) if last_read[a] == number}
            for value in ((made.keys() - last_read.keys()) | read).difference(wanted):
                del values[value]


def _experts_whole(nodes: Sequence[Node]) -> list[tuple[Node, ...]]:
    """Each node by itself, but those of one expert together, from its gate to what adds it to the others."""
    steps: list[tuple[Node, ...]] = []
    for (_, expert), group in groupby(nodes, key=lambda node: (node.layer, node.expert)):
        own = tuple(group)
        whole = expert is not None and (own[0].op, own[-1].op) == ("gate", "add")
        steps.extend([own] if whole else [(node,) for node in own])
    return steps


def _read_by(step: Sequence[Node]) -> set[Value]:
    """What the nodes read that none of them makes."""
    made = {node.name for node in step}
    return {a for node in step for a in node.arguments if isinstance(a, Value) and a.node not in made}


def _compute(node: Node, table: Table, values: Mapping[Value, Any], observe: Observer | None) -> dict[Value, Any]:
    if node.op not in table:
        known = ", ".join(op for op in table if op != EXPERT)
        raise LoweringError(
            f"this target has no lowering for op {node.op!r} (node {node.name}); it knows {known}",
            hint="choose another target for this model",
        )
    arguments = [values[a] if isinstance(a, Value) else a for a in node.arguments]
    result = table[node.op](*arguments)
    results = result if isinstance(result, tuple) else (result,)
    if observe:
        observe(node, arguments, results)
    return {Value(node.name, index): value for index, value in enumerate(results)}


def _expert(
    step: tuple[Node, ...], table: Table, values: Mapping[Value, Any], observe: Observer | None
) -> dict[Value, Any]:
    gate, *_, add = step
    x, scores, expert = gate.arguments
    (total,) = (a for a in add.arguments if a in _read_by(step))
    read = [a for a in (x, scores, total) if isinstance(a, Value)]

    def inside(*given: Any) -> Any:
        own = dict(zip(read, given, strict=True))
        for node in step:
            own |= _compute(node, table, own, observe)
        return own[Value(add.name)]

    return {Value(add.name): table[EXPERT](*(values[a] for a in read), expert, inside)}


FUSED = ("image_states", "shown")
"""Names of what a decoder has of images whose states stand in the place of tokens: the states, and which tokens."""


def image_names(count: int) -> tuple[list[str], list[str]]:
    """Names of the keys and of the values that each of ``count`` layers takes from images."""
    return [f"cross_k.{index}" for index in range(count)], [f"cross_v.{index}" for index in range(count)]


def cache_names(layers: int) -> list[tuple[str, str]]:
    """Names of the key and value cache of each layer, after the ``past_`` or ``present_`` that precedes them."""
    return [(f"k.{index}", f"v.{index}") for index in range(layers)]
