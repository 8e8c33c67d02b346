"""A cache of int8, in an ExecuTorch program and in an ONNX graph: proven as any artifact is, and seen to fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed::*)
from typer.testing import CliRunner

import targets
from benchmarks.bench_report import spec_of
from benchmarks.shapes import SHAPES
from exporter.checkpoint import BUNDLED_MODEL
from exporter.checkpoint.config import read_spec
from exporter.cli import app
from exporter.errors import InputError
from exporter.model.graph import Graph
from exporter.model.ops import attend, attention
from exporter.model.reference import round_activations
from exporter.model.static import round_cached, with_static_caches
from exporter.model.trace import trace
from exporter.spec import Activations, Precision, WeightScheme
from targets.footprint import footprint

RUNNER = CliRunner()
ROOT = Path(__file__).parents[2]
INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)


def run(*words: object) -> Any:
    return RUNNER.invoke(app, [str(word) for word in words])


def rounded(x: Tensor) -> Tensor:
    return round_activations(x, Activations.INT8_PER_TOKEN, group_size=1)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 40.0])
def test_rounding_is_that_of_the_programs_kernels(spread: float) -> None:
    """torch's own definition of the two ops that the program calls, for each head of a token."""
    x = spread * torch.randn(1, 5, 3, 64, generator=torch.Generator().manual_seed(0))
    library = torch.ops.quantized_decomposed
    scales, zero_points = library.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = library.quantize_per_token(x, scales, zero_points, -128, 127, torch.int8)
    decoded = (codes.double() - zero_points) * scales
    assert (rounded(x) - decoded).abs().max() <= 1e-6 * spread
    assert (x - decoded).abs().max() > 1e-3 * spread


