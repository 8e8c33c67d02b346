"""Answers, token by token, from a model whose cache remembers what it has read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from llamabundle.bundle import Bundle
from llamabundle.model import Model
from llamabundle.text import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How tokens are drawn, and how many: greedy at temperature 0, else from the most likely ones that hold ``top_p``
    of the probability between them. Raises ValueError for what is out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    """None: as many as the cache has room for."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, 0 or more was expected")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, more than 0 and at most 1 was expected")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, 1 or more was expected")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}, 0 or more was expected")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One token of an answer, or its end."""

    id: int | None
    """None at the end, where ``text`` is what was held back."""
    text: str
    """Characters come whole: a token may add none."""
    ended: str | None = None
    """``stop``: the model said a stop token; ``length``: as long as was asked for, or as the cache holds."""


class Assistant:
    """A model, its text, and its stop tokens."""

    def __init__(self, bundle: Bundle, *, threads: int = 2) -> None:
        self.bundle = bundle
        self.text = Text(bundle)
        self.model = Model(bundle, threads=threads)
        self._stops = frozenset(bundle.manifest["model"]["eos_token_ids"])

    def answer(self, ids: Sequence[int], drawing: Drawing) -> Iterator[Answer]:
        """The answer to ``ids``, as it is made; it ends with one Answer that has ``ended``. Of the prompt only what the
        cache does not hold is read. Raises ValueError where it leaves no room for an answer."""
        context = self.bundle.context
        if not 0 < len(ids) < context:
            raise ValueError(f"the prompt has {len(ids)} tokens, 1 to {context - 1} leave room for an answer")
        return self._tokens(list(ids), drawing)

    def _tokens(self, ids: list[int], drawing: Drawing) -> Iterator[Answer]:
        generator, stream = np.random.default_rng(drawing.seed), self.text.stream()
        said: list[int] = []
        told = ""
        logits = self._read(ids)
        while True:
            token = draw(logits, drawing, generator)
            if token in self._stops:
                ended = "stop"
                break
            said.append(token)
            piece = stream(token)
            told += piece
            yield Answer(id=token, text=piece)
            if len(said) == drawing.max_tokens or not self.model.room:
                ended = "length"
                break
            logits = self.model.feed([token])
        rest = self.text.decode(said).removeprefix(told)  # bytes of a character that never came to its end
        yield Answer(id=None, text=rest, ended=ended)

    def _read(self, ids: list[int]) -> NDArray[np.float32]:
        """Feed what the cache does not hold, the last token at least."""
        pairs = zip(ids[:-1], self.model.held, strict=False)
        self.model.rewind(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
        return self.model.feed(ids[len(self.model.held) :])


def draw(logits: NDArray[np.float32], drawing: Drawing, generator: np.random.Generator) -> int:
    """One token from logits ``[V]``."""
    if not drawing.temperature:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    scaled = logits[order].astype(np.float64) / drawing.temperature
    likely = np.exp(scaled - scaled[0])
    likely /= likely.sum()
    kept = np.where(likely.cumsum() - likely < drawing.top_p, likely, 0.0)  # the first that reaches top_p is still in
    return int(order[generator.choice(len(order), p=kept / kept.sum())])
