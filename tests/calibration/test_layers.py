"""The driver: what each linear is asked for, the same bytes however often it is stopped, and a model that is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calibration import layers
from calibration.anatomy import dissect
from calibration.gptq import Curvature
from calibration.layers import Calibration, CalibrationText, quantize
from calibration.rtn import round_to_nearest
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import InputError
from exporter.metrics import kl_divergence
from exporter.model.eager import eager_table
from exporter.model.graph import Graph, Node, Weight
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.quantized import QuantizedTensor
from exporter.spec import EMBEDDING, FINAL_NORM, PER_ROW, Method, Precision, Recipe, Rule, WeightScheme
from exporter.store import WeightStore
from exporter.tokenizer import Tokenizer
from tests.conftest import Toy, write_toy

INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
INT8 = replace(INT4, body=Precision.INT8)
FLOAT_ENDS = replace(INT4, embedding=Precision.FP16, head=Precision.FP16)
CALIBRATED = [Method.GPTQ, Method.AWQ, Method.AWQ_GPTQ, Method.SMOOTH]


def random_windows(count: int = 13, length: int = 32, *, seed: int = 0) -> Tensor:
    return torch.randint(96, (count, length), generator=torch.Generator().manual_seed(seed))


WINDOWS = random_windows()
UNSEEN = random_windows(seed=1)


def write_varied_toy(folder: Path, **config: Any) -> Toy:
    """A toy whose norms are not all ones, with some channels that are far larger than others."""
    toy = write_toy(folder, **config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in toy.model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
                parameter[::20] *= 4
            elif "q_proj" in name or "gate_proj" in name or "up_proj" in name:
                parameter[:, ::20] /= 4
    toy.model.save_pretrained(folder)
    return toy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_varied_toy(folder, initializer_range=0.1)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def graph(checkpoint: Checkpoint) -> Graph:
    return trace(checkpoint.spec)


def calibration(
    graph: Graph,
    method: Method,
    *,
    windows: Tensor | Callable[[], Tensor] = WINDOWS,
    identity: str = "some windows",
    **recipe: Any,
) -> Calibration:
    make = windows if callable(windows) else lambda: windows
    text = CalibrationText(identity=identity, source="a test", windows=make)
    return Calibration(recipe=Recipe(method=method, **recipe), text=text, graph=graph)


@pytest.fixture(scope="module")
def whole(checkpoint: Checkpoint, graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., WeightStore]:
    """A maker of stores that nothing has disturbed, each made once and not to be changed."""
    root, made = tmp_path_factory.mktemp("stores"), {}

    def make(method: Method, scheme: WeightScheme = INT4) -> WeightStore:
        if (method, scheme) not in made:
            how = calibration(graph, method)
            made[method, scheme], _ = quantize(checkpoint, scheme, root=root, calibration=how)
        return made[method, scheme]

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the one that says how long it took, and what a killed process may have left half written."""
    files = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in files if path.name != "timings.json"}


def logits(graph: Graph, weights: Any, windows: Tensor) -> Tensor:
    model = Reference(graph, weights, FULL_PRECISION)
    rows = []
    for window in windows.tolist():
        model.rewind(0)
        rows.append(model.feed(window))
    return torch.cat(rows)


def mean_kl(graph: Graph, checkpoint: Checkpoint, weights: Any, windows: Tensor = UNSEEN) -> float:
    """Of ``weights`` to the checkpoint, in nats."""
    return kl_divergence(logits(graph, Floats(checkpoint), windows), logits(graph, weights, windows)).mean().item()


@dataclass(frozen=True)
class Floats:
    """The checkpoint, with some of its tensors replaced."""

    checkpoint: Checkpoint
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.replaced[name] if name in self.replaced else self.checkpoint.read(name).float()


