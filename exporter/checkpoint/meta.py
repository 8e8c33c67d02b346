"""Meta's own release layout: ``params.json``, ``consolidated.NN.pth`` (a shard for each rank of model parallelism),
``tokenizer.model``. Shards are mapped, and merged when a tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint import llama4, meta_coded, meta_experts, meta_fusion, meta_vision, mllama
from exporter.checkpoint.config import IMAGE_TOKENS, OF_IMAGES_TAKEN, integer_of, number_of, read_json
from exporter.checkpoint.huggingface import map_pickle
from exporter.checkpoint.meta_tokenizer import LLAMA3_RANKS, LLAMA4_RANKS, TOKENIZER, TikToken, read_vocabulary
from exporter.checkpoint.tensors import LazyTensor, halves_of_heads, is_rotated, matched
from exporter.errors import InputError
from exporter.spec import EMBEDDING, FINAL_NORM, HEAD, ROUTER, AttentionSpec, ModelSpec, RopeKind, RopeSpec

DESCRIPTION = "params.json"

_NAMES = {"tok_embeddings.weight": EMBEDDING, "norm.weight": FINAL_NORM, "output.weight": HEAD}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_PASSED_OVER = "rope.freqs"
"""Follows from params.json."""
_COPIED = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
"""Where there are more shards than key-value heads, each head lies in several."""

_OF_POSITIONS = "positional_embedding"
"""In names of tables that every shard has whole."""

_FIELDS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier"),
    *("norm_eps", "rope_theta", "use_scaled_rope", "max_seq_len"),
    *meta_coded.FIELDS,
}
_WITHOUT_EFFECT = {"max_batch_size"}

_SCALED: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}
"""meta-llama/llama-models, models/llama3/model.py, ``apply_scaling``."""
_SCALED_FACTOR = 8.0
_SMALL_FACTOR = 32.0
_SMALL = {(2048, 128_256), (3072, 128_256)}
"""``dim`` and ``vocab_size`` of Llama 3.2 1B and 3B: their factor of RoPE and their tied head stand in config.json of
the releases in Hugging Face layout alone."""
_CHECK = "check params.json against the original model's"


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor of which each shard has a part, or a copy of one."""

    parts: tuple[LazyTensor, ...]
    """In the order of the shards."""
    shape: tuple[int, ...]
    axis: int
    """Of the parts, 0 or 1."""
    copies: int = 1
    """How many shards in a row hold the same part."""
    head_dim: int | None = None
    """Of the heads whose rows are to be turned: see ``halves_of_heads``."""

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file for part in self.parts for file in part.files)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def read(self) -> Tensor:
        """Whole: a view of the file where one shard has all of it and nothing is turned, else a copy."""
        self._check_copies()
        parts = [part.read() for part in self.parts[:: self.copies]]
        if self.head_dim:
            parts = [halves_of_heads(part.view(len(part), -1), self.head_dim) for part in parts]  # a bias is a column
            return torch.cat(parts, dim=3 if self.axis else 0).view(self.shape)  # from [heads, 2, head_dim/2, columns]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axis)

    def _check_copies(self) -> None:
        for first in range(0, len(self.parts) if self.copies > 1 else 0, self.copies):
            one, *others = self.parts[first : first + self.copies]
            for other in others:
                if not torch.equal(one.read(), other.read()):
                    raise InputError(
                        f"{one.files[0].name} and {other.files[0].name} differ in a key-value head that they share",
                        hint="copy the shards again, all of one model",
                    )


def is_meta(folder: Path) -> bool:
    """Whether a folder is in Meta's layout and not in Hugging Face's too."""
    return (folder / DESCRIPTION).exists() and not (folder / "config.json").exists()


def holds_codes(folder: Path) -> bool:
    """Whether ``params.json`` says that weights are quantized. Raises InputError."""
    path = folder / DESCRIPTION
    return meta_coded.read_quantization(path, read_json(path)) is not None


