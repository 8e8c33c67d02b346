"""The two texts of a run: one to calibrate with, and one, held apart from it, to measure quality on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from calibration.corpus import overlap, read_corpus
from calibration.layers import CalibrationText
from calibration.selfwritten import write_windows
from exporter.checkpoint import BUNDLED_MODEL, Checkpoint, open_checkpoint
from exporter.errors import InputError, UsageError
from exporter.model.graph import Graph
from exporter.model.trace import trace
from exporter.quality import WINDOW_LENGTH, WINDOWS
from exporter.spec import ModelSpec, Plan, Progress, Sampling
from exporter.tokenizer import Tokenizer

BUNDLED_EVALUATION = BUNDLED_MODEL / "evaluation.txt"
LEAST_EVALUATION_TOKENS = 256
MOST_OVERLAP = 0.01
"""Of the evaluation text, in runs of 32 tokens that were calibrated on too. Set phrases of chats stay below it; a text
that was calibrated on does not, and would be measured too well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    calibration: CalibrationText | None
    """None: nothing is calibrated."""
    evaluation: list[int]
    overlap: float = 0.0
    """Share of the evaluation text that was calibrated on too."""


def read_texts(plan: Plan, *, checkpoint: Checkpoint, tokenizer: Tokenizer, graph: Graph, progress: Progress) -> Texts:
    """Read the corpus, if the plan names one, and the evaluation text: the one that is named, else text held apart from
    the corpus, else the bundled text. Raises InputError, also where the two overlap, and UsageError."""
    spec = checkpoint.spec
    sampling, evaluation_text = plan.sampling, plan.evaluation_text
    if not plan.scheme.body.bits or not plan.recipe.method.needs_text:
        return Texts(calibration=None, evaluation=_read_evaluation(evaluation_text, tokenizer, spec=spec))
    _refuse_long_windows(sampling, spec)
    if plan.corpus is None:
        if spec.head_tokens:  # whose answers are no text
            checkpoint = open_checkpoint(plan.checkpoint, adapter=plan.adapter, decoded=not plan.scheme.kept)
            graph = trace(checkpoint.spec)
        calibration = _self_written(
            sampling, checkpoint=checkpoint, tokenizer=tokenizer, graph=graph, progress=progress
        )
        return Texts(calibration=calibration, evaluation=_read_evaluation(evaluation_text, tokenizer, spec=spec))
    path: Path | Literal["-"] = "-" if plan.corpus == "-" else Path(plan.corpus)
    found = read_corpus(
        path,
        tokenizer,
        spec=spec,
        windows=sampling.windows,
        window_length=sampling.window_length,
        seed=sampling.seed,
        column=plan.corpus_column,
        held_out_tokens=0 if evaluation_text else WINDOWS * WINDOW_LENGTH,
    )
    evaluation = list(found.held_out)
    if evaluation_text or len(evaluation) < LEAST_EVALUATION_TOKENS:
        evaluation = _read_evaluation(evaluation_text, tokenizer, spec=spec)
    shared = overlap(found.windows, evaluation)
    if shared > MOST_OVERLAP:
        raise InputError(
            f"{shared:.0%} of the evaluation text {evaluation_text or BUNDLED_EVALUATION} is also calibrated on; at "
            f"most {MOST_OVERLAP:.0%} was expected, or quality would look better than it is",
            hint="leave --eval-text out, so that text of the corpus is held apart, or name other text with it",
        )
    calibration = CalibrationText(identity=found.sha256, source=found.source, windows=lambda: found.windows)
    return Texts(calibration=calibration, evaluation=evaluation, overlap=shared)


def as_recorded(texts: Texts, recorded: Mapping[str, Any], *, corpus: str | None) -> Texts:
    """The texts to prove a bundle against whose manifest has ``recorded`` its calibration.

    The corpus itself may not be at hand: then its digest finds the store, if that is there. Raises InputError for a
    ``corpus`` that is another one.
    """
    identity = recorded.get("text")
    if texts.calibration is None or identity in (None, texts.calibration.identity):
        return texts
    source = recorded.get("source")
    if corpus:
        raise InputError(
            f"{corpus} gives the windows {texts.calibration.identity[:16]}..., the bundle was calibrated with "
            f"{str(identity)[:16]}... of {source}",
            hint="name the corpus that the bundle was made with, or leave --calibration out if the store has it",
        )

    def absent() -> Tensor:
        raise InputError(
            f"the bundle was calibrated with {source}, and its codes are not in the store",
            hint="name that corpus with --calibration, or the store that the export used with --store",
        )

    calibration = CalibrationText(identity=str(identity), source=str(source), windows=absent)
    return replace(texts, calibration=calibration)


def check_recorded(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Raises InputError where the model has written another text than when the bundle was made: its sampling follows
    the last bits of the logits, which another processor may compute otherwise."""
    if found.get("corpus_sha256") != recorded.get("corpus_sha256"):
        raise InputError(
            "the text that the model wrote to calibrate with is another one on this machine",
            hint="name the store that the export used with --store, or validate without --against",
        )


def _self_written(
    sampling: Sampling, *, checkpoint: Checkpoint, tokenizer: Tokenizer, graph: Graph, progress: Progress
) -> CalibrationText:
    """Identified by how it is written: to find a store again nothing has to be written anew."""

    def write() -> Tensor:
        progress.stage("the model writes the text to calibrate with")
        return write_windows(
            graph,
            checkpoint,
            windows=sampling.windows,
            length=sampling.window_length,
            seed=sampling.seed,
            excluded=tokenizer.special_ids,
            on_step=progress.advance,
        )

    shape = f"{sampling.windows} x {sampling.window_length}"
    return CalibrationText(
        identity=f"written by the model: {shape}, seed {sampling.seed}", source="written by the model", windows=write
    )


def _refuse_long_windows(sampling: Sampling, spec: ModelSpec) -> None:
    if sampling.window_length > spec.max_position_embeddings:
        raise UsageError(
            f"--window-length {sampling.window_length} is more than the {spec.max_position_embeddings} positions of "
            "this model",
            hint=f"take --window-length {spec.max_position_embeddings} or less",
        )


def _read_evaluation(path: Path | None, tokenizer: Tokenizer, *, spec: ModelSpec) -> list[int]:
    path = path or BUNDLED_EVALUATION
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"evaluation text {path}: {error}", hint="name a UTF-8 text file with --eval-text") from error
    ids = tokenizer.encode(text)
    if len(ids) < LEAST_EVALUATION_TOKENS:
        raise InputError(
            f"evaluation text {path} is {len(ids)} tokens, at least {LEAST_EVALUATION_TOKENS} are wanted",
            hint="name a longer one with --eval-text",
        )
    if max(ids) >= spec.vocab_size:
        raise InputError(
            f"the tokenizer gives token {max(ids)}, the model's vocabulary ends at {spec.vocab_size - 1}",
            hint="tokenizer.json and weights must be of the same model",
        )
    return ids
