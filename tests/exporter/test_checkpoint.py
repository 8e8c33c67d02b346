"""Checkpoints in and out of order: every spelling is read, every fault is told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint import open_checkpoint
from exporter.errors import InputError
from exporter.spec import RopeKind
from tests.conftest import Toy

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def spell(toy: Toy, **fields: Any) -> None:
    toy.edit_config(rope_parameters=None, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_scaling": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
)
def test_released_spellings_of_llama3_scaling_mean_the_same(
    make_toy: Callable[..., Toy], fields: dict[str, Any]
) -> None:
    toy = make_toy(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    modern = open_checkpoint(toy.folder).spec.rope
    spell(toy, **fields)
    assert open_checkpoint(toy.folder).spec.rope == modern
    assert modern.kind is RopeKind.LLAMA3


def test_absent_scaling_is_default_rope(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    spell(toy, rope_theta=12345.0)
    rope = open_checkpoint(toy.folder).spec.rope
    assert (rope.kind, rope.theta) == (RopeKind.DEFAULT, 12345.0)


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn'"),
        ({"rope_type": "linear", "type": "llama3", "factor": 2.0}, "'linear'"),
        ({"rope_type": "llama3", "factor": 8.0}, "high_freq_factor, low_freq_factor"),
        ({"rope_type": "linear", "factor": "two"}, "'two'"),
        ({"rope_type": "linear", "factor": -1.0}, "-1.0"),
    ],
)
def test_rope_that_is_not_known_is_refused_with_what_was_found(
    make_toy: Callable[..., Toy], parameters: dict[str, Any], found: str
) -> None:
    toy = make_toy()
    toy.edit_config(rope_parameters={"rope_theta": 1e4, **parameters})
    with pytest.raises(InputError, match=found):
        open_checkpoint(toy.folder)


def test_both_spellings_at_once_are_refused(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    toy.edit_config(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(InputError, match="both rope_parameters and rope_scaling"):
        open_checkpoint(toy.folder)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; known: llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; known: silu"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "known: gptq, awq, compressed-tensors"),
        ({"hidden_size": "64"}, "hidden_size is '64', a positive integer"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be divisible by num_key_value_heads \(3\)"),
        ({"head_dim": 33}, r"head_dim \(33\) must be even"),
        ({"eos_token_id": "</s>"}, "'</s>'"),
    ],
)
def test_a_config_that_the_graph_would_not_honour_is_refused(
    make_toy: Callable[..., Toy], change: dict[str, Any], found: str
) -> None:
    toy = make_toy()
    (toy.folder / "generation_config.json").unlink(missing_ok=True)
    toy.edit_config(**change)
    with pytest.raises(InputError, match=found):
        open_checkpoint(toy.folder)


def test_head_dim_defaults_to_hidden_size_over_heads(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy(hidden_size=128)
    toy.edit_config(head_dim=None)
    assert open_checkpoint(toy.folder).spec.head_dim == 32


def test_stop_tokens_come_from_the_generation_config_first(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    (toy.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "bos_token_id": 3}))
    spec = open_checkpoint(toy.folder).spec
    assert (spec.eos_token_ids, spec.bos_token_id) == ((7, 9), 3)


def test_shards_give_the_same_tensors_as_one_file(make_toy: Callable[..., Toy]) -> None:
    single, sharded = make_toy(), make_toy(shards=3)
    assert len(list(sharded.folder.glob("*.safetensors"))) > 1
    one, many = open_checkpoint(single.folder), open_checkpoint(sharded.folder)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.spec.weights())


def test_a_missing_shard_is_named(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy(shards=3)
    gone = sorted(toy.folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        open_checkpoint(toy.folder)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1000])
def test_a_truncated_file_is_told_apart(make_toy: Callable[..., Toy], keep: int) -> None:
    toy = make_toy()
    file = toy.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        open_checkpoint(toy.folder)


def test_a_wrong_shape_names_both_shapes(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    toy.edit_config(intermediate_size=100)
    with pytest.raises(InputError, match=r"shape \[.*96.*config.json wants \[.*100"):
        open_checkpoint(toy.folder)


def test_missing_and_unknown_tensors_are_named(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    file = toy.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.adapter.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"1 missing \(model.norm.weight\); 1 unknown \(model.layers.0.adapter"):
        open_checkpoint(toy.folder)


def test_a_tied_head_stored_again_is_taken_only_if_equal(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    file = toy.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert "lm_head.weight" not in open_checkpoint(toy.folder).tensors
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(InputError, match="ties head and embedding"):
        open_checkpoint(toy.folder)


def test_integer_weights_are_refused_with_their_dtype(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    file = toy.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, file)
    with pytest.raises(InputError, match="dtype int32; known: F32, F16, BF16"):
        open_checkpoint(toy.folder)


def test_a_folder_without_config_or_weights_says_what_it_has(tmp_path: Path, make_toy: Callable[..., Toy]) -> None:
    with pytest.raises(InputError, match="found nothing, a folder was expected"):
        open_checkpoint(tmp_path / "absent")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"has no config.json"):
        open_checkpoint(empty)
    toy = make_toy()
    (toy.folder / "model.safetensors").rename(toy.folder / "weights.bin")
    with pytest.raises(InputError, match=r"only weights.bin"):
        open_checkpoint(toy.folder)


def test_the_source_digest_changes_with_one_bit_of_a_weight(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    before = open_checkpoint(toy.folder).sha256
    assert before == open_checkpoint(toy.folder).sha256
    file = toy.folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert open_checkpoint(toy.folder).sha256 != before


def test_a_tensor_in_two_shards_is_named(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy(shards=2)
    first, *_, second = sorted(toy.folder.glob("model-*.safetensors"))
    tensors = load_file(first)
    name = sorted(tensors)[0]
    save_file({**load_file(second), name: tensors[name]}, second)
    with pytest.raises(InputError, match=re.escape(f"{name} lies in {first.name} and in {second.name}")):
        open_checkpoint(toy.folder)


def test_shards_of_different_float_types_are_one_model(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy(shards=2)
    *_, second = sorted(toy.folder.glob("model-*.safetensors"))
    save_file({name: tensor.bfloat16() for name, tensor in load_file(second).items()}, second)
    checkpoint = open_checkpoint(toy.folder)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float32, torch.bfloat16}


def pickled(toy: Toy, *, shards: int = 1) -> dict[str, torch.Tensor]:
    """The toy's weights as ``pytorch_model*.bin``, in so many files; safetensors are gone."""
    tensors = load_file(toy.folder / "model.safetensors")
    (toy.folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, toy.folder / "pytorch_model.bin")
        return tensors
    names = {name: f"pytorch_model-{index % shards + 1:05}-of-{shards:05}.bin" for index, name in enumerate(tensors)}
    for file in set(names.values()):
        torch.save({name: tensors[name] for name in tensors if names[name] == file}, toy.folder / file)
    index = {"metadata": {}, "weight_map": names}
    (toy.folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_may_lie_in_pickles_of_torch(shards: int, make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    expected = pickled(toy, shards=shards)
    checkpoint = open_checkpoint(toy.folder)
    assert all(torch.equal(checkpoint.read(name), expected[name]) for name in checkpoint.spec.weights())
    before = checkpoint.sha256
    file = sorted(toy.folder.glob("pytorch_model*.bin"))[0]
    content = torch.load(file)
    next(iter(content.values())).view(-1)[0] += 1
    torch.save(content, file)
    assert open_checkpoint(toy.folder).sha256 != before


def test_pickles_are_mapped(make_toy: Callable[..., Toy]) -> None:
    """What is read of a large tensor is not what it takes: the file's own pages serve."""
    toy = make_toy()
    pickled(toy)
    file, maps = str(toy.folder / "pytorch_model.bin"), Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("tells of Linux alone what is mapped")
    assert file not in maps.read_text()
    checkpoint = open_checkpoint(toy.folder)
    assert file in maps.read_text()
    del checkpoint


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("a program was run",)


def test_a_pickle_that_would_run_a_program_is_refused(
    make_toy: Callable[..., Toy], capsys: pytest.CaptureFixture[str]
) -> None:
    toy = make_toy()
    tensors: dict[str, Any] = dict(pickled(toy))
    torch.save({**tensors, "extra": Harmful()}, toy.folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="asks for more than tensors as it is opened, which is refused") as caught:
        open_checkpoint(toy.folder)
    assert "any program" in str(caught.value.hint)
    assert "a program was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model": {"a": torch.ones(1)}}, "holds a dict, names with tensors were expected"),
        ([torch.ones(1)], "holds a list, names with tensors were expected"),
        ({"model.norm.weight": torch.ones(2, dtype=torch.int8)}, "model.norm.weight has dtype int8; known: F32"),
    ],
)
def test_a_pickle_of_something_else_is_refused(content: Any, says: str, make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    pickled(toy)
    torch.save(content, toy.folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=re.escape(says)):
        open_checkpoint(toy.folder)


def test_pickles_of_before_zip_are_refused(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    tensors = pickled(toy)
    torch.save(tensors, toy.folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"is no file of torch.save in its present form"):
        open_checkpoint(toy.folder)
