"""Core ML's ``ane`` backend: two functions of fixed lengths over one state, in one package or in several."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from calibration.layers import ROUNDED, quantize
from exporter.bisect import find_partings
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.cli import app
from exporter.codes import weight_digests
from exporter.errors import HostError, InputError
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import Drive
from exporter.prove import ask_reference, prove_codes, prove_parity
from exporter.quantized import QuantizedTensor
from exporter.spec import (
    EMBEDDING,
    PER_ROW,
    Artifact,
    Logits,
    Plan,
    Precision,
    Prefer,
    Report,
    Rule,
    Sampling,
    Verdict,
    WeightScheme,
)
from exporter.store import WeightStore
from targets import load
from targets.coreml import ane_parts
from targets.coreml.ane import AneTarget, packages_of
from tests.conftest import write_toy

TARGET = AneTarget()
CONTEXT = 64
PREFILL = 16
MODEL_FILE = Path("Data", "com.apple.CoreML", "model.mlmodel")
WEIGHT_FILE = Path("Data", "com.apple.CoreML", "weights", "weight.bin")


def scheme_of(body: str, *, ends: str | None = None, rules: dict[str, str] | None = None) -> WeightScheme:
    return WeightScheme(
        body=Precision(body),
        embedding=Precision(ends or body),
        head=Precision(ends or body),
        group_size=PER_ROW,
        rules=tuple(Rule(pattern=name, precision=Precision(rule)) for name, rule in (rules or {}).items()),
    )


SCHEMES = {
    "int8": scheme_of("int8"),
    "int4": scheme_of("int4", ends="int8"),
    "int4 throughout": scheme_of("int4"),
    "fp16": scheme_of("fp16"),
    "lut4": scheme_of("lut4", ends="int8"),
    "lut4 throughout": scheme_of("lut4"),
    "int8, int4 in places": scheme_of("int8", rules={"layers.0.self_attn.q_proj": "int4"}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """One artifact with all that it was made from."""

    artifact: Artifact
    graph: Graph
    store: WeightStore
    plan: Plan

    def structure(self) -> Any:
        return TARGET.open_structure(
            self.artifact, graph=self.graph, store=self.store, plan=self.plan, scratch=self.plan.out
        )

    def parity(self) -> Report:
        steps = Drive(ids=tuple(tokens(36)), prefills=(20, 9))
        answers = ask_reference(self.graph, self.store, self.artifact, steps)
        return prove_parity(TARGET, self.artifact, answers, graph=self.graph, store=self.store, plan=self.plan)

    def codes(self) -> Report:
        return prove_codes(TARGET, self.artifact, expected=weight_digests(self.store))


def plan_for(
    checkpoint: Checkpoint, folder: Path, scheme: WeightScheme, *, context: int = CONTEXT, logits: Logits = Logits.LAST
) -> Plan:
    return Plan(
        checkpoint=checkpoint.folder,
        targets=("coreml-ane",),
        scheme=scheme,
        context=context,
        logits=logits,
        recipe=ROUNDED,
        sampling=Sampling(),
        out=folder,
        store=folder / "store",
        evaluation_text=folder / "none.txt",
        threads=1,
    )


def export(
    checkpoint: Checkpoint, folder: Path, scheme: WeightScheme, *, logits: Logits = Logits.LAST, store: Any = None
) -> Exported:
    plan = plan_for(checkpoint, folder, scheme, logits=logits)
    store = store or quantize(checkpoint, scheme, root=plan.store)[0]
    graph = trace(checkpoint.spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("targets.coreml.ane.PREFILL_TOKENS", PREFILL)
        artifact = TARGET.lower(graph, store, plan, folder / "out")
    return Exported(artifact=artifact, graph=graph, store=store, plan=plan)


def tokens(count: int) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(count)).tolist()


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("toys")
    changes: dict[str, dict[str, Any]] = {
        "tied, grouped queries": {},
        "untied, one key head per query head": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    }
    toys = {}
    for name, config in changes.items():
        toy = write_toy(folder / name, initializer_range=0.3, **config)
        with torch.no_grad():
            for parameter, values in toy.model.named_parameters():
                if "norm" in parameter:
                    values.uniform_(0.5, 1.5)
        toy.model.save_pretrained(toy.folder)
        toys[name] = open_checkpoint(toy.folder)
    return toys


@pytest.fixture(scope="module")
def gqa(toys: dict[str, Checkpoint]) -> Checkpoint:
    return toys["tied, grouped queries"]


Artifacts = Callable[[str, str], Exported]


@pytest.fixture(scope="module")
def artifacts(toys: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The artifact of a toy under a scheme, made once; tests that change one take a copy."""

    @functools.cache
    def make(toy: str, scheme: str) -> Exported:
        return export(toys[toy], tmp_path_factory.mktemp("artifact"), SCHEMES[scheme])

    return make


