"""Corpora of every kind: what the windows hold, what is held apart, and what is said about a file that is none."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from calibration.corpus import Corpus, overlap, read_corpus
from calibration.pieces import read_pieces
from exporter.checkpoint import BUNDLED_MODEL
from exporter.checkpoint.config import read_spec
from exporter.errors import InputError
from exporter.spec import ModelSpec
from exporter.tokenizer import Tokenizer

SPEC = read_spec(BUNDLED_MODEL)
BEGIN = 2040
"""``<|begin_of_text|>`` in the sample's tokenizer.json"""
PIECE = 512
"""Ids of a token file that are sampled as one."""
COUNTING = replace(SPEC, vocab_size=1_000_000, bos_token_id=0)
"""A model of so many tokens that a corpus can be 1, 2, 3, ...: then each id tells where it stood."""

tokenizer = Tokenizer(BUNDLED_MODEL)
fuzz = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path | str, *, spec: ModelSpec = SPEC, using: Tokenizer = tokenizer, **changes: Any) -> Corpus:
    defaults: dict[str, Any] = {"windows": 4, "window_length": 32, "seed": 0, "column": None, "held_out_tokens": 64}
    return read_corpus(path, using, spec=spec, **{**defaults, **changes})  # type: ignore[arg-type]


def write_counting(folder: Path, count: int) -> Path:
    path = folder / f"{count}.npy"
    np.save(path, np.arange(1, count + 1, dtype=np.int32))
    return path


def sentences(count: int, *, seed: int = 0, words: int = 40) -> list[str]:
    vocabulary = (BUNDLED_MODEL / "evaluation.txt").read_text(encoding="utf-8").split()
    chosen = np.random.default_rng(seed).choice(vocabulary, size=(count, words))
    return [" ".join(row) for row in chosen]


