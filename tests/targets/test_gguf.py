"""GGUF files: what lies in them, what llama.cpp makes of them, and what cannot be one."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import targets.gguf
from calibration.layers import quantize
from exporter.bundle import read_artifact
from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
from exporter.checkpoint.gguf_file import read_header
from exporter.cli import app
from exporter.codes import weight_digests
from exporter.errors import InputError, LoweringError, UsageError
from exporter.model.graph import Constant, Graph, Node
from exporter.model.ops import attend, attention_edges
from exporter.model.reference import FULL_PRECISION, Reference, round_activations
from exporter.model.rope import inverse_frequencies, recurrent_table, rope_table, rotation_of
from exporter.model.trace import trace
from exporter.parity import Floor, drive, drive_for, gate
from exporter.prove import ask_reference, prove_codes, prove_parity
from exporter.quantized import QuantizedTensor
from exporter.spec import (
    PER_ROW,
    Activations,
    Arithmetic,
    Artifact,
    CodeKind,
    Logits,
    ModelSpec,
    Plan,
    Precision,
    Prefer,
    RopeKind,
    RopeSpec,
    Verdict,
)
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from targets import load
from targets.gguf import llamacpp
from targets.gguf.architecture import read_decoder
from targets.gguf.lower import encoded
from targets.keepers import cannot_keep
from tests.conftest import Toy, write_toy
from tests.exporter.test_gguf import permuted, write_gguf
from tests.exporter.test_gguf_tokenizer import llama3_fields
from tests.generations import toy_config

TARGET = load("gguf")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
Kind = gguf.GGMLQuantizationType

needs_llama_cpp = pytest.mark.skipif(TARGET.cannot_execute() is not None, reason=str(TARGET.cannot_execute()))


@dataclasses.dataclass(frozen=True)
class Made:
    """One artifact with all that it was made from."""

    artifact: Artifact
    graph: Graph
    store: WeightStore
    plan: Plan

    @property
    def spec(self) -> ModelSpec:
        return self.graph.spec


@pytest.fixture
def make(make_plan: Callable[..., Plan]) -> Callable[..., Made]:
    def made(folder: Path, **changes: Any) -> Made:
        checkpoint, plan = open_checkpoint(folder), make_plan(folder, targets=("gguf",), **changes)
        graph, (store, _) = trace(checkpoint.spec), quantize(checkpoint, plan.scheme, root=plan.store)
        plan.out.mkdir(exist_ok=True)
        return Made(TARGET.lower(graph, store, plan, plan.out), graph, store, plan)

    return made


def stored_as(made: Made) -> dict[str, Any]:
    """Every tensor of the file by its name there, as the ``gguf`` package reads it."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(made.artifact.path).tensors}


# --- what lies in the file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "group_size"), [("int4", 32), ("int4", PER_ROW), ("int8", 32)])
def test_ggufs_own_package_dequantizes_to_the_very_floats_of_the_store(
    precision: str, group_size: int, make_toy: Callable[..., Toy], make: Callable[..., Made]
) -> None:
    made = make(make_toy().folder, precision=precision, group_size=group_size)
    tensors = stored_as(made)
    kinds = {"int4": Kind.Q4_0, "int8": Kind.Q8_0}
    for name, part in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down"), ("self_attn.q_proj", "attn_q")):
        tensor, weight = tensors[f"blk.1.{part}.weight"], made.store[f"model.layers.1.{name}.weight"]
        assert isinstance(weight, QuantizedTensor)
        expected = weight.dequantize().numpy()
        if part == "attn_q":
            expected = permuted(expected, made.spec.num_attention_heads)
        assert tensor.tensor_type == kinds[precision]
        assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), expected)


def test_an_exported_file_is_a_checkpoint_with_the_same_floats_and_the_same_model(
    make_toy: Callable[..., Toy], make: Callable[..., Made]
) -> None:
    made = make(make_toy(rope_parameters=LLAMA3, tie_word_embeddings=False).folder)
    again = open_checkpoint(made.artifact.path)
    for name in made.spec.weights():
        weight = made.store[name]
        floats = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        assert torch.equal(again.read(name), floats), name
    ids = list(range(3, 40))
    exact = Reference(made.graph, made.store, FULL_PRECISION).feed(ids)
    assert (Reference(trace(again.spec), again, FULL_PRECISION).feed(ids) - exact).abs().max() < 1e-4
    assert again.spec.rope.kind is RopeKind.FACTORS
    assert again.spec.rms_norm_eps == pytest.approx(made.spec.rms_norm_eps, rel=1e-7)  # a float32 in the file
    told = {"name", "rope", "rms_norm_eps", "bos_token_id", "eos_token_ids"}  # here without a tokenizer
    for field in {field.name for field in dataclasses.fields(made.spec)} - told:
        assert getattr(again.spec, field) == getattr(made.spec, field), field


