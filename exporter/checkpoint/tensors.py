"""The tensors of a checkpoint, whatever format they lie in: mapped, and held against what the model wants."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.quantized import QuantizedTensor
from exporter.spec import EMBEDDING, HEAD, CodeKind, ModelSpec

COPY_AGAIN = "copy the file again from where it came, and compare its size"

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of tensors that are read as they are, by their name in safetensors."""

_ROTATED = re.compile(r"model\.layers\.(\d+)\.self_attn\.[qk]_proj\.weight")
_FREQUENCIES = "rotary_emb.inv_freq"
"""Of tensors that nobody reads."""


class LazyTensor(Protocol):
    """A tensor in one file or more, read when asked for."""

    @property
    def files(self) -> tuple[Path, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self) -> Tensor:
        """In the dtype and shape in which it is stored. Raises InputError where the file is not what it was."""
        ...


@dataclass(frozen=True, slots=True)
class ViewedTensor:
    """A part of a stored tensor, or its numbers in another order."""

    stored: LazyTensor
    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor]
    """Of the stored tensor, the one of ``shape``."""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.stored.files

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(self) -> Tensor:
        return self.view(self.stored.read())


def is_rotated(name: str, spec: ModelSpec) -> bool:
    """Whether the weight called ``name`` makes queries or keys that RoPE turns: in which order their rows lie is each
    format's own."""
    found = _ROTATED.fullmatch(name)
    return found is not None and int(found[1]) not in spec.attention.unrotated_layers


def halves_of_heads(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys ``[heads * D, K]`` as ``[heads, 2, D/2, K]``: those of channels 2i and 2i + 1 of a head,
    which the RoPE of Meta's models turns, where Hugging Face's Llama has i and i + D/2 (transformers,
    models/llama/convert_llama_weights_to_hf.py, ``permute``)."""
    return rows.view(-1, head_dim // 2, 2, rows.shape[1]).transpose(1, 2)


class LazyCodes(ABC):
    """A ``LazyTensor`` that lies in the files as codes: ``read`` decodes them, ``coded`` gives them as they are."""

    @property
    @abstractmethod
    def files(self) -> tuple[Path, ...]: ...

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    @abstractmethod
    def kind(self) -> CodeKind | None:
        """Of the codes; None where they are of a kind that no target has."""

    @property
    def refusal(self) -> str | None:
        """Why codes of such a kind cannot be kept all the same, in a sentence; None if they can."""
        return None

    @abstractmethod
    def coded(self) -> QuantizedTensor:
        """The codes as they are, where ``kind`` is not None and there is no ``refusal``. Raises InputError where the
        files hold others than they say."""

    def read(self) -> Tensor:
        """float32, what the codes stand for. Raises InputError as ``LazyTensor.read``."""
        return self.coded().dequantize()


@dataclass(frozen=True, slots=True)
class RowsOfCodes(LazyCodes):
    """Some rows of a matrix of codes, which are codes."""

    whole: LazyCodes
    rows: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.whole.files

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), self.whole.shape[1]

    @property
    def kind(self) -> CodeKind | None:
        return self.whole.kind

    @property
    def refusal(self) -> str | None:
        return self.whole.refusal

    def coded(self) -> QuantizedTensor:
        whole, rows = self.whole.coded(), list(self.rows)
        zeros = None if whole.zeros is None else whole.zeros[rows]
        return replace(whole, name=HEAD, codes=whole.codes[rows], scales=whole.scales[rows], zeros=zeros)

    def read(self) -> Tensor:
        """Also of codes that are of no kind."""
        return self.whole.read()[list(self.rows)]


def _kept_rows(found: Mapping[str, LazyTensor], spec: ModelSpec) -> LazyTensor | None:
    """The head of ``spec.head_tokens``: their rows of the one that is stored, or of the embedding where it is tied;
    itself where it has these rows alone. None where there is neither."""
    whole = found.get(HEAD) or found.get(EMBEDDING)
    if whole is None or whole.shape != (spec.vocab_size, spec.hidden_size):
        return whole
    rows = spec.head_tokens
    if isinstance(whole, LazyCodes):
        return RowsOfCodes(whole, rows)
    return ViewedTensor(whole, (len(rows), whole.shape[1]), lambda stored: stored[list(rows)])


def matched(
    found: Mapping[str, LazyTensor], spec: ModelSpec, *, place: Path, described_by: str
) -> dict[str, LazyTensor]:
    """Every tensor that ``spec`` wants, found and of the right shape; nothing missing, nothing unknown left over.

    ``place`` and ``described_by`` name the checkpoint and what its spec was read from. Raises InputError.
    """
    wanted = spec.weights()
    refuse_codes(found)
    if spec.head_tokens and (head := _kept_rows(found, spec)):
        found = {**found, HEAD: head}
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    # Old checkpoints store RoPE frequencies, which the config gives; tied ones sometimes store the head again.
    unknown = {name for name in unknown if not name.endswith(_FREQUENCIES)}
    if HEAD in unknown and spec.tie_word_embeddings:
        _check_tied(found, place=place, described_by=described_by)
        unknown.remove(HEAD)
    if missing or unknown:
        raise InputError(
            f"{place}: tensors do not match {described_by}: {_name_some('missing', missing)}; "
            f"{_name_some('unknown', unknown)}",
            hint="check num_hidden_layers and tie_word_embeddings, and that every shard is there",
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            few = name == HEAD and found[name].shape[1:] == shape[1:]
            raise InputError(
                f"{found[name].files[0]}: {name} has shape {list(found[name].shape)}, "
                f"{described_by} wants {list(shape)}",
                hint="a pruned head needs --head-tokens, the file that tells the token of each of its rows"
                if few
                else f"{described_by} and weights must be of the same model",
            )
    return {name: found[name] for name in wanted}


def refuse_codes(found: Mapping[str, LazyTensor]) -> None:
    """Raises InputError for a tensor of integers, or of any other dtype that is not known."""
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS.values() and not name.endswith(_FREQUENCIES):
            raise unknown_dtype(tensor.files[0], name, str(tensor.dtype).removeprefix("torch."))


def unknown_dtype(file: Path, name: str, dtype: str) -> InputError:
    return InputError(
        f"{file}: {name} has dtype {dtype}; known: {', '.join(FLOATS)}",
        hint="of a quantized checkpoint, quantization_config of config.json tells how; else name the original one",
    )


def _check_tied(found: Mapping[str, LazyTensor], *, place: Path, described_by: str) -> None:
    if not torch.equal(found[HEAD].read(), found[EMBEDDING].read()):
        raise InputError(
            f"{place}: {described_by} ties head and embedding, but {HEAD} differs from {EMBEDDING}",
            hint="set tie_word_embeddings to false if the head is its own",
        )


def _name_some(label: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {label}" + (f" ({shown})" if names else "")
