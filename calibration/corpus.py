"""Text, chats, tables or token ids -> windows to calibrate with, and text of the same source held apart from them.

A corpus may be larger than memory, so it is read once, piece by piece. The priority of a piece is a hash of the seed
and of what the piece says, and the pieces of least priority are kept (a bottom-k sample: Cohen and Kaplan 2007). What
is chosen therefore depends on no order, and what stands twice counts once: it cannot be calibrated on and held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from calibration.pieces import Piece, read_pieces
from exporter.errors import InputError
from exporter.spec import ModelSpec
from exporter.tokenizer import Tokenizer

_PIECE_TOKENS = 8192
"""More of one piece is not taken, so that no endless chat fills the sample. Text never reaches it: a character is at
most four tokens."""
_LEAST_HELD_OUT = 256
"""Tokens below which a quality verdict says little (``exporter.quality``: one window)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Token windows to calibrate with, and text of the same source that was held apart from them."""

    windows: Tensor
    """int64 [W, T]"""
    held_out: tuple[int, ...]
    """Token ids for the quality verdict, never calibrated on, without begin tokens; empty where there are none."""
    source: str
    """What it was made from, for people: ``chats.jsonl``, ``stdin``, ``written by the model``."""
    seed: int

    def __post_init__(self) -> None:
        if self.windows.dtype != torch.int64 or self.windows.dim() != 2 or not self.windows.numel():
            raise ValueError(f"windows are {self.windows.dtype} {list(self.windows.shape)}, int64 [W, T] was expected")

    @property
    def tokens(self) -> int:
        return self.windows.numel()

    @property
    def sha256(self) -> str:
        """Hex digest of the ids in the windows and of their shape, and of nothing else."""
        digest = hashlib.sha256(f"{list(self.windows.shape)}".encode())
        digest.update(self.windows.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Sampled:
    ids: np.ndarray
    """int64 [N], without begin tokens"""
    is_chat: bool


def read_corpus(
    path: Path | Literal["-"],
    tokenizer: Tokenizer,
    *,
    spec: ModelSpec,
    windows: int,
    window_length: int,
    seed: int,
    column: str | None,
    held_out_tokens: int,
) -> Corpus:
    """``windows`` windows of ``window_length`` tokens, each headed by the begin token if the model has one, and up to
    ``held_out_tokens`` tokens of pieces that no window was made from.

    ``path`` is a file or a folder of files with the suffixes of ``READERS``, or ``-`` for text on stdin; ``column`` is
    where tables and JSON lines keep it, if not in ``text`` or ``messages``. Of a corpus too small for both, an eighth
    is held apart (256 tokens at least, and nothing where that would be more than half). Raises InputError, also
    for a corpus that does not fill the windows.
    """
    begin = [] if spec.bos_token_id is None else [spec.bos_token_id]
    body = window_length - len(begin)
    if windows < 1 or body < 1:
        raise ValueError(f"{windows} windows of {window_length} tokens hold no text")
    source = "stdin" if path == "-" else Path(path).resolve().name

    # A window that ends within a chat leaves less than a window of it unused: that doubles what is needed. The third
    # part, and the pieces, are for what is held apart.
    enough = 3 * (windows * body + held_out_tokens + _PIECE_TOKENS)
    pieces = _sample(
        read_pieces(path, column), lambda piece: _tokenize(piece, tokenizer, spec=spec), seed=seed, tokens=enough
    )
    found = _count(pieces)
    if not found:
        raise InputError(f"corpus {source} gives no token", hint="name a file or folder with some text in it")
    eighth = max(found // 8, _LEAST_HELD_OUT)
    rest, apart = _hold_apart(pieces, min(held_out_tokens, eighth if 2 * eighth <= found else 0))
    unused = iter(rest)
    packed = list(islice(_pack(unused, body), windows))
    if len(packed) < windows:
        left = _count(rest)
        fitting = f"--windows {len(packed)}" if packed else f"--windows 1 --window-length {left + len(begin)}"
        raise InputError(
            f"corpus {source} has {found} tokens without its repetitions, {left} of them to calibrate with: that makes "
            f"{len(packed)} of the {windows} windows of {window_length} tokens that are wanted",
            hint=f"take {fitting}, or name a larger corpus",
        )
    ids = np.concatenate([np.tile(np.array(begin, dtype=np.int64), (windows, 1)), np.stack(packed)], axis=1)
    held_out = (int(token) for piece in [*apart, *unused] for token in piece.ids)
    return Corpus(
        windows=torch.from_numpy(ids), held_out=tuple(islice(held_out, held_out_tokens)), source=source, seed=seed
    )


def overlap(windows: Tensor, evaluation: Sequence[int], *, length: int = 32) -> float:
    """The share of ``evaluation`` tokens in a run of ``length`` tokens that also stands in one of ``windows``."""
    ids = np.array(evaluation, dtype=np.int64)
    known = np.isin(_run_hashes(ids, length), _run_hashes(windows.numpy(), length))
    covered = np.zeros(len(ids), dtype=bool)
    for start in np.flatnonzero(known):
        covered[start : start + length] = True
    return float(covered.mean()) if len(ids) else 0.0


def _run_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit polynomial hash of each run of ``length`` ids along the last axis: ``[..., N] -> [..., N-length+1]``."""
    count = max(0, ids.shape[-1] - length + 1)
    hashes = np.zeros((*ids.shape[:-1], count), dtype=np.uint64)
    for offset in range(length if count else 0):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[..., offset : offset + count].astype(np.uint64)
    return hashes


