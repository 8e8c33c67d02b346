"""The commands that take a bundle: what they print, what they write, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import exporter.packing
import targets
from calibration.layers import ROUNDED, SILENT
from exporter.bundle import MANIFEST, Goldens, open_bundle
from exporter.chat import CONVERSATIONS
from exporter.checkpoint import BUNDLED_MODEL
from exporter.cli import app
from exporter.errors import UsageError
from exporter.files import sha256
from exporter.generation import Decoding, open_for_running
from exporter.packing import LOADERS, ZIP_ALIGNMENT, write_zip
from exporter.parity import drive
from exporter.spec import Logits, Plan, Precision, Sampling, WeightScheme
from exporter.tokenizer import Tokenizer

pytestmark = pytest.mark.toolchain
RUNNER = CliRunner()
CLEAR = 0.25


def run(*words: object, stdin: str | None = None) -> Result:
    return RUNNER.invoke(app, [str(word) for word in words], input=stdin)


def assert_refused(result: Result, *, code: int, says: str) -> None:
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model for every target, by target."""
    from exporter.pipeline import export

    root = tmp_path_factory.mktemp("bundles")
    ends = Precision.INT8
    plan = Plan(
        checkpoint=BUNDLED_MODEL,
        targets=targets.NAMES,
        scheme=WeightScheme(body=Precision.INT4, embedding=ends, head=ends, group_size=32),
        recipe=ROUNDED,
        sampling=Sampling(),
        context=256,
        logits=Logits.LAST,
        out=root / "out",
        store=root / "store",
        evaluation_text=None,
        threads=1,
    )
    outcomes = export(plan, SILENT)
    assert [outcome.exit_code for outcome in outcomes] == [0] * len(targets.NAMES)
    return {outcome.target: outcome.folder for outcome in outcomes}


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["onnxruntime"]


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


def clear_golden(folder: Path, text: str) -> str:
    """The reference's answer before its first near tie."""
    (prompt,) = (prompt for prompt in Goldens.read(folder).prompts if prompt["text"] == text)
    clear = [margin > CLEAR for margin in prompt["greedy_margins"]]
    upto = clear.index(False) if False in clear else len(clear)
    return Tokenizer(folder).decode(prompt["greedy_ids"][:upto])


# --- generate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", targets.NAMES)
def test_generate_says_what_the_reference_says(bundles: dict[str, Path], target: str) -> None:
    folder = bundles[target]
    result = run("generate", folder, "What news?", "--chat", "--max-tokens", 6, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    expected = clear_golden(folder, "What news?")
    assert expected
    assert result.stdout.startswith(expected) or expected.startswith(result.stdout.rstrip("\n"))
    assert targets.load(target).runtime() in result.stderr


def test_generate_reads_stdin_and_tells_figures_as_json(bundle: Path) -> None:
    result = run("generate", bundle, "--json", "--max-tokens", 5, stdin="In the beginning")
    told = json.loads(result.stdout)
    assert told["tokens"] == len(told["ids"]) == 5
    assert told["ended"] == "length"
    assert told["text"] == Tokenizer(bundle).decode(told["ids"])
    assert told["prompt_tokens"] == told["prefilled_tokens"] == len(Tokenizer(bundle).encode("In the beginning"))
    assert told["decode_tokens_per_s"] > 0


def test_generate_takes_messages_and_ends_at_a_stop_token(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "What news?"}]))
    told = json.loads(run("generate", bundle, "--messages", file, "--json").stdout)
    same = json.loads(run("generate", bundle, "What news?", "--chat", "--json").stdout)
    assert told["ids"] == same["ids"]
    assert told["ended"] == "stop"
    assert not set(told["ids"]) & set(open_bundle(bundle)["model"]["eos_token_ids"])