def matrices(checkpoint: Checkpoint, *, layer: int | None = None) -> list[str]:
    """Of the body."""
    prefix = "model.layers." if layer is None else f"model.layers.{layer}."
    return [name for name, shape in checkpoint.spec.weights().items() if len(shape) == 2 and name.startswith(prefix)]


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("scheme", [INT4, INT8], ids=["int4", "int8"])
def test_every_method_answers_for_every_tensor_and_keeps_the_model(
    checkpoint: Checkpoint, graph: Graph, whole: Callable[..., WeightStore], method: Method, scheme: WeightScheme
) -> None:
    store = whole(method, scheme)
    for name, shape in checkpoint.spec.weights().items():
        stored = store[name]
        assert tuple(stored.shape) == shape
        assert isinstance(stored, QuantizedTensor) == (len(shape) == 2)
    assert set(store.read_errors()) == {name for name in store if len(checkpoint.spec.weights()[name]) == 2}
    assert mean_kl(graph, checkpoint, store) < (0.05 if scheme is INT4 else 5e-4)


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=["int4", "int8"])
def test_compensation_saves_a_third_of_what_rounding_loses_on_text_of_the_same_kind(
    checkpoint: Checkpoint, graph: Graph, whole: Callable[..., WeightStore], tmp_path: Path, scheme: WeightScheme
) -> None:
    rounded, _ = quantize(checkpoint, scheme, root=tmp_path)
    calibrated = whole(Method.AWQ_GPTQ, scheme)
    assert mean_kl(graph, checkpoint, calibrated) < 0.7 * mean_kl(graph, checkpoint, rounded)


