"""The vision transformer of Llama 4 in plain torch, with Hugging Face's tensor names: from a tile of an image to the
states that stand in the place of tokens. It is traced, and never holds a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporter.model.image_ops import add_position, append, pad_states, patch_attention, patches, pixel_shuffle
from exporter.model.rope import patch_angles
from exporter.model.vision import VisionMLP
from exporter.spec import FusionSpec, ModelSpec


class _PatchEmbedding(nn.Module):
    def __init__(self, fusion: FusionSpec) -> None:
        super().__init__()
        self.size = fusion.patch_size
        self.linear = nn.Linear(fusion.num_channels * self.size**2, fusion.hidden_size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.linear(patches(pixels, self.size))


class _SelfAttention(nn.Module):
    """Rows of queries and keys are in the order of Llama, pairs of channels (i, i + D/2): ``checkpoint.llama4``."""

    def __init__(self, fusion: FusionSpec) -> None:
        super().__init__()
        self.heads, size = fusion.num_attention_heads, fusion.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(patch_attention(q, k, v, angles, self.heads))


class _Layer(nn.Module):
    def __init__(self, fusion: FusionSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(fusion.hidden_size)
        self.self_attn = _SelfAttention(fusion)
        self.post_attention_layernorm = nn.LayerNorm(fusion.hidden_size)
        self.mlp = VisionMLP(fusion)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Encoder(nn.Module):
    def __init__(self, fusion: FusionSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(fusion) for _ in range(fusion.num_hidden_layers))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, angles)
        return x


class _AdapterMLP(nn.Module):
    def __init__(self, fusion: FusionSpec) -> None:
        super().__init__()
        size = fusion.projector_output_dim
        self.fc1 = nn.Linear(fusion.intermediate_size, size, bias=False)
        self.fc2 = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.fc2(nn.functional.gelu(self.fc1(x))))


class _Adapter(nn.Module):
    def __init__(self, fusion: FusionSpec) -> None:
        super().__init__()
        self.step = fusion.shuffle_step
        self.mlp = _AdapterMLP(fusion)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(pixel_shuffle(x, self.step))


class _VisionModel(nn.Module):
    def __init__(self, fusion: FusionSpec) -> None:
        super().__init__()
        size, self.count = fusion.hidden_size, fusion.side**2
        self.patch_embedding = _PatchEmbedding(fusion)
        self.class_embedding = nn.Parameter(torch.empty(size))
        self.positional_embedding_vlm = nn.Parameter(torch.empty(self.count + 1, size))
        self.layernorm_pre, self.layernorm_post = (nn.LayerNorm(size) for _ in range(2))
        self.model = _Encoder(fusion)
        self.vision_adapter = _Adapter(fusion)

    def forward(self, pixels: Tensor, angles: Tensor) -> Tensor:
        x = append(self.patch_embedding(pixels), self.class_embedding)  # [M, N + 1, H]
        x = self.layernorm_pre(add_position(x, self.positional_embedding_vlm))
        x = self.layernorm_post(self.model(x, angles))
        return self.vision_adapter(pad_states(x, self.count))


class _Projector(nn.Module):
    def __init__(self, spec: ModelSpec, fusion: FusionSpec) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(fusion.projector_output_dim, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_1(x)


class FusedVision(nn.Module):
    """The pixels of a tile ``[1, 1, C, S, S]`` -> states ``[1, N, H]`` of the decoder."""

    def __init__(self, spec: ModelSpec, fusion: FusionSpec) -> None:
        super().__init__()
        self.vision_model = _VisionModel(fusion)
        self.multi_modal_projector = _Projector(spec, fusion)
        angles = patch_angles(side=fusion.side, head_dim=fusion.head_dim, theta=fusion.rope_theta)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.multi_modal_projector(self.vision_model(pixels, self.angles))
