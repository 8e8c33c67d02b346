"""``make bench-quality``: how far int4 moves a model, by our methods and by those of others, on text none of them saw.

Every tool runs in a process of its own, on the same windows of calibration text; its weights are read back from what it
stored, dequantized, and put through one evaluation in float32 with activations left alone. What is compared is the
weights, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.rivals import CACHE, RIVALS, body_only
from benchmarks.troubles import TROUBLES, write_checkpoint
from calibration.corpus import overlap, read_corpus
from exporter.checkpoint import BUNDLED_MODEL, Checkpoint, open_checkpoint
from exporter.metrics import bootstrap_interval, kl_divergence, negative_log_likelihood, perplexity, top1_agreement
from exporter.model.eager import eager_table
from exporter.model.graph import Graph, cache_names
from exporter.model.trace import trace
from exporter.quality import evaluation_windows
from exporter.spec import EMBEDDING, HEAD, Method
from exporter.tokenizer import Tokenizer

OURS = {f"ours: {method}": method for method in (Method.ROUND, Method.AWQ, Method.GPTQ, Method.AWQ_GPTQ)}
DEFAULT = f"ours: {Method.AWQ_GPTQ}"
WINDOWS, WINDOW_LENGTH = 32, 512
BATCH = 8
LEAST_LEAD = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tool's weights, measured."""

    name: str
    bits: float
    figures: Mapping[str, Any]
    seconds: float | None = None
    peak_mb: float | None = None