def test_the_trained_sample_loses_less_than_three_quarters_of_what_rounding_loses(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,120 tokens of its calibration text, measured on its evaluation text. Fewer rows than usual to find factors on,
    to save seconds."""
    monkeypatch.setattr("calibration.awq.ROWS", 64)
    checkpoint = open_checkpoint(sample)
    graph, tokenizer, bos = trace(checkpoint.spec), Tokenizer(sample), checkpoint.spec.bos_token_id

    def windows(file: str, count: int) -> Tensor:
        ids = tokenizer.encode((sample / file).read_text(encoding="utf-8"))[: count * 127]
        return torch.tensor([[bos, *ids[start : start + 127]] for start in range(0, len(ids), 127)])

    text = calibration(graph, Method.AWQ_GPTQ, windows=windows("calibration.txt", 40))
    rounded, _ = quantize(checkpoint, INT4, root=tmp_path)
    calibrated, _ = quantize(checkpoint, INT4, root=tmp_path, calibration=text)
    evaluation = windows("evaluation.txt", 8)
    lost = mean_kl(graph, checkpoint, calibrated, evaluation)
    assert lost < 0.75 * mean_kl(graph, checkpoint, rounded, evaluation)


@dataclass
class Asked:
    """One call of gptq by the driver."""

    name: str
    target: Tensor
    curvature: Curvature
    answer: QuantizedTensor


def watch_gptq(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    asked: list[Asked] = []
    original = layers.gptq

    def watched(target: Tensor, curvature: Curvature, *, name: str, **settings: Any) -> QuantizedTensor:
        answer = original(target, curvature, name=name, **settings)
        asked.append(Asked(name, target.clone(), curvature, answer))
        return answer

    monkeypatch.setattr(layers, "gptq", watched)
    return asked


@dataclass
class Flows:
    """What goes into each linear of a whole model, and what its output is added to, if that is all that reads it;
    float64 ``[tokens, K]``, by the name of its weight."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    residuals: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, weights: Any, windows: Tensor) -> Flows:
        flows, made_by = cls(), {}
        spec = graph.spec
        empty = torch.zeros(len(windows), spec.num_key_value_heads, 0, spec.head_dim)

        def observe(node: Node, arguments: Sequence[Any], results: tuple[Any, ...]) -> None:
            if node.op == "linear":
                flows.inputs[arguments[1].name] = arguments[0].flatten(0, 1).double()
                made_by[id(results[0])] = (arguments[1].name, results[0])  # kept, so that no id comes twice
            if node.op == "add":
                skipped, output = arguments
                assert id(skipped) not in made_by
                flows.residuals[made_by[id(output)][0]] = skipped.flatten(0, 1).double()

        inputs = {"ids": windows, **{name: empty for name in graph.inputs if name != "ids"}}
        graph.run(eager_table(lambda weight: weights[weight.name]), inputs, observe)
        return flows


def test_each_linear_is_asked_for_what_the_model_computes_from_what_reaches_it(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, from two runs of the whole model: of the checkpoint, and of it with the codes chosen so far.

    With inputs x and y, and r and s what the output is added to: the W' that makes y W' least different from
    y W + a ((x - y) W + r - s), where a is how much of the earlier error is passed on. Windows go in unequal chunks.
    """
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", 5 * WINDOWS.shape[1])
    monkeypatch.setattr(layers, "_TOKENS_PER_COLUMN", 1)
    asked = watch_gptq(monkeypatch)
    quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.GPTQ))
    assert [call.name for call in asked] == matrices(checkpoint)
    exact = Flows.of(graph, Floats(checkpoint), WINDOWS)
    assert len(exact.residuals) == 2 * checkpoint.spec.num_hidden_layers
    chosen: dict[str, Tensor] = {}
    moved = []
    for call in asked:
        present = Flows.of(graph, Floats(checkpoint, chosen), WINDOWS)
        weight = checkpoint.read(call.name).double()
        x, y = exact.inputs[call.name], present.inputs[call.name]
        hessian = y.T @ y / len(y)
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
        assert torch.allclose(call.curvature.hessian.double(), hessian, atol=1e-4 * hessian.max().item())
        wanted = (x - y) @ weight.T
        if call.name in exact.residuals:
            wanted += exact.residuals[call.name] - present.residuals[call.name]
        scarce = 1 - y.shape[1] / len(y)
        correction = layers.PROPAGATION * scarce * torch.linalg.solve(hessian, y.T @ wanted / len(y)).T
        moved.append((correction.norm() / weight.norm()).item())
        assert (call.target - weight - correction).norm() <= 1e-3 * correction.norm() + 1e-5 * weight.norm()
        chosen[call.name] = call.answer.dequantize()
    assert max(moved[:3]) == 0  # before the first group nothing is lost
    assert min(moved[3:]) > 1e-3


def test_nothing_is_propagated_by_linears_with_few_tokens_for_each_column(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watch_gptq(monkeypatch)
    few = WINDOWS[:2]
    assert few.numel() <= 4 * 64  # the narrowest linear has 64 columns
    quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.GPTQ, windows=few))
    assert asked
    assert all(torch.equal(call.target, checkpoint.read(call.name).float()) for call in asked)


def test_errors_of_compensated_codes_are_those_of_the_output_on_the_text_of_calibration(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watch_gptq(monkeypatch)
    store, _ = quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.GPTQ))
    errors = store.read_errors()
    chosen: dict[str, Tensor] = {}
    for call in asked:
        y = Flows.of(graph, Floats(checkpoint, chosen), WINDOWS).inputs[call.name]
        rounded = round_to_nearest(checkpoint.read(call.name), name="w", bits=4, group_size=32)
        chosen[call.name] = call.answer.dequantize()
        energy = (y @ call.target.double().T).square().sum()
        before, after = (
            ((y @ (call.target - weight).double().T).square().sum() / energy).item()
            for weight in (rounded.dequantize(), chosen[call.name])
        )
        assert errors[call.name].rounded == pytest.approx(before, rel=0.005)
        assert errors[call.name].stored == pytest.approx(after, rel=0.005)


def test_errors_of_folded_codes_are_those_of_the_output_on_the_text_of_calibration(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last linear of the first layer, which gets what all that is stored before it gives."""
    found: list[Tensor] = []
    original = layers.awq_factors

    def watched(*arguments: Any, **settings: Any) -> Tensor:
        found.append(original(*arguments, **settings))
        return found[-1]

    monkeypatch.setattr(layers, "awq_factors", watched)
    name = "model.layers.0.mlp.down_proj.weight"
    store, _ = quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.AWQ))
    decoded = {other: decode(store, other) for other in store} | {EMBEDDING: checkpoint.read(EMBEDDING)}
    y = Flows.of(graph, decoded, WINDOWS).inputs[name]
    weight, factors = checkpoint.read(name), found[3]  # of the fourth group
    plain = round_to_nearest(weight, name=name, bits=4, group_size=32).dequantize()
    energy = (y @ (weight * factors).double().T).square().sum()
    before, after = (
        ((y @ (weight * factors - other).double().T).square().sum() / energy).item()
        for other in (plain * factors, decoded[name])
    )
    assert store.read_errors()[name].rounded == pytest.approx(before, rel=1e-3)
    assert store.read_errors()[name].stored == pytest.approx(after, rel=1e-3)


