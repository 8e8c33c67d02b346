"""The public interface: its names, and what they do from a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import exporter
from exporter.checkpoint import BUNDLED_MODEL


def test_the_public_names_are_what_we_think() -> None:
    assert exporter.__all__ == ["Plan", "export", "open_bundle", "plan", "validate"]
    assert all(getattr(exporter, name) for name in exporter.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'quantize'"):
        exporter.quantize  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    script = "import sys, exporter; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout.strip() == b"False"


@pytest.mark.toolchain
def test_a_program_exports_validates_and_generates(tmp_path: Path) -> None:
    from exporter import export, open_bundle, plan, validate

    made = plan(
        BUNDLED_MODEL, target="onnxruntime", calibration="none", context=64, out=tmp_path / "out", store=tmp_path / "s"
    )
    (outcome,) = export(made)
    assert (outcome.target, outcome.exit_code) == ("onnxruntime", 0)
    assert validate(str(outcome.folder)).exit_code == 0
    with open_bundle(str(outcome.folder)) as bundle:
        text = bundle.generate("The people of the United States", max_tokens=5)
        assert text == "".join(bundle.stream("The people of the United States", max_tokens=5))
        assert bundle.manifest["context"] == 64
        message = [{"role": "user", "content": "What news?"}]
        drawn = bundle.generate(message, max_tokens=8, temperature=1.0, seed=4)
        assert drawn == bundle.generate(message, max_tokens=8, temperature=1.0, seed=4)


def test_the_shell_completes_commands_and_options() -> None:
    for words, wanted in (("llama-export gen", "generate"), ("llama-export export --prec", "--precision")):
        asked = {"_LLAMA_EXPORT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-c", "from exporter.cli import app; app(prog_name='llama-export')"]
        told = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
        assert wanted in told.stdout.split()
