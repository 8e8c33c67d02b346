"""The tokenizer in a GGUF file: llama.cpp gives the ids that tokenizer.json gives, or the file is not written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint, read_spec
from exporter.checkpoint.gguf_file import read_header
from exporter.errors import LoweringError
from exporter.model.trace import trace
from exporter.spec import ModelSpec
from exporter.tokenizer import Tokenizer, open_tokenizer
from targets import load
from targets.gguf.llamacpp import Model
from targets.gguf.lower import write_model
from targets.gguf.vocabulary import read_vocabulary, remarks, vocabulary_of
from tests.conftest import Toy, write_toy
from tests.exporter.test_gguf_tokenizer import (  # noqa: F401
    EVALUATION,
    NASTY,
    WORDS4,
    llama2_fields,
    llama4_fields,
    pieces,
    ranks4,
    write_gguf,
)

TARGET = load("gguf")
needs_llama_cpp = pytest.mark.skipif(TARGET.cannot_execute() is not None, reason=str(TARGET.cannot_execute()))
SPELLED = [
    *("<|eot_id|> inside <|begin_of_text|>x", "<|begin_of_text|><|begin_of_text|>", "<|eot_id|>", "a<|eot_id|> b"),
    *("<|start_header_id|>user<|end_header_id|>\n\n hi <|eot_id|>", "<|reserved|>", "<|eot_id", "<s> x </s>", "<unk>"),
]


def write(folder: Path, tokenizer: Path, **config: Any) -> tuple[Path, Tokenizer]:
    """A GGUF file of a toy with that tokenizer, and the tokenizer."""
    toy = write_toy(folder / "toy", **config)
    for file in tokenizer.glob("*token*"):
        shutil.copyfile(file, toy.folder / file.name)
    checkpoint = open_checkpoint(toy.folder)
    vocabulary = vocabulary_of(toy.folder, checkpoint.spec, cache=folder)
    write_model(trace(checkpoint.spec), checkpoint, folder / "toy.gguf", scheme=None, vocabulary=vocabulary)
    return folder / "toy.gguf", Tokenizer(toy.folder)


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    special = {"bos_token_id": 2040, "eos_token_id": [2041, 2044]}
    return write(tmp_path_factory.mktemp("llama3"), BUNDLED_MODEL, vocab_size=2050, **special)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory, pieces: Any) -> tuple[Path, Tokenizer, Any]:  # noqa: F811
    """Of the pieces of SentencePiece, by way of the tokenizer.json that a GGUF file of llama.cpp's converter gives."""
    folder = tmp_path_factory.mktemp("llama2")
    theirs = write_gguf(folder / "theirs.gguf", write_toy(folder / "any"), fields=llama2_fields(pieces))
    tokenizer = open_tokenizer(theirs, cache=folder / "cache")
    file, read = write(folder, tokenizer.folder, vocab_size=pieces.get_piece_size(), bos_token_id=1, eos_token_id=2)
    return file, read, pieces


@pytest.fixture(scope="module")
def loaded3(llama3: tuple[Path, Tokenizer]) -> Iterator[Model]:
    model = Model(llama3[0])
    yield model
    model.close()


@pytest.fixture(scope="module")
def loaded2(llama2: tuple[Path, Tokenizer, Any]) -> Iterator[Model]:
    model = Model(llama2[0])
    yield model
    model.close()


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.parametrize("text", [*NASTY, *SPELLED, EVALUATION])
def test_llama_cpp_gives_llama3s_ids(text: str, llama3: tuple[Path, Tokenizer], loaded3: Model) -> None:
    assert loaded3.tokenize(text, begin=True) == llama3[1].encode(text)
    assert loaded3.tokenize(text, begin=False) == llama3[1].encode_rendered(text)