def write_lines(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


def write_csv(path: Path, **columns: Sequence[object]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


# What the windows hold


@fuzz
@given(seed=st.integers(0, 2**40), length=st.integers(2, 700))
def test_windows_and_held_out_text_are_runs_of_the_source_and_nothing_is_used_twice(
    tmp_path: Path, seed: int, length: int
) -> None:
    count = 20 * PIECE
    path = write_counting(tmp_path, count)
    corpus = read(path, spec=COUNTING, seed=seed, windows=5, window_length=length, held_out_tokens=1000)
    assert (corpus.windows[:, 0] == 0).all()
    calibrated = corpus.windows[:, 1:].flatten().tolist()
    used = [*calibrated, *corpus.held_out]
    assert len(set(used)) == len(used) == 5 * (length - 1) + 1000
    assert set(used) <= set(range(1, count + 1))
    for ids in (calibrated, corpus.held_out):
        jumps = [(a, b) for a, b in pairwise(ids) if b != a + 1]
        assert all(a % PIECE == 0 and b % PIECE == 1 for a, b in jumps)  # only from one piece to another
    pieces = [{(token - 1) // PIECE for token in ids} for ids in (calibrated, corpus.held_out)]
    assert not pieces[0] & pieces[1]


@fuzz
@given(seeds=st.lists(st.integers(0, 2**40), min_size=2, max_size=2, unique=True))
def test_a_seed_decides_the_windows(tmp_path: Path, seeds: list[int]) -> None:
    path = write_counting(tmp_path, 200 * PIECE)
    first, again, other = (
        read(path, spec=COUNTING, seed=seed, windows=20, window_length=PIECE) for seed in (seeds[0], *seeds)
    )
    assert torch.equal(first.windows, again.windows)
    assert (first.sha256, first.held_out, first.seed) == (again.sha256, again.held_out, seeds[0])
    assert first.sha256 != other.sha256


def test_every_piece_is_as_likely_as_another(tmp_path: Path) -> None:
    """Chi-squared over 400 seeds: 39 degrees of freedom, so 39 is expected and 90 would be six deviations off."""
    path = write_counting(tmp_path, 40 * PIECE)
    chosen = Counter(
        int(read(path, spec=COUNTING, seed=seed, windows=1, window_length=PIECE + 1, held_out_tokens=0).windows[0, 1])
        for seed in range(400)
    )
    assert set(chosen) == {1 + PIECE * index for index in range(40)}
    assert sum((count - 10) ** 2 / 10 for count in chosen.values()) < 90


def test_a_long_corpus_is_sampled_from_end_to_end(tmp_path: Path) -> None:
    """Far more pieces than are kept; of 64 windows some must lie in each quarter (chance of a miss: 4e-8)."""
    count = 2000 * PIECE
    corpus = read(
        write_counting(tmp_path, count), spec=replace(COUNTING, vocab_size=2_000_000), windows=64, window_length=513
    )
    assert set((corpus.windows[:, 1:].flatten() * 4 // (count + 1)).tolist()) == {0, 1, 2, 3}


def test_without_a_begin_token_windows_hold_text_alone(tmp_path: Path) -> None:
    path = write_counting(tmp_path, PIECE)
    corpus = read(path, spec=replace(COUNTING, bos_token_id=None), windows=2, window_length=8, held_out_tokens=0)
    assert corpus.windows.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]]
    assert corpus.tokens == 16


def test_begin_tokens_in_the_source_are_not_counted_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, np.array([[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]))
    corpus = read(path, spec=COUNTING, windows=2, window_length=4, held_out_tokens=3)
    rows = [*corpus.windows.tolist(), [0, *corpus.held_out]]
    assert sorted(rows) == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7, 8, 9]]


def test_windows_of_one_text_are_that_text(tmp_path: Path) -> None:
    text = "\n".join(sentences(8))[:2000]
    (tmp_path / "short.txt").write_text(text, encoding="utf-8")
    corpus = read(tmp_path / "short.txt", windows=5, window_length=64)
    assert corpus.windows[:, 0].tolist() == [BEGIN] * 5
    assert text.startswith(tokenizer.decode(corpus.windows[:, 1:].flatten().tolist()))
    assert corpus.source == "short.txt"


def test_the_digest_is_of_ids_and_shape_alone(tmp_path: Path) -> None:
    ids = torch.arange(12)
    square, wide = (
        Corpus(windows=ids.view(shape), held_out=(), source=source, seed=seed)
        for shape, source, seed in (((3, 4), "a", 1), ((2, 6), "a", 1))
    )
    renamed = Corpus(windows=ids.view(3, 4), held_out=(1,), source="b", seed=2)
    changed = Corpus(windows=(ids + (ids == 11)).view(3, 4), held_out=(), source="a", seed=1)
    assert square.sha256 == renamed.sha256
    assert len({square.sha256, wide.sha256, changed.sha256}) == 3
    assert re.fullmatch("[0-9a-f]{64}", square.sha256)


@pytest.mark.parametrize("windows", [torch.zeros(0, 4, dtype=torch.int64), torch.zeros(4, 4), torch.zeros(4).long()])
def test_windows_that_are_none_make_no_corpus(windows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"windows are .*, int64 \[W, T\] was expected"):
        Corpus(windows=windows, held_out=(), source="a", seed=0)


# Sources


def test_the_same_documents_give_the_same_windows_in_every_format(tmp_path: Path) -> None:
    import pyarrow as pa

    texts = [*sentences(40), 'with "quotes", commas\nand lines', "größer 字"]
    paths = [
        write_lines(tmp_path / "a.jsonl", ({"text": text} for text in texts)),
        write_lines(tmp_path / "b.json", ({"id": 1, "text": text} for text in texts)),
        write_lines(tmp_path / "c.JSONL", ({"body": text, "text": "no"} for text in texts)),
        write_parquet(tmp_path / "d.parquet", id=range(len(texts)), text=texts),
        write_parquet(tmp_path / "e.parquet", id=range(len(texts)), body=pa.array(texts, pa.large_string())),
        write_parquet(tmp_path / "f.parquet", body=[*texts, None], text=["no"] * (len(texts) + 1)),
        write_csv(tmp_path / "g.csv", id=range(len(texts)), text=texts),
        write_csv(tmp_path / "h.csv", id=range(len(texts)), body=texts),
    ]
    columns = {"c.JSONL": "body", "f.parquet": "body"}
    corpora = [read(path, column=columns.get(path.name)) for path in paths]
    assert len({(corpus.sha256, corpus.held_out) for corpus in corpora}) == 1


def test_a_column_of_a_csv_that_looks_like_numbers_is_the_text_that_stands_there(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", code=["007", "1e3", ""], text=["no"] * 3)
    assert [piece.content for piece in read_pieces(path, "code")] == ["007", "1e3"]


def test_token_ids_give_the_same_windows_in_every_format(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 2000, size=3000)
    for name, dtype in (("a", np.int64), ("b", np.int32), ("c", np.uint16)):
        np.save(tmp_path / f"{name}.npy", ids.astype(dtype))
    save_file({"whatever": ids.astype(np.int32)}, tmp_path / "d.safetensors")
    save_file({"ids": ids, "mask": np.ones(3)}, tmp_path / "e.safetensors")
    assert len({read(path).sha256 for path in sorted(tmp_path.iterdir())}) == 1
    np.save(tmp_path / "rows.npy", ids.reshape(3, 1000))
    save_file({"ids": ids.reshape(3, 1000)}, tmp_path / "rows.safetensors")
    assert read(tmp_path / "rows.npy").sha256 == read(tmp_path / "rows.safetensors").sha256


def test_a_folder_is_read_whole_but_for_hidden_and_other_files(tmp_path: Path) -> None:
    texts = sentences(40)
    whole = write_lines(tmp_path / "whole.jsonl", ({"text": text} for text in texts))
    folder = tmp_path / "corpus"
    for name, part in (("b/x.jsonl", texts[:10]), ("a.jsonl", texts[10:25]), ("b/c/d.jsonl", texts[25:])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, ({"text": text} for text in part))
    for name in (".hidden.txt", ".git/note.txt", "picture.png", "b/LICENSE"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("none of this", encoding="utf-8")
    (folder / "empty.txt").touch()
    assert sorted(str(piece.content) for piece in read_pieces(folder, None)) == sorted(texts)
    corpus = read(folder)
    assert corpus.source == "corpus"
    assert (corpus.sha256, corpus.held_out) == (read(whole).sha256, read(whole).held_out)


def test_stdin_is_read_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(sentences(60))
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    corpus = read("-")
    assert corpus.source == "stdin"
    assert corpus.sha256 == read(tmp_path / "a.md").sha256


def test_line_ends_and_byte_order_marks_make_no_difference(tmp_path: Path) -> None:
    text = "\n".join(sentences(4000))  # more than one block
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    plain, marked = ([piece.content for piece in read_pieces(tmp_path / name, None)] for name in ("a.txt", "b.txt"))
    assert plain == marked
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n')
    assert [piece.content for piece in read_pieces(tmp_path / "c.jsonl", None)] == ["a"]


def test_texts_are_cut_after_a_line_else_before_a_word(tmp_path: Path) -> None:
    """Each of the lines has 100 characters: 20 of them fit a piece of 2,048. The words have 8 with their space."""
    (tmp_path / "lines.txt").write_text(("many words in a line ".ljust(99, ".") + "\n") * 50, encoding="utf-8")
    assert [len(str(piece.content)) for piece in read_pieces(tmp_path / "lines.txt", None)] == [2000, 2000, 1000]
    (tmp_path / "words.txt").write_text("onewords" + " another" * 500, encoding="utf-8")
    words = [str(piece.content) for piece in read_pieces(tmp_path / "words.txt", None)]
    assert [len(piece) for piece in words] == [2040, 1968]
    assert words[1].startswith(" another")


@fuzz
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\r\ufeff"), min_size=1),
    repeats=st.integers(1, 40_000),
)
def test_pieces_put_together_are_the_text(tmp_path: Path, text: str, repeats: int) -> None:
    """Whatever characters the edges of blocks and pieces fall upon."""
    whole = (text * repeats)[:700_000]
    path = tmp_path / "a.txt"
    path.write_bytes(whole.encode())
    pieces = [str(piece.content) for piece in read_pieces(path, None)]
    assert "".join(pieces) == whole
    assert max(map(len, pieces), default=0) <= 2048


# Chats

CHAT = [
    {"role": "user", "content": "Where is the river?"},
    {"role": "assistant", "content": "It lies behind the hill, not far from the old house."},
    {"role": "user", "content": "Thank you."},
]


def template_ids(messages: Iterable[dict[str, str]]) -> list[int]:
    """The template of the sample, written out by hand, through the tokenizers library alone."""
    text = "".join(
        f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n{message['content']}<|eot_id|>"
        for message in messages
    )
    library = tokenizers.Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
    return library.encode(text, add_special_tokens=False).ids


def chats(count: int) -> list[list[dict[str, str]]]:
    questions = sentences(count, seed=1, words=8)
    return [[{"role": "user", "content": question}, *CHAT[1:]] for question in questions]


def test_a_chat_is_put_into_the_template_whole(tmp_path: Path) -> None:
    expected = template_ids(CHAT)
    path = write_lines(tmp_path / "one.jsonl", [{"messages": CHAT}])
    corpus = read(path, windows=1, window_length=1 + len(expected))
    assert corpus.windows.tolist() == [[BEGIN, *expected]]
    assert tokenizer.conversation(CHAT) == [BEGIN, *expected]
    assert expected[-1] == 2044  # <|eot_id|>: no prompt for another answer follows
    assert corpus.held_out == ()


def test_windows_of_chats_start_with_the_start_of_a_chat(tmp_path: Path) -> None:
    conversations = chats(100)
    path = write_lines(tmp_path / "chats.jsonl", ({"messages": messages} for messages in conversations))
    starts = [template_ids(messages) for messages in conversations]
    corpus = read(path, windows=20, window_length=150)
    assert all(len(start) < 149 for start in starts)  # so that no window holds one chat alone
    for window in corpus.windows[:, 1:].tolist():
        first = [start for start in starts if window[: len(start)] == start]
        assert len(first) == 1
        assert any(window[len(first[0]) :][: len(start)] == start[: 149 - len(first[0])] for start in starts)


def test_a_chat_longer_than_a_window_goes_on_in_the_next(tmp_path: Path) -> None:
    long = [message for conversation in chats(20) for message in conversation]
    path = write_lines(tmp_path / "long.jsonl", [{"messages": long}])
    corpus = read(path, windows=5, window_length=101)
    assert corpus.windows[:, 1:].flatten().tolist() == template_ids(long)[:500]


def in_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in (content[:5], content[5:])]


def test_chats_in_parquet_and_in_parts_are_the_same_chats(tmp_path: Path) -> None:
    conversations = chats(40)
    parts = [
        [{**message, "content": in_parts(message["content"])} for message in messages] for messages in conversations
    ]
    paths = [
        write_lines(tmp_path / "a.jsonl", ({"messages": messages, "text": "no"} for messages in conversations)),
        write_lines(tmp_path / "b.jsonl", ({"messages": messages} for messages in parts)),
        write_parquet(tmp_path / "c.parquet", messages=conversations, source=["web"] * 40),
        write_parquet(tmp_path / "d.parquet", talk=conversations),
    ]
    corpora = [read(path, column="talk" if path.name[0] == "d" else None) for path in paths]
    assert len({(corpus.sha256, corpus.held_out) for corpus in corpora}) == 1


def test_each_line_decides_whether_it_is_text_or_a_chat(tmp_path: Path) -> None:
    text = sentences(1)[0]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text}, {"messages": CHAT}, {"messages": None, "text": "Yes."}])
    found = {str(piece.content) for piece in read_pieces(path, None)}
    assert found == {text, str(CHAT), "Yes."}


