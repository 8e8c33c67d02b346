"""Weights in Hugging Face layout, single or sharded: safetensors, or torch's pickles (``pytorch_model*.bin``). Headers
are read and checked, tensors mapped."""

from __future__ import annotations

import io
import json
import math
import mmap
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.checkpoint import llama4, mllama
from exporter.checkpoint.coded import CODE_DTYPES, with_codes
from exporter.checkpoint.config import read_json, read_quantization
from exporter.checkpoint.tensors import COPY_AGAIN, FLOATS, LazyTensor, matched, unknown_dtype
from exporter.errors import InputError
from exporter.spec import ModelSpec

DESCRIPTION = "config.json"

_STEMS = {".safetensors": "model", ".bin": "pytorch_model"}
"""What weights are called in one file; the index of several adds ``.index.json``. The first kind found is read."""

if sys.platform != "win32":
    _PRIVATE = mmap.MAP_PRIVATE | (0x4000 if sys.platform == "linux" else 0)
    """What is written to it stays in memory, and none is put by for that beforehand: MAP_NORESERVE of Linux, which
    Python 3.11 has no name for."""


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """A tensor of a safetensors file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """Byte of the file at which it begins."""

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self) -> Tensor:
        """Mapped, of a file of any size: safetensors' own reader for torch maps the whole file as memory that may be
        written to, which Linux refuses for more than there is."""
        count = math.prod(self.shape)
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        before = self.start % mmap.ALLOCATIONGRANULARITY
        length = before + count * self.dtype.itemsize
        try:
            with self.file.open("rb") as file:
                if sys.platform == "win32":
                    mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=self.start - before)
                else:
                    mapped = mmap.mmap(file.fileno(), length, flags=_PRIVATE, offset=self.start - before)
        except (ValueError, OSError) as error:
            raise InputError(f"{self.file}: cannot read {self.name}: {error}", hint=COPY_AGAIN) from error
        return torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=before).view(self.shape)


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A tensor of a pickle, whose storage is mapped."""

    file: Path
    tensor: Tensor

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor


def holds_codes(folder: Path) -> bool:
    """Whether the description says that weights are quantized. Raises InputError."""
    path = folder / DESCRIPTION
    return read_quantization(path, read_json(path)) is not None


def map_tensors(folder: Path, spec: ModelSpec) -> dict[str, LazyTensor]:
    """Every tensor that ``spec`` wants. Raises InputError for files that are missing, broken or of another model."""
    found: dict[str, LazyTensor] = {}
    for file in _shards(folder):
        tensors = map_safetensors(file) if file.suffix == ".safetensors" else map_pickle(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise InputError(
                f"{folder}: {twice[0]} lies in {found[twice[0]].files[0].name} and in {file.name}",
                hint="the shards are of two models, or one of two downloads: download them again into an empty folder",
            )
        found |= tensors
    if spec.experts:
        found = llama4.as_in_llama(found, spec)
    if spec.layer_numbers:
        found = mllama.as_in_llama(found, spec)
    path = folder / DESCRIPTION
    quantization = read_quantization(path, read_json(path))
    if quantization:
        found = with_codes(found, spec, quantization)
    if spec.experts:
        found = {name: llama4.in_order(name, tensor, spec) for name, tensor in found.items()}
    if spec.layer_numbers:
        found = {name: mllama.in_order(name, tensor, spec) for name, tensor in found.items()}
    return matched(found, spec, place=folder, described_by=DESCRIPTION)


def map_pickle(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that ``torch.save`` has written, mapped. Nothing that a pickle may ask for is done but
    making tensors. Raises InputError."""
    try:
        if not zipfile.is_zipfile(file):  # what torch wrote before 1.6 (2020), whose storages cannot be mapped
            raise InputError(
                f"{file} is no file of torch.save in its present form, a zip archive",
                hint="copy it again; if it is of 2020 or before, load and save it once with torch",
            )
        with torch.serialization.safe_globals([io.BytesIO]):  # bytes alone, of TransformerEngine: not taken
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        asked = str(error).splitlines()[0]
        raise InputError(
            f"{file} asks for more than tensors as it is opened, which is refused: {asked}",
            hint="such a file may run any program: take the model as safetensors, from somebody you trust",
        ) from error
    except InputError:
        raise
    except Exception as error:  # a pickle is a program: a damaged one fails in whatever way a program may
        raise InputError(f"{file} is not a whole file of torch.save: {error}", hint=COPY_AGAIN) from error
    return {name: MappedTensor(file, tensor) for name, tensor in _state(content, file).items()}


def _state(content: Any, file: Path) -> Mapping[str, Tensor]:
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if not isinstance(value, io.BytesIO)}
    tensors = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )
    if not tensors:
        raise InputError(
            f"{file} holds a {type(content).__name__}, names with tensors were expected",
            hint="name the weights alone, not a checkpoint of a training run",
        )
    state: Mapping[str, Tensor] = content
    return state


def _shards(folder: Path) -> list[Path]:
    for suffix, stem in _STEMS.items():
        index, single = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
        if index.exists():
            return _indexed(index)
        if single.exists():
            return [single]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pth", ".gguf", ".safetensors"})
    raise InputError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json"
        + (f", only {', '.join(others)}" if others else ""),
        hint="name the .gguf file itself"
        if any(name.endswith(".gguf") for name in others)
        else "name a folder in Hugging Face layout: config.json, *.safetensors, tokenizer.json; or a .gguf file",
    )


def _indexed(index: Path) -> list[Path]:
    named = read_json(index).get("weight_map")
    names = list(named.values()) if isinstance(named, dict) else []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index} names {name!r}, the name of a file was expected", hint=COPY_AGAIN)
    present = {path.name: path for path in index.parent.iterdir()}
    absent = sorted(set(names) - present.keys())
    if absent or not names:
        raise InputError(
            f"{index} names {len(set(names))} shards, of which {len(absent)} are missing: {', '.join(absent)}",
            hint="download the missing files",
        )
    return [present[name] for name in sorted(set(names))]


def map_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file. Raises InputError."""
    tensors: dict[str, LazyTensor] = {}
    known = {**FLOATS, **CODE_DTYPES}
    try:
        with safe_open(file, framework="numpy") as shard, file.open("rb") as content:  # which checks the header
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
            for name in shard.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = shard.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in known and not name.endswith("rotary_emb.inv_freq"):
                    raise unknown_dtype(file, name, dtype)
                tensors[name] = SafeTensor(
                    name,
                    file,
                    shape=tuple(part.get_shape()),
                    dtype=known.get(dtype, torch.float32),
                    start=8 + length + header[name]["data_offsets"][0],
                )
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}", hint=COPY_AGAIN) from error
    return tensors
