"""GGUF files of llama.cpp, one or split: metadata -> ModelSpec, tensors mapped, quantized ones dequantized as they are
read.

The header is parsed here, every length held against the file: ``gguf.GGUFReader`` makes an object for each element of
an array, and does not end on a count that the file cannot hold.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from exporter.checkpoint.tensors import COPY_AGAIN, LazyCodes, LazyTensor, is_rotated, matched
from exporter.errors import InputError
from exporter.quantized import QuantizedTensor
from exporter.spec import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LAYERS,
    AttentionSpec,
    CodeKind,
    ExpertSpec,
    ModelSpec,
    Precision,
    RopeKind,
    RopeSpec,
)

SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types of the metadata, in the letters of ``struct``."""
_STRING, _ARRAY = 8, 9
_SHORTEST_TENSOR_INFO = 8 + 4 + 8 + 4 + 8
"""Bytes of a name's length, the number of dimensions, one dimension, the type and the offset."""

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0"),
)
"""Types that ``gguf.dequantize`` takes."""
_SYMMETRIC = {"Q4_0": Precision.INT4, "Q8_0": Precision.INT8}
"""Types whose codes can stay as they are."""
_GROUP = 32

_ENDS = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensor names of llama.cpp, and those of Hugging Face."""
_EXPERT_BLOCK = {
    **{name: renamed for name, renamed in _BLOCK.items() if not renamed.startswith("mlp.")},
    **{f"ffn_{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_inp": "feed_forward.router",
}
"""The same of architecture ``llama4``."""
_STACKED = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
ROPE_FACTORS = "rope_freqs.weight"

_READ = {
    *("block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("rope.scaling.finetuned", "rope.scaling.original_context_length"),  # nothing but yarn asks for them
}
"""Fields, without ``llama.`` in front, that are read or change no number."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth",),
    "use_parallel_residual": (False,),
}
"""Fields that may be there if they have these values, with which llama.cpp computes as if they were not."""

_ARCHITECTURES = ("llama", "llama4")
_FORKED = "mllama"
_READ_OF_EXPERTS = {
    *("expert_count", "expert_used_count", "expert_feed_forward_length", "interleave_moe_layer_step"),
}
"""Beside ``_READ``, for architecture ``llama4``."""
_EVERYWHERE = "attention.sliding_window"
"""A field that a Llama 4 has where all of its layers have positions, and none is chunked."""
_CHUNK, LLAMA4_INTERVAL, _FLOOR_SCALE, _ATTN_SCALE, _WITHOUT_QK_NORM = 8192, 4, 8192, 0.1, 128
"""What no file tells of a Llama 4: positions of a chunk, every which layer has neither chunks nor positions, how its
temperature rises, and how many experts tell of a model without QK norm (llama.cpp, src/models/llama4.cpp)."""

_END_TOKENS = ("eos", "eot", "eom")
END_TEXTS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|endoftext|>", "</s>")
"""Control tokens that llama.cpp ends an answer at, whatever the metadata says (``special_eog_ids``); of those that it
knows, the ones of Llama models."""
_SENTENCEPIECE_TOKENS = {"unknown": 0, "bos": 1, "eos": 2}
"""What llama.cpp takes for a SentencePiece vocabulary whose file does not tell."""
CONTROL = 3
"""The type, in ``tokenizer.ggml.token_type``, of a token that stands for no text."""

_DEQUANTIZED_AT_ONCE = 1 << 20
"""Elements; ``gguf.dequantize`` takes about as much memory again as what it gives."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where and how a tensor lies in its file."""

    file: Path
    shape: tuple[int, ...]
    type: int
    """Of ``GGMLQuantizationType``, or beyond it."""
    offset: int
    """Bytes from the beginning of the file."""


