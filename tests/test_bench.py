"""The benchmark's own logic: programs under watch, and a report that says what was missed. Nothing is measured here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, bench_report, processes
from benchmarks.memory import Memory, resident_bytes
from benchmarks.processes import ProgramError, run

MIB = 1 << 20


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_a_program_that_fails_is_told_by_its_last_line() -> None:
    with pytest.raises(ProgramError, match=r"^exit code 3: no such tensor$"):
        run(python("import sys; print('warning\\nno such tensor', file=sys.stderr); sys.exit(3)"), timeout_s=30)


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    script = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(ProgramError, match="not done after 2 s"):
        run(python(script), timeout_s=2)
    assert has_ended(int(file.read_text()))


def has_ended(pid: int) -> bool:
    """Its parent is gone, so that the system takes it away, sooner or later."""
    for _ in range(50):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return True
        time.sleep(0.1)
    return False


def test_a_program_that_leaves_the_machine_no_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LEAST_AVAILABLE_BYTES", 1 << 60)
    with pytest.raises(ProgramError, match="ended by us"):
        run(python("import time; time.sleep(60)"), timeout_s=30)


def test_memory_counts_the_programs_that_a_process_starts() -> None:
    script = f"held = bytearray({200 * MIB}); print('held', flush=True); input()"
    alone = Memory()
    with Memory(children=True) as family:
        child = subprocess.Popen(python(script), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout
        child.stdout.readline()
        alone.look()
        family.look()
        child.communicate(b"\n")
    assert family.anonymous_bytes - alone.anonymous_bytes > 150 * MIB
    assert alone.anonymous_bytes <= resident_bytes()[0] + 150 * MIB


def test_what_a_peer_made_with_other_options_is_not_taken(tmp_path: Path) -> None:
    from benchmarks.peers import coreml

    settings = coreml.settings("ships")
    assert bench._made_before("coreml", "ships", tmp_path) is None
    (tmp_path / "export.json").write_text(json.dumps({"seconds": 1.0, **settings}))
    assert bench._made_before("coreml", "ships", tmp_path) == {"seconds": 1.0, **settings}
    (tmp_path / "export.json").write_text(json.dumps({"seconds": 1.0, **settings, "version": "coremltools 1.0"}))
    assert bench._made_before("coreml", "ships", tmp_path) is None


def test_an_export_without_room_is_not_tried(tmp_path: Path) -> None:
    disk = bench._export(["no.such.module"], tmp_path, needed_bytes=1 << 60)
    assert disk["failed"].startswith("not tried: about 1152921505 GB of disk are needed")
    memory = bench._export(["no.such.module"], tmp_path, needed_bytes=0, expected_bytes=2.0**60)
    assert memory["failed"].startswith("not tried: about 1073741824 GiB expected")


def test_an_export_that_fails_leaves_nothing_that_could_be_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("half")
    told = bench._export(["no.such.module"], out, needed_bytes=0)
    assert "No module named" in told["failed"]
    assert not out.exists()


def told(rate: float, *, peak: int) -> dict[str, Any]:
    rates = {name: [rate, rate * 1.1] for name in bench_report.RATES}
    held = {"idle_bytes": [0, 0], "loaded_bytes": [peak, 0], "peak_bytes": [peak, 0]}
    return {"load_s": 1.0, "tokens_per_s": rates, **held}


def runs(*records: dict[str, Any], measured: str = "today") -> dict[str, Any]:
    return {"measured": measured, "bytes_per_token": 1e9, "by_threads": {"2": list(records)}}


@pytest.fixture
def results() -> dict[str, Any]:
    def export(seconds: float, gib: float) -> dict[str, Any]:
        stages = {"imports": {"seconds": 1.0}, "x": {"seconds": seconds, "anonymous_bytes": int(gib * 2**30)}}
        return {"seconds": seconds, "stages": stages, "artifact_bytes": {"onnxruntime": 10**9}}

    record = {
        "machine": {"processor": "P", "system": "S", "torch": "2"},
        "parameters": 10**9,
        "bandwidth": {"2": {"sum": 20e9}},
        "exports": {
            "int4: onnxruntime": export(15, 1.0),
            "int4: executorch": export(45, 1.0),
            "int4: coreml": {"failed": "exit code 1: no room"},
        },
        "peers": {"genai: ours": {"failed": "SIGKILL: it said nothing"}},
        "runs": {
            "ours: onnxruntime: int4": runs(told(10, peak=2**30), {"failed": "once"}),
            "genai: ours": runs(told(20, peak=2**31)),
            "ours: executorch: int4": runs(told(10, peak=2**30)),
            "export_llama: ours": runs(told(5, peak=2**29), measured="yesterday"),
            "llama.cpp: Q4_0": runs({"failed": "exit code 1: bad magic"}),
        },
    }
    return {"1b": record, "8b": {**record, "parameters": 8 * 10**9, "runs": {}}}


def test_aims_are_met_or_missed_by_what_was_measured(results: dict[str, Any]) -> None:
    text = bench_report.write(results, out=None)
    assert "- **missed** by 50.0%: 1b, onnxruntime: int4 over genai: ours, decode at 0: 0.50" in text
    assert "- met: 1b, onnxruntime: int4 over genai: ours, runtime memory: 1.00 GiB, no more than 2.00" in text
    assert (
        "- met: 1b, executorch: int4 over export_llama: ours (not measured in the same run), decode at 0: 2.00" in text
    )
    assert "- met: 1b, int4 export for onnxruntime: 15.0 s" in text
    assert "- **missed** by 50.0%: 1b, int4 export for executorch: 45.0 s" in text
    assert "- **missed**: 1b, int4 export for coreml: exit code 1: no room" in text
    assert "- met: 8b, int4 export for executorch: 45.0 s, at most 240" in text


def test_failures_stand_in_the_tables(results: dict[str, Any]) -> None:
    text = bench_report.write(results, out=None)
    assert "| genai: ours | | failed: SIGKILL: it said nothing |" in text
    assert "| llama.cpp: Q4_0 | 2 | failed: exit code 1: bad magic |" in text
    assert "| ours: onnxruntime: int4 (1 more failed: once) | 2 |" in text
    assert "| 8b | 8.0 | 1.0, 1.0 | 1.0, 1.0 | not measured |" in text


def test_share_of_the_limit_is_speed_by_bytes_over_bandwidth(results: dict[str, Any]) -> None:
    row = next(
        line for line in bench_report.write(results, out=None).splitlines() if line.startswith("| genai: ours | 2")
    )
    assert "| 105% |" in row  # 21 tokens/s of 1 GB each, where 20 GB/s can be read
