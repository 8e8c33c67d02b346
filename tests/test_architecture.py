"""The layers of the design, held: imports point one way, and toolchains stay in their folders."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    (
        "exporter.errors",
        "exporter.spec",
        "exporter.metrics",
        "exporter.quantized",
        "exporter.files",
        "exporter.interrupt",
        "exporter.memory",
    ),
    ("exporter.model", "exporter.checkpoint", "exporter.store", "exporter.tokenizer", "exporter.chat"),
    ("calibration",),
    ("targets",),
    (
        "exporter.codes",
        "exporter.parity",
        "exporter.quality",
        "exporter.latency",
        "exporter.bundle",
        "exporter.prove",
        "exporter.images",
    ),
    ("exporter.bisect", "exporter.limits", "exporter.compare", "exporter.sliding"),
    (
        *("exporter.pipeline", "exporter.planning", "exporter.recipe", "exporter.texts", "exporter.progress"),
        "exporter.kept",
        *("exporter.report", "exporter.checks", "exporter.junit", "exporter.markdown", "exporter.html"),
        *("exporter.generation", "exporter.measure", "exporter.packing", "exporter.device"),
        *("exporter.devices", "exporter.systems", "exporter.forecast", "exporter.report_devices", "exporter.terminal"),
    ),
    (
        *("exporter.cli", "exporter.cli_bundle", "exporter.cli_options", "exporter.cli_devices"),
        *("exporter.library", "exporter.reporting", "exporter.optimum_command"),
    ),
    ("exporter.__main__",),
)
"""From the bottom up. A module may import from its own layer and from those below it."""
TOOLCHAINS = {"executorch": "executorch", "torchao": "executorch", "onnxruntime": "onnxruntime", "onnx": "onnxruntime"}
TOOLCHAINS |= {"onnx_ir": "onnxruntime", "onnxruntime_qnn": "onnxruntime"}
TOOLCHAINS |= {"coremltools": "coreml", "tosa": "executorch", "xllamacpp": "gguf"}


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("exporter", "calibration", "targets"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path: Path) -> set[str]:
    """Every module that a file imports outside of ``if TYPE_CHECKING``, at whatever depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def layer(module: str) -> int | None:
    for index, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return index
    return None


def test_every_module_has_a_layer() -> None:
    homeless = [name for name, _ in modules() if name != "exporter" and layer(name) is None]
    assert homeless == []


@pytest.mark.parametrize(("name", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_imports_point_down(name: str, path: Path) -> None:
    own = layer(name)
    above = [used for used in imports(path) if own is not None and (layer(used) or 0) > own]
    assert above == []


@pytest.mark.parametrize(("name", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_toolchains_are_imported_in_their_own_folder_only(name: str, path: Path) -> None:
    foreign = [
        used
        for used in imports(path)
        if (home := TOOLCHAINS.get(used.split(".")[0])) and not name.startswith(f"targets.{home}")
    ]
    assert foreign == []


def test_help_imports_no_torch_and_no_toolchain() -> None:
    code = (
        "import sys; from exporter.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'coremltools', 'executorch'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
