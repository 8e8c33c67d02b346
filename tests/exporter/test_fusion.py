"""Llama 4's images: that they are read as transformers reads them, what is refused, and that proofs find faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import targets
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.checkpoint.config import read_spec
from exporter.cli import app
from exporter.errors import InputError
from exporter.images import prove_images, scene_of
from exporter.model.graph import Graph, Weight
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace, trace_program, trace_vision
from exporter.parity import Drive
from exporter.spec import Precision, Verdict
from exporter.store import StoreKey, WeightStore
from targets.base import seeing
from tests.conftest import Toy, with_tokenizer, write_toy
from tests.exporter.test_adapter import ALPHA, RANK, factors, write_adapter
from tests.exporter.test_vision import refused
from tests.generations import FUSION_PROCESSOR, TOY_FUSION, config_of, toy_config, wide_config

IMAGE, STATES = 90, 4
"""The token of an image in a toy, and how many of them a tile takes."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    toy = write_toy(tmp_path_factory.mktemp("fusing"), **toy_config("Llama 4 Scout"), vision_config=TOY_FUSION)
    written(toy.folder)
    return toy


@pytest.fixture(scope="module")
def fusing(toy: Toy) -> tuple[Checkpoint, Graph, Graph]:
    checkpoint = open_checkpoint(toy.folder, images=True)
    return checkpoint, trace(checkpoint.spec), trace_vision(checkpoint.spec)


def written(folder: Path, **changes: Any) -> None:
    config = {**FUSION_PROCESSOR, "size": {"height": 56, "width": 56}, **changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def text_with(*starts: int, length: int = 44) -> torch.Tensor:
    """int64 ``[1, T]``, with the tokens of a tile from each of ``starts`` on."""
    ids = torch.randint(3, IMAGE, (1, length), generator=torch.Generator().manual_seed(len(starts)))
    for start in starts:
        ids[0, start : start + STATES] = IMAGE
    return ids


def places(ids: torch.Tensor) -> torch.Tensor:
    """bool ``[T, S]``: the states in their order, as transformers' ``masked_scatter`` puts them."""
    found = (ids[0] == IMAGE).nonzero().flatten()
    seen = torch.zeros(ids.shape[1], len(found), dtype=torch.bool)
    seen[found, torch.arange(len(found))] = True
    return seen


@pytest.mark.parametrize("starts", [(4,), (0, 9), (4, 9, 17), (2, 6)])
def test_prefill_and_decode_with_images_are_those_of_transformers(
    toy: Toy, fusing: tuple[Checkpoint, Graph, Graph], starts: Sequence[int]
) -> None:
    """Beyond a chunk of attention, 16 tokens; a call may end among the tokens of a tile."""
    checkpoint, decoder, vision = fusing
    ids = text_with(*starts)
    pixels = torch.randn(len(starts), 3, 56, 56, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = toy.model(input_ids=ids, pixel_values=pixels).logits[0]
        blind = toy.model(input_ids=ids).logits[0]
    assert (expected - blind).abs().max() > 1  # the images matter
    reference = Reference(decoder, checkpoint, FULL_PRECISION)
    reference.look(vision, {"pixel_values": pixels[None, :1]})
    if len(starts) > 1:
        reference.look(vision, {"pixel_values": pixels[None, 1:]})
    seen, text = places(ids), ids[0].tolist()
    spans = [slice(0, 11), slice(11, 27), *(slice(place, place + 1) for place in range(27, len(text)))]
    got = torch.cat([reference.feed(text[span], tiles=seen[span]) for span in spans])
    assert (got - expected).abs().max() < 1e-4


def test_states_of_a_tile_are_those_that_transformers_projects(
    toy: Toy, fusing: tuple[Checkpoint, Graph, Graph]
) -> None:
    checkpoint, decoder, vision = fusing
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        kept = toy.model.multi_modal_projector(toy.model.get_image_features(pixels).last_hidden_state)
    states = Reference(decoder, checkpoint, FULL_PRECISION).look(vision, {"pixel_values": pixels[None]})
    assert kept.abs().max() > 1
    assert (states["image_states"] - kept.flatten(0, 1)).abs().max() < 1e-4


def test_a_decoder_that_is_shown_no_image_is_the_text_alone(toy: Toy, fusing: tuple[Checkpoint, Graph, Graph]) -> None:
    checkpoint, decoder, _ = fusing
    ids = text_with(4)
    text = open_checkpoint(toy.folder)
    got = Reference(decoder, checkpoint, FULL_PRECISION).feed(ids[0].tolist())
    assert torch.equal(got, Reference(trace(text.spec), text, FULL_PRECISION).feed(ids[0].tolist()))
    with torch.no_grad():
        assert (got - toy.model(input_ids=ids).logits[0]).abs().max() < 1e-4


def test_the_whole_model_has_every_tensor_of_transformers(toy: Toy) -> None:
    spec = read_spec(toy.folder)
    assert spec.parameters == toy.model.num_parameters()
    assert spec.text_alone().parameters == toy.model.language_model.num_parameters()


def test_nodes_that_read_pixels_belong_to_no_layer_of_the_decoder(fusing: tuple[Checkpoint, Graph, Graph]) -> None:
    _, decoder, vision = fusing
    assert {node.layer for node in vision.nodes} == {None}
    assert [node.op for node in decoder.nodes[:2]] == ["embedding", "fuse"]
    assert decoder.shortened(range(1, 2), head=True).inputs == ("ids", "past_k.1", "past_v.1")


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "size"), [("Scout", "17B-16E"), ("Maverick", "17B-128E")])
def test_the_vision_graph_of_a_released_size_reads_every_weight_that_the_decoder_does_not(
    generation: str, size: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(f"Llama 4 {generation}", size)))
    spec = read_spec(tmp_path)
    assert spec.fusion is not None
    assert spec.fusion.tile_states == 144
    program = trace_program(spec)
    assert program.vision is not None
    graphs = program.decoder, program.vision
    read = [{a.name: a.shape for n in graph.nodes for a in n.arguments if isinstance(a, Weight)} for graph in graphs]
    assert not read[0].keys() & read[1].keys()
    assert read[0] | read[1] == spec.weights()


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act is 'relu'; known: gelu"),
        ("vision_config", {"num_attention_heads": 3}, r"hidden_size \(32\) of the vision_config must be divisible by"),
        ("vision_config", {"num_attention_heads": 16}, "gives each of 16 heads 2 channels, a multiple of 4 was expect"),
        ("vision_config", {"intermediate_size": 96}, "intermediate_size of the vision_config is 96, 128 was expected"),
        ("vision_config", {"vision_output_dim": 64}, "vision_config.vision_output_dim is 64; known: 48"),
        ("vision_config", {"pixel_shuffle_ratio": 0.4}, "vision_config.pixel_shuffle_ratio is 0.4; known: 1, 1/2"),
        ("vision_config", {"image_size": 42}, "has 3 patches a side, which pixel_shuffle_ratio"),
        ("vision_config", {"patch_size": "14"}, "patch_size is '14', a positive integer was expected"),
        ("text_config", {"vocab_size": 90}, "image_token_index is 90, a token below 90 was expected"),
    ],
)
def test_what_the_graphs_would_not_honour_is_refused(
    toy: Toy, tmp_path: Path, part: str, change: dict[str, Any], sentence: str
) -> None:
    config = json.loads((toy.folder / "config.json").read_text())
    config[part] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=sentence):
        read_spec(tmp_path)