def test_generate_ends_where_the_context_is_full(bundle: Path) -> None:
    ids = Tokenizer(bundle).encode("word " * 200)
    told = json.loads(run("generate", bundle, "word " * 200, "--json", "--max-tokens", 1000).stdout)
    assert len(ids) < 256
    assert told["ended"] in ("context", "stop")
    if told["ended"] == "context":
        assert told["prompt_tokens"] + told["tokens"] == 256 + 1  # the last one is said and not fed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["x", "--temperature", "-1"], "--temperature is -1.0, 0 or more was expected"),
        (["x", "--top-k", "3"], "--top-k has no effect at --temperature 0"),
        (["x", "--top-p", "0.5"], "--top-p has no effect at --temperature 0"),
        (["x", "--temperature", "1", "--top-p", "0"], "--top-p is 0.0, more than 0 and at most 1 was expected"),
        (["x", "--temperature", "1", "--top-k", "-2"], "--top-k is -2, 0 or more was expected"),
        (["x", "--system", "y"], "--system goes with --chat"),
        (["x", "--messages", "-"], "--messages says it all"),
    ],
)
def test_generate_refuses_options_that_mean_nothing(bundle: Path, words: list[str], says: str) -> None:
    assert_refused(run("generate", bundle, *words), code=2, says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[", "the messages are no JSON"),
        ('{"role": "user"}', "not a list of objects with role and content"),
        ('[{"role": "user", "content": 1}]', "not a list of objects with role and content"),
        ('[{"role": "user", "content": "\\ud800"}]', "which is no Unicode character"),
    ],
)
def test_messages_that_are_none_are_told(bundle: Path, content: str, says: str) -> None:
    assert_refused(run("generate", bundle, "--messages", "-", stdin=content), code=3, says=says)


def test_messages_in_another_encoding_are_told(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_bytes('[{"role": "user", "content": "é"}]'.encode("latin-1"))
    assert_refused(run("generate", bundle, "--messages", file), code=3, says="messages.json is no UTF-8 text")


def test_a_prompt_that_is_no_utf_8_is_told(bundle: Path) -> None:
    assert_refused(run("generate", bundle, "\udcff"), code=3, says="'\\udcff' at character 0, which is no Unicode")


def test_a_prompt_longer_than_the_context_is_refused(bundle: Path) -> None:
    result = run("generate", bundle, "word " * 400)
    assert_refused(result, code=3, says="1 to 255 fit the context of 256 and an answer")


def test_a_bundle_that_is_not_whole_is_not_run(copied: Path) -> None:
    data = copied / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    for command in ("generate", "chat", "bench", "verify"):
        words = ["x"] if command == "generate" else []
        assert_refused(run(command, copied, *words), code=3, says="model.onnx.data has sha256")


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30), st.integers(0, 5), st.floats(0.05, 1), st.integers(0, 9))
@settings(deadline=None)
def test_a_drawn_token_is_one_of_those_kept(values: list[float], top_k: int, top_p: float, seed: int) -> None:
    logits = torch.tensor(values)
    draw = Decoding(temperature=0.7, top_k=top_k, top_p=top_p, seed=seed).sampler()
    tokens = [draw(logits) for _ in range(5)]
    again = Decoding(temperature=0.7, top_k=top_k, top_p=top_p, seed=seed).sampler()
    assert tokens == [again(logits) for _ in range(5)]
    order = sorted(range(len(values)), key=lambda token: -float(logits[token]))
    kept = order[: top_k or len(order)]
    p = (logits[kept].double() / 0.7).softmax(0)
    nucleus = [token for place, token in enumerate(kept) if float(p[:place].sum()) < top_p + 1e-12]
    least = min(float(logits[token]) for token in nucleus)
    assert all(float(logits[token]) >= least for token in tokens)


def test_draws_follow_the_probabilities() -> None:
    draw = Decoding(temperature=1.0).sampler()
    logits = torch.tensor([0.0, 1.0, 2.0])
    counts = torch.bincount(torch.tensor([draw(logits) for _ in range(4000)]), minlength=3) / 4000
    assert (counts - logits.softmax(0)).abs().max() < 0.03


# --- chat --------------------------------------------------------------------------------------------------------


def test_chat_answers_each_line_with_the_whole_conversation_before_it(bundle: Path) -> None:
    result = run("chat", bundle, "--max-tokens", 12, stdin="What news?\n\nAnd then?\n/new\nWhat news?\n/quit\nnever\n")
    assert result.exit_code == 0, result.stderr
    first, second, third = result.stdout.splitlines()
    assert first == third
    messages = [{"role": "user", "content": "What news?"}, {"role": "assistant", "content": first}]
    whole = json.dumps([*messages, {"role": "user", "content": "And then?"}])
    told = json.loads(run("generate", bundle, "--messages", "-", "--json", "--max-tokens", 12, stdin=whole).stdout)
    assert told["text"] == second


