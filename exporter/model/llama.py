"""The Llama decoder in plain torch, with Hugging Face's tensor names. It is traced, and never holds a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporter.model.image_ops import cross_attention, fuse, tanh_gate, where_seen
from exporter.model.ops import attention, experts, head_norm, route, spread, temper
from exporter.model.rope import inverse_frequencies
from exporter.spec import ModelSpec


class AdaptedLinear(nn.Linear):
    """A linear with what an adapter adds to it (Hu et al. 2021, arXiv:2106.09685), its scale multiplied into B."""

    def __init__(self, columns: int, rows: int, rank: int) -> None:
        super().__init__(columns, rows, bias=False)
        self.lora_A = nn.Linear(columns, rank, bias=False)
        self.lora_B = nn.Linear(rank, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x))


def linear(spec: ModelSpec, columns: int, rows: int) -> nn.Linear:
    rank = spec.adapter_rank
    return AdaptedLinear(columns, rows, rank) if rank else nn.Linear(columns, rows, bias=False)


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.rotary = layer not in spec.attention.unrotated_layers
        self.chunk = spec.attention.chunk(layer)
        self.norm_eps = spec.rms_norm_eps if spec.attention.use_qk_norm and self.rotary else None
        self.floor_scale = 0 if self.rotary else spec.attention.floor_scale
        self.attn_scale = spec.attention.attn_scale
        self.q_proj = linear(spec, spec.hidden_size, self.heads * self.head_dim)
        self.k_proj = linear(spec, spec.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = linear(spec, spec.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = linear(spec, self.heads * self.head_dim, spec.hidden_size)

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.norm_eps is not None:  # before the rotation, which leaves the length of a head as it is
            q, k = head_norm(q, self.head_dim, self.norm_eps), head_norm(k, self.head_dim, self.norm_eps)
        if self.floor_scale:
            q = temper(q, past_k, self.floor_scale, self.attn_scale)
        context, present_k, present_v = attention(
            *(q, k, v, past_k, past_v, inv_freq if self.rotary else None),
            *(self.heads, self.kv_heads, self.head_dim**-0.5),
            chunk=self.chunk,
        )
        return self.o_proj(context), present_k, present_v


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = linear(spec, spec.hidden_size, intermediate)
        self.up_proj = linear(spec, spec.hidden_size, intermediate)
        self.down_proj = linear(spec, intermediate, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """Experts, but for their weights: see ``exporter.model.ops.experts``."""

    def __init__(self, spec: ModelSpec, *, count: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(spec.hidden_size, count, bias=False)
        self.shared_expert = MLP(spec, spec.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return experts(x, route(self.router(x), self.chosen), self.shared_expert(x))


def _feed_forward(spec: ModelSpec, layer: int) -> nn.Module:
    if spec.experts is None:
        return MLP(spec, spec.intermediate_size)
    if not spec.has_experts(layer):
        return MLP(spec, spec.experts.intermediate_size_mlp)
    return Mixture(spec, count=spec.experts.num_local_experts, chosen=spec.experts.num_experts_per_tok)


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.self_attn = Attention(spec, index)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.named = "feed_forward" if spec.experts else "mlp"
        self.add_module(self.named, _feed_forward(spec, index))

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context, present_k, present_v = self.self_attn(self.input_layernorm(x), past_k, past_v, inv_freq)
        x = x + context
        return x + self.get_submodule(self.named)(self.post_attention_layernorm(x)), present_k, present_v


class CrossAttention(nn.Module):
    """Without what gives keys and values, which are computed once for an image (``exporter.model.vision``)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.eps = spec.rms_norm_eps
        self.q_proj = nn.Linear(spec.hidden_size, self.heads * self.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, spec.hidden_size, bias=False)

    def forward(self, x: Tensor, cross_k: Tensor, cross_v: Tensor, tiles: Tensor) -> Tensor:
        q = head_norm(self.q_proj(x), self.head_dim, self.eps, self.q_norm.weight)
        sizes = (self.heads, self.kv_heads, self.head_dim**-0.5)
        return self.o_proj(cross_attention(q, cross_k, cross_v, tiles, *sizes))


