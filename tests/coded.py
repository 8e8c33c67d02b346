"""Quantized checkpoints, written by the layout of each format: the codes are chosen and packed here, with nothing of
what reads them.

What is written as ``pack-quantized`` and ``int-quantized`` is what compressed-tensors 0.20.0 writes and decompresses to
the same bits, of these kinds and of bfloat16 scales. Hadamard matrices are scipy's, of one order with ExecuTorch's
``llama::fast_hadamard_transform``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_PLAIN = "vision_model."
"""How names of linears begin that are left as they are, as those who quantize Llama 3.2 Vision leave them."""
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Coded:
    """Unsigned codes [N, K], float16 scales and unsigned zero points [N, G], and the group of each column [K]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    bits: int

    def values(self) -> Tensor:
        """float32 [N, K]: what a matrix of these codes is, by the definition that all formats share."""
        return (self.codes - self.zeros[:, self.groups]).float() * self.scales[:, self.groups].float()


def choose(weight: Tensor, *, bits: int, group: int, symmetric: bool, order: Tensor | None = None) -> Coded:
    """Rounded to nearest; ``order`` is a permutation by which columns are put into groups."""
    rows, columns = weight.shape
    group = columns if group == -1 else group
    highest = 2**bits - 1
    order = torch.arange(columns) if order is None else order
    blocks = weight.float()[:, order].view(rows, -1, group)
    if symmetric:
        middle = 2 ** (bits - 1)
        scales = (blocks.abs().amax(dim=2) / (middle - 1)).half()
        zeros = torch.full(scales.shape, middle, dtype=torch.int32)
    else:
        lowest, largest = blocks.amin(dim=2).clamp(max=0), blocks.amax(dim=2).clamp(min=0)
        scales = ((largest - lowest) / highest).half()
        zeros = (-lowest / scales.float()).round().clamp(1, highest).int()
    groups = torch.empty(columns, dtype=torch.int64)
    groups[order] = torch.arange(columns) // group
    codes = ((weight.float() / scales[:, groups].float()).round() + zeros[:, groups]).clamp(0, highest).int()
    return Coded(codes=codes, scales=scales, zeros=zeros, groups=groups, bits=bits)


def pack(codes: Tensor, *, bits: int, axis: int, order: list[int] | None = None) -> Tensor:
    """Unsigned int32 codes -> int32 words along ``axis``, the lowest bits first; ``order`` says which of a word's
    columns each of its fields holds."""
    each = 32 // bits
    fields = codes.movedim(axis, -1).unflatten(-1, (-1, each)).long()
    fields = fields[..., order] if order else fields
    words = sum(fields[..., index] << (bits * index) for index in range(each))
    assert isinstance(words, Tensor)
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).movedim(-1, axis).contiguous()


def as_gptq(coded: Coded, *, version: int = 1) -> dict[str, Tensor]:
    """AutoGPTQ's QuantLinear: everything transposed, zero points less one in the first version of the format."""
    zeros = coded.zeros - 1 if version == 1 else coded.zeros
    return {
        "qweight": pack(coded.codes.T, bits=coded.bits, axis=0),
        "qzeros": pack(zeros.T, bits=coded.bits, axis=1),
        "scales": coded.scales.T.contiguous(),
        "g_idx": coded.groups.int(),
    }


def as_awq(coded: Coded) -> dict[str, Tensor]:
    """AutoAWQ's WQLinear_GEMM."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        "qweight": pack(coded.codes.T, bits=4, axis=1, order=order),
        "qzeros": pack(coded.zeros.T, bits=4, axis=1, order=order),
        "scales": coded.scales.T.contiguous(),
    }


def as_packed(coded: Coded) -> dict[str, Tensor]:
    """compressed-tensors' ``pack-quantized``: rows as they are, zero points packed along the rows."""
    middle = 2 ** (coded.bits - 1)
    found = {
        "weight_packed": pack(coded.codes, bits=coded.bits, axis=1),
        "weight_scale": coded.scales,
        "weight_shape": torch.tensor(coded.codes.shape),
    }
    if (coded.zeros != middle).any():
        found["weight_zero_point"] = pack(coded.zeros, bits=coded.bits, axis=0)
    return found


