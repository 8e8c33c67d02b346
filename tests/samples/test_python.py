"""The Python sample: its server run as a program and asked over HTTP, its figures against those of ``exporter.parity``,
and the script of the five names."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import targets
from exporter.bundle import MANIFEST, Goldens, file_entries, open_bundle, read_artifact, write_json
from exporter.checkpoint import BUNDLED_MODEL
from exporter.cli import app
from exporter.parity import drive
from tests.conftest import CLEAR_MARGIN

pytestmark = pytest.mark.toolchain

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "python"
WEIGHTS = "model.onnx.data"
QUESTION = "What news?"


@dataclass(frozen=True)
class Served:
    """A server that runs, and what it said before."""

    address: str
    report: Path
    said: str

    def post(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(f"{self.address}/{path}", data), timeout=60)

    def ask(self, path: str, **body: Any) -> Any:
        with self.post(path, **body) as response:
            return json.load(response)

    def stream(self, path: str, **body: Any) -> list[Any]:
        """The chunks of an answer, each of them read as it comes; the last event has to be the end."""
        with self.post(path, stream=True, **body) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            events = [line.decode().removeprefix("data: ").strip() for line in response if line.strip()]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def refuses(self, path: str, **body: Any) -> str:
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post(path, **body)
        assert caught.value.code == 400
        message: str = json.load(caught.value)["error"]["message"]
        return message


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    words = ["-t", "onnxruntime", "-c", "256", "--calibration", "none"]
    result = CliRunner().invoke(app, [*words, "-o", str(folder / "out"), "--store", str(folder / "store")])
    assert result.exit_code == 0, result.output
    return folder / "out" / "onnxruntime"


def command(bundle: Path, report: Path) -> list[str]:
    words = ["--port", "0", "--threads", "1", "--report", str(report)]
    return [sys.executable, str(SAMPLE / "serve.py"), str(bundle), *words]


def run_to_its_end(bundle: Path, report: Path) -> subprocess.CompletedProcess[str]:
    """A server that refuses: one that serves would go on for ever."""
    return subprocess.run(command(bundle, report), capture_output=True, text=True, check=False, timeout=60)


@contextmanager
def serving(bundle: Path, report: Path) -> Iterator[Served]:
    with subprocess.Popen(command(bundle, report), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = [process.stderr.readline(), process.stderr.readline()]
            address = re.search(r" at (http://\S+/v1)$", said[-1])
            assert address is not None, said
            drain = threading.Thread(target=process.stderr.read)  # a full pipe would stop it
            drain.start()
            yield Served(address=address[1], report=report, said="".join(said))
        finally:
            process.terminate()
    drain.join()


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(bundle, tmp_path_factory.mktemp("report") / "device-report.json") as server:
        yield server


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The sample's library, in this process."""
    monkeypatch.syspath_prepend(str(SAMPLE))
    return importlib.import_module("llamabundle")


def prompts(bundle: Path) -> list[dict[str, Any]]:
    return json.loads((bundle / "goldens.json").read_text())["prompts"]


def clear_ids(prompt: dict[str, Any]) -> list[int]:
    pairs = zip(prompt["greedy_ids"], prompt["greedy_margins"], strict=True)
    unclear = next((at for at, (_, margin) in enumerate(pairs) if margin < CLEAR_MARGIN), len(prompt["greedy_ids"]))
    return prompt["greedy_ids"][:unclear]


