"""tokenizer.json and what belongs to it -> the fields of a GGUF file, with the ids that it gives; the way back from
``exporter.checkpoint.gguf_tokenizer``, whose tables it reads.

llama.cpp tokenizes by its own code, which knows two kinds of vocabularies of Llamas and a list of ways to cut text.
What it would tokenize otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.checkpoint.config import read_json
from exporter.checkpoint.gguf_file import CONTROL, END_TEXTS, is_gguf
from exporter.checkpoint.gguf_tokenizer import (
    BYTE,
    LLAMA4,
    NORMAL,
    SPLITS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS,
)
from exporter.checkpoint.meta_tokenizer import LLAMA4_PATTERN
from exporter.errors import LoweringError
from exporter.spec import ModelSpec
from exporter.tokenizer import Tokenizer, open_tokenizer

NONE = {"tokenizer.ggml.model": "no_vocab"}
"""Of a file that is fed token ids alone."""

_PROBE = "a"
"""A text that every vocabulary has, and that no special token is."""


def vocabulary_of(checkpoint: Path, spec: ModelSpec, *, cache: Path) -> dict[str, Any]:
    """``read_vocabulary`` of a checkpoint; ``NONE`` of a folder that has no tokenizer, which no export begins with."""
    bare = checkpoint.is_dir() and not is_gguf(checkpoint)
    if bare and not (checkpoint / "tokenizer.json").exists() and not (checkpoint / "tokenizer.model").exists():
        return NONE
    return read_vocabulary(open_tokenizer(checkpoint, cache=cache), spec)


def read_vocabulary(tokenizer: Tokenizer, spec: ModelSpec) -> dict[str, Any]:
    """Every field under ``tokenizer.``. Raises LoweringError for a tokenizer that llama.cpp cannot be told."""
    content = read_json(tokenizer.folder / "tokenizer.json")
    model = content["model"]
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("type", "BPE") != "BPE" or odd:
        raise _refused("model", " with ".join([model.get("type", "BPE"), *odd]), known="BPE of whole tokens")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    texts, types = _tokens(content, spec)
    if any(part["type"] == "ByteLevel" for part in _parts(content.get("pre_tokenizer"))):
        kind: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _way_to_cut(content),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    else:
        if not model.get("byte_fallback"):
            raise _refused("byte_fallback", model.get("byte_fallback"), known="true, or a pre_tokenizer of ByteLevel")
        types = [BYTE if kind == NORMAL and _is_byte(text) else kind for text, kind in zip(texts, types, strict=True)]
        kind = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": _puts_space(content),
            "tokenizer.ggml.scores": _scores(merges, texts, types),
        }
    template = tokenizer.chat_template
    return {
        **kind,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        **_frame(tokenizer, spec),
        **_special_tokens(tokenizer, spec, texts, types),
        **({"tokenizer.chat_template": template} if template else {}),
    }


def remarks(fields: Mapping[str, Any]) -> list[str]:
    """What llama.cpp makes of a text otherwise than the tokenizer that the fields were made of."""
    if fields.get("tokenizer.ggml.pre") != LLAMA4:
        return []
    return [
        "llama.cpp cuts and joins text for a Llama 4 in its own way: its tokens are others than those of "
        "tokenizer.json in words with combining marks (Hindi, Thai, decomposed accents), in words with capitals "
        "beyond ASCII, and for words that are a token which no merge makes"
    ]


def _tokens(content: Mapping[str, Any], spec: ModelSpec) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding; what the tokenizer leaves free is never made, and what it has beyond
    them is text like any other."""
    texts, types = [f"[PAD{index}]" for index in range(spec.vocab_size)], [UNUSED] * spec.vocab_size
    for text, index in content["model"]["vocab"].items():
        if index < spec.vocab_size:
            texts[index], types[index] = text, NORMAL
    for token in content.get("added_tokens", []):
        if token["id"] >= spec.vocab_size:
            continue
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise _refused(f"{flag} of {token['content']!r}", True, known="false")
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    unknown = content["model"].get("unk_token")
    return texts, [UNKNOWN if text == unknown else kind for text, kind in zip(texts, types, strict=True)]


def _way_to_cut(content: Mapping[str, Any]) -> str:
    """``tokenizer.ggml.pre``"""
    if content.get("normalizer") is not None:
        raise _refused("normalizer", content["normalizer"]["type"], known="none before ByteLevel")
    patterns = tuple(_patterns(_parts(content.get("pre_tokenizer"))))
    whole = bool(content["model"].get("ignore_merges"))
    if patterns == (LLAMA4_PATTERN,):
        return LLAMA4  # though llama.cpp's own differs, there is none that does not: see ``remarks``
    # The first of several names for the same is the usual one. What matches no pattern stays together in any case.
    for name, known in SPLITS.items():
        if patterns == known and whole == (name in WHOLE_WORDS):
            return name
    shown = " and ".join(patterns)
    raise _refused(
        "pre_tokenizer", f"{shown}, ignore_merges {whole}", known=f"those of llama.cpp's {', '.join(SPLITS)}"
    )


