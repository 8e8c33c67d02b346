"""The Llama decoder in plain torch, with Hugging Face's tensor names. It is traced, and never holds a weight."""

from __future__ import annotations

from torch import Tensor, nn

from exporter.model.ops import attention
from exporter.model.rope import inverse_frequencies
from exporter.spec import ModelSpec


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, spec.hidden_size, bias=False)

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        context, present_k, present_v = attention(
            q, k, v, past_k, past_v, inv_freq, self.heads, self.kv_heads, self.head_dim**-0.5
        )
        return self.o_proj(context), present_k, present_v


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)
        self.mlp = MLP(spec)

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context, present_k, present_v = self.self_attn(self.input_layernorm(x), past_k, past_v, inv_freq)
        x = x + context
        return x + self.mlp(self.post_attention_layernorm(x)), present_k, present_v


class Decoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.num_hidden_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_norm_eps)

    def forward(
        self, ids: Tensor, past_k: list[Tensor], past_v: list[Tensor], inv_freq: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x = self.embed_tokens(ids)
        presents_k, presents_v = [], []
        for layer, k, v in zip(self.layers, past_k, past_v, strict=True):
            x, present_k, present_v = layer(x, k, v, inv_freq)
            presents_k.append(present_k)
            presents_v.append(present_v)
        return self.norm(x), presents_k, presents_v


class Llama(nn.Module):
    """ids int64 ``[1, T]``, L caches ``[1, KV, P, D]`` of keys and of values -> logits ``[1, T, V]``, grown caches."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.model = Decoder(spec)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.register_buffer("inv_freq", inverse_frequencies(spec.rope, head_dim=spec.head_dim), persistent=False)

    def forward(
        self, ids: Tensor, past_k: list[Tensor], past_v: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, presents_k, presents_v = self.model(ids, past_k, past_v, self.inv_freq)
        return self.lm_head(x), presents_k, presents_v
