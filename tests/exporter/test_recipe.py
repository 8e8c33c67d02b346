"""Recipes: read, extended, overridden, refused; and a resolved one gives the same plan again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from exporter.checkpoint import BUNDLED_MODEL
from exporter.cli import app
from exporter.errors import ExportError, InputError, UsageError
from exporter.planning import Choices, choices_of, plan
from exporter.recipe import FILE_NAME, read_recipe, schema, write_recipe
from exporter.spec import Method, Plan, Precision

SCHEMA = Path(__file__).parents[2] / "docs" / "recipe.schema.json"

CHOICES: dict[str, Choices] = {
    "defaults": {"target": "all"},
    "floats": {"target": "coreml", "precision": "fp16", "context": 64},
    "rounded": {"target": "onnxruntime", "calibration": "none", "group_size": "row", "head": "int4"},
    "prefill": {"target": "onnxruntime", "prefer": "prefill"},
    "decode": {"target": "executorch", "prefer": "decode", "rule": ["layers.0.mlp.down_proj = int8"]},
    "gptq": {
        **{"target": "executorch,coreml", "method": "gptq", "calibration": "corpus.txt", "calibration_column": "text"},
        **{"windows": 8, "window_length": 64, "seed": 3, "act_order": False, "damping": 0.5, "threads": 4},
    },
    "budget": {"target": "coreml", "budget_mb": 2.25, "logits": "all", "eval_text": "held-out.txt"},
    "divergence": {"target": "coreml", "max_kl": 0.01, "method": "awq"},
    "pruned head": {"target": "onnxruntime", "head_tokens": [2041, 7, 2044]},
    "palettes on a system": {"target": "coreml-ane", "precision": "lut4", "os": "ios18"},
    "int8, smoothed": {"target": "executorch", "precision": "int8", "method": "smoothquant"},
}


def made(tmp_path: Path, **choices: Any) -> Plan:
    return plan(BUNDLED_MODEL, out=tmp_path / "out", store=tmp_path / "store", **choices)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_the_resolved_recipe_of_a_run_gives_its_plan_again(choices: Choices, tmp_path: Path) -> None:
    first = made(tmp_path, **choices)
    assert made(tmp_path, **choices_of(first)) == first
    write_recipe(tmp_path, first, target=first.targets[0])
    again = made(tmp_path, **read_recipe(tmp_path / FILE_NAME))
    assert again.targets == first.targets[:1]
    assert made(tmp_path, **{**choices_of(again), "target": choices["target"]}) == first


def test_a_recipe_extends_another_and_options_come_before_both(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "b.toml").write_text('target = "coreml"\nprecision = "int8"\ncalibration = "none"\n')
    recipe = tmp_path / "r.toml"
    recipe.write_text('extends = "base/b.toml"\nprecision = "int4"\ngroup-size = 64\n')
    assert read_recipe(recipe) == {
        "target": "coreml",
        "precision": "int4",
        "calibration": "none",
        "group_size": "64",
    }
    words = ["--recipe", str(recipe), "--target", "nowhere"]
    result = CliRunner().invoke(app, [str(BUNDLED_MODEL), *words])
    assert result.exit_code == 2
    assert "unknown target 'nowhere'" in result.stderr


@pytest.mark.toolchain
def test_a_run_from_a_recipe_is_what_its_resolved_recipe_gives_again(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('target = "onnxruntime"\ncalibration = "none"\ncontext = 64\nhead = "int4"\n')
    words = ["--out", str(tmp_path / "one"), "--store", str(tmp_path / "store"), "--json"]
    first = CliRunner().invoke(app, ["export", "--recipe", str(recipe), *words])
    assert first.exit_code == 0, first.stderr
    bundle = tmp_path / "one" / "onnxruntime"
    words[1] = str(tmp_path / "two")
    CliRunner().invoke(app, ["export", "--recipe", str(bundle / FILE_NAME), *words])
    for name in ("model.onnx.data", "goldens.safetensors", FILE_NAME):
        assert (bundle / name).read_bytes() == (tmp_path / "two" / "onnxruntime" / name).read_bytes()
    listed = {entry["path"] for entry in json.loads(first.stdout)[0]["manifest"]["files"]}
    assert FILE_NAME in listed


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("target = ", "is no TOML"),
        ("targets = 'coreml'", "targets is unknown; known: extends, target, backend, device, os, precision"),
        ("context = '64'", "context is '64', integer was expected"),
        ("context = true", "context is True, integer was expected"),
        ("damping = 'high'", "damping is 'high', number was expected"),
        ("rule = 'a = int8'", "rule is 'a = int8', array was expected"),
        ("rule = [1]", "rule is [1], array was expected"),
        ("group-size = 1.5", "group-size is 1.5, string or integer was expected"),
        ("act-order = 1", "act-order is 1, boolean was expected"),
        ("extends = 1", "extends is 1, a path was expected"),
        ("extends = 'r.toml'", "extends itself"),
    ],
)
def test_a_recipe_that_is_wrong_is_told(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(content)
    with pytest.raises(InputError) as caught:
        read_recipe(tmp_path / "r.toml")
    assert says in str(caught.value)


def test_a_base_that_is_missing_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("extends = 'gone.toml'")
    result = CliRunner().invoke(app, [str(BUNDLED_MODEL), "--recipe", str(recipe)])
    assert result.exit_code == 3
    assert "gone.toml" in result.stderr


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="no target was named"):
        plan(BUNDLED_MODEL)


def test_the_published_schema_is_that_of_the_code() -> None:
    assert json.loads(SCHEMA.read_text()) == schema()


def test_a_plan_of_the_library_is_that_of_the_command_line(tmp_path: Path) -> None:
    told = made(tmp_path, target="coreml", precision="int8", method="rtn")
    assert (told.scheme.body, told.recipe.method) == (Precision.INT8, Method.ROUND)
    with pytest.raises(ExportError, match="--precision int3 is unknown"):
        made(tmp_path, target="coreml", precision="int3")
