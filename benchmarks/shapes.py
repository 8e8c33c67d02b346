"""Random checkpoints with the exact shapes of released Llamas: what speed, size, memory and time can be measured on.

``python -m benchmarks.shapes 1b FOLDER`` writes one in Hugging Face layout, bf16, shard by shard, so that making one
takes no more memory than its largest tensor and a shard. Seeded, tensor by tensor: the same on every run.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from exporter.checkpoint import BUNDLED_MODEL
from exporter.checkpoint.config import read_spec

_LLAMA_3 = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 128256},
    **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072},
    **{
        "bos_token_id": 2040,
        "eos_token_id": [2041, 2044],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    },
}
_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE |= {"original_max_position_embeddings": 8192}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        **{**_LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True},
        "rope_scaling": {**_ROPE, "factor": 32.0},
    },
    "3b": {
        **{**_LLAMA_3, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
        **{"num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True},
        "rope_scaling": {**_ROPE, "factor": 32.0},
    },
    "8b": {
        **{**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "head_dim": 128, "tie_word_embeddings": False},
        "rope_scaling": {**_ROPE, "factor": 8.0},
    },
}
"""The figures of the config.json of Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B, but for the special tokens, which are
those of the bundled tokenizer."""

SHARD_BYTES = 1 << 30


def write_random(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint for ``config`` in ``folder``, with the bundled model's tokenizer: its tokens are the first ones of
    the vocabulary. Matrices are normal with a deviation of 0.02, norms are one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_MODEL / name, folder / name)
    index: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = 0

    def close_shard() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for seed, (name, shape) in enumerate(read_spec(folder).weights().items()):
        size = 2 * math.prod(shape)
        if shard and sum(tensor.nbytes for tensor in shard.values()) + size > SHARD_BYTES:
            close_shard()
        shard[name] = random_weight(shape, seed=seed)
        total += size
    close_shard()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1) + "\n"
    )


def random_weight(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """bf16"""
    weight = torch.ones(shape, dtype=torch.bfloat16)
    if len(shape) == 2:
        generator = torch.Generator().manual_seed(seed)
        for rows in weight.split(max(1, (1 << 24) // shape[1])):
            rows.copy_(torch.randn(rows.shape, generator=generator).mul_(0.02))
    return weight


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__)
    parser.add_argument("size", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    write_random(SHAPES[args.size], args.folder)


if __name__ == "__main__":
    main()
