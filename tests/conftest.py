"""What every test may ask for: toy checkpoints written by transformers, and the trained sample."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.checkpoint import BUNDLED_MODEL
from exporter.spec import Logits, Plan, Precision, WeightScheme

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

    def make(checkpoint: Path, *, precision: str = "int4", head: str | None = None, **changes: Any) -> Plan:
        body = Precision(precision)
        ends = Precision(head or ("int8" if body.bits else precision))
        scheme = WeightScheme(body=body, embedding=ends, head=ends, group_size=32)
        defaults: dict[str, Any] = {
            "checkpoint": checkpoint,
            "targets": ("onnxruntime",),
            "scheme": scheme,
            "context": 64,
            "logits": Logits.LAST,
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


@pytest.fixture(autouse=True)
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
