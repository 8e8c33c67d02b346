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
from tests.generations import TOY_VISION

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
    """Of Llama, or as ``model_type`` says; of Llama 3.2 Vision's text model with all the rest around it, of Llama 4's
    where there is a ``vision_config``."""
    torch.manual_seed(seed)
    fields = {"model_type": "llama", **TOY, **config}
    made = {"mllama_text_model": _seeing_model, "llama4_text": _fusing_model}.get(fields["model_type"], _text_model)
    model = made(fields)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 4096)
    return Toy(folder=folder, model=model)


def later(*values: Any) -> list[Any]:
    """Parameters of a test that are left to make test-matrix."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def with_tokenizer(toy: Toy) -> Toy:
    """With the bundled model's tokenizer, whose ids are the first of the vocabulary."""
    for file in BUNDLED_MODEL.glob("tokenizer*.json"):
        (toy.folder / file.name).write_bytes(file.read_bytes())
    return toy


def _text_model(fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).eval()


def _seeing_model(fields: dict[str, Any]) -> Any:
    """Every gate is open in part: transformers leaves them shut, and images without effect.

    States of the vision transformer are those that a layer reads, as Meta's own program has them
    (meta-llama/llama-models, models/llama3/multimodal/model.py, ``ImageTransformer``), and vLLM. transformers 5.23
    takes those that the layer gives, one layer later (huggingface/transformers#39785): delete this once it does not.
    """
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {name: value for name, value in fields.items() if name != "head_dim"} | {
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    vision = {**TOY_VISION, **text.pop("vision_config", {})}
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=text["vocab_size"])
    model = MllamaForConditionalGeneration(config).eval()
    seeing = model.model.vision_model
    seeing.intermediate_layers_indices = [index - 1 for index in seeing.intermediate_layers_indices]
    for name, parameter in model.named_parameters():
        if parameter.numel() == 1 or name.endswith("gate"):
            torch.nn.init.uniform_(parameter, 0.4, 1.2)
        elif parameter.dim() == 1:  # norms and biases, which are ones and zeros
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model


def _fusing_model(fields: dict[str, Any]) -> Any:
    """Where there is a ``vision_config``. Norms and biases there are other than ones and zeros."""
    if "vision_config" not in fields:
        return _text_model(fields)
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {name: value for name, value in fields.items() if name != "vision_config"} | {"tie_word_embeddings": False}
    config = Llama4Config(
        text_config=text, vision_config=fields["vision_config"], image_token_index=text["vocab_size"] - 6
    )
    model = Llama4ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("vision_model.") and parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model


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

    from targets.onnxruntime.lower import MICROSOFT, unsigned_codes, unsigned_zeros

    rows, columns = tensor.shape
    block = activation_block(columns=columns, group_size=tensor.group_size)
    codes = unsigned_codes(tensor).view(rows, columns // block, -1).numpy()
    scales = tensor.scales.repeat_interleave(tensor.group_size // block, dim=1).contiguous().numpy()
    source = ir.Value(name="x", shape=ir.Shape(("T", columns)), type=ir.TensorType(ir.DataType.FLOAT))
    parts = {"codes": codes, "scales": scales}
    if tensor.zeros is not None:
        parts["zeros"] = unsigned_zeros(tensor, blocks=columns // block).numpy()
    constants = [ir.Value(name=n, const_value=ir.tensor(v, name=n)) for n, v in parts.items()]
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
