"""Files of text, chats, tables or token ids -> pieces of bounded length, each with the place where it stands.

One reader for each kind of file, none of which holds more than a block of it. Foreign errors end here.
"""

from __future__ import annotations

import codecs
import io
import json
import reprlib
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from exporter.errors import InputError

_BLOCK_BYTES = 1 << 18
"""Read at once from a text."""
_BLOCK_ROWS = 64
"""Read at once from a table."""
_PIECE_CHARACTERS = 2048
"""Of text: about 512 tokens. Short, so that many places of the corpus are seen; long enough for some context."""
_PIECE_IDS = 512
_LINE = 'write one object a line: {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'


@dataclass(frozen=True, slots=True)
class Piece:
    """What is sampled: some text, the messages of one chat, or an array of token ids; and where it stands."""

    content: str | list[dict[str, str]] | np.ndarray
    origin: str


def read_pieces(path: Path | Literal["-"], column: str | None) -> Iterator[Piece]:
    """Every piece of a file, of the files in a folder, or of the text on stdin (``-``). Raises InputError."""
    if path == "-":
        stream = sys.stdin.buffer if sys.stdin else io.BytesIO()
        yield from _text_pieces(_decode(stream, "stdin"), "stdin")
        return
    for file in _files(Path(path)):
        try:
            if file.stat().st_size:
                yield from READERS[file.suffix.lower()](file, column)
        except OSError as error:
            raise InputError(
                f"corpus {file} cannot be read: {error.strerror or error}", hint="check the file and its rights"
            ) from error


def _files(path: Path) -> list[Path]:
    suffixes = ", ".join(READERS)
    if not path.exists():
        raise InputError(f"corpus {path} does not exist", hint="check the path; - reads text from stdin")
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            raise InputError(
                f"corpus {path} has the suffix {path.suffix!r}, known are {suffixes}",
                hint="rename or convert it; - reads text from stdin",
            )
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in READERS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise InputError(f"corpus folder {path} has no file that ends in {suffixes}", hint="name another folder")
    return files


def _read_text(path: Path, _column: str | None) -> Iterator[Piece]:
    with path.open("rb") as stream:
        yield from _text_pieces(_decode(stream, str(path)), str(path))


def _read_lines(path: Path, column: str | None) -> Iterator[Piece]:
    """JSON lines, each of which decides for itself whether it is text or a chat."""
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            origin = f"{path}:{number}"
            if line.strip():
                try:
                    record = json.loads(line.decode().removeprefix("\ufeff"))
                except UnicodeDecodeError as error:
                    raise _not_utf8(origin, error, byte=offset + error.start) from error
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{origin} is not JSON: {error}", hint=_LINE) from error
                yield from _pieces(_field(record, column, origin), origin)
            offset += len(line)


def _field(record: Any, column: str | None, origin: str) -> Any:
    names = [column] if column else ["messages", "text"]
    if not isinstance(record, dict):
        raise InputError(f"{origin} is {reprlib.repr(record)}, an object was expected", hint=_LINE)
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise InputError(
        f"{origin} has no {' and no '.join(names)}, only {', '.join(record) or 'an empty object'}", hint=_LINE
    )


def _read_table(path: Path, column: str | None) -> Iterator[Piece]:
    """One column of a Parquet or CSV file, a few rows at a time."""
    import pyarrow as pa

    batches = _parquet_batches if path.suffix.lower() == ".parquet" else _csv_batches
    try:
        values = (value for batch in batches(path, column) for value in batch.column(0).to_pylist())
        for row, value in enumerate(values, start=1):
            if value is not None:
                yield from _pieces(value, f"{path}: row {row}")
    except pa.ArrowException as error:
        raise InputError(
            f"{path} cannot be read as {path.suffix[1:]}: {error}", hint="write the file again, or as JSON lines"
        ) from error


def _parquet_batches(path: Path, column: str | None) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path, buffer_size=_BLOCK_BYTES, pre_buffer=False) as file:
        name = _choose_column(path, file.schema_arrow, column)
        yield from file.iter_batches(batch_size=_BLOCK_ROWS, columns=[name])


def _csv_batches(path: Path, column: str | None) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import csv

    read, parse = csv.ReadOptions(use_threads=False), csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, read_options=read, parse_options=parse) as reader:
        name = _choose_column(path, reader.schema, column)
    convert = csv.ConvertOptions(include_columns=[name], column_types={name: pa.string()})
    with csv.open_csv(path, read_options=read, parse_options=parse, convert_options=convert) as reader:
        yield from reader


