"""The only place that knows the order of the stages: ``export`` makes and proves, ``validate`` proves again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import targets
from calibration.layers import Calibration, CalibrationText, quantize
from calibration.sensitivity import meet_budget, meet_kl, open_matrices, refuse_budget
from exporter import interrupt
from exporter.bisect import Bisection, compare_ops
from exporter.bundle import (
    Goldens,
    Verdicts,
    copy_licences,
    copy_tokenizer,
    describe_bundle,
    is_bundle,
    label_of,
    open_bundle,
    read_artifact,
    read_calibration,
    write_json,
    write_manifest,
)
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.codes import weight_digests
from exporter.device import fold, report_of_this_host
from exporter.devices import find_device
from exporter.errors import (
    BudgetError,
    CapacityError,
    ExportError,
    InputError,
    LoweringError,
    MissingToolError,
    ParityError,
    UsageError,
    gravest,
)
from exporter.files import folder_in_progress, put_in_place, written_whole
from exporter.forecast import foresee, refuse_what_does_not_fit
from exporter.html import html
from exporter.images import check_processor, copy_processor, prove_images
from exporter.kept import why_decoded
from exporter.limits import Limits, check_limits
from exporter.memory import give_back_memory
from exporter.model.graph import Graph, Program
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace_program
from exporter.parity import FEW_DECODES, Drive, drive_for
from exporter.prove import (
    ask_reference,
    make_goldens,
    prove_codes,
    prove_latency,
    prove_parity,
    prove_parity_by_goldens,
)
from exporter.quality import MEAN_KL_NATS, evaluation_windows, measure_quality
from exporter.recipe import write_recipe
from exporter.spec import (
    GROUP_SIZES,
    Artifact,
    ModelSpec,
    Plan,
    Precision,
    Progress,
    Report,
    Verdict,
    WeightScheme,
)
from exporter.store import StoreKey, WeightStore
from exporter.texts import Texts, as_recorded, check_recorded, read_texts
from exporter.tokenizer import Tokenizer, open_tokenizer
from targets.base import Target, arithmetic_for, remarks_of, seeing

REPORT = "report.html"
_FAILURES = {
    "codes": ParityError,
    "audit": LoweringError,
    "parity": ParityError,
    "images": ParityError,
    "quality": BudgetError,
    "latency": BudgetError,
}
"""What it means when the verdict of that kind is *failed*."""


_NEEDS_CHECKPOINT = "{} needs the checkpoint: name it with --against"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one target: its manifest with the verdicts, or the error that ended it."""

    target: str
    folder: Path
    manifest: Mapping[str, Any] | None = None
    error: ExportError | None = None
    limits: Mapping[str, Report] = field(default_factory=dict)
    """What ``validate`` was asked to hold beyond the gates of every bundle."""
    errors_by_tensor: Mapping[str, float] = field(default_factory=dict)
    """What quantization lost of each matrix, where the store was at hand (``exporter.store.TensorError``)."""
    bisection: Bisection | None = None
    """Where artifact and reference part, if that was asked."""

    @property
    def exit_code(self) -> int:
        if self.error or self.manifest is None:
            return self.error.exit_code if self.error else 0
        kinds = [kind for kind in _FAILURES if kind in self.manifest]
        failed = [kind for kind in kinds if self.manifest[kind]["verdict"] == Verdict.FAILED]
        codes = [_FAILURES[kind].exit_code for kind in failed]
        if self.bisection and self.bisection.partings:
            codes.append(ParityError.exit_code)
        if any(report.verdict is Verdict.FAILED for report in self.limits.values()):
            codes.append(BudgetError.exit_code)
        return gravest(codes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a model was turned into once, for every target to use."""

    plan: Plan
    tokenizer: Tokenizer
    texts: Texts
    store: WeightStore
    program: Program

    @property
    def graph(self) -> Graph:
        """What text goes through."""
        return self.program.text


def export(plan: Plan, progress: Progress) -> list[Outcome]:
    """Quantize once, trace once, lower for every target of the plan, and prove each artifact.

    Raises ExportError for what concerns all targets; what concerns one of them is in its outcome, and the others go on.
    """
    progress.stage("reading the checkpoint")
    checkpoint = _open(plan)
    if checkpoint.left_out:
        progress.note(checkpoint.left_out)
    chosen = {label: targets.load(label) for label in plan.targets}
    refuse_early(plan, checkpoint.spec, chosen)
    if why := why_decoded(checkpoint.tensors, plan):
        progress.note(why)
    tokenizer = open_tokenizer(plan.checkpoint, cache=plan.store)
    tokenizer.refuse_beyond(checkpoint.spec.num_embeddings)

    progress.stage("tracing")
    program = trace_program(checkpoint.spec)
    material = _quantize(plan, checkpoint, tokenizer, program, progress=progress)

    progress.stage("quality: reference against full precision")
    quality = _quality_by_target(chosen, material, progress=progress)

    return [
        _export_one(label, target, material, quality=quality[label], progress=progress)
        for label, target in chosen.items()
    ]


def _open(plan: Plan) -> Checkpoint:
    return open_checkpoint(
        plan.checkpoint,
        adapter=plan.adapter,
        decoded=not plan.scheme.kept,
        images=plan.images,
        head_tokens=plan.head_tokens,
    )


def _quantize(
    plan: Plan,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    program: Program,
    *,
    recorded: Mapping[str, Any] | None = None,
    progress: Progress,
) -> Material:
    """Read the texts of the plan, and find or make its store; the one that a bundle was made from, if that is what its
    manifest has ``recorded``."""
    progress.stage("reading the text")
    graph = program.text
    texts = read_texts(plan, checkpoint=checkpoint, tokenizer=tokenizer, graph=graph, progress=progress)
    if recorded:
        texts = as_recorded(texts, recorded, corpus=plan.corpus)
    if texts.calibration and (plan.budget_bytes or plan.max_kl_nats):
        plan, texts = _mix_precisions(plan, texts, texts.calibration, checkpoint, graph, progress=progress)
    calibration = None
    if texts.calibration:
        calibration = Calibration(recipe=plan.recipe, text=texts.calibration, graph=graph)
    store, made = quantize(checkpoint, plan.scheme, root=plan.store, calibration=calibration, progress=progress)
    if recorded:
        check_recorded(store.calibration_facts(), recorded)
    if store.is_summed_up and not made:
        progress.note(f"reused the quantized weights in {store.folder}")
    return Material(plan=plan, tokenizer=tokenizer, texts=texts, store=store, program=program)


def _mix_precisions(
    plan: Plan,
    texts: Texts,
    text: CalibrationText,
    checkpoint: Checkpoint,
    graph: Graph,
    *,
    progress: Progress,
) -> tuple[Plan, Texts]:
    """The plan with rules for what is to be int8, chosen by what int4 is measured to cost on the calibration text.

    Text and measurements are kept where the plan without those rules has its store, so that a run that was killed, or
    one with another budget, finds them.
    """
    key = StoreKey(source_sha256=checkpoint.sha256, scheme=plan.scheme, recipe=plan.recipe, text=text.identity)
    base = WeightStore(checkpoint=checkpoint, key=key, root=plan.store)
    if not base.windows_file.exists():
        base.write_windows(text.windows())
    measured = (checkpoint, graph, plan.scheme, base.read_windows())
    keep = base.folder / "sensitivity.json"
    if plan.budget_bytes:
        rules = meet_budget(*measured, budget_bytes=plan.budget_bytes, progress=progress, keep=keep)
    else:
        assert plan.max_kl_nats is not None  # one of them is asked for
        rules = meet_kl(*measured, max_kl_nats=plan.max_kl_nats, progress=progress, keep=keep)
    read_again = replace(text, windows=base.read_windows)
    return replace(plan, scheme=replace(plan.scheme, rules=rules)), replace(texts, calibration=read_again)


def _export_one(label: str, target: Target, material: Material, *, quality: Report, progress: Progress) -> Outcome:
    """Lower and prove one target, and put its bundle in place: as ``<label>``, or as ``<label>.failed``."""
    out = material.plan.out
    good, bad = out / label, out / f"{label}.failed"
    with folder_in_progress(out, label) as folder:
        try:
            manifest = _make_bundle(label, target, material, folder, quality=quality, progress=progress)
            outcome = Outcome(target=label, folder=good, manifest=manifest)
        except ExportError as error:
            interrupt.check()  # then the others are not to go on
            write_json(folder / "failure.json", {"error": str(error), "hint": error.hint, "exit_code": error.exit_code})
            outcome = Outcome(target=label, folder=bad, error=error)
        if outcome.exit_code:
            put_in_place(folder, bad)
            return replace(outcome, folder=bad)
        put_in_place(folder, good)
        if bad.exists():
            shutil.rmtree(bad)  # it was of an earlier run
        return outcome


def _make_bundle(
    label: str, target: Target, material: Material, folder: Path, *, quality: Report, progress: Progress
) -> dict[str, Any]:
    """Fill ``folder`` with the artifact, its goldens and a manifest with its verdicts; give the manifest."""
    material, remarks = _as_taken(label, material)
    plan, graph = material.plan, material.graph
    store = material.store.as_computed(arithmetic_for(target, plan))
    progress.stage(f"{label}: lowering")
    artifact = target.lower(material.program.decoder, store, plan, folder)
    remarks += remarks_of(target, artifact)
    for remark in remarks:
        progress.note(f"{label}: {remark}")
    vision, seen = material.program.vision, artifact.spec.vision
    if vision and seen:
        seeing(target).lower_vision(vision, store, plan, folder)
        copy_processor(store.checkpoint.folder, folder, seen)
    copy_tokenizer(material.tokenizer, folder)
    copy_licences(store.checkpoint, folder)
    write_recipe(folder, plan, target=label)
    if graph.spec.is_large:
        give_back_memory()

    progress.stage(f"{label}: reference")
    steps = drive_for(material.texts.evaluation, context=plan.context)
    if target.is_slow(graph.spec):
        steps = steps.decoding(FEW_DECODES)
    answers = ask_reference(graph, store, artifact, steps)
    goldens = make_goldens(answers, graph=graph, store=store, artifact=artifact, tokenizer=material.tokenizer)
    goldens.write(folder)
    if graph.spec.is_large:
        give_back_memory()

    progress.stage(f"{label}: codes")
    codes = prove_codes(target, artifact, expected=goldens.weight_sha256)
    progress.stage(f"{label}: parity")
    parity = prove_parity(target, artifact, answers, graph=graph, store=store, plan=plan)
    images = _images(target, artifact, material, steps, progress=progress)
    audit = target.audit(artifact)
    progress.stage(f"{label}: latency")
    latency = prove_latency(target, artifact, ids=material.texts.evaluation, threads=plan.threads)

    verdicts = Verdicts(codes=codes, audit=audit, parity=parity, images=images, quality=quality, latency=latency)
    calibration = store.calibration_facts() | _rounded_scales(store, artifact, label=label, progress=progress)
    if material.texts.calibration:
        calibration |= {"seed": plan.sampling.seed, "evaluation_overlap": material.texts.overlap}
    described = describe_bundle(
        folder,
        artifact=artifact,
        checkpoint=store.checkpoint,
        calibration=calibration,
        remarks=remarks,
        verdicts=verdicts,
    )
    outcome = Outcome(target=label, folder=folder, manifest=described, errors_by_tensor=_errors_by_tensor(store))
    (folder / REPORT).write_text(html([outcome]), encoding="utf-8")
    return write_manifest(folder, described)


def _as_taken(label: str, material: Material) -> tuple[Material, list[str]]:
    """What a target can take of it, and what it leaves out, in sentences."""
    spec = material.graph.spec
    if not spec.extra_embeddings or label not in targets.EMBEDDINGS_OF_THE_HEAD:
        return material, []
    program = trace_program(spec.without_extra_embeddings())
    remark = (
        f"of the embedding the {spec.vocab_size} rows are taken that the head has too; tokens from {spec.vocab_size} "
        "on, an image's among them, cannot be fed"
    )
    return replace(material, program=program, store=material.store.without_extra_embeddings()), [remark]


def _images(
    target: Target, artifact: Artifact, material: Material, steps: Drive, *, progress: Progress
) -> Report | None:
    if artifact.spec.vision is None:
        return None
    progress.stage("an image")
    store = material.store.as_computed(artifact.arithmetic)
    return prove_images(
        seeing(target), artifact, program=material.program, store=store, plan=material.plan, steps=steps
    )


def _rounded_scales(store: WeightStore, artifact: Artifact, *, label: str, progress: Progress) -> dict[str, Any]:
    """Of scales that the checkpoint has and the target does not hold as they are, for the manifest."""
    rounded = store.rounded_scales
    if not rounded:
        return {}
    arithmetic, largest = artifact.arithmetic, max(rounded.values())
    dtypes = sorted({arithmetic.group_scale_dtype, arithmetic.row_scale_dtype} - {"fp32"})
    progress.note(
        f"{label}: the scales of {len(rounded)} matrices are rounded to {' or '.join(dtypes)}, by {largest:.2g} of "
        "their size at most; every code is as it was"
    )
    return {"rounded_scales": {"dtypes": dtypes, "tensors": len(rounded), "largest_change": largest}}


def validate(
    bundle: Path,
    *,
    against: Path | None,
    adapter: Path | None = None,
    corpus: str | None,
    corpus_column: str | None,
    store_root: Path,
    evaluation_text: Path | None,
    threads: int,
    limits: Limits,
    bisect: bool,
    compute_units: str | None,
    device_report: Path | None,
    progress: Progress,
) -> Outcome:
    """Prove a bundle again: every byte, then its codes, parity and latency from its own goldens; with the checkpoint
    also both steps of parity, and quality; then the ``limits``. What this host has shown is written as a
    ``device_report``, too. Raises InputError for a bundle that is not whole."""
    if limits.max_mean_kl_nats is not None and against is None:
        raise UsageError(
            "--max-mean-kl bounds quality, which needs the checkpoint", hint="name it with --against, or leave it out"
        )
    if adapter and against is None:
        raise UsageError("--adapter goes with a checkpoint", hint="name it with --against, or leave --adapter out")
    if bisect and against is None:
        raise UsageError("--bisect compares with the checkpoint", hint="name it with --against, or leave --bisect out")
    progress.stage("checksums")
    manifest = open_bundle(bundle)
    label = label_of(manifest)
    target = targets.load(label)
    if missing := target.missing():
        raise _missing(label, missing)
    if compute_units:
        target = target.on(compute_units)
    stood_in = target.latency_unmeasurable() if device_report else None
    if stood_in:
        raise UsageError(f"--device-report-file: {stood_in}", hint="leave it out, or validate on such a device")
    artifact = read_artifact(manifest, path=target.find(bundle))
    if bisect and artifact.spec.vision:
        raise UsageError("--bisect knows no graph that sees images", hint="leave --bisect out")
    goldens = Goldens.read(bundle)
    images = None
    if against is None:
        material = None
        if artifact.spec.vision:
            images = Report(
                verdict=Verdict.NOT_MEASURED,
                reason=_NEEDS_CHECKPOINT.format("an image"),
                figures=dict.fromkeys(("structure_max_abs_logit_diff", "mean_kl_nats")),
            )
        codes, parity, quality = _prove_alone(target, artifact, goldens, threads=threads, progress=progress)
    else:
        recipe, sampling = read_calibration(manifest, bundle=bundle)
        plan = Plan(
            checkpoint=against,
            adapter=adapter,
            head_tokens=artifact.spec.head_tokens,
            targets=(label,),
            scheme=artifact.scheme,
            context=artifact.context,
            logits=artifact.logits,
            prefer=artifact.prefer,
            images=artifact.spec.vision is not None,
            kv_cache=Precision.INT8 if artifact.arithmetic.kv_dtype in targets.INT8_CACHES.values() else None,
            recipe=recipe,
            sampling=sampling,
            corpus=corpus,
            corpus_column=corpus_column,
            out=bundle,
            store=store_root,
            evaluation_text=evaluation_text,
            threads=threads,
        )
        progress.stage("reading the checkpoint")
        checkpoint = _open(plan)
        _check_source(manifest, checkpoint, bundle=bundle)
        tokenizer, program = Tokenizer(bundle), trace_program(checkpoint.spec)
        material, _ = _as_taken(
            label,
            _quantize(plan, checkpoint, tokenizer, program, recorded=manifest["calibration"], progress=progress),
        )
        codes, parity, quality = _prove_against(material, target, artifact, goldens, progress=progress)
        images = _images(target, artifact, material, goldens.drive, progress=progress)
    bisection = None
    if bisect and material:
        progress.stage("bisecting")
        bisection = _bisect(target, artifact, material, goldens)
    progress.stage("latency")
    latency = prove_latency(target, artifact, ids=goldens.drive.ids, threads=threads)
    audit = target.audit(artifact)
    verdicts = Verdicts(codes=codes, audit=audit, parity=parity, images=images, quality=quality, latency=latency)
    proven = {**manifest, **verdicts.to_json()}
    if device_report:
        with written_whole(device_report) as temporary:
            write_json(temporary, report_of_this_host(bundle, proven))
    return Outcome(
        target=label,
        folder=bundle,
        manifest=proven,
        limits=check_limits(proven, limits),
        errors_by_tensor=_errors_by_tensor(material.store) if material else {},
        bisection=bisection,
    )


def validate_device(bundle: Path, report: Path, *, limits: Limits, progress: Progress) -> Outcome:
    """Judge what a device said of a bundle, and keep it in the manifest. The outcome has the device's parity and
    latency in place of this host's. Raises InputError as ``exporter.device.fold``."""
    progress.stage("device report")
    entry = fold(bundle, report)
    manifest = open_bundle(bundle)
    proven = {**manifest, "parity": entry["parity"], "latency": entry["latency"]}
    return Outcome(target=label_of(manifest), folder=bundle, manifest=proven, limits=check_limits(proven, limits))


def _bisect(target: Target, artifact: Artifact, material: Material, goldens: Goldens) -> Bisection:
    """Over the first prefill of the goldens and one token after it."""
    graph, drive = material.graph, goldens.drive
    first = drive.prefills[0]
    calls = {"prefill": drive.ids[:first], "decode": drive.ids[first : first + 1]}
    observation = target.observe(artifact, graph=graph, calls=[*calls.values()], threads=material.plan.threads)
    store = material.store.as_computed(artifact.arithmetic)
    return compare_ops(observation, graph, store, calls=calls)


def _errors_by_tensor(store: WeightStore) -> dict[str, float]:
    """Empty for floats, of which nothing was lost but their last places."""
    return {name: error.stored for name, error in store.read_errors().items()} if store.scheme.body.bits else {}


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
        reason=_NEEDS_CHECKPOINT.format("quality"),
        figures=dict.fromkeys(("mean_kl_nats", "p99_kl_nats", "top1_agreement", "perplexity")),
    )
    return codes, parity, quality


