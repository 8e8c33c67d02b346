"""Words -> Plan -> pipeline -> a printed report. No work of its own; heavy imports wait until a command runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from exporter import interrupt
from exporter.errors import INTERRUPTED, ExportError, InputError, UsageError, gravest
from exporter.limits import KL_GROWTH, RATE_LOSS, SIZE_GROWTH, Limits, Tolerance
from exporter.spec import (
    EMBEDDING,
    GROUP_SIZES,
    HEAD,
    PER_ROW,
    Logits,
    Method,
    ModelSpec,
    Plan,
    Precision,
    Prefer,
    Recipe,
    Rule,
    Sampling,
    WeightScheme,
)

if TYPE_CHECKING:
    from exporter.pipeline import Outcome

DEFAULT_CONTEXT = 2048
DEFAULT_WINDOW_LENGTH = 512
NO_CALIBRATION = "none"
DEFAULT_OUT = Path("llama-export-out")


class DefaultsToExport(TyperGroup):
    """``llama-export CHECKPOINT --target ...`` means ``llama-export export CHECKPOINT --target ...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {"--help", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["export", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="llama-export",
    cls=DefaultsToExport,
    no_args_is_help=True,
    add_completion=False,
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


def _default_store() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("llama-export")


CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(help="Folder in Hugging Face layout. Default: the bundled trained model.", show_default=False),
]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Threads a runtime may use while it is measured.")]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", help="Where quantized weights are kept and found again.", show_default="user cache"),
]
EvalTextOption = Annotated[
    Path | None,
    typer.Option(
        "--eval-text",
        help="UTF-8 text to measure quality on.",
        show_default="text held apart from --calibration, or a bundled text",
    ),
]
CALIBRATION = "Calibration"
CorpusOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text to calibrate with: .txt, .md, .jsonl (text or messages), .parquet, .csv, token ids as .npy or "
        ".safetensors, a folder of these, - for stdin; none: round to nearest.",
        show_default="text that the model writes itself",
        rich_help_panel=CALIBRATION,
    ),
]
ColumnOption = Annotated[
    str | None,
    typer.Option(
        "--calibration-column",
        help="Where tables and JSON lines keep the text.",
        show_default="text or messages",
        rich_help_panel=CALIBRATION,
    ),
]
LIMITS, REPORTS = "Limits", "Reports"


def _limit(name: str, told: str) -> Any:
    return typer.Option(name, min=0.0, help=told, show_default="no limit", rich_help_panel=LIMITS)


def _report(name: str, told: str) -> Any:
    return typer.Option(name, dir_okay=False, help=told, show_default=False, rich_help_panel=REPORTS)


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]


