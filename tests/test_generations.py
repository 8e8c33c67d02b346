"""Every Llama for text that Meta has released: parameters and tracing at its own size, answers and exports as a toy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import targets
from exporter.checkpoint import open_checkpoint
from exporter.checkpoint.config import read_spec
from exporter.cli import app
from exporter.errors import InputError
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import Drive, drive
from tests.conftest import with_tokenizer, write_toy
from tests.exporter.test_gguf_experts import UNTOLD
from tests.formats import FORMATS
from tests.generations import (
    BILLIONS,
    GENERATIONS,
    SIZES,
    TOY_BOUND,
    config_of,
    has_experts,
    toy_config,
    wide_config,
)
from tests.readme_table import README, Shown, table


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_transformers_wants(config: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 refuses the number that Scout's release has for true."""
    if "text_config" in config:
        return {**config, "text_config": as_transformers_wants(config["text_config"])}
    tuned = {"attn_temperature_tuning": bool(config["attn_temperature_tuning"])} if "floor_scale" in config else {}
    return {**config, **tuned}


@pytest.mark.parametrize(("generation", "size"), SIZES)
def test_a_released_size_has_the_parameters_that_transformers_counts(
    generation: str, size: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    spec = read_spec(written(tmp_path, config_of(generation, size)))
    read = spec.parameters
    own = config_of(generation, size)
    kind = AutoModelForImageTextToText if "vision_config" in own else AutoModelForCausalLM
    written(tmp_path, as_transformers_wants(own))
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.from_pretrained(tmp_path))
    assert read == model.num_parameters()
    named = BILLIONS.get(size) or float(size.removesuffix("B"))
    assert read / 1e9 == pytest.approx(named, rel=0.24)  # names are rounded, 1B is 1.24


STAGES = """
import resource, sys, time
from pathlib import Path
from typer.testing import CliRunner
from exporter.checkpoint import read_spec
from exporter.cli import app
from exporter.model.trace import trace

started = time.monotonic()
done = CliRunner().invoke(app, ["inspect", sys.argv[1], "--json"], catch_exceptions=False)
assert done.exit_code == 0, done.output
inspected = time.monotonic()
nodes = len(trace(read_spec(Path(sys.argv[1]))).nodes)
traced = time.monotonic()
peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(done.stdout, end="\\0")
print(nodes, inspected - started, traced - inspected, peak_kib)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize(("generation", "size"), SIZES)
def test_a_released_size_is_inspected_and_traced_in_seconds_and_little_memory(
    generation: str, size: str, tmp_path: Path
) -> None:
    """From files of their full length, 810 GB of them, that take no place on the disk."""
    config = config_of(generation, size)
    written(tmp_path, config)
    parameters = write_hollow(tmp_path, as_transformers_wants(config))
    if "vision_config" in config:  # of which the text part alone is taken
        parameters = read_spec(tmp_path).text_alone().parameters
    done = subprocess.run([sys.executable, "-c", STAGES, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts, figures = done.stdout.split("\0")
    assert json.loads(facts)["parameters"] == parameters
    assert json.loads(facts)["bytes"] > 2 * parameters
    nodes, inspect_s, trace_s, peak_kib = map(float, figures.split())
    assert nodes > 10 * read_spec(tmp_path).num_hidden_layers
    assert peak_kib < 2 << 20
    assert inspect_s + trace_s < 120  # 405B takes some 15 s alone; two tests share the cores


def write_hollow(folder: Path, config: dict[str, Any]) -> int:
    """The weights that transformers has for ``config``, bfloat16 in one file of safetensors of which only the header
    is written; gives their number."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(**config))
    header, end = dict[str, Any](), 0
    for name, tensor in model.named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return end // 2


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
@pytest.mark.parametrize("target", targets.NAMES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_toy_is_exported_to_every_target(
    generation: str, target: str, record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    """int4, rounded: codes and parity pass."""
    record_property("exports", f"{generation} | {target}")
    config = wide_config(generation)
    if target == "gguf" and has_experts(generation):  # llama.cpp takes what the releases have for granted
        config |= UNTOLD
        config |= {} if config["use_qk_norm"] else {"num_local_experts": 128, "intermediate_size": 64}
    toy = with_tokenizer(write_toy(tmp_path / "toy", **config))
    words = [str(toy.folder), "-t", target, "-p", "int4", "--calibration", "none", "--json"]
    words += ["-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 8), result.output  # what int4 costs a random model is another matter
    manifest = json.loads(result.stdout)[0]["manifest"]
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "passed"), manifest["parity"]


@pytest.mark.parametrize("kind", ["mllama_text_model", "llava"])
def test_what_is_not_dense_text_is_refused(kind: str, tmp_path: Path) -> None:
    config = config_of("Llama 3.1", "8B") | {"model_type": kind}
    with pytest.raises(InputError, match=re.escape(refused(kind))):
        read_spec(written(tmp_path, config))


def refused(kind: str) -> str:
    return f"model_type is '{kind}'; known: llama, llama4_text, llama4, mllama"


def test_the_readme_tells_of_every_generation_its_sizes_and_what_was_measured() -> None:
    readme = README.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if line[:2] == "| "]
    for generation in GENERATIONS:
        described, filled = (row for row in rows if row[0] == generation)
        assert described[1].split(", ") == [size for name, size in SIZES if name == generation]
        assert len(filled) == 1 + len(FORMATS)
        assert "not measured" not in " ".join(filled)


def test_a_cell_is_green_only_where_all_three_of_its_tests_are() -> None:
    shown = {
        **{("reads", name, format): Shown(green=True) for name in GENERATIONS for format in FORMATS},
        **{("takes", format, target): Shown(green=True) for format in FORMATS for target in targets.NAMES},
        **{("exports", name, target): Shown(green=True) for name in GENERATIONS for target in targets.NAMES},
    }
    shown["reads", "Llama 2", "Meta"] = Shown(green=False, missing="its test fails")
    shown["takes", "LoRA", "coreml"] = Shown(green=False, refused="no such thing")
    del shown["exports", "Llama 3", "gguf"]
    cells = {line.split(" | ")[0].strip("| "): line.strip("|").split("|")[1:] for line in table(shown).splitlines()}
    row = dict(zip(FORMATS, (cell.strip() for cell in cells["Llama 2"]), strict=True))
    assert row["safetensors"] == "all"
    assert row["Meta"].startswith("**red** (")
    assert row["LoRA"].startswith("all but coreml (")
    assert cells["Llama 3"][0].strip().startswith("all but **red** gguf (")
    for note in ("**red**: its test fails", 'refused: "no such thing"', "**red**: not measured"):
        assert note in table(shown)
