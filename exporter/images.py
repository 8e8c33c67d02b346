"""The proof of an artifact that sees images: an image is shown to it and to the reference, and a text follows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from exporter.checkpoint.config import read_json
from exporter.checkpoint.meta import is_meta
from exporter.errors import InputError
from exporter.metrics import kl_divergence
from exporter.model.graph import Program
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.parity import (
    FLOOR_NOISE,
    Drive,
    Floor,
    Structure,
    all_at_once,
    check_parity,
    drive,
    structure_bound,
)
from exporter.spec import Arithmetic, Artifact, ImageSpec, Plan, Report
from exporter.store import WeightStore
from targets.base import SeeingRunner, SeeingTarget

PROCESSOR = "preprocessor_config.json"
"""How pixels are made of a picture, as transformers has it."""

_FIRST = 4
"""Tokens before the image, which see none of it."""

_PROCESSED: dict[str, Any] = {
    **{"do_resize": True, "do_pad": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True},
    "resample": 2,
}
"""All that a processor of ours may say: bilinear, padded, normalized."""

_METAS: dict[str, Any] = {
    "image_processor_type": "MllamaImageProcessor",
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""meta-llama/llama-models, models/llama3/multimodal/image_transform.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """An image, and a text that has it in it."""

    image: Mapping[str, Tensor]
    """The inputs of the vision graph."""
    steps: Drive
    tiles: Tensor
    """bool ``[T, M]``: what each token of the text sees."""


class Looking(Protocol):
    """What can be shown a scene: a SeeingRunner, or the Reference."""

    @property
    def position(self) -> int: ...

    def feed(self, ids: Sequence[int], *, tiles: Tensor | None = None) -> Tensor: ...

    def rewind(self, position: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _InScene:
    """One that is fed the text of a scene from the front, and sees what is to be seen of it."""

    looking: Looking
    scene: Scene

    def feed(self, ids: Sequence[int]) -> Tensor:
        first = self.looking.position
        return self.looking.feed(ids, tiles=self.scene.tiles[first : first + len(ids)])

    def rewind(self, position: int) -> None:
        self.looking.rewind(position)


def scene_of(images: ImageSpec, steps: Drive) -> Scene:
    """Noise as bright as pixels are once they are normalized, on as many tiles as leave one to padding; ``steps`` with
    the image in place of one of its first tokens."""
    counts = [high * wide for high, wide in images.supported_aspect_ratios]
    count = max((one for one in counts if one < images.max_num_tiles), default=max(counts))
    there = (torch.arange(images.max_num_tiles) < count).view(1, 1, -1)
    shape = (1, images.max_num_tiles, images.num_channels, images.image_size, images.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * there.view(1, -1, 1, 1, 1)
    before = min(_FIRST, steps.prefills[0] - 1)
    ids = (*steps.ids[:before], images.image_token_id, *steps.ids[before + 1 :])
    tiles = torch.zeros(len(ids), images.max_num_tiles, dtype=torch.bool)
    tiles[before:] = there[0, 0]
    ratio = torch.tensor([[counts.index(count) + 1]])
    image = {"pixel_values": pixels, "aspect_ratio_ids": ratio, "aspect_ratio_mask": there.long()}
    return Scene(image=image, steps=replace(steps, ids=ids), tiles=tiles)


def prove_images(
    target: SeeingTarget, artifact: Artifact, *, program: Program, store: WeightStore, plan: Plan, steps: Drive
) -> Report:
    """Both steps of parity with an image in the text; states that the vision graph gives are used by the decoder of the
    same side, so that both graphs are judged by the logits."""
    images, vision = artifact.spec.images, program.vision
    assert images is not None  # the artifact sees
    assert vision is not None
    scene = scene_of(images, steps)

    def expected(arithmetic: Arithmetic, *, noise: float = 0.0) -> Tensor:
        reference = Reference(program.decoder, store, arithmetic, noise=noise, keep_bytes=0)
        reference.look(vision, scene.image)
        return all_at_once(_InScene(reference, scene), scene.steps)

    def got(runner: SeeingRunner) -> Tensor:
        runner.look(scene.image)
        return drive(_InScene(runner, scene), scene.steps)

    with target.open_seeing(artifact, threads=plan.threads, rounding=False) as unrounded:
        difference = (got(unrounded) - expected(FULL_PRECISION)).abs().max().item()
    shipped, noisy = expected(artifact.arithmetic), expected(artifact.arithmetic, noise=FLOOR_NOISE)
    with target.open_seeing(artifact, threads=plan.threads, rounding=True) as runner:
        answered = got(runner)
    count = len(scene.steps.positions)
    return check_parity(
        expected=shipped,
        got=answered,
        structure=Structure(max_abs_logit_diff=difference, allowed=structure_bound(artifact), positions=count),
        floor=Floor.of(kl_divergence(shipped, noisy)),
        artifact=artifact,
        runtime=target.runtime(),
    )


def check_processor(folder: Path, images: ImageSpec) -> None:
    """Raises InputError where the processor of a checkpoint is missing, or does what no app of ours would do."""
    path, config = folder / PROCESSOR, _processor(folder, images)
    for field, value in _wanted(images).items():
        if config.get(field, value) != value:
            raise InputError(
                f"{path}: {field} is {config[field]!r}, {value!r} was expected", hint="copy it from the original model"
            )
    for field in ("image_mean", "image_std"):
        values = config.get(field)
        if not isinstance(values, list) or len(values) != images.num_channels:
            raise InputError(
                f"{path}: {field} is {values!r}, {images.num_channels} numbers were expected",
                hint="copy it from the original model",
            )


def copy_processor(folder: Path, out: Path, images: ImageSpec) -> None:
    """As it was; of a checkpoint in Meta's layout, which has none, what its programs do."""
    if (folder / PROCESSOR).exists():
        shutil.copyfile(folder / PROCESSOR, out / PROCESSOR)
    else:
        content = json.dumps(_processor(folder, images), indent=2) + "\n"
        (out / PROCESSOR).write_text(content, encoding="utf-8")


def _processor(folder: Path, images: ImageSpec) -> dict[str, Any]:
    path = folder / PROCESSOR
    if is_meta(folder) and not path.exists():
        return {**_METAS, **_wanted(images)}
    return read_json(path, missing=f"download {PROCESSOR} into this folder: it tells how pixels are made")


def _wanted(images: ImageSpec) -> dict[str, Any]:
    side = {"height": images.image_size, "width": images.image_size}
    return {**_PROCESSED, "size": side, "max_image_tiles": images.max_num_tiles}
