"""The only place that knows the order of the stages: ``export`` makes and proves, ``validate`` proves again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import targets
from calibration.layers import ALGORITHM, quantize
from exporter import interrupt
from exporter.bundle import (
    Goldens,
    Verdicts,
    copy_tokenizer,
    is_bundle,
    open_bundle,
    read_artifact,
    write_json,
    write_manifest,
)
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.codes import weight_digests
from exporter.errors import BudgetError, CapacityError, ExportError, InputError, ParityError, UsageError, gravest
from exporter.files import folder_in_progress, put_in_place
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, KEEP_BYTES, Reference
from exporter.model.trace import trace
from exporter.parity import drive_for
from exporter.prove import (
    ask_reference,
    make_goldens,
    prove_codes,
    prove_latency,
    prove_parity,
    prove_parity_by_goldens,
)
from exporter.quality import evaluation_windows, measure_quality
from exporter.spec import Artifact, ModelSpec, Plan, Precision, Report, Verdict, WeightScheme
from exporter.store import StoreKey, WeightStore
from exporter.tokenizer import Tokenizer
from targets.base import Target

_FULL = WeightScheme(body=Precision.FP32, embedding=Precision.FP32, head=Precision.FP32, group_size=32)
_FAILURES = {"codes": ParityError, "parity": ParityError, "quality": BudgetError, "latency": BudgetError}
"""What it means when the verdict of that kind is *failed*."""


class Progress(Protocol):
    """Whoever wants to know how far a run is."""

    def stage(self, title: str) -> None:
        """A new stage begins; the one before it is done."""

    def advance(self, done: int, total: int) -> None:
        """So many of so many steps of this stage are done."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one target: its manifest with the verdicts, or the error that ended it."""

    target: str
    folder: Path
    manifest: Mapping[str, Any] | None = None
    error: ExportError | None = None

    @property
    def exit_code(self) -> int:
        if self.error or self.manifest is None:
            return self.error.exit_code if self.error else 0
        failed = [kind for kind in _FAILURES if self.manifest[kind]["verdict"] == Verdict.FAILED]
        return gravest(_FAILURES[kind].exit_code for kind in failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a model was turned into once, for every target to use."""

    plan: Plan
    tokenizer: Tokenizer
    text_ids: list[int]
    """The evaluation text, tokenized."""
    store: WeightStore
    graph: Graph


def export(plan: Plan, progress: Progress) -> list[Outcome]:
    """Quantize once, trace once, lower for every target of the plan, and prove each artifact.

    Raises ExportError for what concerns all targets; what concerns one of them is in its outcome, and the others go on.
    """
    progress.stage("reading the checkpoint")
    checkpoint = open_checkpoint(plan.checkpoint)
    tokenizer = Tokenizer(checkpoint.folder)
    chosen = [targets.load(name) for name in plan.targets]
    refuse_early(plan, checkpoint.spec, chosen)
    text_ids = _read_evaluation_text(plan.evaluation_text, tokenizer, spec=checkpoint.spec)

    progress.stage(f"quantizing to {plan.scheme.body}" if plan.scheme.body.bits else "weights stay floats")
    store, made = quantize(checkpoint, plan.scheme, root=plan.store, on_part=progress.advance)
    if plan.scheme.body.bits and not made:
        progress.note(f"reused the quantized weights in {store.folder}")

    progress.stage("tracing")
    graph = trace(checkpoint.spec)
    material = Material(plan=plan, tokenizer=tokenizer, text_ids=text_ids, store=store, graph=graph)

    progress.stage("quality: reference against full precision")
    quality = _quality_by_target(chosen, material, progress=progress)

    return [_export_one(target, material, quality=quality[target.name], progress=progress) for target in chosen]


def _export_one(target: Target, material: Material, *, quality: Report, progress: Progress) -> Outcome:
    """Lower and prove one target, and put its bundle in place: as ``<target>``, or as ``<target>.failed``."""
    out = material.plan.out
    good, bad = out / target.name, out / f"{target.name}.failed"
    with folder_in_progress(out, target.name) as folder:
        try:
            manifest = _make_bundle(target, material, folder, quality=quality, progress=progress)
            outcome = Outcome(target=target.name, folder=good, manifest=manifest)
        except ExportError as error:
            interrupt.check()  # then the others are not to go on
            write_json(folder / "failure.json", {"error": str(error), "hint": error.hint, "exit_code": error.exit_code})
            outcome = Outcome(target=target.name, folder=bad, error=error)
        if outcome.exit_code:
            put_in_place(folder, bad)
            return replace(outcome, folder=bad)
        put_in_place(folder, good)
        if bad.exists():
            shutil.rmtree(bad)  # it was of an earlier run
        return outcome


def _make_bundle(
    target: Target, material: Material, folder: Path, *, quality: Report, progress: Progress
) -> dict[str, Any]:
    """Fill ``folder`` with the artifact, its goldens and a manifest with its four verdicts; give the manifest."""
    plan, store, graph = material.plan, material.store, material.graph
    progress.stage(f"{target.name}: lowering")
    artifact = target.lower(graph, store, plan, folder)
    copy_tokenizer(material.tokenizer, folder)

    progress.stage(f"{target.name}: reference")
    answers = ask_reference(graph, store, artifact, drive_for(material.text_ids, context=plan.context))
    goldens = make_goldens(answers, graph=graph, store=store, artifact=artifact, tokenizer=material.tokenizer)
    goldens.write(folder)

    progress.stage(f"{target.name}: codes")
    codes = prove_codes(target, artifact, expected=goldens.weight_sha256)
    progress.stage(f"{target.name}: parity")
    parity = prove_parity(target, artifact, answers, graph=graph, store=store, plan=plan)
    progress.stage(f"{target.name}: latency")
    latency = prove_latency(target, artifact, ids=material.text_ids, threads=plan.threads)

    verdicts = Verdicts(codes=codes, parity=parity, quality=quality, latency=latency)
    algorithm = ALGORITHM if plan.scheme.body.bits else "none"
    return write_manifest(
        folder, artifact=artifact, checkpoint=store.checkpoint, algorithm=algorithm, verdicts=verdicts
    )


def validate(
    bundle: Path,
    *,
    against: Path | None,
    store_root: Path,
    evaluation_text: Path,
    threads: int,
    progress: Progress,
) -> Outcome:
    """Prove a bundle again: every byte, then its codes, parity and latency from its own goldens; with the checkpoint
    also both steps of parity, and quality. Raises InputError for a bundle that is not whole."""
    progress.stage("checksums")
    manifest = open_bundle(bundle)
    target = targets.load(str(manifest.get("target")))
    artifact = read_artifact(manifest, path=target.find(bundle))
    goldens = Goldens.read(bundle)
    if against is None:
        codes, parity, quality = _prove_alone(target, artifact, goldens, threads=threads, progress=progress)
    else:
        plan = Plan(
            checkpoint=against,
            targets=(artifact.target,),
            scheme=artifact.scheme,
            context=artifact.context,
            logits=artifact.logits,
            out=bundle,
            store=store_root,
            evaluation_text=evaluation_text,
            threads=threads,
        )
        progress.stage("reading the checkpoint")
        checkpoint = open_checkpoint(against)
        _check_source(manifest, checkpoint, bundle=bundle)
        codes, parity, quality = _prove_against(checkpoint, plan, target, artifact, goldens, progress=progress)
    progress.stage("latency")
    latency = prove_latency(target, artifact, ids=goldens.drive.ids, threads=threads)
    verdicts = Verdicts(codes=codes, parity=parity, quality=quality, latency=latency)
    return Outcome(target=target.name, folder=bundle, manifest={**manifest, **verdicts.to_json()})


def _prove_alone(
    target: Target, artifact: Artifact, goldens: Goldens, *, threads: int, progress: Progress
) -> tuple[Report, Report, Report]:
    """Codes, parity and quality, as far as the bundle itself can tell."""
    progress.stage("codes")
    codes = prove_codes(target, artifact, expected=goldens.weight_sha256)
    progress.stage("parity")
    parity = prove_parity_by_goldens(target, artifact, goldens, threads=threads)
    quality = Report(
        verdict=Verdict.NOT_MEASURED,
        reason="quality needs the checkpoint: name it with --against",
        figures=dict.fromkeys(("mean_kl_nats", "p99_kl_nats", "top1_agreement", "perplexity")),
    )
    return codes, parity, quality


def _prove_against(
    checkpoint: Checkpoint, plan: Plan, target: Target, artifact: Artifact, goldens: Goldens, *, progress: Progress
) -> tuple[Report, Report, Report]:
    """Codes, parity and quality against a reference with the checkpoint's own weights."""
    tokenizer = Tokenizer(artifact.path.parent)
    text_ids = _read_evaluation_text(plan.evaluation_text, tokenizer, spec=checkpoint.spec)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store, on_part=progress.advance)
    graph = trace(checkpoint.spec)
    progress.stage("codes")
    codes = prove_codes(target, artifact, expected=weight_digests(store))
    progress.stage("parity")
    answers = ask_reference(graph, store, artifact, goldens.drive)
    parity = prove_parity(target, artifact, answers, graph=graph, store=store, plan=plan)
    progress.stage("quality")
    material = Material(plan=plan, tokenizer=tokenizer, text_ids=text_ids, store=store, graph=graph)
    quality = _quality_by_target([target], material, progress=progress)[target.name]
    return codes, parity, quality


