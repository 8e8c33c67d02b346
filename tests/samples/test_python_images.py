"""The Python sample with a model that sees images: pixels and masks against transformers' own, the artifact's answer to
a picture against the model's."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import targets
from exporter.checkpoint import BUNDLED_MODEL
from exporter.cli import app
from exporter.packing import LOADERS
from tests.conftest import Toy, with_tokenizer, write_toy
from tests.generations import PROCESSOR, wide_config

SAMPLE = Path(__file__).parents[2] / "samples" / "python"


@pytest.fixture(scope="module")
def sample() -> Iterator[Any]:
    sys.path.insert(0, str(SAMPLE))
    try:
        yield importlib.import_module("llamabundle.images")
    finally:
        sys.path.remove(str(SAMPLE))


def picture(width: int, height: int, mode: str = "RGB") -> Any:
    image = pytest.importorskip("PIL.Image")
    channels = len(image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return image.fromarray(noise.squeeze() if channels == 1 else noise, mode)


@pytest.mark.parametrize(
    ("width", "height", "mode"),
    [
        *((28, 28, "RGB"), (20, 9, "RGB"), (57, 28, "RGB"), (28, 57, "RGB"), (200, 30, "RGB"), (30, 200, "RGB")),
        *((100, 90, "RGB"), (56, 56, "RGB"), (3, 400, "RGB"), (85, 84, "RGB"), (60, 50, "L"), (40, 70, "RGBA")),
        (50, 50, "LA"),
    ],
)
def test_pixels_are_those_of_transformers(sample: Any, width: int, height: int, mode: str) -> None:
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    given = picture(width, height, mode)
    config = {**PROCESSOR, "size": {"height": 28, "width": 28}}
    theirs = MllamaImageProcessorPil(**config)(given, return_tensors="np")
    ours = sample.Processor(config)(given)
    assert (ours["pixel_values"] == theirs["pixel_values"][0]).all()
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        assert (ours[name] == theirs[name]).all()


@pytest.mark.parametrize("tiles", [1, 2, 4, 6])
def test_pictures_of_any_shape_are_cut_as_transformers_cuts_them(sample: Any, tiles: int) -> None:
    """Without Pillow: only the sizes."""
    from transformers.models.mllama import image_processing_pil_mllama as theirs

    processor = sample.Processor({**PROCESSOR, "size": {"height": 28, "width": 28}, "max_image_tiles": tiles})
    sizes = np.random.default_rng(0).integers(1, 300, (300, 2)).tolist()
    for height, width in [*sizes, [28, 56], [56, 56], [84, 28], [1, 300], [300, 1]]:
        canvas = theirs.get_optimal_tiled_canvas(height, width, tiles, 28)
        assert tuple(28 * count for count in processor.arrangement(height, width)) == canvas
        wanted = theirs.get_image_size_fit_to_canvas(height, width, *canvas, 28)
        assert processor.fit(height, width, canvas=canvas) == wanted


@pytest.mark.parametrize("places", [[0], [3], [3, 7], [3, 4], [0, 1, 5], [2, 3, 4], [1, 5, 6]])
def test_what_a_token_sees_is_what_transformers_lets_it_see(sample: Any, places: list[int]) -> None:
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    ids = [99 if place in places else 5 for place in range(12)]
    there = [1 + index for index in range(len(places))]
    dense = convert_sparse_cross_attention_mask_to_dense([get_cross_attention_token_mask(ids, 99)], [there], 4, 12)
    mask = sample.seen(ids, image_token=99, there=there, most=4)
    assert (mask == dense[0].reshape(12, -1).astype(bool)).all()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    toy = with_tokenizer(write_toy(tmp_path_factory.mktemp("seeing"), **wide_config("Llama 3.2 Vision")))
    (toy.folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "size": {"height": 28, "width": 28}}))
    return toy


def exported(toy: Toy, out: Path, *words: str, target: str = "onnxruntime") -> dict[str, Any]:
    asked = [str(toy.folder), "-t", target, "--images", "--json", "-o", str(out), "--store", str(out / "store")]
    result = CliRunner().invoke(app, [*asked, *words])
    assert result.exit_code in (0, 8), result.output  # what int4 costs a random model is another matter
    manifest: dict[str, Any] = json.loads(result.stdout)[0]["manifest"]
    return manifest


@pytest.mark.slow
@pytest.mark.toolchain
def test_the_artifact_answers_to_a_picture_as_transformers_does(sample: Any, toy: Toy, tmp_path: Path) -> None:
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    shown = [picture(50, 90), picture(28, 20)]
    exported(toy, tmp_path, "-p", "fp32")
    bundle = importlib.import_module("llamabundle").Bundle.open(tmp_path / "onnxruntime")
    model = importlib.import_module("llamabundle").Model(bundle)
    for one in shown:
        model.images.show(one)
    ids = [1, 5, 2048, 9, 11, 2048, 13, 17, 19, 23]
    config = json.loads((toy.folder / "preprocessor_config.json").read_text())
    inputs = MllamaImageProcessorPil(**config)([shown], return_tensors="pt")
    mask = sample.seen(ids, image_token=2048, there=inputs.pop("num_tiles")[0], most=4)
    with torch.no_grad():
        seen = torch.tensor(mask).view(1, len(ids), 2, 4).long()
        expected = toy.model(input_ids=torch.tensor([ids]), cross_attention_mask=seen, **inputs).logits[0]
        blind = toy.model(input_ids=torch.tensor([ids])).logits[0]
    got = [model.feed(ids[:7]), *(model.feed([token]) for token in ids[7:])]
    assert np.abs(np.stack(got) - expected[6:].numpy()).max() < 1e-4
    assert (expected - blind)[6:].abs().max() > 0.1  # the pictures matter


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.parametrize("target", targets.SEEING)
@pytest.mark.parametrize("calibration", ["none", str(BUNDLED_MODEL / "calibration.txt")])
def test_a_model_that_sees_images_is_exported_and_proven_again(
    target: str, calibration: str, toy: Toy, tmp_path: Path
) -> None:
    words = [] if calibration == "none" else ["--windows", "2", "--window-length", "32"]
    manifest = exported(toy, tmp_path, "-p", "int4", "--calibration", calibration, *words, target=target)
    for verdict in ("codes", "parity", "images"):
        assert manifest[verdict]["verdict"] == "passed", manifest[verdict]
    assert manifest["images"]["structure_max_abs_logit_diff"] < 1e-4
    folder = next(tmp_path.glob(f"{target}*"))
    words = ["validate", str(folder), "--store", str(tmp_path / "store"), "--json"]
    alone = json.loads(CliRunner().invoke(app, words).stdout)[0]["manifest"]
    loader = next(name for name, loader in LOADERS.items() if target in loader.targets)
    packed = ["bundle", str(folder), "--for", loader, "--out", str(tmp_path / "packed")]
    assert f"{loader} knows no decoder with such inputs" in CliRunner().invoke(app, packed).stderr
    assert (alone["codes"]["verdict"], alone["images"]["verdict"]) == ("passed", "not measured")
    assert alone["images"]["reason"] == "an image needs the checkpoint: name it with --against"
    words += ["--against", str(toy.folder)]
    if calibration != "none":
        words += ["--calibration", calibration]
    again = json.loads(CliRunner().invoke(app, words).stdout)[0]["manifest"]
    assert again["images"]["verdict"] == "passed"
    assert "--bisect knows no graph that sees images" in CliRunner().invoke(app, [*words, "--bisect"]).output
