"""A report to read and pass on: one HTML file with plots as inline SVG, which opens without a network."""

from __future__ import annotations

import html as markup
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.bundle import Goldens
from exporter.checks import checks, title, verdict_of
from exporter.latency import DECODE_STEPS
from exporter.parity import KL_BY_POSITION, MISSED
from exporter.spec import Verdict

if TYPE_CHECKING:
    from exporter.pipeline import Outcome

_CLEAR_MARGIN = 0.25
"""Logits, above which no processor may choose otherwise (``docs/bundle.md``, goldens.json)."""

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 12, 40
_SMALLEST = 1e-12
"""What a value counts as at least where the axis is logarithmic."""

_STYLE = """
:root { --ink: #1b1f24; --quiet: #667; --line: #d5d8de; --dot: #2563a8; --bad: #c62828; --good: #2e7d32; --page: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6ea; --quiet: #9aa; --line: #3a3f47; --dot: #6fa8e8; --bad: #ff7b72; --good: #7ac77f;
          --page: #15181c }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60em;
       margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .3em .8em .3em 0;
border-bottom: 1px solid var(--line); vertical-align: top }
svg { max-width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: var(--quiet) }
.passed { color: var(--good) } .failed { color: var(--bad); font-weight: bold } .not-measured { color: var(--quiet) }
.axis { stroke: var(--line) } .dot { fill: var(--dot) } .bad { fill: var(--bad) } .bound { stroke: var(--bad);
stroke-dasharray: 5 4 } figure { margin: 1.5em 0 } figcaption { color: var(--quiet) }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dot:
    x: float
    y: float
    label: str
    bad: bool = False


def html(outcomes: Sequence[Outcome]) -> str:
    """The whole document. The same outcomes give the same bytes."""
    body = "\n".join(_section(outcome) for outcome in outcomes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_text(', '.join(map(title, outcomes)))}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _section(outcome: Outcome) -> str:
    verdict = verdict_of(outcome)
    rows = "\n".join(
        f'<tr><td>{_text(row.name)}</td><td class="{_class(row.verdict)}">{row.verdict}</td>'
        f"<td>{_text(row.figure)}</td><td>{_text(row.bound)}</td><td>{_text(row.reason)}</td></tr>"
        for row in checks(outcome)
    )
    parts = [
        f'<h1>{_text(title(outcome))}: <span class="{_class(verdict)}">{verdict}</span></h1>',
        "<table>\n<tr><th>check</th><th>verdict</th><th>figure</th><th>bound</th><th>reason</th></tr>",
        f"{rows}\n</table>",
    ]
    if outcome.bisection:
        parts.append(f"<p>Bisected: {_text(str(outcome.bisection))}</p>")
    if outcome.manifest is not None and not outcome.error:
        goldens = Goldens.read(outcome.folder)
        parts += [*_parity_plots(outcome.manifest["parity"], goldens), _greedy_plot(goldens)]
        latency = outcome.manifest["latency"]
        parts += [_errors_plot(outcome), _latency_table(latency), _steps_plot(latency)]
    return "\n".join(part for part in parts if part)


def _parity_plots(parity: dict[str, Any], goldens: Goldens) -> list[str]:
    if KL_BY_POSITION not in parity:  # a device tells the mean and the worst alone
        return []
    positions, missed = goldens.drive.positions, set(parity[MISSED])
    logits = goldens.logits.top_logits
    margins = (logits[:, 0] - logits[:, 1]).tolist() if logits.shape[1] > 1 else []
    return [
        _plot(
            [
                _Dot(x=position, y=kl, label=f"position {position}: {kl:.3g} nats", bad=row in missed)
                for row, (position, kl) in enumerate(zip(positions, parity[KL_BY_POSITION], strict=True))
            ],
            caption=f"KL of the artifact from its reference by position, mean {parity['mean_kl_nats']:.2g} nats; red: "
            f"another token is the most likely ({len(missed)} of {len(positions)}); dashed: the gate of each position",
            labels=("position", "KL, nats"),
            log=True,
            bound=parity["gate_worst_kl_nats"],
        ),
        _plot(
            [
                _Dot(x=position, y=margin, label=f"position {position}: {margin:.3g}", bad=row in missed)
                for row, (position, margin) in enumerate(zip(positions, margins, strict=False))
            ],
            caption="How far the reference's best logit is above the second; red: the artifact prefers another token",
            labels=("position", "margin, logits"),
            log=True,
        ),
    ]


def _greedy_plot(goldens: Goldens) -> str:
    margins = [margin for prompt in goldens.prompts for margin in prompt["greedy_margins"]]
    names = [f"{prompt['text']!r}, token {n}" for prompt in goldens.prompts for n in range(len(prompt["greedy_ids"]))]
    return _plot(
        [
            _Dot(x=index, y=margin, label=f"{name}: {margin:.3g}", bad=margin < _CLEAR_MARGIN)
            for index, (margin, name) in enumerate(zip(margins, names, strict=True))
        ],
        caption="Greedy margins of the golden answers, one after the other; below the dashed line another processor "
        "may rightly choose otherwise",
        labels=("token of the golden answers", "margin, logits"),
        log=True,
        bound=_CLEAR_MARGIN,
    )


def _errors_plot(outcome: Outcome) -> str:
    """By layer; what lies in none, the embedding, stands at -1."""
    dots = []
    for name, error in outcome.errors_by_tensor.items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[:2] == ["model", "layers"] else -1
        dots.append(_Dot(x=layer, y=error, label=f"{name}: {error:.3g}"))
    return _plot(
        dots,
        caption="What quantization lost of each matrix, by layer: energy of the error over energy of its output on the "
        "calibration text, or of the weights where there is none; the embedding is at -1",
        labels=("layer", "relative error"),
        log=True,
    )


def _latency_table(latency: dict[str, Any]) -> str:
    if latency["verdict"] != Verdict.PASSED or "decode_tokens_per_s_range" not in latency:  # a device tells medians
        return ""
    rows = []
    for name in ("prefill", "decode"):
        median, (low, high) = latency[f"{name}_tokens_per_s"], latency[f"{name}_tokens_per_s_range"]
        at = [f"{240 * value / high:.1f}" for value in (low, median, high)]
        bar = (
            f'<svg viewBox="0 0 250 16" width="250" height="16"><line class="axis" x1="0" y1="8" x2="240" y2="8"/>'
            f'<line stroke="currentColor" x1="{at[0]}" y1="8" x2="{at[2]}" y2="8"/>'
            f'<circle class="dot" cx="{at[1]}" cy="8" r="4"/></svg>'
        )
        rows.append(
            f"<tr><td>{name}</td><td>{median:,.0f} tokens/s</td><td>{low:,.0f} to {high:,.0f}</td><td>{bar}</td></tr>"
        )
    caption = (
        f"Median and range of {latency['runs']} runs, {latency['prompt_tokens']} tokens read and "
        f"{latency['decoded_tokens']} written, {latency['threads']} threads, {_text(latency['host'])}; loaded in "
        f"{latency['load_s']:.3g} s, first token after {latency['time_to_first_token_ms']:.3g} ms"
    )
    return f"<figure><table>{''.join(rows)}</table><figcaption>{caption}</figcaption></figure>"


def _steps_plot(latency: dict[str, Any]) -> str:
    """The distribution of the time of a decoded token: nothing where only medians are told."""
    steps = sorted(latency.get(DECODE_STEPS, ()))
    return _plot(
        [
            _Dot(
                x=100 * (rank + 0.5) / len(steps),
                y=step,
                label=f"{100 * (rank + 0.5) / len(steps):.0f} %: {step:.3g} ms",
            )
            for rank, step in enumerate(steps)
        ],
        caption=f"The time of each of {len(steps)} decoded tokens, from the fastest to the slowest",
        labels=("share of the tokens that took no longer, %", "ms"),
        log=False,
    )


def _plot(dots: Sequence[_Dot], *, caption: str, labels: tuple[str, str], log: bool, bound: float | None = None) -> str:
    """A scatter plot as inline SVG; nothing where there is nothing finite to show."""
    shown = [dot for dot in dots if math.isfinite(dot.y)]
    if not shown:
        return ""
    levels = [dot.y for dot in shown] + ([bound] if bound is not None and math.isfinite(bound) else [])
    low, high = (_scaled(level, log=log) for level in (min(levels), max(levels)))
    low, high = (math.floor(low), math.ceil(high)) if log else (min(0.0, low), high)
    high = high if high > low else low + 1
    first, last = min(dot.x for dot in shown), max(dot.x for dot in shown)
    last = last if last > first else first + 1

    def across(x: float) -> float:
        return _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def down(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_scaled(y, log=log) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    drawn = []
    step = max(1, round((high - low) / 6)) if log else (high - low) / 4
    ticks = [low + step * index for index in range(int((high - low) / step + 1e-9) + 1)]
    for tick in ticks:
        y = down(10.0**tick if log else tick)
        drawn.append(f'<line class="axis" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        word = f"1e{tick:.0f}" if log else f"{tick:.3g}"
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{word}</text>')
    for x in sorted({round(first + (last - first) * part / 6) for part in range(7)}):
        if first <= x <= last:
            drawn.append(f'<text x="{across(x):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x}</text>')
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    drawn.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{_text(labels[0])}</text>')
    turned = f'transform="rotate(-90 14 {middle})"'
    drawn.append(f'<text x="14" y="{middle}" text-anchor="middle" {turned}>{_text(labels[1])}</text>')
    if bound is not None and math.isfinite(bound):
        y = down(bound)
        drawn.append(f'<line class="bound" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
    for dot in sorted(shown, key=lambda one: one.bad):
        kind, radius = ("bad", 3.5) if dot.bad else ("dot", 2.5)
        drawn.append(
            f'<circle class="{kind}" cx="{across(dot.x):.1f}" cy="{down(dot.y):.1f}" r="{radius}">'
            f"<title>{_text(dot.label)}</title></circle>"
        )
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">'
    return f"<figure>{picture}{''.join(drawn)}</svg><figcaption>{_text(caption)}</figcaption></figure>"


def _scaled(value: float, *, log: bool) -> float:
    return math.log10(max(value, _SMALLEST)) if log else value


def _class(verdict: Verdict) -> str:
    return verdict.value.replace(" ", "-")


def _text(words: str) -> str:
    """Safe in elements and attributes, without the control characters that no document may hold."""
    return markup.escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", words))
