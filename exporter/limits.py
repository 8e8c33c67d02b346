"""Limits beyond the gates of every bundle: what one app, or one CI job, can bear, of one bundle or of the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.spec import Report, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """None: no limit. Each is one option of ``validate``."""

    max_mean_kl_nats: float | None = None
    """Of quality: quantized against full precision."""
    min_decode_tokens_per_s: float | None = None
    """Of the median of all runs, on the host that validates."""
    max_load_s: float | None = None
    max_size_mb: float | None = None
    """MB (1e6 bytes) of all files that the manifest lists: what an app downloads."""


SIZE_GROWTH = 0.05
"""Share by which a bundle may grow: codes of one scheme have one size, and a tokenizer or goldens hardly matter; int4
groups of 32 in place of 64 are 6 % of the body with scales in bf16, and 11 % in float32."""
KL_GROWTH = 0.0
"""Share of the old mean KL that may be added to what both 95 % intervals explain."""
RATE_LOSS = 0.0
"""Share of the old median rate that may be lost beyond what both ranges of runs explain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How much worse a second bundle may be before ``diff`` calls it worse, as shares of the first one's figures."""

    size_growth: float = SIZE_GROWTH
    kl_growth: float = KL_GROWTH
    rate_loss: float = RATE_LOSS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One limit: what it bounds, and where that stands."""

    field: str
    name: str
    unit: str
    kind: str
    figure: str
    at_least: bool = False


_ROWS = (
    _Row(field="max_mean_kl_nats", name="mean KL", unit="nats", kind="quality", figure="mean_kl_nats"),
    _Row(
        field="min_decode_tokens_per_s",
        name="decode rate",
        unit="tokens/s",
        kind="latency",
        figure="decode_tokens_per_s",
        at_least=True,
    ),
    _Row(field="max_load_s", name="load time", unit="s", kind="latency", figure="load_s"),
    _Row(field="max_size_mb", name="size", unit="MB", kind="files", figure="bytes"),
)


def bundle_bytes(manifest: Mapping[str, Any]) -> int:
    """Of all files that the manifest lists."""
    return sum(int(entry["bytes"]) for entry in manifest["files"])


def check_limits(manifest: Mapping[str, Any], limits: Limits) -> dict[str, Report]:
    """A report for each limit that is set, by its name; one whose figure was not measured has failed, since somebody
    asked for it. Figures: ``found``, ``limit`` and ``unit``."""
    reports = {}
    for row in _ROWS:
        limit = getattr(limits, row.field)
        if limit is None:
            continue
        found = bundle_bytes(manifest) / 1e6 if row.kind == "files" else manifest[row.kind][row.figure]
        wanted = f"at {'least' if row.at_least else 'most'} {limit:.4g} {row.unit} was wanted"
        if found is None:
            kept, reason = False, f"{row.name} was not measured ({manifest[row.kind]['reason']}), {wanted}"
        else:
            kept = found >= limit if row.at_least else found <= limit
            reason = "" if kept else f"{row.name} is {found:.4g} {row.unit}, {wanted}"
        reports[row.name] = Report(
            verdict=Verdict.PASSED if kept else Verdict.FAILED,
            reason=reason,
            figures={"found": found, "limit": limit, "unit": row.unit, "at_least": row.at_least},
        )
    return reports