def test_factors_are_chosen_on_the_first_tokens_of_what_the_model_itself_computes(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three windows of them, in chunks of two."""
    monkeypatch.setattr(layers, "FOLD_TOKENS", 2 * WINDOWS.shape[1] + 1)
    monkeypatch.setattr(layers, "TOKENS_AT_ONCE", 2 * WINDOWS.shape[1])
    calls: list[tuple[list[Tensor], Tensor]] = []
    for name in ("awq_factors", "smooth_factors"):
        original = getattr(layers, name)

        def watched(
            weights: list[Tensor], seen: Tensor, original: Callable[..., Tensor] = original, **settings: Any
        ) -> Tensor:
            calls.append((weights, seen.clone()))
            return original(weights, seen, **settings)

        monkeypatch.setattr(layers, name, watched)
    for method in (Method.AWQ_GPTQ, Method.SMOOTH):
        quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, method))
    exact = Flows.of(graph, Floats(checkpoint), WINDOWS[:3]).inputs
    groups = [group for index in range(2) for group in dissect(graph, index).groups]
    assert len(calls) == 2 * len(groups)
    for (weights, seen), group, smooth in zip(calls, groups * 2, [False] * 8 + [True] * 8, strict=True):
        read = [checkpoint.read(name) for name in group.linears]
        wanted = [w.abs().amax(dim=0, keepdim=True) for w in read] if smooth else read  # SmoothQuant looks at no more
        assert all(torch.equal(w, other) for w, other in zip(weights, wanted, strict=True))
        x = exact[group.linears[0]]
        expected = x.abs().amax(dim=0) if smooth else x.T @ x / len(x)
        assert torch.allclose(seen.double(), expected, atol=1e-4 * expected.max().item())


def given_factors(columns: int, *, seed: int = 0) -> Tensor:
    return 4 * torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_what_is_rounded_is_the_folded_weight_and_folded_norms_are_stored(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With factors of our own, another for each group of linears."""
    given: list[Tensor] = []

    def factors(_weights: list[Tensor], hessian: Tensor, **_settings: Any) -> Tensor:
        given.append(given_factors(len(hessian), seed=len(given)))
        return given[-1]

    monkeypatch.setattr(layers, "awq_factors", factors)
    store, _ = quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.AWQ))
    columns, sources = {}, {}
    for index in range(2):
        for group in dissect(graph, index).groups:
            assert group.fold
            tied = group.fold.tie(given.pop(0))
            columns |= dict.fromkeys(group.linears, tied)
            sources[group.fold.source] = group.fold.source_factors(tied)
    for name in matrices(checkpoint):
        weight = checkpoint.read(name) * columns[name]
        weight = weight / sources[name][:, None] if name in sources else weight
        expected, stored = round_to_nearest(weight, name=name, bits=4, group_size=32), store[name]
        assert isinstance(stored, QuantizedTensor)
        assert torch.equal(stored.codes, expected.codes)
        assert torch.equal(stored.scales, expected.scales)
    norms = [name for name, shape in checkpoint.spec.weights().items() if len(shape) == 1]
    for name in norms:
        stored, original = store[name], checkpoint.read(name)
        assert isinstance(stored, Tensor)
        assert stored.dtype == torch.float32
        if name == FINAL_NORM:
            assert torch.equal(stored, original)
        else:
            assert torch.equal(stored, original / sources[name])
            assert (stored / original).log().abs().mean() > 0.1


@pytest.mark.parametrize("method", [Method.AWQ, Method.AWQ_GPTQ, Method.SMOOTH])
def test_folded_norms_belong_to_the_folded_weights(
    checkpoint: Checkpoint, graph: Graph, whole: Callable[..., WeightStore], method: Method
) -> None:
    """With the checkpoint's norms in their place the same codes are another model."""
    store = whole(method, INT8)
    norms = [name for name, shape in checkpoint.spec.weights().items() if len(shape) == 1]
    decoded = {name: decode(store, name) for name in store}
    changed = [name for name in norms if not torch.equal(decoded[name], checkpoint.read(name))]
    assert changed == [name for name in norms if name != FINAL_NORM]
    assert mean_kl(graph, checkpoint, decoded) < 5e-4
    unfolded = decoded | {name: checkpoint.read(name) for name in norms}
    assert mean_kl(graph, checkpoint, unfolded) > 0.05


def decode(store: WeightStore, name: str) -> Tensor:
    stored = store[name]
    return stored.dequantize() if isinstance(stored, QuantizedTensor) else stored.float()


