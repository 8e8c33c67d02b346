"""The vision transformer of Llama 3.2 Vision in plain torch, with Hugging Face's tensor names: from the tiles of an
image to the keys and values of every layer that looks at it. It is traced, and never holds a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporter.model.image_ops import (
    add_position,
    add_tile_position,
    as_heads,
    pad_states,
    patches,
    prepend,
    tanh_gate,
    tile_attention,
)
from exporter.model.ops import head_norm
from exporter.spec import LAYERS, FusionSpec, ImageSpec, ModelSpec

PADDED_TO = 8
"""States of a tile are padded to a multiple of this."""


class _Gated(nn.Module):
    """Tensors that are no layer's own: a table, and the gate before it."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class _Table(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


class _TilePosition(_Gated):
    def __init__(self, images: ImageSpec) -> None:
        super().__init__(gate=(1,))
        self.embedding = _Table(len(images.supported_aspect_ratios) + 1, images.max_num_tiles * images.hidden_size)

    def forward(self, x: Tensor, ratio: Tensor) -> Tensor:
        return add_tile_position(x, ratio, self.embedding.weight, self.gate)


class _Position(_Gated):
    def __init__(self, images: ImageSpec) -> None:
        states, size = images.tile_states, images.hidden_size
        super().__init__(gate=(1,), embedding=(states, size))
        ids = len(images.supported_aspect_ratios) + 1
        self.tile_embedding = _Table(ids, images.max_num_tiles * states * size)

    def forward(self, x: Tensor, ratio: Tensor) -> Tensor:
        x = add_position(x, self.embedding, self.gate)
        return add_tile_position(x, ratio, self.tile_embedding.weight, self.gate)


class _SelfAttention(nn.Module):
    def __init__(self, images: ImageSpec) -> None:
        super().__init__()
        self.heads, self.states = images.attention_heads, images.tile_states
        size = images.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x: Tensor, tiles: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(tile_attention(q, k, v, tiles, self.states, self.heads))


class VisionMLP(nn.Module):
    def __init__(self, images: ImageSpec | FusionSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(images.hidden_size, images.intermediate_size)
        self.fc2 = nn.Linear(images.intermediate_size, images.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, images: ImageSpec, *, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.input_layernorm = nn.LayerNorm(images.hidden_size, eps=images.norm_eps)
        self.self_attn = _SelfAttention(images)
        self.post_attention_layernorm = nn.LayerNorm(images.hidden_size, eps=images.norm_eps)
        self.mlp = VisionMLP(images)
        if gated:
            self.gate_attn, self.gate_ffn = (nn.Parameter(torch.empty(1)) for _ in range(2))

    def forward(self, x: Tensor, tiles: Tensor) -> Tensor:
        context = self.self_attn(self.input_layernorm(x), tiles)
        x = x + (tanh_gate(context, self.gate_attn) if self.gated else context)
        inside = self.mlp(self.post_attention_layernorm(x))
        return x + (tanh_gate(inside, self.gate_ffn) if self.gated else inside)


class _Encoder(nn.Module):
    def __init__(self, images: ImageSpec, count: int, *, gated: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(images, gated=gated) for _ in range(count))

    def forward(self, x: Tensor, tiles: Tensor) -> list[Tensor]:
        """The states behind each layer."""
        states = []
        for layer in self.layers:
            x = layer(x, tiles)
            states.append(x)
        return states


class _VisionModel(_Gated):
    def __init__(self, images: ImageSpec) -> None:
        super().__init__(class_embedding=(images.hidden_size,))
        self.images = images
        pixels = images.num_channels * images.patch_size**2
        self.patch_embedding = nn.Linear(pixels, images.hidden_size, bias=False)
        self.gated_positional_embedding = _Position(images)
        self.pre_tile_positional_embedding = _TilePosition(images)
        self.post_tile_positional_embedding = _TilePosition(images)
        self.layernorm_pre, self.layernorm_post = (nn.LayerNorm(images.hidden_size) for _ in range(2))
        self.transformer = _Encoder(images, images.num_hidden_layers, gated=False)
        self.global_transformer = _Encoder(images, images.num_global_layers, gated=True)

    def forward(self, pixels: Tensor, ratio: Tensor, tiles: Tensor) -> Tensor:
        images = self.images
        x = self.patch_embedding(patches(pixels, images.patch_size))  # [M, N - 1, H]
        x = prepend(self.pre_tile_positional_embedding(x, ratio), self.class_embedding)
        x = self.layernorm_pre(self.gated_positional_embedding(x, ratio))
        x = pad_states(x, -(-images.tile_states // PADDED_TO) * PADDED_TO)
        local = [x, *self.transformer(x, tiles)]  # by the layer that reads them
        x = self.post_tile_positional_embedding(self.layernorm_post(local[-1]), ratio)
        kept = [self.global_transformer(x, tiles)[-1], *(local[index] for index in images.intermediate_layers_indices)]
        return pad_states(torch.cat(kept, dim=-1), images.tile_states)


class _Crossing(nn.Module):
    """Of a layer of the decoder that looks at images, what gives keys and values."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.eps, self.kv_heads, self.head_dim = spec.rms_norm_eps, spec.num_key_value_heads, spec.head_dim
        self.k_proj = nn.Linear(spec.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.k_norm = nn.RMSNorm(self.head_dim)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        keys = head_norm(self.k_proj(states), self.head_dim, self.eps, self.k_norm.weight)
        return as_heads(keys, self.kv_heads), as_heads(self.v_proj(states), self.kv_heads)


class Vision(nn.Module):
    """pixels ``[1, M, C, S, S]``, the id of the aspect ratio int64 ``[1, 1]``, which tiles there are int64
    ``[1, 1, M]`` -> keys and values ``[1, KV, M*N, D]`` for each layer that looks at the image."""

    def __init__(self, spec: ModelSpec, images: ImageSpec) -> None:
        super().__init__()
        self.vision_model = _VisionModel(images)
        self.multi_modal_projector = nn.Linear(images.output_size, spec.hidden_size)
        self.crossing = nn.ModuleDict({str(number): _Crossing(spec) for number in images.cross_attention_layers})

    def forward(self, pixels: Tensor, ratio: Tensor, tiles: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        states = self.multi_modal_projector(self.vision_model(pixels, ratio, tiles))
        pairs = [layer(states) for layer in self.crossing.values()]
        return [keys for keys, _ in pairs], [values for _, values in pairs]


def stored_name(parameter: str) -> str:
    """The weight that a parameter of ``Vision`` is."""
    place, _, rest = parameter.partition(".")
    if place != "crossing":
        return parameter
    number, _, rest = rest.partition(".")
    return f"{LAYERS}{number}.cross_attn.{rest}"
