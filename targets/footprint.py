"""What an artifact will take, from shapes alone: its size, the memory of what runs it, the bytes that a token reads.

How each runtime keeps weights is known from profiles of real runs. ``docs/benchmarks.md`` sets what is foreseen here
beside what was measured; of a backend that nothing here executes, only weights and cache can be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import targets
from exporter.spec import (
    EMBEDDING,
    HEAD,
    ROUTER,
    TABLE_ROWS,
    TABLE_VALUES,
    CodeKind,
    ModelSpec,
    Precision,
    Prefer,
    WeightScheme,
    activation_block,
)

PROMPT = 1024
"""Tokens that are fed at once at most; an app can feed a longer prompt in pieces."""

_BYTES = {Precision.FP32: 4.0, Precision.FP16: 2.0, Precision.INT8: 1.0, Precision.INT4: 0.5, Precision.LUT4: 0.5}

_SESSION_BYTES = 50 << 20
"""What a session of ONNX Runtime keeps beside weights: 42 to 65 MiB over seven artifacts of 1B to 8B, some 19 of them
pages of its library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """So many bytes of memory, and what they hold."""

    name: str
    size_bytes: int
    mapped: bool = False
    """Pages of the artifact's file: the system may drop them and read them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    artifact_bytes: int
    parts: tuple[Part, ...]
    token_bytes: int
    """Of weights, read for each decoded token: all but the embedding and the experts that it does not choose."""
    compared: bool
    """Whether ``parts`` were compared with runs of the runtime."""

    @property
    def memory_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    """One weight matrix as a target stores it."""

    name: str
    codes: int
    scales: int

    @property
    def size_bytes(self) -> int:
        return self.codes + self.scales


def footprint(
    label: str,
    spec: ModelSpec,
    scheme: WeightScheme,
    *,
    context: int,
    prefer: Prefer = Prefer.QUALITY,
    kv_cache: Precision | None = None,
) -> Footprint:
    """Of the artifact of ``label`` (``targets.label``) with a cache for ``context`` positions."""
    target, backend = targets.split(label)
    matrices = {name: shape for name, shape in spec.weights().items() if len(shape) == 2}
    matrices[HEAD] = matrices[spec.stored_name(HEAD)]
    kinds = {name: scheme.kept_kind(spec.stored_name(name)) for name in matrices}
    embedding, *body, head = (
        _matrix(label, name, shape, scheme, kept=kinds[name], prefer=prefer) for name, shape in matrices.items()
    )
    vectors = 4 * sum(math.prod(shape) for shape in spec.weights().values() if len(shape) == 1)
    read = sum(round(spec.share(matrix.name) * matrix.size_bytes) for matrix in body) + head.size_bytes
    shared = spec.tie_word_embeddings and label != "executorch"  # XNNPACK's delegates hold their weights themselves
    stored = (
        sum(matrix.size_bytes for matrix in body) + head.size_bytes + vectors + (0 if shared else embedding.size_bytes)
    )
    kept_as = kv_cache or Precision(targets.load(label).arithmetic(scheme, prefer).kv_dtype)
    by_token = kv_cache is Precision.INT8 and targets.INT8_CACHES.get(label) == Precision.INT8
    cache = _cache(spec, context=context, kept_as=kept_as, by_token=by_token)
    prompt = min(PROMPT, context)
    parts = {
        ("onnxruntime", "cpu"): _onnxruntime,
        ("executorch", "xnnpack"): _xnnpack,
        ("gguf", "llamacpp"): _llamacpp,
    }.get((target, backend))
    if parts is None:
        held = Part(name="weights", size_bytes=stored, mapped=True)
        return Footprint(artifact_bytes=stored, parts=(held, cache), token_bytes=read, compared=False)
    sizes = _Sizes(
        spec=spec,
        scheme=scheme,
        embedding=embedding,
        body=body,
        head=head,
        context=context,
        prompt=prompt,
        prefer=prefer,
    )
    return Footprint(
        artifact_bytes=stored,
        parts=(*parts(sizes), cache),
        token_bytes=read,
        compared=bool(scheme.body.bits) and spec.experts is None and target != "gguf",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    spec: ModelSpec
    scheme: WeightScheme
    embedding: _Matrix
    body: Sequence[_Matrix]
    head: _Matrix
    context: int
    prompt: int
    prefer: Prefer

    @property
    def chunked(self) -> bool:
        """Whether a layer sees less than the whole cache, which a mask then says."""
        return 0 < self.spec.attention.attention_chunk_size < self.context


def _matrix(
    label: str,
    name: str,
    shape: tuple[int, ...],
    scheme: WeightScheme,
    *,
    kept: CodeKind | None,
    prefer: Prefer,
) -> _Matrix:
    """float32 scales in blocks where MatMulNBits is to have them; XNNPACK's groups have bf16, its rows and the
    embedding of a program float32; Core ML has float16, and GGUF has one for 32 columns. ExecuTorch's own kernels take
    int4 as a byte a code."""
    target, _ = targets.split(label)
    rows, columns = shape
    precision = scheme.precision(name)
    by_bytes = label == "executorch-portable" and name != EMBEDDING and precision.bits
    codes = rows * columns if by_bytes else math.ceil(rows * columns * _BYTES[precision])
    if not precision.bits:
        return _Matrix(name=name, codes=codes, scales=0)
    if precision is Precision.LUT4:
        return _Matrix(name=name, codes=codes, scales=2 * TABLE_VALUES * rows // TABLE_ROWS)
    group = (kept.group_size or columns) if kept else scheme.groups(name, columns=columns)
    width = {
        "coreml": 2,
        "onnxruntime": 4,
        "gguf": 2,
        "executorch": 4 if by_bytes or group == columns or name == EMBEDDING else 2,
    }[target]
    if target == "onnxruntime" and not _as_integers(name, prefer):
        group = activation_block(columns=columns, group_size=group)
    if target == "gguf":
        group = 32
    scales = width * rows * columns // group
    if kept and kept.zero_points:
        scales += math.ceil(rows * columns // group * _BYTES[precision])
    return _Matrix(name=name, codes=codes, scales=scales)


def _as_integers(name: str, prefer: Prefer) -> bool:
    """Whether ONNX Runtime multiplies this matrix as int8 by int8."""
    return prefer is Prefer.PREFILL and name not in (EMBEDDING, HEAD) and not name.endswith(ROUTER)


def _cache(spec: ModelSpec, *, context: int, kept_as: Precision, by_token: bool) -> Part:
    """Of codes ``by_token`` each head has a float32 scale and an int8 zero point."""
    head = round(spec.head_dim * _BYTES[kept_as]) + (4 + 1 if by_token else 0)
    size = 2 * spec.num_hidden_layers * spec.num_key_value_heads * head * context
    return Part(name=f"key-value cache, {context:,} positions", size_bytes=size)


def _onnxruntime(sizes: _Sizes) -> Iterator[Part]:
    """MatMulNBits packs codes with two float32 for each block: its scale, and the sum that its zero point takes. The
    file's own scales are read while that is done, and its codes for the embedding."""
    linears = [*sizes.body, sizes.head]
    packed = sum(
        linear.codes + (0 if _as_integers(linear.name, sizes.prefer) else 2 * linear.scales) for linear in linears
    )
    yield Part(name="weights, packed by the runtime", size_bytes=packed)
    mapped = sum(linear.scales for linear in linears)
    if sizes.spec.tie_word_embeddings:
        mapped += sizes.embedding.codes
    yield Part(name="scales and tied embedding, mapped", size_bytes=mapped, mapped=True)
    # Fitted to what prompts of 1,024 tokens added at 1B, 3B and 8B; none of them is off by more than 4 MiB.
    spec = sizes.spec
    floats = sizes.prompt * (1.6 * spec.widest_mlp + 14 * spec.hidden_size)
    yield Part(name=f"activations of a prompt of {sizes.prompt:,}", size_bytes=round(4 * floats))
    if sizes.chunked:
        yield Part(name="mask of chunks", size_bytes=4 * sizes.prompt * sizes.context)
    yield Part(name="session", size_bytes=_SESSION_BYTES)


