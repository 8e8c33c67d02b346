"""Mixed precision: what is measured is what brute force measures, bytes are the store's, budgets are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from calibration import sensitivity
from calibration.corpus import read_corpus
from calibration.layers import SILENT, quantize
from calibration.rtn import round_to_nearest
from calibration.sensitivity import (
    Sensitivity,
    choose_for_kl,
    choose_within_budget,
    measure_kl,
    measure_sensitivity,
    meet_budget,
    meet_kl,
    open_matrices,
    refuse_budget,
    stored_bytes,
    with_int8,
)
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.errors import BudgetError, InputError, UsageError
from exporter.metrics import kl_divergence
from exporter.model.graph import Graph
from exporter.model.reference import FULL_PRECISION, Reference, Weights
from exporter.model.trace import trace
from exporter.quantized import QuantizedTensor
from exporter.spec import EMBEDDING, HEAD, PER_ROW, ModelSpec, Precision, RopeSpec, Rule, WeightScheme
from exporter.store import StoredWeight
from exporter.tokenizer import Tokenizer
from tests.conftest import Toy

INT4 = WeightScheme(body=Precision.INT4, embedding=Precision.INT8, head=Precision.INT8, group_size=32)
SMALL_ENDS = replace(INT4, embedding=Precision.INT4, head=Precision.INT4)
DOWN_1 = "model.layers.1.mlp.down_proj.weight"
UP_0, UP_1 = (f"model.layers.{index}.mlp.up_proj.weight" for index in (0, 1))
SPEC = ModelSpec(
    name="toy",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope=RopeSpec(theta=10000.0),
    bos_token_id=1,
    eos_token_ids=(2,),
)
MATRICES = open_matrices(SPEC, INT4)


@dataclass
class Recorder:
    """A ``Progress`` that remembers all it was told."""

    stages: list[str] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def advance(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)


def opened(toy: Toy) -> tuple[Checkpoint, Graph]:
    checkpoint = open_checkpoint(toy.folder)
    return checkpoint, trace(checkpoint.spec)


def some_windows(count: int = 2, length: int = 40, *, vocabulary: int = 96) -> Tensor:
    return torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def logits(graph: Graph, weights: Weights, windows: Tensor) -> Tensor:
    reference = Reference(graph, weights, FULL_PRECISION)
    answers = []
    for window in windows.tolist():
        reference.rewind(0)
        answers.append(reference.feed(window))
    return torch.cat(answers)


def full_weights(checkpoint: Checkpoint) -> dict[str, StoredWeight]:
    return {name: checkpoint.read(name).float() for name in checkpoint.spec.weights()}


def rounded(weight: StoredWeight, *, bits: int) -> StoredWeight:
    assert isinstance(weight, Tensor)
    group_size = 32 if bits == 4 else weight.shape[1]
    return round_to_nearest(weight, name="", bits=bits, group_size=group_size)


def kl_by_brute_force(checkpoint: Checkpoint, graph: Graph, weights: Weights, windows: Tensor) -> float:
    truth = logits(graph, full_weights(checkpoint), windows)
    return kl_divergence(truth, logits(graph, weights, windows)).mean().item()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary in ten blocks, the last of them short, and each window by itself."""
    monkeypatch.setattr(sensitivity, "_LOGITS_AT_ONCE", 80 * 10)
    monkeypatch.setattr(sensitivity, "TOKENS_AT_ONCE", 40)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tied", [True, False])
