"""Every option of an export on every target, end to end on the trained sample; and the wheel."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import targets
from exporter.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.toolchain]
ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("target", targets.NAMES)
@pytest.mark.parametrize(
    "words",
    [
        "--precision fp32",
        "--precision fp16",
        "--precision int8",
        "--precision int8 --head int4",
        "--precision int4 --group-size 64",
        "--precision int4 --group-size 128",
        "--precision int4 --head int4",
        "--precision int4 --group-size row",
        "--precision int4 --group-size row --head int4",
        "--precision int4 --rule layers.0.mlp.down_proj=int8 --rule *.[qv]_proj=int8",
        "--precision int8 --rule layers.*.mlp.up_proj=int4 --rule layers.1.self_attn.*=int4",
        "--precision int4 --context 100",
        "--precision int4 --logits all",
    ],
)
def test_codes_and_parity_pass(words: str, target: str, tmp_path: Path) -> None:
    """Quality too, unless an option was asked for that trades it away: then the run says so with exit code 8."""
    common = [
        "-t",
        target,
        "-o",
        str(tmp_path / "out"),
        "--store",
        str(tmp_path / "store"),
        "--json",
        "--calibration",
        "none",
    ]
    result = CliRunner().invoke(app, [*words.split(), *common])
    manifest = json.loads(result.stdout)[0]["manifest"]
    verdicts = {kind: manifest[kind]["verdict"] for kind in ("codes", "parity", "quality")}
    assert (verdicts["codes"], verdicts["parity"]) == ("passed", "passed"), manifest["parity"]
    budget = manifest["quality"]["budget_mean_kl_nats"]
    within = manifest["quality"]["mean_kl_nats"] <= budget
    assert verdicts["quality"] == ("passed" if within else "failed")
    assert result.exit_code == (0 if within else 8)
    assert within or any(option in words for option in ("--group-size", "--head", "--precision int8 --rule"))


def test_the_wheel_carries_the_sample_and_works_without_the_source(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert {"samples/tiny-llama/model.safetensors", "optimum/commands/register/llama_edge.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    code = "from exporter.cli import main; import exporter, sys; print(exporter.__file__, file=sys.stderr); main()"
    words = ["-t", "onnxruntime", "-p", "fp32", "-o", tmp_path / "out", "--store", tmp_path / "store"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stderr
