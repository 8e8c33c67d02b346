"""The traced graph answers as transformers does, whatever the shape of the model."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.checkpoint import open_checkpoint
from exporter.errors import LoweringError
from exporter.model.graph import VOCABULARY, Graph, Node
from exporter.model.ops import attention, attention_edges
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.rope import inverse_frequencies
from exporter.model.trace import trace
from exporter.parity import Drive, drive
from exporter.spec import ModelSpec, Precision, RopeKind, RopeSpec, WeightScheme
from exporter.store import StoreKey, WeightStore
from tests.conftest import Toy, write_toy

FP32 = WeightScheme(body=Precision.FP32, embedding=Precision.FP32, head=Precision.FP32, group_size=32)

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {
        **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 16,
    },
]


def reference_of(folder: Path) -> Reference:
    checkpoint = open_checkpoint(folder)
    key = StoreKey(source_sha256="", scheme=FP32)
    store = WeightStore(checkpoint=checkpoint, key=key, root=folder)
    return Reference(trace(checkpoint.spec), store, FULL_PRECISION)


def released_spelling(toy: Toy, rope: dict[str, Any]) -> None:
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    default = rope["rope_type"] == "default"
    toy.edit_config(
        rope_parameters=None, rope_theta=rope["rope_theta"], **({} if default else {"rope_scaling": scaling})
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    kv_heads=st.sampled_from([1, 2, 3]),
    repeats=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 12, 32]),
    hidden=st.sampled_from([24, 48, 96]),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    rope=st.sampled_from(ROPES),
    released=st.booleans(),
    prefills=st.tuples(st.integers(1, 20), st.integers(1, 9)),
    decodes=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_logits_equal_transformers_over_prefill_rewind_and_decode(
    kv_heads: int,
    repeats: int,
    head_dim: int,
    hidden: int,
    layers: int,
    tied: bool,
    rope: dict[str, Any],
    released: bool,
    prefills: tuple[int, int],
    decodes: int,
    seed: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        toy = write_toy(
            Path(folder),
            seed=seed,
            num_key_value_heads=kv_heads,
            num_attention_heads=kv_heads * repeats,
            head_dim=head_dim,
            hidden_size=hidden,
            num_hidden_layers=layers,
            tie_word_embeddings=tied,
            rope_parameters=rope,
        )
        if released:
            released_spelling(toy, rope)
        ids = torch.randint(96, (sum(prefills) + decodes,), generator=torch.Generator().manual_seed(seed))
        steps = Drive(ids=tuple(ids.tolist()), prefills=prefills)
        got = drive(reference_of(toy.folder), steps)
        with torch.no_grad():
            expected = toy.model(ids[None]).logits[0][steps.positions]
    assert (got - expected).abs().max() <= 1e-4


def test_the_bundled_model_equals_transformers(sample: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(sample, dtype=torch.float32).eval()
    ids = torch.randint(2000, (200,), generator=torch.Generator().manual_seed(1))
    steps = Drive(ids=tuple(ids.tolist()), prefills=(96, 17))
    with torch.no_grad():
        expected = model(ids[None]).logits[0][steps.positions]
    assert (drive(reference_of(sample), steps) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_bit_equal_to_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    toy = write_toy(tmp_path, rope_parameters=rope)
    got = inverse_frequencies(open_checkpoint(tmp_path).spec.rope, head_dim=32)
    assert torch.equal(got, toy.model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(("window", "chunk", "rotary"), [(0, 0, True), (5, 0, True), (0, 8, True), (0, 0, False)])
def test_attention_equals_a_loop_over_positions(window: int, chunk: int, rotary: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads, dim, past, length = 4, 2, 8, 7, 6
    q = torch.randn(1, length, heads * dim, generator=generator)
    k, v = (torch.randn(1, length, kv_heads * dim, generator=generator) for _ in range(2))
    past_k, past_v = (torch.randn(1, kv_heads, past, dim, generator=generator) for _ in range(2))
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.03]) if rotary else None
    out, present_k, present_v = attention(q, k, v, past_k, past_v, inv_freq, heads, kv_heads, 0.5, window, chunk)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        if inv_freq is None:
            return x
        complex_pairs = torch.complex(x[: dim // 2], x[dim // 2 :]) * torch.polar(torch.ones(4), position * inv_freq)
        return torch.cat([complex_pairs.real, complex_pairs.imag])

    for t in range(length):
        position = past + t
        for head in range(heads):
            group = head // (heads // kv_heads)
            query = turned(q[0, t, head * dim : (head + 1) * dim], position)
            visible = [
                s
                for s in range(position + 1)
                if (not window or s > position - window) and (not chunk or s // chunk == position // chunk)
            ]
            keys = torch.stack(
                [
                    past_k[0, group, s] if s < past else turned(k[0, s - past].view(kv_heads, dim)[group], s)
                    for s in visible
                ]
            )
            values = torch.stack(
                [past_v[0, group, s] if s < past else v[0, s - past].view(kv_heads, dim)[group] for s in visible]
            )
            expected = torch.softmax(0.5 * keys @ query, dim=0) @ values
            assert torch.allclose(out[0, t, head * dim : (head + 1) * dim], expected, atol=1e-5)
    assert present_k.shape == present_v.shape == (1, kv_heads, past + length, dim)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (5, 0), (0, 8)])
@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("rotary", [True, False])
def test_the_decomposed_attention_ends_in_the_results_of_the_op(
    heads: int, kv_heads: int, window: int, chunk: int, past: int, rotary: bool
) -> None:
    arguments = attention_arguments(heads=heads, kv_heads=kv_heads, past=past, rotary=rotary)
    expected = attention(*arguments, heads, kv_heads, 0.3, window, chunk)
    edges = attention_edges(*arguments, heads, kv_heads, 0.3, window, chunk)
    for got, wanted in zip((edges.context, edges.present_k, edges.present_v), expected, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (5, 0), (0, 8)])
def test_each_edge_of_an_attention_is_what_transformers_computes_there(window: int, chunk: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    past, length, heads, kv_heads = 7, 6, 6, 2
    q, k, v, past_k, past_v, inv_freq = attention_arguments(heads=heads, kv_heads=kv_heads, past=past, rotary=True)
    edges = attention_edges(q, k, v, past_k, past_v, inv_freq, heads, kv_heads, 0.3, window, chunk)
    positions = torch.arange(past, past + length)
    angles = torch.cat([positions[:, None] * inv_freq] * 2, dim=-1)[None]
    q, k = (x.view(2, length, -1, 8).transpose(1, 2) for x in (q, k))
    q_rotated, k_rotated = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    scores = 0.3 * q_rotated @ repeat_kv(torch.cat([past_k, k_rotated], dim=2), heads // kv_heads).transpose(2, 3)
    for t, s in itertools.product(range(length), range(past + length)):
        near = past + t - s < (window or 99) and s // (chunk or 99) == (past + t) // (chunk or 99)
        assert edges.visible[t, s] == (s <= past + t and near)
    scores[..., ~edges.visible] = -torch.inf
    torch.testing.assert_close(edges.q_rotated, q_rotated)
    torch.testing.assert_close(edges.k_rotated, k_rotated)
    torch.testing.assert_close(edges.scores, scores)
    torch.testing.assert_close(edges.probabilities, scores.softmax(dim=-1))
    assert (edges.probabilities[..., ~edges.visible] == 0).all()


def attention_arguments(*, heads: int, kv_heads: int, past: int, rotary: bool) -> tuple[Any, ...]:
    """q, k, v, both caches and frequencies for two sequences of six tokens, with eight channels a head."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 6, heads * 8, generator=generator)
    k, v = (torch.randn(2, 6, kv_heads * 8, generator=generator) for _ in range(2))
    past_k, past_v = (torch.randn(2, kv_heads, past, 8, generator=generator) for _ in range(2))
    return q, k, v, past_k, past_v, torch.tensor([1.0, 0.3, 0.1, 0.03]) if rotary else None