def read_spec(folder: Path, *, decoded: bool = False) -> ModelSpec:
    """The ModelSpec of ``params.json``; what it leaves out is told by tokenizer and first shard. ``decoded``: adapters
    are merged, as beside codes they cannot be. Raises InputError with the field, its value and what is known."""
    path = folder / DESCRIPTION
    params = {field: value for field, value in read_json(path).items() if value is not None}
    has_experts, sees = "moe_args" in params, meta_vision.COUNT in params
    fields = _FIELDS
    if has_experts or sees:
        fields = (_FIELDS | (meta_experts if has_experts else meta_vision).FIELDS) - {*meta_coded.FIELDS}
    unknown = sorted(field for field in params.keys() - fields - _WITHOUT_EFFECT if params[field] is not False)
    if unknown:
        raise InputError(
            f"{path}: {unknown[0]} is {params[unknown[0]]!r}; known: {', '.join(sorted(fields))}",
            hint="only Llamas are supported in Meta's layout, dense ones up to Llama 3, Llama 3.2 Vision and Llama 4",
        )
    dim, heads = integer_of(path, params, "dim"), integer_of(path, params, "n_heads")
    if "head_dim" not in params and dim % heads:
        raise InputError(
            f"{path}: dim ({dim}) is not divisible by n_heads ({heads}), there is no head_dim", hint=_CHECK
        )
    vocab_size = _vocab_size(folder, params, dim=dim)
    bos, eos = _special_tokens(folder, vocab_size)
    small = _scales_rope(path, params) and (dim, vocab_size) in _SMALL
    quantization = meta_coded.read_quantization(path, params)
    tied = small and quantization is None  # of codes the head has its own
    inside = _intermediate_size(path, params, dim=dim)
    images = meta_vision.images_of(path, params, _first_shard(folder) or {}, vocab_size=vocab_size) if sees else None
    layers = integer_of(path, params, "n_layers")
    try:
        return ModelSpec(
            name=folder.resolve().name,
            vocab_size=vocab_size,
            hidden_size=dim,
            intermediate_size=meta_experts.intermediate_size(path, params) if has_experts else inside,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=integer_of(path, {"n_kv_heads": heads, **params}, "n_kv_heads"),
            head_dim=integer_of(path, {"head_dim": dim // heads, **params}, "head_dim"),
            max_position_embeddings=_positions(path, params),
            rms_norm_eps=number_of(path, params, "norm_eps"),
            tie_word_embeddings=tied or not _has_head(folder),
            rope=_rope(path, params, factor=_SMALL_FACTOR if small else _SCALED_FACTOR),
            bos_token_id=bos,
            eos_token_ids=eos,
            attention=meta_experts.read_attention(path, params) if has_experts else AttentionSpec(),
            experts=meta_experts.read_experts(path, params, dense=inside) if has_experts else None,
            images=images,
            fusion=meta_fusion.fusion_of(path, params) if has_experts else None,
            layer_numbers=meta_vision.layer_numbers(images, layers=layers) if images else (),
            extra_embeddings=IMAGE_TOKENS if images else 0,
            adapter_rank=quantization.rank if quantization and not decoded else 0,
        )
    except (ValueError, OverflowError) as error:
        raise InputError(f"{path}: {error}", hint=_CHECK) from error


def leaves_out(folder: Path) -> str | None:
    """What of a model the spec knows nothing of, in a sentence."""
    reads = read_json(folder / DESCRIPTION).get(meta_fusion.ARGS) is not None
    return OF_IMAGES_TAKEN if reads or sees_images(folder) else None


def sees_images(folder: Path) -> bool:
    """Whether it is a Llama 3.2 Vision. Raises InputError."""
    return read_json(folder / DESCRIPTION).get(meta_vision.COUNT) is not None


def map_tensors(folder: Path, spec: ModelSpec) -> dict[str, LazyTensor]:
    """Every tensor that ``spec`` wants, in the order of rows that Hugging Face has. Raises InputError for shards that
    are missing, broken or of another model."""
    files = _shards(folder)
    if not files:
        raise InputError(f"{folder} has no consolidated.00.pth", hint="download the weights into this folder")
    shards = [map_pickle(file) for file in files]
    if spec.experts:
        shards = [meta_experts.apart(shard, spec) for shard in shards]
    if spec.layer_numbers:
        shards = [meta_vision.apart(shard, spec) for shard in shards]
    wanted = dict(spec.weights())
    wanted[EMBEDDING] = spec.vocab_size, spec.hidden_size
    wanted[HEAD] = wanted[EMBEDDING]  # a tied one may be stored again
    if spec.layer_numbers:
        wanted[meta_vision.LEARNABLE] = spec.extra_embeddings, spec.hidden_size
    if len(shards) == 1 and "output.weight" in shards[0]:
        wanted[HEAD] = shards[0]["output.weight"].shape  # it may be pruned
    found: dict[str, LazyTensor] = {}
    for stored in sorted(set().union(*shards) - {_PASSED_OVER}):
        absent = [file.name for file, shard in zip(files, shards, strict=True) if stored not in shard]
        if absent:
            raise InputError(
                f"{folder}: {stored} is missing in {', '.join(absent)}", hint="copy the shards again, all of one model"
            )
        name, parts = _renamed(stored), tuple(shard[stored] for shard in shards)
        shape = wanted.get(name)
        found[name] = _merged(stored, parts, name=name, shape=shape, spec=spec) if shape else parts[0]
    if spec.layer_numbers:
        found = _whole_embedding(found, spec)
        found = {name: mllama.in_order(name, tensor, spec) for name, tensor in found.items()}
    path = folder / DESCRIPTION
    quantization = meta_coded.read_quantization(path, read_json(path))
    if quantization:
        if len(files) > 1:
            raise InputError(f"{folder} has {len(files)} shards of codes, one was expected", hint=_CHECK)
        found = _with_codes(found, spec, quantization)
    return matched(found, spec, place=folder, described_by=DESCRIPTION)


def _whole_embedding(found: Mapping[str, LazyTensor], spec: ModelSpec) -> dict[str, LazyTensor]:
    """``found`` with the rows of tokens that are read and never written behind those of the vocabulary."""
    rest = dict(found)
    if EMBEDDING in rest and meta_vision.LEARNABLE in rest:
        parts = rest[EMBEDDING], rest.pop(meta_vision.LEARNABLE)
        rest[EMBEDDING] = MergedTensor(parts, (spec.num_embeddings, spec.hidden_size), axis=0)
    return rest


def _with_codes(
    found: Mapping[str, LazyTensor], spec: ModelSpec, quantization: meta_coded.MetaQuantization
) -> dict[str, LazyTensor]:
    """``found`` with codes and scales, and what an adapter adds, in place of the tensors that they lie in."""

    def turned(name: str, part: LazyTensor) -> LazyTensor:
        if not is_rotated(name, spec):
            return part
        return MergedTensor((part,), part.shape, axis=0, head_dim=spec.head_dim)

    rest = dict(found)
    for stored, scales in found.items():
        module, _, kind = stored.rpartition(".")
        name = _renamed(f"{module}.weight")
        if kind != "scales" or name not in found:
            continue
        del rest[stored]
        zeros = rest.pop(f"{module}.zeros", None)
        if zeros is not None and zeros.read().any():
            raise InputError(f"{zeros.files[0]}: {module} has zero points, none were expected", hint=_CHECK)
        rest[name] = meta_coded.coded_matrix(name, found[name], turned(name, scales), quantization)
        down, up = (rest.pop(f"{module}.adaptor.{factor}.weight", None) for factor in "AB")
        if down and up:
            merged = not spec.adapter_rank
            rest |= meta_coded.adapted(name, rest[name], down, turned(name, up), quantization, merged=merged)
    return rest


def _merged(
    stored: str, parts: tuple[LazyTensor, ...], *, name: str, shape: tuple[int, ...], spec: ModelSpec
) -> MergedTensor:
    """Along the axis by which the parts make up ``shape``: rows of all but ``wo`` and ``w2``, columns of these; of the
    embedding columns in Llama 1 and 2 (fairscale's ParallelEmbedding), rows in Llama 3 (its VocabParallelEmbedding)."""
    part, count = parts[0].shape, len(parts)
    head_dim = llama4.turned_heads(name, spec)
    if all(other.shape == part for other in parts) and len(part) == len(shape):
        if part == shape and (len(part) == 1 or name.endswith(ROUTER) or _OF_POSITIONS in name):
            return MergedTensor(parts[:1], shape, axis=0, head_dim=head_dim)
        whole_heads = not (head_dim and part[0] % head_dim)
        if name.endswith(".bias") and (part[0] * count,) == shape and whole_heads:  # of a matrix that is cut by rows
            return MergedTensor(parts, shape, axis=0, head_dim=head_dim)
        if len(part) == 2:
            rows, columns = part
            if (rows * count, columns) == shape and whole_heads:
                return MergedTensor(parts, shape, axis=0, head_dim=head_dim)
            if (rows, columns * count) == shape:
                return MergedTensor(parts, shape, axis=1, head_dim=head_dim)
            copies, rest = divmod(rows * count, shape[0])
            if name.endswith(_COPIED) and part == (spec.head_dim, shape[1]) and not rest:
                return MergedTensor(parts, shape, axis=0, copies=copies, head_dim=head_dim)
    shapes = " and ".join(str(list(each)) for each in sorted({each.shape for each in parts}))
    raise InputError(
        f"{parts[0].files[0].parent}: {stored} is {shapes} in {count} shard{'s' if count > 1 else ''}, "
        f"{DESCRIPTION} wants {list(shape)} in all, cut by rows or by columns",
        hint="check that every shard is there, and that params.json is of the same model",
    )


def _renamed(stored: str) -> str:
    """A name of Hugging Face's; one that is not known stays as it is."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", stored)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    return _NAMES.get(stored, stored)


def _shards(folder: Path) -> list[Path]:
    """None, all from 00 on, or one that has no number. Raises InputError where there is a gap."""
    files = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    count = int(files[-1].stem[-2:]) + 1 if files else 0
    absent = [name for index in range(count) if folder / (name := f"consolidated.{index:02}.pth") not in files]
    if absent:
        raise InputError(
            f"{folder} has {files[-1].name}, but {', '.join(absent)} is missing", hint="download the missing files"
        )
    only = folder / "consolidated.pth"
    return files or ([only] if only.exists() else [])


def _first_shard(folder: Path) -> dict[str, LazyTensor] | None:
    """Its text's tensors as other releases call them, those of images as they are called."""
    files = _shards(folder)
    if not files:
        return None
    return {name.removeprefix(meta_vision.TEXT): tensor for name, tensor in map_pickle(files[0]).items()}


def _has_head(folder: Path) -> bool:
    shard = _first_shard(folder)
    return shard is None or "output.weight" in shard


def _intermediate_size(path: Path, params: Mapping[str, Any], *, dim: int) -> int:
    """meta-llama/llama, llama/model.py, ``FeedForward``, whose ``hidden_dim`` comes in as 4 ``dim``."""
    hidden, multiple = int(2 * 4 * dim / 3), integer_of(path, params, "multiple_of")
    if "ffn_dim_multiplier" in params:
        hidden = int(number_of(path, params, "ffn_dim_multiplier") * hidden)
    return multiple * ((hidden + multiple - 1) // multiple)


def _scales_rope(path: Path, params: Mapping[str, Any]) -> bool:
    scaled = params.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise InputError(f"{path}: use_scaled_rope is {scaled!r}, true or false was expected", hint=_CHECK)
    return scaled


def _rope(path: Path, params: Mapping[str, Any], *, factor: float) -> RopeSpec:
    theta = _theta(path, params)
    if not _scales_rope(path, params):
        return RopeSpec(theta=theta)
    if "moe_args" in params:
        return meta_experts.read_rope(path, params, theta=theta)
    return RopeSpec(theta=theta, kind=RopeKind.LLAMA3, factor=factor, **_SCALED)


def _theta(path: Path, params: Mapping[str, Any]) -> float:
    return number_of(path, {"rope_theta": 10_000.0, **params}, "rope_theta")


def _positions(path: Path, params: Mapping[str, Any]) -> int:
    """``max_seq_len`` if it is there, as it is in no release; else what that generation was trained for.

    LLaMA 2048 (arXiv:2302.13971, told by its norm_eps of 1e-6, at 65B of 1e-5 by 80 layers without grouped queries),
    Llama 2 4096 (arXiv:2307.09288, table 1), Code Llama 16384 (arXiv:2308.12950, section 2.4), Llama 3 8192 and 3.1 on
    131072 (arXiv:2407.21783, sections 3.4.1 and 3.4.2).
    """
    if "max_seq_len" in params:
        return integer_of(path, params, "max_seq_len")
    if "moe_args" in params:
        return meta_experts.POSITIONS
    if _scales_rope(path, params):
        return 131_072
    theta = _theta(path, params)
    if theta == 10_000.0:
        ungrouped = params.get("n_kv_heads", params["n_heads"]) == params["n_heads"]
        first = params.get("norm_eps") == 1e-6 or (params.get("n_layers") == 80 and ungrouped)
        return 2048 if first else 4096
    known = {500_000.0: 8192, 1_000_000.0: 16_384}
    if theta not in known:
        raise InputError(
            f"{path}: rope_theta is {theta:g}, which tells of no number of positions; known: 10000, 500000, 1000000",
            hint="add max_seq_len, the positions that the model was trained for, to params.json",
        )
    return known[theta]


def _vocab_size(folder: Path, params: Mapping[str, Any], *, dim: int) -> int:
    """Of params.json, where it is not -1; else of the tokenizer, else of the embedding's shape."""
    path = folder / DESCRIPTION
    if params.get("vocab_size", -1) != -1:
        return integer_of(path, params, "vocab_size")
    if (folder / TOKENIZER).exists():
        return read_vocabulary(folder / TOKENIZER).size
    shard = _first_shard(folder)
    if not shard or "tok_embeddings.weight" not in shard:
        raise InputError(
            f"{path} has no vocab_size, and there is neither a {TOKENIZER} nor an embedding that tells it",
            hint=f"download {TOKENIZER} and consolidated.*.pth into this folder",
        )
    rows, columns = shard["tok_embeddings.weight"].shape
    return rows * len(_shards(folder)) if columns == dim else rows


def _special_tokens(folder: Path, vocab_size: int) -> tuple[int, tuple[int, ...]]:
    """The begin token and every stop token, which follow from the kind of tokenizer; without one, from the size."""
    if (folder / TOKENIZER).exists():
        vocabulary = read_vocabulary(folder / TOKENIZER)
    elif vocab_size >= LLAMA3_RANKS:
        vocabulary = TikToken(ranks={}, first_special=LLAMA4_RANKS if vocab_size >= LLAMA4_RANKS else LLAMA3_RANKS)
    else:
        return 1, (2,)
    return vocabulary.bos, tuple(token for token in vocabulary.eos if token < vocab_size)