def test_what_is_rounded_once_is_attended_to_as_any_other() -> None:
    """Without rotation, rounding inside is rounding before."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 4, heads * 16, generator=generator) for heads in (4, 2, 2))
    empty = torch.zeros(1, 2, 0, 16)
    sizes = (4, 2, 0.25, 0, 0)
    inside = attend(q, k, v, empty, empty, None, *sizes, rounded=lambda *given: tuple(map(rounded, given)))
    by_head = [rounded(x.unflatten(2, (-1, 16))).flatten(2) for x in (q, k, v)]
    before = attention(*by_head, empty, empty, None, *sizes)
    for one, other in zip(inside, before, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(inside[0], attention(q, k, v, empty, empty, None, *sizes)[0])


@pytest.mark.toolchain
def test_a_static_cache_holds_and_attends_to_what_the_reference_says() -> None:
    """GroupQueryAttention on the CPU: its codes are ours to the bit, in a prefill and after it, clipped ones too."""
    heads, kv_heads, size, context = 4, 2, 32, 16
    generator = torch.Generator().manual_seed(2)
    scales = [0.005 + 0.03 * torch.rand(kv_heads, size, generator=generator) for _ in range(2)]
    session = attention_over_codes(heads, kv_heads, scales)
    cached = [np.zeros((1, kv_heads, context, size), dtype=np.int8) for _ in range(2)]
    past = [torch.zeros(1, kv_heads, 0, size) for _ in range(2)]
    for length in (5, 1, 3):
        q, k, v = (torch.randn(1, length, n * size, generator=generator) for n in (heads, kv_heads, kv_heads))
        expected, *past = attend(
            *(q, k, v, *past, None, heads, kv_heads, size**-0.5, 0, 0),
            rounded=lambda q, k, v: (q, round_cached(k, scales[0]), round_cached(v, scales[1])),
        )
        total = past[0].shape[2]
        names = ("q", "k", "v", "past_k", "past_v", "last", "total")
        given = [*(x.numpy() for x in (q, k, v)), *cached, np.array([total - 1], np.int32), np.array(total, np.int32)]
        context_found, *cached = session.run(None, dict(zip(names, given, strict=True)))
        for codes, values, by_channel in zip(cached, past, scales, strict=True):
            held = torch.from_numpy(codes)[:, :, :total]
            assert torch.equal(held * by_channel.unsqueeze(1), values)
            assert held.amax() == 127
            assert held.amin() == -128
        assert (torch.from_numpy(context_found) - expected).abs().max() < 1e-5


def attention_over_codes(heads: int, kv_heads: int, scales: list[Tensor]) -> Any:
    import onnxruntime
    from onnx import TensorProto as Kind
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
    from onnx.numpy_helper import from_array

    inputs = ["q", "k", "v", "past_k", "past_v", "last", "total", *[""] * 5, "k_scale", "v_scale"]
    kinds = [*[Kind.FLOAT] * 3, *[Kind.INT8] * 2, *[Kind.INT32] * 2]
    ranks = [3, 3, 3, 4, 4, 1, 0]
    node = make_node(
        *("GroupQueryAttention", inputs, ["context", "present_k", "present_v"]),
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
        kv_cache_bit_width=8,
    )
    graph = make_graph(
        [node],
        "attention",
        [make_tensor_value_info(n, k, [None] * r) for n, k, r in zip(inputs, kinds, ranks, strict=False)],
        [make_tensor_value_info(n, k, None) for n, k in zip(node.output, (kinds[0], *kinds[3:5]), strict=True)],
        [from_array(s.flatten().numpy(), name) for s, name in zip(scales, inputs[-2:], strict=True)],
    )
    opsets = [make_opsetid("", 21), make_opsetid("com.microsoft", 1)]
    model = make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_static_cache_without_ranges_is_refused() -> None:
    graph = trace(read_spec(BUNDLED_MODEL))
    with pytest.raises(InputError, match=r"needs the range of every key and value, but .* has none"):
        with_static_caches(graph, {})


def test_the_cache_takes_a_third_or_a_quarter() -> None:
    spec = spec_of(SHAPES["1b"])
    for target, share in (("executorch", (64 + 5) / 256), ("onnxruntime", 1 / 4)):
        floats, int8 = (
            footprint(target, spec, INT4, context=2048, kv_cache=kind).parts for kind in (None, Precision.INT8)
        )
        (cache,) = (part for part in floats if "cache" in part.name)
        (small,) = (part for part in int8 if "cache" in part.name)
        assert small.size_bytes / cache.size_bytes == pytest.approx(share)


@pytest.mark.parametrize("target", ["coreml", "onnxruntime-wasm"])
def test_a_runtime_without_such_a_cache_is_named(target: str, tmp_path: Path) -> None:
    result = run("-t", target, "--kv-cache", "int8", "-o", tmp_path / "out", "--calibration", "none")
    assert result.exit_code == 2
    assert f"target {target}: it has no cache of int8; those that have: executorch, onnxruntime" in result.stderr
    result = run("-t", "executorch", "--kv-cache", "int4", "-o", tmp_path / "out")
    assert "--kv-cache int4 is unknown; known: int8" in result.stderr


@pytest.mark.parametrize("more", [["--calibration", "none"], ["-p", "fp16"]])
def test_scales_that_nothing_would_measure_are_refused(more: list[str], tmp_path: Path) -> None:
    result = run("-t", "onnxruntime", "--kv-cache", "int8", "-o", tmp_path / "out", *more)
    assert result.exit_code == 2
    assert "has scales here that a calibration text gives, and nothing is calibrated" in result.stderr


@pytest.fixture(scope="module", params=["executorch", "onnxruntime"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("int8-cache")
    found = Exported(target=request.param, folder=folder)
    result = run(*found.words("out"), "--json")
    assert result.exit_code == 0, result.output
    return found


@dataclass(frozen=True, kw_only=True)
class Exported:
    target: str
    folder: Path

    def words(self, out: str) -> list[object]:
        common = ["-t", self.target, "--kv-cache", "int8", "-c", "192", "--threads", "1"]
        text, held_apart = (BUNDLED_MODEL / f"{use}.txt" for use in ("calibration", "evaluation"))
        few = ["--calibration", text, "--eval-text", held_apart, "--windows", 4, "--window-length", 128]
        calibration = few if self.target == "onnxruntime" else ["--calibration", "none"]
        return [*common, *calibration, "-o", self.folder / out, "--store", self.folder / "store"]

    @property
    def bundle(self) -> Path:
        return self.folder / "out" / self.target


@pytest.mark.toolchain
def test_it_is_proven_told_and_proven_again(exported: Exported, sample: Path) -> None:
    manifest = json.loads((exported.bundle / "manifest.json").read_text())
    assert manifest["scheme"]["kv_dtype"] == {"executorch": "int8", "onnxruntime": "int8-static"}[exported.target]
    assert {manifest[kind]["verdict"] for kind in ("codes", "parity", "quality", "latency")} == {"passed"}
    store = exported.folder / "store"
    result = run("validate", exported.bundle, "--against", sample, "--store", store, "--json")
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)[0]["manifest"]
    assert again["quality"] == manifest["quality"]
    assert again["parity"]["mean_kl_nats"] == pytest.approx(manifest["parity"]["mean_kl_nats"])
    assert 'kv-cache = "int8"' in (exported.bundle / "recipe.toml").read_text()


@pytest.mark.toolchain
def test_wrong_scales_fail_parity(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as are never written, and such as are those of half the range."""
    from targets.executorch import outer
    from targets.onnxruntime import lower

    def unscaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, zero_points, scales = int8(x)
        return codes, zero_points, torch.ones_like(scales)

    def halved(graph: Graph, caches: Any) -> Graph:
        return static(graph, {name: [[x / 2 for x in row] for row in rows] for name, rows in caches.items()})

    int8, static = outer._int8, lower.with_static_caches
    monkeypatch.setattr(outer, "_int8", unscaled)
    monkeypatch.setattr(lower, "with_static_caches", halved)
    result = run(*exported.words("wrong"), "--json")
    assert result.exit_code == 7
    parity = json.loads(result.stdout)[0]["manifest"]["parity"]
    assert parity["verdict"] == "failed"
    assert parity["structure_max_abs_logit_diff"] < 1e-4  # which has a cache of floats


@pytest.mark.toolchain
def test_generating_needs_nothing_more(exported: Exported) -> None:
    result = run("generate", exported.bundle, "The people of the United States", "--max-tokens", "8", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["ids"]) == 8
    assert targets.load(exported.target).cannot_execute() is None


@pytest.mark.toolchain
def test_the_sample_for_python_keeps_it_as_the_model_wants_it(exported: Exported) -> None:
    if exported.target != "onnxruntime":
        pytest.skip("the sample runs ONNX Runtime")
    code = (
        "import sys; from pathlib import Path\n"
        "from llamabundle.bundle import Bundle; from llamabundle.model import Model\n"
        "from llamabundle.selftest import answer_goldens, compare\n"
        "bundle = Bundle.open(Path(sys.argv[1])); goldens = bundle.goldens()\n"
        "print(compare(goldens, answer_goldens(Model(bundle, threads=1), goldens))['mean_kl_nats'])\n"
    )
    manifest = json.loads((exported.bundle / "manifest.json").read_text())
    words = [sys.executable, "-c", code, str(exported.bundle)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "samples" / "python")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= manifest["parity"]["gate_mean_kl_nats"]
