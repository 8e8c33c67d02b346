"""The ONNX Runtime lowering: right for every precision, what onnxruntime-genai loads, and nothing stored twice."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from calibration.layers import quantize
from exporter.bundle import open_bundle, read_artifact
from exporter.checkpoint import open_checkpoint
from exporter.cli import app
from exporter.codes import check_codes, weight_digests
from exporter.errors import LoweringError
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference, round_activations
from exporter.model.trace import trace
from exporter.parity import all_at_once, drive, drive_for
from exporter.quantized import QuantizedTensor
from exporter.spec import Activations, Artifact, Logits, Plan, Verdict
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from targets.onnxruntime import TARGET
from tests.conftest import Toy, apply_matmulnbits

pytestmark = pytest.mark.toolchain

IDS = torch.randint(96, (64,), generator=torch.Generator().manual_seed(0)).tolist()
STEPS = drive_for(IDS, context=64)


def lower(toy: Toy, plan: Plan, *, graph: Graph | None = None) -> tuple[Artifact, Graph, WeightStore]:
    checkpoint = open_checkpoint(toy.folder)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    graph = graph or trace(checkpoint.spec)
    plan.out.mkdir(exist_ok=True)
    return TARGET.lower(graph, store, plan, plan.out), graph, store


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("precision", "head", "allowed"),
    [("fp32", None, 1e-4), ("fp16", None, 1e-3), ("int8", None, 1e-4), ("int4", None, 1e-4), ("int4", "int4", 1e-4)],
)
def test_structure_and_codes_for_every_precision(
    make_toy: Callable[..., Toy],
    make_plan: Callable[..., Plan],
    tied: bool,
    precision: str,
    head: str | None,
    allowed: float,
    tmp_path: Path,
) -> None:
    toy = make_toy(tie_word_embeddings=tied)
    plan = make_plan(toy.folder, precision=precision, head=head)
    artifact, graph, store = lower(toy, plan)
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


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_logits_for_all_positions_end_in_those_for_the_last(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], precision: str, tmp_path: Path
) -> None:
    toy = make_toy()
    last, *_ = lower(toy, make_plan(toy.folder, precision=precision, out=tmp_path / "last"))
    every, *_ = lower(toy, make_plan(toy.folder, precision=precision, logits=Logits.ALL, out=tmp_path / "all"))
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
    artifact, _, store = lower(toy, plan, graph=windowed)
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
        lower(toy, make_plan(toy.folder), graph=chunked)


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
        artifact, *_ = lower(toy, plan)
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
    artifact, graph, _ = lower(toy, plan)
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
    artifact, *_ = lower(toy, make_plan(toy.folder))
    artifact.path.write_bytes(b"\xff" * 100)
    with pytest.raises(LoweringError, match=r"cannot load model.onnx"):
        TARGET.open(artifact, threads=1)
    with pytest.raises(LoweringError, match=r"is not an ONNX model"):
        list(TARGET.read_weights(artifact))


CLEAR_CHATS = ("At Antium lives he?", "Tush, tush!", "Well, let us go together.")
CLEAR_STARTS = ("Mr. President", "the Congress of the")
"""Prompts that the sample answers without a near tie, so that another processor's last bits cannot turn a choice."""


def test_onnxruntime_genai_answers_with_the_tokens_of_the_reference_and_stops(sample: Path, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    words = ["-t", "onnxruntime", "-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    assert CliRunner().invoke(app, words).exit_code == 0
    bundle = tmp_path / "out" / "onnxruntime"
    artifact = read_artifact(open_bundle(bundle), path=TARGET.find(bundle))
    store, _ = quantize(open_checkpoint(sample), artifact.scheme, root=tmp_path / "store")
    reference = Reference(trace(artifact.spec), store, artifact.arithmetic)
    tokenizer = Tokenizer(bundle)
    model = og.Model(str(bundle))
    prompts = [tokenizer.chat(message) for message in CLEAR_CHATS] + [tokenizer.encode(text) for text in CLEAR_STARTS]
    stopped = 0
    for ids in prompts:
        expected = reference.greedy(ids, count=12, stops=artifact.spec.eos_token_ids)
        assert min(margin for _, margin in expected) > 0.25
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(ids) + 12, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(ids)
        answer = []
        while not generator.is_done():
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        assert answer == [token for token, _ in expected]
        stopped += answer[-1] in artifact.spec.eos_token_ids
        assert og.Tokenizer(model).decode(answer[:-1]) == tokenizer.decode(answer[:-1])
    assert stopped == len(CLEAR_CHATS)
