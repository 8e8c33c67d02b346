"""LoRA adapters as PEFT writes them, merged into the tensors of their base as these are read.

``adapter_config.json`` and ``adapter_model.safetensors``: for a matrix W of the base two factors A ``[r, K]`` and B
``[N, r]``, and W + s B A in its place, with s = alpha / r, or alpha / sqrt(r) of rank-stabilised ones (Hu et al. 2021,
arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.checkpoint import llama4, mllama
from exporter.checkpoint.config import integer_of, number_of, read_json
from exporter.checkpoint.huggingface import map_pickle, map_safetensors
from exporter.checkpoint.tensors import LazyTensor, refuse_codes
from exporter.errors import InputError
from exporter.spec import EMBEDDING, HEAD, VISION, ModelSpec

CONFIG = "adapter_config.json"
_FILES = {"adapter_model.safetensors": map_safetensors, "adapter_model.bin": map_pickle}
_LAYOUT = f"name a folder that PEFT has written: {CONFIG}, adapter_model.safetensors"

_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "alora_invocation_tokens": (None,),
}
"""Fields that would change what is merged, and the values that do not; a field that is absent has the first."""

_FACTOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?")
_PREFIX = "base_model.model."
_SAVED = re.compile(r"\.(modules_to_save|base_layer)(?=\.)")
"""In names of what was saved whole: a module that was trained so, or the base's embedding beside its factors."""


@dataclass(frozen=True, slots=True)
class MergedTensor:
    """A matrix of the base with what an adapter adds to it."""

    base: LazyTensor
    down: LazyTensor
    """A, ``[r, K]``"""
    up: LazyTensor
    """B, ``[N, r]``"""
    scale: float
    config: Path
    is_table: bool
    """Of an embedding, whose rows are looked up: A is ``[r, V]``, B ``[H, r]``, and their product is transposed."""

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*self.base.files, *self.down.files, *self.up.files, self.config)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def read(self) -> Tensor:
        """float32: the base's own dtype would round away what little an adapter adds."""
        added = self.up.read().float() @ self.down.read().float()
        return self.base.read().float() + self.scale * (added.T if self.is_table else added)


def with_adapter(tensors: Mapping[str, LazyTensor], spec: ModelSpec, folder: Path) -> dict[str, LazyTensor]:
    """``tensors`` of a base with the adapter in ``folder`` merged in; what it adds to parts that look at images goes
    with these (``leaves_out``). Raises InputError for one that is none, that adds in a way that is not known, or to
    another model."""
    config = _read_config(folder)
    merged, pairs = dict(tensors), dict[str, dict[str, LazyTensor]]()
    found = _adapter_tensors(folder)
    taken = {stored: tensor for stored, tensor in found.items() if not _is_left_out(stored, spec)}
    if found and not taken:
        raise InputError(
            f"{folder} changes only what looks at images, which is left out",
            hint="add --images, or leave --adapter out",
        )
    for stored, tensor in taken.items():
        name = stored.removeprefix(_PREFIX)
        if spec.experts:
            _refuse_stack(name, stored, folder)
        factor = _FACTOR.fullmatch(name)
        if factor:
            pairs.setdefault(factor[1], {})[factor[2]] = tensor
        else:
            place = _base_name(_SAVED.sub("", name), stored, tensors, spec, folder)
            merged[place] = _of_shape(_in_order(place, tensor, spec), tensors[place].shape, stored, folder)
    for module, factors in pairs.items():
        name = _base_name(f"{module}.weight", module, tensors, spec, folder)
        merged[name] = _merge(name, module, _factors_in_order(name, factors, spec), merged[name], config, folder)
    if merged == dict(tensors):
        raise InputError(f"{folder} changes nothing", hint=_LAYOUT)
    if spec.tie_word_embeddings and merged[EMBEDDING] is not tensors[EMBEDDING]:
        raise InputError(
            f"{folder} changes the embedding, which the model ties to its head: it was trained with the head as it was",
            hint="merge it with PEFT into a model whose tie_word_embeddings is false, and name that",
        )
    return merged


def leaves_out(folder: Path, spec: ModelSpec) -> bool:
    """Whether an adapter adds to what ``spec`` leaves out of the model. Raises InputError."""
    return any(_is_left_out(stored, spec) for stored in _adapter_tensors(folder))


def _is_left_out(stored: str, spec: ModelSpec) -> bool:
    name = _renamed(stored.removeprefix(_PREFIX), spec)
    if spec.layer_numbers:
        return mllama.is_left_out(name, spec)
    return spec.experts is not None and spec.fusion is None and name.startswith(VISION)


def _renamed(name: str, spec: ModelSpec) -> str:
    """Of what PEFT calls ``name``, our name: it has those of transformers' modules, of whatever release."""
    if spec.experts:
        return name.removeprefix(llama4.TEXT)
    return mllama.renamed(name) if spec.layer_numbers else name


