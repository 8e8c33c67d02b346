"""The graph as one module of plain torch ops, for the backends that take a program and choose what they run of it.

Each op of the graph is a row of a table, as everywhere; the walk happens inside ``forward``, which ``torch.export``
traces. What differs between backends is a value, ``Form``: how matrices are stored and multiplied, and which of three
attentions is written out.

The key-value caches are buffers that ``forward`` changes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.errors import LoweringError
from exporter.model.graph import Constant, Graph, Node, Table, Value, Weight
from exporter.model.ops import FLOOR, places
from exporter.model.reference import Weights
from exporter.model.rope import rope_table, rotate
from exporter.spec import FINAL_NORM, Logits
from exporter.store import PlainWeight, StoredWeight, plain

MASKED = -1e4
"""Added to the score of a key that is not to be seen. Its share then is exactly 0 in float32 and in float16, and it is
a number that every backend can hold: -inf is none in JSON, which Vulkan's serializer writes on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a backend wants written in its own way."""

    embedding: Callable[[PlainWeight], nn.Module]
    """Of a table: ids int64 [1, T] -> float32 [1, T, H]."""
    linear: Callable[[PlainWeight], nn.Module]
    """Of a matrix: x float32 [1, T, K] -> float32 [1, T, N]."""
    attention: type[Attention]
    dtype: torch.dtype = torch.float32
    """Of queries, keys and values where they are multiplied. The cache is float32, or what a backend makes of that."""


class Here:
    """Where the tokens of one call are: what all layers need to know, made for the first of them that asks."""

    def __init__(self, tokens: Tensor, input_pos: Tensor) -> None:
        self.input_pos = input_pos
        self.length = tokens.shape[1]
        self._made: dict[Any, Any] = {}

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Decoder(nn.Module):
    """tokens int64 [1, T], input_pos int64 [1] -> logits float32 [1, T or 1, V]."""

    def __init__(self, graph: Graph, weights: Weights, *, form: Form, context: int, logits: Logits) -> None:
        super().__init__()
        self._graph, self._logits = graph, logits
        self.parts = nn.ModuleDict()
        for node in graph.nodes:
            match node.op:
                case "embedding":
                    self._add("embedding", node, lambda w: form.embedding(plain(weights[w.name])))
                case "linear":
                    self._add("linear", node, lambda w: form.linear(plain(weights[w.name])))
                case "rms_norm":
                    eps = float(node.arguments[2])  # type: ignore[arg-type]  # VOCABULARY: x, weight, eps
                    self._add("rms_norm", node, partial(_norm, weights, eps=eps))
                case "spread":
                    _, tokens, count = node.arguments
                    assert isinstance(tokens, Constant)  # VOCABULARY
                    assert isinstance(count, int)
                    self.parts["spread"] = Spread(tokens.value, vocab_size=count)
        self.attentions = nn.ModuleDict(
            {
                past.node.replace(".", "_"): form.attention(
                    node, head_dim=graph.spec.head_dim, context=context, dtype=form.dtype
                )
                for node, past in _attentions(graph)
            }
        )

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        here = Here(tokens, input_pos)
        table: Table = {
            "embedding": lambda ids, weight: self.parts[_key("embedding", weight)](ids),
            "linear": lambda x, weight: self.parts[_key("linear", weight)](x),
            "rms_norm": lambda x, weight, _eps: self.parts[_key("rms_norm", weight)](self._wanted(x, weight)),
            "silu": F.silu,
            "mul": torch.mul,
            "add": torch.add,
            "attention": lambda q, k, v, attention, *_: (attention(q, k, v, here), None, None),
            "spread": lambda logits, _tokens, _count: self.parts["spread"](logits),
        }
        inputs: dict[str, Any] = dict.fromkeys(self._graph.inputs)
        inputs |= {past.node: self.attentions[past.node.replace(".", "_")] for _, past in _attentions(self._graph)}
        logits: Tensor = self._graph.run(table, {**inputs, "ids": tokens})["logits"]
        return logits

    def _add(self, op: str, node: Node, make: Callable[[Weight], nn.Module]) -> None:
        weight = node.arguments[1]
        assert isinstance(weight, Weight)  # VOCABULARY
        self.parts[_key(op, weight)] = make(weight)

    def _wanted(self, x: Tensor, weight: Weight) -> Tensor:
        """What the norm reads: before the head only the last position, where the logits of others are not wanted."""
        return x[:, -1:] if weight.name == FINAL_NORM and self._logits is Logits.LAST else x


