"""What is read off a graph about a layer: who reads what, where factors can go, and how to compute it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calibration.anatomy import Fold, Layer, dissect
from exporter.model.eager import eager_table
from exporter.model.graph import Graph, Node, Value, Weight
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    name="toy",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope=RopeSpec(theta=10000.0),
    bos_token_id=1,
    eos_token_ids=(2,),
)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(SPEC)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = SPEC.weights()
    return {name: torch.randn(*shape, generator=generator) * 0.3 + (len(shape) == 1) for name, shape in shapes.items()}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_llama_layer_has_four_groups_in_the_order_in_which_they_are_computed(graph: Graph, index: int) -> None:
    attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
    layer = dissect(graph, index)
    assert layer.index == index
    assert [group.linears for group in layer.groups] == [
        tuple(f"{attention}.{name}_proj.weight" for name in "qkv"),
        (f"{attention}.o_proj.weight",),
        (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        (f"{mlp}.down_proj.weight",),
    ]
    assert [group.fold for group in layer.groups] == [
        Fold(source=f"model.layers.{index}.input_layernorm.weight"),
        Fold(source=f"{attention}.v_proj.weight", heads=4, kv_heads=2),
        Fold(source=f"model.layers.{index}.post_attention_layernorm.weight"),
        Fold(source=f"{mlp}.up_proj.weight"),
    ]
    assert {value.node for value in layer.caches} == {f"past_k.{index}", f"past_v.{index}"}


def test_a_layer_takes_what_the_one_before_gives(graph: Graph) -> None:
    layers = [dissect(graph, index) for index in range(3)]
    assert [layer.output for layer in layers[:2]] == [layer.input for layer in layers[1:]]
    (first, last) = (node for node in graph.nodes if node.layer is None and node.op in ("embedding", "rms_norm"))
    assert layers[0].input == Value(first.name)
    assert layers[2].output == last.arguments[0]


def test_the_residual_is_what_the_output_of_a_group_is_added_to(graph: Graph) -> None:
    layer = dissect(graph, 1)
    first_sum = next(node for node in layer.nodes if node.op == "add")
    assert [group.residual for group in layer.groups] == [None, layer.input, None, Value(first_sum.name)]


@dataclass
class Seen:
    """An observer that keeps the first result of every node."""

    results: dict[str, Tensor]

    def __call__(self, node: Node, _arguments: Sequence[Any], results: tuple[Any, ...]) -> None:
        self.results[node.name] = results[0]


def compute(layer: Layer, wanted: list[Value], weights: dict[str, Tensor], hidden: Tensor) -> list[Tensor]:
    table = eager_table(lambda weight: weights[weight.name])
    return layer.compute(wanted, table, hidden, head_dim=SPEC.head_dim, kv_heads=SPEC.num_key_value_heads)


def test_layers_computed_one_after_another_give_the_logits_of_the_reference(
    graph: Graph, weights: dict[str, Tensor]
) -> None:
    """Two texts at once; the ends by hand."""
    texts = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(1))
    hidden = weights["model.embed_tokens.weight"][texts]
    for index in range(3):
        layer = dissect(graph, index)
        (hidden,) = compute(layer, [layer.output], weights, hidden)
    normed = hidden / (hidden.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weights["model.norm.weight"]
    logits = normed @ weights["lm_head.weight"].T
    for text, got in zip(texts.tolist(), logits, strict=True):
        expected = Reference(graph, weights, FULL_PRECISION).feed(text)
        assert torch.allclose(got, expected, atol=1e-4)


def test_every_value_inside_a_layer_is_that_of_the_whole_graph(graph: Graph, weights: dict[str, Tensor]) -> None:
    ids = torch.randint(40, (1, 11), generator=torch.Generator().manual_seed(2))
    caches = {name: torch.zeros(1, 2, 0, 8) for name in graph.inputs if name != "ids"}
    seen = Seen({})
    graph.run(eager_table(lambda weight: weights[weight.name]), {"ids": ids, **caches}, seen)
    for index in range(3):
        layer = dissect(graph, index)
        hidden = seen.results[layer.input.node]
        wanted = [Value(node.name) for node in layer.nodes]
        for value, got in zip(wanted, compute(layer, wanted, weights, hidden), strict=True):
            assert torch.allclose(got, seen.results[value.node], atol=1e-5)


@pytest.mark.parametrize(
    ("group", "read"),
    [
        (0, {"input_layernorm"}),
        (1, {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        (2, {"input_layernorm", "post_attention_layernorm", *(f"self_attn.{name}_proj" for name in "qkvo")}),
    ],
)
def test_no_weight_is_read_that_the_value_does_not_need(
    graph: Graph, weights: dict[str, Tensor], group: int, read: set[str]
) -> None:
    layer = dissect(graph, 1)
    needed = {f"model.layers.1.{name}.weight": weights[f"model.layers.1.{name}.weight"] for name in read}
    compute(layer, [layer.groups[group].input], needed, torch.randn(1, 5, 32))
    for name in needed:
        with pytest.raises(KeyError, match=name):
            fewer = {other: weight for other, weight in needed.items() if other != name}
            compute(layer, [layer.groups[group].input], fewer, torch.randn(1, 5, 32))


def test_an_observer_sees_each_node_that_is_run_once_and_in_order(graph: Graph, weights: dict[str, Tensor]) -> None:
    layer, seen = dissect(graph, 0), []
    table = eager_table(lambda weight: weights[weight.name])
    layer.compute(
        [layer.output],
        table,
        torch.randn(2, 3, 32),
        head_dim=8,
        kv_heads=2,
        observe=lambda node, _arguments, _results: seen.append(node),
    )
    assert seen == list(layer.nodes)


def vector(name: str) -> Weight:
    return Weight(name, (32,))


def matrix(name: str) -> Weight:
    return Weight(name, (32, 32))


def built(*nodes: tuple[Any, ...]) -> Layer:
    """The layer of a graph that takes the value ``in`` through ``(op, name, argument, ...)`` and gives the last; a str
    stands for the first result of the node of that name."""

    def of(op: str, name: str, *arguments: Any, layer: int | None = 0) -> Node:
        values = tuple(Value(argument) if isinstance(argument, str) else argument for argument in arguments)
        return Node(op=op, name=name, arguments=values, layer=layer)

    ends = of("embedding", "in", "ids", matrix("table"), layer=None), of("silu", "out", nodes[-1][1], layer=None)
    inputs = ("ids", "past_k", "past_v")
    graph = Graph(
        spec=SPEC,
        inputs=inputs,
        nodes=(ends[0], *(of(*node) for node in nodes), ends[1]),
        outputs={"logits": Value("out")},
    )
    return dissect(graph, 0)


def attention(*qkv: str) -> tuple[Any, ...]:
    return ("attention", "context", *qkv, "past_k", "past_v", None, 4, 2, 0.1, 0, 0)


NORM = ("rms_norm", "norm", "in", vector("g"), 1e-5)
QKV = tuple(("linear", name, "norm", matrix(name.upper())) for name in "qkv")
O = ("linear", "o", "context", matrix("O"))  # noqa: E741
GATED = (("linear", "gate", "in", matrix("GATE")), ("silu", "swish", "gate"), ("linear", "up", "in", matrix("UP")))
DOWN = ("linear", "down", "product", matrix("DOWN"))


CONTEXT, PRODUCT = attention(*"qkv"), ("mul", "product", "swish", "up")
MADE_OF_TWO_SWISHES = ("silu", "other", "up"), ("mul", "product", "swish", "other")

FOLDS: dict[str, tuple[list[Any], str, Fold | None]] = {
    "norm": ([NORM, *QKV, CONTEXT, O], "Q", Fold(source="g")),
    "norm that is added as well": ([NORM, *QKV, CONTEXT, O, ("add", "sum", "norm", "o")], "Q", None),
    "values": ([NORM, *QKV, CONTEXT, O], "O", Fold(source="V", heads=4, kv_heads=2)),
    "values that are added as well": ([NORM, *QKV, CONTEXT, O, ("add", "sum", "v", "o")], "O", None),
    "values that are keys too": ([NORM, *QKV[:2], attention("q", "k", "k"), O], "O", None),
    "values that are the norm": ([NORM, *QKV[:2], attention("q", "k", "norm"), O], "O", None),
    "values that no linear makes": ([NORM, *QKV, ("silu", "s", "v"), attention("q", "k", "s"), O], "O", None),
    "context that is read as well": ([NORM, *QKV, CONTEXT, O, ("mul", "square", "context", "o")], "O", None),
    "product": ([*GATED, PRODUCT, DOWN], "DOWN", Fold(source="UP")),
    "product the other way round": ([*GATED, ("mul", "product", "up", "swish"), DOWN], "DOWN", Fold(source="UP")),
    "product that is added as well": ([*GATED, PRODUCT, DOWN, ("add", "sum", "product", "down")], "DOWN", None),
    "factor that is added as well": ([*GATED, PRODUCT, DOWN, ("add", "sum", "up", "down")], "DOWN", None),
    "product of no linear": ([*GATED, *MADE_OF_TWO_SWISHES, DOWN], "DOWN", None),
    "square": ([GATED[2], ("mul", "product", "up", "up"), DOWN], "DOWN", None),
    "input of the layer": ([("linear", "only", "in", matrix("ONLY"))], "ONLY", None),
    "output of a linear": (
        [("linear", "one", "in", matrix("ONE")), ("linear", "two", "one", matrix("TWO"))],
        "TWO",
        None,
    ),
}
"""Nodes, a linear of theirs, and where factors of its columns can go."""


@pytest.mark.parametrize(("nodes", "linear", "fold"), FOLDS.values(), ids=FOLDS)
def test_factors_go_only_where_nothing_else_would_see_them(nodes: list[Any], linear: str, fold: Fold | None) -> None:
    (group,) = (group for group in built(*nodes).groups if linear in group.linears)
    assert group.fold == fold


@pytest.mark.parametrize(
    ("nodes", "residual"),
    [
        ([NORM, ("linear", "o", "norm", matrix("O")), ("add", "sum", "in", "o")], Value("in")),
        ([NORM, ("linear", "o", "norm", matrix("O")), ("add", "sum", "o", "in")], Value("in")),
        ([NORM, ("linear", "o", "norm", matrix("O")), ("mul", "product", "in", "o")], None),
        ([NORM, ("linear", "o", "norm", matrix("O")), ("add", "sum", "o", "o")], None),
        (
            [NORM, ("linear", "o", "norm", matrix("O")), ("add", "sum", "in", "o"), ("mul", "both", "o", "sum")],
            None,
        ),
        ([NORM, *QKV[:2], ("add", "sum", "q", "in"), ("add", "all", "sum", "k")], None),
    ],
    ids=["added", "added to", "multiplied", "doubled", "read twice", "one of two"],
)
def test_only_an_output_that_is_added_and_nothing_else_has_a_residual(nodes: list[Any], residual: Value | None) -> None:
    (group,) = (group for group in built(*nodes).groups if group.input == Value("norm"))
    assert group.residual == residual


def test_a_graph_built_by_hand_computes_what_it_says(weights: dict[str, Tensor]) -> None:
    layer = built(*GATED, ("mul", "product", "swish", "up"), DOWN)
    named = {name: weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qo"}
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3))
    (got,) = compute(layer, [layer.output], {"GATE": named["q"], "UP": named["o"], "DOWN": named["q"]}, x)
    expected = (F.silu(x @ named["q"].T) * (x @ named["o"].T)) @ named["q"].T
    assert torch.allclose(got, expected, atol=1e-4)
