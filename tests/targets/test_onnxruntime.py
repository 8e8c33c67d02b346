"""The ONNX Runtime lowering: right for every precision, what onnxruntime-genai loads, and nothing stored twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.layers import quantize
from exporter.bundle import copy_tokenizer
from exporter.checkpoint import open_checkpoint
from exporter.codes import check_codes, weight_digests
from exporter.errors import LoweringError
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference, round_activations
from exporter.model.trace import trace
from exporter.parity import all_at_once, drive, drive_for
from exporter.quantized import QuantizedTensor
from exporter.spec import PER_ROW, Activations, Artifact, Logits, Plan, Precision, Rule, Verdict, activation_block
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from targets.onnxruntime import TARGET
from tests.conftest import Toy, apply_matmulnbits, clear_tokens

pytestmark = pytest.mark.toolchain

IDS = torch.randint(96, (64,), generator=torch.Generator().manual_seed(0)).tolist()
STEPS = drive_for(IDS, context=64)


def lower(folder: Path, plan: Plan, *, graph: Graph | None = None) -> tuple[Artifact, Graph, WeightStore]:
    checkpoint = open_checkpoint(folder)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    graph = graph or trace(checkpoint.spec)
    plan.out.mkdir(exist_ok=True)
    return TARGET.lower(graph, store, plan, plan.out), graph, store


def in_places(precision: str) -> tuple[Rule, ...]:
    """Rules by which projections differ in precision from others with the same input."""
    patterns = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.*.[kv]_proj", "layers.1.mlp.down_proj")
    return tuple(Rule(pattern=pattern, precision=Precision(precision)) for pattern in patterns)


SCHEMES: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({"precision": "fp32"}, 1e-4),
    "fp16": ({"precision": "fp16"}, 1e-3),
    "int8": ({"precision": "int8"}, 1e-4),
    "int4": ({}, 1e-4),
    "int4 throughout": ({"head": "int4"}, 1e-4),
    "int4 per row": ({"group_size": PER_ROW}, 1e-4),
    "int4 per row throughout": ({"group_size": PER_ROW, "head": "int4"}, 1e-4),
    "int4, int8 in places": ({"rules": in_places("int8")}, 1e-4),
    "int8, int4 in places": ({"precision": "int8", "rules": in_places("int4")}, 1e-4),
    "int4 per row, int8 in places": ({"group_size": PER_ROW, "rules": in_places("int8")}, 1e-4),
}
"""What ``make_plan`` is told, and how far logits may be from the reference's without rounding."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_structure_and_codes_for_every_scheme(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tied: bool, scheme: str, tmp_path: Path
) -> None:
    toy = make_toy(tie_word_embeddings=tied)
    words, allowed = SCHEMES[scheme]
    plan = make_plan(toy.folder, **words)
    artifact, graph, store = lower(toy.folder, plan)
    expected = all_at_once(Reference(graph, store, FULL_PRECISION), STEPS)
    with TARGET.open_structure(artifact, graph=graph, store=store, plan=plan, scratch=tmp_path) as runner:
        assert (drive(runner, STEPS) - expected).abs().max() <= allowed
    report = check_codes(TARGET.read_weights(artifact), expected=weight_digests(store), scheme=plan.scheme)
    assert report.verdict is Verdict.PASSED, report.reason


@pytest.mark.parametrize("tokens", [1, 16])
def test_activations_are_rounded_as_matmulnbits_rounds_them_ties_included(tokens: int) -> None:
    """Against the op itself on the identity: its output is the rounded activation, up to the noise of its sum."""
    generator = torch.Generator().manual_seed(tokens)
    identity = QuantizedTensor(
        name="identity", bits=4, group_size=32, codes=torch.eye(256, dtype=torch.int8), scales=torch.ones(256, 8)
    )
    ties = (torch.randint(-126, 126, (tokens, 8, 32), generator=generator) + 0.5) / 127
    ties[..., 0] = 1.0  # the largest of each block
    x = (ties * 10 * torch.rand(tokens, 8, 1, generator=generator)).flatten(1)
    steps = (x.view(tokens, 8, 32).abs().amax(dim=2, keepdim=True) / 127).expand(-1, -1, 32).flatten(1)
    theirs = apply_matmulnbits(identity, x, accuracy_level=4) / steps
    ours = round_activations(x, Activations.INT8_PER_BLOCK, group_size=32) / steps
    assert torch.equal(theirs.round(), ours.round())


