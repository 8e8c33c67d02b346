"""Safetensors in Hugging Face layout, single or sharded: headers are read and checked, tensors mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.checkpoint.config import read_json
from exporter.errors import InputError
from exporter.spec import EMBEDDING, HEAD, ModelSpec

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COPY_AGAIN = "copy the file again from where it came, and compare its size"


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor in a file, read when asked for."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        try:
            with safe_open(self.file, framework="pt") as shard:
                return shard.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.file}: cannot read {self.name}: {error}", hint=_COPY_AGAIN) from error


def map_tensors(folder: Path, spec: ModelSpec) -> dict[str, LazyTensor]:
    """Every tensor that ``spec`` wants, found and of the right shape; nothing missing, nothing unknown left over."""
    found: dict[str, LazyTensor] = {}
    for file in _shards(folder):
        found |= _headers(file)
    wanted = spec.weights()
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    # Old checkpoints store RoPE frequencies, which config.json gives; tied ones sometimes store the head again.
    unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}
    if HEAD in unknown and spec.tie_word_embeddings:
        _check_tied(folder, found)
        unknown.remove(HEAD)
    if missing or unknown:
        raise InputError(
            f"{folder}: tensors do not match config.json: {_name_some('missing', missing)}; "
            f"{_name_some('unknown', unknown)}",
            hint="check num_hidden_layers and tie_word_embeddings, and that every shard is there",
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise InputError(
                f"{found[name].file}: {name} has shape {list(found[name].shape)}, config.json wants {list(shape)}",
                hint="config.json and weights must be of the same model",
            )
    return {name: found[name] for name in wanted}


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        names = read_json(index).get("weight_map", {}).values()
        shards = sorted({folder / str(name) for name in names})
        absent = [shard.name for shard in shards if not shard.exists()]
        if absent or not shards:
            raise InputError(
                f"{index} names {len(shards)} shards, of which {len(absent)} are missing: {', '.join(absent)}",
                hint="download the missing files",
            )
        return shards
    if single.exists():
        return [single]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pth", ".gguf", ".safetensors"})
    raise InputError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json"
        + (f", only {', '.join(others)}" if others else ""),
        hint="name a folder in Hugging Face layout: config.json, *.safetensors, tokenizer.json",
    )


def _headers(file: Path) -> dict[str, LazyTensor]:
    tensors = {}
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = shard.get_slice(name)
                dtype = part.get_dtype()
                if dtype not in _DTYPES and not name.endswith("rotary_emb.inv_freq"):
                    raise InputError(
                        f"{file}: {name} has dtype {dtype}; known: {', '.join(_DTYPES)}",
                        hint="already quantized checkpoints are not supported: name the original one",
                    )
                tensors[name] = LazyTensor(name, file, tuple(part.get_shape()), _DTYPES.get(dtype, torch.float32))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}", hint=_COPY_AGAIN) from error
    return tensors


def _check_tied(folder: Path, found: dict[str, LazyTensor]) -> None:
    if not torch.equal(found[HEAD].read(), found[EMBEDDING].read()):
        raise InputError(
            f"{folder}: config.json ties head and embedding, but {HEAD} differs from {EMBEDDING}",
            hint="set tie_word_embeddings to false if the head is its own",
        )


def _name_some(label: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {label}" + (f" ({shown})" if names else "")
