"""Llama 4 in a GGUF file: experts in one tensor, and what llama.cpp has built in for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import targets.gguf
from exporter.bisect import compare_ops
from exporter.checkpoint import open_checkpoint
from exporter.checkpoint.gguf_file import read_header
from exporter.codes import weight_digests
from exporter.errors import LoweringError
from exporter.model.graph import Node, Weight
from exporter.model.reference import Reference
from exporter.model.trace import trace
from exporter.parity import drive_for
from exporter.prove import ask_reference, prove_codes, prove_parity
from exporter.quantized import QuantizedTensor
from exporter.spec import Plan, Precision, Rule, Verdict
from exporter.store import StoreKey
from targets.gguf.architecture import read_decoder
from targets.gguf.lower import write_model
from targets.gguf.vocabulary import NONE
from tests.conftest import Toy, write_toy
from tests.exporter.test_gguf_experts import UNTOLD
from tests.generations import toy_config
from tests.targets.test_experts import Poisoned, chosen_by
from tests.targets.test_gguf import TARGET, Kind, Made, make, needs_llama_cpp, stored_as  # noqa: F401

OF_RELEASES = {"Llama 4 Scout": {}, "Llama 4 Maverick": {"num_local_experts": 128, "intermediate_size": 32}}
IDS = torch.randint(3, 96, (64,), generator=torch.Generator().manual_seed(5)).tolist()


def write(folder: Path, generation: str = "Llama 4 Scout", **changes: Any) -> Toy:
    """With what llama.cpp has built in as the releases have it."""
    return write_toy(folder, **toy_config(generation) | UNTOLD | OF_RELEASES[generation] | changes)


@pytest.fixture
def scout(tmp_path: Path) -> Toy:
    return write(tmp_path / "scout", num_experts_per_tok=2)


# --- what lies in the file ---------------------------------------------------------------------------------------


def test_experts_of_a_layer_are_one_tensor_of_the_floats_of_the_store(scout: Toy, make: Callable[..., Made]) -> None:  # noqa: F811
    made = make(scout.folder, precision="int4")
    tensors, place = stored_as(made), "model.layers.1.feed_forward"
    for part in ("gate", "up", "down"):
        stack = tensors[f"blk.1.ffn_{part}_exps.weight"]
        weights = [made.store[f"{place}.experts.{expert}.{part}_proj.weight"] for expert in range(4)]
        assert stack.tensor_type == Kind.Q4_0
        floats = gguf.dequantize(stack.data, stack.tensor_type)
        for found, weight in zip(floats, weights, strict=True):
            assert isinstance(weight, QuantizedTensor)
            assert np.array_equal(found, weight.dequantize().numpy())
    router, stored = tensors["blk.1.ffn_gate_inp.weight"], made.store[f"{place}.router.weight"]
    assert isinstance(stored, torch.Tensor)
    assert (router.tensor_type, router.data.tolist()) == (Kind.F32, stored.tolist())
    assert prove_codes(TARGET, made.artifact, expected=weight_digests(made.store)).verdict is Verdict.PASSED


@pytest.mark.parametrize("generation", OF_RELEASES)
def test_an_exported_file_is_a_checkpoint_of_the_same_model(
    generation: str,
    make: Callable[..., Made],  # noqa: F811
    tmp_path: Path,
) -> None:
    made = make(write(tmp_path / "toy", generation).folder, precision="fp32")
    again = open_checkpoint(made.artifact.path)
    assert (again.spec.attention, again.spec.experts) == (made.spec.attention, made.spec.experts)
    assert (again.spec.intermediate_size, again.spec.head_dim) == (made.spec.intermediate_size, made.spec.head_dim)
    for name in made.spec.weights():
        assert torch.equal(again.read(name), made.store[name]), name
    step = read_header(made.artifact.path).fields["llama4.interleave_moe_layer_step"]
    assert step == {"Llama 4 Scout": 1, "Llama 4 Maverick": 2}[generation]


def test_a_stack_damaged_in_one_expert_is_seen(scout: Toy, make: Callable[..., Made]) -> None:  # noqa: F811
    made = make(scout.folder, precision="int4")
    stack = stored_as(made)["blk.2.ffn_up_exps.weight"]
    content = bytearray(made.artifact.path.read_bytes())
    content[int(stack.data_offset) + stack.n_bytes // 4 * 3 + 10] ^= 1
    made.artifact.path.write_bytes(content)
    report = prove_codes(TARGET, made.artifact, expected=weight_digests(made.store))
    assert report.figures["wrong"] == ["model.layers.2.feed_forward.experts.3.up_proj.weight"]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"attention_chunk_size": 16},
            "attention_chunk_size 8192 built in for a Llama 4 of 4 experts, this one has 16",
        ),
        ({"floor_scale": 8}, "floor_scale 8192 built in for a Llama 4 of 4 experts, this one has 8"),
        ({"attn_scale": 0.2}, "attn_scale 0.1 built in"),
        ({"attn_temperature_tuning": False}, "floor_scale 8192 built in"),
        ({"no_rope_layer_interval": 2}, "chunked_layers 0, 1, 2, 4 built in .*, this one has 0, 2, 4"),
        ({"use_qk_norm": False}, "use_qk_norm True built in"),
        (
            {"num_local_experts": 128, "intermediate_size": 32},
            "use_qk_norm False built in for a Llama 4 of 128 experts",
        ),
        ({"num_hidden_layers": 3}, "no Llama 4 of fewer than 4 layers, this one has 3"),
        ({"moe_layers": [0, 3]}, "experts in every so-manieth layer, this one in 0, 3"),
    ],
)
def test_what_llama_cpp_has_built_in_otherwise_is_refused(
    change: dict[str, Any], says: str, make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    toy = write(tmp_path / "toy", **change)
    spec = open_checkpoint(toy.folder).spec
    with pytest.raises(LoweringError, match=says):
        read_decoder(trace(spec))
    assert TARGET.refuse(spec, make_plan(toy.folder)) is not None


def test_experts_of_several_types_are_refused(scout: Toy, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(scout.folder)
    rules = (Rule(pattern="layers.2.feed_forward.experts.1.up_proj", precision=Precision.INT8),)
    mixed = dataclasses.replace(plan, scheme=dataclasses.replace(plan.scheme, rules=rules))
    spec = open_checkpoint(scout.folder).spec
    assert TARGET.refuse(spec, plan) is None
    why = str(TARGET.refuse(spec, mixed))
    assert why.startswith(
        "the experts of a layer are of one type in a GGUF file, model.layers.2.feed_forward.experts.0"
    )
    with pytest.raises(LoweringError, match="are of one type"):
        write_model(
            trace(spec), open_checkpoint(scout.folder), scout.folder / "a.gguf", scheme=mixed.scheme, vocabulary=NONE
        )


def _of_weight(name: str) -> Callable[[Node], bool]:
    return lambda node: any(isinstance(argument, Weight) and name in argument.name for argument in node.arguments)


@pytest.mark.parametrize(
    ("which", "change"),
    [
        (lambda node: node.op == "route", lambda arguments: (arguments[0], 1)),
        (lambda node: node.op == "gate" and node.expert == 2, lambda arguments: (*arguments[:2], 1)),
        (lambda node: node.op == "head_norm", lambda arguments: (arguments[0], 16, arguments[2])),
        (lambda node: node.op == "temper", lambda arguments: (*arguments[:2], 16, 0.1)),
        (lambda node: node.op == "attention" and node.layer == 3, lambda arguments: (*arguments[:-1], 8192)),
        (lambda node: node.op == "attention" and node.layer == 2, lambda arguments: (*arguments[:-1], 0)),
        (
            _of_weight("layers.1.feed_forward.experts.3.up"),
            lambda arguments: (
                arguments[0],
                dataclasses.replace(arguments[1], name=arguments[1].name.replace(".3.up", ".2.up")),
            ),
        ),
    ],
)
def test_a_graph_that_is_not_llama_cpps_is_refused(
    which: Callable[[Node], bool], change: Callable[[tuple[Any, ...]], tuple[Any, ...]], scout: Toy
) -> None:
    graph = trace(open_checkpoint(scout.folder).spec)
    assert read_decoder(graph).architecture == "llama4"
    victim = next(node for node in graph.nodes if which(node))
    nodes = tuple(
        dataclasses.replace(node, arguments=change(node.arguments)) if node is victim else node for node in graph.nodes
    )
    with pytest.raises(LoweringError, match="architecture llama4 computes something else"):
        read_decoder(dataclasses.replace(graph, nodes=nodes))


# --- run by llama.cpp --------------------------------------------------------------------------------------------


def proven(made: Made) -> Any:
    steps = drive_for(IDS, context=64)
    answers = ask_reference(made.graph, made.store, made.artifact, steps)
    return prove_parity(TARGET, made.artifact, answers, graph=made.graph, store=made.store, plan=made.plan)


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.parametrize(("generation", "count"), [("Llama 4 Scout", 2), ("Llama 4 Maverick", 1)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_llama_cpp_answers_as_the_reference(
    generation: str,
    count: int,
    precision: str,
    make: Callable[..., Made],  # noqa: F811
    tmp_path: Path,
) -> None:
    made = make(write(tmp_path / "toy", generation, num_experts_per_tok=count).folder, precision=precision)
    parity = proven(made)
    assert parity.verdict is Verdict.PASSED, parity
    assert parity.figures["structure_max_abs_logit_diff"] < 1e-4


@needs_llama_cpp
@pytest.mark.toolchain
def test_parts_of_a_large_model_begin_where_the_order_of_layers_does(
    make: Callable[..., Made],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(targets.gguf, "STRUCTURE_BYTES", 1)
    changes = {"num_hidden_layers": 9, "interleave_moe_layer_step": 2}
    made = make(write(tmp_path / "toy", **changes).folder, precision="fp32")
    parts = TARGET.structure_parts(made.graph, made.plan.scheme)
    assert [sorted({node.layer for node in part.nodes} - {None}) for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert proven(made).verdict is Verdict.PASSED


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_every_op_of_the_file_is_seen_and_none_parts(
    precision: str,
    scout: Toy,
    make: Callable[..., Made],  # noqa: F811
) -> None:
    made = make(scout.folder, precision=precision)
    calls = {"prefill": IDS[:40], "decode": IDS[40:41]}
    observation = TARGET.observe(made.artifact, graph=made.graph, calls=[*calls.values()], threads=1)
    found = compare_ops(observation, made.graph, made.store, calls=calls)
    assert not found.partings, str(found)


@needs_llama_cpp
@pytest.mark.toolchain
def test_an_expert_that_no_token_chose_is_not_computed(scout: Toy, make_plan: Callable[..., Plan]) -> None:
    checkpoint, plan = open_checkpoint(scout.folder), make_plan(scout.folder, precision="fp32")
    graph, key = trace(checkpoint.spec), StoreKey(source_sha256="", scheme=plan.scheme)
    store = Poisoned(checkpoint=checkpoint, key=key, root=scout.folder)
    store.chosen = chosen_by(graph, checkpoint, IDS[0])
    assert len(store.chosen) == 2 * 5
    artifact = TARGET.lower(graph, store, plan, scout.folder)
    expected = Reference(graph, checkpoint, artifact.arithmetic).feed(IDS[:1])
    with TARGET.open(artifact, threads=1) as runner:
        assert (runner.feed(IDS[:1]) - expected).abs().max() < 1e-3


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.slow
def test_chunks_and_temperatures_are_llama_cpps_beyond_a_chunk(
    make: Callable[..., Made],  # noqa: F811
    tmp_path: Path,
) -> None:
    """At position 8,192 a chunk begins, and queries of the layer without positions are scaled from 8,191 on."""
    length = 8300
    toy = write(tmp_path / "toy", max_position_embeddings=16384, num_hidden_layers=4)
    made = make(toy.folder, precision="fp32", context=length)
    ids = torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(6)).tolist()
    reference = Reference(made.graph, made.store, made.artifact.arithmetic)
    others = dataclasses.replace(made.spec.attention, attention_chunk_size=16384, floor_scale=16384)
    unchunked = Reference(trace(dataclasses.replace(made.spec, attention=others)), made.store, made.artifact.arithmetic)
    with TARGET.open(made.artifact, threads=2) as runner:
        for first, end in pairwise([*range(0, 8191, 910), 8191, length]):
            got, expected, other = (one.feed(ids[first:end])[-1] for one in (runner, reference, unchunked))
            assert (got - expected).abs().max() < 2e-2, end
            assert ((other - expected).abs().max() > 5e-2) == (end == length), end
