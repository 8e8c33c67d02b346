"""Runs a ``model.onnx`` by onnxruntime-web in headless Chromium, on WebAssembly or on WebGPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.spec import Artifact
from targets.base import BaseRunner
from targets.onnxruntime.chromium import SOFTWARE_GPU, Chromium

_PLACED = re.compile(r"[Nn]odes?(\(s\))? placed on \[(?P<provider>\w+)\]")
_NODE = re.compile(r"VerifyEachNodeIsAssignedToAnEp\] +(?P<op>\w+) \((?P<name>\S+)\)")


class BrowserRunner(BaseRunner):
    """One session in a worker of the browser, with one key-value cache that stays there.

    ``provider``: ``wasm`` or ``webgpu``; ``threads`` are WebAssembly's. ``model``: the serialized graph to run in place
    of the file's, on the weights beside it. ``verbose``: keep what the runtime says on loading (``placement``).
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        provider: str,
        threads: int,
        model: bytes | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(artifact)
        weights = external_data(artifact.path)
        files: dict[str, bytes | Path] = {"model": model if model is not None else artifact.path}
        if weights:
            files["data"] = weights
        self._browser = Chromium(files, flags=SOFTWARE_GPU if provider == "webgpu" else ())
        spec = artifact.spec
        asked = {
            "provider": provider,
            "threads": threads if provider == "wasm" else 1,
            "external": weights.name if weights else None,
            "verbose": verbose,
            "layers": spec.num_hidden_layers,
            "heads": spec.num_key_value_heads,
            "size": spec.head_dim,
        }
        try:
            self.told, _ = self._browser.ask({"load": asked})
        except BaseException:  # interrupted, too: nobody will call close
            self.close()
            raise
        self.load_s: float = self.told["load_s"]

    @property
    def gpu(self) -> dict[str, Any] | None:
        """What the browser tells of the GPU it runs on."""
        adapter: dict[str, Any] | None = self.told["adapter"]
        return adapter

    @property
    def placement(self) -> dict[str, list[str]]:
        """Op types of the nodes that run on each execution provider, as the runtime has told on loading; of a single
        provider it names none."""
        placed: dict[str, list[str]] = {}
        provider = ""
        for line in self.told["lines"]:
            if match := _PLACED.search(line):
                provider = match["provider"]
                placed[provider] = []
            elif match := _NODE.search(line):
                placed[provider].append(match["op"])
        return placed

    def feed(self, ids: Sequence[int]) -> Tensor:
        return self._call([list(ids)], ids)

    def feed_each(self, ids: Sequence[int]) -> Tensor:
        """In the browser, so that no step waits for the way there and back."""
        return self._call([[token] for token in ids], ids)

    def _call(self, calls: list[list[int]], ids: Sequence[int]) -> Tensor:
        self._check_feed(ids)
        told, content = self._browser.ask({"calls": calls, "position": self._position})
        self.steps_s = [milliseconds / 1000 for milliseconds in told["steps_ms"]]
        self._position += len(ids)
        return torch.frombuffer(bytearray(content), dtype=torch.float32).view(told["shape"])

    def close(self) -> None:
        self._browser.close()


def external_data(path: Path) -> Path | None:
    """The file beside ``path`` that holds its weights; None where they are inside."""
    beside = path.with_name(f"{path.name}.data")
    return beside if beside.exists() else None
