"""The artifact of a bundle, fed its goldens: ``python answer.py BUNDLE OUT.npz``, on this processor or an emulated one.

It runs where llama-export is not installed, so it has the Python sample's package at hand and the runtime, no more.
What it writes are logits float32 ``[m, V]`` at the golden positions, and what computed them.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamabundle.bundle import Bundle
from llamabundle.selftest import answer_goldens


def import_torch() -> Any:
    """torch, without the half of ``torch.distributed`` that asks for NCCL as it is imported: an emulated machine has
    none of CUDA's libraries (``stubs.py``)."""
    package = types.ModuleType("torch")
    (where,) = (path for path in sys.path if Path(path, "torch", "__init__.py").is_file())
    package.__path__ = [str(Path(where, "torch"))]
    sys.modules["torch"] = package
    native = importlib.import_module("torch._C")
    for name in ("_c10d_init", "_rpc_init", "_dist_autograd_init"):  # then it counts as built without
        delattr(native, name)
    del sys.modules["torch"]
    return importlib.import_module("torch")


class Program:
    """A ``model.pte`` in ExecuTorch, called as ``llamabundle.Model`` is."""

    def __init__(self, bundle: Bundle) -> None:
        from importlib.metadata import version

        torch = import_torch()
        from executorch.extension.pybindings import _portable_lib as runtime

        # As targets/executorch/worker.py: these hold the kernels of attention and of quantized embeddings.
        folder = Path(runtime.__file__).parents[2]
        for library in ("extension/llm/custom_ops/libcustom_ops_aot_lib", "kernels/quantized/libquantized_ops_aot_lib"):
            torch.ops.load_library(folder / f"{library}.so")
        runtime._unsafe_reset_threadpool(1)
        self.runtime = f"executorch {version('executorch')}, xnnpack"
        self._tensor: Callable[[Any], Any] = torch.tensor
        self._program = runtime._load_program(str(bundle.path("model.pte")))
        self._method = self._program.load_method("forward")
        self._position = 0

    def rewind(self, position: int) -> None:
        self._position = position

    def feed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        logits = self._method((self._tensor([list(ids)]), self._tensor([self._position])))[0]
        self._position += len(ids)
        return np.array(logits[0, -1].numpy())


def open_artifact(bundle: Bundle) -> Any:
    """What answers as ``llamabundle.Model`` does. The bundle was checked by who started this."""
    if bundle.manifest["target"] == "executorch":
        return Program(bundle)
    from llamabundle.model import Model

    return Model(bundle, threads=1)


def features() -> list[str]:
    """Of the processor, as its system names them."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("features", "flags"):
            return value.split()
    return []


def main(folder: str, out: str) -> None:
    bundle = Bundle(
        folder=Path(folder), manifest=json.loads(Path(folder, "manifest.json").read_bytes()), manifest_sha256=""
    )
    artifact = open_artifact(bundle)
    logits = answer_goldens(artifact, bundle.goldens())
    about = {"runtime": artifact.runtime, "machine": platform.machine(), "features": features()}
    np.savez(out, logits=logits, about=np.array(json.dumps(about)))


if __name__ == "__main__":
    main(*sys.argv[1:])
