"""``.ort`` files for minimal builds: the same logits, and a list of operators that is exactly what they execute."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.layers import quantize
from exporter.checkpoint import open_checkpoint
from exporter.errors import CapacityError, LoweringError
from exporter.model.trace import trace
from exporter.spec import Artifact, Plan
from targets import load
from targets.onnxruntime import ort_format
from targets.onnxruntime.ort_format import OPERATORS, write_ort
from tests.conftest import Toy

pytestmark = pytest.mark.toolchain
TARGET = load("onnxruntime")
IDS = torch.randint(96, (20,), generator=torch.Generator().manual_seed(0)).tolist()


def lower(toy: Toy, plan: Plan) -> Artifact:
    checkpoint = open_checkpoint(toy.folder)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    plan.out.mkdir(exist_ok=True)
    return TARGET.lower(trace(checkpoint.spec), store, plan, plan.out)


def executed(model: Path, artifact: Artifact, folder: Path) -> set[str]:
    """Operators of every node that ONNX Runtime's profile of a call names."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # as a minimal build, which has none
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    spec = artifact.spec
    feeds: dict[str, Any] = {name.name: None for name in session.get_inputs()}
    empty = np.zeros((1, spec.num_key_value_heads, 0, spec.head_dim), dtype=np.float32)
    feeds = dict.fromkeys(feeds, empty)
    feeds |= {"input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), dtype=np.int64)}
    session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "fp32"])
def test_the_logits_are_those_of_the_onnx_and_the_operators_those_that_run(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], precision: str, tmp_path: Path
) -> None:
    toy = make_toy()
    artifact = lower(toy, make_plan(toy.folder, precision=precision))
    model, operators = write_ort(artifact, tmp_path / "ort")
    assert sorted(path.name for path in model.parent.iterdir()) == ["model.ort", OPERATORS]
    with (
        TARGET.open(artifact, threads=1) as whole,
        TARGET.open(dataclasses.replace(artifact, path=model), threads=1) as minimal,
    ):
        for start, end in ((0, 12), (12, 13), (13, 20)):
            assert torch.equal(whole.feed(IDS[start:end]), minimal.feed(IDS[start:end]))
    lines = [line.split(";") for line in operators.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert {domain: opset for domain, opset, _ in lines} == {"ai.onnx": "21", "com.microsoft": "1"}
    named = {operator for *_, some in lines for operator in some.split(",")}
    assert named == executed(model, artifact, tmp_path)


def test_the_same_artifact_gives_the_same_operators_in_the_same_order(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    toy = make_toy()
    artifact = lower(toy, make_plan(toy.folder))
    once, again = (write_ort(artifact, tmp_path / name) for name in ("once", "again"))
    assert once[1].read_bytes() == again[1].read_bytes()
    assert once[0].stat().st_size == again[0].stat().st_size


def test_what_no_flatbuffer_holds_is_refused_and_nothing_is_written(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy()
    artifact = lower(toy, make_plan(toy.folder))
    size = sum(path.stat().st_size for path in artifact.path.parent.glob("model.onnx*"))
    monkeypatch.setattr(ort_format, "LARGEST_BYTES", size - 1)
    with pytest.raises(CapacityError, match=f"would be {size:,} bytes as .ort, which holds no more than {size - 1:,}"):
        write_ort(artifact, tmp_path / "ort")
    assert not (tmp_path / "ort").exists()
    monkeypatch.setattr(ort_format, "LARGEST_BYTES", size)
    write_ort(artifact, tmp_path / "ort")


def test_half_of_it_is_never_left(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy()
    artifact = lower(toy, make_plan(toy.folder))

    def fail(_: Path) -> str:
        raise ValueError("no operators today")

    monkeypatch.setattr(ort_format, "_required_operators", fail)
    with pytest.raises(LoweringError, match=r"cannot convert model.onnx to .ort: no operators today"):
        write_ort(artifact, tmp_path / "ort")
    assert list((tmp_path / "ort").iterdir()) == []


def test_a_file_that_is_no_model_is_told(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]) -> None:
    toy = make_toy()
    artifact = lower(toy, make_plan(toy.folder))
    artifact.path.write_bytes(b"no model")
    with pytest.raises(LoweringError, match=r"cannot convert model.onnx to .ort"):
        write_ort(artifact, artifact.path.parent / "ort")