def as_int8(coded: Coded) -> dict[str, Tensor]:
    """compressed-tensors' ``int-quantized``: signed codes, nothing packed."""
    found = {"weight": (coded.codes - 128).to(torch.int8), "weight_scale": coded.scales}
    if (coded.zeros != 128).any():
        found["weight_zero_point"] = (coded.zeros - 128).to(torch.int8)
    return found


GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
INT8 = {**PACKED, "format": "int-quantized"}


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write a checkpoint, and what its codes are."""

    config: Mapping[str, Any]
    stored: Callable[[Coded], dict[str, Tensor]]
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    shuffled: bool = False

    def write(self, folder: Path, source: Path) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)

        def choice(_: str, weight: Tensor) -> Coded:
            order = torch.randperm(weight.shape[1], generator=generator) if self.shuffled else None
            return choose(weight, bits=self.bits, group=self.group, symmetric=self.symmetric, order=order)

        return write_coded(folder, source, self.config, choice=choice, stored=self.stored)


FORMATS = {
    "gptq": Format(config=GPTQ, stored=as_gptq),
    "gptq v2": Format(
        config={**GPTQ, "checkpoint_format": "gptq_v2"}, stored=lambda coded: as_gptq(coded, version=2), group=16
    ),
    "gptq by row": Format(config={**GPTQ, "group_size": -1}, stored=as_gptq, group=-1),
    "gptq with zero points": Format(config={**GPTQ, "sym": False}, stored=as_gptq, symmetric=False),
    "gptq of 8 bits": Format(config={**GPTQ, "bits": 8, "sym": False}, stored=as_gptq, bits=8, symmetric=False),
    "awq": Format(config=AWQ, stored=as_awq, symmetric=False),
    "packed": Format(config=PACKED, stored=as_packed),
    "packed with zero points": Format(config=PACKED, stored=as_packed, symmetric=False),
    "packed by row": Format(config=PACKED, stored=as_packed, group=-1),
    "int8 by row": Format(config=INT8, stored=as_int8, bits=8, group=-1),
    "int8 in groups": Format(config=INT8, stored=as_int8, bits=8),
    "int8 by row with zero points": Format(config=INT8, stored=as_int8, bits=8, group=-1, symmetric=False),
}
SHUFFLED = Format(config={**GPTQ, "desc_act": True}, stored=as_gptq, shuffled=True)


def write_coded(
    folder: Path,
    source: Path,
    quantization: Mapping[str, Any],
    *,
    choice: Callable[[str, Tensor], Coded],
    stored: Callable[[Coded], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The checkpoint in ``source`` with every linear of its decoder as codes. Gives what each weight then is."""
    folder.mkdir(parents=True)
    for name in _TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    written, meant = dict[str, Tensor](), dict[str, Tensor]()
    for name, weight in unstacked(load_file(source / "model.safetensors")).items():
        module = name.removesuffix(".weight")
        if module.endswith(_LINEAR) and not module.startswith(_PLAIN):
            coded = choice(name, weight)
            meant[name] = coded.values()
            written |= {f"{module}.{part}": tensor for part, tensor in stored(coded).items()}
        else:
            written[name] = weight.half() if weight.dim() == 2 else weight
            meant[name] = written[name].float()
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    return stacked(meant)


