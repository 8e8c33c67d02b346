"""The documents: every command that they show is run, links lead somewhere, and the reference is that of the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exporter.checkpoint import BUNDLED_MODEL
from exporter.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("samples/**/*.md")])
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""Blocks of shell commands that are run. What only an app's developer can run stands in other blocks."""


def documents() -> list[Path]:
    return [path for path in DOCUMENTS if "node_modules" not in path.parts]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    targets = [target for target, _ in _LINK.findall(text) if "://" not in target]
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_reference_of_options_is_that_of_the_code(tmp_path: Path) -> None:
    file = tmp_path / "options.md"
    command = [sys.executable, "-m", "typer", "exporter.cli", "utils", "docs", "--name", "llama-export"]
    subprocess.run([*command, "--output", str(file)], check=True, capture_output=True, cwd=ROOT)
    assert (ROOT / "docs" / "options.md").read_text() == file.read_text(), "run make docs"


SHOWN = [path for path in documents() if "samples" not in path.parts and path.stem != "tutorial"]
COMMANDS = [path for path in SHOWN if _BLOCK.search(path.read_text(encoding="utf-8"))]


@pytest.mark.toolchain
@pytest.mark.slow
def test_the_program_of_the_how_to_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "how-to.md").read_text(), re.M | re.S)
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) > 10


@pytest.mark.toolchain
@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_that_a_document_shows_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder with a checkpoint called ``model``; what one block makes the next one finds."""
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ran = 0
    for block in _BLOCK.findall(path.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            assert words[0] == "llama-export", f"{path.name}: {line} is not one of our commands"
            result = CliRunner().invoke(app, words[1:], input="What news?\n")
            assert result.exit_code == 0, f"{line}\n{result.output}"
            ran += 1
    assert ran
