"""The parity verdict: the artifact answers as its reference does, over prefill, a rewind, and decode through the cache.

Two steps. *Structure*: the same lowering with activations unquantized must equal the reference to float noise.
*Shipped*: the artifact itself against the reference with the target's arithmetic, in KL, its mean and its worst
position each within ten times the measured floor: how far the reference moves when 1e-6 of noise is put on each of its
linears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from exporter.metrics import kl_divergence
from exporter.spec import Arithmetic, Artifact, Precision, Report, Verdict

STRUCTURE_MAX_ABS = 1e-4
STRUCTURE_MAX_ABS_FP16_STORAGE = 1e-3
FLOOR_MULTIPLE = 10.0
FLOOR_NOISE = 1e-6
FP16_NOISE = 2.0**-11
FLOOR_DRAWS = 8
"""Of a model with experts: two that are nearly as likely for a token may come out in either order, which moves that
position a thousand times as far as the others. Few positions have such a tie, so that one draw of noise may meet none
where an artifact does; and where the target computes in fp16 the noise is half a spacing of that."""
FP16_MEAN_KL_NATS = 1e-4
FP16_WORST_KL_NATS = 1e-3
FP16_POSITIONS_A_MISS = 200
"""The gates of ``docs/decisions/0003-parity-gates.md``, with what each was seen to catch. One position in 200 may be
missed, to the nearest position: top-1 of 99.5 %."""

FP16_SPACINGS = 2
"""fp16 keeps 11 bits: two logits nearer than two spacings of the best one may come out in either order."""

KL_BY_POSITION, MISSED = "kl_by_position_nats", "top1_missed"
"""Figures that are lists for plots, left out of tables: KL at each position, and the rows whose top-1 differs."""

_PREFILLS = (96, 17)
DECODES = 192
FEW_DECODES = 8
"""Where a decoded token takes seconds: the structure of a large model, and any run of one by an evaluator."""

TOP = 64
"""Logits kept at each golden position: the most likely ones, the rest told by logsumexp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drive:
    """A token sequence and how it is fed: two prefills, the second on a cache that is not empty and after a rewind,
    then one token at a time."""

    ids: tuple[int, ...]
    prefills: tuple[int, int]

    @property
    def positions(self) -> list[int]:
        """Where logits are compared: at the end of each prefill and at every decoded token."""
        first, second = self.prefills
        return [first - 1, *range(first + second - 1, len(self.ids))]

    def decoding(self, count: int) -> Drive:
        """The same one, with no more than ``count`` tokens decoded."""
        return replace(self, ids=self.ids[: sum(self.prefills) + count])


class Answering(Protocol):
    """What can be driven: a Runner, or the Reference."""

    def feed(self, ids: Sequence[int]) -> Tensor: ...

    def rewind(self, position: int) -> None: ...


