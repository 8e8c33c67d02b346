"""The Android sample's library: compiled, its own tests, and its figures against those of ``exporter.parity``.

The compiler is that of the Kotlin kernel for Jupyter, which comes as a wheel: a JDK is all that has to be installed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import targets
from exporter.bundle import Goldens, open_bundle, read_artifact
from exporter.parity import drive
from targets.base import Runner
from tests.conftest import CLEAR_MARGIN

pytestmark = [
    pytest.mark.kotlin,
    pytest.mark.timeout(1800),  # the first test waits for the compiler and an export
    pytest.mark.skipif(shutil.which("java") is None, reason="no JDK"),
]

KERNEL = "kotlin_jupyter_kernel==0.19.0.944"
ROOT = Path(__file__).parents[2]
ANDROID = ROOT / "samples" / "android"
LIBRARY = ANDROID / "llamabundle" / "src"
CACHE = Path(os.environ.get("KOTLIN_CACHE", ROOT / ".cache" / "kotlin"))
SECTIONS = {
    "device": {"model", "os", "runtime", "app"},
    "parity": {
        "positions",
        "mean_kl_nats",
        "worst_kl_nats",
        "top1_agreement",
        "decided_top1_agreement",
        "decided_positions",
        "max_abs_logit_diff",
    },
    "greedy": {"prompts", "compared", "agreeing"},
    "chats": {"compared", "agreeing"},
    "latency": {
        "load_s",
        "time_to_first_token_ms",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "prompt_tokens",
        "decoded_tokens",
        "threads",
        "runs",
    },
}
"""As ``docs/bundle.md`` has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kotlin:
    """The jars of the compiler and of what the library needs, and where classes go."""

    jars: Path
    classes: Path

    @property
    def libraries(self) -> list[Path]:
        return [
            jar
            for pattern in ("kotlin-stdlib-*.jar", "kotlinx-serialization-*-jvm-*.jar")
            for jar in sorted(self.jars.glob(pattern))
        ]

    def compile(self, *sources: Path, to: str, against: Sequence[str] = ()) -> None:
        """Compile folders of sources; a warning fails. What is ``against`` opens its internals, as Gradle does."""
        others = [self.classes / name for name in against]
        compiler = [
            jar
            for pattern in ("kotlin-jupyter-kernel-*-all.jar", "kotlin-reflect-*.jar", "kotlin-stdlib-*.jar")
            for jar in sorted(self.jars.glob(pattern))
        ]
        options = ["-no-stdlib", "-no-reflect", "-Werror", "-jvm-target", "17", "-cp", _path(self.libraries + others)]
        if others:
            options.append(f"-Xfriend-paths={','.join(map(str, others))}")
        main = "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"
        words = ["java", "-Xmx1g", "-XX:TieredStopAtLevel=1", "-cp", _path(compiler), main, *options]
        finished = subprocess.run(
            [*words, "-d", self.classes / to, *sources], capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr

    def command(self, main: str, *arguments: str | Path) -> list[str]:
        """What runs a class of the tests."""
        path = _path([self.classes / "main", self.classes / "test", *self.libraries])
        return ["java", "-cp", path, f"llamabundle.{main}", *map(str, arguments)]


def _path(entries: Sequence[Path]) -> str:
    return os.pathsep.join(map(str, entries))


@pytest.fixture(scope="module")
def kotlin(tmp_path_factory: pytest.TempPathFactory) -> Kotlin:
    """The library and its tests, compiled."""
    jars = CACHE / "run_kotlin_kernel" / "jars"
    if not jars.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), KERNEL]
        subprocess.run(words, check=True)
        (wheel,) = CACHE.glob("kotlin_jupyter_kernel-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(CACHE, [name for name in archive.namelist() if name.endswith(".jar")])
        wheel.unlink()
    made = Kotlin(jars=jars, classes=tmp_path_factory.mktemp("classes"))
    made.compile(LIBRARY / "main" / "kotlin", to="main")
    made.compile(LIBRARY / "test" / "kotlin", to="test", against=["main"])
    return made


@pytest.fixture(scope="module", params=["executorch", "onnxruntime"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the target: LLAMA_BUNDLE where that is one, else one made of the sample model."""
    target: str = request.param
    if named := os.environ.get("LLAMA_BUNDLE"):
        if json.loads((Path(named) / "manifest.json").read_text())["target"] != target:
            pytest.skip(f"LLAMA_BUNDLE is not for {target}")
        return Path(named)
    folder = tmp_path_factory.mktemp("exported")
    words = ["-t", target, "--calibration", "none", "-o", folder / "bundle", "--store", folder / "store"]
    subprocess.run([sys.executable, "-m", "exporter", *map(str, words)], check=True, capture_output=True)
    (manifest,) = (folder / "bundle").rglob("manifest.json")
    return manifest.parent


@contextmanager
def opened(bundle: Path) -> Iterator[Runner]:
    manifest = open_bundle(bundle)
    target = targets.load(manifest["target"])
    artifact = read_artifact(manifest, path=target.find(bundle))
    with target.open(artifact, threads=1) as runner:
        yield runner


def serve(runner: Runner, process: subprocess.Popen[str]) -> None:
    """Answer the requests of ``SelfTestOverPipe`` until it ends."""
    assert process.stdin
    assert process.stdout
    for line in process.stdout:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "rewind" in request:
            runner.rewind(request["rewind"])
        else:
            logits = runner.feed(request["feed"])[-1].contiguous().numpy()
            answer["logits"] = base64.b64encode(logits.astype("<f4").tobytes()).decode()
        process.stdin.write(json.dumps(answer) + "\n")
        process.stdin.flush()


@pytest.fixture(scope="module")
def report(kotlin: Kotlin, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the library reports of the real artifact, run by our runner."""
    path = tmp_path_factory.mktemp("report") / "device-report.json"
    command = kotlin.command("SelfTestOverPipe", bundle, path, "ours")
    with (
        opened(bundle) as runner,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        serve(runner, process)
    assert process.returncode == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def logits(bundle: Path) -> Tensor:
    """The artifact's logits at the golden positions, by ``exporter.parity``."""
    with opened(bundle) as runner:
        return drive(runner, Goldens.read(bundle).drive)


def test_the_librarys_own_tests_pass(kotlin: Kotlin, bundle: Path) -> None:
    finished = subprocess.run(
        kotlin.command("TestingKt"),
        env={**os.environ, "LLAMA_BUNDLE": str(bundle)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("\nok ") > 50


def test_parity_figures_are_those_of_the_exporter(report: dict[str, Any], bundle: Path, logits: Tensor) -> None:
    expected = Goldens.read(bundle).logits.figures(logits)
    assert expected["mean_kl_nats"] > 1e-6  # there is something to measure
    told = {name: value for name, value in expected.items() if not isinstance(value, list)}  # no values by position
    assert report["parity"] == {name: pytest.approx(value, rel=1e-6, abs=1e-9) for name, value in told.items()}


def test_spoilt_logits_would_be_seen(report: dict[str, Any], bundle: Path, logits: Tensor) -> None:
    spoilt = Goldens.read(bundle).logits.figures(logits + 1e-2 * torch.randn(logits.shape))
    assert report["parity"]["mean_kl_nats"] != pytest.approx(spoilt["mean_kl_nats"], rel=1e-6, abs=1e-9)


def test_report_has_the_fields_of_the_contract(report: dict[str, Any]) -> None:
    assert report["schema"] == "llama-export/device-report/1"
    assert set(report) == {"schema", "manifest_sha256", "peak_memory_bytes", *SECTIONS}
    assert {name: set(report[name]) for name in SECTIONS} == SECTIONS
    assert all(value > 0 for name, value in report["latency"].items() if name != "load_s")


def test_chats_and_clear_greedy_tokens_agree(report: dict[str, Any], bundle: Path) -> None:
    goldens = Goldens.read(bundle)
    assert report["chats"] == {"compared": len(goldens.chats), "agreeing": len(goldens.chats)}
    compared = agreeing = 0
    with opened(bundle) as runner:
        for prompt in goldens.prompts:
            runner.rewind(0)
            answer = runner.feed(prompt["ids"])
            for token, margin in zip(prompt["greedy_ids"], prompt["greedy_margins"], strict=True):
                if margin < CLEAR_MARGIN:
                    break
                compared += 1
                if int(answer[-1].argmax()) != token:
                    break
                agreeing += 1
                answer = runner.feed([token])
    assert report["greedy"] == {"prompts": len(goldens.prompts), "compared": compared, "agreeing": agreeing}


def test_tokens_are_those_of_the_tokenizers_library(kotlin: Kotlin, bundle: Path) -> None:
    text = (ROOT / "samples" / "tiny-llama" / "evaluation.txt").read_text()
    odd = [
        "",
        " ",
        "\u00a0\u2003 x",
        "a\u0085b",
        "It's 12345678 \r\n\r\n  東京🙂",
        "<|eot_id|> <|eot",
        "\t\t\tx  \n y",
        "ñ n\u0303",
    ]
    texts = [*odd, *(text[start : start + 500] for start in range(0, min(len(text), 100_000), 500))]
    finished = subprocess.run(
        kotlin.command("EncodeOverPipe", bundle / "tokenizer.json"),
        input="".join(json.dumps(text) + "\n" for text in texts),
        capture_output=True,
        text=True,
        check=True,
    )
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_file(str(bundle / "tokenizer.json"))
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert [json.loads(line) for line in finished.stdout.splitlines()] == expected


def test_app_compiles_but_for_its_screen(kotlin: Kotlin) -> None:
    """Against stubs that declare what the app uses of the runtimes, no more: a call that they lack does not compile."""
    sources = [path for path in sorted((ANDROID / "app").rglob("*.kt")) if path.name != "MainActivity.kt"]
    assert len(sources) == 3
    kotlin.compile(ANDROID / "stubs", *sources, to="app", against=["main"])
