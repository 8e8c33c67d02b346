"""``llama-export bench``: tokens per second of a bundle on this host, over lists of threads, prompts and depths."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import cycle, islice

import targets
from exporter.bundle import Goldens
from exporter.errors import HostError, UsageError
from exporter.generation import OpenedBundle
from exporter.latency import host
from targets.base import Runner

USUAL_PROMPTS = (64, 512)


class Output(StrEnum):
    """How rows are printed."""

    MD = "md"
    CSV = "csv"
    JSON = "json"
    JSONL = "jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """What is measured with each number of threads: each prompt as one prefill, and ``decode`` tokens at each
    depth."""

    threads: tuple[int, ...]
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    decode: int
    repetitions: int

    def with_prompts_for(self, context: int) -> Matrix:
        """The usual prompts, as far as they fit."""
        return replace(self, prompts=tuple(count for count in USUAL_PROMPTS if count <= context))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement: the median, least and most of its repetitions, after one that is not counted."""

    model: str
    target: str
    precision: str
    threads: int
    test: str
    """``prefill`` of so many ``tokens`` into an empty cache, or ``decode`` of so many with ``depth`` in it."""
    tokens: int
    depth: int
    tokens_per_s: float
    least: float
    most: float
    load_s: float
    runtime: str
    host: str


def measure(bundle: OpenedBundle, matrix: Matrix, *, on_row: Callable[[int, int], None]) -> Iterator[Row]:
    """A row at a time. Raises UsageError for what does not fit the context, HostError where this host's time means
    nothing."""
    artifact = bundle.artifact
    if reason := bundle.target.latency_unmeasurable():
        raise HostError(reason, hint="run it on the device, or take the bundle of another target")
    cases = [
        *(("prefill", count, 0) for count in matrix.prompts),
        *(("decode", matrix.decode, depth) for depth in matrix.depths if matrix.decode),
    ]
    for test, tokens, depth in cases:
        if depth + tokens > artifact.context:
            raise UsageError(
                f"{test} of {tokens} tokens at depth {depth} needs {depth + tokens} positions, "
                f"the bundle has a context of {artifact.context}",
                hint="measure less, or export with a larger --context",
            )
    ids = list(islice(cycle(Goldens.read(bundle.folder).drive.ids), artifact.context))
    done, total = 0, len(cases) * len(matrix.threads)
    for threads in matrix.threads:
        with bundle.target.open(artifact, threads=threads) as runner:
            for test, tokens, depth in cases:
                rates = [
                    _rate(runner, ids, test=test, tokens=tokens, depth=depth) for _ in range(matrix.repetitions + 1)
                ][1:]
                yield Row(
                    model=artifact.spec.name,
                    target=targets.label(artifact.target, artifact.backend),
                    precision=artifact.scheme.body.value,
                    threads=threads,
                    test=test,
                    tokens=tokens,
                    depth=depth,
                    tokens_per_s=statistics.median(rates),
                    least=min(rates),
                    most=max(rates),
                    load_s=runner.load_s,
                    runtime=bundle.target.runtime(),
                    host=host(),
                )
                done += 1
                on_row(done, total)


def _rate(runner: Runner, ids: Sequence[int], *, test: str, tokens: int, depth: int) -> float:
    if runner.position < depth:
        runner.feed(ids[runner.position : depth])
    runner.rewind(depth)
    if test == "prefill":
        runner.feed(ids[:tokens])
    else:
        runner.feed_each(ids[depth : depth + tokens])
    return tokens / sum(runner.steps_s)


def table(rows: Sequence[Row], output: Output) -> str:
    """All rows in one of the four forms, without a newline at the end."""
    if output is Output.JSON:
        return json.dumps([asdict(row) for row in rows], indent=2)
    if output is Output.JSONL:
        return "\n".join(json.dumps(asdict(row)) for row in rows)
    if output is Output.CSV:
        file = io.StringIO()
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        return file.getvalue().rstrip("\n")
    lines = ["| model | target | threads | test | tokens/s | least to most |", "|-|-|-:|-|-:|-:|"]
    for row in rows:
        test = f"{row.test} {row.tokens}" + (f" at {row.depth}" if row.test == "decode" else "")
        lines.append(
            f"| {row.model} {row.precision} | {row.target} | {row.threads} | {test} "
            f"| {row.tokens_per_s:,.1f} | {row.least:,.1f} to {row.most:,.1f} |"
        )
    if rows:
        lines += ["", f"{rows[0].runtime}; {rows[0].host}; loaded in {rows[0].load_s:.2f} s"]
    return "\n".join(lines)


def counts(option: str, words: str, *, least: int) -> tuple[int, ...]:
    """The numbers of a comma list. Raises UsageError for anything else, and for one below ``least``."""
    try:
        numbers = tuple(int(word) for word in words.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least:
        raise UsageError(
            f"{option} is {words!r}, whole numbers of {least} or more were expected, with commas between",
            hint=f"for instance {option} {max(least, 1)},{max(least, 1) * 2}",
        )
    return numbers
