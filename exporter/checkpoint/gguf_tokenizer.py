"""The vocabulary in a GGUF file -> tokenizer.json and what belongs to it, with the ids that llama.cpp gives (of a
Llama 4: that Meta's tokenizer gives, see ``LLAMA4``).

Not by transformers' converter (``integrations.gguf`` of 5.23), which leaves out Llama 3's rule that a word of the
vocabulary is taken whole, adds a token, and puts no space before a text that begins with one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.checkpoint.gguf_file import (
    CONTROL,
    Header,
    read_header,
    read_spec,
    special_token,
    token_types_of,
    tokens_of,
)
from exporter.checkpoint.meta_tokenizer import LLAMA3_PATTERN, LLAMA4_PATTERN
from exporter.checkpoint.tensors import COPY_AGAIN
from exporter.errors import InputError
from exporter.files import folder_in_progress, put_in_place

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WRITTEN_AS = 1
"""Raised whenever the same metadata gives other files than before."""
NORMAL, UNKNOWN, USER_DEFINED, UNUSED, BYTE = 1, 2, 4, 5, 6
"""Types of tokens beside ``CONTROL``."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SPLITS = {
    "llama-bpe": (LLAMA3_PATTERN,),
    "llama3": (LLAMA3_PATTERN,),
    "llama-v3": (LLAMA3_PATTERN,),
    "smaug-bpe": (LLAMA3_PATTERN,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
}
"""How text is cut before merging, one pattern after the other, by ``tokenizer.ggml.pre`` (``llama-vocab.cpp``)."""
LLAMA4 = "llama4"
_READ = {**SPLITS, LLAMA4: (LLAMA4_PATTERN,)}
"""What is read besides: Llama 4's own pattern; llama.cpp has one that takes letters beyond ASCII otherwise."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""Those of them under which a word that is a token is taken whole, without merging, and a begin token is usual. Under
``llama4`` it is taken whole too, as Meta's tokenizer does; llama.cpp merges it."""


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json of a GGUF file into ``folder``, all of
    them or none. Raises InputError for a vocabulary that is broken or of an unknown kind."""
    header = read_header(path)
    tokenizer = _build(header)
    spec = read_spec(header)
    template = header.fields.get("tokenizer.chat_template")
    config: dict[str, Any] = {
        **_special_tokens(header),
        **({"chat_template": template} if isinstance(template, str) else {}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {"bos_token_id": spec.bos_token_id, "eos_token_id": list(spec.eos_token_ids)}
    with folder_in_progress(folder.parent, folder.name) as unfinished:
        (unfinished / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        (unfinished / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        (unfinished / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
        put_in_place(unfinished, folder)


def cached_tokenizer(path: Path, cache: Path) -> Path:
    """The folder below ``cache`` with the tokenizer of a GGUF file, written if it is not there. Raises InputError."""
    fields = sorted(read_header(path).fields.items())
    folder = cache / f"tokenizer-{hashlib.sha256(repr((_WRITTEN_AS, fields)).encode()).hexdigest()[:16]}"
    if not folder.exists():
        write_tokenizer(path, folder)
    return folder


def _build(header: Header) -> Tokenizer:
    from tokenizers import AddedToken

    model = header.fields.get("tokenizer.ggml.model")
    if model not in ("llama", "gpt2"):
        raise _unknown(header, "tokenizer.ggml.model", model, known=("llama", "gpt2"))
    vocabulary = _vocabulary(header)
    types = token_types_of(header) or (1,) * len(vocabulary)
    try:
        tokenizer = _sentencepiece(header, vocabulary) if model == "llama" else _byte_level(header, vocabulary)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for merges that do not fit the vocabulary
        raise InputError(f"{header.file}: the vocabulary cannot be read: {error}", hint=COPY_AGAIN) from error
    named = set(_special_tokens(header).values())  # which transformers takes for special, whatever their type
    tokenizer.add_special_tokens(
        [
            AddedToken(text, normalized=False)
            for text, kind in zip(vocabulary, types, strict=True)
            if kind in (CONTROL, UNKNOWN) or text in named
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False)
            for text, kind in zip(vocabulary, types, strict=True)
            if kind == USER_DEFINED and text not in named
        ]
    )
    _frame(header, tokenizer)
    return tokenizer


def _special_tokens(header: Header) -> dict[str, str]:
    """Texts of the begin, end, unknown and padding tokens, under their names in tokenizer_config.json."""
    return {
        f"{name}_token": tokens_of(header)[token]
        for name, kind in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token := _in_vocabulary(header, kind)) is not None
    }


def _vocabulary(header: Header) -> dict[str, int]:
    """Ids by text, in their order. Raises InputError for a text that two have."""
    tokens = tokens_of(header)
    vocabulary: dict[str, int] = {}
    for index, text in enumerate(tokens):
        first = vocabulary.setdefault(text or f"[EMPTY_{index}]", index)
        if first != index:
            raise InputError(
                f"{header.file}: tokens {first} and {index} are both {text!r}, each its own was expected",
                hint="take the tokenizer from the original model",
            )
    return vocabulary


def _sentencepiece(header: Header, vocabulary: dict[str, int]) -> Tokenizer:
    """Pieces joined by their scores, and bytes for what no piece has. With a space in front of the text and of what
    follows a control token, unless the file says otherwise."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    scores = header.fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, tuple) or len(scores) != len(vocabulary):
        raise InputError(
            f"{header.file}: tokenizer.ggml.scores is not one number for each of {len(vocabulary)} tokens",
            hint=COPY_AGAIN,
        )
    types = token_types_of(header) or (1,) * len(vocabulary)
    whole = {
        text for text, kind in zip(vocabulary, types, strict=True) if kind in (CONTROL, UNKNOWN, USER_DEFINED, BYTE)
    }
    merges = generate_merges(vocabulary, dict(zip(vocabulary, scores, strict=True)), skip_tokens=whole)
    unknown = _in_vocabulary(header, "unknown")
    bytes_known = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=tokens_of(header)[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=bytes_known,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.fields.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer


def _byte_level(header: Header, vocabulary: dict[str, int]) -> Tokenizer:
    """Bytes joined by the file's merges; by Llama 3's rule a word that is a token is taken as it is."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = header.fields.get("tokenizer.ggml.pre", "default")
    if pre not in list(_READ):
        raise _unknown(header, "tokenizer.ggml.pre", pre, known=tuple(_READ))
    merges = header.fields.get("tokenizer.ggml.merges")
    if not isinstance(merges, tuple) or not all(isinstance(merge, str) and merge.find(" ", 1) > 0 for merge in merges):
        raise InputError(f"{header.file}: tokenizer.ggml.merges is no list of pairs", hint=COPY_AGAIN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(merge[: merge.find(" ", 1)], merge[merge.find(" ", 1) + 1 :]) for merge in merges],
            ignore_merges=pre in (*WHOLE_WORDS, LLAMA4),
        )
    )
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _READ[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _frame(header: Header, tokenizer: Tokenizer) -> None:
    """Have the begin token put in front, and the end token behind, where the model wants them."""
    from tokenizers import processors

    fields = header.fields
    begins = fields["tokenizer.ggml.model"] == "llama" or fields.get("tokenizer.ggml.pre") in WHOLE_WORDS
    wanted = {
        kind: _in_vocabulary(header, kind)
        for kind, usual in (("bos", begins), ("eos", False))
        if fields.get(f"tokenizer.ggml.add_{kind}_token", usual)
    }
    ids = {kind: token for kind, token in wanted.items() if token is not None}
    if not ids:
        return
    texts = {kind: tokens_of(header)[token] for kind, token in ids.items()}
    parts = [texts.get("bos"), "$A", texts.get("eos")], [texts.get("bos"), "$B:1", texts.get("eos")]
    first, second = ([part for part in side if part] for side in parts)
    try:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=first, pair=[*first, *second], special_tokens=[(texts[kind], token) for kind, token in ids.items()]
        )
    except ValueError as error:
        raise InputError(f"{header.file}: the begin or end token cannot be put: {error}", hint=COPY_AGAIN) from error


def _in_vocabulary(header: Header, kind: str) -> int | None:
    token = special_token(header, kind)
    if token is not None and token >= len(tokens_of(header)):
        raise InputError(
            f"{header.file}: tokenizer.ggml.{kind}_token_id is {token}, there are {len(tokens_of(header))} tokens",
            hint=COPY_AGAIN,
        )
    return token


def _unknown(header: Header, field: str, value: object, *, known: tuple[str, ...]) -> InputError:
    return InputError(
        f"{header.file}: {field} is {value!r}; known: {', '.join(known)}",
        hint="take the model in Hugging Face layout, with its tokenizer.json",
    )