# What is held apart


@fuzz
@given(order=st.permutations(range(30)), twice=st.booleans())
def test_order_and_repetition_change_nothing(tmp_path: Path, order: list[int], twice: bool) -> None:
    texts = sentences(30)
    shuffled = [{"text": texts[index]} for index in order]
    path = write_lines(tmp_path / "shuffled.jsonl", shuffled * (2 if twice else 1))
    corpus = read(path)
    expected = read(write_lines(tmp_path / "plain.jsonl", ({"text": text} for text in texts)))
    assert torch.equal(corpus.windows, expected.windows)
    assert corpus.held_out == expected.held_out


def test_a_text_that_stands_twice_is_not_both_calibrated_on_and_held_out(tmp_path: Path) -> None:
    """Rows of ids that each stand three times; every row is told by its first id."""
    rows = np.arange(1, 1 + 50 * 20).reshape(50, 20)
    np.save(tmp_path / "rows.npy", np.tile(rows, (3, 1)))
    corpus = read(tmp_path / "rows.npy", spec=COUNTING, windows=20, window_length=21, held_out_tokens=500)
    calibrated = corpus.windows[:, 1:].flatten().tolist()
    assert len(set(calibrated)) == len(calibrated)
    assert not set(calibrated) & set(corpus.held_out)
    assert len(corpus.held_out) == 500