@needs_llama_cpp
@pytest.mark.toolchain
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_llama_cpp_gives_llama3s_ids_for_any_text(text: str, llama3: tuple[Path, Tokenizer], loaded3: Model) -> None:
    assert loaded3.tokenize(text, begin=True) == llama3[1].encode(text)


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.parametrize("text", [*NASTY, *SPELLED, EVALUATION])
def test_llama_cpp_gives_llama2s_ids(text: str, llama2: tuple[Path, Tokenizer, Any], loaded2: Model) -> None:
    _, tokenizer, original = llama2
    ids = loaded2.tokenize(text, begin=True)
    assert ids == tokenizer.encode(text)
    if text and "<" not in text:
        assert ids == [1, *original.encode(text)]


@needs_llama_cpp
@pytest.mark.toolchain
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_llama_cpp_gives_llama2s_ids_for_any_text(
    text: str, llama2: tuple[Path, Tokenizer, Any], loaded2: Model
) -> None:
    assert loaded2.tokenize(text, begin=True) == llama2[1].encode(text)


@needs_llama_cpp
@pytest.mark.toolchain
def test_llama_cpp_ends_an_answer_where_the_model_does(llama3: tuple[Path, Tokenizer], loaded3: Model) -> None:
    assert [token for token in range(2050) if loaded3.ends(token)] == [2041, 2044]


