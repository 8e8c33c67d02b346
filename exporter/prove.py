"""The proofs of one artifact, a few lines each: ``export`` asks them of what it made, ``validate`` of a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from exporter.bundle import Goldens
from exporter.codes import check_codes, weight_digests
from exporter.latency import measure_latency, not_measured
from exporter.metrics import kl_divergence
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.parity import FLOOR_NOISE, Drive, GoldenLogits, all_at_once, check_parity, drive, judge
from exporter.spec import Artifact, Plan, Report, Verdict
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from targets.base import Target

GOLDEN_PROMPTS = ("The people of the United States", "In the beginning of the year")
GOLDEN_CHAT = "What news?"
GREEDY_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the reference says along one drive, float32 ``[m, V]``, and how firmly it says it."""

    drive: Drive
    shipped: Tensor
    """With the target's arithmetic."""
    structure: Tensor
    """With the same codes and nothing else rounded."""
    floor_kl_nats: float


def ask_reference(graph: Graph, store: WeightStore, artifact: Artifact, steps: Drive) -> Answers:
    """Run the reference along ``steps``: as the target computes, unrounded, and with the noise that gives the floor."""
    shipped = all_at_once(Reference(graph, store, artifact.arithmetic), steps)
    noisy = all_at_once(Reference(graph, store, artifact.arithmetic, noise=FLOOR_NOISE), steps)
    return Answers(
        drive=steps,
        shipped=shipped,
        structure=all_at_once(Reference(graph, store, FULL_PRECISION), steps),
        floor_kl_nats=kl_divergence(shipped, noisy).mean().item(),
    )


def make_goldens(
    answers: Answers, *, graph: Graph, store: WeightStore, artifact: Artifact, tokenizer: Tokenizer
) -> Goldens:
    """What the bundle keeps of the reference: logits along the drive, greedy continuations, a digest per weight."""
    reference = Reference(graph, store, artifact.arithmetic)
    questions = {text: tokenizer.encode(text) for text in GOLDEN_PROMPTS}
    if tokenizer.chat_template:
        questions[GOLDEN_CHAT] = tokenizer.chat(GOLDEN_CHAT)
    prompts = []
    for text, ids in questions.items():
        room = artifact.context - len(ids)
        if room < 1:
            continue  # a context shorter than the prompt
        greedy = reference.greedy(ids, count=min(GREEDY_TOKENS, room), stops=artifact.spec.eos_token_ids)
        tokens = [token for token, _ in greedy]
        prompts.append(
            {
                "text": text,
                "ids": ids,
                "greedy_ids": tokens,
                "greedy_margins": [margin for _, margin in greedy],
                "greedy_text": tokenizer.decode(tokens),
            }
        )
    return Goldens(
        drive=answers.drive,
        logits=GoldenLogits.of(answers.shipped),
        floor_kl_nats=answers.floor_kl_nats,
        weight_sha256=weight_digests(store),
        prompts=prompts,
    )


def prove_codes(target: Target, artifact: Artifact, *, expected: Mapping[str, str]) -> Report:
    """Codes that do not even fit their scales are as wrong as codes that differ."""
    try:
        return check_codes(target.read_weights(artifact), expected=expected, scheme=artifact.scheme)
    except ValueError as error:
        figures = {"tensors": 0, "wrong": []}
        return Report(verdict=Verdict.FAILED, reason=f"the weights cannot be read back: {error}", figures=figures)


def prove_parity(
    target: Target, artifact: Artifact, answers: Answers, *, graph: Graph, store: WeightStore, plan: Plan
) -> Report:
    """Both steps of parity, against a reference that has the checkpoint's weights."""
    with (
        tempfile.TemporaryDirectory(prefix="llama-export-") as scratch,
        target.open_structure(artifact, graph=graph, store=store, plan=plan, scratch=Path(scratch)) as runner,
    ):
        structure = drive(runner, answers.drive)
    with target.open(artifact, threads=plan.threads) as runner:
        got = drive(runner, answers.drive)
    return check_parity(
        expected=answers.shipped,
        got=got,
        structure_max_abs=(structure - answers.structure).abs().max().item(),
        floor_kl_nats=answers.floor_kl_nats,
        artifact=artifact,
        runtime=target.runtime(),
    )


def prove_parity_by_goldens(target: Target, artifact: Artifact, goldens: Goldens, *, threads: int) -> Report:
    """The shipped step of parity alone, against the logits that the bundle keeps."""
    with target.open(artifact, threads=threads) as runner:
        got = drive(runner, goldens.drive)
    figures: dict[str, Any] = {
        "runtime": target.runtime(),
        **goldens.logits.figures(got),
        "structure_max_abs_logit_diff": None,
        "floor_kl_nats": goldens.floor_kl_nats,
    }
    return judge(figures, artifact=artifact)


def prove_latency(target: Target, artifact: Artifact, *, ids: Sequence[int], threads: int) -> Report:
    reason = target.latency_unmeasurable()
    if reason:
        return not_measured(reason)
    with target.open(artifact, threads=threads) as runner:
        return measure_latency(runner, ids, context=artifact.context, threads=threads)