@pytest.fixture(scope="module")
def int8(artifacts: Artifacts) -> Exported:
    return artifacts("tied, grouped queries", "int8")


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("toy", "scheme"),
    [
        *(("tied, grouped queries", scheme) for scheme in SCHEMES),
        ("untied, one key head per query head", "int4"),
        ("untied, one key head per query head", "fp16"),
    ],
)
def test_package_holds_the_codes_and_computes_the_graph(artifacts: Artifacts, toy: str, scheme: str) -> None:
    exported = artifacts(toy, scheme)
    assert exported.codes().verdict is Verdict.PASSED, exported.codes().reason
    parity = exported.parity()
    assert parity.verdict is Verdict.PASSED, parity.reason
    assert parity.figures["structure_max_abs_logit_diff"] <= 1e-4  # of fp16 too: its weights are rounded on both sides


@pytest.mark.toolchain
@pytest.mark.parametrize("precision", ["int8", "int4", "lut4"])
def test_trained_sample_goes_through_the_command(precision: str, tmp_path: Path) -> None:
    """int4 per row, rounded to nearest, is beyond what quality allows: proofs of the artifact pass all the same."""
    words = ["-t", "coreml", "--backend", "ane", "--precision", precision, "--group-size", "row", "-c", "160"]
    words += ["--calibration", "none", "-o", str(tmp_path / "out"), "--store", str(tmp_path / "store"), "--json"]
    result = CliRunner().invoke(app, words)
    (told,) = json.loads(result.stdout)
    manifest = told["manifest"]
    assert (manifest["target"], manifest["backend"]) == ("coreml", "ane")
    verdicts = {kind: manifest[kind]["verdict"] for kind in ("codes", "parity", "latency")}
    assert verdicts == {"codes": "passed", "parity": "passed", "latency": "not measured"}
    assert manifest["parity"]["structure_max_abs_logit_diff"] <= 1e-4
    assert manifest["parity"]["mean_kl_nats"] <= 2e-5  # five times below the gate


def test_the_backend_is_known_by_its_label() -> None:
    target = load("coreml-ane")
    assert (target.name, target.backend) == ("coreml", "ane")
    assert isinstance(target, AneTarget)


def change_program(package: Path, change: Callable[[Any], None], *, functions: tuple[str, ...]) -> None:
    from targets.coreml.toolchain import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString((package / MODEL_FILE).read_bytes())
    for name in functions:
        function = model.mlProgram.functions[name]
        change(function.block_specializations[function.opset].operations)
    (package / MODEL_FILE).write_bytes(model.SerializeToString())


def tampered(
    exported: Exported,
    folder: Path,
    change: Callable[[Any], None],
    *,
    functions: tuple[str, ...] = ("prefill", "decode"),
) -> Exported:
    """With a copy of the artifact whose program was changed."""
    path = folder / "model.mlpackage"
    for name, content in contents(exported.artifact.path).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    change_program(path, change, functions=functions)
    return dataclasses.replace(exported, artifact=dataclasses.replace(exported.artifact, path=path))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def nothing(_: Any) -> None:
    pass


def drop_a_state_write(operations: Any) -> None:
    del operations[next(index for index, operation in enumerate(operations) if operation.type == "write_state")]


def swap_rope_halves(operations: Any) -> None:
    """Of the queries of layer 0."""
    rotated = next(o for o in operations if o.type == "concat" and _values(o)[0].startswith("sub"))
    first, second = _values(rotated)
    rotated.inputs["values"].arguments[0].name, rotated.inputs["values"].arguments[1].name = second, first


