"""Llama 3.2 Vision in Meta's layout: what ``params.json`` says of images, and a shard's tensors of images under the
names and in the shapes of Hugging Face.

meta-llama/llama-models, models/llama3/multimodal/model.py and encoder_utils.py, whose hooks tell how what was released
is loaded; transformers, models/mllama/convert_mllama_weights_to_hf.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint.config import count_of, integer_of, read_images
from exporter.checkpoint.tensors import LazyTensor, ViewedTensor
from exporter.errors import InputError
from exporter.spec import ImageSpec, ModelSpec

COUNT = "vision_num_cross_attention_layers"
"""The field of params.json by which a model is known that sees images."""
FIELDS = {COUNT, "vision_chunk_size", "vision_max_num_chunks"}

TEXT, LEARNABLE = "text_model.", "learnable_embedding.weight"
"""The second: rows of the embedding behind those of the vocabulary."""
_HIDDEN_SIZE = 1280
"""Of the vision transformer, where no shard tells it."""
_TILES, _MLP_RATIO, _STATES = 4, 4, 6
"""The last: states of each patch that the projector takes, side by side. ``CrossAttentionTransformerVision``."""
_CHECK = "check params.json against the original model's"

_ENCODER = "vision_model.vision_encoder."
_CLASS = f"{_ENCODER}class_embedding"
_CROSSING = {
    "gate_attn": "cross_attn_attn_gate",
    "gate_ffwd": "cross_attn_mlp_gate",
    "attention_norm.weight": "input_layernorm.weight",
    **{f"attention.w{letter}.weight": f"cross_attn.{letter}_proj.weight" for letter in "qkvo"},
    **{f"attention.{letter}_norm.weight": f"cross_attn.{letter}_norm.weight" for letter in "qk"},
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_BLOCK = {
    **{f"attn.w{letter}": f"self_attn.{letter}_proj" for letter in "qkvo"},
    **{"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"},
}
_POSITIONS, _TILE_POSITIONS = "gated_positional_embedding.embedding", "gated_positional_embedding.tile_embedding.weight"
_OF_ENCODER = {
    "conv1._linear.weight": "patch_embedding.weight",
    "class_embedding": "class_embedding",
    "positional_embedding": _POSITIONS,
    "gated_positional_embedding": _TILE_POSITIONS,
    "gated_positional_embedding_gate": "gated_positional_embedding.gate",
    **{f"{place}_tile_pos_embed.gate": f"{place}_tile_positional_embedding.gate" for place in ("pre", "post")},
    **{
        f"{place}_tile_pos_embed.embedding": f"{place}_tile_positional_embedding.embedding.weight"
        for place in ("pre", "post")
    },
    **{f"ln_{place}.{part}": f"layernorm_{place}.{part}" for place in ("pre", "post") for part in ("weight", "bias")},
}


def cross_attention_layers(path: Path, params: Mapping[str, Any]) -> tuple[int, ...]:
    """Their numbers among all layers. ``n_layers`` are the others; from the last one backwards there is one before
    every so many of these (``_init_fusion_schedule``). Raises InputError."""
    own, count = count_of(path, params, "n_layers"), count_of(path, params, COUNT)
    if count > own:
        raise InputError(f"{path}: {COUNT} is {count}, n_layers ({own}) at most was expected", hint=_CHECK)
    before = range(own - 1, -1, own // -count)[:count]
    return tuple(layer + index for index, layer in enumerate(reversed(before)))


def images_of(path: Path, params: Mapping[str, Any], shard: Mapping[str, LazyTensor], *, vocab_size: int) -> ImageSpec:
    """What ``params.json`` leaves out is as in both releases, but for the width, which the class embedding of the first
    ``shard`` tells. Raises InputError."""
    tiles = integer_of(path, {"vision_max_num_chunks": _TILES, **params}, "vision_max_num_chunks")
    if tiles != _TILES:
        raise InputError(f"{path}: vision_max_num_chunks is {tiles}; known: {_TILES}", hint=_CHECK)
    hidden = math.prod(shard[_CLASS].shape) if _CLASS in shard else _HIDDEN_SIZE
    crossing = cross_attention_layers(path, params)
    config = {
        **{"hidden_size": hidden, "intermediate_size": _MLP_RATIO * hidden, "vision_output_dim": _STATES * hidden},
        "image_size": integer_of(path, params, "vision_chunk_size"),
    }
    return read_images(
        path,
        {"vision_config": config, "image_token_index": vocab_size},
        {"cross_attention_layers": list(crossing)},
        layers=count_of(path, params, "n_layers") + len(crossing),
    )


def layer_numbers(images: ImageSpec, *, layers: int) -> tuple[int, ...]:
    """Of ``layers`` of the decoder's own, as Hugging Face counts them among those that look at images."""
    crossing = images.cross_attention_layers
    return tuple(number for number in range(layers + len(crossing)) if number not in crossing)