def _xnnpack(sizes: _Sizes) -> Iterator[Part]:
    """Every delegate packs its own weights. Memory is planned for calls as long as the context: what goes from delegate
    to delegate, and inside of one the widest moment of the MLP."""
    spec = sizes.spec
    packed = sum(linear.size_bytes for linear in (*sizes.body, sizes.head))
    yield Part(name="weights, packed by the runtime", size_bytes=packed)
    yield Part(name="embedding, mapped", size_bytes=sizes.embedding.size_bytes, mapped=True)
    between = 4 * spec.hidden_size + 2 * spec.num_key_value_heads * spec.head_dim
    inside = 3 * spec.widest_mlp + 4 * spec.hidden_size
    yield Part(name=f"activations, planned for {sizes.context:,}", size_bytes=4 * sizes.context * (between + inside))
    if sizes.chunked:
        yield Part(name=f"mask of chunks, planned for {sizes.context:,}", size_bytes=4 * sizes.context**2)


_STEP = 512
"""Tokens that llama.cpp computes at once (``n_ubatch``)."""


def _llamacpp(sizes: _Sizes) -> Iterator[Part]:
    """llama.cpp packs matrices of Q4_0 anew for the processor's products, and maps the others. The room that it
    computes in was read from its log for eight contexts of 1B and 8B shapes cut to few layers, and is within 2 % of the
    larger of 5 H + V and 5 H + 3 F floats for each token; of the logits' V only the last token's are touched, so that
    the second is told. With flash attention, its default: without, the scores of all heads come on top."""
    spec, matrices = sizes.spec, [*sizes.body, sizes.head]
    if not spec.tie_word_embeddings:
        matrices.append(sizes.embedding)
    packed = sum(
        matrix.size_bytes
        for matrix in matrices
        if sizes.scheme.precision(matrix.name) is Precision.INT4 and matrix.name != EMBEDDING
    )
    yield Part(name="Q4_0, packed by the runtime", size_bytes=packed)
    mapped = sum(matrix.size_bytes for matrix in matrices) - packed
    yield Part(name="other weights, mapped", size_bytes=mapped, mapped=True)
    step = min(_STEP, sizes.context)
    floats = 5 * spec.hidden_size + 3 * spec.widest_mlp
    yield Part(name=f"activations of {step} tokens", size_bytes=step * (4 * floats + 2 * sizes.context))
