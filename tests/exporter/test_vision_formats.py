"""Llama 3.2 Vision in other formats than safetensors: with images it answers as transformers on the same weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.checkpoint import LazyCodes, open_checkpoint
from exporter.errors import InputError
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace, trace_vision
from tests import coded
from tests.coded import as_gptq, as_int8, as_packed, choose, in_memory
from tests.conftest import Toy, write_toy
from tests.exporter.test_adapter import ALPHA, RANK, factors, random, write_adapter
from tests.exporter.test_checkpoint import pickled
from tests.exporter.test_vision import scene
from tests.generations import toy_config

NEW, OLD = "model.language_model.", "language_model.model."
"""What transformers calls the decoder from 4.52 on, and before."""


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return write_toy(tmp_path / "toy", **toy_config("Llama 3.2 Vision"))


def differs(model: Any, folder: Path, **choices: Any) -> float:
    """How far logits of a text with two images are from those of ``model``."""
    checkpoint = open_checkpoint(folder, images=True, **choices)
    shown, vision = scene(2, 3), trace_vision(checkpoint.spec)
    reference = Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION)
    for index in range(2):
        reference.look(vision, shown.image(index))
    with torch.no_grad():
        expected = model(**shown.inputs()).logits[0]
    return float((reference.feed(shown.ids[0].tolist(), tiles=shown.tiles) - expected).abs().max())


def test_images_are_seen_by_a_model_of_pickles(toy: Toy) -> None:
    pickled(toy, shards=2)
    assert differs(toy.model, toy.folder) < 1e-4


@pytest.mark.parametrize("names", [NEW, OLD])
def test_an_adapter_changes_what_looks_at_images_too(names: str, toy: Toy, tmp_path: Path) -> None:
    """``names``: of the decoder; of the rest as transformers of that time has them."""
    shapes = {
        "model.language_model.layers.0.self_attn.q_proj": (128, 64),
        "model.language_model.layers.1.cross_attn.k_proj": (64, 64),
        "model.language_model.layers.3.mlp.down_proj": (64, 96),
        "model.vision_model.transformer.layers.1.self_attn.q_proj": (32, 32),
        "model.vision_model.global_transformer.layers.0.mlp.fc1": (64, 32),
        "model.multi_modal_projector": (64, 96),
    }
    shapes = {module: tuple(toy.model.get_parameter(f"{module}.weight").shape) for module in shapes}
    tensors = factors(shapes)
    stored = dict(tensors)
    if names == OLD:
        stored = {
            name.replace(f"model.{NEW}", f"model.{OLD}")
            .replace("model.model.vision", "model.vision")
            .replace("model.model.multi", "model.multi"): tensor
            for name, tensor in tensors.items()
        }
    adapter = write_adapter(tmp_path / "lora", stored)
    assert differs(toy.model, toy.folder, adapter=adapter) > 0.1
    with torch.no_grad():
        for module in shapes:
            down, up = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
            toy.model.get_parameter(f"{module}.weight").add_(ALPHA / RANK * up @ down)
    assert differs(toy.model, toy.folder, adapter=adapter) < 1e-4
    blind = open_checkpoint(toy.folder, adapter=adapter)
    assert blind.left_out is not None
    assert blind.left_out.endswith("--images takes them, and what the adapter adds there")
    changed = [name for name in blind.spec.weights() if not torch.equal(blind.read(name), whole(toy, name))]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def whole(toy: Toy, name: str) -> Tensor:
    return load_file(toy.folder / "model.safetensors")[f"language_model.{name}"]


def test_a_pattern_is_of_the_names_that_the_adapter_has(toy: Toy, tmp_path: Path) -> None:
    module = f"{NEW}layers.0.self_attn.q_proj"
    tensors = factors({module: tuple(toy.model.get_parameter(f"{module}.weight").shape)})
    adapter = write_adapter(tmp_path / "lora", tensors, alpha_pattern={module: 1})
    down, up = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
    name = "model.layers.0.self_attn.q_proj.weight"
    found = open_checkpoint(toy.folder, adapter=adapter).read(name)
    assert torch.allclose(found, whole(toy, name) + up @ down / RANK, atol=1e-6)


def test_an_adapter_to_what_is_left_out_alone_is_refused(toy: Toy, tmp_path: Path) -> None:
    tensors = factors({"model.vision_model.transformer.layers.1.self_attn.q_proj": (32, 32)})
    adapter = write_adapter(tmp_path / "lora", tensors)
    with pytest.raises(InputError, match="changes only what looks at images, which is left out") as raised:
        open_checkpoint(toy.folder, adapter=adapter)
    assert raised.value.hint == "add --images, or leave --adapter out"
    open_checkpoint(toy.folder, adapter=adapter, images=True)


def test_an_adapter_of_another_size_is_refused(toy: Toy, tmp_path: Path) -> None:
    deeper = factors({f"{NEW}layers.7.self_attn.q_proj": (64, 64)})
    with pytest.raises(InputError, match=r"layers.7.self_attn.q_proj belongs to no tensor of the checkpoint"):
        open_checkpoint(toy.folder, adapter=write_adapter(tmp_path / "deeper", deeper))
    wider = factors({"model.vision_model.transformer.layers.1.self_attn.q_proj": (48, 48)})
    with pytest.raises(InputError, match=r"lora_A has shape \[4, 48\], the checkpoint wants \[4, 32\]"):
        open_checkpoint(toy.folder, adapter=write_adapter(tmp_path / "wider", wider), images=True)


def test_a_projector_trained_whole_takes_the_place_of_the_base(toy: Toy, tmp_path: Path) -> None:
    module = "model.multi_modal_projector"
    trained = random(*toy.model.get_parameter(f"{module}.weight").shape, seed=7)
    adapter = write_adapter(tmp_path / "lora", {f"base_model.model.{module}.modules_to_save.weight": trained})
    with torch.no_grad():
        toy.model.get_parameter(f"{module}.weight").copy_(trained)
    assert differs(toy.model, toy.folder, adapter=adapter) < 1e-4


@pytest.mark.parametrize("form", ["gptq", "gptq with zero points", "awq", "packed", "int8 by row", "int8 in groups"])
def test_codes_of_the_decoder_stay_where_images_are_seen(form: str, toy: Toy, tmp_path: Path) -> None:
    """The linears that look at images among them."""
    folder = tmp_path / "quantized"
    meant = coded.FORMATS[form].write(folder, toy.folder)
    checkpoint = open_checkpoint(folder, images=True)
    kept = {name for name, tensor in checkpoint.tensors.items() if isinstance(tensor, LazyCodes)}
    assert {name.split(".")[2] for name in kept} == {"0", "1", "2", "3", "4"}
    assert "model.layers.1.cross_attn.k_proj.weight" in kept
    assert differs(loaded(toy, meant), folder) < 1e-4


def loaded(toy: Toy, meant: Mapping[str, Tensor]) -> Any:
    weights = {in_memory(name): weight.float() for name, weight in meant.items()}
    assert not toy.model.load_state_dict(weights, strict=False).unexpected_keys
    return toy.model


@pytest.mark.parametrize(("stored", "bits"), [(as_gptq, 4), (as_packed, 4), (as_int8, 8)])
def test_codes_of_the_vision_transformer_are_read(stored: Any, bits: int, toy: Toy, tmp_path: Path) -> None:
    """Its linears have biases, and the projector's columns are in another order than ours."""
    source = load_file(toy.folder / "model.safetensors")
    written, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in source.items():
        if not re.search(r"(fc1|q_proj|multi_modal_projector)\.weight", name):
            written[name] = meant[name] = weight
            continue
        codes = choose(weight, bits=bits, group=32, symmetric=True)
        meant[name] = codes.values()
        written |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in stored(codes).items()}
    folder = tmp_path / "quantized"
    folder.mkdir()
    config = json.loads((toy.folder / "config.json").read_text())
    how = {as_gptq: coded.GPTQ, as_packed: coded.PACKED, as_int8: coded.INT8}[stored]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    save_file(written, folder / "model.safetensors")
    assert differs(loaded(toy, meant), folder) < 1e-4
    assert set(open_checkpoint(folder).tensors) == set(open_checkpoint(toy.folder).tensors)


def test_a_layer_more_than_config_json_tells_is_refused(toy: Toy) -> None:
    """It is no layer that looks at images."""
    config = json.loads((toy.folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (toy.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"unknown \(model.layers.4.self_attn"):
        open_checkpoint(toy.folder)
