"""The Python sample with a Llama 4 that reads images: tiles and text against transformers' own, the artifact's answer
to a picture against the model's."""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from exporter.cli import app
from tests.conftest import with_tokenizer, write_toy
from tests.generations import FUSION_PROCESSOR, TOY_FUSION, wide_config

SAMPLE = Path(__file__).parents[2] / "samples" / "python"
SIDE = 56
CONFIG = {**FUSION_PROCESSOR, "size": {"height": SIDE, "width": SIDE}}
SIZES = [(56, 56), (20, 9), (113, 56), (56, 113), (400, 30), (30, 400), (100, 90), (3, 400), (300, 310), (1000, 900)]


@pytest.fixture(scope="module")
def sample() -> Iterator[Any]:
    sys.path.insert(0, str(SAMPLE))
    try:
        yield importlib.import_module("llamabundle.fused")
    finally:
        sys.path.remove(str(SAMPLE))


@pytest.fixture(scope="module")
def theirs() -> SimpleNamespace:
    """The functions of transformers' processor that need no torchvision, which its module imports."""
    import transformers

    path = Path(transformers.__file__).parent / "models" / "llama4" / "image_processing_llama4.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = ("get_factors", "get_max_res_without_distortion", "find_supported_resolutions", "get_best_fit")
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    space = {"math": math, "torch": torch, "defaultdict": defaultdict, "lru_cache": lru_cache, "SizeDict": Any}
    exec(compile(ast.Module(found, type_ignores=[]), str(path), "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in wanted})


def picture(width: int, height: int) -> Any:
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image.fromarray(noise)


@pytest.mark.parametrize("tiles", [1, 4, 16])
def test_pictures_of_any_shape_are_cut_as_transformers_cuts_them(
    sample: Any, theirs: SimpleNamespace, tiles: int
) -> None:
    from transformers.image_utils import SizeDict

    processor = sample.Processor({**CONFIG, "max_patches": tiles})
    canvases = torch.tensor(theirs.find_supported_resolutions(tiles, SizeDict(height=SIDE, width=SIDE)))
    for height, width in [*np.random.default_rng(0).integers(1, 700, (300, 2)).tolist(), *SIZES]:
        canvas = theirs.get_best_fit((height, width), canvases).tolist()
        assert [SIDE * count for count in processor.arrangement(height, width)] == canvas
        bound = tuple(min(max(size, SIDE), most) for size, most in zip((height, width), canvas, strict=True))
        wanted = tuple(max(size, 1) for size in theirs.get_max_res_without_distortion((height, width), bound))
        assert processor.fit(height, width, canvas=canvas) == wanted


def resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 ``[3, H, W]``, as torchvision does it: by torch."""
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixels_are_those_of_transformers_but_for_a_level_of_resizing(sample: Any, height: int, width: int) -> None:
    """As ``Llama4ImageProcessor._preprocess`` goes about it."""
    from transformers.image_transforms import split_to_tiles

    given = picture(width, height)
    processor = sample.Processor(CONFIG)
    tiles, (rows, columns) = processor(given)
    pixels = torch.from_numpy(np.array(given)).permute(2, 0, 1)
    size = processor.fit(height, width, canvas=(rows * SIDE, columns * SIDE))
    canvas = F.pad(resized(pixels, size), (0, columns * SIDE - size[1], 0, rows * SIDE - size[0]))
    wanted = [split_to_tiles(normalized(canvas)[None], rows, columns)[0]]
    if rows * columns > 1:
        wanted.append(normalized(resized(pixels, (SIDE, SIDE)))[None])
    expected = torch.cat(wanted)
    assert tiles.shape == expected.shape
    level = normalized(torch.arange(256, dtype=torch.uint8).expand(3, 1, -1)).diff().max()
    difference = np.abs(tiles - expected.numpy())
    assert difference.max() <= level
    assert (difference != 0).mean() < 0.04


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """``rescale_and_normalize``, in bfloat16, as float32."""
    scaled = pixels.to(torch.bfloat16) * CONFIG["rescale_factor"]
    half = torch.tensor(0.5, dtype=torch.bfloat16)
    return scaled.sub(half).div(half).float()


@pytest.mark.parametrize("mean", [0.5, 0.48145466])
def test_every_level_is_rounded_as_in_bfloat16(sample: Any, mean: float) -> None:
    levels = torch.arange(256, dtype=torch.uint8).to(torch.bfloat16) * (1 / 255)
    expected = levels.sub(torch.tensor(mean, dtype=torch.bfloat16)).div(torch.tensor(0.3, dtype=torch.bfloat16))
    processor = sample.Processor({**CONFIG, "image_mean": [mean] * 3, "image_std": [0.3] * 3})
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    image = pytest.importorskip("PIL.Image")
    processor._side = 256  # no resizing
    tiles, _ = processor(image.fromarray(pixels.repeat(256, axis=0)))
    assert (tiles[0, :, 0] == expected.float().numpy()).all()


@pytest.mark.parametrize("arrangement", [(1, 1), (1, 3), (2, 1), (3, 4)])
def test_the_text_of_a_picture_is_that_of_transformers(sample: Any, arrangement: tuple[int, int]) -> None:
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    expected = Llama4Processor._prompt_split_image(None, arrangement, 4)
    assert sample.text_of(arrangement, states=4) == expected


@pytest.mark.slow
@pytest.mark.toolchain
def test_the_artifact_answers_to_pictures_as_transformers_does(sample: Any, tmp_path: Path) -> None:
    config = wide_config("Llama 4 Scout") | {"num_hidden_layers": 2}
    toy = with_tokenizer(write_toy(tmp_path / "toy", **config, vision_config=TOY_FUSION))
    (toy.folder / "preprocessor_config.json").write_text(json.dumps(CONFIG))
    asked = [str(toy.folder), "-t", "onnxruntime", "--images", "-p", "fp32", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*asked, "--json", "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    bundle = importlib.import_module("llamabundle").Bundle.open(tmp_path / "out" / "onnxruntime")
    model = importlib.import_module("llamabundle").Model(bundle)
    shown = [picture(50, 90), picture(28, 20)]
    words = {"<|patch|>": 2042, "<|image|>": 2041, "<|image_start|>": 2043, "<|image_end|>": 2044}
    words |= {"<|tile_x_separator|>": 2045, "<|tile_y_separator|>": 2046}
    ids = [1, 5]
    for one in shown:
        text = model.images.show(one)
        ids += [words[f"<|{word}|>"] for word in text[2:-2].split("|><|")] + [9, 11]
    pixels = torch.from_numpy(np.concatenate([sample.Processor(CONFIG)(one)[0] for one in shown]))
    assert len(pixels) == 4  # two and the whole of the first, one of the second
    with torch.no_grad():
        expected = toy.model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
        blind = toy.model(input_ids=torch.tensor([ids])).logits[0]
    got = [model.feed(ids[:9]), *(model.feed([token]) for token in ids[9:])]
    assert np.abs(np.stack(got) - expected[8:].numpy()).max() < 1e-4
    assert (expected - blind)[8:].abs().max() > 0.1  # the pictures matter
    model.rewind(9)
    assert np.abs(model.feed(ids[9:]) - expected[-1].numpy()).max() < 1e-4
    with pytest.raises(ValueError, match="the text has 17 patch tokens, 16 states were shown"):
        model.feed([2042])
    model.rewind(0)
    model.images.forget()
    assert np.abs(model.feed(ids) - blind[-1].numpy()).max() < 1e-4