@pytest.mark.parametrize(("windows", "held_out"), [(14, 1024), (12, 2048), (8, 4096), (2, 4096)])
def test_a_corpus_too_small_for_both_holds_an_eighth_apart_and_what_is_left_over(
    tmp_path: Path, windows: int, held_out: int
) -> None:
    """Sixteen pieces, each as long as a window."""
    path = write_counting(tmp_path, 16 * PIECE)
    corpus = read(path, spec=COUNTING, windows=windows, window_length=PIECE + 1, held_out_tokens=4096)
    assert len(corpus.held_out) == held_out
    assert not set(corpus.held_out) & set(corpus.windows.flatten().tolist())


def test_at_least_256_tokens_are_held_apart_where_that_is_no_more_than_half(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(1, 1 + 1280).reshape(40, 32))
    kwargs: dict[str, Any] = {"spec": COUNTING, "window_length": 33, "held_out_tokens": 4096}
    assert len(read(tmp_path / "rows.npy", windows=32, **kwargs).held_out) == 256
    np.save(tmp_path / "few.npy", np.arange(1, 1 + 480).reshape(15, 32))
    assert read(tmp_path / "few.npy", windows=15, **kwargs).held_out == ()
    assert len(read(tmp_path / "few.npy", windows=3, **kwargs).held_out) == 12 * 32  # enough for both


