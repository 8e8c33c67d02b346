"""The action at the repository's root as a runner would take it: inputs resolved, each of its own steps by bash."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from exporter.bundle import MANIFEST, file_entries, write_json

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash")
DATA = "model.onnx.data"


def read_yaml(path: Path) -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Ran:
    code: int
    stdout: str
    outputs: dict[str, str]
    summary: str
    arguments: str
    """Of the programs that a stand-in took the place of."""


def resolve(template: str, *, action: dict[str, Any], inputs: dict[str, str], root: Path) -> str:
    """``${{ inputs.x }}`` and ``${{ github.action_path }}``; any other expression is a mistake in a run step's
    environment."""
    known = {f"inputs.{name}": inputs.get(name, given.get("default")) for name, given in action["inputs"].items()}
    known["github.action_path"] = str(root)
    return re.sub(r"\$\{\{ (\S+) \}\}", lambda match: known[match[1]], template)


def run_step(
    name: str, folder: Path, *, stand_ins: bool = False, root: Path = ROOT, installed: Path | None = None, **inputs: str
) -> Ran:
    """One step, by its id, of the action that lies in ``root``. ``installed``: the folder of programs of an environment
    that has llama-export; without it, this one's. ``stand_ins``: python is a script that writes down its arguments."""
    action = read_yaml(root / "action.yml")
    inputs = {key.replace("_", "-"): value for key, value in inputs.items()}
    assert inputs.keys() <= action["inputs"].keys()
    (step,) = (step for step in action["runs"]["steps"] if step.get("id") == name)
    assert "${{" not in step["run"], "an input would be read as shell"
    folder.mkdir(parents=True)
    recorded, output, summary = folder / "arguments", folder / "output", folder / "summary"
    for file in (recorded, output, summary):
        file.touch()
    own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if installed is None:
        installed = folder / "bin"
        own["PYTHONPATH"] = str(root)
        program, body = "llama-export", f'exec "{sys.executable}" -c "from exporter.cli import main; main()" "$@"\n'
        if stand_ins:
            program, body = "python", f'echo "$@" >> "{recorded}"\n'
        installed.mkdir()
        (installed / program).write_text(f"#!/bin/bash\n{body}")
        (installed / program).chmod(0o755)
    done = subprocess.run(
        [str(BASH), "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
        env={
            **own,
            **{key: resolve(value, action=action, inputs=inputs, root=root) for key, value in step["env"].items()},
            "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}",
            "RUNNER_TEMP": str(folder),
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(summary),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return Ran(
        code=done.returncode,
        stdout=done.stdout + done.stderr,
        outputs=dict(line.split("=", 1) for line in output.read_text().splitlines()),
        summary=summary.read_text(),
        arguments=recorded.read_text(),
    )


def with_one_code_changed(bundle: Path, folder: Path, *, accounted_for: bool) -> Path:
    """One int4 code of the matrix that lies in the middle of the file."""
    shutil.copytree(bundle, folder)
    content = bytearray((folder / DATA).read_bytes())
    content[len(content) // 2] ^= 0x44
    (folder / DATA).write_bytes(content)
    if accounted_for:
        manifest = json.loads((folder / MANIFEST).read_text())
        write_json(folder / MANIFEST, {**manifest, "files": file_entries(folder)})
    return folder
