"""Two bundles of one model, side by side: what changed, and whether it got worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporter.bundle import open_bundle
from exporter.errors import BudgetError, InputError, ParityError, gravest
from exporter.limits import Tolerance, bundle_bytes
from exporter.parity import shipped_faults, structure_faults
from exporter.spec import Verdict

_FACTS = ("precision", "scheme", "context", "logits", "prefer", "target", "backend", "calibration", "tools")
_FIGURES = {
    "parity": ("structure_max_abs_logit_diff", "mean_kl_nats", "worst_kl_nats", "floor_kl_nats", "top1_agreement"),
    "quality": ("mean_kl_nats", "p99_kl_nats", "top1_agreement", "perplexity"),
    "latency": ("load_s", "time_to_first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s"),
}
_RESULTS_OF_A_RUN = ("seconds",)
"""Of the calibration: differs each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that the manifests say differently; None: that one does not say it."""

    name: str
    old: Any
    new: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    old: float | None
    new: float | None

    @property
    def ratio(self) -> float | None:
        return self.new / self.old if self.old and self.new is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    changes: list[Change]
    figures: list[Figure]
    parity_lost: list[str] = field(default_factory=list)
    """What is worse about answering as the model does: a sentence each."""
    budget_lost: list[str] = field(default_factory=list)
    """What is worse about quality, size or speed: a sentence each."""

    @property
    def exit_code(self) -> int:
        lost = ((self.parity_lost, ParityError), (self.budget_lost, BudgetError))
        return gravest(error.exit_code for sentences, error in lost if sentences)

    def to_json(self) -> dict[str, Any]:
        return {
            "exit_code": self.exit_code,
            "changes": [asdict(change) for change in self.changes],
            "figures": [{**asdict(figure), "ratio": figure.ratio} for figure in self.figures],
            "parity_lost": self.parity_lost,
            "budget_lost": self.budget_lost,
        }


def compare(old: Path, new: Path, tolerance: Tolerance) -> Comparison:
    """Both bundles with every byte checked. Raises InputError where one is not whole, or they are of two models."""
    before, after = open_bundle(old), open_bundle(new)
    try:
        return compare_manifests(before, after, tolerance)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the manifest of {old} or {new} is not as an export writes it: {type(error).__name__} {error}",
            hint="export the bundle again",
        ) from error


def compare_manifests(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: Tolerance) -> Comparison:
    """The same of two manifests. Raises InputError where they are of two models."""
    if old["source"]["sha256"] != new["source"]["sha256"]:
        raise InputError(
            f"the bundles are of two checkpoints: {_source(old)}, and {_source(new)}",
            hint="compare bundles of one checkpoint; another model is another matter",
        )
    return Comparison(
        changes=[*_changed_facts(old, new), *_changed_files(old, new)],
        figures=[*_figures(old, new)],
        parity_lost=[*_lost_verdicts(old, new, kinds=("codes", "parity")), *_missed_gate(new)],
        budget_lost=[
            *_lost_verdicts(old, new, kinds=("quality", "latency")),
            *_worse_quality(old["quality"], new["quality"], share=tolerance.kl_growth),
            *_worse_size(old, new, share=tolerance.size_growth),
            *_worse_rates(old["latency"], new["latency"], share=tolerance.rate_loss),
        ],
    )


def _source(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['model']['name']} with sha256 {manifest['source']['sha256'][:16]}..."


def _changed_facts(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    before, after = (
        {name: value for key in ("model", *_FACTS) for name, value in _leaves(manifest.get(key), key)}
        for manifest in (old, new)
    )
    for name in [*before, *(name for name in after if name not in before)]:
        if before.get(name) != after.get(name):
            yield Change(name=name, old=before.get(name), new=after.get(name))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        if key not in _RESULTS_OF_A_RUN:
            yield from _leaves(inner, f"{name}.{key}")


def _changed_files(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    """By content; the sizes are told."""
    before, after = ({entry["path"]: entry for entry in manifest["files"]} for manifest in (old, new))
    for path in sorted(before.keys() | after.keys()):
        entries = (before.get(path), after.get(path))
        digests = [entry and entry["sha256"] for entry in entries]
        if digests[0] != digests[1]:
            sizes = [entry and f"{entry['bytes']:,} bytes" for entry in entries]
            yield Change(name=f"files.{path}", old=sizes[0], new=sizes[1])


def _figures(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Figure]:
    yield Figure(name="size_bytes", old=bundle_bytes(old), new=bundle_bytes(new))
    for kind, names in _FIGURES.items():
        for name in names:
            yield Figure(name=f"{kind}.{name}", old=old[kind].get(name), new=new[kind].get(name))


def _lost_verdicts(old: Mapping[str, Any], new: Mapping[str, Any], *, kinds: tuple[str, ...]) -> Iterator[str]:
    """Whatever failed now; what was proven and is no longer measured was lost as well, but for latency, which another
    host may not be able to tell."""
    for kind in kinds:
        before, after = old[kind]["verdict"], new[kind]["verdict"]
        lost = before == Verdict.PASSED and after == Verdict.NOT_MEASURED and kind != "latency"
        if after == Verdict.FAILED or lost:
            yield f"{kind} was {before} and is {after}: {new[kind].get('reason', 'no reason is given')}"


def _missed_gate(new: Mapping[str, Any]) -> Iterator[str]:
    """A verdict is a word that anybody can write; the figure is looked at, too."""
    parity = new["parity"]
    if parity["verdict"] == Verdict.PASSED:
        yield from (f"parity: {fault}" for fault in (*structure_faults(parity), *shipped_faults(parity)))


def _worse_quality(old: Mapping[str, Any], new: Mapping[str, Any], *, share: float) -> Iterator[str]:
    """By more than two 95 % intervals that do not touch."""
    if old["mean_kl_nats"] is None or new["mean_kl_nats"] is None:
        return
    allowed = old["mean_kl_nats_interval"][1] + share * old["mean_kl_nats"]
    if new["mean_kl_nats_interval"][0] > allowed:
        low, high = new["mean_kl_nats_interval"]
        yield (
            f"quality: mean KL was {old['mean_kl_nats']:.2g} nats and is {new['mean_kl_nats']:.2g} "
            f"({low:.2g} to {high:.2g}), at most {allowed:.2g} is explained by chance"
        )


def _worse_size(old: Mapping[str, Any], new: Mapping[str, Any], *, share: float) -> Iterator[str]:
    before, after = bundle_bytes(old), bundle_bytes(new)
    if after > before * (1 + share):
        yield f"size: {after / 1e6:.2f} MB after {before / 1e6:.2f}, {share:.0%} more is allowed"


def _worse_rates(old: Mapping[str, Any], new: Mapping[str, Any], *, share: float) -> Iterator[str]:
    """By ranges that do not touch, on one host with as many threads; figures of two hosts are not compared."""
    if any(old.get(fact) != new.get(fact) for fact in ("host", "threads")):
        return
    for name in ("prefill", "decode"):
        before, after = (report.get(f"{name}_tokens_per_s_range") for report in (old, new))
        if before is None or after is None:
            continue
        low, high = before[0], after[1]
        allowed = low - share * old[f"{name}_tokens_per_s"]
        if high < allowed:
            yield (
                f"{name}: {new[f'{name}_tokens_per_s']:,.0f} tokens/s, at best {high:,.0f}, after "
                f"{old[f'{name}_tokens_per_s']:,.0f}, at worst {low:,.0f}"
            )
