"""What is done so that proofs of large models end: in blocks, in batches, by drafts and in slices the results are those
of small models, weights are read once, and nothing as large as the largest weights is ever in memory as floats."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import exporter.spec
import targets
from calibration.layers import quantize
from exporter.checkpoint import open_checkpoint
from exporter.metrics import kl_divergence, negative_log_likelihood, perplexity
from exporter.model import reference
from exporter.model.graph import Graph, Node, Value, Weight, in_slices, walk
from exporter.model.reference import FULL_PRECISION, Reference
from exporter.model.trace import trace
from exporter.parity import drive_for
from exporter.prove import GREEDY_TOKENS_OF_LARGE, ask_reference, make_goldens, prove_parity
from exporter.quality import HEAD_POSITIONS, evaluation_windows, measure_quality
from exporter.spec import Activations, Arithmetic, Artifact, Plan, Verdict
from exporter.store import StoredWeight, WeightStore
from exporter.tokenizer import Tokenizer
from tests.conftest import Toy

IDS = torch.randint(96, (40,), generator=torch.Generator().manual_seed(0)).tolist()
ARITHMETICS = [
    FULL_PRECISION,
    Arithmetic(activations=Activations.INT8_PER_TOKEN, compute_dtype="fp32", kv_dtype="fp32"),
    Arithmetic(activations=Activations.INT8_PER_BLOCK, compute_dtype="fp32", kv_dtype="fp32"),
    Arithmetic(activations=Activations.FLOAT, compute_dtype="fp16", kv_dtype="fp16", dequantized_dtype="fp16"),
]


class Counted:
    """Weights, and how often each has been asked for."""

    def __init__(self, weights: Any) -> None:
        self._weights = weights
        self.reads: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def __getitem__(self, name: str) -> StoredWeight:
        self.reads[name] += 1
        return self._weights[name]


class LargestFloats(TorchDispatchMode):
    """Bytes of the largest float tensor that any op makes; a view, as of a mapped file, is none."""

    largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not op.is_view and isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.nbytes)
        return result


def quantized(toy: Toy, plan: Plan) -> tuple[Graph, WeightStore]:
    checkpoint = open_checkpoint(toy.folder)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    return trace(checkpoint.spec), store


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "fp32"])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_matrix_in_blocks_of_rows_gives_the_same_bits(
    make_toy: Callable[..., Toy],
    make_plan: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    arithmetic: Arithmetic,
    tied: bool,
) -> None:
    toy = make_toy(tie_word_embeddings=tied)
    graph, store = quantized(toy, make_plan(toy.folder, precision=precision))
    whole = Reference(graph, store, arithmetic).feed(IDS)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 4 * 64 * 16)
    blocks = Counter[str]()
    original = reference._Matrix.rows

    def rows(self: Any, which: Any) -> Tensor:
        blocks["rows"] += 1
        return original(self, which)

    monkeypatch.setattr(reference._Matrix, "rows", rows)
    assert torch.equal(Reference(graph, store, arithmetic, keep_bytes=0).feed(IDS), whole)
    assert blocks["rows"] > 2 * len(graph.nodes) or precision == "fp32"


@pytest.mark.parametrize("precision", ["int4", "int8", "fp16"])
def test_a_pass_reads_each_weight_once_and_holds_no_large_one_as_floats(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    toy = make_toy(tie_word_embeddings=False, vocab_size=4096)
    graph, store = quantized(toy, make_plan(toy.folder, precision=precision))
    monkeypatch.setattr(reference, "BLOCK_BYTES", 16 << 10)
    counted = Counted(store)
    asked = Reference(graph, counted, FULL_PRECISION, keep_bytes=0)
    ids = torch.tensor([IDS[:3]])
    with LargestFloats() as seen:
        hidden = asked.before_head(ids)
        asked.head(hidden)
    assert counted.reads == dict.fromkeys(store, 1)
    head_bytes = 4 * 4096 * 64
    most = head_bytes // 2 if precision == "fp16" else 4096 * 3 * 4  # as it is stored, or the logits
    assert seen.largest == most


def test_ask_reference_reads_each_weight_once_for_each_of_its_two_answers(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    toy = make_toy(tie_word_embeddings=False)
    plan = make_plan(toy.folder)
    graph, store = quantized(toy, plan)
    counted = Counted(store)
    artifact = artifact_of(graph, plan, "onnxruntime")
    ask_reference(graph, counted, artifact, drive_for(IDS, context=64))  # type: ignore[arg-type]
    assert counted.reads == dict.fromkeys(store, 2)


def artifact_of(graph: Graph, plan: Plan, name: str) -> Artifact:
    target = targets.load(name)
    return Artifact(
        target=name,
        backend=target.backend,
        path=plan.out / "none",
        spec=graph.spec,
        scheme=plan.scheme,
        arithmetic=target.arithmetic(plan.scheme),
        context=plan.context,
        logits=plan.logits,
    )


# --- quality -----------------------------------------------------------------------------------------------------


def windows_of(sample: Path, *, context: int) -> list[list[int]]:
    text = (sample / "evaluation.txt").read_text(encoding="utf-8")
    return evaluation_windows(Tokenizer(sample).encode(text), bos=1, context=context)


def test_quality_of_all_windows_at_once_is_that_of_one_by_one(sample: Path, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(sample)
    checkpoint = open_checkpoint(sample)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    graph, windows = trace(checkpoint.spec), windows_of(sample, context=200)[:7]
    truth = {name: checkpoint.read(name).float() for name in checkpoint.spec.weights()}
    for arithmetic, allowed in ((FULL_PRECISION, 1e-5), (ARITHMETICS[1], 0.05)):
        counted, counted_truth = Counted(store), Counted(truth)
        steps = count()
        report = measure_quality(
            windows,
            truth=Reference(graph, counted_truth, FULL_PRECISION, keep_bytes=0),
            candidates={"it": Reference(graph, counted, arithmetic, keep_bytes=0)},
            budget_nats=1.0,
            on_layer=partial(next, steps),
        )["it"]
        exact, lossy = Reference(graph, truth, FULL_PRECISION), Reference(graph, store, arithmetic)
        kl, nll, exact_nll, same = [], [], [], []
        for window in windows:
            exact.rewind(0)
            lossy.rewind(0)
            p, q = exact.feed(window), lossy.feed(window)
            kl.append(kl_divergence(p, q))
            nll.append(negative_log_likelihood(q[:-1], torch.tensor(window[1:])))
            exact_nll.append(negative_log_likelihood(p[:-1], torch.tensor(window[1:])))
            same.append(p.argmax(dim=1) == q.argmax(dim=1))
        figures = report.figures
        assert figures["positions"] == 7 * len(windows[0])
        assert figures["mean_kl_nats"] == pytest.approx(torch.cat(kl).mean().item(), rel=allowed)
        assert figures["perplexity"] == pytest.approx(perplexity(torch.cat(nll)), rel=allowed)
        assert figures["reference_perplexity"] == pytest.approx(perplexity(torch.cat(exact_nll)), rel=1e-5)
        assert figures["top1_agreement"] == pytest.approx(torch.cat(same).double().mean().item(), abs=2e-3)
        heads = math.ceil(7 / (HEAD_POSITIONS // len(windows[0])))
        tied = graph.head.arguments[1]
        assert isinstance(tied, Weight)
        for reads in (counted.reads, counted_truth.reads):
            assert reads == {**dict.fromkeys(store, 1), tied.name: heads + (tied.name == "model.embed_tokens.weight")}
        assert next(steps) == 2 * graph.spec.num_hidden_layers


# --- goldens by drafts -------------------------------------------------------------------------------------------


def one_by_one(model: Reference, ids: Sequence[int], *, count: int, stops: Sequence[int]) -> list[tuple[int, float]]:
    model.rewind(0)
    answer: list[tuple[int, float]] = []
    while len(answer) < count and not (answer and answer[-1][0] in stops):
        best = model.feed([answer[-1][0]] if answer else ids)[-1].topk(2)
        answer.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
    return answer


@pytest.mark.parametrize("seed", range(4))
def test_greedy_answers_by_drafts_are_those_of_one_token_after_another(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], seed: int
) -> None:
    toy = make_toy(seed=seed)
    graph, store = quantized(toy, make_plan(toy.folder))
    prompts, counts = [IDS[:5], IDS[7:8], IDS[10:22]], [20, 1, 13]
    model = Reference(graph, store, FULL_PRECISION)
    stop = one_by_one(model, prompts[0], count=20, stops=())[6][0]
    for stops in ((), (stop,)):
        expected = [one_by_one(model, ids, count=n, stops=stops) for ids, n in zip(prompts, counts, strict=True)]
        got = model.greedy_answers(prompts, counts=counts, stops=stops)
        for one, other in zip(got, expected, strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
            assert [margin for _, margin in one] == pytest.approx([margin for _, margin in other], abs=1e-4)


def test_a_right_draft_is_taken_whole(sample: Path, make_plan: Callable[..., Plan]) -> None:
    """A model that says the same token for ever is guessed from the first pass on."""
    plan = make_plan(sample)
    checkpoint = open_checkpoint(sample)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    counted = Counted(store)
    model = Reference(trace(checkpoint.spec), counted, FULL_PRECISION, keep_bytes=0)
    ids = Tokenizer(sample).encode("The people of the United States")
    answer = model.greedy(ids, count=24, stops=())
    assert len(answer) == 24
    passes = counted.reads["model.layers.0.mlp.up_proj.weight"]
    assert passes < 24
    assert [t for t, _ in answer] == [t for t, _ in one_by_one(model, ids, count=24, stops=())]


# --- slices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "limit_layers", "sizes"), [(5, 1, [1] * 5), (5, 2, [2, 2, 1]), (5, 0.1, [1] * 5)])
def test_slices_cover_every_layer_once_and_name_every_weight(
    make_toy: Callable[..., Toy], layers: int, limit_layers: float, sizes: list[int]
) -> None:
    spec = open_checkpoint(make_toy(num_hidden_layers=layers, tie_word_embeddings=False).folder).spec
    graph = trace(spec)
    layer_bytes = 4 * sum(math.prod(s) for name, s in spec.weights().items() if name.startswith("model.layers.0."))
    slices = in_slices(graph, limit_bytes=int(limit_layers * layer_bytes))
    found = [sorted({node.layer for node in part.nodes if node.layer is not None}) for part in slices]
    assert [len(indices) for indices in found] == [*sizes, 0]
    assert [index for indices in found for index in indices] == list(range(layers))
    named = {a.name for part in slices for node in part.nodes for a in node.arguments if isinstance(a, Weight)}
    assert named == set(spec.weights())
    for part, indices in zip(slices, found, strict=True):
        assert set(part.inputs) == {"ids", *(f"past_{kind}.{index}" for kind in "kv" for index in indices)}
    assert in_slices(graph, limit_bytes=4 * spec.parameters) == [graph]


def test_a_slice_computes_what_transformers_computes_with_those_layers_alone(
    make_toy: Callable[..., Toy], make_plan: Callable[..., Plan]
) -> None:
    toy = make_toy(num_hidden_layers=4, tie_word_embeddings=False)
    graph, store = quantized(toy, make_plan(toy.folder, precision="fp32"))
    decoder = toy.model.model
    all_layers = decoder.layers
    cases = [(range(1, 3), False), (range(4), True), (range(3, 4), True), (range(0, 1), False), (range(0), True)]
    for indices, head in cases:
        decoder.layers = torch.nn.ModuleList(all_layers[index] for index in indices)
        decoder.config.num_hidden_layers = len(indices)
        with torch.no_grad():
            hidden = decoder(torch.tensor([IDS]), use_cache=False).last_hidden_state
            expected = (toy.model.lm_head(hidden) if head else hidden)[0]
        got = Reference(graph.shortened(indices, head=head), store, FULL_PRECISION)
        first, second = got.feed(IDS[:30]), got.feed(IDS[30:])
        assert (torch.cat([first, second]) - expected).abs().max() < 1e-4


def test_a_walk_keeps_nothing_that_is_not_read_any_more(make_toy: Callable[..., Toy]) -> None:
    graph = trace(open_checkpoint(make_toy().folder).spec)
    alive = []
    values: dict[Value, Any] = dict.fromkeys(map(Value, graph.inputs), 0)
    table = dict.fromkeys(("embedding", "linear", "rms_norm", "silu", "mul", "add"), lambda *_: 0)
    logits = graph.outputs["logits"]
    walk(
        graph.nodes,
        {**table, "attention": lambda *_: (0, 0, 0)},
        values,
        lambda *_: alive.append(len(values)),
        wanted={logits},
    )
    assert set(values) == {logits}
    assert max(alive) <= len(graph.inputs) + 6


# --- the structure of a model that is large ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A toy of three layers, lowered for ExecuTorch, whose structure is proven in slices of one layer."""

    artifact: Artifact
    graph: Graph
    store: WeightStore
    plan: Plan

    def structure(self, *, graph: Graph | None = None, store: Any = None) -> Any:
        """The report, where ``graph`` and ``store`` are what the structure is lowered from."""
        answers = ask_reference(self.graph, self.store, self.artifact, drive_for(IDS, context=64))
        return prove_parity(
            targets.load("executorch"),
            self.artifact,
            answers,
            graph=graph or self.graph,
            store=store or self.store,
            plan=self.plan,
        )


