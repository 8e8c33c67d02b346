"""Quantized checkpoints: what their codes stand for, when they are kept, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor

import targets
from exporter.bundle import as_bytes
from exporter.checkpoint import LazyCodes, open_checkpoint, read_spec
from exporter.checkpoint.meta_coded import hadamard
from exporter.codes import digest
from exporter.errors import InputError, UsageError
from exporter.kept import kept_scheme, why_decoded
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import Drive, drive
from exporter.pipeline import refuse_early
from exporter.planning import choices_of, plan
from exporter.quantized import QuantizedTensor
from exporter.report import checkpoint_facts
from exporter.spec import EMBEDDING, HEAD, Arithmetic, CodeKind, Plan, Precision
from exporter.store import StoreKey, WeightStore
from tests.coded import FORMATS, GPTQ, SHUFFLED, Format, as_gptq, write_meta_coded
from tests.conftest import Toy
from tests.exporter.test_gguf import write_gguf

Q_PROJ, DOWN_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def write(make_toy: Callable[..., Toy], tmp_path: Path) -> Callable[[Format], tuple[Path, dict[str, Tensor], Toy]]:
    """A maker of quantized toys: the folder, what each weight is, and the toy."""

    def make(form: Format) -> tuple[Path, dict[str, Tensor], Toy]:
        toy = make_toy()
        folder = tmp_path / "quantized"
        return folder, form.write(folder, toy.folder), toy

    return make


def kept_store(checkpoint: Any, made: Plan) -> WeightStore:
    return WeightStore(checkpoint=checkpoint, key=StoreKey(source_sha256="", scheme=made.scheme), root=made.store)


def logits_of(path: Path, *, decoded: bool, steps: Drive) -> Tensor:
    checkpoint = open_checkpoint(path, decoded=decoded)
    return drive(Reference(trace(checkpoint.spec), checkpoint, FULL_PRECISION), steps)


def transformers_logits(toy: Toy, weights: dict[str, Tensor], steps: Drive) -> Tensor:
    toy.model.load_state_dict(weights, strict=False)
    if HEAD in weights:
        toy.model.lm_head.weight = torch.nn.Parameter(weights[HEAD])
    with torch.no_grad():
        found: Tensor = toy.model(torch.tensor([steps.ids])).logits[0][list(steps.positions)]
    return found


STEPS = Drive(ids=tuple(range(1, 41)), prefills=(25, 9))


@pytest.mark.parametrize("name", [*FORMATS, "gptq shuffled"])
def test_weights_are_what_the_codes_stand_for_and_logits_those_of_transformers(
    name: str, write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]]
) -> None:
    folder, meant, toy = write({**FORMATS, "gptq shuffled": SHUFFLED}[name])
    checkpoint = open_checkpoint(folder)
    assert {
        name: torch.equal(checkpoint.read(name).float(), weight) for name, weight in meant.items()
    } == dict.fromkeys(meant, True)
    got, theirs = logits_of(folder, decoded=False, steps=STEPS), transformers_logits(toy, meant, STEPS)
    assert (got - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", FORMATS)
def test_codes_scales_and_zero_points_go_through_the_store_as_they_are(
    name: str, write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]], tmp_path: Path
) -> None:
    form = FORMATS[name]
    folder, meant, _ = write(form)
    made = plan(folder, target="onnxruntime", store=tmp_path / "store", context=64)
    store = kept_store(open_checkpoint(folder), made)
    stored = store[DOWN_PROJ]
    assert isinstance(stored, QuantizedTensor)
    assert (stored.bits, stored.group_size) == (form.bits, 96 if form.group == -1 else min(form.group, 96))
    assert torch.equal(stored.dequantize(), meant[DOWN_PROJ])
    assert (stored.zeros is None) is form.symmetric
    assert torch.equal(stored.scales, stored.scales.half().float())
    embedding = store[EMBEDDING]
    assert isinstance(embedding, Tensor)
    assert embedding.dtype == torch.float16
    assert store.quantized_names(0) == store.quantized_names(None) == []
    assert store.calibration_facts() == {"algorithm": f"kept ({form.config['quant_method']})"}


def test_biases_of_zeros_are_passed_over_and_others_refused(
    write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]],
) -> None:
    folder, _, _ = write(FORMATS["gptq"])
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(128)}, file)
    assert Q_PROJ in open_checkpoint(folder).tensors
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(128)}, file)
    with pytest.raises(InputError, match=r"q_proj\.weight has a bias, which no Llama has"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("scales", None, "q_proj.weight has g_idx, qweight, qzeros, but no scales"),
        ("scales", lambda old: old[:, :8], r"scales of .*q_proj.weight has shape \[2, 8\], \[any, 128\] was expected"),
        ("qzeros", lambda old: old[:1], r"qzeros of .* has shape \[1, 16\], \[2, 16\] was expected"),
        ("qweight", lambda old: old.float(), r"qweight of .* has dtype float32, int32 was expected"),
        ("g_idx", lambda old: old[:8], r"g_idx of .* has shape \[8\], \[64\] was expected"),
        ("qweight", lambda old: old[:6], "has 64 codes in 6 words of 32 bits; known: codes of 4 or 8 bits"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_by_name(
    part: str,
    change: Callable[[Tensor], Tensor] | None,
    says: str,
    write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]],
) -> None:
    folder, _, _ = write(FORMATS["gptq"])
    file, name = folder / "model.safetensors", f"model.layers.0.self_attn.q_proj.{part}"
    tensors = load_file(file)
    old = tensors.pop(name)
    save_file({**tensors, **({name: change(old).contiguous()} if change else {})}, file)
    with pytest.raises(InputError, match=says):
        open_checkpoint(folder)


def test_zero_points_that_the_config_denies_are_refused_when_they_are_read(
    write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]],
) -> None:
    folder, _, _ = write(Format(config=GPTQ, stored=as_gptq, symmetric=False))
    with pytest.raises(InputError, match=r"has zero points, which config\.json says there are none of"):
        open_checkpoint(folder).read(Q_PROJ)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "known: gptq, awq, compressed-tensors"),
        ({"bits": 3}, "quantization_config.bits is 3; known: 4, 8"),
        ({"checkpoint_format": "marlin"}, "is 'marlin'; known: gptq, gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, "is 'gemv'; known: gemm, GEMM"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "known: pack-quantized, int-"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"R4": {}}},
            "quantization_config.transform_config",
        ),
    ],
)
def test_ways_to_quantize_that_are_not_known_are_refused_by_the_config_alone(
    changes: dict[str, Any], says: str, make_toy: Callable[..., Toy]
) -> None:
    toy = make_toy()
    toy.edit_config(quantization_config={**GPTQ, **changes})
    with pytest.raises(InputError, match=says):
        read_spec(toy.folder)


def test_codes_are_kept_unless_all_is_to_be_quantized_anew(
    write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]],
) -> None:
    folder, _, _ = write(FORMATS["gptq"])
    scheme = plan(folder, target="onnxruntime").scheme
    kind = CodeKind(source="gptq", precision=Precision.INT4, group_size=32, zero_points=False)
    assert [codes.kind for codes in scheme.kept] == [kind]
    assert len(scheme.kept[0].names) == 14
    assert (scheme.body, scheme.embedding, scheme.head) == (Precision.INT4, Precision.FP16, Precision.FP16)
    smaller = plan(folder, target="onnxruntime", head="int8").scheme
    assert (smaller.kept, smaller.head, smaller.embedding) == (scheme.kept, Precision.INT8, Precision.INT8)
    anew = plan(folder, target="onnxruntime", requantize=True, precision="int8")
    assert (anew.scheme.kept, anew.scheme.body) == ((), Precision.INT8)


@pytest.mark.parametrize(
    "choices",
    [
        *({"precision": "int4"}, {"group_size": "64"}, {"rule": ["layers.0.* = int8"]}, {"method": "gptq"}),
        *({"calibration": "text.txt"}, {"prefer": "decode"}, {"budget_mb": 10.0}),
    ],
    ids=lambda choices: next(iter(choices)),
)
def test_what_would_change_kept_codes_is_refused_and_both_ways_are_told(
    choices: dict[str, Any], write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]]
) -> None:
    folder, _, _ = write(FORMATS["awq"])
    option = f"--{next(iter(choices)).replace('_', '-')}"
    with pytest.raises(
        UsageError, match=rf"awq, int4 in groups of 32, with zero points.*{option} would change"
    ) as told:
        plan(folder, target="onnxruntime", **choices)
    assert f"leave {option} out to keep them, or add --requantize" in told.value.hint


def test_an_adapter_and_kept_codes_do_not_go_together(
    write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]], tmp_path: Path
) -> None:
    folder, _, _ = write(FORMATS["gptq"])
    with pytest.raises(UsageError, match="--adapter would change them"):
        plan(folder, adapter=tmp_path, target="onnxruntime")


def test_requantize_is_refused_where_there_are_no_codes(make_toy: Callable[..., Toy]) -> None:
    with pytest.raises(UsageError, match="has no codes, --requantize changes nothing"):
        plan(make_toy().folder, target="onnxruntime", requantize=True)


def test_groups_out_of_order_are_refused_with_the_way_out(
    write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]],
) -> None:
    folder, _, _ = write(SHUFFLED)
    with pytest.raises(InputError, match=r"cannot be kept: its groups .* \(desc_act\)") as told:
        plan(folder, target="onnxruntime")
    assert "--requantize" in told.value.hint
    assert plan(folder, target="onnxruntime", requantize=True).scheme.kept == ()


@pytest.mark.parametrize(
    ("name", "label", "says"),
    [
        ("awq", "executorch", "XNNPACK has no zero points"),
        ("int8 in groups", "executorch", "XNNPACK takes int8 with a scale for each row alone"),
        ("gptq", "coreml-ane", "the Neural Engine decodes one scale per row only"),
        ("gptq", "executorch-portable", "it takes no codes made elsewhere"),
        ("gptq", "onnxruntime-qnn", "it takes no codes made elsewhere"),
    ],
)
def test_targets_say_which_codes_they_cannot_take(
    name: str, label: str, says: str, write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]]
) -> None:
    folder, _, _ = write(FORMATS[name])
    made = plan(folder, target=label, context=64)
    with pytest.raises(UsageError, match=rf"{says}.*: pass --requantize"):
        refuse_early(made, read_spec(folder), {label: targets.load(label)})


def test_a_recipe_of_kept_codes_gives_the_same_plan(
    write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]],
) -> None:
    folder, _, _ = write(FORMATS["gptq"])
    for choices in ({}, {"head": "int8"}, {"requantize": True}):
        made = plan(folder, target="onnxruntime", **choices)
        again = plan(folder, **choices_of(made))
        assert replace(again, corpus=made.corpus) == made


def test_scales_are_rounded_to_what_the_target_holds_and_the_change_is_told(
    write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]], tmp_path: Path
) -> None:
    folder, _, _ = write(FORMATS["gptq"])
    made = plan(folder, target="executorch", store=tmp_path)
    store = kept_store(open_checkpoint(folder), made)
    arithmetic: Arithmetic = targets.load("executorch").arithmetic(made.scheme)
    rounded, exact = store.as_computed(arithmetic), store[Q_PROJ]
    found = rounded[Q_PROJ]
    assert isinstance(found, QuantizedTensor)
    assert isinstance(exact, QuantizedTensor)
    assert torch.equal(found.codes, exact.codes)
    assert torch.equal(found.scales, exact.scales.bfloat16().float())
    assert rounded.rounded_scales.keys() == {Q_PROJ}
    assert 0 < rounded.rounded_scales[Q_PROJ] < 2**-8
    same = store.as_computed(targets.load("onnxruntime").arithmetic(made.scheme))
    assert torch.equal(same[Q_PROJ].scales, exact.scales)  # type: ignore[union-attr]
    assert same.rounded_scales == {}


def test_digests_tell_zero_points_apart() -> None:
    codes, scales = torch.ones(2, 32, dtype=torch.int8), torch.ones(2, 1)
    plain = QuantizedTensor(name="w", bits=4, group_size=32, codes=codes, scales=scales)
    zeros = replace(plain, zeros=torch.zeros(2, 1, dtype=torch.int8))
    other = replace(plain, zeros=torch.ones(2, 1, dtype=torch.int8))
    assert len({digest(plain), digest(zeros), digest(other)}) == 3
    assert torch.equal(other.dequantize(), torch.zeros(2, 32))


def test_inspect_tells_of_codes(write: Callable[[Format], tuple[Path, dict[str, Tensor], Toy]]) -> None:
    folder, _, _ = write(FORMATS["packed by row"])
    facts = checkpoint_facts(open_checkpoint(folder))
    assert facts["codes"] == {"compressed-tensors int4 by row": 14}
    assert as_bytes(facts)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0], ids=lambda kind: kind.name)
def test_codes_of_a_gguf_file_are_kept_where_every_target_takes_them(
    kind: Kind, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "toy.gguf", make_toy(), kind=kind)
    checkpoint = open_checkpoint(path)
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, LazyCodes):
            assert torch.equal(tensor.coded().dequantize(), tensor.read()), name  # gguf.dequantize
    scheme = plan(path, target="onnxruntime,coreml").scheme
    assert len(scheme.kept[0].names) == 15
    assert scheme.head is {Kind.Q4_0: Precision.INT4, Kind.Q8_0: Precision.INT8}[kind]
    decoded = plan(path, target="onnxruntime,executorch")
    assert decoded.scheme.kept == ()
    assert "for executorch: XNNPACK takes" in (why_decoded(checkpoint.tensors, decoded) or "")
    assert why_decoded(checkpoint.tensors, plan(path, target="onnxruntime")) is None
    with pytest.raises(UsageError, match="--precision would change them"):
        plan(path, target="onnxruntime", precision="int4")


def test_a_gguf_file_of_other_types_is_quantized_anew(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "toy.gguf", make_toy(), kind=Kind.Q5_1)
    assert plan(path, target="onnxruntime", precision="int8").scheme.kept == ()


def test_a_head_of_another_type_beside_kept_codes_becomes_int8(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy(tie_word_embeddings=False)
    path = write_gguf(tmp_path / "toy.gguf", toy, kind=Kind.Q4_0, without="output.weight")
    head = toy.model.lm_head.weight.detach().numpy()
    file = gguf_with(path, "output.weight", gguf.quantize(head, Kind.Q5_1), Kind.Q5_1)
    made = plan(file, target="onnxruntime", store=tmp_path)
    assert (made.scheme.head, made.scheme.embedding) == (Precision.INT8, Precision.INT4)
    assert kept_store(open_checkpoint(file), made).quantized_names(None) == [HEAD]


def gguf_with(path: Path, name: str, tensor: Any, kind: Kind) -> Path:
    """A copy of the file with one tensor more."""
    read = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("more.gguf"), "llama")
    for field in read.fields.values():
        if field.name.startswith(("llama.", "tokenizer.")):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for one in read.tensors:
        writer.add_tensor(one.name, one.data, raw_dtype=one.tensor_type)
    writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("more.gguf")


def test_adapters_of_qlora_stay_beside_the_codes_or_are_merged(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy(intermediate_size=192)
    meant = write_meta_coded(tmp_path / "qlora", toy.folder, rank=4)
    merged = open_checkpoint(tmp_path / "qlora", decoded=True)
    assert merged.spec.adapter_rank == 0
    for name, weight in meant.items():
        assert torch.equal(merged.read(name), weight), name
    wanted = transformers_logits(toy, meant, STEPS)
    for decoded in (False, True):
        assert (logits_of(tmp_path / "qlora", decoded=decoded, steps=STEPS) - wanted).abs().max() < 1e-4
    scheme = plan(tmp_path / "qlora", target="onnxruntime").scheme
    assert [str(codes.kind) for codes in scheme.kept] == ["int8 by row", "int4 in groups of 32"]
    assert scheme.precision("model.layers.0.self_attn.q_proj.lora_A.weight") is Precision.FP16


def test_the_rotation_of_spinquant_is_undone_or_refused(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    toy = make_toy(intermediate_size=256)
    meant = write_meta_coded(tmp_path / "spinquant", toy.folder, spinquant=True)
    checkpoint = open_checkpoint(tmp_path / "spinquant")
    for name, weight in meant.items():
        assert (checkpoint.read(name) - weight).abs().max() < 1e-6, name
    with pytest.raises(InputError, match=r"turned by a Hadamard matrix \(SpinQuant's R4\)") as told:
        plan(tmp_path / "spinquant", target="executorch")
    assert "--requantize" in told.value.hint
    got = logits_of(tmp_path / "spinquant", decoded=True, steps=STEPS)
    assert (got - transformers_logits(toy, meant, STEPS)).abs().max() < 1e-4


def test_a_hadamard_matrix_is_that_of_scipy() -> None:
    from scipy.linalg import hadamard as theirs

    assert torch.allclose(hadamard(torch.eye(64)), torch.tensor(theirs(64) / 8).float())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_args": {"scheme": "int2"}}, "quantization_args.scheme is 'int2'; known: int4_weight_int8"),
        ({"lora_args": {"rank": 0, "scale": 2.0}}, "rank is 0, a positive integer was expected"),
        ({"lora_args": {"rank": 8, "scale": 2.0}}, r"has shape \[4, 64\], \[8, 64\] was expected"),
    ],
)
def test_params_of_another_scheme_are_refused(
    change: dict[str, Any], says: str, make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    write_meta_coded(tmp_path / "qlora", make_toy(intermediate_size=192).folder, rank=4)
    path = tmp_path / "qlora" / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=says):
        open_checkpoint(tmp_path / "qlora")


def test_a_plain_checkpoints_weights_are_not_looked_at_to_plan(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy()
    (toy.folder / "model.safetensors").unlink()
    assert kept_scheme(toy.folder, {}, read_spec(toy.folder)) is None