def _prove_against(
    material: Material, target: Target, artifact: Artifact, goldens: Goldens, *, progress: Progress
) -> tuple[Report, Report, Report]:
    """Codes, parity and quality against a reference with the checkpoint's own weights, calibrated as recorded."""
    store, graph = material.store.as_computed(artifact.arithmetic), material.graph
    progress.stage("codes")
    codes = prove_codes(target, artifact, expected=weight_digests(store))
    progress.stage("parity")
    answers = ask_reference(graph, store, artifact, goldens.drive)
    parity = prove_parity(target, artifact, answers, graph=graph, store=store, plan=material.plan)
    progress.stage("quality")
    (label,) = material.plan.targets
    quality = _quality_by_target({label: target}, material, progress=progress)[label]
    return codes, parity, quality


def refuse_early(plan: Plan, spec: ModelSpec, chosen: Mapping[str, Target]) -> None:
    """Everything that can be known to fail before any work is done. Raises UsageError, InputError, MissingToolError or
    CapacityError."""
    if plan.context > spec.max_position_embeddings:
        raise UsageError(
            f"--context {plan.context} is more than the {spec.max_position_embeddings} positions of this model",
            hint=f"take --context {spec.max_position_embeddings} or less",
        )
    if plan.images:
        _refuse_images(plan, spec)
    _refuse_groups(plan.scheme, spec)
    if plan.budget_bytes or plan.max_kl_nats:
        open_matrices(spec, plan.scheme)
    if plan.budget_bytes:
        refuse_budget(spec, plan.scheme, budget_bytes=plan.budget_bytes)
    for label, target in chosen.items():
        if reason := targets.refusal(label, target, spec, plan):
            raise UsageError(f"target {label}: {reason}", hint="leave this target out, or change the option")
        if missing := target.missing():
            raise _missing(label, missing)
    if plan.device:
        device = find_device(plan.device)
        refuse_what_does_not_fit(foresee(plan, spec, device), device)
    _refuse_folder(plan)
    _refuse_full_disk(plan, spec)


