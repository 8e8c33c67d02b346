"""The reference: the same graph, run in eager PyTorch with the same codes and the target's arithmetic.

So a difference between an artifact and its reference is a fault of the lowering, never "quantization noise".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.model.eager import eager_table
from exporter.model.graph import FUSED, Constant, Graph, Node, Table, Value, Weight, walk
from exporter.model.image_ops import in_place, tiles_of
from exporter.model.ops import attend
from exporter.model.rope import recurrent_table, rope_table
from exporter.model.static import LinearSteps, linear_steps, round_cached, with_static_caches
from exporter.spec import INT8_STATIC, SMALLEST_ABSMAX, Activations, Arithmetic, ModelSpec, activation_block
from exporter.store import StoredWeight, WeightStore

FULL_PRECISION = Arithmetic(activations=Activations.FLOAT, compute_dtype="fp32", kv_dtype="fp32")
"""float32 throughout: with a float32 store, the model itself."""

KEEP_BYTES = 2 << 30
"""Dequantized weights that a reference keeps between calls: all of a model of half a billion parameters; what does not
fit is dequantized again at each call."""

BLOCK_BYTES = 64 << 20
"""Of a matrix in float32 at a time: a larger one that is not kept is computed in blocks of rows. (For a few hundred
tokens, blocks four times smaller took half as long again, and whole matrices no less.)"""
_AT_ONCE = 16
"""Rows that BLAS libraries multiply at once, or a multiple of them."""


class Weights(Protocol):
    """Whatever answers for the tensors of a model by name: a WeightStore, a Checkpoint, or a dict of them."""

    def __getitem__(self, name: str, /) -> StoredWeight: ...


class Reference:
    """One model with one key-value cache: ``feed`` token ids, get the logits of every one of them.

    Of a weight that is not kept (``keep_bytes=0`` suits a reference that is asked once), only the rows of the embedding
    that are looked up, or ``BLOCK_BYTES`` of a matrix, are ever in memory as floats.

    ``noise`` multiplies each output of a linear by 1 + noise * N(0, 1): how far the reference moves under it is the
    floor under which no artifact can be expected to agree (a flipped rounding of an activation is amplified).

    Under ``Activations.STATIC_UINT16``, or with an ``INT8_STATIC`` cache, the weights must come from a store, which has
    the ranges. Raises InputError where it has none.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        arithmetic: Arithmetic,
        *,
        noise: float = 0.0,
        seed: int = 0,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        if arithmetic.kv_dtype == INT8_STATIC:
            assert isinstance(weights, WeightStore)  # see above
            graph = with_static_caches(graph, weights.read_cache_ranges())
        self._graph = graph
        self._weights = weights
        self._arithmetic = arithmetic
        self._noise = noise
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: dict[str, _Matrix] = {}
        self._kept_bytes = 0
        self._keep_bytes = keep_bytes
        self._steps: dict[str, LinearSteps] = {}
        if arithmetic.activations is Activations.STATIC_UINT16:
            assert isinstance(weights, WeightStore)  # see above
            self._steps = linear_steps(graph, weights.read_ranges())
        self._caches = self._empty_caches(1)
        self._tiles, self._states = 0, self._no_states(1)
        table: Table = {**eager_table(self._vector, linear=self._linear), "embedding": self._embedding}
        attentions = {"int8": _attention_over_int8, INT8_STATIC: _attention_over_static_int8}
        if arithmetic.kv_dtype in attentions:
            table = {**table, "attention": attentions[arithmetic.kv_dtype]}
        elif arithmetic.angles == "recurrence" or arithmetic.product_dtype == "fp16":
            table = {**table, "attention": self._attention_of_ggml}
        self._table = table

    @property
    def spec(self) -> ModelSpec:
        return self._graph.spec

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return next(iter(self._caches.values())).shape[2]

    @torch.no_grad()
    def feed(self, ids: Sequence[int], *, tiles: Tensor | None = None) -> Tensor:
        """Append ``ids`` (T of them) to the cache; float32 logits ``[T, V]``. ``tiles`` bool ``[T, M]``, of the images
        that were shown, are those that each token sees, as ``targets.base.SeeingRunner`` has it; None: it sees none."""
        inputs = {"ids": torch.tensor([list(ids)]), **self._seen(tiles, length=len(ids)), **self._caches}
        outputs = self._graph.run(self._table, inputs)
        logits: Tensor = outputs.pop("logits")
        self._caches = {name.replace("present_", "past_"): value for name, value in outputs.items()}
        return logits[0]

    def _seen(self, tiles: Tensor | None, *, length: int) -> dict[str, Tensor]:
        """What the decoder has of images, by the names of its inputs; ``tiles`` as for ``feed``."""
        if self.spec.fusion:
            return dict(zip(FUSED, in_place(self._states[FUSED[0]], tiles, length=length), strict=True))
        if tiles is None:
            tiles = torch.zeros(length, self._tiles, dtype=torch.bool)
        return {"tiles": tiles.unsqueeze(0), **self._states}

    @torch.no_grad()
    def look(self, vision: Graph, image: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the decoder takes from an image, by the names of the outputs of ``vision``; it is shown behind those
        shown before. ``image``: as ``targets.base.SeeingRunner`` has it."""
        parts = [vision.run(self._table, part) for part in (tiles_of(image) if self.spec.fusion else [image])]
        seen = {name: torch.cat([part[name] for part in parts], dim=-2) for name in parts[0]}
        self.show(seen, tiles=image["pixel_values"].shape[1])
        return seen

    def show(self, states: Mapping[str, Tensor], *, tiles: int) -> None:
        """What ``look`` gives of an image of so many tiles, from whatever computed it."""
        self._states = {name: torch.cat([kept, states[name]], dim=-2) for name, kept in self._states.items()}
        self._tiles += tiles

    @torch.no_grad()
    def compute(self, node: Node, values: Mapping[Value, Tensor]) -> tuple[Tensor, ...]:
        """The results of one op of the graph on ``values`` of somebody else; nothing is remembered."""
        (own,) = (one for one in self._graph.nodes if one.name == node.name)
        result = self._table[own.op](*(values[a] if isinstance(a, Value) else a for a in own.arguments))
        return result if isinstance(result, tuple) else (result,)

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on."""
        self._caches = {name: cache[:, :, :position] for name, cache in self._caches.items()}

    @torch.no_grad()
    def before_head(self, ids: Tensor, on_layer: Callable[[], None] = lambda: None) -> Tensor:
        """What the head reads for texts int64 ``[B, T]`` that start anew: float32 ``[B, T, H]``. The cache stays as it
        is, and no image is seen. ``on_layer`` is called after each decoder layer."""
        wanted = self._graph.head.arguments[0]
        assert isinstance(wanted, Value)  # VOCABULARY: linear is x, weight
        ending = self._graph.ending
        nodes = [node for node in self._graph.nodes if node not in ending]
        last_of_layer = {node.layer: node.name for node in nodes if node.layer is not None}
        caches = self._empty_caches(len(ids))
        unseen = {"tiles": torch.zeros(*ids.shape, 0, dtype=torch.bool), **self._no_states(len(ids))}
        if self.spec.fusion:
            unseen = dict(zip(FUSED, (torch.zeros(*ids.shape, self.spec.hidden_size), ids < 0), strict=True))
        values = {Value(name): value for name, value in {"ids": ids, **caches, **unseen}.items()}
        walk(
            nodes,
            self._table,
            values,
            lambda node, *_: on_layer() if last_of_layer.get(node.layer) == node.name else None,
            wanted={wanted},
        )
        hidden: Tensor = values[wanted]
        return hidden

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of what ``before_head`` gives, or some of its positions, ``[..., H]``."""
        ending = self._graph.ending
        read = ending[0].arguments[0]
        assert isinstance(read, Value)  # VOCABULARY: linear is x, weight
        values: dict[Value, Any] = {read: hidden}
        walk(ending, self._table, values)
        logits: Tensor = values[self._graph.outputs["logits"]]
        return logits

    def greedy(self, ids: Sequence[int], *, count: int, stops: Sequence[int]) -> list[tuple[int, float]]:
        """``greedy_answers`` to a single prompt."""
        return self.greedy_answers([ids], counts=[count], stops=stops)[0]

    def greedy_answers(
        self, prompts: Sequence[Sequence[int]], *, counts: Sequence[int], stops: Sequence[int]
    ) -> list[list[tuple[int, float]]]:
        """The most likely next tokens after each prompt, up to its count of them or a stop token, each with its margin:
        how far its logit is above the second best. Where that is small another runtime may rightly choose otherwise.

        All prompts go through the model together, each with a draft of all that is to come: what the pass before chose
        at those positions. As many choices are taken as had nothing but right tokens before them, at least one a pass
        (Jacobi decoding: Santilli et al. 2023, arXiv:2305.10427); so the answer is that of one token after another.
        """
        answers: list[list[tuple[int, float]]] = [[] for _ in prompts]
        drafts = [[prompt[-1]] * count for prompt, count in zip(prompts, counts, strict=True)]

        def goes_on(index: int) -> bool:
            answer = answers[index]
            return len(answer) < counts[index] and not (answer and answer[-1][0] in stops)

        while going_on := [index for index in range(len(prompts)) if goes_on(index)]:
            texts = [[*prompts[index], *drafts[index][:-1]] for index in going_on]
            ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)  # nothing sees what follows its text
            for row, text in zip(ids, texts, strict=True):
                row[: len(text)] = torch.tensor(text)
            hidden = self.before_head(ids)
            rows = [
                hidden[row, len(prompts[index]) + len(answers[index]) - 1 : len(texts[row])]
                for row, index in enumerate(going_on)
            ]
            logits = self.head(torch.cat(rows)).split([len(row) for row in rows])
            for index, its_logits in zip(going_on, logits, strict=True):
                taken, best = len(answers[index]), its_logits.topk(2)
                choices = best.indices[:, 0].tolist()
                margins = (best.values[:, 0] - best.values[:, 1]).tolist()
                for choice, margin, drafted in zip(choices, margins, drafts[index][taken:], strict=True):
                    answers[index].append((choice, margin))
                    if choice != drafted or choice in stops:
                        break
                drafts[index][taken:] = choices
        return answers

    def _empty_caches(self, batch: int) -> dict[str, Tensor]:
        spec = self._graph.spec
        names = (name for name in self._graph.inputs if name.startswith("past_"))
        return {name: torch.zeros(batch, spec.num_key_value_heads, 0, spec.head_dim) for name in names}

    def _no_states(self, batch: int) -> dict[str, Tensor]:
        spec = self._graph.spec
        if spec.fusion:
            return {FUSED[0]: torch.zeros(batch, 0, spec.hidden_size)}
        names = (name for name in self._graph.inputs if name.startswith("cross_"))
        return {name: torch.zeros(batch, spec.num_key_value_heads, 0, spec.head_dim) for name in names}

    def _embedding(self, ids: Tensor, weight: Weight) -> Tensor:
        return self._matrix(weight).rows(ids.flatten()).view(*ids.shape, -1)

    def _linear(self, x: Tensor, weight: Weight) -> Tensor:
        matrix = self._matrix(weight)
        steps = self._steps.get(weight.name) if matrix.group_size else None
        if steps:
            x = steps.before.round(x)
        elif matrix.group_size:
            x = round_activations(x, self._arithmetic.rounding(weight.name), group_size=matrix.group_size)
        elif matrix.is_half and self._arithmetic.product_dtype == "fp16":
            x = _half(x)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for block in matrix.blocks(weight.shape):
            y[..., block] = F.linear(x, matrix.rows(block))
        if self._noise:
            y = y * (1 + self._noise * torch.randn(y.shape, generator=self._generator))
        return steps.after.round(y) if steps else y

    def _attention_of_ggml(
        self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, inv_freq: Constant | None, *sizes: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where keys and values are kept as float16, queries and probabilities are rounded to it before they meet them:
        what ggml's ``mul_mat`` makes of a float16 factor. Scores and sums are float32."""
        frequencies, arithmetic = inv_freq.value if inv_freq else None, self._arithmetic
        halves = "fp16" == arithmetic.kv_dtype == arithmetic.product_dtype
        turned = partial(recurrent_table, rope=self._graph.spec.rope)
        return attend(
            *(q, k, v, past_k, past_v, frequencies, *sizes),
            rounded=_halves if halves else None,
            weighed=_half if halves else None,
            table=turned if arithmetic.angles == "recurrence" else rope_table,
        )

    def _vector(self, weight: Weight) -> Tensor:
        return self._matrix(weight).rows(slice(None))

    def _matrix(self, weight: Weight) -> _Matrix:
        """A weight as it is stored; as floats and kept, if there is room."""
        if weight.name in self._kept:
            return self._kept[weight.name]
        stored = self._weights[weight.name]
        group_size = None if isinstance(stored, Tensor) else stored.group_size
        is_half = isinstance(stored, Tensor) and stored.dtype == torch.float16
        dtype = self._arithmetic.dequantized_dtype
        matrix = _Matrix(stored=stored, group_size=group_size, is_half=is_half, dtype=dtype)
        size = 4 * math.prod(weight.shape)
        if self._kept_bytes + size <= self._keep_bytes:
            matrix = self._kept[weight.name] = replace(matrix, stored=matrix.rows(slice(None)))
            self._kept_bytes += size
        return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class _Matrix:
    stored: StoredWeight
    group_size: int | None
    """Of the codes it came from, whose linear then sees a rounded input too; None if it was stored as floats."""
    is_half: bool
    """Whether it was stored as float16."""
    dtype: str
    """To which the target rounds what it dequantizes."""

    def rows(self, which: slice | Tensor) -> Tensor:
        """float32, rounded as the target rounds what it dequantizes."""
        if isinstance(self.stored, Tensor):
            return self.stored[which].float()
        values = self.stored.dequantize(which)
        return values.half().float() if self.dtype == "fp16" else values

    def blocks(self, shape: tuple[int, ...]) -> Iterator[slice]:
        """Of rows; all at once where they are floats already. None is cut within what BLAS libraries multiply at
        once: on an AMD EPYC, MKL sums a rest of 10 rows in another order, and gave other bits than of the whole."""
        rows, columns = shape
        whole = isinstance(self.stored, Tensor) and self.stored.dtype == torch.float32
        step = rows if whole else max(_AT_ONCE, BLOCK_BYTES // (4 * columns) // _AT_ONCE * _AT_ONCE)
        return (slice(start, start + step) for start in range(0, rows, step))


def _attention_over_int8(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, inv_freq: Constant | None, *sizes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values at one scale and zero point for each head of a token, which ExecuTorch's
    ``llama::custom_quantized_sdpa`` takes apart from the codes; probabilities stay float32."""
    frequencies = inv_freq.value if inv_freq else None

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _int8_per_token(q), _int8_per_token(k), _int8_per_token(v)

    return attend(q, k, v, past_k, past_v, frequencies, *sizes, rounded=rounded)


def _attention_over_static_int8(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, inv_freq: Constant | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The last two of ``rest`` are the scales of keys and of values (``with_static_caches``); queries stay float32."""
    *sizes, key_scales, value_scales = rest
    frequencies = inv_freq.value if inv_freq else None

    def rounded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, round_cached(k, key_scales.value), round_cached(v, value_scales.value)

    return attend(q, k, v, past_k, past_v, frequencies, *sizes, rounded=rounded)


def _halves(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _half(q), _half(k), _half(v)


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def round_activations(x: Tensor, activations: Activations, *, group_size: int) -> Tensor:
    """``x`` float32 ``[..., K]`` as a linear sees it whose weight is quantized in groups of ``group_size``."""
    match activations:
        case Activations.FLOAT:
            return x
        case Activations.INT8_PER_TOKEN:
            return _int8_per_token(x)
        case Activations.INT8_PER_BLOCK:
            return _int8_per_block(x, activation_block(columns=x.shape[-1], group_size=group_size))
        case Activations.INT8_PER_32:
            return _int8_per_block(x, 32, scale_dtype=torch.float16)
        case Activations.INT8_SYMMETRIC_PER_TOKEN:
            return _int8_symmetric_per_token(x)
        case Activations.STATIC_UINT16:
            raise ValueError("static steps belong to a linear, not to its input alone: see exporter.model.static")


def _int8_per_token(x: Tensor) -> Tensor:
    """Asymmetric int8, one scale and zero point for each row: XNNPACK's ``qdint8``.

    The zero point is nudged from whichever end of the range loses less by it, as in XNNPACK's
    ``xnn_f32_qd8_asymmetric_quantization_params`` (src/xnnpack/quantization.h).
    """
    lowest, highest = x.amin(dim=-1, keepdim=True).clamp(max=0.0), x.amax(dim=-1, keepdim=True).clamp(min=0.0)
    span = highest - lowest
    # A tensor, not 255.0: torch divides a number by a tensor as number x reciprocal, which is off by a last place.
    inverse_scale = torch.where(span == 0, 1.0, torch.full_like(span, 255.0) / span)
    from_below, from_above = -128.0 - lowest * inverse_scale, 127.0 - highest * inverse_scale
    error_sum = (-128.0 + lowest * inverse_scale) + (127.0 + highest * inverse_scale)
    zero_point = torch.where(error_sum > 0, from_below, from_above).clamp(-128.0, 127.0).round()
    codes = (x * inverse_scale).round().clamp(-128.0 - zero_point, 127.0 - zero_point)
    return codes * (1.0 / inverse_scale)


def _int8_per_block(x: Tensor, block: int, *, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Symmetric int8, one scale of absmax / 127 per ``block`` columns of a row: MatMulNBits at accuracy_level 4. The
    scale is kept as ``scale_dtype``, of float16 in ggml's ``quantize_row_q8_0`` (ggml-cpu/arch/x86/quants.c)."""
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    codes = (blocks * torch.where(largest == 0, 0.0, torch.full_like(largest, 127.0) / largest)).round()
    return (codes * (largest / 127.0).to(scale_dtype).float()).flatten(-2)


def _int8_symmetric_per_token(x: Tensor) -> Tensor:
    """Symmetric int8, one scale of absmax / 127 for each row, as ``targets/onnxruntime/lower.py`` spells it out for
    ONNX's QuantizeLinear: divided by the scale and rounded half to even."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ABSMAX) / 127.0
    return (x / scale).round() * scale