def _patterns(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for part in parts:
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                yield pattern
            case {"type": "Digits", "individual_digits": True}:
                yield SPLITS["smollm"][0]
            case {"type": "ByteLevel", "add_prefix_space": False}:
                if part.get("use_regex", True):
                    yield SPLITS["gpt-2"][0]
            case _:
                raise _refused("pre_tokenizer", dict(part), known="Split, Digits and ByteLevel")


def _puts_space(content: Mapping[str, Any]) -> bool:
    """``tokenizer.ggml.add_space_prefix``: llama.cpp puts a space in front of a text, and behind each control token."""
    before = [part["type"] for part in _parts(content.get("pre_tokenizer"))]
    changes = [(part["type"], part.get("prepend", part.get("content"))) for part in _parts(content.get("normalizer"))]
    match changes:
        case [("Prepend", "\u2581"), ("Replace", "\u2581")] if not before:
            return True
        case [("Replace", "\u2581")] if not before:
            return False
        case [] if before == ["Metaspace"]:
            (metaspace,) = _parts(content.get("pre_tokenizer"))
            if metaspace["prepend_scheme"] == "never" and not metaspace.get("split", True):
                return False
    raise _refused(
        "the place of spaces",
        [*changes, *_parts(content.get("pre_tokenizer"))],
        known="Prepend and Replace, which put one in front of every piece of text",
    )


def _scores(merges: Sequence[tuple[str, ...]], texts: Sequence[str], types: Sequence[int]) -> list[float]:
    """llama.cpp joins neighbours to the token of the highest score, whichever they are; so the merges must come by the
    token that they make, and must be all that there are. Raises LoweringError otherwise."""
    ranks: dict[str, int] = {}
    listed: dict[str, set[tuple[str, ...]]] = {}
    previous = None
    for merge in merges:
        made = "".join(merge)
        if made != previous and made in ranks:
            raise _refused("merges", f"{made!r} in two places", known="those of one token together")
        ranks.setdefault(made, len(ranks))
        listed.setdefault(made, set()).add(merge)
        previous = made
    can_be = {text for text in texts if len(text) == 1} | ranks.keys()
    for text, kind in zip(texts, types, strict=True):
        if len(text) < 2 or kind == UNUSED:
            continue
        possible = {(text[:cut], text[cut:]) for cut in range(1, len(text))}
        unlisted = {pair for pair in possible if pair[0] in can_be and pair[1] in can_be} - listed.get(text, set())
        if unlisted:
            raise _refused("merges", f"none of {' and '.join(min(unlisted))}", known="every pair that makes a token")
    lowest = -float(len(ranks))
    return [
        0.0 if kind in (CONTROL, UNKNOWN, BYTE) else -float(ranks[text]) if text in ranks else lowest
        for text, kind in zip(texts, types, strict=True)
    ]


def _frame(tokenizer: Tokenizer, spec: ModelSpec) -> dict[str, Any]:
    """What goes around a text, seen on one; the begin token is the tokenizer's own, whatever the model says."""
    plain, framed = tokenizer.encode_rendered(_PROBE), tokenizer.encode(_PROBE)
    places = [place for place in range(len(framed)) if framed[place : place + len(plain)] == plain]
    begin, end = (framed[: places[0]], framed[places[0] + len(plain) :]) if places else (framed, [])
    if len(begin) > 1 or end not in ([], [*spec.eos_token_ids[:1]]):
        raise _refused("post_processor", f"{framed} of {plain}", known="a begin token, and the model's end token")
    bos = begin[0] if begin else spec.bos_token_id
    return {
        **({} if bos is None else {"tokenizer.ggml.bos_token_id": bos}),
        "tokenizer.ggml.add_bos_token": bool(begin),
        "tokenizer.ggml.add_eos_token": bool(end),
    }


def _special_tokens(
    tokenizer: Tokenizer, spec: ModelSpec, texts: Sequence[str], types: Sequence[int]
) -> dict[str, int]:
    """Ids by kind. llama.cpp has a field for three tokens that end an answer, and knows others by their text."""
    stops = spec.eos_token_ids
    named = dict(zip(("eos", "eot", "eom"), stops, strict=False))
    for stop in stops[len(named) :]:
        if types[stop] != CONTROL or texts[stop] not in END_TEXTS:
            raise _refused("tokens that end an answer", stops, known="three, and those known by their text")
    found: dict[str, int | None] = {**named, **tokenizer.named_ids}
    return {f"tokenizer.ggml.{kind}_token_id": token for kind, token in found.items() if token is not None}


def _parts(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre_tokenizer, which may be a sequence of them."""
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    return [part for one in inner for part in _parts(one)] if step["type"] == "Sequence" and inner else [step]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _refused(what: str, found: object, *, known: str) -> LoweringError:
    return LoweringError(
        f"llama.cpp cannot be told this tokenizer: {what} is {found}; known: {known}",
        hint="take the tokenizer.json that the model was released with, or another --target",
    )