def asked(prompt: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body that ask a golden prompt."""
    greedy = {"temperature": 0, "max_tokens": len(prompt["greedy_ids"]), "return_token_ids": True}
    if prompt["text"] == QUESTION:
        return "chat/completions", {"messages": [{"role": "user", "content": QUESTION}], **greedy}
    return "completions", {"prompt": prompt["text"], **greedy}


# --- what it needs -----------------------------------------------------------------------------------------------


def test_the_server_needs_three_packages_and_not_this_one() -> None:
    found: set[str] = set()
    for path in [SAMPLE / "serve.py", *(SAMPLE / "llamabundle").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0] for name in names}
    assert found - sys.stdlib_module_names == {"llamabundle", "onnxruntime", "numpy", "tokenizers", "jinja2"}


# --- the self-test -----------------------------------------------------------------------------------------------


def test_parity_figures_are_those_of_the_exporter(served: Served, bundle: Path) -> None:
    manifest = open_bundle(bundle)
    target = targets.load("onnxruntime")
    goldens = Goldens.read(bundle)
    with target.open(read_artifact(manifest, path=target.find(bundle)), threads=1) as runner:
        expected = goldens.logits.figures(drive(runner, goldens.drive))
    report = json.loads(served.report.read_text())
    assert expected["mean_kl_nats"] > 1e-6  # there is something to measure
    told = {name: value for name, value in expected.items() if not isinstance(value, list)}
    assert report["parity"] == {name: pytest.approx(value, rel=1e-6, abs=1e-9) for name, value in told.items()}


def test_spoilt_logits_would_be_seen(sample: Any, bundle: Path) -> None:
    opened = sample.Bundle.open(bundle)
    goldens = opened.goldens()
    selftest = importlib.import_module("llamabundle.selftest")
    logits = selftest.answer_goldens(sample.Model(opened, threads=1), goldens)
    right = selftest.compare(goldens, logits)
    spoilt = selftest.compare(goldens, logits + np.float32(0.3) * np.random.default_rng(0).normal(size=logits.shape))
    assert spoilt["mean_kl_nats"] > opened.manifest["parity"]["gate_mean_kl_nats"] > right["mean_kl_nats"]
    assert selftest.compare(goldens, logits + np.float32(7))["mean_kl_nats"] == pytest.approx(right["mean_kl_nats"])
    unknown = selftest.compare(goldens, np.full_like(logits, np.nan))
    report = {"parity": unknown, "greedy": None, "chats": None}
    mean, worst = selftest.find_faults(report, opened)
    assert mean.startswith("mean KL is nan nats")
    assert worst.startswith("KL at the worst position is nan nats")


def test_one_spoilt_position_would_be_seen(sample: Any, bundle: Path) -> None:
    opened = sample.Bundle.open(bundle)
    goldens = opened.goldens()
    selftest = importlib.import_module("llamabundle.selftest")
    logits = selftest.answer_goldens(sample.Model(opened, threads=1), goldens)
    logits[100] += np.float32(0.5) * np.random.default_rng(0).normal(size=logits.shape[1])
    report = {"parity": selftest.compare(goldens, logits), "greedy": None, "chats": None}
    assert selftest.find_faults(report, opened)[-1].startswith("KL at the worst position is 0.")


def test_greedy_tokens_and_chats_agree_and_the_report_is_told(served: Served, bundle: Path) -> None:
    report = json.loads(served.report.read_text())
    clear = sum(len(clear_ids(prompt)) for prompt in prompts(bundle))
    assert clear > 10
    assert report["greedy"] == {"prompts": 3, "compared": clear, "agreeing": clear}
    assert report["chats"] == {"compared": 5, "agreeing": 5}
    assert all(value > 0 for value in report["latency"].values())
    assert report["peak_memory_bytes"] > 1e7
    assert served.said.startswith("self-test passed: mean KL ")


def test_validate_takes_the_report(served: Served, bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    result = CliRunner().invoke(app, ["validate", str(copied), "--device-report", str(served.report)])
    assert result.exit_code == 0, result.output
    (device,) = open_bundle(copied)["devices"]
    assert device["parity"]["verdict"] == device["latency"]["verdict"] == "passed"
    assert device["device"]["app"].startswith("llama-export samples/python")


def test_a_bundle_with_one_changed_bit_is_refused(bundle: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(bundle, tmp_path / "bundle")
    content = bytearray((changed / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (changed / WEIGHTS).write_bytes(content)
    done = run_to_its_end(changed, tmp_path / "r.json")
    assert done.returncode == 3
    assert re.search(rf"^error: {WEIGHTS} has the SHA-256 \w{{12}}…, the manifest says \w{{12}}…", done.stderr)
    assert not (tmp_path / "r.json").exists()


def test_a_changed_weight_whose_checksum_was_made_to_fit_is_not_served(bundle: Path, tmp_path: Path) -> None:
    """One matrix, turned upside down."""
    changed = shutil.copytree(bundle, tmp_path / "bundle")
    import onnx

    model = onnx.load(changed / "model.onnx", load_external_data=False)
    (codes,) = (
        one for one in model.graph.initializer if re.search(r"layers\.1\.mlp\.down_proj.*(?<!scales)$", one.name)
    )
    place = {entry.key: entry.value for entry in codes.external_data}
    start, length = int(place["offset"]), int(place["length"])
    content = bytearray((changed / WEIGHTS).read_bytes())
    content[start : start + length] = content[start : start + length][::-1]
    (changed / WEIGHTS).write_bytes(content)
    manifest = json.loads((changed / MANIFEST).read_text())
    write_json(changed / MANIFEST, {**manifest, "files": file_entries(changed)})
    report = tmp_path / "device-report.json"
    done = run_to_its_end(changed, report)
    assert done.returncode == 7
    assert "error: not served: mean KL is " in done.stderr
    result = CliRunner().invoke(app, ["validate", str(changed), "--device-report", str(report)])
    assert result.exit_code == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "llama-export/bundle/9"}, "the manifest's schema is 'llama-export/bundle/9'"),
        ({"target": "coreml"}, "the bundle is for coreml, this program runs onnxruntime"),
        ({"scheme": {"kv_dtype": "fp16"}}, "the cache of this bundle holds fp16"),
        ({"files": [{"path": "../secret", "bytes": 1, "sha256": ""}]}, "lacks ../secret"),
        ({"files": [{"path": WEIGHTS, "bytes": 1, "sha256": ""}]}, "the manifest says 1: copy"),
        ({"files": None}, "is not as an export writes it"),
    ],
)
def test_a_manifest_that_cannot_be_run_says_why(
    sample: Any, bundle: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    (tmp_path / "secret").write_text("x")
    write_json(copied / MANIFEST, {**json.loads((copied / MANIFEST).read_text()), **change})
    with pytest.raises(sample.BundleError, match=re.escape(says)):
        sample.Bundle.open(copied)


def test_what_onnx_runtime_does_not_load_is_the_bundles_fault(sample: Any, bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    (copied / "model.onnx").write_bytes(b"no graph")
    opened = sample.Bundle(folder=copied, manifest=open_bundle(bundle), manifest_sha256="")
    with pytest.raises(sample.BundleError, match="does not load the model"):
        sample.Model(opened)


# --- answers -----------------------------------------------------------------------------------------------------


def test_answers_have_the_golden_tokens_whole_and_streamed(served: Served, bundle: Path) -> None:
    for prompt in prompts(bundle):
        path, body = asked(prompt)
        (choice,) = served.ask(path, **body)["choices"]
        clear = clear_ids(prompt)
        assert clear, "nothing would be compared"
        assert choice["token_ids"][: len(clear)] == clear
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if clear == prompt["greedy_ids"]:
            assert text == prompt["greedy_text"]

        chunks = served.stream(path, **body)
        parts = [chunk["choices"][0] for chunk in chunks]
        assert [token for part in parts for token in part.get("token_ids", ())] == choice["token_ids"]
        pieces = [part["delta"].get("content", "") if "delta" in part else part["text"] for part in parts]
        assert "".join(pieces) == text
        assert sum(map(bool, pieces)) > 3
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert len({chunk["id"] for chunk in chunks}) == 1


def test_an_answer_ends_at_the_length_and_usage_is_told(served: Served, bundle: Path) -> None:
    (golden,) = (prompt for prompt in prompts(bundle) if prompt["text"] == QUESTION)
    path, body = asked(golden)
    whole = served.ask(path, **{**body, "max_tokens": 3})
    usage = {"prompt_tokens": len(golden["ids"]), "completion_tokens": 3, "total_tokens": len(golden["ids"]) + 3}
    assert whole["usage"] == usage
    assert whole["choices"][0]["finish_reason"] == "length"
    last = served.stream(path, **{**body, "max_tokens": 3}, stream_options={"include_usage": True})[-1]
    assert (last["choices"], last["usage"]) == ([], usage)


@pytest.mark.parametrize("stays", [True, False])
def test_pieces_come_as_they_are_made_and_nobody_waits_for_who_has_gone(
    sample: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    """The model says its fourth token only when the client has read the first, and is still there or is not."""
    assistant = sample.Assistant(sample.Bundle.open(bundle), threads=1)
    feed, read, fed = sample.Model.feed, threading.Event(), []

    def waiting(model: Any, ids: list[int]) -> Any:
        fed.append(len(ids))
        assert len(fed) != 4 or read.wait(timeout=20), "the first piece was never sent"
        return feed(model, ids)

    monkeypatch.setattr(sample.Model, "feed", waiting)
    server = importlib.import_module("serve").Server(("127.0.0.1", 0), assistant)
    with server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        try:
            here = Served(address=f"http://127.0.0.1:{server.server_port}/v1", report=bundle, said="")
            with socket.create_connection(server.server_address) as client:
                body = json.dumps({"prompt": "The people", "temperature": 0, "stream": True})
                client.sendall(f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                came = b""
                while b"data: " not in came:
                    came += client.recv(1000)
                if stays:
                    read.set()
                    while more := client.recv(1000):
                        came += more
                    assert came.endswith(b"data: [DONE]\n\n")
                else:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # gone at once
            read.set()
            alone = len(fed)
            assert here.ask("completions", prompt="In the", temperature=0, max_tokens=2)["choices"]
            assert stays or len(fed) < alone + 10
        finally:
            server.shutdown()


def test_who_does_not_say_gets_what_the_makers_advise(served: Served) -> None:
    words = {"prompt": "The people of the United States", "max_tokens": 12}
    drawn = {served.ask("completions", **words, seed=seed)["choices"][0]["text"] for seed in range(4)}
    assert len(drawn) > 1  # generation_config.json says temperature 0.6
    assert (
        served.ask("completions", **words, seed=3)["choices"] == served.ask("completions", **words, seed=3)["choices"]
    )


def test_the_model_is_listed(served: Served) -> None:
    with urllib.request.urlopen(f"{served.address}/models", timeout=60) as response:
        assert [model["id"] for model in json.load(response)["data"]] == ["tiny-llama"]


def test_two_who_ask_at_once_get_the_same_as_one(served: Served, bundle: Path) -> None:
    bodies = [asked(prompt) for prompt in prompts(bundle)] * 2
    one_by_one = [served.ask(path, **body)["choices"] for path, body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(lambda body: served.ask(body[0], **body[1])["choices"], bodies)) == one_by_one


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("completions", {"prompt": "x", "n": 2}, "n is not done by this server"),
        ("completions", {"prompt": "x", "stop": ["y"]}, "stop is not done by this server"),
        ("completions", {"prompt": ["x"]}, "prompt is not a text"),
        ("completions", {"prompt": "x", "temperature": "hot"}, "temperature is 'hot', a number was expected"),
        ("completions", {"prompt": "x", "temperature": -1}, "temperature is -1.0, 0 or more was expected"),
        ("completions", {"prompt": "x", "temperature": 10**400}, "too large"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p is 0.0, more than 0"),
        ("completions", {"prompt": "x", "max_tokens": 0.5}, "max_tokens is 0.5, a whole number was expected"),
        ("completions", {"prompt": "word " * 300}, "1 to 255 leave room for an answer"),
        ("chat/completions", {}, "messages is not a list"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool' is not known"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is not text"),
    ],
)
def test_a_request_that_is_not_understood_says_what_of_it(
    served: Served, path: str, body: dict[str, Any], says: str
) -> None:
    assert says in served.refuses(path, **body)


def test_parts_of_text_are_one_message(served: Served) -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "news?"}]
    answers = [
        served.ask("chat/completions", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8)
        for content in (parts, QUESTION)
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_of_a_conversation_only_what_is_new_is_read(sample: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assistant = sample.Assistant(sample.Bundle.open(bundle), threads=1)
    fed: list[int] = []
    feed = sample.Model.feed
    monkeypatch.setattr(sample.Model, "feed", lambda model, ids: (fed.append(len(ids)), feed(model, ids))[1])
    messages = [{"role": "user", "content": QUESTION}]
    ids = assistant.text.render(messages)
    said = list(assistant.answer(ids, sample.Drawing(max_tokens=5)))
    assert fed == [len(ids), 1, 1, 1, 1]
    messages += [{"role": "assistant", "content": "".join(one.text for one in said)}]
    longer = assistant.text.render([*messages, {"role": "user", "content": "And then?"}])
    fed.clear()
    warm = [one.id for one in assistant.answer(longer, sample.Drawing(max_tokens=5))]
    assert 0 < fed[0] < len(longer) - len(ids) + 5
    fresh = sample.Assistant(sample.Bundle.open(bundle), threads=1)
    assert warm == [one.id for one in fresh.answer(longer, sample.Drawing(max_tokens=5))]


def test_an_answer_ends_with_the_cache_and_at_a_stop_token(
    sample: Any, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = sample.Assistant(sample.Bundle.open(bundle), threads=1)
    ids = assistant.text.encode("The people")
    said = list(assistant.answer(ids, sample.Drawing()))
    if said[-1].ended == "length":
        assert len(ids) + len(said) - 1 == 256 + 1  # the last one is told, and needs no place
    monkeypatch.setattr(assistant, "_stops", frozenset([said[2].id]))
    again = list(assistant.answer(ids, sample.Drawing()))
    first = next(at for at, one in enumerate(said) if one.id == said[2].id)
    assert (len(again) - 1, again[-1].ended) == (first, "stop")


def test_draws_follow_the_probabilities_and_the_seed(sample: Any) -> None:
    assistant = importlib.import_module("llamabundle.assistant")
    logits = np.array([0.0, 1.0, 2.0, -1.0], dtype=np.float32)
    drawing = sample.Drawing(temperature=0.5, seed=0)
    generator = np.random.default_rng(0)
    counts = np.bincount([assistant.draw(logits, drawing, generator) for _ in range(4000)], minlength=4) / 4000
    expected = np.exp(2 * logits.astype(float))
    assert np.abs(counts - expected / expected.sum()).max() < 0.03
    narrow = sample.Drawing(temperature=0.5, top_p=0.5)
    assert {assistant.draw(logits, narrow, generator) for _ in range(50)} == {2}  # 0.86 of it


def test_characters_that_tokens_share_come_out_whole(sample: Any, bundle: Path) -> None:
    text = sample.Text(sample.Bundle.open(bundle))
    wanted = "naïve 東京 🙂🏽 end"
    stream = text.stream()
    pieces = [stream(token) for token in text.encode(wanted, bare=False)]
    assert "".join(pieces) == wanted
    assert "" in pieces
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_template_may_refuse_and_tell_the_day(sample: Any, bundle: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(bundle, tmp_path / "bundle")
    (copied / "chat_template.jinja").write_text(
        "{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}\n"
        "{%- if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}\n"
        "{{- bos_token }}{{ date_string }} {{ messages[0] | tojson }}"
    )
    text = sample.Text(sample.Bundle(folder=copied, manifest=open_bundle(bundle), manifest_sha256=""))
    message = {"role": "user", "content": "naïve <b>"}
    told = '{"role": "user", "content": "naïve <b>"}'
    assert text.render_text([message], date="26 Jul 2024") == f"<|begin_of_text|>26 Jul 2024 {told}"
    assert re.fullmatch(r"<\|begin_of_text\|>20\d\d \{.*\}", text.render_text([message]))
    with pytest.raises(ValueError, match="no system"):
        text.render_text([{"role": "system", "content": "x"}])


def test_the_notebook_of_the_readme_runs(bundle: Path, tmp_path: Path) -> None:
    program, *_ = re.findall(r"^```python\n(.*?)^```", (SAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "onnxruntime").symlink_to(bundle)
    environment = {**os.environ, "PYTHONPATH": str(SAMPLE)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


# --- the script --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_of_the_five_names_exports_and_asks(tmp_path: Path) -> None:
    import exporter

    source = (SAMPLE / "export_and_ask.py").read_text()
    (used,) = re.findall(r"^from exporter import (.+)$", source, re.MULTILINE)
    assert sorted(used.split(", ")) == sorted(exporter.__all__)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(SAMPLE / "export_and_ask.py"), str(BUNDLED_MODEL), QUESTION],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "parity passed" in done.stderr
    (golden,) = (prompt for prompt in prompts(tmp_path / "bundles" / "onnxruntime") if prompt["text"] == QUESTION)
    assert golden["greedy_text"][:4] == done.stdout[:4]
