"""Going on where the cache is full: what came first stays, what is recent is fed again, the middle is forgotten.

The first tokens are kept because attention rests on them whatever they say (attention sinks: Xiao et al. 2023,
arXiv:2309.17453). That paper moves the keys that stay to new positions; here they are computed anew at theirs, since no
runtime's cache can be rotated from outside: the model sees exactly the tokens that are left, as a text of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from exporter.errors import UsageError
from exporter.parity import Answering

SINK = 4
"""Of the first tokens, where nothing was said: so many are enough in that paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sliding:
    """What is left of a full cache. Each time the ``context - sink - window`` tokens between are forgotten, and
    ``window`` tokens are prefilled."""

    sink: int
    """Of the first tokens."""
    window: int
    """Of the most recent ones."""

    def check(self, *, context: int) -> None:
        """Raises UsageError where nothing would be left to forget."""
        if not (self.sink >= 0 and self.window >= 1):
            raise UsageError(
                f"--sink is {self.sink} and --sliding-window {self.window}, at least 0 and 1 were expected",
                hint="a sink of 4 and half of the context are usual",
            )
        if self.sink + self.window >= context:
            raise UsageError(
                f"--sink {self.sink} and --sliding-window {self.window} fill the context of {context}",
                hint=f"take less than {context} together: what they leave is what a slide makes room for",
            )

    def left_of(self, ids: Sequence[int], *, context: int) -> list[int]:
        """The tokens that are left of ``ids`` where they leave no room for one more."""
        return [*ids] if len(ids) < context else [*ids[: self.sink], *ids[-self.window :]]


def sliding_asked(*, sink: int | None, window: int | None) -> Sliding | None:
    """By ``--sink`` and ``--sliding-window``; None where an answer is to end with the context. Raises UsageError for a
    sink that would have no effect."""
    if window is not None:
        return Sliding(sink=SINK if sink is None else sink, window=window)
    if sink is not None:
        raise UsageError("--sink goes with --sliding-window", hint="add --sliding-window, or leave it out")
    return None


class SlidingRunner:
    """A runner, or the reference, whose text has no end. ``held`` is what its cache holds."""

    def __init__(self, runner: Answering, sliding: Sliding, *, context: int) -> None:
        sliding.check(context=context)
        self._runner = runner
        self._sliding = sliding
        self._context = context
        self.held: list[int] = []

    def feed(self, ids: Sequence[int]) -> Tensor:
        """As ``Runner.feed``; where ``ids`` do not fit the cache slides first, and their last ``window`` count."""
        text = [*self.held, *ids]
        if len(text) > self._context:
            text = self._sliding.left_of(text, context=self._context)
            self.rewind(min(self._sliding.sink, len(self.held)))
        fed, self.held = text[len(self.held) :], text
        return self._runner.feed(fed)

    def rewind(self, position: int) -> None:
        """To a position of the cache."""
        self._runner.rewind(position)
        del self.held[position:]