def refuse_early(plan: Plan, spec: ModelSpec, chosen: list[Target]) -> None:
    """Everything that can be known to fail before any work is done. Raises UsageError, InputError or CapacityError."""
    if plan.context > spec.max_position_embeddings:
        raise UsageError(
            f"--context {plan.context} is more than the {spec.max_position_embeddings} positions of this model",
            hint=f"take --context {spec.max_position_embeddings} or less",
        )
    _refuse_groups(plan.scheme, spec)
    for target in chosen:
        reason = target.refuse(spec, plan)
        if reason:
            raise UsageError(f"target {target.name}: {reason}", hint="leave this target out, or change the option")
    _refuse_folder(plan)
    _refuse_full_disk(plan, spec)


def _refuse_groups(scheme: WeightScheme, spec: ModelSpec) -> None:
    for name, shape in spec.weights().items():
        if len(shape) == 2 and scheme.precision(name) is Precision.INT4 and shape[1] % scheme.group_size:
            fitting = [size for size in (32, 64, 128) if shape[1] % size == 0]
            raise UsageError(
                f"--group-size {scheme.group_size} does not divide the {shape[1]} columns of {name}",
                hint=f"take --group-size {' or '.join(map(str, fitting))}" if fitting else "take --precision int8",
            )


def _refuse_folder(plan: Plan) -> None:
    """The output folder may hold our own bundles of an earlier run, which are replaced, and nothing else; but for what
    a run that was killed outright may have left hidden there, which is passed over."""
    if plan.out.exists() and not plan.out.is_dir():
        raise InputError(f"output {plan.out} is a file, a folder was expected", hint="name another folder with -o")
    known = {f"{name}{suffix}" for name in targets.NAMES for suffix in ("", ".failed")}
    left_over = tuple(f".{name}." for name in targets.NAMES)
    for path in sorted(plan.out.iterdir()) if plan.out.exists() else []:
        if path.name.startswith(left_over):
            continue
        ours = path.name in known and path.is_dir()
        whole = path.name.endswith(".failed") or is_bundle(path) if ours else False
        if not whole:
            raise InputError(
                f"output folder {plan.out} holds {path.name}, which is no bundle of llama-export",
                hint="name a new or empty folder with -o; nothing was written",
            )


