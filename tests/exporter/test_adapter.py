"""LoRA adapters: merged as PEFT merges them, and refused where they cannot be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
from exporter.cli import app
from exporter.errors import InputError
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from tests.conftest import Toy

RANK, ALPHA = 4, 10
Q, DOWN, TABLE = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, "target_modules": ["q_proj"], **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(shapes: dict[str, tuple[int, ...]], *, rank: int = RANK) -> dict[str, Tensor]:
    """Of PEFT's names, for modules of these shapes [N, K]."""
    found = {}
    for seed, (module, (rows, columns)) in enumerate(shapes.items()):
        kinds = ("embedding_A", "embedding_B") if module == TABLE else ("A.weight", "B.weight")
        inner, outer = (rows, columns) if module == TABLE else (columns, rows)
        found[f"base_model.model.{module}.lora_{kinds[0]}"] = random(rank, inner, seed=2 * seed)
        found[f"base_model.model.{module}.lora_{kinds[1]}"] = random(outer, rank, seed=2 * seed + 1)
    return found


def shapes_of(toy: Toy, *modules: str) -> dict[str, tuple[int, ...]]:
    spec = open_checkpoint(toy.folder).spec
    return {module: spec.weights()[f"{module}.weight"] for module in modules}


def test_the_model_answers_as_transformers_with_the_factors_added(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy(tie_word_embeddings=False)
    tensors = factors(shapes_of(toy, Q, DOWN, TABLE))
    adapter = write_adapter(tmp_path / "lora", tensors)
    parameters = dict(toy.model.named_parameters())
    with torch.no_grad():
        for module in (Q, DOWN):
            down, up = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
            parameters[f"{module}.weight"] += ALPHA / RANK * up @ down
        down, up = (tensors[f"base_model.model.{TABLE}.lora_embedding_{kind}"] for kind in "AB")
        parameters[f"{TABLE}.weight"] += ALPHA / RANK * (up @ down).T
        ids = torch.randint(0, 96, (1, 20), generator=torch.Generator().manual_seed(9))
        expected = toy.model(ids).logits[0]
    checkpoint = open_checkpoint(toy.folder, adapter=adapter)
    got = Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION).feed(ids[0].tolist())
    assert (got - expected).abs().max() < 1e-4
    plain = open_checkpoint(toy.folder)
    assert checkpoint.sha256 != plain.sha256
    assert (Reference(trace(plain.spec), plain, FULL_PRECISION).feed(ids[0].tolist()) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"alpha_pattern": {"q_proj": 3}}, 3 / RANK),
        ({"alpha_pattern": {"layers.0.self_attn.q_proj": 3}}, 3 / RANK),
        ({"alpha_pattern": {"v_proj": 3}}, ALPHA / RANK),
        ({"rank_pattern": {"q_proj": 2}, "use_rslora": True}, ALPHA / math.sqrt(2)),
    ],
)
def test_the_scale_is_that_of_the_config(
    config: dict[str, Any], scale: float, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    toy = make_toy()
    rank = 2 if "rank_pattern" in config else RANK
    tensors = factors(shapes_of(toy, Q), rank=rank)
    adapter = write_adapter(tmp_path / "lora", tensors, **config)
    down, up = (tensors[f"base_model.model.{Q}.lora_{kind}.weight"] for kind in "AB")
    base = load_file(toy.folder / "model.safetensors")[f"{Q}.weight"]
    found = open_checkpoint(toy.folder, adapter=adapter).read(f"{Q}.weight")
    assert torch.allclose(found, base + scale * up @ down, atol=1e-6)


def test_what_was_trained_whole_takes_the_place_of_the_base(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy(tie_word_embeddings=False)
    head, norm, table = random(96, 64, seed=3), random(64, seed=4), random(96, 64, seed=5)
    tensors = {
        "base_model.model.lm_head.modules_to_save.weight": head,
        "base_model.model.model.norm.weight": norm,
        f"base_model.model.{TABLE}.base_layer.weight": table,
        **factors(shapes_of(toy, Q)),
    }
    checkpoint = open_checkpoint(toy.folder, adapter=write_adapter(tmp_path / "lora", tensors))
    assert torch.equal(checkpoint.read("lm_head.weight"), head)
    assert torch.equal(checkpoint.read("model.norm.weight"), norm)
    assert torch.equal(checkpoint.read(f"{TABLE}.weight"), table)


def test_alpha_alone_makes_another_model(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy()
    tensors = factors(shapes_of(toy, Q))
    digests = {
        open_checkpoint(toy.folder, adapter=write_adapter(tmp_path / str(alpha), tensors, lora_alpha=alpha)).sha256
        for alpha in (8, 16)
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; known: LORA"),
        ({"use_dora": True}, "use_dora is True; known: False"),
        ({"bias": "all"}, "bias is 'all'; known: none"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"r": 0}, "r is 0, a positive integer was expected"),
        ({"lora_alpha": None}, "lora_alpha is missing, a positive number was expected"),
        ({"r": 8}, "q_proj.lora_A has shape [4, 64], the checkpoint wants [8, 64]"),
    ],
)
def test_an_adapter_that_adds_in_another_way_is_refused(
    config: dict[str, Any], says: str, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    toy = make_toy()
    adapter = write_adapter(tmp_path / "lora", factors(shapes_of(toy, Q)), **config)
    with pytest.raises(InputError, match=re.escape(says)):
        open_checkpoint(toy.folder, adapter=adapter)


def test_an_adapter_of_another_model_is_refused(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy, wider = make_toy(), make_toy(hidden_size=96)
    of_wider = write_adapter(tmp_path / "wider", factors(shapes_of(wider, Q)))
    with pytest.raises(InputError, match=r"lora_A has shape \[4, 96\], the checkpoint wants \[4, 64\]"):
        open_checkpoint(toy.folder, adapter=of_wider)
    deeper = write_adapter(tmp_path / "deeper", factors({"model.layers.7.self_attn.q_proj": (128, 64)}))
    with pytest.raises(InputError, match=r"layers.7.self_attn.q_proj belongs to no tensor of the checkpoint"):
        open_checkpoint(toy.folder, adapter=deeper)
    head = write_adapter(tmp_path / "head", factors({"lm_head": (96, 64)}))
    with pytest.raises(InputError, match="changes the head alone, but the model ties it"):
        open_checkpoint(toy.folder, adapter=head)
    table = write_adapter(tmp_path / "table", factors(shapes_of(toy, TABLE)))
    with pytest.raises(InputError, match="changes the embedding, which the model ties to its head"):
        open_checkpoint(toy.folder, adapter=table)
    grown = write_adapter(tmp_path / "grown", {"base_model.model.model.embed_tokens.weight": random(100, 64, seed=1)})
    with pytest.raises(InputError, match=r"embed_tokens.weight has shape \[100, 64\], the checkpoint wants \[96, 64\]"):
        open_checkpoint(toy.folder, adapter=grown)


def test_what_is_no_adapter_is_refused(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy()
    with pytest.raises(InputError, match="is no folder"):
        open_checkpoint(toy.folder, adapter=tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no adapter_config.json"):
        open_checkpoint(toy.folder, adapter=toy.folder)
    half = factors(shapes_of(toy, Q))
    half.pop(f"base_model.model.{Q}.lora_B.weight")
    with pytest.raises(InputError, match="q_proj has A of A, B"):
        open_checkpoint(toy.folder, adapter=write_adapter(tmp_path / "half", half))
    nothing = write_adapter(tmp_path / "nothing", {})
    with pytest.raises(InputError, match="changes nothing"):
        open_checkpoint(toy.folder, adapter=nothing)
    (nothing / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has neither adapter_model.safetensors nor adapter_model.bin"):
        open_checkpoint(toy.folder, adapter=nothing)


@pytest.mark.toolchain
def test_the_command_merges_and_validates_with_it(tmp_path: Path) -> None:
    spec = open_checkpoint(BUNDLED_MODEL).spec
    small = {name: 0.05 * tensor for name, tensor in factors({Q: spec.weights()[f"{Q}.weight"]}).items()}
    adapter = write_adapter(tmp_path / "lora", small)
    store = ["--store", str(tmp_path / "store")]
    words = ["-t", "onnxruntime", "--calibration", "none", "-c", "192", "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, [str(BUNDLED_MODEL), "--adapter", str(adapter), *words, *store])
    assert result.exit_code == 0, result.output
    bundle = str(tmp_path / "out" / "onnxruntime")
    against = ["validate", bundle, "--against", str(BUNDLED_MODEL), *store]
    assert CliRunner().invoke(app, [*against, "--adapter", str(adapter)]).exit_code == 0
    without = CliRunner().invoke(app, against)
    assert without.exit_code != 0
    assert "Traceback" not in without.output
    alone = CliRunner().invoke(app, ["validate", bundle, "--adapter", str(adapter)])
    assert "--adapter goes with a checkpoint" in alone.stderr
