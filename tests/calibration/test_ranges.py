"""The range of each edge is that of the values which the model has there, however they were shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.ranges import Range, RangeObserver, ranges_from_json, ranges_to_json
from exporter.checkpoint import open_checkpoint
from exporter.errors import InputError
from exporter.model.eager import eager_table
from exporter.model.graph import Constant, Graph, Node, Value, Weight
from exporter.model.rope import rope_table, rotate
from exporter.model.trace import trace
from tests.conftest import Toy

SMALLEST_NORMAL = 2.0**-126

tensors = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300).map(
    torch.tensor
)
shares = st.sampled_from([1.0, 0.984375, 0.875, 0.5, 2.0**-20])
"""Exact in binary, so that the ranks here and there are the same."""


def ranges_of(*parts: Tensor, central: float) -> Range:
    observer = RangeObserver(central=central)
    for part in parts:
        observer.observe("x", part)
    return observer.ranges()["x"]


@settings(max_examples=200, deadline=None)
@given(x=tensors, central=shares)
def test_ends_are_exact_and_percentiles_outside_the_sorted_values_by_less_than_a_128th(
    x: Tensor, central: float
) -> None:
    got = ranges_of(x, central=central)
    ascending = sorted(x.tolist())
    rank = int((1 - central) / 2 * (len(ascending) - 1))
    low, high = ascending[rank], ascending[-1 - rank]
    assert (got.lowest, got.highest, got.count) == (ascending[0], ascending[-1], len(ascending))
    assert 0 <= low - got.low_percentile <= max(abs(low), SMALLEST_NORMAL) / 128
    assert 0 <= got.high_percentile - high <= max(abs(high), SMALLEST_NORMAL) / 128


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_percentiles_follow_torch_quantile_beside_outliers_a_thousand_times_the_rest(scale: float) -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0)) * scale
    x[:3] *= 1000
    got = ranges_of(x, central=0.9999)
    low = torch.quantile(x.double(), 0.00005, interpolation="lower").item()
    high = torch.quantile(x.double(), 0.99995, interpolation="higher").item()
    assert low * (1 + 1 / 128) <= got.low_percentile <= low < -3 * scale
    assert 3 * scale < high <= got.high_percentile <= high * (1 + 1 / 128)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(tensors, min_size=1, max_size=5), central=shares)
def test_parts_merged_or_one_after_another_give_what_all_at_once_gives(parts: list[Tensor], central: float) -> None:
    at_once = ranges_of(torch.cat(parts), central=central)
    assert ranges_of(*parts, central=central) == at_once
    merged = RangeObserver(central=central)
    for part in parts:
        observer = RangeObserver(central=central)
        observer.observe("x", part)
        merged.merge(observer)
    assert merged.ranges() == {"x": at_once}


def test_a_tensor_of_many_blocks_any_layout_and_any_float_type_is_counted_whole() -> None:
    x = torch.randn(3, 500, 700, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = ranges_of(x.transpose(0, 2), central=0.5)
    ascending = x.float().flatten().sort().values.tolist()
    quarter = (len(ascending) - 1) // 4
    assert (got.lowest, got.highest, got.count) == (ascending[0], ascending[-1], 1_050_000)
    assert got.low_percentile == pytest.approx(ascending[quarter], rel=1 / 128)
    assert got.high_percentile == pytest.approx(ascending[-1 - quarter], rel=1 / 128)


def test_a_column_of_a_tensor_is_counted_without_its_neighbours() -> None:
    x = torch.tensor([[1.0, 50.0], [2.0, 60.0], [-3.0, 70.0]])
    got = ranges_of(x[:, 0], central=1.0)
    assert (got.lowest, got.highest, got.count) == (-3.0, 2.0, 3)


def test_an_empty_tensor_leaves_no_range() -> None:
    observer = RangeObserver()
    observer.observe("x", torch.zeros(1, 0, 4))
    assert observer.ranges() == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_with_the_name_of_its_edge(value: float) -> None:
    with pytest.raises(InputError, match=r"mul_3 reaches from .*(nan|inf).* finite values were expected"):
        RangeObserver().observe("mul_3", torch.tensor([0.0, value, 1.0]))


@pytest.mark.parametrize("central", [0.0, 1.1, 99.99, math.nan])
def test_a_share_outside_of_0_to_1_is_refused(central: float) -> None:
    with pytest.raises(ValueError, match=f"central is {central}, a share above 0 and up to 1"):
        RangeObserver(central=central)


@pytest.mark.parametrize(
    "changes", [{"lowest": -0.5}, {"low_percentile": 1.5}, {"highest": 0.0}, {"count": 0}, {"highest": math.nan}]
)
def test_a_range_whose_ends_do_not_ascend_is_refused(changes: dict[str, float]) -> None:
    good = {"lowest": -2.0, "highest": 2.0, "low_percentile": -1.0, "high_percentile": 1.0, "count": 9}
    with pytest.raises(ValueError, match="is not a range"):
        ranges_from_json({"x": {**good, **changes}})


@given(x=tensors)
def test_ranges_come_back_from_json_as_they_were(x: Tensor) -> None:
    observer = RangeObserver()
    observer.observe("attention_3.scores", x)
    written = json.dumps(ranges_to_json(observer.ranges()), allow_nan=False)
    assert ranges_from_json(json.loads(written)) == observer.ranges()


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (300, 0), (0, 256)])
@pytest.mark.parametrize("past", [0, 9])
def test_masked_scores_and_probabilities_do_not_count(window: int, chunk: int, past: int) -> None:
    heads, kv_heads, batch, length, dim = 4, 2, 2, 600, 8  # more tokens than are decomposed at once
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(batch, length, heads * dim, generator=generator)
    k, v = (torch.randn(batch, length, kv_heads * dim, generator=generator) for _ in range(2))
    past_k, past_v = (torch.randn(batch, kv_heads, past, dim, generator=generator) for _ in range(2))
    node = Node(op="attention", name="attention", arguments=(), layer=0)
    observer = RangeObserver(central=1.0)
    arguments = (q, k, v, past_k, past_v, None, heads, kv_heads, 0.5, window, chunk)
    keys, values = (
        torch.cat([past, new.view(batch, length, kv_heads, dim).transpose(1, 2)], dim=2)
        for past, new in ((past_k, k), (past_v, v))
    )
    observer.on_node(node, arguments, (torch.ones(1), keys, values))

    scores, probabilities = [], []
    for t in range(length):
        first = max(0, past + t - window + 1 if window else 0, (past + t) // chunk * chunk if chunk else 0)
        query = q[:, t].view(batch, kv_heads, -1, dim)
        row = 0.5 * query @ keys[:, :, first : past + t + 1].transpose(2, 3)
        scores.append(row.flatten())
        probabilities.append(row.softmax(dim=-1).flatten())
    ranges = observer.ranges()
    assert list(ranges) == [
        f"attention{edge}" for edge in ("", ".q_rotated", ".k_rotated", ".scores", ".probabilities")
    ]
    for edge, rows in (("scores", scores), ("probabilities", probabilities)):
        assert_close(ranges[f"attention.{edge}"], torch.cat(rows), central=1.0)
    assert ranges["attention.q_rotated"].count == q.numel()
    assert ranges["attention.k_rotated"].count == k.numel()


def assert_close(got: Range, values: Tensor, *, central: float) -> None:
    """``got`` is the range of ``values``, but for the rounding of whoever computed them."""
    expected = ranges_of(values, central=central)
    assert got.count == expected.count
    assert got.lowest == pytest.approx(expected.lowest, rel=1e-4, abs=1e-6)
    assert got.highest == pytest.approx(expected.highest, rel=1e-4, abs=1e-6)
    assert got.low_percentile == pytest.approx(expected.low_percentile, rel=1 / 64)
    assert got.high_percentile == pytest.approx(expected.high_percentile, rel=1 / 64)


def run_toy(toy: Toy, ids: Tensor, observer: RangeObserver) -> Graph:
    checkpoint = open_checkpoint(toy.folder)
    graph = trace(checkpoint.spec)
    caches = {
        name: torch.zeros(len(ids), checkpoint.spec.num_key_value_heads, 0, checkpoint.spec.head_dim)
        for name in graph.inputs[1:]
    }
    table = eager_table(lambda weight: checkpoint.read(weight.name).float())
    graph.run(table, {"ids": ids, **caches}, observe=observer.on_node)
    return graph


def input_of(graph: Graph, weight_name: str) -> str:
    """The edge that the linear of that weight reads."""
    node = next(n for n in graph.nodes if any(isinstance(a, Weight) and a.name == weight_name for a in n.arguments))
    source = next(argument for argument in node.arguments if isinstance(argument, Value))
    assert source.index == 0
    return source.node


def test_the_ranges_of_a_model_are_those_of_what_transformers_computes(make_toy: Callable[..., Toy]) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    toy = make_toy()
    ids = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(5))
    observer = RangeObserver(central=0.9)
    graph = run_toy(toy, ids, observer)
    ranges = observer.ranges()

    toy.model.set_attn_implementation("eager")
    layer = toy.model.model.layers[1]
    seen: dict[str, Tensor] = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: seen.update({f"{name}.in": inputs[0], f"{name}.out": output})
        )
    layer.register_forward_hook(lambda _module, _inputs, output: seen.update(residual=output))
    with torch.no_grad():
        answer = toy.model(ids, output_attentions=True)
    heads = (seen[f"self_attn.{x}_proj.out"].view(3, 40, -1, 32).transpose(1, 2) for x in "qk")
    cos, sin = toy.model.model.rotary_emb(answer.logits, torch.arange(40)[None])
    q_rotated, k_rotated = apply_rotary_pos_emb(*heads, cos, sin)
    below = torch.ones(40, 40).tril().bool()
    scores = 32**-0.5 * q_rotated @ k_rotated.repeat_interleave(2, dim=1).transpose(2, 3)

    prefix = "model.layers.1"
    attention = input_of(graph, f"{prefix}.self_attn.o_proj.weight")
    for edge, values in {
        input_of(graph, f"{prefix}.mlp.down_proj.weight"): seen["mlp.down_proj.in"],
        input_of(graph, f"{prefix}.mlp.up_proj.weight"): seen["mlp.up_proj.in"],
        input_of(graph, f"{prefix}.self_attn.q_proj.weight"): seen["self_attn.q_proj.in"],
        input_of(graph, "model.norm.weight"): seen["residual"],
        attention: seen["self_attn.o_proj.in"],
        f"{attention}.q_rotated": q_rotated,
        f"{attention}.k_rotated": k_rotated,
        f"{attention}.scores": scores[..., below],
        f"{attention}.probabilities": answer.attentions[1][..., below],
        graph.outputs["logits"].node: answer.logits,
    }.items():
        assert_close(ranges[edge], values, central=0.9)
    assert 0 < ranges[f"{attention}.probabilities"].lowest < ranges[f"{attention}.probabilities"].highest == 1
    assert set(ranges) == {node.name for node in graph.nodes} | {
        f"{node.name}.{edge}"
        for node in graph.nodes
        if node.op == "attention"
        for edge in ("q_rotated", "k_rotated", "scores", "probabilities")
    }


def test_a_cache_is_bounded_wherever_its_text_begins(make_toy: Callable[..., Toy]) -> None:
    """Keys turn with the position, the length of their pairs does not: a text at positions that calibration has not
    seen stays within what it has seen at the first ones."""
    toy = make_toy(num_hidden_layers=1)
    checkpoint = open_checkpoint(toy.folder)
    graph = trace(checkpoint.spec)
    reference_table = eager_table(lambda weight: checkpoint.read(weight.name).float())
    observer, keys = RangeObserver(), {}

    def seen(node: Node, arguments: Sequence[Any], results: tuple[Any, ...]) -> None:
        observer.on_node(node, arguments, results)
        if node.op == "attention":
            keys[node.name] = results[1:]

    ids = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(3))
    empty = torch.zeros(1, checkpoint.spec.num_key_value_heads, 0, checkpoint.spec.head_dim)
    graph.run(reference_table, {"ids": ids, "past_k.0": empty, "past_v.0": empty}, observe=seen)
    ((name, (cached_keys, cached_values)),) = keys.items()
    bounds = {kind: torch.tensor(found) for kind, found in observer.caches().items()}
    assert set(bounds) == {f"{name}.keys", f"{name}.values"}
    assert torch.equal(bounds[f"{name}.values"], cached_values.abs().amax(dim=(0, 2)))
    (attention,) = (node for node in graph.nodes if node.op == "attention")
    (inv_freq,) = (a for a in attention.arguments if isinstance(a, Constant))
    for first in (1, 17, 400):
        turned = rotate(cached_keys, *rope_table(inv_freq.value * first, first=1, count=1))  # further on by ``first``
        assert not torch.allclose(turned, cached_keys)
        assert (turned.abs().amax(dim=(0, 2)) <= bounds[f"{name}.keys"] * (1 + 1e-5)).all()
    again = RangeObserver()
    again.merge(observer)
    assert again.caches() == observer.caches()
