"""What a runner keeps of images between a look at one and the tokens that see it, whatever the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.model.graph import FUSED, image_names
from exporter.model.image_ops import in_place
from exporter.spec import ImageSpec, ModelSpec


def check_room(shown: int, *, most: int) -> None:
    """Raises InputError where a program that takes ``most`` images cannot be shown another."""
    if shown == most:
        raise InputError(
            f"{shown} images were shown, the program takes {most}", hint="start anew, and show the last of them only"
        )


class CrossedStates:
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
        if self._most:
            check_room(self._shown, most=self._most)

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


class FusedImages:
    """States that stand in the place of tokens, of all tiles of all images shown, in their order."""

    def __init__(self, spec: ModelSpec) -> None:
        self._states = torch.zeros(1, 0, spec.hidden_size)

    def show(self, tiles: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """One more image, by the states ``[1, N, H]`` that the vision graph gives of each of its tiles. All of them, by
        the name of that graph's output."""
        found = torch.cat([*tiles], dim=1)
        self._states = torch.cat([self._states, found], dim=1)
        return {FUSED[0]: found}

    def inputs(self, seen: Tensor | None, *, length: int) -> dict[str, Tensor]:
        """What the decoder is given for so many tokens, by the names of its inputs; ``seen`` as the ``tiles`` of
        ``targets.base.SeeingRunner.feed``."""
        return dict(zip(FUSED, in_place(self._states, seen, length=length), strict=True))
