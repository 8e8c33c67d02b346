"""Bisecting the file of an artifact: the op that was broken is named, and no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from exporter.bisect import find_partings, told
from exporter.bundle import MANIFEST, file_entries, write_json
from exporter.checkpoint import BUNDLED_MODEL
from exporter.cli import app
from exporter.model.trace import trace
from exporter.spec import Logits, Plan, Prefer
from targets.onnxruntime import TARGET

pytestmark = pytest.mark.toolchain
RUNNER = CliRunner()
IDS = list(range(1, 34))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A toy of three layers, its bundle, and the store."""
    from tests.conftest import write_toy

    folder = tmp_path_factory.mktemp("bisect")
    toy = write_toy(folder / "toy", num_hidden_layers=3, vocab_size=2048, bos_token_id=None, eos_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED_MODEL / name, toy.folder / name)
    words = [str(toy.folder), "-t", "onnxruntime", "-o", str(folder / "out"), "--store", str(folder / "store")]
    result = RUNNER.invoke(app, [*words, "--calibration", "none"])
    out = folder / "out"
    bundle = next(path for path in out.iterdir() if path.name.startswith("onnxruntime"))
    assert (bundle / MANIFEST).exists(), result.output
    return toy.folder, bundle, folder / "store"


def bisected(made: tuple[Path, Path, Path], bundle: Path) -> tuple[int, dict[str, Any]]:
    manifest = json.loads((bundle / MANIFEST).read_text())
    write_json(bundle / MANIFEST, {**manifest, "files": file_entries(bundle)})
    words = ["validate", str(bundle), "--against", str(made[0]), "--store", str(made[2]), "--bisect", "--json"]
    result = RUNNER.invoke(app, words)
    assert result.stdout, result.output
    return result.exit_code, json.loads(result.stdout)[0]


def broken(made: tuple[Path, Path, Path], folder: Path) -> Path:
    shutil.copytree(made[1], folder)
    return folder


def test_a_wrong_epsilon_is_found_in_its_layer(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle = broken(made, tmp_path / "bundle")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    name = "model.layers.1.post_attention_layernorm.weight"
    (norm,) = (node for node in model.graph.node if name in node.input)
    (epsilon,) = (attribute for attribute in norm.attribute if attribute.name == "epsilon")
    epsilon.f = 0.05
    onnx.save(model, bundle / "model.onnx")
    code, outcome = bisected(made, bundle)
    assert code == 7
    assert outcome["bisection"].startswith(f"layer 1, rms_norm {name} is off by ")
    assert ";" not in outcome["bisection"]


def test_changed_codes_are_found_in_their_matrix(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle = broken(made, tmp_path / "bundle")
    name = "model.layers.2.mlp.down_proj.weight"
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    (codes,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{name}.codes")
    place = {entry.key: entry.value for entry in codes.external_data}
    content = bytearray((bundle / "model.onnx.data").read_bytes())
    content[int(place["offset"])] ^= 0x01
    (bundle / "model.onnx.data").write_bytes(content)
    code, outcome = bisected(made, bundle)
    assert code == 7
    assert outcome["bisection"].startswith(f"layer 2, linear {name} is off by ")
    assert ";" not in outcome["bisection"]


def test_a_cache_that_is_not_written_is_found_in_its_attention(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle = broken(made, tmp_path / "bundle")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][1]
    attention.output[1] = "lost"
    model.graph.node.append(onnx.helper.make_node("Identity", ["past_key_values.1.key"], ["present.1.key"]))
    onnx.save(model, bundle / "model.onnx")
    code, outcome = bisected(made, bundle)
    assert code == 7
    assert outcome["bisection"].startswith("layer 1, attention ")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("logits", list(Logits))
def test_every_op_of_a_right_file_is_found_and_right(
    precision: str, logits: Logits, make_toy: Any, make_plan: Any
) -> None:
    check_right(make_toy(), make_plan, precision=precision, logits=logits)


def test_integer_products_are_found_too(make_toy: Any, make_plan: Any) -> None:
    check_right(make_toy(tie_word_embeddings=False), make_plan, precision="int8", prefer=Prefer.PREFILL)


def check_right(toy: Any, make_plan: Any, **changes: Any) -> None:
    from calibration.layers import quantize
    from exporter.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(toy.folder)
    plan: Plan = make_plan(toy.folder, **changes)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    graph = trace(checkpoint.spec)
    plan.out.mkdir(exist_ok=True)
    artifact = TARGET.lower(graph, store, plan, plan.out)
    observer = TARGET.observer(artifact, graph=graph, threads=1)
    assert find_partings(observer, graph, store, ids=IDS) == []


def test_a_file_in_which_nothing_parts_is_told_so() -> None:
    assert told([], ops=9) == (
        "no op does: each of 9 gives what the reference gives for the same inputs, activations unrounded"
    )


@pytest.mark.parametrize("name", ["executorch", "coreml"])
def test_a_target_whose_values_cannot_be_seen_says_why(name: str, tmp_path: Path) -> None:
    manifest = {"schema": "llama-export/bundle/1", "target": name, "files": []}
    write_json(tmp_path / MANIFEST, manifest)
    result = RUNNER.invoke(app, ["validate", str(tmp_path), "--against", str(tmp_path), "--bisect"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --bisect: ")