def apart(shard: Mapping[str, LazyTensor], spec: ModelSpec) -> dict[str, LazyTensor]:
    """The tensors of one shard: those of text as other releases of Meta's call them, but for the numbers of layers, the
    rest, if ``spec`` sees, as Hugging Face does. What is not known stays as it is called."""
    found: dict[str, LazyTensor] = {}
    for stored, tensor in shard.items():
        if stored.startswith((f"{TEXT}cross_attention_layers.", "vision_model.")):
            if spec.images:
                name = _seeing_name(stored, spec.images)
                found[name] = _table(name, tensor, spec.images)
            continue
        name = stored.removeprefix(TEXT)
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        known = layer and int(layer[1]) < len(spec.layer_numbers)
        found[f"layers.{spec.layer_numbers[int(layer[1])]}.{layer[2]}" if layer and known else name] = tensor
    return found


def _seeing_name(stored: str, images: ImageSpec) -> str:
    crossing = re.fullmatch(rf"{re.escape(TEXT)}cross_attention_layers\.(\d+)\.(.+)", stored)
    if crossing:
        known = crossing[2] in _CROSSING and int(crossing[1]) < len(images.cross_attention_layers)
        if not known:
            return stored
        return f"model.layers.{images.cross_attention_layers[int(crossing[1])]}.{_CROSSING[crossing[2]]}"
    name = stored.removeprefix(_ENCODER)
    block = re.fullmatch(r"((?:global_)?transformer)\.resblocks\.(\d+)\.(.+)", name)
    if block:
        return f"vision_model.{block[1]}.layers.{block[2]}.{block_name(block[3])}"
    if name in _OF_ENCODER:
        return f"vision_model.{_OF_ENCODER[name]}"
    return stored.replace("vision_model.vision_projection.", "multi_modal_projector.")


def block_name(part: str) -> str:
    """Of a tensor of a layer of the vision transformer; what is not known stays as it is called."""
    module, _, kind = part.rpartition(".")
    return f"{_BLOCK[module]}.{kind}" if module in _BLOCK else part


def _table(name: str, tensor: LazyTensor, images: ImageSpec) -> LazyTensor:
    """A table of positions by the ids of aspect ratios, which is stored by the places of tiles, and for another size of
    tiles than the model's where it was trained with such. Of other shapes than that it stays as it is."""
    shape, states, hidden = tensor.shape, images.tile_states, images.hidden_size
    if name.endswith(f".{_POSITIONS}") and len(shape) == 2 and _is_grid(shape[0]):
        return (
            tensor if shape[0] == states else ViewedTensor(tensor, (states, hidden), partial(_resized, images=images))
        )
    by_place = len(shape) == 4 and shape[0] == shape[1] == images.max_num_tiles and shape[3] == hidden
    if by_place and name.endswith((f".{_TILE_POSITIONS}", "_tile_positional_embedding.embedding.weight")):
        of_patches = name.endswith(f".{_TILE_POSITIONS}")
        count = states if of_patches else 1
        if shape[2] == count or (of_patches and _is_grid(shape[2])):
            rows = len(images.supported_aspect_ratios) + 1
            size = images.max_num_tiles * count * hidden
            return ViewedTensor(tensor, (rows, size), partial(_by_ratio, images=images, states=count))
    return tensor


def _is_grid(states: int) -> bool:
    """Whether they are those of a square of patches, and the class's."""
    return states > 1 and math.isqrt(states - 1) ** 2 == states - 1


def _by_ratio(table: Tensor, *, images: ImageSpec, states: int) -> Tensor:
    """``[M, M, N, H]`` by rows and columns of tiles -> ``[ids, M*N*H]``: of each ratio its tiles one row after another,
    zeros for those that it has not. The first id is that of no image."""
    if table.shape[2] != states:
        table = _stretched(table, images)
    found = table.new_zeros(len(images.supported_aspect_ratios) + 1, images.max_num_tiles, *table.shape[2:])
    for index, (high, wide) in enumerate(images.supported_aspect_ratios, start=1):
        found[index, : high * wide] = table[:high, :wide].flatten(0, 1)
    return found.flatten(1)


def _resized(table: Tensor, *, images: ImageSpec) -> Tensor:
    """``[N, H]`` of one size of tiles as those of another (``resize_local_position_embedding``)."""
    return _stretched(table[None, None], images)[0, 0]


def _stretched(table: Tensor, images: ImageSpec) -> Tensor:
    """``[M, M, N, H]`` by rows and columns of tiles, their patches resized as one picture, bilinear with corners on
    corners; the class's states stay (``resize_global_position_embedding``)."""
    high, wide, states, hidden = table.shape
    old, new = math.isqrt(states - 1), images.image_size // images.patch_size
    patches = table[:, :, 1:].float().view(high, wide, old, old, hidden)
    picture = patches.permute(4, 0, 2, 1, 3).reshape(1, hidden, high * old, wide * old)
    picture = torch.nn.functional.interpolate(
        picture, size=(high * new, wide * new), mode="bilinear", align_corners=True
    )
    patches = picture.view(hidden, high, new, wide, new).permute(1, 3, 2, 4, 0).reshape(high, wide, new * new, hidden)
    return torch.cat([table[:, :, :1], patches.to(table.dtype)], dim=2)
