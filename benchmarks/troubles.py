"""The same model, harder to quantize: checkpoints whose function is that of another, and whose weights are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from calibration.anatomy import dissect
from exporter.checkpoint import Checkpoint
from exporter.model.eager import eager_table
from exporter.model.graph import Graph
from exporter.spec import EMBEDDING, FINAL_NORM, HEAD

SHARE, FACTOR = 0.03, 20.0
"""Of the channels, and by how much: the outliers that a few channels of trained Llamas have (Dettmers et al. 2022,
arXiv:2208.07339), as one would inject them."""

Weights = dict[str, Tensor]


def scaled_channels(weights: Weights, graph: Graph, _windows: Tensor) -> Weights:
    """3 % of the channels between two linears, or a norm and a linear, are multiplied by 20 where they are made and
    divided by 20 where they are read."""
    generator = torch.Generator().manual_seed(0)
    for index in range(graph.spec.num_hidden_layers):
        for group in dissect(graph, index).groups:
            if group.fold is None:
                continue
            columns = weights[group.linears[0]].shape[1]
            factors = torch.where(torch.rand(columns, generator=generator) < SHARE, FACTOR, 1.0)
            factors = group.fold.tie(factors)
            for name in group.linears:
                weights[name] = weights[name] / factors
            source = weights[group.fold.source]
            made = group.fold.source_factors(factors)
            weights[group.fold.source] = source * (made if source.dim() == 1 else made.unsqueeze(1))
    return weights


def rotated_residual(weights: Weights, graph: Graph, windows: Tensor) -> Weights:
    """The residual stream is turned onto the principal axes of what the linears read of it, so that few channels hold
    most of the energy. The norms' weights go into those linears first, since a rotation does not commute with them;
    the head then is a matrix of its own."""
    spec = graph.spec
    weights[HEAD] = weights.get(HEAD, weights[EMBEDDING]) * weights[FINAL_NORM]
    weights[FINAL_NORM] = torch.ones_like(weights[FINAL_NORM])
    layers = [dissect(graph, index) for index in range(spec.num_hidden_layers)]
    readers = [
        [group for group in layer.groups if group.fold and group.fold.source.endswith("norm.weight")]
        for layer in layers
    ]
    for group in (group for of_layer in readers for group in of_layer):
        assert group.fold is not None
        for name in group.linears:
            weights[name] = weights[name] * weights[group.fold.source]
        weights[group.fold.source] = torch.ones(spec.hidden_size)
    energy = torch.zeros(spec.hidden_size, spec.hidden_size)
    hidden = weights[EMBEDDING][windows]
    table = eager_table(lambda weight: weights[weight.name])
    sizes = {"head_dim": spec.head_dim, "kv_heads": spec.num_key_value_heads}
    for layer, groups in zip(layers, readers, strict=True):
        *read, hidden = layer.compute([*(group.input for group in groups), layer.output], table, hidden, **sizes)
        for x in (value.flatten(0, 1) for value in read):
            energy += x.T @ x / len(x)
    rotation = torch.linalg.eigh(energy)[1]
    for name in (EMBEDDING, HEAD, *(name for of_layer in readers for group in of_layer for name in group.linears)):
        weights[name] = weights[name] @ rotation
    for name in (name for layer in layers for group in layer.groups if group.residual for name in group.linears):
        weights[name] = rotation.T @ weights[name]
    return weights


TROUBLES: Mapping[str, Callable[[Weights, Graph, Tensor], Weights]] = {
    "as trained": lambda weights, _graph, _windows: weights,
    "scaled channels": scaled_channels,
    "rotated residual": rotated_residual,
}


@torch.no_grad()
def write_checkpoint(trouble: str, checkpoint: Checkpoint, graph: Graph, windows: Tensor, folder: Path) -> None:
    """``checkpoint`` in float32 with that trouble, in Hugging Face layout."""
    weights = {name: checkpoint.read(name).float() for name in checkpoint.spec.weights()}
    weights = TROUBLES[trouble](weights, graph, windows)
    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.folder.glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": HEAD not in weights}, indent=2))
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
