"""``config.json`` and ``generation_config.json`` -> ModelSpec, refusing whatever the graph would not honour."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import InputError
from exporter.spec import MOST, AttentionSpec, ExpertSpec, FusionSpec, ImageSpec, ModelSpec, RopeKind, RopeSpec

_ROPE_KEYS = {
    RopeKind.DEFAULT: set(),
    RopeKind.LINEAR: {"factor"},
    RopeKind.LLAMA3: {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""The parameters each kind of RoPE scaling takes, all of them required."""

_FULL, _CHUNKED = "full_attention", "chunked_attention"

_COPY_AGAIN = "copy the file from the checkpoint again"
_LAYOUT = (
    "name a folder in Hugging Face layout (config.json, *.safetensors, tokenizer.json) or Meta's (params.json, "
    "consolidated.*.pth, tokenizer.model), or a .gguf file"
)

OF_IMAGES = "this model reads images too: they are left out, its text part is taken"
OF_IMAGES_TAKEN = f"{OF_IMAGES}; --images takes them"

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",  # text_config beside vision_config
    "mllama": "MllamaForConditionalGeneration",  # the same
}
"""By model_type."""

_TEXT_CONFIGS = {"llama4": "llama4_text", "mllama": "mllama_text_model"}
"""Of a model_type that has its text_config inside, the model_type of that."""

IMAGE_TOKENS = 8
"""Rows that Llama 3.2 Vision's embedding has behind those of the vocabulary (transformers, ``MllamaTextModel``)."""

_MLLAMA_TEXT: dict[str, Any] = {
    **{"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 40},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0},
    **{"max_position_embeddings": 131_072, "bos_token_id": 128_000, "eos_token_id": 128_001},
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}
_MLLAMA_VISION: dict[str, Any] = {
    **{"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_global_layers": 8},
    **{"attention_heads": 16, "num_channels": 3, "image_size": 448, "patch_size": 14, "norm_eps": 1e-5},
    **{"max_num_tiles": 4, "vision_output_dim": 7680, "hidden_act": "gelu"},
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
}
"""What transformers' ``MllamaTextConfig`` and ``MllamaVisionConfig`` have where a released config.json says nothing."""

_LLAMA4_VISION: dict[str, Any] = {
    **{"hidden_size": 768, "intermediate_size": 5632, "num_hidden_layers": 34, "num_attention_heads": 16},
    **{"num_channels": 3, "image_size": 448, "patch_size": 14, "vision_output_dim": 7680, "hidden_act": "gelu"},
    **{"projector_input_dim": 4096, "projector_output_dim": 4096, "pixel_shuffle_ratio": 0.5, "rope_theta": 10_000.0},
    "vision_feature_select_strategy": "default",
}
"""The same of ``Llama4VisionConfig``."""

_VISION_SIZES = ("hidden_size", "intermediate_size", "attention_heads", "num_channels", "image_size", "patch_size")
_VISION_COUNTS = ("num_hidden_layers", "num_global_layers", "max_num_tiles")

_ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
}
"""Config fields of which only these values are known; a field that is absent has its usual value, the first."""

_DENSE = {"format": "dense"}
_QUANTIZATIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {"checkpoint_format": ("gptq", "gptq_v2"), "bits": (4, 8), "is_marlin_format": (False, None)},
    "awq": {"version": ("gemm", "GEMM"), "bits": (4,)},
    "compressed-tensors": {
        "format": ("pack-quantized", "int-quantized"),
        "quantization_status": ("compressed", "frozen"),
        "kv_cache_scheme": (None,),
        "transform_config": (None, {}),
        "sparsity_config": (None, {}, _DENSE),
    },
}
"""By ``quant_method``: fields of which only these values are known; one that is absent has the first."""


