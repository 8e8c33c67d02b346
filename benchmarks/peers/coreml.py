"""The torch front end of ``ct.convert``, then coremltools' own compression to int4 in blocks of 32.

A few layers at a time: it is run on 1 and on 3 layers of the model, without a cache, and extrapolated line by line to
all of them, since the whole would need about 13 bytes of memory for each parameter.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import Memory
from benchmarks.peers import arguments, write_record

LAYERS = (1, 3)
LENGTH = 64


def main() -> None:
    args = arguments("coreml")
    config = json.loads((args.checkpoint / "config.json").read_text())
    measured = {layers: convert(config, layers, args.out) for layers in LAYERS}
    few, more = (measured[layers] for layers in LAYERS)
    left = (config["num_hidden_layers"] - LAYERS[1]) / (LAYERS[1] - LAYERS[0])
    record: dict[str, Any] = {name: more[name] + left * (more[name] - few[name]) for name in few}
    write_record(args.out, record | settings(args.scheme) | {"measured": measured})


def settings(scheme: str) -> dict[str, Any]:
    options = {"extrapolated": f"from {LAYERS[0]} and {LAYERS[1]} layers", "length": LENGTH, "cache": "none"}
    return {"version": f"coremltools {version('coremltools')}", "options": options}


class RMSNorm(nn.Module):
    """Written out: coremltools 9.0 does not take torch's own."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * self.weight


class Layer(nn.Module):
    """A decoder layer as its users write it for Core ML, over a fixed length and without a cache."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.width = config["hidden_size"], config["head_dim"]
        heads, shared = config["num_attention_heads"] * self.width, config["num_key_value_heads"] * self.width
        sizes = {"q": (hidden, heads), "k": (hidden, shared), "v": (hidden, shared), "o": (heads, hidden)}
        wide = config["intermediate_size"]
        sizes |= {"gate": (hidden, wide), "up": (hidden, wide), "down": (wide, hidden)}
        self.linears = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})
        self.norms = nn.ModuleList(RMSNorm(hidden) for _ in range(2))
        angles = torch.arange(LENGTH).unsqueeze(1) * 0.5 ** torch.arange(self.width // 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], dim=-1))
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=-1))
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -1e4).triu(1))
        self.repeats = heads // shared

    def forward(self, x: Tensor) -> Tensor:
        y, linears = self.norms[0](x), self.linears
        q, k, v = (linears[name](y).view(1, LENGTH, -1, self.width).transpose(1, 2) for name in "qkv")
        q, k = self._rotate(q), self._rotate(k)
        k, v = (t.repeat_interleave(self.repeats, dim=1) for t in (k, v))
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=self.get_buffer("mask"))
        x = x + linears["o"](context.transpose(1, 2).reshape(1, LENGTH, -1))
        y = self.norms[1](x)
        return x + linears["down"](F.silu(linears["gate"](y)) * linears["up"](y))

    def _rotate(self, x: Tensor) -> Tensor:
        swapped = torch.cat([x[..., self.width // 2 :], x[..., : self.width // 2]], dim=-1)
        return x * self.get_buffer("cos") + swapped * self.get_buffer("sin")


class Decoder(nn.Module):
    """ids [1, T] -> logits [1, T, V]; the head is tied."""

    def __init__(self, config: dict[str, Any], layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(layers))
        self.norm = RMSNorm(config["hidden_size"])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


def convert(config: dict[str, Any], layers: int, out: Path) -> dict[str, float]:
    """Seconds and peak memory of one conversion of random weights, and the bytes of its package."""
    import coremltools as ct
    from coremltools.optimize import coreml as compression

    began = time.perf_counter()
    with Memory() as memory:
        program = torch.export.export(
            Decoder(config, layers).eval(), (torch.zeros(1, LENGTH, dtype=torch.int64),), strict=False
        )
        converted = ct.convert(
            program.run_decompositions({}),
            minimum_deployment_target=ct.target.iOS18,
            skip_model_load=True,
            inputs=[ct.TensorType("ids", shape=(1, LENGTH), dtype=np.int32)],
        )
        how = compression.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32
        )
        compressed = compression.linear_quantize_weights(converted, compression.OptimizationConfig(global_config=how))
        package = out / f"{layers}-layers.mlpackage"
        compressed.save(str(package))
    return {
        "seconds": time.perf_counter() - began,
        "anonymous_bytes": memory.anonymous_bytes,
        "mapped_bytes": memory.mapped_bytes,
        "artifact_bytes": sum(path.stat().st_size for path in package.rglob("*") if path.is_file()),
    }


if __name__ == "__main__":
    main()