def test_llama3s_frequencies_are_told_as_llama_cpps_converter_tells_them(
    make_toy: Callable[..., Toy], make: Callable[..., Made]
) -> None:
    """By hand from ``LlamaModel.generate_extra_tensors`` of llama.cpp's conversion/llama.py."""
    made = make(make_toy(rope_parameters=LLAMA3).folder)
    expected = []
    for index in range(made.spec.head_dim // 2):
        wavelength = 2 * np.pi * 10000.0 ** (2 * index / made.spec.head_dim)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        expected.append(1.0 if wavelength < 32 / 4.0 else 8.0 if wavelength > 32 / 1.0 else between)
    found = stored_as(made)["rope_freqs.weight"].data
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert 1 < len({round(float(factor), 3) for factor in found}) > 2


def test_linear_scaling_is_told_by_its_factor_and_comes_back(
    make_toy: Callable[..., Toy], make: Callable[..., Made]
) -> None:
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    made = make(make_toy(rope_parameters=linear).folder)
    assert read_header(made.artifact.path).fields["llama.rope.scaling.factor"] == 4.0
    assert "rope_freqs.weight" not in stored_as(made)
    assert open_checkpoint(made.artifact.path).spec.rope == made.spec.rope


def test_factors_that_came_in_a_file_leave_in_it_unchanged(make_toy: Callable[..., Toy]) -> None:
    factors = tuple(1.0 + 0.7 * index for index in range(16))
    rope = RopeSpec(theta=10000.0, kind=RopeKind.FACTORS, factors=factors)
    rotation = rotation_of(inverse_frequencies(rope, head_dim=32), rope)
    assert rotation.factors is not None
    assert tuple(rotation.factors.tolist()) == pytest.approx(factors, rel=1e-7)


def test_a_tied_head_is_not_stored_twice(make_toy: Callable[..., Toy], make: Callable[..., Made]) -> None:
    assert "output.weight" not in stored_as(make(make_toy().folder))
    assert "output.weight" in stored_as(make(make_toy(tie_word_embeddings=False).folder))


def test_an_export_that_fails_leaves_no_file(
    make_toy: Callable[..., Toy], make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("targets.gguf.lower.interleaved", fails)
    toy = make_toy()
    with pytest.raises(OSError, match="No space left"):
        make(toy.folder)
    assert not list(toy.folder.parent.rglob("*.gguf*"))


def test_a_scale_beyond_float16_is_refused() -> None:
    codes = torch.ones(2, 32, dtype=torch.int8)
    huge = QuantizedTensor(name="w", bits=8, group_size=32, codes=codes, scales=torch.tensor([[1.0], [1e6]]))
    with pytest.raises(LoweringError, match=r"w has a scale of 1e\+06, which float16 does not hold"):
        encoded(huge, Kind.Q8_0)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_and_the_smallest_scale_survive_a_block(bits: int) -> None:
    lowest, highest = {4: (-8, 7), 8: (-127, 127)}[bits]
    codes = torch.arange(lowest, lowest + 256).clamp(max=highest).to(torch.int8).view(2, 128)
    scales = torch.tensor([2.0**-17, 0.5, 3.0, 65280.0, 2.0**-17 * 255 / 128, 1.0, 2.0, 4.0]).view(2, 4)
    weight = QuantizedTensor(name="w", bits=bits, group_size=32, codes=codes, scales=scales)
    kind = {4: Kind.Q4_0, 8: Kind.Q8_0}[bits]
    assert np.array_equal(gguf.dequantize(encoded(weight, kind), kind), weight.dequantize().numpy())


# --- what is refused ---------------------------------------------------------------------------------------------


def test_columns_that_are_no_blocks_are_refused(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]) -> None:
    toy = make_toy(intermediate_size=80)
    spec = open_checkpoint(toy.folder).spec
    why = TARGET.refuse(spec, make_plan(toy.folder, group_size=PER_ROW))
    assert why == "Q4_0 and Q8_0 are blocks of 32 columns, but model.layers.0.mlp.down_proj.weight has 80 columns"
    assert TARGET.refuse(spec, make_plan(toy.folder, precision="fp16")) is None


def test_what_llama_cpp_has_not_is_refused(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]) -> None:
    toy = make_toy()
    spec = open_checkpoint(toy.folder).spec
    assert "--prefer prefill changes nothing" in str(TARGET.refuse(spec, make_plan(toy.folder, prefer=Prefer.PREFILL)))
    int8 = make_plan(toy.folder, kv_cache=Precision.INT8)
    assert "no cache of int8" in str(targets.refusal("gguf", TARGET, spec, int8))
    lut4 = make_plan(toy.folder, precision="lut4")
    assert "takes no palettes" in str(targets.refusal("gguf", TARGET, spec, lut4))
    with pytest.raises(UsageError, match="runs it on the CPU here"):
        TARGET.on("GPU")


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("attention", lambda arguments: (*arguments[:5], None, *arguments[6:])),
        ("attention", lambda arguments: (*arguments[:-1], 16)),
        ("attention", lambda arguments: (*arguments[:8], 0.5, *arguments[9:])),
        ("rms_norm", lambda arguments: (*arguments[:-1], 0.5)),
        ("add", lambda arguments: (arguments[0], arguments[0])),
        ("mul", lambda arguments: (arguments[0], arguments[0])),
        ("linear", lambda arguments: (arguments[0], dataclasses.replace(arguments[1], name="model.other.weight"))),
    ],
)
def test_a_graph_that_is_not_llama_cpps_is_refused(
    op: str, change: Callable[[tuple[Any, ...]], tuple[Any, ...]], make_toy: Callable[..., Toy]
) -> None:
    graph = trace(open_checkpoint(make_toy().folder).spec)
    assert read_decoder(graph).layers == (0, 1)
    victim = [node for node in graph.nodes if (node.op, node.layer) == (op, 1)][-1]
    other: Node = dataclasses.replace(victim, arguments=change(victim.arguments))
    nodes = tuple(other if node is victim else node for node in graph.nodes)
    with pytest.raises(LoweringError, match="architecture llama computes something else"):
        read_decoder(dataclasses.replace(graph, nodes=nodes))


