"""The command line as a person meets it: what it prints, what it refuses and how, and that nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import targets
from exporter import interrupt, pipeline
from exporter.cli import app
from exporter.devices import find_device
from exporter.errors import ExportError, LoweringError, gravest
from exporter.spec import PER_ROW, Plan, Progress
from tests.conftest import Toy, later

RUNNER = CliRunner()


def run(*words: object) -> Result:
    return RUNNER.invoke(app, [str(word) for word in words])


def assert_refused(result: Result, *, code: int, says: str) -> None:
    """One sentence and a hint on stderr, the exit code, no traceback, nothing on stdout."""
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.fixture
def complete_toy(make_toy: Callable[..., Toy], sample: Path) -> Toy:
    """A random checkpoint with the sample's vocabulary and tokenizer."""
    toy = make_toy(vocab_size=2048, max_position_embeddings=128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sample / name, toy.folder / name)
    return toy


def test_an_unknown_target_names_the_known_ones() -> None:
    assert_refused(
        run("--target", "tflite"), code=2, says="unknown target 'tflite'; known: executorch, onnxruntime, coreml"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--precision", "int3"], "--precision int3 is unknown; known: fp32, fp16, int8, int4"),
        (["--head", "int2"], "--head int2 is unknown; known: int8, int4"),
        (["--precision", "fp16", "--head", "int8"], "--head int8 goes with int8 and int4"),
        (["--group-size", "48"], "--group-size 48 is unknown; known: 32, 64, 128"),
        (["--logits", "some"], "--logits some is unknown; known: last, all"),
        (["--context", "4096"], "--context 4096 is more than the 512 positions of this model"),
    ],
)
def test_options_that_cannot_be_are_refused_with_those_that_can(words: list[str], says: str, tmp_path: Path) -> None:
    assert_refused(run("--target", "onnxruntime", "-o", tmp_path / "out", *words), code=2, says=says)
    assert not (tmp_path / "out").exists()


def test_a_group_size_that_does_not_divide_names_those_that_do(complete_toy: Toy, tmp_path: Path) -> None:
    result = run(complete_toy.folder, "-t", "onnxruntime", "--group-size", 128, "-o", tmp_path / "out")
    assert_refused(result, code=2, says="--group-size 128 does not divide the 64 columns")
    assert "take --group-size 32" in result.stderr  # 64 and 96 columns


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prefer", "speed"], "--prefer speed is unknown; known: quality, prefill, decode"),
        (["--prefer", "speed", "--device", "iphone-15-pro"], "--prefer speed is unknown; known: quality, prefill"),
        (["--prefer", "prefill", "-p", "int4"], "--prefer prefill multiplies int8 by int8, --precision is int4"),
        (["--prefer", "prefill", "-p", "fp16"], "--prefer prefill multiplies int8 by int8, --precision is fp16"),
        (
            ["--prefer", "prefill", "--rule", "layers.2.* = int4"],
            "target onnxruntime: under --prefer prefill the body is int8, but model.layers.2.self_attn.q_proj.weight "
            "is int4",
        ),
        (["--prefer", "decode", "-p", "int8"], "--prefer decode widens the groups of int4, --precision is int8"),
        (["--prefer", "decode", "--group-size", "64"], "--prefer decode takes int4 groups of 128, --group-size is 64"),
    ],
)
def test_a_preference_is_refused_with_what_pulls_against_it(words: list[str], says: str, tmp_path: Path) -> None:
    assert_refused(run("--target", "onnxruntime", "-o", tmp_path / "out", *words), code=2, says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["coreml", "executorch"])
def test_a_target_that_prefill_changes_nothing_for_refuses_it(target: str, tmp_path: Path) -> None:
    result = run("-t", target, "--prefer", "prefill", "-o", tmp_path / "out")
    assert_refused(result, code=2, says=f"target {target}: --prefer prefill changes nothing here")