def test_each_matrix_costs_what_brute_force_measures(make_toy: Callable[..., Toy], *, tied: bool) -> None:
    checkpoint, graph = opened(make_toy(tie_word_embeddings=tied, num_hidden_layers=3))
    windows, full = some_windows(), full_weights(checkpoint)
    found = measure_sensitivity(checkpoint, graph, INT4, windows, progress=SILENT)
    assert [matrix.name for matrix in found] == [
        name for name, shape in checkpoint.spec.weights().items() if len(shape) == 2 and "layers" in name
    ]
    for matrix in found:
        int4, int8 = (
            kl_by_brute_force(checkpoint, graph, {**full, matrix.name: rounded(full[matrix.name], bits=bits)}, windows)
            for bits in (4, 8)
        )
        assert int8 < int4
        assert matrix.kl_nats == pytest.approx(int4 - int8, rel=1e-4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", [INT4, with_int8(SMALL_ENDS, SPEC, [UP_0, UP_1])])
def test_the_kl_of_a_scheme_is_that_of_its_store(
    make_toy: Callable[..., Toy], tmp_path: Path, scheme: WeightScheme, *, tied: bool
) -> None:
    checkpoint, graph = opened(make_toy(tie_word_embeddings=tied))
    store, _ = quantize(checkpoint, scheme, root=tmp_path)
    windows = some_windows()
    expected = kl_by_brute_force(checkpoint, graph, store, windows)
    assert measure_kl(checkpoint, graph, scheme, windows, progress=SILENT) == pytest.approx(expected, rel=1e-4)


def test_only_the_first_tokens_are_measured(make_toy: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, graph = opened(make_toy())
    windows = some_windows(3, 40)
    for name, measure in (("SENSITIVITY_TOKENS", measure_sensitivity), ("LEVEL_TOKENS", measure_kl)):
        two = measure(checkpoint, graph, INT4, windows[:2], progress=SILENT)
        half = measure(checkpoint, graph, INT4, windows[:1, :20], progress=SILENT)
        monkeypatch.setattr(sensitivity, name, 119)
        assert measure(checkpoint, graph, INT4, windows, progress=SILENT) == two
        monkeypatch.setattr(sensitivity, name, 20)
        assert measure(checkpoint, graph, INT4, windows, progress=SILENT) == half


class LargestFloats(TorchDispatchMode):
    """Elements of the largest float32 or float64 tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, Sequence) else [result]:
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_whole_head_and_no_whole_row_of_logits_is_held(
    make_toy: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy(vocab_size=4096)
    toy.model.bfloat16().save_pretrained(toy.folder)
    checkpoint, graph = opened(toy)
    monkeypatch.setattr(sensitivity, "_LOGITS_AT_ONCE", 1 << 14)
    monkeypatch.setattr(sensitivity, "TOKENS_AT_ONCE", 80)
    windows = some_windows(6, vocabulary=4096)
    for measure in (measure_sensitivity, measure_kl):
        with LargestFloats() as largest:
            measure(checkpoint, graph, SMALL_ENDS, windows, progress=SILENT)
        assert largest.elements <= 1 << 14  # logits would be 240 x 4096, the head 64 x 4096, all queries 240 x 128


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [
        INT4,
        SMALL_ENDS,
        replace(INT4, group_size=PER_ROW),
        replace(INT4, body=Precision.INT8),
        with_int8(INT4, SPEC, MATRICES[3:9]),
    ],
)
def test_stored_bytes_are_those_of_the_tensors_in_the_store(
    make_toy: Callable[..., Toy], tmp_path: Path, scheme: WeightScheme, *, tied: bool
) -> None:
    checkpoint = open_checkpoint(make_toy(tie_word_embeddings=tied).folder)
    store, _ = quantize(checkpoint, scheme, root=tmp_path)
    quantized = 0
    for file in store.folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as part:
            quantized += sum(part.get_tensor(name).nbytes for name in part.keys())  # noqa: SIM118
    norms = [tensor.nbytes for tensor in (store[name] for name in store) if isinstance(tensor, Tensor)]
    assert len(norms) == 5
    assert stored_bytes(checkpoint.spec, scheme) == quantized + sum(norms)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.FP32])
def test_stored_bytes_of_floats_are_those_of_their_tensors(
    make_toy: Callable[..., Toy], tmp_path: Path, precision: Precision
) -> None:
    checkpoint = open_checkpoint(make_toy().folder)
    scheme = WeightScheme(body=precision, embedding=precision, head=precision, group_size=32)
    store, _ = quantize(checkpoint, scheme, root=tmp_path)
    tensors = [tensor for tensor in (store[name] for name in store) if not isinstance(tensor, QuantizedTensor)]
    assert stored_bytes(checkpoint.spec, scheme) == sum(tensor.nbytes for tensor in tensors)


def test_extra_bytes_of_a_matrix(make_toy: Callable[..., Toy]) -> None:
    """By hand, for up_proj [96, 64]: int4 has 3072 bytes of codes and 2 scales a row, int8 6144 and one."""
    checkpoint, graph = opened(make_toy())
    found = measure_sensitivity(checkpoint, graph, INT4, some_windows(), progress=SILENT)
    (matrix,) = (matrix for matrix in found if matrix.name == UP_1)
    assert matrix.extra_bytes == (6144 + 2 * 96) - (3072 + 2 * 192)


def made_up(costs: Sequence[float], *, spec: ModelSpec = SPEC, scheme: WeightScheme = INT4) -> list[Sensitivity]:
    sizes = {name: stored_bytes(spec, with_int8(INT4, spec, [name])) - stored_bytes(spec, INT4) for name in MATRICES}
    named = dict(zip(MATRICES, costs, strict=True))
    return [
        Sensitivity(name=name, kl_nats=named[name], extra_bytes=sizes[name]) for name in open_matrices(spec, scheme)
    ]


def names_of(rules: tuple[Rule, ...]) -> list[str]:
    assert all(rule.precision is Precision.INT8 for rule in rules)
    return [f"model.{rule.pattern}.weight" for rule in rules]


many_costs = st.lists(st.one_of(st.floats(1e-6, 1e-2), st.sampled_from([1e-3, 0.0, -1e-4])), min_size=14, max_size=14)


@settings(max_examples=100, deadline=None)
@given(costs=many_costs, spare=st.integers(0, 40_000))
def test_what_is_chosen_fits_and_each_that_is_not_would_not_have(costs: list[float], spare: int) -> None:
    matrices = made_up(costs)
    budget = stored_bytes(SPEC, INT4) + spare
    rules = choose_within_budget(matrices, INT4, SPEC, budget_bytes=budget)
    scheme = replace(INT4, rules=rules)
    assert stored_bytes(SPEC, scheme) <= budget
    chosen = [matrix for matrix in matrices if scheme.precision(matrix.name) is Precision.INT8]
    assert names_of(rules) == [matrix.name for matrix in chosen]  # once each, in the order of the model
    assert all(matrix.kl_nats > 0 for matrix in chosen)
    worth = {matrix.name: matrix.kl_nats / matrix.extra_bytes for matrix in matrices}
    for matrix in matrices:
        if matrix.kl_nats > 0 and matrix not in chosen:
            assert stored_bytes(SPEC, with_int8(scheme, SPEC, [matrix.name])) > budget
            better = [other.name for other in chosen if worth[other.name] >= worth[matrix.name]]
            assert stored_bytes(SPEC, with_int8(INT4, SPEC, [*better, matrix.name])) > budget


def test_a_byte_decides() -> None:
    matrices = made_up([1e-3 if name == UP_1 else 0.0 for name in MATRICES])
    enough = stored_bytes(SPEC, with_int8(INT4, SPEC, [UP_1]))
    assert names_of(choose_within_budget(matrices, INT4, SPEC, budget_bytes=enough)) == [UP_1]
    assert choose_within_budget(matrices, INT4, SPEC, budget_bytes=enough - 1) == ()
    assert choose_within_budget(matrices, INT4, SPEC, budget_bytes=stored_bytes(SPEC, INT4)) == ()


@settings(max_examples=100, deadline=None)
@given(costs=many_costs, max_kl_nats=st.floats(1e-3, 5e-2), excess=st.floats(0.2, 5.0))
def test_the_kl_foretold_is_met_and_nothing_is_spent_in_vain(
    costs: list[float], max_kl_nats: float, excess: float
) -> None:
    matrices = made_up(costs)
    rules = choose_for_kl(matrices, INT4, SPEC, max_kl_nats=max_kl_nats, int8_kl_nats=1e-3, excess=excess)
    chosen = names_of(rules)
    assert chosen == [name for name in MATRICES if name in chosen]

    def foretold(names: Sequence[str]) -> float:
        return 1e-3 + excess * sum(max(0.0, m.kl_nats) for m in matrices if m.name not in names)

    assert foretold(chosen) <= max_kl_nats * (1 + 1e-9)
    for name in chosen:
        assert foretold([other for other in chosen if other != name]) > max_kl_nats * (1 - 1e-9)


def test_most_kl_per_byte_goes_first_for_a_kl_too() -> None:
    """k_proj takes 1920 bytes, up_proj 2880."""
    k_proj = "model.layers.0.self_attn.k_proj.weight"
    matrices = made_up([{UP_0: 2.0e-3, k_proj: 1.6e-3}.get(name, 0.0) for name in MATRICES])

    def chosen(max_kl_nats: float, excess: float = 1.0) -> list[str]:
        options = {"max_kl_nats": max_kl_nats, "int8_kl_nats": 1e-4, "excess": excess}
        return names_of(choose_for_kl(matrices, INT4, SPEC, **options))

    assert chosen(2.2e-3) == [k_proj]
    assert chosen(1.8e-3) == [UP_0]  # with which k_proj is not needed any more
    assert chosen(1.6e-3) == [k_proj, UP_0]
    assert chosen(3.75e-3) == []
    assert chosen(3.75e-3, excess=1.1) == [k_proj]


def test_of_what_is_not_needed_any_more_the_largest_is_taken_back() -> None:
    """In the order of KL per byte k_proj, up_proj, q_proj; after which one of the first two, of 1920 and 2880 bytes, is
    one too many."""
    q_proj, k_proj = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    costs = {k_proj: 6.5e-4, UP_0: 9.5e-4, q_proj: 1.2e-3}
    matrices = made_up([costs.get(name, 0.0) for name in MATRICES])
    rules = choose_for_kl(matrices, INT4, SPEC, max_kl_nats=1.1e-3, int8_kl_nats=1e-4)
    assert names_of(rules) == [q_proj, k_proj]


def add_outliers(toy: Toy, *, every: int, factor: float) -> None:
    """One column in ``every`` of ``DOWN_1`` is made larger, and the rows of up_proj that it reads smaller: the model
    computes what it did before."""
    mlp = toy.model.model.layers[1].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, ::every] *= factor
        mlp.up_proj.weight[::every] /= factor
    toy.model.save_pretrained(toy.folder)


def test_a_matrix_whose_outliers_int4_cannot_hold_is_the_first_to_get_int8(make_toy: Callable[..., Toy]) -> None:
    toy = make_toy(initializer_range=0.1)
    spec = open_checkpoint(toy.folder).spec
    room = stored_bytes(spec, with_int8(INT4, spec, [DOWN_1]))
    before, after = Recorder(), Recorder()
    sound = meet_budget(*opened(toy), INT4, some_windows(), budget_bytes=room, progress=before)
    add_outliers(toy, every=32, factor=12.0)  # one in each group
    rules = meet_budget(*opened(toy), INT4, some_windows(), budget_bytes=room, progress=after)
    assert DOWN_1 not in names_of(sound)
    assert rules == (Rule(pattern="layers.1.mlp.down_proj", precision=Precision.INT8),)
    assert after.notes == ["int8 for 1 of 14 matrices: 0.06 MB of weights"]


def test_int8_is_not_given_where_it_is_the_worse_of_the_two(make_toy: Callable[..., Toy]) -> None:
    """It has one scale per row, which one column takes for itself; int4 loses the 32 columns of that group alone."""
    toy = make_toy()
    add_outliers(toy, every=96, factor=2000.0)
    checkpoint, graph = opened(toy)
    found = measure_sensitivity(checkpoint, graph, INT4, some_windows(), progress=SILENT)
    assert [matrix.name for matrix in found if matrix.kl_nats < 0] == [DOWN_1]
    rules = choose_within_budget(found, INT4, checkpoint.spec, budget_bytes=1 << 40)
    assert names_of(rules) == [name for name in MATRICES if name != DOWN_1]


def test_matrices_that_a_rule_speaks_of_are_left_alone(make_toy: Callable[..., Toy]) -> None:
    own = (
        Rule(pattern="layers.0.*", precision=Precision.INT8),
        Rule(pattern="*.down_proj", precision=Precision.INT4),
    )
    scheme = replace(INT4, rules=own)
    checkpoint, graph = opened(make_toy())
    spec = checkpoint.spec
    found = measure_sensitivity(checkpoint, graph, scheme, some_windows(), progress=SILENT)
    free = [name for name in MATRICES if "layers.1." in name and "down_proj" not in name]
    assert [matrix.name for matrix in found] == free
    assert choose_within_budget(found, scheme, spec, budget_bytes=stored_bytes(spec, scheme)) == own
    for matrices in (found, made_up([1.0] * 14)):  # of which the second knows nothing of the rules
        rules = choose_within_budget(matrices, scheme, spec, budget_bytes=1 << 40)
        assert (rules[:2], names_of(rules[2:])) == (own, free)
        rules = choose_for_kl(matrices, scheme, spec, max_kl_nats=1e-9, int8_kl_nats=0.0)
        assert (rules[:2], names_of(rules[2:])) == (own, free)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_kl_that_was_asked_for_is_measured(make_toy: Callable[..., Toy], tmp_path: Path, share: float) -> None:
    """Anywhere between that of all int8 and that of all int4, and of the weights as the store rounds them."""
    checkpoint, graph = opened(make_toy(initializer_range=0.1))
    windows = some_windows()
    full = with_int8(INT4, checkpoint.spec, MATRICES)
    low, high = (measure_kl(checkpoint, graph, s, windows, progress=SILENT) for s in (full, INT4))
    wanted = low + share * (high - low)
    recorder = Recorder()
    rules = meet_kl(checkpoint, graph, INT4, windows, max_kl_nats=wanted, progress=recorder)
    scheme = replace(INT4, rules=rules)
    store, _ = quantize(checkpoint, scheme, root=tmp_path)
    measured = kl_by_brute_force(checkpoint, graph, store, windows)
    assert measured <= wanted * (1 + 1e-4)
    assert INT4.rules != rules
    if share:
        assert stored_bytes(checkpoint.spec, scheme) < stored_bytes(checkpoint.spec, full)
    assert f"mean KL {measured:.2g} nats rounded to nearest" in recorder.notes[-1]


@pytest.mark.parametrize("factor", [1e-3, -1.0])
def test_a_sum_that_foretells_too_little_is_corrected(
    make_toy: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """The most sensitive matrices are made to look harmless: what is chosen then has to be measured to be refused."""
    checkpoint, graph = opened(make_toy(initializer_range=0.1))
    windows = some_windows()
    found = measure_sensitivity(checkpoint, graph, INT4, windows, progress=SILENT)
    worst = sorted(found, key=lambda matrix: -matrix.kl_nats)[:7]
    lying = [replace(m, kl_nats=factor * m.kl_nats) if m in worst else m for m in found]
    monkeypatch.setattr(sensitivity, "measure_sensitivity", lambda *_, **__: lying)
    low, high = (
        measure_kl(checkpoint, graph, scheme, windows, progress=SILENT)
        for scheme in (with_int8(INT4, checkpoint.spec, MATRICES), INT4)
    )
    wanted = low + 0.2 * (high - low)
    recorder = Recorder()
    rules = meet_kl(checkpoint, graph, INT4, windows, max_kl_nats=wanted, progress=recorder)
    assert recorder.stages.count("measuring the KL of what is chosen") > 1
    assert measure_kl(checkpoint, graph, replace(INT4, rules=rules), windows, progress=SILENT) <= wanted


def test_the_sum_is_scaled_to_what_all_int4_costs_together(
    make_toy: Callable[..., Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the sum, here: known from all int4, so that the first choice is the right one. What int8 does not help has
    no part in it."""
    checkpoint, graph = opened(make_toy())
    matrices = made_up([-1e-3, *(1e-4 * count for count in range(1, 14))])

    def measured(_checkpoint: Checkpoint, _graph: Graph, scheme: WeightScheme, *_: Any, **__: Any) -> float:
        left = [m.kl_nats for m in matrices[1:] if scheme.precision(m.name) is Precision.INT4]
        return 1e-3 + 2 * sum(left)

    monkeypatch.setattr(sensitivity, "measure_sensitivity", lambda *_, **__: matrices)
    monkeypatch.setattr(sensitivity, "measure_kl", measured)
    recorder = Recorder()
    rules = meet_kl(checkpoint, graph, INT4, some_windows(), max_kl_nats=3.1e-3, progress=recorder)
    assert recorder.stages.count("measuring the KL of what is chosen") == 1
    assert rules == choose_for_kl(matrices, INT4, SPEC, max_kl_nats=3.1e-3, int8_kl_nats=1e-3, excess=2.0)


def test_a_kl_that_needs_no_int8_is_met_without_measuring_each_matrix(make_toy: Callable[..., Toy]) -> None:
    checkpoint, graph = opened(make_toy())
    recorder = Recorder()
    assert meet_kl(checkpoint, graph, INT4, some_windows(), max_kl_nats=100.0, progress=recorder) == ()
    assert recorder.stages == ["measuring the KL of all int8", "measuring the KL of all int4"]
    assert recorder.notes[0].startswith("int8 for 0 of 14 matrices: 0.06 MB of weights, mean KL ")


def test_a_kl_below_that_of_int8_is_refused_before_each_matrix_is_measured(make_toy: Callable[..., Toy]) -> None:
    checkpoint, graph = opened(make_toy())
    recorder = Recorder()
    with pytest.raises(
        BudgetError, match=r"the mean KL is \d\S+ nats with as much int8 .* --max-kl is 1e-09"
    ) as caught:
        meet_kl(checkpoint, graph, INT4, some_windows(), max_kl_nats=1e-9, progress=recorder)
    assert caught.value.exit_code == 8
    assert len(recorder.stages) == 2


@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        (INT4, ""),
        (SMALL_ENDS, ", or leave --head int4 out"),
        (
            replace(INT4, rules=(Rule(pattern="layers.1.*", precision=Precision.INT4),)),
            ", or leave --rule ... = int4 out",
        ),
    ],
)
def test_a_kl_that_cannot_be_met_says_what_can_be(scheme: WeightScheme, more: str) -> None:
    matrices = made_up([1e-3] * 14)
    with pytest.raises(BudgetError) as caught:
        choose_for_kl(matrices, scheme, SPEC, max_kl_nats=2e-4, int8_kl_nats=2.0712e-4)
    assert str(caught.value) == (
        "the mean KL is 0.000207 nats with as much int8 as these options allow, --max-kl is 0.0002"
    )
    assert caught.value.hint == f"take --max-kl 0.00021, or take --precision fp16{more}"
    assert choose_for_kl(matrices, scheme, SPEC, max_kl_nats=0.00021, int8_kl_nats=2.0712e-4)