def test_without_llama_cpp_it_is_lowered_and_not_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "PACKAGE", "no_such_wheel")
    assert TARGET.missing() is None
    assert "pip install xllamacpp==" in str(TARGET.cannot_execute())
    assert TARGET.runtime() == "llama.cpp"


def test_a_processor_that_the_wheel_is_not_built_for_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(llamacpp, "CPUINFO", tmp_path / "cpuinfo")
    for flags, says in (("fpu avx f16c", "with avx2, bmi2, fma"), ("avx2 bmi2 f16c fma", "None")):
        (tmp_path / "cpuinfo").write_text(f"model\t: x\nflags\t\t: {flags}\n")
        assert says in str(TARGET.cannot_execute())


def test_without_llama_cpp_the_fields_of_the_file_are_audited(
    make_toy: Callable[..., Toy], make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(make_toy().folder)
    monkeypatch.setattr(llamacpp, "PACKAGE", "no_such_wheel")
    report = TARGET.audit(made.artifact)
    assert report is not None
    assert (report.verdict, report.figures) == (Verdict.PASSED, {"types": {"Q8_0": 1, "F32": 5, "Q4_0": 14}})
    other = dataclasses.replace(made.artifact, spec=dataclasses.replace(made.spec, num_key_value_heads=4))
    report = TARGET.audit(other)
    assert report is not None
    assert (report.verdict, report.reason) == (Verdict.FAILED, "num_key_value_heads is 2, 4 was expected")


# --- the arithmetic of llama.cpp ---------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.toolchain
def test_activations_are_rounded_as_ggml_rounds_them() -> None:
    """To the bit, by ggml's own function, over magnitudes that float16 has no normal numbers for."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator) * torch.logspace(-7, 4, 64).unsqueeze(1)
    x[3] = 0.0
    x[4, :32] = 0.0
    x[5, 0] = x[5].abs().max() * 50
    row = (ctypes.c_uint8 * (3 * 34))()
    function = llamacpp._library().quantize_row_q8_0
    function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    rounded = round_activations(x, Activations.INT8_PER_32, group_size=32)
    for index in range(len(x)):
        function(x[index].contiguous().data_ptr(), row, 96)
        expected = gguf.dequantize(np.frombuffer(row, dtype=np.uint8).reshape(1, -1), Kind.Q8_0)[0]
        assert np.array_equal(rounded[index].numpy(), expected), index


def test_halves_in_attention_are_rounded_where_they_meet_the_cache() -> None:
    """Against the plain edges of the same op, each rounded by hand."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 5, heads * 32, generator=generator) for heads in (4, 2, 2))
    empty, frequencies = torch.zeros(1, 2, 0, 32), inverse_frequencies(RopeSpec(theta=10000.0), head_dim=32)
    sizes: tuple[Any, ...] = (4, 2, 32**-0.5, 0, 0)
    half = lambda x: x.half().float()  # noqa: E731
    context, keys, values = attend(
        q, k, v, empty, empty, frequencies, *sizes, rounded=lambda *x: tuple(map(half, x)), weighed=half
    )
    edges = attention_edges(q, k, v, empty, empty, frequencies, *sizes)
    assert torch.equal(keys, half(edges.present_k))
    assert torch.equal(values, half(edges.present_v))
    wide = keys.repeat_interleave(2, dim=1), values.repeat_interleave(2, dim=1)
    scores = (half(edges.q_rotated) @ wide[0].mT * 32**-0.5).masked_fill(~edges.visible, -torch.inf)
    by_hand = half(scores.softmax(dim=-1)) @ wide[1]
    assert (context - by_hand.transpose(1, 2).flatten(2)).abs().max() < 1e-6
    assert not torch.allclose(context, edges.context, atol=1e-5)


@pytest.mark.parametrize("rope", [RopeSpec(theta=5e5), RopeSpec(theta=1e4, kind=RopeKind.LINEAR, factor=4.0)])
def test_angles_of_a_recurrence_are_those_of_the_frequencies_but_for_its_roundings(rope: RopeSpec) -> None:
    """At position 4,000 a few units in the last place of 4,000 radians, which a float32 product rounds less often."""
    frequencies = inverse_frequencies(rope, head_dim=128)
    plain = rope_table(frequencies, first=3000, count=1000)
    found = recurrent_table(frequencies, rope, first=3000, count=1000)
    for ours, exact in zip(found, plain, strict=True):
        assert 1e-6 < (ours - exact).abs().max() < 5e-3
        assert torch.equal(ours[:, 0], exact[:, 0]) or rope.kind is RopeKind.LINEAR


def test_a_cache_of_halves_that_the_reference_emulates_is_judged_by_the_floor() -> None:
    floor = Floor(mean_kl_nats=1e-9, worst_kl_nats=1e-8)
    emulated = Arithmetic(activations=Activations.FLOAT, compute_dtype="fp32", kv_dtype="fp16", product_dtype="fp16")
    assert gate(emulated, floor=floor, decided=10).mean_kl_nats == pytest.approx(1e-8)
    unseen = dataclasses.replace(emulated, product_dtype="fp32")
    assert gate(unseen, floor=floor, decided=10).mean_kl_nats == 1e-4


# --- run by llama.cpp --------------------------------------------------------------------------------------------

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": LLAMA3,
}


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_llama_cpp_answers_as_the_reference(
    rope: str, precision: str, make_toy: Callable[..., Toy], make: Callable[..., Made]
) -> None:
    made = make(make_toy(rope_parameters=ROPES[rope], tie_word_embeddings=rope == "linear").folder, precision=precision)
    steps = drive_for([(7 * index) % 96 for index in range(64)], context=64)
    answers = ask_reference(made.graph, made.store, made.artifact, steps)
    parity = prove_parity(TARGET, made.artifact, answers, graph=made.graph, store=made.store, plan=made.plan)
    assert parity.verdict is Verdict.PASSED, parity
    assert parity.figures["structure_max_abs_logit_diff"] < 1e-4


