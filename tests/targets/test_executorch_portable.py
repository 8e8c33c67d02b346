"""ExecuTorch without a backend: against the reference, against the store, and what its program is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.bisect import compare_ops
from exporter.checkpoint import BUNDLED_MODEL
from exporter.codes import weight_digests
from exporter.errors import LoweringError
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.parity import drive_for
from exporter.prove import ask_reference, prove_codes, prove_latency, prove_parity
from exporter.quantized import QuantizedTensor
from exporter.spec import EMBEDDING, PER_ROW, Logits, Verdict, WeightScheme
from exporter.tokenizer import Tokenizer
from targets import load
from tests.targets.test_executorch import (
    CONTEXT,
    CUTS,
    UNLIKE_TWINS,
    Lowered,
    feed_in_cuts,
    same,
    scheme_of,
    tokens,
    write_checkpoint,
)

pytestmark = pytest.mark.toolchain
TARGET = load("executorch-portable")

SCHEMES = {
    "fp32": scheme_of("fp32"),
    "fp16": scheme_of("fp16"),
    "int4": scheme_of("int4"),
    "int4 per row": scheme_of("int4", group_size=PER_ROW),
    "int8, int4 in places": scheme_of("int8", rules=dict.fromkeys(UNLIKE_TWINS, "int4")),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lowered]:
    """The toy model under one of ``SCHEMES``, with the logits of every position; lowered once."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("toy") / "model")
    made: dict[str, Lowered] = {}

    def lowered(name: str) -> Lowered:
        if name not in made:
            out = tmp_path_factory.mktemp("lowered")
            made[name] = Lowered(checkpoint, SCHEMES[name], Logits.ALL, context=CONTEXT, out=out, target=TARGET)
        return made[name]

    return lowered


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "bound"), [(name, 1e-3 if name == "fp16" else 1e-4) for name in SCHEMES])
def test_logits_equal_the_references(toy: Callable[[str], Lowered], scheme: str, bound: float) -> None:
    lowered, ids = toy(scheme), tokens(sum(CUTS))
    expected = lowered.reference().feed(ids)
    with TARGET.open(lowered.artifact, threads=1) as runner:
        assert (feed_in_cuts(runner, ids, CUTS) - expected).abs().max() <= bound
        runner.rewind(7)
        assert (runner.feed(ids[7:9]) - expected[7:9]).abs().max() <= bound  # with what is left of 35 in the cache


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_read_back_equal_the_store_bit_for_bit(toy: Callable[[str], Lowered], scheme: str) -> None:
    lowered = toy(scheme)
    read = list(TARGET.read_weights(lowered.artifact))
    assert all(same(lowered.store[name], weight) for name, weight in read)
    assert sorted(name for name, _ in read) == sorted([*lowered.graph.spec.weights(), EMBEDDING])  # tied: two uses


def test_one_changed_bit_of_a_scale_in_the_file_shows(toy: Callable[[str], Lowered], tmp_path: Path) -> None:
    lowered = toy("int4")
    name = "model.layers.1.mlp.down_proj.weight"
    stored = lowered.store[name]
    assert isinstance(stored, QuantizedTensor)
    scales = stored.scales.numpy().tobytes()
    contents = bytearray(lowered.artifact.path.read_bytes())
    assert contents.count(scales) == 1
    contents[contents.find(scales) + 2] ^= 1
    damaged = replace(lowered.artifact, path=tmp_path / "damaged.pte")
    damaged.path.write_bytes(contents)
    differing = [read for read, weight in TARGET.read_weights(damaged) if not same(lowered.store[read], weight)]
    assert differing == [name]


class Exchanged:
    """A store in which two weights of one shape have changed places."""

    def __init__(self, store: Any, *names: str) -> None:
        self._store, (first, second) = store, names
        self._other = {first: second, second: first}

    def __getitem__(self, name: str) -> Any:
        return self._store[self._other.get(name, name)]


def test_weights_in_each_others_place_are_found_out(toy: Callable[[str], Lowered], tmp_path: Path) -> None:
    """They are told apart by the order in which the program reads them, and have no names of their own."""
    lowered = toy("int4")
    twins = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
    store: Any = Exchanged(lowered.store, *twins)
    artifact = TARGET.lower(lowered.graph, store, lowered.plan, tmp_path)
    report = prove_codes(TARGET, artifact, expected=weight_digests(lowered.store))
    assert report.verdict is Verdict.FAILED
    assert report.figures["wrong"] == sorted(twins)


def test_a_program_of_another_model_is_refused(toy: Callable[[str], Lowered]) -> None:
    artifact = toy("int4").artifact
    deeper = replace(artifact, spec=replace(artifact.spec, num_hidden_layers=3))
    with pytest.raises(LoweringError, match="has 21 ops with weights, the model 30"):
        list(TARGET.read_weights(deeper))