def _values(operation: Any) -> list[str]:
    return [binding.name for binding in operation.inputs["values"].arguments if binding.WhichOneof("binding") == "name"]


def rotate_queries_by_the_next_position(operations: Any) -> None:
    cut = next(o for o in operations if o.type == "slice_by_size" and "cos_of_queries" in str(o.inputs["x"]))
    begin = next(o for o in operations if o.outputs and o.outputs[0].name == cut.inputs["begin"].arguments[0].name)
    (position,) = (binding for binding in begin.inputs["values"].arguments if binding.name == "position")
    position.name = next(o.outputs[0].name for o in operations if o.type == "add")  # that of the end: position + 1


def forget_the_mask(operations: Any) -> None:
    softmax = next(o for o in operations if o.type == "softmax")
    masked = next(o for o in operations if o.outputs and o.outputs[0].name == softmax.inputs["x"].arguments[0].name)
    softmax.inputs["x"].arguments[0].name = masked.inputs["x"].arguments[0].name


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("fault", "functions"),
    [
        (drop_a_state_write, ("prefill",)),
        (drop_a_state_write, ("decode",)),
        (swap_rope_halves, ("prefill", "decode")),
        (rotate_queries_by_the_next_position, ("decode",)),
        (forget_the_mask, ("prefill",)),
    ],
)
def test_a_fault_in_either_function_fails_parity(
    int8: Exported, fault: Callable[[Any], None], functions: tuple[str, ...], tmp_path: Path
) -> None:
    assert tampered(int8, tmp_path / "sound", nothing).parity().verdict is Verdict.PASSED
    parity = tampered(int8, tmp_path / "broken", fault, functions=functions).parity()
    assert parity.verdict is Verdict.FAILED
    assert "structure: logits differ" in parity.reason
    assert "mean KL is" in parity.reason


@pytest.mark.toolchain
@pytest.mark.parametrize("function", ["prefill", "decode"])
def test_codes_that_one_function_alone_reads_elsewhere_are_seen(int8: Exported, function: str, tmp_path: Path) -> None:
    def read_the_keys_for_the_values(operations: Any) -> None:
        compressed = {o.outputs[0].name: o for o in operations if o.type == "constexpr_blockwise_shift_scale"}
        keys, values = (compressed[f"model_layers_0_self_attn_{name}_proj_weight"] for name in "kv")
        values.inputs["data"].CopyFrom(keys.inputs["data"])

    broken = tampered(int8, tmp_path, read_the_keys_for_the_values, functions=(function,))
    assert broken.codes().verdict is Verdict.FAILED
    assert broken.codes().figures["wrong"] == ["model.layers.0.self_attn.v_proj.weight"]


@pytest.mark.toolchain
@pytest.mark.parametrize("part", ["indices", "lut"])
def test_an_index_and_a_value_of_a_table_are_seen(artifacts: Artifacts, part: str, tmp_path: Path) -> None:
    """Layer 1 is given what layer 0 has."""

    def take_those_of_another_layer(operations: Any) -> None:
        palettes = {o.outputs[0].name: o for o in operations if o.type == "constexpr_lut_to_dense"}
        first, second = (palettes[f"model_layers_{layer}_self_attn_q_proj_weight"] for layer in (0, 1))
        second.inputs[part].CopyFrom(first.inputs[part])

    broken = tampered(artifacts("tied, grouped queries", "lut4"), tmp_path, take_those_of_another_layer)
    assert broken.codes().verdict is Verdict.FAILED
    assert broken.codes().figures["wrong"] == ["model.layers.1.self_attn.q_proj.weight"]
    assert broken.parity().verdict is Verdict.FAILED


