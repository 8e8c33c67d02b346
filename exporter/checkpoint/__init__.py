"""Files on disk -> Checkpoint: what the model is, and its tensors, mapped and never loaded whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from exporter.checkpoint import config, gguf_file, huggingface
from exporter.checkpoint.tensors import LazyTensor
from exporter.files import sha256
from exporter.spec import ModelSpec

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "samples" / "tiny-llama"
"""The trained model that ships with llama-export, used when no checkpoint is named."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. Nothing in it is ever written to."""

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, LazyTensor]
    described_by: Path
    """What the spec was read from."""

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, in the dtype and shape in which it is stored. Raises InputError."""
        return self.tensors[name].read()

    def __getitem__(self, name: str, /) -> Tensor:
        """As ``read``: like a store, a checkpoint is weights by name."""
        return self.read(name)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of what defines the model: the names and contents of its description and of every weight file."""
        files = sorted({self.described_by, *(file for tensor in self.tensors.values() for file in tensor.files)})
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(sha256, files))
        lines = [f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_spec(path: Path) -> ModelSpec:
    """What the model of a checkpoint is, whatever format it has. Raises InputError."""
    if gguf_file.is_gguf(path):
        return gguf_file.read_spec(gguf_file.read_header(path))
    return config.read_spec(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read description and tensor headers of a checkpoint and check them against each other. Raises InputError."""
    if gguf_file.is_gguf(path):
        header = gguf_file.read_header(path)
        spec = gguf_file.read_spec(header)
        tensors = gguf_file.map_tensors(header, spec)
        return Checkpoint(folder=header.file.parent, spec=spec, tensors=tensors, described_by=header.file)
    spec = config.read_spec(path)
    tensors = huggingface.map_tensors(path, spec)
    return Checkpoint(folder=path, spec=spec, tensors=tensors, described_by=path / huggingface.DESCRIPTION)