def _norm(weights: Weights, weight: Weight, *, eps: float) -> nn.Module:
    return Norm(weights[weight.name], eps=eps)


def _key(op: str, weight: Weight) -> str:
    """Of a part, whose name may hold no dots: a tied head and embedding are two."""
    return f"{op}_{weight.name.replace('.', '_')}"


def _attentions(graph: Graph) -> list[tuple[Node, Value]]:
    """Each with the graph input that its keys come from."""
    nodes = [node for node in graph.nodes if node.op == "attention"]
    pasts = [node.arguments[3] for node in nodes]
    return [(node, past) for node, past in zip(nodes, pasts, strict=True) if isinstance(past, Value)]


class Spread(nn.Module):
    """logits [1, T, n] -> [1, T, V]: see ``exporter.model.ops.spread``."""

    def __init__(self, tokens: Tensor, *, vocab_size: int) -> None:
        super().__init__()
        self.register_buffer("places", places(tokens, vocab_size))

    def forward(self, logits: Tensor) -> Tensor:
        floor = logits.new_full((1, logits.shape[1], 1), FLOOR)
        return torch.cat([logits, floor], dim=-1).index_select(-1, self.get_buffer("places"))


class Norm(nn.Module):
    """x [1, T, H] -> [1, T, H], the root mean square norm spelt out.

    Its epsilon is a tensor: a number would make an op of its own, which not every backend has. The mean is over
    dimension 2, not -1, by which Vulkan's partitioner would take it for a norm that it fuses, and then fail: it wants
    the value of an epsilon that is a tensor without values at that time (executorch 1.4.1,
    backends/vulkan/patterns/rms_norm.py).
    """

    def __init__(self, weight: StoredWeight, *, eps: float) -> None:
        super().__init__()
        assert isinstance(weight, Tensor)  # norms are float32 always
        self.weight = nn.Buffer(weight)
        self.eps = nn.Buffer(torch.tensor([eps]))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = (x * x).mean(dim=2, keepdim=True)
        return x * torch.rsqrt(mean_square + self.eps) * self.weight


