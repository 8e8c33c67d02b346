"""A head of some tokens only, as of a model that answers with few: which they are, and the model that has it.

Llama Guard 3 1B is shipped so (Fedorov et al. 2024, arXiv:2411.17713, section 3): of 128,256 rows it keeps the 20 of
the tokens that its verdicts are made of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.errors import InputError
from exporter.spec import ModelSpec

_FORM = 'wanted is a list of token ids, or an object as {"0": 128009, "1": 128001}: the token of each row'


def read_head_tokens(path: Path) -> list[int]:
    """The token of each row that is kept, from a JSON list of token ids, or from the object that ExecuTorch's
    ``export_llama --output_prune_map`` takes: of each row's number, as a string, its token. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"head tokens {path}: {error}", hint=_FORM) from error
    tokens = _by_row(content, path) if isinstance(content, dict) else content
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"head tokens {path}: {type(tokens).__name__} without a token in it", hint=_FORM)
    strange = [token for token in tokens if type(token) is not int]
    if strange:
        raise InputError(f"head tokens {path}: {strange[0]!r} is no token id", hint=_FORM)
    return tokens


def _by_row(content: dict[str, Any], path: Path) -> list[Any]:
    rows = [str(row) for row in range(len(content))]
    absent = [row for row in rows if row not in content]
    if absent:
        raise InputError(f"head tokens {path}: of {len(rows)} rows there is no row {absent[0]}", hint=_FORM)
    return [content[row] for row in rows]


def with_head_tokens(spec: ModelSpec, tokens: Sequence[int]) -> ModelSpec:
    """``spec`` with a head of these tokens alone, in this order; as it is where there are none. Raises InputError for
    tokens that cannot be, and where none of them ends an answer."""
    if not tokens:
        return spec
    try:
        return replace(spec, tie_word_embeddings=False, head_tokens=tuple(tokens))
    except ValueError as error:
        raise InputError(
            f"--head-tokens: {error}",
            hint="name each token once that the model may answer with, one that ends its answers among them",
        ) from error
