"""Llama 4's tensors as they lie in Hugging Face layout -> those of our graphs: each expert by itself, heads in the
order of Llama, for text alone without all that is of images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from exporter.checkpoint.tensors import LazyCodes, LazyTensor, ViewedTensor, halves_of_heads, is_rotated
from exporter.errors import InputError
from exporter.quantized import QuantizedTensor
from exporter.spec import VISION, CodeKind, ModelSpec

TEXT = "language_model."
_TURNED_BY_PLACE = re.compile(r"vision_model\.model\.layers\.\d+\.self_attn\.[qk]_proj\.(weight|bias)")
_STACKED = re.compile(r"(model\.layers\.\d+\.feed_forward\.experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class TurnedCodes(LazyCodes):
    """Codes of queries or keys, their rows, scales and zero points in the order of Llama."""

    stored: LazyCodes
    head_dim: int

    @property
    def files(self) -> tuple[Path, ...]:
        return self.stored.files

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def kind(self) -> CodeKind | None:
        return self.stored.kind

    @property
    def refusal(self) -> str | None:
        return self.stored.refusal

    def coded(self) -> QuantizedTensor:
        found, turned = self.stored.coded(), partial(_turned, head_dim=self.head_dim)
        zeros = None if found.zeros is None else turned(found.zeros)
        return replace(found, codes=turned(found.codes), scales=turned(found.scales), zeros=zeros)

    def read(self) -> Tensor:
        return _turned(self.stored.read(), head_dim=self.head_dim)


def turned_heads(name: str, spec: ModelSpec) -> int | None:
    """The channels of each head of the weight ``name``, where it has rows of queries or keys that are turned by place:
    Meta's programs and transformers' Llama 4 turn channels 2i and 2i + 1. None where it has not."""
    if spec.fusion and _TURNED_BY_PLACE.fullmatch(name):
        return spec.fusion.head_dim
    return spec.head_dim if is_rotated(name, spec) else None


def in_order(name: str, tensor: LazyTensor, spec: ModelSpec) -> LazyTensor:
    """``tensor`` of the weight ``name`` of a Llama 4, a factor of it or its codes: with rows in the order of Llama."""
    head_dim = turned_heads(name, spec)
    if head_dim is None:
        return tensor
    if isinstance(tensor, LazyCodes):
        return TurnedCodes(tensor, head_dim)
    return ViewedTensor(tensor, tensor.shape, partial(_turned, head_dim=head_dim))


def as_in_llama(found: Mapping[str, LazyTensor], spec: ModelSpec) -> dict[str, LazyTensor]:
    """``found`` under the names of ``spec.weights``; nothing is read before its tensor is. Rows lie as they lay.

    Experts lie stacked and transposed, ``gate_up_proj [E, H, 2 I]`` and ``down_proj [E, I, H]`` (transformers,
    ``Llama4TextExperts``), or one by one under the names that they have here. Raises InputError for a stack of another
    shape.
    """
    tensors: dict[str, LazyTensor] = {}
    for stored, tensor in found.items():
        name = stored.removeprefix(TEXT)
        if spec.fusion is None and name.startswith(VISION):
            continue
        if stack := _STACKED.fullmatch(name):
            tensors |= _experts(stored, tensor, spec, place=stack[1], kind=stack[2])
        else:
            tensors[name] = tensor
    return tensors


def _experts(
    stored: str, tensor: LazyTensor, spec: ModelSpec, *, place: str, kind: str
) -> Iterator[tuple[str, LazyTensor]]:
    assert spec.experts is not None
    count, hidden, inside = spec.experts.num_local_experts, spec.hidden_size, spec.intermediate_size
    wanted = (count, inside, hidden) if kind == "down_proj" else (count, hidden, 2 * inside)
    if tensor.shape != wanted:
        raise InputError(
            f"{tensor.files[0]}: {stored} has shape {list(tensor.shape)}, config.json wants {list(wanted)}",
            hint="config.json and weights must be of the same model",
        )
    parts = {"down_proj": 0} if kind == "down_proj" else {"gate_proj": 0, "up_proj": inside}
    for expert in range(count):
        for part, first in parts.items():
            rows, columns = (hidden, inside) if kind == "down_proj" else (inside, hidden)
            view = partial(_expert, expert=expert, first=first, rows=rows)
            yield f"{place}.{expert}.{part}.weight", ViewedTensor(tensor, (rows, columns), view)


def _expert(stack: Tensor, *, expert: int, first: int, rows: int) -> Tensor:
    """``[rows, K]`` of a stack ``[E, K, N]`` of transposed matrices: a view, so that a mapped file is not copied."""
    return stack[expert, :, first : first + rows].mT


def _turned(rows: Tensor, *, head_dim: int) -> Tensor:
    """``[N, K]``, or ``[N]`` of biases."""
    return halves_of_heads(rows.view(len(rows), -1), head_dim).reshape(rows.shape)
