"""Llama 3.2 Vision's tensors as they lie in Hugging Face layout -> those of our graphs, for text alone without all that
looks at an image."""

from __future__ import annotations

import math
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
_PATCHES, _PROJECTOR = "vision_model.patch_embedding.weight", "multi_modal_projector.weight"


def as_in_llama(found: Mapping[str, LazyTensor], spec: ModelSpec) -> dict[str, LazyTensor]:
    """``found`` under the names of ``spec.weights``; nothing is read before its tensor is."""
    tensors: dict[str, LazyTensor] = {}
    for stored, tensor in found.items():
        name = _renamed(stored)
        if spec.images is None and (name.startswith(VISION) or _looks_at_images(name, spec)):
            continue
        if name == _PROJECTOR and spec.images:
            view = partial(_side_by_side, images=spec.images)
            tensors[name] = ViewedTensor(tensor, tensor.shape, view) if len(tensor.shape) == 2 else tensor
        elif name == _PATCHES and len(tensor.shape) == 4:  # a convolution whose steps are as wide as its kernel
            tensors[name] = ViewedTensor(tensor, (tensor.shape[0], math.prod(tensor.shape[1:])), _flat)
        else:
            tensors[name] = tensor
    return tensors


def _renamed(stored: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if stored.startswith(prefix)), "")
    return _PREFIXES.get(prefix, "") + stored.removeprefix(prefix)


def _looks_at_images(name: str, spec: ModelSpec) -> bool:
    return name.startswith(LAYERS) and spec.layer_of(name) is None


def _side_by_side(columns: Tensor, images: ImageSpec) -> Tensor:
    """Columns for the channels of each layer's states one layer after another, where transformers has, behind those of
    the last layer, the layers of each channel side by side."""
    last, others = columns[:, : images.hidden_size], columns[:, images.hidden_size :]
    layers = len(images.intermediate_layers_indices)
    return torch.cat([last, others.unflatten(1, (-1, layers)).transpose(1, 2).flatten(1)], dim=1)


def _flat(kernels: Tensor) -> Tensor:
    return kernels.flatten(1)