def test_a_tied_matrix_lies_in_the_file_once(toy: Callable[[str], Lowered]) -> None:
    lowered = toy("int8, int4 in places")
    stored = lowered.store[EMBEDDING]
    assert isinstance(stored, QuantizedTensor)
    assert lowered.artifact.path.read_bytes().count(stored.codes.numpy().tobytes()) == 1


def test_the_cache_is_changed_in_place_and_nothing_is_delegated(toy: Callable[[str], Lowered]) -> None:
    kernels = kernels_of(toy("int4"))
    assert kernels.count("aten::index_put_") == 4
    assert kernels.count("quantized_decomposed::mixed_linear") == 15
    assert not {"aten::index_put", "aten::copy_", "delegate"} & set(kernels)


def kernels_of(lowered: Lowered) -> list[str]:
    from executorch.exir.schema import DelegateCall, KernelCall

    from targets.executorch.read import ProgramFile

    with ProgramFile(lowered.artifact.path) as file:
        calls = [i.instr_args for chain in file.forward.chains for i in chain.instructions]
        assert all(isinstance(call, KernelCall | DelegateCall) for call in calls)
        return [
            file.forward.operators[call.op_index].name if isinstance(call, KernelCall) else "delegate" for call in calls
        ]


def test_more_tokens_than_a_call_takes_are_fed_in_pieces(
    toy: Callable[[str], Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from targets.executorch import portable

    monkeypatch.setattr(portable, "LONGEST", 16)
    lowered, ids = toy("fp32"), tokens(CONTEXT)
    expected = lowered.reference().feed(ids)
    every = TARGET.lower(lowered.graph, lowered.store, lowered.plan, tmp_path)
    with TARGET.open(every, threads=1) as runner:
        assert (runner.feed(ids) - expected).abs().max() < 1e-4
        assert len(runner.steps_s) == 3
        runner.rewind(10)
        assert (runner.feed(ids[10:40]) - expected[10:40]).abs().max() < 1e-4
        assert runner.position == 40


@pytest.mark.parametrize("arguments", [{"window": 5}, {"chunk": 8}])
def test_attention_may_see_only_some_keys(
    toy: Callable[[str], Lowered], tmp_path: Path, arguments: dict[str, int]
) -> None:
    lowered, ids = toy("fp32"), tokens(sum(CUTS))
    nodes = tuple(
        replace(node, arguments=(*node.arguments[:9], arguments.get("window", 0), arguments.get("chunk", 0)))
        if node.op == "attention"
        else node
        for node in lowered.graph.nodes
    )
    graph = replace(lowered.graph, nodes=nodes)
    expected = Reference(graph, lowered.store, FULL_PRECISION).feed(ids)
    assert not torch.equal(expected, lowered.reference().feed(ids))
    artifact = TARGET.lower(graph, lowered.store, lowered.plan, tmp_path)
    with TARGET.open(artifact, threads=1) as runner:
        assert (feed_in_cuts(runner, ids, CUTS) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["fp32", "int8, int4 in places"])
def test_a_program_that_is_opened_shows_what_the_reference_computes(toy: Callable[[str], Lowered], name: str) -> None:
    lowered, calls = toy(name), [tokens(17), [5], [7, 9, 11]]
    observation = TARGET.observe(lowered.artifact, graph=lowered.graph, calls=calls, threads=1)
    named = {f"call {number}": ids for number, ids in enumerate(calls)}
    assert compare_ops(observation, lowered.graph, lowered.store, calls=named).partings == []
    with TARGET.open(lowered.artifact, threads=1) as runner:
        for ids, seen in zip(calls, observation.calls, strict=True):
            assert torch.equal(seen[lowered.graph.outputs["logits"]][0], runner.feed(ids))
            assert len(seen) == len(lowered.graph.nodes) + 2 * lowered.graph.spec.num_hidden_layers  # and the caches


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme",
    [scheme_of("int4", embedding="int8", head="int8"), scheme_of("int8"), scheme_of("fp32")],
    ids=["int4", "int8", "fp32"],
)
def test_the_trained_sample_is_proven(tmp_path: Path, scheme: WeightScheme) -> None:
    lowered = Lowered(BUNDLED_MODEL, scheme, Logits.LAST, context=256, out=tmp_path, target=TARGET)
    text = (BUNDLED_MODEL / "evaluation.txt").read_text(encoding="utf-8")
    steps = drive_for(Tokenizer(BUNDLED_MODEL).encode(text)[:160], context=256)
    answers = ask_reference(lowered.graph, lowered.store, lowered.artifact, steps)
    codes = prove_codes(TARGET, lowered.artifact, expected=weight_digests(lowered.store))
    parity = prove_parity(
        TARGET, lowered.artifact, answers, graph=lowered.graph, store=lowered.store, plan=lowered.plan
    )
    latency = prove_latency(TARGET, lowered.artifact, ids=steps.ids, threads=1)
    assert [report.verdict for report in (codes, parity, latency)] == [Verdict.PASSED] * 3, (codes, parity)
