"""GGUF files of llama.cpp: written with its own package, read as that package and transformers read them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from exporter.bundle import _model, read_artifact
from exporter.checkpoint import open_checkpoint, read_spec
from exporter.errors import InputError
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.rope import inverse_frequencies
from exporter.model.trace import trace
from exporter.parity import Drive, drive
from exporter.spec import Precision, RopeKind, RopeSpec, WeightScheme
from exporter.store import StoreKey, WeightStore
from tests.conftest import Toy, write_toy

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Quantizer = Callable[[np.ndarray, Kind], np.ndarray]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def named(name: str) -> str:
    """llama.cpp's name of one of transformers' tensors."""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, block, part = stem.split(".", 3)
    return f"blk.{block}.{NAMES[part]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As ``LlamaModel.permute`` of llama.cpp's ``conversion/llama.py``."""
    rows = len(weight)
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def factors_of(rope: Mapping[str, Any], *, head_dim: int) -> np.ndarray:
    """llama3's divisors as llama.cpp's converter writes them (``LlamaModel.generate_extra_tensors``)."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope), max_position_embeddings=64)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy().astype(np.float32)


def write_gguf(
    file: Path,
    toy: Toy,
    *,
    kind: Kind = Kind.F32,
    fields: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: str = "",
    quantize: Quantizer = gguf.quantize,
) -> Path:
    """The toy's weights and config as a GGUF file; matrices of ``kind``, made so by ``quantize``. ``fields`` replace
    those of the metadata, None removes one; ``extra`` tensors are added, ``without`` is left out."""
    config = toy.model.config
    writer = gguf.GGUFWriter(file, "llama")
    written: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **(fields or {}),
    }
    for name, value in written.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, tensor in stored(toy, kind, quantize).items():
        if name != without:
            writer.add_tensor(name, tensor, raw_dtype=kind if tensor.ndim > 1 else Kind.F32)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored(toy: Toy, kind: Kind, quantize: Quantizer = gguf.quantize) -> dict[str, np.ndarray]:
    """The toy's tensors under llama.cpp's names, permuted and quantized."""
    config, tensors = toy.model.config, {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in toy.model.named_parameters():
        weight = parameter.detach().numpy()
        part = name.split(".")[-2]
        weight = permuted(weight, heads[part]) if part in heads else weight
        tensors[named(name)] = quantize(weight, kind) if weight.ndim > 1 else weight
    return tensors


def largest_difference(path: Path, toy: Toy, weights: Mapping[str, torch.Tensor]) -> float:
    """Between the logits of our reference on the file and those of transformers on ``weights``."""
    checkpoint = open_checkpoint(path)
    floats = WeightScheme(body=Precision.FP32, embedding=Precision.FP32, head=Precision.FP32, group_size=32)
    store = WeightStore(checkpoint=checkpoint, key=StoreKey(source_sha256="", scheme=floats), root=path.parent)
    ids = torch.randint(96, (40,), generator=torch.Generator().manual_seed(5))
    steps = Drive(ids=tuple(ids.tolist()), prefills=(25, 9))
    got = drive(Reference(trace(checkpoint.spec), store, FULL_PRECISION), steps)
    toy.model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=False)
    with torch.no_grad():
        wanted = toy.model(ids[None]).logits[0][steps.positions]
    return float((got - wanted).abs().max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_tensors_are_those_of_llama_cpp_with_rows_put_back(
    kind: Kind, tied: bool, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    toy = make_toy(tie_word_embeddings=tied)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "toy.gguf", toy, kind=kind))
    plain = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    assert checkpoint.spec.tie_word_embeddings is tied
    weights, expected_weights = dict(toy.model.named_parameters()), {}
    for name in checkpoint.spec.weights():
        weight = weights[name].detach().numpy()
        matrix = weight.ndim > 1
        expected = (
            gguf.dequantize(gguf.quantize(weight, kind), kind) if matrix else weight
        )  # by rows, whose order is free
        got = checkpoint.read(name)
        assert torch.equal(got.float(), torch.from_numpy(expected)), name
        assert (
            got.dtype == checkpoint.tensors[name].dtype == (plain.get(kind, torch.float32) if matrix else torch.float32)
        )
        expected_weights[name] = torch.from_numpy(expected)
    assert largest_difference(tmp_path / "toy.gguf", toy, expected_weights) <= 1e-4


def test_the_spec_is_that_of_the_same_model_in_hugging_face_layout(
    make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    toy = make_toy()
    (toy.folder / "generation_config.json").unlink()
    got, expected = read_spec(write_gguf(tmp_path / "toy.gguf", toy)), read_spec(toy.folder)
    assert got.rms_norm_eps == pytest.approx(expected.rms_norm_eps, rel=1e-7)  # float32 in the metadata
    assert replace(got, rms_norm_eps=expected.rms_norm_eps, name=expected.name) == expected
    assert got.name == "toy"


def test_sizes_left_out_have_llama_cpps_defaults(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy(hidden_size=128, num_key_value_heads=4)
    left_out = ("attention.key_length", "attention.value_length", "attention.head_count_kv", "rope.dimension_count")
    fields: dict[str, Any] = {f"llama.{name}": None for name in (*left_out, "vocab_size", "rope.freq_base")}
    fields["tokenizer.ggml.tokens"] = [str(index) for index in range(96)]
    spec = read_spec(write_gguf(tmp_path / "toy.gguf", toy, fields=fields))
    assert (spec.head_dim, spec.num_key_value_heads, spec.vocab_size, spec.rope.theta) == (32, 4, 96, 1e4)


def test_control_tokens_known_to_end_an_answer_are_stop_tokens(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    tokens = [str(index) for index in range(96)]
    tokens[7:10] = ["<|eot_id|>", "<|eom_id|>", "</s>"]
    types = [3 if index in (7, 8) else 1 for index in range(96)]
    fields = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.eot_token_id": 7}
    spec = read_spec(write_gguf(tmp_path / "toy.gguf", make_toy(), fields=fields))
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2, 7, 8))


def test_factors_of_frequencies_are_llama3_scaling(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, **LLAMA3}
    toy = make_toy(rope_parameters=rope)
    factors = factors_of(rope, head_dim=32)
    file = write_gguf(tmp_path / "toy.gguf", toy, extra={"rope_freqs.weight": factors})
    checkpoint = open_checkpoint(file)
    assert checkpoint.spec.rope.kind is RopeKind.FACTORS
    assert checkpoint.spec.rope.factors == tuple(factors.tolist())
    assert len(set(factors.tolist())) > 3
    got = inverse_frequencies(checkpoint.spec.rope, head_dim=32)
    assert torch.allclose(got, toy.model.model.rotary_emb.inv_freq, rtol=3e-7, atol=0)
    assert largest_difference(file, toy, toy.model.state_dict()) <= 1e-4


@pytest.mark.parametrize("field", ["rope.scaling.factor", "rope.scale_linear"])
def test_linear_scaling_is_read_in_either_spelling(field: str, make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "toy.gguf", make_toy(), fields={f"llama.{field}": 4.0})
    assert read_spec(file).rope == RopeSpec(theta=1e4, kind=RopeKind.LINEAR, factor=4.0)
    none = {f"llama.{field}": 4.0, "llama.rope.scaling.type": "none"}
    assert read_spec(write_gguf(tmp_path / "none.gguf", make_toy(), fields=none)).rope == RopeSpec(theta=1e4)


def test_factors_survive_a_manifest(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 16, dtype=np.float32)
    spec = read_spec(write_gguf(tmp_path / "toy.gguf", make_toy(), extra={"rope_freqs.weight": factors}))
    scheme = {"weights": "int4", "embedding": "int8", "head": "int8", "group_size": 32, "activations": "float"}
    scheme |= {"head_activations": None, "compute_dtype": "fp32", "dequantized_dtype": "fp32", "kv_dtype": "fp32"}
    manifest = {"target": "onnxruntime", "backend": "cpu", "scheme": scheme, "context": 64, "logits": "last"}
    for written in (spec, replace(spec, rope=RopeSpec(theta=1e4))):
        content = json.loads(json.dumps({**manifest, "prefer": "quality", "model": _model(written)}))
        assert read_artifact(content, path=tmp_path).spec == written
        assert ("factors" in content["model"]["rope"]) is bool(written.rope.factors)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope": RopeSpec(theta=1e4, kind=RopeKind.FACTORS, factors=(1.0,))}, "1 factors, half of head_dim"),
    ],
)
def test_factors_that_do_not_fit_are_refused(changes: dict[str, Any], says: str, make_toy: Callable[..., Toy]) -> None:
    with pytest.raises(ValueError, match=says):
        replace(read_spec(make_toy().folder), **changes)
    with pytest.raises(ValueError, match="0 factors"):
        RopeSpec(theta=1e4, kind=RopeKind.FACTORS)
    with pytest.raises(ValueError, match="no positive number"):
        RopeSpec(theta=1e4, kind=RopeKind.FACTORS, factors=(1.0, float("nan")))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'; known: llama"),
        ({"general.architecture": "mllama"}, "is 'mllama', Llama 3.2 Vision, which llama.cpp has none of"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8; known: 0, no such field"),
        ({"llama.attention.scale": 0.25}, r"llama.attention.scale is 0.25; known: 0.0"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window is 4096"),
        ({"llama.attention.causal": False}, "causal is False; known: True"),
        ({"llama.never_seen": 1}, "llama.never_seen is 1; known: no such field"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'; known: none, linear"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count is 16; known: 32"),
        ({"llama.attention.value_length": 64}, "value_length is 64; known: 32"),
        ({"llama.embedding_length": None}, "llama.embedding_length is missing, a positive integer"),
        ({"llama.embedding_length": "64"}, "embedding_length is '64', a positive integer"),
        ({"llama.attention.head_count": [4, 2]}, r"head_count is \(4, 2\), a positive integer"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan, a positive number"),
        ({"llama.attention.head_count_kv": 3}, r"must be divisible by num_key_value_heads \(3\)"),
        ({"llama.attention.key_length": 33, "llama.attention.value_length": 33}, "dimension_count is 32; known: 33"),
        ({"llama.block_count": 4_000_000_000}, "block_count is 4000000000, but there are 20 tensors"),
        ({"llama.block_count": 3}, "9 missing.*model.layers.2"),
        ({"llama.block_count": 1}, "9 unknown.*model.layers.1"),
        ({"llama.feed_forward_length": 100}, r"shape \[.*96.*its metadata wants \[.*100"),
        ({"llama.vocab_size": None}, "has no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1, 1]}, "not one number for each of 1 tokens"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id is '</s>', a token id"),
        ({"general.alignment": 12}, "general.alignment is 12"),
    ],
)
def test_metadata_that_the_graph_would_not_honour_is_refused(
    fields: dict[str, Any], says: str, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    fields = dict(fields)
    architecture, alignment = fields.pop("general.architecture", None), fields.pop("general.alignment", None)
    file = write_gguf(tmp_path / "toy.gguf", make_toy(), fields=fields)
    content = file.read_bytes()
    if architecture:
        spelled = len(architecture).to_bytes(8, "little") + architecture.encode()
        content = content.replace(b"\5\0\0\0\0\0\0\0llama", spelled, 1)
    if alignment:  # in place of a field of the same length and type
        content = content.replace(
            b"\x10\0\0\0\0\0\0\0llama.vocab_size\4\0\0\0\x60", b"\x11" + bytes(7) + b"general.alignment\4\0\0\0\x0c"
        )
    file.write_bytes(content)
    with pytest.raises(InputError, match=says):
        open_checkpoint(file)


def test_scaling_of_both_kinds_at_once_is_refused(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(16, dtype=np.float32)}
    file = write_gguf(tmp_path / "toy.gguf", make_toy(), fields={"llama.rope.scaling.factor": 2.0}, extra=extra)
    with pytest.raises(InputError, match=r"scaling.factor is 2.0; known: 1 where there is rope_freqs.weight"):
        open_checkpoint(file)


def test_missing_and_unknown_tensors_are_named(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", make_toy(), without="blk.1.ffn_up.weight")
    with pytest.raises(InputError, match=r"1 missing \(model.layers.1.mlp.up_proj.weight\); 0 unknown"):
        open_checkpoint(file)
    biased = write_gguf(tmp_path / "b.gguf", make_toy(), extra={"blk.0.attn_q.bias": np.ones(128, dtype=np.float32)})
    with pytest.raises(InputError, match=r"0 missing; 1 unknown \(blk.0.attn_q.bias\)"):
        open_checkpoint(biased)


@pytest.mark.parametrize(("kind", "shown"), [(Kind.I8, "I8"), (Kind.I32, "I32"), (Kind.Q8_1, "Q8_1"), (99, "99")])
def test_types_that_cannot_be_read_are_refused_by_name(
    kind: int, shown: str, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "toy.gguf", make_toy())
    content = file.read_bytes()
    info = b"output_norm.weight\1\0\0\0\x40\0\0\0\0\0\0\0"
    assert content.count(info) == 1
    place = content.index(info) + len(info)
    file.write_bytes(content[:place] + bytes([kind]) + content[place + 1 :])
    with pytest.raises(InputError, match=f"output_norm.weight has type {shown}; known: F32, F16, BF16, Q4_0"):
        open_checkpoint(file)


def test_a_folder_with_one_model_stands_for_it(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    toy = make_toy()
    write_gguf(folder / "toy.gguf", toy)
    assert read_spec(folder) == read_spec(folder / "toy.gguf")
    assert open_checkpoint(folder).folder == open_checkpoint(folder / "toy.gguf").folder == folder
    write_gguf(toy.folder / "toy.gguf", toy)
    assert open_checkpoint(toy.folder).described_by.name == "config.json"
    (toy.folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"only toy.gguf") as caught:
        open_checkpoint(toy.folder)
    assert caught.value.hint == "name the .gguf file itself"
    write_gguf(folder / "other.gguf", toy)
    with pytest.raises(InputError, match=r"has no config.json") as caught:
        open_checkpoint(folder)
    assert "one of other.gguf, toy.gguf" in caught.value.hint


def split(file: Path, *, at: int) -> list[Path]:
    """The file in two, as ``llama-gguf-split`` does it: metadata and the tensors before ``at``, then the rest."""
    reader = gguf.GGUFReader(file)
    made = []
    for index, tensors in enumerate((reader.tensors[:at], reader.tensors[at:])):
        made.append(file.with_name(f"{file.stem}-{index + 1:05}-of-00002.gguf"))
        writer = gguf.GGUFWriter(made[-1], "llama")
        for field in reader.fields.values() if index == 0 else ():
            if not field.name.startswith(("GGUF.", "general.")):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", 2)
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return made


def test_a_split_file_is_read_together(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    whole = open_checkpoint(write_gguf(tmp_path / "toy.gguf", make_toy(), kind=Kind.Q8_0))
    parts = split(tmp_path / "toy.gguf", at=7)
    for named_part in parts:
        both = open_checkpoint(named_part)
        assert both.spec == whole.spec
        assert all(torch.equal(both.read(name), whole.read(name)) for name in whole.spec.weights())
    before = both.sha256
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    assert open_checkpoint(parts[0]).sha256 != before
    parts[1].unlink()
    with pytest.raises(InputError, match=r"is one of 2 files, of which 1 are missing: toy-00002-of-00002.gguf"):
        open_checkpoint(parts[0])


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing, a GGUF file was expected"):
        read_spec(tmp_path / "absent.gguf")
    file = tmp_path / "other.gguf"
    file.write_bytes(b"PK\3\4 and more")
    with pytest.raises(InputError, match="does not begin with the letters GGUF"):
        read_spec(file)
    file.write_bytes(b"GGUF\1\0\0\0" + bytes(16))
    with pytest.raises(InputError, match="has version 1 of GGUF; known: 2 and 3, little-endian"):
        read_spec(file)


@pytest.mark.parametrize("keep", [0, 3, 20, 700, -1])
def test_a_truncated_file_is_told_apart(keep: int, make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "toy.gguf", make_toy())
    size = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    file.write_bytes(file.read_bytes()[: keep if keep >= 0 else size - 1])
    with pytest.raises(InputError, match="is not a whole GGUF file"):
        open_checkpoint(file)


def test_a_file_cut_off_after_it_was_opened_is_told(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "toy.gguf", make_toy())
    checkpoint = open_checkpoint(file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cannot read token_embd.weight"):
        checkpoint.read("model.embed_tokens.weight")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    fields = {"tokenizer.ggml.tokens": [str(index) for index in range(96)], "tokenizer.ggml.token_type": [1] * 96}
    extra = {"rope_freqs.weight": np.ones(16, dtype=np.float32)}
    return write_gguf(folder / "sound.gguf", write_toy(folder / "toy"), kind=Kind.Q8_0, fields=fields, extra=extra)


PEAK = """
import resource, sys
from pathlib import Path
from exporter.checkpoint import read_spec
from exporter.errors import InputError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
for file in sys.argv[1:]:
    try:
        read_spec(Path(file))
    except InputError as error:
        assert "is not a whole GGUF file" in str(error), error
    else:
        raise SystemExit(f"{file} was read")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux alone")
def test_counts_beyond_the_file_are_refused_at_once(sound: Path) -> None:
    content = sound.read_bytes()
    tensors, fields = 8, 16
    texts, numbers = (
        content.index(array) + len(array) for array in (b"tokens\t\0\0\0\x08\0\0\0", b"token_type\t\0\0\0\5\0\0\0")
    )
    files = []
    for place in (tensors, fields, texts, numbers):
        for count in (1 << 34, (1 << 63) - 1, (1 << 64) - 1):
            files.append(sound.with_name(f"count-{place}-{count}.gguf"))
            files[-1].write_bytes(content[:place] + count.to_bytes(8, "little") + content[place + 8 :])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *files], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 20
