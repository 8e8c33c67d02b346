"""What is foreseen of an export, and what a named device decides: from a config alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import targets
from benchmarks.bench_report import parameters, spec_of
from benchmarks.shapes import SHAPES
from exporter.checkpoint.config import read_spec
from exporter.cli import app
from exporter.devices import FILE, find_device, load_devices
from exporter.errors import CapacityError, UsageError
from exporter.forecast import foresee, refuse_what_does_not_fit, serving
from exporter.planning import choices_of, plan, settle
from exporter.spec import Precision, Prefer, WeightScheme
from targets.footprint import footprint

RUNNER = CliRunner()
GIB = 2**30
INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
PHONE = "iphone-15-pro"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Nothing but the config of Llama-3.1-8B's shape."""
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES["8b"]))
    return folder


def run(*words: object) -> Any:
    return RUNNER.invoke(app, [str(word) for word in words])


ARTIFACTS_MB = {
    ("1b", "onnxruntime"): (879.9, {}),
    ("1b", "executorch"): (1075.0, {}),
    ("1b", "coreml"): (813, {}),
    ("3b", "executorch"): (2376.9, {}),
    ("8b", "onnxruntime"): (5447.9, {}),
    ("8b", "executorch"): (4980.0, {}),
    ("1b", "executorch, head int4"): (860.5, {"head": Precision.INT4, "embedding": Precision.INT4}),
    ("1b", "onnxruntime, groups of 128"): (788.7, {"group_size": 128}),
    ("1b", "executorch, int8"): (1502.2, {"body": Precision.INT8}),
}
"""Of artifacts that were made, docs/benchmarks.md."""


@pytest.mark.parametrize(("size", "name"), ARTIFACTS_MB)
def test_an_artifact_is_as_large_as_foreseen(size: str, name: str) -> None:
    measured, changes = ARTIFACTS_MB[size, name]
    scheme = replace(INT4, **changes)
    foreseen = footprint(name.partition(",")[0], spec_of(SHAPES[size]), scheme, context=2048)
    assert foreseen.artifact_bytes / 1e6 == pytest.approx(measured, rel=0.005)


RUNS_MIB = {
    ("1b", "onnxruntime"): (1671, {}, 2048),
    ("1b", "executorch"): (1489, {}, 2048),
    ("1b", "onnxruntime, int8"): (1887, {"body": Precision.INT8}, 2048),
    ("1b", "executorch, int8"): (1897, {"body": Precision.INT8}, 2048),
    ("1b", "onnxruntime, long"): (1775, {}, 4096),
    ("1b", "executorch, long"): (1884, {}, 4096),
    ("3b", "onnxruntime"): (3859, {}, 2048),
    ("3b", "executorch"): (3155, {}, 2048),
    ("8b", "onnxruntime"): (7262, {}, 2048),
    ("8b", "executorch"): (5904, {}, 2048),
}
"""What runs held at most beyond a bare process (benchmarks/bench.py)."""


@pytest.mark.parametrize(("size", "name"), RUNS_MIB)
def test_a_run_holds_what_was_foreseen(size: str, name: str) -> None:
    measured, changes, context = RUNS_MIB[size, name]
    label = name.partition(",")[0]
    foreseen = footprint(label, spec_of(SHAPES[size]), replace(INT4, **changes), context=context)
    assert foreseen.memory_bytes / 2**20 == pytest.approx(measured, rel=0.05)
    assert foreseen.compared


def test_a_token_reads_every_code_and_scale_but_the_embedding() -> None:
    count = parameters(SHAPES["8b"])
    read = footprint("executorch", spec_of(SHAPES["8b"]), INT4, context=16).token_bytes
    rows = SHAPES["8b"]["vocab_size"]
    assert read == (count["body"] * (4 + 16 / 32) + count["head"] * 8) / 8 + 4 * rows


def test_a_longer_context_costs_its_cache() -> None:
    spec = spec_of(SHAPES["8b"])
    short, long = (footprint("onnxruntime", spec, INT4, context=context) for context in (2048, 4096))
    assert long.memory_bytes - short.memory_bytes == 2048 * 2 * 32 * 8 * 128 * 4