def test_rules_give_some_matrices_another_precision_and_fold_into_none_that_stays_float(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With factors of our own, which would show if only one side of a fold had them."""
    monkeypatch.setattr(layers, "awq_factors", lambda _weights, hessian, **_settings: given_factors(len(hessian)))
    rules = (
        Rule(pattern="layers.0.self_attn.*", precision=Precision.INT8),
        Rule(pattern="layers.0.mlp.gate_proj", precision=Precision.INT8),
        Rule(pattern="layers.1.mlp.up_proj", precision=Precision.FP16),
        Rule(pattern="layers.1.self_attn.v_proj", precision=Precision.FP16),
    )
    store, _ = quantize(
        checkpoint, replace(INT4, rules=rules), root=tmp_path, calibration=calibration(graph, Method.AWQ_GPTQ)
    )
    found = {}
    for name in matrices(checkpoint):
        stored = store[name]
        kind = (stored.bits, stored.group_size) if isinstance(stored, QuantizedTensor) else stored.dtype
        found[name.removeprefix("model.layers.").removesuffix("_proj.weight")] = kind
    assert found == {
        "0.self_attn.q": (8, 64),
        "0.self_attn.k": (8, 64),
        "0.self_attn.v": (8, 64),
        "0.self_attn.o": (8, 128),
        "0.mlp.gate": (8, 64),
        "0.mlp.up": (4, 32),
        "0.mlp.down": (4, 32),
        "1.self_attn.q": (4, 32),
        "1.self_attn.k": (4, 32),
        "1.self_attn.v": torch.float16,
        "1.self_attn.o": (4, 32),
        "1.mlp.gate": (4, 32),
        "1.mlp.up": torch.float16,
        "1.mlp.down": (4, 32),
    }
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        whole = f"model.layers.1.{name}.weight"
        assert torch.equal(store[whole], checkpoint.read(whole).half())
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert not torch.equal(
            decode(store, f"model.layers.0.{name}.weight"), checkpoint.read(f"model.layers.0.{name}.weight")
        )
        assert torch.equal(
            decode(store, f"model.layers.1.{name}.weight"), checkpoint.read(f"model.layers.1.{name}.weight")
        )
    assert mean_kl(graph, checkpoint, store) < 0.02


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_body_of_one_scale_per_row_keeps_the_model(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, method: Method
) -> None:
    scheme = replace(INT4, group_size=PER_ROW)
    store, _ = quantize(checkpoint, scheme, root=tmp_path, calibration=calibration(graph, method))
    for name in matrices(checkpoint):
        stored = store[name]
        assert isinstance(stored, QuantizedTensor)
        assert stored.scales.shape == (stored.shape[0], 1)
    assert mean_kl(graph, checkpoint, store) < 0.1


def test_a_layer_that_stays_float_is_passed_through(checkpoint: Checkpoint, graph: Graph, tmp_path: Path) -> None:
    scheme = replace(INT4, rules=(Rule(pattern="layers.0.*", precision=Precision.FP16),))
    settings = {"root": tmp_path, "calibration": calibration(graph, Method.AWQ_GPTQ)}
    store, made = quantize(checkpoint, scheme, **settings)
    assert made == 2  # the second layer and the ends
    assert all(torch.equal(store[name], checkpoint.read(name).half()) for name in matrices(checkpoint, layer=0))
    assert mean_kl(graph, checkpoint, store) < 0.02
    assert quantize(checkpoint, scheme, **settings)[1] == 0


def test_too_few_tokens_are_rounded_to_nearest(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tokens for 64 columns and more: with factors or without, as if nothing compensated."""
    asked = watch_gptq(monkeypatch)
    few = WINDOWS[:1, :4]
    stores = {
        method: quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, method, windows=few))[0]
        for method in (Method.GPTQ, Method.AWQ_GPTQ, Method.AWQ)
    }
    assert asked == []
    for name in matrices(checkpoint):
        plain = round_to_nearest(checkpoint.read(name), name=name, bits=4, group_size=32)
        folded, reference = stores[Method.AWQ_GPTQ][name], stores[Method.AWQ][name]
        without = stores[Method.GPTQ][name]
        assert isinstance(without, QuantizedTensor)
        assert isinstance(folded, QuantizedTensor)
        assert isinstance(reference, QuantizedTensor)
        assert torch.equal(without.codes, plain.codes)
        assert torch.equal(without.scales, plain.scales)
        assert torch.equal(folded.codes, reference.codes)
        assert torch.equal(folded.scales, reference.scales)


