"""Llama 4's images in Meta's layout: what transformers has, named and cut as Meta released it, is the same model."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from exporter.checkpoint import meta_fusion, open_checkpoint, read_spec
from exporter.cli import app
from exporter.errors import InputError
from exporter.images import PROCESSOR, check_processor, copy_processor
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace, trace_vision
from tests.conftest import Toy, with_tokenizer
from tests.exporter.test_fusion import IMAGE, places, text_with
from tests.exporter.test_meta_experts import COLUMNS, ROWS, WHOLE, toy_of, write_meta_experts
from tests.generations import FUSION_PROCESSOR, TOY_FUSION, config_of

ENCODER = "vision_embeddings.vision_encoder."
ENDS = {
    "vision_model.patch_embedding.linear.weight": (f"{ENCODER}conv1._linear.weight", ROWS),
    "vision_model.class_embedding": (f"{ENCODER}class_embedding", WHOLE),
    "vision_model.positional_embedding_vlm": (f"{ENCODER}positional_embedding_vlm", WHOLE),
    **{
        f"vision_model.layernorm_{end}.{part}": (f"{ENCODER}ln_{end}.{part}", WHOLE)
        for end in ("pre", "post")
        for part in ("weight", "bias")
    },
    "vision_model.vision_adapter.mlp.fc1.weight": ("vision_embeddings.vision_adapter.mlp.c_fc.weight", ROWS),
    "vision_model.vision_adapter.mlp.fc2.weight": ("vision_embeddings.vision_adapter.mlp.c_proj.weight", COLUMNS),
    "multi_modal_projector.linear_1.weight": ("vision_projection.weight", ROWS),
}
BLOCK = {
    **{
        f"self_attn.{letter}_proj.{part}": (f"attn.w{letter}.{part}", ROWS)
        for letter in "qkv"
        for part in ("weight", "bias")
    },
    "self_attn.o_proj.weight": ("attn.wo.weight", COLUMNS),
    "self_attn.o_proj.bias": ("attn.wo.bias", WHOLE),
    "mlp.fc1.weight": ("mlp.c_fc.weight", ROWS),
    "mlp.fc1.bias": ("mlp.c_fc.bias", ROWS),
    "mlp.fc2.weight": ("mlp.c_proj.weight", COLUMNS),
    "mlp.fc2.bias": ("mlp.c_proj.bias", WHOLE),
    **{f"input_layernorm.{part}": (f"ln_1.{part}", WHOLE) for part in ("weight", "bias")},
    **{f"post_attention_layernorm.{part}": (f"ln_2.{part}", WHOLE) for part in ("weight", "bias")},
}
"""meta-llama/llama-models, models/llama4/checkpoint.py, ``reshard_mp``, and transformers,
models/llama4/convert_llama4_weights_to_hf.py: names, and along which axis shards are put together."""

ARGS = {
    **{"image_size": {"height": 56, "width": 56}, "patch_size": {"height": 14, "width": 14}, "dim": 32},
    **{"n_layers": 2, "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 48, "pixel_shuffle_ratio": 0.5},
}
RELEASED = {
    **{"image_size": {"height": 336, "width": 336}, "patch_size": {"height": 14, "width": 14}, "dim": 1408},
    **{"n_layers": 34, "n_heads": 16, "mlp_ratio": 4.0, "output_dim": 4096, "pixel_shuffle_ratio": 0.5},
}
"""What config.json of Scout and Maverick in Hugging Face layout says, in the words of ``VisionArgs``."""


def of_images(toy: Toy) -> dict[str, tuple[Tensor, int | None]]:
    """Whole tensors as Meta names them, and how they are cut. Rows of queries and keys stay, as those of the text."""
    found = {}
    for name, weight in toy.model.state_dict().items():
        block = re.fullmatch(r"vision_model\.model\.layers\.(\d+)\.(.+)", name)
        if block:
            told, axis = BLOCK[block[2]]
            found[f"{ENCODER}transformer.resblocks.{block[1]}.{told}"] = weight, axis
        elif not name.startswith("language_model."):
            found[ENDS[name][0]] = weight, ENDS[name][1]
    return found


def write_meta_fusion(toy: Toy, folder: Path, *, shards: int = 2, **args: Any) -> Path:
    """``args``: fields of vision_args over those of the toy, None removes one."""
    described = {field: value for field, value in {**ARGS, **args}.items() if value is not None}
    write_meta_experts(toy, folder, shards=shards, vision_args=described)
    for index, file in enumerate(sorted(folder.glob("consolidated.*"))):
        cut = {
            name: (weight if axis is WHOLE else weight.chunk(shards, dim=axis)[index]).clone()
            for name, (weight, axis) in of_images(toy).items()
        }
        torch.save({**loaded(file), **cut}, file)
    return folder


def loaded(file: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([io.BytesIO]):
        shard: dict[str, Any] = torch.load(file)
    return shard


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a toy, whose vocabulary has none of the 200,000 before Meta's."""
    monkeypatch.setattr(meta_fusion, "IMAGE_TOKEN", IMAGE)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy_of("Llama 4 Scout", tmp_path_factory.mktemp("toy"), vision_config=TOY_FUSION)