def _sample(
    pieces: Iterable[Piece], to_ids: Callable[[Piece], np.ndarray], *, seed: int, tokens: int
) -> list[_Sampled]:
    """The different pieces of least priority that have ``tokens`` tokens between them (all, if they have fewer), in
    the order of their priorities. Only what enters the sample is tokenized: of n pieces about k (1 + ln n/k)."""
    heap: list[tuple[int, _Sampled]] = []  # the greatest priority on top, and so negated
    known: set[int] = set()
    held = 0
    for piece in pieces:
        priority = _priority(piece, seed)
        if priority in known or (held >= tokens and priority > -heap[0][0]):
            continue
        ids = to_ids(piece)
        if not len(ids):
            continue
        heappush(heap, (-priority, _Sampled(ids, is_chat=isinstance(piece.content, list))))
        known.add(priority)
        held += len(ids)
        while held - len(heap[0][1].ids) >= tokens:
            dropped, sampled = heappop(heap)
            known.remove(-dropped)
            held -= len(sampled.ids)
    return [sampled for _, sampled in sorted(heap, key=lambda entry: -entry[0])]


def _priority(piece: Piece, seed: int) -> int:
    match piece.content:
        case str(text):
            content = text
        case list(messages):
            content = json.dumps(messages, ensure_ascii=False)
        case ids:
            return _hash(ids.astype("<i8").tobytes(), seed)
    try:
        return _hash(content.encode(), seed)
    except UnicodeEncodeError as error:
        raise InputError(
            f"{piece.origin}: character {error.start} is half of a surrogate pair ({content[error.start]!a})",
            hint="write the text again as UTF-8",
        ) from error


def _hash(content: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=16, key=str(seed).encode()).digest())


def _tokenize(piece: Piece, tokenizer: Tokenizer, *, spec: ModelSpec) -> np.ndarray:
    """Token ids without begin tokens: a window has one, in front."""
    match piece.content:
        case str(text):
            ids = np.array(tokenizer.encode(text), dtype=np.int64)
        case list(messages):
            try:
                ids = np.array(tokenizer.conversation(messages), dtype=np.int64)
            except InputError as error:
                raise InputError(f"{piece.origin}: {error}", hint=error.hint) from error
        case stored:
            ids = stored.astype(np.int64)
    outside = ids[(ids < 0) | (ids >= spec.vocab_size)]
    if len(outside):
        raise InputError(
            f"{piece.origin}: token {outside[0]} is outside the model's vocabulary, 0 to {spec.vocab_size - 1}",
            hint="token ids, tokenizer and weights must be of the same model",
        )
    if spec.bos_token_id is not None:
        ids = ids[ids != spec.bos_token_id]
    return ids[:_PIECE_TOKENS]


def _count(pieces: Iterable[_Sampled]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _hold_apart(pieces: list[_Sampled], tokens: int) -> tuple[list[_Sampled], list[_Sampled]]:
    """The pieces to calibrate with, at least one, and others that have ``tokens`` tokens between them: the last."""
    split, held = len(pieces), 0
    while split > 1 and held < tokens:
        split -= 1
        held += len(pieces[split].ids)
    return pieces[:split], pieces[split:]


def _pack(pieces: Iterable[_Sampled], length: int) -> Iterator[np.ndarray]:
    """Windows of ``length`` ids. What does not fit goes on in the next one; but of a chat that a window could hold the
    rest is left out, so that the next window starts with the start of a chat."""
    window: list[np.ndarray] = []
    room = length
    for piece in pieces:
        start = 0
        while start < len(piece.ids):
            part = piece.ids[start : start + room]
            window.append(part)
            start += len(part)
            room -= len(part)
            if not room:
                yield np.concatenate(window)
                window, room = [], length
                if piece.is_chat and len(piece.ids) <= length:
                    break
