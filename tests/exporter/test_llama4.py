"""Llama 4 for text: what lies on disk, what is refused, and that only chosen experts are computed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint import LazyCodes, open_checkpoint
from exporter.errors import InputError
from exporter.model.eager import eager_table
from exporter.model.graph import EXPERT, Value
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.spec import ROUTER, Precision, WeightScheme
from tests.coded import FORMATS
from tests.conftest import Toy, write_toy
from tests.exporter.test_adapter import factors, shapes_of, write_adapter
from tests.generations import TOY_FUSION, toy_config

IDS = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture
def scout(tmp_path: Path) -> Toy:
    return write_toy(tmp_path / "scout", **toy_config("Llama 4 Scout"))


def logits_of(folder: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    return Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION).feed(IDS)


def test_the_text_part_of_a_model_of_images_is_taken_and_the_rest_told(tmp_path: Path) -> None:
    toy = write_toy(tmp_path, **toy_config("Llama 4 Maverick"), vision_config=TOY_FUSION)
    with torch.no_grad():
        expected = toy.model(input_ids=torch.tensor([IDS])).logits[0]
    assert (logits_of(tmp_path) - expected).abs().max() < 1e-4
    left_out = open_checkpoint(tmp_path).left_out
    assert left_out == "this model reads images too: they are left out, its text part is taken; --images takes them"


def test_experts_that_lie_one_by_one_are_the_same_model(scout: Toy) -> None:
    expected = logits_of(scout.folder)
    checkpoint = open_checkpoint(scout.folder)
    tensors = load_file(scout.folder / "model.safetensors")
    for name in list(tensors):
        if ".experts." in name:
            del tensors[name]
    tensors |= {name: checkpoint.read(name).contiguous() for name in checkpoint.spec.weights() if ".experts." in name}
    save_file(tensors, scout.folder / "model.safetensors")
    assert (logits_of(scout.folder) - expected).abs().max() < 1e-5  # a product of rows is added up in another order


def test_a_token_is_computed_by_its_own_experts_alone(tmp_path: Path) -> None:
    toy = write_toy(tmp_path, **toy_config("Llama 4 Scout") | {"num_experts_per_tok": 2})
    checkpoint = open_checkpoint(tmp_path)
    spec, graph = checkpoint.spec, trace(checkpoint.spec)
    table = eager_table(lambda weight: checkpoint.read(weight.name))
    empty = torch.zeros(1, spec.num_key_value_heads, 0, spec.head_dim)
    inputs: dict[str, Any] = dict.fromkeys(graph.inputs, empty) | {"ids": torch.tensor([IDS])}
    tokens: Counter[tuple[int | None, int]] = Counter()

    def observe(node: Any, arguments: Any, results: Any) -> None:
        if node.op == "gate":
            assert (arguments[1][..., node.expert] > 0).all()
            tokens[node.layer, node.expert] += arguments[0].shape[1]

    skipping = graph.run(table, inputs, observe)["logits"]
    assert [sum(n for (layer, _), n in tokens.items() if layer == index) for index in range(5)] == [2 * len(IDS)] * 5
    everything = graph.run({op: run for op, run in table.items() if op != EXPERT}, inputs)["logits"]
    assert (skipping - everything).abs().max() < 1e-5
    with torch.no_grad():
        assert (everything[0] - toy.model(torch.tensor([IDS])).logits[0]).abs().max() < 1e-4


def test_an_expert_that_no_token_chooses_runs_no_node(scout: Toy) -> None:
    checkpoint = open_checkpoint(scout.folder)
    graph = trace(checkpoint.spec)
    seen: set[tuple[int | None, int | None]] = set()
    table = eager_table(lambda weight: checkpoint.read(weight.name))
    empty = torch.zeros(1, checkpoint.spec.num_key_value_heads, 0, checkpoint.spec.head_dim)
    inputs: dict[str, Any] = dict.fromkeys(graph.inputs, empty) | {"ids": torch.tensor([IDS[:1]])}
    graph.run(table, inputs, lambda node, *_: seen.add((node.layer, node.expert)))
    assert len([place for place in seen if place[1] is not None]) == 5  # one of four experts in each of five layers


def test_a_router_is_stored_as_float32_whatever_the_body_is() -> None:
    scheme = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
    assert scheme.precision(f"model.layers.3{ROUTER}") is Precision.FP32
    assert scheme.precision("model.layers.3.feed_forward.experts.0.up_proj.weight") is Precision.INT4


def test_the_graph_of_a_layer_adds_its_experts_to_the_shared_one(scout: Toy) -> None:
    graph = trace(open_checkpoint(scout.folder).spec)
    layer = [node for node in graph.nodes if node.layer == 1 and node.expert is not None]
    assert [node.op for node in layer[:7]] == ["gate", "linear", "linear", "silu", "mul", "linear", "add"]
    assert [node.expert for node in layer[::7]] == [0, 1, 2, 3]
    assert layer[13].arguments[0] == Value(layer[6].name)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moe_layers": [0, 5]}, r"moe_layers is \[0, 5\]; known: a list of layers, 0 to 4"),
        ({"layer_types": ["sliding_attention"] * 5}, "layer_types is .*; known: a list of 5 values out of"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]; known: a list of 5 values"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5, 1 to num_local_experts \(4\) were expected"),
        ({"attention_chunk_size": 0}, "attention_chunk_size is 0, a positive integer was expected"),
        ({"num_local_experts": 3}, r"experts.down_proj has shape \[4, 96, 64\], config.json wants \[3, 96, 64\]"),
        ({"num_local_experts": None}, "num_local_experts is missing"),
        ({"attention_bias": True}, "attention_bias is True; known: False"),
        ({"model_type": "llama4"}, r"architectures is \['Llama4ForCausalLM'\]"),
    ],
)
def test_what_the_graph_would_not_honour_is_refused(scout: Toy, change: dict[str, Any], sentence: str) -> None:
    scout.edit_config(**change)
    with pytest.raises(InputError, match=sentence):
        open_checkpoint(scout.folder)


def test_an_adapter_of_stacked_experts_is_refused_by_name(scout: Toy, tmp_path: Path) -> None:
    module = "base_model.model.model.layers.1.feed_forward.experts"
    adapter = write_adapter(tmp_path / "lora", {f"{module}.lora_A.weight": torch.zeros(16, 64)})
    with pytest.raises(
        InputError, match=r"layers.1.feed_forward.experts.lora_A.weight adds to experts that lie stacked"
    ):
        open_checkpoint(scout.folder, adapter=adapter)


def test_an_adapter_of_the_text_part_of_a_model_of_images_is_the_same(scout: Toy, tmp_path: Path) -> None:
    tensors = factors(shapes_of(scout, "model.layers.2.self_attn.k_proj"))
    inside = {
        name.replace("base_model.model.", "base_model.model.language_model."): part for name, part in tensors.items()
    }
    name = "model.layers.2.self_attn.k_proj.weight"
    one = open_checkpoint(scout.folder, adapter=write_adapter(tmp_path / "one", tensors))
    other = open_checkpoint(scout.folder, adapter=write_adapter(tmp_path / "other", inside))
    assert torch.equal(one.read(name), other.read(name))
    assert not torch.equal(one.read(name), open_checkpoint(scout.folder).read(name))


@pytest.mark.parametrize("kind", ["packed with zero points", "int8 by row", "gptq with zero points", "awq"])
def test_codes_are_kept_with_rows_scales_and_zero_points_in_one_order(kind: str, scout: Toy, tmp_path: Path) -> None:
    """Of layer 0, whose queries are rotated: what the codes mean is what was written, channels 2i and 2i + 1 apart."""
    meant = FORMATS[kind].write(tmp_path / "coded", scout.folder)
    checkpoint = open_checkpoint(tmp_path / "coded")
    for layer, rotated in ((0, True), (1, False)):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        codes = checkpoint.tensors[name]
        assert isinstance(codes, LazyCodes)
        rows = torch.arange(128).view(4, 16, 2).mT.flatten() if rotated else torch.arange(128)
        assert torch.equal(codes.coded().dequantize(), meant[name][rows])
        assert torch.equal(codes.read(), meant[name][rows])
    expert = checkpoint.tensors["model.layers.2.feed_forward.experts.3.up_proj.weight"]
    assert isinstance(expert, LazyCodes)
    stack = meant["model.layers.2.feed_forward.experts.gate_up_proj"]
    assert torch.equal(expert.coded().dequantize(), stack[3, :, 96:].T)
