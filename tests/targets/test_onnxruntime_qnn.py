"""The qnn backend: graphs of fixed length that are right on a CPU, and what Qualcomm's emulator makes of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import targets
from calibration.layers import Calibration, CalibrationText, quantize
from exporter.checkpoint import open_checkpoint
from exporter.codes import check_codes, weight_digests
from exporter.errors import LoweringError, UsageError
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.static import linear_steps
from exporter.model.trace import trace
from exporter.parity import all_at_once, drive, drive_for
from exporter.prove import ask_reference, prove_codes, prove_parity
from exporter.spec import (
    Artifact,
    Logits,
    Method,
    Plan,
    Precision,
    Prefer,
    Recipe,
    Sampling,
    Verdict,
    WeightScheme,
)
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from targets.base import make_artifact
from targets.onnxruntime.fixed import write_fixed
from targets.onnxruntime.fixed_runner import CpuCalls, FixedCalls, FixedRunner, in_float32
from targets.onnxruntime.qnn import DECODE, PREFILL, SOURCE, WEIGHTS, QnnChip, QnnTarget, check_compiled
from tests.conftest import Toy

pytestmark = pytest.mark.toolchain
TARGET = QnnTarget()
emulated = pytest.mark.skipif(TARGET.missing() is not None, reason=str(TARGET.missing()))
LENGTH = 16
IDS = torch.randint(96, (64,), generator=torch.Generator().manual_seed(0)).tolist()
STEPS = drive_for(IDS, context=64)
GPTQ = Recipe(method=Method.GPTQ)


def stored(folder: Path, plan: Plan, *, windows: torch.Tensor | None = None) -> tuple[WeightStore, Graph]:
    """Where there are codes, calibrated: static activations want ranges."""
    checkpoint = open_checkpoint(folder)
    graph = trace(checkpoint.spec)
    if not plan.scheme.body.bits:
        return quantize(checkpoint, plan.scheme, root=plan.store)[0], graph
    if windows is None:
        windows = torch.randint(96, (8, 64), generator=torch.Generator().manual_seed(1))
    text = CalibrationText(identity="some windows", source="a test", windows=lambda: windows)
    calibration = Calibration(recipe=GPTQ, text=text, graph=graph)
    return quantize(checkpoint, plan.scheme, root=plan.store, calibration=calibration)[0], graph


def written(folder: Path, plan: Plan, *, graph: Graph | None = None) -> tuple[Artifact, Graph, WeightStore]:
    """The source alone, for calls of 16 tokens and of one; nothing is compiled."""
    store, true = stored(folder, plan)
    source = plan.out / SOURCE
    source.mkdir(parents=True)
    steps = linear_steps(true, store.read_ranges()) if plan.scheme.body.bits else {}
    paths = {LENGTH: source / PREFILL, 1: source / DECODE}
    how: dict[str, Any] = {"context": plan.context, "logits": plan.logits, "data_name": WEIGHTS}
    write_fixed(graph or true, store, steps=steps, paths=paths, **how)
    return make_artifact(TARGET, spec=true.spec, plan=plan, path=plan.out / DECODE), true, store


def on_cpu(artifact: Artifact) -> FixedRunner:
    source = artifact.path.parent / SOURCE
    models = {LENGTH: in_float32(source / PREFILL), 1: in_float32(source / DECODE)}
    return FixedRunner(artifact, CpuCalls(models, folder=source, threads=1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("precision", "allowed"), [("fp16", 1e-3), ("int8", 1e-4)])
def test_structure_and_codes(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tied: bool, precision: str, allowed: float
) -> None:
    """Through padded prefills, a rewind, a call at the end of the cache, and single tokens."""
    toy = make_toy(tie_word_embeddings=tied)
    plan = make_plan(toy.folder, precision=precision, recipe=GPTQ)
    artifact, graph, store = written(toy.folder, plan)
    reference = Reference(graph, store, FULL_PRECISION)
    expected = all_at_once(reference, STEPS)
    reference.rewind(0)
    whole = reference.feed(IDS)
    with on_cpu(artifact) as runner:
        assert (drive(runner, STEPS) - expected).abs().max() <= allowed
        assert (runner.rewind(57), runner.feed(IDS[57:])[-1] - whole[-1])[1].abs().max() <= allowed
    report = check_codes(TARGET.read_weights(artifact), expected=weight_digests(store), scheme=plan.scheme)
    assert report.verdict is Verdict.PASSED, report.reason


def test_rope_stretched_as_llama_3_1_has_it(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]) -> None:
    stretched = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    stretched |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    toy = make_toy(rope_parameters=stretched)
    artifact, graph, store = written(toy.folder, make_plan(toy.folder, precision="fp16"))
    expected = all_at_once(Reference(graph, store, FULL_PRECISION), STEPS)
    with on_cpu(artifact) as runner:
        assert (drive(runner, STEPS) - expected).abs().max() <= 1e-3


def test_both_graphs_hold_standard_ops_no_infinity_and_one_copy_of_the_weights(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    import onnx

    toy = make_toy(tie_word_embeddings=False)
    artifact, graph, _ = written(toy.folder, make_plan(toy.folder, precision="fp16"))
    source = artifact.path.parent / SOURCE
    for name in (PREFILL, DECODE):
        model = onnx.load(source / name)
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""}
        assert not {"Attention", "RotaryEmbedding"} & {node.op_type for node in model.graph.node}
        arrays = [onnx.numpy_helper.to_array(initializer) for initializer in model.graph.initializer]
        assert all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f")
    parameters = sum(math.prod(shape) for shape in graph.spec.weights().values())
    rope = 2 * 64 * 32 * 4
    assert (source / WEIGHTS).stat().st_size < 2.3 * parameters + rope


def test_logits_for_all_positions_in_any_parts(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]) -> None:
    toy = make_toy()
    artifact, graph, store = written(toy.folder, make_plan(toy.folder, precision="fp16", logits=Logits.ALL))
    expected = Reference(graph, store, FULL_PRECISION).feed(IDS)
    with on_cpu(artifact) as runner:
        for parts in ([64], [33, 1, 16, 14], [1, 31, 32], [17, 47]):
            runner.rewind(0)
            start, rows = 0, []
            for count in parts:
                rows.append(runner.feed(IDS[start : start + count]))
                start += count
            assert torch.cat(rows).shape == expected.shape
            assert (torch.cat(rows) - expected).abs().max() <= 1e-3


FAULTS: dict[str, Callable[[FixedCalls, pytest.MonkeyPatch], None]] = {}


def fault(break_it: Callable[[Any, pytest.MonkeyPatch], None]) -> None:
    FAULTS[break_it.__name__] = break_it


@fault
def positions_one_late(fixed: FixedCalls, patch: pytest.MonkeyPatch) -> None:
    for session in fixed.sessions.values():
        run = session.run

        def late(names: Any, feeds: Mapping[str, Any], run: Any = run) -> Any:
            return run(names, {**feeds, "position_ids": np.minimum(feeds["position_ids"] * 2, 63).astype(np.int32)})

        patch.setattr(session, "run", late)


@fault
def a_cache_that_is_not_written(fixed: FixedCalls, patch: pytest.MonkeyPatch) -> None:
    fixed.caches[".1.key"].flags.writeable = True
    stale = fixed.caches[".1.key"].copy()
    for session in fixed.sessions.values():
        run = session.run

        def unwritten(names: Any, feeds: Mapping[str, Any], run: Any = run) -> Any:
            return run(names, {**feeds, "past_key_values.1.key": stale})

        patch.setattr(session, "run", unwritten)


@fault
def a_mask_that_shows_the_padding(fixed: FixedCalls, patch: pytest.MonkeyPatch) -> None:
    original = FixedCalls._mask

    def shown(self: FixedCalls, length: int, *, position: int) -> Any:
        mask = original(self, length, position=position)
        mask[..., self.context :] = 0
        return mask

    patch.setattr(FixedCalls, "_mask", shown)


@pytest.mark.parametrize("name", FAULTS)
def test_a_runner_that_is_wrong_is_far_off(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    toy = make_toy()
    artifact, graph, store = written(toy.folder, make_plan(toy.folder, precision="fp16"))
    expected = all_at_once(Reference(graph, store, FULL_PRECISION), STEPS)
    with on_cpu(artifact) as runner:
        FAULTS[name](runner._calls._calls, monkeypatch)  # type: ignore[attr-defined]
        assert (drive(runner, STEPS) - expected).abs().max() > 0.1


def test_what_a_file_computes_inside_is_what_the_reference_does(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    """Every node of our graph has a counterpart in it."""
    from targets.onnxruntime.observe import observe_fixed

    toy = make_toy()
    artifact, graph, store = written(toy.folder, make_plan(toy.folder, precision="int8", recipe=GPTQ))
    source = artifact.path.parent / SOURCE
    calls = [IDS[:20], IDS[20:21]]
    observation = observe_fixed({LENGTH: source / PREFILL, 1: source / DECODE}, graph, calls, threads=1)
    reference, position = Reference(graph, store, FULL_PRECISION), 0
    for ids, seen in zip(calls, observation.calls, strict=True):
        found: dict[str, torch.Tensor] = {}
        graph.run(
            reference._table,
            {"ids": torch.tensor([ids]), **reference._caches},
            lambda node, _, results, found=found: found.update({node.name: results[0]}),  # type: ignore[misc]
        )
        reference.feed(ids)
        position += len(ids)
        assert {value.node for value in seen} == {node.name for node in graph.nodes}
        for value, x in seen.items():
            true = found[value.node]
            assert (x - true[:, -x.shape[1] :]).abs().max() <= 1e-4, value


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"precision": "fp32"}, "Hexagon has fp16 and int8 here, but model.embed_tokens.weight is fp32"),
        ({"precision": "int4"}, "Hexagon has fp16 and int8 here, but model.layers.0.self_attn.q_proj.weight is int4"),
        ({"precision": "int8"}, "--calibration none has none"),
        ({"precision": "int8", "prefer": Prefer.PREFILL, "recipe": GPTQ}, "--prefer prefill is for the cpu backend"),
    ],
)
def test_what_it_cannot_do_is_refused(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], words: dict[str, Any], reason: str
) -> None:
    spec = open_checkpoint(make_toy().folder).spec
    assert (TARGET.refuse(spec, make_plan(Path("unused"), **words)) or "").endswith(reason)
    for fine in ({"precision": "fp16"}, {"precision": "int8", "recipe": GPTQ}):
        assert TARGET.refuse(spec, make_plan(Path("unused"), **fine)) is None


def test_a_window_is_refused_by_name(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]) -> None:
    toy = make_toy()
    graph = trace(open_checkpoint(toy.folder).spec)
    nodes = tuple(
        dataclasses.replace(node, arguments=(*node.arguments[:-2], 9, 0)) if node.op == "attention" else node
        for node in graph.nodes
    )
    with pytest.raises(LoweringError, match=r"it has no window \(9\)"):
        written(toy.folder, make_plan(toy.folder, precision="fp16"), graph=dataclasses.replace(graph, nodes=nodes))


def test_a_lacking_package_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert (TARGET.missing() or "").endswith("pip install 'llama-export[qnn]'")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert (TARGET.missing() or "").startswith("Qualcomm has no onnxruntime-qnn for Darwin")
    assert (TARGET.cannot_execute() or "").startswith("Qualcomm's emulator of Hexagon runs on Linux x86-64")


def test_a_node_left_to_the_cpu_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx.helper import make_graph, make_model, make_node

    path = tmp_path / "model.decode.onnx"
    kinds = ["EPContext", "Softmax", "EPContext"]
    nodes = [make_node(kind, [], [str(index)], domain="x") for index, kind in enumerate(kinds)]
    onnx.save(make_model(make_graph(nodes, "partly", [], [])), path)
    with pytest.raises(LoweringError, match=r"holds 3 nodes \(EPContext, Softmax\), one EPContext was expected"):
        check_compiled(path)


def test_a_chip_is_that_of_the_device() -> None:
    assert QnnChip.of_device(None) == QnnChip(htp_arch=75, soc_model=57)
    assert QnnChip.of_device("galaxy-s25").options() == {"htp_arch": "79", "soc_model": "69"}
    with pytest.raises(UsageError, match="iPhone 15 Pro has no Hexagon that QNN knows"):
        QnnChip.of_device("iphone-15-pro")


@dataclasses.dataclass(frozen=True)
class Sample:
    artifact: Artifact
    graph: Graph
    store: WeightStore
    plan: Plan


@pytest.fixture(scope="module", params=["fp16", "int8"])
def lowered(request: pytest.FixtureRequest, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """The trained model, compiled for a Snapdragon 8 Gen 3."""
    if missing := TARGET.missing():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("qnn")
    precision = Precision(request.param)
    scheme = WeightScheme(body=precision, embedding=precision, head=precision, group_size=32)
    plan = Plan(
        checkpoint=sample,
        targets=("onnxruntime-qnn",),
        scheme=scheme,
        context=128,
        recipe=GPTQ,
        sampling=Sampling(),
        out=folder / "out",
        store=folder / "store",
        evaluation_text=sample / "evaluation.txt",
        threads=1,
    )
    text = (sample / "calibration.txt").read_text(encoding="utf-8")
    windows = torch.tensor(Tokenizer(sample).encode(text)[: 8 * 128]).view(8, 128)
    store, graph = stored(sample, plan, windows=windows)
    plan.out.mkdir()
    return Sample(artifact=TARGET.lower(graph, store, plan, plan.out), graph=graph, store=store, plan=plan)


def ids_of(sample: Path, *, count: int) -> list[int]:
    return Tokenizer(sample).encode((sample / "evaluation.txt").read_text(encoding="utf-8"))[:count]


@pytest.mark.slow
def test_the_sample_is_proven_on_the_emulator(lowered: Sample, sample: Path) -> None:
    """Codes of the source; both steps of parity, the second on the compiled binaries."""
    artifact, graph, store, plan = lowered.artifact, lowered.graph, lowered.store, lowered.plan
    answers = ask_reference(graph, store, artifact, drive_for(ids_of(sample, count=100), context=128))
    codes = prove_codes(TARGET, artifact, expected=weight_digests(store))
    assert codes.verdict is Verdict.PASSED, codes
    parity = prove_parity(TARGET, artifact, answers, graph=graph, store=store, plan=plan)
    assert parity.verdict is Verdict.PASSED, parity
    assert parity.figures["structure_max_abs_logit_diff"] <= 1e-4
    assert "Hexagon emulated by onnxruntime-qnn" in parity.figures["runtime"]
    for name in (PREFILL, DECODE):
        check_compiled(artifact.path.parent / name)


@pytest.mark.slow
def test_the_same_source_compiles_to_the_same_bytes_elsewhere(lowered: Sample, tmp_path: Path) -> None:
    for _ in range(2):  # the second time over what is there
        TARGET.lower(lowered.graph, lowered.store, lowered.plan, tmp_path)
        for file in tmp_path.rglob("*"):
            if file.is_file():
                assert file.read_bytes() == (lowered.plan.out / file.relative_to(tmp_path)).read_bytes(), file


class Narrowed:
    """A store in which the range of one edge is half of what it was."""

    def __init__(self, store: WeightStore, edge: str) -> None:
        self._store, self._edge = store, edge

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __getitem__(self, name: str) -> Any:
        return self._store[name]

    def read_ranges(self) -> dict[str, Any]:
        ranges = self._store.read_ranges()
        halved = {end: ranges[self._edge][end] / 2 for end in ("lowest", "highest")}
        return {**ranges, self._edge: {**ranges[self._edge], **halved}}


@pytest.mark.slow
@pytest.mark.parametrize("lowered", ["int8"], indirect=True)
def test_a_range_halved_fails_parity_and_nothing_else_sees_it(lowered: Sample, sample: Path, tmp_path: Path) -> None:
    graph, store, plan = lowered.graph, lowered.store, lowered.plan
    residual = [node for node in graph.nodes if node.op == "linear" and node.layer == 1][-1]
    artifact = TARGET.lower(graph, Narrowed(store, residual.name), plan, tmp_path)  # type: ignore[arg-type]
    answers = ask_reference(graph, store, artifact, drive_for(ids_of(sample, count=80), context=128))
    assert prove_codes(TARGET, artifact, expected=weight_digests(store)).verdict is Verdict.PASSED
    parity = prove_parity(TARGET, artifact, answers, graph=graph, store=store, plan=plan)
    assert parity.verdict is Verdict.FAILED
    assert not parity.reason.startswith("structure")


@emulated
def test_a_binary_that_is_broken_ends_the_worker_and_is_told(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    toy = make_toy()
    plan = make_plan(toy.folder, precision="fp16")
    store, graph = stored(toy.folder, plan)
    plan.out.mkdir()
    artifact = TARGET.lower(graph, store, plan, plan.out)
    assert json.loads((plan.out / "qnn.json").read_text()) == {"htp_arch": 75, "soc_model": 57, "prefill_length": 64}
    with TARGET.open(artifact, threads=1) as runner:
        whole = runner.feed(IDS[:20])
        runner.rewind(0)
        assert torch.equal(runner.feed(IDS[:20]), whole)
        assert runner.feed_each(IDS[20:22]).shape == (1, 96)
        assert len(runner.steps_s) == 2
    (binary,) = plan.out.glob("*decode_qnn.bin")
    binary.write_bytes(b"\0" * 1000)
    with pytest.raises(LoweringError, match=r"QNN could not load"):
        TARGET.open(artifact, threads=1)


def test_the_label_serves_it() -> None:
    assert isinstance(targets.load("onnxruntime-qnn"), QnnTarget)
