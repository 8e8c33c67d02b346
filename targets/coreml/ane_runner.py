"""Tokens in, logits out, where lengths are fixed: full chunks through ``prefill``, single tokens through ``decode``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.errors import HostError
from exporter.spec import Artifact, Logits
from targets.base import BaseRunner
from targets.coreml.ane_lower import DECODE, HIDDEN, NEXT_HIDDEN, PREFILL
from targets.coreml.evaluate import Evaluator, Kept, Rounding
from targets.coreml.package import Package
from targets.coreml.toolchain import ct, quiet

PADDING = 0
"""The token that fills a prefill up: any does, nothing attends to it."""

Step = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""One function of one package, from the features that it reads to those that it gives."""

Functions = Mapping[str, Sequence[Step]]
"""By the name of a function, that of every package, in the order in which they run. All of a package share its states,
which are empty at first."""


def load_with_evaluator(packages: Sequence[Path], rounding: Rounding) -> Functions:
    kept = Kept()
    prefills = [Evaluator(path, rounding=rounding, function=PREFILL, kept=kept) for path in packages]
    decodes = [
        Evaluator(path, rounding=rounding, function=DECODE, kept=kept, states=prefill.states)
        for path, prefill in zip(packages, prefills, strict=True)
    ]
    return {PREFILL: prefills, DECODE: decodes}


def load_with_core_ml(packages: Sequence[Path], *, compute_units: str) -> Functions:
    """On the processors that ``coremltools.ComputeUnit`` calls so. Raises HostError where Core ML does not load it."""
    functions: dict[str, list[Step]] = {PREFILL: [], DECODE: []}
    for path in packages:
        state: Any = None
        for name, steps in functions.items():
            try:
                with quiet():
                    units = ct.ComputeUnit[compute_units]
                    model = ct.models.MLModel(str(path), compute_units=units, function_name=name)
                    state = state or model.make_state()
            except Exception as error:  # whatever the framework reports
                raise HostError(f"Core ML does not load {path}: {error}", hint="macOS 15 or later is needed") from error
            steps.append(_step(model, state, reads=input_names(Package(path, name))))
    return functions


def _step(model: Any, state: Any, *, reads: Sequence[str]) -> Step:
    def predict(features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        outputs = model.predict({name: features[name].numpy() for name in reads}, state=state)
        return {name: torch.from_numpy(value) for name, value in outputs.items()}

    return predict


def prefill_length(first: Path) -> int:
    """How many tokens the first package of a model takes at once."""
    (ids,) = (value for value in Package(first, PREFILL).inputs if value.name == "inputIds")
    return int(ids.type.tensorType.dimensions[1].constant.size)


def input_names(package: Package) -> list[str]:
    """Of the features that a function reads, without its states."""
    return [value.name for value in package.inputs if value.type.WhichOneof("type") == "tensorType"]


class AneRunner(BaseRunner):
    """One model in ``packages``, in the order in which they run, with one key-value cache. ``load`` gives their
    functions, with empty caches.

    As with open lengths, what lies in the cache behind the current position is never looked at, so that rewinding is a
    matter of the position alone, and the last chunk of a prompt may be padded.
    """

    def __init__(self, artifact: Artifact, packages: Sequence[Path], load: Callable[[], Functions]) -> None:
        super().__init__(artifact)
        self._length = prefill_length(packages[0])
        started = time.perf_counter()
        self._functions: Functions | None = load()
        self.load_s = time.perf_counter() - started

    def feed(self, ids: Sequence[int]) -> Tensor:
        assert self._functions is not None, "the runner is closed"
        self._check_feed(ids)
        started = time.perf_counter()
        logits = []
        for call in calls_for(ids, self._position, length=self._length, context=self._artifact.context):
            features = dict(call.features)
            for step in self._functions[call.function]:
                features |= step(features)
                features[HIDDEN] = features.pop(NEXT_HIDDEN, torch.empty(0))
            logits.append(features["logits"][0, : call.count].float())
            self._position += call.count
        self.steps_s = (time.perf_counter() - started,)
        return logits[-1] if self._artifact.logits is Logits.LAST else torch.cat(logits)

    def close(self) -> None:
        self._functions = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one function."""

    function: str
    count: int
    """Tokens that are not padding."""
    features: Mapping[str, Tensor]


def calls_for(ids: Sequence[int], position: int, *, length: int, context: int) -> Iterator[Call]:
    """How ``ids`` that follow on ``position`` are fed. A rest that fills no prefill of ``length`` is padded to one, or
    decoded token by token where the context has no room for the padding."""
    rest = list(ids)
    while rest:
        size = length if len(rest) > 1 and position + length <= context else 1
        chunk, rest = rest[:size], rest[size:]
        padded = [*chunk, *[PADDING] * (size - len(chunk))]
        yield Call(
            function=PREFILL if size > 1 else DECODE,
            count=len(chunk),
            features={
                "inputIds": torch.tensor([padded], dtype=torch.int32),
                "position": torch.tensor([position], dtype=torch.int32),
                "causalMask": causal_mask(position, length=size, context=context),
                "lastToken": torch.tensor([len(chunk) - 1], dtype=torch.int32),
            },
        )
        position += len(chunk)


def causal_mask(position: int, *, length: int, context: int) -> Tensor:
    """float16 [1, 1, length, context]: 0 up to and including a query's own position, -inf beyond it."""
    blocked = torch.ones(length, context, dtype=torch.bool).triu(diagonal=position + 1)
    return torch.zeros(blocked.shape, dtype=torch.float16).masked_fill(blocked, float("-inf"))[None, None]