def test_a_quarter_as_many_tokens_as_columns_are_enough_for_the_linears_that_have_so_few(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 tokens are enough for 64 columns, 24 for 96, 32 for 128."""
    asked = watch_gptq(monkeypatch)
    for tokens, columns in ((15, set()), (16, {64}), (23, {64}), (24, {64, 96}), (31, {64, 96}), (32, {64, 96, 128})):
        asked.clear()
        few = calibration(graph, Method.GPTQ, windows=WINDOWS[:1, :tokens], identity=f"{tokens} tokens")
        quantize(checkpoint, INT4, root=tmp_path, calibration=few)
        assert {call.target.shape[1] for call in asked} == columns


@pytest.mark.parametrize("method", CALIBRATED)
def test_two_runs_give_the_same_bytes(
    checkpoint: Checkpoint, graph: Graph, whole: Callable[..., WeightStore], tmp_path: Path, method: Method
) -> None:
    again, made = quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, method))
    assert made == 3  # two layers and the ends
    assert contents(again.folder) == contents(whole(method).folder)
    assert set(contents(again.folder)) == {
        *("windows.safetensors", "layer-000.safetensors", "layer-001.safetensors", "ends.safetensors"),
        *("ranges-000.json", "ranges-001.json", "ranges-ends.json", "store.json"),
    }


def test_a_store_that_is_there_is_found_and_its_text_not_made_again(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path
) -> None:
    first, _ = quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.AWQ_GPTQ))
    before = contents(first.folder)
    again = calibration(graph, Method.AWQ_GPTQ, windows=no_windows)
    second, made = quantize(checkpoint, INT4, root=tmp_path, calibration=again)
    assert made == 0
    assert second.folder == first.folder
    assert contents(second.folder) == before


def no_windows() -> Tensor:
    raise AssertionError("the text was made again")


def test_another_recipe_text_or_scheme_is_another_store(checkpoint: Checkpoint, graph: Graph, tmp_path: Path) -> None:
    few = WINDOWS[:1, :4]  # quick: everything is rounded
    variants = [
        (INT4, None),
        *((INT4, calibration(graph, method, windows=few)) for method in CALIBRATED),
        (INT4, calibration(graph, Method.GPTQ, windows=few, identity="other windows")),
        (INT4, calibration(graph, Method.GPTQ, windows=few, damping=0.02)),
        (INT4, calibration(graph, Method.GPTQ, windows=few, act_order=False)),
        (INT8, calibration(graph, Method.GPTQ, windows=few)),
        (
            replace(INT4, rules=(Rule(pattern="*.q_proj", precision=Precision.INT8),)),
            calibration(graph, Method.GPTQ, windows=few),
        ),
    ]
    stores = [quantize(checkpoint, scheme, root=tmp_path, calibration=how) for scheme, how in variants]
    assert [made for _, made in stores] == [3] * len(variants)
    assert len({store.folder for store, _ in stores}) == len(variants)


def test_damping_and_order_are_those_of_the_recipe(
    checkpoint: Checkpoint, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watch_gptq(monkeypatch)
    quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.GPTQ))
    quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.GPTQ, damping=0.5, act_order=False))
    usual, other = asked[0].curvature, asked[len(asked) // 2].curvature
    assert other.order.tolist() == list(range(64)) != usual.order.tolist()
    assert torch.allclose(other.hessian.diagonal().mean(), usual.hessian.diagonal().mean() / 1.01 * 1.5)


@pytest.mark.parametrize("method", [Method.GPTQ, Method.AWQ_GPTQ])
@pytest.mark.parametrize("call", [1, 5, 9])
def test_a_run_that_was_stopped_in_the_middle_gives_the_same_bytes_when_resumed(
    checkpoint: Checkpoint,
    graph: Graph,
    whole: Callable[..., WeightStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    call: int,
) -> None:
    """In the first linear, in the first layer and in the second; what is there, text or layer, is not made again."""
    interrupt(monkeypatch, layers, "gptq", call=call)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, method))
    monkeypatch.undo()
    asked = watch_gptq(monkeypatch)
    resumed, made = quantize(
        checkpoint, INT4, root=tmp_path, calibration=calibration(graph, method, windows=no_windows)
    )
    assert made == (2 if call == 9 else 3)
    assert [again.name for again in asked] == matrices(checkpoint, layer=1 if call == 9 else None)
    assert contents(resumed.folder) == contents(whole(method).folder)


@pytest.mark.parametrize(
    ("scheme", "method_name", "call"),
    [
        (INT4, "write_windows", 1),
        (INT4, "write_part", 1),
        (INT4, "write_part", 2),
        (INT4, "write_part", 3),
        (INT4, "write_ranges", 1),
        (INT4, "write_ranges", 2),
        (INT4, "write_timings", 1),
        (INT4, "write_summary", 1),
        (FLOAT_ENDS, "write_ranges", 1),
        (FLOAT_ENDS, "write_timings", 1),
        (FLOAT_ENDS, "write_summary", 1),
        (FLOAT_ENDS, "write_ranges", 2),
    ],
)
def test_a_run_that_was_stopped_before_any_of_its_files_gives_the_same_bytes_when_resumed(
    checkpoint: Checkpoint,
    graph: Graph,
    whole: Callable[..., WeightStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: WeightScheme,
    method_name: str,
    call: int,
) -> None:
    how = calibration(graph, Method.SMOOTH)
    interrupt(monkeypatch, WeightStore, method_name, call=call)
    with pytest.raises(KeyboardInterrupt):
        quantize(checkpoint, scheme, root=tmp_path, calibration=how)
    monkeypatch.undo()
    resumed, _ = quantize(checkpoint, scheme, root=tmp_path, calibration=how)
    assert contents(resumed.folder) == contents(whole(Method.SMOOTH, scheme).folder)


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, call: int) -> None:
    """Ctrl-C at that call of ``owner.name``."""
    original, calls = getattr(owner, name), 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, interrupted)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
import exporter.files
from calibration.layers import Calibration, CalibrationText, quantize
from exporter.checkpoint import open_checkpoint
from exporter.model.trace import trace
from exporter.spec import Method, Precision, Recipe, WeightScheme

save_file = exporter.files.save_file

def die_in_the_middle_of_the_second_layer(tensors, path, **named):
    save_file(tensors, path, **named)
    if "layer-001" in path.name:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

exporter.files.save_file = die_in_the_middle_of_the_second_layer
checkpoint, windows = open_checkpoint(Path(sys.argv[1])), torch.load(sys.argv[3])
scheme = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
text = CalibrationText(identity="some windows", source="a test", windows=lambda: windows)
recipe = Recipe(method=Method.AWQ_GPTQ)
calibration = Calibration(recipe=recipe, text=text, graph=trace(checkpoint.spec))
quantize(checkpoint, scheme, root=Path(sys.argv[2]), calibration=calibration)
"""


def test_a_process_killed_while_it_wrote_a_layer_leaves_a_store_that_resumes_to_the_same_bytes(
    checkpoint: Checkpoint, graph: Graph, whole: Callable[..., WeightStore], tmp_path: Path
) -> None:
    torch.save(WINDOWS, tmp_path / "windows")
    arguments = [str(path) for path in (checkpoint.folder, tmp_path / "killed", tmp_path / "windows")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # what it leaves there goes with the test
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, *arguments], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "killed").iterdir()
    assert set(contents(folder)) == {"windows.safetensors", "layer-000.safetensors", "ranges-000.json"}
    assert [path.name for path in folder.iterdir() if path.name.startswith(".layer-001")]
    how = calibration(graph, Method.AWQ_GPTQ)
    resumed, made = quantize(checkpoint, INT4, root=tmp_path / "killed", calibration=how)
    assert made == 2
    assert contents(resumed.folder) == contents(whole(Method.AWQ_GPTQ).folder)