def test_nothing_is_held_apart_unless_asked_for(tmp_path: Path) -> None:
    assert read(write_counting(tmp_path, 8000), spec=COUNTING, held_out_tokens=0).held_out == ()


@fuzz
@given(count=st.integers(600, 12_000), length=st.integers(8, 600), held_out=st.sampled_from([0, 256, 4096]))
def test_the_hint_of_a_corpus_that_is_too_small_is_the_most_that_fits(
    tmp_path: Path, count: int, length: int, held_out: int
) -> None:
    path = write_counting(tmp_path, count)
    kwargs: dict[str, Any] = {"spec": COUNTING, "held_out_tokens": held_out}
    with pytest.raises(InputError, match=f"corpus {count}.npy has {count} tokens") as caught:
        read(path, windows=2000, window_length=length, **kwargs)
    found = re.match(r"take --windows (\d+)(?: --window-length (\d+))?, or name a larger corpus", caught.value.hint)
    assert found
    windows = int(found[1])
    assert read(path, windows=windows, window_length=int(found[2] or length), **kwargs).windows.shape[0] == windows
    with pytest.raises(InputError):
        read(path, windows=windows + 1, window_length=int(found[2] or length), **kwargs)


def test_a_corpus_that_is_too_small_says_what_it_has_and_what_is_wanted(tmp_path: Path) -> None:
    """An eighth of 8,192 tokens is two pieces; the 14 others make 14 windows of 511 and a begin token, and 14 over."""
    path = write_counting(tmp_path, 8192)
    with pytest.raises(InputError) as caught:
        read(path, spec=COUNTING, windows=64, window_length=512, held_out_tokens=4096)
    assert str(caught.value) == (
        "corpus 8192.npy has 8192 tokens without its repetitions, 7168 of them to calibrate with: "
        "that makes 14 of the 64 windows of 512 tokens that are wanted"
    )
    assert caught.value.hint == "take --windows 14, or name a larger corpus"


