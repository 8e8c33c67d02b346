"""Reports of one outcome: the same checks in every form, and nothing that breaks a form."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from exporter.bisect import Bisection, Parting
from exporter.bundle import Goldens
from exporter.checks import checks
from exporter.cli import app
from exporter.errors import InputError
from exporter.html import html
from exporter.junit import junit
from exporter.limits import Limits, check_limits
from exporter.markdown import markdown, workflow_commands
from exporter.model.graph import Node
from exporter.model.reference import FULL_PRECISION
from exporter.parity import Drive, Floor, GoldenLogits
from exporter.pipeline import Outcome
from exporter.report import ReportFiles, write_reports
from exporter.spec import Verdict

RUNNER = CliRunner()
NASTY = "a | b <script>\n100% \\, wrong: \x00 yes"


def manifest_of(**changes: Any) -> dict[str, Any]:
    parity = {
        **{"verdict": "passed", "runtime": "none", "positions": 3, "structure_max_abs_logit_diff": 2e-5},
        **{"gate_structure_max_abs": 1e-4, "structure_positions": 3, "mean_kl_nats": 1e-4, "floor_kl_nats": 1e-4},
        **{"top1_agreement": 1.0, "decided_top1_agreement": 1.0, "decided_positions": 3, "max_abs_logit_diff": 0.1},
        **{"gate_mean_kl_nats": 1e-3, "gate_worst_kl_nats": 1e-2, "gate_decided_top1_agreement": 0.0},
        **{"worst_kl_nats": 5e-3, "floor_worst_kl_nats": 1e-3},
        **{"kl_by_position_nats": [1e-4, 0.0, math.inf], "top1_missed": [1]},
    }
    manifest = {
        "model": {"name": "toy"},
        "precision": "int4",
        "files": [{"path": "model.onnx", "bytes": 2_000_000, "sha256": "x"}],
        "codes": {"verdict": "passed", "tensors": 3, "wrong": []},
        "parity": parity,
        "quality": {"verdict": "passed", "mean_kl_nats": 1e-2, "budget_mean_kl_nats": 5e-2},
        "latency": {
            **{"verdict": "passed", "load_s": 0.5, "time_to_first_token_ms": 10.0, "prefill_tokens_per_s": 100.0},
            **{"prefill_tokens_per_s_range": [90.0, 110.0], "decode_tokens_per_s": 20.0, "host": "here"},
            **{"decode_tokens_per_s_range": [19.0, 21.0], "prompt_tokens": 128, "decoded_tokens": 32},
            **{"threads": 2, "runs": 5, "decode_steps_ms": [52.0, 47.0, 50.0]},
        },
    }
    for kind, fields in changes.items():
        manifest[kind] = {**manifest[kind], **fields}
    return manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with goldens of three positions and one answer."""
    logits = torch.tensor([[3.0, 1.0], [1.0, 0.9], [5.0, 0.0]])
    prompt = {"text": NASTY, "ids": [1], "greedy_ids": [1, 0], "greedy_margins": [2.0, 0.1], "greedy_text": "x"}
    Goldens(
        drive=Drive(ids=(1, 0, 1, 0, 1), prefills=(2, 2)),
        logits=GoldenLogits.of(logits),
        floor=Floor(mean_kl_nats=1e-4, worst_kl_nats=1e-3),
        weight_sha256={},
        prompts=[prompt],
        chats=[],
    ).write(tmp_path)
    return tmp_path


def outcome_of(folder: Path, *, limits: Limits | None = None, **changes: Any) -> Outcome:
    manifest = manifest_of(**changes)
    return Outcome(
        target="onnxruntime", folder=folder, manifest=manifest, limits=check_limits(manifest, limits or Limits())
    )


def failing(folder: Path) -> Outcome:
    return outcome_of(
        folder,
        codes={"verdict": "failed", "wrong": ["w"], "reason": NASTY},
        parity={"verdict": "failed", "structure_max_abs_logit_diff": math.nan, "mean_kl_nats": 2e-3},
        quality={"verdict": "not measured", "mean_kl_nats": None, "reason": "no checkpoint"},
        limits=Limits(min_decode_tokens_per_s=30, max_size_mb=3),
    )