class Attention(nn.Module):
    """q [1, T, H*D], k and v [1, T, KV*D], none of them rotated -> context [1, T, H*D]; keeps the cache.

    The query heads that share a key are rows of one matrix product, so that no key is copied for them. Rotation is in
    float32, the rest in ``dtype``.
    """

    keys: Tensor
    values: Tensor
    keys_shape: ClassVar[str]
    """What the dimensions of a key cache are: letters of KV (k), positions (s), channels (d) and 1."""

    def __init__(self, node: Node, *, head_dim: int, context: int, dtype: torch.dtype) -> None:
        super().__init__()
        _q, _k, _v, _past_k, _past_v, inv_freq, heads, kv_heads, scale, window, chunk = node.arguments
        assert isinstance(heads, int)
        assert isinstance(kv_heads, int)
        assert isinstance(window, int)
        assert isinstance(chunk, int)
        assert isinstance(scale, float)
        self.context, self.head_dim, self.kv_heads, self.repeats = context, head_dim, kv_heads, heads // kv_heads
        self.scale, self.window, self.chunk, self.dtype = scale, window, chunk, dtype
        self.rotary = inv_freq.name if isinstance(inv_freq, Constant) else None
        if isinstance(inv_freq, Constant):
            cos, sin = rope_table(inv_freq.value, first=0, count=context)
            self.cos, self.sin = nn.Buffer(cos), nn.Buffer(sin)
        sizes = {"1": 1, "k": kv_heads, "s": context, "d": head_dim}
        self.keys = nn.Buffer(torch.zeros([sizes[letter] for letter in self.keys_shape]))
        rows = self.keys_shape.replace("ds", "sd")
        self.values = nn.Buffer(torch.zeros([sizes[letter] for letter in rows]))

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, here: Here) -> Tensor: ...

    def _tables(self, look_up: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions of a call: float32 [T, D/2]."""
        return look_up(self.cos), look_up(self.sin)

    def _refuse_part(self) -> None:
        if self.window or self.chunk:
            raise LoweringError(
                f"attention with window {self.window} and chunk {self.chunk} has no lowering for this backend",
                hint="choose another target for this model",
            )


class DynamicAttention(Attention):
    """Any number of tokens at once. Only as much of the cache as is filled is read.

    The keys of a head are columns, so that scores are a plain matrix product with what is in the cache: rows would be
    transposed, and so copied, at each token.
    """

    keys_shape = "kds"

    def __init__(self, node: Node, *, head_dim: int, context: int, dtype: torch.dtype) -> None:
        super().__init__(node, head_dim=head_dim, context=context, dtype=dtype)
        self.positions = nn.Buffer(torch.arange(context))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, here: Here) -> Tensor:
        start, end = here.once("ends", lambda: self._ends(here))
        length, groups, rows = here.length, self.kv_heads, self.repeats * here.length
        at = here.once("positions", lambda: self.positions.narrow(0, start, length))
        mask = here.once(("mask", self.window, self.chunk), lambda: self._mask(at, end))
        q = q.view(length, groups, self.repeats, self.head_dim).permute(1, 2, 0, 3)  # [KV, r, T, D]
        k, v = (x.view(length, groups, self.head_dim).transpose(0, 1) for x in (k, v))  # [KV, T, D]
        if self.rotary:
            cos, sin = here.once(("tables", self.rotary), lambda: self._tables(lambda x: x.narrow(0, start, length)))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        torch.ops.aten.index_put_(self.keys, [None, None, at], k.mT.contiguous())
        torch.ops.aten.index_put_(self.values, [None, at], v.contiguous())
        queries = (q * self.scale).reshape(groups, rows, self.head_dim)
        scores = torch.bmm(queries, self.keys.narrow(2, 0, end))
        shares = (scores.view(groups, self.repeats, length, end) + mask).softmax(dim=-1)
        context = torch.bmm(shares.view(groups, rows, end), self.values.narrow(1, 0, end))
        heads_last = context.view(groups, self.repeats, length, self.head_dim).permute(2, 0, 1, 3)  # [T, KV, r, D]
        return heads_last.reshape(1, length, groups * self.repeats * self.head_dim)

    def _ends(self, here: Here) -> tuple[Any, Any]:
        start = here.input_pos[0].item()
        for held in (start >= 0, start < self.context, start + here.length <= self.context):
            torch._check(held)
        return start, start + here.length

    def _mask(self, at: Tensor, end: Any) -> Tensor:
        """float32 [T, end]: 0 where a query sees a key, -inf elsewhere, as ``exporter.model.ops.attention`` says."""
        queries, keys = at.unsqueeze(1), self.positions.narrow(0, 0, end).unsqueeze(0)
        visible = keys <= queries
        if self.window:
            visible = visible & (keys > queries - self.window)
        if self.chunk:
            visible = visible & (keys // self.chunk == queries // self.chunk)
        return torch.where(visible, 0.0, -torch.inf)


class FusedAttention(Attention):
    """One token at a time, and ``scaled_dot_product_attention`` for backends that have it as one op."""

    keys_shape = "1ksd"

    def __init__(self, node: Node, *, head_dim: int, context: int, dtype: torch.dtype) -> None:
        super().__init__(node, head_dim=head_dim, context=context, dtype=dtype)
        self._refuse_part()
        self.positions = nn.Buffer(torch.arange(context))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, here: Here) -> Tensor:
        at = here.input_pos
        mask = here.once(
            "mask", lambda: torch.where(self.positions <= at, 0.0, MASKED).to(self.dtype).view(1, 1, 1, -1)
        )
        q, k, v = (x.view(1, self.kv_heads, -1, self.head_dim) for x in (q, k, v))  # [1, KV, r or 1, D]
        if self.rotary:
            cos, sin = here.once(("tables", self.rotary), lambda: self._tables(lambda x: F.embedding(at, x)))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.scale != self.head_dim**-0.5:  # Core ML's op has no scale of its own
            q = q * (self.scale * self.head_dim**0.5)
        torch.ops.aten.index_put_(self.keys, [None, None, at], k)
        torch.ops.aten.index_put_(self.values, [None, None, at], v)
        q, keys, values = (x.to(self.dtype) for x in (q, self.keys, self.values))
        context = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return context.float().reshape(1, 1, -1)


class CustomAttention(Attention):
    """One token at a time by ExecuTorch's own ops, for backends that have kernels for them and keep the cache."""

    keys_shape = "1skd"

    def __init__(self, node: Node, *, head_dim: int, context: int, dtype: torch.dtype) -> None:
        super().__init__(node, head_dim=head_dim, context=context, dtype=dtype)
        self._refuse_part()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, here: Here) -> Tensor:
        start = here.once("start", lambda: self._start(here))
        q, k, v = (x.view(1, 1, -1, self.head_dim) for x in (q, k, v))  # [1, 1, H or KV, D]
        if self.rotary:
            look_up = partial(F.embedding, here.input_pos)
            cos, sin = here.once(("tables", self.rotary), lambda: self._tables(look_up))  # [1, D/2]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        torch.ops.llama.update_cache(k, self.keys, start)
        torch.ops.llama.update_cache(v, self.values, start)
        dropout, causal = 0.0, True
        context: Tensor = torch.ops.llama.custom_sdpa(
            q, self.keys, self.values, start, None, dropout, causal, self.scale
        )
        return context.reshape(1, 1, -1)

    def _start(self, here: Here) -> Any:
        start = here.input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start < self.context)
        return start


