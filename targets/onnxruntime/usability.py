"""How much of a ``model.onnx`` an execution provider of a phone would take, by ONNX Runtime's usability checker.

The checker (onnxruntime.tools.mobile_helpers) has a table of operators for NNAPI and for Core ML, and makes partitions
of the graph as the runtime does. XNNPACK's table is not in it, and stands here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from onnxruntime.tools.mobile_helpers import usability_checker

from exporter.errors import LoweringError
from exporter.spec import Report, Verdict

if TYPE_CHECKING:
    from targets.onnxruntime.providers import Provider

_MLPROGRAM = "coreml_supported_mlprogram_ops.md"
_VERDICTS = {"YES": Verdict.PASSED, "MAYBE": Verdict.NOT_MEASURED, "NO": Verdict.NOT_MEASURED}
"""Nothing is wrong with a file of which a provider takes little: the CPU computes the rest. Whether that gains anything
only a device can say; of NO the checker expects that it does not, and the reason names what to take instead."""

_XNNPACK = {"AveragePool", "Conv", "ConvTranspose", "Gemm", "MatMul", "MaxPool", "QLinearConv", "Resize", "Softmax"}
_XNNPACK_MICROSOFT = {"QLinearAveragePool", "QLinearConvTranspose", "QLinearSoftmax"}
"""https://onnxruntime.ai/docs/execution-providers/Xnnpack-ExecutionProvider.html, Supported ops"""


class _XnnpackOperators:
    """What ``check_partitioning`` asks."""

    def is_op_supported(self, node: onnx.NodeProto) -> bool:
        return node.op_type in (_XNNPACK_MICROSOFT if node.domain == "com.microsoft" else _XNNPACK)

    def get_caveats(self) -> list[str]:
        return []


def check(path: Path, backend: str, provider: Provider) -> Report:
    """The verdict for the file as it is and, where that is better, with its shapes fixed: passed for the checker's YES
    only. Raises LoweringError for a file that is none."""
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    except Exception as error:  # protobuf and onnx each raise their own
        raise LoweringError(f"{path.name} is not an ONNX model: {error}", hint="export the model again") from error
    as_is, fixed = (_partitions(model, backend, fixed=fixed) for fixed in (False, True))
    best = max(as_is, fixed, key=lambda found: (found.suitability(), found.num_supported_nodes))
    usability = best.suitability().name
    figures = {
        "nodes": as_is.num_nodes,
        "nodes_taken": as_is.num_supported_nodes,
        "partitions": as_is.num_partitions,
        "nodes_taken_with_fixed_shapes": fixed.num_supported_nodes,
        "partitions_with_fixed_shapes": fixed.num_partitions,
        "usability": usability,
        "left_to_the_cpu": sorted(fixed.unsupported_ops),
    }
    return Report(verdict=_VERDICTS[usability], reason=_reason(best, usability, provider), figures=figures)


def _reason(best: Any, usability: str, provider: Provider) -> str:
    if usability == "YES":
        return ""
    parts = "1 partition" if best.num_partitions == 1 else f"{best.num_partitions} partitions"
    return (
        f"{provider.name} would take {best.num_supported_nodes} of {best.num_nodes} nodes in {parts}, and ONNX "
        f"Runtime's usability checker says {usability}: take {provider.instead}"
    )


def _partitions(model: onnx.ModelProto, backend: str, *, fixed: bool) -> Any:
    """``fixed``: count as if every shape were."""
    match backend:
        case "coreml":
            return usability_checker.check_coreml_partitions(model, not fixed, _MLPROGRAM)
        case "nnapi":
            return usability_checker.check_nnapi_partitions(model, not fixed)
    # XNNPACK takes any shape
    return usability_checker.check_partitioning(model.graph, _XnnpackOperators(), False)
