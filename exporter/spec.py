"""The nouns that travel between the stages: frozen, checked when made, free of torch so that ``--help`` is quick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
LAYERS = "model.layers."
VISION = ("vision_model.", "multi_modal_projector.")
"""How the names of all that turns an image into states begin."""
EXPERTS = ".feed_forward.experts."
"""In the names of the matrices of experts."""
ROUTER = ".feed_forward.router.weight"
"""How the name of a matrix ends that chooses experts. It has a row for each, next to nothing, and a choice that falls
otherwise changes all that follows."""

MOST = 1024
"""Layers, experts of a layer or tiles of an image at the most, eight times what any Llama has: a number beyond it is
damage, and would be counted to for ever."""

LARGE_PARAMETERS = 500_000_000
"""About as many as are kept in float32 between calls (``exporter.model.reference.KEEP_BYTES``); of a larger model each
call decodes weights anew, seconds for each billion of them (``docs/decisions/0008-proofs-at-size.md``)."""


class RopeKind(StrEnum):
    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    FACTORS = "factors"
    """Each frequency divided by a factor of its own, as GGUF files have llama3's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and how its frequencies are stretched."""

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: float = 0.0
    factors: tuple[float, ...] = ()
    """Of kind ``factors``: head_dim / 2 of them."""

    def __post_init__(self) -> None:
        if bool(self.factors) != (self.kind is RopeKind.FACTORS):
            raise ValueError(f"RoPE of kind {self.kind} has {len(self.factors)} factors")
        if not all(math.isfinite(factor) and factor > 0 for factor in self.factors):
            raise ValueError("RoPE has a factor that is no positive number")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """How attention differs from layer to layer; as it stands, not at all."""

    attention_chunk_size: int = 0
    """Positions of a chunk: a query of a chunked layer sees the keys of its own only. 0: none is chunked."""
    chunked_layers: tuple[int, ...] = ()
    unrotated_layers: tuple[int, ...] = ()
    """Without positions (NoPE)."""
    use_qk_norm: bool = False
    """Whether rotated queries and keys are divided by their root mean square."""
    floor_scale: int = 0
    """Positions for which queries of unrotated layers are of one temperature; 0: of all."""
    attn_scale: float = 0.0
    """How far it rises: times 1 + attn_scale * log(1 + floor((position + 1) / floor_scale)) (Nakanishi 2025,
    arXiv:2501.19399, as Llama 4 has it)."""

    def __post_init__(self) -> None:
        if self.chunked_layers and self.attention_chunk_size < 1:
            raise ValueError(f"attention_chunk_size is {self.attention_chunk_size!r}, a positive integer was expected")

    def chunk(self, layer: int) -> int:
        """Positions of a chunk of ``layer``; 0: it sees all."""
        return self.attention_chunk_size if layer in self.chunked_layers else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """Layers in which a router gives each token to a few of many MLPs, beside one that all tokens pass. ``ModelSpec``'s
    ``intermediate_size`` is that of each expert."""

    num_local_experts: int
    num_experts_per_tok: int
    moe_layers: tuple[int, ...]
    """Those that have experts."""
    intermediate_size_mlp: int
    """Of the layers that have none."""

    def __post_init__(self) -> None:
        if self.num_local_experts > MOST:
            raise ValueError(f"num_local_experts is {self.num_local_experts}, {MOST} at most was expected")
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, 1 to num_local_experts "
                f"({self.num_local_experts}) were expected"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """How a decoder looks at images (Llama 3.2 Vision): a vision transformer over tiles gives states, of which layers
    of their own between the decoder's take keys and values. Fields have the names of ``vision_config``, but for the
    first two."""

    cross_attention_layers: tuple[int, ...]
    """Their numbers in the checkpoint, which counts them among the decoder's."""
    image_token_id: int
    """The token that stands for an image in a text."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_global_layers: int
    attention_heads: int
    num_channels: int
    image_size: int
    """Pixels of a side of a tile."""
    patch_size: int
    norm_eps: float
    max_num_tiles: int
    intermediate_layers_indices: tuple[int, ...]
    """Layers of which the states that they read are given besides those behind the last."""
    supported_aspect_ratios: tuple[tuple[int, int], ...]
    """Tiles one above the other and side by side, in the order of their ids, from 1 on."""

    def __post_init__(self) -> None:
        _check_divisible(self, "hidden_size", "attention_heads")
        _check_divisible(self, "image_size", "patch_size")
        if any(high * wide > self.max_num_tiles for high, wide in self.supported_aspect_ratios):
            raise ValueError(f"max_num_tiles is {self.max_num_tiles}, too few for supported_aspect_ratios")

    @property
    def tile_states(self) -> int:
        """What a tile gives: a state for each patch, and one for the tile."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def output_size(self) -> int:
        """Channels of a state (``vision_output_dim``)."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    @property
    def tiles_at_once(self) -> int:
        """Tiles that the vision graph reads in a call."""
        return self.max_num_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionSpec:
    """How a decoder reads images (Llama 4): a vision transformer turns each tile, by itself, into states that stand in
    the place of tokens, beside the embeddings of others. Fields have the names of ``vision_config``, but for
    ``image_token_id`` and ``shuffle_step``."""

    image_token_id: int
    """The token in whose place a state stands."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    """Pixels of a side of a tile."""
    patch_size: int
    rope_theta: float
    shuffle_step: int
    """Patches of a side of the square that becomes one state: 1 / ``pixel_shuffle_ratio``."""
    projector_output_dim: int

    def __post_init__(self) -> None:
        _check_divisible(self, "hidden_size", "num_attention_heads")
        _check_divisible(self, "image_size", "patch_size")
        if self.head_dim % 4:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) of the vision_config gives each of {self.num_attention_heads} heads "
                f"{self.head_dim} channels, a multiple of 4 was expected: half of their pairs turn by row and by column"
            )
        if self.side % self.shuffle_step:
            raise ValueError(
                f"a tile of the vision_config has {self.side} patches a side, which pixel_shuffle_ratio "
                f"(1/{self.shuffle_step}) does not divide"
            )
        if self.intermediate_size != self.hidden_size * self.shuffle_step**2:
            raise ValueError(
                f"intermediate_size of the vision_config is {self.intermediate_size}, "
                f"{self.hidden_size * self.shuffle_step**2} was expected: the channels of a square of patches"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def side(self) -> int:
        """Patches of a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tile_states(self) -> int:
        """What a tile gives: a state for each square of patches."""
        return (self.side // self.shuffle_step) ** 2

    @property
    def tiles_at_once(self) -> int:
        """Tiles that the vision graph reads in a call: no tile looks at another."""
        return 1


def _check_divisible(part: object, over: str, under: str) -> None:
    if getattr(part, over) % getattr(part, under):
        raise ValueError(
            f"{over} ({getattr(part, over)}) of the vision_config must be divisible by {under} ({getattr(part, under)})"
        )


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A Llama decoder: every figure that its graph depends on, under its ``config.json`` name."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeSpec
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer, the first of them the main one."""
    attention: AttentionSpec = AttentionSpec()
    experts: ExpertSpec | None = None
    """None: of a dense model."""
    images: ImageSpec | None = None
    """Of layers that look at images; None: there are none."""
    fusion: FusionSpec | None = None
    """Of states of images in the place of tokens; None: there are none."""
    layer_numbers: tuple[int, ...] = ()
    """Of the decoder's layers in the checkpoint, by which weights are named, where it counts others among them; empty
    where they are 0, 1, 2, ..."""
    extra_embeddings: int = 0
    """Rows of the embedding behind the vocabulary: tokens that are read and never written."""
    adapter_rank: int = 0
    """Of the adapter beside each linear of the layers, B A x with A of so many rows; 0: there is none."""
    head_tokens: tuple[int, ...] = ()
    """Of a pruned head (Fedorov et al. 2024, arXiv:2411.17713): the token of each of its rows; none: a row for every
    token of the vocabulary. Such a head is never tied."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} is {size!r}, a positive integer was expected")
        if self.num_hidden_layers > MOST:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}, {MOST} at most was expected")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embedding turns pairs of channels")
        self._check_head_tokens()
        if self.rope.factors and len(self.rope.factors) != self.head_dim // 2:
            raise ValueError(
                f"RoPE has {len(self.rope.factors)} factors, half of head_dim ({self.head_dim}) was expected"
            )

        if self.layer_numbers and len(self.layer_numbers) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_numbers)} of {self.num_hidden_layers} layers have a number")
        if self.fusion and self.fusion.image_token_id >= self.num_embeddings:
            raise ValueError(
                f"image_token_index is {self.fusion.image_token_id}, a token below {self.num_embeddings} was expected"
            )
        if self.tie_word_embeddings and self.extra_embeddings:
            raise ValueError(
                f"tie_word_embeddings is true, but the embedding has {self.extra_embeddings} rows that a head has not"
            )

    def text_alone(self) -> ModelSpec:
        """The same model for one who shows it no image: layers that look at one are passed over, as transformers does
        without ``pixel_values``."""
        return replace(self, images=None, fusion=None)

    @property
    def vision(self) -> ImageSpec | FusionSpec | None:
        """What it sees images with, in whichever way; None: it sees none."""
        return self.images or self.fusion

    def without_extra_embeddings(self) -> ModelSpec:
        """The same model for one who reads no token that it does not write."""
        return replace(self, extra_embeddings=0)

    @property
    def num_embeddings(self) -> int:
        """Tokens that can be read."""
        return self.vocab_size + self.extra_embeddings

    def layer_name(self, layer: int) -> str:
        """How the names of the weights of a decoder layer begin, up to the dot."""
        return f"{LAYERS}{self.layer_numbers[layer] if self.layer_numbers else layer}"

    def layer_of(self, name: str) -> int | None:
        """The decoder layer that has the weight called ``name``; None for any other."""
        if not name.startswith(LAYERS):
            return None
        number = int(name.removeprefix(LAYERS).partition(".")[0])
        if not self.layer_numbers:
            return number
        return self.layer_numbers.index(number) if number in self.layer_numbers else None

    def _check_head_tokens(self) -> None:
        if self.head_tokens and self.tie_word_embeddings:
            raise ValueError("a head of some tokens has rows of its own, but tie_word_embeddings is true")
        if len(set(self.head_tokens)) < len(self.head_tokens):
            twice = next(token for token in self.head_tokens if self.head_tokens.count(token) > 1)
            raise ValueError(f"head token {twice} is named twice")
        for token in self.head_tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"head token {token} is outside the vocabulary of {self.vocab_size}")
        if self.head_tokens and self.eos_token_ids and not set(self.head_tokens) & set(self.eos_token_ids):
            stops = ", ".join(map(str, self.eos_token_ids))
            raise ValueError(f"no head token ends an answer, one of {stops} was expected")

    def weights(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every stored tensor, in the order of the model; a tied head is not one of them."""
        return _weights(self)

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer in self.experts.moe_layers

    def share(self, name: str) -> float:
        """Of tokens that meet the weight ``name``, where those of a text come to all experts alike."""
        if self.experts is None or EXPERTS not in name:
            return 1.0
        return self.experts.num_experts_per_tok / self.experts.num_local_experts

    @property
    def widest_mlp(self) -> int:
        """Channels inside of the widest MLP."""
        return max(self.intermediate_size, self.experts.intermediate_size_mlp if self.experts else 0)

    def stored_name(self, name: str) -> str:
        """The tensor that holds weight ``name``: a tied head lies in the embedding."""
        return EMBEDDING if name == HEAD and self.tie_word_embeddings else name

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.weights().values())

    @property
    def is_large(self) -> bool:
        """Whether proofs take less of what costs a pass over all weights for each token: see ``LARGE_PARAMETERS``."""
        return self.parameters > LARGE_PARAMETERS


@cache
def _weights(spec: ModelSpec) -> Mapping[str, tuple[int, ...]]:
    """Of 128 experts in each of 24 layers there are 9,500."""
    hidden, heads, kv_heads = spec.hidden_size, spec.num_attention_heads, spec.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.num_embeddings, hidden)}
    for index in range(spec.num_hidden_layers):
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (heads * spec.head_dim, hidden),
            "self_attn.k_proj": (kv_heads * spec.head_dim, hidden),
            "self_attn.v_proj": (kv_heads * spec.head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * spec.head_dim),
            "post_attention_layernorm": (hidden,),
            **_mlps(spec, index),
        }
        if rank := spec.adapter_rank:
            for name, shape in list(layer.items()):
                if len(shape) == 2:
                    layer |= {f"{name}.lora_A": (rank, shape[1]), f"{name}.lora_B": (shape[0], rank)}
        shapes |= {f"{spec.layer_name(index)}.{name}.weight": shape for name, shape in layer.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not spec.tie_word_embeddings:
        shapes[HEAD] = (len(spec.head_tokens) or spec.vocab_size, hidden)
    if spec.images:
        shapes |= _cross_attention(spec, spec.images) | _vision(spec.images, hidden=hidden)
    if spec.fusion:
        shapes |= _fusion(spec.fusion, hidden=hidden)
    return MappingProxyType(shapes)


def _cross_attention(spec: ModelSpec, images: ImageSpec) -> dict[str, tuple[int, ...]]:
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    layer = {
        "input_layernorm.weight": (hidden,),
        "cross_attn.q_proj.weight": (queries, hidden),
        "cross_attn.k_proj.weight": (keys, hidden),
        "cross_attn.v_proj.weight": (keys, hidden),
        "cross_attn.o_proj.weight": (hidden, queries),
        "cross_attn.q_norm.weight": (spec.head_dim,),
        "cross_attn.k_norm.weight": (spec.head_dim,),
        "cross_attn_attn_gate": (1,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"{name}.weight": shape for name, shape in _mlp("mlp", spec, intermediate).items()},
        "cross_attn_mlp_gate": (1,),
    }
    return {
        f"{LAYERS}{number}.{name}": shape for number in images.cross_attention_layers for name, shape in layer.items()
    }


def _vision(images: ImageSpec, *, hidden: int) -> dict[str, tuple[int, ...]]:
    """The patch embedding as the matrix that it is, over the channels, rows and columns of a patch."""
    size, tiles, states = images.hidden_size, images.max_num_tiles, images.tile_states
    ids = len(images.supported_aspect_ratios) + 1  # 0 is no image
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (size, images.num_channels * images.patch_size**2),
        "class_embedding": (size,),
        "gated_positional_embedding.gate": (1,),
        "gated_positional_embedding.embedding": (states, size),
        "gated_positional_embedding.tile_embedding.weight": (ids, tiles * states * size),
        **{f"{place}_tile_positional_embedding.gate": (1,) for place in ("pre", "post")},
        **{f"{place}_tile_positional_embedding.embedding.weight": (ids, tiles * size) for place in ("pre", "post")},
        **_norms("layernorm_pre", "layernorm_post", size=size),
    }
    layer = _vision_layer(images)
    for index in range(images.num_hidden_layers):
        shapes |= {f"transformer.layers.{index}.{name}": shape for name, shape in layer.items()}
    gated: dict[str, tuple[int, ...]] = {**layer, "gate_attn": (1,), "gate_ffn": (1,)}
    for index in range(images.num_global_layers):
        shapes |= {f"global_transformer.layers.{index}.{name}": shape for name, shape in gated.items()}
    return {
        **{f"vision_model.{name}": shape for name, shape in shapes.items()},
        "multi_modal_projector.weight": (hidden, images.output_size),
        "multi_modal_projector.bias": (hidden,),
    }


def _fusion(fusion: FusionSpec, *, hidden: int) -> dict[str, tuple[int, ...]]:
    """The patch embedding as in ``_vision``."""
    size, projected = fusion.hidden_size, fusion.projector_output_dim
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.linear.weight": (size, fusion.num_channels * fusion.patch_size**2),
        "class_embedding": (size,),
        "positional_embedding_vlm": (fusion.side**2 + 1, size),
        **_norms("layernorm_pre", "layernorm_post", size=size),
    }
    layer = {**_vision_layer(fusion), **{f"self_attn.{part}_proj.bias": (size,) for part in "qkvo"}}
    for index in range(fusion.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["vision_adapter.mlp.fc1.weight"] = (projected, fusion.intermediate_size)
    shapes["vision_adapter.mlp.fc2.weight"] = (projected, projected)
    return {
        **{f"vision_model.{name}": shape for name, shape in shapes.items()},
        "multi_modal_projector.linear_1.weight": (hidden, projected),
    }


def _vision_layer(vision: ImageSpec | FusionSpec) -> dict[str, tuple[int, ...]]:
    size, inside = vision.hidden_size, vision.intermediate_size
    return {
        **_norms("input_layernorm", "post_attention_layernorm", size=size),
        **{f"self_attn.{part}_proj.weight": (size, size) for part in "qkvo"},
        **{"mlp.fc1.weight": (inside, size), "mlp.fc1.bias": (inside,)},
        **{"mlp.fc2.weight": (size, inside), "mlp.fc2.bias": (size,)},
    }


def _norms(*names: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (size,) for name in names for part in ("weight", "bias")}


def _mlps(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    if spec.experts is None:
        return _mlp("mlp", spec, spec.intermediate_size)
    if not spec.has_experts(layer):
        return _mlp("feed_forward", spec, spec.experts.intermediate_size_mlp)
    count = spec.experts.num_local_experts
    shapes: dict[str, tuple[int, ...]] = {"feed_forward.router": (count, spec.hidden_size)}
    shapes |= _mlp("feed_forward.shared_expert", spec, spec.intermediate_size)
    for expert in range(count):
        shapes |= _mlp(f"feed_forward.experts.{expert}", spec, spec.intermediate_size)
    return shapes


def _mlp(name: str, spec: ModelSpec, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj": (intermediate, spec.hidden_size),
        f"{name}.up_proj": (intermediate, spec.hidden_size),
        f"{name}.down_proj": (spec.hidden_size, intermediate),
    }


class Precision(StrEnum):
    """How weights are stored."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    LUT4 = "lut4"
    """Indices of four bits into tables of sixteen values: a palette, in Core ML's words."""

    @property
    def bits(self) -> int | None:
        """Bits of a code; None for a floating-point precision."""
        return {Precision.INT8: 8, Precision.INT4: 4, Precision.LUT4: 4}.get(self)


GROUP_SIZES = (32, 64, 128)
PER_ROW = 0
"""The ``group_size`` that stands for one scale per row."""

TABLE_ROWS = 8
"""Rows that share a table of a palette: what ANEMLL's exports for the Neural Engine take by default. At 2,048 columns
the table's 32 bytes are 1/256 of what its indices take."""

TABLE_VALUES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Stores the matrices whose names ``pattern`` matches at ``precision``, whatever the rest of the body has."""

    pattern: str
    """A tensor name without ``model.`` in front and ``.weight`` behind; ``*`` stands for any characters."""
    precision: Precision

    def matches(self, name: str) -> bool:
        return fnmatchcase(name.removeprefix("model.").removesuffix(".weight"), self.pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeKind:
    """How a checkpoint has made codes of a matrix."""

    source: str
    """Who made them: gptq, awq, compressed-tensors, gguf, spinquant or qlora."""
    precision: Precision
    group_size: int
    """Columns that share a scale, or ``PER_ROW``."""
    zero_points: bool
    """Whether a group has a code of its own that stands for 0."""
    signed_scales: bool = False
    """Whether a scale may be below 0, as in Q4_0: there the value farthest from 0 has code -8 whatever its sign."""

    def __str__(self) -> str:
        groups = f"in groups of {self.group_size}" if self.group_size else "by row"
        return f"{self.precision} {groups}{', with zero points' if self.zero_points else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptCodes:
    """Matrices of one kind that stay the codes that the checkpoint has."""

    kind: CodeKind
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightScheme:
    """Which precision each weight matrix is stored in; norms and routers are float32 always. The same for every
    target."""

    body: Precision
    embedding: Precision
    head: Precision
    group_size: int
    """Columns that share an int4 scale, or ``PER_ROW``; int8 has one scale per row, a palette none."""
    rules: tuple[Rule, ...] = ()
    """Matrices of the body that are stored otherwise than ``body``; the last rule that matches counts."""
    kept: tuple[KeptCodes, ...] = ()
    """Matrices that nothing above is said of: their codes are the checkpoint's own."""

    def precision(self, name: str) -> Precision:
        """Of the weight matrix called ``name``."""
        if kind := self.kept_kind(name):
            return kind.precision
        if name in (EMBEDDING, HEAD):
            return self.embedding if name == EMBEDDING else self.head
        if name.endswith(ROUTER):
            return Precision.FP32
        if name.startswith(VISION) and self.body.bits:
            return self._vision(name)
        return next((rule.precision for rule in reversed(self.rules) if rule.matches(name)), self.body)

    def _vision(self, name: str) -> Precision:
        """Of a quantized scheme: int8, since no text calibrates what turns images into states; what is no product, and
        the patch embedding, whose columns fit no block, float16."""
        if "embedding" in name:
            return Precision.FP16
        return next((rule.precision for rule in reversed(self.rules) if rule.matches(name)), Precision.INT8)

    def groups(self, name: str, *, columns: int) -> int:
        """The number of columns of weight ``name`` that share one scale."""
        if kind := self.kept_kind(name):
            return kind.group_size or columns
        return self.group_size if self.group_size and self.precision(name) is Precision.INT4 else columns

    def kept_kind(self, name: str) -> CodeKind | None:
        """Of the codes that the checkpoint has of weight ``name``; None where they are not kept."""
        return next((kept.kind for kept in self.kept if name in kept.names), None)

    @property
    def sources(self) -> str:
        """Who made the codes that are kept; empty where none are."""
        return ", ".join(sorted({kept.kind.source for kept in self.kept}))


class Method(StrEnum):
    """How codes are chosen."""

    ROUND = "rtn"
    """Round to nearest, the scale searched for least squared error."""
    GPTQ = "gptq"
    AWQ = "awq"
    AWQ_GPTQ = "awq-gptq"
    SMOOTH = "smoothquant"
    """Outliers of the activations folded into the weights, which are then rounded to nearest."""

    @property
    def needs_text(self) -> bool:
        return self is not Method.ROUND

    @property
    def compensates(self) -> bool:
        """Whether a column's rounding error is made up for by others."""
        return self in (Method.GPTQ, Method.AWQ_GPTQ)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the codes of a scheme, but for the text."""

    method: Method
    act_order: bool = True
    """GPTQ rounds the columns of most energy first."""
    damping: float = 0.01
    """Added to the diagonal of GPTQ's Hessian, as a share of its mean (Frantar et al. 2022, section 3.3, step 3)."""

    def __str__(self) -> str:
        if not self.method.compensates:
            return self.method.value
        return f"{self.method.value}, {'act-order, ' if self.act_order else ''}damping {self.damping:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Which windows are drawn from a corpus."""

    windows: int = 32
    window_length: int = 512
    """Tokens, the begin token among them."""
    seed: int = 0


class Activations(StrEnum):
    """How a runtime rounds the input of a quantized linear. Each one is emulated exactly by the reference."""

    FLOAT = "float"
    INT8_PER_TOKEN = "int8-per-token"
    """Asymmetric int8 with one scale and zero point for each token (XNNPACK's qdint8)."""
    INT8_PER_BLOCK = "int8-per-block"
    """Symmetric int8 with one scale for each block of each token (MatMulNBits at accuracy_level 4)."""
    INT8_PER_32 = "int8-per-32"
    """Symmetric int8 with one float16 scale for every 32 columns of each token (llama.cpp's Q8_0)."""
    INT8_SYMMETRIC_PER_TOKEN = "int8-symmetric-per-token"
    """Symmetric int8 with one scale for each token (what the ONNX lowering puts in front of an integer MatMul)."""
    STATIC_UINT16 = "static-uint16"
    """uint16 with one scale and zero point for all tokens, from the ranges that calibration saw, on the input of each
    quantized linear and on its output too (``exporter.model.static``; Hexagon's integer products)."""


INT8_STATIC = "int8-static"
"""A cache of symmetric int8 with a scale for each channel, the same for all tokens (``exporter.model.static``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What a target does with numbers apart from the codes; the reference computes the same way."""

    activations: Activations
    head_activations: Activations | None = None
    """Where the head's input is rounded in another way than the body's."""
    compute_dtype: str
    kv_dtype: str
    """Of keys and values in the cache: fp32, fp16, ``int8`` at a scale and zero point for each head of a token, or
    ``INT8_STATIC``."""
    dequantized_dtype: str = "fp32"
    """What code x scale is rounded to before it is used (Core ML: fp16)."""
    product_dtype: str = "fp32"
    """What both factors of a product are rounded to where one of them is kept in fp16: a linear's weight, keys or
    values of the cache (llama.cpp: fp16). The sum is fp32."""
    angles: str = "product"
    """How RoPE turns: by position times frequency, or with the roundings of a ``recurrence`` from pair to pair
    (llama.cpp; ``exporter.model.rope.recurrent_table``)."""
    group_scale_dtype: str = "fp32"
    """What holds the scales of groups (XNNPACK: bf16, Core ML: fp16). Ours are exact in each; a checkpoint's own may be
    rounded by it."""
    row_scale_dtype: str = "fp32"
    """The same of a scale for a whole row."""

    def rounding(self, name: str) -> Activations:
        """Of the input of the quantized linear with weight ``name``."""
        if self.head_activations is not None and name in (EMBEDDING, HEAD):  # a tied head goes by its stored name
            return self.head_activations
        return self.activations


SMALLEST_ABSMAX = 2.0**-100
"""What the largest activation of a token counts as at least under ``INT8_SYMMETRIC_PER_TOKEN``, so that a token of
zeros has a scale and no scale is subnormal."""

ROW_BLOCKS = (128, 64, 32, 16)


def activation_block(*, columns: int, group_size: int) -> int:
    """Columns of the input that share a scale under ``INT8_PER_BLOCK``: the weight's own groups; for a weight with one
    scale per row the largest block that divides it, since MatMulNBits blocks weights and activations alike."""
    if group_size < columns:
        return group_size
    return next((block for block in ROW_BLOCKS if columns % block == 0), columns)


class Logits(StrEnum):
    """Which positions of a call the head is computed for."""

    LAST = "last"
    ALL = "all"


class Prefer(StrEnum):
    """What an artifact is made for where one thing costs another."""

    QUALITY = "quality"
    PREFILL = "prefill"
    """A prompt is read fast: int8 weights times int8 activations, at one scale per token (onnxruntime)."""
    DECODE = "decode"
    """Tokens are written fast: int4 in the widest groups, so that a token reads the fewest bytes of scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run, as asked for: from one checkpoint to one artifact per target."""

    checkpoint: Path
    adapter: Path | None = None
    """A LoRA of PEFT to be merged into it."""
    targets: tuple[str, ...]
    """Labels (``targets.label``): a target, or a target and a backend."""
    scheme: WeightScheme
    requantize: bool = False
    """Whether codes that the checkpoint has are decoded and chosen anew."""
    head_tokens: tuple[int, ...] = ()
    """The tokens whose rows of the head are kept; none: all."""
    context: int
    """Positions the key-value cache holds."""
    kv_cache: Precision | None = None
    """How keys and values are kept; None: as the target does."""
    images: bool = False
    """Whether what looks at images is exported too."""
    logits: Logits = Logits.LAST
    prefer: Prefer = Prefer.QUALITY
    recipe: Recipe
    corpus: str | None = None
    """File or folder to calibrate with, ``-`` for stdin; None: text that the model writes itself."""
    corpus_column: str | None = None
    budget_bytes: int | None = None
    """What the stored weights may take: as much of an int4 body as fits is stored as int8, by measured sensitivity."""
    max_kl_nats: float | None = None
    """What quantization may cost: as little of an int4 body as that takes is stored as int8."""
    sampling: Sampling
    device: str | None = None
    """A slug of ``targets/devices.toml``, which it has to fit."""
    system: str | None = None
    """The oldest one that the app runs on, such as ``iOS 18``."""
    out: Path
    store: Path
    """The cache folder in which quantized weights are kept and found again."""
    evaluation_text: Path | None
    """None: text held apart from the corpus, or the bundled text where there is none."""
    threads: int
    """Threads that a runtime may use while it is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file, or a package of files, that one runtime loads."""

    target: str
    backend: str
    path: Path
    spec: ModelSpec
    scheme: WeightScheme
    arithmetic: Arithmetic
    context: int
    logits: Logits
    prefer: Prefer = Prefer.QUALITY


class Verdict(StrEnum):
    """Only ``passed`` is green: what was not executed is not measured."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of one kind of proof. ``figures`` are always shown, whatever the verdict."""

    verdict: Verdict
    reason: str = ""
    """Why it failed or was not measured, in a sentence; empty when it passed."""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        reason = {"reason": self.reason} if self.reason else {}
        return {"verdict": self.verdict.value, **reason, **self.figures}


class Progress(Protocol):
    """Whoever wants to know how far a run is."""

    def stage(self, title: str) -> None:
        """A new stage begins; the one before it is done."""

    def advance(self, done: int, total: int) -> None:
        """So many of so many steps of this stage are done."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
