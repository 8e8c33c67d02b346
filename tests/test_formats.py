"""The table of README.md: every generation, in every format, to every target. Of each cell three things are shown:

the generation in that format answers as transformers on the weights that the format means; the format, holding the
trained sample, goes to that target with codes and parity passed; and so does the generation
(``tests.test_generations``). What a test has shown it tells as a property, of which ``tests.readme_table`` makes the
table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import targets
from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
from exporter.cli import app
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import Drive, drive
from tests.conftest import Toy, with_tokenizer, write_toy
from tests.formats import FORMATS, REFUSED, toy_for, was_released
from tests.generations import GENERATIONS, TOY_BOUND, WIDE, toy_config, wide_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_generation_in_a_format_is_the_model_that_transformers_has(
    generation: str, format: str, record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    if not was_released(generation, format):
        pytest.skip("there is no such release")
    record_property("reads", f"{generation} | {format}")
    toy = write_toy(tmp_path / "toy", **toy_for(format, toy_config(generation)))
    written = FORMATS[format](toy)
    checkpoint = open_checkpoint(written.path, adapter=written.adapter)
    reference = Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION)
    ids = torch.randint(3, 96, (3 * TOY_BOUND,), generator=torch.Generator().manual_seed(1))
    steps = Drive(ids=tuple(ids.tolist()), prefills=(TOY_BOUND + 9, 13))
    weights = {name: weight.float() for name, weight in written.weights.items()}
    assert not toy.model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.no_grad():
        expected = toy.model(ids[None]).logits[0][steps.positions]
    assert (drive(reference, steps) - expected).abs().max() < 1e-4


def write_sample(folder: Path, format: str) -> Toy:
    """The trained sample, which a format is to hold; for a rotation, whose matrices are of powers of two, a toy."""
    from transformers import AutoModelForCausalLM

    if format == "SpinQuant":
        model = write_toy(folder, **toy_for(format, toy_config("Llama 3.2") | WIDE) | {"intermediate_size": 1024}).model
    else:
        model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
        model.save_pretrained(folder)
    return with_tokenizer(Toy(folder=folder, model=model))


@pytest.mark.toolchain
@pytest.mark.parametrize("target", targets.NAMES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_format_goes_to_a_target(
    format: str, target: str, record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    """With no option that says what becomes of the weights, but that nothing is calibrated. What is refused goes with
    --requantize."""
    record_property("takes", f"{format} | {target}")
    written = FORMATS[format](write_sample(tmp_path / "sample", format))
    words = [str(written.path), "-t", target, "--calibration", "none", "--json"]
    if reason := REFUSED.get((format, target)):
        result = CliRunner().invoke(app, [*words, "-o", str(tmp_path / "refused")])
        assert result.exit_code in (2, 3), result.output
        (sentence,) = (line for line in result.output.splitlines() if line.startswith("error: "))
        assert reason in sentence
        record_property("refused", sentence.removeprefix("error: "))
        words.append("--requantize")
    words += ["--adapter", str(written.adapter)] if written.adapter else []
    words += ["-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 8), result.output  # what int4 costs is another matter
    manifest = json.loads(result.stdout)[0]["manifest"]
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "passed"), manifest["parity"]


@pytest.mark.toolchain
@pytest.mark.parametrize("target", ["executorch", "onnxruntime", "coreml"])
def test_codes_of_experts_are_kept_on_the_way_to_a_target(target: str, tmp_path: Path) -> None:
    """What the table has of three tests, seen in one where it is least alike."""
    written = FORMATS["compressed-tensors int4"](
        with_tokenizer(write_toy(tmp_path / "toy", **wide_config("Llama 4 Scout")))
    )
    words = [str(written.path), "-t", target, "--calibration", "none", "--json"]
    words += ["-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (0, 8), result.output
    manifest = json.loads(result.stdout)[0]["manifest"]
    assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "passed"), manifest["parity"]
    (kept,) = manifest["scheme"]["kept"]
    assert "model.layers.3.feed_forward.experts.3.down_proj.weight" in kept["matrices"]
