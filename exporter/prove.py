"""The proofs of one artifact, a few lines each: ``export`` asks them of what it made, ``validate`` of a bundle."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isnan
from pathlib import Path
from typing import Any

from torch import Tensor

from exporter.bundle import Goldens
from exporter.chat import GOLDEN_DATE, golden_chats
from exporter.codes import check_codes, weight_digests
from exporter.latency import measure_latency, not_measured
from exporter.memory import give_back_memory
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference, Weights
from exporter.parity import (
    FEW_DECODES,
    FLOOR_MULTIPLE,
    FLOOR_NOISE,
    Drive,
    Floor,
    GoldenLogits,
    Structure,
    all_at_once,
    check_parity,
    drive,
    judge,
    measure_floor,
    parity_not_measured,
    structure_bound,
    structure_figures,
)
from exporter.spec import Arithmetic, Artifact, Plan, Report, Verdict
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from targets.base import Target

GOLDEN_PROMPTS = ("The people of the United States", "In the beginning of the year")
GOLDEN_CHAT = "What news?"
GREEDY_TOKENS = 32
GREEDY_TOKENS_OF_LARGE = 8
"""Each may take a pass over all weights: see ``LARGE_PARAMETERS``. A golden answer tells its own length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the reference says along one drive, and how firmly it says it."""

    graph: Graph
    weights: Weights
    """What the reference was made from, to be asked again for the structure step."""
    drive: Drive
    shipped: Tensor
    """With the target's arithmetic: float32 ``[m, V]``."""
    floor: Floor


def ask_reference(graph: Graph, store: WeightStore, artifact: Artifact, steps: Drive) -> Answers:
    """Run the reference along ``steps``: as the target computes, and with the noise that gives the floor."""

    def answer(*, noise: float = 0.0, seed: int = 0) -> Tensor:
        reference = Reference(graph, store, artifact.arithmetic, noise=noise, seed=seed, keep_bytes=0)
        return all_at_once(reference, steps)

    shipped = answer()
    floor = measure_floor(answer, shipped, artifact=artifact)
    return Answers(graph=graph, weights=store, drive=steps, shipped=shipped, floor=floor)


def make_goldens(
    answers: Answers, *, graph: Graph, store: WeightStore, artifact: Artifact, tokenizer: Tokenizer
) -> Goldens:
    """What the bundle keeps of the reference: logits along the drive, greedy continuations, a digest per weight."""
    reference = Reference(graph, store, artifact.arithmetic)
    questions = {text: tokenizer.encode(text) for text in GOLDEN_PROMPTS}
    if tokenizer.chat_template:
        questions[GOLDEN_CHAT] = tokenizer.chat(GOLDEN_CHAT)
    questions = {text: ids for text, ids in questions.items() if len(ids) < artifact.context}
    most = GREEDY_TOKENS_OF_LARGE if artifact.spec.is_large else GREEDY_TOKENS
    greedy = reference.greedy_answers(
        list(questions.values()),
        counts=[min(most, artifact.context - len(ids)) for ids in questions.values()],
        stops=artifact.spec.eos_token_ids,
    )
    prompts = [
        {
            "text": text,
            "ids": ids,
            "greedy_ids": [token for token, _ in answer],
            "greedy_margins": [margin for _, margin in answer],
            "greedy_text": tokenizer.decode([token for token, _ in answer]),
        }
        for (text, ids), answer in zip(questions.items(), greedy, strict=True)
    ]
    return Goldens(
        drive=answers.drive,
        logits=GoldenLogits.of(answers.shipped),
        floor=answers.floor,
        weight_sha256=weight_digests(store),
        prompts=prompts,
        chats=_chats(tokenizer),
    )


def _chats(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if not tokenizer.chat_template:
        return []
    rendered = golden_chats(partial(tokenizer.render, date=GOLDEN_DATE))
    return [
        {"messages": list(messages), "text": text, "ids": tokenizer.encode_rendered(text)}
        for messages, text in rendered
    ]


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
    if reason := target.cannot_execute():
        decided = GoldenLogits.of(answers.shipped).decided_positions
        return parity_not_measured(
            reason, floor=answers.floor, decided=decided, artifact=artifact, runtime=target.runtime()
        )
    structure = _prove_structure(target, artifact, answers, graph=graph, store=store, plan=plan)
    with target.open(artifact, threads=plan.threads) as runner:
        got = drive(runner, answers.drive)
    return check_parity(
        expected=answers.shipped,
        got=got,
        structure=structure,
        floor=answers.floor,
        artifact=artifact,
        runtime=target.runtime(),
    )


def _prove_structure(
    target: Target, artifact: Artifact, answers: Answers, *, graph: Graph, store: WeightStore, plan: Plan
) -> Structure:
    """Part after part, with few tokens decoded where the model is large."""
    large = graph.spec.is_large
    steps = answers.drive.decoding(FEW_DECODES) if large else answers.drive
    found = []
    for ours, true in zip(
        *(target.structure_parts(whole, plan.scheme) for whole in (graph, answers.graph)), strict=True
    ):
        precisely = replace(FULL_PRECISION, angles=artifact.arithmetic.angles)
        expected = _answers_in(precisely, true, answers, steps)
        with (
            tempfile.TemporaryDirectory(prefix="llama-export-") as scratch,
            target.open_structure(artifact, graph=ours, store=store, plan=plan, scratch=Path(scratch)) as runner,
        ):
            difference = (drive(runner, steps) - expected).abs().max().item()
        if large:
            give_back_memory()
        allowed = structure_bound(artifact)
        if large and not difference <= allowed:
            moved = (_answers_in(precisely, true, answers, steps, noise=FLOOR_NOISE) - expected).abs().max().item()
            allowed = max(allowed, FLOOR_MULTIPLE * moved)
        found.append(Structure(max_abs_logit_diff=difference, allowed=allowed, positions=len(steps.positions)))
    return max(found, key=lambda one: inf if isnan(one.max_abs_logit_diff) else one.max_abs_logit_diff / one.allowed)


def _answers_in(arithmetic: Arithmetic, graph: Graph, answers: Answers, steps: Drive, *, noise: float = 0.0) -> Tensor:
    return all_at_once(Reference(graph, answers.weights, arithmetic, noise=noise, keep_bytes=0), steps)


def prove_parity_by_goldens(target: Target, artifact: Artifact, goldens: Goldens, *, threads: int) -> Report:
    """The shipped step of parity alone, against the logits that the bundle keeps."""
    if reason := target.cannot_execute():
        decided = goldens.logits.decided_positions
        return parity_not_measured(
            reason, floor=goldens.floor, decided=decided, artifact=artifact, runtime=target.runtime()
        )
    with target.open(artifact, threads=threads) as runner:
        got = drive(runner, goldens.drive)
    figures: dict[str, Any] = {
        "runtime": target.runtime(),
        **goldens.logits.figures(got),
        **structure_figures(None),
        **goldens.floor.figures(),
    }
    return judge(figures, artifact=artifact)


def prove_latency(target: Target, artifact: Artifact, *, ids: Sequence[int], threads: int) -> Report:
    reason = target.cannot_execute() or target.latency_unmeasurable()
    if reason:
        return not_measured(reason)
    with target.open(artifact, threads=threads) as runner:
        return measure_latency(runner, ids, context=artifact.context, threads=threads)
