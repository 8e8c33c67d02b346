"""Two bundles side by side: each way to get worse, and what is no worse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from exporter.bundle import MANIFEST, SCHEMA, file_entries, write_json
from exporter.cli import app
from exporter.compare import compare_manifests
from exporter.limits import Tolerance

RUNNER = CliRunner()
OLD: dict[str, Any] = {
    "schema": SCHEMA,
    "model": {"name": "toy", "rope": {"theta": 1e4}},
    "source": {"sha256": "a" * 64},
    "precision": "int4",
    "scheme": {"weights": "int4", "group_size": 32},
    "context": 64,
    "logits": "last",
    "prefer": "quality",
    "target": "onnxruntime",
    "backend": "cpu",
    "calibration": {"algorithm": "rtn", "seconds": {"rounding": 1.0}},
    "files": [{"path": "model.onnx", "bytes": 1000, "sha256": "x"}],
    "codes": {"verdict": "passed"},
    "parity": {
        **{"verdict": "passed", "mean_kl_nats": 1e-4, "gate_mean_kl_nats": 1e-3, "top1_agreement": 1.0},
        **{"worst_kl_nats": 1e-3, "gate_worst_kl_nats": 1e-2, "structure_max_abs_logit_diff": None},
        **{"gate_structure_max_abs": None, "decided_top1_agreement": 1.0, "gate_decided_top1_agreement": 0.0},
    },
    "quality": {"verdict": "passed", "mean_kl_nats": 1e-2, "mean_kl_nats_interval": [0.9e-2, 1.1e-2]},
    "latency": {
        **{"verdict": "passed", "host": "here", "threads": 2},
        **{"prefill_tokens_per_s": 100.0, "prefill_tokens_per_s_range": [90.0, 110.0]},
        **{"decode_tokens_per_s": 20.0, "decode_tokens_per_s_range": [18.0, 22.0]},
    },
    "tools": {"torch": "2.13.0"},
}
SLOW = {"decode_tokens_per_s": 16.0, "decode_tokens_per_s_range": [15.0, 17.0]}
LOSSY = {"mean_kl_nats": 1.3e-2, "mean_kl_nats_interval": [1.2e-2, 1.4e-2]}


def changed(**changes: Any) -> dict[str, Any]:
    manifest = copy.deepcopy(OLD)
    for name, value in changes.items():
        manifest[name] = {**manifest[name], **value} if isinstance(value, dict) else value
    return manifest


def of_bytes(count: int) -> list[dict[str, Any]]:
    return [{"path": "model.onnx", "bytes": count, "sha256": "y"}]


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"parity": {"verdict": "failed", "reason": "mean KL is 1"}}, 7, "parity was passed and is failed: mean KL"),
        ({"parity": {"verdict": "not measured", "reason": "no host"}}, 7, "parity was passed and is not measured"),
        ({"codes": {"verdict": "failed", "reason": "w differs"}}, 7, "codes was passed and is failed: w differs"),
        ({"parity": {"mean_kl_nats": 2e-3}}, 7, "parity: mean KL is 0.002 nats, at most 0.001 was expected"),
        ({"parity": {"worst_kl_nats": 0.02}}, 7, "parity: KL at the worst position is 0.02 nats, at most 0.01"),
        ({"parity": {"mean_kl_nats": float("nan")}}, 7, "parity: mean KL is nan"),
        ({"quality": {"verdict": "failed", "reason": "over budget"}}, 8, "quality was passed and is failed"),
        ({"quality": LOSSY}, 8, "quality: mean KL was 0.01 nats and is 0.013 (0.012 to 0.014), at most 0.011"),
        ({"files": of_bytes(1051)}, 8, "size: 0.00 MB after 0.00, 5% more is allowed"),
        ({"latency": SLOW}, 8, "decode: 16 tokens/s, at best 17, after 20, at worst 18"),
    ],
)
def test_each_way_to_get_worse_is_told_with_its_exit_code(changes: dict[str, Any], code: int, sentence: str) -> None:
    found = compare_manifests(OLD, changed(**changes), Tolerance())
    assert found.exit_code == code
    (told,) = (*found.parity_lost, *found.budget_lost)
    assert told.startswith(sentence)


@pytest.mark.parametrize(
    "changes",
    [
        {"quality": {"mean_kl_nats": 1.15e-2, "mean_kl_nats_interval": [1.05e-2, 1.25e-2]}},
        {"files": of_bytes(1050)},
        {"latency": {"decode_tokens_per_s": 17.0, "decode_tokens_per_s_range": [15.0, 18.5]}},
        {"latency": {**SLOW, "host": "there"}},
        {"latency": {**SLOW, "threads": 1}},
        {"latency": {"verdict": "not measured", "decode_tokens_per_s": None, "decode_tokens_per_s_range": None}},
        {"parity": {"mean_kl_nats": 9e-4}},
        {"calibration": {"seconds": {"rounding": 9.0}}},
    ],
)
def test_what_chance_or_another_host_explains_is_no_worse(changes: dict[str, Any]) -> None:
    assert compare_manifests(OLD, changed(**changes), Tolerance()).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"quality": LOSSY}, {"kl_growth": 0.1}),
        ({"files": of_bytes(1100)}, {"size_growth": 0.1}),
        ({"latency": SLOW}, {"rate_loss": 0.05}),
    ],
)
def test_each_tolerance_can_be_widened(changes: dict[str, Any], tolerance: dict[str, float]) -> None:
    assert compare_manifests(OLD, changed(**changes), Tolerance()).exit_code == 8
    assert compare_manifests(OLD, changed(**changes), Tolerance(**tolerance)).exit_code == 0


def test_what_changed_is_told_by_dotted_name_and_seconds_are_not() -> None:
    new = changed(
        context=128,
        scheme={"group_size": 64},
        model={"rope": {"theta": 5e5}},
        calibration={"seed": 3, "seconds": {"rounding": 2.0}},
        files=of_bytes(900),
    )
    found = compare_manifests(OLD, new, Tolerance())
    assert {(change.name, change.old, change.new) for change in found.changes} == {
        ("context", 64, 128),
        ("scheme.group_size", 32, 64),
        ("model.rope.theta", 1e4, 5e5),
        ("calibration.seed", None, 3),
        ("files.model.onnx", "1,000 bytes", "900 bytes"),
    }
    ratios = {figure.name: figure.ratio for figure in found.figures}
    assert ratios["size_bytes"] == pytest.approx(0.9)
    assert ratios["quality.perplexity"] is None


def write_bundle(folder: Path, manifest: dict[str, Any], *, content: str = "x") -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_text(content)
    write_json(folder / MANIFEST, {**manifest, "files": file_entries(folder)})
    return folder


def test_the_command_prints_both_and_json_of_the_same(tmp_path: Path) -> None:
    old = write_bundle(tmp_path / "old", OLD)
    new = write_bundle(tmp_path / "new", changed(latency=SLOW))
    result = RUNNER.invoke(app, ["diff", str(old), str(new)])
    assert result.exit_code == 8, result.output
    assert "worse: decode: 16 tokens/s" in result.stdout
    result = RUNNER.invoke(app, ["diff", str(old), str(new), "--json"])
    assert result.exit_code == json.loads(result.stdout)["exit_code"] == 8
    result = RUNNER.invoke(app, ["diff", str(old), str(new), "--rate-loss", "0.1"])
    assert result.exit_code == 0
    assert "no worse" in result.stdout


def test_bundles_of_two_checkpoints_are_not_compared(tmp_path: Path) -> None:
    old = write_bundle(tmp_path / "old", OLD)
    new = write_bundle(tmp_path / "new", changed(source={"sha256": "b" * 64}))
    result = RUNNER.invoke(app, ["diff", str(old), str(new)])
    assert result.exit_code == 3
    assert "the bundles are of two checkpoints: toy with sha256 aaaaaaaaaaaaaaaa..." in result.stderr


def test_a_bundle_that_is_not_whole_is_not_compared(tmp_path: Path) -> None:
    old, new = write_bundle(tmp_path / "old", OLD), write_bundle(tmp_path / "new", OLD)
    (new / "model.onnx").write_text("y")
    result = RUNNER.invoke(app, ["diff", str(old), str(new)])
    assert result.exit_code == 3
    assert "model.onnx has sha256" in result.stderr


def test_a_manifest_without_its_figures_is_refused_in_a_sentence(tmp_path: Path) -> None:
    old = write_bundle(tmp_path / "old", OLD)
    new = write_bundle(tmp_path / "new", {**OLD, "quality": {}})
    result = RUNNER.invoke(app, ["diff", str(old), str(new)])
    assert result.exit_code == 3
    assert "is not as an export writes it: KeyError" in result.stderr
