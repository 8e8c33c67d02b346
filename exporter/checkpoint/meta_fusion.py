"""Llama 4's vision transformer in Meta's layout: what ``params.json`` says of it, and its tensors' names.

meta-llama/llama-models, models/llama4: args.py (``VisionArgs``), vision/encoder.py, vision/embedding.py and
checkpoint.py, which tells how tensors are cut; transformers, models/llama4/convert_llama4_weights_to_hf.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.checkpoint.config import count_of, integer_of, number_of, read_fusion
from exporter.checkpoint.meta_tokenizer import LLAMA4_RANKS, SPECIAL_TOKENS4
from exporter.checkpoint.meta_vision import block_name
from exporter.errors import InputError
from exporter.spec import FusionSpec

ARGS = "vision_args"
"""The field of params.json by which a Llama 4 is known that reads images."""
IMAGE_TOKEN = LLAMA4_RANKS + SPECIAL_TOKENS4.index("<|patch|>")
_CHECK = "check params.json against the original model's"

_ENCODER = "vision_embeddings.vision_encoder."
_NAMES = {
    f"{_ENCODER}conv1._linear.weight": "vision_model.patch_embedding.linear.weight",
    f"{_ENCODER}class_embedding": "vision_model.class_embedding",
    f"{_ENCODER}positional_embedding_vlm": "vision_model.positional_embedding_vlm",
    **{
        f"{_ENCODER}ln_{place}.{part}": f"vision_model.layernorm_{place}.{part}"
        for place in ("pre", "post")
        for part in ("weight", "bias")
    },
    "vision_embeddings.vision_adapter.mlp.c_fc.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "vision_embeddings.vision_adapter.mlp.c_proj.weight": "vision_model.vision_adapter.mlp.fc2.weight",
    "vision_projection.weight": "multi_modal_projector.linear_1.weight",
}


def fusion_of(path: Path, params: Mapping[str, Any]) -> FusionSpec | None:
    """None where ``params`` tell of no images. Meta's program wants every field that is read here, and passes over
    others. Raises InputError."""
    args = params.get(ARGS)
    if args is None:
        return None
    if not isinstance(args, dict):
        raise InputError(f"{path}: {ARGS} is {args!r}, an object was expected", hint=_CHECK)
    hidden, projected = integer_of(path, args, "dim"), integer_of(path, args, "output_dim")
    config = {
        **{"hidden_size": hidden, "intermediate_size": int(number_of(path, args, "mlp_ratio") * hidden)},
        "num_hidden_layers": count_of(path, args, "n_layers"),
        "num_attention_heads": integer_of(path, args, "n_heads"),
        **{field: _side_of(path, args, field) for field in ("image_size", "patch_size")},
        **{f"{field}_dim": projected for field in ("vision_output", "projector_input", "projector_output")},
        "pixel_shuffle_ratio": number_of(path, args, "pixel_shuffle_ratio"),
    }
    return read_fusion(path, {"vision_config": config, "image_token_index": IMAGE_TOKEN})


def renamed(stored: str) -> str:
    """A name of Hugging Face's; one that is not known stays as it is."""
    block = re.fullmatch(rf"{re.escape(_ENCODER)}transformer\.resblocks\.(\d+)\.(.+)", stored)
    if block:
        return f"vision_model.model.layers.{block[1]}.{block_name(block[2])}"
    return _NAMES.get(stored, stored)


def _side_of(path: Path, args: Mapping[str, Any], field: str) -> int:
    size = args.get(field)
    if not isinstance(size, dict) or size.get("height") != size.get("width"):
        raise InputError(
            f"{path}: {field} of {ARGS} is {size!r}, an object with height and width was expected, both the same",
            hint=_CHECK,
        )
    return integer_of(path, size, "height")
