"""What a runner keeps of images between a look at one and the tokens that see it, whatever the runtime."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.model.graph import image_names
from exporter.spec import ImageSpec, ModelSpec


class ShownImages:
    """Keys and values that a decoder takes from all images shown, one behind the other; before there is one, zeros in
    place of a tile, which no token sees."""

    def __init__(self, spec: ModelSpec, images: ImageSpec, *, states: int = 1, most: int | None = None) -> None:
        """``states``: of the tile that stands for no image. ``most``: images that the artifact takes; None: any."""
        keys, values = image_names(len(images.cross_attention_layers))
        nothing = torch.zeros(1, spec.num_key_value_heads, states, spec.head_dim)
        self.states: Mapping[str, Tensor] = dict.fromkeys([*keys, *values], nothing)
        """By the names of the outputs of the vision graph: float32 ``[1, KV, M*N, D]``."""
        self._of_one, self._most, self._shown = images.max_num_tiles, most, 0

    def check_room(self) -> None:
        """Raises InputError where no more images are taken."""
        if self._most and self._shown == self._most:
            raise InputError(
                f"{self._most} images have been shown, which is all that this artifact takes",
                hint="open it again for other images",
            )

    def show(self, states: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One more image, by what the vision graph gives of it."""
        shown = {name: [self.states[name]] if self._shown else [] for name in self.states}
        self.states = {name: torch.cat([*before, states[name]], dim=2) for name, before in shown.items()}
        self._shown += 1
        return states

    def seen(self, tiles: Tensor | None, *, length: int) -> Tensor:
        """bool ``[1, T, M]``: ``tiles``, or none of those there are."""
        count = self._of_one * self._shown or 1
        return (torch.zeros(length, count, dtype=torch.bool) if tiles is None else tiles)[None]