@pytest.mark.parametrize(
    ("limits", "name", "sentence"),
    [
        ({"max_mean_kl_nats": 5e-3}, "mean KL", "mean KL is 0.01 nats, at most 0.005 nats was wanted"),
        (
            {"min_decode_tokens_per_s": 20.5},
            "decode rate",
            "decode rate is 20 tokens/s, at least 20.5 tokens/s was wanted",
        ),
        ({"max_load_s": 0.1}, "load time", "load time is 0.5 s, at most 0.1 s was wanted"),
        ({"max_size_mb": 1.5}, "size", "size is 2 MB, at most 1.5 MB was wanted"),
    ],
)
def test_a_limit_that_is_missed_fails_with_8_and_both_figures(
    limits: dict[str, float], name: str, sentence: str, folder: Path
) -> None:
    outcome = outcome_of(folder, limits=Limits(**limits))
    assert {key: report.reason for key, report in outcome.limits.items()} == {name: sentence}
    assert outcome.exit_code == 8


def test_limits_that_are_met_to_the_digit_are_kept(folder: Path) -> None:
    limits = Limits(max_mean_kl_nats=1e-2, min_decode_tokens_per_s=20, max_load_s=0.5, max_size_mb=2)
    outcome = outcome_of(folder, limits=limits)
    assert {report.verdict for report in outcome.limits.values()} == {Verdict.PASSED}
    assert len(outcome.limits) == 4
    assert outcome.exit_code == 0


def test_a_limit_on_what_was_not_measured_has_failed(folder: Path) -> None:
    unmeasured = {"verdict": "not measured", "reason": "macOS only", "decode_tokens_per_s": None}
    outcome = outcome_of(folder, latency=unmeasured, limits=Limits(min_decode_tokens_per_s=1))
    assert outcome.exit_code == 8
    assert outcome.limits["decode rate"].reason == (
        "decode rate was not measured (macOS only), at least 1 tokens/s was wanted"
    )


def test_parity_is_graver_than_a_limit(folder: Path) -> None:
    assert failing(folder).exit_code == 7


def test_each_step_of_parity_is_a_check_of_its_own(folder: Path) -> None:
    rows = {row.name: row for row in checks(failing(folder))}
    assert rows["parity, structure"].verdict is Verdict.FAILED
    assert rows["parity, structure"].reason == "structure: logits differ by nan, at most 0.0001 was expected"
    assert rows["parity, shipped"].reason == "mean KL is 0.002 nats, at most 0.001 was expected"
    shipped_only = outcome_of(folder, parity={"verdict": "failed", "mean_kl_nats": 2e-3})
    verdicts = {row.name: row.verdict for row in checks(shipped_only)}
    assert (verdicts["parity, structure"], verdicts["parity, shipped"]) == (Verdict.PASSED, Verdict.FAILED)


def test_junit_counts_what_it_holds_and_survives_any_text(folder: Path) -> None:
    suite = ET.fromstring(junit([failing(folder)]).split("\n", 1)[1])[0]
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["8", "4", "0", "1"]
    assert len(suite.findall("testcase")) == 8
    assert len(suite.findall("testcase/failure")) == 4
    messages = {case.get("name"): case[0].get("message") for case in suite if case[0].tag != "system-out"}
    assert messages["codes"] == NASTY.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    assert messages["quality"] == "not measured: no checkpoint"


def test_a_refused_bundle_is_an_error_in_junit_and_a_row_elsewhere(folder: Path) -> None:
    outcome = Outcome(target="", folder=folder, error=InputError("model.onnx has bytes 3", hint="export again"))
    suite = ET.fromstring(junit([outcome]).split("\n", 1)[1])[0]
    assert [suite.get(name) for name in ("tests", "failures", "errors")] == ["1", "0", "1"]
    fault = suite.find("testcase/error")
    assert fault is not None
    assert (fault.get("type"), fault.get("message")) == ("InputError", "model.onnx has bytes 3")
    assert "| bundle | **failed** |  |  | model.onnx has bytes 3 |" in markdown([outcome])
    assert "model.onnx has bytes 3" in html([outcome])