@pytest.fixture(scope="module")
def meta(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta_fusion(toy, tmp_path_factory.mktemp("meta") / "two")


@pytest.mark.parametrize(
    ("generation", "shards"), [("Llama 4 Scout", 1), ("Llama 4 Scout", 2), ("Llama 4 Maverick", 2)]
)
def test_every_tensor_is_what_transformers_has(generation: str, shards: int, tmp_path: Path) -> None:
    toy = toy_of(generation, tmp_path / "toy", vision_config=TOY_FUSION)
    folder = write_meta_fusion(toy, tmp_path / "meta", shards=shards)
    for images in (False, True):
        found, same = open_checkpoint(folder, images=images), open_checkpoint(toy.folder, images=images)
        assert found.spec.fusion == same.spec.fusion
        assert (found.spec.fusion is not None) is images
        assert found.spec.weights() == same.spec.weights()
        for name in found.spec.weights():
            assert torch.equal(found.read(name), same.read(name)), name
        assert found.left_out == same.left_out


@pytest.mark.parametrize("shards", [1, 2])
def test_the_model_answers_as_transformers_with_an_image(shards: int, toy: Toy, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_meta_fusion(toy, tmp_path / "meta", shards=shards), images=True)
    ids, pixels = text_with(4), torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = toy.model(input_ids=ids, pixel_values=pixels).logits[0]
        blind = toy.model(input_ids=ids).logits[0]
    assert (expected - blind).abs().max() > 1  # the image matters
    reference = Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION)
    reference.look(trace_vision(checkpoint.spec), {"pixel_values": pixels[None]})
    assert (reference.feed(ids[0].tolist(), tiles=places(ids)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("generation", "size"), [("Scout", "17B-16E"), ("Maverick", "17B-128E")])
def test_args_of_the_releases_are_their_vision_transformer(
    generation: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config.json in Hugging Face layout is of the same one, its image token that of Meta's vocabulary."""
    monkeypatch.undo()
    config, scout = config_of(f"Llama 4 {generation}", size), generation == "Scout"
    params = {
        **{"dim": 5120, "n_layers": 48, "n_heads": 40, "n_kv_heads": 8, "vocab_size": 202_048, "multiple_of": 2048},
        **{"ffn_dim_multiplier": 1.2, "ffn_exp": 4.0, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": scout},
        **{"attention_chunk_size": 8192, "nope_layer_interval": 4, "use_qk_norm": scout, "vision_args": RELEASED},
        "moe_args": {"num_experts": 16} if scout else {"num_experts": 128, "interleave_moe_layer_step": 2},
    }
    found, same = tmp_path / "meta", tmp_path / "huggingface"
    for folder, name, content in ((found, "params.json", params), (same, "config.json", config)):
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
    spec, wanted = read_spec(found, images=True), read_spec(same, images=True)
    assert spec.fusion is not None
    assert spec.fusion.image_token_id == 200_092
    assert spec.fusion == wanted.fusion
    assert spec.weights() == wanted.weights()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dim": None}, "dim is missing, a positive integer was expected"),
        ({"image_size": 56}, "image_size of vision_args is 56, an object with height and width was expected"),
        (
            {"patch_size": {"height": 14, "width": 7}},
            "patch_size of vision_args is .*'width': 7}, an object with height and width was expected, both the same",
        ),
        ({"mlp_ratio": 3.0}, "intermediate_size of the vision_config is 96, 128 was expected"),
        ({"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio is 0.4; known: 1, 1/2"),
        ({"n_layers": 1}, "unknown .*vision_model.model.layers.1"),
        ({"output_dim": 96}, r"linear_1.weight is \[32, 48\] in 2 shards, params.json wants \[64, 96\] in all"),
        ({"n_heads": 1}, r"k_proj.bias is \[16\] in 2 shards, params.json wants \[32\] in all, cut by"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str, toy: Toy, tmp_path: Path) -> None:
    folder = write_meta_fusion(toy, tmp_path / "meta", **change)
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(folder, images=True)


def test_an_image_token_beyond_the_vocabulary_is_refused(meta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(InputError, match="image_token_index is 200092, a token below 96 was expected"):
        open_checkpoint(meta, images=True)


def test_a_table_of_positions_of_another_training_is_told(meta: Path, tmp_path: Path) -> None:
    """``positional_embedding``, which Meta's program resamples, is in no release."""
    (tmp_path / "params.json").write_bytes((meta / "params.json").read_bytes())
    for file in meta.glob("consolidated.*"):
        shard = loaded(file)
        shard[f"{ENCODER}positional_embedding"] = shard.pop(f"{ENCODER}positional_embedding_vlm")
        torch.save(shard, tmp_path / file.name)
    with pytest.raises(InputError, match=r"missing .*positional_embedding_vlm.*unknown .*positional_embedding\)"):
        open_checkpoint(tmp_path, images=True)


def test_pixels_are_made_as_those_of_the_release(meta: Path, tmp_path: Path) -> None:
    fusion = read_spec(meta, images=True).fusion
    assert fusion is not None
    check_processor(meta, fusion)
    copy_processor(meta, tmp_path, fusion)
    written = json.loads((tmp_path / PROCESSOR).read_text())
    assert written == {**FUSION_PROCESSOR, "size": {"height": 56, "width": 56}}


@pytest.mark.slow
@pytest.mark.toolchain
def test_a_folder_of_metas_is_exported_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toy_of("Llama 4 Scout", tmp_path / "toy", vocab_size=2048, vision_config=TOY_FUSION)
    monkeypatch.setattr(meta_fusion, "IMAGE_TOKEN", toy.model.config.image_token_index)
    folder = write_meta_fusion(toy, tmp_path / "meta")
    with_tokenizer(Toy(folder=folder, model=toy.model))
    words = [str(folder), "-t", "onnxruntime", "-p", "fp32", "--images", "--json", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)[0]["manifest"]
    verdicts = {name: manifest[name]["verdict"] for name in ("codes", "parity", "images")}
    assert verdicts == {"codes": "passed", "parity": "passed", "images": "passed"}
    assert (tmp_path / "out" / "onnxruntime" / PROCESSOR).exists()