def test_hidden_states_too_large_for_memory_lie_in_mapped_files_and_give_the_same_codes(
    checkpoint: Checkpoint,
    graph: Graph,
    whole: Callable[..., WeightStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resident = whole(Method.AWQ_GPTQ)
    mapped: list[tuple[Path, int]] = []
    from_file = torch.from_file

    def watched(name: str, **settings: Any) -> Tensor:
        tensor = from_file(name, **settings)
        mapped.append((Path(name), Path(name).stat().st_size))
        return tensor

    monkeypatch.setattr(torch, "from_file", watched)
    monkeypatch.setattr(layers, "RESIDENT_BYTES", 0)
    on_disk, _ = quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.AWQ_GPTQ))
    assert [size for _, size in mapped] == 2 * [WINDOWS.numel() * checkpoint.spec.hidden_size * 4]
    assert not any(path.exists() or path.parent.exists() for path, _ in mapped)
    assert contents(on_disk.folder) == contents(resident.folder)


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize(
    ("name", "value"),
    [("mlp.up_proj", float("nan")), ("self_attn.o_proj", float("inf")), ("mlp.down_proj", float("nan"))],
)
def test_a_weight_that_is_not_finite_is_refused_by_its_name(
    make_toy: Callable[..., Toy], graph: Graph, tmp_path: Path, method: Method, name: str, value: float
) -> None:
    toy = make_toy()
    with torch.no_grad():
        toy.model.get_submodule(f"model.layers.1.{name}").weight[3, 3] = value
    toy.model.save_pretrained(toy.folder)
    with pytest.raises(InputError, match=rf"model\.layers\.1\.{name}\.weight holds values that are not finite"):
        quantize(open_checkpoint(toy.folder), INT4, root=tmp_path, calibration=calibration(graph, method))


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.1.input_layernorm.weight"])
def test_activations_that_are_not_finite_are_refused(
    make_toy: Callable[..., Toy], graph: Graph, tmp_path: Path, method: Method, name: str
) -> None:
    toy = make_toy()
    with torch.no_grad():
        toy.model.get_parameter(name)[:] = float("nan")
    toy.model.save_pretrained(toy.folder)
    with pytest.raises(InputError, match="finite"):
        quantize(open_checkpoint(toy.folder), INT4, root=tmp_path, calibration=calibration(graph, method))


