"""Every dense Llama that Meta has released: parameters and tracing at its own size, answers and exports as a toy."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
from exporter.checkpoint.config import read_spec
from exporter.cli import app
from exporter.errors import InputError
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import Drive, drive
from tests.conftest import write_toy
from tests.generations import GENERATIONS, SIZES, TOY_BOUND, WIDE, config_of, toy_config


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("generation", "size"), SIZES)
def test_a_released_size_has_the_parameters_that_transformers_counts(
    generation: str, size: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    spec = read_spec(written(tmp_path, config_of(generation, size)))
    with torch.device("meta"):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path))
    assert spec.parameters == model.num_parameters()
    billions = spec.parameters / 1e9
    assert billions == pytest.approx(float(size.removesuffix("B")), rel=0.24)  # names are rounded, 1B is 1.24


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "size"), SIZES)
def test_a_released_size_is_traced_in_seconds_and_little_memory(generation: str, size: str, tmp_path: Path) -> None:
    written(tmp_path, config_of(generation, size))
    code = (
        "import sys; from pathlib import Path\n"
        "from exporter.checkpoint.config import read_spec\n"
        "from exporter.model.trace import trace\n"
        "print(len(trace(read_spec(Path(sys.argv[1]))).nodes))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 120  # 405B takes some 15 s alone; two tests share the cores
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 2 << 20)  # KiB
    layers = SIZES[generation, size]["num_hidden_layers"]
    assert int(done.stdout) > 10 * layers


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_toy_answers_as_transformers_beyond_what_it_was_trained_at(generation: str, tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy", **toy_config(generation))
    checkpoint = open_checkpoint(toy.folder)
    graph = trace(checkpoint.spec)
    reference = Reference(graph, checkpoint, FULL_PRECISION)
    ids = torch.randint(3, 96, (3 * TOY_BOUND,), generator=torch.Generator().manual_seed(1)).tolist()
    steps = Drive(ids=tuple(ids), prefills=(TOY_BOUND + 9, 13))
    with torch.no_grad():
        expected = toy.model(torch.tensor([ids])).logits[0][steps.positions]
    assert (drive(reference, steps) - expected).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.toolchain
@pytest.mark.parametrize("target", ["executorch", "onnxruntime", "coreml"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_toy_is_exported_to_every_target(generation: str, target: str, tmp_path: Path) -> None:
    """int4, rounded: codes and parity pass. With the bundled tokenizer, whose ids are the first of the vocabulary."""
    config = toy_config(generation, heads=WIDE["num_attention_heads"]) | WIDE
    toy = write_toy(tmp_path / "toy", **config)
    for file in BUNDLED_MODEL.glob("tokenizer*.json"):
        (toy.folder / file.name).write_bytes(file.read_bytes())
    words = [str(toy.folder), "-t", target, "-p", "int4", "--calibration", "none", "--json"]
    words += ["-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 8), result.output  # what int4 costs a random model is another matter
    manifest = json.loads(result.stdout)[0]["manifest"]
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "passed"), manifest["parity"]


@pytest.mark.parametrize("kind", ["llama4", "llama4_text", "mllama", "mllama_text_model"])
def test_what_is_not_dense_text_is_refused(kind: str, tmp_path: Path) -> None:
    config = config_of("Llama 3.1", "8B") | {"model_type": kind}
    with pytest.raises(InputError, match=re.escape(refused(kind))):
        read_spec(written(tmp_path, config))


def refused(kind: str) -> str:
    return f"model_type is '{kind}'; known: llama"


def test_the_readme_tells_of_every_generation_and_quotes_every_refusal() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if line[:2] == "| "]
    for generation in GENERATIONS:
        (row,) = (row for row in rows if row[0] == generation)
        sizes = [size for name, size in SIZES if name == generation]
        assert row[1].split(", ") == sizes
        assert row[-1] == "yes"
    for kind in ("llama4", "mllama"):
        assert refused(kind) in readme