@pytest.mark.parametrize(
    ("target", "choices", "sentence"),
    [
        ("onnxruntime-webgpu", {}, "target onnxruntime-webgpu: it takes dense models only"),
        ("onnxruntime", {"kv_cache": "int8"}, "--kv-cache int8 has not been tried on a model that sees images"),
    ],
)
def test_what_does_not_go_with_images_is_refused(toy: Toy, target: str, choices: dict[str, Any], sentence: str) -> None:
    assert sentence in refused(toy.folder, target, **choices)


def test_a_processor_that_no_app_would_follow_is_refused(toy: Toy, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((toy.folder / name).read_bytes())
    assert "has no preprocessor_config.json" in refused(tmp_path, "onnxruntime")
    written(tmp_path, resize_to_max_canvas=True)
    assert "resize_to_max_canvas is True, False was expected" in refused(tmp_path, "onnxruntime")
    written(tmp_path, size={"height": 336, "width": 336})
    assert "size is {'height': 336, 'width': 336}, {'height': 56, 'width': 56} was" in refused(tmp_path, "onnxruntime")


def test_matrices_of_images_are_int8_and_tables_float16_in_a_quantized_scheme(
    fusing: tuple[Checkpoint, Graph, Graph], make_plan: Any, tmp_path: Path
) -> None:
    checkpoint, *_ = fusing
    plan = make_plan(checkpoint.folder)
    store = WeightStore(checkpoint=checkpoint, key=StoreKey(source_sha256="", scheme=plan.scheme), root=tmp_path)
    layers = [f"vision_model.model.layers.{index}" for index in range(2)]
    assert set(store.parts) == {0, 1, 2, 3, 4, None, "vision_model", *layers, "multi_modal_projector"}
    matrices = [name for name, shape in checkpoint.spec.weights().items() if "vision" in name and len(shape) == 2]
    halves = {name for name in matrices if plan.scheme.precision(name) is Precision.FP16}
    assert halves == {"vision_model.patch_embedding.linear.weight", "vision_model.positional_embedding_vlm"}
    assert {plan.scheme.precision(name) for name in set(matrices) - halves} == {Precision.INT8}


def test_a_scene_has_states_of_every_tile_among_its_first_tokens(fusing: tuple[Checkpoint, Graph, Graph]) -> None:
    checkpoint, *_ = fusing
    wide = scene_of(checkpoint.spec, Drive(ids=tuple(range(3, 43)), prefills=(20, 9)))
    assert [place for place, token in enumerate(wide.steps.ids) if token == IMAGE] == [*range(4, 12)]
    assert torch.equal(wide.tiles[4:12], torch.eye(8, dtype=torch.bool))
    assert not wide.tiles[12:].any()
    narrow = scene_of(checkpoint.spec, Drive(ids=tuple(range(3, 43)), prefills=(8, 9)))
    assert narrow.tiles.nonzero().tolist() == [[4, 0], [5, 4], [6, 7]]
    assert narrow.image["pixel_values"].shape == (1, 2, 3, 56, 56)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    config = wide_config("Llama 4 Scout") | {"num_hidden_layers": 2}
    toy = with_tokenizer(write_toy(tmp_path_factory.mktemp("wide"), **config, vision_config=TOY_FUSION))
    written(toy.folder)
    return toy


def test_a_wrong_weight_of_the_vision_graph_fails_the_verdict(
    toy: Toy, fusing: tuple[Checkpoint, Graph, Graph], make_plan: Any, tmp_path: Path
) -> None:
    checkpoint, *_ = fusing
    other = tmp_path / "other"
    shutil.copytree(toy.folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["vision_model.model.layers.0.self_attn.q_proj.bias"][3] += 0.5
    save_file(tensors, other / "model.safetensors")
    plan, program = make_plan(toy.folder, precision="fp32", images=True), trace_program(checkpoint.spec)
    assert program.vision is not None
    stores = [
        WeightStore(checkpoint=one, key=StoreKey(source_sha256="", scheme=plan.scheme), root=tmp_path)
        for one in (checkpoint, open_checkpoint(other, images=True))
    ]
    target = seeing(targets.load("onnxruntime"))
    artifact = target.lower(program.decoder, stores[0], plan, tmp_path)
    verdicts = []
    for store in stores:
        target.lower_vision(program.vision, store, plan, tmp_path)
        steps = Drive(ids=tuple(range(3, 43)), prefills=(20, 9))
        proof = prove_images(target, artifact, program=program, store=stores[0], plan=plan, steps=steps)
        verdicts.append((proof.verdict, proof.reason.partition(":")[0]))
    assert verdicts == [(Verdict.PASSED, ""), (Verdict.FAILED, "structure")]


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.parametrize("precision", ["int4", "fp32"])
@pytest.mark.parametrize("target", targets.SEEING)
def test_a_model_that_reads_images_is_exported_and_proven_again(
    target: str, precision: str, wide: Toy, tmp_path: Path
) -> None:
    words = [str(wide.folder), "-t", target, "--images", "-p", precision, "--calibration", "none", "--json"]
    words += ["-o", str(tmp_path), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 8), result.output  # what int4 costs a random model is another matter
    manifest = json.loads(result.stdout)[0]["manifest"]
    for verdict in ("codes", "parity", "images"):
        assert manifest[verdict]["verdict"] == "passed", manifest[verdict]
    folder = next(path for path in tmp_path.iterdir() if path.name.startswith(target))
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 56, "width": 56}
    words = ["validate", str(folder), "--store", str(tmp_path / "store"), "--json", "--against", str(wide.folder)]
    again = json.loads(CliRunner().invoke(app, words).stdout)[0]["manifest"]
    assert again["images"]["verdict"] == "passed"


def test_an_adapter_changes_the_vision_transformer_too(toy: Toy, tmp_path: Path) -> None:
    """Rows of its queries lie as transformers has them, which is not as we do."""
    module = "vision_model.model.layers.0.self_attn.q_proj"
    tensors = factors({module: tuple(toy.model.get_parameter(f"{module}.weight").shape)})
    adapter = write_adapter(tmp_path / "lora", tensors)
    with pytest.raises(InputError, match="changes only what looks at images, which is left out"):
        open_checkpoint(toy.folder, adapter=adapter)
    down, up = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
    shutil.copytree(toy.folder, tmp_path / "merged")
    weights = load_file(toy.folder / "model.safetensors")
    weights[f"{module}.weight"] += ALPHA / RANK * up @ down
    save_file(weights, tmp_path / "merged" / "model.safetensors")
    found = open_checkpoint(toy.folder, adapter=adapter, images=True)
    merged = open_checkpoint(tmp_path / "merged", images=True)
    assert torch.allclose(found.read(f"{module}.weight"), merged.read(f"{module}.weight"), atol=1e-6)
    assert not torch.equal(merged.read(f"{module}.weight"), weights[f"{module}.weight"])
