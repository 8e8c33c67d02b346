"""Llama 3.2 Vision in Meta's layout: what transformers has, named and cut as Meta released it, is the same model."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from exporter.checkpoint import open_checkpoint, read_spec
from exporter.cli import app
from exporter.errors import InputError
from exporter.images import PROCESSOR, check_processor, copy_processor
from exporter.spec import RopeKind
from exporter.tokenizer import open_tokenizer
from tests.conftest import Toy, with_tokenizer, write_toy
from tests.exporter.test_meta import interleaved
from tests.exporter.test_vision import IDS, text_of
from tests.exporter.test_vision_formats import differs
from tests.generations import PROCESSOR as RELEASED
from tests.generations import config_of, toy_config

WHOLE, ROWS, COLUMNS = None, 0, 1
TEXT = {
    "input_layernorm.weight": ("attention_norm.weight", WHOLE),
    **{f"self_attn.{letter}_proj.weight": (f"attention.w{letter}.weight", ROWS) for letter in "qkv"},
    "self_attn.o_proj.weight": ("attention.wo.weight", COLUMNS),
    "cross_attn.o_proj.weight": ("attention.wo.weight", COLUMNS),
    **{f"cross_attn.{letter}_proj.weight": (f"attention.w{letter}.weight", ROWS) for letter in "qkv"},
    **{f"cross_attn.{letter}_norm.weight": (f"attention.{letter}_norm.weight", WHOLE) for letter in "qk"},
    "cross_attn_attn_gate": ("gate_attn", WHOLE),
    "cross_attn_mlp_gate": ("gate_ffwd", WHOLE),
    "post_attention_layernorm.weight": ("ffn_norm.weight", WHOLE),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", ROWS),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", COLUMNS),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", ROWS),
}
BLOCK = {
    **{f"self_attn.{letter}_proj.weight": (f"attn.w{letter}.weight", ROWS) for letter in "qkv"},
    "self_attn.o_proj.weight": ("attn.wo.weight", COLUMNS),
    "mlp.fc1.weight": ("mlp.c_fc.weight", ROWS),
    "mlp.fc1.bias": ("mlp.c_fc.bias", ROWS),
    "mlp.fc2.weight": ("mlp.c_proj.weight", COLUMNS),
    "mlp.fc2.bias": ("mlp.c_proj.bias", WHOLE),
    **{f"input_layernorm.{part}": (f"ln_1.{part}", WHOLE) for part in ("weight", "bias")},
    **{f"post_attention_layernorm.{part}": (f"ln_2.{part}", WHOLE) for part in ("weight", "bias")},
    **{gate: (gate, WHOLE) for gate in ("gate_attn", "gate_ffn")},
}
ENDS = {
    "lm_head.weight": ("text_model.output.weight", ROWS),
    "language_model.norm.weight": ("text_model.norm.weight", WHOLE),
    "multi_modal_projector.weight": ("vision_model.vision_projection.weight", ROWS),
    "multi_modal_projector.bias": ("vision_model.vision_projection.bias", ROWS),
}
ENCODER = {
    "class_embedding": ("class_embedding", WHOLE),
    "gated_positional_embedding.embedding": ("positional_embedding", WHOLE),
    "gated_positional_embedding.gate": ("gated_positional_embedding_gate", WHOLE),
    **{f"{place}_tile_positional_embedding.gate": (f"{place}_tile_pos_embed.gate", WHOLE) for place in ("pre", "post")},
    **{
        f"layernorm_{end}.{part}": (f"ln_{end}.{part}", WHOLE) for end in ("pre", "post") for part in ("weight", "bias")
    },
}
"""transformers, models/mllama/convert_mllama_weights_to_hf.py: names, and along which axis shards are put together."""
TABLES = {
    "gated_positional_embedding.tile_embedding.weight": "gated_positional_embedding",
    "pre_tile_positional_embedding.embedding.weight": "pre_tile_pos_embed.embedding",
    "post_tile_positional_embedding.embedding.weight": "post_tile_pos_embed.embedding",
}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 128, "attention_heads": 16, "num_hidden_layers": 32},
    **{"num_global_layers": 8, "image_size": 28, "intermediate_layers_indices": [3, 7, 15, 23, 30]},
    "vision_output_dim": 192,
}
"""As released, but for the width and the size of tiles, which this layout tells."""
OWN, CROSSING = (0, 2, 3, 5), (1, 4)
LAYERS = {"num_hidden_layers": 6, "cross_attention_layers": list(CROSSING), "vision_config": VISION}
"""Of a toy: Meta's schedule of two layers that look, among four of the decoder's own."""


def toy_of(folder: Path, **changes: Any) -> Toy:
    config = toy_config("Llama 3.2 Vision")
    rope = {**config["rope_parameters"], "factor": 8.0, "original_max_position_embeddings": 8192}
    return write_toy(folder, **config | {"rope_parameters": rope} | LAYERS | changes)


def by_place(toy: Toy) -> dict[str, Tensor]:
    """Tables of positions by rows and columns of tiles; the toy's, by ids of ratios, become what these mean."""
    vision, ratios = toy.model.model.vision_model, toy.model.config.vision_config.supported_aspect_ratios
    found = {}
    for seed, (name, told) in enumerate(TABLES.items()):
        states = vision.num_patches if name.startswith("gated") else 1
        table = torch.randn(4, 4, states, 32, generator=torch.Generator().manual_seed(seed)) * 0.2
        rows = torch.zeros(len(ratios) + 1, 4, states, 32)
        for index, (high, wide) in enumerate(ratios, start=1):
            for row in range(high):
                for column in range(wide):
                    rows[index, row * wide + column] = table[row, column]
        with torch.no_grad():
            vision.get_parameter(name).copy_(rows.flatten(1))
        found[f"vision_model.vision_encoder.{told}"] = table
    return found