@pytest.fixture
def sliced(make_toy: Callable[..., Toy], make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Case:
    import targets.executorch as module

    target = targets.load("executorch")
    toy = make_toy(num_hidden_layers=3)
    plan = make_plan(toy.folder, targets=("executorch",))
    graph, store = quantized(toy, plan)
    plan.out.mkdir()
    artifact = target.lower(graph, store, plan, plan.out)
    monkeypatch.setattr(module, "STRUCTURE_BYTES", 1)
    assert len(target.structure_parts(graph, plan.scheme)) == 4
    return Case(artifact=artifact, graph=graph, store=store, plan=plan)


@pytest.mark.toolchain
def test_structure_in_slices_passes(sliced: Case) -> None:
    report = sliced.structure()
    assert report.verdict is Verdict.PASSED, report
    assert 0 < report.figures["structure_max_abs_logit_diff"] < 1e-4


@pytest.mark.toolchain
@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_a_wrong_epsilon_in_one_layer_is_seen_in_its_slice(sliced: Case, layer: int | None) -> None:
    report = sliced.structure(graph=with_epsilon(sliced.graph, layer=layer, eps=3e-4))
    assert report.verdict is Verdict.FAILED
    assert report.reason.startswith("structure")


@pytest.mark.toolchain
@pytest.mark.parametrize("eps", [None, 3e-4])
def test_a_large_model_is_bound_by_its_floor_where_that_is_more(
    sliced: Case, monkeypatch: pytest.MonkeyPatch, eps: float | None
) -> None:
    import exporter.parity

    monkeypatch.setattr(exporter.parity, "STRUCTURE_MAX_ABS", 1e-9)
    assert sliced.structure().verdict is Verdict.FAILED  # it is small
    monkeypatch.setattr(exporter.spec, "LARGE_PARAMETERS", 1000)
    report = sliced.structure(graph=with_epsilon(sliced.graph, layer=1, eps=eps) if eps else None)
    assert report.verdict is (Verdict.FAILED if eps else Verdict.PASSED)
    assert 1e-7 < report.figures["gate_structure_max_abs"] < 1e-3


def with_epsilon(graph: Graph, *, layer: int | None, eps: float) -> Graph:
    def wrong(node: Node) -> Node:
        if node.op != "rms_norm" or node.layer != layer:
            return node
        return dataclasses.replace(node, arguments=(*node.arguments[:-1], eps))

    return dataclasses.replace(graph, nodes=tuple(map(wrong, graph.nodes)))


class Swapped:
    """A store that answers for one tensor with another."""

    def __init__(self, store: WeightStore, wanted: str, given: str) -> None:
        self._store, self._wanted, self._given = store, wanted, given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __getitem__(self, name: str) -> StoredWeight:
        if name != self._wanted:
            return self._store[name]
        given = self._store[self._given]
        return given if isinstance(given, Tensor) else dataclasses.replace(given, name=name)


@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.2.self_attn.k_proj.weight", "model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_swapped_weight_is_seen_in_its_slice(sliced: Case, wanted: str, given: str) -> None:
    report = sliced.structure(store=Swapped(sliced.store, wanted, given))
    assert report.verdict is Verdict.FAILED
    assert report.reason.startswith("structure")


@pytest.mark.toolchain
@pytest.mark.parametrize("name", targets.NAMES)
def test_of_a_large_model_less_is_decoded_where_that_takes_long_and_the_report_says_so(
    name: str, sample: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration.layers import SILENT
    from exporter.pipeline import export

    monkeypatch.setattr(exporter.spec, "LARGE_PARAMETERS", 1000)
    plan = make_plan(sample, targets=(name,), context=320)
    (outcome,) = export(plan, SILENT)
    assert outcome.exit_code == 0
    assert outcome.manifest
    parity = outcome.manifest["parity"]
    slow = targets.load(name).is_slow(open_checkpoint(sample).spec)
    assert slow == (targets.load(name).latency_unmeasurable() is not None)
    assert parity["positions"] == (10 if slow else 194)
    assert parity["structure_positions"] == 10
    from exporter.bundle import Goldens

    goldens = Goldens.read(outcome.folder)
    assert len(goldens.drive.positions) == parity["positions"]
    for prompt in goldens.prompts:
        assert 0 < len(prompt["greedy_ids"]) == len(prompt["greedy_margins"]) <= GREEDY_TOKENS_OF_LARGE


def test_goldens_of_a_small_model_are_as_long_as_ever(sample: Path, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(sample, context=320)
    checkpoint = open_checkpoint(sample)
    store, _ = quantize(checkpoint, plan.scheme, root=plan.store)
    graph, tokenizer = trace(checkpoint.spec), Tokenizer(sample)
    artifact = artifact_of(graph, plan, "onnxruntime")
    answers = ask_reference(graph, store, artifact, drive_for(IDS, context=320))
    goldens = make_goldens(answers, graph=graph, store=store, artifact=artifact, tokenizer=tokenizer)
    assert max(len(prompt["greedy_ids"]) for prompt in goldens.prompts) == 32
    model = Reference(graph, store, artifact.arithmetic)
    for prompt in goldens.prompts:
        expected = one_by_one(model, prompt["ids"], count=32, stops=artifact.spec.eos_token_ids)
        clear = [margin > 1e-2 for _, margin in expected]
        upto = clear.index(False) if False in clear else len(clear)
        assert prompt["greedy_ids"][:upto] == [token for token, _ in expected][:upto]
        assert upto >= 4
