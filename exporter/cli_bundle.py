"""The commands that take a bundle: words -> what runs, measures, packs or checks it -> what is printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exporter.errors import InputError, UsageError
from exporter.reporting import reporting

if TYPE_CHECKING:
    from exporter.generation import Answer, Conversation, OpenedBundle

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="Threads a runtime may use while it is measured.")]
BundleArgument = Annotated[Path, typer.Argument(help="A folder that an export has made.")]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0: the most likely token each time.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Draw from that many of the most likely tokens; 0: all.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Draw from the tokens that hold that much probability.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same tokens.")]
SystemOption = Annotated[str | None, typer.Option("--system", help="A system message to begin with.")]


SinkOption = Annotated[
    int | None,
    typer.Option("--sink", min=0, help="First tokens that --sliding-window keeps as well.", show_default="4"),
]
SlidingOption = Annotated[
    int | None,
    typer.Option(
        "--sliding-window",
        min=1,
        help="Where the context is full, go on with the most recent tokens, this many, in place of ending there.",
        show_default="an answer ends there",
    ),
]


def add_bundle_commands(app: typer.Typer) -> None:
    """Register the commands of this file."""
    for command in (generate, chat, bench, bundle, verify):
        app.command()(command)


def generate(
    bundle: BundleArgument,
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from.", show_default="stdin")] = None,
    *,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message: put it into the model's chat template.")
    ] = False,
    system: SystemOption = None,
    messages: Annotated[
        Path | None, typer.Option("--messages", help="JSON messages in place of a prompt; - for stdin.")
    ] = None,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    sliding_window: SlidingOption = None,
    sink: SinkOption = None,
    threads: ThreadsOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Let the artifact go on from a text, on this host, with the bundle's own tokenizer and stop tokens."""
    with reporting() as progress:
        from exporter.generation import Conversation, Decoding, open_for_running, read_messages
        from exporter.sliding import sliding_asked

        decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        sliding = sliding_asked(sink=sink, window=sliding_window)
        if messages and (prompt or as_chat or system):
            raise UsageError("--messages says it all", hint="leave the prompt, --chat and --system out")
        if system and not as_chat:
            raise UsageError("--system goes with --chat", hint="add --chat, or leave it out")
        text = prompt if prompt is not None else _read(messages)
        progress.stage("loading")
        opened = open_for_running(bundle)
        if messages or as_chat:
            asked = read_messages(text) if messages else _asked(text, system=system)
            ids = opened.tokenizer.encode_rendered(opened.tokenizer.render(asked))
        else:
            ids = opened.tokenizer.encode(text)
        with opened.target.open(opened.artifact, threads=threads) as runner:
            progress.silence()
            _say_what_runs(opened)
            answer, pieces = Conversation(opened, runner, decoding, sliding=sliding).reply(ids, max_tokens=max_tokens)
            for piece in pieces:
                if not as_json:
                    typer.echo(piece, nl=False)
        if as_json:
            typer.echo(json.dumps({"text": answer.text, "ids": answer.ids, **answer.figures()}, indent=2))
        else:
            typer.echo()
            typer.echo(_told(answer), err=True)


def chat(
    bundle: BundleArgument,
    *,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    sliding_window: SlidingOption = None,
    sink: SinkOption = None,
    threads: ThreadsOption = 2,
) -> None:
    """Talk to the artifact on this host: a line is a message. /new starts anew, /quit or the end of input ends."""
    with reporting() as progress:
        from exporter.generation import Conversation, Decoding, open_for_running
        from exporter.sliding import sliding_asked

        decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        sliding = sliding_asked(sink=sink, window=sliding_window)
        progress.stage("loading")
        opened = open_for_running(bundle)
        opened.tokenizer.render(_asked("", system=system))  # a bundle without a template is refused before it is loaded
        with opened.target.open(opened.artifact, threads=threads) as runner:
            progress.silence()
            _say_what_runs(opened)
            _talk(opened, Conversation(opened, runner, decoding, sliding=sliding), system=system, max_tokens=max_tokens)


def _talk(opened: OpenedBundle, conversation: Conversation, *, system: str | None, max_tokens: int) -> None:
    begin = _asked("", system=system)[:-1]
    messages = list(begin)
    while True:
        typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip() == "/new":
            messages = list(begin)
        if line.strip() in ("/new", ""):
            continue
        asked = [*messages, {"role": "user", "content": line.rstrip("\n")}]
        try:
            ids = opened.tokenizer.encode_rendered(opened.tokenizer.render(asked))
            answer, pieces = conversation.reply(ids, max_tokens=max_tokens)
        except InputError as error:  # the conversation is too long: it can go on after /new
            typer.echo(f"error: {error}\nhint: /new starts anew", err=True)
            continue
        for piece in pieces:
            typer.echo(piece, nl=False)
        typer.echo()
        typer.echo(_told(answer), err=True)
        messages = [*asked, {"role": "assistant", "content": answer.text}]


