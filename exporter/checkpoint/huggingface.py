"""Weights in Hugging Face layout, single or sharded: safetensors, or torch's pickles (``pytorch_model*.bin``). Headers
are read and checked, tensors mapped."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.checkpoint.config import read_json
from exporter.checkpoint.tensors import COPY_AGAIN, LazyTensor, matched
from exporter.errors import InputError
from exporter.spec import ModelSpec

DESCRIPTION = "config.json"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STEMS = {".safetensors": "model", ".bin": "pytorch_model"}
"""What weights are called in one file; the index of several adds ``.index.json``. The first kind found is read."""


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """A tensor of a safetensors file."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def read(self) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as shard:
                return shard.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file}: cannot read {self.name}: {error}", hint=COPY_AGAIN) from error


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
    return {name: _mapped(name, tensor, file) for name, tensor in _state(content, file).items()}


def _state(content: Any, file: Path) -> Mapping[str, Tensor]:
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


def _mapped(name: str, tensor: Tensor, file: Path) -> LazyTensor:
    if tensor.dtype not in _DTYPES.values() and not name.endswith("rotary_emb.inv_freq"):
        raise _quantized_already(file, name, str(tensor.dtype).removeprefix("torch."))
    return MappedTensor(file, tensor)


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
    names = read_json(index).get("weight_map", {}).values()
    shards = sorted({index.with_name(str(name)) for name in names})
    absent = [shard.name for shard in shards if not shard.exists()]
    if absent or not shards:
        raise InputError(
            f"{index} names {len(shards)} shards, of which {len(absent)} are missing: {', '.join(absent)}",
            hint="download the missing files",
        )
    return shards


def map_safetensors(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file. Raises InputError."""
    tensors: dict[str, LazyTensor] = {}
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = shard.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES and not name.endswith("rotary_emb.inv_freq"):
                    raise _quantized_already(file, name, dtype)
                tensors[name] = SafeTensor(name, file, tuple(part.get_shape()), _DTYPES.get(dtype, torch.float32))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}", hint=COPY_AGAIN) from error
    return tensors


def _quantized_already(file: Path, name: str, dtype: str) -> InputError:
    return InputError(
        f"{file}: {name} has dtype {dtype}; known: {', '.join(_DTYPES)}",
        hint="already quantized checkpoints are not supported: name the original one",
    )
