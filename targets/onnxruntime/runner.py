"""Runs a ``model.onnx`` with ONNX Runtime, past and present bound to one shared cache."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from exporter.errors import LoweringError
from exporter.model.graph import FUSED
from exporter.model.image_ops import tiles_of
from exporter.spec import Artifact, ImageSpec, Logits, ModelSpec, Prefer
from targets.base import BaseRunner
from targets.images import CrossedStates, FusedImages
from targets.onnxruntime import VISION
from targets.onnxruntime.read import TILES, image_name

if TYPE_CHECKING:
    import onnx

ort.set_default_logger_severity(3)  # errors only: a warning about a node that runs on the CPU is no news here

_CACHED = {"tensor(float)": np.float32, "tensor(int8)": np.int8}

EXACT_PRODUCTS = "session.x64quantprecision"
"""The setting under which a product of uint8 and int8 is exact on every x86, at the price of the speed where it was so
anyway (include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h)."""


class OnnxRuntimeRunner(BaseRunner):
    """One session with one cache of ``[1, KV, context, D]`` per layer for keys and for values, written in place; of a
    model that sees images a second session, once it is shown one."""

    def __init__(self, artifact: Artifact, *, threads: int, rounding: bool = True) -> None:
        """``rounding``: whether activations are rounded, as the file says."""
        super().__init__(artifact)
        self._threads, self._rounding = threads, rounding
        started = time.perf_counter()
        self._session = self._load(artifact.path)
        self.load_s = time.perf_counter() - started
        spec = artifact.spec
        self._images = _shown_images(spec)
        shape = (1, spec.num_key_value_heads, artifact.context, spec.head_dim)
        kept_as = {given.name: _CACHED[given.type] for given in self._session.get_inputs() if given.type in _CACHED}
        self._caches = {
            (layer, kind): ort.OrtValue.ortvalue_from_numpy(
                np.zeros(shape, dtype=kept_as[f"past_key_values.{layer}.{kind}"])
            )
            for layer in range(spec.num_hidden_layers)
            for kind in ("key", "value")
        }

    def _load(self, path: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        if self._artifact.prefer is Prefer.PREFILL and saturates():
            options.add_session_config_entry(EXACT_PRODUCTS, "1")
        folder_key = "session.model_external_initializers_file_folder_path"
        try:
            source: bytes | str = str(path)
            if not self._rounding:
                options.add_session_config_entry(folder_key, str(path.parent))
                source = without_activation_rounding(path)
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own for each status code, without a common base
            raise LoweringError(
                f"ONNX Runtime cannot load {path.name}: {error}", hint="export the model again"
            ) from error

    def look(self, image: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As ``targets.base.SeeingRunner``."""
        images = self._images
        assert images is not None  # who shows an image has looked at the spec
        session = self._load(self._artifact.path.with_name(VISION))
        names, found = [given.name for given in session.get_outputs()], []
        try:
            for part in images.parts(image):
                found.append(session.run(names, {name: value.numpy() for name, value in part.items()}))
        except Exception as error:  # see above
            raise LoweringError(f"ONNX Runtime failed at an image: {error}", hint="export the model again") from error
        joined = (np.concatenate(parts, axis=-2) for parts in zip(*found, strict=True))
        return images.show(dict(zip(names, joined, strict=True)))

    def feed(self, ids: Sequence[int], *, tiles: Tensor | None = None) -> Tensor:
        self._check_feed(ids)
        total = self._position + len(ids)
        rows = 1 if self._artifact.logits is Logits.LAST else len(ids)
        logits = np.empty((1, rows, self._artifact.spec.vocab_size), dtype=np.float32)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([list(ids)], dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        for (layer, kind), cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", cache)
            binding.bind_ortvalue_output(f"present.{layer}.{kind}", cache)
        if self._images:
            for name, array in self._images.inputs(tiles, length=len(ids)).items():
                binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        started = time.perf_counter()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # see above
            raise LoweringError(f"ONNX Runtime failed while running: {error}", hint="export the model again") from error
        self.steps_s = (time.perf_counter() - started,)
        self._position = total
        return torch.from_numpy(logits)[0]

    def close(self) -> None:
        del self._session, self._caches, self._images


class ShownImages(Protocol):
    """What a decoder is given of the images that it was shown."""

    def parts(self, image: Mapping[str, Tensor]) -> Sequence[Mapping[str, Tensor]]:
        """What ``vision.onnx`` is run on, one after the other."""
        ...

    def show(self, states: Mapping[str, npt.NDArray[np.float32]]) -> Mapping[str, Tensor]:
        """What it gave of one more image, by the names of the file; the same by ours."""
        ...

    def inputs(self, tiles: Tensor | None, *, length: int) -> dict[str, npt.NDArray[Any]]:
        """Of the decoder, beside its tokens, for so many of them; ``tiles`` as for ``feed``."""
        ...


def _shown_images(spec: ModelSpec) -> ShownImages | None:
    if spec.fusion:
        return _FusedImages(spec)
    return _CrossedImages(spec, spec.images) if spec.images else None


class _FusedImages:
    """Of a ``targets.onnxruntime.images.FusingEmitter``."""

    def __init__(self, spec: ModelSpec) -> None:
        self._images = FusedImages(spec)

    def parts(self, image: Mapping[str, Tensor]) -> Sequence[Mapping[str, Tensor]]:
        return tiles_of(image)

    def show(self, states: Mapping[str, npt.NDArray[np.float32]]) -> Mapping[str, Tensor]:
        return self._images.show([torch.from_numpy(states[FUSED[0]])])

    def inputs(self, tiles: Tensor | None, *, length: int) -> dict[str, npt.NDArray[Any]]:
        return {name: value.numpy() for name, value in self._images.inputs(tiles, length=length).items()}


class _CrossedImages:
    """Of a ``targets.onnxruntime.images.SeeingEmitter``."""

    def __init__(self, spec: ModelSpec, images: ImageSpec) -> None:
        self._kept = CrossedStates(spec, images)

    def parts(self, image: Mapping[str, Tensor]) -> Sequence[Mapping[str, Tensor]]:
        return [image]

    def show(self, states: Mapping[str, npt.NDArray[np.float32]]) -> Mapping[str, Tensor]:
        return self._kept.show({name: torch.from_numpy(states[image_name(name)]) for name in self._kept.states})

    def inputs(self, tiles: Tensor | None, *, length: int) -> dict[str, npt.NDArray[Any]]:
        states = {image_name(name): value.numpy() for name, value in self._kept.states.items()}
        return {TILES: self._kept.seen(tiles, length=length).numpy(), **states}


@functools.cache
def saturates() -> bool:
    """Whether a product of uint8 and int8 overflows at 16 bits on this processor, as on x86 without VNNI: tried out."""
    import onnx
    from onnx import TensorProto
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

    a = make_tensor_value_info("a", TensorProto.UINT8, (8, 64))
    y = make_tensor_value_info("y", TensorProto.INT32, (8, 32))
    b = onnx.numpy_helper.from_array(np.full((64, 32), 127, dtype=np.int8), "b")
    graph = make_graph([make_node("MatMulInteger", ["a", "b"], ["y"])], "largest", [a], [y], [b])
    model = make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (products,) = session.run(None, {"a": np.full((8, 64), 255, dtype=np.uint8)})
    return bool((products != 64 * 255 * 127).any())


def without_activation_rounding(path: Path) -> bytes:
    """The graph in ``path`` with no activation rounded and nothing else changed: every MatMulNBits at accuracy_level 0,
    every QuantizeLinear a division, in place of each integer product one with the floats that the codes mean, and a
    cache of floats."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    nodes = [changed for node in model.graph.node for changed in _unrounded(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT8:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return model.SerializeToString()


_BEFORE_CACHE_SCALES = 12
"""Inputs of a GroupQueryAttention up to the bias of its scores: all that ours has besides scales."""


def _unrounded(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    from onnx import TensorProto
    from onnx.helper import make_node

    output = node.output[0]
    match node.op_type:
        case "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 0
            return [node]
        case "GroupQueryAttention":
            kept = [a for a in node.attribute if a.name not in ("k_quant_type", "v_quant_type", "kv_cache_bit_width")]
            del node.attribute[:]
            node.attribute.extend(kept)
            del node.input[_BEFORE_CACHE_SCALES:]
            while not node.input[-1]:
                del node.input[-1]
            return [node]
        case "QuantizeLinear":
            x, scales, _ = node.input  # [B * T, K], [B * T]
            axes, column = f"{output}.axes", f"{output}.column"
            return [
                make_node("Constant", [], [axes], value_ints=[-1]),
                make_node("Unsqueeze", [scales, axes], [column]),
                make_node("Div", [x, column], [output]),
            ]
        case "MatMulIntegerToFloat":
            x, codes, _, scales, _ = node.input
            floats, weight = f"{output}.floats", f"{output}.weight"
            return [
                make_node("Cast", [codes], [floats], to=TensorProto.FLOAT),
                make_node("Mul", [floats, scales], [weight]),  # [K, N] by [N]
                make_node("MatMul", [x, weight], [output]),
            ]
    return [node]