def bench(
    bundle: BundleArgument,
    *,
    threads: Annotated[str, typer.Option("--threads", help="Numbers of threads, with commas between.")] = "1,2",
    prompt: Annotated[
        str, typer.Option("--prompt", help="Lengths of prompts.", show_default="64,512 as far as they fit")
    ] = "",
    decode: Annotated[int, typer.Option("--decode", min=0, help="Tokens decoded one by one; 0: none.")] = 32,
    depth: Annotated[str, typer.Option("--depth", help="Tokens in the cache before decoding.")] = "0",
    repetitions: Annotated[
        int, typer.Option("--repetitions", min=1, help="Runs that count, after one that does not.")
    ] = 5,
    output: Annotated[str, typer.Option("--output", "-o", help="md, csv, json or jsonl.")] = "md",
) -> None:
    """Measure a bundle on this host: prefill and decode in tokens per second, for lists of threads and lengths."""
    with reporting() as progress:
        from exporter.generation import open_for_running
        from exporter.measure import Matrix, Output, counts, measure, table

        if output not in list(Output):
            raise UsageError(f"--output {output} is unknown; known: {', '.join(Output)}", hint="choose one with -o")
        matrix = Matrix(
            threads=counts("--threads", threads, least=1),
            prompts=counts("--prompt", prompt, least=1) if prompt else (),
            depths=counts("--depth", depth, least=0),
            decode=decode,
            repetitions=repetitions,
        )
        progress.stage("checksums")
        opened = open_for_running(bundle)
        if not prompt:
            matrix = matrix.with_prompts_for(opened.artifact.context)
        progress.stage("measuring")
        rows = list(measure(opened, matrix, on_row=progress.advance))
    typer.echo(table(rows, Output(output)))


def bundle(
    folder: BundleArgument,
    *,
    out: Annotated[Path, typer.Option("--out", help="A new folder, or with --zip a new file.")],
    loader: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="executorch-android, executorch-ios, react-native-executorch, onnxruntime-genai, onnxruntime-mobile "
            "(a .ort for minimal builds, and its operators) or swift-transformers: only the files it reads, under its "
            "names.",
            show_default="all files",
        ),
    ] = None,
    zipped: Annotated[
        bool, typer.Option("--zip", help="One file, stored and aligned so that weights can be mapped.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a bundle as an app's loader wants it."""
    with reporting() as progress:
        from exporter.packing import pack

        progress.stage("packing")
        names = [name.as_posix() for name in pack(folder, loader=loader, out=out, zipped=zipped)]
    if as_json:
        typer.echo(json.dumps({"out": str(out), "for": loader, "files": names}, indent=2))
    else:
        typer.echo(f"{out}: {', '.join(names)}")


def verify(bundle: BundleArgument, *, as_json: JsonOption = False) -> None:
    """Check every byte of a bundle against its manifest."""
    with reporting() as progress:
        from exporter.bundle import MANIFEST, open_bundle
        from exporter.files import sha256

        progress.stage("checksums")
        manifest = open_bundle(bundle)
        facts: dict[str, Any] = {
            "bundle": str(bundle),
            "files": len(manifest["files"]),
            "bytes": sum(entry["bytes"] for entry in manifest["files"]),
            "manifest_sha256": sha256(bundle / MANIFEST),
        }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo(f"{bundle}: {facts['files']} files, {facts['bytes']:,} bytes, all as the manifest says")


def _read(source: Path | None) -> str:
    """A file's text, or stdin's."""
    try:
        if source is None or source == Path("-"):
            return sys.stdin.read()
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source or 'stdin'} is no UTF-8 text: {error}", hint="save it as UTF-8") from error


def _asked(text: str, *, system: str | None) -> list[dict[str, str]]:
    begin = [{"role": "system", "content": system}] if system else []
    return [*begin, {"role": "user", "content": text}]


def _say_what_runs(opened: OpenedBundle) -> None:
    typer.echo(f"{opened.artifact.spec.name}, {opened.artifact.scheme.body}: {opened.target.runtime()}", err=True)


def _told(answer: Answer) -> str:
    ended = {"stop": "", "length": "; cut at --max-tokens", "context": "; the context is full"}
    rate = answer.decode_tokens_per_s
    return (
        f"[{len(answer.ids)} tokens, first after {1e3 * answer.prefill_s:.0f} ms"
        + (f", then {rate:,.1f} tokens/s" if rate else "")
        + (ended[answer.ended] if answer.ended else "")
        + "]"
    )