@pytest.mark.toolchain
def test_both_functions_read_the_same_bytes_and_a_tied_head_lies_there_once(artifacts: Artifacts) -> None:
    exported = artifacts("tied, grouped queries", "fp16")
    stored = sum(ane_parts.stored_bytes(exported.graph.spec, exported.plan.scheme, name) for name in exported.store)
    embedding = exported.store[EMBEDDING]
    assert isinstance(embedding, Tensor)
    size = (exported.artifact.path / WEIGHT_FILE).stat().st_size
    tables = 4 * CONTEXT * (exported.graph.spec.head_dim // 2) * 4
    assert stored + tables <= size < stored + tables + embedding.nbytes // 2


@pytest.mark.toolchain
def test_features_of_both_functions(int8: Exported) -> None:
    spec = int8.graph.spec
    found = {function.name: features(function) for function in description(int8.artifact.path).functions}
    cache = [spec.num_hidden_layers, spec.num_key_value_heads, CONTEXT, spec.head_dim]
    states = {"keyCache": cache, "valueCache": cache}

    def expected(length: int, **more: list[int]) -> dict[str, list[int]]:
        inputs = {"inputIds": [1, length], "position": [1], "causalMask": [1, 1, length, CONTEXT], **more}
        return {**inputs, **states, "logits": [1, 1, spec.vocab_size]}

    assert found == {"prefill": expected(PREFILL, lastToken=[1]), "decode": expected(1)}
    assert description(int8.artifact.path).defaultFunctionName == "prefill"


def description(package: Path) -> Any:
    from targets.coreml.toolchain import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString((package / MODEL_FILE).read_bytes())
    assert model.specificationVersion == 9  # iOS 18
    return model.description


def features(function: Any) -> dict[str, list[int]]:
    arrays = {feature.name: feature.type.multiArrayType for feature in (*function.input, *function.output)}
    arrays |= {feature.name: feature.type.stateType.arrayType for feature in function.state}
    return {name: list(array.shape) for name, array in arrays.items()}


@pytest.mark.toolchain
@pytest.mark.parametrize("lengths", [[40], [1] * 12, [16, 16], [17, 2, 1, 16], [5, 30], [55, 9], [64]])
def test_tokens_may_come_in_calls_of_any_length(int8: Exported, lengths: list[int]) -> None:
    """Full prefills, padded ones, single tokens, and the end of the context, where there is no room for padding."""
    ids = tokens(sum(lengths))
    wanted = Reference(int8.graph, int8.store, FULL_PRECISION).feed(ids)
    ends = list(itertools.accumulate(lengths))
    with int8.structure() as runner:
        for start, end in itertools.pairwise([0, *ends]):
            logits = runner.feed(ids[start:end])
            assert logits.shape == (1, int8.graph.spec.vocab_size)
            assert (logits - wanted[end - 1 : end]).abs().max() <= 1e-4
            assert runner.position == end
        runner.rewind(3)
        if len(ids) >= 9:
            assert (runner.feed(ids[3:9]) - wanted[8:9]).abs().max() <= 1e-4


@pytest.mark.toolchain
def test_logits_of_all_positions_are_those_of_the_real_tokens(gqa: Checkpoint, tmp_path: Path) -> None:
    every = export(gqa, tmp_path, SCHEMES["int8"], logits=Logits.ALL)
    ids = tokens(43)
    wanted = Reference(every.graph, every.store, FULL_PRECISION).feed(ids)
    with every.structure() as runner:
        found = torch.cat([runner.feed(ids[:37]), runner.feed(ids[37:38]), runner.feed(ids[38:])])
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4
    assert "lastToken" not in str(description(every.artifact.path))


@pytest.mark.toolchain
def test_padding_is_never_attended_to(int8: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is answered, and what follows, is bit for bit the same whatever token fills the prefill."""
    ids, answers = tokens(30), []
    for padding in (0, 7):
        monkeypatch.setattr("targets.coreml.ane_runner.PADDING", padding)
        with int8.structure() as runner:
            answers.append([runner.feed(ids[:20]), runner.feed(ids[20:]), runner.feed([5])])
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


@pytest.mark.toolchain
@pytest.mark.parametrize(("fed", "more"), [(0, CONTEXT + 1), (CONTEXT, 1), (10, 0)])
def test_feeding_beyond_the_context_or_nothing_is_refused(int8: Exported, fed: int, more: int) -> None:
    with TARGET.open(int8.artifact, threads=1) as runner:
        if fed:
            runner.feed(tokens(fed))
        with pytest.raises(InputError, match=f"{more} tokens at position {fed} do not fit a context of {CONTEXT}"):
            runner.feed(tokens(more))
        assert runner.position == fed


class Massive(WeightStore):
    """Two rows of a down projection write activations in the thousands, as a Llama's do (Sun et al. 2024,
    arXiv:2402.17762)."""

    def __getitem__(self, name: str) -> QuantizedTensor | Tensor:
        stored = super().__getitem__(name)
        if name != "model.layers.0.mlp.down_proj.weight":
            return stored
        assert isinstance(stored, QuantizedTensor)
        scales = stored.scales.clone()
        scales[[3, 40]] *= 2.0**6
        return dataclasses.replace(stored, scales=scales)


@pytest.mark.toolchain
def test_norms_survive_activations_whose_squares_float16_cannot_hold(gqa: Checkpoint, tmp_path: Path) -> None:
    plain, _ = quantize(gqa, SCHEMES["int8"], root=tmp_path / "store")
    store = Massive(checkpoint=gqa, key=plain.key, root=tmp_path / "store")
    exported = export(gqa, tmp_path, SCHEMES["int8"], store=store)
    reaches: list[float] = []
    reference = Reference(exported.graph, store, exported.artifact.arithmetic)
    values = {"ids": torch.tensor([tokens(36)]), **reference._caches}
    exported.graph.run(
        reference._table,
        values,
        lambda node, arguments, _: reaches.append(arguments[0].abs().max().item()) if node.op == "rms_norm" else None,
    )
    assert max(reaches) ** 2 > 65504  # the largest float16
    parity = exported.parity()
    assert parity.verdict is Verdict.PASSED, parity.reason


@pytest.fixture(scope="module")
def in_parts(toys: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Split so that each layer has a package of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ane_parts, "PACKAGE_BYTES", 60_000)
        return {
            name: export(toy, tmp_path_factory.mktemp("parts"), SCHEMES["int8"], logits=logits)
            for (name, toy), logits in zip(toys.items(), (Logits.LAST, Logits.ALL), strict=True)
        }


@pytest.mark.toolchain
def test_a_model_in_parts_answers_as_the_whole(in_parts: dict[str, Exported]) -> None:
    for exported in in_parts.values():
        path = exported.artifact.path
        names = ["embedding", "layers-000-000", "layers-001-001", "head"]
        assert packages_of(exported.artifact) == [path / f"{name}.mlpackage" for name in names]
        assert TARGET.find(path.parent) == path
        assert exported.codes().verdict is Verdict.PASSED, exported.codes().reason
        parity = exported.parity()
        assert parity.verdict is Verdict.PASSED, parity.reason


@pytest.mark.toolchain
def test_parts_hand_hidden_states_on_and_have_states_of_their_own(in_parts: dict[str, Exported]) -> None:
    exported = in_parts["tied, grouped queries"]
    spec = exported.graph.spec
    hidden = [1, spec.hidden_size, 1, PREFILL]
    cache = [1, spec.num_key_value_heads, CONTEXT, spec.head_dim]
    layer = {"hiddenStates": hidden, "position": [1], "causalMask": [1, 1, PREFILL, CONTEXT]}
    layer |= {"keyCache": cache, "valueCache": cache, "nextHiddenStates": hidden}
    found = [features(description(path).functions[0]) for path in packages_of(exported.artifact)]
    assert found == [
        {"inputIds": [1, PREFILL], "nextHiddenStates": hidden},
        layer,
        layer,
        {"hiddenStates": hidden, "lastToken": [1], "logits": [1, 1, spec.vocab_size]},
    ]


@pytest.mark.toolchain
def test_a_wrong_code_in_any_part_fails_the_codes_verdict(in_parts: dict[str, Exported], tmp_path: Path) -> None:
    exported = in_parts["tied, grouped queries"]
    for package in packages_of(exported.artifact):
        folder = tmp_path / package.stem
        for name, content in contents(exported.artifact.path).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        weights = folder / package.name / WEIGHT_FILE
        damaged = bytearray(weights.read_bytes())
        damaged[200] ^= 1  # the first record lies at 64 and its data at 128
        weights.write_bytes(bytes(damaged))
        broken = dataclasses.replace(exported, artifact=dataclasses.replace(exported.artifact, path=folder))
        assert broken.codes().verdict is Verdict.FAILED, package
    assert exported.codes().verdict is Verdict.PASSED


def test_packages_keep_the_limit_and_cut_no_layer(gqa: Checkpoint) -> None:
    spec, scheme = dataclasses.replace(gqa.spec, num_hidden_layers=7), SCHEMES["int8"]
    (whole,) = ane_parts.parts_of(spec, scheme)
    assert whole == ane_parts.Part(name="model", layers=range(7), embedding=True, head=True)
    layer = ane_parts.part_bytes(spec, scheme, dataclasses.replace(whole, layers=range(1), embedding=False, head=False))
    parts = ane_parts.parts_of(spec, scheme, limit_bytes=3 * layer)
    assert [part.layers for part in parts] == [range(0), range(3), range(3, 6), range(6, 7), range(0)]
    assert [(part.embedding, part.head) for part in parts] == [(True, False), *[(False, False)] * 3, (False, True)]
    assert all(ane_parts.part_bytes(spec, scheme, part) <= 3 * layer for part in parts)
    alone = ane_parts.parts_of(spec, scheme, limit_bytes=1)
    assert [part.layers for part in alone] == [range(0), *(range(i, i + 1) for i in range(7)), range(0)]


@pytest.mark.toolchain
@pytest.mark.parametrize(("scheme", "limit"), [("int8", 1_000_000), ("lut4 throughout", 1_000_000), ("fp16", 60_000)])
def test_a_head_of_many_rows_is_multiplied_in_blocks(
    toys: dict[str, Checkpoint], scheme: str, limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of 30 rows at most, which do not divide 96: in one package and in parts, tied and not."""
    monkeypatch.setattr("targets.coreml.ane_lower.LARGEST_SIZE", 30)
    monkeypatch.setattr(ane_parts, "PACKAGE_BYTES", limit)
    for name, toy in toys.items():
        exported = export(toy, tmp_path / name, SCHEMES[scheme])
        assert exported.codes().verdict is Verdict.PASSED, exported.codes().reason
        parity = exported.parity()
        assert parity.verdict is Verdict.PASSED, parity.reason
        ids = tokens(20)
        seen = TARGET.observe(exported.artifact, graph=exported.graph, calls=[ids], threads=1)
        assert find_partings(seen, exported.graph, exported.store, calls={"prefill": ids}) == []
        last = packages_of(exported.artifact)[-1]
        program = (last / MODEL_FILE).read_bytes()
        head = b"model_embed_tokens" if toy.spec.tie_word_embeddings else b"lm_head"
        assert all(head + b"_weight_rows_%d" % start in program for start in (0, 24, 48, 72))


@pytest.mark.toolchain
def test_blocks_out_of_order_are_seen(gqa: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("targets.coreml.ane_lower.LARGEST_SIZE", 30)

    def swap(operations: Any) -> None:
        blocks = {o.outputs[0].name: o for o in operations if o.type == "constexpr_blockwise_shift_scale"}
        first, second = (blocks[f"model_embed_tokens_weight_rows_{start}"] for start in (24, 48))
        first.outputs[0].name, second.outputs[0].name = second.outputs[0].name, first.outputs[0].name

    exported = export(gqa, tmp_path / "sound", SCHEMES["int8"])
    broken = tampered(exported, tmp_path, swap, functions=("decode",))
    assert broken.codes().verdict is Verdict.FAILED


@pytest.mark.toolchain
def test_the_whole_takes_the_place_of_parts_and_they_of_it(
    int8: Exported, in_parts: dict[str, Exported], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = in_parts["tied, grouped queries"]
    for limit, kind in ((60_000, "model"), (10**9, "model.mlpackage"), (60_000, "model")):
        monkeypatch.setattr(ane_parts, "PACKAGE_BYTES", limit)
        artifact = TARGET.lower(parts.graph, parts.store, parts.plan, tmp_path)
        assert artifact.path == TARGET.find(tmp_path) == tmp_path / kind
        assert [path.name for path in tmp_path.iterdir()] == [kind]


@pytest.mark.toolchain
def test_the_same_input_gives_the_same_bytes(int8: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("targets.coreml.ane.PREFILL_TOKENS", PREFILL)
    again = TARGET.lower(int8.graph, int8.store, int8.plan, tmp_path)
    assert contents(again.path) == contents(int8.artifact.path)


@pytest.mark.toolchain
def test_no_row_of_a_large_vocabulary_is_looked_up_by_sixteen_bits(int8: Exported, tmp_path: Path) -> None:
    from exporter.errors import LoweringError
    from targets.coreml.package import MilType

    def narrow(operations: Any) -> None:
        gather = next(o for o in operations if o.type == "gather")
        cast = type(gather)(type="identity")
        cast.inputs["x"].CopyFrom(gather.inputs["indices"])
        output = cast.outputs.add()
        output.CopyFrom(gather.outputs[0])
        output.name = "narrow"
        output.type.tensorType.dataType = MilType.UINT16
        gather.inputs["indices"].arguments[0].name = "narrow"
        kept = [type(gather).FromString(o.SerializeToString()) for o in operations]
        del operations[:]
        operations.extend([cast, *kept])

    with (
        pytest.raises(LoweringError, match="looks up rows by 16-bit numbers"),
        TARGET.open(tampered(int8, tmp_path, narrow).artifact, threads=1),
    ):
        pass


@pytest.mark.toolchain
@pytest.mark.parametrize("split", [False, True])
def test_core_ml_is_given_the_features_of_each_function_and_one_state_a_package(
    int8: Exported, in_parts: dict[str, Exported], split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for ``MLModel.predict``, which this host may not have: only the calls are checked."""
    from targets.coreml.toolchain import ct

    exported = in_parts["tied, grouped queries"] if split else int8
    states: list[tuple[str, str]] = []
    calls: list[tuple[str, str, list[str]]] = []
    vocabulary, hidden = exported.graph.spec.vocab_size, exported.graph.spec.hidden_size

    class Model:
        def __init__(self, path: str, *, compute_units: object, function_name: str) -> None:
            assert compute_units is ct.ComputeUnit["CPU_AND_NE"]
            self.package, self.function = Path(path).stem, function_name

        def make_state(self) -> object:
            states.append((self.package, self.function))
            return states[-1]

        def predict(self, inputs: dict[str, Any], *, state: object) -> dict[str, Any]:
            assert state == (self.package, "prefill")
            calls.append((self.package, self.function, sorted(inputs)))
            length = {"prefill": PREFILL, "decode": 1}[self.function]
            if self.package in ("model", "head"):
                return {"logits": np.zeros((1, 1, vocabulary), dtype=np.float16)}
            return {"nextHiddenStates": np.zeros((1, hidden, 1, length), dtype=np.float16)}

    stand_in = SimpleNamespace(models=SimpleNamespace(MLModel=Model), ComputeUnit=ct.ComputeUnit)
    monkeypatch.setattr("targets.coreml.ane.executes_here", lambda: True)
    monkeypatch.setattr("targets.coreml.executes_here", lambda: True)
    monkeypatch.setattr("targets.coreml.ane_runner.ct", stand_in)
    assert "Core ML on CPU_AND_NE, MLModel" in TARGET.runtime()
    with TARGET.open(exported.artifact, threads=1) as runner:
        assert runner.feed([5, 6, 7]).shape == (1, vocabulary)
        runner.feed([8])
    whole = ["causalMask", "inputIds", "position"]
    layers = ["causalMask", "hiddenStates", "position"]
    if split:
        names = ["embedding", "layers-000-000", "layers-001-001", "head"]
        assert states == [(name, "prefill") for name in names]
        reads = [["inputIds"], layers, layers, ["hiddenStates"]]
        expected = [(name, "decode", read) for name, read in zip(names, reads, strict=True)]
        assert calls[4:] == expected
        assert calls[3] == ("head", "prefill", ["hiddenStates", "lastToken"])
    else:
        assert states == [("model", "prefill")]
        assert calls == [("model", "prefill", sorted([*whole, "lastToken"])), ("model", "decode", whole)]


@pytest.mark.toolchain
def test_a_package_that_core_ml_does_not_load_is_a_matter_of_the_host(
    int8: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    from targets.coreml.toolchain import ct

    def load(*_: object, **__: object) -> None:
        raise RuntimeError("ANECCompile() FAILED")

    stand_in = SimpleNamespace(models=SimpleNamespace(MLModel=load), ComputeUnit=ct.ComputeUnit)
    monkeypatch.setattr("targets.coreml.ane_runner.ct", stand_in)
    monkeypatch.setattr("targets.coreml.ane.executes_here", lambda: True)
    with pytest.raises(HostError, match=r"Core ML does not load .*ANECCompile"):
        TARGET.open(int8.artifact, threads=1)


def test_on_other_compute_units_it_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("targets.coreml.executes_here", lambda: True)
    moved = TARGET.on("CPU_ONLY")
    assert (type(moved), moved.backend) == (AneTarget, "ane")
    assert "Core ML on CPU_ONLY" in moved.runtime()
    assert "Core ML on CPU_AND_NE" in TARGET.runtime()


@pytest.mark.toolchain
def test_every_value_inside_is_what_the_reference_gives(int8: Exported, in_parts: dict[str, Exported]) -> None:
    ids = tokens(45)
    calls = {"prefill": ids[:20], "more": ids[20:44], "decode": ids[44:]}
    for exported in (int8, *in_parts.values()):
        seen = TARGET.observe(exported.artifact, graph=exported.graph, calls=list(calls.values()), threads=1)
        assert len(seen.calls) == 3
        assert find_partings(seen, exported.graph, exported.store, calls=calls) == []


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("fault", "op"),
    [(drop_a_state_write, "attention"), (swap_rope_halves, "attention"), (forget_the_mask, "attention")],
)
def test_bisecting_names_the_op_that_has_the_fault(
    int8: Exported, fault: Callable[[Any], None], op: str, tmp_path: Path
) -> None:
    broken = tampered(int8, tmp_path, fault, functions=("prefill",))
    ids = tokens(21)
    calls = {"prefill": ids[:16], "decode": ids[16:17]}
    seen = TARGET.observe(broken.artifact, graph=int8.graph, calls=list(calls.values()), threads=1)
    partings = find_partings(seen, int8.graph, int8.store, calls=calls)
    assert [(parting.node.op, parting.node.layer, parting.call) for parting in partings] == [(op, 0, "prefill")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"group_size": 32, "body": Precision.INT4}, "int4 has a scale for each 32 columns here, .*--group-size row"),
        (
            {"group_size": 32, "rules": (Rule(pattern="layers.1.mlp.up_proj", precision=Precision.INT4),)},
            "--group-size row",
        ),
        ({"group_size": 32, "head": Precision.INT4, "embedding": Precision.INT4}, "--group-size row"),
        ({"body": Precision.FP32}, "is to be fp32, .*pass --precision fp16, int8 or int4"),
        ({"group_size": 64, "body": Precision.INT4}, "a scale for each 64 columns"),  # of 96; others have 64
    ],
)
def test_weights_that_the_neural_engine_does_not_decode_are_refused(
    gqa: Checkpoint, change: dict[str, Any], said: str
) -> None:
    scheme = dataclasses.replace(SCHEMES["int8"], **change)
    answer = TARGET.refuse(gqa.spec, plan_for(gqa, gqa.folder, scheme))
    assert answer is not None
    assert re.search(said, answer), answer


@pytest.mark.parametrize(
    ("context", "head_dim", "said"),
    [
        (50, 32, "the context is 50: pass --context 32"),
        (100, 64, "the context is 100: pass --context 96"),
        (20, 32, "the context is 20: pass --context 32"),
        (64, 80, "head_dim is 80: take --backend gpu"),
        (50, 16, "head_dim is 16 and the context is 50: take --backend gpu"),
    ],
)
def test_states_whose_sizes_the_neural_engine_does_not_take_are_refused(
    gqa: Checkpoint, context: int, head_dim: int, said: str
) -> None:
    spec = dataclasses.replace(gqa.spec, head_dim=head_dim)
    answer = TARGET.refuse(spec, plan_for(gqa, gqa.folder, SCHEMES["int8"], context=context))
    assert answer is not None
    assert said in answer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_it_can_do_is_not_refused(gqa: Checkpoint, scheme: str) -> None:
    plan = plan_for(gqa, gqa.folder, SCHEMES[scheme])
    assert TARGET.refuse(gqa.spec, plan) is None
    assert "--prefer prefill" in (TARGET.refuse(gqa.spec, dataclasses.replace(plan, prefer=Prefer.PREFILL)) or "")
