"""The WeightStore: every tensor of the model as it is to be stored, whatever the target.

What quantization changed lies in a folder, one file per decoder layer and one for the ends; the rest is read through it
from the checkpoint. A lowering sees only the store. The folder's name is a digest of all that decides its contents, so
that a second target, or a run that was killed, finds what is already there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exporter.checkpoint import Checkpoint
from exporter.checkpoint.config import read_json
from exporter.checkpoint.tensors import LazyCodes
from exporter.errors import InputError
from exporter.files import save_tensors, sha256, written_whole
from exporter.quantized import CodedTensor, PalettizedTensor, QuantizedTensor, pack_int4, unpack_int4
from exporter.spec import LAYERS, VISION, Arithmetic, Precision, Recipe, WeightScheme

FORMAT_VERSION = 3

Part = int | str | None
"""A decoder layer, the ends (None: embedding, last norm and head), or what looks at images, by the name that its
tensors begin with."""

PlainWeight = QuantizedTensor | Tensor
"""Codes and scales, a float16 or float32 matrix, or the float32 vector of a norm."""
StoredWeight = PlainWeight | PalettizedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKey:
    """All that decides the contents of a store."""

    source_sha256: str
    scheme: WeightScheme
    recipe: Recipe | None = None
    """None: nothing is quantized."""
    text: str = ""
    """What identifies the text of calibration: a digest of its windows, or how the model wrote them itself."""

    def digest(self) -> str:
        content = {"format": FORMAT_VERSION, **asdict(self)}
        if not self.scheme.kept:
            del content["scheme"]["kept"]  # digests of before there was such a thing hold on
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError:
    """What quantization did to one tensor: lost energy over energy, of its output on the text of calibration, or of the
    weights themselves where there is none."""

    rounded: float = 0.0
    """Rounded to nearest, as the checkpoint has it."""
    stored: float = 0.0
    """As it is stored."""


class WeightStore:
    """``store[name]`` is the weight called ``name`` under the scheme: codes, or floats of the scheme's dtype."""

    def __init__(self, *, checkpoint: Checkpoint, key: StoreKey, root: Path) -> None:
        self.checkpoint = checkpoint
        self.key = key
        self.folder = root / key.digest()
        self.spec = checkpoint.spec
        self._arithmetic: Arithmetic | None = None
        self.rounded_scales: dict[str, float] = {}
        """The largest relative change of a scale, for each matrix read so far of which it is not 0."""

    @property
    def scheme(self) -> WeightScheme:
        return self.key.scheme

    def as_computed(self, arithmetic: Arithmetic) -> WeightStore:
        """The same as a target of that arithmetic can hold it: scales that are the checkpoint's own rounded to its
        dtypes."""
        found = WeightStore(checkpoint=self.checkpoint, key=self.key, root=self.folder.parent)
        found.spec = self.spec
        found._arithmetic = arithmetic
        return found

    def without_extra_embeddings(self) -> WeightStore:
        """The same with the rows of the embedding alone that the head has too."""
        found = WeightStore(checkpoint=self.checkpoint, key=self.key, root=self.folder.parent)
        found.spec = self.spec.without_extra_embeddings()
        found._arithmetic = self._arithmetic
        return found

    def __getitem__(self, name: str) -> StoredWeight:
        """Raises InputError where the file or the checkpoint cannot be read, or float16 cannot hold a value."""
        found = self._read(name)
        rows = self.spec.weights()[name][0]
        return found if found.shape[0] == rows else _first_rows(plain(found), rows)

    def _read(self, name: str) -> StoredWeight:
        """All rows that there are."""
        if not self._is_matrix(name):
            return self._read_floats(name)
        if self.scheme.kept_kind(name):
            return self._read_kept(name)
        match self.scheme.precision(name):
            case Precision.FP32:
                return self._read_floats(name)
            case Precision.FP16:
                return _to_float16(name, finite(name, self.checkpoint.read(name)))
            case _:
                return self._read_coded(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spec.weights())

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is stored in a file of its own, in the order of the model but for the ends."""
        others = [part for name in self if isinstance(part := self.part_of(name), str)]
        return (*range(self.spec.num_hidden_layers), None, *dict.fromkeys(others))

    def part_of(self, name: str) -> Part:
        layer = self.spec.layer_of(name)
        if layer is not None or not name.startswith((LAYERS, *VISION)):
            return layer
        found = re.match(r".*layers\.\d+|[^.]+", name)
        assert found  # anything matches
        return found.group()

    def quantized_names(self, layer: Part) -> list[str]:
        """The matrices of one part that the scheme stores as codes of our own."""
        return [
            name
            for name in self
            if self._is_matrix(name)
            and self.scheme.precision(name).bits
            and not self.scheme.kept_kind(name)
            and self.part_of(name) == layer
        ]

    def part_file(self, layer: Part) -> Path:
        if isinstance(layer, str):
            return self.folder / f"{layer}.safetensors"
        return self.folder / ("ends.safetensors" if layer is None else f"layer-{layer:03d}.safetensors")

    def write_part(
        self,
        layer: Part,
        tensors: list[CodedTensor],
        *,
        errors: dict[str, TensorError],
        floats: dict[str, Tensor],
    ) -> None:
        """Store the codes of one layer and the norms and routers that a method has changed, with the error of each
        tensor beside them; whole or not at all."""
        contents: dict[str, Tensor] = {name: tensor.float().contiguous() for name, tensor in floats.items()}
        for tensor in tensors:
            packed = self.scheme.precision(tensor.name).bits == 4
            contents[f"{tensor.name}.codes"] = pack_int4(tensor.codes) if packed else tensor.codes
            if isinstance(tensor, PalettizedTensor):
                contents[f"{tensor.name}.tables"] = tensor.tables.to(torch.float16)
            else:
                contents[f"{tensor.name}.scales"] = tensor.scales.to(torch.bfloat16)
        written = {name: asdict(error) for name, error in errors.items()}
        save_tensors(self.part_file(layer), contents, metadata={"errors": json.dumps(written, sort_keys=True)})

    def read_errors(self) -> dict[str, TensorError]:
        """Of each quantized tensor, as it was measured when it was quantized."""
        errors: dict[str, TensorError] = {}
        for layer in self.parts:
            if self.part_file(layer).exists():
                with safe_open(self.part_file(layer), framework="pt") as part:
                    written = json.loads(part.metadata()["errors"])
                errors |= {name: TensorError(**error) for name, error in written.items()}
        return errors

    @property
    def windows_file(self) -> Path:
        return self.folder / "windows.safetensors"

    def write_windows(self, windows: Tensor) -> None:
        """Keep the text of calibration, int64 ``[W, T]``: a run that resumes is to see the same."""
        save_tensors(self.windows_file, {"ids": windows})

    def read_windows(self) -> Tensor:
        """int64 ``[W, T]``"""
        with self._open(self.windows_file) as file:
            return file.get_tensor("ids")

    def ranges_file(self, layer: int | None) -> Path:
        return self.folder / ("ranges-ends.json" if layer is None else f"ranges-{layer:03d}.json")

    def write_ranges(self, layer: int | None, ranges: Mapping[str, Any], *, caches: Mapping[str, Any]) -> None:
        """The ranges of the activations on each edge of a layer and of its caches (``RangeObserver.ranges`` and
        ``caches`` in ``calibration.ranges``); None: of last norm and head."""
        with written_whole(self.ranges_file(layer)) as path:
            path.write_text(json.dumps({"edges": ranges, "caches": caches}, indent=1) + "\n", encoding="utf-8")

    def read_ranges(self) -> dict[str, Any]:
        """By the name of the edge, in the order of the graph; empty where no text was used."""
        return self._read_ranges("edges")

    def read_cache_ranges(self) -> dict[str, list[list[float]]]:
        """``[KV, D]`` by the name of the cache, as ``RangeObserver.caches`` tells it; empty where no text was used."""
        return self._read_ranges("caches")

    def _read_ranges(self, kind: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(self.folder.glob("ranges-*.json")):
            found |= json.loads(path.read_text(encoding="utf-8"))[kind]
        return found

    def write_summary(self, *, text_source: str) -> None:
        """``store.json``: what the codes beside it are and were calibrated with, and the error of each tensor; for
        people and other tools."""
        summary = {
            "format": FORMAT_VERSION,
            **asdict(self.key),
            "calibration": self._calibration(text_source),
            "errors": {name: asdict(error) for name, error in self.read_errors().items()},
        }
        with written_whole(self._summary) as path:
            path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def write_timings(self, timings: Mapping[str, Any]) -> None:
        """``timings.json``: what each stage took in the run that completed the store (``calibration.ledger``)."""
        with written_whole(self.folder / "timings.json") as path:
            path.write_text(json.dumps(timings, indent=2) + "\n", encoding="utf-8")

    def read_timings(self) -> dict[str, Any]:
        return read_json(self.folder / "timings.json")

    def calibration_facts(self) -> dict[str, Any]:
        """How the codes were chosen, for the manifest: algorithm, text, its digest and size, seconds of each stage in
        the run that completed the store; ``none`` for floats, ``kept (gptq)`` for those of a checkpoint."""
        kept = f"kept ({self.scheme.sources})" if self.scheme.kept else ""
        if not self._summary.exists():
            return {"algorithm": kept or "none"}
        facts: dict[str, Any] = read_json(self._summary)["calibration"]
        algorithm = f"{kept}, the rest {facts['algorithm']}" if kept else facts["algorithm"]
        return {**facts, "algorithm": algorithm, "seconds": self.read_timings()["seconds"]}

    @property
    def is_summed_up(self) -> bool:
        return self._summary.exists()

    @property
    def _summary(self) -> Path:
        return self.folder / "store.json"

    def _calibration(self, text_source: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"algorithm": str(self.key.recipe), "recipe": asdict(self.key)["recipe"]}
        if not self.key.text:
            return facts
        windows = self.read_windows()
        return {
            **facts,
            "text": self.key.text,
            "source": text_source,
            "corpus_sha256": sha256(self.windows_file),
            "windows": windows.shape[0],
            "window_length": windows.shape[1],
            "tokens": windows.numel(),
        }

    def _is_matrix(self, name: str) -> bool:
        return len(self.spec.weights()[name]) == 2

    def _read_floats(self, name: str) -> Tensor:
        file = self.part_file(self.part_of(name))
        if file.exists():
            with self._open(file) as part:
                if name in part.keys():  # noqa: SIM118  (safe_open is no mapping)
                    return part.get_tensor(name)
        return finite(name, self.checkpoint.read(name)).float()

    def _read_kept(self, name: str) -> QuantizedTensor:
        tensor = self.checkpoint.tensors[name]
        assert isinstance(tensor, LazyCodes)  # the scheme was made from the checkpoint
        found = replace(tensor.coded(), name=name)
        finite(name, found.scales)
        if self._arithmetic is None:
            return found
        by_row = found.group_size == found.shape[1]
        dtype = self._arithmetic.row_scale_dtype if by_row else self._arithmetic.group_scale_dtype
        rounded = found.with_scales_in(dtype)
        if not torch.equal(rounded.scales, found.scales):
            change = (rounded.scales - found.scales).abs() / found.scales.abs().clamp(min=torch.finfo().tiny)
            self.rounded_scales[name] = change.max().item()
            finite(name, rounded.scales)
        return rounded

    def _read_coded(self, name: str) -> CodedTensor:
        bits = self.scheme.precision(name).bits
        assert bits is not None  # the caller has asked
        palette = self.scheme.precision(name) is Precision.LUT4
        with self._open(self.part_file(self.part_of(name))) as part:
            codes, scales = (part.get_tensor(f"{name}.{kind}") for kind in ("codes", "tables" if palette else "scales"))
        if palette:
            return PalettizedTensor(name=name, codes=unpack_int4(codes) & 0xF, tables=scales.float())
        return QuantizedTensor(
            name=name,
            bits=bits,
            group_size=self.scheme.groups(name, columns=self.spec.weights()[name][1]),
            codes=unpack_int4(codes) if bits == 4 else codes,
            scales=scales.float(),
        )

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"the store at {file} cannot be read: {error}", hint=f"remove {self.folder} and run again"
            ) from error


def plain(weight: StoredWeight) -> PlainWeight:
    """``weight`` where no palette can be: of targets that take none (``targets.PALETTES``)."""
    assert not isinstance(weight, PalettizedTensor)
    return weight


def _first_rows(weight: PlainWeight, count: int) -> PlainWeight:
    if isinstance(weight, Tensor):
        return weight[:count]
    zeros = None if weight.zeros is None else weight.zeros[:count]
    return replace(weight, codes=weight.codes[:count], scales=weight.scales[:count], zeros=zeros)


def finite(name: str, weight: Tensor) -> Tensor:
    """``weight`` itself. Raises InputError where it holds NaN or infinity."""
    extremes = weight.aminmax()  # of which a NaN is both; isfinite of all takes 20 times as long
    if not all(map(torch.isfinite, extremes)):
        raise InputError(
            f"{name} holds values that are not finite",
            hint="check the checkpoint: it may have been cut off, or have diverged in training",
        )
    return weight


def _to_float16(name: str, weight: Tensor) -> Tensor:
    half = weight.to(torch.float16)
    if not torch.isfinite(half).all():
        largest = weight.float().abs().max().item()
        raise InputError(
            f"{name} holds {largest:.3g}, float16 ends at 65504", hint="take --precision fp32, int8 or int4"
        )
    return half
