"""A toy in each format that people keep a Llama in, and what its weights then are; the table of README.md is of these.

What is written is laid out by the formats' own packages, or by the tests of each reader.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from targets import NAMES
from tests import coded
from tests.coded import Format, write_meta_coded
from tests.conftest import Toy
from tests.exporter.test_adapter import ALPHA, RANK, factors, shapes_of, write_adapter
from tests.exporter.test_checkpoint import pickled
from tests.exporter.test_gguf import factors_of, permuted, write_gguf
from tests.exporter.test_gguf_experts import UNTOLD, write_gguf_experts
from tests.exporter.test_gguf_tokenizer import llama3_fields
from tests.exporter.test_meta import write_meta
from tests.exporter.test_meta_experts import write_meta_experts
from tests.exporter.test_meta_vision import LAYERS, write_meta_vision

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
K, SHARED = "model.layers.1.self_attn.k_proj", "model.layers.3.feed_forward.shared_expert.down_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A checkpoint on disk."""

    path: Path
    weights: Mapping[str, Tensor]
    """What it means, by transformers' names."""
    adapter: Path | None = None


def is_llama4(toy: Toy) -> bool:
    return str(toy.model.config.model_type) == "llama4_text"


def sees_images(toy: Toy) -> bool:
    return str(toy.model.config.model_type) == "mllama"


def safetensors(toy: Toy) -> Written:
    return Written(path=toy.folder, weights=dict(toy.model.state_dict()))


def pickles(toy: Toy) -> Written:
    pickled(toy, shards=2)
    return Written(path=toy.folder, weights=dict(toy.model.state_dict()))