def in_memory(stored: str) -> str:
    """What transformers calls a tensor of Llama 3.2 Vision that lies in a file under ``stored``."""
    for prefix, name in (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")):
        if stored.startswith(prefix):
            return name + stored.removeprefix(prefix)
    return f"model.{stored}" if stored.startswith(("vision_model.", "multi_modal_projector.")) else stored


def unstacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts of a Llama 4 one by one, as llm-compressor has them (``SequentialLlama4TextExperts``)."""
    found = {}
    for name, weight in weights.items():
        place, _, kind = name.rpartition(".")
        if not place.endswith(".experts"):
            found[name] = weight
            continue
        for expert, matrix in enumerate(weight):
            parts = {"gate_proj": 0, "up_proj": 1} if kind == "gate_up_proj" else {"down_proj": 0}
            for part, index in parts.items():
                found[f"{place}.{expert}.{part}.weight"] = matrix.chunk(len(parts), dim=1)[index].T.contiguous()
    return found


def stacked(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round, so that transformers takes them."""
    found, experts = {}, dict[str, list[dict[str, Tensor]]]()
    for name, weight in weights.items():
        place, _, rest = name.partition(".experts.")
        if not rest:
            found[name] = weight
            continue
        number, part, _ = rest.split(".")
        every = experts.setdefault(f"{place}.experts", [])
        every.extend({} for _ in range(int(number) + 1 - len(every)))
        every[int(number)][part] = weight.T
    for place, every in experts.items():
        gates = [torch.cat([one["gate_proj"], one["up_proj"]], dim=1) for one in every]
        found |= {f"{place}.gate_up_proj": torch.stack(gates)}
        found |= {f"{place}.down_proj": torch.stack([one["down_proj"] for one in every])}
    return found


META_WORDS = {
    "model.": "",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}
LORA_SCALE = 2.0


def in_pairs(rows: Tensor, *, head_dim: int) -> Tensor:
    """Rows of each head in the order 0, half, 1, half + 1, ...: Meta's RoPE turns neighbours."""
    order = [row for pair in range(head_dim // 2) for row in (pair, pair + head_dim // 2)]
    return torch.cat([head[order] for head in rows.split(head_dim)])


def write_meta_coded(
    folder: Path,
    source: Path,
    *,
    rank: int = 0,
    spinquant: bool = False,
    group: int = 32,
) -> dict[str, Tensor]:
    """The checkpoint in ``source``, of Hugging Face, as Meta released Llama 3.2 1B with SpinQuant, or with QLoRA of
    ``rank``: int4 in groups for linears, int8 by row for embedding and head, scales and adapters bfloat16. Gives what
    each weight then is, adapters merged and rotations undone."""
    from scipy.linalg import hadamard

    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    for name in _TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    args = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": group, "spinquant": spinquant}
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "multiple_of": config["intermediate_size"],
        "ffn_dim_multiplier": 0.1,
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": 10000.0,
        "max_seq_len": 512,
        "quantization_args": args,
        **({"lora_args": {"rank": rank, "scale": LORA_SCALE}} if rank else {}),
    }
    (folder / "params.json").write_text(json.dumps(params))
    weights = dict(load_file(source / "model.safetensors"))
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    generator = torch.Generator().manual_seed(3)
    written, meant = {}, {}
    for name, weight in weights.items():
        if weight.dim() == 1:
            stored = meant[name] = weight.float()
            written[meta_name(name)] = stored
            continue
        ends = not name.removesuffix(".weight").endswith(_LINEAR)
        turn = torch.tensor(hadamard(weight.shape[1]) / weight.shape[1] ** 0.5).float() if spinquant else None
        rotated = name.endswith("down_proj.weight") and turn is not None
        target = weight.float() @ turn if rotated and turn is not None else weight.float()
        blocks = target.view(len(target), -1, target.shape[1] if ends else group)
        highest = 127 if ends else 7
        scales = (blocks.abs().amax(dim=2) / highest).bfloat16()
        codes = (blocks / scales.float()[..., None]).round().clamp(-highest - 1, highest)
        values = (codes * scales.float()[..., None]).view(target.shape)
        codes = codes.view(target.shape).to(torch.int8)
        meant[name] = values @ turn if rotated and turn is not None else values
        pairs = name.endswith(("q_proj.weight", "k_proj.weight"))

        def turned(rows: Tensor, *, pairs: bool = pairs) -> Tensor:
            return in_pairs(rows, head_dim=config["head_dim"]) if pairs else rows

        module = meta_name(name).removesuffix(".weight")
        written |= {f"{module}.weight": turned(codes), f"{module}.scales": turned(scales)}
        if rank and not ends:
            down = torch.randn(rank, weight.shape[1], generator=generator).mul_(0.02).bfloat16()
            up = torch.randn(len(weight), rank, generator=generator).mul_(0.02).bfloat16()
            written |= {f"{module}.adaptor.A.weight": down, f"{module}.adaptor.B.weight": turned(up)}
            meant[name] = meant[name] + LORA_SCALE * (up.float() @ down.float())
    torch.save(written, folder / "consolidated.00.pth")
    return meant


def meta_name(name: str) -> str:
    for ours, theirs in META_WORDS.items():
        name = name.replace(ours, theirs)
    return name