@app.command()
def export(
    checkpoint: CheckpointArgument = None,
    *,
    target: Annotated[
        str, typer.Option("--target", "-t", help="executorch, onnxruntime, coreml, a comma list, or all.")
    ],
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            "-p",
            help="fp32, fp16, int8 or int4.",
            show_default="int4, or int8 with --prefer prefill",
        ),
    ] = None,
    prefer: Annotated[
        str,
        typer.Option(
            "--prefer",
            help="quality; prefill: prompts are read several times faster, int8 by int8 (onnxruntime); decode: int4 in "
            "the widest groups that fit, up to 128.",
        ),
    ] = "quality",
    head: Annotated[
        str | None,
        typer.Option(
            "--head", help="Precision of the head (and of an embedding tied to it).", show_default="int8 if quantized"
        ),
    ] = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            "--group-size",
            help="Columns that share an int4 scale: 32, 64, 128 or row.",
            show_default="32, or up to 128 with --prefer decode",
        ),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="Store some matrices otherwise: 'layers.0.mlp.down_proj = int8', * for any characters. Can be "
            "repeated; the last that matches counts.",
        ),
    ] = None,
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
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            "-c",
            min=16,
            help="Positions the cache holds.",
            show_default="2048, or the model's own if less",
        ),
    ] = None,
    logits: Annotated[str, typer.Option("--logits", help="Positions the head answers for: last or all.")] = "last",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the bundles.")] = DEFAULT_OUT,
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
    threads: ThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint for one or more targets, and prove each artifact against the model."""
    with _reporting() as progress:
        from exporter.checkpoint import BUNDLED_MODEL
        from exporter.checkpoint.config import read_spec
        from exporter.pipeline import export as run

        if checkpoint is None:
            checkpoint = BUNDLED_MODEL
            progress.note("no checkpoint named: taking the bundled model, tiny-llama")
        _refuse_two_budgets(budget_mb=budget_mb, max_kl=max_kl, calibrated=corpus != NO_CALIBRATION and method != "rtn")
        spec = read_spec(checkpoint)
        preferred = Prefer(_one_of("--prefer", prefer, list(Prefer)))
        body = _body(precision, prefer=preferred)
        scheme = _scheme(body=body, head=head, group_size=group_size or "32", rules=rules or [], spec=spec)
        if preferred is Prefer.DECODE:
            scheme = _widened(scheme, asked=group_size, spec=spec)
            progress.note(f"--prefer decode: int4 in groups of {scheme.group_size or 'a row'}")
        sampling = _given(windows=windows, window_length=window_length, seed=seed)
        tuning = _given(act_order=act_order, damping=damping)
        longest = min(DEFAULT_WINDOW_LENGTH, spec.max_position_embeddings)
        plan = Plan(
            checkpoint=checkpoint,
            targets=_targets(target),
            scheme=scheme,
            recipe=_recipe(scheme, corpus=corpus, method=method, sampling=sampling, tuning=tuning),
            corpus=None if corpus == NO_CALIBRATION else corpus,
            corpus_column=column,
            budget_bytes=None if budget_mb is None else round(budget_mb * 1e6),
            max_kl_nats=max_kl,
            sampling=Sampling(**{"window_length": longest, **sampling}),
            context=context or min(DEFAULT_CONTEXT, spec.max_position_embeddings),
            logits=Logits(_one_of("--logits", logits, [kind.value for kind in Logits])),
            prefer=preferred,
            out=out,
            store=store or _default_store(),
            evaluation_text=eval_text,
            threads=threads,
        )
        outcomes = run(plan, progress)
    _print_outcomes(outcomes, as_json=as_json)


@app.command()
def validate(
    bundle: Annotated[Path, typer.Argument(help="A folder that an export has made.")],
    *,
    against: Annotated[
        Path | None, typer.Option("--against", help="The checkpoint it was made from: proves codes and quality too.")
    ] = None,
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
        typer.Option(
            "--bisect", help="Name the first layer and op where artifact and reference part. Needs --against."
        ),
    ] = False,
    junit: Annotated[Path | None, _report("--junit", "Write JUnit XML.")] = None,
    markdown: Annotated[Path | None, _report("--markdown", "Write a summary in GitHub's Markdown.")] = None,
    html: Annotated[Path | None, _report("--html", "Write a report with plots, in one file.")] = None,
    json_file: Annotated[Path | None, _report("--json-file", "Write what --json prints.")] = None,
    annotate: Annotated[
        bool | None,
        typer.Option(
            "--annotations/--no-annotations",
            help="Print GitHub workflow commands for what is not green.",
            show_default="where GITHUB_ACTIONS is true, without --json",
            rich_help_panel=REPORTS,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a bundle again, from its own goldens alone or against its checkpoint."""
    with _reporting() as progress:
        from exporter.pipeline import Outcome
        from exporter.pipeline import validate as run
        from exporter.report import ReportFiles, print_annotations, write_reports

        if annotate and as_json:
            raise UsageError("--annotations and --json both want stdout", hint="take --json-file for one of them")
        annotate = annotate or (annotate is None and not as_json and os.environ.get("GITHUB_ACTIONS") == "true")
        files = ReportFiles(junit=junit, markdown=markdown, html=html, json_file=json_file)
        try:
            outcome = run(
                bundle,
                against=against,
                corpus=corpus,
                corpus_column=column,
                store_root=store or _default_store(),
                evaluation_text=eval_text,
                threads=threads,
                limits=Limits(
                    max_mean_kl_nats=max_mean_kl,
                    min_decode_tokens_per_s=min_decode_rate,
                    max_load_s=max_load_s,
                    max_size_mb=max_size_mb,
                ),
                bisect=bisect,
                progress=progress,
            )
        except UsageError:
            raise
        except ExportError as error:  # a refused bundle is a result, too
            refused = [Outcome(target="", folder=bundle, error=error)]
            write_reports(refused, files)
            if annotate:
                print_annotations(refused)
            raise
        write_reports([outcome], files)
    if annotate:
        print_annotations([outcome])
    _print_outcomes([outcome], as_json=as_json)


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
    with _reporting():
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
    with _reporting():
        from exporter.bundle import MANIFEST, open_bundle
        from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
        from exporter.report import checkpoint_facts

        path = path or BUNDLED_MODEL
        facts = open_bundle(path) if (path / MANIFEST).exists() else checkpoint_facts(open_checkpoint(path))
    _print_facts(facts, as_json=as_json)


