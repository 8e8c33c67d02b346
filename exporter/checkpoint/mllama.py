"""Llama 3.2 Vision's tensors as they lie in Hugging Face layout -> those of our graphs, for text alone without all that
looks at an image."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from exporter.checkpoint.tensors import LazyTensor, ViewedTensor
from exporter.spec import LAYERS, VISION, ImageSpec, ModelSpec

_PREFIXES = {
    "language_model.": "",  # released
    "model.language_model.": "model.",  # transformers 5 in memory
    **{f"model.{name}": name for name in VISION},
}
_OF_LAYER = re.compile(rf"{re.escape(LAYERS)}\d+\.")
_PATCHES, _PROJECTOR = "vision_model.patch_embedding.weight", "multi_modal_projector.weight"


def as_in_llama(found: Mapping[str, LazyTensor], spec: ModelSpec) -> dict[str, LazyTensor]:
    """``found`` under the names of ``spec.weights``, of text alone without all that looks at images."""
    names = {stored: renamed(stored) for stored in found}
    return {name: found[stored] for stored, name in names.items() if not is_left_out(name, spec)}


def renamed(stored: str) -> str:
    """One of our names for one of any release of transformers; one that is not known stays as it is."""
    prefix = next((prefix for prefix in _PREFIXES if stored.startswith(prefix)), "")
    return _PREFIXES.get(prefix, "") + stored.removeprefix(prefix)


def is_left_out(name: str, spec: ModelSpec) -> bool:
    """Whether what is called ``name`` looks at images, and ``spec`` is of text alone. Layers that look have numbers
    that none of the decoder's own has, and no attention of the text to itself."""
    if spec.images:
        return False
    looks = _OF_LAYER.match(name) and spec.layer_of(name) is None and ".self_attn." not in name
    return bool(looks) or name.startswith(VISION)


def in_order(name: str, tensor: LazyTensor, spec: ModelSpec) -> LazyTensor:
    """``tensor`` of the weight ``name``, or the factor of it that has its columns, with columns in our order. Codes of
    the projector are decoded: no group of them stays together."""
    if name == _PROJECTOR and spec.images and len(tensor.shape) == 2:
        return ViewedTensor(tensor, tensor.shape, partial(_side_by_side, images=spec.images))
    if name == _PATCHES and len(tensor.shape) == 4:  # a convolution whose steps are as wide as its kernel
        return ViewedTensor(tensor, (tensor.shape[0], math.prod(tensor.shape[1:])), _flat)
    return tensor


def _side_by_side(columns: Tensor, images: ImageSpec) -> Tensor:
    """Columns for the channels of each layer's states one layer after another, where transformers has, behind those of
    the last layer, the layers of each channel side by side."""
    last, others = columns[:, : images.hidden_size], columns[:, images.hidden_size :]
    layers = len(images.intermediate_layers_indices)
    return torch.cat([last, others.unflatten(1, (-1, layers)).transpose(1, 2).flatten(1)], dim=1)


def _flat(kernels: Tensor) -> Tensor:
    return kernels.flatten(1)
