"""What is said of cores' answers, on answers made up: the arithmetic, the gates, and what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.arm64 import __main__ as command
from benchmarks.arm64.drift import SCHEMES, Answers, as_table, compare, failed_cores
from exporter.bundle import Goldens
from exporter.errors import InputError
from exporter.parity import Drive, Floor, GoldenLogits

VOCABULARY = 40
PREFILLS = (3, 2)
POSITIONS = 6
GATES = {"gate_mean_kl_nats": 1e-3, "gate_worst_kl_nats": 5e-3, "gate_decided_top1_agreement": 0.9}


@pytest.fixture
def expected() -> Tensor:
    return 3 * torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def goldens(expected: Tensor) -> Goldens:
    return Goldens(
        drive=Drive(ids=tuple(range(sum(PREFILLS) + POSITIONS - 2)), prefills=PREFILLS),
        logits=GoldenLogits.of(expected),
        floor=Floor(mean_kl_nats=1e-4, worst_kl_nats=5e-4),
        weight_sha256={},
        prompts=[],
        chats=[],
    )


@pytest.fixture
def manifest() -> dict[str, Any]:
    return {
        "model": {"name": "toy", "vocab_size": VOCABULARY},
        "target": "onnxruntime",
        "backend": "cpu",
        "precision": "int4",
        "parity": {"verdict": "passed", **GATES},
    }


def said(core: str, logits: Tensor, *, runtime: str = "onnxruntime 1.31.1") -> Answers:
    return Answers(core=core, about="", runtime=runtime, machine="aarch64", features=("asimd",), logits=logits)


def kl(p: Tensor, q: Tensor) -> list[float]:
    """Of two rows of logits at a time, by the definition."""
    found = []
    for one, other in zip(p.tolist(), q.tolist(), strict=True):
        a, b = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (one, other))
        found.append(sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)))
    return found


def test_a_core_that_says_what_the_reference_says_passes_and_one_that_does_not_fails(
    manifest: dict[str, Any], goldens: Goldens, expected: Tensor
) -> None:
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    report = compare(manifest, goldens, [said("near", expected + 1e-3 * noise), said("far", expected + noise)])
    assert failed_cores(report) == ["far"]
    near, far = report["cores"]
    assert (near["verdict"], near["reason"]) == ("passed", "")
    assert "mean KL is" in far["reason"]
    assert far["mean_kl_nats"] == pytest.approx(sum(kl(expected, expected + noise)) / POSITIONS, rel=1e-4)


@pytest.mark.parametrize(("gate", "bound"), [("mean", 1e-5), ("worst", 1e-5)])
def test_each_gate_of_the_bundle_is_held(
    manifest: dict[str, Any], goldens: Goldens, expected: Tensor, gate: str, bound: float
) -> None:
    logits = expected + 3e-2 * torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    assert not failed_cores(compare(manifest, goldens, [said("one", logits)]))
    manifest["parity"][f"gate_{gate}_kl_nats"] = bound
    assert failed_cores(compare(manifest, goldens, [said("one", logits)])) == ["one"]


def test_the_gate_on_the_first_choice_is_held(manifest: dict[str, Any], goldens: Goldens, expected: Tensor) -> None:
    manifest["parity"] |= {"gate_mean_kl_nats": 100.0, "gate_worst_kl_nats": 100.0}
    wrong = expected.clone()
    wrong[0, wrong[0].argmin()] = 20.0
    report = compare(manifest, goldens, [said("one", wrong)])
    assert "top-1 agreement" in report["cores"][0]["reason"]
    assert report["cores"][0]["top1_agreement"] == pytest.approx(1 - 1 / POSITIONS)


def test_an_answer_that_is_not_a_number_fails(manifest: dict[str, Any], goldens: Goldens, expected: Tensor) -> None:
    broken = expected.clone()
    broken[2, 3] = math.nan
    assert failed_cores(compare(manifest, goldens, [said("one", broken)])) == ["one"]


def test_each_two_cores_are_compared_over_whole_rows(
    manifest: dict[str, Any], goldens: Goldens, expected: Tensor
) -> None:
    a, c = expected.clone(), expected.clone()
    c[4, 7] += 0.25
    report = compare(manifest, goldens, [said("a", a), said("b", a.clone()), said("c", c)])
    assert [pair["cores"] for pair in report["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    same, other, again = report["pairs"]
    assert same == {
        "cores": ["a", "b"],
        "same_bits": True,
        "max_abs_logit_diff": 0.0,
        "mean_kl_nats": 0.0,
        "worst_kl_nats": 0.0,
        "top1_agreement": 1.0,
    }
    assert not other["same_bits"]
    assert other["max_abs_logit_diff"] == pytest.approx(0.25, rel=1e-5)
    assert other["worst_kl_nats"] == pytest.approx(max(kl(a, c)), rel=1e-4)
    assert other["mean_kl_nats"] == pytest.approx(sum(kl(a, c)) / POSITIONS, rel=1e-4)
    assert {**again, "cores": other["cores"]} == other


def test_no_time_is_told(manifest: dict[str, Any], goldens: Goldens, expected: Tensor) -> None:
    report = compare(manifest, goldens, [said("a", expected), said("b", expected)])
    names = set(re.findall(r'"(\w+)":', json.dumps(report)))
    assert "mean_kl_nats" in names
    assert not [name for name in names if re.search(r"latency|second|_m?s$|per_s|elapsed", name)]
    assert "tokens/s" not in as_table(report)


def test_the_table_names_cores_verdicts_and_drift(manifest: dict[str, Any], goldens: Goldens, expected: Tensor) -> None:
    report = compare(manifest, goldens, [said("x86-64", expected), said("cortex-a53", expected + 3)])
    report["arithmetic"] = {"x86-64": dict.fromkeys((scheme.value for scheme in SCHEMES), 2e-3)}
    table = as_table(report)
    assert re.search(r"^cortex-a53 +passed", table, re.MULTILINE)
    assert re.search(r"^x86-64 and cortex-a53 +3\.0e\+00", table, re.MULTILINE)
    assert "int8-per-block" in table


def test_a_bundle_that_was_not_proven_is_refused(manifest: dict[str, Any], goldens: Goldens, expected: Tensor) -> None:
    manifest["parity"]["verdict"] = "failed"
    with pytest.raises(InputError, match="own parity is failed, passed was expected"):
        compare(manifest, goldens, [said("a", expected)])


def test_two_releases_of_a_runtime_are_not_two_cores(
    manifest: dict[str, Any], goldens: Goldens, expected: Tensor
) -> None:
    answers = [said("a", expected), said("b", expected, runtime="onnxruntime 1.30.0")]
    with pytest.raises(InputError, match=r"onnxruntime 1\.30\.0, onnxruntime 1\.31\.1"):
        compare(manifest, goldens, answers)


def test_positions_that_are_missing_are_refused(manifest: dict[str, Any], goldens: Goldens, expected: Tensor) -> None:
    short = replace(said("a", expected), logits=expected[1:])
    with pytest.raises(InputError, match=re.escape("(5, 40), (6, 40) were expected")):
        compare(manifest, goldens, [short])


@pytest.mark.parametrize(("noise", "code"), [(0.0, 0), (1.0, 7)])
def test_the_command_says_7_where_a_core_misses_a_gate(
    manifest: dict[str, Any],
    goldens: Goldens,
    expected: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    noise: float,
    code: int,
) -> None:
    logits = expected + noise * torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    report = compare(manifest, goldens, [said("x86-64", expected), said("cortex-a76", logits)])
    monkeypatch.setattr(command, "measure", lambda *_words, **_more: report)
    monkeypatch.setattr(sys, "argv", ["arm64", "bundle", "--out", str(tmp_path / "out")])
    assert command.main() == code
    assert json.loads((tmp_path / "out" / "onnxruntime.json").read_text()) == report
    shown = capsys.readouterr()
    assert "cortex-a76" in shown.out
    assert ("error: cortex-a76 misses the bundle's gates" in shown.err) == bool(code)


def test_a_fault_on_the_way_has_its_own_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["arm64", str(tmp_path / "none")])
    assert command.main() == 3
    assert "no such folder" in capsys.readouterr().err