@needs_llama_cpp
@pytest.mark.toolchain
def test_a_wrong_theta_is_seen(make_toy: Callable[..., Toy], make: Callable[..., Made]) -> None:
    """By half a percent, in the file alone."""
    made = make(make_toy().folder, precision="fp32")
    nodes = tuple(dataclasses.replace(node, arguments=tuple(map(_slower, node.arguments))) for node in made.graph.nodes)
    wrong = dataclasses.replace(made.graph, nodes=nodes)
    artifact = TARGET.lower(wrong, made.store, made.plan, made.plan.out)
    steps = drive_for([(7 * index) % 96 for index in range(64)], context=64)
    answers = ask_reference(made.graph, made.store, artifact, steps)
    parity = prove_parity(TARGET, artifact, answers, graph=wrong, store=made.store, plan=made.plan)
    assert parity.verdict is Verdict.FAILED
    assert parity.reason.startswith("structure")


def _slower(argument: Any) -> Any:
    if not isinstance(argument, Constant):
        return argument
    return Constant(argument.name, inverse_frequencies(RopeSpec(theta=10050.0), head_dim=2 * len(argument.value)))


@needs_llama_cpp
@pytest.mark.toolchain
def test_all_logits_are_those_of_every_position(make_toy: Callable[..., Toy], make: Callable[..., Made]) -> None:
    made = make(make_toy().folder, precision="fp32", logits=Logits.ALL)
    expected = Reference(made.graph, made.store, made.artifact.arithmetic).feed(range(3, 23))
    with TARGET.open(made.artifact, threads=1) as runner:
        assert (runner.feed(list(range(3, 23))) - expected).abs().max() < 1e-2
        assert runner.feed([5]).shape == (1, 96)


