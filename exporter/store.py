"""The WeightStore: every tensor of the model as it is to be stored, whatever the target.

What quantization changed lies in a folder, one file per decoder layer and one for the ends; the rest is read through it
from the checkpoint. A lowering sees only the store. The folder's name is a digest of all that decides its contents, so
that a second target, or a run that was killed, finds what is already there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.checkpoint import Checkpoint
from exporter.errors import InputError
from exporter.files import save_tensors, written_whole
from exporter.quantized import QuantizedTensor, pack_int4, unpack_int4
from exporter.spec import ModelSpec, Precision, WeightScheme

FORMAT_VERSION = 1

StoredWeight = QuantizedTensor | Tensor
"""Codes and scales, a float16 or float32 matrix, or the float32 vector of a norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKey:
    """All that decides the contents of a store."""

    source_sha256: str
    scheme: WeightScheme
    algorithm: str
    corpus_sha256: str = ""

    def digest(self) -> str:
        content = {"format": FORMAT_VERSION, **asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class WeightStore:
    """``store[name]`` is the weight called ``name`` under the scheme: codes, or floats of the scheme's dtype."""

    def __init__(self, *, checkpoint: Checkpoint, key: StoreKey, root: Path) -> None:
        self.checkpoint = checkpoint
        self.key = key
        self.folder = root / key.digest()

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def scheme(self) -> WeightScheme:
        return self.key.scheme

    def __getitem__(self, name: str) -> StoredWeight:
        """Raises InputError where the file or the checkpoint cannot be read, or float16 cannot hold a value."""
        if not self._is_matrix(name):
            return self.checkpoint.read(name).float()
        match self.scheme.precision(name):
            case Precision.FP32:
                return self.checkpoint.read(name).float()
            case Precision.FP16:
                return _to_float16(name, self.checkpoint.read(name))
            case _:
                return self._read_quantized(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spec.weights())

    def quantized_names(self, layer: int | None) -> list[str]:
        """The matrices of one decoder layer (None: of the ends) that the scheme stores as codes."""
        return [
            name
            for name in self
            if self._is_matrix(name) and self.scheme.precision(name).bits and _layer_of(name) == layer
        ]

    def part_file(self, layer: int | None) -> Path:
        return self.folder / ("ends.safetensors" if layer is None else f"layer-{layer:03d}.safetensors")

    def write_part(self, layer: int | None, tensors: list[QuantizedTensor], *, errors: dict[str, float]) -> None:
        """Store the codes of one layer, with the relative error of each tensor beside them; whole or not at all."""
        contents: dict[str, Tensor] = {}
        for tensor in tensors:
            contents[f"{tensor.name}.codes"] = pack_int4(tensor.codes) if tensor.bits == 4 else tensor.codes
            contents[f"{tensor.name}.scales"] = tensor.scales.to(torch.bfloat16)
        save_tensors(self.part_file(layer), contents, metadata={"errors": json.dumps(errors, sort_keys=True)})

    def read_errors(self) -> dict[str, float]:
        """Relative squared-norm error of each quantized tensor, as it was measured when it was quantized."""
        errors: dict[str, float] = {}
        for layer in (*range(self.spec.num_hidden_layers), None):
            if self.part_file(layer).exists():
                with safe_open(self.part_file(layer), framework="pt") as part:
                    errors |= json.loads(part.metadata()["errors"])
        return errors

    def write_summary(self) -> None:
        """``store.json``: what the codes beside it are, and the error of each tensor; for people and other tools."""
        summary = {"format": FORMAT_VERSION, **asdict(self.key), "relative_error": self.read_errors()}
        with written_whole(self.folder / "store.json") as path:
            path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _is_matrix(self, name: str) -> bool:
        return len(self.spec.weights()[name]) == 2

    def _read_quantized(self, name: str) -> QuantizedTensor:
        file = self.part_file(_layer_of(name))
        bits = self.scheme.precision(name).bits
        assert bits is not None  # the caller has asked
        try:
            with safe_open(file, framework="pt") as part:
                codes, scales = part.get_tensor(f"{name}.codes"), part.get_tensor(f"{name}.scales")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"the store at {file} cannot be read: {error}", hint=f"remove {self.folder} and run again"
            ) from error
        return QuantizedTensor(
            name=name,
            bits=bits,
            group_size=self.scheme.groups(name, columns=self.spec.weights()[name][1]),
            codes=unpack_int4(codes) if bits == 4 else codes,
            scales=scales.float(),
        )


def _layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def _to_float16(name: str, weight: Tensor) -> Tensor:
    half = weight.to(torch.float16)
    if not torch.isfinite(half).all():
        largest = weight.float().abs().max().item()
        raise InputError(
            f"{name} holds {largest:.3g}, float16 ends at 65504", hint="take --precision fp32, int8 or int4"
        )
    return half
