"""Tokens in, logits out: a package behind the app's interface, run by Core ML or by the evaluator."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporter.errors import HostError
from exporter.spec import Artifact
from targets.base import BaseRunner
from targets.coreml.evaluate import Evaluator, Rounding
from targets.coreml.toolchain import ct, quiet

Predict = Callable[[Tensor, Tensor], Tensor]
"""Ids int32 [1, T] and mask float16 [1, 1, T, E] -> logits [1, T or 1, V], with the cache grown to E positions."""


def run_with_evaluator(path: Path, rounding: Rounding) -> Predict:
    evaluator = Evaluator(path, rounding=rounding)
    return lambda ids, mask: evaluator({"inputIds": ids, "causalMask": mask.float()})["logits"]


def run_with_core_ml(path: Path, *, compute_units: str) -> Predict:
    """On the processors that ``coremltools.ComputeUnit`` calls so. Raises HostError where Core ML does not load it."""
    try:
        with quiet():
            model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[compute_units])
            state = model.make_state()
    except Exception as error:  # whatever the framework reports
        raise HostError(f"Core ML does not load {path}: {error}", hint="macOS 15 or later is needed") from error

    def predict(ids: Tensor, mask: Tensor) -> Tensor:
        outputs = model.predict({"inputIds": ids.numpy(), "causalMask": mask.numpy()}, state=state)
        return torch.from_numpy(outputs["logits"])

    return predict


class CoreMLRunner(BaseRunner):
    """One package with one key-value cache. ``load`` gives the function that predicts, with an empty cache.

    What lies in the cache beyond the current position is never looked at: the mask ends there, and the next call
    writes over it. So rewinding is a matter of the position alone.
    """

    def __init__(self, artifact: Artifact, load: Callable[[], Predict]) -> None:
        super().__init__(artifact)
        started = time.perf_counter()
        self._predict: Predict | None = load()
        self.load_s = time.perf_counter() - started

    def feed(self, ids: Sequence[int]) -> Tensor:
        assert self._predict is not None, "the runner is closed"
        self._check_feed(ids)
        end = self._position + len(ids)
        tokens = torch.tensor([list(ids)], dtype=torch.int32)
        mask = causal_mask(self._position, end)
        started = time.perf_counter()
        logits = self._predict(tokens, mask)
        self.steps_s = (time.perf_counter() - started,)
        self._position = end
        return logits[0].float()

    def close(self) -> None:
        self._predict = None


def causal_mask(position: int, end: int) -> Tensor:
    """float16 [1, 1, end - position, end]: 0 up to and including a query's own position, -inf beyond it."""
    blocked = torch.ones(end - position, end, dtype=torch.bool).triu(diagonal=position + 1)
    return torch.zeros(blocked.shape, dtype=torch.float16).masked_fill(blocked, float("-inf"))[None, None]