def test_a_budget_below_all_int4_says_what_fits() -> None:
    """By hand, of a vocabulary of 4096: 2 x 24192 bytes of int4 in the body, 1280 of norms, 270336 of int8 at the ends,
    which int4 makes 147456."""
    spec = replace(SPEC, vocab_size=4096)
    with pytest.raises(BudgetError) as caught:
        choose_within_budget([], INT4, spec, budget_bytes=200_000)
    assert str(caught.value) == "the weights take 0.32 MB with as much int4 as these options allow, --budget-mb is 0.2"
    assert caught.value.hint == "take --budget-mb 0.32, or take --head int4 (0.20 MB)"
    assert caught.value.exit_code == 8
    refuse_budget(spec, INT4, budget_bytes=320_000)
    refuse_budget(spec, SMALL_ENDS, budget_bytes=197_120)
    with pytest.raises(BudgetError, match=r"the weights take 0\.20 MB"):
        refuse_budget(spec, SMALL_ENDS, budget_bytes=197_119)


def test_a_head_of_its_own_leaves_the_embedding_as_it_is() -> None:
    spec = replace(SPEC, vocab_size=4096, tie_word_embeddings=False)
    with pytest.raises(BudgetError) as caught:
        refuse_budget(spec, INT4, budget_bytes=500_000)
    assert caught.value.hint == "take --budget-mb 0.60, or take --head int4 (0.47 MB)"


