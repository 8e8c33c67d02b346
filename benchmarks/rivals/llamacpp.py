"""llama.cpp's llama-quantize, with and without an importance matrix, built from the source that llama-cpp-python ships.

That source distribution has llama.cpp whole, and PyPI is reached wherever this project is set up.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import CACHE, Outcome, RivalError, Task

SOURCE = "llama-cpp-python==0.3.36"
FOLDER = CACHE / "llama.cpp"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-bench")
THREADS = str(os.cpu_count() or 1)

_CONVERT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
convert_hf_to_gguf.main()
"""
"""The convert script knows a tokenizer by a hash of what it makes of a test text, and so only published ones. Ours
splits words by Llama 3's pattern, whose name is put in."""

_MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(code)
"""
"""Seconds and peak MB of a program. A small process of its own, since Linux counts a child's peak from that of the
process it was forked from, and ours has torch in it."""


def build() -> Path:
    """The folder with the tools, built on the first call (5 minutes on 2 free cores). Raises RivalError."""
    source, programs = FOLDER / "source", FOLDER / "build" / "bin"
    if all((programs / tool).exists() for tool in TOOLS) and _keeps_tile_shapes(source):
        return programs
    if not shutil.which("cmake"):
        raise RivalError("llama.cpp is built with cmake and a C++ compiler: apt-get install cmake g++")
    if not source.exists():
        _download(source)
    if not _keeps_tile_shapes(source):
        shutil.rmtree(programs, ignore_errors=True)  # they come from that source
        _keep_tile_shapes(source)
    parts = ("OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_SERVER", "BUILD_APP", "BUILD_UI", "USE_PREBUILT_UI")
    settings = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF"]
    settings += [f"LLAMA_{part}=OFF" for part in parts]
    _run("cmake", "-S", source, "-B", FOLDER / "build", *(f"-D{setting}" for setting in settings))
    _run("cmake", "--build", FOLDER / "build", "--target", *TOOLS, "--parallel", THREADS)
    return programs


def _download(source: Path) -> None:
    """llama.cpp's source to ``source``, all of it or nothing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        # Not `--no-binary :all:`, which would have pip build the build tools from source as well.
        only_source = ("--no-deps", "--no-binary", SOURCE.split("==", maxsplit=1)[0])
        _run(sys.executable, "-m", "pip", "download", *only_source, "--dest", scratch, SOURCE)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if "/vendor/llama.cpp/" in member.name]
            tar.extractall(scratch, members, filter="data")
        (unpacked,) = Path(scratch).glob("*/vendor/llama.cpp")
        unpacked.rename(source)


_AMX = "ggml/src/ggml-cpu/amx/mmq.cpp"
_LOAD = "_tile_loadconfig(&tc);"
_KEPT_LOAD = f'asm volatile("" : : "r"(&tc) : "memory"); {_LOAD}'
"""g++ 12 takes the operand of ``_tile_loadconfig`` for eight bytes and drops the stores of the shapes behind them, so
that a product of more than one token ends in SIGSEGV on processors with AMX."""


def _keeps_tile_shapes(source: Path) -> bool:
    return _KEPT_LOAD in (source / _AMX).read_text(encoding="utf-8")


def _keep_tile_shapes(source: Path) -> None:
    text = (source / _AMX).read_text(encoding="utf-8")
    if text.count(_LOAD) != 1:
        raise RivalError(f"{_LOAD} is not where it was in {_AMX}: look whether it is still needed")
    (source / _AMX).write_text(text.replace(_LOAD, _KEPT_LOAD), encoding="utf-8")


def convert(checkpoint: Path, out: Path, *, kind: str) -> None:
    """A checkpoint to a GGUF file of float type ``kind``, once the tools are built."""
    _run(sys.executable, "-c", _CONVERT, FOLDER / "source", checkpoint, "--outtype", kind, "--outfile", out)


