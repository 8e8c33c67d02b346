"""The action at the repository's root, run as a runner would: inputs resolved, each of its own steps by bash."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exporter.cli import app
from targets.coreml import COMPUTE_UNITS
from tests.samples.action import BASH, ROOT, read_yaml, run_step, with_one_code_changed

pytestmark = [pytest.mark.toolchain, pytest.mark.skipif(BASH is None, reason="bash is not installed")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("action")
    words = ["-t", "onnxruntime", "-c", "64", "-o", str(folder / "out"), "--store", str(folder / "store")]
    result = CliRunner().invoke(app, [*words, "--calibration", "none"])
    assert result.exit_code == 0, result.output
    return folder / "out" / "onnxruntime"


def test_a_whole_bundle_is_green_and_its_reports_are_where_the_outputs_say(bundle: Path, tmp_path: Path) -> None:
    ran = run_step("validate", tmp_path / "run", bundle=str(bundle), max_size_mb="10")
    assert (ran.code, ran.outputs["verdict"], ran.outputs["exit-code"]) == (0, "passed", "0"), ran.stdout
    suite = ET.parse(ran.outputs["junit"]).getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == ("0", "0", "2")
    assert ran.summary == Path(ran.outputs["markdown"]).read_text()
    assert "| limit, size | passed |" in ran.summary
    assert "<svg" in Path(ran.outputs["html"]).read_text()
    assert json.loads(Path(ran.outputs["json"]).read_text())[0]["exit_code"] == 0
    assert "::error" not in ran.stdout


def test_one_changed_weight_is_red_and_named(bundle: Path, tmp_path: Path) -> None:
    tampered = with_one_code_changed(bundle, tmp_path / "bundle", accounted_for=True)
    ran = run_step("validate", tmp_path / "run", bundle=str(tampered))
    assert (ran.code, ran.outputs["verdict"]) == (7, "failed"), ran.stdout
    assert "| codes | **failed** | 37 of 38 tensors equal |" in ran.summary
    assert re.search(r"^::error file=.*codes::model\.\S+ differs from the store", ran.stdout, re.MULTILINE)


def test_bytes_that_the_manifest_does_not_tell_are_refused(bundle: Path, tmp_path: Path) -> None:
    tampered = with_one_code_changed(bundle, tmp_path / "bundle", accounted_for=False)
    ran = run_step("validate", tmp_path / "run", bundle=str(tampered))
    assert (ran.code, ran.outputs["verdict"]) == (3, "refused"), ran.stdout
    suite = ET.parse(ran.outputs["junit"]).getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("errors")) == ("1", "1")
    assert "has sha256" in ran.summary


def test_an_input_is_never_read_as_shell(tmp_path: Path) -> None:
    """A usage error proves nothing, so it is not called refused; and no report is promised to the summary."""
    ran = run_step("validate", tmp_path / "run", bundle=f'"; touch {tmp_path}/owned; echo "', max_size_mb="-1 $(id)")
    assert (ran.code, ran.outputs["verdict"]) == (2, "error"), ran.stdout
    assert not (tmp_path / "owned").exists()
    assert ran.summary == ""


def test_what_the_runner_measures_is_kept_as_a_device_report(bundle: Path, tmp_path: Path) -> None:
    ran = run_step("validate", tmp_path / "run", bundle=str(bundle), device_report="true")
    assert ran.code == 0, ran.stdout
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    again = CliRunner().invoke(
        app, ["validate", str(copied), "--device-report", ran.outputs["device-report"], "--json"]
    )
    (manifest,) = (outcome["manifest"] for outcome in json.loads(again.stdout))
    assert manifest["parity"]["verdict"] == "passed"
    told = json.loads(Path(ran.outputs["json"]).read_text())[0]["manifest"]
    assert manifest["parity"]["mean_kl_nats"] == told["parity"]["mean_kl_nats"] > 0
    assert manifest["latency"]["decode_tokens_per_s"] == told["latency"]["decode_tokens_per_s"] > 0


def test_compute_units_are_for_core_ml(bundle: Path, tmp_path: Path) -> None:
    ran = run_step("validate", tmp_path / "run", bundle=str(bundle), compute_units="ALL")
    assert (ran.code, ran.outputs["verdict"]) == (2, "error")
    assert "--compute-units ALL: ONNX Runtime runs it on the CPU here" in ran.stdout


@pytest.mark.parametrize(("version", "installed"), [("", str(ROOT)), ("0.1.0", "llama-export==0.1.0")])
def test_what_lies_beside_the_action_is_installed_unless_a_version_is_named(
    version: str, installed: str, tmp_path: Path
) -> None:
    ran = run_step("install", tmp_path / "run", stand_ins=True, version=version)
    assert (ran.code, ran.arguments) == (0, f"-m pip install {installed}\n")


def test_each_output_is_one_that_the_step_writes_and_reports_are_kept_when_it_fails() -> None:
    action = read_yaml(ROOT / "action.yml")
    step = next(step for step in action["runs"]["steps"] if step.get("id") == "validate")
    for output in action["outputs"].values():
        name = re.fullmatch(r"\$\{\{ steps\.validate\.outputs\.(\S+) \}\}", output["value"])
        assert name is not None
        assert f'echo "{name[1]}=' in step["run"]
    upload = action["runs"]["steps"][-1]
    assert upload["uses"].startswith("actions/upload-artifact@")
    assert "always()" in upload["if"]


@pytest.mark.parametrize("name", ["parity.yml", "macos.yml"])
def test_the_sample_workflows_set_only_inputs_that_the_action_has(name: str) -> None:
    action, workflow = read_yaml(ROOT / "action.yml"), read_yaml(ROOT / "samples" / "ci" / name)
    (job,) = workflow["jobs"].values()
    (used,) = (step for step in job["steps"] if step.get("uses") == "./")
    assert used["with"].keys() <= action["inputs"].keys()
    required = {name for name, given in action["inputs"].items() if given.get("required")}
    assert required <= used["with"].keys()


def test_the_macos_workflow_runs_on_all_compute_units_and_uploads_each_ones_report() -> None:
    (job,) = read_yaml(ROOT / "samples" / "ci" / "macos.yml")["jobs"].values()
    assert sorted(job["strategy"]["matrix"]["compute-units"]) == sorted(COMPUTE_UNITS)
    assert job["strategy"]["fail-fast"] is False, "one that fails would end the others"
    (used,) = (step["with"] for step in job["steps"] if step.get("uses") == "./")
    assert used["compute-units"] == "${{ matrix.compute-units }}"
    assert used["compute-units"] in used["artifact-name"], "two uploads of one name are refused"
    assert used["device-report"] == "true"
    assert job["runs-on"].startswith("macos-")
