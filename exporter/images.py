"""The proof of an artifact that sees images: an image is shown to it and to the reference, in the midst of a text."""

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
from exporter.model.graph import Program
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.parity import (
    Drive,
    Structure,
    all_at_once,
    check_parity,
    drive,
    measure_floor,
    structure_bound,
)
from exporter.spec import Arithmetic, Artifact, FusionSpec, ImageSpec, ModelSpec, Plan, Report
from exporter.store import WeightStore
from targets.base import SeeingRunner, SeeingTarget

PROCESSOR = "preprocessor_config.json"
"""How pixels are made of a picture, as transformers has it."""

_FIRST = 4
"""Tokens before the image, which see none of it."""

_FUSED_TILES = 2
"""Of the image in the place of whose states tokens stand."""

_PROCESSED: dict[str, Any] = {
    **{"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True},
    "resample": 2,
}
"""All that a processor of ours may say: bilinear, normalized."""

_METAS: dict[type, dict[str, Any]] = {
    ImageSpec: {
        "image_processor_type": "MllamaImageProcessor",
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    FusionSpec: {
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": 16,
    },
}
"""meta-llama/llama-models, models/llama3/multimodal/image_transform.py; models/llama4/preprocess.py and, for the
number of tiles, chat_format.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """An image, and a text that has it in it."""

    image: Mapping[str, Tensor]
    """As ``SeeingRunner.look`` takes it."""
    steps: Drive
    tiles: Tensor
    """As ``SeeingRunner.feed`` takes them, for each token of the text."""


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


def scene_of(spec: ModelSpec, steps: Drive) -> Scene:
    """``steps`` with an image of noise in place of some of its first tokens."""
    if spec.fusion:
        return _among_tokens(spec.fusion, steps)
    assert spec.images is not None  # it sees
    return _looked_at(spec.images, steps)


def _among_tokens(fusion: FusionSpec, steps: Drive) -> Scene:
    """States of tiles of noise in the first prefill, all of them or as many, from the first to the last, as leave it a
    token behind."""
    shape = (1, _FUSED_TILES, fusion.num_channels, fusion.image_size, fusion.image_size)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    states, length = _FUSED_TILES * fusion.tile_states, steps.prefills[0]
    before = min(_FIRST, length - 1)
    count = min(states, max(1, length - 1 - before))
    ids, tiles = list(steps.ids), torch.zeros(len(steps.ids), states, dtype=torch.bool)
    ids[before : before + count] = [fusion.image_token_id] * count
    tiles[torch.arange(before, before + count), torch.linspace(0, states - 1, count).round().long()] = True
    return Scene(image={"pixel_values": pixels}, steps=replace(steps, ids=tuple(ids)), tiles=tiles)


def _looked_at(images: ImageSpec, steps: Drive) -> Scene:
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
    vision = program.vision
    assert vision is not None  # the artifact sees
    scene = scene_of(artifact.spec, steps)

    def expected(arithmetic: Arithmetic = artifact.arithmetic, *, noise: float = 0.0, seed: int = 0) -> Tensor:
        reference = Reference(program.decoder, store, arithmetic, noise=noise, seed=seed, keep_bytes=0)
        reference.look(vision, scene.image)
        return all_at_once(_InScene(reference, scene), scene.steps)

    def got(runner: SeeingRunner) -> Tensor:
        runner.look(scene.image)
        return drive(_InScene(runner, scene), scene.steps)

    with target.open_seeing(artifact, threads=plan.threads, rounding=False) as unrounded:
        difference = (got(unrounded) - expected(FULL_PRECISION)).abs().max().item()
    shipped = expected()
    with target.open_seeing(artifact, threads=plan.threads, rounding=True) as runner:
        answered = got(runner)
    count = len(scene.steps.positions)
    return check_parity(
        expected=shipped,
        got=answered,
        structure=Structure(max_abs_logit_diff=difference, allowed=structure_bound(artifact), positions=count),
        floor=measure_floor(expected, shipped, artifact=artifact),
        artifact=artifact,
        runtime=target.runtime(),
    )


def check_processor(folder: Path, vision: ImageSpec | FusionSpec) -> None:
    """Raises InputError where the processor of a checkpoint is missing, or does what no app of ours would do."""
    path, config = folder / PROCESSOR, _processor(folder, vision)
    for field, value in _wanted(vision).items():
        if config.get(field, value) != value:
            raise InputError(
                f"{path}: {field} is {config[field]!r}, {value!r} was expected", hint="copy it from the original model"
            )
    for field in ("image_mean", "image_std"):
        values = config.get(field)
        if not isinstance(values, list) or len(values) != vision.num_channels:
            raise InputError(
                f"{path}: {field} is {values!r}, {vision.num_channels} numbers were expected",
                hint="copy it from the original model",
            )


def copy_processor(folder: Path, out: Path, vision: ImageSpec | FusionSpec) -> None:
    """As it was; of a checkpoint in Meta's layout, which has none, what its programs do."""
    if (folder / PROCESSOR).exists():
        shutil.copyfile(folder / PROCESSOR, out / PROCESSOR)
    else:
        content = json.dumps(_processor(folder, vision), indent=2) + "\n"
        (out / PROCESSOR).write_text(content, encoding="utf-8")


def _processor(folder: Path, vision: ImageSpec | FusionSpec) -> dict[str, Any]:
    path = folder / PROCESSOR
    if is_meta(folder) and not path.exists():
        return {**_METAS[type(vision)], **_wanted(vision)}
    return read_json(path, missing=f"download {PROCESSOR} into this folder: it tells how pixels are made")


def _wanted(vision: ImageSpec | FusionSpec) -> dict[str, Any]:
    wanted = {**_PROCESSED, "size": {"height": vision.image_size, "width": vision.image_size}}
    if isinstance(vision, FusionSpec):
        return {**wanted, "resize_to_max_canvas": False}
    return {**wanted, "do_pad": True, "max_image_tiles": vision.max_num_tiles}
