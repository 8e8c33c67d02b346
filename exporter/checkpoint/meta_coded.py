"""Meta's quantized releases of Llama 3.2, in Meta's layout: int4 in groups for the linears, int8 by row for the ends.

Both schemes hold codes as int8 ``X.weight`` beside ``X.scales`` (meta-llama/llama-models,
models/llama3/quantization/loader.py). QLoRA adds to each linear what its adapter gives, ``X.adaptor.A`` and
``X.adaptor.B``: y = W x + scale * B A x. SpinQuant was trained with the input of ``w2`` turned by a Hadamard matrix,
which the codes of ``w2`` expect (``add_hadamard_transform_for_spinquant``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.adapter import MergedTensor as WithAdapter
from exporter.checkpoint.config import integer_of, number_of
from exporter.checkpoint.tensors import LazyCodes, LazyTensor
from exporter.errors import InputError
from exporter.quantized import QuantizedTensor
from exporter.spec import EMBEDDING, HEAD, PER_ROW, CodeKind, Precision

FIELDS = ("quantization_args", "lora_args")
_SCHEME = "int4_weight_int8_dynamic_activation"
_ROTATED = "mlp.down_proj.weight"
_CHECK = "check params.json and weights against the original model's"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaQuantization:
    """What ``quantization_args`` and ``lora_args`` of a ``params.json`` say."""

    group_size: int
    spinquant: bool
    rank: int = 0
    """Of the adapters; 0: there are none."""
    scale: float = 1.0

    @property
    def source(self) -> str:
        return "spinquant" if self.spinquant else "qlora" if self.rank else "llama-models"


def read_quantization(path: Path, params: Mapping[str, Any]) -> MetaQuantization | None:
    """None where the weights are floats. Raises InputError for what is not known."""
    arguments, adapters = params.get("quantization_args"), params.get("lora_args")
    if not arguments:
        if adapters:
            raise InputError(f"{path} has lora_args, but no quantization_args", hint=_CHECK)
        return None
    if not isinstance(arguments, dict) or not isinstance(adapters or {}, dict):
        raise InputError(f"{path}: quantization_args and lora_args are objects in Meta's releases", hint=_CHECK)
    if arguments.get("scheme") != _SCHEME:
        raise InputError(
            f"{path}: quantization_args.scheme is {arguments.get('scheme')!r}; known: {_SCHEME}", hint=_CHECK
        )
    return MetaQuantization(
        group_size=integer_of(path, arguments, "group_size"),
        spinquant=bool(arguments.get("spinquant", False)),
        rank=integer_of(path, adapters, "rank") if adapters else 0,
        scale=number_of(path, adapters, "scale") if adapters else 1.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaCodes(LazyCodes):
    """A matrix [N, K], rows in the order of Hugging Face."""

    name: str
    codes: LazyTensor
    """int8 [N, K]"""
    scales: LazyTensor
    """[N], [N, 1] or [N, G]"""
    how: CodeKind
    rotated: bool
    """Whether its input is to be turned by a Hadamard matrix."""

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*self.codes.files, *self.scales.files)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def kind(self) -> CodeKind:
        return self.how

    @property
    def refusal(self) -> str | None:
        return "they want their input turned by a Hadamard matrix (SpinQuant's R4)" if self.rotated else None

    def coded(self) -> QuantizedTensor:
        rows, columns = self.shape
        codes, bits = self.codes.read(), self.how.precision.bits or 8
        if bits == 4 and not (codes.amin() >= -8 and codes.amax() <= 7):
            raise InputError(
                f"{self.files[0]}: {self.name} has codes from {codes.amin()} to {codes.amax()}, int4 ends at -8 and 7",
                hint=_CHECK,
            )
        scales = self.scales.read().float().reshape(rows, -1).contiguous()
        group_size = self.how.group_size or columns
        return QuantizedTensor(
            name=self.name, bits=bits, group_size=group_size, codes=codes.contiguous(), scales=scales
        )

    def read(self) -> Tensor:
        """As for an input that is not turned."""
        values = self.coded().dequantize()
        return hadamard(values) if self.rotated else values


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scaled:
    tensor: LazyTensor
    scale: float

    @property
    def files(self) -> tuple[Path, ...]:
        return self.tensor.files

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read(self) -> Tensor:
        return self.tensor.read().float() * self.scale


def coded_matrix(name: str, codes: LazyTensor, scales: LazyTensor, quantization: MetaQuantization) -> MetaCodes:
    """Raises InputError for scales that do not go with the codes."""
    if codes.dtype != torch.int8:
        raise InputError(
            f"{codes.files[0]}: {name} has scales, but dtype {str(codes.dtype).removeprefix('torch.')}, int8 was "
            "expected",
            hint=_CHECK,
        )
    rows, columns = codes.shape
    ends = name in (EMBEDDING, HEAD)
    wanted = 1 if ends else columns // quantization.group_size
    if math.prod(scales.shape) != rows * wanted or (not ends and columns % quantization.group_size):
        told = "each row" if ends else f"{quantization.group_size} columns of each row"
        raise InputError(
            f"{scales.files[0]}: {name} is {list(codes.shape)} with scales {list(scales.shape)}, one for {told} was "
            "expected",
            hint=_CHECK,
        )
    how = CodeKind(
        source=quantization.source,
        precision=Precision.INT8 if ends else Precision.INT4,
        group_size=quantization.group_size if wanted > 1 else PER_ROW,
        zero_points=False,
    )
    rotated = quantization.spinquant and name.endswith(_ROTATED)
    return MetaCodes(name=name, codes=codes, scales=scales, how=how, rotated=rotated)


def adapted(
    name: str, base: LazyTensor, down: LazyTensor, up: LazyTensor, quantization: MetaQuantization, *, merged: bool
) -> dict[str, LazyTensor]:
    """The base matrix ``name`` and its adapter, beside each other or ``merged`` into one. Raises InputError for factors
    of other shapes."""
    rows, columns = base.shape
    for factor, shape in ((down, (quantization.rank, columns)), (up, (rows, quantization.rank))):
        if factor.shape != shape:
            raise InputError(
                f"{factor.files[0]}: an adapter of {name} has shape {list(factor.shape)}, {list(shape)} was expected",
                hint=_CHECK,
            )
    if merged:
        config = base.files[0].with_name("params.json")
        return {name: WithAdapter(base=base, down=down, up=up, scale=quantization.scale, config=config, is_table=False)}
    module = name.removesuffix(".weight")
    return {
        name: base,
        f"{module}.lora_A.weight": down,
        f"{module}.lora_B.weight": _Scaled(tensor=up, scale=quantization.scale),
    }


def hadamard(matrix: Tensor) -> Tensor:
    """``matrix`` float32 [N, K] times the Hadamard matrix of K, a power of two, that is its own inverse: element i, j
    is 1 / sqrt(K), below 0 where i and j share an odd number of bits (Sylvester's order)."""
    rows, columns = matrix.shape
    if columns & (columns - 1):
        raise InputError(
            f"a Hadamard matrix of {columns} columns was asked for, a power of two was expected", hint=_CHECK
        )
    width = 1
    while width < columns:
        pairs = matrix.view(rows, -1, 2, width)
        matrix = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        matrix = matrix.view(rows, columns)
        width *= 2
    return matrix / math.sqrt(columns)
