"""The checks of one outcome as rows that every report shows alike: name, verdict, figure, bound, reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.parity import shipped_faults, structure_faults
from exporter.spec import Verdict

if TYPE_CHECKING:
    from exporter.pipeline import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One row. ``figure`` and ``bound`` are ready to be read; empty where there is none."""

    name: str
    verdict: Verdict
    figure: str = ""
    bound: str = ""
    reason: str = ""


def checks(outcome: Outcome) -> list[Check]:
    """What was checked, in the order in which it was; of a bundle that was refused, that alone."""
    if outcome.error or outcome.manifest is None:
        return [Check(name="bundle", verdict=Verdict.FAILED, reason=str(outcome.error))]
    manifest = outcome.manifest
    files = manifest["files"]
    whole = Check(name="bundle", verdict=Verdict.PASSED, figure=f"{len(files)} files", bound="every checksum")
    rows = [whole, _codes(manifest["codes"])]
    if "audit" in manifest:
        rows.append(_audit(manifest["audit"]))
    rows += _parity(manifest["parity"], "parity")
    if "images" in manifest:
        rows += _parity(manifest["images"], "parity with an image")
    rows.append(_quality(manifest["quality"]))
    return [*rows, _latency(manifest["latency"]), *_bisection(outcome), *_limits(outcome)]


def verdict_of(outcome: Outcome) -> Verdict:
    """Of the whole bundle: passed where nothing failed, whatever could not be measured."""
    return Verdict.FAILED if outcome.exit_code else Verdict.PASSED


def title(outcome: Outcome) -> str:
    """What the bundle is, in a few words: ``tiny-llama int4, onnxruntime``."""
    if outcome.manifest is None:
        return outcome.folder.name
    return f"{outcome.manifest['model']['name']} {outcome.manifest['precision']}, {outcome.target}"


def _codes(report: Mapping[str, Any]) -> Check:
    wrong = len(report["wrong"])
    return Check(
        name="codes",
        verdict=Verdict(report["verdict"]),
        figure=f"{report['tensors'] - wrong} of {report['tensors']} tensors equal",
        bound="all",
        reason=report.get("reason", ""),
    )


def _audit(report: Mapping[str, Any]) -> Check:
    return Check(
        name="audit",
        verdict=Verdict(report["verdict"]),
        figure=audit_figure(report),
        reason=report.get("reason", ""),
    )


def audit_figure(report: Mapping[str, Any]) -> str:
    """Its figures that fit a line: numbers, words, and counts of no more than three things."""
    told = []
    for name, value in report.items():
        if name in ("verdict", "reason"):
            continue
        if isinstance(value, int | str):
            told.append(f"{name.replace('_', ' ')} {value}")
        elif isinstance(value, Mapping) and len(value) <= 3:
            counted = ", ".join(f"{count} x {what}" for what, count in value.items())
            told.append(f"{name.replace('_', ' ')} {counted or 'nothing'}")
    return "; ".join(told)


def _parity(report: Mapping[str, Any], name: str) -> Iterator[Check]:
    structure, shipped = f"{name}, structure", f"{name}, shipped"
    difference = report["structure_max_abs_logit_diff"]
    faults = []
    if difference is None:
        unmeasured = report["mean_kl_nats"] is None
        reason = report["reason"] if unmeasured else "the structure step needs the checkpoint: name it with --against"
        yield Check(name=structure, verdict=Verdict.NOT_MEASURED, reason=reason)
    else:
        faults = structure_faults(report)
        yield Check(
            name=structure,
            verdict=Verdict.FAILED if faults else Verdict.PASSED,
            figure=f"logits differ by {difference:.1e}",
            bound=f"{report['gate_structure_max_abs']:.1e}",
            reason="; ".join(faults),
        )
    if report["mean_kl_nats"] is None:
        yield Check(name=shipped, verdict=Verdict.NOT_MEASURED, reason=report["reason"])
        return
    broken = bool(faults)
    faults = shipped_faults(report)
    if report["verdict"] == Verdict.FAILED and not (faults or broken):  # a device has goldens of more kinds than logits
        faults = [report["reason"]]
    yield Check(
        name=shipped,
        verdict=Verdict.FAILED if faults else Verdict.PASSED,
        figure=f"mean KL {report['mean_kl_nats']:.1e} nats, worst {report['worst_kl_nats']:.1e}, "
        f"top-1 {report['top1_agreement']:.1%}",
        bound=f"{report['gate_mean_kl_nats']:.1e} nats, {report['gate_worst_kl_nats']:.1e}",
        reason="; ".join(faults),
    )


def _quality(report: Mapping[str, Any]) -> Check:
    measured = report["mean_kl_nats"] is not None
    return Check(
        name="quality",
        verdict=Verdict(report["verdict"]),
        figure=f"mean KL {report['mean_kl_nats']:.1e} nats" if measured else "",
        bound=f"{report['budget_mean_kl_nats']:.1e} nats" if measured else "",
        reason=report.get("reason", ""),
    )


def _latency(report: Mapping[str, Any]) -> Check:
    prefill, decode = report["prefill_tokens_per_s"], report["decode_tokens_per_s"]
    return Check(
        name="latency",
        verdict=Verdict(report["verdict"]),
        figure="" if prefill is None else f"prefill {prefill:,.0f} tokens/s, decode {decode:,.0f} tokens/s",
        reason=report.get("reason", ""),
    )


def _bisection(outcome: Outcome) -> Iterator[Check]:
    if outcome.bisection:
        parted = len(outcome.bisection.partings)
        yield Check(
            name="each op",
            verdict=Verdict.FAILED if parted else Verdict.PASSED,
            figure=f"{outcome.bisection.ops - parted} of {outcome.bisection.ops} as the reference",
            bound="all",
            reason=str(outcome.bisection) if parted else "",
        )


def _limits(outcome: Outcome) -> Iterator[Check]:
    for name, report in outcome.limits.items():
        found, limit, unit = (report.figures[key] for key in ("found", "limit", "unit"))
        yield Check(
            name=f"limit, {name}",
            verdict=report.verdict,
            figure="" if found is None else f"{found:.4g} {unit}",
            bound=f"{'at least' if report.figures['at_least'] else 'at most'} {limit:.4g} {unit}",
            reason=report.reason,
        )
