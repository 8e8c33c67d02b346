"""A head of some tokens only, exported and proven for every target that takes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import targets
from exporter.checkpoint import open_checkpoint
from exporter.cli import app
from exporter.model.ops import FLOOR
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import all_at_once, drive, drive_for
from exporter.spec import Logits, Plan
from exporter.store import StoreKey, WeightStore
from tests.conftest import Toy, later
from tests.exporter.test_pruned_head import IDS, OTHERS, TOKENS

pytestmark = pytest.mark.toolchain


@pytest.mark.parametrize("label", [later(name)[0] if "portable" in name else name for name in targets.PRUNED_HEADS])
@pytest.mark.parametrize("logits", list(Logits))
def test_logits_are_spread_over_the_vocabulary(
    label: str, logits: Logits, make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    toy = make_toy()
    plan = make_plan(toy.folder, precision="fp32", logits=logits)
    checkpoint = open_checkpoint(toy.folder, head_tokens=TOKENS)
    graph, target = trace(checkpoint.spec), targets.load(label)
    store = WeightStore(checkpoint=checkpoint, key=StoreKey(source_sha256="", scheme=plan.scheme), root=tmp_path)
    artifact = target.lower(graph, store, plan, tmp_path)
    steps = drive_for(IDS, context=plan.context)
    expected = all_at_once(Reference(graph, store, FULL_PRECISION), steps)
    with target.open(artifact, threads=1) as runner:
        got = drive(runner, steps)
    assert (got[:, OTHERS] == FLOOR).all()
    assert (got - expected).abs().max() <= (2e-2 if label == "coreml" else 1e-4)  # its cache is float16
    assert (got[:, TOKENS] > FLOOR / 2).all()


SAMPLE_TOKENS = [2041, 2044, *range(256, 274)]
"""Two stop tokens and 18 pieces of words."""


@pytest.mark.slow
def test_an_export_of_a_pruned_head_is_proven(sample: Path, tmp_path: Path) -> None:
    """int4, of the trained model: codes, both steps of parity, quality; and again from the bundle, op by op too."""
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps({str(row): token for row, token in enumerate(SAMPLE_TOKENS)}))
    store = ["--store", str(tmp_path / "store")]
    out = tmp_path / "out"
    asked = ["export", str(sample), "--target", "all,executorch-portable", "--head-tokens", str(tokens)]
    made = run(*asked, "--calibration", "none", "--context", "128", "-o", str(out), *store, "--json")
    assert made.exit_code == 0, made.output
    for label in targets.PRUNED_HEADS:
        manifest = json.loads((out / label / "manifest.json").read_text())
        assert manifest["model"]["head_tokens"] == SAMPLE_TOKENS
        assert [manifest[kind]["verdict"] for kind in ("codes", "parity", "quality")] == ["passed"] * 3
        assert manifest["quality"]["head_tokens"] == 20
        again = run("validate", str(out / label), "--against", str(sample), "--bisect", *store, "--json")
        assert again.exit_code == 0, again.output


def run(*words: str) -> Any:
    return CliRunner().invoke(app, words)
