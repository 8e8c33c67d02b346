"""What llama.cpp computes for the architecture ``llama``: its own graph (``src/models/llama.cpp``), so that ours is not
translated but held against it, and what it has to be told is read off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from exporter.errors import LoweringError
from exporter.model.graph import Constant, Graph, Table, Weight
from exporter.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """All of a graph that a file has to say."""

    layers: tuple[int, ...]
    """By the numbers in the names of their weights, in the order in which this graph has them."""
    gives_logits: bool
    """Else what the head would read."""
    rms_norm_eps: float
    inv_freq: Tensor | None
    """float32 ``[D / 2]``; None where there is no layer."""


def read_decoder(graph: Graph) -> Decoder:
    """Raises LoweringError for a graph that is not the one of the architecture."""
    walk = _Walk(spec=graph.spec)
    table: Table = {
        "embedding": walk.embedding,
        "rms_norm": walk.rms_norm,
        "linear": walk.linear,
        "silu": lambda x: f"silu({x})",
        "mul": lambda a, b: f"mul({a}, {b})",
        "add": walk.add,
        "attention": walk.attention,
    }
    logits = graph.run(table, {name: name for name in graph.inputs})["logits"]
    normed = _norm(FINAL_NORM, walk.hidden)
    head = _linear(graph.spec.stored_name(HEAD), normed)
    if logits not in (normed, head) or len(walk.epsilons) != 1:
        raise _other("its end", str(logits))
    return Decoder(
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
            raise _other("the embedding", weight.name)
        self.hidden = "embedded"
        return self.hidden

    def rms_norm(self, x: str, weight: Weight, eps: float) -> str:
        self.epsilons.add(eps)
        return _norm(weight.name, x)

    def linear(self, x: str, weight: Weight) -> str:
        return _linear(weight.name, x)

    def add(self, a: str, b: str) -> str:
        """The residual at the end of either half of a layer."""
        left, right = (a, b) if a == self.hidden else (b, a)
        found = re.match(r"linear\(model\.layers\.(\d+)\.", right)
        index = int(found[1]) if found else -1
        attended = _attention(index, self.hidden, cache=self.spec.layer_of(f"model.layers.{index}."))
        if left != self.hidden or right not in (attended, _mlp(index, self.hidden)):
            raise _other(f"layer {index}", right)
        if right == attended:
            self.layers.append(index)
        elif not self.layers or self.layers[-1] != index:
            raise _other(f"layer {index}", "an MLP without attention")
        self.hidden = f"hidden {len(self.layers)} {'attended' if 'attention' in right else 'done'}"
        return self.hidden

    def attention(
        self, q: str, k: str, v: str, past_k: str, past_v: str, inv_freq: Constant | None, *sizes: Any
    ) -> Sequence[str]:
        spec = self.spec
        usual = (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim**-0.5, 0, 0)
        if inv_freq is None or sizes != usual:
            raise _other("an attention", f"{'no' if inv_freq is None else 'a'} rotation, heads and scale {sizes}")
        if self.inv_freq is not None and not torch.equal(self.inv_freq, inv_freq.value):
            raise _other("an attention", "frequencies of its own")
        self.inv_freq = inv_freq.value
        return f"attention({q}, {k}, {v}, {past_k}, {past_v})", "present_k", "present_v"


def _norm(weight: str, x: str) -> str:
    return f"rms_norm({weight}, {x})"


def _linear(weight: str, x: str) -> str:
    return f"linear({weight}, {x})"


def _attention(index: int, hidden: str, *, cache: int | None) -> str:
    layer = f"model.layers.{index}"
    normed = _norm(f"{layer}.input_layernorm.weight", hidden)
    q, k, v = (_linear(f"{layer}.self_attn.{kind}_proj.weight", normed) for kind in "qkv")
    return _linear(f"{layer}.self_attn.o_proj.weight", f"attention({q}, {k}, {v}, past_k.{cache}, past_v.{cache})")


def _mlp(index: int, hidden: str) -> str:
    layer = f"model.layers.{index}"
    normed = _norm(f"{layer}.post_attention_layernorm.weight", hidden)
    gate, up = (_linear(f"{layer}.mlp.{kind}_proj.weight", normed) for kind in ("gate", "up"))
    return _linear(f"{layer}.mlp.down_proj.weight", f"mul(silu({gate}), {up})")


def _other(place: str, found: str) -> LoweringError:
    return LoweringError(
        f"llama.cpp's architecture llama computes something else: {place} is {found}",
        hint="take another --target for this model",
    )
