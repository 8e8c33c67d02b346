"""What llama.cpp computes for the architectures ``llama`` and ``llama4``: graphs of its own (``src/models/llama.cpp``,
``src/models/llama4.cpp``), so that ours is not translated but held against them, and what it has to be told is read
off."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.gguf_file import LLAMA4_INTERVAL, llama4_attention
from exporter.errors import LoweringError
from exporter.model.graph import EXPERT, Constant, Graph, Table, Weight
from exporter.spec import EMBEDDING, FINAL_NORM, HEAD, AttentionSpec, ExpertSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """All of a graph that a file has to say."""

    architecture: str
    layers: tuple[int, ...]
    """By the numbers in the names of their weights, in the order in which this graph has them."""
    gives_logits: bool
    """Else what the head would read."""
    rms_norm_eps: float
    inv_freq: Tensor | None
    """float32 ``[D / 2]``; None where there is no layer."""


def architecture_of(spec: ModelSpec) -> str:
    return "llama4" if spec.experts else "llama"


def moe_step(experts: ExpertSpec) -> int:
    """Every which layer has experts, counted from the first that has."""
    return experts.moe_layers[0] + 1


def period(spec: ModelSpec) -> int:
    """After so many layers the same kinds of layers come again."""
    return math.lcm(LLAMA4_INTERVAL, moe_step(spec.experts)) if spec.experts else 1


def built_in_otherwise(spec: ModelSpec) -> str | None:
    """What llama.cpp has built in for the architecture of ``spec`` and the model has otherwise, in a sentence; None
    where they are one."""
    experts, layers = spec.experts, spec.num_hidden_layers
    known = llama4_attention(layers=layers, experts=experts.num_local_experts) if experts else AttentionSpec()
    if (
        experts and layers < LLAMA4_INTERVAL
    ):  # a mask that nothing reads has no memory, and llama.cpp asserts that it has
        return f"llama.cpp runs no Llama 4 of fewer than {LLAMA4_INTERVAL} layers, this one has {layers}"
    for part in fields(AttentionSpec):
        own, theirs = getattr(spec.attention, part.name), getattr(known, part.name)
        if own != theirs:
            model = f"a Llama 4 of {experts.num_local_experts} experts" if experts else "a dense model"
            return f"llama.cpp has {part.name} {_shown(theirs)} built in for {model}, this one has {_shown(own)}"
    if experts:
        usual = tuple(range(experts.moe_layers[0], layers, moe_step(experts))) if experts.moe_layers else None
        if experts.moe_layers != usual:
            return f"llama.cpp has experts in every so-manieth layer, this one in {_shown(experts.moe_layers)}"
    return None


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def read_decoder(graph: Graph) -> Decoder:
    """Raises LoweringError for a graph that is not the one of the architecture."""
    if why := built_in_otherwise(graph.spec):
        raise LoweringError(why, hint="take another --target for this model")
    walk = _Walk(spec=graph.spec)
    table: Table = {
        "embedding": walk.embedding,
        "rms_norm": walk.rms_norm,
        "linear": walk.linear,
        "silu": lambda x: f"silu({x})",
        "mul": lambda a, b: f"mul({a}, {b})",
        "add": walk.add,
        "attention": walk.attention,
        "head_norm": walk.head_norm,
        "temper": walk.temper,
        "route": lambda logits, count: f"route({logits}, {count})",
        "gate": lambda x, scores, expert: f"gate({x}, {scores}, {expert})",
        EXPERT: walk.expert,
    }
    logits = graph.run(table, {name: name for name in graph.inputs})["logits"]
    normed = _norm(FINAL_NORM, walk.hidden)
    head = _linear(graph.spec.stored_name(HEAD), normed)
    if logits not in (normed, head) or len(walk.epsilons) != 1:
        raise walk.other("its end", str(logits))
    return Decoder(
        architecture=architecture_of(graph.spec),
        layers=tuple(walk.layers),
        gives_logits=logits == head,
        rms_norm_eps=walk.epsilons.pop(),
        inv_freq=walk.inv_freq,
    )


@dataclass(kw_only=True)
class _Walk:
    """Each value of the graph is the text of what makes it, from the hidden states that came into its half of a
    layer."""

    spec: ModelSpec
    hidden: str = ""
    layers: list[int] = field(default_factory=list)
    epsilons: set[float] = field(default_factory=set)
    inv_freq: Tensor | None = None

    def embedding(self, ids: str, weight: Weight) -> str:
        if (ids, weight.name) != ("ids", EMBEDDING):
            raise self.other("the embedding", weight.name)
        self.hidden = "embedded"
        return self.hidden

    def rms_norm(self, x: str, weight: Weight, eps: float) -> str:
        self.epsilons.add(eps)
        return _norm(weight.name, x)

    def linear(self, x: str, weight: Weight) -> str:
        return _linear(weight.name, x)

    def head_norm(self, x: str, head_dim: int, eps: float, weight: Weight | None = None) -> str:
        if head_dim != self.spec.head_dim or weight is not None:
            raise self.other("a norm of heads", f"over {head_dim} channels, with weight {weight}")
        self.epsilons.add(eps)
        return f"head_norm({x})"

    def temper(self, q: str, past_k: str, floor_scale: int, attn_scale: float) -> str:
        attention = self.spec.attention
        if (floor_scale, attn_scale) != (attention.floor_scale, attention.attn_scale):
            raise self.other("a temperature", f"of {floor_scale} positions, {attn_scale}")
        return f"temper({q}, {past_k})"

    def add(self, a: str, b: str) -> str:
        """The residual at the end of either half of a layer, or inside of an expert."""
        if _TOTAL in (a, b):
            return f"add({a}, {b})"
        left, right = (a, b) if a == self.hidden else (b, a)
        found = re.match(r"(?:expert \d+ of )*linear\(model\.layers\.(\d+)\.", right)
        number = int(found[1]) if found else -1
        layer = self.spec.layer_of(f"model.layers.{number}.")
        known = layer is not None and 0 <= layer < self.spec.num_hidden_layers
        attended = self._attended(number, layer) if known and layer is not None else ""
        passed = self._passed(number, layer) if known and layer is not None else ""
        if left != self.hidden or right not in (attended, passed):
            raise self.other(f"layer {number}", right)
        if right == attended:
            self.layers.append(number)
        elif not self.layers or self.layers[-1] != number:
            raise self.other(f"layer {number}", "an MLP without attention")
        self.hidden = f"hidden {len(self.layers)} {'attended' if right == attended else 'done'}"
        return self.hidden

    def attention(
        self, q: str, k: str, v: str, past_k: str, past_v: str, inv_freq: Constant | None, *sizes: Any
    ) -> Sequence[str]:
        spec, layer = self.spec, int(past_k.removeprefix("past_k."))
        chunk = spec.attention.chunk(layer)
        usual = (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim**-0.5, 0, chunk)
        turns = layer not in spec.attention.unrotated_layers
        if turns != (inv_freq is not None) or sizes != usual:
            raise self.other("an attention", f"{'no' if inv_freq is None else 'a'} rotation, heads and scale {sizes}")
        if inv_freq is not None:
            if self.inv_freq is not None and not torch.equal(self.inv_freq, inv_freq.value):
                raise self.other("an attention", "frequencies of its own")
            self.inv_freq = inv_freq.value
        return f"attention({q}, {k}, {v}, {past_k}, {past_v})", "present_k", "present_v"

    def expert(self, x: str, scores: str, total: str, number: int, inside: Callable[..., str]) -> str:
        """All of one at once, from values that are told by their names."""
        found = inside("x", "scores", _TOTAL)
        place = re.search(r"linear\((model\.layers\.\d+\.feed_forward)\.router\.", scores)
        mlp = _mlp(f"{place[1]}.experts.{number}", f"gate(x, scores, {number})") if place else ""
        if found != f"add({_TOTAL}, {mlp})":
            raise self.other(f"expert {number}", found)
        return _expert(number, total, x=x, scores=scores)

    def _attended(self, number: int, layer: int) -> str:
        """What the attention of a layer adds."""
        name, attention = f"model.layers.{number}", self.spec.attention
        normed = _norm(f"{name}.input_layernorm.weight", self.hidden)
        q, k, v = (_linear(f"{name}.self_attn.{kind}_proj.weight", normed) for kind in "qkv")
        turns = layer not in attention.unrotated_layers
        if attention.use_qk_norm and turns:
            q, k = f"head_norm({q})", f"head_norm({k})"
        if attention.floor_scale and not turns:
            q = f"temper({q}, past_k.{layer})"
        return _linear(f"{name}.self_attn.o_proj.weight", f"attention({q}, {k}, {v}, past_k.{layer}, past_v.{layer})")

    def _passed(self, number: int, layer: int) -> str:
        """What the MLP of a layer adds, or its shared expert and all others."""
        name, experts = f"model.layers.{number}", self.spec.experts
        normed = _norm(f"{name}.post_attention_layernorm.weight", self.hidden)
        if experts is None:
            return _mlp(f"{name}.mlp", normed)
        if not self.spec.has_experts(layer):
            return _mlp(f"{name}.feed_forward", normed)
        scores = f"route({_linear(f'{name}.feed_forward.router.weight', normed)}, {experts.num_experts_per_tok})"
        total = _mlp(f"{name}.feed_forward.shared_expert", normed)
        for expert in range(experts.num_local_experts):
            total = _expert(expert, total, x=normed, scores=scores)
        return total

    def other(self, place: str, found: str) -> LoweringError:
        return LoweringError(
            f"llama.cpp's architecture {architecture_of(self.spec)} computes something else: {place} is {found}",
            hint="take another --target for this model",
        )


_TOTAL = "total"
"""What an expert adds to."""


def _norm(weight: str, x: str) -> str:
    return f"rms_norm({weight}, {x})"


def _linear(weight: str, x: str) -> str:
    return f"linear({weight}, {x})"


def _mlp(place: str, x: str) -> str:
    gate, up = (_linear(f"{place}.{kind}_proj.weight", x) for kind in ("gate", "up"))
    return _linear(f"{place}.down_proj.weight", f"mul(silu({gate}), {up})")


def _expert(number: int, total: str, *, x: str, scores: str) -> str:
    return f"expert {number} of {total} by ({x}, {scores})"
