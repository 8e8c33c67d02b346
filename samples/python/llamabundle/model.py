"""The artifact in ONNX Runtime, with one cache that is written in place."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from llamabundle.bundle import CACHES, Bundle, BundleError
from llamabundle.fused import FusedImages
from llamabundle.images import Images

PROVIDER = "CPUExecutionProvider"


class Model:
    """One session, and the keys and values of the ``held`` tokens in ``[1, KV, context, D]`` for each layer.

    What lies in the cache beyond the held tokens is never looked at, so going back is a matter of their number alone.
    ``images.show`` takes pictures (of Pillow), where the model sees any; a text that is fed has a token for each, or
    what ``show`` gives of it.
    Raises BundleError where ONNX Runtime does not load the file.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 2) -> None:
        self.threads = threads
        self.held: list[int] = []
        spec = bundle.manifest["model"]
        self._vocabulary, self._context = int(spec["vocab_size"]), bundle.context
        self._logits = bundle.manifest["logits"]  # last, or all: one row for each token fed
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors only: a note about a node's place is no news
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        if bundle.manifest["prefer"] == "prefill":
            # x86 without VNNI saturates its products of uint8 and int8 unless it is told not to; others do not care.
            options.add_session_config_entry("session.x64quantprecision", "1")
        started = time.perf_counter()
        try:
            self._session = ort.InferenceSession(str(bundle.path("model.onnx")), options, providers=[PROVIDER])
        except Exception as error:  # onnxruntime raises a class of its own for each status code, without a common base
            raise BundleError(f"ONNX Runtime {ort.__version__} does not load the model: {error}") from error
        self.load_s = time.perf_counter() - started
        shape = (1, spec["num_key_value_heads"], self._context, spec["head_dim"])
        kept_as = CACHES[bundle.manifest["scheme"]["kv_dtype"]]
        self._caches = {
            f"{layer}.{kind}": ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=kept_as))
            for layer in range(spec["num_hidden_layers"])
            for kind in ("key", "value")
        }

        kind = Images if "images" in spec else FusedImages if "fusion" in spec else None
        self.images = kind(bundle, threads=threads) if kind else None

    @property
    def runtime(self) -> str:
        return f"onnxruntime {ort.__version__}, {PROVIDER}"

    @property
    def room(self) -> int:
        """How many more tokens the cache takes."""
        return self._context - len(self.held)

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on."""
        del self.held[position:]

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens after those held; logits ``[V]`` after the last of them. Raises ValueError where they do not fit
        the cache."""
        if not 0 < len(ids) <= self.room:
            raise ValueError(f"{len(ids)} tokens do not fit the cache, which has room for {self.room}")
        total = len(self.held) + len(ids)
        rows = len(ids) if self._logits == "all" else 1
        logits = np.empty((1, rows, self._vocabulary), dtype=np.float32)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([ids], dtype=np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), dtype=np.int64))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        for name, array in (self.images.inputs(self.held, ids) if self.images else {}).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        self.held += ids
        return logits[0, -1]