def test_coarser_groups_are_offered_where_they_divide_all_columns() -> None:
    """By hand: 180928 bytes, 167104 in groups of 128 and 166592 with one scale a row."""
    spec = replace(SPEC, hidden_size=128, intermediate_size=256)
    for budget, group_sizes in ((167_104, ["128", "row"]), (166_592, ["row"])):
        with pytest.raises(BudgetError) as caught:
            refuse_budget(spec, INT4, budget_bytes=budget)
        ways = ["take --budget-mb 0.19", *(f"take --group-size {size} (0.17 MB)" for size in group_sizes)]
        assert caught.value.hint == ", or ".join(ways)


def test_a_budget_that_nothing_meets_names_the_least_one() -> None:
    with pytest.raises(BudgetError) as caught:
        refuse_budget(SPEC, INT4, budget_bytes=1000)
    assert caught.value.hint == "take --budget-mb 0.06"


def test_a_budget_that_only_a_rule_stands_against_says_so() -> None:
    """By hand: 2 x 44672 + 256 + 6336 bytes, of which the rules are to blame for all above 56000."""
    with pytest.raises(BudgetError) as caught:
        refuse_budget(SPEC, with_int8(INT4, SPEC, MATRICES), budget_bytes=56_000)
    assert caught.value.hint == "take --budget-mb 0.10, or leave --rule out (0.06 MB)"