def theirs(toy: Toy) -> dict[str, tuple[Tensor, int | None]]:
    """Whole tensors as Meta names and orders them, and how they are cut."""
    found: dict[str, tuple[Tensor, int | None]] = {name: (table, WHOLE) for name, table in by_place(toy).items()}
    for stored, weight in toy.model.state_dict().items():
        name = stored.removeprefix("model.")
        layer = re.fullmatch(r"language_model\.layers\.(\d+)\.(.+)", name)
        block = re.fullmatch(r"vision_model\.((?:global_)?transformer)\.layers\.(\d+)\.(.+)", name)
        part = name.removeprefix("vision_model.")
        if name == "language_model.embed_tokens.weight":
            found["text_model.tok_embeddings.weight"] = weight[:-8], ROWS
            found["text_model.learnable_embedding.weight"] = weight[-8:], ROWS
        elif layer:
            number, (told, axis) = int(layer[1]), TEXT[layer[2]]
            turned = interleaved(weight, head_dim=16) if re.search(r"self_attn\.[qk]", name) else weight
            place = (
                f"layers.{OWN.index(number)}" if number in OWN else f"cross_attention_layers.{CROSSING.index(number)}"
            )
            found[f"text_model.{place}.{told}"] = turned, axis
        elif block:
            told, axis = BLOCK[block[3]]
            found[f"vision_model.vision_encoder.{block[1]}.resblocks.{block[2]}.{told}"] = weight, axis
        elif name == "vision_model.patch_embedding.weight":
            found["vision_model.vision_encoder.conv1._linear.weight"] = weight.flatten(1), ROWS
        elif part in ENCODER:
            found[f"vision_model.vision_encoder.{ENCODER[part][0]}"] = weight, ENCODER[part][1]
        elif part not in TABLES:
            found[ENDS[name][0]] = weight, ENDS[name][1]
    return found