def _refuse_images(plan: Plan, spec: ModelSpec) -> None:
    if spec.vision is None:
        raise UsageError("--images: this model sees none, or it is not known how", hint="leave --images out")
    if plan.budget_bytes or plan.max_kl_nats:
        raise UsageError(
            "--images: what a matrix costs is measured on text, which some of these never see",
            hint="leave --budget-mb and --max-kl out, or take --rule",
        )
    check_processor(plan.checkpoint, spec.vision)


def _missing(label: str, reason: str) -> MissingToolError:
    return MissingToolError(f"target {label}: {reason}", hint="install it; llama-export doctor lists all that is there")


def _refuse_groups(scheme: WeightScheme, spec: ModelSpec) -> None:
    for name, shape in spec.weights().items():
        if len(shape) == 2 and shape[1] % scheme.groups(name, columns=shape[1]):
            fitting = [*(size for size in GROUP_SIZES if shape[1] % size == 0), "row"]
            raise UsageError(
                f"--group-size {scheme.group_size} does not divide the {shape[1]} columns of {name}",
                hint=f"take --group-size {' or '.join(map(str, fitting))}",
            )


def _refuse_folder(plan: Plan) -> None:
    """The output folder may hold our own bundles of an earlier run, which are replaced, and nothing else; but for what
    a run that was killed outright may have left hidden there, which is passed over."""
    if plan.out.exists() and not plan.out.is_dir():
        raise InputError(f"output {plan.out} is a file, a folder was expected", hint="name another folder with -o")
    known = {f"{label}{suffix}" for label in targets.LABELS for suffix in ("", ".failed")}
    left_over = tuple(f".{label}." for label in targets.LABELS)
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
    bits = {Precision.FP32: 32, Precision.FP16: 16, Precision.INT8: 9, Precision.INT4: 5, Precision.LUT4: 5}
    size = sum(math.prod(shape) * bits[plan.scheme.precision(name)] // 8 for name, shape in spec.weights().items())
    for folder, copies in ((plan.out, len(plan.targets)), (plan.store, 1 if plan.scheme.body.bits else 0)):
        existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        if free < copies * size:
            raise CapacityError(
                f"{folder} has {free / 1e6:.0f} MB free, about {copies * size / 1e6:.0f} MB are needed",
                hint="free some space, or name another place with -o or --store",
            )


def _quality_by_target(chosen: Mapping[str, Target], material: Material, *, progress: Progress) -> dict[str, Report]:
    """Before anything is lowered: it depends on codes and arithmetic alone."""
    store, graph, checkpoint = material.store, material.graph, material.store.checkpoint
    passes, layers = len(chosen) + 1, count(1)
    return measure_quality(
        evaluation_windows(material.texts.evaluation, bos=graph.spec.bos_token_id, context=material.plan.context),
        truth=Reference(graph, checkpoint, FULL_PRECISION, keep_bytes=0),
        candidates={
            label: Reference(graph, store.as_computed(arithmetic), arithmetic, keep_bytes=0)
            for label, target in chosen.items()
            for arithmetic in [arithmetic_for(target, material.plan)]
        },
        budget_nats=material.plan.max_kl_nats or MEAN_KL_NATS[store.scheme.body],
        on_layer=lambda: progress.advance(next(layers), passes * graph.spec.num_hidden_layers),
    )


def _check_source(manifest: Mapping[str, Any], checkpoint: Checkpoint, *, bundle: Path) -> None:
    made_from = manifest["source"]["sha256"]
    if made_from != checkpoint.sha256:
        raise InputError(
            f"{bundle} was made from a checkpoint with sha256 {made_from[:16]}..., "
            f"{checkpoint.folder} has {checkpoint.sha256[:16]}...",
            hint="name the checkpoint that the bundle was made from",
        )
