"""Pictures for a model whose text has states of them in it (Llama 4): a picture becomes tiles of pixels,
``vision.onnx`` makes states of each, and these stand in the place of tokens. As transformers' Llama4ImageProcessor and
Llama4Processor do it.

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
from llamabundle.images import PROCESSOR, without_alpha


class Processor:
    """What ``preprocessor_config.json`` says of a picture: the sides of a tile, how many tiles, mean and deviation.

    Pillow resizes; transformers does it with torch, which differs from it by one level of 255 in some hundredths of all
    pixels. All else is the same to the bit.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._side, most = int(config["size"]["height"]), int(config.get("max_patches", 16))
        counts = range(1, most + 1)
        self._arrangements = [(high, wide) for high in counts for wide in counts if high * wide <= most]
        levels = bfloat16(np.arange(256) * np.float32(config.get("rescale_factor", 1 / 255)))
        mean, deviation = (bfloat16(np.array(config[field])) for field in ("image_mean", "image_std"))
        self._levels = bfloat16(bfloat16(levels[:, None] - mean) / deviation)
        """What each level of a channel becomes: float32 ``[256, 3]``, rounded as transformers rounds it."""

    def __call__(self, picture: Any) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """Tiles float32 ``[M, 3, S, S]``, row after row, and how many lie one above the other and side by side; where
        they are more than one, the whole picture follows as one more."""
        picture, side = without_alpha(picture), self._side
        rows, columns = self.arrangement(picture.height, picture.width)
        new_height, new_width = self.fit(picture.height, picture.width, canvas=(rows * side, columns * side))
        canvas = np.zeros((rows * side, columns * side, 3), dtype=np.uint8)
        canvas[:new_height, :new_width] = np.asarray(picture.resize((new_width, new_height), resample=2))  # bilinear
        tiles = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        if len(tiles) > 1:
            tiles = np.concatenate([tiles, np.asarray(picture.resize((side, side), resample=2))[None]])
        pixels = np.stack([self._levels[tiles[..., channel], channel] for channel in range(3)], axis=1)
        return pixels, (rows, columns)

    def arrangement(self, height: int, width: int) -> tuple[int, int]:
        """Tiles one above the other and side by side: those that a picture need be enlarged least for or, where it is
        larger than all, shrunk least; of equals the fewest."""
        size = np.array([height, width], dtype=np.float32)  # as torch divides
        scales = {
            pair: float((np.array(pair, dtype=np.float32) * self._side / size).min()) for pair in self._arrangements
        }
        enlarging = [scale for scale in scales.values() if scale >= 1]
        best = min(enlarging) if enlarging else max(scales.values())
        return min((pair for pair, scale in scales.items() if scale == best), key=lambda pair: pair[0] * pair[1])

    def fit(self, height: int, width: int, *, canvas: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a picture is scaled to: within ``canvas``, not below a tile where its shape allows."""
        high, wide = (min(max(size, self._side), most) for size, most in zip((height, width), canvas, strict=True))
        if wide / width < high / height:
            return max(min(int(height * (wide / width)), high), 1), wide
        return high, max(min(int(width * (high / height)), wide), 1)


def bfloat16(x: NDArray[Any]) -> NDArray[np.float32]:
    """Rounded to the nearest bfloat16, half to even."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def text_of(arrangement: tuple[int, int], *, states: int) -> str:
    """What stands for a picture in a text, where each of its tiles gives so many states."""
    rows, columns = arrangement
    tile = "<|patch|>" * states
    row = "<|tile_x_separator|>".join([tile] * columns) + "<|tile_y_separator|>"
    parts = row * rows if rows * columns > 1 else ""
    return f"<|image_start|>{parts}<|image|>{tile}<|image_end|>"


class FusedImages:
    """What a decoder is given of the pictures that it was shown, in the place of its text's patch tokens."""

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        spec = bundle.manifest["model"]
        self._path, self._threads = str(bundle.path("vision.onnx")), threads
        self._processor = Processor(json.loads(bundle.path(PROCESSOR).read_text(encoding="utf-8")))
        self._token, self._none = int(spec["fusion"]["image_token_id"]), np.zeros((0, spec["hidden_size"]), np.float32)
        self._states = self._none

    def forget(self) -> None:
        """All that was shown: another conversation begins."""
        self._states = self._none

    def show(self, picture: Any) -> str:
        """One more, behind those shown before; gives what stands for it in the text, in the same order."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        session = ort.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
        tiles, arrangement = self._processor(picture)
        found = [session.run(["image_states"], {"pixel_values": tile[None, None]})[0][0] for tile in tiles]
        self._states = np.concatenate([self._states, *found])
        return text_of(arrangement, states=len(found[0]))

    def inputs(self, held: Sequence[int], ids: Sequence[int]) -> dict[str, NDArray[Any]]:
        """What the decoder wants to know as it reads ``ids`` after those held. Raises ValueError for more patch tokens
        than states; where no picture was shown they are tokens as others."""
        shown = (np.array(ids) == self._token) & bool(len(self._states))
        first = sum(token == self._token for token in held)
        if len(self._states) and first + shown.sum() > len(self._states):
            raise ValueError(f"the text has {first + shown.sum()} patch tokens, {len(self._states)} states were shown")
        states = np.zeros((len(ids), self._none.shape[1]), dtype=np.float32)
        states[shown] = self._states[first : first + shown.sum()]
        return {"image_states": states[None], "shown": shown[None]}
