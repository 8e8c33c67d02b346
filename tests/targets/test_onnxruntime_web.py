"""The browser backends: one file for WebGPU and WebAssembly, run by onnxruntime-web in headless Chromium for parity."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.layers import ROUNDED, quantize
from exporter.checkpoint import open_checkpoint
from exporter.codes import check_codes, weight_digests
from exporter.errors import HostError, LoweringError, MissingToolError
from exporter.model.graph import Graph, Value
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import Drive, all_at_once, drive, drive_for
from exporter.prove import Answers, ask_reference, prove_codes, prove_latency, prove_parity
from exporter.spec import (
    PER_ROW,
    Activations,
    Arithmetic,
    Artifact,
    Plan,
    Precision,
    Prefer,
    Sampling,
    Verdict,
    WeightScheme,
)
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from targets import load
from targets.onnxruntime import chromium
from tests.conftest import Toy

pytestmark = pytest.mark.toolchain

LACKING = chromium.missing()
in_chromium = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(LACKING is not None, reason=LACKING or ""),
]
WASM, WEBGPU = load("onnxruntime-wasm"), load("onnxruntime-webgpu")
BACKENDS = pytest.mark.parametrize("target", [WASM, WEBGPU], ids=lambda target: target.backend)

IDS = torch.randint(96, (64,), generator=torch.Generator().manual_seed(0)).tolist()
STEPS = drive_for(IDS, context=64)
FEW = Drive(ids=tuple(IDS[:46]), prefills=(33, 9))
"""More than 32 tokens at once, more on a cache that is not empty, and four alone."""

SCHEMES: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({"precision": "fp32"}, 1e-4),
    "fp16": ({"precision": "fp16"}, 1e-3),
    "int8": ({"precision": "int8"}, 1e-4),
    "int4": ({}, 1e-4),
    "int4 throughout": ({"head": "int4"}, 1e-4),
    "int4 per row": ({"group_size": PER_ROW}, 1e-4),
}


def lower(toy: Toy, plan: Plan, *, target: Any = WASM) -> tuple[Artifact, Graph, WeightStore]:
    checkpoint = open_checkpoint(toy.folder)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    graph = trace(checkpoint.spec)
    plan.out.mkdir(exist_ok=True)
    return target.lower(graph, store, plan, plan.out), graph, store


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_structure_and_codes_for_every_scheme(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tied: bool, scheme: str
) -> None:
    """By ONNX Runtime on the CPU, which takes every spelling of an op."""
    toy = make_toy(tie_word_embeddings=tied)
    words, allowed = SCHEMES[scheme]
    plan = make_plan(toy.folder, **words)
    artifact, graph, store = lower(toy, plan)
    expected = all_at_once(Reference(graph, store, FULL_PRECISION), STEPS)
    with load("onnxruntime").open(artifact, threads=1) as runner:
        assert (drive(runner, STEPS) - expected).abs().max() <= allowed
    report = check_codes(WASM.read_weights(artifact), expected=weight_digests(store), scheme=plan.scheme)
    assert report.verdict is Verdict.PASSED, report.reason


@pytest.mark.parametrize("scheme", ["fp32", "int4 throughout"])
def test_both_backends_write_the_same_bytes(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], scheme: str, tmp_path: Path
) -> None:
    toy = make_toy()
    plan = make_plan(toy.folder, **SCHEMES[scheme][0])
    files = []
    for target in (WASM, WEBGPU):
        there = dataclasses.replace(plan, out=tmp_path / target.backend)
        artifact, *_ = lower(toy, there, target=target)
        assert (artifact.backend, artifact.arithmetic) == (target.backend, FULL_PRECISION)
        files.append({path.name: path.read_bytes() for path in there.out.iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"model.onnx", "model.onnx.data"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bisection_finds_every_product_in_the_file(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], scheme: str
) -> None:
    toy = make_toy()
    artifact, graph, store = lower(toy, make_plan(toy.folder, **SCHEMES[scheme][0]))
    observed = WASM.observe(artifact, graph=graph, calls=[IDS[:9], IDS[9:12]], threads=1)
    first = observed.calls[0]
    names = {value.node for value in first}
    assert [node.name for node in graph.nodes if node.op == "linear" and node.name not in names] == []
    reference = Reference(graph, store, observed.arithmetic)
    for node in graph.nodes:
        inputs = [argument for argument in node.arguments if isinstance(argument, Value)]
        if node.op == "linear" and all(value in first for value in inputs):
            (expected,) = reference.compute(node, first)
            (found,) = (value for at, value in first.items() if at.node == node.name)
            assert torch.allclose(found, expected, atol=1e-3 if scheme == "fp16" else 1e-4), node.name


def test_a_prompt_gains_nothing_from_integers_in_a_browser(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    toy = make_toy()
    plan = make_plan(toy.folder, precision="int8", prefer=Prefer.PREFILL)
    spec = open_checkpoint(toy.folder).spec
    assert "gains nothing" in str(WASM.refuse(spec, plan))
    assert WASM.refuse(spec, dataclasses.replace(plan, prefer=Prefer.QUALITY)) is None


def test_what_is_missing_is_told_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chromium.platformdirs, "user_cache_path", lambda _: tmp_path / "a cache")
    monkeypatch.setenv(chromium.VARIABLE, str(tmp_path / "nowhere"))
    assert "apt-get install chromium" in str(WASM.missing())
    monkeypatch.setenv(chromium.VARIABLE, sys.executable)
    command = f"--prefix '{tmp_path}/a cache/onnxruntime-web-{chromium.WEB_VERSION}' onnxruntime-web@1.30.0"
    assert str(WEBGPU.missing()).endswith(command)
    with pytest.raises(MissingToolError, match="is not installed: npm install"):
        chromium.Chromium({})
    chromium.distribution().mkdir(parents=True)
    assert WEBGPU.missing() is None


def test_the_sample_app_has_the_same_onnxruntime_web() -> None:
    package = Path(__file__).parents[2] / "samples" / "web" / "package.json"
    assert f'"onnxruntime-web": "{chromium.WEB_VERSION}"' in package.read_text(encoding="utf-8")


def test_a_browser_that_does_not_start_is_told_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\necho no display today >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv(chromium.VARIABLE, str(broken))
    monkeypatch.setattr(chromium, "distribution", lambda: tmp_path)
    with chromium.Chromium({}) as browser, pytest.raises(HostError, match="ended with 3: no display today"):
        browser.ask({"load": {}})


@dataclasses.dataclass(frozen=True)
class Case:
    """The trained sample in int4, and what the reference says of it."""

    graph: Graph
    store: WeightStore
    plan: Plan
    artifact: Artifact
    answers: Answers
    ids: list[int]

    def prove(self, target: Any) -> Any:
        return prove_parity(target, self.artifact, self.answers, graph=self.graph, store=self.store, plan=self.plan)


@pytest.fixture(scope="module")
def case(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("web")
    checkpoint = open_checkpoint(sample)
    scheme = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
    store, _ = quantize(checkpoint, scheme, root=folder / "store")
    graph = trace(checkpoint.spec)
    plan = Plan(
        checkpoint=sample,
        targets=("onnxruntime-wasm",),
        scheme=scheme,
        context=320,
        recipe=ROUNDED,
        sampling=Sampling(),
        out=folder / "out",
        store=folder / "store",
        evaluation_text=sample / "evaluation.txt",
        threads=1,
    )
    plan.out.mkdir()
    artifact = WASM.lower(graph, store, plan, plan.out)
    ids = Tokenizer(sample).encode((sample / "evaluation.txt").read_text(encoding="utf-8"))
    steps = drive_for(ids, context=plan.context).decoding(8)
    answers = ask_reference(graph, store, artifact, steps)
    return Case(graph=graph, store=store, plan=plan, artifact=artifact, answers=answers, ids=ids)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Changes the page's program: a text that it has, for another."""

    def change(old: str, new: str) -> None:
        program = chromium._WORKER.read_text(encoding="utf-8")
        assert program.count(old) == 1
        path = tmp_path / "worker.js"
        path.write_text(program.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(chromium, "_WORKER", path)

    return change


def marked(test: Callable[..., None]) -> Callable[..., None]:
    """In a browser: slow, and skipped where there is none."""
    for mark in in_chromium:
        test = mark(test)
    return test


@marked
@BACKENDS
def test_the_trained_sample_is_proven(case: Case, target: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert target.missing() is None
    assert target.cannot_execute() is None
    report = case.prove(target)
    with capsys.disabled():
        figures = ("runtime", "structure_max_abs_logit_diff", "mean_kl_nats", "floor_kl_nats", "worst_kl_nats")
        print("\n", {name: report.figures[name] for name in figures})
    assert report.verdict is Verdict.PASSED, report.reason
    assert report.figures["runtime"].startswith(f"onnxruntime-web {chromium.WEB_VERSION}, {target.backend}")
    codes = prove_codes(target, case.artifact, expected=weight_digests(case.store))
    assert codes.verdict is Verdict.PASSED


@marked
def test_latency_is_measured_on_webassembly_and_not_on_a_gpu_in_software(case: Case) -> None:
    measured = prove_latency(WASM, case.artifact, ids=case.ids, threads=1)
    assert measured.verdict is Verdict.PASSED
    assert 0 < measured.figures["time_to_first_token_ms"] < 60_000
    not_measured = prove_latency(WEBGPU, case.artifact, ids=case.ids, threads=1)
    assert not_measured.verdict is Verdict.NOT_MEASURED
    assert "SwiftShader" in not_measured.reason


FAULTS = {
    "a position too low": ("BigInt64Array(total).fill(1n)", "BigInt64Array(total).fill(1n).fill(0n, 0, 1)"),
    "a rewind that keeps the token after": (
        "subarray(start, start +",
        "subarray(start + size, start + size +",
    ),
    "a cache that is not rewound": ("await rewind(position);", "await rewind(position && cache.length);"),
}


@marked
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_page_fails_parity(case: Case, worker: Callable[[str, str], None], fault: str) -> None:
    worker(*FAULTS[fault])
    assert case.prove(WASM).verdict is Verdict.FAILED


@marked
@BACKENDS
@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8", "int4 throughout"])
def test_every_scheme_in_the_browser(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], target: Any, scheme: str, tmp_path: Path
) -> None:
    """And of what WebGPU runs, only the scalars that tell lengths are left to the CPU."""
    from targets.onnxruntime.browser import BrowserRunner

    toy = make_toy(tie_word_embeddings=False)
    words, allowed = SCHEMES[scheme]
    plan = make_plan(toy.folder, **words)
    artifact, graph, store = lower(toy, plan, target=target)
    expected = all_at_once(Reference(graph, store, FULL_PRECISION), FEW)
    with BrowserRunner(artifact, provider=target.backend, threads=1, verbose=True) as runner:
        assert (drive(runner, FEW) - expected).abs().max() <= allowed
        placement = runner.placement
    if target is WEBGPU:
        assert sorted(placement["CPUExecutionProvider"]) == ["Cast", "Cast", "Gather", "ReduceSum", "Shape", "Sub"]
        assert len(placement["WebGpuExecutionProvider"]) > 20
    else:
        assert list(placement) == ["CPUExecutionProvider"]


@marked
def test_webassembly_computes_in_floats_whatever_it_is_asked_for(case: Case, tmp_path: Path) -> None:
    """The CPU's artifact asks for int8 activations; so its arithmetic is another there."""
    from targets.onnxruntime.browser import BrowserRunner

    cpu = load("onnxruntime")
    artifact = cpu.lower(case.graph, case.store, case.plan, tmp_path)
    ids = case.ids[:16]
    floats = Reference(case.graph, case.store, FULL_PRECISION).feed(ids)[-1]
    rounded = Reference(case.graph, case.store, artifact.arithmetic).feed(ids)[-1]
    assert artifact.arithmetic == Arithmetic(
        activations=Activations.INT8_PER_BLOCK, compute_dtype="fp32", kv_dtype="fp32"
    )
    with BrowserRunner(artifact, provider="wasm", threads=1) as runner:
        answered = runner.feed(ids)[-1]
    assert (answered - floats).abs().max() <= 1e-4
    assert (answered - rounded).abs().max() > 1e-2


@marked
def test_steps_in_the_browser_are_those_from_here_and_a_rewind_forgets(case: Case) -> None:
    with WASM.open(case.artifact, threads=2) as runner:
        runner.feed(case.ids[:10])
        one_by_one = [runner.feed([token]) for token in case.ids[10:14]][-1]
        assert len(runner.steps_s) == 1
        runner.feed(case.ids[50:60])
        runner.rewind(10)
        assert torch.equal(runner.feed_each(case.ids[10:14]), one_by_one)
        assert len(runner.steps_s) == 4
        assert all(0 < seconds < 60 for seconds in runner.steps_s)
        assert runner.position == 14
        runner.rewind(0)
        assert torch.allclose(runner.feed(case.ids[:14]), one_by_one, atol=1e-4)


@marked
def test_swiftshaders_subgroups_are_still_read_wrongly(case: Case, worker: Callable[[str, str], None]) -> None:
    """A prompt of 32 tokens or more, where its GPU is shown as it is. When this fails, ``SMALLEST_SUBGROUP`` can go."""
    worker("const SMALLEST_SUBGROUP = 8", "const SMALLEST_SUBGROUP = 0")
    ids = case.ids[:40]
    expected = Reference(case.graph, case.store, FULL_PRECISION).feed(ids)[-1]
    with WEBGPU.open(case.artifact, threads=1) as runner:
        assert runner.gpu["subgroups"]  # type: ignore[attr-defined]
        assert (runner.feed(ids)[-1] - expected).abs().max() > 0.1
        runner.rewind(0)
        runner.feed(ids[:31])
        assert (runner.feed(ids[31:])[-1] - expected).abs().max() <= 1e-4


@marked
def test_a_file_that_is_no_model_is_told_with_the_runtimes_reason(case: Case) -> None:
    from targets.onnxruntime.browser import BrowserRunner

    with pytest.raises(LoweringError, match=r"onnxruntime-web failed: .*protobuf"):
        BrowserRunner(case.artifact, provider="wasm", threads=1, model=b"no model")
    assert not browsers_of(os.getpid())


@marked
def test_no_browser_is_left_where_its_owner_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = (
        "import os, signal, sys\n"
        "from targets.onnxruntime.chromium import Chromium\n"
        "browser = Chromium({})\n"
        "open(sys.argv[1], 'w').write(str(browser._process.pid))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(told)], env=environment, check=False)
    leader = int(told.read_text())
    for _ in range(200):
        if not browsers_of(leader):
            break
        time.sleep(0.1)
    assert not browsers_of(leader)


def browsers_of(group: int) -> list[str]:
    """Processes of a browser in that process group, or started by that process."""
    listed = subprocess.run(["ps", "-eo", "pgid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    lines = (line.split(None, 2) for line in listed.splitlines())
    return [args for pgid, ppid, args in lines if str(group) in (pgid, ppid) and "--headless=new" in args]
