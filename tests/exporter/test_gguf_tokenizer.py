"""Vocabularies of GGUF files give the ids of the tokenizers that they come from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from transformers.convert_slow_tokenizer import bytes_to_unicode

from exporter.checkpoint import BUNDLED_MODEL
from exporter.checkpoint.gguf_tokenizer import write_tokenizer
from exporter.errors import InputError
from exporter.tokenizer import Tokenizer, open_tokenizer
from tests.conftest import Toy, write_toy
from tests.exporter.test_gguf import write_gguf

NASTY = [
    *("", "a", " a", "a ", "  two  spaces  ", " " * 70, "\t\ttab\n\nnew\r\nline ", " \n ", "1234567890 12 1,234.56"),
    *("🙂👩‍👩‍👧‍👦🇩🇪", "日本語のテキスト 中文", "שלום עולם مرحبا", "e\u0301 n\u0303 o\u0308", "é ñ ö"),
    *("It's WE'LL i'm", "\u2581 \u00a0nbsp\u200b", "\x01\x7f", "foo_bar(baz[1:2])!!! --->", "Ⅷ ½ ٣٤٥", "\ufeffmark"),
]

EVALUATION = (BUNDLED_MODEL / "evaluation.txt").read_text(encoding="utf-8")[:5000].replace("<unk>", "unknown")


def llama3_fields() -> dict[str, Any]:
    """The bundled model's tokenizer as llama.cpp's converter writes it (``TextModel._set_vocab_gpt2``)."""
    content = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    config = json.loads((BUNDLED_MODEL / "tokenizer_config.json").read_text())
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    texts = {index: text for text, index in content["model"]["vocab"].items()} | added
    ids = {text: index for index, text in added.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [texts[index] for index in range(len(texts))],
        "tokenizer.ggml.token_type": [3 if index in added else 1 for index in range(len(texts))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": ids[config["bos_token"]],
        "tokenizer.ggml.eos_token_id": ids[config["eos_token"]],
        "tokenizer.ggml.padding_token_id": ids[config["pad_token"]],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": config["chat_template"],
        "llama.vocab_size": len(texts),
    }


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return write_toy(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture(scope="module")
def llama3(toy: Toy) -> Tokenizer:
    file = write_gguf(toy.folder.with_name("llama3.gguf"), toy, fields=llama3_fields())
    return open_tokenizer(file, cache=file.parent / "cache")


@pytest.mark.parametrize("text", [*NASTY, "<|eot_id|> inside <|begin_of_text|>x"])
def test_llama3s_words_have_the_original_ids(text: str, llama3: Tokenizer) -> None:
    original = Tokenizer(BUNDLED_MODEL)
    ids = llama3.encode(text)
    assert ids == original.encode(text)
    assert llama3.decode(ids) == original.decode(ids)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_has_the_original_ids(text: str, llama3: Tokenizer) -> None:
    assert llama3.encode(text) == Tokenizer(BUNDLED_MODEL).encode(text)


def test_chats_and_special_tokens_are_the_originals(llama3: Tokenizer) -> None:
    original = Tokenizer(BUNDLED_MODEL)
    assert llama3.chat(" Hello  there ") == original.chat(" Hello  there ")
    assert llama3.special_ids == original.special_ids
    generation = json.loads((llama3.folder / "generation_config.json").read_text())
    expected = json.loads((BUNDLED_MODEL / "generation_config.json").read_text())
    assert generation["bos_token_id"] == expected["bos_token_id"]
    assert sorted(generation["eos_token_id"]) == sorted(expected["eos_token_id"])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SentencePiece processor trained as Llama 2's was: BPE, bytes for the rest, no normalization."""
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("pieces") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(BUNDLED_MODEL / "calibration.txt"),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def llama2_fields(pieces: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes it (``TextModel._create_vocab_sentencepiece``)."""
    count = pieces.get_piece_size()
    kinds = [
        2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
        for i in range(count)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [pieces.get_score(i) for i in range(count)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.unknown_token_id": pieces.unk_id(),
        "llama.vocab_size": count,
    }


@pytest.mark.parametrize("text", [*NASTY, EVALUATION])
def test_sentencepieces_have_the_ids_of_sentencepiece(text: str, pieces: Any, toy: Toy) -> None:
    file = toy.folder.with_name("llama2.gguf")
    if not file.exists():
        write_gguf(file, toy, fields=llama2_fields(pieces))
    tokenizer = open_tokenizer(file, cache=file.parent / "cache")
    ids = tokenizer.encode(text)
    assert ids == [1, *pieces.encode(text)]
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_the_text_of_a_special_token_is_that_token(pieces: Any, toy: Toy, tmp_path: Path) -> None:
    """As llama.cpp takes it, with ``parse_special``; in tokenizer.json alone too, which apps read."""
    write_tokenizer(write_gguf(tmp_path / "toy.gguf", toy, fields=llama2_fields(pieces)), tmp_path / "made")
    library = Library.from_file(str(tmp_path / "made" / "tokenizer.json"))
    for text, token in (("<unk>", 0), ("<s>", 1), ("</s>", 2)):
        assert library.encode(text).ids == Tokenizer(tmp_path / "made").encode(text) == [1, token]


def test_what_the_file_says_of_begin_end_and_space_is_done(pieces: Any, toy: Toy, tmp_path: Path) -> None:
    said = {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False}
    fields = {**llama2_fields(pieces), **{f"tokenizer.ggml.{name}": value for name, value in said.items()}}
    write_tokenizer(write_gguf(tmp_path / "toy.gguf", toy, fields=fields), tmp_path / "made")
    tokenizer = Tokenizer(tmp_path / "made")
    plain = pieces.encode(" the people")
    assert pieces.id_to_piece(plain[0]).startswith("\u2581")
    ids = tokenizer.encode("\u2581the people")
    assert ids[-1] == 2
    assert ids[0] != 1
    assert tokenizer.decode(ids) == " the people"
    assert tokenizer.encode("the")[0] != tokenizer.encode(" the")[0]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("default", ["a", "Ġb", "123", "4", ".$!", "ĠĠ", "Ġc", "Ġ", "$", "5"]),
        ("gpt-2", ["a", "Ġb", "1234", ".$!", "ĠĠ", "Ġc", "Ġ$", "5"]),
        ("smollm", ["a", "Ġb", "1", "2", "3", "4", ".$!", "ĠĠ", "Ġc", "Ġ$", "5"]),
    ],
)
def test_other_patterns_cut_as_llama_cpp_does(pre: str, expected: list[str], toy: Toy, tmp_path: Path) -> None:
    """By hand from the patterns in ``llama-vocab.cpp``."""
    fields = {**llama3_fields(), "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": None}
    write_tokenizer(write_gguf(tmp_path / "toy.gguf", toy, fields=fields), tmp_path / "made")
    cut = Library.from_file(str(tmp_path / "made" / "tokenizer.json")).pre_tokenizer.pre_tokenize_str(
        "a b1234.$!   c $5"
    )
    assert [text for text, _ in cut] == expected
    assert Tokenizer(tmp_path / "made").encode("") == []


PATTERN4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""meta-llama/llama-models, models/llama4/tokenizer.py, ``O200K_PATTERN``."""
WORDS4 = [
    *(*NASTY, "The nATion's naïve /usr/bin\n/x DON'T", "été ÉTÉ ÜBER жжЖжЖ ßx", "हिन्दी ไทย e\u0301A", "zzqzz zzqz"),
]
"""Where case of letters beyond ASCII and marks decide; and a token that comes of no merge."""


@pytest.fixture(scope="module")
def ranks4() -> dict[bytes, int]:
    """Every byte, pairs and triples of some, and one word that no two of them make."""
    letters = [letter.encode() for letter in " aeinorstTNÉéü'\u0301жЖहि"]
    words = dict.fromkeys(b"".join(word) for count in (2, 3) for word in itertools.product(letters, repeat=count))
    parts = [letter[:cut] for letter in letters for cut in range(2, len(letter) + 1)]
    tokens = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *parts, *words, b"zzqzz"])
    return {token: rank for rank, token in enumerate(tokens)}