def test_a_conversation_feeds_only_what_is_new(bundle: Path) -> None:
    from exporter.generation import Conversation

    opened = open_for_running(bundle)
    with opened.target.open(opened.artifact, threads=1) as runner:
        conversation = Conversation(opened, runner, Decoding())
        ids = opened.tokenizer.encode("The people of the United States")
        answer, pieces = conversation.reply(ids, max_tokens=4)
        assert "".join(pieces) == answer.text
        longer = [*ids, *answer.ids, *opened.tokenizer.encode(" and")[1:]]
        following, pieces = conversation.reply(longer, max_tokens=4)
        list(pieces)
        assert following.prefilled_tokens == len(longer) - len(ids) - len(answer.ids) + 1  # the last one said, too
        anew, pieces = Conversation(opened, runner, Decoding()).reply(longer, max_tokens=4)
        list(pieces)
        assert anew.prefilled_tokens == len(longer)
        assert anew.ids == following.ids


def test_a_conversation_that_is_too_long_is_told_and_goes_on(bundle: Path) -> None:
    result = run("chat", bundle, "--max-tokens", 3, stdin="word " * 300 + "\nWhat news?\n")
    assert result.exit_code == 0
    assert "fit the context of 256" in result.stderr
    assert len(result.stdout.splitlines()) == 1


def test_characters_split_over_tokens_come_out_whole(bundle: Path) -> None:
    tokenizer = Tokenizer(bundle)
    text = "naïve 東京 🙂🏽 end"
    ids = tokenizer.encode_rendered(text)
    stream = tokenizer.stream()
    pieces = [stream(token) for token in ids]
    assert "".join(pieces) == text
    assert "" in pieces
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


# --- bench -------------------------------------------------------------------------------------------------------


def test_bench_measures_each_of_the_lists(bundle: Path) -> None:
    words = ["--threads", "1,2", "--prompt", "8,16", "--depth", "0,32", "--decode", 4, "--repetitions", 2]
    rows = json.loads(run("bench", bundle, *words, "-o", "json").stdout)
    cases = [(row["threads"], row["test"], row["tokens"], row["depth"]) for row in rows]
    one = [("prefill", 8, 0), ("prefill", 16, 0), ("decode", 4, 0), ("decode", 4, 32)]
    assert cases == [(threads, *case) for threads in (1, 2) for case in one]
    assert all(0 < row["least"] <= row["tokens_per_s"] <= row["most"] for row in rows)


def test_bench_prints_the_same_rows_in_four_forms(bundle: Path) -> None:
    words = ["bench", bundle, "--threads", 1, "--prompt", 8, "--decode", 2, "--repetitions", 1, "-o"]
    rows = list(csv.DictReader(io.StringIO(run(*words, "csv").stdout)))
    lines = [json.loads(line) for line in run(*words, "jsonl").stdout.splitlines()]
    assert [row["test"] for row in rows] == [line["test"] for line in lines] == ["prefill", "decode"]
    assert rows[0].keys() == lines[0].keys()
    table = run(*words, "md").stdout.splitlines()
    assert table[2].startswith("| tiny-llama int4 | onnxruntime | 1 | prefill 8 |")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--threads", "0"], "--threads is '0', whole numbers of 1 or more were expected"),
        (["--threads", "1,x"], "--threads is '1,x', whole numbers of 1 or more were expected"),
        (["--prompt", "512"], "prefill of 512 tokens at depth 0 needs 512 positions, the bundle has a context of 256"),
        (["--depth", "250"], "decode of 32 tokens at depth 250 needs 282 positions"),
        (["-o", "xml"], "--output xml is unknown; known: md, csv, json, jsonl"),
    ],
)
def test_bench_refuses_what_cannot_be_measured(bundle: Path, words: list[str], says: str) -> None:
    assert_refused(run("bench", bundle, *words), code=2, says=says)


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML runs there")
def test_bench_of_a_package_that_only_apples_systems_run_says_so(bundles: dict[str, Path]) -> None:
    assert_refused(run("bench", bundles["coreml"]), code=4, says="Core ML runs these packages on macOS")


# --- bundle and verify -------------------------------------------------------------------------------------------


