"""The runtimes' own aarch64 builds on a bundle's goldens, under qemu as three cores of phones: ``make check-arm64``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import targets
from benchmarks.arm64.__main__ import answer_emulated, answer_here, measure
from benchmarks.arm64.drift import as_table
from benchmarks.arm64.machine import CORES, HOST, NEEDS_MORE, ROOT, set_up
from exporter.bundle import MANIFEST, Goldens, open_bundle, read_artifact
from exporter.errors import LoweringError
from exporter.parity import drive


@pytest.fixture(scope="module", params=["onnxruntime", "executorch"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the target: LLAMA_BUNDLE where that is one, else one made of the sample model."""
    target: str = request.param
    if named := os.environ.get("LLAMA_BUNDLE"):
        if json.loads((Path(named) / MANIFEST).read_text())["target"] != target:
            pytest.skip(f"LLAMA_BUNDLE is not for {target}")
        return Path(named)
    folder = tmp_path_factory.mktemp("exported")
    words = ["-t", target, "--calibration", "none", "-o", folder / "bundle", "--store", folder / "store"]
    subprocess.run([sys.executable, "-m", "exporter", *map(str, words)], check=True, capture_output=True)
    (manifest,) = (folder / "bundle").rglob(MANIFEST)
    return manifest.parent


@pytest.fixture(scope="module")
def report(bundle: Path) -> dict[str, Any]:
    """Of all cores; what it shows is what this target is run for."""
    found = measure(bundle, list(CORES))
    print(f"\n{as_table(found)}")
    out = ROOT / "out" / "arm64"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{found['target']}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


@pytest.mark.toolchain
def test_the_program_that_is_emulated_answers_as_the_exporters_runner(bundle: Path, tmp_path: Path) -> None:
    """On this host: so what cores differ by is not the program."""
    manifest = open_bundle(bundle)
    target = targets.load(manifest["target"])
    with target.open(read_artifact(manifest, path=target.find(bundle)), threads=1) as runner:
        expected = drive(runner, Goldens.read(bundle).drive)
    got = answer_here(bundle, scratch=tmp_path)
    assert torch.equal(got.logits, expected)
    assert got.runtime.split(",")[0] == target.runtime().split(",")[0]


@pytest.mark.arm64
@pytest.mark.timeout(7200)  # the first one waits for downloads
def test_every_core_answers_within_the_gates_that_the_bundle_was_proven_by(report: dict[str, Any]) -> None:
    verdicts = {one["core"]: (one["verdict"], one["reason"]) for one in report["cores"]}
    assert verdicts == dict.fromkeys((HOST, *built_for(report)), ("passed", ""))
    assert set(report["not_measured"]) == set(CORES) - set(built_for(report))


def built_for(report: dict[str, Any]) -> list[str]:
    return [core for core in CORES if (report["target"], core) not in NEEDS_MORE]


@pytest.mark.arm64
@pytest.mark.timeout(7200)
def test_what_a_wheel_is_not_built_for_ends_with_an_illegal_instruction(bundle: Path, tmp_path: Path) -> None:
    """Where a later release runs there, this is to change."""
    target = json.loads((bundle / MANIFEST).read_text())["target"]
    cores = [core for runtime, core in NEEDS_MORE if runtime == target]
    machine = set_up(target)
    for core in cores:
        with pytest.raises(LoweringError, match="SIGILL"):
            answer_emulated(machine, core, bundle, scratch=tmp_path)


@pytest.mark.arm64
@pytest.mark.timeout(7200)
def test_cores_are_what_they_are_to_be(report: dict[str, Any]) -> None:
    """By the features that runtimes choose kernels by: Arm's dot product and int8 matrix multiply."""
    seen = {one["core"]: (one["machine"], {"asimddp", "svei8mm"} & set(one["features"])) for one in report["cores"]}
    wanted = {
        HOST: ("x86_64", set()),
        "cortex-a53": ("aarch64", set()),
        "cortex-a76": ("aarch64", {"asimddp"}),
        "cortex-a710": ("aarch64", {"asimddp", "svei8mm"}),
    }
    assert seen == {core: wanted[core] for core in (HOST, *built_for(report))}


@pytest.mark.arm64
@pytest.mark.timeout(7200)
def test_kernels_of_onnx_runtime_round_activations_by_core(report: dict[str, Any]) -> None:
    """What ``docs/decisions/0014-arithmetic-of-cores.md`` tells of int4; where a later release does otherwise, that is
    to change."""
    if report["target"] != "onnxruntime" or report["precision"] != "int4":
        pytest.skip("of int4 in ONNX Runtime")
    by_core = report["arithmetic"]
    assert by_core["cortex-a53"]["float"] < 1e-9
    for core in ("cortex-a76", "cortex-a710"):
        assert min(by_core[core], key=by_core[core].__getitem__) == "int8-per-token"
