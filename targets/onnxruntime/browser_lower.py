"""The lowering for a browser: one file that onnxruntime-web runs on WebGPU and, where there is none, on WebAssembly.

It is the CPU's table with four ops spelled otherwise. WebGPU has no kernel for products of a transposed weight, for
bits, for int8 activations in the CPU's blocks, and without ``shader-f16`` for fp16; what it has no kernel for would be
computed in WebAssembly, with copies there and back, or fail.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from targets.onnxruntime.lower import FLOAT, Emitter


class BrowserEmitter(Emitter):
    accuracy_level: ClassVar[int] = 0
    """At 4, what is computed is up to the GPU: int8 in blocks of 128 columns where it has subgroups and is not
    Apple's, floats elsewhere (``CanApplyDP4AMatrixMatMulNBits``, onnxruntime/contrib_ops/webgpu/quantization/
    dp4a_matmul_nbits.cc). WebAssembly computes in floats whatever it is asked for."""

    def _rows(self, ids: ir.Value, weight: ir.Value) -> ir.Value:
        """Of floats that are made at load: not every GPU computes in fp16."""
        rows: ir.Value = self._op("Gather", self._to_float(weight), ids)
        return rows

    def _product(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """The transpose is computed once, when the file is loaded."""
        product: ir.Value = self._op("MatMul", x, self._op("Transpose", weight, perm=[1, 0]))
        return product

    def _unpack_int4(self, packed: ir.Value) -> ir.Value:
        """Nibbles as floats, which hold them exactly: uint8 ``[1, T, K/b, b/2]`` -> float ``[1, T, K/b, b]``."""
        both = self._to_float(packed)
        high = self._op("Floor", self._op("Mul", both, self._constant(1 / 16)))
        low = self._op("Sub", both, self._op("Mul", high, self._constant(16.0)))
        last = self._constant([-1])
        pairs = self._op("Concat", self._op("Unsqueeze", low, last), self._op("Unsqueeze", high, last), axis=-1)
        nibbles: ir.Value = self._op("Reshape", pairs, self._constant([0, 0, 0, -1]))
        nibbles.dtype = FLOAT
        return nibbles
