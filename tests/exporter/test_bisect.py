"""Bisecting the file of an artifact: the op that was broken is named, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from typer.testing import CliRunner

import targets
from calibration.layers import quantize
from exporter.bisect import Bisection, find_partings, parts_at
from exporter.bundle import MANIFEST, file_entries, open_bundle, read_artifact, write_json
from exporter.checkpoint import BUNDLED_MODEL, open_checkpoint
from exporter.cli import app
from exporter.errors import LoweringError
from exporter.model.graph import Constant, Graph, Node, Value, Weight
from exporter.model.reference import FULL_PRECISION
from exporter.model.trace import trace
from exporter.quantized import QuantizedTensor, pack_int4
from exporter.spec import PER_ROW, Activations, Logits, Plan, Prefer
from exporter.store import WeightStore
from targets.base import Observation, Target
from tests.conftest import Toy, later
from tests.test_contract import VICTIM, OneWeightChanged, drop_write_coreml, one_scale_up

pytestmark = pytest.mark.toolchain
RUNNER = CliRunner()
CALLS = {"prefill": list(range(1, 33)), "decode": [33]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A toy of three layers, its bundle, and the store."""
    from tests.conftest import write_toy

    folder = tmp_path_factory.mktemp("bisect")
    toy = write_toy(folder / "toy", num_hidden_layers=3, vocab_size=2048, bos_token_id=None, eos_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED_MODEL / name, toy.folder / name)
    words = [str(toy.folder), "-t", "onnxruntime", "-o", str(folder / "out"), "--store", str(folder / "store")]
    result = RUNNER.invoke(app, [*words, "--calibration", "none"])
    out = folder / "out"
    bundle = next(path for path in out.iterdir() if path.name.startswith("onnxruntime"))
    assert (bundle / MANIFEST).exists(), result.output
    return toy.folder, bundle, folder / "store"


def bisected(made: tuple[Path, Path, Path], bundle: Path) -> tuple[int, dict[str, Any]]:
    manifest = json.loads((bundle / MANIFEST).read_text())
    write_json(bundle / MANIFEST, {**manifest, "files": file_entries(bundle)})
    words = ["validate", str(bundle), "--against", str(made[0]), "--store", str(made[2]), "--bisect", "--json"]
    result = RUNNER.invoke(app, words)
    assert result.stdout, result.output
    return result.exit_code, json.loads(result.stdout)[0]


def broken(made: tuple[Path, Path, Path], folder: Path) -> Path:
    shutil.copytree(made[1], folder)
    return folder


