"""Llama 4 on each target, in floats: answers beyond several chunks, and that an expert that is not chosen is not
computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import targets
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.model.eager import eager_table
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import Drive, drive
from exporter.spec import Plan
from exporter.store import StoredWeight, StoreKey, WeightStore
from tests.conftest import write_toy
from tests.generations import toy_config

pytestmark = pytest.mark.toolchain

IDS = tuple(torch.randint(3, 96, (60,), generator=torch.Generator().manual_seed(4)).tolist())
STEPS = Drive(ids=IDS, prefills=(37, 9))
CHUNKED = tuple(label for label in targets.EXPERTS if label != "gguf")
"""Those that take chunks of any size; llama.cpp's are in tests/targets/test_gguf_experts.py."""


class Poisoned(WeightStore):
    """A store in which the experts that are not among ``chosen`` hold no numbers: whatever they touch has none."""

    chosen: set[tuple[int, int]]

    def __getitem__(self, name: str) -> StoredWeight:
        stored = super().__getitem__(name)
        parts = name.split(".")
        if parts[4] != "experts" if len(parts) > 4 else True:
            return stored
        assert isinstance(stored, torch.Tensor)
        return stored if (int(parts[2]), int(parts[5])) in self.chosen else torch.full_like(stored, torch.nan)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("toy")
    config = toy_config("Llama 4 Scout") | {"num_hidden_layers": 2, "num_experts_per_tok": 2, "initializer_range": 0.1}
    write_toy(folder, **config)
    return open_checkpoint(folder)


@pytest.fixture
def fp32(checkpoint: Checkpoint, make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(checkpoint.folder, precision="fp32")


def chosen_by(graph: Graph, checkpoint: Checkpoint, token: int) -> set[tuple[int, int]]:
    """Layer and number of each expert that a token at the beginning chooses, by all being asked."""
    chosen: set[tuple[int, int]] = set()
    spec = graph.spec
    empty = torch.zeros(1, spec.num_key_value_heads, 0, spec.head_dim)
    inputs: dict[str, Any] = dict.fromkeys(graph.inputs, empty) | {"ids": torch.tensor([[token]])}

    def observe(node: Any, _: Any, results: Any) -> None:
        if node.op == "route":
            chosen.update((node.layer, expert) for expert in results[0][0, 0].nonzero().flatten().tolist())

    graph.run(eager_table(lambda weight: checkpoint.read(weight.name)), inputs, observe)
    return chosen


@pytest.mark.parametrize("label", CHUNKED)
def test_answers_are_those_of_the_reference_beyond_several_chunks(
    label: str, checkpoint: Checkpoint, fp32: Plan, tmp_path: Path
) -> None:
    graph, target = trace(checkpoint.spec), targets.load(label)
    store = WeightStore(checkpoint=checkpoint, key=StoreKey(source_sha256="", scheme=fp32.scheme), root=tmp_path)
    artifact = target.lower(graph, store, fp32, tmp_path)
    expected = drive(Reference(graph, store, FULL_PRECISION), STEPS)
    with target.open(artifact, threads=1) as runner:
        difference = (drive(runner, STEPS) - expected).abs().max()
    assert difference <= (2e-2 if label == "coreml" else 1e-4)  # its cache is float16


@pytest.mark.parametrize("label", CHUNKED)
def test_an_expert_that_no_token_chose_is_not_computed(
    label: str, checkpoint: Checkpoint, fp32: Plan, tmp_path: Path
) -> None:
    graph, target, token = trace(checkpoint.spec), targets.load(label), IDS[0]
    store = Poisoned(checkpoint=checkpoint, key=StoreKey(source_sha256="", scheme=fp32.scheme), root=tmp_path)
    store.chosen = chosen_by(graph, checkpoint, token)
    assert len(store.chosen) == 4
    artifact = target.lower(graph, store, fp32, tmp_path)
    with target.open(artifact, threads=1) as runner:
        logits = runner.feed([token])[-1]
    expected = Reference(graph, checkpoint, FULL_PRECISION).feed([token])[-1]
    assert (logits - expected).abs().max() <= (2e-2 if label == "coreml" else 1e-4)


@pytest.mark.parametrize("label", ["onnxruntime-qnn", "coreml-ane", "executorch-vulkan"])
def test_other_backends_refuse_experts_by_name(label: str, checkpoint: Checkpoint, fp32: Plan) -> None:
    reason = targets.refusal(label, targets.load(label), checkpoint.spec, fp32)
    assert reason == (
        "it takes dense models only, this one has experts; those that take them: executorch, onnxruntime, coreml, gguf"
    )
