"""The tutorial, command by command, in a clone, an empty home and a new environment: run by ``make check-tutorial``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.samples.action import run_step, with_one_code_changed

pytestmark = [pytest.mark.web, pytest.mark.toolchain, pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ASK = """
import { chromium } from "playwright-core";
const browser = await chromium.launch({ executablePath: process.argv[2], args: ["--no-sandbox"] });
const page = await browser.newPage();
page.setDefaultTimeout(600_000);
await page.goto("http://127.0.0.1:4173/?provider=wasm");
await page.locator("#message:enabled").waitFor();
await page.fill("#message", "What news?");
await page.press("#message", "Enter");
const answer = page.locator(".assistant").first();
await answer.locator(".figures:not(:empty)").waitFor();
console.log(JSON.stringify(await answer.locator(".text").textContent()));
await browser.close();
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is committed, in a new folder."""
    folder = tmp_path_factory.mktemp("tutorial") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def ran(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The clone after all blocks; the page that they have started is still served."""
    home = tmp_path_factory.mktemp("home")
    blocks = re.findall(r"^```bash\n(.*?)^```", (clone / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    own = ("PYTHON", "VIRTUAL_ENV", "XDG_", "LLAMA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}  # proxies, certificates
    for settings in (Path.home() / ".npmrc", Path.home() / ".config" / "pip"):  # where this host's registries are named
        if settings.exists():
            place = home / settings.relative_to(Path.home())
            place.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if settings.is_dir() else shutil.copyfile)(settings, place)
    # The server that a block leaves behind belongs to the shell's group, and ends with it.
    script = "set -euo pipefail\n" + "\n".join(blocks) + "\necho told-and-done\nread -r _\n"
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(
            ["bash", "-c", script],
            cwd=clone,
            env={**kept, "HOME": str(home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        ) as shell,
    ):
        assert shell.stdout is not None
        said = []
        for line in shell.stdout:
            said.append(line)
            if line == "told-and-done\n":
                break
        try:
            assert said[-1:] == ["told-and-done\n"], "".join(said[-40:]) + (home / "log").read_text()[-4000:]
            yield clone
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself where a block has failed
                os.killpg(shell.pid, signal.SIGTERM)


def test_the_tutorial_ends_with_bundles_and_a_green_report(ran: Path) -> None:
    for target in ("executorch", "onnxruntime", "coreml"):
        manifest = json.loads((ran / "tutorial" / "bundles" / target / "manifest.json").read_text())
        assert (manifest["codes"]["verdict"], manifest["parity"]["verdict"]) == ("passed", "passed")
    assert 'failures="0"' in (ran / "tutorial" / "junit.xml").read_text()
    for folder in ("for-ios", "for-swift-transformers", "for-android", "for-genai"):
        assert any((ran / "tutorial" / folder).iterdir())


def test_the_action_is_green_on_what_the_tutorial_made_and_red_after_one_weight_is_changed(
    ran: Path, tmp_path: Path
) -> None:
    bundle = ran / "tutorial" / "bundles" / "onnxruntime"
    changed = with_one_code_changed(bundle, tmp_path / "changed", accounted_for=True)
    broken = with_one_code_changed(bundle, tmp_path / "broken", accounted_for=False)
    here = {"root": ran, "installed": ran / "tutorial" / "venv" / "bin"}
    installing = run_step("install", tmp_path / "install", **here)
    assert installing.code == 0, installing.stdout
    reference = str(ran / "samples" / "tiny-llama")
    for folder, code, verdict in ((bundle, 0, "passed"), (changed, 7, "failed"), (broken, 3, "refused")):
        found = run_step("validate", tmp_path / verdict, **here, bundle=str(folder), reference=reference)
        assert (found.code, found.outputs["verdict"]) == (code, verdict), found.stdout


def test_the_page_that_the_tutorial_starts_talks(ran: Path) -> None:
    script = ran / "samples" / "web" / "ask.mjs"
    script.write_text(ASK)
    done = subprocess.run(
        ["node", script.name, CHROMIUM], cwd=script.parent, capture_output=True, text=True, check=True, timeout=900
    )
    prompts = json.loads((ran / "tutorial" / "bundles" / "onnxruntime" / "goldens.json").read_text())["prompts"]
    (golden,) = (prompt["greedy_text"] for prompt in prompts if prompt["text"] == "What news?")
    assert golden[:4] in json.loads(done.stdout)
