"""Stand-ins for shared libraries that are linked and never called, for a machine that is emulated without them.

The only torch for aarch64 on the package index is linked against CUDA: its CPU half does not load until every library
of NVIDIA's, and its own ``libtorch_cuda.so``, defines the symbols that it names. A stand-in defines exactly those, in
the versions asked for: a function answers with the address of zeros, which as a status is an error, as a reference an
empty object (one is asked for as torch loads). Nothing that computes is touched.

Layouts: System V ABI, chapters 4 and 5; symbol versions: Linux Standard Base Core 5.0, 10.7.
"""

from __future__ import annotations

import mmap
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_AARCH64 = 183
_PAGE = 0x10000  # the largest that Linux has on aarch64
_DATA_BYTES = 4096  # of zeros, for a symbol that is read, not called
_TYPE_BYTES = 64  # of a std::type_info: no table, then the type's name, which is all that is asked for
_RELATIVE = 1027  # R_AARCH64_RELATIVE
_SECTION, _SYMBOL, _DYNAMIC_ENTRY = "<IIQQQQIIQQ", "<IBBHQQ", "<QQ"
_DYNAMIC, _DYNSYM, _VERNEED, _VERSYM = 6, 11, 0x6FFFFFFE, 0x6FFFFFFF
_NEEDED = 1
_GLOBAL, _OBJECT, _FUNCTION = 1, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A symbol that a library takes from another one: in that version of that library, or, both None, from any."""

    name: str
    library: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Linkage:
    """What a shared library needs, gives and takes."""

    needed: tuple[str, ...]
    defined: frozenset[str]
    wanted: frozenset[Wanted]


def read_linkage(path: Path) -> Linkage:
    """Of a 64-bit little-endian ELF library; symbols that may stay undefined are left out. Raises ValueError for any
    other file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path.name} is no 64-bit little-endian ELF file")
        return _read(content)