@pytest.mark.parametrize("label", targets.LABELS)
def test_the_cache_is_counted_as_the_target_keeps_it(label: str) -> None:
    """Keys and values of 2,048 positions in the dtype of the target's own arithmetic."""
    spec = spec_of(SHAPES["1b"])
    scheme = replace(INT4, body=Precision.INT8)
    _, *_, cache = footprint(label, spec, scheme, context=2048).parts
    kept_as = targets.load(label).arithmetic(scheme).kv_dtype
    numbers = 2 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * 2048
    assert cache.size_bytes == numbers * {"fp32": 4, "fp16": 2}[kept_as]
    assert (kept_as == "fp16") == (label in ("coreml", "coreml-ane", "executorch-coreml", "onnxruntime-qnn", "gguf"))


def test_prefill_preferred_has_a_scale_for_each_row() -> None:
    spec, scheme = spec_of(SHAPES["1b"]), replace(INT4, body=Precision.INT8)
    sizes = [
        footprint("onnxruntime", spec, scheme, context=16, prefer=prefer).artifact_bytes
        for prefer in (Prefer.QUALITY, Prefer.PREFILL)
    ]
    assert sizes[1] < sizes[0]


def test_the_table_of_devices_is_whole() -> None:
    devices = load_devices()
    assert len(devices) >= 20
    for device in devices.values():
        assert device.kind in {"phone", "tablet", "computer", "board", "browser"}
        assert device.os in {"ios", "ipados", "android", "macos", "linux", "browser"}
        assert device.targets
        sizes = (device.app_bytes, device.app_bytes_entitled, device.ram_bytes)
        known = [size for size in sizes if size is not None]
        assert known == sorted(known), f"{device.slug}: an app gets no more with less"
        if device.bandwidth_bytes_per_s is not None:
            assert 10e9 < device.bandwidth_bytes_per_s < 1000e9
        for label in device.targets:
            assert label.split("-")[0] in targets.NAMES
            assert label.isascii()


