"""``config.json`` and ``generation_config.json`` -> ModelSpec, refusing whatever the graph would not honour."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import InputError
from exporter.spec import ModelSpec, RopeKind, RopeSpec

_ROPE_KEYS = {
    RopeKind.DEFAULT: set(),
    RopeKind.LINEAR: {"factor"},
    RopeKind.LLAMA3: {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""The parameters each kind of RoPE scaling takes, all of them required."""

_COPY_AGAIN = "copy the file from the checkpoint again"
_LAYOUT = (
    "name a folder in Hugging Face layout (config.json, *.safetensors, tokenizer.json) or Meta's (params.json, "
    "consolidated.*.pth, tokenizer.model), or a .gguf file"
)

_ONLY = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
}
"""Config fields of which only these values are known; a field that is absent has its usual value, the first."""


def read_json(path: Path, *, missing: str = _LAYOUT, broken: str = _COPY_AGAIN) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError where there is none, with the hint for its case."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}", hint=missing) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}", hint=broken) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, an object was expected", hint=broken)
    return content


def read_spec(folder: Path) -> ModelSpec:
    """The ModelSpec of a folder in Hugging Face layout. Raises InputError with the field, its value and those known."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(f"checkpoint {folder}: found {found}, a folder was expected", hint=_LAYOUT)
    path = folder / "config.json"
    several = sorted(file.name for file in folder.glob("*.gguf"))
    config = read_json(path, missing=f"name one of {', '.join(several)}" if several else _LAYOUT)
    for field, known in _ONLY.items():
        if config.get(field, known[0]) not in known:
            raise _unknown(
                path, field, config[field], known=[value for value in known if value is not None] or ["none"]
            )
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise _unknown(path, "architectures", architectures, known=[["LlamaForCausalLM"]])
    heads = integer_of(path, config, "num_attention_heads")
    hidden = integer_of(path, config, "hidden_size")
    if not config.get("head_dim") and hidden % heads:
        raise InputError(
            f"{path}: hidden_size ({hidden}) is not divisible by num_attention_heads ({heads}), there is no head_dim",
            hint="add head_dim to config.json",
        )
    bos, eos = _special_tokens(folder, config)
    try:
        return ModelSpec(
            name=folder.resolve().name,
            vocab_size=integer_of(path, config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer_of(path, config, "intermediate_size"),
            num_hidden_layers=integer_of(path, config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_position_embeddings=integer_of(path, config, "max_position_embeddings"),
            rms_norm_eps=number_of(path, config, "rms_norm_eps"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            rope=_read_rope(path, config),
            bos_token_id=bos,
            eos_token_ids=eos,
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}", hint="check config.json against the original model's") from error


def _read_rope(path: Path, config: Mapping[str, Any]) -> RopeSpec:
    """RoPE in either spelling: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (Meta)."""
    modern, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if modern and scaling:
        raise InputError(
            f"{path} has both rope_parameters and rope_scaling, one of them was expected",
            hint="remove the one that is not the model's",
        )
    field = "rope_parameters" if modern else "rope_scaling"
    parameters = dict(modern or scaling or {})
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta", 10_000.0)
    spelled = [parameters.pop(key) for key in ("rope_type", "type") if key in parameters] or ["default"]
    if any(kind != spelled[0] for kind in spelled) or spelled[0] not in set(_ROPE_KEYS):
        raise _unknown(path, f"{field}.rope_type", spelled[0], known=[kind.value for kind in _ROPE_KEYS])
    kind = RopeKind(spelled[0])
    unknown, missing = parameters.keys() - _ROPE_KEYS[kind], _ROPE_KEYS[kind] - parameters.keys()
    if unknown:
        known = sorted(_ROPE_KEYS[kind] | {"rope_type", "rope_theta"})
        raise _unknown(path, f"{field} (of kind {kind})", ", ".join(sorted(unknown)), known=known)
    if missing:
        raise InputError(
            f"{path}: {field} of kind {kind} lacks {', '.join(sorted(missing))}",
            hint="copy config.json from the original model",
        )
    numbers: dict[str, Any] = {key: number_of(path, parameters, key) for key in parameters}
    return RopeSpec(theta=number_of(path, {"rope_theta": theta}, "rope_theta"), kind=kind, **numbers)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int | None, tuple[int, ...]]:
    """The begin token, and every stop token: ``generation_config.json`` first, then ``config.json``."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    stops = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token, int) for token in stops):
        raise InputError(
            f"{folder}: eos_token_id is {eos!r}, a token id or a list of them was expected",
            hint="correct generation_config.json",
        )
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    return bos, tuple(stops)


def integer_of(path: Path, config: Mapping[str, Any], field: str) -> int:
    """A positive integer of the description at ``path``. Raises InputError."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _wrong_number(path, field, value, wanted="a positive integer")
    return value


def number_of(path: Path, config: Mapping[str, Any], field: str) -> float:
    """A positive number of the description at ``path``. Raises InputError."""
    value = config.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _wrong_number(path, field, value, wanted="a positive number")
    return float(value)


def _wrong_number(path: Path, field: str, value: object, *, wanted: str) -> InputError:
    found = "missing" if value is None else repr(value)
    return InputError(
        f"{path}: {field} is {found}, {wanted} was expected", hint=f"check {path.name} against the original model's"
    )


def _unknown(path: Path, field: str, value: object, *, known: list[Any]) -> InputError:
    return InputError(
        f"{path}: {field} is {value!r}; known: {', '.join(str(value) for value in known)}",
        hint="only dense Llama text models in plain precision are supported",
    )
