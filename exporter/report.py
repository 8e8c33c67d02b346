"""Figures as a person or a script reads them: tables on stdout, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from exporter.checks import audit_figure
from exporter.files import written_whole
from exporter.latency import DECODE_STEPS
from exporter.parity import KL_BY_POSITION, MISSED
from exporter.spec import Verdict
from exporter.terminal import open_console

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint
    from exporter.compare import Comparison
    from exporter.pipeline import Outcome

_STYLES = {Verdict.PASSED: "green", Verdict.FAILED: "bold red", Verdict.NOT_MEASURED: "yellow"}

_LISTS = (KL_BY_POSITION, MISSED, DECODE_STEPS)
"""Figures for plots, too long for a table."""
_KINDS = ("codes", "parity", "quality", "latency")


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """One target as a JSON object: where it lies, its exit code, and its manifest or its error."""
    result: dict[str, Any] = {
        "target": outcome.target,
        "folder": str(outcome.folder),
        "exit_code": outcome.exit_code,
    }
    if outcome.error:
        result["error"] = {"message": str(outcome.error), "hint": outcome.error.hint}
    if outcome.manifest:
        result["manifest"] = dict(outcome.manifest)
    if outcome.limits:
        result["limits"] = {name: report.to_json() for name, report in outcome.limits.items()}
    if outcome.bisection:
        result["bisection"] = str(outcome.bisection)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles:
    """Where the outcome of ``validate`` is to be written, beside what is printed; None: nowhere."""

    junit: Path | None = None
    markdown: Path | None = None
    html: Path | None = None
    json_file: Path | None = None


def write_reports(outcomes: Sequence[Outcome], files: ReportFiles) -> None:
    """Each of ``files`` whole or not at all; its folder is made where there is none."""
    from exporter.html import html
    from exporter.junit import junit
    from exporter.markdown import markdown

    def as_json(outcomes: Sequence[Outcome]) -> str:
        return json.dumps([outcome_json(outcome) for outcome in outcomes], indent=2) + "\n"

    makers = ((files.junit, junit), (files.markdown, markdown), (files.html, html), (files.json_file, as_json))
    for path, make in makers:
        if path is not None:
            with written_whole(path) as temporary:
                temporary.write_text(make(outcomes), encoding="utf-8")


def print_annotations(outcomes: Sequence[Outcome]) -> None:
    """GitHub workflow commands, each a line of its own, for what is not green."""
    from exporter.markdown import workflow_commands

    for command in workflow_commands(outcomes):
        print(command)


def print_outcomes(outcomes: list[Outcome]) -> None:
    """A row per target with its verdicts and main figures, then the reason of each verdict that is not green."""
    console = open_console()
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)  # three targets fit 80 columns
    for heading in ("target", *_KINDS):
        table.add_column(heading, no_wrap=True)
    for heading in ("MB", "mean KL", "prefill/s", "decode/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    reasons = []
    for outcome in outcomes:
        manifest = outcome.manifest
        if manifest is None:
            table.add_row(outcome.target, "[bold red]no artifact[/]")
            continue
        verdicts = [_verdict(manifest[kind]["verdict"]) for kind in _KINDS]
        size = sum(entry["bytes"] for entry in manifest["files"] if entry["path"].startswith(("model", "vision"))) / 1e6
        latency = manifest["latency"]
        table.add_row(
            outcome.target,
            *verdicts,
            f"{size:.2f}",
            _number(manifest["quality"]["mean_kl_nats"], "{:.1e}"),
            _number(latency["prefill_tokens_per_s"], "{:,.0f}"),
            _number(latency["decode_tokens_per_s"], "{:,.0f}"),
        )
        reasons += [
            f"{outcome.target}: {kind} {manifest[kind]['verdict']}: {manifest[kind]['reason']}"
            for kind in (*_KINDS, "audit", "images")
            if kind in manifest and manifest[kind].get("reason")
        ]
    console.print(table)
    for outcome in outcomes:
        if outcome.manifest:
            for line in _proof_lines(outcome):
                console.print(line, highlight=False, soft_wrap=True, markup=False)
    for outcome in outcomes:
        reasons += [
            f"{outcome.target}: limit {report.verdict}: {report.reason}"
            for report in outcome.limits.values()
            if report.reason
        ]
        if outcome.bisection:
            reasons.append(f"{outcome.target}: bisected: {outcome.bisection}")
    for reason in reasons:
        console.print(reason, highlight=False, soft_wrap=True)
    for outcome in outcomes:
        console.print(f"{outcome.target}: {outcome.folder}", highlight=False, soft_wrap=True)


def print_comparison(found: Comparison) -> None:
    """Figures side by side, then what changed, then what got worse."""
    console = open_console()
    figures = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("figure", "old", "new", "ratio"):
        figures.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in found.figures:
        figures.add_row(
            figure.name,
            *(_number(value, "{:.4g}") for value in (figure.old, figure.new)),
            _number(figure.ratio, "{:.3f}"),
        )
    console.print(figures)
    for change in found.changes:
        console.print(f"{change.name}: {change.old} -> {change.new}", highlight=False, soft_wrap=True, markup=False)
    for sentence in (*found.parity_lost, *found.budget_lost):
        console.print(f"worse: {sentence}", style="bold red", highlight=False, soft_wrap=True, markup=False)
    if not found.exit_code:
        console.print("no worse", highlight=False)


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ``inspect`` tells of a checkpoint: its figures, sizes and dtypes, from headers alone."""
    from collections import Counter
    from dataclasses import asdict

    from exporter.checkpoint import LazyCodes

    spec = checkpoint.spec
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()})
    codes = [f"{t.kind.source} {t.kind}" for t in checkpoint.tensors.values() if isinstance(t, LazyCodes) and t.kind]
    files = {file for tensor in checkpoint.tensors.values() for file in tensor.files}
    return {
        "kind": "checkpoint",
        "folder": str(checkpoint.folder),
        **asdict(spec),
        "parameters": spec.parameters,
        **({"left_out": checkpoint.left_out} if checkpoint.left_out else {}),
        "dtypes": dtypes,
        **({"codes": dict(Counter(codes))} if codes else {}),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


def print_facts(facts: Mapping[str, Any]) -> None:
    """Two columns, nested objects as dotted names."""
    table = Table(show_header=False, box=None)
    for name, value in _flatten(facts):
        table.add_row(name, str(value))
    open_console().print(table)


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{name}.")
        elif name == "files" and isinstance(value, list):
            rows += [(f"{prefix}files.{entry['path']}", f"{entry['bytes']:,} bytes") for entry in value]
        elif name not in _LISTS:
            rows.append((f"{prefix}{name}", value))
    return rows


def _proof_lines(outcome: Outcome) -> Iterator[str]:
    assert outcome.manifest is not None
    yield _parity_line(outcome, "parity")
    if "images" in outcome.manifest:
        yield _parity_line(outcome, "images")
    if audit := outcome.manifest.get("audit"):
        yield f"{outcome.target}: audit {audit['verdict']}: {audit_figure(audit)}"


def _parity_line(outcome: Outcome, kind: str) -> str:
    assert outcome.manifest is not None
    parity, name = outcome.manifest[kind], "parity" if kind == "parity" else "parity with an image"
    if parity["mean_kl_nats"] is None:
        return f"{outcome.target}: {name} not measured; {parity.get('runtime', parity.get('reason'))}"
    structure = parity["structure_max_abs_logit_diff"]
    told = "not run" if structure is None else f"{structure:.1e}"
    return (
        f"{outcome.target}: {name} over {parity['positions']} positions: structure {told}, "
        f"KL {parity['mean_kl_nats']:.1e} (floor {parity['floor_kl_nats']:.1e}), worst {parity['worst_kl_nats']:.1e}, "
        f"top-1 {parity['top1_agreement']:.1%}; {parity['runtime']}"
    )


def _verdict(value: str) -> str:
    return f"[{_STYLES[Verdict(value)]}]{value}[/]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