def test_every_figure_of_a_device_has_its_source() -> None:
    """In a comment: on its line, or in the lines above it."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    figures = ("ram_bytes", "app_bytes", "app_bytes_entitled", "bandwidth_bytes_per_s")
    bare = [
        line
        for above, line in pairwise(lines)
        if line.split(" ")[0] in figures and "#" not in line and not above.startswith("#")
    ]
    assert bare == []


def test_no_key_is_unknown() -> None:
    assert set(tomllib.loads(FILE.read_text(encoding="utf-8"))) == set(load_devices())


def test_an_unknown_device_names_those_spelled_alike() -> None:
    with pytest.raises(UsageError) as caught:
        find_device("iphone15pro")
    assert "unknown device 'iphone15pro'; near:" in str(caught.value)
    assert "iphone-15-pro" in str(caught.value)


def test_a_device_decides_what_is_left_open_and_says_why(checkpoint: Path) -> None:
    choices, reasons = settle({"device": PHONE}, read_spec(checkpoint))
    assert choices == {"device": PHONE, "target": "coreml", "precision": "int4", "context": 2048}
    assert [reason.split(":")[0] for reason in reasons[:3]] == ["--target coreml", "--precision int4", "--context 2048"]
    assert reasons[3:] == ("needs iOS 18 or later; iPhone 15 Pro came with 17",)


def test_what_is_asked_for_stands(checkpoint: Path) -> None:
    asked = {"device": PHONE, "target": "executorch", "precision": "int8", "context": 1024}
    choices, reasons = settle(asked, read_spec(checkpoint))  # type: ignore[arg-type]
    assert choices == asked
    assert reasons == ("needs iOS 17 or later; iPhone 15 Pro came with 17",)


def test_a_small_model_is_stored_as_int8(sample: Path) -> None:
    choices, _ = settle({"device": PHONE}, read_spec(sample))
    assert choices["precision"] == "int8"


def test_a_context_that_does_not_fit_is_halved(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_spec(checkpoint)
    whole = footprint("executorch", spec, INT4, context=2048).memory_bytes
    device = replace(find_device(PHONE), app_bytes=None, app_bytes_entitled=whole - 1)
    monkeypatch.setattr("exporter.planning.find_device", lambda _: device)
    choices, reasons = settle({"device": PHONE, "target": "executorch"}, spec)
    assert choices["context"] == 1024
    assert "--context 1024: 2048 would not fit iPhone 15 Pro" in reasons


def test_a_backend_without_a_target_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="--backend says what runs inside a --target"):
        settle({"device": PHONE, "backend": "ane"}, read_spec(checkpoint))


def test_a_plan_for_a_device_is_told_again_by_its_recipe(checkpoint: Path) -> None:
    made = plan(checkpoint, device=PHONE, calibration="none")
    assert made.device == PHONE
    assert plan(checkpoint, **choices_of(made)) == made


def test_what_nothing_here_serves_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.errors import MissingToolError

    target = targets.load("coreml")
    monkeypatch.setattr(type(target), "missing", lambda _: "coremltools is not there: pip install coremltools")
    device = replace(find_device(PHONE), targets=("coreml", "tflite"))
    with pytest.raises(MissingToolError, match="nothing on this host serves iPhone 15 Pro: not coreml: coremltools"):
        serving(device)


def test_what_does_not_fit_is_refused_with_the_sum(checkpoint: Path) -> None:
    made = plan(checkpoint, device="iphone-13", calibration="none")
    device = find_device("iphone-13")
    with pytest.raises(CapacityError) as caught:
        refuse_what_does_not_fit(foresee(made, read_spec(checkpoint), device), device)
    assert str(caught.value).startswith("coreml: about 4.")
    assert "GiB are needed on iPhone 13, which has 2.0 GiB (what one app may use)" in str(caught.value)
    assert "weights 4.64 + key-value cache" in str(caught.value)


def test_plan_ends_with_5_where_it_does_not_fit(checkpoint: Path) -> None:
    result = run("plan", checkpoint, "--device", "iphone-13")
    assert result.exit_code == 5, result.output
    assert "does not fit" in result.stdout


def test_plan_needs_neither_device_nor_target(checkpoint: Path) -> None:
    found = json.loads(run("plan", checkpoint, "--json").stdout)
    assert [forecast["target"] for forecast in found["forecasts"]] == list(targets.COMPILED)
    assert {forecast["memory"]["fits"] for forecast in found["forecasts"]} == {None}


def test_plan_tells_the_sum_and_the_rate(checkpoint: Path) -> None:
    found = json.loads(run("plan", checkpoint, "--device", PHONE, "-t", "executorch", "--json").stdout)
    (forecast,) = found["forecasts"]
    memory = forecast["memory"]
    assert memory["bytes"] == sum(part["bytes"] for part in memory["parts"])
    least, most = forecast["decode_tokens_per_s_estimate"]
    assert least < most < forecast["decode_tokens_per_s_limit"]
    printed = run("plan", checkpoint, "--device", PHONE, "-t", "executorch").stdout
    assert "memory on the device" in printed
    assert "an estimate" in printed


def test_plan_is_told_in_seconds_and_loads_no_toolchain(checkpoint: Path) -> None:
    code = (
        "import sys; from exporter.cli import app\n"
        f"try: app(['plan', {str(checkpoint)!r}, '--device', {PHONE!r}])\nexcept SystemExit: pass\n"
        "heavy = {'transformers', 'onnx', 'onnxruntime', 'coremltools', 'executorch'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_devices_and_doctor_answer() -> None:
    assert PHONE in run("devices").stdout
    assert json.loads(run("devices", "--json").stdout)[0]["slug"] == "iphone-13"


@pytest.mark.toolchain
def test_doctor_tells_of_the_host_and_of_every_backend() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["host"]["memory_bytes"] > GIB
    assert len(found["backends"]) == len(targets.LABELS)
    assert "executorch" in run("doctor").stdout