def test_a_corpus_without_one_window_says_how_long_a_window_it_has(tmp_path: Path) -> None:
    path = write_counting(tmp_path, 400)
    with pytest.raises(InputError, match=r"400 tokens .* that makes 0 of the 4 windows of 512 tokens") as caught:
        read(path, spec=COUNTING, window_length=512)
    assert caught.value.hint == "take --windows 1 --window-length 401, or name a larger corpus"
    assert read(path, spec=COUNTING, windows=1, window_length=401).windows[0].tolist() == list(range(401))


# Overlap


def slow_overlap(windows: list[list[int]], evaluation: list[int], length: int) -> float:
    runs = {tuple(w[i : i + length]) for w in windows for i in range(len(w) - length + 1)}
    covered = set()
    for start in range(len(evaluation) - length + 1):
        if tuple(evaluation[start : start + length]) in runs:
            covered |= set(range(start, start + length))
    return len(covered) / len(evaluation) if evaluation else 0.0


@settings(max_examples=200, deadline=None)
@given(
    windows=st.integers(1, 12).flatmap(
        lambda length: st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=4)
    ),
    evaluation=st.lists(st.integers(0, 3), max_size=40),
    length=st.integers(1, 6),
)
def test_overlap_is_the_share_of_tokens_in_runs_that_both_have(
    windows: list[list[int]], evaluation: list[int], length: int
) -> None:
    assert overlap(torch.tensor(windows), evaluation, length=length) == slow_overlap(windows, evaluation, length)


def test_overlap_tells_text_that_was_calibrated_on_from_text_that_was_not(tmp_path: Path) -> None:
    corpus = read(write_counting(tmp_path, 8000), spec=COUNTING, windows=4, window_length=512, held_out_tokens=1000)
    assert overlap(corpus.windows, corpus.held_out) == 0.0
    assert overlap(corpus.windows, corpus.windows[1].tolist()) == 1.0
    mixed = [*corpus.held_out[:300], *corpus.windows[2, 100:200].tolist()]
    assert overlap(corpus.windows, mixed) == 100 / 400


# Errors


def refused(path: Path | str, **changes: Any) -> tuple[str, str]:
    with pytest.raises(InputError) as caught:
        read(path, **changes)
    return str(caught.value), caught.value.hint


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    message, hint = refused(tmp_path / "none.txt")
    assert message == f"corpus {tmp_path / 'none.txt'} does not exist"
    assert "- reads text from stdin" in hint


SUFFIXES = ".txt, .md, .jsonl, .json, .parquet, .csv, .npy, .safetensors"


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("text", encoding="utf-8")
    assert (
        refused(tmp_path / "a.docx")[0] == f"corpus {tmp_path / 'a.docx'} has the suffix '.docx', known are {SUFFIXES}"
    )