class FiniteAttention(Attention):
    """One token at a time in the fewest kinds of ops: sums, products, a softmax, and no number that is not finite.

    Positions are float32 numbers: what is visible is arithmetic on their difference, and a row of a table is looked up
    by a product with 1 or 0, which is exact.

    The op that gives the new cache reads the old one itself. A partitioner takes a buffer for a constant of its
    delegate where that is not so, and the delegate then has outputs that nobody expects (executorch 1.4.1,
    ``tag_constant_data``).
    """

    keys_shape = "kds"

    def __init__(self, node: Node, *, head_dim: int, context: int, dtype: torch.dtype) -> None:
        super().__init__(node, head_dim=head_dim, context=context, dtype=dtype)
        self._refuse_part()
        self.positions = nn.Buffer(torch.arange(context, dtype=torch.float32).unsqueeze(0))  # [1, S]
        self.zero = nn.Buffer(torch.zeros(1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, here: Here) -> Tensor:
        ahead = here.once("ahead", lambda: self.positions - here.input_pos.float())  # [1, S]: how far after the token
        is_here = here.once("is_here", lambda: (1.0 - ahead.abs()).clamp(min=0.0, max=1.0))
        mask = here.once("mask", lambda: ahead.clamp(min=0.0, max=1.0) * MASKED)
        q, k, v = (x.view(self.kv_heads, -1, self.head_dim) for x in (q, k, v))  # [KV, r or 1, D]
        if self.rotary:
            cos, sin = here.once(("tables", self.rotary), lambda: self._tables(lambda x: is_here @ x))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        column = k.transpose(1, 2)  # [KV, D, 1]
        at = here.once("at", lambda: torch.eq(ahead, self.zero))  # bool [1, S]
        keys = torch.where(at, column, self.keys)
        values = torch.where(at.mT, v, self.values)
        self.keys.copy_(keys)
        self.values.copy_(values)
        shares = (torch.bmm(q * self.scale, keys) + mask).softmax(dim=-1)  # [KV, r, S]
        return torch.bmm(shares, values).reshape(1, 1, -1)
