"""What cores say of the same artifact: each one's answers by the bundle's own gates, and each two against each other.

Parity only. How long an emulated processor takes says nothing of a real one, so no time is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import targets
from exporter.bundle import Goldens, open_bundle, read_artifact
from exporter.errors import InputError
from exporter.metrics import kl_divergence, top1_agreement
from exporter.model.reference import Reference
from exporter.model.trace import trace
from exporter.parity import all_at_once, shipped_faults
from exporter.spec import Activations, Verdict

SCHEMA = "llama-export/core-drift/1"
GATES = ("mean_kl_nats", "worst_kl_nats", "decided_top1_agreement")

SCHEMES = [scheme for scheme in Activations if scheme is not Activations.STATIC_UINT16]
"""What a processor's kernels may do with activations; steps that are told beforehand no runtime for one takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one core said at the golden positions: float32 logits ``[m, V]``."""

    core: str
    about: str
    runtime: str
    machine: str
    features: tuple[str, ...]
    """Of the processor, as its system names them."""
    logits: Tensor


def compare(manifest: Mapping[str, Any], goldens: Goldens, answers: Sequence[Answers]) -> dict[str, Any]:
    """The report. Raises InputError for a bundle whose parity was not proven, and for answers of different releases of
    the runtime, or that are not one for each golden position: those would not tell of the cores."""
    parity = manifest["parity"]
    if parity["verdict"] != Verdict.PASSED:
        raise InputError(
            f"the bundle's own parity is {parity['verdict']}, passed was expected", hint="export the model again"
        )
    runtimes = sorted({one.runtime for one in answers})
    if len(runtimes) > 1:
        raise InputError(
            f"cores ran different runtimes: {', '.join(runtimes)}",
            hint="bring benchmarks/arm64/*.txt to the release that pyproject.toml names, or install that one",
        )
    wanted = (len(goldens.drive.positions), manifest["model"]["vocab_size"])
    for one in answers:
        if tuple(one.logits.shape) != wanted:
            raise InputError(
                f"{one.core} answered with logits {tuple(one.logits.shape)}, {wanted} were expected",
                hint="export the bundle again",
            )
    gates = {f"gate_{name}": parity[f"gate_{name}"] for name in GATES}
    return {
        "schema": SCHEMA,
        "model": manifest["model"]["name"],
        "target": manifest["target"],
        "backend": manifest["backend"],
        "precision": manifest["precision"],
        "runtime": runtimes[0],
        "positions": wanted[0],
        **gates,
        **goldens.floor.figures(),
        "cores": [_judge(one, goldens, gates) for one in answers],
        "pairs": [_drift(one, other) for one, other in itertools.combinations(answers, 2)],
    }


def _judge(one: Answers, goldens: Goldens, gates: Mapping[str, float]) -> dict[str, Any]:
    """A core against the golden logits, by the gates of the bundle."""
    figures = {name: value for name, value in goldens.logits.figures(one.logits).items() if not isinstance(value, list)}
    faults = shipped_faults({**figures, **gates})
    return {
        "core": one.core,
        "about": one.about,
        "machine": one.machine,
        "features": list(one.features),
        "verdict": (Verdict.FAILED if faults else Verdict.PASSED).value,
        "reason": "; ".join(faults),
        **figures,
    }


def _drift(one: Answers, other: Answers) -> dict[str, Any]:
    """Two cores against each other, over whole rows of logits. KL is of the first: KL(one || other)."""
    kl = kl_divergence(one.logits, other.logits)
    return {
        "cores": [one.core, other.core],
        "same_bits": torch.equal(one.logits, other.logits),
        "max_abs_logit_diff": (one.logits - other.logits).abs().max().item(),
        "mean_kl_nats": kl.mean().item(),
        "worst_kl_nats": kl.max().item(),
        "top1_agreement": top1_agreement(one.logits, other.logits).double().mean().item(),
    }


def failed_cores(report: Mapping[str, Any]) -> list[str]:
    """Those that miss a gate."""
    return [one["core"] for one in report["cores"] if one["verdict"] != Verdict.PASSED]


def find_arithmetic(
    bundle: Path, manifest: Mapping[str, Any], goldens: Goldens, answers: Sequence[Answers]
) -> dict[str, dict[str, float]]:
    """Mean KL of each core from references that round activations in one way each: core -> scheme -> nats.

    The reference has the codes that lie in the artifact. Where a core's kernels round otherwise than those that the
    artifact was made for, another row than the artifact's own is the nearest.
    """
    target = targets.load(targets.label(manifest["target"], manifest["backend"]))
    artifact = read_artifact(manifest, path=target.find(bundle))
    weights = dict(target.read_weights(artifact))
    graph = trace(artifact.spec)
    found: dict[str, dict[str, float]] = {one.core: {} for one in answers}
    for scheme in SCHEMES:
        arithmetic = replace(artifact.arithmetic, activations=scheme, head_activations=None)
        expected = all_at_once(Reference(graph, weights, arithmetic), goldens.drive)
        for one in answers:
            found[one.core][scheme.value] = kl_divergence(expected, one.logits).mean().item()
    return found


def open_checked(bundle: Path) -> tuple[dict[str, Any], Goldens]:
    """Manifest and goldens of a bundle whose every byte was checked. Raises InputError, also where the cores of this
    package could not execute its target."""
    manifest = open_bundle(bundle)
    label = targets.label(manifest["target"], manifest["backend"])
    if label not in ("onnxruntime", "executorch"):
        raise InputError(
            f"{bundle} is for {label}, onnxruntime or executorch on their default backends were expected",
            hint="export with --target onnxruntime",
        )
    return manifest, Goldens.read(bundle)


def as_table(report: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{report['model']} {report['precision']}, {report['runtime']}, {report['positions']} positions",
        f"gates: mean KL {report['gate_mean_kl_nats']:.1e} (floor {report['floor_kl_nats']:.1e}), worst "
        f"{report['gate_worst_kl_nats']:.1e} (floor {report['floor_worst_kl_nats']:.1e})",
        f"{'core':12} {'verdict':8} {'mean KL':>8} {'worst KL':>8} {'top-1':>7}  ",
    ]
    for one in report["cores"]:
        lines.append(
            f"{one['core']:12} {one['verdict']:8} {one['mean_kl_nats']:8.1e} {one['worst_kl_nats']:8.1e} "
            f"{one['top1_agreement']:7.1%}  {one['about']}"
        )
    lines += [f"{core:12} not measured: {why}" for core, why in report.get("not_measured", {}).items()]
    lines.append(f"{'between':25} {'max|dlogit|':>11} {'mean KL':>8} {'worst KL':>8} {'top-1':>7}")
    for pair in report["pairs"]:
        same = "  same bits" if pair["same_bits"] else ""
        lines.append(
            f"{' and '.join(pair['cores']):25} {pair['max_abs_logit_diff']:11.1e} {pair['mean_kl_nats']:8.1e} "
            f"{pair['worst_kl_nats']:8.1e} {pair['top1_agreement']:7.1%}{same}"
        )
    if arithmetic := report.get("arithmetic"):
        schemes = [scheme.value for scheme in SCHEMES]
        lines.append("mean KL from a reference that rounds activations as")
        lines.append(f"{'core':12} " + " ".join(f"{scheme:>24}" for scheme in schemes))
        for core, by_scheme in arithmetic.items():
            lines.append(f"{core:12} " + " ".join(f"{by_scheme[scheme]:24.1e}" for scheme in schemes))
    return "\n".join(lines)
