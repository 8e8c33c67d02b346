"""Llama 3.2 Vision: what lies on disk, what is refused, and that images are seen as transformers sees them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import targets
from calibration.layers import quantize
from exporter.checkpoint import BUNDLED_MODEL, Checkpoint, open_checkpoint
from exporter.checkpoint import read_spec as read_whole
from exporter.checkpoint.config import read_spec
from exporter.errors import ExportError, InputError
from exporter.model.graph import Graph, Weight
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace, trace_vision
from exporter.pipeline import refuse_early
from exporter.planning import plan as plan_of
from exporter.spec import EMBEDDING, Precision
from exporter.store import StoreKey, WeightStore, plain
from targets import executorch
from tests.conftest import Toy, write_toy
from tests.generations import PROCESSOR, config_of, toy_config

IDS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return write_toy(tmp_path_factory.mktemp("vision"), **toy_config("Llama 3.2 Vision"))


def text_of(folder: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    return Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION).feed(IDS)


def test_the_text_part_is_taken_and_the_rest_told(toy: Toy) -> None:
    checkpoint = open_checkpoint(toy.folder)
    assert (
        checkpoint.left_out
        == "this model reads images too: they are left out, its text part is taken; --images takes them"
    )
    assert checkpoint.spec.num_hidden_layers == 3
    layers = {name.split(".")[2] for name in checkpoint.spec.weights() if name.startswith("model.layers.")}
    assert layers == {"0", "2", "4"}  # as the checkpoint has them


def test_the_whole_model_has_every_tensor_of_transformers(toy: Toy) -> None:
    spec = read_spec(toy.folder)
    assert spec.parameters == toy.model.num_parameters()
    assert spec.text_alone().parameters < spec.parameters


def test_the_names_that_transformers_has_in_memory_are_the_same_model(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((toy.folder / "config.json").read_bytes())
    save_file(
        {name: tensor.contiguous() for name, tensor in toy.model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    released = load_file(toy.folder / "model.safetensors")
    assert "language_model.model.norm.weight" in released
    assert "model.language_model.norm.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(text_of(tmp_path), text_of(toy.folder))


@dataclass(frozen=True, slots=True)
class Scene:
    """A text with images in it, in the inputs of transformers."""

    ids: torch.Tensor
    pixels: torch.Tensor
    """[1, images, M, C, S, S]"""
    ratios: torch.Tensor
    """[1, images]"""
    there: torch.Tensor
    """[1, images, M]: the tiles that are no padding."""
    seen: torch.Tensor
    """[1, T, images, M]: the tiles that each token sees."""

    @property
    def tiles(self) -> torch.Tensor:
        return self.seen[0].flatten(1).bool()

    def inputs(self) -> dict[str, torch.Tensor]:
        images = {"pixel_values": self.pixels, "aspect_ratio_ids": self.ratios, "aspect_ratio_mask": self.there}
        return {"input_ids": self.ids, **images, "cross_attention_mask": self.seen}

    def image(self, index: int) -> dict[str, torch.Tensor]:
        """In the inputs of our graph."""
        one = slice(index, index + 1)
        images = {"aspect_ratio_ids": self.ratios[:, one], "aspect_ratio_mask": self.there[:, one]}
        return {"pixel_values": self.pixels[:, index], **images}


def scene(*tiles: int, length: int = 30) -> Scene:
    """An image of so many tiles for each of ``tiles``, shown after 4 tokens, 5 more, and so on; a token sees what was
    shown before it, and the first tokens see nothing."""
    generator = torch.Generator().manual_seed(len(tiles))
    count = len(tiles)
    there = torch.arange(4).expand(1, count, 4) < torch.tensor(tiles).view(1, count, 1)
    pixels = torch.randn(1, count, 4, 3, 28, 28, generator=generator) * there[..., None, None, None]
    ids = torch.randint(3, 96, (1, length), generator=generator)
    seen = torch.zeros(1, length, count, 4, dtype=torch.int64)
    for index in range(count):
        ids[0, 4 + 5 * index] = 96
        seen[0, 4 + 5 * index :, index] = there[0, index].long()
    return Scene(ids=ids, pixels=pixels, ratios=torch.tensor([tiles]), there=there.long(), seen=seen)


@pytest.fixture(scope="module")
def seeing(toy: Toy) -> tuple[Checkpoint, Graph, Graph]:
    checkpoint = open_checkpoint(toy.folder, images=True)
    return checkpoint, trace(checkpoint.spec), trace_vision(checkpoint.spec)


@pytest.mark.parametrize("tiles", [(1,), (3,), (4,), (2, 3)])
def test_prefill_and_decode_with_images_are_those_of_transformers(
    toy: Toy, seeing: tuple[Checkpoint, Graph, Graph], tiles: tuple[int, ...]
) -> None:
    checkpoint, decoder, vision = seeing
    shown = scene(*tiles)
    with torch.no_grad():
        expected = toy.model(**shown.inputs()).logits[0]
        blind = toy.model(input_ids=shown.ids).logits[0]
    assert (expected - blind).abs().max() > 1  # the images matter
    reference = Reference(decoder, checkpoint, FULL_PRECISION)
    for index in range(len(tiles)):
        reference.look(vision, shown.image(index))
    ids = shown.ids[0].tolist()
    spans = [slice(0, 18), *(slice(position, position + 1) for position in range(18, len(ids)))]
    got = torch.cat([reference.feed(ids[span], tiles=shown.tiles[span]) for span in spans])
    assert (got - expected).abs().max() < 1e-4


def test_keys_and_values_of_an_image_are_those_that_transformers_keeps(
    toy: Toy, seeing: tuple[Checkpoint, Graph, Graph]
) -> None:
    checkpoint, decoder, vision = seeing
    shown = scene(3)
    with torch.no_grad():
        kept = toy.model(**shown.inputs(), use_cache=True).past_key_values
    states = Reference(decoder, checkpoint, FULL_PRECISION).look(vision, shown.image(0))
    for index, layer in enumerate((1, 3)):
        assert (states[f"cross_k.{index}"] - kept.layers[layer].keys).abs().max() < 1e-4
        assert (states[f"cross_v.{index}"] - kept.layers[layer].values).abs().max() < 1e-4


def test_a_decoder_that_is_shown_no_image_is_the_text_alone(toy: Toy, seeing: tuple[Checkpoint, Graph, Graph]) -> None:
    checkpoint, decoder, _ = seeing
    got = Reference(decoder, checkpoint, FULL_PRECISION).feed(IDS)
    assert (got - text_of(toy.folder)).abs().max() < 1e-5
    with torch.no_grad():
        assert (got - toy.model(input_ids=torch.tensor([IDS])).logits[0]).abs().max() < 1e-4


def test_layers_that_look_at_images_belong_to_the_decoder_layer_behind_them(
    seeing: tuple[Checkpoint, Graph, Graph],
) -> None:
    _, decoder, vision = seeing
    assert [node.layer for node in decoder.nodes if node.op == "cross_attention"] == [1, 2]
    assert decoder.shortened(range(1, 2), head=True).inputs == ("ids", "past_k.1", "past_v.1")
    assert {node.layer for node in vision.nodes} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("size", ["11B", "90B"])
def test_the_vision_graph_of_a_released_size_reads_every_weight_that_the_decoder_does_not(
    size: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("Llama 3.2 Vision", size)))
    spec = read_spec(tmp_path)
    graphs = trace(spec), trace_vision(spec)
    read = [{a.name: a.shape for n in graph.nodes for a in n.arguments if isinstance(a, Weight)} for graph in graphs]
    assert not read[0].keys() & read[1].keys()
    assert read[0] | read[1] == spec.weights()


@pytest.mark.parametrize(
    ("part", "change", "sentence"),
    [
        ("text_config", {"cross_attention_layers": [0, 5]}, r"\[0, 5\]; known: a list of some of 0 to 4"),
        ("text_config", {"cross_attention_layers": [0, 1, 2, 3, 4]}, "known: a list of some of 0 to 4"),
        ("text_config", {"model_type": "llama"}, "known: an object of model_type mllama_text_model"),
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act is 'relu'; known: gelu"),
        ("vision_config", {"intermediate_layers_indices": [1, 4]}, r"\[1, 4\]; known: a list of some of 0 to 3"),
        ("vision_config", {"vision_output_dim": 64}, "vision_output_dim is 64; known: 96"),
        ("vision_config", {"attention_heads": 3}, r"hidden_size \(32\) of the vision_config must be divisible by"),
        ("vision_config", {"supported_aspect_ratios": [[1, 5]]}, "max_num_tiles is 4, too few"),
        ("vision_config", {"patch_size": "14"}, "patch_size is '14', a positive integer was expected"),
        ("vision_config", {"intermediate_layers_indices": 3}, "intermediate_layers_indices"),
        ("vision_config", {"supported_aspect_ratios": 4}, "supported_aspect_ratios"),
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


def refused(folder: Path, target: str, **choices: Any) -> str:
    plan = plan_of(folder, target=target, images=True, calibration="none", **choices)
    with pytest.raises(ExportError) as raised:
        refuse_early(plan, read_whole(folder, images=True), {target: targets.load(target)})
    return str(raised.value)


def test_weights_that_cannot_all_be_in_memory_are_refused_where_the_proof_wants_them(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, target = read_whole(toy.folder, images=True), targets.load("executorch")
    choices: dict[str, Any] = {"target": "executorch", "images": True, "calibration": "none"}
    int4, fp32 = (plan_of(toy.folder, precision=precision, **choices) for precision in ("int4", "fp32"))
    monkeypatch.setattr(executorch, "host_memory_bytes", lambda: 4 * spec.parameters - 1)
    assert "takes all weights in float32 at once" in str(target.refuse(spec, int4))
    assert target.refuse(spec, fp32) is None
    monkeypatch.setattr(executorch, "host_memory_bytes", lambda: 4 * spec.parameters)
    assert target.refuse(spec, int4) is None


@pytest.mark.parametrize(
    ("target", "choices", "sentence"),
    [
        ("executorch-portable", {}, "it takes no images; those that do: executorch, onnxruntime, coreml; without"),
        ("coreml-ane", {}, "target coreml-ane: it takes no images"),
        ("onnxruntime", {"prefer": "prefill"}, "--prefer prefill has not been tried on a model that sees images"),
        ("executorch", {"kv_cache": "int8"}, "--kv-cache int8 has not been tried on a model that sees images"),
        ("onnxruntime", {"kv_cache": "int8"}, "--kv-cache int8 has not been tried on a model that sees images"),
        ("onnxruntime", {"budget_mb": 1.0}, "what a matrix costs is measured on text"),
    ],
)
def test_what_does_not_go_with_images_is_refused(
    toy: Toy, tmp_path: Path, target: str, choices: dict[str, Any], sentence: str
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((toy.folder / name).read_bytes())
    written(tmp_path)
    if "budget_mb" in choices:  # which wants a text
        plan = plan_of(tmp_path, target=target, images=True, **choices)
        with pytest.raises(ExportError, match=sentence):
            refuse_early(plan, read_whole(tmp_path, images=True), {target: targets.load(target)})
    else:
        assert sentence in refused(tmp_path, target, **choices)


def written(folder: Path, **changes: Any) -> None:
    config = {**PROCESSOR, "size": {"height": 28, "width": 28}, **changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def test_a_processor_that_no_app_would_follow_is_refused(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((toy.folder / "config.json").read_bytes())
    assert "has no preprocessor_config.json" in refused(tmp_path, "onnxruntime")
    written(tmp_path, size={"height": 14, "width": 14})
    assert "size is {'height': 14, 'width': 14}, {'height': 28, 'width': 28} was expected" in refused(
        tmp_path, "onnxruntime"
    )
    written(tmp_path, image_mean=[0.5])
    assert "image_mean is [0.5], 3 numbers were expected" in refused(tmp_path, "onnxruntime")


def test_images_of_a_model_that_sees_none_are_refused() -> None:
    assert "--images: this model sees none" in refused(BUNDLED_MODEL, "onnxruntime")


def test_parts_of_a_store_are_layers_and_what_looks_at_images_by_layer(
    seeing: tuple[Checkpoint, Graph, Graph], make_plan: Any, tmp_path: Path
) -> None:
    checkpoint, *_ = seeing
    plan = make_plan(checkpoint.folder)
    store = WeightStore(checkpoint=checkpoint, key=StoreKey(source_sha256="", scheme=plan.scheme), root=tmp_path)
    places = ["model.layers.1", "model.layers.3", "vision_model"]
    places += [f"vision_model.transformer.layers.{index}" for index in range(4)]
    places += [f"vision_model.global_transformer.layers.{index}" for index in range(2)]
    assert store.parts == (0, 1, 2, None, *places, "multi_modal_projector")
    assert store.part_of("model.layers.3.cross_attn_attn_gate") == "model.layers.3"
    assert store.part_of("model.layers.2.mlp.up_proj.weight") == 1
    precisions = {plan.scheme.precision(name) for name in checkpoint.spec.weights() if name.startswith("vision")}
    assert precisions == {Precision.INT8, Precision.FP16}


def test_an_embedding_longer_than_the_head_is_cut_as_the_store_has_it(toy: Toy, tmp_path: Path) -> None:
    """For llama.cpp, of which ``tests/targets/test_gguf.py`` has the rest."""
    checkpoint, plan = open_checkpoint(toy.folder), plan_of(toy.folder, target="gguf", calibration="none")
    refuse_early(plan, checkpoint.spec, {"gguf": targets.load("gguf")})
    for precision in (Precision.INT4, Precision.INT8, Precision.FP16, Precision.FP32):
        scheme = replace(plan.scheme, body=precision, embedding=precision, head=precision)
        store, _ = quantize(checkpoint, scheme, root=tmp_path)
        whole, cut = store[EMBEDDING], store.without_extra_embeddings()[EMBEDDING]
        assert (tuple(whole.shape), tuple(cut.shape)) == ((104, 64), (96, 64))
        rows = [weight if isinstance(weight, torch.Tensor) else plain(weight).dequantize() for weight in (whole, cut)]
        assert torch.equal(rows[0][:96], rows[1])
