"""The nouns that travel between the stages: frozen, checked when made, free of torch so that ``--help`` is quick."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

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


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A dense Llama decoder: every figure that its graph depends on, under its ``config.json`` name."""

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

    def __post_init__(self) -> None:
        for name in _SIZES:
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} is {size!r}, a positive integer was expected")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embedding turns pairs of channels")
        if self.rope.factors and len(self.rope.factors) != self.head_dim // 2:
            raise ValueError(
                f"RoPE has {len(self.rope.factors)} factors, half of head_dim ({self.head_dim}) was expected"
            )

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every stored tensor, in the order of the model; a tied head is not one of them."""
        hidden, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        layer = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (heads * self.head_dim, hidden),
            "self_attn.k_proj": (kv_heads * self.head_dim, hidden),
            "self_attn.v_proj": (kv_heads * self.head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * self.head_dim),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (self.intermediate_size, hidden),
            "mlp.up_proj": (self.intermediate_size, hidden),
            "mlp.down_proj": (hidden, self.intermediate_size),
        }
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, hidden)}
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        shapes[FINAL_NORM] = (hidden,)
        if not self.tie_word_embeddings:
            shapes[HEAD] = (self.vocab_size, hidden)
        return shapes

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
class WeightScheme:
    """Which precision each weight matrix is stored in; norms are float32 always. The same for every target."""

    body: Precision
    embedding: Precision
    head: Precision
    group_size: int
    """Columns that share an int4 scale, or ``PER_ROW``; int8 has one scale per row, a palette none."""
    rules: tuple[Rule, ...] = ()
    """Matrices of the body that are stored otherwise than ``body``; the last rule that matches counts."""

    def precision(self, name: str) -> Precision:
        """Of the weight matrix called ``name``."""
        if name in (EMBEDDING, HEAD):
            return self.embedding if name == EMBEDDING else self.head
        return next((rule.precision for rule in reversed(self.rules) if rule.matches(name)), self.body)

    def groups(self, name: str, *, columns: int) -> int:
        """The number of columns of weight ``name`` that share one scale."""
        return self.group_size if self.group_size and self.precision(name) is Precision.INT4 else columns


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
    context: int
    """Positions the key-value cache holds."""
    kv_cache: Precision | None = None
    """How keys and values are kept; None: as the target does."""
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
