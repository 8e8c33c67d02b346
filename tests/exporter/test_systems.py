"""``--os``: the oldest system that an app runs on, and what Core ML knows on each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exporter.cli import app
from exporter.errors import UsageError
from exporter.spec import Precision
from exporter.systems import System, oldest_system, parse_system, too_old
from targets import LABELS
from targets.coreml.systems import SYSTEMS, lacking


@pytest.mark.parametrize(
    ("text", "system"),
    [
        ("ios17", System(kind="ios", major=17)),
        ("iOS 18.2", System(kind="ios", major=18)),
        (" iPadOS-26 ", System(kind="ipados", major=26)),
        ("macOS 15.1.1", System(kind="macos", major=15)),
        ("android12", System(kind="android", major=12)),
    ],
)
def test_systems_may_be_written_as_people_do(text: str, system: System) -> None:
    assert parse_system(text) == system
    assert parse_system(str(system)) == system


@pytest.mark.parametrize("text", ["", "18", "ios", "windows11", "ios 18 beta"])
def test_another_form_is_refused_with_the_known_systems(text: str) -> None:
    with pytest.raises(UsageError, match="known: iOS, iPadOS, macOS, Android"):
        parse_system(text)


@pytest.mark.parametrize("label", LABELS)
def test_what_a_label_needs_is_what_it_is_not_too_old_for(label: str) -> None:
    for kind in ("ios", "ipados", "macos"):
        oldest = oldest_system(label, kind)
        if oldest is None:
            assert too_old(label, System(kind=kind, major=1)) is None
            continue
        assert too_old(label, oldest, list(Precision)) is None
        assert f"needs {oldest} or later" in (too_old(label, System(kind=kind, major=oldest.major - 1)) or "")


def test_core_ml_says_what_an_older_system_does_not_know() -> None:
    ios17, states = System(kind="ios", major=17), "a cache that the model keeps (states)"
    assert too_old("coreml", ios17) == f"it needs iOS 18 or later: iOS 17 does not know {states}"
    assert "states), int4 weights" in (too_old("coreml", ios17, [Precision.INT4, Precision.INT8]) or "")
    assert "states), palettes with several tables" in (too_old("coreml", ios17, [Precision.LUT4]) or "")
    assert "states), several functions in a package" in (too_old("coreml-ane", ios17, [Precision.INT8]) or "")
    assert "ML Programs with compressed weights" in (too_old("coreml", System(kind="ios", major=15)) or "")
    assert too_old("coreml", System(kind="macos", major=14)) == (
        f"it needs macOS 15 or later: macOS 14 does not know {states}"
    )
    assert too_old("coreml", System(kind="macos", major=26)) is None
    assert too_old("coreml", System(kind="android", major=14)) == "Android has no Core ML"


def test_the_table_is_one_of_growing_knowledge() -> None:
    told = [lacking(system.ios, precisions=list(Precision), functions=True) for system in SYSTEMS]
    assert [len(missing) for missing in told] == [4, 4, 0]


@pytest.mark.parametrize("command", [[], ["plan"]])
def test_a_target_that_the_system_does_not_run_is_refused(command: list[str], tmp_path: Path) -> None:
    words = [*command, "-t", "coreml", "--os", "ios17"]
    words += [] if command else ["-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "target coreml does not run on --os iOS 17, it needs iOS 18 or later" in result.stderr
    assert "hint: take --target executorch or onnxruntime or gguf, or a newer --os" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_device_with_an_older_system_is_served_by_what_runs_there() -> None:
    words = ["plan", "--device", "iphone-15-pro", "--json"]
    told = [json.loads(CliRunner().invoke(app, [*words, *more]).stdout) for more in ([], ["--os", "ios17"])]
    assert [one["choices"]["target"] for one in told] == ["coreml", "executorch"]
    assert "not coreml: it needs iOS 18 or later" in told[1]["why"][0]
    other = CliRunner().invoke(app, [*words, "--os", "android14"])
    assert other.exit_code == 2
    assert "--os is Android 14, but iPhone 15 Pro runs ios" in other.stderr


@pytest.mark.toolchain
def test_the_table_of_systems_is_that_of_the_op_sets() -> None:
    """The oldest op set of coremltools that has the op."""
    from targets.coreml.toolchain import quiet

    with quiet():
        from coremltools.converters.mil.mil.ops.defs import iOS16, iOS18

    assert hasattr(iOS16, "constexpr_affine_dequantize")
    assert hasattr(iOS16, "constexpr_lut_to_dense")
    assert not hasattr(iOS16, "constexpr_blockwise_shift_scale")
    assert hasattr(iOS18, "constexpr_blockwise_shift_scale")
    assert hasattr(iOS18, "read_state")
    assert hasattr(iOS18, "constexpr_lut_to_dense")
    old, _, new = SYSTEMS
    assert (old.ios, old.int8_per_row, old.palettes, old.int4, old.states) == (16, True, True, False, False)
    assert (new.ios, new.int8_per_row, new.palettes, new.int4, new.states) == (18, True, True, True, True)
    assert (old.palettes_by_rows, new.palettes_by_rows) == (False, True)