def _choose_column(path: Path, schema: Any, column: str | None) -> str:
    import pyarrow as pa

    strings = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    wanted = [column] if column else ["messages", "text"]
    for name in wanted if column or len(strings) != 1 else [*wanted, *strings]:
        if name in schema.names:
            return name
    raise InputError(
        f"{path} has no column {' and no '.join(wanted)}; its columns are {', '.join(schema.names)}",
        hint="name one of them with --column",
    )


def _read_npy(path: Path, _column: str | None) -> Iterator[Piece]:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, SyntaxError, tokenize.TokenError) as error:  # its header is a Python literal
        raise InputError(f"{path} is not a whole .npy file: {error}", hint="write it again with numpy.save") from error
    yield from _id_pieces(array, shape=array.shape, dtype=str(array.dtype), origin=str(path))


def _read_safetensors(path: Path, _column: str | None) -> Iterator[Piece]:
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if "ids" not in names and len(names) != 1:
                raise InputError(
                    f"{path} holds {', '.join(names) or 'no tensor'}; one tensor was expected, or one called ids",
                    hint="write the token ids under the name ids",
                )
            part = file.get_slice("ids" if "ids" in names else names[0])
            yield from _id_pieces(part, shape=part.get_shape(), dtype=part.get_dtype(), origin=str(path))
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}", hint="write the file again") from error


def _id_pieces(array: Any, *, shape: Sequence[int], dtype: str, origin: str) -> Iterator[Piece]:
    """Of one stream of ids, or of rows that are documents. ``array`` is only ever sliced: it may be a mapped file."""
    if dtype[0] not in "iuIU":
        raise InputError(f"{origin} holds {dtype}, token ids are integers", hint="write the ids as int32 or int64")
    if len(shape) not in {1, 2}:
        raise InputError(
            f"{origin} has the shape {list(shape)}, token ids are [tokens] or [documents, tokens]",
            hint="write the ids in one of these shapes",
        )
    length = shape[-1]
    for row in range(shape[0]) if len(shape) == 2 else [None]:
        for start in range(0, length, _PIECE_IDS):
            columns = slice(start, min(start + _PIECE_IDS, length))
            yield Piece(np.asarray(array[columns] if row is None else array[row, columns]), origin)


def _pieces(value: Any, origin: str) -> Iterator[Piece]:
    """Of one document: a text, or the messages of a chat."""
    match value:
        case str(text):
            yield from _text_pieces([text], origin)
        case list(messages):
            yield Piece(_check_messages(messages, origin), origin)
        case _:
            raise InputError(
                f"{origin} holds {reprlib.repr(value)}, text or a list of messages was expected", hint=_LINE
            )


def _check_messages(messages: list[Any], origin: str) -> list[dict[str, str]]:
    checked = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        content = _join_parts(message.get("content")) if isinstance(message, dict) else None
        if not isinstance(role, str) or content is None:
            raise InputError(
                f"{origin}: messages[{index}] is {reprlib.repr(message)}, role and content were expected", hint=_LINE
            )
        checked.append({"role": role, "content": content})
    if not checked:
        raise InputError(f"{origin}: messages is an empty list, one message at least was expected", hint=_LINE)
    return checked


def _join_parts(content: Any) -> str | None:
    """The text of a message: as it is, or written in parts; None if it is something else, such as a picture."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(content) else None


def _text_pieces(blocks: Iterable[str], origin: str) -> Iterator[Piece]:
    """Pieces cut after a line, or before a space, where the second half of one has any."""
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > _PIECE_CHARACTERS:
            middle, end = start + _PIECE_CHARACTERS // 2, start + _PIECE_CHARACTERS
            line, space = rest.rfind("\n", middle, end), rest.rfind(" ", middle, end)
            cut = line + 1 if line >= 0 else space if space >= 0 else end
            yield Piece(rest[start:cut], origin)
            start = cut
        rest = rest[start:]
    if rest:
        yield Piece(rest, origin)


def _decode(stream: BinaryIO, name: str) -> Iterator[str]:
    """The text of a UTF-8 stream block by block, every line end a newline."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    offset, ended = 0, False
    while not ended:
        block = stream.read(_BLOCK_BYTES)
        ended = not block
        pending = len(utf8.getstate()[0])  # of a character that the last block cut
        try:
            text = decoder.decode(block, final=ended)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error, byte=offset - pending + error.start) from error
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(block)


def _not_utf8(origin: str, error: UnicodeDecodeError, *, byte: int) -> InputError:
    return InputError(
        f"{origin} is not UTF-8: byte {byte} is 0x{error.object[error.start]:02x}", hint="save the file as UTF-8"
    )


READERS: dict[str, Callable[[Path, str | None], Iterator[Piece]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_lines,
    ".json": _read_lines,
    ".parquet": _read_table,
    ".csv": _read_table,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
}
"""By the suffix of a file."""
