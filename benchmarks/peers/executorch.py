"""ExecuTorch's ``export_llama``, from the wheel. It takes one file in Meta's layout, which is written first."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import CONTEXT, arguments, recorded
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.spec import EMBEDDING, FINAL_NORM, HEAD

_META_NAMES = {
    **{"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{kind}_proj": f"attention.w{kind}" for kind in "qkvo"},
    **{"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"},
}
EMBEDDING_BITS = {"ships": "4,32", "ours": "8,0"}
"""Bits and group size, 0 for one scale per row."""
_ENDS = {EMBEDDING: "tok_embeddings.weight", FINAL_NORM: "norm.weight", HEAD: "output.weight"}


def main() -> None:
    args = arguments("executorch")
    checkpoint = open_checkpoint(args.checkpoint)
    source = args.out / "meta"
    write_meta_layout(checkpoint, source)
    from executorch.examples.models.llama.export_llama_lib import export_llama
    from executorch.extension.llm.export.config import llm_config as config

    if args.scheme == "ours":
        quantize_head_to_int8()
    options = config.LlmConfig()
    options.base.model_class = config.ModelType.llama3_2
    options.base.checkpoint, options.base.params = str(source / "consolidated.pth"), str(source / "params.json")
    options.base.metadata = json.dumps({"get_bos_id": 0, "get_eos_ids": [1]})
    options.model.use_kv_cache = options.model.use_sdpa_with_kv_cache = True
    options.export.max_seq_length = options.export.max_context_length = CONTEXT
    options.export.output_name = str(args.out / "model.pte")
    options.quantization.qmode, options.quantization.group_size = "8da4w", 32
    options.quantization.embedding_quantize = EMBEDDING_BITS[args.scheme]
    options.backend.xnnpack.enabled = options.backend.xnnpack.extended_ops = True
    with recorded(args.out, settings=settings(args.scheme)):
        export_llama(options)
    (source / "consolidated.pth").unlink()


def settings(scheme: str) -> dict[str, Any]:
    told = {"qmode": "8da4w", "group_size": 32, "embedding_quantize": EMBEDDING_BITS[scheme]}
    told |= {"head": "int4 like the body" if scheme == "ships" else "int8 per row, by a filter of ours"}
    return {"version": f"executorch {version('executorch')}", "options": told}


def write_meta_layout(checkpoint: Checkpoint, folder: Path) -> None:
    """Names and params.json as Meta has them. Rows of q and k stay in Hugging Face's order: only speed is measured."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = checkpoint.spec
    tensors = {_meta_name(name): checkpoint.read(name) for name in spec.weights()}
    tensors.setdefault(_ENDS[HEAD], tensors[_ENDS[EMBEDDING]])
    torch.save(tensors, folder / "consolidated.pth")
    params = {
        **{"dim": spec.hidden_size, "n_layers": spec.num_hidden_layers, "n_heads": spec.num_attention_heads},
        **{"n_kv_heads": spec.num_key_value_heads, "vocab_size": spec.vocab_size, "norm_eps": spec.rms_norm_eps},
        **{"hidden_dim": spec.intermediate_size, "head_dim": spec.head_dim, "rope_theta": spec.rope.theta},
        **{"use_scaled_rope": True, "rope_scale_factor": int(spec.rope.factor)},
    }
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def _meta_name(name: str) -> str:
    if name in _ENDS:
        return _ENDS[name]
    _, layers, index, rest = name.removesuffix(".weight").split(".", 3)
    return f"{layers}.{index}.{_META_NAMES[rest]}.weight"


def quantize_head_to_int8() -> None:
    """export_llama gives all linears the same bits; let it pass over the head, which gets 8 bits before."""
    import torchao.quantization as torchao
    from torchao.quantization.granularity import PerAxis

    quantize = torchao.quantize_

    def quantize_but_head(model: Any, how: Any, filter_fn: Any) -> None:
        eight = torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
        quantize(model, eight, filter_fn=lambda _, name: name == "output")
        quantize(model, how, filter_fn=lambda module, name: name != "output" and filter_fn(module, name))

    torchao.quantize_ = quantize_but_head


if __name__ == "__main__":
    main()