@needs_llama_cpp
@pytest.mark.toolchain
def test_a_large_model_is_held_against_the_reference_in_slices(
    sample: Path, make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and numbers of layers differ then between graph and file, and what the head reads takes logits' place."""
    monkeypatch.setattr(targets.gguf, "STRUCTURE_BYTES", 8 << 20)
    made = make(sample, context=192)
    parts = TARGET.structure_parts(made.graph, made.plan.scheme)
    assert [sum(node.op == "attention" for node in part.nodes) for part in parts] == [2, 2, 1]
    steps = drive_for(Tokenizer(sample).encode("We the People of the United States" * 8), context=192)
    answers = ask_reference(made.graph, made.store, made.artifact, steps)
    parity = prove_parity(TARGET, made.artifact, answers, graph=made.graph, store=made.store, plan=made.plan)
    assert parity.verdict is Verdict.PASSED, parity
    assert 0 < parity.figures["structure_max_abs_logit_diff"] < 1e-4


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("precision", "group_size", "head"), [("int4", PER_ROW, "int4"), ("int4", 64, "int8"), ("int8", 32, "fp16")]
)
def test_every_grouping_is_proven_on_the_sample(
    precision: str, group_size: int, head: str, sample: Path, make: Callable[..., Made]
) -> None:
    made = make(sample, precision=precision, group_size=group_size, head=head, context=192)
    text = (sample / "evaluation.txt").read_text(encoding="utf-8")
    steps = drive_for(Tokenizer(sample).encode(text)[:160], context=192)
    answers = ask_reference(made.graph, made.store, made.artifact, steps)
    codes = prove_codes(TARGET, made.artifact, expected=weight_digests(made.store))
    parity = prove_parity(TARGET, made.artifact, answers, graph=made.graph, store=made.store, plan=made.plan)
    assert (codes.verdict, parity.verdict) == (Verdict.PASSED, Verdict.PASSED), (codes, parity)


@needs_llama_cpp
@pytest.mark.toolchain
def test_a_file_that_is_none_is_refused_in_a_sentence(make_toy: Callable[..., Toy], make: Callable[..., Made]) -> None:
    made = make(make_toy().folder, precision="fp32")
    made.artifact.path.write_bytes(made.artifact.path.read_bytes()[:4000])
    with pytest.raises(LoweringError, match=r"llama.cpp cannot load model.gguf"):
        TARGET.open(made.artifact, threads=1)