def metas(toy: Toy) -> Written:
    config = toy.model.config
    if is_llama4(toy):
        folder = write_meta_experts(toy, toy.folder.with_name("meta"))
        return Written(path=folder, weights=dict(toy.model.state_dict()))
    if sees_images(toy):
        folder = write_meta_vision(toy, toy.folder.with_name("meta"))
        return Written(path=folder, weights=dict(toy.model.state_dict()))
    rope = config.rope_parameters
    folder = write_meta(
        toy,
        toy.folder.with_name("meta"),
        shards=2,
        **{"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads},
        **{"n_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "vocab_size": config.vocab_size},
        **{"multiple_of": config.intermediate_size, "ffn_dim_multiplier": 0.1, "norm_eps": config.rms_norm_eps},
        **{"rope_theta": rope["rope_theta"], "use_scaled_rope": rope["rope_type"] == "llama3"},
        max_seq_len=config.max_position_embeddings,
    )
    for file in toy.folder.glob("tokenizer*.json"):
        shutil.copyfile(file, folder / file.name)
    return Written(path=folder, weights=dict(toy.model.state_dict()))


def ggufs(kind: Kind) -> Callable[[Toy], Written]:
    """Matrices of ``kind``, by gguf's own package, or ggml's quantizer where that has none."""

    def write(toy: Toy) -> Written:
        config, decoded = toy.model.config, {}

        quantize = quantize_chunk if kind is Kind.Q4_K else gguf.quantize
        if is_llama4(toy):
            file = toy.folder.with_name(f"toy-{kind.name}.gguf")
            return Written(path=file, weights=write_gguf_experts(file, toy, kind=kind, quantize=quantize))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, parameter in toy.model.named_parameters():
            weight = parameter.detach().numpy()
            if weight.ndim == 1:
                decoded[name] = parameter.detach()
                continue
            count = heads.get(name.split(".")[-2])
            meant = gguf.dequantize(quantize(permuted(weight, count) if count else weight, kind), kind)
            if count:  # rows of a head back in halves
                meant = meant.reshape(count, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            decoded[name] = torch.from_numpy(np.array(meant, dtype=np.float32))
        rope = config.rope_parameters
        extra = {}
        if rope["rope_type"] == "llama3":
            extra["rope_freqs.weight"] = factors_of(rope, head_dim=config.head_dim)
        file = toy.folder.with_name(f"toy-{kind.name}.gguf")
        fields = llama3_fields() if (toy.folder / "tokenizer.json").exists() else {}
        write_gguf(file, toy, kind=kind, fields=fields, quantize=quantize, extra=extra)
        return Written(path=file, weights=decoded)

    return write


def quantize_chunk(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """Blocks of ``kind``, uint8 ``[rows, bytes]``, as ggml quantizes a matrix [rows, columns]."""
    import xllamacpp

    assert xllamacpp.__file__
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows, columns = weight.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    source = np.ascontiguousarray(weight, dtype=np.float32)
    blocks = np.empty((rows, columns // block * size), dtype=np.uint8)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (source, blocks))
    shape = (ctypes.c_int64(count) for count in (0, rows, columns))
    written = library.ggml_quantize_chunk(ctypes.c_int(kind), *pointers, *shape, None)
    assert written == blocks.nbytes
    return blocks


def adapters(toy: Toy) -> Written:
    """A LoRA of PEFT beside its base."""
    weights = {name: weight.clone() for name, weight in toy.model.state_dict().items()}
    modules = (Q, K, SHARED) if is_llama4(toy) else (Q, DOWN)
    names = {module: module for module in modules}
    if sees_images(toy):  # whose layer 1 looks at images
        modules = (Q, "model.layers.2.mlp.down_proj")
        names = {module: module.replace("model.", "model.language_model.", 1) for module in modules}
    shapes = shapes_of(toy, *modules)
    tensors = factors({names[module]: shapes[module] for module in modules})
    for module in names.values():
        down, up = (tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
        weights[f"{module}.weight"] += ALPHA / RANK * up @ down
    return Written(path=toy.folder, weights=weights, adapter=write_adapter(toy.folder.with_name("lora"), tensors))


def quantized(form: Format) -> Callable[[Toy], Written]:
    """Codes in Hugging Face layout."""

    def write(toy: Toy) -> Written:
        folder = toy.folder.with_name("quantized")
        weights = form.write(folder, toy.folder)
        return Written(path=folder, weights={coded.in_memory(name): weight for name, weight in weights.items()})

    return write


def metas_codes(**settings: Any) -> Callable[[Toy], Written]:
    """Meta's own quantized releases."""

    def write(toy: Toy) -> Written:
        folder = toy.folder.with_name("meta")
        return Written(path=folder, weights=write_meta_coded(folder, toy.folder, **settings))

    return write


FORMATS: dict[str, Callable[[Toy], Written]] = {
    "safetensors": safetensors,
    "`.bin`": pickles,
    "Meta": metas,
    "GGUF F16": ggufs(Kind.F16),
    "GGUF Q4_0": ggufs(Kind.Q4_0),
    "GGUF Q8_0": ggufs(Kind.Q8_0),
    "GGUF Q4_K": ggufs(Kind.Q4_K),
    "LoRA": adapters,
    "GPTQ": quantized(coded.FORMATS["gptq"]),
    "GPTQ, zero points": quantized(coded.FORMATS["gptq with zero points"]),
    "GPTQ, `desc_act`": quantized(coded.SHUFFLED),
    "AWQ": quantized(coded.FORMATS["awq"]),
    "compressed-tensors int4": quantized(coded.FORMATS["packed"]),
    "compressed-tensors int8 by row": quantized(coded.FORMATS["int8 by row"]),
    "compressed-tensors int8 in groups": quantized(coded.FORMATS["int8 in groups"]),
    "SpinQuant": metas_codes(spinquant=True),
    "QLoRA": metas_codes(rank=4),
}
_METAS_CODES = ("SpinQuant", "QLoRA")

REFUSED = {
    **{(format, "executorch"): "XNNPACK has no zero points" for format in ("GPTQ, zero points", "AWQ")},
    **{(format, "gguf"): "Q4_0 and Q8_0 have no zero points" for format in ("GPTQ, zero points", "AWQ")},
    ("compressed-tensors int8 in groups", "executorch"): "XNNPACK takes int8 with a scale for each row alone",
    **{("GPTQ, `desc_act`", target): "desc_act" for target in NAMES},
    **{("SpinQuant", target): "turned by a Hadamard matrix" for target in NAMES},
    ("QLoRA", "gguf"): "it has no adapters beside the linears of a model",
}
"""What may be, by format and target, and what its sentence has to say. All of it goes there with ``--requantize``."""


def was_released(generation: str, format: str) -> bool:
    """Whether there may be such a thing: Meta's own quantized releases are of Llama 3.2 alone, and llama.cpp has no
    architecture of Llama 3.2 Vision."""
    if format in _METAS_CODES:
        return generation == "Llama 3.2"
    return not (format.startswith("GGUF") and generation == "Llama 3.2 Vision")


def toy_for(format: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of a toy, as that format can have it: params.json knows llama3's scaling by two of its sizes and one
    original length alone (``tests.exporter.test_meta.RELEASES``), and a block of K types is 256 columns."""
    changed = dict(config)
    if format == "Meta" and config["rope_parameters"]["rope_type"] == "llama3":
        factor = config["rope_parameters"]["factor"] if "num_local_experts" in config else 8.0
        rope = {"factor": factor, "original_max_position_embeddings": 8192}
        changed["rope_parameters"] = {**config["rope_parameters"], **rope}
        if "cross_attention_layers" in config:
            changed |= LAYERS
    if format in _METAS_CODES:
        changed["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        changed["intermediate_size"] = 128  # that Hadamard's rotation is of a power of two, as of the releases
    if format == "GGUF Q4_K":
        changed |= {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
        changed["initializer_range"] = 0.1  # of four times as many columns: logits of the other toys' size
    if format.startswith("GGUF") and "num_local_experts" in config:
        changed |= UNTOLD
        if not config["use_qk_norm"]:
            changed["num_local_experts"] = 128  # by which llama.cpp tells that there is none
        if format == "GGUF Q4_K":
            changed["intermediate_size_mlp"] = 256
    return changed
