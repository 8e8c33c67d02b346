"""Calibration as a person meets it: options that are refused, texts that cannot be used, and a run from chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.checkpoint import BUNDLED_MODEL
from tests.exporter.test_cli import RUNNER, app, assert_refused, run

SMALL = ("--windows", 4, "--window-length", 64)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """JSON lines of different chats, about 12,000 tokens."""
    lines = (BUNDLED_MODEL / "calibration.txt").read_text().splitlines()
    spoken = [line for line in lines if len(line) > 20]
    pairs = zip(spoken[::2], spoken[1::2], strict=False)
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
            for asked, said in pairs
        )
    )
    return path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("-p fp16 --calibration x.txt", "--calibration goes with int8 and int4, not with --precision fp16"),
        ("-p fp32 --method rtn", "--method goes with int8 and int4, not with --precision fp32"),
        ("-p fp16 --windows 8", "--windows goes with int8 and int4, not with --precision fp16"),
        ("-p fp16 --rule layers.0.*=int8", "--rule 'layers.0.*=int8' goes with int8 and int4"),
        ("--calibration none --method gptq", "--method gptq needs text, --calibration is none"),
        ("--calibration none --windows 8", "--windows names text, which --method rtn does not use"),
        ("--method rtn --calibration x.txt", "--calibration names text, which --method rtn does not use"),
        ("--method rtn --seed 1", "--seed names text, which --method rtn does not use"),
        ("--method awq --damping 0.1", "--damping is an option of GPTQ, --method awq has none"),
        ("--method awq --no-act-order", "--act-order is an option of GPTQ, --method awq has none"),
        ("--method smoothquant", "makes room for int8 activations in int8 weights, not in int4"),
        ("--method best", "--method best is unknown; known: rtn, gptq, awq, awq-gptq, smoothquant"),
        ("--rule down_proj", "--rule 'down_proj' is not of the form 'pattern = precision'"),
        ("--rule layers.99.*=int8", "--rule 'layers.99.*=int8' matches no matrix of the"),
        ("--rule layers.0.*=int3", "int3 is unknown; known: int8, int4"),
        ("--budget-mb 3 --max-kl 0.1", "--budget-mb and --max-kl pull two ways"),
        ("--budget-mb 0", "--budget-mb is 0, a number above 0 was expected"),
        ("--budget-mb 3 --calibration none", "--budget-mb is met by what is measured on text"),
        ("--max-kl 0.1 --method rtn", "--max-kl is met by what is measured on text"),
        ("-p int8 --max-kl 0.1", "choose what an int4 model keeps in int8, --precision is int8"),
        ("--window-length 1024", "--window-length 1024 is more than the 512 positions of this model"),
    ],
)
def test_options_that_cannot_hold_together_are_refused(words: str, says: str, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    assert_refused(run("-t", "onnxruntime", "-o", out, "--store", store, *words.split()), code=2, says=says)
    assert not out.exists()
    assert not store.exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.txt", None, "absent.txt"),
        ("latin.txt", b"caf\xe9 " * 2000, "latin.txt"),
        ("empty.txt", b"", "gives no token"),
        ("short.txt", b"To be, or not to be.", "of the 4 windows of 64 tokens that are wanted"),
        ("chats.jsonl", b'{"messages": [{"role": "user"}]}\n', "chats.jsonl"),
        ("lines.jsonl", b'{"body": "To be"}\n', "lines.jsonl"),
        ("broken.jsonl", b'{"text": "To be\n', "broken.jsonl"),
        ("table.csv", b"title,body\na,b\n", "table.csv"),
        ("words.docx", b"PK", "words.docx"),
        ("ids.npy", b"not an array", "ids.npy"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_named_with_its_fault(
    name: str, content: bytes | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    out, store = tmp_path / "out", tmp_path / "store"
    result = run("-t", "onnxruntime", "-o", out, "--store", store, "--calibration", path, *SMALL)
    assert_refused(result, code=3, says=says)
    assert not out.exists()
    assert not store.exists()


def test_text_that_is_calibrated_on_cannot_be_evaluated_on(tmp_path: Path) -> None:
    text = BUNDLED_MODEL / "evaluation.txt"
    result = run(
        *("-t", "onnxruntime", "-o", tmp_path / "out", "--store", tmp_path / "store"),
        *("--calibration", text, "--eval-text", text, "--windows", 8, "--window-length", 512),
    )
    assert_refused(result, code=3, says="of the evaluation text")
    assert "also calibrated on; at most 1% was expected" in result.stderr


def test_a_budget_below_what_int4_takes_is_refused_with_one_that_is_enough(tmp_path: Path) -> None:
    result = run("-t", "onnxruntime", "-o", tmp_path / "out", "--store", tmp_path / "store", "--budget-mb", 0.5)
    assert_refused(result, code=8, says="--budget-mb is 0.5")
    assert "take --budget-mb " in result.stderr
    assert not (tmp_path / "store").exists()


def exported(out: Path, *words: object) -> tuple[dict[str, Any], str]:
    """The manifest of the one target, and what was told on stderr."""
    result = run("-t", "onnxruntime", "-o", out, *words, *SMALL, "--json")
    assert result.exit_code == 0, result.stderr
    (outcome,) = json.loads(result.stdout)
    return outcome["manifest"], result.stderr


@pytest.mark.toolchain
def test_chats_calibrate_and_the_store_is_found_by_the_next_run_and_by_validate(chats: Path, tmp_path: Path) -> None:
    out, store = tmp_path / "out", tmp_path / "store"
    manifest, told = exported(out, "--store", store, "--calibration", chats)
    facts = manifest["calibration"]
    assert (facts["algorithm"], facts["source"]) == ("awq-gptq, act-order, damping 0.01", "chats.jsonl")
    assert (facts["windows"], facts["window_length"], facts["tokens"], facts["seed"]) == (4, 64, 256, 0)
    assert facts["evaluation_overlap"] <= 0.01
    assert "layer 1 of 4: mean output error" in told
    assert "quantized in " in told
    assert {"forward", "gptq"} <= set(facts["seconds"])
    assert "reused" not in told
    (folder,) = store.iterdir()
    parts = [*(f"{layer:03d}" for layer in range(4)), "ends"]
    assert {path.name for path in folder.glob("ranges-*.json")} == {f"ranges-{part}.json" for part in parts}

    again, told = exported(tmp_path / "again", "--store", store, "--calibration", chats)
    assert f"reused the quantized weights in {folder}" in told
    assert again["calibration"] == facts
    timed = "report.html"  # it tells of this run's latency
    assert [file for file in again["files"] if file["path"] != timed] == [
        file for file in manifest["files"] if file["path"] != timed
    ]

    bundle = out / "onnxruntime"
    against = ("validate", bundle, "--against", BUNDLED_MODEL)
    assert run(*against, "--store", store).exit_code == 0  # the corpus is not needed where its codes are kept
    assert run(*against, "--store", tmp_path / "anew", "--calibration", chats).exit_code == 0
    assert_refused(run(*against, "--store", tmp_path / "empty"), code=3, says="its codes are not in the store")
    other = BUNDLED_MODEL / "evaluation.txt"
    assert_refused(
        run(*against, "--store", store, "--calibration", other), code=3, says="the bundle was calibrated with"
    )


@pytest.mark.toolchain
def test_text_comes_from_stdin_too_and_gives_what_the_file_gives(tmp_path: Path) -> None:
    text = BUNDLED_MODEL / "calibration.txt"
    words = ("-t", "onnxruntime", *SMALL, "--json", "--store", tmp_path / "store")
    piped = RUNNER.invoke(
        app, [str(word) for word in (*words, "-o", tmp_path / "piped", "--calibration", "-")], input=text.read_bytes()
    )
    assert piped.exit_code == 0, piped.stderr
    named = run(*words, "-o", tmp_path / "named", "--calibration", text)
    facts = [json.loads(result.stdout)[0]["manifest"]["calibration"] for result in (piped, named)]
    assert facts[0]["source"] == "stdin"
    assert facts[0]["corpus_sha256"] == facts[1]["corpus_sha256"]


@pytest.mark.toolchain
def test_a_budget_keeps_what_int4_hurts_most_in_int8(chats: Path, tmp_path: Path) -> None:
    manifest, _ = exported(tmp_path / "out", "--store", tmp_path / "store", "--calibration", chats, "--budget-mb", 2.6)
    rules = manifest["scheme"]["rules"]
    assert rules
    assert all(rule["precision"] == "int8" for rule in rules)
