"""Words -> Plan -> pipeline -> a printed report. No work of its own; heavy imports wait until a command runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from exporter import interrupt
from exporter.cli_bundle import JsonOption, ThreadsOption, add_bundle_commands
from exporter.cli_devices import add_device_commands
from exporter.cli_options import (
    CALIBRATION,
    AdapterOption,
    BackendOption,
    CheckpointArgument,
    ColumnOption,
    ContextOption,
    CorpusOption,
    DeviceOption,
    EvalTextOption,
    GroupSizeOption,
    HeadOption,
    HeadTokensOption,
    ImagesOption,
    KvCacheOption,
    PrecisionOption,
    PreferOption,
    RequantizeOption,
    RulesOption,
    StoreOption,
    SystemOption,
    TargetOption,
)
from exporter.errors import ExportError, UsageError, gravest
from exporter.limits import KL_GROWTH, RATE_LOSS, SIZE_GROWTH, Limits, Tolerance
from exporter.reporting import reporting
from exporter.spec import (
    Method,
    Precision,
    Prefer,
)

if TYPE_CHECKING:
    from exporter.pipeline import Outcome
    from exporter.planning import Choices


class DefaultsToExport(TyperGroup):
    """``llama-export CHECKPOINT --target ...`` means ``llama-export export CHECKPOINT --target ...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {"--help", "--version", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["export", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="llama-export",
    cls=DefaultsToExport,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One command from a Llama checkpoint to artifacts for phones, each proven to answer as the model does.\n\n"
    "`llama-export [CHECKPOINT] --target coreml` is short for `llama-export export ...`; with no checkpoint it takes "
    "the small trained model that ships with it.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"llama-export {version('llama-export')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


LIMITS, REPORTS = "Limits", "Reports"


def _limit(name: str, told: str) -> Any:
    return typer.Option(name, min=0.0, help=told, show_default="no limit", rich_help_panel=LIMITS)


def _report(name: str, told: str) -> Any:
    return typer.Option(name, dir_okay=False, help=told, show_default=False, rich_help_panel=REPORTS)


@app.command()
def export(
    checkpoint: CheckpointArgument = None,
    *,
    adapter: AdapterOption = None,
    target: TargetOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    system: SystemOption = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A TOML file of options; those given here come before its own.")
    ] = None,
    precision: PrecisionOption = None,
    prefer: PreferOption = None,
    head: HeadOption = None,
    head_tokens: HeadTokensOption = None,
    group_size: GroupSizeOption = None,
    rules: RulesOption = None,
    budget_mb: Annotated[
        float | None,
        typer.Option(
            "--budget-mb",
            min=0.0,
            help="MB (1e6 bytes) that the weights may take: what int4 hurts most gets int8, as far as they reach.",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            min=0.0,
            help="Mean KL in nats that quantization may cost: what int4 hurts most gets int8. Rounding of activations "
            "alone costs about 5e-4.",
        ),
    ] = None,
    context: ContextOption = None,
    kv_cache: KvCacheOption = None,
    images: ImagesOption = None,
    requantize: RequantizeOption = None,
    logits: Annotated[
        str | None,
        typer.Option("--logits", help="Positions the head answers for: last or all.", show_default="last"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the bundles.")] = Path("llama-export-out"),
    store: StoreOption = None,
    corpus: CorpusOption = None,
    column: ColumnOption = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help=f"How codes are chosen: {', '.join(Method)}.",
            show_default="awq-gptq",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option("--windows", min=1, help="Windows of text.", show_default="32", rich_help_panel=CALIBRATION),
    ] = None,
    window_length: Annotated[
        int | None,
        typer.Option(
            "--window-length",
            min=2,
            help="Tokens of a window.",
            show_default="512, or the model's positions if fewer",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Which windows are drawn.", show_default="0", rich_help_panel=CALIBRATION),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--no-act-order",
            help="GPTQ rounds the columns of most energy first.",
            show_default="act-order",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            "--damping",
            min=0.0,
            max=1.0,
            help="Share of GPTQ's mean Hessian diagonal that is added to it.",
            show_default="0.01",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    eval_text: EvalTextOption = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads a runtime may use while it is measured.", show_default="2"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint for one or more targets, and prove each artifact against the model."""
    with reporting() as progress:
        from exporter.checkpoint import BUNDLED_MODEL, read_spec
        from exporter.checkpoint.pruned import read_head_tokens
        from exporter.forecast import PALETTES_MAY_CRASH
        from exporter.kept import kept_scheme
        from exporter.pipeline import export as run
        from exporter.planning import plan, settle
        from exporter.recipe import asked_for, read_recipe

        if checkpoint is None:
            checkpoint = BUNDLED_MODEL
            progress.note("no checkpoint named: taking the bundled model, tiny-llama")
        choices: Choices = {
            **(read_recipe(recipe) if recipe else {}),
            **asked_for(
                target=target,
                backend=backend,
                device=device,
                os=system,
                precision=precision,
                prefer=prefer,
                head=head,
                head_tokens=read_head_tokens(head_tokens) if head_tokens else None,
                group_size=group_size,
                rule=rules or None,
                budget_mb=budget_mb,
                max_kl=max_kl,
                context=context,
                kv_cache=kv_cache,
                images=images,
                requantize=requantize,
                logits=logits,
                calibration=corpus,
                calibration_column=column,
                method=method,
                windows=windows,
                window_length=window_length,
                seed=seed,
                act_order=act_order,
                damping=damping,
                eval_text=str(eval_text) if eval_text else None,
                threads=threads,
            ),
        }
        if "device" in choices:
            images, requantize = choices.get("images", False), choices.get("requantize", False)
            pruned = choices.get("head_tokens", ())
            spec = read_spec(checkpoint, decoded=requantize, images=images, head_tokens=pruned)
            kept = kept_scheme(checkpoint, choices, spec)
            choices, reasons = settle(choices, spec, kept=kept)
            for reason in reasons:
                progress.note(reason)
        made = plan(checkpoint, adapter=adapter, out=out, store=store, **choices)
        for codes in made.scheme.kept:
            progress.note(f"{len(codes.names)} matrices keep their codes of {codes.kind.source}: {codes.kind}")
        if made.prefer is Prefer.DECODE:
            progress.note(f"--prefer decode: int4 in groups of {made.scheme.group_size or 'a row'}")
        if made.scheme.body is Precision.LUT4:
            progress.note(PALETTES_MAY_CRASH)
        outcomes = run(made, progress)
    _print_outcomes(outcomes, as_json=as_json)


@app.command()
def validate(
    bundle: Annotated[Path, typer.Argument(help="A folder that an export has made.")],
    *,
    against: Annotated[
        Path | None, typer.Option("--against", help="The checkpoint it was made from: proves codes and quality too.")
    ] = None,
    adapter: AdapterOption = None,
    corpus: CorpusOption = None,
    column: ColumnOption = None,
    store: StoreOption = None,
    eval_text: EvalTextOption = None,
    threads: ThreadsOption = 2,
    max_mean_kl: Annotated[
        float | None,
        _limit("--max-mean-kl", "Mean KL in nats that quantization may have cost. Needs --against."),
    ] = None,
    min_decode_rate: Annotated[
        float | None, _limit("--min-decode-rate", "Tokens per second that decoding has to reach on this host.")
    ] = None,
    max_load_s: Annotated[float | None, _limit("--max-load-s", "Seconds that loading may take on this host.")] = None,
    max_size_mb: Annotated[
        float | None, _limit("--max-size-mb", "MB (1e6 bytes) that all files of the bundle may take.")
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option("--bisect", help="Compare op by op, and name the first layer and op that parts. Needs --against."),
    ] = False,
    compute_units: Annotated[
        str | None,
        typer.Option(
            "--compute-units",
            help="What Core ML may run on, on a Mac: CPU_AND_GPU, which packages are made for, ALL, CPU_ONLY or "
            "CPU_AND_NE.",
            show_default="CPU_AND_GPU",
        ),
    ] = None,
    junit: Annotated[Path | None, _report("--junit", "Write JUnit XML.")] = None,
    markdown: Annotated[Path | None, _report("--markdown", "Write a summary in GitHub's Markdown.")] = None,
    html: Annotated[Path | None, _report("--html", "Write a report with plots, in one file.")] = None,
    json_file: Annotated[Path | None, _report("--json-file", "Write what --json prints.")] = None,
    device_report_file: Annotated[
        Path | None,
        _report("--device-report-file", "Write what was measured here as a device report, for --device-report."),
    ] = None,
    annotate: Annotated[
        bool | None,
        typer.Option(
            "--annotations/--no-annotations",
            help="Print GitHub workflow commands for what is not green.",
            show_default="where GITHUB_ACTIONS is true, without --json",
            rich_help_panel=REPORTS,
        ),
    ] = None,
    device_reports: Annotated[
        list[Path] | None,
        typer.Option(
            "--device-report",
            help="What a sample app wrote on a phone: judged in place of this host, and kept in the manifest. Can be "
            "repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a bundle again, from its own goldens alone or against its checkpoint."""
    with reporting() as progress:
        from exporter.pipeline import Outcome, validate_device
        from exporter.pipeline import validate as run
        from exporter.planning import default_store
        from exporter.report import ReportFiles, print_annotations, write_reports

        if annotate and as_json:
            raise UsageError("--annotations and --json both want stdout", hint="take --json-file for one of them")
        annotate = annotate or (annotate is None and not as_json and os.environ.get("GITHUB_ACTIONS") == "true")
        here = {
            "--against": against,
            "--bisect": bisect,
            "--compute-units": compute_units,
            "--device-report-file": device_report_file,
        }
        if device_reports and any(here.values()):
            named = next(option for option, value in here.items() if value)
            raise UsageError(
                "--device-report proves nothing on this host", hint=f"leave {named} out, or validate twice"
            )
        files = ReportFiles(junit=junit, markdown=markdown, html=html, json_file=json_file)
        limits = Limits(
            max_mean_kl_nats=max_mean_kl,
            min_decode_tokens_per_s=min_decode_rate,
            max_load_s=max_load_s,
            max_size_mb=max_size_mb,
        )
        try:
            outcomes = [
                validate_device(bundle, report, limits=limits, progress=progress) for report in device_reports or ()
            ] or [
                run(
                    bundle,
                    against=against,
                    adapter=adapter,
                    corpus=corpus,
                    corpus_column=column,
                    store_root=store or default_store(),
                    evaluation_text=eval_text,
                    threads=threads,
                    limits=limits,
                    bisect=bisect,
                    compute_units=compute_units,
                    device_report=device_report_file,
                    progress=progress,
                )
            ]
        except UsageError:
            raise
        except ExportError as error:  # a refused bundle is a result, too
            refused = [Outcome(target="", folder=bundle, error=error)]
            write_reports(refused, files)
            if annotate:
                print_annotations(refused)
            raise
        write_reports(outcomes, files)
    if annotate:
        print_annotations(outcomes)
    _print_outcomes(outcomes, as_json=as_json)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="A bundle.")],
    new: Annotated[Path, typer.Argument(help="Another one, of the same checkpoint.")],
    *,
    size_growth: Annotated[
        float, typer.Option("--size-growth", min=0.0, help="Share by which all files may grow.")
    ] = SIZE_GROWTH,
    kl_growth: Annotated[
        float,
        typer.Option(
            "--kl-growth", min=0.0, help="Share of quality's mean KL that may be added to what both intervals explain."
        ),
    ] = KL_GROWTH,
    rate_loss: Annotated[
        float,
        typer.Option(
            "--rate-loss", min=0.0, help="Share of a median rate that may be lost beyond what both ranges explain."
        ),
    ] = RATE_LOSS,
    as_json: JsonOption = False,
) -> None:
    """Compare two bundles of one checkpoint: what changed, and whether it got worse (exit 7 parity, 8 the rest)."""
    with reporting():
        from exporter.compare import compare
        from exporter.report import print_comparison

        tolerance = Tolerance(size_growth=size_growth, kl_growth=kl_growth, rate_loss=rate_loss)
        found = compare(old, new, tolerance)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_comparison(found)
    raise typer.Exit(found.exit_code)


@app.command()
def inspect(
    path: Annotated[Path | None, typer.Argument(help="A checkpoint or a bundle. Default: the bundled model.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint is, from its headers, or a bundle, after checking every byte of it."""
    with reporting():
        from exporter.bundle import MANIFEST, open_bundle
        from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
        from exporter.report import checkpoint_facts

        path = path or BUNDLED_MODEL
        facts = open_bundle(path) if (path / MANIFEST).exists() else checkpoint_facts(open_checkpoint(path))
    _print_facts(facts, as_json=as_json)


add_bundle_commands(app)
add_device_commands(app)


def main() -> None:
    """The console script."""
    interrupt.listen()
    app()


def _print_outcomes(outcomes: list[Outcome], *, as_json: bool) -> None:
    from exporter.report import outcome_json, print_outcomes

    if as_json:
        typer.echo(json.dumps([outcome_json(outcome) for outcome in outcomes], indent=2))
    else:
        print_outcomes(outcomes)
    for outcome in outcomes:
        if outcome.error:
            typer.echo(f"error: {outcome.target}: {outcome.error}\nhint: {outcome.error.hint}", err=True)
    raise typer.Exit(gravest(outcome.exit_code for outcome in outcomes))


def _print_facts(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        from exporter.report import print_facts

        print_facts(facts)
