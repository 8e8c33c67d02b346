"""The folder that an app takes: artifact, tokenizer, goldens, and a manifest that accounts for every byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import targets
from exporter.chat import GOLDEN_DATE, find_format
from exporter.checkpoint import Checkpoint
from exporter.checkpoint.config import read_json
from exporter.errors import InputError
from exporter.files import save_tensors, sha256
from exporter.parity import Drive, Floor, GoldenLogits
from exporter.spec import (
    Activations,
    Arithmetic,
    Artifact,
    AttentionSpec,
    CodeKind,
    ExpertSpec,
    FusionSpec,
    ImageSpec,
    KeptCodes,
    Logits,
    Method,
    ModelSpec,
    Precision,
    Prefer,
    Recipe,
    Report,
    RopeKind,
    RopeSpec,
    Rule,
    Sampling,
    WeightScheme,
)
from exporter.tokenizer import CHAT_TEMPLATE, FILES, Tokenizer

SCHEMA = "llama-export/bundle/1"
MANIFEST, GOLDENS, GOLDEN_LOGITS = "manifest.json", "goldens.json", "goldens.safetensors"
CHAT_FORMAT = "chat_format.json"
TOOLS = ("llama-export", "torch", "torchao", "executorch", "coremltools", "onnx", "onnx-ir", "onnxruntime", "gguf")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_EXPORT_AGAIN = "export the bundle again, or copy it again from where it was whole"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goldens:
    """What the model answers, kept with the artifact: enough for an app, or ``validate``, to test it alone."""

    drive: Drive
    logits: GoldenLogits
    floor: Floor
    weight_sha256: Mapping[str, str]
    prompts: Sequence[Mapping[str, Any]]
    """Each with ``text``, its token ``ids``, the reference's ``greedy_ids`` and ``greedy_text``, and how clear each
    choice was: ``greedy_margins``, in logits."""
    chats: Sequence[Mapping[str, Any]]
    """Golden renders of the chat template: each with ``messages``, their ``text``, ready to be answered, and its
    ``ids``."""

    def write(self, folder: Path) -> None:
        tensors = {
            "ids": torch.tensor(self.drive.ids),
            "positions": torch.tensor(self.drive.positions, dtype=torch.int32),
            "top_ids": self.logits.top_ids,
            "top_logits": self.logits.top_logits,
            "logsumexp": self.logits.logsumexp,
        }
        save_tensors(folder / GOLDEN_LOGITS, tensors)
        write_json(
            folder / GOLDENS,
            {
                "prefills": list(self.drive.prefills),
                **self.floor.figures(),
                "prompts": list(self.prompts),
                "chats": list(self.chats),
                "weight_sha256": dict(self.weight_sha256),
            },
        )

    @classmethod
    def read(cls, folder: Path) -> Goldens:
        """Raises InputError for goldens that are missing or broken."""
        content = read_json(folder / GOLDENS)
        try:
            with safe_open(folder / GOLDEN_LOGITS, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("ids", "top_ids", "top_logits", "logsumexp")}
            first, second = content["prefills"]
            return cls(
                drive=Drive(ids=tuple(tensors.pop("ids").tolist()), prefills=(first, second)),
                logits=GoldenLogits(**tensors),
                floor=Floor(mean_kl_nats=content["floor_kl_nats"], worst_kl_nats=content["floor_worst_kl_nats"]),
                weight_sha256=content["weight_sha256"],
                prompts=content["prompts"],
                chats=content.get("chats", ()),  # bundles of version 0.1.0 have none
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: the goldens cannot be read: {error}", hint=_EXPORT_AGAIN) from error


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenizer, chat template and generation config, as they are; and the template as a format, where it can be told
    as one."""
    for name in FILES:
        if (tokenizer.folder / name).exists():
            shutil.copyfile(tokenizer.folder / name, folder / name)
    if tokenizer.chat_template:
        (folder / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
        if found := find_format(partial(tokenizer.render, date=GOLDEN_DATE)):
            write_json(folder / CHAT_FORMAT, asdict(found))


def copy_licences(checkpoint: Checkpoint, folder: Path) -> None:
    """Licence and notices of the source, as they are."""
    for pattern in _LICENCES:
        for path in sorted(checkpoint.folder.glob(pattern)):
            shutil.copyfile(path, folder / path.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """The reports of one artifact. ``audit`` is there where nothing here can run it, ``images`` where it sees them."""

    codes: Report
    audit: Report | None = None
    parity: Report
    images: Report | None = None
    quality: Report
    latency: Report

    def to_json(self) -> dict[str, Any]:
        kinds = ("codes", "audit", "parity", "images", "quality", "latency")
        reports = {name: getattr(self, name) for name in kinds}
        return {name: report.to_json() for name, report in reports.items() if report is not None}


def describe_bundle(
    folder: Path,
    *,
    artifact: Artifact,
    checkpoint: Checkpoint,
    calibration: Mapping[str, Any],
    remarks: Sequence[str],
    verdicts: Verdicts,
) -> dict[str, Any]:
    """The content of ``manifest.json``, over every file of the folder. ``remarks``: what an app has to know of the
    artifact, a sentence each."""
    scheme, arithmetic = artifact.scheme, artifact.arithmetic
    return {
        "schema": SCHEMA,
        "model": _model(artifact.spec),
        "source": {"sha256": checkpoint.sha256},
        "precision": scheme.body.value,
        "scheme": {
            "weights": scheme.body.value,
            "group_size": scheme.group_size,
            "embedding": scheme.embedding.value,
            "head": scheme.head.value,
            "rules": [{"pattern": rule.pattern, "precision": rule.precision.value} for rule in scheme.rules],
            "activations": arithmetic.activations.value,
            "head_activations": arithmetic.head_activations.value if arithmetic.head_activations else None,
            "compute_dtype": arithmetic.compute_dtype,
            "dequantized_dtype": arithmetic.dequantized_dtype,
            "kv_dtype": arithmetic.kv_dtype,
            "product_dtype": arithmetic.product_dtype,
            "angles": arithmetic.angles,
            "group_scale_dtype": arithmetic.group_scale_dtype,
            "row_scale_dtype": arithmetic.row_scale_dtype,
            **({"kept": [_kept(codes) for codes in scheme.kept]} if scheme.kept else {}),
        },
        "context": artifact.context,
        "logits": artifact.logits.value,
        "prefer": artifact.prefer.value,
        "target": artifact.target,
        "backend": artifact.backend,
        "calibration": dict(calibration),
        **({"remarks": list(remarks)} if remarks else {}),
        "files": file_entries(folder),
        **verdicts.to_json(),
        "tools": {name: version(name) for name in TOOLS},
    }


def write_manifest(folder: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """``manifest.json`` over every other file that is now in the folder, and its content."""
    manifest = {**described, "files": file_entries(folder)}
    write_json(folder / MANIFEST, manifest)
    return manifest


def file_entries(folder: Path) -> list[dict[str, Any]]:
    """Path, size and digest of every file below ``folder`` but the manifest itself, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in paths
    ]


def is_bundle(folder: Path) -> bool:
    """Whether the folder holds a manifest of ours."""
    path = folder / MANIFEST
    return path.is_file() and read_json(path).get("schema") == SCHEMA


def open_bundle(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle whose every file is there and whole. Raises InputError naming the first that is not."""
    if not folder.is_dir():
        raise InputError(f"bundle {folder}: no such folder", hint="name the folder that holds manifest.json")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{folder / MANIFEST}: schema is {manifest.get('schema')!r}, {SCHEMA!r} was expected",
            hint="export the bundle with this version of llama-export",
        )
    try:
        listed = {entry["path"]: (entry["bytes"], entry["sha256"]) for entry in manifest["files"]}
    except (KeyError, TypeError) as error:
        raise _broken(folder / MANIFEST, error) from error
    present = {entry["path"]: (entry["bytes"], entry["sha256"]) for entry in file_entries(folder)}
    for path in sorted(listed.keys() | present.keys()):
        if path not in present:
            raise InputError(f"{folder} lacks {path}, which its manifest lists", hint=_EXPORT_AGAIN)
        if path not in listed:
            raise InputError(f"{folder} holds {path}, which its manifest does not list", hint="remove that file")
        for field, wanted, found in zip(("bytes", "sha256"), listed[path], present[path], strict=True):
            if wanted != found:
                raise InputError(f"{folder / path} has {field} {found}, its manifest says {wanted}", hint=_EXPORT_AGAIN)
    return manifest


def label_of(manifest: Mapping[str, Any]) -> str:
    """What ``targets.load`` wants: the label of the target and backend that a manifest names. Raises UsageError."""
    target, _ = targets.split(str(manifest.get("target")))
    _, backend = targets.split(f"{target}-{manifest.get('backend')}")
    return targets.label(target, backend)


def read_artifact(manifest: Mapping[str, Any], *, path: Path) -> Artifact:
    """The artifact that a manifest describes, lying at ``path``. Raises InputError where it describes none."""
    try:
        return _artifact(manifest, path=path)
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path.parent / MANIFEST, error) from error


def read_calibration(manifest: Mapping[str, Any], *, bundle: Path) -> tuple[Recipe, Sampling]:
    """How the codes of a bundle were chosen. Raises InputError where the manifest does not say."""
    try:
        written = manifest["calibration"]
        recipe = written.get("recipe")
        sampling = {key: written[key] for key in ("windows", "window_length", "seed") if key in written}
        if recipe is None:  # floats
            return Recipe(method=Method.ROUND), Sampling()
        return Recipe(**{**recipe, "method": Method(recipe["method"])}), Sampling(**sampling)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _broken(bundle / MANIFEST, error) from error


def _broken(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not as an export writes it: {type(error).__name__} {error}", hint=_EXPORT_AGAIN)


def _artifact(manifest: Mapping[str, Any], *, path: Path) -> Artifact:
    model = {key: value for key, value in manifest["model"].items() if key != "parameters"}
    rope, attention, experts = {**model.pop("rope")}, model.pop("attention", {}), model.pop("experts", None)
    images, fusion = model.pop("images", None), model.pop("fusion", None)
    scheme = manifest["scheme"]
    head_activations = scheme["head_activations"]
    return Artifact(
        target=manifest["target"],
        backend=manifest["backend"],
        path=path,
        spec=ModelSpec(
            **_with_tuples(model),
            rope=RopeSpec(**{**rope, "kind": RopeKind(rope["kind"]), "factors": tuple(rope.get("factors", ()))}),
            attention=AttentionSpec(**_with_tuples(attention)),
            experts=ExpertSpec(**_with_tuples(experts)) if experts else None,
            images=ImageSpec(**_with_tuples(images)) if images else None,
            fusion=FusionSpec(**fusion) if fusion else None,
        ),
        scheme=WeightScheme(
            body=Precision(scheme["weights"]),
            embedding=Precision(scheme["embedding"]),
            head=Precision(scheme["head"]),
            group_size=scheme["group_size"],
            rules=tuple(
                Rule(pattern=rule["pattern"], precision=Precision(rule["precision"]))
                for rule in scheme.get("rules", ())  # bundles of version 0.1.0 have none
            ),
            kept=tuple(
                KeptCodes(
                    kind=CodeKind(
                        source=codes["source"],
                        precision=Precision(codes["precision"]),
                        group_size=codes["group_size"],
                        zero_points=codes["zero_points"],
                        signed_scales=codes["signed_scales"],
                    ),
                    names=tuple(codes["matrices"]),
                )
                for codes in scheme.get("kept", ())
            ),
        ),
        arithmetic=Arithmetic(
            activations=Activations(scheme["activations"]),
            head_activations=Activations(head_activations) if head_activations else None,
            compute_dtype=scheme["compute_dtype"],
            dequantized_dtype=scheme["dequantized_dtype"],
            kv_dtype=scheme["kv_dtype"],
            product_dtype=scheme.get("product_dtype", "fp32"),  # bundles of version 0.1.0 have none of these
            angles=scheme.get("angles", "product"),
            group_scale_dtype=scheme.get("group_scale_dtype", "fp32"),
            row_scale_dtype=scheme.get("row_scale_dtype", "fp32"),
        ),
        context=int(manifest["context"]),
        logits=Logits(manifest["logits"]),
        prefer=Prefer(manifest["prefer"]),
    )


def _with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _with_tuple(value) for name, value in fields.items()}


def _with_tuple(value: Any) -> Any:
    return tuple(_with_tuple(one) for one in value) if isinstance(value, list) else value


def _kept(codes: KeptCodes) -> dict[str, Any]:
    return {**asdict(codes.kind), "matrices": list(codes.names)}


def _model(spec: ModelSpec) -> dict[str, Any]:
    """Without what dense models do not have."""
    model = asdict(spec)
    if not spec.rope.factors:
        del model["rope"]["factors"]
    if spec.attention == AttentionSpec():
        del model["attention"]
    for field in ("experts", "images", "fusion", "layer_numbers", "extra_embeddings", "adapter_rank", "head_tokens"):
        if not model[field]:
            del model[field]
    return {**model, "parameters": spec.parameters}


def write_json(path: Path, content: object) -> None:
    path.write_bytes(as_bytes(content))


def as_bytes(content: object) -> bytes:
    """JSON as every file of a bundle has it: the same content gives the same bytes."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
