"""Calibration of a model with experts: each by the tokens that come to it, and all of them under one fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.anatomy import dissect
from calibration.layers import Calibration, CalibrationText, Silent, quantize
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.quantized import QuantizedTensor
from exporter.spec import ROUTER, Method, Precision, Recipe, WeightScheme
from exporter.store import WeightStore
from tests.conftest import write_toy
from tests.generations import toy_config

INT8 = WeightScheme(body=Precision.INT8, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
WINDOWS = torch.randint(3, 96, (8, 64), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_toy(folder, **toy_config("Llama 4 Maverick") | {"num_hidden_layers": 4})
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def graph(checkpoint: Checkpoint) -> Graph:
    return trace(checkpoint.spec)


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def quantized(
    checkpoint: Checkpoint,
    graph: Graph,
    method: Method,
    root: Path,
    *,
    scheme: WeightScheme = INT4,
    windows: Tensor = WINDOWS,
    notes: Notes | None = None,
) -> WeightStore:
    text = CalibrationText(identity=str(windows.shape), source="a test", windows=lambda: windows)
    how = Calibration(recipe=Recipe(method=method), text=text, graph=graph)
    return quantize(checkpoint, scheme, root=root, calibration=how, progress=notes or Notes())[0]


def off_by(store: Any, checkpoint: Checkpoint, graph: Graph) -> float:
    ids = WINDOWS[0].tolist()
    logits = [Reference(graph, weights, FULL_PRECISION).feed(ids) for weights in (store, checkpoint)]
    return (logits[0] - logits[1]).abs().mean().item()


def test_the_fold_of_a_norm_is_that_of_router_shared_expert_and_experts(graph: Graph) -> None:
    groups = dissect(graph, 1).groups
    (shared,) = (group for group in groups if group.linears[0].endswith(ROUTER))
    place = "model.layers.1.feed_forward"
    assert shared.fold is not None
    assert shared.fold.source == "model.layers.1.post_attention_layernorm.weight"
    assert shared.linears[1:] == (
        f"{place}.shared_expert.gate_proj.weight",
        f"{place}.shared_expert.up_proj.weight",
    )
    assert shared.gated == tuple(
        f"{place}.experts.{expert}.{part}_proj.weight" for expert in range(4) for part in ("gate", "up")
    )
    assert all(group.residual is None for group in groups if group.expert is not None)


@pytest.mark.parametrize("method", [Method.AWQ, Method.SMOOTH])
def test_folded_factors_reach_all_that_read_the_norm(
    method: Method, checkpoint: Checkpoint, graph: Graph, tmp_path: Path
) -> None:
    store = quantized(checkpoint, graph, method, tmp_path, scheme=INT8)
    router = f"model.layers.1{ROUTER}"
    changed, original = store[router], checkpoint.read(router)
    assert isinstance(changed, Tensor)
    factors = changed[0] / original[0]
    assert (factors - 1).abs().max() > 0.05
    torch.testing.assert_close(changed, original * factors)
    norm = "model.layers.1.post_attention_layernorm.weight"
    folded = store[norm]
    assert isinstance(folded, Tensor)
    torch.testing.assert_close(folded, checkpoint.read(norm) / factors)
    for expert in (0, 3):
        name = f"model.layers.1.feed_forward.experts.{expert}.gate_proj.weight"
        codes = store[name]
        assert isinstance(codes, QuantizedTensor)
        torch.testing.assert_close(codes.dequantize(), checkpoint.read(name) * factors, atol=0.02, rtol=0.02)
    assert off_by(store, checkpoint, graph) < 0.1


def test_calibrated_experts_lose_less_than_rounded_ones(checkpoint: Checkpoint, graph: Graph, tmp_path: Path) -> None:
    rounded, _ = quantize(checkpoint, INT4, root=tmp_path)
    store = quantized(checkpoint, graph, Method.GPTQ, tmp_path)
    errors = store.read_errors()
    experts = [error for name, error in errors.items() if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert sum(e.stored for e in experts) < 0.8 * sum(e.rounded for e in experts)
    assert off_by(store, checkpoint, graph) < off_by(rounded, checkpoint, graph)


def test_an_expert_that_meets_few_tokens_is_rounded_and_told(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path
) -> None:
    notes = Notes()
    few = WINDOWS[:1, :12]
    store = quantized(checkpoint, graph, Method.GPTQ, tmp_path, windows=few, notes=notes)
    rounded, _ = quantize(checkpoint, INT4, root=tmp_path)
    told = [text for text in notes.texts if "rounded to nearest" in text]
    assert len(told) == 2
    assert told[0].startswith("layer 2: 4 experts met less than a token of the text for every 4 columns")
    name = "model.layers.1.feed_forward.experts.0.down_proj.weight"
    ours, plain = store[name], rounded[name]
    assert isinstance(ours, QuantizedTensor)
    assert isinstance(plain, QuantizedTensor)
    assert torch.equal(ours.codes, plain.codes)