@needs_llama_cpp
@pytest.mark.toolchain
def test_flash_attention_moves_the_sample_less_than_its_gates(sample: Path, make: Callable[..., Made]) -> None:
    """What apps run by llama.cpp's defaults, though it is not what is emulated."""
    from exporter.metrics import kl_divergence
    from targets.gguf.runner import LlamaCppRunner

    made = make(sample, context=192)
    text = (sample / "evaluation.txt").read_text(encoding="utf-8")
    steps = drive_for(Tokenizer(sample).encode(text)[:192], context=192)
    answers = ask_reference(made.graph, made.store, made.artifact, steps)
    with LlamaCppRunner(made.artifact, threads=1, flash=llamacpp.FLASH_ON) as runner:
        kl = kl_divergence(answers.shipped, drive(runner, steps))
    bounds = gate(made.artifact.arithmetic, floor=answers.floor, decided=1)
    assert kl.mean() < bounds.mean_kl_nats
    assert kl.max() < bounds.worst_kl_nats


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_codes_of_a_gguf_file_leave_in_one_as_they_came(
    kind: Any, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    """Quantized by the ``gguf`` package, with scales of either sign: every matrix byte for byte."""
    toy = make_toy(vocab_size=2048)
    theirs = write_gguf(tmp_path / "theirs.gguf", toy, kind=kind, fields=llama3_fields())
    words = [str(theirs), "-t", "gguf", "-c", "64", "--calibration", "none", "--json", "--threads", "1"]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")])
    assert result.exit_code in (0, 8), result.output
    manifest = json.loads(result.stdout)[0]["manifest"]
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "passed"), manifest["parity"]
    ours = tmp_path / "out" / ("gguf" if result.exit_code == 0 else "gguf.failed") / "model.gguf"
    before, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors if tensor.tensor_type == kind}
        for file in (theirs, ours)
    )
    assert before.keys() == after.keys()
    assert len(before) >= 15
    for name, tensor in before.items():
        assert np.array_equal(tensor.data, after[name].data), name


@needs_llama_cpp
@pytest.mark.toolchain
def test_an_embedding_longer_than_the_head_is_cut_and_the_output_says_so(tmp_path: Path) -> None:
    """The text of Llama 3.2 Vision, whose image's token lies behind the vocabulary: in the file it is text like any."""
    toy = write_toy(tmp_path / "toy", **toy_config("Llama 3.2 Vision") | {"vocab_size": 2048})
    shutil.copyfile(BUNDLED_MODEL / "tokenizer_config.json", toy.folder / "tokenizer_config.json")
    tokenizer = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 2048, "content": "<|image|>"})
    (toy.folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    store = ["--store", str(tmp_path / "store"), "--json", "--threads", "1"]
    words = [str(toy.folder), "-t", "gguf", "-c", "64", "-p", "int4", "--calibration", "none", *store]
    result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "out")])
    assert result.exit_code in (0, 8), result.output
    assert "gguf: of the embedding the 2048 rows are taken that the head has too" in result.stderr
    bundle = tmp_path / "out" / ("gguf" if result.exit_code == 0 else "gguf.failed")
    manifest = json.loads(result.stdout)[0]["manifest"]
    assert "tokens from 2048 on, an image's among them, cannot be fed" in manifest["remarks"][0]
    again = CliRunner().invoke(app, ["validate", str(bundle), "--against", str(toy.folder), *store])
    for proven in (manifest, json.loads(again.stdout)[0]["manifest"]):
        assert (proven["codes"]["verdict"], proven["parity"]["verdict"]) == ("passed", "passed"), proven["parity"]
    file = bundle / "model.gguf"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert list(tensors["token_embd.weight"].shape) == [64, 2048]
    assert sorted({name.split(".")[1] for name in tensors if name.startswith("blk.")}) == ["0", "1", "2"]
    model = llamacpp.Model(file)
    assert 2048 in Tokenizer(toy.folder).encode("a <|image|>")
    assert max(model.tokenize("a <|image|>", begin=True)) < 2048
    model.close()
    with TARGET.open(read_artifact(manifest, path=file), threads=1) as runner, pytest.raises(InputError, match="2048"):
        runner.feed([2048])


def test_codes_that_no_block_of_gguf_holds_are_refused() -> None:
    def kind(**changes: Any) -> CodeKind:
        return CodeKind(
            **{"source": "GPTQ", "precision": Precision.INT4, "group_size": 64, "zero_points": False, **changes}
        )

    assert cannot_keep("gguf", kind()) is None
    assert cannot_keep("gguf", kind(group_size=PER_ROW)) is None
    assert cannot_keep("gguf", kind(zero_points=True)) == "Q4_0 and Q8_0 have no zero points"
    assert "groups of 16 are no multiple" in str(cannot_keep("gguf", kind(group_size=16)))