def test_the_chat_template_and_the_ids_come_back(llama3: tuple[Path, Tokenizer], tmp_path: Path) -> None:
    file, tokenizer = llama3
    again = open_tokenizer(file, cache=tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.chat(" Hello  there ") == tokenizer.chat(" Hello  there ")
    spec = read_spec(file)
    assert (spec.bos_token_id, spec.eos_token_ids) == (2040, (2041, 2044))
    for text in (*NASTY, *SPELLED):
        assert again.encode(text) == tokenizer.encode(text)


def test_rows_of_the_embedding_without_a_token_are_unused(llama3: tuple[Path, Tokenizer]) -> None:
    fields = read_header(llama3[0]).fields
    assert fields["tokenizer.ggml.tokens"][2048:] == ("[PAD2048]", "[PAD2049]")
    assert fields["tokenizer.ggml.token_type"][2038:2050] == (1, 1, *[3] * 8, 5, 5)


def spec_of(toy: Toy) -> ModelSpec:
    return open_checkpoint(toy.folder).spec


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    folder.mkdir()
    for file in BUNDLED_MODEL.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer(folder)


def _other_pattern(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,2}|\s+"


def _normalized(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFC"}


def _stripping(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["lstrip"] = True


def _metaspace(content: dict[str, Any]) -> None:
    content["model"]["byte_fallback"] = True
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    content["model"]["merges"] = []


def _unigram(content: dict[str, Any]) -> None:
    content["model"] |= {"type": "Unigram", "merges": []}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_other_pattern, r"pre_tokenizer is .*known: those of llama.cpp's llama-bpe"),
        (_normalized, "normalizer is NFC; known: none before ByteLevel"),
        (_stripping, r"lstrip of '<\|begin_of_text\|>' is True; known: false"),
        (_metaspace, "the place of spaces is"),
        (_unigram, "model is Unigram; known: BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_be_told_is_refused(
    change: Callable[[dict[str, Any]], None], says: str, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    special = {"bos_token_id": 2040, "eos_token_id": 2044}
    spec = spec_of(make_toy(vocab_size=2048, **special))
    with pytest.raises(LoweringError, match=says):
        read_vocabulary(edited(tmp_path / "other", change), spec)


def test_stop_tokens_beyond_three_must_be_known_by_their_text(make_toy: Callable[..., Toy]) -> None:
    """Tokens 2042 and 2043 begin and end a header."""
    told = spec_of(make_toy(vocab_size=2048, bos_token_id=2040, eos_token_id=[2042, 2043, 2041, 2044]))
    fields = read_vocabulary(Tokenizer(BUNDLED_MODEL), told)
    named = [fields[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "eot", "eom")]
    assert named == [2040, 2042, 2043, 2041]
    lost = spec_of(make_toy(vocab_size=2048, bos_token_id=2040, eos_token_id=[2041, 2044, 2042, 2043]))
    with pytest.raises(LoweringError, match=r"tokens that end an answer is \(2041, 2044, 2042, 2043\)"):
        read_vocabulary(Tokenizer(BUNDLED_MODEL), lost)


def test_words_that_are_merged_in_any_case_are_told_by_another_name(
    make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    """llama.cpp's ``smaug-bpe`` cuts as Llama 3 does and merges what is a token already."""
    spec = spec_of(make_toy(vocab_size=2048, bos_token_id=2040, eos_token_id=2044))
    merging = edited(tmp_path / "merging", lambda content: content["model"].update(ignore_merges=False))
    assert read_vocabulary(merging, spec)["tokenizer.ggml.pre"] == "smaug-bpe"
    assert read_vocabulary(Tokenizer(BUNDLED_MODEL), spec)["tokenizer.ggml.pre"] == "llama-bpe"


def test_merges_that_no_scores_can_tell_are_refused(
    llama2: tuple[Path, Tokenizer, Any], make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    """One pair too few, and the pairs of a token in two places: llama.cpp would join what tokenizer.json does not."""
    _, tokenizer, original = llama2
    spec = spec_of(make_toy(vocab_size=original.get_piece_size()))
    content = json.loads((tokenizer.folder / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    several = next(index for index in range(1, len(merges)) if "".join(merges[index]) == "".join(merges[index - 1]))
    fewer = merges[: several - 1] + merges[several:]
    apart = [*merges[:several], *merges[several + 1 :], merges[several]]
    for name, changed, says in (("fewer", fewer, "merges is none of"), ("apart", apart, "in two places")):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(tokenizer.folder / "tokenizer_config.json", folder / "tokenizer_config.json")
        content["model"]["merges"] = changed
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(LoweringError, match=says):
            read_vocabulary(Tokenizer(folder), spec)


# --- Llama 4 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory, ranks4: dict[bytes, int]) -> tuple[Path, Tokenizer]:  # noqa: F811
    """By way of the tokenizer.json that a file of llama.cpp's converter gives."""
    folder = tmp_path_factory.mktemp("llama4")
    theirs = write_gguf(folder / "theirs.gguf", write_toy(folder / "any"), fields=llama4_fields(ranks4))
    tokenizer = open_tokenizer(theirs, cache=folder / "cache")
    special = {"bos_token_id": len(ranks4), "eos_token_id": len(ranks4) + 1}
    return write(folder, tokenizer.folder, vocab_size=len(ranks4) + 2, **special)


@pytest.fixture(scope="module")
def loaded4(llama4: tuple[Path, Tokenizer]) -> Iterator[Model]:
    model = Model(llama4[0])
    yield model
    model.close()


OTHERWISE = ("e\u0301 n\u0303 o\u0308", *WORDS4[-3:])
"""Marks, capitals beyond ASCII, and a token that no merge makes."""


@needs_llama_cpp
@pytest.mark.toolchain
@pytest.mark.parametrize("text", WORDS4)
def test_llama_cpp_gives_llama4s_ids_but_for_what_the_file_is_remarked_for(
    text: str, llama4: tuple[Path, Tokenizer], loaded4: Model
) -> None:
    assert (loaded4.tokenize(text, begin=True) == llama4[1].encode(text)) == (text not in OTHERWISE)


@needs_llama_cpp
@pytest.mark.toolchain
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(max_codepoint=127, exclude_characters="\0")))
def test_llama_cpp_gives_llama4s_ids_for_ascii(text: str, llama4: tuple[Path, Tokenizer], loaded4: Model) -> None:
    if "zzqzz" not in text:
        assert loaded4.tokenize(text, begin=True) == llama4[1].encode(text)


def test_of_llama4_the_output_tells_what_llama_cpp_cuts_otherwise(
    llama3: tuple[Path, Tokenizer], llama4: tuple[Path, Tokenizer]
) -> None:
    fields = read_header(llama4[0]).fields
    assert fields["tokenizer.ggml.pre"] == "llama4"
    (remark,) = remarks(fields)
    assert "words with combining marks (Hindi, Thai, decomposed accents)" in remark
    assert remarks(read_header(llama3[0]).fields) == []