def test_a_folder_without_a_corpus_names_the_known_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("text", encoding="utf-8")
    assert refused(tmp_path)[0] == f"corpus folder {tmp_path} has no file that ends in {SUFFIXES}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", ""),
        ("empty.parquet", ""),
        ("blank.jsonl", "\n \n"),
        ("begin.txt", "<|begin_of_text|>"),
        ("nothing.jsonl", '{"text": ""}\n'),
        ("head.csv", "text\n"),
    ],
)
def test_what_gives_no_token_is_no_corpus(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    message, hint = refused(tmp_path / name)
    assert message == f"corpus {name} gives no token"
    assert hint == "name a file or folder with some text in it"


def test_a_closed_stdin_gives_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("-")[0] == "corpus stdin gives no token"


@fuzz
@given(position=st.one_of(st.integers(0, 600_000), st.integers(262_100, 262_200)), bad=st.sampled_from([0xFF, 0x80]))
def test_what_is_not_utf8_is_found_to_the_byte(tmp_path: Path, position: int, bad: int) -> None:
    """Also next to the edge of a block, in the middle of a two-byte character."""
    content = bytearray("é".encode() * 310_000)
    start = position // 2 * 2
    content[start] = bad
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    message, hint = refused(path)
    assert message == f"{path} is not UTF-8: byte {start} is 0x{bad:02x}"
    assert hint == "save the file as UTF-8"


def test_a_character_cut_off_at_the_end_is_found_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc" + "字".encode()[:2])
    assert refused(tmp_path / "a.txt")[0] == f"{tmp_path / 'a.txt'} is not UTF-8: byte 3 is 0xe5"


def test_a_line_that_is_not_utf8_is_found_to_the_line_and_the_byte_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert refused(path)[0] == f"{path}:2 is not UTF-8: byte 24 is 0xff"


PICTURE = [{"role": "user", "content": [{"type": "image"}]}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', ":2 is not JSON: Invalid control character"),
        ("[" * 200_000, ":2 is not JSON: maximum recursion depth"),
        ('["text"]', ":2 is ['text'], an object was expected"),
        ('{"prompt": "a", "answer": "b"}', ":2 has no messages and no text, only prompt, answer"),
        ("{}", ":2 has no messages and no text, only an empty object"),
        ('{"text": 5}', ":2 holds 5, text or a list of messages was expected"),
        ('{"messages": {"role": "user"}}', ":2 holds {'role': 'user'}, text or a list of messages was expected"),
        ('{"messages": []}', ":2: messages is an empty list, one message at least was expected"),
        ('{"messages": ["hi"]}', ":2: messages[0] is 'hi', role and content were expected"),
        ('{"messages": [{"role": "user"}]}', ":2: messages[0] is {'role': 'user'}, role and content were expected"),
        ('{"messages": [{"content": "hi"}]}', ":2: messages[0] is {'content': 'hi'}, role and content were expected"),
        (json.dumps({"messages": PICTURE}), ":2: messages[0] is {'content': ["),
    ],
)
def test_a_line_that_is_no_document_is_named_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n', encoding="utf-8")
    said, hint = refused(path)
    assert said.startswith(f"{path}{message}")
    assert hint.startswith('write one object a line: {"text": "..."} or {"messages": [')


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok\\ud83d"}\n', encoding="utf-8")
    message, hint = refused(tmp_path / "a.jsonl")
    assert message == f"{tmp_path / 'a.jsonl'}:1: character 2 is half of a surrogate pair ('\\ud83d')"
    assert hint == "write the text again as UTF-8"


@pytest.mark.parametrize("write", [write_parquet, write_csv])
def test_a_column_that_is_missing_or_not_the_only_one_names_the_columns(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    path = write(tmp_path / ("a.parquet" if write is write_parquet else "a.csv"), one=["a"], two=["b"], three=[3])
    message, hint = refused(path)
    assert message == f"{path} has no column messages and no text; its columns are one, two, three"
    assert hint == "name one of them with --column"
    assert refused(path, column="four")[0] == f"{path} has no column four; its columns are one, two, three"


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", number=[5])
    message, _ = refused(path, column="number")
    assert message == f"{path}: row 1 holds 5, text or a list of messages was expected"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"text", "cannot be read as parquet: "),
        ("a.csv", b"text\n\xff\n", "cannot be read as csv: "),
        ("a.csv", b"text,other\n1\n", "cannot be read as csv: "),
        ("a.npy", b"text", "is not a whole .npy file: "),
        ("a.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': [(    ", "is not a whole .npy file: "),
        ("a.safetensors", b"text", "is not a whole safetensors file: "),
    ],
)
def test_a_file_that_is_not_what_its_suffix_says_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    said, hint = refused(tmp_path / name)
    assert said.startswith(f"{tmp_path / name} {message}")
    assert hint.startswith("write ")


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1000, dtype=np.int64))
    save_file({"ids": np.zeros(1000, dtype=np.int64)}, tmp_path / "a.safetensors")
    write_parquet(tmp_path / "a.parquet", text=sentences(100))
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-100])
        assert str(path) in refused(path)[0]


def test_a_file_that_the_disk_does_not_give_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text", encoding="utf-8")

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert refused(path) == (f"corpus {path} cannot be read: Input/output error", "check the file and its rights")


def test_ids_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(8, dtype=np.float32))
    assert refused(tmp_path / "a.npy") == (
        f"{tmp_path / 'a.npy'} holds float32, token ids are integers",
        "write the ids as int32 or int64",
    )
    save_file({"ids": np.zeros(8, dtype=np.float16)}, tmp_path / "a.safetensors")
    assert refused(tmp_path / "a.safetensors")[0] == f"{tmp_path / 'a.safetensors'} holds F16, token ids are integers"


