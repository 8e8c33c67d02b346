"""Weights as other tools quantize them, so that one measure of quality can be put on all of them.

Each rival is run as its users run it, on a checkpoint in Hugging Face layout; what it stored is read back from its own
file, turned into float32 and given Hugging Face's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from exporter.checkpoint import Checkpoint
from exporter.spec import HEAD, ModelSpec

CACHE = Path(__file__).resolve().parents[1] / ".cache"

RIVALS: Mapping[str, str] = {
    "torchao-hqq": "torchao:hqq_scale_only",
    "genai-default": "genai:default",
    "genai-k-quant": "genai:k_quant",
    "genai-k-quant-mixed": "genai:k_quant_mixed",
    "ort-gptq": "onnxruntime:gptq",
    "ort-hqq": "onnxruntime:hqq",
    "auto-round": "autoround:auto_round",
    "llama.cpp-q4_0": "llamacpp:q4_0",
    "llama.cpp-q4_0-imatrix": "llamacpp:q4_0_imatrix",
    "llama.cpp-q4_k_m": "llamacpp:q4_k_m",
    "llama.cpp-q4_k_m-imatrix": "llamacpp:q4_k_m_imatrix",
}
"""Module of this package and function in it, by the name of the rival: imported only when it is its turn."""

RELATIVE_ERROR = (1e-3, 0.3)
"""Where the relative error of a quantized weight lies: from 0.004 (int8 in blocks of 32) to 0.1 (int4). Rows in the
wrong order give 1.4; a weight that was left alone gives 0."""


class RivalError(Exception):
    """One sentence: what a rival did not do, and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a rival gets. It may write under ``scratch`` as it likes."""

    checkpoint: Checkpoint
    windows: Tensor
    """int64 ``[W, T]``: the calibration tokens."""
    scratch: Path

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a rival made of the checkpoint, as it ships: embedding and head are as the tool leaves them."""

    version: str
    options: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    """Dequantized. A tied head is there only where the tool stores one that differs from the embedding."""
    stored_bytes: Mapping[str, int]
    """What holds each of ``weights`` in the tool's file: codes, scales and zero points."""
    file_bytes: int
    seconds: float
    peak_rss_mb: float | None = None
    """Of the process that quantized, where that is not this one."""
    notes: tuple[str, ...]


def peak_rss_mb() -> float:
    """Of this process since it began: what getrusage says may be its parent's, from before the program was loaded."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024  # kB


def body_names(spec: ModelSpec) -> list[str]:
    """The linears of the decoder layers: what every tool quantizes."""
    return [name for name in spec.weights() if name.endswith("_proj.weight")]


def body_only(weights: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The body of ``weights`` with embedding, norms and head of the checkpoint, in float32.

    This is what the tool would give if it were told to leave the ends alone: all of them take one weight after the
    other, and those that look at activations take them from the model before it was quantized (llama.cpp, onnxruntime)
    or do not quantize the ends (auto-round).
    """
    body = set(body_names(checkpoint.spec))
    return {
        name: weights[name] if name in body else checkpoint.read(name).float() for name in checkpoint.spec.weights()
    }


def check(outcome: Outcome, checkpoint: Checkpoint) -> None:
    """That every tensor is there and close to the checkpoint's, but not equal to it. Raises RivalError."""
    spec = checkpoint.spec
    names, body = outcome.weights.keys(), body_names(spec)
    if names - {HEAD} != spec.weights().keys() - {HEAD} or (HEAD not in names and not spec.tie_word_embeddings):
        raise RivalError(f"tensors do not match the checkpoint's: {sorted(names ^ spec.weights().keys())[:3]}")
    if names != outcome.stored_bytes.keys():
        raise RivalError("the tensors with stored bytes are not those with weights")
    for name, weight in outcome.weights.items():
        truth = checkpoint.read(spec.stored_name(name)).float()
        if weight.shape != truth.shape:
            raise RivalError(f"{name} came back as {list(weight.shape)}, it is {list(truth.shape)}")
        error = float((weight - truth).norm() / truth.norm())
        lowest, highest = RELATIVE_ERROR if name in body else (0.0, RELATIVE_ERROR[1])
        if not lowest <= error <= highest:
            raise RivalError(f"{name} is {error:.3g} off its original, {lowest} to {highest} was expected")


def bits_per_weight(outcome: Outcome, spec: ModelSpec) -> tuple[float, float]:
    """Stored bits for each weight of the body, and for each parameter of the model."""
    body = body_names(spec)
    body_parameters = sum(math.prod(spec.weights()[name]) for name in body)
    body_bytes = sum(outcome.stored_bytes[name] for name in body)
    return 8 * body_bytes / body_parameters, 8 * sum(outcome.stored_bytes.values()) / spec.parameters