def spec_of(**changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        **{"name": "x", "vocab_size": 128_256, "hidden_size": 16_384, "intermediate_size": 53_248},
        **{"num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128},
        **{"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        **{"rope": RopeSpec(theta=5e5, kind=RopeKind.DEFAULT), "bos_token_id": 1, "eos_token_ids": (2,)},
    }
    return ModelSpec(**{**fields, **changes})


def test_a_graph_holds_the_closed_vocabulary_and_every_weight_once_named() -> None:
    spec = spec_of(num_hidden_layers=2)
    graph = trace(spec)
    dense = {"embedding", "linear", "rms_norm", "silu", "mul", "add", "attention"}
    assert {node.op for node in graph.nodes} == dense
    assert dense < set(VOCABULARY)
    used = {argument.name for node in graph.nodes for argument in node.arguments if hasattr(argument, "shape")}
    assert used == set(spec.weights())
    assert {node.layer for node in graph.nodes} == {None, 0, 1}


def test_tied_models_name_one_tensor_for_embedding_and_head() -> None:
    graph = trace(spec_of(num_hidden_layers=1, tie_word_embeddings=True))
    names = [argument.name for node in graph.nodes for argument in node.arguments if hasattr(argument, "shape")]
    assert names.count("model.embed_tokens.weight") == 2
    assert "lm_head.weight" not in names


def test_llama_405b_has_its_published_parameters_and_traces_without_reading_a_weight() -> None:
    spec = spec_of()
    assert spec.parameters == 405_853_388_800  # 405B as published, to the last digit of transformers' meta-device count
    assert len(trace(spec).nodes) == 126 * 14 + 3


def test_an_op_missing_from_a_table_is_named() -> None:
    graph = trace(spec_of(num_hidden_layers=1))
    inputs = dict.fromkeys(graph.inputs, 0)
    with pytest.raises(LoweringError, match="no lowering for op 'embedding'"):
        graph.run({}, inputs)


def test_an_op_outside_the_vocabulary_is_refused_when_the_graph_is_made() -> None:
    node = Node(op="tanh", name="tanh_0", arguments=(), layer=None)
    with pytest.raises(ValueError, match="'tanh'"):
        Graph(spec=spec_of(), inputs=(), nodes=(node,), outputs={})
