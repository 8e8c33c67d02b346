"""Short proofs of an artifact that is lowered outside of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.bundle import Verdicts, describe_bundle, open_bundle, read_artifact, write_manifest
from exporter.codes import weight_digests
from exporter.model.trace import trace
from exporter.parity import drive_for
from exporter.prove import ask_reference, prove_codes, prove_parity
from exporter.spec import Plan, Verdict
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from targets.base import Target


def manifest_of_proven(target: Target, store: WeightStore, plan: Plan, *, sample: Path) -> dict[str, Any]:
    """Lowers what ``store`` holds to ``plan.out``, sees codes and parity pass on the sample's evaluation text, and the
    artifact read again as it was; the manifest of the bundle."""
    graph = trace(store.checkpoint.spec)
    plan.out.mkdir()
    artifact = target.lower(graph, store, plan, plan.out)
    text = (sample / "evaluation.txt").read_text(encoding="utf-8")
    ids = Tokenizer(sample).encode(text)[:128]
    answers = ask_reference(graph, store, artifact, drive_for(ids, context=plan.context))
    codes = prove_codes(target, artifact, expected=weight_digests(store))
    parity = prove_parity(target, artifact, answers, graph=graph, store=store, plan=plan)
    assert (codes.verdict, parity.verdict) == (Verdict.PASSED, Verdict.PASSED), (codes, parity)
    verdicts = Verdicts(codes=codes, parity=parity, quality=parity, latency=parity)
    described = describe_bundle(
        plan.out, artifact=artifact, checkpoint=store.checkpoint, calibration={}, remarks=(), verdicts=verdicts
    )
    manifest = write_manifest(plan.out, described)
    assert read_artifact(open_bundle(plan.out), path=artifact.path) == artifact
    return manifest
