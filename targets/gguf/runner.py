"""Runs a ``model.gguf`` with llama.cpp on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from exporter.spec import Artifact, Logits
from targets.base import BaseRunner
from targets.gguf.llamacpp import F16, FLASH_OFF, Context, Model


class LlamaCppRunner(BaseRunner):
    """One context of one sequence."""

    def __init__(
        self, artifact: Artifact, *, threads: int, cache: int = F16, flash: int = FLASH_OFF, hidden: bool = False
    ) -> None:
        """``hidden``: what the head reads takes the place of logits."""
        super().__init__(artifact)
        spec = artifact.spec
        self._width = spec.hidden_size if hidden else spec.vocab_size
        started = time.perf_counter()
        self._model = Model(artifact.path)
        try:
            self._context = Context(
                self._model, positions=artifact.context, threads=threads, cache=cache, flash=flash, hidden=hidden
            )
        except BaseException:
            self._model.close()
            raise
        self.load_s = time.perf_counter() - started

    def feed(self, ids: Sequence[int]) -> Tensor:
        self._check_feed(ids)
        rows = 1 if self._artifact.logits is Logits.LAST else len(ids)
        started = time.perf_counter()
        found = self._context.decode(ids, first=self._position, rows=rows, width=self._width)
        self.steps_s = (time.perf_counter() - started,)
        self._position += len(ids)
        return torch.from_numpy(found)

    def rewind(self, position: int) -> None:
        """llama.cpp takes no token at a position that its cache has already."""
        super().rewind(position)
        self._context.forget(position)

    def close(self) -> None:
        self._context.close()
        self._model.close()
