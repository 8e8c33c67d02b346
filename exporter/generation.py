"""Text from an artifact on this host: a prompt is fed, tokens are drawn, characters come out whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import targets
from exporter.bundle import label_of, open_bundle, read_artifact
from exporter.errors import HostError, InputError, UsageError
from exporter.sliding import Sliding
from exporter.spec import Artifact
from exporter.tokenizer import Tokenizer
from targets.base import Runner, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedBundle:
    """A bundle whose every byte was checked, with what it takes to run it."""

    folder: Path
    manifest: Mapping[str, Any]
    target: Target
    artifact: Artifact
    tokenizer: Tokenizer


def open_for_running(folder: Path) -> OpenedBundle:
    """Raises InputError for a bundle that is not whole, HostError for one that this host cannot run."""
    manifest = open_bundle(folder)
    target = targets.load(label_of(manifest))
    if reason := target.missing() or target.cannot_execute():
        raise HostError(f"{folder}: {reason}", hint="llama-export doctor shows what this host can run")
    artifact = read_artifact(manifest, path=target.find(folder))
    return OpenedBundle(folder=folder, manifest=manifest, target=target, artifact=artifact, tokenizer=Tokenizer(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How the next token is drawn: greedy at temperature 0, else from the ``top_k`` most likely tokens (0: all) that
    hold ``top_p`` of the probability between them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(f"--temperature is {self.temperature}, 0 or more was expected", hint="0 is greedy")
        if self.top_k < 0:
            raise UsageError(f"--top-k is {self.top_k}, 0 or more was expected", hint="0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p is {self.top_p}, more than 0 and at most 1 was expected", hint="1 keeps all")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise UsageError(
                f"{'--top-k' if self.top_k else '--top-p'} has no effect at --temperature 0", hint="raise --temperature"
            )

    def sampler(self) -> Callable[[Tensor], int]:
        """Draws a token from float32 logits ``[V]``; the same seed draws the same tokens."""
        if not self.temperature:
            return lambda logits: int(logits.argmax())
        generator = torch.Generator().manual_seed(self.seed)

        def draw(logits: Tensor) -> int:
            values, ids = torch.sort(logits.double() / self.temperature, descending=True, stable=True)
            if self.top_k:
                values, ids = values[: self.top_k], ids[: self.top_k]
            probabilities = values.softmax(dim=0)
            before = probabilities.cumsum(dim=0) - probabilities
            kept = probabilities * (before < self.top_p)  # the first that reaches top_p is still in
            return int(ids[torch.multinomial(kept, 1, generator=generator)])

        return draw


class Ended(StrEnum):
    """Why an answer came to its end."""

    STOP = "stop"
    """The model said a stop token."""
    LENGTH = "length"
    """As many tokens as were asked for."""
    CONTEXT = "context"
    """The cache is full, and nothing says how to go on."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a generation has given so far: it grows while its text is being read."""

    prompt_tokens: int
    ids: list[int]
    text: str = ""
    ended: Ended | None = None
    prefill_s: float = 0.0
    """Of the part of the prompt that was not in the cache before."""
    prefilled_tokens: int = 0
    decode_s: float = 0.0

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None where less than two tokens came: the first is the prefill's."""
        decoded = len(self.ids) - 1
        return decoded / self.decode_s if decoded > 0 and self.decode_s else None

    def figures(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "prefilled_tokens": self.prefilled_tokens,
            "tokens": len(self.ids),
            "ended": self.ended.value if self.ended else None,
            "time_to_first_token_ms": 1e3 * self.prefill_s,
            "prefill_tokens_per_s": self.prefilled_tokens / self.prefill_s if self.prefill_s else None,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


class Conversation:
    """One runner and what its cache holds, so that of each prompt only what is new is fed."""

    def __init__(
        self, bundle: OpenedBundle, runner: Runner, decoding: Decoding, *, sliding: Sliding | None = None
    ) -> None:
        """``sliding``: how to go on where the cache is full; None: an answer ends there."""
        self._bundle = bundle
        self._runner = runner
        self._sample = decoding.sampler()
        self._context = bundle.artifact.context
        self._sliding = sliding
        if sliding:
            sliding.check(context=self._context)
        self._held: list[int] = []
        self._stops = frozenset(bundle.artifact.spec.eos_token_ids)

    def reply(self, ids: Sequence[int], *, max_tokens: int) -> tuple[Answer, Iterator[str]]:
        """The answer to ``ids``, and its text, piece by piece, as it is made. Raises InputError where they leave no
        room for an answer."""
        context = self._context
        if self._sliding:
            ids = self._sliding.left_of(ids, context=context)
        if not ids or len(ids) >= context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, 1 to {context - 1} fit the context of {context} and an answer",
                hint="shorten it, start anew, say --sliding-window, or export with a larger --context"
                if ids
                else "give some text",
            )
        answer = Answer(prompt_tokens=len(ids), ids=[])
        return answer, self._pieces(list(ids), answer, max_tokens=max_tokens)

    def _pieces(self, ids: list[int], answer: Answer, *, max_tokens: int) -> Iterator[str]:
        token = self._prefill(ids, answer)
        stream = self._bundle.tokenizer.stream()
        while True:
            if token in self._stops:
                answer.ended = Ended.STOP
                break
            answer.ids.append(token)
            piece = stream(token)
            answer.text += piece
            if piece:
                yield piece
            if len(answer.ids) == max_tokens:
                answer.ended = Ended.LENGTH
                break
            if self._runner.position == self._context and not self._sliding:
                answer.ended = Ended.CONTEXT
                break
            token = self._sample(self._go_on(token)[-1])
            answer.decode_s += sum(self._runner.steps_s)
        whole = self._bundle.tokenizer.decode(answer.ids)
        if rest := whole.removeprefix(answer.text):  # bytes of a character that never came to its end
            answer.text = whole
            yield rest

    def _go_on(self, token: int) -> Tensor:
        """Logits after one more token; a full cache slides first."""
        if self._sliding and self._runner.position == self._context:
            logits, _ = self._feed(self._sliding.left_of([*self._held, token], context=self._context))
            return logits
        self._held.append(token)
        return self._runner.feed([token])

    def _prefill(self, ids: list[int], answer: Answer) -> int:
        """The first token of the answer to ``ids``."""
        logits, fed = self._feed(ids)
        answer.prefill_s, answer.prefilled_tokens = sum(self._runner.steps_s), fed
        return self._sample(logits[-1])

    def _feed(self, ids: list[int]) -> tuple[Tensor, int]:
        """Make the cache hold ``ids``, by feeding those that it does not hold, the last at least: logits, and how many
        these were."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], self._held, strict=False)))
        self._runner.rewind(same)
        logits = self._runner.feed(ids[same:])
        self._held = ids
        return logits, len(ids) - same


def read_messages(text: str) -> list[dict[str, str]]:
    """Messages from JSON: a list of objects with ``role`` and ``content``. Raises InputError for anything else."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the messages are no JSON: {error}", hint='[{"role": "user", "content": "..."}]') from error
    fields = {"role", "content"}
    if not isinstance(content, list) or not all(
        isinstance(one, dict) and set(one) == fields and all(isinstance(one[field], str) for field in fields)
        for one in content
    ):
        raise InputError(
            "the messages are not a list of objects with role and content, both text",
            hint='[{"role": "user", "content": "..."}]',
        )
    return content