class Judge:
    """Compares weights with those of a checkpoint over the same windows of text."""

    def __init__(self, checkpoint: Checkpoint, windows: Tensor) -> None:
        self._graph = trace(replace(checkpoint.spec, tie_word_embeddings=False))  # a tool may store a head of its own
        self._windows = windows
        self._truth = self._logits({name: checkpoint.read(name).float() for name in checkpoint.spec.weights()})

    def figures(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        kl, agree, nll = [], [], []
        for window, expected, got in zip(self._windows, self._truth, self._logits(weights), strict=True):
            kl.append(kl_divergence(expected, got))
            agree.append(top1_agreement(expected, got))
            nll.append(negative_log_likelihood(got[:-1], window[1:]))
        divergence = torch.cat(kl)
        return {
            "mean_kl": divergence.mean().item(),
            "interval": bootstrap_interval(divergence),
            "p99_kl": torch.quantile(divergence, 0.99).item(),
            "top1": torch.cat(agree).double().mean().item(),
            "perplexity": perplexity(torch.cat(nll)),
        }

    @torch.no_grad()
    def _logits(self, weights: Mapping[str, Tensor]) -> Tensor:
        """float32 ``[W, T, V]``"""
        weights = {HEAD: weights[EMBEDDING], **weights}
        table = eager_table(lambda weight: weights[weight.name])
        spec, parts = self._graph.spec, []
        for ids in self._windows.split(BATCH):
            empty = torch.zeros(len(ids), spec.num_key_value_heads, 0, spec.head_dim)
            caches = {f"past_{name}": empty for pair in cache_names(spec.num_hidden_layers) for name in pair}
            parts.append(self._graph.run(table, {"ids": ids, **caches})["logits"])
        return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--calibration", type=Path, default=BUNDLED_MODEL / "calibration.txt")
    parser.add_argument("--eval-text", type=Path, default=BUNDLED_MODEL / "evaluation.txt")
    parser.add_argument("--models", default=",".join(TROUBLES), help=f"of {', '.join(TROUBLES)}")
    parser.add_argument("--tools", default=",".join([*OURS, *RIVALS]), help="rows besides full precision")
    parser.add_argument("--out", type=Path, help="a folder for quality.md and quality.svg; default: only print")
    args = parser.parse_args()

    checkpoint = open_checkpoint(BUNDLED_MODEL)
    graph, tokenizer = trace(checkpoint.spec), Tokenizer(checkpoint.folder)
    windows = _calibration_windows(args.calibration, tokenizer, checkpoint)
    text = tokenizer.encode(args.eval_text.read_text(encoding="utf-8"))
    evaluation = evaluation_windows(
        text, bos=checkpoint.spec.bos_token_id, context=checkpoint.spec.max_position_embeddings
    )
    shared = overlap(windows, [token for window in evaluation for token in window])

    lines = [_preamble(args.calibration, args.eval_text, windows=windows, evaluation=evaluation, shared=shared)]
    tables: dict[str, list[Row]] = {}
    for model in args.models.split(","):
        key = _digest(checkpoint.sha256.encode(), windows.numpy().tobytes())
        folder = CACHE / "quality" / key / model.replace(" ", "-")
        troubled = _troubled(model, checkpoint, graph, windows, folder / "model")
        judge = Judge(troubled, torch.tensor(evaluation))
        outcomes = {tool: _run(tool, troubled, windows, folder) for tool in args.tools.split(",")}
        body, shipped = _rows(outcomes, judge, troubled)
        tables[model] = body
        lines += [f"\n## {model.capitalize()}\n", "(a) body only, embedding and head in float32:\n", _table(body)]
        lines += ["\n(b) as each tool ships, bits of everything that it stores:\n", _table(shipped), "\n" + _lead(body)]
        print("\n".join(lines[-5:]), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        _plot(tables, args.out / "quality.svg")
        (args.out / "quality.md").write_text(
            "\n".join([*lines, "\n![mean KL of each row](quality.svg)\n"]), encoding="utf-8"
        )


def _calibration_windows(path: Path, tokenizer: Tokenizer, checkpoint: Checkpoint) -> Tensor:
    shape = {"windows": WINDOWS, "window_length": WINDOW_LENGTH}
    corpus = read_corpus(path, tokenizer, spec=checkpoint.spec, **shape, seed=0, column=None, held_out_tokens=0)
    return corpus.windows


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _code_of(tool: str) -> bytes:
    """What a tool's outcome depends on beside checkpoint and text: our code, or the version that is pinned."""
    here = Path(__file__).parent
    files = (
        sorted((here.parent / "calibration").glob("*.py")) if tool in OURS else [here / "rivals" / "requirements.txt"]
    )
    return b"".join(file.read_bytes() for file in files)


def _troubled(model: str, checkpoint: Checkpoint, graph: Graph, windows: Tensor, folder: Path) -> Checkpoint:
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(model, checkpoint, graph, windows, folder)
    return open_checkpoint(folder)


def _run(tool: str, checkpoint: Checkpoint, windows: Tensor, folder: Path) -> Path:
    """The folder with ``weights.safetensors`` and ``rival.json`` of one tool. What an earlier run has made is taken as
    it is, so that one that was cut short goes on."""
    out = folder / f"{tool.replace(': ', '-')}-{_digest(_code_of(tool))}"
    if (out / "rival.json").exists():
        return out
    save_file({"ids": windows}, folder / "windows.safetensors")
    module, name = ("benchmarks.ours", OURS[tool].value) if tool in OURS else ("benchmarks.rivals", tool)
    where = ["--checkpoint", checkpoint.folder, "--windows", folder / "windows.safetensors", "--out", out]
    print(f"{tool} ...", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", module, name, *where], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
    return out


def _rows(outcomes: Mapping[str, Path], judge: Judge, checkpoint: Checkpoint) -> tuple[list[Row], list[Row]]:
    """Tables (a) and (b)."""
    original = {name: checkpoint.read(name).float() for name in checkpoint.spec.weights()}
    full = Row(name="full precision", bits=32.0, figures=judge.figures(original))
    body, shipped = [full], [full]
    for tool, folder in outcomes.items():
        weights, record = load_file(folder / "weights.safetensors"), json.loads((folder / "rival.json").read_text())
        ends = {name: original[name] for name in (EMBEDDING, HEAD) if name in original}
        # Ours may have changed norms, as part of the method; no rival does.
        of_body = {**weights, **ends} if tool in OURS else body_only(weights, checkpoint)
        told = {"seconds": record["seconds"], "peak_mb": record["peak_rss_mb"]}
        body.append(Row(name=tool, bits=record["body_bits_per_weight"], figures=judge.figures(of_body), **told))
        shipped.append(Row(name=tool, bits=record["file_bits_per_weight"], figures=judge.figures(weights), **told))
    return body, shipped


def _preamble(
    calibration: Path, eval_text: Path, *, windows: Tensor, evaluation: list[list[int]], shared: float
) -> str:
    tokens = sum(len(window) for window in evaluation)
    return (
        "# Quality of int4\n\n"
        f"Made by `make bench-quality` (`benchmarks/quality.py`) on {platform.machine()}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}. The bundled model, calibrated on {len(windows)} windows of "
        f"{windows.shape[1]} tokens of {calibration.name}, evaluated on {tokens} tokens of {eval_text.name} "
        f"({shared:.1%} of them calibrated on too). KL in nats against the same model in float32, with its bootstrap "
        "95 % interval; activations are not rounded in any row. Seconds are those of quantizing, MB of the whole "
        f"process that does. `{DEFAULT}` is the default.\n\n"
        "Two copies of the model compute the same and are harder to quantize: in one, 3 % of the channels before "
        "each group of linears are multiplied by 20 and divided out again where they are read; in the other the "
        "residual stream is turned onto its principal axes, so that few channels hold most of the energy "
        "(`benchmarks/troubles.py`)."
    )


def _table(rows: Iterable[Row]) -> str:
    lines = [
        "| row | bits per weight | mean KL | 95 % | p99 KL | top-1 | perplexity | seconds | peak MB |",
        "|-|" + "-:|" * 8,
    ]
    for row in rows:
        f = row.figures
        low, high = f["interval"]
        seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
        peak = "" if row.seconds is None else "not measured" if row.peak_mb is None else f"{row.peak_mb:.0f}"
        name = f"**{row.name}**" if row.name == DEFAULT else row.name
        lines.append(
            f"| {name} | {row.bits:.3f} | {f['mean_kl']:.2e} | {low:.2e} to {high:.2e} | {f['p99_kl']:.2e} | "
            f"{f['top1']:.2%} | {f['perplexity']:.2f} | {seconds} | {peak} |"
        )
    return "\n".join(lines)


def _lead(rows: list[Row]) -> str:
    """How much more every rival loses than the default does."""
    by_name = {row.name: row for row in rows}
    if DEFAULT not in by_name:
        return ""
    ours = by_name[DEFAULT]
    leads = {row.name: row.figures["mean_kl"] / ours.figures["mean_kl"] for row in rows if row.name in RIVALS}
    text = ", ".join(f"{name} {lead:.2f}" for name, lead in sorted(leads.items(), key=lambda item: item[1]))
    short = [name for name, lead in leads.items() if lead < LEAST_LEAD]
    verdict = (
        f"less than {LEAST_LEAD:g} against {', '.join(short)}" if short else f"at least {LEAST_LEAD:g} against all"
    )
    return f"Mean KL of (a) over that of the default, at {ours.bits:.3f} bits: {text}; {verdict}.\n"


def _plot(tables: Mapping[str, list[Row]], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "quality"
    figure, axes = plt.subplots(1, len(tables), figsize=(5 * len(tables), 4.5), sharey=True, squeeze=False)
    for axis, (model, rows) in zip(axes[0], tables.items(), strict=True):
        tools = rows[1:]
        values = [row.figures["mean_kl"] for row in tools]
        ends = [[v - row.figures["interval"][0] for v, row in zip(values, tools, strict=True)]]
        ends += [[row.figures["interval"][1] - v for v, row in zip(values, tools, strict=True)]]
        colours = ["tab:blue" if row.name in OURS else "tab:grey" for row in tools]
        axis.barh([f"{row.name} ({row.bits:.2f} bits)" for row in tools], values, xerr=ends, color=colours)
        axis.set_title(f"{model}: body only")
        axis.set_xlabel("mean KL, nats")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