def _read(content: mmap.mmap) -> Linkage:
    (start,) = struct.unpack_from("<Q", content, 0x28)
    size, count = struct.unpack_from("<HH", content, 0x3A)
    rows = [struct.unpack_from(_SECTION, content, start + index * size) for index in range(count)]
    sections = {kind: (offset, length, link, info) for _, kind, _, _, offset, length, link, info, _, _ in rows}
    symbols, length, link, _ = sections[_DYNSYM]
    names = rows[link][4]

    def text(at: int) -> str:
        return content[names + at : content.find(b"\0", names + at)].decode()

    offset, size, _, _ = sections[_DYNAMIC]
    entries = [struct.unpack_from(_DYNAMIC_ENTRY, content, offset + 16 * index) for index in range(size // 16)]
    versions: dict[int, tuple[str, str]] = {}
    if _VERNEED in sections:
        at, _, _, libraries = sections[_VERNEED]
        for _ in range(libraries):
            _, auxiliaries, library, first, following = struct.unpack_from("<HHIII", content, at)
            one = at + first
            for _ in range(auxiliaries):
                _, _, index, version, next_one = struct.unpack_from("<IHHII", content, one)
                versions[index & 0x7FFF] = (text(library), text(version))
                one += next_one
            at += following
    defined, wanted = set(), set()
    for index in range(1, length // 24):
        name, info, _, section, _, _ = struct.unpack_from(_SYMBOL, content, symbols + 24 * index)
        if section:
            defined.add(text(name))
        elif info >> 4 == _GLOBAL:
            (version,) = struct.unpack_from("<H", content, sections[_VERSYM][0] + 2 * index) if versions else (0,)
            library, version = versions.get(version & 0x7FFF, (None, None))
            wanted.add(Wanted(name=text(name), library=library, version=version))
    return Linkage(
        needed=tuple(text(value) for tag, value in entries if tag == _NEEDED),
        defined=frozenset(defined),
        wanted=frozenset(wanted),
    )


def write_missing(libraries: Iterable[Path], folder: Path, *, provided: Iterable[Path]) -> list[str]:
    """Stand-ins, in ``folder``, for what ``libraries`` need and is neither of them nor ``provided``: their names.

    A symbol that names no library goes to the first of them, since the loader looks in all.
    """
    ours = {path.name: read_linkage(path) for path in libraries}
    theirs = {path.name: read_linkage(path) for path in provided}
    present = ours | theirs
    missing = sorted({name for linkage in ours.values() for name in linkage.needed} - present.keys())
    defined = frozenset().union(*(linkage.defined for linkage in present.values()))
    symbols: defaultdict[str, set[Wanted]] = defaultdict(set)
    for symbol in frozenset().union(*(linkage.wanted for linkage in ours.values())):
        if symbol.library in missing:
            symbols[symbol.library].add(symbol)
        elif symbol.library is None and symbol.name not in defined:
            symbols[missing[0]].add(symbol)
    for name in missing:
        (folder / name).write_bytes(stand_in(name, symbols[name]))
    return missing


def stand_in(name: str, symbols: Iterable[Wanted]) -> bytes:
    """An aarch64 library of that name which defines the symbols."""
    ordered = sorted(symbols, key=lambda symbol: (symbol.name, symbol.version or ""))
    versions = sorted({symbol.version for symbol in ordered if symbol.version})
    strings = _Strings()
    soname = strings.add(name)
    table, kinds = [struct.pack(_SYMBOL, 0, 0, 0, 0, 0, 0)], [0]
    header = 64 + 4 * 56
    zeros = _PAGE + 256
    types: dict[int, str] = {}
    for index, symbol in enumerate(ordered):
        kind, at, size = _FUNCTION, header + 8 * index, 8
        if symbol.name.startswith(("_ZTV", "_ZTT", "_ZTS")):  # of C++ classes: tables, and names
            kind, at, size = _OBJECT, zeros, _DATA_BYTES
        elif symbol.name.startswith("_ZTI"):
            kind, at, size = _OBJECT, zeros + _DATA_BYTES + _TYPE_BYTES * len(types), _TYPE_BYTES
            types[at] = symbol.name.removeprefix("_ZTI")
        table.append(struct.pack(_SYMBOL, strings.add(symbol.name), _GLOBAL << 4 | kind, 0, 1, at, size))
        kinds.append(2 + versions.index(symbol.version) if symbol.version else 1)
    definitions = list(_definitions([name, *versions], strings))
    type_names = [(at + 8, strings.add(name)) for at, name in types.items()]
    parts = {
        5: strings.content,  # DT_STRTAB
        6: b"".join(table),  # DT_SYMTAB
        4: _hash_table([symbol.name for symbol in ordered]),  # DT_HASH
        0x6FFFFFF0: struct.pack(f"<{len(kinds)}H", *kinds),  # DT_VERSYM
        0x6FFFFFFC: b"".join(definitions),  # DT_VERDEF
    }
    functions = (_return_address(zeros - (header + 8 * index)) for index in range(len(ordered)))
    text, entries = bytearray().join(functions), []
    for tag, content in parts.items():
        text += bytes(-(header + len(text)) % 8)
        entries.append((tag, header + len(text)))
        text += content
    text += bytes(-(header + len(text)) % 8)
    relocations = [struct.pack("<QQQ", at, _RELATIVE, dict(entries)[5] + name) for at, name in type_names]
    entries += [(7, header + len(text)), (8, 24 * len(relocations)), (9, 24)]  # DT_RELA, DT_RELASZ, DT_RELAENT
    text += b"".join(relocations)
    entries += [(10, len(strings.content)), (11, 24), (14, soname), (0x6FFFFFFD, len(definitions)), (0, 0)]
    dynamic = b"".join(struct.pack(_DYNAMIC_ENTRY, *entry) for entry in entries)
    length = header + len(text)
    if length > _PAGE:
        raise ValueError(f"{name}: {len(ordered)} symbols do not fit a page")
    writable = _DATA_BYTES + _TYPE_BYTES * len(types)
    segments = (
        (1, 5, 0, length, _PAGE),  # PT_LOAD, read and execute
        (1, 6, _PAGE, 256 + writable, _PAGE),  # PT_LOAD, read and write
        (2, 6, _PAGE, len(dynamic), 8),  # PT_DYNAMIC
        (0x6474E551, 6, 0, 0, 16),  # PT_GNU_STACK: not to be executed
    )
    identity = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf = struct.pack("<HHIQQQIHHHHHH", 3, _AARCH64, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    headers = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, alignment)
        for kind, flags, offset, size, alignment in segments
    )
    start = identity + elf + headers + bytes(text)
    return start.ljust(_PAGE, b"\0") + dynamic.ljust(256, b"\0") + bytes(writable)


def _return_address(distance: int) -> bytes:
    """``adr x0, distance; ret``"""
    return struct.pack("<II", 0x10000000 | (distance & 3) << 29 | (distance >> 2 & 0x7FFFF) << 5, 0xD65F03C0)


class _Strings:
    """A string table that grows."""

    def __init__(self) -> None:
        self.content = b"\0"

    def add(self, text: str) -> int:
        at = len(self.content)
        self.content += text.encode() + b"\0"
        return at


def _definitions(names: list[str], strings: _Strings) -> Iterator[bytes]:
    """The library itself and each version that it defines."""
    for index, name in enumerate(names, start=1):
        following = 28 if index < len(names) else 0
        base = int(index == 1)
        yield struct.pack("<HHHHIIIII", 1, base, index, 1, _hash(name), 20, following, strings.add(name), 0)


def _hash_table(names: list[str]) -> bytes:
    """Of the symbols, the first of which has the index 1."""
    buckets = [0] * max(1, len(names))
    chain = [0] * (1 + len(names))
    for index, name in enumerate(names, start=1):
        bucket = _hash(name) % len(buckets)
        buckets[bucket], chain[index] = index, buckets[bucket]
    return struct.pack(f"<{2 + len(buckets) + len(chain)}I", len(buckets), len(chain), *buckets, *chain)


def _hash(name: str) -> int:
    """The System V ABI's, figure 5-13."""
    value = 0
    for letter in name.encode():
        value = (value << 4) + letter
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value
