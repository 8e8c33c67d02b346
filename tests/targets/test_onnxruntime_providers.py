"""Execution providers of phones: a session configuration, and how many nodes the provider would take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from calibration.layers import quantize
from exporter.checkpoint import open_checkpoint
from exporter.codes import check_codes, weight_digests
from exporter.errors import HostError, LoweringError
from exporter.model.trace import trace
from exporter.spec import Artifact, Plan, Verdict
from targets import load
from targets.onnxruntime.providers import PROVIDERS
from targets.onnxruntime.usability import check
from tests.conftest import Toy

pytestmark = pytest.mark.toolchain
ALL = pytest.mark.parametrize("backend", PROVIDERS)


def lower(backend: str, toy: Toy, plan: Plan) -> tuple[Any, Artifact, Any]:
    target, checkpoint = load(f"onnxruntime-{backend}"), open_checkpoint(toy.folder)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    plan.out.mkdir(exist_ok=True)
    return target, target.lower(trace(checkpoint.spec), store, plan, plan.out), store


def model_of(*operators: str, shape: tuple[int | str, ...]) -> onnx.ModelProto:
    """One op after the other on values of one shape."""
    nodes = [make_node(op, [f"x{at}"], [f"x{at + 1}"]) for at, op in enumerate(operators)]
    ends = [make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{len(operators)}")]
    return make_model(make_graph(nodes, "chain", ends[:1], ends[1:]), opset_imports=[make_opsetid("", 21)])


@ALL
def test_the_artifact_is_the_cpus_with_what_the_session_has_to_be_told(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], backend: str
) -> None:
    toy = make_toy()
    plan = make_plan(toy.folder)
    target, artifact, store = lower(backend, toy, plan)
    told = json.loads((plan.out / "session.json").read_text(encoding="utf-8"))
    assert [provider["name"] for provider in told["providers"]] == [PROVIDERS[backend].name, "CPUExecutionProvider"]
    values = [*told["providers"][0]["options"].values(), *told["session"].values()]
    assert values
    assert all(isinstance(value, str) for value in values), "ONNX Runtime's options are strings"
    assert artifact.backend == backend
    report = check_codes(target.read_weights(artifact), expected=weight_digests(store), scheme=plan.scheme)
    assert report.verdict is Verdict.PASSED
    mine = {path.name: path.read_bytes() for path in plan.out.glob("model.onnx*")}
    load("onnxruntime").lower(trace(open_checkpoint(toy.folder).spec), store, plan, plan.out)
    assert {path.name: path.read_bytes() for path in plan.out.glob("model.onnx*")} == mine


@ALL
def test_the_checkers_no_fails_the_audit_and_says_what_to_take(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], backend: str
) -> None:
    toy = make_toy()
    plan = make_plan(toy.folder)
    target, artifact, _ = lower(backend, toy, plan)
    report = target.audit(artifact)
    nodes = onnx.load(artifact.path, load_external_data=False).graph.node
    assert report.verdict is Verdict.NOT_MEASURED
    assert report.figures["nodes"] == len(nodes)
    assert report.figures["usability"] == "NO"
    assert "com.microsoft:MatMulNBits" in report.figures["left_to_the_cpu"]
    assert f"of {len(nodes)} nodes" in report.reason
    assert report.reason.endswith(PROVIDERS[backend].instead)


@ALL
def test_none_of_them_runs_here(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], backend: str) -> None:
    toy = make_toy()
    target, artifact, _ = lower(backend, toy, make_plan(toy.folder))
    assert target.missing() is None
    assert str(target.cannot_execute()).startswith(PROVIDERS[backend].name)
    with pytest.raises(HostError, match=f"cannot be run here: {PROVIDERS[backend].name} needs"):
        target.open(artifact, threads=1)


UNSURE = Verdict.NOT_MEASURED
CHAINS: dict[str, tuple[str, tuple[str, ...], tuple[int | str, ...], Verdict, tuple[int, int]]] = {
    "all of it": ("coreml", ("Relu", "Sigmoid", "Tanh"), (2, 3), Verdict.PASSED, (3, 3)),
    "all of it, if its shapes were fixed": ("nnapi", ("Relu", "Sigmoid", "Tanh"), ("T", 3), Verdict.PASSED, (0, 3)),
    "less than three quarters": ("nnapi", ("Relu", "Sigmoid", "Erf"), (2, 3), UNSURE, (2, 2)),
    "one node of four": ("xnnpack", ("Softmax", "Relu", "Erf", "Tanh"), ("T", 3), UNSURE, (1, 1)),
    "three partitions": (
        "coreml",
        ("Relu", "Elu", "Sign", "Relu", "Sign", "Relu"),
        (2, 3),
        Verdict.NOT_MEASURED,
        (4, 4),
    ),
}
"""Backend, ops in a row, their shape; the verdict, and the nodes taken as it is and with fixed shapes, counted by hand
in the tables of onnxruntime/tools/mobile_helpers and of the XNNPACK provider's documentation."""


@pytest.mark.parametrize("chain", CHAINS)
def test_what_is_taken_is_counted(chain: str, tmp_path: Path) -> None:
    backend, operators, shape, verdict, taken = CHAINS[chain]
    path = tmp_path / "model.onnx"
    onnx.save(model_of(*operators, shape=shape), path)
    report = check(path, backend, PROVIDERS[backend])
    assert (report.figures["nodes_taken"], report.figures["nodes_taken_with_fixed_shapes"]) == taken
    assert report.verdict is verdict
    assert bool(report.reason) == (verdict is not Verdict.PASSED)


def test_a_file_that_is_no_model_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(LoweringError, match=r"model.onnx is not an ONNX model"):
        check(path, "coreml", PROVIDERS["coreml"])