@app.command(name="targets")
def list_targets(*, as_json: JsonOption = False) -> None:
    """List the targets, what each writes, and what executes it on this host."""
    with _reporting():
        import targets
        from exporter.report import target_facts

        facts = [target_facts(targets.load(name)) for name in targets.NAMES]
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        from exporter.report import print_targets

        print_targets(facts)


def main() -> None:
    """The console script."""
    interrupt.listen()
    app()


def _targets(words: str) -> tuple[str, ...]:
    import targets

    names = tuple(dict.fromkeys(word.strip() for word in words.split(",")))
    if "all" in names:
        return targets.NAMES
    for name in names:
        targets.check_known(name)
    return names


def _body(precision: str | None, *, prefer: Prefer) -> Precision:
    """The precision of the body, by what was asked for."""
    if precision is None:
        return Precision.INT8 if prefer is Prefer.PREFILL else Precision.INT4
    body = Precision(_one_of("--precision", precision, [kind.value for kind in Precision]))
    if prefer is Prefer.PREFILL and body is not Precision.INT8:
        raise UsageError(
            f"--prefer prefill multiplies int8 by int8, --precision is {body}",
            hint="leave --precision out, which then means int8, or leave --prefer out",
        )
    if prefer is Prefer.DECODE and body is not Precision.INT4:
        raise UsageError(
            f"--prefer decode widens the groups of int4, --precision is {body}", hint="leave one of them out"
        )
    return body


def _widened(scheme: WeightScheme, *, asked: str | None, spec: ModelSpec) -> WeightScheme:
    """The scheme in the widest int4 groups that divide every row; ``asked`` is what ``--group-size`` said."""
    if asked == "row":
        return scheme
    shapes = spec.weights().items()
    rows = {shape[1] for name, shape in shapes if len(shape) == 2 and scheme.precision(name) is Precision.INT4}
    wide = [size for size in GROUP_SIZES[1:] if all(columns % size == 0 for columns in rows)]
    if not wide:
        raise UsageError(
            f"--prefer decode wants int4 groups of {' or '.join(map(str, GROUP_SIZES[1:]))}, "
            f"rows of {', '.join(map(str, sorted(rows)))} columns have none in common",
            hint="leave it out, or take --group-size row",
        )
    if asked and scheme.group_size < max(wide):
        raise UsageError(
            f"--prefer decode takes int4 groups of {max(wide)}, --group-size is {asked}", hint="leave one of them out"
        )
    return scheme if asked else replace(scheme, group_size=max(wide))


def _scheme(*, body: Precision, head: str | None, group_size: str, rules: list[str], spec: ModelSpec) -> WeightScheme:
    sizes = {**{str(size): size for size in GROUP_SIZES}, "row": PER_ROW}
    if group_size not in sizes:
        raise UsageError(
            f"--group-size {group_size} is unknown; known: {', '.join(sizes)}",
            hint="32 loses least, row is smallest",
        )
    ends = Precision.INT8 if body.bits else body
    if (head or rules) and not body.bits:
        option = f"--head {head}" if head else f"--rule {rules[0]!r}"
        raise UsageError(f"{option} goes with int8 and int4, not with --precision {body}", hint="leave it out")
    chosen = Precision(_one_of("--head", head, ["int8", "int4"])) if head else ends
    return WeightScheme(
        body=body,
        embedding=chosen if spec.tie_word_embeddings else ends,
        head=chosen,
        group_size=sizes[group_size],
        rules=tuple(_rule(rule, spec=spec) for rule in rules),
    )


