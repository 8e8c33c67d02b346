"""The Core ML target: what lies in its packages, and that they answer as the reference does."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from calibration.layers import ROUNDED, quantize
from exporter.checkpoint import BUNDLED_MODEL, Checkpoint, open_checkpoint
from exporter.errors import HostError, InputError, LoweringError, MissingToolError, UsageError
from exporter.metrics import kl_divergence
from exporter.model.graph import Graph, Node
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.quantized import PalettizedTensor, QuantizedTensor
from exporter.spec import (
    EMBEDDING,
    PER_ROW,
    Arithmetic,
    Artifact,
    Logits,
    Plan,
    Precision,
    Rule,
    Sampling,
    WeightScheme,
)
from exporter.store import StoredWeight, WeightStore
from targets import load
from targets.base import Runner
from targets.coreml import COMPUTE_UNITS

TARGET = load("coreml")
CONTEXT = 48
MODEL_FILE = Path("Data", "com.apple.CoreML", "model.mlmodel")
WEIGHT_FILE = Path("Data", "com.apple.CoreML", "weights", "weight.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """One artifact with all that it was made from."""

    artifact: Artifact
    graph: Graph
    store: WeightStore
    plan: Plan

    def reference(self, arithmetic: Arithmetic | None = None) -> Reference:
        return Reference(self.graph, self.store, arithmetic or self.artifact.arithmetic)

    def structure(self) -> Any:
        return TARGET.open_structure(
            self.artifact, graph=self.graph, store=self.store, plan=self.plan, scratch=self.plan.out
        )


def save_checkpoint(folder: Path, *, tied: bool = True, kv_heads: int = 2, head_dim: int = 16) -> Checkpoint:
    """A random Llama with logits as wide as a trained one's, and norms that are not all ones."""
    import transformers

    torch.manual_seed(kv_heads)
    config = transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def export(
    checkpoint: Checkpoint, folder: Path, scheme: WeightScheme, *, context: int = CONTEXT, logits: Logits = Logits.ALL
) -> Exported:
    plan = Plan(
        checkpoint=checkpoint.folder,
        targets=("coreml",),
        scheme=scheme,
        context=context,
        logits=logits,
        recipe=ROUNDED,
        sampling=Sampling(),
        out=folder,
        store=folder / "store",
        evaluation_text=folder / "none.txt",
        threads=1,
    )
    store, _ = quantize(checkpoint, scheme, root=plan.store)
    graph = trace(checkpoint.spec)
    return Exported(artifact=TARGET.lower(graph, store, plan, folder / "out"), graph=graph, store=store, plan=plan)


def scheme_of(
    body: str, *, ends: str | None = None, group_size: int = 32, rules: dict[str, str] | None = None
) -> WeightScheme:
    precision = Precision(ends or body)
    return WeightScheme(
        body=Precision(body),
        embedding=precision,
        head=precision,
        group_size=group_size,
        rules=tuple(Rule(pattern=name, precision=Precision(rule)) for name, rule in (rules or {}).items()),
    )


UNLIKE_TWINS = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.[kv]_proj")
"""Projections that are to differ in precision from others with the same input."""