def test_a_budget_that_is_too_small_is_refused_before_anything_is_measured(make_toy: Callable[..., Toy]) -> None:
    checkpoint, graph = opened(make_toy())
    recorder = Recorder()
    with pytest.raises(BudgetError, match=r"the weights take 0\.06 MB"):
        meet_budget(checkpoint, graph, INT4, some_windows(), budget_bytes=1000, progress=recorder)
    assert not recorder.stages


def test_another_body_than_int4_is_refused(make_toy: Callable[..., Toy]) -> None:
    checkpoint, graph = opened(make_toy())
    scheme = replace(INT4, body=Precision.INT8)
    with pytest.raises(UsageError, match="choose what an int4 model keeps in int8, --precision is int8") as caught:
        measure_sensitivity(checkpoint, graph, scheme, some_windows(), progress=SILENT)
    assert caught.value.hint == "leave them out, or take --precision int4"


@pytest.mark.parametrize("name", [UP_0, EMBEDDING, HEAD])
def test_a_model_that_is_not_finite_is_refused(make_toy: Callable[..., Toy], name: str) -> None:
    toy = make_toy(tie_word_embeddings=False)
    with torch.no_grad():
        toy.model.get_parameter(name)[:, 3] = float("nan")
    toy.model.save_pretrained(toy.folder)
    checkpoint, graph = opened(toy)
    for measure in (measure_sensitivity, measure_kl):
        with pytest.raises(InputError, match="the model's logits on the text of calibration are not finite"):
            measure(checkpoint, graph, INT4, some_windows(), progress=SILENT)


