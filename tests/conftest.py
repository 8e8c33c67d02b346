"""What every test may ask for: toy checkpoints written by transformers, and the trained sample."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration.layers import ROUNDED
from exporter.checkpoint import BUNDLED_MODEL
from exporter.quantized import QuantizedTensor
from exporter.spec import Logits, Plan, Precision, Rule, Sampling, WeightScheme, activation_block

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


CLEAR_MARGIN = 0.25
"""In logits: another processor's last bits cannot turn such a choice."""


def clear_tokens(greedy: list[tuple[int, float]]) -> list[int]:
    """The tokens of ``Reference.greedy`` before its first near tie."""
    return [token for token, _ in takewhile(lambda choice: choice[1] > CLEAR_MARGIN, greedy)]


@dataclass(frozen=True)
class Toy:
    """A random checkpoint on disk and the transformers model that it was saved from."""

    folder: Path
    model: Any

    def edit_config(self, **changes: Any) -> None:
        """Set fields of config.json; None removes one."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        for key, value in changes.items():
            config[key] = value
            if value is None:
                del config[key]
        path.write_text(json.dumps(config))


@pytest.fixture
def make_toy(tmp_path: Path) -> Callable[..., Toy]:
    """A maker of toy checkpoints: config fields by name over ``TOY``; ``shards`` > 1 splits the weights."""
    made = 0

    def make(*, seed: int = 0, shards: int = 1, **config: Any) -> Toy:
        nonlocal made
        made += 1
        return write_toy(tmp_path / f"toy-{made}", seed=seed, shards=shards, **config)

    return make


def write_toy(folder: Path, *, seed: int = 0, shards: int = 1, **config: Any) -> Toy:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TOY, **config})).eval()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 4096)
    return Toy(folder=folder, model=model)


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., Plan]:
    """A maker of plans for a checkpoint folder; everything it writes lies below the test's own folder."""

    def make(
        checkpoint: Path,
        *,
        precision: str = "int4",
        head: str | None = None,
        group_size: int = 32,
        rules: tuple[Rule, ...] = (),
        **changes: Any,
    ) -> Plan:
        body = Precision(precision)
        ends = Precision(head or ("int8" if body.bits else precision))
        scheme = WeightScheme(body=body, embedding=ends, head=ends, group_size=group_size, rules=rules)
        defaults: dict[str, Any] = {
            "checkpoint": checkpoint,
            "targets": ("onnxruntime",),
            "scheme": scheme,
            "context": 64,
            "logits": Logits.LAST,
            "recipe": ROUNDED,
            "sampling": Sampling(),
            "out": tmp_path / "out",
            "store": tmp_path / "store",
            "evaluation_text": BUNDLED_MODEL / "evaluation.txt",
            "threads": 1,
        }
        return Plan(**{**defaults, **changes})

    return make


@pytest.fixture(scope="session")
def sample() -> Path:
    """The trained model that ships with llama-export."""
    return BUNDLED_MODEL


def apply_matmulnbits(tensor: QuantizedTensor, x: Tensor, *, accuracy_level: int) -> Tensor:
    """``x`` float32 [T, K] through ONNX Runtime's MatMulNBits with that weight: float32 [T, N]."""
    import onnx_ir as ir
    import onnxruntime as ort

    from targets.onnxruntime.lower import MICROSOFT, unsigned_codes

    rows, columns = tensor.shape
    block = activation_block(columns=columns, group_size=tensor.group_size)
    codes = unsigned_codes(tensor).view(rows, columns // block, -1).numpy()
    scales = tensor.scales.repeat_interleave(tensor.group_size // block, dim=1).contiguous().numpy()
    source = ir.Value(name="x", shape=ir.Shape(("T", columns)), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [ir.Value(name=n, const_value=ir.tensor(v, name=n)) for n, v in (("codes", codes), ("scales", scales))]
    attributes = {"N": rows, "K": columns, "bits": tensor.bits, "block_size": block, "accuracy_level": accuracy_level}
    node = ir.node("MatMulNBits", [source, *constants], attributes, domain=MICROSOFT)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21, MICROSOFT: 1}
    graph = ir.Graph([source], node.outputs, nodes=[node], initializers=constants, opset_imports=opsets, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    (y,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    return torch.from_numpy(y)


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