def drive_for(ids: Sequence[int], *, context: int) -> Drive:
    """The longest drive that ``ids`` and ``context`` have room for: 96 + 17 tokens of prefill, up to 192 of decode."""
    length = min(len(ids), context, sum(_PREFILLS) + DECODES)
    first = min(_PREFILLS[0], max(1, length // 2))
    second = min(_PREFILLS[1], max(1, (length - first) // 2))
    return Drive(ids=tuple(ids[:length]), prefills=(first, second))


def drive(runner: Answering, steps: Drive) -> Tensor:
    """float32 logits ``[len(steps.positions), V]`` of an artifact, or of a reference fed in the same way."""
    first, second = steps.prefills
    runner.rewind(0)
    rows = [runner.feed(steps.ids[:first])[-1]]
    runner.feed(steps.ids[first : first + second])
    runner.rewind(first)
    rows.append(runner.feed(steps.ids[first : first + second])[-1])
    rows += [runner.feed([token])[-1] for token in steps.ids[first + second :]]
    return torch.stack(rows)


def all_at_once(reference: Answering, steps: Drive) -> Tensor:
    """The same logits from a reference that gives every position of one call: it needs no cache to be right."""
    reference.rewind(0)
    return reference.feed(steps.ids)[steps.positions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """How far the reference moves under ``FLOOR_NOISE``, in KL (nats): over all positions, and at the worst of them."""

    mean_kl_nats: float
    worst_kl_nats: float

    @classmethod
    def of(cls, kl: Tensor) -> Floor:
        """From KL at each position ``[m]``, or ``[draws, m]``."""
        return cls(mean_kl_nats=kl.mean().item(), worst_kl_nats=kl.max().item())

    def figures(self) -> dict[str, float]:
        return {"floor_kl_nats": self.mean_kl_nats, "floor_worst_kl_nats": self.worst_kl_nats}


def measure_floor(answer: Callable[..., Tensor], shipped: Tensor, *, artifact: Artifact) -> Floor:
    """How far a reference moves from the logits ``shipped`` ``[m, V]``: ``answer`` gives them again with ``noise`` and
    ``seed``, as often and with as much of it as the model and its target ask for."""
    experts = artifact.spec.experts is not None
    noise = FP16_NOISE if experts and in_fp16(artifact.arithmetic) else FLOOR_NOISE
    draws = range(FLOOR_DRAWS if experts else 1)
    return Floor.of(torch.stack([kl_divergence(shipped, answer(noise=noise, seed=seed)) for seed in draws]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What the shipped artifact has to keep."""

    mean_kl_nats: float
    worst_kl_nats: float
    """At any one position: the mean of many hides one that is wrong."""
    decided_top1_agreement: float


def gate(arithmetic: Arithmetic, *, floor: Floor, decided: int, routed: bool = False) -> Gate:
    """The bounds for a target that computes so, where the reference is ``decided`` at so many positions. fp16, in the
    arithmetic or in the cache, has its own, since the reference does not round there, but where a model is ``routed``,
    of experts, and its floor as high; all others have a multiple of the measured floor."""
    if in_fp16(arithmetic):
        floors = (floor.mean_kl_nats, floor.worst_kl_nats) if routed else (0.0, 0.0)
        return Gate(
            mean_kl_nats=max(FP16_MEAN_KL_NATS, FLOOR_MULTIPLE * floors[0]),
            worst_kl_nats=max(FP16_WORST_KL_NATS, FLOOR_MULTIPLE * floors[1]),
            decided_top1_agreement=(decided - _nearest(decided, FP16_POSITIONS_A_MISS)) / max(decided, 1),
        )
    return Gate(
        mean_kl_nats=FLOOR_MULTIPLE * floor.mean_kl_nats,
        worst_kl_nats=FLOOR_MULTIPLE * floor.worst_kl_nats,
        decided_top1_agreement=0.0,
    )


def in_fp16(arithmetic: Arithmetic) -> bool:
    """Whether a target rounds to fp16 where the reference does not: it knows no arithmetic of it, and a cache of it
    only where the products with it are fp16 too."""
    kept_unseen = arithmetic.kv_dtype == "fp16" and arithmetic.product_dtype != "fp16"
    return arithmetic.compute_dtype == "fp16" or kept_unseen


def _nearest(count: int, divisor: int) -> int:
    """``count / divisor``, rounded half up."""
    return (count + divisor // 2) // divisor


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What the structure step has found: of a model in parts, in the part that came nearest to its bound."""

    max_abs_logit_diff: float
    allowed: float
    positions: int


def structure_bound(artifact: Artifact) -> float:
    """How far the logits of the structure step may be from the reference's, for a model that is not large."""
    return STRUCTURE_MAX_ABS_FP16_STORAGE if artifact.scheme.body is Precision.FP16 else STRUCTURE_MAX_ABS


def structure_figures(structure: Structure | None) -> dict[str, float | int | None]:
    return {
        "structure_max_abs_logit_diff": structure.max_abs_logit_diff if structure else None,
        "gate_structure_max_abs": structure.allowed if structure else None,
        "structure_positions": structure.positions if structure else None,
    }


def check_parity(
    *,
    expected: Tensor,
    got: Tensor,
    structure: Structure | None,
    floor: Floor,
    artifact: Artifact,
    runtime: str,
) -> Report:
    """Judge the logits ``[m, V]`` of an artifact against its reference's. ``structure`` None: not run."""
    kl = kl_divergence(expected, got)
    figures: dict[str, Any] = {
        "runtime": runtime,
        "positions": len(expected),
        **structure_figures(structure),
        **_kl_figures(kl),
        **floor.figures(),
        **_top1_figures(expected.topk(2, dim=-1), got),
        "max_abs_logit_diff": (expected - got).abs().max().item(),
    }
    return judge(figures, artifact=artifact)


def parity_not_measured(reason: str, *, floor: Floor, decided: int, artifact: Artifact, runtime: str) -> Report:
    """Of an artifact that this host cannot run: every figure absent, and the gates that a device will be judged by."""
    absent = ("positions", "mean_kl_nats", "worst_kl_nats", "top1_agreement", "decided_top1_agreement")
    figures = {
        "runtime": runtime,
        **dict.fromkeys((*absent, "max_abs_logit_diff")),
        **structure_figures(None),
        **floor.figures(),
        **_gates(artifact, floor=floor, decided=decided),
    }
    return Report(verdict=Verdict.NOT_MEASURED, reason=reason, figures=figures)


def _gates(artifact: Artifact, *, floor: Floor, decided: int) -> dict[str, float]:
    routed = artifact.spec.experts is not None
    bounds = gate(artifact.arithmetic, floor=floor, decided=decided, routed=routed)
    return {
        "gate_mean_kl_nats": bounds.mean_kl_nats,
        "gate_worst_kl_nats": bounds.worst_kl_nats,
        "gate_decided_top1_agreement": bounds.decided_top1_agreement,
    }


def judge(figures: dict[str, Any], *, artifact: Artifact) -> Report:
    """Verdict on the figures, to which the gates are added; a figure that is not a number fails."""
    floor = Floor(mean_kl_nats=figures["floor_kl_nats"], worst_kl_nats=figures["floor_worst_kl_nats"])
    figures |= _gates(artifact, floor=floor, decided=figures["decided_positions"])
    faults = [*structure_faults(figures), *shipped_faults(figures)]
    return Report(verdict=Verdict.FAILED if faults else Verdict.PASSED, reason="; ".join(faults), figures=figures)


def structure_faults(figures: Mapping[str, Any]) -> list[str]:
    """What is wrong with the structure step of a parity report: a sentence, or nothing, as where it was not run."""
    structure, allowed = figures["structure_max_abs_logit_diff"], figures["gate_structure_max_abs"]
    if structure is None or structure <= allowed:
        return []
    return [f"structure: logits differ by {structure:.2g}, at most {allowed:.2g} was expected"]


def shipped_faults(figures: Mapping[str, Any]) -> list[str]:
    """What is wrong with the shipped step of a parity report, a sentence for each gate that it missed."""
    faults = []
    for name, what in (("mean_kl_nats", "mean KL"), ("worst_kl_nats", "KL at the worst position")):
        kl, allowed = figures[name], figures[f"gate_{name}"]
        if not kl <= allowed:
            faults.append(f"{what} is {kl:.2g} nats, at most {allowed:.2g} was expected")
    top1, wanted = figures["decided_top1_agreement"], figures["gate_decided_top1_agreement"]
    if not top1 >= wanted:
        faults.append(
            f"top-1 agreement where the reference is decided is {top1:.2%}, at least {wanted:.1%} was expected"
        )
    return faults


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenLogits:
    """What a bundle keeps of its reference's logits, enough to test the artifact with nothing else at hand.

    ``top_ids`` int32 ``[m, 64]``, ``top_logits`` float32 ``[m, 64]``, ``logsumexp`` float32 ``[m]`` over all of V.
    """

    top_ids: Tensor
    top_logits: Tensor
    logsumexp: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> GoldenLogits:
        top = logits.topk(min(TOP, logits.shape[1]), dim=-1)
        return cls(
            top_ids=top.indices.to(torch.int32), top_logits=top.values, logsumexp=torch.logsumexp(logits, dim=-1)
        )

    @property
    def decided_positions(self) -> int:
        return int(_decided(self.top_logits[:, :2]).sum())

    def figures(self, got: Tensor) -> dict[str, Any]:
        """KL of ``got`` ``[m, V]`` over the kept tokens and one bin for all others (never more than the whole KL)."""
        ids = self.top_ids.long()
        log_p = self.top_logits.double() - self.logsumexp.double().unsqueeze(1)
        log_q = torch.log_softmax(got.double(), dim=-1).gather(1, ids)
        rest_p, rest_q = (_log_rest(kept) for kept in (log_p, log_q))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=1) + rest_p.exp() * (rest_p - rest_q)
        kl = kl.clamp(min=0.0)
        return {
            "positions": len(ids),
            **_kl_figures(kl),
            **_top1_figures((self.top_logits[:, :2], ids[:, :2]), got),
            "max_abs_logit_diff": (got.gather(1, ids) - self.top_logits).abs().max().item(),
        }


def _kl_figures(kl: Tensor) -> dict[str, Any]:
    """Of KL at each position ``[m]``; by position to three digits, which is what a plot can show."""
    by_position = [float(f"{value:.3g}") for value in kl.tolist()]
    return {"mean_kl_nats": kl.mean().item(), "worst_kl_nats": kl.max().item(), KL_BY_POSITION: by_position}


def _top1_figures(best_two: tuple[Tensor, Tensor], got: Tensor) -> dict[str, Any]:
    """Agreement with the reference's ``best_two`` (logits and ids, each ``[m, 2]``), over all positions and over those
    at which the second best is further than fp16 can confuse."""
    logits, ids = best_two
    same, decided = got.argmax(dim=1) == ids[:, 0], _decided(logits)
    return {
        "top1_agreement": same.double().mean().item(),
        "decided_top1_agreement": same[decided].double().mean().item() if decided.any() else 1.0,
        "decided_positions": int(decided.sum()),
        MISSED: (~same).nonzero().flatten().tolist(),
    }


def _decided(best_two: Tensor) -> Tensor:
    """Positions, bool ``[m]``, at which fp16 cannot take the second best logit ``[m, 2]`` for the best."""
    spacing = torch.exp2(best_two[:, 0].abs().clamp(min=2.0**-14).log2().floor() - 10)  # of fp16 at that magnitude
    return best_two[:, 0] - best_two[:, 1] > FP16_SPACINGS * spacing


def _log_rest(log_kept: Tensor) -> Tensor:
    """Log of the probability that the kept tokens leave over, at least 1e-12 (float32 logits know no less)."""
    return (1.0 - log_kept.exp().sum(dim=1)).clamp(min=1e-12).log()
