"""Pictures for a model that sees them: a picture becomes tiles of pixels, ``vision.onnx`` makes keys and values,
and each token is told which tiles it sees. As transformers' MllamaImageProcessor and MllamaProcessor do it.

A picture is an ``Image`` of Pillow, which only who has one needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from llamabundle.bundle import Bundle

PROCESSOR = "preprocessor_config.json"


class Processor:
    """What ``preprocessor_config.json`` says of a picture: the sides of a tile, how many tiles, mean and deviation."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._side, self._most = int(config["size"]["height"]), int(config["max_image_tiles"])
        self._scale = float(config.get("rescale_factor", 1 / 255))
        self._mean = np.array(config["image_mean"], dtype=np.float32)
        self._deviation = np.array(config["image_std"], dtype=np.float32)
        counts = range(1, self._most + 1)
        self._arrangements = [(high, wide) for high in counts for wide in counts if high * wide <= self._most]

    def __call__(self, picture: Any) -> dict[str, NDArray[Any]]:
        """The inputs of ``vision.onnx``: ``pixel_values`` float32 ``[1, M, 3, S, S]``, ``aspect_ratio_ids`` int64
        ``[1, 1]``, ``aspect_ratio_mask`` int64 ``[1, 1, M]``."""
        picture = without_alpha(picture)
        arrangement = self.arrangement(picture.height, picture.width)
        high, wide = (count * self._side for count in arrangement)
        new_height, new_width = self.fit(picture.height, picture.width, canvas=(high, wide))
        resized = np.asarray(picture.resize((new_width, new_height), resample=2))  # 2: bilinear
        canvas = np.zeros((high, wide, 3), dtype=np.uint8)
        canvas[:new_height, :new_width] = resized
        pixels = (canvas.astype(np.float64) * self._scale).astype(np.float32)
        pixels = (pixels - self._mean) / self._deviation
        rows, columns = arrangement
        cut = pixels.reshape(rows, self._side, columns, self._side, 3).transpose(0, 2, 4, 1, 3)
        tiles = np.zeros((1, self._most, 3, self._side, self._side), dtype=np.float32)
        tiles[0, : rows * columns] = cut.reshape(-1, 3, self._side, self._side)
        return {
            "pixel_values": tiles,
            "aspect_ratio_ids": np.array([[self._arrangements.index(arrangement) + 1]]),
            "aspect_ratio_mask": (np.arange(self._most) < rows * columns).astype(np.int64)[None, None],
        }

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Tiles one above the other and side by side: those that a picture need be enlarged least for or, where it is
        larger than all, shrunk least; of equals the fewest."""
        scales = [min(high * self._side / height, wide * self._side / width) for high, wide in self._arrangements]
        enlarging = [scale for scale in scales if scale >= 1]
        best = min(enlarging) if enlarging else max(scales)
        fitting = [pair for pair, scale in zip(self._arrangements, scales, strict=True) if scale == best]
        return min(fitting, key=lambda pair: pair[0] * pair[1])

    def fit(self, height: int, width: int, *, canvas: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a picture is scaled to: within ``canvas``, not below a tile where its shape allows."""
        high, wide = (min(max(size, self._side), most) for size, most in zip((height, width), canvas, strict=True))
        if wide / width < high / height:
            return min(int(height * (wide / width)) or 1, high), wide
        return high, min(int(width * (high / height)) or 1, wide)


def seen(ids: Sequence[int], *, image_token: int, there: Sequence[int], most: int) -> NDArray[np.bool_]:
    """bool ``[T, images * most]``: the tiles that each token sees, where image i has ``there[i]`` of them. A token sees
    the image before it; of images with nothing between them all. Raises ValueError where they are not as many."""
    places = [place for place, token in enumerate(ids) if token == image_token]
    if len(places) != len(there):
        raise ValueError(f"{len(there)} pictures were shown, the text has a token for {len(places)}")
    ends = [*places[1:], len(ids)]
    for index in reversed(range(len(places) - 1)):
        if ends[index] == places[index] + 1:
            ends[index] = ends[index + 1]
    mask = np.zeros((len(ids), len(there), most), dtype=bool)
    for index, (place, end, count) in enumerate(zip(places, ends, there, strict=True)):
        mask[place:end, index, :count] = True
    return mask.reshape(len(ids), -1)


class Images:
    """What a decoder is given of the pictures that it was shown. Without one: a tile of zeros, which nobody sees."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        spec = bundle.manifest["model"]
        images = spec["images"]
        self._path, self._threads = str(bundle.path("vision.onnx")), threads
        self._processor = Processor(json.loads(bundle.path(PROCESSOR).read_text(encoding="utf-8")))
        self._token, self._most = int(images["image_token_id"]), int(images["max_num_tiles"])
        self._there: list[int] = []
        names = [
            f"{layer}.{kind}" for layer in range(len(images["cross_attention_layers"])) for kind in ("key", "value")
        ]
        none = np.zeros((1, spec["num_key_value_heads"], 1, spec["head_dim"]), dtype=np.float32)
        self._none = {f"image_key_values.{name}": none for name in names}
        self._states = self._none

    def forget(self) -> None:
        """All that was shown: another conversation begins."""
        self._states, self._there = self._none, []

    def show(self, picture: Any) -> None:
        """One more, behind those shown before; the text has a token for each, in the same order."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        session = ort.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
        inputs = self._processor(picture)
        found = dict(zip(self._states, session.run(list(self._states), inputs), strict=True))
        if self._there:
            found = {name: np.concatenate([self._states[name], new], axis=2) for name, new in found.items()}
        self._states = found
        self._there.append(int(inputs["aspect_ratio_mask"].sum()))

    def inputs(self, held: Sequence[int], ids: Sequence[int]) -> dict[str, NDArray[Any]]:
        """What the decoder wants to know as it reads ``ids`` after those held."""
        mask = np.zeros((len(ids), 1), dtype=bool)
        if self._there:
            whole = seen([*held, *ids], image_token=self._token, there=self._there, most=self._most)
            mask = whole[len(held) :]
        return {"cross_attention_mask": mask[None], **self._states}


def without_alpha(picture: Any) -> Any:
    """On white."""
    if "A" not in picture.getbands() and picture.info.get("transparency") is None:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = picture.copy()
    white.paste((255, 255, 255, 255), (0, 0, *picture.size))
    white.alpha_composite(picture)
    return white.convert("RGB")