class CrossAttentionLayer(nn.Module):
    """What a decoder layer is to the text, to images."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.cross_attn = CrossAttention(spec)
        self.cross_attn_attn_gate = nn.Parameter(torch.empty(1))
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.mlp = MLP(spec, spec.intermediate_size)
        self.cross_attn_mlp_gate = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, cross_k: Tensor, cross_v: Tensor, tiles: Tensor) -> Tensor:
        context = self.cross_attn(self.input_layernorm(x), cross_k, cross_v, tiles)
        x = x + tanh_gate(context, self.cross_attn_attn_gate)
        inside = where_seen(self.mlp(self.post_attention_layernorm(x)), tiles)
        return x + tanh_gate(inside, self.cross_attn_mlp_gate)


Images = tuple[Tensor, list[Tensor], list[Tensor]]
"""Which tiles of all images each token sees, bool ``[1, T, M]``, and what layers that look at them have as keys and
values, ``[1, KV, M*N, D]`` each."""

Fused = tuple[Tensor, Tensor]
"""States of images ``[1, T, H]``, and which tokens they stand in the place of, bool ``[1, T]``."""


class Decoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.num_embeddings, spec.hidden_size)
        numbers = spec.layer_numbers or range(spec.num_hidden_layers)
        layers: dict[int, nn.Module] = {number: DecoderLayer(spec, index) for index, number in enumerate(numbers)}
        if spec.images:
            layers |= {number: CrossAttentionLayer(spec) for number in spec.images.cross_attention_layers}
        self.layers = nn.ModuleDict({str(number): layers[number] for number in sorted(layers)})
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)

    def forward(
        self,
        ids: Tensor,
        past_k: list[Tensor],
        past_v: list[Tensor],
        inv_freq: Tensor,
        images: Images | None,
        fused: Fused | None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = self.embed_tokens(ids)
        if fused:
            x = fuse(x, *fused)
        presents_k, presents_v = [], []
        pasts = zip(past_k, past_v, strict=True)
        tiles, *crossed = images or (None, [], [])
        states = zip(*crossed, strict=True)
        for layer in self.layers.values():
            if isinstance(layer, CrossAttentionLayer):
                x = layer(x, *next(states), tiles)
                continue
            x, present_k, present_v = layer(x, *next(pasts), inv_freq)
            presents_k.append(present_k)
            presents_v.append(present_v)
        return self.norm(x), presents_k, presents_v


class Llama(nn.Module):
    """ids int64 ``[1, T]``, L caches ``[1, KV, P, D]`` of keys and of values -> logits ``[1, T, V]``, grown caches. One
    that looks at images has these as a fourth argument, one that reads their states among tokens as a fifth."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.model = Decoder(spec)
        self.vocab_size = spec.vocab_size
        self.lm_head = nn.Linear(spec.hidden_size, len(spec.head_tokens) or spec.vocab_size, bias=False)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("inv_freq", inverse_frequencies(spec.rope, head_dim=spec.head_dim), persistent=False)
        self.head_tokens: Tensor | None
        tokens = torch.tensor(spec.head_tokens, device="cpu") if spec.head_tokens else None
        self.register_buffer("head_tokens", tokens, persistent=False)

    def forward(
        self,
        ids: Tensor,
        past_k: list[Tensor],
        past_v: list[Tensor],
        images: Images | None = None,
        fused: Fused | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, presents_k, presents_v = self.model(ids, past_k, past_v, self.inv_freq, images, fused)
        logits = self.lm_head(x)
        if self.head_tokens is not None:
            logits = spread(logits, self.head_tokens, self.vocab_size)
        return logits, presents_k, presents_v