def _quantize(task: Task, *, kind: str, imatrix: bool) -> Outcome:
    programs = build()
    original, quantized = task.scratch / "f32.gguf", task.scratch / f"{kind}.gguf"
    convert(task.checkpoint.folder, original, kind="f32")
    matrix, note, seconds, peak = _importance(task, programs, original) if imatrix else ([], "no calibration", 0.0, 0.0)
    own_seconds, own_peak = _measured(programs / "llama-quantize", *matrix, original, quantized, kind, THREADS)
    weights, stored_bytes, types = _read(quantized, task)
    lines = (FOLDER / "source" / "CMakeLists.txt").read_text()
    number = ".".join(re.findall(r"set\(LLAMA_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)\)", lines))
    return Outcome(
        version=f"llama.cpp {number}, from {SOURCE.replace('==', ' ')}",
        options={"type": kind, "imatrix": imatrix},
        weights=weights,
        stored_bytes=stored_bytes,
        file_bytes=quantized.stat().st_size,
        seconds=seconds + own_seconds,
        peak_rss_mb=max(peak, own_peak),
        notes=(note, f"tensors by type: {types}", "the file has the vocabulary in it"),
    )


def _importance(task: Task, programs: Path, model: Path) -> tuple[list[str], str, float, float]:
    """What makes llama-quantize use the windows, a note on the tokens that were seen, and seconds and peak MB.

    llama-imatrix takes text, puts a begin token in front, and cuts the tokens into chunks, whose first it replaces by a
    begin token. So windows that start with one come through as they are: their begin tokens stay in the text, but for
    the first.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(task.checkpoint.folder, local_files_only=True)
    count, length = task.windows.shape
    pieces = [tokenizer.decode(window, clean_up_tokenization_spaces=False) for window in task.windows.tolist()]
    text = "".join(pieces).removeprefix(tokenizer.bos_token)
    same = tokenizer.encode(text) == task.windows.flatten().tolist()
    source, matrix = task.scratch / "calibration.txt", task.scratch / "imatrix.gguf"
    source.write_text(text, encoding="utf-8")
    lengths = ("--ctx-size", str(length), "--batch-size", str(length), "--threads", THREADS)
    files = ("--model", model, "--file", source, "--output", matrix)
    seconds, peak = _measured(programs / "llama-imatrix", *files, *lengths, "--parse-special", "--no-ppl")
    fate = "come back as the same tokens" if same else "do not all come back as the same tokens: borders have moved"
    note = f"importance matrix over {count} windows of {length}, given as text; tokenized again they {fate}"
    return ["--imatrix", str(matrix)], note, seconds, peak


def _read(file: Path, task: Task) -> tuple[dict[str, Tensor], dict[str, int], str]:
    """Weights and their bytes by Hugging Face name, and how many of them are of which type."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, task.spec.num_hidden_layers)
    weights: dict[str, Tensor] = {}
    stored_bytes: dict[str, int] = {}
    types: list[str] = []
    for name in task.spec.weights():
        tensor: Any = tensors[names.get_name(name, try_suffixes=(".weight",))]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _undo_permutation(weight, head_dim=task.spec.head_dim)
        weights[name], stored_bytes[name] = weight, int(tensor.n_bytes)
        types.append(tensor.tensor_type.name)
    if task.spec.tie_word_embeddings and "output.weight" in tensors:
        raise RivalError("llama.cpp stored a head of its own, although the checkpoint ties it")
    return weights, stored_bytes, ", ".join(f"{types.count(kind)} {kind}" for kind in sorted(set(types)))


def _undo_permutation(weight: Tensor, *, head_dim: int) -> Tensor:
    """Rows in Hugging Face's order: RoPE turns neighbouring channels in llama.cpp, the two halves of a head in Hugging
    Face. The inverse of ``permute`` in llama.cpp's ``conversion/llama.py``."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])  # [heads, head_dim / 2, 2, K]
    return pairs.transpose(1, 2).reshape(weight.shape)


def _measured(*command: str | Path) -> tuple[float, float]:
    """Run a program; its wall seconds and peak resident MB. Raises RivalError."""
    seconds, peak = _run(sys.executable, "-S", "-c", _MEASURE, *command).split()
    return float(seconds), float(peak)


def _run(*command: str | Path) -> str:
    """What a program writes to stdout; its stderr goes to ours. Raises RivalError if it fails."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        words = [part for part in map(str, command) if "\n" not in part]
        raise RivalError(f"exit code {done.returncode} from: {' '.join(words)}\n{done.stdout[-2000:]}")
    return done.stdout


q4_0 = partial(_quantize, kind="Q4_0", imatrix=False)
q4_0_imatrix = partial(_quantize, kind="Q4_0", imatrix=True)
q4_k_m = partial(_quantize, kind="Q4_K_M", imatrix=False)
q4_k_m_imatrix = partial(_quantize, kind="Q4_K_M", imatrix=True)