def _rule(words: str, *, spec: ModelSpec) -> Rule:
    pattern, equals, precision = (part.strip() for part in words.partition("="))
    if not (pattern and equals and precision):
        raise UsageError(
            f"--rule {words!r} is not of the form 'pattern = precision'",
            hint="for instance --rule 'layers.0.mlp.down_proj = int8'",
        )
    rule = Rule(pattern=pattern, precision=Precision(_one_of("--rule ... =", precision, ["int8", "int4"])))
    matrices = [name for name, shape in spec.weights().items() if len(shape) == 2 and name not in (EMBEDDING, HEAD)]
    if not any(rule.matches(name) for name in matrices):
        names = [name.removeprefix("model.").removesuffix(".weight") for name in matrices]
        raise UsageError(
            f"--rule {words!r} matches no matrix of the {len(names)} between embedding and head",
            hint=f"they are called {names[0]} to {names[-1]}; --head sets head and tied embedding",
        )
    return rule


def _recipe(
    scheme: WeightScheme,
    *,
    corpus: str | None,
    method: str | None,
    sampling: dict[str, int],
    tuning: dict[str, Any],
) -> Recipe:
    """How codes are chosen, by what was asked for; whatever could have no effect is refused."""
    chosen = Method(_one_of("--method", method, list(Method))) if method else None
    given = {
        "--calibration": None if corpus == NO_CALIBRATION else corpus,
        "--method": method,
        **_options(sampling),
        **_options(tuning),
    }
    asked = [option for option, value in given.items() if value is not None]
    if not scheme.body.bits:
        if asked:
            raise UsageError(
                f"{asked[0]} goes with int8 and int4, not with --precision {scheme.body}", hint="leave it out"
            )
        return Recipe(method=Method.ROUND)
    if corpus == NO_CALIBRATION:
        chosen = chosen or Method.ROUND
    chosen = chosen or Method.AWQ_GPTQ
    if corpus == NO_CALIBRATION and chosen.needs_text:
        raise UsageError(f"--method {chosen} needs text, --calibration is none", hint="leave one of them out")
    idle = [*(["--calibration"] if corpus != NO_CALIBRATION else []), *_options(sampling)]
    idle = [option for option in idle if option in asked]
    if not chosen.needs_text and idle:
        raise UsageError(f"{idle[0]} names text, which --method {chosen} does not use", hint="leave one of them out")
    if tuning and not chosen.compensates:
        raise UsageError(
            f"{next(iter(_options(tuning)))} is an option of GPTQ, --method {chosen} has none",
            hint="leave it out, or take --method gptq or awq-gptq",
        )
    if chosen is Method.SMOOTH and scheme.body is not Precision.INT8:
        raise UsageError(
            f"--method {chosen} makes room for int8 activations in int8 weights, not in {scheme.body}",
            hint="take --precision int8, or another method",
        )
    return Recipe(method=chosen, **tuning)


def _refuse_two_budgets(*, budget_mb: float | None, max_kl: float | None, calibrated: bool) -> None:
    given = _options(_given(budget_mb=budget_mb, max_kl=max_kl))
    for option, value in given.items():
        if not value:
            raise UsageError(f"{option} is {value:g}, a number above 0 was expected", hint="leave it out, or raise it")
    if len(given) == 2:
        raise UsageError("--budget-mb and --max-kl pull two ways", hint="leave one of them out")
    if given and not calibrated:
        raise UsageError(
            f"{next(iter(given))} is met by what is measured on text, and nothing is to be calibrated",
            hint="leave it out, or take another --method or --calibration",
        )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _options(values: dict[str, Any]) -> dict[str, Any]:
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def _one_of(option: str, value: str, known: list[str]) -> str:
    if value not in known:
        raise UsageError(f"{option} {value} is unknown; known: {', '.join(known)}", hint=f"choose one with {option}")
    return value


@contextmanager
def _reporting() -> Iterator[Any]:
    """Progress on stderr while the block runs; every error becomes a sentence, a hint and an exit code."""
    from exporter.progress import TerminalProgress

    try:
        try:
            with TerminalProgress() as progress:
                yield progress
        except Exception:
            interrupt.check()  # it may be what native code made of one
            raise
    except ExportError as error:
        _fail(error)
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing half written was left behind", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        from exporter.files import disk_full

        found = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        _fail(disk_full(error) or InputError(found, hint="check the path and its permissions"))


def _fail(error: ExportError) -> None:
    typer.echo(f"error: {error}\nhint: {error.hint}", err=True)
    raise typer.Exit(error.exit_code) from None


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
