"""Files that llama.cpp's own converter and quantizer have written, of every type, exported and proven: make check-gguf.

Both are of the source that llama-cpp-python ships, built once (``benchmarks.rivals.llamacpp``).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.rivals.llamacpp import build, convert
from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
from exporter.cli import app
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import Drive, drive
from tests.exporter.test_gguf import named

pytestmark = pytest.mark.gguf

FLOATS = ("F32", "F16", "BF16")
PLAIN = (*("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), *("Q2_K", "Q3_K_S", "Q4_K_S", "Q5_K_S", "Q6_K"))
BY_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_M", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
"""Types of which some cannot be written without an importance matrix."""
TERNARY = ("TQ1_0", "TQ2_0")
TYPES = {"Q3_K_S": "Q3_K", "Q4_K_S": "Q4_K", "Q5_K_S": "Q5_K", "IQ2_M": "IQ2_S"}
"""What tensors of a mix are, where that has another name."""


@pytest.fixture(scope="module")
def programs() -> Path:
    return build()


@pytest.fixture(scope="module")
def converted(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("converted") / "f32.gguf"
    convert(BUNDLED_MODEL, file, kind="f32")
    return file


@pytest.fixture(scope="module")
def importance(programs: Path, converted: Path) -> Path:
    matrix = converted.with_name("imatrix.gguf")
    text = BUNDLED_MODEL / "calibration.txt"
    run(programs / "llama-imatrix", "-m", converted, "-f", text, "-o", matrix, "-c", "128", "--chunks", "20")
    return matrix


def run(*command: str | Path) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", [*FLOATS, *PLAIN, *BY_IMPORTANCE, *TERNARY])
def test_a_file_of_llama_cpps_quantizer_is_read_as_it_means_and_exported(
    kind: str, programs: Path, converted: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Every matrix of that type: logits are transformers' on the weights that gguf's package decodes, and the export to
    ONNX Runtime passes codes and parity."""
    file = tmp_path / f"tiny-{kind}.gguf"
    matrix = []
    if kind in BY_IMPORTANCE:  # none is known of the embedding
        matrix = ["--imatrix", request.getfixturevalue("importance"), "--token-embedding-type", "q8_0"]
    run(programs / "llama-quantize", "--pure", *matrix, converted, file, kind, "2")

    reader = gguf.GGUFReader(file)
    assert TYPES.get(kind, kind) in {tensor.tensor_type.name for tensor in reader.tensors}
    assert largest_difference(file, reader) < 1e-4

    words = [str(file), "-t", "onnxruntime", "--calibration", "none", "--json"]
    words += ["-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code in (0, 8), done.output  # what codes of codes cost is another matter
    manifest = json.loads(done.stdout)[0]["manifest"]
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "passed")


def largest_difference(file: Path, reader: gguf.GGUFReader) -> float:
    """Between the logits of our reference on the file and those of transformers on its weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    decoded = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = torch.from_numpy(decoded[named(name)].copy()).float()
            if name.split(".")[-2] in heads:  # transformers, modeling_gguf_pytorch_utils.py: _reverse_permute_weights
                halves = weight.view(heads[name.split(".")[-2]], -1, 2, weight.shape[1])
                weight = halves.transpose(1, 2)
            parameter.copy_(weight.reshape(parameter.shape))
    ids = torch.randint(2000, (60,), generator=torch.Generator().manual_seed(5))
    steps = Drive(ids=tuple(ids.tolist()), prefills=(30, 9))
    checkpoint = open_checkpoint(file)
    got = drive(Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION), steps)
    with torch.no_grad():
        wanted = model(ids[None]).logits[0][steps.positions]
    return float((got - wanted).abs().max())
