"""Rotary position embedding: frequencies from a RopeSpec, tables from frequencies, and the rotation itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporter.spec import RopeKind, RopeSpec


def inverse_frequencies(rope: RopeSpec, *, head_dim: int) -> Tensor:
    """Radians per position of each pair of channels, scaling folded in: float32 ``[head_dim / 2]`` on the CPU.

    Computed in float32 in the order of operations of transformers, and so bit-equal to it: at position 2,048 one
    unit in the last place of a frequency is already 1e-4 radians. ``llama3``: wavelengths longer than
    ``original / low_freq_factor`` are stretched by ``factor``, those shorter than ``original / high_freq_factor``
    kept, those between blended linearly (``apply_scaling`` in Meta's Llama 3.1 reference code). ``factors``: divided by
    them (``ggml_rope_ext`` of llama.cpp).
    """
    with torch.device("cpu"):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        plain = 1.0 / (rope.theta**exponents)
        if rope.kind is RopeKind.DEFAULT:
            return plain
        if rope.kind is RopeKind.LINEAR:
            return plain / rope.factor
        if rope.kind is RopeKind.FACTORS:
            return plain / torch.tensor(rope.factors)
        original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
        wavelengths = 2 * math.pi / plain
        stretched = torch.where(wavelengths > original / low, plain / rope.factor, plain)
        smooth = (original / wavelengths - low) / (high - low)
        blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
        between = (wavelengths >= original / high) & (wavelengths <= original / low)
        return torch.where(between, blended, stretched)


def rope_table(inv_freq: Tensor, *, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions ``first .. first + count``: two float32 ``[count, D/2]``."""
    angles = torch.outer(torch.arange(first, first + count, dtype=torch.float32), inv_freq)
    return angles.cos(), angles.sin()


def patch_angles(*, side: int, head_dim: int, theta: float) -> Tensor:
    """By how much each pair of channels of a tile's states is turned: float32 ``[side * side + 1, head_dim / 2]`` on
    the CPU. Half of the pairs turn by the column of a patch, the others by its row, both counted from 1; the state
    behind the patches, which has no place, not at all (transformers, ``Llama4VisionRotaryEmbedding``)."""
    with torch.device("cpu"):
        frequencies = inverse_frequencies(RopeSpec(theta=theta), head_dim=head_dim // 2)
        places = torch.arange(1, side + 1).float()
        turns = torch.outer(places, frequencies)  # [side, D/4]
        grid = torch.cat([turns.expand(side, -1, -1), turns.unsqueeze(1).expand(-1, side, -1)], dim=2)
        return torch.cat([grid.flatten(0, 1), torch.zeros(1, head_dim // 2)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Frequencies as llama.cpp is told them: those of the base, divided."""

    scale: float
    """By which all frequencies are divided."""
    factors: Tensor | None
    """By which each of them is divided on top, float32 ``[D / 2]``."""


def rotation_of(inv_freq: Tensor, rope: RopeSpec) -> Rotation:
    """Of the frequencies ``[D / 2]`` that a graph turns by; ``rope`` has their base."""
    plain = inverse_frequencies(RopeSpec(theta=rope.theta), head_dim=2 * len(inv_freq))
    if torch.equal(inv_freq, plain):
        return Rotation(scale=1.0, factors=None)
    if torch.equal(inv_freq, inverse_frequencies(rope, head_dim=2 * len(inv_freq))):
        if rope.kind is RopeKind.LINEAR:
            return Rotation(scale=rope.factor, factors=None)
        if rope.kind is RopeKind.FACTORS:
            return Rotation(scale=1.0, factors=torch.tensor(rope.factors))
    return Rotation(scale=1.0, factors=plain / inv_freq)


def recurrent_table(inv_freq: Tensor, rope: RopeSpec, *, first: int, count: int) -> tuple[Tensor, Tensor]:
    """``rope_table`` with the roundings of ggml (``ggml_rope_cache_init`` of ggml-cpu/ops.cpp): a pair's angle is that
    of the pair before it times one number, in float32, and only then divided."""
    rotation = rotation_of(inv_freq, rope)
    step = np.float32(math.pow(rope.theta, -1.0 / len(inv_freq)))
    steps = np.full((count, len(inv_freq)), step, dtype=np.float32)
    steps[:, 0] = np.arange(first, first + count, dtype=np.float32)
    angles = torch.from_numpy(np.multiply.accumulate(steps, axis=1))
    if rotation.factors is not None:
        angles = angles / rotation.factors
    angles = angles * float(np.float32(1.0) / np.float32(rotation.scale))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of ``x`` ``[..., T, D]`` by the angles of ``[T, D/2]`` tables."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
