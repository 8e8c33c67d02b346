"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from exporter.errors import CapacityError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path.parent, path.name)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        temporary.chmod(0o644)  # safetensors makes the file anew, for its owner alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_in_progress(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in ``parent`` for what will become ``name``; what is still there at the end is removed."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = _hidden(parent, name)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(parent: Path, name: str) -> Path:
    """A name that nothing has, told before anything is there: an interrupt may come right after."""
    return parent / f".{name}.{secrets.token_hex(4)}"


def put_in_place(folder: Path, destination: Path) -> None:
    """Move ``folder`` to ``destination``; a folder that stood there is kept until the new one has taken its place."""
    if destination.exists():
        old = folder.with_name(folder.name + ".old")
        destination.rename(old)
        try:
            folder.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
        shutil.rmtree(old)
    else:
        folder.rename(destination)


def save_tensors(path: Path, tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all. Raises OSError, also where safetensors has its own error for it."""
    with written_whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            number = int(code.group(1))
            raise OSError(number, os.strerror(number), str(path)) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_full(error: OSError) -> CapacityError | None:
    """The error of ours for a disk, or a quota, that ran full; None for any other."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    place = f" while writing {error.filename}" if error.filename else ""
    return CapacityError(f"the disk is full{place}", hint="free some space; what was half written has been removed")
