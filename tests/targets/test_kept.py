"""Codes of quantized checkpoints in artifacts: a file holds them as they are, and answers as its reference does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import targets
from exporter.bundle import open_bundle
from exporter.checkpoint import open_checkpoint
from exporter.cli import app
from exporter.errors import LoweringError
from exporter.planning import plan as make_plan
from exporter.quantized import QuantizedTensor
from exporter.store import StoreKey, WeightStore
from targets.base import arithmetic_for
from tests.coded import FORMATS, SHUFFLED, choose, write_meta_coded
from tests.conftest import apply_matmulnbits
from tests.exporter.test_gguf import named, permuted
from tests.proving import manifest_of_proven

pytestmark = pytest.mark.toolchain

CONTEXT = 128
ALL, WITH_ZEROS = ("executorch", "onnxruntime", "coreml"), ("onnxruntime", "coreml")


def write_q8_0(path: Path, source: Path) -> None:
    """The weights of the checkpoint as Q8_0, under llama.cpp's names and without a tokenizer."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    for field, value in {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
    }.items():
        writer.add_uint32(f"llama.{field}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(source / "model.safetensors").items():
        weight, part = tensor.float().numpy(), name.split(".")[-2]
        weight = permuted(weight, heads[part]) if part in heads else weight
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(named(name), gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(name: str, folder: Path, sample: Path) -> Path:
    path = folder / "checkpoint.gguf" if name == "Q8_0" else folder / "checkpoint"
    if name == "Q8_0":
        write_q8_0(path, sample)
    elif name == "qlora":
        write_meta_coded(path, sample, rank=4)
    else:
        FORMATS[name].write(path, sample)
    return path


def slow(name: str, *labels: str) -> list[Any]:
    return [pytest.param(name, label, marks=pytest.mark.slow) for label in labels]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *(("gptq", label) for label in ALL),
        *(("awq", label) for label in WITH_ZEROS),
        ("Q8_0", "onnxruntime"),
        ("qlora", "onnxruntime"),
        *slow("gptq by row", "executorch", "coreml-ane"),
        *slow("int8 by row", "executorch", "onnxruntime"),
        *slow("gptq of 8 bits", *WITH_ZEROS),
        *slow("Q8_0", "coreml"),
        *slow("qlora", "executorch", "coreml"),
    ],
)
def test_kept_codes_lie_in_the_artifact_and_it_answers_as_its_reference(
    name: str, label: str, sample: Path, tmp_path: Path
) -> None:
    path = write(name, tmp_path, sample)
    plan = make_plan(
        path, target=label, context=CONTEXT, logits="all", threads=1, out=tmp_path / "out", store=tmp_path / "store"
    )
    checkpoint, target = open_checkpoint(path), targets.load(label)
    key = StoreKey(source_sha256="", scheme=plan.scheme)
    store = WeightStore(checkpoint=checkpoint, key=key, root=plan.store).as_computed(arithmetic_for(target, plan))
    manifest_of_proven(target, store, plan, sample=sample)


@pytest.mark.parametrize(("bits", "group", "columns"), [(4, 32, 96), (4, 64, 128), (8, 32, 96)])
def test_mat_mul_n_bits_takes_zero_points_as_they_are(bits: int, group: int, columns: int) -> None:
    """Three blocks of a row are an odd number of nibbles."""
    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(bits))
    coded, middle = choose(weight, bits=bits, group=group, symmetric=False), 2 ** (bits - 1)
    tensor = QuantizedTensor(
        name="w",
        bits=bits,
        group_size=group,
        codes=(coded.codes - middle).to(torch.int8),
        scales=coded.scales.float(),
        zeros=(coded.zeros - middle).to(torch.int8),
    )
    got: Tensor = apply_matmulnbits(tensor, torch.eye(columns), accuracy_level=0).T
    assert torch.equal(got, coded.values())


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-40])
def test_a_scale_that_xnnpack_would_not_load_is_named(scale: float) -> None:
    import targets.executorch.lower  # noqa: F401  (first, as the lowering does: ExecuTorch's parts import each other)
    from targets.executorch.xnnpack import Segment, Wire

    codes, scales = torch.ones(4, 64, dtype=torch.int8), torch.full((4, 2), 0.5)
    scales[3, 1] = scale
    weight = QuantizedTensor(name="w", bits=4, group_size=32, codes=codes, scales=scales)
    with pytest.raises(LoweringError, match=r"w has a scale of .*, XNNPACK takes none of 0"):
        Segment().linear(Wire((1, 4, 64)), name="w", weight=weight)


@pytest.mark.slow
def test_the_command_keeps_codes_says_so_and_proves_the_bundle_again(
    sample: Path, tmp_path: Path, invoke: Callable[..., tuple[int, str, str]]
) -> None:
    FORMATS["gptq"].write(tmp_path / "gptq", sample)
    out, store = tmp_path / "out", tmp_path / "store"
    words = ["-t", "executorch", "-c", "128", "-o", str(out), "--store", str(store), "--threads", "1"]
    code, _, told = invoke(str(tmp_path / "gptq"), *words)
    assert code == 0, told
    assert "28 matrices keep their codes of gptq: int4 in groups of 32" in told
    assert "the scales of 28 matrices are rounded to bf16" in told
    manifest = open_bundle(out / "executorch")
    assert manifest["calibration"]["algorithm"] == "kept (gptq)"
    assert manifest["calibration"]["rounded_scales"]["tensors"] == 28
    against = ["--against", str(tmp_path / "gptq"), "--store", str(store), "--threads", "1"]
    code, _, told = invoke("validate", str(out / "executorch"), *against)
    assert code == 0, told


@pytest.mark.slow
def test_what_cannot_be_kept_is_quantized_anew(
    sample: Path, tmp_path: Path, invoke: Callable[..., tuple[int, str, str]]
) -> None:
    SHUFFLED.write(tmp_path / "gptq", sample)
    words = ["-t", "onnxruntime", "-c", "128", "-o", str(tmp_path / "out"), "--store", str(tmp_path / "store")]
    code, _, told = invoke(str(tmp_path / "gptq"), *words)
    assert (code, "desc_act" in told) == (3, True)
    code, _, told = invoke(str(tmp_path / "gptq"), *words, "--requantize", "--calibration", "none", "--threads", "1")
    assert code == 0, told


@pytest.fixture
def invoke() -> Callable[..., tuple[int, str, str]]:
    from typer.testing import CliRunner

    def run(*words: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, list(words))
        return done.exit_code, done.stdout, done.stderr

    return run
