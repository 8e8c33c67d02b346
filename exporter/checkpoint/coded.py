"""Quantized checkpoints in Hugging Face layout: the tensors of GPTQ, AWQ and compressed-tensors -> matrices of codes.

Each matrix lies in several tensors, called after the module: packed codes, scales, zero points. Bits and group size are
told by their shapes. Codes are unsigned in these files but for ``int-quantized``; ours are signed, and so are less by
half the range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.tensors import LazyCodes, LazyTensor
from exporter.errors import InputError
from exporter.quantized import QuantizedTensor
from exporter.spec import HEAD, PER_ROW, CodeKind, ModelSpec, Precision

CODE_DTYPES = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}
"""Of tensors that hold codes or sizes, by their name in safetensors."""

_WORD_BITS = 32
_PRECISIONS = {4: Precision.INT4, 8: Precision.INT8}
_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each nibble of a word holds, the lowest first (AutoAWQ, awq/utils/packing_utils.py)."""
_ONE_IN_EACH = {4: 0x11111111, 8: 0x01010101}

_IGNORED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
"""Of activations: how they are rounded is for each target to say."""
_CHECK = "copy the checkpoint again, config.json and weights of one model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """The tensors of one quantized linear or embedding, by what follows the module's name."""

    name: str
    """Of its weight."""
    shape: tuple[int, int]
    parts: Mapping[str, LazyTensor]

    def part(self, kind: str, *shape: int | None, dtype: torch.dtype | None = None) -> LazyTensor:
        """Raises InputError where it is missing, or not of that ``shape`` (None: any size) or ``dtype``."""
        found = self.parts.get(kind)
        if found is None:
            place = next(iter(self.parts.values())).files[0]
            raise InputError(f"{place}: {self.name} has {', '.join(self.parts)}, but no {kind}", hint=_CHECK)
        fits = len(found.shape) == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True)
        )
        if not fits:
            told = ", ".join("any" if size is None else str(size) for size in shape)
            raise InputError(
                f"{found.files[0]}: {kind} of {self.name} has shape {list(found.shape)}, [{told}] was expected",
                hint=_CHECK,
            )
        if dtype is not None and found.dtype != dtype:
            got, needed = (str(one).removeprefix("torch.") for one in (found.dtype, dtype))
            raise InputError(
                f"{found.files[0]}: {kind} of {self.name} has dtype {got}, {needed} was expected", hint=_CHECK
            )
        return found

    def order(self, kind: str) -> LazyTensor | None:
        """The group of each column, int32 [K]; None where it is not told. Raises InputError as ``part``."""
        return self.part(kind, self.shape[1], dtype=torch.int32) if kind in self.parts else None

    def groups(self, count: int) -> int:
        """The group size where each row has so many. Raises InputError where they do not divide it."""
        columns = self.shape[1]
        if columns % count:
            raise InputError(
                f"{next(iter(self.parts.values())).files[0]}: {self.name} has {columns} columns, which {count} scales "
                "do not divide",
                hint=_CHECK,
            )
        return columns // count if count > 1 else PER_ROW


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix(LazyCodes):
    """A matrix [N, K] of one of the formats."""

    module: Module
    how: CodeKind
    unpack: Callable[[], tuple[Tensor, Tensor, Tensor | None]]
    """Codes int8 [N, K]; scales [N, G] and, if there are any, zero points int8 [N, G]."""
    order: LazyTensor | None = None
    """The group of each column, int [K], where they need not follow one another (GPTQ's ``g_idx``)."""

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for part in self.module.parts.values() for file in part.files))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.module.shape

    @property
    def kind(self) -> CodeKind:
        return self.how

    @property
    def refusal(self) -> str | None:
        if self._groups() is None:
            return None
        return "its groups are of columns here and there (desc_act), which no runtime takes"

    def coded(self) -> QuantizedTensor:
        if self.refusal:
            raise InputError(f"{self.module.name} of {self.files[0]}: {self.refusal}", hint="add --requantize")
        codes, scales, zeros = self._unpacked()
        return QuantizedTensor(
            name=self.module.name,
            bits=self.how.precision.bits or 8,
            group_size=self.how.group_size or self.module.shape[1],
            codes=codes,
            scales=scales,
            zeros=zeros,
        )

    def read(self) -> Tensor:
        groups = self._groups()
        if groups is None:
            return self.coded().dequantize()
        codes, scales, zeros = self._unpacked()
        values = codes.float()
        if zeros is not None:
            values -= zeros[:, groups]
        return values * scales[:, groups]

    def _unpacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        codes, scales, zeros = self.unpack()
        if zeros is not None and not self.how.zero_points:
            if zeros.any():
                raise InputError(
                    f"{self.files[0]}: {self.module.name} has zero points, which config.json says there are none of",
                    hint="set sym to false in config.json if the model was quantized so",
                )
            zeros = None
        return codes, _in_rows(scales.float()), None if zeros is None else _in_rows(zeros)

    def _groups(self) -> Tensor | None:
        """int64 [K]; None where each group is of columns that follow one another."""
        if self.order is None:
            return None
        found, columns = self.order.read().long(), self.module.shape[1]
        size = self.how.group_size or columns
        if torch.equal(found, torch.arange(columns) // size):
            return None
        if found.amin() < 0 or found.amax() >= columns // size:
            raise InputError(
                f"{self.order.files[0]}: g_idx of {self.module.name} names group {found.amax()} of {columns // size}",
                hint=_CHECK,
            )
        return found


def with_codes(
    found: Mapping[str, LazyTensor], spec: ModelSpec, quantization: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """``found`` with one tensor in place of all those that a quantized matrix lies in. ``quantization`` as
    ``config.read_quantization`` gives it. Raises InputError for tensors that do not go together."""
    method = quantization["quant_method"]
    marks = _MARKS[method]
    rest, modules = dict(found), dict[str, dict[str, LazyTensor]]()
    for stored in found:
        path, _, kind = stored.rpartition(".")
        if kind in marks and (kind != "weight" or found[stored].dtype == torch.int8):
            modules[path] = {}
    for stored, tensor in found.items():
        path, _, kind = stored.rpartition(".")
        if path in modules:
            modules[path][kind] = tensor
            del rest[stored]
    wanted = spec.weights()
    for path, parts in modules.items():
        name, bias = f"{path}.weight", f"{path}.bias"
        if bias in wanted and "bias" in parts:
            rest[bias] = parts.pop("bias")
        _refuse_bias(name, parts)
        shape = wanted.get(name)
        if name == HEAD:  # a tied one may be stored, and a pruned one whole
            shape = spec.vocab_size, spec.hidden_size
        if shape is None or len(shape) != 2:
            continue  # of no matrix of this model: what is left of it is told as unknown
        known = {kind: part for kind, part in parts.items() if kind not in _IGNORED}
        rest[name] = _READERS[method](Module(name=name, shape=(shape[0], shape[1]), parts=known), quantization)
    return rest


def _refuse_bias(name: str, parts: dict[str, LazyTensor]) -> None:
    """Early packers wrote a bias of zeros for every linear."""
    bias = parts.pop("bias", None)
    if bias is not None and bias.read().any():
        raise InputError(
            f"{bias.files[0]}: {name} has a bias, which no Llama has", hint="name a checkpoint of a Llama model"
        )


def _gptq(module: Module, quantization: Mapping[str, Any]) -> LazyCodes:
    """qweight int32 [K * bits / 32, N], scales [G, N], qzeros int32 [G, N * bits / 32], g_idx int32 [K].

    In the first format each zero point is stored less 1, words taken as integers (gptqmodel,
    ``convert_gptq_v1_to_v2_format_module``).
    """
    rows, columns = module.shape
    scales = module.part("scales", None, rows)
    count = scales.shape[0]
    qweight = module.part("qweight", None, rows, dtype=torch.int32)
    bits = _bits(module, words=qweight.shape[0], of=columns)
    qzeros = module.part("qzeros", count, rows * bits // _WORD_BITS, dtype=torch.int32)
    first = quantization.get("checkpoint_format", "gptq") == "gptq"

    def unpack() -> tuple[Tensor, Tensor, Tensor | None]:
        zeros = qzeros.read() + (_ONE_IN_EACH[bits] if first else 0)
        return (
            unpack_words(qweight.read(), bits=bits, axis=0).T.contiguous(),
            scales.read().T,
            unpack_words(zeros, bits=bits, axis=1).T.contiguous(),
        )

    return PackedMatrix(
        module=module,
        how=CodeKind(
            source="gptq",
            precision=_PRECISIONS[bits],
            group_size=module.groups(count),
            zero_points=not quantization.get("sym", True),
        ),
        unpack=unpack,
        order=module.order("g_idx"),
    )


def _awq(module: Module, quantization: Mapping[str, Any]) -> LazyCodes:
    """qweight int32 [K, N / 8], scales [G, N], qzeros int32 [G, N / 8], nibbles in AutoAWQ's order of columns."""
    rows, columns = module.shape
    scales = module.part("scales", None, rows)
    count = scales.shape[0]
    words = rows * 4 // _WORD_BITS
    sizes = {"qweight": columns, "qzeros": count}
    qweight, qzeros = (module.part(kind, size, words, dtype=torch.int32) for kind, size in sizes.items())

    def unpack() -> tuple[Tensor, Tensor, Tensor | None]:
        codes, zeros = (unpack_words(part.read(), bits=4, axis=1, order=_AWQ_ORDER) for part in (qweight, qzeros))
        return codes.T.contiguous(), scales.read().T, zeros.T.contiguous()

    how = CodeKind(
        source="awq",
        precision=Precision.INT4,
        group_size=module.groups(count),
        zero_points=bool(quantization.get("zero_point", True)),
    )
    return PackedMatrix(module=module, how=how, unpack=unpack)


def _compressed(module: Module, _: Mapping[str, Any]) -> LazyCodes:
    """weight int8 [N, K], or weight_packed int32 [N, K * bits / 32] with weight_shape; weight_scale [N, G], and where
    there are zero points weight_zero_point int8 [N, G], packed int32 [N * bits / 32, G]; weight_g_idx [K].

    compressed-tensors, compressors/pack_quantized and compressors/naive_quantized.
    """
    rows, columns = module.shape
    scales = module.parts.get("weight_scale")
    if scales is not None and len(scales.shape) != 2:  # one for the whole matrix
        raise InputError(
            f"{scales.files[0]}: weight_scale of {module.name} has shape {list(scales.shape)}, one for each row or "
            "group was expected",
            hint="quantize the model by channel or by group",
        )
    scales = module.part("weight_scale", rows, None)
    count = scales.shape[1]
    packed = "weight_packed" in module.parts
    if packed:
        codes = module.part("weight_packed", rows, None, dtype=torch.int32)
        bits = _bits(module, words=codes.shape[1], of=columns)
    else:
        codes, bits = module.part("weight", rows, columns), 8
    zeros = None
    if "weight_zero_point" in module.parts:
        lines, dtype = (-(-rows * bits // _WORD_BITS), torch.int32) if packed else (rows, None)
        zeros = module.part("weight_zero_point", lines, count, dtype=dtype)

    def unpack() -> tuple[Tensor, Tensor, Tensor | None]:
        if not packed:
            return codes.read(), scales.read(), zeros.read().to(torch.int8) if zeros else None
        points = unpack_words(zeros.read(), bits=bits, axis=0)[:rows] if zeros else None
        return unpack_words(codes.read(), bits=bits, axis=1), scales.read(), points

    how = CodeKind(
        source="compressed-tensors",
        precision=_PRECISIONS[bits],
        group_size=module.groups(count),
        zero_points=zeros is not None,
    )
    return PackedMatrix(module=module, how=how, unpack=unpack, order=module.order("weight_g_idx"))


_MARKS = {"gptq": ("qweight",), "awq": ("qweight",), "compressed-tensors": ("weight_packed", "weight")}
"""By which tensor a module is known to be quantized."""
_READERS = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}


def _bits(module: Module, *, words: int, of: int) -> int:
    """Bits of a code where so many words hold a line of ``of`` codes. Raises InputError for others than 4 and 8."""
    bits, rest = divmod(words * _WORD_BITS, of)
    if rest or bits not in _PRECISIONS:
        raise InputError(
            f"{next(iter(module.parts.values())).files[0]}: {module.name} has {of} codes in {words} words of 32 bits; "
            "known: codes of 4 or 8 bits",
            hint=_CHECK,
        )
    return bits


def _in_rows(matrix: Tensor) -> Tensor:
    """Contiguous, also by the stride of a last dimension of 1, which ``contiguous`` does not look at."""
    return matrix.contiguous().flatten().view(matrix.shape)


def unpack_words(words: Tensor, *, bits: int, axis: int, order: Sequence[int] = _IN_ORDER) -> Tensor:
    """int32 words -> int8 codes along ``axis``, the lowest bits first, less half the range: ``32 / bits`` times as
    many."""
    each, mask, middle = _WORD_BITS // bits, (1 << bits) - 1, 1 << (bits - 1)
    shape = list(words.shape)
    shape[axis] *= each
    codes = torch.empty(shape, dtype=torch.int8)
    for nibble, place in enumerate(order[:each]):
        some = ((words >> (bits * nibble)) & mask) - middle
        codes[(slice(None),) * axis + (slice(place, None, each),)] = some.to(torch.int8)
    return codes
