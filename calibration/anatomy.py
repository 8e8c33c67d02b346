"""What calibration has to know of a decoder layer, read off the Graph: its linears, and what comes before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from exporter.model.graph import Graph, Node, Observer, Table, Value, Weight, walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Where each input channel of some linears can be divided by a factor, exactly: in the weight of a norm, or in the
    rows of the linear that makes the channel."""

    source: str
    """The norm's vector, or the matrix whose rows are divided."""
    heads: int = 1
    kv_heads: int = 1
    """Of the attention that lies between, if one does: query heads that share a value head must share its factors."""

    def tie(self, factors: Tensor) -> Tensor:
        """The factors ``[K]`` that can be folded and are nearest to those wished for: per value head their geometric
        mean over the query heads that read it."""
        return self._by_head(factors).log().mean(dim=1, keepdim=True).exp().expand(self._shape(factors)).reshape(-1)

    def source_factors(self, factors: Tensor) -> Tensor:
        """Of tied factors ``[K]`` one for each row, or element, of the source."""
        return self._by_head(factors)[:, 0].reshape(-1)

    def _by_head(self, factors: Tensor) -> Tensor:
        return factors.reshape(self._shape(factors))

    def _shape(self, factors: Tensor) -> tuple[int, int, int]:
        return self.kv_heads, self.heads // self.kv_heads, len(factors) // self.heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears that read the same value, and so share its statistics and a fold."""

    input: Value
    linears: tuple[str, ...]
    fold: Fold | None
    residual: Value | None
    """What the output of the only linear is added to, if that is the case."""
    expert: int | None = None
    """Of which expert they are a part: what they read is 0 for tokens of others."""
    gated: tuple[str, ...] = ()
    """Linears of experts, which read the same value times a number for each token: the fold is theirs too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer of a Graph: one value comes in, one goes out."""

    index: int
    nodes: tuple[Node, ...]
    input: Value
    output: Value
    caches: tuple[Value, ...]
    groups: tuple[Group, ...]
    """In the order in which the layer computes them."""

    def compute(
        self,
        wanted: Sequence[Value],
        table: Table,
        hidden: Tensor,
        *,
        head_dim: int,
        kv_heads: int,
        observe: Observer | None = None,
    ) -> list[Tensor]:
        """The values ``wanted`` for ``hidden`` float32 ``[B, T, H]`` at positions 0 to T - 1, running no node that they
        do not need."""
        empty = hidden.new_zeros(len(hidden), kv_heads, 0, head_dim)
        values = {self.input: hidden, **dict.fromkeys(self.caches, empty)}
        walk(self.needed_for(wanted), table, values, observe)
        return [values[value] for value in wanted]

    def needed_for(self, wanted: Iterable[Value]) -> list[Node]:
        """The nodes that ``wanted`` depend on, in order."""
        needed, kept = {value.node for value in wanted}, []
        for node in reversed(self.nodes):
            if node.name in needed:
                needed |= {value.node for value in _values(node)}
                kept.append(node)
        return kept[::-1]


def dissect(graph: Graph, index: int) -> Layer:
    """Decoder layer ``index`` of ``graph``."""
    nodes = tuple(node for node in graph.nodes if node.layer == index)
    inside = {node.name for node in nodes}
    read = [value for node in nodes for value in _values(node) if value.node not in inside]
    caches = tuple(dict.fromkeys(value for value in read if value.node in graph.inputs))
    (hidden,) = dict.fromkeys(value for value in read if value.node not in graph.inputs)
    later = (node for node in graph.nodes if node.name not in inside)
    (output,) = dict.fromkeys(value for node in later for value in _values(node) if value.node in inside)
    return Layer(index=index, nodes=nodes, input=hidden, output=output, caches=caches, groups=tuple(_groups(nodes)))


def _groups(nodes: tuple[Node, ...]) -> Iterable[Group]:
    by_input: dict[Value, list[Node]] = {}
    for node in nodes:
        if node.op == "linear":
            source, _ = node.arguments
            assert isinstance(source, Value)  # VOCABULARY: linear is x, weight
            by_input.setdefault(source, []).append(node)
    for value, linears in by_input.items():
        yield Group(
            input=value,
            linears=tuple(_weight(node) for node in linears),
            fold=_fold(value, nodes, linears=len(linears)),
            residual=_residual(value, nodes),
            expert=linears[0].expert,
            gated=tuple(_weight(reader) for gate in _gates(value, nodes) for reader in by_input[Value(gate.name)]),
        )


def _gates(value: Value, nodes: tuple[Node, ...]) -> list[Node]:
    return [node for node in nodes if node.op == "gate" and node.arguments[0] == value]


def _residual(value: Value, nodes: tuple[Node, ...]) -> Value | None:
    outputs = [Value(node.name) for node in nodes if node.op == "linear" and node.arguments[0] == value]
    readers = [node for node in nodes if outputs[0] in _values(node)]
    if len(outputs) != 1 or len(readers) != 1 or readers[0].op != "add":
        return None
    if readers[0].expert is not None:  # one of many terms of a sum, of which few are not 0
        return None
    return next((other for other in _values(readers[0]) if other != outputs[0]), None)


def _fold(value: Value, nodes: tuple[Node, ...], *, linears: int) -> Fold | None:
    """Where the channels of ``value`` come from, if nothing but those linears reads them on the way."""
    made_by = {node.name: node for node in nodes}
    readers: Callable[[Value], int] = lambda wanted: sum(_values(node).count(wanted) for node in nodes)  # noqa: E731
    node = made_by.get(value.node)
    if node is None or readers(value) != linears + len(_gates(value, nodes)):
        return None
    match node.op:
        case "rms_norm":
            return Fold(source=_weight(node))
        case "mul":
            factors = [made_by[v.node] for v in _values(node) if v.node in made_by and readers(v) == 1]
            source = next((factor for factor in factors if factor.op == "linear"), None)
            return Fold(source=_weight(source)) if source else None
        case "attention":
            v, heads, kv_heads = node.arguments[2], node.arguments[6], node.arguments[7]
            assert isinstance(v, Value)
            assert isinstance(heads, int)
            assert isinstance(kv_heads, int)
            source = made_by.get(v.node)
            if source is None or source.op != "linear" or readers(v) != 1:
                return None
            return Fold(source=_weight(source), heads=heads, kv_heads=kv_heads)
    return None


def _values(node: Node) -> list[Value]:
    return [argument for argument in node.arguments if isinstance(argument, Value)]


def _weight(node: Node) -> str:
    (weight,) = (argument for argument in node.arguments if isinstance(argument, Weight))
    return weight.name
