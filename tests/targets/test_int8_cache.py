"""A cache of int8 in an ExecuTorch program: proven as any artifact is, and seen to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers quantized_decomposed::*)
from typer.testing import CliRunner

import targets
from benchmarks.bench_report import spec_of
from benchmarks.shapes import SHAPES
from exporter.cli import app
from exporter.model.ops import attend, attention
from exporter.model.reference import round_activations
from exporter.spec import Activations, Precision, WeightScheme
from targets.footprint import footprint

RUNNER = CliRunner()
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
    inside = attend(q, k, v, empty, empty, None, *sizes, rounded=rounded)
    by_head = [rounded(x.unflatten(2, (-1, 16))).flatten(2) for x in (q, k, v)]
    before = attention(*by_head, empty, empty, None, *sizes)
    for one, other in zip(inside, before, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(inside[0], attention(q, k, v, empty, empty, None, *sizes)[0])


def test_the_cache_takes_a_third() -> None:
    spec = spec_of(SHAPES["1b"])
    floats, int8 = (
        footprint("executorch", spec, INT4, context=2048, kv_cache=kind).parts[-1] for kind in (None, Precision.INT8)
    )
    assert int8.size_bytes / floats.size_bytes == pytest.approx((64 + 5) / 256)


@pytest.mark.parametrize("target", ["onnxruntime", "coreml"])
def test_a_runtime_without_such_a_cache_is_named(target: str, tmp_path: Path) -> None:
    result = run("-t", target, "--kv-cache", "int8", "-o", tmp_path / "out", "--calibration", "none")
    assert result.exit_code == 2
    assert f"target {target}: it has no cache of int8; those that have: executorch" in result.stderr
    result = run("-t", "executorch", "--kv-cache", "int4", "-o", tmp_path / "out")
    assert "--kv-cache int4 is unknown; known: int8" in result.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8-cache")
    result = run(*words(folder), "--json")
    assert result.exit_code == 0, result.output
    return folder


def words(folder: Path) -> list[object]:
    common = ["-t", "executorch", "--kv-cache", "int8", "-c", "192", "--threads", "1", "--calibration", "none"]
    return [*common, "-o", folder / "out", "--store", folder / "store"]


@pytest.mark.toolchain
def test_it_is_proven_told_and_proven_again(exported: Path, sample: Path) -> None:
    bundle = exported / "out" / "executorch"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["scheme"]["kv_dtype"] == "int8"
    assert {manifest[kind]["verdict"] for kind in ("codes", "parity", "quality", "latency")} == {"passed"}
    result = run("validate", bundle, "--against", sample, "--store", exported / "store", "--json")
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)[0]["manifest"]
    assert again["quality"] == manifest["quality"]
    assert again["parity"]["mean_kl_nats"] == pytest.approx(manifest["parity"]["mean_kl_nats"])
    assert 'kv-cache = "int8"' in (bundle / "recipe.toml").read_text()


@pytest.mark.toolchain
def test_scales_that_are_never_written_fail_parity(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from targets.executorch import outer

    def unscaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, zero_points, scales = int8(x)
        return codes, zero_points, torch.ones_like(scales)

    int8 = outer._int8
    monkeypatch.setattr(outer, "_int8", unscaled)
    result = run(*words(exported)[:-4], "-o", exported / "wrong", "--store", exported / "store", "--json")
    assert result.exit_code == 7
    parity = json.loads(result.stdout)[0]["manifest"]["parity"]
    assert parity["verdict"] == "failed"
    assert parity["structure_max_abs_logit_diff"] < 1e-4  # which has a cache of floats


@pytest.mark.toolchain
def test_generating_needs_nothing_more(exported: Path) -> None:
    bundle = exported / "out" / "executorch"
    result = run("generate", bundle, "The people of the United States", "--max-tokens", "8", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["ids"]) == 8
    assert targets.load("executorch").cannot_execute() is None