@pytest.mark.parametrize("columns", [256, 96, 80])
@pytest.mark.parametrize("tokens", [1, 16])
def test_int4_with_one_scale_per_row_is_computed_as_the_reference_says(columns: int, tokens: int) -> None:
    """Against the op itself: in blocks of 128, 32 and 16 columns of activations."""
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(-8, 8, (24, columns), generator=generator).to(torch.int8)
    scales = torch.rand(24, 1, generator=generator).bfloat16().float()
    weight = QuantizedTensor(name="w", bits=4, group_size=columns, codes=codes, scales=scales)
    x = torch.randn(tokens, columns, generator=generator)
    rounded = round_activations(x, Activations.INT8_PER_BLOCK, group_size=columns)
    expected = rounded @ weight.dequantize().T
    got = apply_matmulnbits(weight, x, accuracy_level=4)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (got - x @ weight.dequantize().T).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("scheme", ["int4", "int4 per row throughout", "int4, int8 in places", "int8, int4 in places"])
def test_activations_are_rounded_in_the_blocks_of_the_reference(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], scheme: str
) -> None:
    import onnx

    toy = make_toy()
    words, _ = SCHEMES[scheme]
    artifact, _, store = lower(toy.folder, make_plan(toy.folder, **words))
    linears = [n for n in onnx.load(artifact.path, load_external_data=False).graph.node if n.op_type == "MatMulNBits"]
    for node in linears:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        stored = store[node.input[1].removesuffix(".codes")]
        assert isinstance(stored, QuantizedTensor)
        assert attributes["bits"] == stored.bits
        block = 32 if stored.bits == 4 and "row" not in scheme else {64: 64, 96: 32, 128: 128}[stored.shape[1]]
        assert attributes["block_size"] == activation_block(columns=stored.shape[1], group_size=stored.group_size)
        assert attributes["block_size"] == block
    assert len(linears) == 2 * 7 + 1


def test_rows_that_blocks_of_sixteen_do_not_divide_are_refused(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    spec = open_checkpoint(make_toy(intermediate_size=72).folder).spec
    for words in ({"group_size": PER_ROW}, {"precision": "int8"}, {"precision": "fp32", "rules": in_places("int8")}):
        reason = TARGET.refuse(spec, make_plan(Path("unused"), **words)) or ""
        assert reason.startswith("MatMulNBits takes blocks of 16 columns or more, but model.layers.")
        assert reason.endswith(".mlp.down_proj.weight has 72 columns")
    assert TARGET.refuse(spec, make_plan(Path("unused"), precision="fp32")) is None


def test_activations_count_as_rounded_wherever_a_linear_is_quantized(make_plan: Callable[..., Plan]) -> None:
    def activations(**words: Any) -> Activations:
        return TARGET.arithmetic(make_plan(Path("unused"), **words).scheme).activations

    assert activations(precision="fp32") is Activations.FLOAT
    assert activations(precision="fp32", rules=in_places("int8")) is Activations.INT8_PER_BLOCK
    assert activations(precision="int4") is Activations.INT8_PER_BLOCK


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_logits_for_all_positions_end_in_those_for_the_last(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], precision: str, tmp_path: Path
) -> None:
    toy = make_toy()
    last, *_ = lower(toy.folder, make_plan(toy.folder, precision=precision, out=tmp_path / "last"))
    every, *_ = lower(toy.folder, make_plan(toy.folder, precision=precision, logits=Logits.ALL, out=tmp_path / "all"))
    with TARGET.open(last, threads=1) as one, TARGET.open(every, threads=1) as many:
        got_one, got_many = one.feed(IDS[:20]), many.feed(IDS[:20])
    assert got_one.shape == (1, 96)
    assert got_many.shape == (20, 96)
    assert torch.allclose(got_one[0], got_many[-1], atol=1e-5)


def test_a_window_means_what_the_op_says(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]) -> None:
    toy = make_toy()
    plan = make_plan(toy.folder, precision="fp32")
    graph = trace(open_checkpoint(toy.folder).spec)
    windowed = dataclasses.replace(graph, nodes=tuple(with_attention(node, window=9) for node in graph.nodes))
    artifact, _, store = lower(toy.folder, plan, graph=windowed)
    expected = all_at_once(Reference(windowed, store, FULL_PRECISION), STEPS)
    plain = all_at_once(Reference(graph, store, FULL_PRECISION), STEPS)
    with TARGET.open(artifact, threads=1) as runner:
        assert (drive(runner, STEPS) - expected).abs().max() <= 1e-4
    assert (plain - expected).abs().max() > 0.01