def test_a_table_in_markdown_keeps_its_columns_whatever_a_reason_says(folder: Path) -> None:
    lines = markdown([failing(folder)]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert lines[0] == "### toy int4, onnxruntime: failed"
    assert "<script>" not in "".join(lines)


def test_annotations_are_one_line_each_with_their_properties_escaped(folder: Path) -> None:
    found = workflow_commands([failing(folder)])
    assert [command.split(" ")[0] for command in found] == ["::error"] * 3 + ["::notice", "::error"]
    assert found[0] == (
        f"::error file={folder}/manifest.json,title=toy int4%2C onnxruntime%3A codes::"
        "a | b <script>%0A100%25 \\, wrong: \x00 yes"
    )
    assert workflow_commands([outcome_of(folder)]) == []


def test_the_html_report_opens_without_a_network_and_is_the_same_each_time(folder: Path) -> None:
    outcome = failing(folder)
    page = html([outcome])
    assert page == html([outcome])
    assert page.count("<svg") == 6  # KL, margins, greedy margins, two ranges of latency, and its distribution
    assert re.search(r"17 %: 47 ms.*50 %: 50 ms.*83 %: 52 ms", page)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page.replace("&lt;script", ""))
    assert page.count('class="bad"') == 3  # the missed position twice, and the unclear choice
    ET.fromstring(page.split("\n", 1)[1].replace('<meta charset="utf-8">', "").replace(
        '<meta name="viewport" content="width=device-width">', ""
    ))  # fmt: skip


def test_the_html_report_shows_what_quantization_lost_where_that_is_known(folder: Path) -> None:
    errors = {"model.embed_tokens.weight": 1e-5, "model.layers.1.mlp.down_proj.weight": 2e-2}
    plain = outcome_of(folder)
    page = html([Outcome(target="x", folder=folder, manifest=plain.manifest, errors_by_tensor=errors)])
    assert "model.layers.1.mlp.down_proj.weight: 0.02" in page


def test_an_op_that_parts_fails_even_where_every_verdict_passed(folder: Path) -> None:
    parting = Parting(node=Node(op="silu", name="s", arguments=(), layer=1), difference=2e-3, call="decode")
    for partings, code, verdict in (([parting], 7, Verdict.FAILED), ([], 0, Verdict.PASSED)):
        bisection = Bisection(partings=partings, ops=9, arithmetic=FULL_PRECISION)
        outcome = replace(outcome_of(folder), bisection=bisection)
        assert outcome.exit_code == code
        (row,) = (row for row in checks(outcome) if row.name == "each op")
        assert (row.verdict, row.figure) == (verdict, f"{9 - len(partings)} of 9 as the reference")
        assert row.reason == ("layer 1, silu s is off by 2.0e-03 (decode)" if partings else "")
        assert f"Bisected: {bisection}" in html([outcome])


def test_all_reports_are_written_into_folders_that_are_made(folder: Path, tmp_path: Path) -> None:
    files = ReportFiles(
        junit=tmp_path / "a" / "j.xml", markdown=tmp_path / "b.md", html=tmp_path / "c.html", json_file=tmp_path / "d"
    )
    outcome = outcome_of(folder, limits=Limits(max_size_mb=1))
    write_reports([outcome], files)
    assert all(path is not None and path.stat().st_size for path in (files.junit, files.markdown, files.html))
    (written,) = json.loads((tmp_path / "d").read_text())
    assert written["limits"]["size"]["verdict"] == "failed"


def test_kl_by_position_has_the_mean_that_is_told_and_three_digits() -> None:
    expected = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    got = expected + 0.1 * torch.randn(40, 100, generator=torch.Generator().manual_seed(1))
    got[7, expected[7].argmin()] = 50.0
    figures = GoldenLogits.of(expected).figures(got)
    values = figures["kl_by_position_nats"]
    assert sum(values) / 40 == pytest.approx(figures["mean_kl_nats"], rel=5e-3)
    assert all(float(f"{value:.3g}") == value for value in values)
    assert 7 in figures["top1_missed"]
    assert len(figures["top1_missed"]) == round(40 * (1 - figures["top1_agreement"]))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max-mean-kl", "0.1"], "--max-mean-kl bounds quality, which needs the checkpoint"),
        (["--bisect"], "--bisect compares with the checkpoint"),
        (["--annotations", "--json"], "--annotations and --json both want stdout"),
    ],
)
def test_options_that_cannot_be_kept_are_refused_before_any_work(
    words: list[str], sentence: str, tmp_path: Path
) -> None:
    report = tmp_path / "junit.xml"
    result = RUNNER.invoke(app, ["validate", str(tmp_path / "no bundle"), "--junit", str(report), *words])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not report.exists()


@pytest.mark.parametrize(("environment", "words", "count"), [("true", [], 1), ("", [], 0), ("true", ["--json"], 0)])
def test_annotations_come_by_themselves_on_github_but_never_into_json(
    environment: str, words: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", environment)
    report = tmp_path / "junit.xml"
    result = RUNNER.invoke(app, ["validate", str(tmp_path / "no bundle"), "--junit", str(report), *words])
    assert result.exit_code == 3
    assert result.stdout.count("::error") == count
    assert 'errors="1"' in report.read_text()
