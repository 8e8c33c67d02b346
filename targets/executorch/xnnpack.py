"""XNNPACK graphs, written node by node: what ExecuTorch's partitioner would arrive at, without its passes.

The stock way (``to_edge_transform_and_lower``) re-traces every subgraph with fake tensors some thirty times, about
eight seconds a layer whatever the weights. A ``Segment`` appends the nodes that it would emit, and serializes them with
the wheel's own serializer; a test holds that both give the same logits, bit by bit.

Weights lie in the program's *named data* under the names that they have in the checkpoint, so that they can be read
back. The runtime does not compare the length of a codes buffer with its tensor (one that is too short loads and
answers garbage), so every constant is measured here.

How a weight is stored and what XNNPACK computes:

    float32          f32 x f32
    float16          f32 x f16: the weight lies in the file as float16, XNNPACK widens it when it packs it at load
    int8 per row     qdint8 x qcint8: activations rounded to int8 for each token as they come, float32 scales
    int4 by groups   qdint8 x qbint4: the same activations, bf16 scales
    int4 per row     qdint8 x qcint4: the same activations, float32 scales
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    CONSTANT_TENSOR_ALIGNMENT,
    serialize_xnnpack_binary,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_INVALID_VALUE_ID,
    XNN_VALUE_FLAG_EXTERNAL_INPUT,
    XNN_VALUE_FLAG_EXTERNAL_OUTPUT,
)
from executorch.exir._serialize._named_data_store import NamedDataStore, NamedDataStoreOutput
from torch import Tensor

from exporter.errors import LoweringError
from exporter.quantized import QuantizedTensor, pack_int4
from exporter.store import PlainWeight

CODES, SCALES, ROW_SCALES = ".codes", ".scales", ".row_scales"
"""What follows a weight's name in the named data; a float weight lies under the bare name. ``ROW_SCALES`` are those of
int4 with one a row: by their size alone, they could be the bf16 scales of two groups."""

NIBBLE_OFFSET = 0x88
"""XNNPACK's int4 codes count from -8: a two's-complement nibble with its highest bit flipped."""

_BITS = {
    xnn.XNNDatatype.xnn_datatype_fp32: 32,
    xnn.XNNDatatype.xnn_datatype_fp16: 16,
    xnn.XNNDatatype.xnn_datatype_qcint8: 8,
    xnn.XNNDatatype.xnn_datatype_qcint4: 4,
    xnn.XNNDatatype.xnn_datatype_qbint4: 4,
}
_FLOATS = {
    torch.float32: xnn.XNNDatatype.xnn_datatype_fp32,
    torch.float16: xnn.XNNDatatype.xnn_datatype_fp16,
}
_NO_DEBUG_HANDLE = 65535
_DYNAMIC = 0
"""In StaticReshape and StaticSlice: the length that is left over, or up to the end."""


@dataclass(frozen=True, eq=False, slots=True)
class Wire:
    """A float32 tensor of the whole program. ``shape`` holds the largest length in the place of a dynamic one."""

    shape: tuple[int, ...]
    source: Segment | None = None
    """The segment that computes it; None if it comes from outside of all of them."""


class Segment:
    """A run of nodes that becomes one delegate.

    A wire from elsewhere that a node takes becomes an input; a wire of its own becomes an output when ``send`` is
    called on it. Their order here is the order of the delegate's arguments and results.
    """

    def __init__(self) -> None:
        self.inputs: list[Wire] = []
        self.outputs: list[Wire] = []
        self._ids: dict[Wire, int] = {}
        self._constant_ids: dict[str, int] = {}
        self._rounded_ids: dict[tuple[Wire, xnn.XNNDatatype], int] = {}
        self._values: list[xnn.XValue] = []
        self._nodes: list[xnn.XNode] = []
        self._constants = [xnn.ConstantDataOffset(0, 0)]  # buffer 0 means: not a constant
        self._data = NamedDataStore()

    def linear(self, x: Wire, *, name: str, weight: PlainWeight) -> Wire:
        """``x`` [1, T, K] times the transpose of ``weight`` [N, K]."""
        if isinstance(weight, QuantizedTensor):
            source, kernel = self._rounded(x, kernel=_codes_datatype(weight)), self._codes(weight)
        else:
            source, kernel = self._use(x), self._floats(name, weight, dtype=weight.dtype)
        result = self._wire((*x.shape[:-1], weight.shape[0]))
        self._node(xnn.XNNFullyConnected(source, kernel, XNN_INVALID_VALUE_ID, self._ids[result], 0))
        return result

    def rms_norm(self, x: Wire, *, name: str, weight: Tensor, eps: float) -> Wire:
        return self.scale(self.normal(x, eps=eps), name, weight)

    def normal(self, x: Wire, *, eps: float) -> Wire:
        """``x`` over the root mean square of its last dimension."""
        mean = self._row_mean(self._unary(xnn.XNNSquare, x))
        shifted = self._binary(xnn.XNNAdd, mean, self._scalar(eps))
        return self._binary(xnn.XNNMultiply, x, self._ids[self._unary(xnn.XNNReciprocalSquareRoot, shifted)])

    def layer_norm(self, x: Wire, *, weight: tuple[str, Tensor], bias: tuple[str, Tensor], eps: float) -> Wire:
        """``weight`` and ``bias`` float32 [H], each behind its name."""
        negative_mean = self._row_mean(x, sign=-1)
        normed = self.normal(self.add(x, negative_mean), eps=eps)
        return self.bias(self.scale(normed, *weight), *bias)

    def scale(self, x: Wire, name: str, weight: Tensor) -> Wire:
        """``x`` [..., H] times ``weight`` [H]."""
        return self._binary(xnn.XNNMultiply, x, self._floats(name, weight, dtype=torch.float32))

    def bias(self, x: Wire, name: str, weight: Tensor) -> Wire:
        """``x`` [..., H] and ``weight`` [H]."""
        return self._binary(xnn.XNNAdd, x, self._floats(name, weight, dtype=torch.float32))

    def tanh_gate(self, x: Wire, name: str, gate: Tensor) -> Wire:
        """``x`` times the hyperbolic tangent of ``gate`` [1]."""
        opened = self._value(gate.shape)
        self._node(xnn.XNNTanh(self._floats(name, gate, dtype=torch.float32), opened, 0))
        return self._binary(xnn.XNNMultiply, x, opened)

    def add_rest(self, x: Wire, y: Wire, name: str, gate: Tensor) -> Wire:
        """``x`` and 1 - tanh of ``gate`` [1] times ``y``."""
        rest = self._binary(xnn.XNNSubtract, y, self._use(self.tanh_gate(y, name, gate)))
        return self.add(x, rest)

    def gelu(self, x: Wire) -> Wire:
        """By the error function."""
        return self._unary(xnn.XNNGelu, x)

    def silu(self, x: Wire) -> Wire:
        return self.multiply(x, self._unary(xnn.XNNSigmoid, x))

    def multiply(self, a: Wire, b: Wire) -> Wire:
        return self._binary(xnn.XNNMultiply, a, self._use(b))

    def scale_by(self, x: Wire, factors: Wire, *, column: int) -> Wire:
        """``x`` [1, T, H] times one column of ``factors`` [1, T, E]."""
        return self._binary(xnn.XNNMultiply, x, self._slice_last(factors, column, 1))

    def add(self, a: Wire, b: Wire) -> Wire:
        return self._binary(xnn.XNNAdd, a, self._use(b))

    def split_heads(self, x: Wire, heads: int) -> Wire:
        """[1, T, heads * D] -> [1, T, heads, D]."""
        one, length, width = x.shape
        return self._reshape(x, (one, length, heads, width // heads))

    def join_heads(self, x: Wire) -> Wire:
        """[1, T, heads, D] -> [1, T, heads * D]."""
        one, length, heads, width = x.shape
        return self._reshape(x, (one, length, heads * width))

    def as_heads(self, x: Wire, heads: int) -> Wire:
        """[M, N, heads * D] -> [1, M * N, heads, D]."""
        count, length, width = x.shape
        return self._reshape(x, (1, count * length, heads, width // heads))

    def rotate(self, x: Wire, *, cos: Wire, sin: Wire) -> Wire:
        """``x`` [1, T, heads, D] turned by tables [1, T, 1, D] = [cos, cos] and [-sin, sin], as in ``rope.rotate``."""
        half = x.shape[-1] // 2
        swapped = self._wire(x.shape)
        second, first = self._slice_last(x, half, half), self._slice_last(x, 0, half)
        self._node(
            xnn.XNNConcatenate2(
                axis=len(x.shape) - 1,
                input1_id=second,
                input2_id=first,
                input3_id=XNN_INVALID_VALUE_ID,
                input4_id=XNN_INVALID_VALUE_ID,
                output_id=self._ids[swapped],
                flags=0,
                input5_id=XNN_INVALID_VALUE_ID,
            )
        )
        return self.add(self.multiply(x, cos), self.multiply(swapped, sin))

    def send(self, wire: Wire) -> None:
        """Make a wire of this segment one of its outputs."""
        if wire not in self.outputs:
            self.outputs.append(wire)

    def serialize(self) -> tuple[bytes, NamedDataStoreOutput]:
        """The delegate's payload, and the constants that it names."""
        external = [(wire, XNN_VALUE_FLAG_EXTERNAL_INPUT) for wire in self.inputs]
        external += [(wire, XNN_VALUE_FLAG_EXTERNAL_OUTPUT) for wire in self.outputs]
        for external_id, (wire, flag) in enumerate(external):
            value = self._values[self._ids[wire]].xvalue_union
            value.external_id, value.flags = external_id, flag
        graph = xnn.XNNGraph(
            version="0",
            xnodes=self._nodes,
            xvalues=self._values,
            num_externs=len(external),
            input_ids=[self._ids[wire] for wire in self.inputs],
            output_ids=[self._ids[wire] for wire in self.outputs],
            constant_data=self._constants,
        )
        return serialize_xnnpack_binary(graph, bytearray()), self._data.get_named_data_store_output()

    def constant(
        self,
        key: str,
        data: bytes,
        *,
        shape: tuple[int, ...],
        datatype: xnn.XNNDatatype,
        quantization: xnn.XNNQuantParams | None = None,
    ) -> int:
        """The value id of a constant tensor. Raises LoweringError unless ``data`` is as long as ``shape`` wants."""
        if key not in self._constant_ids:
            wanted = math.prod(shape) * _BITS[datatype] // 8
            if len(data) != wanted:
                raise LoweringError(
                    f"{key} has {len(data)} bytes, its shape wants {wanted}",
                    hint="the weight store may be damaged: remove its folder and run again",
                )
            self._constant_ids[key] = self._value(
                shape, datatype=datatype, buffer=self._buffer(key, data), quantization=quantization
            )
        return self._constant_ids[key]

    def _row_mean(self, x: Wire, *, sign: int = 1) -> Wire:
        """[..., H] -> [..., 1]. XNNPACK's graph format has no mean: it is a matrix of one row that holds 1/H."""
        width = x.shape[-1]
        name = f"mean of {width}" if sign > 0 else f"negative mean of {width}"
        return self.linear(x, name=name, weight=torch.full((1, width), sign / width))

    def _codes(self, weight: QuantizedTensor) -> int:
        datatype = _codes_datatype(weight)
        if datatype == xnn.XNNDatatype.xnn_datatype_qbint4:
            scales, suffix = weight.scales.to(torch.bfloat16), SCALES
            quantization = xnn.PerChannelGroupQuant(scale=[], channel_dim=0, group_size=weight.group_size)
        else:
            scales, suffix = weight.scales, SCALES if weight.bits == 8 else ROW_SCALES
            quantization = xnn.PerChannelQuant(scale=[], channel_dim=0)
        if not (scales.float() >= torch.finfo(torch.float32).tiny).all():
            raise LoweringError(
                f"{weight.name} has a scale of {scales.amin():.3g}, XNNPACK takes none of 0, below it or nearly so",
                hint="pass --requantize",
            )
        quantization.num_scales = weight.scales.numel()
        quantization.scale_buffer_idx = self._buffer(weight.name + suffix, _bytes(scales))
        codes = weight.codes if weight.bits == 8 else pack_int4(weight.codes) ^ NIBBLE_OFFSET
        return self.constant(
            weight.name + CODES, _bytes(codes), shape=weight.shape, datatype=datatype, quantization=quantization
        )

    def _floats(self, name: str, weight: Tensor, *, dtype: torch.dtype) -> int:
        return self.constant(name, _bytes(weight.to(dtype)), shape=tuple(weight.shape), datatype=_FLOATS[dtype])

    def _scalar(self, value: float) -> int:
        return self._floats(f"scalar {value!r}", torch.tensor([value]), dtype=torch.float32)

    def _buffer(self, key: str, data: bytes) -> int:
        self._data.add_named_data(key, data, CONSTANT_TENSOR_ALIGNMENT)
        self._constants.append(xnn.ConstantDataOffset(offset=UINT64_MAX, size=len(data), named_key=key))
        return len(self._constants) - 1

    def _use(self, wire: Wire) -> int:
        """The value id of a wire in this segment; one that is made elsewhere becomes an input."""
        if wire not in self._ids:
            self._ids[wire] = self._value(wire.shape)
            self.inputs.append(wire)
            if wire.source:
                wire.source.send(wire)
        return self._ids[wire]

    def _rounded(self, x: Wire, *, kernel: xnn.XNNDatatype) -> int:
        """``x`` in int8 with a scale and zero point for each token, made once for all linears with codes of one type.

        Not once for all linears: where XNNPACK does not round inside of each, it lays the rounded rows out (signed,
        unsigned, packed) as suits the type of codes of one that takes them, and gives them to the others as they are
        (``xnn_subgraph_optimize_packed_lhs`` in its src/subgraph/subgraph.c).
        """
        if (x, kernel) not in self._rounded_ids:
            rounded = self._value(
                x.shape,
                datatype=xnn.XNNDatatype.xnn_datatype_qdint8,
                quantization=xnn.PerTokenDynamicQuant(num_nonbatch_dims=1),
            )
            self._node(xnn.XNNConvert(self._use(x), rounded, 0))
            self._rounded_ids[x, kernel] = rounded
        return self._rounded_ids[x, kernel]

    def _unary(self, node: type[xnn.XNNNode1x1], x: Wire) -> Wire:
        source, result = self._use(x), self._wire(x.shape)
        self._node(node(source, self._ids[result], 0))
        return result

    def _binary(self, node: type[xnn.XNNNode2x1], a: Wire, b: int) -> Wire:
        source, result = self._use(a), self._wire(a.shape)
        self._node(node(source, b, self._ids[result], 0))
        return result

    def _reshape(self, x: Wire, shape: tuple[int, ...]) -> Wire:
        source, result = self._use(x), self._wire(shape)
        new_shape = [shape[0], _DYNAMIC, *shape[2:]]
        self._node(xnn.XNNStaticReshape(len(shape), new_shape, source, self._ids[result], 0))
        return result

    def _slice_last(self, x: Wire, start: int, size: int) -> int:
        source, result = self._use(x), self._value((*x.shape[:-1], size))
        offsets, sizes = [0] * len(x.shape), [*x.shape[:-1], size]
        offsets[-1], sizes[1] = start, _DYNAMIC
        self._node(xnn.XNNStaticSlice(len(x.shape), offsets, sizes, source, result, 0))
        return result

    def _wire(self, shape: tuple[int, ...]) -> Wire:
        wire = Wire(shape, self)
        self._ids[wire] = self._value(shape)
        return wire

    def _value(
        self,
        shape: Sequence[int],
        *,
        datatype: xnn.XNNDatatype = xnn.XNNDatatype.xnn_datatype_fp32,
        buffer: int = 0,
        quantization: xnn.XNNQuantParams | None = None,
    ) -> int:
        identity = len(self._values)
        value = xnn.XNNTensorValue(
            datatype=datatype,
            num_dims=len(shape),
            dims=list(shape),
            constant_buffer_idx=buffer,
            external_id=XNN_INVALID_VALUE_ID,
            flags=0,
            id_out=identity,
        )
        union = xnn.XNNQuantizedTensorValue(value, quantization) if quantization else value
        self._values.append(xnn.XValue(union))
        return identity

    def _node(self, node: xnn.XNodeUnion) -> None:
        self._nodes.append(xnn.XNode(node, _NO_DEBUG_HANDLE))


def _codes_datatype(weight: QuantizedTensor) -> xnn.XNNDatatype:
    if weight.bits == 8:
        return xnn.XNNDatatype.xnn_datatype_qcint8
    one_scale_per_row = weight.scales.shape[1] == 1
    return xnn.XNNDatatype.xnn_datatype_qcint4 if one_scale_per_row else xnn.XNNDatatype.xnn_datatype_qbint4


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