def test_the_store_says_what_it_was_calibrated_with(checkpoint: Checkpoint, whole: Callable[..., WeightStore]) -> None:
    store = whole(Method.GPTQ)
    facts = store.calibration_facts()
    assert facts["algorithm"] == "gptq, act-order, damping 0.01"
    assert (facts["text"], facts["source"]) == ("some windows", "a test")
    assert (facts["windows"], facts["window_length"], facts["tokens"]) == (13, 32, 13 * 32)
    assert torch.equal(store.read_windows(), WINDOWS)
    errors = store.read_errors()
    assert all(errors[name].stored < errors[name].rounded for name in matrices(checkpoint))


def test_ranges_are_those_of_the_model_as_it_is_stored(
    checkpoint: Checkpoint, graph: Graph, whole: Callable[..., WeightStore]
) -> None:
    store = whole(Method.AWQ_GPTQ)
    decoded = {name: decode(store, name) for name in store} | {EMBEDDING: checkpoint.read(EMBEDDING)}
    flows = Flows.of(graph, decoded, WINDOWS).inputs
    ranges = store.read_ranges()
    assert list(dict.fromkeys(name.split(".")[0] for name in ranges)) == [
        node.name for node in graph.nodes if node.op != "embedding"
    ]
    for node in graph.nodes:
        if node.op != "linear":
            continue
        source, weight = node.arguments
        assert isinstance(weight, Weight)
        x, found = flows[weight.name], ranges[source.node]
        assert found["count"] == x.numel()
        assert found["lowest"] == pytest.approx(x.min().item(), rel=1e-4)
        assert found["highest"] == pytest.approx(x.max().item(), rel=1e-4)
    source, weight = graph.head.arguments
    assert isinstance(weight, Weight)
    logits = flows[weight.name].double() @ checkpoint.read(weight.name).double().T
    assert ranges[graph.head.name]["count"] == logits.numel()
    assert ranges[graph.head.name]["highest"] == pytest.approx(logits.max().item(), rel=1e-4)


def test_a_store_of_before_the_ends_had_ranges_gets_them_and_keeps_its_codes(
    checkpoint: Checkpoint, graph: Graph, whole: Callable[..., WeightStore], tmp_path: Path
) -> None:
    store, _ = quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.AWQ_GPTQ))
    store.ranges_file(None).unlink()
    again, made = quantize(checkpoint, INT4, root=tmp_path, calibration=calibration(graph, Method.AWQ_GPTQ))
    assert made == 0
    assert contents(again.folder) == contents(whole(Method.AWQ_GPTQ).folder)


@dataclass
class Watched:
    """A Progress that writes everything down."""

    lines: list[str] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)

    def stage(self, title: str) -> None:
        self.lines.append(title)

    def advance(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_progress_names_each_layer_and_what_it_has_lost(checkpoint: Checkpoint, graph: Graph, tmp_path: Path) -> None:
    progress = Watched()
    how = calibration(graph, Method.GPTQ)
    store, _ = quantize(checkpoint, INT4, root=tmp_path, calibration=how, progress=progress)
    assert [line.split(":")[0] for line in progress.lines] == [
        *("layer 1 of 2", "layer 1 of 2", "layer 2 of 2", "layer 2 of 2", "rounding embedding and head"),
        f"quantized in {sum(store.read_timings()['seconds'].values()):.1f} s",
    ]
    assert progress.steps[:14] == 2 * [(step, 7) for step in range(1, 8)]
    errors = [store.read_errors()[name] for name in matrices(checkpoint, layer=1)]
    rounded, stored = sum(e.rounded for e in errors) / 7, sum(e.stored for e in errors) / 7
    assert progress.lines[3] == f"layer 2 of 2: mean output error {rounded:.2e} rounded, {stored:.2e} calibrated"