def read_json(path: Path, *, missing: str = _LAYOUT, broken: str = _COPY_AGAIN) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError where there is none, with the hint for its case."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}", hint=missing) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of 4,301 digits
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
    known_types = list(_ARCHITECTURES)
    model_type = config.get("model_type", "llama")
    if model_type not in known_types:
        raise _unknown(path, "model_type", model_type, known=known_types)
    architecture = [_ARCHITECTURES[model_type]]
    if (architectures := config.get("architectures") or architecture) != architecture:
        raise _unknown(path, "architectures", architectures, known=[architecture])
    whole = config
    if model_type in _TEXT_CONFIGS:
        config = _text_config(path, config, kind=_TEXT_CONFIGS[model_type])
    sees = model_type == "mllama"
    if sees:
        config = {**_MLLAMA_TEXT, **config}
    for field, known in _ONLY.items():
        if config.get(field, known[0]) not in known:
            raise _unknown(
                path, field, config[field], known=[value for value in known if value is not None] or ["none"]
            )
    read_quantization(path, config)
    heads = integer_of(path, config, "num_attention_heads")
    hidden = integer_of(path, config, "hidden_size")
    if not config.get("head_dim") and hidden % heads:
        raise InputError(
            f"{path}: hidden_size ({hidden}) is not divisible by num_attention_heads ({heads}), there is no head_dim",
            hint="add head_dim to config.json",
        )
    bos, eos = _special_tokens(folder, config)
    layers = count_of(path, config, "num_hidden_layers")
    images = read_images(path, whole, config, layers=layers) if sees else None
    own = tuple(layer for layer in range(layers) if not images or layer not in images.cross_attention_layers)
    fusion = read_fusion(path, whole) if model_type == "llama4" else None
    is_dense = model_type in ("llama", "mllama")
    if not is_dense:
        config = {"rope_theta": 500_000.0, "head_dim": 128, **config}  # Llama4TextConfig of transformers
    try:
        return ModelSpec(
            name=folder.resolve().name,
            vocab_size=integer_of(path, config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=integer_of(path, config, "intermediate_size"),
            num_hidden_layers=len(own),
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            max_position_embeddings=integer_of(path, config, "max_position_embeddings"),
            rms_norm_eps=number_of(path, config, "rms_norm_eps"),
            tie_word_embeddings=_truth_of(path, config, "tie_word_embeddings"),
            rope=_read_rope(path, config),
            bos_token_id=bos,
            eos_token_ids=eos,
            attention=AttentionSpec() if is_dense else _read_attention(path, config, layers=layers),
            experts=None if is_dense else _read_experts(path, config, layers=layers),
            images=images,
            fusion=fusion,
            layer_numbers=own if images else (),
            extra_embeddings=IMAGE_TOKENS if images else 0,
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}", hint="check config.json against the original model's") from error


def leaves_out(folder: Path) -> str | None:
    """What of a model the spec knows nothing of, in a sentence."""
    config = read_json(folder / "config.json")
    if config.get("model_type") not in _TEXT_CONFIGS:
        return None
    return OF_IMAGES_TAKEN if config.get("vision_config") else OF_IMAGES


def _text_config(path: Path, config: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
    text = config.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", kind) != kind:
        raise _unknown(path, "text_config", text, known=[f"an object of model_type {kind}"])
    outside = {field: config[field] for field in ("quantization_config", "tie_word_embeddings") if field in config}
    return {**outside, **text}


def read_images(path: Path, whole: Mapping[str, Any], text: Mapping[str, Any], *, layers: int) -> ImageSpec:
    """Of a Llama 3.2 Vision; what is absent has the value of transformers' ``MllamaVisionConfig``. ``text`` tells
    ``cross_attention_layers``, of ``layers`` in all. Raises InputError."""
    found = whole.get("vision_config")
    if not isinstance(found, dict):
        raise _unknown(path, "vision_config", found, known=["an object"])
    config = {**_MLLAMA_VISION, **{field: value for field, value in found.items() if value is not None}}
    if config["hidden_act"] != "gelu":
        raise _unknown(path, "vision_config.hidden_act", config["hidden_act"], known=["gelu"])
    crossing = text["cross_attention_layers"]
    if not _are_layers(crossing, layers) or len(set(crossing)) == layers:
        raise _unknown(path, "cross_attention_layers", crossing, known=[f"a list of some of 0 to {layers - 1}"])
    ratios, indices = config["supported_aspect_ratios"], config["intermediate_layers_indices"]
    pairs = isinstance(ratios, list) and all(isinstance(ratio, list) and len(ratio) == 2 for ratio in ratios)
    if not pairs or not all(_are_counts(ratio) for ratio in ratios):
        raise _unknown(path, "supported_aspect_ratios", ratios, known=["a list of pairs of positive integers"])
    sizes = {field: integer_of(path, config, field) for field in _VISION_SIZES}
    sizes |= {field: count_of(path, config, field) for field in _VISION_COUNTS}
    if not _are_layers(indices, sizes["num_hidden_layers"]):
        known = f"a list of some of 0 to {sizes['num_hidden_layers'] - 1}"
        raise _unknown(path, "intermediate_layers_indices", indices, known=[known])
    try:
        images = ImageSpec(
            cross_attention_layers=tuple(sorted(crossing)),
            image_token_id=integer_of(path, {"image_token_index": 128_256, **whole}, "image_token_index"),
            norm_eps=number_of(path, config, "norm_eps"),
            intermediate_layers_indices=tuple(indices),
            supported_aspect_ratios=tuple((high, wide) for high, wide in ratios),
            **sizes,
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}", hint=f"check {path.name} against the original model's") from error
    if config["vision_output_dim"] != images.output_size:
        raise _unknown(path, "vision_output_dim", config["vision_output_dim"], known=[images.output_size])
    return images


def read_fusion(path: Path, whole: Mapping[str, Any]) -> FusionSpec | None:
    """Of a Llama 4; None of one whose description tells of no images. Raises InputError."""
    found = whole.get("vision_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise _unknown(path, "vision_config", found, known=["an object"])
    config = {**_LLAMA4_VISION, **{field: value for field, value in found.items() if value is not None}}
    rope = config.get("rope_parameters", {})
    config |= {"rope_theta": rope.get("rope_theta", config["rope_theta"])} if isinstance(rope, dict) else {}
    for field, known in (("hidden_act", "gelu"), ("vision_feature_select_strategy", "default")):
        if config[field] != known:
            raise _unknown(path, f"vision_config.{field}", config[field], known=[known])
    projected = integer_of(path, config, "projector_output_dim")
    for field in ("projector_input_dim", "vision_output_dim"):  # one chain of matrices
        if config[field] != projected:
            raise _unknown(path, f"vision_config.{field}", config[field], known=[projected])
    ratio = number_of(path, config, "pixel_shuffle_ratio")
    if ratio > 1 or (1 / ratio) % 1:
        raise _unknown(path, "vision_config.pixel_shuffle_ratio", ratio, known=["1, 1/2, 1/4, ..."])
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_channels", "image_size", "patch_size")
    try:
        return FusionSpec(
            image_token_id=integer_of(path, {"image_token_index": 200_092, **whole}, "image_token_index"),
            num_hidden_layers=count_of(path, config, "num_hidden_layers"),
            rope_theta=number_of(path, config, "rope_theta"),
            shuffle_step=round(1 / ratio),
            projector_output_dim=projected,
            **{field: integer_of(path, config, field) for field in sizes},
        )
    except ValueError as error:
        raise InputError(f"{path}: {error}", hint=f"check {path.name} against the original model's") from error


def _are_counts(values: list[Any]) -> bool:
    return all(type(value) is int and value > 0 for value in values)


def _are_layers(values: Any, layers: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < layers for value in values)


def _read_attention(path: Path, config: Mapping[str, Any], *, layers: int) -> AttentionSpec:
    """Of a Llama 4; what is absent has the value of transformers' ``Llama4TextConfig``."""
    interval = integer_of(path, {"no_rope_layer_interval": 4, **config}, "no_rope_layer_interval")
    usual = [int((layer + 1) % interval != 0) for layer in range(layers)]
    rotated = _by_layer(path, config, "no_rope_layers", usual, known=[0, 1], layers=layers)
    kinds = [_FULL, _CHUNKED]
    types = _by_layer(path, config, "layer_types", [kinds[flag] for flag in rotated], known=kinds, layers=layers)
    chunked = tuple(layer for layer, kind in enumerate(types) if kind == _CHUNKED)
    # Some releases have the number 4 for true.
    tuned = bool(config.get("attn_temperature_tuning", True))
    scales = {"floor_scale": 8192, "attn_scale": 0.1, **config}
    return AttentionSpec(
        attention_chunk_size=integer_of(path, {"attention_chunk_size": 8192, **config}, "attention_chunk_size")
        if chunked
        else 0,
        chunked_layers=chunked,
        unrotated_layers=tuple(layer for layer, flag in enumerate(rotated) if not flag),
        use_qk_norm=bool(config.get("use_qk_norm", True)),
        floor_scale=integer_of(path, scales, "floor_scale") if tuned else 0,
        attn_scale=number_of(path, scales, "attn_scale") if tuned else 0.0,
    )


def _by_layer(
    path: Path, config: Mapping[str, Any], field: str, usual: list[Any], *, known: list[Any], layers: int
) -> list[Any]:
    """One value for each layer; more than there are layers are passed over."""
    values = config.get(field) or usual
    if not isinstance(values, list) or len(values) < layers or any(value not in known for value in values):
        raise _unknown(path, field, values, known=[f"a list of {layers} values out of {known}"])
    return values[:layers]


def _read_experts(path: Path, config: Mapping[str, Any], *, layers: int) -> ExpertSpec:
    step = integer_of(path, {"interleave_moe_layer_step": 1, **config}, "interleave_moe_layer_step")
    own = config.get("moe_layers")
    chosen = list(range(step - 1, layers, step)) if own is None else own
    if not _are_layers(chosen, layers):
        raise _unknown(path, "moe_layers", chosen, known=[f"a list of layers, 0 to {layers - 1}"])
    return ExpertSpec(
        num_local_experts=count_of(path, config, "num_local_experts"),
        num_experts_per_tok=integer_of(path, {"num_experts_per_tok": 1, **config}, "num_experts_per_tok"),
        moe_layers=tuple(sorted(set(chosen))),
        intermediate_size_mlp=integer_of(path, config, "intermediate_size_mlp"),
    )


def read_quantization(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the weights were quantized, as the ``config`` at ``path`` says; None where they are floats. Raises InputError
    for what cannot be read, with what can."""
    found = config.get("quantization_config") or config.get("compression_config")
    if found is None:
        return None
    if not isinstance(found, dict):
        raise _unknown(path, "quantization_config", found, known=["an object"])
    method = found.get("quant_method")
    if method not in list(_QUANTIZATIONS):
        raise _unknown(path, "quantization_config.quant_method", method, known=list(_QUANTIZATIONS))
    for field, known in _QUANTIZATIONS[method].items():
        value = found.get(field, known[0])
        if value not in known:
            raise _unknown(
                path, f"quantization_config.{field}", value, known=[one for one in known if one is not None] or ["none"]
            )
    return found


def _read_rope(path: Path, config: Mapping[str, Any]) -> RopeSpec:
    """RoPE in either spelling: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (Meta)."""
    modern, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if modern and scaling:
        raise InputError(
            f"{path} has both rope_parameters and rope_scaling, one of them was expected",
            hint="remove the one that is not the model's",
        )
    field = "rope_parameters" if modern else "rope_scaling"
    parameters = modern or scaling or {}
    if not isinstance(parameters, dict):
        raise InputError(
            f"{path}: {field} is {parameters!r}, an object was expected",
            hint="copy config.json from the original model",
        )
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta", 10_000.0)
    spelled = [parameters.pop(key) for key in ("rope_type", "type") if key in parameters] or ["default"]
    if any(kind != spelled[0] for kind in spelled) or spelled[0] not in list(_ROPE_KEYS):
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
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    begins = [] if bos is None else [bos]
    for field, value, tokens, wanted in (
        ("eos_token_id", eos, stops, "a token id or a list of them"),
        ("bos_token_id", bos, begins, "a token id"),
    ):
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise InputError(
                f"{folder}: {field} is {value!r}, {wanted} was expected", hint="correct generation_config.json"
            )
    return bos, tuple(stops)


def integer_of(path: Path, config: Mapping[str, Any], field: str) -> int:
    """A positive integer of the description at ``path``. Raises InputError."""
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise _wrong_number(path, field, value, wanted="a positive integer")
    return value


def count_of(path: Path, config: Mapping[str, Any], field: str) -> int:
    """The same of what is counted one by one, ``MOST`` at most."""
    count = integer_of(path, config, field)
    if count > MOST:
        raise _wrong_number(path, field, count, wanted=f"{MOST} at most")
    return count


def number_of(path: Path, config: Mapping[str, Any], field: str) -> float:
    """A positive number of the description at ``path``. Raises InputError."""
    value = config.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise _wrong_number(path, field, value, wanted="a positive number")
    return float(value)


def _truth_of(path: Path, config: Mapping[str, Any], field: str) -> bool:
    value = config.get(field)
    if value not in (True, False, None):
        raise InputError(
            f"{path}: {field} is {value!r}, true or false was expected", hint="copy config.json from the original model"
        )
    return bool(value)


def _wrong_number(path: Path, field: str, value: object, *, wanted: str) -> InputError:
    found = "missing" if value is None else repr(value)
    return InputError(
        f"{path}: {field} is {found}, {wanted} was expected", hint=f"check {path.name} against the original model's"
    )


def _unknown(path: Path, field: str, value: object, *, known: list[Any]) -> InputError:
    return InputError(
        f"{path}: {field} is {value!r}; known: {', '.join(str(value) for value in known)}",
        hint="only Llama text models in plain precision are supported",
    )
