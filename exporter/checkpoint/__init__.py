"""Files on disk -> Checkpoint: what the model is, and its tensors, mapped and never loaded whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from exporter.checkpoint import adapter as lora
from exporter.checkpoint import config, gguf_file, huggingface, meta
from exporter.checkpoint.pruned import with_head_tokens
from exporter.checkpoint.tensors import LazyCodes, LazyTensor
from exporter.files import sha256
from exporter.spec import ModelSpec

__all__ = ["BUNDLED_MODEL", "Checkpoint", "LazyCodes", "LazyTensor", "open_checkpoint", "read_codes", "read_spec"]

BUNDLED_MODEL = Path(__file__).resolve().parents[2] / "samples" / "tiny-llama"
"""The trained model that ships with llama-export, used when no checkpoint is named."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. Nothing in it is ever written to."""

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, LazyTensor]
    described_by: Path
    """What the spec was read from."""
    left_out: str | None = None
    """What of the model is not taken, in a sentence."""

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, in the dtype and shape in which it is stored. Raises InputError."""
        return self.tensors[name].read()

    def __getitem__(self, name: str, /) -> Tensor:
        """As ``read``: like a store, a checkpoint is weights by name."""
        return self.read(name)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of what defines the model: the names and contents of its description and of every weight file, and
        the tokens of a pruned head."""
        files = sorted({self.described_by, *(file for tensor in self.tensors.values() for file in tensor.files)})
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(sha256, files))
        lines = [f"{digest}  {file.name}\n" for digest, file in zip(digests, files, strict=True)]
        if tokens := self.spec.head_tokens:
            lines.append(f"head of {tokens}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """One way in which checkpoints lie on disk."""

    is_it: Callable[[Path], bool]
    read_spec: Callable[[Path, bool], ModelSpec]
    """Of a path, and whether codes are to be decoded."""
    map_tensors: Callable[[Path, ModelSpec], dict[str, LazyTensor]]
    described_by: Callable[[Path], Path]
    """The file that the spec is read from."""
    holds_codes: Callable[[Path], bool]
    """Whether weights may be codes, as the description says: what tells which of them are not wanted otherwise."""
    leaves_out: Callable[[Path], str | None] = lambda _: None
    """What of the model is not taken, in a sentence."""


_FORMATS = (
    _Format(
        is_it=gguf_file.is_gguf,
        read_spec=lambda path, _: gguf_file.read_spec(gguf_file.read_header(path)),
        map_tensors=lambda path, spec: gguf_file.map_tensors(gguf_file.read_header(path), spec),
        described_by=lambda path: gguf_file.read_header(path).file,
        holds_codes=lambda _: True,
    ),
    _Format(
        is_it=meta.is_meta,
        read_spec=lambda folder, decoded: meta.read_spec(folder, decoded=decoded),
        map_tensors=meta.map_tensors,
        described_by=lambda folder: folder / meta.DESCRIPTION,
        leaves_out=meta.leaves_out,
        holds_codes=meta.holds_codes,
    ),
    _Format(
        is_it=lambda _: True,  # whose errors say what was looked for
        read_spec=lambda folder, _: config.read_spec(folder),
        map_tensors=huggingface.map_tensors,
        described_by=lambda folder: folder / huggingface.DESCRIPTION,
        leaves_out=config.leaves_out,
        holds_codes=huggingface.holds_codes,
    ),
)
"""The first that it is counts."""


def read_spec(path: Path, *, decoded: bool = False, images: bool = False, head_tokens: Sequence[int] = ()) -> ModelSpec:
    """What the model of a checkpoint is, read without its weights. ``decoded``: with the adapters merged that codes
    have beside them; ``images``: with all that looks at images; ``head_tokens``: with a head of these tokens alone.
    Raises InputError."""
    spec = _format_of(path).read_spec(path, decoded)
    return with_head_tokens(spec if images else spec.text_alone(), head_tokens)


def read_codes(path: Path, spec: ModelSpec) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint that has codes, from their headers; none of one that has none, whose weights are not
    looked at. Raises InputError."""
    found = _format_of(path)
    return found.map_tensors(path, spec) if found.holds_codes(path) else {}


def open_checkpoint(
    path: Path,
    *,
    adapter: Path | None = None,
    decoded: bool = False,
    images: bool = False,
    head_tokens: Sequence[int] = (),
) -> Checkpoint:
    """Read description and tensor headers of a checkpoint and check them against each other; ``adapter`` is a folder of
    PEFT that is merged in, the rest as for ``read_spec``. Raises InputError."""
    found = _format_of(path)
    spec = read_spec(path, decoded=decoded, images=images, head_tokens=head_tokens)
    tensors = found.map_tensors(path, spec)
    left_out = None if spec.vision else found.leaves_out(path)
    if adapter:
        tensors = lora.with_adapter(tensors, spec, adapter)
        if left_out and lora.leaves_out(adapter, spec):
            left_out += ", and what the adapter adds there"
    folder = path if path.is_dir() else path.parent
    return Checkpoint(
        folder=folder,
        spec=spec,
        tensors=tensors,
        described_by=found.described_by(path),
        left_out=left_out,
    )


def _format_of(path: Path) -> _Format:
    return next(known for known in _FORMATS if known.is_it(path))