def test_a_wrong_epsilon_is_found_in_its_layer(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle = broken(made, tmp_path / "bundle")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    name = "model.layers.1.post_attention_layernorm.weight"
    (norm,) = (node for node in model.graph.node if name in node.input)
    (epsilon,) = (attribute for attribute in norm.attribute if attribute.name == "epsilon")
    epsilon.f = 0.05
    onnx.save(model, bundle / "model.onnx")
    code, outcome = bisected(made, bundle)
    assert code == 7
    assert outcome["bisection"].startswith(f"layer 1, rms_norm {name} is off by ")
    assert ";" not in outcome["bisection"]


def test_changed_codes_are_found_in_their_matrix(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle = broken(made, tmp_path / "bundle")
    name = "model.layers.2.mlp.down_proj.weight"
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    (codes,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{name}.codes")
    place = {entry.key: entry.value for entry in codes.external_data}
    content = bytearray((bundle / "model.onnx.data").read_bytes())
    content[int(place["offset"])] ^= 0x01
    (bundle / "model.onnx.data").write_bytes(content)
    code, outcome = bisected(made, bundle)
    assert code == 7
    assert outcome["bisection"].startswith(f"layer 2, linear {name} is off by ")
    assert ";" not in outcome["bisection"]


def test_a_cache_that_is_not_written_is_found_in_its_attention(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bundle = broken(made, tmp_path / "bundle")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][1]
    attention.output[1] = "lost"
    model.graph.node.append(onnx.helper.make_node("Identity", ["past_key_values.1.key"], ["present.1.key"]))
    onnx.save(model, bundle / "model.onnx")
    code, outcome = bisected(made, bundle)
    assert code == 7
    assert outcome["bisection"].startswith("layer 1, attention ")


@pytest.mark.parametrize("name", targets.NAMES)
@pytest.mark.parametrize(
    ("precision", "logits"), [*((p, Logits.LAST) for p in ("fp32", "fp16", "int8", "int4")), ("int4", Logits.ALL)]
)
def test_every_op_of_a_right_file_is_found_and_right(
    name: str, precision: str, logits: Logits, make_toy: Any, make_plan: Any
) -> None:
    assert parted(Workshop.of(name, make_toy(), make_plan, precision=precision, logits=logits)) == []


@pytest.mark.parametrize("name", targets.NAMES)
def test_a_head_of_its_own_and_one_scale_per_row_are_found_too(name: str, make_toy: Any, make_plan: Any) -> None:
    toy = make_toy(tie_word_embeddings=False)
    assert parted(Workshop.of(name, toy, make_plan, head="int4", group_size=PER_ROW)) == []


def test_integer_products_are_found_too(make_toy: Any, make_plan: Any) -> None:
    toy = make_toy(tie_word_embeddings=False)
    assert parted(Workshop.of("onnxruntime", toy, make_plan, precision="int8", prefer=Prefer.PREFILL)) == []


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """All that an artifact is made from, and its bisection compares with."""

    target: Target
    plan: Plan
    graph: Graph
    store: WeightStore

    @classmethod
    def of(cls, name: str, toy: Toy, make_plan: Any, **changes: Any) -> Workshop:
        checkpoint = open_checkpoint(toy.folder)
        plan: Plan = make_plan(toy.folder, targets=(name,), **changes)
        plan.out.mkdir(exist_ok=True)
        store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
        return cls(target=targets.load(name), plan=plan, graph=trace(checkpoint.spec), store=store)


@pytest.fixture(params=targets.NAMES)
def workshop(request: pytest.FixtureRequest, make_toy: Any, make_plan: Any) -> Workshop:
    return Workshop.of(request.param, make_toy(num_hidden_layers=3), make_plan)


def parted(workshop: Workshop, *, graph: Graph | None = None, store: Any = None) -> list[tuple[int | None, str]]:
    """Layer and op of each parting in an artifact that was lowered from another graph or store."""
    target, plan = workshop.target, workshop.plan
    artifact = target.lower(graph or workshop.graph, store or workshop.store, plan, plan.out)
    observation = target.observe(artifact, graph=workshop.graph, calls=[*CALLS.values()], threads=1)
    partings = find_partings(observation, workshop.graph, workshop.store, calls=CALLS)
    return [(parting.node.layer, f"{parting.node.op} {weight_of(parting.node)}".strip()) for parting in partings]


def weight_of(node: Node) -> str:
    return next((argument.name for argument in node.arguments if isinstance(argument, Weight)), "")


def changed(graph: Graph, op: str, change: Callable[[Any], Any]) -> Graph:
    """``graph`` with ``change`` made to every argument of the last ``op`` of layer 1."""
    victim = [node for node in graph.nodes if (node.op, node.layer) == (op, 1)][-1]
    other = replace(victim, arguments=tuple(map(change, victim.arguments)))
    return replace(graph, nodes=tuple(other if node is victim else node for node in graph.nodes))


def test_one_scale_of_one_matrix_is_found(workshop: Workshop) -> None:
    store = OneWeightChanged(workshop.store, one_scale_up)
    assert parted(workshop, store=store) == [(1, f"linear {VICTIM}")]


def refuses(workshop: Workshop, wrong: Graph) -> bool:
    """llama.cpp has one epsilon and one rotation for all layers, so that no file can have one layer wrong."""
    if workshop.target.name != "gguf":
        return False
    with pytest.raises(LoweringError, match="architecture llama computes something else"):
        parted(workshop, graph=wrong)
    return True


def test_the_epsilon_of_one_norm_is_found(workshop: Workshop) -> None:
    wrong = changed(workshop.graph, "rms_norm", lambda argument: 0.05 if isinstance(argument, float) else argument)
    if refuses(workshop, wrong):
        return
    assert parted(workshop, graph=wrong) == [(1, "rms_norm model.layers.1.post_attention_layernorm.weight")]


def test_swapped_rope_halves_are_found_in_their_attention(workshop: Workshop) -> None:
    def turned(argument: Any) -> Any:
        return Constant("turned", -argument.value) if isinstance(argument, Constant) else argument

    wrong = changed(workshop.graph, "attention", turned)
    if not refuses(workshop, wrong):
        assert parted(workshop, graph=wrong) == [(1, "attention")]


def drop_write_executorch(patch: pytest.MonkeyPatch) -> None:
    from targets.executorch import outer

    original, met = outer.Attention.forward, []

    def forward(self: Any, q: Any, k: Any, v: Any, start: Any) -> Any:
        if self not in met:
            met.append(self)
        if met.index(self) != 1:
            return original(self, q, k, v, start)
        keys, values = self.get_buffer("keys"), self.get_buffer("values")
        torch.ops.llama.update_cache(v, values, start)  # and none for the keys
        return torch.ops.llama.custom_sdpa(q, keys, values, start, None, 0.0, True, self.scale)

    patch.setattr(outer.Attention, "forward", forward)


@pytest.mark.parametrize(("name", "drop"), [("executorch", drop_write_executorch), ("coreml", drop_write_coreml)])
def test_a_dropped_cache_write_is_found_in_its_attention(
    name: str, drop: Callable[[pytest.MonkeyPatch], None], make_toy: Any, make_plan: Any
) -> None:
    workshop = Workshop.of(name, make_toy(num_hidden_layers=3), make_plan)
    with pytest.MonkeyPatch.context() as patch:
        drop(patch)
        assert parted(workshop) == [(1, "attention")]


@pytest.mark.parametrize("name", [*later("executorch"), "coreml"])
def test_validate_names_the_matrix_in_every_kind_of_bundle(
    name: str, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    words = [str(made[0]), "-t", name, "-o", str(tmp_path), "--store", str(made[2]), "-c", "64"]
    assert RUNNER.invoke(app, [*words, "--calibration", "none"]).exit_code in (0, 8)
    bundle = next(path for path in tmp_path.iterdir() if path.name.startswith(name))
    target, manifest = targets.load(name), open_bundle(bundle)
    artifact = read_artifact(manifest, path=target.find(bundle))
    codes = dict(target.read_weights(artifact))[VICTIM]
    assert isinstance(codes, QuantizedTensor)
    flip_first_byte(artifact.path, packed(codes, name))
    code, outcome = bisected((made[0], bundle, made[2]), bundle)
    assert code == 7
    assert outcome["bisection"].startswith(f"layer 1, linear {VICTIM} is off by ")
    assert ";" not in outcome["bisection"]


def packed(tensor: QuantizedTensor, name: str) -> bytes:
    """The codes as they lie in a file: ExecuTorch counts its int4 from -8."""
    nibbles = pack_int4(tensor.codes)
    return (nibbles ^ 0x88 if name == "executorch" else nibbles).numpy().tobytes()


def flip_first_byte(path: Path, content: bytes) -> None:
    """Of the only place below ``path`` where ``content`` lies."""
    files = [file for file in [path, *path.rglob("*")] if file.is_file() and content in file.read_bytes()]
    (file,) = files
    data = bytearray(file.read_bytes())
    assert data.count(content) == 1
    data[data.find(content)] ^= 0x01
    file.write_bytes(data)


def test_a_value_that_the_file_has_not_is_told(make_toy: Any, make_plan: Any) -> None:
    workshop = Workshop.of("coreml", make_toy(num_hidden_layers=1), make_plan)
    graph, blind = workshop.graph, Observation(arithmetic=FULL_PRECISION, calls=[{}])
    partings = find_partings(blind, graph, workshop.store, calls={"prefill": [1, 2]})
    assert [parting.node for parting in partings] == [*graph.nodes]
    text = str(Bisection(partings=partings, ops=len(graph.nodes), arithmetic=FULL_PRECISION))
    assert text.startswith("outside the layers, embedding model.embed_tokens.weight has no counterpart in the file")


@pytest.mark.parametrize(
    ("op", "shape", "bound"),
    [
        ("linear", (99, 768), 1e-5),
        ("linear", (99, 64), 1e-5),
        ("linear", (99, 3072), 2e-5),
        ("linear", (1, 12288), 4e-5),
        ("rms_norm", (3072,), 4e-5),
        ("silu", None, 1e-5),
    ],
)
def test_the_bound_grows_with_the_length_of_the_sums(op: str, shape: tuple[int, ...] | None, bound: float) -> None:
    weights = (Weight("w", shape),) if shape else ()
    node = Node(op=op, name="x", arguments=(Value("ids"), *weights), layer=0)
    assert parts_at(node) == pytest.approx(bound)


@pytest.mark.parametrize(
    ("activations", "rounded"),
    [(Activations.FLOAT, "unrounded"), (Activations.INT8_PER_TOKEN, "rounded as its runtime does")],
)
def test_a_file_in_which_nothing_parts_is_told_so(activations: Activations, rounded: str) -> None:
    arithmetic = replace(FULL_PRECISION, activations=activations)
    assert str(Bisection(partings=[], ops=9, arithmetic=arithmetic)) == (
        f"no op does: each of 9 gives what the reference gives for the same inputs, activations {rounded}"
    )