def test_verify_counts_what_it_has_checked(bundle: Path) -> None:
    result = run("verify", bundle, "--json")
    told = json.loads(result.stdout)
    files = [path for path in bundle.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert (told["files"], told["bytes"]) == (len(files), sum(path.stat().st_size for path in files))
    assert told["manifest_sha256"] == sha256(bundle / MANIFEST)


@pytest.mark.parametrize("loader", LOADERS)
def test_each_loader_gets_its_files_and_no_other(bundles: dict[str, Path], loader: str, tmp_path: Path) -> None:
    out, (target,) = tmp_path / "packed", LOADERS[loader].targets
    result = run("bundle", bundles[target], "--for", loader, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    wanted = {*LOADERS[loader].files, *LOADERS[loader].optional, *LOADERS[loader].written}
    wanted |= {"model.ort", "required_operators.config"} if LOADERS[loader].converted else set()
    assert {path.name for path in out.iterdir()} == wanted
    assert set(json.loads(result.stdout)["files"]) == {
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()
    }
    if "tokenizer_config.json" in wanted:
        config = json.loads((out / "tokenizer_config.json").read_text())
        assert config["chat_template"] == Tokenizer(BUNDLED_MODEL).chat_template
    assert run("validate", bundles[target], "--threads", 1).exit_code == 0  # as it was
    for name in LOADERS[loader].files:
        if (out / name).is_file():
            assert sha256(out / name) == sha256(bundles[target] / name)


def test_onnxruntime_genai_loads_what_is_written_for_it(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    run("bundle", bundle, "--for", "onnxruntime-genai", "--out", out)
    script = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
text = tokenizer.apply_chat_template(sys.argv[2], add_generation_prompt=True)
ids = tokenizer.encode(text)
options = og.GeneratorParams(model)
options.set_search_options(max_length=len(ids) + 6, do_sample=False)
generator = og.Generator(model, options)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps({"text": text, "answer": tokenizer.decode(generator.get_sequence(0)[len(ids):])}))
"""
    messages = json.dumps([{"role": "user", "content": "What news?"}])
    finished = subprocess.run(
        [sys.executable, "-c", script, str(out), messages], capture_output=True, text=True, check=True
    )
    told = json.loads(finished.stdout.splitlines()[-1])
    assert told["text"] == Tokenizer(bundle).render(json.loads(messages))
    expected = clear_golden(bundle, "What news?")
    assert told["answer"].startswith(expected) or expected.startswith(told["answer"])


def test_text_llm_runner_loads_what_is_written_for_phones(bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "packed"
    run("bundle", bundles["executorch"], "--for", "executorch-android", "--out", out)
    script = """
import sys, warnings
warnings.simplefilter("ignore")
import executorch.extension.llm.custom_ops.custom_ops, executorch.kernels.quantized
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
pieces = []
runner = TextLLMRunner(sys.argv[1] + "/model.pte", sys.argv[1] + "/tokenizer.json")
config = GenerationConfig(temperature=0.0, max_new_tokens=4, echo=False, num_bos=1)
runner.generate("The people of the United States", config, pieces.append, None)
open(sys.argv[1] + "/text", "w").write("".join(pieces))
"""
    subprocess.run([sys.executable, "-c", script, str(out)], check=True, capture_output=True)
    text, expected = (out / "text").read_text(), clear_golden(bundles["executorch"], "The people of the United States")
    assert text.startswith(expected) or expected.startswith(text)


def test_a_zip_is_stored_aligned_and_the_same_each_time(bundle: Path, tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        assert run("bundle", bundle, "--zip", "--out", tmp_path / name).exit_code == 0
    content = (tmp_path / "one.zip").read_bytes()
    assert content == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        archive.extractall(tmp_path / "out")
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            name_bytes, extra_bytes = (
                int.from_bytes(content[info.header_offset + at :][:2], "little") for at in (26, 28)
            )
            assert (info.header_offset + 30 + name_bytes + extra_bytes) % ZIP_ALIGNMENT == 0
    assert run("verify", tmp_path / "out").exit_code == 0


def test_large_files_of_a_zip_are_aligned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.packing, "ZIP64_BYTES", 10)
    (tmp_path / "in").mkdir()
    for name, size in (("a", 5), ("model", 40_000), ("z", 11)):
        (tmp_path / "in" / name).write_bytes(bytes([size % 251]) * size)
    write_zip(tmp_path / "out.zip", {Path(name): tmp_path / "in" / name for name in ("a", "model", "z")})
    content = (tmp_path / "out.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            data = archive.read(info)
            assert any(content[at : at + len(data)] == data for at in range(0, len(content), ZIP_ALIGNMENT))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--for", "mlx"], 2, "--for mlx is unknown; known: executorch-android"),
        (["--for", "swift-transformers"], 2, "was made for onnxruntime, swift-transformers loads coreml"),
        ([], 2, "the bundle is a folder already"),
    ],
)
def test_a_package_that_makes_no_sense_is_refused(
    bundle: Path, words: list[str], code: int, says: str, tmp_path: Path
) -> None:
    assert_refused(run("bundle", bundle, "--out", tmp_path / "out", *words), code=code, says=says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--for", "onnxruntime-genai"], ["--zip"]])
def test_nothing_is_packed_into_the_bundle_itself(bundle: Path, words: list[str]) -> None:
    result = run("bundle", bundle, "--out", bundle / "deep" / "in", *words)
    assert_refused(result, code=2, says="is inside the bundle")
    assert run("verify", bundle).exit_code == 0


def test_what_is_there_is_not_written_over(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    words = ["bundle", bundle, "--for", "onnxruntime-genai", "--out", out]
    assert_refused(run(*words), code=2, says="is there already")
    assert (out / "mine").read_text() == "x"


# --- chat renders ------------------------------------------------------------------------------------------------


def test_a_bundle_keeps_its_template_as_a_format_and_as_renders(bundle: Path) -> None:
    from exporter.chat import ChatFormat

    told = json.loads((bundle / "chat_format.json").read_text())
    pairs = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    chats, tokenizer = Goldens.read(bundle).chats, Tokenizer(bundle)
    assert [chat["messages"] for chat in chats] == [list(messages) for messages in CONVERSATIONS]
    for chat in chats:
        assert ChatFormat(**pairs).render(chat["messages"]) == chat["text"] == tokenizer.render(chat["messages"])
        assert tokenizer.encode_rendered(chat["text"]) == chat["ids"]


# --- device reports ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A bundle and a report that a phone might have written of it."""

    bundle: Path
    file: Path
    content: dict[str, Any]

    def write(self, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
        content = json.loads(json.dumps(self.content))
        if change:
            change(content)
        self.file.write_text(json.dumps(content))
        return self.file


@pytest.fixture
def device(copied: Path, tmp_path: Path) -> Device:
    opened, goldens = open_for_running(copied), Goldens.read(copied)
    with opened.target.open(opened.artifact, threads=1) as runner:
        figures = goldens.logits.figures(drive(runner, goldens.drive))
    content = {
        "schema": "llama-export/device-report/1",
        "manifest_sha256": sha256(copied / MANIFEST),
        "device": {"model": "Pixel 9", "os": "Android 16", "runtime": "onnxruntime 1.31.1, cpu", "app": "test"},
        "parity": figures,
        "greedy": {"prompts": 3, "compared": 20, "agreeing": 20},
        "chats": {"compared": 5, "agreeing": 5},
        "latency": {
            **{"load_s": 1.0, "time_to_first_token_ms": 400, "prefill_tokens_per_s": 300, "decode_tokens_per_s": 25.5},
            "threads": 2,
        },
        "peak_memory_bytes": 10**9,
    }
    return Device(bundle=copied, file=tmp_path / "device-report.json", content=content)


def test_a_device_report_is_judged_and_kept_in_the_manifest(device: Device) -> None:
    from exporter.device import fold

    entry = fold(device.bundle, device.write())
    assert (entry["parity"]["verdict"], entry["latency"]["verdict"]) == ("passed", "passed")
    assert open_bundle(device.bundle)["devices"] == [entry]
    assert entry["latency"]["decode_tokens_per_s"] == 25.5

    def newer(content: dict[str, Any]) -> None:
        content["device"]["model"] = "Galaxy S24"  # tested with the manifest as it was exported

    fold(device.bundle, device.write(newer))
    fold(device.bundle, device.write())
    assert [one["device"]["model"] for one in open_bundle(device.bundle)["devices"]] == ["Galaxy S24", "Pixel 9"]


def _set(*path: str, to: object) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


def test_a_report_of_this_host_is_taken_whoever_was_kept_meanwhile(device: Device, tmp_path: Path) -> None:
    from exporter.device import fold, report_of_this_host

    def rename(content: dict[str, Any]) -> None:
        content["device"]["model"] = "Galaxy S24"

    fold(device.bundle, device.write())
    ours = tmp_path / "ours.json"
    ours.write_text(json.dumps(report_of_this_host(device.bundle, open_bundle(device.bundle))))
    fold(device.bundle, device.write(rename))
    entry = fold(device.bundle, ours)
    assert entry["device"]["app"].startswith("llama-export ")
    assert entry["parity"]["mean_kl_nats"] == open_bundle(device.bundle)["parity"]["mean_kl_nats"]
    assert len(open_bundle(device.bundle)["devices"]) == 3


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        (_set("parity", "mean_kl_nats", to=0.5), "failed", "mean KL is 0.5 nats"),
        (_set("parity", "worst_kl_nats", to=0.5), "failed", "KL at the worst position is 0.5 nats"),
        (_set("parity", "positions", to=3), "failed", "3 positions were tested, the goldens have 145"),
        (_set("greedy", "agreeing", to=19), "failed", "1 of 20 greedy tokens are not the goldens'"),
        (_set("chats", "agreeing", to=3), "failed", "2 of 5 chat renders are not the goldens'"),
        (_set("parity", to=None), "not measured", "the device report has no parity"),
        (_set("parity", to={"positions": None, "reason": "no room"}), "not measured", "no room"),
        (_set("chats", to={"compared": None, "agreeing": None}), "passed", ""),
    ],
)
def test_each_gate_of_a_device_report_fails_on_its_own(
    device: Device, change: Callable[[dict[str, Any]], None], verdict: str, says: str
) -> None:
    from exporter.device import fold

    entry = fold(device.bundle, device.write(change))
    assert entry["parity"]["verdict"] == verdict
    assert says in entry["parity"].get("reason", "")


@pytest.mark.parametrize(
    ("change", "code", "failures", "skipped"),
    [
        (_set("peak_memory_bytes", to=None), 0, 0, 1),  # structure is not for a device to tell
        (_set("greedy", "agreeing", to=19), 7, 1, 1),
        (_set("parity", "mean_kl_nats", to=0.5), 7, 1, 1),
        (_set("parity", to=None), 0, 0, 2),
        (_set("latency", to=None), 0, 0, 2),
    ],
)
def test_validate_gates_on_a_device_report_and_writes_every_report(
    device: Device, change: Callable[[dict[str, Any]], None], code: int, failures: int, skipped: int, tmp_path: Path
) -> None:
    junit, html = tmp_path / "junit.xml", tmp_path / "report.html"
    words = ["--device-report", device.write(change), "--junit", junit, "--html", html, "--markdown", tmp_path / "m"]
    result = run("validate", device.bundle, *words)
    assert result.exit_code == code, result.output
    assert f'failures="{failures}" errors="0" skipped="{skipped}"' in junit.read_text()
    assert "<html" in html.read_text()
    assert open_bundle(device.bundle)["devices"][0]["device"]["model"] == "Pixel 9"
    assert "Pixel 9" in result.stdout


def test_a_device_report_and_a_proof_here_are_two_runs(device: Device) -> None:
    result = run("validate", device.bundle, "--device-report", device.write(), "--against", BUNDLED_MODEL)
    assert_refused(result, code=2, says="--device-report proves nothing on this host")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_set("schema", to="x"), "schema is 'x'"),
        (_set("manifest_sha256", to="0" * 64), "is of the manifest 0000"),
        (_set("device", to=None), "does not say which device"),
        (_set("parity", "mean_kl_nats", to="low"), "has 'low' for mean_kl_nats, a number was expected"),
        (_set("parity", "positions", to=1.5), "has 1.5 for positions, a count was expected"),
        (_set("latency", "load_s", to=-1), "has -1 for load_s, a number was expected"),
    ],
)
def test_a_report_that_is_none_leaves_the_manifest_as_it_was(
    device: Device, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    from exporter.device import fold
    from exporter.errors import InputError

    before = (device.bundle / MANIFEST).read_bytes()
    with pytest.raises(InputError) as caught:
        fold(device.bundle, device.write(change))
    assert says in str(caught.value)
    assert (device.bundle / MANIFEST).read_bytes() == before


def test_a_device_report_that_is_not_there_is_told(bundle: Path) -> None:
    result = run("validate", bundle, "--device-report", "nowhere/report.json")
    assert_refused(result, code=3, says="nowhere has no report.json")
    assert "self-test" in result.stderr


def test_decoding_is_refused_when_it_is_made() -> None:
    with pytest.raises(UsageError):
        Decoding(top_p=2.0, temperature=1.0)
