"""The folder that an export wrote: nothing of it is used before its size and SHA-256 are right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA = "llama-export/bundle/1"
_COPY_AGAIN = "copy the bundle again"
CACHES = {"fp32": np.float32, "int8-static": np.int8}
"""By ``kv_dtype``, what keys and values are kept in."""
_DTYPES = {"I64": "<i8", "I32": "<i4", "F32": "<f4"}


class BundleError(Exception):
    """What is wrong with a bundle, in a sentence for the person who made or copied it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goldens:
    """What the reference answers: at each of m positions its k most likely tokens, best first, with their logits, and
    the logsumexp over all; and greedy answers and chats, as ``docs/bundle.md`` has them."""

    ids: list[int]
    """The tokens to feed."""
    prefills: tuple[int, int]
    top_ids: NDArray[np.int32]  # [m, k]
    top_logits: NDArray[np.float32]  # [m, k]
    logsumexp: NDArray[np.float32]  # [m]
    prompts: list[dict[str, Any]]
    chats: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A folder whose every byte was checked."""

    folder: Path
    manifest: Mapping[str, Any]
    manifest_sha256: str

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Raises BundleError for a bundle that is not whole, or that this program cannot run."""
        folder = Path(folder)
        path = folder / "manifest.json"
        if not path.is_file():
            raise BundleError(f"{folder} holds no manifest.json: name the folder that an export has made")
        content = path.read_bytes()
        try:
            manifest = json.loads(content)
            _refuse(manifest)
            for entry in manifest["files"]:
                _check(folder, **entry)
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path} is not as an export writes it ({error!r}): {_COPY_AGAIN}") from error
        return cls(folder=folder, manifest=manifest, manifest_sha256=hashlib.sha256(content).hexdigest())

    @property
    def context(self) -> int:
        """Positions that the cache holds."""
        return int(self.manifest["context"])

    def find(self, name: str) -> Path | None:
        """Where a file lies; None if the manifest lists none of that name."""
        listed = any(entry["path"] == name for entry in self.manifest["files"])
        return self.folder / name if listed else None

    def path(self, name: str) -> Path:
        """Where a file lies that has to be there. Raises BundleError if the manifest lists none of that name."""
        found = self.find(name)
        if found is None:
            raise BundleError(f"the manifest of {self.folder} lists no {name}: export the model again")
        return found

    def read_json(self, name: str) -> Any:
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def goldens(self) -> Goldens:
        content = self.read_json("goldens.json")
        tensors = _read_safetensors(self.path("goldens.safetensors"))
        first, second = content["prefills"]
        return Goldens(
            ids=tensors["ids"].tolist(),
            prefills=(first, second),
            top_ids=tensors["top_ids"],
            top_logits=tensors["top_logits"],
            logsumexp=tensors["logsumexp"],
            prompts=content["prompts"],
            chats=content["chats"],
        )


def _refuse(manifest: Any) -> None:
    if manifest["schema"] != SCHEMA:
        raise BundleError(f"the manifest's schema is {manifest['schema']!r}, this program reads {SCHEMA!r}")
    if manifest["target"] != "onnxruntime":
        raise BundleError(
            f"the bundle is for {manifest['target']}, this program runs onnxruntime: export with --target onnxruntime"
        )
    if (kept_as := manifest["scheme"]["kv_dtype"]) not in CACHES:
        raise BundleError(f"the cache of this bundle holds {kept_as}, this program keeps {' or '.join(CACHES)}")


def _check(folder: Path, *, path: str, bytes: int, sha256: str) -> None:
    """One file of the manifest. Raises BundleError with what was found and what was wanted."""
    file = folder / path
    if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
        raise BundleError(f"{folder} lacks {path}, which its manifest lists: {_COPY_AGAIN}")
    if file.stat().st_size != bytes:
        raise BundleError(f"{path} has {file.stat().st_size:,} bytes, the manifest says {bytes:,}: {_COPY_AGAIN}")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise BundleError(f"{path} has the SHA-256 {found[:12]}…, the manifest says {sha256[:12]}…: {_COPY_AGAIN}")


def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Tensors of the three dtypes that goldens have: a length of 8 bytes, a JSON header, then the data."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: np.frombuffer(content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], dtype)
        .reshape(entry["shape"])
        .astype(dtype[1:])
        for name, entry in header.items()
        if name != "__metadata__" and (dtype := _DTYPES[entry["dtype"]])
    }
