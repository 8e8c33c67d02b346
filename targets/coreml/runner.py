"""Tokens in, logits out: a package behind the app's interface, run by Core ML or by the evaluator."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporter.errors import HostError
from exporter.model.image_ops import tiles_of
from exporter.spec import Artifact
from targets.base import BaseRunner
from targets.coreml import MOST_IMAGES, VISION
from targets.coreml.evaluate import Evaluator, Rounding
from targets.coreml.images import (
    IMAGE_STATES,
    TILES,
    fused_features,
    image_features,
    image_name,
    state_features,
)
from targets.coreml.lower import IDS, LOGITS, MASK
from targets.coreml.package import Package
from targets.coreml.toolchain import ct, quiet
from targets.images import CrossedStates, FusedImages

Predict = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From the features that a package reads, floats of any dtype, to those that it gives; states grow on the way."""


def run_with_evaluator(path: Path, *, rounding: Rounding) -> Predict:
    evaluator = Evaluator(path, rounding=rounding)
    return lambda features: evaluator(_as(torch.float32, features))


def run_with_core_ml(path: Path, *, compute_units: str) -> Predict:
    """On the processors that ``coremltools.ComputeUnit`` calls so. Raises HostError where Core ML does not load it."""
    try:
        with quiet():
            model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[compute_units])
            state = model.make_state() if Package(path).has_states else None
    except Exception as error:  # whatever the framework reports
        raise HostError(f"Core ML does not load {path}: {error}", hint="macOS 15 or later is needed") from error

    def predict(features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        outputs = model.predict(
            {name: value.numpy() for name, value in _as(torch.float16, features).items()}, state=state
        )
        return {name: torch.from_numpy(value) for name, value in outputs.items()}

    return predict


def _as(dtype: torch.dtype, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Features, floats of them in ``dtype``."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in features.items()}


class CoreMLRunner(BaseRunner):
    """One package with one key-value cache; of a model that sees images a second one, once it is shown one. ``load``
    gives the function that predicts with the package at a path, with an empty cache.

    What lies in the cache beyond the current position is never looked at: the mask ends there, and the next call
    writes over it. So rewinding is a matter of the position alone.
    """

    def __init__(self, artifact: Artifact, load: Callable[[Path], Predict]) -> None:
        super().__init__(artifact)
        self._load = load
        started = time.perf_counter()
        self._predict: Predict | None = load(artifact.path)
        self.load_s = time.perf_counter() - started
        spec = artifact.spec
        self._images: CrossedStates | None = None
        self._fused = FusedImages(spec) if spec.fusion else None
        if spec.images:
            self._images = CrossedStates(spec, spec.images, states=spec.images.tile_states, most=MOST_IMAGES)

    def look(self, image: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As ``targets.base.SeeingRunner``."""
        vision, images = self._artifact.path.with_name(VISION), self._images
        if self._fused:
            predict = self._load(vision)
            return self._fused.show([predict(image_features(tile))[IMAGE_STATES].float() for tile in tiles_of(image)])
        assert images is not None  # who shows an image has looked at the spec
        images.check_room()
        found = self._load(vision)(image_features(image))
        return images.show({name: found[image_name(name)].float().flatten(1, 2)[None] for name in images.states})

    def feed(self, ids: Sequence[int], *, tiles: Tensor | None = None) -> Tensor:
        assert self._predict is not None, "the runner is closed"
        self._check_feed(ids)
        end = self._position + len(ids)
        features = {IDS: torch.tensor([list(ids)], dtype=torch.int32), MASK: causal_mask(self._position, end)}
        if self._images:
            features[TILES] = self._images.seen(tiles, length=len(ids)).float()
            features |= state_features(self._images.states, tiles=features[TILES].shape[2])
        if self._fused:
            features |= fused_features(self._fused.inputs(tiles, length=len(ids)))
        started = time.perf_counter()
        logits = self._predict(features)[LOGITS]
        self.steps_s = (time.perf_counter() - started,)
        self._position = end
        return logits[0].float()

    def close(self) -> None:
        self._predict = None


def causal_mask(position: int, end: int) -> Tensor:
    """float16 [1, 1, end - position, end]: 0 up to and including a query's own position, -inf beyond it."""
    blocked = torch.ones(end - position, end, dtype=torch.bool).triu(diagonal=position + 1)
    return torch.zeros(blocked.shape, dtype=torch.float16).masked_fill(blocked, float("-inf"))[None, None]