def test_what_has_been_measured_is_kept_layer_by_layer(
    make_toy: Callable[..., Toy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, graph = opened(make_toy())
    keep, windows = tmp_path / "store" / "kl.json", some_windows()
    whole = measure_sensitivity(checkpoint, graph, INT4, windows, progress=SILENT)
    level = measure_kl(checkpoint, graph, INT4, windows, progress=SILENT)
    original, measured = sensitivity._Model.costs, []

    def stopped(*arguments: Any, **named: Any) -> dict[str, float]:
        measured.append(arguments[1])
        if measured == [0, 1]:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(sensitivity._Model, "costs", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(checkpoint, graph, INT4, windows, progress=SILENT, keep=keep)
    assert measure_kl(checkpoint, graph, INT4, windows, progress=SILENT, keep=keep) == level
    for _ in range(2):
        assert measure_sensitivity(checkpoint, graph, INT4, windows, progress=SILENT, keep=keep) == whole
    assert measured == [0, 1, 1]
    monkeypatch.setattr(sensitivity._Model, "mean_kl", None)
    assert measure_kl(checkpoint, graph, INT4, windows, progress=SILENT, keep=keep) == level
    with pytest.raises(TypeError):  # of another scheme nothing is known
        measure_kl(checkpoint, graph, SMALL_ENDS, windows, progress=SILENT, keep=keep)
    assert set(json.loads(keep.read_text())) > set(MATRICES)


def test_a_kept_file_that_cannot_be_read_is_refused(make_toy: Callable[..., Toy], tmp_path: Path) -> None:
    checkpoint, graph = opened(make_toy())
    keep = tmp_path / "kl.json"
    keep.write_text("{")
    with pytest.raises(InputError, match=r"kl\.json is not JSON") as caught:
        measure_kl(checkpoint, graph, INT4, some_windows(), progress=SILENT, keep=keep)
    assert caught.value.hint == "remove it and run again: it is measured anew"


def test_progress_counts_every_layer_that_is_computed_for_a_matrix(
    make_toy: Callable[..., Toy], tmp_path: Path
) -> None:
    """Those that are found in the file count as well."""
    checkpoint, graph = opened(make_toy(num_hidden_layers=3))
    recorder, found, keep = Recorder(), Recorder(), tmp_path / "kl.json"
    measure_sensitivity(checkpoint, graph, INT4, some_windows(), progress=recorder, keep=keep)
    assert recorder.stages == ["measuring which layers int4 hurts most"]
    measure_sensitivity(checkpoint, graph, INT4, some_windows(), progress=found, keep=keep)
    assert [done for done, _ in found.steps] == [14 * 4, 14 * 7, 14 * 9]
    done = [step for step, _ in recorder.steps]
    assert done == sorted(done)
    assert recorder.steps[-1] == (14 * (4 + 3 + 2), 14 * (4 + 3 + 2))
    assert {total for _, total in recorder.steps} == {14 * 9}


def test_costs_of_single_matrices_add_up_on_a_trained_model(sample: Path) -> None:
    """What all choosing rests on: their sum, and all of them together, are within a tenth of each other."""
    checkpoint = open_checkpoint(sample)
    graph, tokenizer = trace(checkpoint.spec), Tokenizer(sample)
    windows = read_corpus(
        sample / "calibration.txt",
        tokenizer,
        spec=checkpoint.spec,
        windows=1,
        window_length=512,
        seed=0,
        column=None,
        held_out_tokens=0,
    ).windows
    found = measure_sensitivity(checkpoint, graph, INT4, windows, progress=SILENT)
    all_int8 = with_int8(INT4, checkpoint.spec, [matrix.name for matrix in found])
    low, high = (measure_kl(checkpoint, graph, scheme, windows, progress=SILENT) for scheme in (all_int8, INT4))
    assert sum(matrix.kl_nats for matrix in found) == pytest.approx(high - low, rel=0.1)
