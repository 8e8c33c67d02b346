"""Programs for backends that ExecuTorch's wheel lowers to on any host, and runs on none but their own.

A backend's partitioner takes what it can of one static step, a token at a position, and makes delegates of it; what is
left over runs on ExecuTorch's own kernels. In which form each is given the model is a row of ``RECIPES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.files import written_whole
from exporter.model.graph import Graph
from exporter.model.reference import Weights
from exporter.quantized import QuantizedTensor
from exporter.spec import Logits
from exporter.store import PlainWeight
from targets.executorch import border
from targets.executorch.delegations import Delegation
from targets.executorch.metadata import describe

with border.toolchain("be imported"):
    import executorch.extension.llm.custom_ops.custom_ops  # declares llama::*
    import executorch.kernels.quantized  # noqa: F401  (declares quantized_decomposed, for embeddings)
    import torch.ao.quantization.fx._decomposed  # declares more of quantized_decomposed
    import torchao.quantization.quant_primitives  # noqa: F401  (declares torchao::dequantize_affine)
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    from targets.executorch.outer import embedding_module
    from targets.executorch.plain import CustomAttention, Decoder, FiniteAttention, Form, FusedAttention

_CODE_BOUNDS = {4: (-8, 7), 8: (-128, 127)}
"""Of codes as torchao's op names their precision."""


def write_program(
    graph: Graph, weights: Weights, path: Path, *, delegation: Delegation, context: int, half: bool
) -> None:
    """Lower ``graph`` for one backend and write ``path``, whole or not at all. ``half``: linears and attention compute
    in float16. Raises MissingToolError or LoweringError."""
    recipe = RECIPES[delegation.backend]
    dtype = torch.float16 if half else torch.float32
    with border.toolchain(f"lower the graph for {delegation.backend}"):
        form = recipe.form(dtype)
        custom = form.attention is CustomAttention
        decoder = Decoder(graph, weights, form=form, context=context, logits=Logits.LAST)
        examples = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        exported = torch.export.export(decoder, examples, strict=False)
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=recipe.partitioners(),
            constant_methods=describe(graph.spec, context=context, longest=1, custom_attention=custom),
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=recipe.skip_dim_order),
        )
        program = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
    with written_whole(path) as temporary, border.toolchain("write the program"), temporary.open("wb") as file:
        program.write_to_file(file)


class FloatLinear(nn.Module):
    """x float32 [1, 1, K] -> float32 [1, 1, N], computed in the dtype of the matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Buffer(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight).float()


class AffineLinear(nn.Module):
    """x float32 [1, 1, K] -> float32 [1, 1, N], computed in ``dtype`` with codes under torchao's ``dequantize_affine``,
    which backends recognise and keep as codes."""

    def __init__(self, weight: QuantizedTensor, *, dtype: torch.dtype, zeros: bool) -> None:
        super().__init__()
        self.codes, self.scales = nn.Buffer(weight.codes), nn.Buffer(weight.scales.to(dtype))
        self.zeros = nn.Buffer(torch.zeros_like(weight.scales, dtype=torch.int8)) if zeros else None
        self.block, self.bounds, self.dtype = (1, weight.group_size), _CODE_BOUNDS[weight.bits], dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.matrix()).float()

    def matrix(self) -> Tensor:
        dequantize = torch.ops.torchao.dequantize_affine
        matrix: Tensor = dequantize(
            self.codes, self.block, self.scales, self.zeros, torch.int8, *self.bounds, output_dtype=self.dtype
        )
        return matrix


class AffineEmbedding(AffineLinear):
    """ids int64 [1, 1] -> float32 [1, 1, H]"""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.matrix()).float()


class RowLinear(nn.Module):
    """x float32 [1, 1, K] -> float32 [1, 1, N] with codes that have one scale a row, in the ops by which Vulkan's
    partitioner recognises them."""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.codes, self.scales = nn.Buffer(weight.codes), nn.Buffer(weight.scales[:, 0].contiguous())
        self.zeros = nn.Buffer(torch.zeros(len(weight.codes), dtype=torch.int64))
        self.bounds = _CODE_BOUNDS[weight.bits]

    def forward(self, x: Tensor) -> Tensor:
        dequantize, axis = torch.ops.quantized_decomposed.dequantize_per_channel, 0
        return F.linear(x, dequantize(self.codes, self.scales, self.zeros, axis, *self.bounds, torch.int8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one backend is given a model."""

    form: Callable[[torch.dtype], Form]
    partitioners: Callable[[], list[Any]]
    skip_dim_order: bool = False


def _coreml_form(dtype: torch.dtype) -> Form:
    def linear(weight: PlainWeight) -> nn.Module:
        if isinstance(weight, QuantizedTensor):
            return AffineLinear(weight, dtype=dtype, zeros=False)
        return FloatLinear(weight)

    def embedding(table: PlainWeight) -> nn.Module:
        if isinstance(table, QuantizedTensor):
            return AffineEmbedding(table, dtype=dtype, zeros=False)
        return embedding_module(table)

    return Form(embedding=embedding, linear=linear, attention=FusedAttention, dtype=dtype)


def _coreml_partitioners() -> list[Any]:
    from executorch.backends.apple.coreml.compiler import CoreMLBackend, coreml_preprocess
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    ct = coreml_preprocess.ct

    # FLOAT32 means that coremltools changes no dtype: what is to be float16 is so in the graph.
    specs = CoreMLBackend.generate_compile_specs(
        compute_unit=ct.ComputeUnit.ALL,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
    )
    return [CoreMLPartitioner(compile_specs=specs, take_over_mutable_buffer=True)]


def _vulkan_form(_dtype: torch.dtype) -> Form:
    def linear(weight: PlainWeight) -> nn.Module:
        if not isinstance(weight, QuantizedTensor):
            return FloatLinear(weight)
        if weight.group_size == weight.shape[1]:
            return RowLinear(weight)
        return AffineLinear(weight, dtype=torch.float32, zeros=True)

    return Form(embedding=embedding_module, linear=linear, attention=CustomAttention)


def _vulkan_partitioners() -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner({})]


def _float_form(_dtype: torch.dtype) -> Form:
    def linear(weight: PlainWeight) -> nn.Module:
        assert isinstance(weight, Tensor)  # the delegation takes no codes
        return FloatLinear(weight)

    return Form(embedding=embedding_module, linear=linear, attention=FiniteAttention)


def _mps_partitioners() -> list[Any]:
    from executorch.backends.apple.mps.partition import MPSPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec

    return [MPSPartitioner(compile_specs=[CompileSpec("use_fp16", bytes([False]))])]


def _arm_partitioners() -> list[Any]:
    from executorch.backends.arm.tosa.compile_spec import TosaCompileSpec
    from executorch.backends.arm.tosa.partitioner import TOSAPartitioner

    return [TOSAPartitioner(TosaCompileSpec("TOSA-1.0+FP"))]


RECIPES = {
    "coreml": Recipe(form=_coreml_form, partitioners=_coreml_partitioners),
    "vulkan": Recipe(form=_vulkan_form, partitioners=_vulkan_partitioners),
    "mps": Recipe(form=_float_form, partitioners=_mps_partitioners),
    "arm": Recipe(form=_float_form, partitioners=_arm_partitioners),
}