PARAMS = {
    **{"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "multiple_of": 96},
    **{"ffn_dim_multiplier": 0.5, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True, "max_seq_len": 128},
    **{"vision_chunk_size": 28, "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 2},
}


def write_meta_vision(toy: Toy, folder: Path, *, shards: int = 2, **params: Any) -> Path:
    """``params``: fields of params.json over those of the toy, None removes one. One shard has no number."""
    folder.mkdir()
    described = {field: value for field, value in {**PARAMS, **params}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(described))
    whole = theirs(toy)
    for index in range(shards):
        cut = {
            name: (weight if axis is WHOLE else weight.chunk(shards, dim=axis)[index]).clone()
            for name, (weight, axis) in whole.items()
        }
        name = f"consolidated.{index:02}.pth" if shards > 1 else "consolidated.pth"
        torch.save({**cut, "text_model.rope.freqs": torch.ones(8)}, folder / name)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy_of(tmp_path_factory.mktemp("meta-vision"))


@pytest.fixture(scope="module")
def meta(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta_vision(toy, tmp_path_factory.mktemp("meta") / "two")


@pytest.mark.parametrize("shards", [1, 2])
def test_every_tensor_is_what_transformers_has(shards: int, toy: Toy, tmp_path: Path) -> None:
    folder = write_meta_vision(toy, tmp_path / "meta", shards=shards)
    toy.model.save_pretrained(tmp_path / "toy")
    for images in (False, True):
        found, same = open_checkpoint(folder, images=images), open_checkpoint(tmp_path / "toy", images=images)
        assert found.spec.weights() == same.spec.weights()
        for name in found.spec.weights():
            assert torch.equal(found.read(name), same.read(name)), name
        assert found.left_out == same.left_out


def test_the_model_answers_as_transformers(toy: Toy, meta: Path) -> None:
    with torch.no_grad():
        expected = toy.model(torch.tensor([IDS])).logits[0]
    assert (text_of(meta) - expected).abs().max() < 1e-4
    assert differs(toy.model, meta) < 1e-4


@pytest.mark.parametrize(("size", "layers", "crossing"), [("11B", 32, 8), ("90B", 80, 20)])
def test_params_of_the_releases_are_their_models(size: str, layers: int, crossing: int, tmp_path: Path) -> None:
    """The config.json in Hugging Face layout is the same model, its stop tokens apart."""
    dim = config_of("Llama 3.2 Vision", size)["text_config"]["hidden_size"]
    params = {
        **{"dim": dim, "n_layers": layers, "n_heads": dim // 128, "n_kv_heads": 8, "vocab_size": 128_256},
        **{"ffn_dim_multiplier": 1.3, "multiple_of": 4096 if size == "90B" else 1024, "norm_eps": 1e-5},
        **{"rope_theta": 5e5, "use_scaled_rope": True, "vision_chunk_size": 560, "vision_max_num_chunks": 4},
        "vision_num_cross_attention_layers": crossing,
    }
    found, same = tmp_path / "meta", tmp_path / "huggingface"
    for folder, name, content in (
        (found, "params.json", params),
        (same, "config.json", config_of("Llama 3.2 Vision", size)),
    ):
        folder.mkdir()
        (folder / name).write_text(json.dumps(content))
    spec, wanted = read_spec(found, images=True), read_spec(same, images=True)
    assert spec.images == wanted.images
    assert spec.weights() == wanted.weights()
    assert (spec.rope, spec.max_position_embeddings) == (wanted.rope, wanted.max_position_embeddings)
    assert spec.rope.kind is RopeKind.LLAMA3
    assert (spec.bos_token_id, spec.eos_token_ids) == (128_000, (128_001, 128_008, 128_009))


def test_positions_of_another_size_of_tiles_are_resized(toy: Toy, tmp_path: Path) -> None:
    """What is linear in the place stays so: 4 tiles of 2 patches are resized to 4 of 3, corners on corners."""
    folder = write_meta_vision(toy, tmp_path / "meta", shards=1, vision_chunk_size=42)
    shard = torch.load(folder / "consolidated.pth")
    encoder = "vision_model.vision_encoder."

    def ramp(count: int) -> Tensor:
        """[count, count, 2]: how far down and how far to the right, of 1."""
        along = torch.linspace(0, 1, count)
        return torch.stack(torch.meshgrid(along, along, indexing="ij"), dim=-1)

    shard[f"{encoder}positional_embedding"][1:, :2] = ramp(2).flatten(0, 1)
    tiles = ramp(8).view(4, 2, 4, 2, 2).transpose(1, 2)  # [down, right, row, column, 2]
    shard[f"{encoder}gated_positional_embedding"][:, :, 1:, :2] = tiles.flatten(2, 3)
    torch.save(shard, folder / "consolidated.pth")
    checkpoint = open_checkpoint(folder, images=True)
    local = checkpoint.read("vision_model.gated_positional_embedding.embedding")
    assert torch.allclose(local[1:, :2], ramp(3).flatten(0, 1), atol=1e-6)
    assert torch.equal(local[0], shard[f"{encoder}positional_embedding"][0])
    table = checkpoint.read("vision_model.gated_positional_embedding.tile_embedding.weight").view(9, 4, 10, 32)
    wanted = ramp(12).view(4, 3, 4, 3, 2).transpose(1, 2).flatten(2, 3)
    assert torch.allclose(table[6, :, 1:, :2], wanted[:2, :2].flatten(0, 1), atol=1e-6)  # two by two tiles
    assert torch.equal(table[6, :, 0], shard[f"{encoder}gated_positional_embedding"][:2, :2, 0].flatten(0, 1))
    assert not table[1, 1:].any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vision_max_num_chunks": 6}, "vision_max_num_chunks is 6; known: 4"),
        ({"vision_num_cross_attention_layers": 0}, "cross_attention_layers is 0, a positive integer was expected"),
        ({"vision_num_cross_attention_layers": 5}, r"cross_attention_layers is 5, n_layers \(4\) at most was expected"),
        ({"vision_num_cross_attention_layers": None}, "vision_chunk_size is 28; known: dim, "),
        ({"vision_chunk_size": None}, "vision_chunk_size is missing, a positive integer was expected"),
        ({"vision_chunk_size": 30}, r"image_size \(30\) of the vision_config must be divisible by patch_size"),
        ({"vision_num_cross_attention_layers": 1}, "unknown .*cross_attention_layers.1"),
        ({"n_layers": 3}, "unknown .*layers.3"),
        ({"n_layers": 5}, "missing .*model.layers.6"),
        ({"quantization_args": {"scheme": "fp8"}}, "quantization_args is "),
        ({"lora_args": {"rank": 2}}, "lora_args is "),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str, meta: Path, tmp_path: Path) -> None:
    described = {field: value for field, value in {**PARAMS, **change}.items() if value is not None}
    (tmp_path / "params.json").write_text(json.dumps(described))
    for file in meta.glob("consolidated.*"):
        (tmp_path / file.name).hardlink_to(file)
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(tmp_path, images=True)


@pytest.mark.parametrize(
    ("stored", "sentence"),
    [
        (
            "text_model.learnable_embedding.weight",
            r"embed_tokens.weight has shape \[96, 64\], params.json wants \[104, 64\]",
        ),
        ("text_model.cross_attention_layers.1.gate_attn", "1 missing .*model.layers.4.cross_attn_attn_gate"),
        ("vision_model.vision_encoder.ln_pre.bias", "1 missing .*vision_model.layernorm_pre.bias"),
    ],
)
def test_a_tensor_that_is_missing_is_told(stored: str, sentence: str, meta: Path, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes((meta / "params.json").read_bytes())
    for file in meta.glob("consolidated.*"):
        shard = torch.load(file)
        del shard[stored]
        torch.save(shard, tmp_path / file.name)
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(tmp_path, images=True)


def test_a_tensor_that_nobody_knows_is_told_without_images_too(meta: Path, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes((meta / "params.json").read_bytes())
    for file in meta.glob("consolidated.*"):
        torch.save({**torch.load(file), "audio_model.weight": torch.zeros(2)}, tmp_path / file.name)
    with pytest.raises(InputError, match=r"1 unknown \(audio_model.weight\)"):
        open_checkpoint(tmp_path)


def test_the_token_of_an_image_is_behind_the_vocabulary(tmp_path: Path) -> None:
    tokens = [
        *(bytes([byte]) for byte in range(256)),
        *(b"\xff" + index.to_bytes(3, "big") for index in range(127_744)),
    ]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (tmp_path / "tokenizer.model").write_bytes(lines)
    without = {field: value for field, value in PARAMS.items() if not field.startswith("vision")}
    for params, ids in ((without, 5), (PARAMS, 1)):
        (tmp_path / "params.json").write_text(json.dumps(params))
        found = open_tokenizer(tmp_path, cache=tmp_path / "cache").encode("<|image|>")
        assert found[0] == 128_000
        assert (found[1:] == [128_256]) is (ids == 1)


def test_pixels_are_made_as_those_of_the_release(meta: Path, tmp_path: Path) -> None:
    images = read_spec(meta, images=True).images
    assert images is not None
    check_processor(meta, images)
    copy_processor(meta, tmp_path, images)
    written = json.loads((tmp_path / PROCESSOR).read_text())
    assert written == {**RELEASED, "size": {"height": 28, "width": 28}}


@pytest.mark.slow
@pytest.mark.toolchain
def test_a_folder_of_metas_is_exported_with_images(tmp_path: Path) -> None:
    toy = toy_of(tmp_path / "toy", vocab_size=2048)
    folder = write_meta_vision(toy, tmp_path / "meta", vocab_size=2048)
    with_tokenizer(Toy(folder=folder, model=toy.model))
    words = [str(folder), "-t", "onnxruntime", "-p", "fp32", "--images", "--json", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)[0]["manifest"]
    verdicts = {name: manifest[name]["verdict"] for name in ("codes", "parity", "images")}
    assert verdicts == {"codes": "passed", "parity": "passed", "images": "passed"}
    assert (tmp_path / "out" / "onnxruntime" / PROCESSOR).exists()