@pytest.mark.parametrize(
    ("words", "precision", "group_size"),
    [
        ([], "int4", 32),
        (["--prefer", "quality"], "int4", 32),
        (["--prefer", "prefill"], "int8", 32),
        (["--prefer", "prefill", "-p", "int8", "--head", "int4"], "int8", 32),
        (["--prefer", "decode"], "int4", 128),
        (["--prefer", "decode", "--group-size", "128"], "int4", 128),
        (["--prefer", "decode", "--group-size", "row"], "int4", PER_ROW),
    ],
)
def test_a_preference_decides_precision_and_groups_and_is_in_the_plan(
    words: list[str], precision: str, group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(monkeypatch, "-t", "onnxruntime", "-o", tmp_path / "out", *words)
    assert (plan.scheme.body, plan.scheme.group_size) == (precision, group_size)
    assert plan.prefer == (words[1] if words else "quality")


def test_decode_takes_the_widest_groups_that_divide_every_int4_row(
    make_toy: Callable[..., Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy(intermediate_size=192)
    words = (toy.folder, "-t", "onnxruntime", "--prefer", "decode", "-o", tmp_path / "out")
    assert planned(monkeypatch, *words).scheme.group_size == 64
    assert_refused(run(*words, "--group-size", 32), code=2, says="takes int4 groups of 64, --group-size is 32")
    narrow = make_toy(intermediate_size=96)
    words = (narrow.folder, *words[1:])
    says = "wants int4 groups of 64 or 128, rows of 64, 96, 128 columns have none in common"
    assert_refused(run(*words), code=2, says=says)
    rule = "layers.*.mlp.down_proj = int8"
    assert planned(monkeypatch, *words, "--rule", rule).scheme.group_size == 64


def planned(monkeypatch: pytest.MonkeyPatch, *words: object) -> Plan:
    """The plan that the command line makes of the words, without running it."""
    plans: list[Plan] = []

    def export(plan: Plan, progress: Progress) -> list[pipeline.Outcome]:
        plans.append(plan)
        return []

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "export", export)
        result = run(*words)
    assert plans, result.output
    return plans[0]


def test_a_missing_option_and_a_missing_checkpoint_are_told(tmp_path: Path) -> None:
    assert run(tmp_path).exit_code == 2
    assert_refused(run(tmp_path / "absent", "-t", "coreml"), code=3, says="absent")


def test_a_truncated_checkpoint_is_refused_and_left_as_it_was(complete_toy: Toy, tmp_path: Path) -> None:
    file = complete_toy.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    before = {path.name: path.read_bytes() for path in complete_toy.folder.iterdir()}
    result = run(complete_toy.folder, "-t", "all", "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert_refused(result, code=3, says="not a whole safetensors file")
    assert {path.name: path.read_bytes() for path in complete_toy.folder.iterdir()} == before
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_tokenizer_is_refused(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    result = run(make_toy().folder, "-t", "onnxruntime", "-o", tmp_path / "out")
    assert_refused(result, code=3, says="has no tokenizer.json")


def test_a_tokenizer_of_another_model_is_refused(
    complete_toy: Toy, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    small = make_toy(vocab_size=96)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(complete_toy.folder / name, small.folder / name)
    result = run(small.folder, "-t", "onnxruntime", "-o", tmp_path / "out")
    assert_refused(result, code=3, says="the model's vocabulary ends at 95")


def test_a_token_beyond_the_vocabulary_is_named(complete_toy: Toy, tmp_path: Path) -> None:
    """One that no text has, so that only a chat would have met it, on the phone."""
    path = complete_toy.folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    extra = {"id": 2048, "content": "<|tool|>", "special": True, "normalized": False}
    tokenizer["added_tokens"].append({**extra, "single_word": False, "lstrip": False, "rstrip": False})
    path.write_text(json.dumps(tokenizer))
    result = run(complete_toy.folder, "-t", "onnxruntime", "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert_refused(result, code=3, says="has token 2048 ('<|tool|>'), the model's vocabulary ends at 2047")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("model.layers.1.mlp.up_proj.weight", "int4"),
        ("model.layers.1.mlp.up_proj.weight", "fp16"),
        ("model.layers.1.mlp.up_proj.weight", "fp32"),
        ("model.layers.1.input_layernorm.weight", "int4"),
        ("model.embed_tokens.weight", "fp32"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    name: str, precision: str, value: float, complete_toy: Toy, tmp_path: Path
) -> None:
    tensors = load_file(complete_toy.folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, complete_toy.folder / "model.safetensors")
    words = ["-t", "onnxruntime", "-p", precision, "-o", tmp_path / "out", "--store", tmp_path / "store"]
    words += ["--calibration", "none"] if precision == "int4" else []
    result = run(complete_toy.folder, *words)
    assert_refused(result, code=3, says=f"{name} holds values that are not finite")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "onnxruntime").mkdir(parents=True)
    (out / "onnxruntime" / "thesis.txt").write_text("ten years of work")
    assert_refused(run("-t", "onnxruntime", "-o", out), code=3, says="holds onnxruntime, which is no bundle")
    (out / "notes.txt").write_text("x")
    assert_refused(run("-t", "coreml", "-o", out), code=3, says="holds notes.txt")
    assert (out / "onnxruntime" / "thesis.txt").read_text() == "ten years of work"
    assert_refused(run("-t", "coreml", "-o", out / "notes.txt"), code=3, says="is a file, a folder was expected")


@pytest.mark.toolchain
def test_what_a_killed_run_left_hidden_does_not_stop_the_next(complete_toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".onnxruntime.k1ll3d").mkdir(parents=True)
    words = (complete_toy.folder, "-t", "onnxruntime", "-p", "fp32", "-o", out, "--store", tmp_path / "store")
    assert run(*words).exit_code == 0


@pytest.mark.parametrize("content", [b"", b"too short", b"\xff\xfe\xfa" * 1000])
def test_an_evaluation_text_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    result = run("-t", "onnxruntime", "--eval-text", text, "-o", tmp_path / "out")
    assert_refused(result, code=3, says="evaluation text")


def test_too_little_disk_is_refused_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    result = run("-t", "onnxruntime", "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert_refused(result, code=5, says="MB are needed")


def test_what_does_not_fit_the_device_is_refused_before_anything_is_done(
    complete_toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(find_device("iphone-15-pro"), app_bytes=10**5, app_bytes_entitled=10**5)
    monkeypatch.setattr("exporter.devices.load_devices", lambda: {small.slug: small})
    out, store = tmp_path / "out", tmp_path / "store"
    result = run(complete_toy.folder, "--device", small.slug, "-o", out, "--store", store)
    assert_refused(result, code=5, says="are needed on iPhone 15 Pro, which has 0.0 GiB (what one app may use")
    assert not out.exists()
    assert not store.exists()


def test_a_disk_that_runs_full_on_the_way_leaves_nothing(
    complete_toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.onnx.data")

    monkeypatch.setattr(pipeline, "copy_tokenizer", full)
    out = tmp_path / "out"
    result = run(complete_toy.folder, "-t", "onnxruntime", "-o", out, "--store", tmp_path / "store")
    assert_refused(result, code=5, says="the disk is full while writing model.onnx.data")
    assert list(out.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small file system needs root")
@pytest.mark.toolchain
@pytest.mark.parametrize("target", ["onnxruntime", *later("executorch", "coreml", "gguf")])
def test_a_real_full_disk_is_one_sentence_at_every_stage(target: str, complete_toy: Toy, tmp_path: Path) -> None:
    """A file system of few kB fills up while the store is written, a larger one while the artifact is."""
    for size, place in (("24k", "--store"), ("96k", "--out")):
        disk = tmp_path / f"disk-{size}"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("this host does not let a test mount a file system")
        try:
            code = (
                "import shutil, sys, collections\n"
                "usage = collections.namedtuple('usage', 'total used free')\n"
                "shutil.disk_usage = lambda _: usage(1 << 40, 0, 1 << 40)\n"  # the check beforehand lets it pass
                "from exporter.cli import main; main()"
            )
            places = {"--store": tmp_path / "store", "--out": tmp_path / "out"} | {place: disk / "x"}
            words = [str(word) for pair in places.items() for word in pair]
            words += ["--calibration", "none"]
            command = [sys.executable, "-c", code, str(complete_toy.folder), "-t", target, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 5, done.stderr
            assert "Traceback" not in done.stderr
            assert "the disk is full" in done.stderr
            left = [path for path in disk.rglob("*") if path.is_file()]
            assert all(path.suffix == ".safetensors" and not path.name.startswith(".") for path in left)
        finally:
            subprocess.run(["umount", disk], check=True)


def export_process(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from exporter.cli import main; main()", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.toolchain
@pytest.mark.parametrize("sent", [signal.SIGINT, *later(signal.SIGTERM)])
@pytest.mark.parametrize(
    ("target", "seen"),
    [
        ("onnxruntime", "store/*/*"),  # quantizing
        ("onnxruntime", "out/.*"),  # lowering
        ("executorch", "out/.*"),
        ("coreml", "out/.*"),
        ("executorch", "out/.*/model.pte"),  # proving, in a process of its own
        ("coreml", "out/.*/model.mlpackage"),
    ],
)
def test_an_interrupt_leaves_nothing_half_written(sent: signal.Signals, target: str, seen: str, tmp_path: Path) -> None:
    """Sent when the first file that matches ``seen`` is there."""
    out, store = tmp_path / "out", tmp_path / "store"
    calibration = () if seen.startswith("store") else ("--calibration", "none")
    process = export_process("-t", target, "-o", out, "--store", store, *calibration)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(seen)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not out.exists() or list(out.iterdir()) == []
    assert list(store.rglob(".*")) == []


def test_an_interrupt_inside_a_finalizer_shows_no_traceback_and_is_remembered() -> None:
    code = (
        "import signal; from exporter import interrupt; interrupt.listen()\n"
        "class Held:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "del (held := [Held()])[0]\n"
        "try: interrupt.check()\nexcept KeyboardInterrupt: print('remembered')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("remembered\n", "")


def test_an_interrupt_that_native_code_turned_into_an_error_is_still_one(
    complete_toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        monkeypatch.setattr(interrupt, "_received", True)
        raise LoweringError("could not determine the shape of object", hint="")

    monkeypatch.setattr(type(targets.load("onnxruntime")), "lower", interrupted)
    out = tmp_path / "out"
    result = run(complete_toy.folder, "-t", "onnxruntime", "-o", out, "--store", tmp_path / "store")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (MemoryError(), 5, "the memory is full"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            5,
            "memory is full",
        ),
        (ZeroDivisionError("of ours"), 1, "ZeroDivisionError: of ours"),
    ],
)
def test_what_nobody_foresaw_is_a_sentence_too(
    raised: Exception, code: int, says: str, complete_toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(pipeline, "trace_program", fail)
    result = run(complete_toy.folder, "-t", "onnxruntime", "-o", tmp_path / "out")
    assert_refused(result, code=code, says=says)
    kept = [file.read_text() for file in tmp_path.glob("llama-export-*.txt")]
    assert [f"{type(raised).__name__}: {raised}" in text for text in kept] == ([True] if code == 1 else [])


@pytest.mark.toolchain
def test_a_toy_goes_through_with_json_on_stdout_alone(complete_toy: Toy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (complete_toy.folder, "-t", "onnxruntime", "-p", "fp32", "-o", out, "--store", tmp_path / "store", "--json")
    result = run(*words)
    assert result.exit_code == 0, result.output
    (outcome,) = json.loads(result.stdout)
    manifest = outcome["manifest"]
    assert manifest == json.loads((out / "onnxruntime" / "manifest.json").read_text())
    assert {manifest[kind]["verdict"] for kind in ("codes", "parity", "quality", "latency")} == {"passed"}
    assert run(*words).exit_code == 0  # our own bundle may be replaced


@pytest.mark.toolchain
def test_when_one_target_fails_the_others_are_finished_and_what_it_left_is_kept(
    complete_toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = targets.load("executorch")

    def fail(*arguments: Any) -> None:
        (arguments[-1] / "model.pte").write_bytes(b"half")
        raise LoweringError("the toolchain said no", hint="ask again")

    monkeypatch.setattr(type(broken), "lower", lambda _self, *arguments: fail(*arguments))
    out = tmp_path / "out"
    words = (
        complete_toy.folder,
        "-t",
        "executorch,onnxruntime",
        "-p",
        "fp32",
        "-o",
        out,
        "--store",
        tmp_path / "store",
    )
    result = run(*words)
    assert result.exit_code == 6
    assert "executorch: the toolchain said no" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["executorch.failed", "onnxruntime"]
    assert (out / "executorch.failed" / "model.pte").read_bytes() == b"half"
    assert json.loads((out / "executorch.failed" / "failure.json").read_text())["exit_code"] == 6


def test_the_gravest_outcome_is_the_earliest_stage_that_failed() -> None:
    assert gravest([0, 8, 7]) == 7
    assert gravest([0, 6, 7]) == 6
    assert gravest([0, 0]) == 0


def test_every_error_class_has_its_own_documented_exit_code() -> None:
    from exporter import errors

    tree = errors.__doc__ or ""
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, ExportError)]
    for error in classes:
        if error is not ExportError:
            assert f"{error.__name__} " in tree
            line = next(line for line in tree.splitlines() if error.__name__ in line)
            assert str(error.exit_code) in line


def test_inspect_tells_a_checkpoint_by_its_headers(complete_toy: Toy) -> None:
    result = run("inspect", complete_toy.folder, "--json")
    facts = json.loads(result.stdout)
    assert facts["parameters"] == sum(parameter.numel() for parameter in complete_toy.model.parameters())
    assert facts["rope"]["kind"] == "default"
    assert "head_dim" in run("inspect", complete_toy.folder).stdout


@pytest.mark.toolchain
def test_targets_lists_every_backend_with_what_this_host_can_do_for_it() -> None:
    facts = json.loads(run("targets", "--json").stdout)
    assert [targets.label(row["target"], row["backend"]) for row in facts] == list(targets.LABELS)
    defaults = [row for row in facts if targets.label(row["target"], row["backend"]) in targets.NAMES]
    assert {row["standing"] for row in defaults} == {"executed here"}
    assert all(row["writes"] and row["told"] for row in facts)


STANDINGS = {
    "executed here": {
        *("executorch", "executorch-portable", "onnxruntime", "onnxruntime-qnn", "onnxruntime-webgpu"),
        *("onnxruntime-wasm", "coreml", "coreml-ane", "gguf"),
    },
    "lowered and audited": {
        *("executorch-coreml", "executorch-vulkan", "executorch-mps", "executorch-arm"),
        *("onnxruntime-coreml", "onnxruntime-nnapi", "onnxruntime-xnnpack"),
    },
    "needs something": {
        *("executorch-openvino", "executorch-ethos-u", "executorch-vgf", "executorch-qnn", "executorch-mediatek"),
    },
}
"""On Linux x86-64 with all that ``make setup``, Chromium and npm give. tests/test_contract.py runs each of the first
and audits each of the second."""


@pytest.mark.toolchain
@pytest.mark.skipif(sys.platform != "linux", reason="on a Mac Core ML runs more")
def test_every_backend_stands_where_the_documents_say() -> None:
    facts = {targets.label(row["target"], row["backend"]): row for row in json.loads(run("targets", "--json").stdout)}
    assert set().union(*STANDINGS.values()) == set(facts)
    for standing, labels in STANDINGS.items():
        for label in labels:
            lacking = targets.load(label).missing()
            assert facts[label]["standing"] == ("needs something" if lacking else standing)
            if lacking:
                assert any(word in lacking for word in ("install", "export QNN_SDK_ROOT")), lacking


def test_help_and_version_answer() -> None:
    assert run("--help").exit_code == 0
    assert run("--version").stdout.startswith("llama-export ")
    assert "--precision" in run("export", "--help").stdout


def test_optimum_reaches_the_same_command() -> None:
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "llama-edge", "--target", "tflite"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown target 'tflite'" in done.stderr
