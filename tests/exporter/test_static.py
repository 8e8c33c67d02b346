"""Static steps reach as far as calibration saw, and round as ONNX says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.checkpoint import open_checkpoint
from exporter.errors import InputError
from exporter.model.graph import Graph
from exporter.model.reference import Reference
from exporter.model.static import HIGHEST_CODE, Step, linear_steps
from exporter.model.trace import trace
from exporter.spec import Activations, Arithmetic
from tests.conftest import Toy

ends = st.floats(min_value=-3e4, max_value=3e4, width=32, allow_subnormal=False)


@settings(max_examples=300, deadline=None)
@given(one=ends, other=ends, inside=st.floats(min_value=0, max_value=1))
def test_a_step_reaches_both_ends_and_is_off_by_half_of_it_at_most_between_them(
    one: float, other: float, inside: float
) -> None:
    lowest, highest = min(one, other), max(one, other)
    step = Step.spanning(lowest, highest)
    assert 0 <= step.zero <= HIGHEST_CODE
    assert float(np.float16(step.scale)) == step.scale
    x = torch.tensor([lowest, highest, lowest + inside * (highest - lowest), 0.0], dtype=torch.float64)
    assert ((step.round(x) - x).abs() <= 1.0001 * step.scale).all()  # at an end, the zero point's rounding adds a half
    assert step.round(torch.zeros(1)).item() == 0.0


@pytest.mark.parametrize("highest", [1e-3, 1.0, 60.0, 3e4])
def test_a_step_is_no_coarser_than_its_range_asks(highest: float) -> None:
    fine = highest / HIGHEST_CODE
    assert fine <= Step.spanning(0.0, highest).scale <= max(1.001 * fine, fine + 2.0**-24)


def test_what_lies_outside_is_clipped() -> None:
    step = Step.spanning(-1.0, 3.0)
    rounded = step.round(torch.tensor([-50.0, 50.0]))
    assert rounded[0] == -step.zero * step.scale
    assert rounded[1] == (HIGHEST_CODE - step.zero) * step.scale


@pytest.mark.toolchain
@pytest.mark.parametrize(("lowest", "highest"), [(-1.0, 3.0), (0.0, 7.5), (-20.0, 0.0), (-1e-3, 2e-3), (-700.0, 4e3)])
def test_rounding_is_that_of_quantize_linear_to_the_bit_ties_included(lowest: float, highest: float) -> None:
    import onnxruntime as ort
    from onnx import TensorProto
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
    from onnx.numpy_helper import from_array

    step = Step.spanning(lowest, highest)
    x = lowest + (highest - lowest) * torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 1.1
    ties = (torch.arange(-40.0, 40.0) + 0.5) * step.scale
    x = torch.cat([x, ties, torch.tensor([0.0, 1e9, -1e9])])
    constants = [from_array(np.float32(step.scale), "scale"), from_array(np.uint16(step.zero), "zero")]
    nodes = [
        make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    shape = [make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name in "xy"]
    graph = make_graph(nodes, "one", shape[:1], shape[1:], constants)
    model = make_model(graph, opset_imports=[make_opsetid("", 23)], ir_version=11).SerializeToString()
    (y,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    assert torch.equal(torch.from_numpy(y), step.round(x))


def graph_of(toy: Toy) -> Graph:
    return trace(open_checkpoint(toy.folder).spec)


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_has_a_step_for_what_it_reads_and_for_what_it_gives(
    make_toy: Callable[..., Toy], tied: bool
) -> None:
    graph = graph_of(make_toy(tie_word_embeddings=tied))
    reach = {node.name: {"lowest": -1.0 - index, "highest": 1.0 + index} for index, node in enumerate(graph.nodes)}
    steps = linear_steps(graph, reach)
    linears = [node for node in graph.nodes if node.op == "linear"]
    assert len(steps) == len(linears) == 15
    for node in linears:
        source, weight = node.arguments
        found = steps[weight.name]  # type: ignore[union-attr]
        assert found.before == Step.spanning(*reach[source.node].values())  # type: ignore[union-attr]
        assert found.after == Step.spanning(*reach[node.name].values())


def test_a_range_that_is_missing_is_named(make_toy: Callable[..., Toy]) -> None:
    graph = graph_of(make_toy())
    reach = {node.name: {"lowest": -1.0, "highest": 1.0} for node in graph.nodes if node is not graph.head}
    with pytest.raises(InputError, match=f"but {graph.head.name} has none") as caught:
        linear_steps(graph, reach)
    assert "--calibration none" in caught.value.hint


def test_a_reference_with_static_activations_wants_a_store(make_toy: Callable[..., Toy]) -> None:
    arithmetic = Arithmetic(activations=Activations.STATIC_UINT16, compute_dtype="fp16", kv_dtype="fp16")
    with pytest.raises(AssertionError):
        Reference(graph_of(make_toy()), {}, arithmetic)