def llama4_fields(ranks: dict[bytes, int]) -> dict[str, Any]:
    """A vocabulary of tiktoken as llama.cpp's converter writes it, its pairs in the order of what they make."""
    letters = bytes_to_unicode()
    texts = ["".join(map(letters.__getitem__, token)) for token in ranks]
    merges = [
        f"{''.join(map(letters.__getitem__, token[:cut]))} {''.join(map(letters.__getitem__, token[cut:]))}"
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama4",
        "tokenizer.ggml.tokens": [*texts, "<|begin_of_text|>", "<|eot|>"],
        "tokenizer.ggml.token_type": [*[1] * len(texts), 3, 3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(texts),
        "tokenizer.ggml.eos_token_id": len(texts) + 1,
        "tokenizer.ggml.add_bos_token": True,
        "llama.vocab_size": len(texts) + 2,
    }


def test_llama4s_words_have_tiktokens_ids(ranks4: dict[bytes, int], toy: Toy, tmp_path: Path) -> None:
    import tiktoken

    special = {"<|begin_of_text|>": len(ranks4), "<|eot|>": len(ranks4) + 1}
    original = tiktoken.Encoding("llama4", pat_str=PATTERN4, mergeable_ranks=ranks4, special_tokens=special)
    file = write_gguf(tmp_path / "toy.gguf", toy, fields=llama4_fields(ranks4))
    tokenizer = open_tokenizer(file, cache=tmp_path / "cache")
    for text in WORDS4:
        assert tokenizer.encode(text) == [len(ranks4), *original.encode(text)], text
        assert tokenizer.decode(tokenizer.encode_rendered(text)) == text
    assert ranks4[b"zzqzz"] in tokenizer.encode("zzqzz")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; known: llama, gpt2"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'; known: llama-bpe"),
        ({"merges": None}, "merges is no list of pairs"),
        ({"merges": ["Ġt"]}, "merges is no list of pairs"),
        ({"merges": ["Ġ nowhere"]}, "the vocabulary cannot be read"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "tokens 0 and 2 are both 'a'"),
        ({"model": "llama"}, "scores is not one number for each of"),
        ({"bos_token_id": 5000}, r"bos_token_id is 5000, there are \d+ tokens"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
    ],
)
def test_a_vocabulary_that_cannot_be_honoured_is_refused(
    change: dict[str, Any], says: str, toy: Toy, tmp_path: Path
) -> None:
    fields = {**llama3_fields(), **{f"tokenizer.ggml.{name}": value for name, value in change.items()}}
    file = write_gguf(tmp_path / "toy.gguf", toy, fields=fields)
    with pytest.raises(InputError, match=says):
        write_tokenizer(file, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf"]


def test_a_folder_in_hugging_face_layout_is_opened_as_it_is(tmp_path: Path, make_toy: Callable[..., Toy]) -> None:
    assert open_tokenizer(BUNDLED_MODEL, cache=tmp_path).folder == BUNDLED_MODEL
    assert not any(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"has no tokenizer.json"):
        open_tokenizer(make_toy().folder, cache=tmp_path)