SCHEMES = {
    "int4": scheme_of("int4", ends="int8"),
    "int4 throughout": scheme_of("int4"),
    "int8": scheme_of("int8"),
    "fp16": scheme_of("fp16"),
    "fp32": scheme_of("fp32"),
    "int4 between fp32 ends": scheme_of("int4", ends="fp32"),
    "fp32 between int8 ends": scheme_of("fp32", ends="int8"),
    "lut4 throughout": scheme_of("lut4"),
    "int4 per row throughout": scheme_of("int4", group_size=PER_ROW),
    "int4, int8 in places": scheme_of("int4", ends="int8", rules=dict.fromkeys(UNLIKE_TWINS, "int8")),
    "int8, int4 in places": scheme_of("int8", rules=dict.fromkeys(UNLIKE_TWINS, "int4")),
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    return {
        "tied, grouped queries": save_checkpoint(tmp_path_factory.mktemp("gqa") / "toy"),
        "untied, one key head per query head": save_checkpoint(
            tmp_path_factory.mktemp("mha") / "toy", tied=False, kv_heads=4
        ),
        "one key head of eight channels": save_checkpoint(
            tmp_path_factory.mktemp("mqa") / "toy", kv_heads=1, head_dim=8
        ),
    }


@pytest.fixture(scope="module")
def gqa(toys: dict[str, Checkpoint]) -> Checkpoint:
    return toys["tied, grouped queries"]


Artifacts = Callable[[str, str], Exported]


@pytest.fixture(scope="module")
def artifacts(toys: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The artifact of a toy under a scheme, made once; tests that change one take a copy."""

    @functools.cache
    def make(toy: str, scheme: str) -> Exported:
        return export(toys[toy], tmp_path_factory.mktemp("artifact"), SCHEMES[scheme])

    return make


@pytest.fixture(scope="module")
def int4(artifacts: Artifacts) -> Exported:
    return artifacts("tied, grouped queries", "int4")


def tokens(count: int, *, vocabulary: int = 160) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def drive(runner: Runner | Reference, ids: list[int]) -> Tensor:
    """Logits of a prefill, of a second one on a cache that is not empty, and of single steps."""
    cuts = [0, len(ids) // 2, len(ids) - 5, *range(len(ids) - 4, len(ids) + 1)]
    return torch.cat([runner.feed(ids[start:end]) for start, end in itertools.pairwise(cuts)])


@pytest.mark.toolchain
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("toy", ["tied, grouped queries", "untied, one key head per query head"])
def test_package_computes_the_graph(artifacts: Artifacts, toy: str, scheme: str) -> None:
    exported = artifacts(toy, scheme)
    ids = tokens(40)
    wanted = drive(exported.reference(), ids)
    with exported.structure() as runner:
        structure = drive(runner, ids)
    with TARGET.open(exported.artifact, threads=1) as runner:
        shipped = drive(runner, ids)
    assert wanted.std() > 1
    assert (structure - drive(exported.reference(FULL_PRECISION), ids)).abs().max() <= 1e-4
    assert kl_divergence(wanted, shipped).mean() <= 1e-4


@pytest.mark.toolchain
@pytest.mark.parametrize("scheme", ["int4", "int8", "fp16", "fp32"])
def test_trained_sample_answers_in_float16_as_the_reference(scheme: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(BUNDLED_MODEL)
    exported = export(checkpoint, tmp_path, SCHEMES[scheme], context=256)
    reference = exported.reference()
    ids = sampled(reference, first=checkpoint.spec.bos_token_id or 0, count=96)
    reference.rewind(0)
    wanted = drive(reference, ids)
    with exported.structure() as runner:
        structure = drive(runner, ids)
    with TARGET.open(exported.artifact, threads=1) as runner:
        shipped = drive(runner, ids)
    assert (structure - drive(exported.reference(FULL_PRECISION), ids)).abs().max() <= 1e-4
    assert kl_divergence(wanted, shipped).mean() <= 1e-4
    best, second = wanted.topk(2, dim=-1).values.unbind(-1)
    flipped = wanted.argmax(dim=-1) != shipped.argmax(dim=-1)
    assert (best - second)[flipped].tolist() == pytest.approx([0.0] * int(flipped.sum()), abs=0.05)  # near ties only


def sampled(reference: Reference, *, first: int, count: int) -> list[int]:
    """What the model itself would write, without the loops that greedy decoding falls into."""
    generator, ids = torch.Generator().manual_seed(0), [first]
    while len(ids) < count:
        probabilities = reference.feed(ids[-1:])[-1].softmax(dim=-1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return ids


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("toy", "scheme"),
    [
        *(("untied, one key head per query head", scheme) for scheme in SCHEMES),
        ("tied, grouped queries", "int4"),
        ("one key head of eight channels", "int8"),  # so few scales that they lie in the program, not in the blob
    ],
)
def test_weights_lie_in_the_file_bit_for_bit(artifacts: Artifacts, toy: str, scheme: str) -> None:
    exported = artifacts(toy, scheme)
    found = dict(TARGET.read_weights(exported.artifact))
    assert sorted(found) == sorted(exported.store)
    for name in exported.store:
        assert_same_weight(found[name], exported.store[name])


def assert_same_weight(found: StoredWeight, wanted: StoredWeight) -> None:
    if isinstance(wanted, QuantizedTensor):
        assert isinstance(found, QuantizedTensor)
        assert (found.name, found.bits, found.group_size) == (wanted.name, wanted.bits, wanted.group_size)
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.scales, wanted.scales)
    elif isinstance(wanted, PalettizedTensor):
        assert isinstance(found, PalettizedTensor)
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.tables, wanted.tables)
    else:
        assert isinstance(found, Tensor)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


@pytest.mark.toolchain
@pytest.mark.parametrize("scheme", ["int4", "fp16"])
def test_equal_weights_keep_their_own_names(artifacts: Artifacts, gqa: Checkpoint, scheme: str, tmp_path: Path) -> None:
    class Twins(WeightStore):
        """Every layer has the weights of the first one, and the last norm is all ones."""

        def __getitem__(self, name: str) -> QuantizedTensor | Tensor:
            stored = super().__getitem__(name.replace("layers.1.", "layers.0."))
            if isinstance(stored, QuantizedTensor):
                return dataclasses.replace(stored, name=name)
            return torch.ones_like(stored) if name == "model.norm.weight" else stored

    exported = artifacts("tied, grouped queries", scheme)
    twins = Twins(checkpoint=gqa, key=exported.store.key, root=exported.plan.store)
    artifact = TARGET.lower(exported.graph, twins, exported.plan, tmp_path / "twins")
    found = dict(TARGET.read_weights(artifact))
    assert sorted(found) == sorted(twins)
    for name in twins:
        assert_same_weight(found[name], twins[name])


@pytest.mark.toolchain
def test_one_changed_scale_in_the_file_shows(int4: Exported, tmp_path: Path) -> None:
    artifact = tampered(int4, tmp_path, lambda _: None)
    name = "model.layers.1.mlp.down_proj.weight"
    before = int4.store[name]
    assert isinstance(before, QuantizedTensor)
    file = artifact.path / WEIGHT_FILE
    contents, scales = file.read_bytes(), before.scales.half().numpy().tobytes()
    assert contents.count(scales) == 1
    place = contents.index(scales)
    file.write_bytes(contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :])
    after = dict(TARGET.read_weights(artifact))[name]
    assert isinstance(after, QuantizedTensor)
    assert (after.scales != before.scales).nonzero().tolist() == [[0, 0]]


@pytest.mark.toolchain
def test_compressed_constant_that_is_no_weight_is_an_error(int4: Exported, tmp_path: Path) -> None:
    def rename(operations: Any) -> None:
        compressed = next(o for o in operations if o.type == "constexpr_blockwise_shift_scale")
        compressed.outputs[0].name = "rope_cosines"

    with pytest.raises(LoweringError, match="stores rope_cosines as codes, which is no weight of the model"):
        list(TARGET.read_weights(tampered(int4, tmp_path, rename)))


@pytest.mark.toolchain
def test_tied_head_is_stored_once(artifacts: Artifacts) -> None:
    exported = artifacts("tied, grouped queries", "fp32")
    stored = sum(tensor.numel() * 4 for name in exported.store if isinstance(tensor := exported.store[name], Tensor))
    embedding = exported.store[EMBEDDING]
    assert isinstance(embedding, Tensor)
    size = (exported.artifact.path / WEIGHT_FILE).stat().st_size
    assert stored <= size < stored + embedding.nbytes


@pytest.mark.toolchain
def test_features_are_those_that_swift_transformers_looks_for(int4: Exported) -> None:
    from targets.coreml.toolchain import ct, quiet

    with quiet():
        model = ct.models.MLModel(str(int4.artifact.path), skip_model_load=True)
    description = model.get_spec().description
    spec = int4.graph.spec
    arrays = {feature.name: feature.type.multiArrayType for feature in (*description.input, *description.output)}
    names = {value: name for name, value in arrays["logits"].ArrayDataType.items()}
    assert {name: names[array.dataType] for name, array in arrays.items()} == {
        "inputIds": "INT32",
        "causalMask": "FLOAT16",
        "logits": "FLOAT16",
    }
    ranges = {
        name: [(size.lowerBound, size.upperBound) for size in arrays[name].shapeRange.sizeRanges]
        for name in ("inputIds", "causalMask")
    }
    assert ranges == {
        "inputIds": [(1, 1), (1, CONTEXT)],
        "causalMask": [(1, 1), (1, 1), (1, CONTEXT), (1, CONTEXT)],
    }
    states = {state.name: list(state.type.stateType.arrayType.shape) for state in description.state}
    cache = [spec.num_hidden_layers, 1, spec.num_key_value_heads, CONTEXT, spec.head_dim]
    assert states == {"keyCache": cache, "valueCache": cache}
    metadata = model.user_defined_metadata
    assert metadata["co.huggingface.exporters.name"] == spec.name
    assert not [key for key in metadata if "date" in key]


@pytest.mark.toolchain
def test_the_whole_context_can_be_fed_rewound_and_fed_again(int4: Exported) -> None:
    ids = tokens(CONTEXT)
    with TARGET.open(int4.artifact, threads=1) as runner:
        assert runner.position == 0
        first = runner.feed(ids)
        assert runner.position == CONTEXT
        assert first.shape == (CONTEXT, int4.graph.spec.vocab_size)
        runner.rewind(0)
        other = runner.feed(ids[::-1])
        assert not torch.equal(first, other)
        runner.rewind(0)
        assert torch.equal(runner.feed(ids), first)
        runner.rewind(CONTEXT - 7)
        torch.testing.assert_close(runner.feed(ids[-7:]), first[-7:], atol=1e-2, rtol=0)
        assert runner.load_s > 0


@pytest.mark.toolchain
@pytest.mark.parametrize(("fed", "more"), [(0, CONTEXT + 1), (CONTEXT, 1), (10, 0)])
def test_feeding_beyond_the_context_or_nothing_is_refused(int4: Exported, fed: int, more: int) -> None:
    with TARGET.open(int4.artifact, threads=1) as runner:
        if fed:
            runner.feed(tokens(fed))
        with pytest.raises(InputError, match=f"{more} tokens at position {fed} do not fit a context of {CONTEXT}"):
            runner.feed(tokens(more))
        assert runner.position == fed


@pytest.mark.toolchain
def test_rewinding_forward_is_refused(int4: Exported) -> None:
    with TARGET.open(int4.artifact, threads=1) as runner:
        runner.feed([1, 2])
        with pytest.raises(InputError, match="cannot rewind to position 3: the cache holds 2 tokens"):
            runner.rewind(3)


@pytest.mark.toolchain
def test_last_logits_are_the_last_of_all(int4: Exported, gqa: Checkpoint, tmp_path: Path) -> None:
    last = export(gqa, tmp_path, int4.plan.scheme, logits=Logits.LAST)
    ids = tokens(12)
    with TARGET.open(int4.artifact, threads=1) as every, TARGET.open(last.artifact, threads=1) as only:
        for part in (ids[:7], ids[7:11], ids[11:]):
            found, wanted = only.feed(part), every.feed(part)
            assert found.shape == (1, int4.graph.spec.vocab_size)
            torch.testing.assert_close(found, wanted[-1:], atol=2e-2, rtol=0)


LOWER_AGAIN = """
import sys
from pathlib import Path
import tests_of_coreml as tests
checkpoint = tests.open_checkpoint(Path(sys.argv[1]))
tests.export(checkpoint, Path(sys.argv[2]), tests.scheme_of("int4", ends="int8"))
"""


@pytest.mark.toolchain
def test_the_same_input_gives_the_same_bytes(int4: Exported, gqa: Checkpoint, tmp_path: Path) -> None:
    """In another process, where sets have another order."""
    (tmp_path / "tests_of_coreml.py").write_bytes(Path(__file__).read_bytes())
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", LOWER_AGAIN, str(gqa.folder), str(tmp_path / "again")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    first, again = int4.artifact.path, tmp_path / "again" / "out" / int4.artifact.path.name
    assert contents(first) == contents(again)
    assert {"Manifest.json", str(MODEL_FILE), str(WEIGHT_FILE)} == set(contents(first))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def tampered(exported: Exported, folder: Path, change: Callable[[Any], None]) -> Artifact:
    """A copy of the artifact whose program was changed."""
    from targets.coreml.toolchain import Model_pb2

    path = folder / "tampered.mlpackage"
    for name, content in contents(exported.artifact.path).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    model = Model_pb2.Model()
    model.ParseFromString((path / MODEL_FILE).read_bytes())
    function = model.mlProgram.functions["main"]
    change(function.block_specializations[function.opset].operations)
    (path / MODEL_FILE).write_bytes(model.SerializeToString())
    return dataclasses.replace(exported.artifact, path=path)


def drop_a_state_write(operations: Any) -> None:
    write = next(index for index, operation in enumerate(operations) if operation.type == "write_state")
    del operations[write]


def swap_rope_halves(operations: Any) -> None:
    rotated = next(o for o in operations if o.type == "concat" and len(o.outputs[0].type.tensorType.dimensions) == 4)
    first, second = (binding.name for binding in rotated.inputs["values"].arguments)
    rotated.inputs["values"].arguments[0].name, rotated.inputs["values"].arguments[1].name = second, first


def forget_the_mask(operations: Any) -> None:
    tile = next(operation for operation in operations if operation.type == "tile")
    tile.inputs["reps"].arguments[0].name = next(
        o.outputs[0].name for o in operations if o.type == "const" and o.outputs[0].name.startswith("transpose")
    )


@pytest.mark.toolchain
@pytest.mark.parametrize("fault", [drop_a_state_write, swap_rope_halves])
def test_a_fault_in_the_program_moves_the_logits(int4: Exported, fault: Callable[[Any], None], tmp_path: Path) -> None:
    broken = dataclasses.replace(int4, artifact=tampered(int4, tmp_path, fault))
    ids = tokens(40)
    wanted = drive(int4.reference(FULL_PRECISION), ids)
    with int4.structure() as sound, broken.structure() as unsound:
        assert (drive(sound, ids) - wanted).abs().max() <= 1e-4
        assert (drive(unsound, ids) - wanted).abs().max() > 0.1


@pytest.mark.toolchain
def test_a_tile_of_the_wrong_shape_is_caught(int4: Exported, tmp_path: Path) -> None:
    broken = dataclasses.replace(int4, artifact=tampered(int4, tmp_path, forget_the_mask))
    with broken.structure() as runner, pytest.raises(LoweringError):
        runner.feed([1, 2, 3])


@pytest.mark.toolchain
@pytest.mark.parametrize(("position", "name", "value"), [(8, "scale", 0.5), (9, "window", 16)])
def test_attention_that_core_ml_cannot_do_is_refused_by_name(
    int4: Exported, position: int, name: str, value: float, tmp_path: Path
) -> None:
    def other(node: Node) -> Node:
        arguments = (*node.arguments[:position], value, *node.arguments[position + 1 :])
        return dataclasses.replace(node, arguments=arguments) if node.op == "attention" else node

    graph = dataclasses.replace(int4.graph, nodes=tuple(other(node) for node in int4.graph.nodes))
    with pytest.raises(LoweringError, match=f"op 'attention' of layer 0: {name} is {value:g}, only"):
        TARGET.lower(graph, int4.store, int4.plan, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.toolchain
def test_what_coremltools_raises_becomes_a_lowering_error_and_leaves_no_file(
    int4: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from targets.coreml.toolchain import ct

    def convert(*_: object, **__: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(ct, "convert", convert)
    with pytest.raises(LoweringError, match="RuntimeError: no such luck") as caught:
        TARGET.lower(int4.graph, int4.store, int4.plan, tmp_path / "out")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.toolchain
def test_an_older_package_is_replaced(int4: Exported, tmp_path: Path) -> None:
    (tmp_path / "model.mlpackage" / "stale").mkdir(parents=True)
    artifact = TARGET.lower(int4.graph, int4.store, int4.plan, tmp_path)
    assert artifact.path == TARGET.find(tmp_path) == tmp_path / "model.mlpackage"
    assert contents(artifact.path) == contents(int4.artifact.path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.mlpackage"]


@pytest.mark.toolchain
def test_scales_that_float16_cannot_hold_are_refused(int4: Exported, tmp_path: Path) -> None:
    class Huge(WeightStore):
        def __getitem__(self, name: str) -> QuantizedTensor | Tensor:
            stored = super().__getitem__(name)
            if isinstance(stored, QuantizedTensor):
                return dataclasses.replace(stored, scales=torch.full_like(stored.scales, 2.0**17))
            return stored

    store = Huge(checkpoint=int4.store.checkpoint, key=int4.store.key, root=int4.plan.store)
    with pytest.raises(LoweringError, match=r"scales that float16 cannot hold: the largest is 1.31e\+05"):
        TARGET.lower(int4.graph, store, int4.plan, tmp_path)


@pytest.mark.toolchain
@pytest.mark.parametrize("units", [None, *COMPUTE_UNITS])
def test_core_ml_is_given_the_features_and_one_state(
    int4: Exported, units: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for ``MLModel.predict``, which this host may not have: only the calls are checked."""
    from targets.coreml import runner as module

    calls: list[dict[str, Any]] = []
    states: list[object] = []

    class Model:
        def __init__(self, path: str, *, compute_units: object) -> None:
            assert path == str(int4.artifact.path)
            assert compute_units is module.ct.ComputeUnit[units or "CPU_AND_GPU"]

        def make_state(self) -> object:
            states.append(object())
            return states[-1]

        def predict(self, inputs: dict[str, Any], *, state: object) -> dict[str, Any]:
            assert state is states[-1]
            calls.append(inputs)
            return {"logits": np.zeros((1, inputs["inputIds"].shape[1], 160), dtype=np.float16)}

    monkeypatch.setattr("targets.coreml.executes_here", lambda: True)
    monkeypatch.setattr(
        module, "ct", SimpleNamespace(models=SimpleNamespace(MLModel=Model), ComputeUnit=module.ct.ComputeUnit)
    )
    target = TARGET.on(units) if units else TARGET
    assert f"Core ML on {units or 'CPU_AND_GPU'}, MLModel" in target.runtime()
    with target.open(int4.artifact, threads=1) as runner:
        runner.feed([5, 6])
        assert runner.feed([7, 8]).shape == (2, 160)
    assert len(states) == 1
    assert [(call["inputIds"].dtype, call["causalMask"].dtype) for call in calls] == [("int32", "float16")] * 2
    assert calls[1]["inputIds"].tolist() == [[7, 8]]
    assert calls[1]["causalMask"].tolist() == [[[[0, 0, 0, -np.inf], [0, 0, 0, 0]]]]


@pytest.mark.toolchain
def test_a_package_that_core_ml_does_not_load_is_a_matter_of_the_host(
    int4: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr("targets.coreml.executes_here", lambda: True)
    with pytest.raises(HostError, match="Core ML does not load"):
        TARGET.open(dataclasses.replace(int4.artifact, path=int4.artifact.path / "none"), threads=1)


def test_compute_units_are_those_of_core_ml(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="TPU is unknown; known: CPU_AND_GPU, ALL, CPU_ONLY, CPU_AND_NE"):
        TARGET.on("TPU")
    monkeypatch.setattr("targets.coreml.executes_here", lambda: False)
    with pytest.raises(UsageError, match="on macOS 15 and later only"):
        TARGET.on("ALL")


@pytest.mark.toolchain
def test_coremltools_has_no_other_compute_units() -> None:
    from targets.coreml.toolchain import ct

    assert {unit.name for unit in ct.ComputeUnit} == set(COMPUTE_UNITS)


def test_the_target_is_known_by_its_name() -> None:
    assert (TARGET.name, TARGET.backend) == ("coreml", "gpu")
    assert load("coreml-gpu").backend == "gpu"


def test_asking_the_target_imports_no_toolchain() -> None:
    code = "import sys, targets.coreml as t; t.load('gpu').latency_unmeasurable(); print('coremltools' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    answer = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert answer.stdout == "False\n"


def test_a_missing_toolchain_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    for name in ("toolchain", "package", "evaluate", "runner", "lower"):
        monkeypatch.delitem(sys.modules, f"targets.coreml.{name}", raising=False)
    with pytest.raises(MissingToolError, match="the Core ML target needs coremltools") as caught:
        TARGET.open(None, threads=1)  # type: ignore[arg-type]
    assert caught.value.hint == "pip install coremltools==9.0"


def test_a_context_of_one_position_is_refused(gqa: Checkpoint) -> None:
    plan = Plan(
        checkpoint=gqa.folder,
        targets=("coreml",),
        scheme=scheme_of("int4"),
        context=1,
        recipe=ROUNDED,
        sampling=Sampling(),
        out=gqa.folder,
        store=gqa.folder,
        evaluation_text=gqa.folder,
        threads=1,
    )
    assert "the context is 1" in (TARGET.refuse(gqa.spec, plan) or "")
    assert TARGET.refuse(gqa.spec, dataclasses.replace(plan, context=2)) is None


@pytest.mark.parametrize(
    ("system", "release", "runtime"),
    [
        ("linux", "", "reference-evaluated, not run by Core ML"),
        ("darwin", "14.6", "reference-evaluated, not run by Core ML"),
        ("darwin", "15.0", "MLModel"),
    ],
)
def test_the_evaluator_is_never_taken_for_core_ml(
    system: str, release: str, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), ""))
    assert runtime in TARGET.runtime()
    assert (TARGET.latency_unmeasurable() is None) == (runtime == "MLModel")
