"""Options that more than one command has, each in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(
        help="Folder in the layout of Hugging Face or of Meta, or a GGUF file. Default: the bundled trained model.",
        show_default=False,
    ),
]
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
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", help="executorch, onnxruntime, coreml, gguf, a comma list, or all: the first three."
    ),
]

BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        "-b",
        help="What runs inside a target, a comma list; llama-export targets shows all.",
        show_default="xnnpack, cpu, gpu",
    ),
]

DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        "-d",
        help="A phone, as iphone-15-pro: decides target, precision and context, and refuses what will not fit it. "
        "llama-export devices lists all.",
        show_default=False,
    ),
]

PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        help="fp32, fp16, int8, int4, or lut4: tables of 16 values (coreml).",
        show_default="int4, or int8 with --prefer prefill",
    ),
]

PreferOption = Annotated[
    str | None,
    typer.Option(
        "--prefer",
        help="quality; prefill: prompts are read several times faster, int8 by int8 (onnxruntime); decode: int4 in "
        "the widest groups that fit, up to 128.",
        show_default="quality",
    ),
]

AdapterOption = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="A LoRA as PEFT writes it, a folder: merged into the checkpoint as it is read.",
        show_default="none",
    ),
]

SystemOption = Annotated[
    str | None,
    typer.Option(
        "--os",
        help="The oldest system that the app runs on, such as ios18, macos15 or android12: what it does not know is "
        "refused.",
        show_default="whatever the target needs",
    ),
]

HeadOption = Annotated[
    str | None,
    typer.Option(
        "--head",
        help="Precision of the head (and of an embedding tied to it, or beside a pruned one).",
        show_default="int8 if quantized",
    ),
]

HeadTokensOption = Annotated[
    Path | None,
    typer.Option(
        "--head-tokens",
        help="The only tokens that the model ever answers with, a JSON list or ExecuTorch's output_prune_map: the head "
        "keeps their rows alone, all other logits are -4096. In a recipe file: the list itself.",
        show_default="all",
    ),
]

GroupSizeOption = Annotated[
    str | None,
    typer.Option(
        "--group-size",
        help="Columns that share an int4 scale: 32, 64, 128 or row.",
        show_default="32, or up to 128 with --prefer decode",
    ),
]

RulesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        help="Store some matrices otherwise: 'layers.0.mlp.down_proj = int8', * for any characters. Can be "
        "repeated; the last that matches counts.",
    ),
]

RequantizeOption = Annotated[
    bool | None,
    typer.Option(
        "--requantize",
        help="Of a checkpoint that is quantized already: decode its codes and choose all anew. Else they are kept.",
        show_default="kept",
    ),
]

KvCacheOption = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        help="int8: keys and values in a third of the memory (executorch), or a quarter (onnxruntime, calibrated).",
        show_default="floats",
    ),
]

ImagesOption = Annotated[
    bool | None,
    typer.Option(
        "--images/--no-images",
        help="Of a model that sees images, export what looks at them too (executorch, onnxruntime, coreml).",
        show_default="no images",
    ),
]

ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        min=16,
        help="Positions the cache holds.",
        show_default="2048, or the model's own if less",
    ),
]