def _refuse_full_disk(plan: Plan, spec: ModelSpec) -> None:
    bits = {Precision.FP32: 32, Precision.FP16: 16, Precision.INT8: 9, Precision.INT4: 5}
    size = sum(math.prod(shape) * bits[plan.scheme.precision(name)] // 8 for name, shape in spec.weights().items())
    for folder, copies in ((plan.out, len(plan.targets)), (plan.store, 1 if plan.scheme.body.bits else 0)):
        existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < copies * size:
            raise CapacityError(
                f"{folder} has {free / 1e6:.0f} MB free, about {copies * size / 1e6:.0f} MB are needed",
                hint="free some space, or name another place with -o or --store",
            )


def _read_evaluation_text(path: Path, tokenizer: Tokenizer, *, spec: ModelSpec) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"evaluation text {path}: {error}", hint="name a UTF-8 text file with --eval-text") from error
    ids = tokenizer.encode(text)
    if len(ids) < 256:
        raise InputError(
            f"evaluation text {path} is {len(ids)} tokens, at least 256 are wanted",
            hint="name a longer one with --eval-text",
        )
    if max(ids) >= spec.vocab_size:
        raise InputError(
            f"the tokenizer gives token {max(ids)}, the model's vocabulary ends at {spec.vocab_size - 1}",
            hint="tokenizer.json and weights must be of the same model",
        )
    return ids


def _quality_by_target(chosen: list[Target], material: Material, *, progress: Progress) -> dict[str, Report]:
    """Before anything is lowered: it depends on codes and arithmetic alone."""
    store, graph, checkpoint = material.store, material.graph, material.store.checkpoint
    key = StoreKey(source_sha256=checkpoint.sha256, scheme=_FULL, algorithm="none")
    full = WeightStore(checkpoint=checkpoint, key=key, root=material.plan.store)
    keep_bytes = KEEP_BYTES // (len(chosen) + 1)  # they are all in memory at once
    return measure_quality(
        evaluation_windows(material.text_ids, bos=graph.spec.bos_token_id, context=material.plan.context),
        truth=Reference(graph, full, FULL_PRECISION, keep_bytes=keep_bytes),
        candidates={
            target.name: Reference(graph, store, target.arithmetic(store.scheme), keep_bytes=keep_bytes)
            for target in chosen
        },
        precision=store.scheme.body,
        on_window=progress.advance,
    )


def _check_source(manifest: Mapping[str, Any], checkpoint: Checkpoint, *, bundle: Path) -> None:
    made_from = manifest["source"]["sha256"]
    if made_from != checkpoint.sha256:
        raise InputError(
            f"{bundle} was made from a checkpoint with sha256 {made_from[:16]}..., "
            f"{checkpoint.folder} has {checkpoint.sha256[:16]}...",
            hint="name the checkpoint that the bundle was made from",
        )
