"""The Swift package of samples/ios: its own tests, and its self-test driving a real artifact through a pipe.

LLAMA_BUNDLE names an ONNX bundle to be used in place of one made here.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import targets
from exporter.bundle import Goldens, open_bundle, read_artifact
from exporter.cli import app
from exporter.files import sha256
from exporter.parity import drive
from targets.base import Runner

pytestmark = [pytest.mark.swift, pytest.mark.timeout(1800)]

PACKAGE = Path(__file__).parents[2] / "samples" / "ios"
TOOLCHAIN = PACKAGE / "swift-toolchain.sh"

Wrap = Callable[[Runner], Any]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("LLAMA_BUNDLE"):
        return Path(given).resolve()
    out = tmp_path_factory.mktemp("swift")
    words = ["--target", "onnxruntime", "--calibration", "none", "--out", str(out), "--store", str(out / "store")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return out / "onnxruntime"


@pytest.fixture(scope="module", autouse=True)
def toolchain() -> None:
    """Skipped where no compiler is to be had, with the script's own reason."""
    run = subprocess.run([TOOLCHAIN], stderr=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        pytest.skip(run.stderr.strip())


@pytest.fixture(scope="module")
def self_test(toolchain: None, bundle: Path) -> Path:
    """The executable, built."""
    swift(["swift", "build", "--product", "SelfTestOverPipe"], bundle)
    found = swift(["swift", "build", "--show-bin-path"], bundle).stdout.strip()
    return Path(found) / "SelfTestOverPipe"


def swift(command: Sequence[str | Path], bundle: Path) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [TOOLCHAIN, "run", "--bind", bundle, *command],
        cwd=PACKAGE,
        env={**os.environ, "LLAMA_BUNDLE": str(bundle)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def run_over_pipe(program: Path, bundle: Path, report: Path, runner: Any) -> tuple[int, str]:
    """Answer the program's requests with ``runner`` until it ends; its exit code and what it said."""
    command = [TOOLCHAIN, "run", "--bind", bundle, program, bundle, report, "onnxruntime over a pipe"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        for line in process.stdout:
            process.stdin.write(json.dumps(answer(runner, json.loads(line))) + "\n")
            process.stdin.flush()
        said = process.stderr.read()
    return process.returncode, said


def answer(runner: Any, request: dict[str, Any]) -> dict[str, str]:
    if "rewind" in request:
        runner.rewind(request["rewind"])
        return {}
    logits = runner.feed(request["feed"])[-1]
    return {"logits": base64.b64encode(logits.numpy().astype("<f4").tobytes()).decode()}


class Swapped:
    """A runner whose every two neighbouring logits are exchanged."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.rewind = runner.rewind

    def feed(self, ids: Sequence[int]) -> Tensor:
        return self._runner.feed(ids).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def test_the_tests_of_the_package_pass(bundle: Path) -> None:
    said = swift(["swift", "test"], bundle)
    assert "with 0 failures" in said.stdout + said.stderr
    assert "skipped" not in said.stdout + said.stderr


def drive_both(program: Path, bundle: Path, report: Path, wrap: Wrap) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What the Swift program reports of an artifact, what the exporter says of it, and what the program said."""
    manifest = open_bundle(bundle)
    target = targets.load(manifest["target"])
    goldens = Goldens.read(bundle)
    with target.open(read_artifact(manifest, path=target.find(bundle)), threads=1) as runner:
        code, said = run_over_pipe(program, bundle, report, wrap(runner))
        assert code == 0, said
        figures = goldens.logits.figures(drive(wrap(runner), goldens.drive))
    expected = {name: value for name, value in figures.items() if not isinstance(value, list)}  # none by position
    return json.loads(report.read_text(encoding="utf-8")), expected, said


def test_figures_of_a_real_artifact_are_those_of_the_exporter(self_test: Path, bundle: Path, tmp_path: Path) -> None:
    report, expected, _ = drive_both(self_test, bundle, tmp_path / "device-report.json", lambda runner: runner)
    assert report["parity"] == pytest.approx(expected, rel=1e-6)
    assert report["schema"] == "llama-export/device-report/1"
    assert report["manifest_sha256"] == sha256(bundle / "manifest.json")
    assert report["greedy"]["compared"] == report["greedy"]["agreeing"] > 0
    assert report["greedy"]["prompts"] == len(Goldens.read(bundle).prompts)
    assert report["chats"] == {"compared": 5, "agreeing": 5}
    assert report["latency"]["decode_tokens_per_s"] > 0
    assert report["latency"]["load_s"] is None
    assert report["peak_memory_bytes"] is None
    assert report["device"]["runtime"] == "onnxruntime over a pipe"


def test_a_runner_with_exchanged_logits_is_found_out(self_test: Path, bundle: Path, tmp_path: Path) -> None:
    report, expected, said = drive_both(self_test, bundle, tmp_path / "device-report.json", Swapped)
    assert report["parity"] == pytest.approx(expected, rel=1e-6)
    assert report["parity"]["mean_kl_nats"] > 1
    assert report["greedy"]["agreeing"] < report["greedy"]["compared"]
    assert "mean KL is" in said


def test_a_broken_bundle_is_refused_by_name(self_test: Path, bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    code, said = run_over_pipe(self_test, copy, tmp_path / "report.json", None)
    assert code == 3
    assert f"model.onnx has SHA-256 {sha256(copy / 'model.onnx')}, its manifest says" in said
    assert not (tmp_path / "report.json").exists()


def test_a_runner_that_fails_is_told(self_test: Path, bundle: Path, tmp_path: Path) -> None:
    class Failing:
        def rewind(self, position: int) -> None: ...

        def feed(self, ids: Sequence[int]) -> Tensor:
            return torch.full((1, 2048), float("nan"))

    code, said = run_over_pipe(self_test, bundle, tmp_path / "report.json", Failing())
    assert code == 3
    assert "golden row 0 are not all finite" in said
