"""A bundle as an app's loader wants it: exactly the files that it reads, under its names; as a folder or a zip."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import targets
from exporter.bundle import MANIFEST, as_bytes, label_of, open_bundle, read_artifact
from exporter.checkpoint.config import read_json
from exporter.errors import InputError, UsageError
from exporter.files import folder_in_progress, put_in_place, written_whole
from exporter.spec import Artifact, ModelSpec
from exporter.tokenizer import CHAT_TEMPLATE

ZIP_ALIGNMENT = 16384
"""Bytes: each file in a zip begins at a multiple of it, so that it can be mapped where it lies. Pages of current
Android and Apple systems have as many (Android's ``zipalign -P 16``)."""

ZIP64_BYTES = 1 << 31
"""A file of that size or more has its size in a field of 64 bits."""

_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
_ALIGNING = 0xD935
"""Header of an extra field that only fills space: Android's own, ignored by readers of zip files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """What one loader reads. ``files`` are copied from the bundle; ``written`` are made from it, and what ``converted``
    gives is made from its artifact in a folder that it is told."""

    targets: tuple[str, ...]
    """Labels (``targets.label``)."""
    files: tuple[str, ...]
    written: Mapping[str, Callable[[Path, ModelSpec], Any]]
    optional: tuple[str, ...] = ()
    converted: Callable[[Artifact, Path], tuple[Path, ...]] | None = None


def _as_ort(artifact: Artifact, folder: Path) -> tuple[Path, ...]:
    from targets.onnxruntime.ort_format import write_ort

    return write_ort(artifact, folder)


def _with_template(bundle: Path, _spec: ModelSpec) -> dict[str, Any]:
    """``tokenizer_config.json`` with the chat template in it, where readers older than the separate file look."""
    config = read_json(bundle / "tokenizer_config.json")
    template = bundle / CHAT_TEMPLATE
    if not template.exists():
        raise InputError(
            f"{bundle} has no chat template, which this loader needs", hint="export a checkpoint of a chat model"
        )
    return {**config, "chat_template": template.read_text(encoding="utf-8")}


def _config(bundle: Path, spec: ModelSpec) -> dict[str, Any]:
    """What a reader of Hugging Face folders wants to know of the model before it looks for a tokenizer."""
    stops = list(spec.eos_token_ids)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": read_json(bundle / MANIFEST)["context"],
    }


_TOKENIZER = ("tokenizer.json",)
LOADERS: Mapping[str, Loader] = {
    # LlmModuleConfig.modulePath and .tokenizerPath (org.pytorch:executorch-android): any two paths.
    "executorch-android": Loader(targets=("executorch",), files=("model.pte", *_TOKENIZER), written={}),
    # TextLLMRunner(modelPath:tokenizerPath:specialTokens:) of executorch_llm: likewise.
    "executorch-ios": Loader(targets=("executorch",), files=("model.pte", *_TOKENIZER), written={}),
    # useLLM({model: {modelSource, tokenizerSource, tokenizerConfigSource}}): reads chat_template and the names of the
    # special tokens from the last of them.
    "react-native-executorch": Loader(
        targets=("executorch",),
        files=("model.pte", *_TOKENIZER),
        written={"tokenizer_config.json": _with_template},
    ),
    # og.Model(folder): genai_config.json names the model file; og.Tokenizer reads the rest.
    "onnxruntime-genai": Loader(
        targets=("onnxruntime",),
        files=("genai_config.json", "model.onnx", "model.onnx.data", *_TOKENIZER),
        written={"tokenizer_config.json": _with_template},
        optional=(CHAT_TEMPLATE,),
    ),
    # A minimal build of ONNX Runtime, made for the operators that the second file lists.
    "onnxruntime-mobile": Loader(targets=("onnxruntime",), files=_TOKENIZER, written={}, converted=_as_ort),
    # AutoTokenizer.from(modelFolder:) and LanguageModel.loadCompiled(url:), which want config.json beside the others.
    "swift-transformers": Loader(
        targets=("coreml",),
        files=("model.mlpackage", *_TOKENIZER),
        written={"tokenizer_config.json": _with_template, "config.json": _config},
        optional=("generation_config.json",),
    ),
    # llama_model_load_from_file(path), llama-cli -m, Ollama's FROM, LM Studio: the tokenizer and template are inside.
    "llama.cpp": Loader(targets=("gguf",), files=("model.gguf",), written={}),
}
"""Names of ``--for``, with the calls that read the files. The tests run onnxruntime-genai and ExecuTorch's
TextLLMRunner, which both phones' classes wrap, on what is written here; readers in Swift and JavaScript they cannot."""


def pack(bundle: Path, *, loader: str | None, out: Path, zipped: bool) -> list[Path]:
    """Write the folder ``out``, or the zip of that name, for ``loader``, or with all of the bundle. Gives its files.

    Raises UsageError for an unknown loader or one of another target, InputError for a bundle that is not whole or lacks
    what the loader needs. Whole or not at all.
    """
    if loader is not None and loader not in LOADERS:
        raise UsageError(f"--for {loader} is unknown; known: {', '.join(LOADERS)}", hint="choose one with --for")
    manifest = open_bundle(bundle)
    if loader is None and not zipped:
        raise UsageError("the bundle is a folder already", hint="say --for which loader, or --zip")
    if bundle.resolve() in out.resolve().parents:
        raise UsageError(f"{out} is inside the bundle, which holds what its manifest lists", hint="name another --out")
    if out.exists() and (zipped or any(out.iterdir() if out.is_dir() else [out])):
        raise UsageError(f"{out} is there already", hint="remove it, or name another --out")
    with folder_in_progress(out.parent, f"{out.name}.converted") as scratch:
        contents = _contents(bundle, loader=loader, manifest=manifest, scratch=scratch)
        if zipped:
            with written_whole(out) as temporary:
                write_zip(temporary, contents)
        else:
            _write_folder(out, contents)
    return list(contents)


def _write_folder(out: Path, contents: Mapping[Path, Path | bytes]) -> None:
    with folder_in_progress(out.parent, out.name) as folder:
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:  # no hard link: readers of ONNX refuse weights that have a second name
                shutil.copyfile(content, folder / name)
        if out.exists():
            out.rmdir()
        put_in_place(folder, out)


def _contents(
    bundle: Path, *, loader: str | None, manifest: Mapping[str, Any], scratch: Path
) -> dict[Path, Path | bytes]:
    """Each file by its name, sorted: where it lies in the bundle, or what is written for the loader. ``scratch`` is
    where artifacts are converted."""
    if loader is None:
        return {name: bundle / name for name in sorted(_files(bundle))}
    wanted = LOADERS[loader]
    if (label := label_of(manifest)) not in wanted.targets:
        raise UsageError(
            f"{bundle} was made for {label}, {loader} loads {' or '.join(wanted.targets)}",
            hint=f"export with --target {wanted.targets[0]}",
        )
    artifact = read_artifact(manifest, path=targets.load(label).find(bundle))
    spec = artifact.spec
    if spec.vision:
        raise UsageError(
            f"{bundle} takes images, {loader} knows no decoder with such inputs",
            hint="export without --images, or take the whole bundle with --zip",
        )
    contents: dict[Path, Path | bytes] = {}
    for name in (*wanted.files, *wanted.optional):
        source = bundle / name
        if not source.exists() and name not in wanted.optional:
            raise InputError(f"{bundle} has no {name}, which {loader} needs", hint="export the bundle again")
        inside = _files(source) if source.is_dir() else [Path()] if source.exists() else []
        contents |= {name / path: source / path for path in inside}
    contents |= {Path(name): as_bytes(make(bundle, spec)) for name, make in wanted.written.items()}
    if wanted.converted:
        contents |= {Path(path.name): path for path in wanted.converted(artifact, scratch)}
    return dict(sorted(contents.items()))


def _files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def write_zip(path: Path, contents: Mapping[Path, Path | bytes]) -> None:
    """Files, or what is to be in them, stored, not deflated, each at a multiple of ``ZIP_ALIGNMENT``; the same contents
    give the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        assert archive.fp is not None
        for name, content in contents.items():
            info = zipfile.ZipInfo(name.as_posix(), date_time=_ZIP_DATE)
            info.external_attr = 0o644 << 16
            large = not isinstance(content, bytes) and content.stat().st_size >= ZIP64_BYTES
            header = 30 + len(name.as_posix().encode()) + (20 if large else 0)  # a zip64 field of sizes comes with it
            padding = -(archive.fp.tell() + header + 4) % ZIP_ALIGNMENT
            info.extra = _ALIGNING.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)
            with archive.open(info, "w", force_zip64=large) as destination:
                if isinstance(content, bytes):
                    destination.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, destination, 1 << 20)