def test_a_chunk_is_refused_by_name(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]) -> None:
    toy = make_toy()
    graph = trace(open_checkpoint(toy.folder).spec)
    chunked = dataclasses.replace(graph, nodes=tuple(with_attention(node, chunk=8) for node in graph.nodes))
    with pytest.raises(LoweringError, match=r"no chunked attention \(chunk 8\)"):
        lower(toy.folder, make_plan(toy.folder), graph=chunked)


def with_attention(node: Any, *, window: int = 0, chunk: int = 0) -> Any:
    if node.op != "attention":
        return node
    return dataclasses.replace(node, arguments=(*node.arguments[:-2], window, chunk))


def test_the_graph_is_fused_and_ties_what_is_tied(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    import onnx

    sizes = {}
    for tied in (True, False):
        toy = make_toy(tie_word_embeddings=tied)
        plan = make_plan(toy.folder, out=tmp_path / f"tied-{tied}")
        artifact, *_ = lower(toy.folder, plan)
        sizes[tied] = (plan.out / "model.onnx.data").stat().st_size
        ops = [node.op_type for node in onnx.load(artifact.path, load_external_data=False).graph.node]
        assert ops.count("GroupQueryAttention") == 2
        assert ops.count("MatMulNBits") == 2 * 7 + 1
        assert ops.count("SkipSimplifiedLayerNormalization") == 3  # all but the first norm and the sliced last one
    head_bytes = 96 * 64 + 96 * 4  # codes, and a scale per row (64 columns are one block)
    assert sizes[False] - sizes[True] >= head_bytes


def test_input_and_output_names_are_those_of_the_genai_config(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    import onnx

    toy = make_toy()
    plan = make_plan(toy.folder)
    artifact, graph, _ = lower(toy.folder, plan)
    decoder = json.loads((plan.out / "genai_config.json").read_text())["model"]["decoder"]
    model = onnx.load(artifact.path, load_external_data=False).graph
    layers = range(graph.spec.num_hidden_layers)

    def expand(names: dict[str, str]) -> set[str]:
        return {name % layer if "%d" in name else name for name in names.values() for layer in layers}

    assert {value.name for value in model.input} == expand(decoder["inputs"])
    assert {value.name for value in model.output} == expand(decoder["outputs"])


def test_a_file_that_is_no_model_is_told(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    toy = make_toy()
    artifact, *_ = lower(toy.folder, make_plan(toy.folder))
    artifact.path.write_bytes(b"\xff" * 100)
    with pytest.raises(LoweringError, match=r"cannot load model.onnx"):
        TARGET.open(artifact, threads=1)
    with pytest.raises(LoweringError, match=r"is not an ONNX model"):
        list(TARGET.read_weights(artifact))


CLEAR_CHATS = ("At Antium lives he?", "Tush, tush!", "Well, let us go together.")
CLEAR_STARTS = ("I have the honour", "Fellow-citizens of the Senate")
"""Prompts that the sample answers with four tokens and more without a near tie in int4, and most in other schemes."""


@pytest.mark.parametrize("scheme", ["int4", "int4 per row", "int4, int8 in places"])
def test_onnxruntime_genai_answers_with_the_tokens_of_the_reference_and_stops(
    sample: Path, make_plan: Callable[..., Plan], scheme: str
) -> None:
    import onnxruntime_genai as og

    words, _ = SCHEMES[scheme]
    plan = make_plan(sample, context=128, **words)
    artifact, graph, store = lower(sample, plan)
    copy_tokenizer(Tokenizer(sample), plan.out)
    reference = Reference(graph, store, artifact.arithmetic)
    tokenizer = Tokenizer(plan.out)
    model = og.Model(str(plan.out))
    prompts = [tokenizer.chat(message) for message in CLEAR_CHATS] + [tokenizer.encode(text) for text in CLEAR_STARTS]
    answered = stopped = 0
    for ids in prompts:
        expected = clear_tokens(reference.greedy(ids, count=12, stops=artifact.spec.eos_token_ids))
        if len(expected) < 4:
            continue
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + len(expected), do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        answer = []
        while not generator.is_done():
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        assert answer == expected
        answered += 1
        stopped += answer[-1] in artifact.spec.eos_token_ids
        assert og.Tokenizer(model).decode(answer[:-1]) == tokenizer.decode(answer[:-1])
    assert stopped >= 2
    assert answered == len(prompts) or scheme != "int4"