def test_ids_of_three_dimensions_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4), dtype=np.int64))
    message, _ = refused(tmp_path / "a.npy")
    assert message.endswith("has the shape [2, 3, 4], token ids are [tokens] or [documents, tokens]")


def test_several_tensors_none_of_them_ids_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(8, dtype=np.int64), "b": np.zeros(8, dtype=np.int64)}, tmp_path / "a.safetensors")
    message, hint = refused(tmp_path / "a.safetensors")
    assert re.search("holds (a, b|b, a); one tensor was expected, or one called ids", message)
    assert hint == "write the token ids under the name ids"


@pytest.mark.parametrize("wrong", [2048, -1])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, wrong: int) -> None:
    np.save(tmp_path / "a.npy", np.array([5, wrong, 7]))
    message, hint = refused(tmp_path / "a.npy")
    assert message == f"{tmp_path / 'a.npy'}: token {wrong} is outside the model's vocabulary, 0 to 2047"
    assert hint == "token ids, tokenizer and weights must be of the same model"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("What is this?", encoding="utf-8")
    message, _ = refused(tmp_path / "a.txt", spec=replace(SPEC, vocab_size=20))
    assert "is outside the model's vocabulary, 0 to 19" in message


def with_template(folder: Path, template: str | None) -> Tokenizer:
    """The tokenizer of the sample with another chat template, or with none."""
    config = json.loads((BUNDLED_MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = template
    if template is None:
        del config["chat_template"]
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_bytes((BUNDLED_MODEL / "tokenizer.json").read_bytes())
    return Tokenizer(folder)


def test_chats_without_a_template_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, {"messages": CHAT}])
    other = with_template(tmp_path / "model", None)
    message, hint = refused(path, using=other)
    assert message == f"{path}:2: the tokenizer in {tmp_path / 'model'} has no chat template, which messages need"
    assert hint == "copy tokenizer_config.json or chat_template.jinja into the checkpoint, or give plain text"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_says_why_and_where(tmp_path: Path, template: str, message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "fine"}, {"messages": CHAT}])
    said, hint = refused(path, using=with_template(tmp_path / "model", template))
    assert said.startswith(f"{path}:2: the chat template fails: ")
    assert message in said
    assert hint == "give messages in the order and the roles that this model was trained with"


@pytest.mark.parametrize(("windows", "length"), [(0, 8), (1, 1)])
def test_windows_that_hold_nothing_are_refused(tmp_path: Path, windows: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"{windows} windows of {length} tokens hold no text"):
        read(write_counting(tmp_path, 100), spec=COUNTING, windows=windows, window_length=length)


# Memory


def test_a_text_far_larger_than_the_sample_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    with path.open("w", encoding="utf-8") as file:
        for number in range(320_000):
            file.write(f"{number} times one hundred characters, so that thirty megabytes take a moment; and some. \n")
    assert path.stat().st_size > 27e6
    read(BUNDLED_MODEL / "evaluation.txt")  # so that no import is counted
    tracemalloc.start()
    try:
        read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12e6


@pytest.mark.parametrize(("suffix", "limit"), [("parquet", 12e6), ("csv", 80e6)])
def test_a_table_is_read_in_bounded_memory(tmp_path: Path, suffix: str, limit: float) -> None:
    """Arrow reads 32 blocks of a CSV ahead, a megabyte each, and for a moment twice: for the columns, for the rows."""
    import pyarrow as pa
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet

    path = tmp_path / f"large.{suffix}"
    filling = "so that it comes to a hundred and twenty megabytes " * 20
    table = pa.table({"text": [f"{number} {filling}" for number in range(120_000)]})
    if suffix == "parquet":
        parquet.write_table(table, path, use_dictionary=False, compression="none")
    else:
        arrow_csv.write_csv(table, path)
    del table
    assert path.stat().st_size > 120e6
    before = pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() - before for _ in read_pieces(path, None)) < limit
