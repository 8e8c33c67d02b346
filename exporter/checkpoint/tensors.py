"""The tensors of a checkpoint, whatever format they lie in: mapped, and held against what the model wants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.spec import EMBEDDING, HEAD, ModelSpec

COPY_AGAIN = "copy the file again from where it came, and compare its size"


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


def matched(
    found: Mapping[str, LazyTensor], spec: ModelSpec, *, place: Path, described_by: str
) -> dict[str, LazyTensor]:
    """Every tensor that ``spec`` wants, found and of the right shape; nothing missing, nothing unknown left over.

    ``place`` and ``described_by`` name the checkpoint and what its spec was read from. Raises InputError.
    """
    wanted = spec.weights()
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    # Old checkpoints store RoPE frequencies, which the config gives; tied ones sometimes store the head again.
    unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}
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
            raise InputError(
                f"{found[name].files[0]}: {name} has shape {list(found[name].shape)}, "
                f"{described_by} wants {list(shape)}",
                hint=f"{described_by} and weights must be of the same model",
            )
    return {name: found[name] for name in wanted}


def _check_tied(found: Mapping[str, LazyTensor], *, place: Path, described_by: str) -> None:
    if not torch.equal(found[HEAD].read(), found[EMBEDDING].read()):
        raise InputError(
            f"{place}: {described_by} ties head and embedding, but {HEAD} differs from {EMBEDDING}",
            hint="set tie_word_embeddings to false if the head is its own",
        )


def _name_some(label: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {label}" + (f" ({shown})" if names else "")
