"""What passing over experts is worth: tokens per second of one model, each expert computed for its own tokens or all of
them for every token. ``python -m benchmarks.experts``; the figures are in docs/decisions/0017-experts.md."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import targets
from calibration.layers import quantize
from exporter.checkpoint import open_checkpoint
from exporter.latency import measure_latency
from exporter.model.graph import Node
from exporter.model.trace import trace
from exporter.spec import Logits, Method, Plan, Precision, Recipe, Sampling, WeightScheme

INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
CONTEXT = 512


def write_model(folder: Path, *, experts: int) -> None:
    """Random: 4 layers of 512 channels, every second one without positions, each with so many experts of 1024."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    config = Llama4TextConfig(
        **{"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024, "intermediate_size_mlp": 1024},
        **{"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
        **{"num_local_experts": experts, "no_rope_layer_interval": 2, "max_position_embeddings": CONTEXT},
        **{"initializer_range": 0.03, "attention_chunk_size": 128, "bos_token_id": 1, "eos_token_id": 2},
    )
    Llama4ForCausalLM(config).save_pretrained(folder)


def measure(label: str, folder: Path, *, whole: bool) -> Mapping[str, Any]:
    """``whole``: experts are passed over as the target does it; else every one is computed."""
    checkpoint = open_checkpoint(folder)
    store, _ = quantize(checkpoint, INT4, root=folder)
    plan = Plan(
        checkpoint=folder,
        targets=(label,),
        scheme=INT4,
        context=CONTEXT,
        logits=Logits.LAST,
        recipe=Recipe(method=Method.ROUND),
        sampling=Sampling(),
        out=folder,
        store=folder,
        evaluation_text=None,
        threads=1,
    )
    target = targets.load(label)
    with tempfile.TemporaryDirectory() as out:
        with nullcontext() if whole else patch("exporter.model.graph._experts_whole", _node_by_node):
            artifact = target.lower(trace(checkpoint.spec), store, plan, Path(out))
        with target.open(artifact, threads=1) as runner:
            return measure_latency(runner, range(3, 403), context=CONTEXT, threads=1).figures


def _node_by_node(nodes: Sequence[Node]) -> list[tuple[Node, ...]]:
    return [(node,) for node in nodes]


def main() -> None:
    for experts in (4, 16):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder, experts=experts)
            for label in ("onnxruntime", "executorch"):
                for whole in (True, False):
                    figures = measure(label, folder, whole=whole)
                    rates = (f"{kind} {figures[f'{kind}_tokens_per_s']:.0f}/s" for kind in ("prefill", "decode"))
                    print(label, experts, "own tokens" if whole else "every token", *rates, flush=True)


if __name__ == "__main__":
    main()
