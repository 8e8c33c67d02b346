"""Words -> Plan -> pipeline -> a printed report. No work of its own; heavy imports wait until a command runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from exporter import interrupt
from exporter.errors import INTERRUPTED, ExportError, InputError, UsageError, gravest
from exporter.spec import GROUP_SIZES, Logits, Plan, Precision, WeightScheme

if TYPE_CHECKING:
    from exporter.pipeline import Outcome

DEFAULT_CONTEXT = 2048
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
    Path | None, typer.Option("--eval-text", help="UTF-8 text to measure quality on.", show_default="bundled text")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]


@app.command()
def export(
    checkpoint: CheckpointArgument = None,
    *,
    target: Annotated[
        str, typer.Option("--target", "-t", help="executorch, onnxruntime, coreml, a comma list, or all.")
    ],
    precision: Annotated[str, typer.Option("--precision", "-p", help="fp32, fp16, int8 or int4.")] = "int4",
    head: Annotated[
        str | None,
        typer.Option(
            "--head", help="Precision of the head (and of an embedding tied to it).", show_default="int8 if quantized"
        ),
    ] = None,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Columns that share an int4 scale: 32, 64 or 128.")
    ] = 32,
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
        plan = Plan(
            checkpoint=checkpoint,
            targets=_targets(target),
            scheme=_scheme(precision=precision, head=head, group_size=group_size, tied=_is_tied(checkpoint)),
            context=context or min(DEFAULT_CONTEXT, read_spec(checkpoint).max_position_embeddings),
            logits=Logits(_one_of("--logits", logits, [kind.value for kind in Logits])),
            out=out,
            store=store or _default_store(),
            evaluation_text=eval_text or BUNDLED_MODEL / "evaluation.txt",
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
    store: StoreOption = None,
    eval_text: EvalTextOption = None,
    threads: ThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Prove a bundle again, from its own goldens alone or against its checkpoint."""
    with _reporting() as progress:
        from exporter.checkpoint import BUNDLED_MODEL
        from exporter.pipeline import validate as run

        outcome = run(
            bundle,
            against=against,
            store_root=store or _default_store(),
            evaluation_text=eval_text or BUNDLED_MODEL / "evaluation.txt",
            threads=threads,
            progress=progress,
        )
    _print_outcomes([outcome], as_json=as_json)


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


def _scheme(*, precision: str, head: str | None, group_size: int, tied: bool) -> WeightScheme:
    body = Precision(_one_of("--precision", precision, [kind.value for kind in Precision]))
    if group_size not in GROUP_SIZES:
        known = ", ".join(map(str, GROUP_SIZES))
        raise UsageError(
            f"--group-size {group_size} is unknown; known: {known}", hint="32 loses least, 128 is smallest"
        )
    ends = Precision.INT8 if body.bits else body
    if head is None:
        return WeightScheme(body=body, embedding=ends, head=ends, group_size=group_size)
    if not body.bits:
        raise UsageError(f"--head {head} goes with int8 and int4, not with --precision {body}", hint="leave --head out")
    chosen = Precision(_one_of("--head", head, ["int8", "int4"]))
    return WeightScheme(body=body, embedding=chosen if tied else ends, head=chosen, group_size=group_size)


def _is_tied(checkpoint: Path) -> bool:
    from exporter.checkpoint.config import read_spec

    return read_spec(checkpoint).tie_word_embeddings


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
