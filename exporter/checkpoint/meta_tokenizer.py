"""``tokenizer.model`` of Meta's releases -> ``tokenizer.json`` with the same ids: SentencePiece up to Code Llama, a
file of tiktoken from Llama 3 on. Both are read here; neither library is needed."""

from __future__ import annotations

import base64
import binascii
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from exporter.checkpoint.tensors import COPY_AGAIN
from exporter.errors import InputError
from exporter.files import folder_in_progress, put_in_place

TOKENIZER = "tokenizer.model"

LLAMA3_RANKS = 128_000
"""Tokens of Llama 3 that stand for text; the special ones come after them."""

LLAMA4_RANKS = 200_000
"""Those of Llama 4."""

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""What Llama 3 splits a text into first: meta-llama/llama3, llama/tokenizer.py, ``pat_str``."""

_CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA4_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTED}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The same of Llama 4: meta-llama/llama-models, models/llama4/tokenizer.py, ``O200K_PATTERN``."""

_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"
_NAMED = {
    0: _BEGIN,
    1: _END,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
"""Special tokens in the words of Llama 3.1; Llama 3 holds the fifth, ninth and eleventh in reserve."""
_SPECIALS = 256
_STOPS = (1, 8, 9)


def _special_tokens() -> tuple[str, ...]:
    reserve = (f"<|reserved_special_token_{index}|>" for index in range(_SPECIALS))
    return tuple(_NAMED.get(index) or next(reserve) for index in range(_SPECIALS))


SPECIAL_TOKENS = _special_tokens()

_SPECIALS4 = 2048
_STOPS4 = (1, 7, 8)


def _special_tokens4() -> tuple[str, ...]:
    """models/llama4/tokenizer.py: from 200,000 on, from 200,005, from 200,080, from 201,134, and what is left."""

    def reserve(name: str, first: int, last: int) -> list[str]:
        return [f"<|{name}reserved_special_token_{index}|>" for index in range(first, last)]

    text, vision, reasoning = "text_post_train_", "vision_", "reasoning_"
    known = [
        *(_BEGIN, _END, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>", *reserve(text, 0, 6)),
        *("<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *reserve(text, 8, 69)),
        *("<|image_start|>", "<|image_end|>", *reserve(vision, 0, 2), "<|tile_x_separator|>", "<|tile_y_separator|>"),
        *(*reserve(vision, 2, 6), "<|image|>", *reserve(vision, 6, 7), "<|patch|>", *reserve(vision, 7, 1048)),
        *(*reserve(reasoning, 0, 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"),
    ]
    return (*known, *reserve("", 0, _SPECIALS4 - len(known)))


SPECIAL_TOKENS4 = _special_tokens4()

_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""sentencepiece_model.proto, ``ModelProto.SentencePiece.Type``."""
_BPE = 2
_OTHER_LAYOUT = "only tokenizers with Llama's settings are converted: take the model in Hugging Face layout"


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """A BPE model of sentencepiece with byte fallback, normalization identity and all spaces kept."""

    pieces: tuple[Piece, ...]
    add_dummy_prefix: bool
    """A space goes in front of every text."""
    bos: int
    eos: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.pieces)


@dataclass(frozen=True, slots=True)
class TikToken:
    """Byte strings by rank: of two neighbours, those join first whose union has the lowest rank."""

    ranks: Mapping[bytes, int]
    first_special: int

    @property
    def is_llama4(self) -> bool:
        return self.first_special == LLAMA4_RANKS

    @property
    def specials(self) -> tuple[str, ...]:
        return SPECIAL_TOKENS4 if self.is_llama4 else SPECIAL_TOKENS

    @property
    def size(self) -> int:
        return self.first_special + len(self.specials)

    @property
    def bos(self) -> int:
        return self.first_special

    @property
    def eos(self) -> tuple[int, ...]:
        return tuple(self.first_special + stop for stop in (_STOPS4 if self.is_llama4 else _STOPS))


def read_vocabulary(file: Path) -> SentencePiece | TikToken:
    """A ``tokenizer.model`` of either kind. Raises InputError."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{file.parent} has no {file.name}", hint="download it into this folder") from None
    try:
        return _read_ranks(content) if _has_ranks(content) else _read_pieces(content, file)
    except (ValueError, IndexError, struct.error) as error:
        raise InputError(
            f"{file} is neither a whole SentencePiece model nor a whole file of tiktoken: {error}", hint=COPY_AGAIN
        ) from error


def write_tokenizer(checkpoint_folder: Path, folder: Path, *, behind: Sequence[str] = ()) -> None:
    """``tokenizer.json`` and ``tokenizer_config.json`` of a folder in Meta's layout, as a new ``folder``, whole or not
    at all; ``behind``: special tokens after those of the vocabulary. The spelling of a special token in a text is that
    token, as rendered conversations need it; Meta's own programs take it for text. Raises InputError."""
    vocabulary = read_vocabulary(checkpoint_folder / TOKENIZER)
    tokenizer, config = _of_pieces(vocabulary) if isinstance(vocabulary, SentencePiece) else _of_ranks(vocabulary)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in behind])
    with folder_in_progress(folder.parent, folder.name) as made:
        tokenizer.save(str(made / "tokenizer.json"))
        (made / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        put_in_place(made, folder)


def _of_pieces(model: SentencePiece) -> tuple[Tokenizer, dict[str, Any]]:
    """As ``LlamaConverter`` of transformers and the releases of Llama 2 in Hugging Face layout; but ``<unk>`` in a
    text, as WikiText has it, is text, and control tokens and bytes come of no merge."""
    ids = {piece.text: id for id, piece in enumerate(model.pieces)}
    merges = _merges(
        {piece.text: -piece.score for piece in model.pieces if piece.kind == _NORMAL},
        parts={piece.text: id for id, piece in enumerate(model.pieces) if piece.kind == _NORMAL},
    )
    unknown = next(piece.text for piece in model.pieces if piece.kind == _UNKNOWN)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend(_SPACE)] if model.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    stripped = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    for piece in model.pieces:
        if piece.kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(piece.text, normalized=False, special=True)])
    bos, eos = model.pieces[model.bos].text, model.pieces[model.eos[0]].text
    tokenizer.post_processor = _begins_with(bos, id=model.bos)
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def _of_ranks(model: TikToken) -> tuple[Tokenizer, dict[str, Any]]:
    """As ``TikTokenConverter`` of transformers and the releases of Llama 3 and 4 in Hugging Face layout."""
    letters = _byte_letters()
    ids = {"".join(map(letters.__getitem__, token)): rank for token, rank in model.ranks.items()}
    tokenizer = Tokenizer(models.BPE(ids, _merges(ids, parts=ids), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA4_PATTERN if model.is_llama4 else LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in model.specials])
    tokenizer.post_processor = _begins_with(_BEGIN, id=model.bos)
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BEGIN,
        "eos_token": _END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _merges(order: Mapping[str, float], *, parts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of ``parts`` that makes up a token, those of the lowest ``order`` first, then by their ids."""
    pairs = (
        (place, parts[token[:cut]], parts[token[cut:]], token[:cut], token[cut:])
        for token, place in order.items()
        for cut in range(1, len(token))
        if token[:cut] in parts and token[cut:] in parts
    )
    return [(left, right) for *_, left, right in sorted(pairs)]


def _begins_with(token: str, *, id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, id)]
    )


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself where it is visible, else one from U+0100 on
    (openai/gpt-2, src/encoder.py, ``bytes_to_unicode``)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _has_ranks(content: bytes) -> bool:
    """Whether a file begins as one of tiktoken does: base64, a space, a number."""
    token, _, rank = content.split(b"\n", 1)[0].strip().partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
    except binascii.Error:
        return False


def _read_ranks(content: bytes) -> TikToken:
    """Lines of a token's bytes in base64 and its rank. Raises ValueError."""
    lines = (line.split() for line in content.splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"its {len(ranks)} tokens have other ranks than 0 to {len(ranks) - 1}")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("not every byte has a rank")
    return TikToken(ranks=ranks, first_special=len(ranks))


def _read_pieces(content: bytes, file: Path) -> SentencePiece:
    """sentencepiece_model.proto, ``ModelProto``. Raises ValueError for what is none, InputError for one that splits
    text in a way that no Llama has."""
    model = list(_fields(content))
    pieces = tuple(_read_piece(value) for field, value in model if field == 1)
    trainer, normalizer = (
        {key: value for field, part in model if field == wanted for key, value in _fields(part)} for wanted in (2, 3)
    )
    found = {
        "model_type": trainer.get(3, 1),
        "byte_fallback": trainer.get(35, 0),
        "treat_whitespace_as_suffix": trainer.get(24, 0),
        "precompiled_charsmap": normalizer.get(2, b""),
        "remove_extra_whitespaces": normalizer.get(4, 1),
        "escape_whitespaces": normalizer.get(5, 1),
    }
    known = {
        "model_type": _BPE,
        "byte_fallback": 1,
        "treat_whitespace_as_suffix": 0,
        "precompiled_charsmap": b"",
        "remove_extra_whitespaces": 0,
        "escape_whitespaces": 1,
    }
    ids = {piece.text: id for id, piece in enumerate(pieces)}
    missing = [name for name in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>") if name not in ids]
    if not missing and pieces[ids["<unk>"]].kind != _UNKNOWN:
        raise ValueError("<unk> is not the piece for what is unknown")
    if missing or len(ids) != len(pieces):
        raise ValueError(f"no {missing[0]} among its pieces" if missing else "it has a piece twice")
    for field, value in found.items():
        if value != known[field]:
            shown = f"{len(value)} bytes" if isinstance(value, bytes) else value
            raise InputError(
                f"{file}: {field} is {shown}; known: {known[field] or 'none'}",
                hint=_OTHER_LAYOUT,
            )
    others = [piece for piece in pieces if piece.kind not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE)]
    if others:
        raise InputError(
            f"{file}: piece {others[0].text!r} is of type {others[0].kind}; "
            "known: normal (1), unknown (2), control (3), byte (6)",
            hint=_OTHER_LAYOUT,
        )
    return SentencePiece(pieces=pieces, add_dummy_prefix=bool(normalizer.get(3, 1)), bos=ids["<s>"], eos=(ids["</s>"],))


def _read_piece(content: Any) -> Piece:
    fields = dict(_fields(content))
    text, score, kind = fields.get(1), fields.get(2, bytes(4)), fields.get(3, _NORMAL)
    if not (isinstance(text, bytes) and isinstance(score, bytes) and len(score) == 4 and isinstance(kind, int)):
        raise ValueError("a piece is no text with a score and a type")
    return Piece(text=text.decode(), score=struct.unpack("<f", score)[0], kind=kind)


def _fields(content: Any) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message of protocol buffers: an int, or bytes. Raises ValueError, also for
    ``content`` that is an int where a message was expected."""
    if not isinstance(content, bytes):
        raise ValueError("a number stands where a message was expected")
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            byte = content[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number is longer than ten bytes")

    def taken(count: int) -> bytes:
        nonlocal place
        place += count
        if place > len(content):
            raise ValueError("it is cut off")
        return content[place - count : place]

    kinds: dict[int, Callable[[], int | bytes]] = {
        0: varint,
        1: lambda: taken(8),
        2: lambda: taken(varint()),
        5: lambda: taken(4),
    }
    while place < len(content):
        field, kind = divmod(varint(), 8)
        if kind not in kinds or field == 0:
            raise ValueError(f"field {field} is of kind {kind}, of which there is none")
        yield field, kinds[kind]()