@dataclass(frozen=True, slots=True)
class Header:
    """All of a GGUF file but its tensors' data; of a split file, the first one's metadata and everyone's tensors."""

    file: Path
    fields: Mapping[str, Any]
    """Numbers, strings, and tuples of them."""
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """What the names of its fields begin with."""
        return str(self.fields.get("general.architecture"))


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of a GGUF file. A plain one is mapped, a quantized one dequantized to float32."""

    name: str
    info: TensorInfo
    heads: int
    """Over which the rows were permuted for llama.cpp's RoPE; 0: they were not."""

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.info.file,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        return _PLAIN.get(GGMLQuantizationType(self.info.type).name, torch.float32)

    def read(self) -> Tensor:
        kind, rows = GGMLQuantizationType(self.info.type), self.rows()
        if kind.name in _PLAIN:
            return torch.from_numpy(rows).view(self.dtype).view(self.shape)
        out = np.empty((len(rows), self.shape[-1]), dtype=np.float32)
        step = max(1, _DEQUANTIZED_AT_ONCE // self.shape[-1])
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            for first in range(0, len(rows), step):
                out[first : first + step] = dequantize(rows[first : first + step], kind)
        return torch.from_numpy(out).view(self.shape)

    def rows(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """What is stored, ``[rows, bytes of a row]``: mapped, or with the rows in the order of Hugging Face."""
        rows = self._map(GGMLQuantizationType(self.info.type))
        return _apart(rows, self.heads) if self.heads else rows  # whole rows, so that quantized ones move as they are

    def _map(self, kind: GGMLQuantizationType) -> np.ndarray[Any, np.dtype[np.uint8]]:
        columns, count = self.shape[-1], math.prod(self.shape[:-1])
        shape = (count, _row_bytes(kind, columns))
        try:
            # Copy on write, as torch wants memory that may be written to.
            return np.memmap(self.info.file, dtype=np.uint8, mode="c", offset=self.info.offset, shape=shape)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.info.file}: cannot read {self.name}: {error}", hint=COPY_AGAIN) from error


@dataclass(frozen=True, slots=True)
class GGUFCodes(LazyCodes):
    """A quantized matrix of a GGUF file: of Q4_0 and Q8_0 the codes are signed and symmetric, as ours are."""

    tensor: GGUFTensor

    @property
    def files(self) -> tuple[Path, ...]:
        return self.tensor.files

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def kind(self) -> CodeKind | None:
        precision = _SYMMETRIC.get(GGMLQuantizationType(self.tensor.info.type).name)
        if precision is None:
            return None
        signed = precision is Precision.INT4
        return CodeKind(source="gguf", precision=precision, group_size=_GROUP, zero_points=False, signed_scales=signed)

    def coded(self) -> QuantizedTensor:
        """Of blocks of 32: a float16 scale, then int8 codes, or nibbles from 0, the low ones of all 16 bytes first
        (ggml, src/ggml-common.h, ``block_q4_0`` and ``block_q8_0``)."""
        assert self.kind  # the caller has asked
        rows, columns = self.shape
        blocks = torch.from_numpy(self.tensor.rows()).reshape(rows, columns // _GROUP, -1)
        scales = blocks[..., :2].contiguous().view(torch.float16).float().squeeze(2)
        codes = blocks[..., 2:].contiguous()
        if self.kind.precision is Precision.INT4:
            codes = torch.cat([codes & 0xF, codes >> 4], dim=2) - 8
        bits = self.kind.precision.bits or 8
        flat = codes.view(torch.int8).view(rows, columns)
        return QuantizedTensor(name=self.tensor.name, bits=bits, group_size=_GROUP, codes=flat, scales=scales)

    def read(self) -> Tensor:
        return self.tensor.read()


def is_gguf(path: Path) -> bool:
    """Whether a checkpoint is a GGUF file, or a folder with no description but such a file, whole or split."""
    if not path.is_dir():
        return path.suffix == SUFFIX
    return not (path / "config.json").exists() and len(_models(path)) == 1


def read_header(path: Path) -> Header:
    """The header of a file, of all parts of a split one, or of the one model in a folder. Raises InputError."""
    files = _parts(path)
    headers = [_Parser(file).header() for file in files]
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        if again := tensors.keys() & header.tensors.keys():
            raise InputError(f"{header.file}: {min(again)} is there twice", hint=COPY_AGAIN)
        tensors |= header.tensors
    count = headers[0].fields.get("split.count", len(files))
    if count not in (len(files), 0):
        raise InputError(
            f"{files[0]}: split.count is {count!r}, the name says {len(files)}", hint="give the files their names back"
        )
    return Header(file=files[0], fields=headers[0].fields, tensors=tensors)


def read_spec(header: Header) -> ModelSpec:
    """The ModelSpec of a header. Raises InputError with the field, its value and those known."""
    _refuse_unknown(header)
    heads, hidden = _integer(header, "attention.head_count"), _integer(header, "embedding_length")
    head_dim = _integer(header, "attention.key_length", default=hidden // heads)
    for field in ("attention.value_length", "rope.dimension_count"):
        if (size := _integer(header, field, default=head_dim)) != head_dim:
            raise _unknown(header, f"{header.architecture}.{field}", size, known=[head_dim])
    layers, has_experts = _integer(header, "block_count"), header.architecture == "llama4"
    if layers > len(header.tensors):
        raise InputError(
            f"{header.file}: {header.architecture}.block_count is {layers}, "
            f"but there are {len(header.tensors)} tensors",
            hint=COPY_AGAIN,
        )
    bos, eos = _special_tokens(header)
    try:
        return ModelSpec(
            name=re.sub(r"-\d{5}-of-\d{5}$", "", header.file.stem),
            vocab_size=_vocabulary(header),
            hidden_size=hidden,
            intermediate_size=_integer(header, "expert_feed_forward_length" if has_experts else "feed_forward_length"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_integer(header, "attention.head_count_kv", default=heads),
            head_dim=head_dim,
            max_position_embeddings=_integer(header, "context_length"),
            rms_norm_eps=_number(header, "attention.layer_norm_rms_epsilon"),
            tie_word_embeddings="output.weight" not in header.tensors,
            rope=_read_rope(header),
            bos_token_id=bos,
            eos_token_ids=eos,
            attention=llama4_attention(layers=layers, experts=_integer(header, "expert_count"))
            if has_experts
            else AttentionSpec(),
            experts=_experts(header, layers=layers) if has_experts else None,
        )
    except ValueError as error:
        raise InputError(f"{header.file}: {error}", hint=COPY_AGAIN) from error


def map_tensors(header: Header, spec: ModelSpec) -> dict[str, LazyTensor]:
    """Every tensor that ``spec`` wants. Raises InputError for files that are broken or of another model."""
    return matched(
        {name: _as_codes(tensor) for name, tensor in stored_tensors(header, spec)},
        spec,
        place=header.file,
        described_by="its metadata",
    )


def _as_codes(tensor: GGUFTensor) -> LazyTensor:
    plain = GGMLQuantizationType(tensor.info.type).name in _PLAIN
    return tensor if plain or len(tensor.shape) != 2 else GGUFCodes(tensor)


def stored_tensors(header: Header, spec: ModelSpec) -> Iterator[tuple[str, GGUFTensor]]:
    """Every tensor, by its name of Hugging Face where it has one. Raises InputError for an unknown type."""
    for name, info in header.tensors.items():
        if name == ROPE_FACTORS or name.endswith(".attn_rot_embd.weight"):  # frequencies: the spec has them
            continue
        known, stack = _readable(name, info), _STACKED.fullmatch(name)
        if stack and spec.experts and len(info.shape) == 3:
            place = f"{_layer(stack[1], spec)}.feed_forward.experts"
            for expert, one in enumerate(_apart_experts(known)):
                yield f"{place}.{expert}.{stack[2]}_proj.weight", GGUFTensor(name, one, heads=0)
            continue
        renamed = _renamed(name, spec)
        yield renamed, GGUFTensor(name, known, heads=permuted_heads(renamed, spec))


def _apart_experts(info: TensorInfo) -> Iterator[TensorInfo]:
    """Of a stack ``[E, N, K]`` each matrix: its own rows of blocks, and no others, are read."""
    size = info.shape[1] * _row_bytes(GGMLQuantizationType(info.type), info.shape[2])
    for expert in range(info.shape[0]):
        yield replace(info, shape=info.shape[1:], offset=info.offset + expert * size)


def llamacpp_name(name: str, numbers: Mapping[int, int], *, has_experts: bool) -> str:
    """Of the weight that Hugging Face calls ``name``, an expert's: of the stack that it is in; ``numbers`` are those
    that the layers have in the file."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if found is None:
        return next(ours for ours, theirs in _ENDS.items() if theirs == name)
    expert = re.fullmatch(r"feed_forward\.experts\.\d+\.(gate|up|down)_proj", found.group(2))
    block = _EXPERT_BLOCK if has_experts else _BLOCK
    part = f"ffn_{expert[1]}_exps" if expert else next(our for our, their in block.items() if their == found.group(2))
    return f"blk.{numbers[int(found.group(1))]}.{part}.weight"


def permuted_heads(name: str, spec: ModelSpec) -> int:
    """The heads over which the rows of the weight that Hugging Face calls ``name`` are ``interleaved``; 0: they are
    not. Those of layers without positions of a Llama 4 lie as they are in every format."""
    if spec.attention.unrotated_layers and not is_rotated(name, spec):
        return 0
    part = name.removesuffix(".weight").rpartition(".")[2]
    return {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads}.get(part, 0)


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows ``[heads * D, ...]`` in the order of llama.cpp's RoPE, which turns neighbours: of each head row ``i`` comes
    before row ``i + D / 2`` (``permute`` of its conversion/llama.py)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _apart(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What was ``interleaved``, as it was."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tokens_of(header: Header) -> tuple[str, ...]:
    """The texts of all tokens. Raises InputError where there are none."""
    tokens = header.fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, tuple) or not tokens or not isinstance(tokens[0], str):
        raise InputError(
            f"{header.file} has no tokenizer.ggml.tokens, a list of texts was expected",
            hint="convert the model again, with its vocabulary",
        )
    return tokens


def token_types_of(header: Header) -> tuple[int, ...]:
    """The type of each token; none where the file does not tell. Raises InputError where they are not one for each."""
    types = header.fields.get("tokenizer.ggml.token_type", ())
    if types and (not isinstance(types, tuple) or len(types) != len(tokens_of(header))):
        raise InputError(
            f"{header.file}: tokenizer.ggml.token_type is not one number for each of {len(tokens_of(header))} tokens",
            hint=COPY_AGAIN,
        )
    return tuple(types)


def special_token(header: Header, kind: str) -> int | None:
    """The id of a token by its kind: bos, eos, ... Raises InputError for one that is none."""
    field = f"tokenizer.ggml.{kind}_token_id"
    default = _SENTENCEPIECE_TOKENS.get(kind) if header.fields.get("tokenizer.ggml.model") == "llama" else None
    value = header.fields.get(field, default)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(header, field, value, wanted="a token id")
    return value


class _Parser:
    """Reads one file's header from beginning to end, and believes lengths and counts as far as the file goes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as opened:
                self.data: mmap.mmap | bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise InputError(f"{file}: found nothing, a GGUF file was expected", hint="check the path") from None
        except ValueError:  # an empty file cannot be mapped
            self.data = b""
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error}", hint=COPY_AGAIN) from error
        self.place = 0

    def header(self) -> Header:
        if self._take(4) != _MAGIC:
            raise InputError(
                f"{self.file} is no GGUF file: it does not begin with the letters GGUF",
                hint="name a .gguf file, or a folder in Hugging Face layout",
            )
        version = self._number("I")
        if version not in _VERSIONS:
            known = " and ".join(str(version) for version in _VERSIONS)
            raise InputError(
                f"{self.file} has version {version} of GGUF; known: {known}, little-endian",
                hint="convert the model again, with a llama.cpp of today",
            )
        tensor_count, field_count = self._number("Q"), self._number("Q")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self._string()
            if name in fields:
                raise self._broken(f"the field {name} is there twice")
            fields[name] = self._value(self._number("I"))
        if tensor_count * _SHORTEST_TENSOR_INFO > len(self.data) - self.place:
            raise self._broken(f"it cannot hold {tensor_count} tensors")
        infos = [(self._string(), *self._tensor_info()) for _ in range(tensor_count)]
        return Header(file=self.file, fields=fields, tensors=self._place_tensors(infos, fields))

    def _place_tensors(
        self, infos: Iterable[tuple[str, tuple[int, ...], int, int]], fields: Mapping[str, Any]
    ) -> dict[str, TensorInfo]:
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self._broken(f"general.alignment is {alignment!r}, a power of two from 8 on was expected")
        start = -(-self.place // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self._broken(f"the tensor {name} is there twice")
            size = _bytes(kind, shape)
            if offset % alignment or (size is not None and start + offset + size > len(self.data)):
                raise self._broken(f"the tensor {name} of shape {list(shape)} at byte {offset} does not lie within it")
            tensors[name] = TensorInfo(file=self.file, shape=shape, type=kind, offset=start + offset)
        return tensors

    def _tensor_info(self) -> tuple[tuple[int, ...], int, int]:
        dimensions = self._number("I")
        if not 1 <= dimensions <= 4:
            raise self._broken(f"a tensor has {dimensions} dimensions")
        shape = self._unpack("Q", dimensions)[::-1]  # llama.cpp names the columns first
        if not all(shape):
            raise self._broken(f"a tensor has shape {list(shape)}")
        return shape, self._number("I"), self._number("Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._number("I"), self._number("Q")
            if element == _STRING:
                if count * 8 > len(self.data) - self.place:
                    raise self._broken(f"it cannot hold {count} texts")
                return tuple(self._string() for _ in range(count))
            return self._unpack(self._letter(element), count)
        return self._number(self._letter(kind))

    def _letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._broken(f"a value has type {kind}")
        return _SCALARS[kind]

    def _number(self, letter: str) -> Any:
        return self._unpack(letter, 1)[0]

    def _unpack(self, letter: str, count: int) -> tuple[Any, ...]:
        content = self._take(count * struct.calcsize(f"<{letter}"))
        return struct.unpack(f"<{count}{letter}", content)

    def _string(self) -> str:
        try:
            return self._take(self._number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self._broken("a text is not UTF-8") from error

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.place:
            raise self._broken(f"{size} bytes are wanted at byte {self.place} of {len(self.data)}")
        content = self.data[self.place : self.place + size]
        self.place += size
        return content

    def _broken(self, found: str) -> InputError:
        return InputError(f"{self.file} is not a whole GGUF file: {found}", hint=COPY_AGAIN)


def _models(folder: Path) -> dict[str, list[Path]]:
    """The GGUF files of a folder, the parts of a split one together."""
    models: dict[str, list[Path]] = {}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        models.setdefault(re.sub(r"-\d{5}(-of-\d{5})$", r"\1", file.stem), []).append(file)
    return models


def _parts(path: Path) -> list[Path]:
    """All files of the model of which ``path`` is one, or which it holds."""
    file = next(iter(_models(path).values()))[0] if path.is_dir() else path
    named = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})", file.stem)
    if named is None:
        return [file]
    stem, count = named.group(1), int(named.group(2))
    parts = [file.with_name(f"{stem}-{index:05}-of-{count:05}{SUFFIX}") for index in range(1, count + 1)]
    absent = [part.name for part in parts if not part.exists()]
    if absent or not parts:
        shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise InputError(
            f"{file} is one of {count} files, of which {len(absent)} are missing: {shown}",
            hint="download the missing files",
        )
    return parts


def _row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return columns // block * size


def _bytes(kind: int, shape: tuple[int, ...]) -> int | None:
    """What a tensor takes; None where its type is not known, which is told when it is wanted."""
    if kind not in set(GGMLQuantizationType):
        return None
    return math.prod(shape[:-1]) * _row_bytes(GGMLQuantizationType(kind), shape[-1])


def _readable(name: str, info: TensorInfo) -> TensorInfo:
    known = (*_PLAIN, *_QUANTIZED)
    found = GGMLQuantizationType(info.type).name if info.type in set(GGMLQuantizationType) else str(info.type)
    if found not in known:
        raise InputError(
            f"{info.file}: {name} has type {found}; known: {', '.join(known)}",
            hint="quantize the original model to another type, or name the original",
        )
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType(info.type)]
    if info.shape[-1] % block:
        raise InputError(
            f"{info.file}: {name} has {info.shape[-1]} columns, type {found} has blocks of {block}", hint=COPY_AGAIN
        )
    return info


def _renamed(name: str, spec: ModelSpec) -> str:
    """A tensor's name of Hugging Face; those unknown stay as they are."""
    block = _EXPERT_BLOCK if spec.experts else _BLOCK
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None or found.group(2) not in block:
        return _ENDS.get(name, name)
    return f"{_layer(found.group(1), spec)}.{block[found.group(2)]}.weight"


def _layer(number: str, spec: ModelSpec) -> str:
    """How the names of the weights of block ``number`` begin; one beyond the model's layers is unknown by any name."""
    return spec.layer_name(int(number)) if int(number) < spec.num_hidden_layers else f"{LAYERS}{number}"


def _refuse_unknown(header: Header) -> None:
    architecture = header.fields.get("general.architecture")
    if architecture == _FORKED:
        raise InputError(
            f"{header.file}: general.architecture is {_FORKED!r}, Llama 3.2 Vision, which llama.cpp has none of: such "
            "files are of forks of it, each with a layout of its own",
            hint="take the model in Hugging Face layout (config.json, *.safetensors) or Meta's (params.json, *.pth)",
        )
    if architecture not in _ARCHITECTURES:
        raise _unknown(header, "general.architecture", architecture, known=[*_ARCHITECTURES])
    read = _READ | _READ_OF_EXPERTS if architecture == "llama4" else _READ
    for field, value in header.fields.items():
        name = field.removeprefix(f"{architecture}.")
        if name == field or name in read:
            continue
        only = () if architecture == "llama4" and name == _EVERYWHERE else _ONLY.get(name, ())
        if value not in only:
            raise _unknown(header, field, value, known=[*only, "no such field"])


def llama4_attention(*, layers: int, experts: int) -> AttentionSpec:
    """Of every Llama 4 in a GGUF file: what llama.cpp computes, which no field tells."""
    rotated = tuple(layer for layer in range(layers) if (layer + 1) % LLAMA4_INTERVAL)
    return AttentionSpec(
        attention_chunk_size=_CHUNK,
        chunked_layers=rotated,
        unrotated_layers=tuple(layer for layer in range(layers) if layer not in rotated),
        use_qk_norm=experts != _WITHOUT_QK_NORM,
        floor_scale=_FLOOR_SCALE,
        attn_scale=_ATTN_SCALE,
    )


def _experts(header: Header, *, layers: int) -> ExpertSpec:
    step = _integer(header, "interleave_moe_layer_step")
    return ExpertSpec(
        num_local_experts=_integer(header, "expert_count"),
        num_experts_per_tok=_integer(header, "expert_used_count"),
        moe_layers=tuple(range(step - 1, layers, step)),
        intermediate_size_mlp=_integer(header, "feed_forward_length"),
    )


def _read_rope(header: Header) -> RopeSpec:
    """As llama.cpp takes it: ``linear`` where no type is told, its factor in either spelling, and the factors of each
    frequency wherever there are any."""
    theta = _number(header, "rope.freq_base", default=10_000.0)
    kind = header.fields.get(f"{header.architecture}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise _unknown(header, f"{header.architecture}.rope.scaling.type", kind, known=["none", "linear"])
    spelled = (
        "rope.scaling.factor" if f"{header.architecture}.rope.scaling.factor" in header.fields else "rope.scale_linear"
    )
    # llama.cpp takes 0 for 1.
    factor = 1.0 if not header.fields.get(f"{header.architecture}.{spelled}") else _number(header, spelled)
    scaled = kind == "linear" and factor != 1.0
    info = header.tensors.get(ROPE_FACTORS)
    if info is None:
        if scaled:
            return RopeSpec(theta=theta, kind=RopeKind.LINEAR, factor=factor)
        return RopeSpec(theta=theta)
    if scaled:
        raise _unknown(header, f"{header.architecture}.{spelled}", factor, known=[f"1 where there is {ROPE_FACTORS}"])
    if info.type != GGMLQuantizationType.F32 or len(info.shape) != 1:
        raise InputError(
            f"{header.file}: {ROPE_FACTORS} has type {info.type} and shape {list(info.shape)}, "
            f"F32 and one dimension were expected",
            hint=COPY_AGAIN,
        )
    factors = GGUFTensor(ROPE_FACTORS, info, heads=0).read().tolist()
    return RopeSpec(theta=theta, kind=RopeKind.FACTORS, factors=tuple(factors))


def _special_tokens(header: Header) -> tuple[int | None, tuple[int, ...]]:
    """The begin token, and every stop token: the metadata's own first, then those known by their text."""
    bos = special_token(header, "bos")
    ends = [token for kind in _END_TOKENS if (token := special_token(header, kind)) is not None]
    if isinstance(header.fields.get("tokenizer.ggml.tokens"), tuple):
        types = token_types_of(header)
        ends += [
            index
            for index, (text, kind) in enumerate(zip(tokens_of(header), types, strict=False))
            if kind == CONTROL and text in END_TEXTS
        ]
    return bos, tuple(dict.fromkeys(ends))


def _vocabulary(header: Header) -> int:
    return (
        _integer(header, "vocab_size")
        if f"{header.architecture}.vocab_size" in header.fields
        else len(tokens_of(header))
    )


def _integer(header: Header, name: str, *, default: int | None = None) -> int:
    value = header.fields.get(f"{header.architecture}.{name}", default)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _wrong(header, f"{header.architecture}.{name}", value, wanted="a positive integer")
    return value


def _number(header: Header, name: str, *, default: float | None = None) -> float:
    value = header.fields.get(f"{header.architecture}.{name}", default)
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        raise _wrong(header, f"{header.architecture}.{name}", value, wanted="a positive number")
    return value


def _wrong(header: Header, field: str, value: object, *, wanted: str) -> InputError:
    found = "missing" if value is None else _shown(value)
    return InputError(f"{header.file}: {field} is {found}, {wanted} was expected", hint=COPY_AGAIN)


def _unknown(header: Header, field: str, value: object, *, known: list[Any]) -> InputError:
    return InputError(
        f"{header.file}: {field} is {_shown(value)}; known: {', '.join(str(value) for value in known)}",
        hint="only Llama text models are supported",
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