def _in_order(name: str, whole: LazyTensor, spec: ModelSpec) -> LazyTensor:
    if spec.experts:
        return llama4.in_order(name, whole, spec)
    return mllama.in_order(name, whole, spec) if spec.layer_numbers else whole


def _factors_in_order(name: str, factors: Mapping[str, LazyTensor], spec: ModelSpec) -> dict[str, LazyTensor]:
    """B has the rows of its matrix, which are in another order in a Llama 4, A the columns, which are so in a Llama 3.2
    Vision."""
    ordered = "B" if spec.experts else "A"
    return {kind: _in_order(name, factor, spec) if kind == ordered else factor for kind, factor in factors.items()}


def _refuse_stack(name: str, stored: str, folder: Path) -> None:
    if re.search(r"\.feed_forward\.experts\.(base_layer\.|lora_|gate_up_proj|down_proj)", name):
        raise InputError(
            f"{folder}: {stored} adds to experts that lie stacked, which is not known; known: attention, "
            "feed_forward and shared_expert, the router, embedding and head",
            hint="merge this adapter with PEFT (merge_and_unload), and name the folder of the merged model",
        )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"adapter {folder} is no folder", hint=_LAYOUT)
    path = folder / CONFIG
    config = read_json(path, missing=_LAYOUT)
    for field, known in _ONLY.items():
        if config.get(field, known[0]) not in known:
            raise InputError(
                f"{path}: {field} is {config[field]!r}; known: {', '.join(str(value) for value in known)}",
                hint="merge this adapter with PEFT (merge_and_unload), and name the folder of the merged model",
            )
    integer_of(path, config, "r")
    number_of(path, config, "lora_alpha")
    for field, read in (("rank_pattern", integer_of), ("alpha_pattern", number_of)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{path}: {field} is {patterns!r}, an object was expected", hint=_LAYOUT)
        for pattern in patterns:
            read(path, patterns, pattern)
    return config


def _adapter_tensors(folder: Path) -> dict[str, LazyTensor]:
    for name, read in _FILES.items():
        if (folder / name).exists():
            found = read(folder / name)
            refuse_codes(found)
            return found
    raise InputError(f"{folder} has neither {' nor '.join(_FILES)}", hint=_LAYOUT)


def _base_name(stored: str, told: str, tensors: Mapping[str, LazyTensor], spec: ModelSpec, folder: Path) -> str:
    name = _renamed(stored, spec)
    if name == HEAD and HEAD not in tensors:
        raise InputError(
            f"{folder}: {told} changes the head alone, but the model ties it to its embedding",
            hint="merge this adapter with PEFT (merge_and_unload), and name the folder of the merged model",
        )
    if name not in tensors:
        raise InputError(
            f"{folder}: {told} belongs to no tensor of the checkpoint",
            hint="take the adapter's own base model: adapter_config.json names it in base_model_name_or_path",
        )
    return name


def _of_shape(tensor: LazyTensor, wanted: tuple[int, ...], told: str, folder: Path) -> LazyTensor:
    if tensor.shape != wanted:
        raise InputError(
            f"{folder}: {told} has shape {list(tensor.shape)}, the checkpoint wants {list(wanted)}",
            hint="take the adapter's own base model: adapter_config.json names it in base_model_name_or_path",
        )
    return tensor


def _merge(
    name: str, module: str, factors: Mapping[str, LazyTensor], base: LazyTensor, config: Mapping[str, Any], folder: Path
) -> LazyTensor:
    is_table = "embedding_A" in factors or "embedding_B" in factors
    kinds = ("embedding_A", "embedding_B") if is_table else ("A", "B")
    if set(factors) != set(kinds):
        raise InputError(f"{folder}: {module} has {', '.join(factors)} of {', '.join(kinds)}", hint=_LAYOUT)
    down, up = (factors[kind] for kind in kinds)
    rank, alpha = _setting(config, module, "rank_pattern", "r"), _setting(config, module, "alpha_pattern", "lora_alpha")
    rows, columns = reversed(base.shape) if is_table else base.shape
    _of_shape(down, (int(rank), columns), f"{module}.lora_{kinds[0]}", folder)
    _of_shape(up, (rows, int(rank)), f"{module}.lora_{kinds[1]}", folder)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return MergedTensor(base=base, down=down, up=up, scale=scale, config=folder / CONFIG, is_table=is_table)


def _setting(config: Mapping[str, Any], module: str, patterns: str, usual: str) -> float:
    """PEFT's rank or alpha of one module: that of the first pattern that is the end of its name, or the usual one."""
    try:
        found = [
            value
            for pattern, value in (config.get(patterns) or {}).items()
            if re.fullmatch(rf"(.*\.)?({pattern})", module)
        ]
    except (re.error, RecursionError) as error:
        raise InputError(f"{patterns} of {CONFIG} has what is no pattern: {error}", hint=_LAYOUT) from error
    return float(found[0] if found else config[usual])
